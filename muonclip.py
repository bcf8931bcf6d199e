"""MuonClip: Muon for the matrices, AdamW for the rest, QK-clip for the attention logits.

    M = mu M + G        u = G + mu M        O = NewtonSchulz(u)
    W = W - lr (0.2 sqrt(max(rows, columns)) O + wd W)

The factor gives Muon's update the RMS of AdamW's, so that both share one learning rate (Moonlight,
arXiv 2502.16982). QK-clip is Kimi K2's (arXiv 2507.20534), extended to heads that share a key.
Where FSDP2 shards the matrices the step is Parallel Muon's (arXiv 2511.07464): each matrix has an
owner, to whom the others send their shards of u, and who sends them theirs of O.

    python muonclip.py config/X.py                prints what goes where, times Newton-Schulz and
                                                  the step on one layer
    python muonclip.py config/X.py --world=8      plans Parallel Muon over 8 ranks, on no device
    torchrun --nproc_per_node=4 muonclip.py ...   times it, beside each rank doing every matrix
                       [--replicas=1]             of these two: in so many copies of the model
"""
import functools
import itertools
import math
import re

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

import kernels

# Five triples (a, b, c) of the polynomial a X + (b A + c A A) X, A = X X^T. The error is
# |O O^T - I|_F / sqrt(k) on a Gaussian 512 x 2048 matrix in bf16.
COEFFICIENTS = {
    "quintic": 5 * [(3.4445, -4.7750, 2.0315)],                     # Keller Jordan's; error 0.27
    "motif": [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
              (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)],   # Motif's; error 0.03
    "polar_express": [                                              # arXiv 2505.16932; error 0.19
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)],
}
STACK = 2**25   # numbers in the small matrices of a shape that are orthogonalized at once
SCALE = 64.0    # X is kept times this, so that its small entries stay in fp16's normal range
compiled = functools.cache(torch.compile)


