"""Evaluation: `python eval.py --model=PATH --tasks=mmlu,gsm8k` scores a checkpoint as
lm-evaluation-harness does, and puts the figures of Motif-2-12.7B's report (arXiv 2511.07464) beside
its own; `--tasks=chat` talks with it. Without options: the quick start's model and its supervised
stages side by side, in bits per byte and by the chains of skills that they get right. The tasks are
first, then what scores them, the sandbox and the run.

    out_dir/samples.jsonl   a line per document: prompt, output, verdict; a cut run goes on from it
    out_dir/results.json    score, standard error and n of every task
"""
import synthetic.conversations
import sft
import codecs
import difflib
import hashlib
import json
import math
import os
import random
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate, chain, count, islice
from pathlib import Path
from typing import Callable, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

import configurator
import data
from configurator import Count, NonNegative, Size, UserError, one_line
from model import Motif, model_folder, read_json
from pretrain import (COMPUTE_DTYPE, RANK, WORLD, run_main, pick_device, latest_checkpoint, compute_precision, read_state,
                      replace_text, checkpoint_steps, all_gather_object)
from sft import HELD_OUT
from tools.sandbox import run_program, sandbox_gaps

STAGES = ("out/quickstart", "out/sft1", "out/sft2", "out/sft3")
BPB = [*(f"bpb:builtin:{kind}" for kind in ("language", "code", "math", "science")), "bpb:replies"]
BUILTIN_DOCS, DOC_LETTERS = 16, 1024  # held out: at most so many of each, and so much of one
KEY_BYTES = defaultdict(lambda: 2**34, cpu=2**30)  # of keys and values, if nothing is said
PASS_TOKENS = defaultdict(lambda: 8192, cpu=1024)  # read at once, at most, where rows are scored
SHARED_TOKENS = 32               # a beginning that rows share is read once if it has so many


@dataclass
class Config:
    """What is evaluated, and how."""
    model: str | None = None     # a checkpoint, a run (its newest one) or owner/name of the Hub;
                                 # None: the newest of each of out/quickstart, sft1, sft2 and sft3
    tokenizer: str | None = None  # None: the model's own
    tasks: str = "bpb,chains"    # of those in TASKS, with commas; bpb:SOURCE, bits per byte of
                                 # a file or another source of data.py (a comma in it: %2C), bpb:
                                 # of the builtin ones and of right replies to chains; or chat
    num_fewshot: Size | None = None    # examples before each question; None: as many as the report's
    limit: Count | None = None   # documents of each task, of mmlu of each subject; None: all
    chat: bool = False           # ask in the turn format, as fine-tuned models expect
    run_code: bool = False       # let humaneval and mbpp run the programs that the model writes
    benchmark_dir: str | None = None  # where TASKS' files are; None: the Hub's data sets
    out_dir: str | None = None   # None: out/eval/<the model's name>
    kv_cache_tokens: Count | None = None  # their keys and values are kept at once; None: what 1 GiB
                                 # (CUDA: 16) holds
    temperature: NonNegative = 0.0  # of tasks that generate; 0: greedy. Chat has 0.7, see /temp
    num_samples: Count = 1           # replies to each question, where programs are run: pass@k
    seed: int = 1234             # of sampling
    device: str = "auto"         # cpu, cuda, cuda:1, ...; auto: CUDA where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of products; auto: bf16 on CUDA only
    compile: bool = True         # generation's step by torch.compile, on CUDA: 10 s, once
    plot: bool = False           # every checkpoint of the run, a column each, and scores.png
    prompt: str | None = None    # chat: answer this, and end


# what decides what a sample is, beside its document
SETTINGS = ("tokenizer", "chat", "temperature", "samples", "seed", "precision")


# ---- the tasks

@dataclass
class Example:
    """A question: in a prompt `text` stands alone, in an example `target` follows it."""
    text: str
    target: str = ""
    choices: list = field(default_factory=list)  # what may follow, of which one does
    answer: int = 0
    group: str = ""              # examples are of the same group
    texts: list | None = None    # winogrande: the same may follow several texts
    row: dict | None = None      # as it was read
    begin: str = ""              # what the prompt has before it: the task's head and examples


@dataclass(frozen=True)
class Task:
    """Where its questions and examples are, and how a reply is judged."""
    read: Callable               # row -> Doc
    hub: tuple = ()              # data set, configuration, splits of questions and examples
    files: tuple = (None, None)  # the same in bench_dir
    source: Callable | None = None  # or () -> rows of questions, for which no file is needed
    num_fewshot: int = 0               # the report's
    reported: dict = field(default_factory=dict)  # metric -> the report's score, in per cent
    first: bool = False          # the first examples, not any
    head: str = ""               # what begins a prompt, {} being the group
    judge: Callable | None = None  # (doc, replies) -> {metric: value}; None: by log-likelihood,
    program: Callable | None = None  # or (doc, reply) -> a program, which passes or not
    norm: bool = True            # also acc_norm
    stops: tuple = ()            # end a reply
    new_tokens: int = 256
    keep: Callable = lambda row, which: True  # whether a row is a question (0), an example (1)
    ask: Callable | None = None  # doc -> what a chat is asked, and how its reply begins
    chat: bool = False           # always asked in the turn format


def choose(text: str, choices: list, answer: int, **more) -> Example:
    """One of several answers, a space before each."""
    if not 0 <= answer < len(choices):
        raise UserError(f"answer {answer} is none of {len(choices)} choices")
    if not all(choices):
        raise UserError("a choice is empty")
    choices = [f" {choice}" for choice in choices]
    return Example(text, choices[answer], choices, answer, **more)


def options(row: dict) -> tuple[list, int]:
    """Answers and the number of the right one, of the Hub's rows and ours."""
    choices = row["choices"]
    if isinstance(choices, dict):
        return choices["text"], choices["label"].index(row["answerKey"].strip())
    return choices, row["answer"]


def read_mmlu(row: dict) -> Example:
    choices, answer = options(row)
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    text = "\n".join([row["question"].strip(), *lines, "Answer:"])
    return choose(text, list("ABCD"), answer, group=row["subject"])


