"""Data: a curriculum, a tape for each domain, and the batches that are cut from the tapes.

A run reads several *domains* (web text, code, maths, ...), each of which has a *source* of text.

    Curriculum(...)                  step -> sequence length, batch, and each domain's share of it
    Tape(...)                        a domain's text as one long sequence of tokens
    TokenDataset(...).batch(step)    the step's token ids, a pure function of (seed, step)

Tokenizers, sources of text, and the processes that turn text into tokens while training reads them
are in support/. `python -m tools.prepare config/X.py` prepares all of a run's data ahead of it.
"""
import hashlib
import itertools
import math
import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from configurator import UserError
from support.preparing import PIECE_TOKENS, VAL_UNITS, Domain, Preparer

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
#                              [[0, {"web": 0.9, "math": 0.1}], [1, {"web": 0.5, "math": 0.5}]].
#                              Before the first point and after the last it is constant; two points
#                              at the same fraction make a jump
#
# (pretrain.py has the others: the decay of the learning rate is a fraction of the run, RoPE's theta
# goes by tokens seen, and warm-up, logging and saving count steps.) With the 12.7B config the 5.5T
# tokens make 122,191 steps, from 4,096 sequences of 4,096 tokens to 5,120 sequences of 16,384.
#
# A share is a fraction of the tokens, but a batch is made of whole sequences. The first steps of
# the quick start read 16, and mathematics begins with a share of 10%: 1.6 sequences. Rounding each
# step on its own would give it 2 of 16, 12.5%, for the first 79 steps, in which its share goes from
# 10% to 15.6%: it would be 7 sequences ahead after 35 steps, and 10 behind at the end. So what
# rounding leaves over is carried on: a domain's *quota* is the sum of its shares of all steps so
# far, in tokens, and assign_rows() below keeps what was read of each domain within one sequence of
# its quota, almost always.
#
# Does it pay? With 115M parameters the curriculum moved loss between domains, towards those whose
# share grows, and changed their mean by 0.002 nats per token, +- 0.003 (README, "Does it help").
#
# All of this is arithmetic on the config and opens no data. The dry run prints it, and a run that
# resumes needs no state of it but the number of the step, and the plans that it followed before if
# it was prolonged (ContinuedCurriculum, below).


def value_at(schedule: list[tuple[int, int]], tokens: int) -> int:
    """The number that a schedule has once so many tokens are seen.

    >>> value_at([(0, 128), (350_000, 256)], 349_999)
    128
    """
    begun = [number for start, number in schedule if start <= tokens]
    return begun[-1]


MAX_STEPS = 5_000_000  # of a plan: beyond it planning takes minutes and gigabytes


