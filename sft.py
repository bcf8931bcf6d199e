"""Supervised fine-tuning: `python sft.py --stage=1`, then 2, then 3, teaches a pre-trained Motif to
answer. A stage is pretrain.py's loop over another dataset: conversations.

    out/sftN/data.txt    what stage N reads, what it dropped and why; the rest is as in pretrain.py

Read it from the ideas to the machinery: the three stages, the chat format, packing, epochs and
batches, which conversations are worth reading, which are held out; then where conversations come
from, how they are prepared, and the run. --model=PATH starts from a model of your own.
"""
import glob
import hashlib
import math
import os
import re
import shutil
import sys
from bisect import bisect_left, insort
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

import configurator
import data
import pretrain
import support.conversations
import synthetic.conversations
import synthetic.texts
from configurator import Count, NonNegative, UserError, one_line
from data import feistel_permutation, hash_key
from model import MotifConfig
from pretrain import TrainConfig
from support.conversations import HELD_OUT, check_conversation, load_conversations
from support.preparing import VAL_EVERY
from support.ranks import RANK, all_gather_object, rank0_first, rank0_only, run_main
from support.run_folder import latest_checkpoint
from support.selection import (benchmark_grams, decontaminate, dedup_and_filter,
                               filter_by_quality, words)
from support.tokenizer import BEGIN, END, ROLES, TURN, TURN_END, Tokenizer, load_tokenizer
from support.weights import model_folder, read_json, tensor_files

# ---- the three stages

# A pre-trained model continues text. Asked "What is 3 + 4?" it may go on with "What is 5 + 6?", as
# lists of questions are text, too. Supervised fine-tuning (SFT) trains it on conversations, and
# only on what the assistant says in them: the rest is context, which it need not learn to write.
#
#     L = -1/|A|  sum over t in A of  log p(x_t | x_1 ... x_t-1)     A: the assistant's tokens
#
# Model, optimizer, loop and checkpoints are those of pre-training. New are the format of a
# conversation, the packing of many short ones into long rows, and the choice of what to read.
#
# Motif-2-12.7B has three stages and no preference optimisation (arXiv 2511.07464, post-training):
#
#     stage                   data                                                peak lr
#     1 general instruction   about 28M conversations, balanced over domains      2e-5
#       following
#     2 compositional         conversations, STEM, mathematics and code, chosen   lower
#       understanding         for reasoning density, completeness and structure;
#                             generated tasks that compose skills
#     3 linguistic            stage 2 without what is redundant or of little      a light
#       precision             value, by diversity and coherence                   continuation
#
# The report gives stage 1 rows of 16,384 tokens, 32M tokens per step (1,953 rows), MuonClip with
# weight decay 0.1, and a cosine to about 0 after 5% warm-up; the other stages have the same here.
# Its data are not public. synthetic/conversations.py generates stand-ins, and --data gives others:
#
#     help      what a module or function of Python's library does, by its docstring
#     skills    one or two small tasks: "Add 5", "Sort its letters", "Give its day of the week"
#     chains    tasks that compose several skills, answered step by step
#
# [ours] marks what the report does not state.


@dataclass
class Stage:
    """What a stage reads, and how fast it learns."""
    data: dict          # name -> [source, weight]: share of the tokens; weight 0: evaluation only
    lr: float           # at its peak
    best_share: float | None = None       # how much of a domain filter_by_quality keeps; None: all
    duplicate_share: float | None = None  # dedup_and_filter's limit; None: it drops nothing
    epochs: int = 1
    batch_tokens: int = 32_000_000
    seq_len: int = 16_384


STAGES = {
    1: Stage(
        data={"help": ["builtin:help?n=1500", 1.0],
              "skills": ["builtin:skills?n=1000", 1.0],
              **HELD_OUT},
        lr=2e-5),
    2: Stage(
        data={"chains": ["builtin:chains?n=1500&steps=2-4", 0.7],
              "skills": ["builtin:skills?n=500", 0.2],
              "help": ["builtin:help?n=500", 0.1],
              **HELD_OUT},
        lr=1e-5,             # [ours]
        best_share=0.8),     # [ours]
    3: Stage(
        data={"chains": ["builtin:chains?n=1500&steps=2-4", 0.5],
              "skills": ["builtin:skills?n=500", 0.25],
              "help": ["builtin:help?n=500", 0.25],
              **HELD_OUT},
        lr=5e-6,             # [ours]
        best_share=0.8,      # [ours]
        duplicate_share=0.7),  # [ours]
}
WARMUP = 0.05  # of the steps: the learning rate rises linearly, then falls on a cosine to 0
QUICKSTART = str(Path(__file__).parent / "config" / "sft_quickstart.py")


