"""Cuts planned again every few rounds: slower devices, and batteries that run down."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from hsee_jax import cli, runs
from hsee_jax.cli.plan_file import AUTO, config_with_plan, plan_now
from hsee_jax.config import override, preset, to_json
from hsee_jax.core import UserError
from hsee_jax.runs.folder import read_config
from hsee_jax.runs.planning import Resources, planning, problem_of
from hsee_jax.systems import (
    cut_costs,
    device_in_round,
    evaluate_cuts,
    make_device,
    plan_rounds,
    read_devices,
    totals,
)

# With the network `tiny` the first device takes a deep cut until it gets slow, and the
# second has energy for a part of the rounds only, unless it takes a shallow cut.
FLEET = """
[[devices]]
name = "worn"
forward_flops_per_s = 1e7
up_bytes_per_s = 1e5
change_round = 4
compute_change = 0.05
busy_watts = 8
sending_watts = 1
receiving_watts = 1
idle_watts = 0.1

[[devices]]
name = "phone"
forward_flops_per_s = 1e7
up_bytes_per_s = 1e5
battery_joules = {battery}
busy_watts = 8
sending_watts = 1
receiving_watts = 1
idle_watts = 0.1

[server]
name = "cloud"
forward_flops_per_s = 5e6
"""
CONFIG = override(
    preset("demo"), **TINY, max_train_samples=60, batch_size=8, validation_share=0
)


@pytest.fixture
def fleet(tmp_path):
    def write(battery):
        path = tmp_path / "fleet.toml"
        path.write_text(FLEET.format(battery=battery))
        return path

    return write


def problem_for(path):
    return problem_of(planning(CONFIG, Resources(read_devices(path))))


def every_choice():
    return [np.array(cuts) for cuts in itertools.product((1, 2, 3), repeat=2)]


def test_a_device_changes_from_a_round_on():
    device = make_device(
        {"name": "a", "forward_flops_per_s": 6.0, "up_bytes_per_s": 8.0}
        | {"change_round": 3, "compute_change": 0.5, "link_change": 2.0}
    )
    assert device_in_round(device, 2) == device
    later = device_in_round(device, 3)
    assert (later.forward_flops_per_s, later.backward_flops_per_s) == (3.0, 3.0)
    assert (later.up_bytes_per_s, later.down_bytes_per_s) == (16.0, 16.0)


def test_a_measured_device_is_the_same_after_its_change():
    """So the clock computes its times once, though it has no rate: NaN is not NaN."""
    measured = {"batch_size": 8, "parts": ["layer", "exit", "head"]}
    measured |= dict.fromkeys(("forward_s", "backward_s"), [1, 1, 1])
    measured |= dict.fromkeys(("client_step_s", "server_step_s"), [1])
    change = {"change_round": 3, "compute_change": 0.5}
    device = make_device(
        {"name": "a", "measured": measured, "up_bytes_per_s": 8.0} | change
    )
    assert len({device_in_round(device, number) for number in (3, 4, 5)}) == 1


def test_every_plan_is_the_fastest_for_the_devices_as_they_are(fleet):
    """Against all choices of cuts, for each of the rounds in which it plans."""
    problem = problem_for(fleet("1e9"))
    plan = plan_rounds(problem, rounds=6, every=3)
    assert plan.starts == (1, 4) and plan.cuts.shape == (2, 2)
    assert not np.array_equal(*plan.cuts)
    for start, cuts in zip(plan.starts, plan.cuts, strict=True):
        devices = tuple(device_in_round(d, start) for d in problem.devices)
        now = problem._replace(devices=devices)
        costs = cut_costs(now, np.ones((2, 3), bool))
        bounds = [totals(costs, other).seconds for other in every_choice()]
        assert totals(costs, cuts).seconds == pytest.approx(min(bounds))
        seconds = evaluate_cuts(now, cuts).time.seconds
        assert plan.seconds[start - 1] == pytest.approx(seconds)
    assert plan.seconds[0] == plan.seconds[2] < plan.seconds[3]


def test_a_battery_lasts_for_the_rounds_if_any_cut_makes_it(fleet):
    """The limit of a round is what is left, divided by the rounds that are left."""
    problem = problem_for(fleet("1e9"))
    free = plan_rounds(problem, rounds=3, every=1)
    used = 1e9 - free.battery_joules[1]
    least = min(evaluate_cuts(problem, cuts).joules[1] for cuts in every_choice())
    assert 3 * least < 0.9 * used
    battery = (3 * least + used) / 2
    problem = problem_for(fleet(battery))
    plan = plan_rounds(problem, rounds=3, every=3)
    assert plan.last_round.tolist() == [3, 3]
    assert 0 <= plan.battery_joules[1] < battery and plan.battery_joules[0] == np.inf
    assert plan.cuts[0, 1] < free.cuts[0, 1]
    lasting = [
        choice.time.seconds
        for choice in (evaluate_cuts(problem, cuts) for cuts in every_choice())
        if choice.joules[1] <= battery / 3
    ]
    assert plan.seconds[0] <= 1.1 * min(lasting)  # its bound does not know the queue


@pytest.mark.parametrize("idle", [0.1, 2.0])
def test_the_cut_that_needs_least_counts_the_seconds_of_the_round(idle, fleet):
    """Cut 1 computes least; where waiting draws much, its long uploads cost more."""
    problem = problem_for(fleet("1e9"))
    watts = {"busy_watts": 8.0, "sending_watts": idle, "idle_watts": idle}
    other, phone = problem.devices
    phone = replace(phone, up_bytes_per_s=2e4, **watts)
    problem = problem._replace(devices=(other, phone))
    first = plan_rounds(problem, rounds=1, every=1).cuts[0, 0]
    needs = {
        cut: evaluate_cuts(problem, np.array([first, cut])).joules[1]
        for cut in problem.traffic
    }
    battery = 1.5 * min(needs.values())  # for one of four rounds, at any cut
    devices = other, replace(phone, battery_joules=battery)
    plan = plan_rounds(problem._replace(devices=devices), rounds=4, every=4)
    assert plan.cuts[0, 1] == min(needs, key=needs.get)
    assert plan.last_round.tolist() == [4, 1]


def test_the_battery_of_a_single_client_counts(fleet):
    """Its cut is within each limit that it can meet, in an algorithm of one cut too."""
    problem = problem_for(fleet("1e9"))
    alone = problem._replace(
        devices=problem.devices[1:], steps=problem.steps[1:], one_cut=True
    )
    choices = [evaluate_cuts(alone, np.array([cut])) for cut in alone.traffic]
    fastest = min(choices, key=lambda one: one.time.seconds)
    least = min(choices, key=lambda one: one.joules[0])
    battery = 1.01 * 3 * least.joules[0]
    assert 3 * fastest.joules[0] > battery
    device = replace(alone.devices[0], battery_joules=battery)
    plan = plan_rounds(alone._replace(devices=(device,)), rounds=3, every=1)
    assert plan.last_round.tolist() == [3]
    assert plan.cuts.tolist() == [least.cuts.tolist()] * 3


def test_a_plan_counts_the_averages_of_every_round(fleet):
    """With period 3, rounds 3 and 6 alone average the clients' layers."""
    config = override(CONFIG, average="all_holders", period=3)
    problem = problem_of(planning(config, Resources(read_devices(fleet(1e9)))))
    assert len(problem.schedule.averages) == 1  # a plan of one round has an average
    plan = plan_rounds(problem, rounds=3, every=1)
    without = problem._replace(schedule=problem.schedule._replace(averages=()))
    used = 0.0
    for number, one in ((1, without), (2, without), (3, problem)):
        course = evaluate_cuts(one, plan.cuts[number - 1])
        assert plan.seconds[number - 1] == course.time.seconds
        used += course.joules[1]
    np.testing.assert_allclose(1e9 - plan.battery_joules[1], used, rtol=1e-3)
    in_steps = override(config, period=1000, period_unit="steps")
    problem = problem_of(planning(in_steps, Resources(read_devices(fleet(1e9)))))
    assert len(problem.schedule.averages) == 1


