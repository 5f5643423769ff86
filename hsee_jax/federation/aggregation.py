"""The cross-layer mean: each layer is averaged over the branches that hold it.

The branches of one cut are stacked, so a layer's holders come as a few groups, each
with a leading axis. A server computes `layer_mean` and sends it; `receive` applies it
to a holder, at once or, if the holder is absent, when it comes back. The paper says
that server layers are aggregated across clients; the weights and the treatment of
BatchNorm and optimizer state are our choices.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from hsee_jax.core.errors import unknown
from hsee_jax.core.trees import select
from hsee_jax.core.types import Array, PyTree
from hsee_jax.federation.branch import LayerState
from hsee_jax.federation.reduction import ReduceFn, weight_sum, weighted_mean
from hsee_jax.optim.optimizers import OptimizerLike, as_optimizer

_BATCH_NORMS = ("average", "keep_local")


class LayerMean(struct.PyTreeNode):
    """The mean of a layer; leaves are float32, without a leading axis."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree  # None in place of the leaves that each holder keeps
    round: Array  # int32 []: number of its round, from 1; 0 if no holder took part


def layer_mean(
    holders: Sequence[LayerState],
    weights: Sequence[Array],
    *,
    number: Array,
    optimizer: OptimizerLike,
    axis_name: str | None = None,
    reduce: ReduceFn = weighted_mean,
) -> LayerMean:
    """Compute the mean over the holders of one layer.

    Args:
      holders: a state for each group, leaves ``[G, ...]``.
      weights: ``float32 [G]`` for each group, not normalised.
      number: ``int32 []``, the number of the round, from 1.
      optimizer: its rule chooses the leaves of its state that are averaged.
      axis_name: the mesh axis over which further holders are spread.
      reduce: computes the mean of the parameters, the batch statistics and the shared
        leaves of the optimizer's state; by default the mean by weight.
    """
    chex.assert_rank(list(weights), 1)
    averaged = [
        (h.params, h.batch_stats, shared_state(optimizer, h.opt_state)) for h in holders
    ]
    params, batch_stats, opt_state = reduce(averaged, weights, axis_name)
    some = weight_sum(weights, axis_name) > 0
    return LayerMean(params, batch_stats, opt_state, jnp.where(some, number, 0))


def shared_state(optimizer: OptimizerLike, opt_state: PyTree) -> PyTree:
    """Keep the averaged leaves of an optimizer's state, and replace others by None."""
    return jax.tree.map(
        lambda leaf, shared: leaf if shared else None,
        opt_state,
        as_optimizer(optimizer).merge.shared(opt_state),
    )


def receive(
    layer: LayerState,
    mean: LayerMean,
    since: Array,
    *,
    optimizer: OptimizerLike,
    batch_norm: str = "average",
) -> LayerState:
    """Apply a mean to a holder's layer.

    Args:
      layer: the holder's state.
      mean: the mean of this layer.
      since: ``int32 []``, the round of the holder's state; only a mean of a later round
        changes it.
      optimizer: its rule makes the new optimizer state.
      batch_norm: with ``"average"`` BatchNorm is averaged like the rest; with
        ``"keep_local"`` each holder keeps its own parameters, statistics and optimizer
        state of BatchNorm (FedBN, Li et al., ICLR 2021).

    Raises:
      UserError: ``batch_norm`` is neither.
    """
    later = mean.round > since
    common = common_leaves(layer, optimizer, batch_norm)

    def take(own: Array, new: Array, common: bool = True) -> Array:
        return jnp.where(later, _cast(new, own), own) if common else own

    params = jax.tree.map(take, layer.params, mean.params, common.params)
    batch_stats = jax.tree.map(
        take, layer.batch_stats, mean.batch_stats, common.batch_stats
    )
    with_means = jax.tree.map(
        lambda own, new: own if new is None else _cast(new, own),
        layer.opt_state,
        mean.opt_state,
    )
    rule = as_optimizer(optimizer).merge
    merged = rule.merge(layer.params, params, with_means)
    changes = jax.tree.map(lambda own: own or rule.local_too, common.opt_state)
    opt_state = jax.tree.map(take, layer.opt_state, merged, changes)
    return LayerState(params, batch_stats, opt_state)


def _cast(new: Array, like: Array) -> Array:
    """Cast a mean to the dtype of a leaf, and round it for an integer."""
    if jnp.issubdtype(like.dtype, jnp.integer):
        new = jnp.round(new) if jnp.issubdtype(new.dtype, jnp.floating) else new
    return new.astype(like.dtype)


def message(
    layer: LayerState, *, optimizer: OptimizerLike, batch_norm: str = "average"
) -> list[Array]:
    """Return the arrays that a holder sends for a mean; it gets as many back.

    Args:
      layer: the holder's state.
      optimizer: see `receive`.
      batch_norm: see `receive`.
    """
    common = common_leaves(layer, optimizer, batch_norm)
    shared = as_optimizer(optimizer).merge.shared(layer.opt_state)
    both = jax.tree.map(lambda a, b: a and b, common.opt_state, shared)
    common = common.replace(opt_state=both)
    leaves = zip(jax.tree.leaves(layer), jax.tree.leaves(common), strict=True)
    return [leaf for leaf, is_common in leaves if is_common]


def common_leaves(
    layer: LayerState, optimizer: OptimizerLike, batch_norm: str
) -> LayerState:
    """Mark the leaves that a mean may change; the others are the holder's own."""
    if batch_norm not in _BATCH_NORMS:
        raise unknown("batch_norm", batch_norm, _BATCH_NORMS)
    keep = batch_norm == "keep_local"
    params = jax.tree.map(
        lambda is_norm: not (keep and is_norm), batch_norm_params(layer)
    )
    batch_stats = jax.tree.map(lambda _: not keep, layer.batch_stats)
    # An optimizer such as muon keeps no value for some parameters.
    opt_state = optax.tree_map_params(
        optimizer,
        lambda own, common: own if _is_masked(own) else common,
        layer.opt_state,
        params,
        transform_non_params=lambda _: True,
        is_leaf=_is_masked,
    )
    return LayerState(params, batch_stats, opt_state)


def _is_masked(node: PyTree) -> bool:
    return isinstance(node, optax.MaskedNode)


def newest(old: PyTree, new: PyTree) -> PyTree:
    """Choose the newer mean of each layer from two trees of `LayerMean`."""

    def choose(old: LayerMean, new: LayerMean) -> LayerMean:
        return select(new.round > 0, new, old)

    return jax.tree.map(
        choose, old, new, is_leaf=lambda node: isinstance(node, LayerMean)
    )


def batch_norm_params(layer: LayerState) -> PyTree:
    """Mark the parameters of modules that also have batch statistics."""
    norms = {
        path[:-1]
        for path, _ in jax.tree_util.tree_flatten_with_path(layer.batch_stats)[0]
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[:-1] in norms, layer.params
    )
