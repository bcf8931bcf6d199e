"""Every operation of kernels.py, and the definitions that it replaces, against formulas in float64.

First the plain forms, then the Triton kernels: on a GPU as they are, elsewhere through Triton's
interpreter. Last, that they compile for Hopper without spilling registers.
"""
import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

import kernels
import model
import reference
from kernels import (linear_cross_entropy, linear_fp8, lower_tile, poly_norm_mul, quantize_fp8, tl,
                     token_losses)
from support.generation import KVCache
from tools.bench_kernels import plain_twins

# The interpreter multiplies NaN, and what is in uninitialised rows that nobody reads afterwards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bf16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def assert_all_equal(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# ---- formulas

def divide_by_rms(z, eps=EPS):
    return z / (z.square().mean(-1, keepdim=True) + eps).sqrt()


def poly_norm_formula(x, up, weight, bias):
    powers = divide_by_rms(x**3), divide_by_rms(x**2), divide_by_rms(x)
    return (weight[0] * powers[0] + weight[1] * powers[1] + weight[2] * powers[2] + bias) * up


def poly_norm_alone_formula(x, weight, bias):
    return poly_norm_formula(x, 1, weight, bias)


def rms_norm_formula(x, weight):
    return weight * divide_by_rms(x)


ANGLE = torch.linspace(-4, 4, 9, dtype=torch.float64).view(1, 3, 1, 3)


def rope(x):
    return model.rope(x, ANGLE.cos(), ANGLE.sin())


def rope_formula(x):
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(ANGLE), ANGLE)
    return torch.cat([z.real, z.imag], dim=-1)


def differential_norm_formula(signal, noise, lambda_, weight):
    return (weight * divide_by_rms(signal - lambda_ * noise, 0.1) * 0.7).flatten(2)


TARGETS = torch.tensor([3, -1, 0, 6, -1])


def cross_entropy(x, weight, reduction="mean"):
    return linear_cross_entropy(x, weight, TARGETS.to(x.device), reduction)


def cross_entropy_formula(x, weight, reduction="mean"):
    return F.cross_entropy(x @ weight.T, TARGETS, ignore_index=-1, reduction=reduction)


