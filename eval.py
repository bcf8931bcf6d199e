"""Evaluation: the scores of a checkpoint. Those of benchmarks are lm-evaluation-harness 0.4.13's.

    python eval.py                                   the quick start's model and its later stages
    python eval.py --model=PATH --tasks=mmlu,gsm8k   benchmarks, beside the scores in the report of
                                                     Motif-2-12.7B (arXiv 2511.07464)
    python eval.py --model=PATH --tasks=chat         a conversation in the terminal

A task is of one of three kinds:

    multiple choice   which of the given answers does the model find likeliest?
    generation        is what the model writes right: a number, a chain of skills, a program?
    bits per byte     how well does the model predict a text?

The file goes from the idea to the machinery: how a choice is scored, then a section for each of the
three kinds, then the run. support/tasks.py has the benchmarks: where the questions of each come
from, how they are worded and how replies are judged. A run writes

    out_dir/samples.jsonl   a line per question: the prompt, the scores, and the log-likelihoods of
                            the choices, or the replies. For bits per byte it has the text's first
                            80 characters, its bits and its bytes. A run that was interrupted goes
                            on from there
    out_dir/results.json    score, standard error and number of questions of every task
"""
import difflib
import hashlib
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Literal
from urllib.parse import unquote

import torch
import torch.distributed as dist
from torch import Tensor

import configurator
import sft
from configurator import Count, NonNegative, Size, UserError, one_line
from model import Decoder, KVCache, Motif
from pretrain import COMPUTE_DTYPE, compute_precision, pick_device
from support.preparing import num_cores
from support.ranks import (RANK, WORLD, all_gather_object, check_started_by_torchrun, rank0_only,
                           run_main)
from support.run_folder import (is_out_of_memory, latest_checkpoint, lock_folder, read_state,
                                whole_checkpoints)
from support.scores import (format_table, record_line, resume_scores, save_results,
                            scores_by_metric, summarize)
from support.tasks import (CHAINS, TASKS, Example, Task, has_own_fence, judge_replies,
                           read_questions, read_texts)
from support.tokenizer import BEGIN, END, TURN_END, Tokenizer, load_tokenizer
from support.weights import model_folder

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
# largest sum *per character*. A sum gets smaller with every token, so that by sums alone a long
# answer loses against a short one:
#
#     sum                  -6.0      -5.2      -9.5                      -8.0      acc = 0
#     sum / characters     -1.50     -1.30     -0.50 (the largest)       -2.00     acc_norm = 1
#
# Two more rules of the harness decide as much as the formula:
#
#   - The white space at the end of a context belongs to the continuation, because a token may
#     begin with a space: " Paris" is often one token. So the two are encoded as one text, and the
#     ids are cut where those of the context, without that white space, end.
#   - A text that is too long for the model loses its beginning, never its end.

def choice_scores(sums: list[float], choices: list[str], answer: int) -> dict[str, float]:
    """acc and acc_norm, each 0 or 1, from the log-likelihood of every choice. The space before a
    choice does not count as one of its characters. Of equal choices the first one is the likeliest.

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
    """A tokenizer, with the special tokens that the model expects around a text.

    begin       a list of the id that begins every text but a conversation, whose format says how it
                begins; empty if the model expects none
    end_ids     the ids that end a reply

    >>> encoder = PromptEncoder(load_tokenizer("byte"), begin_id=None)
    >>> encoder.encode_pair("A: ", "B")           # the space moves into the continuation
    ([65, 58], [32, 66])
    """

    def __init__(self, tokenizer: Tokenizer, begin_id: int | None):
        self.tokenizer = tokenizer
        self.begin = [] if begin_id is None else [begin_id]
        self.end_ids = {tokenizer.special[END], tokenizer.special[TURN_END]}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of both; white space at the end of the context goes to the continuation. A model
        can only continue something, so an empty context becomes BEGIN, unless every text begins
        with some token already."""
        context_ids = self.encode(context.rstrip())
        continuation_ids = self.encode(context + continuation)[len(context_ids):]
        begin = self.begin
        if not begin and not context_ids:
            begin = [self.tokenizer.special[BEGIN]]
        return begin + context_ids, continuation_ids

    def encode_chat(self, question: str) -> list[int]:
        """The ids of a conversation that ends where the reply to this question begins."""
        return sft.encode_prompt(self.tokenizer, [{"role": "user", "content": question}])


# ---- log-likelihoods
#
# By one forward pass for each choice:
#
#     def log_likelihood(context, choice):                  # lists of ids
#         row = torch.tensor(context + choice)
#         log_p = model(row[None, :-1])[0].log_softmax(-1)  # (len(row) - 1, V)
#         log_p = log_p.gather(1, row[1:, None])            # of the id that comes next
#         return log_p[-len(choice):].sum()
#
# That computes most tokens many times: all questions of one subject of MMLU begin with the same
# examples, and all choices of a question with the same prompt. Attention is causal, so no later
# token changes a token's keys and values. Those of a common beginning are therefore computed once,
# and copied for each text that continues it. There are three stages:
#
#     1    read what all prompts of a group begin with, once. In MMLU a group is a subject, and this
#          is its examples. Other tasks draw examples for each question: there they belong to its
#          own part, and stage 1 is left out if too little is shared
#     2    read the rest of each question's *prompt*, which is what all of its rows begin with
#          (shared_ids in the code)
#     3    read each choice, but for its last token, as nothing comes after it
#
# A letter is a token that is read, "=" one whose keys and values are copied from the stage above,
# and "." is padding:
#
#                                             examples    own part  choices
#     stage 1: one row                        eeeeeeeeeeee
#
#     stage 2: a row for each question        ============pppppppp
#                                             ============qqqqq...
#
#     stage 3: a row for each choice          ====================aaaaa
#              of each question               ====================bbb..
#                                             =================cc...
#                                             =================dddd.
#
# The last token of a prompt predicts the first token of every choice. So stage 2 gives the
# log-probabilities of all first tokens, and stage 3 only those of the others:
#
#     log p(choice | context) = log p(c_1 | context)                             stage 2
#                             + sum_{t>1} log p(c_t | context, c_1 ... c_{t-1})  stage 3
#
# The choices of MMLU, " A" to " D", need no stage 3 where each is a single token, as in most
# tokenizers. (In bytes it is two.) In Winogrande each choice has a context of its own, and what is
# scored is the same text behind each. The rows share only the text before their contexts differ.
# The rest of each context is computed together with its choice, and join_scores drops its scores.
#
# Cost: 5-shot MMLU has about 600 tokens of examples and 100 of question. Row by row, a question
# would take 4 x 700 tokens. In stages it takes 100, and each subject 600 more.
#
# Memory: `kv_cache_tokens` is how many tokens may have their keys and values in memory at once.
# Half of it is for the rows of stage 2, half for those of stage 3, and at least one row each. The
# single row of stage 1, at most max_position_embeddings tokens, comes on top of it.

