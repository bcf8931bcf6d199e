"""Configuration: typed defaults, then a config file, then --key=value; one checked instance.

    c = load(Config, sys.argv[1:])      Config: a dataclass, a default and a comment for each key
    c.lr, c.came_from["lr"]             0.001, "config/tiny.py:7" (or "default" or "command line")
    save(c, "out/config.json")

File and command line follow the same rules: an unknown key, a wrong type, a value out of bounds or
a key set twice ends the program with one line that says where, what and what to do.
`python configurator.py config/X.py --key=value` prints the merged config as save writes it.
"""
import ast
import difflib
import inspect
import json
import os
import re
import tokenize
from contextlib import suppress
from dataclasses import asdict, fields
from math import inf
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

class UserError(ValueError):
    """A mistake of the user, not of the code. Its text is one line: what happened; what to do. The
    scripts print that line and exit with status 1; any other exception keeps its traceback."""


def one_line(e: Exception) -> str:
    """The text of any exception on one line, with the exception's type in front unless it is a
    plain ValueError or a UserError, whose texts are written for users."""
    text = " ".join(str(getattr(e, "strerror", None) or e).split())[:300]
    return text if type(e) in (ValueError, UserError) else f"{type(e).__name__}: {text}"


Count = Annotated[int, 1]            # the metadata are the bounds, both included: at least 1
Size = Annotated[int, 0]
NonNegative = Annotated[float, 0]
Fraction = Annotated[float, 0, 1]    # at least 0, at most 1


def load(Config: type, argv: list[str], default_file: str | None = None) -> Any:
    """A Config of its defaults, then the file in argv (or default_file), then argv's options. Its
    attribute came_from, which is no field, says where each value is from; --help prints that and
    exits. SystemExit with one line for whatever is wrong."""
    owner, types = Path(inspect.getfile(Config)).name, get_type_hints(Config, include_extras=True)
    hints = {field.name: types[field.name] for field in fields(Config)}
    file, options = split_argv(argv, default_file)
    script, settings = read_file(file) if file else (owner, [])
    if script not in (owner, None):
        raise UserError(f"{file} belongs to {script}, not to {owner}")
    settings = [("default", key, value, coerce) for key, value in vars(Config()).items()] + settings
    settings += [(option, option[2:].split("=")[0], option, parse) for option in options]
    values, came_from = {}, {}
    for place, key, value, read in settings:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists all keys"
            raise UserError(f"{place}: unknown key {key!r}; {hint}")
        try:
            values[key] = read(hints[key], value)
        except (TypeError, ValueError, OverflowError) as e:
            raise UserError(f"{place}: {key} {e}") from None
        came_from[key] = "command line" if read is parse else place
    config = Config(**values)
    config.came_from = came_from
    if "--help" in argv or "-h" in argv:
        print(f"usage: python {owner} [config/X.py] [--key=value ...]" + describe(config, hints))
        raise SystemExit
    return config


def save(config: Any, path: str | Path) -> None:
    """The config as JSON, under a temporary name until it is whole."""
    Path(f"{path}.tmp").write_text(json.dumps(asdict(config), indent=1) + "\n")
    os.replace(f"{path}.tmp", path)


def split_argv(argv: list[str], default_file: str | None = None) -> tuple[str | None, list[str]]:
    """argv -> the config file, if there is one, and the options as written, without --help.
    SystemExit for a second file, a word that is no file, a single dash or a key twice."""
    files = [word for word in argv if not word.startswith("-")]
    options = [word for word in argv if word.startswith("-") and word not in ("-h", "--help")]
    if len(files) > 1:
        raise UserError(f"{' '.join(files)}: at most one config file; options are --key=value")
    file = files[0] if files else default_file
    if file and not os.path.isfile(file):
        near = f"config/{Path(file).stem}.py"
        hint = f"did you mean {near}?" if os.path.isfile(near) else "options are --key=value"
        raise UserError(f"{file} is not a file; {hint}")
    keys = [option.split("=")[0] for option in options]
    for i, key in enumerate(keys):
        if not key.startswith("--"):
            raise UserError(f"{options[i]}: options have two dashes, as in --key=value")
        if key in keys[:i]:
            raise UserError(f"{options[i]}: {key} is set twice; remove one")
    return file, options


