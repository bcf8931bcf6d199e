"""Does an idea pay? A grid of training runs, on all GPUs of a machine.

    python -m tools.ablate GRID OUT [--key=value ...]
    python -m tools.ablate --table OUT

A GRID is a small file, such as config/grids/attention.py, that says how runs differ:

    axes = [
        {"gqa": {"num_attention_heads": 8, "num_noise_heads": 0}, "4to1": {}},
        {"swiglu": {"activation": "swiglu"}, "polynorm": {"activation": "poly_norm"}},
    ]
    seeds = [1, 2]

makes eight runs: gqa-swiglu, gqa-polynorm, 4to1-swiglu and 4to1-polynorm, each with both seeds.
Options are keys of the grid (see Grid) or of pretrain.py; the latter go to every run.

The folder of a run is OUT/<name>-seed<seed>. A run that has ended is not repeated, and one that was
cut goes on from its checkpoint, or begins anew if it has none. So the same command goes on with a
grid, and grids that share OUT share the runs that they have in common.

Each run that ends adds a line to OUT/runs.csv, its held-out curve to OUT/curves.csv, and what
became of PolyNorm's weights to OUT/poly_norm.csv. From these files alone --table prints a table for
each grid, and draws OUT/curves.png and OUT/poly_norm.png. They also tell which runs have ended:
where the folders are gone, a run with a line in runs.csv is not repeated either.
"""
import csv
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import configurator
import pretrain
from configurator import NonNegative, UserError
from model import Motif, flops_per_token
from support.log import read_metrics, replace_text
from support.ranks import run_main
from tools.plots import import_pyplot

# ---- the grid

@dataclass
class Grid:
    """What the runs share, and what they differ in."""
    base: str = "config/evidence.py"    # the config file of pretrain.py that all runs have
    axes: list = field(default_factory=list)   # [{name: {key: value}}, ...]: a run for every
                                        # combination, one name from each axis, called "name-name";
                                        # the name "" adds nothing
    runs: dict = field(default_factory=dict)   # name -> {key: value}: more runs
    seeds: list = field(default_factory=lambda: [1337])
    baseline: str | None = None         # the run that others are compared with; None: the first
    max_minutes: NonNegative | None = None  # no run begins that would not end by then, if it took
                                        # as long as the longest so far
    overlap_seconds: NonNegative = 0    # a card gets its next run so long before the last one
                                        # ends: then it imports and compiles while the card still
                                        # works. There must be memory for both


def cells(grid: Grid) -> dict[str, dict]:
    """Name -> what the runs of that name set. Later axes come after earlier ones, in names and in
    settings:

    >>> attention = {"gqa": {"num_noise_heads": 0}, "4to1": {}}
    >>> for name, settings in cells(Grid(axes=[attention, {"": {}, "fast": {"lr": 0.1}}])).items():
    ...     print(name, settings)
    gqa {'num_noise_heads': 0}
    gqa-fast {'num_noise_heads': 0, 'lr': 0.1}
    4to1 {}
    4to1-fast {'lr': 0.1}
    """
    found = {}
    if grid.axes:
        for choice in itertools.product(*[axis.items() for axis in grid.axes]):
            name = "-".join(part for part, _ in choice if part)
            if name in found:
                raise UserError(f"two combinations of the axes are called {name!r}")
            found[name] = {}
            for _, settings in choice:
                found[name].update(settings)
    for name, settings in grid.runs.items():
        if name in found:
            raise UserError(f"the axes and runs both have {name!r}")
        found[name] = settings

    for name in found:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"the name {name!r} must be letters, digits, '_', '-' and '.', as a "
                            "folder is named after it")
    return found


# Keys that say where a run is and what it keeps, not what it computes. Neither the table nor a
# comparison has them.
PLACES = {"out_dir", "data_dir", "resume", "device", "workers", "timeout_seconds", "wandb",
          "save_every"}


class Run(NamedTuple):
    """One training run."""
    name: str
    seed: int
    overrides: dict             # what it sets, and the base file does not
    argv: list[str]             # the command line of pretrain.py
    config: pretrain.Config
    folder: Path

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"


