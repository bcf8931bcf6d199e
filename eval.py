"""Evaluation: the scores of a checkpoint, computed as lm-evaluation-harness 0.4.9.1 computes them.

    python eval.py                                   the quick start's model and its later stages
    python eval.py --model=PATH --tasks=mmlu,gsm8k   benchmarks, beside the scores in the report of
                                                     Motif-2-12.7B (arXiv 2511.07464)
    python eval.py --model=PATH --tasks=chat         a conversation in the terminal

A task asks one of three questions:

    multiple choice   which of the given answers does the model find likeliest?
    generation        is what the model writes right: a number, a chain of skills, a program?
    bits per byte     how well does the model predict a text?

The file goes from the idea to the machinery: how a choice is scored, what a task is, then a section
for each of the three questions, then the table of tasks, then the run and the chat. A run writes

    out_dir/samples.jsonl   a line per question: prompt, output, scores; an interrupted run resumes
    out_dir/results.json    score, standard error and number of questions of every task
"""
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
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import configurator
import data
import sft
from configurator import Count, NonNegative, Size, UserError, one_line
from model import Decoder, KVCache, Motif
from pretrain import COMPUTE_DTYPE, compute_precision, pick_device
from support.run_folder import checkpoint_steps, latest_checkpoint, read_state
from support.log import replace_text
from support.ranks import RANK, WORLD, all_gather_object, broadcast_object, run_main
from support.tasks import CHAINS, TASKS, Example, Task
from support.tokenizer import BEGIN, END, TURN_END, Tokenizer, load_tokenizer
from support.weights import model_folder, read_json

# ---- how a multiple-choice question is scored
#
# A base model does not answer questions; it continues texts. So a question is made into a text, the
# *context*, and each answer into one of its possible *continuations*:
#
#     context          "Question: What is the capital of France?\nAnswer:"
#     continuations    " Rome"    " Lyon"    " Paris, on the Seine"    " Nice"
#
# The score of a continuation c = (c_1, ..., c_n) is its log-likelihood, a sum over its tokens:
#
#     log p(c | context) = sum_t log p(c_t | context, c_1 ... c_{t-1})
#
# Two metrics follow. acc is 1 if the right answer has the largest sum. acc_norm is 1 if it has the
# largest sum *per character*: every further token makes a sum smaller, so that by sums alone a long
# answer loses against a short one:
#
#     sum                  -6.0      -5.2      -9.5                      -8.0      acc = 0
#     sum / characters     -1.50     -1.30     -0.50 (the largest)       -2.00     acc_norm = 1
#
# Two rules decide as much as the formula, and both are the harness's:
#
#   - Tokens begin with their space: " Paris" may be one token. Hence spaces at the end of a context
#     belong to the continuation. Context and continuation are encoded as one text, and cut where
#     the context alone would end.
#   - A text that is too long for the model loses its beginning, never its end.

def choice_scores(sums: list[float], choices: list[str], answer: int) -> dict[str, float]:
    """acc and acc_norm, each 0 or 1, from the log-likelihood of every choice. The space before a
    choice is not one of its characters. Of equal choices the first one counts as the likeliest.

    >>> choices = [" Rome", " Lyon", " Paris, on the Seine", " Nice"]
    >>> choice_scores([-6.0, -5.2, -9.5, -8.0], choices, answer=2)
    {'acc': 0.0, 'acc_norm': 1.0}
    """
    per_character = []
    for total, choice in zip(sums, choices):
        per_character.append(total / (len(choice) - 1))
    return {"acc": float(sums.index(max(sums)) == answer),
            "acc_norm": float(per_character.index(max(per_character)) == answer)}


