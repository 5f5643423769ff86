"""Predicted accuracies: models against closed forms, and the plans that use them."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from hsee_jax import cli
from hsee_jax.cli.expectations import read_experience
from hsee_jax.config import Config, override, preset, to_json
from hsee_jax.config import values as config_values
from hsee_jax.core import UserError
from hsee_jax.data.partition import Share
from hsee_jax.engine.evaluation import ClientResult
from hsee_jax.report.accuracy import leave_one_out_table
from hsee_jax.runs.accuracy import FinishedRun, expect, learn, read_finished
from hsee_jax.runs.planning import Resources, planning, problem_of
from hsee_jax.runs.records import LinkSummary, Scores, Summary
from hsee_jax.studies import Result, append_result
from hsee_jax.systems import Fleet, LayerCost, find_device
from hsee_jax.systems.accuracy import (
    MODELS,
    Trained,
    fit_accuracy,
    kendall_tau,
    leave_one_out,
)
from hsee_jax.systems.choice import accurate_cuts
from hsee_jax.systems.cut_features import layer_features, make_inputs
from hsee_jax.systems.layer_graph import fit_graph
from hsee_jax.systems.planner import Limits, plan_cuts, possible_cuts
from hsee_jax.systems.problem import cut_costs
from hsee_jax.systems.quantities import totals
from hsee_jax.systems.ridge import left_out_error, solve_ridge

SEEDS = st.integers(0, 2**32 - 1)
FLOPS, SIZES = (5, 9, 9, 9, 8, 8), (8, 8, 8, 4, 4, 2)
COSTS = (
    tuple(
        LayerCost(str(i), 1, flops, size)
        for i, (flops, size) in enumerate(zip(FLOPS, SIZES, strict=True))
    )
    + (LayerCost("head", 1, 1, 1),) * 7
)
SMALL = override(
    preset("demo"),
    **TINY,
    strategy="sequential",
    max_train_samples=60,
    batch_size=8,
    validation_share=0,
    num_clients=4,
)


@pytest.fixture(autouse=True)
def promotion():
    """Let optax's Adam raise a float to an int."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_ridge_is_least_squares_on_more_rows(seed):
    """Rows of sqrt(penalty) pull each weight, but not the intercept, to 0."""
    rng = np.random.default_rng(seed)
    rows, values = rng.normal(size=(7, 4)), rng.normal(size=7)
    penalty = float(rng.exponential()) + 0.01
    weights, intercept = solve_ridge(rows, values, penalty)
    pulls = np.hstack([np.sqrt(penalty) * np.eye(4), np.zeros((4, 1))])
    system = np.vstack([np.hstack([rows, np.ones((7, 1))]), pulls])
    expected = np.linalg.lstsq(system, np.append(values, np.zeros(4)))[0]
    np.testing.assert_allclose([*weights, intercept], expected, atol=1e-9)


def test_the_closed_form_of_leave_one_out_equals_fits_without_a_row():
    rng = np.random.default_rng(0)
    rows, values = rng.normal(size=(9, 4)), rng.normal(size=9)
    errors = []
    for i in range(9):
        kept = np.arange(9) != i
        weights, intercept = solve_ridge(rows[kept], values[kept], 0.3)
        errors.append((rows[i] @ weights + intercept - values[i]) ** 2)
    assert left_out_error(rows, values, 0.3) == pytest.approx(np.mean(errors))


def test_features_by_hand():
    """Cuts 1, 1, 2 and 3 of three layers."""
    costs = tuple(LayerCost("", 0, f, b) for f, b in ((1, 8), (3, 8), (4, 2)))
    found = layer_features(costs + costs[:4], np.array([1, 1, 2, 3]))
    np.testing.assert_allclose(
        found,
        [[1.0, 0.5, 1 / 8, 1.0], [0.5, 0.25, 3 / 8, 1.0], [0.25, 0.25, 4 / 8, 0.25]],
    )


def draw(seed, count=40):
    """An accuracy that is additive over the layers, with as much noise as signal."""
    rng = np.random.default_rng(seed)
    worth = rng.normal(0.02, 0.05, len(FLOPS))
    cuts = [rng.integers(1, len(FLOPS) + 1, 6) for _ in range(count)]
    inputs = make_inputs(COSTS, cuts, [()] * count)
    truth = 0.4 + inputs.layers[:, :, 0] @ worth
    noisy = truth + truth.std() * rng.normal(size=count)
    return inputs, truth, noisy


