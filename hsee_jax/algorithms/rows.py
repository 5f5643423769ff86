"""The rows of all clients on their way through one server, where they join by depth."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.trees import expand_like, select
from hsee_jax.core.types import Array, Batch, Metrics, PyTree
from hsee_jax.federation.branch import Branch, BranchSpec, LayerState
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


def are_finite(batch: Batch) -> Array:
    """Return whether the real rows of each client are finite, ``bool [S]``."""
    fine = finite_views(batch.inputs, batch.mask)
    return jnp.all(fine == batch.mask, axis=1)


def without(batch: Batch, fine: Array) -> Batch:
    """Make padding of the rows of clients that are not fine, and set all padding to 0.

    Behind a BatchNorm the features of an absent client are NaN; with them, the gradient
    of the whole batch would be NaN.
    """
    mask = batch.mask & fine[:, None]
    inputs = jnp.where(expand_like(mask, batch.inputs), batch.inputs, 0)
    return batch._replace(inputs=inputs, mask=mask)


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
            {"params": part.params, "batch_stats": part.batch_stats},
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


def decode_rows(spec: BranchSpec, message: Batch) -> Batch:
    """Decode the messages of a group's clients, ``[S, B, ...]``."""
    return message._replace(inputs=jax.vmap(partial(decode, spec))(message.inputs))


def reported(metrics: Metrics, batch: Batch, refused: Array) -> Metrics:
    """Return a group's metrics, with a loss of NaN for clients without a step."""
    count = jnp.sum(batch.mask, axis=1, dtype=jnp.int32)
    loss_sum = jnp.where(refused & (count > 0), jnp.nan, metrics.loss_sum)
    return Metrics(loss_sum, metrics.correct, count)


def of_own_mean(gradient: Array, own: Array, total: Array, refused: Array) -> Array:
    """Scale gradients of the mean loss of all rows to the mean of each client's rows.

    Args:
      gradient: ``[S, ...]``.
      own: real rows of each client, ``int32 [S]``.
      total: real rows of all clients, ``int32 []``.
      refused: ``bool [S]``; these clients get NaN.
    """
    scale = total.astype(jnp.float32) / jnp.maximum(own, 1).astype(jnp.float32)
    scale = jnp.where(refused, jnp.nan, scale).astype(gradient.dtype)
    return gradient * expand_like(scale, gradient)
