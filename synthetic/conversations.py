"""Conversations that a seeded generator makes: questions about Python's library, single skills, and
chains that compose skills."""
import ast
import datetime
import random
import re
from itertools import islice

from synthetic.texts import documented, modules, vary


DOCSTRING = 40, 500                     # characters of a first paragraph that is worth asking for


def help_chats(n: tuple[int, int] = (10**6, 10**6)):
    """What the standard library's docstrings say in their first paragraph, n of them, from all over
    it. Of several of one name the first."""
    def found():
        asked = set()
        for module, _, tree in (m for i in range(16) for m in modules(i, 16)):
            for node in documented(tree):
                name = getattr(node, "name", "")
                text = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
                if (DOCSTRING[0] <= len(text) <= DOCSTRING[1] and text.endswith(".")
                        and not name.startswith("_") and not module.startswith("_")):
                    what = f"{name} of {module}" if name else f"the module {module}"
                    ask = ("What does {} do?", "Explain {}.", "What is {} for?")[len(what) % 3]
                    if what in asked:
                        continue
                    asked.add(what)
                    yield [{"role": "user", "content": ask.format(what)},
                           {"role": "assistant", "content": text}]
    yield from islice(found(), n[1])


# A skill takes a value to another: (rng, value) -> what is asked, the work that shows it, the new
# value. A value is a number, a word, a list of numbers or a date, and so is what it can do next.

WORDS = """apple bridge candle dragon ember forest garden harbor island jacket kettle lantern marble
needle orange pepper quartz river silver tunnel umbrella valley window yellow zebra anchor button
copper dinner engine flower guitar hammer insect jungle kitten ladder mirror notebook""".split()
MEASURES = [("weeks", "days", 7), ("hours", "minutes", 60), ("metres", "centimetres", 100),
            ("dozens", "pieces", 12), ("minutes", "seconds", 60), ("years", "months", 12)]


def said(value) -> str:
    """A value in words: 12; lantern; 3, 1, 2; 4 March 2021."""
    if isinstance(value, datetime.date):
        return f"{value.day} {value:%B %Y}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def arithmetic(rng, x):
    k, sign = rng.randint(2, 12), rng.choice("+-*")
    value = {"+": x + k, "-": x - k, "*": x * k}[sign]
    ask = {"+": "[Add|Now add] {}", "-": "[Subtract|Take away] {}", "*": "Multiply by {}"}[sign]
    return ask.format(k), f"{x} {sign} {k} = {value}", value


def remainder(rng, x):
    k = rng.randint(3, 12)
    return (f"[Take|Find] the remainder after division by {k}",
            f"{x} = {k} * {x // k} + {x % k}, so the remainder is {x % k}", x % k)


def convert(rng, x):
    a, b, k = rng.choice(MEASURES)
    return (f"[Take it as|Read it as] {a} and convert it to {b}",
            f"{x} {a} = {x} * {k} {b} = {x * k} {b}", x * k)


def digits(rng, x):
    value = [int(d) for d in str(x)]
    return "[List|Write down] its digits", f"{x} has the digits {said(value)}", value


def loop(rng, x):
    n, sums = rng.randint(2, 4), [x]
    for i in range(n):
        sums.append(sums[-1] + i)
    return (f"Call it x and run `for i in range({n}): x += i`; what is x?",
            f"x is {' then '.join(map(str, sums))}", sums[-1])


def later(rng, x):
    start = datetime.date(rng.randint(2001, 2030), rng.randint(1, 12), rng.randint(1, 28))
    value = start + datetime.timedelta(days=x)
    return f"[Find|Give] the date so many days after {said(start)}", (
        f"{said(start)} + {x} days = {said(value)}"), value


def letters(rng, word):
    return "Count its letters", f"{' '.join(word)}: {len(word)} letters", len(word)


def vowels(rng, word):
    found = [c for c in word if c in "aeiou"]
    return "Count its vowels", f"{word} has {' '.join(found) or 'none'}: {len(found)}", len(found)


def backwards(rng, word):
    return ("[Reverse it|Spell it backwards]", f"{' '.join(word)} backwards is {word[::-1]}",
            word[::-1])


def alphabetic(rng, word):
    value = "".join(sorted(word))
    return "[Sort its letters|Put its letters in order]", f"{word} sorted is {value}", value


def cut(rng, word):
    n = rng.randint(1, 3)
    return f"Call it s and evaluate `s[{n}:]`", f"{word} without {word[:n]} is {word[n:]}", word[n:]


