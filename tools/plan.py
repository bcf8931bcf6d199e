"""What a run will cost, before it starts: parameters, FLOPs, memory of a GPU, days.

    python pretrain.py config/X.py --dry_run     model, memory, days, curriculum
    python -m tools.plan config/X.py             the model alone

All of it is arithmetic on the config. Models are built on the meta device, where tensors have
shapes and no memory, so that any size can be planned anywhere.
"""
import math
import sys
from typing import NamedTuple

import torch

import data
from configurator import UserError, load
from kernels import LOSS_CHUNK
from model import Motif, MotifConfig, flops_per_token
from muonclip import MuonPlan, replicas_per_muon_group
from pretrain import QUICKSTART, SAMPLE_BYTES, Config, make_curriculum, model_config
from support.log import PEAK_FLOPS
from support.ranks import run_main
from tools.bench_muon import peak_elements

# GPU -> bytes that a run can use of it
USABLE = {"80 GB, as an H100 has": 76 * 2**30, "141 GB, as an H200 has": 134 * 2**30}
FP32 = 4                         # bytes of a number
BF16 = 2
FP8 = 1


# ---- the model

def cost_table(c: Config, lengths: list[int]) -> str:
    """Parameters by part; FLOPs per token at some sequence lengths; memory on 1, 8 and 64 ranks."""
    config = model_config(c)
    with torch.device("meta"):
        model = Motif(config)
    parts = parameters_by_part(model)
    total = sum(parts.values())
    lines = []
    for part, n in [*parts.items(), ("total", total)]:
        lines.append(f"{part:20s} {n:16,d} {n / total:8.2%}")

    lines += ["", f"{'GFLOP per token':20s} {'forward':>16s} {'backward':>12s}   causal attention"]
    for T in lengths:
        forward, backward = flops_per_token(config, T)
        lines.append(f"{f'at {T:,d} tokens':20s} {forward / 1e9:16,.3f} {backward / 1e9:12,.3f}")

    ranks = (1, 8, 64)
    lines += ["", f"{'GiB per GPU':20s}" + "".join(f"{f'ranks: {n}':>12s}" for n in ranks)]
    columns = [memory_per_gpu(model, c.optimizer, n, alone=n == 1) for n in ranks]
    for column in columns:
        column["without activations"] = sum(column.values())
    for key in columns[0]:
        numbers = "".join(f"{column[key] / 2**30:12,.2f}" for column in columns)
        lines.append(f"{key:20s}" + numbers)
    return "\n".join(lines)


def parameters_by_part(model: Motif) -> dict[str, int]:
    """Part -> number of parameters. Each parameter belongs to one part.

    >>> with torch.device("meta"):
    ...     model = Motif(MotifConfig(num_hidden_layers=2))
    >>> parts = parameters_by_part(model)
    >>> parts["PolyNorm scalars"], sum(parts.values()) == sum(p.numel() for p in model.parameters())
    (8, True)
    """
    parts = dict.fromkeys(("embedding", "attention matrices", "MLP matrices", "norms",
                           "lambda vectors", "PolyNorm scalars", "head"), 0)
    for name, p in model.named_parameters():
        parts[part_of(name)] += p.numel()
    return parts


def part_of(name: str) -> str:
    """The part that a parameter belongs to.

    >>> part_of("model.layers.3.self_attn.q_proj.weight"), part_of("model.norm.weight")
    ('attention matrices', 'norms')
    """
    if "lambda_" in name:
        return "lambda vectors"
    module = name.split(".")[-2]
    if module in ("gate_proj", "up_proj", "down_proj"):
        return "MLP matrices"
    if module.endswith("_proj"):
        return "attention matrices"
    known = {"embed_tokens": "embedding", "lm_head": "head", "act_fn": "PolyNorm scalars"}
    return known.get(module, "norms")


