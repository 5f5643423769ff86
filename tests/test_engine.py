"""Compilation, divergence and evaluation of whole rounds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import fold_in
from rounds import KEY, assert_same, branches, train
from test_strategies import AVERAGING, check_against_reference, reference_run
from tiny import (
    CLASSES,
    PIPELINE,
    DenseLayer,
    tiny_data,
    tiny_federation,
    tiny_model,
    tiny_shards,
)

from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.core.errors import DivergenceError
from hsee_jax.core.types import ExitMetrics, Metrics, Stage
from hsee_jax.data.pipeline import AUGMENTATIONS
from hsee_jax.engine import check_finite, client_axis, make_round
from hsee_jax.engine.evaluation import make_evaluation, means
from hsee_jax.engine.plan import plan_round
from hsee_jax.federation.branch import forward
from hsee_jax.federation.state import take_member
from hsee_jax.federation.strategy import server_of
from hsee_jax.link import topk
from hsee_jax.parallel.mesh import SAME, make_mesh, to_devices


@pytest.mark.parametrize("make", [sequential, averaging])
@pytest.mark.parametrize(
    "axis", ["loop", "vmap", pytest.param("map", marks=pytest.mark.slow)]
)
def test_one_compilation_for_each_distinct_cut(make, axis):
    """A client's first layer is traced twice: for cut 1 and for cut 3.

    Two rounds, unequal shards and four clients add nothing.
    """
    model = tiny_model()
    first = model.stages[0]
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=2)
    def train_first(variables, inputs, mask):
        return first.apply(variables, inputs, mask, train=True)

    def apply(variables, inputs, mask, *, train):
        if train:
            return train_first(variables, inputs, mask)
        return first.apply(variables, inputs, mask, train=False)

    counted = model._replace(stages=(Stage(first.init, apply), *model.stages[1:]))
    federation = tiny_federation({0: 1, 1: 3, 2: 1, 3: 3}, counted)
    federation = federation._replace(one_by_one=axis == "map")
    train(
        make(federation), federation, tiny_shards({0: 3, 1: 6, 2: 4, 3: 2}), axis=axis
    )


@pytest.mark.slow
def test_both_forms_agree_when_images_are_augmented():
    """A client's random crops do not depend on the clients stacked with it."""
    federation = tiny_federation({0: 1, 1: 2, 2: 1})
    shards = tiny_shards({0: 6, 1: 5, 2: 3})
    strategy = averaging(federation)
    augmented = PIPELINE._replace(augment=AUGMENTATIONS.make("crop_flip"))

    def result(axis, pipeline):
        state, _ = train(strategy, federation, shards, axis=axis, pipeline=pipeline)
        return branches(federation, strategy, state)

    looped = result("loop", augmented)
    assert_same(looped, result("vmap", augmented), rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_same(looped, result("loop", PIPELINE), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [averaging, sequential])
def test_turns_and_steps_give_the_same(make):
    """A strategy may have only one of them, in both forms of the engine."""
    dense = tiny_model((DenseLayer(8), DenseLayer(5)))
    federation = tiny_federation({0: 1, 1: 2, 2: 1}, dense)
    both, shards = make(federation), tiny_shards({0: 6, 1: 5, 2: 3})
    assert both.turn and both.step
    results = []
    for strategy, axis in (
        (both, "loop"),
        (both._replace(turn=None), "loop"),
        (both._replace(step=None), "loop"),
        (both._replace(turn=None), "vmap"),
        (both._replace(step=None), "vmap"),
    ):
        state, log = train(strategy, federation, shards, axis=axis)
        results.append((branches(federation, strategy, state), log[-1][2]))
    for other in results[1:]:
        assert_same(results[0], other, rtol=1e-4, atol=1e-5)


def test_a_period_in_steps_goes_on_from_round_to_round():
    """Rounds have 3 steps, so that averages are due after steps 2, 1 and 3 of two."""
    cuts, sizes = {0: 1, 1: 1}, {0: 12, 1: 9}
    dense = tiny_model((DenseLayer(8), DenseLayer(5)))
    federation = tiny_federation(cuts, dense)
    strategy = averaging(federation, period=2, period_unit="steps")
    turns = strategy._replace(step=None)
    reference = None
    for form, axis in ((strategy, "loop"), (strategy, "vmap"), (turns, "vmap")):
        state, log = train(form, federation, tiny_shards(sizes), axis=axis)
        assert [len(plan.indices) for plan, _, _ in log] == [3, 3]
        reference = reference or reference_run(
            federation,
            log,
            shared=False,
            scale=1.0,
            turn="batch",
            policy=AVERAGING | {"period": 2, "unit": "steps"},
            cuts=cuts,
            sizes=sizes,
        )
        check_against_reference(reference, federation, form, state)


@pytest.mark.parametrize(
    ("axis", "without"),
    [("loop", "step"), ("loop", "turn"), ("vmap", "step"), ("vmap", "turn")],
)
def test_each_batch_of_a_run_is_augmented_by_a_key_of_its_own(axis, without):
    """By client and step, which goes on from round to round: 3 steps in each of two."""
    seen = set()

    def augment(key, images):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda own: seen.add(tuple(own.tolist())), data)
        return images

    dense = tiny_model((DenseLayer(8), DenseLayer(5)))
    federation = tiny_federation({4: 1, 1: 1}, dense)
    strategy = averaging(federation)._replace(**{without: None})
    pipeline, shards = PIPELINE._replace(augment=augment), tiny_shards({4: 12, 1: 9})
    train(strategy, federation, shards, axis=axis, pipeline=pipeline)
    jax.effects_barrier()
    expected = {
        tuple(jax.random.key_data(fold_in(fold_in(KEY, client), step)).tolist())
        for client in (1, 4)
        for step in range(6)
    }
    assert len(expected) == 12 and seen == expected


