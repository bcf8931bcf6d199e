"""Sources: where the text of a domain comes from, and how it is cut into units.

A domain's source is one of

    builtin:code  builtin:language  builtin:math  builtin:science     synthetic/texts.py
    books/*.jsonl?text=body        local files: .jsonl, .txt (also .gz, .bz2, .xz) and .parquet;
                                   text= names the column, or several: text=question,answer
    owner/name?name=CONFIG&split=train&text=column&revision=v1.0
                                   a dataset of the Hugging Face Hub

A source is cut into *units*, in a fixed order. A unit is what one process prepares at a time:

    local files    some 16 MiB: a part of a large .jsonl or .txt, or several small files together;
                   but a large file of another kind is one unit
    the Hub        one file of the dataset
    builtin        1,000 problems, or an eighth of the modules of Python's library

It yields *documents*: a row of a .jsonl or .parquet file is one, and so is a .txt file, unless it
is long.

    for unit in source_units("books/*.txt"):
        skipped = SkippedRows()
        for document in unit(skipped):
            ...
        print(skipped.report())

A corpus of a billion rows has some that cannot be read. Such rows (of a .txt file, lines) are left
out and counted, and a unit ends in an error only if many of its rows are bad, as with the name of a
wrong column. A UTF-16 file always ends it.
"""
import bz2
import glob
import gzip
import json
import logging
import lzma
import math
import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from time import sleep
from urllib.parse import parse_qsl, quote, urlencode

from configurator import UserError, one_line
from synthetic.texts import LIBRARY_UNITS, PROBLEMS, library, problems

# [ours] marks a number that no paper states.

UNIT_BYTES = 2**24   # [ours] local text per unit
GENERATED_UNITS = 100_000  # of a generator of problems, which has no end of its own

# A .txt file that is longer than LONG_TEXT is cut at blank lines into documents of at least
# LONG_TEXT; the end of a unit ends a document too, at any line. No document is longer than
# LONGEST_TEXT, so that none takes a tokenizer minutes. [ours]
LONG_TEXT = 2**16     # characters
LONGEST_TEXT = 2**20  # characters

# A unit may leave out MAX_SKIPPED of the rows that it has read so far, counted as if they were at
# least FEW_ROWS, so that two bad rows among the first three are not yet too many. [ours]
MAX_SKIPPED = 0.1
FEW_ROWS = 100

# A request to the Hub that fails is made again after 1, 2, 4 and 8 seconds. The first one of a run
# is made fewer times: where there is no network, it should not take long to say so. [ours]
ATTEMPTS = 5
FIRST_ATTEMPTS = 3
FIRST_TIMEOUT = 5  # seconds

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READABLE = (".jsonl", ".txt", ".parquet", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".txt.gz",
            ".txt.bz2", ".txt.xz")


# The options that a source may have after its question mark.
OPTIONS = {"builtin": [], "local": ["text"], "hub": ["text", "name", "split", "revision"]}
QUESTION_MARK = ("what follows a question mark is options, such as ?text=COLUMN; in a glob write * "
                 "or [0-9] in its place")


def source_units(source: str, unit_bytes: int | None = None,
                 attempts: int = FIRST_ATTEMPTS) -> list[partial]:
    """The units of a source: functions of a SkippedRows, or of nothing, that yield documents. They
    are partials, not closures, so that they can be sent to another process. attempts: how often the
    Hub is asked before it is given up."""
    kind, place, options = parse_source(source)
    columns = options.get("text", "text").split(",")
    if kind == "builtin":
        return builtin_units(source, place.removeprefix("builtin:"))
    if kind == "local":
        return local_units(place, columns, unit_bytes or UNIT_BYTES)
    return hub_units(place, columns, options, attempts)


def source_identity(source: str) -> str:
    """A text that differs between sources with different documents; its hash can name a folder of
    prepared tokens. A Hub source from pin_source() needs no network here."""
    kind, place, _ = parse_source(source)
    if kind == "builtin":
        return f"{source} {sys.version}"  # another Python's library has other text
    if kind == "local":
        files = []
        for path in local_files(place):
            stat = path.stat()
            files.append((str(path), stat.st_size, stat.st_mtime_ns))
        return f"{source} {files}"
    return pin_source(source)


