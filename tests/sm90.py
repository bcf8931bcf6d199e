"""Compiles for a Hopper GPU, on any machine, every kernel that the operations launch at the widths
of the published models, and prints a line of JSON for each: name, constants, shared memory, bytes
of stack (spilled registers), loads of 16 bytes or by TMA, whether it multiplies matrices, and its
tensor-core instructions. test_kernels.py reads them."""
import model
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
         torch.int64: "i64", torch.int32: "i32"}


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).requires_grad_()


def attend(groups, heads, key_heads, D, documents=False):
    """Forward and backward of 256 tokens; groups: how many noise heads, 0 for plain attention."""
    q, k, v = bf16(1, 256, heads, D), bf16(1, 256, key_heads, D), bf16(1, 256, key_heads, D)
    starts = torch.zeros(1, 256, dtype=torch.int32) if documents else None
    if groups:
        v = v.view(1, 256, -1, 2 * D)
        *outs, _ = model.grouped_differential_attention(q, k, v, groups, starts)
    else:
        *outs, _ = model.causal_attention(q.unflatten(2, (key_heads, -1)), k, v, starts)
    sum(out.sum() for out in outs).backward()


def launch_everything() -> None:
    """Every operation, forward and backward, on few rows of full width."""
    weight, bias = torch.zeros(3).requires_grad_(), torch.zeros(1).requires_grad_()
    for up in bf16(2, 16384), None:
        kernels.poly_norm_mul(bf16(2, 16384), up, weight, bias, 1e-6).sum().backward()
    attend(8, 40, 16, 128)
    attend(8, 40, 16, 128, documents=True)
    attend(2, 10, 4, 64)
    attend(0, 40, 8, 128)
    model.differential_norm(bf16(1, 2, 8, 4, 256), bf16(1, 2, 8, 1, 256), weight[0],
                              torch.zeros(256).requires_grad_(), 0.2, 1e-5).sum().backward()
    kernels.linear_cross_entropy(bf16(2, 64), bf16(219520, 64), torch.zeros(2).long()).backward()
    x = bf16(1, 4096, 64).detach()
    kernels.symmetric_matmul(x, x, 1.0)
    x = x.mT.contiguous().mT                             # columns contiguous, as of a tall matrix
    kernels.symmetric_matmul(x, x, 1.0)
    x = torch.empty(1, 4096, 4096, dtype=torch.bfloat16)
    for y in x, x.mT:
        kernels.symmetric_matmul(y, y, 1.0, x, 1.0)
    for columns in True, False:
        kernels.quantize_fp8(bf16(16, 4096).detach(), columns)


def source(kernel, args, constants) -> ASTSource:
    """A launch, specialised as Triton's launcher would."""
    signature, constants, attributes = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args)):
        if value is None or isinstance(value, bool):
            constants[name] = value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes)


def compiled(launch: tuple) -> dict:
    """What a launch compiles to."""
    kernel, args, options = launch
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    made = triton.compile(source(kernel, args, constants), target=GPUTarget("cuda", 90, 32),
                          options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        code = subprocess.run([tool, "-res-usage", "--dump-sass", f.name], capture_output=True,
                              text=True, check=True).stdout
    return {"name": kernel.__name__, "constants": str(constants), "shared": made.metadata.shared,
            "stack": int(re.search(r"STACK:(\d+)", code)[1]),
            "wide_loads": len(re.findall(r"LDG\.E[.\w]*\.128|LDGSTS[.\w]*\.128|UTMALDG", code)),
            "multiplies": "tt.dot" in made.asm["ttir"],
            "tensor_core": len(re.findall("HGMMA|QGMMA", code))}


def compiled_number(i: int) -> dict:
    return compiled(launches[i])


if __name__ == "__main__":
    launches = {}
    triton.runtime.jit.JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: launches.setdefault(
            (kernel.__name__, None in args, str(options)), (kernel, args, options)))
    kernels.use_triton = kernels.attention_is_fused = lambda *x: True
    launch_everything()
    launches = list(launches.values())
    with multiprocessing.get_context("fork").Pool(2) as pool:       # a launch cannot be pickled
        for made in pool.imap(compiled_number, range(len(launches))):
            print(json.dumps(made), flush=True)
