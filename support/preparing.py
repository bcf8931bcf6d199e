"""Preparing: text is made into token ids, in pieces. data.py puts its tapes together from them.
Other processes make them, ahead of what training reads.

    data_dir/<domain>-<key>/          a domain: one source of text under one tokenizer
        manifest.jsonl                a line for each piece that was made; its file may be gone
        00017-002.bin                 token ids of the training text: piece 2 of unit 17
        00000-held-out.bin            token ids that are held out of the first piece of unit 0;
                                      there are such files of the first VAL_UNITS units

A *unit* is what support/sources.py cuts a source into: some 16 MB of text, or a whole file. A unit
is made in *pieces* of at least PIECE_TOKENS, in whole documents; the last one may be shorter. So a
run can begin to read a large file long before it is prepared as a whole, and need not prepare all
of it. The first line of a manifest is {"units": 512}, the source's number of units. Another is

    {"unit": 17, "piece": 0, "tokens": 4195012, "documents": 5210, "last": false, "sha256": "...",
     "held_out": 201453, "held_out_documents": 260, "held_out_sha256": "..."}

where tokens and held_out are numbers of tokens, and documents counts those of the unit up to the
end of this piece, held-out ones and blank ones included.

What is in a piece follows from source and tokenizer alone: it is the same whoever makes it, however
often, and in whatever order. So two processes may make the same piece, and where one was killed,
the next one makes the piece again.
"""
import hashlib
import json
import math
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from configurator import UserError, one_line
from support import sources
from support.sources import SkippedRows, pin_source, source_identity, source_units
from support.tokenizer import Tokenizer, encode_document, load_tokenizer

PIECE_TOKENS = 2**22  # 8 MB on the disk; 16 MB if the tokenizer has more than 65,536 tokens
VAL_EVERY = 20        # about one document in 20 is held out for validation,
VAL_UNITS = 16        # but only of the first piece of units 0 to 15
MAX_UNITS = 10**7     # of a source: more is a mistake in a manifest
MAX_MAPPED = 16       # pieces of a domain that are open at a time
MAX_PERMITS = 2       # pieces that a process may be allowed at a time. The parent grants permits
                      # only between training steps; a second one keeps the process busy in a step
MAX_FAILURES = 3      # the run ends if processes die so often in a row at one unit

# ---- what is on the disk