def parse_options(query: str) -> dict[str, str]:
    """What follows a source's question mark. %xx stands for a byte, as in an address; but a plus
    sign stands for itself.

    >>> parse_options("name=c++&split=train%5B:100%5D")
    {'name': 'c++', 'split': 'train[:100]'}
    """
    return dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True))


def parse_source(source: str) -> tuple[str, str, dict[str, str]]:
    """(kind of source, what stands before its question mark, the options after that).

    >>> parse_source("owner/name?split=train&text=question,answer")
    ('hub', 'owner/name', {'split': 'train', 'text': 'question,answer'})
    >>> parse_source("books/*.txt")
    ('local', 'books/*.txt', {})
    """
    place, _, query = source.partition("?")
    if os.path.isfile(source):  # a name may have a question mark
        place = source
        query = ""
    options = parse_options(query)
    if place.startswith("builtin:"):
        kind = "builtin"
    elif place.endswith(READABLE):
        kind = "local"
    elif is_hub_name(place):
        kind = "hub"
    elif os.path.isdir(place):
        raise UserError(f"source {source!r} is a folder; give its files, as in {place}/*.txt")
    elif query and "=" not in query:
        raise UserError(f"source {source!r}: {QUESTION_MARK}")
    else:
        raise UserError(f"source {source!r} must be builtin:..., files that end in .jsonl, .txt or "
                        ".parquet, or a dataset owner/name of the Hub")
    check_options(source, options, OPTIONS[kind])
    if kind == "local" and "text" in options and re.search(r"\.txt(\.(gz|bz2|xz))?$", place):
        raise UserError(f"source {source!r}: a .txt file has no columns; leave out ?text=")
    return kind, place, options


def is_hub_name(place: str) -> bool:
    """Whether this may be owner/name. A name with the ending of a text file is taken for a file."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", place) is not None
    has_ending = re.search(r"\.(txt|csv|tsv|json|jsonl|parquet)(\.\w+)?$", place)
    is_file = os.path.exists(place) or has_ending
    return is_name and not is_file


def check_options(source: str, options: dict, known: list[str]) -> None:
    """UserError for options after a source's question mark that are empty or unknown."""
    for key, value in options.items():
        if key not in known and not value:
            raise UserError(f"source {source!r}: {QUESTION_MARK}")
        if key not in known or not value:
            has = ", ".join(f"{name}=..." for name in known) or "none"
            raise UserError(f"source {source!r}: {key}={value} is not one of its options ({has})")


def builtin_units(source: str, kind: str) -> list[partial]:
    if kind in PROBLEMS:
        return [partial(read_builtin, problems, kind, i) for i in range(GENERATED_UNITS)]
    if kind in ("code", "language"):
        return [partial(read_builtin, library, kind, i) for i in range(LIBRARY_UNITS)]
    known = ", ".join(["code", "language", *PROBLEMS])
    raise UserError(f"source {source!r}: the built-in ones are {known}")


def read_builtin(generate, kind: str, i: int, skipped: "SkippedRows | None" = None):
    """The documents of unit i of generated text, which leaves none out."""
    return generate(kind, i)


# ---- rows: reading them one by one, and leaving out the bad ones

class SkippedRows:
    """Counts the rows that a unit leaves out, by reason.

    >>> skipped = SkippedRows()
    >>> skipped.rows = 2000
    >>> skipped.add("a.jsonl: byte 9", UserError("it is no text"))
    >>> skipped.report()
    '1 of 2,000 rows left out: 1 it is no text (first: a.jsonl: byte 9)'
    """

    def __init__(self):
        self.rows = 0             # that were read, the bad ones among them
        self.with_text = 0        # of these, good ones that are not empty
        self.reasons = Counter()  # reason -> bad rows
        self.first_place = {}     # reason -> where the first of these rows is

    def add(self, place: str, e: Exception) -> None:
        """Count a bad row. UserError if these are too many rows."""
        reason = row_error(e)
        self.reasons[reason] += 1
        self.first_place.setdefault(reason, place)
        if self.reasons.total() > MAX_SKIPPED * max(self.rows, FEW_ROWS):
            raise UserError(f"too many bad rows: {self.report()}")

    def check_some_left(self) -> None:
        """UserError if a unit has ended, and of its rows with something in them all were bad,
        however few they are."""
        if self.reasons and not self.with_text:
            raise UserError(f"no good row: {self.report()}")

    def report(self) -> str:
        """One line, with the three commonest reasons; "" if no row was bad."""
        if not self.reasons:
            return ""
        parts = []
        for reason, count in self.reasons.most_common(3):
            parts.append(f"{count:,d} {reason} (first: {self.first_place[reason]})")
        return f"{self.reasons.total():,d} of {self.rows:,d} rows left out: {'; '.join(parts)}"


