"""Every message that configurator.py can print, every reading of a value, and what --help tells."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

import configurator
from configurator import load, save

TRAIN = '''
import sys
from dataclasses import dataclass, field
from typing import Literal
from configurator import Count, Fraction, NonNegative, load

@dataclass
class Shape:
    """What a model looks like."""
    width: Count = 256              # of the residual stream,
                                    # in numbers
    # a remark on the next key
    ratio: Fraction = 0.5

@dataclass
class Config(Shape):
    """What a run may change."""
    lr: NonNegative = 4e-4          # peak learning rate; "#" may stand here
    max_steps: Count = 100
    seq_len: Count | list = 128
    decay: Literal["linear", "cosine"] = "linear"
    stage: Literal[1, 2] = 1
    out_dir: str | None = None
    name: str = "a # in a string"   # of the run
    tag: str | int | dict = ""
    seed: int = 1337
    sources: dict = field(default_factory=lambda: {"english": "builtin:stdlib", "code": "x" * 99})
    compile: bool = False

@dataclass
class Longer(Config):
    """The same, longer."""
    lr: float = 0.1

if __name__ == "__main__":
    print(load(Config, sys.argv[1:]).lr)
'''


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """A working directory with a script of its own and a config folder."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    Path("config").mkdir()


@pytest.fixture
def Config(room, monkeypatch):
    spec = importlib.util.spec_from_file_location("train", "train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train", module)
    spec.loader.exec_module(module)
    return module.Config


def run(*command):
    root = Path(configurator.__file__).parent
    return subprocess.run([sys.executable, *command], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(root)})


@pytest.mark.parametrize("option, value", [
    ("--lr=1", 1.0), ("--lr=1e-3", 1e-3), ("--lr=0", 0.0), ("--ratio=1", 1.0), ("--seed=-5", -5),
    ("--seq_len=1", 1), ("--seq_len=[1, 2]", [1, 2]), ("--seq_len=(1, 2)", [1, 2]),
    ("--decay=cosine", "cosine"), ("--stage=2", 2),
    ("--out_dir=None", None), ("--out_dir=3", "3"), ("--out_dir=a=b", "a=b"), ("--out_dir=", ""),
    ("--name=None", "None"), ("--name='q'", "'q'"), ("--name=true", "true"), ("--name=[", "["),
    ("--tag=7", 7), ("--tag={'a': 1}", {"a": 1}), ("--tag=7b", "7b"), ("--tag='7'", "'7'"),
    ("--sources={'a': (1, None)}", {"a": (1, None)}), ("--width=2", 2),
    ("--compile", True), ("--compile=true", True), ("--compile=True", True),
    ("--compile=false", False),
])
def test_a_value_is_read_as_its_type(Config, option, value):
    key = option[2:].split("=")[0]
    config = load(Config, [option])
    assert repr(getattr(config, key)) == repr(value)  # 1 == 1.0 == True, but their reprs differ
    assert config.came_from == {**dict.fromkeys(asdict(Config()), "default"), key: "command line"}


