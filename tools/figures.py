"""Draw the figures of the ideas into assets/.

    python -m tools.figures [--checkpoint=out/quickstart/step_280]

    newton_schulz.png   singular values before and after each Newton-Schulz step
    poly_norm.png       PolyNorm beside other activations; of a checkpoint, as each layer learnt it
    heads.png           the heads of one group, and their attention maps on a toy sequence
    evidence/what_pays.png   what each idea does to the loss, from assets/evidence/runs.csv

Everything else is computed by the code of the project or, for the attention maps, from numbers made
up here. It needs no data and takes a few seconds.
"""
import argparse
import statistics
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from model import Motif, poly_norm
from muonclip import newton_schulz
from tools.ablate import Summary, summarize

ASSETS = Path(__file__).parents[1] / "assets"
DPI = 110

SIGNAL = "#3b75af"
NOISE = "#d9822b"
VALUE = "#4f9a5b"
NEUTRAL = "#555555"


def save(figure, name: str) -> None:
    figure.savefig(ASSETS / name, dpi=DPI)
    plt.close(figure)
    print(ASSETS / name)


# ---- Newton-Schulz

def draw_newton_schulz() -> None:
    """One panel for each table of coefficients; one curve for each number of steps."""
    torch.manual_seed(0)
    G = torch.randn(512, 512)
    colors = plt.get_cmap("viridis")(torch.linspace(0.9, 0, 6))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")

    for axes, table in zip(panels, ("motif", "quintic")):
        values = torch.linalg.svdvals(G / G.norm())
        axes.plot(values, color=colors[0], label="before")
        for steps in range(1, 6):
            O = newton_schulz(G, steps, table, dtype=torch.float32)
            values = torch.linalg.svdvals(O)
            axes.plot(values, color=colors[steps], label=f"after step {steps}")
        axes.axhline(1, color="0.5", lw=0.8, ls="--")
        axes.set(yscale="log", ylim=(3e-5, 3), xlabel="index, from the largest to the smallest")
        axes.set_title(f'coefficients "{table}"', fontsize="medium")
        axes.grid(alpha=0.3)

    panels[0].set_ylabel("singular value")
    panels[0].legend(loc="lower left", fontsize="small")
    figure.suptitle("Newton-Schulz on a random 512 x 512 matrix: five steps bring nearly all "
                    "singular values close to 1", fontsize="medium")
    save(figure, "newton_schulz.png")


# ---- PolyNorm

def normal_quantiles(n: int) -> Tensor:
    """A vector of n numbers, in rising order, that are distributed as the standard normal."""
    probability = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(probability)


def draw_poly_norm(checkpoint: str | None) -> None:
    """PolyNorm divides each power of x by its RMS over the vector, so that its curve depends on the
    vector. It is drawn for a standard normal one."""
    x = normal_quantiles(4096)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)

    count = 2 if checkpoint else 1
    figure, panels = plt.subplots(1, count, figsize=(4.8 * count, 3.8), squeeze=False,
                                  layout="constrained")
    axes = panels[0, 0]
    axes.plot(x, poly_norm(x, third, zero), color=SIGNAL, lw=2, label="PolyNorm, weights 1/3")
    axes.plot(x, F.silu(x), color=NOISE, label="SiLU")
    axes.plot(x, F.relu(x) ** 2, color=VALUE, label="ReLU²")
    axes.set(xlim=(-3, 3), ylim=(-3, 5), ylabel="y")
    axes.set_title("weights of 1/3; training begins at 1/16 of them", fontsize="medium")
    axes.legend(fontsize="small")

    if checkpoint:
        axes = panels[0, 1]
        layers = Motif.from_pretrained(checkpoint, dtype=torch.float64).model.layers
        colors = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(layers)))
        for i, block in enumerate(layers):
            act = block.mlp.act_fn
            y = poly_norm(x, act.weight, act.bias, act.eps).detach()
            axes.plot(x, y, color=colors[i], label=f"layer {i}")
        folder = Path(checkpoint).resolve()
        title = f"as learnt by {folder.parent.name}/{folder.name} (another scale)"
        axes.set_title(title, fontsize="medium")
        axes.set_xlim(-3, 3)
        axes.legend(fontsize="small")

    for axes in panels[0]:
        axes.axhline(0, color="0.5", lw=0.8)
        axes.axvline(0, color="0.5", lw=0.8)
        axes.set_xlabel("x, one entry of a standard normal vector")
        axes.grid(alpha=0.3)
    figure.suptitle("PolyNorm normalises each power over the whole vector: the curves hold for a "
                    "standard normal one", fontsize="medium")
    save(figure, "poly_norm.png")


