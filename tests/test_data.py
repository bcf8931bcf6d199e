"""The curriculum, shards, preparing and built-in text, and what bad input is told."""
import synthetic.texts
import ast
import base64
import bz2
import gzip
import json
import lzma
import math
import os
import re
import statistics
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import data
from data import TokenDataset, Curriculum, Shard, ShardWriter, load_tokenizer, prepare

BYTE = load_tokenizer("byte")


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(33, 127, rng.integers(1, 120)))) for _ in range(n)]


def jsonl(path, documents):
    Path(path).write_text("".join(json.dumps({"id": 1, "text": d}) + "\n" for d in documents))


def tiktoken_file(path, ids):
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for token, i in ids.items())
    Path(path).write_text("".join(lines))


def read(source):
    return [document for unit in data.source_units(source) for document in unit()]


@pytest.fixture
def corpora(monkeypatch):
    """What makes a corpus of two domains of several shards, for one plan or another."""
    monkeypatch.setattr(data, "UNIT_BYTES", 1500)
    domains = {"a": ("a.jsonl", 0.7, 0.2), "b": ("b.jsonl", 0.3, 0.8)}
    jsonl("a.jsonl", texts(150, 1))
    jsonl("b.jsonl", texts(60, 2))
    plan = Curriculum(domains, batch_tokens=[[0, 100], [9000, 300]], seq_len=[[0, 20], [50_000, 32]],
                max_steps=500)
    stores = prepare(domains, "byte", "d", plan.need(), workers=1)
    return lambda seed=1, plan=plan: TokenDataset(plan, stores, seed)


# ---- the curriculum

@pytest.mark.parametrize("D, K, rows", [(2, 2, 1), (5, 10, 1), (16, 3, 2), (12, 9999, 1),
                                        (18, 5000, 1), (8, 40, 20), (13, None, 1)])
