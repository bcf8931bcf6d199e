"""Without a GPU the Triton kernels run through Triton's interpreter. It is chosen where triton is
imported, hence here; but only the kernels' own tests are to go through it, as it is slow."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import kernels

kernels.INTERPRET = False
os.environ.pop("TRITON_INTERPRET", None)
