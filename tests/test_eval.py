"""Evaluation. Prompts, log-likelihoods and verdicts are those of lm-evaluation-harness 0.4.13. The
tests do not need it: eval.json holds rows made up in the form of each task's data set, and what the
harness gives on them with the tiny model below (its own task files, byte tokens, begin of text
first): hashes of prompts, sums, scores, and what its filters find in replies."""
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import eval as evaluation
import model as model_module
import sft
import support.tasks
import tools.chat
from configurator import UserError
from eval import Config, LoglikelihoodRequest, PromptEncoder
from model import KVCache, Motif, MotifConfig
from support import ranks, run_folder
from support.conversations import EVAL_DOMAINS, load_conversations
from support.generation import sample_next_token
from support.ranks import run_main
from support.scores import read_record, record_line
from support.tasks import (TASKS, Example, Task, first_fence, number_in, read_chain,
                           read_questions)
from support.tokenizer import BEGIN, ROLES, TURN, TURN_END, Tokenizer, load_tokenizer

FIXTURE = json.loads((Path(__file__).parent / "eval.json").read_text())
MAX_LENGTH = 512


@pytest.fixture(scope="module")
def benchmark_dir(tmp_path_factory):
    """The fixture's rows, where --benchmark_dir finds them."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, fixture in FIXTURE.items():
        task = TASKS[name]
        write_rows(folder / task.eval_file.replace("*", ""), fixture["rows"])
        if name == "mbpp":
            write_rows(folder / task.eval_file, fixture["rows"] + fixture["pool"])
        elif task.fewshot_file:
            write_rows(folder / task.fewshot_file, fixture["pool"])
    return folder


def write_rows(file, rows):
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The folder of a tiny model whose predictions differ clearly."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Motif(MotifConfig(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=5, num_noise_heads=1, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=MAX_LENGTH, poly_norm_scale=1.0))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_dir):
    return Motif.from_pretrained(model_dir).requires_grad_(False)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = load_tokenizer("byte")
    return PromptEncoder(tokenizer, tokenizer.begin_id)


@pytest.fixture
def run(tmp_path, monkeypatch, model_dir, benchmark_dir, capsys):
    """run(key=value, ...) runs the script in an empty folder -> what it prints, and its records."""
    monkeypatch.chdir(tmp_path)

    def call(**options):
        options = {"model": model_dir, "tokenizer": "byte", "benchmark_dir": benchmark_dir,
                   "out_dir": "o", "device": "cpu", **options}
        argv = [f"--{key}={value}" for key, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        run_main(evaluation.main)
        found = records(options["out_dir"]) if options["out_dir"] else None
        return capsys.readouterr().out, found
    return call


def records(out):
    lines = (Path(out) / "samples.jsonl").read_bytes().splitlines(keepends=True)
    return [read_record(line) for line in lines]


def results(out):
    return json.loads((Path(out) / "results.json").read_text())["tasks"]


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def replace_replies(monkeypatch, replies):
    """Let the model write these replies, up to the strings that end one; returns the list of the
    prompts that it gets."""
    prompts_seen = []

    def generate_replies(model, encoder, prompts, until, *options):
        prompts_seen.extend(prompt.ids for prompt in prompts)
        cut = [reply[:evaluation.find_first(reply.encode(), until)] for reply in replies]
        return iter(list(zip(prompts, cut)))
    monkeypatch.setattr(evaluation, "generate_replies", generate_replies)
    return prompts_seen


def greedy_replies(model, encoder, prompts, until, kv_cache_tokens):
    """The replies of 24 tokens to lists of ids, by the number of the list."""
    prompts = [evaluation.Prompt(i, 0, ids, seed=0) for i, ids in enumerate(prompts)]
    found = evaluation.generate_replies(model, encoder, prompts, until, 24, kv_cache_tokens)
    return {prompt.question: reply for prompt, reply in found}


# ---- as lm-evaluation-harness has it

@pytest.mark.parametrize("name", [name for name, task in FIXTURE.items() if "sums" in task])
def test_prompts_sums_and_scores_are_those_of_the_harness(run, name):
    expected = FIXTURE[name]
    _, found = run(tasks=name, num_fewshot=expected["shots"])
    assert [short_hash(record["prompt"]) for record in found] == expected["prompts"]
    for record, sums, scores in zip(found, expected["sums"], expected["scores"], strict=True):
        assert record["output"] == pytest.approx(sums, abs=1e-3)
        assert scores.items() <= record.items()
        assert ("acc_norm" in scores) == ("acc_norm" in record)

    values = [100 * scores["acc"] for scores in expected["scores"]]
    n = len(values)
    mean = sum(values) / n
    variance = sum((x - mean)**2 for x in values) / (n - 1)
    acc = results("o")[name]["acc"]
    assert (acc["value"], acc["n"]) == (pytest.approx(mean), n)
    assert acc["stderr"] == pytest.approx((variance / n)**0.5)


RIGHT_REPLY = {
    "gsm8k": lambda row: row["answer"],
    "mbpp": lambda row: row["code"],
    "humaneval": lambda row: row["canonical_solution"],
    "humaneval_instruct": lambda row: row["canonical_solution"] + "```\nIt is short."}


@pytest.mark.parametrize("name", RIGHT_REPLY)
@pytest.mark.parametrize("right", [True, False])
def test_prompts_of_generation_and_verdicts_on_right_and_empty_replies(
        run, monkeypatch, name, right):
    expected = FIXTURE[name]
    metric = "strict" if name == "gsm8k" else "pass@1"
    replies = [RIGHT_REPLY[name](row) if right else "" for row in expected["rows"]]
    replace_replies(monkeypatch, replies)
    _, found = run(tasks=name, num_fewshot=expected["shots"], run_code="unsafe")
    assert [short_hash(record["prompt"]) for record in found] == expected["prompts"]
    assert [record[metric] for record in found] == [float(right)] * len(found)


def test_a_chat_model_s_program_is_taken_out_of_its_fence(run, monkeypatch):
    rows = FIXTURE["mbpp"]["rows"]
    replies = [f"Here:\n```python\n{row['code']}\n```\nDone." for row in rows]
    replace_replies(monkeypatch, replies)
    _, found = run(tasks="mbpp", run_code="unsafe", chat=True)
    assert [record["pass@1"] for record in found] == [1.0] * len(rows)


def test_a_chat_model_s_program_may_have_several_functions(run, monkeypatch):
    rows = FIXTURE["humaneval"]["rows"]
    replies = []
    for row in rows:
        function = row["prompt"] + row["canonical_solution"]
        program = f"import math\n\ndef first():\n    pass\n\n{function}"
        replies.append(f"Here:\n```python\n{program}\n```\nIt is short.")
    replace_replies(monkeypatch, replies)
    _, found = run(tasks="humaneval", run_code="unsafe", chat=True)
    assert [record["pass@1"] for record in found] == [1.0] * len(rows)


@pytest.mark.parametrize("opening, closing", [
    ("```py", "```"), ("```Python", "```"), ("```python3 ", "```"), ("```", "```"),
    ("``` python", "```"), ("```python\r", "```\r"), ("~~~python", "~~~"), ("````py", "````"),
    ("```python title=x.py", "```"), ("Here: ```python", "```"), ("```python", ""),
    ("```bash\npip install x\n```\n```python", "```\n```text\nso\n```"),
    ("Use ```sorted``` here:\n```python", "```"), ("Use `sorted`: ```python", "```"),
    ("```sh\na\n``` and ```python", "```"),
    ("```sh title=x\npip install x\n```\nThen:\n```python", "```")])
def test_the_fence_of_a_program_is_found(opening, closing):
    assert first_fence(f"Here:\n{opening}\nx = 1\n{closing}") == "x = 1\n"


def test_an_indented_fence_indents_its_code():
    reply = "1. So:\n   ```python\n   if x:\n       y()\n   ```\n"
    assert first_fence(reply) == "if x:\n    y()\n"
    assert first_fence("```python\n    return 2\n```") == "    return 2\n"


def test_a_reply_without_a_fence_is_a_program_as_a_whole():
    assert first_fence("x = 1\n") == "x = 1\n"


def test_the_numbers_found_in_gsm8k_replies_are_those_of_the_harness():
    for r in FIXTURE["gsm8k"]["replies"]:
        assert number_in(r["reply"], strict=True) == r["strict"], r
        assert number_in(r["reply"], strict=False) == r["flexible"], r


@pytest.mark.parametrize("name, domain, lengths", [
    ("chains", "held_chains", {2, 3, 4}), ("longer_chains", "longer_chains", {5, 6})])
def test_chains_are_asked_in_turns_and_their_answers_compared(
        run, encoder, monkeypatch, name, domain, lengths):
    chains = list(load_conversations(EVAL_DOMAINS[domain][0]))[:30]
    right = [chain[1]["content"].split("\n") for chain in chains]
    assert {len(lines) - 1 for lines in right} == lengths

    # In turn: the right reply, one whose last step is wrong, and one that ends before the answer.
    replies = []
    steps = []
    for i, lines in enumerate(right):
        variants = [lines, [*lines[:-2], "?", lines[-1] + "."], lines[:-1]]
        replies.append("\n".join(variants[i % 3]))
        steps.append(1 - [0, 2, 1][i % 3] / len(lines))
    prompts = replace_replies(monkeypatch, replies)
    printed, found = run(tasks=name, limit=30, benchmark_dir=None)

    assert prompts == [sft.encode_prompt(encoder.tokenizer, chain[:1]) for chain in chains]
    assert [record["acc"] for record in found] == [1.0, 0.0, 0.0] * 10
    assert [record["steps"] for record in found] == pytest.approx(steps)
    assert results("o")[name]["acc"]["value"] == pytest.approx(100 / 3)
    assert re.search(rf"^{name} +0 +acc +30 +\d +33.333 ± 8.754 +-$", printed, re.M)


def test_rows_of_the_local_form_are_read_like_those_of_the_hub():
    arc = FIXTURE["arc_easy"]["rows"][1]
    local = {"question": arc["question"], "choices": arc["choices"]["text"], "answer": 0}
    assert TASKS["arc_easy"].read(local) == TASKS["arc_easy"].read(arc)

    siqa = FIXTURE["siqa"]["rows"][1]
    local = {"question": f"{siqa['context']} {siqa['question']}",
             "choices": [siqa["answerA"], siqa["answerB"], siqa["answerC"]],
             "answer": int(siqa["label"]) - 1}
    assert TASKS["siqa"].read(local) == TASKS["siqa"].read(siqa)

    winogrande = FIXTURE["winogrande"]["rows"][1]
    local = {"question": winogrande["sentence"],
             "choices": [winogrande["option1"], winogrande["option2"]],
             "answer": int(winogrande["answer"]) - 1}
    assert TASKS["winogrande"].read(local) == TASKS["winogrande"].read(winogrande)

    for row in FIXTURE["hellaswag"]["rows"]:
        local = {key: value for key, value in row.items() if key not in ("ctx_a", "ctx_b")}
        assert TASKS["hellaswag"].read(local) == TASKS["hellaswag"].read(row)


# ---- the scorer, against one pass over each whole sequence

@torch.no_grad()
def plain_loglikelihood(model, context, continuation):
    ids = (context + continuation)[-(MAX_LENGTH + 1):]
    n = min(len(continuation), len(ids) - 1)
    log_p = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    scored = torch.tensor(ids[-n:])
    return log_p[-n:].gather(1, scored[:, None]).sum().item()


def random_questions():
    """(pairs, group) of questions with contexts of many lengths, some too long for the model, with
    and without beginnings common to the group; choices of many lengths."""
    rng = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randint(256, (n,), generator=rng).tolist()

    begins = {"a": draw(90), "b": draw(200), "": []}
    questions = []
    for i in range(24):
        group = ["a", "b", ""][i % 3]
        own_length = 511 if i == 7 else [5, 40, 90, 300][i % 4]
        context = begins[group] + draw(own_length)
        pairs = []
        for j in range(2 + i % 3):
            pairs.append((context, draw(1 if i % 5 == 0 else 3 + 7 * j)))
        questions.append((pairs, group))
    questions.append(([([1, 2], [3]), ([4, 2], [3])], ""))   # contexts that share nothing
    return questions


@pytest.mark.parametrize("kv_cache_tokens", [1, 2048, 10**5])
def test_scores_in_batches_are_those_of_one_sequence_at_a_time(model, monkeypatch, kv_cache_tokens):
    questions = random_questions()
    requests = [LoglikelihoodRequest(i, pairs, MAX_LENGTH, group)
                for i, (pairs, group) in enumerate(questions)]

    sizes = []
    select_rows = KVCache.select_rows

    def noted(cache, rows, max_length=None):
        sizes.append((len(rows), max_length))
        return select_rows(cache, rows, max_length)
    monkeypatch.setattr(KVCache, "select_rows", noted)

    found = dict(evaluation.loglikelihoods(model, requests, kv_cache_tokens))
    assert len(found) == len(requests)
    for request, (pairs, _) in zip(requests, questions):
        sums = [log_p.sum().item() for log_p in found[request]]
        assert sums == pytest.approx([plain_loglikelihood(model, *pair) for pair in pairs],
                                     abs=1e-3)

    # A cache of more than one row keeps to half of the budget.
    for n, length in sizes:
        assert n == 1 or n * length <= kv_cache_tokens / 2
    assert (max(sizes)[0] > 3) == (kv_cache_tokens > 1)


def test_passes_over_rows_that_share_nothing_keep_to_their_tokens(model, monkeypatch):
    """Requests of one long and of several short rows: no pass is padded to all of them."""
    sizes = []
    score_rows = evaluation.score_rows

    def noted(model, rows, num_scored, cache=None):
        sizes.append(len(rows) * (max(len(row) for row in rows) - 1))
        return score_rows(model, rows, num_scored, cache)
    monkeypatch.setattr(evaluation, "score_rows", noted)

    requests = []
    for i in range(5):
        requests.append(LoglikelihoodRequest(i, [([1], [i] * 200)], MAX_LENGTH))
        pairs = [([first], [i] * (20 + first)) for first in range(1, 9)]
        requests.append(LoglikelihoodRequest(100 + i, pairs, MAX_LENGTH))
    found = dict(evaluation.loglikelihoods(model, requests, 10**5))

    assert max(sizes) <= evaluation.CPU_BATCH_TOKENS
    assert len(sizes) <= 7
    for request in requests:
        for row, log_p in zip(request.rows, found[request], strict=True):
            assert log_p.sum().item() == pytest.approx(
                plain_loglikelihood(model, row[:1], row[1:]), abs=1e-3)


def test_equal_choices_are_equally_likely_whatever_pass_they_come_to(
        model, encoder, monkeypatch):
    def rounded(model, requests, kv_cache_tokens):
        for request in requests:
            yield request, [torch.tensor([-1.0 + 1e-6 * j]) for j in range(len(request.rows))]
    monkeypatch.setattr(evaluation, "loglikelihoods", rounded)
    example = Example("Q", choices=[" a", " b", " a"], answer=1)
    c = Config(kv_cache_tokens=1000)
    (_, record), = evaluation.measure_choices(TASKS["arc_easy"], {0: example}, model, encoder, c)
    assert record["output"][0] == record["output"][2] < record["output"][1]
    assert record["acc"] == 1.0


@pytest.fixture
def cached_tokens(monkeypatch):
    """A list to which, whenever a cache is made, the tokens are added that all living caches have
    room for."""
    living = weakref.WeakSet()
    totals = []
    init = KVCache.__init__

    def noted(cache, *options):
        init(cache, *options)
        living.add(cache)
        totals.append(sum(len(other.lengths) * other.max_length for other in living))
    monkeypatch.setattr(KVCache, "__init__", noted)
    return totals


def test_the_scorer_s_caches_keep_to_the_budget_together(model, monkeypatch, cached_tokens):
    """Ten prompts of 100 tokens fill half of the budget. Their 30 choices take several passes,
    each with copies that fill the other half."""
    monkeypatch.setattr(evaluation, "CPU_BATCH_TOKENS", 10**6)
    requests = []
    for i in range(10):
        context = [i] * 100
        pairs = [(context, [j] * 20) for j in (200, 201, 202)]
        requests.append(LoglikelihoodRequest(i, pairs, MAX_LENGTH))
    dict(evaluation.loglikelihoods(model, requests, kv_cache_tokens=2000))
    assert len(cached_tokens) > 4
    assert 1900 < max(cached_tokens) <= 2000


def test_the_caches_of_generation_keep_to_the_budget(model, encoder, cached_tokens):
    prompts = [[i] * 20 for i in range(12)]
    budget = 4 * (20 + 24)
    found = greedy_replies(model, encoder, prompts, (), budget)
    assert len(found) == 12 and len(cached_tokens) >= 3
    assert 0.9 * budget < max(cached_tokens) <= budget


def test_what_prompts_share_is_read_once(model, monkeypatch):
    """40 questions behind the same 300 ids, each with two choices of two ids."""
    tokens_read = []
    forward = Motif.hidden_states

    def counted(model, ids, *options):
        tokens_read.append(ids.numel())
        return forward(model, ids, *options)
    monkeypatch.setattr(Motif, "hidden_states", counted)

    shared = list(range(150)) * 2
    requests = []
    for i in range(40):
        context = shared + [200 + i, 7, 7, 7]
        requests.append(LoglikelihoodRequest(i, [(context, [1, 2]), (context, [3, 4])],
                                             MAX_LENGTH, "examples"))
    dict(evaluation.loglikelihoods(model, requests, 10**5))
    assert sum(tokens_read) == 300 + 40 * 4 + 40 * 2


@pytest.mark.parametrize("length", [0, MAX_LENGTH + 1])
def test_an_answer_without_tokens_or_longer_than_the_model_is_an_error(length):
    with pytest.raises(UserError, match="question 7.*512"):
        LoglikelihoodRequest(7, [([1], [2]), ([1], [3] * length)], MAX_LENGTH)


def test_an_empty_context_becomes_begin(encoder):
    assert encoder.encode_pair("a  ", "b") == ([*encoder.begin, 97], [32, 32, 98])
    assert encoder.encode_pair("", " b") == (encoder.begin, [32, 98])
    no_begin = PromptEncoder(encoder.tokenizer, begin_id=None)
    assert no_begin.encode_pair("a", "b") == ([97], [98])
    assert no_begin.encode_pair("", "b") == (encoder.begin, [98])
    assert no_begin.encode_pair(" ", "b") == (encoder.begin, [32, 98])


def save_byte_level_tokenizer(file, special):
    """A tokenizer.json with a token for each byte, and these special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(special)
    library.save(str(file))


