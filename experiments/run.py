"""Run rows of the results tables.

Shows: what the rows say, see `rows/`; their results go to `results/`, and
`python experiments/tables.py` makes tables from them.
Cost: each row and set names its own.
Command: python experiments/run.py SET|SET/ROW ... [--seeds 0 1 2] [--data-dir FOLDER]

Finished runs are skipped. SIGTERM and Ctrl-C stop the current runs after their step,
with a checkpoint; a run that was stopped or killed at any moment continues from its
last checkpoint, if it has one, when the same command is given again.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import rows

import hsee_jax
from hsee_jax.cli.flags import use_cache
from hsee_jax.cli.signals import StopSignals
from hsee_jax.cli.terminal import show_log
from hsee_jax.config import BOOKKEEPING, flatten
from hsee_jax.runs.folder import read_config

FOLDER = Path("runs/rows")


def perform(
    run: rows.Run,
    *,
    changes: dict[str, Any],
    folder: Path = FOLDER,
    results: Path = rows.RESULTS,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train or continue one run, and return a line that says how it ended.

    A divergence is a result too.

    Args:
      run: the run.
      changes: changes of the configuration for this machine.
      folder: the folder of all runs.
      results: the folder for the result.
      stop: see `hsee_jax.train`.
    """
    config = rows.config_of(run, **changes)
    place = folder / f"{run.row}-{run.seed}"
    try:
        summary = hsee_jax.train(config, place, **_start(config, place), stop=stop)
        scores = summary.scores
        end = (
            f"exit {scores.mean_exit_accuracy:.4f}, "
            f"server {scores.mean_server_accuracy:.4f}"
        )
        result = summary.to_json()
    except hsee_jax.Stopped as stopped:
        return f"{stopped} ({config.run.rounds} rounds)"
    except hsee_jax.DivergenceError as error:
        result, end = {"diverged": str(error)}, f"diverged: {error}"
    result["cpu_cores"] = len(os.sched_getaffinity(0))
    rows.save(run, config, result, results)
    return end


def _start(config: hsee_jax.Config, place: Path) -> dict[str, Any]:
    """Return whether to continue the run in a folder, to replace it, or neither."""
    if not (place / "config.json").is_file():
        return {}
    ours, theirs = flatten(config), flatten(read_config(place))
    names = (ours.keys() | theirs.keys()) - {*BOOKKEEPING}
    same = all(ours.get(name) == theirs.get(name) for name in names)
    return {"resume" if same else "overwrite": True}


def _worker(
    run: rows.Run, core: int | None, stop: Callable[[], bool], options: dict[str, Any]
) -> None:
    """Call `perform` in its own process, on one core if a core is given."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they come through ``stop``
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if core is not None:
        os.sched_setaffinity(0, {core})
    use_cache({})
    show_log()
    try:
        end = perform(run, stop=stop, **options)
    except hsee_jax.UserError as error:
        print(f"run.py: {run.row} seed {run.seed}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{run.row} seed {run.seed}: {end}", flush=True)


def _end_with_parent() -> None:
    """End this process with its parent, so that no run keeps its folder locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def in_processes(
    runs: Sequence[rows.Run], *, jobs: int, options: dict[str, Any]
) -> int:
    """Perform runs in new processes, several at once, each on its own core.

    SIGTERM and Ctrl-C stop the current runs with a checkpoint; a second signal stops
    them at once.

    Returns:
      The exit status: 1 if a run failed; 2 if a run was refused, after which no other
      run starts; 128 + the number of a signal.
    """
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    cores: list[int | None] = [None]
    if jobs > 1:
        cores = [*sorted(os.sched_getaffinity(0))[:jobs]]
    waiting, at_work = list(runs), dict[Any, tuple[BaseProcess, Any]]()
    statuses: set[int | None] = {0}
    with StopSignals() as signals:
        try:
            while at_work or (waiting and not signals.received):
                while waiting and cores and not signals.received:
                    run, core = waiting.pop(0), cores.pop()
                    process: BaseProcess = context.Process(
                        target=_worker,
                        args=(run, core, told.poll, options),
                        name=f"{run.row} seed {run.seed}",
                    )
                    process.start()
                    at_work[process.sentinel] = process, core
                for sentinel in wait(at_work, timeout=0.1):
                    process, core = at_work.pop(sentinel)
                    process.join()
                    if process.exitcode not in (0, 2):  # 2 has said why
                        print(f"{process.name}: failed with status {process.exitcode}")
                    statuses.add(process.exitcode)
                    cores.append(core)
                if 2 in statuses:
                    waiting.clear()
                if signals.received:
                    tell.close()  # all see the end of the pipe
        finally:
            for process, _ in at_work.values():
                process.kill()
    if signals.received:
        return 128 + signals.received
    return 2 if 2 in statuses else int(statuses != {0})


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> Any:
    """Add the flags that all runners have, and parse the words."""
    parser.add_argument("--data-dir", help="folder with the datasets")
    parser.add_argument("--runs", type=Path, default=FOLDER, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the requested rows that are not done, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", help="SET or SET/ROW, see rows/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=1, help="parallel runs; on a CPU each gets a core"
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
        return in_processes(missing, jobs=given.jobs, options=options)
    except hsee_jax.UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
