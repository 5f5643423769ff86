"""Batches that arrive without padding, padded for a program of fixed shapes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import PyTree
from hsee_jax.deployment.protocol import tree_from


def padded(rows: npt.NDArray, count: int) -> npt.NDArray:
    """Return rows followed by zeros, ``[count, ...]``."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def padded_tree(tensors: Mapping[str, Any], like: PyTree, count: int) -> PyTree:
    """Return the features of a message as a tree, its leaves ``[count, ...]``.

    Args:
      tensors: of the message, by name.
      like: a tree of the same structure.
      count: the rows of each leaf.
    """
    tree = tree_from(tensors, like, "inputs")
    return jax.tree.map(lambda rows: padded(rows, count), tree)
