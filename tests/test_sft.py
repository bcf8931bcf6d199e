"""Conversations as tokens, packed rows against each conversation alone, batches, what is dropped,
what is held out, the generated tasks; and sft.py itself: stages, resume, four ranks against one."""
import ast
import base64
import bz2
import datetime
import gzip
import inspect
import json
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import conversations, encoding, selection
from support.conversations import EVAL_DOMAINS, Drops, load_conversations
from support.preparing import remove_leftovers
from support.tokenizer import BEGIN, END, ROLES, TURN, TURN_END, load_tokenizer
from worlds import world

import data
from configurator import UserError
from model import Motif, MotifConfig
from synthetic.conversations import answer_of

# As a script this file forks ranks, each of which must know its number before it imports pretrain.
if __name__ != "__main__":
    import pretrain
    import sft
    import tools.plots
    from support import run_folder

TINY = MotifConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=5,
                   num_noise_heads=1, num_key_value_heads=2, head_dim=8)
DATA = {"skills": ["builtin:skills?n=40", 1.0], "chains": ["builtin:chains?n=40&steps=2", 1.0],
        "longer": ["builtin:chains?n=3&steps=3", 0.0]}
OPTIONS = dict(data=DATA, seq_len=256, batch_tokens=1280, micro_batch_tokens=512, lr_scale=100,
               eval_every=8, eval_tokens=512, save_every=8, log_every=1, sample_tokens=4,
               keep_last=9, device="cpu", timeout_seconds=30)
BYTE = load_tokenizer("byte")


def chat(*texts: str, system: str | None = None) -> list[dict]:
    """A conversation in which user and assistant take turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return messages


TWO_QUESTIONS = chat("<|endofturn|>", "Yes", "b\n", "no", system="S")


def save_initial_model(folder: Path) -> None:
    torch.manual_seed(1)
    Motif(TINY).save_pretrained(folder)
    (folder / "state.json").write_text('{"step": 1, "files": {}, "config": {"tokenizer": "byte"}}')


def run_sft(out: str | Path, **options) -> None:
    """`python sft.py` in this process, without a plot."""
    import sft
    import tools.plots
    tools.plots.plot_training = print
    options = {**OPTIONS, "out_dir": out, **options}
    sys.argv = ["sft.py"] + [f"--{key}={value}" for key, value in options.items()]
    sft.main()


def metrics(out: Path) -> list[dict]:
    """What a run has logged, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in ("ms", "tok_per_s")} for line in lines]


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: the model and the optimizer's state."""
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in load_file(checkpoint / "optimizer" / "state.safetensors").items():
        tensors[f"optimizer: {name}"] = tensor
    return tensors


# ---- the chat format

def test_a_conversation_is_encoded_as_by_hand():
    begin, end, turn, stop = (BYTE.special[token] for token in (
        BEGIN, END, TURN, TURN_END))
    system, user, assistant = (BYTE.special[token] for token in ROLES.values())
    question = [begin, turn, system, 10, 10, *b"S", stop, turn, user, 10, 10, *b"<|endofturn|>",
                stop, turn, assistant, 10, 10]
    second = [turn, user, 10, 10, *b"b\n", stop, turn, assistant, 10, 10]

    ids, targets = sft.encode_chat(BYTE, TWO_QUESTIONS)
    assert ids == question + [*b"Yes", stop] + second + [*b"no", stop]
    assert targets == ([-1] * (len(question) - 1) + [*b"Yes", stop, -1]
                       + [-1] * (len(second) - 1) + [*b"no", stop, -1])
    assert end not in ids
    assert sft.encode_prompt(BYTE, TWO_QUESTIONS[:2]) == question


