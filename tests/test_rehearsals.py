"""tools/growth_pays.py and tools/rehearse.py from beginning to end, each with a tiny model; the
memory that tools/plan.py plans, beside what was measured."""
import re
from pathlib import Path

import pytest

import configurator
import pretrain
from configurator import UserError
from model import Motif, flops_per_token
from support.log import read_metrics
from tools import growth_pays, rehearse
from tools.plan import largest_pass, memory_of_rank

ROOT = Path(pretrain.__file__).parent
TINY = {"num_noise_heads": 2, "num_key_value_heads": 4, "head_dim": 8, "seq_len": 32,
        "batch_tokens": 128, "micro_batch_tokens": 128, "warmup_steps": 2, "eval_every": 4,
        "eval_tokens": 64, "save_every": 10_000, "log_every": 4, "sample_tokens": 1, "workers": 1,
        "domains": {"math": ["builtin:math", 1.0, 1.0]}}
SIZE = growth_pays.Size(
    config_file="config/quickstart.py",
    small={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 4},
    large={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
           "num_attention_heads": 10},
    both=TINY, steps=8)


@pytest.fixture
def pays(tmp_path, monkeypatch, capsys):
    """pays("--key=value", ...): growth_pays with this size and one seed -> what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(growth_pays.SIZES, "tiny", SIZE)

    def call(*options) -> str:
        monkeypatch.setattr("sys.argv", ["growth_pays", "out", "--size=tiny", "--seeds=1",
                                         "--data_dir=data", *options])
        growth_pays.main()
        return capsys.readouterr().out
    return call


def test_growth_is_compared_at_equal_flops_and_no_run_is_repeated(pays, tmp_path):
    printed = pays()
    losses = {}
    for name in ("fresh", "small", "grown"):
        metrics = read_metrics(tmp_path / f"out/{name}-1")
        losses[name] = [m["val_loss"] for m in metrics if "val_loss" in m]
    assert losses["grown"][0] == pytest.approx(losses["small"][-1], rel=1e-5)
    assert re.findall(r"\((.*)\)", printed) == [f"{losses[name][-1]:.4f}"
                                                for name in ("fresh", "grown")]

    # In all, the small and the grown model take the FLOPs of the fresh one, but for a step.
    flops = {}
    for name in ("fresh", "small", "grown"):
        folder = tmp_path / f"out/{name}-1"
        config = Motif.from_pretrained(sorted(folder.glob("step_*"))[-1]).config
        last = read_metrics(folder)[-1]
        flops[name] = last["tokens"] * sum(flops_per_token(config, TINY["seq_len"]))
    step = flops["fresh"] / SIZE.steps
    assert abs(flops["small"] + flops["grown"] - flops["fresh"]) <= step

    logs = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("log.txt"))]
    assert pays() == printed
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("log.txt"))] == logs
    with pytest.raises(UserError, match="lr"):              # these would be other runs
        pays("--lr=1e-3")


@pytest.mark.parametrize("option", ["--init=x", "--seed=2", "--eval_every=None", "--dry_run",
                                    "--seq_len=[[0, 32], [99, 64]]"])
def test_what_would_make_the_runs_unequal_is_refused_before_any_is_trained(pays, option, tmp_path):
    with pytest.raises(UserError, match=option[2:].split("=")[0]):
        pays(option)
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_loses_a_rank_exports_and_fine_tunes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [
        "rehearse", "config/quickstart.py", "--gpus=2", f"--out={tmp_path}/rehearsal",
        "--parts=restart,export,fine-tune", "--device=cpu", "--num_hidden_layers=1",
        "--hidden_size=32", "--intermediate_size=32", "--seq_len=64", "--batch_tokens=16384",
        "--micro_batch_tokens=2048", "--max_position_embeddings=512"])
    monkeypatch.chdir(rehearse.ROOT)
    rehearse.main()
    printed = capsys.readouterr().out

    # The step after the checkpoint is made twice, with the same loss and gradient norm.
    before, after = re.findall(r"(?:before|after)   (step 5/8  loss .*)", printed)
    assert before == after
    steps = [m["step"] for m in read_metrics(tmp_path / "rehearsal/run")]
    assert steps == list(range(1, 9))
    assert (tmp_path / "rehearsal/export/model.safetensors").exists()
    tuned = read_metrics(tmp_path / "rehearsal/sft")
    assert [m["step"] for m in tuned] == [1, 2]
    with pytest.raises(UserError, match="exists"):          # nothing is overwritten
        rehearse.main()


# ---- memory

@pytest.mark.parametrize("gpus, layers, recomputed, options, gib", [
    (1, 6, 0, {}, 72.7),
    (1, 12, 12, {}, 81.6),
    (1, 20, 20, {}, 111.0),
    (1, 24, 24, {}, 125.7),
    (2, 6, 0, {}, 51.5),
    (2, 6, 0, {"sum_embeddings_once": False}, 48.2),
    (2, 10, 0, {}, 69.0),
    (2, 6, 6, {}, 38.8),
    (2, 40, 30, {}, 118.4),
    (2, 40, 30, {"precision": "fp8"}, 116.2)])
def test_planned_memory_is_what_was_measured(gpus, layers, recomputed, options, gib):
    """On H100s and H200s: MEASUREMENTS.md, "Many GPUs"."""
    options = {"seq_len": 4096, "batch_tokens": 2**18, "max_tokens": None, "max_steps": 10,
               "num_hidden_layers": layers, "plan_world_size": gpus, **options}
    argv = [f"--{key}={value}" for key, value in options.items()]
    c = configurator.load(pretrain.Config, [str(ROOT / "config/motif2_12b.py"), *argv])
    always, phases = memory_of_rank(c, 16_384, recomputed)
    planned = (sum(always.values()) + max(phases.values())) / 2**30
    assert abs(planned - gib) < 0.7


@pytest.mark.parametrize("options, gib", [
    ({"activation": "swiglu"}, 21.2),
    ({"activation": "swiglu", "optimizer": "adamw"}, 21.5),
    ({"tie_word_embeddings": False}, 21.8),
    ({"tie_word_embeddings": False, **growth_pays.SIZES["evidence"].small}, 9.1)])
def test_planned_memory_of_small_models_is_what_was_measured(options, gib):
    argv = [f"--{key}={value}" for key, value in options.items()]
    c = configurator.load(pretrain.Config, [str(ROOT / "config/evidence.py"), *argv])
    c.plan_world_size = 1
    always, phases = memory_of_rank(c, 2**16, 0)
    planned = (sum(always.values()) + max(phases.values())) / 2**30
    assert abs(planned - gib) < 0.4


def test_a_pass_holds_no_more_than_the_ranks_rows_of_a_step():
    argv = [str(ROOT / "config/quickstart.py"), "--seq_len=[[0, 64], [4096, 128]]",
            "--batch_tokens=1024", "--micro_batch_tokens=512"]
    for gpus, tokens in ((1, 512), (2, 512), (4, 256), (5, 256), (8, 128), (16, 128)):
        c = configurator.load(pretrain.Config, [*argv, f"--plan_world_size={gpus}"])
        assert largest_pass(c, pretrain.make_curriculum(c)) == tokens
