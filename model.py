"""Motif-2, the model (arXiv 2511.07464): a decoder with two ideas of its own.

In outline a Motif is a Llama: RMSNorm, rotary positions, residual blocks, matrices without bias. A
block is

    x = x + attention(norm(x))
    x = x + mlp(norm(x))

It differs in two places. Its attention subtracts a second attention map, the noise, from the first
(grouped differential attention, below), and its MLP has a learnt polynomial, PolyNorm, where Llama
has SiLU. Both are defined here in plain PyTorch. kernels.py has faster forms of the same, which
replace most of the definitions on a GPU, and some on a CPU. kernels.ENABLED = False makes the
definitions run. Two things stay in kernels.py even then: the losses, in plain PyTorch, and the
products of matrices that are marked fp8.

The letters that this project uses for sizes, with their values in Motif-2-12.7B:

    B   rows of a batch
    T   tokens of a row                        4,096 at first, later 16,384
    S   keys given to attention                T, or when a text is continued all before it too
    V   vocabulary                             219,520
    D   head_dim                               128
    G   groups: r signal heads, 1 noise head   8
    r   signal heads in a group                4
    H   query heads, G (r + 1)                 40
    K   key heads                              16
    P   pairs of key heads, K / 2              8     a token has P values, one for each pair
    Dv  width of a value                       256   2D
    F   intermediate size of the MLP           16,384   (in code, F is torch.nn.functional)

Without noise heads (G = 0, plain grouped-query attention) P = K and Dv = D.

One row of 4,096 tokens on its way through the 12.7B model, whose residual stream is 4,096 wide:

    ids                                        (1, 4096)
    x = embed_tokens(ids)                      (1, 4096, 4096)
    q = rope(q_proj(norm(x)))                  (1, 4096, 40, 128)      B, T, H, D
    k = rope(k_proj(norm(x)))                  (1, 4096, 16, 128)      B, T, K, D
    v = v_proj(norm(x))                        (1, 4096, 8, 256)       B, T, P, 2D
    signal                                     (1, 4096, 8, 4, 256)    B, T, G, r, 2D
    noise                                      (1, 4096, 8, 1, 256)    B, T, G, 1, 2D
    y = norm(signal - lambda noise)            (1, 4096, 8192)         B, T, G r 2D
    x = x + o_proj(y)                          (1, 4096, 4096)
    gate, up = gate_proj(norm(x)), ...         (1, 4096, 16384)        B, T, F
    x = x + down_proj(polynorm(gate) * up)     (1, 4096, 4096)         ... and so on, 40 blocks
    logits = lm_head(norm(x))                  (1, 4096, 219520)       B, T, V

tests/reference.py is the same model in loops over single heads and tokens, in float64: read it
where a formula here seems too terse.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from configurator import NonNegative, UserError, check_value
from kernels import upcast, widest_float  # upcast to fp32; float64 stays float64
from support.generation import Decoder, KVCache, LayerCache
from support.released_config import read_released_config, released_config
from support.weights import check_finite, iter_checkpoint, model_folder, read_json, save_tensors

# ---- normalisation and positions


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in fp32."""
    y = F.rms_norm(upcast(x), x.shape[-1:], upcast(weight), eps)
    return y.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles position * theta^(-2i/D) of the points i = 0 .. D/2 - 1.

    positions (B, T) -> two tensors (B, T, 1, D/2) in fp32, which fit any number of heads.
    """
    two_i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = theta ** (-two_i / head_dim)                             # (D/2,)
    angle = positions[:, :, None, None].float() * frequency              # (B, T, 1, D/2)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: x (B, T, heads, D), angles of its positions -> the shape of x.

    Each head's D features are D/2 points in a plane, and point i turns by angle i. Positions then
    enter the product of a turned query and a turned key only through their distance. Feature i is
    paired with feature i + D/2 (not with i + 1). With D = 2 there is one point, which turns by one
    radian per position:

    >>> cos, sin = rotary_angles(torch.tensor([[1]]), head_dim=2, theta=10_000.0)
    >>> rope(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), cos, sin).flatten()
    tensor([0.5403, 0.8415])
    """
    a, b = upcast(x).chunk(2, dim=-1)                                    # (B, T, heads, D/2)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    return torch.cat([turned_a, turned_b], dim=-1).to(x.dtype)