# name -> the operation, its formula, the shapes of its inputs
OPERATIONS = {
    "poly_norm_mul": (partial(poly_norm_mul, eps=EPS), poly_norm_formula,
                      [(2, 3, 5), (2, 3, 5), (3,), (1,)]),
    "poly_norm, definition": (model.poly_norm, poly_norm_alone_formula, [(3, 5), (3,), (1,)]),
    "rms_norm": (partial(model.rms_norm, eps=EPS), rms_norm_formula, [(2, 3, 5), (5,)]),
    "rope": (rope, rope_formula, [(2, 3, 2, 6)]),
    "differential_norm": (partial(model.differential_norm, scale=0.7, eps=0.1),
                          differential_norm_formula, [(1, 2, 2, 3, 4), (1, 2, 2, 1, 4), (), (4,)]),
    "mean cross entropy": (cross_entropy, cross_entropy_formula, [(5, 4), (7, 4)]),
    "summed cross entropy": (partial(cross_entropy, reduction="sum"),
                             partial(cross_entropy_formula, reduction="sum"), [(5, 4), (7, 4)]),
}
LOSSES = ["mean cross entropy", "summed cross entropy"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and chunks for a few rows, the last one smaller."""
    monkeypatch.setattr(kernels, "CACHE_BLOCK", 10)
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_and_its_gradients_equal_the_formula(name, small_blocks):
    operation, formula, shapes = OPERATIONS[name]
    inputs = [normal(*shape) for shape in shapes]
    ours = operation(*inputs)
    theirs = formula(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    d = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, d),
                               torch.autograd.grad(theirs, inputs, d), rtol=1e-12, atol=1e-12)
    if name not in LOSSES:                # gradcheck would go back more than once
        assert torch.autograd.gradcheck(operation, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_backward_pass_through_the_loss_is_refused(name):
    operation, _, shapes = OPERATIONS[name]
    loss = operation(*[normal(*shape) for shape in shapes])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in LOSSES])
def test_half_precision_is_rounded_once_at_the_end(name):
    operation, _, shapes = OPERATIONS[name]
    half = [torch.randn(shape).bfloat16() for shape in shapes]
    assert torch.equal(operation(*half), operation(*[t.float() for t in half]).bfloat16())


def test_poly_norm_gives_the_published_values():
    x = torch.tensor([1, -2, 0.5, -0.25])
    weight = torch.tensor([0.4, 0.3, 0.3])
    bias = torch.tensor([0.05])
    published = torch.tensor([0.554770092, -0.683406429, 0.228869677, -0.007551985])
    ours = poly_norm_mul(x, torch.ones(4), weight, bias, EPS)
    torch.testing.assert_close(ours, published, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.from_numpy(reference.poly_norm(x, weight, bias)),
                               published.double(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1, 1e2, 1e4, 3e5])
def test_poly_norm_keeps_its_precision_at_every_scale(scale):
    single = [torch.randn(shape) for shape in ((7, 300), (7, 300), (3,), (1,))]
    single[0] *= scale
    exact = [t.double().requires_grad_() for t in single]
    single = [t.requires_grad_() for t in single]
    d = torch.randn(7, 300)
    out = poly_norm_mul(*single, EPS)
    expected = poly_norm_formula(*exact)
    grads = torch.autograd.grad(out, single, d)
    expected_grads = torch.autograd.grad(expected, exact, d.double())
    for ours, theirs in zip([out, *grads], [expected, *expected_grads]):
        assert (ours.double() - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("name", OPERATIONS)
def test_strided_inputs_give_the_same_and_no_input_is_modified(name, small_blocks):
    operation, _, shapes = OPERATIONS[name]
    dense = [normal(*shape) for shape in shapes]
    strided = [torch.stack([t, t], -1).detach()[..., 0].requires_grad_() for t in dense]
    out = operation(*strided)
    expected = operation(*dense)
    torch.testing.assert_close(out, expected)
    d = torch.randn(*out.shape, 2, dtype=out.dtype)[..., 0]
    before = [t.clone() for t in (d, *strided)]
    torch.testing.assert_close(torch.autograd.grad(out, strided, d),
                               torch.autograd.grad(expected, dense, d.contiguous()))
    assert_all_equal(before, [d, *strided])


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows(rows):
    x, up, weight, bias = inputs = [normal(rows, 5), normal(rows, 5), normal(3), normal(1)]
    out = poly_norm_mul(*inputs, EPS)
    expected = poly_norm_formula(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs),
                               torch.autograd.grad(expected.sum(), inputs))

    head = normal(7, 5)
    targets = torch.arange(rows)
    reduction = "mean" if rows else "sum"
    loss = linear_cross_entropy(x, head, targets, reduction)
    expected = F.cross_entropy(x @ head.T, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, head)),
                               torch.autograd.grad(expected, (x, head)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_any_target_loss_and_gradients_are_zero(reduction):
    x, head = normal(3, 4), normal(7, 4)
    loss = linear_cross_entropy(x, head, torch.full((3,), -1), reduction)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, head)))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction.*'max'"):
        linear_cross_entropy(normal(3, 4), normal(7, 4), torch.zeros(3).long(), "max")


def test_the_gradient_of_the_loss_is_rounded_once():
    """1 / 766 is no bf16 number: multiplied on after the rounding, it would show."""
    x, head = (torch.randn(n, 64).bfloat16().requires_grad_() for n in (766, 300))
    targets = torch.randint(300, (766,))
    wide = [t.detach().double().requires_grad_() for t in (x, head)]
    exact = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, targets), wide)
    torchs = torch.autograd.grad(F.cross_entropy((x @ head.T).float(), targets), (x, head))
    for loss in (linear_cross_entropy(x, head, targets),
                 linear_cross_entropy(x, head, targets, "sum", 1 / 766)):
        for ours, its, true in zip(torch.autograd.grad(loss, (x, head)), torchs, exact):
            assert distance(ours, true) <= 1.1 * distance(its, true)


def test_the_loss_makes_only_the_gradients_that_are_wanted(monkeypatch):
    asked = []
    real = kernels.linear_cross_entropy_forward

    def noting(*args):
        asked.append(args[-2:])
        return real(*args)

    monkeypatch.setattr(kernels, "linear_cross_entropy_forward", noting)
    x, head, targets = normal(3, 4), normal(7, 4), torch.arange(3)
    with torch.no_grad():
        expected = linear_cross_entropy(x, head, targets)
    assert torch.equal(linear_cross_entropy(x.detach(), head, targets), expected)
    assert asked == [(False, False), (False, True)]


@pytest.mark.parametrize("T, doc_start", [
    (5, None), (2, None), (1, None),      # fewer than 5 queries: the last ones, with cached keys
    (5, [[0, 0, 0, 3, 3], [0, 1, 1, 1, 1]])])
def test_causal_attention_is_torchs_and_tells_the_largest_visible_logit(T, doc_start):
    q, k, v = normal(2, T, 2, 3, 4), normal(2, 5, 2, 4), normal(2, 5, 2, 6)
    visible = torch.ones(T, 5, dtype=torch.bool).tril(5 - T)
    if doc_start is not None:
        doc_start = torch.tensor(doc_start, dtype=torch.int32)
        visible = (visible & (doc_start[:, :, None] == doc_start[:, None]))[:, None]
    out, max_logits = model.causal_attention(q, k, v, doc_start)
    out = out.flatten(2, 3)

    heads = q.flatten(2, 3).transpose(1, 2)              # (B, H, T, D)
    expected = F.scaled_dot_product_attention(heads, k.transpose(1, 2), v.transpose(1, 2),
                                              visible, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    logits = heads @ k.transpose(1, 2).repeat_interleave(3, 1).mT / 4**0.5
    logits = logits.masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(max_logits.flatten(), logits.amax((0, 2, 3)))
    d = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), d),
                               torch.autograd.grad(expected, (q, k, v), d))


@pytest.mark.parametrize("name", ["kernels", "model", "muonclip"])
def test_modules_can_be_imported_without_triton(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)     # import triton raises ImportError
    monkeypatch.delitem(sys.modules, "kernels")
    spec = importlib.util.spec_from_file_location(name, importlib.util.find_spec(name).origin)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)       # a dataclass looks its module up there
    spec.loader.exec_module(module)


# ---- the Triton kernels

@pytest.fixture
def fused(monkeypatch):
    """The kernels are at work."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "INTERPRET", True)


@pytest.fixture
def poisoned():
    """Whatever torch.empty returns is NaN, so that a number that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# name -> the operation, the shapes of its inputs for `rows` rows of n numbers
KERNELS = {
    "poly_norm_mul": (partial(poly_norm_mul, eps=EPS),
                      lambda rows, n: [(rows, n), (rows, n), (3,), (1,)]),
    "differential_norm": (partial(model.differential_norm, scale=0.7, eps=1e-5),
                          lambda rows, n: [(1, rows, 2, 3, n), (1, rows, 2, 1, n), (), (n,)]),
}
SIZES = [(1, 1), (3, 7), (133, 123), (3, 128), (0, 1000), (3, 1000), (1, 4096), (3, 16384),
         (1, 16385)]


def outcome(operation, inputs, d_outs=None):
    """Outputs and gradients; d_outs: the incoming gradients, else some that a seed draws."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outs = operation(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    differentiable = [out for out in outs if out.requires_grad]
    if d_outs is None:
        generator = torch.manual_seed(1)                 # bf16: the same numbers in every dtype
        d_outs = [torch.randn(out.shape, dtype=torch.bfloat16, generator=generator)
                  for out in differentiable]
    d_outs = [d.to(out) for d, out in zip(d_outs, differentiable)]
    return *[out.detach() for out in outs], *torch.autograd.grad(differentiable, inputs, d_outs)


def distance(ours, exact):
    return (ours.double() - exact).norm().item()


def assert_as_exact_as_plain(operation, inputs, absolute=0.0, factor=1.1):
    """No output or gradient is further from float64's than that of plain PyTorch in this dtype."""
    ours = outcome(operation, inputs)
    exact = outcome(operation, [t.double() for t in inputs])
    with plain_twins():
        plain = outcome(operation, inputs)
    for our, twin, true in zip(ours, plain, exact, strict=True):
        assert our.dtype == twin.dtype and our.shape == twin.shape
        slack = 1e-6 * true.norm().item() + absolute
        assert distance(our, true) <= factor * distance(twin, true) + slack


@pytest.mark.parametrize("rows, n", SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_row_kernel_is_as_exact_as_plain_pytorch(name, rows, n, fused, poisoned):
    operation, shapes = KERNELS[name]
    absolute = 1e-3 if n == 1 else 0.0                   # dx is about eps there
    for dtype in DTYPES if n in (7, 123) else DTYPES[-1:]:
        inputs = [torch.randn(shape).to(DEVICE, dtype) for shape in shapes(rows, n)]
        assert_as_exact_as_plain(operation, inputs, absolute)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e5])
