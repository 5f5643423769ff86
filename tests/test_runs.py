"""Run folders: resuming, restoring, diverging."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import TINY, AfterRound

from hsee_jax import runs
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import DivergenceError, UserError
from hsee_jax.data.partition import Share, hold_out
from hsee_jax.engine.evaluation import ClientResult
from hsee_jax.inference.study import study
from hsee_jax.optim import SCHEDULES
from hsee_jax.runs.checkpoint_folder import find_places
from hsee_jax.runs.data import build_data
from hsee_jax.runs.folder import read_config
from hsee_jax.runs.same_data import check_partition
from hsee_jax.runs.start import warn_of_period
from hsee_jax.systems.traffic import averages_in

SMALL = override(
    preset("demo"),
    **TINY,
    num_clients=3,
    cuts=("1", "layer3"),
    max_train_samples=60,
    max_test_samples=40,
    batch_size=16,
    rounds=3,
    checkpoint_every=2,
    eval_every=2,
    participation=0.7,
    augment="crop_flip",
)


class Stop(Exception):
    """The machine goes away."""


def lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_times(records):
    return [
        {key: value for key, value in record.items() if "seconds" not in key}
        for record in records
    ]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_going_on_equals_not_stopping(tmp_path, strategy):
    """Stopped after round 3 with a checkpoint of round 2: bit for bit the same."""
    config = override(SMALL, strategy=strategy)
    whole = runs.train(config, tmp_path / "whole")

    def stop(record):
        if record.round == 3:
            raise Stop

    with pytest.raises(Stop):
        runs.train(config, tmp_path / "stopped", callbacks=[AfterRound(stop)])
    assert not (tmp_path / "stopped" / "summary.json").exists()
    resumed = runs.train(config, tmp_path / "stopped", resume=True)

    assert whole.scores == resumed.scores
    _, one = runs.reopen(tmp_path / "whole")
    _, other = runs.reopen(tmp_path / "stopped")
    assert int(one.round) == 3
    jax.tree.map(np.testing.assert_array_equal, one, other)
    records = [without_times(lines(tmp_path / name)) for name in ("whole", "stopped")]
    assert records[0] == records[1]
    assert [record["round"] for record in records[0]] == [1, 2, 3]

    assert runs.evaluate(tmp_path / "whole") == (3, whole.scores)
    _, best = runs.evaluate(tmp_path / "whole", "best")
    scores = {r["round"]: r["test"] for r in lines(tmp_path / "whole") if "test" in r}
    assert best.mean_server_accuracy == max(
        score["mean_server_accuracy"] for score in scores.values()
    )
    # resumed once more, there is nothing left to do
    again = runs.train(config, tmp_path / "stopped", resume=True)
    assert again.scores == whole.scores


def test_the_partition_is_kept_with_the_run(tmp_path):
    """Every sample once, whose labels are counted; resuming writes the same again."""
    config = override(SMALL, rounds=1, partition="dirichlet", partition_seed=3)
    runs.train(config, tmp_path / "run")
    path = tmp_path / "run" / "partition.json"
    text = path.read_text()
    assert text.count("\n") == 1
    shares = json.loads(text)
    assert [(share["id"], share["cut"]) for share in shares] == [(0, 1), (1, 3), (2, 1)]
    every = [index for share in shares for index in share["indices"]]
    _, held = hold_out(60, config.data.validation_share, seed=3)
    assert len(held) == 6
    assert sorted([*every, *held.tolist()]) == list(range(60))
    labels = build_data(config.data)[0].labels
    for share in shares:
        assert share["samples"] == len(share["indices"]) == sum(share["label_counts"])
        of_share = labels[share["indices"]].tolist()
        assert share["label_counts"] == [of_share.count(label) for label in range(10)]

    path.unlink()
    derived = [tmp_path / "run" / name for name in ("report", "interactions")]
    for place in derived:
        place.mkdir()
    runs.train(config, tmp_path / "run", resume=True)
    assert path.read_text() == text
    other = override(config, partition_seed=4)
    runs.train(other, tmp_path / "run", overwrite=True)
    assert path.read_text() != text
    assert not any(place.exists() for place in derived)


def test_samples_of_the_clients_themselves_are_named(tmp_path):
    """Where devices have them, and not the machine that opens the run."""
    own = [Share(0, 1, 4, [0, 0], []), Share(1, 1, 9, [0, 0], [])]
    text = json.dumps([share._asdict() for share in own])
    (tmp_path / "partition.json").write_text(text)
    check_partition(tmp_path, [share._replace(cut=2) for share in own])
    with pytest.raises(UserError, match="samples: .* needs --samples 4 9"):
        check_partition(tmp_path, own[:1])
    check_partition(tmp_path, own[:1], test_only=True)  # their server still evaluates
    for damaged in ("null", "{}", "[1]"):
        (tmp_path / "partition.json").write_text(damaged)
        with pytest.raises(UserError, match="partition.json is damaged"):
            check_partition(tmp_path, own)


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_refused(
    tmp_path, monkeypatch
):
    def closed(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(UserError, match="run: .* cannot be read: Permission denied"):
        find_places(tmp_path)


def test_the_same_dataset_in_another_order_is_refused(tmp_path):
    """Where its samples count: not for the test images, of which all are asked."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 28, 28, 1), np.uint8)
    labels = np.arange(60) % 10
    for name, order in (("one", np.arange(60)), ("other", rng.permutation(60))):
        (tmp_path / name / "mnist").mkdir(parents=True)
        for split in ("train", "test"):
            path = tmp_path / name / "mnist" / split
            np.savez(path, images=images[order], labels=labels[order])
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    config = override(SMALL, rounds=1, dataset="mnist", data_dir=one)
    config = override(config, max_test_samples=None)
    folder = tmp_path / "run"
    summary = runs.train(config, folder)
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    longer = override(config, rounds=2, data_dir=other)
    with pytest.raises(UserError, match="data_dir: the training samples found now"):
        runs.train(longer, folder, resume=True)
    with pytest.raises(UserError, match="data_dir: the training samples found now"):
        study(folder, data_dir=other)
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before
    _, again = runs.evaluate(folder, data_dir=other)
    assert again.mean_server_accuracy == pytest.approx(
        summary.scores.mean_server_accuracy
    )
    first = override(config, max_test_samples=20)  # of another form other images
    runs.train(first, folder, overwrite=True)
    assert runs.evaluate(folder)[0] == 1
    with pytest.raises(UserError, match="data_dir: the training samples found now"):
        runs.evaluate(folder, data_dir=other)


