"""The simulated clock of a round: who is in time, against a loop over all seconds."""

import math

import numpy as np
import pytest
from tiny import TINY

from hsee_jax import cli
from hsee_jax.config import override, preset
from hsee_jax.core import UserError
from hsee_jax.runs.build import build
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.equip import Given, equip
from hsee_jax.systems import Schedule, Work, make_device, round_time
from hsee_jax.systems.availability import (
    Period,
    available_from,
    by_client,
    read_availability,
)
from hsee_jax.systems.clock import Clock, RoundClock, clock_round, clock_totals

TURNS, REPLICAS = Schedule(shared=True), Schedule(shared=False)


def device(busy=5.0, sending=2.0, receiving=3.0, idle=1.0):
    return make_device(
        {
            "name": "d",
            "forward_flops_per_s": 1e9,
            "up_bytes_per_s": 1e6,
            "busy_watts": busy,
            "sending_watts": sending,
            "receiving_watts": receiving,
            "idle_watts": idle,
        }
    )


def ascending(steps, count):
    return np.tile(np.arange(count), (steps, 1))


def draw_clock(rng, clients, *, steps=3, **rules):
    """Clients of unlike speed, whose server takes no time."""
    times = rng.exponential(size=(3, clients)) * 10 ** rng.uniform(-1, 1, clients)
    work = Work(steps, *times, up_bytes=10.0, down_bytes=0.0)
    devices = tuple(device(busy=float(w)) for w in rng.uniform(2, 9, clients))
    return Clock(work.arrays(), devices, **rules)


def test_one_client_has_a_closed_form():
    """4 steps of forward 1 s, backward 2 s, upload 0.5 s, server 0.25 s.

    The client computes for 4 x 3 = 12 s; its last upload begins at 10 and is served at
    10.75. It sends for 2 s, so it takes 1 x 12 + (5 - 1) x 12 + (2 - 1) x 2 = 62 J.
    """
    clock = Clock(Work(4, 1.0, 2.0, 0.5, 0.25).arrays(), (device(),))
    found = clock_round(clock, TURNS, [0], ascending(4, 1), now_s=7.0)
    assert found == RoundClock(7.0, 12.0, 62.0, 0.0, (), ())
    assert found.end_s == 19.0


def brute_force(seconds, periods, ids, now, deadline):
    """Look at every second until a client is there that can be done by the deadline."""

    def is_there(client, second):
        own = [p for p in periods if p.client == client]
        return not own or any(p.from_s <= second < p.to_s for p in own)

    for second in range(now, 400):
        there = [i for i in ids if is_there(i, second)]
        if any(seconds[i] <= deadline for i in there):
            late = [i for i in there if seconds[i] > deadline]
            rest = [seconds[i] for i in there if i not in late]
            away = [i for i in ids if i not in there]
            return second, deadline if late else max(rest), away, late
    return None


def test_a_loop_over_all_seconds_agrees():
    """Random traces in whole seconds, with a server that never is the bottleneck."""
    rng = np.random.default_rng(0)
    refusals = lates = aways = waits = 0
    for _ in range(200):
        count = int(rng.integers(1, 6))
        periods = []
        for client in range(count):
            if rng.random() < 0.8:
                ends = np.sort(rng.choice(300, 6, replace=False)).tolist()
                pairs = zip(ends[::2], ends[1::2], strict=True)
                periods += [Period(client, a, b) for a, b in pairs]
        deadline = float(rng.choice([5.0, 20.0, math.inf]))
        rules = {"availability": by_client(periods), "deadline_s": deadline}
        clock = draw_clock(rng, count, **rules)
        alone = [
            round_time(clock.work.take([i]), REPLICAS).seconds for i in range(count)
        ]
        ids = np.flatnonzero(rng.random(count) < 0.8).tolist() or [0]
        now = int(rng.integers(0, 250))
        expected = brute_force(alone, periods, ids, now, deadline)
        order = ascending(3, len(ids))
        if expected is None:
            refusals += 1
            with pytest.raises(UserError, match="deadline: |availability: "):
                clock_round(clock, REPLICAS, ids, order, now_s=now)
            continue
        found = clock_round(clock, REPLICAS, ids, order, now_s=now)
        begin, seconds, away, late = expected
        assert (found.begin_s, list(found.away), list(found.late)) == (
            begin,
            away,
            late,
        )
        assert found.seconds == pytest.approx(seconds, rel=1e-12)
        lates, aways = lates + bool(late), aways + bool(away)
        waits += begin > now
    assert min(refusals, lates, aways, waits) > 10  # every case was there


