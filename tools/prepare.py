"""Prepare a run's data ahead of it and print its curriculum: `python -m tools.prepare config/X.py`.

A run prepares its data itself while it trains; this is for a machine that trains faster than it
prepares, or for data that are to be copied. Several machines that share data_dir may each prepare a
part: --prepare_part=1/4 on the first one to --prepare_part=4/4 on the fourth. --verify reads what
is there and names what is damaged.
"""
import re
import sys
import time

from configurator import UserError, load
from data import Domain, Preparer, TokenDataset
from pretrain import QUICKSTART, Config, make_curriculum
from support.ranks import run_main
from support.tokenizer import load_tokenizer


def parse_part(text: str) -> tuple[int, int]:
    """
    >>> parse_part("1/4")
    (0, 4)
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"prepare_part={text} must be i/n, from 1/n to n/n")
    return int(match[1]) - 1, int(match[2])


def prepare(dataset: TokenDataset, part: tuple[int, int] = (0, 1)) -> None:
    """Make all that the dataset's curriculum reads, or every n-th unit of it."""
    curriculum = dataset.curriculum
    begun = time.monotonic()
    shown = begun
    for name in curriculum.names:
        if part[0] == 0:
            dataset.validation(name, 1, 1)
    while True:
        dataset.prefetcher.preparer.collect(seconds=0.2)
        for d, name in enumerate(curriculum.names):
            domain = dataset.domains[name]
            _, end = dataset.tape_span(curriculum.steps - 1, d)
            tape = dataset.tapes[name]
            tape.extend(end)
            dataset.prefetcher.preparer.request(domain, end - len(tape), tape.units_to_come(), part)
        if dataset.prefetcher.preparer.num_busy() == 0:
            break
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print_progress(dataset, shown - begun)
    print_progress(dataset, time.monotonic() - begun)


def print_progress(dataset: TokenDataset, seconds: float) -> None:
    tokens = 0
    size = 0
    for domain in dataset.domains.values():
        made = sum(domain.unit_tokens.values())
        tokens += made
        size += made * domain.dtype.itemsize
    print(f"{tokens:,d} tokens, {size / 1e9:.2f} GB after {seconds:.0f} s", flush=True)


def verify(domains: dict[str, Domain]) -> None:
    """Read all that is there; UserError if something is damaged."""
    damaged = []
    for domain in domains.values():
        damaged += domain.verify()
    for path in damaged:
        print(f"{path} is damaged: delete it, and it is made again when it is needed")
    if damaged:
        raise UserError(f"{len(damaged)} files are damaged")
    print(f"{sum(len(domain.records) for domain in domains.values())} pieces are as they were made")


def main() -> None:
    c = load(Config, sys.argv[1:], default_file=QUICKSTART, about=__doc__)
    part = parse_part(c.prepare_part)
    curriculum = make_curriculum(c)
    tokenizer = load_tokenizer(c.tokenizer)
    domains = {}
    for name, domain in c.domains.items():
        domains[name] = Domain(name, domain[0], tokenizer, c.data_dir)

    if c.verify:
        verify(domains)
        return
    print(curriculum.table())
    manifest = f"manifest-{part[0] + 1}-of-{part[1]}.jsonl" if part[1] > 1 else "manifest.jsonl"
    preparer = Preparer(c.workers, manifest)
    prepare(TokenDataset(curriculum, domains, c.seed, preparer), part)
    preparer.close()


if __name__ == "__main__":
    run_main(main)
