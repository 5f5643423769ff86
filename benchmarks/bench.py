"""Functions that the benchmarks share: timing, the machine, and result files.

A benchmark is a script ``bench_*.py`` that prints a table and writes its rows to
``results/bench-NAME-BACKEND.json``. Times are medians with the lowest and the highest;
warm-up and compilation are outside. Ratios come from pairs timed in turns, in one
process where they can be, so that a noisy machine disturbs both alike.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
GPU_FORMS = ("grouped", "unrolled")  # that cannot abort XLA's compiler there
IDLE_CORES = 0.5  # other processes may keep so many busy on an idle machine
Row = dict[str, Any]


class Timing(NamedTuple):
    """The seconds of a call."""

    median: float
    low: float
    high: float
    turns: tuple[float, ...] = ()  # of each call, in order


class Work(NamedTuple):
    """The processors' work since the machine started, and this process's part of it."""

    busy_s: float  # CPU seconds of all processes, and seconds that a host took away
    own_s: float  # of this process
    at_s: float  # by the clock


def work() -> Work | None:
    """Return the work so far; None on a system other than Linux."""
    try:
        words = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, stolen = map(int, words)
    ticks = user + nice + system + irq + softirq + stolen
    return Work(
        ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter()
    )


def cores_elsewhere(since: Work | None) -> float | None:
    """Return how many cores other processes kept busy, on average, since then."""
    now = work()
    if since is None or now is None:
        return None
    others = (now.busy_s - since.busy_s) - (now.own_s - since.own_s)
    return max(0.0, others) / (now.at_s - since.at_s)


def say_idle(elsewhere: float | None) -> str:
    """Say whether a machine was idle while something was measured on it."""
    if elsewhere is None:
        return "not known"
    return f"{'yes' if elsewhere <= IDLE_CORES else 'no'}, {elsewhere:.2f} cores"


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, warmups: int = 2
) -> dict[str, Timing]:
    """Time several functions in turns: a, b, a, b, ...

    Args:
      calls: the functions by name; each returns when its work is done.
      repeats: timed calls of each function.
      warmups: earlier calls of each function, not timed.
    """
    for _ in range(warmups):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(float(np.median(values)), min(values), max(values), tuple(values))
        for name, values in seconds.items()
    }


def machine() -> Row:
    """Return the hardware and the versions behind a result."""
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "torch", "numpy", "libtpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "backend": jax.default_backend(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "versions": versions,
    }


def forms_here(forms: Sequence[str]) -> list[str]:
    """Return the forms of the convolution that cannot abort the compiler here."""
    on_gpu = jax.default_backend() == "gpu"
    return [form for form in forms if form in GPU_FORMS or not on_gpu]


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of `argparse`: a whole number of at least this size."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text} is not allowed; allowed is {least} or more"
            )
        return int(text)

    return number


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def write(
    name: str, rows: Sequence[Row], *, out: Path = RESULTS, on: Row | None = None
) -> Path:
    """Write a benchmark's rows, and return the file.

    Args:
      name: the benchmark's name.
      rows: the rows.
      out: the folder, which is made if it is missing.
      on: the machine, see `machine`; None for this machine.
    """
    on = on or machine()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"bench-{name}-{on['backend']}.json"
    content = {"benchmark": name, "machine": on, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the rows as a Markdown table of the named columns."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(row.get(column)) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
