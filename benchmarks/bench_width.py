"""Time a client's layers at both widths: without gates, and without closed channels.

Shows: the milliseconds of one sample through the first layers of ResNet-18 with all
channels, and through those that `hsee export --width gated` writes; the share of FLOPs
that is left, and the share of time. Gates are as drawn, so about half are open;
weights and the sample are random, because the speed does not depend on them.
Expected: the share of time lies above the share of FLOPs; a narrow network, whose calls
take under a millisecond, gains little or nothing.
Cost: about a minute on two CPU cores.
Command: python benchmarks/bench_width.py [--quick] [--out FOLDER]
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench
import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Array, Variables
from hsee_jax.nn import (
    Model,
    flops_share,
    init_network,
    resnet18,
    with_gates,
    without_gates,
)

WHOLE = (8, 16, 64), (3, 5, 7), 301  # widths, cuts, and calls of each
COLUMNS = ("width", "cut", "FLOPs", "dense ms", "gated ms", "time", "range")


def rows_of(width: int, cuts: Sequence[int], *, repeats: int) -> list[bench.Row]:
    """Measure a network's first layers up to each cut, both widths in turns."""
    model = with_gates(resnet18(num_classes=10, input_shape=(32, 32, 3), width=width))
    network = jax.jit(partial(init_network, model))(jax.random.key(0))
    image = np.random.default_rng(0).standard_normal((1, 32, 32, 3), np.float32)
    rows = []
    for cut in cuts:
        own = model._replace(stages=model.stages[:cut])
        layers = jax.device_get(network.layers[:cut])
        shape = jax.ShapeDtypeStruct(image.shape, image.dtype)
        share = float(flops_share(own.stages, layers, shape))
        times = bench.time_in_turns(
            {
                name: _segment(*without_gates(own, layers, name), image)
                for name in ("dense", "gated")
            },
            repeats=repeats,
        )
        dense, gated = times["dense"], times["gated"]
        ratios = np.divide(gated.turns, dense.turns)
        low, high = np.quantile(ratios, (0.05, 0.95))
        rows.append(
            {
                "width": width,
                "cut": cut,
                "FLOPs": share,
                "dense ms": 1e3 * dense.median,
                "gated ms": 1e3 * gated.median,
                "time": float(np.median(ratios)),
                "range": f"{low:.2f}-{high:.2f}",
            }
        )
    return rows


def _segment(
    model: Model, layers: Sequence[Variables], image: np.ndarray
) -> Callable[[], Any]:
    """Return a call that runs a sample through the layers of a device."""
    mask = jnp.ones(1, bool)

    @jax.jit
    def segment(features: Array) -> Array:
        for stage, own in zip(model.stages, layers, strict=True):
            features, _ = stage.apply(own, features, mask, train=False)
        return features

    return lambda: jax.device_get(segment(image))


def main() -> None:
    """Print the table, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    arguments = parser.parse_args()
    widths, cuts, repeats = ((2,), (3,), 3) if arguments.quick else WHOLE
    rows = [row for w in widths for row in rows_of(w, cuts, repeats=repeats)]
    print(bench.table(rows, COLUMNS))
    print(f"\nwrote {bench.write('width', rows, out=arguments.out)}")


if __name__ == "__main__":
    main()
