"""MuonClip: Muon for the matrices, AdamW for everything else, QK-clip for the attention logits.

One step of Muon on a matrix, from its gradient:

    momentum = mu * momentum + gradient
    u        = gradient + mu * momentum                                  (Nesterov)
    O        = newton_schulz(u)                                          (u made orthogonal)
    weight   = weight - lr * (0.2 sqrt(max(m, n)) * O + weight_decay * weight)

The first half is for everybody. The second half is Parallel Muon, which takes the same step on many
GPUs, where FSDP2 has cut the matrices into shards, bit-identical to one process.

Sources: Muon (Keller Jordan, kellerjordan.github.io/posts/muon), Moonlight (arXiv 2502.16982) for
the factor 0.2 sqrt(max(m, n)), Kimi K2 (2507.20534) for QK-clip, Motif-2 (2511.07464) for Parallel
Muon. Letters in this file: G is the matrix to be made orthogonal (a gradient, or u), m x n its
shape, O the result, E how many matrices are stacked; X, A, B and Q are the matrices of
Newton-Schulz; H query heads, K key heads, D head_dim.

`python -m tools.bench_muon` times all of this, and plans Parallel Muon for any number of GPUs.
"""
import functools
import itertools
import math
import re
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

import kernels

# ---- Why orthogonalise, and how
#
# The problem. A gradient G (m x n) has a few large singular values and many small ones: as a map it
# acts mostly along a handful of directions. Stepping along G, or along its momentum, moves the
# weight far in those and hardly at all in the others, although the rare directions may hold what is
# left to learn. (Adam rescales each entry of G by itself, and so does not see directions at all.)
#
# The idea. Write G = U diag(s) V^T, its singular value decomposition, and replace every s by 1:
# O = U V^T is the semi-orthogonal matrix nearest to G, and moves the weight equally far in every
# direction that G has. It is also steepest descent under the spectral norm: among all steps dW with
# |dW x| <= |x| for every x, -O lowers the loss most, to first order.
#
# Newton-Schulz. An SVD is slow on a GPU; matrix products are fast. Start with X = G / |G|_F, whose
# singular values are at most 1. With A = X X^T, one step is
#
#     X  <-  (a I + b A + c A A) X   =   U diag(a s + b s^3 + c s^5) V^T
#
# It leaves U and V alone and sends every singular value s to a polynomial of s. So choose
# polynomials that, one after the other, bring every s of (0, 1] near 1, and never compute a
# singular value at all. The values need not be exactly 1: Keller Jordan's polynomial leaves them
# between 0.7 and 1.2, and trains as well.
#
# What it costs. If m <= n, X X^T and the last product take 2 m^2 n FLOPs each, and A A takes 2 m^3.
# Five steps on the 280 matrices of the 12.7B model take 1.0e15 FLOPs, as many as training it on
# 13,000 tokens; one optimizer step trains on millions of tokens.

# (a, b, c) of the five polynomials. "Error" is |O O^T - I|_F / sqrt(m) of a Gaussian 512 x 2048
# matrix.
COEFFICIENTS = {
    # Keller Jordan's: one polynomial five times, steep at 0, which never settles. Error 0.27.
    "quintic": 5 * [(3.4445, -4.7750, 2.0315)],
    # Motif's public optimizer: steep first, careful last. Error 0.03.
    "motif": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012)],
    # Polar Express (arXiv 2505.16932): the smallest worst error over all s. This error 0.19.
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]}

# The start X is divided by this too. The first polynomial of polar_express is made for s <= 1 and
# climbs steeply there: s = 1.03, left by a norm that was rounded down, would go to 2.24, 5.7, 2575
# and on. Dividing by 1.02 keeps s away from that edge. The other tables tolerate s just above 1.
START_MARGIN = {"quintic": 1.0, "motif": 1.0, "polar_express": 1.02}


def plain_newton_schulz(G: Tensor, steps: int = 5, coefficients: str = "motif") -> Tensor:
    """The definition: G (m, n) -> O (m, n), near U V^T. newton_schulz below is the same, faster.

    What the five polynomials do to four singular values, a line for each step: the first three
    make small values grow, and throw large ones about; the last two settle all.

    >>> s = torch.tensor([0.01, 0.1, 0.5, 1.0])
    >>> for a, b, c in COEFFICIENTS["motif"]:
    ...     s = a * s + b * s**3 + c * s**5
    ...     print("  ".join(f"{x:.3f}" for x in s.tolist()))
    0.041  0.402  1.272  0.117
    0.161  1.206  0.837  0.453
    0.579  0.582  0.800  1.219
    1.134  1.135  1.087  1.057
    1.018  1.019  0.986  0.978

    The same on a matrix: one direction is 10 times as strong as the other, then both are alike.

    >>> O = plain_newton_schulz(torch.tensor([[10.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> [[round(x, 2) for x in row] for row in O.tolist()]
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.02]]
    """
    X = G / (START_MARGIN[coefficients] * G.norm())
    for a, b, c in COEFFICIENTS[coefficients][:steps]:
        A = X @ X.mT                # (m, m)
        B = b * A + c * A @ A       # (m, m)
        X = a * X + B @ X           # (m, n)
    return X


# ---- Newton-Schulz, fast
#
# Precision. u is cast to bf16 first, since Parallel Muon sends bf16; one process does it too, to
# get the same bits. On a GPU the iteration itself runs in fp16. Tensor cores multiply both at the
# same speed, and fp16 has 3 more bits of mantissa; bf16 has the larger range, which is not needed,
# since we know how large X is.
#
# Scale. We also know how small X is. |X|_F = 1 means that its entries are about 1 / sqrt(m n),
# which is 1.2e-4 for 4096 x 16384, and below 6.1e-5 fp16 loses bits (subnormal numbers). So we
# keep SCALE X instead of X. A power of two changes no bit of the mantissa. 64 is the largest that
# is safe: plain_steps holds SCALE^2 A, whose entries reach 64^2 * 1.99^2 = 16,000 with
# polar_express, whose s reaches 1.99; 128 would reach 65,000, and fp16 ends at 65,504. (gram_steps
# holds only SCALE A.)
#
# Symmetry. In each step all products but the last are symmetric matrices, so half of each need not
# be computed. kernels.symmetric_matmul does that where the matrices are large enough to pay.