@dataclass
class Config(TrainConfig):
    """A stage of fine-tuning. What is None here is as STAGES has it."""
    stage: Literal[1, 2, 3] = 1
    model: str | None = None        # initial weights: the folder of a run, a checkpoint or a model,
                                    # or owner/name of the Hub; None: the stage before this one
    tokenizer: str | None = None    # None: the model's own
    data: dict | None = None        # name -> [source, weight], the weight a share of the tokens, or
                                    # 0: evaluation only. A source is "talks/*.jsonl", "owner/name"
                                    # of the Hub, "builtin:help"; see load_conversations
    decontaminate_against: list = field(default_factory=list)  # .jsonl files of benchmarks, globs:
                                    # drop what shares 13 words in a row with one of their texts
    lr_scale: NonNegative = 1.0     # factor on the stage's learning rate
    epochs: Count | None = None     # an epoch has as many tokens as the data
    batch_tokens: Count | None = None  # tokens per step over all ranks
    seq_len: Count | None = None    # tokens of a row, into which conversations are packed
    prompts: list = field(default_factory=lambda: [
        "What does the module json do?", "Start with the number 12.\n1. Add 5\n2. Multiply by 3",
        "Start with the word lantern.\n1. Reverse it\n2. Count its letters"])


def configured_stage(c: Config) -> Stage:
    """The stage of STAGES with what the config overrides."""
    stage = replace(STAGES[c.stage])  # a copy
    stage.lr *= c.lr_scale
    for key in ("data", "epochs", "batch_tokens", "seq_len"):
        if getattr(c, key) is not None:
            setattr(stage, key, getattr(c, key))

    for name, domain in stage.data.items():
        # The name becomes that of a folder.
        is_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)
        is_pair = isinstance(domain, (list, tuple)) and len(domain) == 2
        if not (is_name and is_pair and isinstance(domain[0], str) and data.is_share(domain[1])):
            raise UserError(f"data: {name!r}: {domain} must be a name of letters, digits, '_', '-' "
                            "and '.', and [source, weight] with a weight of at least 0")
    if not any(weight > 0 for _, weight in stage.data.values()):
        raise UserError("data: no domain has a weight above 0, so there is nothing to train on")
    return stage


# ---- the chat format

# A conversation is a list of messages, {"role": "system" | "user" | "assistant", "content": text}.
# The model sees it as one sequence, in the turn format of the Motif family:
#
#     <|beginoftext|> <|startofturn|><|user|>\n\n{content}<|endofturn|>
#                     <|startofturn|><|assistant|>\n\n{content}<|endofturn|> ... <|endoftext|>
#
# Each <|...|> is a single token, which encode() never gives for a user's text, so that nobody can
# forge the end of a turn. What the assistant says carries loss, and so does its <|endofturn|>: a
# model that did not learn it would never stop. At generation the prompt ends where encode_prompt()
# ends, with "\n\n". Therefore "\n\n" and content are encoded apart: a tokenizer that merged "\n\n"
# with the reply's first word would train on ids that no prompt ends in.