def row_error(e: Exception) -> str:
    """Why a row is bad, in few words, so that rows with the same fault can be counted together."""
    if isinstance(e, json.JSONDecodeError):
        return f"not JSON, {e.msg}"
    if isinstance(e, UnicodeDecodeError):
        return f"not UTF-8, {e.reason}"
    return one_line(e)


def read_each(source, items, read, skipped: SkippedRows | None = None):
    """Yield read(item) of each (place, item). An item that read() cannot read is counted in
    `skipped` if that is given, and ends the reading otherwise.

    To open, decompress, download and parse may raise exceptions of many libraries, some of which
    cannot even be sent from one process to another. So each that ends the reading becomes a
    UserError here, with the source and the place."""
    place = "at its beginning"
    try:
        for place, item in items:
            if skipped is None:
                yield read(item)
                continue

            skipped.rows += 1
            try:
                text = read(item)
            except Exception as e:
                skipped.add(f"{source}: {place}", e)
            else:
                skipped.with_text += bool(text.strip())
                yield text
    except Exception as e:
        raise UserError(f"{source}: {place}: {one_line(e)}") from None


def json_text(columns: list[str], line: bytes) -> str:
    return get_text(columns, json.loads(line)) if line.strip() else ""


def parquet_text(columns: list[str], batch) -> str:
    """The text of a pyarrow.RecordBatch of one row."""
    return get_text(columns, batch.to_pylist()[0])


def get_text(columns: list[str], row: dict) -> str:
    """The text of a row: its columns, with a blank line between them. A null is an empty text.

    >>> get_text(["question", "answer"], {"id": 7, "question": "1 + 1?", "answer": "2"})
    '1 + 1?\\n\\n2'
    """
    if not isinstance(row, dict):
        raise UserError(f"a row must be columns with names, not {type(row).__name__}")
    texts = []
    for column in columns:
        if column not in row:
            raise UserError(no_column(column, row))
        text = row[column]
        if not isinstance(text, str | None):
            raise UserError(f"column {column} has {type(text).__name__} and not text; name another "
                            "with ?text=COLUMN")
        texts.append(text or "")
    return "\n\n".join(texts)


# ---- local files

def local_files(pattern: str) -> list[Path]:
    """The files that match a glob, sorted."""
    if os.path.isfile(pattern):  # a name may have brackets, as in x[1].txt
        return [Path(pattern)]
    files = sorted(Path(path) for path in glob.glob(pattern, recursive=True)
                   if os.path.isfile(path))
    if not files:
        raise UserError(f"no file matches {pattern}; give a path or a glob of existing files")
    return files


def local_units(pattern: str, columns: list[str], unit_bytes: int) -> list[partial]:
    """Units of at least unit_bytes: large .jsonl and .txt files are cut, small files gathered, and
    what is too little for a unit of its own joins the last one. In units of 16 MiB,

        a.jsonl  40 MiB            becomes   unit 0  a.jsonl, bytes 0 to 20 Mi
        b.jsonl   6 MiB                      unit 1  a.jsonl, bytes 20 Mi to 40 Mi
        c.jsonl  12 MiB                      unit 2  b.jsonl and c.jsonl
    """
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


