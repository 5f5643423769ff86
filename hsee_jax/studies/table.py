"""The results of a study as a table, as a page, and as files."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from hsee_jax.core.files import replace_file
from hsee_jax.report.curves import mean_text
from hsee_jax.report.tables import Table, markdown
from hsee_jax.studies.results import Result, by_row
from hsee_jax.studies.study import Study

_HEADER = ("row", "seeds", "exit accuracy", "server accuracy", "images/s", "seconds")


def table(study: Study, results: Sequence[Result]) -> Table:
    """Make a table of the rows with results: mean ± standard deviation over seeds.

    Accuracies are means over the clients of a run. The deviation is the sample
    standard deviation (n - 1); with one seed there is none.

    Args:
      study: the study; results with other settings are left out.
      results: the results, see `read_results`.
    """
    rows = []
    for name, own in by_row(study, results).items():
        summaries = [result.summary for result in own if result.summary is not None]
        scores = [summary.scores for summary in summaries]
        rows.append(
            (
                name,
                " ".join(map(_seed, own)),
                mean_text([one.mean_exit_accuracy for one in scores], 3),
                mean_text([one.mean_server_accuracy for one in scores], 3),
                mean_text([one.images_per_second for one in summaries], 0),
                mean_text([one.wall_seconds for one in summaries], 0),
            )
        )
    return Table(study.title, _HEADER, rows)


def _seed(result: Result) -> str:
    return f"{result.seed} (diverged)" if result.diverged else str(result.seed)


def page(study: Study, results: Sequence[Result]) -> str:
    """Return Markdown: what the study shows and costs, its table, and its machines."""
    done = by_row(study, results)
    missing = [row.name for row in study.rows if row.name not in done]
    unseen = set(study.seeds) - {one.seed for own in done.values() for one in own}
    parts = [study.shows, study.cost and f"Cost: {study.cost}"]
    if done:
        parts.append(markdown(table(study, results)).rstrip())
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    if done and unseen:
        parts.append(f"Seeds not run: {' '.join(map(str, sorted(unseen)))}.")
    return "\n\n".join(filter(None, [*parts, _machines(done)]))


def _machines(done: Mapping[str, Sequence[Result]]) -> str:
    """Name the machine of most rows, and the others with their rows."""
    rows: dict[str, dict[str, None]] = {}  # of each machine, in the order of the rows
    for row, own in done.items():
        for result in own:
            rows.setdefault(machine(result), {})[row] = None
    rows.pop("", None)
    first, *others = sorted(rows, key=lambda one: -len(rows[one])) or [""]
    lines = [f"- {', '.join(rows[one])}: on {one}." for one in others]
    if not lines:
        return first and f"Run on {first}."
    return "\n".join([f"Run on {first}, except:\n", *lines])


def row_list(study: Study, known: Container[str] = ()) -> str:
    """Return a Markdown table of what each row shows; empty if no row says it.

    Args:
      study: the study; the rows of a grid that differ only by it share a line.
      known: rows to leave out, which another table explains.
    """
    shows = {row.name.partition(",")[0]: row.shows for row in study.rows if row.shows}
    rows = [(name, text) for name, text in shows.items() if name not in known]
    return markdown(Table("", ("row", "what it is"), rows)).rstrip() if rows else ""


def machine(result: Result) -> str:
    """Return hardware and versions behind a result; empty if the run diverged."""
    if result.summary is None:
        return ""
    own = result.summary.versions
    versions = ", ".join(f"{n} {own[n]}" for n in ("python", "jax", "flax") if n in own)
    return f"{result.summary.device} with {result.cpu_cores} core(s); {versions}"


def write(study: Study, results: Sequence[Result], folder: Path) -> tuple[Path, ...]:
    """Write ``results.md`` and ``results.png`` into the folder of a study.

    Returns:
      The files.

    Raises:
      UserError: the folder cannot be written to.
    """
    from hsee_jax.studies.picture import draw

    text, picture = folder / "results.md", folder / "results.png"
    title = " ".join(study.title.split())  # a heading is one line
    parts = (f"# {title}", row_list(study), page(study, results))
    replace_file(text, "\n\n".join(filter(None, parts)) + "\n")
    png = draw(study, results)
    if not png:
        return (text,)
    replace_file(picture, png)
    return text, picture
