"""The model against reference.py in float64, against PyTorch, against itself, and its files."""
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

import kernels
import model as motif
import reference
from configurator import UserError
from model import Decoder, KVCache, Motif, MotifConfig, flops_per_token
from support import generation

BASE = MotifConfig(vocab_size=29, hidden_size=20, intermediate_size=28, num_hidden_layers=3,
                   num_attention_heads=10, num_key_value_heads=4, num_noise_heads=2, head_dim=6,
                   rope_theta=100.0, max_position_embeddings=16)
SHAPES = {
    "4:1, two pairs": {},
    "fewer pairs than noise heads": {"num_attention_heads": 12, "num_noise_heads": 4},
    "one pair, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "1:1": {"num_attention_heads": 4, "num_noise_heads": 2},
}
MOTIF_12B = MotifConfig(219_520, 4096, 16384, 40, 40, 16, 8, 128, rope_theta=1e6,
                        max_position_embeddings=32768)
MOTIF_2_6B = MotifConfig(219_520, 2048, 8192, 32, 16, 16, 8, 128, tie_word_embeddings=True)
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def make(seed=0, **changes):
    """A model in which every parameter matters: a fresh one has small logits and norms of 1."""
    torch.manual_seed(seed)
    model = Motif(replace(BASE, **changes))
    for p in model.parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.3))
    return model


