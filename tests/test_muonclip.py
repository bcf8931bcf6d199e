"""MuonClip against torch's own Muon and AdamW, Newton-Schulz against its equations, and QK-clip on
the logits that it promises to hold down."""
import tools.bench_muon
import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
import muonclip
from model import Motif, MotifConfig, rotary_angles
from muonclip import COEFFICIENTS, MuonClip, describe_routing, configure_optimizer, newton_schulz, qk_clip

SHAPES = ((8, 20), (20, 8), (12, 12), (5, 7))
MODEL = MotifConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=5, num_key_value_heads=2, num_noise_heads=1, head_dim=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shapes, **options):
    return [torch.randn(shape, requires_grad=True, **options) for shape in shapes]


def copies(params):
    return [p.detach().clone().requires_grad_() for p in params]


def train(steps, *runs):
    """The same random gradients to the parameters of each (params, optimizer), step by step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for same in zip(*(params for params, _ in runs)):
            grad = torch.randn(same[0].shape, generator=generator, dtype=same[0].dtype)
            for p in same:
                p.grad = grad.clone()
        for _, optimizer in runs:
            optimizer.step()


# ---- Newton-Schulz

def defect(O):
    """|O O^T - I|_F / sqrt(k), k the short side."""
    O = O.double() if len(O) <= O.shape[1] else O.double().T
    rest = O @ O.T - torch.eye(len(O), device=O.device)
    return (torch.linalg.matrix_norm(rest) / len(O) ** 0.5).item()


def decaying(m, n, device="cpu"):
    """m x n of singular values 1 / i."""
    U, V = (torch.linalg.qr(torch.randn(k, m, device=device))[0] for k in (m, n))
    return U / torch.arange(1, m + 1, device=device) @ V.T


def test_newton_schulz_is_as_near_to_orthogonal_as_published():
    """In fp32 too, as the polynomial sets it: a CPU without products of bf16 is slow at them."""
    gaussian, slow = torch.randn(512, 2048), decaying(1024, 4096)
    for table, *errors in (("quintic", 0.270, 0.582), ("motif", 0.034, 0.559),
                           ("polar_express", 0.187, 0.267)):
        found = [defect(newton_schulz(G, coefficients=table, dtype=torch.float32))
                 for G in (gaussian, slow)]
        assert found == pytest.approx(errors, abs=0.004)
        small = [defect(newton_schulz(gaussian[:128, :512], coefficients=table, dtype=dtype))
                 for dtype in (torch.bfloat16, torch.float32)]
        assert small[0] == pytest.approx(small[1], abs=0.002)


def formula(G, table):
    """Newton-Schulz of one matrix as its docstring has it."""
    X = G / G.norm() / (1.02 if table == "polar_express" else 1)
    for a, b, c in COEFFICIENTS[table]:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


@pytest.mark.parametrize("table", COEFFICIENTS)
def test_every_form_of_newton_schulz_is_the_same_function(table):
    """The plain one and those on A alone, wide and tall, stacked, in float64 and in fp32."""
    stack = torch.randn(3, 12, 40, dtype=torch.float64)
    X = muonclip.SCALE * stack / torch.linalg.matrix_norm(stack)[:, None, None]
    X /= 1.02 if table == "polar_express" else 1
    expected = torch.stack([formula(G, table) for G in stack])
    steps = [muonclip.plain_steps, *(lambda X, t, s=s: muonclip.gram_steps(X, t, s)
                                     for s in (1, 2, 3, 5))]
    for form in steps:
        for layout in (X, X.mT.contiguous().mT):
            O = form(layout, COEFFICIENTS[table]) / muonclip.SCALE
            torch.testing.assert_close(O, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(newton_schulz(stack, 5, table, torch.float64), expected,
                               rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(newton_schulz(stack.mT, 5, table, torch.float64), expected.mT,
                               rtol=1e-10, atol=1e-10)
    for span in (1, 3):
        O = muonclip.gram_steps(X.float(), COEFFICIENTS[table], span) / muonclip.SCALE
        assert (O - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.skipif(kernels.triton is None, reason="needs Triton")
@pytest.mark.parametrize("shape", [(2, 136, 200), (200, 136), (136, 144)])
def test_newton_schulz_by_the_kernel_is_the_same(shape, monkeypatch):
    """Wide, tall and nearly square, of two tiles by two, the last of them not full."""
    G = torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if G.is_cuda else torch.float32
    plain = newton_schulz(G, dtype=dtype).float()
    if not G.is_cuda:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "SYMMETRIC_TILES", 3)
    spans, gram = [], muonclip.gram_steps
    monkeypatch.setattr(muonclip, "gram_steps",
                        lambda X, table, span: spans.append(span) or gram(X, table, span))
    O = newton_schulz(G, dtype=dtype)
    assert spans == [1 if shape == (136, 144) else 3] and O.is_contiguous()
    assert (O.float() - plain).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * plain.norm()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("m, n", [(512, 2048), (2048, 4096), (4096, 4096), (4096, 16384)])
def test_on_a_gpu_newton_schulz_is_no_worse_than_the_plain_form_in_bf16(m, n):
    for G in torch.randn(m, n, device="cuda"), decaying(m, n, "cuda"):
        X = G.bfloat16()
        X = X / X.norm()
        for table, steps in COEFFICIENTS.items():
            x = X / 1.02 if table == "polar_express" else X
            for a, b, c in steps:
                A = x @ x.T
                x = torch.addmm(x, torch.addmm(A, A, A, beta=b, alpha=c), x, beta=a)
            for O in newton_schulz(G, coefficients=table), newton_schulz(G.T, coefficients=table):
                assert O.dtype == torch.bfloat16 and defect(O) <= 1.01 * defect(x)


@needs_gpu
def test_on_a_gpu_the_compiled_update_is_the_plain_one(monkeypatch):
    """Also of matrices that 1024 does not divide, of stacks, and where a step is skipped."""
    shapes = ((64, 96), (256, 256), (96, 64), (2, 32, 48), (5, 7), (512, 128))
    ours = [torch.randn(s, device="cuda", requires_grad=True) for s in shapes]
    theirs = copies(ours)
    monkeypatch.setattr(muonclip, "newton_schulz", lambda u, **_: u)     # chaotic in half precision
    options = {"lr": 0.01, "weight_decay": 0.3}
    optimizers = MuonClip(ours, [], **options), MuonClip(theirs, [], **options)
    for step in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        skip = torch.tensor(step == 2, device="cuda")
        optimizers[0].step(skip=skip)
        with monkeypatch.context() as plain:
            plain.setattr(kernels, "FUSED", False)
            optimizers[1].step(skip=skip)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-3)       # u may round the other way
            torch.testing.assert_close(optimizers[0].state[p]["momentum"],
                                       optimizers[1].state[q]["momentum"])
            torch.testing.assert_close(optimizers[0].update_rms[p], optimizers[1].update_rms[q],
                                       rtol=1e-3, atol=0)


@pytest.mark.parametrize("table", COEFFICIENTS)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(table):
    G = torch.randn(6, 9, dtype=torch.float64)
    U, sigma, Vt = torch.linalg.svd(G, full_matrices=False)
    sigma = sigma / sigma.norm() / (1.02 if table == "polar_express" else 1)
    for a, b, c in COEFFICIENTS[table][:4]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    O = newton_schulz(G, 4, table, torch.float64)
    torch.testing.assert_close(O, U * sigma @ Vt, rtol=1e-12, atol=1e-12)


def test_newton_schulz_knows_no_scale_no_layout_and_leaves_its_input():
    G = torch.randn(6, 9)
    kept, O = G.clone(), newton_schulz(G)
    assert O.dtype == torch.bfloat16
    for power in (2.0**100, 2.0**-100):                                  # exact in bf16
        assert torch.equal(newton_schulz(G * power), O)
    for scale in (1e30, 1e-30):
        torch.testing.assert_close(newton_schulz(G * scale, dtype=torch.float32),
                                   newton_schulz(G, dtype=torch.float32), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(newton_schulz(G * scale), O, rtol=0, atol=0.03)
    assert torch.equal(newton_schulz(torch.zeros(6, 9)), torch.zeros(6, 9, dtype=torch.bfloat16))
    assert torch.equal(newton_schulz(G.T), O.T)
    assert torch.equal(newton_schulz(-G.abs() * 2.0**100), -newton_schulz(G.abs()))
    stack = torch.stack([G, 1e30 * G, torch.zeros_like(G), torch.randn(6, 9)]).view(2, 2, 6, 9)
    for dtype in (torch.float32, torch.bfloat16):
        slices = [newton_schulz(g, dtype=dtype) for g in stack.flatten(0, 1)]
        assert torch.equal(newton_schulz(stack, dtype=dtype).flatten(0, 1), torch.stack(slices))
        same = G.to(dtype)                               # no cast to make a copy of it
        newton_schulz(same, dtype=dtype)
        assert torch.equal(same, kept.to(dtype))
    for wrong in ({"coefficients": "cubic"}, {"steps": 6}, {"steps": 0}):
        with pytest.raises(ValueError, match="^newton_schulz has 1 to 5 steps of quintic, motif, "):
            newton_schulz(G, **wrong)


# ---- the update

@pytest.mark.parametrize("nesterov", [True, False])
def test_twenty_steps_equal_torchs_muon(nesterov, monkeypatch):
    """Its momentum b = mu b + (1 - mu) g is (1 - mu) times ours, so is its u = (1 - mu) g + mu b:
    the same direction, and Newton-Schulz asks for no more. Both get ours, in fp32."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz",
                        lambda u, *_: newton_schulz(u, dtype=torch.float32))
    ours = normal(*SHAPES)
    theirs = copies(ours)
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3}
    optimizer = MuonClip(ours, [], dtype=torch.float32, **options)
    train(20, (ours, optimizer),
          (theirs, torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)))
    for p, q in zip(ours, theirs):
        assert (p - q).norm() <= 1e-5 * q.norm()


