"""What crosses the links between clients and server, in bytes.

With each sample its features go up, in the form of the link, and its label; with a
joint boundary the gradient of the features comes down, in the dtype of the computation.
Every step counts the bytes of its message. Whenever layers of clients are averaged, the
clients that take part in the round send theirs up and get the mean, of the same size.
What an absent client receives later, and the bookkeeping, are not counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import ExitMetrics, PyTree
from hsee_jax.data.partition import Share
from hsee_jax.engine.round import due_after
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState, split_stacks
from hsee_jax.federation.strategy import Strategy
from hsee_jax.link.codecs import Codec, sample_bytes, unpack_bytes
from hsee_jax.nn.model import layer_inputs


class Bytes(NamedTuple):
    """Bytes in both directions."""

    up_bytes: float
    down_bytes: float


class Traffic(NamedTuple):
    """What crosses the link of a client of one cut."""

    cut: int
    sample: Bytes  # of a sample in training; of its first message if the size varies
    weights: int  # bytes each way, whenever layers are averaged

    def total(self, samples: float, averages: float) -> Bytes:
        """Return the bytes of some samples, and of some averages."""
        up, down = self.sample
        weights = averages * self.weights
        return Bytes(samples * up + weights, samples * down + weights)


def nbytes(tree: PyTree) -> int:
    """Return the bytes of all arrays of a tree, or of their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def training_bytes(
    features: jax.ShapeDtypeStruct, codec: Codec, boundary: str
) -> Bytes:
    """Return what crosses the link for a sample in training.

    Args:
      features: of the sample, ``[1, ...]``.
      codec: of the link.
      boundary: see `Strategy`.
    """
    if boundary == "none":
        return Bytes(0, 0)
    label = nbytes(jax.ShapeDtypeStruct((1,), jnp.int32))
    gradient = nbytes(features) if boundary == "joint" else 0
    return Bytes(sample_bytes(codec, features) + label, gradient)


def traffic_of(
    federation: Federation, strategy: Strategy, state: RunState
) -> tuple[Traffic, ...]:
    """Return the traffic of a client of each group.

    Args:
      federation: the clients.
      strategy: how they train.
      state: of any number of clients a group; shapes are enough.
    """
    features = layer_inputs(federation.model)
    messages = jax.eval_shape(strategy.messages, state)
    sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in state.clients]
    return tuple(
        Traffic(
            group.cut,
            training_bytes(features[group.cut], federation.codec, strategy.boundary),
            nbytes(message) // size,
        )
        for group, message, size in zip(federation.groups, messages, sizes, strict=True)
    )


def averages_in(strategy: Strategy, number: int, steps: int) -> int:
    """Return how often layers are averaged in a round.

    Args:
      strategy: how the clients train.
      number: of the round, from 1.
      steps: of each round.
    """
    counts = range((number - 1) * steps + 1, number * steps + 1)
    due = [due_after(strategy, "steps", count) for count in counts]
    return sum(due) + due_after(strategy, "rounds", number)


def round_bytes(
    traffic: Sequence[Traffic],
    slots: Sequence[int],
    metrics: ExitMetrics,
    averages: int,
) -> Bytes:
    """Return what crosses all links in a round.

    Args:
      traffic: of the clients of each group.
      slots: of each group in the round; N in all.
      metrics: of the round, leaves ``[N, ...]``.
      averages: how often layers are averaged.
    """
    up, down = unpack_bytes(np.asarray(metrics.link)).sum(axis=0).tolist()
    present = [int(np.sum(c > 0)) for c in split_stacks(metrics.exit.count, slots)]
    pairs = zip(traffic, present, strict=True)
    weights = averages * sum(one.weights * count for one, count in pairs)
    return Bytes(up + weights, down + weights)


def bytes_by_cut(
    traffic: Sequence[Traffic],
    shares: Sequence[Share],
    *,
    batch_size: int,
    averages: float,
) -> list[dict[str, Any]]:
    """Return what crosses the link of a client of each cut, in a step and in a round.

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
