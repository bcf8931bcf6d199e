"""Checks every kernel against float64, then, on a GPU, times it beside PyTorch's own operations.

    python -m tools.bench_kernels [--json] [--only=NAME]
    python -m tools.bench_kernels --forms [--json] [--only=NAME]

A check computes outputs and gradients three times: in float64, by the kernel, and by the plain
PyTorch that the kernel replaces, in the same dtype. It prints the relative errors of the last two
for each tensor. A kernel may be no more than a tenth worse than plain PyTorch.

    ok    poly_norm_mul                1.7e-03/1.7e-03 2.4e-03/2.4e-03 ...

On a CPU that is all, and the kernels run through Triton's interpreter. On a GPU follow the times
of forward, and of forward and backward together: milliseconds, the rate, the rate in per cent of
what a copy or a large matrix product reaches in the same run, and the most memory in use. Behind
them come other ways to compute the same, as multiples of our time.

With --forms it times the forms of attention alone (kernels.attention_form), with PyTorch's own
beside them, on rows of up to 32,768 tokens: a line for each, with the error of one that fails.
"""
import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GPU = torch.cuda.is_available()
if __name__ == "__main__" and not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")     # before kernels.py defines its kernels
import kernels
import model
from kernels import linear_cross_entropy, linear_fp8, poly_norm_mul, symmetric_matmul, triton
from model import causal_attention, differential_norm, signal_and_noise_attention

DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float16       # the interpreter multiplies bf16 wrongly
UNITS = {"GB/s": 1e6, "TFLOP/s": 1e9}                  # bytes or FLOPs per millisecond


@contextmanager
def plain_twins():
    """Within it plain PyTorch computes everything."""
    kernels.ENABLED = False
    try:
        yield
    finally:
        kernels.ENABLED = True


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Random numbers that want a gradient."""
    return (torch.randn(shape, device=DEVICE, dtype=dtype) * scale).requires_grad_()


normal_fp32 = partial(normal, dtype=torch.float32)     # as weights of norms are in training


def outputs_and_gradients(f: Callable, inputs: list[Tensor],
                          d_outs: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    """f's outputs, then the gradients of its inputs for d_outs, or for random numbers."""
    outs = f(*inputs)
    if not isinstance(outs, tuple):
        outs = (outs,)
    differentiable = [out for out in outs if out.requires_grad]
    if not differentiable:
        return outs
    if d_outs is None:
        d_outs = []
        for out in differentiable:
            d = torch.randn(out.shape, device=out.device, dtype=torch.bfloat16)
            d_outs.append(d.to(out))            # few bits: the same numbers in every dtype
    wanted = [t for t in inputs if t.requires_grad]
    return outs + torch.autograd.grad(differentiable, wanted, d_outs)


def attempt(f: Callable, *args):
    """f(*args), or its error as a line of text: what fails here does not stop the rest."""
    try:
        return f(*args)
    except Exception as e:
        message = str(e) or "no message"
        return f"{type(e).__name__}: {message.splitlines()[0][:150]}"


# ---- checks

@dataclass
class Check:
    name: str
    f: Callable
    inputs: list[Tensor]
    exact: Callable | None = None      # what f approximates, where it is not f itself in float64


def gram(x: Tensor) -> Tensor:
    return symmetric_matmul(x, x, 1.0)


def gram_plus(x: Tensor, d: Tensor) -> Tensor:
    return symmetric_matmul(x, x, 0.5, d, 2.0)


