"""Pre-training: `python pretrain.py config/X.py --key=value` trains a Motif. On several GPUs it is
`torchrun --nproc_per_node=8 pretrain.py config/X.py --key=value`. Without a config file it trains
the quick start, config/quickstart.py, in a few minutes on a CPU.

A run reads

    data_dir/              tokens, in pieces; the first run that needs them prepares them (data.py)

and writes

    out_dir/config.json    all knobs of the run
    out_dir/step_N/        a checkpoint: the model in the released layout, the optimizer's state
    out_dir/metrics.jsonl  a line for each logged step and for each evaluation
    out_dir/loss.png       these, drawn
    out_dir/samples.txt    the fixed prompts, continued by the model at each evaluation
    out_dir/log.txt        what was printed
    out_dir/lock           as long as the run lasts, so that no second one begins there

Steps. The code counts from 0: step 0 reads batch 0 with the learning rate of step 0. The logs and
the names of folders count the steps that are done: "step N" is the state after N steps. So step_0
would hold the initial weights, and the line "step 10" reports the loss of batch 9.

To resume, give the same command again (without --resume=no). It continues from the newest
checkpoint in out_dir. On the same number of GPUs the result is bit for bit that of a run which
nothing interrupted; on another, it is equal up to rounding. Ctrl-C, or the SIGTERM that a cluster
sends, lets the current step end, saves a checkpoint (unless save_every is None) and exits with
status 0; until the first step is done there is nothing to save, and they end the run at once.

The file has, in this order: the knobs, the schedules, one training step, what a step reads, the
loop; then FSDP2, checkpoints, validation, the set-up and main. What any training run needs is in
support/: how ranks talk (ranks.py), the log (log.py), and the folder of a run (run_folder.py).
"""
import functools
import json
import math
import os
import secrets
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import configurator
import data
import muonclip
from configurator import Count, Fraction, NonNegative, Seed, Size, UserError, one_line
from kernels import widest_float
from model import Linear, Motif, MotifConfig, flops_per_token
from muonclip import local_shard
from support.log import (Log, NonFiniteSteps, StepTimer, layer_stats, log_end, log_evaluation,
                         log_resumed, log_step)
from support.ranks import (LOCAL_RANK, RANK, WORLD, all_gather_object, all_reduce_sum, any_rank,
                           barrier, init_distributed, install_signal_handlers, on_all_cores,
                           pad_rows, pick_device, rank0_first, rank0_only, run_main, split_rows,
                           sync_errors)
from support.run_folder import (Checkpoint, check_files, check_shared, checksums, find_checkpoint,
                                finish_checkpoint, friendly_errors, last_good, lock_folder,
                                remove_old_checkpoints, remove_temporaries)
from support.tokenizer import (END, TURN_END, Tokenizer, bytes_per_token, encode_document,
                               load_tokenizer)
from support.weights import check_finite, iter_checkpoint, save_tensors

QUICKSTART = str(Path(__file__).parent / "config" / "quickstart.py")

# ---- the knobs
#
# Look these up when needed, and start reading at the schedules. [ours] marks a value that is our
# choice, as no paper states it. HSDP means several copies of the model, each in shards (FSDP2,
# below).

@dataclass
class TrainConfig:
    """The knobs that pre-training and fine-tuning share."""

    # Folders
    out_dir: str | None = None      # all output; None: out/<name of config file>,
                                    # out/sft<stage>, or out/<model>-sft<stage> with sft.py --model
    data_dir: str = "data"          # prepared data, of all runs
    export: str | None = None       # write the newest checkpoint's model into this folder, for
                                    # other programs, and train nothing
    resume: str = "auto"            # auto: the newest checkpoint in out_dir; no: none; or the path
                                    # of a checkpoint, or of a run, whose newest one is taken

    # Compute
    device: str = "auto"            # cpu; cuda, cuda:1, ...; mps, an Apple GPU, on which this was
                                    # never run; auto: CUDA, else mps, else cpu
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # dtype of matrix products; auto:
                                    # bf16 on CUDA, else fp32; fp8: linear layers of the blocks only
    compile: bool | None = None     # torch.compile the blocks; None: on CUDA only
    micro_batch_tokens: Count = 4096  # tokens in one forward pass of one rank, as memory allows;
                                    # at least one row
    activation_checkpoint_layers: Size = 0  # how many blocks, the first ones, recompute activations
                                    # in the backward pass: less memory, more FLOPs
    dp_replicate: Count = 1         # copies of the model among the ranks (HSDP); each is sharded
    sum_embeddings_once: bool = True  # ranks gather embedding and head, and sum their gradients,
                                    # once a step; False: in every micro-batch, which takes less
                                    # memory and more time
    sum_precision: Literal["auto", "fp32", "bf16"] = "auto"  # dtype in which ranks sum the
                                    # gradients of blocks; auto: fp32, but bf16 with precision=fp8
                                    # and one copy of the model
    timeout_seconds: Annotated[int, 1, 10**7] = 600  # how long a rank waits for another before the
                                    # run ends
    seed: Seed = 1337               # of the initial weights and of the order of the data

    # Optimizer
    optimizer: Literal["muonclip", "adamw"] = "muonclip"  # adamw: on every parameter, to compare
    momentum: Fraction = 0.95       # of Muon [ours: no value is published]
    weight_decay: NonNegative = 0.1  # of matrices and embeddings, per step, times lr
    ns_coefficients: Literal["quintic", "motif", "polar_express"] = "motif"  # of Newton-Schulz
    qk_clip_threshold: NonNegative = 100.0  # largest attention logit [ours]; 0: no QK-clip
    embedding_lr_scale: NonNegative = 1.0  # embedding and head learn at lr times this [ours]
    poly_norm_lr_scale: NonNegative = 1.0  # PolyNorm's weights learn at lr times this [ours]
    grad_clip: NonNegative = 1.0    # largest norm of the whole gradient; 0: no clipping
    max_nonfinite_steps: Count = 10  # so many steps in a row with NaN or inf end the run

    # Logging, evaluation, checkpoints
    log_every: Count = 10           # steps from one logged line to the next
    eval_every: Count | None = 100  # evaluate every so many steps, before the first and after the
                                    # last; None: never
    eval_tokens: Count = 8192       # held-out tokens of each domain
    prompts: list = field(default_factory=lambda: ["The "])  # continued at each evaluation
    sample_tokens: Size = 100       # tokens that each prompt is continued by
    save_every: Count | None = 100  # steps between checkpoints, with one at the end; None: none
    keep_last: Annotated[int, 2] = 2  # keep so many of the newest checkpoints: at least 2, in case
                                    # the newest one is damaged
    keep_every: Count | None = None  # checkpoints at multiples of so many steps are never removed
    wandb: str | None = None        # name of a Weights & Biases project, to log there too


