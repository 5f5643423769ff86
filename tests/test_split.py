"""Splitting changes nothing: forward and gradient equal those of the whole network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import OPTIM, tiny_data, tiny_federation, tiny_model

from hsee_jax.core.types import Batch
from hsee_jax.federation.branch import (
    BranchSpec,
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.federation.fused import detached_step, joint_step
from hsee_jax.federation.step import branch_step
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.nn.model import init_network

MODEL = tiny_model()
NETWORK = jax.jit(lambda: init_network(MODEL, jax.random.key(0)))()
# Plain gradient descent: the change of the weights is the gradient.
DESCENT = optax.scale(-1.0)
RATES = (jnp.float32(1.0), jnp.float32(1.0))


def batch(count=6, padding=2):
    data = tiny_data(count + padding)
    images = jnp.asarray(data.images, jnp.float32) / 255
    return Batch(images, jnp.asarray(data.labels), jnp.arange(count + padding) < count)


def whole_loss(layers, head, inputs, labels):
    """Mean cross-entropy of the unsplit network, on rows without padding."""
    mask = jnp.ones(len(labels), bool)
    for stage, variables in zip(MODEL.stages, layers, strict=True):
        inputs, _ = stage.apply(variables, inputs, mask, train=True)
    logits, _ = MODEL.final_head.apply(head, inputs, mask, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_split_forward_is_the_whole_forward(cut, train):
    client, server = (
        init_client(NETWORK, cut, DESCENT),
        init_server(NETWORK, cut, DESCENT),
    )
    rows = batch(padding=0)
    whole = BranchSpec(MODEL.stages, MODEL.final_head, DESCENT)
    _, expected, stats = forward(
        whole, init_server(NETWORK, 0, DESCENT), rows.inputs, rows.mask, train=train
    )
    features, _, client_stats = forward(
        client_spec(MODEL, cut, DESCENT), client, rows.inputs, rows.mask, train=train
    )
    _, logits, server_stats = forward(
        server_spec(MODEL, cut, DESCENT), server, features, rows.mask, train=train
    )
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(
        np.testing.assert_array_equal, (*client_stats[:-1], *server_stats), stats
    )


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_joint_gradient_is_that_of_the_whole_network(cut):
    """Padding rows are added to the split one only: they must not count."""
    padded = batch()
    real = [leaf[:6] for leaf in (padded.inputs, padded.labels)]
    layers, head = jax.jit(jax.grad(whole_loss, argnums=(0, 1), allow_int=True))(
        NETWORK.layers, NETWORK.final_head, *real
    )
    specs = client_spec(MODEL, cut, DESCENT), server_spec(MODEL, cut, DESCENT)
    client, server = (
        init_client(NETWORK, cut, DESCENT),
        init_server(NETWORK, cut, DESCENT),
    )
    joint = jax.jit(
        lambda c, s: joint_step(*specs, c, s, padded, RATES, exit_gradient=1.0)
    )
    alone = jax.jit(lambda c: branch_step(specs[0], c, padded, RATES[0]))
    new_client, new_server, _ = joint(client, server)
    own_exit, _, _ = alone(client)
    for number in range(cut):
        # the exit's gradient comes on top of the server's
        change = jax.tree.map(
            lambda after, exit_alone: exit_alone - after,
            new_client.layers[number].params,
            own_exit.layers[number].params,
        )
        assert_close(change, layers[number]["params"])
    for number in range(cut, 3):
        change = jax.tree.map(
            lambda after, before: before - after,
            new_server.layers[number - cut].params,
            server.layers[number - cut].params,
        )
        assert_close(change, layers[number]["params"])
    change = jax.tree.map(
        lambda after, before: before - after, new_server.head.params, server.head.params
    )
    assert_close(change, head["params"])


def assert_close(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), one, other
    )


@pytest.mark.parametrize("cut", [1, 3])
def test_nothing_flows_back_over_a_detached_cut(cut):
    """The client's step with a server behind it is its step alone, bit for bit."""
    federation = tiny_federation({0: cut})
    specs, optimizer = federation.specs(0), federation.optimizer
    client, server = (
        init_client(NETWORK, cut, optimizer),
        init_server(NETWORK, cut, optimizer),
    )
    rows = batch()

    def server_loss(client_layers):
        """The server's loss as a function of the client's weights."""
        moved = client.replace(layers=client_layers)
        _, features, _ = branch_step(specs[0], moved, rows, RATES[0])
        _, logits, _ = forward(specs[1], server, features, rows.mask, train=True)
        return masked_cross_entropy(logits, rows.labels, rows.mask)[0]

    loss, gradient = jax.jit(jax.value_and_grad(server_loss))(client.layers)
    assert loss > 0.5
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)

    with_server, _, _ = jax.jit(lambda c, s: detached_step(*specs, c, s, rows, RATES))(
        client, server
    )
    alone, _, _ = jax.jit(lambda c: branch_step(specs[0], c, rows, RATES[0]))(client)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        with_server,
        alone,
    )


def test_the_features_sent_are_those_before_the_update():
    specs = tiny_federation({0: 2}).specs(0)
    client = init_client(NETWORK, 2, specs[0].optimizer)
    rows = batch()
    step = jax.jit(lambda c: branch_step(specs[0], c, rows, RATES[0]))
    _, features, _ = step(client)
    before, _, _ = forward(specs[0], client, rows.inputs, rows.mask, train=True)
    np.testing.assert_allclose(features, before, rtol=1e-5, atol=1e-6)


def test_a_batch_of_padding_alone_changes_nothing():
    specs = tiny_federation({0: 2}).specs(0)
    client = init_client(NETWORK, 2, specs[0].optimizer)
    rows = batch(count=0, padding=4)
    after, _, metrics = jax.jit(
        lambda c: branch_step(specs[0], c, rows, jnp.float32(OPTIM.learning_rate))
    )(client)
    jax.tree.map(np.testing.assert_array_equal, after, client)
    assert metrics.count == 0
    assert metrics.loss_sum == 0