def read_hellaswag(row: dict) -> Example:
    """A row without ctx_a and ctx_b is cut after its last full sentence."""
    if "ctx_a" in row:
        a, b = row["ctx_a"], row["ctx_b"]
    else:
        cut = re.match(r"(?s)(.*[.!?\])'\"]) +([^.!?]+)$", row["ctx"])
        a, b = cut.groups() if cut else (row["ctx"], "")
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    text = clean(f"{row['activity_label']}: {a} {b.capitalize()}")
    return choose(text, [clean(end) for end in row["endings"]], int(row["label"]))


def read_siqa(row: dict) -> Example:
    if "context" not in row:
        return choose(f"Q: {row['question']}\nA:", *options(row))
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return choose(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)


def read_winogrande(row: dict) -> Example:
    sentence = row.get("sentence") or row["question"]
    choices, answer = ([row["option1"], row["option2"]], int(row["answer"]) - 1) if (
        "option1" in row) else options(row)
    before, after = sentence[:sentence.index("_")], sentence[sentence.index("_") + 1:].strip()
    texts = [before + choice for choice in choices]
    return Example(texts[answer], f" {after}", [f" {after}"] * len(texts), answer, texts=texts)


def number_in(reply: str, strict: bool) -> str:
    """GSM8K's answer: the first after ####, or the last number."""
    pattern = r"#### (\-?[0-9\.\,]+)" if strict else r"-?[$0-9.,]{2,}|-?[0-9]+"
    found = re.findall(pattern, reply) or ["[invalid]"]
    return plain_number(found[0 if strict else -1].strip())


def plain_number(text: str) -> str:
    for noise in ",", r"\$", r"(?s).*#### ", r"\.$":
        text = re.sub(noise, "", text)
    return text.lower()


def judge_gsm8k(doc: Example, generate_replies: list) -> dict:
    right = plain_number(doc.row["answer"])
    return {"strict": float(number_in(generate_replies[0], True) == right),
            "flexible": float(number_in(generate_replies[0], False) == right)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k replies passes, if c of n did: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def judge_code(program: Callable, doc: Example, generate_replies: list) -> dict:
    verdicts = [run_program(program(doc, reply)) for reply in generate_replies]
    n, c = len(verdicts), verdicts.count("passed")
    return {"verdicts": verdicts, **{f"pass@{k}": pass_at_k(n, c, k)
                                     for k in (1, 10, 100) if k <= n}}


def humaneval_program(doc: Example, reply: str) -> str:
    return "\n".join([doc.row["prompt"] + reply, doc.row["test"],
                      f"check({doc.row['entry_point']})"])


def instruct_program(doc: Example, reply: str) -> str:
    """The reply goes on within a code fence, which ask has opened: up to that fence's end."""
    return humaneval_program(doc, "\n" + reply.partition("```")[0])


def ask_humaneval(doc: Example) -> tuple[str, str]:
    return ("Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{doc.row['prompt']}\n```\n",
            f"Here is the completed function:\n```python\n{doc.row['prompt']}\n")


def read_mbpp(row: dict) -> Example:
    tests = "\n".join(row["test_list"][:3])
    text = (f"You are an expert Python programmer, and here is your task: {row['text']} Your code "
            f"should pass these tests:\n\n{tests}\n[BEGIN]\n")
    return Example(text, f"{row['code']}\n[DONE]")


def mbpp_program(doc: Example, reply: str) -> str:
    return "\n".join([reply, doc.row.get("test_setup_code", ""), *doc.row["test_list"]])


def read_chain(messages: list) -> Example:
    ask, reply = (message["content"] for message in messages)
    return Example(ask, reply)


def judge_chain(doc: Example, generate_replies: list) -> dict:
    """Whether the answer is the right one, and the share of lines before the first wrong one."""
    lines = doc.target.split("\n")
    return {"acc": float(synthetic.conversations.answer_of(generate_replies[0]) == synthetic.conversations.answer_of(doc.target)),
            "steps": common([lines, generate_replies[0].split("\n")]) / len(lines)}


def chains(domain: str, new_tokens: int) -> Task:
    """Skills composed one after another, never trained on; new_tokens: bytes of the longest."""
    return Task(read_chain, source=partial(sft.load_conversations, HELD_OUT[domain][0]), judge=judge_chain,
                new_tokens=new_tokens, chat=True)


HUMANEVAL = dict(
    read=lambda row: Example(row["prompt"], row["canonical_solution"]),
    hub=("openai/openai_humaneval", None, "test", None), files=("HumanEval.jsonl", None),
    stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), new_tokens=1024)
