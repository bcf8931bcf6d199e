"""Data: text -> shards of tokens -> a curriculum -> batches.

A run reads several *domains* (web text, code, maths, ...), each of which has a *source* of text.

    prepare(...)                     sources -> shards of tokens on disk; parallel, resumable
    Curriculum(...)                  step -> sequence length, batch, and each domain's share of it
    TokenDataset(...).batch(step)    the step's token ids, a pure function of (seed, step)

The file is read from the idea to the machinery: curriculum, shards, batches; then what makes them:
preparing. Tokenizers and sources are in support/. `python -m tools.prepare config/X.py` prepares a run's data ahead
of it and prints its curriculum.
"""
import hashlib
import json
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
from bisect import bisect_left
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from configurator import UserError, one_line
from support import sources
from support.sources import READABLE, local_files, source_units
from support.tokenizer import Tokenizer, encode_document, load_tokenizer
from synthetic.texts import PROBLEMS_PER_UNIT

# ---- the curriculum

# Motif-2 (arXiv 2511.07464) does not train on one fixed mix of data. It goes gradually from general
# text to specialised text (mathematics, code, reasoning), and in steps from small batches to large
# ones and from short sequences to long ones. The mixture of domains is not switched a few times by
# hand: a schedule sets it anew at every step.
#
# Three quantities follow schedules here, each with its own unit:
#
#     seq_len, batch_tokens    by tokens seen: [[0, 4096], [4_500_000_000_000, 16384]] trains on
#                              4,096 tokens per sequence, and on 16,384 from 4.5T tokens on
#     mixture                  by the fraction of the run's tokens, linear between its points:
#                              [[0, {"web": 0.9, "math": 0.1}], [1, {"web": 0.5, "math": 0.5}]]
#
# (pretrain.py has the others: the decay of the learning rate is a fraction of the run, RoPE's theta
# goes by tokens seen, and warm-up, logging and saving count steps.) With the 12.7B config the 5.5T
# tokens make 122,191 steps, from 4,096 sequences of 4,096 tokens to 5,120 sequences of 16,384.
#
# A share is a fraction of the tokens, but a batch is made of whole sequences. A step of the quick
# start reads 16 of them, and mathematics begins with a share of 10%: 1.6 sequences. Rounding each
# step on its own would give it 2 of 16, 12.5%, at every step. So what rounding leaves over is
# carried on: a domain's *quota* is the sum of its shares of all steps so far, in tokens, and
# assign_rows() below keeps what was read of each domain within one sequence of its quota, at every
# step.
#
# All of this is arithmetic on the config and opens no data. The dry run prints it, and a run that
# resumes needs no state of it but the number of the step.


def parse_schedule(key: str, value) -> list[tuple[int, int]]:
    """A schedule by tokens seen: a number, or [[tokens, number], ...] beginning at 0 tokens. Each
    number holds from the first step that begins at or after its tokens.

    >>> parse_schedule("seq_len", 256)
    [(0, 256)]
    >>> parse_schedule("seq_len", [[0, 128], [350_000, 256]])
    [(0, 128), (350000, 256)]
    """
    pairs = [[0, value]] if type(value) is int else value
    problem = UserError(f"{key}={value} must be a positive number, or [[0, number], [tokens, "
                        "number], ...] with rising tokens")
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise problem

    schedule = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or [type(x) for x in pair] != [int, int]:
            raise problem
        tokens, number = pair
        rises = tokens > schedule[-1][0] if schedule else tokens == 0
        if not rises or number <= 0:
            raise problem
        schedule.append((tokens, number))
    return schedule


def value_at(schedule: list[tuple[int, int]], tokens: int) -> int:
    """The number that a schedule has once so many tokens are seen.

    >>> value_at([(0, 128), (350_000, 256)], 349_999)
    128
    """
    value = schedule[0][1]
    for start, number in schedule:
        if start <= tokens:
            value = number
    return value


def is_share(x) -> bool:
    """Whether x is a number that can be a share: finite and not negative."""
    return type(x) in (int, float) and 0 <= x < math.inf