def plan_runs(grid: Grid, out: Path, options: dict[str, str]) -> list[Run]:
    """All runs of the grid: each name once, then each with the next seed. options: of pretrain.py,
    for every run."""
    planned = []
    for seed in grid.seeds:
        for name, settings in cells(grid).items():
            for key in options:
                if key in settings:
                    raise UserError(f"--{key} is what the grid varies: {name} sets it; change the "
                                    "grid")
                if key in ("seed", "out_dir"):
                    raise UserError(f"--{key} differs from run to run; give --seeds=[...] and OUT")
            folder = out / f"{name}-seed{seed}"
            values = {**options, **settings, "seed": seed, "out_dir": folder}
            argv = [grid.base] + [f"--{key}={value}" for key, value in values.items()]
            config = configurator.load(pretrain.Config, argv)
            if config.eval_every is None:
                raise UserError("a grid compares held-out losses: it needs eval_every")

            overrides = {}
            for key in [*options, *settings]:
                if key not in PLACES:
                    overrides[key] = getattr(config, key)
            planned.append(Run(name, seed, overrides, argv, config, folder))
    return planned


def has_ended(run: Run) -> bool:
    """Whether the run has made its last evaluation."""
    steps = pretrain.make_curriculum(run.config).steps
    for metrics in read_metrics(run.folder):
        if metrics["step"] == steps and "val_loss" in metrics:
            return True
    return False


def check_folder(run: Run) -> None:
    """UserError if the run's folder holds a run of other settings, which the table would mix up
    with this one."""
    path = run.folder / "config.json"
    if not path.exists():
        return
    old = json.loads(path.read_text())
    new = json.loads(json.dumps(asdict(run.config)))
    for key, value in new.items():
        if key not in PLACES and old.get(key, value) != value:
            raise UserError(f"{run.folder} holds a run with {key}={old[key]}, not {value}; delete "
                            "it, or give another OUT or name")


# ---- running it
#
# Each run is a process of its own, which sees one GPU. As soon as it has ended, or overlap_seconds
# before it will, the next one gets the GPU. What a run prints goes to output.txt in its folder.
# This process only waits, and keeps a note beside that, ablate.json: on which card the run was, the
# date, and once it has ended how many seconds its last process took, with compiling and
# evaluations.

POLL_SECONDS = 0.2
REPORT_SECONDS = 30


class Job(NamedTuple):
    """A run on its way."""
    run: Run
    card: str | None            # as CUDA_VISIBLE_DEVICES has it; None: no GPU
    process: subprocess.Popen
    begun: float
    metrics_before: int | None  # when metrics.jsonl was last written before it began, if it was


def find_cards(device: str) -> list[str | None]:
    """The GPUs to run on, as CUDA_VISIBLE_DEVICES names them; [None] for one run at a time on the
    CPU or on MPS."""
    if device in ("cpu", "mps") or not torch.cuda.is_available():
        return [None]
    if ":" in device:
        raise UserError(f"--device={device} is one GPU; to choose some, set CUDA_VISIBLE_DEVICES")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


class Preparation:
    """Prepares what the runs read, one data set after the other: runs that begin at the same time
    would each do so. The first runs train while the data of later ones are prepared. If that fails,
    the run will, and say why."""

    def __init__(self, runs: list[Run]):
        self.waiting = {}                   # data_key -> the first run that reads these data
        for run in runs:
            self.waiting.setdefault(data_key(run), run)
        self.current = None                 # the data_key of what is being prepared
        self.process = None

    def go_on(self) -> None:
        """Begin the next data set if the last one is done."""
        if self.process is not None and self.process.poll() is None:
            return
        self.current = self.process = None
        if self.waiting:
            self.current = next(iter(self.waiting))
            run = self.waiting.pop(self.current)
            print(f"preparing the data of {run}", flush=True)
            command = [sys.executable, "-m", "tools.prepare", *run.argv]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL)

    def is_done(self, run: Run) -> bool:
        key = data_key(run)
        return key not in self.waiting and key != self.current

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def data_key(run: Run) -> str:
    """Runs with the same key read the same data. (The seed is also that of the order in which a
    domain is read.)"""
    c = run.config
    return str([c.domains, c.mixture, c.tokenizer, c.data_dir, c.seq_len, c.batch_tokens,
                c.max_steps, c.max_tokens, c.seed])


