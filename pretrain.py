"""Pre-training: `python pretrain.py config/X.py --key=value` trains a Motif from nothing, or goes
on from the last checkpoint in out_dir; under torchrun, over many GPUs or processes. Without a
config file it is the quick start. The knobs are first, the loop is last.

    out_dir/step_N/        model in the released layout, optimizer state, state.json: all of resume
    out_dir/metrics.jsonl  a line per logged step and per evaluation; loss.png draws them
    out_dir/samples.txt    the fixed prompts, continued at every evaluation
    out_dir/log.txt        what was printed
"""
import atexit
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import configurator
import data
import muonclip
from configurator import Count, Fraction, NonNegative, Size, UserError, one_line
from model import (Linear, Motif, MotifConfig, flops_per_token, save_tensors, iter_checkpoint,
                   tensor_files)
from muonclip import local_shard

QUICKSTART = str(Path(__file__).parent / "config" / "quickstart.py")
RANK, LOCAL_RANK = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))  # by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class TrainConfig:
    """How a run goes, of any kind of training."""
    out_dir: str | None = None      # where all output goes; None: out/<name of the config file>,
                                    # of sft.py out/sft<stage>
    device: str = "auto"            # cpu, cuda, cuda:1, ...; auto: CUDA where there is one
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # of products; auto: bf16 on CUDA
                                    # only; fp8: in the blocks' linear layers, bf16 in the rest
    compile: bool | None = None     # torch.compile the blocks; None: on CUDA
    activation_checkpoint_layers: Size = 0             # blocks whose forward runs again in the backward pass, the
                                    # first ones: less memory, a third more FLOPs for each
    dp_replicate: Count = 1             # copies of the model among the ranks of torchrun; each copy is
                                    # sharded over the others
    timeout_seconds: Count = 600            # seconds that a rank waits for another before the run ends
    seed: int = 1337                # of the initial weights and of the order of the data
    resume: str = "auto"            # auto: the newest checkpoint in out_dir; no; or a path
    micro_batch_tokens: Count = 4096      # tokens in one forward pass of one rank: what memory allows
    data_dir: str = "data"          # where what is prepared is kept, for all runs
    # optimizer
    optimizer: Literal["muonclip", "adamw"] = "muonclip"  # adamw: to compare, on every parameter
    momentum: Fraction = 0.95       # Muon's [ours: unpublished]
    weight_decay: NonNegative = 0.1  # of matrices and embeddings
    ns_coefficients: Literal["quintic", "motif", "polar_express"] = "motif"  # of Newton-Schulz
    qk_clip_threshold: NonNegative = 100.0        # QK-clip keeps logits below this [ours: unpublished]; 0: none
    grad_clip: NonNegative = 1.0    # largest norm of the whole gradient; 0: no clipping
    max_nonfinite_steps: Count = 10         # steps in a row without update, as not finite, that end the run
    # what is reported
    log_every: Count = 10           # steps
    eval_every: Count | None = 100  # steps; also before the first and after the last; None: never
    eval_tokens: Count = 8192       # held-out tokens of each domain
    prompts: list = field(default_factory=lambda: ["The "])  # continued at every evaluation
    sample_tokens: Size = 100       # per prompt
    save_every: Count | None = 100  # steps between checkpoints; one after the last; None: none
    keep_last: Annotated[int, 2] = 2  # checkpoints kept: the newest might be damaged
    keep_every: Count | None = None  # steps whose multiples are kept for ever
    wandb: str | None = None        # project name, to log there too


@dataclass
class Config(TrainConfig, MotifConfig):
    """Pre-training."""
    init: str | None = None         # first weights: grow:PATH, from a smaller model; average:DIR,k,
                                    # of the last k checkpoints of a run; None: at random
    dry_run: bool = False           # print size, plan, memory and time, and open nothing
    plan_world_size: Count = 8                # ranks that --dry_run plans for
    assumed_mfu: Fraction = 0.4             # share of an H100's peak at which it counts the days
    export: str | None = None       # write a checkpoint's model in bf16 into this folder, and end
    # length and schedule; tokens seen are the clock
    max_steps: Count | None = None  # optimizer steps; the run ends here or at max_tokens
    max_tokens: Count | None = None  # tokens of the whole run; set one of the two, or both
    seq_len: Count | list = 256     # tokens per sequence, or knots [[tokens seen, length], ...]
    rope_theta_schedule: list | None = None       # knots [[tokens seen, RoPE's base], ...]; None: rope_theta
    batch_tokens: Count | list = 4096  # tokens per step over all ranks, or knots likewise
    lr: NonNegative = 4e-3          # peak, of Muon and AdamW alike
    warmup_steps: Size = 20         # linear from 0
    decay_fraction: Fraction = 0.3  # last part of the tokens, in which lr falls to min_lr * lr
    decay: Literal["linear", "cosine", "inverse_sqrt"] = "linear"  # the shape of that fall
    min_lr: Fraction = 0.1          # of lr, where the decay ends
    # data
    tokenizer: str = "byte"         # byte, a tiktoken name, a .tiktoken file, a tokenizer.json or a
                                    # folder with one, owner/name of the Hub
    domains: dict = field(default_factory=lambda: {"language": ["builtin:language", 1.0, 1.0]})
                                    # name -> [source, first share, last share]; see data.py
    mixture: list | None = None     # knots [[fraction of the run, {name: share}], ...] instead
    prepare_part: str = "1/1"               # python data.py: prepare part i/n of the data, on n machines
    workers: Count | None = None    # processes that prepare data; None: one per core


