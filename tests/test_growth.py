"""A grown model computes what its seed does, has the published shape, and its copies part."""
import math
import re
from dataclasses import replace

import pytest
import torch

import reference
from model import Motif
from tools.grow import grow, grow_depth, grow_width
from muonclip import configure_optimizer
from test_model import BASE, MOTIF_12B, MOTIF_2_6B, make, tokens

ONE_TO_ONE = {"num_attention_heads": 4}
SEEDS = {
    "1:1": ONE_TO_ONE,
    "1:1, tied": {**ONE_TO_ONE, "tie_word_embeddings": True},
    "2:1, fewer pairs than noise heads": {"num_attention_heads": 12, "num_noise_heads": 4},
    "plain attention, SwiGLU": {"num_attention_heads": 8, "num_noise_heads": 0,
                                "activation": "swiglu"},
}
GROWTHS = {
    "width": lambda m, noise: grow_width(m, 2, 4, noise),
    "three times the width": lambda m, noise: grow_width(m, 3, 4, noise),
    "heads alone": lambda m, noise: grow_width(m, 1, 4, noise),
    "depth": lambda m, noise: grow_depth(m, 2),
    "both": lambda m, noise: grow(m, replace(
        m.config, hidden_size=40, intermediate_size=56, num_hidden_layers=6,
        num_attention_heads=5 * m.config.num_noise_heads or 16, tie_word_embeddings=False,
        rope_theta=7.0, max_position_embeddings=99), noise),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("growth", GROWTHS)
@torch.no_grad()
def test_a_grown_model_has_the_logits_of_its_seed(seed, growth):
    ids = tokens(2, 9)
    for dtype, tolerance in (torch.float32, 1e-5), (torch.float64, 1e-12):
        model = make(**SEEDS[seed]).to(dtype)
        before, logits = {n: t.clone() for n, t in model.state_dict().items()}, model(ids)
        for noise in 10.0, math.inf:
            larger = GROWTHS[growth](model, noise)
            assert (larger(ids) - logits).abs().max() <= tolerance
            assert larger.config.rope_theta == 100 and {p.dtype for p in larger.parameters()} == {
                dtype} and all(p.requires_grad for p in larger.parameters())
            for p in larger.parameters():
                p.zero_()
        after = model.state_dict()
        assert all(torch.equal(t, after[n]) for n, t in before.items())  # and none of it is shared


def test_it_is_the_independent_equations_too_and_its_files_say_so(tmp_path):
    model, ids = make(**ONE_TO_ONE, tie_word_embeddings=True), tokens(1, 5)
    grow_depth(grow_width(model, 2, 4), 1).save_pretrained(tmp_path)
    larger = Motif.from_pretrained(tmp_path)
    logits = reference.motif_logits(larger.state_dict(), larger.config.to_dict(), ids)
    assert abs(logits - model(ids).detach().numpy()).max() <= 1e-4


def test_the_seed_of_the_released_model_grows_to_its_shape():
    with torch.device("meta"):
        seed, expected = Motif(MOTIF_2_6B), Motif(MOTIF_12B)
    larger = grow(seed, MOTIF_12B)
    assert sum(p.numel() for p in larger.parameters()) == 12_703_860_896
    shapes = {name: p.shape for name, p in expected.named_parameters()}
    assert {name: p.shape for name, p in larger.named_parameters()} == shapes
    assert larger.config == replace(MOTIF_12B, rope_theta=1e4)


def test_a_copied_layer_is_its_original_without_a_voice_and_half_precision_keeps_the_lambdas():
    model = make(**ONE_TO_ONE).bfloat16()
    larger = grow_depth(model, 2)                        # layers 0, 1, 1 again, 2
    layers = larger.model.layers
    assert len(layers) == 4 and not layers[2].self_attn.o_proj.weight.any()
    assert not layers[2].mlp.down_proj.weight.any()
    for old, new in (0, 0), (1, 1), (1, 2), (2, 3):
        a, b = model.model.layers[old], layers[new]
        assert torch.equal(a.self_attn.q_proj.weight, b.self_attn.q_proj.weight)
        torch.testing.assert_close(a.self_attn.lambda_(), b.self_attn.lambda_())
        scales = [x.self_attn.subln.weight.double() * (1 - x.self_attn.lambda_init())
                  for x in (a, b)]
        torch.testing.assert_close(*scales, rtol=1e-6, atol=0)
        assert b.self_attn.lambda_q2.dtype == b.self_attn.subln.weight.dtype == torch.float32
        assert b.self_attn.lambda_q2.any() and b.mlp.gate_proj.weight.dtype == torch.bfloat16


def halves_and_ranks(model):
    """Per matrix of a layer: how far its halves differ, and its rank, both relative."""
    block, found = model.model.layers[1], {}
    for name, weight, dim in (("gate rows", block.mlp.gate_proj.weight, 0),
                              ("gate", block.mlp.gate_proj.weight, 1),
                              ("down", block.mlp.down_proj.weight, 0),
                              ("o", block.self_attn.o_proj.weight, 0),
                              ("embedding", model.model.embed_tokens.weight, 1)):
        a, b = weight.detach().chunk(2, dim)
        rank = torch.linalg.matrix_rank(weight.detach().double(), rtol=1e-4)
        found[name] = ((a - b).norm() / a.norm()).item(), rank.item() / min(weight.shape)
    return found


@pytest.mark.parametrize("noise", [10.0, math.inf])
def test_copies_part_by_noise_alone(noise):
    larger, ids = grow_width(make(**ONE_TO_ONE, hidden_size=12), 2, 4, noise), tokens(4, 10)
    optimizer = configure_optimizer(larger, lr=0.02)
    for _ in range(5):
        larger(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(max_logits=larger.max_logits)
        optimizer.zero_grad()
    for name, (apart, rank) in halves_and_ranks(larger).items():
        if noise == math.inf:
            assert apart <= 1e-5 and rank == 0.5, name
        else:
            assert apart > 0.01 and rank == 1, name


@pytest.mark.parametrize("changes, message", [
    ({"vocab_size": 30}, "vocab_size=29 cannot grow to 30: new words would take"),
    ({"hidden_size": 30}, "hidden_size=20 cannot grow to 30: it must be a multiple"),
    ({"hidden_size": 10}, "hidden_size=20 cannot grow to 10: "),
    ({"hidden_size": 40}, "intermediate_size=28 cannot grow to 28: it must grow as hidden_size "
                          "does, 2 times"),
    ({"num_attention_heads": 8, "num_noise_heads": 4}, "num_noise_heads=2 cannot grow to 4: "),
    ({"num_attention_heads": 6}, "num_attention_heads=10 cannot grow to 6: 4 signal heads are no"),
    ({"num_attention_heads": 14}, "num_attention_heads=10 cannot grow to 14: 12 signal heads are"),
    ({"num_key_value_heads": 2}, "num_key_value_heads=4 cannot grow to 2: "),
    ({"head_dim": 8}, "head_dim=6 cannot grow to 8: "),
    ({"activation": "swiglu"}, "activation=poly_norm cannot grow to swiglu: it is another"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-06 cannot grow to 1e-05: it is another"),
    ({"num_hidden_layers": 7}, "num_hidden_layers=3 cannot grow to 7: copies after every 1, 2, "
                               "... layers make 4, 6"),
    ({"num_hidden_layers": 5}, "num_hidden_layers=3 cannot grow to 5: "),
    ({"num_hidden_layers": 2}, "num_hidden_layers=3 cannot grow to 2: "),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=False cannot grow to True: the head of"),
    ({"head_dim": 8, "vocab_size": 30}, "vocab_size=29 cannot .*; head_dim=6 cannot "),
    ({"num_attention_heads": 9}, "num_attention_heads=9 must be num_noise_heads=2 groups"),
])
def test_what_cannot_be_reached_is_named_in_one_line(changes, message):
    with pytest.raises(ValueError, match=f"^{message}") as e:
        grow(make(), replace(BASE, **changes))
    assert "\n" not in str(e.value)


def test_factors_that_cannot_be_say_so():
    model = make(**ONE_TO_ONE, tie_word_embeddings=True)
    for growth in lambda: grow_width(model, 0, 4), lambda: grow_width(model, 2, 0):
        with pytest.raises(ValueError, match="hidden_size must be at least 1|at least one signal"):
            growth()
    with pytest.raises(ValueError, match="^" + re.escape("a layer is copied after every 1 or")):
        grow_depth(model, 0)
    with pytest.raises(ValueError, match="^tie_word_embeddings=True cannot grow to True"):
        grow(model, replace(model.config, hidden_size=40, intermediate_size=56))
