"""Parallel Muon over gloo ranks against one process: the same bits, and the traffic and memory that
the plan says. `python tests/test_parallel.py 8` does the same with 8 ranks."""
import itertools
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import world

import muonclip
from configurator import UserError
from muonclip import (MuonClip, MuonPlan, ShardExchange, assign_owners, local_shard, local_slices,
                      newton_schulz_flops, qk_clip, replicas_per_muon_group, shard_dims)
from tools import bench_muon
from tools.bench_muon import GatherAll, peak_elements, traffic

ROOT = Path(__file__).parents[1]

# 5 rows over 4 ranks are 2, 2, 1, 0; 3 rows and 1 row leave ranks empty; one is a stack; there are
# more matrices than ranks.
SHAPES = ((5, 8), (8, 20), (20, 8), (12, 12), (3, 7), (1, 6), (5, 3, 4), (9, 2), (6, 6))

# For AdamW. Multiples of 16, since torch's fused AdamW rounds the numbers beyond them differently.
OTHER_SHAPES = ((3, 192), (192,))

# 3 heads of 4 rows: 12 rows over 2 or 4 ranks cut heads.
KV_MAP = [0, 0, 1]
HEAD_DIM = 4


# ---- Runs, on shards or not

def random_tensors(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def keep_whole(i, t):
    return t.clone()


def shard(t, mesh, placements):
    """Make a DTensor of t, which every rank has, with memory of its own and without a message."""
    dims = [p.dim if isinstance(p, Shard) else None for p in placements]
    box = local_slices(t.shape, mesh.shape, dims, mesh.get_coordinate())
    local = t[box].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=t.shape,
                              stride=t.stride())


def part_like(p, whole):
    """The part of a whole tensor that this rank holds of p."""
    if not isinstance(p, DTensor):
        return whole
    mesh = p.device_mesh
    return whole[local_slices(whole.shape, mesh.shape, shard_dims(p), mesh.get_coordinate())]


def train(place, steps=3, gradients=random_tensors, shapes=SHAPES, others=OTHER_SHAPES,
          form=MuonClip, **options):
    """Some steps from the same weights and gradients -> (params, optimizer).

    place(i, t) makes parameter or gradient number i from a whole tensor t. gradients(seed, shapes)
    returns whole tensors, or None for a missing one."""
    weights = random_tensors(0, shapes + others)
    params = [place(i, t).requires_grad_() for i, t in enumerate(weights)]
    optimizer = form(params[:len(shapes)], params[len(shapes):], lr=0.02, **options)
    for step in range(steps):
        whole = gradients(step + 1, shapes + others)
        for i, p in enumerate(params):
            p.grad = None if whole[i] is None else place(i, whole[i])
        optimizer.step()
    return params, optimizer


def assert_equal_runs(ours, expected):
    """Weights, state and update_rms of a run over ranks are those of one process."""
    params, optimizer = ours
    whole_params, whole_optimizer = expected
    for p, whole in zip(params, whole_params):
        assert torch.equal(local_shard(p), part_like(p, whole)), (p.shape, "weight")
        for key, value in whole_optimizer.state[whole].items():
            if value.ndim > 0:
                value = part_like(p, value)
            assert torch.equal(optimizer.state[p][key], value), (p.shape, key)
        if whole in whole_optimizer.update_rms:
            torch.testing.assert_close(optimizer.update_rms[p], whole_optimizer.update_rms[whole],
                                       rtol=1e-5, atol=0)


