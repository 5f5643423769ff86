"""The seconds of a round, against closed forms and an independent event simulation."""

from functools import partial

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_federation

from hsee_jax.algorithms import averaging, fedavg, local, sequential, splitfed_v2
from hsee_jax.systems import Schedule, Work, intervals, round_time, schedule_of
from hsee_jax.systems.intervals import busy_before

FIELDS = ("forward_s", "backward_s", "up_s", "server_s", "down_s")
TURNS = Schedule(shared=True)
REPLICAS = Schedule(shared=False)


def alone(tf, tb, u, v, steps):
    """The closed form for one client with a detached boundary."""
    return max(tf + u + v + (steps - 1) * max(tf + tb, u, v), steps * (tf + tb))


def draw_work(rng, clients, *, steps=None, weights=False):
    times = {name: rng.exponential(size=clients) for name in FIELDS}
    if steps is None:
        steps = rng.integers(0, 6, clients)
    if weights:
        times |= {f"weights_{way}_s": rng.exponential(size=clients) for way in UP_DOWN}
        times["weights_bytes"] = 1.0
    return Work(steps=steps, **times)


UP_DOWN = ("up", "down")


def test_one_detached_client_has_a_closed_form():
    """On 2,000 random cases, with a shared server and with a replica."""
    rng = np.random.default_rng(0)
    for case in range(2000):
        times = rng.exponential(size=4) * 10 ** rng.uniform(-2, 2, 4)
        steps = int(rng.integers(1, 40))
        tf, tb, u, v = times.tolist()
        expected = pytest.approx(alone(tf, tb, u, v, steps), rel=1e-12)
        work = Work(steps, tf, tb, u, v)
        schedule = (TURNS, REPLICAS)[case % 2]
        assert round_time(work, schedule).seconds == expected


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_many_steps_tend_to_the_bottleneck(scale):
    """Seconds a step tend to the largest of computing, link and the server's sum."""
    rng = np.random.default_rng(1)
    work = draw_work(rng, 5, steps=3000)._replace(server_s=scale * rng.random(5) / 5)
    limit = max(
        np.max(work.forward_s + work.backward_s),
        np.max(work.up_s),
        np.sum(work.server_s),
    )
    assert round_time(work, TURNS).seconds / 3000 == pytest.approx(limit, rel=1e-2)


def test_a_joint_server_that_takes_all_at_once_is_in_lock_step():
    """The slowest upload, the sum at the server, the slowest way back; every step."""
    work = draw_work(np.random.default_rng(2), 4, steps=7)
    a, b = work.forward_s + work.up_s, work.down_s + work.backward_s
    schedule = Schedule(shared=True, boundary="joint", turn="together")
    one = np.max(a) + np.sum(work.server_s) + np.max(b)
    time = round_time(work._replace(steps=1), schedule)
    assert time.seconds == pytest.approx(one, rel=1e-12)
    # A fast way back lets a client begin early, so more steps take at most as long.
    slow = np.max(a + b) + np.sum(work.server_s)
    total = round_time(work, schedule).seconds
    assert total == pytest.approx(one + 6 * slow, rel=1e-12)
    in_turns = Schedule(shared=True, boundary="joint")
    assert round_time(work, in_turns).seconds <= total


def test_joint_replicas_do_not_wait_for_each_other():
    """With a worker for each, a client's step is the sum of all that happens in it."""
    work = draw_work(np.random.default_rng(3), 4, steps=5)
    step = sum(getattr(work, name) for name in FIELDS)
    schedule = Schedule(shared=False, boundary="joint")
    time = round_time(work, schedule, workers=4)
    assert time.seconds == pytest.approx(5 * np.max(step))
    np.testing.assert_allclose(time.shares.waiting_s, 5 * (np.max(step) - step))
    np.testing.assert_allclose(time.shares.server_s, 5 * work.server_s)
    many = round_time(work, schedule, workers=10**21)  # more than any memory holds
    assert many.seconds == time.seconds


