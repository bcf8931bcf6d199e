"""Compiles every kernel for a Hopper GPU (sm_90) on any machine, and prints a line of JSON for each.

No kernel runs: a launch is intercepted and compiled, at the widths of the published models. Each
line says what to look at in the machine code: shared memory, bytes of stack (spilled registers),
loads of 16 bytes or by TMA, and tensor-core instructions. test_kernels.py runs this as a process of
its own, since Triton's interpreter must be off, and reads the lines.
"""
import json
import multiprocessing
import os
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

os.environ["TRITON_INTERPRET"] = "0"     # set, so that kernels.py takes Triton without CUDA too
import kernels

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
         torch.int64: "i64", torch.int32: "i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).requires_grad_()


def attend(G, H, K, D, documents=False):
    """Forward and backward of 256 tokens; G noise heads, 0 for plain attention."""
    v = bf16(1, 256, K // 2, 2 * D) if G else bf16(1, 256, K, D)
    doc_start = torch.zeros(1, 256, dtype=torch.int32) if documents else None
    signal, noise, _ = kernels.fused_attention(bf16(1, 256, H, D), bf16(1, 256, K, D), v,
                                               doc_start, G)
    (signal.sum() + noise.sum()).backward()


def launch_everything() -> None:
    """Every operation, forward and backward, on few rows of full width."""
    weight = torch.zeros(3).requires_grad_()
    bias = torch.zeros(1).requires_grad_()
    kernels.poly_norm_mul(bf16(2, 16384), bf16(2, 16384), weight, bias, 1e-6).sum().backward()

    attend(8, 40, 16, 128)
    attend(8, 40, 16, 128, documents=True)
    attend(2, 10, 4, 64)
    attend(0, 40, 8, 128)
    kernels.fused_differential_norm(bf16(1, 2, 8, 4, 256), bf16(1, 2, 8, 1, 256), weight[0],
                                    torch.zeros(256).requires_grad_(), 1e-5).sum().backward()

    targets = torch.zeros(2, dtype=torch.int64)
    kernels.linear_cross_entropy(bf16(2, 64), bf16(219520, 64), targets).backward()
    kernels.token_losses(bf16(2, 64), bf16(219520, 64), targets)

    wide = bf16(1, 4096, 64).detach()
    by_columns = wide.mT.contiguous().mT
    square = torch.empty(1, 4096, 4096, dtype=torch.bfloat16)
    kernels.symmetric_matmul(wide, wide, 1.0)
    kernels.symmetric_matmul(by_columns, by_columns, 1.0)
    kernels.symmetric_matmul(square, square, 1.0, square, 1.0)
    kernels.symmetric_matmul(square.mT, square.mT, 1.0, square, 1.0)
    kernels.quantize_fp8(bf16(16, 4096).detach(), True)
    kernels.quantize_fp8(bf16(16, 4096).detach(), False)


def intercept(launches: dict) -> None:
    """From now on nothing is computed: a launch is noted in `launches`, once for each kernel with the
    same options and the same arguments missing."""
    def instead_of_launching(kernel, grid):
        def note(*args, **options):
            key = (kernel.__name__, None in args, str(options))
            launches.setdefault(key, (kernel, args, options))
        return note

    triton.runtime.jit.JITFunction.__getitem__ = instead_of_launching
    kernels.use_triton = lambda x: True
    kernels.is_hopper = lambda device: True


def source(kernel, args, constants) -> ASTSource:
    """A launch, specialised as Triton's launcher would."""
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    constants = dict(constants)
    attributes = {}
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
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(launch: tuple) -> dict:
    """What the machine code of a launch has in it."""
    kernel, args, options = launch
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    made = triton.compile(source(kernel, args, constants), target=GPUTarget("cuda", 90, 32),
                          options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(made.asm["cubin"])
        f.flush()
        code = subprocess.run([CUOBJDUMP, "-res-usage", "--dump-sass", f.name], check=True,
                              capture_output=True, text=True).stdout
    return {"name": kernel.__name__, "constants": str(constants), "shared": made.metadata.shared,
            "stack": int(re.search(r"STACK:(\d+)", code)[1]),
            "wide_loads": len(re.findall(r"LDG\.E[.\w]*\.128|LDGSTS[.\w]*\.128|UTMALDG", code)),
            "multiplies": "tt.dot" in made.asm["ttir"],
            "tensor_core": len(re.findall("HGMMA|QGMMA", code))}


def compile_number(i: int) -> dict:
    return compile_launch(launches[i])


if __name__ == "__main__":
    noted = {}
    intercept(noted)
    launch_everything()
    launches = list(noted.values())
    # Numbers go to the workers, which inherit the list: a launch cannot be pickled.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for made in pool.imap(compile_number, range(len(launches))):
            print(json.dumps(made), flush=True)
