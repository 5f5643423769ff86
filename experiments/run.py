"""Runs rows of the results tables.

Shows: what the rows say, see `rows/`; their results go to `results/`, and
`python experiments/tables.py` makes the tables of them.
Cost: each row and set names its own.
Command: python experiments/run.py SET|SET/ROW ... [--seeds 0 1 2] [--data-dir FOLDER]

What is done already is skipped, and a run that was stopped, at any moment, goes on from
its last checkpoint, if it has one, when the same command is given again.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import rows

import hsee_jax
from hsee_jax.flags import use_cache
from hsee_jax.folder import read_config

FOLDER = Path("runs/rows")


def perform(
    run: rows.Run,
    *,
    changes: dict[str, Any],
    folder: Path = FOLDER,
    results: Path = rows.RESULTS,
    seconds: float = float("inf"),
) -> str:
    """Trains one run, or goes on with it; returns how it ended, in a line.

    Args:
      run: which.
      changes: of the configuration, the machine's own.
      folder: of the runs.
      results: where the result goes.
      seconds: after which it stops, with a checkpoint.
    """
    config = rows.config_of(run, **changes)
    place = folder / f"{run.row}-{run.seed}"
    end = time.monotonic() + seconds
    try:
        summary = hsee_jax.train(
            config,
            place,
            **_start(config, place),  # type: ignore[arg-type]
            stop=lambda: time.monotonic() > end,
        )
    except hsee_jax.Stopped as stopped:
        return f"{stopped} ({config.run.rounds} rounds)"
    except hsee_jax.DivergenceError as error:
        return f"failed: {error}"
    summary["cpu_cores"] = len(os.sched_getaffinity(0))
    rows.save(run, config, summary, results)
    accuracies = [summary[f"mean_{name}_accuracy"] for name in ("exit", "server")]
    return f"exit {accuracies[0]:.4f}, server {accuracies[1]:.4f}"


def _start(config: hsee_jax.Config, place: Path) -> dict[str, bool]:
    """Whether to go on with the run in a folder, to replace it, or neither."""
    if not (place / "config.json").is_file():
        return {}
    same = rows.settings(read_config(place)) == rows.settings(config)
    return {"resume": True} if same else {"overwrite": True}


def _worker(run: rows.Run, core: int | None, options: dict[str, Any]) -> str:
    """`perform` in a process of its own, which keeps to one core if that is given."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    use_cache({})
    return perform(run, **options)


def in_processes(
    runs: Sequence[rows.Run], *, jobs: int, options: dict[str, Any]
) -> list[str]:
    """Performs runs, each in a new process, so many at once, each on its own core.

    Returns:
      The lines of those that failed.
    """
    waiting, failed = list(reversed(runs)), []
    context = multiprocessing.get_context("spawn")

    def lane(core: int | None) -> None:
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            while waiting:
                run = waiting.pop()
                end = pool.submit(_worker, run, core, options).result()
                print(f"{run.row} seed {run.seed}: {end}", flush=True)
                if end.startswith("failed"):
                    failed.append(end)

    cores: list[int | None] = [None]
    if jobs > 1:
        cores = sorted(os.sched_getaffinity(0))[:jobs]  # type: ignore[assignment]
    with ThreadPoolExecutor(len(cores)) as threads:
        list(threads.map(lane, cores))
    return failed


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> Any:
    """Adds the flags that all runners have, and reads them."""
    parser.add_argument("--data-dir", help="where the datasets are")
    parser.add_argument("--runs", type=Path, default=FOLDER, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs what is asked for and not done; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", help="SET or SET/ROW, see rows/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once, on a CPU, a core each"
    )
    given = parse(parser, words)
    cores = len(os.sched_getaffinity(0))
    if not 1 <= given.jobs <= cores:
        parser.error(f"--jobs: {given.jobs} is not allowed; allowed are 1..{cores}")
    try:
        chosen = rows.select(given.rows)
        everything = [rows.Run(row, seed) for seed in given.seeds for row in chosen]
        missing = [run for run in everything if rows.load(run, given.results) is None]
        print(f"{len(missing)} of {len(everything)} runs are to be done", flush=True)
        changes = {"data_dir": given.data_dir} if given.data_dir else {}
        options = {"changes": changes, "folder": given.runs, "results": given.results}
        failed = in_processes(missing, jobs=given.jobs, options=options)
    except hsee_jax.UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
