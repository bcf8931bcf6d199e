"""Every operation of kernels.py against its defining formula under autograd, in float64."""
import model
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
import reference
from torch.utils.checkpoint import checkpoint

# the interpreter multiplies NaN, and what uninitialised rows hold that nobody keeps
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
EPS = 1e-6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def unit(z, eps=EPS):
    return z / (z.square().mean(-1, keepdim=True) + eps).sqrt()


def poly_norm_formula(x, up, weight, bias):
    return (weight[0] * unit(x**3) + weight[1] * unit(x**2) + weight[2] * unit(x) + bias) * up


def rope_formula(x, angle):
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


TARGETS = torch.tensor([3, -1, 0, 6, -1])
ANGLE = torch.linspace(-4, 4, 9, dtype=torch.float64).view(1, 3, 1, 3)

# name -> the operation, its formula, its inputs; each of the inputs is differentiated
OPERATIONS = {
    "poly_norm_mul": (lambda *t: kernels.poly_norm_mul(*t, EPS), poly_norm_formula,
                      lambda: (normal(2, 3, 5), normal(2, 3, 5), normal(3), normal(1))),
    "poly_norm": (kernels.poly_norm, lambda x, w, b: poly_norm_formula(x, 1, w, b),
                  lambda: (normal(3, 5), normal(3), normal(1))),
    "rms_norm": (lambda x, w: model.rms_norm(x, w, EPS), lambda x, w: w * unit(x),
                 lambda: (normal(2, 3, 5), normal(5))),
    "rope": (lambda x: model.rope(x, ANGLE.cos(), ANGLE.sin()), lambda x: rope_formula(x, ANGLE),
             lambda: (normal(2, 3, 2, 6),)),
    "differential_norm": (lambda *t: model.differential_norm(*t, 0.7, 0.1),
                          lambda o1, o2, lam, w: (w * unit(o1 - lam * o2, 0.1) * 0.7).flatten(2),
                          lambda: (normal(1, 2, 2, 3, 4), normal(1, 2, 2, 1, 4), normal(),
                                   normal(4))),
    "mean cross entropy": (lambda x, w: kernels.linear_cross_entropy(x, w, TARGETS),
                           lambda x, w: F.cross_entropy(x @ w.T, TARGETS, ignore_index=-1),
                           lambda: (normal(5, 4), normal(7, 4))),
    "summed cross entropy": (lambda x, w: kernels.linear_cross_entropy(x, w, TARGETS, "sum"),
                             lambda x, w: F.cross_entropy(x @ w.T, TARGETS, ignore_index=-1,
                                                          reduction="sum"),
                             lambda: (normal(5, 4), normal(7, 4))),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_its_formula_and_its_gradient_is_the_slope(name, monkeypatch):
    monkeypatch.setattr(kernels, "CACHE_BLOCK", 10)      # several blocks, the last one smaller
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 2)
    operation, formula, inputs = OPERATIONS[name]
    inputs = inputs()
    ours, theirs = operation(*inputs), formula(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    d = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, d),
                               torch.autograd.grad(theirs, inputs, d), rtol=1e-12, atol=1e-12)
    if "entropy" in name:                                # gradcheck would go back more than once
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            twice = operation(*inputs)
            twice.backward(retain_graph=True)
            twice.backward()
    else:
        assert torch.autograd.gradcheck(operation, inputs)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "entropy" not in name])
def test_half_precision_is_rounded_once_at_the_end(name):
    operation, _, inputs = OPERATIONS[name]
    half = [t.detach().bfloat16() for t in inputs()]
    assert torch.equal(operation(*half), operation(*[t.float() for t in half]).bfloat16())


def test_poly_norm_gives_the_published_values():
    x, w, b = (torch.tensor(t) for t in ([1, -2, 0.5, -0.25], [0.4, 0.3, 0.3], [0.05]))
    golden = torch.tensor([0.554770092, -0.683406429, 0.228869677, -0.007551985])
    torch.testing.assert_close(kernels.poly_norm(x, w, b), golden, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(golden.double(), torch.from_numpy(reference.poly_norm(x, w, b)),
                               rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1, 1e2, 1e4, 3e5])
