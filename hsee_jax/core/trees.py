"""Operations on whole trees of arrays."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hsee_jax.core.types import Array, PyTree


def select(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """Return one of two trees of equal structure.

    Args:
      condition: ``bool []``.
      new: taken where the condition is true.
      old: taken where it is false.
    """
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def add_trees(trees: Sequence[PyTree]) -> PyTree:
    """Add up one or more trees of equal structure, leaf by leaf, from the first on."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def row_of(tree: PyTree, number: int) -> PyTree:
    """Return one row of a stack, leaves ``[M, ...]`` to ``[...]``."""
    return jax.tree.map(lambda leaf: leaf[number], tree)


def nbytes(tree: PyTree) -> int:
    """Return the bytes of all arrays of a tree, or of their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def expand_like(flags: Array, values: Array) -> Array:
    """Append axes of length 1 to flags, up to the number of axes of values.

    Flags, or weights, ``[S, B]`` and values ``[S, B, H, W]`` give ``[S, B, 1, 1]``.
    """
    return flags.reshape(*flags.shape, *(1,) * (values.ndim - flags.ndim))
