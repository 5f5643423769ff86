"""The convolution, in forms that stay fast on CPU and on stacked weights.

Under `jax.vmap` over the weights of several clients XLA makes one grouped convolution,
whose gradients are slow, and on CPU even a single convolution is slow to derive by the
weights. `convolution` gives a drop-in for `jax.lax.conv_general_dilated`, equal to it
up to rounding, that runs in one of these forms:

============  ====================================================================
``grouped``   the native convolution; stacked weights make groups of it
``unrolled``  the native convolution; for stacked weights one after another
``patches``   shifted slices times matrices: no convolution, more memory
``winograd``  F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308), 16 products where the
              others take 36; only for 3x3 of stride 1, else it is ``patches``
``auto``      by pass and shape: on CPU as measured, elsewhere a guess, see `_auto`
============  ====================================================================

Inputs batched by `jax.vmap` under shared weights are one convolution of a larger batch
in all of them. Images are NHWC and weights HWIO.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from hsee_jax.base import Array


class Geometry(NamedTuple):
    """What is known of a convolution before its arrays: pairs are of H and W."""

    image: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # zeros before and after

    @property
    def output(self) -> tuple[int, int]:
        """H' and W'."""
        height, width = (
            (size + sum(pad) - window) // stride + 1
            for size, window, stride, pad in zip(*self, strict=True)
        )
        return height, width


class Form(NamedTuple):
    """One way to compute each pass, ``(array, array, Geometry) -> array``.

    With x ``[N, H, W, C]``, w ``[k, k, C, F]`` and y ``[N, H', W', F]``:
    """

    forward: Callable[[Array, Array, Geometry], Array]  # x, w -> y
    wrt_input: Callable[[Array, Array, Geometry], Array]  # dy, w -> dx
    wrt_weights: Callable[[Array, Array, Geometry], Array]  # x, dy -> dw


def convolution(mode: str = "auto") -> Callable[..., Array]:
    """A function to be used in place of `jax.lax.conv_general_dilated`.

    Args:
      mode: the name of a form, or ``"auto"``.

    Returns:
      ``(lhs [N, H, W, C], rhs [k, k, C, F], window_strides, padding, ...)`` to
      ``[N, H', W', F]`` of the same dtype; sums are in float32. Padding is given in
      numbers. It raises NotImplementedError on dilation, groups, other layouts and a
      precision. Its first derivatives are defined, in reverse mode.
    """
    if mode not in ("auto", *_FORMS):
        raise ValueError(f"{mode} is none of auto, {', '.join(_FORMS)}")

    def conv_general_dilated(
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = _LAYOUT,
        feature_group_count: int = 1,
        precision: Any = None,
    ) -> Array:
        layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        if (
            layout != lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
            or {*(lhs_dilation or ()), *(rhs_dilation or ()), feature_group_count} - {1}
            or isinstance(padding, str)
            or precision is not None
        ):
            raise NotImplementedError(
                "only NHWC and HWIO, padding in numbers, the default precision, and "
                "neither dilation nor groups"
            )
        (top, bottom), (left, right) = padding
        geometry = Geometry(
            (lhs.shape[1], lhs.shape[2]),
            (rhs.shape[0], rhs.shape[1]),
            (window_strides[0], window_strides[1]),
            ((top, bottom), (left, right)),
        )
        return _differentiable(mode, geometry, min(rhs.shape[2:]))(lhs, rhs)

    return conv_general_dilated


def _differentiable(mode: str, geometry: Geometry, channels: int) -> Callable:
    passes = {name: _batchable(mode, name, geometry, channels) for name in Form._fields}

    @jax.custom_vjp
    def apply(x: Array, w: Array) -> Array:
        return passes["forward"](x, w)

    def forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
        return apply(x, w), (x, w)

    def backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        x, w = saved
        return passes["wrt_input"](dy, w), passes["wrt_weights"](x, dy)

    apply.defvjp(forward, backward)
    return apply


def _batchable(mode: str, name: str, geometry: Geometry, channels: int) -> Callable:
    """One pass, with what it becomes under one or several `jax.vmap`."""

    def implementation(*, stacked: bool) -> tuple[str, Callable[[Array, Array], Array]]:
        form = mode
        if mode == "auto":
            form = _auto(name, geometry, channels, stacked=stacked)
        return form, partial(getattr(_FORMS[form], name), geometry=geometry)

    def shares_weights(batched: list[bool]) -> bool:
        return name != "wrt_weights" and not batched[1]

    @custom_vmap
    def single(a: Array, b: Array) -> Array:
        return implementation(stacked=False)[1](a, b)

    @custom_vmap
    def stack(a: Array, b: Array) -> Array:  # [S, ...] both
        form, run = implementation(stacked=True)
        if form == "unrolled":
            return jnp.stack([run(*pair) for pair in zip(a, b, strict=True)])
        return jax.vmap(run)(a, b)

    @single.def_vmap
    def _(size: int, batched: list[bool], a: Array, b: Array) -> tuple[Array, bool]:
        if shares_weights(batched):
            return _split(single(_merge(a), b), size), True
        return stack(*_all_batched(size, batched, a, b)), True

    @stack.def_vmap
    def _(size: int, batched: list[bool], a: Array, b: Array) -> tuple[Array, bool]:
        if shares_weights(batched):  # [T, S, N, ...] -> [S, T N, ...]
            folded = jax.vmap(_merge)(jnp.swapaxes(a, 0, 1))
            out = jax.vmap(partial(_split, size=size))(stack(folded, b))
            return jnp.swapaxes(out, 0, 1), True
        a, b = _all_batched(size, batched, a, b)
        return _split(stack(_merge(a), _merge(b)), size), True

    return single


def _merge(a: Array) -> Array:
    return a.reshape(-1, *a.shape[2:])


def _split(a: Array, size: int) -> Array:
    return a.reshape(size, -1, *a.shape[1:])


def _all_batched(size: int, batched: list[bool], *arrays: Array) -> list[Array]:
    return [
        array if has_axis else lax.broadcast(array, (size,))
        for array, has_axis in zip(arrays, batched, strict=True)
    ]


# The native convolution.

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _native(x: Array, w: Array, geometry: Geometry) -> Array:
    return lax.conv_general_dilated(
        x, w, geometry.strides, geometry.padding, dimension_numbers=_LAYOUT
    )


def _native_input(dy: Array, w: Array, geometry: Geometry) -> Array:
    shape = (len(dy), *geometry.image, w.shape[2])
    return _transpose(lambda x: _native(x, w, geometry), shape, dy)


def _native_weights(x: Array, dy: Array, geometry: Geometry) -> Array:
    shape = (*geometry.window, x.shape[-1], dy.shape[-1])
    return _transpose(lambda w: _native(x, w, geometry), shape, dy)


def _transpose(linear: Callable[[Array], Array], shape: Any, y: Array) -> Array:
    """The transpose of a function of an array like ``y``, but for its shape."""
    x = lax.full_like(y, 0, shape=shape)  # varies over the axes of a mesh as y does
    return jax.linear_transpose(linear, x)(y)[0]


# Patches: the window is unrolled into slices of the image.


def _dot(a: Array, b: Array, axes: tuple[int, int], *, batch: int = 0) -> Array:
    """The product over one axis of each, in float32; ``batch`` leading ones shared."""
    shared = tuple(range(batch))
    dimensions = (((axes[0],), (axes[1],)), (shared, shared))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _rows(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def _shifts(x: Array, geometry: Geometry) -> list[Array]:
    """What each place of the window sees: ``k k`` arrays ``[N, H', W', C]``."""
    x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    (down, right), (height, width) = geometry.strides, geometry.output
    rows, columns = (height - 1) * down + 1, (width - 1) * right + 1
    return [
        x[:, i : i + rows : down, j : j + columns : right]
        for i in range(geometry.window[0])
        for j in range(geometry.window[1])
    ]


def _patches(x: Array, geometry: Geometry) -> Array:
    """``[N H' W', k k C]``."""
    return _rows(jnp.concatenate(_shifts(x, geometry), axis=-1))


def _patches_forward(x: Array, w: Array, geometry: Geometry) -> Array:
    y = _dot(_patches(x, geometry), _rows(w), (1, 0))
    return y.reshape(len(x), *geometry.output, -1).astype(x.dtype)


def _patches_input(dy: Array, w: Array, geometry: Geometry) -> Array:
    shape = (len(dy), *geometry.image, w.shape[2])
    seen = _dot(_rows(dy), _rows(w), (1, 1))
    return _transpose(lambda x: _patches(x, geometry), shape, seen).astype(dy.dtype)


def _patches_weights(x: Array, dy: Array, geometry: Geometry) -> Array:
    dw = [_dot(_rows(s), _rows(dy), (0, 0)) for s in _shifts(x, geometry)]
    shape = (*geometry.window, x.shape[-1], dy.shape[-1])
    return jnp.stack(dw).reshape(shape).astype(x.dtype)


# Winograd: y = A' [(G w G') * (B' x B)] A for every tile of 4x4 inputs and 2x2 outputs,
# where the product is one of matrices, over channels, for each of 16 places. The
# gradient by the weights is the transpose of that, the one by the input is the same
# with the window turned round. In float32, whatever the dtype of the arrays.

_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]], np.float32)
_KERNEL, _FLIPPED, _OUTPUT = (np.kron(m, m) for m in (_G, _G[:, ::-1], _A))


def _suits_winograd(geometry: Geometry) -> bool:
    narrow = all(0 <= pad <= 2 for pads in geometry.padding for pad in pads)
    return geometry.window == (3, 3) and geometry.strides == (1, 1) and narrow


def _transform(matrix: Any, a: Array) -> Array:
    """``[P, Q] x [Q, ...] -> [P, ...]``."""
    dimensions = (((1,), (0,)), ((), ()))
    return lax.dot_general(matrix, a, dimensions, precision=lax.Precision.HIGHEST)


def _input_tiles(x: Array, geometry: Geometry) -> Array:
    """``[N, H, W, C] -> [16, N T, C]`` of T tiles, from overlapping 4x4 ones."""
    pads = [
        (before, size + size % 2 + 2 - extent - before)
        for (before, _), size, extent in zip(
            geometry.padding, geometry.output, geometry.image, strict=True
        )
    ]
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), *pads, (0, 0)))
    for axis in (2, 2):  # W, then H, each moved by the new axis in front
        length = x.shape[axis] - 3
        a, b, c, d = (lax.slice_in_dim(x, i, i + length, 2, axis) for i in range(4))
        x = jnp.stack([a - c, b + c, c - b, b - d])
    return x.reshape(16, -1, x.shape[-1])


def _output_tiles(y: Array) -> Array:
    """``[N, H', W', F] -> [4, N T, F]``, the 2x2 tiles."""
    batch, height, width, features = y.shape
    y = jnp.pad(y, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    y = y.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, features)
    return y.transpose(2, 4, 0, 1, 3, 5).reshape(4, -1, features)


def _untile(tiles: Array, batch: int, geometry: Geometry) -> Array:
    """The inverse of `_output_tiles`."""
    height, width = geometry.output
    down, right = (height + 1) // 2, (width + 1) // 2
    y = tiles.reshape(2, 2, batch, down, right, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(batch, 2 * down, 2 * right, -1)[:, :height, :width]


def _winograd_forward(x: Array, w: Array, geometry: Geometry) -> Array:
    if not _suits_winograd(geometry):
        return _patches_forward(x, w, geometry)
    kernel = _transform(_KERNEL, w.astype(jnp.float32).reshape(9, *w.shape[2:]))
    tiles = _dot(_input_tiles(x, geometry), kernel, (2, 1), batch=1)
    return _untile(_transform(_OUTPUT.T, tiles), len(x), geometry).astype(x.dtype)


def _winograd_input(dy: Array, w: Array, geometry: Geometry) -> Array:
    if not _suits_winograd(geometry):
        return _patches_input(dy, w, geometry)
    (top, bottom), (left, right) = geometry.padding
    back = Geometry(
        geometry.output, (3, 3), (1, 1), ((2 - top, 2 - bottom), (2 - left, 2 - right))
    )
    kernel = _transform(_FLIPPED, w.astype(jnp.float32).reshape(9, *w.shape[2:]))
    tiles = _dot(_input_tiles(dy, back), kernel, (2, 2), batch=1)
    return _untile(_transform(_OUTPUT.T, tiles), len(dy), back).astype(dy.dtype)


def _winograd_weights(x: Array, dy: Array, geometry: Geometry) -> Array:
    if not _suits_winograd(geometry):
        return _patches_weights(x, dy, geometry)
    # Without the barrier XLA keeps the tiles of the forward pass, 4 times the input.
    tiles = _input_tiles(lax.optimization_barrier(x), geometry)
    seen = _transform(_OUTPUT, _output_tiles(dy.astype(jnp.float32)))
    dw = _transform(_KERNEL.T, _dot(tiles, seen, (1, 1), batch=1))
    return dw.reshape(3, 3, *dw.shape[1:]).astype(x.dtype)


_NATIVE = Form(_native, _native_input, _native_weights)
_FORMS = {
    "grouped": _NATIVE,
    "unrolled": _NATIVE,
    "patches": Form(_patches_forward, _patches_input, _patches_weights),
    "winograd": Form(_winograd_forward, _winograd_input, _winograd_weights),
}

# Window and stride, the smaller number of channels from which a row holds, and the
# forms of the three passes; the first row that fits. Measured on CPU by
# experiments/bench_conv.py.
_CPU = (
    (1, None, 1, ("patches", "patches", "patches")),
    (3, 1, 64, ("winograd", "winograd", "winograd")),
    (3, 2, 128, ("patches", "patches", "patches")),
    (3, 2, 16, ("grouped", "grouped", "patches")),
)


def _auto(name: str, geometry: Geometry, channels: int, *, stacked: bool) -> str:
    """The form of one pass.

    Stacked weights never get a native convolution on CPU: XLA runs it slowly inside a
    scan. On accelerators nothing was measured: patches for stacked weights and the
    native convolution for one set of them are guesses.
    """
    other = "patches" if stacked else "grouped"
    if jax.default_backend() != "cpu":
        return other
    for window, stride, least, forms in _CPU:
        if (
            geometry.window == (window, window)
            and geometry.strides == (stride or geometry.strides[0],) * 2
            and channels >= least
        ):
            form = forms[Form._fields.index(name)]
            return other if form == "grouped" else form
    return other
