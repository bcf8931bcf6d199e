"""Where the time of a training step goes, on a GPU.

    python -m tools.profile_step config/motif_124m.py [--key=value ...]
    torchrun --nproc_per_node=2 -m tools.profile_step config/motif2_12b.py --num_hidden_layers=6

Trains on random tokens, with rows as long as the config's first, and batches as large, but at most
four passes of each rank: so the optimizer's share may be larger than in training. Ten steps in a
row, as in training, give the time. Three more are taken apart, each part begun on an idle GPU, and
three are recorded by torch.profiler. Prints for one step, of rank 0:

    step        milliseconds
    host        how long the host takes to launch forward and backward pass, and the optimizer. It
                can be about a thousand launches ahead, and then waits for the GPU, which counts as
                launching too. If the two take nearly as long as the step, the GPU may wait instead
    GPU         how long at least one kernel ran, in all and of those that the optimizer launched
    messages    how long ranks exchanged something, and how long nothing else ran meanwhile
    kernels     by kind, with the number of launches
    gaps        the longest times of all three steps when no kernel ran
"""
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import configurator
import pretrain
from configurator import UserError
from support.ranks import RANK, WORLD, run_main

WARM_UP = 4               # steps: torch.compile and Triton compile in the first two
TIMED = 10
RECORDED = 3              # as many are taken apart
MAX_PASSES = 4            # the trace of a large batch would be too long
NUM_GAPS = 8

# The first kind of which a part is in a kernel's name; all else is "other". torch.compile's kernels
# are called triton_..., the names of cuBLAS' begin in many ways.
KINDS = {
    "messages": ("nccl",),
    "attention": ("attention_", "flex_attention"),
    "PolyNorm": ("poly_norm",),
    "differential norm": ("differential_norm",),
    "cross entropy": ("cross_entropy",),
    "symmetric products": ("symmetric_kernel",),
    "FP8 rounding": ("quantize_kernel", "absmax_kernel"),
    "products": ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitK"),
    "copies": ("Memcpy", "Memset"),
    "torch.compile": ("triton_",),
}


OPTIMIZER = "optimizer"   # the label of its step

# The trace's categories of what runs on a GPU.
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


class Event(NamedTuple):
    """Something in the trace; times in microseconds."""
    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """
    >>> kind_of("attention_dkdv_kernel"), kind_of("nvjet_hsh_128x256"), kind_of("elementwise")
    ('attention', 'products', 'other')
    """
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def merge(events: list[Event]) -> list[tuple[float, float]]:
    """The intervals in which at least one of the events goes on.

    >>> merge([Event("a", 0, 3), Event("b", 2, 5), Event("c", 7, 8)])
    [(0, 5), (7, 8)]
    """
    merged = []
    for event in sorted(events, key=lambda event: event.start):
        if merged and event.start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], event.end))
        else:
            merged.append((event.start, event.end))
    return merged