def test_the_tokenizer_begins_a_text_unless_the_model_was_trained_here(model_dir, tmp_path):
    folder = tmp_path / "step_1"
    shutil.copytree(model_dir, folder)
    save_byte_level_tokenizer(folder / "tokenizer.json", [])

    c = Config(precision="fp32")
    cpu = torch.device("cpu")
    assert evaluation.open_model(folder, c, cpu)[1].begin == []

    state = {"files": {}, "config": {"tokenizer": str(folder)}}
    (folder / "state.json").write_text(json.dumps(state))
    encoder = evaluation.open_model(folder, c, cpu)[1]
    assert encoder.begin == [encoder.tokenizer.special[BEGIN]]


def test_bits_of_replies_are_the_loss_of_fine_tuning(model, encoder):
    chains = list(load_conversations("builtin:chains?n=3&steps=2"))
    examples = {i: read_chain(chain) for i, chain in enumerate(chains)}
    c = Config(kv_cache_tokens=600)
    found = dict(evaluation.measure_texts(None, examples, model, encoder, c))
    for i, chain in enumerate(chains):
        ids, targets = sft.encode_chat(encoder.tokenizer, chain)
        nats = model(torch.tensor([ids]), torch.tensor([targets]), reduction="sum").item()
        assert found[i]["bits"] == pytest.approx(nats / math.log(2), rel=1e-5)
        assert found[i]["bytes"] == len(chain[1]["content"])


