"""The four domains of the quick start. Code and language are what any Python installation holds:
the sources of its standard library and their docstrings. Mathematics and science are worked
problems, which a seeded generator writes."""
import ast
import inspect
import random
import re
import sysconfig
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

from configurator import UserError

LIBRARY_UNITS = 8         # the parts that the library's modules are dealt to
PROBLEMS_PER_UNIT = 1000  # about 0.3 MB

# ---- the standard library

LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "_bundled", "pydoc_data", "encodings"}


@cache
def module_files(root: Path) -> list[Path]:
    files = []
    for file in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(file.relative_to(root).parts):
            files.append(file)
    return files


def modules(first: int, every: int):
    """(name, text, syntax tree) of modules first, first + every, first + 2 every, ... of the
    standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = module_files(root)
    if not files:
        raise UserError(f"this Python has no library sources in {root}; use another source")
    for file in files[first::every]:
        text = file.read_text(encoding="utf-8", errors="replace")
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        try:
            tree = ast.parse(text)
        except SyntaxError:  # lib2to3 keeps files of Python 2
            continue
        yield name.removesuffix(".__init__"), text, tree


def documented(tree: ast.Module):
    """The nodes of a syntax tree that have a docstring."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, owners) and ast.get_docstring(node):
            yield node


def library(kind: str, unit: int):
    """Documents of the standard library, one for each module. "code": its source without the
    docstrings. "language": its docstrings, and before all modules the topics of Python's own help.
    So no docstring is in both."""
    if kind == "language":
        from pydoc_data.topics import topics
        for name in sorted(topics)[unit::LIBRARY_UNITS]:
            yield topics[name]

    for _, text, tree in modules(unit, LIBRARY_UNITS):
        # A docstring that is all of a body stays in the code, which would not parse without it.
        docstrings = [node.body[0] for node in documented(tree) if len(node.body) > 1]
        if kind == "language":
            yield long_docstrings(docstrings)
        else:
            yield without_lines_of(docstrings, text)


def long_docstrings(docstrings: list[ast.Expr]) -> str:
    texts = [inspect.cleandoc(docstring.value.value) for docstring in docstrings]
    return "\n\n".join(text for text in texts if len(text) > 120)


def without_lines_of(docstrings: list[ast.Expr], text: str) -> str:
    hidden = set()
    for docstring in docstrings:
        hidden.update(range(docstring.lineno, docstring.end_lineno + 1))

    lines = text.split("\n")  # not splitlines(), which also cuts at form feeds
    return "\n".join(line for number, line in enumerate(lines, start=1) if number not in hidden)


# ---- worked problems

# A problem is a question, steps and an answer, a line each. Random numbers decide which steps there
# are, and every line follows from the lines above it: so a small model that reads them can learn to
# compute and not only to imitate. Questions are worded in more than one way, by a small grammar.


def problems(kind: str, unit: int):
    """PROBLEMS_PER_UNIT documents of "math" or "science", the same ones for the same unit."""
    rng = random.Random(f"{kind} {unit}")
    for _ in range(PROBLEMS_PER_UNIT):
        yield PROBLEMS[kind](rng)


def vary(rng: random.Random, text: str) -> str:
    """Replace every [this|that] by one of its alternatives.

    >>> vary(random.Random(0), "[Find|Compute] 2^3.")
    'Compute 2^3.'
    """
    return re.sub(r"\[([^][]+)\]", lambda match: rng.choice(match[1].split("|")), text)


def text_of(rng: random.Random, lines: list[str]) -> str:
    return vary(rng, "\n".join(lines))


def num(x: float) -> str:
    """Four significant digits.

    >>> num(0.0125), num(48300), num(6.63e-34)
    ('0.0125', '48300', '6.63e-34')
    """
    rounded = float(f"{x:.4g}")
    return f"{rounded:g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def polynomial(*terms: tuple[int, str]) -> str:
    """The sum of (coefficient, symbol) terms as one writes it.

    >>> polynomial((3, "x^2"), (-1, "x"), (0, "y"), (5, ""))
    '3x^2 - x + 5'
    """
    text = ""
    for coefficient, symbol in terms:
        if coefficient == 0:
            continue
        sign = "-" if coefficient < 0 else "+"
        size = abs(coefficient)
        shown = symbol if symbol and size == 1 else f"{size}{symbol}"
        text += f" {sign} {shown}"

    if not text:
        return "0"
    first = text[3:]  # behind " + " or " - "
    return first if text.startswith(" +") else "-" + first