@pytest.mark.parametrize("argv, message", [
    (["--learning=1"], "--learning=1: unknown key 'learning'; --help lists all keys"),
    (["--max-steps=1"], "--max-steps=1: unknown key 'max-steps'; did you mean 'max_steps'?"),
    (["--max_step"], "--max_step: unknown key 'max_step'; did you mean 'max_steps'?"),
    (["--max_steps=abc"], "--max_steps=abc: max_steps must be int, not str ('abc')"),
    (["--max_steps=1e6"], "--max_steps=1e6: max_steps must be int, not float (1000000.0)"),
    (["--max_steps=True"], "--max_steps=True: max_steps must be int, not bool (True)"),
    (["--max_steps=-5"], "--max_steps=-5: max_steps must be at least 1, not -5"),
    (["--ratio=1.5"], "--ratio=1.5: ratio must be at most 1, not 1.5"),
    (["--lr=nan"], "--lr=nan: lr must be float, not str ('nan')"),
    (["--lr=1e999"], "--lr=1e999: lr must be finite and plain as JSON is, not inf"),
    (["--lr=1" + 400 * "0"], f"--lr=1{400 * '0'}: lr int too large to convert to float"),
    (["--seed=1+1"], "--seed=1+1: seed must be int, not str ('1+1')"),
    (["--lr=None"], "--lr=None: lr must be float, not NoneType (None)"),
    (["--compile=1"], "--compile=1: compile must be bool, not int (1)"),
    (["--seq_len=0"], "--seq_len=0: seq_len must be at least 1, not 0"),
    (["--seq_len=x"], "--seq_len=x: seq_len must be int >= 1 | list, not str ('x')"),
    (["--seq_len=[1e999]"],
     "--seq_len=[1e999]: seq_len must be finite and plain as JSON is, not [inf]"),
    (["--sources={'a': {1}}"],
     "--sources={'a': {1}}: sources must be finite and plain as JSON is, not {'a': {1}}"),
    (["--sources=[1]"], "--sources=[1]: sources must be dict, not list ([1])"),
    (["--decay=lin"], "--decay=lin: decay must be one of 'linear', 'cosine', not 'lin'"),
    (["--stage=True"], "--stage=True: stage must be one of 1, 2, not True"),
    (["--lr"], "--lr needs a value: --lr=..."),
    (["--name"], "--name needs a value: --name=..."),
    (["-lr=1"], "-lr=1: options have two dashes, as in --key=value"),
    (["--lr=1", "--lr=2"], "--lr=2: --lr is set twice; remove one"),
    (["lr=1"], "lr=1 is not a file; options are --key=value"),
    (["tiny"], "tiny is not a file; did you mean config/tiny.py?"),
    (["config"], "config is not a file; options are --key=value"),
    (["config/tiny.py", "train.py"],
     "config/tiny.py train.py: at most one config file; options are --key=value"),
])
def test_a_bad_command_line_says_what_and_where(Config, argv, message):
    Path("config/tiny.py").write_text("lr = 1\n")
    with pytest.raises(SystemExit) as e:
        load(Config, argv)
    assert e.value.code == message


@pytest.mark.parametrize("text, message", [
    ("# sft.py: stage 1\nlr = 1", "config/x.py belongs to sft.py, not to train.py"),
    ("# a comment\n\nmax_stesp = 1",
     "config/x.py:3: unknown key 'max_stesp'; did you mean 'max_steps'?"),
    ("lr = 1\nlr = 1", "config/x.py:2: lr is set twice; remove one"),
    ("lr = 1\nmax_steps = 2.0", "config/x.py:2: max_steps must be int, not float (2.0)"),
    ("lr = float('nan')", "config/x.py:1: lr must be finite and plain as JSON is, not nan"),
    ("compile = 1", "config/x.py:1: compile must be bool, not int (1)"),
    ("stage = '1'", "config/x.py:1: stage must be one of 1, 2, not '1'"),
    ("name = 3", "config/x.py:1: name must be str, not int (3)"),
    ("name = print",
     "config/x.py:1: name must be str, not builtin_function_or_method (<built-in function print>)"),
    ("sources = 50 * [1]", "config/x.py:1: sources must be dict, not list "
     "([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ...)"),
    ("\nlr = (1", "config/x.py:2: '(' was never closed"),
    ("lr = 1\nseed = rl", "config/x.py:2: NameError: name 'rl' is not defined"),
    ("\n\nseed = 1 / 0", "config/x.py:3: ZeroDivisionError: division by zero"),
    *[(f"lr = 1\n{line}", "config/x.py:2: a config file holds only lines like key = value")
      for line in ("import os", "lr += 1", "seed, stage = 1, 2", "seed = stage = 1",
                   "seed: int = 1", "if True: seed = 1", "del lr", "print(lr)", "tag['a'] = 1",
                   "'late'")],
])
def test_a_bad_file_says_what_and_on_which_line(Config, text, message):
    Path("config/x.py").write_text(text)
    with pytest.raises(SystemExit) as e:
        load(Config, ["config/x.py"])
    assert e.value.code == message


def test_a_binary_file_and_a_missing_default_are_one_line(Config):
    Path("config/x.py").write_bytes(b"\x80\x00")
    with pytest.raises(SystemExit, match="^config/x.py:1: 'utf-8' codec can't decode .*$"):
        load(Config, ["config/x.py"])
    with pytest.raises(SystemExit, match="^config/y.py is not a file; options are --key=value$"):
        load(Config, [], default_file="config/y.py")


