"""The curriculum, shards, batches, sources, preparing, and the text that the quick start reads."""
import ast
import base64
import math
import re
import resource
import statistics
from collections import Counter
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import data
from data import ContinuedCurriculum, Curriculum, Tape, TokenDataset, parse_schedule, random_order
from documents import refused, texts, write_jsonl
from support import preparing, sources
from support.preparing import Domain, Preparer
from support.tokenizer import BEGIN, END, load_tokenizer
from synthetic.texts import PROBLEMS_PER_UNIT, library, problems
from tools.prepare import prepare

BYTE = load_tokenizer("byte")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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

    taken = curriculum.end - curriculum.first
    assert (taken >= 0).all() and (taken.sum(1) == curriculum.rows).all()
    quotas = np.cumsum(shares * np.diff(tokens)[:, None], axis=0)
    assert (abs((taken * T[:, None]).cumsum(0) - quotas) < T[:, None]).all()


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

def test_an_order_is_a_permutation_that_depends_on_its_key():
    for n in (*range(1, 71), 255, 256, 257, 4097, 100_003):
        orders = [random_order(n, "key", k) for k in range(3)]
        assert all((np.sort(order) == np.arange(n)).all() for order in orders)
        assert n < 20 or len({order.tobytes() for order in orders}) == 3
        assert (random_order(n, "key", 0) == orders[0]).all()


class MemoryDomain:
    """A domain whose tokens are all different, in units of odd sizes, in one or several pieces."""

    def __init__(self, name, seed, unit_sizes):
        rng = np.random.default_rng(seed)
        self.name = name
        self.source = name
        self.num_units = len(unit_sizes)
        self.records = {}
        self.ids = {}
        begin = 0
        for unit, size in enumerate(unit_sizes):
            cuts = sorted(rng.integers(0, size + 1, rng.integers(0, 3)).tolist())
            for piece, (a, b) in enumerate(zip([0, *cuts], [*cuts, size])):
                self.ids[unit, piece] = np.arange(begin + a, begin + b, dtype="<u4")
                self.records[unit, piece] = {"tokens": b - a, "last": piece == len(cuts),
                                             "sha256": f"{name}{unit}{piece}"}
            begin += size
        self.tokens = begin

    def has(self, unit, piece):
        return (unit, piece) in self.records

    def read(self, unit, piece, start, count):
        return self.ids[unit, piece][start:start + count]

    def refresh(self):
        pass


def tape_of(domain, seed, length):
    """The first tokens of a domain's tape, by its definition."""
    tape = []
    epoch = 0
    while len(tape) < length:
        for unit in random_order(domain.num_units, seed, "units", domain.name, epoch):
            for (u, _), ids in domain.ids.items():
                if u == unit:
                    tape += ids.tolist()
        epoch += 1
    return tape


