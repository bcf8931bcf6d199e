"""Fused operations of Motif-2: Triton kernels, each beside its plain PyTorch twin, which is exact,
runs everywhere and is what the kernel is tested against. model.py and muonclip.py call the
functions named here and know nothing of what is below.

    rms_norm, rope                   left to torch.compile, which fuses them with their neighbours
    poly_norm, poly_norm_mul         PolyNorm, and its product with the up projection
    causal_attention, grouped_differential_attention    with the largest logit per head
    differential_norm                signal - lambda x noise, per-head norm, scale
    linear_cross_entropy             loss over a large vocabulary, a few rows at a time
    symmetric                        products of Newton-Schulz, half of them computed
    linear_fp8                       a linear layer in FP8, scaled by row

"fp32 inside" means: computed in fp32 (float64 stays float64), returned in the input's dtype. The
kernels use no floating-point atomics: two runs give the same bits.

`python kernels.py [--json]` checks every kernel against float64, then times it on a GPU; on a CPU
it checks through Triton's interpreter and times nothing.
"""
import argparse
import functools
import json
import math
import os
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read by triton.jit
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU: slow, but a check
FUSED = True            # False: the plain twins everywhere, to compare with
try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                                    # the plain twins need none of it
    triton, jit, tl = None, lambda f: f, SimpleNamespace(constexpr=None)

LOSS_CHUNK = 4096       # rows of logits alive at once in linear_cross_entropy
CACHE_BLOCK = 2**18     # elements that plain PolyNorm works on at once: 1 MiB of fp32, an L2 cache
TILE = 128              # side of a square tile: of attention's queries, of dS, its gradient at the
                        # logits, and of symmetric's products
DS_BYTES = 3 * 2**30    # of dS at once, and at least a pair of heads: two pairs at 16,384 tokens
LN2 = math.log(2)


