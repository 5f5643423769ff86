"""Thresholds of a run, and `hsee gate`, against the networks' own answers."""

import json
import logging
import shutil
import sys

import jax
import numpy as np
import pytest
from test_inference import unsure, without_a_gate
from tiny import TINY, write_run

from hsee_jax import cli
from hsee_jax.cli import gate as command
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.inference import measurement
from hsee_jax.inference.calibration import calibration_error, judge
from hsee_jax.inference.client_study import Target
from hsee_jax.inference.predict import predict
from hsee_jax.inference.study import study as make_study
from hsee_jax.runs import evaluate, reopen, restore
from hsee_jax.runs.build import build
from hsee_jax.runs.data import build_data

CONFIG = override(
    preset("demo"),
    **TINY,
    num_clients=3,
    cuts=("1", "3"),
    max_train_samples=200,
    max_test_samples=60,
    validation_share=0.25,
    init="per_client",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write the folder of a run before its first round, in which the clients differ."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    experiment = build(CONFIG)
    state = experiment.store.to_checkpoint(experiment.init())
    large = jax.tree.map(lambda leaf: 3 * leaf, state.clients)  # and unlike
    write_run(folder, CONFIG, state=state.replace(clients=large))
    return folder


@pytest.fixture(scope="module")
def study(run):
    return make_study(run, batch_size=32)


def test_equal_clients_are_studied_once(tmp_path, monkeypatch):
    """Clients 0 and 2 are one network, clients 1 and 3 are not."""
    config = override(CONFIG, num_clients=4, init="shared")
    state = build(config).init()
    last = jax.tree.map(lambda leaf: leaf.at[1].multiply(2), state.clients[1])
    write_run(tmp_path, config, state=state.replace(clients=(state.clients[0], last)))
    scores, scored = measurement._scores, []

    def counted(*arguments):
        scored.append(scores(*arguments))
        return scored[-1]

    monkeypatch.setattr(measurement, "_scores", counted)
    found = make_study(tmp_path, batch_size=32).clients
    assert len(scored) == 2 * 3  # on the held-out and on the test samples
    monkeypatch.setattr(measurement, "alike", lambda one, other: False)
    each = make_study(tmp_path, batch_size=32).clients
    assert len(scored) == 2 * (3 + 4)
    assert [client.id for client in found] == [0, 1, 2, 3]
    for one, other in zip(found, each, strict=True):
        assert one.summary() == other.summary()
        for own, same in zip(one.points(), other.points(), strict=True):
            assert own | {"seconds": 0} == same | {"seconds": 0}
    assert found[1].points() != found[3].points()


def thresholds_of(study, target):
    return [client["threshold"] for client in study.thresholds(target)["clients"]]


def test_a_study_is_what_the_networks_answer(run, study):
    """Both answers of one client are computed here, and message sizes by hand."""
    chosen = study.thresholds(Target("offload", 0.3))
    client = chosen["clients"][1]
    assert (client["id"], client["cut"]) == (1, 3)
    experiment, state = reopen(run)
    assert len(experiment.validation.labels) == chosen["validation_samples"] == 50
    own = jax.tree.map(lambda leaf: leaf[0], state.clients[1])
    server = jax.tree.map(lambda leaf: leaf[0], state.servers[1])
    specs = experiment.federation.specs(1)

    def answers(data):
        """Return accuracy, the share on the device, and both logits."""
        data = jax.device_get(data)
        inputs = (np.asarray(data.images, np.float32) / 255 - 0.286) / 0.353
        logits, final = without_a_gate(specs, (own, server), inputs)
        exits = unsure(logits, "entropy") < client["threshold"] - 1e-6
        right = np.where(exits, logits.argmax(-1), final.argmax(-1)) == data.labels
        return right.mean(), exits.mean(), logits, final

    accuracy, on_device, _, _ = answers(experiment.validation)
    assert client["validation_accuracy"] == pytest.approx(accuracy)
    assert client["validation_on_device"] == pytest.approx(on_device)
    assert on_device == pytest.approx(0.7)
    accuracy, on_device, logits, final = answers(experiment.test)
    assert client["accuracy"] == pytest.approx(accuracy)
    assert client["on_device"] == pytest.approx(on_device)
    assert client["normalized_threshold"] == client["threshold"] / np.log(10)
    assert client["bytes"] == pytest.approx(32 * (1 - on_device))  # 8 floats
    labels = np.asarray(experiment.test.labels)
    assert client["exit_accuracy"] == pytest.approx(
        (logits.argmax(-1) == labels).mean()
    )
    assert client["server_calibration_error"] == pytest.approx(
        calibration_error(judge(final, labels)), abs=1e-6
    )
    costs = experiment.costs()
    whole = sum(cost.flops for cost in costs[:3]) + costs[5].flops + costs[6].flops
    # behind the last cut there is the final head alone
    assert client["flops"] == pytest.approx(whole - on_device * costs[6].flops)


def test_one_batch_of_a_study_is_on_the_device_at_a_time(run, monkeypatch):
    """Normalized samples take four times the room of stored ones."""
    normalize, live = measurement.normalize, []

    def counted(*arguments):
        batches = [a for a in jax.live_arrays() if a.shape == (8, 28, 28, 1)]
        live.append(sum(a.dtype == np.float32 for a in batches))
        return normalize(*arguments)

    monkeypatch.setattr(measurement, "normalize", counted)
    make_study(run, batch_size=8)
    assert len(live) > 10
    assert max(live) <= 2  # the one before is given up when the next is there


def test_a_batch_is_at_most_the_test_set(run, study, tmp_path):
    """The timed batch is the first of the test set; the gate would fill it up."""
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "config.json").write_text(to_json(override(CONFIG, max_test_samples=20)))
    small = make_study(folder, batch_size=1000)
    assert small.setting["validation_samples"] == 50
    assert small.setting["batch_size"] == small.setting["test_samples"] == 20
    target = Target("offload", 0.3)
    assert thresholds_of(small, target) == pytest.approx(thresholds_of(study, target))