TASKS = {
    "chains": chains("held_chains", 200),        # as many skills as in training
    "longer_chains": chains("longer_chains", 300),
    "mmlu": Task(
        read_mmlu, ("cais/mmlu", "all", "test", "dev"), ("mmlu_test.jsonl", "mmlu_dev.jsonl"),
        num_fewshot=5, reported={"acc": 78.1}, first=True, norm=False,
        head="The following are multiple choice questions (with answers) about {}.\n\n"),
    "gsm8k": Task(
        lambda row: Example(f"Question: {row['question']}\nAnswer:", f" {row['answer']}"),
        ("openai/gsm8k", "main", "test", "train"), ("gsm8k_test.jsonl", "gsm8k_train.jsonl"),
        num_fewshot=8, reported={"strict": 94.92}, judge=judge_gsm8k,
        stops=("Question:", "</s>", "<|im_end|>")),
    "humaneval": Task(
        **HUMANEVAL, reported={"pass@1": 65.9}, program=humaneval_program),
    "humaneval_instruct": Task(
        **HUMANEVAL, reported={"pass@1": 93.2}, program=instruct_program, ask=ask_humaneval),
    "mbpp": Task(
        read_mbpp, ("google-research-datasets/mbpp", "full", "test", "prompt"),
        ("mbpp.jsonl", "mbpp.jsonl"), num_fewshot=3, reported={"pass@1": 81.5}, first=True,
        program=mbpp_program, stops=("[DONE]",),
        keep=lambda row, which: row["task_id"] in (range(11, 511), range(2, 5))[which]),
    "arc_easy": Task(
        lambda row: choose(f"Question: {row['question']}\nAnswer:", *options(row)),
        ("allenai/ai2_arc", "ARC-Easy", "test", "train"),
        ("arc_easy_test.jsonl", "arc_easy_train.jsonl"), reported={"acc": 84.1}),
    "arc_challenge": Task(
        lambda row: choose(f"Question: {row['question']}\nAnswer:", *options(row)),
        ("allenai/ai2_arc", "ARC-Challenge", "test", "train"),
        ("arc_challenge_test.jsonl", "arc_challenge_train.jsonl"), num_fewshot=25,
        reported={"acc_norm": 69.6}),
    "hellaswag": Task(
        read_hellaswag, ("Rowan/hellaswag", None, "validation", "train"),
        ("hellaswag_val*.jsonl", "hellaswag_train.jsonl"), num_fewshot=10, reported={"acc_norm": 84.0}),
    "piqa": Task(
        lambda row: choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]],
                           row["label"]),
        ("baber/piqa", None, "validation", "train"), ("piqa_val.jsonl", "piqa_train.jsonl"),
        reported={"acc_norm": 81.6}),
    "openbookqa": Task(
        lambda row: choose(row.get("question_stem") or row["question"], *options(row)),
        ("allenai/openbookqa", "main", "test", "train"),
        ("openbookqa_test.jsonl", "openbookqa_train.jsonl")),
    "siqa": Task(
        read_siqa, ("allenai/social_i_qa", None, "validation", "train"),
        ("siqa_val.jsonl", "siqa_train.jsonl"), reported={"acc": 53.8}, norm=False),
    "winogrande": Task(
        read_winogrande, ("allenai/winogrande", "winogrande_xl", "validation", "train"),
        ("winogrande_val.jsonl", "winogrande_train.jsonl"), num_fewshot=5, reported={"acc": 79.6},
        norm=False),
}


# ---- documents and prompts

def rows_of(task: Task, which: int, bench_dir: str | None):
    """(place, row) of the questions (which = 0) or the examples (1). ValueError, one line, for what
    is missing or no JSON."""
    if task.source:
        yield from enumerate(task.source())
        return
    (name, configuration, split), file = (*task.hub[:2], task.hub[2 + which]), task.files[which]
    if bench_dir is None:
        try:
            from datasets import load_dataset
            rows = load_dataset(name, configuration, split=split)
        except Exception as e:   # of a dozen kinds, all with a message worth one line
            raise UserError(f"dataset {name}: {one_line(e)}; or put {file} into a folder and "
                             "give --benchmark_dir") from None
        yield from ((f"{name}, {split} row {i}", row) for i, row in enumerate(rows))
        return
    found = sorted(Path(bench_dir).glob(file))
    if not found:
        raise UserError(f"{Path(bench_dir) / file} is missing: it has on each line a JSON object, "
                         f"a row of {name}, {split}; put it there"
                         + (", or give --num_fewshot=0" if which else ""))
    if len(found) > 1:
        raise UserError(f"{', '.join(map(str, found))} may each be meant; keep one of them there")
    lines = found[0].read_text(encoding="utf-8").rstrip("\n").split("\n")
    for i, line in enumerate(lines, 1):
        try:
            yield f"{found[0]}:{i}", json.loads(line)
        except ValueError as e:
            raise UserError(f"{found[0]}:{i}: not JSON: {e}") from None


def docs_of(task: Task, which: int, bench_dir: str | None) -> list[Example]:
    """The documents of rows_of, in their order. ValueError, with its place, for a row of another
    form."""
    docs = []
    for place, row in rows_of(task, which, bench_dir):
        try:
            if task.keep(row, which):
                docs.append(task.read(row))
                docs[-1].row = row
                if task.program:                         # is there what it needs?
                    task.program(docs[-1], "")
        except KeyError as e:
            raise UserError(f"{place}: no {e}; the row has {', '.join(row)}") from None
        except (ValueError, TypeError, IndexError, AttributeError) as e:
            raise UserError(f"{place}: {one_line(e)}") from None
    return docs


def chosen(docs: list[Example], limit: int | None) -> list[int]:
    """The numbers of the first `limit` documents of each group."""
    seen = defaultdict(count)
    return [i for i, doc in enumerate(docs) if limit is None or next(seen[doc.group]) < limit]


def questions_of(name: str, task: Task, c: Config) -> tuple[list[Example], int]:
    """A task's documents and how many examples are before each. They begin with the task's head and
    the examples, drawn for all documents in order, so that they depend neither on ranks nor on what
    is done already; one more is drawn where questions are a validation split, lest one be its own
    example (lm-eval 0.4.9.1, samplers.py). ValueError for too few of them, or no documents."""
    shots = task.num_fewshot if c.num_fewshot is None or task.source else c.num_fewshot
    draw = shots and shots + (task.hub[2] == "validation")
    docs, pool, rng = docs_of(task, 0, c.benchmark_dir), defaultdict(list), random.Random(1234)
    if not docs:
        raise UserError(f"{name} has no documents; give it a file that has some")
    if shots and task.files[1] is None:
        raise UserError(f"shots={shots}, but {name} has no examples; give --num_fewshot=0")
    for doc in docs_of(task, 1, c.benchmark_dir) if shots else ():
        pool[doc.group].append(doc)
    for doc in docs:
        there = pool[doc.group]
        if len(there) < draw:
            raise UserError(f"shots={shots}, but {task.files[1]} has {len(there)} examples"
                             f"{f' of {doc.group}' if doc.group else ''}; lower --num_fewshot: {draw} "
                             "are drawn")
        drawn = there[:draw] if task.first else rng.sample(there, draw)
        doc.begin = task.head.format(doc.group.replace("_", " ")) + "".join(
            f"{x.text}{x.target}\n\n" for x in [x for x in drawn if x.row != doc.row][:shots])
    return docs, shots