# ---- memory
#
# What one GPU holds, while FSDP2 shards the model over `shards` ranks:
#
#     always         its shards: weights and gradients in fp32, Muon's momentum of matrices and
#                    AdamW's two moments of the rest
#     in passes      bf16 copies of what is gathered: two blocks (one computes, the next one
#                    arrives), embedding and head
#     activations    of a block that keeps them, what its backward pass reads: activation_bytes per
#                    token, and with FP8 its matrices in FP8, transposed; of a block with activation
#                    checkpointing its input alone
#     sums           the gradients of embedding and head, where their ranks sum them once a step
#                    (the key sum_embeddings_once): whole, in fp32, and sharded only after the last
#                    pass
#
# A step goes through phases, of which the one that takes most decides:
#
#     loss            all activations, the logits of a chunk of tokens
#     backward pass   all activations, and the gradients of one block: of its activations, of its
#                     matrices in bf16, and once more in fp32, as they are sent
#     recomputation   the inputs of the recomputed blocks, all activations of one of them, and the
#                     gradients of one block as before. It comes last, as the recomputed blocks are
#                     the first ones: the other blocks' activations are gone by then
#     last sum        the gradients of embedding and head, on their way to their shards
#     Parallel Muon   momentum and results on their way
#     samples         at an evaluation, the whole model in bf16 on every rank, and no gradients
#
# The first three also hold what is gathered, the sums and the head's gradient. The plan adds up the
# large tensors of training in bf16 or FP8. What was measured is 0.2 GiB less to 0.6 GiB more
# (MEASUREMENTS.md, "Many GPUs"). The allocator's cache and NCCL take a few GB on top.

def activation_bytes(config: MotifConfig, fp8: bool = False) -> tuple[int, int]:
    """Bytes per token that a block keeps for its backward pass, and those of its input.

    The block keeps the inputs of its norms, of attention, and of the activation and its product,
    and what attention returns, in bf16; and the inputs of its matrix products, in bf16 or FP8."""
    c = config
    stream = 2 * c.hidden_size                       # the inputs of two norms
    mlp = 2 * c.intermediate_size                    # gate and up
    heads = c.num_attention_heads + 2 * c.num_key_value_heads                        # q, k, v
    signal_heads = c.num_attention_heads - c.num_noise_heads
    if c.num_noise_heads:
        heads += 2 * c.num_attention_heads           # outputs, two heads wide
        input_of_o = 2 * signal_heads * c.head_dim
    else:
        input_of_o = signal_heads * c.head_dim       # the outputs themselves
        if fp8:                                      # else they are counted as the input of o
            heads += c.num_attention_heads
    # Of q, k and v; of o; of gate and up; of down.
    of_products = 2 * c.hidden_size + input_of_o + c.intermediate_size
    kept = BF16 * (stream + heads * c.head_dim + mlp) + (FP8 if fp8 else BF16) * of_products
    return kept, BF16 * c.hidden_size


