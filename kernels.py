"""Fused operations of Motif-2, each as a plain PyTorch twin: exact, on every device, the reference
that faster forms are compared with. model.py calls these names and knows nothing of what is below.

    rms_norm, rope, poly_norm, poly_norm_mul   row operations, fp32 inside
    grouped_differential_attention             signal and noise attention, largest logit per head
    differential_norm                          signal - lambda x noise, per-head norm, scale
    linear_cross_entropy                       loss over a large vocabulary, a few rows at a time

"fp32 inside" means: computed in fp32 (float64 stays float64), returned in the input's dtype.
`python kernels.py` checks PolyNorm against float64 and times it against autograd.
"""
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_CHUNK = 4096       # rows of logits alive at once in linear_cross_entropy
CACHE_BLOCK = 2**18     # elements that PolyNorm works on at once: 1 MiB of fp32, an L2 cache


def wide(t: Tensor) -> Tensor:
    """t in fp32, or in float64 where it is that already."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


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

class PolyNormMul(torch.autograd.Function):
    """out = polynorm(x) * up over rows (R, n), with the closed-form gradient of poly_norm_mul.
    Saves x, up and three numbers a row, recomputes the rest, works on blocks that fit a cache."""

    @staticmethod
    def forward(ctx, x, up, weight, bias, eps):
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
        ctx.save_for_backward(x, up, weight, bias, r)
        return out

    @staticmethod
    def backward(ctx, d):
        x, up, weight, bias, r = ctx.saved_tensors
        (w0, w1, w2), b, n = wide(weight), wide(bias), x.shape[-1]
        dx, d_up = torch.empty_like(x), None if up is None else torch.empty_like(up)
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
        return dx, d_up, sums[:3].to(weight.dtype), sums[3:].to(bias.dtype), None


def row_blocks(*tensors: Tensor | None):
    """The same rows of every (R, ...) tensor, CACHE_BLOCK elements of the first at a time; on a
    GPU, where a launch costs more than a cache miss, all at once."""
    rows = len(tensors[0]) if tensors[0].is_cuda else CACHE_BLOCK // tensors[0].shape[-1]
    rows = max(1, rows)
    for i in range(0, len(tensors[0]), rows):
        yield [None if t is None else t[i:i + rows] for t in tensors]


def horner(x: Tensor, *c: Tensor) -> Tensor:
    """c[0] + x (c[1] + x (...)): no power of x is formed, so that |x| = 3e5 keeps its precision. In
    place, as two rows of coefficients in one addcmul take a path that is three times slower."""
    y = x * c[-1]
    for coefficient in reversed(c[1:-1]):
        y = y.add_(coefficient).mul_(x)
    return y.add_(c[0])


def poly_norm_mul(x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PolyNorm(x) * up: x, up (..., n), weight (3,) = cubic, square, linear, bias (1,) -> (..., n).

        r_p = 1 / sqrt(mean(x^2p) + eps)       y = x (w2 r1 + x (w1 r2 + x w0 r3)) + b
        g = dL/dy, s_p = r_p sum(g x^p), k1 = w2 r1^2 s1/n, k2 = 2 w1 r2^2 s2/n, k3 = 3 w0 r3^2 s3/n
        dx = g (w2 r1 + x (2 w1 r2 + x 3 w0 r3)) - x (k1 + x^2 (k2 + x^2 k3))
        dw0, dw1, dw2, db = sums over the rows of s3, s2, s1, g

    fp32 inside. Source: PolyCom (arXiv 2411.03884)."""
    rows = [t if t is None else t.reshape(-1, x.shape[-1]).contiguous() for t in (x, up)]
    return PolyNormMul.apply(*rows, weight, bias, eps).view(x.shape)


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

def causal_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None):
    """softmax(q k^T / sqrt D, causal) v, every key head serving h query heads.

    q (B, T, K, h, D), k (B, S, K, D), v (B, S, K, Dv) -> out (B, T, K, h, Dv), largest visible
    logit (K, h). Query t stands at position S - T + t, so that cached keys may come first.
    documents (B, T), for S = T only: a token sees only those of its own number. Softmax in fp32;
    the products, logits among them, in the input's dtype."""
    T, h, D, S = q.shape[1], q.shape[3], q.shape[4], k.shape[1]
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    if documents is not None:
        hidden = (hidden | (documents[:, :, None] != documents[:, None, :]))[:, None, None]
    q = (q * D**-0.5).permute(0, 2, 3, 1, 4).flatten(2, 3)               # (B, K, hT, D)
    logits = wide(q @ k.permute(0, 2, 3, 1)).unflatten(2, (h, T))        # (B, K, h, T, S)
    mask = torch.zeros_like(hidden, dtype=logits.dtype).masked_fill_(hidden, -torch.inf)
    logits = logits.add_(mask)
    largest = logits.detach().amax(dim=(0, 3, 4))
    p = logits.softmax(-1).to(v.dtype).flatten(2, 3)                     # (B, K, hT, S)
    out = (p @ v.transpose(1, 2)).unflatten(2, (h, T))                   # (B, K, h, T, Dv)
    return out.permute(0, 3, 1, 2, 4), largest


