"""What training tells a user's callbacks, and what it writes of its rounds."""

import json
import math

import jax
import numpy as np
import pytest
from tiny import THREE_ROUNDS as CONFIG

from hsee_jax import Stopped, UserError, override, runs, train
from hsee_jax.core import files
from hsee_jax.engine.agreement import Agreement
from hsee_jax.engine.evaluation import ClientResult
from hsee_jax.federation import RunState
from hsee_jax.runs import callbacks, checkpoint_writer
from hsee_jax.runs.checkpoint import find
from hsee_jax.runs.history import read_records
from hsee_jax.runs.json_text import dumps
from hsee_jax.runs.records import (
    LinkSummary,
    RoundRecord,
    Scores,
    Summary,
    TrainFigures,
)
from hsee_jax.systems.traffic import Bytes


class Notebook(runs.Callback):
    """Notes what it is told, and what the folder holds at that moment."""

    def __init__(self, folder):
        self.folder, self.calls, self.records, self.moments = folder, [], [], []
        self.summary = self.error = None

    def __enter__(self):
        """Note it."""
        self.calls.append("enter")
        return self

    def __exit__(self, kind, error, traceback):
        """Note it, and what ended the training."""
        self.calls.append("exit")
        self.error = kind

    def on_start(self, experiment):
        self.calls.append("start")
        self.rounds = experiment.cadence.rounds

    def on_round(self, record, moment):
        self.calls.append(f"round {record.round}")
        self.records.append(record)
        # The next round gives up the buffers of the state.
        self.moments.append(moment._replace(state=jax.device_get(moment.state())))
        self.logged = read_records(self.folder)
        self.saved = find(self.folder / "checkpoints", midway=True)

    def on_pause(self, moment):
        self.calls.append("pause")
        self.moments.append(moment._replace(state=jax.device_get(moment.state())))

    def on_end(self, summary):
        self.calls.append("end")
        self.summary = summary


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to the end; its notebook and what `train` returned."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    notebook = Notebook(folder)
    return notebook, train(CONFIG, folder, callbacks=[notebook])


def test_a_callback_is_told_every_round_and_the_end(whole):
    notebook, summary = whole
    rounds = ["round 1", "round 2", "round 3"]
    assert notebook.calls == ["enter", "start", *rounds, "end", "exit"]
    assert notebook.rounds == 3
    assert notebook.error is None
    assert notebook.records == read_records(notebook.folder)
    assert [record.test is None for record in notebook.records] == [True, False, False]
    assert notebook.records[-1].test == summary.scores
    assert notebook.summary == summary
    text = (notebook.folder / "summary.json").read_text()
    assert Summary.from_json(json.loads(text)) == summary


def test_a_moment_says_where_training_is(whole):
    """Behind the log of the round, before its checkpoint."""
    notebook, _ = whole
    assert [m.rounds for m in notebook.moments] == [1, 2, 3]
    assert [m.steps for m in notebook.moments] == [0, 0, 0]
    assert [m.due for m in notebook.moments] == [False, True, True]
    for moment in notebook.moments:
        assert isinstance(moment.state, RunState)
        assert int(moment.state.round) == moment.rounds
        json.dumps(dict(moment.notes))
    assert notebook.logged == notebook.records
    assert notebook.saved is None or notebook.saved.rounds == 2  # in the background
    assert find(notebook.folder / "checkpoints").rounds == 3


def without_times(record):
    return record._replace(seconds=0, wall_seconds=0)


def test_a_callback_is_told_of_a_stop_in_the_middle_of_a_round(whole, tmp_path):
    asked = []

    def stop():
        asked.append(True)
        return len(asked) == 4

    first, second = Notebook(tmp_path / "run"), Notebook(tmp_path / "run")
    with pytest.raises(Stopped) as stopped:
        train(CONFIG, tmp_path / "run", callbacks=[first], stop=stop)
    rounds, steps = stopped.value.rounds, stopped.value.steps
    assert (rounds, steps > 0) == (1, True)
    assert first.calls == ["enter", "start", "round 1", "pause", "exit"]
    assert first.error is Stopped and first.summary is None
    assert first.moments[-1][:3] == (rounds, steps, True)
    saved = find(tmp_path / "run" / "checkpoints", midway=True)
    assert (saved.rounds, saved.steps) == (rounds, steps)

    train(CONFIG, tmp_path / "run", resume=True, callbacks=[second])
    assert second.calls == ["enter", "start", "round 2", "round 3", "end", "exit"]
    for record, expected in zip(
        first.records + second.records, whole[0].records, strict=True
    ):
        assert without_times(record) == without_times(expected)


