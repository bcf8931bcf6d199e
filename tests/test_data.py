"""The curriculum, shards, batches, preparing, and the text that the quick start reads."""
import ast
import base64
import json
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
from configurator import UserError
from data import (HEADER, Curriculum, DomainShards, Shard, ShardWriter, TokenDataset,
                  feistel_permutation, parse_schedule, prepare)
from support import sources
from support.tokenizer import BEGIN, END, load_tokenizer
from synthetic.texts import PROBLEMS_PER_UNIT, library, problems

BYTE = load_tokenizer("byte")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(33, 127, rng.integers(1, 120)))) for _ in range(n)]


def write_jsonl(path, documents):
    lines = [json.dumps({"id": 1, "text": document}) + "\n" for document in documents]
    Path(path).write_text("".join(lines))


def refused(call, *words):
    """call() raises a UserError of one line with these words in it."""
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


# ---- the curriculum

def random_mixture(domains, points, seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(len(domains), 0.3), points) * 0.9 + 0.1 / len(domains)
    return np.linspace(0, 1, points), shares


def hard_mixture(domains, places):
    """What got the least so far is all that follows, again and again: hard with few rows."""
    D = len(domains)
    shares = [[(d >= t % D) / (D - t % D) for d in range(D)] for t in range(len(places))]
    return places, np.array(shares)


@pytest.mark.parametrize("D, points, rows", [
    (2, 2, 1), (5, 10, 1), (16, 3, 2), (12, 9999, 1), (18, 5000, 1), (8, 40, 20), (13, None, 1)])
def test_no_domain_strays_a_sequence_from_its_quota_at_any_step(D, points, rows):
    steps = 10_000
    domains = {f"d{i}": ("x.txt", 1, 1) for i in range(D)}
    options = {"seq_len": [[0, 8], [50_000 * rows, 10], [80_000 * rows, 24]],
               "batch_tokens": [[0, 9 * rows], [40_000 * rows, 19 * rows],
                                [80_000 * rows, 49 * rows]],
               "max_steps": steps}
    tokens = np.array(Curriculum(domains, mixture=[[0, {"d0": 1}]], **options).tokens)
    progress = tokens[:-1] / tokens[-1]
    if points is None:
        places, mixes = hard_mixture(domains, progress)
    else:
        places, mixes = random_mixture(domains, points, seed=D)
    mixture = [[p, dict(zip(domains, mix.tolist()))] for p, mix in zip(places.tolist(), mixes)]
    curriculum = Curriculum(domains, mixture=mixture, **options)

    shares = np.stack([np.interp(progress, places, column) for column in mixes.T], axis=1)
    np.testing.assert_allclose(curriculum.shares, shares, rtol=0, atol=1e-9)
    T = np.array(curriculum.seq_len)
    assert set(T) == {8, 10, 24} and (np.diff(tokens) == T * curriculum.rows).all()

    taken = curriculum.last - curriculum.first
    assert (taken >= 0).all() and (taken.sum(1) == curriculum.rows).all()
    quotas = np.cumsum(shares * np.diff(tokens)[:, None], axis=0)
    assert (abs((taken * T[:, None]).cumsum(0) - quotas) < T[:, None]).all()

    new_length = np.append(True, T[1:] != T[:-1])
    assert (curriculum.first[new_length] == 0).all()
    assert (curriculum.first[1:] == curriculum.last[:-1])[~new_length[1:]].all()


def test_the_mixture_is_linear_in_tokens():
    domains = {"a": ("x.txt", 1, 0), "b": ("x.txt", 0, 0.9), "c": ("x.txt", 0, 0.1)}
    schedule = {"batch_tokens": [[0, 8], [400, 24]], "seq_len": 8, "max_tokens": 1000}
    curriculum = Curriculum(domains, **schedule)
    at = np.array(curriculum.tokens[:-1]) / 1000
    assert (curriculum.tokens[-1], curriculum.steps) == (1000, 75)
    expected = np.stack([1 - at, 0.9 * at, 0.1 * at], axis=1)
    np.testing.assert_allclose(curriculum.shares, expected, atol=1e-15)

    # Before the first point of a mixture and after its last one the shares are constant.
    mixture = [[0.5, {"a": 0.6, "b": 0.3, "c": 0.1}], [1, {"a": 0.2, "b": 0.8}]]
    curriculum = Curriculum(domains, batch_tokens=8, seq_len=8, max_steps=100, mixture=mixture)
    expected = [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.4, 0.55, 0.05]]
    np.testing.assert_allclose(curriculum.shares[[0, 50, 75]], expected)

    thirds = {name: ("x.txt", 0.3333333, 0.3333333) for name in "abc"}
    curriculum = Curriculum(thirds, batch_tokens=8, seq_len=8, max_steps=1)
    assert np.abs(curriculum.shares - 1 / 3).max() < 1e-15