def run_all(todo: list[Run], planned: list[Run], out: Path, grid: Grid,
            grid_name: str) -> list[Run]:
    """Run what is to do of the planned runs, as far as the time allows -> those that failed."""
    begun = time.monotonic()
    cards = find_cards(todo[0].config.device)
    if cards == [None]:
        card_name = pretrain.pick_device(todo[0].config).type.upper()
    else:
        card_name = torch.cuda.get_device_name()
    print(f"{len(todo)} runs on {len(cards)} x {card_name}", flush=True)

    preparation = Preparation(todo)
    reported = begun
    waiting = list(todo)
    running = []
    failed = []
    try:
        while waiting or running:
            in_time = has_time(grid.max_minutes, begun, planned)
            if not running and not in_time:
                break
            preparation.go_on()
            for card in free_cards(cards, running, grid.overlap_seconds):
                if waiting and in_time and preparation.is_done(waiting[0]):
                    running.append(start(waiting.pop(0), card, card_name))
                    print(f"started {running[-1].run}; {len(waiting)} wait", flush=True)

            time.sleep(POLL_SECONDS)
            for job in list(running):
                if job.process.poll() is None:
                    continue
                running.remove(job)
                if has_ended(job.run):
                    report_end(job)
                    add_to_tables(out, [job.run], grid, grid_name)
                else:
                    failed.append(job.run)
                    print(f"failed {job.run}: {last_words(job.run)}", flush=True)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                report_progress(running)
    finally:
        # Ctrl-C, say: let them save and end.
        preparation.stop()
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
    return failed


def free_cards(cards: list[str | None], running: list[Job],
               overlap_seconds: float) -> list[str | None]:
    """The cards that can have another run."""
    free = []
    for card in cards:
        jobs = [job for job in running if job.card == card]
        if not jobs or (len(jobs) == 1 and seconds_left(jobs[0]) < overlap_seconds):
            free.append(card)
    return free


def seconds_left(job: Job) -> float:
    """How long the run will go on, by the median speed of its logged lines; infinite while it has
    fewer than three. What a process before this one has left there does not count until this one
    has written to the file."""
    path = job.run.folder / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime_ns == job.metrics_before:
        return math.inf
    logged = [m for m in read_metrics(job.run.folder) if "tok_per_s" in m]
    if len(logged) < 3:
        return math.inf
    tokens_left = pretrain.make_curriculum(job.run.config).tokens[-1] - logged[-1]["tokens"]
    return tokens_left / median_speed(logged)


