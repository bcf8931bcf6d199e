"""Conversations as tokens: encoded by all cores, and stored in a folder."""
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from configurator import UserError, one_line
from support.preparing import num_cores
from support.weights import checksum, read_json, write_json

BATCH = 4096  # conversations that a process encodes at a time [ours]


class TokenizedChats:
    """The encoded conversations of a domain, in a folder. chats[i] is (2, n): ids and targets.

        tokens.npy  (2, N) int32   ids, targets of all conversations, end to end; memory-mapped
        spans.npy   (2, n) int64   where each conversation ends, how many of its targets count
        checksums.json             of both: a flipped bit would be another token

    Two conversations, of 4 and 3 tokens, of which two and one are learnt:

        tokens.npy  [[ 7  8  9  5   7  6  5]     spans.npy  [[4 7]
                     [-1  9  5 -1  -1  5 -1]]                [2 1]]
    """

    def __init__(self, folder: Path):
        try:
            expected = read_json(folder / "checksums.json")
            for name in ("tokens.npy", "spans.npy"):
                if checksum(folder / name) != expected.get(name):
                    raise UserError(f"the checksum of {name} is another")
        except (OSError, UserError) as e:
            raise UserError(f"{folder} is damaged ({one_line(e)}); delete {folder.parent} and run "
                            "again") from None
        self.tokens = np.load(folder / "tokens.npy", "r")
        self.ends, self.num_targets = np.load(folder / "spans.npy")
        self.lengths = np.diff(self.ends, prepend=0)

    @staticmethod
    def save(folder: Path, batches: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """batches: tokens and sizes of some conversations each, as encode_batch gives them."""
        lengths, num_targets = np.concatenate([sizes for _, sizes in batches], axis=1)
        folder.mkdir()
        np.save(folder / "spans.npy", np.array([lengths.cumsum(), num_targets], "<i8"))
        with open(folder / "tokens.npy", "wb") as file:
            # As np.save would write it, without a copy of all batches in one array.
            np.lib.format.write_array_header_1_0(file, {
                "descr": "<i4", "fortran_order": False, "shape": (2, int(lengths.sum()))})
            for row in (0, 1):
                for tokens, _ in batches:
                    file.write(tokens[row].astype("<i4"))
        write_json(folder / "checksums.json",
                   {name: checksum(folder / name) for name in ("tokens.npy", "spans.npy")})

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        end = self.ends[i]
        return self.tokens[:, end - self.lengths[i]:end]


def encode_chats(conversations: list, encode: Callable) -> tuple[list, str]:
    """Encode conversations by all cores -> batches for TokenizedChats.save, and a line of report.

    encode(messages) -> ids and targets, (2, n) int32, and whether something was cut off. UserError
    with the reason if it cannot: then the conversation is dropped."""
    # Many conversations to a job: to send each alone would take longer than to encode it.
    starts = range(0, len(conversations), BATCH)
    jobs = [conversations[start:start + BATCH] for start in starts]
    batches = []
    truncated = 0
    dropped = Counter()
    for tokens, sizes, cut_here, dropped_here in map_in_processes(partial(encode_batch, encode),
                                                                  jobs):
        if len(sizes[0]):
            batches.append((tokens, sizes))
        truncated += cut_here
        dropped += dropped_here

    line = (f"{len(conversations) - dropped.total():,d}, of which {truncated:,d} were cut after a "
            "reply")
    for reason, count in dropped.most_common():
        line += f"; {count:,d} dropped: {reason}"
    return batches, line


def encode_batch(encode: Callable, conversations: list) -> tuple:
    """-> tokens (2, N) int32: ids and targets, end to end; sizes (2, n) int64: how long each
    conversation is, how many of its targets count; how many were cut; Counter of those dropped, by
    reason."""
    chats = [np.empty((2, 0), np.int32)]
    lengths = []
    num_targets = []
    truncated = 0
    dropped = Counter()
    for messages in conversations:
        try:
            chat, is_cut = encode(messages)
        except UserError as e:
            dropped[str(e)] += 1
            continue
        chats.append(chat)
        lengths.append(chat.shape[1])
        num_targets.append((chat[1] >= 0).sum())
        truncated += is_cut
    sizes = np.array([lengths, num_targets], np.int64)
    return np.concatenate(chats, axis=1), sizes, truncated, dropped


def map_in_processes(fn: Callable, jobs: list) -> Iterator:
    """Yield fn(job) of each job, in their order, from one process for each core. What they send to
    each other is pickled. A single job is done here, as it takes seconds to start a process."""
    workers = min(len(jobs), num_cores())
    if workers < 2:
        yield from map(fn, jobs)
        return

    # Not forks of this process, whose threads and whose hold on the GPU they would copy. On macOS
    # no forks at all: its libraries do not bear them.
    method = "spawn" if sys.platform == "darwin" else "forkserver"
    with ProcessPoolExecutor(workers, get_context(method), end_with_parent) as pool:
        try:
            yield from pool.map(fn, jobs)
        except BrokenProcessPool:
            raise UserError("a process that encodes was killed, perhaps for lack of memory; run "
                            "again, or give less data") from None


def end_with_parent() -> None:
    """Called in each process as it begins: it ends when its parent has, however that ended."""
    def wait() -> None:
        parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=wait, daemon=True).start()
