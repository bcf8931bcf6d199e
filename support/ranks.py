"""Ranks: what the processes that torchrun starts say to each other, and how they end."""
import atexit
import functools
import gc
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from configurator import UserError
from support.preparing import num_cores

# ---- what ranks say to each other
#
# torchrun starts this program once for each GPU. Each of these processes is a rank; all of them run
# the same code, and meet in collective operations. Two rules keep them from waiting for each other
# for ever:
#
#     1. All ranks call the same collectives in the same order. So there is none inside an
#        `if RANK == 0:`, and an error of one rank is made known to all (sync_errors).
#     2. What decides where the code goes (resume? evaluate? stop?) is the same on all ranks: it
#        follows from the config and the step, or it is exchanged first.
#
# Objects and flags are exchanged over gloo, between CPUs, so that no rank has to wait until its GPU
# is idle. Gradients and losses are exchanged over NCCL, between GPUs. Without torchrun there is one
# rank, and all these functions return at once.

RANK = int(os.environ.get("RANK", 0))                # number of this process among all
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))    # its number among those of its machine
WORLD = int(os.environ.get("WORLD_SIZE", 1))         # how many processes there are


def pick_device(c) -> torch.device:
    """The device that the config names. "cuda" is another GPU for each rank of a machine."""
    name = c.device
    has_mps = torch.backends.mps.is_available()
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if has_mps else "cpu"
    if name == "mps":
        if not has_mps:
            raise UserError("device=mps is the GPU of a Mac, and PyTorch finds none; give "
                            "--device=auto")
        if WORLD > 1 or c.precision not in ("auto", "fp32"):
            raise UserError("device=mps computes in fp32, in one process; give --precision=fp32 "
                            "without torchrun, or --device=cpu")
        return torch.device("mps")
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    elif name.startswith("cuda:") and WORLD > 1:
        raise UserError(f"device={c.device} is one GPU, for {WORLD} processes; give --device=cuda")
    if not re.fullmatch(r"cpu|cuda:\d{1,3}", name):
        raise UserError(f"device={c.device} must be auto, cpu, mps, cuda or cuda:1, cuda:2, ...")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:  # there is no such device
        raise UserError(f"device={c.device}: {str(e).splitlines()[0]}") from None


ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}


def let_segments_grow() -> None:
    """Have PyTorch take the GPU's memory in segments that can grow. In segments of fixed size much
    of it fits no new tensor: a step whose tensors needed 126 of 140 GiB ran out of memory. What
    the user has set in the environment stays."""
    if not ALLOCATOR_SETTINGS & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def init_distributed(device: torch.device, timeout_seconds: int, even_alone: bool) -> None:
    """Form a process group with the other ranks. even_alone: also where there is one rank."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        let_segments_grow()

    timeout = timedelta(seconds=timeout_seconds)
    if WORLD > 1:
        check_started_by_torchrun()
        # Ranks find each other's addresses in a key-value store. When torchrun restarts them, the
        # store still has the addresses of the ranks that are gone; the prefix hides those.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=dist.PrefixStore(attempt, store),
                                rank=RANK, world_size=WORLD)
    elif even_alone and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0,
                                world_size=1)
        atexit.register(dist.destroy_process_group)


def check_started_by_torchrun() -> None:
    """UserError if WORLD_SIZE was set by something other than torchrun."""
    missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise UserError(f"WORLD_SIZE={WORLD} is set, but not {', '.join(sorted(missing))}; start "
                        "the program with torchrun, or unset WORLD_SIZE")


@functools.cache
def slow_group():
    """A second process group of all ranks, with a timeout of 30 days. While one rank prepares data
    or writes a checkpoint, which may take hours, the others wait and must not give up."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def all_gather_object(value) -> list:
    """The values of all ranks, on all of them: to compare or join what each of them has."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value, group=slow_group())
    return values


def broadcast_object(value):
    """Rank 0's value, on all ranks: for what one rank finds out and all must agree on. (All values
    are gathered, which is simple and costs nothing, as they are small.)"""
    return all_gather_object(value)[0]


def barrier() -> None:
    """Wait until all ranks have come to this call."""
    all_gather_object(None)


def sync_errors(fn, *args):
    """fn(*args) -> its result. All ranks call this. An OSError or UserError of one is raised on
    all, so that none waits for a rank that has given up."""
    result = None
    error = None
    try:
        result = fn(*args)
    except UserError as e:
        error = e
    except OSError as e:
        error = e
        if WORLD > 1 and type(e).__module__ != "builtins":
            # That of a library may hold a connection, which cannot be sent to the other ranks.
            error = OSError(str(e))

    for rank_error in all_gather_object(error):
        if rank_error is not None:
            raise rank_error
    return result


def rank0_only(fn, *args):
    """fn(*args), which only rank 0 calls -> its result, or its error, on all ranks."""
    def call():
        return fn(*args) if RANK == 0 else None

    return broadcast_object(sync_errors(call))


def on_all_cores(fn, *args):
    """fn(*args) -> its result, in as many threads as there are cores. torchrun lets a rank have one
    thread, so that the ranks share the cores; but while they wait for one, all are free."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    try:
        return fn(*args)
    finally:
        torch.set_num_threads(threads)


