"""Write the tables of results: docs/results/accuracy.md, and six rows of README.md.

Shows: mean and standard deviation over seeds of each row, from the results.jsonl of
each study in this folder; no figure is typed by hand.
Cost: a few seconds.
Command: python experiments/tables.py
"""

import argparse
from pathlib import Path
from typing import TypeVar

import script

from hsee_jax import studies
from hsee_jax.core.errors import UserError
from hsee_jax.report.tables import Table, markdown

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results" / "accuracy.md"
README = HERE.parent / "README.md"
ORDER = (
    "demo",
    "cpu-small-fashion",
    "cpu-small-cifar10",
    "cifar10-w16",
    "cifar10-w16-recipe",
    "why-averaging",
    "cpu-small-methods",
    "demo-methods",
    "cifar10",
    "cifar100",
    "stl10",
)
SHARED = "cpu-small-fashion"  # has the rows of rows.toml
HEADLINE = "cifar10-w16"
HEADLINE_ROWS = (
    "centralized",
    "splitfed_v2",
    "sequential-clients-mixed",
    "sequential-mixed",
    "averaging-mixed",
    "local-mixed",
)
# Training images of the studies that are scored on the 3,000 behind them.
HELD_OUT = {"cifar10-w16-recipe": 30_000, "why-averaging": 12_000}
INTRODUCTION = """\
<!-- `python experiments/tables.py` writes this page; do not edit it. -->
# Accuracy

The accuracy of a run is the mean over its clients, on the test images. A figure is the
mean ± standard deviation over seeds. Studies that choose a setting measure on held-out
training images instead, and say so. Read [the protocol](protocol.md) before you compare
rows: it says what was chosen by looking at the test images.

Images/s and seconds were taken while the machine did other work; for speed see
[performance](performance.md).
"""

T = TypeVar("T")


class Rows(dict[str, T]):
    """What a page shows of each row; a row without results is an error of the user."""

    def __missing__(self, name: str) -> T:
        """Refuse a row without results: `UserError`."""
        raise UserError(f"{name}: has no results; `hsee sweep --rows` trains a row")


def load(name: str) -> tuple[studies.Study, list[studies.Result]]:
    """Read a study of this folder and its results."""
    folder = HERE / name
    return studies.load(folder / "study.toml"), studies.read_results(folder)


def accuracy() -> str:
    """Return the page of all studies."""
    found = {name: load(name) for name in ORDER}
    shared = found[SHARED][0]
    known = {row.name for row in shared.rows}
    parts = [INTRODUCTION.rstrip(), "## The rows", studies.row_list(shared)]
    for name, (study, results) in found.items():
        if results:
            parts += [f"## {study.title}", studies.page(study, results)]
            parts += [studies.row_list(study, known), _command(name)]
    missing = {name: study for name, (study, results) in found.items() if not results}
    if missing:
        parts.append("## Not run")
        parts.append("No machine has run these studies yet:")
        parts.append(_missing(missing))
    return "\n\n".join(filter(None, parts)) + "\n"


def _command(name: str) -> str:
    """Return what trains the runs of a study, with the samples held out before."""
    sweep = f"hsee sweep experiments/{name}/study.toml --out experiments/{name}"
    if name not in HELD_OUT:
        return f"Command: `{sweep}`"
    hold_out = f"hold_out.py cifar10 --train {HELD_OUT[name]} --held-out 3000"
    return (
        f"Commands: `python experiments/{hold_out} --out OUT`, then "
        f"`{sweep} --data-dir OUT`"
    )


def _missing(found: dict[str, studies.Study]) -> str:
    rows = [
        (study.title, study.shows, str(len(study.rows)), f"`experiments/{name}`")
        for name, study in found.items()
    ]
    return markdown(Table("", ("study", "what it is", "rows", "folder"), rows)).rstrip()


def headline() -> str:
    """Return the table of README.md: six rows that say most."""
    study, results = load(HEADLINE)
    shows = {row.name: row.shows for row in study.rows}
    found = studies.by_row(study, results)
    rows = []
    for name in HEADLINE_ROWS:
        scores = [r.summary.scores for r in found.get(name, ()) if r.summary]
        exits = studies.mean_text([one.mean_exit_accuracy for one in scores], 3)
        servers = studies.mean_text([one.mean_server_accuracy for one in scores], 3)
        rows.append((f"`{name}`", shows[name], exits, servers))
    header = ("row", "what it is", "exit accuracy", "server accuracy")
    return markdown(Table("", header, rows)).rstrip()


def insert(page: str, text: str, name: str) -> str:
    """Return a page with a text between the markers of a name, if it has them."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        return page
    return f"{before}{first}\n{text}\n{last}{after}"


def main() -> None:
    """Write the page, and the table of README.md."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(accuracy(), encoding="utf-8")
    page = insert(README.read_text(encoding="utf-8"), headline(), "headline")
    README.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    script.run(main)