# ---- grouped differential attention

def box(axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """A labelled box with its lower left corner at (x, y)."""
    axes.add_patch(FancyBboxPatch((x, y), width, 0.7, boxstyle="round,pad=0,rounding_size=0.12",
                                  facecolor=color, edgecolor="none"))
    axes.text(x + width / 2, y + 0.33, text, color="white", ha="center", va="center", fontsize=9)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.annotate("", xy=end, xytext=start,
                  arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.1, "shrinkA": 0,
                              "shrinkB": 0})


def draw_layout(axes) -> None:
    """The heads of one group, from the queries at the top to the outputs at the bottom."""
    axes.set(xlim=(-0.1, 8.1), ylim=(-0.2, 6.9), aspect="equal")
    axes.axis("off")

    # Queries: four signal heads and the group's noise head.
    for c in range(4):
        box(axes, 1.2 * c, 5.6, 1.0, f"q{c + 1}", SIGNAL)
        arrow(axes, (1.2 * c + 0.5, 5.55), (1.8 + 0.2 * c, 4.55), SIGNAL)
    box(axes, 5.8, 5.6, 1.4, "q noise", NOISE)
    arrow(axes, (6.5, 5.55), (6.5, 4.55), NOISE)
    axes.text(2.3, 6.55, "4 signal heads", color=SIGNAL, ha="center", fontsize=9)
    axes.text(6.5, 6.55, "1 noise head", color=NOISE, ha="center", fontsize=9)

    # The pair's keys, one for each kind of head.
    box(axes, 1.6, 3.8, 1.0, "k1", SIGNAL)
    box(axes, 6.0, 3.8, 1.0, "k2", NOISE)
    axes.text(4.3, 4.15, "pair of key heads,\neach D wide", color=NEUTRAL, ha="center",
              va="center", fontsize=8)

    # Both maps read the pair's one value head.
    arrow(axes, (2.1, 3.75), (3.6, 2.75), SIGNAL)
    arrow(axes, (6.5, 3.75), (5.0, 2.75), NOISE)
    axes.text(2.5, 3.1, "4 maps", color=SIGNAL, ha="right", fontsize=8)
    axes.text(6.1, 3.1, "1 map", color=NOISE, ha="left", fontsize=8)
    box(axes, 3.3, 2.0, 2.0, "v", VALUE)
    axes.text(5.45, 2.33, "values, 2D wide", color=VALUE, va="center", fontsize=8)

    arrow(axes, (4.3, 1.95), (4.3, 1.4), NEUTRAL)
    axes.text(4.3, 1.15, "signal$_c$ − λ · noise", ha="center", va="center", fontsize=9.5)
    for c in range(4):
        box(axes, 0.6 + 1.9 * c, 0.0, 1.7, f"out {c + 1}", NEUTRAL)
        arrow(axes, (4.3, 0.95), (1.45 + 1.9 * c, 0.72), NEUTRAL)


def toy_maps(lambda_: float) -> tuple[list[str], list[Tensor]]:
    """Tokens, and three attention maps (T, T) over them: signal, noise, signal - lambda noise.

    The numbers are made up to show the idea; no model computed them. Both heads have the same
    background: the first token, the comma and the token itself draw attention whatever is asked.
    The signal head alone finds what belongs to each token. The difference keeps just that."""
    tokens = ["Ann", "has", "a", "red", "hat", ",", "Bob", "a", "blue", "hat"]
    T = len(tokens)
    background = torch.zeros(T, T)
    background[:, 0] = 1.5
    background[:, 5] = 1.5
    background += torch.eye(T)

    relevant = torch.zeros(T, T)
    related = {1: [0], 3: [2], 4: [3, 1], 6: [1], 7: [2], 8: [3], 9: [8, 6]}
    for query, keys in related.items():
        relevant[query, keys] = 2.8

    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    signal = (background + relevant).masked_fill(future, -torch.inf).softmax(-1)
    noise = background.masked_fill(future, -torch.inf).softmax(-1)
    return tokens, [signal, noise, signal - lambda_ * noise]


