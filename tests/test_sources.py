"""Sources: their documents come once and in order, whatever the connection to the Hub does; bad
rows are left out and told."""
import bz2
import gzip
import json
import lzma
import pickle
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from documents import refused, texts, write_jsonl
from support import sources
from support.sources import SkippedRows, pin_source, source_identity, source_units


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(source):
    return [document for unit in source_units(source) for document in unit()]


# ---- local files

def test_all_kinds_of_files_give_the_same_documents():
    written = [*texts(40), "é\u2028\x0c\x85\r", "two\n\nparagraphs", "", " "]
    write_jsonl("a.jsonl", written)
    pyarrow.parquet.write_table(pyarrow.table({"text": [*written, None]}), "a.parquet")
    assert read("a.parquet") == [*written, ""]

    text = "".join(f"{t}\n\n" for t in texts(300))
    Path("a.txt").write_text(text)
    assert read("a.txt") == [text]

    for end, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        for name, documents in (("a.jsonl", written), ("a.txt", [text])):
            Path(name + end).write_bytes(module.compress(Path(name).read_bytes()))
            assert read(name + end) == documents


def test_a_text_file_is_a_document_unless_it_is_long():
    paragraph = "word " * 200 + "\nnext line\n\n"
    for i in range(3):
        Path(f"{i}.txt").write_text(f"{i}\n" + paragraph * 60)  # fewer than 64 Ki characters
    assert read("[0-2].txt") == [f"{i}\n" + paragraph * 60 for i in range(3)]

    Path("long.txt").write_text("ä" * 100 + "\n" + paragraph * 200)
    documents = read("long.txt")
    assert "".join(documents) == Path("long.txt").read_text() and len(documents) == 4
    for document in documents[:-1]:
        assert document.endswith("\n\n") and len(document) >= 2**16 > len(document) - 1100

    # Without blank lines, a document ends with a line. Without lines, it ends anywhere.
    Path("lines.txt").write_text("a line\n" * 200_000)
    documents = read("lines.txt")
    assert "".join(documents) == Path("lines.txt").read_text()
    assert [document[-5:] for document in documents] == ["line\n"] * 2
    assert 2**20 - 7 < len(documents[0]) <= 2**20
    Path("line.txt").write_text("title\n" + "é" * (2**21 + 1))
    assert [len(document) for document in read("line.txt")] == [6, 2**20, 2**20, 1]


@pytest.mark.parametrize("value, kind", [(7, "int"), (["a"], "list"), ({}, "dict")])
def test_a_column_that_is_no_text_is_named_with_its_type(value, kind):
    refused(lambda: sources.get_text(["text"], {"text": value}), "column text", kind)


def test_a_document_may_be_several_columns():
    Path("b.jsonl").write_text('{"question": "q", "answer": "\\ud800"}\n'
                               '{"question": null, "answer": ""}')
    assert read("b.jsonl?text=question,answer") == ["q\n\n\ud800", "\n\n"]


@pytest.mark.parametrize("name", ["x[1].jsonl", "x?y.jsonl", "x*.jsonl"])
def test_a_file_may_have_any_name(name):
    write_jsonl(name, texts(3))
    write_jsonl("x1.jsonl", texts(3, 1))
    assert read(name) == texts(3)


@pytest.mark.parametrize("size", [1, 64, 1000, 10**6])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_cutting_loses_and_repeats_no_line(monkeypatch, size, end):
    monkeypatch.setattr(sources, "UNIT_BYTES", size)
    written = [*texts(9), "é" * 999, *texts(9, 1)]
    lines = [json.dumps({"text": t}) + end for t in written]
    Path("a.jsonl").write_bytes(b"")
    Path("b.jsonl").write_bytes(("\ufeff" + "".join(lines[:15])).encode())
    Path("c.jsonl").write_bytes("".join(lines[15:]).rstrip().encode())
    assert [document for document in read("[a-c].jsonl") if document] == written

    sizes = [sum(end - start for _, start, end in unit.args[0]) for unit in source_units("*.jsonl")]
    total = sum(Path(name).stat().st_size for name in ("b.jsonl", "c.jsonl"))
    assert sum(sizes) == total and min(sizes) >= min(size, total)
    Path("t.txt").write_bytes(("\ufeff" + end.join(written)).encode())
    assert "".join(read("t.txt")) == end.join(written)


