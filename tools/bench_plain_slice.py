"""Our training speed beside stock PyTorch's, on a GPU: `python -m tools.bench_plain_slice`.

Takes six layers of the 12.7B model with its embedding and head, forward and backward, without the
optimizer, and prints tokens per second, MFU (model FLOPs utilisation, by the FLOPs that pretrain.py
counts) and memory of

    our kernels, without FSDP2 and as pretrain.py trains, with FSDP2
    stock PyTorch: bf16 autograd, eager and under torch.compile, with PyTorch's own attention, the
    definition of PolyNorm and all logits at once
"""
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import configurator
import kernels
import model as motif
import pretrain
from configurator import UserError
from model import Motif, flops_per_token
from support.log import peak_flops
from support.ranks import run_main

SLICE = ("motif2_12b.py", "--num_hidden_layers=6", "--activation_checkpoint_layers=0")
T = 4096
OUR_ROWS = 64
OUR_MICRO_ROWS = 4
STOCK_ROWS = 2
WARM_UP = 2


# ---- stock PyTorch's forms of what kernels.py fuses

def sdpa(q: Tensor, k: Tensor, v: Tensor, num_noise_heads: int) -> Tensor:
    """q (B, heads, T, D), k and v (B, P, T, ...) -> (B, T, G, heads / G, width of v)."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.unflatten(1, (num_noise_heads, -1)).permute(0, 3, 1, 2, 4)


def stock_attention(q: Tensor, k: Tensor, v: Tensor, num_noise_heads: int,
                    wide_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    """model.signal_and_noise_attention, less the largest logits, which PyTorch does not tell.

    wide_values: two calls with values of 2D, which cuDNN takes; else four with values of D, as
    flash attention needs values as wide as the keys."""
    q = q.transpose(1, 2).unflatten(1, (num_noise_heads, -1))            # (B, G, r + 1, T, D)
    q_signal = q[:, :, :-1].flatten(1, 2)                                # (B, G r, T, D)
    q_noise = q[:, :, -1]                                                # (B, G, T, D)
    k = k.transpose(1, 2)                                                # (B, 2P, T, D)
    k_signal, k_noise = k[:, ::2], k[:, 1::2]
    v = v.transpose(1, 2)                                                # (B, P, T, 2D)

    parts = [v] if wide_values else v.chunk(2, dim=-1)
    signal = [sdpa(q_signal, k_signal, part, num_noise_heads) for part in parts]
    noise = [sdpa(q_noise, k_noise, part, num_noise_heads) for part in parts]
    no_logits = q.new_zeros(q.shape[1] * q.shape[2])
    return torch.cat(signal, dim=-1), torch.cat(noise, dim=-1), no_logits


def stock_loss(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean",
               scale: float = 1.0) -> Tensor:
    """kernels.linear_cross_entropy with all logits at once."""
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, targets, reduction=reduction) * scale


# ---- measuring

def load_config(name: str, *options: str) -> pretrain.Config:
    file = str(Path(__file__).parent.parent / "config" / name)
    return configurator.load(pretrain.Config, [file, *options], default_file=file)


def bf16_model(c: pretrain.Config) -> Motif:
    """Fresh weights in bf16, on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Motif(pretrain.model_config(c)).to("cuda")               # its buffers too
    torch.set_default_dtype(torch.float32)
    return model


def measure(name: str, model: Motif, tokens: int, steps: int, step: Callable[[], object]) -> None:
    """Print the speed of `steps` calls of step(), of so many tokens each, after a warm-up."""
    torch.cuda.reset_peak_memory_stats()
    for i in range(WARM_UP + steps):
        if i == WARM_UP:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        model.zero_grad(set_to_none=True)
        step()
    torch.cuda.synchronize()
    speed = steps * tokens / (time.perf_counter() - begin)

    flops = sum(flops_per_token(model.config, T))
    mfu = speed * flops / peak_flops(torch.device("cuda"))
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"{name:44s}{speed:10,.0f} tok/s  MFU {mfu:6.1%}  {memory:5.1f} GiB", flush=True)


def measure_ours(name: str, with_fsdp: bool) -> None:
    """The step of pretrain.py, less the optimizer."""
    c = load_config(*SLICE)
    device = torch.device("cuda", 0)
    if with_fsdp:
        pretrain.meet_ranks(c, device)
        model = pretrain.build(c, device)
    else:
        model = bf16_model(c)
        for block in model.model.layers:
            block.forward = torch.compile(block.forward, dynamic=False)

    ids = torch.randint(c.vocab_size, (OUR_ROWS, T + 1), device="cuda")
    batch = (ids[:, :-1], ids[:, 1:])
    tokens = OUR_ROWS * T

    def step():
        pretrain.forward_backward(model, batch, OUR_MICRO_ROWS, tokens)
    measure(name, model, tokens, 3, step)


def measure_stock(name: str, compiled: bool, wide_values: bool, backend: SDPBackend) -> None:
    """kernels.ENABLED = False leaves model.py's definitions; attention and loss are replaced."""
    def attention(q, k, v, num_noise_heads, doc_start=None, query_slots=None):
        return stock_attention(q, k, v, num_noise_heads, wide_values)
    kernels.ENABLED = False
    motif.signal_and_noise_attention = attention
    kernels.linear_cross_entropy = torch.compile(stock_loss) if compiled else stock_loss

    c = load_config(*SLICE)
    model = bf16_model(c)
    if compiled:
        for block in model.model.layers:
            block.compile()
    ids = torch.randint(c.vocab_size, (STOCK_ROWS, T + 1), device="cuda")

    def step():
        model(ids[:, :-1], ids[:, 1:]).backward()
    with sdpa_kernel(backend):
        measure(name, model, STOCK_ROWS * T, 6, step)


def check_gpu(about: str) -> None:
    """For --help print `about`, and end. UserError without a CUDA GPU."""
    if "--help" in sys.argv or "-h" in sys.argv:
        print(about, flush=True)
        raise SystemExit
    if not torch.cuda.is_available():
        raise UserError("this measures a GPU, and there is none that torch can use; see --help")


def main() -> None:
    check_gpu(__doc__)
    measure_ours("kernels, bf16 weights without FSDP2", with_fsdp=False)
    measure_ours("kernels, fp32 weights, FSDP2 of one rank", with_fsdp=True)
    measure_stock("eager, 4 flash calls", compiled=False, wide_values=False,
                  backend=SDPBackend.FLASH_ATTENTION)
    measure_stock("torch.compile, 4 flash calls", compiled=True, wide_values=False,
                  backend=SDPBackend.FLASH_ATTENTION)
    measure_stock("torch.compile, 2 cuDNN calls", compiled=True, wide_values=True,
                  backend=SDPBackend.CUDNN_ATTENTION)


if __name__ == "__main__":
    run_main(main)