def make_layouts(W):
    """name -> place(i, t), as train takes it, for W ranks."""
    def on(mesh, *placements):
        def place(i, t):
            # A vector that is to be cut by columns is copied instead.
            fitting = [Replicate() if isinstance(p, Shard) and p.dim >= t.ndim else p
                       for p in placements]
            return shard(t, mesh, fitting)
        return place

    line = dist.init_device_mesh("cpu", (W,))
    rows = on(line, Shard(0))
    layouts = {
        "plain": keep_whole,
        "rows": rows,
        "columns": on(line, Shard(1)),
        "some plain": lambda i, t: t.clone() if i % 3 == 0 else rows(i, t)}

    for replicas in sorted({1, 2, W}):
        if W % replicas:
            continue
        mesh = dist.init_device_mesh("cpu", (replicas, W // replicas))
        name = f"{replicas}x{W // replicas}"
        layouts[f"replicas {name}"] = on(mesh, Replicate(), Shard(0))
        layouts[f"both {name}"] = on(mesh, Shard(0), Shard(1))
        layouts[f"twice {name}"] = on(mesh, Shard(0), Shard(0))

    # All that one group may hold at the same time.
    mixed = [layouts[f"{kind} 1x{W}"] for kind in ("replicas", "both", "twice")]
    layouts["mixed"] = lambda i, t: mixed[i % 3](i, t)
    return layouts


# ---- What each rank checks

def check_equality(W, layouts):
    for dtype in (torch.float32, torch.bfloat16):
        expected = train(keep_whole, dtype=dtype)
        for name, place in layouts.items():
            assert_equal_runs(train(place, dtype=dtype), expected)

    # More chunks; and fewer matrices than ranks or than shards, where replicas do not share owners.
    for shapes in (3 * SHAPES, SHAPES[:W - 1], SHAPES[:2], SHAPES[:1]):
        expected = train(keep_whole, shapes=shapes)
        for name, place in layouts.items():
            if name == "rows" or name.startswith("replicas"):
                assert_equal_runs(train(place, shapes=shapes), expected)


def check_missing_gradients(W, layouts):
    """In one step rank 0 has no gradient of matrices 0 and 3, the last rank none of 1: their part
    of it counts as 0."""
    def is_missing(i, rank, step):
        return step == 2 and (i in (0, 3) and rank == 0 or i == 1 and rank == W - 1)

    def missing_here(step, shapes):
        whole = random_tensors(step, shapes)
        return [None if is_missing(i, dist.get_rank(), step) else t for i, t in enumerate(whole)]

    def with_zeros(step, shapes):
        whole = random_tensors(step, shapes)
        for i, t in enumerate(whole):
            for rank in range(W):
                if is_missing(i, rank, step):
                    t[local_slices(t.shape, (W,), (0,), (rank,))] = 0
        return whole

    assert_equal_runs(train(layouts["rows"], gradients=missing_here),
                      train(keep_whole, gradients=with_zeros))

    # A rank without any gradient does not hang the others.
    def none_on_rank_0(step, shapes):
        if dist.get_rank() == 0:
            return [None] * len(shapes)
        return random_tensors(step, shapes)
    train(layouts["rows"], gradients=none_on_rank_0)


def check_skip(layouts):
    def snapshot(params, optimizer):
        tensors = []
        for p in params:
            tensors += [local_shard(p.data), *optimizer.state[p].values()]
        return [t.clone() for t in tensors]

    for name, place in layouts.items():
        params, optimizer = train(place)
        before = snapshot(params, optimizer)
        for p in params:
            local_shard(p.grad).fill_(torch.nan)
        optimizer.step(skip=torch.tensor(True))
        assert all(map(torch.equal, before, snapshot(params, optimizer))), name


def check_qk_clip(W, layouts):
    """Each rank has seen other logits, and the largest count; whether Muon or AdamW has q and k."""
    q, k = random_tensors(5, ((12, 6), (8, 6)))
    S = torch.tensor([[50.0, 400.0, 10.0]])
    expected = [q.clone(), k.clone()]
    gamma = qk_clip([expected], S, KV_MAP, HEAD_DIM, 100.0)
    rank = dist.get_rank()

    def make(place, by_muon):
        weights = [place(0, q).requires_grad_(), place(0, k).requires_grad_()]
        for p in weights:
            p.grad = torch.zeros_like(p)
        matrices = weights if by_muon else []
        others = [] if by_muon else weights
        return weights, MuonClip(matrices, others, lr=0.0, qk=[weights], kv_map=KV_MAP,
                                 head_dim=HEAD_DIM)

    for name, place in layouts.items():
        for by_muon in (True, False):
            weights, optimizer = make(place, by_muon)
            plain = name in ("plain", "some plain")             # the caller reduces these logits
            seen = S if plain else S / (1 + (rank - 1) % W)
            kept = seen.clone()
            optimizer.step(max_logits=seen)
            for p, whole in zip(weights, expected):
                assert torch.equal(local_shard(p), part_like(p, whole)), name
            assert optimizer.heads_clipped == (gamma < 1).sum() == 1
            assert torch.equal(seen, kept)

    # A NaN that one rank saw raises on every rank, unless the step is skipped.
    _, optimizer = make(layouts["rows"], True)
    for bad_rank in range(W):
        for bad in (torch.nan, torch.inf):
            seen = S * bad if rank == bad_rank else S
            with pytest.raises(RuntimeError, match="not finite"):
                optimizer.step(max_logits=seen)
            optimizer.step(max_logits=seen, skip=torch.tensor(True))


class HeldElements(TorchDispatchMode):
    """Counts the most numbers in bf16 tensors, that is u and O, that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // 2)

        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


class Handle:
    """Like NCCL's handle, it keeps what it sends until waited for. Gloo's may keep it longer."""

    def __init__(self, sent):
        self.sent = sent

    def wait(self):
        self.sent = None


def check_traffic_and_memory(W, layouts):
    """There are two exchanges a chunk, with the traffic and the memory that the plan says, apart
    from Newton-Schulz's own memory."""
    exchange = dist.all_to_all_single
    newton_schulz = muonclip.newton_schulz
    calls = []

    def counting_exchange(received, sent, receive_sizes, send_sizes, group, async_op):
        assert async_op and sent.dtype == received.dtype == torch.bfloat16
        assert sum(send_sizes) == sent.numel() and sum(receive_sizes) == received.numel()
        me = dist.get_rank(group)
        calls.append((sum(send_sizes) - send_sizes[me], sum(receive_sizes) - receive_sizes[me]))
        in_fp32 = received.float()
        exchange(in_fp32, sent.float(), receive_sizes, send_sizes, group=group)
        received.copy_(in_fp32)
        return Handle(sent)

    cases = [("rows", (1, W), (None, 0))]
    if W == 4:
        cases.append(("replicas 2x2", (2, 2), (None, 0)))

    dist.all_to_all_single = counting_exchange
    muonclip.newton_schulz = lambda u, **_: u
    for name, sizes, dims in cases:
        for shapes in (SHAPES, 3 * SHAPES):
            plan = MuonPlan(shapes, [dims] * len(shapes), torch.arange(W).view(sizes))
            calls.clear()
            _, optimizer = train(layouts[name], steps=1, shapes=shapes, others=())
            assert len(calls) == 2 * len(plan.chunks) >= 2
            assert torch.tensor(calls).sum(0).tolist() == traffic(plan)[:, dist.get_rank()].tolist()
            with HeldElements() as held:
                optimizer.step()
            assert held.most == peak_elements(plan)[dist.get_rank()]
    dist.all_to_all_single = exchange
    muonclip.newton_schulz = newton_schulz


def check_order_of_phases(layouts):
    """The messages travel beside the arithmetic: u(k+1) leaves before Newton-Schulz(k), and O(k-1)
    is waited for after it."""
    events = []
    names = ("send_u", "gather_u", "apply_O", "send_O")
    originals = {name: getattr(ShardExchange, name) for name in names}

    def recording(name):
        def call(self, k, *args):
            events.append((name, k))
            return originals[name](self, k, *args)
        return call

    for name in names:
        setattr(ShardExchange, name, recording(name))
    train(layouts["rows"], steps=1, others=())
    for name in names:
        setattr(ShardExchange, name, originals[name])

    last = max(k for _, k in events)
    expected = [("send_u", 0)]
    for k in range(last + 1):
        expected.append(("gather_u", k))
        if k < last:
            expected.append(("send_u", k + 1))
        if k > 0:
            expected.append(("apply_O", k - 1))
        expected.append(("send_O", k))
    assert events == expected + [("apply_O", last)]


def check_unreduced_gradient(W):
    """A gradient that is yet to be summed over ranks is refused."""
    mesh = dist.init_device_mesh("cpu", (W,))
    p = shard(torch.ones(4, 4), mesh, [Replicate()]).requires_grad_()
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    with pytest.raises(AssertionError, match="reduce gradients first"):
        MuonClip([p], [], lr=0.1).step()


def check_fsdp(W):
    """Parameters as FSDP2 shards them: a rank's shards are views of one buffer."""
    meshes = [dist.init_device_mesh("cpu", (W,))]
    if W == 4:
        meshes.append(dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))

    expected = train(keep_whole, others=())
    for mesh in meshes:
        weights = random_tensors(0, SHAPES)
        module = torch.nn.ParameterList(torch.nn.Parameter(t) for t in weights)
        fully_shard(module, mesh=mesh)
        params = list(module)
        assert params[0].placements == (Replicate(), Shard(0))[-mesh.ndim:]

        optimizer = MuonClip(params, [], lr=0.02)
        for step in range(3):
            for p, t in zip(params, random_tensors(step + 1, SHAPES)):
                p.grad = shard(t, mesh, p.placements)
            optimizer.step()
        assert_equal_runs((params, optimizer), expected)


def check_gather_all(layouts):
    """The form that the benchmark compares with is the same function."""
    parallel, _ = train(layouts["rows"], others=())
    gathering, _ = train(layouts["rows"], others=(), form=GatherAll)
    for p, q in zip(parallel, gathering):
        assert torch.equal(local_shard(p), local_shard(q))


def check_rank():
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    W = dist.get_world_size()
    layouts = make_layouts(W)
    check_equality(W, layouts)
    check_missing_gradients(W, layouts)
    check_skip(layouts)
    check_qk_clip(W, layouts)
    check_traffic_and_memory(W, layouts)
    check_order_of_phases(layouts)
    check_unreduced_gradient(W)
    check_fsdp(W)
    check_gather_all(layouts)
    print("all equal", flush=True)


def test_ranks_equal_one_process():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
                   "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, "2", "3", "4"], env=environment, timeout=200,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all equal") == 2 + 3 + 4


