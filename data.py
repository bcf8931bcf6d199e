"""Data: text -> shards of tokens -> a curriculum -> batches.

    load_tokenizer(name)      byte, a tiktoken name, a .tiktoken file, a tokenizer.json or the Hub's
    prepare(...)              the domains' sources -> shards on disk; parallel, resumable
    Plan(...)                 step -> sequence length, rows and every domain's share; opens no data
    Corpus(...).batch(step)   a pure function of (seed, step), whoever reads it and however many do

Tokens are the one clock: mixture, batch and sequence length are functions of the tokens seen.
A domain's source is one of
    builtin:code  builtin:language  builtin:math  builtin:science      at the end of this file
    books/*.jsonl?text=body    local files: .jsonl, .txt, .parquet, also .gz, .bz2, .xz; a column
    owner/name?name=CONFIG&split=train&text=column     a dataset of the Hugging Face Hub, streamed
`python data.py config/X.py` prepares what is missing and prints the plan.
"""
import ast
import base64
import bz2
import datetime
import glob
import gzip
import hashlib
import inspect
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import sysconfig
import threading
import time
from bisect import bisect_left, insort
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from fractions import Fraction
from functools import cache, cached_property, partial
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

# The turn format of the Motif family: every tokenizer gets those it lacks, after its own ids.
BEGIN, END = "<|beginoftext|>", "<|endoftext|>"
TURN, TURN_END = "<|startofturn|>", "<|endofturn|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = (BEGIN, END, TURN, TURN_END, *ROLES.values())

HEADER = struct.Struct("<8sIIQ32s32s")  # magic, version, bytes per token, tokens, SHA-256 of the
MAGIC, VERSION = b"nnMotif\0", 1        # tokens, tokenizer fingerprint; the tokens follow
HOLD_OUT = 50                           # one document in so many is for validation
UNIT_BYTES = 2**25                      # local text per shard; a shard is the unit of preparing
PROBLEMS_PER_UNIT = 1000                # likewise of the generators: about 0.3 MB
MAX_UNITS = 100_000                     # where a generator ends
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


# ---- tokenizers

def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer of that name: "byte" (256 + specials, needs nothing), one of tiktoken's names
    (downloaded once), a .tiktoken file (split by GPT-2's pattern, which such a file does not
    state), or of byte-level BPE a tokenizer.json, a folder that has one, or a repository owner/name
    of the Hugging Face Hub that has one (downloaded once). ValueError if it cannot be had."""
    specials, known = {}, tiktoken.list_encoding_names()
    try:
        if name == "byte":
            pattern, ranks = r"(?s).{1,64}", {bytes([i]): i for i in range(256)}
        elif name.endswith(".tiktoken"):
            pairs = (line.split() for line in Path(name).read_text(encoding="utf-8").splitlines())
            pattern, ranks = GPT2_PATTERN, {base64.b64decode(t): int(r) for t, r in pairs}
        elif name in known:
            made = tiktoken.get_encoding(name)
            pattern, ranks, specials = made._pat_str, made._mergeable_ranks, made._special_tokens
        elif name.endswith(".json") or os.path.isdir(name) or HUB_NAME.fullmatch(name):
            spec = json.loads(tokenizer_file(name).read_text(encoding="utf-8"))
            pattern, ranks, specials = read_tokenizer_json(spec)
        else:
            raise ValueError("it is neither 'byte', a .tiktoken file, a tokenizer.json or a folder "
                             f"with one, owner/name of the Hub, nor one of {', '.join(known)}")
        if not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("some of the 256 bytes have no token")
        if len(set(ranks.values()) - set(specials.values())) < len(ranks):
            raise ValueError("two of its tokens have the same id")
        size = 1 + max([*ranks.values(), *specials.values()])
        missing = [token for token in SPECIALS if token not in specials]
        specials = {**specials, **{token: size + i for i, token in enumerate(missing)}}
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=specials)
    except Exception as e:  # also those of downloading and of a file of another form
        hint = "; --tokenizer=byte needs no network" if name in known else ""
        raise ValueError(f"tokenizer {name}: {one_line(e)}{hint}") from None


def one_line(e: Exception) -> str:
    """What an error of any kind says. The words of our own errors need no name of their kind."""
    text = " ".join(str(getattr(e, "strerror", None) or e).split())[:300]
    return text if type(e) is ValueError else f"{type(e).__name__}: {text}"


def tokenizer_file(name: str) -> Path:
    """The file that is meant by a tokenizer.json, a folder or a repository of the Hub. What was
    downloaded once needs no network again. ValueError if there is none."""
    if name.endswith(".json"):
        return Path(name)
    if os.path.isdir(name):
        if not os.path.isfile(f"{name}/tokenizer.json"):
            raise ValueError("the folder has no tokenizer.json")
        return Path(name) / "tokenizer.json"
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        kept = try_to_load_from_cache(name, "tokenizer.json")   # a path, or a sign that it is not
        return Path(kept if isinstance(kept, str) else hf_hub_download(name, "tokenizer.json"))
    except Exception as e:  # of a dozen kinds: no network, no such name, a licence to accept first
        raise ValueError("there is no such folder, and the Hub did not give a tokenizer.json: "
                         + one_line(e)) from None


def read_tokenizer_json(spec: dict) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """A Hugging Face tokenizer.json of byte-level BPE -> split pattern, token bytes -> id, added
    tokens. The ids of text are those that the `tokenizers` library gives, except that the spelling
    of an added token stays text here. ValueError names the part that tiktoken cannot express."""
    model, normalizer = spec["model"], spec.get("normalizer")
    odd = {k: model[k] for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
           if model.get(k)}
    if model.get("type", "BPE") != "BPE" or odd:
        raise ValueError(f"byte-level BPE can be read, not {model.get('type', 'BPE')} {odd or ''}")
    if normalizer:
        raise ValueError(f"its normalizer {normalizer['type']} changes the text; it must be null")
    pattern = split_pattern(spec.get("pre_tokenizer") or {})
    # GPT-2's alphabet: printable bytes stand for themselves, the others for 256, 257, ...
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    byte = {b: b for b in shown} | {256 + i: b for i, b in enumerate(others)}
    specials = {t["content"]: t["id"] for t in spec["added_tokens"]}
    for t in spec["added_tokens"]:
        if not t.get("special", True) and t["content"].isspace():
            raise ValueError(f"its added token {t['content']!r} is plain text, which must be BPE's")
    words = {token: i for token, i in model["vocab"].items() if token not in specials}
    for odd in {*"".join(words)} - {*map(chr, byte)}:
        token = next(token for token in words if odd in token)
        raise ValueError(f"its token {token!r} is not written in the letters of byte-level BPE")
    ranks = {token.translate(byte).encode("latin-1"): i for token, i in words.items()}
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    order = [model["vocab"][a + b] for a, b in pairs]
    if order != sorted(order) or {*order} != {i for t, i in ranks.items() if len(t) > 1}:
        raise ValueError("its merges are not its tokens in the order of their ids, which tiktoken "
                         "needs")
    return pattern, ranks, specials


def split_pattern(pre: dict) -> str:
    """The pre-tokenizer of a tokenizer.json -> the regular expression whose matches are its pieces.
    ValueError for one that is no single expression, or that tiktoken's engine (Rust's) and the
    library's (Oniguruma) read differently."""
    steps = pre.get("pretokenizers", [pre])
    kinds, level = [step.get("type") for step in steps], steps[-1]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError("its text must be cut by ByteLevel, or by Split, then ByteLevel, not by "
                         f"{', then '.join(map(str, kinds))}")
    options = {"add_prefix_space": level.get("add_prefix_space"),
               "use_regex": level.get("use_regex", True)}
    if options != {"add_prefix_space": False, "use_regex": len(steps) == 1}:
        raise ValueError(f"its ByteLevel has {options} behind {kinds[:-1]}, which cannot be read")
    if len(steps) == 1:
        return GPT2_PATTERN
    regex, how = steps[0]["pattern"].get("Regex"), (steps[0]["behavior"], steps[0]["invert"])
    if regex is None or how not in (("Isolated", False), ("Removed", True)):
        raise ValueError(f"its Split must be Isolated, or Removed and inverted, by a Regex, not "
                         f"{steps[0]}")
    bare = re.sub(r"\\.|\[(?:\\.|[^]\\])*\]", "", regex)
    for odd in re.findall(r"[$^]|\(\?\w*m|\{[\d,]+\}\+", bare) + re.findall(r"\[:\^?\w+:\]", regex):
        raise ValueError(f"its Split has {odd} in {regex}, which two engines read differently")
    # Isolated keeps what is between the matches, a piece each; tiktoken drops it, as Removed does
    return f"{regex}|(?:(?!{regex})[\\s\\S])+" if how[0] == "Isolated" else regex


def fingerprint(tokenizer: tiktoken.Encoding) -> bytes:
    """32 bytes that differ between tokenizers that could give different ids."""
    parts = (tokenizer._pat_str, sorted(tokenizer._mergeable_ranks.items(), key=lambda x: x[1]),
             sorted(tokenizer._special_tokens.items()))
    return hashlib.sha256(repr(parts).encode()).digest()


def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """(n_vocab,) bytes of text that each id stands for, 0 for specials: for bits per byte."""
    length = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for token, i in tokenizer._mergeable_ranks.items():
        length[i] = len(token)
    return length