class Curriculum:
    """What every step reads, from the config alone.

    domains       name -> [source, first share, last share]; shares are fractions of the tokens,
                  and go linearly from the first to the last over the run
    mixture       [[fraction of the run, {name: share}], ...]: replaces those shares
    seq_len       tokens per sequence, and
    batch_tokens  tokens per step over all ranks: numbers or schedules by tokens seen
    max_steps, max_tokens    the run ends at whichever comes first

    Step t reads rows[t] sequences of seq_len[t] tokens after tokens[t] tokens (tokens[steps] is the
    run's total); shares[t, d] is domain d's share of them. context[t] is the sequence length that
    its FLOPs are counted with. Of domain d the step reads sequences first[t, d] to last[t, d] - 1.

    WARNING: sequences are numbered per length, so the numbers begin again at 0 where seq_len
    changes. From there on a run reads text again that it has read before, also if the domain has
    more text than the run needs.

    >>> domains = {"web": ["web.txt", 0.9, 0.5], "math": ["math.txt", 0.1, 0.5]}
    >>> c = Curriculum(domains, batch_tokens=[[0, 40], [120, 80]], seq_len=10, max_tokens=400)
    >>> c.rows, c.tokens
    ([4, 4, 4, 8, 8, 8, 8], [0, 40, 80, 120, 200, 280, 360, 440])
    >>> c.shares.round(2)[[0, 3, 6]].tolist()
    [[0.9, 0.1], [0.79, 0.21], [0.57, 0.43]]
    """

    def __init__(self, domains: dict, *, batch_tokens, seq_len, max_steps: int | None = None,
                 max_tokens: int | None = None, mixture: list | None = None):
        if not (max_steps or max_tokens):
            raise UserError("nothing ends the run: set max_steps or max_tokens")

        lengths = parse_schedule("seq_len", seq_len)
        batches = parse_schedule("batch_tokens", batch_tokens)
        numbers = [number for _, number in lengths]
        if numbers != sorted(numbers):
            raise UserError(f"seq_len={seq_len}: the length may rise, not fall")

        self.names = list(domains)
        self.seq_len = []
        self.rows = []
        self.tokens = [0]
        last_step = max_steps or math.inf
        last_token = max_tokens or math.inf
        while len(self.rows) < last_step and self.tokens[-1] < last_token:
            seen = self.tokens[-1]
            T = value_at(lengths, seen)
            rows = value_at(batches, seen) // T
            if rows == 0:
                raise UserError(f"batch_tokens={value_at(batches, seen)} holds no sequence of "
                                f"seq_len={T}; raise it")
            self.seq_len.append(T)
            self.rows.append(rows)
            self.tokens.append(seen + rows * T)

        self.steps = len(self.rows)
        self.context = self.seq_len
        check_domains(domains)
        if mixture is None:
            first = {name: domain[1] for name, domain in domains.items()}
            last = {name: domain[2] for name, domain in domains.items()}
            mixture = [(0, first), (1, last)]
        check_mixture(mixture, domains)
        self.shares = self._interpolate(mixture)

    def _interpolate(self, mixture: list) -> np.ndarray:
        """(steps, domains): the shares at the beginning of each step."""
        progress = np.array(self.tokens[:-1]) / self.tokens[-1]
        places = [place for place, _ in mixture]
        columns = []
        for name in self.names:
            column = [shares.get(name, 0) for _, shares in mixture]
            columns.append(np.interp(progress, places, column))

        # Shares may miss a sum of 1 by 1e-6, which in a long run would be many sequences.
        shares = np.stack(columns, axis=1)
        return shares / shares.sum(axis=1, keepdims=True)

    @property
    def step_shares(self) -> np.ndarray:
        """(steps, domains): each domain's share of the tokens of each step, in tokens."""
        return self.shares * np.diff(self.tokens)[:, None]

    @cached_property
    def taken(self) -> np.ndarray:
        """(steps, domains) int64: how many sequences of each domain each step reads."""
        quotas = self.step_shares.cumsum(axis=0)
        return assign_rows(quotas, self.seq_len, self.rows)

    @cached_property
    def first(self) -> np.ndarray:
        """(steps, domains) int64: the first sequence that each step reads of each domain."""
        first = np.zeros_like(self.taken)
        for t in range(1, self.steps):
            if self.seq_len[t] == self.seq_len[t - 1]:
                first[t] = first[t - 1] + self.taken[t - 1]
        return first

    @cached_property
    def last(self) -> np.ndarray:
        """(steps, domains) int64: the sequence after the last one that each step reads."""
        return self.first + self.taken

    def need(self) -> dict[str, int]:
        """Tokens to prepare of each domain: its quota, 2% more, as the end of a shard does not fill
        a sequence, and two sequences."""
        need = {}
        for name, quota in zip(self.names, self.step_shares.sum(axis=0)):
            need[name] = int(1.02 * quota) + 2 * max(self.seq_len)
        return need

    def table(self, stores: dict[str, "DomainShards"] | None = None) -> str:
        """The mixture at ten points of the run; then per domain the tokens that the run needs and,
        given its shards, the tokens that there are and how often the run reads them."""
        width = max(9, *map(len, self.names)) + 1
        header = "run     step        tokens  length   rows"
        lines = [header + "".join(f"{name:>{width}s}" for name in self.names)]
        for i in range(10):
            t = round(i * (self.steps - 1) / 9)
            line = (f"{i / 9:4.0%} {t:7,d} {self.tokens[t]:13.4g} {self.seq_len[t]:7,d} "
                    f"{self.rows[t]:6,d}")
            lines.append(line + "".join(f"{share:{width}.1%}" for share in self.shares[t]))

        totals = {"needed": self.step_shares.sum(axis=0)}
        if stores is not None:
            there = []
            for name, need in self.need().items():
                there.append(sum(shard.tokens for shard in stores[name].shards("train", need)))
            totals["there"] = np.array(there)
            totals["epochs"] = totals["needed"] / totals["there"]
        for key, numbers in totals.items():
            lines.append(f"{key:41s}" + "".join(f"{number:{width}.4g}" for number in numbers))
        return "\n".join(lines)


