"""How tools.fuzz damages a file: bytes at random, values of JSON, headers, rows, options."""
import bz2
import gzip
import json
import lzma
import random
import re
from pathlib import Path

# What a value is replaced by, in JSON and in Python.
VALUES = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -10**12, 0.5, 1e308, -0.0,
          float("nan"), float("inf"), "", "x", "1", "a\nb", "../x", "/etc/passwd", "\x00", "\ud800", "é" * 300,
          [], [1], ["x"], [[]], {}, {"a": 1}, {"": {"a": []}}]
BYTES = [b"\x00", b"\xff", b"\n", b"{", b"[" * 100_000, b"\"", b"0" * 5000, b"\xf0\x9f\x98\x80",
         b"\xed\xa0\x80", b" " * 100_000, b"null", b"-1", b"1e999", b"9" * 30]
COMPRESSED = {".gz": gzip, ".bz2": bz2, ".xz": lzma}


def damage(file: Path, rng: random.Random) -> str:
    """Damage a file in place -> what was done."""
    old = file.read_bytes()
    data = mutate(file.name, old, rng)
    file.write_bytes(data)
    return f"{file.name}, {len(old)} bytes -> {len(data)}"


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """Half of the time bytes at random, half of the time by the file's kind."""
    name, _, ending = name.rpartition(".")
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    if f".{ending}" in COMPRESSED:
        module = COMPRESSED[f".{ending}"]
        return module.compress(mutate(name, module.decompress(data), rng))
    if ending == "zst":
        import zstandard
        inside = zstandard.ZstdDecompressor().decompress(data)
        return zstandard.ZstdCompressor().compress(mutate(name, inside, rng))
    if ending == "json":
        return to_json(mutate_value(json.loads(data), rng))
    if ending == "jsonl":
        return mutate_line(data, rng)
    if ending == "parquet":
        return mutate_table(data, rng)
    if ending == "safetensors":
        return mutate_header(data, rng)
    if ending in ("py", "options"):
        return mutate_setting(data, rng)
    if ending == "npy":
        return mutate_bytes(data[:128], rng) + data[128:]
    return mutate_bytes(data, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes at up to three places, or end the file early."""
    for _ in range(rng.choice([1, 1, 1, 3])):
        place = rng.randrange(len(data) + 1)
        if rng.random() < 0.3:
            place = rng.randrange(min(len(data), 64) + 1)        # headers are at the beginning
        length = rng.choice([1, 1, 4, 64, 1000])
        piece = data[place:place + length]
        flipped = bytes(b ^ 1 << rng.randrange(8) for b in piece)
        noise = rng.randbytes(length)
        new = rng.choice([flipped, flipped, b"", piece * 2, noise + piece, noise[:len(piece)],
                          rng.choice(BYTES) + piece, rng.choice(BYTES)])
        data = data[:place] + new + data[place + length:]
    if rng.random() < 0.15:
        data = data[:rng.randrange(len(data) + 1)]
    return data


def to_json(value) -> bytes:
    return json.dumps(value).encode()


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_value(value, rng: random.Random):
    """Replace, remove or rename something anywhere inside a JSON value."""
    if rng.random() < 0.03:
        return rng.choice(VALUES)
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return mutate_entry(value, key, rng)
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        change = rng.choice(["inside", "inside", "inside", "remove", "repeat"])
        new = {"inside": [mutate_value(value[i], rng)], "remove": [], "repeat": 2 * [value[i]]}
        return value[:i] + new[change] + value[i + 1:]
    if rng.random() < 0.05:
        return nested(500)
    if type(value) in (int, float) and rng.random() < 0.3:
        return rng.choice([-value, value + 1, value - 1, value * 2, str(value), [value], value / 2])
    return rng.choice(VALUES)


def mutate_entry(value: dict, key: str, rng: random.Random) -> dict:
    change = rng.choice(["inside"] * 6 + ["remove", "rename", "add"])
    value = dict(value)
    if change == "inside":
        value[key] = mutate_value(value[key], rng)
    elif change == "add":
        value[rng.choice(["", "x", "\ud800", "../x", "a.b"])] = rng.choice(VALUES)
    else:
        removed = value.pop(key)
        if change == "rename":
            value[rng.choice([key + "x", key[:-1], "", key.upper()])] = removed
    return value


def mutate_line(data: bytes, rng: random.Random) -> bytes:
    """One line of JSON, or all of them alike."""
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    changed = to_json(mutate_value(json.loads(lines[i]), rng))
    if rng.random() < 0.2:
        return b"\n".join([changed] * len(lines)) + b"\n"
    order = rng.choice([lines[:i] + [changed] + lines[i + 1:], [changed] + lines, [*lines, changed],
                        rng.sample(lines, len(lines)), lines[:i] + lines[i + 1:]])
    return b"\n".join(order) + b"\n"


def mutate_table(data: bytes, rng: random.Random) -> bytes:
    """A parquet file whose rows are changed, if its library can write such rows."""
    import pyarrow
    from pyarrow import parquet
    rows = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    try:
        value = rng.choice(VALUES)
        key = rng.choice(list(rows[0]))
        changed = [row | {key: value} for row in rows]
        table = pyarrow.Table.from_pylist(rng.choice([changed, mutate_value(rows, rng)]))
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink)
    except Exception:
        return mutate_bytes(data, rng)
    return sink.getvalue().to_pybytes()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """safetensors: eight bytes of length, a header of JSON, the numbers."""
    length = int.from_bytes(data[:8], "little")
    header = to_json(mutate_value(json.loads(data[8:8 + length]), rng))
    told = rng.choice([len(header)] * 8 + [2**63, len(header) + 1])
    return told.to_bytes(8, "little") + header + data[8 + length:]


def mutate_setting(data: bytes, rng: random.Random) -> bytes:
    """The value of a line `key = value` or `--key=value`, or its key."""
    lines = data.decode().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"[\w-]+ *=", line)]
    i = rng.choice(settings)
    key, equals, value = lines[i].partition("=")
    if rng.random() < 0.1:
        key = rng.choice([key[:-1], key + "x", key.upper(), "seed ", "--x", ""])
    elif rng.random() < 0.3:
        numbers = re.split(r"(\d+)", value)
        place = rng.randrange(len(numbers))
        numbers[place] = rng.choice(["-1", "0", "10**30", "9" * 25, "1e999", "'x'", "[]", "1_0"])
        value = "".join(numbers)
    else:
        value = repr(rng.choice(VALUES))
    lines[i] = key + equals + value
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