def start(run: Run, card: str | None, card_name: str) -> Job:
    """Start pretrain.py on a card."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_note(run, {"card": card_name, "date": date.today().isoformat(), "seconds": None})
    environment = dict(os.environ)
    if card is not None:
        environment["CUDA_VISIBLE_DEVICES"] = card
    metrics = run.folder / "metrics.jsonl"
    metrics_before = metrics.stat().st_mtime_ns if metrics.exists() else None
    with open(run.folder / "output.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, pretrain.__file__, *run.argv], stdout=output,
                                   stderr=subprocess.STDOUT, env=environment)
    return Job(run, card, process, time.monotonic(), metrics_before)


def report_end(job: Job) -> None:
    """Print what a run has come to, and note how long it took."""
    seconds = time.monotonic() - job.begun
    write_note(job.run, {**read_note(job.run), "seconds": seconds})
    loss = [m["val_loss"] for m in read_metrics(job.run.folder) if "val_loss" in m][-1]
    print(f"ended {job.run} after {seconds:.0f} s: held-out loss {show_loss(loss)}", flush=True)


def show_loss(loss: float | None) -> str:
    """For a loss that was not finite metrics.jsonl has null."""
    return "not finite" if loss is None else f"{loss:.4f}"


def write_note(run: Run, note: dict) -> None:
    replace_text(run.folder / "ablate.json", json.dumps(note))


def read_note(run: Run) -> dict:
    """What write_note has written; all unknown for a run that was started by hand."""
    path = run.folder / "ablate.json"
    if path.exists():
        return json.loads(path.read_text())
    return {"card": "", "date": "", "seconds": None}


def has_time(max_minutes: float | None, begun: float, runs: list[Run]) -> bool:
    """Whether one more run would end in time, if it took as long as the longest so far. Of the
    first runs nothing is known: they begin."""
    if max_minutes is None:
        return True
    longest = max(read_note(run)["seconds"] or 0 for run in runs)
    return time.monotonic() - begun + longest < 60 * max_minutes


def last_words(run: Run) -> str:
    """The last line that a run has printed."""
    text = (run.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    words = [line for line in lines if line.strip()]
    return f"{words[-1] if words else 'it printed nothing'} ({run.folder}/output.txt)"


def report_progress(running: list[Job]) -> None:
    """Print the last logged line of each run that is on its way."""
    for job in running:
        logged = [m for m in read_metrics(job.run.folder) if "loss" in m]
        if logged:
            m = logged[-1]
            steps = pretrain.make_curriculum(job.run.config).steps
            print(f"  {job.run}: step {m['step']}/{steps}, loss {show_loss(m['loss'])}, "
                  f"{m['tok_per_s']:,.0f} tok/s", flush=True)


# ---- runs.csv, curves.csv and poly_norm.csv
#
# All that the table and the pictures need, small enough to be kept with the code:
#
#     runs.csv       a line for each run of each grid. overrides and loss_by_domain are JSON;
#                    tok_per_s is the median of the logged lines; flops_per_token counts forward and
#                    backward pass; loss is held out, in nats per token, after the last step
#     curves.csv     a line for each evaluation of each run: tokens seen, loss
#     poly_norm.csv  for each layer at each evaluation of each run with PolyNorm: its weights of
#                    x^3, x^2 and x, and its bias
#
# A speed that means nothing, since the run shared its card, is to be emptied by hand. A run that
# several grids have in common has a line in runs.csv for each of them.

RUN_COLUMNS = ["grid", "name", "seed", "baseline", "base", "overrides", "parameters",
               "flops_per_token", "tokens", "tok_per_s", "loss", "loss_by_domain", "date", "card"]
CURVE_COLUMNS = ["name", "seed", "tokens", "loss"]
POLY_NORM_COLUMNS = ["name", "seed", "tokens", "layer", "w3", "w2", "w1", "b"]


def read_csv(path: Path) -> list[dict]:
    """The lines of a table, as {column: text}; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_by_run(path: Path) -> dict[tuple[str, str], list[dict]]:
    """(name, seed) -> its lines."""
    runs = {}
    for row in read_csv(path):
        runs.setdefault((row["name"], row["seed"]), []).append(row)
    return runs


def write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Write a table, which appears under its name only when it is complete."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        # Older files have columns that are gone.
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def add_to_tables(out: Path, runs: list[Run], grid: Grid, grid_name: str) -> None:
    """Write what has ended of these runs into the files, in place of what they have of them. All
    other lines stay, also of runs whose folders are gone."""
    rows = {}
    for row in read_csv(out / "runs.csv"):
        rows[row["grid"], row["name"], row["seed"]] = row
    curves = read_by_run(out / "curves.csv")
    weights = read_by_run(out / "poly_norm.csv")

    baseline = grid.baseline or next(iter(cells(grid)))
    for run in runs:
        seed = str(run.seed)
        row = recorded_row(run, rows.values())
        if has_ended(run):
            row = measure(run)
            curves[run.name, seed] = measure_curve(run)
            weights[run.name, seed] = measure_poly_norm(run)
        if row is not None:
            # To the end: so the lines of a grid come to stand in the order of its runs.
            rows.pop((grid_name, run.name, seed), None)
            rows[grid_name, run.name, seed] = {**row, "grid": grid_name, "baseline": baseline}

    write_csv(out / "runs.csv", RUN_COLUMNS, list(rows.values()))
    write_csv(out / "curves.csv", CURVE_COLUMNS, list(itertools.chain(*curves.values())))
    write_csv(out / "poly_norm.csv", POLY_NORM_COLUMNS, list(itertools.chain(*weights.values())))


