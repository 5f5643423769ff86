"""Clients that are alike: with equal weights they have equal scores.

After an average over all holders the clients of a cut are one network. An evaluation
compares each client with one other, its reference, and scores it only if they differ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Array, PyTree
from hsee_jax.federation.branch import Branch, parts_of, variables_of
from hsee_jax.federation.crossing import link_for_evaluation
from hsee_jax.link.codecs import Codec


class Reference(NamedTuple):
    """A client with which others are compared, and its scores."""

    weights: PyTree  # numpy, of `weights_of`, beside the number of the client
    scores: Any


References = dict[int, Reference]  # by the index of the group


def weights_of(codec: Codec, branches: tuple[Branch, ...]) -> PyTree:
    """Return what the answers of a client, and of its server, depend on.

    That is neither the optimizer states, nor what training has left in a codec.

    Args:
      codec: of the link.
      branches: the client, and its server if it has one of its own.
    """
    parts = [part for branch in branches for part in parts_of(branch)]
    link = link_for_evaluation(codec, branches[0])
    return [variables_of(part) for part in parts], link


def alike(one: PyTree, other: PyTree) -> bool:
    """Return whether all leaves of two trees on the host are equal; NaN equals none."""
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def map_unlike(
    fn: Callable[[PyTree], PyTree], stack: PyTree, weights: PyTree, taken: Array
) -> PyTree:
    """Map a function over a stack, but call it once for all that equal the first.

    Args:
      fn: a function of a member.
      stack: leaves ``[S, ...]``.
      weights: what the function depends on, leaves ``[S, ...]``.
      taken: ``bool [S]``; the members to call it for; the first is the reference.

    Returns:
      The results, leaves ``[S, ...]``; anything for members that are not taken.
    """
    first = jnp.argmax(taken)
    like = jnp.full_like(taken, True)
    for leaf in jax.tree.leaves(weights):
        like &= jnp.all(leaf == leaf[first][None], axis=tuple(range(1, leaf.ndim)))
    due = taken & (~like | (jnp.arange(len(taken)) == first))

    def member(pair: tuple[Array, PyTree]) -> PyTree:
        due, own = pair
        shapes = jax.eval_shape(fn, own)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(due, fn, lambda _: nothing, own)

    results = jax.lax.map(member, (due, stack))
    source = jnp.where(like, first, jnp.arange(len(taken)))
    return jax.tree.map(lambda leaf: leaf[source], results)
