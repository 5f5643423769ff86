"""Properties of the cross-layer mean."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LAYERS, DenseLayer, tiny_federation, tiny_model

from hsee_jax.algorithms import averaging
from hsee_jax.config import override, preset
from hsee_jax.core import UserError
from hsee_jax.federation.aggregation import layer_mean, receive
from hsee_jax.federation.branch import LayerState
from hsee_jax.federation.reduction import REDUCERS
from hsee_jax.optim import MERGES, Merge, adamw, as_optimizer, sgd, with_merge
from hsee_jax.runs.build import build

OPTIMIZER = optax.trace(0.9)
MEAN = REDUCERS.make("mean", 0.0).reduce


def layer(values, momentum=0.0):
    """G holders of a layer with BatchNorm, all numbers of holder g being values[g]."""
    column = jnp.asarray(values, jnp.float32)[:, None] * jnp.ones((1, 2), jnp.float32)
    params = {"conv": {"kernel": column}, "bn": {"scale": column, "bias": column}}
    trace = jax.tree.map(lambda p: p + momentum, params)
    return LayerState(
        params=params,
        batch_stats={"bn": {"mean": column, "var": column}},
        opt_state=optax.TraceState(trace),
    )


def average(
    groups, weights, *, optimizer=OPTIMIZER, state="keep", reduce=MEAN, **options
):
    """What all holders have after the mean of round 3, theirs being of round 2."""
    optimizer = with_merge(optimizer, state)
    mean = layer_mean(
        groups,
        [jnp.asarray(w, jnp.float32) for w in weights],
        number=jnp.int32(3),
        optimizer=optimizer,
        reduce=reduce,
    )
    take = partial(receive, optimizer=optimizer, **options)
    return [
        jax.vmap(take, (0, None, 0))(group, mean, jnp.full(len(w), 2, jnp.int32))
        for group, w in zip(groups, weights, strict=True)
    ]


def test_the_mean_is_over_all_groups_and_follows_the_samples():
    """(1 * 10 + 2 * 30 + 6 * 60) / 100 = 4.3."""
    one, two = average([layer([1, 2]), layer([6])], [[10, 30], [60]])
    for leaf in jax.tree.leaves((one.params, two.params, one.batch_stats)):
        np.testing.assert_allclose(leaf, 4.3, rtol=1e-6)


def test_a_layer_held_once_is_unchanged():
    before = layer([0.1])
    (after,) = average([before], [[7]])
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize(
    "name, share", [("mean", 0), ("median", 0), ("trimmed_mean", 0.2)]
)
def test_without_weight_nothing_changes(name, share):
    before, reduce = layer([1, 2]), REDUCERS.make(name, share).reduce
    for state in MERGES:
        (after,) = average([before], [[0, 0]], state=state, reduce=reduce)
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_an_absent_holder_receives_the_mean_of_the_others():
    (after,) = average([layer([1, 3, 50])], [[1, 1, 0]])
    np.testing.assert_allclose(after.params["conv"]["kernel"], 2.0)


@pytest.mark.parametrize("state", MERGES)
def test_local_batch_norm_keeps_all_that_belongs_to_it(state):
    """Parameters, statistics and optimizer state, under every rule for the rest."""
    before = layer([1, 3], momentum=1.0)
    (after,) = average([before], [[1, 1]], batch_norm="keep_local", state=state)
    np.testing.assert_allclose(after.params["conv"]["kernel"], 2.0)
    for part in (after.params["bn"], after.batch_stats["bn"]):
        for leaf in part.values():
            np.testing.assert_array_equal(leaf[:, 0], [1, 3])
    trace = after.opt_state.trace
    expected = {"keep": [2, 4], "average": [3, 3], "reset": [0, 0]}
    np.testing.assert_allclose(trace["conv"]["kernel"][:, 0], expected[state])
    for leaf in trace["bn"].values():
        np.testing.assert_array_equal(leaf[:, 0], [2, 4])


def test_no_rule_touches_what_belongs_to_a_local_batch_norm():
    """Not even one that changes all of the state that it is given."""
    changes = Merge(
        lambda state: jax.tree.map(lambda _: False, state),
        lambda old, mean, state: jax.tree.map(lambda leaf: leaf + 100, state),
    )
    optimizer = as_optimizer(OPTIMIZER)._replace(merge=changes)
    (after,) = average(
        [layer([1, 3])], [[1, 1]], optimizer=optimizer, batch_norm="keep_local"
    )
    trace = after.opt_state.trace
    np.testing.assert_array_equal(trace["conv"]["kernel"][:, 0], [101, 103])
    for leaf in trace["bn"].values():
        np.testing.assert_array_equal(leaf[:, 0], [1, 3])


def test_counts_of_the_optimizer_stay_whole():
    adam = optax.scale_by_adam()
    params = {"kernel": jnp.ones((3, 2), jnp.float32)}
    state = jax.vmap(adam.init)(params)
    state = state._replace(count=jnp.asarray([4, 5, 5], jnp.int32))
    holders = LayerState(params=params, batch_stats={}, opt_state=state)
    (after,) = average([holders], [[1, 1, 1]], optimizer=adam, state="average")
    np.testing.assert_array_equal(after.opt_state.count, [5, 5, 5])


numbers = st.floats(-100, 100, width=32)


@settings(max_examples=25, deadline=None)
@given(
    value=numbers,
    weights=st.lists(st.integers(0, 1000), min_size=3, max_size=3),
)
def test_equal_replicas_stay_equal(value, weights):
    before = layer([value] * 3)
    (after,) = average([before], [weights])
    for leaf in jax.tree.leaves(after.params):
        np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-30)
        np.testing.assert_array_equal(leaf, leaf[:1].repeat(3, axis=0))


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(numbers, min_size=4, max_size=4),
    weights=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
)
def test_grouping_does_not_matter_and_the_mean_is_numpys(values, weights):
    (together,) = average([layer(values)], [weights])
    parts = average([layer(values[:1]), layer(values[1:])], [weights[:1], weights[1:]])
    expected = np.average(values, weights=weights)
    for state in (together, *parts):
        np.testing.assert_allclose(
            state.params["conv"]["kernel"], expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("optimizer_state", ["reset", "average"])
def test_a_batch_norm_of_its_own_keeps_the_count_of_its_steps(optimizer_state):
    """Adam has one count for a layer and the BatchNorm in it."""

    def make(optimizer, layers=LAYERS, **options):
        federation = tiny_federation({0: 1, 1: 2}, tiny_model(layers))
        averaging(federation._replace(optimizer=optimizer), **options)

    changed = {"optimizer_state": optimizer_state}
    with pytest.raises(UserError, match=f"optimizer_state: {optimizer_state} is not"):
        make(adamw(), **changed)
    make(adamw(), **changed, batch_norm="average")
    make(adamw())
    make(sgd(), **changed)
    make(adamw(), (DenseLayer(4), DenseLayer(3)), **changed)


@pytest.mark.parametrize("where", [{"norm": "batch"}, {"exit_head": "bn_linear"}])
@pytest.mark.parametrize("rule", ["average", "reset"])
def test_a_local_batch_norm_keeps_the_count_of_its_moments(where, rule):
    """Adam has one count of steps for a layer or a head, and the BatchNorm in it."""
    config = override(
        preset("demo"),
        **{"norm": "group"} | where,
        optimizer="adamw",
        average="all_holders",
        batch_norm="keep_local",
        optimizer_state=rule,
    )
    with pytest.raises(UserError, match=f"optimizer_state: {rule} is not allowed with"):
        build(config)
    local = {"average": "servers", "batch_norm": "auto"}
    build(override(config, norm="group", exit_head="linear", **local))