SCALE = 64.0


def newton_schulz(G: Tensor, steps: int = 5, coefficients: str = "motif",
                  dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Compute plain_newton_schulz of each matrix in G (..., m, n), cast to `dtype` first -> O
    (..., m, n) in `dtype`. 1e30 G and 1e-30 G give the same O; 0 gives 0."""
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"newton_schulz knows the coefficients {', '.join(COEFFICIENTS)}, "
                         f"not {coefficients!r}")
    if not 1 <= steps <= 5:
        raise ValueError(f"newton_schulz takes 1 to 5 steps, not {steps}")

    m, n = G.shape[-2:]
    matrices = G.to(dtype).contiguous().view(-1, m, n)
    O = torch.empty_like(matrices)
    X = normalize(matrices, START_MARGIN[coefficients])

    # A = X X^T is to be the small square, so a tall matrix is iterated transposed.
    tall = m > n
    if tall:
        X = X.mT

    table = COEFFICIENTS[coefficients][:steps]
    if symmetric_products_pay(X):
        # A nearly square X is about as small as A, so working on A alone would save nothing.
        wide = X.shape[2] >= 1.2 * X.shape[1]
        X = gram_steps(X, table, span=3 if wide else 1)
    else:
        X = plain_steps(X, table)

    torch.div(X, SCALE, out=O.mT if tall else O)
    return O.view(G.shape)


def normalize(matrices: Tensor, margin: float) -> Tensor:
    """Scale each matrix of (E, m, n) to the Frobenius norm SCALE / margin -> (E, m, n), in fp16 for
    bf16 on a GPU, else in its own dtype.

    Each is first divided by its largest entry: the square of 1e30 overflows fp32, and the square of
    1e-30 is 0."""
    flat = matrices.flatten(1)
    if flat.is_cuda and flat.dtype == torch.bfloat16:
        working_dtype = torch.float16
        largest = torch.linalg.vector_norm(flat, torch.inf, 1, keepdim=True, dtype=torch.float32)
    else:
        working_dtype = flat.dtype
        largest = flat.abs().amax(1, keepdim=True)      # vector_norm is slow on a CPU

    largest.clamp_(torch.finfo(flat.dtype).tiny)
    X = torch.empty_like(flat, dtype=working_dtype)
    torch.div(flat, largest, out=X)

    # The largest entry is now 1, so the norm is at least 1, unless the matrix is 0.
    norm = torch.linalg.vector_norm(X, dim=1, keepdim=True).clamp_(1)
    X /= norm.mul_(margin / SCALE)
    return X.view(matrices.shape)


def plain_steps(X: Tensor, table: list) -> Tensor:
    """Run Newton-Schulz on SCALE X (E, m, n) in three calls a step, since for small matrices the
    calls are what takes the time."""
    for a, b, c in table:
        A = torch.bmm(X, X.mT)                                              # SCALE^2 A
        B = torch.baddbmm(A, A, A, beta=b / SCALE**2, alpha=c / SCALE**4)   # B
        X = torch.baddbmm(X, B, X, beta=a)                                  # SCALE X
    return X


def gram_steps(X: Tensor, table: list, span: int) -> Tensor:
    """Run Newton-Schulz on SCALE X (E, m, n), `span` steps at a time on A = X X^T alone, which is
    small if X is wide (Gram Newton-Schulz; Dao-AILab, 2026).

    One step turns X into Z X, where Z = a I + B and B = b A + c A A as above. So it turns A into
    Z A Z. Multiply Q = Z_3 Z_2 Z_1 together on (m, m) matrices, and touch the wide X once, X = Q X.
    A, Z and Q are all symmetric, since they are polynomials in one matrix.

    After `span` steps A is computed from X again. Rounding makes eigenvalues of A that should be 0
    a little negative. The exact X X^T has no negative ones, and the polynomials make them grow, by
    about a^2 = 16 in each step. In fp16 they stay harmless for three steps, in bf16 for two."""
    # symmetric(X, Y, alpha, addend, beta) is alpha X Y^T + beta addend.
    symmetric = kernels.symmetric_matmul
    for first in range(0, len(table), span):
        steps = table[first:first + span]
        A = symmetric(X, X, 1 / SCALE)              # A, B and Q are kept times SCALE too
        for i, (a, b, c) in enumerate(steps):
            B = symmetric(A, A, c / SCALE, A, b)

            # The next step's A = Z A Z. The last step needs none.
            if i + 1 < len(steps):
                ZA = symmetric(B, A, 1 / SCALE, A, a)
                A = symmetric(ZA, B, 1 / SCALE, ZA, a)

            # Q = Z Q, and at first Q = Z. B is not read again, so Z may overwrite it.
            if i == 0:
                Q = B
                Q.diagonal(dim1=1, dim2=2).add_(a * SCALE)
            else:
                Q = symmetric(Q, B, 1 / SCALE, Q, a)

        X = torch.baddbmm(X, Q, X, beta=0, alpha=1 / SCALE, out=torch.empty_like(X))
    return X


def symmetric_products_pay(X: Tensor) -> bool:
    """Whether it is faster for X (E, m, n) to compute only half of each symmetric product. Too few
    tiles do not fill a GPU; then cuBLAS, which computes all, is faster."""
    tile_rows = math.ceil(X.shape[1] / kernels.TILE)
    tiles = len(X) * tile_rows * (tile_rows + 1) // 2
    return tiles >= kernels.SYMMETRIC_TILES and kernels.can_use_symmetric_matmul(X)


# ---- The update
#
# On a GPU torch.compile fuses each of the two functions here into one pass over memory.

compiled = functools.cache(torch.compile)


def compile_rowwise(function):
    """Decorator: view the first two tensors, which have the same size, as (rows, 1024) if 1024
    divides it, and compile the function on a GPU. Then only the number of rows differs from matrix
    to matrix, so that one compiled kernel serves all, and can move 16 bytes at a time."""
    def call(first, second, *args):
        width = math.gcd(first.numel(), 1024)
        first = first.view(-1, width)
        second = second.view(-1, width)
        if first.is_cuda and kernels.use_triton(first):
            return compiled(function)(first, second, *args)
        return function(first, second, *args)
    return call


@compile_rowwise
def add_to_momentum(momentum: Tensor, G: Tensor, mu: Tensor, skip: Tensor | None, nesterov: bool,
                    dtype: torch.dtype) -> Tensor:
    """momentum = mu * momentum + G, in place -> u in dtype, which is G + mu * momentum with
    Nesterov, else the momentum. If `skip` is true (see MuonClip.step), G counts as 0."""
    if skip is not None:
        G = G.masked_fill(skip, 0)
    torch.addcmul(G, momentum, mu, out=momentum)
    if nesterov:
        return torch.addcmul(G, momentum, mu).to(dtype)
    return momentum.to(dtype)


@compile_rowwise
def apply_update(weight: Tensor, O: Tensor, decay: Tensor, rate: Tensor) -> Tensor:
    """weight = decay * weight - rate * O, in place -> the norms of the rows that compile_rowwise
    made of O; only their total is used."""
    weight.mul_(decay).addcmul_(O, rate, value=-1)
    return torch.linalg.vector_norm(O, dim=1, dtype=weight.dtype)


def update_scale(shape) -> float:
    """Return 0.2 sqrt(max(m, n)), which makes O as large as AdamW's update, so that both share one
    learning rate and one weight decay (Moonlight, arXiv 2502.16982, section 2.2).

    If m <= n, O has m orthonormal rows, so |O|_F^2 = m, and the root mean square (RMS) of its m n
    entries is sqrt(m / (m n)) = 1 / sqrt(max(m, n)). The RMS of AdamW's update is usually 0.2 to
    0.4, so O is multiplied by 0.2 sqrt(max(m, n)).

    >>> O = torch.eye(4, 16)
    >>> round(O.square().mean().sqrt().item(), 3), update_scale(O.shape)
    (0.25, 0.8)
    """
    return 0.2 * max(shape[-2:]) ** 0.5


# ---- QK-clip
#
# The problem. A logit q . k contains two projections, so it can grow as fast as the product of the
# spectral norms of W_q and W_k. All singular values of Muon's update are equal, so, more than with
# AdamW, the largest directions of a weight keep growing. In a large model the logits of some heads
# pass 1000, their softmax becomes one-hot, and the loss spikes (Kimi K2, arXiv 2507.20534, section
# 2.1).
#
# The idea. Let S_h be the largest logit of head h in this step's own forward pass. After the update
# multiply the weights of q and k so that a logit of S_h > tau would become tau, and leave other
# heads alone:
#
#     gamma_h = min(1, tau / S_h)         the factor that head h's logits are to get
#
# If each head has a key of its own, q and k each get sqrt(gamma_h). But here heads share keys: in
# the 12.7B model 40 query heads read 16 key heads, and the 4 signal heads of a group share one. A
# head below tau must not change because its neighbour is above. So
#
#     s_j = sqrt(min of gamma_h over the heads h that read key head j)        the factor of key j
#     gamma_h / s_j                                                           the factor of query h
#
# and every head's logits get exactly gamma_h. Without sharing, these are Kimi K2's factors.

@torch.no_grad()
def qk_clip(q_weight: Tensor, k_weight: Tensor, max_logits: Tensor, kv_map, head_dim: int,
            tau: float) -> Tensor:
    """Scale the rows of q_weight (H D, hidden) and k_weight (K D, hidden) in place, to bring the
    measured maxima of the logits down to tau -> gamma (H,).

    max_logits (H,): S, the largest, not the largest in magnitude, measured before the update.
    kv_map (H,): the key head that each query head reads. A shard may end within a head.

    Two heads share a key. The first is at 200 and must come down to 100. The second is at 50 and
    must stay, so its q has to grow by what the key has lost:

    >>> q, k = torch.ones(2, 1), torch.ones(1, 1)
    >>> qk_clip(q, k, torch.tensor([200.0, 50.0]), kv_map=[0, 0], head_dim=1, tau=100.0)
    tensor([0.5000, 1.0000])
    >>> q.flatten(), k.flatten()
    (tensor([0.7071, 1.4142]), tensor([0.7071]))
    >>> torch.tensor([200.0, 50.0]) * (q * k).flatten()
    tensor([100.0000,  50.0000])

    Nothing waits for the GPU. If a logit is not finite, RuntimeError is raised, on a GPU only when
    the host next synchronises."""
    finite = (max_logits < torch.inf).all()             # false for NaN too
    torch._assert_async(finite, "QK-clip: an attention logit is not finite")
    kv_map = torch.as_tensor(kv_map, device=max_logits.device)
    num_key_heads = len(k_weight) // head_dim

    gamma = torch.where(max_logits > tau, tau / max_logits, 1)                      # (H,)
    strictest = gamma.new_ones(num_key_heads).scatter_reduce(0, kv_map, gamma, "amin")
    key_factor = strictest.sqrt()                                                   # (K,)
    query_factor = gamma / key_factor[kv_map]                                       # (H,)

    scale_rows(q_weight, query_factor.repeat_interleave(head_dim))
    scale_rows(k_weight, key_factor.repeat_interleave(head_dim))
    return gamma


def scale_rows(weight: Tensor, factors: Tensor) -> None:
    """Multiply row i of weight (rows, columns) by factors[i], in place; each rank of a sharded
    weight scales the rows that it holds."""
    if hasattr(weight, "placements"):
        mesh = weight.device_mesh
        box = local_slices(weight.shape, mesh.shape, shard_dims(weight), mesh.get_coordinate())
        factors = factors[box[0]]
    local_shard(weight).mul_(factors[:, None])


# ---- The optimizer

# Small matrices of the same shape are orthogonalised together, up to this many numbers (64 MB in
# bf16). On a GPU most of the time would otherwise go into launching kernels.
MAX_BATCHED_NUMEL = 2**25


def batches_of_one_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """Split params into lists of one shape each, of at most MAX_BATCHED_NUMEL numbers (or one
    larger matrix)."""
    by_shape = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)

    batches = []
    for shape, same in by_shape.items():
        size = max(1, MAX_BATCHED_NUMEL // max(1, shape.numel()))
        for first in range(0, len(same), size):
            batches.append(same[first:first + size])
    return batches


class StepScalars(NamedTuple):
    """What all matrices share in one step, on the device, where `skip` can change it."""
    lr: Tensor
    mu: Tensor
    decay: Tensor               # 1 - lr * weight_decay
    nesterov: bool
    skip: Tensor | None


class MuonClip(torch.optim.Optimizer):
    """Muon trains muon_params, AdamW trains adamw_params.

    muon_params: matrices (m, n), or stacks (..., m, n), of which each matrix is treated by itself.
    adamw_params: anything. Vectors and scalars get no weight decay.
    qk: [(q_weight, k_weight), ...], a pair for each layer, for QK-clip; kv_map, head_dim and tau as
        in qk_clip. tau = 0 switches it off.
    steps, coefficients, dtype: as in newton_schulz. chunk: as in assign_owners.

    The momentum is a sum (mu * momentum + G) and not a mean, as its scale does not matter to
    Newton-Schulz. Weight decay uses lr, not lr * 0.2 sqrt(max(m, n)). Weights must be fp32, since
    bf16 rounds away any update below 1/512 of the weight.

    On many ranks all ranks of a mesh call step() together, with the same `skip`. Parameters that
    are not DTensors belong to each process, and the caller reduces their gradients.

    After a step, update_rms[p] is the RMS of a matrix's last update divided by lr, and
    heads_clipped how many heads QK-clip scaled. Only reading these tensors waits for the device."""

    def __init__(self, muon_params, adamw_params, *, lr: float, momentum: float = 0.95,
                 nesterov: bool = True, weight_decay: float = 0.1, betas=(0.9, 0.95),
                 eps: float = 1e-8, steps: int = 5, coefficients: str = "motif",
                 dtype: torch.dtype = torch.bfloat16, qk=(), kv_map=None,
                 head_dim: int | None = None, tau: float = 100.0, chunk: int = 1):
        matrices = list(muon_params)
        others = list(adamw_params)
        check_params(matrices, others)

        muon = dict(kind="muon", momentum=momentum, nesterov=nesterov)
        adam = dict(kind="adamw", betas=betas, eps=eps, fused=True)
        groups = [
            dict(muon, params=matrices, weight_decay=weight_decay),
            dict(adam, params=[p for p in others if p.ndim > 1], weight_decay=weight_decay),
            dict(adam, params=[p for p in others if p.ndim < 2], weight_decay=0.0)]
        super().__init__([group for group in groups if group["params"]], dict(lr=lr))

        self.ns_options = dict(steps=steps, coefficients=coefficients, dtype=dtype)
        self.qk = list(qk)
        self.head_dim = head_dim
        self.tau = tau
        if self.qk:
            self.kv_map = torch.as_tensor(kv_map, device=self.qk[0][0].device)
        self.heads_clipped: Tensor | None = None
        self.update_rms: dict[Tensor, Tensor] = {}
        self.shard_groups = build_shard_groups(matrices, chunk, dtype)

        # The state is made now, so that a checkpoint can be read into it before the first step.
        for p in matrices:
            self.state[p] = {"momentum": torch.zeros_like(local_shard(p))}
        for p in others:
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(local_shard(p)),
                "exp_avg_sq": torch.zeros_like(local_shard(p))}

    @torch.no_grad()
    def step(self, closure=None, *, max_logits: Tensor | None = None, skip: Tensor | None = None):
        """Update all parameters that have a gradient.

        max_logits (layers, H): the largest logit of each head, for QK-clip; the maximum over ranks
        is taken here.
        skip (0-dim bool tensor): if true, nothing changes, whatever gradients and logits hold (NaN,
        say). The device decides, without a host sync: gradients count as 0, mu as 1, lr as 0, and
        AdamW takes skip as found_inf, its flag for an overflow under loss scaling."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon_step(group, skip)
            else:
                self._adamw_step(group, skip)

        if max_logits is not None and self.qk and self.tau:
            if skip is not None:
                max_logits = max_logits.masked_fill(skip, 0)
            self._qk_clip_step(max_logits)
        return loss

    def _muon_step(self, group: dict, skip: Tensor | None) -> None:
        now = self._step_scalars(group, skip)
        whole = [p for p in group["params"] if p.grad is not None and not is_spread(p)]

        for params in batches_of_one_shape(whole):
            updates = [self.add_gradient(p, now) for p in params]
            # One matrix, which may be large, is not copied.
            stacked = torch.stack(updates) if len(updates) > 1 else updates[0][None]
            results = newton_schulz(stacked, **self.ns_options)
            for p, O in zip(params, results):
                self.update_rms[p] = self.apply_result(p, O, now)

        # The matrices that lie in shards on many ranks: second half.
        for shard_group in self.shard_groups:
            parallel_muon_step(self, shard_group, now)

    def _step_scalars(self, group: dict, skip: Tensor | None) -> StepScalars:
        device = group["params"][0].device
        lr = torch.full((), group["lr"], device=device)
        mu = torch.full((), group["momentum"], device=device)
        if skip is not None:
            lr = lr.masked_fill(skip, 0)
            mu = mu.masked_fill(skip, 1)
        decay = 1 - lr * group["weight_decay"]
        return StepScalars(lr, mu, decay, group["nesterov"], skip)

    def add_gradient(self, p: Tensor, now: StepScalars) -> Tensor:
        """Add p's gradient to its momentum -> u, in the dtype that Newton-Schulz gets."""
        momentum = self.state[p]["momentum"]
        G = local_gradient(p)
        u = add_to_momentum(momentum, G, now.mu, now.skip, now.nesterov, self.ns_options["dtype"])
        return u.view(momentum.shape)

    def apply_result(self, p: Tensor, O: Tensor, now: StepScalars) -> Tensor:
        """Update this rank's part of p by its part of O -> the RMS of scaled O, which is that of
        the update over lr; for a shard, sqrt of its share of the whole's mean square."""
        scale = update_scale(p.shape)
        row_norms = apply_update(local_shard(p), O, now.decay, now.lr * scale)
        return torch.linalg.vector_norm(row_norms) * (scale / p.numel() ** 0.5)

    def _adamw_step(self, group: dict, skip: Tensor | None) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return

        # torch's own AdamW, as a function, which takes local shards and skip.
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params=[local_shard(p) for p in params],
            grads=[local_shard(p.grad) for p in params],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            found_inf=None if skip is None else skip.float(),
            lr=group["lr"] * group.get("lr_scale", 1.0), beta1=beta1, beta2=beta2, eps=group["eps"],
            weight_decay=group["weight_decay"], fused=group["fused"],
            amsgrad=False, maximize=False)

    def _qk_clip_step(self, max_logits: Tensor) -> None:
        mesh = getattr(self.qk[0][0], "device_mesh", None)
        if mesh is not None and mesh.size() > 1:
            # Each rank has seen other sequences. A maximum over ranks may drop a NaN; inf stays.
            max_logits = torch.where(max_logits < torch.inf, max_logits, torch.inf)
            for process_group in mesh.get_all_groups():
                dist.all_reduce(max_logits, dist.ReduceOp.MAX, process_group)

        gammas = []
        for (q_weight, k_weight), S in zip(self.qk, max_logits, strict=True):
            gammas.append(qk_clip(q_weight, k_weight, S, self.kv_map, self.head_dim, self.tau))
        self.heads_clipped = (torch.stack(gammas) < 1).sum()