class Domain:
    """A domain's folder. Its key is a hash of what decides the content of the pieces: a run with
    another source or tokenizer has another folder. (So has one with the same files under other
    paths, or changed since, as files are told apart by path, size and time of change.)

    name         of the domain
    source       where its text comes from (support/sources.py); of the Hub with its revision
    dtype        of token ids on the disk
    num_units    of the source
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, data_dir: str | Path):
        self.name = name
        self.source = pin_source(source, Path(data_dir) / "hub_revisions.json")
        self.tokenizer = tokenizer.name
        self.n_vocab = tokenizer.n_vocab
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")

        self.identity = source_identity(self.source)
        what = [self.source, self.identity, tokenizer.fingerprint().hex(), self.dtype.str,
                PIECE_TOKENS, VAL_EVERY, VAL_UNITS, sources.UNIT_BYTES]
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:10]
        self.folder = Path(data_dir) / f"{name}-{key}"
        self.num_units = None
        self.records = {}  # (unit, piece) -> its line of the manifest
        self.unit_tokens = Counter()
        self.whole_units = set()
        self.whole_tokens = 0   # the sum of unit_tokens over them
        self._mapped = {}  # (unit, piece) -> its ids
        self._read = {}    # manifest -> how many bytes of it were read
        self.refresh()
        if self.num_units is None:
            self.num_units = len(source_units(self.source))

    # A machine that prepares a part of the data has a manifest of its own, as two machines cannot
    # safely append to one file. Whoever reads takes all of them together.

    def refresh(self) -> None:
        """Read what was added to the manifests since the last call."""
        for manifest in sorted(self.folder.glob("manifest*.jsonl")):
            with open(manifest, "rb") as file:
                file.seek(self._read.get(manifest.name, 0))
                new = file.read()
            lines = new[:new.rfind(b"\n") + 1]
            self._read[manifest.name] = self._read.get(manifest.name, 0) + len(lines)
            for line in lines.splitlines():
                self._take_line(line)

    def _take_line(self, line: bytes) -> None:
        # A line that a crash has cut, or of another form, is passed over: its piece is made again.
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if is_count(record, "units") and 0 < record["units"] <= MAX_UNITS:
                self.num_units = record["units"]
            elif is_record(record):
                self._take_record(record)

    def _take_record(self, record: dict) -> None:
        unit = record["unit"]
        key = (unit, record["piece"])
        if key not in self.records:
            self.unit_tokens[unit] += record["tokens"]
            if unit in self.whole_units:
                self.whole_tokens += record["tokens"]
        if record["last"] and unit not in self.whole_units:
            self.whole_units.add(unit)
            self.whole_tokens += self.unit_tokens[unit]
        self.records[key] = record

    def write(self, line: dict, manifest: str) -> None:
        """Append a line to the manifest, and take note of it."""
        path = self.folder / manifest
        text = json.dumps(line).encode() + b"\n"
        with self.write_errors(), open(path, "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            is_cut = file.read(1) not in (b"", b"\n")  # a crash cut the last line
            file.write(b"\n" + text if is_cut else text)
            file.flush()
            os.fsync(file.fileno())
        self._take_line(text)

    @contextmanager
    def write_errors(self):
        """Make a UserError of an OSError, which need not name a file."""
        try:
            yield
        except OSError as e:
            raise UserError(f"{self.folder} cannot be written: {one_line(e)}; free some space or "
                            "choose another --data_dir") from None

    def path(self, unit: int, piece: int) -> Path:
        return piece_path(self.folder, unit, piece)

    def held_out_path(self, unit: int) -> Path:
        return held_out_path(self.folder, unit)

    def has(self, unit: int, piece: int) -> bool:
        """Whether a piece is there, the first of a unit with what is held out of it. Its file may
        have been deleted, behind a run that read it."""
        if (unit, piece) not in self.records or not self.path(unit, piece).exists():
            return False
        return piece > 0 or self.has_held_out(unit)

    def has_held_out(self, unit: int) -> bool:
        """Whether the text is there that is held out of a unit, which may be none."""
        record = self.records.get((unit, 0))
        return record is not None and (record["held_out"] == 0
                                       or self.held_out_path(unit).exists())

    def first_missing(self, unit: int, piece: int = 0) -> int | None:
        """The first piece from `piece` on that is still to be made; None if all are there, up to
        the unit's end."""
        while self.has(unit, piece):
            if self.records[unit, piece]["last"]:
                return None
            piece += 1
        return piece

    def expected_tokens(self, unit: int) -> float:
        """A guess at the tokens that a unit will give, for request(). If the unit is whole: its
        tokens. If no unit is whole yet: a piece. Else: the mean of the whole units, less what is
        made of this one, but not less than a piece (or that mean, if it is smaller)."""
        made = self.unit_tokens[unit]
        if unit in self.whole_units:
            return made
        if not self.whole_units:
            return PIECE_TOKENS
        mean = self.whole_tokens / len(self.whole_units)
        return max(mean - made, min(mean, PIECE_TOKENS), 1)

    def read(self, unit: int, piece: int, start: int, count: int) -> np.ndarray:
        """Ids start to start + count of a piece. A few pieces stay mapped into memory."""
        if (unit, piece) not in self._mapped:
            if len(self._mapped) == MAX_MAPPED:
                self._mapped.clear()
            tokens = self.records[unit, piece]["tokens"]
            self._mapped[unit, piece] = self._map(self.path(unit, piece), tokens)
        ids = self._mapped[unit, piece][start:start + count]
        if len(ids) and ids.max() >= self.n_vocab:
            raise UserError(f"{self.path(unit, piece)} is damaged, as it has ids that no token "
                            "has; delete it and run again to make it again")
        return ids

    def read_held_out(self, unit: int) -> np.ndarray:
        """All ids of a unit that are held out."""
        record = self.records[unit, 0]
        if record["held_out"] == 0:
            return np.empty(0, self.dtype)  # an empty file cannot be mapped
        path = self.held_out_path(unit)
        ids = self._map(path, record["held_out"])
        if checksum(ids.tobytes()) != record["held_out_sha256"]:
            raise UserError(f"{path} is damaged; delete it and run again to make it again")
        return ids

    def _map(self, path: Path, tokens: int) -> np.ndarray:
        """The ids of a file, of which the system reads what is looked at."""
        size = tokens * self.dtype.itemsize
        try:
            there = path.stat().st_size
            if there != size:
                raise UserError(f"{path} has {there} bytes instead of {size}; delete it and run "
                                "again to make it again")
            return np.memmap(path, self.dtype, "r")
        except OSError as e:
            raise UserError(f"{path}: {one_line(e)}; run again to make it again") from None

    def verify(self) -> list[Path]:
        """Read all pieces -> the damaged files."""
        damaged = []
        for (unit, piece), record in sorted(self.records.items()):
            expected = {self.path(unit, piece): record["sha256"]}
            if record["held_out"]:
                expected[self.held_out_path(unit)] = record["held_out_sha256"]
            for path, sha256 in expected.items():
                if path.exists() and checksum(path.read_bytes()) != sha256:
                    damaged.append(path)
        return damaged