class Barrier:
    """An event that happens when all parties are there."""

    def __init__(self, env, parties):
        self.event, self.missing = env.event(), parties

    def arrive(self):
        self.missing -= 1
        if self.missing == 0:
            self.event.succeed()
        return self.event


class Simulation:
    """The round as processes that send each other messages."""

    def __init__(self, work, schedule, workers, order):
        self.work, self.schedule = work.arrays(), schedule
        self.steps = self.work.steps.astype(int)
        self.last, self.clients = max(self.steps), len(self.steps)
        self.joint = schedule.boundary == "joint"
        self.mean = bool(np.any(self.work.weights_up_s))
        env = self.env = simpy.Environment()
        self.inbox = [simpy.Store(env) for _ in range(self.clients)]
        self.reply = [simpy.Store(env) for _ in range(self.clients)]
        servers = 1 if schedule.shared else self.clients
        parties = servers + (self.clients if self.mean else 0)
        self.barriers = {s: Barrier(env, parties) for s in schedule.averages}
        for i in range(self.clients):
            env.process(self.client(i))
        if schedule.shared:
            env.process(self.server(order))
        else:
            self.pool = simpy.Resource(env, workers)
            for i in range(self.clients):
                env.process(self.replica(i))

    def upload(self, i, link):
        with link.request() as turn:
            yield turn
            yield self.env.timeout(self.work.up_s[i])
        yield self.inbox[i].put("features")

    def client(self, i):
        work, env = self.work, self.env
        link = simpy.Resource(env, 1)
        for step in range(self.last):
            if step < self.steps[i]:
                yield env.timeout(work.forward_s[i])
                env.process(self.upload(i, link))
                if self.joint:
                    yield self.reply[i].get()
                    yield env.timeout(work.down_s[i])
                yield env.timeout(work.backward_s[i])
            if self.mean and step + 1 in self.barriers:
                with link.request() as turn:
                    yield turn
                    yield env.timeout(work.weights_up_s[i])
                yield self.barriers[step + 1].arrive()
                yield env.timeout(work.weights_down_s[i])

    def take(self, clients):
        for i in clients:
            yield self.inbox[i].get()
        yield self.env.timeout(sum(self.work.server_s[clients]))
        for i in clients:
            yield self.reply[i].put("gradient")

    def server(self, order):
        ends = sorted({*self.barriers, self.last})
        for first, stop in zip([0, *ends], ends, strict=False):
            steps = range(first, stop)
            turns = [(s, [i]) for s in steps for i in order[s]]
            if self.schedule.turn == "epoch":
                turns = [(s, [i]) for i in order[0] for s in steps]
            elif self.schedule.turn == "together":
                turns = [(s, range(self.clients)) for s in steps]
            for step, clients in turns:
                yield from self.take([i for i in clients if step < self.steps[i]])
            if stop in self.barriers:
                yield self.barriers[stop].arrive()

    def replica(self, i):
        for step in range(self.last):
            if step < self.steps[i]:
                message = yield self.inbox[i].get()
                with self.pool.request() as worker:
                    yield worker
                    yield self.inbox[i].put(message)
                    yield from self.take([i])
            if step + 1 in self.barriers:
                yield self.barriers[step + 1].arrive()

    def seconds(self):
        self.env.run()
        return self.env.now


SCHEDULES = {
    "sequential": TURNS,
    "epoch": Schedule(shared=True, turn="epoch"),
    "joint in turns": Schedule(shared=True, boundary="joint"),
    "joint epoch": Schedule(shared=True, boundary="joint", turn="epoch"),
    "together": Schedule(shared=True, turn="together"),
    "joint together": Schedule(shared=True, boundary="joint", turn="together"),
    "replicas": REPLICAS,
    "joint replicas": Schedule(shared=False, boundary="joint"),
}


CASES = [
    (name, averages)
    for name, schedule in SCHEDULES.items()
    for averages in ("none", "servers", "clients")
    if not (schedule.shared and averages == "servers")
]