def test_poly_norm_keeps_its_precision_at_every_scale(scale):
    """fp32 against float64, forward and backward, as a relative Frobenius error."""
    exact = normal(7, 300), normal(7, 300), normal(3), normal(1)
    exact[0].data.mul_(scale)
    single = [t.detach().float().requires_grad_() for t in exact]
    for t, s in zip(exact, single):
        t.data.copy_(s)                                  # the same numbers in both
    d = torch.randn(7, 300)
    out = kernels.poly_norm_mul(*single, EPS)
    expected = poly_norm_formula(*exact)
    for ours, theirs in zip((out, *torch.autograd.grad(out, single, d)),
                            (expected, *torch.autograd.grad(expected, exact, d.double()))):
        assert (ours.double() - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("name", OPERATIONS)
def test_strided_inputs_give_the_same_and_nothing_that_comes_in_is_modified(name, monkeypatch):
    monkeypatch.setattr(kernels, "CACHE_BLOCK", 10)
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 2)
    operation, _, inputs = OPERATIONS[name]
    dense = inputs()
    strided = [torch.stack([t, t], -1).detach()[..., 0].requires_grad_() for t in dense]
    out, expected = operation(*strided), operation(*dense)
    torch.testing.assert_close(out, expected)
    d = torch.randn(*out.shape, 2, dtype=out.dtype)[..., 0]
    before = [t.clone() for t in (d, *strided)]
    torch.testing.assert_close(torch.autograd.grad(out, strided, d),
                               torch.autograd.grad(expected, dense, d.contiguous()))
    assert all(map(torch.equal, before, (d, *strided)))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows(rows):
    x, up, w, b = (normal(*shape) for shape in ((rows, 5), (rows, 5), (3,), (1,)))
    out, expected = kernels.poly_norm_mul(x, up, w, b, EPS), poly_norm_formula(x, up, w, b)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (x, up, w, b)),
                               torch.autograd.grad(expected.sum(), (x, up, w, b)))
    head, targets, reduction = normal(7, 5), torch.arange(rows), "mean" if rows else "sum"
    loss = kernels.linear_cross_entropy(x, head, targets, reduction)
    expected = F.cross_entropy(x @ head.T, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, head)),
                               torch.autograd.grad(expected, (x, head)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_target_at_all_gives_zero(reduction):
    x, head = normal(3, 4), normal(7, 4)
    loss = kernels.linear_cross_entropy(x, head, torch.full((3,), -1), reduction)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, head)))
    with pytest.raises(ValueError, match="^reduction must be 'mean', 'sum' or 'none', not 'max'$"):
        kernels.linear_cross_entropy(x, head, torch.zeros(3, dtype=torch.long), "max")


@pytest.mark.parametrize("T, starts", [
    (5, None), (2, None), (1, None),                     # less than 5: the last ones, after a cache
    (5, [[0, 0, 0, 3, 3], [0, 1, 1, 1, 1]])])
def test_causal_attention_is_torchs_and_tells_the_largest_visible_logit(T, starts):
    q, k, v = normal(2, T, 2, 3, 4), normal(2, 5, 2, 4), normal(2, 5, 2, 6)
    visible = torch.ones(T, 5, dtype=torch.bool).tril(5 - T)
    if starts is not None:
        starts = torch.tensor(starts, dtype=torch.int32)
        visible = (visible & (starts[:, :, None] == starts[:, None]))[:, None]
    out, largest = model.causal_attention(q, k, v, starts)
    heads = q.flatten(2, 3).transpose(1, 2)              # (B, H, T, D)
    expected = F.scaled_dot_product_attention(heads, k.transpose(1, 2), v.transpose(1, 2),
                                              visible, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out.flatten(2, 3), expected)
    logits = heads @ k.transpose(1, 2).repeat_interleave(3, 1).mT / 4**0.5
    logits = logits.masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(largest.flatten(), logits.amax((0, 2, 3)))
    d = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(out.flatten(2, 3), (q, k, v), d),
                               torch.autograd.grad(expected, (q, k, v), d))


@pytest.mark.parametrize("name", ["kernels", "model", "muonclip"])
def test_nothing_here_needs_triton(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)     # import triton raises ImportError
    monkeypatch.delitem(sys.modules, "kernels")
    spec = importlib.util.spec_from_file_location(name, importlib.util.find_spec(name).origin)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)       # a dataclass looks its module up there
    spec.loader.exec_module(module)


# ---- the Triton kernels: on a GPU as they are, else through the interpreter

@pytest.fixture
def fused(monkeypatch):
    """kernels with its Triton forms at work."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "INTERPRET", True)
    return kernels


@pytest.fixture
def poisoned():
    """Whatever torch.empty gives is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()

