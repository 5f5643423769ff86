"""Measure the seconds from `hsee train demo` to its first step, and its programs.

Shows: the seconds from the start of the process to the end of the first step, without
compiled programs and with those of an earlier call; how many programs a run compiles,
with its evaluations and checkpoints; and how long XLA takes for them.
Expected: at most 30 programs. The seconds depend on the machine, and on what else runs.
Cost: on two CPU cores about four minutes.
Command: python benchmarks/bench_start.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
import jax
import numpy as np

COLUMNS = ("programs kept", "first step s", "range", "programs", "compilation s")
CHILD_SECONDS = 900  # a child that takes longer has failed
COMPILED = "/jax/core/compile/backend_compile_duration"
# The programs of the demo, on little data.
SHORT = {
    "rounds": 2,
    "eval_every": 1,
    "checkpoint_every": 1,
    "max_train_samples": 400,
    "max_test_samples": 512,
}
QUICK = {"network": "mlp", "hidden": 4, "cuts": 1, "max_train_samples": 120}


def main() -> None:
    """Start the command again and again, with and without what it compiled before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        report, begin, *words = arguments.child
        _child(Path(report), float(begin), words)
        return
    flags = SHORT | (QUICK if arguments.quick else {})
    found: dict[str, list[bench.Row]] = {"no": [], "yes": []}
    for _ in range(1 if arguments.quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            for kept in found:  # the first start leaves its programs to the second
                found[kept].append(_start(Path(folder), flags))
    rows = [_row(kept, starts) for kept, starts in found.items()]
    print(bench.table(rows, COLUMNS))
    bench.write("start", rows, out=arguments.out)


def _start(folder: Path, flags: bench.Row) -> bench.Row:
    """Run the command with a cache in a folder, and return what it reports."""
    report = folder / "report.json"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    own = ["--compilation-cache", str(folder / "cache"), "--out", str(folder / "run")]
    child = [sys.executable, __file__, "--child", str(report), repr(time.time())]
    subprocess.run(
        [*child, "train", "demo", *words, *own, "--overwrite"],
        check=True,
        timeout=CHILD_SECONDS,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(report.read_text())


def _child(report: Path, begin: float, words: list[str]) -> None:
    """Run a command line, and write when its first step ended and what it compiled."""
    compiled: list[float] = []

    def note(event: str, duration_secs: float, **more: str | int) -> None:
        if event == COMPILED:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    import hsee_jax.cli.train
    from hsee_jax.cli.signals import StopSignals

    steps: list[float] = []

    class Watch(StopSignals):
        """Notes the time whenever training asks, after each step, whether to stop."""

        def __call__(self) -> bool:
            steps.append(time.time())
            return super().__call__()

    hsee_jax.cli.train.StopSignals = Watch  # type: ignore[misc]
    status = hsee_jax.cli.main(words)
    if status:
        sys.exit(status)
    figures = {
        "first step s": steps[0] - begin,
        "programs": len(compiled),
        "compilation s": sum(compiled),
    }
    report.write_text(json.dumps(figures))


def _row(kept: str, starts: list[bench.Row]) -> bench.Row:
    seconds = [start["first step s"] for start in starts]
    return {
        "programs kept": kept,
        "first step s": float(np.median(seconds)),
        "range": f"{min(seconds):.3g}-{max(seconds):.3g} s",
        "programs": starts[0]["programs"],
        "compilation s": float(np.median([start["compilation s"] for start in starts])),
    }


if __name__ == "__main__":
    main()