X = "x.txt"


@pytest.mark.parametrize("key, value", [
    ("max_steps", None), ("domains", {"a": X}), ("domains", {"a": (X, -1, 1)}),
    ("domains", {"a": (X, True, 1)}), ("domains", {"a": (X, 1, math.nan)}),
    ("domains", {"../a": (X, 1, 1)}), ("domains", {}), ("domains", {"a": (X, 1, 0.99)}),
    ("mixture", []), ("mixture", [0.5]), ("mixture", [["0", {"a": 1}]]),
    ("mixture", [[0, {"c": 1}]]),
    ("mixture", [[0, {"a": 1.5, "b": -0.5}]]), ("mixture", [[1, {"a": 1}], [0, {"a": 1}]]),
    ("mixture", [[0, {"a": 1}], [2, {"a": 1}]]), ("batch_tokens", 0), ("batch_tokens", True),
    ("batch_tokens", [[0, 1.5]]), ("batch_tokens", [[1, 2]]), ("batch_tokens", [[0, 1], [0, 2]]),
    ("batch_tokens", [0, 1]), ("seq_len", [[0, 16], [32, 8]]), ("seq_len", [[0, 16], [160, 65]])])
def test_a_wrong_curriculum_names_its_key(key, value):
    good = {"domains": {"a": (X, 0.5, 0.5), "b": (X, 0.5, 0.5)}, "batch_tokens": 64, "seq_len": 32,
            "max_steps": 10}
    Curriculum(**good)
    refused(lambda: Curriculum(**{**good, key: value}), key)


def test_a_wrong_schedule_names_its_key():
    for value in (None, "x", [], [[0, 0]], [[0, 1, 2]], {0: 1}):
        refused(lambda: parse_schedule("some_key", value), "some_key", str(value))


# ---- batches

def test_a_permutation_is_a_bijection_that_depends_on_its_key():
    for n in (*range(1, 71), 255, 256, 257, 4097, 100_003):
        places = np.arange(n)
        images = [feistel_permutation(places, n, bytes([k]) * 48) for k in range(3)]
        assert all((np.sort(image) == places).all() for image in images)
        assert n < 20 or len({image.tobytes() for image in (*images, places)}) == 4
        for i in range(min(n, 9)):
            assert feistel_permutation(places[i:i + 1], n, bytes(48)) == images[0][i]


