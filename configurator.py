"""Configuration: typed defaults, then a config file, then the command line.

A script states its knobs in a dataclass. The type is a check, the comment is the help text:

    @dataclass
    class Config:
        lr: NonNegative = 1e-3       # peak learning rate
        seq_len: Count | list = 256  # tokens per sequence

    c = load(Config, sys.argv[1:])   # python train.py config/small.py --lr=5e-4
    c.lr                             # 0.0005
    c.where_set["lr"]                # "command line", "config/small.py:7" or "default"

A config file holds lines `key = expression`, in Python; an option is `--key=value`. Both obey the
same rules: an unknown key, a wrong type, a value out of bounds or a key that is set twice is a
UserError of one line, which names the place and the key. `--help` prints every key with its type,
default and comment, and then each value that was set, with the place.
"""
import ast
import difflib
import inspect
import json
import math
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# A type with bounds, both included: Annotated[type, least] or Annotated[type, least, most].
Count = Annotated[int, 1]
Size = Annotated[int, 0]
NonNegative = Annotated[float, 0]
Fraction = Annotated[float, 0, 1]
Seed = Annotated[int, -2**63, 2**63 - 1]  # what torch takes

# Keys that had another name in the first edition: old -> new.
RENAMED_KEYS = {
    "micro_tokens": "micro_batch_tokens",
    "recompute": "activation_checkpoint_layers",
    "tau": "qk_clip_threshold",
    "coefficients": "ns_coefficients",
    "replicas": "dp_replicate",
    "timeout": "timeout_seconds",
    "theta": "rope_theta_schedule",
    "world": "plan_world_size",
    "mfu": "assumed_mfu",
    "part": "prepare_part",
    "max_skipped": "max_nonfinite_steps",
    "shots": "num_fewshot",
    "samples": "num_samples",
    "bench_dir": "benchmark_dir",
    "batch_tokens": "kv_cache_tokens",  # in eval.py; training still has batch_tokens
    "benchmarks": "decontaminate_against",
}


class UserError(ValueError):
    """A mistake of the user, not of the code. Its text is one line: what happened; what to do.
    The scripts print that line and exit with status 1. Other exceptions keep their traceback."""


def one_line(e: Exception) -> str:
    """The text of any exception on one line. The exception's type stands in front, unless it is a
    ValueError or UserError, whose texts are written for users."""
    text = " ".join(str(getattr(e, "strerror", None) or e).split())[:300]
    if type(e) in (ValueError, UserError):
        return text
    return f"{type(e).__name__}: {text}"


def split_options(words: list[str]) -> dict[str, str]:
    """Options as a dict, with their texts.

    >>> split_options(["--lr=0.1", "--compile"])
    {'lr': '0.1', 'compile': 'True'}
    """
    options = {}
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UserError(f"{short(word)}: options have two dashes, as in --key=value")
        if key in options:
            raise UserError(f"{short(word)}: {short(f'--{key}')} is set twice; remove one")
        options[key] = text if equals else "True"
    return options


def load(Config: type, argv: list[str], default_file: str | None = None,
         about: str | None = None) -> Any:
    """Build a Config: its defaults, overridden by a config file, overridden by the command line.

    argv: at most one config file (else default_file, if that is given) and any --key=value.
    The result's attribute where_set, which is no field, maps each key to where its value was set.
    With --help in argv the config is printed instead, after `about` or a line of usage, and the
    program ends.
    """
    script = Path(inspect.getfile(Config)).name
    types = get_type_hints(Config, include_extras=True)
    file, options = split_argv(argv, default_file)
    config = Config()
    config.where_set = {}

    for key, value in vars(Config()).items():
        set_key(config, types, "default", key, value)
    if file:
        for place, key, value in read_file(file, script):
            set_key(config, types, place, key, value)
    for option in options:
        key, equals, text = option[2:].partition("=")
        if not equals and key in types and not may_be_true(types[key]):
            raise UserError(f"command line: --{key} needs a value: --{key}=...")
        value = parse(types.get(key, str), text) if equals else True
        set_key(config, types, "command line", key, value)

    if "--help" in argv or "-h" in argv:
        usage = f"usage: python {script} [config/X.py] [--key=value ...]"
        if about:
            usage = f"{about.strip()}\n\nThe options are those of {script}:"
        print(f"{usage}\n\n{describe(config)}", flush=True)
        raise SystemExit
    return config


