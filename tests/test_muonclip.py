"""MuonClip against torch's own Muon and AdamW, Newton-Schulz against its definition, and QK-clip on
the logits that it promises to hold down."""
import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
import muonclip
from model import Motif, MotifConfig, rotary_angles
from muonclip import (COEFFICIENTS, SCALE, START_MARGIN, MuonClip, configure_optimizer,
                      describe_routing, gram_steps, newton_schulz, plain_newton_schulz, plain_steps,
                      qk_clip)
from tools import bench_muon

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
    """Give the same random gradients to the parameters of each run, a (params, optimizer), and
    step."""
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
    O = O.double()
    if len(O) > O.shape[1]:
        O = O.T
    difference = O @ O.T - torch.eye(len(O), device=O.device)
    return (torch.linalg.matrix_norm(difference) / len(O) ** 0.5).item()


def decaying(m, n, device="cpu"):
    """m x n with the singular values 1 / i."""
    U = torch.linalg.qr(torch.randn(m, m, device=device))[0]
    V = torch.linalg.qr(torch.randn(n, m, device=device))[0]
    return U / torch.arange(1, m + 1, device=device) @ V.T


@pytest.mark.parametrize("table, of_gaussian, of_decaying", [
    ("quintic", 0.270, 0.582), ("motif", 0.034, 0.559), ("polar_express", 0.187, 0.267)])
def test_newton_schulz_is_as_near_to_orthogonal_as_published(table, of_gaussian, of_decaying):
    """In fp32, as the polynomial sets the error, and a CPU is slow in bf16; a small matrix shows
    that bf16 gives the same."""
    gaussian = torch.randn(512, 2048)
    found = [defect(newton_schulz(G, coefficients=table, dtype=torch.float32))
             for G in (gaussian, decaying(1024, 4096))]
    assert found == pytest.approx([of_gaussian, of_decaying], abs=0.004)

    small = gaussian[:128, :512]
    in_bf16 = defect(newton_schulz(small, coefficients=table, dtype=torch.bfloat16))
    in_fp32 = defect(newton_schulz(small, coefficients=table, dtype=torch.float32))
    assert in_bf16 == pytest.approx(in_fp32, abs=0.002)