def test_no_domain_strays_a_sequence_from_its_quota_at_any_step(D, K, rows):
    steps, domains = 10_000, {f"d{i}": ("x.txt", 1, 1) for i in range(D)}
    lengths = [[0, 8], [50_000 * rows, 10], [80_000 * rows, 24]]
    batches = [[0, 9 * rows], [40_000 * rows, 19 * rows], [80_000 * rows, 49 * rows]]
    seen, sizes = [0], []
    for _ in range(steps):
        T, B = ([x for at, x in knots if at <= seen[-1]][-1] for knots in (lengths, batches))
        sizes.append((T, B // T))
        seen.append(seen[-1] + B // T * T)
    at = np.array(seen[:-1]) / seen[-1]
    if K is None:  # what got the least is all that follows, again and again: hard with few rows
        places, mixes = at, np.array([[(d >= t % D) / (D - t % D) for d in range(D)]
                                      for t in range(steps)])
    else:
        places = np.linspace(0, 1, K)
        mixes = np.random.default_rng(D).dirichlet(np.full(D, 0.3), K) * 0.9 + 0.1 / D
    knots = [[p, dict(zip(domains, mix.tolist()))] for p, mix in zip(places.tolist(), mixes)]
    caps = {"d0": 0.4, "d1": 0.6 if D == 2 else 0.25}
    plan = Curriculum(domains, batch_tokens=batches, seq_len=lengths, max_steps=steps, mixture=knots,
                caps=caps)
    T, rows = np.array(sizes).T
    assert (plan.seq_len == T).all() and (plan.rows == rows).all() and plan.tokens == seen
    cap = np.array([caps.get(name, 1) for name in domains])
    shares = np.stack([np.interp(at, places, mix) for mix in mixes.T], 1)
    low, high = np.ones(steps), np.full(steps, 1e9)
    for _ in range(100):  # what is above the caps is spread by one factor for all others
        middle = np.sqrt(low * high)
        full = np.minimum(shares * middle[:, None], cap).sum(1) >= 1
        low, high = np.where(full, low, middle), np.where(full, middle, high)
    shares = np.minimum(shares * high[:, None], cap)
    np.testing.assert_allclose(plan.shares, shares, rtol=0, atol=1e-9)
    assert (plan.shares <= cap + 1e-12).all() and (D > 12 or (shares[:, 0] == 0.4).any())
    taken, quota = plan.last - plan.first, np.cumsum(shares * (T * rows)[:, None], 0)
    assert (taken >= 0).all() and (taken.sum(1) == rows).all()
    assert (abs((taken * T[:, None]).cumsum(0) - quota) < T[:, None]).all()
    new = np.append(True, T[1:] != T[:-1])  # there the counts begin anew
    assert (plan.first[new] == 0).all() and (plan.first[1:] == plan.last[:-1])[~new[1:]].all()
    assert new.sum() == 3


def test_the_mixture_is_linear_in_tokens_and_caps_spread_in_proportion():
    domains = {n: ("x.txt", a, b) for n, a, b in (("a", 1, 0), ("b", 0, 0.9), ("c", 0, 0.1))}
    plan = Curriculum(domains, batch_tokens=[[0, 8], [400, 24]], seq_len=8, max_tokens=1000)
    at = np.array(plan.tokens[:-1]) / 1000
    assert (plan.tokens[-1], plan.steps) == (1000, 75)
    np.testing.assert_allclose(plan.shares, np.stack([1 - at, 0.9 * at, 0.1 * at], 1), atol=1e-15)
    knots = [[0.5, {"a": 0.6, "b": 0.3, "c": 0.1}], [1, {"a": 0.2, "b": 0.8}]]
    for caps, steps in (({}, [[.6, .3, .1], [.6, .3, .1], [.4, .55, .05]]),
                        ({"a": .4}, [[.4, .45, .15], [.4, .45, .15], [.4, .55, .05]]),
                        ({"a": .4, "b": .42}, [[.4, .42, .18], [.4, .42, .18], [.4, .42, .18]])):
        plan = Curriculum(domains, batch_tokens=8, seq_len=8, max_steps=100, mixture=knots, caps=caps)
        np.testing.assert_allclose(plan.shares[[0, 50, 75]], steps)
    thirds = {n: ("x.txt", 0.3333333, 0.3333333) for n in "abc"}
    plan = Curriculum(thirds, batch_tokens=8, seq_len=8, max_steps=1)
    assert np.abs(plan.shares - 1 / 3).max() < 1e-15


def test_permute_is_a_bijection_that_depends_on_its_key():
    for n in (*range(1, 71), 255, 256, 257, 4097, 100_003):
        images = [data.feistel_permutation(np.arange(n), n, bytes([k]) * 48) for k in range(3)]
        assert all((np.sort(image) == np.arange(n)).all() for image in images)
        assert n < 20 or len({image.tobytes() for image in (*images, np.arange(n))}) == 4


def test_every_sequence_comes_once_before_any_comes_twice(corpora):
    corpus, epochs = corpora(), Counter()
    plan, where = corpus.curriculum, {}
    for name, shards in corpus.train.items():
        assert len(shards) > 2
        for T, shard in ((T, shard) for T in (20, 32) for shard in shards):
            ids = np.fromfile(shard.path, "<u2", offset=data.HEADER.size)
            for i in range((len(ids) - 1) // T):
                where[ids[i * T:i * T + T + 1].tobytes()] = name, T
    for step in range(plan.steps):
        T, rows = plan.seq_len[step], corpus.batch(step)
        assert rows.shape == (plan.rows[step], T + 1) and rows.dtype == np.int64
        if not step or T != plan.seq_len[step - 1]:
            seen = dict.fromkeys((s for s in where if where[s][1] == T), 0)
        here = Counter(where[row.astype("<u2").tobytes()][0] for row in rows)
        seen = Counter(seen)
        for row in rows:
            seen[row.astype("<u2").tobytes()] += 1
        for name, first, last in zip(plan.names, plan.first[step], plan.last[step]):
            counts = [n for sequence, n in seen.items() if where[sequence] == (name, T)]
            assert here[name] == last - first and sum(counts) == last
            assert max(counts) - min(counts) <= 1
            epochs[name, T] = min(counts)
    assert len(epochs) == 4 and min(epochs.values()) >= 2


def test_every_epoch_and_seed_has_another_order(corpora):
    plan = Curriculum({"a": ("a.jsonl", 1, 1)}, batch_tokens=20, seq_len=20, max_steps=1500)
    one, two = ([corpus.rows(step)[0][1] for step in range(1500)]
                for corpus in (corpora(1, plan), corpora(2, plan)))
    n = max(one) + 1
    epochs = [order[e * n:e * n + n] for order in (one, two) for e in range(3)]
    assert all(sorted(epoch) == [*range(n)] for epoch in epochs)
    assert len({*map(tuple, epochs), tuple(range(n))}) == 7


def test_a_batch_depends_on_seed_and_step_alone(corpora):
    one, two = corpora(), corpora()
    batches = {step: two.batch(step) for step in range(500)}
    for step in (499, 0, 250, 250, 3):
        for world in (1, 2, 3, 8):
            merged = np.zeros_like(batches[step])
            for rank in range(world):
                merged[rank::world] = one.batch(step, rank, world)
            assert (merged == batches[step]).all()
    assert (corpora(2).batch(250) != batches[250]).any()
    names = [[name for name, _ in one.rows(step)] for step in range(250)]
    assert sum(order == sorted(order) for order in names) < 150  # domains are mixed in a batch
    assert one.fingerprint() == two.fingerprint()
    assert (one.validation("a", 40, 20) == [one.val["a"][0].ids[i:i + 21] for i in (0, 20)]).all()
    few, whole = one.validation("a", 9, 3), one.validation("a", 10**6, 3)  # spread evenly
    assert len(whole) > 6
    assert (few == whole[[0, len(whole) // 3, 2 * len(whole) // 3]]).all()


# ---- shards

def test_shards_keep_ids_of_two_and_of_four_bytes(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(2, "big") for i in range(2**16)]
    tiktoken_file("large.tiktoken", {token: i for i, token in enumerate(tokens)})
    for tokenizer, size in ((BYTE, 2), (load_tokenizer("large.tiktoken"), 4)):
        ids, path = list(range(0, tokenizer.n_vocab, 3)), tmp_path / f"{size}.bin"
        writer = ShardWriter(path, tokenizer)
        writer.add(ids[:10])
        writer.add(ids[10:])
        assert not path.exists() and writer.close() == len(ids)
        assert sorted(p.name for p in tmp_path.glob(f"{size}.*")) == [path.name]
        shard = Shard(path, data.fingerprint(tokenizer))
        assert shard.ids.tolist() == ids and shard.ids.itemsize == size
        assert (shard.sequences(7), shard.sequences(len(ids))) == ((len(ids) - 1) // 7, 0)
        assert shard.read(2, 7).tolist() == ids[14:22]


@pytest.mark.parametrize("change, words", [
    (lambda b: b[:-1], "is truncated"), (lambda b: b + b"\0\0", "is truncated"),
    (lambda b: b[:50], "is not a shard"), (lambda b: b"X" + b[1:], "is not a shard"),
    (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "is corrupted"),
    (lambda b: b[:8] + b"\2" + b[9:], "has shard version 2, not 1"),
    (lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:], "was made with another tokenizer")])
def test_a_damaged_shard_is_named(tmp_path, change, words):
    writer = ShardWriter(path := tmp_path / "s.bin", BYTE)
    writer.add(list(range(200)))
    writer.close()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^{path} {words}.*delete {tmp_path} and prepare again"):
        Shard(path, data.fingerprint(BYTE)).read(0, 10)


# ---- preparing

@pytest.fixture
def source(monkeypatch):
    """A jsonl that makes six units, and a shorthand to prepare it."""
    monkeypatch.setattr(data, "UNIT_BYTES", 4000)
    jsonl("s.jsonl", texts(300, 3))
    return lambda folder, need=10**6, part=(0, 1), workers=1: prepare(
        {"s": ("s.jsonl", 1, 1)}, "byte", folder, {"s": need}, part, workers)["s"]


def mtime(path):
    return os.stat(path).st_mtime_ns


def files(folder, what=Path.read_bytes):
    return {str(path): what(path) for path in Path(folder).rglob("*.*")}


def test_preparing_goes_on_where_it_was_cut_and_does_nothing_twice(source):
    store, whole, times = source("d"), files("d"), files("d", mtime)
    assert (len(store.tokens), store.whole, len(whole)) == (6, True, 13)
    assert source("d").tokens == store.tokens and files("d", mtime) == times
    for cut in ([3], [0, 1], [5], [2, 4]):
        for unit in cut:
            store.path("train", unit).rename(f"{store.path('train', unit)}.tmp")
        store.path("val", cut[0]).unlink()
        store.manifest.unlink()
        kept = files("d", mtime)
        source("d")
        assert files("d") == whole
        done = {store.path("train", unit) for unit in range(6) if unit not in cut}
        assert all(kept[str(path)] == mtime(path) for path in done)
    store.path("train", 1).unlink()                # units behind a gap do not count
    store.manifest.unlink()
    assert source("d", store.tokens[0]).tokens == store.tokens[:1]
    need = sum(store.tokens[:3])
    assert source("d", need).has(need) and files("d") == whole


def test_the_shards_read_follow_from_the_need_alone(source):
    def shards(store):
        return [(s.path.name, s.path.read_bytes()) for p in ("train", "val")
                for s in store.shards(p, need)]

    sizes = source("whole").tokens
    need = 3 * min(sizes[:3])
    expected = shards(source("one", need))
    assert len(expected) == 6 and len(source("one", need).tokens) == 3
    more = source("one", sum(sizes[:3]) + 1)
    assert shards(more) == expected and len(more.tokens) == 4
    assert shards(source("whole")) == shards(source("three", need, workers=3)) == expected
    for part in (2, 0, 1):
        assert not source("parts", need, (part, 3)).tokens
    assert len([*Path("parts").rglob("train-*.bin")]) == 3
    assert shards(source("parts", need)) == expected


def test_held_out_and_training_documents_are_together_all(source):
    store, kept, held = source("d"), Counter(), Counter()
    for unit in range(6):
        train, val = (BYTE.decode(Shard(store.path(part, unit)).ids.tolist()).split(data.END)[:-1]
                      for part in ("train", "val"))
        assert len(val) == sum((unit + i) % 50 == 0 for i in range(len(train) + len(val)))
        kept.update(train)
        held.update(val)
    assert kept + held == Counter(data.BEGIN + t for t in texts(300, 3)) and not kept & held


def test_all_kinds_of_files_give_the_same_documents():
    import pyarrow.parquet
    written = [*texts(40), "é\u2028\x0c\x85\r", "two\n\nparagraphs", "", " "]
    jsonl("a.jsonl", written)
    pyarrow.parquet.write_table(pyarrow.table({"text": [*written, None]}), "a.parquet")
    Path("a.txt").write_text(text := "".join(f"{t}\n\n" for t in texts(300)))
    pieces = read("a.txt")
    assert "".join(pieces) == text and len(pieces) > 3 and min(map(len, pieces[:-1])) >= 4096
    assert read("a.parquet") == [*written, ""]
    for end, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        for name, documents in (("a.jsonl", written), ("a.txt", pieces)):
            Path(name + end).write_bytes(module.compress(Path(name).read_bytes()))
            assert read(name) == read(name + end) == documents
    Path("b.jsonl").write_text('{"question": "q", "answer": "\\ud800"}\n{"question": null, '
                               '"answer": ""}')
    assert read("b.jsonl?text=question,answer") == ["q\n\n\ud800", "\n\n"]


@pytest.mark.parametrize("size", [1, 64, 1000, 10**6])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_cutting_loses_and_repeats_no_line(monkeypatch, size, end):
    monkeypatch.setattr(data, "UNIT_BYTES", size)
    written = [*texts(9), "é" * 999, *texts(9, 1)]
    lines = [json.dumps({"text": t}) + end for t in written]
    Path("a.jsonl").write_bytes(b"")
    Path("b.jsonl").write_bytes(("\ufeff" + "".join(lines[:15])).encode())
    Path("c.jsonl").write_bytes("".join(lines[15:]).rstrip().encode())
    assert [d for d in read("[a-c].jsonl") if d] == written
    sizes = [sum(end - start for _, start, end in unit.args[0])
             for unit in data.source_units("*.jsonl")]
    total = sum(Path(name).stat().st_size for name in ("b.jsonl", "c.jsonl"))
    assert sum(sizes) == total and min(sizes) >= min(size, total)
    Path("t.txt").write_bytes(("\ufeff" + end.join(written)).encode())
    assert "".join(read("t.txt")) == end.join(written)


def test_another_file_column_or_tokenizer_has_another_folder():
    def folder(source="s.jsonl", tokenizer=BYTE):
        return data.DomainShards("s", source, tokenizer, "d").folder

    jsonl("s.jsonl", texts(5))
    tiktoken_file("t.tiktoken", {bytes([i]): 255 - i for i in range(256)})
    seen = {folder(), folder(), folder("s.jsonl?text=id"),
            folder(tokenizer=load_tokenizer("t.tiktoken"))}
    jsonl("s.jsonl", texts(6))
    assert len(seen) == 3 and folder() not in seen


# ---- what is refused

def die(*_):
    os._exit(1)


def refused(message, call, *args, **options):
    with pytest.raises(ValueError) as e:
        call(*args, **options)
    assert str(e.value).startswith(message) and "\n" not in str(e.value), str(e.value)


def test_what_a_run_cannot_read_is_one_line(source, monkeypatch):
    def corpus(T):
        plan = Curriculum({"s": ("s.jsonl", 1, 1)}, batch_tokens=T, seq_len=T, max_steps=1)
        return TokenDataset(plan, {"s": store}, 0)

    store = source("d")
    refused("domain 's': of 17,496 tokens in 6 shards only 0 fill sequences of 5000", corpus, 5000)
    refused("domain 's' holds out no sequence of 2000", corpus(2000).validation, "s", 1, 2000)
    store.path("val", 0).unlink()
    refused(f"shard {store.path('val', 0)}: FileNotFoundError: No such file", corpus, 32)
    store.manifest.write_text('{"tokens": [1')
    refused(f"{store.manifest} is damaged: JSONDecodeError: ", source, "d")
    refused("s.jsonl cannot be written: NotADirectoryError: ", source, "s.jsonl")
    monkeypatch.setattr(data, "tokenize_unit", die)
    refused("a process that prepared data was killed", source, "new", workers=2)
    assert not os.listdir("new")


NO_TEXT, FEW = "no text in column text; it has", "has fewer than two documents with text; one is"
GOOD = b'{"text": "' + b"x" * 14 + b'"}\n'
BAD_FILES = {  # name: content, complaint
    "empty.jsonl": (b"\n \n", FEW), "one.txt": (b"a\nb", FEW),
    "quotes.jsonl": (GOOD + b"{'text': 1}\n", "byte 27: JSONDecodeError: "),
    "late.jsonl": (GOOD * 9999 + b"\n{\n", "byte 269974: JSONDecodeError: "),
    "list.jsonl": (b"[1]\n", f"byte 0: {NO_TEXT} list: "),
    "null.jsonl": (b"null\n", f"byte 0: {NO_TEXT} NoneType: "),
    "number.jsonl": (b'{"text": 1, "n": 2}\n', f"byte 0: {NO_TEXT} text, n: name the right one"),
    "deep.jsonl": (b"[" * 10**5, "byte 0: RecursionError: "),
    "latin.txt": (b"good\nsch\xf6n\n", "byte 5: UnicodeDecodeError: "),
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:40], "byte 1539: EOFError: "),
    "false.txt.bz2": (GOOD, "at its beginning: OSError: Invalid data stream"),
    "false.txt.xz": (GOOD, "at its beginning: LZMAError: "),
    "false.parquet": (GOOD, "at its beginning: ArrowInvalid: ")}


@pytest.mark.parametrize("source, message", [
    *((name, name) for name in BAD_FILES),
    ("none/*.jsonl", "no file matches none/*.jsonl; give a path"),
    ("folder", "source 'folder' is neither builtin"), ("./folder", "source './folder' is neither"),
    ("http://a/b", "source 'http://a/b' is neither builtin"), ("", "source '' is neither builtin"),
    ("good.jsonl?text=body", "good.jsonl: byte 0: no text in column body; it has id, text: name"),
    ("builtin:news", "source 'builtin:news': builtin are code, language, math, science"),
    ("builtin:math?text=x", "source 'builtin:math?text=x': text=x is none of its options (it has"),
    ("good.jsonl?name=x", "source 'good.jsonl?name=x': name=x is none of its options (text=...)"),
    ("good.jsonl?text=", "source 'good.jsonl?text=': text= is none of its options (text=...)"),
    ("a/b?x", "source 'a/b?x': x= is none of its options (text=..., name=..., split=...)")])
def test_a_bad_source_is_one_line_and_leaves_nothing(source, message, monkeypatch):
    monkeypatch.setattr(data, "UNIT_BYTES", 99_000)
    Path("folder").mkdir()
    jsonl("good.jsonl", texts(200))
    if source in BAD_FILES:
        content, complaint = BAD_FILES[source]
        Path(source).write_bytes(content)
        message = f"domain 'a': {source} {FEW}" if complaint == FEW else f"{source}: {complaint}"
    domains = {"a": (source, 1, 1), "ok": ("good.jsonl", 0, 0)}
    refused(message, prepare, domains, "byte", "d", {"a": 10**6, "ok": 1}, workers=2)
    left = [path.name for path in Path("d").rglob("*")]
    assert not [name for name in left if name.endswith(".tmp")
                or name.startswith("a-") and source != "late.jsonl"]  # whole units stay


X, KNOTS = "x.txt", "must be a positive number, or [[0, number], [tokens, number], ...] with"


@pytest.mark.parametrize("key, value, message", [
    ("max_steps", None, "nothing ends the run"), ("max_steps", 0, "nothing ends the run"),
    *(("domains", {"a": d}, f"domain 'a' must be (source, first share, last share), none negative, "
       f"not {d}") for d in (X, None, (X, 1), (1, 1, 1), (X, "1", 1), (X, True, 1), (X, -1, 1),
                             (X, 1, math.nan), {"a": 1})),
    *(("domains", {name: (X, 1, 1)}, f"domain {name!r}: its name must be letters, digits, ")
      for name in ("", "a/b", "../a", 1, "a\n")),
    ("domains", {}, "the shares at 0 of the run must be of "),
    ("domains", {"a": (X, 1, 0.99)}, "the shares at 1 of the run must be of a, none negative, and"),
    *(("mixture", m, f"mixture={m} must be [[fraction of the run, {{name: share}}], ...]")
      for m in ([], [0.5], "x", [[0, {"a": 1}, 1]], [["0", {"a": 1}]], [[-1, {"a": 1}]], [[0, 1]])),
    *(("mixture", [[0, m]], "the shares at 0 of the run must be of a, b, none negative, and sum to")
      for m in ({"a": 1.5, "b": -0.5}, {"c": 1}, {"a": "1"}, {"a": 0.999}, {})),
    ("mixture", [[0, {"a": 1}], [2, {"a": 1}]], "mixture: the places [0, 2] must rise from 0 to 1"),
    ("mixture", [[1, {"a": 1}], [0, {"a": 1}]], "mixture: the places [1, 0] must rise from 0 to 1"),
    *(("caps", caps, f"caps={caps} must be {{name: largest share}} of a, b")
      for caps in ({"c": 0.5}, {"a": "x"}, {"a": -1}, {"a": math.nan})),
    ("caps", {"a": 0.4, "b": 0.4}, "caps={'a': 0.4, 'b': 0.4} leave too little room at step 0"),
    *(("batch_tokens", b, f"batch_tokens={b} {KNOTS}") for b in (
        0, -1, None, "x", 1.5, True, [], [[0, 1], [0, 2]], [[1, 2]], [[0, 0]], [[0, 1.5]], [0, 1],
        [[0, 1], [5, 2], [3, 1]], [[0, 1, 2]], {0: 1}, [[0, True]])),
    ("seq_len", [[0, 16], [32, 8]], "seq_len=[[0, 16], [32, 8]]: the length may rise, not fall"),
    ("seq_len", [[0, 16], [160, 65]], "batch_tokens=64 holds no sequence of seq_len=65; raise it")])
def test_a_bad_curriculum_is_one_line(key, value, message):
    good = {"domains": {"a": (X, 0.5, 0.5), "b": (X, 0.5, 0.5)}, "batch_tokens": 64, "seq_len": 32,
            "max_steps": 10}
    Curriculum(**good)
    refused(message, Curriculum, **{**good, key: value})
    fades = [[0, {"a": .1, "b": .9}], [.5, {"a": 1}]]  # a cap, and then no other has a share
    refused("caps={'a': 0.4} leave too little room at step 5", Curriculum,
            **{**good, "mixture": fades, "caps": {"a": .4}})


# ---- built-in text

def solved(question, body, answer):
    """Whether the answer to a problem is right, found in other ways than the generator's."""
    def value(text, **known):
        text = re.sub(r"(\d)(\(|[abx]\b)", r"\1*\2", text.replace("^", "**"))
        return eval(text, {"sqrt": math.sqrt, **known})

    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if " mod " in question:
        return pow(*numbers[:3]) == int(answer)
    if "decimal" in question:
        whole, start, cycle = re.fullmatch(r"(\d+)\.(\d*)(?:\((\d+)\))?", answer).groups("0")
        rest = Fraction(int(cycle), 10 ** len(cycle) - 1)
        return (int(whole + start) + rest) / 10 ** len(start) == Fraction(*numbers[:2])
    if "variance" in question:
        found = [Fraction(n) for n in re.findall(r"[\d/]+", answer)]
        return found == [f(map(Fraction, numbers)) for f in (
            statistics.median, statistics.mean, statistics.pvariance)]
    if "ma + nb" in question:
        (a, b), (left, right) = numbers, answer.split(" = ")
        return int(left) == math.gcd(a, b) == value(right, a=a, b=b)
    if "x" in answer and "(" in question and " is " not in answer:
        left, right = re.sub("^(Solve|Find x if) ", "", question).split(" = ")
        at = [value(left, x=x) - value(right, x=x) for x in (0, 1)]
        x = Fraction(at[0], at[0] - at[1]) if at[0] != at[1] else "no x" if at[0] else "any x"
        return answer == (x if isinstance(x, str) else f"x = {x}")
    known = {s: float(v) for s, v in re.findall(r"the [a-zA-Z ]+ (\w) is (\S+) ", question)}
    for line in body:
        symbol, *terms, last = re.sub("^From .*: ", "", line).split(" = ")
        known[symbol] = float(last.split()[0])     # also 20 cm = 0.2 m
        if not re.fullmatch(r"[\d.e-]+ [a-zA-Z]\S*", terms[0]):
            assert all(math.isclose(value(t, **known), known[symbol], rel_tol=6e-4) for t in terms)
    return answer.endswith(f" is {last}")


@pytest.mark.parametrize("kind", ["math", "science"])
def test_problems_are_right_and_always_the_same(kind):
    one, two, other = (list(synthetic.texts.problems(kind, unit)) for unit in (3, 3, 4))
    assert one == two and not {*one} & {*other} and len(one) == synthetic.texts.PROBLEMS_PER_UNIT
    for text in one:
        question, *body, answer = text.split("\n")
        assert solved(question, body, answer.removeprefix("Answer: ")), text


def test_code_and_language_share_no_docstring():
    code, language = ("\n".join(synthetic.texts.library(kind, 0)) for kind in ("code", "language"))
    kept = [ast.get_docstring(node) for text in synthetic.texts.library("code", 0)
            for node in ast.walk(ast.parse(text)) if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [d for d in kept if d and len(d) > 120 and d in language]
    assert len(language) > 10**5 and len(code) > 5 * 10**5 and "import" in code