class PromptEncoder:
    """A tokenizer, with what the model expects around a text.

    begin       the id that begins every text, in a list; an empty list if there is none
    end_ids     the ids that end a reply

    >>> text = PromptEncoder(load_tokenizer("byte"), begin_id=None)
    >>> text.encode_pair("A: ", "B")           # the space moves into the continuation
    ([65, 58], [32, 66])
    """

    def __init__(self, tokenizer: Tokenizer, begin_id: int | None):
        self.tokenizer = tokenizer
        self.begin = [] if begin_id is None else [begin_id]
        self.end_ids = {tokenizer.special[END], tokenizer.special[TURN_END]}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both, by the rules above. There must be something to continue: an empty
        context becomes BEGIN."""
        context_ids = self.encode(context.rstrip())
        continuation_ids = self.encode(context + continuation)[len(context_ids):]
        begin = self.begin
        if not begin and not context_ids:
            begin = [self.tokenizer.special[BEGIN]]
        return begin + context_ids, continuation_ids

    def encode_chat(self, question: str) -> list[int]:
        """A conversation up to where the reply to this question begins."""
        return sft.encode_prompt(self.tokenizer, [{"role": "user", "content": question}])


# ---- log-likelihoods
#
# One forward pass for each choice would compute most tokens many times: all 5-shot questions of a
# subject begin with the same examples, and all choices of a question with the same prompt.
# Attention is causal, so the keys and values of a token depend only on what comes before it. Those
# of a common beginning are therefore computed once, and copied for each text that goes on from it.
# This takes three stages (a letter is a few tokens, "." is padding, [ ] is copied, not computed):
#
#                                few-shot examples     own prompts    choices
#     stage 1: one row           eeeeeeeeeeeeeeeee
#
#     stage 2: a row for each    [eeeeeeeeeeeeeeee]    pppppppp
#              question          [eeeeeeeeeeeeeeee]    qqqqq...
#
#     stage 3: a row for each    [eeeeeeeeeeeeeeee]    [pppppppp]     aaaaa
#              question and      [eeeeeeeeeeeeeeee]    [qqqqq]cc      .....
#              choice            [eeeeeeeeeeeeeeee]    [pppppppp]     b....
#
# The last token of a prompt predicts the first token of every choice, so stage 2 gives the
# log-probabilities of all first tokens and stage 3 only those of the rest: in MMLU, whose choices
# are the single tokens " A" to " D", there is no stage 3.
#
# Cost: 5-shot MMLU has about 600 tokens of examples and 100 of question. Row by row that would be
# 4 x 700 tokens for a question; here it is 100.
#
# Memory: `kv_cache_tokens` bounds how many tokens have their keys and values in memory at once.
# Half of it is for the prompts of stage 2, half for the copies of stage 3.

GPU_KV_BYTES = 16 * 2**30       # keys and values kept at once, if --kv_cache_tokens is not given
CPU_KV_BYTES = 2**30
GPU_BATCH_TOKENS = 8192         # tokens in one forward pass of the scorer
CPU_BATCH_TOKENS = 512          # larger passes have more padding and no gain
MIN_SHARED_PREFIX = 32          # a shorter common beginning does not repay a pass of its own


class LoglikelihoodRequest:
    """One question, for the scorer.

    pairs               (context ids, continuation ids) of each choice
    rows[j]             both together; only the last max_length + 1 ids are kept, the last of which
                        is predicted and not read
    num_scored[j]       how many ids at the end of row j are scored
    prompt              the ids that all rows begin with, short of the scored ones
    group               requests of one group are expected to begin alike
    """

    def __init__(self, number: int, pairs: list[tuple[list, list]], max_length: int,
                 group: str = ""):
        self.number = number
        self.rows = []
        self.num_scored = []
        for context, continuation in pairs:
            row = (context + continuation)[-(max_length + 1):]
            self.rows.append(row)
            self.num_scored.append(min(len(continuation), len(row) - 1))

        length = common_prefix_length(self.rows)
        for row, n in zip(self.rows, self.num_scored):
            length = min(length, len(row) - n)
        self.prompt = self.rows[0][:length]

        # Rows that lost their beginning do not begin as the others of the group do.
        was_cut = any(len(a) + len(b) > max_length + 1 for a, b in pairs)
        self.group = "" if was_cut else group


def common_prefix_length(rows: list) -> int:
    """How many items all rows begin with.

    >>> common_prefix_length([[5, 7, 9], [5, 7], [5, 7, 8]])
    2
    """
    for i, column in enumerate(zip(*rows)):
        if len(set(column)) > 1:
            return i
    return min(len(row) for row in rows)


def micro_batches(lengths: list[int], max_tokens: int, kv_tokens: float = math.inf,
                  cached: int = 0) -> Iterator[slice]:
    """Cut rows of these lengths, longest first, into slices for one forward pass each. A pass has
    at most max_tokens tokens; of these at most 1/16 of max_tokens are padding; and its rows, each
    with `cached` tokens before it, have at most kv_tokens. One row is always allowed.

    >>> list(micro_batches([60, 58, 20, 20, 19], max_tokens=128))
    [slice(0, 2, None), slice(2, 5, None)]
    """
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        padding = 0
        end = start + 1
        while end < len(lengths):
            n = end + 1 - start
            padding += longest - lengths[end]
            too_long = n * longest > max_tokens or n * (cached + longest) > kv_tokens
            if too_long or padding > max_tokens / 16:
                break
            end += 1
        yield slice(start, end)
        start = end


def pad_rows(rows: list[list[int]], device: torch.device, fill: int = 0) -> Tensor:
    """Rows of ids as one tensor (B, longest), padded on the right."""
    longest = max(len(row) for row in rows)
    padded = [row + [fill] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=device)


def score_rows(model: Motif, rows: list[list[int]], num_scored: list[int],
               cache: KVCache | None = None) -> list[Tensor]:
    """Log-probabilities of the last num_scored[b] ids of each row, as fp32 tensors on the CPU, by
    one forward pass. The rows continue those of the cache, if one is given."""
    device = model.head_weight.device
    inputs = [row[:-1] for row in rows]
    targets = []
    for row, n in zip(rows, num_scored):
        unscored = len(row) - 1 - n
        targets.append([-1] * unscored + row[len(row) - n:])

    row_lengths = None
    if cache is not None:
        row_lengths = torch.tensor([len(row) for row in inputs], device=device)
    targets = pad_rows(targets, device, fill=-1)
    nats = model.token_losses(pad_rows(inputs, device), targets, cache=cache,
                              row_lengths=row_lengths)
    return list((-nats[targets >= 0]).cpu().split(num_scored))


@torch.no_grad()
def loglikelihoods(model: Motif, requests: list[LoglikelihoodRequest],
                   kv_cache_tokens: int) -> Iterator[tuple[LoglikelihoodRequest, list[Tensor]]]:
    """Yield each request with the log-probabilities of the scored ids of each of its rows."""
    device = model.head_weight.device
    batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    batch_tokens = min(batch_tokens, kv_cache_tokens)

    sharing_nothing = []
    groups = defaultdict(list)
    for request in requests:
        if len(request.rows) == 1 or not request.prompt:
            sharing_nothing.append(request)
        else:
            groups[request.group].append(request)

    yield from score_without_cache(model, sharing_nothing, batch_tokens)
    for group in groups.values():
        yield from score_with_shared_prefix(model, group, batch_tokens, kv_cache_tokens // 2)


def score_without_cache(model: Motif, requests: list[LoglikelihoodRequest],
                        batch_tokens: int) -> Iterator[tuple[LoglikelihoodRequest, list[Tensor]]]:
    """loglikelihoods() of requests whose rows share nothing: whole rows are read."""
    sizes = {r: len(r.rows) * max(len(row) - 1 for row in r.rows) for r in requests}
    requests = sorted(requests, key=lambda r: -sizes[r])
    for part in micro_batches([sizes[r] for r in requests], batch_tokens):
        rows = []
        num_scored = []
        for request in requests[part]:
            rows += request.rows
            num_scored += request.num_scored

        scores = score_rows(model, rows, num_scored)
        for request in requests[part]:
            n = len(request.rows)
            yield request, scores[:n]
            scores = scores[n:]


def score_with_shared_prefix(
        model: Motif, requests: list[LoglikelihoodRequest], batch_tokens: int,
        kv_tokens: int) -> Iterator[tuple[LoglikelihoodRequest, list[Tensor]]]:
    """loglikelihoods() of a group of requests, by the three stages. batch_tokens bounds a forward
    pass, kv_tokens each of the two caches of a batch."""
    device = model.head_weight.device
    requests = sorted(requests, key=lambda r: -len(r.prompt))
    prompts = [r.prompt for r in requests]

    # Stage 1: read once what all prompts begin with. At least one token of each prompt is left for
    # stage 2, which needs its logits.
    shared = min(common_prefix_length(prompts), len(prompts[-1]) - 1)
    if len(requests) == 1 or shared < MIN_SHARED_PREFIX:
        shared = 0
    prefix_cache = KVCache(model, 1, shared)
    if shared:
        model(torch.tensor([prompts[0][:shared]], device=device), cache=prefix_cache,
              last_only=True)

    own_lengths = [len(prompt) - shared for prompt in prompts]
    for part in micro_batches(own_lengths, batch_tokens, kv_tokens, cached=shared):
        batch = requests[part]
        scores = score_batch(model, batch, prefix_cache, shared, batch_tokens, kv_tokens)
        yield from zip(batch, scores)


def score_batch(model: Motif, batch: list[LoglikelihoodRequest], prefix_cache: KVCache,
                shared: int, batch_tokens: int, kv_tokens: int) -> list[list[Tensor]]:
    """Stages 2 and 3, for requests whose first `shared` ids are in prefix_cache, the longest prompt
    first. Returns for each request the log-probabilities of each of its rows."""
    device = model.head_weight.device
    max_length = len(batch[0].prompt)

    # Stage 2: the rest of each prompt. Its last token predicts the first token of every choice.
    own_ids = [r.prompt[shared:] for r in batch]
    own_lengths = torch.tensor([len(ids) for ids in own_ids], device=device)
    cache = prefix_cache.select_rows([0] * len(batch), max_length=max_length)
    logits = model(pad_rows(own_ids, device), cache=cache, row_lengths=own_lengths,
                   last_only=True)
    first_ids = [[row[len(r.prompt)] for row in r.rows] for r in batch]
    log_p = logits[:, 0].float().log_softmax(-1)                         # (requests, V)
    first_log_p = log_p.gather(1, pad_rows(first_ids, device)).cpu()     # (requests, choices)

    # Stage 3: read the rest of each choice, where there is one, behind a copy of its prompt.
    scores = []
    remaining = []          # (request, choice, ids of the choice)
    for i, request in enumerate(batch):
        n = len(request.rows)
        scores.append(list(first_log_p[i, :n].split(1)))
        for j, row in enumerate(request.rows):
            ids = row[len(request.prompt):]
            if len(ids) > 1:
                remaining.append((i, j, ids))

    remaining.sort(key=lambda item: -len(item[2]))
    lengths = [len(ids) - 1 for _, _, ids in remaining]
    for part in micro_batches(lengths, batch_tokens, kv_tokens, cached=max_length):
        of_requests = [i for i, _, _ in remaining[part]]
        rows = [ids for _, _, ids in remaining[part]]
        longest_prompt = max(len(batch[i].prompt) for i in of_requests)
        room = min(longest_prompt + lengths[part.start], model.config.max_position_embeddings)
        copies = cache.select_rows(of_requests, max_length=room)

        log_p = score_rows(model, rows, lengths[part], cache=copies)
        for (i, j, _), rest in zip(remaining[part], log_p):
            scores[i][j] = torch.cat([scores[i][j], rest])

    # Winogrande's contexts differ at their ends, so that not all ids after the prompt are scored.
    for request, of_rows in zip(batch, scores):
        for j, n in enumerate(request.num_scored):
            of_rows[j] = of_rows[j][-n:]
    return scores


def multiple_choice(task: Task, examples: dict[int, Example], model: Motif, text: PromptEncoder,
                    c: "Config") -> Iterator[tuple[int, dict]]:
    """Score questions: {number: example} -> yields (number, record) as they are done."""
    requests = []
    for i, example in examples.items():
        contexts = example.contexts or [example.text] * len(example.choices)
        pairs = []
        for context, choice in zip(contexts, example.choices):
            prompt = example.fewshot_context + context
            if c.chat:
                pairs.append((text.encode_chat(prompt), text.encode(choice[1:])))
            else:
                pairs.append(text.encode_pair(prompt, choice))

        # Examples that are drawn at random are not common to the questions.
        group = example.fewshot_context if task.fewshot == "first" else ""
        requests.append(LoglikelihoodRequest(i, pairs, model.config.max_position_embeddings, group))

    for request, log_p in loglikelihoods(model, requests, c.kv_cache_tokens):
        example = examples[request.number]
        sums = [x.sum().item() for x in log_p]
        scores = choice_scores(sums, example.choices, example.answer)
        if not task.acc_norm:
            del scores["acc_norm"]
        yield request.number, {"prompt": example.fewshot_context + example.text, "output": sums,
                               "answer": example.answer, **scores}


# ---- generation

def generate_replies(model: Motif, text: PromptEncoder, prompts: list[list[int]], until: tuple,
                     max_new_tokens: int, kv_cache_tokens: int, temperature: float = 0.0,
                     seeds: list[int] | None = None) -> Iterator[tuple[int, str]]:
    """Continue prompts, in batches of similar length: yields (index of the prompt, reply) as
    replies end. A reply ends before the first of the strings `until`, at a token that ends a text,
    or after max_new_tokens. A prompt that leaves no room for these loses its beginning. A batch
    draws its tokens with the seed of its first prompt."""
    device = model.head_weight.device
    max_length = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, max_length // 2)
    prompts = [ids[-(max_length - max_new_tokens):] for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

    while order:
        row_tokens = len(prompts[order[0]]) + max_new_tokens
        batch_size = max(1, kv_cache_tokens // row_tokens)
        batch = order[:batch_size]
        order = order[batch_size:]

        ids = [prompts[i] for i in batch]
        prompt_lengths = torch.tensor([len(row) for row in ids], device=device)
        seed = seeds[batch[0]] if seeds else None
        decoder = Decoder(model, pad_rows(ids, device), max_new_tokens, temperature, seed=seed,
                          prompt_lengths=prompt_lengths)
        yield from decode_until_stop(decoder, batch, text, until, max_new_tokens)


def decode_until_stop(decoder: Decoder, rows: list[int], text: PromptEncoder, until: tuple,
                      max_new_tokens: int) -> Iterator[tuple[int, str]]:
    """The loop of generate_replies. rows: the index of each of the decoder's prompts."""
    replies = {i: b"" for i in rows}
    unfinished = set(rows)
    for _ in range(max_new_tokens):
        tokens = decoder.next_tokens()[:, 0].tolist()
        for i, token in zip(rows, tokens):
            if i not in unfinished:
                continue
            replies[i] += text.tokenizer.token_bytes(token)
            end = find_first(replies[i], until)
            if end is not None or token in text.end_ids:
                unfinished.remove(i)
                yield i, replies[i][:end].decode("utf-8", "replace")
        if not unfinished:
            return

        # Once half of the rows have ended, go on without them. Two rows stay at least, because
        # torch.compile would compile the step anew for a single one.
        if len(rows) > 2 and len(unfinished) <= len(rows) / 2:
            keep = sorted(range(len(rows)), key=lambda k: rows[k] not in unfinished)
            keep = keep[:max(2, len(unfinished))]
            decoder.keep_rows(keep)
            rows = [rows[k] for k in keep]

    for i in rows:
        if i in unfinished:
            yield i, replies[i].decode("utf-8", "replace")


