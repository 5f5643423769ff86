"""Render the sections on performance from the results of the benchmarks.

Shows: figures read from results/bench-*.json, and "not measured" for a missing result.
The convolutions go into RESULTS.md, all other tables into README.md.
Cost: a second.
Command: python experiments/performance.py
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import bench_forms
import bench_gate
import bench_round
import bench_scaling

README = Path(__file__).parent.parent / "README.md"
DETAILS = Path(__file__).parent / "RESULTS.md"
BACKENDS = {"cpu": "CPU", "gpu": "GPU"}


class Section(NamedTuple):
    """One table, made from the results with the same beginning of the name."""

    prefix: str
    title: str
    columns: Sequence[str]
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
    Section(
        "forms",
        "Forms of the stacked convolutions in whole rounds",
        bench_forms.COLUMNS,
        {backend: [] for backend in BACKENDS},
    ),
    Section(
        "gate",
        "Early exits: time against the share of samples that is sent",
        bench_gate.COLUMNS,
        {backend: [] for backend in BACKENDS},
    ),
)


def load(folder: Path) -> list[dict[str, Any]]:
    """Read all results, by name of the file."""
    return [
        json.loads(path.read_text()) for path in sorted(folder.glob("bench-*.json"))
    ]


def render(results: Sequence[dict[str, Any]]) -> str:
    """Return the text of README: a table for each benchmark, backend and machine."""
    return "\n\n".join(_section(section, results) for section in SECTIONS)


def details(results: Sequence[dict[str, Any]]) -> str:
    """Return the text for other benchmarks: a table for rows of the same columns."""
    parts = []
    for result in results:
        if any(_belongs(result["benchmark"], section.prefix) for section in SECTIONS):
            continue
        parts.append(f"### Benchmark `{result['benchmark']}`")
        parts.append(f"{_machine(result['machine'])}:")
        alike: dict[tuple[str, ...], list[bench.Row]] = {}
        for row in result["rows"]:
            columns = (name for name, v in row.items() if not isinstance(v, dict))
            alike.setdefault(tuple(columns), []).append(row)
        parts += [bench.table(rows, columns) for columns, rows in alike.items()]
    return "\n\n".join(parts)


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
            parts.append(f"{machine}:\n\n{bench.table(rows, section.columns)}")
        if not mine and backend in section.expected and not missing:
            parts.append(f"On a {BACKENDS[backend]}: not measured.")
        if missing:
            heading = f"On a {BACKENDS[backend]}, not measured:"
            parts.append(f"{heading}\n\n{bench.table(missing, section.columns)}")
    return "\n\n".join(parts)


def _in(row: bench.Row, rows: Sequence[bench.Row]) -> bool:
    return any(all(r.get(key) == row[key] for key in row) for r in rows)


def _machine(machine: dict[str, Any]) -> str:
    """Return hardware and versions in a line."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    return (
        f"{machine['device']}, {machine['cpu_cores']} cores of "
        f"{machine['processor']}; {versions}"
    )


def insert(page: str, section: str, name: str) -> str:
    """Return the page with the section between the markers of its name."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"there is no {first} ... {last}")
    return f"{before}{first}\n{section}\n{last}{after}"


def main() -> None:
    """Read the results, and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=bench.RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--details", type=Path, default=DETAILS)
    arguments = parser.parse_args()
    results = load(arguments.results)
    for path, text in (
        (arguments.readme, render(results)),
        (arguments.details, details(results)),
    ):
        path.write_text(insert(path.read_text(), text, "performance"))


if __name__ == "__main__":
    main()