@pytest.mark.parametrize("seed", range(2))
def test_predictions_rank_runs_better_than_noisy_runs_do(seed):
    """Each run is left out of the fit that predicts it."""
    inputs, truth, noisy = draw(seed)
    errors, taus = {}, {}
    for name, fit in MODELS.items():
        found = leave_one_out(fit, inputs, noisy, np.arange(len(noisy)))
        errors[name] = np.abs(found - noisy).mean()
        taus[name] = kendall_tau(found, truth)
    winner = min(errors, key=errors.get)
    assert taus[winner] > kendall_tau(noisy, truth)
    # Both know more of the truth than a mean, which ranks nothing.
    assert min(taus.values()) > 0.3


def test_the_graph_is_fitted_to_the_rows_of_its_mask():
    inputs, truth, _ = draw(0, count=12)
    kept = np.arange(12) != 3
    first = fit_graph(inputs, truth, kept)(inputs)
    other = np.where(kept, truth, 99.0)
    np.testing.assert_array_equal(fit_graph(inputs, other, kept)(inputs), first)
    assert np.abs(first - truth)[kept].mean() < truth.std() / 3


@pytest.fixture
def ridge_alone(monkeypatch):
    """Spare the tests that do not need it the compilation of the graph network."""
    monkeypatch.delitem(MODELS, "graph")


@pytest.mark.usefixtures("ridge_alone")
def test_settings_shift_a_prediction():
    """Runs under two settings that differ by 0.2, whatever the cuts."""
    trained = [
        Trained((cut, cut), (0.05 * cut + 0.2 * on,) * 2, 0.5 + 0.2 * on, (on, 1 - on))
        for cut in (1, 2, 4, 5, 6)
        for on in (0.0, 1.0)
    ]
    predictor = fit_accuracy(COSTS, trained)
    exits = predictor.exits((1.0, 0.0))
    np.testing.assert_allclose(exits - predictor.exits((0.0, 1.0)), 0.2, atol=0.05)
    assert exits[2] == pytest.approx(0.35, abs=0.05)  # cut 3 is in no run
    means = predictor.means(np.array([2, 2]), (0.0, 1.0))
    np.testing.assert_allclose(means, (0.1, 0.5), atol=0.05)
    assert predictor.exit.scores["mean"].mean_error > 0.1


def test_runs_of_several_seeds_count_as_one():
    """So that no run predicts its twin: six runs of three mixes are too few."""
    trained = [
        Trained((cut, 1), (0.1 * cut + noise, 0.1), 0.5 + noise)
        for cut in (1, 2, 3)
        for noise in (0.0, 0.02)
    ]
    with pytest.raises(UserError, match=r"6 run\(s\) with 3 different mixes .* 4 or"):
        fit_accuracy(COSTS, trained)
    alike = [Trained((2,), (0.1,), 0.5, (float(i),)) for i in range(5)]
    with pytest.raises(UserError, match="and 1 of cuts alone, are too few"):
        fit_accuracy(COSTS, alike)


@pytest.mark.usefixtures("ridge_alone")
def test_twins_do_not_predict_each_other():
    """Two settings give the same exits; a mean of the others never sees the twin."""
    trained = [
        Trained((cut,), (value,), value + 0.1 * on, (on,))
        for cut, value in ((1, 0.0), (2, 0.3), (3, 0.6))
        for on in (0.0, 1.0)
    ]
    predictor = fit_accuracy(COSTS, trained)
    # The means of the others are 0.45, 0.3 and 0.15.
    assert predictor.mean_exit.scores["mean"].mean_error == pytest.approx(0.3)
    assert predictor.mixes == 6


@pytest.fixture(scope="module")
def known():
    """Four clients of the network `tiny`, two of them slow."""
    slow, fast = find_device("raspberry-pi-4", "lte"), find_device("jetson-nano")
    return planning(SMALL, Resources(Fleet((slow, slow, fast, fast), fast)))