def random_run(seed, window):
    """A curriculum with random ramps of length, batch and shares, and domains to read."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"][:rng.integers(1, 4)]
    lengths = sorted(rng.integers(3, 40, 3).tolist())
    places = [0, *sorted(rng.choice(np.arange(1, 8000), 2, replace=False).tolist())]
    batch = [[0, 40 * int(rng.integers(1, 6))], [3000, 40 * int(rng.integers(1, 12))]]
    shares = [dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist())) for _ in range(2)]
    domains = {name: (f"{name}.txt", shares[0][name], shares[1][name]) for name in names}
    curriculum = Curriculum(domains, batch_tokens=batch, max_tokens=12_000,
                            seq_len=[[place, T] for place, T in zip(places, lengths)])
    texts = {name: MemoryDomain(name, seed, rng.integers(0, 900, rng.integers(1, 9)).tolist() + [7])
             for name in names}
    return curriculum, texts


@pytest.mark.parametrize("seed", range(30))
def test_every_token_of_a_tape_is_read_once_whatever_the_ramps(monkeypatch, seed):
    monkeypatch.setattr(data, "WINDOW_TOKENS", [50, 300, 5000][seed % 3])
    curriculum, domains = random_run(seed, 300)
    dataset = TokenDataset(curriculum, domains, seed)
    tapes = {name: tape_of(domain, seed, 30_000) for name, domain in domains.items()}
    read = {name: [] for name in domains}
    for step in range(curriculum.steps):
        batch = dataset.batch(step)
        T = curriculum.seq_len[step]
        rows = dataset.batch_rows(step)
        assert batch.shape == (curriculum.rows[step], T + 1) and batch.dtype == np.int64
        for row, (name, start) in zip(batch.tolist(), rows):
            assert row == tapes[name][start:start + T + 1]
            read[name] += range(start, start + T)

        is_end = step + 1 < curriculum.steps and curriculum.seq_len[step + 1] != T
        if is_end:
            # Up to here the tape was read without a gap.
            for name, places in read.items():
                assert sorted(places) == list(range(len(places)))
    T = curriculum.seq_len[-1]
    for name, places in read.items():
        assert len(set(places)) == len(places)
        window = min(data.WINDOW_TOKENS, domains[name].tokens)
        assert max(places, default=0) < len(places) + window + T
        # So each token of a small domain comes as often as any other, also if its text is shorter
        # than a window. (A sequence may reach into the next epoch, before this one is all read.)
        often = Counter(tapes[name][place] for place in places)
        counts = [often[token] for token in range(domains[name].tokens)]
        assert max(counts) - min(counts) <= 1 + math.ceil(2 * T / domains[name].tokens)

    # One rank or several, from the beginning or resumed.
    resumed = TokenDataset(curriculum, domains, seed)
    for step in (curriculum.steps - 1, curriculum.steps // 2, 0):
        whole = dataset.batch(step)
        for world in (2, 3, 8):
            merged = np.zeros_like(whole)
            for rank in range(world):
                merged[rank::world] = resumed.batch(step, rank, world)
            assert (merged == whole).all()


def test_every_epoch_has_all_units_in_an_order_of_its_own():
    orders = []
    for seed in (1, 2):
        tape = Tape(MemoryDomain("a", 0, [5] * 40), seed)
        orders += [tuple(tape.unit_at(40 * epoch + k) for k in range(40)) for epoch in range(3)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({*orders, tuple(range(40))}) == 7


def test_the_rows_of_the_domains_are_mixed_in_a_batch():
    curriculum, domains = random_run(3, 300)
    assert len(domains) > 1
    dataset = TokenDataset(curriculum, domains, 3)
    names = [[name for name, _ in dataset.batch_rows(step)] for step in range(curriculum.steps)]
    assert sum(order == sorted(order) for order in names) < curriculum.steps / 2


@pytest.mark.parametrize("change, rises", [(30, 4000), (63, 4000), (80, 4000), (30, 2500)])
def test_a_plan_that_is_prolonged_keeps_what_was_read(change, rises):
    """The old plan has seq_len rise at step 63. The new one may have it rise earlier."""
    domains = {"a": ("a.txt", 0.9, 0.2), "b": ("b.txt", 0.1, 0.8)}
    options = {"batch_tokens": 64, "seq_len": [[0, 8], [4000, 16]]}
    short = Curriculum(domains, max_steps=100, **options)
    options["seq_len"] = [[0, 8], [rises, 16]]
    longer = ContinuedCurriculum(domains, max_steps=300, before=(short, change), **options)
    again = ContinuedCurriculum(domains, max_steps=400, before=(longer, 200), **options)
    texts = {name: MemoryDomain(name, 1, [999] * 40) for name in domains}
    datasets = [TokenDataset(c, texts, 1) for c in (short, longer, again)]
    for step in range(200):
        batches = [d.batch(step).tolist() for d in datasets[step >= change:]]
        assert all(batch == batches[0] for batch in batches)

    # Something is passed over only where seq_len rises within the window in which the plan changes.
    assert bool(longer.passed_over()) == (change == 30) and not again.passed_over()

    # The shares go on to the new end, and no domain strays from its quota.
    assert again.steps == 400 and again.shares[-1, 0] < 0.21
    T = np.array(again.seq_len)[:, None]
    assert (abs((again.taken * T).cumsum(0) - again.quota_added.cumsum(0)) < T).all()
    read = {name: [] for name in domains}
    for step in range(400):
        for name, start in datasets[2].batch_rows(step):
            read[name] += range(start, start + again.seq_len[step])
    for name, places in read.items():
        assert len(places) == len(set(places))


@pytest.mark.parametrize("seed", range(30))
def test_changes_of_plan_in_a_row_read_nothing_twice_and_lose_no_more_than_is_told(monkeypatch,
                                                                                   seed):
    """Up to five plans, most of which change within one window, of 100 sequences."""
    window = 800
    monkeypatch.setattr(data, "WINDOW_TOKENS", window)
    rng = np.random.default_rng(seed)
    first, last = rng.uniform(0.1, 0.9, 2).tolist()
    domains = {"a": ("a.txt", first, last), "b": ("b.txt", 1 - first, 1 - last)}
    texts = {name: MemoryDomain(name, seed, [20_000]) for name in domains}
    changes = (4 + rng.integers(1, 30, rng.integers(1, 5)).cumsum()).tolist()
    curriculum = None
    told = Counter()                # tokens that are passed over
    followed = []                   # the rows of each step, under the plan of its time
    for end in [*changes, None]:
        lengths = [[0, 8], [int(rng.choice([400, 800, 1200, 1600, 3000, 6000])), 16]]
        plan = {"batch_tokens": 64, "seq_len": lengths,
                "max_steps": (end or len(followed)) + 1 + int(rng.integers(100))}
        if curriculum is None:
            curriculum = Curriculum(domains, **plan)
        else:
            before = (curriculum, len(followed))
            curriculum = ContinuedCurriculum(domains, before=before, **plan)
            told.update(curriculum.passed_over())
        dataset = TokenDataset(curriculum, texts, 1)
        for step in range(len(followed), end or curriculum.steps):
            dataset.prefetcher.wait_for(step)
            followed.append(sorted(dataset.batch_rows(step)))

    # The last plan tells of every step what was read.
    assert [sorted(dataset.batch_rows(step)) for step in range(curriculum.steps)] == followed
    read = {name: [] for name in domains}
    for step, rows in enumerate(followed):
        for name, start in rows:
            read[name] += range(start, start + curriculum.seq_len[step])
    for name, places in read.items():
        assert len(places) == len(set(places))
        # What is not read was passed over, or is not read yet.
        assert max(places) + 1 - len(places) <= told[name] + window


def test_domains_in_another_order_keep_what_was_read_and_their_quotas():
    domains = {name: (f"{name}.txt", 1 / 3, 1 / 3) for name in "abc"}
    turned = dict(reversed(domains.items()))
    old = Curriculum(domains, batch_tokens=17 * 8, seq_len=8, max_steps=40)
    new = ContinuedCurriculum(turned, batch_tokens=17 * 8, seq_len=8, max_steps=40,
                              before=(old, 10))
    assert (new.taken[:10] == old.taken[:10, ::-1]).all()
    assert (abs((new.taken * 8).cumsum(0) - new.quota_added.cumsum(0)) < 8).all()


def test_a_prolonged_run_may_drop_and_add_domains():
    three = {name: (f"{name}.txt", 1 / 3, 1 / 3) for name in "abc"}
    for step in range(1, 30):
        old = Curriculum(three, batch_tokens=17 * 8, seq_len=8, max_steps=40)
        two = {"a": ("a.txt", 0.48, 0.48), "d": ("d.txt", 0.52, 0.52)}
        new = ContinuedCurriculum(two, batch_tokens=17 * 8, seq_len=8, max_steps=80,
                                  before=(old, step))
        assert (new.taken[step:].sum(1) == 17).all()
        assert (new.taken[:step, 0] == old.taken[:step, 0]).all() and not new.taken[:step, 1].any()
        # Prolonged again, it goes on from the quotas that it had.
        third = ContinuedCurriculum(two, batch_tokens=17 * 8, seq_len=8, max_steps=99,
                                    before=(new, step + 3))
        assert (third.taken[:step + 3] == new.taken[:step + 3]).all()
        lag = third.quotas - (third.taken * 8).cumsum(0)
        assert (abs(lag[step:]) < 8).all() and (third.taken[step:].sum(1) == 17).all()
    ContinuedCurriculum(two, batch_tokens=8, seq_len=8, max_steps=9, before=(old, 0))


def test_a_run_that_has_dropped_domains_can_be_prolonged_twice():
    shares = {"a": .378, "b": .256, "c": .069, "d": .102, "e": .016, "f": .155, "g": .024}
    options = {"batch_tokens": 30, "seq_len": 10, "max_steps": 40}
    seven = Curriculum({name: ("x.txt", share, share) for name, share in shares.items()}, **options)
    kept = {"a": ("x.txt", 0.37, 0.37), "b": ("x.txt", 0.63, 0.63)}
    two = ContinuedCurriculum(kept, before=(seven, 1), **options)
    again = ContinuedCurriculum(kept, before=(two, 4), **options)
    assert (again.taken == two.taken).all()


# ---- preparing


@pytest.fixture
def small(monkeypatch):
    """Two domains of several units in several pieces, and what reads them."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 4000)
    monkeypatch.setattr(preparing, "PIECE_TOKENS", 1500)
    monkeypatch.setattr(data, "PIECE_TOKENS", 1500)
    monkeypatch.setattr(data, "WINDOW_TOKENS", 400)
    write_jsonl("a.jsonl", texts(300, 1))
    write_jsonl("b.jsonl", texts(60, 2))


