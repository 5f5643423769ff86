"""A round lowered from shapes is the round that is trained, on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds import KEY
from tiny import (
    PIPELINE,
    TINY,
    DenseLayer,
    tiny_data,
    tiny_federation,
    tiny_model,
    tiny_shards,
)

from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.config import Config, override
from hsee_jax.core.types import Dataset
from hsee_jax.engine import DeviceStore, lower_round, make_round, plan_round
from hsee_jax.engine.plan import num_slots
from hsee_jax.engine.round import make_no_means, nothing_done
from hsee_jax.engine.scan_arguments import Placement
from hsee_jax.parallel import backend_of, make_mesh, place_blocks
from hsee_jax.parallel.mesh import SAME, to_devices
from hsee_jax.runs import lower
from hsee_jax.runs.build import build_model

CUTS = {0: 1, 1: 2, 2: 1}


@pytest.mark.parametrize(
    "strategy", [averaging, pytest.param(sequential, marks=pytest.mark.slow)]
)
def test_the_lowered_program_trains_the_round(strategy):
    """On two devices, with an empty slot: the program gives what `make_round` gives."""
    mesh = make_mesh(jax.devices()[:2])
    model = tiny_model((DenseLayer(4), DenseLayer(3), DenseLayer(2)))
    federation = tiny_federation(CUTS, model, mesh)
    strategy = strategy(federation)
    slots = num_slots(
        federation.groups, participation=1.0, seed=0, rounds=1, multiple=2
    )
    plan = plan_round(
        federation.groups,
        tiny_shards(dict.fromkeys(CUTS, 8)),
        batch_size=4,
        participation=1.0,
        turn=strategy.turn_unit,
        seed=0,
        number=0,
        slots=slots,
    )
    store, data = DeviceStore(federation, strategy, slots), tiny_data()
    program = lower_round(
        strategy,
        PIPELINE,
        mesh=mesh,
        state=store.checkpoint_shapes(),
        data=data,
        plan=plan,
    ).compile()
    placed = place_blocks(data, mesh) if strategy.step else to_devices(data, mesh, SAME)
    rates = np.full(len(plan.order), 0.05, np.float32)
    weights = np.ones(len(plan.ids), np.float32) * plan.active
    placement = Placement(
        lambda tree, specs: to_devices(tree, mesh, specs), make_no_means(strategy, mesh)
    )
    carry, groups, same = placement.arguments(
        strategy, store.init(KEY), plan, rates, weights, nothing_done(plan).metrics
    )
    steps = np.int32(0), np.int32(len(plan.order))
    found = program(carry, KEY, placed, groups, same, steps).state
    run = make_round(strategy, PIPELINE, KEY, axis="vmap", mesh=mesh)
    expected, *_ = run(store.init(KEY), placed, plan, rates, weights)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_configuration_is_lowered_for_a_mesh():
    """Each further client has the same state and as many samples."""
    mesh = make_mesh(jax.devices()[:2])
    config = override(
        Config(), **TINY, cuts=("1",), batch_size=4, dataset="fashion_mnist"
    )
    sizes = []
    for count in (2, 4, 6):
        lowered = lower(override(config, num_clients=count), mesh, samples=8)
        shapes = jax.tree.leaves(lowered.in_avals)
        sizes.append(sum(a.size * a.dtype.itemsize for a in shapes))
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 2 * 2 * 8 * 28 * 28


def test_shapes_without_a_mesh_are_of_the_default_device():
    federation = tiny_federation(CUTS)
    strategy, slots = averaging(federation), (2, 1)
    plan = plan_round(
        federation.groups,
        tiny_shards(dict.fromkeys(CUTS, 8)),
        batch_size=4,
        participation=1.0,
        turn="batch",
        seed=0,
        number=0,
    )
    data = tiny_data()
    shapes = Dataset(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in data))
    lowered = lower_round(
        strategy,
        PIPELINE,
        mesh=None,
        state=DeviceStore(federation, strategy, slots).checkpoint_shapes(),
        data=shapes,
        plan=plan,
    )
    assert "num_partitions = 1" in lowered.as_text()


class Absent:
    """A mesh of one device that is not there."""

    def __init__(self, platform):
        device = type("Device", (), {"platform": platform})()
        self.devices = np.array([device], object)


def test_the_backend_is_that_of_the_mesh():
    assert backend_of(None) == backend_of(make_mesh()) == "cpu"
    assert [backend_of(Absent(name)) for name in ("tpu", "cuda")] == ["tpu", "gpu"]


@pytest.mark.parametrize(
    ("platform", "conv", "count"),
    [
        ("cuda", "auto", 3),
        ("tpu", "auto", 1),
        ("cpu", "auto", 0),
        ("cpu", "grouped", 1),
    ],
)
def test_the_mesh_decides_about_the_form_of_the_convolutions(platform, conv, count):
    """The convolutions of the first layer of three stacked clients."""
    config = override(Config(), dataset="cifar10", width=2, conv=conv)
    stem = build_model(config, mesh=Absent(platform)).stages[0]
    images = jnp.zeros((3, 1, 32, 32, 3))
    keys = jax.random.split(jax.random.key(0), 3)

    def run(key, images):
        return stem.init(key, images)

    text = str(jax.make_jaxpr(jax.vmap(run))(keys, images))
    assert text.count(" conv_general_dilated[") == count
