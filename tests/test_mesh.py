"""One, several and fake devices: the same results, and who talks to whom."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds import assert_same, branches, train
from test_strategies import ALIKE, CUTS, LAST, SIZES
from tiny import PIPELINE, tiny_data, tiny_federation, tiny_shards

from hsee_jax.algorithms import averaging, fedavg, sequential, splitfed_v1, vicreg
from hsee_jax.algorithms.compose import compose
from hsee_jax.algorithms.properties import Properties
from hsee_jax.data import AUGMENTATIONS
from hsee_jax.engine.evaluation import make_evaluation
from hsee_jax.engine.host_store import HostStore
from hsee_jax.federation import average_layers
from hsee_jax.parallel.mesh import SAME, make_mesh, to_devices


def composed(federation, **properties):
    return compose(federation, Properties(**properties))


TOGETHER = {"turn": "together", "boundary": "joint", "gradient_share": 0.5}
JOINT = {"shared": True, "average": "clients", "boundary": "joint"}
STRATEGIES = {
    "sequential": (sequential, {}),
    "epoch": (sequential, {"turn": "epoch"}),
    "together": (sequential, TOGETHER | {"average": "clients"}),
    "averaging": (averaging, {"average": "all_holders"}),
    "median": (averaging, {"aggregate": "median", "weights": "uniform"}),
    "steps": (averaging, {"period": 2, "period_unit": "steps"}),
    "clients": (composed, {"shared": True, "average": "clients"}),
    "joint": (composed, JOINT),
    "joint-steps": (composed, JOINT | {"period": 2, "period_unit": "steps"}),
    "splitfed_v1": (splitfed_v1, {}),
    "fedavg": (fedavg, {}),
    "vicreg": (vicreg, {}),
    "vicreg-epoch": (vicreg, {"turn": "epoch"}),
}
CUTS_OF = {"splitfed_v1": ALIKE, "fedavg": LAST}
NOISE = PIPELINE._replace(augment=AUGMENTATIONS.make("noise"))


def first_devices(count):
    """A mesh of some of the eight fake devices."""
    return make_mesh(jax.devices()[:count])


@pytest.mark.parametrize(
    ("name", "participation", "counts"),
    [
        pytest.param("sequential", 1.0, (2, 8), marks=pytest.mark.slow),
        pytest.param("averaging", 0.6, (1, 4), marks=pytest.mark.slow),
    ],
)
def test_the_number_of_devices_does_not_matter(name, participation, counts):
    """Groups of 2, 2 and 1 clients, with empty slots; the loop knows no devices."""
    check_devices(name, participation, counts)


@pytest.mark.slow
@pytest.mark.parametrize("participation", [1.0, 0.6])
@pytest.mark.parametrize("name", STRATEGIES)
def test_no_number_of_devices_matters_in_any_strategy(name, participation):
    check_devices(name, participation, (1, 2, 4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("participation", [1.0, 0.6])
@pytest.mark.parametrize("name", ["sequential", "together", "averaging", "steps"])
def test_no_number_of_devices_matters_one_by_one(name, participation):
    check_devices(name, participation, (2, 8), axis="map")


def check_devices(name, participation, counts, axis="vmap"):
    """Equal to the loop on one device, in training and in evaluation."""
    make, options = STRATEGIES[name]
    shards, few = tiny_shards(SIZES), participation < 1
    federation = tiny_federation(CUTS_OF.get(name, CUTS))
    given = {"participation": participation}
    if name.startswith("vicreg"):
        given["pipeline"] = NOISE  # so that the two copies of a sample differ
    strategy = make(federation, **options)
    state, log = train(strategy, federation, shards, axis="loop", **given)
    expected = branches(federation, strategy, state)
    data = tiny_data(11, seed=5)
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=4)
    scores = evaluate(state, to_devices(data, None, SAME))
    for count in counts:
        mesh = first_devices(count)
        federation = federation._replace(mesh=mesh)
        strategy = make(federation._replace(one_by_one=axis == "map"), **options)
        state, spread_log = train(
            strategy, federation, shards, axis=axis, few=few, **given
        )
        found = branches(federation, strategy, state)
        assert_same(expected, found, rtol=1e-3, atol=1e-4)
        totals = [
            [jax.tree.map(np.sum, metrics) for _, _, metrics in one]
            for one in (log, spread_log)
        ]
        assert_same(*totals, rtol=1e-4)
        if count == counts[-1] and not few:
            evaluate = make_evaluation(
                federation, strategy, PIPELINE, batch_size=4, axis=axis
            )
            spread = evaluate(state, to_devices(data, mesh, SAME))
            assert [s[:2] for s in spread] == [s[:2] for s in scores]
            assert_same([s[2:] for s in spread], [s[2:] for s in scores], rtol=1e-3)


@pytest.fixture
def collectives(monkeypatch):
    """What the compiled round of a strategy exchanges between four devices."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    texts, jit = [], jax.jit

    def reading(function, **options):
        compiled = jit(function, **options)
        if getattr(function, "__name__", "") != "run":
            return compiled

        def run(*arguments):
            texts.append(compiled.lower(*arguments).compile().as_text())
            return compiled(*arguments)

        return run

    def collectives(make, one_by_one=False, **options):
        federation = tiny_federation(CUTS, mesh=first_devices(4))
        strategy = make(federation._replace(one_by_one=one_by_one), **options)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "jit", reading)
            train(strategy, federation, tiny_shards(SIZES), axis="vmap", rounds=1)
        return set(re.findall(rf" ({names})(?:-start)?\(", texts.pop()))

    return collectives