def test_bits_per_byte_are_those_of_whole_windows(run, model, encoder, monkeypatch):
    content = "Ships sail.\n" * 90
    # The text counts, not what its tokens stand for, which may lack some letters.
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, i: b"")
    Path("own.txt").write_text(content)
    printed, (record,) = run(tasks="bpb:own.txt")
    ids = encoder.begin + list(content.encode())

    total = 0.0
    for start in (0, 512, 1024):
        window = ids[start:start + 513]
        total -= plain_loglikelihood(model, window[:1], window[1:])
    assert "bits per byte" in printed
    assert record["bits"] == pytest.approx(total / math.log(2), rel=1e-5)
    assert record["bytes"] == len(content)


def test_the_source_of_a_text_may_have_a_comma_written_as_a_code(run):
    Path("a,b.txt").write_text("Ships sail.")
    write_rows("q&a.jsonl", [{"q": "Do ships sail?", "a": "Yes."}])
    names = ["bpb:a%2Cb.txt", "bpb:q%26a.jsonl?text=q%2Ca"]
    _, (first, second) = run(tasks=",".join(names))
    assert first["prompt"] == "Ships sail."
    assert second["prompt"] == "Do ships sail?\n\nYes."
    assert list(results("o")) == names


# ---- generation, against greedy passes without a cache

