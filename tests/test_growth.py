"""A grown model computes what the small one does, has the published shape, and its copies part."""
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import reference
from configurator import UserError
from model import Motif, MotifConfig
from muonclip import configure_optimizer
from tools import grow as grow_file
from tools.grow import (NOISE_DB, average, build_grown, check_growth, grow, grow_into,
                        num_groups)

# 1:1, as Motif-2.6B is
SMALL = MotifConfig(vocab_size=29, hidden_size=20, intermediate_size=28, num_hidden_layers=3,
                    num_attention_heads=4, num_key_value_heads=4, num_noise_heads=2, head_dim=6,
                    rope_theta=100.0, max_position_embeddings=16)
SHAPES = {
    "1:1": {},
    "1:1, tied": {"tie_word_embeddings": True},
    "2:1, fewer pairs than noise heads": {"num_attention_heads": 12, "num_noise_heads": 4},
    "plain attention, SwiGLU": {"num_attention_heads": 8, "num_noise_heads": 0,
                                "activation": "swiglu"},
}
MOTIF_2_6B = MotifConfig(219_520, 2048, 8192, 32, 16, 16, 8, 128, tie_word_embeddings=True)
MOTIF_12B = MotifConfig(219_520, 4096, 16384, 40, 40, 16, 8, 128, rope_theta=1e6,
                        max_position_embeddings=32768)


def make(**changes):
    """A model whose every parameter matters: a fresh one has small logits and norms of 1."""
    torch.manual_seed(0)
    model = Motif(replace(SMALL, **changes))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.3))
    return model


def tokens(*shape):
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def grow_width(model: Motif, factor: int, signal_ratio: int, noise_db: float = NOISE_DB,
               seed: int = 0) -> Motif:
    """Grow stream and MLP to `factor` times their width, and to signal_ratio signal heads for each
    noise head (without noise heads: query heads for each key head)."""
    c = model.config
    signal_heads = signal_ratio * num_groups(c)
    config = replace(c, hidden_size=factor * c.hidden_size,
                     intermediate_size=factor * c.intermediate_size,
                     num_attention_heads=signal_heads + c.num_noise_heads,
                     tie_word_embeddings=c.tie_word_embeddings and factor == 1)
    return grow(model, config, noise_db, seed)


