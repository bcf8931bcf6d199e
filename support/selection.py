"""Which conversations a stage trains on: those worth reading, and none with a held-out question."""
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from configurator import UserError
from support.conversations import EVAL_DOMAINS, Drops, file_lines, load_conversations
from support.sources import local_files, read_each
from support.tasks import TASKS

def select_conversations(source: str, weight: float, held_out: set[int], benchmark: dict[int, str],
                         best_share: float | None, duplicate_share: float | None,
                         ) -> tuple[dict[str, list], list[str]]:
    """Read a domain -> its conversations {"val": [...], "train": [...]}, and lines for the report.
    A domain of weight 0 is for validation only.

    held_out     hashes of questions that no domain trains on (questions_held_out)
    benchmark    hashes of 13 words in a row that none may have (benchmark_grams)
    ..._share    limits of filter_by_quality and dedup_and_filter; None: not filtered so"""
    drops = Drops()
    conversations = list(load_conversations(source, drops))
    report = [f"{len(conversations):,d} conversations of {source}", *drops.report()]
    if weight == 0:
        return {"val": conversations}, report

    if not conversations:
        raise UserError(f"source {source!r} has no conversations")
    parts = train_val_split(conversations, held_out)
    if not parts["train"]:
        raise UserError(f"source {source!r}: the first questions of all its conversations are held "
                        "out for validation; give more data, or put what differs into the user's "
                        "first message")
    dropped = len(conversations) - len(parts["train"]) - len(parts["val"])
    if dropped:
        report.append(f"{dropped:,d} dropped as one of their questions is held out")
    parts["train"], lines = choose(parts["train"], benchmark, best_share, duplicate_share)
    return parts, report + lines


# ---- what is worth reading

# A model imitates what it reads, bad conversations too. Stages 2 and 3 therefore choose. The report
# names its criteria, but not how it measures them; so all measures and limits here are [ours]. They
# are cheap counts of words, lines and signs, each a number from 0 to 1. A conversation is kept or
# dropped as a whole. In this order:
#
#     all stages    decontaminate       drops those that share 13 words in a row with any text of a
#                                       benchmark's row, if benchmarks are given
#     stages 2, 3   filter_by_quality   keeps those that reason, are complete and have structure
#     stage 3       dedup_and_filter    drops near-duplicates, repetitive and incoherent ones
#
# Each domain is filtered on its own. So the best are the best of their domain, whatever its kind;
# and two domains may hold near-duplicates of each other: give sources that overlap as one domain.

MIN_DISTINCT = 0.5   # a conversation with a smaller distinct_3 is called repetitive
MIN_COHERENCE = 0.3  # one with a smaller coherence is called incoherent


def choose(conversations: list, benchmark: dict[int, str], best_share: float | None,
           duplicate_share: float | None) -> tuple[list, list[str]]:
    """The training conversations of a domain -> those worth reading, and lines for the report."""
    report = []
    if benchmark:
        conversations, line = decontaminate(conversations, benchmark)
        report.append(line)
    if best_share is not None:
        conversations, line = filter_by_quality(conversations, best_share)
        report.append(line)
    if duplicate_share is not None:
        conversations, line = dedup_and_filter(conversations, duplicate_share)
        report.append(line)
    return conversations, report