def encode_chat(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """A conversation -> ids and targets, equally many. targets[i] is the token that follows ids[i]
    if the assistant says that token, else -1, which the loss leaves out.

    >>> byte = load_tokenizer("byte")
    >>> ids, targets = encode_chat(byte, [{"role": "user", "content": "2+2?"},
    ...                                   {"role": "assistant", "content": "4."}])
    >>> byte.decode(ids[:10])
    '<|beginoftext|><|startofturn|><|user|>\\n\\n2+2?<|endofturn|>'
    >>> byte.decode(ids[10:])
    '<|startofturn|><|assistant|>\\n\\n4.<|endofturn|>'
    >>> for id_, target in zip(ids, targets):
    ...     if target >= 0:
    ...         print(repr(byte.decode([id_])), "->", byte.decode([target]))
    '\\n' -> 4
    '4' -> .
    '.' -> <|endofturn|>
    """
    check_conversation(messages)
    ids, loss_mask = render_conversation(tokenizer, messages)
    ids.append(tokenizer.special[END])
    loss_mask.append(False)

    targets = []
    for next_id, has_loss in zip(ids[1:], loss_mask[1:]):
        targets.append(next_id if has_loss else -1)
    return ids[:-1], targets


def encode_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The ids after which the assistant's reply to these messages begins."""
    ids, _ = render_conversation(tokenizer, messages)
    return ids + begin_turn(tokenizer, "assistant")


def render_conversation(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list, list]:
    """The turns -> ids and loss mask, which says of each id whether the assistant says it."""
    ids = [tokenizer.special[BEGIN]]
    loss_mask = [False]
    for message in messages:
        head = begin_turn(tokenizer, message["role"])
        body = tokenizer.encode(message["content"]) + [tokenizer.special[TURN_END]]
        ids += head + body
        loss_mask += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    return ids, loss_mask


def begin_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    special = tokenizer.special
    return [special[TURN], special[ROLES[role]]] + tokenizer.encode("\n\n")


def truncate_to_turn(tokenizer: Tokenizer, messages: list[dict],
                     T: int) -> tuple[list, list, bool] | None:
    """The longest beginning of a conversation that ends with a reply and has at most T tokens ->
    ids, targets, whether a reply was cut off; None if not even the first reply fits.

    Half a reply would teach the model to stop in mid-sentence."""
    ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
    for end in reversed(ends):
        ids, targets = encode_chat(tokenizer, messages[:end])
        if len(ids) <= T:
            return ids, targets, end < ends[-1]
    return None


# ---- packing

# Conversations are short and rows are long: in stage 1 a built-in conversation has 150 tokens on
# average, and a row 16,384. One conversation to a row would be 99% padding. So we *pack*: fill each
# row with whole conversations. That is bin packing, which is NP-hard. The rule "longest first, each
# where it leaves least room" needs at most about 11/9 of the fewest possible rows (Johnson et al.,
# 1974), and in practice short conversations fill the gaps: stage 1 in rows of 512 has 3% padding.
#
# Four conversations a, b, c, d of 4, 3, 6 and 5 tokens, in rows of T = 10 (pack() below):
#
#     row 0      c  c  c  c  c  c  a  a  a  a        row 1      d  d  d  d  d  b  b  b  .  .
#     doc_ids    0  0  0  0  0  0  1  1  1  1        doc_ids    0  0  0  0  0  1  1  1 -1 -1
#     positions  0  1  2  3  4  5  0  1  2  3        positions  0  1  2  3  4  0  1  2  0  1
#
# Each conversation must be read as if it were alone. doc_ids tell the model where one ends: its
# attention masks the others out, and its rotary positions restart. Row 1's mask (x: is seen):
#
#     key         d  d  d  d  d  b  b  b  .  .
#     query  d    x
#            d    x  x
#            d    x  x  x
#            d    x  x  x  x
#            d    x  x  x  x  x
#            b                   x
#            b                   x  x
#            b                   x  x  x
#            .                            x
#            .                            x  x
#
# Padding is a document of its own, whose targets are all -1. So loss and gradients are those of the
# conversations one by one (a test compares them), and the work of attention is the sum of their
# squared lengths: the fused kernel skips the empty blocks of the mask.


def pack(lengths: np.ndarray, T: int) -> list[list[int]]:
    """lengths (n,), each at most T -> rows, lists of indices whose lengths sum to at most T. Best
    fit, longest first.

    >>> pack(np.array([4, 3, 6, 5]), T=10)
    [[2, 0], [3, 1]]

    6 opens row 0 and leaves 4; 5 does not fit and opens row 1; 4 fits both, and leaves least in row
    0; 3 goes to row 1. In the order given, the four would need three rows: 4 3 | 6 | 5.
    """
    rows = []
    open_rows = {}  # room left -> the rows that have just that
    rooms = []      # its keys, sorted: at most T, however many rows there are
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])

        smallest_fit = bisect_left(rooms, n)
        if smallest_fit < len(rooms):
            room = rooms[smallest_fit]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                rooms.pop(smallest_fit)
        else:
            room = T
            row = []
            rows.append(row)

        row.append(i)
        room -= n
        if room > 0:
            if room not in open_rows:
                open_rows[room] = []
                insort(rooms, room)
            open_rows[room].append(row)
    return rows