# ---- PolyNorm: a polynomial as activation (PolyCom, arXiv 2411.03884)
#
# SiLU bends its input once, in a fixed way. PolyNorm is a cubic polynomial whose coefficients each
# layer learns, so that a neuron can form squares and cubes of its input, that is, products of up to
# three features. A bare cube is useless in a deep network: an activation of 30 becomes 27,000. So
# each power is divided by its own root mean square over the F features of the token:
#
#     y = w3 n(x^3) + w2 n(x^2) + w1 n(x) + b        n(z) = z / rms(z) = z / sqrt(mean(z^2) + eps)
#
# It costs four scalars a layer, stored as weight = (w3, w2, w1) and bias = b, and three means over
# the features. Fused, as in kernels.py, it moves no more memory than SiLU.
#
# Does it pay? With 115M parameters, if w3, w2 and w1 begin at 1/3, as in its paper, it was worse
# than SwiGLU by 0.049 nats per token, +- 0.002. Begun at 1/48, the default here ([ours]: no paper
# says so), it was as good (README, "Does it help"); training then makes w1 the largest weight in
# nearly every layer, and hardly uses the cube.
#
# The gradient. With r_p = 1 / rms(x^p) for the powers p = 1, 2, 3, the derivative d r_p / d x_j is
# -r_p^3 p x_j^(2p-1) / F. So, with g = dL/dy,
#
#     dL/dx_j = sum over p of  w_p p r_p x_j^(p-1) (g_j - r_p^2 x_j^p mean(g x^p))
#
# kernels.py computes it in this closed form.


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """x (..., F), weight (3,), bias (1,) -> (..., F), computed in fp32.

    The powers of x = (1, -2, 0.5, -0.25) have root mean squares 4.03 (cube), 2.07 and 1.15, so its
    first feature becomes 0.4 / 4.03 + 0.3 / 2.07 + 0.3 / 1.15 + 0.05 = 0.555. (Training calls
    kernels.poly_norm_mul instead, on a CPU too, unless kernels.ENABLED is False.)

    >>> x = torch.tensor([1.0, -2.0, 0.5, -0.25])
    >>> poly_norm(x, torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0.05]))
    tensor([ 0.5548, -0.6834,  0.2289, -0.0076])
    """
    x32 = upcast(x)
    cubic, square, linear = upcast(weight)

    y = cubic * divide_by_rms(x32**3, eps)
    y = y + square * divide_by_rms(x32**2, eps)
    y = y + linear * divide_by_rms(x32, eps)
    return (y + upcast(bias)).to(x.dtype)


def divide_by_rms(z: Tensor, eps: float) -> Tensor:
    mean_square = z.square().mean(-1, keepdim=True)
    return z / (mean_square + eps).sqrt()


# ---- attention: which tokens a query may see


def document_starts(doc_ids: Tensor) -> Tensor:
    """Where each token's document begins: (B, T) -> (B, T) int32.

    Short documents are packed into one row, end to end; every run of equal ids is a document. A
    token sees its own document alone, and its position counts from the document's first token:

    >>> doc_ids = torch.tensor([[5, 5, 7, 7, 7]])
    >>> doc_start = document_starts(doc_ids)
    >>> doc_start.tolist()
    [[0, 0, 2, 2, 2]]
    >>> (torch.arange(5) - doc_start).tolist()                  # positions
    [[0, 1, 0, 1, 2]]
    """
    column = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    differs = doc_ids[:, 1:] != doc_ids[:, :-1]                          # from the token before
    begins = F.pad(differs, (1, 0), value=True)                          # (B, T)
    latest = (column * begins).cummax(dim=1).values
    return latest.int()