def recorded_row(run: Run, rows) -> dict | None:
    """The line that runs.csv has of this run, for whatever grid. UserError if that run had other
    settings."""
    for row in rows:
        if row["name"] == run.name and row["seed"] == str(run.seed):
            if row.get("base", run.argv[0]) != run.argv[0]:      # older files have no base
                raise UserError(f"runs.csv has {run} of {row['base']}, not of {run.argv[0]}; give "
                                "another OUT or name")
            if json.loads(row["overrides"]) != json.loads(json.dumps(run.overrides)):
                raise UserError(f"runs.csv has {run} with {row['overrides']}, not "
                                f"{json.dumps(run.overrides)}; give another OUT or name")
            return row
    return None


def measure(run: Run) -> dict:
    """The line of runs.csv, without grid and baseline."""
    metrics = read_metrics(run.folder)
    last = [m for m in metrics if "val_loss" in m][-1]
    with torch.device("meta"):
        model = Motif(pretrain.model_config(run.config))
    flops = flops_per_token(model.config, pretrain.make_curriculum(run.config).context[-1])
    by_domain = {}
    for name, loss in last["val_loss_by_domain"].items():
        by_domain[name] = None if loss is None else round(loss, 5)
    note = read_note(run)
    return {"name": run.name, "seed": str(run.seed), "base": run.argv[0],
            "overrides": json.dumps(run.overrides),
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops_per_token": sum(flops), "tokens": last["tokens"],
            "tok_per_s": round(median_speed(metrics)), "loss": loss_text(last["val_loss"]),
            "loss_by_domain": json.dumps(by_domain), "date": note["date"], "card": note["card"]}


def measure_curve(run: Run) -> list[dict]:
    """The lines of curves.csv: one for each evaluation."""
    metrics = read_metrics(run.folder)
    points = []
    for m in metrics:
        if "val_loss" in m:
            points.append({"name": run.name, "seed": str(run.seed), "tokens": m["tokens"],
                           "loss": loss_text(m["val_loss"])})
    return points


def loss_text(loss: float | None) -> str:
    return "nan" if loss is None else f"{loss:.5f}"


def measure_poly_norm(run: Run) -> list[dict]:
    """The lines of poly_norm.csv; none if the run has another activation."""
    lines = []
    for m in read_metrics(run.folder):
        for i, layer in enumerate(m.get("layers", [])):
            if "polynorm" in layer:
                w3, w2, w1, b = layer["polynorm"]
                lines.append({"name": run.name, "seed": str(run.seed), "tokens": m["tokens"],
                              "layer": i, "w3": w3, "w2": w2, "w1": w1, "b": b})
    return lines


def median_speed(metrics: list[dict]) -> float:
    """Tokens per second, the median of the logged lines."""
    return statistics.median(m["tok_per_s"] for m in metrics if "tok_per_s" in m)


# ---- table and pictures
#
# Standard errors. With s^2 the variance over the n seeds of a name, that of a difference is
# sqrt(s1^2 / n1 + s2^2 / n2). From two or three seeds it is itself only known to a factor of two.
#
# Speeds are the medians of runs that may have been on different machines, and these differ: the
# same run was up to 15% faster on one H200 than on another. To compare two names, compare runs of
# one machine.

class Summary(NamedTuple):
    """The runs of one name in one grid."""
    name: str
    runs: list[dict]            # lines of runs.csv, one for each seed
    curves: list[list[dict]]    # and of curves.csv

    def losses(self) -> list[float]:
        """After the last step, of each seed."""
        return [float(run["loss"]) for run in self.runs]

    def speeds(self) -> list[float]:
        """Tokens per second of each seed that has a speed."""
        return [float(run["tok_per_s"]) for run in self.runs if run["tok_per_s"]]


def summarize(out: Path) -> dict[str, list[Summary]]:
    """Grid -> its names, from runs.csv and curves.csv."""
    curves = read_by_run(out / "curves.csv")
    grids = {}
    for row in read_csv(out / "runs.csv"):
        names = grids.setdefault(row["grid"], {})
        if row["name"] not in names:
            names[row["name"]] = Summary(row["name"], [], [])
        if (row["name"], row["seed"]) not in curves:
            raise UserError(f"{out}/curves.csv lacks {row['name']} seed {row['seed']}; the two "
                            "files belong together")
        names[row["name"]].runs.append(row)
        names[row["name"]].curves.append(curves[row["name"], row["seed"]])
    return {grid: list(names.values()) for grid, names in grids.items()}