def rank0_first(fn):
    """fn() -> its result, for an fn that makes something on disk, and does nothing where that is
    there already. Rank 0 calls it; then the first rank of each machine, which makes it again only
    if its disk is another one; then all ranks, which find it there."""
    def nothing():
        return None

    sync_errors(fn if RANK == 0 else nothing)
    sync_errors(fn if LOCAL_RANK == 0 else nothing)
    return sync_errors(fn)


def all_reduce_sum(t: Tensor) -> Tensor:
    """The sum over all ranks, in place, on t's device."""
    if WORLD > 1:
        dist.all_reduce(t)
    return t


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank. The CPUs exchange it, so that no GPU has to
    finish its queue first."""
    largest = torch.tensor(flag, dtype=torch.int32)
    if WORLD > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return bool(largest)


# ---- which rows of a batch a rank has

def split_rows(rows: int, rank: int = RANK, world: int = WORLD) -> tuple[int, int, int]:
    """Deal the rows of a batch out to the ranks, one after the other -> (this rank's first row, how
    many rows it gets, how many rows each rank has after padding). For example, of 10 rows four
    ranks get 3, 3, 2 and 2, and rank 2 gets rows 2 and 6:

    >>> [split_rows(10, rank, world=4) for rank in range(4)]
    [(0, 3, 3), (1, 3, 3), (2, 2, 3), (3, 2, 3)]

    Where there are fewer rows than ranks, a rank that gets none pads with another rank's row:

    >>> [split_rows(2, rank, world=4) for rank in range(4)]
    [(0, 1, 1), (1, 1, 1), (0, 0, 1), (1, 0, 1)]
    """
    first = rank % rows
    own = len(range(rank, rows, world))
    padded = math.ceil(rows / world)
    return first, own, padded


def pad_rows(batch: tuple, own: int, padded: int) -> tuple[Tensor, ...]:
    """Pad ids, targets, ..., each (R, T), to `padded` rows, so that all ranks run the same number
    of micro-batches. The rows after the first `own` repeat the first row, with targets of -1, which
    have no loss.

    >>> ids, targets = pad_rows((torch.tensor([[5, 6]]), torch.tensor([[6, 7]])), own=1, padded=2)
    >>> ids.tolist(), targets.tolist()
    ([[5, 6], [5, 6]], [[6, 7], [-1, -1]])
    """
    tensors = []
    for t in batch:
        filling = t[:1].expand(padded - own, -1)
        tensors.append(torch.cat([t[:own], filling]))
    targets = tensors[1]
    targets[own:] = -1
    return tuple(tensors)


# ---- how a run ends

def install_signal_handlers() -> list[float]:
    """Handle SIGTERM and Ctrl-C -> a list that fills when one arrives. A second one, more than a
    second later, ends the process at once.

    To be called once the first step is done. Until then a SIGTERM should end this process: it
    kills torch.compile's workers too, and a process that handled it would wait for them for
    ever."""
    times = []

    def handler(number, frame):
        # `timeout` sends one signal to us and one to our process group.
        if times and time.monotonic() - times[0] < 1:
            return
        if times:
            os._exit(128 + number)
        times.append(time.monotonic())
        if RANK == 0:
            # Not print(), in the midst of which the signal may have come.
            os.write(1, b"stopping after this step; once more to stop at once\n")

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return times


def run_main(main) -> None:
    """Run a script's main(), on one rank or on one of many. A UserError is printed as one line,
    with exit status 1; any other exception keeps its traceback, except where nobody reads stdout
    any more, as after `| head`."""
    message = None
    # What has been imported stays until the end. Frozen, it is not searched for garbage once more
    # when Python ends, which takes 0.3 s.
    gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may not have every letter
    try:
        main()
        sys.stdout.flush()
        if WORLD > 1 and dist.is_initialized():
            barrier()
    except KeyboardInterrupt:
        message = "interrupted; run the same command to go on"
    except BrokenPipeError:
        # When Python ends it flushes stdout, which must be a file then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not {"--help", "-h"} & set(sys.argv):
            message = "the program that read the output has ended, and so does this one"
    except UserError as e:
        message = str(e)
    if WORLD > 1:
        exit_rank(message)
    if message:
        raise SystemExit(message)


def exit_rank(message: str | None) -> None:
    """End one of several ranks. When all fail in the same way, one message is enough: rank 0 prints
    it at once, and torchrun then ends the others. A rank that is still alive after 3 s has failed
    alone, and prints its own. The process group is not destroyed, as that would wait for ranks that
    are gone."""
    if message:
        if RANK != 0:
            time.sleep(3)
            message = f"rank {RANK}: {message}"
        print(message, file=sys.stderr)
    if "wandb" in sys.modules:       # which sends what is left when Python ends, but not by _exit
        sys.modules["wandb"].finish(exit_code=1 if message else 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if message else 0)
