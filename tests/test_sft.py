"""Conversations as tokens, packed rows against each conversation alone, the tasks that are made,
what is dropped, and sft.py itself: resume, the order of stages, four ranks against one."""
import tools.plots
import synthetic.conversations
import ast
import base64
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ranks import ROOT, metrics, stored
from worlds import world

import data
from model import Motif, MotifConfig

if __name__ != "__main__":               # of many ranks each imports them once it knows its rank
    import pretrain
    import sft

TINY = MotifConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=5,
                   num_noise_heads=1, num_key_value_heads=2, head_dim=8)
DATA = {"skills": ["builtin:skills?n=40", 1.0], "chains": ["builtin:chains?n=40&steps=2", 1.0],
        "longer": ["builtin:chains?n=3&steps=3", 0.0]}
OPTIONS = dict(data=DATA, seq_len=256, batch_tokens=1280, micro_batch_tokens=512, lr_scale=100,
               eval_every=8, eval_tokens=512, save_every=8, log_every=1, sample_tokens=4,
               keep_last=9, device="cpu", timeout=30)
BYTE = data.load_tokenizer("byte")
SPECIAL = {token.strip("<|>"): i for token, i in BYTE._special_tokens.items()}
TALK = [{"role": "system", "content": "S"}, {"role": "user", "content": "<|endofturn|>"},
        {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "b\n"},
        {"role": "assistant", "content": "no"}]


def base(folder: Path) -> None:
    """A checkpoint to begin with."""
    torch.manual_seed(1)
    Motif(TINY).save_pretrained(folder)
    (folder / "state.json").write_text('{"step": 1, "files": {}, "config": {"tokenizer": "byte"}}')


def train(out: str | Path, **options) -> None:
    import pretrain
    import sft
    tools.plots.plot_training = lambda out: None
    options = {**OPTIONS, "out_dir": out, **options}
    sys.argv = ["sft.py", *(f"--{key}={value}" for key, value in options.items())]
    sft.main()


# ---- tokens

def test_conversations_are_encoded_as_by_hand():
    begin, end, turn, stop, system, user, assistant = (SPECIAL[name] for name in (
        "beginoftext", "endoftext", "startofturn", "endofturn", "system", "user", "assistant"))
    asked = [begin, turn, system, 10, 10, 83, stop, turn, user, 10, 10, *b"<|endofturn|>", stop,
             turn, assistant, 10, 10]
    again = [turn, user, 10, 10, 98, 10, stop, turn, assistant, 10, 10]
    ids, targets = sft.encode_chat(BYTE, TALK)
    assert ids == asked + [*b"Yes", stop] + again + [*b"no", stop]
    assert targets == ([-1] * (len(asked) - 1) + [*b"Yes", stop, -1]
                       + [-1] * (len(again) - 1) + [*b"no", stop, -1])
    assert sft.encode_prompt(BYTE, TALK[:2]) == asked
    assert end not in ids


def test_a_tokenizer_of_the_hub_gives_what_its_parts_give(tmp_path):
    """"\n\n" is a token of its own, whatever follows: a reply comes behind it."""
    file = tmp_path / "t.tiktoken"
    tokens = [bytes([i]) for i in range(256)] + [b"\n\n", b"Ye"]
    file.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n"
                            for i, t in enumerate(tokens)))
    t = data.load_tokenizer(str(file))
    ids, targets = sft.encode_chat(t, [TALK[1], TALK[2]])
    n = t._special_tokens
    assert ids[:4] == [n["<|beginoftext|>"], n["<|startofturn|>"], n["<|user|>"], 256]
    assert ids[-4:] == [256, 257, ord("s"), n["<|endofturn|>"]]
    assert targets[-4:] == [257, ord("s"), n["<|endofturn|>"], -1]


def test_a_conversation_is_cut_at_a_turn():
    whole, first = (len(sft.encode_chat(BYTE, TALK[:n])[0]) for n in (5, 3))
    question = TALK + [{"role": "user", "content": "And?"}]
    assert sft.truncate_to_turn(BYTE, question, whole) == (*sft.encode_chat(BYTE, TALK), False)
    assert sft.truncate_to_turn(BYTE, TALK, whole - 1) == (*sft.encode_chat(BYTE, TALK[:3]), True)
    assert sft.truncate_to_turn(BYTE, TALK, first - 1) is None