@pytest.fixture(scope="module")
def problems(known):
    """Under a shared server and under replicas, and the costs of every choice."""
    found = []
    for name in ("sequential", "averaging"):
        problem = problem_of(known, name)
        costs = cut_costs(problem, np.ones((4, 3), bool))
        choices = itertools.product((1, 2, 3), repeat=4)
        seconds = {cuts: totals(costs, np.array(cuts)).seconds for cuts in choices}
        found.append((problem, seconds))
    return found


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0, 1))
def test_a_plan_with_accurate_exits_equals_brute_force(problems, accuracy, least):
    accuracy = np.array(accuracy)
    for problem, seconds in problems:
        within = [
            value
            for cuts, value in seconds.items()
            if all(accuracy[cut - 1] >= least for cut in cuts)
        ]
        problem = problem._replace(exit_accuracy=accuracy)
        limits = Limits(exit_accuracy=least)
        if not within:
            with pytest.raises(UserError, match="min_exit_accuracy: .* allowed is"):
                plan_cuts(problem, limits=limits)
            continue
        plan = plan_cuts(problem, limits=limits)
        assert plan.bound_s == pytest.approx(min(within))
        assert accuracy[plan.cuts - 1].min() >= least


def test_an_accuracy_that_no_exit_reaches_names_the_nearest(problems):
    """Client 1 has no memory for cut 3; one cut for all must fit everyone."""
    allowed = np.array([[True, True, True], [True, True, False]])
    accuracy = np.array([0.3, 0.51239, 0.7])
    for one_cut in (False, True):
        with pytest.raises(UserError) as refusal:
            accurate_cuts(allowed, accuracy, 0.6, one_cut=one_cut)
        client = 0 if one_cut else 1
        assert str(refusal.value) == (
            f"min_exit_accuracy: 0.6 is not possible for client {client}, by the "
            "predicted accuracies; allowed is 0.5123 or less"
        )
    kept = accurate_cuts(allowed, accuracy, 0.5123)
    assert kept.tolist() == [[False, True, True], [False, True, False]]
    equal = accurate_cuts(allowed, accuracy, 0.5123, one_cut=True)
    assert equal.tolist() == [[False, True, False]] * 2
    with pytest.raises(UserError, match="needs predictions"):
        possible_cuts(problems[0][0], Limits(exit_accuracy=0.5))


def scores(cuts, gain=0.0):
    """Exits that are the better the deeper, and servers that are no worse."""
    exits = [0.2 + 0.2 * cut + gain for cut in cuts]
    clients = [
        ClientResult(i, cut, exits[i], 0.9 + gain, 1.0, 1.0)
        for i, cut in enumerate(cuts)
    ]
    return Scores(float(np.mean(exits)), 0.9 + gain, tuple(clients))


MIXES = ((1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3), (1, 2, 3, 3), (1, 1, 2, 2))


def finished(cuts, gain=0.0, **changes):
    config = override(SMALL, cuts=tuple(map(str, cuts)), **changes)
    options = config_values.settings(config)
    return FinishedRun(f"run {cuts}", options, scores(cuts, gain))


@pytest.mark.usefixtures("ridge_alone")
def test_options_that_differ_become_settings(known):
    """Averaging is 0.05 better here; the plan has more rounds than any run."""
    runs = [finished(cuts) for cuts in MIXES]
    runs += [finished(cuts, gain=0.05, strategy="averaging") for cuts in MIXES]
    experience = learn(SMALL, known.costs, runs)
    plans = {
        name: expect(experience, override(SMALL, strategy=name, rounds=99))
        for name in ("sequential", "averaging")
    }
    gains = [one.predictor.exits(one.settings) for one in plans.values()]
    np.testing.assert_allclose(gains[1] - gains[0], 0.05, atol=0.02)
    assert plans["averaging"].differences == (
        f"rounds 99 instead of {SMALL.run.rounds}",
    )
    with pytest.raises(UserError, match="no run has the strategy local of the plan"):
        expect(experience, override(SMALL, strategy="local"))
    with pytest.raises(UserError, match="no run has the network resnet18 of the plan"):
        other = override(Config(), dataset=SMALL.data.dataset)
        learn(other, known.costs, runs)


@pytest.mark.usefixtures("ridge_alone")
def test_options_that_an_older_run_lacks_have_their_defaults(known):
    """Two runs are from before `optimizer` and `features`, an option of the network."""
    newer = ("optimizer", "features")
    runs = [finished(cuts) for cuts in MIXES]
    for i in (0, 3):
        options = {k: v for k, v in runs[i].options.items() if k not in newer}
        assert len(options) == len(runs[i].options) - 2
        runs[i] = runs[i]._replace(options=options)
    experience = learn(SMALL, known.costs, runs)
    assert experience.columns == ()
    plan = override(SMALL, optimizer="qgm")
    assert expect(experience, SMALL).differences == ()
    assert expect(experience, plan).differences == ("optimizer qgm instead of sgd",)


