"""Speed of greedy generation on a GPU: `python -m tools.bench_decode [CHECKPOINT]`.

Prints tokens per second of model.Decoder after a prompt of 128 tokens, for a checkpoint, or else
for motif_124m and four layers of the 12.7B model with random weights: in bf16, with and without
torch.compile, for 1 and 32 rows. Beside it stands the share of the memory's speed: a step must read
all weights, keys and values once, so it takes at least as long as a plain copy needs for that many
bytes.
"""
import sys
import time

import torch
import triton

from model import Decoder, Motif
from support.ranks import run_main
from tools.bench_plain_slice import bf16_model, check_gpu, load_config

PROMPT = 128
NEW = 256
ROWS = (1, 32)
REPEATS = 3


def bytes_per_step(model: Motif, rows: int) -> float:
    """What a step reads on average: all weights, unless the embedding serves for its lookup alone,
    and the keys and values of all tokens so far."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters())
    if not c.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.numel()
    tokens = PROMPT + NEW / 2
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * tokens
    return 2 * (weights + rows * cached)


def copy_speed() -> float:
    """Bytes per second that one kernel reads and writes, of 1 GiB each."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    milliseconds = triton.testing.do_bench(lambda: torch.neg(x, out=y), return_mode="median")
    return 2 * 2**30 / (milliseconds / 1000)


def seconds(model: Motif, ids: torch.Tensor) -> tuple[float, float]:
    """Until the second token is there, and from then on per token."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    decoder = Decoder(model, ids, NEW, temperature=0)

    # The second token is the first that a step makes: a graph is recorded for it.
    decoder.next_tokens()
    decoder.next_tokens()
    torch.cuda.synchronize()
    second = time.perf_counter()

    for _ in range(NEW - 2):
        decoder.next_tokens()
    torch.cuda.synchronize()
    return second - begin, (time.perf_counter() - second) / (NEW - 2)


def report(name: str, model: Motif, rows: int, speed_of_copy: float) -> None:
    ids = torch.randint(model.config.vocab_size, (rows, PROMPT), device="cuda")
    first, _ = seconds(model, ids)
    times = sorted(seconds(model, ids)[1] for _ in range(REPEATS))
    median = times[REPEATS // 2]
    share = bytes_per_step(model, rows) / median / speed_of_copy
    kind = "compiled" if model.compile_steps else "eager"
    print(f"{name} {kind:8s} batch {rows:2d}: {rows / median:8,.0f} tok/s "
          f"({rows / times[-1]:,.0f} to {rows / times[0]:,.0f}), {share:.1%} of the copy; "
          f"prompt and first step {first:.1f} s", flush=True)


def main() -> None:
    check_gpu(__doc__)
    speed_of_copy = copy_speed()
    print(f"{torch.cuda.get_device_name()}: copy {speed_of_copy / 1e9:.0f} GB/s")
    if len(sys.argv) > 1:
        models = {sys.argv[1]: lambda: Motif.from_pretrained(sys.argv[1], "cuda", torch.bfloat16)}
    else:
        models = {
            "motif_124m.py": lambda: bf16_model(load_config("motif_124m.py")),
            "motif2_12b.py": lambda: bf16_model(load_config("motif2_12b.py",
                                                            "--num_hidden_layers=4"))}
    for name, make_model in models.items():
        model = make_model().requires_grad_(False)
        for compile_steps in False, True:
            model.compile_steps = compile_steps
            for rows in ROWS:
                report(name, model, rows, speed_of_copy)


if __name__ == "__main__":
    run_main(main)