def test_the_rest_gets_torchs_adamw_exactly_and_vectors_no_decay():
    ours = normal((8, 6), (6,), ())
    theirs = copies(ours)
    decayed, plain = theirs[:1], {"params": theirs[1:], "weight_decay": 0}
    options = {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}
    train(5, (ours, MuonClip([], ours, **options)),
          (theirs, torch.optim.AdamW([{"params": decayed}, plain], fused=True, **options)))
    assert all(map(torch.equal, ours, theirs))


def test_one_step_by_hand_a_stack_a_missing_gradient_and_a_bad_parameter():
    stack, idle, vector = normal((2, 3, 5), (4, 4), (3,))
    W, G = stack.detach().clone(), torch.randn(2, 3, 5)
    optimizer = MuonClip([stack, idle], [vector], lr=0.1, weight_decay=0.5)
    kept, stack.grad = idle.detach().clone(), G
    assert optimizer.step(lambda: 7) == 7
    O = torch.stack([newton_schulz((1 + 0.95) * g).float() for g in G]) * 0.2 * 5**0.5
    torch.testing.assert_close(stack.detach(), W * (1 - 0.1 * 0.5) - 0.1 * O)
    assert torch.equal(idle, kept) and torch.equal(optimizer.state[stack]["momentum"], G)
    rms = O.square().mean().sqrt().item()
    assert list(optimizer.update_rms) == [stack]
    assert optimizer.update_rms[stack].item() == pytest.approx(rms, rel=0.01)
    with pytest.raises(ValueError, match="^Muon takes matrices; give vectors "):
        MuonClip([vector], [], lr=0.1)
    with pytest.raises(ValueError, match="^MuonClip trains fp32 weights; "):
        MuonClip([], [torch.zeros(2, dtype=torch.bfloat16)], lr=0.1)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_a_skipped_step_leaves_no_trace(optimizer):
    """Neither gradients and logits that are not finite nor good ones change anything."""
    model, bad = Motif(MODEL), torch.tensor(True)
    ours = configure_optimizer(model, lr=0.1, tau=1e-6, optimizer=optimizer)
    S = torch.ones(2, 5)

    def state():
        return [t.clone() for p in model.parameters() for t in (p.data, *ours.state[p].values())]

    def step(grad, S, skip):
        for p in model.parameters():
            p.grad = torch.full_like(p, grad)
        ours.step(max_logits=S, skip=skip)

    for grad, logit in (torch.nan, torch.nan), (torch.inf, torch.inf), (1.0, 1.0):
        before = state()
        step(grad, S * logit, bad)
        assert all(map(torch.equal, before, state()))
        assert not ours.clipped
        step(1.0, S, ~bad)                               # the next one counts
        assert not any(map(torch.equal, before, state()))
        if optimizer == "muonclip":
            assert ours.clipped == 10