def collate(rows: list[list[np.ndarray]], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of conversations, each (2, n): ids and targets -> ids, targets and doc_ids, each
    (rows, T) int64.

    >>> a = np.array([[7, 8, 9], [-1, 9, 3]])
    >>> b = np.array([[5, 6], [-1, 4]])
    >>> for array in collate([[a, b]], T=6):
    ...     print(array[0])
    [7 8 9 5 6 0]
    [-1  9  3 -1  4 -1]
    [ 0  0  0  1  1 -1]
    """
    ids = np.full((len(rows), T), 0, np.int64)
    targets = np.full((len(rows), T), -1, np.int64)
    doc_ids = np.full((len(rows), T), -1, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for k, conversation in enumerate(row):
            end = start + conversation.shape[1]
            ids[r, start:end] = conversation[0]
            targets[r, start:end] = conversation[1]
            doc_ids[r, start:end] = k
            start = end
    return ids, targets, doc_ids


# ---- epochs and batches

# An epoch reads as many tokens as all domains have together, split by weight. A domain with more
# than its share is read in part, and the next epoch goes on from there; one with less is repeated,
# at most REPEATS times per epoch, since a model learns by heart what it reads too often.
#
# Think of a domain as a tape: all its conversations in a random order, then all in another order,
# and so on. With a quota of q tokens per epoch, epoch e takes the tape from token e q to (e + 1) q,
# and a conversation that lies on the border belongs to the epoch in which its middle falls.
#
# An epoch's conversations, of all domains, are packed together. Best fit begins with the longest,
# so the first rows hold a few long conversations, perhaps all of one domain, and the last rows many
# short ones. Batches must not follow that order. So rows are dealt to n batches like cards: each
# batch gets one of the first n rows, one of the next n, and so on; a keyed permutation says which.
# Eight rows, of which a batch takes at most three, make n = 3 batches:
#
#     rows, long to short    0  1  2 | 3  4  5 | 6  7
#     dealt to batch         2  0  1 | 0  1  2 | 1  0          batch 0: rows 1, 3, 7
#
# All of it follows from the arguments. So the whole state of the data in a checkpoint is one
# integer, the step, and any number of ranks reads the same batches.

REPEATS = 4  # readings of a conversation per epoch, at most [ours]


class TokenizedChats:
    """Encoded conversations in a folder, end to end. Indexing gives (2, n): ids and targets.

        tokens.npy  (2, N) int32   ids, targets; memory-mapped
        spans.npy   (2, n) int64   where each conversation ends, how many of its targets count
    """

    def __init__(self, folder: Path):
        try:
            self.tokens = np.load(folder / "tokens.npy", "r")
            self.ends, self.num_targets = np.load(folder / "spans.npy")
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"{folder} is damaged ({one_line(e)}); delete {folder.parent} and run "
                            "again") from None
        self.lengths = np.diff(self.ends, prepend=0)

    @staticmethod
    def save(folder: Path, encoded: list[tuple[list, list]]) -> None:
        """encoded: (ids, targets) of each conversation."""
        ids = np.concatenate([np.array(ids, "<i4") for ids, _ in encoded])
        targets = np.concatenate([np.array(targets, "<i4") for _, targets in encoded])
        lengths = [len(ids) for ids, _ in encoded]
        num_targets = [sum(target >= 0 for target in targets) for _, targets in encoded]
        folder.mkdir()
        save_array(folder / "tokens.npy", np.stack([ids, targets]))
        save_array(folder / "spans.npy", np.array([np.cumsum(lengths), num_targets], "<i8"))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        end = self.ends[i]
        return self.tokens[:, end - self.lengths[i]:end]


def save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def epoch_quotas(sizes: dict[str, int], weights: dict[str, float]) -> dict[str, float]:
    """Tokens of each domain -> tokens that an epoch reads of it.

    >>> epoch_quotas({"help": 600, "skills": 200}, {"help": 0.5, "skills": 0.5})
    {'help': 400.0, 'skills': 400.0}

    Two thirds of help are read, and skills twice. Of a tiny domain not more than REPEATS times:

    >>> epoch_quotas({"help": 790, "skills": 10}, {"help": 0.5, "skills": 0.5})
    {'help': 400.0, 'skills': 40}
    """
    total = sum(sizes.values())
    total_weight = sum(weights.values())
    quotas = {}
    for name, size in sizes.items():
        quotas[name] = min(weights[name] / total_weight * total, REPEATS * size)
    return quotas


@dataclass
class ChatCurriculum:
    """What pretrain.train() reads of a dataset's curriculum, as in data.Curriculum. Padding is not
    counted as tokens."""
    names: list[str]      # domains
    steps: int
    seq_len: list[int]    # [t]: tokens of a row, T
    rows: list[int]       # [t]: rows of the step's global batch
    tokens: list[int]     # [t]: tokens before step t; [steps]: of the whole run
    context: list[int]    # [t]: sum(len^2) / sum(len), the sequence length with the same attention
                          # cost, by which FLOPs are counted
    shares: np.ndarray    # [t, d]: the domain's share of the step's tokens


class PackedChatDataset:
    """The batches of a stage, for pretrain.train()."""

    def __init__(self, train: dict[str, TokenizedChats], weights: dict[str, float], *, T: int,
                 batch_tokens: int, epochs: int, seed: int):
        self.train = train
        self.T = T
        self.seed = seed
        sizes = {name: int(chats.ends[-1]) for name, chats in train.items()}
        quotas = epoch_quotas(sizes, weights)
        tapes = {name: self._tape(name, epochs * quotas[name]) for name in train}

        self.batches = []  # [step][row] -> list of (domain, conversation)
        for epoch in range(epochs):
            chosen = []
            for name, (order, middles) in tapes.items():
                borders = [epoch * quotas[name], (epoch + 1) * quotas[name]]
                first, last = middles.searchsorted(borders)
                for i in order[first:last].tolist():
                    chosen.append((name, i))

            lengths = np.array([train[name].lengths[i] for name, i in chosen], dtype=np.int64)
            rows = []
            for packed in pack(lengths, T):
                rows.append([chosen[k] for k in packed])
            if rows:
                self.batches += self._shuffle_into_batches(rows, max(1, batch_tokens // T), epoch)
        if not self.batches:
            raise UserError("there is no conversation to train on; give more data")
        self.curriculum = self._make_curriculum()

    def _tape(self, name: str, tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """At least `tokens` tokens of a domain -> its conversations in the order of reading, and
        where the middle of each is on the tape, in tokens."""
        lengths = self.train[name].lengths
        n = len(lengths)
        readings = math.ceil(tokens / lengths.sum() + 1e-9)
        orders = []
        for reading in range(readings):
            key = hash_key(self.seed, name, reading)
            orders.append(feistel_permutation(np.arange(n), n, key))
        order = np.concatenate(orders)
        middles = lengths[order].cumsum() - lengths[order] / 2
        return order, middles

    def _shuffle_into_batches(self, rows: list, max_rows: int, epoch: int) -> list[list]:
        """Rows, long conversations first -> the fewest batches of at most max_rows rows, which
        differ by at most one row."""
        n = math.ceil(len(rows) / max_rows)
        batches = [[] for _ in range(n)]
        for start in range(0, len(rows), n):
            neighbours = rows[start:start + n]
            key = hash_key(self.seed, "rows", epoch, start)
            places = feistel_permutation(np.arange(len(neighbours)), n, key)
            for batch, row in zip(places, neighbours):
                batches[batch].append(row)
        return batches

    def _make_curriculum(self) -> ChatCurriculum:
        names = list(self.train)
        steps = len(self.batches)
        spent = np.zeros((steps, len(names)), dtype=np.int64)
        squares = np.zeros(steps, dtype=np.int64)
        for step in range(steps):
            for name, i in self.conversations(step):
                length = self.train[name].lengths[i]
                spent[step, names.index(name)] += length
                squares[step] += length**2
        tokens = spent.sum(1)
        return ChatCurriculum(
            names=names, steps=steps, seq_len=[self.T] * steps,
            rows=[len(batch) for batch in self.batches],
            tokens=[0, *tokens.cumsum().tolist()],
            context=(squares // tokens).tolist(),
            shares=spent / tokens[:, None])

    def conversations(self, step: int) -> list[tuple[str, int]]:
        """(domain, index) of each conversation in the step's global batch."""
        return [conversation for row in self.batches[step] for conversation in row]

    def num_targets(self, step: int) -> int:
        """Targets in the step's global batch that count: the assistant's tokens."""
        return sum(int(self.train[name].num_targets[i]) for name, i in self.conversations(step))

    def batch(self, step: int, rank: int = 0, world: int = 1):
        """Rows rank, rank + world, ... of the step's global batch -> ids, targets and doc_ids, each
        (rows, T) int64."""
        rows = []
        for row in self.batches[step][rank::world]:
            rows.append([self.train[name][i] for name, i in row])
        return collate(rows, self.T)

    def padding(self) -> float:
        """The share of all rows that no conversation fills."""
        return 1 - self.curriculum.tokens[-1] / (sum(self.curriculum.rows) * self.T)

    def fingerprint(self) -> str:
        """Of the conversations that the run may read."""
        checksum = hashlib.sha256()
        for chats in self.train.values():
            checksum.update(chats.tokens)
            checksum.update(chats.ends)
        return checksum.hexdigest()[:16]


def held_out_rows(chats: TokenizedChats, tokens: int,
                  T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """About `tokens` tokens of held-out conversations, from all over them and at least one, packed
    -> ids, targets and doc_ids, each (rows, T) int64."""
    n = len(chats)
    order = feistel_permutation(np.arange(n), n, hash_key("held out"))
    count = int(chats.lengths[order].cumsum().searchsorted(tokens, side="right"))
    order = order[:max(1, count)]
    rows = []
    for packed in pack(chats.lengths[order], T):
        rows.append([chats[order[k]] for k in packed])
    return collate(rows, T)


# ---- holding out

# One question in VAL_EVERY = 50 is held out for validation. Not one conversation in 50: the same
# question occurs in several conversations, domains and stages, and a model that has read its answer
# in one of them is not tested by it in another. So the *hash of the question's text* decides, which
# needs no list and comes out the same everywhere: held out if it is below 2^64 / 50. The exception
# is a domain so small that it has no such question. It holds out one of its own, which the other
# domains of its stage then leave out too; other stages do not know of it.

HELD_OUT_BELOW = 2**64 // VAL_EVERY


def question_hashes(messages: list[dict]) -> list[tuple[int, int]]:
    """(index of the message, 64-bit hash) of each question: the user's messages before the first
    reply, joined, count as one at index 0; after it each of the user's messages of five words or
    more. "And then?" is no question to hold out.

    >>> chat = [{"role": "user", "content": "Name a river."},
    ...         {"role": "assistant", "content": "The Seine."},
    ...         {"role": "user", "content": "And then?"},
    ...         {"role": "assistant", "content": "The sea."},
    ...         {"role": "user", "content": "Through which cities does it flow?"}]
    >>> [index for index, _ in question_hashes(chat)]
    [0, 4]
    """
    first_reply = [message["role"] for message in messages].index("assistant")
    opening = []
    questions = []
    for i, message in enumerate(messages):
        if message["role"] != "user":
            continue
        if i < first_reply:
            opening.append(message["content"])
        elif len(words(message["content"])) >= 5:
            questions.append((i, hash_text(message["content"])))
    return [(0, hash_text("\n\n".join(opening)))] + questions


def hash_text(text: str) -> int:
    """The first 64 bits of SHA-256: the same in every process, unlike Python's hash."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")


def train_val_split(conversations: list, held_out: set[int]) -> dict[str, list]:
    """Split a domain -> {"val": [...], "train": [...]}. A question is held out if its hash is below
    2^64 / 50, or if it is in `held_out`, the hashes of questions that are for evaluation only.

    val     conversations whose first question is below 2^64 / 50, each cut before the first of the
            user's later messages that is not such a question
    train   conversations in which no question is held out

    Conversations of neither kind are dropped: in training they would tell a held-out answer. If a
    small domain has no first question below 2^64 / 50, the one with the smallest hash is held out.
    """
    hashes = [question_hashes(messages) for messages in conversations]
    bound = HELD_OUT_BELOW
    if hashes:
        least = min(questions[0][1] for questions in hashes)
        bound = max(bound, least + 1)

    parts = {"val": [], "train": []}
    for messages, questions in zip(conversations, hashes):
        below = [i for i, number in questions if number < bound]
        if questions[0][1] < bound:
            parts["val"].append(cut_at_other_question(messages, below))
        elif not below and held_out.isdisjoint(number for _, number in questions):
            parts["train"].append(messages)
    return parts


def cut_at_other_question(messages: list[dict], below: list[int]) -> list[dict]:
    """The messages up to the first one of the user that comes after a reply and is not in `below`,
    a list of indices."""
    has_reply = False
    for i, message in enumerate(messages):
        if message["role"] == "user" and has_reply and i not in below:
            return messages[:i]
        has_reply = has_reply or message["role"] == "assistant"
    return messages


# ---- preparing

def prepare(stage: Stage, benchmarks: list[str], tokenizer: Tokenizer, data_dir: str) -> Path:
    """Read, choose, hold out and encode a stage's conversations -> a folder with TokenizedChats
    val-NAME of each domain, train-NAME of each with a weight, and the report data.txt. The folder
    is named after all that decides what is in it, and is made once. A domain's text must fit in
    memory."""
    folder = Path(data_dir) / f"sft-{preparation_key(stage, benchmarks, tokenizer)}"
    if folder.exists():
        return folder
    print(f"preparing {', '.join(stage.data)} in {folder}", flush=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        report = prepare_domains(stage, benchmarks, tokenizer, temporary)
        (temporary / "data.txt").write_text("\n".join(report) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def preparation_key(stage: Stage, benchmarks: list[str], tokenizer: Tokenizer) -> str:
    """A hash of the settings, of the files' sizes and dates, of the tokenizer and of the code."""
    files = []
    for pattern in [source for source, _ in stage.data.values()] + benchmarks:
        for file in sorted(glob.glob(pattern.partition("?")[0], recursive=True)):
            stat = os.stat(file)
            files.append((file, stat.st_size, stat.st_mtime_ns))
    # builtin:help reads the docstrings of the Python that runs.
    code = [sys.version]
    for file in (__file__, data.__file__, synthetic.conversations.__file__,
                 synthetic.texts.__file__):
        code.append(Path(file).read_bytes())
    what = (stage.data, stage.seq_len, stage.best_share, stage.duplicate_share, benchmarks, files,
            code, tokenizer.fingerprint())
    return hashlib.sha256(repr(what).encode()).hexdigest()[:10]


def prepare_domains(stage: Stage, benchmarks: list[str], tokenizer: Tokenizer,
                    folder: Path) -> list[str]:
    """Write the conversations of all domains into the folder -> lines of report.

    Weight 0 means evaluation only. Those domains come first: all of each is held out, and its
    questions are then kept out of the training conversations of every other domain."""
    T = stage.seq_len
    report = []
    held_out = set()
    for source, _ in HELD_OUT.values():
        held_out |= all_question_hashes(load_conversations(source))

    eval_only = [name for name, (_, weight) in stage.data.items() if weight == 0]
    for name in eval_only:
        source = stage.data[name][0]
        conversations = list(load_conversations(source))
        held_out |= all_question_hashes(conversations)
        report.append(f"{name}: {len(conversations):,d} conversations of {source}")
        report.append(encode_part(folder, "val", name, conversations, tokenizer, T))

    benchmark = benchmark_grams(benchmarks)
    training = [name for name, (_, weight) in stage.data.items() if weight > 0]
    for name in training:
        # A small domain may hold out a question that no rule of all domains holds out: the others
        # must hear of it before any of them is split.
        first_questions = opening_hashes(load_conversations(stage.data[name][0]))
        if min(first_questions, default=0) >= HELD_OUT_BELOW:
            held_out.add(min(first_questions))

    for name in training:
        source = stage.data[name][0]
        conversations = list(load_conversations(source))
        parts = train_val_split(conversations, held_out)
        dropped = len(conversations) - len(parts["train"]) - len(parts["val"])
        report.append(f"{name}: {len(conversations):,d} conversations of {source}")
        if dropped:
            report.append(f"  {dropped:,d} dropped as one of their questions is held out")
        chosen = parts["train"]
        if benchmarks:
            chosen, line = decontaminate(chosen, benchmark)
            report.append(f"  {line}")
        if stage.best_share is not None:
            chosen, line = filter_by_quality(chosen, stage.best_share)
            report.append(f"  {line}")
        if stage.duplicate_share is not None:
            chosen, line = dedup_and_filter(chosen, stage.duplicate_share)
            report.append(f"  {line}")
        report.append(encode_part(folder, "val", name, parts["val"], tokenizer, T))
        report.append(encode_part(folder, "train", name, chosen, tokenizer, T))
    return report


def opening_hashes(conversations) -> set[int]:
    """The hashes of the first questions."""
    return {question_hashes(messages)[0][1] for messages in conversations}


def all_question_hashes(conversations) -> set[int]:
    found = set()
    for messages in conversations:
        found.update(number for _, number in question_hashes(messages))
    return found


def encode_part(folder: Path, part: str, name: str, conversations: list, tokenizer: Tokenizer,
                T: int) -> str:
    """Encode conversations and write them to folder/<part>-<name> -> a line of report."""
    encoded = []
    truncated = 0
    for messages in conversations:
        found = truncate_to_turn(tokenizer, messages, T)
        if found is not None:
            ids, targets, is_cut = found
            encoded.append((ids, targets))
            truncated += is_cut
    if not encoded:
        raise UserError(f"data {name!r}: no conversation of at most {T} tokens is left for "
                        f"{part}; give more data or raise seq_len")
    TokenizedChats.save(folder / f"{part}-{name}", encoded)
    too_long = len(conversations) - len(encoded)
    return (f"  {part}: {len(encoded):,d}, of which {truncated:,d} were cut at a turn to fit {T} "
            f"tokens; {too_long:,d} dropped, as even the first reply ends beyond")


# ---- the run

@dataclass
class Origin:
    """Where the weights of a stage come from."""
    folder: Path      # a model, with its config.json
    tokenizer: str    # name for load_tokenizer
    identity: str     # the initial weights: their folder and a hash


def resolve_init_checkpoint(c: Config) -> Origin:
    """The initial weights: --model, or what the stage before has left."""
    before = "out/quickstart"
    command = "python pretrain.py"
    if c.stage > 1:
        before = f"out/sft{c.stage - 1}"
        command = f"python sft.py --stage={c.stage - 1}"

    checkpoint = latest_checkpoint(Path(c.model or before))
    if checkpoint:
        folder = checkpoint[0]
    elif c.model:
        folder = model_folder(c.model)
    else:
        raise UserError(f"stage {c.stage} starts from {before}, which holds no whole checkpoint; "
                        f"run first: {command}")

    # Other weights differ everywhere, so the last MiB of the last file tells them apart.
    with open(max(tensor_files(folder, "model")), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 2**20))
        identity = f"{folder} ({hashlib.sha256(file.read()).hexdigest()[:8]})"

    tokenizer = str(folder)
    if (folder / "state.json").exists():
        state = read_json(folder / "state.json")
        tokenizer = state["config"]["tokenizer"]
        max_steps = state["config"].get("max_steps") or 0
        if state["step"] < max_steps:
            print(f"note: {folder} is not the end of its run, which has {max_steps} steps")
    return Origin(folder, c.tokenizer or tokenizer, identity)


def find_start(c: Config, out: Path) -> tuple[tuple | None, Origin]:
    """The checkpoint to resume from, as pretrain.find_checkpoint gives it, or None; and the origin.

    A run that resumes does not need its initial weights any more; but if they are still there, they
    must be those that it began with, or two runs would be mixed in one folder."""
    checkpoint = pretrain.find_checkpoint(c, out)
    if checkpoint is None:
        return None, resolve_init_checkpoint(c)

    folder, state = checkpoint
    began_with = state["config"]["init"]
    try:
        identity = resolve_init_checkpoint(c).identity
    except UserError:  # they are gone
        identity = began_with
    if identity != began_with:
        raise UserError(f"{out} holds a run that began with {began_with}, not with {identity}; "
                        "delete it or give another --out_dir")
    return checkpoint, Origin(folder, state["config"]["tokenizer"], began_with)


def check_sizes(stage: Stage, shape: MotifConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """UserError if tokenizer, rows and batch do not fit the model."""
    if tokenizer.n_vocab > shape.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens with those of "
                        f"the turn format, more than the vocab_size={shape.vocab_size} of {folder}")
    if stage.seq_len > shape.max_position_embeddings:
        raise UserError(f"seq_len={stage.seq_len} is longer than the max_position_embeddings="
                        f"{shape.max_position_embeddings} of {folder}; lower it")
    if stage.batch_tokens < stage.seq_len:
        raise UserError(f"batch_tokens={stage.batch_tokens} is less than a row of "
                        f"seq_len={stage.seq_len}; raise it")


def open_dataset(c: Config, stage: Stage, folder: Path) -> tuple[PackedChatDataset, dict]:
    """The prepared folder -> the dataset, and held-out rows of each domain."""
    T = stage.seq_len
    held_out = {}
    for name in stage.data:
        held_out[name] = held_out_rows(TokenizedChats(folder / f"val-{name}"), c.eval_tokens, T)

    weights = {name: weight for name, (_, weight) in stage.data.items() if weight > 0}
    total = sum(weights.values())
    weights = {name: weight / total for name, weight in weights.items()}
    train = {name: TokenizedChats(folder / f"train-{name}") for name in weights}
    dataset = PackedChatDataset(train, weights, T=T, batch_tokens=stage.batch_tokens,
                                epochs=stage.epochs, seed=c.seed)
    if len(set(all_gather_object(dataset.fingerprint()))) > 1:
        raise UserError(f"the machines hold different data in {c.data_dir}; copy one's to all")
    return dataset, held_out


def to_pretrain_config(c: Config, stage: Stage, shape: MotifConfig, origin: Origin,
                       steps: int) -> pretrain.Config:
    """The stage as pretrain.train() reads it, which is what its checkpoints hold."""
    common = {f.name: getattr(c, f.name) for f in fields(TrainConfig)}
    domains = {name: [source, weight, weight] for name, (source, weight) in stage.data.items()}
    return pretrain.Config(
        **asdict(shape), **common, tokenizer=origin.tokenizer, init=origin.identity,
        domains=domains, batch_tokens=stage.batch_tokens, seq_len=stage.seq_len, max_steps=steps,
        lr=stage.lr, warmup_steps=round(WARMUP * steps), decay="cosine", decay_fraction=1 - WARMUP,
        min_lr=0.0)


def encode_chat_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt of the config is a user's question."""
    return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])


