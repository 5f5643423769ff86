"""The form of a branch in checkpoints, which leaves out an empty link state."""

from typing import Any

import jax
from flax import struct

from hsee_jax.core.types import PyTree
from hsee_jax.federation.branch import Branch


class _Unlinked(struct.PyTreeNode):
    """The stored form of a branch with one exit whose codec keeps no state."""

    layers: PyTree
    head: PyTree


def without_links(tree: PyTree) -> PyTree:
    """Remove link states without arrays from a tree, as version 0.1 stored none."""

    def take(branch: Branch) -> Branch | _Unlinked:
        if jax.tree.leaves((branch.link, branch.exits)):
            return branch
        return _Unlinked(branch.layers, branch.head)

    return jax.tree.map(
        lambda node: take(node) if isinstance(node, Branch) else node,
        tree,
        is_leaf=lambda node: isinstance(node, Branch),
    )


def with_links(stored: PyTree, like: PyTree) -> PyTree:
    """Put link states back; invert `without_links`."""

    def put(own: Any, other: Any) -> Any:
        if not isinstance(other, _Unlinked):
            return other
        return Branch(other.layers, other.head, own.link)

    return jax.tree.map(
        put, like, stored, is_leaf=lambda node: isinstance(node, Branch)
    )
