"""Run the full-size rows that are not done yet, in order of value, on an accelerator.

Shows: what the rows say, see `rows/`.
Cost: what --seconds and --row-seconds allow; the next call continues where this call
stopped, by itself or by a signal.
Command: python experiments/accelerator.py --data-dir FOLDER --seconds 540

The folder may hold only plain npz files, `cifar10/train.npz` and `cifar10/test.npz` and
so on, so that neither tensorflow-datasets nor a network is needed. The script names the
datasets that the folder lacks, and skips their rows.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import rows
import run

import hsee_jax
from hsee_jax.cli.flags import use_cache
from hsee_jax.cli.signals import StopSignals
from hsee_jax.data import is_there

SETS = ("cifar10", "cifar100", "stl10")
# The rows that matter most; the other rows follow in the order of their names.
FIRST = ("centralized", "averaging-mixed", "sequential-mixed", "local-mixed")


def in_order_of_value(sets: Iterable[str], seeds: Iterable[int]) -> list[rows.Run]:
    """Return all runs, ordered by seed, then `FIRST` before other rows, then by set."""

    def rank(pair: tuple[int, str]) -> tuple[bool, int, int, str]:
        place, row = pair
        name = row.partition("/")[2]
        first = FIRST.index(name) if name in FIRST else len(FIRST)
        return (first == len(FIRST), place, first, row)

    pairs = [
        (place, row) for place, study in enumerate(sets) for row in rows.rows(study)
    ]
    return [rows.Run(row, seed) for seed in seeds for _, row in sorted(pairs, key=rank)]


def main(words: Sequence[str] | None = None) -> int:
    """Run rows until the time is over, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=540, help="limit of all runs")
    parser.add_argument("--row-seconds", type=float, help="limit of a run")
    parser.add_argument("--list", action="store_true", help="print unfinished runs")
    given = run.parse(parser, words)
    changes: dict[str, Any] = {"data_dir": given.data_dir} if given.data_dir else {}
    end = time.monotonic() + given.seconds
    missing: list[str] = []
    try:
        for study in given.sets:
            rows.select([study])
        use_cache({})
        with StopSignals() as signals:

            def until(end: float) -> Callable[[], bool]:
                return lambda: time.monotonic() > end or signals()

            for one in in_order_of_value(given.sets, given.seeds):
                name, left = f"{one.row} seed {one.seed}", end - time.monotonic()
                data = rows.config_of(one, **changes).data
                if data.dataset in missing or rows.load(one, given.results) is not None:
                    continue
                if given.list:
                    print(name)
                    continue
                if left <= 0 or signals():
                    break
                last = time.monotonic() + min(left, given.row_seconds or left)
                try:
                    how = run.perform(
                        one,
                        changes=changes,
                        folder=given.runs,
                        results=given.results,
                        stop=until(last),
                    )
                except hsee_jax.UserError as error:
                    if is_there(data.dataset, data.data_dir):
                        raise
                    missing.append(data.dataset)
                    how = f"left out: {error}"
                print(f"{name}: {how}", flush=True)
    except hsee_jax.UserError as error:
        print(f"accelerator.py: {error}", file=sys.stderr)
        return 2
    return 128 + signals.received if signals.received else 0


if __name__ == "__main__":
    raise SystemExit(main())