@torch.no_grad()
def plain_greedy(model, prompt, max_new_tokens):
    ids = prompt[-(MAX_LENGTH - max_new_tokens):]
    new = []
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids + new]))
        new.append(logits[0, -1].argmax().item())
    return new


def cut_reply(ids, encoder, until=()):
    """The reply that these ids are: up to a token that ends it, and to the first stop string."""
    reply = b""
    for i in ids:
        if i in encoder.end_ids:
            break
        reply += encoder.tokenizer.token_bytes(i)
    for stop in until:
        reply = reply.partition(stop.encode())[0]
    return reply.decode("utf-8", "replace")


def test_replies_of_a_batch_are_those_of_one_prompt_at_a_time(model, encoder):
    prompts = [list(b"The quick brown fox"[:n]) for n in (1, 4, 9, 19)] + [list(b"zq" * 300)]
    new_ids = [plain_greedy(model, prompt, 24) for prompt in prompts]
    whole = [cut_reply(ids, encoder) for ids in new_ids]
    found = greedy_replies(model, encoder, prompts, (), 2048)
    assert found == dict(enumerate(whole))

    # Letters that fall within the replies, as strings to stop at.
    until = []
    for reply, k in zip(whole, (3, 9, 20)):
        if len(reply) > k and reply[k] != "\ufffd":
            until.append(reply[k])
    cut = [cut_reply(ids, encoder, until) for ids in new_ids]
    assert cut != whole
    found = greedy_replies(model, encoder, prompts, tuple(until), 2048)
    assert found == dict(enumerate(cut))


def test_a_run_generates_greedily_unless_a_temperature_is_given(run, model, encoder):
    chain = next(iter(load_conversations(EVAL_DOMAINS["held_chains"][0])))
    prompt = sft.encode_prompt(encoder.tokenizer, chain[:1])
    greedy = cut_reply(plain_greedy(model, prompt, 200), encoder)
    assert len(greedy) > 5
    options = {"tasks": "chains", "limit": 1, "benchmark_dir": None}
    assert run(**options)[1][0]["output"] == [greedy]
    assert run(**options, temperature=1.0)[1][0]["output"] != [greedy]


def test_what_is_sampled_for_a_question_does_not_depend_on_its_batch(model, encoder):
    """The same question in many batches, then once by itself, as another rank may have it."""
    question = Example("The fox", row={})
    task = Task(None, "generation", metric=lambda example, reply: {}, max_new_tokens=24)
    rows_per_batch = 4
    c = Config(kv_cache_tokens=rows_per_batch * (len(encoder.encode_chat("The fox")) + 24),
               temperature=1.0, chat=True)

    def sampled(examples):
        found = evaluation.measure_replies(task, examples, model, encoder, c)
        return {i: record["output"][0] for i, record in found}

    examples = {i: question for i in range(12)}
    replies = sampled(examples)
    assert len(set(replies.values())) == 12
    for chosen in (range(12), [5], [7, 2, 11]):
        assert sampled({i: question for i in chosen}) == {i: replies[i] for i in chosen}


def test_the_samples_of_a_question_are_its_own_and_keep_their_order(model, encoder, monkeypatch):
    monkeypatch.setattr(evaluation, "judge_replies", lambda *options: {})
    task = Task(None, "generation", program=print, until=("e",), max_new_tokens=24)

    def sampled(numbers, kv_cache_tokens):
        examples = {i: Example("The fox" * i) for i in numbers}
        c = Config(kv_cache_tokens=kv_cache_tokens, temperature=1.0, num_samples=5)
        found = evaluation.measure_replies(task, examples, model, encoder, c)
        return {i: record["output"] for i, record in found}

    together = sampled([1, 2, 3], 10**4)
    assert len({reply for replies in together.values() for reply in replies}) > 10
    assert sampled([3], 100) == {3: together[3]}
    assert sampled([2, 1], 100) == {1: together[1], 2: together[2]}


def test_draws_from_a_number_for_each_row_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0, -1.0]]).expand(4000, 5)
    uniform = (torch.arange(4000)[:, None] + 0.5) / 4000
    tokens = sample_next_token(logits, 0.7, None, None, uniform)
    shares = tokens.flatten().bincount(minlength=5) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=3e-4, rtol=0)
    last = sample_next_token(logits[:1], 1.0, 2, None, torch.tensor([[1 - 2**-24]]))
    assert last.item() in (1, 3)


@pytest.fixture
def judge_in_threads(monkeypatch):
    """judge_in_threads(judge, num_threads): replies are judged by this function of the example."""
    def use(judge, num_threads):
        monkeypatch.setattr(evaluation, "num_cores", lambda: num_threads)
        monkeypatch.setattr(evaluation, "judge_replies",
                            lambda task, example, replies, chat: judge(example))
    return use


def test_a_question_is_done_when_it_is_judged_though_an_earlier_one_is_not(
        model, encoder, monkeypatch, judge_in_threads):
    may_end = threading.Event()

    def judge(example):
        if example.text == "slow":
            may_end.wait(10)
        return {}
    judge_in_threads(judge, 2)
    replace_replies(monkeypatch, ["x", "y", "z"])
    examples = {0: Example("slow"), 1: Example("b"), 2: Example("c")}
    found = evaluation.measure_replies(TASKS["chains"], examples, model, encoder, Config())
    first_two = {next(found)[0], next(found)[0]}
    may_end.set()
    assert first_two == {1, 2}
    assert [i for i, _ in found] == [0]


