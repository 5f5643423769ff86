"""The engine with parts of a researcher's own: what counts, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from page_blocks import read_blocks
from rounds import KEY, assert_same, train
from tiny import (
    PIPELINE,
    DenseLayer,
    tiny_data,
    tiny_federation,
    tiny_model,
    tiny_shards,
)

from hsee_jax.algorithms import averaging, fpl, sequential
from hsee_jax.core import Dataset, UserError
from hsee_jax.engine import client_axis, make_round, placement
from hsee_jax.engine.plan import plan_round, turn_order
from hsee_jax.federation import receive, server_of
from hsee_jax.parallel.mesh import make_mesh

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_parts_of_ones_own_take_the_place_of_others(axis):
    """The turn drops what the server learns, and all means are ones."""
    dense = tiny_model((DenseLayer(8), DenseLayer(5)))
    federation, shards = tiny_federation({0: 1, 1: 2}, dense), tiny_shards({0: 6, 1: 5})
    plain = averaging(federation)

    def half(client, server, batch, learning_rate, *, group):
        client, _, metrics = plain.turn(
            client, server, batch, learning_rate, group=group
        )
        return client, server, metrics

    def ones(state, weights):
        return jax.tree.map(jnp.ones_like, plain.aggregate(state, weights))

    def parameters(strategy):
        state, _ = train(strategy, federation, shards, axis=axis, rounds=1)
        servers = [server.layers + (server.head,) for server in state.servers]
        return state.clients, [[p.params for p in parts] for parts in servers]

    begin = jax.jit(plain.init)(KEY).servers
    begin = [[p.params for p in (*server.layers, server.head)] for server in begin]
    own = plain._replace(turn=half, step=None, period=0)
    assert own.halves is None and plain.halves is not None
    clients, servers = parameters(own)
    assert_same(servers, begin, rtol=0, atol=0)
    assert_same(clients, parameters(plain)[0], rtol=1e-5, atol=1e-6)
    _, servers = parameters(plain._replace(aggregate=ones))
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(servers))


@pytest.mark.parametrize("make", [averaging, sequential, fpl])
def test_the_optimizer_of_servers_is_that_of_the_clients(make):
    """The layers of both move between them, and are averaged over both."""
    federation = tiny_federation({0: 1})._replace(server_optimizer=optax.sgd(0.5))
    with pytest.raises(UserError, match="server_optimizer: not allowed"):
        make(federation)


def layer_and_mean(federation):
    """Return the head of a server and its mean."""
    strategy = averaging(federation)
    state = jax.jit(strategy.init)(KEY)
    means = jax.jit(strategy.aggregate)(state, (jnp.ones(1),))
    return server_of(strategy, state, 0, 0).head, means["final head"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda _: client_axis("lopp", "cpu"), "client_axis: lopp is unknown"),
        (lambda own: own._replace(exits="every").specs(0), "exits: every is unknown"),
        (
            lambda own: receive(
                *layer_and_mean(own), 0, optimizer=own.optimizer, batch_norm="local"
            ),
            "batch_norm: local is unknown",
        ),
        (
            lambda _: turn_order([0], steps=1, turn="epochs", seed=0, number=0),
            "turn: epochs is unknown",
        ),
    ],
)
def test_functions_refuse_unknown_names(call, said):
    with pytest.raises(UserError, match=said):
        call(tiny_federation({0: 1}))


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_a_round_has_a_rate_for_each_step(axis):
    federation, shards = tiny_federation({0: 1}), tiny_shards({0: 6})
    strategy = averaging(federation)
    run = make_round(strategy, PIPELINE, KEY, axis=axis)
    plan = plan_round(
        federation.groups,
        shards,
        batch_size=2,
        participation=1.0,
        turn="batch",
        seed=0,
        number=0,
    )
    rates, weights = np.float32([0.1, 0.1]), np.ones(1, np.float32)
    state = jax.jit(strategy.init)(KEY)
    with pytest.raises(ValueError, match="2 learning rates for 3 steps"):
        run(state, tiny_data(6), plan, rates, weights)


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_places_each_sample_of_its_clients_once(monkeypatch, process):
    """Clients 0 and 1 share samples, as views of the same events do."""
    federation = tiny_federation({0: 1, 1: 1, 2: 1, 3: 1}, mesh=make_mesh())
    shards = {
        0: np.array([5, 1]),
        1: np.array([1, 5, 2]),
        2: np.array([3]),
        3: np.array([0]),
    }
    train_set = Dataset(np.arange(7) * 10, np.arange(7))
    monkeypatch.setattr(placement, "process_of_slots", lambda *_: [0, 0, 1, 1])
    monkeypatch.setattr(placement, "place_blocks", lambda data, mesh: data)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    strategy = averaging(federation)
    data, moved = placement.place_data(federation, strategy, [4], train_set, shards)
    assert len(data.labels) == 3  # as many in each process
    for i in ((0, 1), (2, 3))[process]:
        np.testing.assert_array_equal(data.labels[moved[i]], shards[i])
        np.testing.assert_array_equal(data.images[moved[i]], 10 * shards[i])


def test_the_turn_of_the_tutorial_sends_every_other_sample():
    """At half of the bytes; the clients train as in averaging."""
    page = DOCS / "tutorials/own-algorithm.md"
    blocks = [block.code for block in read_blocks(page.read_text(encoding="utf-8"))]
    (code,) = (code for code in blocks if "def thinned" in code)
    algorithms = SimpleNamespace(averaging=averaging, register=lambda **_: lambda f: f)
    names = {"jnp": jnp, "hs": SimpleNamespace(algorithms=algorithms)}
    exec(code, names)
    federation, shards = tiny_federation({0: 1, 1: 2}), tiny_shards({0: 8, 1: 8})
    thinned, plain = (
        train(make(federation), federation, shards, axis="loop", rounds=1)
        for make in (names["thinned"], averaging)
    )
    assert_same(thinned[0].clients, plain[0].clients)
    ((_, _, half),), ((_, _, whole),) = thinned[1], plain[1]
    assert_same(half.exit, whole.exit)
    np.testing.assert_array_equal(2 * half.link, whole.link)
    np.testing.assert_array_equal(2 * half.server.count, whole.server.count)
