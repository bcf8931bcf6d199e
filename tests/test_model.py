"""The model against reference.py in float64, torch's attention and FLOP counter, and its files."""
import tools.export
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import model as motif
import pretrain
import reference
from model import Block, Decoder, KVCache, Motif, MotifConfig, flops_per_token
from tools.plan import memory_per_gpu, parameters_by_part

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


def make(seed=0, **changes):
    """A model whose every parameter matters: a fresh one has small logits and norms of 1."""
    torch.manual_seed(seed)
    model = Motif(replace(BASE, **changes))
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.3))
    return model


def tokens(*shape, seed=1):
    return torch.randint(BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- the equations

@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_largest_attention_logits_are_the_equations(shape):
    model, ids = make(**SHAPES[shape]), tokens(2, 7)
    config, tensors = model.config.to_dict(), model.state_dict()
    if shape == "1:1":
        del config["num_noise_heads"]                    # as in Motif-2.6B's config.json
        assert MotifConfig.from_dict(config) == model.config
    logits = reference.motif_logits(tensors, config, ids)
    assert np.abs(model(ids).detach().numpy() - logits).max() <= 1e-4
    assert np.abs(logits).max() > 1
    largest = reference.max_logits(tensors, config, ids)
    np.testing.assert_allclose(model.max_logits, largest, rtol=1e-4)
    targets = tokens(2, 7, seed=2)
    targets[0, 3] = -1
    loss = model(ids, targets)
    assert loss.item() == pytest.approx(reference.cross_entropy(logits, targets), rel=1e-5)
    assert model(ids, targets, reduction="sum").item() == pytest.approx(13 * loss.item(), rel=1e-6)
    torch.testing.assert_close(loss, F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(),
                                                     ignore_index=-1))


def test_without_noise_heads_it_is_torchs_grouped_query_attention():
    layer = make(num_noise_heads=0, num_attention_heads=4, num_key_value_heads=2).model.layers[1]
    x, zero = torch.randn(2, 7, 20), (torch.ones(1, 7, 1, 3), torch.zeros(1, 7, 1, 3))
    attention = layer.self_attn
    q, k, v = (getattr(attention, f"{n}_proj")(x).unflatten(2, (-1, 6)).transpose(1, 2)
               for n in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours, largest = attention(x, zero)
    torch.testing.assert_close(ours, attention.o_proj(out.transpose(1, 2).flatten(2)))
    assert "self_attn.subln.weight" not in layer.state_dict() and largest.shape == (4,)


def test_swiglu_is_silu_times_up():
    mlp, x = make(activation="swiglu").model.layers[0].mlp, torch.randn(2, 3, 20)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    assert not any("act_fn" in name for name, _ in mlp.named_parameters())


@pytest.mark.parametrize("noise", [0, 2])
def test_packed_documents_are_each_document_alone(noise):
    model = make(num_noise_heads=noise, num_attention_heads=12)
    lengths = [[5, 1, 6], [4, 8, 0]]                     # two rows of twelve tokens
    ids, targets = tokens(2, 12), tokens(2, 12, seed=2)
    numbers = torch.stack([torch.tensor([7, 3, 7]).repeat_interleave(torch.tensor(n))
                           for n in lengths])            # a number may come again: runs count
    packed = model(ids, doc_ids=numbers)
    model(ids, targets, numbers, reduction="sum").backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, part in enumerate(lengths):
        for x, y, expected in zip(*(t[row].split(part) for t in (ids, targets, packed))):
            if len(x):
                torch.testing.assert_close(model(x[None])[0], expected, rtol=1e-4, atol=1e-5)
                model(x[None], y[None], reduction="sum").backward()
    for p, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)