# ---- mathematics

def math_problem(rng: random.Random) -> str:
    kind = rng.choice((euclid, equation, power, decimal, spread))
    return text_of(rng, kind(rng))


def euclid(rng: random.Random) -> list[str]:
    """The greatest common divisor of a and b, and every remainder as a combination of a and b.

    >>> rng = random.Random(4)
    >>> print(text_of(rng, euclid(rng)))
    Take a = 2840, b = 824. Write their greatest common divisor as ma + nb.
    2840 = 3 * 824 + 368, so 368 = a - 3b
    824 = 2 * 368 + 88, so 88 = -2a + 7b
    368 = 4 * 88 + 16, so 16 = 9a - 31b
    88 = 5 * 16 + 8, so 8 = -47a + 162b
    16 = 2 * 8 + 0
    Answer: 8 = -47a + 162b
    """
    k = rng.randint(1, 30)
    a = k * rng.randint(200, 600)
    b = k * rng.randint(90, 199)
    lines = [f"[Let|Take] a = {a}, b = {b}. "
             "Write their [gcd|greatest common divisor] as ma + nb."]

    # In every row (r, s, t), r = s a + t b.
    old = (a, 1, 0)
    new = (b, 0, 1)
    while new[0] != 0:
        quotient = old[0] // new[0]
        remainder = tuple(x - quotient * y for x, y in zip(old, new))
        line = f"{old[0]} = {quotient} * {new[0]} + {remainder[0]}"
        old, new = new, remainder
        if new[0] != 0:
            line += f", so {new[0]} = {polynomial((new[1], 'a'), (new[2], 'b'))}"
        lines.append(line)
    lines.append(f"Answer: {old[0]} = {polynomial((old[1], 'a'), (old[2], 'b'))}")
    return lines


def equation(rng: random.Random) -> list[str]:
    """A linear equation with brackets, which one x, no x or any x solves.

    >>> rng = random.Random(4)
    >>> print(text_of(rng, equation(rng)))
    Solve (-6x + 4) = -5(-7x + 8) - 9(4x + 1)
    Open the brackets: -6x + 4 = 35x - 40 - 36x - 9
    Add like terms: -6x + 4 = -x - 49
    Take away -x + 4: -5x = -53
    Answer: x = 53/5
    """
    digits = [k for k in range(-9, 10) if k]
    sides = []  # each a list of [k, a, b], which stands for k (a x + b)
    for _ in range(2):
        count = rng.randint(1, 3)
        sides.append([rng.sample(digits, 3) for _ in range(count)])

    closed = []
    opened = []
    sums = []
    for side in sides:
        brackets = []
        products = []
        for k, a, b in side:
            brackets.append((k, f"({polynomial((a, 'x'), (b, ''))})"))
            products += [(k * a, "x"), (k * b, "")]
        closed.append(polynomial(*brackets))
        opened.append(polynomial(*products))
        sums.append((sum(k * a for k, a, _ in side), sum(k * b for k, _, b in side)))

    (a, b), (c, d) = sums  # a x + b = c x + d
    if a != c:
        answer = f"x = {Fraction(d - b, a - c)}"
    elif d != b:
        answer = "no x"
    else:
        answer = "any x"
    return [
        f"[Solve|Find x if] {' = '.join(closed)}",
        f"[Open|Expand] the brackets: {' = '.join(opened)}",
        f"[Collect|Add like terms]: {polynomial((a, 'x'), (b, ''))} = "
        f"{polynomial((c, 'x'), (d, ''))}",
        f"[Subtract|Take away] {polynomial((c, 'x'), (b, ''))}: {polynomial((a - c, 'x'))} = "
        f"{d - b}",
        f"Answer: {answer}"]


