"""The traffic on the links between clients and server, in bytes.

For each sample its features, in the form of the link, and its label go up; with a joint
boundary the gradient of the features comes down, in the dtype of the computation unless
the codec says otherwise. Where exits learn from the server's logits, these come down,
too, as float32. Every step counts the bytes of its messages. Whenever layers of clients
are averaged, the clients that take part in the round send their layers up and get the
mean, of the same size. The means that an absent client receives later, and the
bookkeeping, do not count.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.algorithms.epsl import shared_rows_of
from hsee_jax.core.trees import nbytes
from hsee_jax.core.types import ExitMetrics
from hsee_jax.data.partition import Share
from hsee_jax.engine.round import due_after
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState, split_stacks
from hsee_jax.federation.strategy import Strategy
from hsee_jax.link.codecs import (
    FULL,
    Codec,
    sample_bytes,
    sample_bytes_of,
    unpack_bytes,
)
from hsee_jax.nn.model import Model, layer_inputs, logits_of


class Bytes(NamedTuple):
    """Bytes in both directions."""

    up_bytes: float
    down_bytes: float

    def plus(self, other: "Bytes") -> "Bytes":
        """Return the sums of both."""
        return Bytes(*map(sum, zip(self, other, strict=True)))


class Traffic(NamedTuple):
    """The traffic on the link of a client of one cut."""

    cut: int
    # Of a sample in training. If sizes vary over time, those of the first message
    # count; if clients differ, those of the client with the smallest messages.
    sample: Bytes
    weights: int  # bytes each way, whenever layers are averaged
    own: Mapping[int, Bytes] = MappingProxyType({})  # by id if clients differ

    def of(self, client: int) -> "Traffic":
        """Return the traffic of the client with this id."""
        return Traffic(self.cut, self.own.get(client, self.sample), self.weights)

    def take(self, clients: Sequence[int]) -> "Traffic":
        """Return the traffic of some clients, who get the ids 0, 1, ... in turn."""
        own = {i: self.own[old] for i, old in enumerate(clients) if old in self.own}
        return self._replace(own=own)

    def total(self, samples: float, gradients: float, averages: float) -> Bytes:
        """Return the bytes of some samples and some averages.

        Args:
          samples: the number of samples that go up.
          gradients: the number of those whose gradient comes down.
          averages: the number of averages.
        """
        up, down = self.sample
        weights = averages * self.weights
        return Bytes(samples * up + weights, gradients * down + weights)


def training_bytes(
    features: jax.ShapeDtypeStruct,
    codec: Codec,
    boundary: str,
    logits: jax.ShapeDtypeStruct | None = None,
) -> Bytes:
    """Return the bytes on the link for a sample in training.

    Args:
      features: the shape and dtype of the sample's features, ``[1, ...]``.
      codec: the codec of the link; where clients differ, the smallest messages count.
      boundary: see `Strategy`.
      logits: the server's logits of the sample, which come down; None for none.
    """
    if boundary == "none":
        return Bytes(0, 0)
    back = 0
    if boundary == "joint":
        back = sample_bytes(codec.gradient or FULL, features)
    return _with_labels(sample_bytes(codec, features), back, logits)


def feature_bytes(
    features: jax.ShapeDtypeStruct,
    codec: Codec,
    boundary: str,
    clients: Sequence[int],
) -> list[int]:
    """Return the bytes of the features of a sample on the link of each client.

    Args:
      features: see `training_bytes`.
      codec: see `training_bytes`.
      boundary: see `Strategy`; with ``"none"`` the features stay on the device.
      clients: the ids of the clients.
    """
    if boundary == "none":
        return [0] * len(clients)
    return sample_bytes_of(codec, features, clients)


def _own_bytes(
    features: jax.ShapeDtypeStruct,
    codec: Codec,
    boundary: str,
    logits: jax.ShapeDtypeStruct | None,
    clients: Sequence[int],
) -> dict[int, Bytes]:
    """Return `training_bytes` of each client, by its id; nothing if all are alike."""
    if boundary == "none" or codec.init_client is None:
        return {}
    back = [0] * len(clients)
    if boundary == "joint":
        back = sample_bytes_of(codec.gradient or FULL, features, clients)
    sizes = zip(sample_bytes_of(codec, features, clients), back, strict=True)
    each = (_with_labels(up, down, logits) for up, down in sizes)
    return dict(zip(clients, each, strict=True))


def _with_labels(up: int, down: int, logits: jax.ShapeDtypeStruct | None) -> Bytes:
    """Add the label that goes up, and the logits that come down."""
    label = nbytes(jax.ShapeDtypeStruct((1,), jnp.int32))
    return Bytes(up + label, down + nbytes(logits))


def logits_down(model: Model, strategy: Strategy) -> jax.ShapeDtypeStruct | None:
    """Return the server's logits of a sample if exits learn from them."""
    return logits_of(model) if strategy.distill else None


