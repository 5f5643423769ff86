"""Measure how time and memory grow with clients, devices, precision and population.

Shows, each as its own part:
* clients: time per image against the number of clients;
* devices: time per image against the number of devices. On a CPU they are fakes that
  share its cores, so they show the cost of the partition, not a speed-up;
* memory: peak memory against the number of clients;
* precision: bfloat16 against float32, and one compiled scan (vmap) against a loop;
* population: a round of 20 clients out of 200 and out of 2,000.
Expected: 64 clients take at most 1.2 times the time per image of 4; the round of 20
takes out of 2,000 at most 1.2 times its time out of 200; memory of `sequential` grows
by a client's part for each client, memory of `averaging` by a whole network.
Cost: on two CPU cores about three minutes a part.
Command: python benchmarks/bench_scaling.py clients devices memory precision population
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench
import jax
import numpy as np
from federations import STRATEGIES, Runner, federation

COLUMNS = {
    "clients": (
        "strategy",
        "clients",
        "images/s",
        "ms per image",
        "range",
        "relative to 4 clients",
    ),
    "devices": ("strategy", "devices", "ms per image", "range", "relative to 1 device"),
    "memory": ("strategy", "clients", "peak MB", "what it is"),
    "precision": ("strategy", "client axis", "dtype", "images/s", "range"),
    "population": ("strategy", "clients", "active", "round s", "range", "peak MB"),
}
CHILD_SECONDS = 900  # a child that takes longer has failed


def main() -> None:
    """Run the named parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}")
    parser.add_argument("--all", action="store_true", help="every count of clients")
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # This process and its children share a GPU: each takes the memory that it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.child:
        print(json.dumps(_child(**json.loads(arguments.child))))
        return
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: allowed are {', '.join(PARTS)}")
    failed = False
    for part in arguments.parts or PARTS:
        rows = PARTS[part](quick=arguments.quick, every=arguments.all)
        failed |= any("error" in row for row in rows)
        print(bench.table(rows, COLUMNS[part]), flush=True)
        bench.write(f"scaling-{part}", rows, out=arguments.out)
    if failed:
        sys.exit("some rows could not be measured: see above")


def clients_part(*, quick: bool, every: bool) -> list[bench.Row]:
    """Measure the time per image against the number of clients, timed in turns."""
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64) if every else (1, 4, 16, 64)
    if quick:
        counts = (1, 4)
    steps = 1 if quick else 3
    runners = {
        (strategy, n): Runner(
            federation(clients=n, batch_size=8, steps=steps, width=8, strategy=strategy)
        )
        for strategy in STRATEGIES
        for n in counts
    }
    timings = _time(runners, repeats=1 if quick else 5)
    return [
        {"strategy": strategy, "clients": n, "width": 8, "batch_size": 8}
        | _per_image(timing, 8 * n * steps)
        | {
            "relative to 4 clients": (timing.median / n)
            / (timings[strategy, 4].median / 4)
        }
        for (strategy, n), timing in timings.items()
    ]


def precision_part(*, quick: bool, every: bool) -> list[bench.Row]:
    """Measure dtypes and client axes, timed in turns."""
    del every
    on_gpu = jax.default_backend() == "gpu"
    width, clients, batch = (64, 12, 128) if on_gpu else (8, 6, 8)
    runners = {
        (strategy, axis, dtype): Runner(
            federation(
                clients=3 if quick else clients,
                batch_size=batch,
                steps=1 if quick else 2,
                width=width,
                strategy=strategy,
                client_axis=axis,
                dtype=dtype,
            )
        )
        for strategy in STRATEGIES[: 1 if quick else 2]
        for axis in ("loop", "vmap")
        for dtype in ("float32", "bfloat16")
    }
    images = 3 * batch if quick else 2 * clients * batch
    timings = _time(runners, repeats=1 if quick else 5)
    return [
        {"strategy": strategy, "client axis": axis, "dtype": dtype, "width": width}
        | {"clients": clients, "batch_size": batch}
        | _per_image(timing, images)
        for (strategy, axis, dtype), timing in timings.items()
    ]


def devices_part(*, quick: bool, every: bool) -> list[bench.Row]:
    """Measure the time per image against the number of devices, in child processes."""
    del every
    on_gpu = jax.default_backend() == "gpu"
    counts: Sequence[int] = (1, 2) if quick else (1, 2, 4, 8)
    if on_gpu:
        counts = [n for n in counts if n <= jax.device_count()]
    size = {"clients": 24, "batch_size": 8, "steps": 1, "width": 8}
    if on_gpu:
        size = {"clients": 64, "batch_size": 128, "steps": 4, "width": 64}
    if quick:
        size = {"clients": 3, "batch_size": 4, "steps": 1, "width": 2}
    rows = []
    for strategy in STRATEGIES[: 1 if quick else 2]:
        first: float | None = None
        for n in counts:
            found = _in_child(
                {**size, "strategy": strategy, "client_axis": "vmap"},
                repeats=1 if quick else 5,
                environment=_devices(n, on_gpu=on_gpu),
            )
            row = {"strategy": strategy, "devices": n, **size, **found}
            if "seconds" in found:
                timing = bench.Timing(*found["seconds"])
                images = size["clients"] * size["batch_size"] * size["steps"]
                first = first or (timing.median if n == 1 else None)
                row |= _per_image(timing, images)
                row["relative to 1 device"] = timing.median / first if first else None
            rows.append(row)
    return rows


