"""Does it pay to grow a model?

    python -m tools.growth_pays OUT --domains=...
    python -m tools.growth_pays OUT --size=evidence

For each of three seeds this trains a small Motif, the large one that is grown from it, and the
large one from random weights, at equal FLOPs in all. It draws the held-out losses over the FLOPs in
OUT/growth.png. A run that has ended is not repeated, and one that was cut goes on.

    --size=quickstart    1.2M parameters; about half an hour on two cores
    --size=evidence      154M parameters, and the data of config/evidence.py; for a GPU
    --seeds=1,2,3        these seeds

All other options are those of pretrain.py, and go to every run.
"""
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import configurator
import pretrain
from configurator import UserError
from model import flops_per_token
from support.ranks import run_main

SMALL_SHARE = 0.25   # the small model's part of the FLOPs


class Size(NamedTuple):
    """Two shapes in the proportions of 2.6B and 12.7B: twice the width, signal heads 1:1 to 4:1,
    and one more layer after every four (or five)."""
    config_file: str
    small: dict
    large: dict
    both: dict
    steps: int          # of the large model from random weights


SIZES = {
    "quickstart": Size(
        config_file="config/quickstart.py",
        small={"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4,
               "num_attention_heads": 4},
        large={"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
               "num_attention_heads": 10},
        both={"num_noise_heads": 2, "num_key_value_heads": 4, "head_dim": 16, "seq_len": 128,
              "batch_tokens": 2048, "micro_batch_tokens": 2048, "warmup_steps": 20,
              "eval_every": 25, "eval_tokens": 16384, "save_every": 10_000, "log_every": 50,
              "sample_tokens": 1},
        steps=300),
    "evidence": Size(
        config_file="config/evidence.py",
        small={"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10,
               "num_attention_heads": 4},
        large={},
        both={"tie_word_embeddings": False, "poly_norm_scale": 1 / 16, "eval_every": 50,
              "save_every": 10_000},
        steps=400),
}


def arguments(size: Size, shape: dict, user_options: dict[str, str], **options) -> list[str]:
    """The command line of pretrain.py for a model of this shape."""
    for key in user_options:
        if key in {**shape, **options}:
            raise UserError(f"--{key} differs from run to run here; leave it out")
    config_file = Path(pretrain.__file__).parent / size.config_file
    settings = {**size.both, **user_options, **shape, **options}
    return [str(config_file)] + [f"--{key}={value}" for key, value in settings.items()]


def flops_per_step(size: Size, shape: dict, user_options: dict[str, str]) -> float:
    c = configurator.load(pretrain.Config, arguments(size, shape, user_options))
    forward, backward = flops_per_token(pretrain.model_config(c), c.seq_len)
    return c.batch_tokens * (forward + backward)


def train(out: Path, size: Size, shape: dict, user_options: dict[str, str], **options):
    """Train to the end -> training FLOPs and held-out loss (nats per token) at each evaluation."""
    argv = arguments(size, shape, user_options, out_dir=out, **options)
    subprocess.run([sys.executable, pretrain.__file__, *argv], check=True)
    cost = flops_per_step(size, shape, user_options)

    flops = []
    losses = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "val_loss" in metrics:
            flops.append(metrics["step"] * cost)
            losses.append(metrics["val_loss"])
    return flops, losses


def train_three(out: Path, size: Size, seed: int, user_options: dict[str, str]) -> dict:
    """The three runs of one seed -> name: (FLOPs, losses)."""
    small_cost = flops_per_step(size, size.small, user_options)
    large_cost = flops_per_step(size, size.large, user_options)
    small_steps = round(SMALL_SHARE * size.steps * large_cost / small_cost)
    grown_steps = round((1 - SMALL_SHARE) * size.steps)

    fresh = train(out / f"fresh-{seed}", size, size.large, user_options, max_steps=size.steps,
                  seed=seed)
    # The small model's learning rate does not decay: its training goes on in the large one.
    small = train(out / f"small-{seed}", size, size.small, user_options, max_steps=small_steps,
                  decay_fraction=0.0, seed=seed)
    checkpoint = out / f"small-{seed}" / f"step_{small_steps}"
    flops, losses = train(out / f"grown-{seed}", size, size.large, user_options,
                          max_steps=grown_steps, init=f"grow:{checkpoint}", seed=seed)

    spent_before = small[0][-1]
    grown = [spent_before + x for x in flops], losses
    return {"large, from random weights": fresh, "small": small,
            "large, grown from the small one": grown}


def draw(runs: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    colors = {"large, from random weights": "C0", "small": "0.6",
              "large, grown from the small one": "C1"}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, curves in enumerate(runs):
        for name, (flops, losses) in curves.items():
            label = name if i == 0 else None
            axes.plot(flops, losses, color=colors[name], lw=1.2, label=label)
    axes.set(xlabel="training FLOPs", ylabel="held-out loss (nats per token)", yscale="log")
    axes.set_yticks([2, 2.5, 3, 4, 5, 7, 10], ["2", "2.5", "3", "4", "5", "7", "10"])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("the output folder is missing: python -m tools.growth_pays OUT [--key=...]")
    out = Path(sys.argv[1])
    own = {"size": "quickstart", "seeds": "1,2,3"}
    user_options = {}
    for key, text in configurator.split_options(sys.argv[2:]).items():
        if key in own:
            own[key] = text
        else:
            user_options[key] = text
    if own["size"] not in SIZES:
        raise UserError(f"size={own['size']} must be one of {', '.join(SIZES)}")
    if not re.fullmatch(r"\d+(,\d+)*", own["seeds"]):
        raise UserError(f"seeds={own['seeds']} must be numbers, as in --seeds=1,2,3")

    size = SIZES[own["size"]]
    runs = [train_three(out, size, int(seed), user_options) for seed in own["seeds"].split(",")]
    draw(runs, out / "growth.png")
    for name in ("large, from random weights", "large, grown from the small one"):
        losses = [curves[name][1][-1] for curves in runs]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name}: {statistics.fmean(losses):.4f} ({each})")


if __name__ == "__main__":
    run_main(main)