def test_the_saved_state_continues_bitwise(tmp_path):
    """The second step after a resume too: a state that reads back as zeros betrays itself there."""
    def start(params):
        return MuonClip(params[:2], params[2:], lr=0.02, qk=[], weight_decay=0.3)
    straight = normal((6, 4), (4, 6), (5, 4), (4,), ())
    optimizer = start(straight)
    train(3, (straight, optimizer))
    saved = optimizer.state_dict()
    save_file({f"{i}.{k}": t for i, s in saved["state"].items() for k, t in s.items()},
              tmp_path / "state.safetensors")
    read = {i: {} for i in saved["state"]}
    for name, t in load_file(tmp_path / "state.safetensors").items():
        i, key = name.split(".")
        read[int(i)][key] = t
    resumed = copies(straight)
    other = start(resumed)
    for group in other.param_groups:
        group["lr"] = 1.0                                # the saved one comes back
    other.load_state_dict({"state": read, "param_groups": saved["param_groups"]})
    for _ in range(2):
        train(1, (straight, optimizer), (resumed, other))
        assert all(map(torch.equal, straight, resumed))


# ---- a whole model

def test_for_model_gives_muon_the_layers_matrices_and_adamw_all_else():
    model = Motif(MODEL)
    optimizer = configure_optimizer(model, lr=0.1, momentum=0.5)
    names = {p: name for name, p in model.named_parameters()}
    groups = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
    assert groups[0] == list(model.matrices()) and len(groups[0]) == 14
    assert groups[1] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert sorted(sum(groups, [])) == sorted(names.values())
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert describe_routing(model, optimizer).splitlines() == [
        "muon, weight decay 0.1: 4,480 in 14 tensors: "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        "adamw, weight decay 0.1: 640 in 2 tensors: embed_tokens, lm_head",
        "adamw, weight decay 0.0: 136 in 19 tensors: input_layernorm, lambda_q1, lambda_k1, "
        "lambda_q2, lambda_k2, subln, post_attention_layernorm, act_fn, act_fn.bias, norm"]
    plain = configure_optimizer(model, lr=0.1, optimizer="adamw")
    assert [g["kind"] for g in plain.param_groups] == ["adamw", "adamw"] and not plain.qk
    assert sum(len(g["params"]) for g in plain.param_groups) == len(names)
    with pytest.raises(ValueError, match="^optimizer must be 'muonclip' or 'adamw', not 'sgd'$"):
        configure_optimizer(model, lr=0.1, optimizer="sgd")


