"""Views of one event: all clients have all samples, and each sees its part of them.

A view is registered under its name; the partition ``views`` chooses one.
"""

import math
from typing import Annotated, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import one_of
from hsee_jax.core.registry import Registry
from hsee_jax.core.types import Array
from hsee_jax.data.partition import PARTITIONS, DealFn, Labels, Parts


class ViewFn(Protocol):
    """Takes a client's view of stored samples."""

    def __call__(self, images: Array, client: Array) -> Array:
        """Return the views of a client.

        Args:
          images: samples as they are stored, ``[B, ...]``.
          client: the id of the client, ``int32 []``.
        """


class Views(NamedTuple):
    """What each client sees of a sample."""

    shape: tuple[int, ...]  # of a view
    take: ViewFn | None  # None where every client sees the whole sample


# Factories take the shape of a sample and the number of clients.
VIEWS: Registry[Views] = Registry("view", with_options=False, pure=True)


@VIEWS.register(summary="every client sees the whole sample")
def whole(sample_shape: tuple[int, ...], num_clients: int) -> Views:
    """Show every client the whole sample."""
    return Views(tuple(sample_shape), None)


@VIEWS.register(
    summary="each client sees a tile of the image, of a grid of equal tiles"
)
def tiles(sample_shape: tuple[int, ...], num_clients: int) -> Views:
    """Cut an image ``[H, W, C]`` into a grid of equal tiles, one for each client.

    Of all grids with as many tiles as clients it takes the grid closest to a square,
    with at least as many columns as rows. Tiles overlap where they cannot fill the
    image exactly.

    Raises:
      UserError: the samples are not images, or have fewer pixels than a grid needs.
    """
    if len(sample_shape) != 3:
        raise UserError(
            f"view: tiles is not allowed for samples of {list(sample_shape)}; it takes "
            "images [H, W, C]; allowed are axis and whole"
        )
    rows = max(n for n in range(1, math.isqrt(num_clients) + 1) if num_clients % n == 0)
    counts, sides = (rows, num_clients // rows), sample_shape[:2]
    if counts[0] > sides[0] or counts[1] > sides[1]:
        raise UserError(
            f"num_clients: {num_clients} tiles do not fit into images of "
            f"{list(sample_shape)}; allowed are fewer clients"
        )
    size = tuple(-(-side // count) for side, count in zip(sides, counts, strict=True))
    grid = np.stack(
        np.meshgrid(*map(_starts, sides, size, counts), indexing="ij"), axis=-1
    )
    corners = grid.reshape(-1, 2).astype(np.int32)

    def take(images: Array, client: Array) -> Array:
        top, left = jnp.asarray(corners)[client]
        part = jax.lax.dynamic_slice_in_dim(images, top, size[0], axis=1)
        return jax.lax.dynamic_slice_in_dim(part, left, size[1], axis=2)

    return Views((*size, sample_shape[2]), take)


@VIEWS.register(summary="a sample holds the views of the clients along its first axis")
def axis(sample_shape: tuple[int, ...], num_clients: int) -> Views:
    """Take the views of samples ``[N, ...]`` that hold one for each of N clients.

    Raises:
      UserError: the samples hold another number of views.
    """
    if len(sample_shape) < 2 or sample_shape[0] != num_clients:
        raise UserError(
            f"view: axis is not allowed for samples of {list(sample_shape)} and "
            f"{num_clients} clients; allowed are samples [{num_clients}, ...], with a "
            "view for each client"
        )

    def take(images: Array, client: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(images, client, axis=1, keepdims=False)

    return Views(tuple(sample_shape[1:]), take)


class SharedSamples(NamedTuple):
    """Deals all samples to every client; a `DealFn` that also names their view."""

    view: str  # a name in `VIEWS`

    def __call__(
        self, labels: Labels, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """Return all indices for each client."""
        return [np.arange(len(labels))] * num_clients


@PARTITIONS.register(
    summary="all samples to every client, which sees its own view of each (FPL)"
)
def views(
    *,
    view: Annotated[
        str,
        "what a client sees of a sample: its tile of an image, its entry along the "
        "first axis of a sample, or the whole [ours]",
        one_of(VIEWS),
    ] = "tiles",
) -> DealFn:
    """Deal all samples to every client, which sees its own view of each."""
    return SharedSamples(view)


def views_of(deal: DealFn, sample_shape: tuple[int, ...], num_clients: int) -> Views:
    """Return what clients see of the samples that a partition deals to them.

    Args:
      deal: the partition.
      sample_shape: of a sample.
      num_clients: N.

    Raises:
      UserError: the view does not fit the samples or the clients.
    """
    name = deal.view if isinstance(deal, SharedSamples) else "whole"
    return VIEWS.make(name, sample_shape, num_clients)


def _starts(side: int, size: int, count: int) -> np.ndarray:
    """Return where windows of a size begin, from one end of a side to the other."""
    return np.rint(np.linspace(0, side - size, count)).astype(np.int32)