def find_first(reply: bytes, strings: tuple) -> int | None:
    """Where the first of these strings begins; None if there is none of them.

    >>> find_first(b"one; two. three", (".", ";"))
    3
    """
    places = [reply.find(string.encode()) for string in strings]
    return min((place for place in places if place >= 0), default=None)


def generation(task: Task, examples: dict[int, Example], model: Motif, text: PromptEncoder,
               c: "Config") -> Iterator[tuple[int, dict]]:
    """Write replies and judge them: {number: example} -> yields (number, record). Replies are
    judged in threads while the model writes the next ones; a program has its own process."""
    num_samples = c.num_samples if task.program else 1
    use_chat = c.chat or task.always_chat
    shown = {}           # number -> the prompt as text, for the record
    prompts = []         # num_samples times the ids of every question
    numbers = []         # the question of each prompt
    for i, example in examples.items():
        shown[i], ids = generation_prompt(task, example, text, use_chat)
        prompts += [ids] * num_samples
        numbers += [i] * num_samples

    # Every prompt has a seed of its own, so that no two batches draw the same numbers.
    seeds = []
    for k, i in enumerate(numbers):
        seeds.append(random.Random(f"{c.seed} {i} {k}").getrandbits(32))

    # A chat model puts a program between ``` fences; chat_prompt has opened the fence already.
    unfence = bool(c.chat and task.program and not task.chat_prompt)

    def judge(i: int, replies: list[str]) -> tuple[int, dict]:
        judged = [first_fence(reply) for reply in replies] if unfence else replies
        scores = judge_replies(task, examples[i], judged)
        return i, {"prompt": shown[i], "output": replies, **scores}

    replies = {i: [] for i in examples}
    jobs = []
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, os.cpu_count() // ranks_here)) as pool:
        for k, reply in generate_replies(model, text, prompts, task.until, task.max_new_tokens,
                                         c.kv_cache_tokens, c.temperature, seeds):
            i = numbers[k]
            replies[i].append(reply)
            if len(replies[i]) == num_samples:
                jobs.append(pool.submit(judge, i, replies[i]))
            while jobs and jobs[0].done():
                yield jobs.pop(0).result()
        for job in jobs:
            yield job.result()