@pytest.mark.parametrize(
    ("period", "unit", "told"),
    [
        (2, "rounds", None),
        (3, "rounds", "period: 3 rounds are more than the run has (2), so nothing is"),
        (6, "steps", None),
        (7, "steps", "period: 7 steps are more than the run has (6), so nothing is"),
        (0, "rounds", None),  # asks for no average
    ],
)
def test_a_period_longer_than_the_run_is_told(period, unit, told, tmp_path, caplog):
    """Of 2 rounds of 3 steps; the link shows whether there was an average."""
    config = override(preset("demo"), **TINY, num_clients=2, cuts=("1", "2"))
    config = override(config, max_train_samples=40, validation_share=0, batch_size=7)
    config = override(config, strategy="averaging", average="all_holders", rounds=2)
    config = override(config, period=period, period_unit=unit)
    experiment = runs.build(config)
    assert experiment.learning_rates.shape == (2, 3)
    warn_of_period(experiment)
    assert [line[: len(told or "")] for line in caplog.messages] == [told] * bool(told)
    averages = [averages_in(experiment.strategy, n, 3) for n in (1, 2)]
    assert (sum(averages) == 0) == (bool(told) or period == 0)
    if told:
        caplog.clear()
        runs.train(config, tmp_path / "run")
        assert told in caplog.text


def test_a_batch_has_no_more_rows_than_a_shard(tmp_path):
    """However many are asked for: as with a batch of the largest shard."""
    small = override(SMALL, augment="none")  # draws depend on the batch size
    largest = 18  # of 54 samples for three clients; 6 are held out
    runs.train(override(small, batch_size=largest), tmp_path / "shard")
    huge = override(small, batch_size=10**6, eval_batch_size=10**6)
    experiment = runs.build(huge)
    assert experiment.plan(0).indices.shape[-1] == largest
    assert experiment.eval_batch_size == 40
    runs.train(huge, tmp_path / "huge")
    records = [without_times(lines(tmp_path / name)) for name in ("shard", "huge")]
    assert records[0] == records[1]


