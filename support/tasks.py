"""The benchmarks: what a task is, where its questions come from, how the rows of each data set are
read, how replies are judged, and the table of all tasks."""
import json
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Callable, Iterator, Literal

from configurator import UserError, one_line
from support.conversations import EVAL_DOMAINS, load_conversations
from support.preparing import is_held_out
from support.sources import source_units
from synthetic.conversations import answer_of

# ---- what a task is

@dataclass
class Example:
    """A question, or a text to measure. As a few-shot example it is followed by `target`, as a
    prompt by nothing."""
    text: str
    target: str = ""
    choices: list = field(default_factory=list)   # continuations; each begins with one space
    answer: int = 0                               # index of the right one
    contexts: list | None = None  # winogrande: choice j continues contexts[j] instead of `text`
    subject: str = ""             # few-shot examples are taken from the same subject
    fewshot_context: str = ""     # what a prompt has before `text`: description and examples
    row: object = None            # the data set's row, by which a question knows itself


@dataclass(frozen=True)
class Task:
    """Where the questions are, how they are asked, and how an answer is judged."""
    read: Callable                  # a row of the data set (for bits per byte a text) -> Example
    kind: Literal["multiple_choice", "generation", "bits_per_byte"] = "multiple_choice"

    # The data set: on the Hub, or files in benchmark_dir, or rows that source() makes.
    hf_name: str | None = None
    hf_config: str | None = None
    eval_split: str | None = None
    fewshot_split: str | None = None
    eval_file: str | None = None
    fewshot_file: str | None = None
    source: Callable | None = None
    accept: Callable | None = None  # (row, is_fewshot) -> whether the row is used; None: all are

    # The prompt.
    description: str = ""           # its first line; {} is the subject
    fewshot: Literal["first", "random"] = "random"    # which examples are put before a question
    chat_prompt: Callable | None = None  # example -> what the user asks, how the reply begins
    always_chat: bool = False       # ask in the turn format even without --chat

    # The answer.
    acc_norm: bool = True           # multiple choice: report acc_norm beside acc
    until: tuple = ()               # generation: strings that end a reply
    max_new_tokens: int = 256
    metric: Callable | None = None  # generation: (example, reply) -> {metric: score, a float}, or
    program: Callable | None = None  # (example, reply) -> a program and its tests

    # What Motif-2-12.7B's report states.
    num_fewshot: int = 0
    reported: dict = field(default_factory=dict)      # metric -> per cent


# ---- the questions: rows, texts and few-shot examples

BUILTIN_DOCS = 16               # held-out documents of a builtin source
BUILTIN_DOC_CHARS = 1024        # characters of each that are measured, from its beginning


def read_questions(name: str, task: Task, num_fewshot: int, limit: int | None,
                   benchmark_dir: str | None) -> dict[int, Example]:
    """{number: question} of the first `limit` questions of each subject (None: of all), each with
    its fewshot_context. The number is the question's place among all."""
    if num_fewshot and task.fewshot_file is None:
        raise UserError(f"num_fewshot={num_fewshot}, but {name} has no examples; give "
                        "--num_fewshot=0")
    questions = read_examples(task, False, benchmark_dir)
    if not questions:
        raise UserError(f"{name} has no questions; give it a file that has some")
    pool = read_examples(task, True, benchmark_dir) if num_fewshot else []
    add_fewshot_contexts(task, questions, pool, num_fewshot)

    seen = Counter()
    chosen = {}
    for number, question in enumerate(questions):
        seen[question.subject] += 1
        if limit is None or seen[question.subject] <= limit:
            chosen[number] = question
    return chosen