def may_be_true(hint: Any) -> bool:
    """Whether --key alone is a value of this type."""
    return bool in (hint, *get_args(hint))


def save(config: Any, path: str | Path) -> None:
    """Write the config as JSON. The file appears under its name only when it is complete."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def describe(config: Any) -> str:
    """The text of --help: the dataclasses as their source has them, which shows every key with its
    type, default and comment; below them each value that was set, and where."""
    lines = []
    for cls in reversed(type(config).__mro__[:-1]):
        # The fields end where the methods begin.
        lines.append(re.split(r"\n\n    (?:def |@)", inspect.getsource(cls))[0].rstrip() + "\n")
    for key, place in config.where_set.items():
        if place != "default":
            lines.append(f"{key} = {getattr(config, key)!r}  # {place}")
    return "\n".join(lines)


# ---- one key and its value

def set_key(config: Any, types: dict[str, Any], place: str, key: str, value: Any) -> None:
    """Check key and value, then set the key and note the place that it came from."""
    if key not in types:
        hint = "--help lists all keys"
        similar = difflib.get_close_matches(key, types, n=1)
        if similar:
            hint = f"did you mean {similar[0]!r}?"
        if RENAMED_KEYS.get(key) in types:
            hint = f"it is now called {RENAMED_KEYS[key]!r}"
        raise UserError(f"{place}: unknown key {short(key)}; {hint}")
    setattr(config, key, check_value(f"{place}: {key}", types[key], value))
    config.where_set[key] = place


def check_value(name: str, hint: Any, value: Any) -> Any:
    """coerce(), with this name in front of the error."""
    try:
        return coerce(hint, value)
    except UserError as e:
        raise UserError(f"{name} {e}") from None


def coerce(hint: Any, value: Any) -> Any:
    """Return the value if it fits the type, else raise a UserError "must be ..., not ...". An int
    becomes a float and a tuple a list where the type asks for that; nothing else is converted.

    >>> coerce(float, 3), coerce(Count | list, (1, 2))
    (3.0, [1, 2])
    >>> coerce(Fraction, 1.5)
    Traceback (most recent call last):
    configurator.UserError: must be 0 <= float <= 1, not 1.5
    """
    kind = get_origin(hint)
    if kind is Annotated:
        low, high = bounds(hint)
        with suppress(UserError):
            number = coerce(get_args(hint)[0], value)
            if low <= number <= high:
                return number
    elif kind is Literal:
        for choice in get_args(hint):
            # 1 == 1.0 == True in Python: only the types tell them apart.
            if value == choice and type(value) is type(choice):
                return value
    elif kind in (Union, UnionType):
        for member in get_args(hint):
            with suppress(UserError):
                return coerce(member, value)
    else:
        if hint is float and type(value) is int:
            value = float(value)
        if hint is list and type(value) is tuple:
            value = list(value)
        if type(value) is hint and is_plain(value):
            return value
    raise UserError(f"must be {show(hint)}, not {short(value)}")


def bounds(hint: Any) -> tuple[float, float]:
    """The least and the largest value of an Annotated type.

    >>> bounds(Fraction), bounds(Count)
    ((0, 1), (1, inf))
    """
    low, high = (*hint.__metadata__, math.inf)[:2]
    return low, high


def is_plain(value: Any) -> bool:
    """Can files hold the value? JSON has neither nan nor inf nor, say, sets; UTF-8 has no half of a
    surrogate pair; and no name of a file has a zero byte.

    >>> is_plain([1.5, {"a": None}]), is_plain(math.nan), is_plain({1, 2})
    (True, False, False)
    """
    with suppress(TypeError, ValueError, RecursionError):
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode("utf-8")
        return not (isinstance(value, str) and "\0" in value)
    return False


def show(hint: Any) -> str:
    """A type as a user reads it.

    >>> show(Count | list | None), show(Literal["linear", "cosine"])
    ('int >= 1 | list | None', "'linear' | 'cosine'")
    """
    kind = get_origin(hint)
    if kind is Annotated:
        name = show(get_args(hint)[0])
        low, high = bounds(hint)
        return f"{name} >= {low}" if high == math.inf else f"{low} <= {name} <= {high}"
    if kind is Literal:
        return " | ".join(repr(choice) for choice in get_args(hint))
    if kind in (Union, UnionType):
        return " | ".join(show(member) for member in get_args(hint))
    return "None" if hint is type(None) else hint.__name__


def short(value: Any) -> str:
    """The repr, cut to 40 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in ...
        return f"this {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


