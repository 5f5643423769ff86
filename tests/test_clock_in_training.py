"""`--devices`, `--availability` and `--deadline`: the clock of whole runs."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from tiny import TINY

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.config import override, preset
from hsee_jax.core import UserError
from hsee_jax.runs import read_history, start
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.equip import Given, equip
from hsee_jax.runs.equipment import equipment_values, stored_equipment
from hsee_jax.runs.folder import read_config
from hsee_jax.systems import Schedule, joules, read_devices, round_time, workload
from hsee_jax.systems.availability import Period

CONFIG = override(
    preset("demo"),
    **TINY,
    num_clients=4,
    cuts=("1", "2"),
    max_train_samples=80,
    max_test_samples=10,
    validation_share=0,
    batch_size=8,
    rounds=3,
    eval_every=3,
    strategy="sequential",
)
FLEET = """
[[devices]]
device = "raspberry-pi-4"
count = 2
compute_spread = 0.5
link_spread = 0.1

[[devices]]
device = "jetson-nano"

[[devices]]
device = "jetson-nano"
name = "slow"
forward_flops_per_s = 1e6
backward_flops_per_s = 1e6
"""
SLOW = 3  # takes about 12 s for a round, and the others less than half a second


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without devices."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    hs.train(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def timed(fleet, tmp_path_factory):
    """The same run with devices."""
    folder = tmp_path_factory.mktemp("timed") / "run"
    hs.train(CONFIG, folder, devices=fleet)
    return folder


@pytest.fixture(scope="module")
def experiment():
    """Without a clock."""
    return hs.build(CONFIG)


def with_rules(experiment, given, **changes):
    """The experiment with a clock, and other options, which its parts do not read."""
    config = override(CONFIG, **changes)
    cadence = experiment.cadence._replace(rounds=config.run.rounds)
    built = experiment._replace(config=config, cadence=cadence)
    return with_clock(built, equip(config, given, resume=None))


def learned(folder):
    """What the rounds of a run have learned, and who was missing."""
    return [(r.train, r.link, r.missed, r.test) for r in read_history(folder).records]


def clocks(folder):
    return [record.simulated for record in read_history(folder).records]


def test_devices_alone_change_nothing_but_the_clock(plain, timed):
    assert learned(plain) == learned(timed)
    assert not (plain / "devices.json").exists()
    assert set(clocks(plain)) == {None}
    history = read_history(timed)
    rounds = [record.simulated for record in history.records]
    assert rounds[0].begin_s == 0.0
    assert [one.begin_s for one in rounds[1:]] == [one.end_s for one in rounds[:-1]]
    totals = history.summary.simulated
    assert totals.seconds == rounds[-1].end_s
    assert totals.joules == pytest.approx(sum(one.joules for one in rounds))
    assert (totals.lost_bytes, totals.late_rounds) == (0, 0)
    assert history.records[0].scalars()["simulated/end_s"] == rounds[0].end_s
    assert "simulated/end_s" not in read_history(plain).records[0].scalars()


CASES = {
    "sequential": ({}, lambda number: Schedule(shared=True)),
    "epoch": ({"turn": "epoch"}, lambda number: Schedule(True, turn="epoch")),
    "joint": ({"boundary": "joint"}, lambda number: Schedule(True, "joint")),
    "shared gradients": (
        {"boundary": "joint", "turn": "together", "gradient_share": 0.5},
        lambda number: Schedule(True, "joint", turn="together"),
    ),
    # After 2 and 4 of the 3 steps of rounds 1 and 2, so within both of them.
    "averaging": (
        {
            "strategy": "averaging",
            "average": "all_holders",
            "period": 2,
            "period_unit": "steps",
        },
        lambda number: Schedule(False, averages=((2,), (1, 3), (2,))[number]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_round_is_that_of_its_participants(fleet, case):
    """Each round against `round_time`, called by hand with the plan's own draws."""
    changes, schedule_of = CASES[case]
    config = override(CONFIG, **changes, participation=0.7, dropout=0.2)
    experiment = hs.build(config)
    clock = with_clock(experiment, equip(config, Given(fleet), resume=None)).clock
    devices = read_devices(fleet).clients
    traffic = {one.cut: one for one in experiment.traffic}
    work = workload(
        experiment.costs(),
        traffic,
        [1, 2, 1, 2],
        devices,
        read_devices(fleet).server,
        batch_size=8,
        steps=3,  # 20 samples of each
        boundary=changes.get("boundary", "detached"),
        gradient_share=changes.get("gradient_share", 0.0),
    )
    taking_part = [experiment.plan(n).active.sum() for n in range(3)]
    assert min(taking_part) < 4
    for number in range(3):
        plan = experiment.plan(number)
        here = sorted(plan.ids[plan.active].tolist())
        turns = [
            [here.index(plan.ids[n]) for n in row if plan.active[n]]
            for row in plan.order
        ]
        time = round_time(work.take(here), schedule_of(number), order=turns)
        energy = joules(time, [devices[i] for i in here]).sum()
        assert clock[number].seconds == pytest.approx(time.seconds, rel=1e-12)
        assert clock[number].joules == pytest.approx(energy, rel=1e-12)


