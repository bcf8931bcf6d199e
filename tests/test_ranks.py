"""pretrain.py on several ranks, over gloo: the losses of one process, checkpoints that move between
any numbers of ranks, and an end that is clear, whatever ends the run."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import world

import muonclip
from model import Motif

ROOT = Path(muonclip.__file__).parent

# A step has 10 rows of 32 tokens. Of four ranks two have three rows; two have two and are padded.
OPTIONS = dict(
    num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=5,
    num_noise_heads=1, num_key_value_heads=2, head_dim=8, seq_len=32, batch_tokens=320,
    micro_batch_tokens=96, max_steps=50, warmup_steps=2, save_every=24, eval_every=24, log_every=1,
    eval_tokens=96, sample_tokens=1, keep_last=5, device="cpu", workers=1, timeout_seconds=30,
    decay_fraction=0.0,
    domains={"math": ["builtin:math", 0.6, 0.6], "science": ["builtin:science", 0.4, 0.4]})


def arguments(options: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


# ---- what a rank does, in a process of its own: support.ranks looks for its rank when it
# is imported

def train(out: Path, shards: Path, sigterm_at: int = 0, **options) -> None:
    """A run. Rank 2, and no other, gets a SIGTERM before step sigterm_at."""
    import pretrain
    import tools.plots
    real = pretrain.train_step
    steps = []

    def train_step(*args):
        steps.append(None)
        if len(steps) == sigterm_at and os.environ["RANK"] == "2":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    pretrain.train_step = train_step
    tools.plots.plot_training = lambda out: None
    sys.argv = ["pretrain.py"]
    sys.argv += arguments({**OPTIONS, "out_dir": out, "data_dir": shards, **options})
    pretrain.main()


def refuse_folders_of_their_own(folder: Path, shards: Path) -> None:
    """A run whose ranks see different folders under the same name ends before it reads data."""
    from configurator import UserError
    own = folder / f"machine{os.environ['RANK']}"
    (own / "out").mkdir(parents=True)
    os.chdir(own)
    try:
        train(Path("out"), shards)
    except UserError as e:
        assert "out of rank 1, on " in str(e) and "--out_dir" in str(e) and "\n" not in str(e)
    else:
        raise AssertionError("the run began")
    assert not Path("out/metrics.jsonl").exists()


def write_samples(folder: Path) -> None:
    """What an untrained model writes, and how many all-gathers that takes on each rank: with what
    Validation does, and without."""
    import pretrain
    from support.ranks import RANK, WORLD, pick_device
    from support.tokenizer import load_tokenizer
    c = pretrain.Config(**{**OPTIONS, "sample_tokens": 40, "prompts": ["The ", "x"]})
    device = pick_device(c)
    pretrain.meet_ranks(c, device)
    model = pretrain.build(c, device)
    rows = {"text": torch.arange(66).view(2, 33).numpy()}
    validation = pretrain.Validation(c, rows, pretrain.make_curriculum(c), load_tokenizer("byte"),
                                     pretrain.encode_text_prompt, None, device)
    gathers = []
    for bound in (pretrain.SAMPLE_BYTES, 0):
        pretrain.SAMPLE_BYTES = bound
        with Collectives() as messages:
            _, samples = validation.evaluate_and_sample(model, 0)
        assert (samples == f"{pretrain.NO_SAMPLES}\n") == (bound == 0 and WORLD > 1)
        gathers.append(messages.gathers)
        if bound > 0 and RANK == 0:
            folder.mkdir(exist_ok=True)
            (folder / f"samples{WORLD}.txt").write_text(samples)

    with Collectives() as messages:      # each block is freed after each forward pass
        pretrain.sample_prompts(model, load_tokenizer("byte"), c, pretrain.encode_text_prompt)
    gathers.append(messages.gathers)
    if RANK == 0:
        (folder / f"gathers{WORLD}.json").write_text(json.dumps(gathers))


class Collectives(TorchDispatchMode):
    """Counts the calls of all_gather_into_tensor and reduce_scatter_tensor."""
    gathers = 0
    reductions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_allgather_base_" in str(function):
            self.gathers += 1
        if "_reduce_scatter_base_" in str(function):
            self.reductions += 1
        return function(*args, **(kwargs or {}))


def count_messages(folder: Path) -> None:
    """How often a step of three micro-batches gathers and sums, with sum_embeddings_once and
    without. The gradients are the same."""
    import pretrain
    from support.ranks import RANK, pick_device
    c = pretrain.Config(**OPTIONS)
    device = pick_device(c)
    pretrain.meet_ranks(c, device)
    model = pretrain.build(c, device)
    ids, targets = torch.randint(256, (2, 3, 32), generator=torch.manual_seed(RANK))
    counts = {}
    gradients = []
    for once in (True, False):
        with Collectives() as messages:
            pretrain.forward_backward(model, (ids, targets), 1, 6 * 32, sum_embeddings_once=once)
        counts[str(once)] = [messages.gathers, messages.reductions]
        gradients.append([muonclip.local_shard(p.grad) for p in model.parameters()])
        model.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    if RANK == 0:
        (folder / "messages.json").write_text(json.dumps(counts))


def steps_with_set_gradients(out: Path, first: int, last: int) -> None:
    """Steps first + 1 to `last` of a model, from a checkpoint on and into one. The gradients are
    random and known, so that nothing is summed in another order."""
    import pretrain
    from support.ranks import pick_device
    pretrain.FILE_BYTES = 20_000            # a checkpoint of several files, which the ranks divide
    c = pretrain.Config(**OPTIONS)
    device = pick_device(c)
    pretrain.meet_ranks(c, device)
    model = pretrain.build(c, device)
    optimizer = muonclip.configure_optimizer(model, lr=0.01, tau=0.5)
    if first:
        pretrain.load_checkpoint(out / f"step_{first}", model, optimizer, out)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            if hasattr(p, "placements"):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        logits = torch.rand(c.num_hidden_layers, c.num_attention_heads, generator=generator)
        optimizer.step(max_logits=logits)
    pretrain.save_checkpoint(out, last, model, optimizer, {"skipped": 0, "data": ""}, c)


def fail_to_rename(folder: Path) -> None:
    """A save over an earlier model, in which rank 1 cannot rename its file, fails on both ranks. No
    mixture of the two models can be read, and nothing of the failure is left after the next save.
    """
    from configurator import UserError
    from support.ranks import RANK, barrier, init_distributed
    from support.weights import iter_checkpoint, save_tensors
    init_distributed(torch.device("cpu"), 30, even_alone=False)
    mesh = dist.init_device_mesh("cpu", (2,))

    def save(value):
        tensors = {name: distribute_tensor(torch.full((4,), value), mesh) for name in ("a", "b")}
        save_tensors(folder, "model", tensors, 16)          # a file for each tensor

    def read():
        barrier()
        return {name: load().tolist()
                for name, load in iter_checkpoint(folder, "model", {"a": (4,), "b": (4,)})}

    def replace(old, new):
        raise OSError("no renaming here")

    save(1.0)
    real = os.replace
    if RANK == 1:
        os.replace = replace
    with pytest.raises(OSError, match="no renaming here"):
        save(2.0)
    with pytest.raises(UserError):
        read()

    os.replace = real
    save(3.0)
    assert read() == {"a": [3.0] * 4, "b": [3.0] * 4}
    assert sorted(file.name for file in folder.iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json"]


def run_worlds(folder: Path) -> None:
    shards = folder / "shards"
    world(1, train, folder / "one", shards)
    world(4, train, folder / "four", shards, micro_batch_tokens=32)
    world(4, train, folder / "replicas", shards, dp_replicate=2, max_steps=12, eval_every=None,
          micro_batch_tokens=64)
    world(4, train, folder / "interrupted", shards, sigterm_at=5, max_steps=24,
          micro_batch_tokens=32)
    world(2, refuse_folders_of_their_own, folder / "machines", shards)
    for ranks in (1, 2, 4):
        world(ranks, write_samples, folder / "samples")
    world(2, count_messages, folder)
    world(2, fail_to_rename, folder / "renamed")
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
    """metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("ms", "tok_per_s")} for m in lines]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    found = {}
    for file in checkpoint.rglob("*.safetensors"):
        found.update(load_file(file))
    return found


