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
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import configurator
import data
import pretrain
from configurator import Count, NonNegative
from data import Conversations, Packed
from model import MotifConfig, model_folder, read_json, tensor_files
from pretrain import RANK, Run, tell, together

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
class Config(Run):
    """A stage. None: as STAGES has it."""
    stage: Literal[1, 2, 3] = 1
    model: str | None = None        # first weights: the folder of a run, a checkpoint, a model, or
                                    # owner/name of the Hub; None: the stage before
    tokenizer: str | None = None    # None: the model's own
    data: dict | None = None        # name -> [source, weight]; see data.chats
    benchmarks: list = field(default_factory=list)  # .jsonl, also globs: what shares 13 words in a
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
            raise ValueError(f"data: {name!r}: {d} must be a name of letters, digits, '_', '-' and "
                             "'.' and [source, weight], none negative")
    if not any(weight for _, weight in table["data"].values()):
        raise ValueError("data: no domain has a weight above 0; nothing would be learnt")
    return table


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


def diversity(messages: list[dict]) -> float:
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


def curate(talks: list, share: float) -> tuple[list, str]:
    """The share of conversations with the highest quality, in their order, and what was done."""
    if not talks:
        return talks, "none to choose from"
    scores = [quality(t) for t in talks]
    best = sorted(range(len(talks)), key=lambda i: -scores[i])[:max(1, round(share * len(talks)))]
    at = scores[best[-1]]
    return [talks[i] for i in sorted(best)], (
        f"{len(talks) - len(best)} dropped for a quality below {at:.3f} or no better")