def local_shard(t: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP2 shards, not a copy: with one rank all of it."""
    return t.to_local() if hasattr(t, "to_local") else t


def local_slices(shape, sizes, layout, at) -> tuple[slice, ...]:
    """Which part of a tensor lies at coordinate `at` of a mesh of these sizes. layout: for each
    mesh dimension the tensor dimension that it cuts, as torch.chunk does (5 rows over 4 ranks are
    2, 2, 1, 0), or None where it holds copies."""
    box = [slice(0, n) for n in shape]
    for size, d, i in zip(sizes, layout, at):
        if d is not None:
            first, last = box[d].start, box[d].stop
            length = -(-(last - first) // size)
            box[d] = slice(min(first + i * length, last), min(first + (i + 1) * length, last))
    return tuple(box)


def shard_dims(t: Tensor) -> tuple[int | None, ...]:
    """A DTensor's placements as in `part`. ValueError for any but Shard and Replicate."""
    from torch.distributed.tensor import Replicate, Shard
    if any(type(p) not in (Shard, Replicate) for p in t.placements):
        raise ValueError(f"MuonClip takes parameters placed by Shard and Replicate, not by "
                         f"{t.placements}")
    return tuple(p.dim if type(p) is Shard else None for p in t.placements)


def newton_schulz(G: Tensor, steps: int = 5, coefficients: str = "motif",
                  dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor of G, near U V^T of its singular value decomposition, by `steps` of

        A = X X^T        X = a X + (b A + c A A) X        X_0 = G / |G|_F

    G (..., m, n), each matrix by itself -> the same shape in `dtype`, to which G is cast first (it
    is what Parallel Muon's wire carries). A tall one is transposed, so that A is the small side.
    For bf16 a GPU works in fp16: as fast, three bits more. Scaled by its largest entry before the
    norm: 1e30 G and 1e-30 G give the same, and 0 gives 0. ValueError for an unknown table or too
    many steps."""
    if coefficients not in COEFFICIENTS or not 1 <= steps <= 5:
        raise ValueError(f"newton_schulz has 1 to 5 steps of {', '.join(COEFFICIENTS)}; "
                         f"not {steps} of {coefficients!r}")
    m, n = G.shape[-2:]
    X = G.to(dtype).contiguous().view(-1, m * n)
    O, half = torch.empty_like(X), X.is_cuda and dtype == torch.bfloat16
    largest = (torch.linalg.vector_norm(X, torch.inf, 1, keepdim=True, dtype=torch.float32) if half
               else X.abs().amax(1, keepdim=True))       # the same; a CPU is slow at that norm
    X = torch.div(X, largest.clamp_(torch.finfo(dtype).tiny),
                  out=torch.empty_like(X, dtype=torch.float16 if half else dtype))
    norm = torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_(1)  # an entry is 1, or all are 0
    X /= norm.mul_((1.02 if coefficients == "polar_express" else 1) / SCALE)
    X, O, tall = X.view(-1, m, n), O.view(-1, m, n), m > n
    if tall:
        X, m, n = X.mT, n, m
    table, tiles = COEFFICIENTS[coefficients][:steps], math.comb(-(-m // kernels.TILE) + 1, 2)
    if len(X) * tiles < kernels.SYMMETRIC_TILES or not kernels.can_use_symmetric_matmul(X):
        X = plain_steps(X, table)
    else:
        X = gram_steps(X, table, span=3 if n >= 1.2 * m else 1)
    torch.div(X, SCALE, out=O.mT if tall else O)
    return O.view(G.shape)


def plain_steps(X: Tensor, table) -> Tensor:
    """Newton-Schulz of SCALE X (E, m, n) as it is written, in three calls a step: for small
    matrices the host's time is all of it."""
    for a, b, c in table:
        A = torch.bmm(X, X.mT)                           # SCALE^2 A
        P = torch.baddbmm(A, A, A, beta=b / SCALE**2, alpha=c / SCALE**4)
        X = torch.baddbmm(X, P, X, beta=a)
    return X


def gram_steps(X: Tensor, table, span: int) -> Tensor:
    """The same in products of which half is computed, as they are symmetric, and `span` steps at a
    time on A alone, which for a wide X is small: with P = a I + b A + c A A

        Q = P Q        A = P A P        and after the last of them        X = Q X

    A's eigenvalues that rounding makes negative grow without bound; in fp16 they are harmless for
    three steps, in bf16 (whose 8 bits do not hold a I beside b A + c A A either) for two."""
    symmetric = kernels.symmetric_matmul
    for first in range(0, len(table), span):
        local_slices = table[first:first + span]
        A = symmetric(X, X, 1 / SCALE)                   # A, P, Q are kept times SCALE too
        for i, (a, b, c) in enumerate(local_slices):
            P = symmetric(A, A, c / SCALE, A, b)         # without its a I
            if i + 1 < len(local_slices):
                PA = symmetric(P, A, 1 / SCALE, A, a)
                A = symmetric(PA, P, 1 / SCALE, PA, a)
            if i:
                Q = symmetric(Q, P, 1 / SCALE, Q, a)
            else:
                Q = P
                Q.diagonal(dim1=1, dim2=2).add_(a * SCALE)
        X = torch.baddbmm(X, Q, X, beta=0, alpha=1 / SCALE, out=torch.empty_like(X))
    return X


@torch.no_grad()
def qk_clip(q_weight: Tensor, k_weight: Tensor, max_logits: Tensor, kv_map, head_dim: int,
            tau: float) -> Tensor:
    """Scale rows of q and k in place so that no head's logits exceed tau (Kimi K2, section 2.1).

        gamma_h = min(1, tau / S_h)      s_k = sqrt(min of gamma over the heads reading key head k)
        key k's rows *= s_k              head h's query rows *= gamma_h / s_kv_map[h]

    so that every head's logits are multiplied by exactly its own gamma, whoever shares its key.
    q_weight (H D, hidden), k_weight (K D, hidden), max_logits (H,): S, the largest logit of the
    step's own forward, kv_map (H,): the key head that each query head reads -> gamma (H,). Of
    weights that are sharded, where it may be within a head, each rank scales its rows. Needs no
    host sync. A logit that is not finite raises RuntimeError (on a GPU at the next sync)."""
    torch._assert_async((max_logits < torch.inf).all(), "QK-clip: an attention logit is not finite")
    kv_map = torch.as_tensor(kv_map, device=max_logits.device)
    gamma = torch.where(max_logits > tau, tau / max_logits, 1)
    s = gamma.new_ones(len(k_weight) // head_dim).scatter_reduce(0, kv_map, gamma, "amin").sqrt()
    for weight, factor in (q_weight, gamma / s[kv_map]), (k_weight, s):
        rows = factor.repeat_interleave(head_dim)
        if hasattr(weight, "placements"):
            mesh = weight.device_mesh
            rows = rows[local_slices(weight.shape, mesh.shape, shard_dims(weight), mesh.get_coordinate())[0]]
        local_shard(weight).mul_(rows[:, None])
    return gamma


def compile_rowwise(function):
    """function, whose first two arguments are tensors of one size, so that it gets them in rows of
    1024 where that divides them, and compiled on a GPU: the number of rows alone differs from
    matrix to matrix, so that one kernel serves them all and moves 16 bytes at a time."""
    def call(*args):
        rows = [t.view(-1, math.gcd(t.numel(), 1024)) for t in args[:2]]
        fused = rows[0].is_cuda and kernels.use_triton(rows[0])
        return (compiled(function) if fused else function)(*rows, *args[2:])
    return call


@compile_rowwise
def add_to_momentum(M: Tensor, G: Tensor, mu: Tensor, skip: Tensor | None, nesterov: bool,
                    dtype: torch.dtype) -> Tensor:
    """M = mu M + G in place -> u = G + mu M, or M, in dtype. Where skip is true G counts as 0."""
    if skip is not None:
        G = G.masked_fill(skip, 0)
    torch.addcmul(G, M, mu, out=M)
    return (torch.addcmul(G, M, mu) if nesterov else M).to(dtype)


@compile_rowwise
def apply_update(W: Tensor, O: Tensor, decay: Tensor, rate: Tensor) -> Tensor:
    """W = decay W - rate O in place -> the norms of O's rows."""
    W.mul_(decay).addcmul_(O, rate, value=-1)
    return torch.linalg.vector_norm(O, dim=1, dtype=W.dtype)


def newton_schulz_flops(shape, steps: int = 5) -> int:
    """Of Newton-Schulz: 4 m^2 n + 2 m^3 a step for each matrix, m its short side."""
    m, n = sorted(shape[-2:])
    return steps * math.prod(shape[:-2]) * (4 * m * m * n + 2 * m**3)


def assign_owners(shapes, ranks: int, chunk: int = 1) -> list[tuple[int, int]]:
    """(chunk, owner) of each matrix. Longest processing time first: by falling FLOPs, each to the
    rank that is free first. As if that were a timetable, a chunk is all that starts within the time
    of `chunk` of the largest matrices: chunks are balanced like the whole, and small in memory."""
    cost = [newton_schulz_flops(shape) for shape in shapes]
    busy, window, place = [0] * ranks, chunk * max(cost), [(0, 0)] * len(cost)
    for i in sorted(range(len(cost)), key=lambda i: -cost[i]):
        owner = min(range(ranks), key=busy.__getitem__)
        place[i] = busy[owner] // window, owner
        busy[owner] += cost[i]
    return place


def replicas_per_muon_group(shapes, ranks: int, replicas: int) -> int:
    """How many of the replicas divide these matrices among them, while the others do the same: the
    fewest that leave the busiest rank least to do. More would only send more, as an owner sends its
    results to each of them: 280 matrices keep no more than about 256 ranks at work. ValueError if
    the replicas do not divide the ranks."""
    if ranks % replicas:
        raise ValueError(f"{ranks} ranks are not {replicas} replicas of the same size")

    def busiest(n):
        load = [0] * (n * ranks // replicas)
        for shape, (_, owner) in zip(shapes, assign_owners(shapes, len(load))):
            load[owner] += newton_schulz_flops(shape)
        return max(load)
    return min((n for n in range(1, replicas + 1) if replicas % n == 0),
               key=lambda n: (busiest(n), n))


class MuonShardGroup:
    """The matrices that lie on one device mesh of `sizes` (a shard group, or replicas of it too),
    and who does what for them: arithmetic alone, so that a plan is what a step does, until unit_on
    adds the process group. Rank r has coordinates at[r].

    An owner gets a matrix from the ranks of its own replica and sends every rank its shard of the
    result. Of P elements over W ranks, R replicas of W / R shards, a rank sends and receives

        (P / W) (1 + R - 2 R / W)        where gathering all on all takes P (1 - R / W)"""

    def __init__(self, shapes, layouts, sizes, at=None, chunk: int = 1):
        at = at or list(itertools.product(*map(range, sizes)))
        place = assign_owners(shapes, len(at), chunk)
        self.shapes, self.ranks, self.owner = shapes, range(len(at)), [owner for _, owner in place]
        self.order = sorted(range(len(shapes)), key=place.__getitem__)
        self.chunks = [list(g) for _, g in itertools.groupby(self.order, lambda i: place[i][0])]

        @functools.cache                                 # hundreds of matrices are of few kinds
        def boxes(shape, layout):
            parts = [local_slices(shape, sizes, layout, a) for a in at]
            return parts, [math.prod(s.stop - s.start for s in box) for box in parts]
        self.parts, counts = zip(*map(boxes, shapes, layouts))
        at, cut = torch.tensor(at), torch.tensor([[d is not None for d in x] for x in layouts])
        own = (cut[:, None] | (at[self.owner][:, None] == at)).all(2)    # of the owner's replica
        self.copies = torch.where(cut, 1, torch.tensor(sizes)).prod(1)
        # [i][r]: elements of matrix i's u that its owner gets from rank r, and of O that r gets
        self.there, self.back = (own * torch.tensor(counts)).tolist(), counts

    def flows(self, chunk) -> Tensor:
        """(2, ranks, ranks): elements that each sends to each, of u to the owners and of O back."""
        flows = torch.zeros(2, *2 * [len(self.ranks)], dtype=torch.int64)
        for i in chunk:
            flows[0, :, self.owner[i]] += torch.tensor(self.there[i])
            flows[1, self.owner[i]] += torch.tensor(self.back[i])
        return flows

    def traffic(self) -> Tensor:
        """(2, ranks): elements that each sends to and receives from the others in a step."""
        flow = self.flows(self.order).sum(0).fill_diagonal_(0)
        return torch.stack([flow.sum(1), flow.sum(0)])

    def peak(self) -> Tensor:
        """(ranks,): most elements of u and O that each holds, Newton-Schulz's own aside: when a
        chunk's matrices are assembled, when the next one's shards leave, or when its results do."""
        flows, held = map(self.flows, [[], [], *self.chunks, []]), []
        sums = [torch.cat([f.sum(2), f.sum(1)]) for f in flows]
        # sent there and back, received there (an owner's results are as many) and back
        for (_, b0, _, o0), (_, b, u, o), (t2, _, u2, o2) in zip(sums, sums[1:], sums[2:]):
            held += b0 + o0 + 2 * u, b0 + o0 + u + o2 + t2 + u2, u + b + o + t2 + u2
        return torch.stack(held).amax(0)

    def exchange(self, k: int, way: int, pieces) -> tuple[dist.Work, Tensor]:
        """Begin one of chunk k's two all-to-alls -> the handle to wait on, which keeps alive what
        it sends, and what it fills."""
        sends, receives = self.splits[k][way]
        sent = torch.cat([self.empty, *pieces])
        received = sent.new_empty(sum(receives))
        return dist.all_to_all_single(received, sent, receives, sends, group=self.group,
                                      async_op=True), received

    def send(self, k: int, updates):
        """Begin to send chunk k's shards, the next ones of updates, to their owners."""
        shards = list(itertools.islice(updates, len(self.chunks[k])))
        return self.exchange(k, 0, [u.flatten() for i, u in zip(self.chunks[k], shards)
                                    if self.there[i][self.me]])

    def wholes(self, k: int, work, received) -> dict[int, Tensor]:
        """Wait for them -> the matrices that this rank owns."""
        work.wait()
        wholes = {i: received.new_empty(self.shapes[i]) for i in self.chunks[k]
                  if self.owner[i] == self.me}
        boxes = [whole[self.parts[i][r]] for r in self.ranks for i, whole in wholes.items()
                 if self.there[i][r]]
        for box, piece in zip(boxes, received.split([box.numel() for box in boxes])):
            box.copy_(piece.view_as(box))
        return wholes

    def send_back(self, k: int, results):
        """Begin to send each rank its shards of the results of the matrices that this one owns."""
        return self.exchange(k, 1, [O[self.parts[i][r]].flatten() for r in self.ranks
                                    for i, O in results.items()])

    def arrived(self, k: int, work, received):
        """Wait for this rank's shards of chunk k's results."""
        work.wait()
        return received.split([self.back[i][self.me] for i in self.chunks[k]])


def build_shard_group(mesh, params, chunk: int, dtype: torch.dtype) -> MuonShardGroup:
    """The unit of the DTensors on a mesh, ready to exchange, of those replicas (by the mesh's first
    dimension) that share the work with this rank's. All ranks of the mesh make theirs."""
    shapes, layouts = [p.shape for p in params], [shard_dims(p) for p in params]
    n = mesh.shape[0]
    if all(layout[0] is None for layout in layouts):
        n = replicas_per_muon_group(shapes, mesh.size(), n)
    first, sizes = mesh.get_coordinate()[0] // n * n, (n, *mesh.shape[1:])
    at = dict(zip(mesh.mesh[first:first + n].flatten().tolist(),
                  itertools.product(*map(range, sizes))))
    ranks = sorted(at)
    unit = MuonShardGroup(shapes, layouts, sizes, [at[r] for r in ranks], chunk)
    unit.group = (dist.group.WORLD if len(ranks) == dist.get_world_size() else
                  dist.new_group(ranks, use_local_synchronization=True))
    unit.me, unit.params = ranks.index(dist.get_rank()), [params[i] for i in unit.order]
    unit.splits = [[(flow[unit.me].tolist(), flow[:, unit.me].tolist())
                    for flow in unit.flows(chunk)] for chunk in unit.chunks]
    unit.copies = unit.copies[unit.order].to(params[0].device)
    unit.empty = unit.copies.new_empty(0, dtype=dtype)   # of the wire
    return unit


class MuonClip(torch.optim.Optimizer):
    """MuonClip(muon_params, adamw_params, lr=...): who gets which rule is said by the two lists and
    by nothing else. AdamW decays embeddings and head, and no vector or scalar.

    muon_params: matrices (m, n), or stacks (..., m, n) orthogonalised slice by slice.
    qk: [(q_weight, k_weight), ...] of the layers, with kv_map and head_dim as in qk_clip; step()
    then takes max_logits (layers, heads) and clips after the update; `clipped` counts the heads, as
    a tensor. steps, coefficients, dtype: of newton_schulz. State is made here, so that a checkpoint
    can be read into it at once, and of this rank's part where FSDP2 shards a parameter. Muon keeps
    the sum form of the momentum, and its weight decay takes the learning rate unscaled.
    update_rms[p]: RMS of a matrix's last update, over lr, as a tensor. ValueError for a vector
    among muon_params, and for half precision: a bf16 weight swallows any update below its 512th
    part.

    Over many ranks, for DTensors placed by Shard and Replicate, all ranks of a mesh step together,
    with the same skip, and Muon's step equals one process's bit by bit. chunk: of the largest
    matrices, how many an owner does between two exchanges. A sharded matrix without a gradient has
    gradient 0, as other ranks may have theirs. The maximum of max_logits over the mesh is taken
    here. A plain tensor is one process's own business: its gradient, and max_logits if queries and
    keys are plain, are for the caller to reduce."""

    def __init__(self, muon_params, adamw_params, *, lr: float, momentum: float = 0.95,
                 nesterov: bool = True, weight_decay: float = 0.1, betas=(0.9, 0.95),
                 eps: float = 1e-8, steps: int = 5, coefficients: str = "motif",
                 dtype: torch.dtype = torch.bfloat16, qk=(), kv_map=None,
                 head_dim: int | None = None, tau: float = 100.0, chunk: int = 1):
        muon, rest = list(muon_params), list(adamw_params)
        if any(p.ndim < 2 for p in muon):
            raise ValueError("Muon takes matrices; give vectors and scalars to adamw_params")
        if any(not p.is_contiguous() for p in muon):
            raise ValueError("MuonClip takes contiguous matrices; call contiguous() on them first")
        if any(p.dtype not in (torch.float32, torch.float64) for p in muon + rest):
            raise ValueError("MuonClip trains fp32 weights; call model.float() first")
        adam = dict(kind="adamw", betas=betas, eps=eps, fused=True)  # `step` is on the device
        groups = [
            dict(kind="muon", params=muon, momentum=momentum, nesterov=nesterov,
                 weight_decay=weight_decay),
            dict(adam, params=[p for p in rest if p.ndim > 1], weight_decay=weight_decay),
            dict(adam, params=[p for p in rest if p.ndim < 2], weight_decay=0.0)]
        super().__init__([g for g in groups if g["params"]], dict(lr=lr))
        self.newton_schulz = dict(steps=steps, coefficients=coefficients, dtype=dtype)
        self.qk, self.head_dim, self.tau = list(qk), head_dim, tau
        self.clipped: Tensor | None = None
        self.update_rms: dict[Tensor, Tensor] = {}
        if self.qk:
            self.kv_map = torch.as_tensor(kv_map, device=self.qk[0][0].device)
        self.unit_of: dict[Tensor, MuonShardGroup] = {}            # of the matrices that others share
        spread = [p for p in muon if hasattr(p, "placements") and p.device_mesh.size() > 1]
        for mesh in dict.fromkeys(p.device_mesh for p in spread):
            unit = build_shard_group(mesh, [p for p in spread if p.device_mesh == mesh], chunk, dtype)
            self.unit_of.update(dict.fromkeys(unit.params, unit))
        for p in muon:
            self.state[p] = {"momentum": torch.zeros_like(local_shard(p))}
        for p in rest:
            self.state[p] = {"step": torch.zeros((), device=p.device),
                             "exp_avg": torch.zeros_like(local_shard(p)),
                             "exp_avg_sq": torch.zeros_like(local_shard(p))}

    @torch.no_grad()
    def step(self, closure=None, *, max_logits: Tensor | None = None, skip: Tensor | None = None):
        """One update from the gradients; parameters without one are left alone. Where skip, a 0-dim
        bool tensor, is true nothing changes, whatever gradients and logits hold: they become 0,
        Muon's momentum 1 and its learning rate 0, and AdamW has skip as its found_inf, so that the
        host need not know."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if skip is not None and max_logits is not None:
            max_logits = max_logits.masked_fill(skip, 0)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None or p in self.unit_of]
            if params:
                (self._muon if group["kind"] == "muon" else self._adamw)(group, params, skip)
        if self.qk and self.tau and max_logits is not None:
            mesh = getattr(self.qk[0][0], "device_mesh", None)
            if mesh is not None and mesh.size() > 1:
                max_logits = torch.where(max_logits < torch.inf, max_logits, torch.inf)  # no NaN,
                for group in mesh.get_all_groups():      # which max may lose
                    dist.all_reduce(max_logits, dist.ReduceOp.MAX, group)
            gammas = [qk_clip(q, k, S, self.kv_map, self.head_dim, self.tau)
                      for (q, k), S in zip(self.qk, max_logits, strict=True)]
            self.clipped = (torch.stack(gammas) < 1).sum()
        return loss

    def _muon(self, group, params, skip) -> None:
        device = params[0].device
        lr, mu = (torch.full((), group[key], device=device) for key in ("lr", "momentum"))
        if skip is not None:
            lr, mu = lr.masked_fill(skip, 0), mu.masked_fill(skip, 1)
        decay = 1 - lr * group["weight_decay"]
        alone = sorted((p for p in params if p not in self.unit_of), key=lambda p: p.shape)
        for unit in None, *dict.fromkeys(self.unit_of.values()):
            params = alone if unit is None else unit.params
            updates = (self._momentum(group, p, mu, skip) for p in params)
            results = self._orthogonalize(updates, unit)
            rms = [self._update(p, next(results), lr, decay) for p in params]   # keeps no result
            if unit is not None:                         # each rank has its shards' part of it
                rms = torch.stack(rms).square_().div_(unit.copies)
                dist.all_reduce(rms, group=unit.group)
                rms.sqrt_()
            self.update_rms.update(zip(params, rms))

    def _momentum(self, group, p, mu, skip) -> Tensor:
        """Adds the gradient to the momentum -> u, from which the update is made, in the dtype that
        it is orthogonalized in."""
        M = self.state[p]["momentum"]
        if p in self.unit_of and p.grad is not None and p.grad.placements != p.placements:
            raise ValueError(f"a gradient is placed by {p.grad.placements}, its parameter by "
                             f"{p.placements}; redistribute the gradient first")
        G = torch.zeros_like(M) if p.grad is None else local_shard(p.grad).contiguous()
        u = add_to_momentum(M, G, mu, skip, group["nesterov"], self.newton_schulz["dtype"])
        return u.view(M.shape)

    def _update(self, p, O, lr, decay) -> Tensor:
        """Applies a result -> what this rank's part of it adds to the RMS of the update over lr."""
        scale = 0.2 * max(p.shape[-2:]) ** 0.5           # gives O the RMS of AdamW's update
        norms = apply_update(local_shard(p), O, decay, lr * scale)
        return torch.linalg.vector_norm(norms) * (scale / p.numel() ** 0.5)

    def _orthogonalize(self, updates, unit):
        """Newton-Schulz of each update as it comes -> this rank's part of each result, in order.
        One process does whole matrices, small ones of a shape, which come in a row, at once: on a
        GPU their launches are most of the time. Over many ranks, chunk by chunk, two all-to-alls:
        shards of u to the owners, who do whole matrices too, and of O back. They run beside the
        arithmetic: the next chunk's shards leave before this one's Newton-Schulz, and this one's
        results go home during the next one's. What has been waited for is not kept."""
        if unit is None:
            for shape, run in itertools.groupby(updates, lambda u: u.shape):
                while stack := [*itertools.islice(run, max(1, STACK // max(1, shape.numel())))]:
                    us = torch.stack(stack) if len(stack) > 1 else stack[0][None]
                    yield from newton_schulz(us, **self.newton_schulz)
            return
        there, back = [unit.send(0, updates)], []
        for k in range(len(unit.chunks)):
            wholes = unit.wholes(k, *there.pop())
            if k + 1 < len(unit.chunks):
                there.append(unit.send(k + 1, updates))
            results = {i: newton_schulz(wholes.pop(i), **self.newton_schulz) for i in [*wholes]}
            if back:
                yield from unit.arrived(k - 1, *back.pop())
            back.append(unit.send_back(k, results))
            del results
        yield from unit.arrived(k, *back.pop())

    def _adamw(self, group, params, skip) -> None:
        states, (beta1, beta2) = [self.state[p] for p in params], group["betas"]
        adamw([local_shard(p) for p in params], [local_shard(p.grad) for p in params],
              [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [],
              [s["step"] for s in states], fused=group["fused"], amsgrad=False, maximize=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], found_inf=None if skip is None else skip.float())


def configure_optimizer(model, *, lr: float, optimizer: str = "muonclip", **options) -> MuonClip:
    """MuonClip of a model.Motif: its matrices to Muon, all else to AdamW, QK-clip on every layer.
    optimizer="adamw", to compare: everything to AdamW and no QK-clip. options: MuonClip's.
    ValueError for another optimizer."""
    if optimizer not in ("muonclip", "adamw"):
        raise ValueError(f"optimizer must be 'muonclip' or 'adamw', not {optimizer!r}")
    if optimizer == "adamw":
        return MuonClip([], model.parameters(), lr=lr, **options)
    matrices = set(model.matrices().values())
    layers = [block.self_attn for block in model.model.layers]
    return MuonClip(model.matrices().values(), [p for p in model.parameters() if p not in matrices],
                    lr=lr, qk=[(layer.q_proj.weight, layer.k_proj.weight) for layer in layers],
                    kv_map=model.config.kv_map, head_dim=model.config.head_dim, **options)


def describe_routing(model, optimizer: MuonClip) -> str:
    """A line for each group of the optimizer: its rule, and who is in it, layers run together."""
    places = r"^model\.|layers\.\d+\.|self_attn\.|mlp\.|\.weight$"
    names, lines = {p: re.sub(places, "", name) for name, p in model.named_parameters()}, []
    for group in optimizer.param_groups:
        params = group["params"]
        lines.append(f"{group['kind']}, weight decay {group['weight_decay']}: "
                     f"{sum(p.numel() for p in params):,d} in {len(params)} tensors: "
                     + ", ".join(dict.fromkeys(names[p] for p in params)))
    return "\n".join(lines)