@pytest.fixture
def make_dataset(monkeypatch):
    """Makes the dataset of two domains of several shards, for a seed and a curriculum."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 1500)
    domains = {"a": ("a.jsonl", 0.7, 0.2), "b": ("b.jsonl", 0.3, 0.8)}
    write_jsonl("a.jsonl", texts(150, 1))
    write_jsonl("b.jsonl", texts(60, 2))
    default = Curriculum(domains, batch_tokens=[[0, 100], [9000, 300]],
                         seq_len=[[0, 20], [50_000, 32]], max_steps=500)
    stores = prepare(domains, "byte", "d", default.need(), workers=1)
    return lambda seed=1, curriculum=default: TokenDataset(curriculum, stores, seed)


def sequences_on_disk(shards, T):
    """The sequences of T tokens, as bytes, by the definition of a shard."""
    found = []
    for shard in shards:
        ids = np.fromfile(shard.path, "<u2", offset=HEADER.size)
        for i in range((len(ids) - 1) // T):
            found.append(ids[i * T:i * T + T + 1].tobytes())
    return found


def test_every_sequence_comes_once_before_any_comes_twice(make_dataset):
    dataset = make_dataset()
    curriculum = dataset.curriculum
    epochs = Counter()
    for step in range(curriculum.steps):
        T = curriculum.seq_len[step]
        if step == 0 or T != curriculum.seq_len[step - 1]:
            counts = {}
            for name, shards in dataset.train.items():
                assert len(shards) > 2
                counts[name] = dict.fromkeys(sequences_on_disk(shards, T), 0)

        batch = dataset.batch(step)
        assert batch.shape == (curriculum.rows[step], T + 1) and batch.dtype == np.int64
        assert dataset.num_targets(step) == batch[:, 1:].size
        for row in batch.astype("<u2"):
            name = "a" if row.tobytes() in counts["a"] else "b"
            counts[name][row.tobytes()] += 1

        for name, last in zip(curriculum.names, curriculum.last[step]):
            often = counts[name].values()
            assert sum(often) == last and max(often) - min(often) <= 1
            epochs[name, T] = min(often)
    assert len(epochs) == 4 and min(epochs.values()) >= 2


def test_every_epoch_and_seed_has_another_order(make_dataset):
    one_domain = Curriculum({"a": ("a.jsonl", 1, 1)}, batch_tokens=20, seq_len=20, max_steps=1500)
    orders = []
    for seed in (1, 2):
        dataset = make_dataset(seed, one_domain)
        order = [int(dataset.rows(step)[0][1]) for step in range(1500)]
        n = max(order) + 1
        orders += [tuple(order[epoch * n:epoch * n + n]) for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({*orders, tuple(range(n))}) == 7


def test_a_batch_depends_on_seed_and_step_alone(make_dataset):
    straight = make_dataset()
    batches = {step: straight.batch(step) for step in range(500)}
    resumed = make_dataset()
    for step in (499, 0, 250, 250, 3):
        for world in (1, 2, 3, 8):
            merged = np.zeros_like(batches[step])
            for rank in range(world):
                merged[rank::world] = resumed.batch(step, rank, world)
            assert (merged == batches[step]).all()
    assert (make_dataset(2).batch(250) != batches[250]).any()
    assert straight.fingerprint() == resumed.fingerprint()

    # The rows of the domains are mixed in a batch.
    names = [[name for name, _ in straight.rows(step)] for step in range(250)]
    assert sum(order == sorted(order) for order in names) < 150


def test_validation_is_spread_over_what_is_held_out(make_dataset):
    dataset = make_dataset()
    expected = [dataset.val["a"][0].ids[i:i + 21] for i in (0, 20)]
    assert (dataset.validation("a", 40, 20) == expected).all()
    few = dataset.validation("a", 9, 3)
    whole = dataset.validation("a", 10**6, 3)
    assert len(whole) > 6
    assert (few == whole[[0, len(whole) // 3, 2 * len(whole) // 3]]).all()


# ---- shards

def test_shards_keep_ids_of_two_and_of_four_bytes(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(2, "big") for i in range(2**16)]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    Path("large.tiktoken").write_text("".join(lines))
    for tokenizer, size in ((BYTE, 2), (load_tokenizer("large.tiktoken"), 4)):
        ids = list(range(0, tokenizer.n_vocab, 3))
        path = tmp_path / f"{size}.bin"
        writer = ShardWriter(path, tokenizer)
        writer.add(ids[:10])
        writer.add(ids[10:])
        assert not path.exists() and writer.close() == len(ids)
        assert [p.name for p in tmp_path.glob(f"{size}.*")] == [path.name]
        shard = Shard(path, tokenizer.fingerprint())
        assert shard.ids.tolist() == ids and shard.ids.itemsize == size
        assert shard.num_sequences(7) == (len(ids) - 1) // 7
        assert shard.num_sequences(len(ids)) == 0
        assert shard.read(2, 7).tolist() == ids[14:22]


@pytest.mark.parametrize("damage", [
    lambda b: b[:-1], lambda b: b + b"\0\0", lambda b: b[:50], lambda b: b"X" + b[1:],
    lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:8] + b"\2" + b[9:],
    lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:]],
    ids=["cut", "longer", "no header", "magic", "token", "version", "tokenizer"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    path = tmp_path / "s.bin"
    writer = ShardWriter(path, BYTE)
    writer.add(list(range(200)))
    writer.close()
    assert Shard(path, BYTE.fingerprint()).read(0, 10).tolist() == list(range(11))
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: Shard(path, BYTE.fingerprint()).read(0, 10), str(path))


# ---- preparing

@pytest.fixture
def prepare_six(monkeypatch):
    """Prepares a file of six units."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 4000)
    write_jsonl("s.jsonl", texts(300, 3))

    def call(folder, need=10**6, part=(0, 1), workers=1):
        return prepare({"s": ("s.jsonl", 1, 1)}, "byte", folder, {"s": need}, part, workers)["s"]
    return call