DOMAINS = {"a": ("a.jsonl", 0.7, 0.2), "b": ("b.jsonl", 0.3, 0.8)}
PLAN = Curriculum(DOMAINS, batch_tokens=[[0, 100], [4000, 300]], seq_len=[[0, 20], [9000, 32]],
                  max_steps=90)


@contextmanager
def open_dataset(folder, workers=2, curriculum=PLAN, **options):
    domains = {name: Domain(name, DOMAINS[name][0], BYTE, folder) for name in curriculum.names}
    preparer = Preparer(workers) if workers else None
    try:
        yield TokenDataset(curriculum, domains, 1, preparer, **options)
    finally:
        if preparer:
            preparer.close()


def files(folder):
    paths = Path(folder).rglob("*.bin")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_equal_where_both(files, others):
    """Pieces are the same whoever makes them. One or another may have been made ahead of need."""
    both = files.keys() & others.keys()
    assert len(both) > 1 and all(files[name] == others[name] for name in both)


@pytest.fixture
def whole(small):
    """All batches, and the files of a folder in which everything is prepared."""
    with open_dataset("whole") as dataset:
        prepare(dataset)
        batches = [dataset.batch(step).tolist() for step in range(PLAN.steps)]
    return batches, files("whole")


def test_preparing_ahead_behind_killed_or_in_parts_gives_the_same_batches(whole, capsys):
    batches, everything = whole
    with open_dataset("ahead") as dataset:
        for step in range(PLAN.steps):
            assert dataset.batch(step).tolist() == batches[step]
            # A process is killed while it works or waits: another one takes over.
            if step in (3, 20, 21) and dataset.prefetcher.preparer.workers:
                dataset.prefetcher.preparer.workers[0].process.kill()
    assert_equal_where_both(files("ahead"), everything)

    # The run is killed, again and again, and each time it goes on from where it was.
    for begin in (0, 30, 60):
        with open_dataset("killed", workers=1) as dataset:
            for step in range(begin, begin + 30):
                assert dataset.batch(step).tolist() == batches[step]
    assert_equal_where_both(files("killed"), everything)

    # Two machines share a folder and prepare a part each.
    for part in (1, 0):
        with open_dataset("parts") as dataset:
            dataset.prefetcher.preparer.manifest = f"manifest-{part + 1}-of-2.jsonl"
            prepare(dataset, (part, 2))
    with open_dataset("parts", workers=0) as dataset:
        assert [dataset.batch(step).tolist() for step in range(PLAN.steps)] == batches