def checks() -> Iterator[Check]:
    """Every kernel on few tokens, with the widths of the 12.7B model."""
    n = 16384
    weights = [normal_fp32(3), normal_fp32(1)]
    polynorm = partial(poly_norm_mul, eps=1e-6)
    yield Check("poly_norm_mul", polynorm, [normal(3, n), normal(3, n), *weights])

    yield Check("differential_norm", partial(differential_norm, scale=0.7, eps=1e-5),
                [normal(1, 9, 8, 4, 256), normal(1, 9, 8, 1, 256), normal_fp32(),
                 normal_fp32(256)])

    yield from attention_checks()

    targets = torch.tensor([3, -1, 0, 219519], device=DEVICE)
    yield Check("linear_cross_entropy", linear_cross_entropy,
                [normal(4, 64), normal(219520, 64), targets])

    m = 4096 if GPU else 272
    x = normal(1, m, 64).detach()
    d = normal(1, m, m).detach()
    yield Check("symmetric, rows", gram, [x])
    yield Check("symmetric, columns", gram_plus, [x.mT.contiguous().mT, d + d.mT])
    yield Check("linear_fp8", linear_fp8, [normal(256, 512), normal(384, 512)], exact=F.linear)


def attention_checks() -> Iterator[Check]:
    begins = torch.tensor([0] * 100 + [100] * 60 + [160] * 96, device=DEVICE, dtype=torch.int32)
    doc_starts = {"causal": None, "documents": begins[None]}
    sizes = [(8, 128), (2, 64)] if GPU else [(1, 64)]
    for G, D in sizes:
        qkv = [normal(1, 256, 5 * G, D), normal(1, 256, 2 * G, D), normal(1, 256, G, 2 * D)]
        for name, doc_start in doc_starts.items():
            attention = partial(signal_and_noise_attention, num_noise_heads=G,
                                doc_start=doc_start)
            yield Check(f"attention of {D}, {name}", attention, qkv)
    yield Check("attention, plain", causal_attention,
                [normal(1, 256, 2, 3, 64), normal(1, 256, 2, 64), normal(1, 256, 2, 64)])


