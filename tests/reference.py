"""Motif-2 in float64 from its equations, a slow oracle. T tokens, H hidden, F FFN, V vocabulary,
D head_dim, G noise heads (one a group), r signal heads a group, P pairs of KV heads."""

import math

import numpy as np


def poly_norm(x, weight, bias, eps=1e-6):
    """w0 n(x^3) + w1 n(x^2) + w2 n(x) + b, with n(z) = z / sqrt(mean(z^2) + eps), last axis."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)  # (..., F), (3,)
    total = np.full(x.shape, np.asarray(bias, np.float64).item())  # (..., F)
    for w, z in zip(weight, (x**3, x**2, x), strict=True):  # z (..., F)
        total += w * z / np.sqrt((z * z).mean(-1, keepdims=True) + eps)
    return total


def cross_entropy(logits, targets):
    """Mean of log(sum_v exp(l_v)) - l_target, in nats, over targets != -1; nan if none."""
    rows = np.asarray(logits, np.float64).reshape(-1, np.shape(logits)[-1])  # (N, V)
    kept = [p for p in zip(rows, np.ravel(targets), strict=True) if p[1] != -1]
    nats = [z.max() + math.log(np.exp(z - z.max()).sum()) - z[y] for z, y in kept]
    return sum(nats) / len(nats) if nats else math.nan


def _rms(x, weight, eps):
    """One vector: x_i w_i / sqrt(mean(x^2) + eps)."""
    return x * weight / math.sqrt(sum(x * x) / len(x) + eps)


def _rotate(x, t, theta):
    """RoPE, half form: (x_i, x_{i+D/2}) is a complex number, turned by t theta^(-2i/D) radians."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * t * theta ** (-np.arange(half) / half))  # (D/2,)
    return np.concatenate([z.real, z.imag])  # (D,)


def _attention(x, w, i, config):
    """x (T, H), already normed -> (T, H), and the largest causal logit of each query head.

    a_h(t, s) = softmax over s <= t of q_h(t).k(s) / sqrt(D)
    u_gc(t)   = sum_s (a_gc(t, s) - lambda a_gr(t, s)) [v_2p(s), v_2p+1(s)],  p the group's pair
    y_gc(t)   = rmsnorm(u_gc(t)) (1 - lambda_init), c < r;  out(t) = Wo [y_00, y_01, ...]
    lambda    = exp(lq1.lk1) - exp(lq2.lk2) + lambda_init;  lambda_init = 0.8 - 0.6 exp(-0.3 (i-1))
    """
    heads, T = config["num_attention_heads"], len(x)
    D = config.get("head_dim") or config["hidden_size"] // heads
    G = config.get("num_noise_heads") or heads // 2
    P, r = config["num_key_value_heads"] // 2, heads // G - 1
    assert heads == G * (r + 1) and r >= 1 and G % P == 0 and D % 2 == 0
    wq, wk, wv, wo = (w(f"self_attn.{n}_proj.weight") for n in "qkvo")
    assert len(wq) == heads * D and len(wk) == len(wv) == 2 * P * D and wo.shape[1] == G * r * 2 * D
    plain = lambda m, h, t: m[h * D : (h + 1) * D] @ x[t]  # noqa: E731  head h at token t: (D,)
    turned = lambda m, h, t: _rotate(plain(m, h, t), t, config["rope_theta"])  # noqa: E731
    q = [[turned(wq, h, t) for t in range(T)] for h in range(heads)]  # G(r+1) heads of (T, D)
    k = [[turned(wk, h, t) for t in range(T)] for h in range(2 * P)]  # even: signal, odd: noise
    v = [[plain(wv, h, t) for t in range(T)] for h in range(2 * P)]
    lq1, lk1, lq2, lk2 = (w(f"self_attn.lambda_{n}") for n in ("q1", "k1", "q2", "k2"))  # (D,)
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (i - 1))
    lam = math.exp(lq1 @ lk1) - math.exp(lq2 @ lk2) + lambda_init
    norm_weight, norm_eps = w("self_attn.subln.weight"), config.get("attn_rms_norm_eps", 1e-5)
    largest, out = np.full(heads, -np.inf), []
    for t in range(T):
        features = []  # G * r vectors of 2D, by group, then by signal head
        for g in range(G):
            pair, rows = g // (G // P), []  # rows: r + 1 distributions over s <= t
            for c in range(r + 1):  # the group's signal heads, then its noise head (c == r)
                h, key = g * (r + 1) + c, k[2 * pair + (c == r)]
                logits = np.array([q[h][t] @ key[s] / D**0.5 for s in range(t + 1)])  # (t+1,)
                largest[h] = max(largest[h], logits.max())
                rows.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
            for c in range(r):
                u = np.zeros(2 * D)
                for s in range(t + 1):  # the values of the pair's two heads, side by side: (2D,)
                    u += (rows[c][s] - lam * rows[r][s]) * np.r_[v[2 * pair][s], v[2 * pair + 1][s]]
                features.append(_rms(u, norm_weight, norm_eps) * (1 - lambda_init))
        out.append(wo @ np.concatenate(features))  # (G r 2D,) -> (H,)
    return np.stack(out), largest


def _forward(tensors, config, ids):
    """x = E[id]; per layer x += attn(norm x), x += mlp(norm x); logits = head . norm(x)."""
    assert config.get("hidden_act", "poly_norm") == "poly_norm" and not config.get("use_bias")
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    embedding, eps = tensors["model.embed_tokens.weight"], config.get("rms_norm_eps", 1e-6)
    head = embedding if config.get("tie_word_embeddings") else tensors["lm_head.weight"]  # (V, H)
    layers, logits = config["num_hidden_layers"], []
    largest = np.full((layers, config["num_attention_heads"]), -np.inf)
    for sequence in np.asarray(ids):
        x = embedding[sequence]  # (T, H)
        for i in range(layers):
            w = lambda name, i=i: tensors[f"model.layers.{i}.{name}"]  # noqa: E731
            normed = [_rms(row, w("input_layernorm.weight"), eps) for row in x]  # (T, H)
            attended, peak = _attention(normed, w, i, config)  # (T, H), (heads,)
            x, largest[i] = x + attended, np.maximum(largest[i], peak)
            gate, up, down = (w(f"mlp.{n}_proj.weight") for n in ("gate", "up", "down"))
            for t in range(len(x)):
                y = _rms(x[t], w("post_attention_layernorm.weight"), eps)  # (H,)
                act = poly_norm(gate @ y, w("mlp.act_fn.weight"), w("mlp.act_fn.bias"))  # (F,)
                x[t] += down @ (act * (up @ y))  # (H,)
        logits.append([head @ _rms(row, tensors["model.norm.weight"], eps) for row in x])  # (T, V)
    return np.array(logits), largest


def motif_logits(tensors: dict[str, np.ndarray], config: dict, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of a released-layout checkpoint; ids (B, T); positions count from 0."""
    return _forward(tensors, config, ids)[0]


def max_logits(tensors: dict[str, np.ndarray], config: dict, ids: np.ndarray) -> np.ndarray:
    """(layers, query heads): max over batch and s <= t of q_h(t).k(s) / sqrt(D), stored order."""
    return _forward(tensors, config, ids)[1]
