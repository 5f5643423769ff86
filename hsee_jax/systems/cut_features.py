"""The features from which accuracy is predicted: of layers, and settings.

The layers of a network form a chain. How many clients hold a layer, and how many have
their exit behind it, differ between runs; its FLOPs and bytes tell layers apart.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.quantities import Bools, Floats, Ints


class Inputs(NamedTuple):
    """The features of n sets of clients that train a network of L layers."""

    layers: Floats  # [n, L, 4]: see `layer_features`
    settings: Floats  # [n, S]: see `Trained`


Predict = Callable[[Inputs], Floats]  # returns [n]
# Fits the values [n] of the rows that the mask [n] keeps.
Fit = Callable[[Inputs, Floats, Bools], Predict]


def layer_features(costs: Sequence[LayerCost], cuts: Ints) -> Floats:
    """Return the features of each layer, ``[L, 4]``, all from 0 to 1.

    They are the share of the clients that hold the layer, the share that have their
    exit behind it, the layer's share of all FLOPs, and the bytes of its output relative
    to the largest.

    Args:
      costs: the costs of L layers, L exits and the final head.
      cuts: the cuts of the clients, ``int64 [N]``.
    """
    layers = np.arange(1, len(costs) // 2 + 1)
    flops = np.array([cost.flops for cost in costs[: len(layers)]], float)
    sizes = np.array([cost.output_bytes for cost in costs[: len(layers)]], float)
    holders = (cuts[:, None] >= layers).mean(axis=0)
    exits = (cuts[:, None] == layers).mean(axis=0)
    columns = [holders, exits, flops / max(flops.sum(), 1), sizes / sizes.max()]
    return np.stack(columns, axis=1)


def make_inputs(
    costs: Sequence[LayerCost],
    cuts: Sequence[Ints],
    settings: Sequence[Sequence[float]],
) -> Inputs:
    """Return the features of n sets of clients, from their cuts and settings."""
    layers = np.stack([layer_features(costs, own) for own in cuts])
    return Inputs(layers, np.array(settings, float).reshape(len(cuts), -1))
