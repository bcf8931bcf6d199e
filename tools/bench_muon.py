"""Time the optimizer, and plan Parallel Muon.

    python -m tools.bench_muon config/X.py
        prints which parameters go to which rule, and times Newton-Schulz and the step on one layer
    python -m tools.bench_muon config/X.py --plan_world_size=8 [--dp_replicate=1]
        plans Parallel Muon over 8 ranks, on no device
    torchrun --nproc_per_node=4 -m tools.bench_muon config/X.py [--dp_replicate=1]
        times Parallel Muon, beside the form in which each rank gathers and does every matrix
"""
import math
import os
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from configurator import UserError, load
from model import Motif
from muonclip import (COEFFICIENTS, MuonClip, MuonPlan, configure_optimizer,
                      describe_routing, local_shard, local_slices, newton_schulz,
                      newton_schulz_flops, replicas_per_muon_group, shard_dims)
from pretrain import QUICKSTART, Config, model_config
from support.ranks import run_main


# ---- What a plan needs to know

class Buffers(NamedTuple):
    """The messages of one chunk: how many numbers of u, and of O, each rank sends and receives.
    Each is (ranks,), and counts what a rank sends to itself."""
    u_sent: Tensor
    u_received: Tensor          # as many as there are in the matrices that the rank owns
    O_sent: Tensor
    O_received: Tensor          # as many as there are in the rank's shards of the chunk


def buffers(u: Tensor, O: Tensor) -> Buffers:
    """u, O: how many numbers each rank sends to each, [sender, receiver]."""
    return Buffers(u.sum(1), u.sum(0), O.sum(1), O.sum(0))


def peak_elements(plan: MuonPlan) -> Tensor:
    """Return (ranks,): the most numbers of u and O that each rank holds at any time in a step. What
    Newton-Schulz needs for itself comes on top.

    The peak is at one of three moments of muonclip.parallel_muon_step, for some chunk k. An empty
    chunk at the beginning stands for the time when only u(0) is sent."""
    chunks = list(map(buffers, plan.counts["u"], plan.counts["O"]))
    nothing = torch.zeros_like(plan.counts["u"][0])
    empty = buffers(nothing, nothing)
    chunks = [empty, empty, *chunks, empty]

    held = []
    for k in range(1, len(chunks) - 1):
        before = chunks[k - 1]
        now = chunks[k]
        after = chunks[k + 1]
        matrices = now.u_received
        results_on_their_way = before.O_sent + before.O_received
        updates_on_their_way = after.u_sent + after.u_received

        # End of phase 1: u(k) as it arrived, and put together; O(k-1) is under way.
        held.append(results_on_their_way + now.u_received + matrices)

        # Phase 2: the matrices; u(k+1), as shards and as a message; O(k-1) is under way.
        own_shards = after.u_sent
        held.append(results_on_their_way + matrices + own_shards + updates_on_their_way)

        # Phase 5: the results, and the message with them; u(k+1) is under way.
        held.append(matrices + now.O_sent + now.O_received + updates_on_their_way)
    return torch.stack(held).amax(0)


def traffic(plan: MuonPlan) -> Tensor:
    """Return (2, ranks): how many numbers each rank sends to, and receives from, the others in a
    step."""
    total = (plan.counts["u"] + plan.counts["O"]).sum(0)      # [sender, receiver]
    total.fill_diagonal_(0)
    return torch.stack([total.sum(1), total.sum(0)])


def plan_table(shapes: list, world: int, replicas: int = 1) -> str:
    """Say what Parallel Muon does with these matrices. The step itself uses the same arithmetic."""
    check_replicas(world, replicas)
    shards = world // replicas
    together = replicas_per_muon_group(shapes, world, replicas)
    mesh = torch.arange(together * shards).view(together, shards)
    plan = MuonPlan(shapes, [(None, 0)] * len(shapes), mesh)

    tflops = torch.zeros(len(plan.chunks), mesh.numel(), dtype=torch.float64)
    for k, chunk in enumerate(plan.chunks):
        for i in chunk:
            tflops[k, plan.owner[i]] += newton_schulz_flops(shapes[i]) / 1e12

    bytes_each = 2                                          # bf16
    sent, received = traffic(plan).double() * bytes_each
    held = peak_elements(plan).double() * bytes_each
    rows = {
        "TFLOP": tflops.sum(0),
        "GB sent": sent / 1e9,
        "GB received": received / 1e9,
        "MB held": held / 1e6}

    elements = sum(math.prod(shape) for shape in shapes)
    lines = [
        f"{shards} shards x {replicas} replicas, {together} of which share {len(shapes)} matrices "
        f"of {elements / 1e9:.3f}e9 elements, in {len(plan.chunks)} chunks,",
        f"among {len(set(plan.owner))} of their ranks; the busiest rank, and over the mean:"]
    for name, of_ranks in rows.items():
        most = of_ranks.max()
        lines.append(f"  {name:12s}{most:10,.2f}{most / of_ranks.mean():8.3f}")
    gathered = bytes_each * elements * (1 - 1 / shards) / 1e9
    lines.append(f"as ranks wait for each other at each chunk: {tflops.amax(1).sum():.2f} TFLOP; "
                 f"if each gathered all: {gathered:.2f} GB")
    lines.append("Motif-2's report, 8 ranks: 216 ms, 3,904 MB")
    return "\n".join(lines)