def generation_prompt(task: Task, example: Example, text: PromptEncoder,
                      use_chat: bool) -> tuple[str, list[int]]:
    """The prompt of a task that generates, as text and as ids."""
    question = example.fewshot_context + example.text
    reply_start = ""
    if task.chat_prompt:
        question, reply_start = task.chat_prompt(example)
    if use_chat:
        return question + reply_start, text.encode_chat(question) + text.encode(reply_start)
    if reply_start:
        question += " " + reply_start
    return question, text.begin + text.encode(question)


def first_fence(reply: str) -> str:
    """The code in the first ``` fence of a reply; the whole reply if there is no fence.

    >>> first_fence("It is:\\n```python\\nx = 1\\n```\\nand short.")
    'x = 1\\n'
    """
    return re.sub(r"(?s)^.*?```(?:python)?\n(.*?)```.*", r"\1", reply)


def judge_replies(task: Task, example: Example, replies: list[str]) -> dict:
    """The scores of the replies to a question: those of the task's metric or, where the replies are
    programs, pass@k."""
    if task.metric:
        return task.metric(example, replies[0])

    from tools.sandbox import run_program
    verdicts = [run_program(task.program(example, reply)) for reply in replies]
    scores = {"verdicts": verdicts}
    for k in (1, 10, 100):
        if k <= len(replies):
            scores[f"pass@{k}"] = pass_at_k(len(replies), verdicts.count("passed"), k)
    return scores


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k programs passes, estimated from n of which c passed:
    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1).

    >>> pass_at_k(n=4, c=2, k=2)          # of 6 pairs one has no program that passes
    0.8333333333333334
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---- bits per byte
#
# A loss per token depends on the tokenizer: longer tokens are harder to predict, and fewer. Bits
# per byte do not: the sum of -log2 p over all tokens of a text, divided by the bytes of its UTF-8.
# 8 is random bytes; 1 is what good models have on English. Since a model predicts better the more
# it has read, bits and bytes are kept apart by position: tokens 0, 1, 2-3, 4-7, 8-15, ...