def describe(dataset: PackedChatDataset, stage: Stage) -> str:
    """How much of each domain the run reads."""
    curriculum = dataset.curriculum
    spent = curriculum.shares.T @ np.diff(curriculum.tokens)
    total_weight = sum(weight for _, weight in stage.data.values())
    lines = []
    for name, tokens in zip(curriculum.names, spent):
        weight = stage.data[name][1] / total_weight
        times = tokens / dataset.train[name].ends[-1]
        lines.append(f"{name}: {tokens / sum(spent):.1%} of the tokens for a weight of "
                     f"{weight:.1%}; each is read {times:.2f} times")
    lines.append(f"{curriculum.steps:,d} steps, {sum(curriculum.rows):,d} rows; padding "
                 f"{dataset.padding():.2%}")
    return "\n".join(lines)


def setup(c: Config, out: Path) -> tuple:
    """What pretrain.train() takes, checked and built."""
    stage = configured_stage(c)
    if RANK == 0:
        pretrain.check_writable(out)
    device = pretrain.pick_device(c)
    pretrain.meet_ranks(c, device)

    checkpoint, origin = rank0_only(find_start, c, out)
    shape = MotifConfig.from_dict(read_json(origin.folder / "config.json"))
    tokenizer = load_tokenizer(origin.tokenizer)
    check_sizes(stage, shape, tokenizer, origin.folder)

    prepared = rank0_first(
        partial(prepare, stage, c.decontaminate_against, tokenizer, c.data_dir))
    dataset, held_out = open_dataset(c, stage, prepared)
    run = to_pretrain_config(c, stage, shape, origin, dataset.curriculum.steps)
    pretrain.check_fp8(run, dataset.curriculum, device)
    pretrain.check_prompts(run, tokenizer, encode_chat_prompt)
    if checkpoint:
        pretrain.check_compatible(*checkpoint, run, dataset.curriculum)

    def initial_weights(c, out):
        return origin.folder

    model, optimizer = pretrain.build_model_and_optimizer(run, device, checkpoint, initial_weights,
                                                          out)
    if RANK == 0:
        report = (f"stage {c.stage} from {origin.identity}\n{(prepared / 'data.txt').read_text()}"
                  f"{describe(dataset, stage)}\n")
        out.mkdir(parents=True, exist_ok=True)
        (out / "data.txt").write_text(report)
        print(report, end="", flush=True)
    return (run, out, dataset, held_out, model, optimizer, tokenizer, checkpoint,
            encode_chat_prompt)


def main() -> None:
    c = configurator.load(Config, sys.argv[1:], default_file=QUICKSTART)
    c.out_dir = c.out_dir or f"out/sft{c.stage}"
    out = Path(c.out_dir)
    with pretrain.friendly_errors(c, out):
        arguments = setup(c, out)
        if RANK == 0:
            configurator.save(c, out / "config.json")
        pretrain.train(*arguments)


if __name__ == "__main__":
    run_main(main)