@pytest.mark.parametrize("place", ["generate_replies", "record_line"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_the_questions_that_wait_are_not_judged(
        run, monkeypatch, judge_in_threads, place, error):
    judged = []

    def judge(example):
        judged.append(example)
        time.sleep(0.05)
        return {"acc": 1.0}
    judge_in_threads(judge, 1)

    def twenty_replies(model, encoder, prompts, *options):
        assert len(prompts) == 20
        yield from ((prompt, "x") for prompt in prompts)
        if place == "generate_replies":
            raise error

    def fail(record):
        raise error
    monkeypatch.setattr(evaluation, "generate_replies", twenty_replies)
    if place == "record_line":
        monkeypatch.setattr(evaluation, "record_line", fail)
    with pytest.raises(SystemExit):
        run(tasks="chains", limit=20, benchmark_dir=None)
    assert 1 <= len(judged) < 10


class ScriptedDecoder:
    """Says these texts, a byte of each row at a time, and notes how many rows there were."""

    def __init__(self, *replies):
        self.columns = zip(*replies)
        self.logits = torch.zeros(1)
        self.rows = list(range(len(replies)))
        self.num_rows = []

    def next_tokens(self):
        self.num_rows.append(len(self.rows))
        column = next(self.columns)
        return torch.tensor([[column[row]] for row in self.rows])

    def keep_rows(self, rows):
        self.rows = [self.rows[k] for k in rows]


def test_rows_that_have_ended_are_left_out(encoder):
    """Also: a string to stop at is found across tokens, and two rows stay to the end."""
    decoder = ScriptedDecoder(b"one\n\ntwo", b"Question", b"no\n\nmore", b"so zz it")
    found = evaluation.decode_until_stop(decoder, [5, 6, 7, 8], encoder, ("\n\n", "zz"), 8)
    assert dict(found) == {5: "one", 6: "Question", 7: "no", 8: "so "}
    assert decoder.num_rows == [4, 4, 4, 4, 4, 2, 2, 2]
    assert decoder.rows[0] == 1


# ---- the run

@pytest.fixture
def requests_scored(monkeypatch):
    """A list to which every request is added that the model scores."""
    scored = []
    loglikelihoods = evaluation.loglikelihoods

    def noted(model, requests, kv_cache_tokens):
        scored.extend(requests)
        return loglikelihoods(model, requests, kv_cache_tokens)
    monkeypatch.setattr(evaluation, "loglikelihoods", noted)
    return scored


def test_a_run_that_was_cut_resumes(run, requests_scored):
    _, straight = run(tasks="arc_easy,piqa", num_fewshot=1)
    samples = Path("o/samples.jsonl")
    lines = samples.read_text().splitlines(True)
    samples.write_text("".join(lines[:2]) + lines[2][:30])
    requests_scored.clear()

    _, resumed = run(tasks="arc_easy,piqa", num_fewshot=1)
    assert len(requests_scored) == len(straight) - 2
    for a, b in zip(resumed, straight, strict=True):
        assert a.pop("output") == pytest.approx(b.pop("output"), rel=1e-5)   # another batch
        assert a == b


def test_other_prompts_and_other_settings_are_measured_anew(run, requests_scored):
    _, one_shot = run(tasks="arc_easy,piqa", num_fewshot=1)
    requests_scored.clear()
    _, zero_shot = run(tasks="arc_easy", num_fewshot=0)
    assert len(requests_scored) == 3
    assert [r["hash"] for r in zero_shot[3:]] == [r["hash"] for r in one_shot[3:]]    # piqa's
    assert not {r["hash"] for r in zero_shot[:3]} & {r["hash"] for r in one_shot}
    shots = {name: result["acc"]["shots"] for name, result in results("o").items()}
    assert shots == {"arc_easy": 0, "piqa": 1}

    requests_scored.clear()
    kept = Path("o/samples.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="^o has scores with chat=False, not True; .*--out_dir"):
        run(tasks="arc_easy", chat=True)
    assert Path("o/samples.jsonl").read_bytes() == kept
    _, as_chat = run(tasks="arc_easy", chat=True, out_dir="p")
    assert len(as_chat) == len(requests_scored) == 3


SAMPLING = {"temperature": 1.0, "seed": 7}


def test_another_temperature_or_seed_leaves_what_it_does_not_decide(run, requests_scored):
    """The records and results of arc_easy stay, and those of chains are measured anew."""
    options = {"tasks": "arc_easy,chains", "num_fewshot": 0, "limit": 2}
    printed, greedy = run(**options)
    assert "anew" not in printed and len(requests_scored) == 2
    assert run(**options, seed=7)[1] == greedy            # a seed decides nothing without draws

    printed, sampled = run(**options, **SAMPLING)
    assert "\nchains: 2 records had other settings or questions, and are measured anew\n" in printed
    assert len(requests_scored) == 2 and sampled[:2] == greedy[:2]
    assert [a["output"] != b["output"] for a, b in zip(greedy[2:], sampled[2:])] == [True, True]
    run(**{**options, "tasks": "arc_easy"}, temperature=0.5)

    noted = results("o")
    assert SAMPLING.items() <= noted["chains"]["acc"].items()
    assert not {"temperature", "seed", "num_samples"} & noted["arc_easy"]["acc"].keys()
    printed, again = run(**options, **SAMPLING)
    assert again == sampled and "anew" not in printed


def test_the_number_of_samples_decides_programs_alone(run, monkeypatch):
    asked = []

    def generate_replies(model, encoder, prompts, *options):
        asked.append(len(prompts))
        return ((prompt, "x") for prompt in prompts)
    monkeypatch.setattr(evaluation, "generate_replies", generate_replies)
    monkeypatch.setattr(evaluation, "judge_replies", lambda *options: {"acc": 1.0})
    options = {"tasks": "chains,humaneval", "limit": 2, "temperature": 0.8, "run_code": "unsafe"}
    run(**options, num_samples=3)
    run(**options, num_samples=2)
    assert asked == [2, 6, 0, 4]
    assert results("o")["humaneval"]["acc"]["num_samples"] == 2
    assert "num_samples" not in results("o")["chains"]["acc"]


def test_a_folder_in_which_one_temperature_was_that_of_all_tasks_goes_on(run, requests_scored):
    """results.json had the settings of sampling at its top, and no hash had them."""
    options = {"tasks": "arc_easy,chains", "num_fewshot": 0, "limit": 2}
    _, found = run(**options)
    file = Path("o/results.json")
    earlier = {**json.loads(file.read_text()), "temperature": 1.0, "num_samples": 1, "seed": 7}
    del earlier["tasks"]["chains"]["acc"]["temperature"]
    file.write_text(json.dumps(earlier))
    lines = [record_line(record) for record in found[:2]]
    for number, question in read_questions("chains", TASKS["chains"], 0, 2, None).items():
        record = {**found[2 + number], "output": ["drawn"], "hash": short_hash(repr(question))}
        lines.append(record_line(record))
    Path("o/samples.jsonl").write_bytes(b"".join(lines))

    printed, again = run(**options)
    assert again == found and len(requests_scored) == 2
    assert "chains: 2 records had other settings" in printed
    assert "temperature" not in json.loads(file.read_text())


def test_another_model_does_not_get_the_folder_of_the_first(run, model_dir):
    """a/b and a-b have the same name in out/eval."""
    for folder in ("a/b", "a-b"):
        shutil.copytree(model_dir, folder)
    set_a_weight(Path("a-b"))
    run(model="a/b", tasks="arc_easy", out_dir=None)
    written = Path("out/eval/a-b/samples.jsonl").read_bytes()
    words = "^out/eval/a-b has the scores of /.*/a/b, not of /.*/a-b; .*--out_dir"
    with pytest.raises(SystemExit, match=words):
        run(model="a-b", tasks="arc_easy", out_dir=None)
    assert Path("out/eval/a-b/samples.jsonl").read_bytes() == written
    run(model=Path("a/b").resolve(), tasks="arc_easy", out_dir="out/eval/a-b")
    assert Path("out/eval/a-b/samples.jsonl").read_bytes() == written


def test_a_model_keeps_its_scores_when_the_next_run_starts_in_another_directory(
        run, model_dir, requests_scored, tmp_path, monkeypatch):
    """Also where results.json has the relative path that older ones have."""
    shutil.copytree(model_dir, "m")
    run(model="m", tasks="arc_easy")
    out = Path("o").resolve()
    scored = len(requests_scored)
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as context:
        context.chdir(tmp_path / "elsewhere")
        run(model="../m", tasks="arc_easy", out_dir=out)
    assert len(requests_scored) == scored

    file = Path("o/results.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": "m"}))
    run(model="m", tasks="arc_easy")
    Path("m").rename("moved")
    run(model="moved", tasks="arc_easy")
    assert len(requests_scored) == scored


def set_rope_theta(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] *= 100
    (folder / "config.json").write_text(json.dumps(config))


def set_a_weight(folder):
    model = Motif.from_pretrained(folder)
    with torch.no_grad():
        model.head_weight[0] += 1
    model.save_pretrained(folder)


def set_begin(folder):
    save_byte_level_tokenizer(folder / "tokenizer.json", [BEGIN])


@pytest.mark.parametrize("change", [set_rope_theta, set_a_weight, set_begin])
def test_another_model_in_the_same_folder_is_measured_anew(
        run, model_dir, requests_scored, change):
    shutil.copytree(model_dir, "m")
    save_byte_level_tokenizer("m/tokenizer.json", [])
    run(model="m", tokenizer=None, tasks="arc_easy")
    run(model="m", tokenizer=None, tasks="arc_easy")
    assert len(requests_scored) == 3

    change(Path("m"))
    run(model="m", tokenizer=None, tasks="arc_easy")
    assert len(requests_scored) == 6


def test_two_runs_do_not_share_a_folder(run):
    with run_folder.lock_folder(Path("o")):
        with pytest.raises(SystemExit, match="^o is in use .*--out_dir"):
            run(tasks="arc_easy")
    run(tasks="arc_easy")


def test_samples_without_results_are_kept(run):
    run(tasks="arc_easy")
    found = Path("o/samples.jsonl").read_bytes()
    Path("o/results.json").unlink()
    printed, _ = run(tasks="arc_easy", limit=1)
    assert "kept as *.old" in printed
    assert Path("o/samples.jsonl.old").read_bytes() == found


def test_a_torn_results_file_is_begun_anew(run, requests_scored):
    _, first = run(tasks="arc_easy")
    file = Path("o/results.json")
    file.write_text(file.read_text()[:50])
    printed, second = run(tasks="arc_easy")
    assert len(requests_scored) == 6 and second == first
    assert re.search(r"^o/results.json: not JSON", printed, re.M)
    assert results("o")["arc_easy"]["acc"]["n"] == 3


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"tasks": []}', "[" * 10**5, "\0"])
def test_a_results_file_of_another_form_is_begun_anew(run, requests_scored, text):
    _, first = run(tasks="arc_easy")
    settings = json.loads(Path("o/results.json").read_text())
    if text.startswith("{"):
        text = json.dumps({**settings, **json.loads(text)})
    Path("o/results.json").write_text(text)
    _, second = run(tasks="arc_easy")
    assert len(requests_scored) == 6 and second == first


