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
import base64
import bz2
import glob
import gzip
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from configurator import UserError, one_line
from synthetic.texts import LIBRARY_UNITS, PROBLEMS, PROBLEMS_PER_UNIT, library, problems

HEADER = struct.Struct("<8sIIQ32s32s")  # magic, version, bytes per token, tokens, SHA-256 of the
MAGIC, VERSION = b"nnMotif\0", 1        # tokens, tokenizer fingerprint; the tokens follow
VAL_EVERY = 50                           # one document in so many is for validation
UNIT_BYTES = 2**25                      # local text per shard; a shard is the unit of preparing
MAX_UNITS = 100_000                     # where a generator ends


# ---- tokenizers

# The turn format of the Motif family, which sft.py writes conversations in. load_tokenizer gives
# every tokenizer those of these tokens that it lacks, with ids after its own.
BEGIN = "<|beginoftext|>"
END = "<|endoftext|>"
TURN = "<|startofturn|>"
TURN_END = "<|endofturn|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = (BEGIN, END, TURN, TURN_END, *ROLES.values())


class Tokenizer:
    """Text <-> ids. load_tokenizer makes one; a subclass for each library does the work.

        name        what load_tokenizer was given
        n_vocab     the largest id, plus 1
        special     {special token: id}; all of SPECIALS are in it
        begin_id    the id that the tokenizer's own rule puts before a text; None if it puts none

    A special token can be put into a text by its id alone: encode() reads its spelling as plain
    text, so that no document and no user can forge the end of a turn.

    >>> byte = load_tokenizer("byte")
    >>> byte.encode("Hé<|endoftext|>")[:6]
    [72, 195, 169, 60, 124, 101]
    >>> byte.special["<|endoftext|>"], byte.n_vocab
    (257, 263)
    >>> byte.decode([72, 195, 169, 257])
    'Hé<|endoftext|>'
    """

    def __init__(self, name: str, special: dict[str, int], n_vocab: int):
        """special, n_vocab: of the tokenizer itself, before SPECIALS are added."""
        self.name = name
        self.special = dict(special)
        self.n_vocab = n_vocab
        for token in SPECIALS:
            if token not in self.special:
                self.special[token] = self.n_vocab
                self.n_vocab += 1
        self.spelling = {i: token for token, i in self.special.items()}

    def encode(self, text: str) -> list[int]:
        with library_errors(self.name):
            return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids. An id that no token has, which an untrained model may sample, and bytes
        that are not UTF-8 give U+FFFD."""
        text = ""
        run = []  # ordinary tokens, which are decoded together: one letter may be several tokens
        for i in ids:
            if i not in self.spelling and self._bytes(i) is not None:
                run.append(i)
            else:
                text += self._decode(run) + self.spelling.get(i, "\ufffd")
                run = []
        return text + self._decode(run)

    def token_bytes(self, i: int) -> bytes:
        """The bytes of text that id i stands for: b"" for a special token. An id that no token has
        gives a byte that is not UTF-8, and so U+FFFD once it is decoded."""
        if i in self.spelling:
            return b""
        found = self._bytes(i)
        return b"\xff" if found is None else found

    def fingerprint(self) -> bytes:
        """32 bytes, which differ between tokenizers that could give different ids."""
        return hashlib.sha256(self._identity()).digest()


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken: a pattern cuts the text into pieces, then pairs of tokens within
    a piece are merged, the pair whose merged token has the lowest id first."""

    def __init__(self, name: str, pattern: str, ids: dict[bytes, int], special: dict[str, int]):
        if len(set(ids.values()) - set(special.values())) < len(ids):
            raise UserError(f"tokenizer {name}: two of its tokens have the same id")
        for i in range(256):
            if bytes([i]) not in ids:
                raise UserError(f"tokenizer {name}: the byte {i} has no token")

        super().__init__(name, special, 1 + max([*ids.values(), *special.values()]))
        self.begin_id = self.special[BEGIN]
        self.pattern = pattern
        self.ids = ids
        self.bytes_of = {i: token for token, i in ids.items()}
        with library_errors(name):
            self.library = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ids,
                                             special_tokens=self.special)

    def _encode(self, text: str) -> list[int]:
        return self.library.encode_ordinary(text)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "replace")

    def _bytes(self, i: int) -> bytes | None:
        return self.bytes_of.get(i)

    def _identity(self) -> bytes:
        tokens = sorted(self.ids.items(), key=lambda item: item[1])
        return repr((self.pattern, tokens, sorted(self.special.items()))).encode()


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, read by Hugging Face's `tokenizers`. Normalizer, added tokens that are not
    special (Motif's <think>) and model are the library's; its special tokens are plain text."""

    def __init__(self, name: str, file: Path):
        from tokenizers import Tokenizer as Library
        with library_errors(file):
            content = file.read_bytes()
            library = Library.from_str(content.decode("utf-8"))

            # A file may ask to cut a text or to fill it up, which is a matter of inference.
            library.no_truncation()
            library.no_padding()

            ids = library.get_vocab(with_added_tokens=True)
            library.add_special_tokens([token for token in SPECIALS if token in ids])
            library.encode_special_tokens = True  # that is: encode their spelling as text
            added = library.get_added_tokens_decoder()
            marked = library.encode("a")
            begins = marked.special_tokens_mask[:1] == [1]

        special = {token.content: i for i, token in added.items() if token.special}
        super().__init__(name, special, 1 + max(ids.values(), default=-1))
        self.begin_id = marked.ids[0] if begins else None
        self.library = library
        self.added = {i: token.content for i, token in added.items()}
        self.byte_level = "ByteLevel(" in f"{library.pre_tokenizer} {library.decoder}"
        self.content = content

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.library.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        with library_errors(self.name):
            return self.library.decode(ids, skip_special_tokens=False)

    def _bytes(self, i: int) -> bytes | None:
        if i in self.added:
            return self.added[i].encode("utf-8")
        token = self.library.id_to_token(i)
        if token is None:
            return None
        if self.byte_level and all(letter in BYTE_OF for letter in token):
            return bytes(BYTE_OF[letter] for letter in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte of a letter that has no token
            return bytes([int(token[1:-1], 16)])
        return token.replace("\u2581", " ").encode("utf-8")  # SentencePiece's sign for a space

    def _identity(self) -> bytes:
        return self.content


def byte_level_alphabet() -> dict[str, int]:
    """{letter: byte}: how byte-level BPE spells the bytes of a token in a tokenizer.json. A visible
    byte of Latin-1 is its own letter; the others take the letters from U+0100 on. From GPT-2.

    >>> alphabet = byte_level_alphabet()
    >>> bytes(alphabet[letter] for letter in "Ġcaf\u00c3\u00a9").decode("utf-8")
    ' café'
    """
    alphabet = {}
    unused = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(unused)] = byte
            unused += 1
    return alphabet


BYTE_OF = byte_level_alphabet()


@contextmanager
def library_errors(name: str | Path):
    """Whatever a tokenizer library raises within becomes one UserError that names the tokenizer."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as e:  # a panic of Rust code is not an Exception
        raise UserError(f"tokenizer {name}: {one_line(e)}") from None


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name, which is one of

        byte                  an id for each byte; needs no file and no network
        gpt2, o200k_base ...  a name that tiktoken knows; downloaded once
        some/file.tiktoken    a file of tiktoken's; text is cut by GPT-2's pattern
        some/tokenizer.json   a file of Hugging Face's, or a folder that has one
        owner/name            a repository of the Hugging Face Hub that has one; downloaded once
    """
    known = tiktoken.list_encoding_names()
    if name == "byte":
        ids = {bytes([i]): i for i in range(256)}
        return TiktokenTokenizer(name, r"(?s).{1,64}", ids, {})

    if name in known:
        with library_errors(f"{name} (--tokenizer=byte needs no network)"):
            library = tiktoken.get_encoding(name)
        return TiktokenTokenizer(name, library._pat_str, library._mergeable_ranks,
                                 library._special_tokens)

    if name.endswith(".tiktoken"):
        with library_errors(name):
            ids = tiktoken_ids(Path(name))
        return TiktokenTokenizer(name, GPT2_PATTERN, ids, {})

    if name.endswith(".json") or os.path.isdir(name) or HUB_NAME.fullmatch(name):
        return JsonTokenizer(name, tokenizer_file(name))

    raise UserError(f"tokenizer {name}: it is neither 'byte', a .tiktoken file, a tokenizer.json, "
                    f"a folder with one, owner/name of the Hub, nor one of {', '.join(known)}")


def tiktoken_ids(file: Path) -> dict[bytes, int]:
    """{token: id} of a .tiktoken file: lines of the token in base64 and its id."""
    ids = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        token, i = line.split()
        ids[base64.b64decode(token)] = int(i)
    return ids


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json that is meant by a file's, a folder's or a Hub repository's name."""
    if name.endswith(".json"):
        return Path(name)

    if os.path.isdir(name):
        file = Path(name) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"tokenizer {name}: the folder has no tokenizer.json")
        return file

    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    try:
        kept = try_to_load_from_cache(name, "tokenizer.json")
        if isinstance(kept, str):  # what was downloaded once needs no network again
            return Path(kept)
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as e:  # of a dozen kinds: no network, no such name, a licence to accept first
        raise UserError(f"tokenizer {name}: there is no such folder, and the Hub did not give a "
                        f"tokenizer.json: {one_line(e)}") from None


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """(n_vocab,) int64: how many bytes of text each id stands for, which bits per byte need. 0 for
    special tokens and for ids that no token has."""
    lengths = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for i in range(tokenizer.n_vocab):
        if i not in tokenizer.spelling:
            lengths[i] = len(tokenizer._bytes(i) or b"")
    return lengths


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """BEGIN, the tokens of the text, END."""
    return [tokenizer.special[BEGIN], *tokenizer.encode(text), tokenizer.special[END]]


