"""The folder of a run, out_dir: which checkpoints it holds, and how one gets there whole."""
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError, one_line
from support.ranks import WORLD
from support.weights import tensor_files

# ---- which checkpoints there are
#
# A checkpoint is a folder step_N. Its state.json is written last and lists the other files, so that
# a checkpoint that is not whole can be told. `start`, in all files, is what a run starts from: a
# checkpoint's folder and the content of its state.json; or None, at step 0.

def checkpoint_steps(out: Path) -> list[int]:
    """The steps of the checkpoints in a folder, whole or damaged."""
    steps = []
    for path in out.glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdecimal() and path.name == f"step_{int(number)}":
            steps.append(int(number))
    return steps


def read_state(folder: Path) -> dict:
    """A checkpoint's state.json. UserError unless all its files are there, in full length."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (folder / name).stat().st_size != size:
                raise UserError(f"{name} is cut short")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"checkpoint {folder} is not whole ({one_line(e)})") from None
    return state


def latest_checkpoint(out: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint in out, and its state."""
    for step in sorted(checkpoint_steps(out), reverse=True):
        folder = out / f"step_{step}"
        try:
            return folder, read_state(folder)
        except UserError as e:
            print(f"{e}; passing it over")
    return None


def last_good(out: Path) -> str:
    """The end of an error message: where the run can go on from."""
    start = latest_checkpoint(out)
    return f"the last good checkpoint is {start[0]}" if start else "there is no checkpoint"


def find_checkpoint(c, out: Path) -> tuple[Path, dict] | None:
    """The checkpoint that the knob `resume` asks for, and its state; None: start at step 0."""
    if c.resume == "auto":
        return latest_checkpoint(out)

    start = None
    step = 0
    if c.resume != "no":
        folder = Path(c.resume)
        start = (folder, read_state(folder))
        step = start[1]["step"]

    # Two runs must not mix in one folder.
    newest = max(checkpoint_steps(out), default=0)
    if newest > step:
        raise UserError(f"resume={c.resume}, but {out} holds a run up to step {newest}; delete it "
                        "or give another --out_dir")
    return start


# ---- how a checkpoint gets there
#
# Everything is written into step_120.tmp and flushed to the disk (fsync). Only then the folder is
# renamed to step_120, and old checkpoints are removed. A crash before the rename leaves a
# step_120.tmp, which nobody reads and the next save removes.

def remove_temporaries(out: Path) -> None:
    for path in out.glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def finish_checkpoint(temporary: Path, folder: Path, state: dict, c) -> None:
    """Check that all files have arrived, add state.json, flush, rename."""
    try:
        tensor_files(temporary, "model")
        tensor_files(temporary / "optimizer", "state")
    except UserError as e:
        raise UserError(f"{e}; out_dir must be a folder that all machines share") from None

    sizes = {}
    for file in temporary.rglob("*"):
        if file.is_file():
            sizes[str(file.relative_to(temporary))] = file.stat().st_size
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    state = {**state, "config": asdict(c), "files": sizes, "versions": versions}
    text = json.dumps(state, indent=1) + "\n"
    (temporary / "state.json").write_text(text, encoding="utf-8")

    for path in [*temporary.rglob("*"), temporary]:
        fsync_path(path)
    # A folder of this name must be damaged; otherwise the run would have resumed from it.
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    fsync_path(folder.parent)


def fsync_path(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove_old_checkpoints(out: Path, step: int, c) -> None:
    """Keep the last c.keep_last up to this step, and multiples of c.keep_every."""
    steps = sorted(s for s in checkpoint_steps(out) if s <= step)
    for old in steps[:-c.keep_last]:
        if not c.keep_every or old % c.keep_every:
            shutil.rmtree(out / f"step_{old}", ignore_errors=True)


# ---- what the environment does to a run

@contextmanager
def safetensors_errors():
    """safetensors has an exception of its own for a full disk and the like: make it an OSError."""
    from safetensors import SafetensorError
    try:
        yield
    except SafetensorError as e:
        raise OSError(str(e)) from None


def check_writable(out: Path) -> None:
    """UserError unless out is a folder that can be written, or made. Makes nothing."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{out} cannot be written; give another --out_dir")


@contextmanager
def friendly_errors(c, out: Path):
    """Make a UserError of what the environment does to a run: too little memory, a full disk, a
    lost rank. Errors of our code keep their traceback."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory; halve --micro_batch_tokens={c.micro_batch_tokens}, or "
                        "raise --activation_checkpoint_layers") from None
    except OSError as e:
        raise UserError(f"{e.filename or out}: {one_line(e)}") from None
    except RuntimeError as e:
        if WORLD == 1 or not re.search("gloo|NCCL|Connection|[Tt]imed out", str(e)):
            raise
        raise UserError(f"lost touch with another rank ({one_line(e)}); {last_good(out)}") from None
