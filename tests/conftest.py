"""Gives each process that shares in the tests one thread, and lets the Triton kernels run without a
GPU: through Triton's interpreter.

Triton decides on the interpreter when kernels are defined, so the variable must be set while
kernels.py is imported. But the interpreter is slow. So it is switched off again here, and only the
fixture `fused` of test_kernels.py switches it on.
"""
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import kernels

kernels.INTERPRET = False
os.environ.pop("TRITON_INTERPRET", None)
