"""Central types: what a layer, a batch and a metric are everywhere in the package.

Shapes are written in brackets, ``float32 [B, C]``, with the letters

* ``B`` batch, ``H W C`` image height, width and channels,
* ``K`` classes, ``N`` clients, ``G`` clients of one cut, ``T`` steps in a round,
* ``S`` slots of a stack of clients, ``A`` turns in a step, ``D`` devices.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Key = jax.Array
PyTree = Any
# A layer's {"params": ..., "batch_stats": ...}; batch_stats may be empty.
Variables = Mapping[str, PyTree]


class InitFn(Protocol):
    """Draws the variables of a layer."""

    def __call__(self, key: Key, inputs: Array) -> Variables:
        """Return variables for inputs of this shape and dtype, ``[B, ...]``."""


class ApplyFn(Protocol):
    """Runs a layer."""

    def __call__(
        self, variables: Variables, inputs: Array, mask: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        """Map inputs ``[B, ...]`` to outputs ``[B, ...]`` and new batch statistics.

        ``mask``, ``bool [B]``, is false on padding rows. They may produce any finite
        output, but they must not reach the batch statistics.
        """


class Stage(NamedTuple):
    """A layer, or a head, as a pair of pure functions."""

    init: InitFn
    apply: ApplyFn


class Batch(NamedTuple):
    """Labelled inputs of one step; padding rows have a false mask."""

    inputs: Array  # float [B, ...]: images, or the features of an earlier layer
    labels: Array  # int32 [B]
    mask: Array  # bool [B]


class Dataset(NamedTuple):
    """Images and labels as stored, on the host or on the device."""

    images: Any  # uint8 [M, H, W, C]
    labels: Any  # int32 [M]


class Metrics(NamedTuple):
    """Sums over real rows, so that adding and dividing once is exact."""

    loss_sum: Array  # float32 []: sum of cross-entropies, in nats
    correct: Array  # int32 []: rows whose arg max is the label
    count: Array  # type: ignore[assignment]  # int32 []: real rows


class ExitMetrics(NamedTuple):
    """What both answers to the same rows scored, and what crossed the link for them."""

    exit: Metrics  # the client's own exit head
    server: Metrics  # the final head, behind the server's layers
    link: Array  # int32 [2, 2]: bytes up and down, see `hsee_jax.link.pack_bytes`