def test_auto_is_a_loop_on_cpu():
    assert client_axis("auto", "cpu") == "loop"
    assert client_axis("vmap", "cpu") == "vmap"


LINK = np.zeros((3, 2, 2), np.int64)


def test_a_loss_that_is_not_finite_names_client_branch_and_round():
    plan = plan_round(
        tiny_federation({3: 1, 8: 1, 5: 2}).groups,
        tiny_shards({3: 2, 8: 2, 5: 2}),
        batch_size=2,
        participation=1.0,
        turn="batch",
        seed=0,
        number=0,
    )
    good = Metrics(np.ones(3), np.ones(3), np.ones(3))
    check_finite(plan, ExitMetrics(good, good, LINK), number=1, stop=True)
    bad = good._replace(loss_sum=np.array([1.0, 2.0, np.nan]))
    check_finite(plan, ExitMetrics(good, bad, LINK), number=4)
    with pytest.raises(DivergenceError, match="server loss of client 5 .* round 4"):
        check_finite(plan, ExitMetrics(good, bad, LINK), number=4, stop=True)
    # the only other ones took no part
    alone = Metrics(*(np.array([0.0, 0.0, 1.0]) for _ in Metrics._fields))
    bad = alone._replace(loss_sum=np.array([0.0, 0.0, np.inf]))
    with pytest.raises(DivergenceError, match="exit loss of client 5 .* round 4"):
        check_finite(plan, ExitMetrics(bad, alone, LINK), number=4)


@pytest.mark.parametrize(("axis", "devices", "count"), [("loop", 1, 7), ("vmap", 2, 8)])
def test_samples_that_are_not_there_are_refused(axis, devices, count):
    """One is missing, or the data are not in blocks; JAX alone would read the last."""
    mesh = make_mesh(jax.devices()[:devices]) if devices > 1 else None
    federation = tiny_federation({0: 1, 1: 1}, mesh=mesh)
    strategy, key = averaging(federation), jax.random.key(0)
    run = make_round(strategy, PIPELINE, key, axis=axis, mesh=mesh)
    plan = plan_round(
        federation.groups,
        tiny_shards({0: 4, 1: 4}),
        batch_size=2,
        participation=1.0,
        turn="batch",
        seed=0,
        number=0,
    )
    with pytest.raises(ValueError, match="the plan asks for sample 7, and a device"):
        run(None, to_devices(tiny_data(count), mesh, SAME), plan, np.zeros(2), None)