@pytest.mark.parametrize("table", COEFFICIENTS)
def test_every_form_of_newton_schulz_equals_the_definition(table):
    """The one in plain steps and those on A alone, by rows and by columns, stacked, tall."""
    stack = torch.randn(3, 12, 40, dtype=torch.float64)
    expected = torch.stack([plain_newton_schulz(G, 5, table) for G in stack])

    norms = torch.linalg.matrix_norm(stack)[:, None, None]
    X = SCALE * stack / norms / START_MARGIN[table]
    for scaled in (X, X.mT.contiguous().mT):
        results = [plain_steps(scaled, COEFFICIENTS[table])]
        for span in (1, 2, 3, 5):
            results.append(gram_steps(scaled, COEFFICIENTS[table], span))
        for result in results:
            torch.testing.assert_close(result / SCALE, expected, rtol=1e-10, atol=1e-10)

    O = newton_schulz(stack, 5, table, torch.float64)
    torch.testing.assert_close(O, expected, rtol=1e-10, atol=1e-10)
    O = newton_schulz(stack.mT, 5, table, torch.float64)
    torch.testing.assert_close(O, expected.mT, rtol=1e-10, atol=1e-10)

    for span in (1, 3):
        O = gram_steps(X.float(), COEFFICIENTS[table], span) / SCALE
        assert (O - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("table", COEFFICIENTS)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(table):
    G = torch.randn(6, 9, dtype=torch.float64)
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm() / START_MARGIN[table]
    for a, b, c in COEFFICIENTS[table][:4]:
        s = a * s + b * s**3 + c * s**5
    O = newton_schulz(G, 4, table, torch.float64)
    torch.testing.assert_close(O, U * s @ Vt, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(kernels.triton is None, reason="needs Triton")
@pytest.mark.parametrize("shape, span", [((2, 136, 200), 3), ((200, 136), 3), ((136, 144), 1)])
def test_newton_schulz_by_the_kernel_is_the_same(shape, span, monkeypatch):
    """Wide, tall and nearly square, of two tiles by two, the last of which are not full."""
    G = torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if G.is_cuda else torch.float32
    plain = newton_schulz(G, dtype=dtype).float()

    if not G.is_cuda:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "MIN_SYMMETRIC_TILES", 3)
    spans = []

    def recording(X, table, span):
        spans.append(span)
        return gram_steps(X, table, span)

    monkeypatch.setattr(muonclip, "gram_steps", recording)
    O = newton_schulz(G, dtype=dtype)
    assert spans == [span] and O.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (O.float() - plain).norm() <= tolerance * plain.norm()


def test_newton_schulz_does_not_depend_on_scale_or_layout():
    G = torch.randn(6, 9)
    O = newton_schulz(G)
    assert O.dtype == torch.bfloat16
    assert torch.equal(newton_schulz(G.T), O.T)

    # Powers of two are exact in bf16.
    assert torch.equal(newton_schulz(G * 2.0**100), O)
    assert torch.equal(newton_schulz(G * 2.0**-100), O)
    assert torch.equal(newton_schulz(-G.abs() * 2.0**100), -newton_schulz(G.abs()))

    in_fp32 = newton_schulz(G, dtype=torch.float32)
    for scale in (1e30, 1e-30):
        torch.testing.assert_close(newton_schulz(G * scale, dtype=torch.float32), in_fp32,
                                   rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(newton_schulz(G * scale), O, rtol=0, atol=0.03)
    assert torch.equal(newton_schulz(torch.zeros(6, 9)), torch.zeros(6, 9, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_takes_each_matrix_of_a_stack_by_itself_and_leaves_its_input(dtype):
    G = torch.randn(6, 9)
    stack = torch.stack([G, 1e30 * G, torch.zeros_like(G), torch.randn(6, 9)]).view(2, 2, 6, 9)
    one_by_one = [newton_schulz(matrix, dtype=dtype) for matrix in stack.flatten(0, 1)]
    assert torch.equal(newton_schulz(stack, dtype=dtype).flatten(0, 1), torch.stack(one_by_one))

    given = G.to(dtype)                      # of its own dtype, so that no cast makes a copy
    kept = given.clone()
    newton_schulz(given, dtype=dtype)
    assert torch.equal(given, kept)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("m, n", [(512, 2048), (2048, 4096), (4096, 4096), (4096, 16384)])
def test_on_a_gpu_newton_schulz_is_no_worse_than_the_plain_form_in_bf16(m, n):
    for G in (torch.randn(m, n, device="cuda"), decaying(m, n, "cuda")):
        for table, steps in COEFFICIENTS.items():
            X = G.bfloat16()
            X = X / X.norm() / START_MARGIN[table]
            for a, b, c in steps:
                A = X @ X.T
                B = torch.addmm(A, A, A, beta=b, alpha=c)
                X = torch.addmm(X, B, X, beta=a)
            for O in (newton_schulz(G, coefficients=table), newton_schulz(G.T, coefficients=table)):
                assert O.dtype == torch.bfloat16 and defect(O) <= 1.01 * defect(X)


# ---- The update

@needs_gpu
def test_on_a_gpu_the_compiled_update_is_the_plain_one(monkeypatch):
    """Also of matrices that 1024 does not divide, of stacks, and where a step is skipped."""
    shapes = ((64, 96), (256, 256), (96, 64), (2, 32, 48), (5, 7), (512, 128))
    ours = normal(*shapes, device="cuda")
    theirs = copies(ours)
    # Newton-Schulz is left out, as it turns a rounding of u into another O.
    monkeypatch.setattr(muonclip, "newton_schulz", lambda u, **_: u)
    compiled = MuonClip(ours, [], lr=0.01, weight_decay=0.3)
    plain = MuonClip(theirs, [], lr=0.01, weight_decay=0.3)

    for step in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        skip = torch.tensor(step == 2, device="cuda")
        compiled.step(skip=skip)
        with monkeypatch.context() as context:
            context.setattr(kernels, "ENABLED", False)
            plain.step(skip=skip)

        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-3)       # u may round the other way
            torch.testing.assert_close(compiled.state[p]["momentum"], plain.state[q]["momentum"])
            torch.testing.assert_close(compiled.update_rms[p], plain.update_rms[q], rtol=1e-3,
                                       atol=0)


def test_twenty_steps_equal_torchs_muon(monkeypatch):
    """torch's momentum b = mu b + (1 - mu) g is (1 - mu) times ours, and so is its
    u = (1 - mu) g + mu b: Newton-Schulz does not see the factor. Both use ours, in fp32."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz",
                        lambda u, *_: newton_schulz(u, dtype=torch.float32))
    ours = normal(*SHAPES)
    theirs = copies(ours)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3}
    muon = MuonClip(ours, [], dtype=torch.float32, **options)
    torchs_muon = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    train(20, (ours, muon), (theirs, torchs_muon))
    for p, q in zip(ours, theirs):
        assert (p - q).norm() <= 1e-5 * q.norm()


def test_small_matrices_of_a_shape_give_the_same_together_as_alone(monkeypatch):
    """Batches of two, the last of one, against one matrix at a time; a step in which a matrix has
    no gradient, and one that is skipped."""
    together = normal((4, 6), (6, 4), (4, 6), (4, 6))
    alone = copies(together)
    batched = MuonClip(together, [], lr=0.02)
    single = MuonClip(alone, [], lr=0.02)
    for step in range(4):
        grads = normal((4, 6), (6, 4), (4, 6), (4, 6))
        for p, q, grad in zip(together, alone, grads):
            p.grad = grad.detach().clone()
            q.grad = grad.detach().clone()
        if step == 1:
            together[0].grad = alone[0].grad = None
        if step == 2:
            together[2].grad[0] = alone[2].grad[0] = torch.nan
        monkeypatch.setattr(muonclip, "MAX_BATCHED_NUMEL", 2 * 24)
        batched.step(skip=torch.tensor(step == 2))
        monkeypatch.setattr(muonclip, "MAX_BATCHED_NUMEL", 1)
        single.step(skip=torch.tensor(step == 2))
        for p, q in zip(together, alone):
            assert torch.equal(p, q)
            assert torch.equal(batched.state[p]["momentum"], single.state[q]["momentum"])
            if step != 2:
                torch.testing.assert_close(batched.update_rms[p], single.update_rms[q])


def test_the_rest_gets_torchs_adamw_exactly_and_vectors_no_decay():
    ours = normal((8, 6), (6,), ())
    theirs = copies(ours)
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0}]
    options = {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}
    train(5, (ours, MuonClip([], ours, **options)),
          (theirs, torch.optim.AdamW(groups, fused=True, **options)))
    assert all(map(torch.equal, ours, theirs))


def test_one_step_by_hand_of_a_stack_and_of_a_missing_gradient():
    stack, idle, vector = normal((2, 3, 5), (4, 4), (3,))
    W = stack.detach().clone()
    kept = idle.detach().clone()
    G = torch.randn(2, 3, 5)
    optimizer = MuonClip([stack, idle], [vector], lr=0.1, weight_decay=0.5)
    stack.grad = G
    optimizer.step()

    O = torch.stack([newton_schulz((1 + 0.95) * g).float() for g in G])
    update = 0.2 * 5**0.5 * O
    torch.testing.assert_close(stack.detach(), W * (1 - 0.1 * 0.5) - 0.1 * update)
    assert torch.equal(optimizer.state[stack]["momentum"], G)
    assert torch.equal(idle, kept)

    assert list(optimizer.update_rms) == [stack]
    rms = update.square().mean().sqrt().item()
    assert optimizer.update_rms[stack].item() == pytest.approx(rms, rel=0.01)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="fp32"):
        MuonClip([], [torch.zeros(2, dtype=torch.bfloat16)], lr=0.1)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_a_skipped_step_leaves_no_trace(optimizer):
    """Neither gradients and logits that are not finite nor good ones change anything."""
    model = Motif(MODEL)
    ours = configure_optimizer(model, lr=0.1, tau=1e-6, optimizer=optimizer)
    skip = torch.tensor(True)

    def snapshot():
        tensors = []
        for p in model.parameters():
            tensors += [p.data, *ours.state[p].values()]
        return [t.clone() for t in tensors]

    def step(grad, logit, skip):
        for p in model.parameters():
            p.grad = torch.full_like(p, grad)
        ours.step(max_logits=torch.full((2, 5), logit), skip=skip)

    for value in (torch.nan, torch.inf, 1.0):
        before = snapshot()
        step(value, value, skip)
        assert all(map(torch.equal, before, snapshot()))
        assert not ours.heads_clipped

        step(1.0, 1.0, ~skip)                                # the next one counts
        assert not any(map(torch.equal, before, snapshot()))
        if optimizer == "muonclip":
            assert ours.heads_clipped == 10


def test_the_saved_state_continues_bitwise(tmp_path):
    """The second step after a resume too: there a state that was read back as zeros shows."""
    def start(params):
        return MuonClip(params[:2], params[2:], lr=0.02, qk=[], weight_decay=0.3)

    straight = normal((6, 4), (4, 6), (5, 4), (4,), ())
    optimizer = start(straight)
    train(3, (straight, optimizer))
    saved = optimizer.state_dict()
    tensors = {f"{i}.{key}": t for i, state in saved["state"].items() for key, t in state.items()}
    save_file(tensors, tmp_path / "state.safetensors")

    state = {i: {} for i in saved["state"]}
    for name, t in load_file(tmp_path / "state.safetensors").items():
        i, key = name.split(".")
        state[int(i)][key] = t
    resumed = copies(straight)
    other = start(resumed)
    for group in other.param_groups:
        group["lr"] = 1.0                                    # the saved one comes back
    other.load_state_dict({"state": state, "param_groups": saved["param_groups"]})

    for _ in range(2):
        train(1, (straight, optimizer), (resumed, other))
        assert all(map(torch.equal, straight, resumed))


# ---- A whole model

def test_muon_gets_the_layers_matrices_and_adamw_all_else():
    model = Motif(MODEL)
    optimizer = configure_optimizer(model, lr=0.1, momentum=0.5)
    names = {p: name for name, p in model.named_parameters()}
    muon, decayed, undecayed = [[names[p] for p in group["params"]]
                                for group in optimizer.param_groups]
    assert muon == list(model.matrices()) and len(muon) == 14
    assert decayed == ["model.embed_tokens.weight", "lm_head.weight"]
    assert sorted(muon + decayed + undecayed) == sorted(names.values())
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert describe_routing(model, optimizer).splitlines() == [
        "muon, weight decay 0.1: 4,480 in 14 tensors: "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        "adamw, weight decay 0.1: 640 in 2 tensors: embed_tokens, lm_head",
        "adamw, weight decay 0.0: 136 in 19 tensors: input_layernorm, lambda_q1, lambda_k1, "
        "lambda_q2, lambda_k2, subln, post_attention_layernorm, act_fn, bias, norm"]


def test_scaled_parameters_learn_at_their_multiple_of_lr_and_a_matrix_of_muon_has_none():
    """With each weight decay, the group without a scale comes first."""
    model = Motif(MODEL)
    optimizer = configure_optimizer(model, lr=0.1, optimizer="adamw", embedding_lr_scale=4.0,
                                    poly_norm_lr_scale=0.5)
    lines = describe_routing(model, optimizer).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "adamw, weight decay 0.1", "adamw, weight decay 0.1, lr times 4.0",
        "adamw, weight decay 0.0", "adamw, weight decay 0.0, lr times 0.5"]
    assert lines[1].endswith(": embed_tokens, lm_head") and lines[3].endswith(": act_fn, bias")

    ours = normal((8, 6), (6,))
    theirs = copies(ours)
    slow = MuonClip([], ours, lr=0.02, lr_scales={ours[0]: 0.5})
    fast = MuonClip([], theirs, lr=0.01)
    train(3, (ours, slow), (theirs, fast))
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[1], theirs[1])
    with pytest.raises(ValueError, match="lr_scales"):
        MuonClip(ours[:1], ours[1:], lr=0.02, lr_scales={ours[0]: 0.5})


def test_adamw_to_compare_gets_everything_and_no_qk_clip():
    model = Motif(MODEL)
    optimizer = configure_optimizer(model, lr=0.1, optimizer="adamw")
    assert [group["kind"] for group in optimizer.param_groups] == ["adamw", "adamw"]
    params = sum([group["params"] for group in optimizer.param_groups], [])
    assert len(params) == len(list(model.parameters()))
    assert not optimizer.qk


def logits(layer, x, kv_map):
    """(H, B T T): each head's logits on the layer's recorded input x, -inf for masked pairs."""
    D = layer.head_dim
    T = x.shape[1]
    cos, sin = rotary_angles(torch.arange(T)[None], D, MODEL.rope_theta)

    def heads(projection):
        a, b = projection(x).unflatten(2, (-1, D)).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q = heads(layer.q_proj)
    k = heads(layer.k_proj)[:, :, kv_map]
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
    model = Motif(config).double()
    tau = 100.0
    layers = [block.self_attn for block in model.model.layers]
    seen = []
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
    assert optimizer.heads_clipped == (S > tau).sum()
    for i, layer in enumerate(layers):
        after = logits(layer, seen[i], kv_map)
        gamma = (tau / S[i]).clamp(max=1)
        assert (after.amax(1) <= tau * (1 + 1e-6)).all()
        torch.testing.assert_close(after, before[i] * gamma[:, None], rtol=1e-6, atol=1e-9)

        # A key takes the square root of what its strictest reader needs.
        for j in range(kv_heads):
            rows = slice(4 * j, 4 * j + 4)
            factor = min(gamma[h] for h in range(heads) if kv_map[h] == j) ** 0.5
            torch.testing.assert_close(layer.k_proj.weight[rows], factor * keys[i][rows])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_raises(bad):
    with pytest.raises(RuntimeError, match="an attention logit is not finite"):
        layer = (torch.ones(4, 3), torch.ones(4, 3))
        qk_clip([layer], torch.tensor([[1.0, bad]]), [0, 1], 2, 100.0)


def test_a_step_without_the_logits_that_qk_clip_needs_is_refused_and_changes_nothing():
    model = Motif(MODEL)
    optimizer = configure_optimizer(model, lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="max_logits"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), kept))

    without = configure_optimizer(model, lr=0.1, tau=0.0)
    without.step()
    assert without.heads_clipped is None
    assert not any(map(torch.equal, model.parameters(), kept))


def test_main_prints_the_routing_and_times_a_step(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_muon", "--hidden_size=16", "--intermediate_size=16"])
    bench_muon.main()
    printed = capsys.readouterr().out
    assert "muon, weight decay" in printed
    assert "  8 x 16 x 16 " in printed
    assert "  18,176 parameters " in printed