def memory_per_gpu(model: Motif, optimizer: str, shards: int, alone: bool) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer and gathered copies on a rank. alone: it is the only
    one."""
    total = sum(p.numel() for p in model.parameters())
    muon = 0
    if optimizer == "muonclip":
        muon = sum(p.numel() for p in model.matrices().values())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    layers = len(model.model.layers)
    rest = total - layers * block                    # embedding, final norm, head

    # A single rank has nothing to gather, and keeps the bf16 copies of all blocks.
    gathered_blocks = layers if alone else 2
    return {"weights": FP32 * total / shards,
            "gradients": FP32 * total / shards,
            "optimizer": (FP32 * muon + 2 * FP32 * (total - muon)) / shards,
            "gathered": BF16 * (gathered_blocks * block + rest)}


class Counts(NamedTuple):
    """Numbers of parameters."""
    total: int
    block_matrices: int       # of one block
    head: int
    embeddings: int           # embedding and head: one matrix if they are tied


def count_parameters(model: Motif) -> Counts:
    head = model.head_weight.numel()
    embedding = model.model.embed_tokens.weight
    is_tied = embedding is model.head_weight
    return Counts(
        total=sum(p.numel() for p in model.parameters()),
        block_matrices=sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1),
        head=head,
        embeddings=head if is_tied else head + embedding.numel())


def memory_of_rank(c: Config, tokens: int, checkpointed: int) -> tuple[dict, dict]:
    """Bytes that one of c.plan_world_size GPUs holds at the most -> (always, in each phase of a
    step). tokens: in its largest pass; checkpointed: blocks with activation checkpointing."""
    shards = c.plan_world_size // c.dp_replicate
    alone = c.plan_world_size == 1
    with torch.device("meta"):
        model = Motif(model_config(c))
    counts = count_parameters(model)
    always = memory_per_gpu(model, c.optimizer, shards, alone)
    gathered = always.pop("gathered")

    # Gradients of embedding and head: whole ones during the passes, and a rank's shard of them that
    # is there only from the last sum on.
    sums = 0
    late_gradients = 0
    if c.sum_embeddings_once and not alone:
        sums = FP32 * counts.embeddings
        late_gradients = sums / shards
        always["gradients of blocks"] = always.pop("gradients") - late_gradients
        last_sum = 2 * sums + late_gradients               # and a copy on its way
    elif alone:
        last_sum = FP32 * counts.embeddings                # the copy of bf16 gradients in fp32
    else:
        last_sum = (BF16 + FP32) * counts.embeddings

    in_passes = gathered + sums + BF16 * counts.head
    phases = {}
    for phase, size in activation_phases(c, counts, tokens, checkpointed).items():
        phases[phase] = in_passes + size if size else 0
    phases["last sum"] = last_sum
    if c.optimizer == "muonclip":
        phases["Parallel Muon"] = late_gradients + parallel_muon_bytes(c, model)
    if c.eval_every and not alone and BF16 * counts.total <= SAMPLE_BYTES:
        gradients = FP32 * counts.total / shards - late_gradients
        phases["samples"] = max(0, BF16 * counts.total - gradients)
    return always, phases


def activation_phases(c: Config, counts: Counts, tokens: int,
                      checkpointed: int) -> dict[str, float]:
    """Bytes of activations, and of their gradients, in each phase of a pass."""
    fp8 = c.precision == "fp8"
    bytes_per_token, input_bytes = activation_bytes(model_config(c), fp8)
    block = tokens * bytes_per_token
    if fp8:
        block += FP8 * counts.block_matrices               # transposed
    inputs = checkpointed * tokens * input_bytes           # of the recomputed blocks
    plain_blocks = (c.num_hidden_layers - checkpointed) * block

    logits = BF16 * min(tokens, LOSS_CHUNK) * c.vocab_size
    # In the backward pass of a block most gradients are there between down and gate: those of gate,
    # of up, and of the block's output.
    of_activations = BF16 * tokens * (2 * c.intermediate_size + c.hidden_size)
    gradients = of_activations + (BF16 + FP32) * counts.block_matrices
    return {"loss": inputs + plain_blocks + logits,
            "backward pass": inputs + plain_blocks + gradients,
            "recomputation": inputs + block + gradients if checkpointed else 0}


def tokens_in_a_pass(c: Config, T: int) -> int:
    """A pass takes whole rows, and at least one."""
    return max(1, c.micro_batch_tokens // T) * T


def largest_pass(c: Config, curriculum: data.Curriculum) -> int:
    """The most tokens that a rank takes in a pass, over all steps. A pass has no more than the
    rank's rows of the step."""
    largest = 0
    for T, rows in set(zip(curriculum.seq_len, curriculum.rows)):
        rows_of_rank = math.ceil(rows / c.plan_world_size)
        largest = max(largest, min(rows_of_rank * T, tokens_in_a_pass(c, T)))
    return largest