GPU_KV_BYTES = 16 * 2**30       # of keys and values, if --kv_cache_tokens is not given
CPU_KV_BYTES = 2**30
GPU_BATCH_TOKENS = 8192         # tokens in one forward pass of the scorer
CPU_BATCH_TOKENS = 512          # larger passes are not faster, and have more padding
MIN_SHARED_PREFIX = 32          # tokens; a shorter common beginning does not repay stage 1


class LoglikelihoodRequest:
    """One question, for the scorer.

    number              of the question among those of its task, from 0
    rows[j]             the ids of context and choice j, one after the other. Only the last
                        max_length + 1 are kept; the last one is predicted and not read
    num_scored[j]       how many ids at the end of row j are scored: those of the choice
    was_cut             whether a row lost its beginning
    shared_ids          the ids that all rows begin with, up to the first scored one
    group               requests of equal group are scored together: the few-shot text if other
                        questions have the same, else "". If the requests of a group begin with
                        fewer than MIN_SHARED_PREFIX equal ids, they skip stage 1
    """

    def __init__(self, number: int, pairs: list[tuple[list, list]], max_length: int,
                 group: str = ""):
        """pairs: (context ids, choice ids) of each choice."""
        self.number = number
        self.rows = []
        self.num_scored = []
        self.was_cut = False
        for context, choice in pairs:
            if not 1 <= len(choice) <= max_length:
                raise UserError(f"question {number}: an answer to be scored has {len(choice)} "
                                "tokens; it must have at least 1, and at most "
                                f"max_position_embeddings={max_length}; remove its row from a "
                                "file in --benchmark_dir, or the task from --tasks")
            row = context + choice
            self.was_cut = self.was_cut or len(row) > max_length + 1
            self.rows.append(row[-(max_length + 1):])
            self.num_scored.append(len(choice))

        length = common_prefix_length(self.rows)
        for row, n in zip(self.rows, self.num_scored):
            length = min(length, len(row) - n)
        self.shared_ids = self.rows[0][:length]

        # Rows that lost their beginning have lost the examples.
        self.group = "" if self.was_cut else group


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
    """Cut rows of these lengths, the longest first, into slices for one forward pass each. A slice
    ends before

        its tokens, padding included, are more than max_tokens,
        its padding is more than 1/16 of max_tokens, or
        its rows, each behind `cached` tokens, take more than kv_tokens of the KV cache.

    It has at least one row, of whatever length.

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


def stack_rows(rows: list[list[int]], device: torch.device, fill: int = 0) -> Tensor:
    """Rows of ids as one tensor (B, longest), padded on the right."""
    longest = max(len(row) for row in rows)
    padded = [row + [fill] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=device)


def score_rows(model: Motif, rows: list[list[int]], num_scored: list[int],
               cache: KVCache | None = None) -> list[Tensor]:
    """Log-probabilities of the last num_scored[b] ids of each row b, by one forward pass: fp32
    tensors (num_scored[b],) on the CPU. If a cache is given, the rows continue those in it."""
    device = model.head_weight.device
    inputs = [row[:-1] for row in rows]
    targets = []
    for row, n in zip(rows, num_scored):
        unscored = len(row) - 1 - n
        targets.append([-1] * unscored + row[-n:])

    row_lengths = None
    if cache is not None:
        row_lengths = torch.tensor([len(row) for row in inputs], device=device)
    targets = stack_rows(targets, device, fill=-1)                         # (B, T)
    losses = model.token_losses(stack_rows(inputs, device), targets, cache=cache,
                                row_lengths=row_lengths)                 # (B, T), -log p
    log_p = -losses[targets >= 0]
    return list(log_p.cpu().split(num_scored))


@torch.no_grad()
def loglikelihoods(model: Motif, requests: list[LoglikelihoodRequest],
                   kv_cache_tokens: int) -> Iterator[tuple[LoglikelihoodRequest, list[Tensor]]]:
    """Yield each request with the log-probabilities of the scored ids of each of its rows."""
    device = model.head_weight.device
    batch_tokens = GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
    batch_tokens = min(batch_tokens, kv_cache_tokens)

    without_cache = []
    groups = defaultdict(list)
    for request in requests:
        # A single row gains nothing by stages 2 and 3.
        if len(request.rows) == 1 or not request.shared_ids:
            without_cache.append(request)
        else:
            groups[request.group].append(request)

    yield from score_without_cache(model, without_cache, batch_tokens)
    for group in groups.values():
        yield from score_with_shared_prefix(model, group, batch_tokens, kv_cache_tokens // 2)


def score_without_cache(model: Motif, requests: list[LoglikelihoodRequest],
                        batch_tokens: int) -> Iterator[tuple[LoglikelihoodRequest, list[Tensor]]]:
    """loglikelihoods() of requests of one row, or without a common beginning: whole rows are
    read."""
    all_rows = []           # (request, choice, ids), the longest first
    for request in requests:
        for j, row in enumerate(request.rows):
            all_rows.append((request, j, row))
    all_rows.sort(key=lambda item: -len(item[2]))

    lengths = [len(row) - 1 for _, _, row in all_rows]
    scores = {request: {} for request in requests}
    for part in micro_batches(lengths, batch_tokens):
        rows = [row for _, _, row in all_rows[part]]
        num_scored = [request.num_scored[j] for request, j, _ in all_rows[part]]
        for (request, j, _), log_p in zip(all_rows[part], score_rows(model, rows, num_scored)):
            scores[request][j] = log_p
            if len(scores[request]) == len(request.rows):
                done = scores.pop(request)
                yield request, [done[j] for j in range(len(done))]


def score_with_shared_prefix(
        model: Motif, requests: list[LoglikelihoodRequest], batch_tokens: int,
        kv_tokens: int) -> Iterator[tuple[LoglikelihoodRequest, list[Tensor]]]:
    """loglikelihoods() of a group of requests, by the three stages. batch_tokens bounds a forward
    pass of stages 2 and 3, kv_tokens the cache of each."""
    device = model.head_weight.device
    requests = sorted(requests, key=lambda r: -len(r.shared_ids))
    prompts = [r.shared_ids for r in requests]

    # Stage 1: read once what all prompts begin with. At least one token of each prompt is left for
    # stage 2, which needs its logits.
    prefix_length = min(common_prefix_length(prompts), len(prompts[-1]) - 1)
    if len(requests) == 1 or prefix_length < MIN_SHARED_PREFIX:
        prefix_length = 0
    prefix_cache = KVCache(model, 1, prefix_length)
    if prefix_length:
        model(torch.tensor([prompts[0][:prefix_length]], device=device), cache=prefix_cache,
              last_only=True)

    own_lengths = [len(prompt) - prefix_length for prompt in prompts]       # the longest first
    for part in micro_batches(own_lengths, batch_tokens, kv_tokens, cached=prefix_length):
        batch = requests[part]
        cache, first_log_p = read_prompts(model, batch, prefix_cache, prefix_length)
        rest_log_p = score_rests(model, batch, cache, batch_tokens, kv_tokens)
        del cache               # before the next batch gets one
        yield from zip(batch, join_scores(batch, first_log_p, rest_log_p))


def read_prompts(model: Motif, batch: list[LoglikelihoodRequest], prefix_cache: KVCache,
                 prefix_length: int) -> tuple[KVCache, Tensor]:
    """Stage 2: read what each prompt has behind the prefix, the longest prompt first. Returns a
    cache of all prompts; and the log-probability of the id that each row has next, which the last
    token of its prompt predicts: (requests, choices)."""
    device = model.head_weight.device
    own_ids = [r.shared_ids[prefix_length:] for r in batch]
    own_lengths = torch.tensor([len(ids) for ids in own_ids], device=device)
    longest_prompt = len(batch[0].shared_ids)
    cache = prefix_cache.select_rows([0] * len(batch), max_length=longest_prompt)
    logits = model(stack_rows(own_ids, device), cache=cache, row_lengths=own_lengths,
                   last_only=True)

    # Questions may have different numbers of choices: the padding, id 0, is not read later.
    first_ids = [[row[len(r.shared_ids)] for row in r.rows] for r in batch]
    log_p = logits[:, 0].float().log_softmax(-1)                            # (requests, V)
    return cache, log_p.gather(1, stack_rows(first_ids, device)).cpu()


def score_rests(model: Motif, batch: list[LoglikelihoodRequest], cache: KVCache,
                batch_tokens: int, kv_tokens: int) -> dict[tuple[int, int], Tensor]:
    """Stage 3: read the rest of each row. It continues a copy of its prompt's keys and values.
    Returns {(request, choice): log-probabilities of these ids but the first one}, of rows that have
    more than one.

    The ids behind the prompt are those of the choice. In Winogrande, whose contexts differ, they
    are also the last words of the context."""
    behind_prompts = []             # (request, choice, ids)
    for i, request in enumerate(batch):
        for j, row in enumerate(request.rows):
            ids = row[len(request.shared_ids):]
            if len(ids) > 1:
                behind_prompts.append((i, j, ids))
    behind_prompts.sort(key=lambda item: -len(item[2]))

    # All ids but the last one are read, and all but the first one are scored: as many.
    num_rest = [len(ids) - 1 for _, _, ids in behind_prompts]
    longest_prompt = len(batch[0].shared_ids)
    scores = {}
    for part in micro_batches(num_rest, batch_tokens, kv_tokens, cached=longest_prompt):
        of_requests = [i for i, _, _ in behind_prompts[part]]
        rows = [ids for _, _, ids in behind_prompts[part]]
        # The longest prompt and the longest rest may be of two rows, and their sum longer than any
        # row is.
        max_length = min(longest_prompt + num_rest[part.start],
                         model.config.max_position_embeddings)
        copies = cache.select_rows(of_requests, max_length)

        log_p = score_rows(model, rows, num_rest[part], cache=copies)
        del copies              # before the next ones are made
        for (i, j, _), rest in zip(behind_prompts[part], log_p):
            scores[i, j] = rest
    return scores


def join_scores(batch: list[LoglikelihoodRequest], first_log_p: Tensor,
                rest_log_p: dict[tuple[int, int], Tensor]) -> list[list[Tensor]]:
    """What stages 2 and 3 have found: for each request the log-probabilities of each of its rows.
    Only the choice counts, not the last words of a context."""
    scores = []
    for i, request in enumerate(batch):
        of_rows = []
        for j, num_scored in enumerate(request.num_scored):
            log_p = first_log_p[i, j:j + 1]
            if (i, j) in rest_log_p:
                log_p = torch.cat([log_p, rest_log_p[i, j]])
            of_rows.append(log_p[-num_scored:])
        scores.append(of_rows)
    return scores


def finite_sum(log_p: Tensor) -> float:
    """The sum of log-probabilities, which must be finite."""
    total = log_p.sum().item()
    check_finite(total)
    return total


def check_finite(total: float) -> None:
    """UserError unless a sum of log-probabilities or logits is finite: NaN is neither less nor more
    than anything, and an arbitrary choice would count as the likeliest."""
    if not math.isfinite(total):
        raise UserError("the model's logits are not finite; check its weights, or give "
                        "--precision=fp32")


# ---- multiple choice

def measure_choices(task: Task, examples: dict[int, Example], model: Motif, encoder: PromptEncoder,
                    c: "Config") -> Iterator[tuple[int, dict]]:
    """Score questions of multiple choice: {number: example} -> yields (number, record) as they are
    done."""
    requests = []
    for i, example in examples.items():
        contexts = example.contexts or [example.text] * len(example.choices)
        pairs = []
        for context, choice in zip(contexts, example.choices):
            prompt = example.fewshot_context + context
            if uses_chat(task, c):
                # A choice begins with a space, which a reply does not.
                pairs.append((encoder.encode_chat(prompt), encoder.encode(choice[1:])))
            else:
                pairs.append(encoder.encode_pair(prompt, choice))

        # Questions share their few-shot examples only if these are not drawn for each at random.
        group = example.fewshot_context if task.fewshot == "first" else ""
        requests.append(LoglikelihoodRequest(i, pairs, model.config.max_position_embeddings, group))

    for request, log_p in loglikelihoods(model, requests, c.kv_cache_tokens):
        example = examples[request.number]
        # Equal rows all get the first one's score: scored in different passes they would differ by
        # rounding.
        sums = [finite_sum(log_p[request.rows.index(row)]) for row in request.rows]
        scores = choice_scores(sums, example.choices, example.answer)
        if not task.acc_norm:
            del scores["acc_norm"]
        yield request.number, {"prompt": example.fewshot_context + example.text, "output": sums,
                               "answer": example.answer, "cut": request.was_cut, **scores}


# ---- generation
#
# The question is the prompt. The model continues it, and support/tasks.py judges the reply: it
# compares an answer, or runs a program in the sandbox.

@dataclass
class Prompt:
    """What the model continues for one sample of a question."""
    question: int               # the number of the question
    sample: int                 # 0, 1, ..., num_samples - 1
    ids: list[int]
    seed: int                   # of its own, whichever batch or rank it comes to


def generate_replies(model: Motif, encoder: PromptEncoder, prompts: list[Prompt], until: tuple,
                     max_new_tokens: int, kv_cache_tokens: int,
                     temperature: float = 0.0) -> Iterator[tuple[Prompt, str]]:
    """Continue prompts, in batches of similar length: yields (prompt, reply) as replies end. A
    reply ends before the first of the strings `until`, at a token that ends a text, or after
    min(max_new_tokens, max_position_embeddings / 2) tokens. A prompt loses its beginning if it is
    longer than prompt_room(). At a temperature each prompt draws with its own seed, so that the
    reply does not depend on the batch, up to rounding."""
    device = model.head_weight.device
    room = prompt_room(model, max_new_tokens)
    max_new_tokens = model.config.max_position_embeddings - room        # at most half the context
    waiting = sorted(prompts, key=lambda prompt: -min(len(prompt.ids), room))

    while waiting:
        row_tokens = min(len(waiting[0].ids), room) + max_new_tokens
        batch_size = max(1, kv_cache_tokens // row_tokens)
        batch = waiting[:batch_size]
        waiting = waiting[batch_size:]

        ids = [prompt.ids[-room:] for prompt in batch]
        prompt_lengths = torch.tensor([len(row) for row in ids], device=device)
        row_seeds = [prompt.seed for prompt in batch] if temperature > 0 else None
        decoder = Decoder(model, stack_rows(ids, device), max_new_tokens, temperature,
                          prompt_lengths=prompt_lengths, row_seeds=row_seeds)
        yield from decode_until_stop(decoder, batch, encoder, until, max_new_tokens)
        del decoder         # its cache must be gone before the next batch gets one


def prompt_room(model: Motif, max_new_tokens: int) -> int:
    """How many tokens of a prompt are read: as many as leave room for max_new_tokens, but at least
    half of the model's context."""
    max_length = model.config.max_position_embeddings
    return max_length - min(max_new_tokens, max_length // 2)


def decode_until_stop(decoder: Decoder, prompts: list[Prompt], encoder: PromptEncoder,
                      until: tuple, max_new_tokens: int) -> Iterator[tuple[Prompt, str]]:
    """The loop of generate_replies over one batch, whose prompts the decoder has read."""
    replies = [b"" for _ in prompts]
    unfinished = set(range(len(prompts)))
    rows = list(range(len(prompts)))    # the prompt of each of the decoder's rows, by its index
    for _ in range(max_new_tokens):
        tokens = decoder.next_tokens()[:, 0].tolist()
        check_finite(decoder.logits.sum(dtype=torch.float32).item())
        for i, token in zip(rows, tokens):
            if i not in unfinished:
                continue
            replies[i] += encoder.tokenizer.token_bytes(token)
            end = find_first(replies[i], until)
            if end is not None or token in encoder.end_ids:
                unfinished.remove(i)
                yield prompts[i], replies[i][:end].decode("utf-8", "replace")
        if not unfinished:
            return

        # Once half of the rows have ended, drop these. At least two rows stay, because for a single
        # one torch.compile would compile the step anew.
        if len(rows) > 2 and len(unfinished) <= len(rows) / 2:
            # The unfinished ones first.
            keep = sorted(range(len(rows)), key=lambda k: rows[k] not in unfinished)
            keep = keep[:max(2, len(unfinished))]
            decoder.keep_rows(keep)
            rows = [rows[k] for k in keep]

    for i in sorted(unfinished):
        yield prompts[i], replies[i].decode("utf-8", "replace")


def find_first(reply: bytes, strings: tuple) -> int | None:
    """Where the first of these strings begins; None if the reply has none of them.

    >>> find_first(b"one; two. three", (".", ";"))
    3
    """
    places = [reply.find(string.encode()) for string in strings]
    return min((place for place in places if place >= 0), default=None)


def uses_chat(task: Task, c: "Config") -> bool:
    """Whether questions are asked in the turn format: as a user's message of a conversation (the
    chat format of sft.py)."""
    return c.chat or task.always_chat


def measure_replies(task: Task, examples: dict[int, Example], model: Motif, encoder: PromptEncoder,
                    c: "Config") -> Iterator[tuple[int, dict]]:
    """Write replies and judge them: {number: example} -> yields (number, record)."""
    num_samples = c.num_samples if task.program else 1
    shown = {}                  # number -> the prompt as text, for the record
    was_cut = {}                # number -> whether the prompt loses its beginning
    prompts = []
    room = prompt_room(model, task.max_new_tokens)
    for i, example in examples.items():
        shown[i], ids = generation_prompt(task, example, encoder, uses_chat(task, c))
        was_cut[i] = len(ids) > room
        for sample in range(num_samples):
            seed = random.Random(f"{c.seed} {i} {sample}").getrandbits(32)
            prompts.append(Prompt(i, sample, ids, seed))

    def judge(i: int, replies: list[str]) -> tuple[int, dict]:
        scores = judge_replies(task, examples[i], replies, uses_chat(task, c))
        return i, {"prompt": shown[i], "output": replies, "cut": was_cut[i], **scores}

    # A chat model may write words, and then its program as ```python ... ```. It ends by itself:
    # task.until has what ends a bare program, such as a second function.
    until = () if has_own_fence(task, uses_chat(task, c)) else task.until
    replies = generate_replies(model, encoder, prompts, until, task.max_new_tokens,
                               c.kv_cache_tokens, c.temperature or 0.0)
    yield from judge_in_threads(judge, by_question(replies, num_samples))


def by_question(replies: Iterator[tuple[Prompt, str]],
                num_samples: int) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the question, its replies in order) once a question has all of them.

    >>> first, second = Prompt(7, 0, [], seed=1), Prompt(7, 1, [], seed=2)
    >>> list(by_question(iter([(second, "no"), (first, "yes")]), num_samples=2))
    [(7, ['yes', 'no'])]
    """
    questions = defaultdict(dict)                       # number -> {sample: reply}
    for prompt, reply in replies:
        samples = questions[prompt.question]
        samples[prompt.sample] = reply
        if len(samples) == num_samples:
            yield prompt.question, [samples[k] for k in range(num_samples)]
            del questions[prompt.question]


def judge_in_threads(judge: Callable, questions: Iterator[tuple]) -> Iterator:
    """Yields judge(*question) of each question, as the judgements are done. They are made in
    threads, while the model writes the next replies; a program runs in its own process."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pool = ThreadPoolExecutor(max(1, num_cores() // ranks_here))
    jobs = set()
    try:
        for question in questions:
            jobs.add(pool.submit(judge, *question))
            done = {job for job in jobs if job.done()}
            jobs -= done
            for job in done:
                yield job.result()
        for job in as_completed(jobs):
            yield job.result()
    finally:
        # After an error or Ctrl-C the jobs that still wait for a thread are not begun.
        pool.shutdown(cancel_futures=True)


