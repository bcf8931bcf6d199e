"""Sources: where the text of a domain comes from, and how it is cut into units."""
import bz2
import glob
import gzip
import json
import lzma
import math
import os
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

from configurator import UserError, one_line
from synthetic.texts import LIBRARY_UNITS, PROBLEMS, library, problems

# ---- sources: where text comes from

# A domain's source is one of
#
#     builtin:code  builtin:language  builtin:math  builtin:science     synthetic/texts.py
#     books/*.jsonl?text=body        local files: .jsonl, .txt (also .gz, .bz2, .xz) and .parquet;
#                                    text= names the column, or several: text=question,answer
#     owner/name?name=CONFIG&split=train&text=column      a dataset of the Hugging Face Hub
#
# A source is cut into *units*, in a fixed order: a file of a Hub dataset, 32 MB of local text,
# 1,000 problems. A unit is what one process prepares at a time, and becomes one shard of training
# text and one of held-out text.

UNIT_BYTES = 2**25   # local text per unit
MAX_UNITS = 100_000  # of a generator of problems, which has no end of its own

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READABLE = (".jsonl", ".txt", ".parquet", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".txt.gz",
            ".txt.bz2", ".txt.xz")


def source_units(source: str, unit_bytes: int = UNIT_BYTES) -> list[partial]:
    """The units of a source: functions without arguments, each of which yields documents. They are
    partials, not closures, so that they can be sent to another process."""
    place, _, query = source.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    columns = options.get("text", "text").split(",")

    if place.startswith("builtin:"):
        check_options(source, options, [])
        return builtin_units(source, place.removeprefix("builtin:"))
    if place.endswith(READABLE):
        check_options(source, options, ["text"])
        return local_units(place, columns, unit_bytes)
    if place.count("/") == 1 and not os.path.exists(place):
        check_options(source, options, ["text", "name", "split"])
        return hub_units(place, columns, options)
    raise UserError(f"source {source!r} must be builtin:..., files that end in .jsonl, .txt or "
                    ".parquet, or a dataset owner/name of the Hub")


def check_options(source: str, options: dict, known: list[str]) -> None:
    """UserError for options after a source's question mark that are empty or unknown."""
    for key, value in options.items():
        if key not in known or not value:
            has = ", ".join(f"{name}=..." for name in known) or "none"
            raise UserError(f"source {source!r}: {key}={value} is not one of its options ({has})")


def builtin_units(source: str, kind: str) -> list[partial]:
    if kind in PROBLEMS:
        return [partial(problems, kind, i) for i in range(MAX_UNITS)]
    if kind in ("code", "language"):
        return [partial(library, kind, i) for i in range(LIBRARY_UNITS)]
    known = ", ".join(["code", "language", *PROBLEMS])
    raise UserError(f"source {source!r}: the built-in ones are {known}")


def local_files(pattern: str) -> list[Path]:
    """The files that match a glob, sorted."""
    files = sorted(Path(path) for path in glob.glob(pattern, recursive=True)
                   if os.path.isfile(path))
    if not files:
        raise UserError(f"no file matches {pattern}; give a path or a glob of existing files")
    return files


