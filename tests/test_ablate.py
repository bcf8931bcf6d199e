"""tools/ablate.py: a grid is run once, whatever cuts it; its table comes from its files alone."""
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import configurator
import pretrain
from configurator import UserError
from model import Motif, MotifConfig
from muonclip import configure_optimizer
from tools import ablate
from tools.grow import grow

ROOT = Path(pretrain.__file__).parent
GRIDS = sorted((ROOT / "config/grids").glob("*.py"))

BASE = """
num_hidden_layers = 1
hidden_size = 32
intermediate_size = 64
num_attention_heads = 5
num_noise_heads = 1
num_key_value_heads = 2
head_dim = 8
domains = {"math": ["builtin:math", 0.75, 0.25], "science": ["builtin:science", 0.25, 0.75]}
max_steps = 4
seq_len = 32
batch_tokens = 256
micro_batch_tokens = 256
warmup_steps = 1
eval_every = 2
eval_tokens = 256
save_every = 2
log_every = 1
prompts = []
workers = 1
device = "cpu"
"""

GRID = """# ablate.py: two runs
base = "base.py"
axes = [{"gda": {}}, {"swiglu": {"activation": "swiglu"}, "polynorm": {}}]
seeds = [1, 2]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(argument, ...) runs the tool in a folder with GRID -> what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("base.py").write_text(BASE)
    Path("grid.py").write_text(GRID)

    def call(*arguments) -> str:
        monkeypatch.setattr("sys.argv", ["ablate", *arguments])
        ablate.main()
        return capsys.readouterr().out.strip()
    return call


def losses_of(folder: Path) -> list:
    return [m["val_loss"] for m in ablate.read_metrics(folder) if "val_loss" in m]


def test_a_grid_goes_on_after_a_cut_and_its_table_comes_from_its_files(run, monkeypatch):
    assert "4 runs are left" in run("grid.py", "out", "--max_minutes=0")
    assert "one seed" in run("grid.py", "out", "--seeds=[1]")
    monkeypatch.setattr(ablate.Preparation, "is_done", lambda self, run: True)

    # One run of two is cut after its checkpoint of step 2.
    cut = Path("out/gda-swiglu-seed1")
    whole = Path("out/gda-polynorm-seed1/metrics.jsonl")
    written = whole.stat().st_mtime_ns
    losses = losses_of(cut)
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:-2]))
    shutil.rmtree(cut / "step_4")
    Path("out/runs.csv").unlink()
    printed = run("grid.py", "out", "--overlap_seconds=1000")
    assert "started gda-swiglu seed 1" in printed and "started gda-polynorm seed 1" not in printed
    assert "resumed" in (cut / "log.txt").read_text() and losses_of(cut) == losses
    assert whole.stat().st_mtime_ns == written

    # With that overlap the last run began before the one before it ended.
    assert printed.index("started gda-polynorm seed 2") < printed.index("ended gda-swiglu seed 2")

    # Without the runs the table is the same, and nothing is run again.
    table = printed[printed.index("grid: held-out loss"):]
    assert len(table.splitlines()) == 4 and "±" in table
    Path("kept").mkdir()
    for name in ("runs.csv", "curves.csv", "poly_norm.csv"):
        shutil.copy(f"out/{name}", "kept")
        assert 25 * Path(f"out/{name}").stat().st_size < 100_000      # of 100 runs
    shutil.rmtree("out")
    assert run("--table", "kept") == table
    assert run("grid.py", "kept") == table
    with pytest.raises(UserError, match="max_steps"):              # that would be other runs
        run("grid.py", "kept", "--max_steps=5")
    Path("other.py").write_text(BASE)
    with pytest.raises(UserError, match="not of other.py"):
        run("grid.py", "kept", "--base=other.py")
    assert sorted(path.name for path in Path("kept").iterdir()) == [
        "curves.csv", "curves.png", "poly_norm.csv", "poly_norm.png", "runs.csv"]
    weights = ablate.read_by_run(Path("kept/poly_norm.csv"))["gda-polynorm", "1"]
    assert [(line["tokens"], line["w1"]) for line in weights][0] == ("0", "0.0208")     # 1 / 48
    assert [line["tokens"] for line in weights] == ["0", "512", "1024"]      # of its one layer

    # Where a name has no speed, all else of its line is the same.
    rows = ablate.read_csv(Path("kept/runs.csv"))
    for row in rows:
        if row["name"] == "gda-swiglu":
            row["tok_per_s"] = ""
    ablate.write_csv(Path("kept/runs.csv"), list(rows[0]), rows)
    before = [line.split() for line in table.splitlines() if line.startswith("gda-swiglu")][0]
    after = [line.split() for line in run("--table", "kept").splitlines()
             if line.startswith("gda-swiglu")][0]
    assert after == before[:-1]


def test_two_different_runs_do_not_share_a_folder(run):
    folder = Path("out/gda-swiglu-seed1")
    folder.mkdir(parents=True)
    first = ablate.plan_runs(grid_of("grid.py"), Path("out"), {})[0]
    configurator.save(first.config, folder / "config.json")
    with pytest.raises(UserError, match="max_steps=4, not 5"):
        run("grid.py", "out", "--max_steps=5")
    with pytest.raises(UserError, match="activation"):
        run("grid.py", "out", "--activation=swiglu")


def grid_of(path) -> ablate.Grid:
    return configurator.load(ablate.Grid, [str(path)])


def test_a_failed_run_is_named(run):
    Path("grid.py").write_text('''base = "base.py"
runs = {"broken": {"tokenizer": "none.tiktoken"}}
''')
    with pytest.raises(UserError, match="broken seed 1337"):
        run("grid.py", "out")


def test_differences_by_hand():
    def summary(name, losses):
        return ablate.Summary(name, [{"loss": str(x)} for x in losses], [])

    baseline = summary("a", [2.0, 4.0])
    assert ablate.difference(summary("b", [1.0, 1.0]), baseline) == "-2.0000 ± 1.0000"
    assert "one seed" in ablate.difference(summary("c", [1.0]), baseline)
    assert ablate.difference(baseline, baseline) == ""               # sqrt((2 + 0) / 2) above


def test_what_a_cut_run_has_logged_says_nothing_of_the_process_that_follows(run):
    planned = ablate.plan_runs(grid_of("grid.py"), Path("out"), {})[0]
    planned.folder.mkdir(parents=True)
    metrics = planned.folder / "metrics.jsonl"
    lines = [{"step": i, "tokens": 256 * i, "tok_per_s": 100} for i in (1, 2, 3)]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    old = ablate.Job(planned, None, None, 0.0, metrics.stat().st_mtime_ns)
    assert ablate.seconds_left(old) == math.inf
    assert ablate.seconds_left(old._replace(metrics_before=None)) == 2.56    # 256 tokens are left


def test_a_run_whose_loss_is_not_finite_has_a_line_too(run):
    Path("grid.py").write_text('''base = "base.py"
runs = {"wild": {"lr": 1e30}}
''')
    printed = run("grid.py", "out")
    assert "held-out loss not finite" in printed
    assert ablate.read_csv(Path("out/runs.csv"))[0]["loss"] == "nan"


def test_two_runs_of_one_name_are_refused(run):
    Path("grid.py").write_text('''base = "base.py"
axes = [{"a": {}, "a-b": {}}, {"b": {}, "": {}}]
''')
    with pytest.raises(UserError, match="'a-b'"):
        run("grid.py", "out")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_cells_of_the_kept_grids_have_equal_tokens_and_parameters(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = ablate.plan_runs(grid_of(path), Path("out"), {})
    counts = set()
    tokens = set()
    for run in planned:
        tokens.add(pretrain.make_curriculum(run.config).tokens[-1])
        with torch.device("meta"):
            model = Motif(pretrain.model_config(run.config))
        counts.add(sum(p.numel() for p in model.parameters()))
    lengths = 2 if path.stem == "equal_time" else 1
    assert len(tokens) == lengths and max(counts) < 1.002 * min(counts)


# ---- the two knobs of PolyNorm that a grid varies

SMALL = MotifConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=3, num_noise_heads=1, num_key_value_heads=2, head_dim=4)


def test_poly_norm_scale_is_of_fresh_weights_alone(tmp_path):
    scaled = replace(SMALL, poly_norm_scale=0.5)
    torch.manual_seed(0)
    plain = Motif(SMALL)
    torch.manual_seed(0)
    model = Motif(scaled)
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        assert torch.equal(8 * p if name.endswith("act_fn.weight") else p, q)
    assert scaled.to_dict() == SMALL.to_dict() and "poly_norm_scale" not in SMALL.to_dict()

    # A model that is read or grown keeps its weights, whatever the knob says.
    model.save_pretrained(tmp_path)
    again = Motif.from_pretrained(tmp_path)
    assert again.config == SMALL and all(map(torch.equal, model.parameters(), again.parameters()))
    larger = grow(plain, replace(scaled, num_hidden_layers=3))
    assert torch.equal(larger.model.layers[0].mlp.act_fn.weight, torch.full((3,), 1 / 48))


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
@pytest.mark.parametrize("key, names", [
    ("poly_norm_lr_scale", ("act_fn",)), ("embedding_lr_scale", ("embed_tokens", "lm_head"))])
def test_some_parameters_learn_at_their_own_rate(key, names, optimizer):
    steps = {}
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        model = Motif(SMALL)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        rule = configure_optimizer(model, lr=0.01, optimizer=optimizer, **{key: scale})
        ids = torch.arange(12).view(2, 6)
        model(ids, ids + 1).backward()
        rule.step(max_logits=model.max_logits)
        steps[scale] = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    for name, step in steps[1.0].items():
        factor = 4 if any(part in name for part in names) else 1
        torch.testing.assert_close(steps[4.0][name], factor * step, rtol=1e-3, atol=1e-6)
