"""AMSGrad with client-specific rates, after FedLALR (Sun et al., arXiv:2309.09719).

Every holder divides its momentum by the root of the largest mean square that it has
seen, so that each parameter of each client has a learning rate of its own:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    v_hat <- max(v_hat, v)        x <- x - rate m / (sqrt(v_hat) + eps)

Where a layer is averaged, so are m and v_hat, which cross the link beside the weights;
v stays with its holder. There is no bias correction; `optax.amsgrad` corrects v before
the maximum, which keeps the largest value of another sequence.

The rule for averaging the moments is recalled, not read anew. Weight decay, decoupled
as in AdamW, is an addition [ours].
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.options import share
from hsee_jax.core.types import PyTree
from hsee_jax.optim.optimizers import (
    KEEP,
    Decay,
    Merge,
    Optimizer,
    add_decay,
    no_leaves,
    register,
)

_EPSILON = 1e-8


class AmsgradState(NamedTuple):
    """The moments of a layer's gradients, float32 as the parameters."""

    mean: PyTree  # m
    square: PyTree  # v, of the holder alone
    largest: PyTree  # v_hat


@register(summary="AMSGrad, whose moments are averaged with the layers, after FedLALR")
def amsgrad(
    *,
    beta1: Annotated[float, "share of the old mean of gradients in the new", share] = (
        0.9
    ),
    beta2: Annotated[float, "share of the old mean square in the new", share] = 0.99,
    weight_decay: Decay = 5e-4,
) -> Optimizer:
    """Build AMSGrad at rate 1; see this module for the rule."""

    def init(params: PyTree) -> AmsgradState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AmsgradState(zeros, zeros, zeros)

    def update(
        updates: PyTree,
        state: AmsgradState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, AmsgradState]:
        mean = _moved(state.mean, updates, beta1)
        squares = jax.tree.map(jnp.square, updates)
        square = _moved(state.square, squares, beta2)
        largest = jax.tree.map(jnp.maximum, state.largest, square)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + _EPSILON), mean, largest)
        steps = add_decay(steps, params, weight_decay)
        return jax.tree.map(jnp.negative, steps), AmsgradState(mean, square, largest)

    return Optimizer(init, update, Merge(_shared, KEEP.merge))


def _moved(old: PyTree, new: PyTree, keep: float) -> PyTree:
    return jax.tree.map(lambda o, n: keep * o + (1 - keep) * n, old, new)


def _shared(state: AmsgradState) -> AmsgradState:
    """Mark m and v_hat."""
    marks = jax.tree.map(lambda _: True, state)
    return marks._replace(square=no_leaves(state.square))
