"""Compare two sweeps of one study, run by run.

Shows: for each row the mean accuracies of both, and the differences of the runs with
equal seeds. After a change of the code that should only change rounding, OLD is the
committed folder and NEW a sweep with the new code. How much rounding moves a run shows
a sweep of a copy of the study with another form of the convolution, such as
`conv = "patches"` in its table [options], against NEW. With --losses it shows instead
how far the training losses of each round are apart, of runs that both folders hold: a
copy of a study with few samples tells whether two codes compute the same steps.
Cost: a second.
Command: python experiments/compare.py experiments/cpu-small-fashion runs/new
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import script

from hsee_jax.report.tables import Table, markdown
from hsee_jax.runs.history import read_records
from hsee_jax.runs.records import RoundRecord, Scores
from hsee_jax.studies import Result, read_results
from hsee_jax.studies.results import FILE

FIGURES = {"exit": "mean_exit_accuracy", "server": "mean_server_accuracy"}


class Move(NamedTuple):
    """How a figure of a row moved, in points."""

    row: str
    figure: str  # a key of `FIGURES`
    old: float  # mean over the runs that both sweeps have
    new: float
    runs: tuple[float, ...]  # new minus old of each seed, ascending


def main() -> None:
    """Print a table of all rows, or of the losses of all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="a folder with results.jsonl")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--losses", action="store_true", help="compare losses")
    given = parser.parse_args()
    needed = "runs" if given.losses else FILE
    for folder in (given.old, given.new):
        if not (folder / needed).exists():
            parser.error(f"{folder} has no {needed}")
    if given.losses:
        table = loss_table(given.old, given.new)
        if not table.rows:
            parser.error(f"{given.old} and {given.new} have no run in common")
        print(markdown(table))
    else:
        old, new = read_results(given.old), read_results(given.new)
        found = moves(old, new)
        if not found:
            parser.error(f"{given.old} and {given.new} have no run in common")
        print(page(found))
        if names := changed(old, new):
            print(f"Some of these runs differ in their settings: {', '.join(names)}.")


def moves(old: list[Result], new: list[Result]) -> list[Move]:
    """Return the moves of the rows with runs of equal seeds, in the order of ``new``.

    Runs that diverged do not count.
    """
    before, after = _scores(old), _scores(new)
    pairs: dict[str, list[tuple[Scores, Scores]]] = {}
    for row, seed in sorted(before.keys() & after.keys()):
        pair = before[row, seed], after[row, seed]
        pairs.setdefault(row, []).append(pair)
    found = []
    for row in dict.fromkeys(result.row for result in new if result.row in pairs):
        sides = list(zip(*pairs[row], strict=True))
        for figure, field in FIGURES.items():
            one, two = ([100 * getattr(s, field) for s in side] for side in sides)
            runs = tuple(b - a for a, b in zip(one, two, strict=True))
            means = statistics.fmean(one), statistics.fmean(two)
            found.append(Move(row, figure, *means, runs))
    return found


def _scores(results: list[Result]) -> dict[tuple[str, int], Scores]:
    """Return the scores of the runs that ended, by row and seed."""
    return {
        (result.row, result.seed): result.summary.scores
        for result in results
        if result.summary is not None
    }


def changed(old: list[Result], new: list[Result]) -> list[str]:
    """Return the options that differ in runs of the same row and seed, sorted.

    An option that one of two runs does not hold does not count: it may be newer.
    """
    before = {(result.row, result.seed): result.settings for result in old}
    pairs = (
        (before[result.row, result.seed], result.settings)
        for result in new
        if (result.row, result.seed) in before
    )
    return sorted(
        {name for a, b in pairs for name in a.keys() & b.keys() if a[name] != b[name]}
    )


def page(found: list[Move]) -> str:
    """Return the table of moves, and how far runs and rows moved in all."""
    header = ("row", "figure", "old %", "new %", "difference", "of each seed")
    lines = [
        (
            f"`{move.row}`",
            move.figure,
            f"{move.old:.1f}",
            f"{move.new:.1f}",
            f"{move.new - move.old:+.1f}",
            " ".join(f"{run:+.1f}" for run in move.runs),
        )
        for move in found
    ]
    text = [markdown(Table("", header, lines)).rstrip(), ""]
    for figure in FIGURES:
        own = [move for move in found if move.figure == figure]
        runs = [run for move in own for run in move.runs]
        if runs:
            rms = statistics.fmean(run**2 for run in runs) ** 0.5
            text.append(
                f"{figure}: {len(runs)} runs moved by {statistics.fmean(runs):+.2f} "
                f"points on average, {rms:.2f} in root mean square, and at most by "
                f"{max(map(abs, runs)):.1f}."
            )
    return "\n".join(text)


def loss_table(old: Path, new: Path) -> Table:
    """Return the table of `apart` for the runs that both folders hold."""
    lines = []
    for folder in sorted((new / "runs").iterdir()):
        before = old / "runs" / folder.name
        if before.is_dir():
            rounds = " ".join(f"{largest:.1e}" for largest in apart(before, folder))
            lines.append((f"`{folder.name}`", rounds))
    return Table("", ("run", "largest relative difference of each round"), lines)


def apart(old: Path, new: Path) -> list[float]:
    """Return the largest relative difference of a training loss in each round.

    Args:
      old: the folder of a run.
      new: of another; further rounds of one do not count.
    """
    return [
        max(map(_difference, _losses(before), _losses(after)))
        for before, after in zip(read_records(old), read_records(new), strict=False)
    ]


def _losses(record: RoundRecord) -> tuple[float, float]:
    """Return the losses of the exits and the servers; NaN for those not in the run."""
    return record.train.exit_loss, record.train.server_loss


def _difference(old: float, new: float) -> float:
    """Return the relative difference; infinite if one loss alone is a finite number."""
    if math.isfinite(old) and math.isfinite(new):
        return abs(new - old) / abs(old)
    return math.inf if math.isfinite(old) or math.isfinite(new) else 0.0


if __name__ == "__main__":
    script.run(main)
