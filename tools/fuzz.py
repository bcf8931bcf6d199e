"""Fuzzing: damage each kind of file that this project reads, and see what reading it does.

    python -m tools.fuzz [kind ...] [--count=500] [--seed=0]

A workshop with one good example of everything is made by the commands that a user gives. Each
mutation damages one file of a copy of it, and a process of its own reads that, as a run would. It
may read the file, or refuse it by a UserError of one line. A failure is

    a traceback    any other exception, or a crash
    a hang         more than TIME_LIMIT seconds
    memory         more than MEMORY_LIMIT bytes
    outside        a file opened for writing outside the copy

Mutation i of seed s is mutation 0 of seed s + i, so that each failure can be had again, alone. A
config file is a program: a mutation that makes it compute for long, 10**30219520 say, is a hang.
"""
import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from configurator import UserError
from support.ranks import run_main
from tools.fuzz_readers import COMMANDS, KINDS, write_inputs
from tools.fuzz_mutations import damage

TIME_LIMIT = 10                 # seconds
MEMORY_LIMIT = 2**31            # bytes, beyond what the program itself takes
LONGEST_LINE = 2000             # characters of an error that is one line

OUTCOMES = ("refused", "accepted", "traceback", "hang", "memory", "outside")
EXIT_STATUS = {0: "accepted", 1: "refused", 2: "traceback", 3: "memory", 4: "outside"}


# ---- the process that reads what was damaged

def read_in_child(read, file: Path, folder: Path) -> None:
    """Read the damaged copy, and end the process with an exit status that tells the outcome."""
    os.setsid()
    os.chdir(folder)
    output = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.addaudithook(lambda event, args: end_if_outside(folder, event, args))
    limit = address_space() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    status = 0
    try:
        read(file)
    except UserError as e:
        print(str(e).encode("utf-8", "backslashreplace").decode())
        one_line = "\n" not in str(e) and len(str(e)) <= LONGEST_LINE
        status = 1 if one_line else 2
    except MemoryError:
        traceback.print_exc()
        status = 3
    except BaseException:
        traceback.print_exc()
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def address_space() -> int:
    """Bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def end_if_outside(folder: Path, event: str, args: tuple) -> None:
    """An audit hook: end the process where a file outside the folder is about to be written."""
    if event != "open" or not isinstance(args[0], (str, bytes)):
        return
    path = os.path.realpath(os.fsdecode(args[0]))
    writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if writes and not path.startswith((f"{folder}{os.sep}", "/dev/")):
        print(f"{path} was opened for writing", flush=True)
        os._exit(4)


def outcome_of(read, file: Path, folder: Path) -> str:
    """Read a damaged copy in a process of its own -> one of OUTCOMES."""
    child = os.fork()
    if child == 0:
        read_in_child(read, file, folder)
    deadline = time.monotonic() + TIME_LIMIT
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended or time.monotonic() > deadline:
            break
        time.sleep(0.005)
    try:
        os.killpg(child, signal.SIGKILL)        # and what it has started
    except ProcessLookupError:
        pass
    if not ended:
        os.wait4(child, 0)
        return "hang"
    return EXIT_STATUS.get(os.waitstatus_to_exitcode(status), "traceback")


# ---- the workshop and the table

def make_workshop(folder: Path) -> None:
    """Write good examples of all files, by the commands that a user gives."""
    write_inputs(folder)
    root = Path(__file__).parent.parent
    for command in COMMANDS:
        script, *options = command.split()
        subprocess.run([sys.executable, root / script, *options], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)


def make_copy(workshop: Path, copy: Path) -> None:
    """A fresh copy, with the files' dates, which decide where prepared data are looked for."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workshop, copy)


def files_of(kind: str, folder: Path) -> list[Path]:
    patterns, _ = KINDS[kind]
    return sorted(f for pattern in patterns for f in folder.glob(pattern) if f.is_file())


def fuzz(kind: str, workshop: Path, seed: int, count: int) -> None:
    """Try mutations of one kind, and print their row of the table. Failures with the same last line
    are one failure, which is printed with the command that shows it again."""
    _, read = KINDS[kind]
    copy = workshop.with_name("copy")
    for file in files_of(kind, workshop):
        make_copy(workshop, copy)
        if outcome_of(read, file.relative_to(workshop), copy) != "accepted":
            said = Path(f"{copy}.out").read_text(errors="replace")
            raise UserError(f"{kind}: {file.name} is not damaged, and yet not read: {said}")

    outcomes = Counter()
    failures = {}
    for i in range(count):
        make_copy(workshop, copy)
        rng = random.Random(f"{kind} {seed + i}")
        file = rng.choice(files_of(kind, copy))
        what = damage(file, rng)

        outcome = outcome_of(read, file.relative_to(copy), copy)
        outcomes[outcome] += 1
        printed = Path(f"{copy}.out").read_text(errors="replace").strip()
        if count == 1:
            print(f"{what}: {outcome}\n{printed}")
        elif outcome not in ("refused", "accepted"):
            last_line = printed.rpartition("\n")[2][:150]
            failures.setdefault((outcome, last_line), (seed + i, what))

    counts = "".join(f"{outcomes[key]:11d}" for key in OUTCOMES)
    print(f"{kind:14s} {count:9d}{counts}", flush=True)
    for (outcome, last_line), (number, what) in failures.items():
        print(f"    {outcome}: python -m tools.fuzz {kind} --seed={number} --count=1\n"
              f"        {what}: {last_line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help=", ".join(KINDS))
    parser.add_argument("--count", type=int, default=500, help="mutations of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = set(args.kinds) - KINDS.keys()
    if unknown:
        parser.error(f"unknown kinds {unknown}; known: {', '.join(KINDS)}")

    if sys.platform != "linux":
        raise UserError("the fuzzer needs Linux, where memory can be limited; run it there")

    with tempfile.TemporaryDirectory() as top:
        workshop = Path(top).resolve() / "workshop"
        workshop.mkdir()
        make_workshop(workshop)
        print(f"{'kind':14s} {'mutations':>9s}" + "".join(f"{key:>11s}" for key in OUTCOMES))
        for kind in args.kinds or KINDS:
            fuzz(kind, workshop, args.seed, args.count)


if __name__ == "__main__":
    run_main(main)