def test_a_source_has_an_identity(monkeypatch):
    write_jsonl("a.jsonl", texts(5))
    first = source_identity("a.jsonl")
    assert source_identity("a.jsonl") == first != source_identity("a.jsonl?text=id")
    write_jsonl("a.jsonl", texts(6))
    assert source_identity("a.jsonl") != first
    code = source_identity("builtin:code")
    monkeypatch.setattr(sys, "version", "another")
    assert source_identity("builtin:code") != code


# ---- bad sources and bad rows

GOOD = b'{"text": "' + b"x" * 14 + b'"}\n'
BAD_FILES = {
    "quotes.jsonl": b"{'text': 1}\n", "late.jsonl": GOOD * 99 + b"{\n" * 12,
    "list.jsonl": b"[1]\n", "number.jsonl": b'{"text": 1}\n', "latin.txt": b"sch\xf6n\n",
    "blank.jsonl": b'{"body": "x"}\n\n' * 3, "wide.txt": "Übung\n".encode("utf-16") * 99,
    "cut.jsonl.gz": gzip.compress(GOOD * 99)[:40], "false.txt.xz": GOOD, "false.parquet": GOOD}


@pytest.mark.parametrize("source", [
    *BAD_FILES, "none/*.jsonl", "folder", "", "good.jsonl?text=body", "builtin:news",
    "builtin:math?text=x", "good.jsonl?name=x", "good.jsonl?text=", "a/b?x",
    "good.parquet?text=body", "folder/none.csv", "books/part?.jsonl"])
def test_a_bad_source_is_one_line(source):
    Path("folder").mkdir()
    write_jsonl("good.jsonl", texts(200))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), "good.parquet")
    if source in BAD_FILES:
        Path(source).write_bytes(BAD_FILES[source])
    refused(lambda: read(source), source.partition("?")[0])


def read_counting(source):
    """The documents of a source of one unit, and the rows that it leaves out."""
    unit, = source_units(source)
    skipped = SkippedRows()
    return list(unit(skipped)), skipped


def test_bad_rows_are_left_out_and_counted():
    bad = [b"{'text': 1}\n", b'{"text": 1}\n', b'{"text": 2}\n', b'{"text": "\xf6"}\n', b"[]\n"]
    Path("a.jsonl").write_bytes(GOOD * 9 + bad[0] + GOOD + b"".join(bad[1:]) + GOOD * 3)
    documents, skipped = read_counting("a.jsonl")
    assert documents == ["x" * 14] * 13
    assert (skipped.rows, sorted(skipped.reasons.values())) == (18, [1, 1, 1, 2])
    assert f"a.jsonl: byte {9 * len(GOOD)}" in skipped.first_place.values()
    assert "5 of 18" in skipped.report() and "\n" not in skipped.report()
    assert pickle.loads(pickle.dumps(skipped)).report() == skipped.report()

    Path("a.txt").write_bytes(b"good\nsch\xf6n\nbetter\n")
    documents, skipped = read_counting("a.txt")
    assert documents == ["good\nbetter\n"] and skipped.reasons.total() == 1

    rows = pyarrow.array([b"one", b"\xff", None, b"two"])
    rows = pyarrow.StringArray.from_buffers(4, *rows.buffers()[1:], rows.buffers()[0], 1)
    unread = pyarrow.array([[i] for i in range(4)])
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "unread": unread}), "a.parquet")
    documents, skipped = read_counting("a.parquet")
    assert documents == ["one", "", "two"] and skipped.first_place.popitem()[1].endswith("row 1")


@pytest.mark.parametrize("good, bad, is_refused", [
    (1, 10, False), (1, 11, True), (0, 1, True), (999, 111, False), (999, 112, True)])
def test_too_many_bad_rows_end_a_unit(good, bad, is_refused):
    Path("a.jsonl").write_bytes(GOOD * good + b"?" * 9 + b"\n" + b"{}\n" * (bad - 1))
    if is_refused:
        refused(lambda: read("a.jsonl"), "a.jsonl", "no column" if bad > 1 else "JSON")
    else:
        assert len(read("a.jsonl")) == good


