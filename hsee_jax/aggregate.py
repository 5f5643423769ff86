"""The cross-layer mean: each layer is averaged over the branches that hold it.

The branches of one cut are stacked, so a layer's holders come as a few groups, each
with a leading axis. The paper says that server layers are aggregated across clients;
what is done with BatchNorm and optimizer state, and the weights, are our choices.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from hsee_jax.base import Array, PyTree
from hsee_jax.split import LayerState


def average_layer(
    holders: Sequence[LayerState],
    weights: Sequence[Array],
    *,
    optimizer: optax.GradientTransformation,
    batch_norm: str = "average",
    optimizer_state: str = "keep",
) -> list[LayerState]:
    """Gives every holder of one layer the weighted mean of all.

    Args:
      holders: one state a group, leaves ``[G, ...]``.
      weights: ``float32 [G]`` for each group, not normalised. A holder of weight 0
        receives the mean without taking part in it. If all are 0, nothing changes.
      optimizer: the one whose state the layers carry.
      batch_norm: ``"average"``: parameters and statistics of BatchNorm as everything
        else; ``"keep_local"``: each holder keeps its own (FedBN, Li et al., ICLR 2021).
      optimizer_state: ``"keep"`` each its own, ``"average"``, or ``"reset"``.

    Returns:
      The new states, in the order of ``holders``.
    """
    chex.assert_rank(list(weights), 1)
    total = sum(jnp.sum(w) for w in weights)
    some = total > 0
    shares = [w / jnp.where(some, total, 1.0) for w in weights]

    def mean(local: bool, *leaves: Array) -> tuple[Array, ...]:
        if local:
            return leaves
        parts = [
            jnp.tensordot(share, leaf.astype(jnp.float32), 1)
            for share, leaf in zip(shares, leaves, strict=True)
        ]
        value = sum(parts[1:], parts[0])
        if jnp.issubdtype(leaves[0].dtype, jnp.integer):
            value = jnp.round(value)
        value = value.astype(leaves[0].dtype)
        return tuple(
            jnp.where(some, jnp.broadcast_to(value, leaf.shape), leaf)
            for leaf in leaves
        )

    def mean_tree(local: PyTree, trees: list[PyTree]) -> list[PyTree]:
        structure = jax.tree.structure(trees[0])
        columns = map(mean, jax.tree.leaves(local), *map(jax.tree.leaves, trees))
        rows = list(zip(*columns, strict=True)) or [()] * len(trees)
        return [jax.tree.unflatten(structure, row) for row in rows]

    first = holders[0]
    keep = batch_norm == "keep_local"
    local_stats = jax.tree.map(lambda _: keep, first.batch_stats)
    local_params = jax.tree.map(
        lambda is_norm: keep and is_norm, batch_norm_params(first)
    )
    params = mean_tree(local_params, [h.params for h in holders])
    stats = mean_tree(local_stats, [h.batch_stats for h in holders])
    states = [h.opt_state for h in holders]
    if optimizer_state == "average":
        local_states = optax.tree_map_params(
            optimizer,
            lambda _, local: local,
            first.opt_state,
            local_params,
            transform_non_params=lambda _: False,
        )
        states = mean_tree(local_states, states)
    elif optimizer_state == "reset":
        fresh = [jax.vmap(optimizer.init)(p) for p in params]
        states = [
            jax.tree.map(lambda new, old: jnp.where(some, new, old), *pair)
            for pair in zip(fresh, states, strict=True)
        ]
    return [LayerState(*parts) for parts in zip(params, stats, states, strict=True)]


def batch_norm_params(layer: LayerState) -> PyTree:
    """True on the parameters of modules that also have batch statistics."""
    norms = {
        path[:-1]
        for path, _ in jax.tree_util.tree_flatten_with_path(layer.batch_stats)[0]
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[:-1] in norms, layer.params
    )