def test_the_blank_line_before_a_reply_is_a_token_of_its_own(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [b"\n\n", b"Ye", b"\n\nYe"]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    file = tmp_path / "t.tiktoken"
    file.write_text("".join(lines))
    tokenizer = load_tokenizer(str(file))
    ids, targets = sft.encode_chat(tokenizer, chat("<|endofturn|>", "Yes"))
    assert ids[-4:] == [256, 257, ord("s"), tokenizer.special[TURN_END]]
    assert targets[-4:] == [257, ord("s"), tokenizer.special[TURN_END], -1]
    assert ids[-4 - 2:-4] == [tokenizer.special[TURN], tokenizer.special["<|assistant|>"]]


def test_a_conversation_is_cut_at_a_turn():
    whole = len(sft.encode_chat(BYTE, TWO_QUESTIONS)[0])
    first = len(sft.encode_chat(BYTE, TWO_QUESTIONS[:3])[0])
    unanswered = TWO_QUESTIONS + [{"role": "user", "content": "And?"}]
    for messages, T, expected, expected_cut in (
            (unanswered, whole, TWO_QUESTIONS, False),
            (TWO_QUESTIONS, whole - 1, TWO_QUESTIONS[:3], True)):
        chat, is_cut = sft.truncate_to_turn(BYTE, messages, T)
        assert is_cut == expected_cut
        assert np.array_equal(chat, sft.encode_chat(BYTE, expected))
    with pytest.raises(UserError, match=f"beyond {first - 1} tokens"):
        sft.truncate_to_turn(BYTE, TWO_QUESTIONS, first - 1)


# ---- where conversations come from

PAIR = chat("2+2?", "4")


def write_rows(file: Path, rows: list) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def messages_of(row) -> tuple[list[dict] | None, str | None, Counter]:
    """What becomes of a row: its conversation, or the reason why it is dropped; parts left out."""
    left_out = Counter()
    try:
        return conversations.read_row(row, None, left_out), None, left_out
    except UserError as e:
        assert "\n" not in str(e)
        return None, str(e), left_out


@pytest.mark.parametrize("row", [
    {"messages": PAIR},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    {"conversations": [{"from": "human", "value": "2+2?", "role": None, "content": None},
                       {"from": "gpt", "value": "4", "role": None, "content": None}]},
    {"prompt": "2+2?", "completion": "4"}, {"prompt": PAIR[:1], "completion": PAIR[1:]},
    {"prompt": "2+2?", "response": "4", "score": 1}, {"id": 7, "question": "2+2?", "answer": "4"},
    {"instruction": "2+2?", "input": "", "output": "4"}, {"instruction": "2+2?", "output": "4"},
    {"instruction": "2+2?", "context": None, "response": "4"},
    {"question": "2+2?", "context": "", "answer": "4"},
    {"question": "2+2?", "context": {"title": ["Sums"]}, "answer": "4"},
    {"messages": [{**PAIR[0], "weight": 0}, {**PAIR[1], "weight": 1}]},
    {"instruction": "2+2?", "context": "", "output": "4"}])
def test_each_layout_gives_the_same_conversation(row):
    assert messages_of(row)[0] == PAIR
    assert messages_of(json.dumps(row).encode())[0] == PAIR
    with_system = messages_of({**row, "system": "Be short."})[0]
    assert with_system == chat("2+2?", "4", system="Be short.")


@pytest.mark.parametrize("first, added, reply", [
    ("instruction", "input", "output"), ("instruction", "context", "output"),
    ("instruction", "context", "response"), ("question", "context", "answer"),
    ("prompt", "input", "completion")])
def test_what_is_added_to_a_question_is_part_of_it(first, added, reply):
    row = {added: "2 and 2", first: "Add.", reply: "4"}
    assert messages_of(row)[0] == chat("Add.\n\n2 and 2", "4")


def test_a_list_of_messages_may_be_in_any_column():
    assert conversations.read_row({"input": PAIR}, "input", Counter()) == PAIR


def test_content_in_parts_is_joined_and_other_parts_are_counted():
    parts = [{"type": "text", "text": "2"}, {"type": "thinking", "text": "x"},
             {"type": None, "text": "+2?"}]
    found, _, left_out = messages_of({"messages": [{"role": "user", "content": parts}, PAIR[1]]})
    assert found == chat("2\n+2?", "4") and left_out == {"thinking": 1}


def test_empty_system_turns_and_what_follows_the_last_reply_are_left_out():
    system = {"role": "system", "content": None}
    row = {"messages": [system, *PAIR, *chat("And?"), *chat("Well?")]}
    assert messages_of(row)[0] == PAIR
    developer = {"role": "developer", "content": "S"}
    assert messages_of({"messages": [developer, *PAIR]})[0] == chat("2+2?", "4", system="S")


@pytest.mark.parametrize("row, reason", [
    ({"messages": [*PAIR[:1], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool"),
    ({"messages": [*PAIR, {"role": "tool", "content": "4"}, *PAIR]}, "tool"),
    ({"messages": [*PAIR[:1], {"role": "assistant", "content": None}]}, "no content"),
    ({"messages": chat("2+2?", " \n")}, "no content"),
    ({"messages": chat("a question alone")}, "no reply"),
    ({"messages": []}, "no reply"),
    ({"messages": PAIR[1:]}, "before the first question"),
    ({"messages": PAIR + PAIR[1:]}, "two replies"),
    ({"messages": chat("half of \ud83d, a pair", "a reply")}, "surrogate"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "'narrator'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, PAIR[1]]}, "image_url"),
    ({"messages": [PAIR[0], {**PAIR[1], "weight": 0}]}, "weight 0"),
    ({"messages": ["2+2?", "4"]}, "str"),
    ({"messages": [{"role": "user", "content": 4}, PAIR[1]]}, "int"),
    ({"messages": "2+2?"}, "'messages' is str"), ({"messages": None}, "'messages' is null"),
    ({"question": "2+2?", "answer": 4}, "'answer' is int"),
    ({"question": "2+2?", "answer": None}, "'answer' is null"),
    ({"id": 1, "text": "x"}, "id, text"), ([1], "list"), (b'{"messages": [', "JSON")])
def test_a_row_without_a_conversation_has_a_reason(row, reason):
    assert reason in messages_of(row)[1]


def test_dropped_rows_are_counted_by_reason_with_the_first_place(tmp_path):
    rows = [{"messages": PAIR}] * 4 + [{"messages": []}, {"text": "x"}, {"messages": PAIR[:1]}]
    source = write_rows(tmp_path / "talks.jsonl", rows)
    lines = Path(source).read_text().splitlines(keepends=True)
    drops = conversations.Drops()
    assert list(load_conversations(source, drops)) == [PAIR] * 4
    assert sorted(drops.rows.values()) == [1, 2]
    first = f"{source}: byte {sum(map(len, lines[:4]))}: "
    assert drops.report()[0].startswith(f"2 rows dropped, first {first}")

    # More than half: the source is not what it is taken for.
    write_rows(tmp_path / "talks.jsonl", rows[1:4] + rows[4:] * 2)
    with pytest.raises(UserError) as e:
        list(load_conversations(source))
    assert "6 of 9 rows" in str(e.value) and f"{source}: byte " in str(e.value)
    assert "there is no reply" in str(e.value) and "\n" not in str(e.value)


def test_data_txt_counts_what_was_dropped(tmp_path):
    good = [{"question": f"What is number {i}?", "answer": "Odd."} for i in range(200)]
    source = write_rows(tmp_path / "talks.jsonl", good + [{"question": "x", "answer": None}] * 3)
    c = sft.Config(data={"mine": [source, 1.0]}, seq_len=256)
    report = sft.prepare_domains(c, BYTE, tmp_path)[0].split("\n")
    assert report[0].startswith("mine: 200 ") and report[1].startswith("  3 rows dropped")


@pytest.mark.parametrize("ending", conversations.FILES)
def test_files_of_each_ending_and_folders_of_them(tmp_path, ending):
    pairs = [chat(f"{i}+{i}?", str(2 * i)) for i in range(3)]
    rows = [{"id": i, "messages": pair} for i, pair in enumerate(pairs)]
    folder = tmp_path / "talks"
    (folder / "more").mkdir(parents=True)
    file = folder / f"more/talks{ending}"
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        text = "".join(json.dumps(row) + "\r\n\r\n" for row in rows)
        if ".jsonl" not in ending:
            text = json.dumps(rows, indent=1)
        # A byte-order mark, CRLF and blank lines, as some editors write them.
        file.write_bytes(compress(b"\xef\xbb\xbf" + text.encode(), file.suffix))
    assert list(load_conversations(str(file))) == pairs
    (folder / "README.txt").write_text("not read")
    assert list(load_conversations(str(folder))) == pairs
    assert conversations.source_files(str(folder)) == [file]


def compress(text: bytes, ending: str) -> bytes:
    if ending == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(text) // 2
        return zstandard.compress(text[:half]) + zstandard.compress(text[half:])
    if ending in (".gz", ".bz2", ".xz"):
        module = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending]
        return module.compress(text)
    return text


def test_zst_without_its_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "talks.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UserError) as e:
        list(load_conversations(str(tmp_path)))
    assert "pip install zstandard" in str(e.value) and "talks.jsonl.zst" in str(e.value)


def test_a_json_file_may_have_a_row_on_each_line_after_all(tmp_path):
    source = write_rows(tmp_path / "talks.json", [{"messages": PAIR}] * 2)
    assert list(load_conversations(source)) == [PAIR] * 2


def test_of_a_parquet_file_only_the_columns_of_its_layout_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    rows = [{"page": "x" * 50, "question": "2+2?", "answer": "4"}] * 2
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "talks.parquet")
    read = conversations.layout_batches(tmp_path / "talks.parquet", None)
    assert [row.to_pylist() for _, row in read] == [[{"question": "2+2?", "answer": "4"}]] * 2

    with pytest.raises(UserError) as e:
        list(load_conversations(f"{tmp_path}/talks.parquet?messages=turns"))
    assert "page, question, answer" in str(e.value) and "talks.parquet" in str(e.value)


def test_a_bad_row_of_a_file_is_dropped_and_the_others_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    texts = pyarrow.array([b"2+2?", b"\xff\xfe", b"2+3?"]).view(pyarrow.string())
    table = pyarrow.table({"question": texts, "answer": ["4", "x", "5"]})
    parquet.write_table(table, tmp_path / "talks.parquet")
    drops = Drops()
    found = list(load_conversations(str(tmp_path / "talks.parquet"), drops))
    assert [messages[1]["content"] for messages in found] == ["4", "5"]
    assert list(drops.rows.values()) == [1] and "row 1" in drops.report()[0]

    lines = [b"[" * 100_000] + 2 * [json.dumps({"messages": PAIR}).encode()]
    (tmp_path / "deep.jsonl").write_bytes(b"\n".join(lines))
    assert list(load_conversations(str(tmp_path / "deep.jsonl"))) == [PAIR] * 2

    # One object on several lines is no list of rows.
    (tmp_path / "one.json").write_text(json.dumps({"data": [{"messages": PAIR}]}, indent=1))
    with pytest.raises(UserError, match="one object"):
        list(load_conversations(str(tmp_path / "one.json")))


def test_a_file_may_name_its_column_and_hold_more_than_messages(tmp_path):
    file = tmp_path / "talks.jsonl"
    rows = [{"id": i, "turns": [{**message, "weight": 1} for message in TWO_QUESTIONS]}
            for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_conversations(f"{file}?messages=turns")) == [TWO_QUESTIONS] * 3


@pytest.mark.parametrize("source", ["builtin:jokes", "builtin:chains?steps=4-2",
                                    "builtin:help?steps=2", "talks.csv", "missing/*.jsonl",
                                    "talks/*.txt", "talks/mine.txt", "talks/mine.txt.gz"])
def test_a_source_that_cannot_be_is_refused(source):
    with pytest.raises(UserError) as e:
        list(load_conversations(source))
    assert source in str(e.value) and "\n" not in str(e.value)


# ---- packing

def test_each_conversation_goes_where_it_leaves_least_room():
    """Against the rule as it is defined, which looks at every row."""
    T = 100
    lengths = np.random.default_rng(0).integers(1, 45, 500)
    expected = []
    for i in np.argsort(-lengths, kind="stable"):
        fitting = [row for row in expected if lengths[row].sum() + lengths[i] <= T]
        if fitting:
            max(fitting, key=lambda row: lengths[row].sum()).append(i)
        else:
            expected.append([i])

    rows = sft.pack(lengths, T)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert sorted(lengths[row].sum() for row in rows) == sorted(
        lengths[row].sum() for row in expected)
    assert lengths.sum() / (len(rows) * T) > 0.98


def test_packed_rows_are_each_conversation_alone():
    """Loss and gradients, with padding at the end of a row."""
    torch.manual_seed(2)
    model = Motif(TINY)
    chats = [np.array(sft.encode_chat(BYTE, messages))
             for messages in load_conversations("builtin:skills?n=12")]
    rows = sft.pack(np.array([encoded.shape[1] for encoded in chats]), 640)
    packed = sft.collate([[chats[i] for i in row] for row in rows], 640)
    num_targets = int((packed[1] >= 0).sum())
    assert len(rows) < 8
    assert num_targets == sum((targets >= 0).sum() for _, targets in chats)

    def loss_and_gradients(batches):
        model.zero_grad()
        loss = 0
        for batch in batches:
            tensors = tuple(torch.from_numpy(array) for array in batch)
            loss += pretrain.forward_backward(model, tensors, 9, num_targets)[0]
        return loss, [p.grad.clone() for p in model.parameters()]

    loss, gradients = loss_and_gradients([packed])
    loss_alone, gradients_alone = loss_and_gradients([encoded[:, None] for encoded in chats])
    torch.testing.assert_close(loss, loss_alone, rtol=1e-5, atol=1e-6)
    for gradient, alone in zip(gradients, gradients_alone):
        assert (gradient - alone).norm() <= 1e-5 * alone.norm() + 1e-9


# ---- epochs and batches

@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """60 conversations of skills and 90 chains."""
    folder = tmp_path_factory.mktemp("chats")
    found = {}
    for name, n in {"skills": 60, "chains": 90}.items():
        talks = list(load_conversations(f"builtin:{name}?n={n}"))
        encode = partial(sft.truncate_to_turn, BYTE, T=512)
        sft.TokenizedChats.save(folder / name, sft.encode_chats(talks, encode)[0])
        found[name] = sft.TokenizedChats(folder / name)
        for talk, encoded in zip(talks, found[name], strict=True):
            assert np.array_equal(encoded, sft.encode_chat(BYTE, talk))
    return found


def test_a_batch_has_its_rows_whatever_the_number_of_ranks(chats):
    def make():
        return sft.PackedChatDataset(chats, {"skills": 0.75, "chains": 0.25}, T=512,
                                     batch_tokens=2048, epochs=3, seed=5)
    dataset = make()
    for step in range(dataset.curriculum.steps):
        whole = dataset.batch(step)
        ids, targets, doc_ids = whole
        assert ids.shape == (dataset.curriculum.rows[step], 512) and len(ids) <= 4
        assert dataset.num_targets(step) == (targets >= 0).sum()
        assert (targets[doc_ids < 0] < 0).all()
        for rank in range(3):
            for part, array in zip(dataset.batch(step, rank, 3), whole):
                assert np.array_equal(part, array[rank::3])
    again = make()
    assert again.batches == dataset.batches and again.fingerprint() == dataset.fingerprint()


def test_every_conversation_is_read_as_often_as_its_weight_says(chats):
    weights = {"skills": 0.75, "chains": 0.25}
    dataset = sft.PackedChatDataset(chats, weights, T=512, batch_tokens=2048, epochs=3, seed=5)
    curriculum = dataset.curriculum
    times = Counter()
    for step in range(curriculum.steps):
        times.update(dataset.conversations(step))
    for name, weight in weights.items():
        counts = np.array([times[name, i] for i in range(len(chats[name]))])
        assert np.ptp(counts) <= 1
        tokens = (counts * chats[name].lengths).sum()
        assert tokens / curriculum.tokens[-1] == pytest.approx(weight, abs=0.01)


def test_an_epoch_of_natural_weights_reads_each_conversation_once(chats):
    weights = {name: float(part.ends[-1]) for name, part in chats.items()}
    dataset = sft.PackedChatDataset(chats, weights, T=512, batch_tokens=512, epochs=1, seed=5)
    read = [c for step in range(dataset.curriculum.steps) for c in dataset.conversations(step)]
    assert len(read) == len(set(read)) == 150


def test_a_small_domain_is_read_at_most_so_many_times(chats):
    dataset = sft.PackedChatDataset(chats, {"skills": 0.99, "chains": 0.01}, T=512,
                                    batch_tokens=2048, epochs=3, seed=5)
    times = Counter(c for step in range(dataset.curriculum.steps)
                    for c in dataset.conversations(step) if c[0] == "skills")
    assert max(times.values()) <= 3 * sft.REPEATS


def test_context_is_the_length_with_the_same_attention_cost(chats):
    dataset = sft.PackedChatDataset(chats, {"skills": 1.0, "chains": 1.0}, T=512,
                                    batch_tokens=2048, epochs=1, seed=5)
    lengths = np.array([chats[name].lengths[i] for name, i in dataset.conversations(0)])
    assert dataset.curriculum.context[0] == (lengths**2).sum() // lengths.sum()
    assert dataset.curriculum.tokens[1] == lengths.sum()


# ---- what is worth reading

GOOD = chat("What are 3 boxes of 4 eggs?", "Each box has 4 eggs.\nSo 3 * 4 = 12.\nAnswer: 12.")
TORN = chat("What are 3 boxes of 4 eggs?", "Each box (of the three has 4 eggs and,")


def test_quality_is_the_mean_of_three_measures():
    assert selection.reasoning_density(GOOD) == pytest.approx(1 / 3)
    assert selection.reasoning_density(TORN) == 0
    assert (selection.completeness(GOOD), selection.completeness(TORN)) == (1, 1 / 3)
    assert selection.completeness(chat("How?", "1) Add. 2) Stop.")) == 1
    assert selection.structure(GOOD) == 1 and selection.structure(TORN) == pytest.approx(1 / 3)
    assert selection.quality(TORN) == pytest.approx((0 + 1 / 3 + 1 / 3) / 3)


def test_the_best_are_kept_in_their_order():
    short = chat("And 2?", "So 8.")
    kept, report = selection.filter_by_quality([TORN, short, TORN, GOOD], 0.5)
    assert kept == [short, GOOD] and report.startswith("2 dropped")
    assert selection.filter_by_quality([TORN, GOOD], 0.01)[0] == [GOOD]
    assert selection.filter_by_quality([], 0.5)[0] == []


def test_near_duplicates_and_what_is_repetitive_or_incoherent_are_dropped():
    other = chat("Name a river of France.", "The Seine is a river of France.")
    near = chat("What are 3 boxes of 4 eggs?", GOOD[1]["content"] + " Yes.")
    circles = chat("Name a river.", "the river the river the river the river the river the river")
    stray = chat("Name a river.", "Here it is for you. My aunt went shopping again today. Her cat "
                 "sleeps on the warm sofa. Tomorrow we will bake one large cake.")
    korean = chat("강을 하나 말해 줘.", "센강이 있습니다. 이 강은 파리를 지나 바다로 흐릅니다. 길이는 약 "
                  "칠백칠십 킬로미터쯤 됩니다. 많은 사람이 그 강가를 천천히 걷습니다.")
    kept, report = selection.dedup_and_filter([GOOD, near, other, circles, stray, korean, GOOD],
                                              0.7)
    assert kept == [GOOD, other, korean]
    assert [line.partition(",")[0] for line in report.split("; ")] == [
        "2 dropped as near-duplicate", "1 dropped as repetitive", "1 dropped as incoherent"]

    # Two that have no five words in a row.
    short = [chat("2+2?", "Four."), chat("2+3?", "Five."), chat("2+2?", "Four.")]
    assert selection.dedup_and_filter(short, 0.7)[0] == short[:2]

    # A system message that they share makes no duplicates of them.
    rules = " ".join(f"Rule {i} is to say word {i}." for i in range(20))
    ruled = [chat(*(m["content"] for m in messages), system=rules) for messages in (GOOD, other)]
    assert selection.dedup_and_filter(ruled, 0.7)[0] == ruled


def test_thirteen_words_of_a_benchmark_are_one_too_many(tmp_path):
    text = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    row = {"id": 1, "choices": [{"text": f"{text}?"}]}
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(row)}\n")
    files = selection.benchmark_files([f"{tmp_path}/*.jsonl"], None)
    benchmark = selection.benchmark_grams(files)
    twelve = chat("Say: " + ", ".join(text.split()[:12]), "No " + text.upper()[8:])
    thirteen = chat("x", "y " + "-".join(text.split()[1:]))
    assert len(selection.words(twelve[1]["content"])) == 13   # "No" and the last twelve
    kept, report = selection.decontaminate([twelve, thirteen], benchmark)
    assert kept == [twelve] and report.startswith("1 dropped") and "1 with b.jsonl" in report

    write_rows(tmp_path / "short.jsonl", [{"question": "2+2?"}])
    with pytest.raises(UserError, match="short.jsonl"):
        selection.benchmark_grams(selection.benchmark_files([f"{tmp_path}/*.jsonl"], None))


def test_conversations_that_repeat_a_benchmark_s_questions_are_counted_by_its_file(tmp_path):
    """Examples and training splits may be read; what is not a task's file is not looked at."""
    def tale(name: str) -> str:
        return " ".join(f"{name} word {i}" for i in range(6))

    folder = tmp_path / "benchmarks"
    folder.mkdir()
    write_rows(folder / "gsm8k_test.jsonl", [{"question": tale("test"), "answer": "#### 1"}])
    write_rows(folder / "gsm8k_train.jsonl", [{"question": tale("train"), "answer": "#### 1"}])
    tasks = [{"task_id": i, "text": tale(f"mbpp {i}")} for i in (11, 601)]
    write_rows(folder / "mbpp.jsonl", tasks)
    write_rows(folder / "other.jsonl", [{"question": tale("other")}])
    talks = []
    for name in ("test", "train", "mbpp 11", "mbpp 601", "other"):
        talks += [chat(f"{tale(name)} {i}?", "Yes.") for i in range(9)]
    source = write_rows(tmp_path / "talks.jsonl", [{"messages": messages} for messages in talks])
    c = sft.Config(data={"mine": [source, 1.0]}, seq_len=512, benchmark_dir=str(folder))
    report = sft.prepare_domains(c, BYTE, tmp_path)[0]
    line = re.search(r"(\d+) dropped as they share 13 words in a row .*", report)
    counts = re.findall(r"(\d+) with ([\w.]+)", line[0])
    assert sorted(name for _, name in counts) == ["gsm8k_test.jsonl", "mbpp.jsonl"]
    assert sum(int(count) for count, _ in counts) == int(line[1]) in range(14, 19)
    train = sft.TokenizedChats(tmp_path / "train-mine")
    text = BYTE.decode(np.concatenate([train[i][0] for i in range(len(train))]).tolist())
    assert "test word" not in text and "mbpp 11 word" not in text
    assert all(f"{name} word" in text for name in ("train", "mbpp 601", "other"))

    c.benchmark_dir = str(tmp_path)
    with pytest.raises(UserError, match="benchmark_dir"):
        sft.prepare_domains(c, BYTE, tmp_path)


@pytest.mark.parametrize("reason", ["13 words in a row", "repetitive", "beyond 256 tokens"])
def test_where_nothing_is_left_the_reason_is_told(tmp_path, reason):
    text = " ".join(f"word {i}" for i in range(8))
    talks = [chat(f"{i}?", text) for i in range(40)]
    source = write_rows(tmp_path / "talks.jsonl", [{"messages": messages} for messages in talks])
    c = sft.Config(data={"mine": [source, 1.0]}, seq_len=256)
    if "words" in reason:
        c.decontaminate_against = [write_rows(tmp_path / "b.jsonl", [{"question": text}])]
    elif reason == "repetitive":
        c.stage = 3
        talks = [chat(f"{i}?", 20 * "again ") for i in range(40)]
    else:
        talks = [chat(f"{i}?", 9 * text) for i in range(40)]
    write_rows(tmp_path / "talks.jsonl", [{"messages": messages} for messages in talks])
    with pytest.raises(UserError) as e:
        sft.prepare_domains(c, BYTE, tmp_path)
    assert "'mine'" in str(e.value) and reason in str(e.value) and "\n" not in str(e.value)


# ---- encoding

@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_processes_encode_what_one_does(tmp_path, monkeypatch, system):
    talks = list(load_conversations("builtin:skills?n=40"))
    talks.insert(7, chat("2+2?", 700 * "long "))
    encode = partial(sft.truncate_to_turn, BYTE, T=512)
    here = encoding.encode_chats(talks, encode)
    monkeypatch.setattr(encoding, "BATCH", 8)
    monkeypatch.setattr(sys, "platform", system)
    if system == "darwin":
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    there = encoding.encode_chats(talks, encode)
    assert "1 dropped: its first reply ends beyond 512 tokens" in here[1]
    assert there[1] == here[1] and len(there[0]) == 6 and len(here[0]) == 1

    encoding.TokenizedChats.save(tmp_path / "here", here[0])
    encoding.TokenizedChats.save(tmp_path / "there", there[0])
    for file in ("tokens.npy", "spans.npy"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    tokens, _ = here[0][0]
    np.save(tmp_path / "tokens.npy", tokens)
    assert (tmp_path / "tokens.npy").read_bytes() == (tmp_path / "here/tokens.npy").read_bytes()


def test_processes_end_with_their_parent(tmp_path):
    job = f"import os, time; open('{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", "import os, support.encoding\n"
                               "os.sched_getaffinity = lambda _: {0, 1}\n"
                               f"list(support.encoding.map_in_processes(exec, 2 * [{job!r}]))"],
                              cwd=Path(data.__file__).parent)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.wait()
    children = [Path("/proc", file.name) for file in tmp_path.iterdir()]
    wait_until(lambda: not any(child.exists() for child in children))


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_a_conversation_that_cannot_be_encoded_is_counted():
    def encode(messages):
        if messages[0]["content"] == "1?":
            raise UserError("tokenizer x: PanicException")
        return sft.truncate_to_turn(BYTE, messages, 256)

    batches, line = encoding.encode_chats([chat(f"{i}?", "Yes.") for i in range(3)], encode)
    assert batches[0][1].shape == (2, 2)
    assert line.startswith("2, ") and line.endswith("1 dropped: tokenizer x: PanicException")


# ---- holding out

def questions(conversations: list) -> set[str]:
    return {message["content"] for messages in conversations for message in messages
            if message["role"] == "user"}


def test_what_is_held_out_is_never_asked_in_training():
    single = [chat(f"What is question number {i % 1200}?", f"Answer {i}.") for i in range(2400)]
    double = [first + second for first, second in zip(single, single[37:])]
    reserved = single[:5]
    held_out = {selection.question_hashes(messages)[0] for messages in reserved}
    parts = selection.train_val_split(single + double, held_out)

    assert len(questions(parts["val"])) == pytest.approx(1200 / 50, abs=15)
    assert not questions(parts["train"]) & questions(parts["val"] + reserved)
    assert len(parts["train"]) > 0.9 * len(single + double)

    # A held-out conversation ends after its first reply: what is asked next may be in training.
    assert all(len(messages) == 2 for messages in parts["val"])
    cut = [messages for messages in double if messages[0]["content"] in questions(parts["val"])]
    assert cut and all(messages[:2] in parts["val"] for messages in cut)

    # Another domain with the same questions holds out the same.
    other = selection.train_val_split(double[::-7], set())
    assert questions(other["val"]) <= questions(parts["val"])


def test_a_small_domain_s_held_out_question_is_in_no_training_domain(tmp_path):
    """Its domain alone holds it out: its hash is not below the bound that all domains share."""
    small = [chat(f"What is number {i}?", "Nothing.") for i in range(40)]
    small = [m for m in small if selection.question_hashes(m)[0] >= selection.HELD_OUT_BELOW][:3]
    large = [chat(f"What is question number {i}?", "Something.") for i in range(300)] + small
    sources = {}
    for name, found in {"a_large": large, "b_small": small}.items():
        source = write_rows(tmp_path / f"{name}.jsonl", [{"messages": m} for m in found])
        sources[name] = [source, 1.0]
    sft.prepare_domains(sft.Config(data=sources, seq_len=256), BYTE, tmp_path)

    held_out = bytes(sft.TokenizedChats(tmp_path / "val-b_small")[0][0].astype("u1")).split(b"?")[0]
    question = held_out[held_out.index(b"What"):]
    train = sft.TokenizedChats(tmp_path / "train-a_large")
    assert all(question not in bytes((train[i][0] % 256).astype("u1"))
               for i in range(len(train.lengths)))


def test_a_small_domain_holds_out_one_question():
    parts = selection.train_val_split([chat(f"What is {i}?", "Nothing.") for i in range(3)], set())
    assert (len(parts["val"]), len(parts["train"])) == (1, 2)
    assert selection.train_val_split([], set()) == {"val": [], "train": []}

    # And no more: of questions that follow, only those below the bound of all domains.
    talks = [chat(*(f"And what is {i} + {j}?" if j % 2 == 0 else "Nothing." for j in range(10)))
             for i in range(20)]
    talks = [messages for messages in talks
             if selection.question_hashes(messages)[0] >= selection.HELD_OUT_BELOW]
    hashes = [selection.question_hashes(messages) for messages in talks]
    first = min(found[0] for found in hashes)
    expected = [messages for messages, found in zip(talks, hashes)
                if found[0] != first and min(found) >= selection.HELD_OUT_BELOW]
    assert len(expected) >= 5 and selection.train_val_split(talks, set())["train"] == expected


def test_no_stage_trains_on_a_question_held_out_or_kept_for_evaluation(tmp_path, monkeypatch):
    """prepare(), as a whole, with a domain that repeats all questions of the held-out chains."""
    written = {}

    def save(folder, batches):
        written[folder.name] = "".join(BYTE.decode(tokens[0].tolist()) for tokens, _ in batches)

    monkeypatch.setattr(sft.TokenizedChats, "save", save)
    file = tmp_path / "mine.jsonl"
    mine = []
    for source in ("builtin:skills?n=60", "builtin:chains?n=30&steps=3&seed=9",
                   EVAL_DOMAINS["held_chains"][0]):
        mine += load_conversations(source)
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in mine))
    sft.prepare(sft.Config(seq_len=512, data_dir=str(tmp_path / "data"), data={
        "mine": [str(file), 1.0], "reserved": ["builtin:chains?n=30&steps=3&seed=9", 0.0]}), BYTE)

    assert written.keys() == {"val-reserved", "val-mine", "train-mine"}
    trained = written["train-mine"]
    assert trained.count(BEGIN) > 30
    reserved = list(load_conversations("builtin:chains?n=30&steps=3&seed=9"))
    reserved += load_conversations(EVAL_DOMAINS["held_chains"][0])
    for question in questions(reserved):
        assert question not in trained