@pytest.mark.parametrize(("name", "averages"), CASES)
def test_an_event_simulation_agrees(name, averages):
    """Unequal clients, some without a batch, drawn turns, averages in the round."""
    schedule = SCHEDULES[name]
    rng = np.random.default_rng(4)
    for _ in range(40):
        clients, workers = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        if averages == "servers" and workers > 1:  # all are ready at once: a tie
            workers = clients
        steps = np.maximum(rng.integers(0, 6, clients), np.eye(clients, dtype=int)[0])
        work = draw_work(rng, clients, steps=steps, weights=averages == "clients")
        last = max(steps)
        chosen = schedule
        if averages != "none":
            points = {last, int(rng.integers(1, last + 1))}
            chosen = schedule._replace(averages=tuple(sorted(points)))
        order = [rng.permutation(clients).tolist() for _ in range(last)]
        found = round_time(work, chosen, workers=workers, order=order)
        expected = Simulation(work, chosen, workers, order).seconds()
        assert found.seconds == pytest.approx(expected, rel=1e-9)


seconds = st.floats(0, 10)


@st.composite
def rounds(draw):
    clients = draw(st.integers(1, 4))

    def series():
        return np.array(draw(st.lists(seconds, min_size=clients, max_size=clients)))

    work = Work(
        np.array([draw(st.integers(0, 4)) for _ in range(clients)]),
        *(series() for _ in FIELDS),
    )
    if draw(st.booleans()):
        work = work._replace(weights_up_s=series(), weights_down_s=series())
    schedule = draw(st.sampled_from(list(SCHEDULES.values())))
    last = int(max(work.steps))
    if last:
        points = draw(st.sets(st.integers(1, last)))
        schedule = schedule._replace(averages=tuple(sorted(points)))
    return work, schedule


@settings(max_examples=80, deadline=None)
@given(rounds(), st.integers(1, 5))
def test_the_parts_of_a_round_are_its_whole(drawn, workers):
    work, schedule = drawn
    time = round_time(work, schedule, workers=workers)
    np.testing.assert_allclose(sum(time.shares), time.seconds, atol=1e-9)
    busy = work.steps * (work.forward_s + work.backward_s)
    least = [np.max(busy), np.max(work.steps * work.up_s)]
    served = np.sum(work.steps * work.server_s)
    least.append(served / (1 if schedule.shared else workers))
    assert time.seconds >= max(least) - 1e-9
    assert 0 <= time.server_share <= 1 + 1e-9
    active = time.busy_s + time.sending_s + time.receiving_s
    assert np.all(time.idle_s >= time.seconds - active - 1e-9)
    assert np.all(time.idle_s <= time.seconds - busy + 1e-9)
    bars = list(intervals(time.spans, range(len(busy))))
    assert all(-1e-9 <= bar.start_s < bar.end_s <= time.seconds + 1e-9 for bar in bars)
    lengths = {"upload": np.sum(work.steps * work.up_s), "server": served}
    if schedule.turn == "together":  # one bar of the server for all clients of a step
        del lengths["server"]
    for kind, total in lengths.items():
        length = sum(bar.end_s - bar.start_s for bar in bars if bar.kind == kind)
        assert length == pytest.approx(total, abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(rounds(), st.sampled_from(FIELDS), st.floats(0, 1), st.data())
def test_a_faster_device_never_makes_the_round_longer(drawn, field, factor, data):
    """With one worker; see `round_time` for several."""
    work, schedule = drawn
    if schedule.boundary == "joint" and not schedule.shared:
        return  # replicas with one worker change their order with the arrivals
    values = getattr(work, field).copy()
    values[data.draw(st.integers(0, len(values) - 1))] *= factor
    before = round_time(work, schedule).seconds
    after = round_time(work._replace(**{field: values}), schedule).seconds
    assert after <= before + 1e-9


@settings(max_examples=80, deadline=None)
@given(rounds(), st.integers(1, 5))
def test_more_workers_never_make_the_round_longer(drawn, workers):
    """Where messages take equally long; a worker for each replica is best of all."""
    work, schedule = drawn
    schedule = schedule._replace(shared=False)
    best = round_time(work, schedule, workers=len(work.steps)).seconds
    some = round_time(work, schedule, workers=workers).seconds
    assert best <= some + 1e-9
    equal = work._replace(server_s=float(work.server_s[0]))
    some = round_time(equal, schedule, workers=workers).seconds
    assert round_time(equal, schedule, workers=workers + 1).seconds <= some + 1e-9


def test_what_binds_a_client():
    """A slow device, a slow link, a client that waits for them; then a slow server."""
    slow = Work(10, [1.0, 0.1, 0.1], 0.0, [0.1, 0.9, 0.1], 0.01)
    assert round_time(slow, TURNS).binds == ("compute", "link", "waiting")
    mean = REPLICAS._replace(averages=(10,))
    all_wait = round_time(slow._replace(weights_up_s=1e-3), mean, workers=3)
    assert all_wait.binds == ("compute", "link", "waiting")
    busy = slow._replace(server_s=5.0)
    assert round_time(busy, TURNS).binds == ("server",) * 3
    assert round_time(busy, TURNS).server_share > 0.95


def test_the_seconds_that_intervals_cover():
    """Against a count of the points of a fine grid."""
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 900, 20) / 10
    ends = starts + rng.integers(0, 80, 20) / 10
    grid = (np.arange(2000) + 0.5) / 10
    busy = ((starts[:, None] < grid) & (grid < ends[:, None])).any(axis=0)
    times = np.arange(1000) / 10
    expected = [np.sum(busy[grid < time]) / 10 for time in times]
    np.testing.assert_allclose(busy_before(starts, ends)(times), expected, atol=1e-9)
    assert busy_before(starts[:0], ends[:0])(times).sum() == 0


