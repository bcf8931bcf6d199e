"""Six layers of the 12.7B model with its embedding and head, forward and backward alone:
`python tests/plain_slice.py` on a GPU prints tokens per second and MFU (by the FLOPs of
pretrain.py) of the kernels with and without FSDP2, then of stock PyTorch, what they are measured
against: bf16 autograd, eager and under torch.compile, with stock attention, the definition of
PolyNorm and the whole logits."""
import model
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import configurator
import kernels
import pretrain
from model import Motif, flops_per_token

SLICE = "motif2_12b.py", "--num_hidden_layers=6", "--activation_checkpoint_layers=0"


def attention_by_sdpa(q, k, v, num_noise_heads, starts=None, wide=False):
    """grouped_differential_attention by stock attention: two calls with values of 2D, or four of D,
    as flash attention needs. Tells no largest logit."""
    q, k = (t.transpose(1, 2) for t in (q, k))                           # (B, heads, T, D)
    G, P = num_noise_heads, k.shape[1] // 2
    q = q.unflatten(1, (G, -1))
    v = v.unflatten(3, (2, -1)).transpose(1, 2)                          # (B, P, T, 2, D)
    halves = [v.flatten(3)] if wide else v.unbind(3)
    outs = []
    for heads, keys in (q[:, :, :-1], k[:, ::2]), (q[:, :, -1:], k[:, 1::2]):
        out = torch.cat([F.scaled_dot_product_attention(heads.flatten(1, 2), keys, half,
                                                        is_causal=True, enable_gqa=True)
                         for half in halves], dim=-1)
        outs.append(out.unflatten(1, (G, -1)).permute(0, 3, 1, 2, 4))    # (B, T, G, r, 2D)
    return *outs, q.new_zeros(q.shape[1] * q.shape[2])


def loss_of_whole_logits(x, weight, targets, reduction, scale):
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction=reduction)


def config_of(name: str, *options: str) -> pretrain.Config:
    file = str(Path(__file__).parent.parent / "config" / name)
    return configurator.load(pretrain.Config, [file, *options], default_file=file)


def in_bf16(c: pretrain.Config) -> Motif:
    """Fresh weights, on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Motif(pretrain.model_config(c)).to("cuda")    # its buffers too
    torch.set_default_dtype(torch.float32)
    return model


def measure(name: str, model: Motif, tokens: int, steps: int, step) -> None:
    """A line on `steps` calls of step(), of so many tokens each, after two others."""
    torch.cuda.reset_peak_memory_stats()
    for i in range(2 + steps):
        if i == 2:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        model.zero_grad(set_to_none=True)
        step()
    torch.cuda.synchronize()
    speed = steps * tokens / (time.perf_counter() - begin)
    peak = pretrain.peak_flops(torch.device("cuda"))
    mfu = speed * sum(flops_per_token(model.config, 4096)) / peak
    print(f"{name:44s}{speed:10,.0f} tok/s  MFU {mfu:6.1%}  "
          f"{torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB", flush=True)


def with_kernels(name: str, sharded: bool, rows: int = 64, micro: int = 4) -> None:
    """The step of pretrain.py less the optimizer: on bf16 weights without FSDP2, or as it is."""
    c, device = config_of(*SLICE), torch.device("cuda", 0)
    if sharded:
        pretrain.init_distributed(c, device)
    model = pretrain.build(c, device) if sharded else in_bf16(c)
    for block in () if sharded else model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=False)
    ids = torch.randint(c.vocab_size, (rows, 4097), device="cuda")
    batch = ids[:, :-1], ids[:, 1:]
    measure(name, model, rows * 4096, 3, lambda: pretrain.forward_backward(
        model, batch, micro, rows * 4096))


def plain(name: str, compiled: bool, wide: bool, backend, batch: int = 2) -> None:
    kernels.ENABLED = False
    kernels.poly_norm_mul = kernels.poly_norm_mul_by_definition
    model.grouped_differential_attention = lambda *t: attention_by_sdpa(*t, wide=wide)
    kernels.linear_cross_entropy = torch.compile(loss_of_whole_logits) if compiled else (
        loss_of_whole_logits)
    c = config_of(*SLICE)
    model = in_bf16(c)
    for block in model.model.layers if compiled else ():
        block.compile()
    ids = torch.randint(c.vocab_size, (batch, 4097), device="cuda")
    with sdpa_kernel(backend):
        measure(name, model, batch * 4096, 6, lambda: model(ids[:, :-1], ids[:, 1:]).backward())


if __name__ == "__main__":
    with_kernels("kernels, bf16 weights without FSDP2", False)
    with_kernels("kernels, fp32 weights, FSDP2 of one rank", True)
    plain("eager, 4 flash calls", False, False, SDPBackend.FLASH_ATTENTION)
    plain("torch.compile, 4 flash calls", True, False, SDPBackend.FLASH_ATTENTION)
    plain("torch.compile, 2 cuDNN calls", True, True, SDPBackend.CUDNN_ATTENTION)