def visibility_mask(T: int, S: int, doc_start: Tensor | None, query_slots: Tensor | None,
                    like: Tensor) -> Tensor:
    """The mask to add to the logits: 0 where a query may see a key, -inf elsewhere. Its shape is
    (T, S), or (B, 1, 1, T, S) if rows differ; its dtype and device are those of `like`.

    A *slot* is an index into the S keys. Query t of row b sees the slots from doc_start[b, t] up to
    query_slots[b, t], where its own key is. Without doc_start it sees them from slot 0 on. Without
    query_slots the T queries have the last T slots, in order."""
    key = torch.arange(S, device=like.device)
    last = key[S - T:] if query_slots is None else query_slots
    masked = key > last[..., None]
    if doc_start is not None:
        masked = masked | (key < doc_start[..., None])
    if masked.ndim == 3:                        # (B, T, S): rows differ
        masked = masked[:, None, None]
    zeros = torch.zeros_like(masked, dtype=like.dtype)
    return zeros.masked_fill_(masked, -torch.inf)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None,
                      query_slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt D, causal) v, where q has N h heads: h of them share each of the N key
    heads. In plain attention N = K and h = H / K. Grouped differential attention, below, calls this
    twice: with its P signal keys, each for h = G r / P heads, and with its P noise keys, h = G / P.

    q (B, T, N, h, D)
    k (B, S, N, D)
    v (B, S, N, Dv)
    doc_start (B, T)        int32, see document_starts; for S = T only
    query_slots (B, T)      the slot of the query's own key, where a KV cache holds the keys

    -> out (B, T, N, h, Dv), and the largest visible logit of each query head (N, h). QK-clip needs
    it (muonclip.py): it shrinks the queries and keys of a head whose logits grow too large.
    The softmax is in fp32. Both products, and so the logits, are in the dtype of q; kernels.py
    keeps logits in fp32."""
    # The callers have tried our fused kernel before they call this. What is left is PyTorch's
    # FlexAttention, and plain PyTorch, which follows.
    if kernels.attention_form(q, k, v, query_slots) == "flex":
        return kernels.flex_softmax_attention(q, k, v, doc_start, query_slots)
    B, T, N, h, D = q.shape
    S = k.shape[1]

    # The h query heads of a key head become rows of one matrix product.
    q = (q * D**-0.5).permute(0, 2, 3, 1, 4)                            # (B, N, h, T, D)
    q = q.flatten(2, 3)                                                 # (B, N, hT, D)
    logits = upcast(q @ k.permute(0, 2, 3, 1))                          # (B, N, hT, S)
    logits = logits.unflatten(2, (h, T))                                # (B, N, h, T, S)
    mask = visibility_mask(T, S, doc_start, query_slots, like=logits)
    logits = logits.add_(mask)
    max_logits = logits.detach().amax(dim=(0, 3, 4))                    # (N, h)

    weights = logits.softmax(-1).to(v.dtype).flatten(2, 3)              # (B, N, hT, S)
    out = weights @ v.transpose(1, 2)                                   # (B, N, hT, Dv)
    out = out.unflatten(2, (h, T)).permute(0, 3, 1, 2, 4)               # (B, T, N, h, Dv)
    return out, max_logits


# ---- grouped differential attention (arXiv 2510.06949), the idea of Motif-2's attention
#
# Softmax cannot say "nowhere": every visible token gets some weight, and in a long context the
# many small weights on irrelevant tokens add up to noise. The Differential Transformer (2410.05258)
# removes it as a noise-cancelling headphone does. Two maps read the same values, and the second,
# times a learnt lambda, is subtracted from the first. What both spread on irrelevant tokens
# cancels; what the first alone attends to stays. Say that one token of three matters:
#
#     signal map  (0.50, 0.25, 0.25)
#     noise map   (0.00, 0.50, 0.50)       lambda = 0.5:  signal - lambda noise = (0.50, 0, 0)
#
# In the Differential Transformer every head has a noise map of its own, so half of the query heads
# carry noise, which is much the same for all of them. Here r signal heads form a group with one
# noise head (section 3 of 2510.06949; r = 4 in the 12.7B model), and for signal head c of a group,
# one of r,
#
#     out_c  = (softmax(q_c k1^T / sqrt D) - lambda softmax(q_noise k2^T / sqrt D)) v
#     y_c    = (1 - lambda_init) weight * out_c / rms(out_c)            each head by itself
#     lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init
#
# where lambda_init is a fixed number, by the layer, and the four vectors are learnt. Keys come in
# pairs, k1 for signal and k2 for noise. A pair's two value heads of D lie side by side, and both
# maps read them as one value, Dv = 2D wide. One group, g = 0 .. 7 in 12.7B, where P = G:
#
#     query heads     5g      5g+1    5g+2    5g+3         5g+4
#                     signal  signal  signal  signal       noise
#                        \       \      /       /             |
#     key heads            2g (the pair's signal key)      2g+1 (its noise key)
#                                   |                         |
#     maps               4 of softmax(q k1^T)              1 of softmax(q k2^T)
#                                    \                      /
#     values               heads 2g and 2g+1, side by side: 2D = 256 wide
#                                   |                         |
#     out                4 signal heads of 256  - lambda  1 noise head of 256
#
# Where there are fewer pairs than groups, G / P neighbouring groups share one. MotifConfig.kv_map
# lists who reads which key. Two special cases: r = 1 is the Differential Transformer, and
# num_noise_heads = 0 switches to plain grouped-query attention, to compare with.
#
# Does it pay? With 115M parameters it was better than grouped-query attention of as many parameters
# by 0.107 nats per token, +- 0.002, and a step took 1.05 times as long. Its wide values and the
# norm of its heads were not tried alone. How many signal heads share a noise head mattered little
# (README, "Does it help").
#
# Beside grouped-query attention with the same 32 signal heads it costs 8 more query heads and, for
# values of 256 numbers, an o_proj twice as wide: 71.3M parameters in a layer's attention and not
# 50.3M. The KV cache is the same.


def signal_and_noise_attention(
        q: Tensor, k: Tensor, v: Tensor, num_noise_heads: int, doc_start: Tensor | None = None,
        query_slots: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of the formula: softmax times values for both maps, not yet subtracted.

    q (B, T, H, D)          group after group: r signal heads, then the noise head
    k (B, S, 2P, D)         pair after pair: signal key, noise key
    v (B, S, P, 2D)
    doc_start, query_slots  as in softmax_attention

    -> signal (B, T, G, r, 2D), noise (B, T, G, 1, 2D), the largest visible logit of each query
    head (H,).

    >>> q, k, v = torch.randn(1, 6, 10, 4), torch.randn(1, 6, 4, 4), torch.randn(1, 6, 2, 8)
    >>> signal, noise, max_logits = signal_and_noise_attention(q, k, v, num_noise_heads=2)
    >>> signal.shape, noise.shape
    (torch.Size([1, 6, 2, 4, 8]), torch.Size([1, 6, 2, 1, 8]))
    """
    if kernels.attention_form(q, k, v, query_slots) == "fused":
        return kernels.fused_attention(q, k, v, doc_start, num_noise_heads)
    B, T, H, D = q.shape
    G = num_noise_heads
    P = k.shape[2] // 2
    r = H // G - 1

    q = q.unflatten(2, (G, r + 1))                                       # (B, T, G, r + 1, D)
    k = k.unflatten(2, (P, 2))                                           # (B, S, P, 2, D)
    q_signal, q_noise = q.split([r, 1], dim=3)                           # (B, T, G, r or 1, D)
    k_signal, k_noise = k.unbind(dim=3)                                  # (B, S, P, D)

    # The G / P groups of a pair stand next to each other, so that cutting the heads, group after
    # group, into P equal parts puts all h that read one key head together: (B, T, P, h, D).
    q_signal = q_signal.reshape(B, T, P, -1, D)
    q_noise = q_noise.reshape(B, T, P, -1, D)
    signal, signal_max = softmax_attention(q_signal, k_signal, v, doc_start, query_slots)
    noise, noise_max = softmax_attention(q_noise, k_noise, v, doc_start, query_slots)

    # The order of the heads is still group after group: (P, h) becomes (G, r) and (G, 1).
    signal = signal.reshape(B, T, G, r, 2 * D)
    noise = noise.reshape(B, T, G, 1, 2 * D)
    signal_max = signal_max.view(G, r)
    noise_max = noise_max.view(G, 1)
    max_logits = torch.cat([signal_max, noise_max], dim=1)               # (G, r + 1)
    return signal, noise, max_logits.flatten()


