"""Update directions and learning rates against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsee_jax.config import Config, override
from hsee_jax.optim import adamw, amsgrad, make_schedule, qgm, sgd
from hsee_jax.runs.build import build_rates


def test_sgd_is_heavy_ball_and_spares_biases():
    """The updates are -d: d1 = g + 0.1 p; d2 = 0.5 d1 + g + 0.1 p.

    The bias has no decay.
    """
    optimizer = sgd(momentum=0.5, weight_decay=0.1)
    params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
    grads = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    state = optimizer.init(params)
    first, state = optimizer.update(grads, state, params)
    second, _ = optimizer.update(grads, state, params)
    np.testing.assert_allclose(
        [first["kernel"][0, 0], second["kernel"][0, 0]], [-1.2, -1.8]
    )
    np.testing.assert_allclose([first["bias"][0], second["bias"][0]], [-1.0, -1.5])


@jax.numpy_dtype_promotion("standard")  # optax relies on it
def test_adamw_decays_beside_the_adaptive_step():
    """The first Adam update is minus the gradient's sign; minus the decay is added."""
    optimizer = adamw(weight_decay=0.1)
    params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
    grads = {"kernel": jnp.full((1, 1), -3.0), "bias": jnp.full(1, 0.5)}
    update, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(update["kernel"][0, 0], 1.0 - 0.2, rtol=1e-4)
    np.testing.assert_allclose(update["bias"][0], -1.0, rtol=1e-4)


@jax.numpy_dtype_promotion("standard")  # optax relies on it
@pytest.mark.parametrize("make", [sgd, adamw, amsgrad, qgm])
def test_no_bias_decays_whatever_its_axes(make):
    """Without gradients only decay moves a parameter; SIAN's biases have two axes."""
    optimizer = make(weight_decay=0.1)
    params = {name: jnp.full((2, 2), 2.0) for name in ("kernel", "bias")}
    grads = jax.tree.map(jnp.zeros_like, params)
    state, rate = optimizer.init(params), jnp.float32(1)
    update, _ = optimizer.update(grads, state, params, learning_rate=rate)
    np.testing.assert_allclose(update["kernel"], -0.2, rtol=1e-5)
    np.testing.assert_array_equal(update["bias"], 0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_warm_up_then_cosine_or_constant(schedule, expected):
    """4 steps up, then (1 + cos(pi k / 4)) / 2 for k = 0..3."""
    rates = make_schedule(schedule, learning_rate=1.0, warmup_steps=4, total_steps=8)
    np.testing.assert_allclose([rates(step) for step in range(8)], expected, rtol=1e-5)


def test_the_rates_of_a_run_end_where_the_run_ends():
    """4 rounds of 10 steps: 5 steps up, then a cosine that the other 35 go down."""
    config = override(Config(), rounds=4, learning_rate=0.2, warmup_rounds=0.5)
    rates = build_rates(override(config, schedule="cosine"), 10)
    assert rates.shape == (4, 10)
    rise = 0.2 * np.arange(1, 6) / 5
    fall = 0.1 * (1 + np.cos(np.pi * np.arange(35) / 35))
    expected = np.concatenate([rise, fall])
    np.testing.assert_allclose(rates.reshape(-1), expected, rtol=1e-3, atol=1e-7)
    assert rates[-1, -1] < 0.01 * rates.max()
