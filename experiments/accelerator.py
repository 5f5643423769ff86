"""Measure what needs an accelerator: speed first, then the runs of the studies.

Shows: the parts of benchmarks/bench_all.py, and then the next rows of the studies at
full size, within a limit of time.
Cost: --seconds. The same command goes on with the next run.
Command: python experiments/accelerator.py --seconds 540 --data-dir FOLDER [PARTS ...],
where a part is a name that `bench_all.py --list` prints; ``none`` leaves all out. Runs
of a narrow network leave a large device idle: ``--jobs 5`` trains five at once.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
STUDIES = ("cifar10-w16", "cifar10", "cifar100", "stl10")


def main() -> None:
    """Run the benchmarks, and then the studies with the time that is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="parts of bench_all.py; default: all")
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--data-dir", type=Path, help="folder with the datasets")
    parser.add_argument("--studies", nargs="+", default=STUDIES, metavar="STUDY")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    arguments = parser.parse_args()
    if not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds: {arguments.seconds} is not a number above 0")
    cores = len(os.sched_getaffinity(0))
    if not 1 <= arguments.jobs <= cores:
        parser.error(f"--jobs: {arguments.jobs} is not one of 1..{cores}, the cores")
    for name in arguments.studies:
        if not (HERE / name / "study.toml").is_file():
            parser.error(f"--studies: {name} is not a study of this folder")
    if arguments.data_dir and not arguments.data_dir.is_dir():
        parser.error(f"--data-dir: {arguments.data_dir} is not a folder")
    failed = False
    begun = time.monotonic()
    if arguments.parts != ["none"]:
        # Half of the time is for the studies.
        within = ["--within", str(arguments.seconds / 2)]
        script = HERE.parent / "benchmarks" / "bench_all.py"
        status = _status([str(script), *arguments.parts, *within])
        if status == 2:  # a part is unknown
            raise SystemExit(status)
        failed |= status != 0
    folder = ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # runs share it
    for name in arguments.studies:
        left = arguments.seconds - (time.monotonic() - begun)
        if left > 0:
            study = HERE / name
            sweep = ["-m", "hsee_jax", "sweep", str(study / "study.toml")]
            limits = ["--seconds", f"{left:.0f}", "--jobs", str(arguments.jobs)]
            sweep += ["--out", str(study), *limits, *folder]
            failed |= _status(sweep) != 0
    if failed:
        raise SystemExit(1)


def _status(arguments: list[str]) -> int:
    """Run a script of Python, and return its exit status."""
    print(f"== {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, *arguments], check=False).returncode


if __name__ == "__main__":
    main()
