"""Evaluation: prompts, log-likelihoods and verdicts are those of lm-evaluation-harness 0.4.9.1,
which the tests do not need: eval.json holds rows made up in the form of each task's data set, and
what that program gives on them with the tiny model below (its own task files, byte tokens, begin of
text first): hashes of prompts, sums, scores, and what its filters find in replies."""
import tools.sandbox
import sft
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import pretrain
from eval import TASKS, Config, LoglikelihoodRequest, PromptEncoder, generate_replies, run_program, loglikelihoods
from model import Motif, MotifConfig

FIXTURE = json.loads((Path(__file__).parent / "eval.json").read_text())
CHOICES = [name for name, task in FIXTURE.items() if "sums" in task]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The fixture's rows where --benchmark_dir finds them."""
    folder = tmp_path_factory.mktemp("bench")
    for name, task in FIXTURE.items():
        questions, examples = TASKS[name].files
        files = {questions.replace("*", ""): task["rows"], examples: task["pool"]}
        if name == "mbpp":
            files = {questions: task["rows"] + task["pool"]}
        for file, rows in files.items():
            if file:
                (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a model of some contrast."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = Motif(MotifConfig(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=5, num_noise_heads=1, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, tiny, bench, capsys):
    """run(key=value, ...) runs the script in an empty folder -> what it printed and its records."""
    monkeypatch.chdir(tmp_path)
    def call(**options):
        options = {"model": tiny, "tokenizer": "byte", "benchmark_dir": bench, "out_dir": "o",
                   "device": "cpu", **options}
        argv = [f"--{k}={v}" for k, v in options.items() if v is not None]
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        evaluation.main()
        return capsys.readouterr().out, records("o") if options["out_dir"] else None
    return call


def records(out):
    return [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]


def of_prompt(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- as lm-evaluation-harness has it

@pytest.mark.parametrize("name", CHOICES)
def test_prompts_sums_and_scores_are_the_harness_s(run, name):
    expected = FIXTURE[name]
    _, found = run(tasks=name, shots=expected["shots"])
    assert [of_prompt(r["prompt"]) for r in found] == expected["prompts"]
    for r, sums, scores in zip(found, expected["sums"], expected["scores"], strict=True):
        assert r["output"] == pytest.approx(sums, abs=1e-3) and scores.items() <= r.items()
    results = json.loads(Path("o/results.json").read_text())["tasks"][name]
    values = [100 * scores["acc"] for scores in expected["scores"]]
    mean = sum(values) / len(values)
    error = (sum((x - mean)**2 for x in values) / (len(values) - 1) / len(values))**0.5
    assert results["acc"]["value"] == pytest.approx(mean) and results["acc"]["n"] == len(values)
    assert results["acc"]["stderr"] == pytest.approx(error)


RIGHT = {"gsm8k": lambda row: row["answer"], "mbpp": lambda row: row["code"],
         "humaneval": lambda row: row["canonical_solution"],
         "humaneval_instruct": lambda row: row["canonical_solution"] + "```\nIt is short."}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("right", [True, False])
def test_prompts_of_generation_and_verdicts_on_right_and_empty_replies(
        run, monkeypatch, name, right):
    expected, metric = FIXTURE[name], "strict" if name == "gsm8k" else "pass@1"
    monkeypatch.setattr(evaluation, "replies", lambda model, text, prompts, *options: (
        (i, RIGHT[name](row) if right else "") for i, row in enumerate(expected["rows"])))
    _, found = run(tasks=name, shots=expected["shots"], run_code=True)
    assert [of_prompt(r["prompt"]) for r in found] == expected["prompts"]
    assert [r[metric] for r in found] == [float(right)] * len(found)


def test_gsm8k_s_answers_are_those_that_the_harness_extracts():
    for r in FIXTURE["gsm8k"]["replies"]:
        assert evaluation.number_in(r["reply"], True) == r["strict"], r
        assert evaluation.number_in(r["reply"], False) == r["flexible"], r


@pytest.mark.parametrize("name, steps", [("chains", {2, 3, 4}), ("longer_chains", {5, 6})])
def test_chains_are_asked_in_turns_and_their_answers_compared(run, text, monkeypatch, name, steps):
    """Right replies, those whose last step is wrong, and those that end before the answer."""
    talks, asked = list(sft.load_conversations(evaluation.HELD_OUT[
        {"chains": "held_chains"}.get(name, name)][0])), []
    def reply(i):
        lines = talks[i][1]["content"].split("\n")
        return "\n".join([lines, [*lines[:-2], "?", lines[-1] + "."], lines[:-1]][i % 3])
    monkeypatch.setattr(evaluation, "replies", lambda model, text, prompts, *options: (
        asked.extend(prompts), [(i, reply(i)) for i in range(len(prompts))])[1])
    printed, found = run(tasks=name, limit=30, benchmark_dir=None)
    assert asked == [sft.encode_prompt(text.tokenizer, talk[:1]) for talk in talks[:30]]
    n = [len(talk[1]["content"].split("\n")) for talk in talks[:30]]
    assert {k - 1 for k in n} == steps
    assert [r["acc"] for r in found] == [1.0, 0.0, 0.0] * 10
    assert [r["steps"] for r in found] == pytest.approx(
        [1 - (0, 2 / k, 1 / k)[i % 3] for i, k in enumerate(n)])
    results = json.loads(Path("o/results.json").read_text())["tasks"][name]
    assert results["acc"]["value"] == pytest.approx(100 / 3) and results["acc"]["n"] == 30
    assert re.search(rf"^{name} +0 +acc +30 +33.333 ± 8.754 +-$", printed, re.M)


def test_chains_of_a_model_are_greedy_and_the_same_again(run):
    options = dict(tasks="chains", limit=1, benchmark_dir=None)
    _, first = run(**options, out_dir="o")
    Path("o/samples.jsonl").unlink()
    assert run(**options)[1] == first and all(len(r["output"]) == 1 for r in first)


def test_local_rows_are_the_hub_s():
    arc, mine = FIXTURE["arc_easy"]["rows"][1], {}
    mine = {"question": arc["question"], "choices": arc["choices"]["text"], "answer": 0}
    assert TASKS["arc_easy"].read(mine) == TASKS["arc_easy"].read(arc)
    for name in "siqa", "winogrande":
        row = FIXTURE[name]["rows"][1]
        mine = {"question": row.get("sentence") or f"{row['context']} {row['question']}",
                "choices": [v for k, v in row.items() if re.match("option|answer.", k)],
                "answer": int(row.get("label", row.get("answer"))) - 1}
        assert TASKS[name].read(mine) == TASKS[name].read(row)
    for row in FIXTURE["hellaswag"]["rows"]:
        mine = {k: v for k, v in row.items() if k not in ("ctx_a", "ctx_b")}
        assert TASKS["hellaswag"].read(mine) == TASKS["hellaswag"].read(row)


# ---- the scorer and the generator, against passes of whole sequences

@pytest.fixture(scope="module")
def model(tiny):
    return Motif.from_pretrained(tiny).requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    tokenizer = data.load_tokenizer("byte")
    return PromptEncoder(tokenizer, tokenizer._special_tokens[data.BEGIN])


@torch.no_grad()
def plain(model, context, continuation):
    """log p of a continuation from one pass over the last tokens that the model can read."""
    ids = (context + continuation)[-model.config.max_position_embeddings - 1:]
    log_p = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    n = min(len(continuation), len(ids) - 1)
    return log_p[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).sum().item()


def test_scores_in_batches_are_those_of_one_sequence_each(model, monkeypatch):
    """Contexts of many lengths, some too long for the model, with and without common beginnings of
    group and document; choices of many lengths."""
    rng, pairs, requests = torch.Generator().manual_seed(1), [], []
    def draw(n):
        return torch.randint(256, (n,), generator=rng).tolist()
    begins = {"a": draw(90), "b": draw(200), "": []}
    for i in range(24):
        group = ("a", "b", "")[i % 3]
        context = begins[group] + draw((5, 40, 90, 300)[i % 4] if i != 7 else 511)
        pairs.append([(context, draw(1 if i % 5 == 0 else 3 + 7 * j)) for j in range(2 + i % 3)])
        requests.append(LoglikelihoodRequest(i, pairs[-1], 512, group))
    pairs.append([(draw(9), draw(600))])                 # longer than the model by itself
    requests.append(LoglikelihoodRequest(24, pairs[-1], 512))
    expected = [[plain(model, *pair) for pair in own] for own in pairs]
    kept, new_cache = [], model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda rows, length: (
        kept.append((rows, length)), new_cache(rows, length))[1], raising=False)
    for batch_tokens in 1, 2048, 10**5:
        kept.clear()
        seen = {r.doc: found for r, found in loglikelihoods(model, requests, batch_tokens)}
        assert len(seen) == 25
        assert all(rows == 1 or rows * length <= batch_tokens / 2 for rows, length in kept)
        assert (max(kept)[0] > 3) == (batch_tokens > 1)
        for i, own in enumerate(expected):
            sums = [found.sum().item() for found in seen[i]]
            assert sums == pytest.approx(own, abs=1e-3)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(text):
    assert text.pair("a  ", "b") == (text.first + [97], [32, 32, 98])
    assert text.pair("", " b") == (text.first, [32, 98])
    gpt = PromptEncoder(data.load_tokenizer("byte"), None)
    assert gpt.pair("a", "b") == ([97], [98])
    assert gpt.pair("", "b") == ([gpt.specials[data.BEGIN]], [98])
    assert gpt.pair(" ", "b") == ([gpt.specials[data.BEGIN]], [32, 98])


def test_a_tokenizer_json_says_whether_it_begins_a_text():
    tokenizer = data.load_tokenizer("byte")
    template = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": data.BEGIN, "type_id": 0}}, {"Sequence": {"id": "A"}}]}
    begin = tokenizer._special_tokens[data.BEGIN]
    assert evaluation.first_token({"post_processor": template}, tokenizer) == begin
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    assert evaluation.first_token({"post_processor": both}, tokenizer) == begin
    for none in None, {"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": []}:
        assert evaluation.first_token({"post_processor": none}, tokenizer) is None
    template["single"][0]["SpecialToken"]["id"] = "<s>"
    with pytest.raises(ValueError, match="begins texts with <s>, no added token"):
        evaluation.first_token({"post_processor": template}, tokenizer)


def test_replies_are_those_of_greedy_passes_without_a_cache(model, text):
    """Prompts of unequal length, in batches, cut at stop strings, which fall within replies."""
    prompts = [list(b"The quick brown fox"[:n]) for n in (1, 4, 9, 19)] + [list(b"zq" * 300)]
    stops = {}
    expected = []
    for ids in prompts:
        ids = ids[-(512 - 24):]
        start = len(ids)
        with torch.no_grad():
            for _ in range(24):
                ids = ids + [model(torch.tensor([ids]))[0, -1].argmax().item()]
        expected.append(ids[start:])
    whole = [cut_at(said, text, ()) for said in expected]
    assert dict(generate_replies(model, text, prompts, (), 24, 2048)) == dict(enumerate(whole))
    stops = [w[k:k + 1] for w, k in zip(whole, (3, 9, 20)) if len(w) > k and w[k] != "\ufffd"]
    assert stops
    cut = [cut_at(said, text, stops) for said in expected]
    assert cut != whole
    assert dict(generate_replies(model, text, prompts, tuple(stops), 24, 2048)) == dict(enumerate(cut))


def test_bits_of_replies_are_the_loss_of_fine_tuning(model, text):
    docs = {i: evaluation.read_chain(talk) for i, talk in enumerate(
        sft.load_conversations("builtin:chains?n=3&steps=2"))}
    found = dict(evaluation.bits_per_byte(None, docs, model, text, Config(batch_tokens=600)))
    for i, talk in enumerate(sft.load_conversations("builtin:chains?n=3&steps=2")):
        ids, targets = (torch.tensor([x]) for x in sft.encode_chat(text.tokenizer, talk))
        nats = model(ids, targets, reduction="sum").item()
        assert sum(found[i]["bits"].values()) == pytest.approx(nats / math.log(2), rel=1e-5)
        assert sum(found[i]["bytes"].values()) == len(talk[1]["content"])


def test_every_batch_and_every_question_has_noise_of_its_own(model, text):
    """One question in many batches, then the same by itself, as another rank has it."""
    docs = {i: evaluation.Example("The fox", row={}) for i in range(12)}
    task = evaluation.Task(None, judge=lambda doc, generate_replies: {}, new_tokens=24)
    c = Config(batch_tokens=4 * (len(text.ask("The fox")) + 24), temperature=1.0, chat=True)
    def sampled(docs):
        return {i: r["output"][0]
                for i, r in evaluation.generation(task, docs, model, text, c)}
    said = sampled(docs)
    assert len({*said.values()}) == 12 and sampled(docs) == said
    assert sampled({5: docs[5]})[5] not in said.values()


def cut_at(ids, text, stops):
    ids = ids[:next((i for i, t in enumerate(ids) if t in text.ends), None)]
    said = b"".join(text.bytes[i] if i < len(text.bytes) else b"\xff" for i in ids)
    cuts = [k for k in (said.find(stop.encode()) for stop in stops) if k >= 0]
    return said[:min(cuts, default=None)].decode("utf-8", "replace")


def test_stop_strings_are_found_across_tokens_and_ended_rows_are_left_out(text):
    alive, counts = [0, 1, 2, 3], []

    def stream():
        for column in zip(b"one\n\ntwo", b"Question", b"no\n\nmore", b"so zz it"):
            counts.append(len(alive))
            rows = yield torch.tensor(column)[alive, None]
            if rows is not None:
                alive[:] = [alive[k] for k in rows]
    assert dict(evaluation.finished(stream(), [5, 6, 7, 8], text, ("\n\n", "zz"))) == {
        5: "one", 6: "Question", 7: "no", 8: "so "}
    assert counts == [4, 4, 4, 4, 4, 2, 2, 2] and alive[0] == 1


def test_bits_per_byte_are_those_of_whole_windows(run, model, text):
    Path("own.txt").write_text("Ships sail.\n" * 90)
    printed, (r,) = run(tasks="bpb:own.txt")
    ids, total = text.first + list(b"Ships sail.\n" * 90), 0.0
    for start in 0, 512, 1024:
        total -= plain(model, ids[start:start + 1], ids[start + 1:start + 513])
    assert sum(r["bytes"].values()) == 1080 and "bits per byte" in printed
    assert sum(r["bits"].values()) == pytest.approx(total / math.log(2), rel=1e-5)
    first = -plain(model, ids[:1], ids[1:2]) - plain(model, ids[512:513], ids[513:514]) - plain(
        model, ids[1024:1025], ids[1025:1026])
    assert r["bits"]["0"] == pytest.approx(first / math.log(2), rel=1e-4)
    assert r["bytes"] == {"0": 3, "1": 3, "2": 6, "4": 12, "8": 24, "16": 48, "32": 88, "64": 128,
                          "128": 256, "256": 512}


# ---- the sandbox

PROGRAMS = {
    "right": ("def f(x):\n    return x + 1\nassert f(1) == 2", "passed"),
    "wrong": ("assert 1 + 1 == 3", "failed: AssertionError"),
    "sys.exit(0)": ("import sys\nsys.exit(0)\nassert False", "failed"),
    "os._exit(0)": ("import os\nos._exit(0)\nassert False", "failed"),
    "endless": ("while True: pass", "timed out"),
    "fork bomb": ("import os\nwhile True: os.fork()", "(failed|timed out)"),
    "1 GB": ("x = bytearray(10**9)", "failed: MemoryError"),
    "flood": ("while True: print('x' * 10**6)", "failed"),
    "much": ("print('x' * 2 * 10**6)", "passed"),
    "outside": ("open({outside!r}, 'w').write('x')", "failed: PermissionError"),
    "inside": ("open('x', 'w').write('x')\nassert open('x').read() == 'x'", "passed"),
    "grandchild": ("import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time\\n"
                   "time.sleep(987)'], start_new_session=True)", "passed"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_sandbox(name, tmp_path):
    code, verdict = PROGRAMS[name]
    outside = tmp_path / "outside"
    if name == "outside" and tools.sandbox.sandbox_gaps():
        pytest.skip("this system cannot confine writing")
    found = run_program(code.replace("{outside!r}", repr(str(outside))), 2.0)
    assert re.match(verdict, found), found
    assert not outside.exists() and not processes_with("time.sleep(987)")
    assert not processes_with("in_child()")


def processes_with(words):
    """Those whose command line has the words, zombies aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words.encode() in entry.read_bytes():
                found.append(entry)
        except OSError:
            continue
    return found


def test_no_network_where_it_can_be_unshared():
    if tools.sandbox.in_sandbox("", 10.0)[1][:1] != "1":
        pytest.skip("this system does not unshare the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nsocket.create_connection({server.getsockname()}, 1)"
        assert run_program(code).startswith("failed: OSError")


def test_pass_at_k():
    assert evaluation.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert evaluation.pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert evaluation.pass_at_k(3, 2, 2) == 1.0


# ---- the run

def test_a_cut_run_goes_on_and_other_settings_begin_anew(run, monkeypatch):
    _, whole = run(tasks="arc_easy,piqa", shots=1)
    samples = Path("o/samples.jsonl")
    lines = samples.read_text().splitlines(True)
    samples.write_text("".join(lines[:2]) + lines[2][:30])
    measured = []
    monkeypatch.setattr(evaluation, "scored", lambda model, requests, batch_tokens: (
        measured.extend(requests), loglikelihoods(model, requests, batch_tokens))[1])
    _, again = run(tasks="arc_easy,piqa", shots=1)
    assert len(measured) == len(whole) - 2
    for a, b in zip(again, whole, strict=True):          # other batches, hence other last digits
        assert a.pop("output") == pytest.approx(b.pop("output"), rel=1e-5) and a == b
    _, other = run(tasks="arc_easy", shots=0)            # other documents, the same settings
    assert len(other) == len(whole) and len(measured) == len(whole) + 1
    assert [r["hash"] for r in other[3:]] == [r["hash"] for r in whole[3:]]
    assert not {r["hash"] for r in other[:3]} & {r["hash"] for r in whole}
    results = json.loads(Path("o/results.json").read_text())["tasks"]
    assert {name: r["acc"]["shots"] for name, r in results.items()} == {"arc_easy": 0, "piqa": 1}
    _, other = run(tasks="arc_easy", chat=True)
    assert len(other) == 3 and len(measured) == len(whole) + 4


def test_a_document_that_has_changed_is_measured_again(run):
    rows = [{"text": "Ships sail."}, {"text": "Cranes fly."}]
    def measured():
        Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run(tasks="bpb:own.jsonl")[1]
    first = measured()
    rows[1]["text"] = "Cranes swim."
    second = measured()
    assert second[0] == first[0] and second[1]["prompt"] == "Cranes swim."
    assert sum(second[1]["bytes"].values()) == len("Cranes swim.")


def test_stages_stand_side_by_side_and_are_measured_once(run, tiny, monkeypatch):
    monkeypatch.setattr(evaluation, "BUILTIN_DOCS", 1)
    for name in "quickstart/step_2", "quickstart/step_4", "sft1/step_3":
        shutil.copytree(tiny, Path("out", name))
        Path("out", name, "state.json").write_text('{"files": {}, "config": {"tokenizer": "byte"}}')
    Path("out/quickstart/step_6").mkdir()                # torn: passed over
    alone = dict(model=None, tokenizer=None, benchmark_dir=None, limit=1)
    printed, _ = run(**alone, out_dir=None)
    assert re.search(r"^task .* quickstart +sft1 +reported$", printed, re.M)
    rows = re.findall(r"^(\S+) .* ([\d.]+) ± +nan +([\d.]+) ± +nan +-$", printed, re.M)
    assert [name for name, *_ in rows] == [*evaluation.BPB, "chains", "chains"]
    assert all(a == b for _, a, b in rows)
    monkeypatch.setattr(evaluation, "scored", lambda *options: ())
    monkeypatch.setattr(evaluation, "replies", lambda *options: ())
    again, _ = run(**alone, out_dir=None)
    assert again[again.index("\ntask"):] == printed[printed.index("\ntask"):]
    monkeypatch.setattr(evaluation, "scored", loglikelihoods)
    printed, _ = run(**{**alone, "model": "out/quickstart"}, out_dir=None, tasks="bpb", plot=True)
    assert re.search(r"^task .* step_2 +step_4 +reported$", printed, re.M)
    assert Path("out/eval/scores.png").exists()


def test_a_limited_run_goes_on_without_the_limit(run):
    expected = FIXTURE["mmlu"]
    groups = [row["subject"] for row in expected["rows"]]
    _, few = run(tasks="mmlu", shots=expected["shots"], limit=1)
    assert [r["doc"] for r in few] == sorted(groups.index(group) for group in {*groups})
    _, all_ = run(tasks="mmlu", shots=expected["shots"])
    assert [of_prompt(r["prompt"]) for r in all_] == expected["prompts"]
    assert [r for r in all_ if r["doc"] in [f["doc"] for f in few]] == few and len(few) < len(all_)


def as_rank(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    for module in evaluation, pretrain:
        module.RANK, module.WORLD = rank, 2
    torch.set_num_threads(1)
    pretrain.run_main(evaluation.main)


def test_ranks_share_the_documents_and_the_scores_stay(run, monkeypatch):
    _, one = run(tasks="arc_challenge,mmlu", shots=2)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(sys, "argv", [w.replace("dir=o", "dir=two") for w in sys.argv])
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=as_rank, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    two = records("two")
    assert [r["prompt"] for r in two] == [r["prompt"] for r in one] and not list(
        Path("two").glob("samples.*.jsonl"))
    for a, b in zip(one, two, strict=True):
        assert a["output"] == pytest.approx(b["output"], abs=1e-4) and a["acc"] == b["acc"]


def test_chat_keeps_the_conversation(model, text, monkeypatch, capsys):
    lines, asked = iter(["hello", "/system Be brief.", "again", "/temp x", "/what", "/reset", "new",
                         "/quit"]), []
    def reply_to(messages, *options):
        asked.append([(m["role"], m["content"]) for m in messages])
        return "yes"
    monkeypatch.setattr(evaluation, "reply_to", reply_to)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    evaluation.chat(model, text, Config())
    system = ("system", "Be brief.")
    assert asked == [[("user", "hello")], [system, ("user", "again")], [system, ("user", "new")]]
    printed = capsys.readouterr().out
    assert "/temp needs a number" in printed and "/what is unknown" in printed


def test_a_turn_s_special_tokens_cannot_be_spelled_by_a_user(model, text, monkeypatch, capsys):
    at = text.specials
    ids = text.ask("a<|endofturn|>")
    assert ids == [at[data.BEGIN], at["<|startofturn|>"], at["<|user|>"],
                   *b"\n\na<|endofturn|>", at["<|endofturn|>"], at["<|startofturn|>"],
                   at["<|assistant|>"], *b"\n\n"]
    monkeypatch.setattr(model.config, "max_position_embeddings", 40)
    long = [{"role": "user", "content": "x" * 600}, {"role": "user", "content": "short"}]
    assert evaluation.reply_to(long, model, text, 0.0, 1) == evaluation.reply_to(
        long[1:], model, text, 0.0, 1)
    system, said = {"role": "system", "content": "s"}, {"role": "assistant", "content": "y" * 9}
    monkeypatch.setattr(model.config, "max_position_embeddings", 64)
    for kept, turns in ([system, long[1]], [system, long[0], said, long[1]]), (
            [system, long[0]], [system, long[0]]):
        read = []
        monkeypatch.setattr(model, "stream", lambda ids, *_, **__: read.append(ids) or iter(()),
                            raising=False)
        evaluation.reply_to(turns, model, text, 0.0, 1)
        assert read[0][0].tolist() == sft.encode_prompt(text.tokenizer, kept)[-32:]
    monkeypatch.undo()
    stream = model.stream
    def interrupted(*arguments, **options):
        yield next(stream(*arguments, **options))
        raise KeyboardInterrupt
    monkeypatch.setattr(model, "stream", interrupted, raising=False)
    assert len(evaluation.reply_to(long[1:], model, text, 0.0, 1)) <= 1


@pytest.mark.parametrize("options, words", [
    (dict(tasks="arc_esay"), "unknown task 'arc_esay'; did you mean 'arc_easy'?"),
    (dict(tasks="humaneval"), "--run_code"),
    (dict(tasks="arc_easy", benchmark_dir="none"), r"none/arc_easy_test.jsonl is missing: .*put it"),
    (dict(tasks="arc_easy", shots=5), "shots=5, but arc_easy_train.jsonl has 4 examples; lower"),
    (dict(tasks="humaneval", shots=1, run_code=True), "has no examples; give --num_fewshot=0"),
    (dict(tasks="arc_easy", tokenizer="gpt2.json"), "tokenizer gpt2.json"),
    (dict(tasks="arc_easy", tokenizer=None), "has no tokenizer.json; give --tokenizer"),
    (dict(model="nowhere"), "model=nowhere is neither a folder nor"),
    (dict(model=None), "none of out/quickstart, .* holds a checkpoint; run `python pretrain.py`"),
    (dict(tasks="bpb:none.txt"), "no file matches none.txt"),
    (dict(tasks="bpb:empty.txt"), "bpb:empty.txt has no documents"),
    (dict(tasks="chat,mmlu"), "chat is none of several tasks"),
    (dict(tasks="humaneval", run_code=True, samples=10), "samples=10 are all the same at temp"),
    (dict(tasks="arc_easy", out_dir="empty.txt"), "empty.txt: FileExistsError"),
    (dict(tasks="piqa,openbookqa", shots=3), "shots=3, but piqa_train.jsonl has 3 .*: 4 are drawn"),
    (dict(tasks="arc_easy,humaneval,bpb:none.txt", run_code=True), "no file matches none.txt"),
])
def test_wrong_input_is_told_in_one_line(run, monkeypatch, options, words):
    Path("empty.txt").touch()
    monkeypatch.setattr(evaluation, "scored", None)          # nothing is scored before
    with pytest.raises(SystemExit, match=words) as e:
        run(**options)
    assert "\n" not in str(e.value) and not Path("o").exists()


@pytest.mark.parametrize("row, words", [
    ("{", "1: not JSON"), ('{"question": "x"}', "1: no 'choices'; the row has question"),
    ('{"question": "x", "choices": ["a", "b"], "answer": 2}', "1: answer 2 is none of 2 choices"),
    ('{"question": "x", "choices": ["a", ""], "answer": 0}', "1: a choice is empty"),
    ('{"question": "x", "choices": 3, "answer": 2}', "1: TypeError")])
def test_a_malformed_row_is_named_by_file_and_line(run, row, words):
    Path("b").mkdir()
    Path("b/arc_easy_test.jsonl").write_text(row + "\n")
    with pytest.raises(SystemExit, match=f"b/arc_easy_test.jsonl:{words}"):
        run(tasks="arc_easy", benchmark_dir="b")


@pytest.mark.parametrize("name, change, words", [
    ("humaneval", {"test": None}, "HumanEval.jsonl:1: TypeError"),
    ("mbpp", {"test_setup_code": None}, "mbpp.jsonl:1: TypeError")])
def test_a_row_of_which_no_program_can_be_made(run, name, change, words):
    Path("b").mkdir()
    row = {**FIXTURE[name]["rows"][0], **change}
    Path("b", TASKS[name].files[0]).write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match=words):
        run(tasks=name, benchmark_dir="b", run_code=True)


def test_a_tokenizer_larger_than_the_model(run, tiny):
    Motif(MotifConfig(vocab_size=200)).save_pretrained("small")
    with pytest.raises(SystemExit, match="has 263 tokens, more than the model's vocab_size=200"):
        run(model="small", tasks="arc_easy")
