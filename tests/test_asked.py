"""Inference with the criterion, the checkpoint and the client that were asked for."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_inference import unsure, without_a_gate
from tiny import TINY, write_run

import hsee_jax as hs
from hsee_jax.config import override, preset
from hsee_jax.data import normalize
from hsee_jax.inference import find_interactions, predict
from hsee_jax.inference.study import study
from hsee_jax.nn.interactions import Interaction
from hsee_jax.runs import evaluate, restore
from hsee_jax.runs.build import build
from hsee_jax.runs.records import TrainFigures
from hsee_jax.runs.refit import refit

CONFIG = override(
    preset("demo"),
    **TINY,
    num_clients=2,
    cuts=("1", "2"),
    max_train_samples=80,
    max_test_samples=20,
    validation_share=0.25,
)


def two_checkpoints(folder, config):
    """The first of two is the better; their weights are unlike."""
    for rounds in (1, 2):
        write_run(folder, config, rounds=rounds)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    two_checkpoints(folder, CONFIG)
    train = dict.fromkeys(TrainFigures._fields, 0.5)
    values = {"seconds": 1, "wall_seconds": 1, "images": 1, "train": train}
    lines = [json.dumps({"round": number} | values) + "\n" for number in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run on a table of 5 columns, whose two clients have samples of their own."""
    place = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(70, 5)).astype(np.float32), rng.integers(0, 2, 70)
    hs.data.write_npz(place, (x[:50], y[:50], x[50:], y[50:]))
    words = {"dataset": "npz", "data_dir": str(place), "network": "mlp"}
    config = override(preset("demo"), **words, depth=2, hidden=4, num_clients=2)
    config = override(config, cuts=("1",), validation_share=0.0)
    return two_checkpoints(place / "run", config), config


def answers(restored, i, images):
    """The logits of a client's exit and of the server behind it."""
    mean, std = restored.info.mean, restored.info.std
    inputs = normalize(jnp.asarray(images), mean, std)
    branches = restored.client(i), restored.server(i)
    return without_a_gate(restored.specs(i), branches, inputs)


def test_a_study_and_a_prediction_use_the_criterion(run):
    images = np.asarray(build(CONFIG).test.images)
    restored = restore(run)
    exit_logits, _ = answers(restored, 1, images)
    doubts = unsure(exit_logits, "margin")
    found = study(run, criterion="margin")
    assert found.setting["criterion"] == "margin"
    np.testing.assert_allclose(found.clients[1].test.uncertainty, doubts, atol=1e-5)
    assert found.clients[1].largest_uncertainty == 1
    middle = np.sort(doubts)[[9, 10]].mean()
    predicted = predict(restored, 1, images, threshold=middle, criterion="margin")
    np.testing.assert_array_equal(predicted.exited, doubts < middle)
    assert predicted.exited.sum() == 10


def test_the_best_checkpoint_is_studied_and_refitted(run, tmp_path):
    images = np.asarray(build(CONFIG).test.images)
    best, latest = (
        unsure(answers(restore(run, which), 1, images)[0], "entropy")
        for which in ("best", "latest")
    )
    assert np.abs(best - latest).max() > 0.01
    found = study(run, which="best")
    assert found.setting["rounds"] == 1
    np.testing.assert_allclose(found.clients[1].test.uncertainty, best, atol=1e-5)
    fitted = refit(run, tmp_path / "refit", which="best")
    assert fitted.before == evaluate(run, "best")[1]
    assert int(restore(tmp_path / "refit").state.round) == 1


@pytest.mark.parametrize(("which", "rounds"), [("best", 1), ("latest", 2)])
def test_interactions_are_those_of_one_client_at_a_checkpoint(
    table, monkeypatch, which, rounds
):
    """They read its network, the server behind it, and its own rows and baselines."""
    folder, config = table
    asked = []

    def spy(*arguments, **options):
        asked.append(arguments)
        return (Interaction((0, 3), 0.25),)

    name = "hsee_jax.inference.interactions.select_interactions"
    monkeypatch.setattr(name, spy)
    found = find_interactions(folder, 1, which=which, max_samples=10)
    ((logits, x, baselines),) = asked
    assert (found.client, found.rounds, found.samples) == (1, rounds, 10)
    experiment = build(config)
    every = np.asarray(experiment.train.images)
    mean, std = np.array(experiment.info.mean), np.array(experiment.info.std)
    own = every[experiment.shards[1]].tolist()
    rows = np.round(x * std + mean, 4).tolist()
    assert all(row in np.round(own, 4).tolist() for row in rows)
    assert sorted(baselines.tolist()) == sorted(x.tolist())
    assert (x != baselines).any(axis=1).all()
    restored = restore(folder, which)
    branches = restored.client(1), restored.server(1)
    _, expected = without_a_gate(restored.specs(1), branches, jnp.asarray(x))
    expected = expected - expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(logits(x), expected, rtol=1e-4, atol=1e-5)
    variance = np.var(expected, axis=0).sum()
    assert found.variance == pytest.approx(variance, rel=1e-4)
    (chosen,) = found.to_json()["chosen"]
    assert chosen["columns"] == (0, 3)
    assert chosen["share"] == pytest.approx(0.25 / variance, rel=1e-4)
