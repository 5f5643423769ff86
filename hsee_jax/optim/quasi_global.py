"""Quasi-global momentum (Lin, Karimireddy, Stich and Jaggi, arXiv:2102.04761).

Where labels differ between clients, a momentum of each client's own gradients points to
its own data. Here every holder keeps a buffer m_hat that changes only when its layer is
averaged, and follows the way from one mean to the next:

    in a step     m = beta m_hat + g             x <- x - rate m
    at a mean     d = (last mean - new mean) / (sum of the rates since the last mean)
                  m_hat <- mu m_hat + (1 - mu) d

The paper averages after every step; here many steps may lie between two means [ours].
Nothing but the parameters crosses a link. Other choices are ours as well. A holder that
took no step, or only steps of rate 0, takes the mean and keeps its buffer. Parameters
that are in no mean, such as a BatchNorm that stays local, count as their own mean. A
layer that is never averaged takes every step as a mean, as a single worker does.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.options import share
from hsee_jax.core.trees import select
from hsee_jax.core.types import Array, PyTree
from hsee_jax.optim.optimizers import (
    Decay,
    Merge,
    Momentum,
    Optimizer,
    add_decay,
    no_leaves,
    register,
)


class QuasiGlobalState(NamedTuple):
    """The buffer of a layer, and what its holder did since the last mean."""

    momentum: PyTree  # m_hat, float32 as the parameters
    moved: PyTree  # the parameters at the last mean, minus the current ones
    rates: Array  # float32 []: sum of the learning rates


@register(summary="momentum along the way of the means, for clients with unlike labels")
def qgm(
    *,
    momentum: Momentum = 0.9,
    buffer_momentum: Annotated[
        float, "share of the old quasi-global momentum in the new, when averaged", share
    ] = 0.9,
    weight_decay: Decay = 5e-4,
) -> Optimizer:
    """Build SGD with quasi-global momentum at rate 1; see this module for the rule."""

    def init(params: PyTree) -> QuasiGlobalState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return QuasiGlobalState(zeros, zeros, jnp.zeros((), jnp.float32))

    def buffer(old: PyTree, direction: PyTree) -> PyTree:
        return jax.tree.map(
            lambda m, d: buffer_momentum * m + (1 - buffer_momentum) * d, old, direction
        )

    def direction(grads: PyTree, state: QuasiGlobalState, params: PyTree) -> PyTree:
        grads = add_decay(grads, params, weight_decay)
        return jax.tree.map(lambda g, m: momentum * m + g, grads, state.momentum)

    def update(
        updates: PyTree,
        state: QuasiGlobalState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, QuasiGlobalState]:
        steps, rate = direction(updates, state, params), extra["learning_rate"]
        moved = jax.tree.map(lambda w, s: w + rate * s, state.moved, steps)
        return _negative(steps), state._replace(moved=moved, rates=state.rates + rate)

    def update_alone(
        updates: PyTree,
        state: QuasiGlobalState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, QuasiGlobalState]:
        # What a layer moved before it left the averages says nothing of a later mean.
        steps = direction(updates, state, params)
        kept = init(params)._replace(momentum=buffer(state.momentum, steps))
        return _negative(steps), kept

    def merge(old: PyTree, mean: PyTree, state: QuasiGlobalState) -> QuasiGlobalState:
        some = state.rates > 0
        rates = jnp.where(some, state.rates, 1.0)
        way = jax.tree.map(lambda o, w, n: (o + w - n) / rates, old, state.moved, mean)
        new = buffer(state.momentum, way)
        kept = select(some, new, state.momentum)
        return init(old)._replace(momentum=kept)

    rule = Merge(no_leaves, merge, local_too=True)
    return Optimizer(init, update, rule, update_alone)


def _negative(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.negative, tree)