def in_order(rng, numbers):
    down = rng.random() < 0.5
    value = sorted(numbers, reverse=down)
    return (f"[Sort|Order] the numbers from {'large to small' if down else 'small to large'}",
            f"in order: {said(value)}", value)


def add_up(rng, numbers):
    return ("[Add them up|Find their sum]", f"{' + '.join(map(str, numbers))} = {sum(numbers)}",
            sum(numbers))


def largest(rng, numbers):
    pick, name = rng.choice(((max, "largest"), (min, "smallest")))
    return (f"[Take|Choose] the {name} of them", f"the {name} of {said(numbers)} is "
            f"{pick(numbers)}", pick(numbers))


def comprehend(rng, numbers):
    k = rng.randint(2, 5)
    value = [k * n for n in numbers]
    return (f"Call them a and evaluate `[{k} * n for n in a]`",
            f"{k} times each: {said(value)}", value)


def weekday(rng, date):
    return "[Name|Give] its day of the week", f"{said(date)} is a {date:%A}", f"{date:%A}".lower()


def fortnight(rng, date):
    k = rng.randint(2, 4)
    value = date + datetime.timedelta(weeks=k)
    return f"Go {k} weeks further", f"{said(date)} + {7 * k} days = {said(value)}", value


def day_of_year(rng, date):
    value = date.timetuple().tm_yday
    before = value - date.day
    return ("[Number|Count] the days of that year up to it",
            f"{before} before {date:%B}, then {date.day}: {value}", value)


SKILLS = {int: (arithmetic, arithmetic, remainder, convert, digits, loop, later),
          str: (letters, vowels, backwards, alphabetic, cut),
          list: (in_order, add_up, largest, comprehend),
          datetime.date: (weekday, fortnight, day_of_year)}


def fits(value) -> bool:
    """Whether it is small enough to go on with."""
    return 0 <= value < 10_000 if isinstance(value, int) else isinstance(
        value, datetime.date) or len(value) > 1


def start_value(rng):
    """What a chain starts with -> its name, the value."""
    return rng.choice((lambda: ("the number", rng.randint(10, 99)),
                       lambda: ("the word", rng.choice(WORDS)),
                       lambda: ("the numbers", [rng.randint(1, 50) for _ in range(4)]),
                       lambda: ("the date", datetime.date(2000, 1, 1) + datetime.timedelta(
                           days=rng.randrange(9000)))))()


def chain(rng, steps: int) -> list[dict]:
    """A task that composes so many skills, each working on what the one before it gave, and its
    answer, step by step. answer_of gives what is to be compared."""
    name, value = start_value(rng)
    asks, work, last = [f"Start with {name} {said(value)}."], [], None
    while len(work) < steps:
        skill = rng.choice([f for f in SKILLS[type(value)] if f is not last])
        ask, shown, new = skill(rng, value)
        if fits(new) and not (skill is later and value > 400):
            last, value = skill, new
            asks.append(f"{len(asks)}. {vary(rng, ask) if '`' not in ask else ask}")
            work.append(f"{len(asks) - 1}. {shown}")
    return [{"role": "user", "content": "\n".join(asks)},
            {"role": "assistant", "content": "\n".join([*work, f"Answer: {said(value)}"])}]


def answer_of(reply: str) -> str:
    """What follows the last "Answer:" of a reply, to the end of the line; "" if there is none."""
    found = re.findall(r"Answer: *([^\n]*)", reply)
    return found[-1].strip() if found else ""


def chain_chats(n: tuple[int, int] = (4000, 4000), steps: tuple[int, int] = (2, 4),
                seed: tuple[int, int] = (1, 1)):
    """n chains of so many steps, for a seed always the same and no two alike."""
    rng, seen = random.Random(f"chains {steps} {seed}"), set()
    while len(seen) < n[1]:
        messages = chain(rng, rng.randint(*steps))
        if messages[0]["content"] not in seen:
            seen.add(messages[0]["content"])
            yield messages


def skill_chats(n: tuple[int, int] = (2000, 2000)):
    """n conversations of one or two tasks, a skill each; a system turn may ask for the work or
    the result alone."""
    rng = random.Random("skills")
    for _ in range(n[1]):
        rule = rng.choice((None, "Show the work.", "Give the result alone."))
        messages = [{"role": "system", "content": rule}] if rule else []
        for _ in range(rng.randint(1, 2)):
            ask, reply = chain(rng, 1)
            if rule == "Give the result alone.":
                reply["content"] = answer_of(reply["content"])
            messages += [ask, reply]
        yield messages


CHATS = {"help": (help_chats, ["n"]), "skills": (skill_chats, ["n"]),
         "chains": (chain_chats, ["n", "steps", "seed"])}