def differential_norm(signal: Tensor, noise: Tensor, lambda_: Tensor, weight: Tensor,
                      scale: Tensor | float, eps: float) -> Tensor:
    """The second half: scale * weight * RMSNorm(signal - lambda noise), each head by itself, in
    fp32. scale is 1 - lambda_init.

    signal (B, T, G, r, 2D), noise (B, T, G, 1, 2D), lambda_ a scalar, weight (2D,), the same for
    all heads -> (B, T, G r 2D), what o_proj reads. The norm gives every head the same scale:
    without it, a head whose maps nearly cancel would contribute next to nothing."""
    weight = upcast(weight) * scale
    if kernels.can_fuse_differential_norm(signal):
        y = kernels.fused_differential_norm(signal, noise, lambda_, weight, eps)
        return y.flatten(2)
    difference = upcast(signal) - lambda_ * upcast(noise)
    y = F.rms_norm(difference, difference.shape[-1:], weight, eps)
    return y.to(signal.dtype).flatten(2)


def lambda_init(layer: Tensor) -> Tensor:
    """The value around which a layer's lambda starts, in float64: 0.8 - 0.6 exp(-0.3 (layer - 1)).

    The paper counts layers from 1, and its first value is 0.2. The released code passes a layer
    number that counts from 0 into the same formula. So the first layer's is -0.0099: on average it
    starts with almost no subtraction. We keep that, because the checkpoints were trained with it.

    >>> [round(lambda_init(torch.tensor(layer)).item(), 4) for layer in (0, 1, 2, 39)]
    [-0.0099, 0.2, 0.3555, 0.8]
    """
    exponent = -0.3 * (layer - 1).to(widest_float(layer.device))
    return 0.8 - 0.6 * exponent.exp()


