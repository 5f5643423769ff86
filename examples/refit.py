"""Compare the exits of the demo as trained, fitted exactly, and with convolutions.

The script trains the preset `demo` with both kinds of exits, with IID labels
and with labels skewed by Dirichlet(0.1), and then fits the last layers of all exits in
one round of messages. It prints accuracies on the test set, means over the clients of a
cut. The twelve runs take half an hour on two cores; runs that are there already are
not trained again::

    python examples/refit.py --json examples/refit.json
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hsee_jax as hs

PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"partition": "dirichlet", "alpha": 0.1},
}
NAMES = {"iid": "IID", "dirichlet": "Dirichlet 0.1"}
Row = dict[str, Any]  # values of JSON


def fit(partition: str, exit_head: str, seed: int, given: argparse.Namespace) -> Row:
    """Train once unless the run is there, fit its exits, and return the accuracies."""
    config = hs.override(
        hs.preset("demo"),
        exit_head=exit_head,
        model_seed=seed,
        data_seed=seed,
        partition_seed=seed,
        max_train_samples=given.images,
        **PARTITIONS[partition],
    )
    if given.rounds is not None:
        config = hs.override(config, rounds=given.rounds)
    folder = given.out / f"{partition}-{exit_head}-{seed}"
    hs.studies.train_run(
        hs.studies.Run(folder.name, seed, config), folder, overwrite=True
    )
    shutil.rmtree(folder / "refit", ignore_errors=True)
    found = hs.runs.refit(folder)
    return {
        "partition": partition,
        "exit_head": exit_head,
        "seed": seed,
        "before": by_cut(found.before),
        "after": by_cut(found.after),
        "server": found.before.mean_server_accuracy,
        "up_bytes": found.link.up_bytes,
        "down_bytes": found.link.down_bytes,
    }


def by_cut(scores: hs.runs.Scores) -> dict[str, float]:
    """Return the mean accuracy of the exits at each cut, and of all exits."""
    found: dict[str, list[float]] = {}
    for client in scores.clients:
        found.setdefault(str(client.cut), []).append(client.exit_accuracy)
    means = {cut: float(np.mean(values)) for cut, values in sorted(found.items())}
    return means | {"all": scores.mean_exit_accuracy}


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table: mean ± standard deviation over the seeds."""
    cuts = list(rows[0]["before"])
    titles = [f"cut {cut}" for cut in cuts[:-1]] + ["all exits", "server"]
    head = ["labels", "exit head", "exits", *titles]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["partition"], row["exit_head"]), []).append(row)
    for (partition, exit_head), found in cases.items():
        for when, name in (("before", "as trained"), ("after", "fitted")):
            cells = [_mean([row[when][cut] for row in found]) for cut in cuts]
            server = _mean([row["server"] for row in found])
            cells = [NAMES[partition], f"`{exit_head}`", name, *cells, server]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return hs.studies.mean_text(values, 3)


def main(words: Sequence[str] | None = None) -> None:
    """Train and fit all combinations, and print the table."""
    parser = argparse.ArgumentParser(description="Fit the exits of the demo.")
    parser.add_argument("--out", type=Path, default=Path("runs/refit"))
    parser.add_argument("--json", type=Path, help="write the figures of each run there")
    parser.add_argument("--partitions", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--exit-heads", nargs="+", default=["linear", "conv"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="of a run (12)")
    parser.add_argument("--images", type=int, help="for training (all)")
    given = parser.parse_args(words)
    rows = [
        fit(partition, exit_head, seed, given)
        for partition in given.partitions
        for exit_head in given.exit_heads
        for seed in given.seeds
    ]
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