@dataclass
class Config(TrainConfig, MotifConfig):
    """Pre-training."""

    # What to do
    init: str | None = None         # initial weights: grow:PATH, from a smaller model;
                                    # average:DIR,k, of a run's last k checkpoints; None: random
    dry_run: bool = False           # print parameters, FLOPs, memory and days; train nothing
    plan_world_size: Count = 8      # GPUs that --dry_run plans for
    assumed_mfu: Fraction = 0.4     # fraction of an H100's peak FLOP/s that --dry_run plans with

    # Length and batch
    max_steps: Count | None = None  # the run ends after so many optimizer steps, or
    max_tokens: Count | None = None  # after so many tokens, whichever comes first
    seq_len: Count | list = 256     # tokens per sequence; or a schedule [[tokens seen, value], ...]
    batch_tokens: Count | list = 4096  # tokens per step over all ranks; or a schedule, as seq_len
    rope_theta_schedule: list | None = None  # [[tokens seen, RoPE's base], ...]; None: rope_theta

    # Learning rate
    lr: NonNegative = 4e-3          # peak learning rate, of Muon and AdamW alike
    warmup_steps: Size = 20         # steps of linear warm-up
    decay_fraction: Fraction = 0.3  # fraction of the run's tokens, at its end, in which lr falls
    decay: Literal["linear", "cosine", "inverse_sqrt"] = "linear"  # the shape of that fall
    min_lr: Fraction = 0.1          # where the fall ends, as a fraction of lr

    lr_may_rise: bool = False       # a prolonged run may go on with a higher learning rate

    # Data
    tokenizer: str = "byte"         # byte, a tiktoken name, a .tiktoken file, a tokenizer.json or a
                                    # folder with one, owner/name of the Hub
    domains: dict = field(default_factory=lambda: {"language": ["builtin:language", 1.0, 1.0]})
                                    # name -> [source, first share, last share] of the tokens
    mixture: list | None = None     # [[fraction of the run, {name: share}], ...] instead of shares
    prepare_part: str = "1/1"       # tools.prepare: part i/n of the data, for machine i of n
    verify: bool = False            # tools.prepare: check what is prepared, and make nothing
    workers: Count | None = None    # processes that prepare data at a time; None: one per core
    keep_read_pieces: Size | None = None  # pieces of some 4M tokens of each domain that are kept
                                    # behind the run; None: all. With a number no other run may use
                                    # this data_dir: it would miss what is deleted


def model_config(c: Config) -> MotifConfig:
    """The part of the config that describes the model."""
    return MotifConfig(**{f.name: getattr(c, f.name) for f in fields(MotifConfig)})


# ---- schedules: learning rate and RoPE's base
#
# Both follow the curriculum, which says what each step reads (data.Curriculum):
#
#     tokens[t]     how many tokens were read before step t; tokens[steps] is the total
#     rows[t]       sequences in its global batch
#     seq_len[t]    tokens of a sequence
#
# The learning rate follows WSD: warm-up, stable, decay (Motif-2, arXiv 2511.07464). A cosine over
# the whole run depends on the run's length from its first step on. Here the stable part does not:
# a checkpoint from it can be trained for as long as one likes, and decayed whenever a finished
# model is wanted. Much of the fall of the loss comes only then, in the decay.
#
#     lr            ______________________________
#                  /                              \_
#                 /                                 \_
#                /                                    \_
#              /                                       \_   min_lr
#     0       /
#              |---|------------------------------|--------|
#              warmup_steps                       decay_fraction of the tokens

def lr_at(c: Config, curriculum: data.Curriculum, step: int) -> float:
    """The learning rate of a step, counted from 0. The warm-up rises in steps of equal size. If
    the decay begins during the warm-up, the lower of the two rates is taken. In the decay the peak
    is multiplied by one of

        linear        1 - (1 - m) x
        cosine        m + (1 - m) (1 + cos(pi x)) / 2
        inverse_sqrt  1 / sqrt(1 + x (1 / m^2 - 1)), where m is at least 1e-3

    Here m is min_lr, and x is the fraction of the decay's tokens that was read before the step. All
    three are 1 at x = 0 and m (the third at least 1e-3) at x = 1. The last step begins before x =
    1: below, at x = 0.75.

    >>> c = Config(lr=1.0, warmup_steps=3, decay_fraction=0.4, min_lr=0.1, max_steps=10)
    >>> curriculum = make_curriculum(c)
    >>> [round(lr_at(c, curriculum, step), 3) for step in range(10)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325]
    """
    left = 1 - curriculum.tokens[step] / curriculum.tokens[-1]
    x = 1 - min(1, left / max(c.decay_fraction, 1e-12))
    if c.decay == "linear":
        factor = 1 - (1 - c.min_lr) * x
    elif c.decay == "cosine":
        factor = c.min_lr + (1 - c.min_lr) * (1 + math.cos(math.pi * x)) / 2
    else:
        factor = (1 + x * (max(c.min_lr, 1e-3)**-2 - 1))**-0.5
    return min(warm_up(c, step), c.lr * factor)


def warm_up(c: Config, step: int) -> float:
    """The learning rate that a step has in the warm-up; beyond it, more than the peak."""
    return c.lr * (step + 1) / (c.warmup_steps + 1)


def theta_at(c: Config, tokens: int) -> float:
    """RoPE's base once so many tokens have been read. One raises the base as the sequences get
    longer.

    >>> c = Config(rope_theta_schedule=[[0, 10_000], [1_000_000, 500_000]])
    >>> theta_at(c, tokens=999_999), theta_at(c, tokens=1_000_000)
    (10000.0, 500000.0)
    """
    if not c.rope_theta_schedule:
        return float(c.rope_theta)
    schedule = data.parse_schedule("rope_theta_schedule", c.rope_theta_schedule)
    return float(data.value_at(schedule, tokens))


def theta_of_step(c: Config, curriculum: data.Curriculum, step: int) -> float:
    """RoPE's base in a step, and in an evaluation before it; after the last step that of the last
    one."""
    last_step = curriculum.steps - 1
    return theta_at(c, curriculum.tokens[min(step, last_step)])


# ---- one training step
#
# The loss. A rank goes through its rows in micro-batches, as many rows at a time as its memory
# holds. Each micro-batch contributes
#
#     sum of its token losses / num_targets
#
# where num_targets counts the targets of the *global* batch, of all micro-batches of all ranks. So
# contributions only have to be added, over micro-batches (backward() adds to .grad) and over ranks,
# and the result is the mean loss and its gradient. To average the ranks' means would be wrong: in
# fine-tuning only replies are targets, and some ranks have more of them than others.
#
# The gradient. On one GPU there is nothing to sum: skip this at first. On several, FSDP2 (below)
# shards the matrices. It sums their gradients over the ranks, and each rank keeps its own shard of
# the sum (set_gradient_sync):
#
#     gradients of            are summed over the ranks
#     blocks                  after each micro-batch, as no rank has room for all of them, whole
#     embedding and head      once a step. Until then each rank adds up its own, whole and in fp32
#                             (with sum_embeddings_once=False after each micro-batch, too)
#
# Where there are copies of the model (HSDP), the copies add up their shards once a step. Vectors
# are whole on every rank; reduce_and_clip sums their gradients.
#
# NaN. A loss or gradient that is not finite must not reach the weights. But if the host read the
# loss at every step to find out, the GPU would be idle meanwhile. So the decision, `skipped`, is a
# tensor on the GPU, where the optimizer reads it. The host reads it later, when it logs a line and
# has to wait anyway. Too many skipped steps in a row end the run.

class StepResult(NamedTuple):
    """Tensors on the device; to read one is to wait for the step."""
    loss: Tensor          # the mean over all targets of the global batch, in nats
    grad_norm: Tensor     # of the whole gradient, before clipping
    max_logits: Tensor    # (layers, H): each head's largest attention logit, on this rank; the
                          # optimizer takes the maximum over ranks
    skipped: Tensor       # bool: loss or gradient was not finite, and nothing was updated


