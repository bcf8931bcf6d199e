"""Motif-2: a decoder with grouped differential attention and PolyNorm (arXiv 2511.07464).

    block:      x = x + attention(norm(x))        x = x + mlp(norm(x))
    attention:  subtract a noise softmax from each signal softmax, normalise per head
    mlp:        down( polynorm(gate(x)) * up(x) )

Module and parameter names are those of the released checkpoints, so that a state dict is one.
`python model.py config/motif2_12b.py` prints parameters, FLOPs and memory without allocating any.
"""
import functools
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

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


def plain_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None):
    """See causal_attention. Softmax in fp32; the products, logits among them, in q's dtype."""
    T, h, D, S = q.shape[1], q.shape[3], q.shape[4], k.shape[1]
    masked = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    if starts is not None:
        before = torch.arange(S, device=q.device) < starts[:, :, None]   # (B, T, S)
        masked = (masked | before)[:, None, None]
    q = (q * D**-0.5).permute(0, 2, 3, 1, 4).flatten(2, 3)               # (B, K, hT, D)
    logits = upcast(q @ k.permute(0, 2, 3, 1)).unflatten(2, (h, T))      # (B, K, h, T, S)
    mask = torch.zeros_like(masked, dtype=logits.dtype).masked_fill_(masked, -torch.inf)
    logits = logits.add_(mask)
    largest = logits.detach().amax(dim=(0, 3, 4))
    p = logits.softmax(-1).to(v.dtype).flatten(2, 3)                     # (B, K, hT, S)
    out = (p @ v.transpose(1, 2)).unflatten(2, (h, T))                   # (B, K, h, T, Dv)
    return out.permute(0, 3, 1, 2, 4), largest


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None):
    """softmax(q k^T / sqrt D, causal) v, every key head serving h query heads.

    q (B, T, K, h, D), k (B, S, K, D), v (B, S, K, Dv) -> out (B, T, K, h, Dv), largest visible
    logit (K, h). Query t stands at position S - T + t, so that cached keys may come first.
    starts (B, T) int32, for S = T only: where each token's document begins, a run of tokens that
    sees itself alone."""
    if kernels.can_fuse_attention(q, k, v):
        out, _, largest = kernels.fused_attention(q.flatten(2, 3), k, v, starts, 0)
        return out, largest.view(q.shape[2:4])
    return plain_attention(q, k, v, starts)


