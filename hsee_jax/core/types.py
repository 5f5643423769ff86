"""The types of layers, batches and metrics in the whole package.

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

NO_LABEL = -1  # in the place of a sample's label


class InitFn(Protocol):
    """Draws the variables of a layer."""

    def __call__(self, key: Key, inputs: Array) -> Variables:
        """Draw variables for inputs of this shape and dtype, ``[B, ...]``."""


class ApplyFn(Protocol):
    """Runs a layer."""

    def __call__(
        self, variables: Variables, inputs: Array, mask: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        """Map inputs ``[B, ...]`` to outputs ``[B, ...]`` and new batch statistics.

        ``mask``, ``bool [B]``, is false on padding rows. These rows may produce any
        finite output, but they must not reach the batch statistics.
        """


class Stage(NamedTuple):
    """A layer or a head, as a pair of pure functions."""

    init: InitFn
    apply: ApplyFn


class Batch(NamedTuple):
    """The inputs of one step and their labels; padding rows have a false mask."""

    # float [B, ...]: images, or the features of an earlier layer; or [B, 2, ...]: two
    # augmented copies of each image
    inputs: Array
    labels: Array  # int32 [B]; `NO_LABEL` in rows without a label
    mask: Array  # bool [B]


class Dataset(NamedTuple):
    """Stored samples and labels, on the host or on the device."""

    images: Any  # uint8 [M, H, W, C], or float32 [M, ...] of any rank
    labels: Any  # int32 [M]; `NO_LABEL` for samples without a label


class Metrics(NamedTuple):
    """Sums over real rows; a sum over batches, divided once, gives an exact mean."""

    loss_sum: Array  # float32 []: sum of cross-entropies, in nats
    correct: Array  # int32 []: rows with the label as their arg max
    count: Array  # type: ignore[assignment]  # int32 []: real rows


class ExitMetrics(NamedTuple):
    """The metrics of both answers to the same rows, and their traffic on the link."""

    exit: Metrics  # of the client's exit head
    server: Metrics  # of the final head, behind the server's layers
    link: Array  # int32 [2, 2]: bytes up and down, see `hsee_jax.link.pack_bytes`
