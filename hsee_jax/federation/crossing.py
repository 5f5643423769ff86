"""What crosses the link between a client and its server, and its bytes."""

from typing import Any

import jax
import jax.numpy as jnp

from hsee_jax.core.trees import select
from hsee_jax.core.types import Array, PyTree
from hsee_jax.federation.branch import Branch, BranchSpec
from hsee_jax.link.codecs import FULL, Codec, Message, fixed_size, pack_bytes


def encode(
    spec: BranchSpec, client: Branch, features: Array, mask: Array
) -> tuple[Message, Branch]:
    """Make the message for a client's features; no gradient flows through it.

    Args:
      spec: what the client computes.
      client: its state.
      features: ``[B, ...]``.
      mask: ``bool [B]``, false on padding. Padding alone leaves the state of the codec
        as it is, and so do features of which it would become infinite or NaN.

    Returns:
      The message, and the client with the new state of its codec.
    """
    features = jax.lax.stop_gradient(features)
    message, link = spec.codec.encode(features, client.link, mask)
    fine = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(link)]
    taken = jnp.all(jnp.stack([jnp.any(mask), *fine]))
    return message, client.replace(link=select(taken, link, client.link))


def encode_for_evaluation(
    spec: BranchSpec, client: Branch, features: Array, mask: Array
) -> Message:
    """Make the message for features outside of training; see `encode`."""
    link = link_for_evaluation(spec.codec, client)
    return spec.codec.encode(features, link, mask)[0]


def link_for_evaluation(codec: Codec, client: Branch) -> PyTree:
    """Return the state with which a client's codec encodes outside of training."""
    state_of = codec.for_evaluation
    return client.link if state_of is None else state_of(client.link)


def decode(spec: BranchSpec, message: Message) -> Array:
    """Return the features ``[B, ...]`` that a server makes of a client's message."""
    return spec.codec.decode(message, spec.input_dtype)


def encode_gradient(
    spec: BranchSpec, client: Branch, gradient: Array, mask: Array
) -> Message:
    """Make the message for the gradient of a client's features, on the server.

    Args:
      spec: what the client computes.
      client: its state of the codec.
      gradient: ``[B, ...]``.
      mask: ``bool [B]``, false on padding.
    """
    return _of_gradient(spec).encode(gradient, client.link, mask)[0]


def decode_gradient(spec: BranchSpec, message: Message, dtype: Any) -> Array:
    """Return the gradient ``[B, ...]`` that a client makes of the server's message."""
    return _of_gradient(spec).decode(message, dtype)


def gradient_bytes(spec: BranchSpec, message: Message) -> Array:
    """Return the bytes of each row of an `encode_gradient`, ``int32 [B]``."""
    return _of_gradient(spec).nbytes(message)


def _of_gradient(spec: BranchSpec) -> Codec:
    return spec.codec.gradient or FULL


def message_bytes(
    spec: BranchSpec,
    message: Message,
    mask: Array,
    gradient: Message | None = None,
    logits: Array | None = None,
) -> Array:
    """Count what crosses the link in a step.

    Args:
      spec: of the client.
      message: that it sends; the labels, ``int32 [B]``, go with it.
      mask: ``bool [B]``; padding is not sent.
      gradient: what comes back, see `encode_gradient`; None for no gradient.
      logits: of the server, ``float32 [B, K]``, which come back; None for none.

    Returns:
      ``int32 [2, 2]``, see `hsee_jax.link.pack_bytes`.
    """
    label = jnp.dtype(jnp.int32).itemsize
    up = spec.codec.nbytes(message) + label
    down = jnp.zeros_like(up)
    if gradient is not None:
        down = down + gradient_bytes(spec, gradient)
    if logits is not None:
        down = down + fixed_size(logits)
    return pack_bytes(jnp.where(mask, up, 0), jnp.where(mask, down, 0))