def table(grid: str, summaries: list[Summary]) -> str:
    """The table of one grid, with a line for each name."""
    baseline = summaries[0].runs[0]["baseline"]
    by_name = {summary.name: summary for summary in summaries}
    header = ["", "seeds", "loss", "std", "difference", "parameters", "GFLOP/token", "tok/s"]
    cells_of_rows = [header]
    for s in summaries:
        losses = s.losses()
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "one seed"
        speed = f"{statistics.median(s.speeds()):,.0f}" if s.speeds() else ""
        cells_of_rows.append([
            s.name, str(len(losses)), f"{statistics.fmean(losses):.4f}", spread,
            difference(s, by_name.get(baseline)), f"{int(s.runs[0]['parameters']):,d}",
            f"{int(s.runs[0]['flops_per_token']) / 1e9:.3f}", speed])

    widths = [max(len(row[i]) for row in cells_of_rows) for i in range(len(header))]
    lines = [f"{grid}: held-out loss in nats per token; differences are to {baseline}, ± their "
             "standard error over seeds"]
    for row in cells_of_rows:
        columns = [row[0].ljust(widths[0])]
        columns += [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(columns))
    return "\n".join(lines)


def difference(summary: Summary, baseline: Summary | None) -> str:
    """Its mean loss less the baseline's, with the standard error that the seeds give."""
    if baseline is None or summary.name == baseline.name:
        return ""
    ours = summary.losses()
    theirs = baseline.losses()
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    if len(ours) < 2 or len(theirs) < 2:
        return f"{mean:+.4f} (one seed)"
    variance = statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)
    return f"{mean:+.4f} ± {variance ** 0.5:.4f}"


def draw(out: Path, grids: dict[str, list[Summary]]) -> None:
    """Draw out/curves.png, a row for each grid: on the left how far the held-out loss is above the
    baseline's at each evaluation but the first (of a run of which only the end is known, not even a
    point), on the right the loss at the end, a dot for each seed and a line at their mean."""
    plt = import_pyplot()
    heights = [1.0 + 0.28 * max(4, len(summaries)) for summaries in grids.values()]
    figure, axes = plt.subplots(len(grids), 2, figsize=(11, sum(heights)), squeeze=False,
                                layout="constrained", height_ratios=heights, width_ratios=[2, 3])
    for (left, right), (grid, summaries) in zip(axes, grids.items()):
        baseline = baseline_curve(summaries)
        for i, summary in enumerate(summaries):
            color = f"C{i % 10}"
            marker, line = ("o", "-") if i < 10 else ("s", ":")     # there are ten colours
            for curve in summary.curves:
                points = [point for point in curve[1:] if point["tokens"] in baseline]
                tokens = [int(point["tokens"]) / 1e6 for point in points]
                above = [float(point["loss"]) - baseline[point["tokens"]] for point in points]
                left.plot(tokens, above, marker=marker, ls=line, ms=2, lw=1, color=color)
            losses = summary.losses()
            right.plot(losses, [i] * len(losses), marker, ms=5, alpha=0.6, color=color)
            right.plot([statistics.fmean(losses)], [i], "|", ms=16, color=color)
        left.set_title(grid, loc="left", fontsize="medium")
        left.set_ylabel(f"loss less {summaries[0].runs[0]['baseline']}'s", fontsize="small")
        right.set_yticks(range(len(summaries)), [summary.name for summary in summaries])
        for i, label in enumerate(right.get_yticklabels()):
            label.set_color(f"C{i % 10}")
        right.set_ylim(len(summaries) - 0.5, -0.5)
        for axis in (left, right):
            axis.tick_params(labelsize="small")
            axis.grid(alpha=0.3)
    left.set_xlabel("million tokens seen", fontsize="small")
    right.set_xlabel("held-out loss after the last step, nats per token", fontsize="small")
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


def baseline_curve(summaries: list[Summary]) -> dict[str, float]:
    """Tokens -> the mean loss of the baseline's seeds there; empty if it has not been run."""
    losses = defaultdict(list)
    for summary in summaries:
        if summary.name == summary.runs[0]["baseline"]:
            for point in itertools.chain(*summary.curves):
                losses[point["tokens"]].append(float(point["loss"]))
    return {tokens: statistics.fmean(x) for tokens, x in losses.items()}