def read_pieces(pieces: list[tuple[Path, int, int]], columns: list[str],
                skipped: SkippedRows | None = None):
    """The documents in bytes start to end of each file."""
    skipped = skipped or SkippedRows()
    for path, start, end in pieces:
        kind = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
        if kind == ".parquet":
            rows = parquet_rows(path, columns)
            yield from read_each(path, rows, partial(parquet_text, columns), skipped)
        elif kind == ".jsonl":
            lines = lines_of(path, start, end)
            yield from read_each(path, lines, partial(json_text, columns), skipped)
        else:
            decode = partial(str, encoding="utf-8")
            lines = read_each(path, lines_of(path, start, end), decode, skipped)
            yield from text_documents(lines)
    skipped.check_some_left()


def text_documents(lines):
    """One document of the lines of a .txt file, or several if they are long: each ends with the
    first blank line after LONG_TEXT characters, and where no blank line comes before LONGEST_TEXT,
    with the last line that fits. A line that is longer itself is cut anywhere."""
    text = ""
    for line in lines:
        line = line.removeprefix("\ufeff")  # the byte-order mark that some editors write
        for start in range(0, len(line), LONGEST_TEXT):
            part = line[start:start + LONGEST_TEXT]
            if len(text) + len(part) > LONGEST_TEXT:
                yield text
                text = ""
            text += part

        if len(text) >= LONG_TEXT and not line.strip():
            yield text
            text = ""
    if text:
        yield text


def lines_of(path: Path, start: int, end: int):
    """(place, line) of each line that begins in bytes start to end of a file: of the lines

        one|two|three|        where | ends a line,

    bytes 0 to 6 have "one" and "two", and bytes 6 to 14 have "three". A compressed file cannot be
    cut: it gives all its lines. UserError for the byte-order mark of UTF-16, where a newline is two
    bytes."""
    if path.suffix in COMPRESSED:
        start = 0
        end = math.inf
    opener = COMPRESSED.get(path.suffix, open)
    with opener(path, "rb") as file:
        if start > 0:
            # A line belongs to the piece in which it begins: skip what is left of the one before.
            file.seek(start - 1)
            start += len(file.readline()) - 1
        position = start
        for line in file:
            if position >= end:
                return
            if position == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError("the file is UTF-16; save it as UTF-8")
            yield f"byte {position}", line
            position += len(line)


def parquet_rows(path: Path, columns: list[str] | None = None):
    """(place, pyarrow.RecordBatch of one row) of each row. Other columns than these are not read.
    The row is not made Python's yet, as that fails if a text is not UTF-8."""
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(path)
    for column in columns or []:
        if column not in file.schema_arrow.names:
            raise UserError(no_column(column, file.schema_arrow.names))

    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        for i in range(len(batch)):
            yield f"row {number}", batch.slice(i, 1)
            number += 1


def no_column(column: str, has: list[str]) -> str:
    has = ", ".join(has) or "none"
    return f"no column {column}; it has {has}: name the right one with ?text=COLUMN"


# ---- the Hub

# A dataset of the Hub is a git repository, which changes. A run should not read half of one commit
# and half of the next, nor a run that goes on read other text than the run before. So the commit is
# asked for once, and every file is read as that commit has it:
#
#     source = pin_source("owner/name?split=train", Path("data/hub_revisions.json"))
#     source == "owner/name?split=train&revision=5f0d3c..."
#
# The file keeps the answer, so that a later start gives the same source, without network too.

COMMIT = re.compile("[0-9a-f]{40}")


def pin_source(source: str, file: Path | None = None) -> str:
    """A Hub source with the commit that its revision (main if it has none) stands for. Other
    sources stay as they are. file: {source: commit} in JSON, read first and added to."""
    kind, name, options = parse_source(source)
    if kind != "hub" or COMMIT.fullmatch(options.get("revision", "")):
        return source

    commits = read_commits(file)
    if not COMMIT.fullmatch(str(commits.get(source))):
        commit = hub_commit(name, options)
        commits = {**read_commits(file), source: commit}    # another process may have added to it
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(f"{file}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(commits, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, file)
    pinned = urlencode({**options, "revision": commits[source]}, safe=",/", quote_via=quote)
    return f"{name}?{pinned}"


def read_commits(file: Path | None) -> dict:
    """{source: commit}, as pin_source keeps them; {} if there is no file."""
    if not file or not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file} is damaged: {one_line(e)}; delete it to take the datasets as "
                        "they are now") from None