def prune(talks: list, near: float) -> tuple[list, str]:
    """What is left without near-duplicates (conversations of whose five words in a row more than
    the share `near` are in those kept before), repetitive and incoherent ones, and what was
    dropped. It remembers every five words: some 60 bytes per word."""
    kept, seen, dropped = [], set(), {}
    for t in talks:
        grams = {g for m in t for g in ngrams(m["content"], 5)}
        why = ("near-duplicate" if grams and len(grams & seen) > near * len(grams) else
               "repetitive" if diversity(t) < DIVERSE else
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
            for row in data.read_each(path, data.full_lines(path), json.loads))
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
            data.fingerprint(tokenizer), benchmarks)
    folder = Path(data_dir) / f"sft-{hashlib.sha256(repr(what).encode()).hexdigest()[:10]}"
    if folder.exists():
        return folder
    print(f"preparing {', '.join(table['data'])} in {folder}", flush=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        known, report = benchmark_grams(benchmarks), []
        held = {n for source, _ in HELD_OUT.values() for t in data.chats(source)
                for _, n in asked(t)}
        for name, (source, weight) in sorted(table["data"].items(), key=lambda d: d[1][1] > 0):
            talks = [*data.chats(source)]
            report.append(f"{name}: {len(talks):,d} conversations of {source}")
            parts = hold_out(talks, held) if weight else {"val": talks}
            left = len(talks) - sum(map(len, parts.values()))
            if left:
                report.append(f"  {left:,d} dropped as a question of theirs is held out")
            held |= set() if weight else {n for t in talks for _, n in asked(t)}
            for step, option in ((decontaminate, known if benchmarks else None),
                                (curate, table["curate"]), (prune, table["prune"])):
                if weight and option is not None:
                    parts["train"], text = step(parts["train"], option)
                    report.append(f"  {text}")
            for part, found in parts.items():
                encoded = [*filter(None, (data.fit_chat(tokenizer, t, T) for t in found))]
                if not encoded:
                    raise ValueError(f"data {name!r}: of {source} no conversation of at most {T} "
                                     f"tokens is left {'to hold out' if part == 'val' else 'over'}")
                Conversations.save(temporary / f"{part}-{name}", [e[:2] for e in encoded])
                cut, long = sum(e[2] for e in encoded), len(found) - len(encoded)
                report.append(f"  {part}: {len(encoded):,d}, of these {cut:,d} cut at a turn to {T}"
                              f" tokens; {long:,d} dropped, whose first reply ends beyond")
        (temporary / "data.txt").write_text("\n".join(report) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def asked(talk: list[dict]) -> list[tuple[int, int]]:
    """(place, 64 bits of a hash) of the user's turns before the first reply, as one, and of each
    later one of five words or more."""
    first = next(i for i, m in enumerate(talk) if m["role"] == "assistant")
    said = [(0, "\n\n".join(m["content"] for m in talk[:first] if m["role"] == "user"))] + [
        (i, m["content"]) for i, m in enumerate(talk)
        if i > first and m["role"] == "user" and len(words(m["content"])) > 4]
    return [(i, int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big"))
            for i, text in said]


def hold_out(talks: list, held: set[int]) -> dict[str, list]:
    """What is held out is decided by a question's hash alone, one in data.HOLD_OUT, so that it is
    the same in all domains and stages. val: conversations that begin with such a question, up to
    the first turn of the user that is none. train: those without such a question and without one
    of `held`. Where there are too few for one in so many, the least hash is held out."""
    questions = [asked(t) for t in talks]
    bound = max(2**64 // data.HOLD_OUT, min((q[0][1] for q in questions), default=0) + 1)
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

def origin(c: Config) -> tuple[Path, str, str]:
    """The folder of the first weights, the name of their tokenizer, and what they are, so that
    others are told from them. ValueError if the stage before was not run."""
    before, command = "out/quickstart", "pretrain.py"
    if c.stage > 1:
        before, command = f"out/sft{c.stage - 1}", f"sft.py --stage={c.stage - 1}"
    found = pretrain.newest(Path(c.model or before))
    if not (found or c.model):
        raise ValueError(f"stage {c.stage} starts from {before}, which holds no whole checkpoint; "
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


def begin(c: Config, out: Path) -> tuple:
    """The checkpoint to go on from, or None, and what origin says. A run that goes on needs its own
    checkpoint alone; if its first weights are still there, they must be the same. ValueError."""
    start = pretrain.find_checkpoint(c, out)
    try:
        folder, tokenizer, what = origin(c)
    except ValueError:
        if not start:
            raise
        what = None
    if not start:
        return None, folder, tokenizer, what
    own = start[1]["config"]
    if what and what != own["init"]:
        raise ValueError(f"{out} holds a run that began with {own['init']}, not with {what}; "
                         "delete it or give another --out_dir")
    return start, start[0], own["tokenizer"], own["init"]


def run_of(c: Config, table: dict, shape: MotifConfig, tokenizer: str, init: str,
           plan) -> pretrain.Config:
    """The stage as pretrain.train reads it."""
    return pretrain.Config(
        **asdict(shape), **{f.name: getattr(c, f.name) for f in fields(Run)}, tokenizer=tokenizer,
        init=init,
        domains={name: [source, w, w] for name, (source, w) in table["data"].items()},
        lr=table["lr"], batch_tokens=table["batch_tokens"], seq_len=table["seq_len"],
        max_steps=plan.steps, warmup_steps=round(WARMUP * plan.steps), decay="cosine",
        decay_fraction=1 - WARMUP, min_lr=0.0)


def begin_chat(tokenizer, prompt: str) -> list[int]:
    """How a prompt is read: as a user's turn, to be answered."""
    return data.encode_prompt(tokenizer, [{"role": "user", "content": prompt}])


def describe(stream: Packed, weights: dict) -> str:
    """What an epoch reads, by domain."""
    lines, spent = [], stream.plan.shares.T @ [
        b - a for a, b in zip(stream.plan.tokens, stream.plan.tokens[1:])]
    for (name, talks), tokens in zip(stream.train.items(), spent):
        lines.append(f"{name}: {tokens / sum(spent):.1%} of the tokens for a weight of "
                     f"{weights[name]:.1%}; each is read {tokens / talks.ends[-1]:.2f} times")
    return "\n".join(lines) + (f"\n{stream.plan.steps:,d} steps, {sum(stream.plan.rows):,d} rows; "
                               f"padding {stream.padding:.2%}")


def set_up(c: Config, out: Path):
    """What pretrain.train takes; ValueError for what cannot be, on all ranks alike."""
    table = stage_of(c)
    T = table["seq_len"]
    if RANK == 0:
        pretrain.check_writable(out)
    device = pretrain.device_of(c)
    pretrain.join(c, device)
    found = together(begin if RANK == 0 else lambda *_: None, c, out)
    start, folder, name, init = tell(found)[0]
    shape = MotifConfig.from_dict(read_json(folder / "config.json"))
    tokenizer = data.load_tokenizer(name)
    if tokenizer.n_vocab > shape.vocab_size:
        raise ValueError(f"tokenizer {name} has {tokenizer.n_vocab} tokens with those of the turn "
                         f"format, more than the vocab_size={shape.vocab_size} of {folder}")
    if T > shape.max_position_embeddings:
        raise ValueError(f"seq_len={T} is longer than the max_position_embeddings="
                         f"{shape.max_position_embeddings} of {folder}; lower it")
    if table["batch_tokens"] < T:
        raise ValueError(f"batch_tokens={table['batch_tokens']} is less than a row of seq_len={T}; "
                         "raise it")
    place = pretrain.in_turn(lambda: prepare(table, c.benchmarks, tokenizer, c.data_dir))
    held_out = {n: data.held_out_rows(Conversations(place / f"val-{n}"), c.eval_tokens, T)
                for n in table["data"]}
    weights = {n: w for n, (_, w) in table["data"].items() if w}
    weights = {n: w / sum(weights.values()) for n, w in weights.items()}
    stream = Packed({n: Conversations(place / f"train-{n}") for n in weights}, weights, T=T,
                    batch_tokens=table["batch_tokens"], epochs=table["epochs"], seed=c.seed)
    if len({*tell(stream.fingerprint())}) > 1:
        raise ValueError(f"the machines hold different data in {c.data_dir}; copy one's to all")
    run = run_of(c, table, shape, name, init, stream.plan)
    pretrain.check_fp8(run, stream.plan, device)
    pretrain.check_prompts(run, tokenizer, begin_chat)
    if start:
        pretrain.check_fits(*start, run, stream.plan)
    model, optimizer = pretrain.ready(run, device, start, lambda *_: folder, out)
    if RANK == 0:
        text = f"stage {c.stage} from {init}\n{(place / 'data.txt').read_text()}"
        text += describe(stream, weights) + "\n"
        out.mkdir(parents=True, exist_ok=True)
        (out / "data.txt").write_text(text)
        print(text, end="", flush=True)
    return run, out, stream, held_out, model, optimizer, tokenizer, start, begin_chat


def main() -> None:
    c = configurator.load(Config, sys.argv[1:], default_file=QUICKSTART)
    c.out_dir = c.out_dir or f"out/sft{c.stage}"
    out = Path(c.out_dir)
    with pretrain.plainly(c, out):
        try:
            parts = set_up(c, out)
        except ValueError as e:
            raise SystemExit(str(e)) from None
        if RANK == 0:
            configurator.save(c, out / "config.json")
        pretrain.train(*parts)


if __name__ == "__main__":
    pretrain.as_script(main)