@pytest.mark.parametrize("line", [
    b"[]", b"null", b'"x"', b"{}", b'{"task": "arc_easy"}', b"[" * 10**5, b"\xff\xfe",
    {"doc": "1"}, {"doc": None}, {"task": ["arc_easy"]}, {"acc": "1.0"}, {"acc": None},
    {"acc": math.nan}, {"cut": "no"}, {"output": "x"}])
def test_a_line_of_another_form_in_samples_is_measured_anew(run, requests_scored, line):
    _, first = run(tasks="arc_easy")
    if isinstance(line, dict):
        line = json.dumps({**first[1], **line}).encode()
    samples = Path("o/samples.jsonl")
    lines = samples.read_bytes().splitlines()
    samples.write_bytes(b"\n".join([lines[0], line, lines[2], line]) + b"\n")
    _, second = run(tasks="arc_easy")
    assert len(requests_scored) == 4
    assert [r["doc"] for r in second] == [0, 1, 2]
    assert [r["acc"] for r in second] == [r["acc"] for r in first]


def test_a_full_disk_is_one_line_that_names_the_folder(run):
    Path("o").mkdir()
    Path("o/samples.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="^o: .*No space left"):
        run(tasks="arc_easy")


def test_a_single_question_has_no_standard_error(run):
    printed, _ = run(tasks="arc_easy", limit=1)
    assert "NaN" not in Path("o/results.json").read_text()
    assert results("o")["arc_easy"]["acc"]["stderr"] is None
    assert re.search(r"^arc_easy +0 +acc +1 .* ± +- ", printed, re.M)


def test_texts_that_are_too_long_for_the_model_are_counted(run, monkeypatch):
    for name, length in (("short", 20), ("long", 600)):
        rows = [{"question": "x" * length, "choices": ["a", "b"], "answer": 0}]
        Path(name).mkdir()
        write_rows(f"{name}/arc_easy_test.jsonl", rows)
        write_rows(f"{name}/gsm8k_test.jsonl", [{"question": "x" * length, "answer": "#### 1"}])
        Path(f"{name}.txt").write_text("y" * length)
        printed, found = run(tasks=f"arc_easy,gsm8k,bpb:{name}.txt", benchmark_dir=name,
                             num_fewshot=0, out_dir=f"out_{name}")
        assert [record["cut"] for record in found] == [length == 600] * 3
        cut = re.findall(r"^\S+ +0 +(?:acc|strict|bits per byte) +1 +(\d) ", printed, re.M)
        assert cut == [str(int(length == 600))] * 3


def test_a_model_with_nan_is_an_error_that_names_the_tensor(run, model_dir):
    model = Motif.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = math.nan
    model.save_pretrained("nan")
    with pytest.raises(SystemExit, match="layers.1.self_attn.q_proj.weight"):
        run(model="nan", tasks="arc_easy")


@pytest.mark.parametrize("options", [
    {"tasks": "mmlu", "num_fewshot": 0}, {"tasks": "gsm8k", "num_fewshot": 0},
    {"tasks": "bpb:own.txt"}])
def test_logits_that_are_not_finite_give_no_scores(run, model_dir, options):
    Path("own.txt").write_text("Ships sail.")
    model = Motif.from_pretrained(model_dir)
    with torch.no_grad():
        model.head_weight.fill_(3e38)
    model.save_pretrained("huge")
    with pytest.raises(SystemExit, match="logits are not finite"):
        run(model="huge", **options)
    assert not records("o") and not results("o")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_stop_being_finite_within_a_reply_give_no_scores(
        run, monkeypatch, temperature):
    step = model_module.Decoder.step
    steps = []

    def overflow(decoder, new):
        steps.append(new)
        return step(decoder, new) * (math.nan if len(steps) > 2 else 1)
    monkeypatch.setattr(model_module.Decoder, "step", overflow)
    with pytest.raises(SystemExit, match="logits are not finite"):
        run(tasks="gsm8k", num_fewshot=0, temperature=temperature)
    assert not results("o")


def test_a_document_that_has_changed_is_measured_again(run):
    write_rows("own.jsonl", [{"text": "Ships sail."}, {"text": "Cranes fly."}])
    _, first = run(tasks="bpb:own.jsonl")
    write_rows("own.jsonl", [{"text": "Ships sail."}, {"text": "Cranes swim."}])
    _, second = run(tasks="bpb:own.jsonl")
    assert second[0] == first[0]
    assert second[1]["prompt"] == "Cranes swim."
    assert second[1]["bytes"] == len("Cranes swim.")


def test_stages_stand_side_by_side_and_are_measured_once(
        run, model_dir, requests_scored, monkeypatch):
    monkeypatch.setattr(support.tasks, "BUILTIN_DOCS", 1)
    for name in ("quickstart/step_2", "quickstart/step_4", "sft1/step_3"):
        folder = Path("out", name)
        shutil.copytree(model_dir, folder)
        (folder / "state.json").write_text('{"files": {}, "config": {"tokenizer": "byte"}}')
    Path("out/quickstart/step_6").mkdir()                # incomplete, hence passed over

    options = {"model": None, "tokenizer": None, "benchmark_dir": None, "limit": 1,
               "out_dir": None}
    printed, _ = run(**options)
    assert re.search(r"^task .* quickstart +sft1 +reported$", printed, re.M)
    rows = re.findall(r"^(\S+) .* ([\d.]+) ± +- +([\d.]+) ± +- +-$", printed, re.M)
    assert [name for name, _, _ in rows] == [*evaluation.BPB_TASKS, "chains", "chains"]
    assert all(a == b for _, a, b in rows)

    requests_scored.clear()
    again, _ = run(**options)
    assert not requests_scored
    assert again[again.index("\ntask"):] == printed[printed.index("\ntask"):]

    options["model"] = "out/quickstart"
    printed, _ = run(**options, tasks="bpb", plot=True)
    assert re.search(r"^task .* step_2 +step_4 +reported$", printed, re.M)
    assert Path("out/eval/scores.png").exists()


def test_a_checkpoint_that_is_damaged_is_passed_over_as_in_training(tmp_path, model_dir, capsys,
                                                                    monkeypatch):
    """step_4 has the state of another step, and step_6 has none."""
    for step in (1, 3, 4):
        folder = tmp_path / f"step_{step}"
        shutil.copytree(model_dir, folder)
        state = {"files": {}, "config": {"tokenizer": "byte"}, "step": min(step, 3)}
        (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "step_6").mkdir()

    c = Config(model=str(tmp_path))
    newest, _ = run_folder.latest_checkpoint(tmp_path)
    warnings = capsys.readouterr().out
    assert len(warnings.splitlines()) == 2
    assert evaluation.find_models(c) == {"measured": newest} == {"measured": tmp_path / "step_3"}
    assert capsys.readouterr().out == warnings

    monkeypatch.setattr(run_folder, "RANK", 1)
    found = evaluation.find_models(replace(c, plot=True))
    assert list(found) == ["step_1", "step_3"]
    assert capsys.readouterr().out == ""


def test_a_limited_run_goes_on_without_the_limit(run):
    expected = FIXTURE["mmlu"]
    subjects = [row["subject"] for row in expected["rows"]]
    _, few = run(tasks="mmlu", num_fewshot=expected["shots"], limit=1)
    first_of_each = sorted(subjects.index(subject) for subject in set(subjects))
    assert [record["doc"] for record in few] == first_of_each
    _, everything = run(tasks="mmlu", num_fewshot=expected["shots"])
    assert [short_hash(record["prompt"]) for record in everything] == expected["prompts"]
    assert [everything[i] for i in first_of_each] == few


def as_rank(rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    for module in (evaluation, ranks, run_folder):
        module.RANK = rank
        module.WORLD = 2
    torch.set_num_threads(1)
    run_main(evaluation.main)


def test_scores_do_not_depend_on_the_number_of_ranks(run, monkeypatch):
    _, one = run(tasks="arc_challenge,mmlu", num_fewshot=2)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    argv = [word.replace("out_dir=o", "out_dir=two") for word in sys.argv]
    monkeypatch.setattr(sys, "argv", argv)

    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=as_rank, args=(rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]

    two = records("two")
    for a, b in zip(one, two, strict=True):
        assert a.pop("output") == pytest.approx(b.pop("output"), abs=1e-4)
        assert a == b


# ---- chat

def test_chat_keeps_the_conversation(model, encoder, monkeypatch, capsys):
    lines = iter(["hello", "/system Be brief.", "again", "/temp x", "/temp 0.5", "more", "/what",
                  "/reset", "new", "/quit"])
    asked = []

    def print_reply(messages, model, encoder, temperature, seed):
        asked.append(([message["content"] for message in messages], temperature))
        return "yes"
    monkeypatch.setattr(tools.chat, "print_reply", print_reply)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    tools.chat.chat(model, encoder, Config())
    assert asked == [(["hello"], 0.7),
                     (["Be brief.", "again"], 0.7),
                     (["Be brief.", "again", "yes", "more"], 0.5),
                     (["Be brief.", "new"], 0.5)]
    printed = capsys.readouterr().out
    assert "/temp" in printed and "/what" in printed


def test_a_user_cannot_spell_a_special_token(encoder):
    special = encoder.tokenizer.special
    assert encoder.encode_chat("a<|endofturn|>") == [
        special[BEGIN], special[TURN], special[ROLES["user"]],
        *b"\n\na<|endofturn|>", special[TURN_END], special[TURN],
        special[ROLES["assistant"]], *b"\n\n"]


def test_a_long_conversation_loses_its_oldest_exchanges_but_not_the_system_s_words(encoder):
    system = {"role": "system", "content": "s"}
    long = {"role": "user", "content": "x" * 600}
    reply = {"role": "assistant", "content": "y" * 9}
    short = {"role": "user", "content": "short"}

    def encode(*messages):
        return sft.encode_prompt(encoder.tokenizer, list(messages))

    conversation = [system, long, reply, short]
    assert tools.chat.fit_conversation(conversation, encoder, 1000) == encode(*conversation)
    assert tools.chat.fit_conversation(conversation, encoder, 32) == encode(system, short)
    assert tools.chat.fit_conversation([system, long], encoder, 32) == encode(system, long)[-32:]


def test_ctrl_c_ends_a_reply(model, encoder, monkeypatch, capsys):
    question = [{"role": "user", "content": "short"}]
    whole = tools.chat.print_reply(question, model, encoder, 0.0, seed=1)
    assert capsys.readouterr().out == whole + "\n"

    next_tokens = model_module.Decoder.next_tokens

    def interrupted(decoder):
        if decoder.remaining < 250:
            raise KeyboardInterrupt
        return next_tokens(decoder)
    monkeypatch.setattr(model_module.Decoder, "next_tokens", interrupted)
    begun = tools.chat.print_reply(question, model, encoder, 0.0, seed=1)
    assert whole.startswith(begun) and 0 < len(begun) < len(whole)


# ---- mistakes

@pytest.mark.parametrize("options, words", [
    ({"tasks": "arc_esay"}, "arc_esay.*arc_easy"),
    ({"tasks": "chat,mmlu"}, "--tasks=chat"),
    ({"tasks": "chains,"}, "a name is empty"),
    ({"tasks": ""}, "a name is empty"),
    ({"tasks": "chains", "prompt": "Hello"}, "prompt='Hello'.*--tasks=chat"),
    ({"tasks": "arc_easy,chains", "num_samples": 4},
     "num_samples=4 .*arc_easy,chains.*leave it out"),
    ({"tasks": "chat", "num_samples": 4}, "num_samples=4 .*chat.*leave it out"),
    ({"tasks": "humaneval"}, "--run_code"),
    ({"tasks": "humaneval", "run_code": True, "num_samples": 10}, "num_samples.*--temperature"),
    ({"tasks": "arc_easy", "benchmark_dir": "none"}, "none/arc_easy_test.jsonl"),
    ({"tasks": "piqa,openbookqa", "num_fewshot": 5}, "piqa_train.jsonl.*--num_fewshot"),
    ({"tasks": "arc_easy,bpb:none.txt"}, "none.txt"),
    ({"tasks": "arc_easy", "tokenizer": None}, "tokenizer.json.*--tokenizer"),
    ({"model": "nowhere"}, "model=nowhere"),
    ({"model": None}, "out/quickstart.*--model"),
])
def test_a_mistake_is_one_line_and_nothing_is_scored_before(run, monkeypatch, options, words):
    monkeypatch.setattr(evaluation, "loglikelihoods", None)
    with pytest.raises(SystemExit, match=words) as e:
        run(**options)
    assert "\n" not in str(e.value)
    assert not Path("o").exists()


@pytest.mark.parametrize("row, words", [
    ("{", "arc_easy_test.jsonl:2"),
    ('{"question": "x"}', "arc_easy_test.jsonl:2.*choices"),
    ('{"question": "x", "choices": ["a", "b"], "answer": 2}', "arc_easy_test.jsonl:2"),
])
def test_a_malformed_row_is_named_by_file_and_line(run, row, words):
    Path("b").mkdir()
    first = json.dumps(FIXTURE["arc_easy"]["rows"][0])
    Path("b/arc_easy_test.jsonl").write_text(f"{first}\n{row}\n")
    with pytest.raises(SystemExit, match=words) as e:
        run(tasks="arc_easy", benchmark_dir="b")
    assert "\n" not in str(e.value)


WINOGRANDE = {"sentence": "Ann told Bo that _ won.", "option1": "Ann", "option2": "Bo"}


@pytest.mark.parametrize("task, row", [
    ("winogrande", {**WINOGRANDE, "answer": "0"}),
    ("winogrande", {**WINOGRANDE, "answer": "3"}),
    ("winogrande", {**WINOGRANDE, "answer": ""}),
    ("winogrande", {**WINOGRANDE, "answer": "1", "sentence": "It was _"}),
    ("winogrande", {**WINOGRANDE, "answer": "1", "option2": " "}),
    ("arc_easy", {"question": "x", "choices": ["a", " "], "answer": 0}),
    ("arc_easy", {"question": "x", "choices": "ab", "answer": 0}),
    ("arc_easy", {"question": "x", "choices": ["a", "b"], "answer": "0"}),
    ("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": -1}),
    ("gsm8k", {"question": "x", "answer": 4}),
    ("gsm8k", {"question": "x", "answer": "It is 4."}),
    ("arc_easy", {"question": None, "choices": ["a", "b"], "answer": 0}),
    ("arc_easy", {"question": "x", "choices": ["a", None], "answer": 0}),
    ("arc_easy", {"question": "x", "choices": ["a", "b"], "answer": 1.0}),
    ("arc_easy", {"question": "x", "choices": ["a", "b"], "answer": "B"}),
    ("mmlu", {"subject": "x", "question": "x", "choices": ["a", "b", None, "d"], "answer": 0}),
    ("mmlu", {"subject": "x", "question": "x", "choices": ["a", "b", "c"], "answer": 0}),
    ("mmlu", {"subject": 5, "question": "x", "choices": ["a", "b", "c", "d"], "answer": 0}),
    ("mbpp", {**FIXTURE["mbpp"]["rows"][0], "test_list": []}),
    ("mbpp", {**FIXTURE["mbpp"]["rows"][0], "test_list": [" "]}),
    ("mbpp", {**FIXTURE["mbpp"]["rows"][0], "test_list": "assert True"}),
    ("arc_easy", ["x"]),
])
def test_a_row_that_cannot_be_scored_is_named_by_file_and_line(run, task, row):
    Path("b").mkdir()
    file = f"b/{TASKS[task].eval_file}"
    write_rows(file, [FIXTURE[task]["rows"][0], row])
    with pytest.raises(SystemExit, match=f"{file}:2: ") as e:
        run(tasks=task, benchmark_dir="b", num_fewshot=0, run_code="unsafe")
    assert "\n" not in str(e.value)


def test_benchmark_files_may_have_a_byte_order_mark_crlf_and_blank_lines(run, benchmark_dir):
    _, plain = run(tasks="arc_easy")
    Path("b").mkdir()
    rows = (benchmark_dir / "arc_easy_test.jsonl").read_text().splitlines()
    text = "\ufeff" + "\r\n\r\n".join(rows) + "\r\n \r\n"
    Path("b/arc_easy_test.jsonl").write_bytes(text.encode())
    _, found = run(tasks="arc_easy", benchmark_dir="b", out_dir="windows")
    assert found == plain


def test_a_benchmark_file_that_is_not_utf_8_is_named_with_its_line(run):
    Path("b").mkdir()
    Path("b/arc_easy_test.jsonl").write_bytes(b'\n{"question": "\xff"}\n')
    with pytest.raises(SystemExit, match="b/arc_easy_test.jsonl:2: "):
        run(tasks="arc_easy", benchmark_dir="b")


def test_a_tokenizer_must_not_be_larger_than_the_model(run):
    Motif(MotifConfig(vocab_size=200)).save_pretrained("small")
    with pytest.raises(SystemExit, match="263.*vocab_size=200.*--tokenizer"):
        run(model="small", tasks="arc_easy")