def hub_commit(name: str, options: dict, attempts: int = FIRST_ATTEMPTS) -> str:
    """The commit that a dataset's revision stands for. It is asked for before all else, so that a
    wrong name or a missing network is told in seconds."""
    try:
        from huggingface_hub import HfApi
        ask = partial(HfApi().dataset_info, name, revision=options.get("revision"),
                      timeout=FIRST_TIMEOUT)
        return with_retries(ask, attempts).sha
    except Exception as e:  # the library raises a dozen kinds
        raise UserError(f"dataset {name} cannot be opened: {one_line(e)}") from None


def hub_units(name: str, columns: list[str], options: dict, attempts: int) -> list[partial]:
    """One unit for each file of a Hub dataset. The commit is asked for even if it is pinned: where
    there is no network, `datasets` would take half a minute to say so."""
    options = {**options, "revision": hub_commit(name, options, attempts)}
    try:
        dataset = with_retries(partial(open_hub, name, options), ATTEMPTS)
        files = dataset.n_shards
        has = dataset.column_names  # None if only the rows tell
    except Exception as e:
        raise UserError(f"dataset {name} cannot be opened: {one_line(e)}") from None
    for column in columns:
        if has and column not in has:
            raise UserError(f"dataset {name}: {no_column(column, has)}")
    return [partial(read_hub, name, columns, options, i, files) for i in range(files)]


def open_hub(name: str, options: dict, columns: list[str] | None = None):
    """A dataset of the Hub, streamed: what is not read is not downloaded. If its files are
    .parquet, that is also true of columns other than these; other files have no columns apart."""
    from datasets import load_dataset
    # Both libraries would tell each of their own attempts in two lines.
    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    load = partial(load_dataset, name, options.get("name"), split=options.get("split", "train"),
                   revision=options.get("revision"), streaming=True)
    if columns:
        try:
            return load(columns=columns)
        except ValueError:  # the files are not .parquet; another mistake fails below, too
            pass
    return load()


def read_hub(name: str, columns: list[str], options: dict, i: int, files: int,
             skipped: SkippedRows | None = None):
    """The documents of file i."""
    skipped = skipped or SkippedRows()
    rows = hub_rows(name, columns, options, i, files, skipped)
    yield from read_each(name, rows, partial(get_text, columns), skipped)
    skipped.check_some_left()


def hub_rows(name: str, columns: list[str], options: dict, i: int, files: int,
             skipped: SkippedRows):
    """(place, row) of each row of file i. A stream that breaks is opened again at the next row:

        rows 0, 1, 2 | connection lost | wait 1 s, open, skip 3 | rows 3, 4, ...

    What fails at opening, or as the connection does, is tried again. If the library fails at a row
    for another reason, that row is left out, and the stream is opened again behind it. What fails
    ATTEMPTS times without a row between is given up.
    """
    number = 0    # of the next row
    failures = 0  # since the last row
    while True:
        is_open = False
        try:
            dataset = open_hub(name, options, columns).shard(files, i).skip(number)
            is_open = True
            for row in dataset:
                yield f"file {i}, row {number}", row
                number += 1
                failures = 0
            return
        except Exception as e:
            failures += 1
            if failures == ATTEMPTS:
                raise
            place = f"{name}: file {i}, row {number}"
            if may_pass(e) or not is_open:
                print(f"{place}: {one_line(e)}; trying again", file=sys.stderr, flush=True)
                sleep(2 ** (failures - 1))
            else:
                skipped.rows += 1
                skipped.add(place, e)
                number += 1


def with_retries(call, attempts: int):
    """call(), and again as long as it fails for a reason that may pass, so often in all."""
    for failures in range(attempts - 1):
        try:
            return call()
        except Exception as e:
            if not may_pass(e):
                raise
            sleep(2 ** failures)
    return call()


def may_pass(e: Exception) -> bool:
    """Whether the same request may succeed later. It may after a lost connection, a time-out or an
    overloaded server (status 408, 429, 5xx), and will not after a wrong name or a bad row."""
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    lasting = (ValueError, TypeError, LookupError, AttributeError, ImportError, FileNotFoundError)
    return not isinstance(e, lasting)