def generation_prompt(task: Task, example: Example, encoder: PromptEncoder,
                      use_chat: bool) -> tuple[str, list[int]]:
    """The prompt of a task that generates, as text and as ids. A chat_prompt replaces the question
    and its few-shot examples even where the turn format is not used. (The one task with a
    chat_prompt has no examples.)"""
    question = example.fewshot_context + example.text
    reply_start = ""
    if task.chat_prompt:
        question, reply_start = task.chat_prompt(example)
    if use_chat:
        return question + reply_start, encoder.encode_chat(question) + encoder.encode(reply_start)
    question += reply_start
    return question, encoder.begin + encoder.encode(question)


# ---- bits per byte
#
#     bits per byte = - sum_t log2 p(x_t | x_1 ... x_{t-1}) / bytes of the text in UTF-8
#
# "2 + 2" has 5 bytes. In two tokens with losses of 1 and 2.47 nats it has 3.47 / 0.693 / 5 = 1 bit
# per byte, and in other tokens, of another model, the figure still compares: a loss per token would
# not. Random bytes have 8.

def measure_texts(task: Task, examples: dict[int, Example], model: Motif, encoder: PromptEncoder,
                  c: "Config") -> Iterator[tuple[int, dict]]:
    """Measure texts: {number: example} -> yields (number, record). A text that is longer than the
    model's context is cut into windows. An example with a target is a chat: what is scored is the
    target, with its end of turn, as the reply to the text."""
    max_length = model.config.max_position_embeddings
    requests = []
    for i, example in examples.items():
        if example.target:
            reply = encoder.encode(example.target) + [encoder.tokenizer.special[TURN_END]]
            pair = (encoder.encode_chat(example.text), reply)
            requests.append(LoglikelihoodRequest(i, [pair], max_length))
            continue
        begin, ids = encoder.encode_pair("", example.text)
        for window in cut_into_windows(begin + ids, max_length):
            requests.append(LoglikelihoodRequest(i, [(window[:1], window[1:])], max_length))

    num_windows = Counter(request.number for request in requests)
    windows_left = num_windows.copy()
    bits = Counter()
    for request, (log_p,) in loglikelihoods(model, requests, c.kv_cache_tokens):
        i = request.number
        bits[i] -= finite_sum(log_p.double()) / math.log(2)
        windows_left[i] -= 1
        if windows_left[i] == 0:
            # Of the text, not of its tokens: a tokenizer may leave out, or change, some letters.
            measured = examples[i].target or examples[i].text
            yield i, {"prompt": examples[i].text[:80], "bits": bits[i],
                      "bytes": len(measured.encode("utf-8", "replace")),
                      "cut": num_windows[i] > 1 or request.was_cut}