def piece_path(folder: Path, unit: int, piece: int) -> Path:
    return folder / f"{unit:05d}-{piece:03d}.bin"


def held_out_path(folder: Path, unit: int) -> Path:
    return folder / f"{unit:05d}-held-out.bin"


def is_count(record, key: str) -> bool:
    """Whether record is an object that has a whole number under the key, of a possible size."""
    return isinstance(record, dict) and type(record.get(key)) is int and 0 <= record[key] < 2**48


def is_record(record) -> bool:
    """Whether this is a piece's line of a manifest."""
    counts = ("unit", "piece", "tokens", "documents", "held_out", "held_out_documents")
    if not all(is_count(record, key) for key in counts) or type(record.get("last")) is not bool:
        return False
    has_checksum = isinstance(record.get("sha256"), str)
    return has_checksum and (record["held_out"] == 0
                             or isinstance(record.get("held_out_sha256"), str))


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- making the pieces of a unit


@dataclass
class EncodedPiece:
    """The documents of a piece as token ids."""
    ids: list[np.ndarray]       # of the training documents
    held_out: list[np.ndarray]
    documents_so_far: int       # of the unit, up to the end of this piece
    is_last: bool = False


def encode_pieces(texts: Iterable[str], tokenizer: Tokenizer, unit: int, piece: int,
                  documents_before: int,
                  piece_tokens: int = PIECE_TOKENS) -> Iterator[EncodedPiece]:
    """Encode the documents of a unit from piece `piece` on. documents_before: how many of them the
    pieces before have; these are passed over."""
    encoded = EncodedPiece([], [], documents_before)
    tokens = 0
    for text in islice(texts, documents_before, None):
        if tokens >= piece_tokens:
            yield encoded
            piece += 1
            encoded = EncodedPiece([], [], encoded.documents_so_far)
            tokens = 0

        encoded.documents_so_far += 1
        if not text.strip():
            continue
        ids = np.array(encode_document(tokenizer, text), dtype=np.uint32)
        # A source's first document is always held out, as a source may have few.
        is_first = unit == 0 and piece == 0 and not encoded.ids and not encoded.held_out
        if piece == 0 and unit < VAL_UNITS and (is_first or is_held_out(text)):
            encoded.held_out.append(ids)
        else:
            encoded.ids.append(ids)
            tokens += len(ids)
    encoded.is_last = True
    yield encoded


def is_held_out(text: str) -> bool:
    """Whether a document of a unit's first piece is held out, by a hash of its text: copies of it
    in these pieces are held out as well. (Copies elsewhere are not looked for, nor copies of the
    source's first document.)"""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VAL_EVERY == 0


def shuffled(documents: list[np.ndarray], unit: int, piece: int) -> np.ndarray:
    """The documents of a piece, end to end in an order of its own: files are often sorted."""
    def noise(i: int) -> bytes:
        return hashlib.blake2b(repr((unit, piece, i)).encode(), digest_size=8).digest()

    order = sorted(range(len(documents)), key=noise)
    return np.concatenate([np.empty(0, np.uint32), *[documents[i] for i in order]])


