"""MuonClip: Muon for the matrices, AdamW for everything else, QK-clip for the attention logits.

One step of Muon on a matrix of m x n numbers, from its gradient:

    momentum = mu * momentum + gradient
    u        = gradient + mu * momentum                                  (Nesterov)
    O        = newton_schulz(u)                                          (u made orthogonal)
    weight   = weight - lr * (0.2 sqrt(max(m, n)) * O + weight_decay * weight)

The first half is the optimizer. The second half is Parallel Muon, which takes the same step on many
GPUs, where FSDP2 has cut the matrices into shards.

Sources: Muon (kellerjordan.github.io/posts/muon), Moonlight (arXiv 2502.16982) for the factor
0.2 sqrt(max(m, n)), Kimi K2 (2507.20534) for QK-clip, Motif-2 (2511.07464) for Parallel Muon.
Letters: G is a gradient (not model.py's groups), u the matrix to be made orthogonal, O the result,
all m x n; E is how many matrices are stacked; mu is the momentum factor, lr the learning rate.
Attention has H query heads and K key heads, each with D = head_dim rows of its layer's q or k
weight.
"""
import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

import kernels

# ---- Why orthogonalise, and how
#
# The problem. A gradient, and so u, has a few large singular values and many small ones. A step
# along u moves the weight far in a few directions and hardly at all in the others, although these
# may hold what is left to learn. (Adam rescales each entry of u by itself, and sees no directions.)
#
# The idea. Write u = U diag(s) V^T, its singular value decomposition, and replace every s by 1:
# O = U V^T is the semi-orthogonal matrix nearest to u, and moves the weight equally far in every
# direction that u has. It is also steepest descent under the spectral norm: if u is the gradient,
# then among all steps dW with |dW x| <= |x| for every x, -O lowers the loss most, to first order.
#
# Does it pay? With 115M parameters AdamW, at the best of the eleven settings that we tried for it,
# ended 0.260 +- 0.006 (standard error) nats per token higher. A training step with Muon took 1.02
# times as long. No logit reached QK-clip's threshold, but at twice the learning rate some did
# (README, "Does it help").
#
# Newton-Schulz. An SVD is slow on a GPU; matrix products are fast. Start with X = u / |u|_F, whose
# singular values are at most 1. With A = X X^T, one step is
#
#     X  <-  (a I + b A + c A A) X   =   U diag(a s + b s^3 + c s^5) V^T
#
# It leaves U and V alone and sends every s to a polynomial of s. The five polynomials of the table
# "motif" below, one after the other, take every s in [0.002, 1] into [0.85, 1.15]. A smaller s is
# multiplied by at most 493. (Near 1 seems to be enough: Keller Jordan's leave s between 0.68
# and 1.2, and trained the models of his records.) Five steps on the 280 matrices of the 12.7B model
# take 1.0e15 FLOPs, as many as training it on 13,000 tokens; one optimizer step trains on millions
# of tokens.

# (a, b, c) of the polynomials. "Error": |O O^T - I|_F / sqrt(m) of a Gaussian 512 x 2048 matrix.
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
    # Polar Express (arXiv 2505.16932): the best in the worst case of all s from 0.001 to 1, so not
    # the best on a Gaussian matrix, whose s are larger. Error 0.19.
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]}

# X starts as u / (START_MARGIN |u|_F). Rounding in bf16 can leave s up to 1.003, and polar_express,
# which climbs steeply there, diverges from 1.022 on: 1.03 goes to 2.24, 5.7, 2575 and so on.
START_MARGIN = {"quintic": 1.0, "motif": 1.0, "polar_express": 1.02}


def plain_newton_schulz(u: Tensor, steps: int = 5, coefficients: str = "motif") -> Tensor:
    """The definition: u (m, n) -> O (m, n), near U V^T. newton_schulz below computes the same up to
    rounding, gives 0 for 0, and is faster. steps: how many of the five polynomials are applied.

    Four singular values (columns) after each of the five polynomials (rows):

    >>> s = torch.tensor([0.01, 0.1, 0.5, 1.0])
    >>> for a, b, c in COEFFICIENTS["motif"]:
    ...     s = a * s + b * s**3 + c * s**5
    ...     print("  ".join(f"{x:.3f}" for x in s.tolist()))
    0.041  0.402  1.272  0.117
    0.161  1.206  0.837  0.453
    0.579  0.582  0.800  1.219
    1.134  1.135  1.087  1.057
    1.018  1.019  0.986  0.978
    """
    X = u / (START_MARGIN[coefficients] * u.norm())
    for a, b, c in COEFFICIENTS[coefficients][:steps]:
        A = X @ X.mT                # (m, m)
        B = b * A + c * A @ A       # (m, m)
        X = a * X + B @ X           # (m, n)
    return X


# ---- Newton-Schulz, fast. It computes the same; one can skip to "The update" at first.
#
# Precision. u is cast to bf16 first, because Parallel Muon sends it in bf16; a single process casts
# too, so that both agree. (`dtype` can be another one.) The iteration runs on a GPU in fp16, which
# tensor cores multiply as fast as bf16, and which has 3 more bits of mantissa. fp16 has the smaller
# range, which is why X is scaled by 64 below.
#
# Scale. |X|_F = 1 means that the entries of X are about 1 / sqrt(m n), 1.2e-4 for 4096 x 16384, and
# below 6.1e-5 fp16 loses bits (subnormal numbers). So the code works with multiples, which the
# names tell: X64 = 64 X, A64 = 64 A, and A4096 = X64 X64^T = 4096 A. 64 is the largest safe power
# of two: singular values reach 1.99 with polar_express, so entries of A4096 reach 64^2 * 1.99^2 =
# 16,000; with 128 in place of 64 they would reach 65,000, and fp16 ends at 65,504.

SCALE = 64.0            # the 64 of these names