def encode_document(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """begin of text, the text's tokens, end of text. A special token's spelling is plain text."""
    ends = tokenizer._special_tokens
    return [ends[BEGIN], *tokenizer.encode_ordinary(text), ends[END]]


def decode(tokenizer: tiktoken.Encoding, ids: list[int]) -> str:
    """The text of ids. Ids that no token has, which an untrained model samples, give U+FFFD, as
    bytes that are not UTF-8 do."""
    known = {*tokenizer._mergeable_ranks.values(), *tokenizer._special_tokens.values()}
    parts = [tokenizer.decode_single_token_bytes(i) if i in known else b"\xff" for i in ids]
    return b"".join(parts).decode("utf-8", "replace")


# ---- shards

class ShardWriter:
    """A shard in the making, under a temporary name until close()."""

    def __init__(self, path: Path, tokenizer: tiktoken.Encoding):
        self.path, self.tokenizer = path, fingerprint(tokenizer)
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
        self.tokens, self.checksum = 0, hashlib.sha256()
        self.file = open(f"{path}.tmp", "wb")
        self.file.seek(HEADER.size)

    def add(self, ids: list[int]) -> None:
        data = np.array(ids, self.dtype).tobytes()
        self.checksum.update(data)
        self.file.write(data)
        self.tokens += len(ids)

    def close(self) -> int:
        """Header, fsync, rename -> tokens."""
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.tokens,
                                    self.checksum.digest(), self.tokenizer))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f"{self.path}.tmp", self.path)
        return self.tokens


class Shard:
    """A shard on disk, mapped. The header and the size are checked at once, the checksum when it is
    first read. ValueError, naming the file, for one that is foreign, truncated or corrupted."""

    def __init__(self, path: Path, tokenizer: bytes | None = None):
        self.path, self.verified = path, False
        try:
            with open(path, "rb") as file:
                size, head = os.fstat(file.fileno()).st_size, file.read(HEADER.size)
        except OSError as e:
            raise ValueError(f"shard {path}: {one_line(e)}; {self.remedy()}") from None
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ValueError(f"{path} is not a shard of this project; {self.remedy()}")
        _, version, itemsize, self.tokens, self.checksum, made_by = HEADER.unpack(head)
        if version != VERSION or itemsize not in (2, 4):
            raise ValueError(f"{path} has shard version {version}, not {VERSION}; {self.remedy()}")
        if tokenizer not in (None, made_by):
            raise ValueError(f"{path} was made with another tokenizer; {self.remedy()}")
        if size != HEADER.size + itemsize * self.tokens:
            raise ValueError(f"{path} is truncated: {size} bytes, not "
                             f"{HEADER.size + itemsize * self.tokens}; {self.remedy()}")
        shape, dtype = (self.tokens,), f"<u{itemsize}"
        self.ids = (np.memmap(path, dtype, "r", HEADER.size, shape) if self.tokens
                    else np.empty(shape, dtype))

    def remedy(self) -> str:
        return f"delete {self.path.parent} and prepare again"

    def sequences(self, T: int) -> int:
        """How many sequences of T tokens and the target after them; neighbours share one token."""
        return max(0, self.tokens - 1) // T

    def read(self, i: int, T: int) -> np.ndarray:
        """Sequence i: T + 1 ids."""
        if not self.verified:
            if hashlib.sha256(self.ids).digest() != self.checksum:
                raise ValueError(f"{self.path} is corrupted: its checksum differs; {self.remedy()}")
            self.verified = True
        return self.ids[i * T:i * T + T + 1]


# ---- sources: a source is cut into units, a unit yields documents

def units_of(source: str) -> list[partial]:
    """A source's units in a fixed order, each a picklable function that yields documents.
    ValueError for a source that cannot be."""
    place, _, query = source.partition("?")
    options, local = dict(parse_qsl(query, keep_blank_values=True)), place.endswith(READABLE)
    known = [] if place.startswith("builtin:") else ["text"] if local else ["text", "name", "split"]
    check_options(source, options, known)
    columns = options.get("text", "text").split(",")
    if place.startswith("builtin:"):
        kind = place.removeprefix("builtin:")
        if kind in PROBLEMS:
            return [partial(problems, kind, i) for i in range(MAX_UNITS)]
        if kind not in ("code", "language"):
            known = ", ".join(("code", "language", *PROBLEMS))
            raise ValueError(f"source {source!r}: builtin are {known}")
        return [partial(library, kind, i) for i in range(LIBRARY_UNITS)]
    if local:
        return local_units(place, columns)
    if place.count("/") == 1 and not os.path.exists(place):
        return hub_units(place, columns, options)
    raise ValueError(f"source {source!r} is neither builtin:..., files ending in "
                     f"{', '.join(READABLE[:3])}, nor a dataset owner/name of the Hub")


def check_options(source: str, options: dict, known: list[str]) -> None:
    """ValueError for what follows a source's question mark if it is not known or empty."""
    for key, value in options.items():
        if key not in known or not value:
            raise ValueError(f"source {source!r}: {key}={value} is none of its options "
                             f"({'=..., '.join([*known, ''])[:-2] or 'it has none'})")


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READABLE = (".jsonl", ".txt", ".parquet",
            *(kind + end for kind in (".jsonl", ".txt") for end in COMPRESSED))


def local_files(pattern: str) -> list[Path]:
    """The files of a glob, sorted; ValueError if there is none."""
    files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not files:
        raise ValueError(f"no file matches {pattern}; give a path or a glob of existing files")
    return files


def local_units(pattern: str, columns: list[str]) -> list[partial]:
    """Units of UNIT_BYTES or more: large plain files are cut (at line ends), small ones gathered,
    and what is left at the end joins the last."""
    pieces = []
    for path in local_files(pattern):
        total = path.stat().st_size
        n = max(1, total // UNIT_BYTES) if path.suffix in (".jsonl", ".txt") else 1
        pieces += [(path, i * total // n, (i + 1) * total // n) for i in range(n)]
    units, size, left = [[]], 0, sum(end - start for _, start, end in pieces)
    for path, start, end in pieces:
        if min(size, left) >= UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append((path, start, end))
        size, left = size + end - start, left - (end - start)
    return [partial(read_pieces, unit, columns) for unit in units]


def read_pieces(pieces: list[tuple[Path, int, int]], columns: list[str]):
    """The documents of some pieces of files: rows of jsonl and parquet; of txt, whole paragraphs of
    at least 4,096 characters together."""
    for path, start, end in pieces:
        kind = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
        if kind == ".parquet":
            yield from read_each(path, parquet_rows(path), partial(text_of, columns))
        elif kind == ".jsonl":
            yield from read_each(path, lines_of(path, start, end), lambda line: (
                text_of(columns, json.loads(line)) if line.strip() else ""))
        else:
            text = ""
            for line in read_each(path, lines_of(path, start, end), partial(str, encoding="utf-8")):
                text += line.removeprefix("\ufeff")
                if len(text) >= 4096 and not line.strip():
                    yield text
                    text = ""
            yield text


def read_each(source, items, read):
    """read(item) of every (place, item). ValueError, with source and place, for whatever goes wrong
    on the way: some libraries' errors do not even survive the way back from a worker."""
    place = "at its beginning"
    try:
        for place, item in items:
            yield read(item)
    except Exception as e:
        raise ValueError(f"{source}: {place}: {one_line(e)}") from None


def parquet_rows(path: Path):
    import pyarrow.parquet
    batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"row {i}", row) for i, row in enumerate(rows))


def lines_of(path: Path, start: int, end: int):
    """(place, line) of the lines that begin in [start, end) of a file; all of a compressed one."""
    opener = COMPRESSED.get(path.suffix)
    with (opener or open)(path, "rb") as file:
        if opener is None and start:
            file.seek(start - 1)
            start += len(file.readline()) - 1      # a line belongs to the piece in which it begins
        for line in file:
            if opener is None and start >= end:
                return
            yield f"byte {start}", line
            start += len(line)


def text_of(columns: list[str], row: dict) -> str:
    """The text of a row: its columns, a blank line between; null is no text. ValueError if one is
    not there or is not text."""
    if not isinstance(row, dict) or not all(isinstance(row.get(c, 0), str | None) for c in columns):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"no text in column {','.join(columns)}; it has {has}: name the right one "
                         "with ?text=COLUMN")
    return "\n\n".join(row[c] or "" for c in columns)


def hub_units(name: str, columns: list[str], options: dict) -> list[partial]:
    """One unit for each file of a Hub dataset. ValueError if it cannot be opened."""
    try:
        files = open_hub(name, options).n_shards
    except Exception as e:  # datasets raises a dozen kinds, all with a message worth one line
        raise ValueError(f"dataset {name} cannot be opened: {one_line(e)}") from None
    return [partial(read_hub, name, columns, options, i, files) for i in range(files)]


def open_hub(name: str, options: dict):
    from datasets import load_dataset
    split = options.get("split", "train")
    return load_dataset(name, options.get("name"), split=split, streaming=True)


def read_hub(name: str, columns: list[str], options: dict, i: int, files: int):
    """The documents of file i."""
    rows = enumerate(open_hub(name, options).shard(files, i))
    places = ((f"file {i}, row {j}", row) for j, row in rows)
    yield from read_each(name, places, partial(text_of, columns))


# ---- preparing