def length(intervals: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def gaps(kernels: list[Event]) -> list[tuple[float, str, str]]:
    """(how long, the kernel before, the kernel behind) of each time without a kernel, the longest
    first.

    >>> gaps([Event("a", 0, 3), Event("b", 2, 5), Event("c", 9, 10), Event("d", 11, 12)])
    [(4, 'b', 'c'), (1, 'c', 'd')]
    """
    found = []
    last = None
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if last is not None and kernel.start > last.end:
            found.append((kernel.start - last.end, last.name, kernel.name))
        if last is None or kernel.end > last.end:
            last = kernel
    return sorted(found, reverse=True)


# ---- the step

class Part:
    """Wraps the function owner.name: labels its calls in the trace, and can time them."""

    def __init__(self, owner, name: str, label: str):
        self.function = getattr(owner, name)
        self.label = label
        self.from_idle = False          # whether a call first waits until the GPU has nothing to do
        self.host_seconds = 0.0         # of all calls that did
        setattr(owner, name, self)

    def __call__(self, *args, **options):
        if self.from_idle:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with record_function(self.label):
            result = self.function(*args, **options)
        if self.from_idle:
            self.host_seconds += time.perf_counter() - begin
        return result


def record(step) -> list[dict]:
    """The events of a trace of some calls of step()."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
                 acc_events=True) as profiler:
        for _ in range(RECORDED):
            step()
        torch.cuda.synchronize()
    if RANK != 0:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def select(trace: list[dict], *categories: str) -> list[Event]:
    events = []
    for event in trace:
        if event.get("ph") == "X" and event.get("cat") in categories:
            start = float(event["ts"])
            events.append(Event(event["name"], start, start + float(event["dur"])))
    return events


def launched_within(trace: list[dict], label: str) -> list[Event]:
    """The kernels that the host launched in the calls with this label. A kernel has the number, its
    "correlation", of the call that launched it.

    >>> trace = [
    ...     {"ph": "X", "cat": "user_annotation", "name": "optimizer", "ts": 10, "dur": 5},
    ...     {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 9, "dur": 1,
    ...      "args": {"correlation": 1}},
    ...     {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 12, "dur": 1,
    ...      "args": {"correlation": 2}},
    ...     {"ph": "X", "cat": "kernel", "name": "a", "ts": 20, "dur": 1,
    ...      "args": {"correlation": 1}},
    ...     {"ph": "X", "cat": "kernel", "name": "b", "ts": 30, "dur": 2,
    ...      "args": {"correlation": 2}}]
    >>> launched_within(trace, "optimizer")
    [Event(name='b', start=30.0, end=32.0)]
    """
    calls = [event for event in select(trace, "user_annotation") if event.name == label]
    launches = set()
    for event in trace:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            if any(call.start <= event["ts"] <= call.end for call in calls):
                launches.add(event["args"].get("correlation"))
    launches.discard(None)
    kernels = [event for event in trace if event.get("cat") in GPU_WORK
               and event["args"].get("correlation") in launches]
    return select(kernels, *GPU_WORK)


def busy_ms(events: list[Event]) -> float:
    """How long at least one of the events went on, of one step."""
    return length(merge(events)) / RECORDED / 1000


def milliseconds(events: list[Event]) -> float:
    """The sum of the events' lengths, of one step."""
    return sum(event.end - event.start for event in events) / RECORDED / 1000


def report(trace: list[dict], seconds: float, parts: list[Part]) -> str:
    """seconds: of a step in the row of TIMED ones."""
    kernels = select(trace, *GPU_WORK)
    messages = [kernel for kernel in kernels if kind_of(kernel.name) == "messages"]
    others = [kernel for kernel in kernels if kind_of(kernel.name) != "messages"]
    alone = busy_ms(kernels) - busy_ms(others)
    optimizer = launched_within(trace, OPTIMIZER)
    host = [f"{1000 * part.host_seconds / RECORDED:8.1f} ms {part.label}" for part in parts]

    lines = [
        f"step        {1000 * seconds:8.1f} ms",
        f"host        {', '.join(host)}",
        f"GPU         {busy_ms(kernels):8.1f} busy, "
        f"{busy_ms(optimizer):.1f} of it with the optimizer",
        f"messages    {busy_ms(messages):8.1f}, alone {alone:.1f}", ""]

    kinds = {}
    for kernel in kernels:
        kinds.setdefault(kind_of(kernel.name), []).append(kernel)
    for kind, members in sorted(kinds.items(), key=lambda item: -milliseconds(item[1])):
        launches = len(members) / RECORDED
        lines.append(f"{kind:20s}{milliseconds(members):8.1f} ms in {launches:6,.0f} launches")

    lines += ["", "longest gaps"]
    for gap, before, behind in gaps(kernels)[:NUM_GAPS]:
        lines.append(f"{gap / 1000:8.2f} ms between {before[:50]} and {behind[:50]}")
    return "\n".join(lines)


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    c = configurator.load(pretrain.Config, sys.argv[1:], default_file=pretrain.QUICKSTART)
    device = pretrain.pick_device(c)
    if device.type != "cuda":
        raise UserError("a step is profiled on a GPU, and there is none")
    with pretrain.friendly_errors(c, Path()):
        profile_steps(c, device)


def profile_steps(c: pretrain.Config, device: torch.device) -> None:
    curriculum = pretrain.make_curriculum(c)
    pretrain.check_fp8(c, curriculum, device)
    pretrain.meet_ranks(c, device)
    model, optimizer = pretrain.build_model_and_optimizer(c, device, None, None, Path())
    parts = [Part(pretrain, "forward_backward", "forward and backward"),
             Part(optimizer, "step", OPTIMIZER)]

    T = curriculum.seq_len[0]
    micro_batch_rows = max(1, c.micro_batch_tokens // T)
    rows = max(1, min(curriculum.rows[0] // WORLD, MAX_PASSES * micro_batch_rows))
    ids = torch.randint(c.vocab_size, (rows, T + 1))
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    if RANK == 0:
        print(f"{rows * WORLD * T:,d} tokens a step on {WORLD} x {torch.cuda.get_device_name()}; "
              f"{WARM_UP + TIMED + 2 * RECORDED} steps", flush=True)

    def step() -> None:
        pretrain.train_step(model, optimizer, batch, micro_batch_rows, rows * WORLD * T, 1e-4, c)

    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(TIMED):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / TIMED

    for part in parts:
        part.from_idle = True
    for _ in range(RECORDED):
        step()
    for part in parts:
        part.from_idle = False
    trace = record(step)
    if RANK == 0:
        print(report(trace, seconds, parts), flush=True)


if __name__ == "__main__":
    run_main(main)
