"""Optimizers of optax, and what averaging does to their state, against NumPy."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import KEY, assert_same, branches, train
from tiny import DenseLayer, tiny_data, tiny_federation, tiny_model, tiny_shards

from hsee_jax.algorithms import averaging
from hsee_jax.core import Batch
from hsee_jax.federation import average_layers
from hsee_jax.federation.branch import client_spec, init_client
from hsee_jax.federation.step import branch_step
from hsee_jax.nn import init_network, masked_cross_entropy
from hsee_jax.optim import KEEP, Merge, Optimizer, as_optimizer
from hsee_jax.systems.traffic import nbytes, traffic_of

MODEL = tiny_model((DenseLayer(8), DenseLayer(5)))  # compiles fast
RATES = (0.5, 0.2, 0.05)
DESCENT = as_optimizer(optax.scale(-1.0))


def first_client(optimizer):
    network = jax.jit(lambda: init_network(MODEL, KEY))()
    return client_spec(MODEL, 1, optimizer), init_client(network, 1, optimizer)


def batch():
    data = tiny_data(8)
    images = jnp.asarray(data.images, jnp.float32) / 64 - 1
    return Batch(images, jnp.asarray(data.labels), jnp.ones(8, bool))


@pytest.mark.parametrize(
    "make",
    [optax.adam, lambda rate: optax.sgd(rate, momentum=0.9), optax.rmsprop],
    ids=["adam", "sgd", "rmsprop"],
)
@jax.numpy_dtype_promotion("standard")  # optax relies on it
def test_an_optax_optimizer_at_rate_1_is_optaxs_own_at_each_rate(make):
    """Three steps at falling rates, beside optax's optimizer with a schedule."""
    spec, client = first_client(make(1.0))
    rows = batch()
    step = jax.jit(lambda branch, rate: branch_step(spec, branch, rows, rate))
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.4, 2: 0.25})
    theirs = make(schedule)
    (stage,), head = spec.stages, spec.head

    def loss_of(params):
        own, exit_head = params
        features, _ = stage.apply(
            {"params": own, "batch_stats": {}}, rows.inputs, rows.mask, train=True
        )
        logits, _ = head.apply(
            {"params": exit_head, "batch_stats": {}}, features, rows.mask, train=True
        )
        return masked_cross_entropy(logits, rows.labels, rows.mask)[0]

    @jax.jit
    def their_step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = client.layers[0].params, client.head.params
    state, losses = theirs.init(params), []
    for rate in RATES:
        client, _, metrics = step(client, jnp.float32(rate))
        params, state, loss = their_step(params, state)
        np.testing.assert_allclose(metrics.loss_sum / 8, loss, rtol=1e-4)
        losses.append(float(loss))
        ours = client.layers[0].params, client.head.params
        assert_same(ours, params, rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]


def test_an_optimizer_that_asks_for_the_rate_gets_that_of_the_step():
    def update(updates, state, params=None, *, learning_rate, **extra):
        del params, state, extra
        return jax.tree.map(jnp.negative, updates), learning_rate

    asks = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    spec, client = first_client(asks)
    plain_spec, plain = first_client(DESCENT)
    rows = batch()
    for rate in RATES[:2]:
        client, _, _ = branch_step(spec, client, rows, jnp.float32(rate))
        plain, _, _ = branch_step(plain_spec, plain, rows, jnp.float32(rate))
        for layer in (*client.layers, client.head):
            assert layer.opt_state == jnp.float32(rate)
    assert_same(client.head.params, plain.head.params, rtol=1e-6)


class Moments(NamedTuple):
    """Of a layer: a mean of gradients, and a mean of their squares."""

    first: object  # averaged with the layer
    second: object  # the holder's own


def negative(tree):
    return jax.tree.map(jnp.negative, tree)


def marks(tree, mark):
    return jax.tree.map(lambda _: mark, tree)


def two_moments():
    """Descend along the first moment, which averages share; the second is local."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments(zeros, zeros)

    def update(updates, state, params=None, **extra):
        del params, extra
        first = jax.tree.map(lambda m, g: 0.5 * m + g, state.first, updates)
        second = jax.tree.map(lambda m, g: 0.5 * m + g * g, state.second, updates)
        return negative(first), Moments(first, second)

    def shared(state):
        return Moments(marks(state.first, True), marks(state.second, False))

    return Optimizer(init, update, KEEP._replace(shared=shared))


def moments_by_hand(old, mean, state, mean_state):
    del old, mean
    return Moments(mean_state.first, state.second)


def quasi_global():
    """Descend along the momentum, which is made of what averages moved."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None, **extra):
        del params, extra
        return negative(jax.tree.map(jnp.add, updates, state)), state

    def merge(old, mean, state):
        return jax.tree.map(lambda o, m, s: 0.5 * s + (o - m), old, mean, state)

    return Optimizer(init, update, Merge(lambda state: marks(state, False), merge))