def parallel_muon_bytes(c: Config, model: Motif) -> int:
    """The most that a rank holds of momentum and results on their way."""
    if c.plan_world_size == 1:
        return 0
    shapes = [p.shape for p in model.matrices().values()]
    shards = c.plan_world_size // c.dp_replicate
    replicas = replicas_per_muon_group(shapes, c.plan_world_size, c.dp_replicate)
    mesh = torch.arange(replicas * shards).view(replicas, shards)
    plan = MuonPlan(shapes, [(None, 0)] * len(shapes), mesh)
    return BF16 * peak_elements(plan).max().item()


AT_MOST = "at the most: always and the largest phase"


def memory_table(c: Config, tokens: int) -> str:
    """A GPU's memory, for passes of so many tokens, with activation checkpointing in as many blocks
    as the config has it in, in none, and in all."""
    layers = c.num_hidden_layers
    wanted = min(c.activation_checkpoint_layers, layers)
    columns = {}
    for checkpointed in (wanted, 0, layers):
        columns[checkpointed] = memory_of_rank(c, tokens, checkpointed)

    lines = [f"{'GiB per GPU, if so many blocks are recomputed:':46s}"
             + "".join(f"{n:8d}" for n in columns)]
    rows = {}
    for always, phases in columns.values():
        total = sum(always.values())
        column = {f"  {key}": size for key, size in always.items()}
        column["always"] = total
        for key, size in phases.items():
            column[f"  + {key}"] = size
        column[AT_MOST] = total + max(phases.values())
        for key, size in column.items():
            rows.setdefault(key, []).append(size)
    for key, sizes in rows.items():
        lines.append(f"{key:46s}" + "".join(f"{size / 2**30:8.1f}" for size in sizes))

    fitting = [gpu for gpu, usable in USABLE.items() if rows[AT_MOST][0] < usable]
    if fitting:
        lines.append(f"fits a GPU of {fitting[0]}")
    else:
        lines.append("does NOT fit a GPU of 141 GB; raise --activation_checkpoint_layers or "
                     "--plan_world_size, or lower --micro_batch_tokens")
    return "\n".join(lines)


# ---- the run

def dry_run_report(c: Config, curriculum: data.Curriculum) -> str:
    """What --dry_run prints: the costs of model and run, a GPU's memory, the curriculum."""
    if c.plan_world_size % c.dp_replicate:
        raise UserError(f"plan_world_size={c.plan_world_size} ranks cannot be dp_replicate="
                        f"{c.dp_replicate} copies of the same size; give a divisor")
    if c.assumed_mfu == 0:
        raise UserError("assumed_mfu=0 would take for ever; give a fraction above 0")
    if c.precision == "fp32":
        raise UserError("the plan knows bf16 and FP8 alone; leave out --precision=fp32")
    config = model_config(c)
    flops_at = {T: sum(flops_per_token(config, T)) for T in set(curriculum.seq_len)}
    flops = 0
    for T, rows in zip(curriculum.seq_len, curriculum.rows):
        flops += flops_at[T] * T * rows
    flops_per_second = c.plan_world_size * PEAK_FLOPS["H100"] * c.assumed_mfu
    days = flops / flops_per_second / 86400

    tokens = largest_pass(c, curriculum)
    return "\n".join([
        cost_table(c, sorted(flops_at)),
        "",
        f"{curriculum.steps:,d} steps, {curriculum.tokens[-1]:,d} tokens, {flops:.3e} FLOPs: "
        f"{days:,.1f} days on {c.plan_world_size} H100 at {c.assumed_mfu:.0%} MFU",
        "",
        f"{c.dp_replicate} x {c.plan_world_size // c.dp_replicate} ranks, "
        f"{tokens:,d} tokens in a pass, in {'FP8' if c.precision == 'fp8' else 'bf16'}",
        memory_table(c, tokens),
        "",
        curriculum.table()])


def main() -> None:
    """Print the plan of the model alone."""
    c = load(Config, sys.argv[1:], default_file=QUICKSTART, about=__doc__)
    print(cost_table(c, sorted(set(make_curriculum(c).seq_len))))


if __name__ == "__main__":
    run_main(main)
