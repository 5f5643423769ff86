"""Trackers hold the figures of ``metrics.jsonl``, each round once, and never end a run.

Each is read by other means than it was written: CSV and event files by hand, MLflow by
its client, and the files of W&B's offline runs by hand.
"""

import collections
import csv
import functools
import json
import math
import os
import signal
import struct
import sys
import time
from importlib.util import find_spec

import pytest
from tiny import THREE_ROUNDS as CONFIG
from tiny import AfterRound

import hsee_jax as hs
from hsee_jax import cli, tracking
from hsee_jax.runs.history import read_records
from hsee_jax.tracking.bookmark import Bookmark, read_bookmark

WORDS = (
    "--network tiny --plugin tiny --num-clients 2 --cuts 1 --max-train-samples 40 "
    "--max-test-samples 10 --batch-size 20 --rounds 2"
).split()
NAMES = ("csv", "tensorboard", "wandb", "mlflow")


def test_every_tracker_is_tested():
    assert set(NAMES) == {
        name
        for name, entry in tracking.TRACKERS.items()
        if entry.make.__module__.startswith("hsee_jax.")
    }


def by_round(points):
    """Figures by round and name, from triples of them; no two are of one place."""
    found = collections.defaultdict(dict)
    for number, name, value in points:
        assert name not in found[number], (number, name)
        found[number][name] = value
    return dict(found)


