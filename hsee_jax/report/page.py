"""The tables of a report, and its page with them and the pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hsee_jax.core.files import replace_file, writing
from hsee_jax.core.options import text_of
from hsee_jax.report import html
from hsee_jax.report.answers import further_answers
from hsee_jax.report.curves import BRANCHES, Curve, Run, Values, mean_text
from hsee_jax.report.figures import Pictures, draw
from hsee_jax.report.tables import EQUAL_SERVERS, Table, markdown
from hsee_jax.report.targets import TARGETS, targets
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
                mean_text(speeds, 1),
                mean_text(seconds, 1),
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
    return (mean_text(values, 4) for values in final.T)


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
    page = html.page("Report of hsee_jax runs", tuple(_sections(curves, pictures)))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures.all:
            replace_file(out / picture.name, picture.png)
        replace_file(out / "report.md", _markdown(curves, pictures))
        replace_file(out / "report.html", page)
    return out / "report.html"


def _sections(curves: Sequence[Curve], pictures: Pictures) -> Iterator[html.Section]:
    tables = (results(curves), by_cut(curves), *further_answers(curves))
    yield html.Section("Results", (*tables, *_notes(curves)))
    if reached := targets(curves):
        yield html.Section("Time to accuracy", (TARGETS, *reached))
    yield html.Section("All runs" if len(curves) > 1 else "Training", pictures.overview)
    for curve, own in zip(curves, pictures.curves, strict=True):
        yield html.Section(curve.label, (*own, *_absences(curve)))
    yield html.Section("Training data", pictures.splits)
    yield html.Section("Runs and options", (_runs(curves), _options(curves)))


def _notes(curves: Sequence[Curve]) -> Iterator[str]:
    """Yield a paragraph for each curve in which all servers score the same."""
    for curve in curves:
        if curve.one_network:
            yield f"{curve.label}: {EQUAL_SERVERS}"


def _absences(curve: Curve) -> Iterator[str]:
    """Yield a paragraph if pictures are left out."""
    if curve.agreement is None:
        names = ", ".join(run.name for run in curve.runs if not len(run.agreement))
        yield (
            "There is no picture of exit against server, nor of the classes: the right "
            f"answers by class are not in the summary of {names}. A run of version 0.1 "
            "or a run that has not ended does not have them."
        )


def _markdown(curves: Sequence[Curve], pictures: Pictures) -> str:
    tables = (results(curves), by_cut(curves), *further_answers(curves))
    tables += (*targets(curves), over_rounds(curves))
    parts = [f"## {table.title}\n\n{markdown(table)}" for table in tables]
    parts += [f"{note}\n" for note in _notes(curves)]
    parts += [f"![{p.title}]({p.name})\n\n{p.text}\n" for p in pictures.all]
    return "\n".join(parts)
