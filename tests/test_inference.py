"""Gates against both exits computed for all; thresholds against what they must give."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CLASSES, tiny_data, tiny_model

from hsee_jax import cli
from hsee_jax.inference import study as gating
from hsee_jax.runs import train as runs
from hsee_jax.core.types import Dataset
from hsee_jax.core.errors import UserError
from hsee_jax.inference.calibration import Judged, Scores, all_thresholds, calibration_error, curve, judge, reaching, within
from hsee_jax.runs.checkpoint import Writer
from hsee_jax.config.schema import override, to_json
from hsee_jax.config.presets import preset
from hsee_jax.runs.build import build, load_dataset_of
from hsee_jax.inference.study import Target
from hsee_jax.inference.gate import CRITERIA, make_gate
from hsee_jax.nn.model import init_network
from hsee_jax.federation.branch import client_spec, forward, init_client, init_server, server_spec

MODEL = tiny_model()
NONE = optax.identity()
NETWORK = jax.jit(lambda: init_network(MODEL, jax.random.key(0)))()


def parts(cut):
    return init_client(NETWORK, cut, NONE), init_server(NETWORK, cut, NONE)


def specs(cut, model=MODEL):
    return client_spec(model, cut, NONE), server_spec(model, cut, NONE)


def images(count):
    return jnp.asarray(tiny_data(count).images, jnp.float32) / 64 - 1


def both(cut, inputs):
    """Logits of exit and server for all."""
    return without_a_gate(specs(cut), parts(cut), inputs)


def without_a_gate(specs, branches, inputs):
    @jax.jit
    def logits(branches, inputs):
        mask = jnp.ones(len(inputs), bool)
        features, first, _ = forward(specs[0], branches[0], inputs, mask, train=False)
        return first, forward(specs[1], branches[1], features, mask, train=False)[1]

    return jax.device_get(logits(branches, inputs))


def unsure(logits, criterion):
    """The definitions, in float64."""
    e = np.exp(logits.astype(np.float64))
    p = np.sort(e / e.sum(axis=-1, keepdims=True), axis=-1)
    if criterion == "entropy":
        return -(p * np.log(p)).sum(axis=-1)
    return 1 - (p[:, -1] if criterion == "confidence" else p[:, -1] - p[:, -2])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("cut", [1, 3])
def test_a_gate_is_a_choice_between_both_answers(cut, criterion):
    """At thresholds between all uncertainties, and beyond both ends."""
    inputs = images(13)
    exit_logits, logits = both(cut, inputs)
    doubts = unsure(exit_logits, criterion)
    gate = make_gate(*specs(cut), batch_size=16, criterion=criterion, sizes=(1, 5, 16))
    values = np.sort(doubts)
    largest = CRITERIA[criterion].largest(CLASSES)
    for threshold in (0.0, *(values[1:] + values[:-1]) / 2, largest * 1.001):
        answers = gate.answer(*parts(cut), inputs, threshold)
        exited = doubts < threshold
        expected = np.where(exited[:, None], exit_logits, logits)
        np.testing.assert_array_equal(answers.exited, exited)
        np.testing.assert_array_equal(answers.predictions, expected.argmax(axis=-1))
        np.testing.assert_allclose(answers.logits, expected, atol=1e-5)
        np.testing.assert_allclose(answers.exit_logits, exit_logits, atol=1e-5)
        np.testing.assert_allclose(answers.uncertainty, doubts, atol=1e-5)
    assert exited.all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_largest_uncertainty_is_that_of_equal_logits(criterion):
    """And 0 that of a single class; a threshold of 0 or of the largest is not below."""
    logits = jnp.array([[2.0, 2.0, 2.0], [90.0, 0.0, 0.0]])
    values = CRITERIA[criterion].uncertainty(logits)
    np.testing.assert_allclose(values, [CRITERIA[criterion].largest(3), 0], atol=1e-6)


def test_at_equality_a_sample_is_sent():
    inputs = images(6)
    gate = make_gate(*specs(2), batch_size=6)
    doubts = gate.answer(*parts(2), inputs, 0.0).uncertainty
    for threshold in doubts.tolist():
        exited = gate.answer(*parts(2), inputs, threshold).exited
        assert (
            exited.sum()
            == (doubts < threshold).sum()
            == exited[np.argsort(doubts)].argmin()
        )


def test_every_sample_is_answered_once():
    """Batches of 1 to 7 and parts of any size; who is sent is not answered before."""
    gate = make_gate(*specs(1), batch_size=7, sizes=(2, 3, 7))
    asked = []

    def on_server(server, features, rows):
        asked.append(rows.tolist())
        return gate.on_server(server, features, rows)

    counting = gate._replace(on_server=on_server)
    exit_logits, logits = both(1, images(7))
    for count in range(1, 8):
        inputs = np.asarray(images(7))[:count]
        doubts = np.sort(gate.answer(*parts(1), inputs, 0.0).uncertainty)
        for sent, threshold in enumerate([9.0, *doubts[::-1].tolist()]):
            asked.clear()
            answers = counting.answer(*parts(1), inputs, threshold)
            assert [len(rows) for rows in asked] == ([sent] if sent else [])
            assert sum(asked, []) == np.flatnonzero(~answers.exited).tolist()
            exited = answers.exited[:, None]
            expected = np.where(exited, exit_logits[:count], logits[:count])
            np.testing.assert_allclose(answers.logits, expected, atol=1e-5)
    for count in (0, 8):
        with pytest.raises(ValueError, match=rf"{count} rows; allowed are 1\.\.7"):
            gate.answer(*parts(1), images(count), 0.5)


def test_the_server_is_compiled_once_for_each_size():
    """Eight sizes for a batch of 16, whatever the batches and thresholds."""
    traced = {"exit": 0, "final": 0}

    def counted(name, stage):
        def apply(*args, **options):
            traced[name] += 1
            return stage.apply(*args, **options)

        return stage._replace(apply=apply)

    heads = tuple(counted("exit", head) for head in MODEL.exit_heads)
    model = MODEL._replace(
        exit_heads=heads, final_head=counted("final", MODEL.final_head)
    )
    gate = make_gate(*specs(2, model), batch_size=16)
    for count in (16, 5, 9):
        inputs = images(count)
        for threshold in gate.answer(*parts(2), inputs, 0.0).uncertainty.tolist():
            gate.answer(*parts(2), inputs, threshold)
    assert traced == {"exit": 1, "final": 8}


def scores(uncertainty, exit_correct, server_correct):
    def judged(correct):
        return Judged(np.array(correct, bool), np.ones(len(correct)))

    doubts = np.array(uncertainty, np.float32)
    return Scores(doubts, judged(exit_correct), judged(server_correct))


FIVE = scores([0.3, 0.1, 0.5, 0.2, 0.4], [0, 1, 0, 1, 1], [1, 0, 1, 1, 1])


def test_the_curve_of_five_samples():
    """By uncertainty the exit is right 1 1 0 1 0, the server 0 1 1 1 1.

    So with the k surest at the exit: 0+4, 1+4, 2+3, 2+2, 3+1, 3+0 of 5 are right.
    """
    thresholds = all_thresholds(FIVE.uncertainty, 1.0)
    np.testing.assert_allclose(thresholds, [0, 0.2, 0.3, 0.4, 0.5, 1.01])
    points = curve(FIVE, thresholds)
    np.testing.assert_array_equal(points.accuracy, [0.8, 1, 1, 0.8, 0.8, 0.6])
    np.testing.assert_array_equal(points.offload, [1, 0.8, 0.6, 0.4, 0.2, 0])
    # any other threshold is as the next one that occurs
    between = curve(FIVE, np.array([0.05, 0.15, 0.35, 0.45, 0.6]))
    np.testing.assert_array_equal(between.accuracy, [0.8, 1, 0.8, 0.8, 0.6])

    assert [reaching(points, a) for a in (1, 0.9, 0.8, 0.7, 0.6, 0)] == [
        2,
        2,
        4,
        4,
        5,
        5,
    ]
    assert [within(points, o) for o in (1, 0.99, 0.8, 0.5, 0.4, 0.19, 0)] == [
        *(0, 1, 1, 3, 3, 5, 5)
    ]
    # 100 bytes each: 60 bytes a sample are three of five
    assert [within(points, b, 100) for b in (1000, 60, 59.9, 0)] == [0, 2, 3, 5]


def test_curves_with_ties_equal_counting():
    rng = np.random.default_rng(0)
    for count in (1, 2, 30):
        drawn = scores(
            rng.integers(0, 6, count) / 8,
            rng.integers(0, 2, count),
            rng.integers(0, 2, count),
        )
        thresholds = all_thresholds(drawn.uncertainty, 1.0)
        assert (np.diff(thresholds) > 0).all()
        for values in (thresholds, np.linspace(0, 1, 41)):
            points = curve(drawn, values)
            for p, threshold in enumerate(values):
                exits = drawn.uncertainty < threshold
                right = np.where(exits, drawn.exit.correct, drawn.server.correct)
                assert points.accuracy[p] == right.sum() / count
                assert points.offload[p] == (~exits).sum() / count
        ways = {
            tuple(drawn.uncertainty < threshold) for threshold in np.arange(0, 1, 0.01)
        }
        assert len(thresholds) == len(ways)


def test_calibration_error_of_four_samples():
    """Bins of width 1/15: 0.95 0.95 (one right), 0.3 (wrong), 0.5 (right).

    (|1 - 1.9| + |0 - 0.3| + |1 - 0.5|) / 4 = 0.425.
    """
    judged = Judged(
        np.array([True, False, True, False]), np.array([0.95, 0.95, 0.5, 0.3])
    )
    assert calibration_error(judged) == pytest.approx(0.425)
    sure = Judged(np.array([True, False]), np.array([1.0, 1.0]))
    assert calibration_error(sure) == pytest.approx(0.5)


def test_confidence_is_the_highest_probability():
    logits = np.log(np.array([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]], np.float32)) + 3
    judged = judge(logits, np.array([1, 2], np.int32))
    np.testing.assert_allclose(judged.confidence, [0.7, 0.5], rtol=1e-6)
    assert judged.correct.tolist() == [True, False]


CONFIG = override(
    preset("demo"),
    num_clients=3,
    cuts=("1", "3"),
    max_train_samples=200,
    max_test_samples=60,
    validation_share=0.25,
    init="per_client",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder before its first round, of clients that differ."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = tiny_model(input_shape=(28, 28, 1), classes=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hsee_jax.experiment.build_model", lambda *args: model)
        experiment = build(CONFIG)
        with Writer(folder / "checkpoints", keep=1) as checkpoints:
            state = experiment.store.settled(experiment.init())
            large = jax.tree.map(lambda leaf: 3 * leaf, state.clients)  # and unlike
            state = state.replace(clients=large)
            checkpoints.save(1, 0, state, {"score": 0.0})
        (folder / "config.json").write_text(to_json(CONFIG))
        yield folder


@pytest.fixture(scope="module")
def study(run):
    return gating.study(run, batch_size=32)


def thresholds_of(study, target):
    return [client["threshold"] for client in study.thresholds(target)["clients"]]


def test_a_study_is_what_the_networks_answer(run, study):
    """One client's figures against both exits, computed here; sizes by hand."""
    chosen = study.thresholds(Target("offload", 0.3))
    client = chosen["clients"][1]
    assert (client["id"], client["cut"]) == (1, 3)
    experiment, state = runs.reopen(run)
    assert len(experiment.validation.labels) == chosen["validation_samples"] == 50
    own = jax.tree.map(lambda leaf: leaf[0], state.clients[1])
    server = jax.tree.map(lambda leaf: leaf[0], state.servers[1])
    specs = experiment.federation.specs(1)

    def answers(data):
        """Who exits at the threshold, and both logits."""
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


