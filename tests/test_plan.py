"""`hsee plan` and `hsee train --plan`, and the numbers that the planner starts from."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from hsee_jax import cli
from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.cli.plan import _sample_bytes
from hsee_jax.config import override, preset
from hsee_jax.core import UserError
from hsee_jax.report.gantt import draw_round
from hsee_jax.runs.build import build
from hsee_jax.runs.planning import Resources, planning, problem_of
from hsee_jax.systems import Schedule, Work, read_devices, round_time
from hsee_jax.systems.comparison import compare, other_choices
from hsee_jax.systems.outcome import evaluate_cuts
from hsee_jax.systems.planner import Limits, plan_cuts, possible_cuts
from hsee_jax.systems.problem import cut_costs, own_seconds
from hsee_jax.systems.quantities import totals

# For a batch of 8 the network `tiny` computes 1.4 MFLOP up to cut 1 and 6.3 up to cut 3
# in both passes, and sends 0.1 MB behind cut 1. So the slow take seconds for a step.
FLEET = """
[[devices]]
name = "slow"
count = 3
forward_flops_per_s = 1e6
up_bytes_per_s = 1e5
memory_bytes = 5e6
busy_watts = 4
sending_watts = 1
receiving_watts = 1
idle_watts = 0.1

[[devices]]
name = "fast"
count = 2
forward_flops_per_s = 1e7
up_bytes_per_s = 1e5
busy_watts = 8
sending_watts = 1
receiving_watts = 1
idle_watts = 0.1

[server]
name = "cloud"
forward_flops_per_s = 5e6
"""
SMALL = ["--network", "tiny", "--plugin", "tiny", "--batch-size", "8"]
SMALL += ["--max-train-samples", "60", "--max-test-samples", "20", "--rounds", "1"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def known(fleet):
    config = override(
        preset("demo"), **TINY, max_train_samples=60, batch_size=8, validation_share=0
    )
    return planning(config, Resources(read_devices(fleet)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["detached", "joint", "none"]))
def test_own_seconds_are_a_round_of_the_client_alone(seed, boundary):
    """The closed form against the course of the round, batch by batch."""
    draw = np.random.default_rng(seed)
    times = draw.exponential(1.0, 7) * (draw.random(7) < 0.8)
    served = 0.0 if boundary == "none" else times[3]
    work = Work(draw.integers(0, 6), *times[:3], served, *times[4:]).arrays()
    if boundary == "none":
        work = work._replace(up_s=np.zeros(1), down_s=np.zeros(1))
    averages = (int(work.steps[0]),) if draw.random() < 0.5 else ()
    schedule = Schedule(shared=False, boundary=boundary, averages=averages)
    course = round_time(work, schedule)
    if work.steps[0] > 0:
        assert own_seconds(work, schedule)[0] == pytest.approx(course.seconds)


def test_costs_are_those_of_the_round(known):
    """Bytes and energy of the solver's table against the course of the round."""
    for name in ("sequential", "averaging", "splitfed_v1", "fedavg"):
        problem = problem_of(known, name)
        cut = max(problem.traffic)
        cuts = np.full(5, cut)
        costs = cut_costs(problem, np.ones((5, 3), bool))
        plan = evaluate_cuts(problem, cuts)
        expected = totals(costs, cuts)
        assert plan.totals().bytes == pytest.approx(expected.bytes)
        waiting = costs.idle_watts.sum() * (plan.time.seconds - expected.seconds)
        assert plan.joules.sum() == pytest.approx(expected.joules + waiting)
        assert expected.seconds <= plan.time.seconds * (1 + 1e-9)


def test_in_lockstep_the_bound_is_the_round(known):
    """All clients wait for the slowest of each step, see `together`."""
    schedule = Schedule(shared=True, boundary="joint", turn="together")
    problem = problem_of(known, "sequential")._replace(schedule=schedule)
    plan = plan_cuts(problem)
    assert plan.bound_s == pytest.approx(plan.time.seconds)
    for row in other_choices(problem, "seconds", Limits()):
        assert plan.bound_s <= row.plan.time.seconds * (1 + 1e-6)


