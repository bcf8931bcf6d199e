"""Supervised stages: `python sft.py --stage=1`, then 2, then 3, teaches a pre-trained Motif to
answer (arXiv 2511.07464). It is pretrain.py's loop over another stream: conversations, packed, of
which the assistant's tokens count. The stages are first, the set-up is last.

    out/sftN/data.txt   what a stage reads and what it dropped, and why; else as pretrain.py writes

A stage starts from the newest checkpoint of the stage before it, the first from the quick start's;
with --model=..., from that. Shape and tokenizer are the checkpoint's.
"""
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
from bisect import bisect_left, insort
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from urllib.parse import parse_qsl

import numpy as np

import configurator
import data
import pretrain
from configurator import Count, NonNegative, UserError, one_line
from data import (BEGIN, END, READABLE, ROLES, TURN, TURN_END, check_options, hash_key, lines_of,
                  local_files, open_hub, parquet_rows, feistel_permutation, read_each)
from model import MotifConfig, model_folder, read_json, tensor_files
from pretrain import RANK, TrainConfig, all_gather_object, sync_errors
from synthetic.conversations import CHATS


# What the report states of the three stages, and where it states nothing [ours]. The data are not
# public: these are made without network, --data gives others. name: [source, weight], weights being
# shares of the tokens; of weight 0 all is held out. See data.chats for sources.
HELD_OUT = {"held_chains": ["builtin:chains?n=100&steps=2-4&seed=2", 0.0],
            "longer_chains": ["builtin:chains?n=100&steps=5-6", 0.0]}    # never trained on
STAGES = {
    1: dict(                                  # general instruction following
        data={"help": ["builtin:help?n=1500", 1.0],        # balanced over domains
              "skills": ["builtin:skills?n=1000", 1.0],
              **HELD_OUT},
        curate=None, prune=None,              # as it is
        lr=2e-5, epochs=1, batch_tokens=32_000_000, seq_len=16_384),
    2: dict(                                  # compositional understanding
        data={"chains": ["builtin:chains?n=1500&steps=2-4", 0.7],   # synthetic reasoning
              "skills": ["builtin:skills?n=500", 0.2],
              "help": ["builtin:help?n=500", 0.1],
              **HELD_OUT},
        curate=0.8, prune=None,               # share of a domain kept, by `quality` [ours]
        lr=1e-5, epochs=1, batch_tokens=32_000_000, seq_len=16_384),     # lr [ours]
    3: dict(                                  # linguistic precision: the second, pruned
        data={"chains": ["builtin:chains?n=1500&steps=2-4", 0.5],
              "skills": ["builtin:skills?n=500", 0.25],
              "help": ["builtin:help?n=500", 0.25],
              **HELD_OUT},
        curate=0.8, prune=0.7,                # share of its five-grams that makes a duplicate
        lr=5e-6, epochs=1, batch_tokens=32_000_000, seq_len=16_384),     # lr [ours]
}
WARMUP = 0.05                                 # of the steps, linear; then a cosine to 0
DIVERSE, COHERENT = 0.5, 0.3                  # less than this is pruned [ours]
QUICKSTART = str(Path(__file__).parent / "config" / "sft_quickstart.py")


@dataclass
class Config(TrainConfig):
    """A stage. None: as STAGES has it."""
    stage: Literal[1, 2, 3] = 1
    model: str | None = None        # first weights: the folder of a run, a checkpoint, a model, or
                                    # owner/name of the Hub; None: the stage before
    tokenizer: str | None = None    # None: the model's own
    data: dict | None = None        # name -> [source, weight]; see data.chats
    decontaminate_against: list = field(default_factory=list)  # .jsonl, also globs: what shares 13 words in a
                                    # row with one of their texts is dropped
    lr_scale: NonNegative = 1.0     # times the stage's learning rate
    epochs: Count | None = None     # of as many tokens as the data has
    batch_tokens: Count | None = None  # per step over all ranks
    seq_len: Count | None = None    # tokens of a row, into which conversations are packed
    prompts: list = field(default_factory=lambda: [
        "What does the module json do?", "Start with the number 12.\n1. Add 5\n2. Multiply by 3",
        "Start with the word lantern.\n1. Reverse it\n2. Count its letters"])


