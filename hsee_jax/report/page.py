"""The page of a report, with figures and tables, as HTML and as Markdown."""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import text_of
from hsee_jax.report.curves import BRANCHES, Curve, Run, Values, spread
from hsee_jax.report.figures import Picture, draw
from hsee_jax.report.tables import Table, markdown
from hsee_jax.runs.records import images_per_second

_ACCURACIES = tuple(f"{branch} accuracy" for branch in BRANCHES)


def results(curves: Sequence[Curve]) -> Table:
    """Make a table with the length, final accuracy and speed of each curve."""
    header = ("curve", "seeds", "rounds", *_ACCURACIES, "images/s", "seconds")
    rows = []
    for curve in curves:
        speeds = [images_per_second(run.records) for run in curve.runs]
        seconds = [sum(r.wall_seconds for r in run.records) for run in curve.runs]
        rows.append(
            (
                curve.label,
                ", ".join(map(_seeds, curve.runs)),
                str(curve.rounds[-1]),
                *_accuracies(curve.final.mean(axis=-1)),
                _number(speeds, 1),
                _number(seconds, 1),
            )
        )
    title = "Results: mean over clients; mean ± standard deviation over seeds"
    return Table(title, header, rows)


def by_cut(curves: Sequence[Curve]) -> Table:
    """Make a table of the final accuracy, with a row for each cut of each curve."""
    rows = []
    for curve in curves:
        for cut, count in zip(*np.unique(curve.cuts, return_counts=True), strict=True):
            final = curve.final[:, :, curve.cuts == cut].mean(axis=-1)
            rows.append((curve.label, str(cut), str(count), *_accuracies(final)))
    title = "Results by cut: mean over clients; mean ± standard deviation over seeds"
    return Table(title, ("curve", "cut", "clients", *_ACCURACIES), rows)


def over_rounds(curves: Sequence[Curve]) -> Table:
    """Make a table with a row for each round that all runs of a curve evaluated."""
    rows = [
        (curve.label, str(number), *_accuracies(curve.accuracy[:, r].mean(axis=-1)))
        for curve in curves
        for r, number in enumerate(curve.rounds)
    ]
    title = "Results by round: mean over clients; mean ± standard deviation over seeds"
    return Table(title, ("curve", "round", *_ACCURACIES), rows)


def _accuracies(final: Values) -> Iterator[str]:
    """Yield the text for exits and for servers, from accuracies ``[S, 2]``."""
    return (_number(values, 4) for values in final.T)


def _number(values: Sequence[float] | Values, digits: int) -> str:
    mean, deviation = spread(np.array(values))
    text = f"{mean:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {deviation:.{digits}f}"


def _seeds(run: Run) -> str:
    """Return the three seeds as text, or one number if they are equal."""
    seeds = [str(seed) for seed in run.seeds]
    return seeds[0] if len(set(seeds)) == 1 else "/".join(seeds)


def _runs(curves: Sequence[Curve]) -> Table:
    rows = [
        (run.name, curve.label, _seeds(run), run.machine or "no summary yet")
        for curve in curves
        for run in curve.runs
    ]
    return Table("Runs", ("run", "curve", "seeds", "made with"), rows)


def _options(curves: Sequence[Curve]) -> Table:
    names = dict.fromkeys(name for curve in curves for name in curve.options)
    rows = []
    for name in names:
        values = (curve.options[name] for curve in curves if name in curve.options)
        rows.append((name, "; ".join(dict.fromkeys(map(text_of, values)))))
    title = "Options; several values where the curves differ"
    return Table(title, ("option", "value"), rows)


def write_report(curves: Sequence[Curve], out: Path) -> Path:
    """Write the figures as PNGs, ``report.md``, and ``report.html`` with all of them.

    Args:
      curves: see `read_curves`.
      out: the folder for the files; `write_report` makes it if it is missing.

    Returns:
      The path of the HTML page, which needs no other file.

    Raises:
      UserError: the folder cannot be written to.
    """
    pictures = draw(curves)
    tables = (results(curves), by_cut(curves))
    page = "\n".join(
        [
            *map(_html_table, tables),
            *map(_html_picture, pictures),
            _html_table(_runs(curves)),
            _html_table(_options(curves)),
        ]
    )
    text = "\n".join(
        [
            f"## {table.title}\n\n{markdown(table)}"
            for table in (*tables, over_rounds(curves))
        ]
        + [f"![{picture.title}]({picture.name})\n" for picture in pictures]
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (out / picture.name).write_bytes(picture.png)
        (out / "report.md").write_text(text, encoding="utf-8")
        (out / "report.html").write_text(
            _PAGE.replace("CONTENT", page), encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"out: {out} cannot be written to: {error.strerror}") from error
    return out / "report.html"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    title = html.escape(picture.title)
    return f'<img alt="{title}" src="data:image/png;base64,{data}">'


def _html_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    rows = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<table>\n"
        f"<tr>{line(table.header, 'th')}</tr>\n{rows}\n</table>"
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hsee report</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
  padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; }
h2 { font-size: 1.1em; margin-top: 2em; }
img { display: block; width: 100%; margin: 2em 0; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: 0.25em 0.8em; text-align: left; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
td { font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>Report of hsee_jax runs</h1>
CONTENT
</body>
</html>
"""