def read_file(file: str) -> tuple[str | None, list[tuple]]:
    """A config file -> the script that its first line names, as in `# pretrain.py: a small model`,
    and settings (place, key, value, coerce). Each is `key = expression`, which may use builtins and
    the keys above it. SystemExit for any other statement, a key twice or an exception."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError(f"{file}:{getattr(e, 'lineno', 1)}: {getattr(e, 'msg', e)}") from None
    names, settings = {}, []
    for node in tree.body[ast.get_docstring(tree) is not None:]:
        place = f"{file}:{node.lineno}"
        if not isinstance(node, ast.Assign) or [*map(type, node.targets)] != [ast.Name]:
            raise UserError(f"{place}: a config file holds only lines like key = value")
        key = node.targets[0].id
        if key in names:
            raise UserError(f"{place}: {key} is set twice; remove one")
        try:
            names[key] = eval(compile(ast.Expression(node.value), file, "eval"), names)
        except Exception as e:
            raise UserError(f"{place}: {type(e).__name__}: {e}") from None
        settings.append((place, key, names[key], coerce))
    script = re.match(r"# *(\w+\.py)\b", text)
    return script and script[1], settings


def parse(hint: Any, option: str) -> Any:
    """The value of `--key=text`: a Python literal, true or false where the type admits that, else
    the text; True for a bare `--key`. Errors are those of coerce, and SystemExit for no value."""
    key, equals, text = option.partition("=")
    if not equals and bool in (hint, *get_args(hint)):
        return True
    if not equals:
        raise UserError(f"{key} needs a value: {key}=...")
    value = {"true": True, "false": False}.get(text, text)
    with suppress(Exception):  # literal_eval raises five kinds: all say that it is plain text
        literal = ast.literal_eval(text)
        value = text if isinstance(literal, str) else literal
    try:
        return coerce(hint, value)
    except TypeError:
        with suppress(TypeError):
            return coerce(hint, text)
        raise


def coerce(hint: Any, value: Any) -> Any:
    """value as the type has it: where they must be, an int is made a float and a tuple a list. Else
    TypeError or, if only its size is wrong, ValueError: "must be ..., not ..."."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        value, (low, high) = coerce(args[0], value), (*args[1:], inf)[:2]
        if not low <= value <= high:
            bound = f"least {low}" if value < low else f"most {high}"
            raise ValueError(f"must be at {bound}, not {short(value)}")
        return value
    if kind is Literal:
        if value not in args or type(value) not in map(type, args):
            raise TypeError(f"must be one of {', '.join(map(repr, args))}, not {short(value)}")
        return value
    if kind in (Union, UnionType):
        for member in args:
            with suppress(TypeError):
                return coerce(member, value)
    elif (kind, type(value)) in ((float, int), (list, tuple)):
        value = kind(value)
    if type(value) is not kind:
        raise TypeError(f"must be {show(hint)}, not {type(value).__name__} ({short(value)})")
    try:
        json.dumps(value, allow_nan=False)  # what save can write, inside lists and dictionaries too
    except (TypeError, ValueError):
        raise ValueError(f"must be finite and plain as JSON is, not {short(value)}") from None
    return value


def show(hint: Any) -> str:
    """A type as users write it: int >= 1 | list | None."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Annotated:
        name, low, *high = show(args[0]), *args[1:]
        return f"{low} <= {name} <= {high[0]}" if high else f"{name} >= {low}"
    if kind in (Union, UnionType, Literal):
        return " | ".join(map(repr if kind is Literal else show, args))
    return "None" if hint is type(None) else hint.__name__


def short(value: Any) -> str:
    """The repr, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def comments(cls: type) -> dict[str, str]:
    """Field -> its end-of-line comment and the comment lines below it that are indented deeper."""
    notes, key, lines = {}, "", iter(inspect.getsource(cls).splitlines(True))
    for token in tokenize.generate_tokens(lambda: next(lines)):
        if token.start[1] == 4 and token.type == tokenize.NAME:
            key = token.string
        elif token.start[1] > 4 and token.type == tokenize.COMMENT:
            notes[key] = (notes.get(key, "") + " " + token.string.lstrip("# ")).lstrip()
    return notes


def describe(config: Any, hints: dict[str, Any]) -> str:
    """What --help says: each key under the class that defines it, with value, type, comment, where
    the value came from and, if that is not the default, the default."""
    Config, default, text = type(config), type(config)(), ""
    # The base classes come last and win: a key that a subclass overrides stays where it began.
    home = {key: cls for cls in Config.__mro__ for key in inspect.get_annotations(cls)}
    for cls in reversed(Config.__mro__[:-1]):
        notes = comments(cls)
        text += f"\n\n{cls.__name__}: {cls.__doc__.splitlines()[0]}"
        for key in (key for key in hints if home[key] is cls):
            setting, source = f"{key} = {short(getattr(config, key))}", config.came_from[key]
            source += "" if source == "default" else f"; default {short(getattr(default, key))}"
            text += f"\n  {setting:40}  {show(hints[key]):16}  {notes.get(key, '')} ({source})"
    return text
