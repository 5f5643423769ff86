"""Winograd's forms of the 3x3 convolution of stride 1.

F(2x2, 3x3) and F(4x4, 3x3) of Lavin and Gray (arXiv:1509.09308) take 16 products for 4
outputs, and 36 for 16, where the other forms take 9 for each: y = A' [(G w G') * (B' x
B)] A for a tile of m x m outputs and (m + 2) x (m + 2) inputs. Each place of a tile
takes one product of matrices over channels. The gradient by the weights is the
transpose, and the gradient by the input is the same form with the window flipped. All
computation is in float32, whatever the dtype of the arrays. The larger tile rounds
about five times as coarsely as the other forms. Other windows, other strides and more
than 2 zeros a side use the form of patches.

The tiles of many large images do not fit a processor's cache, and each transform would
then wait for the memory. So images are taken a few at a time.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from hsee_jax.core.types import Array
from hsee_jax.nn.convolution_forms import PATCHES, Form, Geometry, dot

AT_ONCE = 4 * 2**20  # bytes of tiles [ours]; benchmarks/bench_conv.py times others

Matrix = npt.NDArray[np.float32]


class Transforms(NamedTuple):
    """The matrices of F(m x m, 3x3) for one axis; a tile needs them on both axes."""

    inputs: Matrix  # B' [m + 2, m + 2]
    window: Matrix  # G [m + 2, 3]
    outputs: Matrix  # A' [m, m + 2]

    @property
    def size(self) -> int:
        """Return m."""
        return len(self.outputs)


def _matrix(*rows: Sequence[float]) -> Matrix:
    return np.array(rows, np.float32)


TWO = Transforms(
    _matrix((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    _matrix((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    _matrix((1, 1, 1, 0), (0, 1, -1, -1)),
)
FOUR = Transforms(
    _matrix(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    _matrix(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    _matrix(
        (1, 1, 1, 1, 1, 0),
        (0, 1, -1, 2, -2, 0),
        (0, 1, 1, 4, 4, 0),
        (0, 1, -1, 8, -8, 1),
    ),
)


def suits_winograd(geometry: Geometry) -> bool:
    """Return whether a convolution is 3x3 of stride 1, with at most 2 zeros a side."""
    narrow = all(0 <= pad <= 2 for pads in geometry.padding for pad in pads)
    return geometry.window == (3, 3) and geometry.strides == (1, 1) and narrow


def _combine(matrix: Matrix, parts: Sequence[Array]) -> Array:
    """Multiply a matrix by a vector of arrays: ``[P, Q] x [Q, ...] -> [P, ...]``."""
    rows = []
    for weights in matrix.tolist():
        terms = [
            part if weight == 1 else weight * part
            for weight, part in zip(weights, parts, strict=True)
            if weight
        ]
        rows.append(sum(terms[1:], terms[0]))
    return jnp.stack(rows)


def _twice(matrix: Matrix, tiles: Array) -> Array:
    """Transform both axes of tiles, ``[Q Q, ...] -> [P P, ...]``, in one product."""
    both = np.kron(matrix, matrix)
    return jnp.tensordot(both, tiles, 1, precision=lax.Precision.HIGHEST)


def _input_tiles(x: Array, geometry: Geometry, transforms: Transforms) -> Array:
    """Transform T overlapping tiles, ``[N, H, W, C] -> [(m + 2)^2, N T, C]``."""
    m = transforms.size
    pads = [
        (before, -(-size // m) * m + 2 - extent - before)
        for (before, _), size, extent in zip(
            geometry.padding, geometry.output, geometry.image, strict=True
        )
    ]
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), *pads, (0, 0)))
    for axis in (2, 2):  # W, then H, which the new leading axis moves to 2
        length = x.shape[axis] - 2 - m + 1
        parts = [lax.slice_in_dim(x, i, i + length, m, axis) for i in range(m + 2)]
        x = _combine(transforms.inputs, parts)
    return x.reshape((m + 2) ** 2, -1, x.shape[-1])


def _output_tiles(y: Array, m: int) -> Array:
    """Cut into T tiles of m x m, ``[N, H', W', F] -> [m m, N T, F]``."""
    batch, height, width, features = y.shape
    y = jnp.pad(y, ((0, 0), (0, -height % m), (0, -width % m), (0, 0)))
    y = y.reshape(batch, -(-height // m), m, -(-width // m), m, features)
    return y.transpose(2, 4, 0, 1, 3, 5).reshape(m * m, -1, features)


def _untile(tiles: Array, batch: int, geometry: Geometry, m: int) -> Array:
    """Invert `_output_tiles`."""
    height, width = geometry.output
    down, right = -(-height // m), -(-width // m)
    y = tiles.reshape(m, m, batch, down, right, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(batch, m * down, m * right, -1)[:, :height, :width]


def _window(w: Array, transforms: Transforms, *, flipped: bool = False) -> Array:
    """Transform the weights, ``[3, 3, C, F] -> [(m + 2)^2, C, F]``."""
    w = w.astype(jnp.float32).reshape(9, *w.shape[2:])
    return _twice(transforms.window[:, ::-1] if flipped else transforms.window, w)


def _chunks(
    geometry: Geometry, m: int, channels: int, at_once: int, *images: Array
) -> list[Array]:
    """Cut arrays ``[N, ...]`` into ``[chunks, images, ...]``, with zeros at the end.

    A chunk's tiles of ``channels`` take at most ``at_once`` bytes, or it is one image.
    """
    down, right = (-(-size // m) for size in geometry.output)
    tiles = 4 * (m + 2) ** 2 * down * right * channels
    batch = len(images[0])
    chunks = max(1, -(-batch // max(1, at_once // tiles)))
    each = -(-batch // chunks)
    return [
        jnp.pad(a, ((0, chunks * each - batch), (0, 0), (0, 0), (0, 0))).reshape(
            chunks, each, *a.shape[1:]
        )
        for a in images
    ]


def _convolve(
    x: Array, kernel: Array, geometry: Geometry, transforms: Transforms, at_once: int
) -> Array:
    """Convolve images with a transformed window ``[(m + 2)^2, C, F]``."""
    m = transforms.size

    def convolve(x: Array) -> Array:
        tiles = dot(_input_tiles(x, geometry, transforms), kernel, (2, 1), batch=1)
        y = _twice(transforms.outputs, tiles)
        return _untile(y, len(x), geometry, m).astype(x.dtype)

    (chunks,) = _chunks(geometry, m, max(kernel.shape[1:]), at_once, x)
    if len(chunks) == 1:
        return convolve(x)
    y = lax.map(convolve, chunks)
    return y.reshape(-1, *y.shape[2:])[: len(x)]


def _forward(
    x: Array, w: Array, geometry: Geometry, transforms: Transforms, at_once: int
) -> Array:
    if not suits_winograd(geometry):
        return PATCHES.forward(x, w, geometry)
    return _convolve(x, _window(w, transforms), geometry, transforms, at_once)


def _wrt_input(
    dy: Array, w: Array, geometry: Geometry, transforms: Transforms, at_once: int
) -> Array:
    if not suits_winograd(geometry):
        return PATCHES.wrt_input(dy, w, geometry)
    (top, bottom), (left, right) = geometry.padding
    back = Geometry(
        geometry.output, (3, 3), (1, 1), ((2 - top, 2 - bottom), (2 - left, 2 - right))
    )
    kernel = _window(w, transforms, flipped=True).swapaxes(1, 2)
    return _convolve(dy, kernel, back, transforms, at_once)


def _wrt_weights(
    x: Array, dy: Array, geometry: Geometry, transforms: Transforms, at_once: int
) -> Array:
    if not suits_winograd(geometry):
        return PATCHES.wrt_weights(x, dy, geometry)
    m, channels = transforms.size, (x.shape[-1], dy.shape[-1])

    def products(x: Array, dy: Array) -> Array:
        tiles = _input_tiles(x, geometry, transforms)
        cut = _output_tiles(dy.astype(jnp.float32), m)
        return dot(tiles, _twice(transforms.outputs.T, cut), (1, 1), batch=1)

    # Without the barrier XLA keeps the forward pass's tiles, larger than the input.
    x = lax.optimization_barrier(x)
    pairs = _chunks(geometry, m, max(channels), at_once, x, dy)
    if len(pairs[0]) == 1:
        total = products(x, dy)
    else:
        none = lax.full_like(x, 0, jnp.float32, ((m + 2) ** 2, *channels))
        total, _ = lax.scan(
            lambda total, pair: (total + products(*pair), None), none, pairs
        )
    dw = _twice(transforms.window.T, total)
    return dw.reshape(3, 3, *channels).astype(x.dtype)


def winograd(transforms: Transforms, at_once: int = AT_ONCE) -> Form:
    """Return the form of ``TWO`` or ``FOUR``, for tiles of ``at_once`` bytes."""
    return Form(
        *(
            partial(run, transforms=transforms, at_once=at_once)
            for run in (_forward, _wrt_input, _wrt_weights)
        )
    )


WINOGRAD = winograd(TWO)
WINOGRAD4 = winograd(FOUR)
