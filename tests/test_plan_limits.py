"""Plans of small random problems, against all choices of cuts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

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


def draw_problem(seed, schedule, weighed=False):
    """A problem of two or three clients with four layers, which they may average."""
    rng = np.random.default_rng(seed)
    layers = [
        LayerCost(f"layer{n}", *(int(value) for value in rng.integers(100, 9000, 4)))
        for n in range(LAYERS)
    ]
    heads = [LayerCost(f"head{n}", 50, 500, 40, 60) for n in range(LAYERS + 1)]
    down = schedule.boundary == "joint"
    traffic = {
        cut: Traffic(cut, Bytes(own.output_bytes, down * own.output_bytes), weights)
        for cut, own in enumerate(layers, start=1)
        for weights in [int(rng.integers(0, 9000)) if weighed else 0]
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
def test_the_plan_is_the_fastest_that_fits_the_memory_of_the_server(seed):
    """Batches count as far as workers take them, at the cuts that are chosen."""
    problem = draw_problem(seed, AVERAGING)
    costs = cut_costs(problem, np.ones((len(problem.devices), LAYERS), bool))
    choices = [evaluate_cuts(problem, cuts) for cuts in every_choice(problem)]
    limit = choices[seed % len(choices)].totals().server_bytes
    plan = plan_cuts(problem, limits=Limits(server_bytes=limit))
    assert plan.totals().server_bytes <= limit * (1 + 1e-6)
    fitting = [one for one in choices if one.totals().server_bytes <= limit]
    best = min(totals(costs, one.cuts).seconds for one in fitting)
    assert plan.bound_s == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("averages", [(), (2,), (4,), (1, 2, 3), (1, 4, 5, 6)])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_in_lockstep_no_round_is_faster_than_its_bound(averages, seed):
    """Also where some clients have fewer batches than others, and average layers."""
    schedule = TOGETHER._replace(averages=averages)
    problem = draw_problem(seed, schedule, weighed=bool(averages))
    costs = cut_costs(problem, np.ones((len(problem.devices), LAYERS), bool))
    for cuts in every_choice(problem):
        found = evaluate_cuts(problem, cuts).totals().seconds
        assert totals(costs, cuts).seconds <= found * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_shared_gradients_send_no_more_than_with_equal_cuts(seed):
    """A gradient is sent once to all clients of a cut, not to those of other cuts."""
    problem = draw_problem(seed, TOGETHER)._replace(gradient_share=0.9)
    shape = len(problem.devices), LAYERS
    cuts = np.random.default_rng(seed).random(shape) < 0.5
    cuts[:, 0] = True
    plan = plan_cuts(problem, "bytes", Limits(cuts=cuts))
    for cut in 1 + np.flatnonzero(cuts.all(axis=0)):
        equal = evaluate_cuts(problem, np.full(len(cuts), cut)).totals().bytes
        assert plan.totals().bytes <= equal
        limits = Limits(cuts=cuts, bytes=equal)
        assert plan_cuts(problem, "seconds", limits).totals().bytes <= equal * 1.000001


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_in_lockstep_a_narrow_uplink_decides(seed):
    """All bytes at its rate bound the round: behind fast links the plan sends least."""
    problem = draw_problem(seed, TOGETHER)
    devices = tuple(Device(d.name, 1e9, 1e9, 1e9, 1e9) for d in problem.devices)
    narrow = problem._replace(devices=devices, uplink_bytes_per_s=10.0)
    choices = [evaluate_cuts(narrow, cuts) for cuts in every_choice(narrow)]
    costs = cut_costs(narrow, np.ones((len(devices), LAYERS), bool))
    for one in choices:
        assert totals(costs, one.cuts).seconds <= one.time.seconds * (1 + 1e-9)
    least = min(one.time.up_bytes.sum() for one in choices)
    plan = plan_cuts(narrow)
    assert plan.time.up_bytes.sum() == pytest.approx(least, rel=1e-3)
    wide = evaluate_cuts(problem._replace(devices=devices), plan.cuts)
    assert plan.time.seconds > wide.time.seconds


@pytest.mark.parametrize("averages", [(), (7, 20)])
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_clients_that_follow_one_another_get_the_fastest_cuts(averages, seed):
    """Only the first batches and the last replies are not one after the other."""
    schedule = Schedule(shared=True, boundary="joint", turn="epoch", averages=averages)
    problem = draw_problem(seed, schedule, weighed=bool(averages))
    problem = problem._replace(steps=problem.steps + 40)
    costs = cut_costs(problem, np.ones((len(problem.devices), LAYERS), bool))
    choices = [evaluate_cuts(problem, cuts) for cuts in every_choice(problem)]
    for one in choices:
        assert totals(costs, one.cuts).seconds <= one.time.seconds * (1 + 1e-9)
    best = min(one.time.seconds for one in choices)
    assert plan_cuts(problem).time.seconds <= 1.05 * best


def test_in_lockstep_alike_clients_wait_for_nobody():
    """So the bound is the round, with an upload and a download of layers at its end."""
    schedule = TOGETHER._replace(averages=(2, 4))
    problem = draw_problem(0, schedule, weighed=True)
    devices = (problem.devices[0],) * len(problem.devices)
    problem = problem._replace(devices=devices, steps=np.full(len(devices), 4))
    costs = cut_costs(problem, np.ones((len(devices), LAYERS), bool))
    seconds = []
    for cut in range(1, LAYERS + 1):
        plan = evaluate_cuts(problem, np.full(len(devices), cut))
        assert totals(costs, plan.cuts).seconds == pytest.approx(plan.time.seconds)
        seconds.append(plan.time.seconds)
    assert plan_cuts(problem._replace(one_cut=True)).time.seconds == min(seconds)


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


@pytest.mark.parametrize(
    ("boundary", "averages"), [("detached", ()), ("detached", (4,)), ("none", (4,))]
)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_no_other_shares_of_an_uplink_end_the_uploads_earlier(boundary, averages, seed):
    """Against a search over the shares of two clients in the course of the round."""
    schedule = Schedule(shared=False, boundary=boundary, averages=averages)
    problem = draw_problem(seed, schedule, weighed=bool(averages))
    devices, cuts = problem.devices[:2], np.array([1, 2])
    if boundary == "none":
        problem = problem._replace(
            traffic={
                cut: Traffic(cut, Bytes(0, 0), one.weights)
                for cut, one in problem.traffic.items()
            }
        )
    problem = problem._replace(devices=devices, steps=problem.steps[:2])
    bandwidth = 0.7 * sum(device.up_bytes_per_s for device in devices)

    def last_upload_s(problem):
        spans = evaluate_cuts(problem, cuts).time.spans
        ends = [s.end_s for s in spans if s.kind in ("upload", "weights up")]
        return max(np.nanmax(end) for end in ends)

    def with_share(share):
        rates = (share * bandwidth, (1 - share) * bandwidth)
        own = (
            replace(device, up_bytes_per_s=min(device.up_bytes_per_s, rate))
            for device, rate in zip(devices, rates, strict=True)
        )
        return last_upload_s(problem._replace(devices=tuple(own)))

    found = last_upload_s(problem._replace(uplink_bytes_per_s=bandwidth))
    best = minimize_scalar(
        with_share, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(best.fun, rel=1e-5)


def test_a_client_without_batches_takes_no_share_of_an_uplink():
    schedule = Schedule(shared=False, boundary="detached", averages=())
    problem = draw_problem(3, schedule)
    busy, idle = problem.devices[:2]
    busy = replace(busy, up_bytes_per_s=busy.up_bytes_per_s / 1e4)  # it sends all along
    idle = replace(idle, forward_flops_per_s=1e-6, backward_flops_per_s=1e-6)
    problem = problem._replace(devices=(busy, idle), steps=np.array([4, 0]))
    shared = problem._replace(uplink_bytes_per_s=busy.up_bytes_per_s)
    cuts = np.array([1, 1])
    seconds = evaluate_cuts(problem, cuts).time.seconds
    assert evaluate_cuts(shared, cuts).time.seconds == pytest.approx(seconds, rel=1e-9)


def test_weights_are_sent_once_all_batches_are_computed():
    """45 MB each after 10 s and 100 s, at 1 MB/s: 45/(t - 10) + 45/(t - 100) = 1."""
    schedule = Schedule(shared=False, boundary="none", averages=(10,))
    layer = LayerCost("layer", 1, 1, 1, 1)
    problem = Problem(
        (layer, layer._replace(flops=0), layer._replace(flops=0)),
        {1: Traffic(1, Bytes(0, 0), 45_000_000)},
        (Device("fast", 3.0, 3.0, 1e9, 1e9), Device("slow", 0.3, 0.3, 1e9, 1e9)),
        Device("server", 1.0, 1.0, 1e9, 1e9),
        schedule,
        np.array([10, 10]),
        1,
        1,
        uplink_bytes_per_s=1e6,
    )
    plan = evaluate_cuts(problem, np.array([1, 1]))
    seconds = 100 + np.sqrt(45**2 + 45**2) + 0.045  # and the mean comes down
    assert plan.time.seconds == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("steps", [3, 5])
def test_averages_after_the_last_batch_of_those_present(steps):
    """Clients train, and average their layers, at all points of the schedule."""
    work = Work(np.array([steps]), *[np.ones(1)] * 5, weights_up_s=np.ones(1))
    schedule = Schedule(shared=False, averages=(1, 2, 3, 4, 5))
    parts = list(parts_of_round(work.arrays(), schedule))
    assert [part.mean for part in parts] == [True] * 5
    assert sum(part.stop - part.first for part in parts) == steps