def test_prepared_conversations_are_used_again_unless_something_decides_them(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "talks.jsonl", [{"messages": PAIR}])
    write_rows(tmp_path / "b.jsonl", [{"question": "x"}])

    def key(tokenizer=BYTE, weight=1.0, source=source, name="mine", **options) -> str:
        c = sft.Config(**{"data": {name: [source, weight]}, "seq_len": 256, **options})
        return sft.preparation_key(c, tokenizer)

    first = key()
    for change in (dict(lr=1.0), dict(lr_scale=2.0), dict(epochs=3), dict(max_steps=5),
                   dict(batch_tokens=512), dict(warmup_fraction=0.5), dict(weight=2.0),
                   dict(seed=1), dict(model="out/x"), dict(eval_every=5), dict(stage=1)):
        assert key(**change) == first, change
    file = tmp_path / "t.tiktoken"
    file.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {255 - i}\n"
                            for i in range(256)))
    others = [dict(stage=2), dict(stage=3), dict(seq_len=255), dict(weight=0.0), dict(name="yours"),
              dict(source=f"{source}?messages=turns"), dict(source="builtin:chains?n=9"),
              dict(source="builtin:chains?n=9&seed=2"), dict(benchmark_dir=str(tmp_path)),
              dict(decontaminate_against=[str(tmp_path / "b.jsonl")]),
              dict(tokenizer=load_tokenizer(str(file)))]
    write_rows(tmp_path / "gsm8k_test.jsonl", [{"question": "x"}])
    keys = [first] + [key(**change) for change in others]

    # Limits of the filters, a source's content, and code.
    monkeypatch.setattr(sft.STAGES[2], "best_share", 0.7)
    monkeypatch.setattr(sft.STAGES[3], "duplicate_share", 0.6)
    keys += [key(stage=2), key(stage=3)]
    monkeypatch.setattr(sft.STAGES[1], "lr", 1.0)
    assert key() == first
    write_rows(tmp_path / "talks.jsonl", [{"messages": TWO_QUESTIONS}])
    keys.append(key())
    monkeypatch.setattr(sft, "code_that_prepares", list)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_key_of_prepared_conversations_has_all_code_that_decides_them(tmp_path):
    """Each function of ours that runs is in it, but for what checks and writes files, and counts
    cores."""
    root = Path(sft.__file__).parent
    talks = [chat(f"What is number {i}?", f"Word {i} is " + GOOD[1]["content"]) for i in range(60)]
    source = write_rows(tmp_path / "talks.jsonl", [{"messages": messages} for messages in talks])
    write_rows(tmp_path / "mbpp.jsonl", [{"task_id": 11, "text": "x"}])
    c = sft.Config(stage=3, seq_len=256, benchmark_dir=str(tmp_path), data={
        "mine": [source, 1.0], "help": ["builtin:help?n=60", 1.0],
        "chains": ["builtin:chains?n=60", 1.0], "skills": ["builtin:skills?n=60", 0.0]})
    called = set()

    def note(frame, event, _):
        if event == "call" and not frame.f_code.co_name.startswith("<"):
            called.add(frame.f_code)

    sft.begin_turn.cache_clear()
    sys.setprofile(note)
    try:
        sft.prepare_domains(c, load_tokenizer("byte"), tmp_path)
    finally:
        sys.setprofile(None)
    hashed = "".join(sft.code_that_prepares())
    folders = [root, root / "support", root / "synthetic", root / "tools"]   # not a .venv in root
    ours = [code for code in called if Path(code.co_filename).parent in folders]
    left_out = {Path(code.co_filename).name for code in ours
                if inspect.getsource(code) not in hashed}
    assert len(ours) > 50 and left_out <= {"weights.py", "preparing.py"}