def test_blank_lines_are_no_good_rows():
    Path("a.txt").write_bytes(b"caf\xe9\n\n" * 5)
    refused(lambda: read("a.txt"), "no good row")


# ---- the Hub

COMMIT = "0123456789" * 4
NO_NETWORK = ConnectionError("no route to host")


class Hub:
    """Stands in for the Hub and for `datasets`: owner/name has three files of 20 rows. errors
    holds what goes wrong: ("commit", attempt), ("open", attempt) or (file, row, attempt) -> an
    exception. attempt counts how often the same was tried before."""

    def __init__(self, monkeypatch):
        self.rows = [[{"id": r, "text": f"{f}-{r}"} for r in range(20)] for f in range(3)]
        self.errors = {}
        self.tried = {}
        self.asked = []
        self.waited = []
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.dataset_info)
        monkeypatch.setattr(sources, "sleep", self.waited.append)

    def attempt(self, *what):
        number = self.tried.get(what, 0)
        self.tried[what] = number + 1
        error = self.errors.get((*what, number), self.errors.get((*what, "always")))
        if error:
            raise error

    def dataset_info(self, name, revision, timeout):
        self.attempt("commit")
        self.asked.append(revision)
        return huggingface_hub.DatasetInfo(id=name, sha=revision if revision == COMMIT else COMMIT)

    def load_dataset(self, name, config, *, split, revision, streaming, columns=None):
        assert (name, split, revision, streaming) == ("owner/name", "train", COMMIT, True)
        self.attempt("open")
        return Stream(self, range(3), 0, columns)


class Stream:
    """Stands in for datasets.IterableDataset: rows from number `start` on of some files."""
    n_shards = 3
    column_names = ["id", "text"]

    def __init__(self, hub, files, start, columns):
        self.hub = hub
        self.files = files
        self.start = start
        self.columns = columns

    def shard(self, files, i):
        assert files == 3
        return Stream(self.hub, [i], self.start, self.columns)

    def skip(self, n):
        return Stream(self.hub, self.files, n, self.columns)

    def __iter__(self):
        for f in self.files:
            for r, row in enumerate(self.hub.rows[f]):
                if r >= self.start:
                    self.hub.attempt(f, r)
                    yield {key: row[key] for key in self.columns or row}


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


EVERY_TEXT = [f"{f}-{r}" for f in range(3) for r in range(20)]


def test_options_stay_as_they_are_when_a_source_is_pinned(hub):
    pinned = sources.pin_source("owner/name?text=my column,c++&name=a%26b")
    options = {"text": "my column,c++", "name": "a&b", "revision": COMMIT}
    assert sources.parse_source(pinned) == ("hub", "owner/name", options)


def test_a_broken_stream_goes_on_at_its_place(hub, capsys):
    hub.errors = {(0, 0, 0): NO_NETWORK, (1, 7, 0): NO_NETWORK, (1, 7, 1): TimeoutError(),
                  (1, 8, 0): OSError("reset"), ("open", 2): NO_NETWORK, ("commit", 0): NO_NETWORK,
                  ("commit", 1): TimeoutError(), **{(2, 19, i): NO_NETWORK for i in range(4)}}
    assert read("owner/name") == EVERY_TEXT
    assert hub.waited == [1, 2, 1, 2, 1, 2, 1, 1, 2, 4, 8]
    assert capsys.readouterr().err.count("\n") == 9


def test_a_connection_that_stays_broken_is_one_line(hub):
    hub.errors = {(1, 7, "always"): NO_NETWORK}
    unit = source_units("owner/name")[1]()
    assert [next(unit) for _ in range(7)] == EVERY_TEXT[20:27]
    refused(lambda: next(unit), "owner/name: file 1, row 6", "no route")
    assert hub.waited == [1, 2, 4, 8]

    hub.errors = {("open", "always"): NO_NETWORK}
    refused(lambda: read("owner/name"), "owner/name")
    hub.errors = {("commit", "always"): NO_NETWORK}
    hub.waited.clear()
    refused(lambda: read("owner/name"), "owner/name")
    assert hub.waited == [1, 2]


