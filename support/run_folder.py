"""The folder of a run, out_dir: one run at a time, seen by all ranks, with whole checkpoints."""
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

from configurator import UserError, one_line
from support.ranks import (RANK, WORLD, all_gather_object, barrier, rank0_only,
                           sync_errors)
from support.weights import checksum, tensor_files

# ---- one run at a time, in a folder that all ranks see
#
# Rank 0 holds a lock (flock) on the file out_dir/lock as long as the run lasts. The kernel frees it
# when the process ends, however that happens, so a run that was killed locks nobody out. The text
# in the file is for people, who want to know which run holds the lock; and a random number in it
# tells the other ranks whether the file that they see is the one that rank 0 has written.

@contextmanager
def lock_folder(out: Path):
    """Make the folder, and let no other run into it until the end of the `with`. UserError if there
    is one already."""
    if RANK != 0:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open_locked(out)
    except OSError as e:
        raise UserError(f"{out} cannot be written ({one_line(e)}); give another "
                        "--out_dir") from None
    try:
        yield
    finally:
        (out / "lock").unlink(missing_ok=True)
        file.close()
        with suppress(OSError):      # the folder goes if it is empty: a mistake in the config, say
            out.rmdir()


def open_locked(out: Path):
    """Open and lock out/lock, and write into it who this is -> the file, which must stay open."""
    while True:
        file = open(out / "lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.readline().strip() or "another run"
            raise UserError(f"{out} is in use by {holder}; end that run or give another "
                            "--out_dir") from None
        except OSError:
            pass                     # this file system has no locks: go on without
        if os.fstat(file.fileno()).st_nlink > 0:
            break
        file.close()                 # a run that has just ended has removed this file: once more

    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(16)}\n")
    file.flush()
    os.fsync(file.fileno())
    return file


def check_shared(out: Path) -> None:
    """UserError unless all ranks see the lock that rank 0 holds. They write the files of a
    checkpoint together, so out_dir must be one folder on all machines."""
    barrier()
    seen = None
    with suppress(OSError):
        seen = (out / "lock").read_text(encoding="utf-8")
    for rank, (text, host) in enumerate(all_gather_object((seen, socket.gethostname()))):
        if rank == 0:
            expected = text
        elif text != expected:
            raise UserError(f"{out} of rank {rank}, on {host}, is not the folder of rank 0; "
                            "--out_dir must be a folder that all machines share")


# ---- which checkpoints there are
#
# A checkpoint is a folder step_N. Its state.json is written last and lists the other files with
# their sizes, so that read_state can tell if one is missing or was cut short. Flipped bits are
# found later, by check_files, when a run loads the checkpoint. `start`, in all files, is the
# Checkpoint that a run starts from; or None, at step 0.

class Checkpoint(NamedTuple):
    folder: Path
    state: dict         # the content of its state.json


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
        check_state(state)
        for name, size in state["files"].items():
            if (folder / name).stat().st_size != size:
                raise UserError(f"{name} has another size than it had")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"checkpoint {folder} is not whole ({one_line(e)})") from None
    return state


def check_state(state: dict) -> None:
    """UserError if a state.json has another form than finish_checkpoint gives it."""
    counts = [state.get("step", 0), state.get("skipped", 0)]
    configs = [state["config"]]
    for step, plan in state.get("plans", []):
        counts.append(step)
        configs.append(plan)
    are_counts = all(type(n) is int and n >= 0 for n in counts)
    if not are_counts or not all(isinstance(config, dict) for config in configs):
        raise UserError("its state.json has another form")


def whole_checkpoints(out: Path) -> Iterator[Checkpoint]:
    """Yield each checkpoint in out that is whole, the newest first. Those that are damaged are
    passed over, for each of which rank 0 prints a line."""
    for step in sorted(checkpoint_steps(out), reverse=True):
        folder = out / f"step_{step}"
        try:
            state = read_state(folder)
            if state.get("step", step) != step:
                raise UserError(f"checkpoint {folder} is of step {state['step']}")
        except UserError as e:
            if RANK == 0:
                print(f"{e}; passing it over")
        else:
            yield Checkpoint(folder, state)


def latest_checkpoint(out: Path) -> Checkpoint | None:
    """The newest checkpoint in out that is whole; None if there is none."""
    return next(whole_checkpoints(out), None)


def last_good(out: Path) -> str:
    """The end of an error message: where the run can go on from."""
    start = latest_checkpoint(out)
    return f"the last good checkpoint is {start.folder}" if start else "there is no checkpoint"


def find_checkpoint(c, out: Path) -> Checkpoint | None:
    """The checkpoint that the knob `resume` asks for; None: start at step 0."""
    if c.resume == "no":
        check_no_other_run(c, out, None)
        return None

    start = latest_checkpoint(out)
    # The same command, given again, goes on with the run that it has begun.
    began_here = start is not None and start.state["config"].get("resume") == c.resume
    if c.resume != "auto" and not began_here:
        start = checkpoint_at(Path(c.resume))
        check_no_other_run(c, out, start)
    elif start is None and any((out / f"step_{n}/state.json").exists()
                               for n in checkpoint_steps(out)):
        raise UserError(f"{out} holds checkpoints, and none is whole; move it away to begin again, "
                        "or give another --out_dir")

    if start:
        missing = {"step", "skipped", "data"} - start.state.keys()
        if missing:
            raise UserError(f"checkpoint {start.folder}: its state.json lacks {', '.join(missing)}")
    return start


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint in this folder, or the newest one if it is a run's folder."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path} to resume from")
    newest = latest_checkpoint(path)
    if newest is None and checkpoint_steps(path):
        raise UserError(f"{path} holds checkpoints, and none is whole; give another --resume")
    return newest or Checkpoint(path, read_state(path))


