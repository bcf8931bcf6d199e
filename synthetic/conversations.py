"""Conversations for the supervised stages of the quick start: questions about Python's library,
single skills, and chains of skills, each of which works on what the one before it gave.

A conversation is a list of messages, {"role": "user" | "assistant" | "system", "content": text}.
Everything but the questions about the library comes from a seeded generator.
"""
import ast
import datetime
import random
import re

from synthetic.texts import documented, modules, vary

# ---- questions about the standard library

SHORTEST, LONGEST = 40, 500  # characters of an answer


def help_chats(n: tuple[int, int] = (10**6, 10**6)):
    """Up to n[1] conversations: somebody asks what a thing of the standard library is for, and the
    answer is the first paragraph of its docstring. They come from all over the library."""
    asked = set()
    for i in range(16):
        for module, _, tree in modules(i, 16):
            for node in documented(tree):
                if len(asked) == n[1]:
                    return
                name = getattr(node, "name", "")  # a module has none
                thing = f"{name} of {module}" if name else f"the module {module}"
                answer = first_paragraph(node)
                private = name.startswith("_") or module.startswith("_")
                if thing not in asked and not private and is_worth_asking(answer):
                    asked.add(thing)
                    yield exchange(question_about(thing), answer)


def first_paragraph(node: ast.AST) -> str:
    paragraph = ast.get_docstring(node).split("\n\n")[0]
    return " ".join(paragraph.split())


def is_worth_asking(answer: str) -> bool:
    return SHORTEST <= len(answer) <= LONGEST and answer.endswith(".")


def question_about(thing: str) -> str:
    forms = ("What does {} do?", "Explain {}.", "What is {} for?")
    return forms[len(thing) % 3].format(thing)