def test_clients_talk_only_when_they_are_averaged(collectives):
    assert collectives(averaging, period=0) == set()
    assert collectives(averaging) == {"all-reduce"}
    assert collectives(averaging, period=2, period_unit="steps") == {"all-reduce"}


@pytest.mark.slow
def test_clients_talk_no_more_one_by_one(collectives):
    assert collectives(averaging, one_by_one=True, period=0) == set()
    assert collectives(sequential, one_by_one=True) == {"all-to-all", "all-reduce"}


@pytest.mark.slow
def test_a_median_gathers_the_holders(collectives):
    """And sums their weights, to learn whether there are any."""
    median = {"aggregate": "median", "weights": "uniform"}
    assert collectives(averaging, **median) == {"all-gather", "all-reduce"}


def test_a_shared_server_takes_rows_and_sums(collectives):
    """Features go from their client's device to all; gradients and BatchNorm are sums.

    No device ever gathers the clients' stacks.
    """
    assert collectives(sequential) == {"all-to-all", "all-reduce"}


def test_a_checkpoint_in_a_round_may_be_made_twice():
    """Steps after a mean stay, though this mean has the number of the open round."""
    federation = tiny_federation(dict.fromkeys(range(4), 1))
    strategy = averaging(federation, period=1, period_unit="steps")
    store, ids = HostStore(federation, strategy, (2,)), np.arange(2, dtype=np.int32)
    state = store.init(jax.random.key(0))
    some, means = average_layers(strategy, store.take(state, ids), (jnp.ones(2),))
    (servers,) = some.servers
    trained = jax.tree.map(lambda leaf: leaf + 1, servers.head.params)
    head = servers.head.replace(params=trained)
    some = some.replace(servers=(servers.replace(head=head),))
    state = store.put(state, ids, some, means, midway=True)
    for _ in range(2):
        rows = store.to_checkpoint(state).servers[0].head.params
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a[:2], b), rows, trained
        )


def test_those_of_a_round_go_to_their_devices_alone():
    """From the host, and there receive the means that they have missed."""
    federation = tiny_federation(dict.fromkeys(range(8), 1), mesh=first_devices(4))
    strategy, ids = averaging(federation), np.arange(4, dtype=np.int32)
    store = HostStore(federation, strategy, (4,))
    state = store.init(jax.random.key(0))
    some, means = average_layers(strategy, store.take(state, ids), (jnp.ones(4),))
    state = store.put(state, ids, some, means)
    seen, receive = [store._init(jax.random.key(0), (ids,))], store._receive
    store._receive = lambda some, *more: seen.append(some) or receive(some, *more)
    seen.append(store.take(state, ids + 4))
    assert len(seen) == 3
    for stack in (branch for one in seen for branch in (*one.clients, *one.servers)):
        for leaf in jax.tree.leaves(stack):
            assert [len(part.data) for part in leaf.addressable_shards] == [1] * 4
    jax.tree.map(
        lambda leaf, mean: np.testing.assert_array_equal(leaf, [mean] * 4),
        seen[-1].servers[0].head.params,
        means["final head"].params,
    )