def grow_depth(model: Motif, every: int) -> Motif:
    """Add, after every `every` layers, a copy of the last of them that is the identity at first."""
    layers = model.config.num_hidden_layers
    config = replace(model.config, num_hidden_layers=layers + layers // every)
    return build_grown(model, config, every)


def grow_both(model, noise_db):
    heads = 5 * model.config.num_noise_heads or 16
    return grow(model, replace(model.config, hidden_size=40, intermediate_size=56,
                               num_hidden_layers=6, num_attention_heads=heads,
                               tie_word_embeddings=False, rope_theta=7.0), noise_db)


GROWTHS = {
    "width": lambda model, noise_db: grow_width(model, 2, 4, noise_db),
    "three times the width": lambda model, noise_db: grow_width(model, 3, 4, noise_db),
    "heads alone": lambda model, noise_db: grow_width(model, 1, 4, noise_db),
    "depth": lambda model, noise_db: grow_depth(model, 2),
    "both": grow_both,
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("growth", GROWTHS)
@torch.no_grad()
def test_a_grown_model_has_the_logits_of_the_small_one(shape, growth, dtype, tolerance):
    ids = tokens(2, 9)
    model = make(**SHAPES[shape]).to(dtype)
    logits = model(ids)

    for noise_db in 10.0, math.inf:
        larger = GROWTHS[growth](model, noise_db)
        assert (larger(ids) - logits).abs().max() <= tolerance
        assert larger.config.rope_theta == SMALL.rope_theta
        for p in larger.parameters():
            assert p.dtype == dtype and p.requires_grad
            p.zero_()
    assert torch.equal(model(ids), logits)          # no memory is shared


@pytest.mark.parametrize("growth", ["depth", "both"])
@pytest.mark.parametrize("file_bytes", [4000, 10**9])
def test_growth_into_files_is_growth(tmp_path, monkeypatch, file_bytes, growth):
    """Into several files or one, it writes what the model that is grown in memory would."""
    monkeypatch.setattr(grow_file, "FILE_BYTES", file_bytes)
    model = make(tie_word_embeddings=True)
    config = GROWTHS[growth](model, 10.0).config
    grow(model, config, seed=3).save_pretrained(tmp_path / "memory", file_bytes)
    grow_into(tmp_path / "files", model, config, seed=3)
    names = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert (len(names) > 4) == (file_bytes == 4000)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == names
    for name in names:
        written = (tmp_path / "files" / name).read_bytes()
        assert written == (tmp_path / "memory" / name).read_bytes()


def test_growth_that_fails_leaves_no_model(tmp_path, monkeypatch):
    """Neither a half of the new one nor an earlier one."""
    monkeypatch.setattr(grow_file, "FILE_BYTES", 4000)
    model = make()
    config = grow_both(model, 10.0).config
    folder = tmp_path / "init"
    grow_into(folder, model, config, seed=1)

    def disk_is_full(tensors, path, metadata):
        if "00003" in path.name:
            raise OSError("no space left on device")
        real(tensors, path, metadata)

    real = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", disk_is_full)
    with pytest.raises(OSError):
        grow_into(folder, model, config, seed=2)
    assert not list(folder.iterdir())


def test_the_reference_gives_the_saved_model_the_same_logits(tmp_path):
    model = make(tie_word_embeddings=True)
    ids = tokens(1, 5)
    grow_depth(grow_width(model, 2, 4), 1).save_pretrained(tmp_path)

    larger = Motif.from_pretrained(tmp_path)
    logits = reference.motif_logits(larger.state_dict(), larger.config.to_dict(), ids)
    assert abs(logits - model(ids).detach().numpy()).max() <= 1e-4


def test_motif_2_6b_grows_to_the_published_shape():
    with torch.device("meta"):
        small = Motif(MOTIF_2_6B)
        expected = Motif(MOTIF_12B)
    larger = grow(small, MOTIF_12B)

    assert sum(p.numel() for p in larger.parameters()) == 12_703_860_896
    shapes = {name: p.shape for name, p in expected.named_parameters()}
    assert {name: p.shape for name, p in larger.named_parameters()} == shapes
    assert larger.config == replace(MOTIF_12B, rope_theta=MOTIF_2_6B.rope_theta)


def test_a_copied_layer_adds_nothing_and_a_moved_one_keeps_its_lambda():
    model = make().bfloat16()
    larger = grow_depth(model, 2)                   # layers 0, 1, 1 again, 2
    layers = larger.model.layers
    assert len(layers) == 4
    assert not layers[2].self_attn.o_proj.weight.any()
    assert not layers[2].mlp.down_proj.weight.any()

    for old, new in [(0, 0), (1, 1), (1, 2), (2, 3)]:
        a = model.model.layers[old].self_attn
        b = layers[new].self_attn
        assert torch.equal(a.q_proj.weight, b.q_proj.weight)
        torch.testing.assert_close(a.lambda_(), b.lambda_())
        scale_a = a.subln.weight.double() * (1 - a.initial_lambda())
        scale_b = b.subln.weight.double() * (1 - b.initial_lambda())
        torch.testing.assert_close(scale_a, scale_b, rtol=1e-6, atol=0)
        # In a bf16 model what holds lambda stays fp32.
        assert b.lambda_q2.dtype == b.subln.weight.dtype == torch.float32
        assert b.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("noise_db", [10.0, math.inf])
def test_only_noise_lets_the_copies_part(noise_db):
    larger = grow_width(make(hidden_size=12), 2, 4, noise_db)
    ids = tokens(4, 10)
    optimizer = configure_optimizer(larger, lr=0.02)
    for _ in range(5):
        larger(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(max_logits=larger.max_logits)
        optimizer.zero_grad()

    block = larger.model.layers[1]
    halves = {
        "gate's rows": (block.mlp.gate_proj.weight, 0),
        "gate's columns": (block.mlp.gate_proj.weight, 1),
        "down's rows": (block.mlp.down_proj.weight, 0),
        "o's rows": (block.self_attn.o_proj.weight, 0),
        "the embedding's columns": (larger.model.embed_tokens.weight, 1),
    }
    for name, (weight, dim) in halves.items():
        a, b = weight.detach().chunk(2, dim)
        difference = ((a - b).norm() / a.norm()).item()
        rank = torch.linalg.matrix_rank(weight.detach().double(), rtol=1e-4).item()
        if noise_db == math.inf:
            assert difference <= 1e-5 and rank == min(weight.shape) / 2, name
        else:
            assert difference > 0.01 and rank == min(weight.shape), name


@pytest.mark.parametrize("changes", [
    {"vocab_size": 30}, {"hidden_size": 30}, {"hidden_size": 10}, {"intermediate_size": 56},
    {"num_noise_heads": 4, "num_attention_heads": 8}, {"num_attention_heads": 9},
    {"num_attention_heads": 6}, {"num_attention_heads": 14}, {"num_key_value_heads": 2},
    {"head_dim": 8}, {"activation": "swiglu"}, {"rms_norm_eps": 1e-5}, {"num_hidden_layers": 7},
    {"num_hidden_layers": 2}, {"tie_word_embeddings": True},
    {"head_dim": 8, "vocab_size": 30},
])
def test_a_shape_that_cannot_be_reached_is_refused_with_its_keys(changes):
    small = replace(SMALL, num_attention_heads=10)      # 4:1
    with pytest.raises(UserError) as e:
        check_growth(small, replace(small, **changes))
    assert "\n" not in str(e.value)
    for key in changes:
        assert key in str(e.value)


def test_factors_below_one_are_refused():
    with pytest.raises(UserError, match="hidden_size"):
        grow_width(make(), 0, 4)
    with pytest.raises(UserError, match="num_attention_heads"):
        grow_width(make(), 2, 0)


@pytest.mark.parametrize("changes", [
    {"rope_theta": 500_000.0}, {"attn_rms_norm_eps": 1e-6}, {"hidden_size": 40},
    {"tie_word_embeddings": True}, {"num_attention_heads": 6}, {"max_position_embeddings": 32}])
def test_checkpoints_that_compute_something_else_are_not_averaged(tmp_path, changes):
    for step, model in [(1, make()), (2, make(**changes)), (3, make(**changes))]:
        model.save_pretrained(tmp_path / f"step_{step}")
    with pytest.raises(UserError) as e:
        average(tmp_path, 3)
    key = next(iter(changes))
    assert key in str(e.value) and "step_2" in str(e.value) and "\n" not in str(e.value)
    assert average(tmp_path, 2).config == make(**changes).config