def test_what_a_killed_preparation_left_is_removed(tmp_path):
    host = socket.gethostname()
    dead = tmp_path / f"sft-0123456789.{host}.999999999.tmp"
    running = tmp_path / f"sft-0123456789.{host}.{os.getpid()}.tmp"
    elsewhere = tmp_path / "sft-0123456789.elsewhere.999999999.tmp"
    for folder in (dead, running, elsewhere):
        (folder / "val-help").mkdir(parents=True)
    remove_leftovers(tmp_path, "sft-*")
    assert sorted(tmp_path.iterdir()) == sorted([running, elsewhere])


# ---- the generated tasks

UNITS = [{"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1},
         {"metres": 100, "centimetres": 1}, {"dozens": 12, "pieces": 1}, {"years": 12, "months": 1}]
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
# What a step of a chain says -> its result, of the value before and the first number that it names.
# The first phrase that occurs counts.
STEPS = {
    "weeks further": lambda x, n: x + datetime.timedelta(days=7 * n),
    "day of the week": lambda x, n: WEEKDAYS[x.weekday()],
    "days of that year": lambda x, n: (x - datetime.date(x.year - 1, 12, 31)).days,
    "remainder": lambda x, n: x % n,
    "multiply": lambda x, n: x * n,
    "subtract": lambda x, n: x - n,
    "take away": lambda x, n: x - n,
    "digits": lambda x, n: [int(digit) for digit in str(x)],
    "vowels": lambda x, n: len(re.findall("[aeiou]", x)),
    "count its letters": lambda x, n: len(x),
    "its letters": lambda x, n: "".join(sorted(x)),
    "reverse": lambda x, n: x[::-1],
    "backwards": lambda x, n: x[::-1],
    "large to small": lambda x, n: sorted(x)[::-1],
    "small to large": lambda x, n: sorted(x),
    "add them": lambda x, n: sum(x),
    "sum": lambda x, n: sum(x),
    "largest": lambda x, n: max(x),
    "smallest": lambda x, n: min(x),
    "add": lambda x, n: x + n,
}


def solve_step(step: str, x):
    """The result of one step, read from its words alone."""
    code = re.search(r"`(.*)`", step)
    if code and "for i in range" in code[1]:
        names = {"x": x}
        exec(code[1], {}, names)
        return names["x"]
    if code:
        return eval(code[1], {"s": x, "a": x})
    if "convert" in step:
        source, target = re.search(r"as (\w+) and convert it to (\w+)", step).groups()
        scale = next(units for units in UNITS if source in units and target in units)
        return x * scale[source] // scale[target]
    if "so many days after" in step:
        return read_date(re.search(r"after (.*)", step)[1]) + datetime.timedelta(days=x)
    number = re.search(r"\d+", step)
    phrase = next(phrase for phrase in STEPS if phrase in step.lower())
    return STEPS[phrase](x, int(number[0]) if number else None)


def read_date(text: str) -> datetime.date:
    return datetime.datetime.strptime(text, "%d %B %Y").date()


def read_start(line: str):
    kind, text = re.fullmatch(r"Start with the (\w+) (.*)\.", line).groups()
    if kind == "word":
        return text
    if kind == "number":
        return ast.literal_eval(text)
    if kind == "date":
        return read_date(text)
    return [int(number) for number in text.split(", ")]


@pytest.mark.parametrize("source, steps", [("builtin:chains?n=1500", {2, 3, 4}),
                                           ("builtin:chains?n=200&steps=5-6", {5, 6})])
def test_the_answers_of_chains_are_right(source, steps):
    chains = list(load_conversations(source))
    for question, reply in chains:
        first, *lines = question["content"].split("\n")
        x = read_start(first)
        for line in lines:
            x = solve_step(line.partition(". ")[2], x)
        if isinstance(x, datetime.date):
            x = f"{x.day} {x:%B} {x.year}"
        assert answer_of(reply["content"]) == str(x).strip("[]"), (question, reply)
    assert {question["content"].count("\n") for question, _ in chains} == steps
    assert len(questions(chains)) == len(chains)
    assert list(load_conversations(source)) == chains


def test_the_answer_is_what_follows_the_last_answer():
    assert answer_of("Answer: 3\nAnswer:  4 \n") == "4"
    assert answer_of("4") == ""


def test_system_turns_are_followed_and_docstrings_are_told():
    skills = list(load_conversations("builtin:skills?n=60"))
    result_alone = [messages for messages in skills
                    if messages[0]["content"] == "Give the result alone."]
    assert 10 < len(result_alone) < 30
    assert all("Answer" not in m["content"] for messages in result_alone for m in messages)
    assert {len(selection.replies(messages)) for messages in skills} == {1, 2}
    helps = list(load_conversations("builtin:help?n=30"))
    assert len(helps) == 30 and all(reply["content"].endswith(".") for _, reply in helps)


# ---- the script

@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a pre-trained model where stage 1 looks for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "install_signal_handlers", list)
    monkeypatch.setattr(tools.plots, "plot_training", tools.plots.plot_training)  # to restore it
    monkeypatch.setattr(sys, "argv", [])
    save_initial_model(tmp_path / "out/quickstart/step_1")


