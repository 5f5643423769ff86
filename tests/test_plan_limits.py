"""Plans of small random problems, against all choices of cuts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.devices import Device
from hsee_jax.systems.outcome import evaluate_cuts
from hsee_jax.systems.planner import Limits, plan_cuts
from hsee_jax.systems.problem import Problem, cut_costs
from hsee_jax.systems.quantities import totals
from hsee_jax.systems.traffic import Bytes, Traffic
from hsee_jax.systems.work import Schedule, Work, parts_of_round

LAYERS = 4
AVERAGING = Schedule(shared=False, averages=(3,))
TOGETHER = Schedule(shared=True, boundary="joint", turn="together")
SEEDS = st.integers(0, 2**32 - 1)


def draw_problem(seed, schedule):
    """A problem of two or three clients with four layers."""
    rng = np.random.default_rng(seed)
    layers = [
        LayerCost(f"layer{n}", *(int(value) for value in rng.integers(100, 9000, 4)))
        for n in range(LAYERS)
    ]
    heads = [LayerCost(f"head{n}", 50, 500, 40, 60) for n in range(LAYERS + 1)]
    down = schedule.boundary == "joint"
    traffic = {
        cut: Traffic(cut, Bytes(own.output_bytes, down * own.output_bytes), 0)
        for cut, own in enumerate(layers, start=1)
    }
    count = int(rng.integers(2, 4))
    speeds = 10 ** rng.uniform(4, 6, (count, 3))
    devices = tuple(
        Device(f"device{i}", flops, flops, up, down)
        for i, (flops, up, down) in enumerate(speeds)
    )
    return Problem(
        (*layers, *heads),
        traffic,
        devices,
        Device("server", 1e6, 1e6, 1e9, 1e9),
        schedule,
        rng.integers(1, 5, count),
        8,
        1,
        workers=int(rng.integers(1, 5)),
    )


def every_choice(problem):
    for cuts in itertools.product(range(1, LAYERS + 1), repeat=len(problem.devices)):
        yield np.array(cuts)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_a_server_with_the_memory_of_a_plan_can_have_one(seed):
    """Batches count as far as workers take them, at the cuts that are chosen."""
    problem = draw_problem(seed, AVERAGING)
    choices = [evaluate_cuts(problem, cuts) for cuts in every_choice(problem)]
    limit = choices[seed % len(choices)].totals().server_bytes
    plan = plan_cuts(problem, limits=Limits(server_bytes=limit))
    assert plan.totals().server_bytes <= limit * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_in_lockstep_no_round_is_faster_than_its_bound(seed):
    """Also where some clients have fewer batches than others."""
    problem = draw_problem(seed, TOGETHER)
    costs = cut_costs(problem, np.ones((len(problem.devices), LAYERS), bool))
    for cuts in every_choice(problem):
        found = evaluate_cuts(problem, cuts).totals().seconds
        assert totals(costs, cuts).seconds <= found * (1 + 1e-9)


def test_an_uplink_that_nearly_suffices_slows_nobody_down():
    """Clients wait for replies, so one that computes for long must not send slowly."""
    schedule = Schedule(shared=False, boundary="joint")
    problem = draw_problem(0, schedule)
    devices = (
        Device("slow link", 1e9, 1e9, 1e5, 1e9),
        Device("slow", 2e4, 2e4, 1e6, 1e9),
    )
    problem = problem._replace(devices=devices, steps=np.full(2, 10))
    cuts = np.array([1, 1])
    free, shared, halved = (
        evaluate_cuts(problem._replace(uplink_bytes_per_s=rate), cuts).time.seconds
        for rate in (np.inf, 1.09e6, 0.5e6)
    )
    assert free <= shared < 1.01 * free
    assert shared < halved < 1.5 * free


@pytest.mark.parametrize("steps", [3, 5])
def test_averages_after_the_last_batch_of_those_present(steps):
    """Clients train, and average their layers, at all points of the schedule."""
    work = Work(np.array([steps]), *[np.ones(1)] * 5, weights_up_s=np.ones(1))
    schedule = Schedule(shared=False, averages=(1, 2, 3, 4, 5))
    parts = list(parts_of_round(work.arrays(), schedule))
    assert [part.mean for part in parts] == [True] * 5
    assert sum(part.stop - part.first for part in parts) == steps