def train_step(model: Motif, optimizer, batch: tuple, micro_batch_rows: int, num_targets: int,
               lr: float, c: Config) -> StepResult:
    """One optimizer step. batch: ids, targets and, in fine-tuning, doc_ids, each (R, T): the R rows
    of this rank, on the CPU. micro_batch_rows: how many of them go through the model at a time.
    num_targets: how many targets the global batch has."""
    device = model.head_weight.device
    on_cuda = device.type == "cuda"
    if on_cuda:
        # From pinned memory the copy runs while the host goes on.
        batch = [t.pin_memory() for t in batch]
    batch = [t.to(device, non_blocking=on_cuda) for t in batch]

    loss, max_logits = forward_backward(model, batch, micro_batch_rows, num_targets,
                                        c.sum_embeddings_once)
    loss, grad_norm = reduce_and_clip(model, loss, c.grad_clip, c.dp_replicate)
    skipped = ~torch.isfinite(loss + grad_norm)

    for group in optimizer.param_groups:
        group["lr"] = lr                    # MuonClip multiplies it by the group's lr_scale
    optimizer.step(max_logits=max_logits, skip=skipped)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, max_logits, skipped)


def forward_backward(model: Motif, batch: tuple, micro_batch_rows: int, num_targets: int,
                     sum_embeddings_once: bool = True):
    """Go through the rows of a batch in micro-batches, and add up their gradients in .grad -> (this
    rank's part of the loss, the largest attention logits in its rows (layers, H)).

    For example, rank 0 has targets with losses of 1, 2 and 3 nats, rank 1 has one of 6 nats. Each
    divides by the 4 targets of the global batch, and their parts add up to the mean. (The mean of
    the ranks' means would be 4.) In place of a model, here is a function that takes losses instead
    of ids, and multiplies them by a weight of 1:

    >>> weight = torch.ones(1, requires_grad=True)
    >>> def model(losses, reduction, scale):
    ...     model.max_logits = losses.max()
    ...     return scale * (weight * losses).sum()
    >>> rank0 = (torch.tensor([[1.0], [2.0], [3.0]]),)
    >>> rank1 = (torch.tensor([[6.0]]),)
    >>> loss0, _ = forward_backward(model, rank0, micro_batch_rows=2, num_targets=4)
    >>> loss1, _ = forward_backward(model, rank1, micro_batch_rows=2, num_targets=4)
    >>> (loss0 + loss1).item(), weight.grad.item()
    (3.0, 3.0)
    """
    loss = torch.zeros((), device=batch[0].device)
    max_logits = None
    is_fsdp = hasattr(model, "reshard")     # what fully_shard has made of the model has that method
    micro_batches = split_micro_batches(batch, micro_batch_rows)
    for i, micro_batch in enumerate(micro_batches):
        if is_fsdp:
            set_gradient_sync(model, i == len(micro_batches) - 1, sum_embeddings_once)
        # micro_batch: ids, targets and perhaps doc_ids. The forward pass also leaves the largest
        # attention logits in model.max_logits, for QK-clip.
        part = model(*micro_batch, reduction="sum", scale=1 / num_targets)
        part.backward()
        loss += part.detach()
        if max_logits is None:
            max_logits = model.max_logits
        else:
            max_logits = torch.maximum(max_logits, model.max_logits)
    return loss, max_logits


def split_micro_batches(batch: tuple, rows: int) -> list[tuple]:
    """Ids, targets, ..., each (R, T) -> tuples of the same with at most so many rows."""
    return list(zip(*[t.split(rows) for t in batch]))


def set_gradient_sync(model: Motif, is_last: bool, sum_embeddings_once: bool) -> None:
    """Tell FSDP2 what to do at the end of a micro-batch's backward pass."""
    # Copies of the model (HSDP) sum their gradients once a step.
    model.set_requires_all_reduce(is_last)

    # Embedding and head, the group of `model` itself, are 1.8B of the 12.7B parameters, and nothing
    # can be computed while they arrive or while their gradients leave. So they stay gathered until
    # the last micro-batch, if the rank has room; and on a single rank the blocks do as well. What
    # is not set here, FSDP2 does after each micro-batch.
    if WORLD == 1 or sum_embeddings_once:
        also_blocks = WORLD == 1
        model.set_reshard_after_backward(is_last, recurse=also_blocks)
        model.set_requires_gradient_sync(is_last, recurse=also_blocks)


def reduce_and_clip(model: Motif, loss: Tensor, max_norm: float, replicas: int):
    """Sum over the ranks what FSDP2 does not sum: the loss and the gradients of vectors. Then clip:
    scale the whole gradient to a norm of at most max_norm (0: no clipping) -> (loss, the norm
    before clipping).

    The norm is the root of the sum of squares. Each rank sums the squares of its shards of
    matrices. Summed over the ranks that counts each number `replicas` times, once for each copy of
    the model, hence the division. Vectors are the same on all ranks, and are counted once.

    For example, the matrix [[3, 0], [0, 4]] and the vector (0, 12) have the norm
    sqrt(9 + 16 + 144) = 13. Clipping to 6.5 halves all numbers, and 12 becomes 6.

    >>> model = torch.nn.Linear(2, 2)
    >>> model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> model.bias.grad = torch.tensor([0.0, 12.0])
    >>> loss, norm = reduce_and_clip(model, torch.tensor(2.5), max_norm=6.5, replicas=1)
    >>> norm.item(), round(model.bias.grad[1].item(), 4)
    (13.0, 6.0)
    """
    with_grad = [p for p in model.parameters() if p.grad is not None]
    matrices = [local_shard(p.grad) for p in with_grad if p.ndim > 1]
    vectors = [p.grad for p in with_grad if p.ndim < 2]
    if WORLD > 1:
        # In one message, as each of them is small.
        flat = all_reduce_sum(torch.cat([v.flatten() for v in vectors]))
        sums = flat.split([v.numel() for v in vectors])
        torch._foreach_copy_(vectors, [s.view_as(v) for s, v in zip(sums, vectors)])

    get_norm = torch.nn.utils.get_total_norm
    squares = get_norm(matrices).square() / replicas
    loss, squares = all_reduce_sum(torch.stack([loss, squares]))
    norm = (squares + get_norm(vectors).square()).sqrt()
    if max_norm:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(matrices + vectors, factor)
    return loss, norm


# ---- what a training step reads

class Dataset(Protocol):
    """What `train` trains on. data.TokenDataset and sft.PackedChatDataset implement it.

    A batch is a pure function of the seed, the step and the plan that `curriculum` is. So a run
    that resumes reads what it would have read, and the number of ranks does not matter."""

    curriculum: data.Curriculum      # or an object with its steps, tokens, rows, seq_len, shares
                                     # and names; earlier_plans (see continue_curriculum);
                                     # and context[t], the length that FLOPs of step t are counted
                                     # with

    def batch(self, step: int, first_row: int, world: int) -> np.ndarray | tuple:
        """Rows first_row, first_row + world, ... of the step's global batch, R of them, in int64:
        either rows of consecutive tokens, (R, T + 1), or ids, targets and doc_ids, each (R, T),
        where a target of -1 does not count and a token sees only its own document. first_row is
        the rank's number; a rank for which no row is left reads one of another rank, as padding
        (support/ranks.py: split_rows)."""

    def num_targets(self, step: int) -> int:
        """How many targets count in the step's global batch."""

    def fingerprint(self) -> str:
        """A hash of the data, by which a run that resumes can tell whether they have changed."""