def check_domains(domains: dict) -> None:
    for name, domain in domains.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"domains: the name {name!r} must be letters, digits, '_', '-' and "
                            "'.', as a folder is named after it")
        is_triple = isinstance(domain, (list, tuple)) and len(domain) == 3
        if not (is_triple and isinstance(domain[0], str) and is_share(domain[1])
                and is_share(domain[2])):
            raise UserError(f"domains: {name!r} must be [source, first share, last share] with "
                            f"shares that are not negative, not {domain}")


def check_mixture(mixture: list, domains: dict) -> None:
    problem = UserError(f"mixture={mixture} must be [[fraction of the run, {{name: share}}], ...]")
    if not isinstance(mixture, (list, tuple)) or not mixture:
        raise problem

    before = 0
    for point in mixture:
        if not isinstance(point, (list, tuple)) or len(point) != 2:
            raise problem
        place, shares = point
        if not is_share(place) or not isinstance(shares, dict):
            raise problem
        if not before <= place <= 1:
            raise UserError(f"mixture: {place} must not be less than {before} nor more than 1: the "
                            "fractions of the run rise")
        before = place

        known = shares.keys() <= domains.keys() and all(map(is_share, shares.values()))
        if not known or abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(f"domains or mixture: at {place} of the run the shares of "
                            f"{', '.join(domains)} must not be negative and must sum to 1, "
                            f"not {shares}")


# Which domains get the rows of a step? A sequence is *due* at the first step at which its domain's
# quota reaches its end. What is due by now is read now. The rows that are left go to domains that
# are behind their quotas, earliest deadline first: to those whose next sequence is due soonest.
# Three domains A, B and C with shares .5, .3 and .2, and steps of 2 sequences of 10 tokens:
#
#     step    quota      read before   due now   the row that is left goes to
#        0   10  6  4      0  0  0     A         B, due at step 1 (C only at step 2)
#        1   20 12  8     10 10  0     A         C, due at step 2 (B's next one at step 3)
#        2   30 18 12     20 10 10     A         B, due at step 3 (C's next one at step 4)
#        3   40 24 16     30 20 10     A         C, due at step 4 as B is, but further behind
#        4   50 30 20     40 20 20     A, B
#
# After five steps A, B and C have given 5, 3 and 2 sequences, and none was ever a whole sequence
# ahead of its quota or behind it. To serve whoever is furthest behind would not ensure that: where
# shares change fast, several domains may be due at once that were hardly behind before. This is
# the chairman assignment problem (Tijdeman, 1980).