def draw_poly_norm(out: Path) -> None:
    """Draw out/poly_norm.png, a row for each name in poly_norm.csv (its first seed), and a column
    for each of PolyNorm's four parameters: its value in each layer over tokens."""
    runs = {}
    for (name, _), lines in read_by_run(out / "poly_norm.csv").items():
        runs.setdefault(name, lines)
    if not runs:
        return
    plt = import_pyplot()
    columns = {"w3": "w3, of n(x³)", "w2": "w2, of n(x²)", "w1": "w1, of n(x)", "b": "b"}
    figure, axes = plt.subplots(len(runs), 4, figsize=(11, 0.6 + 1.5 * len(runs)), squeeze=False,
                                sharex="row", layout="constrained")
    for row, (name, lines) in zip(axes, runs.items()):
        layers = defaultdict(list)
        for line in lines:
            layers[int(line["layer"])].append(line)
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(layers)))
        for axis, (column, title) in zip(row, columns.items()):
            for i, points in layers.items():
                tokens = [int(point["tokens"]) / 1e6 for point in points]
                values = [float(point[column]) for point in points]
                axis.plot(tokens, values, lw=1, color=colors[i])
            axis.set_title(f"{name}: {title}", fontsize="x-small")
            axis.tick_params(labelsize="x-small")
            axis.grid(alpha=0.3)
    axes[-1][0].set_xlabel("million tokens; from violet, the first layer, to green, the last one",
                           fontsize="small", loc="left")
    figure.savefig(out / "poly_norm.png", dpi=110)
    plt.close(figure)


def show(out: Path) -> None:
    """Print the tables of the runs in a folder's files, and draw the pictures."""
    grids = summarize(out)
    if not grids:
        raise UserError(f"{out}/runs.csv has no runs")
    for grid, summaries in grids.items():
        print(table(grid, summaries) + "\n")
    if import_pyplot() is None:
        print("no pictures, as there is no matplotlib")
        return
    draw(out, grids)
    draw_poly_norm(out)


# ---- the command

def read_arguments(argv: list[str]) -> tuple[str, Path, Grid, dict[str, str]]:
    """The command line -> the grid's name, OUT, the grid, and the options for every run."""
    places = [word for word in argv if not word.startswith("-")]
    if len(places) != 2:
        raise UserError("give a grid and a folder: python -m tools.ablate config/grids/X.py OUT")
    grid_file, out = places
    _, words = configurator.split_argv([grid_file, *[w for w in argv if w.startswith("-")]])

    own = []
    options = {}
    for key, text in configurator.split_options(words).items():
        if key in Grid.__dataclass_fields__:
            own.append(f"--{key}={text}")
        else:
            options[key] = text
    grid = configurator.load(Grid, [grid_file, *own])
    if grid.baseline not in (None, *cells(grid)):
        raise UserError(f"baseline={grid.baseline} is none of the grid's runs: "
                        f"{', '.join(cells(grid))}")
    return Path(grid_file).stem, Path(out), grid, options


def main() -> None:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\n{configurator.describe(configurator.load(Grid, []))}")
        return
    if "--table" in argv:
        folders = [word for word in argv if word != "--table"]
        if len(folders) != 1:
            raise UserError("give the folder of runs.csv: python -m tools.ablate --table OUT")
        show(Path(folders[0]))
        return

    # A cluster's SIGTERM is answered as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    grid_name, out, grid, options = read_arguments(argv)
    out.mkdir(parents=True, exist_ok=True)
    planned = plan_runs(grid, out, options)
    recorded = read_csv(out / "runs.csv")
    todo = []
    for run in planned:
        check_folder(run)
        if not has_ended(run) and recorded_row(run, recorded) is None:
            todo.append(run)

    failed = []
    if todo:
        failed = run_all(todo, planned, out, grid, grid_name)
    add_to_tables(out, planned, grid, grid_name)
    if read_csv(out / "runs.csv"):
        show(out)
    if failed:
        raise UserError(f"failed: {', '.join(str(run) for run in failed)}")
    left = [run for run in todo if not has_ended(run)]
    if left:
        print(f"{len(left)} runs are left; run the same command to go on")


if __name__ == "__main__":
    run_main(main)
