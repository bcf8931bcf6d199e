"""The log of a run: what it prints, the files that it writes, and how fast it is."""
import json
import math
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configurator import UserError, one_line
from support.ranks import RANK, WORLD, rank0_only
from support.run_folder import Checkpoint, checkpoint_steps, last_good

# ---- the files
#
#     log.txt         what is printed
#     metrics.jsonl   an object for each logged step (loss, lr, ...) and each evaluation (val_loss)
#     samples.txt     below a line "=== step N, ...": what the model wrote after N steps
#
# "Step N" is, everywhere here, the state after N steps, or the N-th step.

class Log:
    """Writes to the console, log.txt, metrics.jsonl and samples.txt, on rank 0. A run that resumes
    continues the files where its checkpoint left them: what later steps wrote is removed, but not
    from log.txt.

    step              the checkpoint's; -1: the run begins
    last_evaluation   the step of the last evaluation in metrics.jsonl, or -1"""

    def __init__(self, out: Path, step: int, c):
        self.out = out
        self.wandb = None
        self.last_evaluation = rank0_only(self._open, step, c)

    def _open(self, step: int, c) -> int:
        """Remove what is later than `step` -> last_evaluation."""
        kept = [m for m in read_metrics(self.out) if m["step"] <= step]
        replace_text(self.out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))
        samples = self.out / "samples.txt"
        if samples.exists():
            text = samples.read_text(encoding="utf-8", errors="replace")
            replace_text(samples, samples_until(step, text))

        if c.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb needs: pip install wandb") from None
            self.wandb = wandb.init(project=c.wandb, name=str(self.out), config=asdict(c),
                                    dir=self.out, id=wandb_id(self.out, step), resume="allow")
        return max([m["step"] for m in kept if "val_loss" in m], default=-1)

    def print(self, text: str) -> None:
        if RANK == 0:
            print(text, flush=True)
        self._append("log.txt", text + "\n")

    def samples(self, text: str) -> None:
        self._append("samples.txt", text)

    def metrics(self, values: dict) -> None:
        """One line of JSON."""
        finite = without_nan(values)
        self._append("metrics.jsonl", json.dumps(finite, allow_nan=False) + "\n")
        if self.wandb:
            self.wandb.log(finite, step=values["step"])

    def draw(self) -> None:
        """Draw loss.png. A run does not end because its picture cannot be drawn."""
        if RANK == 0:
            from tools.plots import plot_training
            try:
                plot_training(self.out)
            except Exception as e:
                self.print(f"{self.out}/loss.png could not be drawn: {one_line(e)}")

    def _append(self, name: str, text: str) -> None:
        if RANK == 0:
            with open(self.out / name, "a", encoding="utf-8") as f:
                f.write(text)


