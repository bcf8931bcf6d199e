"""Where conversations come from: generators, files, data sets of the Hub; and the layouts in which
people store them."""
import io
import json
import os
import re
from collections import Counter
from pathlib import Path

import synthetic.conversations
from configurator import UserError
from support.sources import (
    check_options, hub_commit, is_hub_name, lines_of, local_files, open_hub,
    parquet_rows, parse_options, read_each)
from support.tokenizer import ROLES

# The chains that eval.py asks for. No stage trains on their questions, whatever its data.
EVAL_DOMAINS = {
    "held_chains": ["builtin:chains?n=100&steps=2-4&seed=2", 0.0],
    "longer_chains": ["builtin:chains?n=100&steps=5-6", 0.0],  # training has 2 to 4 steps
}

COMPRESSED_ENDINGS = ("", ".gz", ".bz2", ".xz", ".zst")
FILES = (".parquet", *[".jsonl" + ending for ending in COMPRESSED_ENDINGS],
         *[".json" + ending for ending in COMPRESSED_ENDINGS])


def load_conversations(source: str, drops: "Drops | None" = None):
    """Yield the conversations of a source, which is one of

        builtin:help  builtin:skills?n=1000  builtin:chains?n=1000&steps=2-4&seed=1
        talks/*.jsonl?messages=turns      local files with an ending of FILES, or a folder of them;
                                          messages= names the column, where it has another name
        owner/name?name=CONFIG&split=train&messages=turns     a dataset of the Hugging Face Hub

    A row that is no conversation is dropped, and counted in `drops`. UserError at the end of the
    source if that happened to most of its rows."""
    place, _, query = source.partition("?")
    options = parse_options(query)
    column = options.get("messages")
    drops = Drops() if drops is None else drops

    if place.startswith("builtin:"):
        yield from builtin_conversations(source, place.removeprefix("builtin:"), options)
        return
    if place.endswith(FILES) or os.path.isdir(place):
        check_options(source, options, ["messages"])
        rows = file_rows(source_files(source), column)
    elif is_hub_name(place):
        check_options(source, options, ["messages", "name", "split"])
        rows = with_source(place, dataset_rows(place, options))
    else:
        raise UserError(f"source {source!r} must be builtin:..., a dataset owner/name of the Hub, "
                        f"or a folder or files that end in one of {' '.join(FILES)}")

    converted = 0
    for row_place, row in rows:
        try:
            messages = read_row(row, column, drops.parts)
        except UserError as e:
            drops.add(str(e), row_place)
            continue
        converted += 1
        yield messages
    drops.check(source, converted)


class Drops:
    """Counts what was dropped of a source, by reason."""

    LIMIT = 0.5  # of the rows; if more are dropped, the source is read in a wrong way [ours]

    def __init__(self):
        self.rows = Counter()   # reason -> how many rows were dropped
        self.first = {}         # reason -> the place of the first of them
        self.parts = Counter()  # type, as "image_url" -> how many parts of messages were left out

    def add(self, reason: str, place: str) -> None:
        self.rows[reason] += 1
        self.first.setdefault(reason, place)

    def check(self, source: str, converted: int) -> None:
        """UserError if more than LIMIT of the rows were dropped."""
        dropped = self.rows.total()
        if dropped <= self.LIMIT * (converted + dropped):
            return
        reason, count = self.rows.most_common(1)[0]
        raise UserError(f"source {source!r}: {dropped:,d} of {converted + dropped:,d} rows are no "
                        f"conversations; {count:,d} of them, first {self.first[reason]}: {reason}")

    def report(self) -> list[str]:
        """Lines for data.txt, the commonest reason first."""
        lines = []
        for reason, count in self.rows.most_common():
            lines.append(f"{count:,d} rows dropped, first {self.first[reason]}: {reason}")
        for kind, count in self.parts.most_common():
            lines.append(f"{count:,d} parts of messages left out: {kind}")
        return lines


# ---- layouts