def test_equal_seeds_give_equal_weights_of_the_stated_spread():
    torch.manual_seed(3)
    first = Motif(replace(BASE, hidden_size=200)).state_dict()
    torch.manual_seed(3)
    again = Motif(replace(BASE, hidden_size=200)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, t in first.items():
        if t.ndim == 2:
            assert t.std().item() == pytest.approx(0.02, rel=0.1)
        elif "act_fn" in name:
            assert torch.equal(t, torch.full_like(t, 1 / 3 if "weight" in name else 0))
        elif "norm" in name or "subln" in name:
            assert (t == 1).all()
    lambdas = torch.cat([t for name, t in first.items() if "lambda" in name])
    assert lambdas.std().item() == pytest.approx(0.1, rel=0.25)


@pytest.mark.parametrize("changes, message", [
    ({"head_dim": 5}, "head_dim must be even"),
    ({"num_attention_heads": 9}, "num_attention_heads=9 must be num_noise_heads=2 groups"),
    ({"num_noise_heads": 10}, "num_attention_heads=10 must be num_noise_heads=10 groups"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 must be pairs"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8 must be pairs"),
    ({"num_noise_heads": 0}, "num_attention_heads=10 must be a multiple of num_key_value_heads=4"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, not 0"),
    ({"rope_theta": float("nan")}, "rope_theta must be at least 1, not nan"),
])
def test_an_impossible_shape_says_why(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Motif(replace(BASE, **changes))


def test_no_tokens_and_too_many_say_so():
    for shape in (2, 0), (0, 2), (1, 17):
        with pytest.raises(ValueError, match=r"at most max_position_embeddings=16$"):
            make()(tokens(*shape))


# ---- generation

@pytest.mark.parametrize("noise", [0, 2])
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(noise):
    model, ids = make(num_noise_heads=noise, num_attention_heads=12), tokens(3, 4)
    out = model.generate(ids, 12, temperature=0)         # up to the last position
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected) and len(out.unique()) > 3


@pytest.mark.parametrize("noise", [0, 2])
@torch.no_grad()
def test_rows_read_in_right_padded_pieces_are_the_rows_read_at_once(noise):
    model = make(num_noise_heads=noise, num_attention_heads=12)
    ids, targets = tokens(3, 16), tokens(3, 16, seed=2)
    pieces = [[5, 3, 1], [0, 2, 4], [1, 1, 1], [2, 0, 9]]   # tokens of each row in each piece
    cache = KVCache(model, 3, 16)
    for kept in cache.keys + cache.values:
        kept.fill_(1e3)                                     # must never be seen
    logits, losses = model(ids), model.token_losses(ids, targets)
    for n in map(torch.tensor, pieces):
        begin, T = cache.lengths.clone(), int(n.max())
        columns = (begin[:, None] + torch.arange(T)).clamp(max=15)
        again = cache.select_rows(torch.arange(3))
        part = model(ids.gather(1, columns), cache=cache, row_lengths=n)
        last = model(ids.gather(1, columns), cache=again.select_rows([0, 1, 2], 16), row_lengths=n,
                     last_only=True)
        nats = model.token_losses(ids.gather(1, columns), targets.gather(1, columns), cache=again,
                                  row_lengths=n)
        assert torch.equal(cache.lengths, begin + n) and torch.equal(again.lengths, begin + n)
        for row in range(3):
            a, b = begin[row], begin[row] + n[row]
            torch.testing.assert_close(part[row, :n[row]], logits[row, a:b], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(nats[row, :n[row]], losses[row, a:b], rtol=1e-4, atol=1e-4)
            if n[row]:
                torch.testing.assert_close(last[row, 0], logits[row, b - 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_batch_are_generated_as_each_alone(monkeypatch):
    monkeypatch.setattr(motif, "PREFILL_TOKENS", 9)         # three columns at a time
    model, ids, lengths = make(), tokens(3, 8), torch.tensor([8, 2, 5])
    alone = [model.generate(ids[i:i + 1, :n], 7, temperature=0)[0, n:]
             for i, n in enumerate(lengths)]
    decoder = Decoder(model, ids, 7, temperature=0, prompt_lengths=lengths)
    new = [decoder.next_tokens() for _ in range(3)]
    assert torch.equal(torch.cat(new, 1), torch.stack(alone)[:, :3])
    decoder.keep_rows([2, 0])
    new = [decoder.next_tokens() for _ in range(4)]
    assert torch.equal(torch.cat(new, 1), torch.stack(alone)[[2, 0], 3:])


def test_compiled_steps_are_one_graph_for_all_layers_rows_and_lengths(monkeypatch):
    """On a CPU, where plain PolyNorm goes over blocks of rows, only without it. Sizes that equal
    others, such as head_dim, would be taken for them at first."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    step = torch.compile(Block.forward, dynamic=True, backend=backend)
    monkeypatch.setattr(motif, "compiled_block", lambda: step)
    model = make(activation="swiglu").requires_grad_(False)
    for B, T, n in (7, 4, 5), (9, 7, 4), (5, 2, 6):
        model.compile_steps = False
        expected = model.generate(tokens(B, T), n, temperature=0)
        model.compile_steps = True
        assert torch.equal(model.generate(tokens(B, T), n, temperature=0), expected)
    assert len(graphs) == 1


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
    p, many = (model(ids[:1])[0, -1] / 0.5).softmax(-1), ids[:1].expand(4000, 4)
    counts = model.generate(many, 1, 0.5, seed=1)[:, -1].bincount(minlength=29) / 4000
    torch.testing.assert_close(counts, p, rtol=0, atol=0.03)
    for wrong in ({"max_new_tokens": -1}, {"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="^generate needs "):
            model.generate(ids, **{"max_new_tokens": 1, **wrong})
    with pytest.raises(ValueError, match="^4 [+] 14 tokens, but max_position_embeddings is 16$"):
        model.generate(ids, 14)


# ---- files

@pytest.mark.parametrize("shard_bytes, files", [(5 * 10**9, 1), (4000, 8)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_bitwise_in_its_own_dtypes(tmp_path, shard_bytes, files, tied):
    for size in 9000, 10**9:                             # older ones, sharded and in one file
        make(7, num_hidden_layers=1).save_pretrained(tmp_path, size)
    model = make(tie_word_embeddings=tied).bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path, shard_bytes)
    again = Motif.from_pretrained(tmp_path)
    assert again.config == model.config
    for ours, theirs in zip(model.named_parameters(), again.named_parameters(), strict=True):
        (name, p), (other, q) = ours, theirs
        assert name == other and p.dtype == q.dtype and torch.equal(p, q) and q.requires_grad
    assert torch.equal(model.float()(tokens(1, 3)),
                       Motif.from_pretrained(tmp_path, dtype=torch.float32)(tokens(1, 3)))
    names = {f.name for f in tmp_path.iterdir()} - {CONFIG}
    if files == 1:
        assert names == {WEIGHTS}                        # other readers take every file in it
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"].keys() == again.state_dict().keys()
        assert names == {INDEX, *index["weight_map"].values()} and len(names) > files
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in again.parameters())


def by_the_format(folder):
    """(name -> array, index) by the definition alone: 8 bytes of the header's length, a header in
    JSON, then the numbers (github.com/huggingface/safetensors, "Format")."""
    index, found = json.loads((folder / INDEX).read_text()), {}
    for file in {*index["weight_map"].values()}:
        raw = (folder / file).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}   # transformers wants to read it
        for name, entry in header.items():
            a, b = entry["data_offsets"]
            if entry["dtype"] == "BF16":                 # the upper half of a 32-bit float
                numbers = np.frombuffer(raw[start + a:start + b], "<u2").astype("<u4") << 16
            else:
                numbers = np.frombuffer(raw[start + a:start + b], {"F32": "<u4"}[entry["dtype"]])
            assert index["weight_map"][name] == file and name not in found
            found[name] = numbers.view("<f4").reshape(entry["shape"])
    assert found.keys() == index["weight_map"].keys()
    return found, index


def test_one_rank_of_many_writes_all_of_a_model_that_is_whole(tmp_path, monkeypatch):
    """As --init does, whose files the other ranks then read."""
    for name, value in ("is_initialized", True), ("get_rank", 0), ("get_world_size", 3):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    model = make()
    model.save_pretrained(tmp_path, shard_bytes=4000)
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    again = Motif.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.parameters(), again.parameters()))



@pytest.mark.parametrize("dtype, shape", [(torch.float32, "4:1, two pairs"),
                                          (torch.bfloat16, "one pair, tied")])
def test_any_reader_of_the_files_finds_the_same_function(tmp_path, dtype, shape):
    model, ids = make(**SHAPES[shape]).to(dtype), tokens(2, 7)
    model.save_pretrained(tmp_path, 4000)
    found, index = by_the_format(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    logits = reference.motif_logits(found, config, ids)
    assert np.abs(model.float()(ids).detach().numpy() - logits).max() <= 1e-4
    again = Motif.from_pretrained(tmp_path, dtype=torch.float32)
    assert np.abs(again(ids).detach().numpy() - logits).max() <= 1e-4
    assert len({*index["weight_map"].values()}) > 8
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    assert index["metadata"]["total_size"] == sum(t.size for t in found.values()) * dtype.itemsize


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WORDS = "tokenizer.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


def rewrite(folder, change, file=WEIGHTS):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def index_says(folder, **places):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(places)
    places = {name: file for name, file in index["weight_map"].items() if file}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": places}))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / CONFIG).unlink(), "config.json cannot be read; a model folder has one$"),
    (lambda f: (f / CONFIG).write_text("{"), "config.json: not JSON: "),
    (lambda f: (f / CONFIG).write_bytes(b"\x80"), "config.json: not JSON: "),
    (lambda f: (f / CONFIG).write_text("[]"), "config.json: not a JSON object$"),
    (lambda f: (f / CONFIG).write_text("{}"), "^config.json lacks vocab_size, hidden_size, "),
    (lambda f: (f / CONFIG).write_text('{"use_bias": true}'), "^config.json has use_bias=True;"),
    (lambda f: (f / CONFIG).write_text('{"hidden_act": "gelu"}'),
     "^config.json has hidden_act='gelu'; known: poly_norm, silu$"),
    (lambda f: (f / CONFIG).write_text('{"rope_scaling": {"factor": 2}}'),
     "^config.json has rope_scaling={'factor': 2}; only None is supported$"),
    (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace("29", "null")),
     "^vocab_size must be at least 1, not None$"),
    (lambda f: (f / WEIGHTS).unlink(), ": model.safetensors is missing$"),
    (lambda f: (f / INDEX).write_text('{"weight_map": {"x": "gone"}}'), ": gone is missing$"),
    (lambda f: (f / INDEX).write_text("x"), "index.json: not JSON: "),
    (lambda f: (f / INDEX).write_text('{"weight_map": ["x"]}'),
     "index.json: its weight_map must give each tensor's file$"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
     "model.safetensors: cannot be read: "),
    (lambda f: rewrite(f, lambda t: t.pop(NORM)), f"do not fit: missing {NORM}$"),
    (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), "do not fit: extra x$"),
    (lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(3), HEAD: torch.ones(29)})),
     rf": {NORM} is \(3,\), not \(20,\); {HEAD} is \(29,\), not \(29, 20\)$"),
    (lambda f: rewrite(f, lambda t: [t.pop(name) for name in sorted(t)[:7]]), " and 3 more$"),
    (lambda f: rewrite(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
     f"do not fit: {NORM} is of I8, not F64, F32, F16, BF16$"),
])
def test_a_damaged_folder_is_one_line_that_says_what(tmp_path, damage, message):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(3)}))
    Motif.from_pretrained(tmp_path)                      # inv_freq is nobody's business
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as e:
        Motif.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage, message", [
    (lambda f, file: (f / file).write_bytes((f / file).read_bytes()[:-9]),
     "{file}: cannot be read: "),
    (lambda f, file: (f / file).unlink(), ": {file} is missing$"),
    (lambda f, file: rewrite(f, lambda t: t.pop(NORM), file), "do not fit: missing {NORM}$"),
    (lambda f, file: index_says(f, **{NORM: None}),
     "do not fit: {NORM} is in {file}, not where the index says$"),
    (lambda f, file: index_says(f, **{NORM: "model-00001-of-00020.safetensors"}),
     "do not fit: {NORM} is in {file}, not where the index says$"),
])
def test_a_damaged_shard_or_index_is_one_line_too(tmp_path, damage, message):
    make().save_pretrained(tmp_path, 4000)
    file = json.loads((tmp_path / INDEX).read_text())["weight_map"][NORM]
    damage(tmp_path, file)
    with pytest.raises(ValueError, match=message.format(file=file, NORM=NORM)) as e:
        Motif.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def words():
    """A tokenizer.json: bytes, by GPT-2's letters (its encoder.py), ten pairs and END."""
    odd = [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or 174 <= b)]
    letters = [chr(256 + odd.index(b) if b in odd else b) for b in range(256)]
    pairs = [(letters[97 + i], letters[98 + i]) for i in range(10)]
    vocab = [*letters, *map("".join, pairs)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    return {"version": "1.0", "normalizer": None, "pre_tokenizer": level, "post_processor": level,
            "decoder": level,
            "added_tokens": [{"id": 266, "content": data.END, "special": True, "lstrip": False,
                              "rstrip": False, "normalized": False, "single_word": False}],
            "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(vocab)},
                      "merges": pairs}}


def checkpoint(folder, tokenizer):
    """As a run leaves it, to the extent that --export looks at it."""
    model = make(vocab_size=300)
    model.save_pretrained(folder, 40_000)
    pretrain.write_json(folder / "state.json", {"step": 1, "config": {"tokenizer": tokenizer},
                                                "files": {}})
    return model


@pytest.mark.parametrize("tokenizer", ["words", "words/tokenizer.json", "byte"])
def test_export_writes_a_folder_that_others_serve(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    for name in "special_tokens_map.json", "chat_template.jinja", "other.txt":
        (tmp_path / "words" / name).write_text(name)
    (tmp_path / "words" / WORDS).write_text(json.dumps(words()))
    model = checkpoint(tmp_path / "out/step_1", tokenizer)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out_dir=out", "--export=served"])
    monkeypatch.setattr(pretrain, "SHARD_BYTES", 20_000)
    pretrain.main()
    served, ours = tmp_path / "served", data.load_tokenizer(tokenizer)
    found, index = by_the_format(served)
    for name, p in model.bfloat16().state_dict().items():
        assert np.array_equal(p.float().numpy(), found[name])
    assert index["metadata"]["total_size"] == 2 * sum(t.size for t in found.values())
    config = json.loads((served / CONFIG).read_text())
    assert config["torch_dtype"] == "bfloat16" and config["architectures"] == ["MotifForCausalLM"]
    generation = json.loads((served / "generation_config.json").read_text())
    special = ours._special_tokens
    assert generation == {"bos_token_id": special[data.BEGIN],
                          "eos_token_id": [special[data.END], special[data.TURN_END]]}
    names = {CONFIG, INDEX, "generation_config.json", *index["weight_map"].values()}
    if tokenizer == "byte":
        assert {f.name for f in served.iterdir()} == names
        return
    assert {f.name for f in served.iterdir()} == names | set(tools.export.TOKENIZER_FILES)
    assert (served / "chat_template.jinja").read_text() == "chat_template.jinja"
    theirs, spec = data.load_tokenizer("served"), json.loads((served / WORDS).read_text())
    assert data.fingerprint(theirs) == data.fingerprint(ours)
    assert {t["content"]: t["id"] for t in spec["added_tokens"]} == special
    assert evaluation.first_token(spec, theirs) == special[data.BEGIN]


def test_export_without_its_tokenizer_or_of_a_damaged_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out_dir=out", "--export=served"])
    with pytest.raises(SystemExit, match="^out holds no checkpoint to export; give --resume=PATH$"):
        pretrain.main()
    checkpoint(tmp_path / "out/step_1", "gone.json")
    with pytest.raises(SystemExit, match="^tokenizer gone.json: FileNotFoundError: "):
        pretrain.main()
    checkpoint(tmp_path / "out/step_1", "byte")
    next((tmp_path / "out/step_1").glob("*-00002-*")).write_bytes(b"x" * 99)
    with pytest.raises(SystemExit, match="-00002-of-.*: cannot be read: ") as e:
        pretrain.main()
    assert "\n" not in str(e.value) and not (tmp_path / "served").exists()


# ---- what a shape costs

@pytest.mark.parametrize("config, total, tensors", [(MOTIF_12B, 12_703_860_896, 643),
                                                    (MOTIF_2_6B, 2_597_218_432, 514)])
def test_the_published_shapes_have_the_published_sizes(config, total, tensors):
    with torch.device("meta"):
        model = Motif(config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(parameters_by_part(model).values()) == total
    assert len(model.state_dict()) == tensors
    if total > 10**10:
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        assert layer == 272_638_724 and len(model.matrices()) == 280
        muon = sum(p.numel() for p in model.matrices().values())
        assert muon == 10_905_190_400
        assert memory_per_gpu(model, 8) == {
            "weights": total / 2, "gradients": total / 2, "optimizer": total - muon / 2,
            "gathered": 2 * (2 * layer + 2 * 219_520 * 4096 + 4096)}


@pytest.mark.parametrize("changes", [*SHAPES.values(),
                                     {"num_noise_heads": 0, "num_attention_heads": 8}])
def test_flops_are_those_that_torch_counts(changes):
    model, ids = make(**changes), tokens(2, 8)
    forward, backward = flops_per_token(model.config, 8, causal=False)
    with FlopCounterMode(display=False) as counted:
        logits = model(ids)
    assert counted.get_total_flops() == 16 * forward
    with FlopCounterMode(display=False) as counted:
        logits.sum().backward()
    assert counted.get_total_flops() == 16 * backward
    hidden_keys = 8 - (8 + 1) / 2                        # that no token may see, on average
    wide = 1 + (2 if model.config.num_noise_heads else 1)
    assert (forward - flops_per_token(model.config, 8)[0]
            == 3 * model.config.num_attention_heads * 2 * 6 * wide * hidden_keys)