class Curriculum:
    """What every step reads, from the config alone.

    domains       name -> [source, first share, last share]; shares are fractions of the tokens,
                  and go linearly from the first to the last over the run
    mixture       [[fraction of the run, {name: share}], ...]: replaces those shares
    seq_len       tokens per sequence: a number, or a schedule by tokens seen
    batch_tokens  tokens per step over all ranks: likewise
    max_steps, max_tokens    the run ends once it reaches either

    Before step t the run has read tokens[t] tokens; tokens[steps] is its total. Step t reads
    rows[t] sequences of seq_len[t] tokens. Domain d's share of them should be shares[t, d], and
    taken[t, d] is how many it gives. context[t] is the length that FLOPs are counted with: here
    seq_len[t]; packed conversations (sft.py) have less.

    A *row* is a sequence in a batch. A domain's sequences are read in shuffled order, so a sequence
    has two numbers: its position in the text, and its *place*, the position at which it is read.
    A curriculum counts places alone: of domain d, step t takes places first[t, d] to end[t, d] - 1.
    Both numbers begin at 0 anew where seq_len changes. TokenDataset.batch_rows goes from places to
    the text.

    >>> domains = {"web": ["web.txt", 0.9, 0.5], "math": ["math.txt", 0.1, 0.5]}
    >>> c = Curriculum(domains, batch_tokens=[[0, 40], [120, 80]], seq_len=10, max_tokens=400)
    >>> c.rows, c.tokens
    ([4, 4, 4, 8, 8, 8, 8], [0, 40, 80, 120, 200, 280, 360, 440])
    >>> c.shares.round(2)[[0, 3, 6]].tolist()
    [[0.9, 0.1], [0.79, 0.21], [0.57, 0.43]]
    >>> c.taken[:4].tolist(), c.first[:4].tolist()
    ([[4, 0], [3, 1], [3, 1], [7, 1]], [[0, 0], [4, 0], [7, 1], [10, 2]])
    """

    # Of a run whose plan has changed (the last section): the curriculum before and the step at
    # which it ended; and the earlier plans as checkpoints keep them, [[step, config keys], ...].
    before = None
    earlier_plans = ()

    def __init__(self, domains: dict, *, batch_tokens, seq_len, max_steps: int | None = None,
                 max_tokens: int | None = None, mixture: list | None = None,
                 steps_before: tuple[list, list, list] = ([], [], [0])):
        if not (max_steps or max_tokens):
            raise UserError("nothing ends the run: set max_steps or max_tokens")
        check_domains(domains)
        self.names = list(domains)
        # steps_before holds these three for steps that are planned already.
        self.seq_len, self.rows, self.tokens = map(list, steps_before)
        self._plan_steps(batch_tokens, seq_len, max_steps or math.inf, max_tokens or math.inf)
        self.steps = len(self.rows)
        self.context = self.seq_len

        if mixture is None:
            first_shares = {name: domain[1] for name, domain in domains.items()}
            last_shares = {name: domain[2] for name, domain in domains.items()}
            mixture = [(0, first_shares), (1, last_shares)]
        check_mixture(mixture, domains)
        self.shares = self._interpolate(mixture)

    def _plan_steps(self, batch_tokens, seq_len, max_steps: float, max_tokens: float) -> None:
        """Add the steps up to the end of the run to rows, seq_len and tokens."""
        lengths = parse_schedule("seq_len", seq_len)
        batches = parse_schedule("batch_tokens", batch_tokens)
        numbers = [number for _, number in lengths]
        if numbers != sorted(numbers):
            raise UserError(f"seq_len={seq_len}: the length may rise, not fall")

        while len(self.rows) < max_steps and self.tokens[-1] < max_tokens:
            seen = self.tokens[-1]
            T = value_at(lengths, seen)
            rows = value_at(batches, seen) // T
            if rows == 0:
                raise UserError(f"batch_tokens={value_at(batches, seen)} holds no sequence of "
                                f"seq_len={T}; raise it")
            if len(self.rows) == MAX_STEPS:
                raise UserError(f"the run has more than {MAX_STEPS:,d} steps; lower max_steps or "
                                "max_tokens, or raise batch_tokens")
            self.seq_len.append(T)
            self.rows.append(rows)
            self.tokens.append(seen + rows * T)

    def _interpolate(self, mixture: list) -> np.ndarray:
        """(steps, domains): the shares at the beginning of each step."""
        progress = np.array(self.tokens[:-1]) / self.tokens[-1]
        fractions = [fraction for fraction, _ in mixture]
        columns = []
        for name in self.names:
            column = [shares.get(name, 0) for _, shares in mixture]
            columns.append(np.interp(progress, fractions, column))

        # Shares may miss a sum of 1 by 1e-6, which in a long run would be many sequences.
        shares = np.stack(columns, axis=1)
        return shares / shares.sum(axis=1, keepdims=True)

    @property
    def quota_added(self) -> np.ndarray:
        """(steps, domains): the tokens that a step adds to a domain's quota, not rounded."""
        return self.shares * np.diff(self.tokens)[:, None]

    @cached_property
    def quotas(self) -> np.ndarray:
        """(steps, domains): how many tokens each domain should have given by the end of a step."""
        return self.quota_added.cumsum(axis=0)

    @cached_property
    def taken(self) -> np.ndarray:
        """(steps, domains) int64: how many sequences of each domain each step reads."""
        return assign_rows(self.quotas, self.seq_len, self.rows)

    @cached_property
    def first(self) -> np.ndarray:
        """(steps, domains) int64: the first place that each step takes of each domain."""
        first = np.zeros_like(self.taken)
        begins = set(self.phase_starts)
        for t in range(1, self.steps):
            if t not in begins:
                first[t] = first[t - 1] + self.taken[t - 1]
        return first

    @cached_property
    def end(self) -> np.ndarray:
        """(steps, domains) int64: the place after the last one that each step takes."""
        return self.first + self.taken

    # Consecutive steps with the same seq_len are a *phase*: see "the tape", below.

    @property     # not cached: ContinuedCurriculum asks for super().phase_starts
    def phase_starts(self) -> list[int]:
        """The first step of each phase."""
        changes = [t for t in range(1, self.steps) if self.seq_len[t] != self.seq_len[t - 1]]
        return [0, *changes]

    @cached_property
    def phases(self) -> "list[Phase]":
        return self._phases_from(self.phase_starts, np.zeros(len(self.names), dtype=np.int64))

    def _phases_from(self, first_steps: list[int], start: np.ndarray) -> "list[Phase]":
        """Return the phases that begin at these steps. They follow each other on the tapes, from
        token start (domains,) on."""
        phases = []
        for first_step, next_step in zip(first_steps, [*first_steps[1:], None]):
            T = self.seq_len[first_step]
            count = None if next_step is None else self.end[next_step - 1]
            phases.append(Phase(first_step, T, start, count))
            if count is not None:
                start = start + count * T
        return phases

    def phase_of(self, step: int) -> "Phase":
        begun = [phase for phase in self.phases if phase.first_step <= step]
        return begun[-1]

    def table(self) -> str:
        """The mixture at ten steps; then the tokens that it reads of each domain."""
        width = max(9, *map(len, self.names)) + 1
        header = "steps   step        tokens  length   rows"
        lines = [header + "".join(f"{name:>{width}s}" for name in self.names)]
        for i in range(10):
            t = round(i * (self.steps - 1) / 9)
            line = (f"{i / 9:4.0%} {t:7,d} {self.tokens[t]:13.4g} {self.seq_len[t]:7,d} "
                    f"{self.rows[t]:6,d}")
            lines.append(line + "".join(f"{share:{width}.1%}" for share in self.shares[t]))
        needed = self.quota_added.sum(axis=0)
        lines.append(f"{'needed':41s}" + "".join(f"{number:{width}.4g}" for number in needed))
        return "\n".join(lines)


