"""Checks every kernel against float64, then, on a GPU, times it beside PyTorch's own operations:
`python -m tools.bench_kernels [--json] [--only=NAME]`. On a CPU it checks through Triton's
interpreter and times nothing."""
import argparse
import json
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read by triton.jit
import kernels
import model
from kernels import linear_cross_entropy, linear_fp8, poly_norm, poly_norm_mul, symmetric_matmul, triton
from model import causal_attention, differential_norm, grouped_differential_attention, rms_norm, rope


@contextmanager
def plain_twins():
    """Within it no kernel is used."""
    kernels.ENABLED = False
    try:
        yield
    finally:
        kernels.ENABLED = True


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
    yield "symmetric, rows", lambda x: symmetric_matmul(x, x, 1.0), [x]
    yield "symmetric, columns", lambda x, d: symmetric_matmul(x, x, 0.5, d, 2.0), [
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
    weights, polynorm = [numbers(3), numbers(1)], lambda x, up, w, b: model.poly_norm(
        x, w, b) * up
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
            "TFLOP/s", (4096,), lambda x: symmetric_matmul(x, x, 1.0), [normal(1, 4096, k).detach()],
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