def cut_into_windows(ids: list[int], max_length: int) -> Iterator[list[int]]:
    """Windows of at most max_length + 1 ids; ids[0] is the token that begins a text. The model
    reads all of a window but the last id, and predicts all but the first. Each window begins with
    the last id of the one before, so every id behind ids[0] is predicted once. Of the windows
    before, the model sees that one id alone. With letters for ids, and ? for ids[0]:

    >>> list(cut_into_windows("?abcdefghij", max_length=4))
    ['?abcd', 'defgh', 'hij']
    """
    for start in range(0, len(ids) - 1, max_length):
        yield ids[start:start + max_length + 1]


MEASURES = {"multiple_choice": measure_choices, "generation": measure_replies,
            "bits_per_byte": measure_texts}        # Task.kind -> what measures its questions

# ---- the run: what is measured

STAGE_RUNS = ("out/quickstart", "out/sft1", "out/sft2", "out/sft3")   # measured without --model
BPB_TASKS = ["bpb:builtin:language", "bpb:builtin:code", "bpb:builtin:math",
             "bpb:builtin:science", "bpb:replies"]


@dataclass
class Config:
    """What is evaluated, and how.

    tasks: names in TASKS, separated by commas, or

        bpb:SOURCE    bits per byte of a source of support/sources.py, such as a file; of a builtin
                      one the beginnings of at most 16 held-out documents. A comma in it is written
                      %2C, and % is written %25
        bpb           of all builtin sources, and of the right replies to chains
        chat          alone: a conversation

    out_dir: without it, out/eval/NAME. NAME is the path of the checkpoint that is measured, such as
    out-sft1-step_100, with one - in place of any characters that are no letter, digit, _ or dot,
    and with -chat at its end if --chat is given. Where several models are measured, each has a
    folder of such a name, in out_dir or out/eval.
    """
    model: str | None = None      # a checkpoint, a run (its newest one), or owner/name of the
                                  # Hub; None: those of out/quickstart, sft1, sft2 and sft3
    tokenizer: str | None = None  # None: the model's own
    tasks: str = "bpb,chains"     # see above
    num_fewshot: Size | None = None   # examples before each question; None: as many as the report
    limit: Count | None = None    # questions per task, for mmlu per subject; None: all
    chat: bool = False            # ask in the turn format, as fine-tuned models expect
    run_code: bool | Literal["unsafe"] = False   # let humaneval and mbpp run the programs that the
                                  # model writes; unsafe: also where the sandbox has gaps
    benchmark_dir: str | None = None  # folder with the tasks' files; None: the Hub's data sets
    out_dir: str | None = None    # where samples and results are written; see above
    kv_cache_tokens: Count | None = None  # tokens whose keys and values are in memory at once;
                                  # None: as many as fit in 16 GiB (on the CPU in 1 GiB)
    temperature: NonNegative | None = None  # of replies; 0: greedy. None: 0, or 0.7 in a chat
                                  # without --prompt
    num_samples: Count = 1        # replies to each question whose replies are programs, for pass@k
    seed: int = 1234              # for sampling
    device: str = "auto"          # cpu; cuda, cuda:1, ...; mps, an Apple GPU, on which this was
                                  # never run; auto: CUDA, else mps, else cpu
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # dtype of matmuls; auto: bf16 on CUDA
    compile: bool = True          # compile the generation step, on CUDA; takes 10 s once
    plot: bool = False            # measure every checkpoint of the run and draw scores.png
    prompt: str | None = None     # chat: answer this, and exit