def memory_part(*, quick: bool, every: bool) -> list[bench.Row]:
    """Measure peak memory against the number of clients, in child processes."""
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64) if every else (1, 4, 16, 64)
    if quick:
        counts = (1, 3)
    on_gpu = jax.default_backend() == "gpu"
    size = (
        {"batch_size": 128, "width": 64} if on_gpu else {"batch_size": 8, "width": 32}
    )
    if quick:
        size = {"batch_size": 2, "width": 2}
    nothing = 0.0 if on_gpu else _in_child(None).get("peak MB", 0.0)
    what = (
        "allocated on the device"
        if on_gpu
        else "resident, with compilation, above a process that builds nothing"
    )
    rows = []
    for strategy in STRATEGIES[: 1 if quick else 2]:
        for n in counts:
            found = _in_child(
                {**size, "clients": n, "steps": 1, "strategy": strategy}, repeats=1
            )
            row = {"strategy": strategy, "clients": n, **size, **found}
            if "peak MB" in row:
                row["peak MB"] -= nothing
            rows.append(row | {"what it is": what})
    return rows


def population_part(*, quick: bool, every: bool) -> list[bench.Row]:
    """Measure a round of some clients out of many, in child processes."""
    del every
    active = 2 if quick else 20
    rows = []
    for strategy in STRATEGIES[: 1 if quick else 2]:
        for n in (6, 12) if quick else (200, 2000):
            found = _in_child(
                {
                    "clients": n,
                    "batch_size": 8,
                    "steps": 1,
                    "width": 2 if quick else 4,
                    "dataset": "fashion_mnist_small",
                    "participation": active / n,
                    "strategy": strategy,
                },
                repeats=1 if quick else 15,
                warmups=1 if quick else 3,
            )
            row = {"strategy": strategy, "clients": n, "active": active, **found}
            if "seconds" in found:
                median, low, high = found["seconds"]
                row |= {"round s": median, "range": f"{low:.3g}-{high:.3g}"}
            rows.append(row)
    return rows


PARTS: dict[str, Callable[..., list[bench.Row]]] = {
    "clients": clients_part,
    "devices": devices_part,
    "memory": memory_part,
    "precision": precision_part,
    "population": population_part,
}


def _time(runners: Mapping[Any, Runner], *, repeats: int) -> dict[Any, bench.Timing]:
    return bench.time_in_turns(
        runners, repeats=repeats, warmups=1 if repeats < 2 else 2
    )


def _per_image(timing: bench.Timing, images: int) -> bench.Row:
    low, high = (1e3 * seconds / images for seconds in (timing.low, timing.high))
    return {
        "images/s": images / timing.median,
        "ms per image": 1e3 * timing.median / images,
        "range": f"{low:.3g}-{high:.3g} ms",
    }


def _devices(count: int, *, on_gpu: bool) -> dict[str, str]:
    """Return the environment in which a child process sees ``count`` devices."""
    if not on_gpu:
        return {"JAX_NUM_CPU_DEVICES": str(count)}
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = known.split(",") if known else [str(n) for n in range(count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])}


def _in_child(
    size: dict[str, Any] | None,
    *,
    repeats: int = 0,
    warmups: int = 2,
    environment: Mapping[str, str] | None = None,
) -> bench.Row:
    """Run a federation in its own process.

    Args:
      size: arguments of `federation`; None builds nothing.
      repeats: timed rounds.
      warmups: earlier rounds, not timed.
      environment: variables to add to the environment of this process.

    Returns:
      ``seconds`` (median, low, high) of a round, ``peak MB`` and ``device_count``, or
      ``error``, the last line that the child wrote.
    """
    spec = json.dumps({"size": size, "repeats": repeats, "warmups": warmups})
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child", spec],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {CHILD_SECONDS} s"}
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _child(size: dict[str, Any] | None, repeats: int, warmups: int) -> bench.Row:
    """Do the work of `_in_child` in the child."""
    row: bench.Row = {"device_count": jax.device_count()}
    if size is not None:
        runner = Runner(federation(**size))
        for _ in range(warmups):
            runner()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            runner()
            seconds.append(time.perf_counter() - start)
        row["seconds"] = [float(np.median(seconds)), min(seconds), max(seconds)]
    return row | {"peak MB": _peak_bytes() / 1e6}


def _peak_bytes() -> float:
    """Return the peak memory of the first device, or else of this process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child counts what its parent once had
        kilobytes = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        if kilobytes:
            return 1024 * int(kilobytes[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