# ---- shards

class ShardWriter:
    """A shard in the making, under a temporary name until close()."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer.fingerprint()
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
            raise UserError(f"shard {path}: {one_line(e)}; {self.remedy()}") from None
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise UserError(f"{path} is not a shard of this project; {self.remedy()}")
        _, version, itemsize, self.tokens, self.checksum, made_by = HEADER.unpack(head)
        if version != VERSION or itemsize not in (2, 4):
            raise UserError(f"{path} has shard version {version}, not {VERSION}; {self.remedy()}")
        if tokenizer not in (None, made_by):
            raise UserError(f"{path} was made with another tokenizer; {self.remedy()}")
        if size != HEADER.size + itemsize * self.tokens:
            raise UserError(f"{path} is truncated: {size} bytes, not "
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
                raise UserError(f"{self.path} is corrupted: its checksum differs; {self.remedy()}")
            self.verified = True
        return self.ids[i * T:i * T + T + 1]


# ---- sources: a source is cut into units, a unit yields documents

def source_units(source: str) -> list[partial]:
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
            raise UserError(f"source {source!r}: builtin are {known}")
        return [partial(library, kind, i) for i in range(LIBRARY_UNITS)]
    if local:
        return local_units(place, columns)
    if place.count("/") == 1 and not os.path.exists(place):
        return hub_units(place, columns, options)
    raise UserError(f"source {source!r} is neither builtin:..., files ending in "
                     f"{', '.join(READABLE[:3])}, nor a dataset owner/name of the Hub")


def check_options(source: str, options: dict, known: list[str]) -> None:
    """ValueError for what follows a source's question mark if it is not known or empty."""
    for key, value in options.items():
        if key not in known or not value:
            raise UserError(f"source {source!r}: {key}={value} is none of its options "
                             f"({'=..., '.join([*known, ''])[:-2] or 'it has none'})")


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READABLE = (".jsonl", ".txt", ".parquet",
            *(kind + end for kind in (".jsonl", ".txt") for end in COMPRESSED))