@pytest.mark.parametrize("make", [sequential, averaging])
def test_evaluation_is_exact_on_the_whole_set(make):
    """Batches of 4 give what NumPy makes of all 11 samples in one batch."""
    federation = tiny_federation({4: 1, 1: 2, 2: 1})
    strategy = make(federation)
    state, _ = train(strategy, federation, tiny_shards({4: 4, 1: 4, 2: 4}), axis="loop")
    data = tiny_data(11, seed=5)
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=4)
    results = evaluate(state, jax.device_put(data))
    assert [(r.id, r.cut) for r in results] == [(1, 2), (2, 1), (4, 1)]

    images = (data.images.astype(np.float32) / 255 - 0.5) / 0.25
    everything = np.ones(11, bool)
    by_id = {r.id: r for r in results}
    for g, group in enumerate(federation.groups):
        specs = federation.specs(g)
        for m, i in enumerate(group.ids):
            client = take_member(state.clients[g], m)
            features, exit_logits, _ = forward(
                specs[0], client, images, everything, train=False
            )
            server = server_of(strategy, state, g, m)
            _, logits, _ = forward(specs[1], server, features, everything, train=False)
            for name, scores in (("exit", exit_logits), ("server", logits)):
                assert scores.shape == (11, CLASSES)
                right = (np.argmax(scores, axis=1) == data.labels).sum()
                assert getattr(by_id[i], f"{name}_accuracy") == right / 11
                shifted = np.exp(scores - np.max(scores, axis=1, keepdims=True))
                chances = shifted / shifted.sum(axis=1, keepdims=True)
                loss = -np.log(chances[np.arange(11), data.labels]).mean()
                ours = getattr(by_id[i], f"{name}_loss")
                np.testing.assert_allclose(ours, loss, rtol=1e-4)


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_a_network_that_is_not_finite_scores_nothing(axis):
    """All labels are 0, which is the arg max of NaN: the broken exit has none right."""
    federation = tiny_federation({0: 1, 1: 1})
    strategy = averaging(federation)
    state = jax.jit(strategy.init)(jax.random.key(0))
    (clients,) = state.clients
    head = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), clients.head.params)
    broken = clients.replace(head=clients.head.replace(params=head))
    data = tiny_data(11)._replace(labels=np.zeros(11, np.int32))
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=4, axis=axis)
    before = evaluate(state, jax.device_put(data))
    after = evaluate(state.replace(clients=(broken,)), jax.device_put(data))
    assert after[0].exit_accuracy == 0
    assert np.isnan(after[0].exit_loss)
    assert after[0].server_accuracy == before[0].server_accuracy
    assert after[1] == before[1]
    exit_mean, _ = means(after)
    assert exit_mean == before[1].exit_accuracy / 2


@pytest.mark.parametrize("axis", ["loop", "vmap", "map"])
def test_links_that_differ_are_scored_apart(axis):
    """The second client's link is faster: of equal features it sends more."""
    federation = tiny_federation({0: 1, 1: 1})._replace(
        codec=topk(keep_share=0.1, link_rates=(1.0, 8.0)), one_by_one=axis == "map"
    )
    strategy = averaging(federation)
    state = jax.jit(strategy.init)(jax.random.key(0))
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=4, axis=axis)
    slow, fast = evaluate(state, jax.device_put(tiny_data(11)))
    assert slow.exit_loss == fast.exit_loss
    assert slow.server_loss != fast.server_loss
