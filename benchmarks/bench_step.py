"""Show what a training step of the whole network consists of, on this machine.

Shows: the seconds that XLA's operations take in a step, by what they are for:
convolutions (their products and their changes of layout), normalisation, activations
with shortcuts, the heads, and the rest with the optimizer and the checks for finite
values; and how many operations there are. Two cores work at once, so the sum over the
operations can exceed the time of the step; it falls short of it by the operations that
XLA adds without a place in the program, such as copies, and by the time between all.
Expected: convolutions take most of a step at width 64, and less at width 8.
Cost: about 3 minutes on two CPU cores.
Command: python benchmarks/bench_step.py
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import bench
import jax
import jax.numpy as jnp
import numpy as np
from federations import configuration, noise, plain_branch
from jax.profiler import ProfileData

from hsee_jax.core.types import Array, Batch
from hsee_jax.federation import Branch, branch_step, server_spec
from hsee_jax.runs.build import build_optimizer
from hsee_jax.runs.model import build_model

SIZES = ((8, 8), (16, 8), (64, 32))  # width and batch size
QUICK = ((2, 2),)
REPEATS = 5
# What an operation is for, by the first pattern that matches its place in the program.
KINDS = {
    "convolutions": r"/(conv\w*|down)/conv/",
    "normalisation": r"/bn\w*/|/norm\w*/",
    "heads and loss": r"linear|cross_entropy|Head|pool",
    "activations and shortcuts": r"Block|ConvNorm|relu|Stem",
}
REST = "optimizer, checks and rest"
_PLACE = re.compile(r"%?([\w.-]+) = .*op_name=\"([^\"]*)\"")
ALL_KINDS = (*KINDS, REST)
COLUMNS = ("width", "batch", "step ms", "operations", *ALL_KINDS)


def main() -> None:
    """Profile a step of each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny size, for tests")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    arguments = parser.parse_args()
    rows = [measure(*size) for size in (QUICK if arguments.quick else SIZES)]
    print(bench.table(rows, COLUMNS))
    bench.write("step", rows, out=arguments.out)


def measure(width: int, batch_size: int) -> bench.Row:
    """Return the milliseconds of a step by what its operations are for."""
    config = configuration(clients=1, batch_size=batch_size, width=width)
    model, optimizer = build_model(config), build_optimizer(config)
    spec = server_spec(model, 0, optimizer)
    branch = plain_branch(model, optimizer, jax.random.key(0))
    data = noise("cifar10", batch_size)
    batch = Batch(
        jnp.asarray(data.images, jnp.float32) / 255,
        jnp.asarray(data.labels),
        jnp.ones(batch_size, bool),
    )

    def step(branch: Branch, batch: Batch) -> tuple[Branch, Array, Any]:
        return branch_step(spec, branch, batch, jnp.float32(0.01))

    program = jax.jit(step).lower(branch, batch).compile()
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(branch, batch))
        seconds.append(time.perf_counter() - start)
    names = dict(_PLACE.findall(program.as_text() or ""))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(branch, batch))
        found, count = _by_kind(Path(folder), names)
    return {
        "width": width,
        "batch": batch_size,
        "step ms": 1e3 * float(np.median(seconds[1:])),
        "operations": count,
        **{kind: found[kind] for kind in ALL_KINDS},
    }


def _by_kind(folder: Path, names: dict[str, str]) -> tuple[Counter[str], int]:
    """Sum the milliseconds of a trace's operations by kind, and count them."""
    (path,) = folder.rglob("*.xplane.pb")
    total: Counter[str] = Counter()
    count = 0
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names:
                    total[_kind(names[event.name])] += event.duration_ns / 1e6
                    count += 1
    return total, count


def _kind(place: str) -> str:
    return next((kind for kind, text in KINDS.items() if re.search(text, place)), REST)


if __name__ == "__main__":
    main()
