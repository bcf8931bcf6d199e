"""Is it worth growing a model? `python tests/growth_pays.py OUT --domains=...` trains, for three
seeds, a small Motif, the large one grown from it, and the large one from fresh weights, at equal
total FLOPs, and draws their held-out losses over FLOPs in OUT/growth.png. Options are pretrain.py's
and go to all runs; what is finished is not run again. About half an hour on two cores."""
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import configurator
import pretrain
from model import flops_per_token

# as 2.6B to 12.7B: twice as wide, 1:1 to 4:1 signal heads, a layer after every four
SMALL = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4)
LARGE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=10)
BOTH = dict(num_noise_heads=2, num_key_value_heads=4, head_dim=16, seq_len=128, batch_tokens=2048,
            micro_batch_tokens=2048, warmup_steps=20, eval_every=25, eval_tokens=16384, save_every=10_000,
            log_every=50, sample_tokens=1)
STEPS = 300                          # of the large model from fresh weights
SHARE = 0.25                         # of the FLOPs that the small model gets
SEEDS = 1, 2, 3


def arguments(shape: dict, **options) -> list[str]:
    return [str(Path(pretrain.__file__).parent / "config/quickstart.py"), *sys.argv[2:],
            *(f"--{key}={value}" for key, value in {**BOTH, **shape, **options}.items())]


def flops_of_step(shape: dict) -> float:
    c = configurator.load(pretrain.Config, arguments(shape))
    return c.batch_tokens * sum(flops_per_token(pretrain.model_config(c), c.seq_len))


def train(out: Path, shape: dict, **options) -> tuple[list, list]:
    """Train to the end, or on from where it was cut -> FLOPs and held-out losses (nats per
    token)."""
    subprocess.run([sys.executable, pretrain.__file__, *arguments(shape, out_dir=out, **options)],
                   check=True)
    found = [m for m in map(json.loads, (out / "metrics.jsonl").open()) if "val_loss" in m]
    cost = flops_of_step(shape)
    return [m["step"] * cost for m in found], [m["val_loss"] for m in found]


def main() -> None:
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    where, ends = Path(sys.argv[1]), {"from fresh weights": [], "grown": []}
    axes = plt.figure(figsize=(8, 5), layout="constrained").subplots()
    small_steps = round(SHARE * STEPS * flops_of_step(LARGE) / flops_of_step(SMALL))
    for i, seed in enumerate(SEEDS):
        fresh = train(where / f"fresh-{seed}", LARGE, max_steps=STEPS, seed=seed)
        small = train(where / f"small-{seed}", SMALL, max_steps=small_steps, decay_fraction=0.0,
                      seed=seed)
        grown = train(where / f"grown-{seed}", LARGE, max_steps=round((1 - SHARE) * STEPS),
                      init=f"grow:{where / f'small-{seed}' / f'step_{small_steps}'}", seed=seed)
        grown = [small[0][-1] + x for x in grown[0]], grown[1]
        for (x, y), color, name in (fresh, "C0", "large, from fresh weights"), (
                small, "0.6", "small"), (grown, "C1", "large, grown from the small one"):
            axes.plot(x, y, color=color, lw=1.2, label=name if i == 0 else None)
        ends["from fresh weights"].append(fresh[1][-1])
        ends["grown"].append(grown[1][-1])
    axes.set(xlabel="training FLOPs", ylabel="held-out loss (nats per token)", yscale="log")
    axes.set_yticks([2, 2.5, 3, 4, 5], ["2", "2.5", "3", "4", "5"], minor=False)
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    plt.savefig(where / "growth.png", dpi=110)
    for name, losses in ends.items():
        print(f"{name}: {statistics.fmean(losses):.4f} ({', '.join(f'{x:.4f}' for x in losses)})")


if __name__ == "__main__":
    main()