def mtime(path):
    return os.stat(path).st_mtime_ns


def files(folder, what=Path.read_bytes):
    return {str(path): what(path) for path in Path(folder).rglob("*.*")}


def test_preparing_goes_on_where_it_was_cut_and_does_nothing_twice(prepare_six):
    store = prepare_six("d")
    whole = files("d")
    times = files("d", mtime)
    assert (len(store.tokens), store.complete, len(whole)) == (6, True, 13)
    assert prepare_six("d").tokens == store.tokens and files("d", mtime) == times

    for cut in ([3], [0, 1], [5], [2, 4]):
        for unit in cut:
            store.path("train", unit).rename(f"{store.path('train', unit)}.tmp")
        store.path("val", cut[0]).unlink()
        store.manifest.unlink()
        kept = files("d", mtime)
        prepare_six("d")
        assert files("d") == whole
        for unit in set(range(6)) - set(cut):
            path = store.path("train", unit)
            assert kept[str(path)] == mtime(path)


def test_units_behind_a_gap_do_not_count(prepare_six):
    store = prepare_six("d")
    whole = files("d")
    store.path("train", 1).unlink()
    store.manifest.unlink()
    assert prepare_six("d", store.tokens[0]).tokens == store.tokens[:1]
    need = sum(store.tokens[:3])
    assert prepare_six("d", need).has(need) and files("d") == whole


def test_the_shards_read_follow_from_the_need_alone(prepare_six):
    def shards(store):
        return [(shard.path.name, shard.path.read_bytes()) for part in ("train", "val")
                for shard in store.shards(part, need)]

    sizes = prepare_six("whole").tokens
    need = 3 * min(sizes[:3])
    expected = shards(prepare_six("one", need))
    assert len(expected) == 6 and len(prepare_six("one", need).tokens) == 3
    more = prepare_six("one", sum(sizes[:3]) + 1)
    assert shards(more) == expected and len(more.tokens) == 4
    assert shards(prepare_six("whole")) == expected
    assert shards(prepare_six("three", need, workers=3)) == expected
    for part in (2, 0, 1):
        assert prepare_six("parts", need, (part, 3)).tokens == []
    assert len(list(Path("parts").rglob("train-*.bin"))) == 3
    assert shards(prepare_six("parts", need)) == expected


def test_held_out_and_training_documents_are_together_all(prepare_six):
    store = prepare_six("d")
    kept = Counter()
    held_out = Counter()
    for unit in range(6):
        train, val = [BYTE.decode(Shard(store.path(part, unit)).ids.tolist()).split(END)[:-1]
                      for part in ("train", "val")]
        assert len(val) == sum((unit + i) % 50 == 0 for i in range(len(train) + len(val)))
        kept.update(train)
        held_out.update(val)
    assert kept + held_out == Counter(BEGIN + text for text in texts(300, 3))
    assert not kept & held_out


def test_another_file_column_or_tokenizer_has_another_folder():
    def folder(source="s.jsonl", tokenizer=BYTE):
        return DomainShards("s", source, tokenizer, "d").folder

    write_jsonl("s.jsonl", texts(5))
    lines = [f"{base64.b64encode(bytes([i])).decode()} {255 - i}\n" for i in range(256)]
    Path("t.tiktoken").write_text("".join(lines))
    seen = {folder(), folder(), folder("s.jsonl?text=id"),
            folder(tokenizer=load_tokenizer("t.tiktoken"))}
    write_jsonl("s.jsonl", texts(6))
    assert len(seen) == 3 and folder() not in seen


def die(*_):
    os._exit(1)


def test_a_killed_process_is_one_line_and_leaves_nothing(prepare_six, monkeypatch):
    monkeypatch.setattr(data, "tokenize_unit", die)
    refused(lambda: prepare_six("new", workers=2), "killed")
    assert os.listdir("new") == []