def exchange(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ---- skills

# A skill turns a value into another one: skill(rng, value) -> (what is asked, the work that shows
# it, the new value). A value is a number, a word, a list of numbers or a date, and its type decides
# which skills can come next. So skills can be composed to chains of any length whose answers are
# known.

WORDS = """apple bridge candle dragon ember forest garden harbor island jacket kettle lantern marble
needle orange pepper quartz river silver tunnel umbrella valley window yellow zebra anchor button
copper dinner engine flower guitar hammer insect jungle kitten ladder mirror notebook""".split()
MEASURES = [("weeks", "days", 7), ("hours", "minutes", 60), ("metres", "centimetres", 100),
            ("dozens", "pieces", 12), ("minutes", "seconds", 60), ("years", "months", 12)]


def said(value) -> str:
    """A value in words.

    >>> said(12), said("lantern"), said([3, 1, 2]), said(datetime.date(2021, 3, 4))
    ('12', 'lantern', '3, 1, 2', '4 March 2021')
    """
    if isinstance(value, datetime.date):
        return f"{value.day} {value:%B %Y}"
    if isinstance(value, list):
        return ", ".join(str(number) for number in value)
    return str(value)


# Of a number.

def arithmetic(rng, x):
    k = rng.randint(2, 12)
    sign = rng.choice("+-*")
    if sign == "+":
        ask = f"[Add|Now add] {k}"
        value = x + k
    elif sign == "-":
        ask = f"[Subtract|Take away] {k}"
        value = x - k
    else:
        ask = f"Multiply by {k}"
        value = x * k
    return ask, f"{x} {sign} {k} = {value}", value


def remainder(rng, x):
    k = rng.randint(3, 12)
    ask = f"[Take|Find] the remainder after division by {k}"
    work = f"{x} = {k} * {x // k} + {x % k}, so the remainder is {x % k}"
    return ask, work, x % k


def convert(rng, x):
    large, small, size = rng.choice(MEASURES)
    ask = f"[Take it as|Read it as] {large} and convert it to {small}"
    work = f"{x} {large} = {x} * {size} {small} = {x * size} {small}"
    return ask, work, x * size


def digits(rng, x):
    value = [int(digit) for digit in str(x)]
    return "[List|Write down] its digits", f"{x} has the digits {said(value)}", value


def loop(rng, x):
    n = rng.randint(2, 4)
    values = [x]
    for i in range(n):
        values.append(values[-1] + i)
    ask = f"Call it x and run `for i in range({n}): x += i`; what is x?"
    work = f"x is {' then '.join(str(value) for value in values)}"
    return ask, work, values[-1]


def later(rng, x):
    start = datetime.date(rng.randint(2001, 2030), rng.randint(1, 12), rng.randint(1, 28))
    value = start + datetime.timedelta(days=x)
    ask = f"[Find|Give] the date so many days after {said(start)}"
    return ask, f"{said(start)} + {x} days = {said(value)}", value


# Of a word.

def letters(rng, word):
    return "Count its letters", f"{' '.join(word)}: {len(word)} letters", len(word)


def vowels(rng, word):
    found = [letter for letter in word if letter in "aeiou"]
    work = f"{word} has {' '.join(found) or 'none'}: {len(found)}"
    return "Count its vowels", work, len(found)


def backwards(rng, word):
    value = word[::-1]
    return "[Reverse it|Spell it backwards]", f"{' '.join(word)} backwards is {value}", value


def alphabetic(rng, word):
    value = "".join(sorted(word))
    return "[Sort its letters|Put its letters in order]", f"{word} sorted is {value}", value


def cut(rng, word):
    n = rng.randint(1, 3)
    return f"Call it s and evaluate `s[{n}:]`", f"{word} without {word[:n]} is {word[n:]}", word[n:]


# Of a list of numbers.

def in_order(rng, numbers):
    down = rng.random() < 0.5
    value = sorted(numbers, reverse=down)
    direction = "large to small" if down else "small to large"
    return f"[Sort|Order] the numbers from {direction}", f"in order: {said(value)}", value


def add_up(rng, numbers):
    value = sum(numbers)
    work = f"{' + '.join(str(number) for number in numbers)} = {value}"
    return "[Add them up|Find their sum]", work, value


def largest(rng, numbers):
    name = rng.choice(("largest", "smallest"))
    value = max(numbers) if name == "largest" else min(numbers)
    work = f"the {name} of {said(numbers)} is {value}"
    return f"[Take|Choose] the {name} of them", work, value


def comprehend(rng, numbers):
    k = rng.randint(2, 5)
    value = [k * number for number in numbers]
    ask = f"Call them a and evaluate `[{k} * n for n in a]`"
    return ask, f"{k} times each: {said(value)}", value


# Of a date.

def weekday(rng, date):
    day = f"{date:%A}"
    return "[Name|Give] its day of the week", f"{said(date)} is a {day}", day.lower()


def weeks_later(rng, date):
    k = rng.randint(2, 4)
    value = date + datetime.timedelta(weeks=k)
    return f"Go {k} weeks further", f"{said(date)} + {7 * k} days = {said(value)}", value


def day_of_year(rng, date):
    value = date.timetuple().tm_yday
    before = value - date.day
    work = f"{before} before {date:%B}, then {date.day}: {value}"
    return "[Number|Count] the days of that year up to it", work, value


SKILLS = {int: (arithmetic, arithmetic, remainder, convert, digits, loop, later),  # often the first
          str: (letters, vowels, backwards, alphabetic, cut),
          list: (in_order, add_up, largest, comprehend),
          datetime.date: (weekday, weeks_later, day_of_year)}


# ---- chains of skills

def start_value(rng):
    """What a chain starts with -> its name, the value."""
    name = rng.choice(("the number", "the word", "the numbers", "the date"))
    if name == "the number":
        return name, rng.randint(10, 99)
    if name == "the word":
        return name, rng.choice(WORDS)
    if name == "the numbers":
        return name, [rng.randint(1, 50) for _ in range(4)]
    days = rng.randrange(9000)
    return name, datetime.date(2000, 1, 1) + datetime.timedelta(days=days)


def can_go_on(skill, value, new) -> bool:
    """Whether a skill's new value is of a size that a chain can go on with."""
    if skill is later and value > 400:
        return False
    if isinstance(new, int):
        return 0 <= new < 10_000
    if isinstance(new, datetime.date):
        return True
    return len(new) > 1


def chain(rng, steps: int) -> list[dict]:
    """A task that composes so many skills, and its solution step by step.

    >>> question, reply = chain(random.Random(0), 2)
    >>> print(question["content"])
    Start with the date 12 November 2018.
    1. Give its day of the week
    2. Call it s and evaluate `s[2:]`
    >>> print(reply["content"])
    1. 12 November 2018 is a Monday
    2. monday without mo is nday
    Answer: nday
    """
    name, value = start_value(rng)
    asks = [f"Start with {name} {said(value)}."]
    works = []
    last = None
    while len(works) < steps:
        skill = rng.choice([skill for skill in SKILLS[type(value)] if skill is not last])
        ask, work, new = skill(rng, value)
        if not can_go_on(skill, value, new):
            continue
        if "`" not in ask:  # brackets in code are not alternatives
            ask = vary(rng, ask)
        number = len(works) + 1
        asks.append(f"{number}. {ask}")
        works.append(f"{number}. {work}")
        value = new
        last = skill
    return exchange("\n".join(asks), "\n".join([*works, f"Answer: {said(value)}"]))


def answer_of(reply: str) -> str:
    """What follows the last "Answer:" of a reply, to the end of its line: what is compared when a
    chain is judged.

    >>> answer_of("1. 4 + 3 = 7\\nAnswer: 7")
    '7'
    """
    found = re.findall(r"Answer: *([^\n]*)", reply)
    return found[-1].strip() if found else ""


# ---- what sft.py asks for

# The arguments of these generators are ranges, (low, high), which sft.py reads from a source such
# as builtin:chains?n=1000&steps=2-4. Where one number is meant, as for n, it is the high end.


def chain_chats(n: tuple[int, int] = (4000, 4000), steps: tuple[int, int] = (2, 4),
                seed: tuple[int, int] = (1, 1)):
    """n[1] chains of steps[0] to steps[1] skills, no two alike; the same ones for the same seed."""
    rng = random.Random(f"chains {steps} {seed}")
    seen = set()
    while len(seen) < n[1]:
        messages = chain(rng, rng.randint(*steps))
        question = messages[0]["content"]
        if question not in seen:
            seen.add(question)
            yield messages


def skill_chats(n: tuple[int, int] = (2000, 2000)):
    """n[1] conversations of one or two tasks of a single skill each. A system message may ask for
    the work or for the result alone."""
    rng = random.Random("skills")
    for _ in range(n[1]):
        rule = rng.choice((None, "Show the work.", "Give the result alone."))
        messages = []
        if rule:
            messages.append({"role": "system", "content": rule})
        for _ in range(rng.randint(1, 2)):
            ask, reply = chain(rng, 1)
            if rule == "Give the result alone.":
                reply["content"] = answer_of(reply["content"])
            messages += [ask, reply]
        yield messages


# name -> (generator, the options that a source may give)
CHATS = {"help": (help_chats, ["n"]),
         "skills": (skill_chats, ["n"]),
         "chains": (chain_chats, ["n", "steps", "seed"])}