def position_bucket(position: int) -> int:
    """The first position of the bucket that this one is in.

    >>> [position_bucket(i) for i in range(9)]
    [0, 1, 2, 2, 4, 4, 4, 4, 8]
    """
    return 2 ** position.bit_length() // 2


def bits_per_byte(task: Task, examples: dict[int, Example], model: Motif, text: PromptEncoder,
                  c: "Config") -> Iterator[tuple[int, dict]]:
    """Measure texts: {number: example} -> yields (number, record). A text that is longer than the
    context is cut into windows, each of which begins anew. An example with a target is a chat: the
    target is scored, with its end of turn, as the reply to the text."""
    max_length = model.config.max_position_embeddings
    requests = []
    records = {}
    for i, example in examples.items():
        records[i] = {"prompt": example.text[:80], "bits": defaultdict(float), "bytes": Counter()}
        if example.target:
            reply = text.encode(example.target) + [text.tokenizer.special[TURN_END]]
            pair = (text.encode_chat(example.text), reply)
            requests.append(LoglikelihoodRequest(i, [pair], max_length))
            continue
        begin, ids = text.encode_pair("", example.text)
        ids = begin + ids
        for start in range(0, len(ids) - 1, max_length):
            window = ids[start:start + max_length + 1]
            requests.append(LoglikelihoodRequest(i, [(window[:1], window[1:])], max_length))

    windows_left = Counter(request.number for request in requests)
    for request, (log_p,) in loglikelihoods(model, requests, c.kv_cache_tokens):
        record = records[request.number]
        scored_ids = request.rows[0][-request.num_scored[0]:]
        for position, (token, nats) in enumerate(zip(scored_ids, log_p.tolist())):
            bucket = position_bucket(position)
            record["bits"][bucket] -= nats / math.log(2)
            record["bytes"][bucket] += len(text.tokenizer.token_bytes(token))
        windows_left[request.number] -= 1
        if windows_left[request.number] == 0:
            yield request.number, record


# ---- the run: what is measured

STAGES = ("out/quickstart", "out/sft1", "out/sft2", "out/sft3")
BPB_TASKS = ["bpb:builtin:language", "bpb:builtin:code", "bpb:builtin:math",
             "bpb:builtin:science", "bpb:replies"]
BUILTIN_DOCS = 16               # held-out documents of a builtin source
BUILTIN_DOC_CHARS = 1024        # of each, its beginning


@dataclass
class Config:
    """What is evaluated, and how."""
    model: str | None = None      # a checkpoint, a run (its newest one), or owner/name of the
                                  # Hub; None: the newest of out/quickstart, sft1, sft2 and sft3
    tokenizer: str | None = None  # None: the model's own
    tasks: str = "bpb,chains"     # names in TASKS, separated by commas; bpb:SOURCE is bits per byte
                                  # of a file or another source of data.py (write a comma as %2C);
                                  # bpb all the builtin sources and replies to chains; or chat
    num_fewshot: Size | None = None   # examples before each question; None: as many as the report
    limit: Count | None = None    # questions per task, for mmlu per subject; None: all
    chat: bool = False            # ask in the turn format, as fine-tuned models expect
    run_code: bool = False        # let humaneval and mbpp run the programs that the model writes
    benchmark_dir: str | None = None  # folder with the tasks' files; None: the Hub's data sets
    out_dir: str | None = None    # None: out/eval/<the model's name>
    kv_cache_tokens: Count | None = None  # tokens whose keys and values are in memory at once;
                                  # None: as many as fit in 16 GiB (on the CPU in 1 GiB)
    temperature: NonNegative = 0.0  # for generation tasks; 0: greedy. Chat begins with 0.7
    num_samples: Count = 1        # replies to each question whose replies are programs, for pass@k
    seed: int = 1234              # for sampling
    device: str = "auto"          # cpu, cuda, cuda:1, ...; auto: CUDA where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # dtype of matmuls; auto: bf16 on CUDA
    compile: bool = True          # compile the generation step, on CUDA; takes 10 s once
    plot: bool = False            # measure every checkpoint of the run and draw scores.png
    prompt: str | None = None     # chat: answer this, and exit


# Samples of an earlier run count only if these settings, and the model, are the same.
SAMPLE_SETTINGS = ("tokenizer", "chat", "temperature", "num_samples", "seed", "precision")


def select_tasks(c: Config) -> dict[str, Task]:
    """The tasks that c.tasks names."""
    if c.num_samples > 1 and c.temperature == 0:
        raise UserError(f"num_samples={c.num_samples} would all be the same at temperature 0; give "
                        "--temperature=0.8")
    names = []
    for name in c.tasks.split(","):
        names += BPB_TASKS if name == "bpb" else [name]

    tasks = {}
    for name in names:
        if name == "chat":
            raise UserError("tasks=chat cannot be combined with others; give --tasks=chat alone")
        if name == "bpb:replies":
            tasks[name] = replace(CHAINS, kind="bits_per_byte")
        elif name.startswith("bpb:"):
            source = partial(read_texts, name.removeprefix("bpb:"), c.limit)
            tasks[name] = Task(Example, "bits_per_byte", source=source)
        elif name in TASKS:
            tasks[name] = TASKS[name]
        else:
            known = [*TASKS, "bpb", "bpb:SOURCE", "chat"]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"unknown task {name!r}; did you mean {near[0]!r}? Known: "
                            f"{', '.join(known)}")
        if tasks[name].program and not c.run_code:
            raise UserError(f"{name} runs programs that the model writes, in a sandbox; give "
                            "--run_code to allow that")
    return tasks


