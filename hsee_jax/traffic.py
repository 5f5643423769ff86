"""What crosses the links between clients and server, in bytes.

With each sample its features go up, in the form of the link, and its label; with a
joint boundary the gradient of the features comes down, in the dtype of the computation.
Whenever layers of clients are averaged, those who take part in the round send theirs up
and get the mean, of the same size. All sizes are those of the arrays, as JAX infers
them. What an absent client receives later, and the bookkeeping, are not counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.engine.common import due_after
from hsee_jax.federation import Federation, RunState, Strategy
from hsee_jax.link import message_bytes, nbytes
from hsee_jax.model import layer_inputs
from hsee_jax.partition import Share


class Bytes(NamedTuple):
    """In both directions."""

    up_bytes: float
    down_bytes: float


class Traffic(NamedTuple):
    """What crosses the link of a client of one cut."""

    cut: int
    sample: Bytes  # of each sample in training
    weights: int  # bytes each way, whenever layers are averaged

    def total(self, samples: float, averages: float) -> Bytes:
        """Of so many samples, and so many times that layers are averaged."""
        up, down = self.sample
        weights = averages * self.weights
        return Bytes(samples * up + weights, samples * down + weights)


def sample_bytes(features: jax.ShapeDtypeStruct, link: str, boundary: str) -> Bytes:
    """What crosses for a sample in training.

    Args:
      features: of the sample, ``[1, ...]``.
      link: see `hsee_jax.link`.
      boundary: see `Strategy`.
    """
    if boundary == "none":
        return Bytes(0, 0)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    gradient = nbytes(features) if boundary == "joint" else 0
    return Bytes(message_bytes(features, link) + nbytes(label), gradient)


def traffic_of(
    federation: Federation, strategy: Strategy, state: RunState
) -> tuple[Traffic, ...]:
    """Of the clients of each group.

    Args:
      federation: the clients.
      strategy: how they train.
      state: of any number of clients a group; shapes are enough.
    """
    features = layer_inputs(federation.model)
    weights = jax.eval_shape(strategy.sent, state)
    sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in state.clients]
    return tuple(
        Traffic(
            group.cut,
            sample_bytes(features[group.cut], federation.link, strategy.boundary),
            nbytes(sent) // size,
        )
        for group, sent, size in zip(federation.groups, weights, sizes, strict=True)
    )


def averages_in(strategy: Strategy, number: int, steps: int) -> int:
    """How often layers are averaged in a round, counted from 1, of so many steps."""
    counts = range((number - 1) * steps + 1, number * steps + 1)
    due = [due_after(strategy, "steps", count) for count in counts]
    return sum(due) + due_after(strategy, "rounds", number)


def crossed(
    traffic: Sequence[Traffic], counts: Sequence[npt.NDArray], averages: int
) -> Bytes:
    """What crosses all links in a round.

    Args:
      traffic: of the clients of each group.
      counts: real samples in each slot, ``[S]`` a group; none where nobody takes part.
      averages: how often layers are averaged.
    """
    each = [
        one.total(int(np.sum(count)), averages * int(np.sum(count > 0)))
        for one, count in zip(traffic, counts, strict=True)
    ]
    return Bytes(*map(sum, zip(*each, strict=True)))


def by_cut(
    traffic: Sequence[Traffic],
    shares: Sequence[Share],
    *,
    batch_size: int,
    averages: float,
) -> list[dict[str, Any]]:
    """What crosses the link of a client of each cut, in a step and in a round.

    Args:
      traffic: of the clients of each group.
      shares: of all clients; a round's figures are the mean over those of the cut.
      batch_size: samples in a step.
      averages: how often layers are averaged in a round.
    """
    samples = {
        one.cut: [share.samples for share in shares if share.cut == one.cut]
        for one in traffic
    }
    return [
        {
            "cut": one.cut,
            "step": one.total(batch_size, 0)._asdict(),
            "round": one.total(float(np.mean(samples[one.cut])), averages)._asdict(),
        }
        for one in traffic
    ]