def same(a: Path, b: Path) -> bool:
    a = tensors(a)
    b = tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_close(ours: list[dict], theirs: list[dict]) -> None:
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and a.get("mixture") == b.get("mixture")
        for key in {"loss", "val_loss", "val_bpb", "max_logit", "grad_norm"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4), (key, a["step"])


def test_four_ranks_follow_one(folder):
    """Losses and gradients are added up in another order, from the first backward pass on. Nothing
    else differs."""
    one = metrics(folder / "one")
    four = metrics(folder / "four")
    check_close(four, one)
    assert len(four) == 50 + 4
    assert four[0]["val_loss"] == pytest.approx(one[0]["val_loss"], rel=1e-7)

    ours = tensors(folder / "four/step_24")
    theirs = tensors(folder / "one/step_24")
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=1e-4)
    assert Motif.from_pretrained(folder / "four/step_50").config.hidden_size == 32


def test_two_copies_of_the_model_on_two_ranks_each_follow_one(folder):
    one = [m for m in metrics(folder / "one") if "loss" in m]
    replicas = metrics(folder / "replicas")
    assert len(replicas) == 12
    check_close(replicas, one[:12])


def test_samples_are_those_of_one_rank_and_gather_the_model_once(folder):
    """Two blocks and the root: after an evaluation of one micro-batch the root is still gathered.
    The two prompts, of 4 and 1 bytes, take 2 x 40 forward passes."""
    samples = [(folder / f"samples/samples{ranks}.txt").read_text() for ranks in (1, 2, 4)]
    assert samples[0] == samples[1] == samples[2] and len(samples[0]) > 60
    for ranks in (2, 4):
        with_samples, evaluation, freed = json.loads(
            (folder / f"samples/gathers{ranks}.json").read_text())
        assert with_samples - evaluation == 2, (with_samples, evaluation, freed)
        assert freed == 2 * 80 + 1


