"""Where conversations come from: generators, files, data sets of the Hub."""
import json
import os
import re
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

import synthetic.conversations
from configurator import UserError
from support.sources import (check_options, lines_of, local_files, open_hub, parquet_rows,
                             read_each)
from support.tokenizer import ROLES

# The chains that eval.py asks for. No stage trains on their questions, whatever its data.
HELD_OUT = {
    "held_chains": ["builtin:chains?n=100&steps=2-4&seed=2", 0.0],
    "longer_chains": ["builtin:chains?n=100&steps=5-6", 0.0],  # training has 2 to 4 steps
}

FILES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".parquet")


def load_conversations(source: str):
    """Yield the conversations of a source, which is one of

        builtin:help  builtin:skills?n=1000  builtin:chains?n=1000&steps=2-4&seed=1
        talks/*.jsonl?messages=turns      local files, also .parquet; messages= names the column
        owner/name?name=CONFIG&split=train&messages=turns     a dataset of the Hugging Face Hub

    A row that is no conversation is a UserError with its place."""
    place, _, query = source.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    column = options.get("messages", "messages")

    if place.startswith("builtin:"):
        yield from builtin_conversations(source, place.removeprefix("builtin:"), options)
    elif place.endswith(FILES):
        check_options(source, options, ["messages"])
        for path in local_files(place):
            if path.suffix == ".parquet":
                yield from read_each(path, parquet_rows(path), partial(get_messages, column))
            else:
                yield from read_each(path, nonblank_lines(path), partial(parse_messages, column))
    elif is_hub_name(place):
        check_options(source, options, ["messages", "name", "split"])
        yield from read_each(place, hub_rows(place, options), partial(get_messages, column))
    else:
        raise UserError(f"source {source!r} must be builtin:..., a dataset owner/name of the Hub, "
                        f"or files that end in one of {', '.join(FILES)}")


def is_hub_name(place: str) -> bool:
    """Whether this may be owner/name. A name with the ending of a text file is taken for a file."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", place) is not None
    is_file = os.path.exists(place) or re.search(r"\.(txt|csv|tsv|json)(\.\w+)?$", place)
    return is_name and not is_file


def source_files(source: str) -> list[Path]:
    """The local files that a source reads; none where it is a generator or a dataset of the Hub."""
    place = source.partition("?")[0]
    return local_files(place) if place.endswith(FILES) else []


def builtin_conversations(source: str, kind: str, options: dict):
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
        raise UserError(f"source {source!r}: {key}={value} must be a number; of steps also a range "
                        "as in 2-4")
    return int(first), int(last or first)


def nonblank_lines(path: Path):
    """(place, line) of each line of a file with something in it."""
    for place, line in lines_of(path, 0, path.stat().st_size):
        if line.strip():
            yield place, line


def hub_rows(name: str, options: dict):
    """(place, row) of each row of a Hub dataset."""
    for i, row in enumerate(open_hub(name, options)):
        yield f"row {i}", row


def parse_messages(column: str, line: bytes) -> list[dict]:
    return get_messages(column, json.loads(line))


def get_messages(column: str, row: dict) -> list[dict]:
    """The conversation in a row, whose messages may have more keys than we read."""
    messages = row.get(column) if isinstance(row, dict) else None
    if not isinstance(messages, list):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"column {column!r} must be a list of messages, [{{'role': 'user', "
                        f"'content': '...'}}, ...]; the row has {has}: name the right column with "
                        "?messages=COLUMN")
    check_conversation(messages)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def check_conversation(messages: list[dict]) -> None:
    """UserError unless each message has a known role and text, and one is the assistant's."""
    roles = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"message {number} needs a role, one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"message {number} has no content; drop this conversation")
        # JSON can hold half of a surrogate pair, but no tokenizer can encode it.
        if re.search("[\ud800-\udfff]", content):
            raise UserError(f"message {number} has half of a surrogate pair; mend or drop it")
        if roles and roles[-1] == message["role"] == "assistant":
            raise UserError(f"messages {number - 1} and {number} are the assistant's; join them")
        roles.append(message["role"])
    if "assistant" not in roles:
        raise UserError("no message is the assistant's; drop this conversation")
