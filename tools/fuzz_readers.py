"""What tools.fuzz damages, and how each kind of file is read."""
import base64
import bz2
import gzip
import json
import lzma
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import configurator
import data
import eval as evaluation
import pretrain
import sft
from configurator import UserError
from model import Motif, MotifConfig
from support.conversations import Drops, load_conversations
from support.encoding import encode_chats
from support.log import Log, log_resumed
from support.selection import benchmark_files, benchmark_grams, choose, train_val_split
from support.sources import SkippedRows, source_units
from support.tasks import TASKS, read_questions
from support.tokenizer import bytes_per_token, encode_document, load_tokenizer
from tools import ablate
from tools.export import export_checkpoint, export_tokenizer

torch.set_num_threads(1)

EVAL = """--model=out/tiny --tasks=bpb:texts/a.txt,arc_easy,gsm8k --benchmark_dir=benchmarks
--num_fewshot=1 --out_dir=out/eval --device=cpu"""
COMMANDS = [
    "pretrain.py tiny.py",
    "sft.py --model=out/tiny --data={'mine':['talks/a.jsonl',1.0]} --seq_len=128 "
    "--batch_tokens=256 --max_steps=1 --out_dir=out/sft --device=cpu --eval_tokens=128 "
    "--sample_tokens=4",
    f"eval.py {EVAL}",
]

TINY = """# pretrain.py: for tools.fuzz
vocab_size = 272
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 4
num_noise_heads = 2
num_key_value_heads = 2
head_dim = 4
max_position_embeddings = 512
domains = {"a": ["texts/a.jsonl", 0.5, 0.5], "b": ["texts/b.jsonl", 0.5, 0.5]}
seq_len = [[0, 16], [128, 32]]
batch_tokens = 64
max_steps = 4
warmup_steps = 1
rope_theta_schedule = [[0, 10_000], [100, 500_000]]
eval_every = 2
eval_tokens = 64
save_every = 2
log_every = 1
sample_tokens = 4
device = "cpu"
workers = 1
"""

OPTIONS = """--hidden_size=32
--num_hidden_layers=2
--seq_len=[[0, 16], [128, 32]]
--batch_tokens=64
--max_steps=10
--max_tokens=1000
--mixture=[[0, {'a': 0.5, 'b': 0.5}], [1, {'a': 1.0}]]
--domains={'a': ['texts/a.jsonl', 0.5, 0.5], 'b': ['texts/b.jsonl', 0.5, 0.5]}
--rope_theta_schedule=[[0, 10000], [100, 500000]]
--lr=1e-3
--warmup_steps=3
--decay_fraction=0.3
--decay=linear
--micro_batch_tokens=64
--activation_checkpoint_layers=1
--plan_world_size=8
--dp_replicate=2
--assumed_mfu=0.4
--precision=fp32
--timeout_seconds=60
--seed=5
--prompts=['The ']
--tokenizer=byte
--compile=false
--device=cpu
--tie_word_embeddings
"""