def test_the_curve_is_that_of_21_targets(run, study):
    curve = study.curve()
    json.dumps(curve, allow_nan=False)
    mean, clients = curve["mean"], curve["clients"]
    assert [client["id"] for client in clients] == [0, 1, 2]
    figures = runs.evaluate(run)
    for point, kind in ((mean[0], "server"), (mean[-1], "exit")):
        assert point["accuracy"] == pytest.approx(figures[f"mean_{kind}_accuracy"])
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


def test_targets_are_met_on_the_held_out_samples(study):
    for offload in (0, 0.25, 0.99, 1):
        for client in study.thresholds(Target("offload", offload))["clients"]:
            sent = 1 - client["validation_on_device"]
            assert sent == pytest.approx(np.floor(50 * offload) / 50)
    size = 28 * 28 * 4 * 4  # float32 of four channels after the first layer
    chosen = study.thresholds(Target("bytes", size / 10))["clients"]
    sent = [1 - client["validation_on_device"] for client in chosen]
    assert sent == pytest.approx([0.1, 1, 0.1])  # behind cut 3 it is 32 bytes
    assert {c["bytes"] for c in study.thresholds(Target("bytes", 0))["clients"]} == {0}
    most = min(client.held_out.accuracy.max() for client in study.clients)
    for client in study.thresholds(Target("accuracy", most))["clients"]:
        assert client["validation_accuracy"] >= most
    with pytest.raises(UserError, match="cannot be reached by client") as error:
        study.thresholds(Target("accuracy", most + 1e-3))
    # what it says is possible is
    possible = str(error.value).partition("the most is ")[2].split()[0]
    study.thresholds(Target("accuracy", float(possible)))