def select_tasks(c: Config) -> dict[str, Task]:
    """The tasks that c.tasks names."""
    names = []
    for name in c.tasks.split(","):
        name = name.strip()
        if not name:
            raise UserError(f"tasks={c.tasks!r}: a name is empty; write names with one comma "
                            "between them")
        names += BPB_TASKS if name == "bpb" else [name]

    tasks = {}
    for name in names:
        if name == "chat":
            raise UserError("tasks=chat cannot be combined with others; give --tasks=chat alone")
        if name == "bpb:replies":
            tasks[name] = replace(CHAINS, kind="bits_per_byte")
        elif name.startswith("bpb:"):
            source = partial(read_texts, source_of(name), c.limit)
            tasks[name] = Task(read=Example, kind="bits_per_byte", source=source)
        elif name in TASKS:
            tasks[name] = TASKS[name]
        else:
            known = [*TASKS, "bpb", "bpb:SOURCE", "chat"]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"unknown task {name!r}{hint} Known: {', '.join(known)}")
        if tasks[name].program and not c.run_code:
            raise UserError(f"{name} runs programs that the model writes, in a sandbox; give "
                            "--run_code to allow that")
    check_num_samples(c, tasks)
    return tasks


def check_num_samples(c: Config, tasks: dict[str, Task]) -> None:
    """UserError if several samples were asked for, and would not be drawn or be the same."""
    if c.num_samples == 1:
        return
    if not any(task.program for task in tasks.values()):
        raise UserError(f"num_samples={c.num_samples} is for tasks whose replies are programs, and "
                        f"{c.tasks} has none; leave it out or give --tasks=humaneval, say")
    if not c.temperature:
        raise UserError(f"num_samples={c.num_samples} would all be the same at temperature 0; give "
                        "--temperature=0.8")