def test_bytes_and_seconds_of_links():
    work = Work(
        [3, 0],
        1.0,
        1.0,
        up_s=0.5,
        down_s=0.25,
        weights_up_s=2.0,
        weights_down_s=1.0,
        up_bytes=100,
        down_bytes=40,
        weights_bytes=1000,
    )
    schedule = Schedule(shared=False, boundary="joint", averages=(2, 3))
    time = round_time(work, schedule)
    assert time.up_bytes.tolist() == [2300, 2000]
    assert time.down_bytes.tolist() == [2120, 2000]
    assert time.sending_s.tolist() == [5.5, 4.0]
    assert time.receiving_s.tolist() == [2.75, 2.0]
    detached = round_time(work, schedule._replace(boundary="detached"))
    assert detached.down_bytes.tolist() == [2000, 2000]
    only = round_time(work.take([0]), schedule)
    assert (only.seconds, only.up_bytes.tolist()) == (time.seconds, [2300])


def test_the_schedule_of_each_algorithm():
    federation = tiny_federation({0: 1, 1: 1})
    last = tiny_federation({0: 3, 1: 3})

    def of(make, number=1, clients=federation, **chosen):
        return schedule_of(make(clients, **chosen), 4, number)

    assert of(sequential) == TURNS
    assert of(sequential, turn="epoch", boundary="joint") == Schedule(
        True, "joint", "epoch"
    )
    assert of(local) == REPLICAS
    assert of(averaging) == Schedule(False, averages=(4,))
    assert of(averaging, period=2) == REPLICAS
    assert of(averaging, 2, period=2) == Schedule(False, averages=(4,))
    by_steps = partial(of, averaging, period=3, period_unit="steps")
    assert [by_steps(r).averages for r in (1, 2, 3)] == [(3,), (2,), (1, 4)]
    assert of(splitfed_v2) == Schedule(True, "joint", averages=(4,))
    assert of(fedavg, clients=last) == Schedule(False, "none", averages=(4,))


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="turn: epochs is unknown"):
        round_time(Work(1, 1.0, 1.0), Schedule(shared=True, turn="epochs"))
    with pytest.raises(ValueError, match="negative"):
        round_time(Work(1, -1.0, 1.0), TURNS)
    with pytest.raises(ValueError, match="negative value or NaN"):
        round_time(Work(1, float("nan"), 1.0), TURNS)
    with pytest.raises(ValueError, match="workers: 0"):
        round_time(Work(1, 1.0, 1.0), REPLICAS, workers=0)