def power(rng: random.Random) -> list[str]:
    """A power modulo n by repeated squaring: every binary digit of the exponent is a step.

    >>> rng = random.Random(174)
    >>> print(text_of(rng, power(rng)))
    Find 53^13 mod 67. In binary, the exponent is 1101.
    1: 1^2 * 53 = 53 = 53 mod 67
    1: 53^2 * 53 = 148877 = 3 mod 67
    0: 3^2 = 9 = 9 mod 67
    1: 9^2 * 53 = 4293 = 5 mod 67
    Answer: 5
    """
    base = rng.randint(2, 60)
    exponent = rng.randint(9, 999)
    n = rng.randint(11, 97)
    lines = [f"[Find|Compute] {base}^{exponent} mod {n}. In binary, the exponent is {exponent:b}."]
    rest = 1
    for digit in f"{exponent:b}":
        value = rest**2
        shown = f"{rest}^2"
        if digit == "1":
            value *= base
            shown += f" * {base}"
        lines.append(f"{digit}: {shown} = {value} = {value % n} mod {n}")
        rest = value % n
    lines.append(f"Answer: {rest}")
    return lines


def decimal(rng: random.Random) -> list[str]:
    """A fraction as a decimal: long division until a remainder returns.

    >>> rng = random.Random(140)
    >>> print(text_of(rng, decimal(rng)))
    Write 75019/42 as a decimal, recurring digits in brackets.
    75019 = 42 * 1786 + 7
    70 = 42 * 1 + 28
    280 = 42 * 6 + 28
    Answer: 1786.1(6)
    """
    q = rng.choice((13, 17, 19, 21, 23, 26, 28, 29, 34, 35, 38, 39, 42))  # have long cycles
    p = q * rng.randint(1, 2000) + rng.randint(1, q - 1)
    lines = [f"[Write|Express] {p}/{q} as a decimal, [any cycle|recurring digits] in brackets.",
             f"{p} = {q} * {p // q} + {p % q}"]

    rest = p % q
    digits = ""
    seen = {}  # remainder -> the place of the digit that it gives
    while rest and rest not in seen:
        seen[rest] = len(digits)
        digit = 10 * rest // q
        digits += str(digit)
        lines.append(f"{10 * rest} = {q} * {digit} + {10 * rest % q}")
        rest = 10 * rest % q

    start = seen.get(rest, len(digits))
    answer = f"Answer: {p // q}.{digits[:start]}"
    if rest:
        answer += f"({digits[start:]})"
    lines.append(answer)
    return lines


