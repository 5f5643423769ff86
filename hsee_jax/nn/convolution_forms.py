"""Forms of the convolution: the native one of XLA, and patches times a matrix.

Images are NHWC and weights HWIO. A depthwise convolution has weights ``[k, k, 1, C]``;
in place of patches it has shifted images, each times the weights of its place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hsee_jax.core.types import Array

LAYOUT = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """The static sizes of a convolution; pairs are for H and W."""

    image: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # zeros before and after
    groups: int = 1  # C for a depthwise convolution

    @property
    def output(self) -> tuple[int, int]:
        """Return H' and W'."""
        height, width = (
            (size + sum(pad) - window) // stride + 1
            for size, window, stride, pad in zip(*self[:4], strict=True)
        )
        return height, width


class Form(NamedTuple):
    """One way to compute each pass, ``(array, array, Geometry) -> array``.

    The comments call x ``[N, H, W, C]`` the images, w ``[k, k, C, F]`` the weights and
    y ``[N, H', W', F]`` the output.
    """

    forward: Callable[[Array, Array, Geometry], Array]  # x, w -> y
    wrt_input: Callable[[Array, Array, Geometry], Array]  # dy, w -> dx
    wrt_weights: Callable[[Array, Array, Geometry], Array]  # x, dy -> dw


# The native convolution.


def _native(x: Array, w: Array, geometry: Geometry) -> Array:
    return lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.padding,
        dimension_numbers=LAYOUT,
        feature_group_count=geometry.groups,
    )


def _native_input(dy: Array, w: Array, geometry: Geometry) -> Array:
    shape = (len(dy), *geometry.image, w.shape[2] * geometry.groups)
    return _transpose(lambda x: _native(x, w, geometry), shape, dy)


def _native_weights(x: Array, dy: Array, geometry: Geometry) -> Array:
    shape = (*geometry.window, x.shape[-1] // geometry.groups, dy.shape[-1])
    return _transpose(lambda w: _native(x, w, geometry), shape, dy)


def _transpose(linear: Callable[[Array], Array], shape: Any, y: Array) -> Array:
    """Apply the transpose of a linear function of arrays of a shape to ``y``."""
    x = lax.full_like(y, 0, shape=shape)  # varies over the axes of a mesh as y does
    return jax.linear_transpose(linear, x)(y)[0]


NATIVE = Form(_native, _native_input, _native_weights)

# Patches: each place of the window becomes a slice of the image.


def dot(a: Array, b: Array, axes: tuple[int, int], *, batch: int = 0) -> Array:
    """Multiply over one axis of each, in float32; share ``batch`` leading axes."""
    shared = tuple(range(batch))
    dimensions = (((axes[0],), (axes[1],)), (shared, shared))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _rows(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def _shifts(x: Array, geometry: Geometry) -> list[Array]:
    """Slice the pixels under each place of a window: k k arrays ``[N, H', W', C]``."""
    x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    (down, right), (height, width) = geometry.strides, geometry.output
    rows, columns = (height - 1) * down + 1, (width - 1) * right + 1
    return [
        x[:, i : i + rows : down, j : j + columns : right]
        for i in range(geometry.window[0])
        for j in range(geometry.window[1])
    ]


def _patches(x: Array, geometry: Geometry) -> Array:
    """Return the pixels under each window, ``[N H' W', k k C]``."""
    return _rows(jnp.concatenate(_shifts(x, geometry), axis=-1))


def _patches_forward(x: Array, w: Array, geometry: Geometry) -> Array:
    y = dot(_patches(x, geometry), _rows(w), (1, 0))
    return y.reshape(len(x), *geometry.output, -1).astype(x.dtype)


def _patches_input(dy: Array, w: Array, geometry: Geometry) -> Array:
    shape = (len(dy), *geometry.image, w.shape[2])
    seen = dot(_rows(dy), _rows(w), (1, 1))
    return _transpose(lambda x: _patches(x, geometry), shape, seen).astype(dy.dtype)


def _patches_weights(x: Array, dy: Array, geometry: Geometry) -> Array:
    dw = [dot(_rows(s), _rows(dy), (0, 0)) for s in _shifts(x, geometry)]
    shape = (*geometry.window, x.shape[-1], dy.shape[-1])
    return jnp.stack(dw).reshape(shape).astype(x.dtype)


PATCHES = Form(_patches_forward, _patches_input, _patches_weights)


# Shifts, of depthwise convolutions: each place of the window scales a slice.


def _shifts_forward(x: Array, w: Array, geometry: Geometry) -> Array:
    places = w.reshape(-1, 1, 1, 1, w.shape[-1]).astype(jnp.float32)
    pairs = zip(_shifts(x, geometry), places, strict=True)
    first, *others = (s.astype(jnp.float32) * place for s, place in pairs)
    return sum(others, first).astype(x.dtype)


def _shifts_input(dy: Array, w: Array, geometry: Geometry) -> Array:
    shape = (len(dy), *geometry.image, w.shape[-1])
    wide = dy.astype(jnp.float32)  # the shifts are added before they are rounded
    return _transpose(lambda x: _shifts_forward(x, w, geometry), shape, wide).astype(
        dy.dtype
    )


def _shifts_weights(x: Array, dy: Array, geometry: Geometry) -> Array:
    seen = [
        jnp.sum(s.astype(jnp.float32) * dy.astype(jnp.float32), axis=(0, 1, 2))
        for s in _shifts(x, geometry)
    ]
    return jnp.stack(seen).reshape(*geometry.window, 1, -1).astype(x.dtype)


SHIFTS = Form(_shifts_forward, _shifts_input, _shifts_weights)