def local_units(pattern: str, columns: list[str], unit_bytes: int) -> list[partial]:
    """Units of at least unit_bytes: large files are cut, small ones gathered, and what is too
    little for a unit of its own joins the last one."""
    pieces = []
    remaining = 0
    for path in local_files(pattern):
        size = path.stat().st_size
        can_be_cut = path.suffix in (".jsonl", ".txt")
        count = max(1, size // unit_bytes) if can_be_cut else 1
        for i in range(count):
            pieces.append((path, i * size // count, (i + 1) * size // count))
        remaining += size

    units = [[]]
    filled = 0
    for path, start, end in pieces:
        if filled >= unit_bytes and remaining >= unit_bytes:
            units.append([])
            filled = 0
        units[-1].append((path, start, end))
        filled += end - start
        remaining -= end - start
    return [partial(read_pieces, unit, columns) for unit in units]


def read_pieces(pieces: list[tuple[Path, int, int]], columns: list[str]):
    """The documents in bytes start to end of each file: rows of .jsonl and .parquet files, groups
    of paragraphs of .txt files."""
    for path, start, end in pieces:
        kind = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
        if kind == ".parquet":
            yield from read_each(path, parquet_rows(path), partial(get_text, columns))
        elif kind == ".jsonl":
            yield from read_each(path, lines_of(path, start, end), partial(json_text, columns))
        else:
            lines = read_each(path, lines_of(path, start, end), partial(str, encoding="utf-8"))
            yield from paragraphs(lines)


def paragraphs(lines):
    """Documents of whole paragraphs. Each has at least 4,096 characters, except the last one."""
    text = ""
    for line in lines:
        text += line.removeprefix("\ufeff")  # the byte-order mark that some editors write
        if len(text) >= 4096 and not line.strip():
            yield text
            text = ""
    yield text


def read_each(source, items, read):
    """Yield read(item) of each (place, item). To open, decompress, download and parse may raise
    exceptions of many libraries, some of which cannot even be sent from one process to another. So
    each of them becomes a UserError here, with the source and the place."""
    place = "at its beginning"
    try:
        for place, item in items:
            yield read(item)
    except Exception as e:
        raise UserError(f"{source}: {place}: {one_line(e)}") from None


def parquet_rows(path: Path):
    """(place, row) of each row, a dict."""
    import pyarrow.parquet
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield f"row {number}", row
            number += 1


def lines_of(path: Path, start: int, end: int):
    """(place, line) of each line that begins in bytes start to end of a file. A compressed file
    cannot be cut: it gives all its lines."""
    if path.suffix in COMPRESSED:
        start = 0
        end = math.inf
    opener = COMPRESSED.get(path.suffix, open)
    with opener(path, "rb") as file:
        if start > 0:
            # A line belongs to the piece in which it begins: skip what is left of the one before.
            file.seek(start - 1)
            start += len(file.readline()) - 1
        for line in file:
            if start >= end:
                return
            yield f"byte {start}", line
            start += len(line)


def json_text(columns: list[str], line: bytes) -> str:
    return get_text(columns, json.loads(line)) if line.strip() else ""


def get_text(columns: list[str], row: dict) -> str:
    """The text of a row: its columns, with a blank line between them. A null is an empty text.

    >>> get_text(["question", "answer"], {"id": 7, "question": "1 + 1?", "answer": "2"})
    '1 + 1?\\n\\n2'
    """
    if not isinstance(row, dict):
        raise UserError(f"a row must be columns with names, not {type(row).__name__}")
    texts = []
    for column in columns:
        if column not in row or not isinstance(row[column], str | None):
            raise UserError(f"no text in column {column}; it has {', '.join(row)}: name the right "
                            "one with ?text=COLUMN")
        texts.append(row[column] or "")
    return "\n\n".join(texts)


def hub_units(name: str, columns: list[str], options: dict) -> list[partial]:
    """One unit for each file of a Hub dataset."""
    try:
        files = open_hub(name, options).n_shards
    except Exception as e:  # the library raises a dozen kinds
        raise UserError(f"dataset {name} cannot be opened: {one_line(e)}") from None
    return [partial(read_hub, name, columns, options, i, files) for i in range(files)]


def open_hub(name: str, options: dict):
    """A dataset of the Hub, streamed: what is not read is not downloaded."""
    from datasets import load_dataset
    split = options.get("split", "train")
    return load_dataset(name, options.get("name"), split=split, streaming=True)


def read_hub(name: str, columns: list[str], options: dict, i: int, files: int):
    """The documents of file i."""
    yield from read_each(name, hub_rows(name, options, i, files), partial(get_text, columns))


def hub_rows(name: str, options: dict, i: int, files: int):
    """(place, row) of each row of file i."""
    for number, row in enumerate(open_hub(name, options).shard(files, i)):
        yield f"file {i}, row {number}", row


def source_identity(source: str) -> str:
    """Differs where the text of a source may differ: a hash of its files' sizes and dates."""
    import hashlib
    import sys
    place = source.partition("?")[0]
    what = []
    if place.startswith("builtin:"):
        what.append(sys.version)  # another Python's library has other text
    elif place.endswith(READABLE):
        for path in local_files(place):
            stat = path.stat()
            what.append((str(path), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(what).encode()).hexdigest()