# A row is a dict: column -> value. We take the first layout below of which the row has all columns.
# A layout of one column is a list of messages. In a layout of two, the first column is the question
# and the second one the reply. If the row has text in a column of QUESTION_EXTRAS, this text
# follows the question, after a blank line. Other columns are ignored.
#
# From any of them we make a list of messages with "role" and "content" (check_conversation). What
# cannot be mended without guessing is dropped: a call of a tool, as the turn format has no place
# for one; a question about a picture; an empty message; two replies in a row; a message that is
# marked as not to be learnt. Drops counts it, and data.txt tells.

LAYOUTS = [
    ["messages"],       # {"messages": [{"role": "user", "content": "2+2?"},
                        #               {"role": "assistant", "content": "4"}]}
    ["conversations"],  # {"conversations": [{"from": "human", "value": "2+2?"},
                        #                    {"from": "gpt", "value": "4"}]}: ShareGPT
    ["prompt", "completion"],              # {"prompt": "2+2?", "completion": "4"}, or two lists of
                                           # messages
    ["prompt", "response"],                # {"prompt": "2+2?", "response": "4"}
    ["question", "answer"],                # {"question": "Who?", "context": "Ada wrote it.",
                                           #  "answer": "Ada."}
    ["instruction", "output"],             # {"instruction": "Add.", "input": "2 2", "output": "4"}
    ["instruction", "response"],
]
QUESTION_EXTRAS = ("input", "context")
SYSTEM = "system"  # a row of any layout may have this column, which becomes the first message

