"""What README says of the code is true of it."""
import re
from dataclasses import fields
from pathlib import Path

import eval as evaluation
import pretrain
import sft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NOT_OF_A_CONFIG = {"help", "key", "nproc_per_node", "max_restarts"}


def test_options_and_files_that_it_names_exist():
    options = set(re.findall(r"--(\w+)(?![\w-])", README)) - NOT_OF_A_CONFIG
    known = {f.name for script in (pretrain, sft, evaluation) for f in fields(script.Config)}
    assert "out_dir" in options and options <= known
    named = set(re.findall(r"\b(?:config|tests|assets)/\w+\.\w+", README)) - {"config/X.py"}
    assert "config/quickstart.py" in named and all((ROOT / name).is_file() for name in named)


def test_the_checkpoint_that_it_loads_is_there_after_the_quick_start():
    steps = re.search(r"^max_steps = (\d+)", (ROOT / "config/quickstart.py").read_text(), re.M)[1]
    assert re.findall(r"quickstart/step_(\d+)", README) == [steps]


def test_ci_runs_the_test_command():
    command = re.search(r"^ +(pip install .* python -m pytest)$", README, re.M)[1]
    assert re.search(r"grep -m1 -o '(.*)' README.md", (ROOT / ".ci/run").read_text())[1] == command
