"""The form in which features cross the link: the client encodes, the server decodes.

A `Codec` encodes every sample by itself, so what arrives depends neither on the other
samples of the batch nor on padding. It may keep a state for each client, such as an
error to correct in the next message.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.core.registry import Registry
from hsee_jax.core.reuse import reused
from hsee_jax.core.types import Array, PyTree

Message = PyTree  # arrays with a leading axis of samples, [B, ...]


class EncodeFn(Protocol):
    """Turns features into a message."""

    def __call__(
        self, features: Array, state: PyTree, mask: Array
    ) -> tuple[Message, PyTree]:
        """Return a message and the new state.

        Args:
          features: ``[B, ...]``.
          state: of the client.
          mask: ``bool [B]``, false on padding, which must not reach the state.
        """


class DecodeFn(Protocol):
    """Turns a message into features."""

    def __call__(self, message: Message, dtype: Any) -> Array:
        """Decode a message to features ``[B, ...]`` of this dtype."""


class Codec(NamedTuple):
    """How features cross a link, as pure functions."""

    # Features of a sample, shape and dtype [1, ...] -> the state of one client.
    init: Callable[[jax.ShapeDtypeStruct], PyTree]
    encode: EncodeFn
    decode: DecodeFn
    nbytes: Callable[[Message], Array]  # message -> bytes of each sample, int32 [B]
    # The codec of the gradient that comes down. It reads the state of the client and
    # does not change it. None sends the gradient as it was computed.
    gradient: Any = None
    # Replaces `init` where clients differ; it also takes the client's id, int32 [].
    # `init` is then for the client with the smallest messages.
    init_client: Callable[[jax.ShapeDtypeStruct, Array], PyTree] | None = None
    # State -> the state with which a client encodes outside of training, without what
    # the batches of training have left in it. None for the state as it is.
    for_evaluation: Callable[[PyTree], PyTree] | None = None


# Factories take nothing but their options.
CODECS: Registry[Codec] = Registry("link", pure=True)
register = CODECS.register


def fixed_size(message: Message) -> Array:
    """Return the bytes of each sample of a message, if all samples have one size.

    Args:
      message: leaves ``[B, ...]``.

    Returns:
      ``int32 [B]``.
    """
    leaves = jax.tree.leaves(message)
    each = sum(leaf.size // len(leaf) * leaf.dtype.itemsize for leaf in leaves)
    return jnp.full(len(leaves[0]), each, jnp.int32)


def stateless(
    encode: Callable[[Array], Message], decode: DecodeFn | None = None
) -> Codec:
    """Make a codec from functions that keep no state, for messages of a fixed size.

    Args:
      encode: features ``[B, ...]`` to a message.
      decode: see `DecodeFn`; without it, the message has the shape of the features and
        only its dtype changes.
    """
    return Codec(
        init=lambda features: (),
        encode=lambda features, state, mask: (encode(features), state),
        decode=decode or (lambda message, dtype: message.astype(dtype)),
        nbytes=fixed_size,
    )


FULL = stateless(lambda features: features)


@CODECS.register(summary="features in the dtype of the computation")
def full() -> Codec:
    """Send features as they are."""
    return FULL


_LARGEST = float(jnp.finfo(jnp.float16).max)


def _encode_float16(features: Array) -> Message:
    values = features.astype(jnp.float32)
    clipped = jnp.clip(values, -_LARGEST, _LARGEST)
    return jnp.where(jnp.isfinite(values), clipped, values).astype(jnp.float16)


FLOAT16 = stateless(_encode_float16)


@CODECS.register(summary="half precision")
def float16() -> Codec:
    """Send features in half precision, clipped so that no finite value overflows."""
    return FLOAT16


class Levels(NamedTuple):
    """Features as codes of 8 bits; each sample has evenly spaced levels of its own."""

    codes: Array  # int8 [B, ...]; -128 is the smallest value
    offset: Array  # float32 [B, 1 ...]: the smallest value
    step: Array  # float32 [B, 1 ...]: to the next; 0 where all values are equal


def _encode_int8(features: Array) -> Levels:
    values = features.astype(jnp.float32)
    axes = tuple(range(1, values.ndim))
    offset = jnp.min(values, axes, keepdims=True)
    # Products only: XLA compiles quotients differently for different batch sizes.
    step = (jnp.max(values, axes, keepdims=True) - offset) * (1 / 255)
    inverse = 1 / jnp.where(step > 0, step, 1.0)
    levels = jnp.clip(jnp.round((values - offset) * inverse), 0, 255)
    return Levels((levels - 128).astype(jnp.int8), offset, step)


def _decode_int8(message: Levels, dtype: Any) -> Array:
    levels = message.codes.astype(jnp.float32) + 128
    return (message.offset + message.step * levels).astype(dtype)


INT8 = stateless(_encode_int8, _decode_int8)


@CODECS.register(summary="256 levels between the extremes of each sample")
def int8() -> Codec:
    """Send each value as one of 256 levels between its sample's extremes.

    The error of a value is at most half a step, which is the range of its sample
    divided by 510.
    """
    return INT8


def sample_bytes(codec: Codec, features: jax.ShapeDtypeStruct) -> int:
    """Return the bytes of the first message of one sample.

    Args:
      codec: of the link; where clients differ, this is their smallest message.
      features: shape and dtype of a sample's features, ``[1, ...]``.
    """
    return int(_first_message(codec, features)())


@partial(reused, latest=256)
def _first_message(codec: Codec, features: jax.ShapeDtypeStruct) -> Callable[[], Array]:
    """Compile the bytes of a first message, mostly a constant."""
    return jax.jit(lambda: _first_bytes(codec, features, codec.init(features)))


def sample_bytes_of(
    codec: Codec, features: jax.ShapeDtypeStruct, clients: Sequence[int]
) -> list[int]:
    """Return the bytes of the first message of one sample of each client.

    Args:
      codec: of the link.
      features: shape and dtype of a sample's features, ``[1, ...]``.
      clients: the ids of the clients.
    """
    init = codec.init_client
    if init is None:
        return [sample_bytes(codec, features)] * len(clients)

    @jax.jit
    def first_messages(ids: Array) -> Array:
        return jax.lax.map(
            lambda i: _first_bytes(codec, features, init(features, i)), ids
        )

    return first_messages(jnp.asarray(clients, jnp.int32)).tolist()


def _first_bytes(codec: Codec, features: jax.ShapeDtypeStruct, state: PyTree) -> Array:
    zeros = jnp.zeros(features.shape, features.dtype)
    message, _ = codec.encode(zeros, state, jnp.ones(len(zeros), bool))
    return codec.nbytes(message)[0]


_LOW_BITS = 15
_LOW = 2**_LOW_BITS - 1


def pack_bytes(up: Array, down: Array) -> Array:
    """Pack the bytes of a step so that sums over its rows and a round do not overflow.

    Args:
      up: ``int32 [B]``, bytes of each row from the client; B is at most 2^23.
      down: ``int32 [B]``, bytes of each row to the client.

    Returns:
      ``int32 [2, 2]``: up and down, each as a high and a low part, in all less than
      2^46 bytes. Up to 65,538 of them can be added before `carry_bytes`.
    """
    rows = jnp.stack([up, down])
    lowest = jnp.sum(rows & 0xFF, axis=-1)
    middle = jnp.sum((rows & _LOW) >> 8, axis=-1) + (lowest >> 8)
    high = jnp.sum(rows >> _LOW_BITS, axis=-1) + (middle >> _LOW_BITS - 8)
    low = ((middle & _LOW >> 8) << 8) + (lowest & 0xFF)
    return jnp.stack([high, low], axis=-1)


def carry_bytes(packed: Array) -> Array:
    """Return a sum of `pack_bytes` with a low part as small as that of one of them."""
    high, low = packed[..., 0], packed[..., 1]
    return jnp.stack([high + (low >> _LOW_BITS), low & _LOW], axis=-1)


def unpack_bytes(packed: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the bytes up and down, ``int64 [..., 2]``, of sums of `pack_bytes`."""
    parts = np.asarray(packed).astype(np.int64)
    return (parts[..., 0] << _LOW_BITS) + parts[..., 1]