def newton_schulz(u: Tensor, steps: int = 5, coefficients: str = "motif",
                  dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Compute plain_newton_schulz of each matrix in u (..., m, n), cast to `dtype` first -> O
    (..., m, n) in `dtype`. 1e30 u and 1e-30 u give the same O, up to rounding; 0 gives 0."""
    m, n = u.shape[-2:]
    matrices = u.to(dtype).contiguous().view(-1, m, n)
    O = torch.empty_like(matrices)
    X64 = normalize(matrices, START_MARGIN[coefficients])

    # A = X X^T is to be the small square, so a tall matrix is iterated transposed.
    tall = m > n
    if tall:
        X64 = X64.mT
    E, m, n = X64.shape             # m <= n from here on

    # Most products in gram_steps are symmetric, and a kernel computes only half of each, in tiles
    # of 128 x 128 numbers. With fewer than two tiles for each of an H200's 132 processors these
    # are busy unevenly, and plain_steps is faster.
    table = COEFFICIENTS[coefficients][:steps]
    tile_rows = math.ceil(m / kernels.TILE)
    tiles = E * tile_rows * (tile_rows + 1) // 2
    if tiles >= kernels.MIN_SYMMETRIC_TILES and kernels.can_use_symmetric_matmul(X64):
        # A nearly square X is about as small as A, so working on A alone would save nothing.
        wide = n >= 1.2 * m
        X64 = gram_steps(X64, table, span=3 if wide else 1)
    else:
        X64 = plain_steps(X64, table)
    torch.div(X64, SCALE, out=O.mT if tall else O)
    return O.view(u.shape)


def normalize(matrices: Tensor, margin: float) -> Tensor:
    """Scale each matrix of (E, m, n) to the Frobenius norm SCALE / margin -> (E, m, n), in fp16 for
    bf16 on a GPU, else in its own dtype. Each is first divided by its largest entry: the square of
    1e30 overflows fp32, and the square of 1e-30 is 0."""
    flat = matrices.flatten(1)
    if flat.is_cuda and flat.dtype == torch.bfloat16:
        working_dtype = torch.float16
        largest = torch.linalg.vector_norm(flat, torch.inf, 1, keepdim=True, dtype=torch.float32)
    else:
        working_dtype = flat.dtype
        largest = flat.abs().amax(1, keepdim=True)      # vector_norm is slow on a CPU
    largest.clamp_(torch.finfo(flat.dtype).tiny)
    X64 = torch.empty_like(flat, dtype=working_dtype)
    torch.div(flat, largest, out=X64)

    # The largest entry is now 1, so the norm is at least 1, unless the matrix is 0.
    norm = torch.linalg.vector_norm(X64, dim=1, keepdim=True).clamp_(1)
    X64 /= norm.mul_(margin / SCALE)        # X = u / (margin |u|_F), and X64 = SCALE X
    return X64.view(matrices.shape)


def plain_steps(X64: Tensor, table: list) -> Tensor:
    """Run Newton-Schulz on X64 (E, m, n), in three calls a step: for small matrices the time goes
    into launching kernels."""
    for a, b, c in table:
        A4096 = torch.bmm(X64, X64.mT)
        # A4096 = SCALE^2 A, so B = b A + c A A = (b / SCALE^2) A4096 + (c / SCALE^4) A4096 A4096.
        B = torch.baddbmm(A4096, A4096, A4096, beta=b / SCALE**2, alpha=c / SCALE**4)
        X64 = torch.baddbmm(X64, B, X64, beta=a)
    return X64


def gram_steps(X64: Tensor, table: list, span: int) -> Tensor:
    """Run Newton-Schulz on X64 (E, m, n), `span` steps at a time on A = X X^T alone, which is small
    if X is wide (Gram Newton-Schulz; Dao-AILab, 2026).

    One step turns X into Z X, where Z = a I + B and B = b A + c A A, and so A into Z A Z. Multiply
    Q = Z_3 Z_2 Z_1 together on (m, m) matrices, and touch the wide X once, X = Q X. A, Z and Q are
    all symmetric, since they are polynomials in one matrix.

    Then compute A from X again. Rounding turns an eigenvalue of A that should be 0 into one of
    -0.00001, say. Each step multiplies it by about a^2, which is 6 to 17, and 67 in polar_express's
    first step, and far below 0 the polynomials grow without bound. After three steps in fp16 it is
    still small: O is as exact as by plain_steps, but for polar_express on matrices of rank 1 to 3,
    where the error is 0.14 to 0.21 instead of 0.09 to 0.11."""
    # symmetric(X, Y, alpha, addend, beta) is alpha X Y^T + beta addend.
    symmetric = kernels.symmetric_matmul
    for first in range(0, len(table), span):
        steps = table[first:first + span]
        A64 = symmetric(X64, X64, 1 / SCALE)
        for i, (a, b, c) in enumerate(steps):
            B64 = symmetric(A64, A64, c / SCALE, A64, b)

            # The next step's A = Z A Z. The last step needs none.
            if i + 1 < len(steps):
                ZA64 = symmetric(B64, A64, 1 / SCALE, A64, a)
                A64 = symmetric(ZA64, B64, 1 / SCALE, ZA64, a)

            # Q = Z Q, and at first Q = Z = a I + B. It may overwrite B: the next A is computed.
            if i == 0:
                Q64 = B64
                Q64.diagonal(dim1=1, dim2=2).add_(a * SCALE)
            else:
                Q64 = symmetric(Q64, B64, 1 / SCALE, Q64, a)

        # X = Q X, so X64 = Q64 X64 / SCALE. One call does both: bmm has no alpha, and with beta = 0
        # baddbmm ignores its first argument. `out` keeps the layout: a tall matrix, transposed, has
        # contiguous columns.
        X64 = torch.baddbmm(X64, Q64, X64, beta=0, alpha=1 / SCALE, out=torch.empty_like(X64))
    return X64


# ---- The update

compile_once = functools.cache(torch.compile)    # the same function is compiled a single time


def compile_rowwise(function):
    """Decorator: view the first two tensors, of the same size, as (rows, 1024), or as narrower rows
    where 1024 does not divide the size, and on a GPU compile the function into one pass over
    memory. Only the number of rows differs from matrix to matrix, so one compiled kernel serves
    all, and can move 16 bytes at a time."""
    def call(first, second, *args):
        width = math.gcd(first.numel(), 1024)
        first = first.view(-1, width)
        second = second.view(-1, width)
        if first.is_cuda and kernels.use_triton(first):
            return compile_once(function)(first, second, *args)
        return function(first, second, *args)
    return call


@compile_rowwise
def add_to_momentum(momentum: Tensor, G: Tensor, mu: Tensor, skip: Tensor,
                    dtype: torch.dtype) -> Tensor:
    """momentum = mu * momentum + G, in place -> u = G + mu * momentum, in dtype; G is 0 if skip."""
    G = G.masked_fill(skip, 0)
    torch.addcmul(G, momentum, mu, out=momentum)
    return torch.addcmul(G, momentum, mu).to(dtype)


@compile_rowwise
def apply_update(weight: Tensor, O: Tensor, decay: Tensor, rate: Tensor) -> None:
    """weight = decay * weight - rate * O, in place."""
    weight.mul_(decay).addcmul_(O, rate, value=-1)


def update_scale(shape) -> float:
    """Return 0.2 sqrt(max(m, n)), which makes O as large as AdamW's update, so that both share one
    learning rate and one weight decay (Moonlight, arXiv 2502.16982, section 2.2).

    If m <= n, O has m orthonormal rows, so |O|_F^2 = m, and the root mean square (RMS) of its m n
    entries is sqrt(m / (m n)) = 1 / sqrt(max(m, n)). That of AdamW's update is about 0.2 to 0.4.

    >>> O = torch.eye(4, 16)
    >>> round(O.square().mean().sqrt().item(), 3), update_scale(O.shape)
    (0.25, 0.8)
    """
    return 0.2 * max(shape[-2:]) ** 0.5


# ---- Shards
#
# Under FSDP2 a parameter is a DTensor: each rank of a device mesh holds one shard of it, a block of
# rows. Under HSDP there are several replicas, each sharded: a mesh of (replicas, shards). On one
# process none of this happens, and a parameter is its own shard.

def is_spread(p: Tensor) -> bool:
    """Whether p is a DTensor that lies on more than one rank."""
    return hasattr(p, "placements") and p.device_mesh.size() > 1


def local_shard(p: Tensor) -> Tensor:
    """Return this rank's part of p, not a copy; p itself if it is not sharded."""
    return p.to_local() if hasattr(p, "to_local") else p


def shard_dims(t: Tensor) -> tuple[int | None, ...]:
    """Say for each mesh dimension of a DTensor which tensor dimension is sharded over it, or None
    for replicas. FSDP2 has (0,). HSDP has (None, 0)."""
    return tuple(place.dim if place.is_shard() else None for place in t.placements)


def local_slices(shape, mesh_sizes, dims, coords) -> tuple[slice, ...]:
    """Return the part of a tensor that the rank at coordinates `coords` of a mesh holds. dims: as
    shard_dims returns them. The cuts are those of torch.chunk: 5 rows on 4 ranks are 2, 2, 1 and 0.

    >>> [local_slices((5,), mesh_sizes=(4,), dims=(0,), coords=(rank,))[0] for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    slices = [slice(0, n) for n in shape]
    for size, dim, coord in zip(mesh_sizes, dims, coords):
        if dim is not None:
            whole = slices[dim]
            length = math.ceil((whole.stop - whole.start) / size)
            first = min(whole.start + coord * length, whole.stop)
            slices[dim] = slice(first, min(first + length, whole.stop))
    return tuple(slices)


# ---- QK-clip
#
# The problem. A logit q . k contains two projections, so it can grow as fast as the product of the
# spectral norms of W_q and W_k. In every direction Muon steps equally far, however small the
# gradient has become there, so spectral norms grow further than with AdamW: this is how Kimi K2
# (section 2.1) explains that in a large model the logits of some heads pass 1000, their softmax
# becomes one-hot, and the loss spikes.
#
# The idea. Let L_h be the largest logit of head h in this step's own forward pass. After the update
# scale the weights of q and k, so that head h's logits get the factor gamma_h: tau / L_h if L_h is
# larger than tau, else 1. If each head has a key of its own, q and k each get sqrt(gamma_h). But
# here several query heads read one key head, as in grouped-query attention: in the 12.7B model 40
# query heads read 16 key heads. A head below tau must not change because another head that reads
# the same key is above. So
#
#     f_j = sqrt(min of gamma_h over the heads h that read key head j)        the factor of key j
#     gamma_h / f_j                                                           the factor of query h
#
# and every head's logits get exactly gamma_h. Without sharing, these are Kimi K2's factors.

@torch.no_grad()
def qk_clip(qk: list, max_logits: Tensor, kv_map, head_dim: int, tau: float) -> Tensor:
    """Scale the rows of each layer's q_weight (H D, hidden) and k_weight (K D, hidden) in place, to
    bring the measured maxima of the logits down to tau -> gamma (layers, H).

    qk: [(q_weight, k_weight), ...], a pair for each layer.
    max_logits (layers, H): L, the largest, not the largest in magnitude, measured before the
        update.
    kv_map (H,): the key head that each query head reads.

    Two heads share a key. The first, at 200, must come down to 100. The second, at 50, must stay,
    so its q has to grow by what the key has lost:

    >>> q, k = torch.ones(2, 1), torch.ones(1, 1)
    >>> L = torch.tensor([[200.0, 50.0]])
    >>> qk_clip([(q, k)], L, kv_map=[0, 0], head_dim=1, tau=100.0)
    tensor([[0.5000, 1.0000]])
    >>> q.flatten(), k.flatten()
    (tensor([0.7071, 1.4142]), tensor([0.7071]))
    >>> L * (q * k).flatten()
    tensor([[100.0000,  50.0000]])
    """
    # NaN and inf fail this. The assert raises RuntimeError, on a GPU at the host's next sync.
    below_inf = (max_logits < torch.inf).all()
    torch._assert_async(below_inf, "QK-clip: an attention logit is not finite")
    kv_map = torch.as_tensor(kv_map, device=max_logits.device)
    assert max_logits.shape == (len(qk), len(kv_map))
    num_key_heads = len(qk[0][1]) // head_dim

    gamma = torch.where(max_logits > tau, tau / max_logits, 1)                      # (layers, H)
    strictest = gamma.new_ones(len(qk), num_key_heads)
    strictest = strictest.scatter_reduce(1, kv_map.expand_as(gamma), gamma, "amin")
    key_factors = strictest.sqrt()                                                  # (layers, K)
    query_factors = gamma / key_factors[:, kv_map]                                  # (layers, H)

    q_rows = query_factors.repeat_interleave(head_dim, dim=1)                       # (layers, H D)
    k_rows = key_factors.repeat_interleave(head_dim, dim=1)                         # (layers, K D)
    for (q_weight, k_weight), q_factors, k_factors in zip(qk, q_rows, k_rows, strict=True):
        scale_rows(q_weight, q_factors)
        scale_rows(k_weight, k_factors)
    return gamma


def scale_rows(weight: Tensor, factors: Tensor) -> None:
    """Multiply row i of weight (rows, columns) by factors[i], in place; each rank in its shard."""
    if hasattr(weight, "placements"):
        mesh = weight.device_mesh
        slices = local_slices(weight.shape, mesh.shape, shard_dims(weight), mesh.get_coordinate())
        factors = factors[slices[0]]
    local_shard(weight).mul_(factors[:, None])


# ---- The optimizer

# Small matrices of the same shape are updated together, up to this many numbers (64 MiB for u, 128
# each for the fp32 copies of G and momentum, and later of the weights). On a GPU most of the time
# would otherwise go into launching kernels.
MAX_BATCHED_NUMEL = 2**25


def batches_of_one_shape(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield params in lists of one shape and dtype each."""
    by_shape = {}
    for p in params:
        by_shape.setdefault((p.shape, p.dtype), []).append(p)
    for (shape, _), same in by_shape.items():
        count = max(1, MAX_BATCHED_NUMEL // shape.numel())
        for first in range(0, len(same), count):
            yield same[first:first + count]


def adamw_groups(params: list[Tensor], weight_decay: float, lr_scales: dict) -> list[dict]:
    """Divide AdamW's parameters into groups: matrices, then vectors and scalars, which get no
    weight decay; each split again by its parameters' factors in lr_scales."""
    tables = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim < 2]
    groups = []
    for same_decay, decay in ((tables, weight_decay), (vectors, 0.0)):
        by_scale = {1.0: []}
        for p in same_decay:
            by_scale.setdefault(lr_scales.get(p, 1.0), []).append(p)
        for scale, same in by_scale.items():
            group = dict(kind="adamw", params=same, weight_decay=decay, lr_scale=scale)
            groups.append(group)
    return groups


class MuonClip(torch.optim.Optimizer):
    """Muon trains muon_params, AdamW trains adamw_params.

    muon_params: contiguous matrices (m, n), or stacks of them (..., m, n), in fp32 or fp64. Their
        lr, momentum and weight_decay act in fp32.
    adamw_params: of any shape, in fp32 or fp64. Vectors and scalars get no weight decay.
    lr_scales: {p: factor} of those adamw_params that learn at factor * lr.
    coefficients: the name of a table in COEFFICIENTS. dtype: of u and O, see newton_schulz.
    qk: [(q_weight, k_weight), ...], a pair for each layer, for QK-clip; kv_map, head_dim and tau as
        in qk_clip. tau = 0 switches it off.

    On many ranks all ranks of a mesh call step() together, with the same `skip`. If the q and k
    weights are sharded, step() takes the maximum of max_logits over the ranks. For parameters that
    are not DTensors, the caller must reduce the gradients and max_logits over ranks before.

    A step that was not skipped sets two results for logs. Only reading these tensors waits for the
    device:

        update_rms[p]    the RMS of matrix p's last update, without the factor lr and without weight
                         decay; about 0.2
        heads_clipped    how many heads were above tau; None without QK-clip"""

    def __init__(self, muon_params, adamw_params, *, lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.1, betas=(0.9, 0.95), eps: float = 1e-8,
                 lr_scales: dict[Tensor, float] | None = None, coefficients: str = "motif",
                 dtype: torch.dtype = torch.bfloat16,
                 qk=(), kv_map=None, head_dim: int | None = None, tau: float = 100.0):
        matrices = list(muon_params)
        others = list(adamw_params)
        for p in matrices + others:
            if p.dtype not in (torch.float32, torch.float64):
                # bf16 rounds away any update below 1/512 of the weight.
                raise ValueError("MuonClip trains fp32 weights; call model.float() first")
        for p in matrices:
            if p.ndim < 2 or not local_shard(p).is_contiguous():
                raise ValueError(f"muon_params has a tensor of shape {tuple(p.shape)}; Muon takes "
                                 "contiguous matrices, or stacks of them")
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients={coefficients!r} is none of {', '.join(COEFFICIENTS)}")

        lr_scales = lr_scales or {}
        if not lr_scales.keys() <= set(others):
            raise ValueError("lr_scales are for adamw_params alone; to scale the update of a "
                             "matrix, change apply_result and apply_stacked_results")

        groups = [dict(kind="muon", params=matrices, weight_decay=weight_decay)]
        groups += adamw_groups(others, weight_decay, lr_scales)
        # fused=True in each group also tells Optimizer.load_state_dict to keep "step" as an fp32
        # tensor on the device.
        defaults = dict(lr=lr, lr_scale=1.0, momentum=momentum, betas=betas, eps=eps, fused=True)
        super().__init__([group for group in groups if group["params"]], defaults)

        self.ns_options = dict(coefficients=coefficients, dtype=dtype)
        self.exchanges = build_exchanges(matrices, dtype)   # of shards (second half); else []
        self.update_rms = {}

        self.qk = list(qk)
        if self.qk:
            self.kv_map = torch.as_tensor(kv_map, device=self.qk[0][0].device)
        self.head_dim = head_dim
        self.tau = tau
        self.heads_clipped = None

        # The state is made now, so that a checkpoint can be read into it before the first step.
        for p in matrices:
            self.state[p] = {"momentum": torch.zeros_like(local_shard(p))}
        for p in others:
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(local_shard(p)),
                "exp_avg_sq": torch.zeros_like(local_shard(p))}

    @torch.no_grad()
    def step(self, *, max_logits: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Update all parameters that have a gradient. A parameter without one is left alone.
        Exception: a sharded matrix, whose missing gradient counts as 0 (its momentum and weight
        decay still act), because other ranks may have one and wait for this rank's message.

        max_logits (layers, H): the largest logit of each head that this rank has seen. QK-clip
            needs it.
        skip (0-dim bool tensor): if true, no weight and no state changes, even if gradients or
        logits are NaN. The device decides, without a host sync: gradients count as 0, mu as 1, lr
        as 0, and AdamW takes skip as found_inf, its flag for an overflow under loss scaling."""
        has_qk_clip = bool(self.qk and self.tau)
        if has_qk_clip and max_logits is None:
            raise ValueError("QK-clip needs step(max_logits=...); tau=0 switches QK-clip off")
        if skip is None:
            device = self.param_groups[0]["params"][0].device
            skip = torch.zeros((), dtype=torch.bool, device=device)

        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon_step(group, skip)
            else:
                self._adamw_step(group, skip)

        if has_qk_clip:
            self._qk_clip_step(max_logits.masked_fill(skip, 0))

    def add_param_group(self, group: dict) -> None:
        if hasattr(self, "exchanges"):
            raise ValueError("the exchange of shards is planned once: give MuonClip all parameters "
                             "when you make it")
        super().add_param_group(group)

    def _muon_step(self, group: dict, skip: Tensor) -> None:
        scalars = self._step_scalars(group, skip)
        whole = [p for p in group["params"] if p.grad is not None and not is_spread(p)]
        for params in batches_of_one_shape(whole):
            if len(params) == 1:                # a large matrix is not copied
                O = newton_schulz(self.add_gradient(params[0], scalars), **self.ns_options)
                self.apply_result(params[0], O, scalars)
            else:
                O = newton_schulz(self.add_stacked_gradients(params, scalars), **self.ns_options)
                self.apply_stacked_results(params, O, scalars)

        # Second half: matrices that lie in shards on many ranks.
        for exchange in self.exchanges:
            parallel_muon_step(self, exchange, scalars)

    def _step_scalars(self, group: dict, skip: Tensor) -> SimpleNamespace:
        """Return what all matrices share in one step, on the device, where `skip` can change it."""
        lr = torch.full((), group["lr"], device=skip.device).masked_fill(skip, 0)
        mu = torch.full((), group["momentum"], device=skip.device).masked_fill(skip, 1)
        decay = 1 - lr * group["weight_decay"]
        return SimpleNamespace(lr=lr, mu=mu, decay=decay, skip=skip)

    def add_gradient(self, p: Tensor, scalars: SimpleNamespace) -> Tensor:
        """Add p's gradient to its momentum -> u, in the dtype that Newton-Schulz gets. scalars:
        those of _step_scalars."""
        momentum = self.state[p]["momentum"]
        if p.grad is None:
            G = torch.zeros_like(momentum)  # other ranks may have one, and count on our message
        else:
            assert not is_spread(p) or p.grad.placements == p.placements, "reduce gradients first"
            G = local_shard(p.grad).contiguous()
        u = add_to_momentum(momentum, G, scalars.mu, scalars.skip, self.ns_options["dtype"])
        return u.view(momentum.shape)

    def apply_result(self, p: Tensor, O: Tensor, scalars: SimpleNamespace) -> None:
        """Update p by O, and set update_rms[p] to the RMS of scaled O. If p is sharded, all of this
        is this rank's part. The squares of the ranks' parts add up to the square of the RMS, and
        ShardExchange.finish_update_rms adds them up."""
        scale = update_scale(p.shape)
        apply_update(local_shard(p), O, scalars.decay, scalars.lr * scale)
        norm = torch.linalg.vector_norm(O, dtype=p.dtype)
        self.update_rms[p] = norm * (scale / p.numel() ** 0.5)

    def add_stacked_gradients(self, params: list[Tensor], scalars: SimpleNamespace) -> Tensor:
        """add_gradient of E matrices of one shape at once -> u (E, ..., m, n). On a GPU the copies
        take less time than calling the kernel for each matrix."""
        momenta = [self.state[p]["momentum"] for p in params]
        stacked_momenta = torch.stack(momenta)
        G = torch.stack([local_shard(p.grad) for p in params])
        u = add_to_momentum(stacked_momenta, G, scalars.mu, scalars.skip, self.ns_options["dtype"])
        torch._foreach_copy_(momenta, list(stacked_momenta))
        return u.view(G.shape)

    def apply_stacked_results(self, params: list[Tensor], O: Tensor,
                              scalars: SimpleNamespace) -> None:
        """apply_result of E matrices of one shape at once, by O (E, ..., m, n)."""
        weights = [local_shard(p) for p in params]
        stacked_weights = torch.stack(weights)
        scale = update_scale(O.shape)
        apply_update(stacked_weights, O, scalars.decay, scalars.lr * scale)
        torch._foreach_copy_(weights, list(stacked_weights))

        norms = torch.linalg.vector_norm(O.flatten(1), dim=1, dtype=stacked_weights.dtype)
        self.update_rms.update(zip(params, norms * (scale / params[0].numel() ** 0.5)))

    def _adamw_step(self, group: dict, skip: Tensor) -> None:
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
            found_inf=skip.float(),
            lr=group["lr"] * group["lr_scale"], beta1=beta1, beta2=beta2, eps=group["eps"],
            weight_decay=group["weight_decay"], fused=group["fused"],
            amsgrad=False, maximize=False)

    def _qk_clip_step(self, max_logits: Tensor) -> None:
        some_weight = self.qk[0][0]
        if is_spread(some_weight):
            # Each rank has seen other sequences. A maximum over ranks may drop a NaN; inf stays.
            max_logits = torch.where(max_logits < torch.inf, max_logits, torch.inf)
            for process_group in some_weight.device_mesh.get_all_groups():
                dist.all_reduce(max_logits, dist.ReduceOp.MAX, process_group)

        gamma = qk_clip(self.qk, max_logits, self.kv_map, self.head_dim, self.tau)
        self.heads_clipped = (gamma < 1).sum()


def configure_optimizer(model, *, optimizer: str = "muonclip", embedding_lr_scale: float = 1.0,
                        poly_norm_lr_scale: float = 1.0, **options) -> MuonClip:
    """Make the optimizer of a model.Motif: Muon for the seven matrices of each layer, AdamW for all
    else, QK-clip on every layer. "adamw", to compare with: AdamW for everything, no QK-clip.

    The embedding and the head learn at embedding_lr_scale times lr, PolyNorm's parameters at
    poly_norm_lr_scale times lr. options: arguments of MuonClip."""
    if optimizer not in ("muonclip", "adamw"):
        raise ValueError(f"optimizer={optimizer!r} is neither muonclip nor adamw")
    layers = model.model.layers
    matrices = []
    qk = []
    if optimizer == "muonclip":
        matrices = list(model.matrices().values())
        qk = [(block.self_attn.q_proj.weight, block.self_attn.k_proj.weight) for block in layers]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]

    lr_scales = {
        model.model.embed_tokens.weight: embedding_lr_scale,
        model.head_weight: embedding_lr_scale}
    for block in layers:
        if block.mlp.act_fn is not None:
            for p in block.mlp.act_fn.parameters():
                lr_scales[p] = poly_norm_lr_scale
    return MuonClip(matrices, others, lr_scales=lr_scales, qk=qk, kv_map=model.config.kv_map,
                    head_dim=model.config.head_dim, **options)


def describe_routing(model, optimizer: MuonClip) -> str:
    """Say, in a line for each group, its rule and its parameters, without their layers' numbers."""
    last_words = {p: name.removesuffix(".weight").split(".")[-1]
                  for name, p in model.named_parameters()}
    lines = []
    for group in optimizer.param_groups:
        params = group["params"]
        count = sum(p.numel() for p in params)
        kinds = dict.fromkeys(last_words[p] for p in params)
        scaled = f", lr times {group['lr_scale']}" if group["lr_scale"] != 1 else ""
        lines.append(f"{group['kind']}, weight decay {group['weight_decay']}{scaled}: "
                     f"{count:,d} in {len(params)} tensors: {', '.join(kinds)}")
    return "\n".join(lines)


# ==================================================================================================
# Second half: Parallel Muon
#
# The problem. FSDP2 cuts every matrix into shards, one for each GPU: on 8 GPUs a 4096 x 4096 matrix
# lies in 8 blocks of 512 rows. AdamW can update a shard by itself, since it treats every number by
# itself. Muon cannot: the singular values of a block of rows are not those of the matrix. If the 8
# blocks were equal, say, each would become the same 512 orthonormal rows, and the whole would be
# far from orthonormal. The simple way out: every rank gathers every matrix, and all do the same
# work.
#
# The idea (Motif-2, arXiv 2511.07464). Every matrix has one owner. All ranks send the owner their
# shards of u. The owner puts the matrix together, orthogonalises it, and sends every rank its shard
# of O. So each matrix is orthogonalised once, and different ranks do different ones at the same
# time. The result is that of one process. On a CPU in bf16 the two agree to the bit; on a GPU, or
# in fp32, roundings may differ, because one process stacks small matrices.
#
# In its simplest form, one matrix after the other, with rows that C ranks share evenly, it is
#
#     for i, p in enumerate(params):
#         u = add_gradient(p)                       # (m / C, n): this rank's rows
#         whole_u = gather(u, to=owner[i])          # (m, n), on the owner alone
#         if me == owner[i]:
#             whole_O = newton_schulz(whole_u)      # (m, n)
#         O = scatter(whole_O, source=owner[i])     # (m / C, n): this rank's rows
#         apply_result(p, O)
#
# The timeline. The matrices are divided into chunks, handled one after the other. In each chunk a
# rank owns one large matrix, or several small ones that take about as long. So it holds few whole
# matrices at a time, and one chunk can travel while another is computed. For each chunk k one
# all-to-all carries u(k) to the owners and one carries O(k) back. 12 equal matrices on 4 ranks:
#
#     rank 0         | NS of matrix 0 | NS of matrix 4 | NS of matrix 8  |
#     rank 1         | NS of matrix 1 | NS of matrix 5 | NS of matrix 9  |
#     rank 2         | NS of matrix 2 | NS of matrix 6 | NS of matrix 10 |
#     rank 3         | NS of matrix 3 | NS of matrix 7 | NS of matrix 11 |
#     network   u(0) | u(1)           | O(0), u(2)     | O(1)            | O(2)
#
# What it costs. The matrices have N numbers, on C ranks. A rank needs u of what it owns, N / C
# numbers, and its shard of every O, another N / C. It holds a C-th of each already. So it receives
# 2 N / C (1 - 1 / C). If it gathered every matrix, it would receive N (1 - 1 / C). For the 12.7B
# model on 8 GPUs in bf16 (N = 10.9e9) that is 4.77 GB instead of 19.08, and an eighth of the FLOPs.
#
# Below come the step, the plan (who owns what, and when), and the exchange (what a rank sends and
# receives). Several replicas of a sharded model (HSDP) are a variation: replicas_per_muon_group.

# ---- The step

def parallel_muon_step(optimizer: MuonClip, exchange: "ShardExchange",
                       scalars: SimpleNamespace) -> None:
    """Take one step of Muon on the matrices of an exchange, in the order of the timeline above.
    There u(k) and O(k) are u and O of all matrices of chunk k."""
    last = len(exchange.plan.chunks) - 1
    exchange.send_u(0, optimizer, scalars)
    for k in range(last + 1):
        # Phase 1: wait for u(k), and put together the matrices that this rank owns.
        whole_u = exchange.gather_u(k)

        # Phase 2: start to send u(k+1). It travels during phase 3.
        if k < last:
            exchange.send_u(k + 1, optimizer, scalars)

        # Phase 3: orthogonalise whole matrices, one at a time. pop: each u is freed on the way.
        whole_O = {}
        for i in list(whole_u):
            whole_O[i] = newton_schulz(whole_u.pop(i), **optimizer.ns_options)

        # Phase 4: wait for O(k-1), which travelled during phase 3, and update this rank's shards.
        # For that the other ranks must have ended phase 3 of chunk k-1, and not of chunk k: a fast
        # rank may be one chunk ahead.
        if k > 0:
            exchange.apply_O(k - 1, optimizer, scalars)

        # Phase 5: start to send O(k). The buffer that is sent is a copy, so free O itself.
        exchange.send_O(k, whole_O)
        del whole_O

    exchange.apply_O(last, optimizer, scalars)
    exchange.finish_update_rms(optimizer)


# ---- The plan

def newton_schulz_flops(shape) -> int:
    """Count the FLOPs of plain_newton_schulz on (..., m, n): 6.2e12 for 4096 x 16384. They only
    balance the ranks. (gram_steps takes fewer, and for wide matrices fewer still.)"""
    m, n = sorted(shape[-2:])
    each_step = 4 * m * m * n + 2 * m**3            # X X^T and B X; A A
    return 5 * math.prod(shape[:-2]) * each_step


def assign_owners(shapes, ranks: int) -> tuple[list, list]:
    """Choose the owner of each matrix by the rule "longest processing time first": take the
    matrices by falling FLOPs, and give each to the rank that has the least to do so far.

    Cut this schedule into windows, each as long as the largest matrix takes; the matrices that
    start in one window are one chunk -> (the owner of each matrix, the matrices of each chunk).
    At the end of a chunk the work that any two ranks have done so far differs by no more than the
    largest matrix.

    Four matrices take 3, 2, 2 and 1 times 1920 FLOPs, which is our unit of time. Rank 0 starts the
    first at time 0 and the last at time 3, which is in the second window; rank 1 starts the others
    at times 0 and 2. After the first chunk the ranks have done 3 and 4 units, after the second 4
    and 4:

    >>> assign_owners([(4, 16), (4, 10), (4, 10), (4, 4)], ranks=2)
    ([0, 1, 1, 0], [[0, 1, 2], [3]])
    """
    flops = [newton_schulz_flops(shape) for shape in shapes]
    window = max(flops)
    busy = [0] * ranks                              # FLOPs given to each rank so far
    owner = [0] * len(shapes)
    chunks = []
    by_falling_flops = sorted(range(len(shapes)), key=lambda i: -flops[i])
    for i in by_falling_flops:
        owner[i] = busy.index(min(busy))

        # No matrix takes longer than a window, so no window is passed over: k <= len(chunks).
        k = busy[owner[i]] // window
        if k == len(chunks):
            chunks.append([])
        chunks[k].append(i)
        busy[owner[i]] += flops[i]
    for chunk in chunks:
        chunk.sort(key=lambda i: (owner[i], i))     # the order of messages, see ShardExchange
    return owner, chunks


class MuonPlan:
    """Who orthogonalises which matrix, and how many numbers each rank sends to each. It needs no
    GPU and no process group, so there are also plans for GPUs that are not there.

    The arguments, where i is a matrix:

    shapes[i]        (m, n), or (..., m, n) for a stack, which one rank owns
    shard_dims[i]    for each dimension of the mesh the dimension of matrix i that it cuts, or None
                     where it replicates: (0,) is rows over all ranks, (None, 0) is HSDP
    mesh             the ranks by their global numbers: torch.arange(8) for 8 shards of each matrix

    What follows from them, where k is a chunk, and r, s and owners are ranks, numbered from 0 by
    rising global number, as in a process group:

    owner[i]         the rank that orthogonalises matrix i
    chunks[k]        the matrices of chunk k, sorted by owner, then by i
    slices[i][r]     the part of matrix i that rank r holds
    is_sender[i][r]  whether rank r sends its shard of u to the owner of matrix i: all ranks do,
                     where there is one replica
    counts[name][k, r, s]  how many numbers of "u" or "O" of chunk k rank r sends to rank s, which
                     may be itself

    Two ranks, three matrices. Rank 0 owns the large one, rank 1 the two others. Each rank sends
    rank 0 its half of u of matrix 0, 16 numbers, and rank 1 its halves of matrices 1 and 2, 8 + 4
    numbers. Of O rank 0 sends 16 numbers to each rank, and rank 1 sends 12 to each:

    >>> shapes = [(4, 8), (4, 4), (2, 4)]
    >>> plan = MuonPlan(shapes, shard_dims=[(0,), (0,), (0,)], mesh=torch.arange(2))
    >>> plan.owner, plan.chunks
    ([0, 1, 1], [[0, 1, 2]])
    >>> plan.counts["u"][0].tolist(), plan.counts["O"][0].tolist()
    ([[16, 12], [16, 12]], [[16, 16], [12, 12]])

    Two replicas of two shards (HSDP). Each matrix has an owner among the four ranks, and only the
    owner's replica sends it u. Ranks 2 and 3 are the replica of matrix 2's owner:

    >>> plan = MuonPlan(shapes, shard_dims=3 * [(None, 0)], mesh=torch.tensor([[0, 1], [2, 3]]))
    >>> plan.owner, plan.is_sender[2]
    ([0, 1, 2], [False, False, True, True])
    >>> plan.counts["u"][0].tolist()
    [[16, 8, 0, 0], [16, 8, 0, 0], [0, 0, 4, 0], [0, 0, 4, 0]]
    """

    def __init__(self, shapes, shard_dims, mesh: Tensor):
        ranks = mesh.numel()
        self.shapes = shapes
        self.mesh = mesh
        self.owner, self.chunks = assign_owners(shapes, ranks)
        self.slices = [None] * len(shapes)
        self.is_sender = [None] * len(shapes)
        shape = (len(self.chunks), ranks, ranks)
        self.counts = {name: torch.zeros(shape, dtype=torch.int64) for name in ("u", "O")}

        # Where in the mesh each rank is: (ranks, dimensions of the mesh).
        global_ranks = sorted(mesh.flatten().tolist())
        coords = torch.stack([(mesh == r).nonzero()[0] for r in global_ranks])
        for k, chunk in enumerate(self.chunks):
            for i in chunk:
                self._plan_messages(k, i, shard_dims[i], coords)

    def _plan_messages(self, k: int, i: int, dims: tuple, coords: Tensor) -> None:
        """Add matrix i, which is in chunk k, to slices, is_sender and counts."""
        self.slices[i] = []
        sizes = []
        for coord in coords.tolist():
            shard = local_slices(self.shapes[i], self.mesh.shape, dims, coord)
            self.slices[i].append(shard)
            sizes.append(math.prod(cut.stop - cut.start for cut in shard))
        sizes = torch.tensor(sizes)                         # (ranks,)

        # The owner's replica sends u: it has the owner's coordinates in all dimensions of the mesh
        # that replicate the matrix. With one replica there is no such dimension, and all ranks
        # send.
        owner = self.owner[i]
        replicated = [d for d, dim in enumerate(dims) if dim is None]
        agrees = coords[:, replicated] == coords[owner, replicated]
        is_sender = agrees.all(1)                           # (ranks,)

        self.is_sender[i] = is_sender.tolist()
        self.counts["u"][k, :, owner] += sizes * is_sender
        self.counts["O"][k, owner, :] += sizes

    def shards(self, matrices: dict[int, Tensor]) -> Iterator:
        """Yield (r, i, a view of rank r's shard of matrix i), sorted by r, then by i: the order in
        which an owner receives u, from senders alone, and sends O (ShardExchange)."""
        for r in range(self.mesh.numel()):
            for i, matrix in matrices.items():
                yield r, i, matrix[self.slices[i][r]]


def replicas_per_muon_group(shapes, ranks: int, replicas: int) -> int:
    """Choose R, how many of the `replicas` share owners: the fewest with which the average rank has
    no more to do than the largest matrix takes, or all of them. With more, O goes to more ranks,
    and the step is no shorter, as the largest matrix sets its length. `ranks` counts the ranks of
    all replicas.

    Under HSDP each replica could do Parallel Muon by itself, but then all would do the same work.
    So R of them form a group, and a matrix has one owner in the group. The owner takes the shards
    of u from its own replica, which has all of them, and sends O to every rank of the group. Where
    the matrices have N numbers, and each replica is on C ranks, a rank owns N / (R C) numbers, and
    receives

        of u    N / (R C)  less  N / (R C^2), its own shards of what it owns
        of O    N / C      less  N / (R C^2)
    """
    flops = [newton_schulz_flops(shape) for shape in shapes]
    enough = sum(flops) / max(flops)                # ranks
    for R in range(1, replicas):
        if replicas % R == 0 and R * ranks / replicas >= enough:
            return R
    return replicas


# ---- The exchange

class ShardExchange:
    """Sends and receives what `plan` says for this rank: shards of u on their way to the owners,
    and shards of O on their way back. All ranks of the plan's mesh make one, for the same params:
    plan.shapes are theirs. dtype: of u and O.

    Messages carry numbers alone. In which order these stand, all ranks know from plan.chunks[k],
    which is sorted by (owner, i), where i is a matrix:

        u leaves a rank       by (owner, i), as in chunks[k]
        u reaches its owner   by (sender, i)
        O leaves its owner    by (receiver, i)
        O reaches a rank      by (owner, i), as in chunks[k] again
    """

    def __init__(self, plan: MuonPlan, params: list[Tensor], dtype: torch.dtype):
        ranks = sorted(plan.mesh.flatten().tolist())
        self.process_group = dist.group.WORLD
        if len(ranks) < dist.get_world_size():
            self.process_group = dist.new_group(ranks, use_local_synchronization=True)
        self.me = ranks.index(dist.get_rank())
        self.plan = plan
        self.params = params
        self.nothing = torch.empty(0, dtype=dtype, device=params[0].device)     # cat([]) would fail
        sends = [is_sender[self.me] for is_sender in plan.is_sender]
        self.this_rank_sends = torch.tensor(sends, device=params[0].device)
        self.under_way = {}

    def send(self, name: str, k: int, pieces: list[Tensor]) -> None:
        """Start the all-to-all of chunk k's "u" or "O". pieces: flat, sorted by who gets them."""
        counts = self.plan.counts[name][k]
        send_sizes = counts[self.me].tolist()
        receive_sizes = counts[:, self.me].tolist()
        message = torch.cat([self.nothing, *pieces])
        received = message.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(received, message, receive_sizes, send_sizes,
                                      group=self.process_group, async_op=True)
        self.under_way[name, k] = (work, received)

    def receive(self, name: str, k: int) -> Tensor:
        """Wait for what send() started, and free the buffer that was sent, which `work` holds. On a
        GPU only the stream waits, and the host goes on."""
        work, received = self.under_way.pop((name, k))
        work.wait()
        return received

    def send_u(self, k: int, optimizer: MuonClip, scalars: SimpleNamespace) -> None:
        """Add the gradients of chunk k to the momentum, and start to send u(k) to the owners. Every
        replica keeps the momentum, but only the owner's replica sends u."""
        pieces = []
        for i in self.plan.chunks[k]:
            u = optimizer.add_gradient(self.params[i], scalars)
            if self.plan.is_sender[i][self.me]:
                pieces.append(u.flatten())
        self.send("u", k, pieces)

    def gather_u(self, k: int) -> dict[int, Tensor]:
        """Wait for u(k) -> {i: the whole u} for the matrices of chunk k that this rank owns."""
        received = self.receive("u", k)
        whole_u = {}
        for i in self.plan.chunks[k]:
            if self.plan.owner[i] == self.me:
                whole_u[i] = received.new_empty(self.plan.shapes[i])

        shards = []
        for r, i, shard in self.plan.shards(whole_u):
            if self.plan.is_sender[i][r]:
                shards.append(shard)
        pieces = received.split([shard.numel() for shard in shards])
        for shard, piece in zip(shards, pieces):
            shard.copy_(piece.view_as(shard))
        return whole_u

    def send_O(self, k: int, whole_O: dict[int, Tensor]) -> None:
        """Start to send every rank its shards of the O that this rank has computed."""
        pieces = []
        for _, _, shard in self.plan.shards(whole_O):
            pieces.append(shard.flatten())
        self.send("O", k, pieces)

    def apply_O(self, k: int, optimizer: MuonClip, scalars: SimpleNamespace) -> None:
        """Wait for O(k), which comes in the order of chunks[k], and update this rank's shards of
        those weights."""
        params = [self.params[i] for i in self.plan.chunks[k]]
        sizes = [local_shard(p).numel() for p in params]
        for p, O_shard in zip(params, self.receive("O", k).split(sizes)):
            optimizer.apply_result(p, O_shard, scalars)

    def finish_update_rms(self, optimizer: MuonClip) -> None:
        """Make each update_rms that of the whole matrix: add up the squares of all ranks' parts,
        and take the root. Where there are several replicas, only the ranks that send to the owner
        count, since they hold every shard once."""
        partial_rms = torch.stack([optimizer.update_rms[p] for p in self.params])
        mean_square = partial_rms.square() * self.this_rank_sends
        dist.all_reduce(mean_square, group=self.process_group)
        for p, rms in zip(self.params, mean_square.sqrt()):
            optimizer.update_rms[p] = rms


def build_exchanges(matrices: list[Tensor], dtype: torch.dtype) -> list[ShardExchange]:
    """Plan the exchange of the matrices that lie in shards: one for each device mesh; with HSDP
    only among the replicas that share owners with this rank's replica."""
    by_mesh = {}
    for p in matrices:
        if is_spread(p):
            by_mesh.setdefault(p.device_mesh, []).append(p)

    exchanges = []
    for device_mesh, params in by_mesh.items():
        shapes = [p.shape for p in params]
        dims = [shard_dims(p) for p in params]

        # If the first dimension of the mesh replicates every matrix, this rank's group is R rows of
        # the mesh: of 4 replicas with R = 2, rows 0 and 1, or rows 2 and 3.
        mesh = device_mesh.mesh
        if all(d[0] is None for d in dims):
            R = replicas_per_muon_group(shapes, mesh.numel(), len(mesh))
            first_replica = device_mesh.get_coordinate()[0] // R * R
            mesh = mesh[first_replica:first_replica + R]

        plan = MuonPlan(shapes, dims, mesh)
        exchanges.append(ShardExchange(plan, params, dtype))
    return exchanges