def write_piece(job: dict, piece: int, encoded: EncodedPiece) -> dict:
    """Write the files of a piece -> its line for the manifest."""
    unit = job["unit"]
    folder = Path(job["folder"])
    ids = shuffled(encoded.ids, unit, piece).astype(job["dtype"])
    record = {"unit": unit, "piece": piece, "tokens": len(ids),
              "documents": encoded.documents_so_far, "last": encoded.is_last,
              "sha256": checksum(ids.tobytes()),
              "held_out": sum(map(len, encoded.held_out)),
              "held_out_documents": len(encoded.held_out)}
    if encoded.held_out:
        held_out = np.concatenate(encoded.held_out).astype(job["dtype"]).tobytes()
        record["held_out_sha256"] = checksum(held_out)
        write_file(held_out_path(folder, unit), held_out)
    write_file(piece_path(folder, unit, piece), ids.tobytes())
    return record


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name of this process's own, then give it its name."""
    temporary = Path(f"{path}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary files and folders that killed processes of this machine have left. name: a
    glob for what they were to be called."""
    for path in folder.glob(f"{name}.{socket.gethostname()}.*.tmp"):
        pid = path.suffixes[-2][1:]
        if pid.isdecimal() and is_running(int(pid)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)              # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:          # another user's
        pass
    return True


# The process that makes pieces: `python -m support.preparing`. It is no fork of its parent: that
# would copy the training process's threads, its memory, and its hold on the GPU. They speak through
# pipes, a line at a time:
#
#     parent    {"unit": 17, "piece": 0, ...}     make this unit, from this piece on
#     parent    an empty line                     you may make one piece
#     child     {"unit": 17, "piece": 0, ...}     I have made it: its line for the manifest,
#                                               or {"error": "..."}
#
# If the parent ends, however it ends, the next line never comes, and the child ends too.

def work() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that nothing that a library prints is taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.nice(5)
    for line in iter(sys.stdin.readline, ""):
        if not line.strip():
            continue  # a permit for a unit that has ended
        try:
            for answer in make_unit(json.loads(line)):
                print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:  # the parent has ended
            os._exit(0)
        except (UserError, OSError) as e:
            print(json.dumps({"error": one_line(e)}), file=answers, flush=True)


def make_unit(job: dict) -> Iterator[dict]:
    """Make the pieces of a unit, each when the parent allows it -> a line of manifest for each.

    job    source, identity, tokenizer, dtype, folder, unit, the sizes of pieces and units; the
           first piece to make, and how many documents come before it"""
    check_unchanged(job)
    tokenizer = load_tokenizer(job["tokenizer"])
    skipped = SkippedRows()
    units = source_units(job["source"], job["unit_bytes"], sources.ATTEMPTS)
    texts = units[job["unit"]](skipped)
    piece = job["piece"]
    pieces = encode_pieces(texts, tokenizer, job["unit"], piece, job["documents"],
                           job["piece_tokens"])
    wait_for_permit()
    for encoded in pieces:
        check_unchanged(job)                # its documents may have been read while a file changed
        record = write_piece(job, piece, encoded)
        if encoded.is_last:
            record["skipped"] = skipped.report()
        yield record
        piece += 1
        if not encoded.is_last:
            wait_for_permit()


def check_unchanged(job: dict) -> None:
    if source_identity(job["source"]) != job["identity"]:
        raise UserError(f"{job['source']} has changed since the run began; start the run again")


def wait_for_permit() -> None:
    """Read the parent's next line; end if there is no parent any more."""
    if not sys.stdin.readline():
        sys.exit()


# ---- the parent


class Worker:
    """A process that makes pieces, and the unit that it is at."""

    def __init__(self, answers: queue.SimpleQueue):
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.preparing"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"})
        self.domain = None
        self.unit = None
        self.piece = None     # that it makes next
        self.permits = 0      # pieces that it may make and has not made
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers: queue.SimpleQueue) -> None:
        """Put what the process says into the queue, and None when it has ended. (The last line of
        one that was killed may be cut.)"""
        with suppress(ValueError):
            for line in self.process.stdout:
                answers.put((self, json.loads(line)))
        answers.put((self, None))

    def begin(self, domain: Domain, unit: int, piece: int) -> None:
        """Give it a unit, to be made from a piece on."""
        self.domain = domain
        self.unit = unit
        self.piece = piece
        before = domain.records[unit, piece - 1]["documents"] if piece > 0 else 0
        self._send(json.dumps({
            "source": domain.source, "identity": domain.identity, "tokenizer": domain.tokenizer,
            "dtype": domain.dtype.str, "folder": str(domain.folder), "unit": unit, "piece": piece,
            "documents": before, "piece_tokens": PIECE_TOKENS,
            "unit_bytes": sources.UNIT_BYTES}))

    def permit(self) -> None:
        """Let it make a piece."""
        self._send("")
        self.permits += 1

    def _send(self, line: str) -> None:
        # If it was killed, _listen reports that.
        with suppress(OSError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()


def num_cores() -> int:
    """How many cores this process may use. macOS does not tell: there, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class Preparer:
    """Keeps processes busy with what is wanted.

    workers     how many pieces are made at a time; None: as many as this process may use cores.
                A process in the midst of a unit, whose pieces are enough for now, waits without a
                permit and does not count
    manifest    the file that its lines go to
    """

    def __init__(self, workers: int | None = None, manifest: str = "manifest.jsonl"):
        self.limit = workers or num_cores()
        self.manifest = manifest
        self.workers = []
        self.domains = []           # that pieces were made of
        self.answers = queue.SimpleQueue()
        self.failures = Counter()   # (domain, unit) -> ends in a row of its process

    def num_busy(self) -> int:
        return sum(worker.permits > 0 for worker in self.workers)

    def request(self, domain: Domain, tokens: int, units: Iterable[tuple[int, int]],
                part: tuple[int, int] = (0, 1)) -> None:
        """Have about so many tokens made of these units, in their order, as far as processes are
        free. How long a unit will be is not known: it is taken to be as long as the others.

        units: (unit, its first piece that is wanted).
        part (i, n): make only units i, i + n, i + 2 n, ... of the source."""
        is_fresh = False
        for unit, piece in units:
            if tokens <= 0:
                return
            missing = domain.first_missing(unit, piece)
            if missing is not None and not is_fresh:
                domain.refresh()                # another run may have made it by now
                is_fresh = True
                missing = domain.first_missing(unit, piece)
            if missing is not None and unit % part[1] == part[0]:
                worker = self._worker_at(domain, unit, missing)
                if worker is None:
                    return
                wanted = missing + math.ceil(tokens / PIECE_TOKENS)
                while worker.piece + worker.permits < wanted and worker.permits < MAX_PERMITS:
                    worker.permit()
            tokens -= domain.expected_tokens(unit)

    def _worker_at(self, domain: Domain, unit: int, piece: int) -> Worker | None:
        """The process that works on a unit and will still come to this piece; else one that begins
        there. None if as many as may be are busy already (one that has permits is among them)."""
        has_room = self.num_busy() < self.limit
        for worker in self.workers:
            if worker.domain is domain and worker.unit == unit and worker.piece <= piece:
                return worker if worker.permits or has_room else None
        if not has_room:
            return None

        free = [worker for worker in self.workers if worker.domain is None]
        if not free:
            free = [Worker(self.answers)]
            self.workers += free
        if domain not in self.domains:
            self._open(domain)
        free[0].begin(domain, unit, piece)
        return free[0]

    def _open(self, domain: Domain) -> None:
        """Make a domain's folder ready to be written."""
        print(f"preparing {domain.name} in {domain.folder}", flush=True)
        self.domains.append(domain)
        with domain.write_errors():
            domain.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(domain.folder)
        if not (domain.folder / self.manifest).exists():
            domain.write({"units": domain.num_units}, self.manifest)

    def collect(self, seconds: float = 0.0) -> None:
        """Note what the processes have made. Wait up to `seconds` for the first answer."""
        try:
            self._take_answer(*self.answers.get(timeout=seconds))
            while True:
                self._take_answer(*self.answers.get_nowait())
        except queue.Empty:
            pass

    def _take_answer(self, worker: Worker, answer: dict | None) -> None:
        domain = worker.domain
        unit = worker.unit
        if answer is None:
            if worker in self.workers:
                self.workers.remove(worker)
            if domain is not None:
                self._take_failure(domain, unit)
        elif "error" in answer:
            worker.domain = None
            worker.permits = 0
            raise UserError(f"preparing {domain.name}: {answer['error']}")
        else:
            known = domain.records.get((unit, answer["piece"]), answer)
            if any(known.get(key) != answer.get(key) for key in ("sha256", "held_out_sha256")):
                # It has replaced the one that was there. Without a file it is made once more, and
                # is not read by mistake.
                domain.path(unit, answer["piece"]).unlink(missing_ok=True)
                raise UserError(f"{domain.source} gives another text than it did: piece "
                                f"{answer['piece']} of unit {unit} differs; choose another "
                                "--data_dir")
            worker.piece += 1
            worker.permits -= 1
            domain.write(answer, self.manifest)
            self.failures.pop((domain.name, unit), None)
            if answer["last"]:
                worker.domain = None
                worker.permits = 0
                if answer["skipped"]:
                    print(answer["skipped"], flush=True)

    def _take_failure(self, domain: Domain, unit: int) -> None:
        self.failures[domain.name, unit] += 1
        if self.failures[domain.name, unit] == MAX_FAILURES:
            raise UserError(f"the process that prepared unit {unit} of {domain.name} has ended "
                            f"{MAX_FAILURES} times: by an error that is printed above, or killed "
                            "for lack of memory; try --workers=1")
        print(f"the process that prepared unit {unit} of {domain.name} has ended; another one "
              "takes over", flush=True)

    def release(self, domain: Domain) -> None:
        """End the processes that wait for a permit at a unit of a domain. Another one can go on
        with the unit at any time."""
        for worker in list(self.workers):
            if worker.domain is domain and worker.permits == 0:
                worker.domain = None
                worker.process.kill()
                self.workers.remove(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()


if __name__ == "__main__":
    work()