@pytest.mark.parametrize("options, key", [
    (dict(stage=3), "python sft.py --stage=2"), (dict(seq_len=8192), "seq_len=8192"),
    (dict(data={"x y": ["builtin:help", 1]}), "data: 'x y'"),
    (dict(data={"x": ["builtin:help?n=9", 0]}), "data: "),
    (dict(data={"x": ["builtin:help?n=9", 1]}, seq_len=16), "data 'x'"),
    (dict(data={"x": ["builtin:help?n=9", 1e308], "y": ["builtin:help?n=9", 1e308]}), "weights"),
    (dict(decontaminate_against=[3]), "decontaminate_against"),
    (dict(batch_tokens=100), "batch_tokens=100")])
def test_what_cannot_run_is_one_line_and_leaves_nothing(workplace, options, key):
    with pytest.raises(UserError) as e:
        run_sft("out/new", **options)
    assert key in str(e.value) and "\n" not in str(e.value)
    assert not Path("out/new").exists()


class Loaded(Exception):
    """Ends a run once its config is complete."""


@pytest.fixture
def loaded(monkeypatch):
    """argv -> the config that sft.py would run with."""
    def load(*argv):
        def stop(c, out):
            raise Loaded(c)

        monkeypatch.setattr(sft, "train_stage", stop)
        monkeypatch.setattr(sys, "argv", ["sft.py", *argv])
        with pytest.raises(Loaded) as e:
            sft.main()
        return e.value.args[0]
    return load


