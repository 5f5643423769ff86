"""Write docs/results/findings.md, what the study cifar10-w16 shows, and its picture.

Shows: figures of the study, all read from its results.jsonl, answers.jsonl (see
`answers.py`) and clock.json (see `clock.py`), and from the study why-averaging. The
words come from cifar10-w16/findings.md.
Cost: a second.
Command: python experiments/findings.py
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import answers
import clock
import numpy as np
import script
import tables

from hsee_jax import studies
from hsee_jax.report.tables import Table, markdown
from hsee_jax.studies.picture import draw
from hsee_jax.studies.results import Result, read_results, result_of

NAME, RECIPE, WHY = "cifar10-w16", "cifar10-w16-recipe", "why-averaging"
DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "results" / "findings.md"
PICTURE = DOCS / "images" / f"{NAME}.png"
TEXT = Path(__file__).parent / NAME / "findings.md"  # the words, with {row.figure}


class Row(NamedTuple):
    """The figures of a row: accuracies in percent, means over clients and seeds."""

    exit: float
    server: float
    gb: float  # that the clients send
    hours: float  # simulated
    mj: float  # megajoules, simulated
    exits: Mapping[int, float]  # by cut, as ``exit``
    servers: Mapping[int, float]


def rows() -> tables.Rows[Row]:
    """Return the rows that have results, by name."""
    study, results = tables.load(NAME)
    times = json.loads((tables.HERE / NAME / clock.FILE).read_text("utf-8"))
    found = studies.by_row(study, results)
    return tables.Rows({name: _row(own, times[name]) for name, own in found.items()})


def _row(results: tuple[Result, ...], time: Mapping[str, float]) -> Row:
    summaries = [result.summary for result in results if result.summary]
    clients = [client for one in summaries for client in one.scores.clients]
    cuts = sorted({client.cut for client in clients})

    def by_cut(figure: str) -> dict[int, float]:
        return {
            cut: 100
            * float(np.mean([getattr(c, figure) for c in clients if c.cut == cut]))
            for cut in cuts
        }

    return Row(
        exit=100 * float(np.mean([s.scores.mean_exit_accuracy for s in summaries])),
        server=100 * float(np.mean([s.scores.mean_server_accuracy for s in summaries])),
        gb=float(np.mean([one.link.up_bytes for one in summaries])) / 1e9,
        hours=time["seconds"] / 3600,
        mj=time["joules"] / 1e6,
        exits=by_cut("exit_accuracy"),
        servers=by_cut("server_accuracy"),
    )


def costs_table(found: Mapping[str, Row]) -> str:
    """Return a table of the accuracies and costs of all rows."""
    header = ("row", "exit %", "server %", "GB up", "simulated hours", "MJ")
    lines = [
        (
            f"`{name}`",
            *(f"{value:.1f}" for value in (row.exit, row.server, row.gb)),
            *(f"{value:.2f}" for value in (row.hours, row.mj)),
        )
        for name, row in found.items()
    ]
    return markdown(Table("", header, lines)).rstrip()


def cuts_table() -> str:
    """Return a table of accuracies by cut with intervals, and of gated accuracies."""
    measured = answers.read(tables.HERE / NAME / answers.FILE)
    known = {one["row"]: one["cuts"] for one in measured if one["seed"] == 0}
    study, _ = tables.load(NAME)
    header = ("row", "cut", "exit %", "server %", "30 % on the device", "60 %")
    lines = [
        (
            f"`{row.name}`",
            cut,
            _interval(own["exit"]),
            _interval(own["server"]),
            *(
                f"{100 * gated['accuracy']:.1f} ({100 * gated['on_device']:.1f} %)"
                for gated in own["gated"].values()
            ),
        )
        for row in study.rows
        for cut, own in known.get(row.name, {}).items()
    ]
    return markdown(Table("", header, lines)).rstrip()


def why_table() -> str:
    """Return a table of what could help averaging, with held-out accuracies."""
    study, results = tables.load(WHY)
    found, lines = studies.by_row(study, results), []
    for row in study.rows:
        for result in found.get(row.name, ()):
            assert result.summary is not None
            server = 100 * result.summary.scores.mean_server_accuracy
            lines.append((f"`{row.name}`", row.shows, f"{server:.1f}"))
    header = ("row", "what it is", "server %, held-out images")
    return markdown(Table("", header, lines)).rstrip()


def again_table() -> str:
    """Return a table of the rows whose seed 0 was trained twice, with both figures."""
    header = ("row", "trained on", "CPU cores", "exit %", "server %")
    lines = []
    for result in (*_twice(NAME), *_twice(RECIPE)):
        assert result.summary is not None
        scores = result.summary.scores
        figures = scores.mean_exit_accuracy, scores.mean_server_accuracy
        where = str(result.summary.device), str(result.cpu_cores)
        cells = (f"{100 * figure:.1f}" for figure in figures)
        lines.append((f"`{result.row}`", *where, *cells))
    return markdown(Table("", header, lines)).rstrip()


def _twice(name: str) -> Iterator[Result]:
    """Yield both results of each row of a study that was trained twice."""
    study, results = tables.load(name)
    found = (result_of(run, results) for run in studies.runs(study) if run.seed == 0)
    first = tables.Rows({result.row: result for result in found if result})
    for second in read_results(tables.HERE / name / "again"):
        yield from (first[second.row], second)


def _interval(figures: Mapping[str, float]) -> str:
    mean, low, high = (100 * figures[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def page() -> str:
    """Return the page."""
    found = rows()
    shown: dict[str, Any] = {n.replace("-", "_"): row for n, row in found.items()}
    shown |= {"costs": costs_table(found), "cuts": cuts_table(), "why": why_table()}
    shown |= {"again": again_table()} | _differences(found)
    return TEXT.read_text(encoding="utf-8").format_map(tables.Rows(shown))


def _differences(found: Mapping[str, Row]) -> dict[str, float]:
    """Return the differences that the text names, in points and GB."""
    mixed, clients = found["sequential-mixed"], found["sequential-clients-mixed"]
    averaging = found["averaging-mixed"]
    return {
        "gain_clients": clients.server - mixed.server,
        "loss_clients": mixed.exit - clients.exit,
        "price_clients": clients.gb - mixed.gb,
        "mix_sequential": found["sequential-equal"].server - mixed.server,
        "mix_averaging": found["averaging-equal"].server - averaging.server,
        "lead7": mixed.servers[7] - mixed.exits[7],
        "shared": mixed.server - averaging.server,
    }


def main() -> None:
    """Write the page and the picture."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    PICTURE.write_bytes(draw(*tables.load(NAME)))


if __name__ == "__main__":
    script.run(main)