class PromptEncoder:
    """A tokenizer with the rules of a model: its first token, the tokens that end a reply.

    encode(text)         ids of text alone
    pair(a, b)           ids of a, and of b behind it, cut where a alone would end
    ask(question)        ids of a conversation up to where the reply begins"""

    def __init__(self, tokenizer, first: int | None):
        self.tokenizer, self.specials = tokenizer, tokenizer._special_tokens
        self.first = [] if first is None else [first]
        self.ends = {self.specials[data.END], self.specials[data.TURN_END]}
        self.bytes = defaultdict(lambda: b"\xff", dict.fromkeys(range(tokenizer.n_vocab), b""))
        for token, i in tokenizer._mergeable_ranks.items():
            self.bytes[i] = token

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_ordinary(text)

    def pair(self, context: str, continuation: str) -> tuple[list, list]:
        """Spaces at a context's end go to the continuation, since tokens begin with them. An empty
        context becomes BEGIN."""
        start, whole = self.encode(context.rstrip()), self.encode(context + continuation)
        first = self.first or ([] if start else [self.specials[data.BEGIN]])
        return first + start, whole[len(start):]

    def ask(self, question: str) -> list[int]:
        return sft.encode_prompt(self.tokenizer, [{"role": "user", "content": question}])


# ---- log-likelihood

def common(rows: list) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, tokens in enumerate(zip(*rows)) if len({*tokens}) > 1),
                min(map(len, rows)))


class LoglikelihoodRequest:
    """The sequences of one document, from (context, continuation) of each choice, of `longest` + 1
    tokens the last. Of each row the last `count` tokens are scored; all begin with the same
    `prefix` tokens, which is less than all of a row but the scored ones."""

    def __init__(self, doc: int, pairs: list[tuple[list, list]], longest: int, group: str = ""):
        self.doc, self.group = doc, group
        self.rows = [(a + b)[-(longest + 1):] for a, b in pairs]
        self.counts = [min(len(b), len(row) - 1) for (_, b), row in zip(pairs, self.rows)]
        self.prefix = min(common(self.rows),
                          *(len(row) - n for row, n in zip(self.rows, self.counts)))
        self.length = max(map(len, self.rows))


