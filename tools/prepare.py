"""Prepare a run's data ahead of it and print its curriculum: `python -m tools.prepare config/X.py`.

Several machines that share data_dir may each prepare a part: --prepare_part=1/4 on the first one
to --prepare_part=4/4 on the fourth. When all have ended, one call without it writes the manifests.
"""
import re
import sys

from configurator import UserError, load
from data import prepare
from pretrain import QUICKSTART, Config, make_curriculum
from support.ranks import run_main


def parse_part(text: str) -> tuple[int, int]:
    """
    >>> parse_part("1/4")
    (0, 4)
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"prepare_part={text} must be i/n, from 1/n to n/n")
    return int(match[1]) - 1, int(match[2])


def main() -> None:
    c = load(Config, sys.argv[1:], default_file=QUICKSTART)
    part = parse_part(c.prepare_part)
    curriculum = make_curriculum(c)
    stores = prepare(c.domains, c.tokenizer, c.data_dir, curriculum.need(), part, c.workers)

    # One part of several does not know how many tokens there are together.
    is_all = part[1] == 1
    print(curriculum.table(stores if is_all else None))


if __name__ == "__main__":
    run_main(main)