def check_params(matrices: list[Tensor], others: list[Tensor]) -> None:
    for p in matrices:
        if p.ndim < 2:
            raise ValueError("Muon takes matrices; give vectors and scalars to adamw_params")
        if not p.is_contiguous():
            raise ValueError("MuonClip takes contiguous matrices; call contiguous() on them first")
    for p in matrices + others:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError("MuonClip trains fp32 weights; call model.float() first")


def configure_optimizer(model, *, poly_norm_lr_scale: float = 1.0, **options) -> MuonClip:
    """Make the optimizer of a model.Motif, and let PolyNorm's weights and biases train with
    poly_norm_lr_scale times the learning rate. options: see route_parameters."""
    optimizer = route_parameters(model, **options)
    poly_norm = set()
    for block in model.model.layers:
        if block.mlp.act_fn is not None:
            poly_norm.update(block.mlp.act_fn.parameters())

    if poly_norm and poly_norm_lr_scale != 1:
        vectors = optimizer.param_groups[-1]
        params = [p for p in vectors["params"] if p in poly_norm]
        own = dict(vectors, params=params, lr_scale=poly_norm_lr_scale)
        vectors["params"] = [p for p in vectors["params"] if p not in poly_norm]
        optimizer.param_groups.append(own)
    return optimizer


