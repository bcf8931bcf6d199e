"""Supervised fine-tuning: `python sft.py --stage=1`, then 2, then 3, teaches a pre-trained Motif to
answer. A stage is pretrain.py's loop over another dataset: conversations. Without --model, stage 1
starts from the model that `python pretrain.py` has made (the quick start), with the settings of
config/sft_quickstart.py. With --model it starts from that one, with those of the report on Motif-2
(arXiv 2511.07464):

    python sft.py --stage=1 --model=PATH --data="{'mine': ['talks/*.jsonl', 1.0]}"

For conversations of your own stage 1 is enough: 2 and 3 also drop some of them, by their quality.
To talk to the result: `python eval.py --model=OUT_DIR --tasks=chat`.

A stage prints its settings first. data.txt in its out_dir tells what it reads, and what it dropped
and why; the other files there are those of pretrain.py.

Ideas first: the three stages, the chat format, packing, epochs and batches; then how conversations
are prepared, and the run, train_stage. Where they come from is told in support/conversations.py;
which are worth reading, and which are held out for validation, in support/selection.py.
"""
import hashlib
import inspect
import math
import os
import re
import shutil
import socket
import sys
from bisect import bisect_left, insort
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

import configurator
import pretrain
from configurator import Count, Fraction, NonNegative, UserError
from data import is_share, random_order
from model import MotifConfig
from pretrain import TrainConfig
from support.conversations import EVAL_DOMAINS, check_conversation, source_files
from support.encoding import TokenizedChats, encode_chats
from support.preparing import remove_leftovers
from support.ranks import RANK, WORLD, all_gather_object, rank0_first, rank0_only, run_main
from support.run_folder import Checkpoint, find_checkpoint, latest_checkpoint
from support.selection import (benchmark_files, benchmark_grams, questions_held_out,
                               select_conversations)
from support.tasks import TASKS
from support.tokenizer import BEGIN, ROLES, TURN, TURN_END, Tokenizer, load_tokenizer
from support.weights import model_folder, read_json, tensor_files

# ---- the three stages

# A pre-trained model continues text. Asked "What is 3 + 4?" it may go on with "What is 5 + 6?", as
# lists of questions are text, too. Supervised fine-tuning (SFT) trains it on conversations, and
# only on what the assistant says in them: the rest is context, which it need not learn to write.
#
#     L = -1/|A|  sum over t in A of  log p(x_t | x_1 ... x_t-1)
#
# A: all tokens that assistants say in the step's whole (global) batch. Each token counts alike, not
# each conversation.
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
# Config's defaults are what the report gives for stage 1, but for those marked [ours]. Stages 2 and
# 3 differ from it in lr, data and filters only. The report's data are not public. Without --model
# and --data a stage reads conversations that synthetic/conversations.py generates, stages 2 and 3
# in different balance:
#
#     help      what a module or function of Python's library does, by its docstring
#     skills    one or two small tasks: "Add 5", "Sort its letters", "Give its day of the week"
#     chains    tasks that compose several skills, answered step by step
#
# [ours] marks what the report does not state. All data here are [ours] too.


@dataclass
class Stage:
    """What differs between the stages."""
    data: dict          # as Config.data; without the domains that only evaluate
    lr: float           # at its peak
    # For support/selection.py:
    best_share: float | None = None       # how much of a domain is kept, by quality; None: all
    duplicate_share: float | None = None  # a conversation is dropped if it shares more than this
                                          # with those before it, or is repetitive or incoherent;
                                          # None: nothing of this is looked for


STAGES = {
    1: Stage(
        data={"help": ["builtin:help?n=1500", 1.0],
              "skills": ["builtin:skills?n=1000", 1.0]},
        lr=2e-5),
    2: Stage(
        data={"chains": ["builtin:chains?n=1500&steps=2-4", 0.7],
              "skills": ["builtin:skills?n=500", 0.2],
              "help": ["builtin:help?n=500", 0.1]},
        lr=1e-5,             # [ours]
        best_share=0.8),     # [ours]
    3: Stage(
        data={"chains": ["builtin:chains?n=1500&steps=2-4", 0.5],
              "skills": ["builtin:skills?n=500", 0.25],
              "help": ["builtin:help?n=500", 0.25]},
        lr=5e-6,             # [ours]
        best_share=0.8,      # [ours]
        duplicate_share=0.7),  # [ours]
}


