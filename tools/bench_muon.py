"""Times the optimizer, and plans Parallel Muon.

    python -m tools.bench_muon config/X.py                prints what goes where, times Newton-Schulz
                                                          and the step on one layer
    python -m tools.bench_muon config/X.py --plan_world_size=8      plans Parallel Muon over 8 ranks
    torchrun --nproc_per_node=4 -m tools.bench_muon ...   times it, beside each rank doing all
                              [--dp_replicate=1]              in so many copies of the model
"""
import functools
import math
import os
import statistics
import sys
import time
import timeit

import torch
import torch.distributed as dist

from configurator import load
from model import Motif
from muonclip import (COEFFICIENTS, MuonClip, MuonShardGroup, describe_routing, newton_schulz_flops, configure_optimizer, shard_dims,
                      local_shard, newton_schulz, local_slices, replicas_per_muon_group)
from pretrain import QUICKSTART, Config, model_config
from torch.optim._muon import _zeropower_via_newtonschulz as plain


def plan_table(shapes, world: int, replicas: int = 1) -> str:
    """What Parallel Muon does with these matrices: from the same arithmetic, on no device.
    ValueError if the replicas do not divide the ranks."""
    shards, together = world // replicas, replicas_per_muon_group(shapes, world, replicas)
    unit = MuonShardGroup(shapes, [(None, 0)] * len(shapes), (together, shards))
    work = torch.zeros(len(unit.chunks), together * shards, dtype=torch.float64)
    for k, chunk in enumerate(unit.chunks):
        for i in chunk:
            work[k, unit.owner[i]] += newton_schulz_flops(shapes[i]) / 1e12
    sent, received, held = 2e-9 * torch.stack([*unit.traffic(), unit.peak()]).double()     # bf16
    rows = {"TFLOP": work.sum(0), "GB sent": sent, "GB received": received, "MB held": 1e3 * held}
    P = sum(map(math.prod, shapes)) / 1e9
    return (f"{shards} shards x {replicas} replicas, {together} of which divide {len(shapes)} "
            f"matrices of {P:.3f}e9 elements, in {len(unit.chunks)} chunks,\n"
            f"among {len(set(unit.owner))} of their ranks; most of a rank, over the mean:\n"
            + "".join(f"  {name:12s}{x.max():10,.2f}{x.max() / x.mean():8.3f}\n"
                      for name, x in rows.items())
            + f"where ranks wait at each chunk {work.amax(1).sum():.2f} TFLOP, where each gathers "
            f"all {2 * P * (1 - 1 / shards):.2f} GB;\nthe report's at 8 ranks: 216 ms, 3,904 MB")


def row(name: str, *calls, seconds: float = 60, rounds: int = 21) -> str:
    """A line of each call's time in ms, median and range, in turn so that all meet the same
    neighbours, and the ratio of the first two."""
    times, end = [], time.perf_counter() + seconds
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    while len(times) < 5 or len(times) < rounds + 2 and time.perf_counter() < end:
        times.append([1e3 * timeit.timeit(lambda: (call(), wait()), wait, number=1)
                      for call in calls])
    times = [sorted(ms) for ms in zip(*times[2:])]       # the first two compile
    median = [statistics.median(ms) for ms in times]
    cells = (f"{m:10.2f} ({ms[0]:.2f} to {ms[-1]:.2f})" for m, ms in zip(median, times))
    return f"  {name:20s}{''.join(cells)}{median[0] / median[1]:8.3f}"


def gather_all(optimizer: MuonClip, updates, unit):
    """A plain _orthogonalize, to compare with: each rank gathers and does every matrix."""
    from torch.distributed.tensor import DTensor
    for p, u in zip(unit.params if unit else (), updates):
        u = DTensor.from_local(u, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        box = local_slices(p.shape, p.device_mesh.shape, shard_dims(p), p.device_mesh.get_coordinate())
        yield newton_schulz(u.full_tensor(), **optimizer.newton_schulz)[box].contiguous()


def time_parallel(shapes, replicas: int) -> None:
    """Under torchrun: a step of the sharded matrices by Parallel Muon and by gather_all, which give
    the same weights. ValueError if the replicas do not divide the ranks."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    world, gpu = int(os.environ["WORLD_SIZE"]), None
    together = replicas_per_muon_group(shapes, world, replicas)
    if torch.cuda.is_available():
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
    device, runs = gpu or torch.device("cpu"), []
    mesh = dist.init_device_mesh(device.type, (replicas, world // replicas))
    for form in MuonClip._orthogonalize, gather_all:
        torch.manual_seed(0)
        params = [distribute_tensor(torch.randn(shape, device=device), mesh,
                                    [Replicate(), Shard(0)], src_data_rank=None)
                  for shape in shapes]
        for p in params:
            p.grad = p.clone()
        runs.append(MuonClip(params, [], lr=1e-3))
        runs[-1]._orthogonalize = functools.partial(form, runs[-1])
    times = row(f"{len(shapes)} matrices", *(
        lambda run=run: (dist.barrier(), run.step(), dist.barrier()) for run in runs),
        seconds=math.inf, rounds=5)
    same = torch.stack([(local_shard(p) == local_shard(q)).all() for p, q in zip(*(run.state for run in runs))])
    dist.all_reduce(same := same.all().int(), dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        print(f"{world} ranks on {device.type}, {together} of {replicas} replicas divide the "
              f"matrices; ms of a step: Parallel Muon, each gathers all, ratio\n{times}\n"
              f"the same weights: {bool(same)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    c = load(Config, sys.argv[1:], default_file=QUICKSTART)
    try:
        with torch.device("meta"):
            model = Motif(model_config(c))
        shapes = [p.shape for p in model.matrices().values()]
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return time_parallel(shapes, c.dp_replicate)
        print(describe_routing(model, configure_optimizer(model, lr=c.lr)))
        if "--plan_world_size" in (word.partition("=")[0] for word in sys.argv):
            return print(plan_table(shapes, c.plan_world_size, c.dp_replicate))
    except ValueError as e:
        raise SystemExit(str(e)) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"ms on {device}: newton_schulz, torch's plain form in bf16, ratio")
    layer = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes[:7]]
    kinds = sorted({(c.hidden_size, c.hidden_size), *map(tuple, shapes[:7])}, key=math.prod)
    for shape in *kinds, (8, *kinds[0]):
        G = torch.randn(shape, device=device)
        print(row(" x ".join(map(str, shape)), lambda: newton_schulz(G), lambda: [
            plain(g, COEFFICIENTS["quintic"][0], 5, 1e-7) for g in G.view(-1, *shape[-2:])],
            seconds=5))
    for p in layer:
        p.grad = torch.randn_like(p)
    print("a step of a layer's matrices: MuonClip, torch.optim.Muon, torch.optim.AdamW, ratio\n"
          + row(f"{sum(p.numel() for p in layer):,d} parameters", MuonClip(layer, [], lr=1e-3).step,
                torch.optim.Muon(layer, lr=1e-3, adjust_lr_fn="match_rms_adamw").step,
                torch.optim.AdamW(layer, lr=1e-3, fused=True).step))


if __name__ == "__main__":
    main()
