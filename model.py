"""Motif-2: a decoder with grouped differential attention and PolyNorm (arXiv 2511.07464).

    block:      x = x + attention(norm(x))        x = x + mlp(norm(x))
    attention:  subtract a noise softmax from each signal softmax, normalise per head
    mlp:        down( polynorm(gate(x)) * up(x) )

Module and parameter names are those of the released checkpoints, so that a state dict is one.
`python model.py config/motif2_12b.py` prints parameters, FLOPs and memory without allocating any.
"""
import copy
import functools
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from configurator import UserError
from kernels import upcast

ACTIVATIONS = {"poly_norm": "poly_norm", "swiglu": "silu"}  # ours -> hidden_act of config.json
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
INDEX = ".safetensors.index.json"                           # which file holds which tensor
FLOATS = ("F64", "F32", "F16", "BF16")                      # of weights, as safetensors names them
CODE = "Motif-Technologies/Motif-2-12.7B-Base"              # of the Hub: transformers' modules
PREFILL_TOKENS = 2**14                                      # of prompts, in one forward pass


@dataclass
class MotifConfig:
    """The shape of a model, in the names of the released config.json."""
    vocab_size: Annotated[int, 1] = 272           # rows of the embedding; at least the tokenizer's
    hidden_size: Annotated[int, 1] = 256          # width of the residual stream
    intermediate_size: Annotated[int, 1] = 768    # width of the MLP
    num_hidden_layers: Annotated[int, 1] = 4      # blocks
    num_attention_heads: Annotated[int, 1] = 10   # query heads, signal and noise together
    num_key_value_heads: Annotated[int, 1] = 4    # key heads; with noise heads they come in pairs
    num_noise_heads: Annotated[int, 0] = 2        # 0: plain grouped-query attention, to compare
    head_dim: Annotated[int, 2] = 32              # per query and key head; values are twice as wide
    activation: Literal["poly_norm", "swiglu"] = "poly_norm"  # of the MLP's gate; swiglu to compare
    rms_norm_eps: Annotated[float, 0] = 1e-6         # block and final norms, and PolyNorm
    attn_rms_norm_eps: Annotated[float, 0] = 1e-5    # per-head norm
    rope_theta: Annotated[float, 1] = 10_000.0       # base of the rotary wavelengths
    max_position_embeddings: Annotated[int, 1] = 4096  # longest sequence
    tie_word_embeddings: bool = False                # the head is the embedding

    def check(self) -> None:
        """ValueError if a size is below the least that its type states, or the heads do not divide
        into groups and pairs (arXiv 2510.06949, section 3)."""
        H, K, G = self.num_attention_heads, self.num_key_value_heads, self.num_noise_heads
        for f in fields(MotifConfig):
            least, n = getattr(f.type, "__metadata__", (None,))[0], getattr(self, f.name)
            if least is not None and not (isinstance(n, (int, float)) and n >= least):
                raise UserError(f"{f.name} must be at least {least}, not {n!r}")
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

    @property
    def kv_map(self) -> list[int]:
        """Key head that each query head reads. In a group of r signal heads and one noise head the
        signal heads read the first key of their pair, the noise head the second."""
        H, K, G = self.num_attention_heads, self.num_key_value_heads, self.num_noise_heads
        if G == 0:
            return [h // (H // K) for h in range(H)]
        size = H // G                                # r + 1
        pair = [(h // size) // (2 * G // K) for h in range(H)]
        return [2 * pair[h] + (h % size == size - 1) for h in range(H)]

    @classmethod
    def from_dict(cls, config: dict) -> "MotifConfig":
        """From a released config.json; unknown keys are ignored. Motif-2.6B states no
        num_noise_heads: half of its heads are noise. ValueError for a missing key or a part that we
        do not have."""
        config = dict(config)
        for key, value in (("use_bias", False), ("k_ratio", 1), ("use_sliding_window", False),
                           ("rope_scaling", None), ("rope_parameters", None)):
            if config.get(key) not in (value, None):
                raise UserError(f"config.json has {key}={config[key]}; only {value} is supported")
        act = config.get("hidden_act", "poly_norm")
        names = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
        if act not in names:
            raise UserError(f"config.json has hidden_act={act!r}; known: {', '.join(names)}")
        config["activation"] = names[act]
        shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads")
        missing = [key for key in shape if key not in config]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        heads = config["num_attention_heads"]
        if config.get("num_noise_heads") is None:
            config["num_noise_heads"] = heads // 2
        if config.get("head_dim") is None:
            config["head_dim"] = config["hidden_size"] // heads
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def to_dict(self) -> dict:
        """The released config.json. auto_map: where transformers and vLLM find the model's code."""
        shape = {f.name: getattr(self, f.name) for f in fields(MotifConfig)}
        act = ACTIVATIONS[shape.pop("activation")]
        return {"architectures": ["MotifForCausalLM"], "model_type": "motif", **shape,
                "hidden_act": act, "k_ratio": 1, "use_bias": False,
                "auto_map": {"AutoConfig": f"{CODE}--configuration_motif.MotifConfig",
                             "AutoModelForCausalLM": f"{CODE}--modeling_motif.MotifForCausalLM"}}


# ---- definitions

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension: (..., n), (n,) -> (..., n).
    No +1 on the weight; fp32 inside."""
    return F.rms_norm(upcast(x), x.shape[-1:], upcast(weight), eps).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-rotation form: feature i turns with feature i + D/2 by one angle.
    x (B, T, heads, D), cos and sin (B or 1, T, 1, D/2) in fp32 -> x's shape; fp32 inside."""
    a, b = upcast(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """w0 n(x^3) + w1 n(x^2) + w2 n(x) + b, n(z) = z / sqrt(mean(z^2) + eps); fp32 inside."""
    x32 = upcast(x)
    powers = [z / (z.square().mean(-1, keepdim=True) + eps).sqrt() for z in (x32**3, x32**2, x32)]
    return (sum(w * z for w, z in zip(upcast(weight), powers)) + upcast(bias)).to(x.dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None,
                    query_slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See causal_attention. Softmax in fp32; both products, the logits among them, in q's dtype."""
    B, T, K, h, D = q.shape
    S = k.shape[1]

    # query t sees keys first[t] .. last[t]
    key = torch.arange(S, device=q.device)
    last = key[S - T:] if query_slots is None else query_slots           # (T,) or (B, T)
    masked = key > last[..., None]                                       # (T, S) or (B, T, S)
    if doc_start is not None:
        masked = masked | (key < doc_start[..., None])                   # (B, T, S)
    if masked.ndim == 3:
        masked = masked[:, None, None]                                   # for all K and h

    q = (q * D**-0.5).permute(0, 2, 3, 1, 4).flatten(2, 3)               # (B, K, hT, D)
    logits = upcast(q @ k.permute(0, 2, 3, 1)).unflatten(2, (h, T))      # (B, K, h, T, S)
    mask = torch.zeros_like(masked, dtype=logits.dtype).masked_fill_(masked, -torch.inf)
    logits = logits.add_(mask)
    max_logits = logits.detach().amax(dim=(0, 3, 4))                     # (K, h)

    p = logits.softmax(-1).to(v.dtype).flatten(2, 3)                     # (B, K, hT, S)
    out = (p @ v.transpose(1, 2)).unflatten(2, (h, T))                   # (B, K, h, T, Dv)
    return out.permute(0, 3, 1, 2, 4), max_logits


def causal_attention(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None = None,
                     query_slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt D, causal) v, every key head serving h query heads.

    q (B, T, K, h, D), k (B, S, K, D), v (B, S, K, Dv) -> out (B, T, K, h, Dv), largest visible
    logit (K, h). The queries are the last T of the S positions, unless query_slots (B, T) says
    which key is each query's own. doc_start (B, T) int32, for S = T: where each token's document
    begins, a run of tokens that sees itself alone."""
    if query_slots is None and kernels.can_fuse_attention(q, k, v):
        out, _, max_logits = kernels.fused_attention(q.flatten(2, 3), k, v, doc_start, 0)
        return out, max_logits.view(q.shape[2:4])
    return plain_attention(q, k, v, doc_start, query_slots)


def grouped_differential_attention(
        q: Tensor, k: Tensor, v: Tensor, num_noise_heads: int, doc_start: Tensor | None = None,
        query_slots: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The two softmaxes of grouped differential attention (arXiv 2510.06949), before lambda.

    G noise heads, r signal heads for each, P pairs of key heads (P divides G):
    q (B, T, G(r+1), D), each group its r signal heads and then its noise head; k (B, S, 2P, D), key
    heads (signal, noise) by pair; v (B, S, P, 2D), the value heads of a pair side by side.
        signal = softmax(q1 k1^T / sqrt D) v    noise = softmax(q2 k2^T / sqrt D) v
    doc_start, query_slots: see causal_attention.
    -> signal (B, T, G, r, 2D), noise (B, T, G, 1, 2D), largest logit per query head (G(r+1),)."""
    if query_slots is None and kernels.can_fuse_attention(q, k, v):
        return kernels.fused_attention(q, k, v, doc_start, num_noise_heads)
    B, T, H, D = q.shape
    G, P = num_noise_heads, k.shape[2] // 2
    r = H // G - 1

    q_signal, q_noise = q.unflatten(2, (G, r + 1)).split([r, 1], dim=3)  # (B, T, G, r or 1, D)
    k_signal, k_noise = k.unflatten(2, (P, 2)).unbind(dim=3)             # (B, S, P, D)
    q_signal = q_signal.reshape(B, T, P, -1, D)                          # the heads of each pair
    q_noise = q_noise.reshape(B, T, P, -1, D)

    signal, signal_max = plain_attention(q_signal, k_signal, v, doc_start, query_slots)
    noise, noise_max = plain_attention(q_noise, k_noise, v, doc_start, query_slots)

    signal = signal.reshape(B, T, G, r, 2 * D)
    noise = noise.reshape(B, T, G, 1, 2 * D)
    max_logits = torch.cat([signal_max.view(G, r), noise_max.view(G, 1)], dim=1)
    return signal, noise, max_logits.flatten()


def differential_norm(signal: Tensor, noise: Tensor, lambda_: Tensor, weight: Tensor,
                      scale: Tensor | float, eps: float) -> Tensor:
    """RMSNorm(signal - lambda noise) * scale, each head by itself: signal (B, T, G, r, 2D), noise
    (B, T, G, 1, 2D), lambda_ a scalar, weight (2D,) -> (B, T, G r 2D); fp32 inside."""
    weight = upcast(weight) * scale
    if kernels.can_fuse_differential_norm(signal):
        return kernels.fused_differential_norm(signal, noise, lambda_, weight, eps).flatten(2)
    u = upcast(signal) - lambda_ * upcast(noise)
    y = F.rms_norm(u, u.shape[-1:], weight, eps)
    return y.to(signal.dtype).flatten(2)


# ---- the transformer

class Linear(nn.Linear):
    """x W^T, or with fp8 set, as pretrain.py does, kernels.linear_fp8."""
    fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear_fp8(x, self.weight) if self.fp8 else super().forward(x)


class RMSNorm(nn.Module):
    """See rms_norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/D): positions (B, T) -> two of (B, T, 1, D/2), fp32."""
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, :, None, None].float() * theta ** (-i / head_dim)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Grouped differential attention (arXiv 2510.06949), layer i counted from 0:

        lambda_init = 0.8 - 0.6 exp(-0.3 (i - 1))
        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init     fp32
        out = Wo RMSNorm_2D(softmax(q1 k1^T) v - lambda softmax(q2 k2^T) v) (1 - lambda_init)

    num_noise_heads = 0 is plain grouped-query attention: no lambda, no norm, values of D."""

    def __init__(self, config: MotifConfig, layer: int):
        super().__init__()
        c, D = config, config.head_dim
        self.noise_heads, self.eps = c.num_noise_heads, c.attn_rms_norm_eps
        self.kv_heads, self.head_dim = c.num_key_value_heads, D
        self.values = (self.kv_heads // 2, 2 * D) if c.num_noise_heads else (self.kv_heads, D)
        # a tensor, since torch.compile would make a graph for each layer's number; of an integer,
        # which no .to(dtype) rounds; on the CPU until .to(device), also where weights are on meta
        self.register_buffer("layer", torch.tensor(layer, device="cpu"), persistent=False)
        signal_heads = c.num_attention_heads - c.num_noise_heads
        width = signal_heads * (2 * D if c.num_noise_heads else D)
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * D, bias=False)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * D, bias=False)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * D, bias=False)
        self.o_proj = Linear(width, c.hidden_size, bias=False)
        if c.num_noise_heads:
            for name in LAMBDAS:
                self.register_parameter(name, nn.Parameter(torch.empty(D)))
            self.subln = RMSNorm(2 * D, c.attn_rms_norm_eps)

    def lambda_init(self) -> Tensor:
        """A scalar in float64."""
        return 0.8 - 0.6 * (-0.3 * (self.layer - 1).double()).exp()

    def lambda_(self) -> Tensor:
        """The layer's one lambda, a scalar in fp32."""
        first = (upcast(self.lambda_q1) * upcast(self.lambda_k1)).sum().exp()
        second = (upcast(self.lambda_q2) * upcast(self.lambda_k2)).sum().exp()
        return first - second + self.lambda_init().to(first.dtype)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], doc_start: Tensor | None = None,
                cache: "LayerCache | None" = None) -> tuple[Tensor, Tensor]:
        """x (B, T, hidden) -> the same, largest visible logit of each query head (H,)."""
        B, T, _ = x.shape
        q = rope(self.q_proj(x).view(B, T, -1, self.head_dim), *angles)
        k = rope(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim), *angles)
        v = self.v_proj(x).view(B, T, *self.values)
        query_slots = None
        if cache is not None:
            k, v, query_slots = cache.append(k, v)
        if self.noise_heads == 0:
            q = q.unflatten(2, (self.kv_heads, -1))                      # (B, T, K, H / K, D)
            out, max_logits = causal_attention(q, k, v, doc_start, query_slots)
            return self.o_proj(out.flatten(2)), max_logits.flatten()
        signal, noise, max_logits = grouped_differential_attention(
            q, k, v, self.noise_heads, doc_start, query_slots)
        out = differential_norm(signal, noise, self.lambda_(), self.subln.weight,
                                1 - self.lambda_init(), self.eps)
        return self.o_proj(out), max_logits


class PolyNorm(nn.Module):
    """The scalars of kernels.poly_norm_mul: weights (cubic, square, linear) and one bias."""

    def __init__(self, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(1))
        self.eps = eps

    def forward(self, x: Tensor, up: Tensor) -> Tensor:
        return kernels.poly_norm_mul(x, up, self.weight, self.bias, self.eps)


class MLP(nn.Module):
    """down( act(gate(x)) * up(x) ), act = PolyNorm (arXiv 2411.03884) or, to compare, SiLU."""

    def __init__(self, config: MotifConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = PolyNorm(config.rms_norm_eps) if config.activation == "poly_norm" else None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up if self.act_fn is None else self.act_fn(gate, up))


class Block(nn.Module):
    def __init__(self, config: MotifConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], doc_start: Tensor | None = None,
                cache: "LayerCache | None" = None) -> tuple[Tensor, Tensor]:
        """See Attention.forward."""
        out, max_logits = self.self_attn(self.input_layernorm(x), angles, doc_start, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), max_logits


