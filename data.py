"""Data: text -> shards of tokens -> a curriculum -> batches.

A run reads several *domains* (web text, code, maths, ...), each of which has a *source* of text.

    prepare(...)                     sources -> shards of tokens on disk; parallel, resumable
    Curriculum(...)                  step -> sequence length, batch, and each domain's share of it
    TokenDataset(...).batch(step)    the step's token ids, a pure function of (seed, step)

The file is read from the idea to the machinery: curriculum, shards, batches; then what makes them:
tokenizers, sources, preparing. `python -m tools.prepare config/X.py` prepares a run's data ahead
of it and prints its curriculum.
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
from bisect import bisect_left
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str as GPT2_PATTERN

from configurator import UserError, one_line
from synthetic.texts import LIBRARY_UNITS, PROBLEMS, PROBLEMS_PER_UNIT, library, problems

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


# ---- tokenizers

# Special tokens of the Motif family's turn format, in which sft.py writes conversations. A
# tokenizer that lacks some of them gets them here, with ids after its own.
BEGIN = "<|beginoftext|>"
END = "<|endoftext|>"
TURN = "<|startofturn|>"
TURN_END = "<|endofturn|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = (BEGIN, END, TURN, TURN_END, *ROLES.values())


class Tokenizer:
    """Text <-> ids. load_tokenizer() makes one; a subclass for each library does the work.

        name        what load_tokenizer was given
        n_vocab     the largest id, plus 1
        special     {special token: id}; all of SPECIALS are in it
        begin_id    the id that the tokenizer's own rule puts before a text; None if it puts none

    encode() takes the spelling of a special token for plain text, so that no document and no user
    can forge the end of a turn. Code that means the token itself writes its id.

    >>> byte = load_tokenizer("byte")
    >>> byte.encode("Hé<|endoftext|>")[:6]
    [72, 195, 169, 60, 124, 101]
    >>> byte.special["<|endoftext|>"], byte.n_vocab
    (257, 263)
    >>> byte.decode([72, 195, 169, 257])
    'Hé<|endoftext|>'
    """

    def __init__(self, name: str, special: dict[str, int], bytes_of: dict[int, bytes]):
        """special: the special tokens that the tokenizer itself has. bytes_of: {id: the text that
        it stands for} of all its other tokens."""
        self.name = name
        self.special = dict(special)
        self.bytes_of = bytes_of
        self.n_vocab = 1 + max([*bytes_of, *special.values()], default=-1)
        for token in SPECIALS:
            if token not in self.special:
                self.special[token] = self.n_vocab
                self.n_vocab += 1
        self.spelling = {i: token for token, i in self.special.items()}

    def encode(self, text: str) -> list[int]:
        with library_errors(self.name):
            return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Bytes that are not UTF-8 give U+FFFD, and so does an id that no token
        has, which an untrained model may sample."""
        text = ""
        run = []  # ordinary tokens are decoded together: one letter may be several tokens
        for i in ids:
            if i in self.bytes_of:
                run.append(i)
            else:
                text += self._decode(run) + self.spelling.get(i, "\ufffd")
                run = []
        return text + self._decode(run)

    def token_bytes(self, i: int) -> bytes:
        """The bytes of text that id i stands for: b"" for a special token. An id that no token has
        gives a byte that is not UTF-8, and so U+FFFD once it is decoded."""
        return b"" if i in self.spelling else self.bytes_of.get(i, b"\xff")

    def fingerprint(self) -> bytes:
        """32 bytes, which differ between tokenizers that could give different ids."""
        return hashlib.sha256(self.identity).digest()


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken: a pattern cuts the text into pieces, then pairs of tokens within
    a piece are merged, the pair whose merged token has the lowest id first."""

    def __init__(self, name: str, pattern: str, ids: dict[bytes, int], special: dict[str, int]):
        taken = set(special.values())
        bytes_of = {i: token for token, i in ids.items() if i not in taken}
        if len(bytes_of) < len(ids):
            raise UserError(f"tokenizer {name}: two of its tokens have the same id")
        if not all(bytes([i]) in ids for i in range(256)):
            raise UserError(f"tokenizer {name}: some of the 256 bytes have no token")

        super().__init__(name, special, bytes_of)
        self.begin_id = self.special[BEGIN]
        tokens = sorted(ids.items(), key=lambda item: item[1])
        self.identity = repr((pattern, tokens, sorted(self.special.items()))).encode()
        with library_errors(name):
            self.library = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ids,
                                             special_tokens=self.special)

    def _encode(self, text: str) -> list[int]:
        return self.library.encode_ordinary(text)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "replace")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, read by Hugging Face's `tokenizers`. Its normalizer, its model and its
    added tokens that are not special (Motif's <think>) do what they do in that library."""

    def __init__(self, name: str, file: Path):
        from tokenizers import Tokenizer as Library
        with library_errors(file):
            self.identity = file.read_bytes()
            library = Library.from_str(self.identity.decode("utf-8"))

            # A file may say that every text is cut or padded to one length, as for inference.
            library.no_truncation()
            library.no_padding()

            # encode_special_tokens means: encode the spelling of special tokens like other text.
            ids = library.get_vocab(with_added_tokens=True)
            library.add_special_tokens([token for token in SPECIALS if token in ids])
            library.encode_special_tokens = True

            added = library.get_added_tokens_decoder()
            with_begin = library.encode("a", add_special_tokens=True)

        special = {token.content: i for i, token in added.items() if token.special}
        byte_level = "ByteLevel(" in f"{library.pre_tokenizer} {library.decoder}"
        bytes_of = {}
        for token, i in ids.items():
            if i not in added:
                bytes_of[i] = spelled_bytes(token, byte_level)
            elif not added[i].special:
                bytes_of[i] = token.encode("utf-8")

        super().__init__(name, special, bytes_of)
        self.library = library
        begins = with_begin.special_tokens_mask[:1] == [1]
        self.begin_id = with_begin.ids[0] if begins else None

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.library.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        with library_errors(self.name):
            return self.library.decode(ids, skip_special_tokens=False)


