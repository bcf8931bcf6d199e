"""Motif-2 from its equations, in float64: one sequence, one token and one head at a time.

This is the oracle that the tests compare model.py with, and the plainest account of the model in
this project. It has no batches, no masks and no caches: a token cannot see later tokens because a
loop stops before them. It is far too slow to use.

The letters are those of model.py: T tokens, V vocabulary, D head_dim, H query heads, G groups of r
signal heads and one noise head, P pairs of key heads, F intermediate size. Tensors have the names
and shapes of a released checkpoint, and config is its config.json.
"""
import math

import numpy as np


def motif_logits(tensors: dict, config: dict, ids) -> np.ndarray:
    """Logits of ids (B, T), whose positions count from 0: (B, T, V)."""
    return np.array([forward(tensors, config, sequence)[0] for sequence in np.asarray(ids)])


def max_logits(tensors: dict, config: dict, ids) -> np.ndarray:
    """The largest q . k / sqrt(D) that a token of ids (B, T) sees: (layers, H)."""
    return np.max([forward(tensors, config, sequence)[1] for sequence in np.asarray(ids)], axis=0)


# ---- the model

def forward(tensors: dict, config: dict, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids (T,) -> logits (T, V), largest attention logits (layers, H)."""
    assert config.get("hidden_act", "poly_norm") == "poly_norm" and not config.get("use_bias")
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    eps = config.get("rms_norm_eps", 1e-6)
    embedding = tensors["model.embed_tokens.weight"]                     # (V, hidden)
    head = embedding if config.get("tie_word_embeddings") else tensors["lm_head.weight"]

    x = embedding[ids]                                                   # (T, hidden)
    largest = []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                   if name.startswith(prefix)}

        normed = rms_norm(x, weights["input_layernorm.weight"], eps)
        out, largest_of_layer = attention(normed, weights, layer, config)
        x = x + out
        largest.append(largest_of_layer)

        normed = rms_norm(x, weights["post_attention_layernorm.weight"], eps)
        x = x + mlp(normed, weights)

    logits = rms_norm(x, tensors["model.norm.weight"], eps) @ head.T
    return logits, np.array(largest)


def mlp(x: np.ndarray, weights: dict) -> np.ndarray:
    """down(polynorm(gate(x)) * up(x)): (T, hidden) -> (T, hidden)."""
    gate = x @ weights["mlp.gate_proj.weight"].T                         # (T, F)
    up = x @ weights["mlp.up_proj.weight"].T
    activation = poly_norm(gate, weights["mlp.act_fn.weight"], weights["mlp.act_fn.bias"])
    return (activation * up) @ weights["mlp.down_proj.weight"].T


def attention(x: np.ndarray, weights: dict, layer: int,
              config: dict) -> tuple[np.ndarray, np.ndarray]:
    """Grouped differential attention: x (T, hidden), already normed -> (T, hidden), largest (H,).

    Signal head c of group g, at token t, with the values of its pair side by side:
        out = sum over s <= t of (signal_map(s) - lambda noise_map(s)) v(s)           (2D,)
        y   = rms_norm(out) (1 - lambda_init)
    """
    H = config["num_attention_heads"]
    D = config.get("head_dim") or config["hidden_size"] // H
    G = config.get("num_noise_heads") or H // 2
    P = config["num_key_value_heads"] // 2
    r = H // G - 1

    q = split_heads(x @ weights["self_attn.q_proj.weight"].T, D)         # H heads of (T, D)
    k = split_heads(x @ weights["self_attn.k_proj.weight"].T, D)         # 2P heads of (T, D)
    v = split_heads(x @ weights["self_attn.v_proj.weight"].T, 2 * D)     # P heads of (T, 2D)
    assert len(q) == H == G * (r + 1) and len(k) == 2 * P and len(v) == P
    q = [rope(head, config["rope_theta"]) for head in q]
    k = [rope(head, config["rope_theta"]) for head in k]

    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))               # layer counts from 0
    first = math.exp(weights["self_attn.lambda_q1"] @ weights["self_attn.lambda_k1"])
    second = math.exp(weights["self_attn.lambda_q2"] @ weights["self_attn.lambda_k2"])
    lambda_ = first - second + lambda_init
    norm_weight = weights["self_attn.subln.weight"]
    norm_eps = config.get("attn_rms_norm_eps", 1e-5)

    largest = np.full(H, -np.inf)
    rows = []
    for t in range(len(x)):
        heads = []                                     # G r vectors of 2D: group after group
        for g in range(G):
            pair = g // (G // P)
            k_signal, k_noise = k[2 * pair], k[2 * pair + 1]
            noise_head = g * (r + 1) + r               # the last head of its group
            noise_logits = k_noise[:t + 1] @ q[noise_head][t] / math.sqrt(D)          # (t + 1,)
            largest[noise_head] = max(largest[noise_head], noise_logits.max())

            for signal_head in range(g * (r + 1), noise_head):
                logits = k_signal[:t + 1] @ q[signal_head][t] / math.sqrt(D)          # (t + 1,)
                largest[signal_head] = max(largest[signal_head], logits.max())

                difference = softmax(logits) - lambda_ * softmax(noise_logits)
                out = difference @ v[pair][:t + 1]                                    # (2D,)
                heads.append(rms_norm(out, norm_weight, norm_eps) * (1 - lambda_init))
        rows.append(np.concatenate(heads))                                            # (G r 2D,)
    return np.stack(rows) @ weights["self_attn.o_proj.weight"].T, largest


# ---- its parts

def split_heads(x: np.ndarray, width: int) -> list[np.ndarray]:
    """(T, heads width) -> a list of (T, width)."""
    return np.split(x, x.shape[1] // width, axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    return weight * x / np.sqrt(mean_square + eps)


def rope(x: np.ndarray, theta: float) -> np.ndarray:
    """Turn the complex numbers x_i + 1j x_{i + D/2} of token t by t theta^(-2i/D): x (T, D)."""
    half = x.shape[1] // 2
    z = x[:, :half] + 1j * x[:, half:]                                   # (T, D/2)
    t = np.arange(len(x))[:, None]
    frequency = theta ** (-np.arange(half) / half)
    z = z * np.exp(1j * t * frequency)
    return np.concatenate([z.real, z.imag], axis=1)


def poly_norm(x, weight, bias, eps: float = 1e-6) -> np.ndarray:
    """w0 n(x^3) + w1 n(x^2) + w2 n(x) + b, n(z) = z / sqrt(mean(z^2) + eps), over the last axis."""
    x = np.asarray(x, np.float64)
    cubic, square, linear = np.asarray(weight, np.float64)
    no_weight = np.ones(x.shape[-1])
    y = cubic * rms_norm(x**3, no_weight, eps)
    y = y + square * rms_norm(x**2, no_weight, eps)
    y = y + linear * rms_norm(x, no_weight, eps)
    return y + np.asarray(bias, np.float64).item()


def cross_entropy(logits, targets) -> float:
    """The mean of -log softmax(logits)[target], in nats, over the targets that are not -1."""
    logits = np.asarray(logits, np.float64)
    logits = logits.reshape(-1, logits.shape[-1])                        # (B T, V)
    nats = []
    for row, target in zip(logits, np.ravel(targets), strict=True):
        if target != -1:
            nats.append(-math.log(softmax(row)[target]))
    return sum(nats) / len(nats)