def add_fewshot_contexts(task: Task, questions: list[Example], pool: list[Example],
                         num_fewshot: int) -> None:
    """Put the description and num_fewshot examples of the pool before each question. They are drawn
    for all questions in order, so that they depend neither on the ranks nor on what is measured
    already. Where the questions are a validation split, the harness draws one example more, and
    drops the question itself if that was drawn. If the question was drawn more than once, the
    harness draws anew from the other examples (0.4.13, samplers.py)."""
    by_subject = defaultdict(list)
    for example in pool:
        by_subject[example.subject].append(example)

    draws_one_more = num_fewshot > 0 and task.eval_split == "validation"
    num_drawn = num_fewshot + draws_one_more
    rng = random.Random(1234)
    for question in questions:
        candidates = by_subject[question.subject]
        if len(candidates) < num_drawn:
            of_subject = f" of {question.subject}" if question.subject else ""
            raise UserError(f"num_fewshot={num_fewshot}, but {task.fewshot_file} has "
                            f"{len(candidates)} examples{of_subject}, and {num_drawn} are drawn; "
                            "give a smaller --num_fewshot")
        is_random = task.fewshot == "random"
        drawn = rng.sample(candidates, num_drawn) if is_random else candidates[:num_drawn]
        drawn = [example for example in drawn if example.row != question.row][:num_fewshot]
        if draws_one_more and len(drawn) < num_fewshot:
            others = [example for example in candidates if example.row != question.row]
            drawn = rng.sample(others, min(num_fewshot, len(others)))

        question.fewshot_context = task.description.format(question.subject.replace("_", " "))
        for example in drawn:
            question.fewshot_context += f"{example.text}{example.target}\n\n"


def read_texts(source: str, limit: int | None) -> list[str]:
    """The first documents of a source of text (support/sources.py). Builtin sources are what the
    quick start trains on. Of each unit of these, the first document that training holds out
    counts, and of that the beginning."""
    units = source_units(source)
    if not source.startswith("builtin:"):
        documents = chain.from_iterable(unit() for unit in units)
        return list(islice(filter(str.strip, documents), limit))

    texts = []
    for unit in units[:BUILTIN_DOCS]:
        for text in filter(str.strip, unit()):
            if is_held_out(text):
                texts.append(text[:BUILTIN_DOC_CHARS])
                break
    return texts[:limit]


def read_examples(task: Task, is_fewshot: bool, benchmark_dir: str | None) -> list[Example]:
    """The questions or the few-shot examples of a task, in the order of the data set."""
    examples = []
    for place, row in read_rows(task, is_fewshot, benchmark_dir):
        try:
            if task.accept and not task.accept(row, is_fewshot):
                continue
            example = task.read(row)
            example.row = row
            judge = task.program or task.metric
            if judge:
                judge(example, "")                   # so that a bad row is noticed now
        except KeyError as e:
            has = ", ".join(row)[:300]
            raise UserError(f"{place}: there is no {e}; the row has {has}") from None
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as e:
            # A row of another form: null or a number where a text should be, too few choices, ...
            raise UserError(f"{place}: {one_line(e)}; correct the row, or {task.read.__name__}(), "
                            "which reads it") from None
        examples.append(example)
    return examples


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
            yield f"{task.hf_name}, {split} row {i}", without_nulls(row)
        return

    paths = sorted(Path(benchmark_dir).glob(file))
    if len(paths) != 1:
        without_examples = ", or give --num_fewshot=0" if is_fewshot else ""
        raise UserError(f"{len(paths)} files match {Path(benchmark_dir) / file}; put one there, "
                        f"with a JSON object on each line, a row of {task.hf_name}, {split}"
                        f"{without_examples}")
    for number, line in enumerate(paths[0].read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))       # -sig: a byte order mark is left out
        except (ValueError, RecursionError) as e:
            raise UserError(f"{paths[0]}:{number}: not JSON: {one_line(e)}; correct the "
                            "line") from None
        if not isinstance(row, dict):
            raise UserError(f"{paths[0]}:{number}: not a JSON object; correct the line")
        yield f"{paths[0]}:{number}", without_nulls(row)