def test_the_server_is_the_device_of_a_centralized_run(fleet, tmp_path):
    config = override(CONFIG, strategy="centralized", num_clients=1, cuts=("3",))
    experiment = with_clock(hs.build(config), equip(config, Given(fleet), resume=None))
    layers = [cost.flops for cost in experiment.costs()]
    flops = sum(layers[:3]) + layers[-2] + layers[-1]
    seconds = 10 * 8 * 3 * flops / 3.4e12  # steps, batch, passes; of `gpu-server`
    assert experiment.clock[0].seconds == pytest.approx(seconds)


@pytest.fixture(scope="module")
def closed(fleet, tmp_path_factory):
    """A run in which the slow are late, and client 0 is away after the first second."""
    trace = tmp_path_factory.mktemp("trace") / "trace.csv"
    trace.write_text("client,from_s,to_s\n0,0,1\n0,3.5,100\n")
    folder = tmp_path_factory.mktemp("closed") / "run"
    config = override(CONFIG, deadline=2.0)
    hs.train(config, folder, devices=fleet, availability=trace)
    return folder


def test_a_momentum_of_averages_needs_clients_in_every_round(fleet, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("client,from_s,to_s\n0,0,1\n0,3.5,100\n")
    config = override(CONFIG, strategy="averaging", optimizer="qgm", period=2)
    hs.build(config)
    with pytest.raises(UserError, match="period: 2 rounds .* qgm and availability"):
        hs.train(config, tmp_path / "run", devices=fleet, availability=trace)
    assert not (tmp_path / "run").exists()


def test_absent_clients_are_those_of_absences(closed, timed, tmp_path):
    """The same run with the absences of rounds that the clock has found."""
    rounds = clocks(closed)
    assert [(one.begin_s, one.seconds) for one in rounds] == [(0, 2), (2, 2), (4, 2)]
    assert [one.late for one in rounds] == [(SLOW,)] * 3
    assert [one.away for one in rounds] == [(), (0,), ()]
    assert all(one.lost_bytes > 0 for one in rounds)
    summary = read_history(closed).summary
    assert summary.simulated.late_rounds == 3
    assert summary.missed_rounds == 4
    again = override(CONFIG, absences=(f"{SLOW}:1-3", "0:2-2"))
    hs.train(again, tmp_path / "run")
    assert learned(closed) == learned(tmp_path / "run")
    assert learned(closed) != learned(timed)


def test_each_rule_changes_the_run(experiment, fleet):
    """Availability alone, and a deadline alone."""
    always = with_rules(experiment, Given(fleet)).clock
    trace = (Period(SLOW, 1.0, 100.0),)
    some = with_rules(experiment, Given(fleet, trace)).clock
    assert some[0].away == (SLOW,) and some[0].seconds < 0.5 < always[0].seconds
    short = with_rules(experiment, Given(fleet), deadline=2.0)
    assert [one.late for one in short.clock] == [(SLOW,)] * 3
    assert SLOW not in short.plan(0).ids[short.plan(0).active]


def test_time_passes_until_somebody_is_available(experiment, fleet):
    """A round that has begun ends, even when the trace has ended."""
    given = Given(fleet, tuple(Period(i, 50.0 + i, 60.0) for i in range(4)))
    rounds = with_rules(experiment, given, rounds=1).clock
    assert rounds[0].begin_s == 50.0 and rounds[0].away == (1, 2, 3)
    last = r"availability: after second [67]\d\.\d+ none of the clients that round"
    with pytest.raises(UserError, match=last):
        with_rules(experiment, given, rounds=90)


def stop_after(steps):
    calls = iter(range(1000))
    return lambda: next(calls) >= steps


@pytest.mark.slow
def test_a_stop_in_the_middle_changes_nothing(closed, fleet, tmp_path):
    """Bit for bit, with the files gone; and the run's folder says the same."""
    gone = tmp_path / "gone.toml"
    gone.write_bytes(fleet.read_bytes())
    trace = tmp_path / "trace.csv"
    trace.write_text("client,from_s,to_s\n0,0,1\n0,3.5,100\n")
    config, folder = override(CONFIG, deadline=2.0), tmp_path / "run"
    given = {"devices": gone, "availability": trace}
    with pytest.raises(hs.Stopped):
        hs.train(config, folder, **given, stop=stop_after(4))  # in the second round
    assert len(read_history(folder).records) == 1
    gone.unlink()
    trace.unlink()
    hs.train(config, folder, resume=True)
    assert learned(folder) == learned(closed)
    assert clocks(folder) == clocks(closed)
    ours, theirs = stored_equipment(folder), stored_equipment(closed)
    assert (ours.fleet.clients[:3], ours.periods) == (
        theirs.fleet.clients[:3],
        theirs.periods,
    )
    reopened, _ = hs.runs.reopen(folder)
    assert reopened.clock == tuple(clocks(closed))
    assert reopened.plan(1).active.tolist() == [False, True, True, False]


def test_a_resumed_run_has_the_same_devices(closed, plain, fleet, tmp_path):
    """Or refuses in one line; the same file is allowed under another name."""
    config = override(CONFIG, deadline=2.0)
    same, other = tmp_path / "same.toml", tmp_path / "other.toml"
    same.write_text(FLEET)
    other.write_text(FLEET.replace("jetson-nano", "jetson-orin-nano"))
    found = equip(config, Given(same), resume=closed)
    assert found.sources == stored_equipment(closed).sources
    for folder, given, message in (
        (closed, Given(other), f"devices: {other} is not allowed with --resume; the"),
        (closed, Given(None, (Period(0, 0, 9),)), "availability: this is not allowed"),
        (plain, Given(same), "the run has none"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            equip(config, given, resume=folder)
    assert equip(CONFIG, Given(), resume=plain) is None
    # Where it is lost, the devices have to be given again.
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "metrics.jsonl").write_bytes((closed / "metrics.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"devices: missing; .*devices.json is lost"):
        equip(config, Given(), resume=lost)
    assert (
        equip(config, Given(same), resume=lost).fleet.clients[2].name == "jetson-nano"
    )


@pytest.mark.parametrize("last", ["devices.json", "config.json", "data.json"])
def test_a_run_killed_at_its_start_begins_with_its_devices(
    last, fleet, tmp_path, monkeypatch
):
    config, replace = override(CONFIG, rounds=1, eval_every=1), start.replace_file

    def killed(path, *content, **how):
        if path.name == last:
            raise KeyboardInterrupt
        replace(path, *content, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(start, "replace_file", killed)
        hs.train(config, tmp_path, devices=fleet)
    if (tmp_path / "config.json").exists():
        hs.train(config, tmp_path, resume=True)
    else:
        hs.train(config, tmp_path, devices=fleet)
    assert None not in clocks(tmp_path)


def test_a_damaged_file_is_one_line(closed, tmp_path):
    values = json.loads((closed / "devices.json").read_text())
    assert values["sources"]["devices"].startswith("fleet.toml ")
    for text in (
        "[",
        "{}",
        json.dumps(values | {"clients": ["x"]}),
        json.dumps(values | {"clients": [{"name": "x"}]}),
        json.dumps(values | {"sources": {"devices": ["fleet.toml"]}}),
    ):
        (tmp_path / "devices.json").write_text(text)
        with pytest.raises(UserError, match=r"devices\.json is damaged: "):
            stored_equipment(tmp_path)


def test_a_measured_device_is_kept(tmp_path):
    """With its spread, and without the FLOP/s that it does not have."""
    parts = ["a", "b", "c"]
    entry = {"name": "me", "link": "wifi", "count": 4, "compute_spread": 0.2}
    entry["measured"] = {
        "batch_size": 8,
        "parts": parts,
        "forward_s": [0.1, 0.2, 0.3],
        "backward_s": [0.1, 0.2, 0.3],
    }
    rows = ", ".join(
        f"{k} = {json.dumps(v)}" for k, v in entry.items() if k != "measured"
    )
    table = ", ".join(f"{k} = {json.dumps(v)}" for k, v in entry["measured"].items())
    path = tmp_path / "me.toml"
    path.write_text(f"devices = [{{{rows}, measured = {{{table}}}}}]\n")
    equipment = equip(CONFIG, Given(path), resume=None)
    (tmp_path / "devices.json").write_text(json.dumps(equipment_values(equipment)))
    found = stored_equipment(tmp_path)
    measured = [device.measured for device in equipment.fleet.clients]
    assert [device.measured for device in found.fleet.clients] == measured
    assert len(set(measured)) == 4  # the spread
    assert math.isnan(found.fleet.clients[0].forward_flops_per_s)
    assert equip(CONFIG, Given(path), resume=tmp_path) == found


def test_a_device_that_changes_by_nothing_is_read_again(tmp_path):
    """As a CSV gives a factor to every row, perhaps 1, and `devices.json` none."""
    path = tmp_path / "fleet.csv"
    path.write_text(
        "device,link,count,change_round,compute_change\nphone-a18-pro,wifi,4,2,1\n"
    )
    equipment = equip(CONFIG, Given(path), resume=None)
    (tmp_path / "devices.json").write_text(json.dumps(equipment_values(equipment)))
    assert stored_equipment(tmp_path) == equipment


def test_a_device_may_have_an_empty_name(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text('devices = [{device = "raspberry-pi-4", name = "", count = 4}]\n')
    equipment = equip(CONFIG, Given(path), resume=None)
    (tmp_path / "devices.json").write_text(json.dumps(equipment_values(equipment)))
    assert stored_equipment(tmp_path) == equipment
    assert {device.name for device in equipment.fleet.clients} == {""}


def test_a_run_with_the_devices_of_another_is_refused(closed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(closed, folder)
    values = json.loads((folder / "devices.json").read_text())
    text = json.dumps(values | {"clients": values["clients"][1:]})
    (folder / "devices.json").write_text(text)
    clients = len(values["clients"])
    refusal = rf"devices\.json has {clients - 1} devices for {clients} clients"
    with pytest.raises(UserError, match=refusal):
        hs.train(override(read_config(folder), rounds=9), folder, resume=True)
    assert cli.main(["eval", str(folder)]) == 2
    line = capsys.readouterr().err
    assert f"{clients - 1} devices for {clients}" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--deadline", "5"], "devices: missing; deadline has no effect without them"),
        (["--availability", "x.csv"], "devices: missing; availability has no effect"),
        (["--devices", "x.csv"], "devices: x.csv cannot be read"),
        (["--deadline", "0"], "deadline: 0.0 is not allowed; allowed is more than 0"),
        (["--num-clients", "5"], "has 4 devices for 5 clients; allowed is a device"),
        (["--deadline", "1e-6"], "deadline: 1e-06 is too short for all clients of rou"),
    ],
)
def test_what_does_not_fit_is_one_line(
    fleet, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    options = "--network tiny --plugin tiny --max-train-samples 80 --num-clients 4 "
    options += "--cuts 1 2"
    if len({"5", "1e-6"} & set(words)) and "missing" not in message:
        words = ["--devices", str(fleet), *words]
    assert cli.main(["train", "demo", *options.split(), *words, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_with_all_of_it(fleet, tmp_path, monkeypatch, capsys):
    """And the tracker's table has the figures of the clock."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.csv").write_text("client,from_s,to_s\n0,0,1\n")
    (tmp_path / "config.json").write_text(hs.config.to_json(CONFIG))
    words = ["--devices", str(fleet), "--availability", "trace.csv", "--deadline", "2"]
    more = ["--rounds", "2", "--track", "csv", "--out", "run"]
    assert cli.main(["train", "--config", "config.json", *words, *more]) == 0
    assert "simulated 4.0 s" in capsys.readouterr().err
    rounds = clocks(tmp_path / "run")
    assert [(one.away, one.late) for one in rounds] == [((), (3,)), ((0,), (3,))]
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"simulated/seconds", "simulated/end_s", "simulated/joules"} <= set(header)
    settings = read_history(tmp_path / "run").settings
    assert settings["deadline"] == 2.0
    assert np.char.startswith(settings["availability"], "trace.csv ")
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--deadline", "3", "--out", "run"]) == 2
    assert "deadline: 3.0 is not allowed with --resume" in capsys.readouterr().err