def route_parameters(model, *, lr: float, optimizer: str = "muonclip", **options) -> MuonClip:
    """Muon for the seven matrices of each layer, AdamW for all else, QK-clip on every layer.
    "adamw", to compare with, is AdamW for everything, no QK-clip. options: arguments of
    MuonClip."""
    if optimizer == "adamw":
        return MuonClip([], model.parameters(), lr=lr, **options)
    if optimizer != "muonclip":
        raise ValueError(f"optimizer must be 'muonclip' or 'adamw', not {optimizer!r}")

    matrices = list(model.matrices().values())
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]

    qk = []
    for block in model.model.layers:
        qk.append((block.self_attn.q_proj.weight, block.self_attn.k_proj.weight))
    return MuonClip(matrices, others, lr=lr, qk=qk, kv_map=model.config.kv_map,
                    head_dim=model.config.head_dim, **options)


def describe_routing(model, optimizer: MuonClip) -> str:
    """Say, in a line for each group, its rule and its parameters, without their layers' numbers."""
    place = r"^model\.|layers\.\d+\.|self_attn\.|mlp\.|\.weight$"
    names = {p: re.sub(place, "", name) for name, p in model.named_parameters()}
    lines = []
    for group in optimizer.param_groups:
        params = group["params"]
        count = sum(p.numel() for p in params)
        kinds = dict.fromkeys(names[p] for p in params)
        lines.append(f"{group['kind']}, weight decay {group['weight_decay']}: "
                     f"{count:,d} in {len(params)} tensors: {', '.join(kinds)}")
    return "\n".join(lines)