ROUNDING = 1e-6  # of a sequence: a quota is a sum of floats


def assign_rows(quotas: np.ndarray, seq_len: list[int], rows: list[int]) -> np.ndarray:
    """How many sequences each step reads of each domain -> (steps, domains) int64.

    quotas: (steps, domains), the tokens that each domain should have given by the end of a step.
    seq_len, rows: (steps,), a step's sequence length and number of sequences.

    >>> quotas = np.outer([20, 40, 60, 80, 100], [0.5, 0.3, 0.2])
    >>> assign_rows(quotas, seq_len=[10] * 5, rows=[2] * 5).tolist()
    [[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1], [1, 1, 0]]

    The 12.7B config's 122,191 steps of 8 domains take about 2 seconds.
    """
    steps, num_domains = quotas.shape
    domains = range(num_domains)
    quota = quotas.T.tolist()  # quota[d][t]: plain lists are faster than arrays of 8 numbers
    read = [0] * num_domains   # tokens
    taken = []

    for t in range(steps):
        T = seq_len[t]

        # What is due: the whole sequences by which a domain is behind its quota.
        lag = [(quota[d][t] - read[d]) / T for d in domains]
        take = [max(0, math.floor(lag[d] + ROUNDING)) for d in domains]

        # The rows that are left, earliest deadline first. A domain that is not behind comes last.
        left = rows[t] - sum(take)
        if left > 0:
            claims = []
            for d in domains:
                behind = lag[d] - take[d]
                deadline = steps + 1
                if behind > ROUNDING:
                    deadline = bisect_left(quota[d], read[d] + (take[d] + 1) * T)
                claims.append((deadline, -behind, d))
            for _, _, d in sorted(claims)[:left]:
                take[d] += 1

        # Rarely more is due than there are rows, as other domains are ahead of their quotas: what
        # is least behind waits for the next step.
        while left < 0:
            claims = [(lag[d] - take[d], d) for d in domains if take[d] > 0]
            take[min(claims)[1]] -= 1
            left += 1

        for d in domains:
            read[d] += take[d] * T
        taken.append(take)

    return np.array(taken, dtype=np.int64).reshape(steps, num_domains)


# ---- shards: tokens on disk

# A shard is a file of token ids: documents one after the other, each as BEGIN ... END. It is never
# read whole: it is mapped into memory, and cut into sequences of T tokens wherever they fall, as
# GPT-2's training text was. Sequence i is tokens i T to i T + T, one more than T, since the last
# token's target is the first one of the next sequence.

MAGIC = b"nnMotif\0"
VERSION = 1
HEADER = struct.Struct("<"     # 88 bytes, little-endian, before the ids:
                       "8s"    # MAGIC
                       "I"     # VERSION
                       "I"     # bytes per id, 2 or 4
                       "Q"     # number of tokens
                       "32s"   # SHA-256 of the ids
                       "32s")  # the tokenizer's fingerprint


class ShardWriter:
    """Writes a shard, which has a temporary name until close()."""

    def __init__(self, path: Path, tokenizer: "Tokenizer"):
        self.path = path
        self.tokenizer = tokenizer.fingerprint()
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
        self.tokens = 0
        self.checksum = hashlib.sha256()
        self.file = open(f"{path}.tmp", "wb")
        self.file.seek(HEADER.size)

    def add(self, ids: list[int]) -> None:
        data = np.array(ids, self.dtype).tobytes()
        self.checksum.update(data)
        self.file.write(data)
        self.tokens += len(ids)

    def close(self) -> int:
        """Write the header and give the shard its name -> its number of tokens."""
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.tokens,
                                    self.checksum.digest(), self.tokenizer))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f"{self.path}.tmp", self.path)
        return self.tokens


