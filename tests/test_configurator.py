"""How a config is built, what it refuses, and what it says about itself."""
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from configurator import (RENAMED_KEYS, Count, Fraction, NonNegative, UserError, coerce, load, save,
                          split_argv)


@dataclass
class Shape:
    """What a model looks like."""
    width: Count = 256              # of the residual stream
    ratio: Fraction = 0.5

    def area(self):
        return self.width**2


@dataclass
class Config(Shape):
    """What a run may change."""
    lr: NonNegative = 4e-4          # peak learning rate
    max_steps: Count = 100
    seq_len: Count | list = 128
    decay: Literal["linear", "cosine"] = "linear"
    stage: Literal[1, 2] = 1
    out_dir: str | None = None
    name: str = "a # in a string"
    tag: str | int | dict = ""
    seed: int = 1337
    sources: dict = field(default_factory=lambda: {"english": "builtin:stdlib"})
    compile: bool = False
    qk_clip_threshold: NonNegative = 100.0


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """An empty working directory with a config folder."""
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()


def refused(argv, *words):
    """Loading argv is a user's mistake, told in one line that contains the words."""
    with pytest.raises(UserError) as e:
        load(Config, argv)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 1000
    for word in words:
        assert word in str(e.value)


# ---- values

@pytest.mark.parametrize("option, value", [
    ("--lr=1", 1.0), ("--lr=1e-3", 1e-3), ("--ratio=1", 1.0), ("--seed=-5", -5), ("--width=2", 2),
    ("--seq_len=1", 1), ("--seq_len=[1, 2]", [1, 2]), ("--seq_len=(1, 2)", [1, 2]),
    ("--decay=cosine", "cosine"), ("--stage=2", 2),
    ("--out_dir=None", None), ("--out_dir=3", "3"), ("--out_dir=a=b", "a=b"), ("--out_dir=", ""),
    ("--name=None", "None"), ("--name='q'", "'q'"), ("--name=true", "true"), ("--name=[", "["),
    ("--tag=7", 7), ("--tag={'a': 1}", {"a": 1}), ("--tag=7b", "7b"), ("--tag='7'", "'7'"),
    ("--compile", True), ("--compile=true", True), ("--compile=False", False),
])
def test_a_value_is_read_as_its_type(option, value):
    key = option[2:].split("=")[0]
    config = load(Config, [option])
    assert repr(getattr(config, key)) == repr(value)  # 1 == 1.0 == True, but their reprs differ
    assert config.where_set == {**dict.fromkeys(asdict(Config()), "default"), key: "command line"}


def test_file_over_default_and_command_line_over_file():
    Path("config/x.py").write_text("# test_configurator.py: small\nmax_steps = 2**20\n"
                                   "width = 8\nlr = 1\nseq_len = (width, 2 * width)\n")
    c = load(Config, ["--width=16", "config/x.py"])
    assert (c.max_steps, c.width, c.seq_len, c.seed) == (2**20, 16, [8, 16], 1337)
    assert repr(c.lr) == "1.0"
    assert c.where_set["max_steps"] == "config/x.py:2"
    assert c.where_set["seq_len"] == "config/x.py:5"
    assert c.where_set["width"] == "command line"
    assert c.where_set["seed"] == "default"


def test_the_default_file_is_read_only_where_no_other_is_given():
    Path("config/x.py").write_text("lr = 1.0\n")
    Path("config/y.py").write_text("seed = 2\n")
    assert load(Config, [], default_file="config/y.py").seed == 2
    assert load(Config, ["config/x.py"], default_file="config/y.py").seed == 1337
    assert split_argv(["--seed=1", "-h"], "config/y.py") == ("config/y.py", ["--seed=1"])


# ---- mistakes

@pytest.mark.parametrize("option", [
    "--max_steps=abc", "--max_steps=1e6", "--max_steps=True", "--max_steps=0", "--ratio=1.5",
    "--lr=nan", "--lr=1e999", "--lr=None", "--lr", "--name", "--compile=1", "--seq_len=0",
    "--seq_len=x", "--seq_len=[1e999]", "--sources={'a': {1}}", "--sources=[1]", "--decay=lin",
    "--stage=True", "--seed=1+1", "--name=a\udc80", "--name=a\0b", "--max_steps=" + "9" * 5000,
])
def test_a_value_that_does_not_fit_its_type_is_refused(option):
    key = option[2:].split("=")[0]
    refused([option], "command line", key)


def test_a_number_out_of_bounds_is_told_its_bounds():
    refused(["--ratio=1.5"], "0 <= float <= 1")
    refused(["--max_steps=0"], "int >= 1")