class Broken(Notebook):
    """Fails at a call of its choice."""

    def __init__(self, folder, call):
        super().__init__(folder)
        self.call = call

    def on_round(self, record, moment):
        super().on_round(record, moment)
        self.fail_at(record.round)

    def on_end(self, summary):
        super().on_end(summary)
        self.fail_at("end")

    def fail_at(self, call):
        if call == self.call:
            raise ZeroDivisionError("the user's own fault")


@pytest.mark.parametrize(("call", "kept"), [(3, 2), ("end", 3)])
def test_a_callback_that_raises_leaves_the_checkpoints(call, kept, whole, tmp_path):
    """The run can go on from the last one, to the same end."""
    folder = tmp_path / "run"
    broken, other = Broken(folder, call), Notebook(folder)
    with pytest.raises(ZeroDivisionError, match="the user's own fault"):
        train(CONFIG, folder, callbacks=[other, broken])
    assert broken.error is other.error is ZeroDivisionError
    assert [path.name for path in (folder / "checkpoints").glob("*.*")] == []
    assert find(folder / "checkpoints").rounds == kept
    assert train(CONFIG, folder, resume=True).scores == whole[1].scores


def test_what_is_no_callback_is_refused_before_the_run_is_replaced(whole):
    for wrong in (Notebook, lambda record, moment: None):
        with pytest.raises(UserError, match="^callbacks: .* is not allowed; allowed"):
            train(CONFIG, whole[0].folder, overwrite=True, callbacks=[wrong])
    assert find(whole[0].folder / "checkpoints").rounds == 3


def test_methods_may_be_left_out(whole, tmp_path):
    """The base class does nothing."""
    with runs.Callback() as callback:
        callback.on_round(whole[0].records[0], whole[0].moments[0])
        callback.on_pause(whole[0].moments[0])
        callback.on_end(whole[1])


NAN = math.nan
RECORD = RoundRecord(
    round=3,
    seconds=1 / 3,
    images=40,
    missed=[1],
    left_out=[0, 2],
    train=TrainFigures(2.25, 0.1, 0.7 / 3, 1e-17),
    link=Bytes(2**40 + 1, 0),
    wall_seconds=1e9 + 1 / 7,
    test=Scores(
        0.1,
        0.2,
        (
            ClientResult(0, 1, 0.25, 0.5, NAN, 0.1),
            ClientResult(1, 3, 0.1, 1.0, 2.0, NAN),
        ),
    ),
)


@pytest.mark.parametrize("record", [RECORD, RECORD._replace(test=None, missed=[])])
def test_a_record_survives_json(record):
    """To the last digit; a loss that is not finite is null."""
    line = dumps(record.to_json(), lines=True)
    assert line.count("\n") == 1 and "NaN" not in line
    found = RoundRecord.from_json(json.loads(line))
    np.testing.assert_equal(found, record)
    assert dumps(found.to_json(), lines=True) == line
    if record.test is not None:
        first, second = json.loads(line)["test"]["clients"]
        assert first["exit_loss"] is None and second["server_loss"] is None
        assert first["server_loss"] == 0.1


def test_a_summary_survives_json():
    summary = Summary(
        rounds=3,
        scores=RECORD.test,
        wall_seconds=0.1,
        images_per_second=1 / 3,
        missed_rounds=1,
        left_out_rounds=0,
        device="1 x cpu",
        versions={"jax": "0.10"},
        link=LinkSummary(1, 2.5, [{"cut": 1}]),
        agreement=(
            Agreement((1,), (2,), (3,), (0,)),
            Agreement((6,), (0,), (0,), (0,)),
        ),
    )
    text = dumps(summary.to_json())
    assert "NaN" not in text
    found = Summary.from_json(json.loads(text))
    np.testing.assert_equal(found, summary)
    assert found.to_json() == json.loads(text)


def test_a_round_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    """The configuration, a line of figures, and a checkpoint with all its files."""
    synced, real = [], files.sync_to_disk

    def noted(path):
        assert path.exists()
        synced.append(path.name)
        real(path)

    for module in (files, callbacks, checkpoint_writer):
        monkeypatch.setattr(module, "sync_to_disk", noted)
    train(
        override(CONFIG, rounds=1, eval_every=1, checkpoint_every=1), tmp_path / "run"
    )
    assert synced[:2] == ["run", "metrics.jsonl"]
    assert {"notes.json", "digests.json", "state"} < set(synced)
    assert synced[-1] == "checkpoints"