def test_the_quick_start_s_settings_are_for_its_own_model(loaded):
    quick = loaded("--stage=2")
    assert quick.lr == pytest.approx(2e-3) and quick.seq_len == 512
    assert quick.data == {**sft.STAGES[2].data, **EVAL_DOMAINS} and quick.out_dir == "out/sft2"

    own = loaded("--stage=2", "--model=out/mine/step_7", "--data={'mine': ['a.jsonl', 1.0]}")
    assert own.lr == sft.STAGES[2].lr == 1e-5
    assert (own.seq_len, own.batch_tokens) == (None, None)       # the report's, as far as they fit
    assert own.data == {"mine": ["a.jsonl", 1.0]} and own.out_dir == "out/mine-sft2"

    chosen = loaded("--lr=3e-5", "--lr_scale=7")
    assert chosen.lr == 3e-5
    assert loaded("--model=None") == loaded()


def test_a_model_of_one_s_own_never_reads_the_built_in_conversations(loaded):
    with pytest.raises(UserError) as e:
        loaded("--stage=1", "--model=out/mine")
    assert "--data=" in str(e.value) and "\n" not in str(e.value)


def test_max_steps_ends_the_run_and_its_schedule(workplace, capsys):
    save_initial_model(Path("out/mine/step_1"))
    options = dict(max_steps=6, warmup_fraction=0.5, lr=0.01)
    run_sft("out/new", model="out/mine", **options)
    lr = [m["lr"] for m in metrics(Path("out/new")) if "lr" in m]
    assert lr[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert len(lr) == 6 and lr[3] > lr[4] > lr[5]
    settings = (Path("out/new") / "data.txt").read_text().splitlines()[:7]
    assert "stage 1 from out/mine/step_1" in settings[0]
    assert {"  lr = 0.01  # command line", "  max_steps = 6  # command line"} < set(settings)
    printed = capsys.readouterr().out
    assert printed.index(settings[1]) < printed.index("preparing")

    # The run may be resumed by another path to the same model.
    run_sft("out/new", model=Path("out/mine").absolute(), **options)
    printed = capsys.readouterr().out
    assert "resum" in printed and "changed since then: init" not in printed


def test_a_stage_learns_and_reports(workplace):
    run_sft("out/sft1", stage=1)
    lines = metrics(Path("out/sft1"))
    evaluations = [m for m in lines if "val_loss" in m]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.3
    assert evaluations[0]["val_loss_by_domain"].keys() == DATA.keys()
    assert "val_loss_by_quarter" not in evaluations[0]

    lr = [m["lr"] for m in lines if "lr" in m]
    assert max(lr) == pytest.approx(100 * sft.STAGES[1].lr, rel=0.02)
    assert lr.index(max(lr)) <= 1 and lr[-1] < 1e-4
    samples = Path("out/sft1/samples.txt").read_text()
    assert samples.count("[What does the module json do?]") == len(evaluations)
    report = Path("out/sft1/data.txt").read_text()
    assert "stage 1 from out/quickstart/step_1" in report
    assert "tokens for a weight of 50.0%" in report


def test_rows_and_batches_fit_the_model_and_the_data_where_they_are_not_set(workplace):
    run_sft("out/sft1", stage=1, seq_len=None, batch_tokens=None, max_steps=2)
    config = json.loads(Path("out/sft1/step_2/state.json").read_text())["config"]
    assert config["seq_len"] == TINY.max_position_embeddings < sft.SEQ_LEN
    folder = next(Path("data").glob("sft-*"))
    sizes = {name: len(np.load(folder / f"train-{name}" / "tokens.npy")[0])
             for name in ("skills", "chains")}
    assert config["batch_tokens"] == max(config["seq_len"], sum(sizes.values()) // sft.MIN_STEPS)


def test_a_stage_goes_on_with_the_batches_that_it_began_with(workplace):
    options = dict(stage=1, max_steps=8)
    run_sft("out/sft1", **options)
    twice = {**DATA, "skills": [DATA["skills"][0], 2.0]}
    others = {**DATA, "skills": ["builtin:skills?n=41", 1.0]}
    for change, key in (({"batch_tokens": 2560}, "batch_tokens=1280"), ({"seed": 2}, "seed=1337"),
                        ({"data": twice}, "'skills': 1.0"), ({"data": others}, "conversations")):
        with pytest.raises(UserError) as e:
            run_sft("out/sft1", **options | change)
        assert key in str(e.value)


def test_the_scores_of_tasks_are_those_of_eval(workplace):
    import eval as evaluation
    rows = [{"question": f"What is {i} and {i}?", "choices": ["so", f"{2 * i}.", "no"], "answer": 1}
            for i in range(9)]
    write_rows(Path("arc_easy_test.jsonl"), rows)
    options = dict(eval_tasks="arc_easy,chains,bpb:replies", eval_limit=4, benchmark_dir=".")
    run_sft("out/sft1", stage=1, max_steps=9, **options)
    evaluations = [m["task_scores"] for m in metrics(Path("out/sft1")) if "val_loss" in m]
    assert len(evaluations) == 3
    assert "arc_easy acc " in Path("out/sft1/log.txt").read_text()

    evaluation.run(evaluation.Config(model="out/sft1", tasks=options["eval_tasks"], limit=4,
                                     benchmark_dir=".", chat=True, out_dir="out/eval"))
    results = json.loads(Path("out/eval/results.json").read_text())["tasks"]
    measured = {task: {metric: score["value"] for metric, score in scores.items()}
                for task, scores in results.items()}
    assert measured.keys() == evaluations[-1].keys()
    for task, scores in measured.items():
        assert evaluations[-1][task] == pytest.approx(scores, rel=1e-5)

    for tasks in ("humaneval", "arc_hard", "hellaswag"):
        with pytest.raises(UserError) as e:
            run_sft("out/new", **{**options, "eval_tasks": tasks})
        assert tasks in str(e.value) and "\n" not in str(e.value)


def test_resume_is_bitwise_and_needs_no_initial_weights(workplace):
    run_sft("out/sft1", stage=1)
    straight = metrics(Path("out/sft1"))
    last = f"step_{straight[-1]['step']}"
    weights = stored(Path("out/sft1") / last)

    for folder in Path("out/sft1").glob("step_*"):
        if folder.name != "step_8":
            shutil.rmtree(folder)
    Path("out/quickstart/step_1").rename("out/quickstart/gone")
    run_sft("out/sft1", stage=1)
    assert metrics(Path("out/sft1")) == straight
    resumed = stored(Path("out/sft1") / last)
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)

    # A run that began with other weights is another run.
    save_initial_model(Path("out/quickstart/step_1"))
    model = Motif.from_pretrained("out/quickstart/step_1")
    model.model.norm.weight.data += 1
    model.save_pretrained("out/quickstart/step_1")
    with pytest.raises(UserError, match="out/quickstart/step_1"):
        run_sft("out/sft1", stage=1)


def test_a_flipped_bit_in_prepared_conversations_is_found(workplace):
    run_sft("out/a", max_steps=1)
    for name in ("tokens.npy", "spans.npy"):
        file = next(Path("data").glob(f"sft-*/train-skills/{name}"))
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(UserError, match=f"checksum of {name}"):
            run_sft("out/b", max_steps=1)
        file.write_bytes(good)


def test_what_another_run_prepared_meanwhile_is_taken(workplace, monkeypatch):
    run_sft("out/a", max_steps=1)
    folder = next(Path("data").glob("sft-*"))
    kept = folder.rename(folder.with_name("kept"))

    def prepare_domains(*args):
        shutil.copytree(kept, folder)            # the other run ends first
        return ["ours"]
    monkeypatch.setattr(sft, "prepare_domains", prepare_domains)
    monkeypatch.setattr(sft, "preparation_key", lambda *_: folder.name.removeprefix("sft-"))
    run_sft("out/b", max_steps=1)
    assert (folder / "data.txt").read_text() == (kept / "data.txt").read_text()
    assert not list(Path("data").glob("*.tmp"))


def test_a_stage_does_not_run_in_a_folder_in_use(workplace):
    with run_folder.lock_folder(Path("out/sft1")):
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            run_sft("out/sft1", stage=1)
    assert not Path("out/sft1").exists()


def test_a_stage_begins_with_the_one_before(workplace):
    for stage in (1, 2, 3):
        run_sft(f"out/sft{stage}", stage=stage, batch_tokens=5120)
    assert "dropped for their quality" in Path("out/sft2/data.txt").read_text()
    assert "stage 3 from out/sft2/step_" in Path("out/sft3/data.txt").read_text()
    final, _ = run_folder.latest_checkpoint(Path("out/sft3"))
    assert Motif.from_pretrained(final).config == TINY


def run_worlds(folder: Path) -> None:
    """One run by one rank, one by four, of which one has a row more than the others: 9 rows."""
    torch.set_num_threads(1)
    options = dict(model=folder / "base", data_dir=folder / "data", batch_tokens=9 * 256,
                   eval_every=7, save_every=7, prompts=["x"], sample_tokens=1,
                   eval_tasks="bpb:replies", eval_limit=5)
    save_initial_model(folder / "base")
    world(1, run_sft, folder / "one", **options)
    world(4, run_sft, folder / "four", **options)


def test_four_ranks_are_one(tmp_path):
    root = str(Path(data.__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one = metrics(tmp_path / "one")
    four = metrics(tmp_path / "four")
    assert [m["step"] for m in one] == [m["step"] for m in four] and len(one) == 9
    for m_one, m_four in zip(one, four):
        for key in {"loss", "val_loss", "val_bpb", "grad_norm"} & m_one.keys():
            assert m_four[key] == pytest.approx(m_one[key], rel=1e-4), (key, m_one["step"])
        if "task_scores" in m_one:
            scores = m_one["task_scores"]["bpb:replies"]
            assert m_four["task_scores"]["bpb:replies"] == pytest.approx(scores, rel=1e-4)


if __name__ == "__main__":
    run_worlds(Path(sys.argv[1]))
