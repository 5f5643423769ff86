"""Losses and accuracy over the real rows of a padded batch."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hsee_jax.core.types import Array, Metrics

# Traced once for each shape of logits, whatever programs have it.
_cross_entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels, inline=True)


def masked_cross_entropy(
    logits: Array, labels: Array, mask: Array
) -> tuple[Array, Metrics]:
    """Return the mean softmax cross-entropy over the rows with a true mask.

    Args:
      logits: ``float32 [B, K]``.
      labels: ``int32 [B]``, each in ``0..K-1``.
      mask: ``bool [B]``, false on padding.

    Returns:
      The mean, in nats, ``float32 []`` (0 if all rows are padding), and the sums behind
      it. A row with a logit that is not finite counts as wrong.
    """
    chex.assert_rank([logits, labels, mask], [2, 1, 1])
    chex.assert_equal_shape_prefix([logits, labels, mask], 1)
    chex.assert_type([logits, labels, mask], [jnp.float32, jnp.int32, bool])
    losses = _cross_entropy(logits, labels)
    loss_sum = jnp.sum(jnp.where(mask, losses, 0.0))
    count = jnp.sum(mask, dtype=jnp.int32)
    correct = jnp.sum((predicted_class(logits) == labels) & mask, dtype=jnp.int32)
    mean = loss_sum / jnp.maximum(count, 1).astype(jnp.float32)
    return mean, Metrics(loss_sum, correct, count)


def distillation_loss(
    logits: Array, teacher: Array, mask: Array, temperature: float
) -> Array:
    """Return how far a student's softened answers are from its teacher's.

    After Hinton, Vinyals and Dean (arXiv:1503.02531): the divergence of the student's
    softmax from the teacher's, both at temperature T, times T squared, so that its
    gradient does not shrink as T grows. The gradient by a row's logits is
    ``T (softmax(logits / T) - softmax(teacher / T))``, over the number of real rows.

    Args:
      logits: of the student, ``float32 [B, K]``.
      teacher: the teacher's logits, ``float32 [B, K]``; they get no gradient.
      mask: ``bool [B]``, false on padding.
      temperature: T, more than 0.

    Returns:
      The mean over the rows with a true mask, in nats, ``float32 []``; 0 if all rows
      are padding.
    """
    chex.assert_rank([logits, teacher, mask], [2, 2, 1])
    chex.assert_equal_shape([logits, teacher])
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    own = jax.nn.log_softmax(logits / temperature)
    losses = optax.losses.kl_divergence_with_log_targets(own, target)
    count = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    return temperature**2 * jnp.sum(jnp.where(mask, losses, 0.0)) / count


def finite_rows(logits: Any) -> Any:
    """Return which rows hold only finite logits.

    Args:
      logits: ``float [..., K]``, of JAX or of NumPy.

    Returns:
      ``bool [...]``, an array of the same library.
    """
    library = jnp if isinstance(logits, jax.Array) else np
    return library.isfinite(logits).all(axis=-1)


def predicted_class(logits: Any) -> Any:
    """Return the class with the highest logit.

    The arg max of NaN is class 0, so a broken network would be right on every sample of
    class 0. Therefore a row with a logit that is not finite has no class.

    Args:
      logits: ``float [..., K]``, of JAX or of NumPy.

    Returns:
      ``int [...]``, an array of the same library; -1 where a logit is not finite.
    """
    library = jnp if isinstance(logits, jax.Array) else np
    return library.where(finite_rows(logits), logits.argmax(axis=-1), -1)


def predictive_entropy(logits: Array) -> Array:
    """Return the entropy of the softmax, a measure of an exit's uncertainty.

    Args:
      logits: ``float [..., K]``.

    Returns:
      The entropy ``[...]``, in nats, between 0 and ``log K``.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