def grouped_differential_attention(q: Tensor, k: Tensor, v: Tensor, num_noise_heads: int,
                                   documents: Tensor | None = None):
    """The two softmaxes of grouped differential attention (arXiv 2510.06949), before lambda.

    G noise heads, r signal heads for each, P pairs of key heads (P divides G):
    q (B, T, G(r+1), D), each group its r signal heads and then its noise head; k, v (B, S, 2P, D),
    key heads (signal, noise) by pair, value heads of a pair side by side: 2D wide.
        signal = softmax(q1 k1^T / sqrt D) v    noise = softmax(q2 k2^T / sqrt D) v
    -> signal (B, T, G, r, 2D), noise (B, T, G, 1, 2D), largest logit per query head (G(r+1),)."""
    B, T, H, D = q.shape
    G, P = num_noise_heads, k.shape[2] // 2
    q = q.unflatten(2, (G, H // G))                                      # (B, T, G, r+1, D)
    k = k.unflatten(2, (P, 2))                                           # (B, S, P, 2, D)
    v = v.unflatten(2, (P, 2)).flatten(3)                                # (B, S, P, 2D)
    outs, largest = [], []
    for q_i, k_i in (q[:, :, :, :-1], k[:, :, :, 0]), (q[:, :, :, -1:], k[:, :, :, 1]):
        shared = q_i.reshape(B, T, P, -1, D)                             # all heads of one pair
        out, top = causal_attention(shared, k_i, v, documents)
        outs.append(out.reshape(B, T, G, -1, 2 * D))
        largest.append(top.view(G, -1))
    return *outs, torch.cat(largest, dim=1).flatten()


def differential_norm(signal: Tensor, noise: Tensor, lambda_: Tensor, weight: Tensor, scale: float,
                      eps: float) -> Tensor:
    """RMSNorm(signal - lambda noise) * scale, each head by itself: signal (B, T, G, r, 2D), noise
    (B, T, G, 1, 2D), lambda_ a scalar, weight (2D,) -> (B, T, G r 2D); fp32 inside."""
    u = wide(signal) - lambda_ * wide(noise)
    y = F.rms_norm(u, u.shape[-1:], wide(weight) * scale, eps)
    return y.to(signal.dtype).flatten(2)


# ---- loss

class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of x @ weight^T, with both gradients made in the forward pass, chunk
    by chunk, while the chunk's logits exist."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = wide(x.new_zeros(()))
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(x), LOSS_CHUNK):
            rows, t = x[i:i + LOSS_CHUNK], targets[i:i + LOSS_CHUNK, None]
            kept, t = t >= 0, t.clamp(min=0)
            logits = wide(rows @ weight.T)                               # (chunk, V)
            lse = logits.logsumexp(-1, keepdim=True)
            total += ((lse - logits.gather(1, t)) * kept).sum()
            if dx is None and dw is None:
                continue
            p = logits.sub_(lse).exp_().mul_(kept)                       # softmax - onehot
            p = p.scatter_add_(1, t, -kept.to(p.dtype)).to(x.dtype)
            if dx is not None:
                torch.mm(p, weight, out=dx[i:i + LOSS_CHUNK])
            if dw is not None:
                dw.addmm_(p.T, rows)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, d):
        dx, dw = ctx.saved_tensors
        return *(g if g is None else g * d.to(g.dtype) for g in (dx, dw)), None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor,
                         reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of the logits x @ weight^T without ever holding them all.

    x (N, n), weight (V, n), targets (N,) with negative ones ignored -> fp32 scalar, the "sum" or
    the "mean" over the targets kept (0 if none is). ValueError for another reduction."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if torch.is_autocast_enabled(x.device.type):  # which leaves products into a given tensor alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    total = LinearCrossEntropy.apply(x, weight, targets)
    return total if reduction == "sum" else total / (targets >= 0).sum().clamp(min=1)


def main() -> None:
    """PolyNorm x up, forward and backward: error against float64, time against autograd."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PolyNorm x up, forward + backward, fp32, {device}, {torch.get_num_threads()} threads")
    for rows, n in (2048, 768), (2048, 3072), (8192, 768):
        torch.manual_seed(0)
        x, up, d = (torch.randn(rows, n, device=device) for _ in range(3))
        weight, bias = torch.full((3,), 1 / 3, device=device), torch.zeros(1, device=device)

        def run(f, dtype=torch.float32):
            inputs = [t.to(dtype).requires_grad_() for t in (x, up, weight, bias)]
            begin = time.perf_counter()
            f(*inputs, 1e-6).backward(d.to(dtype))
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin, inputs[0].grad.double()

        exact, (_, ours) = run(poly_norm_mul_by_definition, torch.float64)[1], run(poly_norm_mul)
        times = [(run(poly_norm_mul)[0], run(poly_norm_mul_by_definition)[0]) for _ in range(25)]
        a, b = (statistics.median(t) for t in zip(*times))
        ratios = sorted(theirs / mine for mine, theirs in times)
        print(f"{rows:6d} x {n:5d}  closed form {1e3 * a:7.2f} ms  autograd {1e3 * b:7.2f} ms  "
              f"{b / a:4.1f}x ({ratios[6]:.1f} to {ratios[18]:.1f})  error of dx "
              f"{(ours - exact).norm() / exact.norm():.1e}")


if __name__ == "__main__":
    main()
