"""pretrain.py over several processes, on gloo: the losses of one process, checkpoints of any number
of ranks, and an end that is clear, whatever ends it."""
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
from test_pretrain import TINY, arguments

import data
import muonclip
import pretrain
from model import Motif
from pretrain import Config

ROOT = Path(pretrain.__file__).parent
# 10 rows of 32 tokens: of 4 ranks two have a row more, and the others fill theirs up
OPTIONS = {**TINY, "batch_tokens": 320, "micro_tokens": 64, "max_steps": 50, "save_every": 10,
           "eval_every": 25, "timeout": 30}


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    plan = pretrain.plan_of(Config(**OPTIONS))
    data.prepare(OPTIONS["domains"], "byte", str(folder), plan.need(), workers=1)
    return folder


def launch(ranks: int, script, *options, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, *(ranks > 1) * [
        "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", f"--max_restarts={restarts}"], str(script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def run(ranks: int, shards, out, **options) -> str:
    """To its end -> what it said."""
    options = {**OPTIONS, "data_dir": shards, "out_dir": out, **options}
    said = launch(ranks, ROOT / "pretrain.py", *arguments(options)).communicate(timeout=120)[0]
    assert "finished at step" in said, said
    return said


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stored(folder) -> dict[str, torch.Tensor]:
    return {f"{file}: {name}": t for file in ("model", "optimizer/state")
            for name, t in load_file(folder / f"{file}.safetensors").items()}


def equal(a, b) -> bool:
    a, b = stored(a), stored(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def straight(shards, tmp_path_factory):
    """50 steps over four ranks."""
    out = tmp_path_factory.mktemp("straight")
    run(4, shards, out)
    return out


def test_four_ranks_follow_one(shards, straight, tmp_path):
    """Sums of gradients and losses are added up in another order from the first backward pass on;
    all else is equal. So is a run over two replicas of two shards."""
    run(1, shards, tmp_path / "one")
    run(4, shards, tmp_path / "replicas", replicas=2)
    one = metrics(tmp_path / "one")
    for out in straight, tmp_path / "replicas":
        many = metrics(out)
        assert [m["step"] for m in many] == [m["step"] for m in one]
        for a, b in zip(one, many):
            assert a.keys() == b.keys() and a.get("mixture") == b.get("mixture")
            for key in {"loss", "val_loss", "val_bpb", "max_logit"} & a.keys():
                assert b[key] == pytest.approx(a[key], rel=1e-4), (key, a["step"])
            for key in {"grad_norm"} & a.keys():
                assert b[key] == pytest.approx(a[key], rel=2e-3), (key, a["step"])
    first = stored(tmp_path / "one/step_10"), stored(straight / "step_10")
    assert first[0].keys() == first[1].keys()
    for name, t in first[0].items():
        torch.testing.assert_close(t, first[1][name], rtol=1e-2, atol=1e-5)
    assert Motif.from_pretrained(straight / "step_50").config.hidden_size == TINY["hidden_size"]


def test_sigterm_saves_and_a_lost_rank_ends_all_and_a_restart_goes_on(shards, straight, tmp_path):
    """SIGTERM to torchrun, then kill -9 of one rank, then torchrun's own restart: bitwise the run
    that nothing happened to."""
    options = arguments({**OPTIONS, "data_dir": shards, "out_dir": tmp_path / "out"})
    process, said = launch(4, ROOT / "pretrain.py", *options), []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 12/50  loss"):
            process.send_signal(signal.SIGTERM)
    process.wait(60)
    stopped = max(pretrain.steps_in(tmp_path / "out"))
    assert 12 <= stopped < 50 and f"stopped at step {stopped}; " in "".join(said)

    process, said = launch(4, ROOT / "pretrain.py", *options, restarts=1), []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 32/50  loss") and "killed\n" not in said:
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(ranks[2]), signal.SIGKILL)
            said.append("killed\n")
    assert process.wait(60) == 0
    said = "".join(said)
    assert re.search(r"^lost touch with another rank .*; the last good checkpoint is \S*step_30", said,
                     re.M), said
    assert "resumed from" in said.split("killed\n")[1] and "finished at step 50" in said
    assert equal(tmp_path / "out/step_50", straight / "step_50")
    wanted = [{k: v for k, v in m.items() if k not in ("ms", "tok_per_s")}
              for m in metrics(straight)]
    assert wanted == [{k: v for k, v in m.items() if k not in ("ms", "tok_per_s")}
                      for m in metrics(tmp_path / "out")]


# ---- one number of ranks saves, another goes on

def some_steps(out: str, first: int, last: int) -> None:
    """Steps first + 1 to `last` of a model under set gradients, from a checkpoint on and into one;
    on as many ranks as there are."""
    c = Config(**{**OPTIONS, "out_dir": out})
    device = pretrain.device_of(c)
    pretrain.join(c, device)
    model = pretrain.build(c, device)
    optimizer = muonclip.for_model(model, lr=0.01, tau=0.5)
    if first:
        pretrain.load_checkpoint(Path(out, f"step_{first}"), model, optimizer)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=generator)
            p.grad = whole if not hasattr(p, "placements") else torch.distributed.tensor.\
                distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        logits = torch.rand(c.num_hidden_layers, c.num_attention_heads, generator=generator)
        optimizer.step(max_logits=logits)
    pretrain.save_checkpoint(Path(out), last, model, optimizer, {"skipped": 0, "data": ""}, c)


def test_a_checkpoint_moves_between_numbers_of_ranks(tmp_path):
    """0 to 2 on four ranks, to 3 on two, to 5 on three: bitwise one process's five steps."""
    for ranks, *steps in (1, 0, 5), (4, 0, 2), (2, 2, 3), (3, 3, 5):
        out = tmp_path / ("one" if ranks == 1 else "many")
        process = launch(ranks, __file__, str(out), *map(str, steps))
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said
    assert equal(tmp_path / "one/step_5", tmp_path / "many/step_5")
    assert (tmp_path / "one/step_5/model.safetensors").stat().st_size > 10_000


if __name__ == "__main__":
    some_steps(sys.argv[1], *map(int, sys.argv[2:]))
    pretrain.together(int)
    pretrain.end(SystemExit(0))
