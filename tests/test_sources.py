"""Sources: local files are read whole, once and in order."""
import bz2
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configurator import UserError
from support import sources
from support.sources import source_units


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(33, 127, rng.integers(1, 120)))) for _ in range(n)]


def write_jsonl(path, documents):
    lines = [json.dumps({"id": 1, "text": document}) + "\n" for document in documents]
    Path(path).write_text("".join(lines))


def read(source):
    return [document for unit in source_units(source) for document in unit()]


def refused(call, *words):
    """call() raises a UserError of one line with these words in it."""
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


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


def test_a_document_may_be_several_columns():
    Path("b.jsonl").write_text('{"question": "q", "answer": "\\ud800"}\n'
                               '{"question": null, "answer": ""}')
    assert read("b.jsonl?text=question,answer") == ["q\n\n\ud800", "\n\n"]


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


# ---- bad sources and bad rows

GOOD = b'{"text": "' + b"x" * 14 + b'"}\n'
BAD_FILES = {
    "quotes.jsonl": GOOD + b"{'text': 1}\n", "late.jsonl": GOOD * 9999 + b"\n{\n",
    "list.jsonl": b"[1]\n", "number.jsonl": b'{"text": 1}\n', "latin.txt": b"good\nsch\xf6n\n",
    "cut.jsonl.gz": gzip.compress(GOOD * 99)[:40], "false.txt.xz": GOOD, "false.parquet": GOOD}


@pytest.mark.parametrize("source", [
    *BAD_FILES, "none/*.jsonl", "folder", "", "good.jsonl?text=body", "builtin:news",
    "builtin:math?text=x", "good.jsonl?name=x", "good.jsonl?text=", "a/b?x"])
def test_a_bad_source_is_one_line(source, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 99_000)
    Path("folder").mkdir()
    write_jsonl("good.jsonl", texts(200))
    if source in BAD_FILES:
        Path(source).write_bytes(BAD_FILES[source])
    refused(lambda: read(source), source.partition("?")[0])


def test_the_place_of_a_mistake_is_named():
    Path("late.jsonl").write_bytes(GOOD * 9 + b"{'text': 1}\n")
    refused(lambda: read("late.jsonl"), "late.jsonl", f"byte {9 * len(GOOD)}")
