"""The pictures that a run draws: loss.png of training, scores.png of evaluation."""
import math
import os
from pathlib import Path

from pretrain import read_metrics


def plot_training(out: Path) -> None:
    """loss.png: losses and mixture over tokens. Without matplotlib there is none."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return
    metrics = read_metrics(out)
    train = [m for m in metrics if m.get("loss") is not None]
    val = [m for m in metrics if "val_loss" in m]
    if not train:
        return
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1),
                                         layout="constrained")
    tokens = [m["tokens"] for m in train]
    top.plot(tokens, [m["loss"] for m in train], color="0.6", lw=1, label="training")
    for name in dict.fromkeys(name for m in val for name in m["val_loss_by_domain"]):
        losses = [m["val_loss_by_domain"].get(name, math.nan) for m in val]
        top.plot([m["tokens"] for m in val], losses, "o-", ms=3, label=f"{name}, held out")
    top.set(ylabel="loss (nats per token)", title=f"{out}: {train[-1]['step']:,d} steps")
    top.legend()
    top.grid(alpha=0.3)
    names = [*dict.fromkeys(name for m in train for name in m["mixture"])]
    bottom.stackplot(tokens, [[m["mixture"].get(name, 0) for m in train] for name in names],
                     labels=names, alpha=0.7)
    bottom.set(xlabel="tokens seen", ylabel="mixture", ylim=(0, 1), xlim=(0, tokens[-1]))
    bottom.legend(loc="center left", fontsize="small")
    figure.savefig(out / "loss.tmp.png", dpi=110)
    plt.close(figure)
    os.replace(out / "loss.tmp.png", out / "loss.png")


def plot_scores(scores: list[tuple], names: list[str], path: Path) -> None:
    """Bits per byte, and below them what is in per cent, over the models, with standard errors."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    bits = "bits per byte"
    kinds = sorted({metric != bits for _, metric, _ in scores})
    figure, axes = plt.subplots(len(kinds), 1, figsize=(8, 3.5 * len(kinds)), sharex=True,
                                squeeze=False, layout="constrained")
    for in_percent, axis in zip(kinds, axes[:, 0]):
        for name, metric, found in scores:
            if in_percent == (metric != bits):
                axis.errorbar(names, [r["value"] for r in found], [r["stderr"] for r in found],
                              fmt="o-", capsize=2, label=f"{name} {metric}".removesuffix(bits))
        axis.set(ylabel="per cent" if in_percent else bits,
                 ylim=(0, max(10 if in_percent else 1, axis.get_ylim()[1])))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