@pytest.mark.parametrize("row, said", [
    ({"messages": []}, "no turn is the assistant's; drop this conversation"),
    ({"messages": [TALK[1]]}, "no turn is the assistant's; drop this conversation"),
    ({"messages": [TALK[1], {"role": "assistant", "content": " \n"}]},
     "message 2, the assistant's, has no content; drop this conversation"),
    ({"messages": [{"role": "human", "content": "x"}]},
     "message 1 has the unknown role 'human'; it must be one of system, user, assistant"),
    ({"messages": [TALK[1], TALK[2], TALK[2]]},
     "messages 2 and 3 are both the assistant's; join them"),
    ({"question": "x", "answer": "y"},
     "no list of messages in 'messages'; it has question, answer, and needs 'messages': [{'role': "
     "'user', 'content': '...'}, ...], or ?messages=COLUMN")])
def test_a_row_that_is_no_conversation_is_refused(tmp_path, row, said):
    file = tmp_path / "talks.jsonl"
    file.write_text(f'{json.dumps({"messages": TALK})}\n\n{json.dumps(row)}\n')
    with pytest.raises(ValueError) as e:
        list(sft.load_conversations(str(file)))
    assert str(e.value) == f"{file}: byte {file.read_text().index(chr(10)) + 2}: {said}"
    if "messages" in row:
        with pytest.raises(ValueError, match=re.escape(said)):
            sft.encode_chat(BYTE, row["messages"])


def test_other_wrong_sources_and_tokenizers_are_refused():
    for source, said in (("builtin:jokes", "builtin conversations are help, skills, chains"),
                         ("builtin:chains?steps=4-2", "steps=4-2 must be a number or two"),
                         ("builtin:help?steps=2", "none of its options (n=...)"),
                         ("talks.csv", "is neither builtin:..., files ending in .jsonl")):
        with pytest.raises(ValueError, match=re.escape(said)):
            list(sft.load_conversations(source))
    bare = data.tiktoken.Encoding("bare", pat_str=".", special_tokens={},
                                  mergeable_ranks={bytes([i]): i for i in range(256)})
    with pytest.raises(ValueError, match=r"tokenizer bare lacks the turn format's <\|beginoftext"):
        sft.encode_chat(bare, TALK)


# ---- packing

def test_each_conversation_goes_where_it_leaves_least_room():
    """Against the definition, which looks at every row."""
    lengths, T, rows = np.random.default_rng(0).integers(1, 45, 500), 100, []
    for i in np.argsort(-lengths, kind="stable"):
        left = [T - lengths[r].sum() - lengths[i] for r in rows]
        enough = [k for k, room in enumerate(left) if room >= 0]
        if not enough:
            rows.append([])
            left, enough = {len(rows) - 1: 0}, [len(rows) - 1]
        rows[min(enough, key=left.__getitem__)].append(i)
    ours = sft.pack(lengths, T)
    assert sorted(i for row in ours for i in row) == [*range(500)]
    assert sorted(lengths[row].sum() for row in ours) == sorted(lengths[row].sum() for row in rows)
    assert lengths.sum() / (len(ours) * T) > 0.98


def test_packed_rows_are_each_conversation_alone():
    """Loss and gradients, with padding at the end of a row."""
    torch.manual_seed(2)
    model = Motif(TINY)
    talks = [np.array(sft.encode_chat(BYTE, t)) for t in sft.load_conversations("builtin:skills?n=12")]
    rows = sft.pack(np.array([t.shape[1] for t in talks]), 640)
    ids, targets, documents = map(torch.from_numpy, sft.collate([[talks[i] for i in r] for r in rows],
                                                              640))
    count = int((targets >= 0).sum())
    assert len(rows) < 8 and count == sum((t[1] >= 0).sum() for t in talks)
    losses, gradients = [], []
    for batches in [(ids, targets, documents)], [torch.from_numpy(t)[:, None] for t in talks]:
        model.zero_grad()
        losses.append(sum(pretrain.forward_backward(model, tuple(b), 9, count)[0] for b in batches))
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_a_stream_reads_every_conversation_as_often_as_its_weight_says(tmp_path):
    parts = {}
    for name, source in ("skills", "builtin:skills?n=60"), ("chains", "builtin:chains?n=90"):
        talks = [sft.encode_chat(BYTE, t) for t in sft.load_conversations(source)]
        sft.TokenizedChats.save(tmp_path / name, talks)
        parts[name] = sft.TokenizedChats(tmp_path / name)
        assert parts[name][7].tolist() == [*map(list, talks[7])]
    make = dict(T=512, batch_tokens=2048, epochs=3, seed=5)
    stream = sft.PackedChatDataset(parts, {"skills": 0.75, "chains": 0.25}, **make)
    times, plan = {"skills": np.zeros(60, int), "chains": np.zeros(90, int)}, stream.curriculum
    for step in range(plan.steps):
        ids, targets, documents = stream.batch(step)
        assert ids.shape == (plan.rows[step], 512) and plan.rows[step] <= 4
        assert stream.num_targets(step) == (targets >= 0).sum()
        for rank in range(3):
            for a, b in zip(stream.batch(step, rank, 3), (ids, targets, documents)):
                assert np.array_equal(a, b[rank::3])
        for d, i in stream.talks(step):
            times[plan.names[d]][i] += 1
    for name, share in ("skills", 0.75), ("chains", 0.25):
        assert np.ptp(times[name]) <= 1
        assert (times[name] * parts[name].lengths).sum() / plan.tokens[-1] == pytest.approx(
            share, abs=0.01)
    again = sft.PackedChatDataset(parts, {"skills": 0.75, "chains": 0.25}, **make)
    assert again.batches == stream.batches and again.fingerprint() == stream.fingerprint()
    whole = sft.PackedChatDataset(parts, {name: float(talks.ends[-1]) for name, talks in parts.items()},
                        T=512, batch_tokens=512, epochs=1, seed=5)
    assert len({(d, i) for step in range(whole.plan.steps) for d, i in whole.talks(step)}) == 150
    few = sft.PackedChatDataset(parts, {"skills": 0.99, "chains": 0.01}, **make)
    assert (few.plan.shares * np.diff(few.plan.tokens)[:, None]).sum(0)[0] <= (
        3 * sft.REPEATS * parts["skills"].ends[-1] + 500)