def grouped_differential_attention(q: Tensor, k: Tensor, v: Tensor, num_noise_heads: int,
                                   starts: Tensor | None = None):
    """The two softmaxes of grouped differential attention (arXiv 2510.06949), before lambda.

    G noise heads, r signal heads for each, P pairs of key heads (P divides G):
    q (B, T, G(r+1), D), each group its r signal heads and then its noise head; k (B, S, 2P, D), key
    heads (signal, noise) by pair; v (B, S, P, 2D), the value heads of a pair side by side.
        signal = softmax(q1 k1^T / sqrt D) v    noise = softmax(q2 k2^T / sqrt D) v
    starts: see causal_attention.
    -> signal (B, T, G, r, 2D), noise (B, T, G, 1, 2D), largest logit per query head (G(r+1),)."""
    if kernels.can_fuse_attention(q, k, v):
        return kernels.fused_attention(q, k, v, starts, num_noise_heads)
    B, T, H, D = q.shape
    G, P = num_noise_heads, k.shape[2] // 2
    q = q.unflatten(2, (G, H // G))                                      # (B, T, G, r+1, D)
    k = k.unflatten(2, (P, 2))                                           # (B, S, P, 2, D)
    outs, largest = [], []
    for q_i, k_i in (q[:, :, :, :-1], k[:, :, :, 0]), (q[:, :, :, -1:], k[:, :, :, 1]):
        shared = q_i.reshape(B, T, P, -1, D)                             # all heads of one pair
        out, top = plain_attention(shared, k_i, v, starts)
        outs.append(out.reshape(B, T, G, -1, 2 * D))
        largest.append(top.view(G, -1))
    return *outs, torch.cat(largest, dim=1).flatten()


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

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], starts: Tensor | None = None,
                cache: tuple[Tensor, Tensor] | None = None, start: int | Tensor = 0):
        """x (B, T, hidden) -> the same, largest visible logit (query heads,). starts: see kernels.
        cache: this layer's part of new_cache, of which the first `start` positions are filled; the
        new ones are written behind them. Where start is (B,), T is 1 and position p of the cache
        stands at length - 1 - p, as turned makes it: so the keys that a row sees are the last ones,
        whatever its length, and no shape depends on that."""
        B, T, _ = x.shape
        q = rope(self.q_proj(x).view(B, T, -1, self.head_dim), *angles)
        k = rope(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim), *angles)
        v = self.v_proj(x).view(B, T, *self.values)
        if isinstance(start, Tensor):
            rows = torch.arange(B, device=x.device)
            for kept, new in zip(cache, (k, v)):
                kept[rows, :, kept.shape[2] - 1 - start] = new[:, 0]
            k, v = (kept.transpose(1, 2) for kept in cache)
        elif cache is not None:
            for kept, new in zip(cache, (k, v)):
                kept[:, :, start:start + T] = new.transpose(1, 2)
            k, v = (kept[:, :, :start + T].transpose(1, 2) for kept in cache)
        if self.noise_heads == 0:
            q = q.unflatten(2, (self.kv_heads, -1))                      # (B, T, K, H / K, D)
            out, largest = causal_attention(q, k, v, starts)
            return self.o_proj(out.flatten(2)), largest.flatten()
        signal, noise, largest = grouped_differential_attention(
            q, k, v, self.noise_heads, starts)
        out = differential_norm(signal, noise, self.lambda_(), self.subln.weight,
                                        1 - self.lambda_init(), self.eps)
        return self.o_proj(out), largest


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

    def forward(self, x: Tensor, angles, starts=None, cache=None, start: int | Tensor = 0):
        """See Attention.forward."""
        out, largest = self.self_attn(self.input_layernorm(x), angles, starts, cache, start)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), largest


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

    def forward(self, ids: Tensor, targets: Tensor | None = None, documents: Tensor | None = None,
                reduction: str = "mean", scale: float = 1.0, cache: list | None = None,
                start: int | Tensor = 0, padding: Tensor | None = None,
                last: int | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V), or of the last `last` tokens alone, or with targets (B,
        T) -> their cross entropy in nats, -1 ignored, scale times the "mean" or "sum", or the sums
        of the four "quarters" of T, or "none": each token's own (B, T), 0 where ignored, without
        gradients. documents (B, T): each run of equal numbers is a document that sees itself alone,
        positions from 0. padding (B,): so many columns at the left of a row, cached ones included,
        are no tokens. cache and start: see Attention.forward.
        ValueError for no tokens and for more positions than max_position_embeddings."""
        T, longest, starts = ids.shape[1], self.config.max_position_embeddings, None
        if isinstance(start, Tensor):
            positions = start[:, None]
            starts = cache[0][0].shape[2] - 1 - positions
        elif ids.numel() == 0 or start + T > longest:
            raise UserError(f"ids of shape {tuple(ids.shape)} from position {start}: there must "
                             f"be tokens, and at most max_position_embeddings={longest}")
        else:
            positions = torch.arange(start, start + T, device=ids.device)[None]
        if documents is not None:
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            starts = (positions * begins).cummax(1).values.int()         # of each token's document
            positions = positions - starts
        elif padding is not None:
            starts = torch.minimum(positions, padding[:, None]).int()    # padding sees itself alone
            positions = positions - starts
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x, largest = self.model.embed_tokens(ids), []
        compiled = self.compile_steps and isinstance(start, Tensor)
        run = compiled_block() if compiled else Block.__call__
        for i, block in enumerate(self.model.layers):
            x, top = run(block, x, angles, starts, None if cache is None else cache[i], start)
            largest.append(top)
        self.max_logits = torch.stack(largest)
        x = self.model.norm(x if last is None else x[:, -last:])
        if targets is None:
            return F.linear(x, self.head_weight)
        def loss(x, targets, reduction):
            return kernels.linear_cross_entropy(x.flatten(0, 1), self.head_weight,
                                                targets.flatten(), reduction, scale)
        if reduction == "quarters":
            parts = zip(x.tensor_split(4, 1), targets.tensor_split(4, 1))
            return torch.stack([loss(*part, "sum") for part in parts])
        out = loss(x, targets, reduction)
        return out.view(targets.shape) if reduction == "none" else out

    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, seed: int | None = None) -> Tensor:
        """Continue ids (B, T), T >= 1, by max_new_tokens -> (B, T + max_new_tokens): see stream."""
        return torch.cat([ids, *self.stream(ids, max_new_tokens, temperature, top_k, seed)], 1)

    @torch.no_grad()
    def stream(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, seed: int | None = None, padding: Tensor | None = None):
        """Yield the next token (B, 1) of each row of ids (B, T), T >= 1, max_new_tokens times.
        temperature 0 is greedy; top_k keeps the k likeliest tokens; a seed makes it repeatable;
        padding: see forward. Whoever sends indices of rows goes on with those alone. Keys and
        values are cached: 2 x kv_heads x head_dim numbers per token and layer."""
        c, (B, T) = self.config, ids.shape
        if T == 0 or max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
            raise UserError("generate needs a token to begin with, max_new_tokens >= 0, "
                             "temperature >= 0 and top_k >= 1")
        if T + max_new_tokens - 1 > c.max_position_embeddings:    # the last token is not read again
            raise UserError(f"{T} + {max_new_tokens} tokens, but max_position_embeddings is "
                             f"{c.max_position_embeddings}")
        if max_new_tokens == 0:
            return
        generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        cache = self.new_cache(B, T + max_new_tokens)
        width = max(1, PREFILL_TOKENS // B)
        for a in range(0, T, width):
            logits = self(ids[:, a:a + width], cache=cache, start=a, padding=padding, last=1)
        padding = ids.new_zeros(B) if padding is None else padding
        cache, position, step = turned(cache, padding), T - padding, None
        for i in range(max_new_tokens):
            if i:
                step = step or self.decoder(cache, new, position)
                logits, position = step(new, position), position + 1
            new = sample_next_token(upcast(logits[:, -1]), temperature, top_k, generator)
            rows = yield new
            if rows is not None:
                new, position, step = new[rows], position[rows], None
                cache = [tuple(t[rows] for t in cache.pop(0)) for _ in self.model.layers]

    def new_cache(self, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Room for the keys (rows, K, length, D) and values of each layer: heads before positions,
        so that products read them as they lie."""
        weight = self.model.layers[0].self_attn.k_proj.weight
        def room(heads, width):
            return torch.zeros(rows, heads, length, width, device=weight.device,
                               dtype=self.compute_dtype or weight.dtype)
        c = self.config
        return [(room(c.num_key_value_heads, c.head_dim), room(*block.self_attn.values))
                for block in self.model.layers]

    def decoder(self, cache: list, new: Tensor, position: Tensor):
        """A function from tokens (B, 1) and their positions (B,) to logits (B, 1, V), over a cache
        as turned makes it: on a GPU, and without FSDP2, a CUDA graph of the whole pass, which has
        hundreds of small kernels. To warm up writes what the first step will."""
        if not new.is_cuda or self.compute_dtype is not None:
            return lambda new, position: self(new, cache=cache, start=position)
        new, position = new.clone(), position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self(new, cache=cache, start=position)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self(new, cache=cache, start=position)

        def step(now, at):
            new.copy_(now)
            position.copy_(at)
            graph.replay()
            return logits
        return step

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
    """logits (B, V) -> a token of each row (B, 1): see Motif.stream."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def turned(cache: list, padding: Tensor) -> list:
    """A cache with its positions in reverse and the padding of each row gone, as Attention.forward
    reads it one token at a time. Takes the old one's layers away, one after the other."""
    length, rows = cache[0][0].shape[2], torch.arange(len(padding), device=padding.device)[:, None]
    columns = torch.arange(length - 1, -1, -1, device=padding.device) + padding[:, None]
    columns.clamp_(max=length - 1)
    return [tuple(t[rows, :, columns].transpose(1, 2).contiguous() for t in cache.pop(0))
            for _ in range(len(cache))]


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