def read_csv(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return by_round(
        (int(row["round"]), name, float(text))
        for row in rows
        for name, text in row.items()
        if text and name != "round"
    )


def read_events(folder):
    """Read event files as TensorBoard does: a start drops the rounds from its step."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, an event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[0] < event.step]
            points += [
                (event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
    return by_round(points)


def mlflow_run():
    """The client, and the only run in the store of the environment."""
    from mlflow import MlflowClient

    client = MlflowClient()
    places = [place.experiment_id for place in client.search_experiments()]
    (run,) = client.search_runs(places)
    return client, run


def read_mlflow(folder):
    client, run = mlflow_run()
    return by_round(
        (point.step, name, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )


def wandb_records(folder):
    """Read all records of W&B, which may write the last ones after it has finished."""
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        until = time.monotonic() + 10
        while not any(record.HasField("exit") for record in wandb_file(path)):
            assert time.monotonic() < until, f"{path} has no end"
            time.sleep(0.01)
        yield from wandb_file(path)


def wandb_file(path):
    """Read a file of W&B: blocks of 32 KiB that hold records in one or more pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, pieces = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:  # too little for a header
            at += left
        _, length, kind = struct.unpack_from("<IHB", content, at)
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if at > len(content):  # not yet written
            return
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(pieces)
            pieces = b""


def read_wandb(folder):
    return by_round(
        (record.history.step.num, item.key or item.nested_key[0], value)
        for record in wandb_records(folder)
        if record.HasField("history")
        for item in record.history.item
        if not (item.key or item.nested_key[0]).startswith("_")
        for value in [json.loads(item.value_json)]
    )


READERS = {
    "csv": read_csv,
    "tensorboard": read_events,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


@pytest.fixture(autouse=True)
def stores(tmp_path, monkeypatch):
    """Nothing leaves this machine, or the folder of the test."""
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def names():
    """The trackers whose libraries are installed."""
    return [n for n in NAMES if n not in PACKAGES or find_spec(PACKAGES[n])]


def trackers(names, folder):
    return [tracking.TRACKERS.make(name, folder) for name in names]


def bookmarks(names, folder):
    return [read_bookmark(folder / "tracking" / f"{name}.json") for name in names]


def assert_holds_the_log(name, folder, leave_out=()):
    found = READERS[name](folder)
    records = read_records(folder)
    assert sorted(found) == [record.round for record in records], name
    close = functools.partial(pytest.approx, rel=1e-6 if name == "tensorboard" else 0)
    for record in records:
        figures = record.scalars()
        assert found[record.round].keys() == figures.keys(), name
        for key in figures.keys() - set(leave_out):
            assert found[record.round][key] == close(figures[key]), (name, key)


def test_trackers_hold_the_figures_of_the_log(names, tmp_path):
    folder = tmp_path / "run"
    hs.train(CONFIG, folder, callbacks=trackers(names, folder))
    for name in names:
        assert_holds_the_log(name, folder)
    assert {bookmark.rounds for bookmark in bookmarks(names, folder)} == {3}


def fail_at(number):
    def fail(record):
        if record.round == number:
            raise ZeroDivisionError

    return AfterRound(fail)


def test_a_resumed_run_repeats_no_round(names, tmp_path, caplog):
    """Killed in the last of three rounds, behind the trackers; a checkpoint has two."""
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        hs.train(CONFIG, folder, callbacks=[*trackers(names, folder), fail_at(3)])
    caplog.clear()
    before = bookmarks(names, folder)
    assert {bookmark.rounds for bookmark in before} == {3}
    hs.train(CONFIG, folder, resume=True, callbacks=trackers(names, folder))
    for name in names:
        # W&B and MLflow keep what they got first, with the speed of the first try.
        assert_holds_the_log(name, folder, leave_out=["images_per_second"])
    assert "keeps its figures" not in caplog.text
    assert bookmarks(names, folder) == before


def test_kept_figures_of_other_learning_rates_are_told(names, tmp_path, caplog):
    """W&B and MLflow do not give up rounds that are trained again, with other rates."""
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        hs.train(CONFIG, folder, callbacks=[*trackers(names, folder), fail_at(3)])
    longer = hs.override(CONFIG, rounds=4)
    hs.train(longer, folder, resume=True, callbacks=trackers(names, folder))
    told = [line.split()[1] for line in caplog.messages if "keeps its figures" in line]
    assert told == [name for name in names if name in ("wandb", "mlflow")]
    assert all("rounds 3 to 3," in m for m in caplog.messages if "keeps" in m)
    for name in set(names) - set(told):
        assert_holds_the_log(name, folder)
    assert {bookmark.planned for bookmark in bookmarks(names, folder)} == {4}


def test_trackers_get_the_rounds_that_they_lack(names, tmp_path):
    """They are chosen only when all rounds are over."""
    folder = tmp_path / "run"
    hs.train(CONFIG, folder)
    hs.train(CONFIG, folder, resume=True, callbacks=trackers(names, folder))
    for name in names:
        assert_holds_the_log(name, folder)


def test_events_appear_while_a_run_trains(tmp_path):
    pytest.importorskip("tensorboardX")
    folder, seen = tmp_path / "run", []

    def look(record):
        seen.append(sorted(read_events(folder)))

    callbacks = [hs.tracking.tensorboard(folder), AfterRound(look)]
    hs.train(CONFIG, folder, callbacks=callbacks)
    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_tensorboard_reads_the_events(tmp_path):
    """TensorBoard's own reader, also after a crash."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        callbacks = [hs.tracking.tensorboard(folder), fail_at(3)]
        hs.train(CONFIG, folder, callbacks=callbacks)
    hs.train(CONFIG, folder, resume=True, callbacks=[hs.tracking.tensorboard(folder)])
    reader = accumulator.EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    for name, value in read_records(folder)[-1].scalars().items():
        points = reader.Scalars(name)
        assert [p.step for p in points] == ([2, 3] if "test" in name else [1, 2, 3])
        assert points[-1].value == pytest.approx(value, rel=1e-6)
    config, summary = (
        reader.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for tag in ("config", "summary")
    )
    assert "| batch_size | 6 |" in config
    assert json.loads(summary.strip("`json\n"))["rounds"] == 3


def test_mlflow_knows_the_configuration_and_the_end(tmp_path):
    pytest.importorskip("mlflow")
    folder = tmp_path / "run"
    with pytest.raises(hs.Stopped):
        callbacks = [hs.tracking.mlflow(folder)]
        hs.train(CONFIG, folder, callbacks=callbacks, stop=lambda: True)
    assert mlflow_run()[1].info.status == "KILLED"
    hs.train(CONFIG, folder, resume=True, callbacks=[hs.tracking.mlflow(folder)])
    _, run = mlflow_run()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["learning_rate"] == str(CONFIG.optim.learning_rate)
    assert run.data.params["cuts"] == "1 2"
    (artifact,) = (tmp_path / "mlruns").rglob("artifacts/summary.json")
    summary = (folder / "summary.json").read_text()
    assert json.loads(artifact.read_text()) == json.loads(summary)


def test_wandb_knows_the_configuration_and_the_summary(tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    hs.train(CONFIG, folder, callbacks=[hs.tracking.wandb(folder)])
    config, summary = {}, {}
    for record in wandb_records(folder):
        if record.HasField("run"):
            run = record.run
        for kept, changes in (
            (config, [*record.run.config.update, *record.config.update]),
            (summary, record.summary.update),
        ):
            for item in changes:
                name = item.key or "/".join(item.nested_key)
                kept[name] = json.loads(item.value_json)
    assert (run.project, run.display_name) == ("hsee-jax", "run")
    assert (config["batch_size"], config["cuts"]) == (6, ["1", "2"])
    assert summary["rounds"] == 3


class Notes(tracking.Tracker):
    """Notes what it gets, and fails at a call of its choice."""

    def __init__(self, folder, fails=None):
        super().__init__(folder)
        self.name, self.fails, self.calls = f"fails_{fails}", fails, []

    def note(self, call):
        self.calls.append(call)
        if call == self.fails:
            raise RuntimeError("no\nconnection")

    def open(self, experiment, bookmark, rounds):
        self.note("open")
        return bookmark

    def log(self, record):
        self.note(record.round)

    def finish(self, summary):
        self.note("finish")

    def close(self, error):
        self.note("close")
        self.error = error


FAILURES = {
    "open": ["open", "close"],
    2: ["open", 1, 2, "close"],
    "finish": ["open", 1, 2, 3, "finish", "close"],
    "close": ["open", 1, 2, 3, "finish", "close", "close"],
    None: ["open", 1, 2, 3, "finish", "close"],
}


def test_a_tracker_that_fails_warns_once_and_lacks_no_round_later(tmp_path, caplog):
    folder = tmp_path / "run"
    notes = [Notes(folder, fails) for fails in FAILURES]
    assert hs.train(CONFIG, folder, callbacks=notes).rounds == 3
    assert {one.fails: one.calls for one in notes} == FAILURES
    for fails in FAILURES:
        start = f"track: fails_{fails} failed (RuntimeError: no connection)"
        found = [text for text in caplog.messages if text.startswith(start)]
        assert len(found) == (fails is not None)

    later = [Notes(folder, fails) for fails in FAILURES]
    for one in later:
        one.fails = None
    hs.train(CONFIG, folder, resume=True, callbacks=later)
    for one, fails in zip(later, FAILURES, strict=True):
        lacking = {"open": [1, 2, 3], 2: [2, 3]}.get(fails, [])
        assert one.calls == ["open", *lacking, "finish", "close"]


def test_a_tracker_is_told_what_ended_a_run(tmp_path):
    notes = Notes(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        hs.train(CONFIG, tmp_path / "run", callbacks=[notes, fail_at(1)])
    assert notes.error is ZeroDivisionError


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr("hsee_jax.tracking.tracker.is_first", lambda: False)
    notes = Notes(tmp_path)
    with notes:
        notes.on_start(None)
        notes.on_round(None, None)
        notes.on_end(None)
    assert notes.calls == []
    assert not (tmp_path / "tracking").exists()


def test_a_damaged_bookmark_is_an_empty_one(tmp_path):
    for text in ("", "[]", "{}", '{"run_id": "a"}', '{"run_id": "a", "rounds": null}'):
        (tmp_path / "mark.json").write_text(text)
        assert read_bookmark(tmp_path / "mark.json") == Bookmark()


def test_csv_has_a_column_for_each_figure_and_nan_is_a_number(tmp_path):
    folder = tmp_path / "run"
    hs.train(CONFIG, folder, callbacks=[hs.tracking.csv(folder)])
    header, first, *_ = (folder / "metrics.csv").read_text().splitlines()
    last = read_records(folder)[-1]
    assert header.split(",") == ["round", *last.scalars()]
    assert first.endswith(",,")  # the first round is not evaluated

    tracker = hs.tracking.csv(folder)
    tracker.open(None, Bookmark(), 0)
    train = last.train._replace(exit_loss=math.nan)
    tracker.log(last._replace(round=1, train=train))
    assert math.isnan(read_csv(folder)[1]["train/exit_loss"])


def test_the_command_tracks(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "run"
    words = ["train", *WORDS, "--out", str(folder)]
    assert cli.main([*words, "--track", "csv", "tensorboard", "csv"]) == 0
    for name in ("csv", "tensorboard"):
        assert_holds_the_log(name, folder)
    assert cli.main([*words, "--overwrite"]) == 0
    left = {path.name for path in folder.iterdir()}
    assert not left & {"metrics.csv", "tensorboard", "tracking"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_library_is_told_before_training(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    assert cli.main(["train", *WORDS, "--track", "csv", name]) == 2
    out, err = capsys.readouterr()
    expected = f"{name}: needs a package; `pip install 'hsee-jax[{name}]'`"
    assert (out, err) == ("", f"hsee: {expected}\n")
    assert not list(os.scandir())


def test_an_unknown_tracker_is_one_line(capsys):
    assert cli.main(["train", *WORDS, "--track", "cvs"]) == 2
    assert "track: cvs is unknown (did you mean csv?)" in capsys.readouterr().err


PLUGIN = '''
import hsee_jax as hs

class Printer(hs.runs.Callback):
    def on_round(self, record, moment):
        print("printer:", record.round)

@hs.tracking.register
def printer(folder):
    """A line for each round."""
    return Printer()
'''


def test_a_plugin_adds_a_tracker(tmp_path, monkeypatch, capsys):
    (tmp_path / "tracking_plugin.py").write_text(PLUGIN)
    words = ["train", *WORDS, "--plugin", "tiny", "tracking_plugin"]
    try:
        assert cli.main([*words, "--help"]) == 0
        assert "printer: A line for each round." in capsys.readouterr().out
        assert cli.main([*words, "--out", "run", "--track", "printer"]) == 0
    finally:
        tracking.TRACKERS._entries.pop("printer", None)
        sys.modules.pop("tracking_plugin", None)
    assert "printer: 1\nprinter: 2\n" in capsys.readouterr().out


def test_a_signal_still_stops_with_a_checkpoint(names, tmp_path, monkeypatch, capsys):
    """W&B and MLflow leave the handlers as they are."""
    run_round = hs.Experiment.run_round

    def tell(experiment, state, begun=None, stop=None):
        os.kill(os.getpid(), signal.SIGTERM)
        return run_round(experiment, state, begun, stop)

    monkeypatch.setattr(hs.Experiment, "run_round", tell)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    words = ["train", *WORDS, "--out", "run", "--track", *names]
    assert cli.main(words) == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    err = capsys.readouterr().err
    assert "track:" not in err and "--resume --out run continues it" in err
    assert (tmp_path / "run" / "checkpoints").exists()