def without_nulls(row: dict) -> dict:
    """null is as good as missing: "None" must not get into a prompt."""
    return {key: value for key, value in row.items() if value is not None}


# ---- the tasks: how their rows are read
#
# Every character of a prompt is part of the protocol; scores move by points if one is changed. The
# Hub's rows and rows of the simpler form {question, choices, answer} are both read.

def choices_and_answer(row: dict) -> tuple[list[str], int]:
    """The choices of a row and the index of the right one."""
    choices = row["choices"]
    if isinstance(choices, dict):
        return choices["text"], choices["label"].index(row["answerKey"].strip())
    return choices, row["answer"]


def check_choices(choices: list, answer: int) -> None:
    """UserError unless each choice has something to score, and one of them is the answer."""
    if not isinstance(choices, list) or type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"answer {answer!r} must be the number, from 0, of a choice in {choices!r}")
    for choice in choices:
        if choice is None or not str(choice).strip():
            raise UserError("a choice is empty")


def choose(text: str, choices: list[str], answer: int, subject: str = "") -> Example:
    """A question whose choices follow it after a space."""
    check_choices(choices, answer)
    continuations = [f" {choice}" for choice in choices]
    return Example(text, continuations[answer], continuations, answer, subject=subject)


# Each of these makes an Example of a row. They are named after the data sets, and each is worded as
# in the harness's task of that name.

def read_mmlu(row: dict) -> Example:
    choices, answer = choices_and_answer(row)
    check_choices(choices, answer)
    if len(choices) != 4:
        raise UserError(f"it has {len(choices)} choices, not 4")
    if not isinstance(row["subject"], str):
        raise UserError("subject must be a text")
    lines = [row["question"].strip()]
    for letter, choice in zip("ABCD", choices):
        lines.append(f"{letter}. {choice}")
    lines.append("Answer:")
    return choose("\n".join(lines), list("ABCD"), answer, row["subject"])


def read_arc(row: dict) -> Example:
    choices, answer = choices_and_answer(row)
    return choose(f"Question: {row['question']}\nAnswer:", choices, answer)


def read_openbookqa(row: dict) -> Example:
    choices, answer = choices_and_answer(row)
    return choose(row.get("question_stem") or row["question"], choices, answer)


def read_piqa(row: dict) -> Example:
    return choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def read_siqa(row: dict) -> Example:
    if "context" not in row:
        choices, answer = choices_and_answer(row)
        return choose(f"Q: {row['question']}\nA:", choices, answer)
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return choose(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)


def read_hellaswag(row: dict) -> Example:
    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    if "ctx_a" in row:
        first, second = row["ctx_a"], row["ctx_b"]
    else:
        # Only the whole context is there: it is cut after its last full sentence.
        parts = re.match(r"(?s)(.*[.!?\])'\"]) +([^.!?]+)$", row["ctx"])
        first, second = parts.groups() if parts else (row["ctx"], "")
    text = clean(f"{row['activity_label']}: {first} {second.capitalize()}")
    return choose(text, [clean(ending) for ending in row["endings"]], int(row["label"]))


def read_winogrande(row: dict) -> Example:
    """The choices fill a gap; what is scored is the text after the gap, behind each of them."""
    if "option1" in row:
        choices = [row["option1"], row["option2"]]
        answer = int(row["answer"]) - 1
    else:
        choices, answer = choices_and_answer(row)
    check_choices(choices, answer)
    sentence = row.get("sentence") or row["question"]
    gap = sentence.find("_")
    if gap < 0 or not sentence[gap + 1:].strip():
        raise UserError("the sentence needs a gap, written _, and a text after it")
    rest = " " + sentence[gap + 1:].strip()
    contexts = [sentence[:gap] + choice for choice in choices]
    return Example(contexts[answer], rest, [rest] * len(contexts), answer, contexts)


def read_gsm8k(row: dict) -> Example:
    if "#### " not in row["answer"]:
        raise ValueError("its answer has no number after ####")
    return Example(f"Question: {row['question']}\nAnswer:", f" {row['answer']}")


