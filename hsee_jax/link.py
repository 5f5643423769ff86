"""The link between a client and its server: the form in which features cross it.

``full`` is the dtype of the computation, ``float16`` half precision, and ``int8`` one
of 256 evenly spaced values between a sample's smallest and largest. Every sample is
encoded by itself, so that what arrives depends neither on its company nor on padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.base import Array, PyTree


class Levels(NamedTuple):
    """Features as numbers of evenly spaced values, which each sample has of its own."""

    codes: Array  # int8 [B, ...]; -128 is the smallest value
    offset: Array  # float32 [B, 1 ...]: the smallest value
    step: Array  # float32 [B, 1 ...]: to the next; 0 where all values are equal


Message = Array | Levels


def _float16(features: Array) -> Array:
    """Clipped to the range of float16, so that nothing becomes infinite."""
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(features.astype(jnp.float32), -most, most).astype(jnp.float16)


def _int8(features: Array) -> Levels:
    values = features.astype(jnp.float32)
    axes = tuple(range(1, values.ndim))
    offset = jnp.min(values, axes, keepdims=True)
    # Products, as quotients are compiled in another way for another batch size.
    step = (jnp.max(values, axes, keepdims=True) - offset) * (1 / 255)
    inverse = 1 / jnp.where(step > 0, step, 1.0)
    levels = jnp.clip(jnp.round((values - offset) * inverse), 0, 255)
    return Levels((levels - 128).astype(jnp.int8), offset, step)


LINKS: dict[str, Callable[[Array], Message]] = {
    "full": lambda features: features,
    "float16": _float16,
    "int8": _int8,
}


def encode(features: Array, link: str) -> Message:
    """What crosses the link.

    Args:
      features: ``float [B, ...]``.
      link: of `LINKS`.
    """
    return LINKS[link](features)


def decode(message: Message, dtype: Any) -> Array:
    """The features ``[B, ...]`` that the server makes of a message.

    With ``int8`` no value is further from the one that was sent than half a step, the
    sample's range / 510.
    """
    if isinstance(message, Levels):
        levels = message.codes.astype(jnp.float32) + 128
        message = message.offset + message.step * levels
    return message.astype(dtype)


def cross(features: Array, link: str) -> Array:
    """Features as they arrive; a gradient comes back as if nothing had changed them.

    Args:
      features: ``float [B, ...]``.
      link: of `LINKS`.

    Returns:
      ``[B, ...]``, of the same dtype.
    """
    if link == "full":
        return features
    fixed = jax.lax.stop_gradient(features)
    return decode(encode(fixed, link), features.dtype) + (features - fixed)


def message_bytes(features: jax.ShapeDtypeStruct, link: str) -> int:
    """Bytes of the message for features of this shape and dtype, ``[B, ...]``."""
    return nbytes(jax.eval_shape(partial(encode, link=link), features))


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, or of the shapes and dtypes of some."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