@pytest.mark.parametrize("threshold", [0.0, 2.0, 9.0, 1e300])
def test_predict_answers_stored_samples(run, threshold):
    """In batches of 7, the last one padded; both answers are computed here."""
    restored = restore(run)
    _, test = build_data(CONFIG.data)
    found = predict(restored, 1, test.images[:17], threshold=threshold, batch_size=7)
    inputs = (np.asarray(test.images[:17], np.float32) / 255 - 0.286) / 0.353
    branches = restored.client(1), restored.server(1)
    logits, final = without_a_gate(restored.specs(1), branches, inputs)
    exits = unsure(logits, "entropy") < threshold
    np.testing.assert_array_equal(found.exited, exits)
    answers = np.where(exits, logits.argmax(-1), final.argmax(-1))
    np.testing.assert_array_equal(found.predictions, answers)
    np.testing.assert_allclose(found.exit_logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(28, 28), (0, 28, 28, 1), (2, 28, 28, 3)])
def test_predict_names_a_shape_that_is_not_the_runs(run, shape):
    with pytest.raises(UserError, match=r"inputs: the shape .* of \[28, 28, 1\]"):
        predict(restore(run), 0, np.zeros(shape, np.uint8))


def test_predict_takes_no_floats_for_bytes(run):
    """They would be in another scale."""
    with pytest.raises(UserError, match="type float64 is not allowed; .* uint8"):
        predict(restore(run), 0, np.zeros((2, 28, 28, 1)))


@pytest.mark.parametrize("value", [256, -1])
def test_predict_refuses_integers_that_do_not_fit(run, value):
    """They would wrap around."""
    restored = restore(run)
    inputs = np.full((2, 28, 28, 1), 255, np.int16)
    same = predict(restored, 0, inputs.astype(np.uint8))
    found = predict(restored, 0, inputs)
    np.testing.assert_array_equal(found.logits, same.logits)
    inputs[1, 2, 3, 0] = value
    with pytest.raises(UserError, match=rf"{value} at \[1, 2, 3, 0\] .* 0\.\.255"):
        predict(restored, 0, inputs)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_predict_refuses_numbers_that_are_not_finite(run, value):
    restored = restore(run)
    restored = restored._replace(info=restored.info._replace(dtype="float32"))
    inputs = np.zeros((2, 28, 28, 1))
    inputs[1] = value
    with pytest.raises(UserError, match=r"at \[1, 0, 0, 0\] .* finite .* float32"):
        predict(restored, 0, inputs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", 2.5),
        ("threshold", "x"),
        ("threshold", np.nan),
    ],
)
def test_predict_names_an_argument_that_is_not_allowed(run, name, value):
    inputs = np.zeros((2, 28, 28, 1), np.uint8)
    with pytest.raises(UserError, match=f"^{name}: .* is not allowed"):
        predict(restore(run), 0, inputs, **{name: value})


def test_predict_refuses_ragged_inputs(run):
    with pytest.raises(UserError, match="^inputs: "):
        predict(restore(run), 0, [[1, 2], [3]])