def model_config(c: Config) -> MotifConfig:
    """The model's part of the config."""
    return MotifConfig(**{f.name: getattr(c, f.name) for f in fields(MotifConfig)})


def make_curriculum(c: Config) -> data.Curriculum:
    """The run's curriculum. ValueError if it cannot be, or is longer than the model's positions."""
    plan = data.Curriculum(c.domains, batch_tokens=c.batch_tokens, seq_len=c.seq_len, mixture=c.mixture,
                     max_steps=c.max_steps, max_tokens=c.max_tokens)
    if max(plan.seq_len) > c.max_position_embeddings:
        raise UserError(f"seq_len={c.seq_len} is longer than max_position_embeddings="
                         f"{c.max_position_embeddings}; raise that or shorten the sequence")
    return plan


def lr_at(c: Config, plan: data.Curriculum, step: int) -> float:
    """Learning rate of a step: warm-up, stable, decay (WSD). With x the part of the decay behind
    us, in tokens, and m = min_lr, it falls as lr times

        linear 1 - (1 - m) x     cosine m + (1 - m) (1 + cos pi x) / 2
        inverse_sqrt (1 + x (m^-2 - 1))^-1/2, m at least 1e-3"""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / (c.warmup_steps + 1)
    left = 1 - plan.tokens[step] / plan.tokens[-1]
    x, m = 1 - min(1, left / max(c.decay_fraction, 1e-12)), c.min_lr
    return c.lr * {"linear": 1 - (1 - m) * x,
                   "cosine": m + (1 - m) * (1 + math.cos(math.pi * x)) / 2,
                   "inverse_sqrt": (1 + x * (max(m, 1e-3)**-2 - 1))**-0.5}[c.decay]


def theta_at(c: Config, tokens: int) -> float:
    """RoPE's base once so many tokens are seen. ValueError for knots that are none."""
    knots = data.parse_schedule("theta", c.rope_theta_schedule) if c.rope_theta_schedule else [(0, c.rope_theta)]
    return float(max(knot for knot in knots if knot[0] <= tokens)[1])


# ---- ranks

def init_distributed(c: Config, device: torch.device) -> None:
    """Meet the other ranks of torchrun: on gloo and, for what is on GPUs, NCCL. ValueError if they
    cannot be `replicas` copies."""
    if WORLD % c.dp_replicate:
        raise UserError(f"{WORLD} ranks cannot be replicas={c.dp_replicate} copies of the same size")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=c.timeout_seconds)
    if WORLD > 1:                    # torchrun's restarts share a store: the old ranks' addresses
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")       # must not be found there
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://", timeout=limit))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=limit, store=store, rank=RANK, world_size=WORLD)
    elif uses_fsdp(c, device) and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit,
                                store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)


@functools.cache
def slow_group():
    """The ranks again, for what may take its time: preparing data, writing a checkpoint."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def all_gather_object(value) -> list:
    """The values of all ranks, on all of them."""
    values = [value]
    if WORLD > 1:
        dist.all_gather_object(values := [None] * WORLD, value, group=slow_group())
    return values


def broadcast_object(value):
    """Rank 0's value, on all ranks."""
    return all_gather_object(value)[0]


def barrier() -> None:
    """Wait until every rank is here."""
    all_gather_object(None)


def sync_errors(call, *args):
    """call(*args) on every rank -> its result; an OSError or ValueError of one is raised on all."""
    result = error = None
    try:
        result = call(*args)
    except (OSError, ValueError) as e:
        error = e
    for error in all_gather_object(error):
        if error is not None:
            raise error
    return result