ROLE_NAMES = {"system": "system", "developer": "system", "user": "user", "human": "user",
              "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
THOUGHTS = ("thinking", "reasoning")                     # types of parts that are no reply
MEDIA = ("image", "audio", "video", "file", "input_")    # how the type of such parts begins
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")


def find_layout(columns, column: str | None) -> list[str]:
    """The layout of a row with these columns. column: the name of the list of messages, if given.

    >>> find_layout(["id", "question", "answer"], column=None)
    ['question', 'answer']
    """
    layouts = LAYOUTS if column is None else [[column]]
    for layout in layouts:
        if set(layout) <= set(columns):
            return layout
    known = ", ".join("+".join(layout) for layout in layouts)
    raise UserError(f"the columns {', '.join(columns)} are none of {known}; rename them, or name a "
                    "column with a list of messages by ?messages=COLUMN")


def read_row(row, column: str | None, left_out: Counter) -> list[dict]:
    """A row, a line of JSON, or a pyarrow.RecordBatch of one row -> its conversation. UserError
    with the reason if it has none; Drops counts reasons, so the text is the same for all rows with
    the same fault.

    >>> read_row({"question": "2+2?", "answer": "4"}, None, Counter())
    [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError):
            raise UserError("the line is not JSON") from None
    elif hasattr(row, "to_pylist"):
        try:
            row = row.to_pylist()[0]
        except UnicodeDecodeError:
            raise UserError("a text is not UTF-8") from None
    if not isinstance(row, dict):
        raise UserError(f"the row is {type_name(row)}, not an object with columns")

    layout = find_layout(row, column)
    if is_list(row, layout):
        turns = list_turns(row, layout)
    else:
        turns = pair_turns(row, *layout)
    if row.get(SYSTEM) is not None:
        turns = [{"role": "system", "content": row[SYSTEM]}, *turns]
    messages = [read_turn(turn, left_out) for turn in turns]
    return tidy(messages)


def is_list(row: dict, layout: list[str]) -> bool:
    """Whether the columns hold lists of messages, not text."""
    return len(layout) == 1 or all(isinstance(row[column], list) for column in layout)


def list_turns(row: dict, layout: list[str]) -> list:
    """The elements of the columns, which hold lists of messages, one after the other."""
    turns = []
    for column in layout:
        if not isinstance(row[column], list):
            raise UserError(f"the column {column!r} is {type_name(row[column])}, not a list of "
                            "messages")
        turns += row[column]
    return turns


def pair_turns(row: dict, question: str, reply: str) -> list[dict]:
    """A question and its reply, from the columns of these names.

    >>> row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    >>> pair_turns(row, "instruction", "output")
    [{'role': 'user', 'content': 'Add.\\n\\n2 2'}, {'role': 'assistant', 'content': '4'}]
    """
    for column in (question, reply):
        if not isinstance(row[column], str):
            raise UserError(f"the column {column!r} is {type_name(row[column])}, not text")
    texts = [row[question]]
    for column in QUESTION_EXTRAS:
        # What is no text is no part of the question, but something of the data set's own.
        if isinstance(row.get(column), str):
            texts.append(row[column])
    content = "\n\n".join(text for text in texts if text.strip())
    return [{"role": "user", "content": content}, {"role": "assistant", "content": row[reply]}]


def read_turn(turn, left_out: Counter) -> dict:
    """An element of a list of messages -> {"role": ..., "content": text}. It may have more keys.
    Calls of tools are not rendered: a conversation with one is dropped.

    >>> read_turn({"from": "human", "value": "2+2?"}, Counter())
    {'role': 'user', 'content': '2+2?'}
    >>> left_out = Counter()
    >>> read_turn({"role": "assistant", "content": [{"type": "thinking", "text": "Add them."},
    ...                                             {"type": "text", "text": "4"}]}, left_out)
    {'role': 'assistant', 'content': '4'}
    >>> left_out
    Counter({'thinking': 1})
    """
    if not isinstance(turn, dict):
        raise UserError(f"a message is {type_name(turn)}, not an object")
    name = turn.get("role") or turn.get("from")
    if name in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise UserError("it uses a tool")
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise UserError(f"a message has the role {name!r}, none of {', '.join(ROLE_NAMES)}")

    role = ROLE_NAMES[name]
    if role == "assistant" and turn.get("weight") == 0:         # as in OpenAI's format
        raise UserError("a reply has weight 0: it is not to be learnt")

    # A .parquet file has a null for every key that some other message has.
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if content is None:
        content = ""
    if isinstance(content, list):
        content = join_parts(content, left_out)
    if not isinstance(content, str):
        raise UserError(f"the content of a message is {type_name(content)}, not text")
    return {"role": role, "content": content}


def join_parts(parts: list, left_out: Counter) -> str:
    """The text of a content that is a list of parts, a line for each."""
    texts = []
    for part in parts:
        kind = str(part.get("type")) if isinstance(part, dict) else type_name(part)
        has_text = isinstance(part, dict) and isinstance(part.get("text"), str)
        if has_text and kind not in THOUGHTS:
            texts.append(part["text"])
        else:
            if kind.startswith(MEDIA):
                raise UserError(f"a message has a part that cannot be read: {kind}")
            left_out[kind] += 1
    return "\n".join(texts)


def tidy(messages: list[dict]) -> list[dict]:
    """Leave out empty system messages and what follows the last reply; UserError if what is left
    is no conversation."""
    tidied = []
    for message in messages:
        if message["role"] != "system" or message["content"].strip():
            tidied.append(message)
    while tidied and tidied[-1]["role"] != "assistant":
        tidied.pop()
    check_conversation(tidied)
    return tidied


def check_conversation(messages: list[dict]) -> None:
    """UserError unless each message has a known role and text, one is the assistant's, and none of
    the assistant's comes before the first question or right after another."""
    roles = []
    for message in messages:
        role = message.get("role")
        content = message.get("content")
        if role not in ROLES:
            raise UserError(f"a message has the role {role!r}, none of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise UserError("a message has no content")
        # JSON can hold half of a surrogate pair, but no tokenizer can encode it.
        if re.search("[\ud800-\udfff]", content):
            raise UserError("a message has half of a surrogate pair")
        if role == "assistant" and "user" not in roles:
            raise UserError("a reply comes before the first question")
        if roles and roles[-1] == role == "assistant":
            raise UserError("two replies follow each other")
        roles.append(role)
    if "assistant" not in roles:
        raise UserError("there is no reply")


def type_name(value) -> str:
    """A type as people who write JSON call it, or Python."""
    return "null" if value is None else type(value).__name__


# ---- files

def source_files(source: str) -> list[Path]:
    """The local files that a source reads; none where it is a generator or a dataset of the Hub."""
    place = source.partition("?")[0]
    if os.path.isdir(place):
        files = sorted(path for path in Path(place).rglob("*")
                       if path.name.endswith(FILES) and path.is_file())
        if not files:
            raise UserError(f"source {source!r}: the folder has no file that ends in one of "
                            f"{' '.join(FILES)}")
        return files
    return local_files(place) if place.endswith(FILES) else []


def file_rows(files: list[Path], column: str | None):
    """(place, row) of each row of the files; a row is as read_row takes it."""
    for path in files:
        if path.suffix == ".parquet":
            rows = layout_batches(path, column)
        elif ".json" in path.suffixes[-2:]:
            rows = json_rows(path)
        else:
            rows = file_lines(path)
        yield from with_source(path, rows)


def with_source(source, rows):
    """(place, row) of each row, with the source in its place. What goes wrong in reading it is a
    UserError with the place."""
    placed = ((place, (f"{source}: {place}", row)) for place, row in rows)
    yield from read_each(source, placed, tuple)  # tuple: an item stays as it is


def layout_batches(path: Path, column: str | None):
    """(place, pyarrow.RecordBatch of one row) of each row, with the columns of the layout alone."""
    import pyarrow.parquet
    names = pyarrow.parquet.ParquetFile(path).schema_arrow.names
    layout = find_layout(names, column)
    wanted = [name for name in names if name in (*layout, *QUESTION_EXTRAS, SYSTEM)]
    yield from parquet_rows(path, wanted)


def json_rows(path: Path):
    """(place, row) of a .json file, which is one list of rows; or has a row on each line, after
    all."""
    lines = list(file_lines(path))
    text = b"".join(line for _, line in lines)
    if text.lstrip().startswith(b"["):
        for number, row in enumerate(json.loads(text)):
            yield f"row {number}", row
        return
    if len(lines) > 1 and is_json(text):
        raise UserError("the file is one object, not a list of rows, nor a row on each line")
    yield from lines


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def file_lines(path: Path):
    """(place, line) of each line of a file with something in it, without a byte-order mark."""
    lines = zstd_lines(path) if path.suffix == ".zst" else lines_of(path, 0, path.stat().st_size)
    for place, line in lines:
        line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield place, line


def zstd_lines(path: Path):
    """(place, line) of each line."""
    try:
        import zstandard
    except ImportError:
        raise UserError("to read .zst files: pip install zstandard") from None
    start = 0
    with open(path, "rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        for line in io.BufferedReader(reader):
            yield f"byte {start}", line
            start += len(line)


def dataset_rows(name: str, options: dict):
    """(place, row) of each row of a Hub dataset."""
    hub_commit(name, options)  # tells a wrong name or a missing network in seconds
    for i, row in enumerate(open_hub(name, options)):
        yield f"row {i}", row


# ---- generators

def builtin_conversations(source: str, kind: str, options: dict):
    """Yield the conversations of a generator in synthetic/conversations.py."""
    chats = synthetic.conversations.CHATS
    if kind not in chats:
        raise UserError(f"source {source!r}: the built-in conversations are {', '.join(chats)}")
    generate, known = chats[kind]
    check_options(source, options, known)
    ranges = {key: parse_range(source, key, value) for key, value in options.items()}
    yield from generate(**ranges)


def parse_range(source: str, key: str, value: str) -> tuple[int, int]:
    """The value of an option: one number, or of steps= also two.

    >>> parse_range("builtin:chains?steps=2-4", "steps", "2-4")
    (2, 4)
    """
    match = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", value)
    first, last = match.groups() if match else (None, None)
    if first is None or last and (key != "steps" or int(last) < int(first)):
        form = "a whole number from 1"
        if key == "steps":
            form += ", or a range as in 2-4"
        raise UserError(f"source {source!r}: {key}={value} must be {form}")
    return int(first), int(last or first)