def test_energy_and_bytes_of_a_late_client():
    """It works until the deadline; the others are idle for the rest of the round.

    Client 0 computes for 4 s and then idles to 5 s: 1 x 5 + 4 x 4 = 21 J. Client 1
    needs 20 s and sends 4 x 100 bytes; by the deadline it has spent a quarter of
    1 x 20 + 4 x 20 = 100 J, and of 400 bytes.
    """
    work = Work(4, [0.5, 2.5], [0.5, 2.5], up_bytes=[7.0, 100.0]).arrays()
    clock = Clock(work, (device(), device()), deadline_s=5.0)
    found = clock_round(clock, TURNS, [0, 1], ascending(4, 2), now_s=0.0)
    assert found == RoundClock(0.0, 5.0, 21.0 + 25.0, 100.0, (), (1,))
    # With a queue that makes it late, it is done before the deadline, and idles.
    queue = Clock(
        Work(1, [1.0, 2.0], 0.0, 0.0, 3.0).arrays(), (device(), device()), {}, 6.0
    )
    found = clock_round(queue, TURNS, [0, 1], ascending(1, 2), now_s=0.0)
    assert found.late == (1,)
    alone = 1 * 5 + 4 * 2  # ready after 2 + 3 s
    assert found.joules == pytest.approx((6 + 4 * 1) + (alone + 1))


def test_where_the_server_is_slow_as_many_are_in_time_as_fit():
    """The fastest come first; one more would make the round too long."""
    rng = np.random.default_rng(1)
    some = 0
    for case in range(60):
        count = int(rng.integers(2, 9))
        clock = draw_clock(rng, count)
        work = clock.work._replace(server_s=rng.exponential(size=count))
        schedule = (TURNS, REPLICAS, TURNS._replace(turn="epoch"))[case % 3]
        order = np.array([rng.permutation(count) for _ in range(3)])
        alone = [round_time(work.take([i]), schedule).seconds for i in range(count)]
        deadline = float(rng.uniform(min(alone), 2 * max(alone)))
        clock = Clock(work, clock.devices, {}, deadline)

        def course(who, work=work, schedule=schedule, order=order):
            places = {i: k for k, i in enumerate(sorted(who))}
            turns = [[places[i] for i in row if i in places] for row in order.tolist()]
            return round_time(work.take(sorted(who)), schedule, order=turns).seconds

        found = clock_round(clock, schedule, list(range(count)), order, now_s=0.0)
        by_speed = np.argsort(alone).tolist()
        kept = [i for i in by_speed if i not in found.late]
        assert kept == by_speed[: len(kept)]
        assert course(kept) <= deadline
        if not found.late:
            assert found.seconds == pytest.approx(course(kept), rel=1e-12)
            continue
        assert found.seconds == deadline
        more = by_speed[: len(kept) + 1]
        assert course(more) > deadline or alone[more[-1]] > deadline
        some += len(kept) > 1
    assert some > 10


RUN = override(
    preset("demo"),
    **TINY,
    num_clients=2,
    cuts=("1", "1"),
    max_train_samples=40,
    max_test_samples=10,
    batch_size=8,
    rounds=3,
    strategy="sequential",
)
DEVICES = """
[[devices]]
name = "d"
count = 2
forward_flops_per_s = 1e{digit}
up_bytes_per_s = 1e9
"""


def seconds_of(tmp_path, text, **changes):
    """The seconds of each round of a run on devices."""
    config, path = override(RUN, **changes), tmp_path / "fleet.toml"
    path.write_text(text)
    equipment = equip(config, Given(path), resume=None)
    return [one.seconds for one in with_clock(build(config), equipment).clock]


