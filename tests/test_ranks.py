"""pretrain.py over several processes, on gloo: the losses of one process, checkpoints of any number
of ranks, and an end that is clear, whatever ends it."""
import tools.plots
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import distribute_tensor
from worlds import world

import data
import muonclip
from model import Motif

ROOT = Path(muonclip.__file__).parent
# 10 rows of 32 tokens: of four ranks two have a row more, and the others fill theirs up
OPTIONS = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=5,
               num_noise_heads=1, num_key_value_heads=2, head_dim=8, seq_len=32, batch_tokens=320,
               micro_batch_tokens=96, max_steps=50, warmup_steps=2, save_every=24, eval_every=24,
               log_every=1, eval_tokens=96, sample_tokens=1, keep_last=5, device="cpu", workers=1,
               timeout=30, decay_fraction=0.0, domains={"math": ["builtin:math", 0.6, 0.6],
                                                        "science": ["builtin:science", 0.4, 0.4]})


# ---- what a rank does, in a process of its own

def train(out: Path, shards: Path, sigterm_at: int = 0, **options) -> None:
    """A run, in which rank 2 alone gets a SIGTERM before that step."""
    import pretrain
    options = {**OPTIONS, "out_dir": out, "data_dir": shards, **options}
    tools.plots.plot_training, step, steps = lambda out: None, pretrain.train_step, []

    def train_step(*args):
        steps.append(None)
        if len(steps) == sigterm_at and pretrain.RANK == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    pretrain.train_step = train_step
    sys.argv = ["pretrain.py", *(f"--{key}={value}" for key, value in options.items())]
    pretrain.main()


def steps_with_set_gradients(out: Path, first: int, last: int) -> None:
    """Steps first + 1 to `last` of a model, from a checkpoint on and into one."""
    import pretrain
    c = pretrain.Config(**OPTIONS)
    device = pretrain.pick_device(c)
    pretrain.init_distributed(c, device)
    model = pretrain.build(c, device)
    optimizer = muonclip.configure_optimizer(model, lr=0.01, tau=0.5)
    if first:
        pretrain.load_checkpoint(out / f"step_{first}", model, optimizer)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            if hasattr(p, "placements"):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)
        logits = torch.rand(c.num_hidden_layers, c.num_attention_heads, generator=generator)
        optimizer.step(max_logits=logits)
    pretrain.save_checkpoint(out, last, model, optimizer, {"skipped": 0, "data": ""}, c)


def worlds(folder: Path) -> None:
    shards = folder / "shards"
    data.prepare(OPTIONS["domains"], "byte", str(shards), {"math": 20_000, "science": 20_000},
                 workers=1)
    world(1, train, folder / "one", shards)
    world(4, train, folder / "four", shards)
    world(4, train, folder / "replicas", shards, replicas=2, max_steps=12, eval_every=None,
          micro_batch_tokens=64)
    world(4, train, folder / "interrupted", shards, sigterm_at=5, max_steps=24)
    world(1, steps_with_set_gradients, folder / "still", 0, 5)
    world(4, steps_with_set_gradients, folder / "moving", 0, 2)
    world(2, steps_with_set_gradients, folder / "moving", 2, 3)
    world(3, steps_with_set_gradients, folder / "moving", 3, 5)


# ---- what came of it

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metrics(out: Path) -> list[dict]:
    """Without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("ms", "tok_per_s")} for m in lines]


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{file}: {name}": t for file in ("model", "optimizer/state")
            for name, t in load_file(checkpoint / f"{file}.safetensors").items()}


def equal(a: Path, b: Path) -> bool:
    a, b = stored(a), stored(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name, steps", [("four", 50), ("replicas", 12)])
def test_four_ranks_follow_one(folder, name, steps):
    """Losses and gradients are added up in another order, from the first backward pass on; nothing
    else differs, neither with one copy of the model nor with two."""
    many = metrics(folder / name)
    one = [m for m in metrics(folder / "one") if m["step"] <= steps and (
        name == "four" or "loss" in m)]
    assert [m["step"] for m in many] == [m["step"] for m in one] and len(one) >= steps
    for a, b in zip(one, many):
        assert a.keys() == b.keys() and a.get("mixture") == b.get("mixture")
        for key in {"loss", "val_loss", "val_bpb", "max_logit", "grad_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4), (key, a["step"])
    assert one[0].get("val_loss", 0) == pytest.approx(many[0].get("val_loss", 0), rel=1e-7)
    if name == "replicas":
        return
    ours, theirs = stored(folder / "four/step_24"), stored(folder / "one/step_24")
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=1e-4)
    assert Motif.from_pretrained(folder / "four/step_50").config.hidden_size == 32


def test_a_checkpoint_moves_between_numbers_of_ranks(folder):
    """To step 2 on four ranks, to 3 on two, to 5 on three: bitwise one process's five steps."""
    assert equal(folder / "moving/step_5", folder / "still/step_5")
    assert not equal(folder / "moving/step_3", folder / "still/step_5")


def test_sigterm_saves_and_a_lost_rank_ends_all_and_a_restart_goes_on(folder):
    """One rank gets a SIGTERM, and all stop after the same step and save; then one is killed by
    kill -9 under torchrun, whose restart goes on: bitwise the run that nothing happened to."""
    out = folder / "interrupted"
    options = {**OPTIONS, "out_dir": out, "data_dir": folder / "shards", "max_steps": 24}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--max_restarts=1",
               str(ROOT / "pretrain.py"), *(f"--{key}={value}" for key, value in options.items())]
    environment, said = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    assert (out / "log.txt").read_text().endswith(
        f"stopped at step 5; model in {out}/step_5, curve in {out}/loss.png, samples in "
        f"{out}/samples.txt\n")
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            said.append(line)
            if line.startswith("step 12/24  loss") and "killed\n" not in said:
                ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                os.kill(int(ranks.split()[2]), signal.SIGKILL)
                said.append("killed\n")
    before, after = "".join(said).split("killed\n")
    assert f"resumed from {out}/step_5" in before and process.returncode == 0, after
    assert re.search(f"^lost touch with another rank .*; the last good checkpoint is {out}/step_5",
                     after, re.M), after
    assert f"resumed from {out}/step_5" in after and "finished at step 24" in after
    assert equal(out / "step_24", folder / "four/step_24")
    assert metrics(out) == [m for m in metrics(folder / "four") if m["step"] <= 24]


if __name__ == "__main__":
    worlds(Path(sys.argv[1]))