def to_tensors(batch) -> tuple[Tensor, ...]:
    """A Dataset's batch -> ids, targets and, if it has them, doc_ids, each (R, T)."""
    if isinstance(batch, np.ndarray):
        batch = (batch[:, :-1], batch[:, 1:])
    return tuple(torch.from_numpy(array) for array in batch)


def read_batch(dataset: Dataset, step: int) -> tuple[Tensor, ...]:
    """This rank's rows of a step. All ranks get equally many: some get a row more, without targets
    (support/ranks.py: split_rows, pad_rows)."""
    first, own, padded = split_rows(dataset.curriculum.rows[step])
    batch = to_tensors(dataset.batch(step, first, WORLD))
    return pad_rows(batch, own, padded)


# ---- the training loop

def train(c: Config, out: Path, dataset: Dataset, held_out, model: Motif, optimizer,
          tokenizer: Tokenizer, start: Checkpoint | None, encode_prompt, task_scores=None) -> None:
    """Train to the end of the dataset's curriculum, or until a signal comes.

    start           the checkpoint to go on from; None: begin at step 0
    held_out        domain -> rows to evaluate on, like Dataset.batch's; or a function of the
                    row length T that returns such a dict
    encode_prompt   (tokenizer, text of a prompt) -> ids
    task_scores     model -> {task: {metric: score}}, to log at each evaluation; or None"""
    curriculum = dataset.curriculum
    device = model.head_weight.device
    state = start.state if start else {"step": 0, "skipped": 0}
    start_step = state["step"]
    nonfinite = NonFiniteSteps(in_a_row=state["skipped"])
    log = begin_log(c, out, dataset, model, optimizer, start)
    validation = Validation(c, held_out, curriculum, tokenizer, encode_prompt, task_scores, device)
    timer = StepTimer(start_step, optimizer, device)
    signals = []    # when they arrived; the handlers are installed after the first step
    step = start_step
    while True:
        finished = step == curriculum.steps
        stop = any_rank(finished or bool(signals))
        # Also evaluate after the last step and save at any stop. A resumed run repeats neither.
        evaluate_now = step > log.last_evaluation and is_due(step, c.eval_every, or_if=finished)
        save_now = step > start_step and is_due(step, c.save_every, or_if=stop)
        model.config.rope_theta = theta_of_step(c, curriculum, step)

        # What is not training: evaluate and save, where that is due; stop.
        if evaluate_now or save_now or stop:
            nonfinite.check(step, c, log)
        timer.pause()
        if evaluate_now:
            evaluate_and_log(validation, model, optimizer, curriculum, step, log)
        if save_now:
            save_checkpoint(out, step, model, optimizer,
                            state_to_save(nonfinite, dataset, tokenizer), c)
        if save_now or stop:
            log.draw()
        if stop:
            break
        timer.resume()

        # Training: one step.
        tell_of_compiling(log, c, device, curriculum.seq_len, step, start_step)
        batch = read_batch(dataset, step)
        lr = lr_at(c, curriculum, step)
        micro_batch_rows = max(1, c.micro_batch_tokens // curriculum.seq_len[step])
        result = train_step(model, optimizer, batch, micro_batch_rows, dataset.num_targets(step),
                            lr, c)
        nonfinite.add(result.skipped)
        if step == start_step:
            signals = install_signal_handlers()  # not earlier: see there
        step += 1

        if is_due(step, c.log_every, or_if=step in (1, curriculum.steps)):
            nonfinite.check(step, c, log)
            forward, backward = flops_per_token(model.config, curriculum.context[step - 1])
            log_step(log, timer, optimizer, curriculum, step, lr, result, forward + backward)

    log_end(log, c, step, finished)


def tell_of_compiling(log: Log, c: Config, device: torch.device, seq_len: list[int], step: int,
                      start_step: int) -> None:
    """Say why a step takes longer: torch.compile makes a graph for each length of rows. (It makes
    another where their number changes, which is not announced.)"""
    is_new = step == start_step or seq_len[step] != seq_len[step - 1]
    if compiles(c, device) and is_new:
        log.print(f"compiling for rows of {seq_len[step]:,d} tokens: step {step + 1} takes half a "
                  "minute longer, or more")


def state_to_save(nonfinite: NonFiniteSteps, dataset: Dataset, tokenizer: Tokenizer) -> dict:
    """What a checkpoint's state.json holds of the run itself."""
    return {"skipped": nonfinite.in_a_row, "plans": dataset.curriculum.earlier_plans,
            "data": dataset.fingerprint(), "tokenizer": tokenizer.fingerprint().hex()}


def begin_log(c: Config, out: Path, dataset: Dataset, model: Motif, optimizer,
              start: Checkpoint | None) -> Log:
    """Open the log, and say what is trained."""
    # What metrics.jsonl has beyond that step is dropped (-1: all). log.last_evaluation is the last
    # one in what stays, which is not repeated.
    log = Log(out, start.state["step"] if start else -1, c)
    curriculum = dataset.curriculum
    device = model.head_weight.device
    where = f"{device} and {WORLD - 1} more" if WORLD > 1 else device
    parameters = sum(p.numel() for p in model.parameters())
    log.print(f"{parameters:,d} parameters on {where} in {compute_precision(c, device)}; "
              f"{curriculum.steps:,d} steps, {curriculum.tokens[-1]:,d} tokens")
    log.print(muonclip.describe_routing(model, optimizer))
    if start:
        log_resumed(log, start, c, dataset.fingerprint())
    if c.eval_every and not can_be_gathered(model):
        log.print(NO_SAMPLES)
    return log


def evaluate_and_log(validation: "Validation", model: Motif, optimizer, curriculum, step: int,
                     log: Log) -> None:
    result, samples = validation.evaluate_and_sample(model, step)
    layers = layer_stats(model.model.layers, optimizer)
    log_evaluation(log, curriculum, step, result, layers, samples)


def is_due(step: int, every: int | None, or_if: bool) -> bool:
    """Whether step is a multiple of `every`, or or_if is true. If `every` is None: never."""
    return every is not None and (step % every == 0 or or_if)


# ---- the model over many GPUs: FSDP2
#
# The problem. The 12.7B model takes 4 bytes a parameter for weights, 4 for gradients and 4 for
# Muon's momentum (or 8, AdamW's two moments): more than 150 GB, and a GPU has 80.
#
# The idea. FSDP2 cuts each matrix by rows into a shard for each rank, which keeps weight, gradient
# and momentum of its shard alone, in fp32: on 8 GPUs some 20 GB. A whole matrix of a block exists
# only while it is used, in bf16. A block of the 12.7B model is 0.55 GB then:
#
#     forward    for each block: all-gather | compute | free
#     backward   for each block: all-gather | compute | free, reduce-scatter the gradient in fp32
#                                                             (with FP8 in bf16)
#
# The next block's all-gather runs while this one computes. Nothing else changes: the model computes
# as on one GPU, except for the order in which gradients are added up. With HSDP (dp_replicate > 1)
# the ranks form several such groups, each with a copy of the model. So all-gathers can stay within
# a machine, and between machines there is one all-reduce of gradients a step.
#
# Vectors and scalars (norms, lambdas, PolyNorm) are left out, as `ignored_params`: every rank has
# them whole. They are one parameter in 35,000, so sharding would save nothing; and they are used in
# fp32, while all parameters of an FSDP2 group are cast to one dtype.
#
# A single process uses FSDP2 too, on a GPU or in bf16: FSDP2 makes the bf16 copies of the fp32
# weights. Only a single process that trains in fp32 without CUDA does not use it.

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def compute_precision(c: TrainConfig, device: torch.device) -> str:
    """A key of COMPUTE_DTYPE: the config's precision, or what "auto" is on this device."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    return auto if c.precision == "auto" else c.precision


def uses_fsdp(c: TrainConfig, device: torch.device) -> bool:
    return WORLD > 1 or device.type == "cuda" or compute_precision(c, device) != "fp32"


def meet_ranks(c: TrainConfig, device: torch.device) -> None:
    """Form a process group with the other ranks, and check that they share out_dir. FSDP2 needs a
    group even for a single rank."""
    if WORLD % c.dp_replicate:
        raise UserError(f"{WORLD} ranks cannot be dp_replicate={c.dp_replicate} copies of the same "
                        "size; give a divisor")
    if c.sum_precision == "bf16" and c.dp_replicate > 1:
        raise UserError(f"sum_precision=bf16 and dp_replicate={c.dp_replicate} would add up "
                        "micro-batches in bf16; give --sum_precision=fp32")
    init_distributed(device, c.timeout_seconds, even_alone=uses_fsdp(c, device))
    if WORLD > 1 and c.out_dir:
        check_shared(Path(c.out_dir))


def build(c: Config, device: torch.device) -> Motif:
    """A model that is ready for training. Its weights are random, by c.seed, and do not depend on
    the number of ranks."""
    # On the meta device tensors have no memory. So a model that fits no GPU can be built, sharded,
    # and given memory for its shards alone.
    with torch.device("meta"):
        model = Motif(model_config(c))

    for i, block in enumerate(model.model.layers):
        for module in block.modules():
            if isinstance(module, Linear):
                module.fp8 = compute_precision(c, device) == "fp8"
        if compiles(c, device):
            # Each shape of a micro-batch gets a graph of its own: one for each sequence length of
            # the curriculum, one more where the last micro-batch has fewer rows, and others where
            # the batch grows.
            torch._dynamo.config.recompile_limit = 64
            block.forward = torch.compile(block.forward, dynamic=False)
        if i < c.activation_checkpoint_layers:
            # This goes around the compiled block. Inside of it torch.compile would keep what our
            # Triton kernels return and not compute it again: 1 GiB a block of the 12.7B model.
            # Nothing in a block is random, so there is no random state to restore.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)

    if uses_fsdp(c, device):
        shard(model, c, device)
    model.to_empty(device=device)
    torch.manual_seed(c.seed)
    model.init_weights()
    return model


def compiles(c: Config, device: torch.device) -> bool:
    """Whether torch.compile compiles the blocks."""
    return device.type == "cuda" if c.compile is None else c.compile


def shard(model: Motif, c: Config, device: torch.device) -> None:
    """Hand the model to FSDP2. It gathers and frees the matrices of a group together: each block is
    a group, and the embedding and the head form one more."""
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    precision = compute_precision(c, device)
    model.compute_dtype = COMPUTE_DTYPE[precision]

    # The dtype in which ranks sum gradients is fp32; for blocks, with FP8, bf16, as the report has
    # it. In that dtype FSDP2 also adds up the micro-batches of a step, where it sums over ranks or
    # copies only after the last one. There a running total in bf16 would lose what is small. So
    # bf16 is ruled out for embedding and head, with copies of the model (HSDP), and on one rank.
    in_bf16 = c.sum_precision == "bf16" or (c.sum_precision == "auto" and precision == "fp8")
    in_bf16 = in_bf16 and WORLD > 1 and c.dp_replicate == 1
    block_dtype = torch.bfloat16 if in_bf16 else torch.float32
    sizes = (WORLD,)
    names = ("shard",)
    if c.dp_replicate > 1:
        sizes = (c.dp_replicate, WORLD // c.dp_replicate)
        names = ("replicate", "shard")
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=names)

    vectors = {p for p in model.parameters() if p.ndim < 2}
    for module in [*model.model.layers, model]:
        # `model` is here the group of the embedding and the head. The backward pass begins with the
        # head, so that group is not freed after the forward pass.
        free = WORLD > 1 and module is not model
        sum_dtype = torch.float32 if module is model else block_dtype
        policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=sum_dtype,
                                      cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=vectors,
                    reshard_after_forward=free)
        if WORLD > 1:
            # The loss is divided by the global number of targets, so gradients are summed, not
            # averaged. And a sum is all that gloo can do.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "token_losses")   # evaluate calls it, not forward


# Sampling takes a forward pass for each new token. To all-gather the whole model for each of them
# would take minutes, so it is gathered once, and freed after the last prompt. A model that is too
# large for that writes no samples, and has no task scores.

SAMPLE_BYTES = 30 * 10**9    # of the gathered model [ours]: Motif-2-12.7B has 25 GB in bf16
NO_SAMPLES = ("no samples and no task scores: the model is larger than SAMPLE_BYTES, and no rank "
              "could gather it")


def can_be_gathered(model: Motif) -> bool:
    """Whether a rank has room for all matrices at once. A single rank has them anyway."""
    parameters = sum(p.numel() for p in model.parameters())
    return WORLD == 1 or parameters * model.compute_dtype.itemsize <= SAMPLE_BYTES


def reshard_after_forward(model: Motif, free: bool) -> None:
    """Tell FSDP2 whether to free the matrices of a block after its forward pass."""
    for block in model.model.layers:
        if hasattr(block, "reshard"):
            block.set_reshard_after_forward(free, recurse=False)


def free_gathered(model: Motif) -> None:
    """Free the gathered matrices. After a backward pass FSDP2 does so by itself."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# ---- checkpoints
#
#     out_dir/step_120/
#         config.json, model.safetensors    the model in the released layout, in fp32: a folder that
#                                           Motif.from_pretrained reads, and so sft.py and eval.py
#         optimizer/state.safetensors       "<parameter>.momentum", "<parameter>.exp_avg", ...
#         state.json                        step, config, the plans that it followed before (if it
#                                           was prolonged), skipped steps in a row, fingerprints of
#                                           data and tokenizer, versions, each file's size and
#                                           checksum
#
# To resume a run needs no more: the data follow from the seed, the step and the plan, and no step
# draws random numbers. (Where a file would be larger than FILE_BYTES, there are several files and
# an index.) A crash, at whatever moment, leaves the checkpoint before as it was (run_folder.py).
#
# From any number of ranks to any other. A file has whole tensors: the ranks gather them one by one,
# and where there are several files, each rank writes some. A rank that loads a checkpoint reads the
# rows of its own shards.

FILE_BYTES = 5 * 10**9


def save_checkpoint(out: Path, step: int, model: Motif, optimizer, state: dict, c: Config) -> None:
    """Write out/step_N, all ranks together, then remove old checkpoints. `state` goes into
    state.json, beside step and config."""
    folder = out / f"step_{step}"
    temporary = out / f"step_{step}.tmp"
    try:
        rank0_only(remove_temporaries, out)
        rank0_only(os.makedirs, temporary / "optimizer")
        # In two calls: if a rank cannot write the model, all stop before the optimizer.
        sync_errors(model.save_pretrained, temporary, FILE_BYTES)
        sync_errors(save_tensors, temporary / "optimizer", "state",
                    optimizer_tensors(model, optimizer), FILE_BYTES)
        state = {"step": step, **state, "checksums": checksums(temporary)}
        rank0_only(finish_checkpoint, temporary, folder, state, c)
    except (OSError, UserError) as e:
        if RANK == 0:
            remove_temporaries(out)
        raise UserError(f"checkpoint {folder} could not be written: {one_line(e)}; "
                        f"{last_good(out)}") from None
    if RANK == 0:
        remove_old_checkpoints(out, step, c)


def optimizer_tensors(model: Motif, optimizer) -> dict[str, Tensor]:
    """"<parameter>.<state>" -> the optimizer's own tensor, not a copy. They exist before the first
    step, as MuonClip makes them when it is constructed; so a checkpoint can be loaded into them.

    Where FSDP2 shards the parameter, which is a DTensor then, the optimizer keeps this rank's shard
    as a plain tensor. Here that becomes a DTensor too, which knows the whole shape, so that it is
    saved and loaded as the parameter is."""
    from torch.distributed.tensor import DTensor
    tensors = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            if hasattr(p, "placements") and value.ndim > 0:
                value = DTensor.from_local(value, p.device_mesh, p.placements, shape=p.shape,
                                           stride=p.stride())
            tensors[f"{name}.{key}"] = value
    return tensors


def load_checkpoint(folder: Path, model: Motif, optimizer, out: Path) -> None:
    """Copy a checkpoint's weights and optimizer state into these, in place. out: the folder of the
    run that loads it."""
    try:
        check_files(folder)
        load_into(model.state_dict(), folder, "model")
        load_into(optimizer_tensors(model, optimizer), folder / "optimizer", "state")
    except UserError as e:
        advice = "give another --resume"
        if folder.resolve().parent == out.resolve():
            advice = f"move {folder} away to go on from the checkpoint before, if there is one"
        raise UserError(f"{e}; {advice}") from None


@torch.no_grad()
def load_into(tensors: dict[str, Tensor], folder: Path, stem: str) -> None:
    """Copy stored tensors into these, in place. Where one is sharded, only this rank's rows are
    read."""
    shapes = {name: t.shape for name, t in tensors.items()}
    for name, read in iter_checkpoint(folder, stem, shapes):
        t = tensors[name]
        own = local_shard(t)
        slices = ()
        if hasattr(t, "placements"):
            mesh = t.device_mesh
            slices = muonclip.local_slices(t.shape, mesh.shape, muonclip.shard_dims(t),
                                           mesh.get_coordinate())
        if own.numel() > 0:
            own.copy_(read(*slices))
            check_finite(folder, name, own)


def check_compatible(start: Checkpoint, c: Config, curriculum: data.Curriculum,
                     tokenizer: Tokenizer) -> None:
    """UserError if the run cannot go on from this checkpoint."""
    folder, state = start
    if state["step"] > curriculum.steps:
        raise UserError(f"checkpoint {folder} is beyond the end at step {curriculum.steps}; make "
                        "the run longer or give another --out_dir")
    must_agree = {f.name for f in fields(MotifConfig)} | {"optimizer", "seed"}
    must_agree -= {"poly_norm_scale"}               # of fresh weights alone
    must_agree -= {"max_position_embeddings"}       # no tensor depends on it
    theirs = {key: state["config"].get(key) for key in sorted(must_agree)}
    others = {key: value for key, value in theirs.items() if value != getattr(c, key)}
    if others:
        told = ", ".join(f"{key}={value}, not {getattr(c, key)}" for key, value in others.items())
        options = " ".join(f"--{key}={value}" for key, value in others.items())
        raise UserError(f"checkpoint {folder} has {told}; give {options}, or for a new run another "
                        "--out_dir and no --resume")
    if state.get("tokenizer", tokenizer.fingerprint().hex()) != tokenizer.fingerprint().hex():
        raise UserError(f"checkpoint {folder} was trained with another tokenizer than "
                        f"{c.tokenizer}: give --tokenizer={state['config'].get('tokenizer')} as it "
                        "was then, or for a new run another --out_dir and no --resume")


# ---- validation
#
# The loss, in nats per token, cannot be compared between tokenizers: the longer the tokens, the
# fewer of them a text has, and the harder each is to predict. Bits per byte can be compared:
#
#     sum of the losses of a text's tokens in nats / ln 2 / length of the text in bytes (UTF-8)
#
# For example, "2 + 2" has 5 bytes. In 2 tokens with losses of 1 and 2.47 nats it has 3.47 / 0.693 =
# 5 bits, 1 bit per byte. In 5 tokens with losses of 0.693 nats each it has as many, although their
# mean loss is much lower. The token that ends a document is predicted too; its length is 0 bytes.
#
# The losses by quarter of the context tell whether a model uses what it has read: the loss of the
# last quarter of a row should be lower than that of the first.

@torch.no_grad()
def evaluate(model: Motif, held_out: dict[str, tuple], micro_batch_tokens: int,
             token_bytes: Tensor) -> dict:
    """Validation loss and bits per byte, over all domains and of each; and the loss by quarter of
    the context, unless rows are packed (they have doc_ids) or shorter than four tokens.

    held_out: domain -> (ids, targets[, doc_ids]), each (R, T), on the device and the same on all
    ranks, which divide the rows among them. token_bytes (V,): the length of each token in bytes."""
    # Per domain: nats, tokens and bytes of the targets, each by quarter of the context.
    dtype = widest_float(token_bytes.device)
    totals = torch.zeros(len(held_out), 3, 4, dtype=dtype, device=token_bytes.device)
    packed = False
    for total, batch in zip(totals, held_out.values()):
        packed = packed or len(batch) > 2
        rows, T = batch[0].shape
        first, own, padded = split_rows(rows)
        batch = pad_rows([t[first::WORLD] for t in batch], own, padded)
        for micro_batch in split_micro_batches(batch, max(1, micro_batch_tokens // T)):
            targets = micro_batch[1]
            counted = targets >= 0
            total[0] += sum_quarters(model.token_losses(*micro_batch).to(dtype))
            total[1] += sum_quarters(counted)
            total[2] += sum_quarters(counted * token_bytes[targets.clamp(min=0)])
    totals = all_reduce_sum(totals).cpu()

    nats, tokens, text_bytes = totals.sum(2).T.tolist()                     # each a list by domain
    result = {"val_loss": sum(nats) / sum(tokens),
              "val_bpb": sum(nats) / math.log(2) / sum(text_bytes)}
    nats_by_quarter, tokens_by_quarter, _ = totals.sum(0)
    if not packed and tokens_by_quarter.all():
        result["val_loss_by_quarter"] = (nats_by_quarter / tokens_by_quarter).tolist()
    by_domain = list(zip(held_out, nats, tokens, text_bytes))
    result["val_loss_by_domain"] = {name: x / n for name, x, n, _ in by_domain}
    result["val_bpb_by_domain"] = {name: x / math.log(2) / n for name, x, _, n in by_domain}
    return result


def sum_quarters(t: Tensor) -> Tensor:
    """(R, T) -> (4,), the sum of each quarter of the columns."""
    return torch.stack([quarter.sum() for quarter in t.tensor_split(4, dim=1)])


def encode_text_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """How pre-training reads a prompt: as a document that has not ended."""
    return encode_document(tokenizer, prompt)[:-1]


def sample_prompts(model: Motif, tokenizer: Tokenizer, c: Config, encode_prompt) -> str:
    """Each prompt and how the model continues it, up to an end of text or of a turn."""
    text = ""
    for prompt in c.prompts:
        ids = encode_prompt(tokenizer, prompt)
        new_tokens = min(c.sample_tokens, c.max_position_embeddings - len(ids))
        row = torch.tensor([ids], device=model.head_weight.device)
        row = model.generate(row, new_tokens, temperature=0.8, top_k=50, seed=c.seed)
        continuation = row[0, len(ids):].tolist()
        for end in (tokenizer.special[END], tokenizer.special[TURN_END]):
            if end in continuation:
                continuation = continuation[:continuation.index(end)]
        text += f"[{prompt}]{tokenizer.decode(continuation)}\n\n"
    return text


class Validation:
    """What each evaluation reads: the held-out rows, which stay on the device, and the prompts."""

    def __init__(self, c: Config, held_out, curriculum: data.Curriculum, tokenizer: Tokenizer,
                 encode_prompt, task_scores, device: torch.device):
        self.c = c
        self.held_out = held_out
        self.seq_len = curriculum.seq_len
        self.tokenizer = tokenizer
        self.encode_prompt = encode_prompt
        self.task_scores = task_scores
        self.device = device
        self.token_bytes = torch.from_numpy(bytes_per_token(tokenizer)).to(device)
        self.rows = {}  # T -> domain -> ids, targets[, doc_ids], each (R, T)

    def rows_at(self, step: int) -> dict[str, tuple]:
        """Rows as long as those of this step; after the last step, as long as those of the last."""
        T = self.seq_len[min(step, len(self.seq_len) - 1)]
        if T not in self.rows:
            held_out = self.held_out(T) if callable(self.held_out) else self.held_out
            self.rows[T] = {}
            for name, rows in held_out.items():
                self.rows[T][name] = tuple(t.to(self.device) for t in to_tensors(rows))
        return self.rows[T]

    def evaluate_and_sample(self, model: Motif, step: int) -> tuple[dict, str]:
        """-> (result of evaluate, text of sample_prompts)"""
        held_out = self.rows_at(step)
        # Not compiled: held-out rows have a shape of their own, for which torch.compile would make
        # more graphs, or replace those of training by slower ones for any shape.
        with torch.compiler.set_stance("force_eager"):
            result = evaluate(model, held_out, self.c.micro_batch_tokens, self.token_bytes)
            samples = f"{NO_SAMPLES}\n"
            if can_be_gathered(model):
                reshard_after_forward(model, False)
                samples = sample_prompts(model, self.tokenizer, self.c, self.encode_prompt)
                if self.task_scores:
                    result["task_scores"] = self.task_scores(model)
                reshard_after_forward(model, WORLD > 1)
        free_gathered(model)
        return result, samples


# ---- setting up a run

def setup(c: Config, out: Path) -> tuple:
    """Check the config and build what train takes. Mistakes that can be found without the data and
    the other ranks are found first, at once."""
    curriculum = make_curriculum(c)
    model_config(c).check()
    theta_at(c, 0)                          # checks the schedule
    device = pick_device(c)
    check_fp8(c, curriculum, device)
    tokenizer = load_tokenizer(c.tokenizer)
    if tokenizer.n_vocab > c.vocab_size:
        raise UserError(f"tokenizer {c.tokenizer} has {tokenizer.n_vocab} tokens, more than "
                        f"vocab_size={c.vocab_size}; raise that")
    check_prompts(c, tokenizer)

    meet_ranks(c, device)
    start = rank0_only(find_checkpoint, c, out)
    if start:
        keep_init(c, start)
        curriculum = continue_curriculum(c, start.state)
        check_compatible(start, c, curriculum, tokenizer)
        check_lr_goes_on(c, curriculum, start.state)
    step = start.state["step"] if start else 0
    first_step = min(step, curriculum.steps - 1)        # a run that has ended reads its last step
    dataset = load_data(c, curriculum, tokenizer, first_step)

    def held_out(T: int) -> dict[str, np.ndarray]:
        def read():
            return {name: dataset.validation(name, c.eval_tokens, T) for name in curriculum.names}
        return rank0_first(read)

    init_from = None
    if c.init:
        import tools.grow
        init_from = tools.grow.init_from
    model, optimizer = build_model_and_optimizer(c, device, start, init_from, out)
    return dataset, held_out, model, optimizer, tokenizer, start


def keep_init(c: Config, start: Checkpoint) -> None:
    """Let c.init tell what the run began with, which need not be given again. UserError if it is
    another."""
    began_with = start.state["config"].get("init")
    if c.init and c.init != began_with:
        raise UserError(f"init={c.init} has no effect on a run that goes on from {start.folder}; "
                        "leave it out, or give another --out_dir for a new run")
    c.init = began_with


PLAN_KEYS = ("domains", "batch_tokens", "seq_len", "mixture", "max_steps", "max_tokens")


def plan_of(config: dict) -> dict:
    """The part of a config that says what each step reads, as state.json has it (tuples become
    lists)."""
    return json.loads(json.dumps({key: config.get(key) for key in PLAN_KEYS}))


def make_curriculum(c: Config) -> data.Curriculum:
    """What each step of a new run reads."""
    curriculum = data.Curriculum(**plan_of(asdict(c)))
    check_row_length(c, curriculum)
    return curriculum


def continue_curriculum(c: Config, state: dict) -> data.Curriculum:
    """What each step reads of a run that goes on from a checkpoint with this state.json. If the run
    was started with other settings, say fewer steps, the steps already done keep the old settings,
    and the new ones apply from the checkpoint on."""
    plan = plan_of(asdict(c))
    # [[step, the plan that was followed up to it], ...], oldest first: a run can be prolonged more
    # than once.
    earlier_plans = list(state.get("plans", []))
    old = plan_of(state["config"])
    # Domains in another order are another plan too: they break ties between quotas.
    if old != plan or list(old["domains"]) != list(plan["domains"]):
        earlier_plans.append([state["step"], old])

    # Each curriculum has before = (the one before it, the step at which that one ended).
    plans = [plan_of(old) for _, old in earlier_plans] + [plan]
    curriculum = data.Curriculum(**plans[0])
    for (step, _), next_plan in zip(earlier_plans, plans[1:]):
        curriculum = data.ContinuedCurriculum(**next_plan, before=(curriculum, step))
    curriculum.earlier_plans = earlier_plans
    check_row_length(c, curriculum)
    if RANK == 0 and earlier_plans and earlier_plans[-1][0] == state["step"]:
        tell_of_change(curriculum, plans[-2]["domains"], plan["domains"])
    return curriculum


def check_row_length(c: Config, curriculum: data.Curriculum) -> None:
    if max(curriculum.seq_len) > c.max_position_embeddings:
        raise UserError(f"seq_len={c.seq_len} is longer than max_position_embeddings="
                        f"{c.max_position_embeddings}; raise that or shorten the sequence")


def tell_of_change(curriculum: data.ContinuedCurriculum, before: dict, now: dict) -> None:
    """Print what a change of plan does that its user may not expect. before, now: domains, {name:
    [source, ...]}."""
    for name, (source, *_) in now.items():
        if name in before and before[name][0] != source:
            print(f"domain {name} had the source {before[name][0]}, and has {source}: it goes on "
                  "there at the place that it had reached")
    left_out = [f"{tokens:,d} of {name}" for name, tokens in curriculum.passed_over().items()]
    if left_out:
        print(f"the plan has changed: at most these tokens are passed over: {', '.join(left_out)}")


def check_lr_goes_on(c: Config, curriculum: data.Curriculum, state: dict) -> None:
    """UserError if the new plan of a run that goes on would raise the learning rate again after it
    has begun to fall. During the stable part it stays as it is. (Another --lr or --decay_fraction
    for the same steps is taken as meant.)"""
    if not curriculum.before or c.lr_may_rise:
        return
    old_curriculum, step = curriculum.before
    if step != state["step"]:
        return  # the plan has changed, but not at this checkpoint
    old = {f.name: state["config"][f.name] for f in fields(Config) if f.name in state["config"]}
    old_config = Config(**old)
    lr_before = lr_at(old_config, old_curriculum, step)
    lr_after = lr_at(c, curriculum, step)
    still_rises = step < old_config.warmup_steps and lr_before >= warm_up(old_config, step)
    if not still_rises and lr_after > 1.001 * lr_before:
        raise UserError(f"at step {step} the learning rate has already fallen to {lr_before:.2e}, "
                        f"and the longer run has {lr_after:.2e} there: go on from a checkpoint "
                        "before it began to fall, with --resume=PATH and another --out_dir, or "
                        "accept the rise with --lr_may_rise=true")


def load_data(c: Config, curriculum: data.Curriculum, tokenizer: Tokenizer,
              step: int) -> data.TokenDataset:
    """Open the data, and wait until what `step` reads is prepared, and what is held out."""
    def open_domains():
        domains = {}
        for name, domain in c.domains.items():
            domains[name] = data.Domain(name, domain[0], tokenizer, c.data_dir)
        return domains

    domains = sync_errors(open_domains)
    preparer = data.Preparer(c.workers) if prepares_data(Path(c.data_dir)) else None
    dataset = data.TokenDataset(curriculum, domains, c.seed, preparer, c.keep_read_pieces)

    def read_first() -> str:
        dataset.prefetcher.wait_for(step)
        if c.eval_every:
            for name in curriculum.names:
                dataset.validation(name, c.eval_tokens, max(curriculum.seq_len))
        return dataset.fingerprint()

    # Ranks that prepare go first: if one of them fails, no other waits for its data.
    fingerprint = rank0_first(read_first)
    if len(set(all_gather_object(fingerprint))) > 1:
        raise UserError(f"the machines hold different data in {c.data_dir}; copy one's to all")
    if preparer and preparer.domains:
        made = sum(sum(domain.unit_tokens.values()) for domain in domains.values())
        print(f"{made:,d} tokens are prepared; more will be, ahead of what training reads",
              flush=True)
    return dataset


def prepares_data(data_dir: Path) -> bool:
    """Whether this rank prepares data: rank 0 does, and the first rank of each machine that does
    not see rank 0's disk."""
    def write_mark() -> Path:
        data_dir.mkdir(parents=True, exist_ok=True)
        mark = data_dir / f"rank0-{secrets.token_hex(8)}.tmp"
        mark.touch()
        return mark

    mark = rank0_only(write_mark)
    sees_it = mark.exists()
    barrier()
    if RANK == 0:
        mark.unlink(missing_ok=True)
    return RANK == 0 or (LOCAL_RANK == 0 and not sees_it)


def build_model_and_optimizer(c: Config, device: torch.device, start: Checkpoint | None,
                              init_from, out: Path) -> tuple[Motif, muonclip.MuonClip]:
    """The weights are those of the checkpoint `start`; without one, those in the folder that
    init_from(c, out) makes, on rank 0; without that, random ones."""
    model = build(c, device)
    optimizer = muonclip.configure_optimizer(
        model, lr=c.lr, optimizer=c.optimizer, momentum=c.momentum, weight_decay=c.weight_decay,
        coefficients=c.ns_coefficients, tau=c.qk_clip_threshold,
        embedding_lr_scale=c.embedding_lr_scale, poly_norm_lr_scale=c.poly_norm_lr_scale,
        dtype=COMPUTE_DTYPE[compute_precision(c, device)])
    if start:
        sync_errors(load_checkpoint, start.folder, model, optimizer, out)
    elif init_from:
        folder = rank0_only(on_all_cores, init_from, c, out)
        sync_errors(load_into, model.state_dict(), folder, "model")
    return model, optimizer


def check_fp8(c: Config, curriculum: data.Curriculum, device: torch.device) -> None:
    """UserError if precision is fp8, and the GPU or the size of a matrix does not allow it."""
    if compute_precision(c, device) != "fp8":
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("precision=fp8 needs a GPU of compute capability 8.9 or more; give "
                        "--precision=bf16")
    with torch.device("meta"):
        matrices = Motif(model_config(c)).matrices()
    sizes = set(curriculum.seq_len)
    for p in matrices.values():
        sizes.update(p.shape)
    for size in sorted(sizes):
        if size % 16:
            raise UserError("precision=fp8 needs widths and seq_len in multiples of 16, and one is "
                            f"{size}; change it, or give --precision=bf16")


def check_prompts(c: Config, tokenizer: Tokenizer, encode_prompt=encode_text_prompt) -> None:
    """UserError for a prompt that is not a text, or leaves no room to continue it."""
    for prompt in c.prompts:
        if not isinstance(prompt, str):
            raise UserError(f"prompts must be a list of texts, and {prompt!r} is not a text")
        if len(encode_prompt(tokenizer, prompt)) >= c.max_position_embeddings:
            raise UserError(f"prompt {prompt[:20]!r}... is longer than max_position_embeddings="
                            f"{c.max_position_embeddings}; shorten it")


def main() -> None:
    c = configurator.load(Config, sys.argv[1:], default_file=QUICKSTART)
    if not c.out_dir:
        file, _ = configurator.split_argv(sys.argv[1:], QUICKSTART)
        c.out_dir = f"out/{Path(file).stem}"
    out = Path(c.out_dir)

    with friendly_errors(c, out):
        if c.dry_run:
            from tools.plan import dry_run_report
            if RANK == 0:
                print(dry_run_report(c, make_curriculum(c)))
            return
        if c.export is not None:
            from tools.export import export_checkpoint
            if RANK == 0:
                export_checkpoint(c, out)
            return
        with lock_folder(out):
            dataset, held_out, model, optimizer, tokenizer, start = setup(c, out)
            if RANK == 0:
                configurator.save(c, out / "config.json")
            train(c, out, dataset, held_out, model, optimizer, tokenizer, start,
                  encode_text_prompt)


if __name__ == "__main__":
    run_main(main)
