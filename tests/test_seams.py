"""Client and server as two programs give what one program for both gives."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import assert_same
from tiny import ConvLayer, DenseLayer, tiny_data, tiny_federation, tiny_model

from hsee_jax.core import Batch, ExitMetrics
from hsee_jax.core.types import Metrics
from hsee_jax.federation.branch import forward, init_client, init_server
from hsee_jax.federation.crossing import decode, encode, message_bytes
from hsee_jax.federation.fused import detached_step, joint_step
from hsee_jax.federation.step import (
    client_backward,
    client_forward,
    server_step,
    take_step,
)
from hsee_jax.link import CODECS, FULL
from hsee_jax.nn import init_network

MODEL = tiny_model((ConvLayer(4), DenseLayer(8)))
NETWORK = jax.jit(lambda: init_network(MODEL, jax.random.key(0)))()
DESCENT = optax.scale(-1.0)
RATES = (jnp.float32(0.1), jnp.float32(0.05))


class Norm(nn.Module):
    """BatchNorm of features [B, C] over the real rows."""

    @nn.compact
    def __call__(self, x, mask, *, train):
        rows = jnp.broadcast_to(mask[:, None], x.shape)
        return nn.BatchNorm(use_running_average=not train)(x, mask=rows)


def sides(codec="full", cut=1):
    """What both compute, and their states."""
    federation = tiny_federation({0: cut}, MODEL)
    specs = federation._replace(codec=CODECS.make(codec)).specs(0)
    client = init_client(NETWORK, cut, federation.optimizer)
    return specs, client, init_server(NETWORK, cut, federation.optimizer)


def batches(count=2):
    """Eight rows each, of which the last two are padding."""
    data = tiny_data(8 * count)
    images = jnp.asarray(data.images, jnp.float32) / 64 - 1
    labels, mask = jnp.asarray(data.labels), jnp.arange(8) < 6
    return [
        Batch(images[8 * k : 8 * k + 8], labels[8 * k : 8 * k + 8], mask)
        for k in range(count)
    ]


def decode_on_server(spec, server, message, labels, mask, rate, *, joint):
    batch = Batch(decode(spec, message), labels, mask)
    return server_step(spec, server, batch, rate, joint=joint)


class Sides:
    """A client and a server that share nothing but what crosses the link."""

    def __init__(self, specs, exit_gradient):
        own, other = specs
        joint = exit_gradient is not None
        share = exit_gradient if joint else 1.0
        full = own._replace(codec=FULL)  # the same programs for every codec
        self._forward = jax.jit(partial(client_forward, full, exit_gradient=share))
        self._backward = jax.jit(partial(client_backward, full))
        self._encode = jax.jit(partial(encode, own))
        self._count = jax.jit(partial(message_bytes, own))
        self._serve = jax.jit(partial(decode_on_server, other, joint=joint))

    def step(self, client, server, batch):
        passed = self._forward(client, batch)
        message, client = self._encode(client, passed.features, batch.mask)
        served = self._serve(server, message, batch.labels, batch.mask, RATES[1])
        client, scored = self._backward(client, passed, RATES[0], served.gradient)
        link = self._count(message, batch.mask, served.gradient)
        return client, served.server, ExitMetrics(scored, served.metrics, link)

    def programs(self):
        """How often each part was compiled."""
        parts = self._forward, self._encode, self._serve, self._backward
        return [part._cache_size() for part in parts]


def fused(specs, exit_gradient):
    """The same step as one function."""
    if exit_gradient is None:
        return lambda c, s, b: detached_step(*specs, c, s, b, RATES)
    return lambda c, s, b: joint_step(
        *specs, c, s, b, RATES, exit_gradient=exit_gradient
    )


@pytest.mark.parametrize("codec", ["full", "int8"])
@pytest.mark.parametrize("exit_gradient", [None, 0.0, 0.5])
def test_two_programs_give_what_one_gives(codec, exit_gradient):
    """Over two steps; up to rounding, as XLA compiles a part by itself otherwise."""
    specs, client, server = sides(codec)
    parts = Sides(specs, exit_gradient)
    whole = jax.jit(fused(specs, exit_gradient))
    apart = together = (client, server)
    for batch in batches():
        *apart, scored = parts.step(*apart, batch)
        *together, expected = whole(*together, batch)
        assert_same(scored, expected, rtol=1e-6)
    assert parts.programs() == [1] * 4
    assert_same(apart, together, rtol=1e-5, atol=1e-6)
    moved = apart[0].layers[0].params["Conv_0"]["kernel"]
    assert np.abs(moved - client.layers[0].params["Conv_0"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize("exit_gradient", [None, 0.5])
def test_the_parts_in_one_program_are_the_whole_bit_for_bit(exit_gradient):
    specs, client, server = sides("int8")
    (batch,) = batches(1)
    parts = jax.jit(Sides(specs, exit_gradient).step)(client, server, batch)
    whole = jax.jit(fused(specs, exit_gradient))(client, server, batch)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_the_client_pulls_back_the_gradient_that_it_receives():
    """Descent at rate 1 moves the layers by what a plain pullback gives."""
    federation = tiny_federation({0: 1}, MODEL)
    spec = federation.specs(0)[0]._replace(optimizer=DESCENT)
    client = init_client(NETWORK, 1, DESCENT)
    (batch,) = batches(1)
    passed = jax.jit(lambda c: client_forward(spec, c, batch, exit_gradient=0.0))(
        client
    )
    gradient = np.sin(np.arange(passed.features.size, dtype=np.float32))
    gradient = gradient.reshape(passed.features.shape)

    @jax.jit
    def moves(client):
        def sent(params):
            pairs = zip(client.layers, params, strict=True)
            layers = tuple(layer.replace(params=p) for layer, p in pairs)
            moved = client.replace(layers=layers)
            return forward(spec, moved, batch.inputs, batch.mask, train=True)[0]

        return jax.vjp(sent, tuple(layer.params for layer in client.layers))[1](
            jnp.asarray(gradient)
        )[0]

    after, _ = jax.jit(
        lambda c, p, g: client_backward(spec, c, p, jnp.float32(1.0), g)
    )(client, passed, gradient)
    for layer, old, move in zip(
        after.layers, client.layers, moves(client), strict=True
    ):
        expected = jax.tree.map(jnp.subtract, old.params, move)
        assert_same(layer.params, expected, rtol=1e-4, atol=1e-5)


def test_a_client_that_cannot_take_its_step_refuses_it_alone():
    specs, client, server = sides()
    parts, (batch,) = Sides(specs, 0.0), batches(1)
    head = jax.tree.map(lambda leaf: leaf * jnp.nan, client.head.params)
    broken = client.replace(head=client.head.replace(params=head))
    after, served, metrics = parts.step(broken, server, batch)
    jax.tree.map(np.testing.assert_array_equal, after, broken)
    assert np.isnan(metrics.exit.loss_sum)
    assert np.isfinite(metrics.server.loss_sum)
    moves = jax.tree.map(
        lambda new, old: np.abs(new - old).max(), served.head.params, server.head.params
    )
    assert max(jax.tree.leaves(moves)) > 1e-4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_enough_to_refuse_a_step(value):
    """Put the number into each leaf of gradients, statistics and loss in turn."""
    model = tiny_model((ConvLayer(4), DenseLayer(8), Norm()))
    spec = tiny_federation({0: 3}, model).specs(0)[0]
    network = jax.jit(lambda: init_network(model, jax.random.key(0)))()
    client = init_client(network, 3, spec.optimizer)
    parts = (*client.layers, client.head)
    found = (
        tuple(jax.tree.map(jnp.ones_like, part.params) for part in parts),
        tuple(part.batch_stats for part in parts),
        np.float32(0.5),
    )
    leaves, tree = jax.tree.flatten(jax.device_get(found))

    def step(leaves):
        grads, stats, loss = jax.tree.unflatten(tree, leaves)
        metrics = Metrics(loss, jnp.int32(1), jnp.int32(6))
        return take_step(spec, client, grads, stats, jnp.float32(0.1), metrics)

    rows = len(leaves) + 1  # the last row stays finite
    many = [np.repeat(leaf[None], rows, axis=0) for leaf in leaves]
    for row, leaf in enumerate(many):
        leaf[row : row + 1].reshape(-1)[-1] = value
    after, metrics = jax.jit(jax.vmap(step))(many)
    assert np.isnan(metrics.loss_sum[:-1]).all() and np.isfinite(metrics.loss_sum[-1])
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(client), strict=True):
        np.testing.assert_array_equal(new[:-1], np.stack([old] * (rows - 1)))
    moved = jax.tree.map(lambda new, old: (new[-1] != old).any(), after, client)
    assert all(map(all, (jax.tree.leaves(layer.params) for layer in moved.layers)))


def test_a_client_refuses_the_step_that_its_server_refuses():
    """The server's running statistics are broken, but not the gradient it computes."""
    model = tiny_model((DenseLayer(8), Norm()))
    federation = tiny_federation({0: 1}, model)
    specs, (batch,) = federation.specs(0), batches(1)
    network = jax.jit(lambda: init_network(model, jax.random.key(0)))()
    client = init_client(network, 1, federation.optimizer)
    server = init_server(network, 1, federation.optimizer)
    stats = jax.tree.map(lambda leaf: leaf * jnp.nan, server.layers[0].batch_stats)
    broken = server.replace(layers=(server.layers[0].replace(batch_stats=stats),))
    *after, metrics = Sides(specs, 0.0).step(client, broken, batch)
    jax.tree.map(np.testing.assert_array_equal, after, [client, broken])
    assert np.isnan(metrics.exit.loss_sum) and np.isnan(metrics.server.loss_sum)