def causal_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None,
                     query_slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain grouped-query attention, to compare with. Arguments as in softmax_attention."""
    if kernels.attention_form(q, k, v, query_slots) == "fused":
        heads = q.flatten(2, 3)                                          # (B, T, H, D)
        out, _, max_logits = kernels.fused_attention(heads, k, v, doc_start, num_noise_heads=0)
        return out, max_logits.view(q.shape[2:4])                        # (K, h)
    return softmax_attention(q, k, v, doc_start, query_slots)


# ---- the shape of a model

# An int from 1 to 2^24, which configurator.py checks. Beyond that a position is not exact in fp32.
Dim = Annotated[int, 1, 2**24]


@dataclass
class MotifConfig:
    """The shape of a model. Fields are named as in the released config.json."""
    vocab_size: Dim = 272             # rows of the embedding; at least the tokenizer's
    hidden_size: Dim = 256            # width of the residual stream
    intermediate_size: Dim = 768      # width of the MLP
    num_hidden_layers: Annotated[int, 1, 1000] = 4    # blocks
    num_attention_heads: Dim = 10     # query heads, signal and noise together
    num_key_value_heads: Dim = 4      # key heads; with noise heads they come in pairs
    num_noise_heads: Annotated[int, 0, 2**24] = 2       # 0: grouped-query attention, to compare
    head_dim: Annotated[int, 2, 2**24] = 32     # per query and key head; with noise heads values
                                                # are twice as wide
    activation: Literal["poly_norm", "swiglu"] = "poly_norm"  # of the MLP's gate; swiglu to compare
    rms_norm_eps: Annotated[float, 1e-30] = 1e-6  # block and final norms, and PolyNorm
    attn_rms_norm_eps: Annotated[float, 1e-30] = 1e-5  # per-head norm
    rope_theta: Annotated[float, 1] = 10_000.0    # base of the rotary wavelengths
    max_position_embeddings: Dim = 4096       # longest sequence
    tie_word_embeddings: bool = False         # the head is the embedding
    poly_norm_scale: NonNegative = 1 / 16     # [ours] each of PolyNorm's three weights begins at a
                                              # third of it

    @property
    def value_shape(self) -> tuple[int, int]:
        """How many values a token has, and their width Dv: P of 2D, a pair's two heads side by
        side; without noise heads K of D."""
        if self.num_noise_heads == 0:
            return self.num_key_value_heads, self.head_dim
        return self.num_key_value_heads // 2, 2 * self.head_dim

    @property
    def kv_map(self) -> list[int]:
        """The key head that each query head reads.

        >>> heads = {"num_attention_heads": 40, "num_key_value_heads": 16, "num_noise_heads": 8}
        >>> MotifConfig(**heads).kv_map[:10]     # two groups: four signal heads, one noise head
        [0, 0, 0, 0, 1, 2, 2, 2, 2, 3]
        """
        H, K, G = self.num_attention_heads, self.num_key_value_heads, self.num_noise_heads
        if G == 0:
            return [head // (H // K) for head in range(H)]
        heads_per_group = H // G
        groups_per_pair = G // (K // 2)
        keys = []
        for head in range(H):
            group, place = divmod(head, heads_per_group)
            pair = group // groups_per_pair
            is_noise = place == heads_per_group - 1
            keys.append(2 * pair + is_noise)
        return keys

    def check(self) -> None:
        """UserError for a value that does not fit its type, for heads that do not divide and for
        sizes that no computer has room for."""
        for field in fields(MotifConfig):
            check_value(field.name, field.type, getattr(self, field.name))

        H, K, G = self.num_attention_heads, self.num_key_value_heads, self.num_noise_heads
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        if G == 0 and H % K:
            raise UserError(f"num_attention_heads={H} must be a multiple of "
                            f"num_key_value_heads={K}")
        if G and (H % G or H == G):
            raise UserError(f"num_attention_heads={H} must be num_noise_heads={G} groups of at "
                            "least one signal head and one noise head")
        if G and (K % 2 or G % (K // 2)):
            raise UserError(f"num_key_value_heads={K} must be pairs that divide "
                            f"num_noise_heads={G}")
        forward, _ = flops_per_token(self, seq_len=1)        # two for each parameter
        if forward > 2**41:
            raise UserError("hidden_size, intermediate_size, vocab_size and num_hidden_layers "
                            "make about 2^40 parameters or more; is one of them mistyped?")

    @classmethod
    def from_dict(cls, config: dict) -> "MotifConfig":
        """From a released config.json; UserError if it describes another kind of model."""
        shape = cls(**read_released_config(config))
        shape.check()
        return shape

    def to_dict(self) -> dict:
        """The released config.json."""
        return released_config({f.name: getattr(self, f.name) for f in fields(MotifConfig)})


# ---- the transformer. Modules and parameters are named as in the released checkpoints, so that a
# state dict of ours is a state dict of theirs.

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class Linear(nn.Linear):
    """x W^T. pretrain.py sets fp8 on the matrices that it multiplies in 8 bits."""
    fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8:
            return kernels.linear_fp8(x, self.weight)
        return super().forward(x)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class PolyNormGate(nn.Module):
    """poly_norm(gate) * up: the activation, and the product after it, which one kernel computes."""

    def __init__(self, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))     # cubic, square, linear
        self.bias = nn.Parameter(torch.empty(1))
        self.eps = eps

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if kernels.ENABLED:
            return kernels.poly_norm_mul(gate, up, self.weight, self.bias, self.eps)
        return poly_norm(gate, self.weight, self.bias, self.eps) * up


class Attention(nn.Module):
    """Grouped differential attention, or with num_noise_heads = 0 plain grouped-query attention.

    lambda is one scalar a layer, exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) +
    lambda_init, with four learnt vectors of D (2410.05258, section 2.1). With the initial weights
    the two exponentials are near 1, and their difference is random with a standard deviation of
    0.16 at D = 128, so that lambda starts around lambda_init and can move both ways. The factor
    1 - lambda_init is from the same section: a row of the difference map sums to 1 - lambda, and
    the norm removes that scale. The factor restores what the scale is on average when training
    begins, so that gradients are as large as in a plain transformer."""

    def __init__(self, config: MotifConfig, layer: int):
        super().__init__()
        c = config
        self.noise_heads = c.num_noise_heads
        self.kv_heads = c.num_key_value_heads
        self.head_dim = c.head_dim
        self.value_shape = c.value_shape

        # The layer's number, which lambda_init needs, is
        #   - a tensor, because torch.compile would make a graph for each Python int;
        #   - of integers, because model.bfloat16() rounds floats;
        #   - on the CPU until .to(device), because from_pretrained builds the model on the meta
        #     device, where nothing has a value, and no file stores this one.
        self.register_buffer("layer", torch.tensor(layer, device="cpu"), persistent=False)

        kv_width = c.num_key_value_heads * c.head_dim
        o_width = (c.num_attention_heads - c.num_noise_heads) * c.value_shape[1]
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = Linear(c.hidden_size, kv_width, bias=False)
        self.v_proj = Linear(c.hidden_size, kv_width, bias=False)
        self.o_proj = Linear(o_width, c.hidden_size, bias=False)
        if self.noise_heads:
            for name in LAMBDAS:
                self.register_parameter(name, nn.Parameter(torch.empty(c.head_dim)))
            # Only its weight and eps are used: differential_norm has the norm itself.
            self.subln = RMSNorm(2 * c.head_dim, c.attn_rms_norm_eps)

    def initial_lambda(self) -> Tensor:
        return lambda_init(self.layer)

    def lambda_(self) -> Tensor:
        first = upcast(self.lambda_q1) * upcast(self.lambda_k1)
        second = upcast(self.lambda_q2) * upcast(self.lambda_k2)
        difference = first.sum().exp() - second.sum().exp()
        return difference + self.initial_lambda().to(difference.dtype)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], doc_start: Tensor | None = None,
                cache: LayerCache | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, hidden) -> the same, and the largest visible logit of each query head (H,)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                 # (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)      # (B, T, K, D)
        v = self.v_proj(x).view(B, T, *self.value_shape)                 # (B, T, P, Dv)
        q = rope(q, *angles)
        k = rope(k, *angles)

        query_slots = None
        if cache is not None:
            # All keys and values that are visible: T becomes S. query_slots stays None if the
            # cache was empty, as attention is then as without one.
            k, v, query_slots = cache.append(k, v)

        if self.noise_heads == 0:
            q = q.unflatten(2, (self.kv_heads, -1))                      # (B, T, K, h, D)
            out, max_logits = causal_attention(q, k, v, doc_start, query_slots)
            out = out.flatten(2)                                         # (B, T, H D)
            return self.o_proj(out), max_logits.flatten()

        signal, noise, max_logits = signal_and_noise_attention(
            q, k, v, self.noise_heads, doc_start, query_slots)
        scale = 1 - self.initial_lambda()
        out = differential_norm(signal, noise, self.lambda_(), self.subln.weight, scale,
                                self.subln.eps)                          # (B, T, G r 2D)
        return self.o_proj(out), max_logits


class MLP(nn.Module):
    """down(PolyNorm(gate(x)) * up(x)), or to compare SwiGLU: down(SiLU(gate(x)) * up(x))."""

    def __init__(self, config: MotifConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = config.activation
        self.act_fn = None
        if self.activation == "poly_norm":
            self.act_fn = PolyNormGate(config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        if self.activation == "poly_norm":
            return self.down_proj(self.act_fn(gate, up))
        if self.activation == "swiglu":
            return self.down_proj(F.silu(gate) * up)
        raise ValueError(f"MLP.forward has no activation {self.activation!r}")


class Block(nn.Module):
    def __init__(self, config: MotifConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], doc_start: Tensor | None = None,
                cache: LayerCache | None = None) -> tuple[Tensor, Tensor]:
        normed = self.input_layernorm(x)
        out, max_logits = self.self_attn(normed, angles, doc_start, cache)
        x = x + out
        normed = self.post_attention_layernorm(x)
        x = x + self.mlp(normed)
        return x, max_logits


def generation_step(block: Block, x: Tensor, angles: tuple[Tensor, Tensor],
                    cache: LayerCache) -> Tensor:
    """Block.forward of one new token in each row, x (B, 1, hidden). The largest logits, which only
    training needs, are dropped, so torch.compile leaves them out: they took a sixth of the time of
    a small model's step with 32 rows. (Block.forward and not block(...), as pretrain.py's build()
    may have set block.forward to a compiled version.)"""
    x, _ = Block.forward(block, x, angles, cache=cache)
    return x


@functools.cache
def compiled_generation_step() -> Callable:
    """The block is an argument of the graph, so that all layers share it. One graph fits any number
    of rows from two on; a batch of one row gets its own."""
    return torch.compile(generation_step, dynamic=True)


class Motif(nn.Module):
    """Motif(config): the model with fresh weights, drawn from torch's global generator.

    max_logits      (layers, H): largest attention logits of the last forward pass, for QK-clip;
                    None before the first one. Compiled steps of generation do not set it
    compute_dtype   dtype of the activations where FSDP2 casts the weights, which a KV cache must
                    know (pretrain.py sets it); None: the weights' own
    compile_steps   whether torch.compile runs the blocks when one token of each row is generated
    """

    def __init__(self, config: MotifConfig):
        super().__init__()
        config.check()
        self.config = config
        self.max_logits = None
        self.compute_dtype = None
        self.compile_steps = False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights. The standard deviation 0.02 is our choice, as arXiv 2511.07464 gives
        none. The layer numbers are set again because to_empty() leaves them uninitialised."""
        for i, block in enumerate(self.model.layers):
            block.self_attn.layer.fill_(i)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                init_normal_(module.weight, 0.02)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, PolyNormGate):
                module.weight.fill_(self.config.poly_norm_scale / 3)
                module.bias.zero_()
            elif isinstance(module, Attention) and module.noise_heads:
                for name in LAMBDAS:
                    init_normal_(getattr(module, name), 0.1)

    @property
    def head_weight(self) -> Tensor:
        """What turns the stream into logits (V, hidden)."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def matrices(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of the seven matrices of each layer: what Muon trains."""
        found = {}
        for name, p in self.named_parameters():
            if name.startswith("model.layers.") and name.endswith("_proj.weight"):
                found[name] = p
        return found

    def forward(self, ids: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None, *,
                reduction: str = "mean", scale: float = 1.0, cache: KVCache | None = None,
                row_lengths: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Logits (B, T, V), or with targets the loss, an fp32 scalar.

        ids (B, T)           token ids
        targets (B, T)       the token that follows each of them; negative: no loss there
        doc_ids (B, T)       packed documents, see document_starts
        reduction, scale     the loss is scale times the "mean" or "sum" over the targets, in nats
        cache                continue the rows of this KVCache, and add ids to them
        row_lengths (B,)     right-padded rows: only the first row_lengths[b] ids of row b are there
        last_only            without targets: logits of each row's last token alone, (B, 1, V);
                             those of a row of no tokens mean nothing
        """
        x = self.hidden_states(ids, doc_ids, cache, row_lengths)
        if targets is not None:
            # Like F.cross_entropy(F.linear(x, head), targets), without all logits at one time; but
            # every negative target is ignored, and no targets give 0.
            x = x.flatten(0, 1)                                          # (B T, hidden)
            return kernels.linear_cross_entropy(x, self.head_weight, targets.flatten(),
                                                reduction, scale)
        if last_only and row_lengths is None:
            x = x[:, -1:]
        elif last_only:
            rows = torch.arange(len(x), device=x.device)
            x = x[rows, row_lengths - 1][:, None]                        # (B, 1, hidden)
        return F.linear(x, self.head_weight)

    @torch.no_grad()
    def token_losses(self, ids: Tensor, targets: Tensor, doc_ids: Tensor | None = None, *,
                     cache: KVCache | None = None, row_lengths: Tensor | None = None) -> Tensor:
        """The cross entropy of each target in nats, (B, T) in fp32: 0 where target < 0."""
        x = self.hidden_states(ids, doc_ids, cache, row_lengths)
        x = x.flatten(0, 1)                                              # (B T, hidden)
        losses = kernels.token_losses(x, self.head_weight, targets.flatten())
        return losses.view(targets.shape)

    def hidden_states(self, ids: Tensor, doc_ids: Tensor | None, cache: KVCache | None,
                      row_lengths: Tensor | None) -> Tensor:
        """All blocks and the final norm: ids (B, T) -> (B, T, hidden). Sets max_logits, except in a
        compiled step of generation."""
        c = self.config
        T = ids.shape[1]
        if ids.numel() == 0 or (cache is None and T > c.max_position_embeddings):
            raise UserError(f"ids have the shape {tuple(ids.shape)}; there must be tokens, and at "
                            f"most max_position_embeddings={c.max_position_embeddings} in a row")
        if cache is not None and doc_ids is not None:
            raise ValueError("each row of a cache is one document: give no doc_ids")

        positions = torch.arange(T, device=ids.device)[None]             # (1, T)
        doc_start = None
        layer_caches = [None] * c.num_hidden_layers
        if doc_ids is not None:
            doc_start = document_starts(doc_ids)
            positions = positions - doc_start                            # (B, T)
        if cache is not None:
            positions = positions + cache.lengths[:, None]               # (B, T)
            layer_caches = cache.layers_for_pass(positions, row_lengths)

        angles = rotary_angles(positions, c.head_dim, c.rope_theta)
        x = self.model.embed_tokens(ids)
        if self.compile_steps and cache is not None and T == 1:
            for block, layer_cache in zip(self.model.layers, layer_caches):
                x = compiled_generation_step()(block, x, angles, layer_cache)
        else:
            max_logits = []
            for block, layer_cache in zip(self.model.layers, layer_caches):
                x, block_max = block(x, angles, doc_start, layer_cache)
                max_logits.append(block_max)
            self.max_logits = torch.stack(max_logits)

        if cache is not None:
            cache.lengths += T if row_lengths is None else row_lengths
        return self.model.norm(x)

    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | None = None) -> Tensor:
        """Continue ids (B, T) by max_new_tokens -> (B, T + max_new_tokens); see Decoder."""
        decoder = Decoder(self, ids, max_new_tokens, temperature, top_k, seed)
        columns = [ids]
        for _ in range(max_new_tokens):
            columns.append(decoder.next_tokens())
        return torch.cat(columns, dim=1)

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None) -> "Motif":
        """The model in a folder of the released layout, or in a Hub repository "owner/name".

        Each tensor keeps its stored dtype unless one is given, and is read straight to the device.
        On a CPU it stays in the memory-mapped file until somebody writes to it."""
        path = model_folder(path)
        device = torch.device("cpu" if device is None else device)
        with torch.device("meta"):
            model = cls(MotifConfig.from_dict(read_json(path / "config.json")))
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        tensors = {}
        for name, read in iter_checkpoint(path, "model", shapes, device):
            stored = read()
            check_finite(path, name, stored)
            tensors[name] = stored.to(dtype)
            if dtype == torch.float16 and not tensors[name].isfinite().all():
                raise UserError(f"{path}: {name} has numbers above 65,504, which float16 cannot "
                                "hold; give dtype=torch.bfloat16")
        model.load_state_dict(tensors, assign=True)
        return model.to(device).requires_grad_()

    def save_pretrained(self, path, file_bytes: int = 5 * 10**9) -> None:
        """Write the released layout, in the model's own dtypes. A model that was there stays until
        all files are written.

        All ranks of FSDP2 call it: the files are dealt out to them, and the folder is whole once
        all have returned. A model that is not sharded is written by each process that calls it."""
        dtype = str(self.head_weight.dtype).removeprefix("torch.")
        config = self.config.to_dict() | {"torch_dtype": dtype}
        save_tensors(Path(path), "model", self.state_dict(), file_bytes, {"config.json": config})


def init_normal_(p: Tensor, std: float) -> None:
    """Fill p from Normal(0, std). What FSDP2 shards is drawn whole and then cut, so that the
    weights do not depend on the number of ranks. On the meta device there is nothing to fill, and
    torch would take a while to find that out."""
    if p.is_meta:
        return
    if hasattr(p, "placements"):
        from torch.distributed.tensor import distribute_tensor
        whole = torch.empty(p.shape, dtype=p.dtype, device=p.device).normal_(0, std)
        p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
    else:
        p.normal_(0, std)


def flops_per_token(config: MotifConfig, seq_len: int) -> tuple[int, int]:
    """(forward, backward) FLOPs per token of a sequence of seq_len tokens.

    Forward: two for each weight of each matrix, and for each query head and visible key 2D for the
    logit and 2 Dv for the value. Backward: twice that, as each product has two gradients; nothing
    is recomputed. Masked keys are not counted."""
    c = config
    value_dim = c.value_shape[1]
    qkv_width = c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads)
    o_width = value_dim * (c.num_attention_heads - c.num_noise_heads)
    weights = c.hidden_size * (qkv_width + o_width + 3 * c.intermediate_size)
    visible_keys = (seq_len + 1) / 2
    attention = c.num_attention_heads * visible_keys * 2 * (c.head_dim + value_dim)
    layer = 2 * weights + attention
    head = 2 * c.hidden_size * c.vocab_size
    forward = int(c.num_hidden_layers * layer + head)
    return forward, 2 * forward