# ---- the tasks that are made

def solve(ask: str, x):
    """One step of a task, read from its words alone."""
    n = [int(k) for k in re.findall(r"\d+", ask)]
    code, words = re.search(r"`(.*)`", ask), ask.lower()
    if code and "for i in range" in code[1]:
        names = {"x": x}
        exec(code[1], {}, names)
        return names["x"]
    if code:
        return eval(code[1], {"s": x, "a": x})
    if "convert" in words:
        a, b = re.search(r"as (\w+) and convert it to (\w+)", ask).groups()
        seconds = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
        known = [seconds, {"metres": 100, "centimetres": 1}, {"dozens": 12, "pieces": 1},
                 {"years": 12, "months": 1}]
        scale = next(k for k in known if a in k and b in k)
        return x * scale[a] // scale[b]
    if "so many days after" in words:
        text = re.search(r"after (.*)", ask)[1]
        start = datetime.datetime.strptime(text, "%d %B %Y").date()
        return datetime.date.fromordinal(start.toordinal() + x)
    table = [("weeks further", lambda: datetime.date.fromordinal(x.toordinal() + 7 * n[0])),
             ("day of the week", lambda: ["monday", "tuesday", "wednesday", "thursday", "friday",
                                          "saturday", "sunday"][x.toordinal() % 7 - 1]),
             ("days of that year", lambda: (x - datetime.date(x.year - 1, 12, 31)).days),
             ("remainder", lambda: divmod(x, n[0])[1]), ("multiply", lambda: x * n[0]),
             ("subtract", lambda: x - n[0]), ("take away", lambda: x - n[0]),
             ("digits", lambda: [*map(int, str(x))]), ("vowels", lambda: len(
                 re.findall("[aeiou]", x))), ("count its letters", lambda: len(x)),
             ("its letters", lambda: "".join(sorted(x))),
             ("reverse", lambda: "".join(reversed(x))), ("backwards", lambda: x[::-1]),
             ("large to small", lambda: sorted(x)[::-1]), ("small to large", lambda: sorted(x)),
             ("add them", lambda: sum(x)), ("sum", lambda: sum(x)), ("largest", lambda: max(x)),
             ("smallest", lambda: min(x)), ("add", lambda: x + n[0])]
    return next(value for words_, value in table if words_ in words)()


def start_of(line: str):
    name, text = re.fullmatch(r"Start with the (\w+) (.*)\.", line).groups()
    return (text if name == "word" else ast.literal_eval(text) if name == "number" else
            datetime.datetime.strptime(text, "%d %B %Y").date() if name == "date" else
            [int(k) for k in text.split(", ")])