def test_the_test_set_chooses_nothing(run, study, monkeypatch):
    """Other test samples change the accuracy, but no threshold."""
    train, test = load_dataset_of(CONFIG.data)
    turned = Dataset(255 - test.images, test.labels[::-1])
    monkeypatch.setattr(
        "hsee_jax.experiment.load_dataset_of", lambda config: (train, turned)
    )
    other = gating.study(run, batch_size=32)
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
    """They reach the study; a curve alone leaves the thresholds of an earlier one."""
    seen = []

    def recorded(folder, **options):
        seen.append((str(folder), *options.values()))
        return study

    monkeypatch.setattr(gating, "study", recorded)
    out = ["--out", tmp_path / "out", "--json"]
    assert gate("run", *out, "--target-bytes", 1000) == 0
    found = json.loads(capsys.readouterr().out)
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
        ("--batch-size 0", "batch_size: 0 is not allowed"),
        ("--checkpoint bset", "did you mean best?"),
        ("--out /dev/null/x", "out: /dev/null is not a folder"),
        ("--target-accuracy 0.99", "target_accuracy: 0.99 cannot be reached by client"),
    ],
)
def test_what_cannot_be_is_one_line(
    study, tmp_path, monkeypatch, capsys, words, message
):
    """And nothing is written."""
    monkeypatch.setattr(gating, "study", lambda folder, **options: study)
    assert gate(tmp_path / "run", *words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


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
