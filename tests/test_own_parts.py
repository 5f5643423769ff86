"""The engine with parts of a researcher's own: what counts, and what is refused."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from page_blocks import read_blocks
from rounds import KEY, assert_same, train
from tiny import (
    CLASSES,
    PIPELINE,
    DenseLayer,
    tiny_data,
    tiny_federation,
    tiny_model,
    tiny_shards,
)

from hsee_jax.algorithms import averaging, fpl, sequential
from hsee_jax.config import override, preset
from hsee_jax.core import Dataset, UserError
from hsee_jax.data import DatasetInfo, normalize, partition
from hsee_jax.engine import client_axis, make_round, placement
from hsee_jax.engine.plan import plan_round, turn_order
from hsee_jax.federation import (
    REDUCERS,
    Client,
    LayerState,
    group_clients,
    layer_mean,
    receive,
    server_of,
)
from hsee_jax.inference.criteria import Criterion, uncertainty_of
from hsee_jax.nn.model import from_linen
from hsee_jax.nn.registry import NETWORKS
from hsee_jax.optim import SCHEDULES, make_schedule
from hsee_jax.parallel.mesh import make_mesh
from hsee_jax.runs.model import build_model

DOCS = Path(__file__).parents[1] / "docs"
BFLOAT16_WEIGHTS = {"dtype": jnp.float32, "param_dtype": jnp.bfloat16}


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


def head(classes, **fields):
    """A head that flattens, and is a dense layer."""

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x, mask, *, train):
            return nn.Dense(classes, **fields)(x.reshape(len(x), -1))

    return from_linen(Head())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda own: {"exit_heads": own.exit_heads[1:]}, "3 layers with 2 exit heads"),
        (lambda own: {"layer_names": own.layer_names[1:]}, "and 2 names are not"),
        (lambda own: {"layer_names": ("a", "b", "a")}, "the layer names a, b, a are"),
        (lambda own: {"layer_names": ("0", "1", "2")}, "the layer names 0, 1, 2 are"),
        (
            lambda own: {"final_head": head(CLASSES + 1)},
            r"float32 \[1, 4\] for",
        ),
        (
            lambda own: {"final_head": head(CLASSES, dtype=jnp.bfloat16)},
            r"a head gives bfloat16 \[1, 3\]",
        ),
        (
            lambda own: {"final_head": head(CLASSES, **BFLOAT16_WEIGHTS)},
            "parameters in bfloat16 are not allowed",
        ),
    ],
)
def test_a_network_whose_parts_do_not_fit_is_refused(changes, said, monkeypatch):
    monkeypatch.setattr(NETWORKS, "_entries", dict(NETWORKS.items()))

    @NETWORKS.register
    def crooked(*, num_classes, input_shape):
        """A network with a fault."""
        own = tiny_model(input_shape=input_shape, classes=num_classes)
        return own._replace(**changes(own))

    config = override(preset("demo"), network="crooked")
    info = DatasetInfo((5, 5, 1), CLASSES, (0.5,), (0.5,))
    with pytest.raises(UserError, match=f"^network: .*{said}"):
        build_model(config, info)


@pytest.mark.parametrize(
    ("dealt", "said"),
    [
        ([[True] * 6, [False] * 6], "what client 0 is dealt is not allowed"),
        ([[0, 1, 2], [3, -1]], "what client 1 is dealt .* indices of samples, 0..5"),
        ([[0, 1], [2, 6]], "what client 1 is dealt"),
        ([[0, 1, 1], [2]], "what client 0 is dealt"),
        ([[0.0, 1.0], [2.0]], "what client 0 is dealt"),
        ([[0, 1, 2]], "1 parts are not allowed for 2 clients"),
    ],
)
def test_a_partition_deals_indices_of_samples(dealt, said):
    def deal(labels, clients, rng):
        return [np.array(part) for part in dealt]

    with pytest.raises(UserError, match=f"^partition: {said}"):
        partition(np.zeros(6, np.int32), 2, deal, seed=0)


def test_two_partners_may_see_one_sample():
    def deal(labels, clients, rng):
        return [np.arange(6)] * clients

    parts = partition(np.zeros(6, np.int32), 2, deal, seed=0)
    assert [part.tolist() for part in parts] == [list(range(6))] * 2


@pytest.mark.parametrize("cut", [-1, 0, 4, "layer1"])
def test_a_network_has_no_such_cut(cut):
    with pytest.raises(UserError, match=rf"^cut: {cut} is not allowed; .* 1\.\.3$"):
        tiny_federation({0: cut}).specs(0)


def test_no_two_clients_have_one_id():
    with pytest.raises(UserError, match="^client: 7 is there twice"):
        group_clients([Client(7, 1), Client(8, 1), Client(7, 2)])
    with pytest.raises(UserError, match="^client: 0 is not .* allowed are 7, 9$"):
        tiny_federation({9: 1, 7: 2}).seat(0)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (lambda count: jnp.nan * count, "gives the rate nan at step 0"),
        (lambda count: 1 / (3 - count), "gives the rate inf at step 3"),
        (lambda count: 0.1 if count < 3 else 0.01, "is not a function of JAX"),
        (lambda count: jnp.ones(2) * count, "does not give one rate"),
    ],
)
def test_a_schedule_gives_a_rate_for_each_step(schedule, said, monkeypatch):
    monkeypatch.setattr(SCHEDULES, "_entries", dict(SCHEDULES.items()))

    @SCHEDULES.register
    def odd(peak, steps):
        """Odd rates."""
        return schedule

    rates = make_schedule("odd", learning_rate=1.0, warmup_steps=0, total_steps=8)
    with pytest.raises(UserError, match=f"^schedule: odd {said}"):
        rates(np.arange(8))


@pytest.mark.parametrize(
    "augment",
    [
        lambda key, images: images[:, 1:],
        lambda key, images: images.astype(jnp.bfloat16),
        lambda key, images: jnp.concatenate([images, images]),
    ],
)
def test_an_augmentation_keeps_the_shape_and_the_type(augment):
    with pytest.raises(UserError, match="^augment: turns float32"):
        PIPELINE._replace(augment=augment).check((5, 5, 1))


def test_samples_have_the_channels_of_their_mean():
    with pytest.raises(ValueError, match="3 and 3 numbers are not .* axis of 1"):
        normalize(jnp.ones((2, 4, 4, 1)), (0.0,) * 3, (1.0,) * 3)


def test_a_criterion_gives_a_value_for_each_row():
    mean = Criterion(lambda logits: logits.mean(), lambda classes: 1.0)
    with pytest.raises(AssertionError, match="shape"):
        uncertainty_of(mean, jnp.ones((2, 3)))


def test_a_mean_takes_an_optimizer_that_keeps_nothing_for_some_leaves():
    """Muon has momentum for matrices alone, and Adam's moments for vectors."""
    optimizer = optax.contrib.muon(1.0)

    def holder(value):
        params = {"kernel": jnp.full((2, 3), value), "bias": jnp.full((3,), value)}
        state = optimizer.init(params)
        return LayerState(params, {}, jax.tree.map(lambda v: v + 0 * v, state))

    held = jax.tree.map(lambda *both: jnp.stack(both), holder(1.0), holder(4.0))
    weights = [jnp.array([1.0, 2.0])]
    reduce = REDUCERS.make("mean", 0.0).reduce
    mean = layer_mean(
        [held], weights, number=jnp.int32(1), optimizer=optimizer, reduce=reduce
    )
    take = partial(receive, optimizer=optimizer)
    found = jax.vmap(take, (0, None, 0))(held, mean, jnp.zeros(2, jnp.int32))
    for leaf in jax.tree.leaves(found.params):
        np.testing.assert_allclose(leaf, 3.0)
