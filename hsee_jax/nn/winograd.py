"""Winograd's form of the 3x3 convolution of stride 1.

F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308) takes 16 products where the other forms
take 36: y = A' [(G w G') * (B' x B)] A for a tile of 4x4 inputs and 2x2 outputs. Each
of the 16 places takes one product of matrices over channels. The gradient by the
weights is the transpose, and the gradient by the input is the same form with the window
flipped. All computation is in float32, whatever the dtype of the arrays. Other windows
and strides use the form of patches.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from hsee_jax.core.types import Array
from hsee_jax.nn.convolution_forms import PATCHES, Form, Geometry, dot

_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]], np.float32)
_KERNEL, _FLIPPED, _OUTPUT = (np.kron(m, m) for m in (_G, _G[:, ::-1], _A))


def _suits_winograd(geometry: Geometry) -> bool:
    narrow = all(0 <= pad <= 2 for pads in geometry.padding for pad in pads)
    return geometry.window == (3, 3) and geometry.strides == (1, 1) and narrow


def _transform(matrix: Any, a: Array) -> Array:
    """Multiply, ``[P, Q] x [Q, ...] -> [P, ...]``."""
    dimensions = (((1,), (0,)), ((), ()))
    return lax.dot_general(matrix, a, dimensions, precision=lax.Precision.HIGHEST)


def _input_tiles(x: Array, geometry: Geometry) -> Array:
    """Transform T overlapping 4x4 tiles, ``[N, H, W, C] -> [16, N T, C]``."""
    pads = [
        (before, size + size % 2 + 2 - extent - before)
        for (before, _), size, extent in zip(
            geometry.padding, geometry.output, geometry.image, strict=True
        )
    ]
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), *pads, (0, 0)))
    for axis in (2, 2):  # W, then H, which the new leading axis moves to 2
        length = x.shape[axis] - 3
        a, b, c, d = (lax.slice_in_dim(x, i, i + length, 2, axis) for i in range(4))
        x = jnp.stack([a - c, b + c, c - b, b - d])
    return x.reshape(16, -1, x.shape[-1])


def _output_tiles(y: Array) -> Array:
    """Cut into T tiles of 2x2, ``[N, H', W', F] -> [4, N T, F]``."""
    batch, height, width, features = y.shape
    y = jnp.pad(y, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    y = y.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, features)
    return y.transpose(2, 4, 0, 1, 3, 5).reshape(4, -1, features)


def _untile(tiles: Array, batch: int, geometry: Geometry) -> Array:
    """Invert `_output_tiles`."""
    height, width = geometry.output
    down, right = (height + 1) // 2, (width + 1) // 2
    y = tiles.reshape(2, 2, batch, down, right, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(batch, 2 * down, 2 * right, -1)[:, :height, :width]


def _winograd_forward(x: Array, w: Array, geometry: Geometry) -> Array:
    if not _suits_winograd(geometry):
        return PATCHES.forward(x, w, geometry)
    kernel = _transform(_KERNEL, w.astype(jnp.float32).reshape(9, *w.shape[2:]))
    tiles = dot(_input_tiles(x, geometry), kernel, (2, 1), batch=1)
    return _untile(_transform(_OUTPUT.T, tiles), len(x), geometry).astype(x.dtype)


def _winograd_input(dy: Array, w: Array, geometry: Geometry) -> Array:
    if not _suits_winograd(geometry):
        return PATCHES.wrt_input(dy, w, geometry)
    (top, bottom), (left, right) = geometry.padding
    back = Geometry(
        geometry.output, (3, 3), (1, 1), ((2 - top, 2 - bottom), (2 - left, 2 - right))
    )
    kernel = _transform(_FLIPPED, w.astype(jnp.float32).reshape(9, *w.shape[2:]))
    tiles = dot(_input_tiles(dy, back), kernel, (2, 2), batch=1)
    return _untile(_transform(_OUTPUT.T, tiles), len(dy), back).astype(dy.dtype)


def _winograd_weights(x: Array, dy: Array, geometry: Geometry) -> Array:
    if not _suits_winograd(geometry):
        return PATCHES.wrt_weights(x, dy, geometry)
    # Without the barrier XLA keeps the forward pass's tiles, 4 times the input's size.
    tiles = _input_tiles(lax.optimization_barrier(x), geometry)
    seen = _transform(_OUTPUT, _output_tiles(dy.astype(jnp.float32)))
    dw = _transform(_KERNEL.T, dot(tiles, seen, (1, 1), batch=1))
    return dw.reshape(3, 3, *dw.shape[1:]).astype(x.dtype)


WINOGRAD = Form(_winograd_forward, _winograd_input, _winograd_weights)