@dataclass
class Config(TrainConfig):
    """A stage of fine-tuning. The defaults are the report's for stage 1. What pre-training has as
    well, such as out_dir, data_dir, seed and eval_every, is in pretrain.TrainConfig.

        python sft.py --stage=1                    the quick start's model, then --stage=2, 3
        python sft.py --stage=1 --model=out/mine --data="{'mine': ['talks/*.jsonl', 1.0]}"

    Often set as well: --seq_len=4096 --batch_tokens=262144 --max_steps=500, and --lr=1e-5 for a
    large model. A small one needs more: --lr_scale is 200 for the quick start.
    A line of talks/*.jsonl is a conversation: {"messages": [{"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"}]}, or has another of LAYOUTS in support/conversations.py.
    """
    stage: Literal[1, 2, 3] = 1
    model: str | None = None        # initial weights: the folder of a run, a checkpoint or a model,
                                    # or owner/name of the Hub. None: the quick start's model, as
                                    # the stage before has left it
    tokenizer: str | None = None    # None: the model's own

    # Data
    data: dict | None = None        # name -> [source, weight]. Its share of the tokens is weight /
                                    # sum of weights; 0: evaluation only. A source is
                                    # "talks/*.jsonl", "owner/name" of the Hub, "builtin:help"; more
                                    # in support/conversations.py, load_conversations. None: the
                                    # stage's in STAGES, for the quick start's model only
    decontaminate_against: list = field(default_factory=list)  # .jsonl files of benchmarks, globs:
                                    # drop what shares 13 words in a row with one of their texts;
                                    # always done against the questions in benchmark_dir
    epochs: Count = 1               # [ours] an epoch reads as many tokens as all domains hold
                                    # together, less where a domain would be read more than REPEATS
                                    # times
    max_steps: Count | None = None  # the run ends after so many steps if epochs has more; batches
                                    # do not depend on it
    batch_tokens: Count | None = None  # tokens per step over all ranks; None: the report's
                                    # 32,000,000, or few enough for MIN_STEPS steps
    seq_len: Count | None = None    # tokens of a row, into which conversations are packed; None:
                                    # the report's 16,384, or all that the model can read

    # Learning rate
    lr: NonNegative | None = None   # at its peak; None: the stage's in STAGES, times lr_scale
    lr_scale: NonNegative = 1.0     # a small model takes larger steps; without effect if lr is set
    warmup_fraction: Fraction = 0.05  # of the steps, in which lr rises linearly; then it falls on a
                                    # cosine to 0

    # Evaluation
    eval_tasks: str | None = None   # tasks of eval.py, such as "chains" or "gsm8k,arc_easy", whose
                                    # scores every evaluation logs. Asked in the turn format without
                                    # examples, as by eval.py --chat --num_fewshot=0
    eval_limit: Count = 40          # questions of each task; of mmlu, of each subject
    benchmark_dir: str | None = None  # folder with the tasks' files; None: the Hub's data sets

    # Questions, which the model answers at each evaluation.
    prompts: list = field(default_factory=lambda: [
        "What is the capital of France?", "Write two sentences about the sea."])


BATCH_TOKENS = 32_000_000  # the report's
SEQ_LEN = 16_384           # the report's
MIN_STEPS = 100            # without batch_tokens the batch is small enough for so many steps, but
                           # holds at least one row. Padding, and whole rows, can make them
                           # several times as many [ours]


def fill_in_stage(c: Config) -> None:
    """Set data and lr if the config leaves them open, and check data. (seq_len is set once the
    model's shape is known, batch_tokens once the conversations are: PackedChatDataset.)"""
    if c.model == "":
        raise UserError("--model= is empty; give a folder, or leave it out for the quick start's")
    if c.model and c.data is None:
        raise UserError("--model needs --data, as the built-in conversations are for the quick "
                        "start's model; give --data=\"{'mine': ['talks/*.jsonl', 1.0]}\"")
    stage = STAGES[c.stage]
    if c.data is None:
        c.data = {**stage.data, **EVAL_DOMAINS}
    if c.lr is None:
        c.lr = stage.lr * c.lr_scale

    for name, domain in c.data.items():
        # The name becomes that of a folder.
        is_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)
        is_pair = isinstance(domain, (list, tuple)) and len(domain) == 2
        if not (is_name and is_pair and isinstance(domain[0], str) and is_share(domain[1])):
            raise UserError(f"data: {name!r}: {domain} must be a name of letters, digits, '_', '-' "
                            "and '.', and [source, weight] with a weight of at least 0")
    if not 0 < sum(weight for _, weight in c.data.values()) < math.inf:
        raise UserError("data: the sum of the weights must be above 0, so that there is something "
                        "to train on, and finite")


def default_out_dir(c: Config) -> str:
    """Where a stage writes: out/NAME-sftN, whatever folder the model NAME lies in.

    >>> default_out_dir(Config(stage=1)), default_out_dir(Config(stage=1, model="out/mine/step_90"))
    ('out/sft1', 'out/mine-sft1')
    >>> default_out_dir(Config(stage=2, model="out/mine-sft1"))
    'out/mine-sft2'
    """
    if not c.model:
        return f"out/sft{c.stage}"
    path = Path(c.model).absolute()
    run = path.parent if re.fullmatch(r"step_\d+", path.name) else path
    return f"out/{re.sub(r'-sft[123]$', '', run.name)}-sft{c.stage}"


# ---- the chat format