CHATS = [
    {"messages": [{"role": "system", "content": "Be kind."},
                  {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                  {"role": "assistant", "content": "Hello, you."}]},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    {"instruction": "Add.", "input": None, "output": "So it is 4, because 2 + 2 = 4."},
    {"prompt": [{"role": "user", "content": "Why?"}],
     "completion": [{"role": "assistant", "content": "So."}], "system": "Short."},
]

ROWS = {
    "mmlu": {"question": "q?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "world_x"},
    "gsm8k": {"question": "q", "answer": "1 + 1 = 2\n#### 2"},
    "humaneval": {"prompt": "def f(x):\n", "canonical_solution": "    return x\n",
                  "entry_point": "f", "test": "def check(f):\n    assert f(1) == 1\n"},
    "mbpp": {"task_id": 11, "text": "Add.", "code": "def f(): pass", "test_list": ["assert f()"],
             "test_setup_code": ""},
    "arc_easy": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                 "answerKey": "B"},
    "hellaswag": {"activity_label": "l", "ctx_a": "a [x]", "ctx_b": "b", "ctx": "a. b",
                  "endings": ["c", "d"], "label": "1"},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "openbookqa": {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                   "answerKey": "A"},
    "siqa": {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c",
             "label": "1"},
    "winogrande": {"sentence": "Ann met Bo and _ won.", "option1": "Ann", "option2": "Bo",
                   "answer": "1"},
}


def write_lines(path: str, rows: list) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_inputs(folder: Path) -> None:
    """What a user would bring along."""
    import os

    import pyarrow
    from pyarrow import parquet
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    os.chdir(folder)
    root = Path(__file__).parent.parent
    shutil.copytree(root / "config", "config", ignore=shutil.ignore_patterns("__pycache__"))
    Path("tiny.py").write_text(TINY)
    Path("command.options").write_text(OPTIONS)

    texts = [{"text": f"This is text {i} of thirty.\n\nIt has {i * i} words.\n", "id": i}
             for i in range(30)]
    write_lines("texts/a.jsonl", texts)
    write_lines("texts/b.jsonl", texts[::-1])
    Path("texts/a.txt").write_text("".join(row["text"] for row in texts))
    parquet.write_table(pyarrow.Table.from_pylist(texts), "texts/a.parquet")
    chats = []
    for i in range(40):
        row = json.dumps(CHATS[i % 4])
        chats.append(json.loads(row.replace("2+2", f"{i}+2").replace("Why", f"Why {i}")))
    write_lines("talks/a.jsonl", chats)
    Path("talks/a.json").write_text(json.dumps(chats))
    with suppress(ImportError):
        import zstandard
        lines = Path("talks/a.jsonl").read_bytes()
        Path("talks/a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    parquet.write_table(pyarrow.Table.from_pylist(chats[1::4]), "talks/a.parquet")
    for ending, module in ((".gz", gzip), (".bz2", bz2), (".xz", lzma)):
        for name in ("texts/a.jsonl", "texts/a.txt", "talks/a.jsonl", "talks/a.json"):
            Path(name + ending).write_bytes(module.compress(Path(name).read_bytes()))

    for name, task in TASKS.items():
        if name in ROWS:
            row = ROWS[name]
            write_lines("benchmarks/" + task.eval_file.replace("*", ""), [row] * 3)
            if task.fewshot_file:
                write_lines("benchmarks/" + task.fewshot_file, [row] * 3)
    write_lines("benchmarks/mbpp.jsonl", [ROWS["mbpp"] | {"task_id": i} for i in range(2, 13)])

    Path("tokenizers").mkdir()
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b"is"]
    lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)]
    Path("tokenizers/a.tiktoken").write_text("".join(lines))
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE({**vocab, "th": 256, "the": 257}, [("t", "h"), ("th", "e")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save("tokenizers/a.json")
    shape = MotifConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4,
                        num_attention_heads=4, num_noise_heads=2, num_key_value_heads=2)
    Motif(shape).save_pretrained("released", shard_bytes=8000)
    shutil.copy("tokenizers/a.json", "released/tokenizer.json")
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("the", -2.0)], 0, True))
    unigram.add_special_tokens(["</s>"])
    unigram.save("tokenizers/b.json")


# ---- how each kind is read. Each reader gets the file that was damaged.

def dry_run(script: str, argv: list[str]) -> None:
    """What a script does with its arguments before it opens any data."""
    if script == "sft.py":
        sft.fill_in_stage(configurator.load(sft.Config, argv))
    elif script == "eval.py":
        evaluation.select_tasks(configurator.load(evaluation.Config, argv))
    else:
        sys.argv = ["pretrain.py", *argv, "--dry_run"]
        pretrain.main()


def read_config(file: Path) -> None:
    if file.parent.name == "grids":
        _, out, grid, options = ablate.read_arguments([str(file), "out/grid"])
        ablate.plan_runs(grid, out, options)
        return
    script = "sft.py" if file.name.startswith("sft") else "pretrain.py"
    dry_run(script, [str(file)])


def read_options(file: Path) -> None:
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    dry_run(file.name.replace(".options", ".py"), text.splitlines())


def read_text(file: Path) -> None:
    tokenizer = load_tokenizer("byte")
    for unit in source_units(str(file)):
        skipped = SkippedRows()
        for text in unit(skipped):
            encode_document(tokenizer, text)
        print(skipped.report())


def read_tokenizer(file: Path) -> None:
    tokenizer = load_tokenizer(str(file))
    tokenizer.fingerprint()
    bytes_per_token(tokenizer)
    ids = encode_document(tokenizer, "This is the text, Käse 東京 \x00 <|endoftext|> </s>")
    tokenizer.decode(ids + list(range(min(tokenizer.n_vocab, 300))))
    export_tokenizer(tokenizer, Path())


def read_conversations(file: Path) -> None:
    drops = Drops()
    tokenizer = load_tokenizer("byte")
    parts = train_val_split(list(load_conversations(str(file), drops)), set())
    chosen, _ = choose(parts["train"], {}, 0.8, 0.7)
    print(drops.report())
    for conversations in (parts["val"], chosen):
        encoded, _ = encode_chats(conversations, partial(sft.truncate_to_turn, tokenizer, T=128))
        print(len(encoded))


def read_benchmark(file: Path) -> None:
    benchmark_grams(benchmark_files([str(file)], None))
    for name, task in TASKS.items():
        if task.eval_file and Path(file.name) in map(Path, names_of(task)):
            num_fewshot = 1 if task.fewshot_file else 0
            read_questions(name, task, num_fewshot, None, "benchmarks")


def names_of(task) -> list[str]:
    return [task.eval_file.replace("*", ""), task.fewshot_file or ""]