@pytest.mark.usefixtures("ridge_alone")
def test_the_table_names_cuts_of_no_run(known):
    runs = [finished(cuts) for cuts in MIXES if 3 not in cuts]
    runs += [finished(cuts, strategy="averaging") for cuts in MIXES if 3 not in cuts]
    expected = expect(learn(SMALL, known.costs, runs), SMALL)
    assert expected.predictor.tried == (1, 2)
    table = leave_one_out_table(expected, np.array([1, 3, 3, 2]))
    assert table.title.endswith("\nno run has a client of cut 3")
    assert "graph error" not in table.header
    assert "no run" not in leave_one_out_table(expected, np.array([1, 2])).title


def test_runs_of_unlike_networks_or_data_are_refused(known):
    for changes, text in (
        ({"features": 5}, r"features is 5 in run \(1, 1, 2, 2\) and 4 in run \(1, 1"),
        ({"dataset": "mnist"}, "dataset is mnist in run .* fashion_mnist_small in"),
    ):
        runs = [finished(cuts) for cuts in MIXES[:4]]
        with pytest.raises(UserError, match=text) as refusal:
            learn(SMALL, known.costs, [*runs, finished(MIXES[4], **changes)])
        assert str(refusal.value).endswith(
            "allowed are runs of one network and one dataset"
        )
        assert "\n" not in str(refusal.value)


def write_finished(folder, cuts, *, ended=True):
    """Write the folder of a run with its last scores."""
    folder.mkdir(parents=True)
    config = override(SMALL, cuts=tuple(map(str, cuts)), num_clients=len(cuts))
    (folder / "config.json").write_text(to_json(config))
    shares = [Share(i, cut, 1, [1], [i])._asdict() for i, cut in enumerate(cuts)]
    (folder / "partition.json").write_text(json.dumps(shares))
    (folder / "metrics.jsonl").write_text("")
    if ended:
        summary = Summary(
            1, scores(cuts), 1.0, 1.0, 0, 0, "", {}, LinkSummary(0, 0, [])
        )
        (folder / "summary.json").write_text(json.dumps(summary.to_json()))
    return folder