# ==================================================================================================
# Second half: Parallel Muon
#
# The problem. FSDP2 cuts every matrix into shards, one for each GPU: on 8 GPUs a 4096 x 4096 matrix
# lies in 8 blocks of 512 rows. AdamW can update a shard by itself, since it treats every number by
# itself. Muon cannot: the singular values of a block of rows are not those of the matrix. If two
# blocks have identical rows, each by itself turns them into 512 orthonormal rows, and together they
# are far from orthonormal. (For a Gaussian 512 x 512 matrix in 8 blocks, the result is 0.53 |O|_F
# away from O.) The simple way out: every rank gathers every matrix, and all do the same work.
#
# The idea (Motif-2, arXiv 2511.07464). Every matrix has one owner. All ranks send the owner their
# shards of u. The owner puts the matrix together, orthogonalises it, and sends every rank its shard
# of O. So each matrix is orthogonalised once, different ranks do different ones at the same time,
# and the result is bit-identical to that of one process.
#
# The plan. Owners are chosen so that all ranks have equally many FLOPs to do (assign_owners). A
# step goes in chunks, of about one large matrix for each rank, so that a rank holds few whole
# matrices at a time, and one chunk can travel while another is computed. For each chunk k, one
# all-to-all carries u(k) to the owners and another carries O(k) back.
#
# The timeline. The messages travel while the GPUs compute. With 4 ranks and 12 equal matrices there
# are 3 chunks, of matrices 0 to 3, 4 to 7 and 8 to 11:
#
#     rank 0         | NS of matrix 0 | NS of matrix 4 | NS of matrix 8  |
#     rank 1         | NS of matrix 1 | NS of matrix 5 | NS of matrix 9  |
#     rank 2         | NS of matrix 2 | NS of matrix 6 | NS of matrix 10 |
#     rank 3         | NS of matrix 3 | NS of matrix 7 | NS of matrix 11 |
#     network   u(0) | u(1)           | O(0), u(2)     | O(1)            | O(2)
#
# What it costs. Let N be the numbers in all matrices, on R ranks, which hold C copies (replicas) of
# the model, each of R / C shards (FSDP: C = 1; HSDP: more). A rank owns N / R numbers. It receives
#
#     u    of all that it owns, except its own shard          N/R - (N/R) C/R
#     O    its shard of everything, except what it owns       N C/R - (N/R) C/R
#     both                                                    (N/R) (1 + C - 2C/R)
#
# and sends as much. If every rank gathered everything it would receive N (1 - C/R). For the 12.7B
# model in bf16 on 8 GPUs (N = 10.9e9, R = 8, C = 1) that is 4.77 GB instead of 19.08, and an eighth
# of the FLOPs.
#
# HSDP. Each replica could do all of this by itself, but then all replicas would do the same work.
# So replicas share the owners; C above counts those that do (replicas_per_muon_group). An owner
# takes the shards of u from its own replica, which has all of them, and sends O to every rank.