# ---- The plan

LAYER = ((5120, 4096), (2048, 4096), (2048, 4096), (4096, 5120), (16384, 4096), (16384, 4096),
         (4096, 16384))


@pytest.mark.parametrize("ranks, overall, with_waiting", [
    (8, 1.002, 1.01), (64, 1.02, 1.1), (128, 1.22, 1.3)])
def test_owners_of_the_12b_model_are_balanced_within_each_chunk_too(ranks, overall, with_waiting):
    shapes = 40 * LAYER
    owner, chunks = assign_owners(shapes, ranks)
    loads = torch.zeros(len(chunks), ranks, dtype=torch.float64)
    for k, chunk in enumerate(chunks):
        for i in chunk:
            loads[k, owner[i]] += newton_schulz_flops(shapes[i])

    mean = loads.sum() / ranks
    assert loads.sum(0).max() <= overall * mean
    assert loads.amax(1).sum() <= with_waiting * mean


def test_beyond_a_rank_for_each_matrix_some_ranks_own_none():
    owner, _ = assign_owners(40 * LAYER, 1024)
    assert len(set(owner)) == 280


@pytest.mark.parametrize("ranks, replicas, expected", [
    (8, 1, 1), (64, 8, 8), (1024, 1, 1), (1024, 4, 1), (1024, 16, 4), (1024, 128, 32)])