def traffic_of(
    federation: Federation, strategy: Strategy, state: RunState
) -> tuple[Traffic, ...]:
    """Return the traffic of the clients of each group.

    Args:
      federation: the clients.
      strategy: the algorithm.
      state: the state of any number of clients in each group; shapes are enough.
    """
    features, codec = layer_inputs(federation.model), federation.codec
    logits = logits_down(federation.model, strategy)
    messages = jax.eval_shape(strategy.messages, state)
    sizes = [jax.tree.leaves(stack)[0].shape[0] for stack in state.clients]
    return tuple(
        Traffic(
            group.cut,
            training_bytes(features[group.cut], codec, strategy.boundary, logits),
            nbytes(message) // size,
            _own_bytes(
                features[group.cut], codec, strategy.boundary, logits, group.ids
            ),
        )
        for group, message, size in zip(federation.groups, messages, sizes, strict=True)
    )


def averages_in(strategy: Strategy, number: int, steps: int) -> int:
    """Return how often a round averages layers.

    Args:
      strategy: the algorithm.
      number: the number of the round, from 1.
      steps: the steps of each round.
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
    """Return the bytes on all links in a round.

    Args:
      traffic: the traffic of a client of each group.
      slots: the slots of each group in the round; N in all.
      metrics: the metrics of the round, leaves ``[N, ...]``.
      averages: how often the round averages layers.
    """
    up, down = unpack_bytes(np.asarray(metrics.link)).sum(axis=0).tolist()
    present = [int(np.sum(c > 0)) for c in split_stacks(metrics.exit.count, slots)]
    pairs = zip(traffic, present, strict=True)
    weights = averages * sum(one.weights * count for one, count in pairs)
    return Bytes(up + weights, down + weights)


def gradient_rows(
    share: float, batch_size: int, clients: int, samples: int, largest: int
) -> float:
    """Return the rows of gradient that a server sends to a client in a round.

    A row for several clients is sent once, and counts for each of them in equal parts.
    Who has the most samples has every row that is shared, since all clients begin with
    whole batches.

    Args:
      share: the share of a batch whose gradient clients share, see `Strategy`.
      batch_size: samples in a batch, of which the last of a client may hold fewer.
      clients: how many clients share a gradient; all of them take part.
      samples: of the client.
      largest: the most samples of any of these clients.
    """
    most = shared_rows_of(share, batch_size)
    own, once = (
        count // batch_size * most + min(count % batch_size, most)
        for count in (samples, largest)
    )
    return samples - own + once / clients


def bytes_by_cut(
    traffic: Sequence[Traffic],
    shares: Sequence[Share],
    *,
    batch_size: int,
    averages: float,
    gradient_share: float = 0.0,
    labelled_only: bool = False,
) -> list[dict[str, Any]]:
    """Return the bytes on the link of a client of each cut, in a step and in a round.

    The bytes are means over the clients of the cut, which differ in their samples, and
    in the bytes of a sample if the codec treats them differently. In a step all of them
    have a whole batch, and in a round all of them take part.

    Args:
      traffic: the traffic of the clients of each group.
      shares: the samples of all clients.
      batch_size: samples in a step.
      averages: how often a round averages layers.
      gradient_share: see `gradient_rows`.
      labelled_only: whether only samples with labels cross the link; then a step has
        the mean number of them in a whole batch.

    Returns:
      For each cut a dictionary with ``cut``, and with ``up_bytes`` and ``down_bytes``
      in ``step`` and in ``round``.
    """
    found = []
    for one in traffic:
        members = [share for share in shares if share.cut == one.cut]
        own = [one.of(share.id) for share in members]
        samples = [
            sum(share.label_counts) if labelled_only else share.samples
            for share in members
        ]
        parts = [n / share.samples for n, share in zip(samples, members, strict=True)]
        rows = partial(gradient_rows, gradient_share, batch_size, len(members))
        whole = rows(batch_size, batch_size)
        steps = [
            each.total(part * batch_size, part * whole, averages=0)
            for each, part in zip(own, parts, strict=True)
        ]
        rounds = [
            each.total(count, rows(count, max(samples)), averages)
            for each, count in zip(own, samples, strict=True)
        ]
        means = {"step": _mean(steps), "round": _mean(rounds)}
        found.append({"cut": one.cut, **means})
    return found


def _mean(values: Sequence[Bytes]) -> dict[str, float]:
    return Bytes(*map(statistics.mean, zip(*values, strict=True)))._asdict()
