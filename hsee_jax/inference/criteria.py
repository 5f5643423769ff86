"""Measures of the uncertainty of an exit, each under its name."""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from hsee_jax.core.registry import Registry
from hsee_jax.core.types import Array
from hsee_jax.nn.losses import finite_rows, predictive_entropy

_ROUNDING = 1e-5  # of an uncertainty of 0


class Criterion(NamedTuple):
    """A measure of an exit's uncertainty; a lower value means a surer exit."""

    # logits float32 [B, K] -> float32 [B], 0 or more: at threshold 0 no exit answers
    uncertainty: Callable[[Array], Array]
    largest: Callable[[int], float]  # number of classes -> the largest uncertainty


def uncertainty_of(criterion: Criterion, logits: Array) -> Array:
    """Return the uncertainty of logits ``[B, K]``, as the gate and an export use it.

    It is infinite where a logit is not finite, so that the server answers this row, and
    0 where rounding has made it negative, so that at threshold 0 no exit answers.
    """
    value = criterion.uncertainty(logits)
    chex.assert_shape(value, logits.shape[:1])
    value = jnp.where(value > -_ROUNDING, jnp.maximum(value, 0), value)
    return jnp.where(finite_rows(logits), value, jnp.inf)


# Factories take nothing.
CRITERIA: Registry[Criterion] = Registry("criterion", with_options=False)
register = CRITERIA.register


@CRITERIA.register(summary="entropy of the softmax, in nats")
def entropy() -> Criterion:
    """Measure the entropy of the softmax, in nats: the gate of Hetero-SplitEE."""
    return Criterion(predictive_entropy, math.log)


@CRITERIA.register(summary="1 minus the highest probability")
def confidence() -> Criterion:
    """Measure 1 minus the highest probability."""
    return Criterion(
        lambda logits: 1.0 - _top_probabilities(logits, 1)[:, 0],
        lambda classes: 1 - 1 / classes,
    )


@CRITERIA.register(
    summary="1 minus the lead of the highest probability over the second"
)
def margin() -> Criterion:
    """Measure 1 minus the lead of the highest probability over the second."""

    def uncertainty(logits: Array) -> Array:
        first, second = _top_probabilities(logits, 2).T
        return 1.0 - (first - second)

    return Criterion(uncertainty, lambda classes: 1.0)


def _top_probabilities(logits: Array, count: int) -> Array:
    chex.assert_rank(logits, 2)
    return jax.lax.top_k(jax.nn.softmax(logits), count)[0]