def test_file_over_default_and_command_line_over_file(Config):
    Path("config/x.py").write_text('# train.py: small\n"""Why."""\nmax_steps = 2**20\n'
                                   "width = 8\nlr = 1\nseq_len = (width, 2 * width)\n")
    Path("config/y.py").write_text("# 3 words\nseed = 2\n")
    c = load(Config, ["--width=16", "config/x.py"], default_file="config/y.py")
    assert (c.max_steps, c.width, c.seq_len, c.seed) == (2**20, 16, [8, 16], 1337)
    assert repr(c.lr) == "1.0"
    assert (c.came_from["max_steps"], c.came_from["seq_len"]) == ("config/x.py:3", "config/x.py:6")
    assert (c.came_from["width"], c.came_from["seed"]) == ("command line", "default")
    assert load(Config, [], default_file="config/y.py").seed == 2


def test_help_tells_value_type_comment_and_source_of_every_key(Config, capsys):
    Path("config/x.py").write_text("# train.py: small\n\nlr = 1\n")
    with pytest.raises(SystemExit) as e:
        load(Config, ["config/x.py", "--width=8", "--help"])
    assert not e.value.code
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "usage: python train.py [config/X.py] [--key=value ...]", "",
        "Shape: What a model looks like.",
        "width = 8 int >= 1 of the residual stream, in numbers (command line; default 256)",
        "ratio = 0.5 0 <= float <= 1 (default)",
        "",
        "Config: What a run may change.",
        'lr = 1.0 float >= 0 peak learning rate; "#" may stand here '
        "(config/x.py:3; default 0.0004)",
        "max_steps = 100 int >= 1 (default)",
        "seq_len = 128 int >= 1 | list (default)",
        "decay = 'linear' 'linear' | 'cosine' (default)",
        "stage = 1 1 | 2 (default)",
        "out_dir = None str | None (default)",
        "name = 'a # in a string' str of the run (default)",
        "tag = '' str | int | dict (default)",
        "seed = 1337 int (default)",
        "sources = {'english': 'builtin:stdlib', 'code':... dict (default)",
        "compile = False bool (default)",
    ]


def test_help_lists_an_overridden_key_once_with_its_first_comment(Config, capsys):
    with pytest.raises(SystemExit):
        load(sys.modules["train"].Longer, ["-h"])
    said = capsys.readouterr().out
    assert said.count("lr = ") == 1 and said.index("lr = 0.1 ") < said.index("Longer: ")
    assert 'peak learning rate; "#" may stand here (default)' in said


def test_defaults_are_checked(Config):
    @dataclass
    class Wrong(Config):
        lr: float = "fast"

    with pytest.raises(SystemExit, match=r"^default: lr must be float, not str \('fast'\)$"):
        load(Wrong, [])


def test_save_writes_json_and_replaces_in_one_step(Config, monkeypatch):
    config = load(Config, ["--seq_len=(1, 2)"])
    save(config, "c.json")
    assert json.loads(Path("c.json").read_text()) == asdict(config)
    assert not list(Path().glob("c.json?*"))

    def crash(*_):
        raise KeyboardInterrupt

    before = Path("c.json").read_text()
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(load(Config, ["--seed=1"]), "c.json")
    assert Path("c.json").read_text() == before


def test_a_script_ends_with_code_1_one_line_and_no_traceback():
    Path("config/x.py").write_text("# train.py: small\nlr = 0.5\n")
    good, bad = run("train.py", "config/x.py"), run("train.py", "config/x.py", "--lr=fast")
    assert (good.returncode, good.stdout, good.stderr) == (0, "0.5\n", "")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == "--lr=fast: lr must be float, not str ('fast')\n"
    assert run("train.py", "-h").stdout.startswith("usage: python train.py ")


def test_configurator_prints_the_config_of_the_script_that_the_file_names():
    shutil.copy(configurator.__file__, ".")
    Path("model.py").write_text("")
    Path("config/x.py").write_text("# train.py: small\nlr = 0.5\n")
    printed = json.loads(run("configurator.py", "config/x.py", "--seed=3").stdout)
    assert (printed["lr"], printed["seed"], printed["width"]) == (0.5, 3, 256)
    for script in ("absent.py", "model.py"):
        Path("config/y.py").write_text(f"# {script}: small\n")
        bad = run("configurator.py", "config/y.py")
        assert (bad.returncode, bad.stdout) == (1, "")
        problem = "does not exist or has no Config"
        assert bad.stderr == f"config/y.py: its script {script} {problem}\n"