def read_texts(source: str, limit: int | None) -> list[str]:
    """The first documents of a source of data.py. From builtin sources, on which the quick start
    trains, the first held-out document of each unit is taken."""
    units = data.source_units(source)
    texts = []
    if source.startswith("builtin:"):
        for number, unit in enumerate(units[:BUILTIN_DOCS]):
            text = first_held_out(unit, number)
            if text:
                texts.append(text[:BUILTIN_DOC_CHARS])
        return texts[:limit]

    for unit in units:
        for text in filter(str.strip, unit()):
            if len(texts) == limit:
                return texts
            texts.append(text)
    return texts


def first_held_out(unit: Callable, number: int) -> str | None:
    """The first document of unit `number` that data.py holds out."""
    for i, text in enumerate(filter(str.strip, unit()), start=number):
        if i % data.VAL_EVERY == 0:
            return text
    return None


def read_rows(task: Task, is_fewshot: bool,
              benchmark_dir: str | None) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of the questions or of the few-shot examples of a task."""
    if task.source:
        for i, row in enumerate(task.source()):
            yield f"row {i}", row
        return

    split = task.fewshot_split if is_fewshot else task.eval_split
    file = task.fewshot_file if is_fewshot else task.eval_file
    if benchmark_dir is None:
        try:
            from datasets import load_dataset
            rows = load_dataset(task.hf_name, task.hf_config, split=split)
        except Exception as e:  # the library raises many kinds
            raise UserError(f"dataset {task.hf_name}: {one_line(e)}; or put {file} into a folder "
                            "and give --benchmark_dir") from None
        for i, row in enumerate(rows):
            yield f"{task.hf_name}, {split} row {i}", row
        return

    paths = sorted(Path(benchmark_dir).glob(file))
    if len(paths) != 1:
        without_examples = ", or give --num_fewshot=0" if is_fewshot else ""
        raise UserError(f"{len(paths)} files match {Path(benchmark_dir) / file}; put one there, "
                        f"with a JSON object on each line, a row of {task.hf_name}, {split}"
                        f"{without_examples}")
    lines = paths[0].read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{paths[0]}:{number}: not JSON: {e}; correct the line") from None
        yield f"{paths[0]}:{number}", row


def read_examples(task: Task, is_fewshot: bool, benchmark_dir: str | None) -> list[Example]:
    """The questions or the few-shot examples of a task, in the order of the data set."""
    examples = []
    for place, row in read_rows(task, is_fewshot, benchmark_dir):
        try:
            if task.accept and not task.accept(row, is_fewshot):
                continue
            example = task.read(row)
            example.row = row
            if task.program:
                task.program(example, reply="")      # so that a bad row is noticed now
        except KeyError as e:
            raise UserError(f"{place}: there is no {e}; the row has {', '.join(row)}") from None
        except (ValueError, TypeError, IndexError, AttributeError) as e:
            # A row of another form: null or a number where a text should be, too few choices, ...
            raise UserError(f"{place}: {one_line(e)}; correct the row") from None
        examples.append(example)
    return examples


def questions_of(name: str, task: Task, c: Config) -> tuple[list[Example], int]:
    """A task's questions, each with its fewshot_context, and the number of examples in that."""
    num_fewshot = task.num_fewshot
    if c.num_fewshot is not None and not task.source:
        num_fewshot = c.num_fewshot
    if num_fewshot and task.fewshot_file is None:
        raise UserError(f"num_fewshot={num_fewshot}, but {name} has no examples; give "
                        "--num_fewshot=0")

    questions = read_examples(task, False, c.benchmark_dir)
    if not questions:
        raise UserError(f"{name} has no questions; give it a file that has some")
    pool = read_examples(task, True, c.benchmark_dir) if num_fewshot else []
    add_fewshot_contexts(task, questions, pool, num_fewshot)
    return questions, num_fewshot


def add_fewshot_contexts(task: Task, questions: list[Example], pool: list[Example],
                         num_fewshot: int) -> None:
    """Put the description and num_fewshot examples of the pool before each question. They are drawn
    for all questions in order, so that they depend neither on the ranks nor on what is measured
    already. Where the questions are a validation split, the harness draws one more, and drops the
    question itself if it is among them (0.4.9.1, samplers.py)."""
    by_subject = defaultdict(list)
    for example in pool:
        by_subject[example.subject].append(example)

    num_drawn = num_fewshot
    if num_fewshot and task.eval_split == "validation":
        num_drawn += 1
    rng = random.Random(1234)
    for question in questions:
        candidates = by_subject[question.subject]
        if len(candidates) < num_drawn:
            of_subject = f" of {question.subject}" if question.subject else ""
            raise UserError(f"num_fewshot={num_fewshot}, but {task.fewshot_file} has "
                            f"{len(candidates)} examples{of_subject}, and {num_drawn} are drawn; "
                            "give a smaller --num_fewshot")
        drawn = candidates[:num_drawn]
        if task.fewshot == "random":
            drawn = rng.sample(candidates, num_drawn)
        drawn = [example for example in drawn if example.row != question.row][:num_fewshot]

        question.fewshot_context = task.description.format(question.subject.replace("_", " "))
        for example in drawn:
            question.fewshot_context += f"{example.text}{example.target}\n\n"


def limit_per_subject(questions: list[Example], limit: int | None) -> list[int]:
    """The indices of the first `limit` questions of each subject."""
    seen = Counter()
    chosen = []
    for i, question in enumerate(questions):
        seen[question.subject] += 1
        if limit is None or seen[question.subject] <= limit:
            chosen.append(i)
    return chosen


# ---- the run: samples and results