@pytest.mark.parametrize("name", KERNELS)
def test_a_row_kernel_keeps_its_precision_at_every_scale(name, scale, fused):
    operation, shapes = KERNELS[name]
    inputs = [torch.randn(shape, device=DEVICE) for shape in shapes(3, 300)]
    inputs[0] *= scale
    inputs[1] *= scale
    assert_as_exact_as_plain(operation, inputs)


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_kernel_reads_strided_rows_repeats_its_bits_and_changes_no_input(name, fused):
    operation, shapes = KERNELS[name]
    dense = [torch.randn(shape, device=DEVICE) for shape in shapes(5, 33)]
    expected = outcome(operation, dense)
    assert_all_equal(expected, outcome(operation, dense))

    far_rows = [torch.cat([t, t], -1)[..., :t.shape[-1]] if t.ndim else t for t in dense]
    strided = [torch.stack([t, t], -1)[..., 0] for t in dense]
    for inputs in far_rows, strided:
        d = torch.randn(*expected[0].shape, 2, device=DEVICE)[..., 0]
        before = [t.clone() for t in (d, *inputs)]
        assert_all_equal(outcome(operation, inputs, [d]),
                         outcome(operation, dense, [d.contiguous()]))
        assert_all_equal(before, [d, *inputs])


@pytest.mark.parametrize("vocabulary", [7, 9001])        # less than a block, more than one
def test_the_loss_kernel_is_as_exact_as_plain_pytorch(vocabulary, fused, poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 2)
    targets = torch.tensor([3, -1, 0, vocabulary - 1, -1], device=DEVICE)
    loss = partial(linear_cross_entropy, targets=targets)
    for dtype in DTYPES:
        x = torch.randn(5, 16).to(DEVICE, dtype)
        head = torch.randn(vocabulary, 16).to(DEVICE, dtype)
        assert_as_exact_as_plain(loss, [x, head])
        assert_as_exact_as_plain(loss, [x * 1e3, head])

        one_by_one = [linear_cross_entropy(x[i:i + 1], head, targets[i:i + 1], "sum")
                      for i in range(5)]
        torch.testing.assert_close(token_losses(x, head, targets), torch.stack(one_by_one),
                                   rtol=1e-5, atol=1e-5)
    none = partial(linear_cross_entropy, targets=torch.full_like(targets, -1))
    assert all((t == 0).all() for t in outcome(none, [x, head]))