def without_nan(value):
    """JSON has neither NaN nor infinity: None, its null, stands for them, however deep they lie.

    >>> without_nan({"loss": 1.5, "by_domain": {"code": [2.0, math.nan]}})
    {'loss': 1.5, 'by_domain': {'code': [2.0, None]}}
    """
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def wandb_id(out: Path, step: int) -> str:
    """The run's id at Weights & Biases. A run that resumes continues there under the same id."""
    file = out / "wandb_id.txt"
    if step < 0 or not file.exists():
        replace_text(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl. One that was cut, or has another form, is passed over."""
    path = out / "metrics.jsonl"
    lines = []
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    metrics = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and type(values.get("step")) is int:
                metrics.append(values)
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
    """Write a text file. Whatever happens meanwhile, the file has the old text or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- what is logged: when a run resumes, at an evaluation, at a step, at the end

def log_resumed(log: Log, start: Checkpoint, c, fingerprint: str) -> None:
    """Which checkpoint a run resumes from, and what has changed since. fingerprint: of the data."""
    folder, state = start
    log.print(f"resumed from {folder} at step {state['step']}")
    old = {**state["config"], "data": state["data"]}
    new = json.loads(json.dumps({**asdict(c), "data": fingerprint}))
    for key in new:
        if key not in ("resume", "out_dir") and old.get(key) != new[key]:
            log.print(f"changed since then: {key} was {old.get(key)}, is {new[key]}")


def log_evaluation(log: Log, curriculum, step: int, result: dict, layers: list,
                   samples: str) -> None:
    """Log an evaluation after `step` steps: what pretrain.evaluate, layer_stats and
    pretrain.sample_prompts returned."""
    log.samples(f"=== step {step}, validation loss {result['val_loss']:.4f}\n{samples}")
    log.metrics({"step": step, "tokens": curriculum.tokens[step], **result, "layers": layers})

    by_domain = "  ".join(f"{name} {x:.4f}" for name, x in result["val_loss_by_domain"].items())
    line = (f"step {step}/{curriculum.steps}  validation loss {result['val_loss']:.4f} "
            f"({by_domain})  bits per byte {result['val_bpb']:.4f}")
    if "val_loss_by_quarter" in result:
        quarters = " ".join(f"{x:.3f}" for x in result["val_loss_by_quarter"])
        line += f"  by quarter of the context {quarters}"
    for task, scores in result.get("task_scores", {}).items():
        line += f"  {task} " + " ".join(f"{metric} {x:.2f}" for metric, x in scores.items())
    log.print(line)


def log_step(log: Log, timer: "StepTimer", optimizer, curriculum, step: int, lr: float, result,
             flops_per_token: float) -> None:
    """Log the step-th step, the last one, and the speed since the last logged line. All ranks call
    this, as they take the maximum of their largest logits.

    lr, result        its learning rate and StepResult, with which the device must be done
    flops_per_token   forward and backward, at its sequence length, for the MFU"""
    if WORLD > 1:
        dist.all_reduce(result.max_logits, dist.ReduceOp.MAX)
    speed = timer.read(curriculum, step, flops_per_token)
    shares = np.round(curriculum.shares[step - 1], 4).tolist()
    metrics = {
        "step": step,
        "tokens": curriculum.tokens[step],
        "loss": result.loss.item(),
        "lr": lr,
        "grad_norm": result.grad_norm.item(),
        "max_logit": result.max_logits.max().item(),
        "heads_clipped": int(optimizer.heads_clipped or 0),
        "mixture": dict(zip(curriculum.names, shares)),
        **speed}
    log.metrics(metrics)
    log.print(training_line(curriculum, metrics))


def log_end(log: Log, c, step: int, finished: bool) -> None:
    """Say where the run has ended, and where its files are. finished: no signal has stopped it."""
    out = log.out
    how = "finished" if finished else "stopped"
    saved = "not saved (save_every=None)" if c.save_every is None else "nothing new to save"
    if step in checkpoint_steps(out):
        saved = f"model in {out}/step_{step}"
    samples = f", samples in {out}/samples.txt" if c.eval_every else ""
    log.print(f"{how} at step {step}; {saved}, curve in {out}/loss.png{samples}")


def training_line(curriculum, m: dict) -> str:
    """The metrics of a step as a line to print: without a GPU it has no optimizer time and no
    memory."""
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


@torch.no_grad()
def layer_stats(blocks, optimizer) -> list[dict]:
    """What Motif's own ideas do, per layer: lambda, PolyNorm's weights and bias, the norms of query
    and key heads (QK-clip), the RMS of each matrix's last update over lr (Muon: about 0.2)."""
    layers = []
    for block in blocks:
        attention = block.self_attn
        polynorm = block.mlp.act_fn
        stats = {}
        if attention.noise_heads:
            stats["lambda"] = attention.lambda_().item()
        if polynorm is not None:
            stats["polynorm"] = polynorm.weight.tolist() + polynorm.bias.tolist()
        stats["q_norm"] = head_norms(attention.q_proj.weight, attention.head_dim)
        stats["k_norm"] = head_norms(attention.k_proj.weight, attention.head_dim)
        rms = optimizer.update_rms
        stats["update_rms"] = [rms[p].item() for p in block.parameters() if p in rms]
        layers.append({key: np.round(value, 4).tolist() for key, value in stats.items()})
    return layers


def head_norms(weight: Tensor, head_dim: int) -> list[float]:
    """The Frobenius norm of each head's rows of a projection (heads D, hidden)."""
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    heads = weight.unflatten(0, (-1, head_dim))
    return torch.linalg.matrix_norm(heads).tolist()


class NonFiniteSteps:
    """Counts the steps that were skipped because the loss or the gradient was not finite. Whether a
    step was skipped is known to the device; the host reads that for several steps at once, where it
    waits for the device anyway.

    in_a_row   skipped steps in a row, up to the last step that was read
    unread     StepResult.skipped of the steps since, on the device"""

    def __init__(self, in_a_row: int):
        self.in_a_row = in_a_row
        self.unread = []

    def add(self, skipped: Tensor) -> None:
        self.unread.append(skipped)

    def check(self, step: int, c, log: Log) -> None:
        """Report the unread steps, of which the step-th is the last, and end the run if too many in
        a row were skipped. Waits for the device."""
        flags = torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        first = step - len(flags) + 1
        skipped = [str(first + i) for i, flag in enumerate(flags) if flag]
        if skipped:
            log.print(f"no update at step {', '.join(skipped)}: loss or gradient not finite")

        for flag in flags:
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if self.in_a_row >= c.max_nonfinite_steps:
                raise UserError(f"{self.in_a_row} steps in a row were not finite; "
                                f"{last_good(log.out)}: lower lr, or look at the data of these "
                                "steps")


# ---- speed

class StepTimer:
    """The time of a step, averaged from one logged line to the next, less evaluating and saving.

    t_log, step_log    when the last line was logged, and after which step
    t_pause            when training was interrupted, to evaluate or to save
    """

    def __init__(self, step: int, optimizer, device: torch.device):
        self.t_log = time.perf_counter()
        self.step_log = step
        self.device = device
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

    def read(self, curriculum, step: int, flops_per_token: float) -> dict:
        """The speed since the last call, the optimizer's time in the last step, and the most memory
        since the process began. The device must be done with the step-th step."""
        now = time.perf_counter()
        seconds = now - self.t_log
        steps = step - self.step_log
        speed = (curriculum.tokens[step] - curriculum.tokens[self.step_log]) / seconds
        self.t_log = now
        self.step_log = step

        flops = flops_per_token * speed
        peak = peak_flops(self.device)
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
