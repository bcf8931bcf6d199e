"""Text that any Python installation holds, and worked problems in mathematics and science that a
seeded generator writes: the four domains of the quick start."""
import ast
import inspect
import random
import re
import sysconfig
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path

from configurator import UserError


PROBLEMS_PER_UNIT = 1000                # about 0.3 MB
LIBRARY_UNITS = 8


@cache
def module_files(root: Path) -> list[Path]:
    left_out = {"site-packages", "test", "tests", "idle_test", "_bundled", "pydoc_data",
                "encodings"}
    return [f for f in sorted(root.rglob("*.py")) if not left_out & set(f.relative_to(root).parts)]


def modules(first: int, every: int):
    """(name, text, syntax tree) of each `every`-th module of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = module_files(root)
    if not files:
        raise UserError(f"this Python has no library sources in {root}")
    for file in files[first::every]:
        text = file.read_text(encoding="utf-8", errors="replace")
        with suppress(SyntaxError):                # lib2to3 keeps Python 2 files
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            yield name.removesuffix(".__init__"), text, ast.parse(text)


def documented(tree: ast.Module):
    """Its nodes that have a docstring."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (n for n in ast.walk(tree) if isinstance(n, owners) and ast.get_docstring(n))


def library(kind: str, unit: int):
    """Documents of the standard library, a module each: its source without the docstrings (code),
    or its docstrings and the topics of Python's own help (language). No docstring is in both."""
    if kind == "language":
        from pydoc_data.topics import topics
        yield from [text for _, text in sorted(topics.items())][unit::LIBRARY_UNITS]
    for _, text, tree in modules(unit, LIBRARY_UNITS):
        found = [node.body[0] for node in documented(tree) if len(node.body) > 1]
        if kind == "language":
            texts = [inspect.cleandoc(node.value.value) for node in found]
            yield "\n\n".join(t for t in texts if len(t) > 120)
        else:
            hidden = {i for node in found for i in range(node.lineno, node.end_lineno + 1)}
            lines = enumerate(text.split("\n"), 1)  # not splitlines, which also cuts at form feeds
            yield "\n".join(line for i, line in lines if i not in hidden)


# ---- worked problems

# The numbers decide the steps, and every line follows from the lines above it.

def problems(kind: str, unit: int):
    """PROBLEMS_PER_UNIT documents of math or science, always the same."""
    rng = random.Random(f"{kind} {unit}")
    for _ in range(PROBLEMS_PER_UNIT):
        yield PROBLEMS[kind](rng)


