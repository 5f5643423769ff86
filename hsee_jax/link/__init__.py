"""The link between a client and the server: codecs, and the bytes of a message."""

from hsee_jax.link.codecs import (
    CODECS,
    FULL,
    Codec,
    Levels,
    Message,
    carry_bytes,
    fixed_size,
    pack_bytes,
    register,
    sample_bytes,
    sample_bytes_of,
    stateless,
    unpack_bytes,
)
from hsee_jax.link.topk import Largest, topk

__all__ = [
    "CODECS",
    "FULL",
    "Codec",
    "Largest",
    "Levels",
    "Message",
    "carry_bytes",
    "fixed_size",
    "pack_bytes",
    "register",
    "sample_bytes",
    "sample_bytes_of",
    "stateless",
    "topk",
    "unpack_bytes",
]