def draw_heads() -> None:
    lambda_ = 0.6
    figure = plt.figure(figsize=(12.6, 3.7), layout="constrained")
    layout, *panels = figure.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
    draw_layout(layout)
    layout.set_title("One group: 5 query heads, 1 pair of key heads", fontsize=10)

    tokens, maps = toy_maps(lambda_)
    titles = ("signal map", "noise map", f"signal − {lambda_} · noise")
    for axes, title, weights in zip(panels, titles, maps):
        image = axes.imshow(weights, cmap="RdBu_r", vmin=-0.6, vmax=0.6)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=8)
        axes.set_xlabel("key", fontsize=8)
    panels[0].set_ylabel("query", fontsize=8)
    figure.colorbar(image, ax=panels, extend="max", shrink=0.8, aspect=25,
                    label="attention weight")
    figure.suptitle("Grouped differential attention (the maps are a toy with made-up numbers)",
                    fontsize=11)
    save(figure, "heads.png")


# ---- does each idea pay?

COMMON = "4to1-swiglu"      # with MuonClip and the curriculum
# What is changed in it -> the runs.
WHAT_PAYS = {
    "grouped-query attention": "gqa-swiglu",
    "2 signal heads to a noise head": "2to1-swiglu",
    "1 signal head to a noise head": "1to1-swiglu",
    "PolyNorm, begun as in its paper": "4to1-polynorm",
    "PolyNorm, begun at 1/16 of that": "polynorm-scale0.0625",
    "AdamW instead of MuonClip": "4to1-swiglu-adamw-lr1e-3-embed4e-3-warmup100",
    "the curriculum's mean mixture": "mean",
    "the curriculum backwards": "reversed",
}


def mean_curve(runs: Summary) -> dict[float, float]:
    """Million tokens -> the mean held-out loss of the seeds that have one there; without that of
    random weights. (Of one seed only the last loss is known.)"""
    losses = {}
    for point in chain(*runs.curves):
        if int(point["tokens"]) > 0:
            losses.setdefault(int(point["tokens"]) / 1e6, []).append(float(point["loss"]))
    return {tokens: statistics.fmean(values) for tokens, values in losses.items()}


def draw_what_pays() -> None:
    """On the left the differences while the runs were trained, on the right at their end, a dot for
    each seed. Above 0, or right of it, the common configuration is better."""
    by_name = {}            # a name in several grids stands for the same runs
    for summaries in summarize(ASSETS / "evidence").values():
        by_name.update({summary.name: summary for summary in summaries})
    common = mean_curve(by_name[COMMON])
    common_loss = statistics.fmean(by_name[COMMON].losses())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[2, 3],
                                         layout="constrained")
    for i, (label, name) in enumerate(WHAT_PAYS.items()):
        color = f"C{i}"
        curve = mean_curve(by_name[name])
        above = [loss - common[tokens] for tokens, loss in curve.items()]
        left.plot(list(curve), above, "o-", ms=3, lw=1.2, color=color)
        differences = [loss - common_loss for loss in by_name[name].losses()]
        right.plot(differences, [i] * len(differences), "o", ms=5, alpha=0.6, color=color)
        mean = statistics.fmean(differences)
        right.text(max(differences) + 0.006, i, f"{mean:+.3f}", va="center", fontsize="small",
                   color=color)
    left.set(xlabel="million tokens seen", ylabel="nats per token")
    left.set_ylim(-0.1, 0.45)       # AdamW begins at 1
    left.set_title("while trained (colours as on the right)", fontsize="medium")
    right.set_yticks(range(len(WHAT_PAYS)), list(WHAT_PAYS))
    right.set_ylim(len(WHAT_PAYS) - 0.5, -0.5)
    right.set_xlim(-0.02, 0.31)
    right.set_xlabel("nats per token")
    right.set_title("after the last step", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.axhline(0, color="0.5", lw=0.8)
    right.axvline(0, color="0.5", lw=0.8)
    figure.suptitle("Held-out loss minus that of 4:1 differential attention, SwiGLU, MuonClip and "
                    "the curriculum", fontsize="medium")
    save(figure, "evidence/what_pays.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the figures of the ideas into assets/")
    parser.add_argument("--checkpoint", help="a model folder, whose PolyNorm is drawn too")
    options = parser.parse_args()

    draw_newton_schulz()
    draw_poly_norm(options.checkpoint)
    draw_heads()
    draw_what_pays()


if __name__ == "__main__":
    main()