def load_previous(out: Path, settings: dict) -> tuple[dict, dict]:
    """What an earlier run with the same settings left in out: records {(task, number): record} and
    results {task: result}."""
    out.mkdir(parents=True, exist_ok=True)
    samples = out / "samples.jsonl"
    earlier = {}
    if samples.exists() and (out / "results.json").exists():
        earlier = read_json(out / "results.json")

    records = {}
    if settings.items() <= earlier.items():
        for line in samples.read_text().split("\n"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:     # the empty last line, or one that was cut
                continue
            records[record["task"], record["doc"]] = record
    elif earlier:
        print(f"{out}: another model or other settings before; its samples are dropped")
        earlier = {}
    results = earlier.get("tasks", {})
    save_results(out, settings, records, results)
    return records, results


def save_results(out: Path, settings: dict, records: dict, results: dict) -> None:
    lines = [json.dumps(records[key]) + "\n" for key in sorted(records)]
    replace_text(out / "samples.jsonl", "".join(lines))
    text = json.dumps({**settings, "tasks": results}, indent=1)
    replace_text(out / "results.json", text + "\n")


def evaluate_model(folder: Path, tasks: dict[str, tuple], out: Path, c: Config,
                   device: torch.device) -> dict:
    """Measure one model: tasks {name: (task, questions, num_fewshot)} -> {name: result}. Results of
    other tasks that out has from before stay in its results.json."""
    model, text = open_model(folder, c, device)
    if c.kv_cache_tokens is None:
        c = replace(c, kv_cache_tokens=default_kv_cache_tokens(model, device))

    changed = max(file.stat().st_mtime_ns for file in folder.glob("*.safetensors"))
    settings = {"model": str(folder), "stamp": changed}
    for key in SAMPLE_SETTINGS:
        settings[key] = getattr(c, key)
    previous = load_previous(out, settings) if RANK == 0 else None
    records, earlier_results = broadcast_object(previous)

    results = {}
    for name, (task, questions, num_fewshot) in tasks.items():
        # A compiled step pays only where many steps follow.
        model.compile_steps = c.compile and device.type == "cuda" and task.kind == "generation"
        numbers = limit_per_subject(questions, c.limit)
        measure_task(name, task, questions, numbers, records, out, model, text, c)
        results[name] = {}
        for metric, score in summarize([records[name, i] for i in numbers]).items():
            results[name][metric] = {
                **score, "shots": num_fewshot, "reported": task.reported.get(metric),
                "report_shots": task.num_fewshot}
    if RANK == 0:
        save_results(out, settings, records, {**earlier_results, **results})
    return results


def measure_task(name: str, task: Task, questions: list[Example], numbers: list[int], records: dict,
                 out: Path, model: Motif, text: PromptEncoder, c: Config) -> None:
    """Add to records those of the questions `numbers` that are not there yet. An earlier record
    counts if it was made from the same question. Each rank measures every WORLD-th of the others,
    and all ranks append to the one samples.jsonl."""
    hashes = {}
    missing = []
    for i in numbers:
        hashes[i] = hashlib.sha256(repr(questions[i]).encode()).hexdigest()[:16]
        if records.get((name, i), {}).get("hash") != hashes[i]:
            missing.append(i)
    mine = {i: questions[i] for i in missing[RANK::WORLD]}

    measures = {"multiple_choice": multiple_choice, "generation": generation,
                "bits_per_byte": bits_per_byte}
    measured = measures[task.kind](task, mine, model, text, c)
    new = {}
    # Unbuffered, so that a record is one write, and ranks do not write into each other's lines.
    with (out / "samples.jsonl").open("ab", buffering=0) as file:
        for i, record in with_progress(name, len(mine), measured):
            new[name, i] = {"task": name, "doc": i, "hash": hashes[i], **record}
            file.write(json.dumps(new[name, i]).encode() + b"\n")
    for records_of_rank in all_gather_object(new):
        records.update(records_of_rank)


def with_progress(name: str, total: int, items: Iterator) -> Iterator:
    """Pass the items on; print every five seconds how many are done and how long the rest takes."""
    start = time.monotonic()
    last_print = start
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if RANK == 0 and (now - last_print > 5 or n == total):
            last_print = now
            per_second = n / max(now - start, 1e-9)
            eta = timedelta(seconds=int((total - n) / per_second))
            print(f"{name}  {n:,d}/{total:,d} documents  {per_second:,.1f}/s  eta {eta}",
                  flush=True)


def ratio_of_sums(values: list[float], sizes: list[float]) -> dict:
    """sum(values) / sum(sizes) with its standard error: the deviations are those of each value from
    ratio * size. With sizes of 1 these are the mean, and s / sqrt(n).

    >>> ratio_of_sums([1, 0, 1, 1], [1, 1, 1, 1])
    {'value': 0.75, 'stderr': 0.25, 'n': 4}
    """
    n = len(values)
    ratio = sum(values) / sum(sizes)
    stderr = math.nan
    if n > 1:
        deviations = [value - ratio * size for value, size in zip(values, sizes)]
        stderr = statistics.stdev(deviations) / n**0.5 / statistics.fmean(sizes)
    return {"value": ratio, "stderr": stderr, "n": n}


def summarize(records: list[dict]) -> dict[str, dict]:
    """{metric: value, standard error, n} of a task's records, in per cent except bits per byte."""
    if "bits" in records[0]:
        return {"bits per byte": summarize_bits(records)}
    scores = {}
    for metric, value in records[0].items():
        if isinstance(value, float):
            values = [100 * record[metric] for record in records]
            scores[metric] = ratio_of_sums(values, [1] * len(values))
    return scores


def summarize_bits(records: list[dict]) -> dict:
    bits = Counter()         # by position
    num_bytes = Counter()
    for record in records:
        for position, x in record["bits"].items():
            bits[int(position)] += x          # a record that was read back has text for keys
        for position, x in record["bytes"].items():
            num_bytes[int(position)] += x

    score = ratio_of_sums([sum(record["bits"].values()) for record in records],
                          [sum(record["bytes"].values()) for record in records])
    score["by_position"] = {}
    for position in sorted(bits):
        if num_bytes[position]:
            score["by_position"][position] = bits[position] / num_bytes[position]
    return score


def scores_by_metric(results: dict[str, dict]) -> list[tuple[str, str, list[dict]]]:
    """Results {model: {task: {metric: score}}} -> (task, metric, the score of each model)."""
    rows = []
    of_any_model = next(iter(results.values()))
    for task, metrics in of_any_model.items():
        for metric in metrics:
            rows.append((task, metric, [of_model[task][metric] for of_model in results.values()]))
    return rows


def format_table(results: dict[str, dict]) -> str:
    """A row for each metric, with a column of scores and standard errors for each model. The last
    column is what the report states of Motif-2-12.7B, with the number of examples in brackets."""
    header = f"{'task':21s} {'shots':>5s} {'metric':13s} {'n':>6s}"
    for name in results:
        header += f"{name:>17s}"
    lines = [header + f"{'reported':>12s}"]

    for task, metric, scores in scores_by_metric(results):
        last = scores[-1]
        line = f"{task:21s} {last['shots']:5d} {metric:13s} {last['n']:6,d}"
        for score in scores:
            line += f"{score['value']:9.3f} ±{score['stderr']:6.3f}"
        reported = "-"
        if last["reported"] is not None:
            reported = f"{last['reported']:.2f} ({last['report_shots']})"
        lines.append(line + f"{reported:>12s}")

        if "by_position" in last and len(results) == 1:
            columns = [f"{at}: {x:.2f}" for at, x in last["by_position"].items()]
            lines.append(" " * 27 + "from token " + "  ".join(columns))
    return "\n".join(lines)


# ---- the run: the model

def find_models(c: Config) -> dict[str, Path]:
    """{name in the table: folder} of the checkpoints to measure."""
    if c.model is None:
        found = {}
        for stage in STAGES:
            checkpoint = latest_checkpoint(Path(stage))
            if checkpoint:
                found[Path(stage).name] = checkpoint[0]
        if not found:
            raise UserError(f"there is no checkpoint in {', '.join(STAGES)}; run `python "
                            "pretrain.py`, or give --model=PATH")
        return found

    folder = model_folder(c.model)
    if not folder.is_dir():
        raise UserError(f"model={c.model} is neither a folder nor owner/name of the Hub")
    complete = {}
    for step in sorted(checkpoint_steps(folder)):
        checkpoint = folder / f"step_{step}"
        try:
            read_state(checkpoint)
        except UserError as e:
            print(f"{e}; passing it over")
            continue
        complete[checkpoint.name] = checkpoint

    if complete and c.plot:
        return complete
    if complete:
        return {"measured": list(complete.values())[-1]}
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model={c.model} holds no complete checkpoint")
    return {"measured": folder}


def open_model(folder: Path, c: Config, device: torch.device) -> tuple[Motif, PromptEncoder]:
    """The model, and the encoder of its prompts. Matrices get the compute dtype; vectors, such as
    norms, become fp32, as in training."""
    # pretrain.py begins every document with BEGIN. Other models follow their tokenizer's rule.
    trained_here = (folder / "state.json").exists()
    own_tokenizer = str(folder)
    if trained_here:
        own_tokenizer = read_state(folder)["config"]["tokenizer"]
    elif not c.tokenizer and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; give --tokenizer")
    tokenizer = load_tokenizer(c.tokenizer or own_tokenizer)
    begin_id = tokenizer.special[BEGIN] if trained_here else tokenizer.begin_id

    model = Motif.from_pretrained(folder, device).requires_grad_(False)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens, more than the "
                        f"model's vocab_size={model.config.vocab_size}; give the model's own "
                        "--tokenizer")
    for p in model.parameters():
        p.data = p.data.to(COMPUTE_DTYPE[c.precision] if p.ndim > 1 else torch.float32)

    if RANK == 0:
        n = sum(p.numel() for p in model.parameters())
        begin = "no token" if begin_id is None else tokenizer.decode([begin_id])
        print(f"{folder}: {n:,d} parameters on {device} in {c.precision}, tokenizer "
              f"{tokenizer.name}; {begin} before each text", flush=True)
    return model, PromptEncoder(tokenizer, begin_id)


