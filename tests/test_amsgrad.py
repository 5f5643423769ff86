"""AMSGrad by hand, and what its averages share."""

import jax
import jax.numpy as jnp
import numpy as np
from rounds import KEY, branches, train
from tiny import DenseLayer, tiny_federation, tiny_model, tiny_shards

from hsee_jax.algorithms import averaging
from hsee_jax.federation.aggregation import layer_mean, receive
from hsee_jax.federation.branch import LayerState
from hsee_jax.optim import amsgrad
from hsee_jax.systems.traffic import nbytes, traffic_of

MODEL = tiny_model((DenseLayer(8), DenseLayer(5)))


def test_three_steps_by_hand():
    """With b1 = .5, b2 = .75, decay .1, from x = 1, at rate 1.

    g = 2:  m = 1, v = 1 = v_hat, x = 1 - (1 / 1 + .1) = -.1;
    g = 0:  m = .5, v = .75, v_hat = 1, x = -.1 - (.5 - .01) = -.59;
    g = -4: m = -1.75, v = 4.5625 = v_hat.
    """
    optimizer = amsgrad(beta1=0.5, beta2=0.75, weight_decay=0.1)
    params = {"w": jnp.ones((1, 1)), "b": jnp.ones(1)}
    state, seen = optimizer.init(params), []
    for gradient in (2.0, 0.0, -4.0):
        grads = jax.tree.map(lambda p, g=gradient: jnp.full(p.shape, g), params)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append((float(params["w"][0, 0]), float(state.largest["w"][0, 0])))
    last = -0.59 + 1.75 / 4.5625**0.5 + 0.059
    expected = [(-0.1, 1.0), (-0.59, 1.0), (last, 4.5625)]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    bias = 1 - 1 - 0.5 + 1.75 / 4.5625**0.5  # without decay
    np.testing.assert_allclose(params["b"], [bias], rtol=1e-5)


def test_holders_of_unlike_scale_share_one_largest_square():
    """Gradients of 1 and 100, weights 3 and 1; each keeps its own mean square."""
    optimizer = amsgrad(weight_decay=0.0)
    params = {"w": jnp.zeros((2, 1, 1))}
    gradients = {"w": jnp.array([1.0, 100.0]).reshape(2, 1, 1)}
    updates, state = jax.vmap(optimizer.update)(
        gradients, jax.vmap(optimizer.init)(params), params
    )
    np.testing.assert_allclose(updates["w"].ravel(), [-1.0, -1.0], rtol=1e-4)
    layer = LayerState(jax.tree.map(jnp.add, params, updates), {}, state)
    mean = layer_mean(
        [layer],
        [jnp.array([3.0, 1.0])],
        number=jnp.int32(1),
        optimizer=optimizer,
    )
    after = jax.vmap(lambda own: receive(own, mean, jnp.int32(0), optimizer=optimizer))(
        layer
    )
    square = 0.01 * np.array([1.0, 1e4])
    own = after.opt_state
    np.testing.assert_allclose(own.square["w"].ravel(), square, rtol=1e-4)
    common = np.average(square, weights=[3, 1])
    np.testing.assert_allclose(own.largest["w"].ravel(), [common] * 2, rtol=1e-4)
    mean_gradient = 0.1 * np.average([1, 100], weights=[3, 1])
    np.testing.assert_allclose(own.mean["w"].ravel(), [mean_gradient] * 2, rtol=1e-4)


def test_moments_cross_the_link_with_the_weights():
    federation = tiny_federation({0: 1, 1: 2}, MODEL)._replace(optimizer=amsgrad())
    strategy = averaging(federation, average="all_holders")
    shapes = jax.eval_shape(strategy.init, KEY)
    for one, stack in zip(
        traffic_of(federation, strategy, shapes), shapes.clients, strict=True
    ):
        parts = [part.params for part in (*stack.layers, stack.head)]
        assert one.weights == 3 * nbytes(parts)
    state, _ = train(strategy, federation, tiny_shards({0: 8, 1: 4}), axis="loop")
    found = branches(federation, strategy, state)
    (_, first), (_, second) = found.values()
    one, other = first.layers[-1].opt_state, second.head.opt_state
    assert np.array_equal(
        *(jax.tree.leaves(s.head.opt_state.largest)[0] for s in (first, second))
    )
    assert np.abs(jax.tree.leaves(one.largest)[0]).max() > 0
    assert np.abs(jax.tree.leaves(other.square)[0]).max() > 0