def test_what_another_run_has_made_meanwhile_is_not_made_again(whole):
    batches, _ = whole
    with open_dataset("shared", workers=1) as dataset:
        dataset.batch(0)
        with open_dataset("shared") as other:
            prepare(other)
        preparer = dataset.prefetcher.preparer
        while preparer.num_busy():
            preparer.collect(0.1)
        for d, name in enumerate(PLAN.names):
            _, end = dataset.tape_span(PLAN.steps - 1, d)
            tape = dataset.tapes[name]
            preparer.request(dataset.domains[name], end - len(tape), tape.units_to_come())
        assert preparer.num_busy() == 0
        assert [dataset.batch(step).tolist() for step in range(PLAN.steps)] == batches


def test_no_more_is_prepared_than_a_little_ahead(small):
    with open_dataset("d", workers=1) as dataset:
        dataset.batch(0)
        dataset.prefetcher.preparer.collect(1)
        made = sum(dataset.domains["a"].unit_tokens.values())
        assert 0 < made <= 4 * 1700 and len(dataset.tapes["a"]) >= 400


def test_what_was_read_can_be_deleted_and_is_made_again_when_it_is_needed(whole):
    batches, everything = whole
    with open_dataset("d", keep_read=1) as dataset:
        most = 0
        for step in range(PLAN.steps):
            assert dataset.batch(step).tolist() == batches[step]
            most = max(most, len(files("d")))
        assert len(files("d")) < most < len(everything)
    with open_dataset("d", keep_read=1) as dataset:
        for step in (0, 40, PLAN.steps - 1):
            assert dataset.batch(step).tolist() == batches[step]
    assert_equal_where_both(files("d"), everything)