def check_no_other_run(c, out: Path, start: Checkpoint | None) -> None:
    """UserError if out has checkpoints, unless the run goes on from the newest of them: two runs
    must not mix in one folder."""
    steps = checkpoint_steps(out)
    if not steps:
        return
    newest = out / f"step_{max(steps)}"
    if start is None or start.folder.resolve() != newest.resolve():
        raise UserError(f"resume={c.resume}, but {out} holds a run up to step {max(steps)}; leave "
                        "out --resume to go on with it, or give another --out_dir for a new run")


# ---- how a checkpoint gets there
#
# Everything is written into step_120.tmp and flushed to the disk (fsync). Only then the folder is
# renamed to step_120, and old checkpoints are removed. A crash before the rename leaves a
# step_120.tmp, which nobody reads and the next save removes.

def remove_temporaries(out: Path) -> None:
    for path in out.glob("step_*.tmp"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; of a link, the link alone. What cannot be
    removed stays, with a line that says so: a run does not end for that."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as e:
        print(f"{path} could not be removed: {one_line(e)}", flush=True)


def finish_checkpoint(temporary: Path, folder: Path, state: dict, c) -> None:
    """Make a checkpoint of a folder in which the ranks have written all tensors: check that all
    files have arrived, add state.json, flush everything to the disk, and rename the folder. Rank 0
    alone calls this."""
    tensor_files(temporary, "model")
    tensor_files(temporary / "optimizer", "state")
    sizes = {name: (temporary / name).stat().st_size for name in files_in(temporary)}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    state = {**state, "config": asdict(c), "files": sizes, "versions": versions}
    text = json.dumps(state, indent=1) + "\n"
    (temporary / "state.json").write_text(text, encoding="utf-8")

    for path in [*temporary.rglob("*"), temporary]:
        fsync_path(path)
    # A folder of this name must be damaged; otherwise the run would have resumed from it.
    remove(folder)
    os.replace(temporary, folder)
    fsync_path(folder.parent)


def files_in(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, named from there."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(str(file.relative_to(folder)) for file in files)


def checksums(folder: Path) -> dict[str, int]:
    """Name -> checksum of the files in a folder, among which the ranks divide the work."""
    def of_this_rank(names: list[str]) -> dict[str, int]:
        return {name: checksum(folder / name) for name in names[RANK::WORLD]}

    found = {}
    mine = sync_errors(of_this_rank, rank0_only(files_in, folder))
    for rank_checksums in all_gather_object(mine):
        found.update(rank_checksums)
    return found


def check_files(folder: Path) -> None:
    """UserError if the files of a checkpoint are not those that were written. All ranks call this,
    and each checks some of the files: an error is that of one rank, and the caller makes it known
    to the others (sync_errors). An older checkpoint has no checksums."""
    expected = read_state(folder).get("checksums", {})
    for name in sorted(expected)[RANK::WORLD]:
        if checksum(folder / name) != expected[name]:
            raise UserError(f"checkpoint {folder} is damaged: the checksum of {name} is another")


def fsync_path(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old_checkpoints(out: Path, step: int, c) -> None:
    """Remove what is older than the last c.keep_last whole checkpoints up to this step, but not
    checkpoints at multiples of c.keep_every."""
    steps = sorted(s for s in checkpoint_steps(out) if s <= step)
    kept = [s for s in steps if is_whole(out / f"step_{s}")][-c.keep_last:]
    if len(kept) < c.keep_last:
        return
    for old in steps:
        is_multiple = c.keep_every and old % c.keep_every == 0
        if old < kept[0] and not is_multiple:
            remove(out / f"step_{old}")


def is_whole(folder: Path) -> bool:
    """Whether all files of a checkpoint are there, in full length."""
    try:
        read_state(folder)
    except UserError:
        return False
    return True


# ---- what the environment does to a run

def is_out_of_memory(e: RuntimeError) -> bool:
    """Whether a tensor had no room. CUDA has an exception for that, a CPU and MPS a text."""
    is_cuda = isinstance(e, torch.OutOfMemoryError)
    return is_cuda or bool(re.search("can't allocate memory|MPS backend out of memory", str(e)))


@contextmanager
def friendly_errors(c, out: Path):
    """Make a UserError of what the environment does to a run: of too little memory, of a lost rank,
    and of any OSError, such as a full disk. Other exceptions keep their traceback."""
    try:
        yield
    except BrokenPipeError:
        raise                       # run_main knows what to say
    except OSError as e:
        raise UserError(f"{e.filename or out}: {one_line(e)}") from None
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise UserError(f"out of memory; halve --micro_batch_tokens={c.micro_batch_tokens}, or "
                            "raise --activation_checkpoint_layers") from None
        if WORLD == 1 or not re.search("gloo|NCCL|Connection|[Tt]imed out", str(e)):
            raise
        raise UserError(f"lost touch with another rank ({one_line(e)}); {last_good(out)}") from None
