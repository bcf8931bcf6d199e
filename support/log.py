"""The log of a run: what it prints, the files that it writes, and how fast it is."""
import json
import math
import os
import re
import time
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError
from model import Motif, flops_per_token
from support.ranks import RANK, WORLD, rank0_only

class Log:
    """Console, log.txt, metrics.jsonl and samples.txt, on rank 0. A run that resumes continues the
    files where its checkpoint left them: what later steps wrote is removed, and so is a last line
    that was cut. step: the checkpoint's, or -1."""

    def __init__(self, out: Path, step: int, c):
        self.out = out
        self.wandb = None
        self.last_evaluation = rank0_only(self._open, step, c)

    def _open(self, step: int, c) -> int:
        """-> the step of the last evaluation that is kept, or -1."""
        kept = [m for m in read_metrics(self.out) if m["step"] <= step]
        replace_text(self.out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))
        samples = self.out / "samples.txt"
        if samples.exists():
            replace_text(samples, samples_until(step, samples.read_text(encoding="utf-8")))

        if c.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb needs: pip install wandb") from None
            self.wandb = wandb.init(project=c.wandb, name=str(self.out), config=asdict(c),
                                    dir=self.out)
        return max([m["step"] for m in kept if "val_loss" in m], default=-1)

    def print(self, text: str) -> None:
        if RANK == 0:
            print(text, flush=True)
        self._append("log.txt", text + "\n")

    def samples(self, text: str) -> None:
        self._append("samples.txt", text)

    def metrics(self, values: dict) -> None:
        """One line of JSON. JSON has neither NaN nor infinity: null stands for them."""
        finite = {}
        for key, value in values.items():
            is_finite = not isinstance(value, float) or math.isfinite(value)
            finite[key] = value if is_finite else None
        self._append("metrics.jsonl", json.dumps(finite) + "\n")
        if self.wandb:
            self.wandb.log(finite, step=values["step"])

    def _append(self, name: str, text: str) -> None:
        if RANK == 0:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(text)


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, up to one that was cut."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return metrics


def samples_until(step: int, text: str) -> str:
    """The samples of steps up to this one.

    >>> samples_until(4, "=== step 0, ...\\nAh\\n=== step 6, ...\\nOh\\n")
    '=== step 0, ...\\nAh\\n'
    """
    for header in re.finditer(r"^=== step (\d+)", text, re.MULTILINE):
        if int(header[1]) > step:
            return text[:header.start()]
    return text


def replace_text(path: Path, text: str) -> None:
    """Write a file that holds the old text or the new, whatever happens on the way."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def training_line(curriculum, m: dict) -> str:
    """The metrics of a step, without those that only a GPU has where there is none."""
    left = int((curriculum.tokens[-1] - m["tokens"]) / m["tok_per_s"])
    parts = [f"step {m['step']}/{curriculum.steps}", f"loss {m['loss']:.4f}",
             f"norm {m['grad_norm']:.2f}", f"lr {m['lr']:.2e}", f"{m['ms']:.0f} ms"]
    if m["optimizer_ms"] is not None:
        parts[-1] += f" (optimizer {m['optimizer_ms']:.0f})"
    parts.append(f"{m['tok_per_s']:,.0f} tok/s")
    parts.append("mfu n/a" if m["mfu"] is None else f"mfu {m['mfu']:.1%}")
    if m["gib"] is not None:
        parts.append(f"{m['gib']:.1f} GiB")
    parts += [f"eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}",
              f"logit {m['max_logit']:.1f}", f"clipped {m['heads_clipped']}",
              " ".join(f"{name} {share:.0%}" for name, share in m["mixture"].items())]
    return "  ".join(parts)


class StepTimer:
    """The time of a step, averaged from one logged line to the next, less evaluating and saving.

    t_log, step_log    when the last line was logged, and after which step
    t_pause            when training was interrupted, to evaluate or to save
    """

    def __init__(self, step: int, optimizer, device: torch.device):
        self.t_log = time.perf_counter()
        self.step_log = step
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            # The GPU itself records events, when it gets there.
            self.begin = torch.cuda.Event(enable_timing=True)
            self.end = torch.cuda.Event(enable_timing=True)
            optimizer.register_step_pre_hook(lambda *_: self.begin.record())
            optimizer.register_step_post_hook(lambda *_: self.end.record())

    def pause(self) -> None:
        self.t_pause = time.perf_counter()

    def resume(self) -> None:
        self.t_log += time.perf_counter() - self.t_pause

    def read(self, model: Motif, curriculum, step: int) -> dict:
        """Speed and memory since the last call. The device must be done with the step."""
        now = time.perf_counter()
        seconds = now - self.t_log
        steps = step - self.step_log
        speed = (curriculum.tokens[step] - curriculum.tokens[self.step_log]) / seconds
        self.t_log = now
        self.step_log = step

        flops = sum(flops_per_token(model.config, curriculum.context[step - 1])) * speed
        peak = peak_flops(model.head_weight.device)
        return {"ms": 1000 * seconds / steps,
                "tok_per_s": speed,
                "optimizer_ms": self.begin.elapsed_time(self.end) if self.on_gpu else None,
                "mfu": flops / peak / WORLD if peak else None,
                "gib": torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None}


# FLOP/s in bf16, dense, of which MFU (model FLOPs utilization) is a fraction.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12,
              "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device: torch.device) -> float | None:
    """None for a device that is not in the table."""
    if device.type == "cuda":
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return flops
    return None
