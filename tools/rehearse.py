"""Rehearse a large run on this machine, before it is paid for.

    python -m tools.rehearse config/motif2_12b.py [--gpus=8] [--parts=restart,export,fine-tune,muon]
                                                  [--out=out/rehearsal] [--key=value ...]

With built-in text and byte tokens, so that no network is needed, it does what the run will do, only
shorter. It prints each command and how long it took. At the end it prints the speed and, on GPUs,
the memory beside what --dry_run plans. The parts are:

    restart     4 steps and a checkpoint; one rank is killed after step 5, and the others must end;
                the run goes on from the checkpoint to step 8, and saves no other. Step 5, made
                twice, is printed as it was before and after: it should be the same
    export      the weights for other programs, and a reply with them; on a GPU also their speed
    fine-tune   2 steps of the first stage, rows as long as the model can read, at most 16,384
    muon        a step of Parallel Muon alone, beside the form in which each rank does every matrix
                (on one GPU the step of one layer)
    steps       in place of restart: 8 steps, and no checkpoint

All other options are those of pretrain.py. Those that sft.py shares go to it too, but not those of
batch, recomputation and evaluation, and no setting of the config file. Rows have the first length
of the schedule: rehearse later ones by --seq_len=16384. A step has 4 passes of each rank unless
--batch_tokens says otherwise. --gpus is the number of ranks: without it as many as there are GPUs,
or 2 without any. The checkpoint takes 8 bytes of disk a parameter, and 12 in embedding and head:
109 GB for 12.7B. The exported weights take 2.
"""
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

import configurator
import pretrain
from configurator import UserError
from data import parse_schedule
from model import MotifConfig
from support.log import read_metrics
from support.ranks import run_main
from tools.ablate import show_loss
from tools.plan import largest_pass, memory_of_rank, tokens_in_a_pass

ROOT = Path(pretrain.__file__).parent
CHECKPOINT_STEP = 4
STEPS = 8
MAX_ROW = 16_384                  # tokens: the longest row in fine-tuning, as in the report
PARTS = ("restart", "export", "fine-tune", "muon")
REHEARSED = ("out_dir", "max_steps", "max_tokens", "save_every", "log_every", "resume", "export",
             "dry_run")


