"""Clients of a device one after another: `--client-axis map`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mesh import first_devices
from tiny import THREE_ROUNDS, tiny_federation

from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.config import override
from hsee_jax.core.types import Batch
from hsee_jax.federation.members import over_members
from hsee_jax.runs.build import build

TOGETHER = {"turn": "together", "boundary": "joint"}


def shapes(strategy, clients, size):
    """The arguments of a step of some clients of one cut."""
    struct = jax.ShapeDtypeStruct
    batch = Batch(
        struct((clients, size, 5, 5, 1), jnp.float32),
        struct((clients, size), jnp.int32),
        struct((clients, size), jnp.bool_),
    )
    state = jax.eval_shape(strategy.init, jax.random.key(0))
    order, rate = struct((clients,), jnp.int32), struct((), jnp.float32)
    return state, (batch,), order, rate


def rows(*masks):
    """A batch of two rows for each client."""
    mask = jnp.array(masks)
    inputs = jnp.arange(mask.size, dtype=jnp.float32).reshape(mask.shape)
    return Batch(inputs, jnp.zeros(mask.shape, jnp.int32), mask)


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_function_of_one_client_over_stacks(one_by_one, devices):
    """Two states, a shared value, and a client without samples that is skipped."""
    calls = []

    def fn(total, count, batch, rate):
        jax.debug.callback(lambda first: calls.append(float(first)), batch.inputs[0])
        real = jnp.sum(jnp.where(batch.mask, batch.inputs, 0.0))
        return total + rate * real, count + jnp.sum(batch.mask), {"sum": real}

    mesh = first_devices(devices) if devices > 1 else None
    federation = tiny_federation({0: 1}, mesh=mesh)._replace(one_by_one=one_by_one)
    run = over_members(federation, fn, (0, 0, 0, None), states=2, skip=True)
    total, count, rest = jax.jit(run)(
        jnp.array([10.0, 20.0, 30.0]),
        jnp.array([7, 8, 9]),
        rows([True, True], [False, False], [False, True]),
        jnp.float32(2),
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(total, [12.0, 20.0, 40.0])
    np.testing.assert_array_equal(count, [9, 8, 10])
    np.testing.assert_array_equal(rest["sum"], [1.0, 0.0, 5.0])
    assert sorted(calls) == ([0.0, 4.0] if one_by_one else [0.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("make", "options"), [(averaging, {}), (sequential, {}), (sequential, TOGETHER)]
)
def test_convolutions_stay_single(make, options):
    """Three clients of a cut: no convolution has groups for them."""
    groups = []
    for one_by_one in (False, True):
        federation = tiny_federation(dict.fromkeys(range(3), 1))
        strategy = make(federation._replace(one_by_one=one_by_one), **options)
        text = str(jax.make_jaxpr(strategy.step)(*shapes(strategy, 3, 4)))
        groups.append({*re.findall(r"group_count=(\d+)", text)})
    assert groups == [{"1", "3"}, {"1"}]


@pytest.mark.slow
def test_memory_is_that_of_one_client():
    """There is no second stack of the state, either."""

    def temporary(clients, *, one_by_one):
        federation = tiny_federation(dict.fromkeys(range(clients), 1))
        strategy = averaging(federation._replace(one_by_one=one_by_one))
        arguments = shapes(strategy, clients, 64)
        step = jax.jit(strategy.step, donate_argnums=0).lower(*arguments)
        return step.compile().memory_analysis().temp_size_in_bytes

    alone = temporary(1, one_by_one=False)
    assert temporary(8, one_by_one=True) < 1.5 * alone
    assert temporary(8, one_by_one=False) > 4 * alone


def test_the_flag_reaches_the_clients():
    config = override(THREE_ROUNDS, client_axis="map")
    assert build(config).federation.one_by_one
    assert not build(override(config, client_axis="vmap")).federation.one_by_one
