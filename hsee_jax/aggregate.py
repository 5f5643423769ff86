"""The cross-layer mean: each layer is averaged over the branches that hold it.

The branches of one cut are stacked, so a layer's holders come as a few groups, each
with a leading axis. `layer_mean` is what a server computes and sends, `receive` what a
holder makes of it, now or, if it is absent, when it comes back. The paper says that
server layers are aggregated across clients; what is done with BatchNorm and optimizer
state, and the weights, are our choices.
"""

from collections.abc import Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from hsee_jax.base import Array, PyTree
from hsee_jax.split import LayerState


class LayerMean(struct.PyTreeNode):
    """The mean of a layer; leaves are float32, without a leading axis."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree  # None unless it is averaged
    round: Array  # int32 []: of which it is, counted from 1; 0: it is of nobody


def layer_mean(
    holders: Sequence[LayerState],
    weights: Sequence[Array],
    *,
    round: Array,
    optimizer_state: str = "keep",
    axis_name: str | None = None,
) -> LayerMean:
    """The weighted mean over the holders of one layer.

    Args:
      holders: one state a group, leaves ``[G, ...]``.
      weights: ``float32 [G]`` for each group, not normalised.
      round: ``int32 []``, the number of the round, from 1.
      optimizer_state: its mean is taken if this is ``"average"``.
      axis_name: the mesh axis over which further holders are spread.
    """
    chex.assert_rank(list(weights), 1)
    total = sum(map(jnp.sum, weights[1:]), jnp.sum(weights[0]))
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    some = total > 0
    shares = [weight / jnp.where(some, total, 1.0) for weight in weights]

    def weighted_sum(*leaves: Array) -> Array:
        # Accelerators would round the weights of a product to 8 or 10 bits.
        dot = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        parts = [
            dot(share, _counted(leaf.astype(jnp.float32), share))
            for share, leaf in zip(shares, leaves, strict=True)
        ]
        return sum(parts[1:], parts[0])

    averaged = [
        (h.params, h.batch_stats, h.opt_state if optimizer_state == "average" else None)
        for h in holders
    ]
    means = jax.tree.map(weighted_sum, *averaged)
    if axis_name is not None:
        means = jax.lax.psum(means, axis_name)
    params, batch_stats, opt_state = means
    return LayerMean(params, batch_stats, opt_state, jnp.where(some, round, 0))


def _counted(leaf: Array, share: Array) -> Array:
    """The rows with a share; others may hold anything, even what is not finite."""
    return jnp.where(share.reshape(-1, *(1,) * (leaf.ndim - 1)) > 0, leaf, 0.0)


def receive(
    layer: LayerState,
    mean: LayerMean,
    since: Array,
    *,
    optimizer: optax.GradientTransformation,
    batch_norm: str = "average",
    optimizer_state: str = "keep",
) -> LayerState:
    """What one holder makes of a mean.

    Args:
      layer: the holder's state.
      mean: of its layer.
      since: ``int32 []``, the round that the holder's state is of; a mean that is not
        of a later one changes nothing.
      optimizer: the one whose state the layer carries.
      batch_norm: ``"average"``: parameters and statistics of BatchNorm as everything
        else; ``"keep_local"``: each holder keeps its own (FedBN, Li et al., ICLR 2021).
      optimizer_state: ``"keep"`` each its own, ``"average"``, or ``"reset"``.
    """
    later = mean.round > since
    common = _common(layer, optimizer, batch_norm, optimizer_state)

    def take(own: Array, new: Array, common: bool = True) -> Array:
        if not common:
            return own
        if jnp.issubdtype(own.dtype, jnp.integer):
            new = jnp.round(new)
        return jnp.where(later, new.astype(own.dtype), own)

    params = jax.tree.map(take, layer.params, mean.params, common.params)
    batch_stats = jax.tree.map(
        take, layer.batch_stats, mean.batch_stats, common.batch_stats
    )
    opt_state = layer.opt_state
    if optimizer_state == "average":
        opt_state = jax.tree.map(take, opt_state, mean.opt_state, common.opt_state)
    elif optimizer_state == "reset":
        opt_state = jax.tree.map(take, opt_state, optimizer.init(params))
    return LayerState(params, batch_stats, opt_state)


def sent(
    layer: LayerState,
    *,
    optimizer: optax.GradientTransformation,
    batch_norm: str = "average",
    optimizer_state: str = "keep",
) -> list[Array]:
    """What a holder sends for a mean, and what it gets back has the same shapes.

    Args:
      layer: the holder's state.
      optimizer: see `receive`.
      batch_norm: see `receive`.
      optimizer_state: see `receive`.
    """
    common = _common(layer, optimizer, batch_norm, optimizer_state)
    leaves = zip(jax.tree.leaves(layer), jax.tree.leaves(common), strict=True)
    return [leaf for leaf, is_common in leaves if is_common]


def _common(
    layer: LayerState,
    optimizer: optax.GradientTransformation,
    batch_norm: str,
    optimizer_state: str,
) -> LayerState:
    """True on what is averaged, false on what each holder has of its own."""
    keep = batch_norm == "keep_local"
    params = jax.tree.map(
        lambda is_norm: not (keep and is_norm), batch_norm_params(layer)
    )
    batch_stats = jax.tree.map(lambda _: not keep, layer.batch_stats)
    opt_state = jax.tree.map(lambda _: False, layer.opt_state)
    if optimizer_state == "average":
        opt_state = optax.tree_map_params(
            optimizer,
            lambda _, common: common,
            layer.opt_state,
            params,
            transform_non_params=lambda _: True,
        )
    return LayerState(params, batch_stats, opt_state)


def latest(old: PyTree, new: PyTree) -> PyTree:
    """Of two trees of `LayerMean`, each layer's newer one that is of somebody."""

    def choose(old: LayerMean, new: LayerMean) -> LayerMean:
        return jax.tree.map(lambda a, b: jnp.where(new.round > 0, b, a), old, new)

    return jax.tree.map(
        choose, old, new, is_leaf=lambda node: isinstance(node, LayerMean)
    )


def batch_norm_params(layer: LayerState) -> PyTree:
    """True on the parameters of modules that also have batch statistics."""
    norms = {
        path[:-1]
        for path, _ in jax.tree_util.tree_flatten_with_path(layer.batch_stats)[0]
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[:-1] in norms, layer.params
    )