def test_an_unknown_key_is_answered_with_the_likely_one():
    refused(["--learning=1"], "command line", "'learning'", "--help")
    refused(["--max-steps=1"], "'max-steps'", "'max_steps'")
    refused(["--tau=1"], "'tau'", "'qk_clip_threshold'")


def test_an_old_name_is_not_offered_where_the_new_one_does_not_exist():
    assert RENAMED_KEYS["shots"] == "num_fewshot"
    with pytest.raises(UserError) as e:
        load(Config, ["--shots=5"])
    assert "num_fewshot" not in str(e.value)


@pytest.mark.parametrize("argv", [
    ["-lr=1"], ["--lr=1", "--lr=2"], ["lr=1"], ["config"], ["config/tiny.py", "config/tiny.py"],
])
def test_a_command_line_of_another_form_is_refused(argv):
    Path("config/tiny.py").write_text("lr = 1\n")
    refused(argv, argv[-1])
    refused(["tiny"], "config/tiny.py")


@pytest.mark.parametrize("text, words", [
    ("# sft.py: stage 1\nlr = 1", ["sft.py", "test_configurator.py"]),
    ("# a comment\n\nmax_stesp = 1", ["config/x.py:3", "'max_stesp'", "'max_steps'"]),
    ("lr = 1\nlr = 1", ["config/x.py:2", "lr"]),
    ("lr = 1\nmax_steps = 2.0", ["config/x.py:2", "max_steps", "2.0"]),
    ("lr = float('nan')", ["config/x.py:1", "lr", "nan"]),
    ("sources = 50 * [1]", ["config/x.py:1", "sources"]),
    ("\nlr = (1", ["config/x.py:2"]),
    ("lr = 1\nseed = rl", ["config/x.py:2", "seed", "rl"]),
    ("\n\nseed = 1 / 0", ["config/x.py:3", "ZeroDivisionError"]),
    ("import os", ["config/x.py:1"]),
    ("lr = exit()", ["config/x.py:1", "lr", "SystemExit"]),
    ("lr = " + "-" * 20_000 + "1", ["nested"]),
    ("lr = " + "1+" * 20_000 + "1", ["nested"]),
    ("seed = 10**5000", ["config/x.py:1", "seed"]),
    ("x" * 20_000 + " = 1", ["unknown key"]),
    ("lr = 1\nlr += 1", ["config/x.py:2"]),
    ("seed, stage = 1, 2", ["config/x.py:1"]),
    ("seed = stage = 1", ["config/x.py:1"]),
    ("tag = {}\ntag['a'] = 1", ["config/x.py:2"]),
])
def test_a_bad_file_is_refused_by_file_and_line(text, words):
    Path("config/x.py").write_text(text)
    refused(["config/x.py"], "config/x.py", *words)


def test_a_file_that_is_not_text_and_a_default_that_is_missing_are_refused():
    Path("config/x.py").write_bytes(b"\x80\x00")
    refused(["config/x.py"], "config/x.py")
    with pytest.raises(UserError, match="config/y.py"):
        load(Config, [], default_file="config/y.py")


def test_a_default_of_the_wrong_type_is_refused():
    @dataclass
    class Wrong(Config):
        lr: float = "fast"

    with pytest.raises(UserError, match="lr"):
        load(Wrong, [])


def test_coerce_keeps_bool_int_and_float_apart():
    for hint, value in ((int, True), (bool, 1), (int, 2.0), (str, None), (Literal[1], True)):
        with pytest.raises(UserError):
            coerce(hint, value)


# ---- help and file

def test_help_shows_every_key_with_its_comment_and_what_was_set_where(capsys):
    Path("config/x.py").write_text("\nlr = 1\n")
    with pytest.raises(SystemExit) as e:
        load(Config, ["config/x.py", "--width=8", "--help"], about="What a tool does.")
    assert not e.value.code

    told = capsys.readouterr().out
    for key in asdict(Config()):
        assert f"    {key}: " in told
    assert told.startswith("What a tool does.\n\n") and "# peak learning rate" in told
    assert "def area" not in told
    assert told.splitlines()[-2:] == ["width = 8  # command line", "lr = 1.0  # config/x.py:2"]


def test_save_writes_json_and_replaces_in_one_step(monkeypatch):
    config = load(Config, ["--seq_len=(1, 2)"])
    save(config, "c.json")
    assert json.loads(Path("c.json").read_text()) == asdict(config)
    assert sorted(os.listdir()) == ["c.json", "config"]

    def crash(*_):
        raise KeyboardInterrupt

    before = Path("c.json").read_text()
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(load(Config, ["--seed=1"]), "c.json")
    assert Path("c.json").read_text() == before