def test_run_folders_are_read(tmp_path):
    folder = write_finished(tmp_path / "run", (1, 2, 3))
    run = read_finished(folder)
    assert run.scores == scores((1, 2, 3))
    assert run.options["strategy"] == "sequential"
    with pytest.raises(UserError, match="open is not finished; allowed are finished"):
        read_finished(write_finished(tmp_path / "open", (1, 2), ended=False))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A file of devices, folders of runs, and a study with the same runs."""
    place = tmp_path_factory.mktemp("places")
    (place / "fleet.csv").write_text(
        "name,forward_flops_per_s,up_bytes_per_s,count\nslow,1e6,1e7,2\nfast,1e8,1e5,2\n"
    )
    for number, cuts in enumerate(MIXES):
        write_finished(place / f"run{number}", cuts)
        config = override(SMALL, cuts=tuple(map(str, cuts)))
        summary = Summary(
            1, scores(cuts), 1.0, 1.0, 0, 0, "", {}, LinkSummary(0, 0, [])
        )
        options = config_values.settings(config)
        append_result(place, Result("row", number, options, 1, summary))
    return place


def plan(places, out, *words):
    flags = ["--network", "tiny", "--plugin", "tiny", "--strategy", "sequential"]
    flags += ["--batch-size", "8", "--max-train-samples", "60"]
    flags += ["--devices", str(places / "fleet.csv"), "--out", str(out)]
    return cli.main(["plan", "demo", *flags, *words])


def test_a_run_and_a_study_on_the_same_own_data_are_alike(known, tmp_path):
    """A digest tells data apart, wherever they lay."""
    first, second = "1" * 64, "2" * 64
    own = override(known.config, dataset="npz", data_dir="/here")
    run = write_finished(tmp_path / "run", MIXES[0])
    moved = override(own, data_dir="/moved", cuts=tuple(map(str, MIXES[0])))
    (run / "config.json").write_text(to_json(moved))
    info = {"input_shape": [5, 5, 1], "num_classes": 3, "mean": [0], "std": [1]}
    (run / "data.json").write_text(json.dumps(info | {"digest": first}))
    for name in (first, second):
        (tmp_path / name).mkdir()
        for number, cuts in enumerate(MIXES):
            options = config_values.settings(override(own, cuts=tuple(map(str, cuts))))
            summary = Summary(
                1, scores(cuts), 1.0, 1.0, 0, 0, "", {}, LinkSummary(0, 0, [])
            )
            line = Result("row", number, options, 1, summary, digest=name)
            append_result(tmp_path / name, line)
    plan = known._replace(config=own)
    experience = read_experience([run, tmp_path / first], plan)
    assert len(experience.runs) == 1 + len(MIXES)
    with pytest.raises(UserError, match="data is 222222222222 in .*one dataset"):
        read_experience([run, tmp_path / second], plan)


def test_a_study_counts_with_the_last_results_of_its_runs(known, tmp_path):
    """The labels were corrected after the first half, and one run was done twice."""
    own = override(known.config, dataset="npz", data_dir="/here")
    corrected = [("2", number) for number in (0, *range(len(MIXES)))]
    for digest, number in [("1", 0), ("1", 1), *corrected]:
        cuts = MIXES[number]
        options = config_values.settings(override(own, cuts=tuple(map(str, cuts))))
        found = Summary(1, scores(cuts), 1.0, 1.0, 0, 0, "", {}, LinkSummary(0, 0, []))
        line = Result("row", number, options, 1, found, digest=digest * 64)
        append_result(tmp_path, line)
    experience = read_experience([tmp_path], known._replace(config=own))
    assert [run.options["cuts"] for run in experience.runs] == [
        list(map(str, cuts)) for cuts in MIXES
    ]


def test_a_place_whose_name_is_too_long_is_no_run(known):
    with pytest.raises(UserError, match="^run: x+ is not a run"):
        read_experience([Path("x" * 300)], known)


def test_a_plan_asks_for_an_accuracy(places, tmp_path, capsys):
    """Slow devices would take cut 1, whose exit is too weak; then the refusals."""
    runs = ["--accuracy-from", *(str(places / f"run{i}") for i in range(len(MIXES)))]
    assert plan(places, tmp_path / "free", *runs) == 0
    shown = capsys.readouterr().out
    for text in ("ridge error", "graph tau", "winner", "exit accuracy"):
        assert text in shown
    assert "no run has a client" not in shown
    free = json.loads((tmp_path / "free" / "plan.json").read_text())
    cuts = [client["cut"] for client in free["clients"]]
    assert min(cuts) == 1
    exits = [client["predicted_exit_accuracy"] for client in free["clients"]]
    np.testing.assert_allclose(exits, [0.2 + 0.2 * cut for cut in cuts], atol=0.05)
    assert free["predicted"]["mean_server_accuracy"] == pytest.approx(0.9, abs=0.02)

    words = ["--accuracy-from", str(places), "--min-exit-accuracy", "0.55"]
    assert plan(places, tmp_path / "deep", *words) == 0
    deep = json.loads((tmp_path / "deep" / "plan.json").read_text())
    assert min(client["cut"] for client in deep["clients"]) == 2
    assert deep["seconds"] >= free["seconds"]
    for words, text in (
        (["--min-exit-accuracy", "0.5"], "accuracy_from: missing; min_exit_accuracy"),
        ([*runs, "--min-exit-accuracy", "2"], "min_exit_accuracy: 2.0 is not allowed"),
        ([*runs, "--min-exit-accuracy", "0.99"], "0.99 is not possible for client 0"),
        (runs[:3], "accuracy_from: 2 run(s) with 2 different mixes of cuts"),
        (["--accuracy-from", str(tmp_path)], "run: "),
    ):
        capsys.readouterr()
        assert plan(places, tmp_path / "no", *words) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert text in line


@pytest.mark.slow
def test_strategies_of_no_run_are_left_out_of_a_comparison(places, tmp_path, capsys):
    words = ["--accuracy-from", str(places), "--min-exit-accuracy", "0.3", "--compare"]
    assert plan(places, tmp_path, *words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    refusal = "averaging: accuracy_from: no run has the strategy averaging"
    assert refusal in shown
    assert plan(places, tmp_path, *words[:2], "--compare") == 0
    assert refusal not in " ".join(capsys.readouterr().out.split())