def source_of(task_name: str) -> str:
    """The source of a task bpb:SOURCE. Its path, which ends at a question mark, may have letters
    as %XX. support/sources.py reads the options behind that in the same way.

    >>> source_of("bpb:books/a%2Cb.txt")
    'books/a,b.txt'
    """
    path, question_mark, options = task_name.removeprefix("bpb:").partition("?")
    return unquote(path) + question_mark + options


# ---- the run: samples and results
#
# A record is written to samples.jsonl as soon as its question is measured. A later run in the same
# folder uses a record again if nothing that decides it has changed:
#
#     the model, its tokenizer,     results.json notes them for all records. If weights or tokenizer
#     chat, precision               have changed, all is measured anew. Another folder of the model,
#                                   chat or precision is an error, which asks for another out_dir
#     the question                  The record has a hash of it, few-shot examples included
#     temperature, seed,            They decide replies alone. So they are in the hash of a question
#     num_samples                   that asks for a reply, and in results.json beside its scores
#
# The code of a task is not looked at: if you change it, give another --out_dir.

def settings_of(folder: Path, encoder: PromptEncoder, c: Config) -> dict:
    """What decides all records. The model is named by its absolute path, as the next run may be
    started in another directory. The stamp is a hash of the model: of config.json and of the
    tokenizer; and, as the weights would take long to read, of the size of their files and of the
    time when each was changed."""
    parts = [(folder / "config.json").read_bytes(), encoder.tokenizer.fingerprint(), encoder.begin]
    for file in sorted(folder.glob("*.safetensors*")):    # also the index
        parts.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    stamp = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    return {"model": os.path.abspath(folder), "stamp": stamp, "chat": c.chat,
            "precision": c.precision}