# Which domains get the rows of a step? A domain's next sequence is *due* at the first step at which
# the domain's quota covers the whole of it. What is due by now is read now. The rows that are left
# go to domains that are behind their quotas, earliest deadline first: to those whose next sequence
# is due soonest.
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


def assign_rows(quotas: np.ndarray, seq_len: list[int], rows: list[int],
                read_before: list[int] | None = None) -> np.ndarray:
    """How many sequences each step reads of each domain -> (steps, domains) int64.

    quotas: (steps, domains), the tokens that each domain should have given by the end of a step;
    over the domains they sum to what is read by then.
    seq_len, rows: (steps,), a step's sequence length and number of sequences.
    read_before: (domains,), the tokens that each domain had given before the first of these steps;
    None: 0.

    >>> quotas = np.outer([20, 40, 60, 80, 100], [0.5, 0.3, 0.2])
    >>> assign_rows(quotas, seq_len=[10] * 5, rows=[2] * 5).tolist()
    [[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1], [1, 1, 0]]

    The 12.7B config's 122,191 steps of 8 domains take about 2 seconds.
    """
    steps, num_domains = quotas.shape
    domains = range(num_domains)
    quota = quotas.T.tolist()  # quota[d][t]: plain lists are faster than arrays of 8 numbers
    read = list(read_before or [0] * num_domains)  # tokens
    taken = []

    for t in range(steps):
        T = seq_len[t]

        # What is due: the whole sequences by which a domain is behind its quota.
        lag = [(quota[d][t] - read[d]) / T for d in domains]
        take = [max(0, math.floor(lag[d] + ROUNDING)) for d in domains]

        # The rows that are left, earliest deadline first. A domain that is not behind comes last.
        # The lags sum to rows[t], so fewer rows are left than there are domains.
        left = rows[t] - sum(take)
        if left > 0:
            claims = []
            for d in domains:
                behind = lag[d] - take[d]
                deadline = math.inf
                if behind > ROUNDING:
                    deadline = bisect_left(quota[d], read[d] + (take[d] + 1) * T)
                claims.append((deadline, -behind, d))
            for _, _, d in sorted(claims)[:left]:
                take[d] += 1

        # More may be due than there are rows, when other domains are ahead of their quotas. This is
        # rare: what is least behind waits for the next step.
        while sum(take) > rows[t]:
            _, d = min((lag[d] - take[d], d) for d in domains if take[d] > 0)
            take[d] -= 1

        assert sum(take) == rows[t]
        for d in domains:
            read[d] += take[d] * T
        taken.append(take)

    return np.array(taken, dtype=np.int64).reshape(steps, num_domains)


# ---- the tape

# A *tape* is a domain's text, end to end, which training reads forward, epoch by epoch. (Domain, in
# support/preparing.py, is the folder of a domain's prepared pieces; Tape, below, is the order in
# which this run reads them.) What a run has read of a domain is a number of tokens, whatever the
# lengths of its sequences were. Where seq_len changes, the tape is cut anew from the token that was
# reached. Where the text ends, the next epoch begins, with its units (below) in another order. With
# letters as tokens, and lengths of 4, then 8:
#
#     tape        the_miller_s_lamp_burns_low_he_reads_until_dawn . . .
#     seq_len 4   |0--|1--|2--|3--|4--|
#     seq_len 8                       |0------|1------|2------|
#
# A *unit* is a part of the text that one process prepares: a file, a part of one, or several small
# ones (support/sources.py). support/preparing.py makes it piece by piece, some millions of tokens
# each, a little ahead of the run. It keeps a *record* of each piece that it has made: its number of
# tokens, whether it is its unit's last, and checksums.
#
# A sequence of T tokens takes one more from the tape, the target of its last token, which is also
# the first token of the next sequence. It begins wherever it falls, as in GPT-2's training: in the
# midst of a document, or with the end of one and the beginning of the next.
#
# Sequences that follow each other are often of the same document, and a step should read many. So
# within each *window* of WINDOW_TOKENS the sequences are read in a random order. Here are windows
# of three sequences; seq_len changes within the second window, which is cut short there:
#
#     places      0 1 2   3 4   0 1 2 ...
#     sequences   2 0 1   4 3   1 2 0 ...
#
# The order follows from the seed, the domain, the window and its length. So a batch is a pure
# function of (seed, step), on any number of ranks.
#
# A window ends with the sequence in which an epoch ends, so that a text shorter than a window is
# read once before any of it is read twice.
#
# Why not shuffle the whole domain? Then all of it would have to be there before the first step, 22
# terabytes for the 12.7B config. A tape is needed a window ahead of the reader only, and is
# prepared while training reads it (support/preparing.py). Larger scales are mixed as well: the
# units of text come in a random order, and so do the documents in a piece of a unit.