def number_in(reply: str, strict: bool) -> str:
    """The answer to a GSM8K question: strict is the first number after ####, else the last one.

    >>> number_in("4 * 6 = 24\\n#### 24.", strict=True), number_in("so 1,125 dollars", strict=False)
    ('24', '1125')
    """
    pattern = r"#### (\-?[0-9\.\,]+)" if strict else r"-?[$0-9.,]{2,}|-?[0-9]+"
    found = re.findall(pattern, reply) or ["[invalid]"]
    return plain_number(found[0 if strict else -1].strip())


def plain_number(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


# A reply's number is compared with the right one as the harness does it: strict takes the format of
# the few-shot examples for granted, flexible does not.

def gsm8k_scores(example: Example, reply: str) -> dict[str, float]:
    right = plain_number(example.row["answer"])
    return {"strict": float(number_in(reply, strict=True) == right),
            "flexible": float(number_in(reply, strict=False) == right)}


def read_humaneval(row: dict) -> Example:
    return Example(row["prompt"], row["canonical_solution"])


def humaneval_program(example: Example, reply: str) -> tuple[str, str]:
    """Some tests use functions that the prompt defines before the one that is asked for. They get
    these from the prompt, not from the program."""
    row = example.row
    helpers = row["prompt"].rpartition(f"def {row['entry_point']}(")[0]
    tests = "\n".join([helpers + row["test"], f"check({row['entry_point']})"])
    return row["prompt"] + reply, tests


def humaneval_chat_prompt(example: Example) -> tuple[str, str]:
    prompt = example.row["prompt"]
    return ("Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{prompt}\n```\n",
            f"Here is the completed function:\n```python\n{prompt}\n")


def humaneval_instruct_program(example: Example, reply: str) -> tuple[str, str]:
    """The reply goes on inside the fence that humaneval_chat_prompt opened, up to its end."""
    return humaneval_program(example, "\n" + reply.partition("```")[0])


def read_mbpp(row: dict) -> Example:
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(test.strip() for test in tests):
        raise ValueError(f"test_list must be a list of tests, not {tests!r}")
    first_tests = "\n".join(tests[:3])
    text = (f"You are an expert Python programmer, and here is your task: {row['text']} Your code "
            f"should pass these tests:\n\n{first_tests}\n[BEGIN]\n")
    return Example(text, f"{row['code']}\n[DONE]")


def accept_mbpp(row: dict, is_fewshot: bool) -> bool:
    """One file has the examples and the questions; the numbers tell them apart."""
    if is_fewshot:
        return 2 <= row["task_id"] <= 4
    return 11 <= row["task_id"] <= 510


def mbpp_program(example: Example, reply: str) -> tuple[str, str]:
    row = example.row
    return reply, "\n".join([row.get("test_setup_code", ""), *row["test_list"]])


def read_chain(messages: list[dict]) -> Example:
    """A chain of skills: one question that is solved in several lines (synthetic/conversations)."""
    question, reply = messages
    return Example(question["content"], reply["content"])


def chain_scores(example: Example, reply: str) -> dict[str, float]:
    """acc: the answer is the right one. steps: the share of lines before the first wrong one."""
    right_lines = example.target.split("\n")
    num_right = 0
    for line, right_line in zip(reply.split("\n"), right_lines):
        if line != right_line:
            break
        num_right += 1
    return {"acc": float(answer_of(reply) == answer_of(example.target)),
            "steps": num_right / len(right_lines)}


# ---- how replies are judged
#
# A reply is judged by the task's `metric`, or it is a program: then the sandbox runs it, and it is
# right if its tests come to their end.
#
# pass@k is the probability that at least one of k programs for a question is right. To write k
# programs and look would be a noisy estimate. So n >= k are written, --num_samples=n; if c of them
# are right,
#
#     pass@k = 1 - C(n - c, k) / C(n, k)            (arXiv 2107.03374, equation 1)
#
# where C(n - c, k) counts the ways to choose k programs that are all wrong.

def judge_replies(task: Task, example: Example, replies: list[str], chat: bool) -> dict:
    """The scores of the replies to a question: those of the metric, or pass@k."""
    if task.metric:
        return task.metric(example, replies[0])

    if has_own_fence(task, chat):
        replies = [first_fence(reply) for reply in replies]
    from tools.sandbox import run_program
    verdicts = [run_program(*task.program(example, reply)) for reply in replies]
    scores = {"verdicts": verdicts}
    for k in (1, 10, 100):
        if k <= len(replies):
            scores[f"pass@{k}"] = pass_at_k(len(replies), verdicts.count("passed"), k)
    return scores


def has_own_fence(task: Task, chat: bool) -> bool:
    """Whether a reply has its program between ``` fences, as a chat model writes it. With a
    chat_prompt the reply begins within the fence."""
    return chat and task.program is not None and task.chat_prompt is None


def first_fence(reply: str) -> str:
    """The code in the first fence of a reply, of ``` or ~~~, that is not marked as another
    language. A fence that is never closed extends to the end. Without a fence the whole reply
    counts as code.

    >>> first_fence("It is:\\n```python\\nx = 1\\n```\\nand short.")
    'x = 1\\n'
    """
    fence = None             # the open one: its signs, as "```"
    is_python = False
    code = ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", reply):
        if fence and line.lstrip(" \t").startswith(fence):
            if is_python:
                return code
            line = line.lstrip(" \t").removeprefix(fence)     # another may open behind it
            fence = None
        if fence:
            code += line.removeprefix(indent)
            continue
        opening = opening_fence(line)
        if opening:
            indent, fence, language = opening
            is_python = language.lower() in ("", "py", "python", "python3")
            code = ""
    return code if fence and is_python else reply


def opening_fence(line: str) -> tuple[str, str, str] | None:
    """(indentation, signs of the fence, language), if a fence opens at the end of a line; or None.
    Words may stand before it, and spans of code in backticks.

    >>> opening_fence("  ```py\\n"), opening_fence("Use `x`: ~~~\\n"), opening_fence("A ```b```\\n")
    (('  ', '```', 'py'), ('', '~~~', ''), None)
    """
    if not line.endswith("\n"):
        return None
    words = re.sub(r"(`+)[^`]+\1", "", line)
    found = re.search(r"```+|~~~+", words)
    if not found or "`" in words[found.end():]:
        return None
    before = words[:found.start()]
    language = words[found.end():].split()
    return ("" if before.strip() else before), found[0], language[0] if language else ""


def pass_at_k(n: int, c: int, k: int) -> float:
    """pass@k from n programs of which c passed.

    >>> pass_at_k(n=4, c=2, k=2)          # of 6 pairs one has no program that passes
    0.8333333333333334
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---- the table of tasks
#
# To add a task, write a function that makes an Example of a row, and an entry of TASKS:
#
#     def read_riddles(row: dict) -> Example:
#         return choose(f"Q: {row['question']}\nA:", row["choices"], row["answer"])
#
#     "riddles": Task(read_riddles, hf_name="me/riddles", eval_split="test",
#                     eval_file="riddles.jsonl"),
#
# A task of kind "generation" also has a `metric`, whose scores are floats, or a `program`.

# Chains of skills that fine-tuning never trains on: as many in a row as it does, or more.
SHORT_CHAINS = partial(load_conversations, EVAL_DOMAINS["held_chains"][0])
LONG_CHAINS = partial(load_conversations, EVAL_DOMAINS["longer_chains"][0])
CHAINS = Task(read_chain, "generation", source=SHORT_CHAINS, always_chat=True,
              metric=chain_scores, max_new_tokens=200)
HUMANEVAL = Task(
    read_humaneval, "generation", hf_name="openai/openai_humaneval", eval_split="test",
    eval_file="HumanEval.jsonl", program=humaneval_program, max_new_tokens=1024,
    until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), reported={"pass@1": 65.9})

TASKS = {
    "chains": CHAINS,
    "longer_chains": replace(CHAINS, source=LONG_CHAINS, max_new_tokens=300),
    "mmlu": Task(
        read_mmlu, hf_name="cais/mmlu", hf_config="all", eval_split="test", fewshot_split="dev",
        eval_file="mmlu_test.jsonl", fewshot_file="mmlu_dev.jsonl", fewshot="first",
        description="The following are multiple choice questions (with answers) about {}.\n\n",
        acc_norm=False, num_fewshot=5, reported={"acc": 78.1}),
    "gsm8k": Task(
        read_gsm8k, "generation", hf_name="openai/gsm8k", hf_config="main", eval_split="test",
        fewshot_split="train", eval_file="gsm8k_test.jsonl", fewshot_file="gsm8k_train.jsonl",
        metric=gsm8k_scores, until=("Question:", "</s>", "<|im_end|>"),
        num_fewshot=8, reported={"strict": 94.92}),
    "humaneval": HUMANEVAL,
    "humaneval_instruct": replace(
        HUMANEVAL, program=humaneval_instruct_program, chat_prompt=humaneval_chat_prompt,
        reported={"pass@1": 93.2}),
    "mbpp": Task(
        read_mbpp, "generation", hf_name="google-research-datasets/mbpp", hf_config="full",
        eval_split="test", fewshot_split="prompt", eval_file="mbpp.jsonl",
        fewshot_file="mbpp.jsonl", accept=accept_mbpp, fewshot="first", program=mbpp_program,
        until=("[DONE]",), num_fewshot=3, reported={"pass@1": 81.5}),
    "arc_easy": Task(
        read_arc, hf_name="allenai/ai2_arc", hf_config="ARC-Easy", eval_split="test",
        fewshot_split="train", eval_file="arc_easy_test.jsonl",
        fewshot_file="arc_easy_train.jsonl", reported={"acc": 84.1}),
    "arc_challenge": Task(
        read_arc, hf_name="allenai/ai2_arc", hf_config="ARC-Challenge", eval_split="test",
        fewshot_split="train", eval_file="arc_challenge_test.jsonl",
        fewshot_file="arc_challenge_train.jsonl", num_fewshot=25, reported={"acc_norm": 69.6}),
    "hellaswag": Task(
        read_hellaswag, hf_name="Rowan/hellaswag", eval_split="validation", fewshot_split="train",
        eval_file="hellaswag_val*.jsonl", fewshot_file="hellaswag_train.jsonl",
        num_fewshot=10, reported={"acc_norm": 84.0}),
    "piqa": Task(
        read_piqa, hf_name="baber/piqa", eval_split="validation", fewshot_split="train",
        eval_file="piqa_val.jsonl", fewshot_file="piqa_train.jsonl", reported={"acc_norm": 81.6}),
    "openbookqa": Task(
        read_openbookqa, hf_name="allenai/openbookqa", hf_config="main", eval_split="test",
        fewshot_split="train", eval_file="openbookqa_test.jsonl",
        fewshot_file="openbookqa_train.jsonl"),
    "siqa": Task(
        read_siqa, hf_name="allenai/social_i_qa", eval_split="validation", fewshot_split="train",
        eval_file="siqa_val.jsonl", fewshot_file="siqa_train.jsonl", acc_norm=False,
        reported={"acc": 53.8}),
    "winogrande": Task(
        read_winogrande, hf_name="allenai/winogrande", hf_config="winogrande_xl",
        eval_split="validation", fewshot_split="train", eval_file="winogrande_val.jsonl",
        fewshot_file="winogrande_train.jsonl", acc_norm=False, num_fewshot=5,
        reported={"acc": 79.6}),
}