def stage_of(c: Config) -> dict:
    """The stage's table with what the config overrides. ValueError for data that are none."""
    table = dict(STAGES[c.stage])
    table["lr"] *= c.lr_scale
    for key in ("data", "epochs", "batch_tokens", "seq_len"):
        table[key] = table[key] if getattr(c, key) is None else getattr(c, key)
    for name, d in table["data"].items():
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)
                and isinstance(d, (list, tuple)) and len(d) == 2 and isinstance(d[0], str)
                and data.is_share(d[1])):
            raise UserError(f"data: {name!r}: {d} must be a name of letters, digits, '_', '-' and "
                             "'.' and [source, weight], none negative")
    if not any(weight for _, weight in table["data"].values()):
        raise UserError("data: no domain has a weight above 0; nothing would be learnt")
    return table


# ---- conversations

def encode_chat(tokenizer: data.Tokenizer, messages: list[dict]) -> tuple[list, list]:
    """Messages [{"role": ..., "content": ...}, ...] -> ids and targets, equally many: targets[i] is
    the token after ids[i] where that is an assistant's or its end of turn, else -1. The family's
    turn format,

        <|beginoftext|> <|startofturn|><|{role}|>\n\n{content}<|endofturn|> ... <|endoftext|>

    whose last token follows the last id. "\\n\\n" and content are encoded apart, as a reply comes
    after a prompt that ends there. A special token's spelling is plain text. ValueError, one line,
    for no conversation or a tokenizer without the format's tokens."""
    check_chat(messages)
    ids, learnt = render_conversation(tokenizer, messages)
    after = [*ids[1:], special(tokenizer, END)]
    return ids, [i if said else -1 for i, said in zip(after, [*learnt[1:], False])]


def encode_prompt(tokenizer: data.Tokenizer, messages: list[dict]) -> list[int]:
    """Ids up to where the assistant's reply to these messages begins."""
    return render_conversation(tokenizer, messages)[0] + begin_turn(tokenizer, "assistant")


def render_conversation(tokenizer: data.Tokenizer, messages: list[dict]) -> tuple[list, list]:
    """Begin of text and turns -> ids, and of each whether an assistant says it."""
    ids, learnt = [special(tokenizer, BEGIN)], [False]
    for m in messages:
        head = begin_turn(tokenizer, m["role"])
        body = [*tokenizer.encode(m["content"]), special(tokenizer, TURN_END)]
        ids += head + body
        learnt += [False] * len(head) + [m["role"] == "assistant"] * len(body)
    return ids, learnt


def begin_turn(tokenizer: data.Tokenizer, role: str) -> list[int]:
    return [special(tokenizer, TURN), special(tokenizer, ROLES[role]),
            *tokenizer.encode("\n\n")]


def special(tokenizer: data.Tokenizer, token: str) -> int:
    if token not in tokenizer.special:
        raise UserError(f"tokenizer {tokenizer.name} lacks the turn format's {token}; load it by "
                         "load_tokenizer, which adds it")
    return tokenizer.special[token]