def test_replicas_share_the_matrices_while_that_leaves_the_busiest_less(ranks, replicas, expected):
    assert replicas_per_muon_group(40 * LAYER, ranks, replicas) == expected


def test_slices_are_torch_chunks_and_tile_the_tensor():
    for rows, ranks in itertools.product((1, 3, 5, 8, 11), (1, 2, 3, 4, 8)):
        lengths = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
        lengths += [0] * (ranks - len(lengths))
        for rank in range(ranks):
            box = local_slices((rows, 2), (ranks,), (0,), (rank,))
            assert box[0].stop - box[0].start == lengths[rank]

    seen = torch.zeros(5, 7)
    for coords in itertools.product(range(2), range(3)):
        seen[local_slices((5, 7), (2, 3), (0, 1), coords)] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("R, shards", [(1, 8), (2, 4), (4, 1)])
def test_traffic_is_that_of_the_formula(R, shards):
    """Loads are equal here, so every rank owns P / W numbers."""
    W = R * shards
    shapes = 8 * LAYER
    P = sum(math.prod(shape) for shape in shapes)
    mesh = torch.arange(W).view(R, shards)
    plan = MuonPlan(shapes, [(None, 0)] * len(shapes), mesh)
    expected = P / W * (1 + R - 2 * R / W)
    assert traffic(plan).tolist() == [[expected] * W] * 2


def test_main_prints_the_plan(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_muon", "config/motif2_12b.py", "--plan_world_size=8"])
    monkeypatch.chdir(ROOT)
    bench_muon.main()
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert "280 matrices of 10.905e9 elements, in 21 chunks" in printed
    assert ["TFLOP", "126.27", "1.000"] in rows
    assert ["GB", "sent", "4.77", "1.000"] in rows
    assert ["MB", "held", "805.31", "1.000"] in rows
    assert "if each gathered all: 19.08 GB" in printed


def test_a_plan_for_replicas_that_do_not_divide_the_ranks_names_the_key(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_muon", "--plan_world_size=9", "--dp_replicate=2"])
    with pytest.raises(UserError, match="^9 ranks are not 2 replicas.*--dp_replicate.*$"):
        bench_muon.main()


if __name__ == "__main__":
    for ranks in sys.argv[1:]:
        world(int(ranks), check_rank)