def test_the_loss_of_a_token_without_a_target_is_0_whatever_its_logits(fused):
    x, head = (torch.randn(n, 16, device=DEVICE, dtype=DTYPES[1]) for n in (3, 7))
    x[1] = torch.nan
    targets = torch.tensor([1, -1, 2], device=DEVICE)
    plain = partial(linear_cross_entropy, x.double(), head.double(), targets)
    ours = linear_cross_entropy(x, head, targets)
    assert ours.isfinite() and ours.item() == pytest.approx(plain().item(), rel=1e-2)


def test_targets_may_be_strided_and_one_beyond_the_vocabulary_gives_nan(fused):
    x, head = (torch.randn(n, 16, device=DEVICE, dtype=DTYPES[1]) for n in (6, 7))
    pairs = torch.randint(7, (6, 2), device=DEVICE)
    dense = linear_cross_entropy(x, head, pairs[:, 0].contiguous())
    assert torch.equal(linear_cross_entropy(x, head, pairs[:, 0]), dense)
    assert linear_cross_entropy(x, head, pairs[:, 0] + 7).isnan()


# ---- attention

def attention(num_noise_heads, doc_start=None):
    """GDA, or grouped-query attention without noise heads, for q, k, v (B, T, heads, D)."""
    def run(q, k, v):
        if num_noise_heads:
            v = v.unflatten(2, (-1, 2)).flatten(3)
            return model.signal_and_noise_attention(q, k, v, num_noise_heads, doc_start)
        return model.causal_attention(q.unflatten(2, (k.shape[2], -1)), k, v, doc_start)
    return run


def random_documents(B, T, chance):
    """doc_start of documents that begin anywhere; some have a single token."""
    t = torch.arange(T, dtype=torch.int32)
    return torch.where(torch.rand(B, T) < chance, t, 0).cummax(1).values.to(DEVICE)


# B, T, noise heads, query heads, key heads, D, chance of a new document at a token, index in DTYPES
ATTENTIONS = {
    "two groups of a pair, two pairs": (1, 133, 4, 8, 4, 16, None, -2),
    "two groups of a pair, documents": (2, 197, 2, 4, 2, 16, 0.02, -1),
    "wide heads, documents": (1, 137, 1, 3, 2, 128, 0.1, -1),
    "plain, grouped queries": (1, 261, 0, 3, 1, 64, None, -2),
    "plain, documents": (2, 37, 0, 2, 2, 16, 0.3, -2),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_fused_attention_is_as_exact_as_plain_and_repeats_its_bits(name, fused, poisoned,
                                                                   monkeypatch):
    B, T, G, H, K, D, chance, dtype = ATTENTIONS[name]
    operation = attention(G, None if chance is None else random_documents(B, T, chance))
    qkv = torch.randn(B, T, H + 2 * K, D).to(DEVICE, DTYPES[dtype])
    views = qkv.split([H, K, K], dim=2)
    # In documents of few tokens ds = p (dp - rowsum(out d_out)) shows that out was rounded.
    assert_as_exact_as_plain(operation, views, factor=1.1 if chance is None else 1.5)

    before = qkv.clone()
    ours = outcome(operation, views)
    monkeypatch.setattr(kernels, "DS_BYTES", 1)          # ds of one pair at a time
    assert_all_equal(ours, outcome(operation, [t.contiguous() for t in views]))
    assert torch.equal(qkv, before)


# ---- FlexAttention

BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"


@pytest.fixture
def flex(monkeypatch):
    """Attention is FlexAttention: on a GPU compiled, on a CPU as PyTorch computes it without being
    compiled, with all logits. There it refuses gradients and maxima, though it has them."""
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "ATTENTION", "flex")
    if torch.cuda.is_available():
        return
    real = torch_flex._apply_kernel_options

    def with_lse_and_maxima(q, k, v, return_lse, options, return_aux):
        internal = {"OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": True}
        return real(q, k, v, return_lse, options) | internal

    monkeypatch.setattr(torch_flex, "_apply_kernel_options", with_lse_and_maxima)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda q, k, v: None)
    monkeypatch.setattr(torch_flex, "_warn_once", lambda *args, **options: None)
    monkeypatch.setattr(kernels, "compiled_flex_softmax", lambda: kernels.flex_softmax)


def cached_slots(B, T, S):
    """query_slots of B rows that have some of S slots filled and get T tokens or fewer, the rest
    being padding, which goes to the last slot."""
    lengths = torch.randint(S - T // 2, (B, 1), device=DEVICE)
    return (lengths + torch.arange(T, device=DEVICE)).clamp(max=S - 1)


def blocks_of(counts, numbers, n):
    """A BlockMask's list (B, 1, rows), (B, 1, rows, n) as a matrix (B, rows, n): whether row i has
    block j."""
    there = torch.zeros(*counts.shape, n, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)):
        b, _, row = at.tolist()
        listed = numbers[b, 0, row, :counts[b, 0, row]].tolist()
        assert len(set(listed)) == len(listed)
        there[b, 0, row, listed] = True
    return there[:, 0]


