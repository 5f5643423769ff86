"""Cross-entropy, accuracy and entropy against numbers derived by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsee_jax.nn.losses import masked_cross_entropy, predicted_class, predictive_entropy


def test_padding_rows_do_not_count():
    """log(1 + e^-2) = 0.126928 and 2 + that; the third row is padding."""
    logits = jnp.asarray([[2.0, 0.0], [2.0, 0.0], [9.0, -9.0]], jnp.float32)
    labels = jnp.asarray([0, 1, 1], jnp.int32)
    mean, sums = masked_cross_entropy(logits, labels, jnp.asarray([True, True, False]))
    np.testing.assert_allclose(mean, 1.126928, rtol=1e-6)
    np.testing.assert_allclose(sums.loss_sum, 2.253856, rtol=1e-6)
    assert (int(sums.correct), int(sums.count)) == (1, 2)


def test_padding_alone_is_no_loss():
    logits = jnp.full((2, 3), jnp.nan, jnp.float32)
    mean, sums = masked_cross_entropy(
        logits, jnp.zeros(2, jnp.int32), jnp.zeros(2, bool)
    )
    assert float(mean) == float(sums.loss_sum) == int(sums.count) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_wrong(value):
    """Its arg max may well be the label. The other rows count as before."""
    logits = np.array([[value, value], [5, value], [5, 0], [0, 5]], np.float32)
    labels = jnp.zeros(4, jnp.int32)
    _, sums = jax.jit(masked_cross_entropy)(logits, labels, jnp.ones(4, bool))
    assert (int(sums.correct), int(sums.count)) == (1, 4)
    classes = predicted_class(logits)
    assert isinstance(classes, np.ndarray)
    assert classes.tolist() == [-1, -1, 0, 1]
    np.testing.assert_array_equal(predicted_class(jnp.asarray(logits)), classes)


def test_entropy_is_in_nats():
    """Uniform over 4: log 4; certain: 0; (3/4, 1/4): 0.562335."""
    logits = jnp.asarray(
        [[0.0, 0, 0, 0], [200.0, 0, 0, 0], [np.log(3), 0, -200, -200]], jnp.float32
    )
    np.testing.assert_allclose(
        predictive_entropy(logits), [np.log(4), 0, 0.562335], rtol=1e-5, atol=1e-6
    )