def tokens(*shape, seed=1):
    return torch.randint(BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# ---- the equations

@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_largest_attention_logits_are_the_equations(shape):
    model = make(**SHAPES[shape])
    ids = tokens(2, 7)
    config = model.config.to_dict()
    if shape == "1:1":
        del config["num_noise_heads"]                    # as in Motif-2.6B's config.json
        assert MotifConfig.from_dict(config) == model.config

    logits = reference.motif_logits(model.state_dict(), config, ids)
    assert np.abs(model(ids).detach().numpy() - logits).max() <= 1e-4
    assert np.abs(logits).max() > 1

    largest = reference.max_logits(model.state_dict(), config, ids)
    np.testing.assert_allclose(model.max_logits, largest, rtol=1e-4)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = make()
    ids, targets = tokens(2, 7), tokens(2, 7, seed=2)
    targets[0, 3] = -1
    logits = model(ids)
    loss = model(ids, targets)
    assert loss.item() == pytest.approx(reference.cross_entropy(logits.detach(), targets), rel=1e-5)
    assert_near(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    total = model(ids, targets, reduction="sum", scale=0.5)
    assert total.item() == pytest.approx(0.5 * 13 * loss.item(), rel=1e-6)


def test_token_losses_are_the_terms_of_the_loss():
    model = make()
    ids, targets, doc_ids = tokens(2, 7), tokens(2, 7, seed=2), tokens(2, 7, seed=3) // 15
    targets[0, 3] = -1
    nats = model.token_losses(ids, targets, doc_ids)
    assert nats.shape == (2, 7) and nats[0, 3] == 0 and not nats.requires_grad
    assert_near(nats.sum(), model(ids, targets, doc_ids, reduction="sum").detach())
    log_p = model(ids, doc_ids=doc_ids).log_softmax(-1)
    assert_near(-nats[1], log_p[1].gather(1, targets[1, :, None])[:, 0].detach())


@pytest.mark.parametrize("activation", ["poly_norm", "swiglu"])
def test_without_kernels_the_definitions_give_the_same_loss_and_gradients(monkeypatch, activation):
    model = make(activation=activation)
    results = []
    for enabled in True, False:
        monkeypatch.setattr(kernels, "ENABLED", enabled)
        model.zero_grad()
        loss = model(tokens(2, 7), tokens(2, 7, seed=2))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for fused, plain in zip(*results, strict=True):
        assert_near(fused, plain)


def test_without_noise_heads_it_is_torchs_grouped_query_attention():
    config = replace(BASE, num_noise_heads=0, num_attention_heads=4, num_key_value_heads=2)
    attention = motif.Attention(config, 1)
    x = torch.randn(2, 7, 20)
    no_turn = torch.ones(1, 7, 1, 3), torch.zeros(1, 7, 1, 3)
    q, k, v = (proj(x).unflatten(2, (-1, 6)).transpose(1, 2)
               for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours, largest = attention(x, no_turn)
    torch.testing.assert_close(ours, attention.o_proj(out.transpose(1, 2).flatten(2)))
    assert "subln.weight" not in attention.state_dict() and largest.shape == (4,)


def test_swiglu_is_silu_times_up():
    mlp = make(activation="swiglu").model.layers[0].mlp
    x = torch.randn(2, 3, 20)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    assert not any("act_fn" in name for name, _ in mlp.named_parameters())


@pytest.mark.parametrize("noise", [0, 2])
def test_packed_documents_are_each_document_alone(noise):
    model = make(num_noise_heads=noise, num_attention_heads=12)
    ids, targets = tokens(2, 12), tokens(2, 12, seed=2)
    lengths = [[5, 1, 6], [4, 8]]
    doc_ids = torch.tensor([[7] * 5 + [3] + [7] * 6,     # an id may come again: runs count
                            [7] * 4 + [3] * 8])

    packed = model(ids, doc_ids=doc_ids)
    model(ids, targets, doc_ids, reduction="sum").backward()
    grads = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    for row in range(2):
        begin = 0
        for length in lengths[row]:
            document = slice(begin, begin + length)
            begin += length
            x, y = ids[row:row + 1, document], targets[row:row + 1, document]
            assert_near(model(x)[0], packed[row, document])
            model(x, y, reduction="sum").backward()
    for p, grad in zip(model.parameters(), grads):
        assert_near(p.grad, grad, rtol=1e-3, atol=1e-4)


def test_equal_seeds_give_equal_weights_of_the_stated_spread():
    torch.manual_seed(3)
    first = Motif(replace(BASE, hidden_size=200)).state_dict()
    torch.manual_seed(3)
    again = Motif(replace(BASE, hidden_size=200)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, t in first.items():
        if t.ndim == 2:
            assert t.std().item() == pytest.approx(0.02, rel=0.1)
        elif name.endswith("act_fn.weight"):
            assert torch.equal(t, torch.full((3,), 1 / 48))
        elif name.endswith("act_fn.bias"):
            assert t == 0
        elif "norm" in name or "subln" in name:
            assert (t == 1).all()
    lambdas = torch.cat([t for name, t in first.items() if "lambda" in name])
    assert lambdas.std().item() == pytest.approx(0.1, rel=0.25)


@pytest.mark.parametrize("key, value", [
    ("head_dim", 5),                  # odd
    ("num_attention_heads", 9),       # not two groups
    ("num_noise_heads", 10),          # no signal head
    ("num_key_value_heads", 3),       # not pairs
    ("num_key_value_heads", 8),       # more pairs than groups
    ("num_key_value_heads", 0),
    ("rope_theta", float("nan")),
])
def test_an_impossible_shape_is_named(key, value):
    with pytest.raises(UserError, match=key):
        Motif(replace(BASE, **{key: value}))
    with pytest.raises(UserError, match="num_attention_heads"):
        Motif(replace(BASE, num_noise_heads=0))          # 10 query heads, 4 key heads


@pytest.mark.parametrize("shape", [(2, 0), (0, 2), (1, 17)])
def test_no_tokens_and_too_many_are_refused(shape):
    with pytest.raises(UserError, match="max_position_embeddings=16"):
        make()(tokens(*shape))


# ---- the KV cache and generation

@pytest.mark.parametrize("noise", [0, 2])
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(noise):
    model = make(num_noise_heads=noise, num_attention_heads=12)
    ids = tokens(3, 4)
    out = model.generate(ids, 13, temperature=0)         # beyond the last position that is read
    expected = ids
    for _ in range(13):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected) and len(out.unique()) > 3


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize("padding", [0, 1, 30])
@torch.no_grad()
def test_rows_read_in_right_padded_pieces_are_the_rows_read_at_once(noise, padding):
    model = make(num_noise_heads=noise, num_attention_heads=12)
    ids, targets = tokens(3, 16), tokens(3, 16, seed=2)
    logits, losses = model(ids), model.token_losses(ids, targets)

    cache = KVCache(model, 3, 16)
    for kept in cache.keys + cache.values:
        kept.fill_(1e3)                                  # what must not be seen
    for lengths in [5, 3, 1], [0, 2, 4], [1, 1, 1], [2, 0, 10]:
        n = torch.tensor(lengths)
        begin = cache.lengths.clone()
        columns = torch.arange(n.max() + padding)
        columns = (begin[:, None] + columns).clamp(max=15)
        piece, piece_targets = ids.gather(1, columns), targets.gather(1, columns)

        copies = [cache.select_rows([0, 1, 2]), cache.select_rows([0, 1, 2], max_length=16)]
        all_logits = model(piece, cache=cache, row_lengths=n)
        last = model(piece, cache=copies[0], row_lengths=n, last_only=True)
        nats = model.token_losses(piece, piece_targets, cache=copies[1], row_lengths=n)
        for c in cache, *copies:
            assert torch.equal(c.lengths, begin + n)
        for row in range(3):
            end = begin[row] + n[row]
            assert_near(all_logits[row, :n[row]], logits[row, begin[row]:end])
            assert_near(nats[row, :n[row]], losses[row, begin[row]:end], atol=1e-4)
            if n[row]:
                assert_near(last[row, 0], logits[row, end - 1])


@torch.no_grad()
def test_a_selected_row_continues_as_the_row_itself():
    model = make()
    ids = tokens(2, 12)
    cache = KVCache(model, 2, 6)
    model(ids[:, :6], cache=cache, row_lengths=torch.tensor([6, 3]))
    selected = cache.select_rows([1, 0, 1], max_length=9)
    assert selected.lengths.tolist() == [3, 6, 3] and cache.lengths.tolist() == [6, 3]
    more = torch.stack([ids[1, 3:6], ids[0, 6:9], tokens(3, seed=5)])
    out = model(more, cache=selected)
    assert_near(out[0], model(ids[1:, :6])[0, 3:])
    assert_near(out[1], model(ids[:1, :9])[0, 6:])
    assert_near(out[2], model(torch.cat([ids[1, :3], more[2]])[None])[0, 3:])
    with pytest.raises(ValueError):
        model(more, cache=selected)                      # row 1 would have 12 tokens
    with pytest.raises(UserError, match="max_position_embeddings"):
        KVCache(model, 1, 17)


@torch.no_grad()
def test_rows_of_a_batch_are_generated_as_each_alone(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 9)      # pieces of three columns
    model, ids = make(), tokens(3, 8)
    alone = []
    for row, length in enumerate([8, 2, 5]):
        out = model.generate(ids[row:row + 1, :length], 7, temperature=0)
        alone.append(out[0, length:])
    alone = torch.stack(alone)

    decoder = Decoder(model, ids, 7, temperature=0, prompt_lengths=torch.tensor([8, 2, 5]))
    new = [decoder.next_tokens() for _ in range(3)]
    assert torch.equal(torch.cat(new, 1), alone[:, :3])
    decoder.keep_rows([2, 0])
    new = [decoder.next_tokens() for _ in range(4)]
    assert torch.equal(torch.cat(new, 1), alone[[2, 0], 3:])
    with pytest.raises(ValueError):
        decoder.next_tokens()


def test_compiled_steps_are_one_graph_for_all_layers_rows_and_lengths(monkeypatch):
    """On a CPU, where plain PolyNorm goes over blocks of rows, only without it. Sizes that equal
    others, such as head_dim, would be taken for them at first."""
    graphs = []

    def keep_graph(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)
    backend = aot_autograd(fw_compiler=keep_graph)
    step = torch.compile(motif.generation_step, dynamic=True, backend=backend)
    monkeypatch.setattr(motif, "compiled_generation_step", lambda: step)
    model = make(activation="swiglu").requires_grad_(False)
    for B, T, n in (7, 4, 5), (9, 7, 4), (5, 2, 6), (1, 3, 5):
        model.compile_steps = False
        expected = model.generate(tokens(B, T), n, temperature=0)
        model.compile_steps = True
        assert torch.equal(model.generate(tokens(B, T), n, temperature=0), expected)
        assert len(graphs) == 1 + (B == 1)
    assert all("softmax" in graph.code and "amax" not in graph.code for graph in graphs)


def test_a_seed_repeats_and_top_k_keeps_the_likeliest():
    model, ids = make(), tokens(64, 4)
    assert torch.equal(model.generate(ids, 5, seed=1), model.generate(ids, 5, seed=1))
    assert not torch.equal(model.generate(ids, 5, seed=1), model.generate(ids, 5, seed=2))
    assert torch.equal(model.generate(ids, 5, top_k=1), model.generate(ids, 5, temperature=0))
    assert torch.equal(model.generate(ids, 0), ids)
    likeliest = model(ids)[:, -1].topk(3).indices
    drawn = torch.stack([model.generate(ids, 1, 2.0, 3, seed)[:, -1] for seed in range(40)], 1)
    for row, three in zip(drawn, likeliest):
        assert set(row.tolist()) == set(three.tolist())  # each one, and no other


def test_draws_follow_the_softmax_at_the_temperature():
    model, ids = make(), tokens(1, 4)
    p = (model(ids)[0, -1] / 0.5).softmax(-1)
    drawn = model.generate(ids.expand(4000, 4), 1, temperature=0.5, seed=1)[:, -1]
    assert_near(drawn.bincount(minlength=29) / 4000, p, rtol=0, atol=0.03)


def test_generation_that_cannot_be_is_refused():
    model, ids = make(), tokens(2, 4)
    for key, value in ("max_new_tokens", -1), ("temperature", -1.0), ("top_k", 0):
        with pytest.raises(UserError, match=key):
            model.generate(ids, **{"max_new_tokens": 1, key: value})
    with pytest.raises(UserError, match="max_position_embeddings"):
        model.generate(ids, 14)


# ---- files

@pytest.mark.parametrize("file_bytes, in_files", [(5 * 10**9, False), (4000, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_bitwise_in_its_own_dtypes(tmp_path, file_bytes, in_files, tied):
    for size in 9000, 10**9:                             # older files, in shards and in one
        make(7, num_hidden_layers=1).save_pretrained(tmp_path, size)
    model = make(tie_word_embeddings=tied).bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path, file_bytes)

    again = Motif.from_pretrained(tmp_path)
    assert again.config == model.config
    stored = dict(again.named_parameters())
    assert stored.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.dtype == stored[name].dtype and torch.equal(p, stored[name])
        assert stored[name].requires_grad
    again = Motif.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(model.float()(tokens(1, 3)), again(tokens(1, 3)))

    names = {f.name for f in tmp_path.iterdir()} - {CONFIG}
    if not in_files:
        assert names == {WEIGHTS}                        # other programs read every file in it
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == again.state_dict().keys()
    assert names == {INDEX, *index["weight_map"].values()} and len(names) > 3


def read_by_the_format(folder):
    """(name -> array, index), by the definition of the format alone: 8 bytes for the length of the
    header, a header in JSON, then the numbers (github.com/huggingface/safetensors, "Format")."""
    index = json.loads((folder / INDEX).read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        raw = (folder / file).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}   # transformers wants to read it
        for name, entry in header.items():
            a, b = entry["data_offsets"]
            numbers = raw[start + a:start + b]
            if entry["dtype"] == "BF16":                 # the upper half of a 32-bit float
                numbers = (np.frombuffer(numbers, "<u2").astype("<u4") << 16).view("<f4")
            else:
                assert entry["dtype"] == "F32"
                numbers = np.frombuffer(numbers, "<f4")
            assert index["weight_map"][name] == file and name not in found
            found[name] = numbers.reshape(entry["shape"])
    assert found.keys() == index["weight_map"].keys()
    return found, index


@pytest.mark.parametrize("dtype, shape", [(torch.float32, "4:1, two pairs"),
                                          (torch.bfloat16, "one pair, tied")])
def test_any_reader_of_the_files_finds_the_same_function(tmp_path, dtype, shape):
    model, ids = make(**SHAPES[shape]).to(dtype), tokens(2, 7)
    model.save_pretrained(tmp_path, 4000)
    found, index = read_by_the_format(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    logits = reference.motif_logits(found, config, ids)
    assert np.abs(model.float()(ids).detach().numpy() - logits).max() <= 1e-4
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    assert index["metadata"]["total_size"] == sum(t.size for t in found.values()) * dtype.itemsize


def test_one_rank_of_many_writes_all_of_a_model_that_is_whole(tmp_path, monkeypatch):
    """As --init does, whose files the other ranks then read; here it is not the first rank."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    model = make()
    model.save_pretrained(tmp_path, file_bytes=4000)
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    again = Motif.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_save_that_fails_leaves_the_earlier_model_and_other_files_alone(tmp_path):
    """Here two parameters share memory, which safetensors refuses."""
    model = make()
    model.save_pretrained(tmp_path, file_bytes=4000)
    for name in "model-ema.safetensors", "model.lora.safetensors":
        (tmp_path / name).write_text("mine")
    again = make(1)
    again.lm_head.weight = again.model.embed_tokens.weight
    with pytest.raises(Exception, match="share memory"):
        again.save_pretrained(tmp_path)
    kept = Motif.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.parameters(), kept.parameters()))
    assert not [*tmp_path.glob("*.tmp")]

    make(2, num_hidden_layers=1).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        CONFIG, WEIGHTS, "model-ema.safetensors", "model.lora.safetensors"}


def test_a_failed_write_of_a_json_file_leaves_nothing_after_the_next_save(tmp_path, monkeypatch):
    """Of the index, which the next model, in one file, does not have."""
    def replace(old, new):
        if new.name == INDEX:
            raise OSError("no index here")
        real(old, new)

    real = os.replace
    with monkeypatch.context() as context:
        context.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="no index here"):
            make().save_pretrained(tmp_path, file_bytes=4000)
    make().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_numbers_that_float16_cannot_hold_are_named(tmp_path):
    model = make()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(tmp_path)
    assert Motif.from_pretrained(tmp_path, dtype=torch.bfloat16).model.norm.weight[0] > 9e5
    with pytest.raises(UserError, match=f"{NORM}.*float16"):
        Motif.from_pretrained(tmp_path, dtype=torch.float16)


def refused(folder, *words):
    """Loading the folder is a user's mistake, told in one line that contains the words."""
    with pytest.raises(UserError) as e:
        Motif.from_pretrained(folder)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def save_with(folder, **changes):
    """A model's folder whose config.json is changed."""
    make().save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_every_spelling_of_plain_rope_is_read(key):
    config = replace(BASE, rope_theta=500.0).to_dict()
    for plain in None, {}, {"rope_type": "default"}:
        assert MotifConfig.from_dict({**config, key: plain}).rope_theta == 500
    del config["rope_theta"]                             # as transformers 5 writes it
    moved = {"rope_theta": 5e5, "rope_type": "default"}
    assert MotifConfig.from_dict({**config, key: moved}).rope_theta == 5e5


def test_a_config_without_rope_theta_says_which_value_is_taken(capsys):
    config = BASE.to_dict()
    MotifConfig.from_dict(config)
    assert capsys.readouterr().out == ""
    del config["rope_theta"]
    assert MotifConfig.from_dict(config).rope_theta == 10_000
    told = capsys.readouterr().out
    assert "rope_theta" in told and "10000.0" in told and told.count("\n") == 1


@pytest.mark.parametrize("options, words", [
    ({"rope_type": "yarn", "factor": 4.0}, ["yarn"]),
    ({"type": "linear", "factor": 2.0}, ["linear"]),     # the older name of the key
    ({"factor": 2.0}, ["factor"]),
    ("yarn", ["yarn"]),
])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_another_kind_of_rope_is_refused_by_its_name(tmp_path, key, options, words):
    save_with(tmp_path, **{key: options})
    refused(tmp_path, CONFIG, key, *words)


def test_the_model_type_is_motif_in_either_spelling(tmp_path):
    for spelling in "motif", "Motif":
        assert MotifConfig.from_dict({**BASE.to_dict(), "model_type": spelling}) == BASE
    save_with(tmp_path, model_type="llama")
    refused(tmp_path, CONFIG, "model_type", "llama")


def test_a_motif_3_is_refused_by_all_that_it_asks_for(tmp_path):
    asked = {"kv_lora_rank": 512, "num_experts": 384, "polynorm_output_scale": 0.5,
             "use_sliding_window": True}
    save_with(tmp_path, model_type="Motif", **asked)
    refused(tmp_path, CONFIG, *(f"{key}={value}" for key, value in asked.items()))
    absent = {"kv_lora_rank": None, "num_experts": 0, "polynorm_output_scale": 1.0}
    assert MotifConfig.from_dict({**BASE.to_dict(), **absent}) == BASE


@pytest.mark.parametrize("key, value", [
    ("hidden_size", "20"), ("hidden_size", 20.5), ("hidden_size", [20]), ("hidden_size", True),
    ("num_attention_heads", "10"), ("num_attention_heads", 0), ("num_noise_heads", 2.5),
    ("num_noise_heads", -2), ("head_dim", "6"), ("head_dim", {}), ("rope_theta", "5e5"),
    ("rope_theta", [1e4]), ("rms_norm_eps", "1e-6"), ("rms_norm_eps", float("nan")),
    ("attn_rms_norm_eps", -1e-5), ("max_position_embeddings", 4096.5),
    ("tie_word_embeddings", "false"), ("hidden_act", ["poly_norm"]), ("use_bias", [1]),
])
def test_a_value_of_the_wrong_kind_is_named(tmp_path, key, value):
    save_with(tmp_path, **{key: value})
    refused(tmp_path, key)


@pytest.mark.parametrize("changes, word", [
    ({"num_hidden_layers": 100_000}, "num_hidden_layers"),
    ({"hidden_size": 2**24 + 1}, "hidden_size"),
    ({"vocab_size": 10**300}, "vocab_size"),
    ({"head_dim": 2**25}, "head_dim"),
    ({"hidden_size": 2**20, "intermediate_size": 2**20}, "2^40"),
])
def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path, monkeypatch, changes, word):
    save_with(tmp_path, **changes)
    monkeypatch.setattr(motif, "Block", None)            # nothing is built
    refused(tmp_path, word)
    with pytest.raises(UserError):
        Motif(replace(BASE, **changes))


@pytest.mark.parametrize("changes, key", [
    ({"use_bias": True}, "use_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"vocab_size": None}, "vocab_size"),
    ("[]", CONFIG),
    ("{}", "hidden_size"),
    ("{", CONFIG),
    (100_000 * "[", CONFIG),
    (None, CONFIG),
])
def test_a_config_that_is_not_ours_is_one_line(tmp_path, changes, key):
    save_with(tmp_path, **(changes if isinstance(changes, dict) else {}))
    if changes is None:
        (tmp_path / CONFIG).unlink()
    elif isinstance(changes, str):
        (tmp_path / CONFIG).write_text(changes)
    refused(tmp_path, key)


def change_tensors(file, **changes):
    """Rewrite a safetensors file with these tensors; None: without."""
    tensors = load_file(file) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


def change_index(folder, name, file):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    if file:
        index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file_bytes", [10**9, 4000])
@pytest.mark.parametrize("damage", ["cut", "gone", "missing", "extra", "shape", "dtype"])
def test_a_damaged_file_of_tensors_is_one_line(tmp_path, damage, file_bytes):
    make().save_pretrained(tmp_path, file_bytes)
    file = tmp_path / WEIGHTS
    if file_bytes == 4000:
        index = json.loads((tmp_path / INDEX).read_text())
        file = tmp_path / index["weight_map"][NORM]
    change_tensors(file, **{"model.layers.0.rotary_emb.inv_freq": torch.ones(3)})
    if file_bytes == 10**9:
        Motif.from_pretrained(tmp_path)                  # inv_freq, in some releases, is ignored

    named = NORM
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
        named = file.name
    elif damage == "gone":
        file.unlink()
        named = file.name
    elif damage == "missing":
        change_tensors(file, **{NORM: None})
    elif damage == "extra":
        change_tensors(file, x=torch.ones(1))
        named = "x"
    elif damage == "shape":
        change_tensors(file, **{NORM: torch.ones(3)})
    elif damage == "dtype":
        change_tensors(file, **{NORM: torch.ones(20, dtype=torch.int8)})
    refused(tmp_path, str(tmp_path), f" {named}" if damage == "extra" else named)


@pytest.mark.parametrize("place", [None, "model-00001-of-00020.safetensors", "gone"])
def test_an_index_that_is_wrong_is_one_line(tmp_path, place):
    make().save_pretrained(tmp_path, 4000)
    change_index(tmp_path, NORM, place)
    refused(tmp_path, "gone" if place == "gone" else NORM)
    (tmp_path / INDEX).write_text('{"weight_map": ["x"]}')
    refused(tmp_path, INDEX)


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(tmp_path, absolute):
    folder = tmp_path / "model"
    make().save_pretrained(folder, 4000)
    outside = tmp_path / "x.safetensors"
    save_file({NORM: torch.ones(20)}, outside)
    place = str(outside) if absolute else "../x.safetensors"
    change_index(folder, NORM, place)
    refused(folder, INDEX, place[:15])        # a long name is shortened


def test_a_tied_model_may_have_an_equal_head_in_its_file(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    head = model.head_weight.detach().clone()
    change_tensors(tmp_path / WEIGHTS, **{"lm_head.weight": head})
    again = Motif.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert "lm_head.weight" not in again.state_dict()

    head[3, 5] += 1
    change_tensors(tmp_path / WEIGHTS, **{"lm_head.weight": head})
    refused(tmp_path, "lm_head.weight", "tie_word_embeddings")
    change_tensors(tmp_path / WEIGHTS, **{"lm_head.weight": head[:3]})
    refused(tmp_path, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("prefix, inside", [("_orig_mod.", "model."), ("module.", "model."),
                                            ("_orig_mod.", "self_attn.")])
def test_a_wrappers_prefix_of_tensor_names_is_named(tmp_path, prefix, inside):
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    wrapped = {name.replace(inside, prefix + inside): t for name, t in tensors.items()}
    save_file(wrapped, tmp_path / WEIGHTS)
    refused(tmp_path, str(tmp_path), repr(prefix))
    with pytest.raises(UserError) as e:
        Motif.from_pretrained(tmp_path)
    assert "missing" not in str(e.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named_by_their_tensor(tmp_path, dtype, bad):
    model = make().to(dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    weight.data[2, 3] = bad
    model.save_pretrained(tmp_path)
    refused(tmp_path, str(tmp_path), name)

    weight.data.fill_(3e38)                              # finite, and their sum is not
    model.save_pretrained(tmp_path)
    assert torch.equal(Motif.from_pretrained(tmp_path).get_parameter(name), weight)


# ---- sizes

def test_the_published_shapes_have_the_published_sizes():
    with torch.device("meta"):
        large = Motif(MOTIF_12B)
        small = Motif(MOTIF_2_6B)
    assert sum(p.numel() for p in large.parameters()) == 12_703_860_896
    assert sum(p.numel() for p in small.parameters()) == 2_597_218_432
    assert len(large.state_dict()) == 643 and len(small.state_dict()) == 514
    assert len(large.matrices()) == 280


@pytest.mark.parametrize("changes", [*SHAPES.values(),
                                     {"num_noise_heads": 0, "num_attention_heads": 8}])
def test_flops_are_those_that_torch_counts(changes):
    model, ids = make(**changes), tokens(2, 8)
    forward, backward = flops_per_token(model.config, 8)
    # torch also counts the keys that are masked: 3.5 of 8 for each query, on average.
    value_dims = 2 if model.config.num_noise_heads else 1
    per_key = 2 * 6 * (1 + value_dims)
    masked = 3 * model.config.num_attention_heads * per_key * 3.5
    with FlopCounterMode(display=False) as counted:
        logits = model(ids)
    assert counted.get_total_flops() == 16 * (forward + masked)
    with FlopCounterMode(display=False) as counted:
        logits.sum().backward()
    assert counted.get_total_flops() == 16 * (backward + 2 * masked)
