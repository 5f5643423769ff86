"""Quasi-global momentum against its closed form and NumPy."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds import KEY, assert_same, branches, train
from tiny import TINY, DenseLayer, tiny_federation, tiny_model, tiny_shards

from hsee_jax.algorithms import averaging, fedavg, sequential
from hsee_jax.config import override, preset
from hsee_jax.core import UserError
from hsee_jax.federation.aggregation import layer_mean, receive
from hsee_jax.federation.branch import LayerState
from hsee_jax.optim import qgm
from hsee_jax.runs.build import build

BETA, MU, DECAY = 0.8, 0.6, 0.1
OPTIMIZER = qgm(momentum=BETA, buffer_momentum=MU, weight_decay=DECAY)
MODEL = tiny_model((DenseLayer(8), DenseLayer(5)))
CUTS = {4: 1, 1: 2, 6: 1, 5: 1}
SIZES = {4: 7, 1: 3, 6: 9, 5: 6}


@pytest.mark.parametrize("alone", [False, True])
def test_one_worker_with_a_constant_gradient_has_the_closed_form(alone):
    """m_hat <- .9 m_hat + .1 (.9 m_hat + 1), so m_hat after t means is 10 (1 - .99^t).

    A layer that is never averaged does the same without the means.
    """
    optimizer = qgm(weight_decay=0.0)
    params, gradient = jnp.zeros(()), jnp.ones(())
    state, rate = optimizer.init(params), jnp.float32(0.1)

    @jax.jit
    def step(params, state):
        update = optimizer.update_alone if alone else optimizer.update
        updates, state = update(gradient, state, params, learning_rate=rate)
        params = params + rate * updates
        return params, state if alone else optimizer.merge.merge(params, params, state)

    for t in range(1, 201):
        params, state = step(params, state)
        if t in (1, 50):
            expected = 10 * (1 - 0.99**t)
            np.testing.assert_allclose(state.momentum, expected, rtol=1e-3)
    np.testing.assert_allclose(state.momentum, 8.6602, rtol=1e-3)


def steps_by_hand(x, m, gradients, rates):
    for g, rate in zip(gradients, rates, strict=True):
        x = x - rate * (BETA * m + g + DECAY * x)
    return x


def test_holders_follow_what_the_mean_has_moved():
    """Two periods of three holders: two steps, one step at another rate, absent."""
    rng = np.random.default_rng(0)
    x, m = np.tile(rng.normal(size=(1, 2, 3)), (3, 1, 1)), np.zeros((3, 2, 3))
    layer = LayerState({"w": jnp.asarray(x, jnp.float32)}, {}, None)
    init = jax.vmap(OPTIMIZER.init)(layer.params)
    layer = layer.replace(opt_state=init)
    rates = np.array([[0.2, 0.1], [0.05, 0.0], [0.0, 0.0]])
    weights = np.array([3.0, 1.0, 0.0])

    @jax.jit
    def step(layer, gradients, rates):
        updates, state = jax.vmap(OPTIMIZER.update)(
            gradients, layer.opt_state, layer.params, learning_rate=rates
        )
        params = jax.tree.map(
            lambda p, u: p + rates[:, None, None] * u, layer.params, updates
        )
        return LayerState(params, {}, state)

    for number in (1, 2):
        gradients = rng.normal(size=(2, 3, 2, 3))
        for t in range(2):
            row = {"w": jnp.asarray(gradients[t], jnp.float32)}
            layer = step(layer, row, jnp.asarray(rates[:, t], jnp.float32))
        mean = layer_mean(
            [layer],
            [jnp.asarray(weights, jnp.float32)],
            number=jnp.int32(number),
            optimizer=OPTIMIZER,
        )
        assert jax.tree.leaves(mean.opt_state) == []  # nothing but weights is sent
        since = jnp.full(3, number - 1)
        layer = jax.vmap(
            lambda own, at, mean=mean: receive(own, mean, at, optimizer=OPTIMIZER)
        )(layer, since)
        after = [steps_by_hand(x[i], m[i], gradients[:, i], rates[i]) for i in range(3)]
        new = np.average(after, axis=0, weights=weights)
        for i in (0, 1):
            m[i] = MU * m[i] + (1 - MU) * (x[i] - new) / rates[i].sum()
        x[:] = new
        np.testing.assert_allclose(layer.params["w"], x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            layer.opt_state.momentum["w"], m, rtol=1e-3, atol=1e-5
        )
        assert not m[2].any()


def test_a_batch_norm_that_stays_local_follows_its_own_way():
    rng = np.random.default_rng(1)
    params = {"BatchNorm_0": {"scale": jnp.asarray(rng.normal(size=3), jnp.float32)}}
    layer = LayerState(
        params, {"BatchNorm_0": {"var": jnp.ones(3)}}, OPTIMIZER.init(params)
    )
    rate, gradient = jnp.float32(0.5), jnp.asarray(rng.normal(size=3), jnp.float32)
    updates, state = OPTIMIZER.update(
        {"BatchNorm_0": {"scale": gradient}},
        layer.opt_state,
        params,
        learning_rate=rate,
    )
    moved = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    layer = LayerState(moved, layer.batch_stats, state)
    other = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), layer)
    mean = layer_mean([other], [jnp.ones(2)], number=jnp.int32(1), optimizer=OPTIMIZER)
    after = receive(
        layer, mean, jnp.int32(0), optimizer=OPTIMIZER, batch_norm="keep_local"
    )
    assert_same(after.params, moved)
    momentum = after.opt_state.momentum["BatchNorm_0"]["scale"]
    np.testing.assert_allclose(momentum, (1 - MU) * gradient, rtol=1e-4)


def test_a_layer_that_leaves_the_averages_forgets_its_way():
    """Steps alone begin the sum of what a mean is compared with anew."""
    params, rate = {"w": jnp.ones(3)}, jnp.float32(0.5)
    state = OPTIMIZER.init(params)
    gradient = {"w": jnp.full(3, 2.0)}
    _, state = OPTIMIZER.update(gradient, state, params, learning_rate=rate)
    assert state.rates == 0.5 and state.moved["w"].any()
    _, state = OPTIMIZER.update_alone(gradient, state, params)
    assert state.rates == 0 and not state.moved["w"].any()
    assert state.momentum["w"].all()


def federation_of(optimizer, cuts=CUTS):
    return tiny_federation(cuts, MODEL)._replace(optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [{}, {1: {6, 1}, 2: {6}}])
def test_holders_stay_alike_wherever_their_state_is_kept(missing):
    """On the devices, and on the host, where absent clients skip means."""
    federation = federation_of(OPTIMIZER)
    strategy = averaging(federation, average="all_holders")
    shards, results = tiny_shards(SIZES), []
    options = {"rounds": 3, "missing": missing, "participation": 0.5}
    for axis, few in (("loop", False), ("loop", True), ("vmap", False)):
        state, _ = train(strategy, federation, shards, axis=axis, few=few, **options)
        results.append(branches(federation, strategy, state))
    assert_same(*results[:2], rtol=1e-3, atol=1e-4)
    assert_same(results[0], results[2], rtol=1e-3, atol=1e-4)
    for client, server in results[0].values():
        for layer in (*client.layers, *server.layers):
            assert np.all(layer.opt_state.rates == 0)


@pytest.mark.parametrize(
    ("make", "options", "sides"),
    [
        (averaging, {}, ("server",)),
        pytest.param(
            averaging,
            {"average": "all_holders"},
            ("client", "server"),
            marks=pytest.mark.slow,
        ),
        (averaging, {"period": 0}, ()),
        pytest.param(sequential, {}, (), marks=pytest.mark.slow),
        (sequential, {"average": "clients"}, ("client",)),
    ],
)
def test_layers_in_no_mean_use_the_rule_of_one_worker(make, options, sides):
    """It moves the buffer, and does not count the rates."""
    federation = federation_of(OPTIMIZER, {0: 1, 1: 2})

    rows, _ = train(
        make(federation, **options | ({"period": 2} if sides else {})),
        federation,
        tiny_shards({0: 4, 1: 4}),
        axis="loop",
        rounds=1,
    )
    moved = {
        "client": rows.clients[0].layers[0].opt_state,
        "server": rows.servers[0].layers[0].opt_state,
    }
    for side, own in moved.items():
        assert (np.max(own.rates) > 0) == (side in sides)
        changed = max(np.abs(leaf).max() for leaf in jax.tree.leaves(own.momentum))
        assert (changed > 0) == (side not in sides)


@pytest.mark.slow
def test_under_fedavg_the_buffers_follow_the_means():
    """Two rounds, in which client 0 takes two steps and client 1 takes one.

    A buffer becomes MU m + (1 - MU) (x - mean) / (sum of the client's rates).
    """
    federation = federation_of(OPTIMIZER, {0: 2, 1: 2})
    strategy, shards = fedavg(federation), tiny_shards({0: 7, 1: 3})

    def layers(state):
        found = branches(federation, strategy, state)
        return {i: (*own.layers, server.head) for i, (own, server) in found.items()}

    moments = [layers(jax.jit(strategy.init)(KEY))]
    for rounds in (1, 2):
        state, log = train(strategy, federation, shards, axis="loop", rounds=rounds)
        moments.append(layers(state))
    for (plan, rates, _), (old, new) in zip(log, pairwise(moments), strict=True):
        for i in shards:
            steps = plan.mask[:, plan.ids.tolist().index(i)].any(axis=1)
            assert steps.sum() == (2, 1)[i]
            total = rates[steps].sum()
            for before, after in zip(old[i], new[i], strict=True):
                expected = jax.tree.map(
                    lambda m, x, y, s=total: MU * m + (1 - MU) * (x - y) / s,
                    before.opt_state.momentum,
                    before.params,
                    after.params,
                )
                found = after.opt_state.momentum
                assert_same(found, expected, rtol=1e-3, atol=1e-5)
                assert max(abs(leaf).max() for leaf in jax.tree.leaves(found)) > 1e-2


def test_a_buffer_diverges_where_periods_differ():
    """Two clients take steps with a gradient of 1, and one of them has less to do.

    The right momentum is 1 / (1 - 0.9) = 10 for everyone.
    """
    optimizer = qgm(weight_decay=0.0)
    merge = jax.jit(optimizer.merge.merge)

    @jax.jit
    def step(x, state):
        moves, state = optimizer.update(
            {"w": jnp.ones(())}, state, x, learning_rate=1.0
        )
        return jax.tree.map(jnp.add, x, moves), state

    def largest(periods, rounds=200):
        params = {"w": jnp.zeros(())}
        states, x = [optimizer.init(params) for _ in range(2)], [params, params]
        for counts in periods * rounds:
            for i, count in enumerate(counts):
                for _ in range(count):
                    x[i], states[i] = step(x[i], states[i])
            mean = jax.tree.map(lambda a, b: (a + b) / 2, *x)
            states = [
                merge(own, mean, state) for own, state in zip(x, states, strict=True)
            ]
            x = [mean, mean]
        return max(float(state.momentum["w"]) for state in states)

    assert largest([(3, 3)]) == pytest.approx(10, rel=0.2)
    assert largest([(4, 2)]) < 20  # unequal, but always so
    assert largest([(4, 4), (4, 1)]) > 100  # a last period that is short


@pytest.mark.parametrize("period", [(2, "rounds"), (1, "steps")])
def test_clients_that_train_less_in_some_periods_are_refused(period):
    number, unit = period
    config = override(
        preset("demo"),
        **TINY,
        cuts=("1",),
        optimizer="qgm",
        period=number,
        period_unit=unit,
    )
    build(config)
    for absent in (
        {"participation": 0.5},
        {"dropout": 0.1},
        {"absences": ("0:1-1",)},
        {"deadline": 1e6},
        {"recuts": ("2:2",)},
        {"partition": "quantity", "batch_size": 4}
        if unit == "steps"
        else {"dropout": 0.5},
    ):
        build(override(config, period=1, period_unit="rounds", **absent))
        with pytest.raises(UserError, match=f"period: {number} {unit} is not allowed"):
            build(override(config, **absent))


def test_its_rule_cannot_be_replaced():
    federation = federation_of(OPTIMIZER, {0: 2})
    assert fedavg(federation)
    with pytest.raises(UserError, match="optimizer_state: reset .* allowed is keep"):
        averaging(federation, optimizer_state="reset")
