"""The largest values of a sample, after FusionLLM's compression (arXiv:2410.12707).

Of the n features of a sample a client sends the k that are largest in size, and their
places; the server takes 0 for the others. The gradient that comes down with a joint
boundary is treated alike. A sample loses at most 1 - k/n of its energy, the sum of
squares, and nothing where k = n.

FusionLLM compresses most where the link is slowest. Here the client with the slowest
link keeps the share R; a client whose link is f times as fast keeps f R, or everything
[recalled], so that messages of one cut take equally long. Three things are ours: the
user gives the speeds, by hand or in a file of devices; the mean error of a batch may be
added to the next batch; and features and gradients have one share.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from hsee_jax.core.options import Rule, positive
from hsee_jax.core.trees import expand_like
from hsee_jax.core.types import Array, PyTree
from hsee_jax.link.codecs import Codec, register


class Largest(struct.PyTreeNode):
    """The largest values of samples, k or fewer of each."""

    values: Array  # [B, k], in the dtype of the features
    places: Array  # uint16 or uint32 [B, k]: in the flat sample; n where none is sent
    shape: tuple[int, ...] = struct.field(pytree_node=False)  # of a sample


class TopkState(NamedTuple):
    """The state of a client."""

    kept: Array  # int32 []: the values that it sends of a sample
    error: PyTree  # float32 [1, ...]: mean over the last batch; () without feedback


@register(summary="the largest values of each sample and their places, after FusionLLM")
def topk(
    *,
    keep_share: Annotated[
        float,
        "share of a sample's features, and of their gradient, that crosses the link; "
        "with link_rates, of the client with the slowest link",
        Rule("more than 0, at most 1", lambda value: 0 < value <= 1),
    ] = 0.25,
    link_rates: Annotated[
        tuple[float, ...],
        "speeds of the clients' links in any unit, given to the clients in turn: a "
        "client keeps keep_share times its speed over the slowest; by default all are "
        "equal",
        positive,
    ] = (),
    error_feedback: Annotated[
        bool,
        "in training, add the mean error of a client's last batch to its next one "
        "[ours]",
    ] = False,
) -> Codec:
    """Send only the largest values of each sample, and their places.

    Args:
      keep_share: k/n of the client with the slowest link, more than 0 and at most 1.
      link_rates: speeds of links in any unit, given to the clients in turn; without
        them all are equal.
      error_feedback: whether to add the mean error of a client's last batch to its next
        batch of training. Samples that are not trained on are encoded without it.
    """
    rates = link_rates or (1.0,)
    shares = [min(1.0, keep_share * rate / min(rates)) for rate in rates]
    gradient = _codec(shares, feedback=False)
    return _codec(shares, feedback=error_feedback)._replace(gradient=gradient)


def _codec(shares: Sequence[float], *, feedback: bool) -> Codec:
    """Make the codec for the shares that clients keep, in turn."""

    def init_client(features: jax.ShapeDtypeStruct, client: Array) -> TopkState:
        size = math.prod(features.shape[1:])
        counts = jnp.asarray([_count(share, size) for share in shares], jnp.int32)
        error = jnp.zeros(features.shape, jnp.float32) if feedback else ()
        return TopkState(counts[client % len(shares)], error)

    def encode(features: Array, state: TopkState, mask: Array) -> tuple:
        wanted = features.astype(jnp.float32)
        if feedback:
            wanted = wanted + jnp.broadcast_to(state.error, wanted.shape)
        message = _largest(wanted, max(shares), state.kept, features.dtype)
        if feedback:
            missed = wanted - _dense(message, jnp.float32)
            rows = expand_like(mask, missed)
            total = jnp.sum(jnp.where(rows, missed, 0), axis=0, keepdims=True)
            number = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)
            state = state._replace(error=total / number)
        return message, state

    def for_evaluation(state: TopkState) -> TopkState:
        return state._replace(error=jax.tree.map(jnp.zeros_like, state.error))

    return Codec(
        init=lambda features: init_client(features, jnp.int32(_slowest(shares))),
        encode=encode,
        decode=_dense,
        nbytes=_nbytes,
        init_client=init_client if len(set(shares)) > 1 else None,
        for_evaluation=for_evaluation if feedback else None,
    )


def _slowest(shares: Sequence[float]) -> int:
    return shares.index(min(shares))


def _count(share: float, size: int) -> int:
    return max(1, math.ceil(round(share * size, 6)))


def _largest(values: Array, share: float, count: Array, dtype: Any) -> Largest:
    """Choose the largest values of each sample ``[B, ...]``.

    Args:
      values: float32.
      share: the largest that a client keeps, which fixes the shape of the message.
      count: ``int32 []``, the values that this client sends.
      dtype: of the features.
    """
    flat = values.reshape(len(values), -1)
    size = flat.shape[1]
    # A value that is not finite comes first, so that the server sees it.
    sizes = jnp.where(jnp.isfinite(flat), jnp.abs(flat), jnp.inf)
    _, places = jax.lax.top_k(sizes, _count(share, size))
    sent = jnp.arange(places.shape[1], dtype=jnp.int32) < count
    sent = jnp.broadcast_to(sent, places.shape)
    chosen = jnp.where(sent, jnp.take_along_axis(flat, places, axis=1), 0.0)
    index = jnp.uint16 if size <= jnp.iinfo(jnp.uint16).max else jnp.uint32
    places = jnp.where(sent, places, size).astype(index)
    return Largest(chosen.astype(dtype), places, values.shape[1:])


def _dense(message: Largest, dtype: Any) -> Array:
    """Return samples ``[B, ...]`` with 0 where nothing was sent."""
    count, size = len(message.values), math.prod(message.shape)
    rows = jnp.broadcast_to(jnp.arange(count)[:, None], message.places.shape)
    flat = jnp.zeros((count, size), dtype)
    places = message.places.astype(jnp.int32)
    flat = flat.at[rows, places].set(message.values.astype(dtype), mode="drop")
    return flat.reshape(count, *message.shape)


def _nbytes(message: Largest) -> Array:
    """Return the bytes of each sample, its values and places: ``int32 [B]``."""
    sent = message.places < math.prod(message.shape)
    each = message.values.dtype.itemsize + message.places.dtype.itemsize
    return each * jnp.sum(sent, axis=1, dtype=jnp.int32)
