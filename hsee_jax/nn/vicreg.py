"""The loss of VICReg between two views, over the real rows of a padded batch."""

import chex
import jax
import jax.numpy as jnp

from hsee_jax.core.types import Array

_VARIANCE = 1e-4  # added to a variance before its root, whose slope at 0 is infinite


def masked_vicreg(
    one: Array,
    other: Array,
    mask: Array,
    *,
    weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
) -> Array:
    """Return the variance-invariance-covariance loss over the rows with a true mask.

    Both views of a sample shall be alike, each feature shall have a standard deviation
    of 1 or more over the samples, and no two features shall vary together (Bardes,
    Ponce and LeCun, ICLR 2022, arXiv:2105.04906). The three terms are scaled as in the
    code of its authors: the mean squared difference, the mean of what is missing in the
    standard deviations of both views, and for each view the squares of all covariances
    of two features, summed and divided by D.

    Args:
      one: the features of one view, ``float32 [B, D]``.
      other: those of the other view of the same samples, ``float32 [B, D]``.
      mask: ``bool [B]``, false on padding.
      weights: of the invariance, the variance and the covariance.

    Returns:
      ``float32 []``. A single real row has no variance, so its loss has a gradient by
      the invariance alone. Without a real row, the gradient is 0.
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


def _spread(view: Array, rows: Array, count: Array) -> tuple[Array, Array]:
    """Return the variance and the covariance term of a view."""
    mean = jnp.sum(jnp.where(rows, view, 0.0), axis=0, keepdims=True) / count
    centred = jnp.where(rows, view - mean, 0.0)
    moments = centred.T @ centred / jnp.maximum(count - 1.0, 1.0)
    deviations = jnp.sqrt(jnp.diagonal(moments) + _VARIANCE)
    missing = jnp.mean(jax.nn.relu(1.0 - deviations))
    size = view.shape[1]
    shared = jnp.sum(jnp.square(moments * (1.0 - jnp.eye(size)))) / size
    return missing, shared
