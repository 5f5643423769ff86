"""Write docs/results/performance.md from the results of the benchmarks.

Shows: figures read from results/bench-*.json; the end of the page lists what no machine
has measured.
Cost: a second.
Command: python benchmarks/performance.py
"""

import argparse
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench
from aot_section import AOT
from sections import BACKENDS, SECTIONS, Part, Section

PAGE = Path(__file__).parent.parent / "docs" / "results" / "performance.md"
INTRODUCTION = """\
<!-- `python benchmarks/performance.py` writes this page; do not edit it. -->
# Performance

`python benchmarks/bench_all.py` runs every benchmark in a process of its own. A figure
is the median of several timed calls; the lowest and the highest follow in brackets.
Compilation and warm-up do not count. Figures that are compared were timed in turns in
one process, so that a noisy machine disturbs both alike. The start of the demo and the
deployment were timed in turns in processes of their own. Numbers of devices, and of
clients out of many, had one process after another. On CPU nothing else ran during
the rounds against PyTorch whose column `idle` says yes; other work may have slowed the
other CPU figures. Those rounds and the start of the demo were timed after the loop
had learnt to take several turns at once (`--loop-threads`); all other CPU figures of
training are of one turn at a time. Single convolutions, the parts of a step and the
device clock were timed after `winograd` had learnt to take a few images at once.
"""

Result = dict[str, Any]


def load(folder: Path) -> list[Result]:
    """Read all results by the name of the file, with the compiled rounds last."""
    paths = sorted(
        folder.glob("bench-*.json"), key=lambda path: ("bench-aot" in path.name, path)
    )
    return [json.loads(path.read_text()) for path in paths]


def render(results: Sequence[Result]) -> str:
    """Return the page: the machines, the sections, and what is not measured."""
    found = dict.fromkeys(machine(result) for result in results)
    letters = dict(zip(found, string.ascii_uppercase, strict=False))
    parts = [INTRODUCTION.rstrip(), "## Machines"]
    parts.append("\n".join(f"- **{key}**: {text}" for text, key in letters.items()))
    for section in (*SECTIONS, AOT):
        own = [r for r in results if belongs(r, section)]
        if own:
            parts += [f"## {section.title}", section.text]
            for part in section.parts:
                parts += _tables(part, own, letters)
    missing = [
        line for section in (*SECTIONS, AOT) for line in _missing(section, results)
    ]
    if missing:
        parts.append("## Not measured")
        parts.append("No machine has measured these yet:")
        parts.append("\n".join(f"- {line}" for line in missing))
    return "\n\n".join(filter(None, parts)) + "\n"


def belongs(result: Result, section: Section) -> bool:
    """Return whether a result is of a section."""
    name = result["benchmark"]
    return name == section.prefix or name.startswith(f"{section.prefix}-")


def machine(result: Result) -> str:
    """Return the hardware and the versions of a result in a line."""
    own = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in own["versions"].items())
    return (
        f"{own['device']}, {own['cpu_cores']} cores of {own['processor']}; {versions}"
    )


def _tables(
    part: Part, results: Sequence[Result], letters: dict[str, str]
) -> list[str]:
    """Return the text of a part, and a table for each machine that has its rows."""
    rows: dict[str, list[bench.Row]] = {}
    for result in results:
        own = [row for row in result["rows"] if part.holds(row)]
        rows.setdefault(letters[machine(result)], []).extend(own)
    tables = [
        f"On **{letter}**:\n\n{_table(part, own)}"
        for letter, own in rows.items()
        if own
    ]
    return [part.text, *tables] if tables else []


def _table(part: Part, rows: Sequence[bench.Row]) -> str:
    """Return the rows as Markdown, without the columns that no row has."""
    cells = {
        heading: [cell(row) for row in rows] for heading, cell in part.columns.items()
    }
    shown = {heading: column for heading, column in cells.items() if any(column)}
    lines = [f"| {' | '.join(shown)} |", "|" + "---|" * len(shown)]
    for line in zip(*shown.values(), strict=True):
        lines.append(f"| {' | '.join(cell or '–' for cell in line)} |")
    if any(not cell for column in shown.values() for cell in column):
        lines.append("\n–: not measured.")
    return "\n".join(lines)


def _missing(section: Section, results: Sequence[Result]) -> list[str]:
    """Return a line for each backend on which something is not measured."""
    lines = []
    for backend, expected in section.expected.items():
        rows = [
            row
            for result in results
            if belongs(result, section) and result["machine"]["backend"] == backend
            for row in result["rows"]
        ]
        left = [
            row
            for row in expected
            if not any(row.items() <= own.items() for own in rows)
        ]
        if not rows:
            lines.append(f"{section.title}: on a {BACKENDS[backend]}")
        elif left:
            names = ", ".join(" ".join(map(str, row.values())) for row in left)
            lines.append(f"{section.title}: on a {BACKENDS[backend]}, {names}")
    return lines


def main() -> None:
    """Read the results, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=bench.RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    results = load(arguments.results)
    if not results:
        parser.error(f"{arguments.results} has no results")
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