# Stories, their quantities "name symbol (unit) low..high" and formulas as products of powers. One
# without a range follows from the formulas in their order, so all agree; low = high is a constant.
SCENES = """\
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
UNITS = {  # others in which a quantity may be given
    "kg": {"g": 1e-3}, "m": {"cm": 1e-2, "nm": 1e-9}, "m/s": {"km/h": 1 / 3.6}, "s": {"min": 60},
    "m^3": {"L": 1e-3}, "J": {"kJ": 1e3}, "W": {"mW": 1e-3}, "A": {"mA": 1e-3}, "Pa": {"kPa": 1e3}}


def num(x):
    """Four significant digits: 0.0125, 48300, 6.63e-34."""
    return f"{float(f'{x:.4g}'):g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def vary(rng, text):
    """A grammar in brackets: every [this|that] becomes one of its alternatives."""
    return re.sub(r"\[([^][]+)\]", lambda match: rng.choice(match[1].split("|")), text)


def total(*terms):
    """A sum of (coefficient, symbol) terms as one writes it: 3x^2 - x + 5."""
    text = ""
    for k, symbol in terms:
        size = "" if symbol and abs(k) == 1 else abs(k)
        text += f" {'-' if k < 0 else '+'} {size}{symbol}" if k else ""
    return text[3:] if text[:2] == " +" else "-" + text[3:] if text else "0"


def read_scene(text):
    """A scene -> story, {symbol: (name, unit, range)}, [{symbol: power}: the product is 1]."""
    story, *entries = re.split(": |; ", text.replace("\n", " "))
    quantities, formulas = {}, []
    for entry in entries:
        if "=" in entry:
            (left, _), *right = re.findall(r"(\w)(?:\^(\S+))?", entry)
            formulas.append({s: int(p or 1) for s, p in right} | {left: -1})  # 1 = F^-1 m a
        else:
            name, s, unit, span = re.match(r"(.+) (\w) \((\S+)\) ?(.*)", entry).groups()
            quantities[s] = name, unit, [float(x) for x in span.split("..") if x]
    return story, quantities, formulas


SCENES = [read_scene(text) for text in re.split(r"\n(?=An? )", SCENES)]


def isolate(powers, symbol, known):
    """Solve a formula for one of its symbols -> the text of the solution and its value."""
    sides, value, sign = ([], []), 1.0, -1 if powers[symbol] > 0 else 1
    for s, p in powers.items():
        if s != symbol:
            sides[p * sign < 0].append(s if abs(p) == 1 else f"{s}^{abs(p)}")
            value *= known[s] ** (p * sign)
    top, bottom = (" * ".join(side) for side in sides)
    text = (top or "1") + (f" / ({bottom})" if "*" in bottom else f" / {bottom}" if bottom else "")
    return (f"sqrt({text})", value**0.5) if abs(powers[symbol]) == 2 else (text, value)


def science_problem(rng):
    """A walk over a scene's formulas: each step finds a quantity that the next step needs."""
    story, quantities, formulas = rng.choice(SCENES)
    world = {"2": 2} | {s: rng.uniform(*span) for s, (_, _, span) in quantities.items() if span}
    for powers in formulas:
        for s in [s for s in powers if s not in world]:
            world[s] = isolate(powers, s, world)[1]
    known, given, steps, goal = {"2": 2}, [], [], None
    for _ in range(rng.choice((1, 2, 2, 3, 3, 3))):
        moves = [(powers, s) for powers in formulas if goal in (None, *powers) for s in powers
                 if s not in known and len(set(quantities[s][2])) != 1]
        if not moves:
            break
        powers, goal = rng.choice(moves)
        for s in [s for s in powers if s != goal and s not in known]:
            name, unit, _ = quantities[s]
            units = {unit: 1, **UNITS.get(unit, {})}
            said = rng.choice([u for u in units if 1 <= world[s] / units[u] < 1000] or [unit])
            amount = num(float(f"{world[s] / units[said]:.3g}"))
            known[s] = float(num(float(amount) * units[said]))
            given.append(f"the {name} {s} is {amount} {said}")
            if said != unit:
                steps.append(f"{s} = {amount} {said} = {num(known[s])} {unit}")
        name, unit, _ = quantities[goal]
        left = list(powers)[-1]
        text, value = isolate(powers, goal, known)
        numbers = re.sub(r"\b[A-Za-z]\b", lambda match: num(known[match[0]]), text)
        because = "" if goal == left else f"From {left} = {isolate(powers, left, world)[0]}: "
        steps.append(f"{because}{goal} = {text} = {numbers} = {num(value)} {unit}")
        known[goal] = float(num(value))
    facts = ", ".join(given[:-1]) + " and " * (len(given) > 1) + given[-1]
    ask = f"[Find|Calculate|Work out|Determine] the {name} {goal}."
    story += rng.choice((f". Here {facts}. {ask}", f". {ask} It is known that {facts}."))
    return "\n".join([vary(rng, story), *steps, f"Answer: the {name} is {num(value)} {unit}"])


def euclid(rng):
    """The greatest common divisor, every remainder also as a combination of the two numbers."""
    k = rng.randint(1, 30)
    a, b = k * rng.randint(200, 600), k * rng.randint(90, 199)
    yield f"[Let|Take] a = {a}, b = {b}. Write their [gcd|greatest common divisor] as ma + nb."
    old, new = (a, 1, 0), (b, 0, 1)  # in every row (r, s, t), r = s * a + t * b
    while new[0]:
        q = old[0] // new[0]
        old, new, top = new, tuple(x - q * y for x, y in zip(old, new)), old[0]
        so = f", so {new[0]} = {total((new[1], 'a'), (new[2], 'b'))}" if new[0] else ""
        yield f"{top} = {q} * {old[0]} + {new[0]}{so}"
    yield f"Answer: {old[0]} = {total((old[1], 'a'), (old[2], 'b'))}"


