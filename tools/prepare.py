"""Prepare a run's data ahead of it: `python -m tools.prepare config/X.py`, also in parts, on several
machines that see one data_dir: --prepare_part=1/4 to --prepare_part=4/4, then once without."""
import re
import sys

from configurator import load
from data import prepare
from pretrain import QUICKSTART, Config, make_curriculum


def main() -> None:
    c = load(Config, sys.argv[1:], default_file=QUICKSTART)
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", c.prepare_part)
    if not numbers or int(numbers[1]) > int(numbers[2]):
        raise SystemExit(f"part={c.prepare_part} must be i/n, from 1/n to n/n")
    part = int(numbers[1]) - 1, int(numbers[2])
    try:
        plan = make_curriculum(c)
        stores = prepare(c.domains, c.tokenizer, c.data_dir, plan.need(), part, c.workers)
        print(plan.table(stores if part[1] == 1 else None))
    except ValueError as e:
        raise SystemExit(str(e)) from None


if __name__ == "__main__":
    main()