def test_the_answers_of_chains_are_right_and_longer_chains_are_longer():
    seen = {}
    for source, least, most in (("chains?n=1500", 2, 4), ("chains?n=200&steps=5-6", 5, 6)):
        lengths = set()
        for ask, reply in sft.load_conversations(f"builtin:{source}"):
            first, *asks = ask["content"].split("\n")
            x = start_of(first)
            for line in asks:
                x = solve(line.partition(". ")[2], x)
            x = (f"{x.day} {x.strftime('%B')} {x.year}" if isinstance(x, datetime.date) else
                 str(x).strip("[]"))
            assert synthetic.conversations.answer_of(reply["content"]) == x, (ask, reply)
            lengths.add(len(asks))
            assert ask["content"] not in seen.setdefault(source, set())
            seen[source].add(ask["content"])
        assert lengths == {*range(least, most + 1)}
    assert not set.intersection(*seen.values())
    assert list(sft.load_conversations("builtin:chains?n=9")) == list(sft.load_conversations("builtin:chains?n=9"))
    assert synthetic.conversations.answer_of("Answer: 3\nAnswer:  4 \n") == "4" and synthetic.conversations.answer_of("4") == ""


def test_system_turns_are_followed_and_docstrings_are_told():
    talks = list(sft.load_conversations("builtin:skills?n=60"))
    alone = [t for t in talks if t[0]["content"] == "Give the result alone."]
    assert 10 < len(alone) < 30 and all("Answer" not in m["content"] for t in alone for m in t)
    assert {len([m for m in t if m["role"] == "assistant"]) for t in talks} == {1, 2}
    helps = list(sft.load_conversations("builtin:help?n=30"))
    assert len(helps) == 30 and all(t[1]["content"].endswith(".") for t in helps)


# ---- what is worth reading

def talk(ask: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]


def test_scores_and_what_is_dropped_for_them():
    good = talk("What are 3 boxes of 4 eggs?", "Each box has 4 eggs.\nSo 3 * 4 = 12.\nAnswer: 12.")
    torn = talk("What are 3 boxes of 4 eggs?", "Each box (of the three has 4 eggs and,")
    assert sft.reasoning_density(good) == pytest.approx(1 / 3) and sft.reasoning_density(torn) == 0
    assert sft.completeness(good) == 1 and sft.completeness(torn) == 0.5
    assert sft.structure(good) == 1 and sft.structure(torn) == pytest.approx(1 / 3)
    assert sft.filter_by_quality([torn, good, torn], 1 / 3) == (
        [good], "2 dropped for a quality below 0.778 or no better")

    other = talk("Name a river of France.", "The Seine is a river of France.")
    near = talk("What are 3 boxes of 4 eggs?", good[1]["content"] + " Yes.")
    mantra = talk("Name a river.", "the river the river the river the river the river the river")
    stray = talk("Name a river.", "Here it is for you. My aunt went shopping again today.")
    kept, text = sft.dedup_and_filter([good, near, other, mantra, stray, good], 0.7)
    assert kept == [good, other]
    assert text == "; ".join(
        f"{n} dropped as {why}, one of them {t[1]['content'][:60]!r}" for n, why, t in (
            (2, "near-duplicate", near), (1, "repetitive", mantra), (1, "incoherent", stray)))


def test_what_is_held_out_is_never_asked_in_training():
    def questions(talks):
        return {m["content"] for t in talks for m in t if m["role"] == "user"}
    one = [talk(f"What is question number {i % 1200}?", f"Answer {i}.") for i in range(2400)]
    two = [[*a, *b] for a, b in zip(one, one[37:])]
    known = {n for t in one[:5] for _, n in sft.question_hashes(t)}
    parts = sft.train_val_split(one + two, known)
    assert len(questions(parts["val"])) == pytest.approx(1200 / data.VAL_EVERY, abs=15)
    assert not questions(parts["train"]) & questions(parts["val"] + one[:5])
    assert len(parts["train"]) > 0.9 * len(one + two)
    both = [t for t in parts["val"] if len(t) == 4]
    cut = [t for t in two if t[0]["content"] in questions(parts["val"]) and t not in both]
    assert cut and all(t[:2] in parts["val"] for t in cut)   # its second question is no such one
    other = sft.train_val_split(two[::-7], set())                  # the same in another domain
    assert questions(other["val"]) <= questions(parts["val"])
    assert [len(x) for x in sft.train_val_split(one[:3], set()).values()] == [1, 2]
    assert sft.train_val_split([], set()) == {"val": [], "train": []}


def test_thirteen_words_of_a_benchmark_are_one_too_many(tmp_path):
    text = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    row = {"id": 1, "choices": [{"text": f"{text}?"}]}
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(row)}\n")
    known = sft.benchmark_grams([f"{tmp_path}/*.jsonl"])
    words = text.split()
    talks = [talk("Say: " + ", ".join(words[:12]), "No " + " ".join(words[2:]).upper()),
             talk("x", "y " + "-".join(words[1:]))]
    assert sft.decontaminate(talks, known) == (
        talks[:1], "1 dropped as they share 13 words with a benchmark")