class StatusError(OSError):
    def __init__(self, status):
        self.response = type("Response", (), {"status_code": status})


@pytest.mark.parametrize("error, waits", [
    (StatusError(404), []), (StatusError(403), []), (StatusError(429), [1, 2]),
    (StatusError(503), [1, 2]), (ValueError("unknown split"), []), (FileNotFoundError(), [])])
def test_only_what_may_pass_is_tried_again(hub, error, waits):
    hub.errors = {("commit", "always"): error}
    refused(lambda: read("owner/name"), "owner/name")
    assert hub.waited == waits


def test_bad_rows_of_the_hub_are_left_out_and_counted(hub):
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    hub.errors = {(0, 3, "always"): broken, (0, 19, "always"): broken, (0, 9, 0): NO_NETWORK,
                  ("open", 1): LookupError("this is no row's fault")}
    hub.rows[0][5]["text"] = 7
    skipped = SkippedRows()
    documents = list(source_units("owner/name")[0](skipped))
    assert documents == [f"0-{r}" for r in range(20) if r not in (3, 5, 19)]
    assert (skipped.rows, skipped.reasons.total()) == (20, 3)
    assert skipped.first_place["not UTF-8, invalid start byte"] == "owner/name: file 0, row 3"
    assert hub.waited == [1, 1]

    # A fault of the whole file is not taken for one of its rows for ever.
    hub.errors = {(1, r, "always"): ValueError("not a .parquet file") for r in range(20)}
    refused(lambda: list(source_units("owner/name")[1]()), "owner/name", "not a .parquet file")


def test_only_the_named_columns_are_read(hub):
    for row in [*hub.rows[0], *hub.rows[1], *hub.rows[2]]:
        row["id"] = "seven"
    assert read("owner/name?text=text,id") == [f"{text}\n\nseven" for text in EVERY_TEXT]
    del hub.rows[0][0]["id"]  # a column that is not asked for is not missed
    assert read("owner/name") == EVERY_TEXT
    refused(lambda: read("owner/name?text=body"), "owner/name", "body", "id, text")


def test_a_commit_is_asked_for_once(hub):
    file = Path("d/hub_revisions.json")
    pinned = pin_source("owner/name?text=id,text&revision=v1", file)
    assert pinned == f"owner/name?text=id,text&revision={COMMIT}" and hub.asked == ["v1"]
    hub.errors = {("commit", "always"): NO_NETWORK}
    assert pin_source("owner/name?text=id,text&revision=v1", file) == pinned
    assert pin_source(pinned, file) == source_identity(pinned) == pinned
    assert pin_source("x.jsonl", file) == "x.jsonl"
    assert json.loads(file.read_text()) == {"owner/name?text=id,text&revision=v1": COMMIT}
    refused(lambda: pin_source("owner/name", file), "owner/name")
    file.write_text("{")
    refused(lambda: pin_source("owner/name", file), str(file))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_library_itself_gives_the_same(hub, monkeypatch, tmp_path, kind):
    """`datasets` reads a local folder in place of the Hub."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", hub.dataset_info)
    load_dataset = datasets.load_dataset

    def load(name, *args, revision=None, **options):
        return load_dataset(str(tmp_path / "folder"), *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    Path("folder").mkdir()
    for f in range(3):
        if kind == "jsonl":
            write_jsonl(f"folder/train-{f}.jsonl", EVERY_TEXT[20 * f:20 * f + 20])
        else:
            table = pyarrow.table({"text": EVERY_TEXT[20 * f:20 * f + 20], "id": range(20)})
            pyarrow.parquet.write_table(table, f"folder/train-{f}.parquet", row_group_size=7)
    assert read("owner/name") == EVERY_TEXT
    if kind == "parquet":  # of which `datasets` reads the named columns alone
        opened = sources.open_hub("owner/name", {}, ["text"])
        assert list(next(iter(opened))) == ["text"]
    refused(lambda: read("owner/name?text=body"), "owner/name", "body")