@pytest.mark.parametrize("case", ["causal", "documents", "short documents", "cache", "last"])
@pytest.mark.parametrize("T", [1, 128, 300, 700])
def test_a_block_mask_lists_the_blocks_that_have_something_to_see(case, T):
    B, S = 3, T
    first = torch.zeros(B, T, dtype=torch.int32)
    last = torch.arange(T).expand(B, T)
    if "documents" in case:
        first = random_documents(B, T, 0.1 if case == "short documents" else 0.005).cpu()
    if case == "cache":
        S = T + 333
        last = cached_slots(B, T, S).cpu()
    if case == "last":
        S = T + 140
        last = last + 140
    mask = kernels.interval_block_mask(first, last, S)

    # Rows beyond T are as the last one, keys beyond S are invisible.
    rows, columns = -(-T // 128), -(-S // 128)
    key = torch.arange(columns * 128)
    row = torch.arange(rows * 128).clamp(max=T - 1)
    visible = (first[:, row, None] <= key) & (key <= last[:, row, None]) & (key < S)
    blocks = visible.unflatten(1, (rows, 128)).unflatten(3, (columns, 128)).transpose(2, 3)
    full = blocks.all(-1).all(-1)                        # (B, rows, columns)
    partial = blocks.any(-1).any(-1) & ~full
    assert torch.equal(blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices, columns), full)
    assert torch.equal(blocks_of(mask.kv_num_blocks, mask.kv_indices, columns), partial)
    assert torch.equal(blocks_of(mask.full_q_num_blocks, mask.full_q_indices, rows), full.mT)
    assert torch.equal(blocks_of(mask.q_num_blocks, mask.q_indices, rows), partial.mT)

    t, s = torch.arange(T)[:, None], torch.arange(S)
    shown = torch.stack([mask.mask_mod(torch.tensor(b), 0, t, s) for b in range(B)])
    assert torch.equal(shown, visible[:, :T, :S])


# as ATTENTIONS, without a dtype
FLEX = {
    "two groups of a pair": (1, 300, 4, 8, 4, 16, None),
    "two groups of a pair, documents": (2, 197, 2, 4, 2, 32, 0.02),
    "many signal heads, many documents": (2, 260, 2, 10, 4, 64, 0.2),
    "wide heads": (1, 384, 1, 5, 2, 128, None),
    "wide heads, documents": (1, 290, 1, 3, 2, 128, 0.1),
    "heads of no power of two": (1, 140, 1, 3, 2, 48, 0.05),
    "few tokens": (3, 7, 2, 4, 2, 16, 0.3),
    "plain, grouped queries": (1, 261, 0, 3, 1, 64, None),
    "plain, documents": (2, 137, 0, 2, 2, 128, 0.05),
}


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_is_as_exact_as_plain_and_repeats_its_bits(name, flex):
    B, T, G, H, K, D, chance = FLEX[name]
    operation = attention(G, None if chance is None else random_documents(B, T, chance))
    views = torch.randn(B, T, H + 2 * K, D).to(DEVICE, DTYPES[-1]).split([H, K, K], dim=2)
    # As with the kernels, ds shows that out was rounded: most in documents of few tokens.
    assert_as_exact_as_plain(operation, views, factor=1.1 if chance is None else 2.0)
    assert_all_equal(outcome(operation, views), outcome(operation, views))


def test_flex_attention_is_taken_for_many_logits_and_in_compiled_blocks(flex, monkeypatch):
    """Of 4 signal heads, and of causal attention's 6, but not of 2 noise heads."""
    calls = []
    real = kernels.flex_softmax_attention
    monkeypatch.setattr(kernels, "flex_softmax_attention", lambda *a: calls.append(a) or real(*a))
    monkeypatch.setattr(kernels, "ATTENTION", None)
    monkeypatch.setattr(kernels, "can_fuse_attention", lambda q, k, v: False)
    monkeypatch.setattr(kernels, "can_flex_attention", lambda q, k, v: True)
    monkeypatch.setattr(kernels, "FEW_LOGITS", 2 * 2 * 40 * 40)
    q, k, v = (torch.randn(2, 40, heads, 16, device=DEVICE, dtype=DTYPES[1]) for heads in (6, 2, 2))
    for G in 2, 0:
        ours = attention(G)(q, k, v)
        assert len(calls) == 1 and calls.pop()[0].shape[2:4].numel() == (4 if G else 6)
        with plain_twins():
            torch.testing.assert_close(ours, attention(G)(q, k, v), rtol=1e-2, atol=1e-2)

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.attention_form(q[:, :2], k[:, :2], v[:, :2]) == "flex"


@pytest.mark.parametrize("B, T, S", [(3, 40, 300), (1, 200, 640), (2, 129, 130)])
def test_flex_attention_of_cached_keys_does_not_see_the_padding(B, T, S, flex):
    slots = cached_slots(B, T, S)
    dtype = DTYPES[-1]
    q = torch.randn(B, T, 10, 32).to(DEVICE, dtype)
    k = torch.randn(B, 4, S, 32).to(DEVICE, dtype).transpose(1, 2)       # as they lie in a cache
    v = torch.randn(B, 2, S, 64).to(DEVICE, dtype).transpose(1, 2)

    def operation(q, k, v):
        return model.signal_and_noise_attention(q, k, v, 2, query_slots=slots)

    assert_as_exact_as_plain(operation, [q, k, v])
    with torch.no_grad():
        signal, noise, max_logits = operation(q, k, v)
        for b, filled in enumerate((slots[:, -1] + 1).tolist()):
            k[b, filled:] = 1000
            v[b, filled:] = 1000
        assert_all_equal(operation(q, k, v), (signal, noise, max_logits))