def test_algorithms_say_which_cuts_they_take(known):
    assert list(problem_of(known, "fedavg").traffic) == [3]
    assert problem_of(known, "splitfed_v2").one_cut
    assert not problem_of(known, "sequential").one_cut
    alone = problem_of(known, "centralized")
    assert [device.name for device in alone.devices] == ["cloud"]
    assert alone.steps.tolist() == [8]  # 60 samples in batches of 8
    assert problem_of(known).steps.tolist() == [2] * 5  # 12 samples each


def test_the_server_that_trains_alone_has_the_limit_of_the_server(known):
    problem = problem_of(known, "centralized")
    (needed,) = plan_cuts(problem).memory_bytes
    assert plan_cuts(problem).server_bytes == needed
    small = problem._replace(devices=(replace(problem.server, memory_bytes=1.0),))
    for one in (problem, small):  # the limit counts instead of its own memory
        assert plan_cuts(one, limits=Limits(1.0, server_bytes=needed)).cuts == [3]
        with pytest.raises(UserError, match="^max_server_memory: .*cloud.* too little"):
            plan_cuts(one, limits=Limits(server_bytes=needed // 2))
    with pytest.raises(UserError, match="^max_server_memory: 1 bytes of client 0"):
        plan_cuts(small)


def test_the_plan_is_no_worse_than_other_choices(known):
    problem = problem_of(known, "sequential")
    plan = plan_cuts(problem)
    assert plan.bound_s <= plan.time.seconds
    rows = {row.name: row.plan for row in other_choices(problem, "seconds", Limits())}
    assert len(rows) == 4
    for row in rows.values():
        assert plan.bound_s <= row.time.seconds * (1 + 1e-9)
    assert len(set(rows["equal cuts"].cuts.tolist())) == 1
    assert (rows["shallowest cuts"].cuts <= rows["deepest cuts"].cuts).all()
    joules = plan_cuts(problem, "joules").joules.sum()
    assert joules < plan.joules.sum()


def test_other_choices_are_allowed_ones(known):
    """With a least cut; and the random row is the median of 21 draws."""
    problem, limits = problem_of(known, "sequential"), Limits(min_cut=2)
    rows = {row.name: row.plan for row in other_choices(problem, "seconds", limits)}
    assert rows["shallowest cuts"].cuts.tolist() == [2] * 5
    assert rows["deepest cuts"].cuts.tolist() == [3] * 5
    assert min(rows["equal cuts"].cuts) >= 2
    rng, allowed = np.random.default_rng(0), possible_cuts(problem, limits)
    draws = [
        [rng.choice(np.flatnonzero(row)) + 1 for row in allowed] for _ in range(21)
    ]
    seconds = [evaluate_cuts(problem, np.array(d)).time.seconds for d in draws]
    random = rows["random cuts (median)"]
    assert random.time.seconds == np.median(seconds)
    assert set(random.cuts.tolist()) <= {2, 3}


def test_where_cuts_may_not_differ_the_others_are_equal_cuts(known):
    problem = problem_of(known, "splitfed_v2")
    rows = other_choices(problem, "seconds", Limits())
    assert [row.name for row in rows] == ["equal cuts"]


def test_samples_of_float32_are_four_times_as_long(known):
    size = np.prod(known.info.input_shape)
    assert _sample_bytes(known) == size
    floats = known.info._replace(dtype="float32")
    assert _sample_bytes(known._replace(info=floats)) == 4 * size


def test_each_limit_changes_the_plan(known):
    problem = problem_of(known, "averaging")
    free = plan_cuts(problem).totals()
    assert plan_cuts(problem, limits=Limits(min_cut=3)).cuts.tolist() == [3] * 5
    cheap = plan_cuts(problem, "joules").totals()
    middle = (free.joules + cheap.joules) / 2
    kept = plan_cuts(problem, limits=Limits(joules=middle)).totals()
    assert kept.joules <= middle
    assert kept.seconds >= free.seconds
    quick = plan_cuts(problem, "bytes", Limits(seconds=free.seconds * 1.1)).totals()
    least = plan_cuts(problem, "bytes").totals()
    assert least.bytes < quick.bytes
    assert quick.seconds <= free.seconds * 1.1 < least.seconds
    few = plan_cuts(problem, limits=Limits(bytes=quick.bytes * 0.9)).totals()
    assert few.bytes <= quick.bytes * 0.9
    assert few.seconds > quick.seconds
    small = plan_cuts(problem, limits=Limits(server_bytes=free.server_bytes * 0.9))
    assert small.server_bytes <= free.server_bytes * 0.9
    workers = plan_cuts(problem._replace(workers=5)).totals()
    assert workers.seconds <= free.seconds
    shared = plan_cuts(problem._replace(uplink_bytes_per_s=2e3)).totals()
    assert shared.seconds > free.seconds


def test_a_small_memory_and_a_shared_servers_memory(known):
    problem = problem_of(known, "sequential")
    tight = Limits(
        memory_bytes=float(evaluate_cuts(problem, np.ones(5, int)).memory_bytes[0])
    )
    assert plan_cuts(problem, limits=tight).cuts.tolist() == [1] * 5
    deep = evaluate_cuts(problem, np.full(5, 2)).server_bytes
    small = plan_cuts(problem, limits=Limits(server_bytes=deep))
    assert small.cuts.min() >= 2
    with pytest.raises(
        UserError, match="max_server_memory: 1 is not possible; allowed"
    ):
        plan_cuts(problem, limits=Limits(server_bytes=1.0))
    with pytest.raises(UserError, match=r"max_memory: 9 bytes of client 0 \(slow\)"):
        plan_cuts(problem, limits=Limits(memory_bytes=9.0))


def test_a_limit_below_what_queues_allow_is_refused(known):
    """The bound keeps to it, and the round does not; the nearest plan is possible."""
    problem = problem_of(known, "sequential")
    plan = plan_cuts(problem)
    between = (plan.bound_s + plan.time.seconds) / 2
    assert plan.bound_s < between < plan.time.seconds
    with pytest.raises(UserError, match="max_seconds: .* queues included") as refusal:
        plan_cuts(problem, limits=Limits(seconds=between))
    nearest = float(str(refusal.value).rpartition(" ")[2])
    kept = plan_cuts(problem, limits=Limits(seconds=nearest))
    assert kept.time.seconds <= nearest
    with pytest.raises(UserError, match=r"allowed is \S+ or more") as refusal:
        plan_cuts(problem, limits=Limits(seconds=plan.bound_s / 2))
    assert str(refusal.value).split()[-3] == str(nearest)


def test_energy_needs_watts(known):
    problem = problem_of(known)
    dark = tuple(d.__class__(d.name, 1e6, 1e6, 1e6, 1e6) for d in problem.devices)
    blind = problem._replace(devices=dark)
    with pytest.raises(UserError, match=r"client 0 \(slow\) has no busy_watts"):
        plan_cuts(blind, "joules")
    assert np.isnan(plan_cuts(blind).joules).all()


def test_a_comparison_keeps_reasons(known):
    reason = UserError("link: int8 is not allowed")
    rows = compare({"a": reason, "b": problem_of(known)}, "seconds", Limits())
    assert rows[0] == ("a", None, "link: int8 is not allowed")
    assert rows[1].plan.time.seconds > 0


@pytest.fixture
def own_algorithms(monkeypatch):
    """Hide the algorithms that other tests have registered."""
    own = {e.name: e for e in ALGORITHMS.values() if "hsee_jax" in e.make.__module__}
    monkeypatch.setattr(ALGORITHMS, "_entries", own)


@pytest.fixture
def runs(monkeypatch):
    """The clients of the runs that would be trained."""
    seen = []

    def train(config, folder, **rest):
        seen.append(config.clients)
        raise UserError("enough")

    monkeypatch.setattr("hsee_jax.cli.train.train_run", train)
    return seen


def plan(fleet, out, *words):
    flags = ["--devices", str(fleet), "--out", str(out), *words]
    return cli.main(["plan", "demo", *SMALL, "--strategy", "sequential", *flags])


def check_row(shown, fleet, name, limits):
    """The numbers of a strategy in the comparison are those of its own plan."""
    (row,) = [
        line for line in shown.splitlines() if f" {name} " in line and "│" in line
    ]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    sizes = {"max_train_samples": 60, "max_test_samples": 20, "batch_size": 8}
    config = override(preset("demo"), **TINY, **sizes, rounds=1)
    problem = problem_of(planning(config, Resources(read_devices(fleet))), name)
    own = plan_cuts(problem, limits=limits)
    numbers = [own.time.seconds, own.joules.sum()]
    numbers += [side.sum() / 1e6 for side in (own.time.up_bytes, own.time.down_bytes)]
    assert min(numbers) > 0.1
    assert cells[:2] == [name, str(own.cuts[0])]
    for cell, number, half in zip(
        cells[2:6], numbers, (0.05, 0.5, 0.05, 0.05), strict=True
    ):
        assert float(cell) == pytest.approx(number, abs=1.01 * half)


@pytest.mark.usefixtures("own_algorithms")
def test_plan_writes_and_train_reads(fleet, tmp_path, capsys, runs):
    """The table, the JSON and the picture; then a run with the cuts of the plan."""
    out = tmp_path / "plan"
    assert plan(fleet, out, "--min-cut", "layer2", "--compare") == 0
    shown = capsys.readouterr().out
    written = json.loads((out / "plan.json").read_text())
    names = ["slow"] * 3 + ["fast"] * 2
    assert [client["device"] for client in written["clients"]] == names
    assert {client["binds"] for client in written["clients"]} <= {
        "compute",
        "link",
        "server",
        "waiting",
    }
    assert written["joules"] == pytest.approx(
        sum(client["joules"] for client in written["clients"])
    )
    cuts = [client["cut"] for client in written["clients"]]
    assert min(cuts) >= 2
    assert f"{written['seconds']:,.1f} s" in shown
    for name in ("fedavg", "splitfed_v1", "centralized", "equal cuts", "what binds"):
        assert name in shown
    check_row(shown, fleet, "splitfed_v1", Limits(min_cut=2))
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")

    flags = ["--plan", str(out / "plan.json"), "--devices", str(fleet)]
    flags += ["--out", str(tmp_path / "run")]
    assert cli.main(["train", *SMALL, *flags]) == 2
    assert runs[0].cuts == tuple(map(str, cuts))
    assert runs[0].num_clients == 5

    written["layers"][0] = "another"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(written))
    for words, message in (
        (["--plan", str(out / "plan.json"), "--cuts", "1"], "cuts: is not allowed"),
        (["--plan", str(out / "plan.json"), "--num-clients", "5"], "num_clients: is"),
        (["--plan", str(other)], "plan: .* is for a network of the layers another, "),
        (["--plan", str(fleet)], "plan: .* is not a plan; allowed"),
        (["--plan", str(tmp_path / "no.json")], "plan: .* cannot be read"),
        (["--cuts", "auto"], "devices: missing; --cuts auto needs"),
    ):
        capsys.readouterr()
        assert cli.main(["train", *SMALL, *words, "--out", str(tmp_path / "x")]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert re.search(message, line), line


def test_flags_reach_the_planner(fleet, tmp_path, monkeypatch, capsys):
    seen = []

    def plan_cuts(problem, minimize, limits):
        seen.extend([problem, minimize, limits])
        raise UserError("enough")

    monkeypatch.setattr("hsee_jax.cli.plan.plan_cuts", plan_cuts)
    limits = "--max-memory 1e6 --max-seconds 2 --max-joules 3 --max-bytes 4".split()
    rest = "--max-server-memory 5 --min-cut layer2 --minimize energy".split()
    server = "--strategy averaging --server-workers 6 --bandwidth 7e3".split()
    assert plan(fleet, tmp_path, *limits, *rest, *server) == 2
    problem, minimize, found = seen
    assert minimize == "joules"
    assert found == Limits(1e6, 2, seconds=2.0, joules=3.0, bytes=4.0, server_bytes=5.0)
    assert (problem.workers, problem.uplink_bytes_per_s) == (6, 7e3)
    assert [device.name for device in problem.devices] == ["slow"] * 3 + ["fast"] * 2


def test_the_picture_has_a_row_for_each_kind(known, monkeypatch):
    """The client of a kind that is ready last, and the server; no name is cut off."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    problem = problem_of(known, "sequential")
    answer = evaluate_cuts(problem, np.array([1, 1, 2, 3, 3]))
    draw_round(problem, answer)
    (panel,) = figures[0].axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == [
        "slow, cut 1 (2)",
        "slow, cut 2 (1)",
        "fast, cut 3 (2)",
        "server 1",
    ]
    kinds = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert kinds == ["forward", "backward", "upload", "server"]
    assert panel.get_xlim()[1] == pytest.approx(1.01 * answer.time.seconds)


def test_cuts_auto_are_those_of_the_plan(fleet, tmp_path, runs):
    assert plan(fleet, tmp_path / "plan") == 0
    flags = ["--strategy", "sequential", "--out", str(tmp_path / "run")]
    words = [*SMALL, *flags, "--cuts", "auto", "--devices", str(fleet)]
    assert cli.main(["train", *words]) == 2
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    cuts = tuple(str(client["cut"]) for client in written["clients"])
    assert (runs[0].cuts, runs[0].num_clients) == (cuts, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-seconds", "1e-9"], "max_seconds: 1e-09 is not possible; allowed is "),
        (["--max-joules", "0"], "max_joules: 0.0 is not allowed; allowed is more than"),
        (["--max-joules", "1e-6"], "max_joules: 1e-06 is not possible; allowed is "),
        (
            ["--max-memory", "10"],
            "max_memory: 10 bytes of client 0 (slow) is too little",
        ),
        (["--min-cut", "layer9"], "min_cut: layer9 is not a layer"),
        (["--minimize", "tiem"], "minimize: tiem is unknown (did you mean time?)"),
        (["--cuts", "1"], "cuts: is not allowed; the plan says it"),
        (["--server-workers", "0"], "server_workers: 0 is not allowed; allowed is 1"),
        (
            ["--server-workers", "2", "--strategy", "sequential"],
            "server_workers: 2 has no effect with sequential",
        ),
        (
            ["--max-memory", "1e9", "--strategy", "centralized"],
            "max_memory: has no effect with centralized, which trains on the server",
        ),
        (["--bandwidth", "-1"], "bandwidth: -1.0 is not allowed; allowed is more"),
        (["--bandwidth", "1e-300"], "with which it takes less than 1e+15"),
        (["--recuts", "2:1"], "recuts: is not allowed; a plan is for the cuts of one"),
        (["--absences", "0:1-2"], "absences: is not allowed; a plan is for a round of"),
        (["--participation", "0.5"], "participation: is not allowed; a plan is for a"),
        (["--dropout", "0.1"], "dropout: is not allowed; a plan is for a round of all"),
        (["--deadline", "4"], "deadline: is not allowed; a plan is for a round of all"),
        (["--micro-batches", "3"], "micro_batches: 3 is not allowed; allowed are"),
    ],
)
def test_refusals_are_one_line(fleet, tmp_path, capsys, words, message):
    assert plan(fleet, tmp_path / "plan", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("rate", ["1e-320", "1e-300"])
def test_rates_with_which_no_round_ends_are_one_line(rate, tmp_path, capsys):
    path = tmp_path / "slow.toml"
    entry = f'name = "a"\ncount = 2\nlink = "ethernet"\nforward_flops_per_s = {rate}'
    path.write_text(f"[[devices]]\n{entry}\n")
    assert plan(path, tmp_path / "plan") == 2
    error = capsys.readouterr().err
    assert "devices: a round of client 0 (a) takes " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plan").exists()


def test_devices_are_needed(tmp_path, capsys):
    assert cli.main(["plan", *SMALL, "--out", str(tmp_path)]) == 2
    assert (
        "devices: missing; allowed is a file of TOML or CSV" in capsys.readouterr().err
    )


def test_the_partition_needs_data_only_for_labels(fleet):
    """CIFAR-10 is not there; equal shares are known without it."""
    config = override(
        preset("cifar10"), **TINY, data_dir=str(fleet.parent), batch_size=1000
    )
    resources = Resources(read_devices(fleet))
    assert planning(config, resources).samples.tolist() == [10_000] * 5
    with pytest.raises(UserError, match="cifar10"):
        planning(override(config, partition="dirichlet"), resources)


@pytest.mark.parametrize("dealt", ["quantity", "dirichlet"])
def test_the_samples_of_a_plan_are_those_of_the_run(dealt, fleet):
    """They are so without labels, too, where the sizes of shares ignore them."""
    config = override(
        preset("demo"), **TINY, partition=dealt, validation_share=0.2, num_clients=5
    )
    config = override(config, max_train_samples=90, labelled_share=0.5, cuts=("1",))
    found = planning(config, Resources(read_devices(fleet))).samples
    assert found.tolist() == [share.samples for share in build(config).manifest]
