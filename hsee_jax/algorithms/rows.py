"""The rows of all clients on their way through one server, where they join by depth."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.trees import expand_like, select
from hsee_jax.core.types import Array, Batch, Metrics, PyTree
from hsee_jax.federation.branch import Branch, BranchSpec, LayerState, variables_of
from hsee_jax.federation.crossing import decode
from hsee_jax.federation.junction import finite_views


class Rows(NamedTuple):
    """The rows that arrive at a layer of the server."""

    means: Array  # [k, ...]: over clients, of the first rows of their batches
    weights: Array  # float32 [k]: the number of clients in each mean
    own: Array  # [R, ...]: each of one client
    mask: Array  # bool [R]


class ServedRows(NamedTuple):
    """The result of a server's step on the rows of all clients."""

    server: Branch
    metrics: tuple[Metrics, ...]  # of each group, leaves [S]
    gradients: tuple[Array, ...]  # of each group's features, [S, B, ...]


# (server, a message a group with leaves [S, B, ...], the server's rate) -> the result
ServeRowsFn = Callable[[Branch, tuple[Batch, ...], Array], ServedRows]


def take_messages(spec: BranchSpec, message: Batch) -> tuple[Batch, Array]:
    """Decode the messages of a group, without those of clients that are not finite.

    Their rows become padding, and all padding 0. Behind a BatchNorm the features of an
    absent client are NaN; with them, the gradient of the whole batch would be NaN.

    Args:
      spec: of the server behind the clients.
      message: inputs encoded, leaves ``[S, B, ...]``.

    Returns:
      The rows, and whether the real ones of each client were finite, ``bool [S]``.
    """
    inputs = jax.vmap(partial(decode, spec))(message.inputs)
    fine = jnp.all(finite_views(inputs, message.mask) == message.mask, axis=1)
    mask = message.mask & fine[:, None]
    inputs = jnp.where(expand_like(mask, inputs), inputs, 0)
    return message._replace(inputs=inputs, mask=mask), fine


def rows_of(features: Array, mask: Array, first: int) -> Rows:
    """Return a group's rows, with the ``first`` of each batch as means over clients.

    The other rows are in order of their place in the batch, then of the client, since
    devices share the rows of a batch.

    Args:
      features: ``[S, B, ...]``.
      mask: ``bool [S, B]``.
      first: k, the number of means.
    """
    shared, there = features[:, :first], mask[:, :first]
    weights = jnp.sum(there, axis=0, dtype=jnp.float32)
    real = jnp.where(expand_like(there, shared), shared, 0).astype(jnp.float32)
    means = jnp.sum(real, axis=0) / expand_like(jnp.maximum(weights, 1.0), real[0])
    own, own_mask = (jnp.swapaxes(leaf[:, first:], 0, 1) for leaf in (features, mask))
    return Rows(
        means.astype(features.dtype),
        weights,
        own.reshape(-1, *features.shape[2:]),
        own_mask.reshape(-1),
    )


def joined(one: Rows, other: Rows) -> Rows:
    """Add the rows of other clients: merge the means by weight, and append the rest."""
    weights = one.weights + other.weights
    share = expand_like(other.weights / jnp.maximum(weights, 1.0), one.means)
    means = one.means + share.astype(one.means.dtype) * (other.means - one.means)
    own = jnp.concatenate([one.own, other.own])
    return Rows(means, weights, own, jnp.concatenate([one.mask, other.mask]))


def forward_rows(
    spec: BranchSpec, parts: tuple[LayerState, ...], joining: dict[int, Rows]
) -> tuple[Rows, tuple[PyTree, ...], list[Array]]:
    """Run the server's layers and its head on rows that join at their depth.

    Args:
      spec: of the server.
      parts: its layers and its head.
      joining: the rows that join before a layer, by its index; 0 must be there.

    Returns:
      The logits as rows, the new batch statistics, and for each part whether rows came
      to it.
    """
    rows = joining[0]
    stats: list[PyTree] = []
    seen: list[Array] = []
    for depth, (stage, part) in enumerate(
        zip((*spec.stages, spec.head), parts, strict=True)
    ):
        if depth in joining and depth > 0:
            rows = joined(rows, joining[depth])
        count = len(rows.means)
        mask = jnp.concatenate([rows.weights > 0, rows.mask])
        some = jnp.any(mask)
        values, new = stage.apply(
            variables_of(part),
            jnp.concatenate([rows.means, rows.own]),
            mask | ~some,  # without a real row the statistics would be NaN
            train=True,
        )
        rows = rows._replace(means=values[:count], own=values[count:])
        stats.append(select(some, new, part.batch_stats))
        seen.append(some)
    return rows, tuple(stats), seen


def by_client(values: Array, masks: list[Array]) -> list[Array]:
    """Split rows into groups ``[S, B, ...]`` by their masks; invert `rows_of`."""
    found, start = [], 0
    for mask in masks:
        part = values[start : start + mask.size]
        part = part.reshape(*mask.shape[::-1], *values.shape[1:])
        found.append(jnp.swapaxes(part, 0, 1))
        start += mask.size
    return found


def served_rows(
    server: Branch,
    messages: Sequence[Batch],
    fine: Sequence[Array],
    metrics: Sequence[Metrics],
    gradients: Sequence[Array],
    total: Metrics,
) -> ServedRows:
    """Return the result of a step; NaN for clients that are not to take theirs.

    Args:
      server: after the step.
      messages: of each group, with the masks of all rows that were sent.
      fine: of each group, see `take_messages`.
      metrics: of each group's rows that took part, leaves ``[S]``.
      gradients: of the mean loss of all rows, by each group's features ``[S, B, ...]``;
        a client gets that of the mean of its own.
      total: of all rows, with a loss of NaN if the server refused the step.
    """
    found, scaled = [], []
    for batch, ok, own, gradient in zip(
        messages, fine, metrics, gradients, strict=True
    ):
        refused = ~ok | jnp.isnan(total.loss_sum)
        count = jnp.sum(batch.mask, axis=1, dtype=jnp.int32)
        loss_sum = jnp.where(refused & (count > 0), jnp.nan, own.loss_sum)
        found.append(Metrics(loss_sum, own.correct, count))
        rows = jnp.maximum(own.count, 1).astype(jnp.float32)
        times = total.count.astype(jnp.float32) / rows
        times = jnp.where(refused, jnp.nan, times).astype(gradient.dtype)
        scaled.append(gradient * expand_like(times, gradient))
    return ServedRows(server, tuple(found), tuple(scaled))