def test_a_prompt_in_pieces_has_the_logits_of_plain_attention(flex):
    """Through a KV cache, which the second piece finds filled to two lengths."""
    llm = model.Motif(model.MotifConfig()).to(DEVICE).requires_grad_(False)
    ids = torch.randint(272, (2, 190), device=DEVICE)

    def logits():
        cache = KVCache(llm, batch_size=2, max_length=190)
        first = llm(ids[:, :150], cache=cache, row_lengths=torch.tensor([150, 30], device=DEVICE))
        second = llm(ids[:, 150:], cache=cache, row_lengths=torch.tensor([40, 7], device=DEVICE))
        return first[0], first[1, :30], second[0], second[1, :7]

    ours = logits()
    with plain_twins():
        torch.testing.assert_close(ours, logits(), rtol=1e-3, atol=1e-4)


def test_flex_attention_compiles_once_for_all_numbers_of_rows_and_tokens(flex, monkeypatch):
    """And once more where its mask has a single block."""
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(kernels.flex_softmax, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(kernels, "compiled_flex_softmax", lambda: compiled)
    for B, T in (3, 150), (5, 290), (2, 256), (7, 37):
        doc_start = random_documents(B, T, 0.1) if T == 290 else None
        q, k, v = (torch.randn(B, T, 2, 16, device=DEVICE, dtype=DTYPES[0]) for _ in range(3))
        assert_as_exact_as_plain(attention(0, doc_start), [q, k, v], factor=2.0)
        assert counter.frame_count == 1 + (T <= 128)


def test_flex_attention_becomes_a_part_of_a_compiled_block(flex):
    """As pretrain.py compiles the blocks. A second batch of documents needs no second graph."""
    shape = model.MotifConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                              head_dim=16, activation="swiglu")
    block = model.Motif(shape).to(DEVICE).model.layers[0]
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(block.forward, dynamic=False, fullgraph=True, backend=counter)
    for _ in range(2):
        doc_start = random_documents(2, 200, 0.05)
        positions = torch.arange(200, device=DEVICE) - doc_start
        angles = model.rotary_angles(positions, 16, 10_000.0)
        x = torch.randn(2, 200, 64, device=DEVICE)
        ours = outcome(lambda x: compiled(x, angles, doc_start), [x])
        with plain_twins():
            plain = outcome(lambda x: block(x, angles, doc_start), [x])
        for our, twin in zip(ours, plain, strict=True):
            torch.testing.assert_close(our, twin, rtol=1e-3, atol=1e-4)
        assert counter.frame_count == 1


@pytest.mark.parametrize("attention_of", ["fused", "flex"])
def test_document_starts_may_be_int64_and_expanded(attention_of, request):
    request.getfixturevalue(attention_of)
    q, k, v = (torch.randn(2, 40, 2, 16, device=DEVICE, dtype=DTYPES[1]) for _ in range(3))
    doc_start = torch.tensor([0] * 9 + [9] * 31, device=DEVICE)
    ours = outcome(attention(0, doc_start.expand(2, 40)), [q, k, v])
    assert_all_equal(ours, outcome(attention(0, doc_start.int().repeat(2, 1)), [q, k, v]))
    assert not ours[0].isnan().any()


@pytest.mark.parametrize("attention_of", ["fused", "flex"])
def test_a_logit_that_is_nan_shows_in_the_largest_of_its_head_alone(attention_of, request):
    """One in a query and one in a key, which QK-clip then does not take for small ones."""
    request.getfixturevalue(attention_of)
    q, k, v = (torch.randn(1, 40, heads, 16, device=DEVICE, dtype=DTYPES[1]) for heads in (4, 2, 2))
    expected = attention(0)(q, k, v)[1].flatten()
    q[0, 3, 1] = torch.nan
    largest = attention(0)(q, k, v)[1].flatten()
    assert torch.equal(largest.isfinite().cpu(), torch.tensor([True, False, True, True]))
    assert torch.equal(largest[[0, 2, 3]], expected[[0, 2, 3]])
    k[0, 7, 1] = torch.nan
    largest = attention(0)(q, k, v)[1].flatten()
    assert torch.equal(largest.isfinite().cpu(), torch.tensor([True, False, False, False]))
    assert largest[0] == expected[0]


