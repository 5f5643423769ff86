"""Compare the shapes of a checkpoint's leaves with those of a run.

Orbax pads or cuts what it reads to the shape that it is asked for, in every axis. A run
needs this for the empty slots of a stack alone.
"""

from collections import defaultdict

import jax

from hsee_jax.core.types import PyTree

_Shape = tuple[int, ...]


def check_shapes(stored: PyTree, like: PyTree) -> None:
    """Refuse leaves of another shape; a whole stack may have other numbers of slots.

    Args:
      stored: what Orbax knows of the leaves.
      like: see `hsee_jax.runs.checkpoint.load`.

    Raises:
      ValueError: a leaf has another shape.
    """
    theirs = _shapes(stored)
    parts = defaultdict[str, dict[str, tuple[_Shape, _Shape]]](dict)
    for name, shape in _shapes(like).items():
        if name in theirs:
            part = "/".join(name.split("/")[:2])  # such as clients/0
            parts[part][name] = theirs[name], shape
    for leaves in parts.values():
        sides = zip(*leaves.values(), strict=True)
        is_stack = all(len({shape[:1] for shape in side}) == 1 for side in sides)
        for name, (found, shape) in leaves.items():
            if found[is_stack:] != shape[is_stack:]:
                raise ValueError(
                    f"{name} has the shape {list(found)}; allowed is {list(shape)}, of "
                    "the network of this run"
                )


def _shapes(tree: PyTree) -> dict[str, _Shape]:
    """Return the shapes of the leaves that are read, by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if leaf is not ...
    }