def check_chat(messages) -> None:
    """ValueError if this is no conversation from which there is something to learn."""
    before = None
    for i, m in enumerate(messages, 1):
        role, content = (m.get(key) if isinstance(m, dict) else None for key in ("role", "content"))
        if role not in ROLES:
            raise UserError(f"message {i} has the unknown role {role!r}; it must be one of "
                             f"{', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"message {i}, the {role}'s, has no content; drop this conversation")
        if any("\ud800" <= letter <= "\udfff" for letter in content):
            raise UserError(f"message {i}, the {role}'s, has half of a surrogate pair, which is "
                             "no letter; mend or drop it")
        if role == before == "assistant":
            raise UserError(f"messages {i - 1} and {i} are both the assistant's; join them")
        before = role
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError("no turn is the assistant's; drop this conversation")


def truncate_to_turn(tokenizer: data.Tokenizer, messages: list[dict], T: int):
    """encode_chat of all turns up to an assistant's last one or, where they are more than T tokens,
    up to an earlier one -> ids, targets, whether it was cut; None if not even the first fits."""
    ends = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant"]
    for end in reversed(ends):
        ids, targets = encode_chat(tokenizer, messages[:end])
        if len(ids) <= T:
            return ids, targets, end < ends[-1]
    return None


def load_conversations(source: str):
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
            raise UserError(f"source {source!r}: builtin conversations are {', '.join(CHATS)}")
        make, known = CHATS[kind]
        check_options(source, options, known)
        yield from make(**{key: parse_range(source, key, value) for key, value in options.items()})
    elif local:
        check_options(source, options, ["messages"])
        for path in local_files(place):
            if path.suffix == ".parquet":
                yield from read_each(path, parquet_rows(path), partial(get_messages, column))
            else:
                yield from read_each(path, nonblank_lines(path),
                                     lambda line: get_messages(column, json.loads(line)))
    elif place.count("/") == 1 and not os.path.exists(place):
        check_options(source, options, ["messages", "name", "split"])
        yield from read_each(place, hub_rows(place, options), partial(get_messages, column))
    else:
        raise UserError(f"source {source!r} is neither builtin:..., files ending in "
                         f"{', '.join(READABLE[:3])}, nor a dataset owner/name of the Hub")


def nonblank_lines(path: Path):
    """(place, line) of the lines of a file that are not blank."""
    return (x for x in lines_of(path, 0, path.stat().st_size) if x[1].strip())


def hub_rows(name: str, options: dict):
    for i, row in enumerate(open_hub(name, options)):
        yield f"row {i}", row


def parse_range(source: str, key: str, value: str) -> tuple[int, int]:
    """"3" -> (3, 3); "2-4" -> (2, 4)"""
    numbers = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", value)
    if (not numbers or int(numbers[1]) > int(numbers[2] or numbers[1])
            or key != "steps" and numbers[2]):
        raise UserError(f"source {source!r}: {key}={value} must be a number"
                         + (" or two, as in 2-4" if key == "steps" else ""))
    return int(numbers[1]), int(numbers[2] or numbers[1])


def get_messages(column: str, row) -> list[dict]:
    """The conversation in a row."""
    messages = row.get(column) if isinstance(row, dict) else None
    if not isinstance(messages, list):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"no list of messages in {column!r}; it has {has}, and needs {column!r}: "
                         "[{'role': 'user', 'content': '...'}, ...], or ?messages=COLUMN")
    check_chat(messages)
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# ---- packing

class TokenizedChats:
    """Encoded conversations, end to end, in two files of a folder, of which one is mapped.
    ValueError if they are damaged."""

    def __init__(self, path: Path):
        try:
            self.tokens = np.load(path / "tokens.npy", "r")         # (2, N): ids, targets
            self.ends, self.learnt = np.load(path / "ends.npy")     # (n,): ends, targets of each
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"{path} is damaged ({one_line(e)}); delete {path.parent} and run "
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