def check_replicas(world: int, replicas: int) -> None:
    if world % replicas:
        raise UserError(f"{world} ranks are not {replicas} replicas of the same size; change "
                        f"--dp_replicate or the number of ranks")


# ---- Timing

def format_timing(name: str, *calls, seconds: float = 60, rounds: int = 21) -> str:
    """Time some calls -> a line with the median and range of each in ms, and the ratio of the first
    two. The calls take turns, so that whatever else runs on the machine slows all of them."""
    times = [[] for _ in calls]
    end = time.perf_counter() + seconds
    warm_up = 2                                             # these compile
    for i in range(rounds + warm_up):
        if i >= warm_up + 3 and time.perf_counter() >= end:
            break
        for call, own in zip(calls, times):
            ms = time_once(call)
            if i >= warm_up:
                own.append(ms)

    medians = [statistics.median(own) for own in times]
    line = f"  {name:20s}"
    for median, own in zip(medians, times):
        line += f"{median:10.2f} ({min(own):.2f} to {max(own):.2f})"
    return line + f"{medians[0] / medians[1]:8.3f}"


def time_once(call) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class GatherAll(MuonClip):
    """MuonClip for sharded matrices only, in the plain way: every rank gathers every matrix."""

    def _muon_step(self, group: dict, skip: Tensor) -> None:
        scalars = self._step_scalars(group, skip)
        for p in group["params"]:
            mesh = p.device_mesh
            u = self.add_gradient(p, scalars)
            u = DTensor.from_local(u, mesh, p.placements, shape=p.shape, stride=p.stride())
            O = newton_schulz(u.full_tensor(), **self.ns_options)
            box = local_slices(p.shape, mesh.shape, shard_dims(p), mesh.get_coordinate())
            self.apply_result(p, O[box].contiguous(), scalars)


def time_parallel(shapes: list, replicas: int) -> None:
    """Under torchrun: time a step of the sharded matrices by Parallel Muon and by GatherAll, and
    check that they give the same weights."""
    world = int(os.environ["WORLD_SIZE"])
    check_replicas(world, replicas)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")

    mesh = dist.init_device_mesh(device.type, (replicas, world // replicas))
    parallel = sharded_optimizer(MuonClip, shapes, mesh, device)
    gathering = sharded_optimizer(GatherAll, shapes, mesh, device)

    def step_together(optimizer):
        dist.barrier()
        optimizer.step()
        dist.barrier()

    times = format_timing(
        f"{len(shapes)} matrices",
        lambda: step_together(parallel),
        lambda: step_together(gathering),
        seconds=math.inf, rounds=5)

    same = torch.ones((), dtype=torch.int32, device=device)
    for p, q in zip(parallel.state, gathering.state):
        same *= (local_shard(p) == local_shard(q)).all()
    dist.all_reduce(same, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        together = replicas_per_muon_group(shapes, world, replicas)
        print(f"{world} ranks on {device.type}; {together} of {replicas} replicas share matrices")
        print(f"ms of a step: Parallel Muon, each gathers all, ratio\n{times}")
        print(f"the same weights: {bool(same)}", flush=True)


def sharded_optimizer(form: type, shapes: list, mesh, device) -> MuonClip:
    """Make an optimizer of this class for random matrices, sharded by rows, with gradients."""
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        weight = torch.randn(shape, device=device)
        p = distribute_tensor(weight, mesh, [Replicate(), Shard(0)], src_data_rank=None)
        p.grad = p.clone()
        params.append(p)
    return form(params, [], lr=1e-3)


def time_newton_schulz(shapes: list, device: str) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz
    print(f"ms on {device}: newton_schulz, torch's plain form in bf16, ratio")
    for shape in shapes:
        G = torch.randn(shape, device=device)
        matrices = G.view(-1, *shape[-2:])

        def plain():
            for matrix in matrices:
                _zeropower_via_newtonschulz(matrix, COEFFICIENTS["quintic"][0], 5, 1e-7)

        name = " x ".join(map(str, shape))
        print(format_timing(name, lambda: newton_schulz(G), plain, seconds=5))


def time_layer_step(shapes: list, device: str) -> None:
    layer = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    for p in layer:
        p.grad = torch.randn_like(p)
    ours = MuonClip(layer, [], lr=1e-3)
    torchs = torch.optim.Muon(layer, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(layer, lr=1e-3, fused=True)
    print("a step of a layer's matrices: MuonClip, torch.optim.Muon, torch.optim.AdamW, ratio")
    count = sum(p.numel() for p in layer)
    print(format_timing(f"{count:,d} parameters", ours.step, torchs.step, adamw.step))


def main() -> None:
    c = load(Config, sys.argv[1:], default_file=QUICKSTART, about=__doc__)
    with torch.device("meta"):
        model = Motif(model_config(c))
    shapes = [tuple(p.shape) for p in model.matrices().values()]

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        time_parallel(shapes, c.dp_replicate)
        return

    print(describe_routing(model, configure_optimizer(model, lr=c.lr)))
    if any(word.startswith("--plan_world_size") for word in sys.argv[1:]):
        print(plan_table(shapes, c.plan_world_size, c.dp_replicate))
        return

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = shapes[:7]
    kinds = sorted({(c.hidden_size, c.hidden_size), *layer}, key=math.prod)
    time_newton_schulz([*kinds, (8, *kinds[0])], device)
    time_layer_step(layer, device)


if __name__ == "__main__":
    run_main(main)