def spread(rng: random.Random) -> list[str]:
    """Median, mean and variance of a list.

    >>> rng = random.Random(4)
    >>> print(text_of(rng, spread(rng)))
    Give the median, mean and variance of 21, 7, 26, 31, 10.
    In order: 7, 10, 21, 26, 31. The median is 21.
    The sum is 95, so the mean is 95 / 5 = 19.
    The squared deviations 144, 81, 4, 49, 144 add up to 422.
    Answer: median 21, mean 19, variance 422/5
    """
    n = rng.randint(4, 9)
    data = [rng.randint(1, 40) for _ in range(n)]
    data[0] += -sum(data) % n  # so that the mean is whole
    ordered = sorted(data)
    mean = sum(data) // n
    median = Fraction(ordered[(n - 1) // 2] + ordered[n // 2], 2)
    squares = [(x - mean) ** 2 for x in ordered]
    return [
        f"[Give|Find] the median, mean and variance of {', '.join(map(str, data))}.",
        f"In order: {', '.join(map(str, ordered))}. The median is {median}.",
        f"The sum is {sum(data)}, so the mean is {sum(data)} / {n} = {mean}.",
        f"The squared deviations {', '.join(map(str, squares))} add up to {sum(squares)}.",
        f"Answer: median {median}, mean {mean}, variance {Fraction(sum(squares), n)}"]


# ---- science

# A scene is a story, quantities as "name symbol (unit) low..high", and formulas between them, each
# a product of powers. A quantity without a range follows from the formulas, in their order, so that
# all of them hold; a quantity whose low and high are equal is a constant.
SCENES_AS_TEXT = """\
A [trolley|sledge|toy train] starts from rest under a constant net force: mass m (kg) 0.2..40;
time t (s) 2..9; acceleration a (m/s^2) 0.3..4; net force F (N); speed v (m/s); distance d (m);
momentum p (kg*m/s); kinetic energy E (J); average power P (W); F = m a; v = a t; p = m v; p = F t;
d = 2^-1 a t^2; d = 2^-1 v t; E = 2^-1 m v^2; E = F d; P = E t^-1
A spring launches a [puck|toy car|wooden block] across a smooth table: stiffness k (N/m) 50..900;
compression x (m) 0.02..0.2; mass m (kg) 0.05..2; greatest force F (N); energy E (J); launch speed v
(m/s); momentum p (kg*m/s); F = k x; E = 2^-1 k x^2; E = 2^-1 F x; E = 2^-1 m v^2; p = m v
A [lamp|heater|resistor] is connected to a [battery|power supply]: voltage U (V) 3..24; resistance
R (ohm) 5..200; time t (s) 20..900; current I (A); power P (W); charge q (C); energy E (J);
I = U R^-1; P = U I; P = I^2 R; P = U^2 R^-1; q = I t; E = P t; E = q U
A laser shines [at a wall|into a fibre|on a lens]: wavelength L (m) 3e-7..9.9e-7; power P (W)
0.001..0.02; speed of light c (m/s) 3e8..3e8; Planck constant h (J*s) 6.63e-34..6.63e-34; frequency
f (Hz); photon energy E (J); photon rate N (1/s); f = c L^-1; E = h f; E = h c L^-1; N = P E^-1
An electric [kettle|urn|boiler] heats water without loss: volume V (m^3) 0.0003..0.002; power P (W)
500..2400; density r (kg/m^3) 1000..1000; specific heat c (J/(kg*K)) 4180..4180; mass m (kg); heat
Q (J); temperature rise H (K) 10..75; time t (s); m = r V; Q = m c H; t = Q P^-1
A sealed [flask|cylinder|tank] holds a gas: pressure p (Pa) 9e4..4e5; volume V (m^3) 0.002..0.06;
temperature T (K) 270..400; gas constant R (J/(mol*K)) 8.31..8.31; molar mass M (g/mol) 4..44;
amount n (mol); mass m (g); density r (g/m^3); n = p V R^-1 T^-1; m = n M; r = m V^-1"""

# Other units in which a quantity may be given, and their sizes.
UNITS = {"kg": {"g": 1e-3}, "m": {"cm": 1e-2, "nm": 1e-9}, "m/s": {"km/h": 1 / 3.6},
         "s": {"min": 60}, "m^3": {"L": 1e-3}, "J": {"kJ": 1e3}, "W": {"mW": 1e-3},
         "A": {"mA": 1e-3}, "Pa": {"kPa": 1e3}}


class Quantity(NamedTuple):
    name: str
    unit: str
    span: list[float]  # [low, high], or [] if it follows from the formulas

    def is_constant(self) -> bool:
        return len(set(self.span)) == 1


class Scene(NamedTuple):
    story: str
    quantities: dict[str, Quantity]    # symbol -> quantity
    formulas: list[dict[str, int]]     # symbol -> power; the product of all is 1


def read_scene(text: str) -> Scene:
    """A scene from its text.

    >>> scene = read_scene("A car drives: time t (s) 2..9; speed v (m/s); way d (m); d = v t")
    >>> scene.quantities["t"], scene.formulas
    (Quantity(name='time', unit='s', span=[2.0, 9.0]), [{'v': 1, 't': 1, 'd': -1}])
    """
    story, *entries = re.split(": |; ", text.replace("\n", " "))
    quantities = {}
    formulas = []
    for entry in entries:
        if "=" in entry:
            (left, _), *right = re.findall(r"(\w)(?:\^(\S+))?", entry)
            powers = {symbol: int(exponent or 1) for symbol, exponent in right}
            powers[left] = -1
            formulas.append(powers)
        else:
            match = re.match(r"(.+) (\w) \((\S+)\) ?(.*)", entry)
            name, symbol, unit, span = match.groups()
            quantities[symbol] = Quantity(name, unit, [float(x) for x in span.split("..") if x])
    return Scene(story, quantities, formulas)


SCENES = [read_scene(text) for text in re.split(r"\n(?=An? )", SCENES_AS_TEXT)]


def isolate(powers: dict[str, int], symbol: str, known: dict[str, float]) -> tuple[str, float]:
    """Solve a formula for one of its symbols -> the solution and its value.

    >>> isolate({"2": -1, "m": 1, "v": 2, "E": -1}, "v", {"2": 2, "E": 9.0, "m": 2.0})
    ('sqrt(2 * E / m)', 3.0)
    """
    sign = -1 if powers[symbol] > 0 else 1
    above = []
    below = []
    value = 1.0
    for other, exponent in powers.items():
        if other == symbol:
            continue
        value *= known[other] ** (exponent * sign)
        shown = other if abs(exponent) == 1 else f"{other}^{abs(exponent)}"
        if exponent * sign > 0:
            above.append(shown)
        else:
            below.append(shown)

    text = " * ".join(above) or "1"
    if len(below) == 1:
        text += f" / {below[0]}"
    elif below:
        text += f" / ({' * '.join(below)})"
    if abs(powers[symbol]) == 2:
        return f"sqrt({text})", value**0.5
    return text, value


def true_values(rng: random.Random, scene: Scene) -> dict[str, float]:
    """Values of all quantities, for which all formulas hold. "2" is a quantity of formulas too."""
    values = {"2": 2}
    for symbol, quantity in scene.quantities.items():
        if quantity.span:
            values[symbol] = rng.uniform(*quantity.span)
    for powers in scene.formulas:
        for symbol in powers:
            if symbol not in values:
                values[symbol] = isolate(powers, symbol, values)[1]
    return values


def choose_amount(rng: random.Random, value: float, unit: str) -> tuple[str, str, float]:
    """How a problem states a value -> the number, its unit, and the size of that unit. The unit is
    one in which the number is from 1 to 1000, if there is one."""
    sizes = {unit: 1, **UNITS.get(unit, {})}
    handy = [name for name, size in sizes.items() if 1 <= value / size < 1000]
    chosen = rng.choice(handy or [unit])
    amount = num(float(f"{value / sizes[chosen]:.3g}"))
    return amount, chosen, sizes[chosen]


def science_problem(rng: random.Random) -> str:
    """A walk over the formulas of a scene: each step finds a quantity that the next one needs.

    >>> print(science_problem(random.Random(3)).replace(". ", ".\\n"))
    A spring launches a wooden block across a smooth table.
    Calculate the momentum p.
    It is known that the mass m is 1.84 kg and the energy E is 0.523 J.
    From E = m * v^2 / 2: v = sqrt(2 * E / m) = sqrt(2 * 0.523 / 1.84) = 0.754 m/s
    p = m * v = 1.84 * 0.754 = 1.387 kg*m/s
    Answer: the momentum is 1.387 kg*m/s
    """
    scene = rng.choice(SCENES)
    values = true_values(rng, scene)
    known = {"2": 2}  # what a reader knows so far, as it was written
    given = []
    steps = []
    goal = None
    for _ in range(rng.choice((1, 2, 2, 3, 3, 3))):
        moves = possible_moves(scene, known, goal)
        if not moves:
            break
        powers, goal = rng.choice(moves)

        # What the formula needs and nobody has found yet is given by the problem.
        for symbol in powers:
            if symbol == goal or symbol in known:
                continue
            name, unit, _ = scene.quantities[symbol]
            amount, stated_unit, size = choose_amount(rng, values[symbol], unit)
            known[symbol] = float(num(float(amount) * size))
            given.append(f"the {name} {symbol} is {amount} {stated_unit}")
            if stated_unit != unit:
                steps.append(f"{symbol} = {amount} {stated_unit} = {num(known[symbol])} {unit}")

        name, unit, _ = scene.quantities[goal]
        solution, value = isolate(powers, goal, known)
        numbers = re.sub(r"\b[A-Za-z]\b", lambda match: num(known[match[0]]), solution)
        left = list(powers)[-1]  # the formula as the scene has it: left = ...
        because = ""
        if goal != left:
            because = f"From {left} = {isolate(powers, left, values)[0]}: "
        steps.append(f"{because}{goal} = {solution} = {numbers} = {num(value)} {unit}")
        known[goal] = float(num(value))

    facts = given[0]
    if len(given) > 1:
        facts = ", ".join(given[:-1]) + " and " + given[-1]
    ask = f"[Find|Calculate|Work out|Determine] the {name} {goal}."
    question = scene.story + rng.choice((f". Here {facts}. {ask}",
                                         f". {ask} It is known that {facts}."))
    answer = f"Answer: the {name} is {num(value)} {unit}"
    return "\n".join([vary(rng, question), *steps, answer])


def possible_moves(scene: Scene, known: dict, goal: str | None) -> list[tuple[dict, str]]:
    """(formula, quantity that it gives) of each next step. From the second step on, the formula
    must use what the step before found."""
    moves = []
    for powers in scene.formulas:
        if goal is not None and goal not in powers:
            continue
        for symbol in powers:
            if symbol not in known and not scene.quantities[symbol].is_constant():
                moves.append((powers, symbol))
    return moves


PROBLEMS = {"math": math_problem, "science": science_problem}