# name -> the operation, the shapes of its inputs of `rows` rows of n numbers
KERNELS = {
    "poly_norm_mul": (lambda *t: kernels.poly_norm_mul(*t, EPS),
                      lambda rows, n: ((rows, n), (rows, n), (3,), (1,))),
    "poly_norm": (kernels.poly_norm, lambda rows, n: ((rows, n), (3,), (1,))),
    "differential_norm": (lambda *t: model.differential_norm(*t, 0.7, 1e-5),
                          lambda rows, n: ((1, rows, 2, 3, n), (1, rows, 2, 1, n), (), (n,))),
}
SIZES = [(1, 1), (3, 7), (133, 123), (3, 128), (0, 1000), (3, 1000), (1, 4096), (3, 16384),
         (1, 16385)]


def outcome(operation, inputs, d=None):
    """Outputs and gradients; d: the incoming gradients, else some that a seed draws."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outs = operation(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    smooth = [out for out in outs if out.requires_grad]
    if d is None:
        random = torch.manual_seed(1)                    # of few bits: the same in every dtype
        d = [torch.randn(out.shape, dtype=torch.bfloat16, generator=random) for out in smooth]
    grads = torch.autograd.grad(smooth, inputs, [g.to(out) for g, out in zip(d, smooth)])
    return *[out.detach() for out in outs], *grads


def distance(ours, exact):
    return (ours.double() - exact).norm().item()


def assert_as_exact_as_the_plain_twin(operation, inputs, absolute=0.0, factor=1.1):
    """No output or gradient is further from float64's than the plain twin's of the same dtype."""
    ours, exact = outcome(operation, inputs), outcome(operation, [t.double() for t in inputs])
    with kernels.plain_twins():
        plain = outcome(operation, inputs)
    for our, twin, true in zip(ours, plain, exact, strict=True):
        assert our.dtype == twin.dtype and our.shape == twin.shape
        slack = 1e-6 * true.norm().item() + absolute
        assert distance(our, true) <= factor * distance(twin, true) + slack


@pytest.mark.parametrize("rows, n", SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_as_exact_as_its_twin(name, rows, n, fused, poisoned):
    operation, shapes = KERNELS[name]
    for dtype in DTYPES if n in (7, 123) else DTYPES[-1:]:         # each compiles for a second
        inputs = [torch.randn(s).to(DEVICE, dtype) for s in shapes(rows, n)]
        assert_as_exact_as_the_plain_twin(operation, inputs, 1e-3 if n == 1 else 0)  # dx is ~ eps


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e5])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_keeps_its_precision_at_every_scale(name, scale, fused):
    operation, shapes = KERNELS[name]
    inputs = [torch.randn(s, device=DEVICE) for s in shapes(3, 300)]
    for t in inputs[:2]:
        t *= scale
    assert_as_exact_as_the_plain_twin(operation, inputs)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_reads_strided_rows_gives_the_same_twice_and_changes_no_input(name, fused):
    operation, shapes = KERNELS[name]
    dense = [torch.randn(s, device=DEVICE) for s in shapes(5, 33)]
    expected = outcome(operation, dense)
    assert all(map(torch.equal, expected, outcome(operation, dense)))
    for strided in ([torch.cat([t, t], -1)[..., :t.shape[-1]] if t.ndim else t for t in dense],
                    [torch.stack([t, t], -1)[..., 0] for t in dense]):
        d = torch.randn(*expected[0].shape, 2, device=DEVICE)[..., 0]
        before = [t.clone() for t in (d, *strided)]
        assert all(map(torch.equal, outcome(operation, strided, [d]),
                       outcome(operation, dense, [d.contiguous()])))
        assert all(map(torch.equal, before, (d, *strided)))


@pytest.mark.parametrize("vocabulary", [7, 9001])        # less than a block, more than one
def test_the_loss_kernel_is_as_exact_as_its_twin(vocabulary, fused, poisoned, monkeypatch):
    loss = lambda *t: kernels.linear_cross_entropy(*t, targets)
    monkeypatch.setattr(fused, "LOSS_CHUNK", 2)
    targets = torch.tensor([3, -1, 0, vocabulary - 1, -1], device=DEVICE)
    for dtype in DTYPES:
        for scale in 1, 1e3:
            x, head = (torch.randn(s).to(DEVICE, dtype) for s in ((5, 16), (vocabulary, 16)))
            assert_as_exact_as_the_plain_twin(loss, [x * scale, head])
            by_row = fused.linear_cross_entropy(x, head, targets, "none", 2.0)
            one_by_one = [fused.linear_cross_entropy(x[i:i + 1], head, targets[i:i + 1], "sum", 2.0)
                          for i in range(5)]
            torch.testing.assert_close(by_row, torch.stack(one_by_one), rtol=1e-5, atol=1e-5)
    nothing = outcome(lambda *t: fused.linear_cross_entropy(*t, torch.full_like(targets, -1)),
                      [x, head])
    assert all((t == 0).all() for t in nothing)


def attention(noise_heads, starts=None):
    """GDA, or grouped-query attention where there is no noise head: of q, k, v (B, T, heads, D)."""
    def run(q, k, v):
        if noise_heads:
            v = v.unflatten(2, (-1, 2)).flatten(3)
            return model.grouped_differential_attention(q, k, v, noise_heads, starts)
        return model.causal_attention(q.unflatten(2, (k.shape[2], -1)), k, v, starts)
    return run


def document_starts(B, T, chance):
    """Documents that begin anywhere, tokens of one alone among them."""
    t = torch.arange(T, dtype=torch.int32)
    return torch.where(torch.rand(B, T) < chance, t, 0).cummax(1).values.to(DEVICE)


# B, T, heads of noise, of queries, of keys; D; chance of a new document; which of DTYPES
ATTENTIONS = {
    "two groups of a pair, two pairs": (1, 133, 4, 8, 4, 16, None, -2),
    "two groups of a pair, documents": (2, 197, 2, 4, 2, 16, 0.02, -1),
    "wide heads, documents": (1, 137, 1, 3, 2, 128, 0.1, -1),
    "plain, grouped queries": (1, 261, 0, 3, 1, 64, None, -2),
    "plain, documents": (2, 37, 0, 2, 2, 16, 0.3, -2),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_fused_attention_is_as_exact_as_its_twin_and_gives_the_same_twice(
        name, fused, poisoned, monkeypatch):
    B, T, noise_heads, H, K, D, chance, dtype = ATTENTIONS[name]
    operation = attention(noise_heads, None if chance is None else document_starts(B, T, chance))
    qkv = torch.randn(B, T, H + 2 * K, D).to(DEVICE, DTYPES[dtype])
    views = qkv.split([H, K, K], dim=2)
    # dS = p (dP - out d_out) of documents of few tokens shows that `out` was rounded
    assert_as_exact_as_the_plain_twin(operation, views, factor=1.1 if chance is None else 1.5)
    kept, ours = qkv.clone(), outcome(operation, views)
    monkeypatch.setattr(kernels, "DS_BYTES", 1)          # a pair at a time
    assert all(map(torch.equal, ours, outcome(operation, [t.contiguous() for t in views])))
    assert torch.equal(qkv, kept)


# E, m, k: one tile, some with a part of one, more than the eight rows that a band has
@pytest.mark.parametrize("E, m, k", [(1, 32, 80), (3, 264, 48), (1, 1168, 16)])
def test_a_symmetric_product_is_as_exact_as_torchs(E, m, k, fused, poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "SYMMETRIC_TILES", 0)
    for dtype in DTYPES[-2:] if m == 264 else DTYPES[-1:]:
        rows, columns, d = (torch.randn(s).to(DEVICE, dtype) for s in (
            (E, m, k), (E, k, m), (E, m, m)))
        for x in rows, columns.mT:
            for D, beta in (None, 0.0), (d + d.mT, -1.5):
                C = kernels.symmetric_matmul(x, x * 0.5, 3.0, D, beta)
                wide = [t if t is None else t.double() for t in (x, x * 0.5, D)]
                true = kernels.symmetric_matmul(*wide[:2], 3.0, wide[2], beta)
                twin = torch.baddbmm(x.new_zeros(()) if D is None else D, x, x.mT * 0.5,
                                     beta=beta, alpha=3.0)
                assert distance(C, true) <= 1.1 * distance(twin, true) + 1e-6 * true.norm()
                # numpy's product, of a tile on the diagonal, is not quite symmetric on every CPU
                n = 0 if C.is_cuda else kernels.TILE
                assert torch.equal(C[:, n:, :n or m], C[:, :n or m, n:].mT) and C.dtype == dtype


def test_a_product_that_a_descriptor_cannot_read_is_torchs(fused):
    wide = torch.randn(2, 32, 64, device=DEVICE)
    for x in wide[:, :, 1:20], wide[:, ::2, ::2], wide.double():
        torch.testing.assert_close(kernels.symmetric_matmul(x, x, 2.0), 2 * x @ x.mT)


# ---- FP8

def numbers(*shape, dtype=torch.float32):
    """Rows of very different sizes."""
    return (torch.randn(shape) * torch.randn(shape[0], 1).exp()).to(DEVICE, dtype)


def relative(ours, exact):
    return [distance(our, true) / true.norm().item() for our, true in zip(ours, exact)]


@pytest.mark.parametrize("shape", [(16, 16), (133, 123), (256, 144)])
def test_quantising_gives_the_bits_of_its_twin(shape, fused, poisoned):
    for dtype in DTYPES:
        x = numbers(*shape, dtype=dtype)
        x[1], x[2], x[3, 5], x[4, 6] = 0, x[2] * 1e-4, torch.nan, torch.inf
        with kernels.plain_twins():
            twin = kernels.quantize_fp8(x, True)
        assert (twin[0].float().isnan().sum(1) > 0).nonzero().flatten().tolist() == [3, 4]
        for out in (kernels.quantize_fp8(x, True), kernels.quantize_fp8(x.T.contiguous().T, True),
                    kernels.quantize_fp8(x, False)):
            for ours, theirs in zip(out, twin):
                torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0,
                                           equal_nan=True)


@pytest.mark.parametrize("outliers", [False, True])
def test_fp8_products_and_gradients_are_4_percent_off(outliers, fused):
    x, w, d = numbers(256, 512), numbers(384, 512) / 50, numbers(256, 384) * 1e-6
    if outliers:                        # some channels and tokens 100 times larger, as in LLMs
        x[:, ::97] *= 100
        d[::61] *= 100
    x, w, d = (t.bfloat16() for t in (x, w, d))
    exact = outcome(F.linear, [x.double(), w.double()], [d])
    ours = outcome(kernels.linear_fp8, [x, w], [d])
    assert max(relative(ours, exact)) < 4e-2 and {t.dtype for t in ours} == {torch.bfloat16}
    y, dx, dw = outcome(kernels.linear_fp8, [x * 4, w / 2], [d * 2])    # the scales take them up
    assert all(map(torch.equal, ours, (y / 2, dx, dw / 8)))


def test_fp8_passes_zeros_and_nan_on(fused):
    x, w, d = numbers(32, 64), numbers(48, 64), numbers(32, 48)
    y, dx, dw = outcome(kernels.linear_fp8, [x * 0, w], [d])
    assert not y.any() and not dw.any() and dx.isfinite().all()
    x[3, 4] = torch.nan
    y, dx, dw = outcome(kernels.linear_fp8, [x, w], [d])
    assert y[3].isnan().all() and y[:3].isfinite().all() and dw[:, 4].isnan().all()


@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 32), (0, 16), (2, 0, 32), (16, 24)])
def test_shapes_that_fp8_cannot_take_are_a_plain_product(shape, fused):
    inputs = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in (shape, (16, shape[-1]))]
    assert all(map(torch.equal, outcome(kernels.linear_fp8, inputs), outcome(F.linear, inputs)))


def test_compiled_projections_of_one_input_quantise_it_once(monkeypatch):
    shapes, plain = [], kernels.quantize_rows_reference
    monkeypatch.setattr(kernels, "quantize_rows", lambda x: shapes.append(x.shape) or plain(x))

    def model(x, *weights):
        q, k, v = (kernels.linear_fp8(F.silu(x), w) for w in weights)
        return q * k + v
    inputs = [torch.randn(s).bfloat16() for s in ((2, 24, 64), *[(32, 64)] * 3)]
    expected = outcome(model, inputs)
    ours = outcome(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert all(map(torch.equal, ours, expected))
    assert shapes.count((48, 64)) == 3 + 1 and shapes.count((48, 32)) == 3 + 3


STARTS = torch.tensor([[0] * 20 + [20] * 13], dtype=torch.int32, device=DEVICE)
COMPILED = {name: (f, shapes(3, 32)) for name, (f, shapes) in KERNELS.items()} | {
    "attention": (attention(2), [(1, 33, heads, 16) for heads in (6, 4, 4)]),
    "documents": (attention(2, STARTS), [(1, 33, heads, 16) for heads in (6, 4, 4)]),
    "cross entropy": (lambda *t: kernels.linear_cross_entropy(*t, TARGETS.to(DEVICE)),
                      [(5, 16), (7, 16)]),
    "linear_fp8": (kernels.linear_fp8, [(2, 16, 32), (48, 32)]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_and_checkpointing_go_through_a_kernel(name, fused):
    operation, shapes = COMPILED[name]
    inputs = [torch.randn(s).to(DEVICE, DTYPES[-1]) for s in shapes]
    expected = outcome(operation, inputs)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    recomputed = lambda *t: checkpoint(operation, *t, use_reentrant=False)
    for other in compiled, recomputed:
        assert all(map(torch.equal, expected, outcome(other, inputs)))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_in_one_graph_for_any_number_of_rows(name, fused):
    operation, shapes = KERNELS[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(operation, dynamic=True, fullgraph=True, backend=backend)
    for rows in 5, 9, 31:
        inputs = [torch.randn(s, device=DEVICE) for s in shapes(rows, 32)]
        assert torch.equal(compiled(*inputs), operation(*inputs))
    assert len(graphs) == 1


def test_every_kernel_compiles_for_hopper_without_spills_and_with_wide_loads():
    triton = pytest.importorskip("triton")
    script = Path(__file__).parent / "sm90.py"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    made = [json.loads(line) for line in out.stdout.splitlines()]
    assert {kernel["name"] for kernel in made} == {
        "poly_norm_forward_kernel", "poly_norm_backward_kernel", "attend", "attend_delta",
        "attend_keys", "attend_queries", "differential_norm_forward_kernel",
        "differential_norm_backward_kernel", "cross_entropy_kernel", "scale_kernel",
        "symmetric_kernel", "largest_kernel", "quantize_kernel"}
    # Triton 3.6's ptxas keeps up to six numbers on the stack, none of them in a loop
    stack = 24 if triton.__version__.startswith("3.6.") else 0
    for kernel in made:
        assert kernel["stack"] <= stack and kernel["shared"] <= 232448, kernel
        assert kernel["wide_loads"] > 0, kernel
        assert kernel["tensor_core"] > 0 or not kernel["multiplies"], kernel


def test_targets_and_starts_may_be_strided_and_a_target_that_is_no_word_gives_nan(fused):
    x, head = (torch.randn(n, 16, device=DEVICE, dtype=DTYPES[1]) for n in (6, 7))
    pairs = torch.randint(7, (6, 2), device=DEVICE)
    dense = kernels.linear_cross_entropy(x, head, pairs[:, 0].contiguous())
    assert torch.equal(kernels.linear_cross_entropy(x, head, pairs[:, 0]), dense)
    assert kernels.linear_cross_entropy(x, head, pairs[:, 0] + 7 * (pairs[:, 0] >= 0)).isnan()
    qkv = [torch.randn(2, 40, 2, 16, device=DEVICE, dtype=DTYPES[1]) for _ in "qkv"]
    starts = torch.tensor([0] * 9 + [9] * 31, device=DEVICE)           # int64, one row for both
    q, k, v = qkv[0].unflatten(2, (2, 1)), *qkv[1:]
    ours, _ = model.causal_attention(q, k, v, starts.expand(2, 40))
    true, _ = model.causal_attention(q, k, v, starts.int().repeat(2, 1))
    assert torch.equal(ours, true) and not ours.isnan().any()


def test_the_gradient_of_the_loss_is_rounded_once():
    """1 / 766 is no bf16 number: applied after the rounding it would show."""
    x, head = (torch.randn(n, 64).bfloat16().requires_grad_() for n in (766, 300))
    targets = torch.randint(300, (766,))
    wide = [t.detach().double().requires_grad_() for t in (x, head)]
    exact = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, targets), wide)
    torchs = torch.autograd.grad(F.cross_entropy((x @ head.T).float(), targets), (x, head))
    for ours in (kernels.linear_cross_entropy(x, head, targets),
                 kernels.linear_cross_entropy(x, head, targets, "sum", 1 / 766)):
        for g, its, true in zip(torch.autograd.grad(ours, (x, head)), torchs, exact):
            assert distance(g, true) <= 1.1 * distance(its, true)


def test_without_gradients_the_loss_makes_none(monkeypatch):
    asked, real = [], kernels.linear_cross_entropy_forward
    monkeypatch.setattr(kernels, "linear_cross_entropy_forward",
                        lambda *t: asked.append(t[-2:]) or real(*t))
    x, head, targets = normal(3, 4), normal(7, 4), torch.arange(3)
    with torch.no_grad():
        expected = kernels.linear_cross_entropy(x, head, targets)
    assert torch.equal(kernels.linear_cross_entropy(x.detach(), head, targets), expected)
    assert asked == [(False, False), (False, True)]
