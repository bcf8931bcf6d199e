"""Triton kernels: what model.py and muonclip.py define in plain PyTorch, computed faster on a GPU.

Read this file last. Nothing in it changes what the model computes; each function equals a plain
definition, against which tests/test_kernels.py checks it:

    here                      equals                                          what it saves
    poly_norm_mul             model.poly_norm(x) * up                         memory traffic
    fused_differential_norm   model.differential_norm, if weight is given     memory traffic
                              times scale
    linear_cross_entropy      F.cross_entropy(x @ weight.T, targets)          all tokens' logits
    fused_attention           model.signal_and_noise_attention, and           the T x T logits
                              model.causal_attention
    flex_softmax_attention    model.softmax_attention                         the T x S logits
    symmetric_matmul          torch.baddbmm, where the product is symmetric   half of the FLOPs
    linear_fp8                F.linear, up to the rounding of FP8             half of the time

Kernels that go over rows come first. Attention, in the middle, is the hardest, and what follows it,
symmetric products and FP8, needs nothing of it. RMSNorm and rotary embeddings have no kernel:
torch.compile fuses them well enough by itself.

Kernels sum in fp32, whatever the dtype of the inputs, and in a fixed order, without floating-point
atomics, so two runs give the same bits. Tensor cores multiply numbers in the dtype of the inputs;
linear_fp8 rounds them to FP8 first.

Letters for sizes are model.py's, here with their values in Motif-2-12.7B:

    B   rows of a batch
    T   tokens of a row                        4,096 at first, later 16,384
    S   keys given to attention                T, or the visible slots of a KV cache
    V   vocabulary                             219,520
    D   width of a query and of a key          128
    G   groups: r signal heads, 1 noise head   8
    r   signal heads in a group                4
    H   query heads, G (r + 1)                 40
    K   key heads                              16
    P   pairs of key heads, K / 2              8
    Dv  width of a value                       256, which is 2D
    h   query heads that read one key head     4 for a signal key, 1 for a noise key
    F   intermediate size of the MLP           16,384

Other letters:

    b       a row of the batch, in attention a sequence
    n       length of a row; in a product of matrices, the size that it sums over
    q k v   queries, keys and values: tensors, and in attention's kernels also blocks of them
    p       attention's probabilities; in its forward pass not yet divided by their sum
    s       in formulas: the logits that p is the softmax of
    BQ BK   queries and keys of a block of attention
    i j     places in a row, a matrix or a list
    E m     products computed at once, and their rows (symmetric products)
    dx      the gradient of x; likewise dq, d_out and others

A *lane* is one element of a block.
"""
import functools
import math
import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

try:
    # Triton takes 0.2 s to import. Without CUDA only tests need it, and they set TRITON_INTERPRET.
    if not torch.backends.cuda.is_built() and "TRITON_INTERPRET" not in os.environ:
        raise ImportError
    import triton
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    # Without Triton plain forms, here and in model.py, do everything; the kernels only have to be
    # defined.
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(function: Callable) -> Callable:
        return function

ENABLED = True    # False: plain PyTorch everywhere, to compare with
ATTENTION = None  # "fused", "flex" or "plain": in place of what attention_form would choose
# Triton's interpreter runs kernels on a CPU. It is slow, but it checks them. Triton reads the
# variable when a kernel is defined, so it must be set before this file is imported.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

TILE = 128                # side of the tiles of symmetric_matmul and of ds, in attention's backward
                          # pass; queries of a program in attention's forward and dq kernels
LOSS_CHUNK = 4096         # rows whose logits exist at one time in linear_cross_entropy
CACHE_BLOCK = 2**18       # elements per block of PolyNorm on a CPU: 1 MiB of fp32 fits an L2 cache
DS_BYTES = 3 * 2**30      # memory for ds, see the backward pass of attention
# With fewer tiles than this, two for each of an H200's 132 multiprocessors, muonclip.py leaves a
# symmetric product to cuBLAS.
MIN_SYMMETRIC_TILES = 264


def upcast(x: Tensor) -> Tensor:
    """x in fp32; a float64 tensor stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or fp32 on an Apple GPU, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def ceil_div(a, b: int):
    """a / b, rounded up; a may be a tensor."""
    return (a + b - 1) // b


def use_triton(x: Tensor) -> bool:
    """Whether a kernel, and not plain PyTorch, works on x."""
    if not ENABLED or triton is None or x.dtype == torch.float64:
        return False
    return x.is_cuda or INTERPRET


def is_hopper(device: torch.device) -> bool:
    """Whether the GPU is a Hopper. The matrix kernels use its TMA, an engine that copies tiles
    between global and shared memory, and were tried on no other GPU."""
    return torch.cuda.get_device_capability(device)[0] == 9


def can_multiply(x: Tensor) -> bool:
    """Whether the matrix kernels take x's device and dtype: fp16 or bf16 on a Hopper GPU; fp16 or
    fp32 in Triton's interpreter, which multiplies bf16 wrongly."""
    if not use_triton(x):
        return False
    if INTERPRET:
        return x.dtype != torch.bfloat16
    return x.dtype.itemsize == 2 and is_hopper(x.device)


def custom_op(fake: Callable, mutates_args: tuple[str, ...] = ()) -> Callable:
    """Decorator: registers a function that launches kernels as the custom operator motif::<name>.

    torch.compile does not look into an operator: it puts it into its graph as one node. To know the
    shapes that come out it calls `fake` with the same arguments: a function that returns outputs of
    the right shape and dtype, and computes nothing. mutates_args names the arguments that the
    function writes to.
    """
    def register(function: Callable) -> Callable:
        if triton is None:
            return function

        @functools.wraps(function)
        def on_its_device(first, *rest):
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device_of(first):
                return function(first, *rest)

        op = torch.library.custom_op(f"motif::{function.__name__}", on_its_device,
                                     mutates_args=mutates_args)
        op.register_fake(fake)
        return op

    return register


# ---- How a Triton kernel is read
#
# PyTorch runs `y = x * x; y.sum(-1)` as two kernels, and each reads and writes GPU memory. Such
# operations spend their time on that traffic, not on arithmetic. A kernel of our own reads x once,
# does everything in registers and writes the result.
#
# A kernel is a function that runs many times at once. kernel[grid](arguments) starts one *program*
# for each point of the grid, as if it were the body of nested loops over the grid. No order is
# guaranteed; but programs with low numbers begin first, so long ones should have low numbers, for
# speed. tl.program_id(0) tells a program where in the first loop it is.
#
# A program computes on *blocks*, small tensors in registers:
#
#     x_ptr                        a tensor argument: the address of its first element
#     tl.arange(0, BLOCK_SIZE)     the block 0, ..., BLOCK_SIZE - 1; BLOCK_SIZE is a power of two
#     x_ptr + offsets              a block of addresses
#     tl.load(addresses, mask, other)    reads them. Where mask is False nothing is read, and the
#                                  element is `other`: that is how a block may stick out of a row
#     tl.store(addresses, block, mask)   writes them
#     x_desc                       a *descriptor*: a matrix's address and sizes, and the shape of
#                                  the blocks that TMA copies (see is_hopper)
#     x_desc.load([i, j])          the block of x that begins at row i and column j; what is outside
#                                  of x is read as 0
#     x_desc.store([i, j], block)  writes it; what is outside of x is not written
#     tl.sum(x), tl.dot(x, y, z)   the sum of a block; x @ y + z on the tensor cores
#
# Arguments marked tl.constexpr are known when the kernel is compiled: an `if` on one of them costs
# nothing, and each combination of them is a kernel of its own. Their names are in capitals, except
# r and Dv. (The sizes T, H, P and V are in capitals too, and are ordinary arguments, as r is in
# differential norm.) That an argument is None is known at compile time too. num_warps says how many
# warps (of 32 threads) share a program. num_stages: a loop loads ahead; it holds the blocks of this
# many iterations at once, the current one included. A @jit function that a kernel calls is inlined
# into it.
#
# The simplest kernel here multiplies a tensor by a number, in place. Program i takes the elements
# i * BLOCK_SIZE to (i + 1) * BLOCK_SIZE - 1, as far as there are any. Offsets are int64 where a
# tensor may have over 2^31 elements.

