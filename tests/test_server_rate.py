"""Steps of all clients at once: the server's own rate, and the exits' gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import KEY, assert_same
from tiny import CLASSES, DenseLayer, tiny_federation, tiny_model

from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.core import Batch
from hsee_jax.federation.branch import forward, parts_of
from hsee_jax.federation.state import take_member
from hsee_jax.nn import masked_cross_entropy

DENSE = tiny_model((DenseLayer(8), DenseLayer(5)))
# The change of the weights is the gradient times the rate.
FEDERATION = tiny_federation({0: 1, 1: 1}, DENSE)._replace(optimizer=optax.scale(-1.0))
TOGETHER, JOINT = {"turn": "together"}, {"boundary": "joint"}
BOTH = [("sequential", TOGETHER | JOINT), ("fpl", JOINT)]


def step(name, **options):
    """The batch of a step, and the state before and after it, at rate 1."""
    strategy = ALGORITHMS.make(name, FEDERATION, options=options)
    copies = (2,) if name == "vicreg" else ()
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 4, *copies, 5, 5, 1))
    labels = np.tile(rng.integers(0, CLASSES, 4), (2, 1))  # of one event in two views
    batch = Batch(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.ones((2, 4), bool),
    )
    before = jax.jit(strategy.init)(KEY)
    order = jnp.arange(2)
    after, _ = jax.jit(strategy.step)(before, (batch,), order, jnp.float32(1))
    return batch, before, after


def moves(name, **options):
    """How far a step moves the weights of the clients, and those of the server."""
    _, *states = step(name, **options)
    (clients, servers), (moved, served) = (
        [
            [part.params for part in parts_of(branch)]
            for branch in (state.clients[0], state.servers[0])
        ]
        for state in states
    )
    far = partial(jax.tree.map, jnp.subtract)
    return far(moved, clients), far(served, servers)


@pytest.mark.parametrize(
    ("name", "options"),
    [("sequential", TOGETHER), *BOTH, ("fpl", {}), ("vicreg", TOGETHER)],
)
def test_a_server_at_half_the_rate_moves_half_as_far(name, options):
    """The clients move as far as before."""
    clients, server = moves(name, **options)
    same, half = moves(name, **options, server_lr_scale=0.5)
    for leaf in jax.tree.leaves((clients, server)):
        assert jnp.abs(leaf).max() > 1e-3
    assert_same(same, clients, rtol=1e-6, atol=1e-7)
    half_as_far = jax.tree.map(lambda leaf: leaf / 2, server)
    assert_same(half, half_as_far, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), BOTH)
def test_the_layers_take_a_share_of_the_exits_gradient(name, options):
    """Besides what comes from the server; the exit takes the whole, whatever it is."""
    batch, before, without = step(name, **options)
    _, _, after = step(name, **options, exit_gradient=0.5)
    spec = FEDERATION.specs(0)[0]
    for n in range(2):
        old, less, more = (
            take_member(state.clients[0], n) for state in (before, without, after)
        )
        rows = Batch(batch.inputs[n], batch.labels[n], batch.mask[n])

        def exit_loss(params, old=old, rows=rows):
            layer = old.layers[0].replace(params=params)
            branch = old.replace(layers=(layer,))
            logits = forward(spec, branch, rows.inputs, rows.mask, train=True)[1]
            return masked_cross_entropy(logits, rows.labels, rows.mask)[0]

        slopes = jax.grad(exit_loss)(old.layers[0].params)
        expected = jax.tree.map(
            lambda own, slope: own - 0.5 * slope, less.layers[0].params, slopes
        )
        assert_same(more.layers[0].params, expected, rtol=1e-4, atol=1e-6)
        assert_same(more.head.params, less.head.params, rtol=1e-5, atol=1e-7)