def relative_errors(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Frobenius norms of the differences, as shares of the exact tensors' norms."""
    return [((x - y).norm() / y.norm()).item() for x, y in zip(ours, exact, strict=True)]


def run_check(check: Check) -> dict:
    """-> name, errors of the kernel, errors of plain PyTorch, whether the kernel is good enough."""
    def run(f: Callable, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        inputs = []
        for t in check.inputs:
            copy = t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach()
            inputs.append(copy.requires_grad_(t.requires_grad))
        return outputs_and_gradients(f, inputs)

    exact = run(check.exact or check.f, torch.float64)
    ours = relative_errors(run(check.f), exact)
    with plain_twins():
        twin = relative_errors(run(check.f), exact)

    # 1e-5: what sums in fp32 may differ by.
    ok = all(x <= 1.1 * y + 1e-5 for x, y in zip(ours, twin))
    return {"check": check.name, "error": ours, "twin": twin, "ok": ok}


# ---- times

def milliseconds(f: Callable, repeats: int = 20) -> float:
    """Median time of a call of f.

    Short calls are timed as a CUDA graph, without the host's time to launch them: in a training
    step the host is ahead of the GPU. Long ones are timed `repeats` times as they are."""
    ms = triton.testing.do_bench(f, return_mode="median")
    if ms > 5:
        return triton.testing.do_bench(f, rep=repeats * ms, return_mode="median")
    return triton.testing.do_bench_cudagraph(f, rep=100, return_mode="median")


class Times(NamedTuple):
    forward: float
    both: float | None        # forward and backward; None if there is nothing to differentiate
    peak: float | None        # GiB at most in both


def time_passes(f: Callable, inputs: list[Tensor], repeats: int = 20) -> Times:
    d_outs = [torch.randn_like(t) for t in outputs_and_gradients(f, inputs) if t.requires_grad]
    torch.cuda.reset_peak_memory_stats()
    outputs_and_gradients(f, inputs, d_outs)
    peak = torch.cuda.max_memory_allocated() / 2**30
    both = None
    if d_outs:
        both = milliseconds(partial(outputs_and_gradients, f, inputs, d_outs), repeats)
    return Times(milliseconds(partial(f, *inputs), repeats), both, peak)


def measure(unit: str, work: tuple[float, ...], f: Callable, inputs: list[Tensor],
            eager: Callable | None = None, with_compile: bool = True, **others: Callable) -> dict:
    """One line of the table, as a dict.

    work: the least bytes, or the FLOPs, of the forward pass and of both passes, per element of the
    first input. eager: plain PyTorch for the same, timed as it is and by torch.compile. others:
    functions that return Times of something else."""
    row = {"unit": unit, "work": [n * inputs[0].numel() for n in work]}
    row["ours"] = time_passes(f, inputs)
    with plain_twins():
        if eager:
            row["eager"] = attempt(time_passes, eager, inputs)
        if eager and with_compile:
            row["torch.compile"] = attempt(time_passes, torch.compile(eager), inputs)
    for name, other in others.items():
        row[name] = attempt(other)
    return row


# ---- one function for each line of the table. Bytes per element: 2 for each bf16 tensor that is
# read or written once.

def plain_poly_norm_mul(x: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return model.poly_norm(x, weight, bias) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def time_poly_norm_mul() -> dict:
    x = normal(8192, 16384)
    up = normal(8192, 16384)
    time_swiglu = partial(time_passes, torch.compile(swiglu), [x, up])
    return measure("GB/s", (6, 16), partial(poly_norm_mul, eps=1e-6),
                   [x, up, normal_fp32(3), normal_fp32(1)], plain_poly_norm_mul,
                   SwiGLU=time_swiglu)


def time_rms_norm() -> dict:
    norm = partial(model.rms_norm, eps=1e-5)
    return measure("GB/s", (4, 10), torch.compile(norm), [normal(65536, 4096), normal(4096)], norm,
                   with_compile=False)


def add_and_rms_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x + y, model.rms_norm(x + y, weight, 1e-5)


def time_add_and_rms_norm() -> dict:
    inputs = [normal(65536, 4096), normal(65536, 4096), normal(4096)]
    return measure("GB/s", (8, 16), torch.compile(add_and_rms_norm), inputs, add_and_rms_norm,
                   with_compile=False)


def time_rope() -> dict:
    cos, sin = torch.randn(2, 1, 65536, 1, 64, device=DEVICE)

    def rope(x: Tensor) -> Tensor:
        return model.rope(x, cos, sin)

    return measure("GB/s", (4, 8), torch.compile(rope), [normal(1, 65536, 40, 128)], rope,
                   with_compile=False)


def time_differential_norm() -> dict:
    norm = partial(differential_norm, scale=0.7, eps=1e-5)
    inputs = [normal(2, 4096, 8, 4, 256), normal(2, 4096, 8, 1, 256), normal_fp32(),
              normal_fp32(256)]
    return measure("GB/s", (4.5, 11.5), norm, inputs, norm)


def attention_inputs(B: int, T: int, G: int, D: int) -> list[Tensor]:
    """q, k and v with four signal heads to each of G noise heads."""
    return [normal(B, T, 5 * G, D), normal(B, T, 2 * G, D), normal(B, T, G, 2 * D)]


def document_begins(B: int, T: int, document: int) -> Tensor:
    """doc_start of documents of so many tokens each."""
    t = torch.arange(T, device=DEVICE, dtype=torch.int32).expand(B, T)
    return t // document * document


def time_attention(B: int, T: int, G: int, D: int, document: int | None = None) -> dict:
    """document: tokens per document."""
    q, k, v = attention_inputs(B, T, G, D)
    starts = document_begins(B, T, document or T)
    keys_per_query = (torch.arange(T, device=DEVICE) - starts + 1).double().mean().item()

    attention = partial(signal_and_noise_attention, num_noise_heads=G,
                        doc_start=starts if document else None)
    others = {}
    if not document:
        others["eager"] = partial(flash_attention, G=G)
        others["cuDNN"] = partial(time_cudnn, q, k, v, G)
    # Forward 2 D + 2 * 2 D FLOPs per pair of a query and a key, over the D numbers of a query; the
    # backward pass adds 14 D: Q K^T and dQ and dK of D, dV and dP of 2 D.
    return measure("TFLOP/s", (6 * keys_per_query, 20 * keys_per_query), attention, [q, k, v],
                   with_compile=False, **others)


def two_calls(q: Tensor, k: Tensor, v: Tensor, G: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of the signal map and of the noise map, as (B, heads, T, D) for SDPA."""
    q = q.unflatten(2, (G, -1))
    k = k.unflatten(2, (G, 2))
    v = v.transpose(1, 2)
    q_signal = q[:, :, :, :-1].flatten(2, 3).transpose(1, 2)
    q_noise = q[:, :, :, -1].transpose(1, 2)
    k_signal, k_noise = k.unbind(3)
    return [(q_signal, k_signal.transpose(1, 2), v), (q_noise, k_noise.transpose(1, 2), v)]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, G: int) -> tuple[Tensor, ...]:
    """Four calls of FlashAttention 2, which takes no values wider than the keys."""
    outs = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        for q_map, k_map, v_map in two_calls(q, k, v, G):
            for half in v_map.chunk(2, -1):
                outs.append(F.scaled_dot_product_attention(q_map, k_map, half, is_causal=True,
                                                           enable_gqa=True))
    return tuple(outs)


def time_cudnn(q: Tensor, k: Tensor, v: Tensor, G: int) -> Times:
    """cuDNN at its fastest: two calls forward, and four backward, each for half of the values."""
    aten = torch.ops.aten
    calls = [tuple(t.detach() for t in call) for call in two_calls(q, k, v, G)]

    def forward() -> list:
        return [aten._scaled_dot_product_cudnn_attention(*qkv, None, True, 0.0, True, False)
                for qkv in calls]

    d_outs = [torch.randn_like(out) for out, *_ in forward()]

    def both() -> None:
        for (q, k, v), d_out, saved in zip(calls, d_outs, forward()):
            out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
            grads = []
            halves = zip(d_out.chunk(2, -1), v.chunk(2, -1), out.chunk(2, -1))
            for d_half, v_half, out_half in halves:
                dq, dk, _ = aten._scaled_dot_product_cudnn_attention_backward(
                    d_half, q, k, v_half, out_half, lse, seed, offset, None, cum_q, cum_k, max_q,
                    max_k, 0.0, True)
                grads.append((dq, dk))
            grads[0][0].add_(grads[1][0])
            grads[0][1].add_(grads[1][1])

    return Times(milliseconds(forward), milliseconds(both), None)


# ---- the forms of attention against each other

FORMS = ["fused", "flex", "plain", "flash, 4 calls", "cuDNN"]


def time_form(form: str, inputs: list[Tensor], G: int, doc_start: Tensor | None = None,
              query_slots: Tensor | None = None) -> Times:
    if form == "flash, 4 calls":
        return time_passes(partial(flash_attention, G=G), inputs, repeats=5)
    if form == "cuDNN":
        return time_cudnn(*inputs, G)
    attention = partial(signal_and_noise_attention, num_noise_heads=G, doc_start=doc_start,
                        query_slots=query_slots)
    kernels.ATTENTION = form
    try:
        return time_passes(attention, inputs, repeats=5)
    finally:
        kernels.ATTENTION = None


def time_forms(only: str) -> Iterator[dict]:
    """Times of each form, at the heads of the 124M and of the 12.7B model."""
    for heads, G, D in (("8 + 2 heads of 64", 2, 64), ("32 + 8 heads of 128", 8, 128)):
        for B, T in ((16, 1024), (1, 4096), (1, 16384), (1, 32768)):
            yield from time_each_form(only, FORMS, f"{B}x{T}, {heads}",
                                      lambda: attention_inputs(B, T, G, D), G)

        starts = document_begins(1, 16384, 2048)
        yield from time_each_form(only, FORMS[:3], f"1x16384, documents of 2048, {heads}",
                                  lambda: attention_inputs(1, 16384, G, D), G, doc_start=starts)

        # A piece of a long prompt: 2,048 new tokens behind 30,000 in the cache.
        def prefill_inputs() -> list[Tensor]:
            q = normal(1, 2048, 5 * G, D).detach()
            k = normal(1, 2 * G, 32768, D).detach().transpose(1, 2)      # as they lie in a cache
            v = normal(1, G, 32768, 2 * D).detach().transpose(1, 2)
            return [q, k, v]

        slots = 30_000 + torch.arange(2048, device=DEVICE)[None]
        yield from time_each_form(only, FORMS[1:3], f"1x2048 of 32768, {heads}", prefill_inputs,
                                  G, query_slots=slots)


def time_each_form(only: str, forms: list[str], name: str, make_inputs: Callable, G: int,
                   **masks: Tensor) -> Iterator[dict]:
    """A row for each form whose name contains `only`: its Times, or the error as a message."""
    for form in forms:
        row = {"name": f"{form}: {name}"}
        if only not in row["name"]:
            continue
        times = attempt(partial(time_form, **masks), form, make_inputs(), G)
        torch.cuda.empty_cache()
        yield row | ({"message": times} if isinstance(times, str) else times._asdict())


def form_line(row: dict) -> str:
    if "message" in row:
        return f"{row['name']:60s} {row['message']}"
    peak = "" if row["peak"] is None else f"{row['peak']:.2f} GiB"
    return f"{row['name']:60s} {joined((row['forward'], row['both']), '.3f'):>18s} ms  {peak}"


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def time_linear_cross_entropy() -> dict:
    V = 219520
    targets = torch.randint(V, (8192,), device=DEVICE)
    inputs = [normal(8192, 4096), normal(V, 4096, scale=0.02), targets]
    # Forward makes both gradients: three products.
    return measure("TFLOP/s", (6 * V, 6 * V), linear_cross_entropy, inputs, plain_loss)


def plain_gram(x: Tensor) -> Tensor:
    return x @ x.mT


def time_symmetric(m: int, k: int) -> dict:
    """Counted are the FLOPs of half the product."""
    return measure("TFLOP/s", (m,), gram, [normal(1, m, k).detach()], plain_gram,
                   with_compile=False)


def time_linear_fp8() -> dict:
    N = 16384
    return measure("TFLOP/s", (2 * N, 6 * N), linear_fp8, [normal(8192, 4096), normal(N, 4096)],
                   F.linear, with_compile=False)


WIDE, SMALL = "2x4096, 32 + 8 heads of 128", "16x1024, 8 + 2 heads of 64"
TABLE = {
    "PolyNorm x up, 8192x16384": time_poly_norm_mul,
    "RMSNorm (torch.compile), 65536x4096": time_rms_norm,
    "add + RMSNorm (torch.compile), 65536x4096": time_add_and_rms_norm,
    "RoPE (torch.compile), 65536x40x128": time_rope,
    "differential norm, 8192x32x256": time_differential_norm,
    f"attention, {WIDE}": partial(time_attention, 2, 4096, 8, 128),
    f"attention, {WIDE}, documents": partial(time_attention, 2, 4096, 8, 128, 1000),
    f"attention, {SMALL}": partial(time_attention, 16, 1024, 2, 64),
    f"attention, {SMALL}, documents": partial(time_attention, 16, 1024, 2, 64, 1000),
    "attention, 1x16384, 32 + 8 heads of 128": partial(time_attention, 1, 16384, 8, 128),
    "linear + cross entropy, 8192x4096x219520": time_linear_cross_entropy,
    "symmetric product, 4096x16384": partial(time_symmetric, 4096, 16384),
    "symmetric product, 4096x4096": partial(time_symmetric, 4096, 4096),
    "linear_fp8, 8192 x 16384x4096": time_linear_fp8,
}


def measure_limits() -> dict:
    """What this GPU reaches at most: a copy of 1 GiB, a product of 8192 x 8192 matrices in bf16."""
    x, y = torch.randn(2, 2**28, device=DEVICE)
    copy = milliseconds(partial(torch.neg, y, out=x))
    a = normal(8192, 8192).detach()
    product = milliseconds(partial(torch.mm, a, a))
    return {"GB/s": 2 * 2**30 / copy / UNITS["GB/s"],
            "TFLOP/s": 2 * 8192**3 / product / UNITS["TFLOP/s"]}


# ---- what is printed

def joined(numbers, form: str) -> str:
    """"1.23 / 4.56" """
    return " / ".join(format(n, form) for n in numbers if n is not None)


def check_line(row: dict) -> str:
    verdict = "ok   " if row["ok"] else "WRONG"
    if "message" in row:
        return f"{verdict} {row['check']:28s} {row['message']}"
    errors = " ".join(f"{ours:.1e}/{twin:.1e}" for ours, twin in zip(row["error"], row["twin"]))
    return f"{verdict} {row['check']:28s} {errors}"


def time_line(row: dict, limits: dict) -> str:
    if "message" in row:
        return f"{row['name']:44s} {row['message']}"
    ours = row["ours"]
    times = [ms for ms in (ours.forward, ours.both) if ms is not None]
    rates = [work / ms / UNITS[row["unit"]] for work, ms in zip(row["work"], times)]
    shares = [100 * rate / limits[row["unit"]] for rate in rates]
    line = (f"{row['name']:44s} {joined(times, '.3f'):>15s} ms  {joined(rates, '.0f')} "
            f"{row['unit']}  {joined(shares, '.0f')}%  {ours.peak:.1f} GiB")

    for name, other in row.items():
        if name in ("name", "unit", "work", "ours"):
            continue
        if isinstance(other, str):
            line += f"  {name}: {other}"
            continue
        factors = [theirs / own for theirs, own in zip(other[:2], times) if theirs is not None]
        line += f"  {name}: {joined(factors, '.2f')}x ({joined(other[:2], '.3f')} ms)"
    return line


def main() -> None:
    if triton is None:
        raise SystemExit("Triton is not installed: there is no kernel to check")
    parser = argparse.ArgumentParser(description="Checks every kernel against float64, then, on a "
                                     "GPU, times it beside PyTorch's own operations.")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--only", default="", help="time only lines whose name contains this")
    parser.add_argument("--forms", action="store_true", help="time the forms of attention alone")
    options = parser.parse_args()

    def show(row: dict, line: str) -> None:
        print(json.dumps(row) if options.json else line, flush=True)

    torch.manual_seed(0)
    if options.forms:
        if not GPU:
            raise SystemExit("--forms needs a GPU")
        for row in time_forms(options.only):
            show(row, form_line(row))
        return
    wrong = 0
    for check in checks():
        row = attempt(run_check, check)
        if isinstance(row, str):
            row = {"check": check.name, "ok": False, "message": row}
        wrong += not row["ok"]
        show(row, check_line(row))

    if GPU:
        limits = measure_limits()
        device = torch.cuda.get_device_name()
        show({"device": device, **limits}, f"{device}: copy {limits['GB/s']:.0f} GB/s, bf16 GEMM "
             f"{limits['TFLOP/s']:.0f} TFLOP/s")
        for name, time_one in TABLE.items():
            if options.only in name:
                row = attempt(time_one)
                row = {"message": row} if isinstance(row, str) else row
                row = {"name": name, **row}
                show(row, time_line(row, limits))
    else:
        show({"timed": False}, "No GPU: the kernels were checked through Triton's interpreter, and "
             "nothing was timed.")
    if wrong:
        raise SystemExit(f"{wrong} of the checks failed")


if __name__ == "__main__":
    main()