@jit
def scale_kernel(x_ptr, factor_ptr, num_elements, BLOCK_SIZE: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    # The factor is the gradient of the loss, in training 1: then x is neither read nor written.
    if factor != 1:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offsets < num_elements
        x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
        tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


@custom_op(lambda x, factor: None, mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, for a contiguous x and a factor that is a scalar on x's device."""
    if not use_triton(x):
        x.mul_(factor)
    elif x.numel() > 0:
        grid = (triton.cdiv(x.numel(), 8192),)
        scale_kernel[grid](x, factor, x.numel(), BLOCK_SIZE=8192, num_warps=8)


# ---- PolyNorm: model.poly_norm(x) * up
#
# The activation of Motif-2's MLP, for a row x of n numbers (12.7B: n = F = 16,384). A subscript is
# the power of x that a number goes with. The weight tensor holds (w3, w2, w1), the cubic first.
#
#     r_p = 1 / sqrt(mean((x^p)^2) + eps)           normalises x^p: r3 comes from the mean of x^6
#     y   = bias + x (w1 r1 + x (w2 r2 + x w3 r3))
#
# The output is y * up, so that d_up = d_out * y. With g = dL/dy = d_out * up the gradients of the
# weight, the bias and x, which model.py derives, are
#
#     s_p  = r_p sum(g x^p)                      dw_p sums s_p over all rows, and d_bias sums g
#     k_p  = p w_p r_p^2 s_p / n
#     dx   = g (w1 r1 + x (2 w2 r2 + x 3 w3 r3)) - x (k1 + x^2 (k2 + x^2 k3))
#
# (Attention, below, has an r, a p and a k of its own.)
#
# k_p has the r_p^3 of the derivative of r_p: one r_p is in s_p, two come on top. The code never
# multiplies the three: x, the output of gate_proj, reaches 3e5 in large models, and there r3^3 =
# 5e-50 is 0 in fp32. (Where a whole row of 16,384 is beyond 5e5, the sum of x^6 overflows. Then r3
# is 0 and the cubic term is lost, here as in model.py.) Polynomials are evaluated from the inside
# (Horner's rule), which saves the powers of x.
#
# Why by hand: autograd would keep a dozen tensors as large as x for the backward pass. In this form
# x, up and r1, r2, r3 of each row are enough, and y is computed again.

def poly_norm_forward_plain(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor,
                            eps: float) -> tuple[Tensor, Tensor]:
    """x and up (rows, n) -> out = polynorm(x) * up, and (r1, r2, r3) of each row (rows, 3)."""
    w3, w2, w1 = upcast(weight)
    bias = upcast(bias)
    out = torch.empty_like(x)
    inv_rms = x.new_empty(x.shape[0], 3, dtype=w1.dtype)

    for rows in row_blocks(x):
        x32 = upcast(x[rows])
        x2 = x32 * x32
        inv_rms[rows, 0] = inverse_rms(x32, eps)
        inv_rms[rows, 1] = inverse_rms(x2, eps)
        inv_rms[rows, 2] = inverse_rms(x2 * x32, eps)

        r1, r2, r3 = inv_rms[rows].split(1, dim=-1)
        y = horner(x32, bias, w1 * r1, w2 * r2, w3 * r3)
        out[rows] = y * up[rows]
    return out, inv_rms


def poly_norm_backward_plain(d_out: Tensor, x: Tensor, up: Tensor, weight: Tensor, bias: Tensor,
                             inv_rms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx, d_up, and the four sums (dw3, dw2, dw1, d_bias)."""
    w3, w2, w1 = upcast(weight)
    bias = upcast(bias)
    n = x.shape[-1]
    dx = torch.empty_like(x)
    d_up = torch.empty_like(x)
    sums = inv_rms.new_zeros(4)

    for rows in row_blocks(x):
        x32 = upcast(x[rows])
        r1, r2, r3 = inv_rms[rows].split(1, dim=-1)
        d_rows = upcast(d_out[rows])
        d_up[rows] = d_rows * horner(x32, bias, w1 * r1, w2 * r2, w3 * r3)
        g = d_rows * up[rows]

        gx = g * x32
        x2 = x32 * x32
        s1 = r1 * gx.sum(-1, keepdim=True)
        s2 = r2 * torch.linalg.vecdot(g, x2).unsqueeze(-1)
        s3 = r3 * torch.linalg.vecdot(gx, x2).unsqueeze(-1)
        k1 = w1 * r1**2 * s1 / n
        k2 = 2 * w2 * r2**2 * s2 / n
        k3 = 3 * w3 * r3**2 * s3 / n

        slope = horner(x32, w1 * r1, 2 * w2 * r2, 3 * w3 * r3)
        # g * slope - x32 * (k1 + x2 * (k2 + x2 * k3)), in one pass over them.
        dx[rows] = torch.addcmul(g * slope, x32, horner(x2, k1, k2, k3), value=-1)
        sums += torch.stack([s3.sum(), s2.sum(), s1.sum(), g.sum()])
    return dx, d_up, sums


def row_blocks(x: Tensor) -> list[slice]:
    """Slices of x's rows, CACHE_BLOCK elements each, so that a block stays in the CPU's cache."""
    step = max(1, CACHE_BLOCK // x.shape[-1])
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row: (rows, n) -> (rows,)."""
    mean_square = torch.linalg.vector_norm(x, dim=-1).square() / x.shape[-1]
    return (mean_square + eps).rsqrt()


def horner(x: Tensor, *c: Tensor) -> Tensor:
    """The polynomial c[0] + x (c[1] + x (c[2] + ...)).

    y is updated in place, since it is large: a new tensor at every step would be slower, and one
    addcmul per step three times slower, as it has no fast path for coefficients that differ from
    row to row. x is kept.

    >>> horner(torch.tensor([2.0, 10.0]), torch.tensor(5.0), torch.tensor(1.0), torch.tensor(3.0))
    tensor([ 19., 315.])
    """
    y = x * c[-1]
    for coefficient in reversed(c[1:-1]):
        y = y.add_(coefficient).mul_(x)
    return y.add_(c[0])


@jit
def poly_norm_coefficients(weight_ptr, r1, r2, r3):
    """c_p = w_p r_p, the coefficients of x, x^2 and x^3."""
    c1 = tl.load(weight_ptr + 2).to(tl.float32) * r1
    c2 = tl.load(weight_ptr + 1).to(tl.float32) * r2
    c3 = tl.load(weight_ptr).to(tl.float32) * r3
    return c1, c2, c3


@jit
def poly_norm_forward_kernel(x_ptr, up_ptr, weight_ptr, bias_ptr, out_ptr, inv_rms_ptr, n,
                             x_row_stride, up_row_stride, eps, BLOCK_SIZE: tl.constexpr):
    """One program: one row, all of it in registers."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_SIZE)
    mask = i < n
    x = tl.load(x_ptr + row * x_row_stride + i, mask=mask, other=0).to(tl.float32)

    # r_p normalises x^p, so it needs the mean of x^(2p).
    x2 = x * x
    r1 = tl.rsqrt(tl.sum(x2) / n + eps)
    r2 = tl.rsqrt(tl.sum(x2 * x2) / n + eps)
    r3 = tl.rsqrt(tl.sum(x2 * x2 * x2) / n + eps)
    c1, c2, c3 = poly_norm_coefficients(weight_ptr, r1, r2, r3)
    y = x * (c1 + x * (c2 + x * c3)) + tl.load(bias_ptr).to(tl.float32)
    y *= tl.load(up_ptr + row * up_row_stride + i, mask=mask, other=0).to(tl.float32)

    tl.store(out_ptr + row * n + i, y.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(inv_rms_ptr + row * 3, r1)
    tl.store(inv_rms_ptr + row * 3 + 1, r2)
    tl.store(inv_rms_ptr + row * 3 + 2, r3)


@jit
def load_row(ptr, row_offset, i, n, EVICTION: tl.constexpr):
    return tl.load(ptr + row_offset + i, i < n, 0, eviction_policy=EVICTION)


@jit
def poly_norm_backward_kernel(d_out_ptr, x_ptr, up_ptr, weight_ptr, bias_ptr, inv_rms_ptr, dx_ptr,
                              d_up_ptr, sums_ptr, n, d_out_row_stride, x_row_stride, up_row_stride,
                              BLOCK_SIZE: tl.constexpr):
    """One program: one row, in two passes, as x, up, d_out and the results of a whole row are too
    much for the registers. The first pass makes the sums and writes d_up, the second writes dx."""
    row = tl.program_id(0).to(tl.int64)
    r1 = tl.load(inv_rms_ptr + row * 3)
    r2 = tl.load(inv_rms_ptr + row * 3 + 1)
    r3 = tl.load(inv_rms_ptr + row * 3 + 2)
    c1, c2, c3 = poly_norm_coefficients(weight_ptr, r1, r2, r3)
    bias = tl.load(bias_ptr).to(tl.float32)

    # Partial sums of g x^p, one per lane of the block, so that a pass ends in a single reduction.
    sum_g = tl.zeros((BLOCK_SIZE,), tl.float32)
    sum_gx = tl.zeros((BLOCK_SIZE,), tl.float32)
    sum_gx2 = tl.zeros((BLOCK_SIZE,), tl.float32)
    sum_gx3 = tl.zeros((BLOCK_SIZE,), tl.float32)
    for start in range(0, n, BLOCK_SIZE):
        i = start + tl.arange(0, BLOCK_SIZE)
        # evict_last asks the L2 cache to keep this row for the second pass.
        x = load_row(x_ptr, row * x_row_stride, i, n, "evict_last").to(tl.float32)
        d_out = load_row(d_out_ptr, row * d_out_row_stride, i, n, "evict_last").to(tl.float32)
        up = load_row(up_ptr, row * up_row_stride, i, n, "evict_last")
        y = x * (c1 + x * (c2 + x * c3)) + bias
        tl.store(d_up_ptr + row * n + i, (d_out * y).to(d_up_ptr.dtype.element_ty), i < n,
                 eviction_policy="evict_first")

        g = d_out * up.to(tl.float32)
        gx = g * x
        gx2 = gx * x
        sum_g += g
        sum_gx += gx
        sum_gx2 += gx2
        sum_gx3 += gx2 * x

    s1 = r1 * tl.sum(sum_gx)
    s2 = r2 * tl.sum(sum_gx2)
    s3 = r3 * tl.sum(sum_gx3)
    k1 = c1 * r1 * s1 / n
    k2 = 2 * c2 * r2 * s2 / n
    k3 = 3 * c3 * r3 * s3 / n

    # The second pass.
    for start in range(0, n, BLOCK_SIZE):
        i = start + tl.arange(0, BLOCK_SIZE)
        x = load_row(x_ptr, row * x_row_stride, i, n, "evict_first").to(tl.float32)
        d_out = load_row(d_out_ptr, row * d_out_row_stride, i, n, "evict_first").to(tl.float32)
        up = load_row(up_ptr, row * up_row_stride, i, n, "evict_first").to(tl.float32)
        g = d_out * up
        x2 = x * x
        dx = g * (c1 + x * (2 * c2 + x * (3 * c3))) - x * (k1 + x2 * (k2 + x2 * k3))
        tl.store(dx_ptr + row * n + i, dx.to(dx_ptr.dtype.element_ty), i < n,
                 eviction_policy="evict_first")

    # sums is (4, rows), so that PyTorch then adds up four contiguous rows.
    num_rows = tl.num_programs(0)
    tl.store(sums_ptr + row, s3)
    tl.store(sums_ptr + num_rows + row, s2)
    tl.store(sums_ptr + 2 * num_rows + row, s1)
    tl.store(sums_ptr + 3 * num_rows + row, tl.sum(sum_g))


def empty_poly_norm_outputs(x, up, weight, bias, eps):
    """out (rows, n), and inv_rms (rows, 3) in fp32. x.shape[0] and not len(x): with len(),
    torch.compile would compile again for every number of rows."""
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 3, dtype=torch.float32)


@custom_op(empty_poly_norm_outputs)
def poly_norm_forward(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor,
                      eps: float) -> tuple[Tensor, Tensor]:
    """poly_norm_forward_plain by a kernel."""
    num_rows, n = x.shape
    out, inv_rms = empty_poly_norm_outputs(x, up, weight, bias, eps)
    if num_rows > 0:
        block_size = triton.next_power_of_2(n)
        poly_norm_forward_kernel[(num_rows,)](
            x, up, weight, bias, out, inv_rms, n, x.stride(0), up.stride(0), eps,
            BLOCK_SIZE=block_size, num_warps=min(max(block_size // 2048, 4), 16))
    return out, inv_rms


def fake_poly_norm_backward(d_out, x, up, weight, bias, inv_rms):
    return torch.empty_like(x), torch.empty_like(x), inv_rms.new_empty(4)


@custom_op(fake_poly_norm_backward)
def poly_norm_backward(d_out: Tensor, x: Tensor, up: Tensor, weight: Tensor, bias: Tensor,
                       inv_rms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """poly_norm_backward_plain by a kernel."""
    num_rows, n = x.shape
    dx = torch.empty_like(x)
    d_up = torch.empty_like(x)
    sums = inv_rms.new_empty(4, num_rows)
    if num_rows > 0:
        # The kernel goes over a row twice, in blocks: small ones for short rows.
        block_size = 4096 if n > 2048 else min(triton.next_power_of_2(n), 1024)
        poly_norm_backward_kernel[(num_rows,)](
            d_out, x, up, weight, bias, inv_rms, dx, d_up, sums, n, d_out.stride(0), x.stride(0),
            up.stride(0), BLOCK_SIZE=block_size, num_warps=max(block_size // 512, 4))
    return dx, d_up, sums.sum(1)


def contiguous_last_dim(x: Tensor) -> Tensor:
    """x, copied if its last dimension is strided. PolyNorm's kernels accept any stride between
    rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


class PolyNormMul(torch.autograd.Function):
    """out = polynorm(x) * up for x and up (rows, n)."""

    @staticmethod
    def forward(ctx, x, up, weight, bias, eps):
        forward = poly_norm_forward if use_triton(x) else poly_norm_forward_plain
        out, inv_rms = forward(x, up, weight, bias, eps)
        ctx.save_for_backward(x, up, weight, bias, inv_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, up, weight, bias, inv_rms = ctx.saved_tensors
        backward = poly_norm_backward if use_triton(x) else poly_norm_backward_plain
        dx, d_up, sums = backward(contiguous_last_dim(d_out), x, up, weight, bias, inv_rms)
        return dx, d_up, sums[:3].to(weight.dtype), sums[3:].to(bias.dtype), None


def poly_norm_mul(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PolyNorm(x) * up: x and up (..., n), weight (3,): cubic, square, linear, bias (1,) ->
    (..., n) in x's dtype. On a CPU too this gradient is several times faster than autograd's.

    >>> x, weight = torch.tensor([1, -2, 0.5, -0.25]), torch.tensor([0.4, 0.3, 0.3])
    >>> poly_norm_mul(x, torch.ones(4), weight, torch.tensor([0.05]), eps=1e-6)
    tensor([ 0.5548, -0.6834,  0.2289, -0.0076])
    """
    n = x.shape[-1]
    x_rows = contiguous_last_dim(x.reshape(-1, n))
    up_rows = contiguous_last_dim(up.reshape(-1, n))
    out = PolyNormMul.apply(x_rows, up_rows, contiguous_last_dim(weight), bias, eps)
    return out.view(x.shape)


# ---- Differential norm: weight * RMSNorm(signal - lambda noise) of every head
#
# model.differential_norm multiplies the weight by its argument `scale` and calls
# fused_differential_norm.
#
# The r signal heads of a group subtract the same noise head (12.7B: G = 8 groups, r = 4, rows of
# 2D = 256). So one program takes whole groups and reads their noise once. It lays them out as a
# block (GROUPS, R_PADDED, WIDTH_PADDED): r and 2D rounded up to powers of two.
#
# With z = signal - lambda * noise, normed = z * inv_rms and y = normed * weight the gradients are
#
#     d_normed = dy weight
#     dz = inv_rms (d_normed - normed mean(d_normed normed))           the derivative of RMSNorm
#     d_signal = dz,   d_noise = -lambda (sum of dz over the r heads)
#     d_weight = sum of dy normed,   d_lambda = -sum of dz noise       over all rows

NORM_GROUPS = 4           # groups that a program of these kernels takes at a time


@jit
def differential_norm_forward_kernel(signal_ptr, noise_ptr, lambda_ptr, weight_ptr, out_ptr,
                                     num_groups, r, width, eps, GROUPS: tl.constexpr,
                                     R_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr):
    """One program: GROUPS groups, each one noise head and its r signal heads."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None, None]
    head = tl.arange(0, R_PADDED)[None, :, None]
    i = tl.arange(0, WIDTH_PADDED)[None, None, :]
    noise_mask = (group < num_groups) & (i < width)
    offsets = (group * r + head) * width + i

    weight = tl.load(weight_ptr + i, mask=i < width, other=0).to(tl.float32)
    mask = noise_mask & (head < r)
    z = tl.load(signal_ptr + offsets, mask=mask, other=0).to(tl.float32)
    noise = tl.load(noise_ptr + group * width + i, mask=noise_mask, other=0).to(tl.float32)
    z -= tl.load(lambda_ptr).to(tl.float32) * noise
    y = z * (tl.rsqrt(tl.sum(z * z, 2, keep_dims=True) / width + eps) * weight)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def differential_norm_backward_kernel(dy_ptr, signal_ptr, noise_ptr, lambda_ptr, weight_ptr,
                                      d_signal_ptr, d_noise_ptr, sums_ptr, num_groups, r, width,
                                      eps, GROUPS: tl.constexpr, R_PADDED: tl.constexpr,
                                      WIDTH_PADDED: tl.constexpr):
    """A persistent kernel: a few programs per multiprocessor, each striding over the groups, so
    that there are few partial sums of d_weight and d_lambda to add up afterwards. The loop sums
    over heads only; the sum over GROUPS comes after it. The sums over programs, and d_lambda's over
    the width, are left to PyTorch."""
    head = tl.arange(0, R_PADDED)[None, :, None]
    i = tl.arange(0, WIDTH_PADDED)[None, None, :]
    lambda_ = tl.load(lambda_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=i < width, other=0).to(tl.float32)
    d_weight = tl.zeros((GROUPS, 1, WIDTH_PADDED), tl.float32)
    d_lambda = tl.zeros((GROUPS, 1, WIDTH_PADDED), tl.float32)

    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    for start in range(first_group, num_groups, tl.num_programs(0) * GROUPS):
        group = start + tl.arange(0, GROUPS)[:, None, None]
        noise_mask = (group < num_groups) & (i < width)
        mask = noise_mask & (head < r)
        offsets = (group * r + head) * width + i
        noise = tl.load(noise_ptr + group * width + i, mask=noise_mask, other=0).to(tl.float32)
        signal = tl.load(signal_ptr + offsets, mask=mask, other=0).to(tl.float32)
        z = signal - lambda_ * noise
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0).to(tl.float32)

        inv_rms = tl.rsqrt(tl.sum(z * z, 2, keep_dims=True) / width + eps)
        normed = z * inv_rms
        d_weight += tl.sum(dy * normed, 1, keep_dims=True)
        d_normed = dy * weight
        dz = inv_rms * (d_normed - normed * (tl.sum(d_normed * normed, 2, keep_dims=True) / width))
        tl.store(d_signal_ptr + offsets, dz.to(d_signal_ptr.dtype.element_ty), mask=mask)

        # Places from r on hold no head. Their dy was loaded as 0, so their dz is 0 too: inv_rms
        # is finite, since eps > 0.
        dz_sum = tl.sum(dz, 1, keep_dims=True)
        d_noise = (-lambda_ * dz_sum).to(d_noise_ptr.dtype.element_ty)
        tl.store(d_noise_ptr + group * width + i, d_noise, mask=noise_mask)
        d_lambda -= dz_sum * noise

    addresses = sums_ptr + tl.program_id(0) * 2 * width + i
    tl.store(addresses, tl.sum(d_weight, 0, keep_dims=True), mask=i < width)
    tl.store(addresses + width, tl.sum(d_lambda, 0, keep_dims=True), mask=i < width)


@custom_op(lambda signal, *others: torch.empty_like(signal))
def differential_norm_forward(signal: Tensor, noise: Tensor, lambda_: Tensor, weight: Tensor,
                              eps: float) -> Tensor:
    """All inputs contiguous; see fused_differential_norm."""
    r, width = signal.shape[-2:]
    out = torch.empty_like(signal)
    num_groups = noise[..., 0].numel()
    if num_groups > 0:
        differential_norm_forward_kernel[(triton.cdiv(num_groups, NORM_GROUPS),)](
            signal, noise, lambda_, weight, out, num_groups, r, width, eps, GROUPS=NORM_GROUPS,
            R_PADDED=triton.next_power_of_2(r), WIDTH_PADDED=triton.next_power_of_2(width),
            num_warps=2)
    return out


def fake_differential_norm_backward(dy, signal, noise, lambda_, weight, eps):
    return tuple(torch.empty_like(x) for x in (signal, noise, lambda_, weight))


@custom_op(fake_differential_norm_backward)
def differential_norm_backward(dy: Tensor, signal: Tensor, noise: Tensor, lambda_: Tensor,
                               weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of signal, noise, lambda_ and weight."""
    r, width = signal.shape[-2:]
    num_groups = noise[..., 0].numel()
    d_signal = torch.empty_like(signal)
    d_noise = torch.empty_like(noise)
    num_programs = persistent_grid(signal, programs_per_sm=4)
    sums = signal.new_zeros(num_programs, 2, width, dtype=torch.float32)
    if num_groups > 0:
        differential_norm_backward_kernel[(num_programs,)](
            dy, signal, noise, lambda_, weight, d_signal, d_noise, sums, num_groups, r, width, eps,
            GROUPS=NORM_GROUPS, R_PADDED=triton.next_power_of_2(r),
            WIDTH_PADDED=triton.next_power_of_2(width), num_warps=4)
    d_weight, d_lambda = sums.sum(0)
    return d_signal, d_noise, d_lambda.sum().to(lambda_.dtype), d_weight.to(weight.dtype)


def persistent_grid(x: Tensor, programs_per_sm: int) -> int:
    """Grid size of a persistent kernel: programs per multiprocessor (SM) of x's GPU, times SMs."""
    if not x.is_cuda:
        return programs_per_sm
    return programs_per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count


class DifferentialNorm(torch.autograd.Function):
    """Saves its inputs alone and computes the norm again in the backward pass."""

    @staticmethod
    def forward(ctx, signal, noise, lambda_, weight, eps):
        ctx.save_for_backward(signal, noise, lambda_, weight)
        ctx.eps = eps
        return differential_norm_forward(signal, noise, lambda_, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        grads = differential_norm_backward(dy.contiguous(), *ctx.saved_tensors, ctx.eps)
        return *grads, None


def can_fuse_differential_norm(signal: Tensor) -> bool:
    """Whether the kernel takes it: a program holds whole groups in its registers."""
    r, width = signal.shape[-2:]
    return use_triton(signal) and width <= 1024 and r * width <= 4096


def fused_differential_norm(signal: Tensor, noise: Tensor, lambda_: Tensor, weight: Tensor,
                            eps: float) -> Tensor:
    """weight * RMSNorm(signal - lambda_ * noise), each head by itself: signal (B, T, G, r, 2D),
    noise (B, T, G, 1, 2D), lambda_ a scalar, weight (2D,) in fp32 -> (B, T, G, r, 2D)."""
    return DifferentialNorm.apply(signal.contiguous(), noise.contiguous(), lambda_.contiguous(),
                                  weight.contiguous(), eps)


# ---- Linear cross entropy: F.cross_entropy(x @ weight.T, targets)
#
# The vocabulary is the widest dimension of the model. In Motif-2-12.7B the logits of 8,192 tokens
# are 8192 x 219520: 3.3 GiB in bf16, 6.7 in fp32, and autograd wants them two or three times.
#
# So they never exist all at once. We take LOSS_CHUNK tokens, compute their logits (cuBLAS), turn
# these *in place* into their gradient
#
#     dlogits = scale (softmax(logits) - onehot(target))                            (chunk, V)
#
# and compute dx = dlogits weight and dweight += dlogits^T x from it right away, before the next
# chunk reuses the memory. So the forward pass already makes both gradients, and the backward pass
# only multiplies them by the gradient of the loss, which is 1 in training. It does so in place, so
# there can be one backward pass only: autograd refuses a second.
#
# scale, 1 / the number of tokens for a mean, belongs inside. Had the caller divided the loss by the
# number of tokens instead, the gradients would first be rounded to bf16 and then multiplied and
# rounded again.
#
# dweight is summed in the dtype of the weight, so a bf16 one is rounded after each chunk. With
# 4,096 tokens in one chunk it was off from an fp32 sum by 0.20%, in 2 smaller chunks by 0.23%, in 8
# by 0.36% and in 32 by 0.67%. A sum in fp32 would take twice the memory of the weight.

@jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, scale_ptr, V, GRADIENT: tl.constexpr,
                         BLOCK_SIZE: tl.constexpr):
    """One program: the loss of one token, logsumexp(logits) - logits[target], in nats.

    A negative target is ignored: its loss is 0, and so is its gradient, if its logits are finite. A
    target >= V gives a loss of NaN, and in the plain form an error. With GRADIENT the logits are
    then overwritten by (softmax - onehot) * scale. For that BLOCK_SIZE must be at least the number
    of threads: else Triton gives one element to several threads, and one of them may read what
    another has already overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    is_real = target >= 0
    target_logit = tl.load(logits_ptr + target, mask=is_real & (target < V),
                           other=float("nan")).to(tl.float32)

    # logsumexp in one pass: each lane keeps its largest logit so far, and the sum of exp(logit -
    # largest), which shrinks when a larger one comes. One reduction at the end joins the lanes.
    # A lane that no logit has reached yet starts at -1e30 and not at -inf: (-inf) - (-inf) is NaN.
    lane_max = tl.full((BLOCK_SIZE,), -1e30, tl.float32)
    lane_sum = tl.zeros((BLOCK_SIZE,), tl.float32)
    for start in range(0, V, BLOCK_SIZE):
        i = start + tl.arange(0, BLOCK_SIZE)
        logits = tl.load(logits_ptr + i, mask=i < V, other=-float("inf")).to(tl.float32)
        new_max = tl.maximum(lane_max, logits)
        lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.exp(logits - new_max)
        lane_max = new_max
    row_max = tl.max(lane_max)
    lse = row_max + tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max)))
    tl.store(losses_ptr + row, tl.where(is_real, lse - target_logit, 0.0))

    if GRADIENT:
        # Every thread must have read target_logit before any thread overwrites it.
        tl.debug_barrier()
        factor = tl.where(is_real, tl.load(scale_ptr), 0.0)
        for start in range(0, V, BLOCK_SIZE):
            i = start + tl.arange(0, BLOCK_SIZE)
            p = tl.exp(tl.load(logits_ptr + i, mask=i < V, other=0).to(tl.float32) - lse)
            dlogits = (p - tl.where(i == target, 1.0, 0.0)) * factor
            tl.store(logits_ptr + i, dlogits.to(logits_ptr.dtype.element_ty), mask=i < V)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor | None,
                   gradient: bool) -> Tensor:
    """The losses of logits (rows, V) -> (rows,) in fp32, unscaled. If gradient, the logits become
    (softmax - onehot) * scale."""
    num_rows, V = logits.shape
    if use_triton(logits):
        losses = logits.new_empty(num_rows, dtype=torch.float32)
        block_size = min(max(triton.next_power_of_2(V), 512), 4096)
        # token_losses calls this outside of a custom operator, which would choose the device.
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(num_rows,)](logits, targets, losses, scale, V, GRADIENT=gradient,
                                              BLOCK_SIZE=block_size, num_warps=8)
        return losses

    logits32 = upcast(logits)
    index = targets.clamp(min=0)[:, None]
    is_real = (targets >= 0)[:, None]
    lse = logits32.logsumexp(-1, keepdim=True)
    losses = torch.where(is_real, lse - logits32.gather(1, index), 0)[:, 0]
    if gradient:
        # In place: logits in fp32 are the same tensor as logits32, and the largest of a step.
        softmax = logits32.sub_(lse).exp_().mul_(is_real)
        dlogits = softmax.scatter_add_(1, index, -is_real.to(logits32.dtype)).mul_(scale)
        logits.copy_(dlogits)
    return losses


def empty_loss_outputs(x, weight, targets, scale, needs_dx, needs_dw):
    total = upcast(x.new_empty(()))
    dx = torch.empty_like(x if needs_dx else x[:0])
    dw = torch.empty_like(weight if needs_dw else weight[:0])
    return total, dx, dw


@custom_op(empty_loss_outputs)
def linear_cross_entropy_forward(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor,
                                 needs_dx: bool, needs_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> the sum of the losses, unscaled, and the scaled gradients (no rows if not needed)."""
    num_rows = x.shape[0]
    total, dx, dw = empty_loss_outputs(x, weight, targets, scale, needs_dx, needs_dw)
    total.zero_()
    if num_rows == 0:
        dw.zero_()

    for i in range(0, num_rows, LOSS_CHUNK):
        x_chunk = x[i:i + LOSS_CHUNK]
        targets_chunk = targets[i:i + LOSS_CHUNK]
        logits = x_chunk @ weight.T
        losses = cross_entropy_(logits, targets_chunk, scale, gradient=needs_dx or needs_dw)
        total += losses.sum()

        # If a gradient is needed, (softmax - onehot) * scale has overwritten the logits.
        dlogits = logits
        if needs_dx:
            torch.mm(dlogits, weight, out=dx[i:i + LOSS_CHUNK])
        if needs_dw:
            # beta = 0 for the first chunk, which initialises dw.
            dw.addmm_(dlogits.T, x_chunk, beta=0 if i == 0 else 1)
        # Free this chunk's memory before the next chunk's logits are made.
        del logits, dlogits
    return total, dx, dw


class LinearCrossEntropy(torch.autograd.Function):
    """scale * (sum of the losses). Backward returns the gradients that forward has made.

    grad_enabled is torch.is_grad_enabled() of the caller: inside forward it is always False, and
    needs_input_grad does not know of torch.no_grad()."""

    @staticmethod
    def forward(ctx, x, weight, targets, scale, grad_enabled):
        needs_dx = grad_enabled and ctx.needs_input_grad[0]
        needs_dw = grad_enabled and ctx.needs_input_grad[1]
        total, dx, dw = linear_cross_entropy_forward(x, weight, targets, scale, needs_dx, needs_dw)
        ctx.save_for_backward(dx, dw)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        dx, dw = ctx.saved_tensors
        scale_(dx, d_loss)
        scale_(dw, d_loss)
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        return dx if needs_dx else None, dw if needs_dw else None, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean",
                         scale: float = 1.0) -> Tensor:
    """scale times the cross entropy, in nats, of the logits x @ weight.T, never all there at once.

    x (rows, n), weight (V, n), targets (rows,), negative where a token does not count -> fp32
    scalar: the "sum" over the tokens that count, or their "mean" (0 if there is none). Not for
    autocast.

    Zero logits over 4 words have a loss of ln 4, and the second token does not count:

    >>> x, weight = torch.zeros(2, 3), torch.ones(4, 3)
    >>> linear_cross_entropy(x, weight, torch.tensor([1, -1]))
    tensor(1.3863)
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    factor = x.new_full((), scale, dtype=torch.promote_types(x.dtype, torch.float32))
    if reduction == "mean":
        factor = factor / (targets >= 0).sum().clamp(min=1)
    return LinearCrossEntropy.apply(x, weight, targets.contiguous(), factor,
                                    torch.is_grad_enabled())


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each token, without gradient: x (rows, n), weight (V, n), targets
    (rows,) -> (rows,) in fp32, in nats, 0 where the target is negative. Only the others' logits are
    computed."""
    losses = upcast(x.new_zeros(x.shape[0]))
    real_rows = (targets >= 0).nonzero()[:, 0]
    for rows in real_rows.split(LOSS_CHUNK):
        logits = x[rows] @ weight.T
        losses[rows] = cross_entropy_(logits, targets[rows], scale=None, gradient=False)
    return losses


# ---- Attention: model.causal_attention and model.signal_and_noise_attention
#
# The logits of one layer of Motif-2-12.7B at T = 4,096 are 40 heads x 4096 x 4096: 2.5 GiB in fp32,
# at 16,384 tokens sixteen times as many. FlashAttention (2205.14135) does not write them to memory:
# it makes them block by block in registers, and uses each block right away. What is special here is
# that the value heads may be twice as wide as the keys (2D), that signal and noise heads are
# computed by one launch, and that the largest logit of each head, which QK-clip wants, is returned.
# Unlike FlashAttention's, the backward pass does write one T x T matrix for each head, the lower
# triangle of ds (the gradient of the logits), for a few pairs of heads at a time. The section on
# the backward pass says why.
#
# Who reads what. As in model.py there are H query heads, and P pairs of key heads, each pair with a
# value head. Two more constants, which the kernels are compiled for, describe the groups: HAS_NOISE
# is 1 if a group has a noise head besides its r signal heads, else 0, and GROUPS_PER_PAIR = G / P
# groups share one pair of key heads. The query heads stand group after group, and in a group the
# noise head comes last. `head` is the number of a head in its sequence, `group` that of its group
# among the G groups of the sequence, `place` that of the head in its group. Queries and keys are D
# wide. In 12.7B P = G = 8, so GROUPS_PER_PAIR = 1, and r = 4, HAS_NOISE = 1:
#
#     head  = group * (r + HAS_NOISE) + place
#     pair  = group // GROUPS_PER_PAIR                             12.7B:
#     place < r     a signal head: reads key head 2 * pair         heads 0 .. 3 read key head 0
#     place == r    the noise head: reads key head 2 * pair + 1    head 4 reads key head 1
#                                                                  heads 5 .. 8 read key head 2, ...
#     both read value head `pair`, Dv wide: 2D in 12.7B, and D is possible
#
# So is_noise = place // r. For plain grouped-query attention HAS_NOISE is 0: then a "pair" is one
# key head, and a group is the r query heads that read it, so that G = P, where model.py has G = 0.
# The heads of one pair are neighbours, and head_in_pair counts them: head = pair * heads_per_pair +
# head_in_pair, where heads_per_pair = GROUPS_PER_PAIR * (r + HAS_NOISE). head_in_batch = b * H +
# head counts those of all sequences.
#
# How blocks are loaded. q, k and v are seen as matrices of B * T rows, one for each token; q has
# H * D columns and so on. So sequence b begins at row b * T, which is seq_begin, and a head at
# column head * D. Blocks are (BQ, D) of q, (BK, D) of k and (BK, Dv) of v. The last block of a
# sequence may reach beyond its T rows. "Beyond the end of a sequence", before attention's first
# backward kernel, says what is read there.
#
# Units. The GPU has an instruction for 2^x, and none for e^x. So the kernels compute e^logit as 2
# to the power of logit * log2(e), and three numbers are to be told apart:
#
#     qk               q.k, as tl.dot computes it
#     qk / sqrt(D)     a *logit*, as in model.py, or s in the backward pass: the unit of the
#                      max_logits that attention_forward returns
#     qk * qk_scale    a *log2 logit*, where qk_scale = log2(e) / sqrt(D): the unit of all that the
#                      forward kernel keeps and stores of logits
#
# The algorithm. One program computes BQ queries of one head. It walks over the keys, BK at a time.
# A row of the block of logits belongs to a query. A row's largest logit is known only at the end.
# Until then the program keeps for each row, as in FlashAttention,
#
#     row_max    the largest log2 logit so far
#     row_sum    the sum of 2^(log2 logit - row_max) so far
#     acc        the sum of 2^(log2 logit - row_max) * value so far
#
# A new block first raises row_max to new_max; what was summed before is then too large by the
# factor 2^(new_max - row_max), so row_sum and acc are multiplied by alpha = 2^(row_max - new_max).
# At the end out = acc / row_sum, and row_max is the largest log2 logit of the row, for free. By
# hand: log2 logits 1, 3 in the first block, 4 in the second. After the first row_max = 3, row_sum =
# 2^-2 + 2^0 = 1.25. The second raises row_max to 4, so alpha = 2^-1 and row_sum = 1.25 * 0.5 + 2^0
# = 1.625, which is 2^(1-4) + 2^(3-4) + 2^(4-4).
#
# qk is multiplied by qk_scale twice: once the maximum of a row of qk is taken, and inside exp2(qk *
# qk_scale - new_max), where multiplication and subtraction are one fused multiply-add. block_max is
# the largest row_max of a program's queries; attention_forward makes one largest logit for each
# head of it.
#
# Besides inputs and outputs, only lse = row_max + log2(row_sum) of each row is saved for the
# backward pass: from it the softmax, p = 2^(qk * qk_scale - lse), can be had again.
#
# Documents. A sequence may hold several documents, end to end: query t then sees the keys
# doc_start[t], ..., t. Blocks of keys before the document of a program's first query are skipped.

@jit
def attention_forward_sweep(q, acc, row_max, row_sum, k_desc, v_desc, seq_begin, k_col, v_col,
                            queries, doc_start, lo, hi, qk_scale, MASKED: tl.constexpr,
                            BK: tl.constexpr):
    """Add the keys lo to hi to the running softmax of the queries q (BQ, D) -> the new acc (BQ,
    Dv), row_max (BQ,) and row_sum (BQ,). `queries` (BQ,) are positions in the sequence, which
    begins at row seq_begin of k and v; doc_start (BQ,) is used only if MASKED."""
    for first_key in range(lo, hi, BK):
        qk = tl.dot(q, k_desc.load([seq_begin + first_key, k_col]).T)
        if MASKED:
            keys = (first_key + tl.arange(0, BK))[None, :]
            visible = (keys <= queries[:, None]) & (keys >= doc_start[:, None])
            qk = tl.where(visible, qk, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(qk, 1) * qk_scale)
        p = tl.exp2(qk * qk_scale - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = v_desc.load([seq_begin + first_key, v_col])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        row_max = new_max
    return acc, row_max, row_sum


@jit
def key_head_of(pair, is_noise, HAS_NOISE: tl.constexpr):
    """The key head that a query head reads: the first of its pair, or the second for noise."""
    return pair * (1 + HAS_NOISE) + is_noise


@jit
def output_of_head(signal, noise, head, H, r: tl.constexpr, HAS_NOISE: tl.constexpr):
    """-> `signal` or `noise`, whichever holds the output of this head; how many heads that has; and
    head_in_kind, which of them this head is. Signal heads are in `signal` at group * r + place,
    noise heads in `noise` at group. `signal` and `noise` may be tuples of tensors."""
    num_groups = H // (r + HAS_NOISE)
    group = head // (r + HAS_NOISE)
    place = head % (r + HAS_NOISE)
    is_noise = place // r
    if is_noise == 0:
        return signal, num_groups * r, group * r + place
    else:
        return noise, num_groups, group


@jit
def block_pointers(ptr, token, head, num_heads, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of x[token : token + ROWS, head], a block (ROWS, WIDTH), for a contiguous x (B * T,
    num_heads, WIDTH) that begins at ptr."""
    ptr += (tl.cast(token, tl.int64) * num_heads + head) * WIDTH
    return ptr + (tl.arange(0, ROWS)[:, None] * (num_heads * WIDTH) + tl.arange(0, WIDTH)[None, :])


@jit
def attention_forward_kernel(q_desc, k_desc, v_desc, doc_start_ptr, signal_ptr, noise_ptr, lse_ptr,
                             block_max_ptr, T, H, qk_scale, r: tl.constexpr,
                             HAS_NOISE: tl.constexpr, GROUPS_PER_PAIR: tl.constexpr,
                             D: tl.constexpr, Dv: tl.constexpr, BQ: tl.constexpr,
                             BK: tl.constexpr):
    """One program: BQ queries of one head. The grid is (blocks of queries, B * H)."""
    # The last queries see the most keys. They come first, so that no long program is left at the
    # end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head_in_batch = tl.program_id(1)
    b = head_in_batch // H
    head = head_in_batch % H
    pair = head // (r + HAS_NOISE) // GROUPS_PER_PAIR
    first_query = block * BQ
    queries = first_query + tl.arange(0, BQ)
    is_noise = head % (r + HAS_NOISE) // r
    k_col = key_head_of(pair, is_noise, HAS_NOISE) * D
    v_col = pair * Dv

    q = q_desc.load([b * T + first_query, head * D])
    acc = tl.zeros([BQ, Dv], tl.float32)
    # Not -inf: a row may see no key of a block, and its qk there are -inf. Then new_max would be
    # -inf too, and (-inf) - (-inf) is NaN. From -1e38, p = exp2(-inf) = 0 and alpha = 1.
    row_max = tl.full([BQ], -1e38, tl.float32)
    row_sum = tl.zeros([BQ], tl.float32)
    doc_start = tl.zeros([BQ], tl.int32)
    hi = tl.minimum(first_query + BQ, T)
    if doc_start_ptr is None:
        # All keys before first_query are visible to every query here: they need no mask.
        # (first_query is a multiple of BK, so the two sweeps meet between two blocks.) doc_start =
        # 0 hides nothing.
        masked_lo = first_query
        acc, row_max, row_sum = attention_forward_sweep(
            q, acc, row_max, row_sum, k_desc, v_desc, b * T, k_col, v_col, queries, doc_start, 0,
            masked_lo, qk_scale, MASKED=False, BK=BK)
    else:
        # No later query looks further back than the first one: blocks before its document are
        # skipped. The rest are masked, as a later query's document may begin in any of them.
        masked_lo = tl.load(doc_start_ptr + b * T + first_query) // BK * BK
        doc_start = tl.load(doc_start_ptr + b * T + queries, queries < T, 0)
    acc, row_max, row_sum = attention_forward_sweep(
        q, acc, row_max, row_sum, k_desc, v_desc, b * T, k_col, v_col, queries, doc_start,
        masked_lo, hi, qk_scale, MASKED=True, BK=BK)

    # Queries beyond T get lse = inf, so that the backward pass finds p = exp2(... - inf) = 0 there.
    # lse has room for them: each head has tl.num_programs(0) whole blocks.
    lse = tl.where(queries < T, row_max + tl.log2(row_sum), float("inf"))
    tl.store(lse_ptr + tl.cast(head_in_batch, tl.int64) * (tl.num_programs(0) * BQ) + queries, lse)
    # A maximum drops a NaN, but row_sum keeps it. Where all visible qk of a row overflow to -inf,
    # row_sum is 0. NaN > 0 and 0 > 0 are False: then inf is stored, a sign for QK-clip.
    row_max = tl.where(row_sum > 0, row_max, float("inf"))
    block_max = tl.max(tl.where(queries < T, row_max, float("-inf")), 0)
    tl.store(block_max_ptr + head_in_batch * tl.num_programs(0) + block, block_max)

    out_ptr, num_heads, head_in_kind = output_of_head(signal_ptr, noise_ptr, head, H, r, HAS_NOISE)
    out_ptrs = block_pointers(out_ptr, b * T + first_query, head_in_kind, num_heads, BQ, Dv)
    out = (acc / row_sum[:, None]).to(signal_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, (queries < T)[:, None])


# ---- The backward pass of attention
#
# For one head, with s = q k^T / sqrt(D), p = softmax(s), out = p v, and d_out the gradient of out:
#
#     dv = p^T d_out
#     dp = d_out v^T                                                           the gradient of p
#     ds = p * (dp - delta),   delta = rowsum(p * dp) = rowsum(out * d_out)   one number per row
#     dq = ds k / sqrt(D)
#     dk = ds^T q / sqrt(D)
#
# The code calls 1 / sqrt(D) logit_scale.
#
# dp goes back through the softmax and becomes ds. In one row, let m and j be two of its keys. ∂ is
# a derivative; dp and ds are gradients of the loss, as everywhere in this file:
#
#     p_m          =  exp(s_m) / Z,                        Z the row's sum of exp(s)
#     ∂p_m / ∂s_j  =  p_m ((m == j) - p_j)
#     ds_j         =  sum_m dp_m ∂p_m / ∂s_j  =  p_j (dp_j - delta)
#     delta        =  sum_m p_m dp_m  =  sum_m p_m (d_out . v_m)  =  d_out . out
#
# so that delta needs no T x T matrix. A key head sums dk over the query heads that read it, a value
# head dv over all query heads of its pair, signal and noise. (The kernels make p by exp2, but p is
# the same, and ds is the gradient of the natural logits s: no ln 2 appears.)
#
# By hand, with D = 1, two keys and one query: q = 1, d_out = 1, k = (ln 3, 0), v = (4, 0). Then
# p = (3/4, 1/4), out = 3, dp = (4, 0), delta = 3 and ds = (3/4, -3/4), so dq = 3/4 ln 3,
# dk = (3/4, -3/4) and dv = (3/4, 1/4).
#
# In plain PyTorch, for a pair with one group, where mask is -inf for a key that is not visible:
#
#     for place in range(r + HAS_NOISE):
#         key_head = place // r                                     # 0 signal, 1 noise
#         p = softmax(q[place] @ k[key_head].T / sqrt(D) + mask, 1) # (T, T)
#         dp = d_out[place] @ v.T                                   # (T, T)
#         ds = p * (dp - (p * dp).sum(1, keepdim=True))             # (T, T)
#         dq[place] = ds @ k[key_head] / sqrt(D)                    # (T, D)
#         dk[key_head] += ds.T @ q[place] / sqrt(D)                 # (T, D)
#         dv += p.T @ d_out[place]                                  # (T, Dv)
#
# With documents, query t sees key j if j <= t < doc_end[j], the end of the key's document. Lambda
# is not here: differential_norm's backward pass has put -lambda into d_out of noise heads.
#
# attention_backward, at the end of this section, launches three kernels in this order:
#
#     attention_delta_kernel        out, d_out -> delta
#     attention_dkdv_kernel         q, k, d_out, lse -> dv   (if dv has its own pass: D = 128)
#     for as many pairs at a time as there is room for their ds (DS_BYTES):
#         attention_dkdv_kernel     q, k, v, d_out, lse, delta -> dk, ds (and dv, if D <= 64)
#         attention_dq_kernel       ds, k -> dq
#
# Why ds is written to memory. dk and dv want one program for each block of keys, which loops over
# queries; dq wants one for each block of queries, which loops over keys. There are three ways:
#
#     two kernels, each recomputes s and dp       seven matrix products (Triton's tutorial)
#     one kernel adds to dq with atomics          five, but the parts of dq are added in random
#                                                 order: two runs may differ (FlashAttention-2)
#     one kernel writes ds, another reads it      five (six if dv has its own pass), no atomics
#
# These kernels go the last way. ds is stored in q's dtype.
#
# Beyond the end of a sequence. TMA knows no sequences, only a matrix of B * T rows. So the last
# block of sequence b, where it reaches beyond row T of the sequence, holds
#
#     zeros                       if b is the last sequence: TMA reads nothing outside a tensor;
#     rows of sequence b + 1      if not. As keys they come after all queries of sequence b, so the
#                                 causal mask takes them out. As queries they get no output, and
#                                 lse = inf: so p and ds are 0 in the backward pass.
#
# KNOWN LIMITATION: p = 0 does not take out a NaN or an infinity, as 0 times either is NaN. If T is
# no multiple of TILE, the last tile of sequence b also loads the first tokens of b + 1. A NaN or
# infinity there spoils (a) outputs and dq of the queries in that tile, and (b) dk and dv of every
# key of b. With documents (b) is limited to the blocks of keys in which a query of that tile sees a
# key.

@jit
def attention_delta_kernel(signal_ptr, noise_ptr, d_signal_ptr, d_noise_ptr, delta_ptr, T, H,
                           r: tl.constexpr, HAS_NOISE: tl.constexpr, Dv: tl.constexpr,
                           BQ: tl.constexpr):
    """delta = rowsum(out * d_out), for BQ queries of one head. The grid is (blocks of queries,
    B * H)."""
    head_in_batch = tl.program_id(1)
    first_query = tl.program_id(0) * BQ
    queries = first_query + tl.arange(0, BQ)
    b = head_in_batch // H
    head = head_in_batch % H
    ptrs, num_heads, head_in_kind = output_of_head((signal_ptr, d_signal_ptr),
                                                   (noise_ptr, d_noise_ptr), head, H, r, HAS_NOISE)
    out_ptr, d_out_ptr = ptrs
    out_ptrs = block_pointers(out_ptr, b * T + first_query, head_in_kind, num_heads, BQ, Dv)
    d_out_ptrs = block_pointers(d_out_ptr, b * T + first_query, head_in_kind, num_heads, BQ, Dv)
    out = tl.load(out_ptrs, (queries < T)[:, None], 0.).to(tl.float32)
    d_out = tl.load(d_out_ptrs, (queries < T)[:, None], 0.).to(tl.float32)
    tl.store(delta_ptr + tl.cast(head_in_batch, tl.int64) * (tl.num_programs(0) * BQ) + queries,
             tl.sum(out * d_out, 1))


# Where ds is stored. Its lower triangle is cut into tiles of TILE x TILE, where a tile row has TILE
# queries. Only the tiles on and below the diagonal exist; they are stored in this order:
#
#                     keys j = 0     1     2     3
#     queries i = 0            0
#             i = 1            1     2
#             i = 2            3     4     5
#             i = 3            6     7     8     9
#
# A tile is stored transposed, a row for each key and a column for each query. The tiles of a head
# lie one below the other in memory, as a matrix of TILE columns. So tile row i of a head is a
# matrix (keys 0 ... (i + 1) TILE - 1, TILE queries). Before it come the i (i + 1) / 2 tiles of the
# tile rows above it, so ds[query, key] is at row i (i + 1) / 2 * TILE + key of the head, and at
# column query % TILE. For example query 300 and key 140, with TILE = 128: i = 2, row 3 * 128 + 140
# = 524, column 44. Heads follow each other in memory; tile_row_begin says where.
#
# attention_dq_kernel multiplies ds, for all TILE queries of a tile row, by blocks of keys, without
# a mask. So all of a diagonal tile that it uses must be written, with 0 where the query does not
# see the key. Two parts of ds stay unwritten and do no harm. Queries beyond T: their rows of dq are
# computed and not stored. Blocks of keys that lie wholly beyond T, or before the document of the
# tile row's first query: they are not read. (Every BQ and BK here divides TILE.)
#
# A pass that writes ds does only as many pairs at one time as DS_BYTES has room for. first_pair is
# the first of them, counted in the whole batch. A pass for dv alone does all pairs, with first_pair
# = 0.
#
# Numbers of a head. The tensors are laid out in four ways: q has the heads of a sequence; d_out has
# its signal heads, or its noise heads; lse and delta have the heads of all sequences; and ds has
# the heads of the pairs that are done at one time. So a head has four numbers: head, head_in_kind,
# head_in_batch and head_in_ds. attention_dkdv_sweep makes them from head_in_pair, and says at each
# load which it is. For example two heads of 12.7B (P = 8, r = 4, heads_per_pair = 5), of sequence b
# = 1. At T = 16,384 two pairs are done at one time, and these two heads' turn comes with first_pair
# = 10:
#
#                     head 17, a signal head          head 19, the noise head of its group
#     pair            17 // 5 = 3                     19 // 5 = 3
#     head_in_pair    17 - 3 * 5 = 2                  19 - 3 * 5 = 4
#     key_head        3 * 2 + 0 = 6                   3 * 2 + 1 = 7
#     pair_in_batch   1 * 8 + 3 = 11                  11
#     head_in_batch   11 * 5 + 2 = 57                 11 * 5 + 4 = 59
#     pair_in_ds      11 - 10 = 1                     1
#     head_in_ds      1 * 5 + 2 = 7                   1 * 5 + 4 = 9
#     head_in_kind    3 * 4 + 2 = 14, of d_signal     3 * 1 + 0 = 3, of d_noise

@jit
def tiles_before(i):
    """How many tiles of a head come before tile row i."""
    return i * (i + 1) // 2


@jit
def tile_row_begin(head_in_ds, tile_i, T, TILE: tl.constexpr):
    """The row of ds at which tile row tile_i of a head begins, with key 0."""
    tiles_per_head = tiles_before((T + TILE - 1) // TILE)
    return (head_in_ds * tiles_per_head + tiles_before(tile_i)) * TILE


@jit
def recompute_pT(k, q, lse, qk_scale, first_key, queries, doc_end, MASKED: tl.constexpr):
    """p of the forward pass, divided by its sum, for the keys k (BK, D) and the queries q (BQ, D):
    transposed, (BK, BQ). MASKED: some query may not see some key, and p is 0 there."""
    pT = tl.exp2(tl.dot(k, q.T) * qk_scale - lse[None, :])
    if MASKED:
        keys = (first_key + tl.arange(0, k.shape[0]))[:, None]
        visible = (keys <= queries[None, :]) & (queries[None, :] < doc_end[:, None])
        pT = tl.where(visible, pT, 0.)
    return pT


@jit
def store_dsT(ds_desc, dsT, head_in_ds, first_key, first_query, T, TILE: tl.constexpr):
    """ds, transposed (BK, BQ), to its place in the tiles of a head."""
    begin = tile_row_begin(head_in_ds, first_query // TILE, T, TILE)
    ds_desc.store([begin + first_key, first_query % TILE], dsT)


@jit
def attention_dkdv_sweep(k, v, dk, dv, descriptors, where, doc_end, lo, hi, qk_scale,
                         grouping: tl.constexpr, TILE: tl.constexpr, NEED_DK: tl.constexpr,
                         NEED_DV: tl.constexpr, IS_NOISE: tl.constexpr, MASKED: tl.constexpr):
    """Add to dk and dv of the keys k (BK, D) what the queries lo to hi contribute, from all signal
    heads of the pair, or all noise heads if IS_NOISE. With NEED_DK it also stores ds. Here
    pT, dpT and dsT are p, dp and ds of the formulas, transposed: (BK, BQ), keys by queries. q is
    (BQ, D), d_out (BQ, Dv), lse (BQ,), delta (1, BQ), dk (BK, D) and dv (BK, Dv).

    Two nested loops, over heads and over blocks of queries, would be plainer. But Triton loads
    ahead within the inner loop only, and would begin that anew with each head. So one loop counts
    both. The tuples descriptors, where and grouping only shorten the two calls below."""
    q_desc, d_out_desc, lse_desc, delta_desc, ds_desc = descriptors
    seq_begin, pair, pair_in_batch, pair_in_ds, first_key, T = where
    r: tl.constexpr = grouping[0]
    HAS_NOISE: tl.constexpr = grouping[1]
    GROUPS_PER_PAIR: tl.constexpr = grouping[2]
    BQ: tl.constexpr = q_desc.block_shape[0]
    D: tl.constexpr = q_desc.block_shape[1]
    Dv: tl.constexpr = d_out_desc.block_shape[1]

    heads_per_pair: tl.constexpr = GROUPS_PER_PAIR * (r + HAS_NOISE)
    # How many heads a group and a pair have of this sweep's kind, signal or noise.
    same_kind_per_group: tl.constexpr = 1 if IS_NOISE else r
    same_kind_per_pair: tl.constexpr = GROUPS_PER_PAIR * same_kind_per_group
    num_blocks = (hi - lo + BQ - 1) // BQ
    for step in range(0, same_kind_per_pair * num_blocks):
        # kind_in_pair is the head's number among the pair's heads of its kind.
        kind_in_pair = step // num_blocks
        first_query = lo + (step % num_blocks) * BQ
        group_in_pair = kind_in_pair // same_kind_per_group
        place = IS_NOISE * r + kind_in_pair % same_kind_per_group
        head_in_pair = group_in_pair * (r + HAS_NOISE) + place
        queries = first_query + tl.arange(0, BQ)

        # head counts all heads of the sequence.
        head = pair * heads_per_pair + head_in_pair
        q = q_desc.load([seq_begin + first_query, head * D])
        # head_in_kind counts the signal heads of the sequence, or its noise heads.
        head_in_kind = pair * same_kind_per_pair + kind_in_pair
        d_out = d_out_desc.load([seq_begin + first_query, head_in_kind * Dv])
        # head_in_batch counts the heads of all sequences.
        head_in_batch = pair_in_batch * heads_per_pair + head_in_pair
        lse = lse_desc.load([head_in_batch, first_query]).reshape(BQ)

        pT = recompute_pT(k, q, lse, qk_scale, first_key, queries, doc_end, MASKED)
        if NEED_DV:
            dv = tl.dot(pT.to(d_out.dtype), d_out, dv)
        if NEED_DK:
            dpT = tl.dot(v, d_out.T)
            delta = delta_desc.load([head_in_batch, first_query]).reshape(1, BQ)
            dsT = (pT * (dpT - delta)).to(q.dtype)
            # head_in_ds counts the heads of the pairs that are done at one time.
            head_in_ds = pair_in_ds * heads_per_pair + head_in_pair
            store_dsT(ds_desc, dsT, head_in_ds, first_key, first_query, T, TILE)
            dk = tl.dot(dsT, q, dk)
    return dk, dv


@jit
def attention_dkdv_kernel(q_desc, k_desc, v_desc, doc_end_ptr, d_signal_desc, d_noise_desc,
                          lse_desc, delta_desc, dk_ptr, dv_ptr, ds_desc, first_pair, T, P,
                          qk_scale, logit_scale, r: tl.constexpr, HAS_NOISE: tl.constexpr,
                          GROUPS_PER_PAIR: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
                          BQ: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr,
                          NEED_DK: tl.constexpr, NEED_DV: tl.constexpr):
    """One program: BK keys of one pair. NEED_DK: it makes p, dp, ds and the dk of the pair's key
    heads, and writes ds. NEED_DV: it makes p and dv. The grid is (blocks of keys, pairs from
    first_pair on)."""
    pair_in_ds = tl.program_id(1)                # among the pairs that are done at one time
    pair_in_batch = first_pair + pair_in_ds      # among those of all sequences
    pair = pair_in_batch % P                     # among those of sequence b
    b = pair_in_batch // P
    first_key = tl.program_id(0) * BK
    key_in_block = tl.arange(0, BK)
    seq_begin = b * T
    where = (seq_begin, pair, pair_in_batch, pair_in_ds, first_key, T)
    grouping: tl.constexpr = (r, HAS_NOISE, GROUPS_PER_PAIR)

    # Begin with the diagonal tile's first query, so that ds of the whole tile is written.
    lo = first_key // TILE * TILE
    if doc_end_ptr is None:
        # Only the diagonal tile needs a mask. There are no documents: doc_end is as good as
        # infinite.
        masked_hi = tl.minimum(lo + TILE, T)
        doc_end = tl.full([BK], 2**31 - 1, tl.int32)
    else:
        # No query beyond the end of the last key's document sees any of these keys. All earlier
        # queries are masked, as the document of some key may end at any of them.
        doc_end = tl.load(doc_end_ptr + seq_begin + first_key + key_in_block,
                          first_key + key_in_block < T, 0)
        masked_hi = tl.minimum((tl.max(doc_end, 0) + TILE - 1) // TILE * TILE, T)

    # 0 is a dummy for what this pass does not use. (v is for dp.)
    v = v_desc.load([seq_begin + first_key, pair * Dv]) if NEED_DK else 0
    dv = tl.zeros([BK, Dv], tl.float32) if NEED_DV else 0
    # The compiler unrolls this loop: the signal key head, then the noise key head.
    for IS_NOISE in tl.static_range(1 + HAS_NOISE):
        key_head = key_head_of(pair, IS_NOISE, HAS_NOISE)
        k = k_desc.load([seq_begin + first_key, key_head * D])
        dk = tl.zeros([BK, D], tl.float32) if NEED_DK else 0
        d_out_desc = d_noise_desc if IS_NOISE else d_signal_desc
        descriptors = (q_desc, d_out_desc, lse_desc, delta_desc, ds_desc)
        dk, dv = attention_dkdv_sweep(k, v, dk, dv, descriptors, where, doc_end, lo, masked_hi,
                                      qk_scale, grouping, TILE, NEED_DK, NEED_DV, IS_NOISE,
                                      MASKED=True)
        if doc_end_ptr is None:
            # All later queries see all of these keys.
            dk, dv = attention_dkdv_sweep(k, v, dk, dv, descriptors, where, doc_end, masked_hi, T,
                                          qk_scale, grouping, TILE, NEED_DK, NEED_DV, IS_NOISE,
                                          MASKED=False)
        if NEED_DK:
            dk_ptrs = block_pointers(dk_ptr, seq_begin + first_key, key_head, P * (1 + HAS_NOISE),
                                     BK, D)
            dk = (dk * logit_scale).to(dk_ptr.dtype.element_ty)
            tl.store(dk_ptrs, dk, (first_key + key_in_block < T)[:, None])
    if NEED_DV:
        dv_ptrs = block_pointers(dv_ptr, seq_begin + first_key, pair, P, BK, Dv)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), (first_key + key_in_block < T)[:, None])


@jit
def attention_dq_kernel(ds_desc, k_desc, doc_start_ptr, dq_ptr, first_pair, T, P, logit_scale,
                        r: tl.constexpr, HAS_NOISE: tl.constexpr, GROUPS_PER_PAIR: tl.constexpr,
                        D: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr):
    """One program: dq = ds k / sqrt(D) for one tile row of one head. The grid is (tile rows,
    heads of the pairs in ds)."""
    heads_per_pair: tl.constexpr = GROUPS_PER_PAIR * (r + HAS_NOISE)
    tile_i = tl.num_programs(0) - 1 - tl.program_id(0)      # the longest programs come first
    head_in_ds = tl.program_id(1)
    pair_in_batch = first_pair + head_in_ds // heads_per_pair
    b = pair_in_batch // P
    pair = pair_in_batch % P
    head_in_pair = head_in_ds % heads_per_pair
    is_noise = head_in_pair % (r + HAS_NOISE) // r
    k_col = key_head_of(pair, is_noise, HAS_NOISE) * D

    # With documents, start at the key block in which the document of this tile row's first query
    # begins; attention_dkdv_kernel has written ds for it and for every later block.
    first_query = tile_i * TILE
    lo = 0
    if doc_start_ptr is not None:
        lo = tl.load(doc_start_ptr + b * T + first_query) // BK * BK
    begin = tile_row_begin(head_in_ds, tile_i, T, TILE)
    dq = tl.zeros([TILE, D], tl.float32)
    for first_key in range(lo, tl.minimum(first_query + TILE, T), BK):
        ds = ds_desc.load([begin + first_key, 0]).T
        dq = tl.dot(ds, k_desc.load([b * T + first_key, k_col]), dq)

    query_in_tile = tl.arange(0, TILE)
    head = pair * heads_per_pair + head_in_pair
    dq_ptrs = block_pointers(dq_ptr, b * T + first_query, head, P * heads_per_pair, TILE, D)
    dq = (dq * logit_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptrs, dq, (first_query + query_in_tile < T)[:, None])


class AttentionShape:
    """Sizes of one call. Without noise heads each key head is a pair with one group: so here G = P,
    where model.py has G = 0, and r = H / P. `grouping` are arguments of the kernels (see "Who
    reads what", above)."""

    def __init__(self, q: Tensor, v: Tensor, num_noise_heads: int):
        self.B, self.T, self.H, self.D = q.shape
        self.P, self.Dv = v.shape[2:]
        self.has_noise = 1 if num_noise_heads else 0
        self.G = num_noise_heads or self.P
        self.r = self.H // self.G - self.has_noise
        self.grouping = {"r": self.r, "HAS_NOISE": self.has_noise,
                       "GROUPS_PER_PAIR": self.G // self.P}
        self.num_tile_rows = ceil_div(self.T, TILE)
        self.logit_scale = self.D**-0.5                  # qk * logit_scale is a logit,
        self.qk_scale = self.logit_scale / math.log(2)   # qk * qk_scale a log2 logit


def flatten_batch_for_tma(x: Tensor) -> Tensor:
    """(B, T, ...) -> (B * T, all the rest). TMA needs contiguous rows that begin at multiples of
    16 bytes. If they do not, or the two dimensions cannot be merged, it is a copy."""
    x = x.reshape(x.shape[0] * x.shape[1], -1)
    row_bytes = x.stride(0) * x.element_size()
    aligned = x.data_ptr() % 16 == 0 and row_bytes % 16 == 0
    if x.stride(1) == 1 and aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def tma(x: Tensor, *block: int):
    """A descriptor of x, through which a kernel loads and stores blocks of this shape."""
    return TensorDescriptor.from_tensor(x, list(block))


def empty_attention_outputs(q, k, v, doc_start, num_noise_heads):
    """signal, noise, lse (B * H, T rounded up to whole tiles) and the largest logits (H,)."""
    shape = AttentionShape(q, v, num_noise_heads)
    signal = q.new_empty(shape.B, shape.T, shape.G, shape.r, shape.Dv)
    noise = q.new_empty(shape.B, shape.T, shape.G, shape.has_noise, shape.Dv)
    lse = q.new_empty(shape.B * shape.H, shape.num_tile_rows * TILE, dtype=torch.float32)
    max_logits = q.new_empty(shape.H, dtype=torch.float32)
    return signal, noise, lse, max_logits


@custom_op(empty_attention_outputs)
def attention_forward(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None,
                      num_noise_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> signal, noise, lse (of log2 logits, in base 2), the largest logit of each head (H,)."""
    shape = AttentionShape(q, v, num_noise_heads)
    if shape.B * shape.H > 65535:       # CUDA's limit for the second dimension of a grid
        raise ValueError(f"fused attention takes up to 65,535 sequences x heads at a time, not "
                         f"{shape.B} x {shape.H}; use smaller micro-batches")
    signal, noise, lse, _ = empty_attention_outputs(q, k, v, doc_start, num_noise_heads)
    block_max = q.new_empty(shape.B, shape.H, shape.num_tile_rows, dtype=torch.float32)
    # BK keys at a time, and num_stages: these were the fastest on an H200 that fit its shared
    # memory. (At D = 128 and Dv = 256, two stages of 128 keys and values, with q, take 225 of its
    # 227 KiB.)
    BK, num_stages = (128, 2) if shape.Dv > shape.D else (64, 3)
    attention_forward_kernel[shape.num_tile_rows, shape.B * shape.H](
        tma(flatten_batch_for_tma(q), TILE, shape.D), tma(flatten_batch_for_tma(k), BK, shape.D),
        tma(flatten_batch_for_tma(v), BK, shape.Dv), doc_start, signal, noise, lse, block_max,
        shape.T, shape.H, shape.qk_scale, **shape.grouping, D=shape.D, Dv=shape.Dv, BQ=TILE, BK=BK,
        num_warps=8, num_stages=num_stages)
    return signal, noise, lse, block_max.amax((0, 2)) * math.log(2)


# How attention_dkdv_kernel is launched. Where both accumulators, dk (BK, D) and dv (BK, Dv) in
# fp32, fit the registers, one pass makes both. Where they do not, at D = 128, dv has a pass of its
# own: p is computed twice, and blocks of keys may be twice as large. (One pass with D = 64, Dv =
# 128 keeps 64 x 192 sums in 128 threads: 96 registers of each.) These numbers too were the fastest,
# measured on an H200, of those that fit.
ONE_PASS = dict(BQ=64, BK=64, NEED_DK=True, NEED_DV=True, num_warps=4, num_stages=2)
DV_PASS = dict(BQ=64, BK=128, NEED_DK=False, NEED_DV=True, num_warps=8, num_stages=3)
DK_PASS = dict(BQ=64, BK=128, NEED_DK=True, NEED_DV=False, num_warps=8, num_stages=2)
DQ_BK = 64                # keys at a time in attention_dq_kernel


def rows_of_ds(shape: AttentionShape) -> int:
    """Rows that ds of one pair has in memory; see "Where ds is stored"."""
    heads_per_pair = shape.H // shape.P
    tiles_per_head = shape.num_tile_rows * (shape.num_tile_rows + 1) // 2
    return heads_per_pair * tiles_per_head * TILE


def pairs_that_fit(shape: AttentionShape, itemsize: int) -> int:
    """How many pairs can have their ds in DS_BYTES at one time: at least one, at most all pairs of
    the batch. (One pair of 12.7B at T = 16,384 takes 1.3 GiB in bf16.)"""
    pair_bytes = rows_of_ds(shape) * TILE * itemsize
    return min(max(1, DS_BYTES // pair_bytes), shape.B * shape.P)


def launch_delta(shape: AttentionShape, signal: Tensor, noise: Tensor, d_signal: Tensor,
                 d_noise: Tensor, lse: Tensor) -> Tensor:
    """-> delta, in the shape of lse."""
    BQ = 16
    delta = torch.empty_like(lse)
    attention_delta_kernel[lse.shape[1] // BQ, shape.B * shape.H](
        signal, noise, d_signal, d_noise, delta, shape.T, shape.H, r=shape.r,
        HAS_NOISE=shape.has_noise, Dv=shape.Dv, BQ=BQ, num_warps=4)
    return delta


def empty_attention_gradients(d_signal, d_noise, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@custom_op(empty_attention_gradients)
def attention_backward(d_signal: Tensor, d_noise: Tensor, q: Tensor, k: Tensor, v: Tensor,
                       doc_start: Tensor | None, num_noise_heads: int, signal: Tensor,
                       noise: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk and dv, in the shapes of q, k and v. d_signal and d_noise have those of signal and
    noise. (All shapes are in fused_attention, below.)"""
    shape = AttentionShape(q, v, num_noise_heads)
    d_signal = d_signal.contiguous()
    d_noise = d_noise.contiguous()
    delta = launch_delta(shape, signal, noise, d_signal, d_noise, lse)

    dq, dk, dv = empty_attention_gradients(d_signal, d_noise, q, k, v)
    q = flatten_batch_for_tma(q)
    k = flatten_batch_for_tma(k)
    v = flatten_batch_for_tma(v)
    # A descriptor cannot describe the empty tensor that d_noise is without noise heads.
    d_noise = flatten_batch_for_tma(d_noise if shape.has_noise else d_signal)
    d_signal = flatten_batch_for_tma(d_signal)
    doc_end = None if doc_start is None else document_ends(doc_start)

    pairs_at_once = pairs_that_fit(shape, q.element_size())
    ds = q.new_empty(pairs_at_once * rows_of_ds(shape), TILE)

    def launch_dkdv(first_pair, num_pairs, BQ, BK, **options):
        attention_dkdv_kernel[triton.cdiv(shape.T, BK), num_pairs](
            tma(q, BQ, shape.D), tma(k, BK, shape.D), tma(v, BK, shape.Dv), doc_end,
            tma(d_signal, BQ, shape.Dv), tma(d_noise, BQ, shape.Dv), tma(lse, 1, BQ),
            tma(delta, 1, BQ), dk, dv, tma(ds, BK, BQ), first_pair, shape.T, shape.P,
            shape.qk_scale, shape.logit_scale, **shape.grouping, D=shape.D, Dv=shape.Dv, BQ=BQ,
            BK=BK, TILE=TILE, **options)

    one_pass = shape.D <= 64                    # dk and dv fit the registers
    if not one_pass:
        launch_dkdv(0, shape.B * shape.P, **DV_PASS)
    for first_pair in range(0, shape.B * shape.P, pairs_at_once):
        num_pairs = min(pairs_at_once, shape.B * shape.P - first_pair)
        launch_dkdv(first_pair, num_pairs, **(ONE_PASS if one_pass else DK_PASS))
        num_heads = num_pairs * shape.H // shape.P
        attention_dq_kernel[shape.num_tile_rows, num_heads](
            tma(ds, DQ_BK, TILE), tma(k, DQ_BK, shape.D), doc_start, dq, first_pair, shape.T,
            shape.P, shape.logit_scale, **shape.grouping, D=shape.D, BK=DQ_BK, TILE=TILE,
            num_warps=4, num_stages=3)
    return dq, dk, dv


def document_ends(doc_start: Tensor) -> Tensor:
    """Where each token's document ends (the token after its last one), from where it begins: both
    (B, T) int32.

    >>> document_ends(torch.tensor([[0, 0, 2, 2, 2]], dtype=torch.int32))
    tensor([[2, 2, 5, 5, 5]], dtype=torch.int32)
    """
    B, T = doc_start.shape
    positions = torch.arange(T, device=doc_start.device, dtype=torch.int32)
    # The first position whose document begins after this one.
    return torch.searchsorted(doc_start, positions.expand(B, T).contiguous(), right=True,
                              out_int32=True)


class FusedAttention(torch.autograd.Function):
    """See fused_attention."""

    @staticmethod
    def forward(ctx, q, k, v, doc_start, num_noise_heads):
        if doc_start is not None:
            doc_start = doc_start.int().contiguous()
        signal, noise, lse, max_logits = attention_forward(q, k, v, doc_start, num_noise_heads)
        ctx.num_noise_heads = num_noise_heads
        ctx.save_for_backward(q, k, v, doc_start, signal, noise, lse)
        ctx.mark_non_differentiable(max_logits)
        return signal, noise, max_logits

    @staticmethod
    @once_differentiable
    def backward(ctx, d_signal, d_noise, _):
        q, k, v, doc_start, signal, noise, lse = ctx.saved_tensors
        grads = attention_backward(d_signal, d_noise, q, k, v, doc_start, ctx.num_noise_heads,
                                   signal, noise, lse)
        return *grads, None, None


def attention_form(q: Tensor, k: Tensor, v: Tensor, query_slots: Tensor | None = None) -> str:
    """Which form of attention computes these inputs, the first of these that can:

    "fused"   the kernels above: without a KV cache, on a Hopper GPU (can_fuse_attention)
    "flex"    FlexAttention, below: on a GPU from Ampere on (can_flex_attention), where it is
              worth_compiling
    "plain"   model.py's definition, which makes all logits

    ATTENTION, where it is set, chooses without these checks ("fused" with a KV cache is an error).
    In float64, or if not ENABLED, it is always "plain"."""
    if not ENABLED or q.dtype == torch.float64:
        return "plain"
    if ATTENTION == "fused" and query_slots is not None:
        raise ValueError("the fused attention knows no KV cache")
    if ATTENTION is not None:
        return ATTENTION
    if query_slots is None and can_fuse_attention(q, k, v):
        return "fused"
    if can_flex_attention(q, k, v) and worth_compiling(q, k):
        return "flex"
    return "plain"


FEW_LOGITS = 2**27        # plain attention holds them several times: some 2 GB


def worth_compiling(q: Tensor, k: Tensor) -> bool:
    """FlexAttention is compiled at its first call, which takes about ten seconds. That hardly
    matters while torch.compile compiles the model around it. Elsewhere, for example when a prompt
    is read, it is done only if plain attention would make more than FEW_LOGITS logits. q (B, T,
    heads..., D)."""
    num_logits = q.numel() // q.shape[-1] * k.shape[1]
    return torch.compiler.is_compiling() or num_logits > FEW_LOGITS


def can_fuse_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these inputs: as many queries as keys, of some widths, and values as
    wide as the keys or twice as wide."""
    if not can_multiply(q):
        return False
    D, Dv = q.shape[-1], v.shape[-1]
    same_dtype = q.dtype == k.dtype == v.dtype
    return same_dtype and q.shape[1] == k.shape[1] and D in (16, 32, 64, 128) and Dv in (D, 2 * D)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None,
                    num_noise_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two softmaxes of grouped differential attention, each times the values.

    q (B, T, H, D), k (B, T, K, D), v (B, T, P, Dv), doc_start (B, T) or None -> signal (B, T, G, r,
    Dv), noise (B, T, G, 1, Dv), max_logits (H,): the largest visible logit of each query head, inf
    if one is NaN, or if all of a row overflow to -inf. With num_noise_heads = 0 it is plain
    grouped-query attention: P = K, signal (B, T, K, H / K, Dv), and noise has no heads."""
    return FusedAttention.apply(q, k, v, doc_start, num_noise_heads)


# ---- FlexAttention: model.softmax_attention for all that the kernels above refuse
#
# They need a Hopper, bf16 or fp16, and as many queries as keys. FlexAttention (2412.05496), a part
# of PyTorch, needs none of these: it is a template of FlashAttention's kernels, into which
# torch.compile puts our mask. A call computes one softmax, so that grouped differential attention
# takes two, as in model.py. It takes grouped queries and wide values, and returns each query's
# largest logit.
#
# The mask. In every use a query sees an interval of keys, from `first` to `last`, both inclusive:
#
#                           first           last
#     plain causal          0               the query's own place
#     packed documents      doc_start       the query's own place
#     KV cache              0               the query's slot; slots after it hold the keys of later
#                                           queries, or padding
#
# FlexAttention wants that twice: as a function of a query and a key; and as lists of blocks, of 128
# queries and 128 keys each, so that it can skip what nobody sees. In a *full* block every query
# sees every key, and the function is not called. All other blocks in which a query sees a key are
# *partial*. PyTorch makes these lists by computing all T x S elements of the mask. We need not:
# from one query to the next, first and last never fall. So of a block of queries, the first one has
# the smallest bounds, which give lo and full_hi below; the last one has the largest, which give
# full_lo and hi. With blocks of 4, and a document that begins at token 2:
#
#     key             0 1 2 3   4 5 6 7   8 9 10 11         first   last
#     query  8            x x   x x x x   x                 2       8
#     query  9            x x   x x x x   x x               2       9
#     query 10            x x   x x x x   x x x             2       10
#     query 11            x x   x x x x   x x x  x          2       11
#     block           partial   full      partial
#
#     some query sees the blocks    lo = 2 // 4 = 0            to    hi = 11 // 4 + 1 = 3
#     all see the blocks            full_lo = ceil(2 / 4) = 1  to    full_hi = (8 + 1) // 4 = 2
#
# where a range does not include its end. The backward pass goes over blocks of keys, and wants the
# lists of the queries that see them. Those are ranges too.

FLEX_BLOCK = 128          # side of the mask's blocks: PyTorch's default


def interval_block_mask(first: Tensor, last: Tensor, S: int) -> BlockMask:
    """The mask with which query t of row b sees the keys first[b, t] to last[b, t], both inclusive,
    of S keys. first and last (B, T) never fall from one t to the next.

    >>> last = torch.arange(512)[None]                                 # causal
    >>> mask = interval_block_mask(torch.zeros_like(last), last, 512)
    >>> mask.kv_num_blocks.tolist(), mask.full_kv_num_blocks.tolist()  # by block of queries
    ([[[1, 1, 1, 1]]], [[[0, 1, 2, 3]]])
    """
    T = first.shape[1]
    block_begin = torch.arange(0, T, FLEX_BLOCK, device=first.device)
    block_end = (block_begin + FLEX_BLOCK - 1).clamp(max=T - 1)
    lo = first[:, block_begin] // FLEX_BLOCK                             # (B, query blocks)
    hi = last[:, block_end] // FLEX_BLOCK + 1
    full_lo = ceil_div(first[:, block_end], FLEX_BLOCK)
    full_hi = (last[:, block_begin] + 1) // FLEX_BLOCK
    full_hi = torch.maximum(full_hi, full_lo)                            # no full block: empty
    key_lists = block_lists(lo, full_lo, full_hi, hi, ceil_div(S, FLEX_BLOCK))

    # Query block i sees key block j if lo[i] <= j < hi[i]. lo and hi are sorted, so these i are a
    # range too: it begins at the first i with hi[i] > j, which is the count of hi <= j, and ends
    # before the first i with lo[i] > j, which is the count of lo <= j. The full blocks likewise: an
    # empty range has full_lo = full_hi, and so adds to both counts or to neither.
    j = torch.arange(ceil_div(S, FLEX_BLOCK), device=first.device)[:, None]
    query_lo = (hi[:, None] <= j).sum(-1)                                # (B, key blocks)
    query_hi = (lo[:, None] <= j).sum(-1)
    query_full_lo = (full_hi[:, None] <= j).sum(-1)
    query_full_hi = (full_lo[:, None] <= j).sum(-1)
    query_lists = block_lists(query_lo, query_full_lo, query_full_hi, query_hi,
                              block_begin.shape[0])

    def is_visible(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[b, query] <= key) & (key <= last[b, query])

    return BlockMask((T, S), *key_lists, *query_lists, BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK),
                     mask_mod=is_visible)


def block_lists(lo: Tensor, full_lo: Tensor, full_hi: Tensor, hi: Tensor,
                num_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BlockMask's lists: how many partial blocks each row of blocks has, which ones, how many full
    blocks, which ones. Bounds (B, rows) -> counts (B, 1, rows) and numbers of blocks (B, 1, rows,
    num_blocks), where the 1 stands for the heads, which all see the same; numbers behind a count
    mean nothing."""
    num_full = full_hi - full_lo
    num_partial = hi - lo - num_full
    i = torch.arange(num_blocks, device=lo.device)
    full = full_lo[..., None] + i
    partial = lo[..., None] + i                            # left of the full ones, then right
    partial = torch.where(partial < full_lo[..., None], partial, partial + num_full[..., None])

    partial = partial.clamp(max=num_blocks - 1)
    full = full.clamp(max=num_blocks - 1)

    lists = []
    for numbers in (num_partial, partial, num_full, full):
        lists.append(with_dimension_of_heads(numbers.int().contiguous()))
    return tuple(lists)


def with_dimension_of_heads(x: Tensor) -> Tensor:
    """(B, ...), contiguous -> (B, 1, ...), the same as x[:, None].

    FlexAttention looks for the list of sequence b at b times the stride of the heads' dimension.
    But a dimension of size 1 may have any stride, and for x[:, None] torch.compile (2.11) chose 0
    in training, and B times too much without gradients. as_strided fixes it."""
    B, *sizes = x.shape
    b_stride, *strides = x.stride()
    return x.as_strided((B, 1, *sizes), (b_stride, b_stride, *strides))


def flex_tile_rows(q: Tensor, v: Tensor) -> int:
    """Rows of the tiles that FlexAttention's kernels multiply: 64, 32, or 0 if none would fit.

    Since Ampere a multiprocessor has at least 99 KiB of shared memory for a program (RTX 3090, 4090
    and 5090). PyTorch chooses tiles by D alone, and with D = 128 and Dv = 256 its backward pass
    wants 241 KiB. With 64 rows, a key and its value of 768 bytes each, k and v of the forward pass
    take 48 KiB and q 16 KiB. The backward pass holds 48 KiB of k and v and goes over q and d_out in
    tiles of half as many rows, 24 KiB. With what comes on top the forward pass asks for 72 KiB, the
    backward pass for 77. On Hopper, where more operands of a product lie in shared memory, they ask
    for 112 and 97 of 227 KiB. Longer rows, of fp32 or D = 256, get half as many.
    """
    row_bytes = (q.shape[-1] + v.shape[-1]) * q.element_size()
    if row_bytes <= 768:
        return 64
    if row_bytes <= 1536:
        return 32
    return 0


def can_flex_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether FlexAttention takes these inputs: on a GPU from Ampere on, with heads at least 16
    wide, as a tensor core multiplies, and more than one query: of a single one plain attention
    makes few logits."""
    if not use_triton(q) or not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] < 8:
        return False
    same_dtype = q.dtype == k.dtype == v.dtype
    return same_dtype and q.shape[1] > 1 and q.shape[-1] >= 16 and flex_tile_rows(q, v) > 0


def flex_softmax(q: Tensor, k: Tensor, v: Tensor, first: Tensor,
                 last: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, heads, D), k (B, S, K, D), v (B, S, K, Dv), first and last (B, T) -> out (B, T,
    heads, Dv), and the largest visible logit of each query head (heads,), inf if one is NaN."""
    rows = flex_tile_rows(q, v)
    options = {
        "fwd_BLOCK_M": rows,            # forward: queries of a program, which goes over
        "fwd_BLOCK_N": rows,            # so many keys at a time
        "bwd_BLOCK_N1": rows,           # dk and dv: keys of a program
        "bwd_BLOCK_M1": rows // 2,      # queries at a time
        "bwd_BLOCK_M2": rows,           # dq: queries of a program
        "bwd_BLOCK_N2": rows // 2,      # keys at a time
        "num_stages": 2,
        "num_warps": 8,
        "FORCE_USE_FLEX_ATTENTION": True,      # and not its other kernel, for short queries
    }
    mask = interval_block_mask(first, last, k.shape[1])
    out, aux = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                              block_mask=mask, enable_gqa=True, kernel_options=options,
                              return_aux=AuxRequest(lse=True, max_scores=True))
    # max_scores are logits as in model.py, divided by sqrt(D). A maximum drops a NaN, but the
    # log-sum-exp keeps it: then the maximum is inf, a sign for QK-clip.
    row_max = torch.where(aux.lse.detach().isnan(), torch.inf, aux.max_scores.detach())
    return out.transpose(1, 2), row_max.amax((0, 2))


@functools.cache
def compiled_flex_softmax() -> Callable:
    """flex_softmax under torch.compile, without which FlexAttention would make all logits.

    One graph serves all sizes B > 1, T and S. There is a separate graph each for signal and for
    noise heads, training and inference, B = 1, and a mask of a single block. PyTorch gives up
    after 8 graphs of a function unless told otherwise."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 64)
    return torch.compile(flex_softmax, dynamic=True, fullgraph=True)


def flex_softmax_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None,
                           query_slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results of model.softmax_attention. Logits are in fp32, as in the kernels."""
    B, T, K, h, D = q.shape
    S = k.shape[1]
    first = q.new_zeros(B, T, dtype=torch.int32)
    if doc_start is not None:
        first = doc_start
    last = torch.arange(S - T, S, device=q.device).expand(B, T)
    if query_slots is not None:
        last = query_slots

    arguments = (q.flatten(2, 3), k, v, first.int(), last.int())
    if torch.compiler.is_compiling():
        # It becomes a part of that graph.
        out, max_logits = flex_softmax(*arguments)
    else:
        # pretrain.py evaluates under the stance "force_eager", which would switch off this compiler
        # too. Here it stays on.
        with torch.compiler.set_stance("default"):
            out, max_logits = compiled_flex_softmax()(*arguments)
    return out.unflatten(2, (K, h)), max_logits.view(K, h)


# ---- Symmetric products, for Newton-Schulz (muonclip.py)
#
# Newton-Schulz multiplies matrices whose product is known to be symmetric: X X^T, and products of
# polynomials in X X^T, which commute. So it is enough to compute the tiles on and below the
# diagonal, and to write each one twice, the second time transposed. BLAS calls this syrk. That is
# half of the FLOPs: for a 4096 x 16384 matrix 0.27 instead of 0.55 TFLOP a product.
#
# lower_tile tells a program which tile is its own. Row by row would be the natural numbering: row i
# begins at number i (i + 1) / 2. But the programs that run at one time should share rows of X and
# Y, which then come from the L2 cache. So the tile rows are taken in bands of eight, and a band is
# walked column by column; its last columns, which form a triangle, row by row. With bands of two:
#
#     0
#     1  2            the first band, a triangle only
#     3  5  7
#     4  6  8  9      the second band: 3 to 6 go down the columns, 7 to 9 are the triangle
#
# At the edges a tile may stick out of a matrix: TMA reads zeros there, and writes nothing.

def lower_tiles(num_rows: int, band: int = 8) -> list[tuple[int, int]]:
    """Plain form of lower_tile: row and column of each tile, in the order of their numbers.

    >>> lower_tiles(num_rows=4, band=2)
    [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2), (3, 3)]
    """
    tiles = []
    for top in range(0, num_rows, band):
        rows = range(top, min(top + band, num_rows))
        tiles += [(i, j) for j in range(top) for i in rows]             # before the triangle
        tiles += [(i, j) for i in rows for j in range(top, i + 1)]      # the triangle
    return tiles


@jit
def lower_tile(number, num_rows):
    """Row and column of the tile with this number, with bands of eight.

    Row by row, the tile would be in row i = (sqrt(8 number + 1) - 1) / 2, rounded down: for the
    first tile of row i, 8 number + 1 is (2i + 1)^2, for its last (2i + 3)^2 - 8. (The code has 5 in
    place of 1. That gives the same i, and leaves room for rounding at both ends.) The bands do not
    number tiles row by row, but reordering stays inside a band, so this i is a row of the right
    band. Two tiles of the picture above, which has bands of two; everything is counted from 0:

        number 5    i = 2: the band of rows 2 and 3. It begins at number 2 * 3 / 2 = 3, so the tile
                    is its number 2. Each of its 2 columns before the triangle has 2 tiles, so 2 is
                    the top tile of column 1: row 2, column 1.
        number 9    i = 3: the same band, its number 6. The triangle begins after 2 * 2 = 4 tiles,
                    so the tile is number 2 in it, which is row 1 and column 1 there: row 3,
                    column 3.
    """
    i = ((tl.sqrt(8.0 * number + 5.0) - 1.0) * 0.5).to(tl.int32)
    top = i // 8 * 8                                        # first row of the band
    height = min(num_rows - top, 8)
    in_band = number - top * (top + 1) // 2                 # the number within the band
    in_triangle = in_band - top * height                    # within the triangle; < 0: left of it
    triangle_i = ((tl.sqrt(8.0 * tl.maximum(in_triangle, 0) + 5.0) - 1.0) * 0.5).to(tl.int32)
    row = top + tl.where(in_triangle < 0, in_band % height, triangle_i)
    triangle_j = in_triangle - triangle_i * (triangle_i + 1) // 2
    column = tl.where(in_triangle < 0, in_band // height, top + triangle_j)
    return row, column


@jit
def symmetric_kernel(X_desc, Y_desc, addend_desc, C_desc, m, n, alpha, beta, ADD: tl.constexpr,
                     BY_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr):
    """One program: one tile of C = alpha X Y^T + beta addend on or below the diagonal, and its
    mirror image. The grid is (tiles, E). X and Y (E, m, n) have contiguous rows if BY_ROWS; else
    they come as their transposes (E, n, m). ADD: there is an addend."""
    e = tl.program_id(1)
    tile_i, tile_j = lower_tile(tl.program_id(0), tl.cdiv(m, BLOCK_SIZE))
    i = tile_i * BLOCK_SIZE
    j = tile_j * BLOCK_SIZE

    acc = tl.zeros((BLOCK_SIZE, BLOCK_SIZE), tl.float32)
    for start in range(0, n, STEP):
        if BY_ROWS:
            x = X_desc.load([e, i, start]).reshape(BLOCK_SIZE, STEP)
            yT = Y_desc.load([e, j, start]).reshape(BLOCK_SIZE, STEP).T
        else:
            x = X_desc.load([e, start, i]).reshape(STEP, BLOCK_SIZE).T
            yT = Y_desc.load([e, start, j]).reshape(STEP, BLOCK_SIZE)
        acc = tl.dot(x, yT, acc, input_precision="ieee")
    acc *= alpha
    if ADD:
        addend = addend_desc.load([e, i, j]).reshape(BLOCK_SIZE, BLOCK_SIZE)
        acc += beta * addend.to(tl.float32)

    tile = acc.to(C_desc.dtype)
    C_desc.store([e, i, j], tile.reshape(1, BLOCK_SIZE, BLOCK_SIZE))
    if i != j:
        C_desc.store([e, j, i], tile.T.reshape(1, BLOCK_SIZE, BLOCK_SIZE))


def symmetric_matmul(X: Tensor, Y: Tensor, alpha: float, addend: Tensor | None = None,
                     beta: float = 0.0) -> Tensor:
    """C = alpha X Y^T + beta addend, where the caller knows that C is symmetric.

    X and Y (E, m, n), laid out alike, and a contiguous addend (E, m, m) or None -> C (E, m, m): E
    products at once, by torch.baddbmm where the kernel does not take X. Not a custom operator: the
    optimizer is not compiled, and to dispatch one would take as long as a small product.

    >>> X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> symmetric_matmul(X, X, alpha=1.0)
    tensor([[[ 5., 11.],
             [11., 25.]]])
    """
    if not can_use_symmetric_matmul(X):
        C = X.new_empty(()) if addend is None else addend
        return torch.baddbmm(C, X, Y.mT, beta=beta, alpha=alpha)

    E, m, n = X.shape
    tile_rows = ceil_div(m, TILE)
    tiles = tile_rows * (tile_rows + 1) // 2
    C = X.new_empty(E, m, m)
    by_rows = X.stride(2) == 1
    if by_rows:
        X_desc = tma(X, 1, TILE, 64)
        Y_desc = tma(Y, 1, TILE, 64)
    else:
        X_desc = tma(X.mT, 1, 64, TILE)
        Y_desc = tma(Y.mT, 1, 64, TILE)
    addend_desc = tma(C if addend is None else addend, 1, TILE, TILE)
    C_desc = tma(C, 1, TILE, TILE)
    with torch.cuda.device_of(X):
        symmetric_kernel[tiles, E](X_desc, Y_desc, addend_desc, C_desc, m, n, alpha, beta,
                                   ADD=addend is not None, BY_ROWS=by_rows, BLOCK_SIZE=TILE,
                                   STEP=64, num_warps=4, num_stages=3)
    return C


def can_use_symmetric_matmul(X: Tensor) -> bool:
    """Whether the kernel takes X (E, m, n), with contiguous rows or columns that are aligned as TMA
    wants it."""
    if X.shape[0] > 65535:      # CUDA's limit for the second dimension of a grid
        return False
    return can_multiply(X) and fits_tma(X)


def fits_tma(X: Tensor) -> bool:
    """Whether TMA can read X and write the product: rows or columns must be contiguous, and the
    address, the other strides and, for the result's rows, the sizes be multiples of 16 bytes."""
    contiguous = 1 in X.stride()[1:]
    steps = [*X.shape[1:], *(stride for stride in X.stride() if stride != 1)]
    aligned = all(step * X.dtype.itemsize % 16 == 0 for step in steps)
    return contiguous and aligned and X.data_ptr() % 16 == 0


# ---- FP8: a linear layer whose products have 8-bit inputs
#
# Hopper's tensor cores multiply FP8 twice as fast as bf16. The format used here, E4M3, has a sign,
# 4 bits of exponent and 3 of mantissa. Its largest number is 448, its smallest 2^-9, and there are
# 8 numbers from one power of 2 to the next: rounding changes a number by up to 1/16 of its size, or
# if it is below 2^-6 by up to 2^-10. As that range is small, x is divided by a scale first, so that
# its largest |x| becomes 448:
#
#     scale = max|x| / 448,      x8 = round(x / scale) in FP8,      x is about scale x8
#
# One scale for a whole tensor would let one outlier push everything else towards 0. So there is a
# scale for each index of the axis that the product keeps, shared by all numbers along the axis that
# it sums over. Then the scales can be pulled out of the sum: for one row of x and one of W,
# sum (x_scale x8)(W_scale W8) = x_scale W_scale sum x8 W8. Training a linear layer, x (tokens,
# inputs), W (outputs, inputs), dy (tokens, outputs), takes three products, and each sums over
# another axis:
#
#                     sums over    scales of the first factor     of the second
#     y  = x W^T      inputs       x:  one per token              W: one per output
#     dx = dy W       outputs      dy: one per token              W: one per input
#     dW = dy^T x     tokens       dy: one per output             x: one per input
#
# Each of x, W and dy is scaled along both of its axes, so it is quantised twice: x8 with a scale
# for each row of x, and xT8 with a scale for each row of x^T. What is saved for the backward pass
# are the transposes in FP8, half of the bf16 bytes. In the functions below the argument x is any of
# x, W and dy.
#
# Gradients are in E4M3 as well. E5M2 has more range, which they do not need with a scale per row,
# and half the precision. Sums are in fp32 (use_fast_accum=False): the fast accumulation of Hopper
# saves a tenth of the time, and was 24% off over 16,384 products of one sign.

FP8 = torch.float8_e4m3fn
TINY = 1e-30      # max|x| counts as at least this, so that a row of zeros stays zeros


def quantize_rows(x: Tensor) -> list[Tensor]:
    """Plain form: x (rows, columns) -> x8 (rows, columns) in FP8, x_scale (rows,) in fp32, with x
    about x_scale[:, None] * x8.

    The largest number, 6, becomes 448. 0.1 / x_scale is 7.467; its neighbours in FP8 are 7 and 7.5:

    >>> x8, x_scale = quantize_rows(torch.tensor([[0.1, -3.0, 6.0]]))
    >>> x8.float()
    tensor([[   7.5000, -224.0000,  448.0000]])
    >>> x_scale[:, None] * x8.float()
    tensor([[ 0.1004, -3.0000,  6.0000]])
    """
    x = x.float()
    x_scale = x.abs().amax(1).clamp(min=TINY) * (1 / 448)
    x8 = (x * x_scale.reciprocal()[:, None]).to(FP8)
    return [x8, x_scale]


@jit
def absmax_kernel(x_ptr, row_max_ptr, column_max_ptr, num_rows, num_columns,
                  TRANSPOSE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """One program: a tile of BR rows and BC columns of x, whose max|x| goes into those of its rows
    and, if TRANSPOSE, columns. They are kept as the bits of an fp32 number, read as int32: for
    numbers >= 0 bits order as the numbers do (NaN is the largest), so an integer atomic_max does
    it, and its result does not depend on who comes first."""
    i = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    j = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    mask = (i[:, None] < num_rows) & (j < num_columns)
    x = tl.load(x_ptr + i[:, None] * num_columns + j, mask=mask, other=0)
    bits = tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)
    tl.atomic_max(row_max_ptr + i, tl.max(bits, 1), mask=i < num_rows, sem="relaxed")
    if TRANSPOSE:
        tl.atomic_max(column_max_ptr + j, tl.max(bits, 0), mask=j < num_columns, sem="relaxed")


@jit
def load_scale(absmax_ptr, mask, TINY: tl.constexpr):
    """From the bits of max|x|: scale = max|x| / 448, and 1 / scale."""
    absmax = tl.load(absmax_ptr, mask=mask, other=0).to(tl.float32, bitcast=True)
    # A NaN is not below TINY and stays.
    scale = tl.where(absmax < TINY, TINY, absmax) * (1 / 448)
    # Rounded as PyTorch rounds it, so that x8 has the bits of quantize_rows.
    return scale, tl.div_rn(tl.full(scale.shape, 1, tl.float32), scale)


@jit
def quantize_kernel(x_ptr, row_max_ptr, column_max_ptr, x8_ptr, x_scale_ptr, xT8_ptr, xT_scale_ptr,
                    num_rows, num_columns, TRANSPOSE: tl.constexpr, BR: tl.constexpr,
                    BC: tl.constexpr, TINY: tl.constexpr):
    """One program: a tile of BR rows and BC columns of x8 and, if TRANSPOSE, the same place of xT8.
    Programs with neighbouring program_id(0) run together. Here they are neighbours in a row of x,
    in absmax_kernel in a column."""
    i = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    j = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    mask = (i[:, None] < num_rows) & (j < num_columns)
    x = tl.load(x_ptr + i[:, None] * num_columns + j, mask=mask, other=0)
    x_scale, inverse = load_scale(row_max_ptr + i, i < num_rows, TINY)
    # All tiles of a row write the same scale.
    tl.store(x_scale_ptr + i, x_scale, mask=i < num_rows)
    x8 = (x.to(tl.float32) * inverse[:, None]).to(x8_ptr.dtype.element_ty)
    tl.store(x8_ptr + i[:, None] * num_columns + j, x8, mask=mask)
    if TRANSPOSE:
        xT_scale, inverse = load_scale(column_max_ptr + j, j < num_columns, TINY)
        tl.store(xT_scale_ptr + j, xT_scale, mask=j < num_columns)
        xT8 = (tl.trans(x).to(tl.float32) * inverse[:, None]).to(xT8_ptr.dtype.element_ty)
        mask = (j[:, None] < num_columns) & (i < num_rows)
        tl.store(xT8_ptr + j[:, None] * num_rows + i, xT8, mask=mask)


def empty_quantize_outputs(x, with_transpose, dtype=FP8):
    """x8, x_scale and, if with_transpose, xT8, xT_scale."""
    num_rows, num_columns = x.shape
    outputs = [x.new_empty(num_rows, num_columns, dtype=dtype),
               x.new_empty(num_rows, dtype=torch.float32)]
    if with_transpose:
        outputs += [x.new_empty(num_columns, num_rows, dtype=dtype),
                    x.new_empty(num_columns, dtype=torch.float32)]
    return outputs


@custom_op(empty_quantize_outputs)
def quantize_fp8(x: Tensor, with_transpose: bool) -> list[Tensor]:
    """quantize_rows of x (rows, columns) and, if with_transpose, of x^T too: x8 (rows, columns),
    x_scale (rows,), xT8 (columns, rows), xT_scale (columns,).

    A NaN or infinity makes its whole row NaN in the product. q_proj, k_proj and v_proj quantise the
    same x: torch.compile merges the three calls into one."""
    x = x.contiguous()
    if not use_triton(x):
        if with_transpose:
            return quantize_rows(x) + quantize_rows(x.T.contiguous())
        return quantize_rows(x)

    num_rows, num_columns = x.shape
    absmax = x.new_zeros(num_rows + num_columns, dtype=torch.int32)
    row_max, column_max = absmax.split([num_rows, num_columns])
    # Triton's interpreter rounds to FP8 wrongly: there PyTorch does it.
    dtype = torch.float32 if INTERPRET else FP8
    outputs = empty_quantize_outputs(x, with_transpose, dtype)
    x8, x_scale, xT8, xT_scale = outputs if with_transpose else (*outputs, None, None)
    absmax_kernel[triton.cdiv(num_rows, 128), triton.cdiv(num_columns, 64)](
        x, row_max, column_max, num_rows, num_columns, TRANSPOSE=with_transpose, BR=128, BC=64,
        num_warps=4)
    quantize_kernel[triton.cdiv(num_columns, 128), triton.cdiv(num_rows, 64)](
        x, row_max, column_max, x8, x_scale, xT8, xT_scale, num_rows, num_columns,
        TRANSPOSE=with_transpose, BR=64, BC=128, TINY=TINY, num_warps=8)
    if not with_transpose:
        return [x8.to(FP8), x_scale]
    return [x8.to(FP8), x_scale, xT8.to(FP8), xT_scale]


def scaled_mm(x8: Tensor, x_scale: Tensor, y8: Tensor, y_scale: Tensor) -> Tensor:
    """x y^T in bf16: x8 (rows, n) and y8 (columns, n) in FP8 times their scales, (rows,) and
    (columns,) -> (rows, columns)."""
    # Not y8.T: what .T makes in the backward pass, torch.compile makes in the forward pass and
    # keeps as an attribute of ctx, not by save_for_backward. So activation checkpointing could not
    # drop it: 0.75 GiB a block of the 12.7B model at 16,384 tokens.
    y8_T = y8.t()
    if x8.is_cuda:
        return torch._scaled_mm(x8, y8_T, scale_a=x_scale[:, None], scale_b=y_scale[None],
                                out_dtype=torch.bfloat16, use_fast_accum=False)
    return ((x8.float() * x_scale[:, None]) @ (y8_T.float() * y_scale)).bfloat16()


class LinearFP8(torch.autograd.Function):
    """See linear_fp8; grad_enabled as in LinearCrossEntropy."""

    @staticmethod
    def forward(ctx, x, weight, grad_enabled):
        # Only the backward pass needs the transposes.
        x8, x_scale, *x_transposed = quantize_fp8(x, grad_enabled)
        w8, w_scale, *w_transposed = quantize_fp8(weight, grad_enabled)
        ctx.save_for_backward(*x_transposed, *w_transposed)
        return scaled_mm(x8, x_scale, w8, w_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        xT8, xT_scale, wT8, wT_scale = ctx.saved_tensors
        dy8, dy_scale, dyT8, dyT_scale = quantize_fp8(dy, True)
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx = scaled_mm(dy8, dy_scale, wT8, wT_scale) if needs_dx else None
        dw = scaled_mm(dyT8, dyT_scale, xT8, xT_scale) if needs_dw else None
        return dx, dw, None


def linear_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight) in bf16 with all three products in FP8: x (..., inputs), weight
    (outputs, inputs) -> (..., outputs). FP8 products need sizes that are multiples of 16; others
    are computed in bf16."""
    rows = x.reshape(-1, x.shape[-1])
    sizes = (*rows.shape, *weight.shape)
    if rows.numel() == 0 or any(size % 16 for size in sizes):
        return F.linear(x.bfloat16(), weight.bfloat16())
    y = LinearFP8.apply(rows, weight, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], -1)