def replies(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def sentences(text: str) -> list[str]:
    """Cut a text after each . ! or ? that a space follows, and at the end of each line."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def ngrams(text: str, n: int) -> list[int]:
    """A hash of every n words in a row. Another process has other hashes for the same words."""
    found = words(text)
    return [hash(tuple(found[i:i + n])) for i in range(len(found) - n + 1)]


def conversation_grams(messages: list[dict], n: int) -> set[int]:
    """The hashes of all n words in a row within a message."""
    grams = set()
    for message in messages:
        grams.update(ngrams(message["content"], n))
    return grams


# These words are English: reasoning in another language counts as none. So give each language as a
# domain of its own, or the filter chooses by language.
REASONING = re.compile(r"=|\b(so|because|therefore|thus|hence|since|then|if|implies|means|first"
                       r"|next|finally|step|let|return)\b", re.IGNORECASE)


def reasoning_density(messages: list[dict]) -> float:
    """The share of the assistant's sentences with an equation or a word like "because": a reply
    that shows how it comes to its result teaches more than one that states it.

    >>> reasoning_density([{"role": "assistant", "content": "A box has 4 eggs. So 3 * 4 = 12."}])
    0.5
    """
    all_sentences = []
    for reply in replies(messages):
        all_sentences += sentences(reply)
    reasoning = [sentence for sentence in all_sentences if REASONING.search(sentence)]
    return len(reasoning) / len(all_sentences)


def completeness(messages: list[dict]) -> float:
    """The share of three checks of each reply that it passes; one that was cut off fails some. It
    does not end with a comma, or another sign that more follows; it closes its code fences; and it
    closes its brackets.

    >>> completeness([{"role": "assistant", "content": "It has three (or four,"}])
    0.3333333333333333
    """
    signs = []
    for reply in replies(messages):
        is_cut = re.search(r"([,;:(\[{-]|\.\.\.|\u2026)\s*$", reply) is not None
        # Lists such as "1) ..., 2) ..." close what they never opened.
        closed = [reply.count(left) <= reply.count(right) for left, right in ("()", "[]", "{}")]
        signs.append(not is_cut)
        signs.append(reply.count("```") % 2 == 0)
        signs.append(all(closed))
    return sum(signs) / len(signs)


def structure(messages: list[dict]) -> float:
    """Whether replies have several lines, as steps and lists do: the number of lines / 3, at most
    1, averaged over the replies.

    >>> structure([{"role": "assistant", "content": "1. 3 * 4 = 12\\nAnswer: 12"}])
    0.6666666666666666
    """
    scores = []
    for reply in replies(messages):
        lines = [line for line in reply.splitlines() if line.strip()]
        scores.append(min(1, len(lines) / 3))
    return sum(scores) / len(scores)


def quality(messages: list[dict]) -> float:
    """The mean of reasoning_density, completeness and structure."""
    return (reasoning_density(messages) + completeness(messages) + structure(messages)) / 3


def filter_by_quality(conversations: list, share: float) -> tuple[list, str]:
    """Keep the best conversations, `share` of all, in their old order -> these, and a line for the
    report."""
    if not conversations:
        return conversations, "there is nothing to choose from"
    scores = [quality(messages) for messages in conversations]
    best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
    best = best_first[:max(1, round(share * len(scores)))]
    kept = [conversations[i] for i in sorted(best)]
    dropped = len(conversations) - len(kept)
    return kept, (f"{dropped:,d} dropped for their quality; those kept have at least "
                  f"{scores[best[-1]]:.3f}")


def distinct_3(messages: list[dict]) -> float:
    """Distinct-3: take every three words in a row of the replies; how many there are without
    duplicates, as a share of all. It is low for text that repeats itself, a habit that a model
    learns quickly.

    >>> distinct_3([{"role": "assistant", "content": "the river the river the river"}])
    0.5
    """
    trigrams = []
    for reply in replies(messages):
        trigrams += ngrams(reply, 3)
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def coherence(messages: list[dict]) -> float:
    """The share of the assistant's sentences with a number, or a word of four letters or more, that
    was said before in the conversation: the sentences of a good reply are about the same things.
    Not counted are the first sentence of a message, those of less than five words, and those with
    letters beyond ASCII: in Korean, say, particles keep a word from coming again in the same form.
    With less than three that count the result is 1.

    >>> coherence([{"role": "user", "content": "Name a river."},
    ...            {"role": "assistant", "content": "The Seine. This river flows through Paris. "
    ...                "My aunt went shopping again today. From Paris it goes to the sea."}])
    0.6666666666666666
    """
    known = set()
    linked = []
    for message in messages:
        for i, sentence in enumerate(sentences(message["content"])):
            found = words(sentence)
            content_words = {word for word in found if len(word) > 3 or word.isdigit()}
            is_measured = len(found) >= 5 and "".join(found).isascii()
            if message["role"] == "assistant" and i > 0 and is_measured:
                linked.append(not content_words.isdisjoint(known))
            known |= content_words
    return sum(linked) / len(linked) if len(linked) >= 3 else 1.0


def dedup_and_filter(conversations: list, duplicate_share: float) -> tuple[list, str]:
    """Drop near-duplicates, repetitive and incoherent conversations of a domain -> the others, and
    a line for the report. System messages are left out, as many may share one. A conversation is a
    near-duplicate if more than duplicate_share of its five-grams (five words in a row) are in those
    kept before it, as they are in generated tasks that differ in a number only; or, as a short one
    has no five-grams, if it is a copy. The user's words count too: two questions about one long
    passage are near-duplicates. All five-grams stay in memory, some 60 bytes per word."""
    kept = []
    seen = set()     # five-grams
    hashes = set()   # of whole conversations
    dropped = {}     # reason -> conversations
    for messages in conversations:
        turns = [message for message in messages if message["role"] != "system"]
        grams = conversation_grams(turns, 5)
        hash_of_turns = hash_text(repr([(turn["role"], turn["content"]) for turn in turns]))
        has_few_new = len(grams & seen) > duplicate_share * len(grams)   # False without five-grams
        if hash_of_turns in hashes or has_few_new:
            dropped.setdefault("near-duplicate", []).append(messages)
        elif distinct_3(messages) < MIN_DISTINCT:
            dropped.setdefault("repetitive", []).append(messages)
        elif coherence(messages) < MIN_COHERENCE:
            dropped.setdefault("incoherent", []).append(messages)
        else:
            kept.append(messages)
            seen |= grams
            hashes.add(hash_of_turns)

    reports = []
    for reason, found in dropped.items():
        example = found[0][-1]["content"][:60]
        reports.append(f"{len(found):,d} dropped as {reason}, for example {example!r}")
    return kept, "; ".join(reports) or "no near-duplicate, repetitive or incoherent conversation"


def decontaminate(conversations: list, benchmark: dict[int, str]) -> tuple[list, str]:
    """Drop conversations with a message that shares 13 words in a row with a benchmark. A benchmark
    measures only memory in a model that has read its questions. (GPT-3's report, arXiv 2005.14165,
    has 13, too.) benchmark: what benchmark_grams gives."""
    kept = []
    dropped = Counter()  # file of the benchmark -> conversations
    for messages in conversations:
        shared = benchmark.keys() & conversation_grams(messages, 13)
        if shared:
            dropped[min(benchmark[gram] for gram in shared)] += 1
        else:
            kept.append(messages)
    line = f"{dropped.total():,d} dropped as they share 13 words in a row with a benchmark"
    if dropped:
        line += ": " + ", ".join(f"{count:,d} with {name}" for name, count in dropped.most_common())
    return kept, line


def benchmark_files(patterns: list[str], benchmark_dir: str | None) -> dict[Path, Callable | None]:
    """{file: accept} of the .jsonl files that the globs name, with None, and of those in
    benchmark_dir that hold questions of eval.py's tasks. accept(row, is_fewshot=False) tells which
    rows are questions, as mbpp's file holds a training split too. What serves as a few-shot example
    is not looked for: training may contain it."""
    files = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UserError(f"decontaminate_against: {pattern!r} must be a path or a glob")
        for path in local_files(pattern):
            files[path] = None
    if benchmark_dir is None:
        return files

    of_tasks = {}
    for task in TASKS.values():
        if task.eval_file:
            for path in sorted(Path(benchmark_dir).glob(task.eval_file)):
                of_tasks[path] = task.accept or accept_all
    if not of_tasks:
        raise UserError(f"benchmark_dir={benchmark_dir} holds no file of eval.py's tasks, such as "
                        "gsm8k_test.jsonl")
    return {**of_tasks, **files}


def accept_all(row: dict, is_fewshot: bool) -> bool:
    return True


def benchmark_grams(files: dict[Path, Callable | None]) -> dict[int, str]:
    """Every 13 words in a row of any text in a benchmark's questions -> the name of its file.
    UserError for a file that was named and has none: nothing could be found by it."""
    grams = {}
    for path, accept in files.items():
        has_some = False
        for texts in read_each(path, file_lines(path), partial(question_texts, accept)):
            for text in texts:
                found = ngrams(text, 13)
                has_some = has_some or bool(found)
                grams.update(dict.fromkeys(found, path.name))
        if accept is None and not has_some:
            raise UserError(f"decontaminate_against: {path} has no text of 13 words, by which its "
                            "questions could be found; leave it out")
    return grams


def question_texts(accept: Callable | None, line: bytes) -> list[str]:
    row = json.loads(line)
    if accept and not accept(row, False):
        return []
    return list(texts_in(row))


def texts_in(value):
    """The strings anywhere inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_in(part)


# ---- holding out

# One question in 50 is held out for validation (of the text for pre-training, one document in 20).
# Not one conversation in 50: the same question occurs in several conversations, domains and stages,
# and a model that has read its answer in one of them is not tested by it in another. So the *hash
# of the question's text* decides, which needs no list and comes out the same everywhere: held out
# if it is below 2^64 / 50.
#
# Two kinds of questions are held out whatever their hash. A domain of weight 0 is for evaluation
# only, and so are all its questions. And if no first question of a small domain falls below the
# bound, the one with the smallest hash is held out, so that each domain has something to validate
# on. The other domains of the stage do not train on these questions. Another stage may, as it does
# not know of them; only the questions of EVAL_DOMAINS are left out of every stage.

HELD_OUT_BELOW = 2**64 // 50


def question_hashes(messages: list[dict]) -> list[int]:
    """A 64-bit hash of each question. The first question is all that the user says before the first
    reply. After it each of the user's messages of five words or more is a question of its own:
    "And then?" is none.

    >>> chat = [{"role": "user", "content": "Name a river."},
    ...         {"role": "assistant", "content": "The Seine."},
    ...         {"role": "user", "content": "And then?"},
    ...         {"role": "assistant", "content": "The sea."},
    ...         {"role": "user", "content": "Through which cities does it flow?"}]
    >>> len(question_hashes(chat))
    2
    """
    first_reply = index_of_first_reply(messages)
    opening = [m["content"] for m in messages[:first_reply] if m["role"] == "user"]
    questions = ["\n\n".join(opening)]
    for message in messages[first_reply:]:
        if message["role"] == "user" and len(words(message["content"])) >= 5:
            questions.append(message["content"])
    return [hash_text(question) for question in questions]


def index_of_first_reply(messages: list[dict]) -> int:
    return [message["role"] for message in messages].index("assistant")


def hash_text(text: str) -> int:
    """The first 64 bits of SHA-256: the same in every process, unlike Python's hash."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")


def questions_held_out(domains: dict) -> set[int]:
    """Hashes held out besides those below the bound: all questions of domains of weight 0 and of
    eval.py's chains; and of each small domain the first question with the smallest hash."""
    held_out = set()
    for source, weight in [*EVAL_DOMAINS.values(), *domains.values()]:
        smallest = 2**64
        for messages in load_conversations(source):
            hashes = question_hashes(messages)
            smallest = min(smallest, hashes[0])
            if weight == 0:
                held_out.update(hashes)
            elif smallest < HELD_OUT_BELOW:
                break  # it is not so small
        if weight > 0 and smallest >= HELD_OUT_BELOW:
            held_out.add(smallest)
    return held_out


def train_val_split(conversations: list, held_out: set[int]) -> dict[str, list]:
    """Split a domain -> {"val": [...], "train": [...]}. held_out: of questions_held_out.

    val     conversations whose first question is held out by this domain: its hash is below the
            bound, or the smallest where none is. They end after the first reply, since what the
            user asks next may be a question of the training conversations
    train   conversations in which no question is held out, by its hash or in held_out

    Conversations of neither kind are dropped: in training they would tell a held-out answer.
    """
    hashes = [question_hashes(messages) for messages in conversations]
    smallest = min((questions[0] for questions in hashes), default=0)
    held_out = held_out | {smallest}

    parts = {"val": [], "train": []}
    for messages, questions in zip(conversations, hashes):
        if questions[0] < HELD_OUT_BELOW or questions[0] == smallest:
            parts["val"].append(messages[:index_of_first_reply(messages) + 1])
        elif min(questions) >= HELD_OUT_BELOW and held_out.isdisjoint(questions):
            parts["train"].append(messages)
    return parts