def local_files(pattern: str) -> list[Path]:
    """The files of a glob, sorted; ValueError if there is none."""
    files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not files:
        raise UserError(f"no file matches {pattern}; give a path or a glob of existing files")
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
            yield from read_each(path, parquet_rows(path), partial(get_text, columns))
        elif kind == ".jsonl":
            yield from read_each(path, lines_of(path, start, end), lambda line: (
                get_text(columns, json.loads(line)) if line.strip() else ""))
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
        raise UserError(f"{source}: {place}: {one_line(e)}") from None


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


def get_text(columns: list[str], row: dict) -> str:
    """The text of a row: its columns, a blank line between; null is no text. ValueError if one is
    not there or is not text."""
    if not isinstance(row, dict) or not all(isinstance(row.get(c, 0), str | None) for c in columns):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"no text in column {','.join(columns)}; it has {has}: name the right one "
                         "with ?text=COLUMN")
    return "\n\n".join(row[c] or "" for c in columns)


def hub_units(name: str, columns: list[str], options: dict) -> list[partial]:
    """One unit for each file of a Hub dataset. ValueError if it cannot be opened."""
    try:
        files = open_hub(name, options).n_shards
    except Exception as e:  # datasets raises a dozen kinds, all with a message worth one line
        raise UserError(f"dataset {name} cannot be opened: {one_line(e)}") from None
    return [partial(read_hub, name, columns, options, i, files) for i in range(files)]