WINDOW_TOKENS = 2**20
VAL_DOCUMENTS = 8


def window_size(T: int) -> int:
    """Sequences of T tokens in a window that nothing cuts short."""
    return max(1, WINDOW_TOKENS // T)


@dataclass
class Phase:
    """Consecutive steps with the same seq_len. In them each domain reads one stretch of its
    tape."""
    first_step: int
    T: int
    start: np.ndarray         # (domains,) where the stretch begins, in tokens
    count: np.ndarray | None  # (domains,) sequences that are planned for it, where its last window
                              # is cut; None: up to the end of the run. (A plan that changes may end
                              # the phase earlier.)

    def window_of_place(self, d: int, place: int, epoch_tokens: float) -> tuple[int, int]:
        """-> (first, end): the window of domain d that contains a place. The window reads
        sequences first to end - 1, in shuffled order.

        Windows begin anew with the first sequence that begins in an epoch of epoch_tokens. Say
        windows have 3 sequences, the phase has 8, and an epoch ends within sequence 4, counted from
        0. The windows are then 0 to 2, 3 to 4, 5 to 7."""
        T = self.T
        start_token = int(self.start[d])
        # Windows cross neither sequence epoch_first, with which an epoch of the tape begins, nor
        # `cut`, with which the next epoch begins, or the phase ends.
        epoch_first = 0
        cut = math.inf
        if epoch_tokens < math.inf:
            epoch = (start_token + place * T) // epoch_tokens
            epoch_first = max(0, ceil_div(epoch * epoch_tokens - start_token, T))
            cut = ceil_div((epoch + 1) * epoch_tokens - start_token, T)
        if self.count is not None:
            cut = min(cut, int(self.count[d]))

        size = window_size(T)
        window_first = epoch_first + (place - epoch_first) // size * size
        return window_first, min(window_first + size, cut)


def random_order(n: int, *key) -> np.ndarray:
    """(n,) int64: range(n) in an order that follows from the key, by sorting n numbers that a
    hash of the key gives. (NumPy's generators may give another order in another version.)

    >>> random_order(8, "window", 0).tolist()
    [7, 2, 4, 1, 6, 0, 5, 3]
    """
    noise = hashlib.shake_128(repr(key).encode()).digest(8 * n)
    return np.argsort(np.frombuffer(noise, "<u8"), kind="stable")


cached_random_order = lru_cache(maxsize=64)(random_order)  # of the units and windows being read


class Tape:
    """The pieces of a domain in the order in which a run reads them, as far as extend() came."""

    def __init__(self, domain: Domain, seed: int):
        self.domain = domain
        self.seed = seed
        self.pieces = []      # (unit, piece)
        self.ends = []        # how long the tape is at the end of each
        self.next_unit = 0    # the number on the tape of the unit that comes next,
        self.next_piece = 0   # and its piece
        self.epoch_tokens = math.inf  # tokens of an epoch, once the end of the first is there

    def __len__(self) -> int:
        """Tokens."""
        return self.ends[-1] if self.ends else 0

    def unit_at(self, k: int) -> int:
        """The unit that is number k on the tape. Every epoch has all units, in its own order."""
        units = self.domain.num_units
        order = cached_random_order(units, self.seed, "units", self.domain.name, k // units)
        return int(order[k % units])

    def extend(self, end: int, start: int = 0) -> bool:
        """Go on until the tape has `end` tokens -> whether it has. What comes before `start` will
        not be read again, so its files may be gone."""
        records = self.domain.records
        while len(self) < end:
            unit = self.unit_at(self.next_unit)
            record = records.get((unit, self.next_piece))
            if record is None:
                return False
            length = len(self) + record["tokens"]
            if length > start and not self.domain.has(unit, self.next_piece):
                return False

            self.pieces.append((unit, self.next_piece))
            self.ends.append(length)
            self.next_piece += 1
            if record["last"]:
                self.next_piece = 0
                self.next_unit += 1
                # next_unit counts on through all epochs. So this is true once, as the first ends.
                if self.next_unit == self.domain.num_units:
                    self._end_epoch()
        return True

    def _end_epoch(self) -> None:
        """Note the length of an epoch: all are as long as the first."""
        self.epoch_tokens = len(self)
        if self.epoch_tokens == 0:
            raise UserError(f"domain {self.domain.name!r}: {self.domain.source} has no documents "
                            "with text beside those that are held out for validation")

    def units_to_come(self) -> Iterator[tuple[int, int]]:
        """What comes after what is there: (unit, its first piece that is wanted), for ever."""
        yield self.unit_at(self.next_unit), self.next_piece
        for k in itertools.count(self.next_unit + 1):
            yield self.unit_at(k), 0

    def read(self, start: int, length: int) -> np.ndarray:
        """(length,) ids from token `start` on."""
        parts = []
        k = bisect_right(self.ends, start)
        while length > 0:
            begin = self.ends[k - 1] if k > 0 else 0
            n = min(length, self.ends[k] - start)
            if n > 0:
                parts.append(self.domain.read(*self.pieces[k], start - begin, n))
            start += n
            length -= n
            k += 1
        return np.concatenate(parts)


# ---- batches


class TokenDataset:
    """The batches of a curriculum, read from tapes.

    domains     name -> its Domain
    preparer    makes the pieces that are not there; None: another process does
    keep_read   how many pieces of each domain are kept behind the run; None: all
    """

    def __init__(self, curriculum: Curriculum, domains: dict[str, Domain], seed: int,
                 preparer: Preparer | None = None, keep_read: int | None = None):
        self.curriculum = curriculum
        self.domains = domains
        self.seed = seed
        self.tapes = {name: Tape(domain, seed) for name, domain in domains.items()}
        self.prefetcher = Prefetcher(self, preparer, keep_read)

    def fingerprint(self) -> str:
        """16 hex digits of a hash of piece 0 of unit 0 of each domain, and of what it holds out.
        That tells another source or tokenizer, and costs little; not a change further on."""
        checksums = []
        for _, domain in sorted(self.domains.items()):
            self.prefetcher.wait_for_held_out(domain, 0)
            record = domain.records[0, 0]
            checksums += [record["sha256"], record.get("held_out_sha256", "")]
        return hashlib.sha256("".join(checksums).encode()).hexdigest()[:16]

    def num_targets(self, step: int) -> int:
        """Targets in the step's global batch."""
        return self.curriculum.rows[step] * self.curriculum.seq_len[step]

    def batch_rows(self, step: int) -> list[tuple[str, int]]:
        """(domain, where on its tape it begins) of each row of the step's global batch. The rows
        are shuffled, so that every rank gets a mixture of the domains."""
        c = self.curriculum
        phase = c.phase_of(step)
        rows = []
        for d, name in enumerate(c.names):
            epoch_tokens = self.tapes[name].epoch_tokens
            for place in range(c.first[step, d], c.end[step, d]):
                # Place p of a window reads its sequence number order[p - window_first].
                window_first, window_end = phase.window_of_place(d, place, epoch_tokens)
                order = cached_random_order(window_end - window_first, self.seed, name,
                                            int(phase.start[d]), window_first)
                sequence = window_first + int(order[place - window_first])
                rows.append((name, int(phase.start[d]) + sequence * phase.T))
        return [rows[i] for i in random_order(len(rows), self.seed, "rows", step)]

    def batch(self, step: int, first_row: int = 0, world: int = 1) -> np.ndarray:
        """Rows first_row, first_row + world, ... of the step's global batch -> (rows, T + 1) int64:
        inputs are [:, :-1], targets [:, 1:]. Waits until what it reads is prepared.
        Ranks may get unequally many (pretrain.read_batch pads them)."""
        self.prefetcher.wait_for(step)
        T = self.curriculum.seq_len[step]
        rows = self.batch_rows(step)[first_row::world]
        out = np.empty((len(rows), T + 1), dtype=np.int64)
        for b, (name, start) in enumerate(rows):
            out[b] = self.tapes[name].read(start, T + 1)
        return out

    def validation(self, name: str, tokens: int, T: int) -> np.ndarray:
        """About `tokens` held-out tokens of a domain -> (rows, T + 1) int64: rows at equal
        distances over the text of at least VAL_DOCUMENTS held-out documents, if there are so
        many."""
        domain = self.domains[name]
        rows = max(1, tokens // T)
        held_out = np.empty(0, dtype=np.int64)
        documents = 0
        for unit in range(min(VAL_UNITS, domain.num_units)):
            if len(held_out) > rows * T and documents >= VAL_DOCUMENTS:
                break
            self.prefetcher.wait_for_held_out(domain, unit)
            held_out = np.concatenate([held_out, domain.read_held_out(unit)])
            documents += domain.records[unit, 0]["held_out_documents"]

        there = (len(held_out) - 1) // T
        if there < 1:
            raise UserError(f"domain {name!r} holds out {len(held_out)} tokens, which is no "
                            f"sequence of {T}; lower seq_len or give it more documents")
        rows = min(rows, there)
        starts = [i * there // rows * T for i in range(rows)]
        return np.stack([held_out[start:start + T + 1] for start in starts])

    def tape_span(self, step: int, d: int) -> tuple[int, int]:
        """Where the windows that a step reads of a domain begin and end on its tape, in tokens. The
        end includes one token more, the last one's target."""
        phase = self.curriculum.phase_of(step)
        start = int(phase.start[d])
        end_place = int(self.curriculum.end[step, d])
        if end_place == 0:
            return start, start
        # A step that takes no place has first = end: then the window of the place before.
        first_place = min(int(self.curriculum.first[step, d]), end_place - 1)
        epoch_tokens = self.tapes[self.curriculum.names[d]].epoch_tokens
        first, _ = phase.window_of_place(d, first_place, epoch_tokens)
        _, end = phase.window_of_place(d, end_place - 1, epoch_tokens)
        return start + first * phase.T, start + end * phase.T + 1


class Prefetcher:
    """Has the text of a TokenDataset there in time: waits for what a step reads, asks for what
    comes after it, and deletes what lies behind.

    ahead_tokens     name -> how far ahead of the run its text is asked for: a piece for each
                     process that the domain can keep busy
    deleted_pieces   name -> how many pieces at the beginning of its tape were deleted, or kept
                     because it has them again further on
    """

    def __init__(self, dataset: TokenDataset, preparer: Preparer | None, keep_read: int | None):
        self.dataset = dataset
        self.preparer = preparer
        self.keep_read = keep_read
        self.deleted_pieces = dict.fromkeys(dataset.domains, 0)
        self.last_report = 0.0
        workers = preparer.limit if preparer else 1
        self.ahead_tokens = {}
        for d, name in enumerate(dataset.curriculum.names):
            share = dataset.curriculum.shares[:, d].max()
            self.ahead_tokens[name] = PIECE_TOKENS * math.ceil(workers * share)

    def wait_for(self, step: int) -> None:
        """Wait until what a step reads is there, and ask for what comes after it."""
        self.last_report = time.monotonic()
        while True:
            self.ask_ahead(step)
            missing = [name for d, name in enumerate(self.dataset.curriculum.names)
                       if not self.extend_tape(step, d)]
            if not missing:
                break
            self.pause()
            self.report(missing[0])
        if self.preparer and self.keep_read is not None:
            self.delete_behind(step)

    def wait_for_held_out(self, domain: Domain, unit: int) -> None:
        """Wait for the first piece of a unit, and what is held out of it."""
        if domain.has_held_out(unit):
            return
        self.last_report = time.monotonic()
        while not domain.has_held_out(unit):
            if self.preparer:
                self.preparer.request(domain, 1, [(unit, 0)])
            self.pause()
            self.report(domain.name)
        if self.preparer:
            self.preparer.release(domain)     # nobody wants the rest of the unit yet

    def ask_ahead(self, step: int) -> None:
        """Ask for what a step needs of every domain; then, as far as processes are free, for
        ahead_tokens more of each, but for nothing beyond the window in which the run ends."""
        if not self.preparer:
            return
        dataset = self.dataset
        self.preparer.collect()
        for is_ahead in (False, True):
            for d, name in enumerate(dataset.curriculum.names):
                begin, end = dataset.tape_span(step, d)
                if is_ahead:
                    _, run_end = dataset.tape_span(dataset.curriculum.steps - 1, d)
                    end = max(end, min(run_end, end + self.ahead_tokens[name]))
                tape = dataset.tapes[name]
                tape.extend(end, begin)
                self.preparer.request(dataset.domains[name], end - len(tape),
                                      tape.units_to_come())

    def extend_tape(self, step: int, d: int) -> bool:
        """Go on with a domain's tape as far as a step reads it -> whether it goes so far."""
        tape = self.dataset.tapes[self.dataset.curriculum.names[d]]
        # Twice: the first call may come to the end of the first epoch, which changes the windows.
        for _ in range(2):
            begin, end = self.dataset.tape_span(step, d)
            reaches = tape.extend(end, begin)
        return reaches

    def pause(self) -> None:
        """Wait a little, and see what has been prepared meanwhile."""
        if self.preparer:
            self.preparer.collect(seconds=0.2)
        else:
            time.sleep(0.2)
        for domain in self.dataset.domains.values():
            domain.refresh()

    def report(self, name: str) -> None:
        """Say every ten seconds which domain the run waits for; on the rank that prepares."""
        now = time.monotonic()
        if self.preparer and now - self.last_report >= 10:
            self.last_report = now
            tokens = sum(self.dataset.domains[name].unit_tokens.values())
            print(f"waiting for text of {name}, of which {tokens:,d} tokens are prepared",
                  flush=True)

    def delete_behind(self, step: int) -> None:
        """Delete the pieces that lie further behind a step than keep_read. No rank may be at an
        earlier step: train() exchanges a flag (any_rank) at every step, which sees to that."""
        for d, name in enumerate(self.dataset.curriculum.names):
            tape = self.dataset.tapes[name]
            begin, _ = self.dataset.tape_span(step, d)
            read = bisect_right(tape.ends, begin)
            # The next epoch has the same pieces: one of them may be kept, or be still to come.
            kept = set(tape.pieces[max(0, read - self.keep_read):])
            for k in range(self.deleted_pieces[name], read - self.keep_read):
                if tape.pieces[k] not in kept:
                    self.dataset.domains[name].path(*tape.pieces[k]).unlink(missing_ok=True)
                self.deleted_pieces[name] = k + 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- what a config may say


def parse_schedule(key: str, value) -> list[tuple[int, int]]:
    """A schedule by tokens seen: a number, or [[tokens, number], ...] beginning at 0 tokens. Each
    number holds from the first step that begins at or after its tokens.

    >>> parse_schedule("seq_len", 256)
    [(0, 256)]
    >>> parse_schedule("seq_len", [[0, 128], [350_000, 256]])
    [(0, 128), (350000, 256)]
    """
    pairs = [[0, value]] if type(value) is int else value
    problem = UserError(f"{key}={value} must be a positive whole number, or [[0, number], "
                        "[tokens, number], ...] of whole numbers with rising tokens")
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


def is_share(x) -> bool:
    """Whether x is a number that can be a share: finite and not negative."""
    return type(x) in (int, float) and 0 <= x < math.inf


def check_domains(domains: dict) -> None:
    if not domains:
        raise UserError("domains is empty; give at least one {name: [source, first share, last "
                        "share]}")
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
        fraction, shares = point
        if not is_share(fraction) or not isinstance(shares, dict):
            raise problem
        if not before <= fraction <= 1:
            raise UserError(f"mixture: {fraction} must not be less than {before} nor more than 1: "
                            "the fractions of the run must not fall")
        before = fraction

        known = shares.keys() <= domains.keys() and all(map(is_share, shares.values()))
        if not known or abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(f"domains or mixture: at {fraction} of the run the shares may name "
                            f"only {', '.join(domains)}, must not be negative and must sum to 1, "
                            f"not {shares}")


# ---- a run that goes on under another plan: skip this section unless a run's plan changes

# A run that is prolonged, or whose plan changes otherwise, keeps what it has read: the old plan
# holds for the steps before the change, the new one from it on. If seq_len stays as it is, the
# phase that has begun goes on as if it had been planned so.
#
# But where seq_len changes before the window that has begun is read to its end, the unread
# sequences of the window lie scattered. Say the window has sequences 0 to 3 in the order 2, 0, 3,
# 1, and three of them are read. If the next phase began with sequence 3, it would read that again,
# and 1 would never be read. So a new phase begins at the change of plan, and its text begins after
# the window. Where is that? Here at 4; but a curriculum cannot know, as the end of an epoch may
# begin a window, too. It knows the last place read, 2, and that a window has at most 4 sequences.
# So this one ends at 2 + 4 = 6 at the latest, and the new phase begins there. Sequence 1 is lost,
# and here 4 and 5 as well: always less than a window, about a million tokens of each domain.


class ContinuedCurriculum(Curriculum):
    """What the steps read if the plan changed at a step.

    before        (curriculum, step): the plan before, which was followed for steps 0 to step - 1,
                  and may be a ContinuedCurriculum itself. This plan sets the steps from `step` on
    **plan        as Curriculum has it; also max_steps, max_tokens and the mixture's fractions count
                  from step 0. UserError if the run has passed the new plan's end"""

    def __init__(self, domains: dict, *, before: tuple[Curriculum, int],
                 max_steps: int | None = None, max_tokens: int | None = None, **plan):
        old, step = before
        # The run may end at this very step: with max_tokens it does if its last step began with
        # fewer tokens than that.
        past_steps = max_steps is not None and step > max_steps
        past_tokens = max_tokens is not None and old.tokens[max(0, step - 1)] >= max_tokens
        if past_steps or past_tokens:
            raise UserError(f"max_steps={max_steps}, max_tokens={max_tokens}: the run is at "
                            f"step {step} already; make it longer, or give another --out_dir")
        self.before = before
        steps_before = (old.seq_len[:step], old.rows[:step], old.tokens[:step + 1])
        super().__init__(domains, max_steps=max_steps, max_tokens=max_tokens,
                         steps_before=steps_before, **plan)

    def _past(self, array: np.ndarray) -> np.ndarray:
        """(steps, domains) of the plan before -> its part that was followed, with a column for each
        of our domains. A domain that is new has read nothing."""
        _, step = self.before
        return self._our_columns(array[:step])

    def _our_columns(self, array: np.ndarray) -> np.ndarray:
        """(..., domains of the plan before) -> (..., our domains), with 0 for what is new. A domain
        that an earlier plan left out begins anew. One whose source has changed goes on in the new
        text at the place that it had reached in the old one."""
        old, _ = self.before
        ours = np.zeros((*array.shape[:-1], len(self.names)), dtype=array.dtype)
        for d, name in enumerate(self.names):
            if name in old.names:
                ours[..., d] = array[..., old.names.index(name)]
        return ours

    def _interpolate(self, mixture: list) -> np.ndarray:
        old, step = self.before
        shares = super()._interpolate(mixture)
        shares[:step] = self._past(old.shares)
        return shares

    @cached_property
    def quotas(self) -> np.ndarray:
        old, step = self.before
        past = self._past(old.quotas)
        if set(old.names) != set(self.names):
            # The domains' lags behind their quotas sum to 0, and assign_rows relies on it. Without
            # the lag of a domain that is gone they would not. So all begin anew, with lags of 0.
            quota_then = self._tokens_before()
        else:
            quota_then = past[-1] if step > 0 else 0
        to_come = quota_then + self.quota_added[step:].cumsum(axis=0)
        return np.concatenate([past, to_come])

    def _tokens_before(self) -> np.ndarray:
        """(domains,): the tokens that each domain has given under the plan before."""
        old, step = self.before
        past = self._past(old.taken)
        return (past * np.array(self.seq_len[:step], dtype=np.int64)[:, None]).sum(axis=0)

    @cached_property
    def taken(self) -> np.ndarray:
        old, step = self.before
        to_come = assign_rows(self.quotas[step:], self.seq_len[step:], self.rows[step:],
                              self._tokens_before().tolist())
        return np.concatenate([self._past(old.taken), to_come])

    @cached_property
    def _begun(self) -> list[Phase]:
        """The phases that the plan before has begun. `count` is as it was planned: it may have cut
        the last window that was begun."""
        old, step = self.before
        phases = []
        for phase in old.phases:
            if phase.first_step < step:
                count = None if phase.count is None else self._our_columns(phase.count)
                start = self._our_columns(phase.start)
                phases.append(Phase(phase.first_step, phase.T, start, count))
        return phases

    @cached_property
    def _reached(self) -> np.ndarray:
        """(domains,): how many sequences the last of these phases has read."""
        _, step = self.before
        return self.taken[self._begun[-1].first_step:step].sum(axis=0)

    @cached_property
    def _goes_on(self) -> bool:
        """Whether the last of these phases goes on: seq_len stays as it is, and the windows that
        have begun end where they did."""
        _, step = self.before
        if step == 0 or step == self.steps or self.seq_len[step] != self.seq_len[step - 1]:
            return False
        last = self._begun[-1]
        later = [t for t in super().phase_starts if t > step]
        count = self.taken[last.first_step:later[0]].sum(axis=0) if later else None
        return (self._window_end(count) == self._window_end(last.count)).all()

    def _window_end(self, count: np.ndarray | None) -> np.ndarray:
        """(domains,): if the last of these phases has `count` sequences, where the window that has
        begun ends at the latest; 0 for a domain that was not read."""
        end = self._reached - 1 + window_size(self._begun[-1].T)
        if count is not None:
            end = np.minimum(end, count)
        return np.where(self._reached > 0, end, 0)

    @property
    def phase_starts(self) -> list[int]:
        _, step = self.before
        first_steps = [phase.first_step for phase in self._begun]
        if step < self.steps and not self._goes_on:
            first_steps.append(step)
        return first_steps + [t for t in super().phase_starts if t > step]

    @cached_property
    def phases(self) -> list[Phase]:
        begun = self._begun
        if not begun:
            start = np.zeros(len(self.names), dtype=np.int64)
        elif self._goes_on:
            start = begun[-1].start
            begun = begun[:-1]
        else:
            last = begun[-1]
            start = last.start + self._window_end(last.count) * last.T
        return begun + self._phases_from(self.phase_starts[len(begun):], start)

    def passed_over(self) -> dict[str, int]:
        """Domain -> the most tokens of it that the change of plan leaves out, if there are any."""
        if not self._begun or self._goes_on:
            return {}
        last = self._begun[-1]
        tokens = (self._window_end(last.count) - self._reached) * last.T
        return {name: int(n) for name, n in zip(self.names, tokens) if n > 0}
