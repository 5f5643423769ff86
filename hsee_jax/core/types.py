"""The types of layers, batches and metrics in the whole package.

Shapes are written in brackets, ``float32 [B, C]``, with the letters

* ``B`` batch, ``H W C`` image height, width and channels,
* ``K`` classes, ``N`` clients, ``G`` clients of one cut, ``T`` steps in a round,
* ``S`` slots of a stack of clients, ``A`` turns in a step, ``D`` devices,
* ``M`` samples, ``F`` features, ``L`` layers, ``E`` exits,
* ``R`` rows of several batches.
"""

from collections.abc import Callable, Mapping
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


class GatedFn(Protocol):
    """Runs a layer at its gated width."""

    def __call__(
        self,
        variables: Variables,
        inputs: Array,
        mask: Array,
        key: Key | None = None,
        *,
        train: bool,
    ) -> tuple[Array, PyTree]:
        """Do what an `ApplyFn` does, without the channels whose gates are closed.

        With a ``key`` the gates are open at random, see `hsee_jax.nn.open_gates`.
        """


class Gates(NamedTuple):
    """What a layer can do beside its dense pass if its channels have gates."""

    apply: GatedFn
    # (variables, shape of the inputs [1, ...]) -> the number of products for a sample,
    # at the gated width, float32 [], and at the dense width
    products: Callable[[Variables, jax.ShapeDtypeStruct], tuple[Array, int]]
    # variables -> the same layer without gates, and its variables
    dense: Callable[[Variables], "tuple[Stage, Variables]"]
    # variables on the host -> a layer of the open channels alone, and its variables
    narrow: Callable[[Variables], "tuple[Stage, Variables]"]


class Stage(NamedTuple):
    """A layer or a head, as a pair of pure functions."""

    init: InitFn
    apply: ApplyFn
    gates: Gates | None = None  # of the channels of the layer; None if it has none


class Batch(NamedTuple):
    """The inputs of one step and their labels; padding rows have a false mask."""

    # float [B, ...]: images, or the features of an earlier layer; or [B, 2, ...]: two
    # augmented copies of each image
    inputs: Array
    # int32 [B], 0..K-1; `NO_LABEL` in rows without a label, which `unlabelled_step` and
    # no other step takes
    labels: Array
    mask: Array  # bool [B]
    key: Key | None = None  # of random draws in the layers; None without copies


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
