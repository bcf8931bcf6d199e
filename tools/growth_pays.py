"""Does it pay to grow a model?

    python -m tools.growth_pays OUT [--domains=...]
    python -m tools.growth_pays OUT --size=evidence

For each of three seeds this trains a small Motif, the large one that is grown from it, and the
large one from random weights, at equal FLOPs in all. It draws the held-out losses over the FLOPs in
OUT/growth.png. A run that has ended is not repeated. One that Ctrl-C or SIGTERM ended goes on, and
one that was killed begins anew.

    --size=quickstart    1.2M parameters; about half an hour on two cores
    --size=evidence      154M parameters, and the data of config/evidence.py; for a GPU
    --seeds=1,2,3        these seeds

All other options are those of pretrain.py, such as domains of your own, and go to every run.
"""
import math
import re
import signal
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import configurator
import pretrain
from configurator import UserError
from model import flops_per_token
from support.log import read_metrics
from support.ranks import run_main
from tools.ablate import Run, check_folder
from tools.plots import import_pyplot

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


# Options of pretrain.py that would make the three runs other than they have to be.
REFUSED = ("max_tokens", "eval_every", "save_every", "resume", "export", "dry_run")


def plan_runs(out: Path, size: Size, seed: int, user_options: dict[str, str]) -> dict[str, Run]:
    """The three runs of one seed, in their order."""
    plan = partial(plan_run, out, size, seed, user_options)
    fresh = plan("fresh", size.large, max_steps=size.steps)
    cost_of_small = flops_per_step(plan("small", size.small))
    small_steps = round(SMALL_SHARE * size.steps * flops_per_step(fresh) / cost_of_small)
    # The small model's learning rate does not decay: its training goes on in the large one.
    small = plan("small", size.small, max_steps=small_steps, decay_fraction=0.0)
    grown = plan("grown", size.large, max_steps=round((1 - SMALL_SHARE) * size.steps),
                 init=f"grow:{small.folder}/step_{small_steps}")
    return {"fresh": fresh, "small": small, "grown": grown}


def plan_run(out: Path, size: Size, seed: int, user_options: dict[str, str], name: str,
             shape: dict, **options) -> Run:
    """One run: the config file, what both sizes share, the user's options, and these."""
    folder = out / f"{name}-{seed}"
    own = {**shape, **options, "seed": seed, "out_dir": folder}
    for key in user_options:
        if key in own or key in REFUSED:
            raise UserError(f"--{key} is what this tool sets itself; leave it out")
    settings = {**size.both, **user_options, **own}
    config_file = Path(pretrain.__file__).parent / size.config_file
    argv = [str(config_file)] + [f"--{key}={value}" for key, value in settings.items()]
    config = configurator.load(pretrain.Config, argv)
    if isinstance(config.seq_len, list) or isinstance(config.batch_tokens, list):
        raise UserError("seq_len and batch_tokens must be numbers, or FLOPs would not compare")
    return Run(name, seed, options, argv, config, folder)


def flops_per_step(run: Run) -> float:
    """FLOPs of a training step, forward and backward."""
    c = run.config
    return c.batch_tokens * sum(flops_per_token(pretrain.model_config(c), c.seq_len))


def train(run: Run) -> None:
    """Train to the end. Ctrl-C reaches pretrain.py too, which saves what it has, and is waited for;
    SIGTERM is handed on to it."""
    if is_whole(run):
        return
    process = subprocess.Popen([sys.executable, pretrain.__file__, *run.argv])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise UserError("interrupted; run the same command to go on") from None
    if status or not is_whole(run):
        raise UserError(f"{run} was not trained to its end; see above")


def is_whole(run: Run) -> bool:
    """Whether it has its last checkpoint, which comes after its last evaluation."""
    steps = pretrain.make_curriculum(run.config).steps
    return (run.folder / f"step_{steps}").exists()


def curve(run: Run) -> tuple[list[float], list[float]]:
    """Its training FLOPs and its held-out loss (nats per token) at each evaluation."""
    evaluations = [m for m in read_metrics(run.folder) if "val_loss" in m]
    flops = [m["step"] * flops_per_step(run) for m in evaluations]
    # metrics.jsonl has null for a loss that was not finite.
    losses = [math.nan if m["val_loss"] is None else m["val_loss"] for m in evaluations]
    return flops, losses


def three_curves(runs: dict[str, Run]) -> dict:
    """Label -> the curve of a run, of one seed."""
    small = curve(runs["small"])
    flops, losses = curve(runs["grown"])
    spent_before = small[0][-1]
    return {"large, from random weights": curve(runs["fresh"]), "small": small,
            "large, grown from the small one": ([spent_before + x for x in flops], losses)}


def draw(found: list[dict], path: Path) -> None:
    """Draw the curves of each seed, as three_curves gives them."""
    plt = import_pyplot()
    if plt is None:
        print("no picture, as there is no matplotlib")
        return
    colors = {"large, from random weights": "C0", "small": "0.6",
              "large, grown from the small one": "C1"}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, curves in enumerate(found):
        for name, (flops, losses) in curves.items():
            label = name if i == 0 else None
            axes.plot(flops, losses, color=colors[name], lw=1.2, label=label)
    axes.set(xlabel="training FLOPs", ylabel="held-out loss (nats per token)", yscale="log")
    lowest, highest = axes.get_ylim()
    ticks = [loss for loss in (1, 1.5, 2, 2.5, 3, 4, 5, 7, 10) if lowest <= loss <= highest]
    if len(ticks) > 1:
        axes.set_yticks(ticks, [f"{loss:g}" for loss in ticks])
        axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    if not argv or argv[0].startswith("-"):
        raise UserError("the output folder is missing: python -m tools.growth_pays OUT [--key=...]")
    out = Path(argv[0]).absolute()
    own = {"size": "quickstart", "seeds": "1,2,3"}
    user_options = {}
    for key, text in configurator.split_options(argv[1:]).items():
        if key in own:
            own[key] = text
        else:
            user_options[key] = text
    if own["size"] not in SIZES:
        raise UserError(f"size={own['size']} must be one of {', '.join(SIZES)}")
    if not re.fullmatch(r"\d+(,\d+)*", own["seeds"]):
        raise UserError(f"seeds={own['seeds']} must be numbers, as in --seeds=1,2,3")

    # A cluster's SIGTERM is answered as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seeds = [int(seed) for seed in own["seeds"].split(",")]
    planned = [plan_runs(out, SIZES[own["size"]], seed, user_options) for seed in seeds]
    for runs in planned:
        for run in runs.values():
            check_folder(run)
    for runs in planned:
        for run in runs.values():
            train(run)

    found = [three_curves(runs) for runs in planned]
    for name in ("large, from random weights", "large, grown from the small one"):
        losses = [one[name][1][-1] for one in found]
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name}: {statistics.fmean(losses):.4f} ({each})")
    draw(found, out / "growth.png")


if __name__ == "__main__":
    run_main(main)
