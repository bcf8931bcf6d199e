"""Random documents, and errors that are one line: what tests of sources and of data share."""
import json
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(33, 127, rng.integers(1, 120)))) for _ in range(n)]


def write_jsonl(path, documents):
    lines = [json.dumps({"id": 1, "text": document}) + "\n" for document in documents]
    Path(path).write_text("".join(lines))


def refused(call, *words):
    """call() raises a UserError of one line with these words in it."""
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said