def logits(layer, x, kv_map):
    """(H, B T T): each head's logits on the layer's recorded input, -inf where it may not see."""
    D, T = layer.head_dim, x.shape[1]
    cos, sin = rotary_angles(torch.arange(T)[None], D, MODEL.rope_theta)
    def heads(projection):
        a, b = projection(x).unflatten(2, (-1, D)).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    q, k = heads(layer.q_proj), heads(layer.k_proj)[:, :, kv_map]
    S = torch.einsum("bthd,bshd->hbts", q, k) / D**0.5
    return S.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).flatten(1)


@pytest.mark.parametrize("heads, kv_heads, noise, kv_map", [
    (3, 3, 0, [0, 1, 2]), (6, 2, 0, [0, 0, 0, 1, 1, 1]),
    (10, 4, 2, [0, 0, 0, 0, 1, 2, 2, 2, 2, 3]), (6, 2, 2, [0, 0, 1, 0, 0, 1]),
    (4, 4, 2, [0, 1, 2, 3])])
@torch.no_grad()
def test_no_logit_is_left_above_tau_and_heads_below_it_keep_theirs(heads, kv_heads, noise, kv_map):
    """In float64, with lr = 0, on the input that each layer saw in the step's own forward."""
    config = MotifConfig(**{**vars(MODEL), "num_attention_heads": heads, "num_noise_heads": noise,
                            "num_key_value_heads": kv_heads})
    assert config.kv_map == kv_map
    model, tau = Motif(config).double(), 100.0
    seen, layers = [], [block.self_attn for block in model.model.layers]
    for layer in layers:
        per_head = torch.logspace(1, 3, heads, dtype=torch.float64)[torch.randperm(heads)]
        layer.q_proj.weight.mul_(per_head.repeat_interleave(4)[:, None] * 300)
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randint(20, (2, 7)))
    S = model.max_logits
    before = [logits(layer, x, kv_map) for layer, x in zip(layers, seen)]
    keys = [layer.k_proj.weight.clone() for layer in layers]
    torch.testing.assert_close(S, torch.stack([b.amax(1) for b in before]))
    assert (S > 2 * tau).any() and (S < tau / 2).any()
    optimizer = configure_optimizer(model, lr=0.0, tau=tau)
    optimizer.step(max_logits=S)
    assert optimizer.clipped == (S > tau).sum()
    for layer, x, old, peaks, k in zip(layers, seen, before, S, keys):
        new = logits(layer, x, kv_map)
        assert (new.amax(1) <= tau * (1 + 1e-6)).all()
        gamma = (tau / peaks).clamp(max=1)
        torch.testing.assert_close(new, old * gamma[:, None], rtol=1e-6, atol=1e-9)
        for j in range(kv_heads):                        # a key takes half of its strictest head's
            s = min(gamma[h] for h in range(heads) if kv_map[h] == j) ** 0.5
            torch.testing.assert_close(layer.k_proj.weight[4 * j:4 * j + 4], s * k[4 * j:4 * j + 4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_raises(bad):
    with pytest.raises(RuntimeError, match="an attention logit is not finite"):
        qk_clip(torch.ones(4, 3), torch.ones(4, 3), torch.tensor([1.0, bad]), [0, 1], 2, 100.0)


def test_main_prints_the_routing_and_times_a_step(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["muonclip.py", "--hidden_size=16", "--intermediate_size=16"])
    tools.bench_muon.main()
    said = capsys.readouterr().out
    assert "muon, weight decay" in said and "ms on c" in said and "  8 x 16 x 16 " in said
    assert "torch.optim.AdamW, ratio\n  18,176 parameters " in said