def test_a_round_is_that_of_its_devices_and_cuts(tmp_path):
    """From round 2 on a device computes a tenth as fast; in round 3 cuts change."""
    changing = "change_round = 2\ncompute_change = 0.1\n"
    fast, slow = (DEVICES.format(digit=digit) for digit in (6, 5))
    found = seconds_of(tmp_path, fast + changing, recuts=("3:2,1",))
    assert found[1] > 5 * found[0] and found[2] > 1.1 * found[1]
    always = {
        "fast": seconds_of(tmp_path, fast)[0],
        "slow": seconds_of(tmp_path, slow)[1],
        "slow and deep": seconds_of(tmp_path, slow, cuts=("2", "1"))[2],
    }
    assert found == pytest.approx(list(always.values()), rel=1e-9)


def test_watts_that_are_not_known_are_null():
    dark = make_device(
        {"name": "dark", "forward_flops_per_s": 1e9, "up_bytes_per_s": 1e6}
    )
    clock = Clock(Work(1, 1.0, 1.0).arrays(), (dark,))
    found = clock_round(clock, TURNS, [0], ascending(1, 1), now_s=0.0)
    assert math.isnan(found.joules) and found.to_json()["joules"] is None
    np.testing.assert_equal(RoundClock.from_json(found.to_json()), found)
    assert found.scalars() == {
        "simulated/seconds": 2.0,
        "simulated/end_s": 2.0,
        "simulated/late": 0.0,
    }
    totals = clock_totals([found, found._replace(begin_s=3.0, late=(4, 5))])
    assert (totals.seconds, totals.late_rounds) == (5.0, 2)
    assert totals.to_json()["joules"] is None
    assert clock_totals([]) is None


def test_refusals_say_what_is_possible():
    clock = Clock(Work(1, [1.0, 3.0], 0.0).arrays(), (device(),) * 2, {}, 0.5)
    with pytest.raises(UserError, match="of round 4; allowed is 1 or more"):
        clock_round(clock, TURNS, [0, 1], ascending(1, 2), now_s=0.0, number=4)
    periods = by_client([Period(0, 0, 10)])
    clock = Clock(clock.work, clock.devices, periods, 2.0)
    clock_round(clock, TURNS, [0, 1], ascending(1, 2), now_s=9.0)
    # Client 1 is always there, and never in time.
    with pytest.raises(UserError, match="availability: after second 10 none of the"):
        clock_round(clock, TURNS, [0, 1], ascending(1, 2), now_s=10.0)


def test_a_trace_is_read(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("from_s;to_s;client;why\n\n0; 3.5;1;\n7;9;1;night\n2;4;0\n")
    periods = read_availability(path, 3)
    assert periods == (Period(1, 0, 3.5), Period(1, 7, 9), Period(0, 2, 4))
    availability = by_client(periods)
    assert [available_from(availability, 1, t) for t in (0, 3.4, 3.5, 8, 9)] == [
        0,
        3.4,
        7,
        8,
        math.inf,
    ]
    assert available_from(availability, 2, 5.0) == 5.0  # the trace does not name it


HEAD = "client,from_s,to_s\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        (
            "client,from_s\n0,1\n",
            "lacks the column to_s; it has client, from_s; allowed",
        ),
        ("", "lacks the column client; it has none; allowed are the columns client,"),
        (HEAD, "has no period; allowed is 1 or more"),
        (HEAD + "6,0,1\n", "line 2: client 6 is not allowed; allowed are 0..5"),
        (HEAD + "0,0,1\n\n0,5,5\n", "line 4: from_s 5 to_s 5 is not allowed; allowed"),
        (HEAD + "0,-1,5\n", "line 2: from_s -1 to_s 5 is not allowed"),
        (HEAD + "0,1,inf\n", "line 2: from_s 1 to_s inf is not allowed"),
        (HEAD + "0,nan,5\n", "line 2: from_s nan to_s 5 is not allowed"),
        (HEAD + "a,1,5\n", "line 2: a,1,5 is not allowed; allowed are a client's id"),
        (HEAD + "0,1\n", "line 2: 0,1, is not allowed"),
    ],
)
def test_a_wrong_trace_is_one_line(tmp_path, capsys, text, message):
    path, fleet = tmp_path / "trace.csv", tmp_path / "fleet.csv"
    fleet.write_text("device,count\njetson-nano,6\n")
    if text is not None:
        path.write_text(text)
    words = ["--devices", str(fleet), "--availability", str(path)]
    assert cli.main(["train", "demo", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"availability: {path}" in error and message in error
    assert not (tmp_path / "run").exists()