class Rehearsal:
    """The commands of a rehearsal, and where their output goes."""

    def __init__(self, config_file: str, gpus: int, out: Path, parts: list[str],
                 options: dict[str, str]):
        self.config_file = config_file
        self.gpus = gpus
        self.out = out
        self.parts = parts
        self.process = None                 # the last one that was started
        self.options = options
        self.run = out / "run"
        self.settings = {
            "tokenizer": "byte", "domains": {"code": ["builtin:code", 1.0, 1.0]},
            "max_tokens": None, "max_steps": STEPS, "warmup_steps": 2, "log_every": 1,
            "eval_every": None, "save_every": CHECKPOINT_STEP, "keep_every": None, "prompts": [],
            "mixture": None, "init": None, "wandb": None, "data_dir": out / "data", **options,
            "out_dir": self.run}
        c = configurator.load(pretrain.Config, self.train_arguments())
        if "batch_tokens" not in options:
            row = parse_schedule("seq_len", c.seq_len)[0][1]
            self.settings["batch_tokens"] = 4 * gpus * tokens_in_a_pass(c, row)
            c = configurator.load(pretrain.Config, self.train_arguments())
        self.config = c

    def train_arguments(self, *more: str) -> list[str]:
        pairs = [f"--{key}={value}" for key, value in self.settings.items()]
        return [self.config_file, *pairs, *more]

    def torchrun(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={self.gpus}", *words]

    def train_command(self) -> list[str]:
        return self.torchrun("pretrain.py", *self.train_arguments())

    def start(self, part: str, command: list[str]) -> subprocess.Popen:
        print(f"$ {shlex.join(command)}\n  (to follow it: tail -f {self.log(part)})", flush=True)
        with open(self.log(part), "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log,
                                            stderr=subprocess.STDOUT)
        return self.process

    def stop(self) -> None:
        """End what is still running."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def log(self, part: str) -> Path:
        return self.out / f"{part}.txt"

    def do(self, part: str, command: list[str]) -> None:
        """Run a command to its end."""
        begin = time.monotonic()
        if self.start(part, command).wait():
            self.fail(part)
        report(part, time.monotonic() - begin, f"see {self.log(part)}")

    def fail(self, part: str) -> None:
        text = self.log(part).read_text(encoding="utf-8", errors="replace")
        # What torchrun says after a rank has failed does not say why it did.
        said_by_ranks = re.split(r"(?m)^[EW]\d{4} .*torch/distributed/elastic", text)[0]
        last_lines = "\n".join(said_by_ranks.splitlines()[-15:])
        raise UserError(f"{last_lines}\n{part} failed; all that it printed is in {self.log(part)}")


def report(part: str, seconds: float, text: str) -> None:
    print(f"{part:10s} {seconds:6.0f} s   {text}", flush=True)


# ---- the parts

def lose_a_rank_and_restart(r: Rehearsal) -> None:
    train_until_a_rank_is_lost(r)
    r.settings["save_every"] = None
    r.do("resume", r.train_command())
    text = (r.run / "log.txt").read_text(encoding="utf-8")
    if "resumed" not in text or last_step(r.run) != STEPS:
        raise UserError(f"the run did not go on from its checkpoint: see {r.run}/log.txt")
    # This step was made twice, and its line has loss and gradient norm at the beginning.
    begin = f"step {CHECKPOINT_STEP + 1}/"
    lines = [line for line in text.splitlines() if line.startswith(begin)]
    if len(lines) != 2:
        raise UserError(f"step {CHECKPOINT_STEP + 1} was to be made twice: see {r.run}/log.txt")
    for when, line in zip(("before", "after"), lines):
        print(f"{when:>21s}   {line.split('  lr ')[0]}", flush=True)


def train_until_a_rank_is_lost(r: Rehearsal) -> None:
    """Kill one rank after the checkpoint, and wait until torchrun has ended the others."""
    begin = time.monotonic()
    process = r.start("train", r.train_command())
    # The checkpoint is written before the step after it is logged.
    while last_step(r.run) <= CHECKPOINT_STEP:
        if process.poll() is not None:
            r.fail("train")
        time.sleep(0.05)
    trained = time.monotonic()

    # torchrun's children are the ranks.
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = found.stdout.split()
    if not ranks:
        raise UserError("the run ended before a rank could be killed; give a larger --batch_tokens")
    os.kill(int(ranks[-1]), signal.SIGKILL)
    if process.wait() == 0:
        raise UserError("a rank was killed, and the run ended as if it had not been")
    report("train", trained - begin, f"{last_step(r.run)} steps; all had ended "
           f"{time.monotonic() - trained:.0f} s after one rank was killed")


def last_step(run: Path) -> int:
    return max([m["step"] for m in read_metrics(run)], default=-1)


def train_without_a_checkpoint(r: Rehearsal) -> None:
    r.settings["save_every"] = None
    r.do("steps", r.train_command())


def export_and_generate(r: Rehearsal) -> None:
    weights = r.out / "export"
    r.do("export", [sys.executable, "pretrain.py", *r.train_arguments(f"--export={weights}")])
    r.do("generate", [sys.executable, "eval.py", f"--model={weights}",
                      f"--tokenizer={r.config.tokenizer}", f"--device={r.config.device}",
                      "--tasks=chat", "--prompt=Who are you?"])
    if on_gpu(r.config):
        r.do("decode", [sys.executable, "-m", "tools.bench_decode", str(weights)])


def fine_tune(r: Rehearsal) -> None:
    row = min(MAX_ROW, r.config.max_position_embeddings)
    shared = {field.name for field in fields(pretrain.TrainConfig)}
    options = {key: value for key, value in r.options.items() if key in shared}
    settings = {
        "data_dir": r.config.data_dir, **options, "stage": 1, "model": r.run,
        "out_dir": r.out / "sft", "data": {"help": ["builtin:help", 1.0]}, "seq_len": row,
        "micro_batch_tokens": row, "batch_tokens": r.gpus * row, "max_steps": 2, "epochs": 100,
        "eval_every": None, "save_every": None, "log_every": 1, "prompts": [],
        "activation_checkpoint_layers": r.config.num_hidden_layers}
    r.do("fine-tune", r.torchrun("sft.py", *[f"--{key}={value}"
                                             for key, value in settings.items()]))


def time_muon(r: Rehearsal) -> None:
    shape = {field.name for field in fields(MotifConfig)}
    options = [f"--{key}={value}" for key, value in r.options.items()
               if key in shape or key == "dp_replicate"]
    r.do("muon", r.torchrun("-m", "tools.bench_muon", r.config_file, *options))


def on_gpu(c: pretrain.Config) -> bool:
    return pretrain.pick_device(c).type == "cuda"


# ---- what came of it

def summary(r: Rehearsal) -> str:
    """Speed of the steps in which nothing was compiled, as the first two of a process may be slow;
    memory and losses of all."""
    steps = [m for m in read_metrics(r.run) if "tok_per_s" in m]
    if not steps:                                   # only muon was asked for
        return results(r, "muon")
    slow = [1, 2]
    if "restart" in r.parts:
        slow += [CHECKPOINT_STEP + 1, CHECKPOINT_STEP + 2]
    settled = [m for m in steps if m["step"] not in slow]
    speeds = [m["tok_per_s"] for m in settled]
    lines = [f"speed      {statistics.median(speeds):,.0f} tok/s ({min(speeds):,.0f} to "
             f"{max(speeds):,.0f})"]
    if on_gpu(r.config):
        mfu = "MFU unknown"
        if settled[0]["mfu"] is not None:
            mfu = f"{statistics.median(m['mfu'] for m in settled):.1%} MFU"
        optimizer = statistics.median(m["optimizer_ms"] / m["ms"] for m in settled)
        used = max(m["gib"] for m in steps)
        lines[0] += f", {mfu}; the optimizer takes {optimizer:.1%} of a step"
        lines.append(f"memory     {used:.1f} GiB of a GPU; planned {planned_gib(r):.1f}")
    losses = [m["loss"] for m in steps]
    lines.append(f"loss       {show_loss(losses[0])} to {show_loss(losses[-1])}")
    for part in ("decode", "muon"):
        if r.log(part).exists():
            lines += ["", results(r, part)]
    return "\n".join(lines)


def results(r: Rehearsal, part: str) -> str:
    """What a part has printed, without torchrun's advice, which stands between lines of stars."""
    text = r.log(part).read_text(encoding="utf-8")
    return text.rpartition("*\n")[2].rstrip()


def planned_gib(r: Rehearsal) -> float:
    c = replace(r.config, plan_world_size=r.gpus)
    tokens = largest_pass(c, pretrain.make_curriculum(c))
    checkpointed = min(c.activation_checkpoint_layers, c.num_hidden_layers)
    always, phases = memory_of_rank(c, tokens, checkpointed)
    return (sum(always.values()) + max(phases.values())) / 2**30


# ---- the command

def read_arguments(argv: list[str]) -> Rehearsal:
    own = {"gpus": None, "out": "out/rehearsal", "parts": ",".join(PARTS)}
    options = {}
    files = [word for word in argv if not word.startswith("-")]
    words = [word for word in argv if word.startswith("-")]
    for key, text in configurator.split_options(words).items():
        if key in own and f"--{key}" in words:
            raise UserError(f"--{key} needs a value: --{key}=...")
        if key in REHEARSED:
            raise UserError(f"--{key} is what a rehearsal sets itself; leave it out")
        if key in own:
            own[key] = text
        else:
            options[key] = text
    if len(files) != 1:
        raise UserError("give a config: python -m tools.rehearse config/motif2_12b.py")
    gpus = own["gpus"] or str(torch.cuda.device_count() or 2)
    if not gpus.isdecimal() or int(gpus) == 0:
        raise UserError(f"gpus={gpus} must be a whole number, 1 or more")
    parts = own["parts"].split(",")
    for part in parts:
        if part not in (*PARTS, "steps"):
            raise UserError(f"parts={own['parts']}: {part!r} is none of {', '.join(PARTS)}, steps")
        if part in ("export", "fine-tune") and "restart" not in parts:
            raise UserError(f"parts={own['parts']}: {part} needs the checkpoint of restart")
    if {"restart", "steps"} <= {*parts}:
        raise UserError(f"parts={own['parts']}: steps takes the place of restart; leave out one")
    if not own["out"]:
        raise UserError("--out needs the folder to write to: --out=out/rehearsal")
    out = Path(own["out"]).absolute()
    if out.exists():
        raise UserError(f"{out} exists; give the name of a new folder, as in --out=out/rehearsal2")
    return Rehearsal(str(Path(files[0]).absolute()), int(gpus), out, parts, options)


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    # A cluster's SIGTERM is answered as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    r = read_arguments(sys.argv[1:])
    try:
        r.out.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"{r.out} cannot be made: {configurator.one_line(e)}") from None
    print(f"{r.gpus} ranks, {r.config.batch_tokens} tokens a step; in {r.out}", flush=True)
    try:
        rehearse(r)
    except KeyboardInterrupt:
        raise UserError(f"interrupted; delete {r.out} to begin again") from None
    finally:
        r.stop()


def rehearse(r: Rehearsal) -> None:
    if "steps" in r.parts:
        train_without_a_checkpoint(r)
    if "restart" in r.parts:
        lose_a_rank_and_restart(r)
    if "export" in r.parts:
        export_and_generate(r)
    if "fine-tune" in r.parts:
        fine_tune(r)
    if "muon" in r.parts:
        time_muon(r)
    print(f"\n{summary(r)}")


if __name__ == "__main__":
    run_main(main)
