"""What a run will cost, before it starts: parameters, FLOPs, memory of a GPU, days.

    python pretrain.py config/X.py --dry_run     model, memory, days, curriculum
    python -m tools.plan config/X.py             the model alone
"""
import sys

import torch

import data
import muonclip
from configurator import UserError, load
from kernels import LOSS_CHUNK
from model import Motif, MotifConfig, flops_per_token
from tools.bench_muon import peak_elements
from pretrain import PEAK_FLOPS, QUICKSTART, Config, make_curriculum, model_config

USABLE = 76 * 2**30              # bytes of a GPU of 80 GB that are ours


def activation_bytes(config: MotifConfig) -> tuple[int, int]:
    """Bytes per token that a block keeps for its backward pass in bf16, and those of its input,
    which is all that a recomputed block keeps: inputs of products, norms and attention, and what
    attention returns."""
    c, D = config, config.head_dim
    heads = c.num_attention_heads + 2 * c.num_key_value_heads                    # q, k, v
    if c.num_noise_heads:                            # signal and noise, and the normed differences
        heads += 2 * (2 * c.num_attention_heads - c.num_noise_heads)
    else:
        heads += c.num_attention_heads
    return 2 * (4 * c.hidden_size + heads * D + 3 * c.intermediate_size), 2 * c.hidden_size


def parameters_by_part(model: Motif) -> dict[str, int]:
    """Part -> number of parameters, every parameter in exactly one part."""
    parts = dict.fromkeys(("embedding", "attention matrices", "MLP matrices", "norms",
                           "lambda vectors", "PolyNorm scalars", "head"), 0)
    for name, p in model.named_parameters():
        last = name.split(".")[-2]
        part = ("embedding" if last == "embed_tokens" else "head" if last == "lm_head"
                else "MLP matrices" if last in ("gate_proj", "up_proj", "down_proj")
                else "attention matrices" if last.endswith("_proj")
                else "PolyNorm scalars" if last == "act_fn"
                else "lambda vectors" if "lambda_" in name else "norms")
        parts[part] += p.numel()
    return parts


def memory_per_gpu(model: Motif, ranks: int) -> dict[str, float]:
    """Bytes per rank if the model is sharded over so many, activations and logits aside: fp32
    weights and gradients, Muon's one and AdamW's two fp32 moments, and the bf16 copies that exist
    unsharded at once: two blocks (one computing, one arriving), embedding and head; one rank keeps
    all."""
    total = sum(p.numel() for p in model.parameters())
    muon = sum(p.numel() for p in model.matrices().values())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    layers = len(model.model.layers)
    ends, blocks = total - block * layers, layers if ranks == 1 else 2
    return {"weights": 4 * total / ranks, "gradients": 4 * total / ranks,
            "optimizer": (4 * muon + 8 * (total - muon)) / ranks,
            "gathered": 2 * (blocks * block + ends)}


def cost_table(config: MotifConfig, lengths: list[int]) -> str:
    """Parameters by part, FLOPs per token at some sequence lengths, memory for 1, 8 and 64 ranks;
    on the meta device, so that no size takes memory. ValueError if the shape is impossible."""
    with torch.device("meta"):
        model = Motif(config)
    parts = parameters_by_part(model)
    total = sum(parts.values())
    lines = [f"{part:20s} {n:16,d} {n / total:8.2%}"
             for part, n in {**parts, "total": total}.items()]
    lines += ["", f"{'GFLOP per token':20s} {'forward':>16s} {'backward':>12s}   causal attention"]
    for T in lengths:
        forward, backward = flops_per_token(config, T)
        lines.append(f"{f'at {T:,d} tokens':20s} {forward / 1e9:16,.3f} {backward / 1e9:12,.3f}")
    ranks = (1, 8, 64)
    lines += ["", f"{'GiB per GPU':20s}" + "".join(f"{f'ranks: {r}':>12s}" for r in ranks)]
    columns = [memory_per_gpu(model, r) for r in ranks]
    rows = {key: [c[key] for c in columns] for key in columns[0]}
    rows["without activations"] = [sum(c.values()) for c in columns]
    lines += [f"{key:20s}" + "".join(f"{x / 2**30:12,.2f}" for x in row)
              for key, row in rows.items()]
    return "\n".join(lines)


