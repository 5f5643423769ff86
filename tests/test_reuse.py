"""Runs of equal parts in a process share what is compiled, and nothing else."""

from functools import partial

import jax
import numpy as np
import pytest
from programs import compiled_programs
from tiny import TINY

import hsee_jax as hs
from hsee_jax.core.registry import Registry
from hsee_jax.core.reuse import forget, reused
from hsee_jax.data.registry import DATASETS
from hsee_jax.federation.reduction import REDUCERS
from hsee_jax.nn import NETWORKS
from hsee_jax.optim import OPTIMIZERS
from hsee_jax.runs import restore

SHORT = {
    "rounds": 2,
    "eval_every": 1,
    "max_train_samples": 120,
    "max_test_samples": 20,
    "augment": "noise",
    "num_clients": 5,
    "cuts": ("1", "2"),
}


def train(folder, **options):
    """The scores of a short run of the demo, and its last state."""
    config = hs.override(hs.preset("demo"), **TINY | SHORT | options)
    scores = hs.train(config, folder).scores
    return scores, jax.tree.leaves(jax.device_get(restore(folder).state))


def same_bits(one, other):
    """Whether two runs end alike to the last bit."""
    return one[0] == other[0] and all(map(np.array_equal, one[1], other[1]))


@pytest.mark.parametrize("axis", ["loop", "vmap"])
@pytest.mark.parametrize(
    "kind",
    [
        {"strategy": "averaging"},
        {"strategy": "sequential"},
        {"strategy": "sequential", "turn": "together"},
    ],
    ids=["averaging", "sequential", "together"],
)
def test_a_run_with_another_seed_compiles_next_to_nothing(tmp_path, kind, axis):
    """And gives the same bits as a run for which all is made anew."""
    kind = {**kind, "client_axis": axis}
    seeds = dict.fromkeys(("data_seed", "model_seed", "partition_seed"), 1)
    other = {**seeds, "learning_rate": 0.02, "rounds": 3}
    jax.clear_caches()
    forget()
    with compiled_programs() as first:
        train(tmp_path / "first", **kind)
    with compiled_programs() as second:
        shared = train(tmp_path / "second", **kind, **other)
    assert len(second) <= 3 < len(first)
    jax.clear_caches()
    forget()
    assert same_bits(shared, train(tmp_path / "anew", **kind, **other))


@pytest.mark.parametrize("axis", ["loop", pytest.param("vmap", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.5},
        {"link": "int8"},
        {"noise_std": 0.1},
        {"boundary": "joint"},
        {"optimizer_state": "reset"},
        {"aggregate": "median", "weights": "uniform"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_programs_depend_on_is_not_shared(tmp_path, change, axis):
    before = train(tmp_path / "before", client_axis=axis)
    after = train(tmp_path / "after", client_axis=axis, **change)
    assert not same_bits(before, after)
    jax.clear_caches()
    forget()
    assert same_bits(after, train(tmp_path / "anew", client_axis=axis, **change))


def test_a_reducer_of_ones_own_that_is_registered_again_is_used(tmp_path):
    """Although the algorithm that names it is of the package."""

    def register(factor):
        @REDUCERS.register
        def own(trim_share):
            """Give the plain mean, times a factor."""

            def reduce(*holders):
                return jax.tree.map(lambda a: factor * a, plain(*holders))

            return reducer._replace(reduce=reduce)

    reducer = REDUCERS.make("mean", 0.0)
    plain = reducer.reduce
    try:
        register(1)
        first = train(tmp_path / "first", aggregate="own")
        register(0.5)
        second = train(tmp_path / "second", aggregate="own")
    finally:
        del REDUCERS._entries["own"]
    assert same_bits(first, train(tmp_path / "mean"))
    assert not same_bits(first, second)


def test_entries_of_the_package_make_one_object_and_those_of_others_new_ones():
    sgd = OPTIMIZERS.make("sgd", options={"momentum": 0.5})
    assert OPTIMIZERS.make("sgd", options={"momentum": 0.5}) is sgd
    assert OPTIMIZERS.make("sgd", options={"momentum": 0.25}) is not sgd
    shape = {"num_classes": 3, "input_shape": (8, 8, 3)}
    assert NETWORKS.make("resnet18", **shape) is NETWORKS.make("resnet18", **shape)
    registry = Registry("box", pure=True)

    @registry.register
    def own():
        """Make a box."""
        return []

    assert registry.make("own") is not registry.make("own")


def test_entries_that_read_files_are_made_anew():
    assert DATASETS.make("npz") is not DATASETS.make("npz")


def test_equal_arguments_give_one_object_until_it_is_forgotten():
    @reused
    def box(*args, **named):
        return [args, named]

    first = box(1, size=2)
    assert box(1, size=2) is first
    assert box(1.0, size=2) is not first  # another type, another dtype
    assert box(1, size=[2]) is not box(1, size=[2])  # a list has no hash
    forget()
    assert box(1, size=2) is not first and box(1, size=2) == first


def test_only_the_latest_objects_are_kept():
    made = []
    square = partial(reused, latest=2)(lambda x: made.append(x) or x**2)
    assert [square(x) for x in (1, 2, 1, 3, 1, 2)] == [1, 4, 1, 9, 1, 4]
    assert made == [1, 2, 3, 2]
