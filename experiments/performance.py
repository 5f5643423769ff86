"""Renders README's section on performance from the results of the benchmarks.

Shows: nothing of its own; every figure is read from results/bench-*.json, and what has
no result is "not measured".
Cost: a second.
Command: python experiments/performance.py
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import bench_round
import bench_scaling

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- performance -->", "<!-- end of performance -->"
BACKENDS = {"cpu": "CPU", "gpu": "GPU"}


class Section(NamedTuple):
    """One table, from the results whose name begins alike."""

    prefix: str
    title: str
    columns: Sequence[str] | None  # None: all there are
    expected: dict[str, list[bench.Row]]  # rows of each backend; none: any will do


def _sizes(backend: str) -> list[bench.Row]:
    return [
        {"size": size.name, "dtype": size.dtype, "strategy": strategy}
        for size in bench_round.SIZES[backend]
        for strategy in bench_round.STRATEGIES
    ]


def _scaling(part: str, title: str) -> Section:
    return Section(
        f"scaling-{part}",
        title,
        bench_scaling.COLUMNS[part],
        {backend: [] for backend in BACKENDS},
    )


SECTIONS = (
    Section(
        "round",
        "A round against PyTorch (w: width, b: batch size, n: clients)",
        bench_round.COLUMNS,
        {backend: _sizes(backend) for backend in BACKENDS},
    ),
    _scaling("clients", "Time per image against the number of clients"),
    _scaling("devices", "Time per image against the number of devices"),
    _scaling("memory", "Peak memory against the number of clients"),
    _scaling("precision", "Precision, and a loop or one scan (vmap)"),
    _scaling("population", "Rounds of a few clients out of many"),
)


def load(folder: Path) -> list[dict[str, Any]]:
    """All results, by name of the file."""
    return [
        json.loads(path.read_text()) for path in sorted(folder.glob("bench-*.json"))
    ]


def render(results: Sequence[dict[str, Any]]) -> str:
    """The section's text: a table for each benchmark, backend and machine."""
    named = {section.prefix for section in SECTIONS}
    others = sorted({r["benchmark"] for r in results if not _known(r, named)})
    sections = [*SECTIONS, *(Section(n, f"Benchmark `{n}`", None, {}) for n in others)]
    return "\n\n".join(_section(section, results) for section in sections)


def _known(result: dict[str, Any], prefixes: set[str]) -> bool:
    return any(_belongs(result["benchmark"], prefix) for prefix in prefixes)


def _belongs(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}-")


def _section(section: Section, results: Sequence[dict[str, Any]]) -> str:
    parts = [f"### {section.title}"]
    backends = [*section.expected, *sorted({r["machine"]["backend"] for r in results})]
    for backend in dict.fromkeys(backends):
        mine = [
            result
            for result in results
            if _belongs(result["benchmark"], section.prefix)
            and result["machine"]["backend"] == backend
        ]
        missing = section.expected.get(backend, [])
        machines = {_machine(r["machine"]): [] for r in mine}  # type: ignore[var-annotated]
        for result in mine:
            machines[_machine(result["machine"])] += result["rows"]
            missing = [row for row in missing if not _in(row, result["rows"])]
        for machine, rows in machines.items():
            parts.append(f"{machine}:\n\n{_table(rows, section.columns)}")
        if not mine and backend in section.expected and not missing:
            parts.append(f"On a {BACKENDS[backend]}: not measured.")
        if missing:
            heading = f"On a {BACKENDS[backend]}, not measured:"
            parts.append(f"{heading}\n\n{_table(missing, section.columns)}")
    return "\n\n".join(parts)


def _in(row: bench.Row, rows: Sequence[bench.Row]) -> bool:
    return any(all(r.get(key) == row[key] for key in row) for r in rows)


def _machine(machine: dict[str, Any]) -> str:
    """Hardware and versions, in a line."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    return (
        f"{machine['device']}, {machine['cpu_cores']} cores of "
        f"{machine['processor']}; {versions}"
    )


def _table(rows: Sequence[bench.Row], columns: Sequence[str] | None) -> str:
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    return bench.table(rows, columns)


def insert(readme: str, section: str) -> str:
    """The README with the section between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main() -> None:
    """Reads the results and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=bench.RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args()
    text = arguments.readme.read_text()
    arguments.readme.write_text(insert(text, render(load(arguments.results))))


if __name__ == "__main__":
    main()