def test_more_rows_than_a_shard_would_change_nothing():
    """A batch that is padded beyond the largest shard trains the same clients."""
    config = override(SMALL, batch_size=40, participation=1.0, augment="none")
    ready = runs.build(config)
    states = []
    for rows in (18, 40):
        wide = ready._replace(batch_size=rows)
        state, played, _ = wide.run_round(wide.init())
        assert played.indices.shape[-1] == rows
        states.append(ready.store.to_checkpoint(state))

    def compare(one, other):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)

    jax.tree.map(compare, *states)


@SCHEDULES.register
def explosive(peak, steps):
    """A rate that no weight survives, after the warm-up."""
    return lambda step: 1e30


def test_divergence_leaves_the_last_good_checkpoint(tmp_path):
    config = override(
        SMALL, checkpoint_every=1, participation=1.0, schedule="explosive"
    )
    with pytest.raises(DivergenceError, match=r"of client \d is not finite in round 2"):
        runs.train(config, tmp_path / "run")
    _, state = runs.reopen(tmp_path / "run")
    assert int(state.round) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [record["round"] for record in lines(tmp_path / "run")] == [1]

    with pytest.raises(UserError, match=r"learning_rate: 0\.2 is not allowed"):
        runs.train(override(config, learning_rate=0.2), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("rule", "diverged", "named"),
    [("leave_out", {0, 1, 2}, 0), ("leave_out", {1}, None), ("stop", {1}, 1)],
)
def test_test_losses_that_are_not_finite(tmp_path, monkeypatch, rule, diverged, named):
    """One is left out or ends the run, as the option says; all of them end it."""
    results = [
        ClientResult(i, 1, 0.5, 0.5, 2.0, np.nan if i in diverged else 2.0)
        for i in range(3)
    ]
    monkeypatch.setattr(runs.Experiment, "evaluate", lambda *_: results)
    config = override(SMALL, rounds=1, on_nonfinite=rule)
    if named is None:
        assert runs.train(config, tmp_path / "run").rounds == 1
        return
    words = f"server loss of client {named} is not finite in round 1"
    with pytest.raises(DivergenceError, match=words):
        runs.train(config, tmp_path / "run")


def test_a_folder_is_only_replaced_when_told(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="neither empty nor a run"):
            runs.train(SMALL, tmp_path / "notes", overwrite=overwrite)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"

    # somebody else's config.json
    (tmp_path / "notes" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="neither empty nor a run"):
        runs.train(SMALL, tmp_path / "notes", overwrite=True)
    assert len(list((tmp_path / "notes").iterdir())) == 2

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(SMALL))
    with pytest.raises(UserError, match="holds a run already"):
        runs.train(SMALL, run)
    with pytest.raises(UserError, match="has no checkpoint"):
        runs.reopen(run)
    assert sorted(path.name for path in run.iterdir()) == ["config.json"]

    # what cannot start does not touch the run either
    bad = override(SMALL, max_train_samples=2)
    with pytest.raises(UserError, match="num_clients: 3 is more than the 1"):
        runs.train(bad, run, overwrite=True)
    with pytest.raises(UserError, match="num_clients: 3 is more than the 1"):
        runs.train(bad, tmp_path / "new")
    assert read_config(run) == SMALL
    assert not (tmp_path / "new").exists()


def test_latest_and_best_are_kept(tmp_path, monkeypatch):
    """Of scores 0.1, 0.9, 0.2 after rounds 1 to 3, the last and the second stay."""
    scores = iter([0.1, 0.9, 0.2])

    def evaluate(experiment, state, data):
        return [ClientResult(0, 1, 0.0, next(scores), 0.0, 0.0)]

    monkeypatch.setattr(runs.Experiment, "evaluate", evaluate)
    config = override(SMALL, checkpoint_every=1, keep_checkpoints=1)
    runs.train(config, tmp_path / "run")
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == ["2", "3"]
    assert int(runs.reopen(tmp_path / "run", "best")[1].round) == 2

    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has 0 lines for 3 rounds"):
        runs.train(config, tmp_path / "run", resume=True)
