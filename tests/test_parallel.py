"""Parallel Muon over gloo ranks against one process: the same bits, and the bytes of the plan. So
does `python tests/test_parallel.py 8` for any number of ranks."""
import tools.bench_muon
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
from muonclip import MuonClip, MuonShardGroup, assign_owners, newton_schulz_flops, shard_dims, local_shard, local_slices, qk_clip, replicas_per_muon_group

# 5 rows over 4 ranks are 2, 2, 1, 0; 3 and 1 leave ranks empty; a stack; more in all than ranks
SHAPES = ((5, 8), (8, 20), (20, 8), (12, 12), (3, 7), (1, 6), (5, 3, 4), (9, 2), (6, 6))
REST = ((3, 192), (192,))      # of multiples of 16: torch's AdamW rounds what is left differently
KV_MAP = [0, 0, 1]                                       # 3 heads of 4 rows: 12 over 2 or 4 ranks


def tensors(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def shard(t, mesh, placements):
    """A DTensor of its own memory, from the same whole on every rank, without a message."""
    layout = [p.dim if isinstance(p, Shard) else None for p in placements]
    box = local_slices(t.shape, mesh.shape, layout, mesh.get_coordinate())
    return DTensor.from_local(t[box].clone(memory_format=torch.contiguous_format), mesh, placements,
                              run_check=False, shape=t.shape, stride=t.stride())


def mine(p, t):
    """Of a whole tensor, the part that this rank has of p."""
    if not isinstance(p, DTensor):
        return t
    mesh = p.device_mesh
    return t[local_slices(t.shape, mesh.shape, shard_dims(p), mesh.get_coordinate())]


def run(place, steps=3, gradients=tensors, shapes=SHAPES, rest=REST, **options):
    """Some steps from equal weights and gradients -> (params, optimizer). place(i, t) makes a
    parameter or gradient of the whole tensor t; the last ones are AdamW's."""
    params = [place(i, t).requires_grad_() for i, t in enumerate(tensors(0, shapes + rest))]
    optimizer = MuonClip(params[:len(shapes)], params[len(shapes):], lr=0.02, **options)
    for step in range(steps):
        for i, (p, g) in enumerate(zip(params, gradients(step + 1, shapes + rest))):
            p.grad = None if g is None else place(i, g)
        optimizer.step()
    return params, optimizer


def whole(i, t):
    return t.clone()


def same(ours, theirs):
    """Weights, state and update_rms of a run over ranks against those of one process."""
    for (p, q) in zip(ours[0], theirs[0]):
        assert torch.equal(local_shard(p), mine(p, q)), (p.shape, "weight")
        for key, value in theirs[1].state[q].items():
            value = value if value.ndim == 0 else mine(p, value)
            assert torch.equal(ours[1].state[p][key], value), (p.shape, key)
        if q in theirs[1].update_rms:
            torch.testing.assert_close(ours[1].update_rms[p], theirs[1].update_rms[q], rtol=1e-5,
                                       atol=0)


def layouts(W):
    """name -> what makes a parameter of this layout. `mixed` has all that one unit may hold."""
    def on(mesh, placements):
        return lambda i, t: shard(t, mesh, [p if not isinstance(p, Shard) or p.dim < t.ndim
                                            else Replicate() for p in placements])
    line, found = dist.init_device_mesh("cpu", (W,)), {"plain": whole}
    found["rows"], found["columns"] = on(line, [Shard(0)]), on(line, [Shard(1)])
    found["some plain"] = lambda i, t: t.clone() if i % 3 == 0 else found["rows"](i, t)
    meshes = [dist.init_device_mesh("cpu", sizes) for sizes in ((W, 1), (1, W), (2, W // 2))
              if sizes[0] * sizes[1] == W]
    for mesh in meshes:
        n = "x".join(map(str, mesh.shape))
        found[f"replicas {n}"] = on(mesh, [Replicate(), Shard(0)])
        found[f"both {n}"] = on(mesh, [Shard(0), Shard(1)])
        found[f"twice {n}"] = on(mesh, [Shard(0), Shard(0)])
    mixed = [found[name] for name in found if name.endswith("1x%d" % W)]
    found["mixed"] = lambda i, t: mixed[i % len(mixed)](i, t)
    return found


def check_equality(W, places):
    for dtype, chunks in (torch.float32, (1, 2)), (torch.bfloat16, (1, 3, 100)):
        expected = run(whole, dtype=dtype)
        for (name, place), chunk in itertools.product(places.items(), chunks):
            if chunk == 1 or name in ("rows", "replicas 2x2", "mixed"):
                same(run(place, dtype=dtype, chunk=chunk), expected)
    for few in SHAPES[:W - 1], SHAPES[:2], SHAPES[:1]:   # than ranks, or even shards: then replicas
        expected = run(whole, shapes=few)                # do them again
        for name in places:
            if name == "rows" or name.startswith("replicas"):
                same(run(places[name], shapes=few), expected)


def check_missing(W, places):
    """Rank 0 has no gradient of matrices 0 and 3, the last rank none of 1: there it is 0."""
    def lost(i, t, rank):
        return i in (0, 3) and rank == 0 or i == 1 and rank == W - 1

    def ours(step, shapes):
        return [None if lost(i, t, dist.get_rank()) and step == 2 else t
                for i, t in enumerate(tensors(step, shapes))]

    def theirs(step, shapes):
        found = tensors(step, shapes)
        for i, t in enumerate(found):
            for rank in range(W):
                if step == 2 and lost(i, t, rank):
                    t[local_slices(t.shape, (W,), (0,), (rank,))] = 0
        return found
    same(run(places["rows"], gradients=ours), run(whole, gradients=theirs))
    run(places["rows"], gradients=lambda step, shapes:   # nor does a rank without any hang the rest
        tensors(step, shapes) if dist.get_rank() else [None] * len(shapes))


def check_skip(places):
    for name in places:
        params, optimizer = run(places[name])
        before = [t.clone() for p in params for t in (local_shard(p.data), *optimizer.state[p].values())]
        for p in params:
            local_shard(p.grad).fill_(torch.nan)
        optimizer.step(skip=torch.tensor(True))
        after = [t for p in params for t in (local_shard(p.data), *optimizer.state[p].values())]
        assert all(map(torch.equal, before, after)), name


def check_qk_clip(W, places):
    """Each rank saw other logits; the largest count. 12 and 8 rows, so that shards cut heads, and
    AdamW's as well as Muon's."""
    q, k = tensors(5, ((12, 6), (8, 6)))
    S = torch.tensor([[50.0, 400.0, 10.0]])
    expected = [q.clone(), k.clone()]
    gamma = qk_clip(*expected, S[0], KV_MAP, 4, 100.0)
    for (name, place), muon in itertools.product(places.items(), (True, False)):
        weights = [place(0, q).requires_grad_(), place(0, k).requires_grad_()]
        for p in weights:
            p.grad = torch.zeros_like(p)
        optimizer = MuonClip(weights * muon, weights * (not muon), lr=0.0, qk=[weights],
                             kv_map=KV_MAP, head_dim=4)
        seen = S if name in ("plain", "some plain") else S / (1 + (dist.get_rank() - 1) % W)
        kept = seen.clone()
        optimizer.step(max_logits=seen)
        assert all(torch.equal(local_shard(p), mine(p, t)) for p, t in zip(weights, expected)), name
        assert optimizer.clipped == (gamma < 1).sum() == 1 and torch.equal(seen, kept)
    weights = [places["rows"](0, q).requires_grad_(), places["rows"](0, k).requires_grad_()]
    optimizer = MuonClip(weights, [], lr=0.0, qk=[weights], kv_map=KV_MAP, head_dim=4)
    for rank, bad in itertools.product(range(W), (torch.nan, torch.inf)):
        seen = S * (bad if dist.get_rank() == rank else 1)
        with pytest.raises(RuntimeError, match="not finite"):    # on every rank
            optimizer.step(max_logits=seen)
        optimizer.step(max_logits=seen, skip=torch.tensor(True))


class Held(TorchDispatchMode):
    """The most elements of bf16, that is of u and O, that were alive at one time."""
    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes() // 2
        self.alive = {key: s for key, s in self.alive.items() if not s[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


class Kept:
    """As NCCL's handle: keeps what it sends until waited for. Gloo's may a little longer."""
    def __init__(self, sent):
        self.sent = sent

    def wait(self):
        self.sent = None


def check_bytes(W, places):
    """Two exchanges for each chunk, and of each rank the bytes and the memory that the plan says,
    without Newton-Schulz's own."""
    exchange, newton_schulz, calls = dist.all_to_all_single, muonclip.newton_schulz, []

    def counted(received, sent, receives, sends, **options):
        me = dist.get_rank(options["group"])
        assert sent.dtype == received.dtype == torch.bfloat16
        assert (sum(sends), sum(receives)) == (sent.numel(), received.numel())
        calls.append((sum(sends) - sends[me], sum(receives) - receives[me]))
        wire = received.float()
        exchange(wire, sent.float(), receives, sends, group=options["group"])
        received.copy_(wire)
        return Kept(sent)
    dist.all_to_all_single, muonclip.newton_schulz = counted, lambda u, **_: u
    cases = [("rows", (1, W), (None, 0))] + [("replicas 2x2", (2, 2), (None, 0))] * (W == 4)
    for (name, sizes, layout), chunk in itertools.product(cases, (1, 2)):
        shapes = 3 * SHAPES
        plan = MuonShardGroup(shapes, [layout] * len(shapes), sizes, chunk=chunk)
        _, optimizer = run(places[name], steps=1, shapes=shapes, rest=(), chunk=chunk)
        assert len(calls) == 2 * len(plan.chunks) >= 2
        assert [*map(sum, zip(*calls))] == plan.traffic()[:, dist.get_rank()].tolist()
        with Held() as held:
            optimizer.step()
        assert held.most == plan.peak()[dist.get_rank()]
        calls.clear()
    dist.all_to_all_single, muonclip.newton_schulz = exchange, newton_schulz


def check_placement(W):
    """A gradient that is yet to be reduced is no gradient."""
    p = shard(torch.ones(4, 4), dist.init_device_mesh("cpu", (W,)), [Replicate()]).requires_grad_()
    p.grad = DTensor.from_local(torch.ones(4, 4), p.device_mesh, [Partial()])
    with pytest.raises(ValueError, match=r"^a gradient is placed by \(Partial\(sum\),\), its "):
        MuonClip([p], [], lr=0.1).step()


def check_fsdp(W):
    """Parameters as FSDP2 shards them, of which a rank's are views of one buffer."""
    meshes = [dist.init_device_mesh("cpu", (W,))]
    if W == 4:
        meshes.append(dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
    expected = run(whole, rest=())
    for mesh in meshes:
        module = torch.nn.ParameterList(torch.nn.Parameter(t) for t in tensors(0))
        fully_shard(module, mesh=mesh)
        params, weights = [*module], [*module]           # run asks for these, then for gradients
        assert params[0].placements == (Replicate(), Shard(0))[-mesh.ndim:]

        def place(i, t):
            return weights.pop(0) if weights else shard(t, mesh, params[i].placements)
        same(run(place, rest=()), expected)


def check_gather_all(places):
    """The form that is timed beside it is the same function."""
    orthogonalize = MuonClip._orthogonalize
    MuonClip._orthogonalize = tools.bench_muon.gather_all
    theirs = run(places["rows"], rest=())
    MuonClip._orthogonalize = orthogonalize
    for p, q in zip(run(places["rows"], rest=())[0], theirs[0]):
        assert torch.equal(local_shard(p), local_shard(q))


def worker():
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    W = dist.get_world_size()
    places = layouts(W)
    check_equality(W, places)
    check_missing(W, places)
    check_skip(places)
    check_qk_clip(W, places)
    check_bytes(W, places)
    check_placement(W)
    check_fsdp(W)
    check_gather_all(places)
    print("all equal", flush=True)


def test_ranks_equal_one_process():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
                   "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__, "2", "3", "4"], env=environment, timeout=200,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all equal") == 2 + 3 + 4


# ---- the plan

LAYER = ((5120, 4096), (2048, 4096), (2048, 4096), (4096, 5120), (16384, 4096), (16384, 4096),
         (4096, 16384))


def test_owners_of_the_12b_model_are_balanced_within_each_chunk_too():
    shapes = 40 * LAYER
    for ranks, overall, waiting in (8, 1.002, 1.01), (64, 1.02, 1.1), (128, 1.22, 1.3):
        place = assign_owners(shapes, ranks)
        loads = torch.zeros(max(c for c, _ in place) + 1, ranks, dtype=torch.float64)
        for shape, (chunk, owner) in zip(shapes, place):
            loads[chunk, owner] += newton_schulz_flops(shape)
        assert loads.sum(0).max() <= overall * loads.sum() / ranks
        assert loads.amax(1).sum() <= waiting * loads.sum() / ranks
    assert len({owner for _, owner in assign_owners(shapes, 1024)}) == 280


def test_replicas_share_the_matrices_as_long_as_that_is_less_work_for_the_busiest():
    groups = {(8, 1): 1, (64, 8): 8, (1024, 1): 1, (1024, 4): 1, (1024, 16): 4, (1024, 128): 32}
    for (ranks, replicas), expected in groups.items():
        assert replicas_per_muon_group(40 * LAYER, ranks, replicas) == expected
    with pytest.raises(ValueError, match="^9 ranks are not 2 replicas of the same size$"):
        replicas_per_muon_group(LAYER, 9, 2)


def test_parts_are_torch_chunks_and_tile_the_tensor():
    for rows, ranks in itertools.product((1, 3, 5, 8, 11), (1, 2, 3, 4, 8)):
        lengths = [len(c) for c in torch.arange(rows).chunk(ranks)]
        parts = [local_slices((rows, 2), (ranks,), (0,), (r,))[0] for r in range(ranks)]
        assert [s.stop - s.start for s in parts] == lengths + [0] * (ranks - len(lengths))
    seen = torch.zeros(5, 7)
    for at in itertools.product(range(2), range(3)):
        seen[local_slices((5, 7), (2, 3), (0, 1), at)] += 1
    assert (seen == 1).all()


def test_the_volume_is_as_said():
    for sizes in (1, 8), (2, 4), (4, 1):
        W, P = math.prod(sizes), 8 * sum(map(math.prod, LAYER))
        unit = MuonShardGroup(8 * LAYER, [(None, 0)] * 8 * len(LAYER), sizes)
        volume = P * (W + sizes[0] * (W - 2)) // W**2    # loads are equal here
        assert unit.traffic().tolist() == [[volume] * W] * 2


def test_main_prints_the_plan(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["muonclip.py", "config/motif2_12b.py", "--plan_world_size=8"])
    monkeypatch.chdir(Path(__file__).parents[1])
    tools.bench_muon.main()
    said = capsys.readouterr().out
    assert "280 matrices of 10.905e9 elements, in 21 chunks" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["TFLOP", "126.27", "1.000"] in lines and ["MB", "held", "805.31", "1.000"] in lines
    assert ["GB", "sent", "4.77", "1.000"] in lines and "where each gathers all 19.08 GB" in said
    for options, message in ((["--plan_world_size=9", "--dp_replicate=2"], "9 ranks are not 2 replicas"),
                             (["--plan_world_size=0"], "--plan_world_size=0: world must be at least 1, not 0")):
        monkeypatch.setattr("sys.argv", ["muonclip.py", *options])
        with pytest.raises(SystemExit, match=f"^{message}"):
            tools.bench_muon.main()


if __name__ == "__main__":
    for W in sys.argv[1:]:
        world(int(W), worker)
