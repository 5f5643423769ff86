"""Run every benchmark, each part in its own process.

Shows: what the parts show; a part that fails or takes too long does not stop the
others, and is named at the end.
Cost: the sum of the parts, about an hour and a half on two CPU cores.
Command: python benchmarks/bench_all.py [--out FOLDER] [PARTS ...], where a part is a
name that --list prints. It needs no network; without PyTorch its columns stay empty,
and ``aot`` adds nothing without compilers for accelerators. On a machine that is lent
for some minutes use experiments/accelerator.py, which calls this script.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench
import bench_round
import bench_scaling

HERE = Path(__file__).parent
OWN = {"bench_all", "bench_round", "bench_scaling"}


def parts(backend: str) -> dict[str, list[str]]:
    """Return the script and the arguments of each part."""
    found = {}
    for i, size in enumerate(bench_round.SIZES["gpu" if backend == "gpu" else "cpu"]):
        check = [] if i == 0 else ["--no-check"]  # once is enough
        found[f"round-{size.name}"] = ["bench_round.py", "--sizes", size.name, *check]
    for name in bench_scaling.PARTS:
        found[f"scaling-{name}"] = ["bench_scaling.py", name]
    for path in sorted(HERE.glob("bench_*.py")):
        if path.stem not in OWN:
            found[path.stem.removeprefix("bench_")] = [path.name]
    return found


def default_backend() -> str:
    """Return JAX's backend; a child process finds it, and frees the GPU's memory."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1]


def run(arguments: list[str], *, seconds: float) -> str:
    """Run a script of this folder, and return how it ended."""
    script, *rest = arguments
    command = [sys.executable, str(HERE / script), *rest]
    with subprocess.Popen(command, start_new_session=True) as part:
        try:
            status = part.wait(seconds)
        except BaseException as error:
            # With the processes it has started, which would disturb the next parts.
            os.killpg(part.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return f"took more than {seconds:.0f} s"
            raise
    return "done" if status == 0 else f"failed, status {status}"


def main() -> None:
    """Run the named parts, or all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="names from --list; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of parts")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--seconds", type=float, default=1200, help="limit of a part")
    parser.add_argument(
        "--within", type=float, default=math.inf, help="seconds of all parts together"
    )
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    arguments = parser.parse_args()
    known = parts(default_backend())
    if arguments.list:
        print("\n".join(known))
        return
    if unknown := set(arguments.parts) - set(known):
        parser.error(f"{', '.join(unknown)}: allowed are {', '.join(known)}")
    extra = ["--out", str(arguments.out), *(["--quick"] if arguments.quick else [])]
    ends, begun = {}, time.perf_counter()
    for name in arguments.parts or known:
        start = time.perf_counter()
        left = arguments.within - (start - begun)
        if left <= 0:
            ends[name] = "not begun"
            continue
        print(f"== {name}", flush=True)
        ends[name] = run([*known[name], *extra], seconds=min(arguments.seconds, left))
        print(f"== {name}: {ends[name]}, {time.perf_counter() - start:.0f} s")
    failed = {name: end for name, end in ends.items() if end != "done"}
    if failed:
        sys.exit(f"not measured: {failed}")


if __name__ == "__main__":
    main()