def test_an_empty_battery_ends_the_part_of_its_client(fleet):
    """What is spent is the sum over the rounds, and the others go on alone."""
    problem = problem_for(fleet("1e9"))
    first = plan_rounds(problem, rounds=1, every=1)
    draw = np.array([1e9 - first.battery_joules[1]])
    problem = problem_for(fleet(float(0.9 * draw[0])))
    plan = plan_rounds(problem, rounds=3, every=2)
    spent = 0.9 * draw[0] - plan.battery_joules[1]
    joules = [
        evaluate_cuts(problem, plan.cuts[(number - 1) // 2]).joules[1]
        for number in range(1, plan.last_round[1] + 1)
    ]
    assert plan.last_round.tolist()[0] == 3 and plan.last_round[1] < 3
    assert spent == pytest.approx(sum(joules))
    absent = plan_rounds(
        problem, rounds=3, every=2, present=lambda number: np.array([True, number > 3])
    )
    assert absent.battery_joules[1] == pytest.approx(0.9 * draw[0])
    assert absent.last_round.tolist() == [3, 3]


def test_clients_whose_batteries_are_short_leave_one_by_one(fleet):
    """Without the client that lacks most, the other has energy for its round."""
    problem = problem_for(fleet("1e9"))._replace(one_cut=True)  # whatever its battery
    _, phone = problem.devices
    slow = replace(phone, forward_flops_per_s=1e5, backward_flops_per_s=1e5)
    problem = problem._replace(devices=(slow, phone))
    once = {"rounds": 1, "every": 1}
    together = 1e9 - plan_rounds(problem, **once).battery_joules
    alone = plan_rounds(problem, **once, present=lambda _: np.array([False, True]))
    needs = 1e9 - alone.battery_joules[1]
    assert needs < 0.9 * together[1]  # it waits for the slow one
    short = (
        replace(slow, battery_joules=0.5 * together[0]),
        replace(phone, battery_joules=(needs + together[1]) / 2),
    )
    plan = plan_rounds(problem._replace(devices=short), **once)
    assert plan.last_round.tolist() == [0, 1]
    assert plan.seconds.tolist() == alone.seconds.tolist()


def test_clients_without_energy_keep_the_one_cut_of_all(fleet):
    config = override(CONFIG, rounds=6, strategy="splitfed_v2")
    found = plan_now(config, fleet("1e-3"), 3)
    assert found.clients.absences == ("1:1-6",) and found.clients.recuts
    for cuts in (found.clients.cuts, found.clients.recuts[0].split(":")[1].split(",")):
        assert len(set(cuts)) == 1
    assert runs.build(found).config == found


def test_a_round_without_anybody_names_the_absences(fleet):
    """A fleet without batteries is refused as well."""
    absent = override(CONFIG, rounds=6, absences=("0:2-3", "1:2-3"))
    with pytest.raises(UserError, match="^absences: .* no client is left in round 2"):
        plan_now(absent, fleet("1e9"), 3)
    with pytest.raises(UserError, match="^present: no client .* in round 1$"):
        plan_rounds(
            problem_for(fleet("1e9")), rounds=2, every=1, present=lambda _: np.zeros(2)
        )


def test_a_run_without_batteries_left_is_refused(fleet):
    problem = problem_for(fleet("1e-3"))
    only = problem._replace(devices=problem.devices[1:], steps=problem.steps[1:])
    with pytest.raises(UserError, match="^devices: no client is left in round 1"):
        plan_rounds(only, rounds=3, every=2)
    unknown = only.devices[0].__class__("a", 1e6, 1e6, 1e5, 1e5, battery_joules=9.0)
    with pytest.raises(UserError, match=r"client 0 \(a\) has no busy_watts"):
        plan_rounds(only._replace(devices=(unknown,)), rounds=3, every=2)


def test_the_configuration_keeps_the_schedule(fleet):
    """Recuts where the plan changes, and absences where a battery is empty."""
    config = override(CONFIG, rounds=6)
    found = plan_now(config, fleet("1e9"), 3).clients
    plan = plan_rounds(problem_for(fleet("1e9")), rounds=6, every=3)
    texts = [",".join(map(str, cuts)) for cuts in plan.cuts.tolist()]
    assert found.num_clients == 2 and ",".join(found.cuts) == texts[0]
    assert found.recuts == (f"4:{texts[1]}",) and found.absences == ()
    found = plan_now(config, fleet("1e-3"), 3).clients
    assert found.absences == ("1:1-6",)
    found = plan_now(override(config, absences=("0:1-3",)), fleet("1e9"), 6).clients
    assert found.absences == ("0:1-3",) and found.recuts == ()
    with pytest.raises(UserError, match="availability: is not allowed with replan_ev"):
        plan_now(config, fleet("1e9"), 3, Path("times.csv"))
    with pytest.raises(UserError, match="deadline: is not allowed with replan_every"):
        plan_now(override(config, deadline=4.0), fleet("1e9"), 3)
    plan_now(override(config, deadline=4.0), fleet("1e9"))


def test_the_same_command_plans_the_same_for_a_run_that_goes_on(fleet, tmp_path):
    """Though the configuration holds the schedule, and absences of empty batteries."""
    given = {"cuts": AUTO, "devices": fleet("1e-3")}
    config = plan_now(override(CONFIG, rounds=6), given["devices"], 3)
    assert config.clients.absences
    (tmp_path / "config.json").write_text(to_json(config))
    again = config_with_plan(given, stored=tmp_path)
    assert plan_now(again, given["devices"], 3) == config
    own = tmp_path / "own.json"  # named again, it keeps its absences
    own.write_text(to_json(override(CONFIG, absences=("0:1-3",))))
    again = config_with_plan(given | {"config": own}, stored=tmp_path)
    assert again.clients.absences == ("0:1-3",)


def test_a_configuration_with_a_plan_is_not_planned_again(fleet, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(plan_now(override(CONFIG, rounds=6), fleet("1e9"), 3)))
    given = {"cuts": AUTO, "devices": fleet("1e9"), "config": path}
    with pytest.raises(UserError, match="recuts: 4:.* is not allowed with --cuts auto"):
        config_with_plan(given, stored=None)


def test_clusters_are_refused_before_a_plan(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[[devices]]\ndevice = "raspberry-pi-4"\n[[devices]]\n'
        'device = "raspberry-pi-5"\ncount = 2\ncluster = "room"\n'
    )
    with pytest.raises(UserError, match="cluster room is not allowed in training"):
        plan_now(CONFIG, path, 3)


@pytest.mark.slow
def test_a_planned_run_goes_on_without_its_devices(fleet, tmp_path):
    path = fleet("1e9")
    words = ["train", "--network", "tiny", "--plugin", "tiny", "--batch-size", "8"]
    words += ["--max-train-samples", "60", "--max-test-samples", "20", "--rounds", "5"]
    words += ["--cuts", "auto", "--devices", str(path), "--replan-every", "3"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    path.unlink()
    stored = read_config(tmp_path / "run").clients
    assert stored.recuts and stored.num_clients == 2
    groups = runs.restore(tmp_path / "run").federation.groups
    last = {i: str(group.cut) for group in groups for i in group.ids}
    assert stored.recuts[-1].split(":")[1].split(",") == [last[0], last[1]]
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replan-every", "2"], "replan_every: has no effect; it is read with"),
        (
            ["--cuts", "auto", "--devices", "F", "--replan-every", "0"],
            "replan_every: 0 is not allowed; allowed is 1 or more",
        ),
        (
            ["--cuts", "auto", "--devices", "F", "--recuts", "2:1"],
            "recuts: is not allowed together with the devices of",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, message, fleet, capsys):
    words = [str(fleet("1")) if word == "F" else word for word in words]
    small = ["--network", "tiny", "--plugin", "tiny"]
    assert cli.main(["train", *small, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_devices_is_checked(fleet):
    path = fleet("-1")
    with pytest.raises(UserError, match="battery_joules: -1.0 is not allowed"):
        read_devices(path)
    path.write_text(FLEET.format(battery=1).replace("change_round = 4\n", ""))
    with pytest.raises(UserError, match="compute_change: has no effect without"):
        read_devices(path)
    path.write_text(FLEET.format(battery=1).replace("compute_change = 0.05\n", ""))
    with pytest.raises(UserError, match="change_round: has no effect without compute"):
        read_devices(path)
    path.write_text(FLEET.format(battery=1) + "battery_joules = 3\n")
    with pytest.raises(UserError, match="battery_joules: not allowed; a server does"):
        read_devices(path)