def open_hub(name: str, options: dict):
    from datasets import load_dataset
    split = options.get("split", "train")
    return load_dataset(name, options.get("name"), split=split, streaming=True)


def read_hub(name: str, columns: list[str], options: dict, i: int, files: int):
    """The documents of file i."""
    rows = enumerate(open_hub(name, options).shard(files, i))
    places = ((f"file {i}, row {j}", row) for j, row in rows)
    yield from read_each(name, places, partial(get_text, columns))


# ---- preparing

class DomainShards:
    """The shards of one domain: a folder data_dir/<domain>-<key>, the key made of tokenizer and
    source (of local files their sizes and dates too), so that another source never meets old
    shards. It holds train-N.bin and val-N.bin for unit N; manifest.json has the tokens of units 0,
    1, ... and whether those are all."""

    def __init__(self, domain: str, source: str, tokenizer: Tokenizer, data_dir: str):
        self.domain, self.source, self.tokenizer = domain, source, tokenizer.fingerprint()
        what = [source, self.tokenizer.hex(), VAL_EVERY, UNIT_BYTES, PROBLEMS_PER_UNIT]
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
                raise UserError(f"{self.manifest} is damaged: {one_line(e)}; delete it and prepare"
                                 " again: the shards are kept") from None

    def path(self, part: str, unit: int) -> Path:
        return self.folder / f"{part}-{unit:05d}.bin"

    def has(self, need: int) -> bool:
        """Whether the units prepared so far hold `need` tokens, or all that the source has."""
        return self.whole or sum(self.tokens) >= need

    def open(self, part: tuple[int, int]) -> None:
        """Look for what is to do: units, queue (numbers of those of this part, the next one last)
        and made (tokens of those done)."""
        self.units, self.made = source_units(self.source), 0
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
            raise UserError(f"domain {self.domain!r}: {self.source} has fewer than two documents "
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
        writer = held_out if (number + i) % VAL_EVERY == 0 else kept
        writer.add(encode_document(tokenizer, text))
    held_out.close()
    return kept.close()                            # appears last: a unit is whole or not there


def prepare(domains: dict, tokenizer_name: str, data_dir: str, need: dict[str, int],
            part: tuple[int, int] = (0, 1), workers: int | None = None) -> dict[str, DomainShards]:
    """Make what is missing of `need` tokens for every domain (name -> (source, ...)) -> stores.
    Units that are there are kept, so it goes on where it was cut. part (i, n): the i-th of n
    machines that share data_dir does every n-th unit; a last call without part takes all in.
    ValueError for a source that is missing, malformed or without text, or a disk too small."""
    tokenizer, workers = load_tokenizer(tokenizer_name), workers or os.cpu_count()
    stores = {name: DomainShards(name, d[0], tokenizer, data_dir) for name, d in domains.items()}
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
        raise UserError(f"{data_dir} cannot be written: {one_line(e)}; free some space or choose "
                         "another --data_dir") from None
    except BrokenProcessPool:
        raise UserError("a process that prepared data was killed, perhaps for lack of memory; "
                         "try --workers=1") from None
    finally:
        for store, i in running.values():          # nothing stays of what failed
            store.clear(i)
        for store in todo:
            with suppress(OSError):                # not empty
                store.folder.rmdir()
    print(f"prepared {sum(s.made for s in todo):,.0f} tokens in {time.time() - begin:.0f} s")
    return stores


def announce(share: dict[DomainShards, float], tokenizer, data_dir: Path, workers: int) -> None:
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
        raise UserError(f"{data_dir} has {free / 1e9:,.1f} GB free; the data needs "
                         f"{size / 1e9:,.1f} GB: free some or choose another --data_dir")


def progress(text: str = "") -> None:
    """A line that replaces itself on a terminal, and that is left out elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{text:70s}", end="" if text else "\r", file=sys.stderr, flush=True)


# ---- the curriculum

class Curriculum:
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
            raise UserError("nothing ends the run: set max_steps or max_tokens")
        self.names, lengths = list(domains), parse_schedule("seq_len", seq_len)
        batches = parse_schedule("batch_tokens", batch_tokens)
        if any(a[1] > b[1] for a, b in zip(lengths, lengths[1:])):
            raise UserError(f"seq_len={seq_len}: the length may rise, not fall")
        self.seq_len, self.rows, self.tokens = [], [], [0]
        steps, end = max_steps or math.inf, max_tokens or math.inf
        while len(self.rows) < steps and self.tokens[-1] < end:
            T, B = (max(knot for knot in kind if knot[0] <= self.tokens[-1])[1]
                    for kind in (lengths, batches))
            if B < T:
                raise UserError(f"batch_tokens={B} holds no sequence of seq_len={T}; raise it")
            self.seq_len.append(T)
            self.rows.append(B // T)
            self.tokens.append(self.tokens[-1] + B // T * T)
        self.steps, self.context = len(self.rows), self.seq_len
        self.shares = self._shares(domains, mixture, caps or {})

    def _shares(self, domains: dict, mixture: list | None, caps: dict) -> np.ndarray:
        """(steps, D)"""
        for name, domain in domains.items():
            if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
                raise UserError(f"domain {name!r}: its name must be letters, digits, '_', '-' and "
                                 "'.', as a folder is named after it")
            if not (isinstance(domain, (list, tuple)) and len(domain) == 3
                    and isinstance(domain[0], str) and all(map(is_share, domain[1:]))):
                raise UserError(f"domain {name!r} must be (source, first share, last share), "
                                 f"none negative, not {domain}")
        if mixture is None:
            mixture = [(p, {n: d[i] for n, d in domains.items()}) for p, i in ((0, 1), (1, 2))]
        if not (mixture and all(isinstance(k, (list, tuple)) and len(k) == 2 and is_share(k[0])
                                and isinstance(k[1], dict) for k in mixture)):
            raise UserError(f"mixture={mixture} must be [[fraction of the run, {{name: share}}], "
                             "...]")
        for p, shares in mixture:
            if not (shares.keys() <= domains.keys() and all(map(is_share, shares.values()))
                    and abs(sum(shares.values()) - 1) <= 1e-6):
                raise UserError(f"the shares at {p} of the run must be of {', '.join(domains)}, "
                                 f"none negative, and sum to 1, not {shares}")
        places = [p for p, _ in mixture]
        if places != sorted(places) or places[-1] > 1:
            raise UserError(f"mixture: the places {places} must rise from 0 to 1")
        at = np.array(self.tokens[:-1]) / self.tokens[-1]
        shares = np.stack([np.interp(at, places, [m.get(name, 0) for _, m in mixture])
                           for name in self.names], axis=1)
        shares /= shares.sum(1, keepdims=True)     # 1e-6 of a long run are many sequences
        if not (caps.keys() <= domains.keys() and all(map(is_share, caps.values()))):
            raise UserError(f"caps={caps} must be {{name: largest share}} of "
                             f"{', '.join(domains)}")
        cap = np.array([caps.get(name, 1) for name in self.names])
        for _ in self.names:                       # spreading may lift another above its cap
            over = (shares - cap).clip(0).sum(1, keepdims=True)
            shares = shares.clip(max=cap)
            room = np.where(shares < cap, shares, 0)
            shares += over * room / room.sum(1, keepdims=True).clip(1e-12)
        short = np.abs(shares.sum(1) - 1) > 1e-9
        if short.any():
            raise UserError(f"caps={caps} leave too little room at step {short.argmax()}; raise "
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

    def table(self, stores: dict[str, DomainShards] | None = None) -> str:
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


def parse_schedule(key: str, value) -> list[tuple[int, int]]:
    """A number, or [[tokens, number], ...] from 0 on -> knots. ValueError otherwise."""
    pairs = [(0, value)] if type(value) is int else value
    if not (isinstance(pairs, (list, tuple)) and pairs
            and all(isinstance(p, (list, tuple)) and [*map(type, p)] == [int, int] and p[1] > 0
                    for p in pairs)
            and pairs[0][0] == 0 and all(a[0] < b[0] for a, b in zip(pairs, pairs[1:]))):
        raise UserError(f"{key}={value} must be a positive number, or [[0, number], [tokens, "
                         "number], ...] with rising tokens")
    return [tuple(p) for p in pairs]


# ---- batches

def hash_key(*what) -> bytes:
    return hashlib.blake2b(repr(what).encode(), digest_size=48).digest()


def feistel_permutation(i: np.ndarray, n: int, key: bytes) -> np.ndarray:
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


class TokenDataset:
    """The batches of a plan over prepared stores. The state is one integer, the step. ValueError
    for a shard that is damaged and for shards too short for the sequences."""

    def __init__(self, plan: Curriculum, stores: dict[str, DomainShards], seed: int):
        self.curriculum, self.seed, self.ends, need = plan, seed, {}, plan.need()
        self.train = {n: stores[n].shards("train", need[n]) for n in plan.names}
        self.val = {n: stores[n].shards("val", need[n]) for n in plan.names}
        T = max(plan.seq_len)
        for name, shards in self.train.items():
            whole, there = T * sum(s.sequences(T) for s in shards), sum(s.tokens for s in shards)
            if 2 * whole < there:                  # the ends of shards are never read
                raise UserError(f"domain {name!r}: of {there:,d} tokens in {len(shards)} shards "
                                 f"only {whole:,d} fill sequences of {T}; lower seq_len or give it "
                                 "longer text")

    def fingerprint(self) -> str:
        """Of the shards that the run reads."""
        checksums = [s.checksum for shards in self.train.values() for s in shards]
        return hashlib.sha256(b"".join(checksums)).hexdigest()[:16]

    def num_targets(self, step: int) -> int:
        """Targets in the step's global batch."""
        return self.curriculum.rows[step] * self.curriculum.seq_len[step]

    def rows(self, step: int) -> list[tuple[str, int]]:
        """(domain, sequence) of every row of the global batch. Within an epoch of a domain each of
        its sequences comes once."""
        T, rows = self.curriculum.seq_len[step], []
        for name, a, b in zip(self.curriculum.names, self.curriculum.first[step], self.curriculum.last[step]):
            n = int(self._ends(self.train[name], T)[-1])
            for epoch in range(a // n, (b - 1) // n + 1 if b > a else 0):
                i = np.arange(max(a, epoch * n), min(b, (epoch + 1) * n)) - epoch * n
                rows += [(name, j) for j in feistel_permutation(i, n, hash_key(self.seed, name, T, epoch))]
        order = feistel_permutation(np.arange(len(rows)), len(rows), hash_key(self.seed, "order", step))
        return [rows[i] for i in order]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Rows rank, rank + world, ... of the step's global batch: (rows, T + 1) int64."""
        T, rows = self.curriculum.seq_len[step], self.rows(step)[rank::world]
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
            raise UserError(f"domain {name!r} holds out no sequence of {T} tokens (of every "
                             f"{VAL_EVERY} documents one); lower seq_len or give it more documents")
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