def momentum_by_hand(old, mean, state, mean_state):
    del mean_state
    return jax.tree.map(lambda o, m, s: 0.5 * s + (o - m), old, mean, state)


CUTS = {4: 1, 1: 2, 6: 1, 5: 1}
SIZES = {4: 7, 1: 3, 6: 9, 5: 6}
RULES = {
    "moments": (two_moments, moments_by_hand),
    "quasi-global": (quasi_global, momentum_by_hand),
}


def held_by(server, layer):
    """The server's state of a layer, counted from the last one; 0 is the head."""
    parts = [server.head, *reversed(server.layers)]
    return parts[layer] if layer < len(parts) else None


def check_means(before, after, weights, by_hand):
    """Compare the servers after a mean with NumPy's mean of those before."""
    for layer in range(len(MODEL.stages)):
        holders = {i: held_by(server, layer) for i, (_, server) in before.items()}
        holders = {i: held for i, held in holders.items() if held is not None}
        shares = [weights[i] for i in holders]

        def mean(*leaves, shares=shares):
            return np.average(np.stack(leaves), axis=0, weights=shares)

        states = list(holders.values())
        params = jax.tree.map(mean, *(held.params for held in states))
        common = jax.tree.map(mean, *(held.opt_state for held in states))
        for i, held in holders.items():
            ours = held_by(after[i][1], layer)
            state = by_hand(held.params, params, held.opt_state, common)
            assert_same(ours.params, params, rtol=1e-4, atol=1e-6)
            assert_same(ours.opt_state, state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["loop", "vmap", "host"])
def test_a_rule_of_its_own_is_followed_by_all_holders(rule, how):
    """The absent are not in the mean, and receive it all the same.

    On the host they, who were there the round before, have no slot in this one, and
    receive it when they are asked for their state.
    """
    make, by_hand = RULES[rule]
    federation = tiny_federation(CUTS, MODEL)._replace(optimizer=make())
    draw = {"participation": 0.5} if how == "host" else {"missing": {1: {6}}}
    shards = tiny_shards(SIZES)
    once = averaging(federation, period=2)  # after the second round
    never = averaging(federation, period=0)
    alone, log = train(never, federation, shards, axis="loop", **draw)
    axis = "vmap" if how == "vmap" else "loop"
    few = how == "host"
    merged, _ = train(once, federation, shards, axis=axis, few=few, **draw)
    plan = log[-1][0]
    present = set(plan.ids[plan.active].tolist())
    assert present == ({1, 5} if few else {1, 4, 5})
    weights = {i: SIZES[i] * (i in present) for i in CUTS}
    found = [branches(federation, once, state) for state in (alone, merged)]
    check_means(*found, weights, by_hand)


def test_the_rule_goes_on_from_the_state_that_it_made():
    """The second mean takes up the momentum of the first: twice by hand."""
    federation = tiny_federation(CUTS, MODEL)._replace(optimizer=quasi_global())
    strategy = averaging(federation)
    state = jax.jit(strategy.init)(KEY)
    rng = np.random.default_rng(0)
    weights = {4: 7.0, 1: 3.0, 6: 0.0, 5: 6.0}
    by_group = tuple(
        jnp.asarray([weights[i] for i in group.ids]) for group in federation.groups
    )
    means_of = jax.jit(partial(average_layers, strategy))
    for _ in range(2):
        state = state.replace(
            servers=jax.tree.map(
                lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32),
                state.servers,
            )
        )
        before = branches(federation, strategy, state)
        state, _ = means_of(state, by_group)
        after = branches(federation, strategy, state)
        check_means(before, after, weights, momentum_by_hand)


def test_clients_send_what_a_rule_shares():
    """With all layers averaged: parameters and the first moment, as many bytes."""
    federation = tiny_federation(CUTS, MODEL)._replace(optimizer=two_moments())
    strategy = averaging(federation, average="all_holders")
    state = jax.eval_shape(strategy.init, KEY)
    for one, stack in zip(
        traffic_of(federation, strategy, state), state.clients, strict=True
    ):
        parts = [part.params for part in (*stack.layers, stack.head)]
        assert one.weights == 2 * nbytes(parts) // jax.tree.leaves(parts)[0].shape[0]