def collate(rows: list[list[np.ndarray]], T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


class PackedChatDataset:
    """Conversations as a stream for pretrain.train: an epoch takes as many tokens as there are,
    of each domain its share (weights, in proportion), but none more than REPEATS times. Within a
    reading of a domain each conversation comes once. Everything follows from the arguments, so that
    the state is one integer, the step. ValueError for no conversation."""

    def __init__(self, train: dict[str, TokenizedChats], weights: dict[str, float], *, T: int,
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
            raise UserError("there is no conversation to train on; give more data")
        self._plan(names)

    def _order(self, name: str, tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """Conversations, one reading after the other, and where the middle of each is, in
        tokens."""
        n, lengths = len(self.train[name].lengths), self.train[name].lengths
        readings = math.ceil(tokens / lengths.sum() + 1e-9)
        order = np.concatenate([feistel_permutation(np.arange(n), n, hash_key(self.seed, name, k))
                                for k in range(readings)])
        return order, lengths[order].cumsum() - lengths[order] / 2

    def _deal(self, rows: list, most: int, epoch: int) -> list[list]:
        """Rows -> batches of at most so many, nearly equal. Packing puts rows of long conversations
        first, and with them whole domains; so of n neighbours each of the n batches gets one."""
        n = -(-len(rows) // most)
        batches = [[] for _ in range(n)]
        for i in range(0, len(rows), n):
            group = rows[i:i + n]
            hand = feistel_permutation(np.arange(len(group)), n, hash_key(self.seed, "rows", epoch, i))
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
        self.curriculum = SimpleNamespace(
            names=names, steps=len(tokens), seq_len=[self.T] * len(tokens),
            rows=[*map(len, self.batches)], tokens=[0, *tokens.cumsum().tolist()],
            context=(spent[1].sum(1) // tokens).tolist(), shares=spent[0] / tokens[:, None])

    def talks(self, step: int) -> list[tuple[int, int]]:
        """(domain, conversation) of all in the step's global batch."""
        return [talk for row in self.batches[step] for talk in row]

    def num_targets(self, step: int) -> int:
        """Tokens of assistants in the step's global batch."""
        names = self.curriculum.names
        return sum(int(self.train[names[d]].learnt[i]) for d, i in self.talks(step))

    def batch(self, step: int, rank: int = 0, world: int = 1):
        """Rows rank, rank + world, ... of the step's global batch, as `fill` gives them."""
        return collate([[self.train[self.curriculum.names[d]][i] for d, i in row]
                     for row in self.batches[step][rank::world]], self.T)

    @property
    def padding(self) -> float:
        """Share of the rows that is none of the conversations."""
        return 1 - self.curriculum.tokens[-1] / (sum(self.curriculum.rows) * self.T)

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


def held_out_rows(talks: TokenizedChats, tokens: int, T: int):
    """Of the held-out conversations some that have so many tokens, or one, from all over them,
    packed, as `fill` gives them."""
    n = len(talks.lengths)
    order = feistel_permutation(np.arange(n), n, hash_key("held out"))
    order = order[:max(1, int(talks.lengths[order].cumsum().searchsorted(tokens, side="right")))]
    return collate([[talks[order[k]] for k in row] for row in pack(talks.lengths[order], T)], T)


# ---- what is worth reading

def sentences(text: str) -> list[str]:
    """Sentences, which also end with their line."""
    return [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def ngrams(text: str, n: int) -> list[int]:
    """A hash of each n words in a row, valid within the process."""
    found = words(text)
    return [hash(tuple(found[i:i + n])) for i in range(len(found) - n + 1)]


def replies(messages: list[dict]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


ARGUES = re.compile(r"=|\b(so|because|therefore|thus|hence|since|then|if|implies|means|first|next"
                    r"|finally|step|let|return)\b", re.I)


def reasoning_density(messages: list[dict]) -> float:
    """Share of the assistant's sentences that argue: that have an equation or a word like "so"."""
    found = [s for reply in replies(messages) for s in sentences(reply)]
    return sum(bool(ARGUES.search(s)) for s in found) / len(found)


def completeness(messages: list[dict]) -> float:
    """Share of four signs, over the replies, that none was cut: it does not end in a comma or dots,
    its code fences and its brackets are closed, and it answers the last that was asked."""
    signs = [messages[-1]["role"] == "assistant"]
    for reply in replies(messages):
        signs += [not re.search(r"([,;:(\[{-]|\.\.\.|\u2026)\s*$", reply),
                  reply.count("```") % 2 == 0,
                  all(reply.count(a) == reply.count(b) for a, b in ("()", "[]", "{}"))]
    return sum(signs) / len(signs)


def structure(messages: list[dict]) -> float:
    """How far replies are laid out: the mean of lines / 3, each at most 1."""
    lines = [len([line for line in r.splitlines() if line.strip()]) for r in replies(messages)]
    return sum(min(1, n / 3) for n in lines) / len(lines)


def quality(messages: list[dict]) -> float:
    """The mean of the three."""
    return (reasoning_density(messages) + completeness(messages) + structure(messages)) / 3


def distinct_3(messages: list[dict]) -> float:
    """Share of the assistant's three words in a row that are not said before."""
    found = [g for reply in replies(messages) for g in ngrams(reply, 3)]
    return len(set(found)) / len(found) if found else 1.0


def coherence(messages: list[dict]) -> float:
    """Share of the assistant's sentences of five words or more that take up a number or a word of
    four letters or more from what was said before. A reply's first may well name nothing of it."""
    before, linked = set(), []
    for m in messages:
        for i, s in enumerate(sentences(m["content"])):
            found = {w for w in words(s) if len(w) > 3 or w.isdigit()}
            if i and m["role"] == "assistant" and len(words(s)) >= 5:
                linked.append(bool(found & before))
            before |= found
    return sum(linked) / len(linked) if linked else 1.0


def filter_by_quality(talks: list, share: float) -> tuple[list, str]:
    """The share of conversations with the highest quality, in their order, and what was done."""
    if not talks:
        return talks, "none to choose from"
    scores = [quality(t) for t in talks]
    best = sorted(range(len(talks)), key=lambda i: -scores[i])[:max(1, round(share * len(talks)))]
    at = scores[best[-1]]
    return [talks[i] for i in sorted(best)], (
        f"{len(talks) - len(best)} dropped for a quality below {at:.3f} or no better")


def dedup_and_filter(talks: list, near: float) -> tuple[list, str]:
    """What is left without near-duplicates (conversations of whose five words in a row more than
    the share `near` are in those kept before), repetitive and incoherent ones, and what was
    dropped. It remembers every five words: some 60 bytes per word."""
    kept, seen, dropped = [], set(), {}
    for t in talks:
        grams = {g for m in t for g in ngrams(m["content"], 5)}
        why = ("near-duplicate" if grams and len(grams & seen) > near * len(grams) else
               "repetitive" if distinct_3(t) < DIVERSE else
               "incoherent" if coherence(t) < COHERENT else None)
        if why:
            dropped.setdefault(why, []).append(t)
        else:
            kept.append(t)
            seen |= grams
    return kept, "; ".join(
        f"{len(found)} dropped as {why}, one of them {found[0][-1]['content'][:60]!r}"
        for why, found in dropped.items()) or "none dropped by pruning"


def benchmark_grams(patterns: list) -> set[int]:
    """Every 13 words in a row of the texts in the rows of .jsonl files."""
    def texts(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from texts(part)
    files = [path for pattern in patterns for path in data.local_files(pattern)]
    rows = (row for path in files
            for row in data.read_each(path, nonblank_lines(path), json.loads))
    return {g for row in rows for text in texts(row) for g in ngrams(text, 13)}


def decontaminate(talks: list, known: set[int]) -> tuple[list, str]:
    """The conversations none of whose messages shares 13 words in a row with a benchmark."""
    kept = [t for t in talks if not any(g in known for m in t for g in ngrams(m["content"], 13))]
    return kept, f"{len(talks) - len(kept)} dropped as they share 13 words with a benchmark"


# ---- preparing

def prepare(table: dict, benchmarks: list, tokenizer, data_dir: str) -> Path:
    """Read, drop, hold out and encode a stage's data -> a folder data_dir/sft-<key> with two
    data.Conversations for each domain, train-NAME, if it has a weight, and val-NAME, and data.txt.
    The key is made of all that decides, so that what is there is not made again. One process holds
    a domain's text. ValueError for a source that is none or has too little."""
    T, sources = table["seq_len"], [source for source, _ in table["data"].values()]
    stats = [(f, s.st_size, s.st_mtime_ns) for pattern in (*sources, *benchmarks)
             for f in sorted(glob.glob(pattern.partition("?")[0], recursive=True))
             for s in [os.stat(f)]]
    code = [Path(module.__file__).read_bytes() for module in (data, sys.modules[__name__])]
    what = (table["data"], T, table["curate"], table["prune"], stats, sys.version, code,
            tokenizer.fingerprint(), benchmarks)
    folder = Path(data_dir) / f"sft-{hashlib.sha256(repr(what).encode()).hexdigest()[:10]}"
    if folder.exists():
        return folder
    print(f"preparing {', '.join(table['data'])} in {folder}", flush=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        known, report = benchmark_grams(benchmarks), []
        held = {n for source, _ in HELD_OUT.values() for t in load_conversations(source)
                for _, n in question_hashes(t)}
        for name, (source, weight) in sorted(table["data"].items(), key=lambda d: d[1][1] > 0):
            talks = [*load_conversations(source)]
            report.append(f"{name}: {len(talks):,d} conversations of {source}")
            parts = train_val_split(talks, held) if weight else {"val": talks}
            left = len(talks) - sum(map(len, parts.values()))
            if left:
                report.append(f"  {left:,d} dropped as a question of theirs is held out")
            held |= set() if weight else {n for t in talks for _, n in question_hashes(t)}
            for step, option in ((decontaminate, known if benchmarks else None),
                                (filter_by_quality, table["curate"]), (dedup_and_filter, table["prune"])):
                if weight and option is not None:
                    parts["train"], text = step(parts["train"], option)
                    report.append(f"  {text}")
            for part, found in parts.items():
                encoded = [*filter(None, (truncate_to_turn(tokenizer, t, T) for t in found))]
                if not encoded:
                    raise UserError(f"data {name!r}: of {source} no conversation of at most {T} "
                                     f"tokens is left {'to hold out' if part == 'val' else 'over'}")
                TokenizedChats.save(temporary / f"{part}-{name}", [e[:2] for e in encoded])
                cut, long = sum(e[2] for e in encoded), len(found) - len(encoded)
                report.append(f"  {part}: {len(encoded):,d}, of these {cut:,d} cut at a turn to {T}"
                              f" tokens; {long:,d} dropped, whose first reply ends beyond")
        (temporary / "data.txt").write_text("\n".join(report) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def question_hashes(talk: list[dict]) -> list[tuple[int, int]]:
    """(place, 64 bits of a hash) of the user's turns before the first reply, as one, and of each
    later one of five words or more."""
    first = next(i for i, m in enumerate(talk) if m["role"] == "assistant")
    said = [(0, "\n\n".join(m["content"] for m in talk[:first] if m["role"] == "user"))] + [
        (i, m["content"]) for i, m in enumerate(talk)
        if i > first and m["role"] == "user" and len(words(m["content"])) > 4]
    return [(i, int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big"))
            for i, text in said]


def train_val_split(talks: list, held: set[int]) -> dict[str, list]:
    """What is held out is decided by a question's hash alone, one in data.HOLD_OUT, so that it is
    the same in all domains and stages. val: conversations that begin with such a question, up to
    the first turn of the user that is none. train: those without such a question and without one
    of `held`. Where there are too few for one in so many, the least hash is held out."""
    questions = [question_hashes(t) for t in talks]
    bound = max(2**64 // data.VAL_EVERY, min((q[0][1] for q in questions), default=0) + 1)
    parts = {"val": [], "train": []}
    for t, q in zip(talks, questions):
        if q[0][1] < bound:
            own = {i for i, n in q if n < bound}
            end = next((i for i, m in enumerate(t) if i and m["role"] == "user" and i not in own
                        and any(m["role"] == "assistant" for m in t[:i])), None)
            parts["val"].append(t[:end])
        elif not any(n < bound or n in held for _, n in q):
            parts["train"].append(t)
    return parts


# ---- the run

def resolve_init_checkpoint(c: Config) -> tuple[Path, str, str]:
    """The folder of the first weights, the name of their tokenizer, and what they are, so that
    others are told from them. ValueError if the stage before was not run."""
    before, command = "out/quickstart", "pretrain.py"
    if c.stage > 1:
        before, command = f"out/sft{c.stage - 1}", f"sft.py --stage={c.stage - 1}"
    found = pretrain.latest_checkpoint(Path(c.model or before))
    if not (found or c.model):
        raise UserError(f"stage {c.stage} starts from {before}, which holds no whole checkpoint; "
                         f"run first: python {command}")
    folder = found[0] if found else model_folder(c.model)
    with open(max(tensor_files(folder, "model")), "rb") as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - 2**20))
        what = f"{folder} ({hashlib.sha256(f.read()).hexdigest()[:8]})"  # other weights, other end
    if not (folder / "state.json").exists():
        return folder, c.tokenizer or str(folder), what
    state = read_json(folder / "state.json")
    if state["step"] < (state["config"].get("max_steps") or 0):
        print(f"note: {folder} is not the end of its run, which has "
              f"{state['config']['max_steps']} steps")
    return folder, c.tokenizer or state["config"]["tokenizer"], what


def find_start(c: Config, out: Path) -> tuple:
    """The checkpoint to go on from, or None, and what origin says. A run that goes on needs its own
    checkpoint alone; if its first weights are still there, they must be the same. ValueError."""
    start = pretrain.find_checkpoint(c, out)
    try:
        folder, tokenizer, what = resolve_init_checkpoint(c)
    except ValueError:
        if not start:
            raise
        what = None
    if not start:
        return None, folder, tokenizer, what
    own = start[1]["config"]
    if what and what != own["init"]:
        raise UserError(f"{out} holds a run that began with {own['init']}, not with {what}; "
                         "delete it or give another --out_dir")
    return start, start[0], own["tokenizer"], own["init"]


def to_pretrain_config(c: Config, table: dict, shape: MotifConfig, tokenizer: str, init: str,
           plan) -> pretrain.Config:
    """The stage as pretrain.train reads it."""
    return pretrain.Config(
        **asdict(shape), **{f.name: getattr(c, f.name) for f in fields(TrainConfig)}, tokenizer=tokenizer,
        init=init,
        domains={name: [source, w, w] for name, (source, w) in table["data"].items()},
        lr=table["lr"], batch_tokens=table["batch_tokens"], seq_len=table["seq_len"],
        max_steps=plan.steps, warmup_steps=round(WARMUP * plan.steps), decay="cosine",
        decay_fraction=1 - WARMUP, min_lr=0.0)


def encode_chat_prompt(tokenizer, prompt: str) -> list[int]:
    """How a prompt is read: as a user's turn, to be answered."""
    return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])


def describe(stream: PackedChatDataset, weights: dict) -> str:
    """What an epoch reads, by domain."""
    lines, spent = [], stream.curriculum.shares.T @ [
        b - a for a, b in zip(stream.curriculum.tokens, stream.curriculum.tokens[1:])]
    for (name, talks), tokens in zip(stream.train.items(), spent):
        lines.append(f"{name}: {tokens / sum(spent):.1%} of the tokens for a weight of "
                     f"{weights[name]:.1%}; each is read {tokens / talks.ends[-1]:.2f} times")
    return "\n".join(lines) + (f"\n{stream.curriculum.steps:,d} steps, {sum(stream.curriculum.rows):,d} rows; "
                               f"padding {stream.padding:.2%}")


def setup(c: Config, out: Path):
    """What pretrain.train takes; ValueError for what cannot be, on all ranks alike."""
    table = stage_of(c)
    T = table["seq_len"]
    if RANK == 0:
        pretrain.check_writable(out)
    device = pretrain.pick_device(c)
    pretrain.init_distributed(c, device)
    found = sync_errors(find_start if RANK == 0 else lambda *_: None, c, out)
    start, folder, name, init = all_gather_object(found)[0]
    shape = MotifConfig.from_dict(read_json(folder / "config.json"))
    tokenizer = data.load_tokenizer(name)
    if tokenizer.n_vocab > shape.vocab_size:
        raise UserError(f"tokenizer {name} has {tokenizer.n_vocab} tokens with those of the turn "
                         f"format, more than the vocab_size={shape.vocab_size} of {folder}")
    if T > shape.max_position_embeddings:
        raise UserError(f"seq_len={T} is longer than the max_position_embeddings="
                         f"{shape.max_position_embeddings} of {folder}; lower it")
    if table["batch_tokens"] < T:
        raise UserError(f"batch_tokens={table['batch_tokens']} is less than a row of seq_len={T}; "
                         "raise it")
    place = pretrain.rank0_first(lambda: prepare(table, c.decontaminate_against, tokenizer, c.data_dir))
    held_out = {n: held_out_rows(TokenizedChats(place / f"val-{n}"), c.eval_tokens, T)
                for n in table["data"]}
    weights = {n: w for n, (_, w) in table["data"].items() if w}
    weights = {n: w / sum(weights.values()) for n, w in weights.items()}
    stream = PackedChatDataset({n: TokenizedChats(place / f"train-{n}") for n in weights}, weights, T=T,
                    batch_tokens=table["batch_tokens"], epochs=table["epochs"], seed=c.seed)
    if len({*all_gather_object(stream.fingerprint())}) > 1:
        raise UserError(f"the machines hold different data in {c.data_dir}; copy one's to all")
    run = to_pretrain_config(c, table, shape, name, init, stream.curriculum)
    pretrain.check_fp8(run, stream.curriculum, device)
    pretrain.check_prompts(run, tokenizer, encode_chat_prompt)
    if start:
        pretrain.check_compatible(*start, run, stream.curriculum)
    model, optimizer = pretrain.build_model_and_optimizer(run, device, start, lambda *_: folder, out)
    if RANK == 0:
        text = f"stage {c.stage} from {init}\n{(place / 'data.txt').read_text()}"
        text += describe(stream, weights) + "\n"
        out.mkdir(parents=True, exist_ok=True)
        (out / "data.txt").write_text(text)
        print(text, end="", flush=True)
    return run, out, stream, held_out, model, optimizer, tokenizer, start, encode_chat_prompt


def main() -> None:
    c = configurator.load(Config, sys.argv[1:], default_file=QUICKSTART)
    c.out_dir = c.out_dir or f"out/sft{c.stage}"
    out = Path(c.out_dir)
    with pretrain.friendly_errors(c, out):
        parts = setup(c, out)
        if RANK == 0:
            configurator.save(c, out / "config.json")
        pretrain.train(*parts)


if __name__ == "__main__":
    pretrain.run_main(main)