def test_embedding_and_head_are_gathered_and_summed_once_a_step(folder):
    """A micro-batch gathers each of the two blocks for its forward pass and for its backward pass,
    where the last one is still there; and sums the gradients of both."""
    once, each_time = json.loads((folder / "messages.json").read_text()).values()
    assert each_time == [3 * (2 * 2 + 1), 3 * (2 + 1)]
    assert once == [3 * 2 * 2 + 1, 3 * 2 + 1]


def test_a_checkpoint_moves_between_numbers_of_ranks(folder):
    """To step 2 on four ranks, to 3 on two, to 5 on three: bit by bit one process's five steps. The
    same tensors are in the same files."""
    for still in (folder / "still/step_5").rglob("*.safetensors"):
        moved = folder / "moving/step_5" / still.relative_to(folder / "still/step_5")
        assert load_file(moved).keys() == load_file(still).keys()
    assert len(list((folder / "moving/step_5").glob("model-*.safetensors"))) > 3
    assert same(folder / "moving/step_5", folder / "still/step_5")
    assert not same(folder / "moving/step_3", folder / "still/step_5")


def test_a_save_that_fails_on_one_rank_leaves_no_mixture_of_two_models(folder):
    """The world of fail_to_rename has succeeded, as all in run_worlds."""
    assert len(list((folder / "renamed").iterdir())) == 3


def test_sigterm_saves_and_a_lost_rank_ends_all_and_a_restart_goes_on(folder):
    """One rank gets a SIGTERM: all stop after the same step, and save. Then one is killed by kill
    -9 under torchrun, whose restart goes on: bit by bit the run that nothing happened to."""
    out = folder / "interrupted"
    stopped = (out / "log.txt").read_text().splitlines()[-1]
    assert stopped.startswith("stopped at step 5;") and f"{out}/step_5" in stopped

    options = {**OPTIONS, "out_dir": out, "data_dir": folder / "shards", "max_steps": 24,
               "micro_batch_tokens": 32}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--max_restarts=1",
               str(ROOT / "pretrain.py"), *arguments(options)]
    before = []
    after = []
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        lines = before
        for line in process.stdout:
            lines.append(line)
            if lines is before and line.startswith("step 12/24  loss"):
                ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                os.kill(int(ranks.split()[2]), signal.SIGKILL)
                lines = after

    after = "".join(after)
    assert f"resumed from {out}/step_5" in "".join(before) and process.returncode == 0, after
    assert re.search(f"^lost touch with another rank .* {out}/step_5$", after, re.M), after
    assert f"resumed from {out}/step_5" in after and "finished at step 24" in after
    assert same(out / "step_24", folder / "four/step_24")
    assert metrics(out) == [m for m in metrics(folder / "four") if m["step"] <= 24]


def test_each_rank_tells_a_users_mistake_in_one_line(tmp_path):
    """Rank 0 at once. Another one waits to be ended, which nobody does here, and then tells its
    own."""
    command = [sys.executable, str(ROOT / "pretrain.py"), "--max_step=1"]
    processes = []
    for rank in "01":
        environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for rank, process in enumerate(processes):
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 1 and stdout == ""
        assert len(stderr.splitlines()) == 1 and "'max_step'" in stderr
        assert stderr.startswith("rank 1: ") == (rank == 1)


if __name__ == "__main__":
    run_worlds(Path(sys.argv[1]))
