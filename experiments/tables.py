"""Make the tables of results from the JSON of finished runs.

Shows: mean and standard deviation over seeds of each row; nothing is typed by hand, and
a row that has not been run says so. The small sets go into README.md, the others into
RESULTS.md.
Cost: a second.
Command: python experiments/tables.py
"""

import argparse
import statistics
from pathlib import Path

import rows
from performance import README, insert

RESULTS_PAGE = Path(__file__).parent / "RESULTS.md"
IN_README = ("demo", "cpu-small-cifar10", "cpu-small-fashion")
SEEDS = (0, 1, 2)
COLUMNS = ("row", "seeds", "exit accuracy", "server accuracy", "images/s", "seconds")
FIGURES = {  # of the last four, and the digits that are shown
    "mean_exit_accuracy": 3,
    "mean_server_accuracy": 3,
    "images_per_second": 0,
    "wall_seconds": 0,
}


def _seed(seed: int, result: rows.Result) -> str:
    return f"{seed} (diverged)" if "diverged" in result else str(seed)


def spread(values: list[float], digits: int) -> str:
    """Return the mean and, for several values, the standard deviation (n - 1)."""
    if not values:
        return "none"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def set_table(study: str, folder: Path = rows.RESULTS) -> str:
    """Return a Markdown line for each row of a set, and the machines of the results."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    machines = []
    for row in rows.rows(study):
        runs = [rows.Run(row, seed) for seed in SEEDS]
        found = {run.seed: result for run in runs if (result := rows.load(run, folder))}
        name = row.partition("/")[2]
        if not found:
            lines.append(f"| {name} |" + " not run |" * (len(COLUMNS) - 1))
            continue
        results = [result for result in found.values() if "diverged" not in result]
        cells = [name, " ".join(map(_seed, found, found.values()))]
        for figure, digits in FIGURES.items():
            cells.append(spread([result[figure] for result in results], digits))
        lines.append(f"| {' | '.join(cells)} |")
        machines += [machine(result) for result in results]
    known = dict.fromkeys(machines)
    return "\n".join([*lines, *(f"\nRun on {m}." for m in known)])


def machine(result: rows.Result) -> str:
    """Return the hardware and the versions of a result in a line."""
    names = ("python", "jax", "flax")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names)
    return f"{result['device']} with {result['cpu_cores']} core(s); {versions}"


def about(study: str) -> str:
    """Return what a set shows and costs, from the head of its file."""
    lines = (rows.ROWS / study / rows.COMMON).read_text().splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line[:1] == "#"]
    return "\n".join(comments).replace("Command: ", "Command: `") + "`"


def section(study: str, folder: Path) -> str:
    """Return the heading, the text and the table of a set."""
    return f"### {study}\n\n{about(study)}\n\n{set_table(study, folder)}"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=RESULTS_PAGE)
    given = parser.parse_args()
    for path, sets in (
        (given.readme, IN_README),
        (given.page, [study for study in rows.sets() if study not in IN_README]),
    ):
        text = "\n\n".join(section(study, given.results) for study in sets)
        path.write_text(insert(path.read_text(), text, "results"))


if __name__ == "__main__":
    main()