def equation(rng):
    """A linear equation with brackets; the data decide if one, no or any x solves it."""
    digits = [k for k in range(-9, 10) if k]
    sides = [[rng.sample(digits, 3) for _ in range(rng.randint(1, 3))] for _ in range(2)]
    closed = (total(*((k, f"({total((a, 'x'), (b, ''))})") for k, a, b in side)) for side in sides)
    flat = (total(*(t for k, a, b in side for t in ((k * a, "x"), (k * b, "")))) for side in sides)
    (a, b), (c, d) = ([sum(part[0] * part[i] for part in side) for i in (1, 2)] for side in sides)
    yield f"[Solve|Find x if] {' = '.join(closed)}"
    yield f"[Open|Expand] the brackets: {' = '.join(flat)}"
    yield f"[Collect|Add like terms]: {total((a, 'x'), (b, ''))} = {total((c, 'x'), (d, ''))}"
    yield f"[Subtract|Take away] {total((c, 'x'), (b, ''))}: {total((a - c, 'x'))} = {d - b}"
    yield "Answer: " + (f"x = {Fraction(d - b, a - c)}" if a - c else "no x" if d - b else "any x")


def power(rng):
    """A power modulo n: every binary digit of the exponent is a step."""
    base, exponent, n = rng.randint(2, 60), rng.randint(9, 999), rng.randint(11, 97)
    yield f"[Find|Compute] {base}^{exponent} mod {n}. In binary, the exponent is {exponent:b}."
    rest = 1
    for digit in f"{exponent:b}":
        value = rest**2 * base ** int(digit)
        yield f"{digit}: {rest}^2{f' * {base}' * int(digit)} = {value} = {value % n} mod {n}"
        rest = value % n
    yield f"Answer: {rest}"


def decimal(rng):
    """A fraction as a decimal: long division until a remainder returns."""
    q = rng.choice((13, 17, 19, 21, 23, 26, 28, 29, 34, 35, 38, 39, 42))  # have long cycles
    p = q * rng.randint(1, 2000) + rng.randint(1, q - 1)
    yield f"[Write|Express] {p}/{q} as a decimal, [any cycle|recurring digits] in brackets."
    yield f"{p} = {q} * {p // q} + {p % q}"
    rest, digits, seen = p % q, "", {}
    while rest and rest not in seen:
        seen[rest] = len(digits)
        digits += str(10 * rest // q)
        yield f"{10 * rest} = {q} * {digits[-1]} + {10 * rest % q}"
        rest = 10 * rest % q
    start = seen.get(rest, len(digits))
    yield f"Answer: {p // q}.{digits[:start]}" + f"({digits[start:]})" * (rest > 0)


def spread(rng):
    """Median, mean and variance of a list."""
    data = [rng.randint(1, 40) for _ in range(rng.randint(4, 9))]
    data[0] += -sum(data) % len(data)  # so that the mean is whole
    n, rows = len(data), sorted(data)
    mean, median = sum(data) // n, Fraction(rows[(n - 1) // 2] + rows[n // 2], 2)
    squares = [(x - mean) ** 2 for x in rows]
    yield f"[Give|Find] the median, mean and variance of {', '.join(map(str, data))}."
    yield f"In order: {', '.join(map(str, rows))}. The median is {median}."
    yield f"The sum is {sum(data)}, so the mean is {sum(data)} / {n} = {mean}."
    yield f"The squared deviations {', '.join(map(str, squares))} add up to {sum(squares)}."
    yield f"Answer: median {median}, mean {mean}, variance {Fraction(sum(squares), n)}"


def math_problem(rng):
    """A procedure whose steps follow from its numbers."""
    return vary(rng, "\n".join(rng.choice((euclid, equation, power, decimal, spread))(rng)))


PROBLEMS = {"math": math_problem, "science": science_problem}
