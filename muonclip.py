"""MuonClip: Muon for the matrices, AdamW for the rest, QK-clip for the attention logits.

    M = mu M + G        u = G + mu M        O = NewtonSchulz(u)
    W = W - lr (0.2 sqrt(max(rows, columns)) O + wd W)

The factor gives Muon's update the RMS of AdamW's, so that both share one learning rate (Moonlight,
arXiv 2502.16982). QK-clip is Kimi K2's (arXiv 2507.20534), extended to heads that share a key.
`python muonclip.py config/motif2_12b.py` times the step on one layer's matrices.
"""
import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Five triples (a, b, c) of the polynomial a X + (b A + c A A) X, A = X X^T. The error is
# |O O^T - I|_F / sqrt(k) on a Gaussian 512 x 2048 matrix in bf16.
COEFFICIENTS = {
    "quintic": 5 * [(3.4445, -4.7750, 2.0315)],                     # Keller Jordan's; error 0.27
    "motif": [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
              (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)],   # Motif's; error 0.03
    "polar_express": [                                              # arXiv 2505.16932; error 0.19
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)],
}


def newton_schulz(G: Tensor, steps: int = 5, coefficients: str = "motif",
                  dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor of G, near U V^T of its singular value decomposition, by `steps` of

        A = X X^T        X = a X + (b A + c A A) X        X_0 = G / |G|_F

    G (..., m, n), each matrix by itself -> the same shape in `dtype`, to which G is cast first (it is
    what Parallel Muon's wire carries). Tall matrices are transposed, so that A is the small side.
    Scaled by its largest entry before the norm: 1e30 G and 1e-30 G give the same, and 0 gives 0.
    ValueError for an unknown table or too many steps."""
    if coefficients not in COEFFICIENTS or not 1 <= steps <= 5:
        raise ValueError(f"newton_schulz has 1 to 5 steps of {', '.join(COEFFICIENTS)}; "
                         f"not {steps} of {coefficients!r}")
    X = G.to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    tiny = torch.finfo(dtype).tiny
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    norm = torch.linalg.matrix_norm(X.float(), keepdim=True).clamp(min=1)  # an entry is 1, or all are 0
    X = X / (norm * (1.02 if coefficients == "polar_express" else 1)).to(dtype)
    for a, b, c in COEFFICIENTS[coefficients][:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


@torch.no_grad()
def qk_clip(q_weight: Tensor, k_weight: Tensor, max_logits: Tensor, kv_map, head_dim: int,
            tau: float) -> Tensor:
    """Scale the rows of q and k in place so that no head's logits exceed tau (Kimi K2, section 2.1).

        gamma_h = min(1, tau / S_h)      s_k = sqrt(min of gamma over the heads that read key head k)
        key k's rows *= s_k              head h's query rows *= gamma_h / s_kv_map[h]

    so that every head's logits are multiplied by exactly its own gamma, whoever shares its key.
    q_weight (H D, hidden), k_weight (K D, hidden), max_logits (H,): S, the largest logit of the step's
    own forward, kv_map (H,): the key head that each query head reads -> gamma (H,). Needs no host
    sync. A logit that is not finite raises RuntimeError (on a GPU at the next sync)."""
    torch._assert_async((max_logits < torch.inf).all(), "QK-clip: an attention logit is not finite")
    kv_map = torch.as_tensor(kv_map, device=max_logits.device)
    gamma = torch.where(max_logits > tau, tau / max_logits, 1)
    s = gamma.new_ones(k_weight.shape[0] // head_dim)
    s = s.scatter_reduce(0, kv_map, gamma, "amin").sqrt()
    q_weight.view(-1, head_dim, q_weight.shape[1]).mul_((gamma / s[kv_map])[:, None, None])
    k_weight.view(-1, head_dim, k_weight.shape[1]).mul_(s[:, None, None])
    return gamma


class MuonClip(torch.optim.Optimizer):
    """MuonClip(muon_params, adamw_params, lr=...): who gets which rule is said by the two lists and by
    nothing else. AdamW decays embeddings and head, and no vector or scalar.

    muon_params: matrices (m, n), or stacks (..., m, n) orthogonalised slice by slice.
    qk: [(q_weight, k_weight), ...] of the layers, with kv_map and head_dim as in qk_clip; step() then
    takes max_logits (layers, heads) and clips after the update; `clipped` counts the heads, as a
    tensor. dtype: in which Newton-Schulz runs. State is fp32 and made here. Muon keeps the sum form
    of the momentum, and its weight decay takes the learning rate unscaled. `update_rms` holds the RMS
    of each matrix's last update, over lr. ValueError for a vector among muon_params."""

    def __init__(self, muon_params, adamw_params, *, lr: float, momentum: float = 0.95,
                 nesterov: bool = True, weight_decay: float = 0.1, betas=(0.9, 0.95), eps: float = 1e-8,
                 steps: int = 5, coefficients: str = "motif", dtype: torch.dtype = torch.bfloat16,
                 qk=(), kv_map=None, head_dim: int | None = None, tau: float = 100.0):
        muon, rest = list(muon_params), list(adamw_params)
        if any(p.ndim < 2 for p in muon):
            raise ValueError("Muon orthogonalises matrices; give vectors and scalars to adamw_params")
        adam = dict(kind="adamw", betas=betas, eps=eps)
        groups = [
            dict(kind="muon", params=muon, momentum=momentum, nesterov=nesterov, steps=steps,
                 coefficients=coefficients, dtype=dtype, weight_decay=weight_decay),
            dict(adam, params=[p for p in rest if p.ndim > 1], weight_decay=weight_decay),
            dict(adam, params=[p for p in rest if p.ndim < 2], weight_decay=0.0)]
        super().__init__([g for g in groups if g["params"]], dict(lr=lr))
        self.qk, self.head_dim, self.tau = list(qk), head_dim, tau
        self.clipped: Tensor | None = None
        if self.qk:
            self.kv_map = torch.as_tensor(kv_map, device=self.qk[0][0].device)
        for group in self.param_groups:
            for p in group["params"]:
                def zeros():
                    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
                if group["kind"] == "muon":
                    self.state[p] = {"momentum": zeros()}
                else:
                    self.state[p] = {"step": torch.zeros((), device=p.device if p.is_cuda else "cpu"),
                                     "exp_avg": zeros(), "exp_avg_sq": zeros()}

    @torch.no_grad()
    def step(self, closure=None, *, max_logits: Tensor | None = None):
        """One update from the gradients; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["kind"] == "muon" else self._adamw)(group, params)
        if self.qk and max_logits is not None:
            gammas = [qk_clip(q, k, S, self.kv_map, self.head_dim, self.tau)
                      for (q, k), S in zip(self.qk, max_logits, strict=True)]
            self.clipped = (torch.stack(gammas) < 1).sum()
        return loss

    def _muon(self, group, params) -> None:
        mu, lr = group["momentum"], group["lr"]
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, grads)
        updates = torch._foreach_add(grads, buffers, alpha=mu) if group["nesterov"] else buffers
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for p, O in zip(params, self._orthogonalize(group, updates)):
            p.add_(O, alpha=-lr * update_scale(p))

    def _orthogonalize(self, group, updates):
        """Newton-Schulz of each update, in order. Whole matrices on one process; over many ranks this
        is where Parallel Muon deals them to their owners."""
        for u in updates:
            yield newton_schulz(u, group["steps"], group["coefficients"], group["dtype"])

    def _adamw(self, group, params) -> None:
        states = [self.state[p] for p in params]
        adamw(params, [p.grad for p in params], [s["exp_avg"] for s in states],
              [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
              fused=params[0].is_cuda, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
              lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)


def update_scale(p: Tensor) -> float:
    """0.2 sqrt(max(rows, columns)): an orthogonal matrix of that shape then has AdamW's usual RMS."""
    return 0.2 * max(p.shape[-2:]) ** 0.5