# ---- the command line and config files

def split_argv(argv: list[str], default_file: str | None = None) -> tuple[str | None, list[str]]:
    """argv -> the config file or None, and the options as they were written, without --help.

    >>> split_argv(["--lr=1e-3", "--help", "--compile"])
    (None, ['--lr=1e-3', '--compile'])
    """
    files = [word for word in argv if not word.startswith("-")]
    options = [word for word in argv if word.startswith("-") and word not in ("-h", "--help")]
    if len(files) > 1:
        raise UserError(f"{short(' '.join(files))}: at most one config file; options are "
                        "--key=value")
    file = files[0] if files else default_file
    if file and not os.path.isfile(file):
        similar = f"config/{Path(file).stem}.py"
        hint = f"did you mean {similar}?" if os.path.isfile(similar) else "options are --key=value"
        raise UserError(f"{short(file)} is not a file; {hint}")

    split_options(options)                  # UserError if they are no options, or one comes twice
    return file, options


def parse(hint: Any, text: str) -> Any:
    """What the text of --key=text stands for: a Python literal where the type takes that, else the
    text itself. Quotes are part of the text, since the shell has already removed its own.

    >>> parse(float, "1e-3"), parse(bool, "true"), parse(str | None, "None"), parse(str, "None")
    (0.001, True, None, 'None')
    >>> parse(int | None, "none"), parse(str | None, "none")        # a name may be "none"
    (None, 'none')
    """
    if text == "none" and type(None) in get_args(hint) and str not in get_args(hint):
        return None
    literal = {"true": True, "false": False}.get(text)
    # What is no Python literal raises one of these, and stays the text that it is. So does what
    # does not fit the type: UserError is a ValueError.
    with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        if literal is None:
            literal = ast.literal_eval(text)
        if not isinstance(literal, str):
            return coerce(hint, literal)
    return text


def read_file(file: str, script: str) -> list[tuple[str, str, Any]]:
    """Run a config file -> ("file:line", key, value) of each of its lines `key = expression`.

    An expression may use Python's builtins and the keys above it: `batch_tokens = 4 * seq_len`. The
    first line may name the script that the file is for, as in `# pretrain.py: a small model`.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        statements = ast.parse(text).body
    except SyntaxError as e:
        raise UserError(f"{file}:{e.lineno}: {e.msg}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{file}: one of its expressions is nested too deeply") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: {one_line(e)}") from None

    owner = re.match(r"# *(\w+\.py)\b", text)
    if owner and owner[1] != script:
        raise UserError(f"{file} belongs to {owner[1]}, not to {script}")

    settings = []
    values = {}
    for statement in statements:
        place = f"{file}:{statement.lineno}"
        targets = getattr(statement, "targets", [])
        if not isinstance(statement, ast.Assign) or [type(t) for t in targets] != [ast.Name]:
            raise UserError(f"{place}: a config file holds only lines like key = value")
        key = targets[0].id
        if key in values:
            raise UserError(f"{place}: {key} is set twice; remove one")
        try:
            values[key] = eval(compile(ast.Expression(statement.value), file, "eval"), values)
        except (Exception, SystemExit) as e:
            reason = " ".join(str(e).split())[:300]
            raise UserError(f"{place}: {key}: {type(e).__name__}: {reason}") from None
        settings.append((place, key, values[key]))
    return settings