def parts(sizes: list[int], tokens: int, before: int = 0, keys: float = math.inf):
    """Slices of rows, the largest first, for a pass each: so many that they have at most `tokens`,
    a sixteenth of which may be padding, and `keys`, with `before` more in each row; or one."""
    a = 0
    while a < len(sizes):
        own = sizes[a]
        n = max(1, min(tokens // own, keys // (own + before)))
        padding = accumulate(own - size for size in sizes[a:a + n])
        b = a + sum(x <= tokens / 16 for x in padding)
        yield slice(a, b)
        a = b


def batches(requests: list[LoglikelihoodRequest], keys: int, longest: int):
    """Those of one group together, in it those of the longest prefix first; the prefixes are no
    more than so many keys, padding included, or those of one request."""
    batch, rest = [], 0
    for r in sorted(requests, key=lambda r: (r.group, -r.prefix, -r.length, r.doc)):
        rest = max(rest, r.length - r.prefix)
        if batch and (batch[0].prefix * (len(batch) + 1) > keys or r.group != batch[0].group
                      or batch[0].prefix + rest > longest + 1):
            yield batch
            batch, rest = [], r.length - r.prefix
        batch.append(r)
    if batch:
        yield batch


@torch.no_grad()
def loglikelihoods(model: Motif, requests: list[LoglikelihoodRequest], batch_tokens: int):
    """Yield each request and the log-probabilities, in fp32 on the CPU, of the scored tokens of
    each of its rows. PASS_TOKENS are read at once, with the keys and values of sixteen times as
    many kept: padding is less where the rows of a pass are chosen among more."""
    tokens = min(batch_tokens, PASS_TOKENS[model.head_weight.device.type])
    keys = min(batch_tokens // 2, 16 * tokens)           # and in a pass as many copies again
    alone = sorted((r for r in requests if len(r.rows) == 1 or r.prefix == 0),
                   key=lambda r: (1 - r.length) * len(r.rows))
    for s in parts([(r.length - 1) * len(r.rows) for r in alone], tokens):
        rows, counts = ([x for r in alone[s] for x in getattr(r, of)] for of in ("rows", "counts"))
        found = iter(log_probs(model, rows, counts))
        yield from ((r, [*islice(found, len(r.rows))]) for r in alone[s])
    together = [r for r in requests if len(r.rows) > 1 and r.prefix]
    for batch in batches(together, keys, model.config.max_position_embeddings):
        yield from zip(batch, score_with_shared_prefix(model, batch, tokens, keys))


def score_with_shared_prefix(model: Motif, batch: list[LoglikelihoodRequest], tokens: int, keys: int) -> list[list[torch.Tensor]]:
    """See scored: of requests whose rows begin with the same, the longest prefix first; at most so
    many tokens, and keys, in a pass.

    The tokens that all rows of a request share are read once, aligned on the right; behind a copy
    of their keys and values each row writes its own, the longest first. What is common to the
    whole batch, such as examples, is read in one row and copied: its keys are the same wherever a
    row begins."""
    device, P = model.head_weight.device, batch[0].prefix
    prefixes = [r.rows[0][:r.prefix] for r in batch]
    padding = torch.tensor([P - len(ids) for ids in prefixes], device=device)
    cache = model.new_cache(len(batch), P)
    shared = min(common(prefixes), batch[-1].prefix - 1)
    shared = shared if len(batch) > 1 and shared >= SHARED_TOKENS else 0
    if shared:
        once = model.new_cache(1, shared)
        model(torch.tensor([prefixes[0][:shared]], device=device), cache=once, last=1)
        columns = (torch.arange(P, device=device) - padding[:, None]).clamp(0, shared - 1)
        for pair, source in zip(cache, once):
            for to, t in zip(pair, source):
                to.copy_(t[0][:, columns].transpose(0, 1))
    found = []                           # log-probabilities of each row's tokens of its own
    for s in parts([r.prefix - shared for r in batch], tokens):
        out = P - batch[s.start].prefix                  # columns that none of these rows has
        own = [tuple(t[s, :, out:] for t in pair) for pair in cache]
        ids = padded(prefixes[s], device, left=True)[:, shared:]
        logits = model(ids, cache=own, start=shared, padding=padding[s] - out, last=1)
        for log_p, r in zip(logits[:, 0].float().log_softmax(-1), batch[s]):
            found.append([*log_p[[row[r.prefix] for row in r.rows], None].cpu()])
    rests = sorted(((i, j, row[r.prefix:]) for i, r in enumerate(batch)
                    for j, row in enumerate(r.rows) if len(row) > r.prefix + 1),
                   key=lambda rest: -len(rest[2]))
    sizes = [len(rest) - 1 for *_, rest in rests]
    for s in parts(sizes, tokens, P, keys):
        numbers, _, rows = zip(*rests[s])
        out, of = min(P - batch[i].prefix for i in numbers), torch.tensor(numbers, device=device)
        own = [tuple(F.pad(t[of, :, out:], (0, 0, 0, sizes[s.start])) for t in pair)
               for pair in cache]
        log_p = log_probs(model, rows, sizes[s], cache=own, start=P - out,
                          padding=padding[of] - out)
        for (i, j, _), x in zip(rests[s], log_p):
            found[i][j] = torch.cat([found[i][j], x])
    return [[x[-n:] for x, n in zip(rows, r.counts)] for rows, r in zip(found, batch)]


def log_probs(model: Motif, rows: list, counts: list, **cached) -> list[torch.Tensor]:
    """Of the last `count` tokens of each row, fewer than it has, in one pass."""
    device = model.head_weight.device
    ids, targets = padded([row[:-1] for row in rows], device), padded(
        [[-1] * (len(row) - 1 - n) + row[-n:] for row, n in zip(rows, counts)], device, fill=-1)
    nats = model(ids, targets, reduction="none", **cached)
    return (-nats[targets >= 0]).cpu().split([*counts])


def padded(rows: list, device: torch.device, left: bool = False, fill: int = 0) -> torch.Tensor:
    """Rows of ids (B, longest), with `fill` behind them or, on the left, before them."""
    n = max(map(len, rows))
    fills = [[fill] * (n - len(row)) for row in rows]
    return torch.tensor([z + row if left else row + z for row, z in zip(rows, fills)],
                        device=device)


# ---- generation

def generate_replies(model: Motif, text: PromptEncoder, prompts: list[list], stops: tuple, new_tokens: int,
            batch_tokens: int, temperature: float = 0.0, seeds: list | None = None):
    """Yield (number of the prompt, reply) as replies end, at a token that ends one, before the
    earliest of the stop strings, or after new_tokens. Of a prompt that leaves no room for so many
    the last tokens are kept. A batch is drawn with its first prompt's seed."""
    longest, device = model.config.max_position_embeddings, model.head_weight.device
    new_tokens = min(new_tokens, longest // 2)
    prompts = {i: ids[-(longest - new_tokens):] for i, ids in enumerate(prompts)}
    order = sorted(prompts, key=lambda i: -len(prompts[i]))
    while order:
        P = len(prompts[order[0]])
        n = max(1, batch_tokens // (P + new_tokens))
        rows, order = order[:n], order[n:]
        padding = torch.tensor([P - len(prompts[i]) for i in rows], device=device)
        ids = padded([prompts[i] for i in rows], device, left=True)
        yield from finished(model.stream(ids, new_tokens, temperature, padding=padding,
                                         seed=seeds and seeds[rows[0]]), rows, text, stops)


def finished(stream, rows: list, text: PromptEncoder, stops: tuple):
    """See replies. Once half of the rows have ended, the others go on without them; one alone has
    another for company, as torch.compile would make a graph of its own for a single row."""
    said, left, go_on = {i: b"" for i in rows}, {*rows}, None
    with suppress(StopIteration):
        while left:
            for i, token in zip(rows, stream.send(go_on)[:, 0].tolist()):
                if i in left:
                    said[i] += text.bytes[token]
                    cuts = [k for k in (said[i].find(s.encode()) for s in stops) if k >= 0]
                    if cuts or token in text.ends:
                        left.remove(i)
                        yield i, said[i][:min(cuts, default=None)].decode("utf-8", "replace")
            go_on = None
            if 2 < len(rows) >= 2 * len(left):
                load_previous = sorted(range(len(rows)), key=lambda k: rows[k] not in left)
                load_previous = load_previous[:max(2, len(left))]
                rows, go_on = [rows[k] for k in load_previous], torch.tensor(load_previous)
    yield from ((i, said[i].decode("utf-8", "replace")) for i in rows if i in left)


# ---- three ways to measure documents, by number: each yields (number, record)

def multiple_choice(task: Task, docs: dict[int, Example], model: Motif, text: PromptEncoder, c: Config):
    """The likeliest answer, the first of equals, by its log-probability alone (acc) and per
    character of the answer (acc_norm)."""
    longest, requests = model.config.max_position_embeddings, []
    for i, doc in docs.items():
        contexts = [doc.begin + own for own in doc.texts or [doc.text] * len(doc.choices)]
        pairs = [(text.ask(context), text.encode(choice[1:])) if c.chat
                 else text.pair(context, choice) for context, choice in zip(contexts, doc.choices)]
        requests.append(LoglikelihoodRequest(i, pairs, longest, doc.begin if task.first else ""))
    for r, found in loglikelihoods(model, requests, c.kv_cache_tokens):
        doc, sums = docs[r.doc], [x.sum().item() for x in found]
        norms = [s / (len(choice) - 1) for s, choice in zip(sums, doc.choices)]
        scores = {"acc": float(sums.index(max(sums)) == doc.answer)}
        if task.norm:
            scores["acc_norm"] = float(norms.index(max(norms)) == doc.answer)
        yield r.doc, {"prompt": doc.begin + doc.text, "output": sums, "answer": doc.answer,
                      **scores}


def generation(task: Task, docs: dict[int, Example], model: Motif, text: PromptEncoder, c: Config):
    """What the model writes, judged while it writes on: a program has a process of its own."""
    chat, asked, prompts, samples = c.chat or task.chat, {}, [], c.num_samples if task.program else 1
    for i, doc in docs.items():
        content, reply = task.ask(doc) if task.ask else (doc.begin + doc.text, "")
        asked[i] = content + (f" {reply}" if reply and not chat else reply)
        prompts += [text.ask(content) + text.encode(reply) if chat
                    else text.first + text.encode(asked[i])] * samples
    numbers, said = [i for i in docs for _ in range(samples)], defaultdict(list)
    seeds = [random.Random(f"{c.seed} {i} {k}").getrandbits(32) for k, i in enumerate(numbers)]
    judge = task.judge or partial(judge_code, task.program)
    fenced = c.chat and task.program and not task.ask    # the first whole fence; ask has begun one
    def record(i):
        judged = [re.sub(r"(?s)^.*?```(?:python)?\n(.*?)```.*", r"\1", reply) if fenced else reply
                  for reply in said[i]]
        return i, {"prompt": asked[i], "output": said[i], **judge(docs[i], judged)}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # ranks of this machine
    with ThreadPoolExecutor(max(1, os.cpu_count() // here)) as pool:
        jobs = []
        for k, reply in generate_replies(model, text, prompts, task.stops, task.new_tokens, c.kv_cache_tokens,
                                c.temperature, seeds):
            said[numbers[k]].append(reply)
            if len(said[numbers[k]]) == samples:
                jobs.append(pool.submit(record, numbers[k]))
            while jobs and jobs[0].done():
                yield jobs.pop(0).result()
        yield from (job.result() for job in jobs)


def bits_per_byte(task: Task, docs: dict[int, Example], model: Motif, text: PromptEncoder, c: Config):
    """Bits and bytes of a document by position: in the windows of max_position_embeddings tokens
    that it is cut into, from 1, 2, 4, ... tokens on; where there is a target, of that as a reply,
    with its end of turn."""
    longest, requests, found = model.config.max_position_embeddings, [], {}
    for i, doc in docs.items():
        found[i] = {"prompt": doc.text[:80], "bits": defaultdict(float), "bytes": Counter()}
        if doc.target:
            reply = text.encode(doc.target) + [text.specials[data.TURN_END]]
            requests.append(LoglikelihoodRequest(i, [(text.ask(doc.text), reply)], longest))
            continue
        ids = sum(text.pair("", doc.text), [])
        for start in range(0, len(ids) - 1, longest):
            window = ids[start:start + longest + 1]
            requests.append(LoglikelihoodRequest(i, [(window[:1], window[1:])], longest))
    left = Counter(r.doc for r in requests)
    for r, (log_p,) in loglikelihoods(model, requests, c.kv_cache_tokens):
        for at, (token, x) in enumerate(zip(r.rows[0][-r.counts[0]:], log_p.tolist())):
            bin = 2 ** at.bit_length() // 2
            found[r.doc]["bits"][bin] -= x / math.log(2)
            found[r.doc]["bytes"][bin] += len(text.bytes[token])
        left[r.doc] -= 1
        if left[r.doc] == 0:
            yield r.doc, found[r.doc]


# ---- the run

def texts_of(source: str, limit: int | None) -> list[str]:
    """The first documents of a source of data.py; of a builtin one the beginning of the first that
    is held out of each unit."""
    units = data.source_units(source)
    texts = (filter(str.strip, unit()) for unit in units)
    if not source.startswith("builtin:"):
        return [*islice(chain.from_iterable(texts), limit)]
    held_out = (next(islice(unit, -number % data.VAL_EVERY, None), "")
                for number, unit in enumerate(islice(texts, BUILTIN_DOCS)))
    return [text[:DOC_LETTERS] for text in held_out if text][:limit]


def tasks_of(c: Config) -> dict[str, Task]:
    """Those asked for. ValueError for one that is unknown or may not run."""
    tasks = {}
    if c.num_samples > 1 and not c.temperature:
        raise UserError(f"samples={c.num_samples} are all the same at temperature 0; give "
                         "--temperature=0.8")
    for name in (own for name in c.tasks.split(",") for own in (BPB if name == "bpb" else [name])):
        if name == "chat":
            raise UserError("chat is none of several tasks; give --tasks=chat alone")
        if name == "bpb:replies":
            tasks[name] = chains("held_chains", 0)
        elif name.startswith("bpb:"):
            tasks[name] = Task(Example, source=partial(texts_of, name[4:], c.limit))
        elif name not in TASKS:
            near = difflib.get_close_matches(name, [*TASKS, "bpb", "chat"], n=1, cutoff=0.0)
            raise UserError(f"unknown task {name!r}; did you mean {near[0]!r}? Known: "
                             f"{', '.join(TASKS)}, bpb, bpb:SOURCE, chat")
        elif TASKS[name].program and not c.run_code:
            raise UserError(f"{name} runs programs that the model writes, in a sandbox; give "
                             "--run_code to allow that")
        else:
            tasks[name] = TASKS[name]
    return tasks


def load_previous(out: Path, settings: dict) -> tuple[dict, dict]:
    """What runs with the same settings left in out: records by (task, number), and results."""
    out.mkdir(parents=True, exist_ok=True)
    file, results, found = out / "samples.jsonl", out / "results.json", {}
    before = read_json(results) if file.exists() and results.exists() else {}
    if settings.items() <= before.items():
        for line in file.read_text().split("\n"):
            with suppress(ValueError):                   # a line that was cut
                record = json.loads(line)
                found[record["task"], record["doc"]] = record
    elif before:
        print(f"{out}: another model or other settings before; beginning anew")
        before = {}
    save(out, settings, found, before.get("tasks", {}))
    return found, before.get("tasks", {})


def save(out: Path, settings: dict, records: dict, results: dict) -> None:
    """The two files of a run, records in order."""
    lines = (json.dumps(records[key]) + "\n" for key in sorted(records))
    replace_text(out / "samples.jsonl", "".join(lines))
    replace_text(out / "results.json", json.dumps({**settings, "tasks": results}, indent=1) + "\n")


def progress(name: str, total: int, items):
    """The items; every five seconds a line: how many are done, how fast, how long it will yet
    take."""
    begun = said = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if RANK == 0 and (now - said > 5 or n == total):
            speed, said = n / max(now - begun, 1e-9), now
            print(f"{name}  {n:,d}/{total:,d} documents  {speed:,.1f}/s  eta "
                  f"{timedelta(seconds=int((total - n) / speed))}", flush=True)


def evaluate(folder: Path, tasks: dict, out: Path, c: Config, device: torch.device) -> dict:
    """All tasks on one model -> its results, also in out/results.json beside those of earlier runs.
    A kept record stands if its document is the same. Each rank has every WORLD-th of the others,
    and all append to the one file of samples."""
    model, text = open_model(folder, c, device)
    if c.kv_cache_tokens is None:
        token = sum(t.nbytes for pair in model.new_cache(1, 1) for t in pair)
        c = replace(c, batch_tokens=max(1, KEY_BYTES[device.type] // token))
    settings = {"model": str(folder),
                "stamp": max(f.stat().st_mtime_ns for f in folder.glob("*.safetensors")),
                **{key: getattr(c, key) for key in SETTINGS}}
    (records, before), results = all_gather_object(load_previous(out, settings) if RANK == 0 else None)[0], {}
    for name, (task, docs, shots) in tasks.items():
        numbers = chosen(docs, c.limit)
        marks = {i: hashlib.sha256(repr(docs[i]).encode()).hexdigest()[:16] for i in numbers}
        same = {i for i in numbers if records.get((name, i), {}).get("hash") == marks[i]}
        todo = [i for i in numbers if i not in same][RANK::WORLD]
        measure = bits_per_byte if name.startswith("bpb:") else (
            generation if task.judge or task.program else multiple_choice)
        found, new = measure(task, {i: docs[i] for i in todo}, model, text, c), {}
        with (out / "samples.jsonl").open("ab", buffering=0) as file:   # a record, one write
            for i, record in progress(name, len(todo), found):
                new[name, i] = {"task": name, "doc": i, "hash": marks[i], **record}
                file.write(json.dumps(new[name, i]).encode() + b"\n")
        for of_rank in all_gather_object(new):
            records.update(of_rank)
        results[name] = {
            metric: {**found, "shots": shots, "reported": task.reported.get(metric),
                     "report_shots": task.num_fewshot}
            for metric, found in result_of([records[name, i] for i in numbers]).items()}
    if RANK == 0:
        save(out, settings, records, {**before, **results})
    return results


def ratio(values: list, sizes: list) -> dict:
    """The sum of values over that of sizes, and its standard error."""
    n, value = len(values), sum(values) / sum(sizes)
    error = statistics.stdev(v - value * s for v, s in zip(values, sizes)) / n**0.5 if (
        n > 1) else math.nan
    return {"value": value, "stderr": error / statistics.fmean(sizes), "n": n}


def result_of(records: list[dict]) -> dict:
    """Metric -> value, standard error and n, in per cent but bits per byte."""
    if "bits" not in records[0]:
        return {metric: ratio([100 * r[metric] for r in records], [1] * len(records))
                for metric, value in records[0].items() if isinstance(value, float)}
    sums = {key: Counter() for key in ("bits", "bytes")}
    for r in records:
        for key in sums:
            sums[key].update({int(at): x for at, x in r[key].items()})
    of = ratio(*([sum(r[key].values()) for r in records] for key in ("bits", "bytes")))
    return {"bits per byte": {**of, "by_position": {
        at: x / sums["bytes"][at] for at, x in sorted(sums["bits"].items()) if sums["bytes"][at]}}}


def scores_of(results: dict[str, dict]) -> list[tuple]:
    """(task, metric, the result of each model)"""
    return [(name, metric, [of[name][metric] for of in results.values()])
            for name, found in [*results.values()][-1].items() for metric in found]


def table(results: dict[str, dict]) -> str:
    """A column for each model, with standard errors, then the report's figure, which is of
    Motif-2-12.7B with the shots in brackets."""
    lines = [f"{'task':21s} {'shots':>5s} {'metric':13s} {'n':>6s}"
             + "".join(f"{name:>17s}" for name in results) + f"{'reported':>12s}"]
    for name, metric, columns in scores_of(results):
        r = columns[-1]
        told = "-" if r["reported"] is None else f"{r['reported']:.2f} ({r['report_shots']})"
        lines.append(f"{name:21s} {r['shots']:5d} {metric:13s} {r['n']:6,d}" + "".join(
            f"{x['value']:9.3f} ±{x['stderr']:6.3f}" for x in columns) + f"{told:>12s}")
        if "by_position" in r and len(results) == 1:
            lines.append(" " * 27 + "from token " + "  ".join(
                f"{at}: {x:.2f}" for at, x in r["by_position"].items()))
    return "\n".join(lines)


# ---- the model

def models_of(c: Config) -> dict[str, Path]:
    """The checkpoints that are meant, by what the table calls them. ValueError if there is none."""
    if c.model is None:
        starts = {Path(run).name: latest_checkpoint(Path(run)) for run in STAGES}
        found = {name: start[0] for name, start in starts.items() if start}
        if not found:
            raise UserError(f"none of {', '.join(STAGES)} holds a checkpoint; run `python "
                             "pretrain.py`, or give --model=PATH")
        return found
    folder = model_folder(c.model)
    if not folder.is_dir():
        raise UserError(f"model={c.model} is neither a folder nor owner/name of the Hub")
    steps, whole = sorted(checkpoint_steps(folder)), {}
    for name in (f"step_{step}" for step in steps):
        try:
            read_state(folder / name)
            whole[name] = folder / name
        except ValueError as e:
            print(f"{e}; passing it over")
    if not (whole or [*folder.glob("*.safetensors")]):
        raise UserError(f"model={c.model} holds no whole checkpoint")
    return whole if c.plot and whole else {"measured": [folder, *whole.values()][-1]}


def open_model(folder: Path, c: Config, device: torch.device) -> tuple[Motif, PromptEncoder]:
    """Matrices in the precision asked for, vectors as they are stored, which is fp32 where we
    trained them. The first token is the tokenizer's own business: a tokenizer.json says whether it
    adds one, and pretrain.py begins every document with BEGIN."""
    trained = (folder / "state.json").exists()
    own = read_state(folder)["config"]["tokenizer"] if trained else str(folder)
    if not trained and not c.tokenizer and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; give --tokenizer")
    name = c.tokenizer or own
    tokenizer = data.load_tokenizer(name)
    first = tokenizer._special_tokens[data.BEGIN]
    if not trained and not name.endswith(".tiktoken") and (
            "/" in name or name.endswith(".json") or os.path.isdir(name)):
        first = first_token(read_json(data.tokenizer_file(name)), tokenizer)
    model = Motif.from_pretrained(folder, device).requires_grad_(False)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"tokenizer {name} has {tokenizer.n_vocab} tokens, more than the model's "
                         f"vocab_size={model.config.vocab_size}; give the model's own --tokenizer")
    model.compile_steps = c.compile and device.type == "cuda"
    for p in model.parameters():
        p.data = p.data.to(COMPUTE_DTYPE[c.precision] if p.ndim > 1 else torch.float32)
    if RANK == 0:
        begin = "no token" if first is None else tokenizer.decode([first])
        n = sum(p.numel() for p in model.parameters())
        print(f"{folder}: {n:,d} parameters on {device} in {c.precision}, tokenizer {name}; "
              f"{begin} before each text", flush=True)
    return model, PromptEncoder(tokenizer, first)


def first_token(spec: dict, tokenizer) -> int | None:
    """What a tokenizer.json puts before a text: its post-processor says so, if any does."""
    post = spec.get("post_processor") or {}
    for step in post.get("processors", [post]):
        begin = [*step.get("single", []), {}][0].get("SpecialToken")
        if begin and begin["id"] not in tokenizer._special_tokens:
            raise UserError(f"{tokenizer.name} begins texts with {begin['id']}, no added token; "
                             "add it to added_tokens")
        if begin:
            return tokenizer._special_tokens[begin["id"]]
    return None


# ---- chat

def reply_to(messages: list[dict], model: Motif, text: PromptEncoder, temperature: float, seed: int) -> str:
    """Print a reply as it comes -> it. Ctrl-C ends it. The oldest exchanges are left out where they
    do not fit."""
    longest = model.config.max_position_embeddings
    room = min(1024, longest // 2)
    asked = [i for i, m in enumerate(messages) if m["role"] == "user"]
    for i in asked:
        ids = sft.encode_prompt(text.tokenizer, messages[:asked[0]] + messages[i:])
        if len(ids) <= longest - room:
            break
    ids = torch.tensor([ids[-(longest - room):]], device=model.head_weight.device)
    said, decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
    try:
        for token in model.stream(ids, room, temperature, top_k=50, seed=seed):
            if token.item() in text.ends:
                break
            piece = decoder.decode(text.bytes[token.item()])
            print(piece, end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return said


def chat(model: Motif, text: PromptEncoder, c: Config) -> None:
    """A conversation in the terminal."""
    system, messages, temperature = [], [], c.temperature or 0.7
    print("/reset forgets, /system TEXT instructs, /temp X, /quit; Ctrl-C stops a reply")
    for turn in range(sys.maxsize):
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = []
        elif command == "/system":
            system, messages = [{"role": "system", "content": rest}] if rest else [], []
        elif command == "/temp":
            try:
                temperature = max(0.0, configurator.coerce(float, float(rest)))
            except ValueError:
                print(f"/temp needs a number, as in /temp 0.7, not {rest!r}")
        elif command.startswith("/"):
            print(f"{command} is unknown; there are /reset, /system, /temp and /quit")
        elif line:
            messages.append({"role": "user", "content": line})
            said = reply_to(system + messages, model, text, temperature, c.seed + turn)
            messages.append({"role": "assistant", "content": said})


def run(c: Config) -> None:
    """Chat, a reply, or the table of all tasks on all models."""
    device, models = pick_device(c), models_of(c)
    c.precision = compute_precision(c, device)
    if c.prompt is not None or c.tasks == "chat":
        if WORLD > 1:
            raise UserError("a chat is for one process; start it without torchrun")
        model, text = open_model([*models.values()][-1], c, device)
        if c.prompt is None:
            return chat(model, text, c)
        reply_to([{"role": "user", "content": c.prompt}], model, text, c.temperature, c.seed)
        return
    tasks = {name: (task, *questions_of(name, task, c)) for name, task in tasks_of(c).items()}
    results, top = {}, Path(c.out_dir or "out/eval")
    gaps = RANK == 0 and any(task.program for task, *_ in tasks.values()) and sandbox_gaps()
    if gaps:
        print(f"warning: this system does not keep from programs: {gaps}", flush=True)
    for name, folder in models.items():
        own = re.sub("[^A-Za-z0-9_.]+", "-", str(folder)).strip("-")
        out = top if c.out_dir and len(models) == 1 else top / own
        results[name] = evaluate(folder, tasks, out, c, device)
    if RANK == 0:
        print(f"\n{table(results)}\nsamples and results in {top}", flush=True)
        if c.plot:
            from tools.plots import plot_scores
            plot_scores(scores_of(results), [*results], top / "scores.png")


def main() -> None:
    c = configurator.load(Config, sys.argv[1:])
    if WORLD > 1:
        dist.init_process_group("gloo")
    try:
        run(c)
    except OSError as e:
        raise UserError(f"{e.filename or 'error'}: {one_line(e)}") from None
    except torch.OutOfMemoryError:
        raise UserError("out of memory; give less --kv_cache_tokens, 16384 for a start") from None


if __name__ == "__main__":
    run_main(main)
