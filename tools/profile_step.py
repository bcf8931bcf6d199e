"""Where the time of a training step goes, on a GPU.

    python -m tools.profile_step config/motif_124m.py [--key=value ...]
    torchrun --nproc_per_node=2 -m tools.profile_step config/motif2_12b.py --num_hidden_layers=6

Trains on random tokens, with rows as long as the config's first, and batches as large, but at most
four passes of each rank: so the optimizer's share may be larger than in training. Ten steps in a
row, as in training, give the time; three are recorded by torch.profiler. Prints for one step, of
rank 0:

    step        milliseconds, without the profiler
    host        how long the host took to launch forward and backward pass, and the optimizer. Where
                it cannot keep ahead of the GPU, the GPU waits
    GPU         how long at least one kernel ran; and from the optimizer's first kernel to its last
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
RECORDED = 3
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

def annotate(owner, name: str, label: str) -> None:
    """From now on calls of owner.name have this label in the trace."""
    function = getattr(owner, name)

    def labelled(*args, **options):
        with record_function(label):
            return function(*args, **options)
    setattr(owner, name, labelled)


def record(step) -> list[dict]:
    """The events of a trace of some calls of step()."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
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


def milliseconds(events: list[Event], label: str | None = None) -> float:
    """Of one step: the sum of the events' lengths, or of those with a label."""
    times = [event.end - event.start for event in events if label in (None, event.name)]
    return sum(times) / RECORDED / 1000


def report(trace: list[dict], seconds: float) -> str:
    """seconds: of a step, without the profiler."""
    kernels = select(trace, "kernel", "gpu_memcpy", "gpu_memset")
    messages = [kernel for kernel in kernels if kind_of(kernel.name) == "messages"]
    others = [kernel for kernel in kernels if kind_of(kernel.name) != "messages"]
    busy = length(merge(kernels)) / RECORDED / 1000
    alone = busy - length(merge(others)) / RECORDED / 1000
    host = select(trace, "user_annotation")
    # The GPU has the label once for each stream.
    optimizer = [event for event in select(trace, "gpu_user_annotation")
                 if event.name == "optimizer"]

    lines = [
        f"step        {1000 * seconds:8.1f} ms",
        f"host        {milliseconds(host, 'forward_backward'):8.1f} forward and backward, "
        f"{milliseconds(host, 'optimizer'):.1f} optimizer",
        f"GPU         {busy:8.1f} busy; optimizer "
        f"{length(merge(optimizer)) / RECORDED / 1000:.1f}",
        f"messages    {length(merge(messages)) / RECORDED / 1000:8.1f}, alone {alone:.1f}", ""]

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
    annotate(pretrain, "forward_backward", "forward_backward")
    annotate(optimizer, "step", "optimizer")

    T = curriculum.seq_len[0]
    micro_batch_rows = max(1, c.micro_batch_tokens // T)
    rows = max(1, min(curriculum.rows[0] // WORLD, MAX_PASSES * micro_batch_rows))
    ids = torch.randint(c.vocab_size, (rows, T + 1))
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    if RANK == 0:
        print(f"{rows * WORLD * T:,d} tokens a step on {WORLD} x {torch.cuda.get_device_name()}; "
              f"{WARM_UP + TIMED + RECORDED} steps", flush=True)

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
    trace = record(step)
    if RANK == 0:
        print(report(trace, seconds), flush=True)


if __name__ == "__main__":
    run_main(main)
