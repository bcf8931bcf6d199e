"""Every operation of kernels.py against its defining formula under autograd, in float64."""
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels
import reference

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
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w, EPS), lambda x, w: w * unit(x),
                 lambda: (normal(2, 3, 5), normal(5))),
    "rope": (lambda x: kernels.rope(x, ANGLE.cos(), ANGLE.sin()), lambda x: rope_formula(x, ANGLE),
             lambda: (normal(2, 3, 2, 6),)),
    "differential_norm": (lambda *t: kernels.differential_norm(*t, 0.7, 0.1),
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
    with pytest.raises(ValueError, match="^reduction must be 'mean' or 'sum', not 'none'$"):
        kernels.linear_cross_entropy(x, head, torch.zeros(3, dtype=torch.long), "none")


@pytest.mark.parametrize("T, documents", [
    (5, None), (2, None), (1, None),                     # less than 5: the last ones, after a cache
    (5, [[0, 0, 0, 1, 1], [4, 5, 5, 5, 5]])])
def test_causal_attention_is_torchs_and_tells_the_largest_visible_logit(T, documents):
    q, k, v = normal(2, T, 2, 3, 4), normal(2, 5, 2, 4), normal(2, 5, 2, 6)
    visible = torch.ones(T, 5, dtype=torch.bool).tril(5 - T)
    if documents is not None:
        documents = torch.tensor(documents)
        visible = (visible & (documents[:, :, None] == documents[:, None]))[:, None]
    out, largest = kernels.causal_attention(q, k, v, documents)
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