def read_model(file: Path) -> None:
    """A folder of the released layout: by eval.py, by sft.py, by the export."""
    folder = file.parent
    model = Motif.from_pretrained(folder)
    sft.hash_of_weights(folder)
    sft.stored_tokenizer(folder)
    model(torch.tensor([[1, 2, 3]]))


def read_checkpoint(file: Path) -> None:
    """A checkpoint of a run that resumes, is prolonged, fine-tuned, evaluated or exported."""
    c = configurator.load(pretrain.Config, ["tiny.py", "--max_steps=6", "--lr_may_rise"])
    out = Path("out/tiny")
    start = pretrain.find_checkpoint(c, out)
    curriculum = (pretrain.continue_curriculum(c, start.state) if start
                  else pretrain.make_curriculum(c))
    if start:
        pretrain.check_compatible(start, c, curriculum, load_tokenizer(c.tokenizer))
        pretrain.check_lr_goes_on(c, curriculum, start.state)
    eval_config = evaluation.Config(model=str(out), precision="fp32")
    for folder in evaluation.find_models(eval_config).values():
        evaluation.open_model(folder, eval_config, torch.device("cpu"))
    sft_config = sft.Config(model=str(out), data={"mine": ["talks/a.jsonl", 1.0]})
    sft.stored_tokenizer(sft.initial_folder(sft_config))
    sft.find_start(sft_config, Path("out/sft"))
    export_checkpoint(replace(c, export="exported"), out)
    pretrain.build_model_and_optimizer(c, torch.device("cpu"), start, None, out)
    if start:
        pretrain.NonFiniteSteps(start.state["skipped"])
        log_resumed(Log(out, start.state["step"], c), start, c, "data")


def read_metrics(file: Path) -> None:
    c = configurator.load(pretrain.Config, ["tiny.py"])
    log = Log(Path("out/tiny"), 4, c)
    log.draw()
    log.metrics({"step": 5, "loss": 1.0})


def read_manifest(file: Path) -> None:
    """Prepared data. A piece that is not there would be made: here that ends the reading."""
    c = configurator.load(pretrain.Config, ["tiny.py"])
    tokenizer = load_tokenizer(c.tokenizer)
    domains = {name: data.Domain(name, domain[0], tokenizer, c.data_dir)
               for name, domain in c.domains.items()}
    for domain in domains.values():
        domain.verify()
    dataset = data.TokenDataset(pretrain.make_curriculum(c), domains, c.seed, Absent())
    dataset.fingerprint()
    for step in range(4):
        batch = dataset.batch(step)
        if batch.max() >= c.vocab_size:
            raise IndexError(f"token {batch.max()}")
    for name in domains:
        dataset.validation(name, 64, 32)


class Absent:
    """Stands in for data.Preparer, and makes nothing."""
    limit = 1

    def request(self, domain, tokens, units, part=(0, 1)):
        for unit, piece in units:
            missing = domain.first_missing(unit, piece)
            if tokens <= 0:
                return
            if missing is not None:
                json.dumps(domain.records[unit, missing - 1]["documents"] if missing else 0)
                raise UserError("a piece would be made")
            tokens -= domain.expected_tokens(unit)

    def collect(self, seconds=0.0):
        pass

    def release(self, domain):
        pass


def read_prepared(file: Path) -> None:
    c = sft.Config(data={"mine": ["talks/a.jsonl", 1.0]}, seq_len=128, batch_tokens=256, epochs=2)
    dataset, val_rows = sft.open_dataset(c, file.parent.parent)
    arrays = [val_rows["mine"]]
    arrays += [dataset.batch(step) for step in range(dataset.curriculum.steps)]
    sft.describe_data(c, dataset)
    for ids, targets, _ in arrays:
        if ids.min() < 0 or max(ids.max(), targets.max()) >= 272 or targets.min() < -1:
            raise IndexError(f"tokens {ids.min()} to {ids.max()}")


def read_results(file: Path) -> None:
    """The results and samples of an evaluation that goes on."""
    sys.argv = ["eval.py", *EVAL.split()]
    evaluation.main()


# kind: which files are damaged, and how they are read
KINDS = {
    "config": (["tiny.py", "config/*.py", "config/grids/*.py"], read_config),
    "options": (["*.options"], read_options),
    "text": (["texts/*"], read_text),
    "tokenizer": (["tokenizers/*"], read_tokenizer),
    "conversations": (["talks/*"], read_conversations),
    "benchmark": (["benchmarks/*"], read_benchmark),
    "config.json": (["released/config.json"], read_model),
    "safetensors": (["released/*.safetensors*"], read_model),
    "checkpoint": (["out/tiny/step_*/*", "out/tiny/step_*/optimizer/*"], read_checkpoint),
    "metrics": (["out/tiny/metrics.jsonl", "out/tiny/samples.txt"], read_metrics),
    "manifest": (["data/[ab]-*/*"], read_manifest),
    "prepared": (["data/sft-*/*/*"], read_prepared),
    "results": (["out/eval/*.json*"], read_results),
}