def test_what_a_run_cannot_read_is_one_line(prepare_six):
    def dataset(T):
        curriculum = Curriculum({"s": ("s.jsonl", 1, 1)}, batch_tokens=T, seq_len=T, max_steps=1)
        return TokenDataset(curriculum, {"s": store}, 0)

    store = prepare_six("d")
    refused(lambda: dataset(5000), "'s'", "seq_len")
    refused(lambda: dataset(2000).validation("s", 1, 2000), "'s'", "seq_len")
    store.path("val", 0).unlink()
    refused(lambda: dataset(32), str(store.path("val", 0)))
    store.manifest.write_text('{"tokens": [1')
    refused(lambda: prepare_six("d"), str(store.manifest))
    refused(lambda: prepare_six("s.jsonl"), "s.jsonl")


# ---- the text that the quick start reads

def evaluate(text, **known):
    """3x^2 - 2(x + 1), say, for a value of x."""
    text = re.sub(r"(\d)(\(|[abx]\b)", r"\1*\2", text.replace("^", "**"))
    return eval(text, {"sqrt": math.sqrt, **known})


def check_power(question, answer):
    base, exponent, n = [int(number) for number in re.findall(r"\d+", question)][:3]
    assert pow(base, exponent, n) == int(answer)


def check_decimal(question, answer):
    p, q = [int(number) for number in re.findall(r"\d+", question)]
    whole, start, cycle = re.fullmatch(r"(\d+)\.(\d*)(?:\((\d+)\))?", answer).groups("0")
    rest = Fraction(int(cycle), 10 ** len(cycle) - 1)
    assert (int(whole + start) + rest) / 10 ** len(start) == Fraction(p, q)


def check_spread(question, answer):
    numbers = [Fraction(number) for number in re.findall(r"\d+", question)]
    median, mean, variance = [Fraction(number) for number in re.findall(r"[\d/]+", answer)]
    assert median == statistics.median(numbers)
    assert mean == statistics.mean(numbers)
    assert variance == statistics.pvariance(numbers)


def check_euclid(question, answer):
    a, b = [int(number) for number in re.findall(r"\d+", question)]
    left, right = answer.split(" = ")
    assert int(left) == math.gcd(a, b) == evaluate(right, a=a, b=b)


def check_equation(question, answer):
    left, right = re.sub("^(Solve|Find x if) ", "", question).split(" = ")
    at = [evaluate(left, x=x) - evaluate(right, x=x) for x in (0, 1)]
    if at[0] != at[1]:
        assert answer == f"x = {Fraction(at[0], at[0] - at[1])}"
    else:
        assert answer == ("no x" if at[0] else "any x")


def check_science(question, steps, answer):
    """All sides of every equation agree, to the four digits that are shown."""
    known = {s: float(v) for s, v in re.findall(r"the [a-zA-Z ]+ (\w) is (\S+) ", question)}
    for line in steps:
        symbol, *terms, last = re.sub("^From .*: ", "", line).split(" = ")
        known[symbol] = float(last.split()[0])
        is_conversion = re.fullmatch(r"[\d.e-]+ [a-zA-Z]\S*", terms[0])  # as 20 cm = 0.2 m is
        if not is_conversion:
            for term in terms:
                assert math.isclose(evaluate(term, **known), known[symbol], rel_tol=6e-4)
    assert answer.endswith(f" is {last}")


MATH_CHECKS = {" mod ": check_power, "decimal": check_decimal, "variance": check_spread,
               "ma + nb": check_euclid, "(": check_equation}


@pytest.mark.parametrize("kind", ["math", "science"])
def test_problems_are_right_and_always_the_same(kind):
    documents = list(problems(kind, 3))
    assert documents == list(problems(kind, 3)) and len(documents) == PROBLEMS_PER_UNIT
    assert not set(documents) & set(problems(kind, 4))
    for document in documents:
        question, *steps, answer = document.split("\n")
        answer = answer.removeprefix("Answer: ")
        if kind == "science":
            check_science(question, steps, answer)
        else:
            check = next(check for sign, check in MATH_CHECKS.items() if sign in question)
            check(question, answer)


def test_code_and_language_share_no_docstring():
    code = list(library("code", 0))
    language = "\n".join(library("language", 0))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in code:
        for node in ast.walk(ast.parse(text)):
            docstring = ast.get_docstring(node) if isinstance(node, owners) else None
            assert not docstring or len(docstring) <= 120 or docstring not in language
    assert len(language) > 10**5 and sum(map(len, code)) > 5 * 10**5