class Shard:
    """A shard on disk. Opening it checks its header and size, reading from it first its checksum:
    a damaged file is a UserError that names it."""

    def __init__(self, path: Path, tokenizer: bytes | None = None):
        """tokenizer: the fingerprint that the shard must have."""
        self.path = path
        self.verified = False
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = file.read(HEADER.size)
        except OSError as e:
            raise self._damage(one_line(e)) from None

        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise self._damage("it is not a shard of this project")
        _, version, itemsize, self.tokens, self.checksum, made_by = HEADER.unpack(header)
        if version != VERSION or itemsize not in (2, 4):
            raise self._damage(f"it has version {version}, not {VERSION}")
        if tokenizer not in (None, made_by):
            raise self._damage("it was made with another tokenizer")
        whole = HEADER.size + itemsize * self.tokens
        if size != whole:
            raise self._damage(f"it is truncated: {size} bytes, not {whole}")

        dtype = f"<u{itemsize}"
        if self.tokens:
            self.ids = np.memmap(path, dtype, "r", HEADER.size, shape=(self.tokens,))
        else:
            self.ids = np.empty(0, dtype)  # an empty file cannot be mapped

    def _damage(self, what: str) -> UserError:
        return UserError(f"shard {self.path}: {what}; delete {self.path.parent} and prepare again")

    def num_sequences(self, T: int) -> int:
        return max(0, self.tokens - 1) // T

    def read(self, i: int, T: int) -> np.ndarray:
        """Sequence i: T + 1 ids."""
        if not self.verified:
            if hashlib.sha256(self.ids).digest() != self.checksum:
                raise self._damage("it is corrupted: its checksum differs")
            self.verified = True
        return self.ids[i * T:i * T + T + 1]


# ---- batches

# The sequences of a domain are read in a random order, another one in each epoch. A shuffled list
# of them would have to be made and kept, and the 12.7B config reads a billion sequences. Instead
# the order is *computed*: a keyed permutation says which sequence comes at place i. So a batch is a
# function of (seed, step) on any number of ranks, and all that a checkpoint has to say about the
# data is the step.


def hash_key(*what) -> bytes:
    """48 bytes that depend on `what`: six round keys of a permutation."""
    return hashlib.blake2b(repr(what).encode(), digest_size=48).digest()