# ---- the script

@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "stop_signals", list)
    monkeypatch.setattr(pretrain, "draw", tools.plots.plot_training)     # train replaces it
    monkeypatch.setattr(sys, "argv", [])
    base(tmp_path / "out/quickstart/step_1")


def test_stages_follow_each_other_and_resume_is_bitwise(room):
    def refused(**options):
        with pytest.raises(SystemExit) as e:
            train("out/new", **options)
        assert not Path("out/new").exists()
        return e.value.code

    assert refused(stage=3) == ("stage 3 starts from out/sft2, which holds no whole checkpoint; "
                                "run first: python sft.py --stage=2")
    assert refused(seq_len=8192) == ("seq_len=8192 is longer than the max_position_embeddings=4096 "
                                     "of out/quickstart/step_1; lower it")
    assert refused(data={"x y": ["builtin:help", 1]}).startswith("data: 'x y'")
    assert refused(data={"x": ["builtin:help?n=9", 0]}).startswith("data: no domain has")
    assert refused(data={}).startswith("data: no domain has")
    assert refused(batch_tokens=100).startswith("batch_tokens=100 is less than a row")
    train("out/sft1", stage=1)
    steps = metrics(Path("out/sft1"))
    first, last = ([m for m in steps if "val_loss" in m][i] for i in (0, -1))
    assert last["val_loss"] < first["val_loss"] - 0.3
    assert first["val_loss_by_domain"].keys() == DATA.keys()
    assert "val_loss_by_quarter" not in first
    lr = [m["lr"] for m in steps if "lr" in m]
    assert max(lr) == pytest.approx(2e-3, rel=0.02) and lr.index(max(lr)) <= 1 and lr[-1] < 1e-4
    samples = Path("out/sft1/samples.txt").read_text()
    assert samples.count("[What does the module json do?]") == 1 + len(steps) // 8
    said = Path("out/sft1/data.txt").read_text()
    assert "stage 1 from out/quickstart/step_1" in said and "tokens for a weight of 50.0%" in said

    for folder in Path("out/sft1").glob("step_*"):
        if folder.name != "step_8":
            pretrain.shutil.rmtree(folder)
    before = metrics(Path("out/sft1"))
    last = f"step_{before[-1]['step']}"
    train("out/again", stage=1, resume="out/sft1/step_8")
    train("out/sft1", stage=1)
    assert metrics(Path("out/sft1")) == before
    a, b = stored(Path("out/sft1") / last), stored(Path("out/again") / last)
    assert all(torch.equal(a[k], b[k]) for k in a)
    Path("out/quickstart/step_1").rename("out/quickstart/gone")   # not needed to go on
    train("out/sft1", stage=1)
    base(Path("out/quickstart/step_1"))
    model = Motif.from_pretrained("out/quickstart/step_1")
    model.model.norm.weight.data += 1
    model.save_pretrained("out/quickstart/step_1")
    with pytest.raises(SystemExit) as e:                          # nor may it be another
        train("out/sft1", stage=1)
    assert "out/sft1 holds a run that began with out/quickstart/step_1 (" in e.value.code
    straight = metrics(Path("out/again"))
    assert [m["loss"] for m in straight if "loss" in m] == [
        m["loss"] for m in before if m.get("loss") and m["step"] > 8]

    train("out/sft2", stage=2, batch_tokens=5120)
    assert "dropped for a quality" in Path("out/sft2/data.txt").read_text()
    train("out/sft3", stage=3, batch_tokens=5120)
    said = Path("out/sft3/data.txt").read_text()
    assert "stage 3 from out/sft2/step_" in said and "prun" in said
    assert Motif.from_pretrained(pretrain.latest_checkpoint(Path("out/sft3"))[0]).config == TINY


def worlds(folder: Path) -> None:
    torch.set_num_threads(1)
    # 9 rows a step: of four ranks one has a row more, and the others fill theirs up
    options = dict(model=folder / "base", data_dir=folder / "data", batch_tokens=9 * 256,
                   eval_every=7, save_every=7, prompts=["x"], sample_tokens=1)
    base(folder / "base")
    world(1, train, folder / "one", **options)
    world(4, train, folder / "four", **options)


def test_four_ranks_are_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one, four = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    assert [m["step"] for m in one] == [m["step"] for m in four] and len(one) == 9
    for a, b in zip(one, four):
        for key in {"loss", "val_loss", "val_bpb", "grad_norm"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4), (key, a["step"])


if __name__ == "__main__":
    worlds(Path(sys.argv[1]))
