"""The command ``hsee sweep``."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hsee_jax import studies
from hsee_jax.cli.arguments import parser_of
from hsee_jax.cli.flags import Parser, add_cache, use_cache
from hsee_jax.cli.signals import StopSignals
from hsee_jax.cli.terminal import show, show_log, text_table
from hsee_jax.config import override
from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Option, at_least
from hsee_jax.core.paths import expand_home, resolve
from hsee_jax.parallel.processes import check_devices
from hsee_jax.studies.load import check_rows


def sweep(words: Sequence[str]) -> int:
    """Train the runs of a study that are not finished, and return the exit status.

    The status is 2 if a run was refused, 1 if a run failed, and 128 + the number of a
    signal that stopped the sweep.
    """
    given = _parser().parse(words)
    limit = _limit(given.seconds)
    for name, default in (("overwrite", False), ("jobs", 1), ("seconds", None)):
        if given.list and getattr(given, name) != default:
            raise UserError(f"{name}: is not allowed together with --list")
    study = studies.load(given.study)
    if given.data_dir is not None:
        study = _moved(study, given.data_dir)
        check_rows(f"{given.study} with --data-dir", study.rows)
    folder = given.study.stem
    if folder == "study":
        folder = resolve(given.study).parent.name
    out = given.out or Path("runs") / folder
    runs = studies.runs(study, rows=given.rows, seeds=given.seeds)
    digests = studies.Digests()
    todo = studies.unfinished(runs, out, digests)
    if given.list:
        for run in runs:
            print(f"{run}: {'to do' if run in todo else 'done'}")
    print(f"{len(todo)} of {len(runs)} runs are to be done", flush=True)
    if given.list:
        return 0
    status = _train(runs, out, given, limit, digests)
    results = studies.read_results(out)
    left = len(studies.unfinished(runs, out, digests))
    if left:
        line = (
            f"hsee: {left} of {len(runs)} runs are not done; the same command goes on"
        )
        print(line, file=sys.stderr)
    if results and status < 128:
        table = studies.table(study, results)
        show(text_table(table.title, table.header, table.rows))
        print(*studies.write(study, results, out), sep="\n")
    return status


def _limit(seconds: float | None) -> float:
    """Return the seconds after which the sweep stops; infinite without a limit."""
    if seconds is None:
        return math.inf
    return Option("seconds", float, None, rules=(at_least(0),)).checked(seconds)


def _moved(study: studies.Study, folder: Path) -> studies.Study:
    """Return the study with the data of all rows in a folder."""
    place = str(resolve(expand_home(folder, "data_dir")))
    rows = (
        replace(row, config=override(row.config, data_dir=place)) for row in study.rows
    )
    return replace(study, rows=tuple(rows))


def _train(
    runs: Sequence[studies.Run],
    out: Path,
    given: argparse.Namespace,
    limit: float,
    digests: studies.Digests,
) -> int:
    """Train, and return the exit status."""
    end = time.monotonic() + limit
    chosen = {k: v for k, v in vars(given).items() if k == "compilation_cache"}
    with StopSignals() as signals:
        ends = studies.perform(
            runs,
            out,
            jobs=given.jobs,
            overwrite=given.overwrite,
            stop=lambda: signals() or time.monotonic() > end,
            setup=partial(_set_up, chosen),
            on_end=_tell,
            digests=digests,
        )
    if signals.received:
        return 128 + signals.received
    kinds = {end.how for end in ends}
    return 2 if "refused" in kinds else int("failed" in kinds)


def _set_up(given: dict[str, Any]) -> None:
    """Prepare the process of a run; refuse devices that this machine does not have."""
    use_cache(given)
    check_devices()
    show_log()


def _tell(end: studies.End) -> None:
    """Print how a run ended."""
    if end.how in ("refused", "failed"):
        print(f"hsee: {end.run}: {end.text}", file=sys.stderr, flush=True)
        return
    text = f"{end.how}: {end.text}" if end.how == "diverged" else end.text
    if end.result is not None and end.result.summary is not None:
        summary = end.result.summary
        text = (
            f"exit {summary.scores.mean_exit_accuracy:.4f}, "
            f"server {summary.scores.mean_server_accuracy:.4f}, "
            f"{summary.wall_seconds:.0f} s"
        )
    print(f"{end.run}: {text}", flush=True)


def _parser() -> Parser:
    parser = parser_of("sweep")
    parser.add_argument("study", type=Path, help="the study's file, such as study.toml")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the study, with its runs, results.jsonl, results.md and "
        "results.png (runs/NAME, where NAME is the name of the file, or of its folder "
        "if the file is study.toml)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="INT",
        help="runs to train at once, each in a process with its share of the cores; "
        "leave it at 1 on a GPU or TPU",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=(),
        metavar="ROW",
        help="train only these rows; the name of a table [rows.NAME] means all points "
        "of the grid",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        default=(),
        type=int,
        metavar="INT",
        help="train with these seeds instead of the seeds of the study",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="folder with the datasets"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="FLOAT",
        help="stop after this time, with checkpoints; the same command goes on",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace runs in --out whose settings or data have changed since",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the runs, and train none"
    )
    add_cache(parser)
    return parser