class Store:
    """The shards of one domain: a folder data_dir/<domain>-<key>, the key made of tokenizer and
    source (of local files their sizes and dates too), so that another source never meets old
    shards. It holds train-N.bin and val-N.bin for unit N; manifest.json has the tokens of units 0,
    1, ... and whether those are all."""

    def __init__(self, domain: str, source: str, tokenizer: tiktoken.Encoding, data_dir: str):
        self.domain, self.source, self.tokenizer = domain, source, fingerprint(tokenizer)
        what = [source, self.tokenizer.hex(), HOLD_OUT, UNIT_BYTES, PROBLEMS_PER_UNIT]
        place, self.most = source.partition("?")[0], math.inf
        if place.startswith("builtin:"):
            what.append(sys.version)               # another Python holds other text
        elif place.endswith(READABLE):
            stats = ((str(path), path.stat()) for path in local_files(place))
            what += [(path, s.st_size, s.st_mtime_ns) for path, s in stats]
            self.most = 10 * sum(size for _, size, _ in what[5:])  # tokens, if well compressed
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:10]
        self.folder = Path(data_dir) / f"{domain}-{key}"
        self.manifest, self.tokens, self.whole = self.folder / "manifest.json", [], False
        if self.manifest.exists():
            try:
                state = json.loads(self.manifest.read_text())
                self.tokens, self.whole = state["tokens"], state["whole"]
            except (OSError, ValueError, LookupError, TypeError) as e:
                raise ValueError(f"{self.manifest} is damaged: {one_line(e)}; delete it and prepare"
                                 " again: the shards are kept") from None

    def path(self, part: str, unit: int) -> Path:
        return self.folder / f"{part}-{unit:05d}.bin"

    def has(self, need: int) -> bool:
        """Whether the units prepared so far hold `need` tokens, or all that the source has."""
        return self.whole or sum(self.tokens) >= need

    def open(self, part: tuple[int, int]) -> None:
        """Look for what is to do: units, queue (numbers of those of this part, the next one last)
        and made (tokens of those done)."""
        self.units, self.made = units_of(self.source), 0
        self.queue = [*range(part[0], len(self.units), part[1])][::-1]
        self.skip()

    def skip(self) -> None:
        """Take in the units that are there, up to the next to do. Those beyond do not count yet: a
        run reads units from 0 on without a gap."""
        while self.queue and self.path("train", self.queue[-1]).exists():
            self.made += Shard(self.path("train", self.queue.pop()), self.tokenizer).tokens

    def clear(self, unit: int) -> None:
        """Remove what there is of a unit that was cut short."""
        for part in ("train", "val"):
            Path(f"{self.path(part, unit)}.tmp").unlink(missing_ok=True)
        if not self.path("train", unit).exists():
            self.path("val", unit).unlink(missing_ok=True)

    def close(self) -> None:
        """Take in the shards from unit 0 on without a gap and write the manifest. ValueError, and
        no folder left, if the source has no text for training."""
        paths = (self.path("train", i) for i in range(len(self.tokens), len(self.units)))
        for path in takewhile(Path.exists, paths):
            self.tokens.append(Shard(path, self.tokenizer).tokens)
        self.whole = len(self.tokens) == len(self.units)
        if not sum(self.tokens):
            shutil.rmtree(self.folder)
            raise ValueError(f"domain {self.domain!r}: {self.source} has fewer than two documents "
                             "with text; one is held out for validation")
        state = {"source": self.source, "tokens": self.tokens, "whole": self.whole}
        with open(f"{self.manifest}.tmp", "w") as file:
            file.write(json.dumps(state) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{self.manifest}.tmp", self.manifest)

    def shards(self, part: str, need: int) -> list[Shard]:
        """The first units that hold `need` tokens together: what a run reads follows from its
        config, however much more is prepared later. ValueError for a shard that is damaged."""
        enough = range(len(self.tokens))[:np.searchsorted(np.cumsum(self.tokens), need) + 1]
        return [Shard(self.path(part, i), self.tokenizer) for i in enough]


def start_worker() -> None:
    """Ctrl-C is the parent's to answer; a worker ends with its parent, however that ended."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def tokenize_unit(tokenizer_name: str, unit: partial, number: int, train: Path, val: Path) -> int:
    """Write one unit's two shards -> tokens for training. Every HOLD_OUT-th document is held out,
    counted from the unit's number, so that who prepares which unit does not matter."""
    tokenizer = load_tokenizer(tokenizer_name)
    held_out, kept = ShardWriter(val, tokenizer), ShardWriter(train, tokenizer)
    for i, text in enumerate(filter(str.strip, unit())):
        writer = held_out if (number + i) % HOLD_OUT == 0 else kept
        writer.add(encode_document(tokenizer, text))
    held_out.close()
    return kept.close()                            # appears last: a unit is whole or not there


def prepare(domains: dict, tokenizer_name: str, data_dir: str, need: dict[str, int],
            part: tuple[int, int] = (0, 1), workers: int | None = None) -> dict[str, Store]:
    """Make what is missing of `need` tokens for every domain (name -> (source, ...)) -> stores.
    Units that are there are kept, so it goes on where it was cut. part (i, n): the i-th of n
    machines that share data_dir does every n-th unit; a last call without part takes all in.
    ValueError for a source that is missing, malformed or without text, or a disk too small."""
    tokenizer, workers = load_tokenizer(tokenizer_name), workers or os.cpu_count()
    stores = {name: Store(name, d[0], tokenizer, data_dir) for name, d in domains.items()}
    todo = [store for name, store in stores.items() if not store.has(need[name])]
    if not todo:
        return stores
    for store in todo:
        store.open(part)
    share = {store: need[store.domain] / part[1] for store in todo}
    announce(share, tokenizer, Path(data_dir), workers)
    begin, running = time.time(), {}               # future -> store, unit
    try:
        for store in todo:
            store.folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
            while True:
                while len(running) < workers:      # the domain that is furthest behind comes next
                    behind = [s for s in todo if s.queue and s.made < share[s]]
                    if not behind:
                        break
                    busy = [s for s, _ in running.values()]
                    store = min(behind, key=lambda s: (busy.count(s), s.made / share[s]))
                    i = store.queue.pop()
                    store.skip()
                    running[pool.submit(tokenize_unit, tokenizer_name, store.units[i], i,
                                        store.path("train", i), store.path("val", i))] = store, i
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running[future][0].made += future.result()
                    del running[future]
                done = sum(min(s.made, share[s]) for s in todo) / sum(share.values())
                left = (time.time() - begin) * (1 / max(done, 1e-3) - 1)
                progress(f"  {done:4.0%} of the tokens, {left:.0f} s left")
        progress()
        if part[1] == 1:
            for store in todo:
                store.close()
    except OSError as e:
        raise ValueError(f"{data_dir} cannot be written: {one_line(e)}; free some space or choose "
                         "another --data_dir") from None
    except BrokenProcessPool:
        raise ValueError("a process that prepared data was killed, perhaps for lack of memory; "
                         "try --workers=1") from None
    finally:
        for store, i in running.values():          # nothing stays of what failed
            store.clear(i)
        for store in todo:
            with suppress(OSError):                # not empty
                store.folder.rmdir()
    print(f"prepared {sum(s.made for s in todo):,.0f} tokens in {time.time() - begin:.0f} s")
    return stores


def announce(share: dict[Store, float], tokenizer, data_dir: Path, workers: int) -> None:
    """Say how long and how large it will be, by a sample of each domain. ValueError if the disk is
    too small."""
    tokens, seconds = sum(max(0, min(n, s.most) - s.made) for s, n in share.items()), 0.0
    for store, n in share.items():
        texts, made = filter(str.strip, store.units[0]()), 0
        next(texts, None)                          # comes late: files are listed, modules imported
        begin = time.time()
        for text in texts:
            made += len(encode_document(tokenizer, text))
            if time.time() - begin > 0.2:
                break
        seconds += (time.time() - begin) / max(made, 1) * max(0, n - store.made)
    size = tokens * (2 if tokenizer.n_vocab <= 2**16 else 4)
    print(f"preparing {', '.join(s.domain for s in share)}: about {tokens:,.0f} tokens, "
          f"{size / 1e6:,.1f} MB in {data_dir}/, {seconds / workers:.0f} s on {workers} processes")
    folder = next(f for f in [data_dir, *data_dir.absolute().parents] if f.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"{data_dir} has {free / 1e9:,.1f} GB free; the data needs "
                         f"{size / 1e9:,.1f} GB: free some or choose another --data_dir")


def progress(text: str = "") -> None:
    """A line that replaces itself on a terminal, and that is left out elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{text:70s}", end="" if text else "\r", file=sys.stderr, flush=True)


# ---- the curriculum

class Plan:
    """What every step reads, from the config alone.

    domains: name -> (source, first share, last share), shares as fractions of the tokens. Between
    first and last the mixture is linear in tokens; `mixture`, a list of [fraction of the run,
    {name: share}], puts other knots in their place (before the first and after the last it is
    constant). caps: name -> largest share; what is above goes to the others in proportion.
    batch_tokens and seq_len: a number, or knots [[tokens seen, number], ...] that hold from the
    first step after them. The run ends at max_steps or at max_tokens, whichever comes first.
    ValueError for what cannot be.

    Per step t: seq_len[t], which is the context[t] that FLOPs are counted for, rows[t], tokens[t]
    seen before it (at the end: in all), shares[t, d]; the batch takes domain d's sequences
    first[t, d] to last[t, d] - 1, counted from the last change of sequence length."""

    def __init__(self, domains: dict, *, batch_tokens, seq_len, max_steps: int | None = None,
                 max_tokens: int | None = None, mixture: list | None = None,
                 caps: dict | None = None):
        if not (max_steps or max_tokens):
            raise ValueError("nothing ends the run: set max_steps or max_tokens")
        self.names, lengths = list(domains), knots("seq_len", seq_len)
        batches = knots("batch_tokens", batch_tokens)
        if any(a[1] > b[1] for a, b in zip(lengths, lengths[1:])):
            raise ValueError(f"seq_len={seq_len}: the length may rise, not fall")
        self.seq_len, self.rows, self.tokens = [], [], [0]
        steps, end = max_steps or math.inf, max_tokens or math.inf
        while len(self.rows) < steps and self.tokens[-1] < end:
            T, B = (max(knot for knot in kind if knot[0] <= self.tokens[-1])[1]
                    for kind in (lengths, batches))
            if B < T:
                raise ValueError(f"batch_tokens={B} holds no sequence of seq_len={T}; raise it")
            self.seq_len.append(T)
            self.rows.append(B // T)
            self.tokens.append(self.tokens[-1] + B // T * T)
        self.steps, self.context = len(self.rows), self.seq_len
        self.shares = self._shares(domains, mixture, caps or {})

    def _shares(self, domains: dict, mixture: list | None, caps: dict) -> np.ndarray:
        """(steps, D)"""
        for name, domain in domains.items():
            if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
                raise ValueError(f"domain {name!r}: its name must be letters, digits, '_', '-' and "
                                 "'.', as a folder is named after it")
            if not (isinstance(domain, (list, tuple)) and len(domain) == 3
                    and isinstance(domain[0], str) and all(map(is_share, domain[1:]))):
                raise ValueError(f"domain {name!r} must be (source, first share, last share), "
                                 f"none negative, not {domain}")
        if mixture is None:
            mixture = [(p, {n: d[i] for n, d in domains.items()}) for p, i in ((0, 1), (1, 2))]
        if not (mixture and all(isinstance(k, (list, tuple)) and len(k) == 2 and is_share(k[0])
                                and isinstance(k[1], dict) for k in mixture)):
            raise ValueError(f"mixture={mixture} must be [[fraction of the run, {{name: share}}], "
                             "...]")
        for p, shares in mixture:
            if not (shares.keys() <= domains.keys() and all(map(is_share, shares.values()))
                    and abs(sum(shares.values()) - 1) <= 1e-6):
                raise ValueError(f"the shares at {p} of the run must be of {', '.join(domains)}, "
                                 f"none negative, and sum to 1, not {shares}")
        places = [p for p, _ in mixture]
        if places != sorted(places) or places[-1] > 1:
            raise ValueError(f"mixture: the places {places} must rise from 0 to 1")
        at = np.array(self.tokens[:-1]) / self.tokens[-1]
        shares = np.stack([np.interp(at, places, [m.get(name, 0) for _, m in mixture])
                           for name in self.names], axis=1)
        shares /= shares.sum(1, keepdims=True)     # 1e-6 of a long run are many sequences
        if not (caps.keys() <= domains.keys() and all(map(is_share, caps.values()))):
            raise ValueError(f"caps={caps} must be {{name: largest share}} of "
                             f"{', '.join(domains)}")
        cap = np.array([caps.get(name, 1) for name in self.names])
        for _ in self.names:                       # spreading may lift another above its cap
            over = (shares - cap).clip(0).sum(1, keepdims=True)
            shares = shares.clip(max=cap)
            room = np.where(shares < cap, shares, 0)
            shares += over * room / room.sum(1, keepdims=True).clip(1e-12)
        short = np.abs(shares.sum(1) - 1) > 1e-9
        if short.any():
            raise ValueError(f"caps={caps} leave too little room at step {short.argmax()}; raise "
                             "a cap or give another domain a share there")
        return shares

    @cached_property
    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(first, last), each (steps, D). A domain may lead or lag its quota of tokens by less than
        a sequence. So what lags a whole sequence comes now, and the rest of the batch is, of the
        domains that do not lead yet, those that would lag a whole sequence soonest: the earliest
        deadline first. (The largest lag first fails if shares change fast.)"""
        taken, first = np.zeros((2, self.steps, len(self.names)), dtype=np.int64)
        quota = (self.shares * np.diff(self.tokens)[:, None]).cumsum(0)
        columns, seen = list(quota.T.copy()), np.zeros(len(self.names), dtype=np.int64)
        for t, (T, rows) in enumerate(zip(self.seq_len, self.rows)):
            lag = (quota[t] - seen) / T
            take = np.floor(lag + 1e-6).astype(np.int64).clip(0)
            rest = rows - int(take.sum())
            if rest > 0:
                soon = [q.searchsorted(x) for q, x in zip(columns, seen + (take + 1) * T)]
                soon = np.where(lag - take > 1e-6, soon, self.steps + 1)
                take[np.lexsort((take - lag, soon))[:rest]] += 1
            for _ in range(-rest):                 # two lags became whole at once: one may wait
                take[np.where(take > 0, lag - take, np.inf).argmin()] -= 1
            taken[t], seen = take, seen + take * T
            if t and T == self.seq_len[t - 1]:
                first[t] = first[t - 1] + taken[t - 1]
        return first, first + taken

    @property
    def first(self) -> np.ndarray:
        return self._counts[0]

    @property
    def last(self) -> np.ndarray:
        return self._counts[1]

    def need(self) -> dict[str, int]:
        """Tokens of each domain that one reading takes: its quota, 2% for the shards' ends, and two
        sequences."""
        spent = (self.shares * np.diff(self.tokens)[:, None]).sum(0)
        return {n: int(1.02 * s) + 2 * max(self.seq_len) for n, s in zip(self.names, spent)}

    def table(self, stores: dict[str, Store] | None = None) -> str:
        """The mixture at ten points of the run; per domain, tokens needed, tokens there, epochs."""
        width = max(9, *map(len, self.names)) + 1
        lines = ["run     step        tokens  length   rows"
                 + "".join(f"{name:>{width}s}" for name in self.names)]
        for i in range(10):
            t = round(i * (self.steps - 1) / 9)
            lines.append(f"{i / 9:4.0%} {t:7,d} {self.tokens[t]:13.4g} {self.seq_len[t]:7,d} "
                         f"{self.rows[t]:6,d}" + "".join(f"{x:{width}.1%}" for x in self.shares[t]))
        rows = {"needed": (self.shares * np.diff(self.tokens)[:, None]).sum(0)}
        if stores is not None:
            need = self.need()
            rows["there"] = np.array([sum(s.tokens for s in stores[n].shards("train", need[n]))
                                      for n in self.names])
            rows["epochs"] = rows["needed"] / rows["there"]
        lines += [f"{key:41s}" + "".join(f"{x:{width}.4g}" for x in row)
                  for key, row in rows.items()]
        return "\n".join(lines)


def is_share(x) -> bool:
    return type(x) in (int, float) and 0 <= x < math.inf


def knots(key: str, value) -> list[tuple[int, int]]:
    """A number, or [[tokens, number], ...] from 0 on -> knots. ValueError otherwise."""
    pairs = [(0, value)] if type(value) is int else value
    if not (isinstance(pairs, (list, tuple)) and pairs
            and all(isinstance(p, (list, tuple)) and [*map(type, p)] == [int, int] and p[1] > 0
                    for p in pairs)
            and pairs[0][0] == 0 and all(a[0] < b[0] for a, b in zip(pairs, pairs[1:]))):
        raise ValueError(f"{key}={value} must be a positive number, or [[0, number], [tokens, "
                         "number], ...] with rising tokens")
    return [tuple(p) for p in pairs]


# ---- batches

def key_of(*what) -> bytes:
    return hashlib.blake2b(repr(what).encode(), digest_size=48).digest()


def permute(i: np.ndarray, n: int, key: bytes) -> np.ndarray:
    """Where a permutation of 0 ... n - 1, chosen by key (48 bytes), takes each of i. Six Feistel
    rounds on an even number of bits, walked until inside n: nothing is stored, whatever n is."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask, rounds = (np.uint64(1) << half) - np.uint64(1), np.frombuffer(key, "<u8")
    out, outside = i.astype(np.uint64), np.ones(len(i), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for k in rounds:
            x = (right + k) * np.uint64(0xBF58476D1CE4E5B9)    # the mixing of SplitMix64
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((x >> np.uint64(31)) & mask)
        out[outside] = (left << half) | right
        outside = out >= n
    return out.astype(np.int64)


class Corpus:
    """The batches of a plan over prepared stores. The state is one integer, the step. ValueError
    for a shard that is damaged and for shards too short for the sequences."""

    def __init__(self, plan: Plan, stores: dict[str, Store], seed: int):
        self.plan, self.seed, self.ends, need = plan, seed, {}, plan.need()
        self.train = {n: stores[n].shards("train", need[n]) for n in plan.names}
        self.val = {n: stores[n].shards("val", need[n]) for n in plan.names}
        T = max(plan.seq_len)
        for name, shards in self.train.items():
            whole, there = T * sum(s.sequences(T) for s in shards), sum(s.tokens for s in shards)
            if 2 * whole < there:                  # the ends of shards are never read
                raise ValueError(f"domain {name!r}: of {there:,d} tokens in {len(shards)} shards "
                                 f"only {whole:,d} fill sequences of {T}; lower seq_len or give it "
                                 "longer text")

    def fingerprint(self) -> str:
        """Of the shards that the run reads."""
        checksums = [s.checksum for shards in self.train.values() for s in shards]
        return hashlib.sha256(b"".join(checksums)).hexdigest()[:16]

    def targets(self, step: int) -> int:
        """Targets in the step's global batch."""
        return self.plan.rows[step] * self.plan.seq_len[step]

    def rows(self, step: int) -> list[tuple[str, int]]:
        """(domain, sequence) of every row of the global batch. Within an epoch of a domain each of
        its sequences comes once."""
        T, rows = self.plan.seq_len[step], []
        for name, a, b in zip(self.plan.names, self.plan.first[step], self.plan.last[step]):
            n = int(self._ends(self.train[name], T)[-1])
            for epoch in range(a // n, (b - 1) // n + 1 if b > a else 0):
                i = np.arange(max(a, epoch * n), min(b, (epoch + 1) * n)) - epoch * n
                rows += [(name, j) for j in permute(i, n, key_of(self.seed, name, T, epoch))]
        order = permute(np.arange(len(rows)), len(rows), key_of(self.seed, "order", step))
        return [rows[i] for i in order]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Rows rank, rank + world, ... of the step's global batch: (rows, T + 1) int64."""
        T, rows = self.plan.seq_len[step], self.rows(step)[rank::world]
        out = np.empty((len(rows), T + 1), dtype=np.int64)
        for row, (name, i) in zip(out, rows):
            row[:] = self._read(self.train[name], i, T)
        return out

    def validation(self, name: str, tokens: int, T: int) -> np.ndarray:
        """`tokens` held-out tokens of a domain, or all, spread evenly over its held-out part (whose
        first documents are prefaces): (rows, T + 1) int64. ValueError if there is no sequence."""
        there = int(self._ends(self.val[name], T)[-1])
        n = min(there, max(1, tokens // T))
        if n == 0:
            raise ValueError(f"domain {name!r} holds out no sequence of {T} tokens (of every "
                             f"{HOLD_OUT} documents one); lower seq_len or give it more documents")
        rows = [self._read(self.val[name], i * there // n, T) for i in range(n)]
        return np.stack(rows).astype(np.int64)

    def _ends(self, shards: list[Shard], T: int) -> np.ndarray:
        """How many sequences the first 1, 2, ... shards hold."""
        key = id(shards), T
        if key not in self.ends:
            self.ends[key] = np.cumsum([shard.sequences(T) for shard in shards])
        return self.ends[key]

    def _read(self, shards: list[Shard], i: int, T: int) -> np.ndarray:
        ends = self._ends(shards, T)
        k = int(ends.searchsorted(i, side="right"))
        return shards[k].read(i - (int(ends[k - 1]) if k else 0), T)


# ---- conversations

def encode_chat(tokenizer: tiktoken.Encoding, messages: list[dict]) -> tuple[list, list]:
    """Messages [{"role": ..., "content": ...}, ...] -> ids and targets, equally many: targets[i] is
    the token after ids[i] where that is an assistant's or its end of turn, else -1. The family's
    turn format,

        <|beginoftext|> <|startofturn|><|{role}|>\n\n{content}<|endofturn|> ... <|endoftext|>

    whose last token follows the last id. "\\n\\n" and content are encoded apart, as a reply comes
    after a prompt that ends there. A special token's spelling is plain text. ValueError, one line,
    for no conversation or a tokenizer without the format's tokens."""
    check_chat(messages)
    ids, learnt = spell(tokenizer, messages)
    after = [*ids[1:], special(tokenizer, END)]
    return ids, [i if said else -1 for i, said in zip(after, [*learnt[1:], False])]


def encode_prompt(tokenizer: tiktoken.Encoding, messages: list[dict]) -> list[int]:
    """Ids up to where the assistant's reply to these messages begins."""
    return spell(tokenizer, messages)[0] + begin_turn(tokenizer, "assistant")


def spell(tokenizer: tiktoken.Encoding, messages: list[dict]) -> tuple[list, list]:
    """Begin of text and turns -> ids, and of each whether an assistant says it."""
    ids, learnt = [special(tokenizer, BEGIN)], [False]
    for m in messages:
        head = begin_turn(tokenizer, m["role"])
        body = [*tokenizer.encode_ordinary(m["content"]), special(tokenizer, TURN_END)]
        ids += head + body
        learnt += [False] * len(head) + [m["role"] == "assistant"] * len(body)
    return ids, learnt


def begin_turn(tokenizer: tiktoken.Encoding, role: str) -> list[int]:
    return [special(tokenizer, TURN), special(tokenizer, ROLES[role]),
            *tokenizer.encode_ordinary("\n\n")]


def special(tokenizer: tiktoken.Encoding, token: str) -> int:
    if token not in tokenizer._special_tokens:
        raise ValueError(f"tokenizer {tokenizer.name} lacks the turn format's {token}; load it by "
                         "load_tokenizer, which adds it")
    return tokenizer._special_tokens[token]


def check_chat(messages) -> None:
    """ValueError if this is no conversation from which there is something to learn."""
    before = None
    for i, m in enumerate(messages, 1):
        role, content = (m.get(key) if isinstance(m, dict) else None for key in ("role", "content"))
        if role not in ROLES:
            raise ValueError(f"message {i} has the unknown role {role!r}; it must be one of "
                             f"{', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {i}, the {role}'s, has no content; drop this conversation")
        if any("\ud800" <= letter <= "\udfff" for letter in content):
            raise ValueError(f"message {i}, the {role}'s, has half of a surrogate pair, which is "
                             "no letter; mend or drop it")
        if role == before == "assistant":
            raise ValueError(f"messages {i - 1} and {i} are both the assistant's; join them")
        before = role
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no turn is the assistant's; drop this conversation")


def fit_chat(tokenizer: tiktoken.Encoding, messages: list[dict], T: int):
    """encode_chat of all turns up to an assistant's last one or, where they are more than T tokens,
    up to an earlier one -> ids, targets, whether it was cut; None if not even the first fits."""
    ends = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant"]
    for end in reversed(ends):
        ids, targets = encode_chat(tokenizer, messages[:end])
        if len(ids) <= T:
            return ids, targets, end < ends[-1]
    return None


def chats(source: str):
    """The conversations of a source, lists of messages. ValueError, naming the place, for one that
    is none, and for a source that cannot be: it is
        builtin:help  builtin:skills?n=1000  builtin:chains?n=1000&steps=2-4&seed=1     see below
        talks/*.jsonl?messages=turns        local files, or Hub datasets, as for documents, but
        owner/name?name=CONFIG&split=train  with a column of messages"""
    place, _, query = source.partition("?")
    options, local = dict(parse_qsl(query, keep_blank_values=True)), place.endswith(READABLE)
    kind, column = place.removeprefix("builtin:"), options.get("messages", "messages")
    if place.startswith("builtin:"):
        if kind not in CHATS:
            raise ValueError(f"source {source!r}: builtin conversations are {', '.join(CHATS)}")
        make, known = CHATS[kind]
        check_options(source, options, known)
        yield from make(**{key: span(source, key, value) for key, value in options.items()})
    elif local:
        check_options(source, options, ["messages"])
        for path in local_files(place):
            if path.suffix == ".parquet":
                yield from read_each(path, parquet_rows(path), partial(chat_of, column))
            else:
                yield from read_each(path, full_lines(path),
                                     lambda line: chat_of(column, json.loads(line)))
    elif place.count("/") == 1 and not os.path.exists(place):
        check_options(source, options, ["messages", "name", "split"])
        yield from read_each(place, hub_rows(place, options), partial(chat_of, column))
    else:
        raise ValueError(f"source {source!r} is neither builtin:..., files ending in "
                         f"{', '.join(READABLE[:3])}, nor a dataset owner/name of the Hub")


def full_lines(path: Path):
    """(place, line) of the lines of a file that are not blank."""
    return (x for x in lines_of(path, 0, path.stat().st_size) if x[1].strip())


def hub_rows(name: str, options: dict):
    for i, row in enumerate(open_hub(name, options)):
        yield f"row {i}", row


def span(source: str, key: str, value: str) -> tuple[int, int]:
    """"3" -> (3, 3); "2-4" -> (2, 4)"""
    numbers = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", value)
    if (not numbers or int(numbers[1]) > int(numbers[2] or numbers[1])
            or key != "steps" and numbers[2]):
        raise ValueError(f"source {source!r}: {key}={value} must be a number"
                         + (" or two, as in 2-4" if key == "steps" else ""))
    return int(numbers[1]), int(numbers[2] or numbers[1])


def chat_of(column: str, row) -> list[dict]:
    """The conversation in a row."""
    messages = row.get(column) if isinstance(row, dict) else None
    if not isinstance(messages, list):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"no list of messages in {column!r}; it has {has}, and needs {column!r}: "
                         "[{'role': 'user', 'content': '...'}, ...], or ?messages=COLUMN")
    check_chat(messages)
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# ---- packing

class Conversations:
    """Encoded conversations, end to end, in two files of a folder, of which one is mapped.
    ValueError if they are damaged."""

    def __init__(self, path: Path):
        try:
            self.tokens = np.load(path / "tokens.npy", "r")         # (2, N): ids, targets
            self.ends, self.learnt = np.load(path / "ends.npy")     # (n,): ends, targets of each
        except (OSError, ValueError, EOFError) as e:
            raise ValueError(f"{path} is damaged ({one_line(e)}); delete {path.parent} and run "
                             "again") from None
        self.lengths = np.diff(self.ends, prepend=0)

    @staticmethod
    def save(path: Path, encoded: list[tuple[list, list]]) -> None:
        path.mkdir()
        ends = np.cumsum([len(ids) for ids, _ in encoded])
        learnt = [sum(t >= 0 for t in targets) for _, targets in encoded]
        for name, array in ("tokens", np.stack([np.concatenate(
                [np.array(e[k], "<i4") for e in encoded]) for k in (0, 1)])), (
                "ends", np.array([ends, learnt], "<i8")):
            with open(path / f"{name}.npy", "wb") as f:
                np.save(f, array)
                f.flush()
                os.fsync(f.fileno())

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[:, self.ends[i] - self.lengths[i]:self.ends[i]]


def pack(lengths: np.ndarray, T: int) -> list[list[int]]:
    """Best fit, longest first: every item goes where it leaves least room, in a row of at most T ->
    the items of each row. At most about 11/9 of the fewest rows there can be (Johnson et al. 1974),
    and hardly more than those where many items are short."""
    rows, rooms, open_rows = [], [], {}            # rooms: sorted keys of open_rows, room -> rows
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        at = bisect_left(rooms, n)
        if at == len(rooms):
            rows.append(row := [])
            left = T - n
        else:
            left, row = rooms[at] - n, open_rows[rooms[at]].pop()
            if not open_rows[rooms[at]]:
                del open_rows[rooms.pop(at)]
        row.append(i)
        if left and left not in open_rows:
            insort(rooms, left)
        if left:
            open_rows.setdefault(left, []).append(row)
    return rows


def fill(rows: list[list[np.ndarray]], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of conversations -> ids, targets and documents, each (rows, T) int64. What is left of a
    row is a document of its own, without targets."""
    ids, targets, documents = np.full((3, len(rows), T), [[[0]], [[-1]], [[-1]]])
    for r, row in enumerate(rows):
        at = 0
        for k, talk in enumerate(row):
            part = slice(at, at := at + talk.shape[1])
            ids[r, part], targets[r, part] = talk
            documents[r, part] = k
    return ids, targets, documents


REPEATS = 4                             # how often an epoch may read a conversation [ours]


class Packed:
    """Conversations as a stream for pretrain.train: an epoch takes as many tokens as there are,
    of each domain its share (weights, in proportion), but none more than REPEATS times. Within a
    reading of a domain each conversation comes once. Everything follows from the arguments, so that
    the state is one integer, the step. ValueError for no conversation."""

    def __init__(self, train: dict[str, Conversations], weights: dict[str, float], *, T: int,
                 batch_tokens: int, epochs: int, seed: int):
        self.train, self.T, self.seed = train, T, seed
        names, there = list(train), [int(t.ends[-1]) for t in train.values()]
        self.batches, whole = [], sum(weights.values())    # [[row, ...], ...]
        quota = [min(weights[n] / whole * sum(there), REPEATS * t) for n, t in zip(names, there)]
        orders = [self._order(n, epochs * q) for n, q in zip(names, quota)]
        for e in range(epochs):
            talks = []                             # (domain, conversation)
            for d, (order, middles) in enumerate(orders):
                a, b = middles.searchsorted([e * quota[d], (e + 1) * quota[d]])
                talks += [(d, i) for i in order[a:b].tolist()]
            lengths = np.array([train[names[d]].lengths[i] for d, i in talks], dtype=np.int64)
            rows = [[talks[k] for k in row] for row in pack(lengths, T)]
            self.batches += self._deal(rows, max(1, batch_tokens // T), e) if rows else []
        if not self.batches:
            raise ValueError("there is no conversation to train on; give more data")
        self._plan(names)

    def _order(self, name: str, tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """Conversations, one reading after the other, and where the middle of each is, in
        tokens."""
        n, lengths = len(self.train[name].lengths), self.train[name].lengths
        readings = math.ceil(tokens / lengths.sum() + 1e-9)
        order = np.concatenate([permute(np.arange(n), n, key_of(self.seed, name, k))
                                for k in range(readings)])
        return order, lengths[order].cumsum() - lengths[order] / 2

    def _deal(self, rows: list, most: int, epoch: int) -> list[list]:
        """Rows -> batches of at most so many, nearly equal. Packing puts rows of long conversations
        first, and with them whole domains; so of n neighbours each of the n batches gets one."""
        n = -(-len(rows) // most)
        batches = [[] for _ in range(n)]
        for i in range(0, len(rows), n):
            group = rows[i:i + n]
            hand = permute(np.arange(len(group)), n, key_of(self.seed, "rows", epoch, i))
            for b, row in zip(hand, group):
                batches[b].append(row)
        return batches

    def _plan(self, names: list[str]) -> None:
        """What Plan has. Tokens are those of conversations, and the context is the one that costs
        as many FLOPs as they do."""
        spent = np.zeros((2, len(self.batches), len(names)), dtype=np.int64)
        for t in range(len(self.batches)):
            for d, i in self.talks(t):
                spent[:, t, d] += self.train[names[d]].lengths[i] ** np.array([1, 2])
        tokens = spent[0].sum(1)
        self.plan = SimpleNamespace(
            names=names, steps=len(tokens), seq_len=[self.T] * len(tokens),
            rows=[*map(len, self.batches)], tokens=[0, *tokens.cumsum().tolist()],
            context=(spent[1].sum(1) // tokens).tolist(), shares=spent[0] / tokens[:, None])

    def talks(self, step: int) -> list[tuple[int, int]]:
        """(domain, conversation) of all in the step's global batch."""
        return [talk for row in self.batches[step] for talk in row]

    def targets(self, step: int) -> int:
        """Tokens of assistants in the step's global batch."""
        names = self.plan.names
        return sum(int(self.train[names[d]].learnt[i]) for d, i in self.talks(step))

    def batch(self, step: int, rank: int = 0, world: int = 1):
        """Rows rank, rank + world, ... of the step's global batch, as `fill` gives them."""
        return fill([[self.train[self.plan.names[d]][i] for d, i in row]
                     for row in self.batches[step][rank::world]], self.T)

    @property
    def padding(self) -> float:
        """Share of the rows that is none of the conversations."""
        return 1 - self.plan.tokens[-1] / (sum(self.plan.rows) * self.T)

    def fingerprint(self) -> str:
        """Of the conversations."""
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        whole = hashlib.sha256()
        for talks in self.train.values():
            whole.update(talks.tokens)
            whole.update(talks.ends)
        return whole.hexdigest()[:16]


def held_out_rows(talks: Conversations, tokens: int, T: int):
    """Of the held-out conversations some that have so many tokens, or one, from all over them,
    packed, as `fill` gives them."""
    n = len(talks.lengths)
    order = permute(np.arange(n), n, key_of("held out"))
    order = order[:max(1, int(talks.lengths[order].cumsum().searchsorted(tokens, side="right")))]
    return fill([[talks[order[k]] for k in row] for row in pack(talks.lengths[order], T)], T)


# ---- text that any Python installation holds

LIBRARY_UNITS = 8


@cache
def module_files(root: Path) -> list[Path]:
    left_out = {"site-packages", "test", "tests", "idle_test", "_bundled", "pydoc_data",
                "encodings"}
    return [f for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]


def modules(first: int, every: int):
    """(name, text, syntax tree) of each `every`-th module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = module_files(root)
    if not files:
        raise ValueError(f"this Python has no library sources in {root}")
    for file in files[first::every]:
        text = file.read_text(encoding="utf-8", errors="replace")
        with suppress(SyntaxError):                # lib2to3 keeps Python 2 files
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__"), text, ast.parse(text)


def documented(tree: ast.Module):
    """Its nodes that have a docstring."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (n for n in ast.walk(tree) if isinstance(n, owners) and ast.get_docstring(n))


def library(kind: str, unit: int):
    """Documents of the standard library, a module each: its source without the docstrings (code),
    or its docstrings and the topics of Python's own help (language). No docstring is in both."""
    if kind == "language":
        from pydoc_data.topics import topics
        yield from [text for _, text in sorted(topics.items())][unit::LIBRARY_UNITS]
    for _, text, tree in modules(unit, LIBRARY_UNITS):
        found = [node.body[0] for node in documented(tree) if len(node.body) > 1]
        if kind == "language":
            texts = [inspect.cleandoc(node.value.value) for node in found]
            yield "\n\n".join(t for t in texts if len(t) > 120)
        else:
            hidden = {i for node in found for i in range(node.lineno, node.end_lineno + 1)}
            lines = enumerate(text.split("\n"), 1)  # not splitlines, which also cuts at form feeds
            yield "\n".join(line for i, line in lines if i not in hidden)


# ---- worked problems

# The numbers decide the steps, and every line follows from the lines above it.

def problems(kind: str, unit: int):
    """PROBLEMS_PER_UNIT documents of math or science, always the same."""
    rng = random.Random(f"{kind} {unit}")
    for _ in range(PROBLEMS_PER_UNIT):
        yield PROBLEMS[kind](rng)


# Stories, their quantities "name symbol (unit) low..high" and formulas as products of powers. One
# without a range follows from the formulas in their order, so all agree; low = high is a constant.
SCENES = """\
A [trolley|sledge|toy train] starts from rest under a constant net force: mass m (kg) 0.2..40;
time t (s) 2..9; acceleration a (m/s^2) 0.3..4; net force F (N); speed v (m/s); distance d (m);
momentum p (kg*m/s); kinetic energy E (J); average power P (W); F = m a; v = a t; p = m v; p = F t;
d = 2^-1 a t^2; d = 2^-1 v t; E = 2^-1 m v^2; E = F d; P = E t^-1
A spring launches a [puck|toy car|wooden block] across a smooth table: stiffness k (N/m) 50..900;
compression x (m) 0.02..0.2; mass m (kg) 0.05..2; greatest force F (N); energy E (J); launch speed v
(m/s); momentum p (kg*m/s); F = k x; E = 2^-1 k x^2; E = 2^-1 F x; E = 2^-1 m v^2; p = m v
A [lamp|heater|resistor] is connected to a [battery|power supply]: voltage U (V) 3..24; resistance
R (ohm) 5..200; time t (s) 20..900; current I (A); power P (W); charge q (C); energy E (J);
I = U R^-1; P = U I; P = I^2 R; P = U^2 R^-1; q = I t; E = P t; E = q U
A laser shines [at a wall|into a fibre|on a lens]: wavelength L (m) 3e-7..9.9e-7; power P (W)
0.001..0.02; speed of light c (m/s) 3e8..3e8; Planck constant h (J*s) 6.63e-34..6.63e-34; frequency
f (Hz); photon energy E (J); photon rate N (1/s); f = c L^-1; E = h f; E = h c L^-1; N = P E^-1
An electric [kettle|urn|boiler] heats water without loss: volume V (m^3) 0.0003..0.002; power P (W)
500..2400; density r (kg/m^3) 1000..1000; specific heat c (J/(kg*K)) 4180..4180; mass m (kg); heat
Q (J); temperature rise H (K) 10..75; time t (s); m = r V; Q = m c H; t = Q P^-1
A sealed [flask|cylinder|tank] holds a gas: pressure p (Pa) 9e4..4e5; volume V (m^3) 0.002..0.06;
temperature T (K) 270..400; gas constant R (J/(mol*K)) 8.31..8.31; molar mass M (g/mol) 4..44;
amount n (mol); mass m (g); density r (g/m^3); n = p V R^-1 T^-1; m = n M; r = m V^-1"""
UNITS = {  # others in which a quantity may be given
    "kg": {"g": 1e-3}, "m": {"cm": 1e-2, "nm": 1e-9}, "m/s": {"km/h": 1 / 3.6}, "s": {"min": 60},
    "m^3": {"L": 1e-3}, "J": {"kJ": 1e3}, "W": {"mW": 1e-3}, "A": {"mA": 1e-3}, "Pa": {"kPa": 1e3}}


def num(x):
    """Four significant digits: 0.0125, 48300, 6.63e-34."""
    return f"{float(f'{x:.4g}'):g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def vary(rng, text):
    """A grammar in brackets: every [this|that] becomes one of its alternatives."""
    return re.sub(r"\[([^][]+)\]", lambda match: rng.choice(match[1].split("|")), text)


def total(*terms):
    """A sum of (coefficient, symbol) terms as one writes it: 3x^2 - x + 5."""
    text = ""
    for k, symbol in terms:
        size = "" if symbol and abs(k) == 1 else abs(k)
        text += f" {'-' if k < 0 else '+'} {size}{symbol}" if k else ""
    return text[3:] if text[:2] == " +" else "-" + text[3:] if text else "0"


def read_scene(text):
    """A scene -> story, {symbol: (name, unit, range)}, [{symbol: power}: the product is 1]."""
    story, *entries = re.split(": |; ", text.replace("\n", " "))
    quantities, formulas = {}, []
    for entry in entries:
        if "=" in entry:
            (left, _), *right = re.findall(r"(\w)(?:\^(\S+))?", entry)
            formulas.append({s: int(p or 1) for s, p in right} | {left: -1})  # 1 = F^-1 m a
        else:
            name, s, unit, span = re.match(r"(.+) (\w) \((\S+)\) ?(.*)", entry).groups()
            quantities[s] = name, unit, [float(x) for x in span.split("..") if x]
    return story, quantities, formulas


SCENES = [read_scene(text) for text in re.split(r"\n(?=An? )", SCENES)]


def isolate(powers, symbol, known):
    """Solve a formula for one of its symbols -> the text of the solution and its value."""
    sides, value, sign = ([], []), 1.0, -1 if powers[symbol] > 0 else 1
    for s, p in powers.items():
        if s != symbol:
            sides[p * sign < 0].append(s if abs(p) == 1 else f"{s}^{abs(p)}")
            value *= known[s] ** (p * sign)
    top, bottom = (" * ".join(side) for side in sides)
    text = (top or "1") + (f" / ({bottom})" if "*" in bottom else f" / {bottom}" if bottom else "")
    return (f"sqrt({text})", value**0.5) if abs(powers[symbol]) == 2 else (text, value)


def science_problem(rng):
    """A walk over a scene's formulas: each step finds a quantity that the next step needs."""
    story, quantities, formulas = rng.choice(SCENES)
    world = {"2": 2} | {s: rng.uniform(*span) for s, (_, _, span) in quantities.items() if span}
    for powers in formulas:
        for s in [s for s in powers if s not in world]:
            world[s] = isolate(powers, s, world)[1]
    known, given, steps, goal = {"2": 2}, [], [], None
    for _ in range(rng.choice((1, 2, 2, 3, 3, 3))):
        moves = [(powers, s) for powers in formulas if goal in (None, *powers) for s in powers
                 if s not in known and len(set(quantities[s][2])) != 1]
        if not moves:
            break
        powers, goal = rng.choice(moves)
        for s in [s for s in powers if s != goal and s not in known]:
            name, unit, _ = quantities[s]
            units = {unit: 1, **UNITS.get(unit, {})}
            said = rng.choice([u for u in units if 1 <= world[s] / units[u] < 1000] or [unit])
            amount = num(float(f"{world[s] / units[said]:.3g}"))
            known[s] = float(num(float(amount) * units[said]))
            given.append(f"the {name} {s} is {amount} {said}")
            if said != unit:
                steps.append(f"{s} = {amount} {said} = {num(known[s])} {unit}")
        name, unit, _ = quantities[goal]
        left = list(powers)[-1]
        text, value = isolate(powers, goal, known)
        numbers = re.sub(r"\b[A-Za-z]\b", lambda match: num(known[match[0]]), text)
        because = "" if goal == left else f"From {left} = {isolate(powers, left, world)[0]}: "
        steps.append(f"{because}{goal} = {text} = {numbers} = {num(value)} {unit}")
        known[goal] = float(num(value))
    facts = ", ".join(given[:-1]) + " and " * (len(given) > 1) + given[-1]
    ask = f"[Find|Calculate|Work out|Determine] the {name} {goal}."
    story += rng.choice((f". Here {facts}. {ask}", f". {ask} It is known that {facts}."))
    return "\n".join([vary(rng, story), *steps, f"Answer: the {name} is {num(value)} {unit}"])


def euclid(rng):
    """The greatest common divisor, every remainder also as a combination of the two numbers."""
    k = rng.randint(1, 30)
    a, b = k * rng.randint(200, 600), k * rng.randint(90, 199)
    yield f"[Let|Take] a = {a}, b = {b}. Write their [gcd|greatest common divisor] as ma + nb."
    old, new = (a, 1, 0), (b, 0, 1)  # in every row (r, s, t), r = s * a + t * b
    while new[0]:
        q = old[0] // new[0]
        old, new, top = new, tuple(x - q * y for x, y in zip(old, new)), old[0]
        so = f", so {new[0]} = {total((new[1], 'a'), (new[2], 'b'))}" if new[0] else ""
        yield f"{top} = {q} * {old[0]} + {new[0]}{so}"
    yield f"Answer: {old[0]} = {total((old[1], 'a'), (old[2], 'b'))}"


def equation(rng):
    """A linear equation with brackets; the data decide if one, no or any x solves it."""
    digits = [k for k in range(-9, 10) if k]
    sides = [[rng.sample(digits, 3) for _ in range(rng.randint(1, 3))] for _ in range(2)]
    closed = (total(*((k, f"({total((a, 'x'), (b, ''))})") for k, a, b in side)) for side in sides)
    flat = (total(*(t for k, a, b in side for t in ((k * a, "x"), (k * b, "")))) for side in sides)
    (a, b), (c, d) = ([sum(part[0] * part[i] for part in side) for i in (1, 2)] for side in sides)
    yield f"[Solve|Find x if] {' = '.join(closed)}"
    yield f"[Open|Expand] the brackets: {' = '.join(flat)}"
    yield f"[Collect|Add like terms]: {total((a, 'x'), (b, ''))} = {total((c, 'x'), (d, ''))}"
    yield f"[Subtract|Take away] {total((c, 'x'), (b, ''))}: {total((a - c, 'x'))} = {d - b}"
    yield "Answer: " + (f"x = {Fraction(d - b, a - c)}" if a - c else "no x" if d - b else "any x")


def power(rng):
    """A power modulo n: every binary digit of the exponent is a step."""
    base, exponent, n = rng.randint(2, 60), rng.randint(9, 999), rng.randint(11, 97)
    yield f"[Find|Compute] {base}^{exponent} mod {n}. In binary, the exponent is {exponent:b}."
    rest = 1
    for digit in f"{exponent:b}":
        value = rest**2 * base ** int(digit)
        yield f"{digit}: {rest}^2{f' * {base}' * int(digit)} = {value} = {value % n} mod {n}"
        rest = value % n
    yield f"Answer: {rest}"


def decimal(rng):
    """A fraction as a decimal: long division until a remainder returns."""
    q = rng.choice((13, 17, 19, 21, 23, 26, 28, 29, 34, 35, 38, 39, 42))  # have long cycles
    p = q * rng.randint(1, 2000) + rng.randint(1, q - 1)
    yield f"[Write|Express] {p}/{q} as a decimal, [any cycle|recurring digits] in brackets."
    yield f"{p} = {q} * {p // q} + {p % q}"
    rest, digits, seen = p % q, "", {}
    while rest and rest not in seen:
        seen[rest] = len(digits)
        digits += str(10 * rest // q)
        yield f"{10 * rest} = {q} * {digits[-1]} + {10 * rest % q}"
        rest = 10 * rest % q
    start = seen.get(rest, len(digits))
    yield f"Answer: {p // q}.{digits[:start]}" + f"({digits[start:]})" * (rest > 0)


def spread(rng):
    """Median, mean and variance of a list."""
    data = [rng.randint(1, 40) for _ in range(rng.randint(4, 9))]
    data[0] += -sum(data) % len(data)  # so that the mean is whole
    n, rows = len(data), sorted(data)
    mean, median = sum(data) // n, Fraction(rows[(n - 1) // 2] + rows[n // 2], 2)
    squares = [(x - mean) ** 2 for x in rows]
    yield f"[Give|Find] the median, mean and variance of {', '.join(map(str, data))}."
    yield f"In order: {', '.join(map(str, rows))}. The median is {median}."
    yield f"The sum is {sum(data)}, so the mean is {sum(data)} / {n} = {mean}."
    yield f"The squared deviations {', '.join(map(str, squares))} add up to {sum(squares)}."
    yield f"Answer: median {median}, mean {mean}, variance {Fraction(sum(squares), n)}"


def math_problem(rng):
    """A procedure whose steps follow from its numbers."""
    return vary(rng, "\n".join(rng.choice((euclid, equation, power, decimal, spread))(rng)))


PROBLEMS = {"math": math_problem, "science": science_problem}


# ---- conversations that are made

DOCSTRING = 40, 500                     # characters of a first paragraph that is worth asking for


def help_chats(n: tuple[int, int] = (10**6, 10**6)):
    """What the standard library's docstrings say in their first paragraph, n of them, from all over
    it. Of several of one name the first."""
    def found():
        asked = set()
        for module, _, tree in (m for i in range(16) for m in modules(i, 16)):
            for node in documented(tree):
                name = getattr(node, "name", "")
                text = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
                if (DOCSTRING[0] <= len(text) <= DOCSTRING[1] and text.endswith(".")
                        and not name.startswith("_") and not module.startswith("_")):
                    what = f"{name} of {module}" if name else f"the module {module}"
                    ask = ("What does {} do?", "Explain {}.", "What is {} for?")[len(what) % 3]
                    if what in asked:
                        continue
                    asked.add(what)
                    yield [{"role": "user", "content": ask.format(what)},
                           {"role": "assistant", "content": text}]
    yield from islice(found(), n[1])


# A skill takes a value to another: (rng, value) -> what is asked, the work that shows it, the new
# value. A value is a number, a word, a list of numbers or a date, and so is what it can do next.

WORDS = """apple bridge candle dragon ember forest garden harbor island jacket kettle lantern marble
needle orange pepper quartz river silver tunnel umbrella valley window yellow zebra anchor button
copper dinner engine flower guitar hammer insect jungle kitten ladder mirror notebook""".split()
MEASURES = [("weeks", "days", 7), ("hours", "minutes", 60), ("metres", "centimetres", 100),
            ("dozens", "pieces", 12), ("minutes", "seconds", 60), ("years", "months", 12)]


def said(value) -> str:
    """A value in words: 12; lantern; 3, 1, 2; 4 March 2021."""
    if isinstance(value, datetime.date):
        return f"{value.day} {value:%B %Y}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def arithmetic(rng, x):
    k, sign = rng.randint(2, 12), rng.choice("+-*")
    value = {"+": x + k, "-": x - k, "*": x * k}[sign]
    ask = {"+": "[Add|Now add] {}", "-": "[Subtract|Take away] {}", "*": "Multiply by {}"}[sign]
    return ask.format(k), f"{x} {sign} {k} = {value}", value


def remainder(rng, x):
    k = rng.randint(3, 12)
    return (f"[Take|Find] the remainder after division by {k}",
            f"{x} = {k} * {x // k} + {x % k}, so the remainder is {x % k}", x % k)


def convert(rng, x):
    a, b, k = rng.choice(MEASURES)
    return (f"[Take it as|Read it as] {a} and convert it to {b}",
            f"{x} {a} = {x} * {k} {b} = {x * k} {b}", x * k)


def digits(rng, x):
    value = [int(d) for d in str(x)]
    return "[List|Write down] its digits", f"{x} has the digits {said(value)}", value


def loop(rng, x):
    n, sums = rng.randint(2, 4), [x]
    for i in range(n):
        sums.append(sums[-1] + i)
    return (f"Call it x and run `for i in range({n}): x += i`; what is x?",
            f"x is {' then '.join(map(str, sums))}", sums[-1])


def later(rng, x):
    start = datetime.date(rng.randint(2001, 2030), rng.randint(1, 12), rng.randint(1, 28))
    value = start + datetime.timedelta(days=x)
    return f"[Find|Give] the date so many days after {said(start)}", (
        f"{said(start)} + {x} days = {said(value)}"), value


def letters(rng, word):
    return "Count its letters", f"{' '.join(word)}: {len(word)} letters", len(word)


def vowels(rng, word):
    found = [c for c in word if c in "aeiou"]
    return "Count its vowels", f"{word} has {' '.join(found) or 'none'}: {len(found)}", len(found)


def backwards(rng, word):
    return ("[Reverse it|Spell it backwards]", f"{' '.join(word)} backwards is {word[::-1]}",
            word[::-1])


def alphabetic(rng, word):
    value = "".join(sorted(word))
    return "[Sort its letters|Put its letters in order]", f"{word} sorted is {value}", value


def cut(rng, word):
    n = rng.randint(1, 3)
    return f"Call it s and evaluate `s[{n}:]`", f"{word} without {word[:n]} is {word[n:]}", word[n:]


def in_order(rng, numbers):
    down = rng.random() < 0.5
    value = sorted(numbers, reverse=down)
    return (f"[Sort|Order] the numbers from {'large to small' if down else 'small to large'}",
            f"in order: {said(value)}", value)


def add_up(rng, numbers):
    return ("[Add them up|Find their sum]", f"{' + '.join(map(str, numbers))} = {sum(numbers)}",
            sum(numbers))


def largest(rng, numbers):
    pick, name = rng.choice(((max, "largest"), (min, "smallest")))
    return (f"[Take|Choose] the {name} of them", f"the {name} of {said(numbers)} is "
            f"{pick(numbers)}", pick(numbers))


def comprehend(rng, numbers):
    k = rng.randint(2, 5)
    value = [k * n for n in numbers]
    return (f"Call them a and evaluate `[{k} * n for n in a]`",
            f"{k} times each: {said(value)}", value)


def weekday(rng, date):
    return "[Name|Give] its day of the week", f"{said(date)} is a {date:%A}", f"{date:%A}".lower()


def fortnight(rng, date):
    k = rng.randint(2, 4)
    value = date + datetime.timedelta(weeks=k)
    return f"Go {k} weeks further", f"{said(date)} + {7 * k} days = {said(value)}", value


def day_of_year(rng, date):
    value = date.timetuple().tm_yday
    before = value - date.day
    return ("[Number|Count] the days of that year up to it",
            f"{before} before {date:%B}, then {date.day}: {value}", value)


SKILLS = {int: (arithmetic, arithmetic, remainder, convert, digits, loop, later),
          str: (letters, vowels, backwards, alphabetic, cut),
          list: (in_order, add_up, largest, comprehend),
          datetime.date: (weekday, fortnight, day_of_year)}


def fits(value) -> bool:
    """Whether it is small enough to go on with."""
    return 0 <= value < 10_000 if isinstance(value, int) else isinstance(
        value, datetime.date) or len(value) > 1


def start_value(rng):
    """What a chain starts with -> its name, the value."""
    return rng.choice((lambda: ("the number", rng.randint(10, 99)),
                       lambda: ("the word", rng.choice(WORDS)),
                       lambda: ("the numbers", [rng.randint(1, 50) for _ in range(4)]),
                       lambda: ("the date", datetime.date(2000, 1, 1) + datetime.timedelta(
                           days=rng.randrange(9000)))))()


def chain(rng, steps: int) -> list[dict]:
    """A task that composes so many skills, each working on what the one before it gave, and its
    answer, step by step. answer_of gives what is to be compared."""
    name, value = start_value(rng)
    asks, work, last = [f"Start with {name} {said(value)}."], [], None
    while len(work) < steps:
        skill = rng.choice([f for f in SKILLS[type(value)] if f is not last])
        ask, shown, new = skill(rng, value)
        if fits(new) and not (skill is later and value > 400):
            last, value = skill, new
            asks.append(f"{len(asks)}. {vary(rng, ask) if '`' not in ask else ask}")
            work.append(f"{len(asks) - 1}. {shown}")
    return [{"role": "user", "content": "\n".join(asks)},
            {"role": "assistant", "content": "\n".join([*work, f"Answer: {said(value)}"])}]


def answer_of(reply: str) -> str:
    """What follows the last "Answer:" of a reply, to the end of the line; "" if there is none."""
    found = re.findall(r"Answer: *([^\n]*)", reply)
    return found[-1].strip() if found else ""


def chain_chats(n: tuple[int, int] = (4000, 4000), steps: tuple[int, int] = (2, 4),
                seed: tuple[int, int] = (1, 1)):
    """n chains of so many steps, for a seed always the same and no two alike."""
    rng, seen = random.Random(f"chains {steps} {seed}"), set()
    while len(seen) < n[1]:
        messages = chain(rng, rng.randint(*steps))
        if messages[0]["content"] not in seen:
            seen.add(messages[0]["content"])
            yield messages


def skill_chats(n: tuple[int, int] = (2000, 2000)):
    """n conversations of one or two tasks, a skill each; a system turn may ask for the work or
    the result alone."""
    rng = random.Random("skills")
    for _ in range(n[1]):
        rule = rng.choice((None, "Show the work.", "Give the result alone."))
        messages = [{"role": "system", "content": rule}] if rule else []
        for _ in range(rng.randint(1, 2)):
            ask, reply = chain(rng, 1)
            if rule == "Give the result alone.":
                reply["content"] = answer_of(reply["content"])
            messages += [ask, reply]
        yield messages


CHATS = {"help": (help_chats, ["n"]), "skills": (skill_chats, ["n"]),
         "chains": (chain_chats, ["n", "steps", "seed"])}


def main() -> None:
    from configurator import load
    from pretrain import QUICKSTART, Config, plan_of
    c = load(Config, sys.argv[1:], default_file=QUICKSTART)
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", c.part)
    if not numbers or int(numbers[1]) > int(numbers[2]):
        raise SystemExit(f"part={c.part} must be i/n, from 1/n to n/n")
    part = int(numbers[1]) - 1, int(numbers[2])
    try:
        plan = plan_of(c)
        stores = prepare(c.domains, c.tokenizer, c.data_dir, plan.need(), part, c.workers)
        print(plan.table(stores if part[1] == 1 else None))
    except ValueError as e:
        raise SystemExit(str(e)) from None


if __name__ == "__main__":
    main()
