"""Normalisations against NumPy, Flax, and derivatives taken step by step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsee_jax.nn.normalization import Norm, batch_norm, num_groups_of


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
def test_batch_norm_is_right_far_from_zero(mean):
    """Against NumPy in double precision; only the rows without padding count."""
    noise = np.random.default_rng(0).standard_normal((8, 6, 5, 3))
    x = (mean + 0.1 * noise).astype(np.float32)
    mask = np.arange(8) < 6
    norm = Norm("batch", jnp.dtype("float32"))
    variables = norm.init(jax.random.key(0), x, mask, train=False)
    y, after = norm.apply(variables, x, mask, train=True, mutable=["batch_stats"])
    real = x[:6].astype(np.float64)
    expected = (real - real.mean((0, 1, 2))) / np.sqrt(real.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(y[:6], expected, atol=2e-3)
    stats = after["batch_stats"]["bn"]
    np.testing.assert_allclose(
        stats["mean"], 0.1 * real.mean((0, 1, 2)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * real.var((0, 1, 2)), rtol=1e-5)


def test_batch_norm_is_that_of_flax():
    """Names, shapes, outputs and gradients, where Flax's own form is right."""
    x = np.random.default_rng(1).standard_normal((4, 6, 5, 3)).astype(np.float32)
    mask = np.arange(4) < 3
    ours = Norm("batch", jnp.dtype("float32"))
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
    variables = ours.init(jax.random.key(0), x, mask, train=False)
    inner = {name: part["bn"] for name, part in variables.items()}
    rows = np.broadcast_to(mask[:, None, None, None], x.shape)

    def theirs(x):
        return flax.apply(inner, x, mask=rows, mutable=["batch_stats"])

    def own(x):
        return ours.apply(variables, x, mask, train=True, mutable=["batch_stats"])

    (y, stats), (other, other_stats) = own(x), theirs(x)
    np.testing.assert_allclose(y[:3], other[:3], atol=1e-5)
    for name in ("mean", "var"):
        found = stats["batch_stats"]["bn"][name]
        np.testing.assert_allclose(found, other_stats["batch_stats"][name], rtol=1e-5)
    weights = np.random.default_rng(2).standard_normal(x[:3].shape).astype(np.float32)
    gradients = [
        jax.grad(lambda x, run=run: jnp.sum(run(x)[0][:3] * weights))(x)
        for run in (own, theirs)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_of_batch_norm_are_those_derived_step_by_step(dtype):
    """Of clients under vmap, with padding whose outputs have gradients as well."""
    draws = np.random.default_rng(3)
    x = jnp.asarray(2.0 + draws.standard_normal((2, 4, 6, 5, 3)), dtype)
    scale, bias = jnp.asarray(draws.standard_normal((2, 2, 3)), jnp.float32)
    weights = jnp.asarray(draws.standard_normal(x.shape), jnp.float32)
    mask = np.array([[True, True, True, False], [True, False, True, True]])

    def by_hand(x, mask, scale, bias):
        x, rows = (part.astype(jnp.float32) for part in (x, mask.reshape(-1, 1, 1, 1)))
        count = 30.0 * jnp.sum(rows)
        mean = jnp.sum(x * rows, (0, 1, 2), keepdims=True) / count
        var = jnp.sum((x - mean) ** 2 * rows, (0, 1, 2), keepdims=True) / count
        normal = (x - mean) / jnp.sqrt(var + 1e-5)
        return normal * scale.reshape(1, 1, 1, 3) + bias.reshape(1, 1, 1, 3)

    def ours(x, mask, scale, bias):
        return batch_norm(x, mask, scale, bias, 1e-5)[0]

    def gradients(run):
        def loss(x, scale, bias):
            return jnp.sum(jax.vmap(run)(x, mask, scale, bias) * weights)

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    found, expected = gradients(ours), gradients(by_hand)
    assert found[0].dtype == x.dtype
    close = 1e-4 if dtype == "float32" else 3e-2
    of_x, other = (g[0].astype("float32") for g in (found, expected))
    np.testing.assert_allclose(of_x, other, atol=close)
    for mine, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 24, 64, 512])
def test_group_norm(channels):
    """Against NumPy: groups of two channels or more, 32 of them where that fits."""
    groups = num_groups_of(channels)
    assert channels % groups == 0 and groups <= 32
    assert channels // groups >= min(2, channels)
    if channels >= 64:
        assert groups == 32
    x = np.random.default_rng(0).normal(3.0, 2.0, (2, 4, 4, channels))
    norm = Norm("group", jnp.dtype("float32"))
    mask = jnp.ones(2, bool)
    images = jnp.asarray(x, jnp.float32)
    variables = norm.init(jax.random.key(0), images, mask, train=True)
    assert set(variables) == {"params"}
    found = norm.apply(variables, images, mask, train=True)
    parts = x.reshape(2, 16, groups, -1)
    centred = parts - parts.mean((1, 3), keepdims=True)
    expected = centred / np.sqrt(parts.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected.reshape(x.shape), atol=1e-4)
