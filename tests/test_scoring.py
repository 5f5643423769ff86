"""Clients that are alike are scored once, empty slots never."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds import KEY, train
from tiny import PIPELINE, TINY, tiny_data, tiny_federation, tiny_shards

from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.config import override, preset
from hsee_jax.engine import evaluation
from hsee_jax.link import topk
from hsee_jax.parallel.mesh import SAME, make_mesh, to_devices
from hsee_jax.runs.build import build

BATCHES = 3  # of 4 in 11 samples
CUTS = {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}
ALIKE = functools.partial(averaging, average="all_holders")
make_score, calls = evaluation.make_score, []


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """The number of batches scored since it was last asked for, as a function."""

    def counted(*arguments):
        score = make_score(*arguments)

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
    calls.clear()
    return count


@functools.cache
def trained(make, devices=0):
    """A federation, its strategy, and the state after a round."""
    mesh = make_mesh(jax.devices()[:devices]) if devices else None
    federation = tiny_federation(CUTS, mesh=mesh)
    strategy = make(federation)
    shards, axis = tiny_shards(dict.fromkeys(CUTS, 4)), "vmap" if mesh else "loop"
    state, _ = train(strategy, federation, shards, axis=axis, rounds=1)
    return federation, strategy, state


@functools.cache
def evaluation_of(make, axis, devices=0):
    """The evaluation of a state."""
    federation, strategy, _ = trained(make, devices)
    data = to_devices(tiny_data(11, seed=5), federation.mesh, SAME)
    evaluate = evaluation.make_evaluation(
        federation, strategy, PIPELINE, batch_size=4, axis=axis
    )
    return lambda state: evaluate(state, data)


def with_change(state, side, what):
    """The state with one other number, in the branch of client 1."""
    stack, *rest = getattr(state, side)
    layer = next(n for n, part in enumerate(stack.layers) if getattr(part, what))
    leaves, shape = jax.tree.flatten(getattr(stack.layers[layer], what))
    leaves[-1] = leaves[-1].at[(1, *(0,) * (leaves[-1].ndim - 1))].multiply(1.5)
    part = stack.layers[layer].replace(**{what: jax.tree.unflatten(shape, leaves)})
    layers = (*stack.layers[:layer], part, *stack.layers[layer + 1 :])
    return state.replace(**{side: (stack.replace(layers=layers), *rest)})


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_clients_that_share_all_layers_are_scored_once(passes, axis):
    """Though their momenta differ; and one that differs is scored by itself."""
    _, _, state = trained(ALIKE)
    (momenta, *_) = jax.tree.leaves(state.clients[0].layers[0].opt_state)
    assert len({np.asarray(own).tobytes() for own in momenta}) == 3
    evaluate = evaluation_of(ALIKE, axis)
    before = evaluate(state)
    assert passes() == 2 * BATCHES  # for each cut
    for one, other in ((0, 1), (0, 2), (3, 4)):
        assert before[one]._replace(id=other) == before[other]

    for side in ("clients", "servers"):
        for what in ("params", "batch_stats"):
            after = evaluate(with_change(state, side, what))
            assert passes() == 3 * BATCHES
            assert after[1].server_loss != before[1].server_loss
            assert (after[1].exit_loss != before[1].exit_loss) == (side == "clients")
            assert [r for r in after if r.id != 1] == [r for r in before if r.id != 1]

    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.clients[0])
    evaluate(state.replace(clients=(broken, state.clients[1])))
    assert passes() == (3 + 1) * BATCHES  # NaN equals nothing


def test_clients_of_a_shared_server_differ(passes):
    _, _, state = trained(sequential)
    evaluation_of(sequential, "loop")(state)
    assert passes() == len(CUTS) * BATCHES


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_empty_slots_are_not_scored(passes, axis):
    """Behind the clients of each stack is a slot that holds something else."""
    _, _, state = trained(ALIKE)
    stacks = jax.tree.map(
        lambda leaf: jnp.concatenate([leaf, 2 * leaf[:1]]),
        (state.clients, state.servers),
    )
    evaluate = evaluation_of(ALIKE, axis)
    results = evaluate(state.replace(clients=stacks[0], servers=stacks[1]))
    assert passes() == 2 * BATCHES
    assert [result.id for result in results] == list(CUTS)
    assert results == evaluate(state)


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_clients_differ_by_their_links_but_not_by_errors_of_training(passes, axis):
    """Of three clients with cut 1, one has a link of twice the speed."""
    codec = topk(keep_share=0.3, link_rates=(1.0, 1.0, 2.0), error_feedback=True)
    federation = tiny_federation(CUTS)._replace(codec=codec)
    strategy = ALIKE(federation)
    state = jax.jit(strategy.init)(KEY)

    def with_errors(stack):
        error = stack.link.error
        own = jnp.arange(error.size, dtype=error.dtype).reshape(error.shape)
        return stack.replace(link=stack.link._replace(error=own))

    evaluate = evaluation.make_evaluation(
        federation, strategy, PIPELINE, batch_size=4, axis=axis
    )
    clients = tuple(map(with_errors, state.clients))
    results = evaluate(state.replace(clients=clients), tiny_data(11, seed=5))
    assert passes() == 3 * BATCHES
    assert results == evaluate(state, tiny_data(11, seed=5))
    assert results[0]._replace(id=1) == results[1]
    assert results[0].server_loss != results[2].server_loss


@pytest.mark.slow
def test_each_device_scores_its_own_clients(passes):
    """Three clients and two, alike, in four slots and two of two devices."""
    _, _, state = trained(ALIKE, 2)
    results = evaluation_of(ALIKE, "vmap", 2)(state)
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