def test_the_curve_is_that_of_21_targets(run, study):
    curve = study.curve()
    json.dumps(curve, allow_nan=False)
    mean, clients = curve["mean"], curve["clients"]
    assert [client["id"] for client in clients] == [0, 1, 2]
    _, scores = evaluate(run)
    for point, kind in ((mean[0], "server"), (mean[-1], "exit")):
        assert point["accuracy"] == pytest.approx(
            getattr(scores, f"mean_{kind}_accuracy")
        )
    assert (mean[0]["threshold"], mean[0]["on_device"]) == (0, 0)
    assert (mean[-1]["on_device"], mean[-1]["bytes"]) == (1, 0)
    for point, offload in enumerate(np.linspace(1, 0, 21).round(2).tolist()):
        chosen = thresholds_of(study, Target("offload", offload))
        assert chosen == [client["points"][point]["threshold"] for client in clients]
        own = [client["points"][point] for client in clients]
        for figure in ("accuracy", "bytes", "flops", "threshold"):
            assert mean[point][figure] == pytest.approx(
                np.mean([o[figure] for o in own])
            )
        assert (mean[point]["seconds"] is None) == (point % 5 > 0)
    assert len(set(chosen)) == 1
    assert len(set(thresholds_of(study, Target("offload", 0.5)))) == 3


def test_the_mean_time_is_relative_to_the_mean_time_of_sending_all(study):
    """A mean of the clients' ratios would weigh slow and fast clients alike."""
    mean = study.curve()["mean"]
    timed = [point for point in mean if point["seconds"] is not None]
    assert 1 < len(timed) < len(mean)
    for point in timed:
        ratio = point["seconds"] / timed[0]["seconds"]
        assert point["relative_seconds"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("ofload", 0.3, "target: ofload is unknown (did you mean offload?); allowed"),
        ("accuracy", 2, "target_accuracy: 2.0 is not allowed; allowed is 0..1"),
        (
            "accuracy",
            "0.9",
            'target_accuracy: "0.9" is not allowed; allowed is a float',
        ),
        ("bytes", None, "target_bytes: null is not allowed; allowed is a float"),
    ],
)
def test_a_target_that_is_not_allowed_is_named(kind, value, message):
    with pytest.raises(UserError) as error:
        Target(kind, value)
    assert str(error.value).startswith(message)


def test_targets_are_met_on_the_held_out_samples(study):
    for offload in (0, 0.25, 0.99, 1):
        for client in study.thresholds(Target("offload", offload))["clients"]:
            share = 1 - client["validation_on_device"]
            assert share == pytest.approx(np.floor(50 * offload) / 50)
    size = 28 * 28 * 4 * 4  # float32 of four channels after the first layer
    chosen = study.thresholds(Target("bytes", size / 10))["clients"]
    shares = [1 - client["validation_on_device"] for client in chosen]
    assert shares == pytest.approx([0.1, 1, 0.1])  # a sample at cut 3 has 32 bytes
    assert {c["bytes"] for c in study.thresholds(Target("bytes", 0))["clients"]} == {0}
    most = min(client.held_out.accuracy.max() for client in study.clients)
    for client in study.thresholds(Target("accuracy", most))["clients"]:
        assert client["validation_accuracy"] >= most
    with pytest.raises(UserError, match="cannot be reached by client") as error:
        study.thresholds(Target("accuracy", most + 1e-3))
    # what it says is possible is
    possible = str(error.value).partition("the most is ")[2].split()[0]
    study.thresholds(Target("accuracy", float(possible)))


def test_a_client_with_all_layers_sends_no_bytes(tmp_path, capsys):
    """Its own final head answers where the exit is unsure."""
    own = {"strategy": "centralized", "num_clients": 1, "cuts": ("1",)}
    run = tmp_path / "run"
    write_run(run, override(CONFIG, **own))
    assert gate(run, "--target-offload", 0.5) == 0
    curve, chosen = (
        json.loads((run / "gate" / f"{name}.json").read_text())
        for name in ("curve", "thresholds")
    )
    points = curve["mean"] + curve["clients"][0]["points"] + chosen["clients"]
    assert {point["bytes"] for point in points} == {0}
    assert points[0]["flops"] > points[20]["flops"]
    capsys.readouterr()
    assert gate(run, "--target-bytes", 500) == 2
    assert "target_bytes: has no effect on a run whose" in capsys.readouterr().err


def test_the_test_set_chooses_nothing(run, study, monkeypatch):
    """Other test samples change the accuracy, but no threshold."""
    train, test = build_data(CONFIG.data)
    turned = Dataset(255 - test.images, test.labels[::-1])
    monkeypatch.setattr(
        sys.modules["hsee_jax.runs.build"],
        "data_source",
        lambda config, data: data._replace(read=lambda: (train, turned)),
    )
    other = make_study(run, batch_size=32)
    for target in (Target("offload", 0.4), Target("accuracy", 0.02)):
        assert thresholds_of(study, target) == thresholds_of(other, target)
    means = [s.curve()["mean"] for s in (study, other)]
    assert [p["threshold"] for p in means[0]] == [p["threshold"] for p in means[1]]
    assert [p["accuracy"] for p in means[0]] != [p["accuracy"] for p in means[1]]