def test_a_long_unit_is_made_once_while_it_is_deleted_behind_the_run(small, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 10**6)
    plan = Curriculum({"a": DOMAINS["a"]}, batch_tokens=100, seq_len=20, max_steps=150,
                      mixture=[[0, {"a": 1}]])
    made = []
    monkeypatch.setattr(Domain, "write", lambda self, line, manifest, real=Domain.write:
                        made.append((line.get("unit"), line.get("piece"))) or
                        real(self, line, manifest))
    with open_dataset("d", workers=1, curriculum=plan, keep_read=1) as dataset:
        for step in range(plan.steps):
            dataset.batch(step)
        assert len(dataset.prefetcher.preparer.workers) == 1
        assert len(set(made)) == len(made) > 9 and len(files("d")) < 6

    # A run that resumes makes nothing again that it has read.
    made.clear()
    with open_dataset("d", workers=1, curriculum=plan, keep_read=1) as dataset:
        dataset.batch(100)
        again = [piece for _, piece in made if piece is not None]
        begin, _ = dataset.tape_span(100, 0)
        assert all(dataset.tapes["a"].ends[piece] > begin > 0 for piece in again)


def test_no_process_waits_that_nobody_needs(small):
    with open_dataset("d", workers=1) as dataset:
        for name in dataset.domains:
            dataset.validation(name, 500, 20)
        assert len(dataset.prefetcher.preparer.workers) <= 1
        for step in range(PLAN.steps):
            dataset.batch(step)
            assert dataset.prefetcher.preparer.num_busy() <= 1
            assert len(dataset.prefetcher.preparer.workers) <= 1 + len(dataset.domains)


def test_held_out_and_training_documents_are_together_all_and_apart(small):
    plan = Curriculum({"a": DOMAINS["a"]}, batch_tokens=100, seq_len=20, max_steps=400,
                      mixture=[[0, {"a": 1}]])
    with open_dataset("d", curriculum=plan) as dataset:
        prepare(dataset)
        domain = dataset.domains["a"]
        kept = Counter()
        held_out = Counter()
        for unit in range(domain.num_units):
            piece = 0
            while (unit, piece) in domain.records:
                record = domain.records[unit, piece]
                ids = domain.read(unit, piece, 0, record["tokens"]).tolist()
                kept.update(BYTE.decode(ids).split(END)[:-1])
                piece += 1
            if unit < preparing.VAL_UNITS:
                held_out.update(BYTE.decode(domain.read_held_out(unit).tolist()).split(END)[:-1])
    assert kept + held_out == Counter(BEGIN + text for text in texts(300, 1))
    assert not kept & held_out and 1 <= len(held_out) < 40