def feistel_permutation(i: np.ndarray, n: int, key: bytes) -> np.ndarray:
    """A keyed pseudo-random permutation of range(n), evaluated at places i without storing it.

    >>> feistel_permutation(np.arange(8), 8, hash_key("epoch 0")).tolist()
    [6, 3, 2, 5, 0, 1, 4, 7]
    >>> feistel_permutation(np.array([3]), 10**9, hash_key("epoch 1")).tolist()
    [192577323]

    This is a Feistel network, which ciphers are built from. Split the bits of a number into halves
    (left, right), then six times: (left, right) -> (right, left xor f(right)). A round can be
    undone whatever f is, so the network permutes the numbers of that many bits. Here f mixes
    `right` with the round's key as SplitMix64 does. Where the result is not below n, the network is
    applied again ("cycle walking"), and so permutes range(n). There are at most 4 n numbers of that
    many bits, so a place takes at most 4 turns on average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.frombuffer(key, "<u8")
    out = i.astype(np.uint64)
    outside = np.ones(len(i), dtype=bool)
    while outside.any():
        left = out[outside] >> half
        right = out[outside] & mask
        for round_key in round_keys:
            x = (right + round_key) * np.uint64(0xBF58476D1CE4E5B9)  # modulo 2^64
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = (x >> np.uint64(31)) & mask
            left, right = right, left ^ mixed
        out[outside] = (left << half) | right
        outside = out >= n
    return out.astype(np.int64)


class Sequences:
    """The sequences of T tokens in a list of shards, one shard's after the other's."""

    def __init__(self, shards: list[Shard], T: int):
        self.shards = shards
        self.T = T
        self.ends = np.cumsum([shard.num_sequences(T) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """(T + 1,) ids."""
        k = int(self.ends.searchsorted(i, side="right"))
        before = int(self.ends[k - 1]) if k > 0 else 0
        return self.shards[k].read(i - before, self.T)


class TokenDataset:
    """The batches of a curriculum, read from prepared shards (stores: domain -> its shards)."""

    def __init__(self, curriculum: Curriculum, stores: dict[str, "DomainShards"], seed: int):
        self.curriculum = curriculum
        self.seed = seed
        self.train = {}
        self.val = {}
        for name, need in curriculum.need().items():
            self.train[name] = stores[name].shards("train", need)
            self.val[name] = stores[name].shards("val", need)
        self._sequences = {}  # (part, domain, T) -> Sequences

        # The end of a shard that does not fill a sequence is never read.
        T = max(curriculum.seq_len)
        for name, shards in self.train.items():
            there = sum(shard.tokens for shard in shards)
            filled = T * len(self.sequences("train", name, T))
            if 2 * filled < there:
                raise UserError(f"domain {name!r}: of {there:,d} tokens in {len(shards)} shards "
                                f"only {filled:,d} fill sequences of {T}; lower seq_len or give it "
                                "longer text")

    def sequences(self, part: str, name: str, T: int) -> Sequences:
        """The sequences of T tokens of a domain. part: "train" or "val"."""
        key = (part, name, T)
        if key not in self._sequences:
            shards = self.train[name] if part == "train" else self.val[name]
            self._sequences[key] = Sequences(shards, T)
        return self._sequences[key]

    def fingerprint(self) -> str:
        """16 hex digits of a hash of all training shards that the run may read."""
        checksums = [shard.checksum for shards in self.train.values() for shard in shards]
        return hashlib.sha256(b"".join(checksums)).hexdigest()[:16]

    def num_targets(self, step: int) -> int:
        """Targets in the step's global batch."""
        return self.curriculum.rows[step] * self.curriculum.seq_len[step]

    def rows(self, step: int) -> list[tuple[str, int]]:
        """(domain, sequence) of each row of the step's global batch.

        Place p of a domain is place p % n of its epoch p // n, where n is how many sequences it
        has. Each epoch has a permutation of its own, so that it reads each sequence once. The rows
        of the batch are then shuffled, so that every rank gets a mixture of the domains."""
        T = self.curriculum.seq_len[step]
        rows = []
        for d, name in enumerate(self.curriculum.names):
            n = len(self.sequences("train", name, T))
            places = np.arange(self.curriculum.first[step, d], self.curriculum.last[step, d])
            epochs = places // n
            for epoch in sorted(set(epochs.tolist())):
                key = hash_key(self.seed, name, T, epoch)
                for i in feistel_permutation(places[epochs == epoch] - epoch * n, n, key):
                    rows.append((name, i))

        key = hash_key(self.seed, "order", step)
        order = feistel_permutation(np.arange(len(rows)), len(rows), key)
        return [rows[i] for i in order]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Rows rank, rank + world, rank + 2 world, ... of the step's global batch -> (rows, T + 1)
        int64: inputs are [:, :-1], targets [:, 1:]."""
        T = self.curriculum.seq_len[step]
        rows = self.rows(step)[rank::world]
        out = np.empty((len(rows), T + 1), dtype=np.int64)
        for b, (name, i) in enumerate(rows):
            out[b] = self.sequences("train", name, T)[i]
        return out

    def validation(self, name: str, tokens: int, T: int) -> np.ndarray:
        """About `tokens` held-out tokens of a domain -> (rows, T + 1) int64. The rows are spread
        evenly over what is held out, as files often begin with prefaces."""
        held_out = self.sequences("val", name, T)
        there = len(held_out)
        n = min(there, max(1, tokens // T))
        if n == 0:
            raise UserError(f"domain {name!r} holds out no sequence of {T} tokens (one document in "
                            f"{VAL_EVERY} is held out); lower seq_len or give it more documents")
        rows = [held_out[i * there // n] for i in range(n)]
        return np.stack(rows).astype(np.int64)


# ---- preparing: sources -> shards

# prepare() gives units to processes until every domain has the tokens that the run needs. It can be
# interrupted at any time: the shards of a unit are written under temporary names and get their
# names when they are complete, the training shard last. The next call counts the units that it
# finds and prepares the others.
#
# A run reads units 0, 1, ..., up to the first one with which it has the tokens that it needs. So
# its data follows from its config alone, however many units are prepared, by whatever machines.

VAL_EVERY = 50  # one document in so many is held out for validation


class DomainShards:
    """The shards of one domain: a folder, data_dir/<domain>-<key>, with

        train-00000.bin, val-00000.bin, train-00001.bin, ...    a pair for each unit
        manifest.json      the training tokens of units 0, 1, ... and whether those are all units

    The key is a hash of what decides the shards' content, such as the source and the tokenizer. So
    a run with another source or tokenizer never finds these shards.
    """

    def __init__(self, domain: str, source: str, tokenizer: Tokenizer, data_dir: str):
        self.domain = domain
        self.source = source
        self.tokenizer = tokenizer.fingerprint()
        what = [source, self.tokenizer.hex(), VAL_EVERY, sources.UNIT_BYTES, PROBLEMS_PER_UNIT]
        place = source.partition("?")[0]
        if place.startswith("builtin:"):
            what.append(sys.version)  # another Python's library has other text
        elif place.endswith(READABLE):
            for path in local_files(place):
                stat = path.stat()
                what.append((str(path), stat.st_size, stat.st_mtime_ns))
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:10]
        self.folder = Path(data_dir) / f"{domain}-{key}"

        self.manifest = self.folder / "manifest.json"
        self.tokens = []  # of units 0, 1, ...
        self.complete = False
        if self.manifest.exists():
            try:
                state = json.loads(self.manifest.read_text())
                self.tokens = list(state["tokens"])
                self.complete = bool(state["whole"])
            except (OSError, ValueError, LookupError, TypeError) as e:
                raise UserError(f"{self.manifest} is damaged: {one_line(e)}; delete it and prepare "
                                "again: the shards are kept") from None

    def path(self, part: str, unit: int) -> Path:
        """part: "train" or "val"."""
        return self.folder / f"{part}-{unit:05d}.bin"

    def has(self, need: int) -> bool:
        """Whether the units in the manifest have `need` tokens, or are all units of the source."""
        return self.complete or sum(self.tokens) >= need

    def shards(self, part: str, need: int) -> list[Shard]:
        """The shards of the first units that have `need` training tokens together."""
        found = []
        tokens = 0
        for unit, unit_tokens in enumerate(self.tokens):
            if tokens >= need and found:
                break
            found.append(Shard(self.path(part, unit), self.tokenizer))
            tokens += unit_tokens
        return found

    # The methods below are for prepare().

    def begin(self, need: int, part: tuple[int, int]) -> None:
        """List the units to prepare for `need` tokens. part (i, n): only units i, i + n, i + 2 n,
        ..., as machine i of n."""
        self.units = source_units(self.source)
        self.goal = need / part[1]
        self.queue = list(range(part[0], len(self.units), part[1]))[::-1]  # the next one last
        self.running = set()
        self.tokens_done = 0
        self.scan_done()

    def scan_done(self) -> None:
        """Take finished units off the queue and count their tokens, up to the first unit that is
        not finished. Those after it do not count yet, as a run reads units without a gap."""
        while self.queue and self.path("train", self.queue[-1]).exists():
            shard = Shard(self.path("train", self.queue.pop()), self.tokenizer)
            self.tokens_done += shard.tokens

    def wants_more(self) -> bool:
        return bool(self.queue) and self.tokens_done < self.goal

    def start_next(self) -> int:
        """Take the next unit off the queue -> its number."""
        unit = self.queue.pop()
        self.running.add(unit)
        self.scan_done()
        return unit

    def unit_done(self, unit: int, tokens: int) -> None:
        self.running.remove(unit)
        self.tokens_done += tokens

    def clear(self) -> None:
        """Remove the files of units that were started and did not finish, and the folder if it is
        empty then."""
        for unit in self.running:
            for part in ("train", "val"):
                Path(f"{self.path(part, unit)}.tmp").unlink(missing_ok=True)
            if not self.path("train", unit).exists():
                self.path("val", unit).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def finish(self) -> None:
        """Write the manifest of the units from 0 on, up to the first one that is not there."""
        for unit in range(len(self.tokens), len(self.units)):
            if not self.path("train", unit).exists():
                break
            self.tokens.append(Shard(self.path("train", unit), self.tokenizer).tokens)
        self.complete = len(self.tokens) == len(self.units)

        if sum(self.tokens) == 0:
            shutil.rmtree(self.folder)
            raise UserError(f"domain {self.domain!r}: {self.source} has fewer than two documents "
                            "with text; one is held out for validation")

        state = {"source": self.source, "tokens": self.tokens, "whole": self.complete}
        with open(f"{self.manifest}.tmp", "w") as file:
            file.write(json.dumps(state) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{self.manifest}.tmp", self.manifest)


def prepare(domains: dict, tokenizer_name: str, data_dir: str, need: dict[str, int],
            part: tuple[int, int] = (0, 1), workers: int | None = None) -> dict[str, DomainShards]:
    """Prepare what is missing of need[name] tokens of each domain -> {name: its DomainShards}.

    domains: name -> [source, ...].
    part (i, n): this machine is number i of n that share data_dir, and prepares every n-th unit.
    When all have ended, one more call without part writes the manifests.
    workers: number of processes; None: one for each core."""
    tokenizer = load_tokenizer(tokenizer_name)
    stores = {}
    for name, domain in domains.items():
        stores[name] = DomainShards(name, domain[0], tokenizer, data_dir)
    todo = [store for name, store in stores.items() if not store.has(need[name])]
    if not todo:
        return stores

    workers = workers or os.cpu_count()
    names = ", ".join(store.domain for store in todo)
    print(f"preparing {names} in {data_dir}/ on {workers} processes", flush=True)
    begun = time.time()
    for store in todo:
        store.begin(need[store.domain], part)
    try:
        for store in todo:
            store.folder.mkdir(parents=True, exist_ok=True)
        prepare_units(todo, tokenizer_name, workers)
        if part[1] == 1:
            for store in todo:
                store.finish()
    except OSError as e:
        raise UserError(f"{data_dir} cannot be written: {one_line(e)}; free some space or choose "
                        "another --data_dir") from None
    except BrokenProcessPool:
        raise UserError("a process that prepared data was killed, perhaps for lack of memory; "
                        "try --workers=1") from None
    finally:
        for store in todo:
            store.clear()
    done = sum(store.tokens_done for store in todo)
    print(f"prepared {done:,d} tokens in {time.time() - begun:.0f} s")
    return stores


def prepare_units(todo: list[DomainShards], tokenizer_name: str, workers: int) -> None:
    """Keep `workers` processes busy with units until every domain has its tokens."""
    running = {}  # future -> (store, unit)
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        while True:
            while len(running) < workers:
                store = furthest_behind(todo)
                if store is None:
                    break
                unit = store.start_next()
                future = pool.submit(tokenize_unit, tokenizer_name, store.units[unit], unit,
                                     store.path("train", unit), store.path("val", unit))
                running[future] = (store, unit)
            if not running:
                break

            for future in wait(running, return_when=FIRST_COMPLETED).done:
                tokens = future.result()
                store, unit = running.pop(future)
                store.unit_done(unit, tokens)
            if sys.stderr.isatty():
                done = sum(store.tokens_done for store in todo)
                print(f"\r  {done:,d} tokens", end="\r", file=sys.stderr, flush=True)


def furthest_behind(todo: list[DomainShards]) -> DomainShards | None:
    """The domain to prepare a unit of: of those that want more, one with the fewest units running,
    and among these the one with the smallest part of its goal done."""
    candidates = [store for store in todo if store.wants_more()]
    if not candidates:
        return None
    return min(candidates, key=lambda store: (len(store.running), store.tokens_done / store.goal))


def start_worker() -> None:
    """Set up a process of the pool: it leaves Ctrl-C to its parent, and ends when its parent has
    ended, even if that was killed."""
    def watch_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch_parent, daemon=True).start()


def tokenize_unit(tokenizer_name: str, unit: partial, number: int, train: Path, val: Path) -> int:
    """Write the two shards of a unit -> its number of training tokens. One document in VAL_EVERY is
    held out. The count begins at the unit's number, so that units of a few documents do not all
    hold out their first one."""
    tokenizer = load_tokenizer(tokenizer_name)
    held_out = ShardWriter(val, tokenizer)
    kept = ShardWriter(train, tokenizer)
    for i, text in enumerate(filter(str.strip, unit())):
        writer = held_out if (number + i) % VAL_EVERY == 0 else kept
        writer.add(encode_document(tokenizer, text))

    # The training shard last: a unit counts as finished once that is there.
    held_out.close()
    return kept.close()
