"""Greedy generation on a GPU: `python tests/decode_speed.py` prints tokens per second of
Motif.stream after a prompt of 128, and what share that is of the memory's speed, by which a step
takes at least the time to read the weights and the keys and values once. Compiled and not, for
motif_124m and for four layers of the 12.7B model, bf16, fresh weights."""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import kernels
from model import Motif
from plain_slice import config_of, in_bf16

PROMPT, NEW = 128, 256


def step_bytes(model: Motif, rows: int) -> float:
    """What a step reads on average: every weight but an embedding that is no head, every key and
    value so far."""
    c, weights = model.config, sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.numel()
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (PROMPT + NEW / 2)
    return 2 * (weights + rows * cached)


def seconds(model: Motif, ids: torch.Tensor) -> tuple[float, float]:
    """To the second token, and from there for each further one."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for i, _ in enumerate(model.stream(ids, NEW, temperature=0)):
        if i in (1, NEW - 1):
            torch.cuda.synchronize()
            if i == 1:
                first = time.perf_counter()
    return first - begin, (time.perf_counter() - first) / (NEW - 2)


def main() -> None:
    x, y = torch.randn(2, 2**28, device="cuda")
    copy = 2 * 2**30 / kernels.milliseconds(lambda: torch.neg(y, out=x)) / 1e6
    del x, y
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s")
    for name, *options in ("motif_124m.py",), ("motif2_12b.py", "--num_hidden_layers=4"):
        model = in_bf16(config_of(name, *options)).requires_grad_(False)
        for model.compile_steps in False, True:
            for rows in 1, 32:
                ids = torch.randint(model.config.vocab_size, (rows, PROMPT), device="cuda")
                first, _ = seconds(model, ids)
                times = sorted(seconds(model, ids)[1] for _ in range(3))
                shares = [step_bytes(model, rows) / t / 1e9 / copy for t in times]
                print(f"{name} {'compiled' if model.compile_steps else 'eager':8s} batch {rows:2d}:"
                      f" {rows / times[1]:8,.0f} tok/s ({rows / times[2]:,.0f} to "
                      f"{rows / times[0]:,.0f}), {shares[1]:.1%} of the copy; the first pass and "
                      f"step {first:.1f} s", flush=True)


if __name__ == "__main__":
    main()