# A conversation is a list of messages, {"role": "system" | "user" | "assistant", "content": text}.
# The model sees it as one sequence, in the turn format of the Motif family. (Spaces and the line
# break of this drawing are no part of it; each \n\n is two newlines.)
#
#     <|beginoftext|> <|startofturn|><|user|>\n\n{content}<|endofturn|>
#                     <|startofturn|><|assistant|>\n\n{content}<|endofturn|> ...
#
# Each <|...|> is a single token, which encode() never gives for a user's text, so that nobody can
# forge the end of a turn. What the assistant says carries loss, and so does its <|endofturn|>: a
# model that did not learn it would never stop.
#
# A prompt ends with <|assistant|>\n\n, and the model writes what follows. Training must divide the
# text into tokens at the same place, so "\n\n" and content are encoded separately. A tokenizer that
# sees both at once may make one token of "\n\n" and the reply's first word; after a prompt, which
# has the "\n\n" already, the model could never write that token.


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
    return encode_messages(tokenizer, messages)


def encode_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The ids after which the assistant's reply to these messages begins. The messages are not
    checked."""
    ids, _ = encode_messages(tokenizer, messages)
    return ids + begin_turn(tokenizer, "assistant")


def encode_messages(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list, list]:
    """The turns -> ids and targets, as encode_chat gives them."""
    ids = [tokenizer.special[BEGIN]]
    targets = [-1]
    for message in messages:
        head = begin_turn(tokenizer, message["role"])
        body = tokenizer.encode(message["content"]) + [tokenizer.special[TURN_END]]
        ids += head + body
        if message["role"] == "assistant":
            # The last id of the head is followed by the first one of the body, and so on.
            targets += [-1] * (len(head) - 1) + body + [-1]
        else:
            targets += [-1] * (len(head) + len(body))
    return ids, targets


@cache
def begin_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    special = tokenizer.special
    return [special[TURN], special[ROLES[role]]] + tokenizer.encode("\n\n")


def truncate_to_turn(tokenizer: Tokenizer, messages: list[dict],
                     T: int) -> tuple[np.ndarray, bool]:
    """Cut a conversation after the last reply that ends within T tokens -> (2, n) int32: ids and
    targets, and whether a reply was cut off. UserError if the first reply ends beyond T tokens: to
    cut the prompt would hide what the reply is about, and half a reply would teach the model to
    stop in mid-sentence. Such a conversation is dropped, and counted."""
    chat = np.array(encode_chat(tokenizer, messages), np.int32)
    # Where ids[i] has the target <|endofturn|>, ids[: i + 2] ends with that reply.
    ends = np.flatnonzero(chat[1] == tokenizer.special[TURN_END]) + 2
    fitting = ends[ends <= T]
    if len(fitting) == 0:
        raise UserError(f"its first reply ends beyond {T} tokens")
    return chat[:, :fitting[-1]], len(fitting) < len(ends)


# ---- packing

# Conversations are short and rows are long: in stage 1 a built-in one has 150 tokens on average.
# Alone in a row of 16,384 tokens, it would leave 99% of it to padding. So we *pack*: fill each row
# with whole conversations. To find the fewest rows is bin packing, which is NP-hard. A simple rule
# takes the longest conversation first, and puts each into the row where it leaves least room. It
# needs at most about 11/9 of the fewest rows (Johnson et al., 1974). In practice the short
# conversations, which come last, fill the gaps: stage 1 of the quick start, in rows of 512, has 3%
# padding.
#
# Four conversations a, b, c, d of 4, 3, 6 and 5 tokens, in rows of T = 10 (pack() below):
#
#     row 0      c  c  c  c  c  c  a  a  a  a        row 1      d  d  d  d  d  b  b  b  .  .
#     doc_ids    0  0  0  0  0  0  1  1  1  1        doc_ids    0  0  0  0  0  1  1  1 -1 -1
#     positions  0  1  2  3  4  5  0  1  2  3        positions  0  1  2  3  4  0  1  2  0  1
#
# Each conversation must be read as if it were alone. doc_ids tell the model which tokens belong
# together: attention masks all others out, and rotary positions restart (model.py makes both from
# doc_ids, document_starts). Queries of row 1 see (x):
#
#     keys        d  d  d  d  d  b  b  b  .  .
#     last d      x  x  x  x  x
#     first b                    x
#     second b                   x  x
#     last .                              x  x
#
# Padding is a document of its own, with targets of -1. So loss and gradients are the sums that the
# conversations would give one by one, with the same divisor |A| (a test compares them). The work of
# attention is the sum of squared lengths with the fused kernel, which skips empty blocks of the
# mask; plain attention computes and masks them.


def pack(lengths: np.ndarray, T: int) -> list[list[int]]:
    """lengths (n,), each at most T -> rows: lists of indices, whose lengths sum to at most T each.
    The longest comes first, and each goes where it leaves least room ("best fit decreasing"); of
    rows with equal room, into the one that was filled last. In
    the order given, these four would need three rows, 4 3 | 6 | 5:

    >>> pack(np.array([4, 3, 6, 5]), T=10)
    [[2, 0], [3, 1]]
    """
    assert lengths.max(initial=0) <= T
    rows = []
    open_rows = []    # (tokens of room left, -when it was filled last, row), sorted
    for time, i in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        n = int(lengths[i])
        fits = bisect_left(open_rows, (n,))           # the first that has room for n
        if fits < len(open_rows):
            room, _, row = open_rows.pop(fits)
        else:
            room = T
            row = []
            rows.append(row)

        row.append(i)
        if room > n:
            insort(open_rows, (room - n, -time, row))
    return rows


def collate(rows: list[list[np.ndarray]], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of conversations, each (2, n): ids and targets -> ids, targets and doc_ids, each
    (rows, T) int64.

    >>> a = np.array([[7, 8, 9], [-1, 9, -1]])
    >>> b = np.array([[5, 6], [6, -1]])
    >>> for array in collate([[a, b]], T=6):
    ...     print(array[0])
    [7 8 9 5 6 0]
    [-1  9 -1  6 -1 -1]
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

# In each epoch a domain has a *budget* of tokens, by its weight (epoch_budgets). If the domain has
# more tokens, the next epoch continues where this one ends; if it has fewer, they are repeated.
#
# A domain's *reading order* is all its conversations in a random order, then all in another order,
# and so on. With a budget of q tokens, epoch e reads tokens e * q to (e + 1) * q of this order. A
# conversation across a border belongs to the epoch in which its middle lies.
#
# An epoch's conversations, of all domains, are packed together. Packing begins with the longest, so
# the first rows hold a few long conversations, perhaps all of one domain, and the last rows many
# short ones. A batch should have rows of all kinds. So rows are dealt to n batches like cards: each
# batch gets one of the first n rows, one of the next n, and so on. A permutation, hashed from seed,
# epoch and group of rows, says which. Eight rows, at most three in a batch, make n = 3 batches:
#
#     rows, long to short    0  1  2 | 3  4  5 | 6  7
#     dealt to batch         2  0  1 | 0  1  2 | 1  0          batch 0: rows 1, 3, 7
#
# All of it follows from the seed and the settings. So the whole state of the data in a checkpoint
# is one integer, the step, and any number of ranks reads the same batches. Steps count from 0: the
# checkpoint step_N is written after steps 0 to N - 1, and a run that resumes from it does step N.

# The conversations of a domain, encoded, are a TokenizedChats (support/encoding.py): its [i] is
# (2, n), ids and targets of conversation i; lengths[i] is n; ends[i] is the sum of the lengths of
# conversations 0 to i; and num_targets[i] counts the targets that are not -1.

REPEATS = 4  # how often an epoch reads a domain at most [ours]


def epoch_budgets(sizes: dict[str, int], weights: dict[str, float]) -> dict[str, float]:
    """sizes: tokens of each domain of weight > 0 -> tokens that an epoch reads of it: its share of
    the weights, times the tokens of all.

    >>> epoch_budgets({"help": 600, "skills": 200}, {"help": 0.5, "skills": 0.5})
    {'help': 400.0, 'skills': 400.0}

    Two thirds of help are read, and skills twice. An epoch reads a domain REPEATS times at most,
    since a model learns by heart what it reads too often; then the epoch is shorter:

    >>> epoch_budgets({"help": 790, "skills": 10}, {"help": 0.5, "skills": 0.5})
    {'help': 400.0, 'skills': 40}
    """
    total = sum(sizes.values())
    total_weight = sum(weights.values())
    budgets = {}
    for name, size in sizes.items():
        budgets[name] = min(weights[name] / total_weight * total, REPEATS * size)
    return budgets


@dataclass
class ChatCurriculum:
    """What each step reads, for pretrain.train(), as data.Curriculum has it. Tokens are those of
    conversations: padding is not counted."""
    names: list[str]      # domains
    steps: int
    seq_len: list[int]    # [t]: tokens of a row, T
    rows: list[int]       # [t]: rows of the step's global batch
    tokens: list[int]     # [t]: tokens before step t; [steps]: of the whole run
    context: list[int]    # [t]: sum(len^2) / sum(len) over the step's conversations: if all had
                          # this length, attention would cost as much per token; for the FLOPs
    shares: np.ndarray    # [t, d]: the domain's share of the step's tokens
    earlier_plans: list = field(default_factory=list)  # none: a stage cannot be prolonged


class PackedChatDataset:
    """The batches of a stage, for pretrain.train(): it implements pretrain.Dataset.

    train: the conversations of each domain. weights: domain -> weight, above 0."""

    def __init__(self, train: dict[str, TokenizedChats], weights: dict[str, float], *, T: int,
                 batch_tokens: int | None, epochs: int, seed: int, max_steps: int | None = None):
        self.train = train
        self.T = T
        self.seed = seed
        sizes = {name: int(chats.ends[-1]) for name, chats in train.items()}
        budgets = epoch_budgets(sizes, weights)
        if batch_tokens is None:
            run_tokens = int(epochs * sum(budgets.values()))
            batch_tokens = min(BATCH_TOKENS, max(T, run_tokens // MIN_STEPS))
        self.batch_tokens = batch_tokens
        orders = {name: self._reading_order(name, epochs * budgets[name]) for name in train}

        self.batches = []  # [step][row] -> list of (domain, index of a conversation)
        for epoch in range(epochs):
            rows = self._pack_epoch(epoch, budgets, orders)
            if rows:
                self.batches += self._shuffle_into_batches(rows, max(1, batch_tokens // T), epoch)
        self.batches = self.batches[:max_steps]
        if not self.batches:
            raise UserError("there is no conversation to train on; give more data")
        self.curriculum = self._make_curriculum()

    def _reading_order(self, name: str, tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """At least `tokens` tokens of a domain -> its conversations in the order of reading, and
        how many tokens come before the middle of each."""
        lengths = self.train[name].lengths
        n = len(lengths)
        # One reading too many is harmless; rounding must not give one too few.
        readings = math.ceil(tokens / lengths.sum() + 1e-9)
        orders = []
        for reading in range(readings):
            orders.append(random_order(n, self.seed, name, reading))
        order = np.concatenate(orders)
        middles = lengths[order].cumsum() - lengths[order] / 2
        return order, middles

    def _pack_epoch(self, epoch: int, budgets: dict, orders: dict) -> list[list[tuple[str, int]]]:
        """The conversations of an epoch, in rows. orders: domain -> what _reading_order gives."""
        chosen = []
        for name, (order, middles) in orders.items():
            borders = [epoch * budgets[name], (epoch + 1) * budgets[name]]
            first, last = middles.searchsorted(borders)
            for i in order[first:last].tolist():
                chosen.append((name, i))

        lengths = np.array([self.train[name].lengths[i] for name, i in chosen], dtype=np.int64)
        rows = []
        for packed in pack(lengths, self.T):
            rows.append([chosen[k] for k in packed])
        return rows

    def _shuffle_into_batches(self, rows: list, max_rows: int, epoch: int) -> list[list]:
        """Rows, long conversations first -> the fewest batches of at most max_rows rows, which
        differ by at most one row."""
        n = math.ceil(len(rows) / max_rows)
        batches = [[] for _ in range(n)]
        for start in range(0, len(rows), n):
            group = rows[start:start + n]
            dealt_to = random_order(n, self.seed, "rows", epoch, start)
            for batch, row in zip(dealt_to, group):
                batches[batch].append(row)
        return batches

    def _make_curriculum(self) -> ChatCurriculum:
        names = list(self.train)
        steps = len(self.batches)
        spent = np.zeros((steps, len(names)), dtype=np.int64)  # tokens
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

    def batch(self, step: int, first_row: int = 0, world: int = 1):
        """Rows first_row, first_row + world, ... of the step's global batch -> ids, targets and
        doc_ids, each (rows, T) int64."""
        rows = []
        for row in self.batches[step][first_row::world]:
            rows.append([self.train[name][i] for name, i in row])
        return collate(rows, self.T)

    @cache  # it reads all tokens, and each checkpoint asks for it
    def fingerprint(self) -> str:
        """16 hex digits of a hash of the conversations that the run may read."""
        checksum = hashlib.sha256()
        for chats in self.train.values():
            checksum.update(chats.tokens)
            checksum.update(chats.ends)
        return checksum.hexdigest()[:16]


def pack_val_rows(chats: TokenizedChats, tokens: int,
                  T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack a random choice of held-out conversations, about `tokens` tokens but at least one
    conversation -> ids, targets and doc_ids, each (rows, T) int64."""
    n = len(chats)
    order = random_order(n, "held out")
    count = int(chats.lengths[order].cumsum().searchsorted(tokens, side="right"))
    order = order[:max(1, count)]
    rows = []
    for packed in pack(chats.lengths[order], T):
        rows.append([chats[order[k]] for k in packed])
    return collate(rows, T)