def wide(t: Tensor) -> Tensor:
    """t in fp32, or in float64 where it is that already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def fused(x: Tensor) -> bool:
    """Whether the Triton form takes x; else the plain twin does."""
    return FUSED and triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def is_hopper(device: torch.device) -> bool:
    """Whether it has TMA and wgmma."""
    return torch.cuda.get_device_capability(device)[0] == 9


def operator(shapes, changes=()):
    """Makes a function that calls kernels one operator of torch, motif::its_name, which
    torch.compile passes through whole; shapes(...) returns its outputs with nothing in them,
    changes names the arguments that it writes to."""
    def register(function):
        if triton is None:
            return function

        @functools.wraps(function)
        def there(first, *rest):                        # Triton launches on the current device
            with torch.cuda.device_of(first):
                return function(first, *rest)
        made = torch.library.custom_op(f"motif::{function.__name__}", there, mutates_args=changes)
        made.register_fake(shapes)
        return made
    return register


def resident(x: Tensor, count: int) -> int:
    """How many programs a grid that stays has: `count` for each multiprocessor of x's GPU."""
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return count * sms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension: (..., n), (n,) -> (..., n).
    No +1 on the weight; fp32 inside."""
    return F.rms_norm(wide(x), x.shape[-1:], wide(weight), eps).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-rotation form: feature i turns with feature i + D/2 by one angle.
    x (B, T, heads, D), cos and sin (B or 1, T, 1, D/2) in fp32 -> x's shape; fp32 inside."""
    a, b = wide(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ---- PolyNorm

def plain_poly_norm_forward(x, up, weight, bias, eps):
    (w0, w1, w2), b = wide(weight), wide(bias)
    out, r = torch.empty_like(x), x.new_empty(len(x), 3, dtype=w0.dtype)
    for x_, up_, out_, r_ in row_blocks(x, up, out, r):
        x_ = wide(x_)
        x2 = x_ * x_
        for power, r_p in zip((x_, x2, x2 * x_), r_.unbind(-1)):
            square = torch.linalg.vector_norm(power, dim=-1).square() / x.shape[-1]
            r_p.copy_((square + eps).rsqrt())
        r1, r2, r3 = r_.split(1, dim=-1)
        y = horner(x_, b, w2 * r1, w1 * r2, w0 * r3)
        out_.copy_(y if up is None else y.mul_(up_))
    return out, r


def plain_poly_norm_backward(d, x, up, weight, bias, r):
    (w0, w1, w2), b, n = wide(weight), wide(bias), x.shape[-1]
    dx, d_up = torch.empty_like(x), torch.empty_like(x[:0] if up is None else x)
    sums = r.new_zeros(4)                                              # of dw0, dw1, dw2, db
    for x_, up_, d_, dx_, d_up_, r_ in row_blocks(x, up, d, dx, d_up, r):
        x_, g, (r1, r2, r3) = wide(x_), wide(d_), r_.split(1, dim=-1)  # g = dL/dy
        if up is not None:
            d_up_.copy_(horner(x_, b, w2 * r1, w1 * r2, w0 * r3).mul_(g))
            g = g * up_
        gx, x2 = g * x_, x_ * x_
        s1 = r1 * gx.sum(-1, keepdim=True)
        s2 = r2 * torch.linalg.vecdot(g, x2).unsqueeze(-1)
        s3 = r3 * torch.linalg.vecdot(gx, x2).unsqueeze(-1)
        k1, k2, k3 = w2 * r1**2 * s1 / n, 2 * w1 * r2**2 * s2 / n, 3 * w0 * r3**2 * s3 / n
        slope = horner(x_, w2 * r1, 2 * w1 * r2, 3 * w0 * r3).mul_(g)
        dx_.copy_(slope.addcmul_(x_, horner(x2, k1, k2, k3), value=-1))
        sums += torch.stack([s3.sum(), s2.sum(), s1.sum(), g.sum()])
    return dx, d_up, sums


def row_blocks(*tensors: Tensor | None):
    """The same rows of every (R, ...) tensor, CACHE_BLOCK elements of the first at a time."""
    rows = max(1, CACHE_BLOCK // tensors[0].shape[-1])
    for i in range(0, len(tensors[0]), rows):
        yield [None if t is None else t[i:i + rows] for t in tensors]


def horner(x: Tensor, *c: Tensor) -> Tensor:
    """c[0] + x (c[1] + x (...)): no power of x is formed, so that |x| = 3e5 keeps its precision. In
    place, as two rows of coefficients in one addcmul take a path that is three times slower."""
    y = x * c[-1]
    for coefficient in reversed(c[1:-1]):
        y = y.add_(coefficient).mul_(x)
    return y.add_(c[0])


@jit
def poly_norm_forward_kernel(x, up, weight, bias, out, r, n, x_stride, up_stride, eps,
                             GATED: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    z = tl.load(x + row * x_stride + i, mask=i < n, other=0).to(tl.float32)
    z2 = z * z
    r1 = tl.rsqrt(tl.sum(z2) / n + eps)
    r2 = tl.rsqrt(tl.sum(z2 * z2) / n + eps)
    r3 = tl.rsqrt(tl.sum(z2 * z2 * z2) / n + eps)
    c1 = tl.load(weight + 2).to(tl.float32) * r1
    c2 = tl.load(weight + 1).to(tl.float32) * r2
    c3 = tl.load(weight).to(tl.float32) * r3
    y = z * (c1 + z * (c2 + z * c3)) + tl.load(bias).to(tl.float32)
    if GATED:
        y *= tl.load(up + row * up_stride + i, mask=i < n, other=0).to(tl.float32)
    tl.store(out + row * n + i, y.to(out.dtype.element_ty), mask=i < n)
    tl.store(r + row * 3, r1)
    tl.store(r + row * 3 + 1, r2)
    tl.store(r + row * 3 + 2, r3)


@jit
def poly_norm_backward_kernel(d, x, up, weight, bias, r, dx, d_up, sums, n, d_stride, x_stride,
                              up_stride, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """Two passes over a row, the second from the caches; d_up is written in the first, so that
    both read and write. Sums of g x^p are kept lane by lane: one reduction per row."""
    row = tl.program_id(0).to(tl.int64)
    r1, r2, r3 = tl.load(r + row * 3), tl.load(r + row * 3 + 1), tl.load(r + row * 3 + 2)
    c1 = tl.load(weight + 2).to(tl.float32) * r1
    c2 = tl.load(weight + 1).to(tl.float32) * r2
    c3 = tl.load(weight).to(tl.float32) * r3
    b = tl.load(bias).to(tl.float32)
    g0 = tl.zeros((BLOCK,), tl.float32)
    g1, g2, g3 = g0, g0, g0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * x_stride + i, i < n, 0, eviction_policy="evict_last").to(tl.float32)
        g = tl.load(d + row * d_stride + i, i < n, 0, eviction_policy="evict_last").to(tl.float32)
        if GATED:
            u = tl.load(up + row * up_stride + i, i < n, 0, eviction_policy="evict_last")
            y = z * (c1 + z * (c2 + z * c3)) + b
            tl.store(d_up + row * n + i, (g * y).to(d_up.dtype.element_ty), i < n,
                     eviction_policy="evict_first")
            g *= u.to(tl.float32)
        g0 += g
        g *= z
        g1 += g
        g *= z
        g2 += g
        g3 += g * z
    s1, s2, s3 = r1 * tl.sum(g1), r2 * tl.sum(g2), r3 * tl.sum(g3)
    k1, k2, k3 = c1 * r1 * s1 / n, 2 * c2 * r2 * s2 / n, 3 * c3 * r3 * s3 / n
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * x_stride + i, i < n, 0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(d + row * d_stride + i, i < n, 0, eviction_policy="evict_first").to(tl.float32)
        if GATED:
            u = tl.load(up + row * up_stride + i, i < n, 0, eviction_policy="evict_first")
            g *= u.to(tl.float32)
        z2 = z * z
        slope = g * (c1 + z * (2 * c2 + z * (3 * c3))) - z * (k1 + z2 * (k2 + z2 * k3))
        tl.store(dx + row * n + i, slope.to(dx.dtype.element_ty), i < n,
                 eviction_policy="evict_first")
    rows = tl.num_programs(0)                       # sums (4, rows): each added up in one stretch
    tl.store(sums + row, s3)
    tl.store(sums + rows + row, s2)
    tl.store(sums + 2 * rows + row, s1)
    tl.store(sums + 3 * rows + row, tl.sum(g0))


@operator(lambda x, up, weight, bias, eps: (x.new_empty(x.shape), row_numbers(x, 3)))
def poly_norm_forward(x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor,
                      eps: float) -> tuple[Tensor, Tensor]:
    (rows, n), gated = x.shape, up is not None
    out, r = x.new_empty(x.shape), row_numbers(x, 3)
    if rows:
        block = triton.next_power_of_2(n)
        poly_norm_forward_kernel[(rows,)](
            x, up, weight, bias, out, r, n, x.stride(0), up.stride(0) if gated else 0, eps,
            GATED=gated, BLOCK=block, num_warps=min(max(block // 2048, 4), 16))
    return out, r


@operator(lambda d, x, up, weight, bias, r: (torch.empty_like(x), torch.empty_like(
    x[:0] if up is None else x), r.new_empty(4)))
def poly_norm_backward(d: Tensor, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor,
                       r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (rows, n), gated = x.shape, up is not None
    dx, d_up = torch.empty_like(x), torch.empty_like(x if gated else x[:0])
    sums = r.new_empty(4, rows)
    if rows:
        block = 4096 if n > 2048 else min(triton.next_power_of_2(n), 1024)
        poly_norm_backward_kernel[(rows,)](
            d, x, up, weight, bias, r, dx, d_up, sums, n, d.stride(0), x.stride(0),
            up.stride(0) if gated else 0, GATED=gated, BLOCK=block, num_warps=max(block // 512, 4))
    return dx, d_up, sums.sum(1)


def row_numbers(x: Tensor, count: int) -> Tensor:
    """Room for `count` fp32 numbers per row of x. (len(x) would be a number to torch.compile.)"""
    return x.new_empty(x.shape[0], count, dtype=torch.float32)


class PolyNormMul(torch.autograd.Function):
    """out = polynorm(x) * up over rows (R, n), with the closed-form gradient of poly_norm_mul.
    Saves x, up and three numbers a row, and recomputes the rest."""

    @staticmethod
    def forward(ctx, x, up, weight, bias, eps):
        forward = poly_norm_forward if fused(x) else plain_poly_norm_forward
        out, r = forward(x, up, weight, bias, eps)
        ctx.save_for_backward(x, up, weight, bias, r)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        x, up, weight, bias, r = ctx.saved_tensors
        backward = poly_norm_backward if fused(x) else plain_poly_norm_backward
        dx, d_up, sums = backward(last_dense(d), x, up, weight, bias, r)
        d_up = None if up is None else d_up
        return dx, d_up, sums[:3].to(weight.dtype), sums[3:].to(bias.dtype), None


def last_dense(t: Tensor) -> Tensor:
    """t, copied if its last dimension is strided: what the row kernels read."""
    return t if t.stride(-1) == 1 else t.contiguous()


def poly_norm_mul(x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PolyNorm(x) * up: x, up (..., n), weight (3,) = cubic, square, linear, bias (1,) -> (..., n).

        r_p = 1 / sqrt(mean(x^2p) + eps)       y = x (w2 r1 + x (w1 r2 + x w0 r3)) + b
        g = dL/dy, s_p = r_p sum(g x^p), k1 = w2 r1^2 s1/n, k2 = 2 w1 r2^2 s2/n, k3 = 3 w0 r3^2 s3/n
        dx = g (w2 r1 + x (2 w1 r2 + x 3 w0 r3)) - x (k1 + x^2 (k2 + x^2 k3))
        dw0, dw1, dw2, db = sums over the rows of s3, s2, s1, g

    fp32 inside. Source: PolyCom (arXiv 2411.03884)."""
    rows = [t if t is None else last_dense(t.reshape(-1, x.shape[-1])) for t in (x, up)]
    return PolyNormMul.apply(*rows, last_dense(weight), bias, eps).view(x.shape)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """poly_norm_mul without the product."""
    return poly_norm_mul(x, None, weight, bias, eps)


def poly_norm_mul_by_definition(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor,
                                eps: float) -> Tensor:
    """(w0 n(x^3) + w1 n(x^2) + w2 n(x) + b) * up, n(z) = z / sqrt(mean(z^2) + eps), the gradient
    left to autograd: what poly_norm_mul is measured against."""
    powers = [z / (z.square().mean(-1, keepdim=True) + eps).sqrt() for z in (x**3, x**2, x)]
    return (sum(w * z for w, z in zip(weight, powers)) + bias) * up


# ---- attention

def plain_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None):
    """See causal_attention. Softmax in fp32; the products, logits among them, in q's dtype."""
    T, h, D, S = q.shape[1], q.shape[3], q.shape[4], k.shape[1]
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    if starts is not None:
        before = torch.arange(S, device=q.device) < starts[:, :, None]   # (B, T, S)
        hidden = (hidden | before)[:, None, None]
    q = (q * D**-0.5).permute(0, 2, 3, 1, 4).flatten(2, 3)               # (B, K, hT, D)
    logits = wide(q @ k.permute(0, 2, 3, 1)).unflatten(2, (h, T))        # (B, K, h, T, S)
    mask = torch.zeros_like(hidden, dtype=logits.dtype).masked_fill_(hidden, -torch.inf)
    logits = logits.add_(mask)
    largest = logits.detach().amax(dim=(0, 3, 4))
    p = logits.softmax(-1).to(v.dtype).flatten(2, 3)                     # (B, K, hT, S)
    out = (p @ v.transpose(1, 2)).unflatten(2, (h, T))                   # (B, K, h, T, Dv)
    return out.permute(0, 3, 1, 2, 4), largest


# The fused form. q's H = P GP (R + N) heads are P pairs of GP groups of R signal heads and N (0 or
# 1) noise heads. Pair p's values are value head p, its signal keys key head (1 + N) p, its noise
# keys the next. q, k and v are read as matrices (B T, heads D) through TMA descriptors.
# p = exp2(c q k^T - lse) with c = log2(e) / sqrt(D): log-sum-exps are in base 2. lse and delta are
# (B H, T rounded up to TILE); beyond T lse is inf, so that p is 0 there, and delta 0. (But a NaN
# at the beginning of one sequence reaches the sequence before it, through 0 x NaN.)
#
# The backward pass keeps dS between the kernel of dK and that of dQ: five products, where
# recomputing it in both takes seven, and no atomics. It is transposed: a tile has TILE rows of keys
# by TILE columns of queries. Tile (t, s), queries t, keys s <= t, is number t (t + 1) / 2 + s of
# its head.

@jit
def attend_sweep(Q, acc, most, total, k, v, row, k_col, v_col, m, begin, lo, hi, c,
                 MASKED: tl.constexpr, BN: tl.constexpr):
    """Online softmax of the query rows m over the keys lo to hi."""
    for n0 in range(lo, hi, BN):
        s = tl.dot(Q, k.load([row + n0, k_col]).T)
        if MASKED:
            n = (n0 + tl.arange(0, BN))[None, :]
            s = tl.where((n <= m[:, None]) & (n >= begin[:, None]), s, float("-inf"))
        new = tl.maximum(most, tl.max(s, 1) * c)
        p = tl.exp2(s * c - new[:, None])
        shrink = tl.exp2(most - new)
        total = total * shrink + tl.sum(p, 1)
        V = v.load([row + n0, v_col])
        acc = tl.dot(p.to(V.dtype), V, acc * shrink[:, None])
        most = new
    return acc, most, total


@jit
def attend(q, k, v, starts, signal, noise, lse, top, T, H, c, R: tl.constexpr, N: tl.constexpr,
           GP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr):
    """One block of query rows of one head; the longest blocks come first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    group, i = h // (R + N), h % (R + N)
    pair, part = group // GP, i // R                     # part: 0 signal, 1 noise
    m0 = block * BM
    m = m0 + tl.arange(0, BM)
    k_col, v_col = (pair * (1 + N) + part) * D, pair * DV
    Q = q.load([b * T + m0, h * D])
    acc = tl.zeros([BM, DV], tl.float32)
    most = tl.full([BM], -1e38, tl.float32)
    total = tl.zeros([BM], tl.float32)
    begin = tl.zeros([BM], tl.int32)
    hi = tl.minimum(m0 + BM, T)
    if starts is None:
        lo = m0 // BN * BN
        acc, most, total = attend_sweep(Q, acc, most, total, k, v, b * T, k_col, v_col, m,
                                        begin, 0, lo, c, False, BN)
    else:
        lo = tl.load(starts + b * T + m0) // BN * BN
        begin = tl.load(starts + b * T + m, m < T, 0)
    acc, most, total = attend_sweep(Q, acc, most, total, k, v, b * T, k_col, v_col, m, begin,
                                    lo, hi, c, True, BN)
    L = tl.where(m < T, most + tl.log2(total), float("inf"))
    tl.store(lse + tl.cast(bh, tl.int64) * (tl.num_programs(0) * BM) + m, L)
    tl.store(top + bh * tl.num_programs(0) + block,
             tl.max(tl.where(m < T, most, float("-inf")), 0))
    heads = H // (R + N)
    if part == 0:
        out, heads, index = signal, heads * R, group * R + i
    else:
        out, heads, index = noise, heads, group
    out += (tl.cast(b * T + m0, tl.int64) * heads + index) * DV
    at = tl.arange(0, BM)[:, None] * (heads * DV) + tl.arange(0, DV)[None, :]
    tl.store(out + at, (acc / total[:, None]).to(signal.dtype.element_ty), (m < T)[:, None])


@jit
def attend_delta(signal, noise, d_signal, d_noise, delta, T, H, R: tl.constexpr,
                 N: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr):
    """delta = sum of out * d_out over each row: (B, H, T)."""
    bh, m = tl.program_id(1), tl.program_id(0) * BM + tl.arange(0, BM)
    b, h = tl.cast(bh // H, tl.int64), bh % H
    group, i = h // (R + N), h % (R + N)
    heads = H // (R + N)
    if i // R == 0:
        out, d_out, heads, index = signal, d_signal, heads * R, group * R + i
    else:
        out, d_out, heads, index = noise, d_noise, heads, group
    at = ((b * T + m)[:, None] * heads + index) * DV + tl.arange(0, DV)[None, :]
    x = tl.load(out + at, (m < T)[:, None], 0.).to(tl.float32)
    d = tl.load(d_out + at, (m < T)[:, None], 0.).to(tl.float32)
    tl.store(delta + tl.cast(bh, tl.int64) * (tl.num_programs(0) * BM) + m, tl.sum(x * d, 1))


@jit
def attend_keys_sweep(K, V, dK, dV, q, d_out, lse, delta, ds, ds_row, row, head, pair, n0, end,
                      lo, hi, T, c, PART: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr,
                      N: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
                      KEYS: tl.constexpr, VALUES: tl.constexpr):
    """dK and dV of one block of keys from the query rows lo to hi of all heads of a part."""
    per: tl.constexpr = 1 if PART else R                  # heads of this part in a group
    blocks = (hi - lo + BM - 1) // BM
    tiles = (T + TILE - 1) // TILE
    tiles = tiles * (tiles + 1) // 2
    for step in range(0, GP * per * blocks):
        a, m0 = step // blocks, lo + step % blocks * BM
        h = a // per * (R + N) + PART * R + a % per       # within the pair
        m = m0 + tl.arange(0, BM)
        Q = q.load([row + m0, (pair * (GP * (R + N)) + h) * D])
        dO = d_out.load([row + m0, (pair * (GP * per) + a) * DV])
        L = lse.load([head + h, m0]).reshape(BM)          # inf beyond T
        p = tl.exp2(tl.dot(K, Q.T) * c - L[None, :])      # transposed: (BN, BM)
        if MASKED:
            n = (n0 + tl.arange(0, BN))[:, None]
            p = tl.where((n <= m[None, :]) & (m[None, :] < end[:, None]), p, 0.)
        if VALUES:
            dV = tl.dot(p.to(dO.dtype), dO, dV)
        if KEYS:
            gap = tl.dot(V, dO.T) - delta.load([head + h, m0]).reshape(1, BM)
            dS = (p * gap).to(Q.dtype)
            t = m0 // TILE
            tile = h * tiles + t * (t + 1) // 2 + n0 // TILE
            ds.store([ds_row + tile * TILE + n0 % TILE, m0 % TILE], dS)
            dK = tl.dot(dS, Q, dK)
    return dK, dV


@jit
def attend_keys(q, k, v, ends, d_signal, d_noise, lse, delta, dk, dv, ds, first, T, P,
                c, scale, R: tl.constexpr, N: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
                DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
                KEYS: tl.constexpr, VALUES: tl.constexpr):
    """One block of keys of one pair: its dK (signal and noise), its dV, its columns of dS."""
    at = tl.program_id(1)                                 # a pair of a row of the batch
    b, pair = (first + at) // P, (first + at) % P
    n0 = tl.program_id(0) * BN
    n = tl.arange(0, BN)
    heads: tl.constexpr = GP * (R + N)
    head = (b * P + pair) * heads
    tiles = (T + TILE - 1) // TILE
    ds_row = at * heads * (tiles * (tiles + 1) // 2) * TILE
    lo = n0 // TILE * TILE            # from the tile's corner, also where every query comes before
                                      # these keys: attend_queries reads whole tiles, zeros too
    if ends is None:
        middle = tl.minimum(lo + TILE, T)
        end = tl.full([BN], 2**31 - 1, tl.int32)
    else:                                                 # of the run that each key is in
        end = tl.load(ends + b * T + n0 + n, n0 + n < T, 0)
        middle = tl.minimum((tl.max(end, 0) + TILE - 1) // TILE * TILE, T)
    V = v.load([b * T + n0, pair * DV]) if KEYS else 0
    dV = tl.zeros([BN, DV], tl.float32) if VALUES else 0
    out_row = tl.cast(b * T + n0, tl.int64)
    for PART in tl.static_range(1 + N):
        key_head = pair * (1 + N) + PART
        K = k.load([b * T + n0, key_head * D])
        dK = tl.zeros([BN, D], tl.float32) if KEYS else 0
        d_out = d_noise if PART else d_signal
        dK, dV = attend_keys_sweep(K, V, dK, dV, q, d_out, lse, delta, ds, ds_row, b * T,
                                   head, pair, n0, end, lo, middle, T, c, PART, True, R, N, GP,
                                   D, DV, BM, BN, TILE, KEYS, VALUES)
        if ends is None:
            dK, dV = attend_keys_sweep(K, V, dK, dV, q, d_out, lse, delta, ds, ds_row, b * T,
                                       head, pair, n0, end, middle, T, T, c, PART, False, R, N,
                                       GP, D, DV, BM, BN, TILE, KEYS, VALUES)
        if KEYS:
            to = dk + (out_row * (P * (1 + N)) + key_head) * D
            to += n[:, None] * (P * (1 + N) * D) + tl.arange(0, D)[None, :]
            tl.store(to, (dK * scale).to(dk.dtype.element_ty), (n0 + n < T)[:, None])
    if VALUES:
        to = dv + (out_row * P + pair) * DV + n[:, None] * (P * DV) + tl.arange(0, DV)[None, :]
        tl.store(to, dV.to(dv.dtype.element_ty), (n0 + n < T)[:, None])


@jit
def attend_queries(ds, k, starts, dq, first, T, P, scale, R: tl.constexpr, N: tl.constexpr,
                   GP: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr):
    """dQ = dS K / sqrt(D): one row of tiles of one head."""
    heads: tl.constexpr = GP * (R + N)
    t, at = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    b, pair, h = (first + at // heads) // P, (first + at // heads) % P, at % heads
    k_col = (pair * (1 + N) + h % (R + N) // R) * D
    tiles = (T + TILE - 1) // TILE
    ds_row = (at * (tiles * (tiles + 1) // 2) + t * (t + 1) // 2) * TILE
    lo = 0                     # Every BN keys from lo on hold one whose document reaches row t TILE
    if starts is not None:     # or beyond: attend_keys, whose blocks BN divides, has written them.
        lo = tl.load(starts + b * T + t * TILE) // BN * BN
    acc = tl.zeros([TILE, D], tl.float32)
    for n0 in range(lo, tl.minimum(t * TILE + TILE, T), BN):
        acc = tl.dot(ds.load([ds_row + n0, 0]).T, k.load([b * T + n0, k_col]), acc)
    rows = tl.arange(0, TILE)
    to = dq + (tl.cast(b * T + t * TILE, tl.int64) * (P * heads) + pair * heads + h) * D
    to += rows[:, None] * (P * heads * D) + tl.arange(0, D)[None, :]
    tl.store(to, (acc * scale).to(dq.dtype.element_ty), (t * TILE + rows < T)[:, None])


def attention_shape(q: Tensor, k: Tensor, noise_heads: int) -> dict:
    """The kernels' R, N and GP of q (B, T, H, D) and k (B, T, K, D)."""
    N, groups = min(noise_heads, 1), noise_heads or k.shape[2]
    return dict(R=q.shape[2] // groups - N, N=N, GP=groups * (1 + N) // k.shape[2], D=q.shape[3])


def matrix(x: Tensor) -> Tensor:
    """(B, T, ...) -> (B T, all), a view where x allows it; rows begin at multiples of 16 bytes."""
    x = x.reshape(x.shape[0] * x.shape[1], -1)
    aligned = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def tma(x: Tensor, *block: int):
    return TensorDescriptor.from_tensor(x, list(block))


def attention_outputs(q, k, v, starts, noise_heads):
    (B, T, H), N = q.shape[:3], min(noise_heads, 1)
    P, DV = v.shape[2:]
    groups = noise_heads or P
    signal, noise = (q.new_empty(B, T, groups, n, DV) for n in (H // groups - N, N))
    lse, largest = (q.new_empty(shape, dtype=torch.float32)
                    for shape in ((B * H, -(-T // TILE) * TILE), (H,)))
    return signal, noise, lse, largest


@operator(attention_outputs)
def attention_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None,
                      noise_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> signal, noise, log-sum-exps (B H, T) in base 2, largest logit of each head (H,)."""
    (B, T, H, D), shape = q.shape, attention_shape(q, k, noise_heads)
    signal, noise, lse, _ = attention_outputs(q, k, v, starts, noise_heads)
    DV, blocks = signal.shape[-1], lse.shape[1] // TILE
    BN, stages = (128, 2) if DV > D else (64, 3)
    top = q.new_empty(B, H, blocks, dtype=torch.float32)
    attend[blocks, B * H](
        tma(matrix(q), TILE, D), tma(matrix(k), BN, D), tma(matrix(v), BN, DV), starts, signal,
        noise, lse, top, T, H, D**-0.5 / LN2, **shape, DV=DV, BM=TILE, BN=BN, num_warps=8,
        num_stages=stages)
    return signal, noise, lse, top.amax((0, 2)) * LN2


@operator(lambda d_signal, d_noise, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
def attention_backward(d_signal: Tensor, d_noise: Tensor, q: Tensor, k: Tensor, v: Tensor,
                       starts: Tensor | None, noise_heads: int, signal: Tensor, noise: Tensor,
                       lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, D), shape = q.shape, attention_shape(q, k, noise_heads)
    DV, blocks = signal.shape[-1], lse.shape[1] // TILE
    P = k.shape[2] // (1 + shape["N"])
    d_signal, d_noise = d_signal.contiguous(), d_noise.contiguous()
    delta = torch.empty_like(lse)
    attend_delta[lse.shape[1] // 16, B * H](
        signal, noise, d_signal, d_noise, delta, T, H, R=shape["R"], N=shape["N"], DV=DV, BM=16,
        num_warps=4)
    ends = None
    if starts is not None:                                   # of the document that a token is in
        order = torch.arange(T, device=q.device, dtype=torch.int32).expand(B, T).contiguous()
        ends = torch.searchsorted(starts, order, right=True, out_int32=True)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    q, k, v = matrix(q), matrix(k), matrix(v)
    rows = H // P * blocks * (blocks + 1) // 2 * TILE        # of dS, for one pair
    pairs = min(B * P, max(1, DS_BYTES // (rows * TILE * q.element_size())))
    ds = q.new_empty(pairs * rows, TILE)
    # dK and dV in one launch where both fit the registers: BM, BN, warps, stages
    launches = {(True, True): (64, 64, 4, 2)} if D + DV <= 192 else {
        (False, True): (64, 128, 8, 3), (True, False): (64, 128, 8, 2)}
    for (keys, values), (BM, BN, warps, stages) in launches.items():
        together = pairs if keys else B * P
        d_outs = [tma(matrix(d), BM, DV) for d in (d_signal, d_noise if shape["N"] else d_signal)]
        for first in range(0, B * P, together):
            n = min(together, B * P - first)
            attend_keys[triton.cdiv(T, BN), n](
                tma(q, BM, D), tma(k, BN, D), tma(v, BN, DV), ends, *d_outs, tma(lse, 1, BM),
                tma(delta, 1, BM), dk, dv, tma(ds, BN, BM), first, T, P, D**-0.5 / LN2, D**-0.5,
                **shape, DV=DV, BM=BM, BN=BN, TILE=TILE, KEYS=keys, VALUES=values,
                num_warps=warps, num_stages=stages)
            if keys:
                attend_queries[blocks, n * (H // P)](
                    tma(ds, 64, TILE), tma(k, 64, D), starts, dq, first, T, P, D**-0.5, **shape,
                    BN=64, TILE=TILE, num_warps=4, num_stages=3)
    return dq, dk, dv


class FusedAttention(torch.autograd.Function):
    """Signal, noise and largest logits; see grouped_differential_attention."""

    @staticmethod
    def forward(ctx, q, k, v, starts, noise_heads):
        starts = None if starts is None else starts.int().contiguous()
        signal, noise, lse, largest = attention_forward(q, k, v, starts, noise_heads)
        ctx.noise_heads = noise_heads
        ctx.save_for_backward(q, k, v, starts, signal, noise, lse)
        ctx.mark_non_differentiable(largest)
        return signal, noise, largest

    @staticmethod
    @once_differentiable
    def backward(ctx, d_signal, d_noise, _):
        q, k, v, starts, *outputs = ctx.saved_tensors
        return *attention_backward(d_signal, d_noise, q, k, v, starts, ctx.noise_heads,
                                   *outputs), None, None


def attention_is_fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """The kernels want Hopper's TMA, half precision, heads of 16 to 128, and no cached keys."""
    hopper = INTERPRET or q.is_cuda and is_hopper(q.device)
    return (fused(q) and hopper and (INTERPRET or q.dtype != torch.float32)
            and q.dtype == k.dtype == v.dtype and q.shape[1] == k.shape[1]
            and v.shape[-1] in (q.shape[-1], 2 * q.shape[-1]) and q.shape[-1] in (16, 32, 64, 128))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None):
    """softmax(q k^T / sqrt D, causal) v, every key head serving h query heads.

    q (B, T, K, h, D), k (B, S, K, D), v (B, S, K, Dv) -> out (B, T, K, h, Dv), largest visible
    logit (K, h). Query t stands at position S - T + t, so that cached keys may come first.
    starts (B, T) int32, for S = T only: where each token's document begins, a run of tokens that
    sees itself alone."""
    if attention_is_fused(q, k, v):
        out, _, largest = FusedAttention.apply(q.flatten(2, 3), k, v, starts, 0)
        return out, largest.view(q.shape[2:4])
    return plain_attention(q, k, v, starts)


def grouped_differential_attention(q: Tensor, k: Tensor, v: Tensor, num_noise_heads: int,
                                   starts: Tensor | None = None):
    """The two softmaxes of grouped differential attention (arXiv 2510.06949), before lambda.

    G noise heads, r signal heads for each, P pairs of key heads (P divides G):
    q (B, T, G(r+1), D), each group its r signal heads and then its noise head; k (B, S, 2P, D), key
    heads (signal, noise) by pair; v (B, S, P, 2D), the value heads of a pair side by side.
        signal = softmax(q1 k1^T / sqrt D) v    noise = softmax(q2 k2^T / sqrt D) v
    starts: see causal_attention.
    -> signal (B, T, G, r, 2D), noise (B, T, G, 1, 2D), largest logit per query head (G(r+1),)."""
    if attention_is_fused(q, k, v):
        return FusedAttention.apply(q, k, v, starts, num_noise_heads)
    B, T, H, D = q.shape
    G, P = num_noise_heads, k.shape[2] // 2
    q = q.unflatten(2, (G, H // G))                                      # (B, T, G, r+1, D)
    k = k.unflatten(2, (P, 2))                                           # (B, S, P, 2, D)
    outs, largest = [], []
    for q_i, k_i in (q[:, :, :, :-1], k[:, :, :, 0]), (q[:, :, :, -1:], k[:, :, :, 1]):
        shared = q_i.reshape(B, T, P, -1, D)                             # all heads of one pair
        out, top = plain_attention(shared, k_i, v, starts)
        outs.append(out.reshape(B, T, G, -1, 2 * D))
        largest.append(top.view(G, -1))
    return *outs, torch.cat(largest, dim=1).flatten()


@jit
def differential_norm_forward_kernel(signal, noise, lambda_, weight, out, groups, r, width, eps,
                                     GROUPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """A program takes GROUPS noise heads and the r signal heads of each: (GROUPS, R, W)."""
    g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None, None]
    h, i = tl.arange(0, R)[None, :, None], tl.arange(0, W)[None, None, :]
    one, at = (g < groups) & (i < width), (g * r + h) * width + i
    gamma = tl.load(weight + i, mask=i < width, other=0).to(tl.float32)
    z = tl.load(signal + at, mask=one & (h < r), other=0).to(tl.float32)
    o = tl.load(noise + g * width + i, mask=one, other=0).to(tl.float32)
    z -= tl.load(lambda_).to(tl.float32) * o
    z *= tl.rsqrt(tl.sum(z * z, 2, keep_dims=True) / width + eps) * gamma
    tl.store(out + at, z.to(out.dtype.element_ty), mask=one & (h < r))


@jit
def differential_norm_backward_kernel(d, signal, noise, lambda_, weight, d_signal, d_noise, sums,
                                      groups, r, width, eps, GROUPS: tl.constexpr,
                                      R: tl.constexpr, W: tl.constexpr):
    """Programs that stay, each taking every so many'th GROUPS. With n = z / rms(z), z = signal -
    lambda noise:  dn = d gamma,  dz = (dn - n mean(dn n)) / rms,  sums of d n and of -dz noise,
    which are kept lane by lane: no thread waits for another in the loop."""
    h, i = tl.arange(0, R)[None, :, None], tl.arange(0, W)[None, None, :]
    l = tl.load(lambda_).to(tl.float32)
    gamma = tl.load(weight + i, mask=i < width, other=0).to(tl.float32)
    d_gamma = tl.zeros((GROUPS, 1, W), tl.float32)
    d_lambda = tl.zeros((GROUPS, 1, W), tl.float32)
    for first in range(tl.program_id(0).to(tl.int64) * GROUPS, groups, tl.num_programs(0) * GROUPS):
        g = first + tl.arange(0, GROUPS)[:, None, None]
        one, at = (g < groups) & (i < width), (g * r + h) * width + i
        o = tl.load(noise + g * width + i, mask=one, other=0).to(tl.float32)
        z = tl.load(signal + at, mask=one & (h < r), other=0).to(tl.float32) - l * o
        dn = tl.load(d + at, mask=one & (h < r), other=0).to(tl.float32)
        rms = tl.rsqrt(tl.sum(z * z, 2, keep_dims=True) / width + eps)
        z *= rms
        d_gamma += tl.sum(dn * z, 1, keep_dims=True)
        dn *= gamma
        dz = rms * (dn - z * (tl.sum(dn * z, 2, keep_dims=True) / width))
        tl.store(d_signal + at, dz.to(d_signal.dtype.element_ty), mask=one & (h < r))
        dz = tl.sum(tl.where(h < r, dz, 0.0), 1, keep_dims=True)
        tl.store(d_noise + g * width + i, (-l * dz).to(d_noise.dtype.element_ty), mask=one)
        d_lambda -= dz * o
    at = sums + tl.program_id(0) * 2 * width + i
    tl.store(at, tl.sum(d_gamma, 0, keep_dims=True), mask=i < width)
    tl.store(at + width, tl.sum(d_lambda, 0, keep_dims=True), mask=i < width)


@operator(lambda signal, noise, lambda_, weight, eps: torch.empty_like(signal))
def differential_norm_forward(signal: Tensor, noise: Tensor, lambda_: Tensor, weight: Tensor,
                              eps: float) -> Tensor:
    out, (r, width), groups = torch.empty_like(signal), signal.shape[-2:], noise[..., 0].numel()
    if groups:
        differential_norm_forward_kernel[triton.cdiv(groups, 4),](
            signal, noise, lambda_, weight, out, groups, r, width, eps, GROUPS=4,
            R=triton.next_power_of_2(r), W=triton.next_power_of_2(width), num_warps=2)
    return out


@operator(lambda d, signal, noise, lambda_, weight, eps: tuple(
    torch.empty_like(t) for t in (signal, noise, lambda_, weight)))
def differential_norm_backward(d: Tensor, signal: Tensor, noise: Tensor, lambda_: Tensor,
                               weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (r, width), groups = signal.shape[-2:], noise[..., 0].numel()
    d_signal, d_noise = torch.empty_like(signal), torch.empty_like(noise)
    sums = signal.new_zeros(resident(signal, 4), 2, width, dtype=torch.float32)
    if groups:
        differential_norm_backward_kernel[len(sums),](
            d, signal, noise, lambda_, weight, d_signal, d_noise, sums, groups, r, width, eps,
            GROUPS=4, R=triton.next_power_of_2(r), W=triton.next_power_of_2(width), num_warps=4)
    d_weight, d_lambda = sums.sum(0)
    return d_signal, d_noise, d_lambda.sum().to(lambda_.dtype), d_weight.to(weight.dtype)


class DifferentialNorm(torch.autograd.Function):
    """RMSNorm(signal - lambda noise) of contiguous tensors; saves its inputs alone."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        return differential_norm_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return *differential_norm_backward(d.contiguous(), *ctx.saved_tensors, ctx.eps), None


def differential_norm(signal: Tensor, noise: Tensor, lambda_: Tensor, weight: Tensor,
                      scale: Tensor | float, eps: float) -> Tensor:
    """RMSNorm(signal - lambda noise) * scale, each head by itself: signal (B, T, G, r, 2D), noise
    (B, T, G, 1, 2D), lambda_ a scalar, weight (2D,) -> (B, T, G r 2D); fp32 inside."""
    weight = wide(weight) * scale
    if fused(signal) and signal.shape[-1] <= 1024:       # a row is one warp's
        dense = [t.contiguous() for t in (signal, noise, lambda_, weight)]
        return DifferentialNorm.apply(*dense, eps).flatten(2)
    u = wide(signal) - lambda_ * wide(noise)
    y = F.rms_norm(u, u.shape[-1:], weight, eps)
    return y.to(signal.dtype).flatten(2)


# ---- loss

@jit
def cross_entropy_kernel(logits, targets, losses, scale, V, GRADIENT: tl.constexpr,
                         BLOCK: tl.constexpr):
    """Loss of one row of logits, in nats; 0 for a negative target, NaN for one that is no word.
    GRADIENT: then the row becomes (softmax - onehot) scale. Largest value and sum are kept lane by
    lane: one reduction per row. In place: a thread must be the only one to read what it
    overwrites, hence at least as many numbers in BLOCK as there are threads."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    kept = target >= 0
    own = tl.load(logits + target, mask=kept & (target < V), other=float("nan")).to(tl.float32)
    top, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = tl.load(logits + i, mask=i < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    most = tl.max(top)
    lse = most + tl.log(tl.sum(total * tl.exp(top - most)))
    tl.store(losses + row, tl.where(kept, lse - own, 0.0))
    if GRADIENT:
        tl.debug_barrier()                         # own is read before any thread overwrites it
        factor = tl.where(kept, tl.load(scale), 0.0)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            p = tl.exp(tl.load(logits + i, mask=i < V, other=0).to(tl.float32) - lse)
            p = tl.where(kept, (p - tl.where(i == target, 1.0, 0.0)) * factor, 0.0)
            tl.store(logits + i, p.to(logits.dtype.element_ty), mask=i < V)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, gradient: bool) -> Tensor:
    """The rows' losses; with gradient the logits become (softmax - onehot) scale."""
    if fused(logits):
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        cross_entropy_kernel[(len(logits),)](
            logits, targets, losses, scale, logits.shape[1], GRADIENT=gradient,
            BLOCK=min(max(triton.next_power_of_2(logits.shape[1]), 512), 4096), num_warps=8)
        return losses
    z, t, kept = wide(logits), targets.clamp(min=0)[:, None], (targets >= 0)[:, None]
    lse = z.logsumexp(-1, keepdim=True)
    losses = ((lse - z.gather(1, t)) * kept)[:, 0]
    if gradient:
        z = z.sub_(lse).exp_().mul_(kept)
        logits.copy_(z.scatter_add_(1, t, -kept.to(z.dtype)).mul_(scale))
    return losses


@operator(lambda x, weight, targets, scale, needs_dx, needs_dw: (
    wide(x.new_empty(())), torch.empty_like(x if needs_dx else x[:0]),
    torch.empty_like(weight if needs_dw else weight[:0])))
def linear_cross_entropy_forward(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor,
                                 needs_dx: bool, needs_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = wide(x.new_zeros(()))
    dx = torch.empty_like(x if needs_dx else x[:0])
    dw = (torch.empty_like if len(x) else torch.zeros_like)(weight if needs_dw else weight[:0])
    for i in range(0, len(x), LOSS_CHUNK):
        rows, t = x[i:i + LOSS_CHUNK], targets[i:i + LOSS_CHUNK]
        logits = rows @ weight.T                                         # (chunk, V)
        total += cross_entropy_(logits, t, scale, needs_dx or needs_dw).sum()
        if needs_dx:
            torch.mm(logits, weight, out=dx[i:i + LOSS_CHUNK])
        if needs_dw:
            dw.addmm_(logits.T, rows, beta=min(i, 1))   # the first one's overwrites what is there
        del logits                                      # before the next chunk's are made
    return total, dx, dw


@jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1:                                     # else nothing is read or written
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(x + i, mask=i < n).to(tl.float32) * by
        tl.store(x + i, z.to(x.dtype.element_ty), mask=i < n)


@operator(lambda x, factor: None, changes=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """x = x factor in place, of a contiguous x and a scalar: free where the factor is 1."""
    if not fused(x):
        x.mul_(factor)
    elif x.numel():
        scale_kernel[triton.cdiv(x.numel(), 8192),](x, factor, x.numel(), BLOCK=8192, num_warps=8)


class LinearCrossEntropy(torch.autograd.Function):
    """scale times the sum of cross entropies of x @ weight^T, with both gradients made in the
    forward pass, chunk by chunk, while the chunk's logits exist. The backward pass hands them on,
    so that there can be but one: autograd refuses a second (unless a hook keeps what is saved)."""

    @staticmethod
    def forward(ctx, x, weight, targets, scale, differentiate):
        needs = [differentiate and need for need in ctx.needs_input_grad[:2]]
        total, *gradients = linear_cross_entropy_forward(x, weight, targets, scale, *needs)
        ctx.save_for_backward(*gradients)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        gradients = ctx.saved_tensors
        for g in gradients:
            scale_(g, d)
        needed = zip(gradients, ctx.needs_input_grad)
        return *(g if needs else None for g, needs in needed), None, None, None


@torch.no_grad()
def row_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """linear_cross_entropy's losses by row, of those alone that have a target."""
    losses, kept = wide(x.new_zeros(len(x))), (targets >= 0).nonzero()[:, 0]
    for rows in kept.split(LOSS_CHUNK):
        logits = x[rows] @ weight.T
        losses[rows] = cross_entropy_(logits, targets[rows], losses, False)
    return losses


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean",
                         scale: float = 1.0) -> Tensor:
    """Cross entropy in nats of the logits x @ weight^T without ever holding them all.

    x (N, n), weight (V, n), targets (N,) with negative ones ignored -> fp32 scalar, scale times the
    "sum" or the "mean" over the targets kept (0 if none is). A factor given here, and not applied
    to the loss, keeps bf16 gradients from being rounded twice. Not for autocast. "none": (N,), 0
    where a target is ignored, without gradients. ValueError for another reduction."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if reduction == "none":
        return row_losses(x, weight, targets) * scale
    factor = wide(x.new_full((), scale, dtype=torch.promote_types(x.dtype, torch.float32)))
    if reduction == "mean":
        factor = factor / (targets >= 0).sum().clamp(min=1)
    return LinearCrossEntropy.apply(x, weight, targets.contiguous(), factor,
                                    torch.is_grad_enabled())


# ---- products of Newton-Schulz

SYMMETRIC_TILES = 264   # tiles of half a product under which cuBLAS, computing all, is faster


@jit
def lower_tile(t, rows):
    """Tile t of the lower triangle, in bands of eight rows walked column by column, so that
    the tiles at work at one time share their operands in L2."""
    i = ((tl.sqrt(8.0 * t + 5.0) - 1.0) * 0.5).to(tl.int32)    # 1 is exact; 5 allows for rounding
    top = i // 8 * 8
    height = min(rows - top, 8)
    t -= top * (top + 1) // 2
    v = t - top * height                       # < 0: left of the band's triangle at its end
    q = ((tl.sqrt(8.0 * tl.maximum(v, 0) + 5.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(v < 0, t % height, q)
    j = tl.where(v < 0, t // height, top + v - q * (q + 1) // 2)
    return top + i, j


@jit
def symmetric_kernel(X, Y, D, C, m, k, alpha, beta, ADD: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """A tile on or below the diagonal of C = alpha X Y^T + beta D, and its mirror. All four are
    tensor descriptors: X, Y (E, m, k), or if not ROWS (E, k, m); D, C (E, m, m)."""
    e = tl.program_id(1)
    i, j = lower_tile(tl.program_id(0), tl.cdiv(m, BLOCK))
    i, j = i * BLOCK, j * BLOCK
    c = tl.zeros((BLOCK, BLOCK), tl.float32)
    for z in range(0, k, DEPTH):
        if ROWS:
            x = X.load([e, i, z]).reshape(BLOCK, DEPTH)
            y = Y.load([e, j, z]).reshape(BLOCK, DEPTH).T
        else:
            x = X.load([e, z, i]).reshape(DEPTH, BLOCK).T
            y = Y.load([e, z, j]).reshape(DEPTH, BLOCK)
        c = tl.dot(x, y, c, input_precision="ieee")
    c *= alpha
    if ADD:
        c += beta * D.load([e, i, j]).reshape(BLOCK, BLOCK).to(tl.float32)
    out = c.to(C.dtype)
    C.store([e, i, j], out.reshape(1, BLOCK, BLOCK))
    if i != j:
        C.store([e, j, i], out.T.reshape(1, BLOCK, BLOCK))


def symmetric(X: Tensor, Y: Tensor, alpha: float, D: Tensor | None = None,
              beta: float = 0.0) -> Tensor:
    """C = alpha X Y^T + beta D, known to be symmetric: X Y^T is X X^T, or the product of symmetric
    matrices that commute. X, Y (E, m, k), rows or columns contiguous, D (E, m, m) -> C (E, m, m).
    On Hopper, in half precision, half of C is computed and written twice; fp32 inside. No operator
    of torch: the optimizer is not compiled, and an operator's call takes as long as the product."""
    (E, m, k), rows = X.shape, -(-X.shape[1] // TILE)
    tiles = rows * (rows + 1) // 2
    dense = symmetric_takes(X, Y, *([] if D is None else [D])) and X.stride(2) == Y.stride(2)
    if not dense or E * tiles < SYMMETRIC_TILES and not INTERPRET:
        D, beta = (X.new_empty(()), 0) if D is None else (D, beta)
        return torch.baddbmm(D, X, Y.mT, beta=beta, alpha=alpha)
    C, by_rows, depth = X.new_empty(E, m, m), X.stride(2) == 1, 64
    x, y = (tma(t, 1, TILE, depth) if by_rows else tma(t.mT, 1, depth, TILE) for t in (X, Y))
    d, c = (tma(t, 1, TILE, TILE) for t in (C if D is None else D, C))
    with torch.cuda.device_of(X):
        symmetric_kernel[tiles, E](x, y, d, c, m, k, alpha, beta, ADD=D is not None, ROWS=by_rows,
                                   BLOCK=TILE, DEPTH=depth, num_warps=4, num_stages=3)
    return C


def symmetric_takes(X: Tensor, *others: Tensor) -> bool:
    """Whether tensor descriptors can describe them: half precision, one dimension contiguous, the
    others in steps of 16 bytes; X by rows or columns, the last of the others, if a D, by rows."""
    if not fused(X) or X.is_cuda and not is_hopper(X.device):
        return False
    known = X.dtype != torch.bfloat16 if INTERPRET else X.dtype.itemsize == 2  # interpreter's fault

    def fits(t):
        steps = [n * t.dtype.itemsize % 16 for n in (*t.shape[1:], *t.stride()) if n != 1]
        return 1 in t.stride()[1:] and not any(steps) and t.data_ptr() % 16 == 0
    by_rows = len(others) < 2 or others[1].stride(2) == 1
    return known and by_rows and all(fits(t) for t in (X, *others))


# ---- FP8

FP8 = torch.float8_e4m3fn   # 4 bits of exponent, 3 of mantissa, largest number 448, no infinity
TINY = 1e-30                # least |x| that a scale is made for, so that rows of zeros stay zeros


@jit
def largest_kernel(x, rows, columns, M, N, COLUMNS: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):
    """Largest |x| of each row (M,) and column (N,), as the bits of fp32, which order as
    non-negative floats do, NaN on top: whatever the order of the atomics, one result."""
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    t = tl.load(x + i[:, None] * N + j, mask=(i[:, None] < M) & (j < N), other=0)
    bits = tl.abs(t.to(tl.float32)).to(tl.int32, bitcast=True)
    tl.atomic_max(rows + i, tl.max(bits, 1), mask=i < M, sem="relaxed")
    if COLUMNS:
        tl.atomic_max(columns + j, tl.max(bits, 0), mask=j < N, sem="relaxed")


@jit
def scale_of(largest, kept):
    """scale = largest / 448 and its inverse, of vectors whose bits are given."""
    a = tl.load(largest, mask=kept, other=0).to(tl.float32, bitcast=True)
    s = tl.where(a < 1e-30, 1e-30, a) * (1 / 448)     # TINY; NaN is not below it and remains
    return s, tl.div_rn(tl.full(s.shape, 1, tl.float32), s)


@jit
def quantize_kernel(x, rows, columns, q, s, qt, st, M, N, COLUMNS: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr):
    """q (M, N) = x / s by row, s (M,); qt (N, M) = x^T / st by row, st (N,)."""
    i = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t = tl.load(x + i[:, None] * N + j, mask=(i[:, None] < M) & (j < N), other=0)
    scale, inverse = scale_of(rows + i, i < M)
    tl.store(s + i, scale, mask=i < M)                # by all tiles of the row, the same
    y = (t.to(tl.float32) * inverse[:, None]).to(q.dtype.element_ty)
    tl.store(q + i[:, None] * N + j, y, mask=(i[:, None] < M) & (j < N))
    if COLUMNS:
        scale, inverse = scale_of(columns + j, j < N)
        tl.store(st + j, scale, mask=j < N)
        y = (tl.trans(t).to(tl.float32) * inverse[:, None]).to(qt.dtype.element_ty)
        tl.store(qt + j[:, None] * M + i, y, mask=(j[:, None] < N) & (i < M))


def quantize_rows(x: Tensor) -> list[Tensor]:
    """The plain twin for one of the two directions: x (M, N) -> q (M, N), s (M,)."""
    s = x.float().abs().amax(1).clamp(min=TINY) * (1 / 448)
    return [(x.float() * s.reciprocal()[:, None]).clamp(-448, 448).to(FP8), s]


def quantized_shapes(x, columns):
    (M, N), fp32 = x.shape, torch.float32
    made = [x.new_empty(M, N, dtype=FP8), x.new_empty(M, dtype=fp32)]
    return made + [x.new_empty(N, M, dtype=FP8), x.new_empty(N, dtype=fp32)] if columns else made


@operator(quantized_shapes)
def quantize_fp8(x: Tensor, columns: bool) -> list[Tensor]:
    """x (M, N) in FP8 with a scale s = max|x| / 448 per row, and with `columns` the same of x^T:
    q (M, N), s (M,) with x = s q; qt (N, M), st (N,) with x^T = st qt. Two reads of x for both.

    A NaN or an infinity makes its row of q (and of qt) NaN in the product; zeros stay zeros.
    Repeated calls on one x, as by q_proj, k_proj and v_proj, are one call under torch.compile."""
    if not fused(x):
        x = x.contiguous()
        return quantize_rows(x) + (quantize_rows(x.T.contiguous()) if columns else [])
    (M, N), x, cdiv = x.shape, x.contiguous(), triton.cdiv
    rows, in_columns = x.new_zeros(M + N, dtype=torch.int32).split([M, N])
    dtype = torch.float32 if INTERPRET else FP8       # the interpreter's own rounding is wrong
    q, s, qt, st = (x.new_empty(shape, dtype=t) for shape, t in (
        ((M, N), dtype), (M, torch.float32), ((N, M), dtype), (N, torch.float32)))
    largest_kernel[cdiv(M, 128), cdiv(N, 64)](x, rows, in_columns, M, N, COLUMNS=columns, BM=128,
                                              BN=64, num_warps=4)
    quantize_kernel[cdiv(N, 128), cdiv(M, 64)](x, rows, in_columns, q, s, qt, st, M, N,
                                               COLUMNS=columns, BM=64, BN=128, num_warps=8)
    return [q.to(FP8), s, qt.to(FP8), st][:4 if columns else 2]


def scaled_mm(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> Tensor:
    """(sa a) (sb b)^T in bf16: FP8 a (m, k), b (n, k) with scales (m,), (n,) -> (m, n). The fast
    accumulation is a tenth faster, and 24% off over 16,384 products of one sign."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.T, scale_a=sa[:, None], scale_b=sb[None],
                                out_dtype=torch.bfloat16, use_fast_accum=False)
    return ((a.float() * sa[:, None]) @ (b.float() * sb[:, None]).T).bfloat16()


class LinearFP8(torch.autograd.Function):
    """See linear_fp8. For the backward pass it saves the FP8 transposes, a byte an element."""

    @staticmethod
    def forward(ctx, x, weight, columns):
        xq, xs, *xt = quantize_fp8(x, columns)
        wq, ws, *wt = quantize_fp8(weight, columns)
        ctx.save_for_backward(*xt, *wt)
        return scaled_mm(xq, xs, wq, ws)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        xt, xts, wt, wts = ctx.saved_tensors
        dq, ds, dt, dts = quantize_fp8(d, True)
        return scaled_mm(dq, ds, wt, wts), scaled_mm(dt, dts, xt, xts), None


def linear_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T in bf16 from FP8 products, as are both gradients: x (..., K), W (N, K) -> (..., N).

        y = x W^T        x scaled by token, W by output
        dx = dy W        dy scaled by token, W by input
        dW = dy^T x      dy scaled by output, x by input

    E4M3 for gradients too: a scale for each row leaves them few powers of two to span, and E5M2
    would double the rounding error. Sizes that are no multiples of 16 take a plain bf16 product."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.numel() == 0 or any(n % 16 for n in (*rows.shape, *weight.shape)):
        return F.linear(x.bfloat16(), weight.bfloat16())
    y = LinearFP8.apply(rows, weight, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], -1)


# ---- python kernels.py

@contextmanager
def plain_twins():
    """Within it no kernel is used."""
    global FUSED
    FUSED = False
    try:
        yield
    finally:
        FUSED = True


def attempt(f, *args):
    """f(*args), or its error in a line: nothing that fails here stops the rest."""
    try:
        return f(*args)
    except Exception as e:
        return f"{type(e).__name__}: {(str(e) or 'no message').splitlines()[0][:150]}"


def step(f, inputs, d=None) -> tuple:
    """f's outputs and, for gradients d or random ones, the gradients at the inputs that want it."""
    outs = f(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    smooth = [t for t in outs if t.requires_grad]
    if not smooth:
        return outs
    d = d or [torch.randn(t.shape, device=t.device, dtype=torch.bfloat16).to(t) for t in smooth]
    return outs + torch.autograd.grad(smooth, [t for t in inputs if t.requires_grad], d)


def checks(new):
    """Every kernel on few tokens, of the widths that main times: name, operation, inputs and, where
    it is another, the exact operation. new(*shape) makes random numbers."""
    numbers = lambda *s: new(*s).float().detach().requires_grad_()
    weight, bias, rows = numbers(3), numbers(1), lambda: new(3, 16384)
    yield "poly_norm", poly_norm, [rows(), weight, bias]
    yield "poly_norm_mul", lambda *t: poly_norm_mul(*t, 1e-6), [rows(), rows(), weight, bias]
    yield ("differential_norm", lambda *t: differential_norm(*t, 0.7, 1e-5),
           [new(1, 9, 8, 4, 256), new(1, 9, 8, 1, 256), numbers(1)[0], numbers(256)])
    starts = torch.tensor([0] * 100 + [100] * 60 + [160] * 96, device=bias.device)[None].int()
    for groups, D in ((8, 128), (2, 64)) if bias.is_cuda else ((1, 64),):
        qkv = [new(1, 256, *of) for of in ((5 * groups, D), (2 * groups, D), (groups, 2 * D))]
        for name, begin in ("causal", None), ("documents", starts):
            yield (f"attention of {D}, {name}", lambda *t, g=groups, b=begin:
                   grouped_differential_attention(*t, g, b), qkv)
    yield "attention, plain", causal_attention, [new(1, 256, 2, 3, 64), new(1, 256, 2, 64),
                                                 new(1, 256, 2, 64)]
    targets = torch.tensor([3, -1, 0, 219519], device=bias.device)
    yield "linear_cross_entropy", linear_cross_entropy, [new(4, 64), new(219520, 64), targets]
    m = 4096 if bias.is_cuda else 272                    # a smaller product is left to cuBLAS
    x, d = new(1, m, 64).detach(), new(1, m, m).detach()
    yield "symmetric, rows", lambda x: symmetric(x, x, 1.0), [x]
    yield "symmetric, columns", lambda x, d: symmetric(x, x, 0.5, d, 2.0), [
        x.mT.contiguous().mT, d + d.mT]
    yield "linear_fp8", linear_fp8, [new(256, 512), new(384, 512)], F.linear


def check(name: str, f, inputs: list, exact=None) -> dict:
    """Relative Frobenius errors of outputs and gradients, the kernel's and its plain twin's, both
    against float64. ok: none is more than a tenth worse, or beyond what fp32 sums may differ."""
    def run(f, change=lambda t: t):
        torch.manual_seed(0)
        return step(f, [change(t).detach().requires_grad_(t.requires_grad) for t in inputs])

    true = run(exact or f, lambda t: t.double() if t.is_floating_point() else t)
    ours = run(f)
    with plain_twins():
        twin = run(f)
    ours, twin = ([((x - y).norm() / y.norm()).item() for x, y in zip(outs, true, strict=True)]
                  for outs in (ours, twin))
    return {"check": name, "error": ours, "twin": twin,
            "ok": all(x <= 1.1 * y + 1e-5 for x, y in zip(ours, twin))}


def milliseconds(f) -> float:
    """Median of twenty calls of f; if it is short, of more, as a CUDA graph, without the host's
    time to launch it, as in a training step, where the host is ahead."""
    ms = triton.testing.do_bench(f, return_mode="median")
    if ms > 5:                                      # so far it was called once or twice
        return triton.testing.do_bench(f, rep=20 * ms, return_mode="median")
    return triton.testing.do_bench_cudagraph(f, rep=100, return_mode="median")


def times(f, inputs: list) -> list:
    """Milliseconds of f as in training, those of f and its gradients, GiB at the most in both."""
    d = [torch.randn_like(t) for t in step(f, inputs) if t.requires_grad]
    torch.cuda.reset_peak_memory_stats()
    step(f, inputs, d)
    peak = torch.cuda.max_memory_allocated() / 2**30
    both = milliseconds(lambda: step(f, inputs, d)) if d else None
    return [milliseconds(lambda: f(*inputs)), both, peak]


def timed(unit: str, work: tuple, f, inputs: list, eager=None, compiles=True, **beside) -> dict:
    """A line of the table. work: the least bytes or FLOPs, for each number of the first input, of
    the forward pass and of both passes. beside: functions that give the times of something else."""
    row = {"unit": unit, "work": [n * inputs[0].numel() for n in work], "ours": times(f, inputs)}
    with plain_twins():
        if eager:
            row["eager"] = attempt(times, eager, inputs)
        if eager and compiles:
            row["torch.compile"] = attempt(times, torch.compile(eager), inputs)
    return row | {name: attempt(other) for name, other in beside.items()}


def calls(q: Tensor, k: Tensor, v: Tensor, groups: int):
    """grouped_differential_attention's signal and noise, as two calls of another attention:
    q (B, heads, T, D), k (B, groups, T, D), v (B, groups, T, 2D)."""
    q, k = q.unflatten(2, (groups, -1)), k.unflatten(2, (groups, 2))
    for q_i, k_i in (q[:, :, :, :-1], k[:, :, :, 0]), (q[:, :, :, -1:], k[:, :, :, 1]):
        yield [t.transpose(1, 2) for t in (q_i.flatten(2, 3), k_i, v)]


def flash(*inputs) -> tuple:
    """Four calls of FlashAttention 2, which takes no values wider than the keys."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return tuple(F.scaled_dot_product_attention(q, k, half, is_causal=True, enable_gqa=True)
                     for q, k, v in calls(*inputs) for half in v.chunk(2, -1))


def time_cudnn(*inputs) -> list:
    """cuDNN at its fastest: two calls forward, four backward, of half of the values each."""
    aten, qkvs = torch.ops.aten, [[t.detach() for t in call] for call in calls(*inputs)]
    ds = [torch.randn_like(q.repeat(1, 1, 1, 2)) for q, _, _ in qkvs]

    def forward():
        return [aten._scaled_dot_product_cudnn_attention(*qkv, None, True, 0.0, True, False)
                for qkv in qkvs]

    def both():
        for (q, k, v), d, (o, lse, a, b, c, e, seed, offset, _) in zip(qkvs, ds, forward()):
            halves = zip(*(t.chunk(2, -1) for t in (d, v, o)))
            (q1, k1, _), (q2, k2, _) = (aten._scaled_dot_product_cudnn_attention_backward(
                d_, q, k, v_, o_, lse, seed, offset, None, a, b, c, e, 0.0, True)
                for d_, v_, o_ in halves)
            q1.add_(q2), k1.add_(k2)
    return [milliseconds(forward), milliseconds(both)]


def time_attention(B: int, T: int, groups: int, D: int, document: int = 0) -> dict:
    """Four signal heads to a noise head; document: the tokens in one, else they are one."""
    q, k = normal(B, T, 5 * groups, D), normal(B, T, 2 * groups, D)
    v = normal(B, T, groups, 2 * D)
    t = torch.arange(T, device="cuda", dtype=torch.int32).expand(B, T)
    starts = t // (document or T) * (document or T)
    seen = (t - starts + 1).double().mean().item()       # keys by a query
    starts, others = (starts, {}) if document else (None, {
        "eager": lambda *t: flash(*t, groups), "compiles": False,
        "cuDNN": lambda: time_cudnn(q, k, v, groups)})
    return timed("TFLOP/s", (6 * seen, 20 * seen), lambda *t: grouped_differential_attention(
        *t, groups, starts), [q, k, v], **others)


def normal(*shape, scale=1.0) -> Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale).requires_grad_()


def table():
    """The lines: name and a function that measures one."""
    rows = lambda n=16384: normal(8192, n)
    def numbers(*shape):                                 # in fp32, as in training
        return torch.randn(shape, device="cuda", requires_grad=True)
    weights, polynorm = [numbers(3), numbers(1)], lambda x, up, w, b: poly_norm_mul_by_definition(
        x, up, w, b, 1e-6).to(x.dtype)
    yield "PolyNorm, 8192x16384", lambda: timed(
        "GB/s", (4, 10), poly_norm, [rows(), *weights], lambda x, w, b: polynorm(x, 1, w, b))

    def gated():
        swiglu, x = torch.compile(lambda gate, up: F.silu(gate) * up), [rows(), rows()]
        return timed("GB/s", (6, 16), lambda *t: poly_norm_mul(*t, 1e-6), [*x, *weights], polynorm,
                     SwiGLU=lambda: times(swiglu, x))
    yield "PolyNorm x up, 8192x16384", gated

    def by_compile(work, f, *shapes):                    # there is no kernel
        inputs = [normal(*shape) for shape in shapes]
        return timed("GB/s", work, torch.compile(f), inputs, f, compiles=False)
    x, norm = (65536, 4096), lambda x, w: rms_norm(x, w, 1e-5)
    yield "RMSNorm (torch.compile), 65536x4096", lambda: by_compile((4, 10), norm, x, x[1:])
    yield "add + RMSNorm (torch.compile), 65536x4096", lambda: by_compile(
        (8, 16), lambda x, y, w: (x + y, norm(x + y, w)), x, x, x[1:])
    cos, sin = torch.randn(2, 1, 65536, 1, 64, device="cuda")
    yield "RoPE (torch.compile), 65536x40x128", lambda: by_compile(
        (4, 8), lambda x: rope(x, cos, sin), (1, 65536, 40, 128))

    difference = lambda *t: differential_norm(*t, 0.7, 1e-5)
    yield "differential norm, 8192x32x256", lambda: timed(
        "GB/s", (4.5, 11.5), difference, [normal(2, 4096, 8, 4, 256), normal(2, 4096, 8, 1, 256),
                                          numbers(), numbers(256)], difference)
    for name, size in ("2x4096, 32 + 8 heads of 128", (2, 4096, 8, 128)), (
            "16x1024, 8 + 2 heads of 64", (16, 1024, 2, 64)):
        yield f"attention, {name}", lambda size=size: time_attention(*size)
        yield f"attention, {name}, documents", lambda size=size: time_attention(*size, 1000)
    yield "attention, 1x16384, 32 + 8 heads of 128", lambda: time_attention(1, 16384, 8, 128)
    targets = torch.randint(219520, (8192,), device="cuda")
    yield "linear + cross entropy, 8192x4096x219520", lambda: timed(
        "TFLOP/s", (6 * 219520,) * 2, linear_cross_entropy, [
            rows(4096), normal(219520, 4096, scale=0.02), targets],
        lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t))
    for k in 16384, 4096:
        yield f"symmetric product, 4096x{k}", lambda k=k: timed(
            "TFLOP/s", (4096,), lambda x: symmetric(x, x, 1.0), [normal(1, 4096, k).detach()],
            lambda x: x @ x.mT, compiles=False)
    yield "linear_fp8, 8192 x 16384x4096", lambda: timed(
        "TFLOP/s", (2 * 16384, 6 * 16384), linear_fp8, [rows(4096), normal(16384, 4096)],
        F.linear, compiles=False)


def text(row: dict, limits: dict) -> str:
    """A line of the table in words; x: how many times the other's time is of ours."""
    def pair(numbers, form):
        return " / ".join(format(n, form) for n in numbers if n is not None)

    if "message" in row:
        return f"{row['name']:44s} {row['message']}"
    ms = [t for t in row["ours"][:2] if t]
    rates = [w / t / {"GB/s": 1e6, "TFLOP/s": 1e9}[row["unit"]] for w, t in zip(row["work"], ms)]
    limit = limits[row["unit"]]
    line = (f"{row['name']:44s} {pair(ms, '.3f'):>15s} ms  {pair(rates, '.0f')} {row['unit']}  "
            f"{pair([100 * r / limit for r in rates], '.0f')}%  {row['ours'][2]:.1f} GiB")
    for name, other in list(row.items())[4:]:
        line += f"  {name}: " + (other if isinstance(other, str) else pair(
            [t / own for t, own in zip(other, ms)], ".2f") + f"x ({pair(other[:2], '.3f')} ms)")
    return line


def main() -> None:
    if triton is None:
        raise SystemExit("Triton is not installed: there is no kernel to check")
    parser = argparse.ArgumentParser(description="Checks every kernel against float64, then, on a "
                                     "GPU, times it beside PyTorch's own operations.")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--only", default="", help="time those alone whose name contains this")
    options, gpu = parser.parse_args(), torch.cuda.is_available()

    def show(row, words):
        print(json.dumps(row) if options.json else words, flush=True)

    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float16)
    worse = 0
    for name, *case in checks(lambda *s: torch.randn(s).to(device, dtype).requires_grad_()):
        row = attempt(check, name, *case)
        if isinstance(row, str):
            row = {"check": name, "ok": False, "message": row}
        worse += not row["ok"]
        show(row, f"{'ok   ' if row['ok'] else 'WRONG'} {name:28s} " + (row.get("message") or (
            " ".join(f"{x:.1e}/{y:.1e}" for x, y in zip(row["error"], row["twin"])))))
    if gpu:
        x, y = torch.randn(2, 2**28, device="cuda")
        a = normal(8192, 8192).detach()
        limits = {"GB/s": 2 * 2**30 / milliseconds(lambda: torch.neg(y, out=x)) / 1e6,
                  "TFLOP/s": 2 * 8192**3 / milliseconds(lambda: a @ a) / 1e9}
        del x, y, a
        show({"device": torch.cuda.get_device_name(), **limits},
             f"{torch.cuda.get_device_name()}: copy {limits['GB/s']:.0f} GB/s, "
             f"bf16 GEMM {limits['TFLOP/s']:.0f} TFLOP/s")
        for name, measure in table():
            if options.only not in name:
                continue
            row = attempt(measure)
            row = {"name": name} | ({"message": row} if isinstance(row, str) else row)
            show(row, text(row, limits))
    else:
        show({"timed": False}, "No GPU: the kernels were checked through Triton's interpreter, and "
             "nothing was timed.")
    if worse:
        raise SystemExit(f"{worse} of the checks failed")


if __name__ == "__main__":
    main()