def is_spread(p: Tensor) -> bool:
    """Whether p is a DTensor that lies on more than one rank."""
    return hasattr(p, "placements") and p.device_mesh.size() > 1


def local_shard(p: Tensor) -> Tensor:
    """Return this rank's part of p, not a copy; p itself if it is not sharded."""
    return p.to_local() if hasattr(p, "to_local") else p


def local_gradient(p: Tensor) -> Tensor:
    """Return this rank's part of p's gradient; zeros if p has none, as other ranks may have theirs
    and wait for this one."""
    if p.grad is None:
        return torch.zeros_like(local_shard(p))
    if is_spread(p) and p.grad.placements != p.placements:
        raise ValueError(f"a gradient is placed by {p.grad.placements}, its parameter by "
                         f"{p.placements}; redistribute the gradient first")
    return local_shard(p.grad).contiguous()


def shard_dims(t: Tensor) -> tuple[int | None, ...]:
    """Say for each mesh dimension of a DTensor which tensor dimension is sharded over it, or None
    for replicas. FSDP2 has (0,), HSDP has (None, 0)."""
    from torch.distributed.tensor import Replicate, Shard
    dims = []
    for placement in t.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(f"MuonClip takes parameters placed by Shard and Replicate, not by "
                             f"{t.placements}")
        dims.append(placement.dim if type(placement) is Shard else None)
    return tuple(dims)


def local_slices(shape, mesh_sizes, dims, coords) -> tuple[slice, ...]:
    """Return the part of a tensor that the rank at coordinates `coords` of a mesh holds. dims: as
    shard_dims returns them. The cuts are those of torch.chunk: all parts have the same length,
    except that the last ones may be shorter, or empty.

    5 rows on 4 ranks are 2, 2, 1 and 0 rows:

    >>> for rank in range(4):
    ...     print(local_slices((5, 8), mesh_sizes=(4,), dims=(0,), coords=(rank,)))
    (slice(0, 2, None), slice(0, 8, None))
    (slice(2, 4, None), slice(0, 8, None))
    (slice(4, 5, None), slice(0, 8, None))
    (slice(5, 5, None), slice(0, 8, None))
    """
    box = [slice(0, n) for n in shape]
    for size, dim, coord in zip(mesh_sizes, dims, coords):
        if dim is None:
            continue
        first = box[dim].start
        last = box[dim].stop
        length = math.ceil((last - first) / size)
        box[dim] = slice(min(first + coord * length, last), min(first + (coord + 1) * length, last))
    return tuple(box)


# ---- The plan: who owns what, and when

def newton_schulz_flops(shape, steps: int = 5) -> int:
    """Count the FLOPs of Newton-Schulz on (..., m, n).

    >>> f"{newton_schulz_flops((4096, 16384)):.2e}"
    '6.18e+12'
    """
    m, n = sorted(shape[-2:])
    each_step = 4 * m * m * n + 2 * m**3            # X X^T and B X; A A
    return steps * math.prod(shape[:-2]) * each_step