# ---- preparing

def prepare(c: Config, tokenizer: Tokenizer) -> Path:
    """Read, choose, hold out and encode a stage's conversations -> a folder with data.txt, which
    reports, and TokenizedChats: val-NAME of each domain, train-NAME of each with a weight above 0.
    A folder that is there already is used again: its name has a hash of what decides what is in it
    (preparation_key). A domain's text must fit in memory."""
    folder = Path(c.data_dir) / f"sft-{preparation_key(c, tokenizer)}"
    if folder.exists():
        return folder
    print(f"preparing {', '.join(c.data)} in {folder}", flush=True)
    remove_leftovers(folder.parent, "sft-*")
    temporary = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        report = prepare_domains(c, tokenizer, temporary)
        (temporary / "data.txt").write_text("\n".join(report) + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    except OSError:
        if not folder.exists():      # else another run has made the same meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def preparation_key(c: Config, tokenizer: Tokenizer) -> str:
    """10 hex digits: a hash of what decides the content of the folder, so that a run with another
    learning rate, say, encodes nothing again. Of a dataset of the Hub the name alone is hashed: a
    new revision is not noticed."""
    stage = STAGES[c.stage]
    domains = [(name, source, weight > 0) for name, (source, weight) in c.data.items()]
    settings = (domains, c.seq_len, stage.best_share, stage.duplicate_share,
                c.decontaminate_against)

    files = []
    for source, _ in c.data.values():
        files += source_files(source)
    files += benchmark_files(c.decontaminate_against, c.benchmark_dir)
    dates = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    # builtin:help reads the docstrings of the Python that runs.
    what = (settings, dates, tokenizer.fingerprint(), sys.version, code_that_prepares())
    return hashlib.sha256(repr(what).encode()).hexdigest()[:10]


def code_that_prepares() -> list[str]:
    """The text of the code that decides which conversations there are, and their tokens: files, and
    some functions of this one. (A test prepares data, and looks for code that is missing here.)"""
    code = []
    for function in (prepare_domains, prepare_domain, truncate_to_turn, encode_chat,
                     encode_messages, begin_turn):
        code.append(inspect.getsource(function))
    for pattern in ("support/conversations.py", "support/encoding.py", "support/selection.py",
                    "support/sources.py", "support/tasks.py", "support/tokenizer.py",
                    "synthetic/*.py"):
        for file in sorted(Path(__file__).parent.glob(pattern)):
            code.append(file.read_text(encoding="utf-8"))
    return code


def prepare_domains(c: Config, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Write the conversations of all domains into the folder -> what data.txt reports."""
    # No domain trains on a question that another holds out: see support/selection.py.
    held_out = questions_held_out(c.data)
    benchmark = benchmark_grams(benchmark_files(c.decontaminate_against, c.benchmark_dir))
    report = []
    for name in c.data:
        lines = prepare_domain(c, name, tokenizer, held_out, benchmark, folder)
        report.append(f"{name}: " + "\n  ".join(lines))
    return report


def prepare_domain(c: Config, name: str, tokenizer: Tokenizer, held_out: set[int],
                   benchmark: dict[int, str], folder: Path) -> list[str]:
    """Write val-NAME and, if its weight is above 0, train-NAME -> lines of report."""
    source, weight = c.data[name]
    stage = STAGES[c.stage]
    # parts: {"val": conversations, "train": ...}; with weight 0 only "val"
    parts, lines = select_conversations(source, weight, held_out, benchmark, stage.best_share,
                                        stage.duplicate_share)
    encode = partial(truncate_to_turn, tokenizer, T=c.seq_len)
    for part, conversations in parts.items():
        encoded, line = encode_chats(conversations, encode)
        lines.append(f"{part}: {line}")
        if not encoded:
            raise UserError(f"data {name!r}: no conversation is left for {part}; give more "
                            f"data, or raise seq_len: {'; '.join(lines)}")
        TokenizedChats.save(folder / f"{part}-{name}", encoded)
    return lines


# ---- the run

def train_stage(c: Config, out: Path) -> None:
    """One stage: find the model to start from, prepare the conversations, build, and train."""
    device = pretrain.pick_device(c)
    pretrain.meet_ranks(c, device)

    # The model, which decides tokenizer and row length. Each machine downloads a model of the Hub.
    if c.model:
        rank0_first(partial(model_folder, c.model))
    start, folder, init = rank0_only(find_start, c, out)
    shape = MotifConfig.from_dict(read_json(folder / "config.json"))
    tokenizer = load_tokenizer(c.tokenizer or stored_tokenizer(folder))
    if c.seq_len is None:
        c.seq_len = min(SEQ_LEN, shape.max_position_embeddings)
    check_sizes(c, shape, tokenizer, folder)
    settings = describe_settings(c, init)
    if RANK == 0:
        print(settings, flush=True)
    task_scores = None
    if c.eval_tasks and c.eval_every:
        from tools.task_scores import TaskScores
        task_scores = TaskScores(c, tokenizer)

    # The conversations, which decide batches and steps.
    prepared = rank0_first(partial(prepare, c, tokenizer))
    dataset, val_rows = open_dataset(c, prepared)

    # From here on the stage is a run of pretrain.py, with a config of that kind.
    run = to_pretrain_config(c, shape, tokenizer, init, dataset)
    pretrain.check_fp8(run, dataset.curriculum, device)
    pretrain.check_prompts(run, tokenizer, encode_question)
    if start:
        check_same_batches(start, run, dataset)
        pretrain.check_compatible(start, run, dataset.curriculum, tokenizer)

    def init_from(*_) -> Path:
        # pretrain.py asks for a folder of initial weights, which it may have to make: we have one.
        return folder

    model, optimizer = pretrain.build_model_and_optimizer(run, device, start, init_from, out)
    if RANK == 0:
        write_settings(c, out, settings, prepared, dataset)
    pretrain.train(run, out, dataset, val_rows, model, optimizer, tokenizer, start,
                   encode_prompt=encode_question, task_scores=task_scores)


def find_start(c: Config, out: Path) -> tuple[Checkpoint | None, Path, str]:
    """-> start:  the checkpoint to resume from; None: begin at step 0
       folder: of the model to build. At step 0 it holds the initial weights of the stage; later it
               is the checkpoint's
       init:   which weights the stage began with: their folder, and their hash in parentheses"""
    start = find_checkpoint(c, out)
    if start is None:
        folder = initial_folder(c)
        return None, folder, f"{folder} ({hash_of_weights(folder)})"

    init = str(start.state["config"]["init"])
    check_began_with(init, c, out)
    return start, start.folder, init


def check_began_with(init: str, c: Config, out: Path) -> None:
    """UserError if the run in `out` began with other weights than those that c names: two runs
    would be mixed in one folder. A run that resumes does not need its first weights any more, so
    they may be gone."""
    try:
        folder = initial_folder(c)
        weights = hash_of_weights(folder)
    except UserError:
        return
    # Not the whole text: the same folder may be written in another way.
    if f"({weights})" not in init:
        raise UserError(f"{out} holds a run that began with {init}, not with {folder} ({weights}); "
                        "delete it or give another --out_dir")


def initial_folder(c: Config) -> Path:
    """The folder of the model that the stage starts from."""
    before = "out/quickstart"        # the folder that --model has if it is not given
    command = "python pretrain.py"   # and what makes it
    if c.stage > 1:
        before = f"out/sft{c.stage - 1}"
        command = f"python sft.py --stage={c.stage - 1}"

    checkpoint = latest_checkpoint(Path(c.model or before))
    if checkpoint:
        folder, state = checkpoint
        max_steps = state["config"].get("max_steps") or 0
        if state["step"] < max_steps:
            print(f"note: {folder} is not the end of its run, which has {max_steps} steps")
        return folder
    if c.model:
        folder = model_folder(c.model)
        if not folder.is_dir():
            raise UserError(f"model={c.model} is neither a folder nor owner/name of the Hub")
        return folder
    raise UserError(f"stage {c.stage} starts from {before}, which holds no whole checkpoint; "
                    f"run first: {command}")


def hash_of_weights(folder: Path) -> str:
    """8 hex digits that tell two models' weights apart: a hash of the last MiB of the last file.
    Training changes all weights, so that is enough. (Two models that differ only outside of that
    MiB have the same hash.)"""
    with open(max(tensor_files(folder, "model")), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 2**20))
        return hashlib.sha256(file.read()).hexdigest()[:8]


def stored_tokenizer(folder: Path) -> str:
    """The tokenizer of a model, for load_tokenizer: a checkpoint of ours names it in its
    state.json, and the folder of another model holds it."""
    if (folder / "state.json").exists():
        return read_json(folder / "state.json")["config"]["tokenizer"]
    return str(folder)


def check_sizes(c: Config, shape: MotifConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """UserError if tokenizer, rows and batch do not fit the model."""
    if tokenizer.n_vocab > shape.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens with those of "
                        f"the turn format, more than the vocab_size={shape.vocab_size} of {folder}")
    if c.seq_len > shape.max_position_embeddings:
        raise UserError(f"seq_len={c.seq_len} is longer than the max_position_embeddings="
                        f"{shape.max_position_embeddings} of {folder}; give --seq_len="
                        f"{shape.max_position_embeddings} or less")
    if c.batch_tokens and c.batch_tokens < c.seq_len:
        raise UserError(f"batch_tokens={c.batch_tokens} is less than a row of "
                        f"seq_len={c.seq_len}; raise it")


def describe_settings(c: Config, init: str) -> str:
    """What the stage starts from, where it writes, and how it learns."""
    lines = [f"stage {c.stage} from {init} into {c.out_dir}"]
    for key in ("lr", "warmup_fraction", "epochs", "max_steps", "batch_tokens", "seq_len"):
        place = c.where_set[key]
        if key == "lr" and place == "default":
            place = f"{STAGES[c.stage].lr:g} of STAGES, lr_scale={c.lr_scale:g}"
        value = getattr(c, key)
        if key == "batch_tokens" and value is None:
            value = f"{BATCH_TOKENS}, or less, for {MIN_STEPS} steps or more"
        if key == "seq_len" and place == "default" and value < SEQ_LEN:
            place = f"default: {SEQ_LEN}, or all that the model can read"
        lines.append(f"  {key} = {value}  # {place}")
    return "\n".join(lines)


def open_dataset(c: Config, folder: Path) -> tuple[PackedChatDataset, dict]:
    """The prepared folder -> the dataset, and the rows of each domain for validation."""
    train = {}
    weights = {}
    val_rows = {}
    for name, (_, weight) in c.data.items():
        chats = TokenizedChats(folder / f"val-{name}")
        val_rows[name] = pack_val_rows(chats, c.eval_tokens, c.seq_len)
        if weight > 0:
            train[name] = TokenizedChats(folder / f"train-{name}")
            weights[name] = weight
    dataset = PackedChatDataset(train, weights, T=c.seq_len, batch_tokens=c.batch_tokens,
                                epochs=c.epochs, seed=c.seed, max_steps=c.max_steps)
    if len(set(all_gather_object(dataset.fingerprint()))) > 1:
        raise UserError(f"the machines hold different data in {c.data_dir}; copy one's to all")
    return dataset, val_rows


def to_pretrain_config(c: Config, shape: MotifConfig, tokenizer: Tokenizer, init: str,
                       dataset: PackedChatDataset) -> pretrain.Config:
    """The stage as pretrain.train() reads it, which is what its checkpoints hold."""
    steps = dataset.curriculum.steps
    common = {f.name: getattr(c, f.name) for f in fields(TrainConfig)}
    # A domain's first and last share are equal.
    domains = {name: [source, weight, weight] for name, (source, weight) in c.data.items()}
    return pretrain.Config(
        **asdict(shape), **common, tokenizer=tokenizer.name, init=init, domains=domains,
        batch_tokens=dataset.batch_tokens, seq_len=c.seq_len, max_steps=steps, lr=c.lr,
        warmup_steps=round(c.warmup_fraction * steps), decay="cosine",
        decay_fraction=1 - c.warmup_fraction, min_lr=0.0)


def encode_question(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt of the config is a user's question."""
    return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])


