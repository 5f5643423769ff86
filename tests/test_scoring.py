"""Clients that are alike are scored once, empty slots never."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds import KEY, train
from tiny import PIPELINE, TINY, tiny_data, tiny_federation, tiny_shards

from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.algorithms.references import local
from hsee_jax.config import override, preset
from hsee_jax.engine import evaluation
from hsee_jax.engine.evaluation import make_evaluation
from hsee_jax.engine.store import DeviceStore
from hsee_jax.parallel.mesh import SAME, make_mesh, to_devices
from hsee_jax.runs.build import build

BATCHES = 3  # of 4 in 11 samples
CUTS = {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}


@pytest.fixture
def passes(monkeypatch):
    """The number of batches that have been scored, as a function."""
    made, calls = evaluation.make_score, []

    def counted(*arguments):
        score = made(*arguments)

        def call(*arguments, **options):
            jax.debug.callback(lambda: calls.append(1))
            return score(*arguments, **options)

        return call

    def count():
        jax.effects_barrier()
        found = len(calls)
        calls.clear()
        return found

    monkeypatch.setattr(evaluation, "make_score", counted)
    return count


def trained(make, *, mesh=None, **options):
    """A federation after a round in which it is averaged, and its evaluation."""
    federation = tiny_federation(CUTS, mesh=mesh)
    strategy = make(federation, **options)
    shards = tiny_shards(dict.fromkeys(CUTS, 4))
    axis = "vmap" if mesh else "loop"
    state, _ = train(strategy, federation, shards, axis=axis, rounds=1)
    return federation, strategy, state


def evaluate(federation, strategy, state, axis, **more):
    data = to_devices(tiny_data(11, seed=5), federation.mesh, SAME)
    call = make_evaluation(federation, strategy, PIPELINE, batch_size=4, axis=axis)
    return call(state, data, **more)


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_clients_that_share_all_layers_are_scored_once(passes, axis):
    parts = trained(averaging, average="all_holders")
    results = evaluate(*parts, axis)
    assert passes() == 2 * BATCHES  # for each cut
    for one, other in ((0, 1), (0, 2), (3, 4)):
        assert results[one]._replace(id=other) == results[other]


@pytest.mark.parametrize("axis", ["loop", "vmap"])
@pytest.mark.parametrize("side", ["clients", "servers"])
@pytest.mark.parametrize("what", ["params", "batch_stats"])
def test_a_client_that_differs_is_scored_by_itself(passes, axis, side, what):
    """The least difference in one number; all others keep their scores."""
    federation, strategy, state = trained(averaging, average="all_holders")
    before = evaluate(federation, strategy, state, axis)
    passes()
    stack, *rest = getattr(state, side)
    layer = next(n for n, part in enumerate(stack.layers) if getattr(part, what))
    leaves, shape = jax.tree.flatten(getattr(stack.layers[layer], what))
    leaves[-1] = leaves[-1].at[(1, *(0,) * (leaves[-1].ndim - 1))].multiply(1.5)
    part = stack.layers[layer].replace(**{what: jax.tree.unflatten(shape, leaves)})
    layers = (*stack.layers[:layer], part, *stack.layers[layer + 1 :])
    changed = state.replace(**{side: (stack.replace(layers=layers), *rest)})
    after = evaluate(federation, strategy, changed, axis)
    assert passes() == 3 * BATCHES
    assert after[1].server_loss != before[1].server_loss
    assert (after[1].exit_loss != before[1].exit_loss) == (side == "clients")
    assert [r for r in after if r.id != 1] == [r for r in before if r.id != 1]


def test_optimizer_states_do_not_count(passes):
    federation, strategy, state = trained(averaging, average="all_holders")
    (momenta,) = {len(set(map(bytes, _momenta(state)))) for _ in range(1)}
    assert momenta > 1
    evaluate(federation, strategy, state, "loop")
    assert passes() == 2 * BATCHES


def _momenta(state):
    (leaf, *_) = jax.tree.leaves(state.clients[0].layers[0].opt_state)
    return np.asarray(leaf)


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_clients_of_a_shared_server_differ(passes, axis):
    evaluate(*trained(sequential), axis)
    assert passes() == len(CUTS) * BATCHES


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_empty_slots_are_not_scored(passes, axis):
    """Four slots for three clients, and three for two."""
    federation = tiny_federation(CUTS)
    strategy = local(federation, init="per_client")
    state = DeviceStore(federation, strategy, (4, 3)).init(KEY)
    results = evaluate(federation, strategy, state, axis)
    assert passes() == len(CUTS) * BATCHES
    assert [result.id for result in results] == list(CUTS)


def test_each_device_scores_its_own_clients(passes):
    """Three clients and two, alike, in four slots and two of two devices."""
    mesh = make_mesh(jax.devices()[:2])
    parts = trained(averaging, mesh=mesh, average="all_holders")
    results = evaluate(*parts, "vmap")
    assert passes() == 4 * BATCHES
    assert results[0]._replace(id=2) == results[2]


def test_many_clients_on_the_host_cost_what_their_cuts_cost(passes):
    """Sixty clients, three of them on the device at a time."""
    config = override(
        preset("demo"),
        **TINY,
        num_clients=60,
        cuts=("1", "2"),
        participation=0.05,
        max_train_samples=120,
        max_test_samples=20,
        eval_batch_size=10,
        batch_size=2,
        rounds=1,
    )
    experiment = build(config)
    results = experiment.evaluate(experiment.init(), experiment.test)
    assert passes() == 2 * 2  # cuts, batches
    assert [result.id for result in results] == list(range(60))
    assert len({result[1:] for result in results}) == 2


def test_weights_that_are_not_finite_are_like_no_other(passes):
    federation, strategy, state = trained(averaging, average="all_holders")
    (broken, other) = jax.tree.map(lambda a: a * jnp.nan, state.clients), state.clients
    evaluate(federation, strategy, state.replace(clients=(broken[0], other[1])), "vmap")
    assert passes() == (3 + 1) * BATCHES