def assign_owners(shapes, ranks: int, chunk: int = 1) -> list[tuple[int, int]]:
    """Choose (chunk, owner) of each matrix by the rule "longest processing time first": take the
    matrices by falling FLOPs, and give each to the rank that has the least to do so far.

    This is a schedule of what each rank does when. It is cut into windows, each as long as
    `chunk` of the largest matrices; the matrices that start in one window are one chunk. So the
    ranks are balanced within each chunk too, where they wait for each other.

    Four matrices take 3, 2, 2 and 1 units of time. Rank 0 starts the first at time 0 and the last
    at time 3, which is in the second window; rank 1 starts the others at times 0 and 2:

    >>> assign_owners([(4, 16), (4, 10), (4, 10), (4, 4)], ranks=2)
    [(0, 0), (0, 1), (0, 1), (1, 0)]
    """
    flops = [newton_schulz_flops(shape) for shape in shapes]
    window = chunk * max(flops)
    busy = [0] * ranks                              # FLOPs given to each rank so far
    placed = [(0, 0)] * len(shapes)

    largest_first = sorted(range(len(shapes)), key=lambda i: -flops[i])
    for i in largest_first:
        owner = busy.index(min(busy))
        placed[i] = (busy[owner] // window, owner)
        busy[owner] += flops[i]
    return placed


def replicas_per_muon_group(shapes, ranks: int, replicas: int) -> int:
    """Choose how many replicas share the owners (HSDP): the smallest number that leaves the busiest
    rank the fewest FLOPs. A larger one only adds traffic, since O goes to every rank."""
    if ranks % replicas:
        raise ValueError(f"{ranks} ranks are not {replicas} replicas of the same size")

    best = 1
    least = math.inf
    for count in range(1, replicas + 1):
        if replicas % count:
            continue
        load = [0] * (count * ranks // replicas)
        for shape, (_, owner) in zip(shapes, assign_owners(shapes, len(load))):
            load[owner] += newton_schulz_flops(shape)
        if max(load) < least:
            best = count
            least = max(load)
    return best


class Transfer:
    """An all-to-all that is under way."""

    def __init__(self, work: dist.Work, received: Tensor):
        self.work = work                            # holds the buffer that is sent
        self.received = received

    def wait(self) -> Tensor:
        """Return what arrived, and drop both references, to free the buffers early."""
        self.work.wait()
        received = self.received
        self.work = None
        self.received = None
        return received


class MuonShardGroup:
    """The matrices that lie on one device mesh: who owns which, and how their shards are exchanged.

    The constructor only computes with shapes, so it also plans for GPUs that are not there. Then
    connect() adds the process group. i is a matrix, r a rank, d a mesh dimension, k a chunk.

    shapes[i]          (m, n)
    shard_dims[i]      as the function shard_dims returns it, e.g. (None, 0)
    mesh_sizes[d]      e.g. (2, 4) for 2 replicas of 4 shards
    coords[r]          rank r's coordinates in the mesh; None: row by row

    owner[i]           the rank that orthogonalises matrix i
    order              all matrices, chunk by chunk
    chunks[k]          the matrices of chunk k, sorted by owner as an all-to-all needs them
    slices[i][r]       the part of matrix i that rank r holds
    send_counts[i][r]  how many numbers of u rank r sends to the owner of matrix i
    recv_counts[i][r]  how many numbers of O rank r receives from it, the size of its shard
    num_copies[i]      how many ranks hold the same shard of matrix i"""

    def __init__(self, shapes, shard_dims, mesh_sizes, coords=None, chunk: int = 1):
        if coords is None:
            coords = list(itertools.product(*[range(size) for size in mesh_sizes]))
        self.shapes = shapes
        self.num_ranks = len(coords)

        placed = assign_owners(shapes, self.num_ranks, chunk)
        self.owner = [owner for _, owner in placed]
        self.order = sorted(range(len(shapes)), key=lambda i: placed[i])
        self.chunks = [[] for _ in range(max(placed)[0] + 1)]
        for i in self.order:
            self.chunks[placed[i][0]].append(i)

        self.slices = []
        self.recv_counts = []
        known = {}                                  # hundreds of matrices have few shapes
        for kind in zip(shapes, shard_dims):
            if kind not in known:
                known[kind] = slices_of_ranks(*kind, mesh_sizes, coords)
            slices, sizes = known[kind]
            self.slices.append(slices)
            self.recv_counts.append(sizes)

        # Rank r sends its shard of matrix i if it is in the owner's replica, that is, if it has the
        # owner's coordinate in every mesh dimension that replicates the matrix.
        coords = torch.tensor(coords)                                               # [r, d]
        sharded = torch.tensor([[dim is not None for dim in dims] for dims in shard_dims])  # [i, d]
        at_owner = coords[self.owner]                                               # [i, d]
        agrees = at_owner[:, None, :] == coords[None, :, :]                         # [i, r, d]
        same_replica = (sharded[:, None, :] | agrees).all(2)                        # [i, r]
        self.send_counts = (same_replica * torch.tensor(self.recv_counts)).tolist()
        self.num_copies = torch.where(sharded, 1, torch.tensor(mesh_sizes)).prod(1)

    def elements_sent(self, matrices: list[int]) -> tuple[Tensor, Tensor]:
        """Count how many numbers of u, and of O, of these matrices rank r sends to rank s -> two
        tensors [r, s]. The diagonal is what a rank sends to itself."""
        u = torch.zeros(self.num_ranks, self.num_ranks, dtype=torch.int64)
        O = torch.zeros_like(u)
        for i in matrices:
            u[:, self.owner[i]] += torch.tensor(self.send_counts[i])
            O[self.owner[i], :] += torch.tensor(self.recv_counts[i])
        return u, O

    def connect(self, process_group, me: int, params: list[Tensor], dtype: torch.dtype) -> None:
        """Prepare to exchange shards of params, in dtype, as rank `me` of the process group."""
        self.process_group = process_group
        self.me = me
        self.params = params
        self.copies_in_order = self.num_copies[self.order].to(params[0].device)
        self.nothing = torch.empty(0, dtype=dtype, device=params[0].device)     # cat([]) would fail

        # For each chunk: how much this rank sends to every rank, and receives from every rank.
        self.u_splits = []
        self.O_splits = []
        for chunk in self.chunks:
            u, O = self.elements_sent(chunk)
            self.u_splits.append((u[me].tolist(), u[:, me].tolist()))
            self.O_splits.append((O[me].tolist(), O[:, me].tolist()))

    def all_to_all(self, pieces: list[Tensor], splits: tuple[list, list]) -> Transfer:
        """Start to send flat pieces, sorted by the rank that gets them."""
        send_sizes, receive_sizes = splits
        sent = torch.cat([self.nothing, *pieces])
        received = sent.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(received, sent, receive_sizes, send_sizes,
                                      group=self.process_group, async_op=True)
        return Transfer(work, received)

    def send_updates(self, k: int, updates: list[Tensor]) -> Transfer:
        """Start to send this rank's shards of u(k) to the owners."""
        pieces = []
        for i, u in zip(self.chunks[k], updates):
            if self.send_counts[i][self.me]:
                pieces.append(u.flatten())
        return self.all_to_all(pieces, self.u_splits[k])

    def gather_full(self, k: int, transfer: Transfer) -> dict[int, Tensor]:
        """Wait for u(k) -> {i: the whole u} for the matrices of chunk k that this rank owns."""
        received = transfer.wait()
        matrices = {}
        for i in self.chunks[k]:
            if self.owner[i] == self.me:
                matrices[i] = received.new_empty(self.shapes[i])

        # What arrived is sorted by sender, and within a sender in the order of the chunk.
        position = 0
        for r in range(self.num_ranks):
            for i, matrix in matrices.items():
                count = self.send_counts[i][r]
                if count:
                    box = matrix[self.slices[i][r]]
                    box.copy_(received[position:position + count].view_as(box))
                    position += count
        return matrices

    def send_results(self, k: int, results: dict[int, Tensor]) -> Transfer:
        """Start to send every rank its shards of the O that this rank has computed."""
        pieces = []
        for r in range(self.num_ranks):
            for i, O in results.items():
                pieces.append(O[self.slices[i][r]].flatten())
        return self.all_to_all(pieces, self.O_splits[k])

    def wait_results(self, k: int, transfer: Transfer) -> list[Tensor]:
        """Wait for O(k) -> this rank's shards, flat, in the order of chunk k."""
        sizes = [self.recv_counts[i][self.me] for i in self.chunks[k]]
        return list(transfer.wait().split(sizes))


def slices_of_ranks(shape, dims, mesh_sizes, coords) -> tuple[list, list[int]]:
    """Return each rank's slices of one matrix, and how many numbers they hold."""
    slices = []
    sizes = []
    for coord in coords:
        box = local_slices(shape, mesh_sizes, dims, coord)
        slices.append(box)
        sizes.append(math.prod(s.stop - s.start for s in box))
    return slices, sizes


def build_shard_groups(matrices: list[Tensor], chunk: int, dtype) -> list[MuonShardGroup]:
    """Make a group for each device mesh that matrices lie on. All ranks of a mesh call this."""
    by_mesh = {}
    for p in matrices:
        if is_spread(p):
            by_mesh.setdefault(p.device_mesh, []).append(p)
    return [build_shard_group(mesh, params, chunk, dtype) for mesh, params in by_mesh.items()]


def build_shard_group(mesh, params: list[Tensor], chunk: int, dtype) -> MuonShardGroup:
    """Make the connected group of the DTensors on one mesh: with HSDP, of those replicas that share
    owners with this rank's replica."""
    shapes = [p.shape for p in params]
    dims = [shard_dims(p) for p in params]

    # Cut the mesh along its first dimension into groups of `together` replicas.
    together = mesh.shape[0]
    if all(d[0] is None for d in dims):
        together = replicas_per_muon_group(shapes, mesh.size(), mesh.shape[0])
    first = mesh.get_coordinate()[0] // together * together
    sizes = (together, *mesh.shape[1:])

    # A process group numbers its ranks by their global rank, whatever their place in the mesh.
    global_ranks = mesh.mesh[first:first + together].flatten().tolist()
    row_major = itertools.product(*[range(size) for size in sizes])
    coords_of = dict(zip(global_ranks, row_major))
    ranks = sorted(global_ranks)
    if len(ranks) == dist.get_world_size():
        process_group = dist.group.WORLD
    else:
        process_group = dist.new_group(ranks, use_local_synchronization=True)

    group = MuonShardGroup(shapes, dims, sizes, [coords_of[rank] for rank in ranks], chunk)
    group.connect(process_group, ranks.index(dist.get_rank()), params, dtype)
    return group


# ---- The step

def parallel_muon_step(optimizer: MuonClip, group: MuonShardGroup, now: StepScalars) -> None:
    """Take one step of Muon on the matrices of a group, in the order of the timeline above. A
    transfer_u or transfer_O is on its way while this rank computes."""
    rms = []
    transfer_O = None
    transfer_u = send_next_updates(optimizer, group, 0, now)

    for k in range(len(group.chunks)):
        # Phase 1: wait for u(k), and put together the matrices that this rank owns.
        matrices = group.gather_full(k, transfer_u)

        # Phase 2: start to send u(k+1). It travels during phase 3.
        if k + 1 < len(group.chunks):
            transfer_u = send_next_updates(optimizer, group, k + 1, now)

        # Phase 3: orthogonalise whole matrices, as one process does.
        for i in matrices:
            matrices[i] = newton_schulz(matrices[i], **optimizer.ns_options)

        # Phase 4: wait for O(k-1), which travelled during phase 3, and update this rank's shards.
        if k > 0:
            rms += apply_results(optimizer, group, k - 1, transfer_O, now)

        # Phase 5: start to send O(k). The buffer that is sent is a copy, so free O itself.
        transfer_O = group.send_results(k, matrices)
        del matrices

    last = len(group.chunks) - 1
    rms += apply_results(optimizer, group, last, transfer_O, now)

    # Every rank has its shards' part of each RMS; shards that several ranks hold count once.
    mean_square = torch.stack(rms).square_().div_(group.copies_in_order)
    dist.all_reduce(mean_square, group=group.process_group)
    for i, value in zip(group.order, mean_square.sqrt_()):
        optimizer.update_rms[group.params[i]] = value


def send_next_updates(optimizer: MuonClip, group: MuonShardGroup, k: int, now) -> Transfer:
    """Add the gradients of chunk k to the momentum, and start to send u(k)."""
    updates = [optimizer.add_gradient(group.params[i], now) for i in group.chunks[k]]
    return group.send_updates(k, updates)


def apply_results(optimizer: MuonClip, group: MuonShardGroup, k: int, transfer_O: Transfer,
                  now) -> list[Tensor]:
    """Wait for O(k), and update this rank's shards of the weights -> their parts of the RMS."""
    shards = group.wait_results(k, transfer_O)
    rms = []
    for i, O in zip(group.chunks[k], shards):
        rms.append(optimizer.apply_result(group.params[i], O, now))
    return rms
