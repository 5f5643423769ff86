"""An algorithm of your own: servers that are pulled towards their mean, not set to it.

In `averaging` all servers that hold a layer have the same weights after each round.
Here each server moves a part of the way to the mean and keeps the rest of what its own
client has taught it. The idea is that of elastic averaging (Zhang, Choromanska and
LeCun, "Deep learning with Elastic Averaging SGD", NeurIPS 2015); there the centre has a
state of its own, here it is the mean of the round.

Train it from Python, or from the command line in the folder of this file::

    python examples/own_algorithm.py
    hsee train --plugin own_algorithm --strategy elastic --pull 0.5
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp

import hsee_jax as hs
from hsee_jax.core import Array, between
from hsee_jax.federation import RunState
from hsee_jax.federation.state import Means


@hs.algorithms.register(summary="averaging, but servers go a part of the way")
def elastic(
    federation: hs.Federation,
    *,
    pull: Annotated[
        float, "part of the way to the mean: 0 is local, 1 is averaging", between(0, 1)
    ] = 0.5,
) -> hs.Strategy:
    """Pull each server towards the mean of each layer after every round."""
    plain = hs.algorithms.averaging(federation)

    def between_both(state: RunState, averaged: RunState) -> RunState:
        def mix(own: Array, mean: Array) -> Array:
            if not jnp.issubdtype(own.dtype, jnp.floating):
                return mean
            return (1 - pull) * own + pull * mean

        servers = jax.tree.map(mix, state.servers, averaged.servers)
        return averaged.replace(servers=servers)

    def receive(state: RunState, means: Means, since: tuple[Array, ...]) -> RunState:
        return between_both(state, plain.receive(state, means, since))

    return plain._replace(receive=receive)


def main(words: Sequence[str] | None = None) -> None:
    """Train with several pulls on skewed labels, and print the mean accuracies."""
    parser = argparse.ArgumentParser(description="Train with an algorithm of your own.")
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"))
    parser.add_argument("--pulls", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=2400, help="for training")
    given = parser.parse_args(words)
    for pull in given.pulls:
        config = hs.override(
            hs.preset("demo"),
            plugin=("own_algorithm",),
            strategy="elastic",
            pull=pull,
            partition="dirichlet",
            alpha=0.3,
            max_train_samples=given.images,
            rounds=given.rounds,
        )
        scores = hs.train(config, given.out / f"pull-{pull}", overwrite=True).scores
        print(
            f"pull {pull}: exits {scores.mean_exit_accuracy:.3f}, "
            f"servers {scores.mean_server_accuracy:.3f}"
        )


if __name__ == "__main__":
    main()
