"""Compare predicted with measured seconds of a round on this machine.

Shows: how far the device clock can be trusted. The machine is timed as `hsee profile`
does it; `round_time` then predicts a round of three mixes of cuts, both strategies. In
the simulation one machine computes everything, so the sum of all busy seconds, of
clients and server, is compared with the measured round. Rounds and profiles are timed
in turns, so that a noisy machine disturbs both alike.
Expected: predictions within 15 % of the measured medians on an idle machine.
Cost: about 10 minutes on two CPU cores; --quick takes seconds and proves nothing.
Command: python benchmarks/bench_timing.py [--out FOLDER]
"""

import argparse
import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import jax
import numpy as np

from hsee_jax.config import Config, override
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data.info import KNOWN
from hsee_jax.runs.build import build
from hsee_jax.runs.experiment import Experiment
from hsee_jax.systems import (
    Device,
    LayerCost,
    Measured,
    layer_costs,
    round_time,
    schedule_of,
    workload,
)
from hsee_jax.systems.profile import profile

STRATEGIES = ("sequential", "averaging")
MIXES: dict[str, tuple[str, ...]] = {
    "shallow": ("1", "2", "3"),
    "mixed": ("2", "4", "6"),
    "deep": ("5", "7", "9"),
}


class Size(NamedTuple):
    """The size of the federations."""

    clients: int = 6
    batch_size: int = 16
    steps: int = 10
    width: int = 16
    rounds: int = 5  # timed, of each strategy and mix
    profiles: int = 3
    repeats: int = 5  # in each profile


QUICK = Size(clients=3, batch_size=4, steps=1, width=8, rounds=1, profiles=1, repeats=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time and predict the rounds, print a table, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--network", default="resnet18", help="resnet18 by default")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    given = parser.parse_args(arguments)
    size = QUICK if given.quick else Size()
    keep_programs()
    try:
        rows = measure(size, given.network)
    except UserError as error:
        parser.error(str(error))
    for row in rows:
        print(
            f"{row['strategy']:10} {row['mix']:8} predicted {row['predicted_s']:.3f} s"
            f"  measured {row['measured_s']:.3f} s"
            f" ({row['measured_low_s']:.3f}-{row['measured_high_s']:.3f})"
            f"  {row['error']:+.1%}"
        )
    bench.write("timing", rows, out=given.out)


def keep_programs() -> None:
    """Compile each program once, though every profile asks for it again."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="hsee-bench-timing-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        jax.config.update("jax_compilation_cache_dir", folder)


def measure(size: Size, network: str) -> list[bench.Row]:
    """Return a row for each strategy and mix of cuts."""
    runs = {
        (strategy, mix): _experiment(size, network, strategy, cuts)
        for strategy in STRATEGIES
        for mix, cuts in _mixes(network).items()
    }
    states = {key: experiment.init() for key, experiment in runs.items()}
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    profiles: list[Measured] = []
    first = next(iter(runs.values()))
    for number in range(max(size.profiles, size.rounds + 1)):
        if number < size.profiles:
            times = profile(first.federation, size.batch_size, repeats=size.repeats)
            profiles.append(times.measured())
        for key, experiment in runs.items():
            start = time.perf_counter()
            states[key], *_ = experiment.run_round(states[key])
            jax.block_until_ready(states[key])
            if number > 0:  # the first round compiles
                seconds[key].append(time.perf_counter() - start)
    costs = layer_costs(first.federation.model)
    machine_device = Device(
        "this", np.nan, np.nan, 1.0, 1.0, measured=_median(profiles)
    )
    return [
        {"strategy": strategy, "mix": mix, "cuts": " ".join(_mixes(network)[mix])}
        | _compare(predict(experiment, costs, machine_device), seconds[strategy, mix])
        for (strategy, mix), experiment in runs.items()
    ]


def _mixes(network: str) -> dict[str, tuple[str, ...]]:
    if network == "resnet18":
        return MIXES
    return {"shallow": ("1",), "mixed": ("1", "2", "3"), "deep": ("3",)}


def _compare(predicted: float, seconds: list[float]) -> dict[str, float]:
    measured = float(np.median(seconds))
    return {
        "predicted_s": predicted,
        "measured_s": measured,
        "measured_low_s": min(seconds),
        "measured_high_s": max(seconds),
        "error": predicted / measured - 1,
    }


def predict(
    experiment: Experiment, costs: Sequence[LayerCost], device: Device
) -> float:
    """Predict the seconds of a round in which one machine computes everything."""
    strategy = experiment.strategy
    cuts = [share.cut for share in experiment.manifest]
    steps = experiment.learning_rates.shape[1]
    work = workload(
        costs,
        {one.cut: one for one in experiment.traffic},
        cuts,
        [device] * len(cuts),
        device,
        batch_size=experiment.batch_size,
        steps=steps,
        boundary=strategy.boundary,
    )
    course = round_time(work, schedule_of(strategy, steps))
    return float(np.sum(course.busy_s)) + course.server_busy_s


def _median(profiles: Sequence[Measured]) -> Measured:
    """Return the medians over several profiles."""

    def middle(name: str) -> tuple[float, ...]:
        values = np.median([getattr(one, name) for one in profiles], axis=0)
        return tuple(values.tolist())

    names = ("forward_s", "backward_s", "client_step_s", "server_step_s")
    first = profiles[0]
    return Measured(first.batch_size, first.parts, *map(middle, names))


def _experiment(
    size: Size, network: str, strategy: str, cuts: tuple[str, ...]
) -> Experiment:
    """Build a federation on noise, in which all clients have whole batches."""
    changes: dict[str, Any] = {"network": network}
    if network == "resnet18":
        changes["width"] = size.width
    config = override(
        Config(),
        **changes,
        dataset="cifar10",
        num_clients=size.clients,
        cuts=cuts[: size.clients],
        strategy=strategy,
        loop_threads=1,  # one turn after another: busy seconds are then wall seconds
        batch_size=size.batch_size,
        rounds=1000,
        schedule="constant",
        warmup_rounds=0.0,
        learning_rate=0.01,
    )
    count = size.clients * size.batch_size * size.steps
    return build(config, data=(_noise(count), _noise(8)))


def _noise(count: int) -> Dataset:
    info = KNOWN["cifar10"]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *info.input_shape), np.uint8)
    return Dataset(images, np.arange(count, dtype=np.int32) % info.num_classes)


if __name__ == "__main__":
    main()
