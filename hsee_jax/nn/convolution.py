"""The convolution, in forms that stay fast on CPU and on stacked weights.

Under `jax.vmap` over the weights of several clients XLA makes one grouped convolution
with slow gradients, and on CPU even the gradient of a single convolution by its weights
is slow. `convolution` returns a replacement for `jax.lax.conv_general_dilated` that is
equal to it up to rounding and runs in one of these forms:

=============  ===================================================================
``grouped``    the native convolution; stacked weights become its groups
``unrolled``   the native convolution, called once for each of the stacked weights
``patches``    shifted slices times matrices: no native convolution, more memory
``winograd``   F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308), 16 products where the
               others take 36; only for 3x3 of stride 1 with at most 2 zeros a side,
               else it is ``patches``
``winograd4``  F(4x4, 3x3), 36 products where the others take 144; it rounds about five
               times as coarsely as the others, and has the limits of ``winograd``
``mixed``      a form for each shape, as measured on CPUs; stacked weights never get a
               native one
``auto``       the form of the default backend, see `auto_form`
=============  ===================================================================

In every form, inputs that `jax.vmap` batches under shared weights become one
convolution of a larger batch. Images are NHWC and weights HWIO. A series, NWC, is an
image of height 1. A depthwise convolution is native in the first two forms, and in the
others a sum of shifted images, each times the weights of its place.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from hsee_jax.core.types import Array
from hsee_jax.nn.convolution_choice import (
    WITHOUT_GROUPS,
    Choice,
    Place,
    always,
    choice_of,
    place_of,
)
from hsee_jax.nn.convolution_forms import (
    LAYOUT,
    NATIVE,
    PATCHES,
    SHIFTS,
    Form,
    Geometry,
)
from hsee_jax.nn.winograd import WINOGRAD, WINOGRAD4

_FORMS = {
    "grouped": NATIVE,
    "unrolled": NATIVE,
    "patches": PATCHES,
    "winograd": WINOGRAD,
    "winograd4": WINOGRAD4,
}
_SERIES = ("NWC", "WIO", "NWC")


def convolution(mode: str | Choice = "auto") -> Callable[..., Array]:
    """Return a function that replaces `jax.lax.conv_general_dilated`.

    Args:
      mode: the name of a form, ``"mixed"``, ``"auto"``, or a function that chooses the
        form of each place.

    Returns:
      A function from ``(lhs [N, H, W, C], rhs [k, k, C, F], window_strides, padding,
      ...)`` to ``[N, H', W', F]`` of the same dtype, or from ``lhs [N, T, C]`` and
      ``rhs [k, C, F]`` to ``[N, T', F]``; it sums in float32. Padding is given in
      numbers. Groups are allowed where each channel is a group with one output:
      ``rhs [k, k, 1, C]``. The function raises NotImplementedError on other groups,
      dilation, other layouts and a precision. It has first derivatives, in reverse
      mode.

    Raises:
      ValueError: the mode is unknown.
    """
    choice = mode if callable(mode) else choice_of(mode)

    def conv_general_dilated(
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = LAYOUT,
        feature_group_count: int = 1,
        precision: Any = None,
    ) -> Array:
        shapes = lhs.shape, rhs.shape
        layout = lax.conv_dimension_numbers(*shapes, dimension_numbers)
        known = LAYOUT if lhs.ndim == 4 else _SERIES
        depthwise = feature_group_count == lhs.shape[-1] == rhs.shape[-1]
        if (
            layout != lax.conv_dimension_numbers(*shapes, known)
            or {*(lhs_dilation or ()), *(rhs_dilation or ())} - {1}
            or not (feature_group_count == 1 or depthwise)
            or isinstance(padding, str)
            or precision is not None
        ):
            raise NotImplementedError(
                "only NHWC and HWIO, or NWC and WIO, padding in numbers, the default "
                "precision, no dilation, and no groups but those of single channels"
            )
        if lhs.ndim == 3:
            strides, pads = (1, *window_strides), ((0, 0), *padding)
            image = _convolve(
                choice, lhs[:, None], rhs[None], strides, pads, feature_group_count
            )
            return image[:, 0]
        return _convolve(choice, lhs, rhs, window_strides, padding, feature_group_count)

    return conv_general_dilated


def pass_of(place: Place, form: str) -> Callable[[Array, Array], Array]:
    """Return one pass in one form, a function of the arrays of `Place.shapes`."""
    run = _batchable(always(form), place.name, place.geometry)
    return jax.vmap(run) if place.stack else run


def _convolve(
    choice: Choice,
    x: Array,
    w: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    groups: int,
) -> Array:
    (top, bottom), (left, right) = padding
    geometry = Geometry(
        (x.shape[1], x.shape[2]),
        (w.shape[0], w.shape[1]),
        (strides[0], strides[1]),
        ((top, bottom), (left, right)),
        groups,
    )
    return _differentiable(choice, geometry)(x, w)


@cache  # with the passes below jitted, convolutions of one shape share their traces
def _differentiable(choice: Choice, geometry: Geometry) -> Callable:
    passes = {
        name: jax.jit(_batchable(choice, name, geometry), inline=True)
        for name in Form._fields
    }

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


def _batchable(choice: Choice, name: str, geometry: Geometry) -> Callable:
    """Make one pass, and define it under one or several `jax.vmap`."""

    def choose(a: Array, b: Array, stack: int) -> tuple[str, Callable]:
        form = choice(place_of(name, geometry, a, b, stack))
        depthwise = geometry.groups > 1 and form in WITHOUT_GROUPS
        passes = SHIFTS if depthwise else _FORMS[form]
        return form, partial(getattr(passes, name), geometry=geometry)

    def shares_weights(batched: list[bool]) -> bool:
        return name != "wrt_weights" and not batched[1]

    @custom_vmap
    def single(a: Array, b: Array) -> Array:
        return choose(a, b, 0)[1](a, b)

    @custom_vmap
    def stack(a: Array, b: Array) -> Array:  # [S, ...] both
        form, run = choose(a, b, len(a))
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