def test_validation_is_spread_over_what_is_held_out(small, monkeypatch):
    monkeypatch.setattr(data, "VAL_DOCUMENTS", 2)
    with open_dataset("d") as dataset:
        domain = dataset.domains["a"]
        few = dataset.validation("a", 40, 20)
        units = max(unit for unit, _ in domain.records) + 1
        held_out = np.concatenate([domain.read_held_out(unit) for unit in range(units)])
        assert len(np.flatnonzero(held_out == BYTE.special[BEGIN])) >= data.VAL_DOCUMENTS
        there = (len(held_out) - 1) // 20
        assert (few[0] == held_out[:21]).all()
        assert (few[1] == held_out[there // 2 * 20:there // 2 * 20 + 21]).all()
        refused(lambda: dataset.validation("a", 10**6, 10**5), "'a'", "seq_len")


def test_damage_is_named_and_made_good(whole):
    batches, everything = whole
    with open_dataset("whole", workers=0) as dataset:
        dataset.batch(0)
        path = dataset.domains["a"].path(*dataset.tapes["a"].pieces[0])
        good = path.read_bytes()
        assert [domain.verify() for domain in dataset.domains.values()] == [[], []]
        path.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
        assert dataset.domains["a"].verify() == [path]
    path.write_bytes(good[:-2])
    with open_dataset("whole", workers=0) as dataset:
        refused(lambda: [dataset.batch(step) for step in range(PLAN.steps)], str(path))
    path.unlink()
    held_out = next(Path("whole").rglob("*held-out.bin"))
    held_out.unlink()
    with open_dataset("whole") as dataset:
        dataset.validation("a", 40, 20)
        dataset.validation("b", 40, 20)
        assert held_out.exists()
        assert [dataset.batch(step).tolist() for step in range(PLAN.steps)] == batches
    assert_equal_where_both(files("whole"), everything)

    # A line of the manifest that was cut is a piece that is not there.
    manifest = path.parent / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with open_dataset("whole") as dataset:
        assert [dataset.batch(step).tolist() for step in range(PLAN.steps)] == batches


def test_held_out_data_that_changed_and_lines_of_another_form_are_told(whole):
    held_out = next(Path("whole").glob("a-*/*held-out.bin"))
    good = held_out.read_bytes()
    manifest = held_out.parent / "manifest.jsonl"
    with open_dataset("whole", workers=0) as dataset:
        before = dataset.fingerprint()
    with open(manifest, "a") as file:
        file.write('{"units": 1e9}\n[1]\n{"unit": 0, "piece": 0}\n' + "[" * 100_000 + "\n")
    with open_dataset("whole", workers=0) as dataset:
        assert dataset.fingerprint() == before
        dataset.domains["a"].records[0, 0]["held_out_sha256"] = "of another text"
        assert dataset.fingerprint() != before
    held_out.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with open_dataset("whole", workers=0) as dataset:
        refused(lambda: dataset.validation("a", 40, 20), str(held_out), "damaged")


def test_ids_that_no_token_has_are_damage(whole):
    with open_dataset("whole", workers=0) as dataset:
        dataset.batch(0)
        path = dataset.domains["a"].path(*dataset.tapes["a"].pieces[0])
        path.write_bytes(b"\xff" * path.stat().st_size)
    with open_dataset("whole", workers=0) as dataset:
        refused(lambda: [dataset.batch(step) for step in range(PLAN.steps)], str(path), "damaged")


def test_another_file_column_or_tokenizer_has_another_folder():
    def folder(source="s.jsonl", tokenizer=BYTE):
        return Domain("s", source, tokenizer, "d").folder

    write_jsonl("s.jsonl", texts(5))
    lines = [f"{base64.b64encode(bytes([i])).decode()} {255 - i}\n" for i in range(256)]
    Path("t.tiktoken").write_text("".join(lines))
    seen = {folder(), folder(), folder("s.jsonl?text=id"),
            folder(tokenizer=load_tokenizer("t.tiktoken"))}
    write_jsonl("s.jsonl", texts(6))
    assert len(seen) == 3 and folder() not in seen


def test_ids_of_four_bytes_are_kept():
    tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(2, "big") for i in range(2**16)]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    Path("large.tiktoken").write_text("".join(lines))
    tokenizer = load_tokenizer("large.tiktoken")
    write_jsonl("a.jsonl", texts(40, 1))
    domain = Domain("a", "a.jsonl", tokenizer, "d")
    dataset = TokenDataset(Curriculum({"a": ("a.jsonl", 1, 1)}, batch_tokens=900, seq_len=9,
                                      max_steps=1), {"a": domain}, 1, Preparer(1))
    batch = dataset.batch(0)
    dataset.prefetcher.preparer.close()
    assert domain.dtype.itemsize == 4 and batch.max() > 2**16


def run_out_of_space(call):
    """Call with a limit on the size of files, which processes inherit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(whole):
    batches, everything = whole
    with open_dataset("full", workers=1) as dataset:
        refused(lambda: run_out_of_space(lambda: dataset.batch(0)), "a", "large")
    assert not list(Path("full").rglob("*.tmp"))
    with open_dataset("full") as dataset:
        assert dataset.batch(0).tolist() == batches[0]


def test_a_process_that_is_always_killed_is_one_line(small, monkeypatch):
    monkeypatch.setattr(preparing.Worker, "_send", lambda worker, line: worker.process.kill())
    with open_dataset("d", workers=1) as dataset:
        refused(lambda: dataset.batch(0), "killed", "--workers")


def test_a_bad_source_is_one_line(small):
    Path("a.jsonl").write_text('{"text": "good"}\n' * 9 + "{'text': 1}\n" * 200)
    with open_dataset("d", workers=1) as dataset:
        refused(lambda: dataset.batch(0), "a.jsonl")
    Path("a.jsonl").write_text('{"text": " "}\n' * 9)
    with open_dataset("d", workers=1) as dataset:
        refused(lambda: dataset.batch(0), "'a'", "documents")
    Path("d").rename("e")
    Path("d").touch()
    with open_dataset("d", workers=1) as dataset:
        refused(lambda: dataset.batch(0), "d/a-")


def test_a_source_that_changes_under_way_is_one_line(small):
    with open_dataset("d", workers=1) as dataset:
        write_jsonl("a.jsonl", texts(299, 1))
        refused(lambda: dataset.batch(0), "a.jsonl", "changed")


def test_a_source_that_changes_while_a_unit_is_made_is_one_line(monkeypatch):
    """The second piece would have begun with text of the old file."""
    write_jsonl("a.jsonl", texts(20))
    monkeypatch.setattr(preparing, "wait_for_permit", lambda: None)
    Path("d").mkdir()
    job = {"source": "a.jsonl", "identity": sources.source_identity("a.jsonl"),
           "tokenizer": "byte", "dtype": "<u2", "folder": "d", "unit": 0, "piece": 0,
           "documents": 0, "piece_tokens": 50, "unit_bytes": 2**20}
    pieces = preparing.make_unit(job)
    assert not next(pieces)["last"]
    write_jsonl("a.jsonl", texts(20, 1))
    refused(lambda: next(pieces), "a.jsonl", "changed")
    assert len(list(Path("d").glob("*-*.bin"))) == 2        # the first piece, and what it holds out


def test_a_piece_that_comes_out_otherwise_than_before_is_refused_at_each_start(small):
    with open_dataset("d", workers=1) as dataset:
        dataset.batch(0)
        path = dataset.domains["a"].path(*dataset.tapes["a"].pieces[0])
    manifest = path.parent / "manifest.jsonl"
    manifest.write_text(re.sub('"sha256": "[^"]*"', '"sha256": "other"', manifest.read_text()))
    path.unlink()
    for _ in range(2):
        with open_dataset("d", workers=1) as dataset:
            refused(lambda: dataset.batch(0), "a.jsonl", "another text than it did")
        assert not path.exists()


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
