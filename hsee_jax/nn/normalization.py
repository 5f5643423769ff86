"""Normalisations of convolutional networks: BatchNorm and GroupNorm."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from hsee_jax.core.errors import unknown
from hsee_jax.core.trees import expand_like
from hsee_jax.core.types import Array

_DECAY, EPSILON = 0.9, 1e-5


class Norm(nn.Module):
    """Normalisation of ``[B, ..., C]``, with statistics in float32.

    ``"batch"`` is BatchNorm over the real rows. ``"group"`` is GroupNorm (Wu and He,
    ECCV 2018) with 32 groups, or with the largest smaller power of two that divides
    the channels and half the channels.
    """

    kind: str
    dtype: jnp.dtype
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the normalisation."""
        if self.kind == "batch":
            norm = _BatchNorm(self.dtype, self.epsilon, name="bn")
            return norm(x, mask, train=train)
        if self.kind != "group":
            raise unknown("norm", self.kind, ("batch", "group"))
        return nn.GroupNorm(
            num_groups_of(x.shape[-1]),
            epsilon=self.epsilon,
            dtype=self.dtype,
            use_fast_variance=False,
            name="gn",
        )(x)


def num_groups_of(channels: int) -> int:
    """Return the number of groups of GroupNorm for some channels, see `Norm`."""
    return math.gcd(32, max(1, channels // 2), channels)


class _BatchNorm(nn.Module):
    """Batch normalisation, with variables named as in `flax.linen.BatchNorm`."""

    dtype: jnp.dtype
    epsilon: float

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not train:
            inverse = jax.lax.rsqrt(var.value + self.epsilon)
            y = _scaled(x, mean.value, inverse * scale, bias)
            return y.astype(self.dtype)
        y, batch_mean, batch_var = batch_norm(x, mask, scale, bias, self.epsilon)
        if not self.is_initializing():
            mean.value = _DECAY * mean.value + (1 - _DECAY) * batch_mean
            var.value = _DECAY * var.value + (1 - _DECAY) * batch_var
        return y.astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_norm(
    x: Array, mask: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, Array, Array]:
    """Normalise with the statistics of a batch.

    The gradients are those of Ioffe and Szegedy (ICML 2015) in closed form, with two
    sums over the batch; there are derivatives in reverse mode only.

    Args:
      x: ``[B, ..., C]``.
      mask: ``bool [B]``; a row with false is normalised, but not counted.
      scale: ``float32 [C]``.
      bias: ``float32 [C]``.
      epsilon: what is added to the variance.

    Returns:
      The result ``float32 [B, ..., C]``, and the batch's mean and biased variance,
      ``float32 [C]``, through which no gradient flows.
    """
    return _forward(x, mask, scale, bias, epsilon)[0]


# Layers of one shape share their traces.
@functools.partial(jax.jit, static_argnums=4, inline=True)
def _forward(
    x: Array, mask: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    mean, var = _moments(x.astype(jnp.float32), mask)
    inverse = jax.lax.rsqrt(var + epsilon)
    y = _scaled(x, mean, inverse * scale, bias)
    return (y, mean, var), (x, mask, mean, inverse, scale)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _backward(
    _: float, kept: tuple[Array, ...], slopes: tuple[Array, Array, Array]
) -> tuple[Array, None, Array, Array]:
    x, mask, *vectors = kept
    slope, axes = slopes[0], tuple(range(x.ndim - 1))
    rows, share = _counted(x, mask)
    mean, inverse, scale = (_along(x, vector) for vector in vectors)
    normal = (x.astype(jnp.float32) - mean) * inverse
    of_bias = jnp.sum(slope, axes)
    of_scale = jnp.sum(slope * normal, axes)
    by_moments = (_along(x, of_bias) + normal * _along(x, of_scale)) * share
    of_x = (slope - jnp.where(rows, by_moments, 0.0)) * (inverse * scale)
    return of_x.astype(x.dtype), None, of_scale, of_bias


batch_norm.defvjp(_forward, _backward)


def _scaled(x: Array, mean: Array, factor: Array, bias: Array) -> Array:
    centred = x.astype(jnp.float32) - _along(x, mean)
    return centred * _along(x, factor) + _along(x, bias)


def _along(x: Array, vector: Array) -> Array:
    """Return a vector ``[C]`` as ``[1, ..., C]``."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def _moments(x: Array, mask: Array) -> tuple[Array, Array]:
    """Return mean and variance ``[C]`` over the real rows of ``[B, ..., C]``.

    Flax computes the variance as E[x^2] - E[x]^2, which loses all digits where the mean
    is large against the deviation. Here x is first shifted by the mean of its first
    row, which the variance does not depend on. It is near the mean of x, unless that
    row is padding.
    """
    axes = tuple(range(x.ndim - 1))
    rows, share = _counted(x, mask)
    shift = jnp.mean(x[0], axis=axes[:-1])
    shifted = jnp.where(rows, x - _along(x, shift), 0.0)
    first = jnp.sum(shifted, axes) * share
    second = jnp.sum(jnp.square(shifted), axes) * share
    return first + shift, jnp.maximum(second - jnp.square(first), 0.0)


def _counted(x: Array, mask: Array) -> tuple[Array, Array]:
    """Return the mask as ``[B, 1, ...]``, and one over the number of real values.

    A mean is a sum times that number ``float32 []``: XLA merges a product with what
    follows it, and compiles a division as an operation of its own.
    """
    count = jnp.sum(mask) * math.prod(x.shape[1:-1])
    return expand_like(mask, x), 1.0 / count.astype(jnp.float32)