def check_same_batches(start: Checkpoint, run: pretrain.Config,
                       dataset: PackedChatDataset) -> None:
    """UserError if a resumed stage would differ from the one that began. With other batches it
    would read some conversations again, and others never. With more steps its learning rate, which
    falls over the whole run, would rise again."""
    folder, state = start
    settings = []
    for config in (state["config"], asdict(run)):
        weights = {name: domain[1] for name, domain in config["domains"].items()}
        settings.append({"data": weights, "seq_len": config["seq_len"], "seed": config["seed"],
                         "batch_tokens": config["batch_tokens"],
                         "epochs or --max_steps": config["max_steps"]})
    theirs, ours = settings
    same_conversations = state["data"] == dataset.fingerprint()
    for key in ours:
        # Other conversations change these two as well; the error below names the cause.
        if key in ("batch_tokens", "epochs or --max_steps") and not same_conversations:
            continue
        if theirs[key] != ours[key]:
            raise UserError(f"checkpoint {folder} was trained with {key}={theirs[key]}, not "
                            f"{ours[key]}; give --{key} as it was, or another --out_dir for a new "
                            "run")
    if not same_conversations:
        raise UserError(f"the conversations are not those that checkpoint {folder} was trained on; "
                        "give another --out_dir for a new run")


def write_settings(c: Config, out: Path, settings: str, prepared: Path,
                   dataset: PackedChatDataset) -> None:
    """config.json, and data.txt: the settings, how the conversations were chosen, and how much of
    them the run reads. The last two are printed."""
    report = (prepared / "data.txt").read_text(encoding="utf-8")
    report += f"{describe_data(c, dataset)}\n"
    print(report, end="", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.txt").write_text(f"{settings}\n{report}", encoding="utf-8")
    configurator.save(c, out / "config.json")


def describe_data(c: Config, dataset: PackedChatDataset) -> str:
    """How much of each domain the run reads."""
    curriculum = dataset.curriculum
    total = curriculum.tokens[-1]
    total_weight = sum(weight for _, weight in c.data.values())
    spent = curriculum.shares.T @ np.diff(curriculum.tokens)  # tokens of each domain
    lines = []
    for name, tokens in zip(curriculum.names, spent):
        times = tokens / dataset.train[name].ends[-1]
        lines.append(f"{name}: {tokens / total:.1%} of the tokens for a weight of "
                     f"{c.data[name][1] / total_weight:.1%}; each is read {times:.2f} times")
        if tokens == 0:
            lines.append(f"note: nothing of {name} is read in so few steps; give it a larger "
                         "weight, or raise --epochs or --max_steps")
    rows = sum(curriculum.rows)
    lines.append(f"{curriculum.steps:,d} steps of at most {dataset.batch_tokens:,d} tokens, "
                 f"{rows:,d} rows; padding "
                 f"{1 - total / (rows * c.seq_len):.2%}")
    tasks = [TASKS[name] for name in (c.eval_tasks or "").split(",") if name in TASKS]
    has_benchmark = any(task.eval_file for task in tasks)      # chains are always held out
    if has_benchmark and not (c.benchmark_dir or c.decontaminate_against):
        lines.append("note: without --benchmark_dir, conversations with questions of --eval_tasks "
                     "are not looked for")
    if max(curriculum.rows) < WORLD:
        lines.append(f"note: a step has at most {max(curriculum.rows)} rows for {WORLD} processes, "
                     "so that some are idle; a larger --batch_tokens gives more")
    if curriculum.steps < 20:  # [ours]
        advice = "a larger --epochs gives more"
        if dataset.batch_tokens >= 2 * c.seq_len:
            advice = "a smaller --batch_tokens gives more"
        lines.append(f"note: {curriculum.steps} steps are few; {advice}")
    return "\n".join(lines)


def load_config(argv: list[str]) -> Config:
    """The config, filled in as far as possible before the model is read."""
    # config/sft_quickstart.py is for the quick start's model. It would ruin one of another size.
    own_model = any(word.startswith("--model=") and word != "--model=None" for word in argv)
    quickstart = str(Path(__file__).parent / "config" / "sft_quickstart.py")
    c = configurator.load(Config, argv, default_file=None if own_model else quickstart)
    if c.out_dir is None:
        c.out_dir = default_out_dir(c)
    if c.export is None:
        fill_in_stage(c)
    return c


def main() -> None:
    c = load_config(sys.argv[1:])
    out = Path(c.out_dir)
    with pretrain.friendly_errors(c, out):
        if c.export is not None:
            from tools.export import export_checkpoint
            if RANK == 0:
                export_checkpoint(c, out)
            return
        with pretrain.lock_folder(out):
            train_stage(c, out)


if __name__ == "__main__":
    run_main(main)