def sampling_settings(task: Task, c: Config) -> dict:
    """The settings that decide the replies to a task's questions: none if it asks for no reply, and
    no seed if nothing is drawn."""
    if task.kind != "generation":
        return {}
    settings = {"temperature": c.temperature or 0.0}
    if c.temperature:
        settings["seed"] = c.seed
    if task.program:
        settings["num_samples"] = c.num_samples
    return settings


@dataclass
class SelectedTask:
    """A task, and what this run asks of it."""
    task: Task
    questions: dict[int, Example]       # number -> question
    num_fewshot: int


def evaluate_model(folder: Path, tasks: dict[str, SelectedTask], out: Path, c: Config,
                   device: torch.device) -> dict:
    """Measure one model -> {name of the task: {metric: score}}. The results of other tasks in out's
    results.json stay there, if what decides all records is as it was."""
    model, encoder = open_model(folder, c, device)
    if c.kv_cache_tokens is None:
        c = replace(c, kv_cache_tokens=default_kv_cache_tokens(model, device))

    settings = settings_of(folder, encoder, c)
    records, earlier_results = rank0_only(resume_scores, out, settings)

    results = {}
    for name, selected in tasks.items():
        # A compiled step pays only where many steps follow.
        is_long = selected.task.kind == "generation"
        model.compile_steps = c.compile and device.type == "cuda" and is_long
        measure_task(name, selected, records, out, model, encoder, c)
        results[name] = scores_of_task(selected, [records[name, i] for i in selected.questions], c)
        # No rank may write into samples.jsonl while it is replaced.
        rank0_only(save_results, out, settings, records, {**earlier_results, **results})
    return results


def scores_of_task(selected: SelectedTask, records: list[dict], c: Config) -> dict[str, dict]:
    """{metric: score}, with what the scores were measured with, and what the report states."""
    task = selected.task
    scores = summarize(records)
    for metric, score in scores.items():
        score.update(shots=selected.num_fewshot, **sampling_settings(task, c),
                     reported=task.reported.get(metric), report_shots=task.num_fewshot)
    return scores


def measure_task(name: str, selected: SelectedTask, records: dict, out: Path, model: Motif,
                 encoder: PromptEncoder, c: Config) -> None:
    """Measure the questions that have no record yet, and add theirs to records. The ranks share the
    questions, and all of them append to the one samples.jsonl."""
    task = selected.task
    hashes = {}
    missing = []
    num_outdated = 0
    sampling = sampling_settings(task, c)
    for i, question in selected.questions.items():
        decisive = repr(question)
        if sampling:
            decisive += repr(sampling)
        if task.kind == "bits_per_byte":
            decisive += "bytes of the text"        # in records of older code, those of its tokens
        hashes[i] = hashlib.sha256(decisive.encode()).hexdigest()[:16]
        record = records.get((name, i), {})
        if record.get("hash") != hashes[i]:
            missing.append(i)
            num_outdated += bool(record)
    if num_outdated and RANK == 0:
        print(f"{name}: {num_outdated:,d} records had other settings or questions, and are "
              "measured anew", flush=True)
    mine = {i: selected.questions[i] for i in missing[RANK::WORLD]}

    measured = MEASURES[task.kind](task, mine, model, encoder, c)
    new = {}
    # Closing: if a record cannot be written, no program is run any more. Unbuffered, so that a
    # record is one write, and ranks do not write into each other's lines.
    with closing(measured), (out / "samples.jsonl").open("ab", buffering=0) as file:
        for i, record in with_progress(name, len(mine), measured):
            new[name, i] = {"task": name, "doc": i, "hash": hashes[i], **record}
            file.write(record_line(new[name, i]))
    for records_of_rank in all_gather_object(new):
        records.update(records_of_rank)