@functools.cache
def compiled_block():
    """Block.forward by torch.compile: one graph for all layers and any number of rows and keys."""
    return torch.compile(Block.forward, dynamic=True)


class Motif(nn.Module):
    """Motif(config): a model of that shape with fresh weights, drawn from torch's global generator.
    ValueError if the shape is impossible.

    max_logits (layers, query heads): largest attention logits of the last forward, for QK-clip.
    compute_dtype: of the activations, where FSDP2 casts the weights; None: that of the weights.
    compile_steps: whether blocks that read one token of each row do so by torch.compile."""

    def __init__(self, config: MotifConfig):
        super().__init__()
        config.check()
        self.config, self.compute_dtype, self.compile_steps = config, None, False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02) for matrices and embeddings [ours: unpublished], lambda vectors Normal(0,
        0.1), norms 1, PolyNorm (1/3, 1/3, 1/3) and bias 0. Also what to_empty() took: the number of
        each layer."""
        for i, block in enumerate(self.model.layers):
            block.self_attn.layer.fill_(i)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                init_normal_(module.weight, 0.02)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, PolyNorm):
                module.weight.fill_(1 / 3)
                module.bias.zero_()
            elif isinstance(module, Attention) and module.noise_heads:
                for name in LAMBDAS:
                    init_normal_(getattr(module, name), 0.1)

    @property
    def head_weight(self) -> Tensor:
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def matrices(self) -> dict[str, nn.Parameter]:
        """name -> the seven matrices of each layer: what Muon trains; AdamW takes the rest."""
        found = {}
        for i, block in enumerate(self.model.layers):
            for part, names in ("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")):
                for name in names:
                    weight = getattr(getattr(block, part), f"{name}_proj").weight
                    found[f"model.layers.{i}.{part}.{name}_proj.weight"] = weight
        return found

    def forward(self, ids: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None, *,
                reduction: str = "mean", scale: float = 1.0, cache: "KVCache | None" = None,
                row_lengths: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Logits, or with targets their cross entropy.

        ids (B, T)           token ids
        targets (B, T)       the token that follows each; negative: no loss there
        doc_ids (B, T)       documents packed into a row: each run of equal numbers sees itself alone
                             and counts its positions from 0
        reduction, scale     of the loss: scale times the "mean" or the "sum" over the targets, nats
        cache                a KVCache: ids continue its rows and are added to them
        row_lengths (B,)     rows are right-padded: only the first so many ids of each are tokens
        last_only            logits of each row's last token alone

        -> logits (B, T, V), with last_only (B, 1, V); or the loss, an fp32 scalar."""
        x = self.hidden_states(ids, doc_ids, cache, row_lengths)
        if targets is not None:
            return kernels.linear_cross_entropy(x.flatten(0, 1), self.head_weight,
                                                targets.flatten(), reduction, scale)
        if last_only and row_lengths is None:
            x = x[:, -1:]
        elif last_only:
            rows = torch.arange(len(ids), device=ids.device)
            x = x[rows, row_lengths - 1][:, None]
        return F.linear(x, self.head_weight)

    @torch.no_grad()
    def token_losses(self, ids: Tensor, targets: Tensor, doc_ids: Tensor | None = None, *,
                     cache: "KVCache | None" = None, row_lengths: Tensor | None = None) -> Tensor:
        """Cross entropy of each target in nats, (B, T) in fp32, 0 where target < 0; no gradient.
        Arguments as in forward."""
        x = self.hidden_states(ids, doc_ids, cache, row_lengths)
        losses = kernels.token_losses(x.flatten(0, 1), self.head_weight, targets.flatten())
        return losses.view(targets.shape)

    def hidden_states(self, ids: Tensor, doc_ids: Tensor | None, cache: "KVCache | None",
                      row_lengths: Tensor | None) -> Tensor:
        """The stream after the final norm: (B, T) ids -> (B, T, hidden). Sets max_logits."""
        c = self.config
        T = ids.shape[1]
        if ids.numel() == 0 or (cache is None and T > c.max_position_embeddings):
            raise UserError(f"ids of shape {tuple(ids.shape)}: there must be tokens, and at most "
                            f"max_position_embeddings={c.max_position_embeddings}")
        if cache is not None and doc_ids is not None:
            raise ValueError("a cache holds one document in each row: give no doc_ids")

        positions = torch.arange(T, device=ids.device)[None]             # (1, T)
        doc_start = None
        if doc_ids is not None:
            doc_start = document_starts(doc_ids)
            positions = positions - doc_start                            # (B, T)
        layers = [None] * c.num_hidden_layers
        if cache is not None:
            positions = cache.lengths[:, None] + positions               # (B, T)
            layers = cache.open(positions, row_lengths)

        # Block.forward is compiled unbound, so that all layers share one graph.
        single_token = cache is not None and T == 1
        run_block = compiled_block() if self.compile_steps and single_token else Block.__call__
        angles = rotary_angles(positions, c.head_dim, c.rope_theta)
        x = self.model.embed_tokens(ids)
        max_logits = []
        for block, layer_cache in zip(self.model.layers, layers):
            x, block_max = run_block(block, x, angles, doc_start, layer_cache)
            max_logits.append(block_max)
        self.max_logits = torch.stack(max_logits)

        if cache is not None:
            cache.lengths += T if row_lengths is None else row_lengths
        return self.model.norm(x)

    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | None = None) -> Tensor:
        """Continue ids (B, T), T >= 1, by max_new_tokens -> (B, T + max_new_tokens): see Decoder."""
        decoder = Decoder(self, ids, max_new_tokens, temperature, top_k, seed)
        new = [decoder.next_tokens() for _ in range(max_new_tokens)]
        return torch.cat([ids, *new], dim=1)

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None) -> "Motif":
        """A model from a folder in the released layout, config.json and model.safetensors, or
        shards with an index, or from a repository owner/name of the Hugging Face Hub, which is
        downloaded once. Each tensor keeps its stored dtype unless one is given, and is read
        straight to the device; on the CPU it stays in the mapped file until it is written to.
        ValueError, one line, as stored_tensors says."""
        path, found = model_folder(path), {}
        config = MotifConfig.from_dict(read_json(path / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        for name, get in iter_checkpoint(path, "model", shapes, device):
            found[name] = get().to(dtype)
        model.load_state_dict(found, assign=True)
        return model.to(device or "cpu").requires_grad_()

    def save_pretrained(self, path, shard_bytes: int = 5 * 10**9) -> None:
        """Write config.json and the tensors, in the model's own dtype, in the released layout, as
        save_tensors does. If this fails, the folder has no config.json."""
        path, first = Path(path), not dist.is_initialized() or dist.get_rank() == 0
        if first:
            (path / "config.json").unlink(missing_ok=True)
        save_tensors(path, "model", self.state_dict(), shard_bytes)
        if first:
            write_json(path / "config.json", self.config.to_dict() | {
                "torch_dtype": str(self.head_weight.dtype).removeprefix("torch.")})


def sample_next_token(logits: Tensor, temperature: float, top_k: int | None, generator) -> Tensor:
    """logits (B, V) -> a token of each row (B, 1): see Decoder."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def document_starts(doc_ids: Tensor) -> Tensor:
    """Where each token's document begins: (B, T) -> (B, T) int32.

    >>> document_starts(torch.tensor([[5, 5, 7, 7, 7]])).tolist()
    [[0, 0, 2, 2, 2]]
    """
    position = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    is_first = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    return (position * is_first).cummax(dim=1).values.int()


class LayerCache(NamedTuple):
    """What a layer needs of a KVCache in one forward pass of T tokens."""
    keys: Tensor                 # (B, K, S, D)
    values: Tensor               # (B, P, S, 2D)
    slots: Tensor                # (B, T): where the new tokens' keys and values go
    visible: int | None          # the new tokens may see the first so many slots; None: all

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the new keys (B, T, K, D) and values -> all visible ones (B, S, K, D), and the slot
        of each query, None if there were no keys before."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[rows, :, self.slots] = k
        self.values[rows, :, self.slots] = v
        keys = self.keys.transpose(1, 2)
        values = self.values.transpose(1, 2)
        if self.visible is None:
            return keys, values, self.slots
        keys = keys[:, :self.visible]
        values = values[:, :self.visible]
        return keys, values, None if self.visible == k.shape[1] else self.slots


class KVCache:
    """Keys and values of batch_size rows of at most max_length tokens. Slot p of row b holds the
    token at position p; lengths (B,) says how many there are."""

    def __init__(self, model: Motif, batch_size: int, max_length: int):
        c = model.config
        if max_length > c.max_position_embeddings:
            raise UserError(f"a cache of {max_length} tokens, but max_position_embeddings is "
                            f"{c.max_position_embeddings}")
        weight = model.model.layers[0].self_attn.k_proj.weight
        options = {"device": weight.device, "dtype": model.compute_dtype or weight.dtype}
        slots = slots_for(max_length)
        self.max_length = max_length
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        self.keys = []
        self.values = []
        for block in model.model.layers:
            value_heads, value_dim = block.self_attn.values
            keys = torch.zeros(batch_size, c.num_key_value_heads, slots, c.head_dim, **options)
            values = torch.zeros(batch_size, value_heads, slots, value_dim, **options)
            self.keys.append(keys)
            self.values.append(values)

    def open(self, positions: Tensor, row_lengths: Tensor | None) -> list[LayerCache]:
        """The layers' views for tokens at these positions (B, T)."""
        T = positions.shape[1]
        slots = self.keys[0].shape[2]
        visible = None
        if T > 1:
            before = int(self.lengths.max())
            new = T if row_lengths is None else row_lengths
            if int((self.lengths + new).max()) > self.max_length:
                raise ValueError(f"the cache has room for {self.max_length} tokens a row")
            visible = min(before + T, slots)
        slot = positions.clamp(max=slots - 1)
        return [LayerCache(keys, values, slot, visible)
                for keys, values in zip(self.keys, self.values)]

    def select_rows(self, rows: Tensor, max_length: int | None = None) -> "KVCache":
        """A new cache with copies of these rows, which may repeat, and room for max_length tokens
        (None: as before)."""
        new = copy.copy(self)
        rows = torch.as_tensor(rows, device=self.lengths.device)
        new.max_length = max_length or self.max_length
        new.lengths = self.lengths[rows]
        if max_length is not None and int(new.lengths.max()) > max_length:
            raise ValueError(f"a row has more than {max_length} tokens")
        more = slots_for(new.max_length) - self.keys[0].shape[2]
        new.keys = [F.pad(keys[rows], (0, 0, 0, more)) for keys in self.keys]
        new.values = [F.pad(values[rows], (0, 0, 0, more)) for values in self.values]
        return new

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all other rows: select_rows in place, one layer after the other."""
        self.lengths = self.lengths[rows]
        for i in range(len(self.keys)):
            self.keys[i] = self.keys[i][rows]
            self.values[i] = self.values[i][rows]


def slots_for(max_length: int) -> int:
    """One more slot than tokens, for padding; a multiple of 8, so that products are aligned."""
    return (max_length + 8) // 8 * 8


class Decoder:
    """Generates one token of each row at a time after right-padded prompts ids (B, T).

    temperature 0 is greedy; top_k keeps the k likeliest tokens; a seed makes it repeatable;
    prompt_lengths (B,): how many ids of each row are its prompt, None: all."""

    @torch.no_grad()
    def __init__(self, model: Motif, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | None = None,
                 prompt_lengths: Tensor | None = None):
        B, T = ids.shape
        longest = model.config.max_position_embeddings
        if T == 0 or max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise UserError("generate needs a token to begin with, max_new_tokens >= 0, "
                            "temperature >= 0 and top_k >= 1")
        length = T + max(0, max_new_tokens - 1)           # the last new token is never read
        if length > longest:
            raise UserError(f"{T} + {max_new_tokens} tokens, but max_position_embeddings is "
                            f"{longest}")
        self.model = model
        self.temperature = temperature
        self.top_k = top_k
        self.left = max_new_tokens
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(ids.device).manual_seed(seed)
        self.cache = KVCache(model, B, length)
        self.new = None
        self.graph = None
        if prompt_lengths is None:
            prompt_lengths = torch.full((B,), T, device=ids.device)
        self.logits = self.prefill(ids, prompt_lengths)

    def prefill(self, ids: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Read the prompts, PREFILL_TOKENS at a time -> logits (B, 1, V) after each row's last."""
        B, T = ids.shape
        width = max(1, PREFILL_TOKENS // B)
        logits = None
        for start in range(0, T, width):
            piece = ids[:, start:start + width]
            n = (prompt_lengths - start).clamp(0, piece.shape[1])
            new = self.model(piece, cache=self.cache, row_lengths=n, last_only=True)
            # a row that has ended before this piece keeps the logits of the piece where it did
            logits = new if logits is None else torch.where((n > 0)[:, None, None], new, logits)
        return logits

    @torch.no_grad()
    def next_tokens(self) -> Tensor:
        """One more token of each row, (B, 1)."""
        if self.left == 0:
            raise ValueError("max_new_tokens have been generated")
        self.left -= 1
        if self.new is not None:
            self.logits = self.step(self.new)
        logits = upcast(self.logits[:, -1])
        self.new = sample_next_token(logits, self.temperature, self.top_k, self.generator)
        return self.new

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows alone, in this order."""
        rows = torch.as_tensor(rows, device=self.logits.device)
        self.graph = None
        self.logits = self.logits[rows]
        if self.new is not None:
            self.new = self.new[rows]
        self.cache.keep_rows(rows)

    def step(self, new: Tensor) -> Tensor:
        """Tokens (B, 1) -> logits (B, 1, V) of the next ones."""
        if not new.is_cuda or self.model.compute_dtype is not None:
            return self.model(new, cache=self.cache)
        if self.graph is None:
            self.capture(new)
        self.graph_input.copy_(new)
        self.graph.replay()
        return self.graph_output

    def capture(self, new: Tensor) -> None:
        """Record one step as a CUDA graph, which reads graph_input and writes graph_output."""
        self.graph_input = new.clone()
        lengths = self.cache.lengths.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.model(self.graph_input, cache=self.cache)
                self.cache.lengths.copy_(lengths)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.graph_output = self.model(self.graph_input, cache=self.cache)


def init_normal_(p: Tensor, std: float) -> None:
    """Normal(0, std) in place. FSDP2's shards are cut from the whole, so that they do not depend on
    the number of ranks."""
    if hasattr(p, "placements"):
        from torch.distributed.tensor import distribute_tensor
        whole = torch.empty(p.shape, dtype=p.dtype, device=p.device).normal_(0, std)
        p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
    else:
        p.normal_(0, std)


# ---- files of tensors

def save_tensors(path: Path, stem: str, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """Write name -> tensor to path/<stem>.safetensors or, over shard_bytes, to several files and an
    index. What FSDP2 shards is put together: all ranks call this, each writes some of the files,
    and once all are through the folder is whole. Where nothing is sharded, who calls writes all."""
    from safetensors.torch import save_file
    sharded = any(hasattr(t, "full_tensor") for t in tensors.values())
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    path.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for old in path.glob(f"{stem}[.-]*safetensors*"):     # other readers would take them too
            old.unlink()
    files, size, total = [[]], 0, 0
    for name, t in tensors.items():
        nbytes = t.numel() * t.element_size()
        if files[-1] and size + nbytes > shard_bytes:
            files, size = [*files, []], 0
        files[-1].append(name)
        size, total = size + nbytes, total + nbytes
    file_names = [f"{stem}.safetensors"] if len(files) == 1 else [
        f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    mine = {}                        # file -> its tensors; all gather before any writes, lest one
    for i, names in enumerate(files):                    # that fails leaves the others waiting
        for name in names:
            t = tensors[name]
            t = (t.full_tensor() if hasattr(t, "full_tensor") else t).contiguous()
            if i % world == rank:
                mine.setdefault(file_names[i], {})[name] = t.cpu() if world > 1 else t
    for file, shard in mine.items():
        save_file(shard, path / f"{file}.tmp", metadata={"format": "pt"})
        os.replace(path / f"{file}.tmp", path / file)
    if rank == 0 and len(files) > 1:
        write_json(path / (stem + INDEX), {"metadata": {"total_size": total}, "weight_map": {
            name: file for file, names in zip(file_names, files) for name in names}})


def iter_checkpoint(path: Path, stem: str, shapes: dict[str, tuple], device=None):
    """What save_tensors wrote, if it has just these names and shapes: name and a function for each,
    which until the next one comes reads the tensor or, given slices, that part of it alone.
    ValueError, one line, for a file missing or broken and a tensor missing, extra, misshapen, not
    of FLOATS or not where the index says."""
    from safetensors import SafetensorError, safe_open
    stored, problems, files = {}, [], tensor_files(path, stem)
    for file, indexed in files.items():
        try:
            with safe_open(file, "pt") as f:
                parts = {name: f.get_slice(name) for name in f.keys()
                         if not name.endswith("rotary_emb.inv_freq")}
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file}: cannot be read: {e}") from None
        for name, part in parts.items():
            stored[name], kind = tuple(part.get_shape()), part.get_dtype()
            if kind not in FLOATS:
                problems.append(f"{name} is of {kind}, not {', '.join(FLOATS)}")
            if indexed is not None and name not in indexed:
                problems.append(f"{name} is in {file.name}, not where the index says")
    problems += [f"missing {n}" for n in shapes if n not in stored]
    problems += [f"extra {n}" for n in stored if n not in shapes]
    problems += [f"{n} is {stored[n]}, not {tuple(shape)}" for n, shape in shapes.items()
                 if stored.get(n, shape) != tuple(shape)]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{path}: tensors do not fit: {'; '.join(problems[:4])}{more}")
    for file in files:                           # one at a time, as a mapped one takes memory
        with safe_open(file, "pt", device=str(device or "cpu")) as f:
            for name in f.keys():
                if name in shapes:
                    yield name, lambda *box: f.get_slice(name)[box] if box else f.get_tensor(name)


def model_folder(name, patterns=("*.json", "*.safetensors")) -> Path:
    """A folder, or a repository owner/name of the Hub: its files of these patterns downloaded, with
    progress, going on where a download was cut. ValueError if that fails."""
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return path
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as e:   # of a dozen kinds: no network, no such name, a licence to accept first
        raise UserError(f"{name}: there is no such folder, and the Hub did not give it: "
                         f"{type(e).__name__}: {' '.join(str(e).split())[:200]}") from None


def tensor_files(path: Path, stem: str) -> dict[Path, set | None]:
    """The safetensors files of that name in a folder, each with the tensors that the index places
    there, None without an index. ValueError if a file is missing or the index is none."""
    names, index = {f"{stem}.safetensors": None}, path / (stem + INDEX)
    if index.exists():
        names, places = {}, read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
            raise UserError(f"{index}: its weight_map must give each tensor's file")
        for tensor, name in places.items():
            names.setdefault(name, set()).add(tensor)
    for name in names:
        if not (path / name).exists():
            raise UserError(f"{path}: {name} is missing")
    return {path / name: names[name] for name in sorted(names)}


def read_json(file: Path) -> dict:
    """The object in a JSON file of a model folder; ValueError, one line, if there is none."""
    try:
        found = json.loads(file.read_text())
    except OSError:
        raise UserError(f"{file} cannot be read; a model folder has one") from None
    except ValueError as e:
        raise UserError(f"{file}: not JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object")
    return found


def write_json(file: Path, value: dict) -> None:
    file.with_suffix(".tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(file.with_suffix(".tmp"), file)


def flops_per_token(config: MotifConfig, seq_len: int, causal: bool = True) -> tuple[int, int]:
    """(forward, backward) FLOPs per token of a sequence: 2 per weight of every product, and per
    visible key and query head 2D for the logit and 2 Dv for the value. Backward twice that: the
    least that the model needs, nothing recomputed. causal=False counts masked keys too."""
    c = config
    values = 2 * c.head_dim if c.num_noise_heads else c.head_dim
    width = (c.num_attention_heads - c.num_noise_heads) * values
    qkv = c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads)
    linear = c.hidden_size * (qkv + width + 3 * c.intermediate_size)
    keys = (seq_len + 1) / 2 if causal else seq_len
    attention = c.num_attention_heads * keys * 2 * (c.head_dim + values)
    forward = int(c.num_hidden_layers * (2 * linear + attention) + 2 * c.hidden_size * c.vocab_size)
    return forward, 2 * forward