def test_a_row_whose_logits_all_overflow_shows_in_the_largest_of_its_head_alone(fused):
    """The first query of a head, which sees a single key. bf16 has the range of fp32."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = (torch.randn(1, 40, 2, 16, device=DEVICE, dtype=dtype) for _ in range(3))
    expected = attention(0)(q, k, v)[1].flatten()
    q[0, 0, 1] = 1e30
    k[0, 0, 1] = -1e30
    largest = attention(0)(q, k, v)[1].flatten()
    assert largest[0] == expected[0] and largest[1] == torch.inf


def test_more_heads_than_a_grid_has_room_for_are_refused(fused):
    q, k, v = (torch.randn(32768, 1, 2, 16, device=DEVICE, dtype=DTYPES[1])
               for _ in range(3))
    with pytest.raises(ValueError, match="65,535"):
        attention(0)(q, k, v)


# ---- symmetric products

def place_of_tile(places_ptr, num_rows):
    """A kernel: (row, column) of the program's tile."""
    t = tl.program_id(0)
    i, j = lower_tile(t, num_rows)
    tl.store(places_ptr + 2 * t, i)
    tl.store(places_ptr + 2 * t + 1, j)


def test_tiles_are_numbered_as_the_plain_numbering_says(fused):
    """19 rows of tiles: two bands of eight and one of three."""
    rows = 19
    num_tiles = rows * (rows + 1) // 2
    places = torch.full((num_tiles, 2), -1, device=DEVICE, dtype=torch.int32)
    kernels.jit(place_of_tile)[(num_tiles,)](places, rows)
    assert places.tolist() == [[i, j] for i, j in kernels.lower_tiles(rows)]


# E, m, n: one tile; some with a part of one; more than the eight rows that a band has
@pytest.mark.parametrize("E, m, n", [(1, 32, 80), (3, 264, 48), (1, 1168, 16)])
def test_a_symmetric_product_is_as_exact_as_torchs(E, m, n, fused, poisoned):
    for dtype in DTYPES[-2:] if m == 264 else DTYPES[-1:]:
        by_rows = torch.randn(E, m, n).to(DEVICE, dtype)
        by_columns = torch.randn(E, n, m).to(DEVICE, dtype).mT
        d = torch.randn(E, m, m).to(DEVICE, dtype)
        for x in by_rows, by_columns:
            assert_symmetric_product(x, None, 0.0)
            assert_symmetric_product(x, d + d.mT, -1.5)


def assert_symmetric_product(x, addend, beta):
    """3 x (x / 2)^T + beta addend by the kernel, against float64 and torch.baddbmm."""
    C = kernels.symmetric_matmul(x, x * 0.5, 3.0, addend, beta)
    twin = plain_symmetric_product(x, addend, beta)
    true = plain_symmetric_product(x.double(), None if addend is None else addend.double(), beta)
    assert C.dtype == x.dtype
    assert distance(C, true) <= 1.1 * distance(twin, true) + 1e-6 * true.norm()

    # In the interpreter numpy multiplies, and on some CPUs a tile on the diagonal is not quite
    # symmetric. Below the diagonal tiles C is, since each tile is written twice.
    n = 0 if C.is_cuda else kernels.TILE
    below = C[:, n:, :n] if n else C
    above = C[:, :n, n:] if n else C
    assert torch.equal(below, above.mT)


def plain_symmetric_product(x, addend, beta):
    addend = x.new_zeros(()) if addend is None else addend
    return torch.baddbmm(addend, x, x.mT * 0.5, beta=beta, alpha=3.0)


def test_a_product_that_tma_cannot_read_or_write_is_torchs(fused):
    wide = torch.randn(2, 32, 64, device=DEVICE)
    for x in wide[:, :, 1:20], wide[:, ::2, ::2], wide[:, :1], wide.double():
        torch.testing.assert_close(kernels.symmetric_matmul(x, x, 2.0), 2 * x @ x.mT)


# ---- FP8

def uneven_rows(*shape, dtype=torch.float32):
    """Rows of very different sizes."""
    return (torch.randn(shape) * torch.randn(shape[0], 1).exp()).to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(16, 16), (133, 123), (256, 144)])
def test_quantising_gives_the_bits_of_the_plain_form(shape, fused, poisoned):
    for dtype in DTYPES:
        x = uneven_rows(*shape, dtype=dtype)
        x[1] = 0
        x[2] *= 1e-4
        x[3, 5] = torch.nan
        x[4, 6] = torch.inf
        with plain_twins():
            plain = quantize_fp8(x, True)
        assert (plain[0].float().isnan().sum(1) > 0).nonzero().flatten().tolist() == [3, 4]
        for out in (quantize_fp8(x, True), quantize_fp8(x.T.contiguous().T, True),
                    quantize_fp8(x, False)):
            for ours, theirs in zip(out, plain):
                torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0,
                                           equal_nan=True)


@pytest.mark.parametrize("outliers", [False, True])
def test_fp8_products_and_gradients_are_within_4_percent(outliers, fused):
    x = uneven_rows(256, 512)
    w = uneven_rows(384, 512) / 50
    d = uneven_rows(256, 384) * 1e-6
    if outliers:                # some channels and tokens are 100 times larger, as in LLMs
        x[:, ::97] *= 100
        d[::61] *= 100
    x, w, d = (t.bfloat16() for t in (x, w, d))
    exact = outcome(F.linear, [x.double(), w.double()], [d])
    ours = outcome(linear_fp8, [x, w], [d])
    for our, true in zip(ours, exact):
        assert our.dtype == torch.bfloat16
        assert distance(our, true) < 4e-2 * true.norm()

    # Powers of 2 go into the scales, and change no bit of what is in FP8.
    y, dx, dw = outcome(linear_fp8, [x * 4, w / 2], [d * 2])
    assert_all_equal(ours, [y / 2, dx, dw / 8])