def byte_letters() -> dict[str, int]:
    """{letter: byte}: how byte-level BPE spells bytes in a tokenizer.json. GPT-2's rule: a visible
    byte of Latin-1 is its own letter, the others take the letters from U+0100 on.

    >>> bytes(byte_letters()[letter] for letter in "Ġcaf\u00c3\u00a9").decode("utf-8")
    ' café'
    """
    letters = {}
    unused = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            letters[chr(byte)] = byte
        else:
            letters[chr(unused)] = byte
            unused += 1
    return letters


BYTE_OF = byte_letters()


def spelled_bytes(token: str, byte_level: bool) -> bytes:
    """The bytes of text that a word of a tokenizer.json's vocabulary stands for."""
    if byte_level and all(letter in BYTE_OF for letter in token):
        return bytes(BYTE_OF[letter] for letter in token)
    if re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte of a letter that has no token
        return bytes([int(token[1:-1], 16)])
    return token.replace("\u2581", " ").encode("utf-8")  # SentencePiece's sign for a space


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

    raise UserError(f"tokenizer {name}: it must be 'byte', a .tiktoken file, a tokenizer.json, a "
                    f"folder with one, owner/name of the Hub, or one of {', '.join(known)}")


def tiktoken_ids(file: Path) -> dict[bytes, int]:
    """{token: id} of a .tiktoken file, whose lines are a token in base64 and its id."""
    ids = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        token, i = line.split()
        ids[base64.b64decode(token)] = int(i)
    return ids


def tokenizer_file(name: str) -> Path:
    """The tokenizer.json of a file's, a folder's or a Hub repository's name."""
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
    """(n_vocab,) int64: the bytes of text that each id stands for, for bits per byte. 0 for special
    tokens and for ids that no token has."""
    lengths = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for i, token in tokenizer.bytes_of.items():
        lengths[i] = len(token)
    return lengths


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """BEGIN, the tokens of the text, END."""
    return [tokenizer.special[BEGIN], *tokenizer.encode(text), tokenizer.special[END]]


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


def source_units(source: str) -> list[partial]:
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
        return local_units(place, columns)
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


def local_units(pattern: str, columns: list[str]) -> list[partial]:
    """Units of at least UNIT_BYTES: large files are cut, small ones gathered, and what is too
    little for a unit of its own joins the last one."""
    pieces = []
    remaining = 0
    for path in local_files(pattern):
        size = path.stat().st_size
        can_be_cut = path.suffix in (".jsonl", ".txt")
        count = max(1, size // UNIT_BYTES) if can_be_cut else 1
        for i in range(count):
            pieces.append((path, i * size // count, (i + 1) * size // count))
        remaining += size

    units = [[]]
    filled = 0
    for path, start, end in pieces:
        if filled >= UNIT_BYTES and remaining >= UNIT_BYTES:
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
        what = [source, self.tokenizer.hex(), VAL_EVERY, UNIT_BYTES, PROBLEMS_PER_UNIT]
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