def memory_of_rank(c: Config, T: int, recompute: int) -> dict[str, float]:
    """Bytes that one of c.plan_world_size GPUs holds at the most, of what lasts and in each part of a step.
    A sum of the large tensors: what the allocator and NCCL take comes on top, a few GB."""
    shards = c.plan_world_size // c.dp_replicate
    with torch.device("meta"):
        model = Motif(model_config(c))
    lasting = memory_per_gpu(model, shards)
    gathered = lasting.pop("gathered")
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    head = model.head_weight.numel()
    ends = head + (0 if c.tie_word_embeddings else model.model.embed_tokens.weight.numel())
    tokens = max(1, c.micro_batch_tokens // T) * T
    kept, entry = activation_bytes(model_config(c))
    layers, recompute = c.num_hidden_layers, min(recompute, c.num_hidden_layers)
    activations = tokens * (recompute * entry + (layers - recompute) * kept)
    logits = 2 * min(tokens, LOSS_CHUNK) * c.vocab_size
    grads = 2 * (2 + 4) * block if shards > 1 else 0     # bf16 and, on the way, fp32: of two blocks
    shapes = [p.shape for p in model.matrices().values()]
    together = muonclip.replicas_per_muon_group(shapes, c.plan_world_size, c.dp_replicate)
    unit = muonclip.MuonShardGroup(shapes, [(None, 0)] * len(shapes), (together, shards))
    return lasting | {
        "loss": gathered + activations + logits + 2 * head,
        "backward pass": (gathered + activations + 2 * head + grads
                          + tokens * kept * (recompute > 0)),
        "its end": 2 * ends + (2 + 4) * ends * (shards > 1),
        "Parallel Muon": 2 * peak_elements(unit).max().item() if c.plan_world_size > 1 else 0}


def memory_table(c: Config, T: int) -> str:
    """A GPU's memory with the blocks recomputed that the config asks for, none, and all."""
    columns = dict.fromkeys((c.activation_checkpoint_layers, 0, c.num_hidden_layers))
    lines = [f"{'GiB per GPU, recomputed:':24s}" + "".join(f"{n:8d}" for n in columns)]
    rows = [memory_of_rank(c, T, n) for n in columns]
    lasting = list(rows[0])[:3]
    totals = [sum(r[k] for k in lasting) + max(r[k] for k in r if k not in lasting) for r in rows]
    lines += [f"{key:24s}" + "".join(f"{r[key] / 2**30:8.1f}" for r in rows) for key in rows[0]]
    lines += [f"{'at the most':24s}" + "".join(f"{n / 2**30:8.1f}" for n in totals)]
    fits = totals[0] < USABLE
    return "\n".join(lines) + (f"\n{'fits' if fits else 'does NOT fit'} a GPU of 80 GB" + (
        "" if fits else "; raise --activation_checkpoint_layers or --plan_world_size, or lower --micro_batch_tokens"))


def dry_run_report(c: Config, plan: data.Curriculum) -> str:
    """What --dry_run prints: the costs of model and run, and the curriculum, from the config."""
    if c.plan_world_size % c.dp_replicate:
        raise UserError(f"{c.plan_world_size} ranks cannot be replicas={c.dp_replicate} copies of the same size")
    per_token = {T: sum(flops_per_token(model_config(c), T)) for T in set(plan.seq_len)}
    flops = sum(per_token[T] * T * rows for T, rows in zip(plan.seq_len, plan.rows))
    days = flops / (c.plan_world_size * PEAK_FLOPS["H100"] * max(c.assumed_mfu, 1e-3)) / 86400
    T = max(plan.seq_len, key=lambda T: c.micro_batch_tokens // T * T)
    return (f"{cost_table(model_config(c), sorted(per_token))}\n\n{plan.steps:,d} steps, "
            f"{plan.tokens[-1]:,d} tokens, {flops:.3e} FLOPs: {days:,.1f} days on {c.plan_world_size} H100 "
            f"at {c.assumed_mfu:.0%} MFU\n\n{c.dp_replicate} x {c.plan_world_size // c.dp_replicate} ranks, "
            f"{c.micro_batch_tokens:,d} tokens in a pass\n{memory_table(c, T)}\n\n{plan.table()}")


def main() -> None:
    c = load(Config, sys.argv[1:], default_file=QUICKSTART)
    try:
        print(cost_table(model_config(c), sorted(set(make_curriculum(c).seq_len))))
    except ValueError as e:
        raise SystemExit(str(e)) from None


if __name__ == "__main__":
    main()