def test_fp8_keeps_zeros_and_passes_nan_on(fused):
    x, w, d = uneven_rows(32, 64), uneven_rows(48, 64), uneven_rows(32, 48)
    y, dx, dw = outcome(linear_fp8, [x * 0, w], [d])
    assert not y.any() and not dw.any() and dx.isfinite().all()
    x[3, 4] = torch.nan
    y, dx, dw = outcome(linear_fp8, [x, w], [d])
    assert y[3].isnan().all() and y[:3].isfinite().all() and dw[:, 4].isnan().all()


@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 32), (0, 16), (2, 0, 32), (16, 24)])
def test_shapes_that_fp8_cannot_take_are_a_plain_product(shape, fused):
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(16, shape[-1], device=DEVICE, dtype=torch.bfloat16)
    assert_all_equal(outcome(linear_fp8, [x, w]), outcome(F.linear, [x, w]))


# ---- torch.compile

def test_compiled_projections_of_one_input_quantise_it_once(monkeypatch):
    shapes = []
    plain = kernels.quantize_rows

    def noting(x):
        shapes.append(x.shape)
        return plain(x)

    def three_projections(x, *weights):
        q, k, v = (linear_fp8(F.silu(x), w) for w in weights)
        return q * k + v

    monkeypatch.setattr(kernels, "quantize_rows", noting)
    x = torch.randn(2, 24, 64).bfloat16()
    weights = [torch.randn(32, 64).bfloat16() for _ in range(3)]
    expected = outcome(three_projections, [x, *weights])
    compiled = torch.compile(three_projections, fullgraph=True, backend="aot_eager")
    assert_all_equal(outcome(compiled, [x, *weights]), expected)
    # (48, 64) is x: three times in eager mode, once compiled. (48, 32) is each projection's dy.
    assert shapes.count((48, 64)) == 3 + 1
    assert shapes.count((48, 32)) == 3 + 3


def test_activation_checkpointing_can_drop_what_a_compiled_fp8_product_keeps():
    """It drops what passes through these hooks, and nothing else."""
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(linear_fp8, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compiled(x, w)
    sizes = [t.numel() for t in kept if t.dtype == kernels.FP8]
    assert sorted(sizes) == [x.numel(), w.numel()]


DOC_START = torch.tensor([[0] * 20 + [20] * 13], dtype=torch.int32, device=DEVICE)
HEADS = [(1, 33, 6, 16), (1, 33, 4, 16), (1, 33, 4, 16)]
COMPILED = {name: (f, shapes(3, 32)) for name, (f, shapes) in KERNELS.items()} | {
    "attention": (attention(2), HEADS),
    "documents": (attention(2, DOC_START), HEADS),
    "cross entropy": (cross_entropy, [(5, 16), (7, 16)]),
    "linear_fp8": (linear_fp8, [(2, 16, 32), (48, 32)]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_and_activation_checkpointing_go_through_a_kernel(name, fused):
    operation, shapes = COMPILED[name]
    inputs = [torch.randn(shape).to(DEVICE, DTYPES[-1]) for shape in shapes]
    expected = outcome(operation, inputs)
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    recomputed = partial(checkpoint, operation, use_reentrant=False)
    assert_all_equal(outcome(compiled, inputs), expected)
    assert_all_equal(outcome(recomputed, inputs), expected)


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_kernel_is_in_one_graph_for_any_number_of_rows(name, fused):
    operation, shapes = KERNELS[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(operation, dynamic=True, fullgraph=True, backend=backend)
    for rows in 5, 9, 31:
        inputs = [torch.randn(shape, device=DEVICE) for shape in shapes(rows, 32)]
        assert torch.equal(compiled(*inputs), operation(*inputs))
    assert len(graphs) == 1


# ---- machine code

def test_every_kernel_compiles_for_hopper_without_spills_and_with_wide_loads():
    triton = pytest.importorskip("triton")
    script = Path(__file__).parent / "sm90.py"
    out = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    made = [json.loads(line) for line in out.stdout.splitlines()]
    assert {kernel["name"] for kernel in made} == {
        "scale_kernel", "poly_norm_forward_kernel", "poly_norm_backward_kernel",
        "differential_norm_forward_kernel", "differential_norm_backward_kernel",
        "cross_entropy_kernel", "attention_forward_kernel", "attention_delta_kernel",
        "attention_dkdv_kernel", "attention_dq_kernel", "symmetric_kernel", "absmax_kernel",
        "quantize_kernel"}
    # The ptxas of Triton 3.6 keeps up to six numbers on the stack, none of them in a loop.
    stack = 24 if triton.__version__.startswith("3.6.") else 0
    for kernel in made:
        assert kernel["stack"] <= stack and kernel["shared"] <= 232448, kernel
        assert kernel["wide_loads"] > 0, kernel
        assert kernel["tensor_core"] > 0 or not kernel["multiplies"], kernel
