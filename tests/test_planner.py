"""The optimisers of the planner, against brute force and closed forms."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsee_jax.core import UserError
from hsee_jax.systems.bandwidth import divide_uplink
from hsee_jax.systems.bottleneck import fastest
from hsee_jax.systems.choice import allowed_cuts, choose, upward
from hsee_jax.systems.milp import cheapest
from hsee_jax.systems.pairs import (
    exact_pairs,
    fold_pairs,
    greedy_pairs,
    pair_seconds,
    slowest_pair_s,
    weak_share,
)
from hsee_jax.systems.pipeline import (
    best_micro_batches,
    ideal_micro_batches,
    pipeline_s,
    split_layers,
)
from hsee_jax.systems.quantities import QUANTITIES, CutCosts, pick, totals

SEEDS = st.integers(0, 2**32 - 1)


def draw_costs(seed, **fields):
    """Costs of a few clients, some of them alike, in small whole numbers or not."""
    rng = np.random.default_rng(seed)
    clients, layers = rng.integers(1, 5), rng.integers(1, 5)
    phases = 1 if not fields.get("lockstep") else 2
    kind = rng.integers(0, clients, clients)

    def values(*shape):
        if seed % 2:
            return rng.integers(0, 5, shape).astype(float)
        return rng.exponential(3.0, shape)

    allowed = rng.random((clients, layers)) < 0.7
    allowed[:, rng.integers(layers)] = True
    costs = {
        "phases_s": values(phases, clients, layers)[:, kind],
        "server_s": values(clients, layers)[kind],
        "active_joules": values(clients, layers)[kind],
        "idle_watts": values(clients)[kind],
        "up_bytes": values(clients, layers)[kind],
        "down_bytes": values(clients, layers)[kind],
        "server_bytes": values(clients, layers)[kind],
        "activation_bytes": values(clients, layers)[kind],
        "allowed": allowed[kind],
        "workers": int(rng.integers(1, 4)),
    }
    return CutCosts(**costs | fields), rng


def every_choice(costs):
    """Yield all allowed cuts and their totals."""
    layers = range(1, costs.allowed.shape[1] + 1)
    for cuts in itertools.product(layers, repeat=len(costs.allowed)):
        cuts = np.array(cuts)
        if pick(costs.allowed, cuts).all():
            yield cuts, totals(costs, cuts)


def test_totals_by_hand():
    """Two clients: 3 s and 5 s alone, 2 s and 4 s of the server, 6 and 9 bytes up."""
    costs = CutCosts(
        phases_s=np.array([[[3.0, 9.0], [9.0, 5.0]]]),
        server_s=np.array([[2.0, 9.0], [9.0, 4.0]]),
        active_joules=np.array([[10.0, 0.0], [0.0, 20.0]]),
        idle_watts=np.array([0.5, 1.0]),
        up_bytes=np.array([[6.0, 0.0], [0.0, 9.0]]),
        down_bytes=np.array([[1.0, 0.0], [0.0, 2.0]]),
        server_bytes=np.array([[5.0, 0.0], [0.0, 4.0]]),
        activation_bytes=np.array([[2.0, 0.0], [0.0, 3.0]]),
        allowed=np.ones((2, 2), bool),
    )
    cuts = np.array([1, 2])
    assert totals(costs, cuts) == (6.0, 30 + 1.5 * 6, 18.0, 9.0 + 3.0)
    by_two = totals(costs._replace(workers=2), cuts)
    assert (by_two.seconds, by_two.server_bytes) == (5.0, 9.0 + 5.0)
    assert totals(costs._replace(uplink_bytes_per_s=2.0), cuts).seconds == 7.5
    costs = costs._replace(lockstep=True)
    assert totals(costs, cuts).seconds == 5 + 6
    assert totals(costs._replace(uplink_bytes_per_s=1.0), cuts).seconds == 15


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_the_sweep_equals_brute_force_and_the_solver(seed):
    costs, _ = draw_costs(seed)
    best = min(value.seconds for _, value in every_choice(costs))
    cuts = fastest(
        costs.phases_s[0], costs.server_s, costs.allowed, workers=costs.workers
    )
    assert pick(costs.allowed, cuts).all()
    assert totals(costs, cuts).seconds == pytest.approx(best, rel=1e-12)
    solved = totals(costs, cheapest(costs, "seconds", {})).seconds
    assert solved == pytest.approx(best, rel=1e-6, abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    SEEDS,
    st.sampled_from(QUANTITIES),
    st.booleans(),
    st.sets(st.sampled_from(QUANTITIES)),
)
def test_choices_under_limits_equal_brute_force(seed, minimize, lockstep, limited):
    costs, rng = draw_costs(seed, lockstep=lockstep)
    if rng.random() < 0.5:
        costs = costs._replace(uplink_bytes_per_s=float(rng.exponential(2.0)))
    choices = [value for _, value in every_choice(costs)]
    # A limit between what two choices need, so that rounding decides nothing.
    limits = {}
    for name in sorted(limited):
        levels = np.unique([getattr(value, name) for value in choices])
        limits[name] = float(levels[rng.integers(len(levels))] * 1.0001 + 0.0001)
    kept = [
        value
        for value in choices
        if all(getattr(value, name) <= limits[name] for name in limits)
    ]
    if not kept:
        with pytest.raises(UserError, match="is not possible"):
            choose(costs, minimize, limits)
        return
    cuts = choose(costs, minimize, limits)
    assert pick(costs.allowed, cuts).all()
    found = totals(costs, cuts)
    best = min(getattr(value, minimize) for value in kept)
    assert getattr(found, minimize) == pytest.approx(best, rel=1e-5, abs=1e-5)
    for name, most in limits.items():
        assert getattr(found, name) <= most * (1 + 1e-5)
    equal = [v for v in kept if getattr(v, minimize) <= best * (1 + 1e-7)]
    quickest = min(value.seconds for value in equal)
    assert found.seconds <= quickest * (1 + 1e-5) + 1e-5


def test_a_thousand_clients_take_less_than_a_second():
    rng = np.random.default_rng(0)
    own = rng.exponential(1.0, (1000, 9)).cumsum(axis=1)
    server = own[:, ::-1] / 50
    allowed = rng.random(own.shape) < 0.8
    allowed[:, 0] = True
    start = time.process_time()
    cuts = fastest(own, server, allowed)
    assert time.process_time() - start < 1.0
    seconds = max(pick(own, cuts).max(), pick(server, cuts).sum())
    for threshold in rng.choice(own[allowed], 50):
        within = np.where(allowed & (own <= threshold), server, np.inf).min(axis=1)
        assert max(threshold, within.sum()) >= seconds * (1 - 1e-12)


def test_an_impossible_limit_names_the_nearest_that_is_possible():
    """Joules 10 and 20, seconds 4 and 1: each limit alone is possible, not both."""
    costs = CutCosts(
        phases_s=np.array([[[4.0, 1.0]]]),
        server_s=np.zeros((1, 2)),
        active_joules=np.array([[10.0, 20.0 + 1 / 3]]),
        idle_watts=np.zeros(1),
        up_bytes=np.zeros((1, 2)),
        down_bytes=np.zeros((1, 2)),
        server_bytes=np.array([[5.0, 6.0]]),
        activation_bytes=np.zeros((1, 2)),
        allowed=np.ones((1, 2), bool),
    )
    with pytest.raises(UserError) as refusal:
        choose(costs, "bytes", {"seconds": 2.0, "joules": 15.0})
    assert str(refusal.value) == (
        "max_joules: 15 is not possible with max_seconds 2; allowed is 20.34 or more"
    )
    with pytest.raises(UserError) as refusal:
        choose(costs, "seconds", {"server_bytes": 4.0})
    assert str(refusal.value) == (
        "max_server_memory: 4 is not possible; allowed is 5 or more"
    )
    assert choose(costs, "bytes", {"seconds": 2.0, "joules": 20.34}).tolist() == [2]


def test_numbers_round_upward():
    assert upward(0) == "0"
    assert upward(7.30001) == "7.301"
    assert upward(123456) == "123500"
    assert upward(0.25) == "0.25"


def test_memory_leaves_some_cuts():
    memory = np.array([10.0, 20.0, 30.0])
    two = {"names": ["a", "b"], "choices": [2, 3]}
    allowed = allowed_cuts(memory, np.array([25.0, np.inf]), **two)
    assert allowed.tolist() == [[False, True, False], [False, True, True]]
    with pytest.raises(UserError) as refusal:
        allowed_cuts(memory, np.array([99.0, 15.0]), **two)
    assert str(refusal.value) == (
        "max_memory: 15 bytes of client 1 (b) is too little for cuts 2 3; allowed is "
        "20 or more"
    )


def test_an_uplink_divided_so_that_all_end_together():
    """10 Mbit/s for 2, 1 and 0.5 MB after 1, 3 and 2 s; equal shares end at 5.8 s."""
    sizes, starts = np.array([2e6, 1e6, 0.5e6]), np.array([1.0, 3.0, 2.0])
    division = divide_uplink(sizes, starts, 10e6 / 8)
    assert division.seconds == pytest.approx(4.8206, abs=5e-5)
    np.testing.assert_allclose(starts + sizes / division.bytes_per_s, division.seconds)
    assert division.bytes_per_s.sum() == pytest.approx(10e6 / 8)
    equal = starts + sizes / (10e6 / 8 / 3)
    assert equal.max() == pytest.approx(5.8)


def test_own_links_and_empty_uploads_in_a_division():
    sizes, starts = np.array([2.0, 0.0, 1.0]), np.array([0.0, 9.0, 1.0])
    wide = divide_uplink(sizes, starts, 1e9, link_bytes_per_s=np.array([0.5, 1.0, 1.0]))
    assert wide.seconds == 9.0  # the one who sends nothing is ready last
    assert wide.bytes_per_s[1] == 0
    alone = divide_uplink(sizes[:1], starts[:1], 1e9, link_bytes_per_s=0.5)
    assert alone == (np.array([0.5]), 4.0)
    together = divide_uplink(np.array([3.0, 1.0]), np.zeros(2), 2.0)
    np.testing.assert_allclose(together.bytes_per_s, [1.5, 0.5])  # by size


def test_micro_batches_in_closed_form_and_on_a_grid():
    """Beside it: no alpha, and as many micro-batches as possible."""
    alpha, beta = np.array([0.02, 0.05, 0.01]), np.array([4.0, 6.0, 3.0])
    assert ideal_micro_batches(alpha, beta) == pytest.approx(11.83, abs=5e-3)
    assert best_micro_batches(alpha, beta, most=100) == 12
    assert pipeline_s(alpha, beta, 1) == pytest.approx(0.08 + 13)
    # 12 micro-batches: each stage once, and 11 times more the slowest
    by_hand = 0.08 + 13 / 12 + 11 * (0.05 + 6 / 12)
    assert pipeline_s(alpha, beta, 12) == pytest.approx(by_hand)
    assert ideal_micro_batches(np.zeros(3), beta) == math.inf
    assert best_micro_batches(np.zeros(3), beta, most=40) == 40


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_layers_over_devices_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    devices, layers = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    layer_s = rng.exponential(1.0, (devices, layers))
    send_s = rng.exponential(0.5, (devices, layers))
    batches = int(rng.integers(1, 6))
    memory, most = rng.integers(1, 4, layers), rng.integers(1, 12, devices)
    held = np.concatenate([[0], memory.cumsum()])
    fits = held[None, None, :] - held[None, :, None] <= most[:, None, None]

    best = math.inf
    for inner in itertools.combinations_with_replacement(
        range(layers + 1), devices - 1
    ):
        ends = (0, *inner, layers)
        stages = []
        for k, (a, b) in enumerate(itertools.pairwise(ends)):
            sends = send_s[k, b - 1] if 0 < b < layers else 0  # or passes on
            stages.append(layer_s[k, a:b].sum() + sends)
        if all(
            memory[a:b].sum() <= most[k]
            for k, (a, b) in enumerate(itertools.pairwise(ends))
        ):
            best = min(best, sum(stages) + (batches - 1) * max(stages))
    found = split_layers(layer_s, send_s, micro_batches=batches, fits=fits)
    if found is None:
        assert best == math.inf
    else:
        assert found.seconds == pytest.approx(best)
        assert len(found.ends) == devices
        assert found.ends[-1] == layers


def test_an_uplink_without_bandwidth_is_refused():
    with pytest.raises(ValueError, match="bandwidth: -1.0; allowed is more than 0"):
        divide_uplink(np.ones(2), np.zeros(2), -1.0)


def every_pairing(clients):
    if not clients:
        yield ()
        return
    first, *rest = clients
    for second in rest:
        for pairs in every_pairing([i for i in rest if i != second]):
            yield ((first, second), *pairs)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from([2, 4, 6]))
def test_pairs_equal_brute_force(seed, clients):
    """Sort-and-fold is optimal where the exchange takes no time."""
    rng = np.random.default_rng(seed)
    speeds = rng.exponential(1.0, clients) + 0.1
    exchange = rng.exponential(1.0, (clients, clients))
    seconds = pair_seconds(3.0, speeds, exchange + exchange.T)
    best = min(slowest_pair_s(seconds, p) for p in every_pairing(range(clients)))
    assert slowest_pair_s(seconds, exact_pairs(seconds)) == best
    silent = pair_seconds(3.0, speeds)
    best = min(slowest_pair_s(silent, p) for p in every_pairing(range(clients)))
    folded = slowest_pair_s(silent, fold_pairs(speeds))
    assert folded == pytest.approx(best)
    assert folded == slowest_pair_s(silent, exact_pairs(silent))


def test_pairs_by_hand():
    """The strongest with the weakest; a fast link can outweigh the gap."""
    speeds = np.array([4.0, 1.0, 2.0, 3.0])
    assert fold_pairs(speeds) == ((0, 1), (2, 3))
    flat = np.ones((4, 4))
    assert greedy_pairs(speeds, flat) == ((0, 1), (2, 3))
    rates = flat.copy()
    rates[0, 2] = rates[2, 0] = 10.0
    assert greedy_pairs(speeds, rates) == ((0, 2), (1, 3))
    assert greedy_pairs(speeds, rates, rate=0.1) == ((0, 1), (2, 3))
    assert pair_seconds(10.0, speeds)[0, 1] == 2 * 10 / 5
    assert weak_share(speeds, (1, 0)) == 0.2


def test_clients_that_form_no_pairs_are_refused():
    with pytest.raises(UserError, match="pairs: 3 clients do not form pairs"):
        fold_pairs(np.ones(3))
    with pytest.raises(UserError, match=r"pairs: 18 clients are too many.*2\.\.16"):
        exact_pairs(np.ones((18, 18)))
