"""Reducers of a layer's holders to one: the mean, and two that withstand outliers.

The coordinate-wise median and trimmed mean are those of Yin, Chen, Ramchandran and
Bartlett (ICML 2018, arXiv:1803.01498), here over the holders of a layer that take part.
Their number differs from layer to layer and from round to round [ours].
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hsee_jax.core.errors import UserError
from hsee_jax.core.registry import Registry
from hsee_jax.core.trees import expand_like
from hsee_jax.core.types import Array, PyTree


class ReduceFn(Protocol):
    """Reduces the states of a layer's holders to one."""

    def __call__(
        self, holders: Sequence[PyTree], weights: Sequence[Array], axis_name: str | None
    ) -> PyTree:
        """Reduce each leaf over all holders.

        Args:
          holders: a tree for each group, leaves ``[G, ...]``.
          weights: ``float32 [G]`` for each group; a holder of weight 0 is absent, and
            its leaves may hold anything, even NaN.
          axis_name: the mesh axis over which further holders are spread.

        Returns:
          Leaves ``float32 [...]``, of any value if all holders are absent.
        """


class Reducer(NamedTuple):
    """A way to reduce."""

    reduce: ReduceFn
    weighted: bool  # else the weights only say who takes part


# Factories take the share to trim.
REDUCERS: Registry[Reducer] = Registry("aggregate", with_options=False, pure=True)


@REDUCERS.register(summary="by weight")
def mean(trim_share: float) -> Reducer:
    """Take the weighted mean."""
    _refuse_share("mean", trim_share)
    return Reducer(weighted_mean, weighted=True)


@REDUCERS.register(summary="of what is left without the extremes of each number")
def trimmed_mean(trim_share: float) -> Reducer:
    """Leave out the share's part of the holders at each end, and take the mean.

    Args:
      trim_share: more than 0 and less than 0.5; of H holders ``int(trim_share * H)``
        are left out at each end.
    """
    if not 0 < trim_share < 0.5:
        raise UserError(
            f"trim_share: {trim_share} is not allowed with aggregate trimmed_mean; "
            "allowed is more than 0, less than 0.5"
        )
    return Reducer(_by_order(partial(_trimmed, share=trim_share)), weighted=False)


@REDUCERS.register(summary="of each number")
def median(trim_share: float) -> Reducer:
    """Take the median; of an even number of holders, the mean of the middle two."""
    _refuse_share("median", trim_share)
    return Reducer(_by_order(_median), weighted=False)


def weight_sum(weights: Sequence[Array], axis_name: str | None) -> Array:
    """Return the sum ``float32 []`` of the weights of all holders."""
    total = sum(map(jnp.sum, weights[1:]), jnp.sum(weights[0]))
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def weighted_mean(
    holders: Sequence[PyTree], weights: Sequence[Array], axis_name: str | None
) -> PyTree:
    """Reduce by the weighted mean; see `ReduceFn`."""
    total = weight_sum(weights, axis_name)
    shares = [weight / jnp.where(total > 0, total, 1.0) for weight in weights]

    def weighted_sum(*leaves: Array) -> Array:
        # Accelerators would round the weights of a product to 8 or 10 bits.
        dot = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        parts = [
            dot(share, _only(share > 0, leaf.astype(jnp.float32), 0.0))
            for share, leaf in zip(shares, leaves, strict=True)
        ]
        return sum(parts[1:], parts[0])

    means = jax.tree.map(weighted_sum, *holders)
    return means if axis_name is None else jax.lax.psum(means, axis_name)


def _by_order(reduce_rows: Callable[[Array, Array], Array]) -> ReduceFn:
    """Reduce by the order of the holders in each number.

    Args:
      reduce_rows: takes rows ``float32 [H, ...]`` in ascending order, and the number
        ``int32 []`` of rows at the beginning that belong to holders that take part.
    """

    def reduce(
        holders: Sequence[PyTree], weights: Sequence[Array], axis_name: str | None
    ) -> PyTree:
        present = _gather([weight > 0 for weight in weights], axis_name)

        def reduce_leaf(*leaves: Array) -> Array:
            rows = _gather([leaf.astype(jnp.float32) for leaf in leaves], axis_name)
            ordered = jnp.sort(_only(present, rows, jnp.nan), axis=0)  # NaN is last
            return reduce_rows(ordered, jnp.sum(present))

        return jax.tree.map(reduce_leaf, *holders)

    return reduce


def _gather(parts: Sequence[Array], axis_name: str | None) -> Array:
    """Concatenate the rows of all groups, on each device those of all devices."""
    rows = jnp.concatenate(parts)
    if axis_name is None:
        return rows
    return jax.lax.all_gather(rows, axis_name, tiled=True)


def check_trimmed(share: float, holders: int, who: str) -> None:
    """Refuse a share of holders to trim that is less than one of them.

    Args:
      share: 0 for no trimming.
      holders: of a mean.
      who: the holders, for the error.

    Raises:
      UserError: the mean would never leave out a holder.
    """
    if share and num_trimmed(share, holders) == 0:
        least = math.ceil(1e4 / holders) / 1e4
        allowed = f"is {least:g} or more, less than 0.5"
        raise UserError(
            f"trim_share: {share} of {who} is less than one; allowed "
            f"{allowed if least < 0.5 else 'are 3 clients or more'}"
        )


def num_trimmed(share: float, holders: int) -> int:
    """Return how many holders a trimmed mean leaves out at each end; some are left."""
    rounded = int(round(share * holders, 6))  # 0.29 of 100 are 29, and not 28.99...
    return min(rounded, max(holders - 1, 0) // 2)


def _median(ordered: Array, count: Array) -> Array:
    low, high = (count - 1) // 2, count // 2
    one, other = ordered[low], ordered[high]
    return jnp.where(low == high, one, (one + other) / 2)


def _trimmed(ordered: Array, count: Array, *, share: float) -> Array:
    size = ordered.shape[0]
    cuts = [num_trimmed(share, n) for n in range(size + 1)]
    cut = jnp.asarray(cuts, count.dtype)[count]
    place = jnp.arange(size, dtype=count.dtype)
    kept = (place >= cut) & (place < count - cut)
    divisor = jnp.maximum(count - 2 * cut, 1).astype(jnp.float32)
    return jnp.sum(_only(kept, ordered, 0.0), axis=0) / divisor


def _only(chosen: Array, rows: Array, other: float) -> Array:
    """Set the rows that are not chosen, ``bool [G]``, to a number."""
    return jnp.where(expand_like(chosen, rows), rows, other)


def _refuse_share(name: str, trim_share: float) -> None:
    if trim_share:
        raise UserError(
            f"trim_share: {trim_share} has no effect on aggregate {name}; it is read "
            "by trimmed_mean"
        )