def gate(run, *words):
    return cli.main(["gate", str(run), *map(str, words)])


def test_gate_writes_its_files(run, capsys):
    words = ["--criterion", "margin", "--batch-size", 50, "--checkpoint", "best"]
    assert gate(run, *words, "--target-offload", 0.3) == 0
    shown = capsys.readouterr().out
    folder = run / "gate"
    names = ["curve.json", "curve.md", "curve.png", "thresholds.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    found = json.loads((folder / "thresholds.json").read_text())
    content = json.loads((folder / "curve.json").read_text())
    assert (found["criterion"], found["batch_size"]) == ("margin", 50)
    assert (found["rounds"], found["target"]) == (0, {"offload": 0.3})
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "curve.md").read_text()
    for text in (f"{found['clients'][0]['threshold']:.4f}", "offload 0.3", "ECE"):
        assert text in page
        assert text in shown
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 21 + 2 + 3
    assert f"{content['mean'][10]['accuracy']:.4f}" in rows[12]


def test_gates_flags(study, tmp_path, monkeypatch, capsys):
    """They reach the study; without a target, earlier thresholds stay.

    The log, such as where the data are from, is shown.
    """
    seen = []

    def recorded(folder, **options):
        seen.append((str(folder), *options.values()))
        logging.getLogger("hsee_jax.data").info("read from there")
        return study

    monkeypatch.setattr(command, "study", recorded)
    out = ["--out", tmp_path / "out", "--json"]
    assert gate("run", *out, "--target-bytes", 1000) == 0
    shown, log = capsys.readouterr()
    assert log == "hsee: read from there\n"
    found = json.loads(shown)
    assert found["thresholds"]["target"] == {"bytes": 1000}
    assert found["curve"] == json.loads(json.dumps(study.curve()))
    words = "--criterion margin --checkpoint best --data-dir there --batch-size 7"
    assert gate("run", *out, *words.split()) == 0
    assert json.loads(capsys.readouterr().out)["thresholds"] is None
    kept = json.loads((tmp_path / "out" / "thresholds.json").read_text())
    assert kept == found["thresholds"]
    assert seen == [
        ("run", "entropy", "latest", None, None),
        ("run", "margin", "best", "there", 7),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--target-accuracy 1.5",
            "target_accuracy: 1.5 is not allowed; allowed is 0..1",
        ),
        ("--target-offload -0.1", "target_offload: -0.1 is not allowed"),
        (
            "--target-bytes nan",
            "target_bytes: nan is not allowed; allowed is 0 or more",
        ),
        ("--target-bytes inf", "target_bytes: inf is not allowed"),
        ("--target-bytes 1 --target-offload 1", "--target-offload: not allowed with"),
        ("--criterion entropi", "did you mean entropy?"),
        ("--out /dev/null/x", "out: /dev/null is not a folder"),
    ],
)
def test_a_mistake_is_one_line(study, tmp_path, monkeypatch, capsys, words, message):
    """The command writes nothing."""
    monkeypatch.setattr(command, "study", lambda folder, **options: study)
    assert gate(tmp_path / "run", *words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_the_curve_stays_if_no_threshold_reaches_the_target(
    study, tmp_path, monkeypatch, capsys
):
    """The study may have taken minutes; the thresholds of an earlier target stay."""
    monkeypatch.setattr(command, "study", lambda folder, **options: study)
    out = tmp_path / "out"
    assert gate("run", "--out", out, "--target-offload", 0.5) == 0
    kept = (out / "thresholds.json").read_text()
    (out / "curve.json").unlink()
    capsys.readouterr()
    assert gate("run", "--out", out, "--target-accuracy", 0.99) == 2
    shown, error = capsys.readouterr()
    assert (shown, error.count("\n")) == ("", 1)
    assert "target_accuracy: 0.99 cannot be reached by client" in error
    assert f"; {out / 'curve.md'} has the whole curve" in error
    curve = json.loads((out / "curve.json").read_text())
    assert curve == json.loads(json.dumps(study.curve()))
    assert (out / "thresholds.json").read_text() == kept


@pytest.mark.parametrize("size", [0, 2.5, "32", True])
def test_a_batch_has_whole_rows(run, size):
    with pytest.raises(UserError, match="^batch_size: .* is not allowed; allowed is"):
        make_study(run, batch_size=size)


def test_without_held_out_samples_there_is_no_threshold(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "all")
    config = to_json(override(CONFIG, validation_share=0.0))
    (tmp_path / "all" / "config.json").write_text(config)
    assert gate(tmp_path / "all") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--validation-share" in error
    assert gate(tmp_path / "none") == 2
    assert "is not a run" in capsys.readouterr().err