def with_progress(name: str, total: int, items: Iterator) -> Iterator:
    """Pass the items on. Every five seconds rank 0 prints how many of its own are done, and how
    long the rest takes."""
    start = time.monotonic()
    last_print = start
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if RANK == 0 and (now - last_print > 5 or n == total):
            last_print = now
            per_second = n / max(now - start, 1e-9)
            eta = timedelta(seconds=int((total - n) / per_second))
            print(f"{name}  {n:,d}/{total:,d} questions  {per_second:,.1f}/s  eta {eta}",
                  flush=True)


# ---- the run: the model

def find_models(c: Config) -> dict[str, Path]:
    """{name in the table: folder} of the checkpoints to measure."""
    if c.model is None:
        found = {}
        for run_folder in STAGE_RUNS:
            checkpoint = latest_checkpoint(Path(run_folder))
            if checkpoint:
                found[Path(run_folder).name] = checkpoint.folder
        if not found:
            raise UserError(f"there is no checkpoint in {', '.join(STAGE_RUNS)}; run `python "
                            "pretrain.py`, or give --model=PATH")
        return found

    folder = model_folder(c.model)
    if not folder.is_dir():
        raise UserError(f"model={c.model} is neither a folder nor owner/name of the Hub")
    if c.plot:
        found = {checkpoint.name: checkpoint for checkpoint, _ in whole_checkpoints(folder)}
        if found:
            return dict(reversed(found.items()))     # the oldest first
    else:
        newest = latest_checkpoint(folder)
        if newest:
            return {"measured": newest.folder}
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model={c.model} holds no complete checkpoint")
    return {"measured": folder}


def open_model(folder: Path, c: Config, device: torch.device) -> tuple[Motif, PromptEncoder]:
    """The model, and the encoder of its prompts. As in training, matrices get the compute dtype,
    and vectors such as the weights of norms are fp32."""
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
    total = GPU_KV_BYTES if device.type == "cuda" else CPU_KV_BYTES
    small_cache = KVCache(model, batch_size=1, max_length=1)
    return max(1, total // small_cache.bytes_per_token)


def run(c: Config) -> None:
    """Chat, or measure all tasks on all models and print the table."""
    device = pick_device(c)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # on which CUDA graphs are recorded
    models = find_models(c)
    c.precision = compute_precision(c, device)
    if c.prompt is not None and c.tasks != "chat":
        raise UserError(f"prompt={c.prompt!r} begins a chat, and tasks={c.tasks} is none; give "
                        "--tasks=chat, or leave the prompt out")
    if c.tasks == "chat":
        check_num_samples(c, {})
        from tools.chat import start_chat
        newest = list(models.values())[-1]
        start_chat(newest, c, device)
        return

    tasks = {}
    for name, task in select_tasks(c).items():
        num_fewshot = task.num_fewshot
        # A task that makes its own questions has no few-shot examples.
        if c.num_fewshot is not None and not task.source:
            num_fewshot = c.num_fewshot
        questions = read_questions(name, task, num_fewshot, c.limit, c.benchmark_dir)
        tasks[name] = SelectedTask(task, questions, num_fewshot)
    if any(selected.task.program for selected in tasks.values()):
        from tools.sandbox import sandbox_gaps
        gaps = sandbox_gaps()
        if gaps and c.run_code != "unsafe":
            raise UserError(f"on this system the sandbox does not prevent: {gaps}; give "
                            "--run_code=unsafe to run the programs all the same")

    results = {}
    top = Path(c.out_dir or "out/eval")
    for name, folder in models.items():
        out = top
        if len(models) > 1 or not c.out_dir:
            path = folder.resolve() if folder.name in ("", "..") else folder
            ending = "-chat" if c.chat else ""
            out = top / (re.sub("[^A-Za-z0-9_.]+", "-", str(path)).strip("-") + ending)
        with lock_folder(out):
            results[name] = evaluate_model(folder, tasks, out, c, device)
    if RANK == 0:
        where = out if len(models) == 1 else f"the folders of {top}"
        print(f"\n{format_table(results)}\nsamples and results in {where}", flush=True)
        if c.plot:
            from tools.plots import plot_scores
            plot_scores(scores_by_metric(results), list(results), top / "scores.png")


def main() -> None:
    c = configurator.load(Config, sys.argv[1:])
    if WORLD > 1:
        check_started_by_torchrun()
        dist.init_process_group("gloo")
    try:
        run(c)
    except BrokenPipeError:
        raise                       # run_main knows what to say
    except OSError as e:
        where = e.filename or c.out_dir or "out/eval"     # a full disk names no file
        raise UserError(f"{where}: {one_line(e)}") from None
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise UserError("out of memory; give less --kv_cache_tokens, 16384 for a start, or "
                        "--precision=bf16 if the weights did not fit") from None


if __name__ == "__main__":
    run_main(main)
