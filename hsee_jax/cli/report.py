"""The command ``hsee report``."""

from collections.abc import Sequence
from pathlib import Path

from hsee_jax.cli.arguments import parser_of
from hsee_jax.report import page
from hsee_jax.report.curves import read_curves
from hsee_jax.report.events import write_events
from hsee_jax.report.tables import markdown
from hsee_jax.runs.folder import check_writable


def report(words: Sequence[str]) -> None:
    """Write the page of some runs, and print its table and its path."""
    parser = parser_of("report")
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder; runs that differ only in their seeds become one curve",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write, with the page, the pictures and the Markdown "
        "(RUN/report for one run, report for several)",
    )
    parser.add_argument(
        "--tensorboard",
        type=Path,
        metavar="FOLDER",
        help="also write the figures of each round to this new or empty folder, for "
        "TensorBoard",
    )
    given = parser.parse(words)
    curves = read_curves(given.runs)
    alone = len(given.runs) == 1
    out = given.out or (given.runs[0] / "report" if alone else Path("report"))
    check_writable(out)
    if given.tensorboard is not None:
        write_events(curves, given.tensorboard)
    path = page.write_report(curves, out)
    print(markdown(page.results(curves)))
    print(path)