def all_reduce_sum(t: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(t)
    return t


def any_rank(flag: bool) -> bool:
    """Whether it is set on one of the ranks: of the hosts, which wait for no device."""
    flag = torch.tensor(flag, dtype=torch.int32)
    if WORLD > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def to_tensors(batch) -> tuple[torch.Tensor, ...]:
    """What a stream gives: rows (R, T + 1), or ids, targets and documents, each (R, T) -> ids and
    targets (R, T), as the model takes them, and documents if there are any."""
    if isinstance(batch, np.ndarray):
        batch = batch[:, :-1], batch[:, 1:]
    return tuple(map(torch.from_numpy, batch))


def pad_rows(batch: tuple, own: int, n: int) -> tuple[torch.Tensor, ...]:
    """Ids, targets, ..., each (R, T) -> (n, T). All ranks must pass the model equally often; so of
    the first `own` rows each counts, and the first one fills the rest with targets that do not."""
    ids, targets, *more = (torch.cat([t[:own], t[:1].expand(n - own, -1)]) for t in batch)
    targets[own:] = -1
    return ids, targets, *more


def split_rows(rows: int) -> tuple[int, int, int]:
    """Of so many rows: the first that this rank reads, one in WORLD, how many of them are its own,
    and the number to which all ranks pad theirs."""
    return RANK % rows, len(range(RANK, rows, WORLD)), -(-rows // WORLD)


# ---- log

class Log:
    """Prints, and writes log.txt, metrics.jsonl and samples.txt in a folder, from a checkpoint on:
    what a run that was cut left of later steps is dropped, and so is a torn last line. Of many
    ranks the first does."""

    def __init__(self, out: Path, start: tuple | None, c: Config):
        self.out, self.metrics, self.wandb = out, out / "metrics.jsonl", None
        self.evaluated = broadcast_object(self._begin(start, c) if RANK == 0 else None)

    def _begin(self, start: tuple | None, c: Config) -> int:
        """The step of the last evaluation."""
        out, step = self.out, start[1]["step"] if start else -1
        kept = [m for m in read_metrics(out) if m["step"] <= step]
        replace_text(self.metrics, "".join(json.dumps(m) + "\n" for m in kept))
        samples = (out / "samples.txt").read_text() if (out / "samples.txt").exists() else ""
        later = (m for m in re.finditer(r"^=== step (\d+)", samples, re.M) if int(m[1]) > step)
        replace_text(out / "samples.txt", samples[:next((m.start() for m in later), None)])
        if c.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb needs: pip install wandb") from None
            self.wandb = wandb.init(project=c.wandb, name=str(out), config=asdict(c), dir=out)
        return max([m["step"] for m in kept if "val_loss" in m], default=-1)

    def _append(self, name: str, text: str) -> None:
        if RANK == 0:
            with (self.out / name).open("a") as f:
                f.write(text)

    def sample(self, text: str) -> None:
        self._append("samples.txt", text)

    def say(self, text: str) -> None:
        if RANK == 0:
            print(text, flush=True)
        self._append("log.txt", text + "\n")

    def metric(self, **values) -> None:
        """A line of JSON, in which there is no NaN: null stands for it."""
        values = {key: None if isinstance(x, float) and not math.isfinite(x) else x
                  for key, x in values.items()}
        self._append("metrics.jsonl", json.dumps(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole."""
    path, found = out / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def replace_text(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


# ---- checkpoints

SHARD_BYTES = 5 * 10**9          # of the largest file of a checkpoint, or one tensor


def save_checkpoint(out: Path, step: int, model: Motif, optimizer, state: dict, c: Config) -> None:
    """Write out/step_N: whole or, whatever happens, not there; then drop old ones. No random state
    is kept, as no step draws any: the data follow from the step. OSError if it cannot write. Each
    tensor is whole in one file, whatever the number of ranks, so that the folder is a model in the
    released layout and any number of ranks can go on from it."""
    folder, temporary = out / f"step_{step}", out / f"step_{step}.tmp"

    def clear():
        for cut in out.glob("step_*.tmp") if RANK == 0 else ():
            shutil.rmtree(cut)

    def write():
        model.save_pretrained(temporary, SHARD_BYTES)
        save_tensors(temporary / "optimizer", "state", optimizer_tensors(model, optimizer),
                     SHARD_BYTES)

    def finish():
        for path, stem in (temporary, "model"), (temporary / "optimizer", "state"):
            try:
                tensor_files(path, stem)
            except ValueError as e:
                raise OSError(f"{e}; out_dir must be where all machines see it") from None
        files = {str(f.relative_to(temporary)): f.stat().st_size
                 for f in temporary.rglob("*") if f.is_file()}
        whole = {"step": step, **state, "config": asdict(c), "files": files,
                 "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
        (temporary / "state.json").write_text(json.dumps(whole, indent=1) + "\n")
        for path in [*temporary.rglob("*"), temporary]:
            fsync_path(path)
        shutil.rmtree(folder, ignore_errors=True)  # torn, or else the run would have begun there
        os.replace(temporary, folder)
        fsync_path(out)

    try:
        sync_errors(clear)
        sync_errors(safetensors_errors, write)
        sync_errors(finish if RANK == 0 else int)
    except OSError as e:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint {folder} could not be written: {e}") from None
    for old in sorted(s for s in checkpoint_steps(out) if s <= step)[:-c.keep_last] if RANK == 0 else ():
        if not c.keep_every or old % c.keep_every:
            shutil.rmtree(out / f"step_{old}")


def safetensors_errors(call, *args) -> None:
    """call(*args), with safetensors' own error as the OSError that it mostly is."""
    from safetensors import SafetensorError
    try:
        call(*args)
    except SafetensorError as e:
        raise OSError(str(e)) from None


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoint_steps(out: Path) -> list[int]:
    return [int(f.name[5:]) for f in out.glob("step_*") if f.name[5:].isdigit()]


def read_state(folder: Path) -> dict:
    """A checkpoint's state.json. ValueError if the checkpoint is not whole."""
    try:
        state = json.loads((folder / "state.json").read_text())
        for name, size in state["files"].items():
            if (folder / name).stat().st_size != size:
                raise UserError(f"{name} is cut short")
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"checkpoint {folder} is not whole ({e})") from None
    return state


def find_checkpoint(c: Config, out: Path) -> tuple[Path, dict] | None:
    """What `resume` asks for: the newest whole checkpoint in out, the one at a path, or None, with
    its state. ValueError if the path is none, or if two runs would mix in out."""
    if c.resume == "auto":
        return latest_checkpoint(out)
    start = None if c.resume == "no" else (Path(c.resume), read_state(Path(c.resume)))
    there = max(checkpoint_steps(out), default=0)
    if there > (start[1]["step"] if start else 0):
        raise UserError(f"resume={c.resume}, but {out} holds a run up to step {there}; delete it "
                         "or give another --out_dir")
    return start


def latest_checkpoint(out: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint in out and its state; None if there is none."""
    for step in sorted(checkpoint_steps(out), reverse=True):
        try:
            return out / f"step_{step}", read_state(out / f"step_{step}")
        except ValueError as e:
            print(f"{e}; passing it over")
    return None


def check_compatible(folder: Path, state: dict, c: Config, plan: data.Curriculum) -> None:
    """ValueError if a checkpoint is beyond the end, of another shape or of another optimizer."""
    if state["step"] > plan.steps:
        raise UserError(f"checkpoint {folder} is beyond the end at step {plan.steps}; make "
                         "the run longer or give another --out_dir")
    for key in (*(f.name for f in fields(MotifConfig)), "optimizer"):
        ours, theirs = getattr(c, key), state["config"].get(key)
        if ours != theirs:
            raise UserError(f"checkpoint {folder} has {key}={theirs}, not {ours}; give --{key}="
                             f"{theirs}, or another --out_dir for a new run")


@torch.no_grad()
def load_checkpoint(folder: Path, model: Motif, optimizer) -> None:
    """Copy a checkpoint's weights and optimizer state in place; each rank reads its shards alone.
    ValueError for a damaged file."""
    try:
        load_into(model.state_dict(), folder, "model")
        load_into(optimizer_tensors(model, optimizer), folder / "optimizer", "state")
    except ValueError as e:
        raise UserError(f"{e}; delete {folder} to go on from the checkpoint before") from None


@torch.no_grad()
def load_into(ours: dict[str, torch.Tensor], folder: Path, stem: str) -> None:
    """Copy stored tensors into ours, of FSDP2's the part that this rank has."""
    for name, get in iter_checkpoint(folder, stem, {n: t.shape for n, t in ours.items()}):
        t, box = ours[name], ()
        if hasattr(t, "placements"):
            mesh = t.device_mesh
            box = muonclip.local_slices(t.shape, mesh.shape, muonclip.shard_dims(t), mesh.get_coordinate())
        if local_shard(t).numel():
            local_shard(t).copy_(get(*box))


def optimizer_tensors(model: Motif, optimizer) -> dict[str, torch.Tensor]:
    """"<parameter>.<state>" -> the tensor itself, of a parameter that FSDP2 shards as a shard."""
    found = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            if hasattr(p, "placements") and value.ndim:
                value = type(p.data).from_local(value, p.device_mesh, p.placements,
                                                shape=p.shape, stride=p.stride())
            found[f"{name}.{key}"] = value
    return found


# ---- one step, one evaluation

def forward_backward(model: Motif, batch: tuple, micro: int, count: int):
    """Accumulate the gradient of the mean loss over `count` tokens, `micro` rows of the batch, ids
    and targets (R, T), at a time -> these rows' part of that loss, largest logits (layers, heads).
    Of many ranks each has its rows; `count` is of all."""
    loss, largest = torch.zeros((), device=batch[0].device), None
    parts = [*zip(*(t.split(micro) for t in batch))]
    for i, part in enumerate(parts):
        if hasattr(model, "reshard"):                   # FSDP2
            last = i == len(parts) - 1
            model.set_requires_all_reduce(last)         # of replicas
            if WORLD == 1:                              # casts its weights once a step, and shards
                model.set_reshard_after_backward(last)  # whole gradients when they are complete
                model.set_requires_gradient_sync(last)
        part_loss = model(*part, reduction="sum", scale=1 / count)
        part_loss.backward()
        loss += part_loss.detach()
        largest = (model.max_logits if largest is None
                   else torch.maximum(largest, model.max_logits))
    return loss, largest


def reduce_and_clip(model: Motif, loss: torch.Tensor, largest: float, replicas: int):
    """Sum over the ranks the loss and what FSDP2 leaves to us, the gradients of vectors; then scale
    the whole gradient to a norm of at most `largest` (0: leave it) -> loss, norm before."""
    with_grad = [p for p in model.parameters() if p.grad is not None]
    matrices = [local_shard(p.grad) for p in with_grad if p.ndim > 1]
    vectors = [p.grad for p in with_grad if p.ndim < 2]
    if WORLD > 1:
        flat = all_reduce_sum(torch.cat([g.flatten() for g in vectors])).split([g.numel() for g in vectors])
        torch._foreach_copy_(vectors, [f.view_as(g) for f, g in zip(flat, vectors)])
    norm = torch.nn.utils.get_total_norm
    loss, squares = all_reduce_sum(torch.stack([loss, norm(matrices).square() / replicas]))
    total = (squares + norm(vectors).square()).sqrt()
    if largest:
        torch._foreach_mul_(matrices + vectors, (largest / (total + 1e-6)).clamp(max=1))
    return loss, total


def train_step(model: Motif, optimizer, batch: tuple, micro: int, count: int, lr: float, c: Config):
    """One update from a batch, as forward_backward takes it, on the host, unless loss or gradient
    is not finite -> loss, norm of the gradient, largest logits, whether there was no update:
    tensors for which the host does not wait, so that it is free to launch the next step."""
    device = model.head_weight.device
    batch = tuple((t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)
                  for t in batch)
    loss, largest = forward_backward(model, batch, micro, count)
    loss, norm = reduce_and_clip(model, loss, c.grad_clip, c.dp_replicate)
    skip = ~torch.isfinite(loss + norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step(max_logits=largest, skip=skip)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, largest, skip


class NonFiniteSteps:
    """Steps without update. The device knows at once; the host reads it where it waits anyway."""

    def __init__(self, in_a_row: int):
        self.unread, self.in_a_row = [], in_a_row

    def read(self, step: int, c: Config, log: Log) -> None:
        """Say which of the steps up to this one they were; SystemExit after c.max_nonfinite_steps."""
        skipped = torch.stack(self.unread).tolist() if self.unread else []
        at = [step - len(skipped) + 1 + i for i, skip in enumerate(skipped) if skip]
        if at:
            log.say(f"no update at step {', '.join(map(str, at))}: loss or gradient not finite")
        for skip in skipped:
            self.in_a_row = self.in_a_row + 1 if skip else 0
            if self.in_a_row >= c.max_nonfinite_steps:
                raise UserError(f"{self.in_a_row} steps in a row were not finite; "
                                 f"{last_good(log.out)}: lower lr, or look at the data of these "
                                 "steps")
        self.unread.clear()


@torch.no_grad()
def evaluate(model: Motif, held_out: dict[str, tuple], micro_tokens: int,
             length: torch.Tensor) -> dict:
    """Loss in nats per token and bits per byte of held-out ids, targets, ..., each (R, T), over
    all, by domain and, unless rows hold documents, by quarter of the context; length (n_vocab,):
    bytes of each token. The ranks share the rows."""
    tokens, size, quarters = {}, {}, torch.zeros(4)
    sums = torch.zeros(len(held_out), 4, dtype=torch.float64, device=length.device)
    for i, (name, (ids, targets, *documents)) in enumerate(held_out.items()):
        first, own, n = split_rows(len(ids))
        batch = pad_rows([t[first::WORLD] for t in held_out[name]], own, n)
        for part in zip(*(t.split(max(1, micro_tokens // ids.shape[1])) for t in batch)):
            losses = model.token_losses(*part).double()
            sums[i] += torch.stack([q.sum() for q in losses.tensor_split(4, 1)])
        counted = targets >= 0
        tokens[name], size[name] = counted.sum().item(), length[targets[counted]].sum().item()
        quarters += torch.tensor([q.sum().item() for q in counted.tensor_split(4, 1)])
    sums = all_reduce_sum(sums).cpu()
    nats = dict(zip(held_out, sums.sum(1).tolist()))
    by_quarter = {} if documents else {"val_loss_by_quarter": (sums.sum(0) / quarters).tolist()}
    return {"val_loss": sum(nats.values()) / sum(tokens.values()),
            "val_bpb": sum(nats.values()) / math.log(2) / sum(size.values()), **by_quarter,
            "val_loss_by_domain": {n: nats[n] / tokens[n] for n in nats},
            "val_bpb_by_domain": {n: nats[n] / math.log(2) / size[n] for n in nats}}


@torch.no_grad()
def layer_stats(model: Motif, optimizer) -> list[dict]:
    """The ideas at work, per layer: lambda, PolyNorm's weights and bias, norm of each query and key
    head, RMS of the last update of each matrix (over lr)."""
    figures = []
    for block in model.model.layers:
        attention, act, layer = block.self_attn, block.mlp.act_fn, {}
        if attention.noise_heads:
            layer["lambda"] = attention.lambda_().item()
        if act is not None:
            layer["polynorm"] = [*act.weight.tolist(), *act.bias.tolist()]
        for name, weight in ("q", attention.q_proj.weight), ("k", attention.k_proj.weight):
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            heads = weight.unflatten(0, (-1, attention.head_dim))
            layer[f"{name}_norm"] = torch.linalg.matrix_norm(heads).tolist()
        layer["update_rms"] = [optimizer.update_rms[p].item() for p in block.parameters()
                               if p in optimizer.update_rms]
        figures.append({key: np.round(value, 4).tolist() for key, value in layer.items()})
    return figures


def sample_prompts(model: Motif, tokenizer, c: Config, encode) -> str:
    """The prompts, continued up to an end of turn or text."""
    text, ends = "", {tokenizer.special[data.END], tokenizer.special[data.TURN_END]}
    for prompt in c.prompts:
        ids = encode(tokenizer, prompt)
        new = min(c.sample_tokens, c.max_position_embeddings - len(ids))
        start = torch.tensor([ids], device=model.head_weight.device)
        out = model.generate(start, new, temperature=0.8, top_k=50, seed=c.seed)[0].tolist()
        new = [*takewhile(lambda i: i not in ends, out[len(ids):])]
        text += f"[{prompt}]{tokenizer.decode(new)}\n\n"
    return text


PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12,
              "A800": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}  # dense bf16
USABLE = 76 * 2**30              # bytes of a GPU of 80 GB that are ours


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def training_line(plan: data.Curriculum, *, step, tokens, loss, grad_norm, lr, ms, optimizer_ms,
                  tok_per_s, mfu, gib, max_logit, heads_clipped, mixture) -> str:
    left = int((plan.tokens[-1] - tokens) / tok_per_s)
    optimizer = "" if optimizer_ms is None else f" (optimizer {optimizer_ms:.0f})"
    return (f"step {step}/{plan.steps}  loss {loss:.4f}  norm {grad_norm:.2f}  lr {lr:.2e}  "
            f"{ms:.0f} ms{optimizer}  {tok_per_s:,.0f} tok/s  "
            f"mfu {'n/a' if mfu is None else f'{mfu:.1%}'}  "
            f"{'' if gib is None else f'{gib:.1f} GiB  '}"
            f"eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}  logit {max_logit:.1f}  "
            f"clipped {heads_clipped}  "
            + " ".join(f"{name} {share:.0%}" for name, share in mixture.items()))


def validation_line(step: int, steps: int, result: dict) -> str:
    losses = "  ".join(f"{name} {x:.4f}" for name, x in result["val_loss_by_domain"].items())
    quarters = " ".join(f"{x:.3f}" for x in result.get("val_loss_by_quarter", ()))
    return (f"step {step}/{steps}  validation loss {result['val_loss']:.4f}  bits per byte "
            f"{result['val_bpb']:.4f}  ({losses})"
            + (f"  by quarter of the context {quarters}" if quarters else ""))


# ---- the run


def is_due(step: int, every: int | None, anyway: bool) -> bool:
    return every is not None and (step % every == 0 or anyway)


def last_good(out: Path) -> str:
    start = latest_checkpoint(out)
    return f"the last good checkpoint is {start[0]}" if start else "there is no checkpoint"


def install_signal_handlers() -> list[float]:
    """When signals came, filled as they do: SIGTERM or Ctrl-C lets the step end and saves, another
    one more than a second later ends the process at once."""
    got = []

    def handler(number, frame):
        if got and time.monotonic() - got[0] < 1:   # `timeout` sends one to us, one to the group
            return
        if got:
            os._exit(128 + number)
        got.append(time.monotonic())
        if RANK == 0:                               # print may be busy
            os.write(1, b"stopping after this step; once more to stop at once\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return got


def pick_device(c: Config) -> torch.device:
    """One of its own for each rank of a machine. ValueError for a device that is not there."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    name = auto if c.device == "auto" else c.device
    try:
        return torch.empty(1, device=f"cuda:{LOCAL_RANK}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device={c.device}: {str(e).splitlines()[0]}") from None


COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of the weights


def compute_precision(c: Config, device: torch.device) -> str:
    auto = "bf16" if device.type == "cuda" else "fp32"
    return auto if c.precision == "auto" else c.precision


def check_fp8(c: Config, plan: data.Curriculum, device: torch.device) -> None:
    """ValueError if precision=fp8 is asked for and a product of the blocks could not have it."""
    if compute_precision(c, device) != "fp8":
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("precision=fp8 needs a GPU of compute capability 8.9 or more; give "
                         "--precision=bf16")
    with torch.device("meta"):
        matrices = Motif(model_config(c)).matrices()
    sizes = {n for p in matrices.values() for n in p.shape}
    odd = sorted(n for n in sizes | set(plan.seq_len) if n % 16)
    if odd:
        raise UserError("precision=fp8 needs widths and seq_len in multiples of 16; a matrix or "
                         f"sequence of {odd[0]} is none")


def uses_fsdp(c: Config, device: torch.device) -> bool:
    """Only fp32 in one process on a CPU goes without."""
    return WORLD > 1 or device.type == "cuda" or compute_precision(c, device) != "fp32"


def build(c: Config, device: torch.device) -> Motif:
    """A model ready for training, with its first weights, which are the same over any number of
    ranks: blocks recomputed in the backward pass, compiled, sharded by FSDP2, and only then given
    memory.

    FSDP2 keeps matrices and their gradients as fp32 DTensors and puts copies in the precision of
    products in their place while a block runs. Vectors and scalars, a 35,000th of the 12.7B model,
    are left out: they stay fp32 tensors on every rank, so that lambda, norms and PolyNorm are
    computed in fp32, which a policy of their own would do with three more groups in each block. It
    is then for us to add up their gradients."""
    with torch.device("meta"):
        model = Motif(model_config(c))
    for i, block in enumerate(model.model.layers):
        for module in block.modules():
            if isinstance(module, Linear):
                module.fp8 = compute_precision(c, device) == "fp8"
        if i < c.activation_checkpoint_layers:                         # nothing in a block is random
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)
        if c.compile or c.compile is None and device.type == "cuda":
            torch._dynamo.config.recompile_limit = 64    # graphs: one for each shape of a run
            block.forward = torch.compile(block.forward, dynamic=False)
    if uses_fsdp(c, device):
        shard(model, c, device)
    model.to_empty(device=device)
    torch.manual_seed(c.seed)
    model.init_weights()
    return model


def shard(model: Motif, c: Config, device: torch.device) -> None:
    """FSDP2 on each block, and on embedding and head together. Gradients are summed, as the loss is
    over the tokens of all ranks, in fp32 (with FP8 in bf16, as the report has it); one rank keeps
    its bf16 copies through a step."""
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    model.compute_dtype = COMPUTE_DTYPE[compute_precision(c, device)]
    low = WORLD > 1 and compute_precision(c, device) == "fp8"
    policy = MixedPrecisionPolicy(model.compute_dtype, torch.bfloat16 if low else torch.float32,
                                  cast_forward_inputs=False)
    sizes = (c.dp_replicate, WORLD // c.dp_replicate) if c.dp_replicate > 1 else (WORLD,)
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("copy", "shard")[-len(sizes):])
    vectors = {p for p in model.parameters() if p.ndim < 2}
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=vectors,
                    reshard_after_forward=WORLD > 1 and module is not model)
        if WORLD > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)    # gloo has no other
    register_fsdp_forward_method(model, "token_losses")


def reshard(model: Motif) -> None:
    """Put the parameters back where a forward pass without a backward left their copies."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def encode_text_prompt(tokenizer, prompt: str) -> list[int]:
    """How pre-training encodes a prompt."""
    return data.encode_document(tokenizer, prompt)[:-1]


def check_prompts(c: Config, tokenizer, encode=encode_text_prompt) -> None:
    """ValueError for a prompt that is no text or leaves the model no position to go on at."""
    for prompt in c.prompts:
        if not isinstance(prompt, str):
            raise UserError(f"prompts must be a list of texts; {prompt!r} is none")
        if len(encode(tokenizer, prompt)) >= c.max_position_embeddings:
            raise UserError(f"prompt {prompt[:20]!r}... is longer than max_position_embeddings="
                             f"{c.max_position_embeddings}; shorten it")


def check_writable(out: Path) -> None:
    """ValueError if out is not a folder that can be written, without making anything."""
    exists = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        raise UserError(f"{out} cannot be written; give another --out_dir")


def train(c: Config, out: Path, stream, held_out: dict, model: Motif, optimizer, tokenizer,
          start: tuple | None, encode=encode_text_prompt) -> None:
    """The loop, from `start` = (checkpoint, its state) or from step 0 to the end of the stream's
    plan. A stream has plan, batch(step, rank, world), as `tensors` takes it, targets(step), how
    many count in the global batch, and fingerprint(); held_out: name -> such a batch; encode: how
    prompts are read."""
    plan, device = stream.curriculum, model.head_weight.device
    step = begun = start[1]["step"] if start else 0
    skips = NonFiniteSteps(start[1]["skipped"] if start else 0)
    held_out = {name: [t.to(device) for t in to_tensors(rows)] for name, rows in held_out.items()}
    length = torch.from_numpy(data.bytes_per_token(tokenizer)).to(device)
    peak, log = peak_flops(device), Log(out, start, c)
    n = sum(p.numel() for p in model.parameters())
    where = f"{device} and {WORLD - 1} more" if WORLD > 1 else device
    log.say(f"{n:,d} parameters on {where} in {compute_precision(c, device)}; {plan.steps:,d} steps, "
            f"{plan.tokens[-1]:,d} tokens\n{muonclip.describe_routing(model, optimizer)}")
    if start:
        log.say(f"resumed from {start[0]} at step {step}")
        old = {**start[1]["config"], "data": start[1]["data"]}
        new = json.loads(json.dumps({**asdict(c), "data": stream.fingerprint()}))
        for key in new:
            if key not in ("resume", "out_dir") and old.get(key) != new[key]:
                log.say(f"changed since then: {key} was {old.get(key)}, is {new[key]}")
    events = [torch.cuda.Event(enable_timing=True) for _ in "ab"] if device.type == "cuda" else []
    if events:                                      # around the last optimizer step
        optimizer.register_step_pre_hook(lambda *_: events[0].record())
        optimizer.register_step_post_hook(lambda *_: events[1].record())
    signals = []
    timer, timed = time.perf_counter(), step        # when and where the last line was logged
    while True:
        done = step == plan.steps
        model.config.rope_theta = theta_at(c, plan.tokens[step])
        stop = any_rank(done or bool(signals))
        evaluating = log.evaluated < step and is_due(step, c.eval_every, done)
        saving = step > begun and is_due(step, c.save_every, stop)
        if evaluating or saving or stop:
            skips.read(step, c, log)                 # waits for the device: its time is the step's
        aside = time.perf_counter()
        if evaluating:
            with torch.compiler.set_stance("force_eager"):  # one shape more, and training's graphs
                result = evaluate(model, held_out, c.micro_batch_tokens, length)      # become dynamic
                text = sample_prompts(model, tokenizer, c, encode)
            reshard(model)
            log.sample(f"=== step {step}, validation loss {result['val_loss']:.4f}\n{text}")
            log.metric(step=step, tokens=plan.tokens[step], **result,
                       layers=layer_stats(model, optimizer))
            log.say(validation_line(step, plan.steps, result))
        if saving:
            try:
                state = {"skipped": skips.in_a_row, "data": stream.fingerprint()}
                save_checkpoint(out, step, model, optimizer, state, c)
            except OSError as e:
                raise UserError(f"{e}; {last_good(out)}") from None
        if (saving or stop) and RANK == 0:
            from tools.plots import plot_training
            plot_training(out)
        if stop:
            break
        timer += time.perf_counter() - aside

        T, lr = plan.seq_len[step], lr_at(c, plan, step)
        first, own, n = split_rows(plan.rows[step])
        try:
            batch = to_tensors(stream.batch(step, first, WORLD))
        except ValueError as e:                      # a damaged shard
            raise UserError(str(e)) from None
        loss, norm, largest, skip = train_step(
            model, optimizer, pad_rows(batch, own, n), max(1, c.micro_batch_tokens // T),
            stream.num_targets(step), lr, c)
        skips.unread.append(skip)
        if step == begun:              # before, there was nothing to save, and a signal to the
            signals = install_signal_handlers()   # compilers among our processes would leave us waiting
        step += 1

        if is_due(step, c.log_every, step in (1, plan.steps)):
            skips.read(step, c, log)
            if WORLD > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            now, figures = time.perf_counter(), dict(
                step=step, tokens=plan.tokens[step], loss=loss.item(), lr=lr, grad_norm=norm.item(),
                max_logit=largest.max().item(), heads_clipped=int(optimizer.heads_clipped or 0),
                mixture=dict(zip(plan.names, np.round(plan.shares[step - 1], 4).tolist())))
            speed = (plan.tokens[step] - plan.tokens[timed]) / (now - timer)
            flops = sum(flops_per_token(model.config, plan.context[step - 1])) * speed
            figures.update(ms=1000 * (now - timer) / (step - timed), tok_per_s=speed,
                           optimizer_ms=events[0].elapsed_time(events[1]) if events else None,
                           mfu=flops / peak / WORLD if peak else None,
                           gib=torch.cuda.max_memory_allocated() / 2**30 if events else None)
            log.metric(**figures)
            log.say(training_line(plan, **figures))
            timer, timed = now, step
    kept = f"model in {out}/step_{step}" if step in checkpoint_steps(out) else "nothing new to save"
    samples = f", samples in {out}/samples.txt" if c.eval_every else ""
    log.say(f"{'finished' if done else 'stopped'} at step {step}; {kept}, curve in {out}/loss.png"
            f"{samples}")


def setup(c: Config, out: Path):
    """What train takes, checked and built; ValueError for what cannot be, on all ranks alike."""
    plan = make_curriculum(c)
    model_config(c).check()
    if RANK == 0:
        check_writable(out)
    device = pick_device(c)
    check_fp8(c, plan, device)
    tokenizer = data.load_tokenizer(c.tokenizer)
    if tokenizer.n_vocab > c.vocab_size:
        raise UserError(f"tokenizer {c.tokenizer} has {tokenizer.n_vocab} tokens, more than "
                         f"vocab_size={c.vocab_size}; raise that")
    check_prompts(c, tokenizer)
    theta_at(c, 0)
    init_distributed(c, device)
    start = all_gather_object(sync_errors(find_checkpoint if RANK == 0 else lambda *_: None, c, out))[0]
    if start:
        check_compatible(*start, c, plan)
    stores = rank0_first(lambda: data.prepare(c.domains, c.tokenizer, c.data_dir, plan.need(),
                                          workers=c.workers))
    corpus = data.TokenDataset(plan, stores, c.seed)
    if len({*all_gather_object(corpus.fingerprint())}) > 1:
        raise UserError(f"the machines hold different data in {c.data_dir}; copy one's to all")
    held_out = {n: corpus.validation(n, c.eval_tokens, max(plan.seq_len))
                for n in plan.names if c.eval_every}
    first = None
    if c.init:
        from tools.grow import first_weights as first
    model, optimizer = build_model_and_optimizer(c, device, start, first, out)
    return corpus, held_out, model, optimizer, tokenizer, start


def rank0_first(prepare):
    """What prepare() gives each rank. The first makes the data; then, where it does not see them,
    each machine; then all see them."""
    for turn in RANK == 0, LOCAL_RANK == 0, True:
        made = sync_errors(lambda: prepare() if turn else None)
    return made


def build_model_and_optimizer(c: Config, device: torch.device, start: tuple | None, first, out: Path):
    """Model and optimizer as the checkpoint at `start` has them, else with the weights in the
    folder that first(c, out) makes on one rank, else at random."""
    model = build(c, device)
    optimizer = muonclip.configure_optimizer(
        model, lr=c.lr, optimizer=c.optimizer, momentum=c.momentum, weight_decay=c.weight_decay,
        coefficients=c.ns_coefficients, tau=c.qk_clip_threshold, dtype=COMPUTE_DTYPE[compute_precision(c, device)])
    if start:
        sync_errors(load_checkpoint, start[0], model, optimizer)
    elif first:
        made = all_gather_object(sync_errors(first, c, out) if RANK == 0 else sync_errors(int))[0]
        sync_errors(load_into, model.state_dict(), made, "model")
    return model, optimizer


@contextmanager
def friendly_errors(c: Config, out: Path):
    """What may end a run, in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory; halve --micro_batch_tokens={c.micro_batch_tokens}") from None
    except OSError as e:
        raise UserError(f"{e.filename or out}: {one_line(e)}") from None
    except RuntimeError as e:
        if WORLD == 1 or not re.search("gloo|NCCL|Connection|[Tt]imed out", str(e)):
            raise
        raise UserError(f"lost touch with another rank ({one_line(e)}); "
                         f"{last_good(out)}") from None


def main() -> None:
    c = configurator.load(Config, sys.argv[1:], default_file=QUICKSTART)
    file, _ = configurator.split_argv(sys.argv[1:], QUICKSTART)
    c.out_dir = c.out_dir or f"out/{Path(file).stem}"
    out = Path(c.out_dir)
    with friendly_errors(c, out):
        if RANK and (c.dry_run or c.export):         # one process does these
            return
        if c.dry_run:
            from tools.plan import dry_run_report
            return print(dry_run_report(c, make_curriculum(c)))
        if c.export:
            from tools.export import export
            found = latest_checkpoint(out) if c.resume == "auto" else (
                Path(c.resume), read_state(Path(c.resume)))
            if not found:
                raise UserError(f"{out} holds no checkpoint to export; give --resume=PATH")
            return safetensors_errors(export, *found, Path(c.export))
        parts = setup(c, out)
        if RANK == 0:
            out.mkdir(parents=True, exist_ok=True)
            configurator.save(c, out / "config.json")
        train(c, out, *parts)


def exit_rank(said: UserError | None) -> None:
    """Of one of many ranks: rank 0 speaks for all, and torchrun then ends the others. One that is
    still there had trouble of its own. No clean-up, which would wait for ranks that are gone."""
    if said is not None:
        if RANK:
            time.sleep(3)
        print(f"rank {RANK}: {said}" if RANK else said, file=sys.stderr)
    sys.stdout.flush()
    os._exit(1 if said else 0)


def run_main(main) -> None:
    """main(), by one of many ranks or alone."""
    try:
        main()
        if WORLD > 1:
            if dist.is_initialized():
                barrier()                        # all are through
            exit_rank(None)                          # gloo may fail as it is torn down
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run the same command to go on") from None
    except UserError as e:
        if WORLD == 1:
            raise SystemExit(str(e)) from None
        exit_rank(e)


if __name__ == "__main__":
    run_main(main)
