"""The loss of VICReg over the real rows of a padded batch."""

import chex
import jax
import jax.numpy as jnp

from hsee_jax.core.types import Array

_VARIANCE = 1e-4  # added to a variance: its root has an infinite slope at 0


def masked_vicreg(
    one: Array,
    other: Array,
    mask: Array,
    *,
    weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
) -> Array:
    """Return the variance-invariance-covariance loss over the rows with a true mask.

    The loss compares two augmented copies of each sample (Bardes, Ponce and LeCun, ICLR
    2022, arXiv:2105.04906). It has three terms, scaled as in the authors' code:
    invariance, the mean squared difference between the copies; variance, by how much
    the standard deviation of a feature falls short of 1, as a mean over features and
    copies; and covariance, for each copy the sum of the squared covariances between two
    features, divided by D.

    Args:
      one: the features of one copy, ``float32 [B, D]``.
      other: the features of the other copy, in the same order, ``float32 [B, D]``.
      mask: ``bool [B]``, false on padding.
      weights: of the invariance, the variance and the covariance term.

    Returns:
      ``float32 []``. With a single real row only the invariance has a gradient;
      without a real row the gradient is 0.
    """
    chex.assert_rank([one, other, mask], [2, 2, 1])
    chex.assert_equal_shape([one, other])
    chex.assert_equal_shape_prefix([one, other, mask], 1)
    chex.assert_type([one, other, mask], [jnp.float32, jnp.float32, bool])
    rows = mask[:, None]
    count = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    gaps = jnp.where(rows, one - other, 0.0)
    invariance = jnp.sum(jnp.square(gaps)) / (count * one.shape[1])
    missing, shared = _spread(one, rows, count)
    other_missing, other_shared = _spread(other, rows, count)
    variance = (missing + other_missing) / 2.0
    covariance = shared + other_shared
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


def _spread(copy: Array, rows: Array, count: Array) -> tuple[Array, Array]:
    """Return the variance and the covariance term of a copy."""
    mean = jnp.sum(jnp.where(rows, copy, 0.0), axis=0, keepdims=True) / count
    centred = jnp.where(rows, copy - mean, 0.0)
    moments = centred.T @ centred / jnp.maximum(count - 1.0, 1.0)
    deviations = jnp.sqrt(jnp.diagonal(moments) + _VARIANCE)
    missing = jnp.mean(jax.nn.relu(1.0 - deviations))
    size = copy.shape[1]
    shared = jnp.sum(jnp.square(moments * (1.0 - jnp.eye(size)))) / size
    return missing, shared
