"""The pictures that a run draws: loss.png of training, scores.png of evaluation."""
import math
import os
from pathlib import Path

from configurator import UserError
from support.log import read_metrics


def plot_training(out: Path) -> None:
    """Draw out/loss.png from out/metrics.jsonl: training loss, held-out loss of each domain and,
    below them, the mixture; all over tokens seen. Without matplotlib there is no picture."""
    plt = import_pyplot()
    metrics = read_metrics(out)
    steps = [m for m in metrics if m.get("loss") is not None]
    evaluations = [m for m in metrics if "val_loss" in m]
    if plt is None or not steps:
        return

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1),
                                         layout="constrained")
    tokens = [m["tokens"] for m in steps]
    top.plot(tokens, [m["loss"] for m in steps], color="0.6", lw=1, label="training")
    evaluated = [m["tokens"] for m in evaluations]
    for name in names_in(evaluations, "val_loss_by_domain"):
        # A domain that came or went during the run leaves a gap in its curve.
        losses = [m["val_loss_by_domain"].get(name, math.nan) for m in evaluations]
        top.plot(evaluated, losses, "o-", ms=3, label=f"{name}, held out")
    # A folder may have any name: with dollar signs, or bytes that are not UTF-8.
    name = str(out).encode("utf-8", "replace").decode()
    top.set_title(f"{name}: {steps[-1]['step']:,d} steps", parse_math=False)
    top.set(ylabel="loss (nats per token)")
    top.legend()
    top.grid(alpha=0.3)

    domains = names_in(steps, "mixture")
    shares = [[m["mixture"].get(name, 0) for m in steps] for name in domains]
    bottom.stackplot(tokens, shares, labels=domains, alpha=0.7)
    bottom.set(xlabel="tokens seen", ylabel="mixture", ylim=(0, 1), xlim=(0, tokens[-1]))
    bottom.legend(loc="center left", fontsize="small")

    figure.savefig(out / "loss.tmp.png", dpi=110)
    plt.close(figure)
    os.replace(out / "loss.tmp.png", out / "loss.png")


def import_pyplot():
    """matplotlib.pyplot, which draws into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot
    return pyplot


def names_in(metrics: list[dict], key: str) -> list[str]:
    """The domains that occur under this key, in order of appearance."""
    names = {}
    for m in metrics:
        names.update(m[key])
    return list(names)


def plot_scores(scores: list[tuple], names: list[str], path: Path) -> None:
    """Draw scores with their standard errors over the models: bits per byte and, below them, what
    is in per cent.

    scores: (task, metric, [{"value": ..., "stderr": ...} of each model]); names: of the models."""
    plt = import_pyplot()
    if plt is None:
        raise UserError("--plot needs: pip install matplotlib")
    bits = "bits per byte"
    panels = []
    for unit in (bits, "per cent"):
        rows = [row for row in scores if (row[1] == bits) == (unit == bits)]
        if rows:
            panels.append((unit, rows))

    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 3.5 * len(panels)), sharex=True,
                                squeeze=False, layout="constrained")
    for (unit, rows), axis in zip(panels, axes[:, 0]):
        for task, metric, of_models in rows:
            values = [score["value"] for score in of_models]
            errors = [score["stderr"] or 0.0 for score in of_models]    # None for one question
            axis.errorbar(names, values, errors, fmt="o-", capsize=2,
                          label=f"{task} {metric}".removesuffix(bits))
        least_top = 1 if unit == bits else 10
        axis.set(ylabel=unit, ylim=(0, max(least_top, axis.get_ylim()[1])))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