def default_kv_cache_tokens(model: Motif, device: torch.device) -> int:
    """How many tokens' keys and values fit in CPU_KV_BYTES or GPU_KV_BYTES."""
    cache = KVCache(model, batch_size=1, max_length=1)
    num_slots = cache.keys[0].shape[2]
    bytes_per_slot = sum(t.nbytes for t in cache.keys + cache.values) // num_slots
    total = CPU_KV_BYTES if device.type == "cpu" else GPU_KV_BYTES
    return max(1, total // bytes_per_slot)


def run(c: Config) -> None:
    """Chat, or measure all tasks on all models and print the table."""
    device = pick_device(c)
    models = find_models(c)
    c.precision = compute_precision(c, device)
    if c.prompt is not None or c.tasks == "chat":
        if WORLD > 1:
            raise UserError("a chat needs one process; start it without torchrun")
        from tools.chat import chat, print_reply
        newest = list(models.values())[-1]
        model, text = open_model(newest, c, device)
        model.compile_steps = c.compile and device.type == "cuda"
        if c.prompt is None:
            chat(model, text, c)
        else:
            question = [{"role": "user", "content": c.prompt}]
            print_reply(question, model, text, c.temperature, c.seed)
        return

    tasks = {}
    for name, task in select_tasks(c).items():
        tasks[name] = (task, *questions_of(name, task, c))
    if RANK == 0 and any(task.program for task, *_ in tasks.values()):
        from tools.sandbox import sandbox_gaps
        gaps = sandbox_gaps()
        if gaps:
            print(f"warning: on this system the sandbox does not prevent: {gaps}", flush=True)

    results = {}
    top = Path(c.out_dir or "out/eval")
    for name, folder in models.items():
        out = top
        if len(models) > 1 or not c.out_dir:
            out = top / re.sub("[^A-Za-z0-9_.]+", "-", str(folder)).strip("-")
        results[name] = evaluate_model(folder, tasks, out, c, device)
    if RANK == 0:
        print(f"\n{format_table(results)}\nsamples and results in {top}", flush=True)
        if c.plot:
            from tools.plots import plot_scores
            plot_scores(scores_by_metric(results), list(results), top / "scores.png")


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
