"""The seconds that a run notes and that a gate measures, on clocks set by hand."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import THREE_ROUNDS

from hsee_jax import runs
from hsee_jax.config import override
from hsee_jax.core import Stopped
from hsee_jax.inference import measurement
from hsee_jax.inference.calibration import Judgement, Scores, offload_curve
from hsee_jax.inference.client_study import TIMED_OFFLOADS
from hsee_jax.runs.records import images_per_second


def test_images_per_second_are_those_of_the_median_round():
    """The first round compiles; medians of 20 images and 2 seconds."""
    rounds = [(30, 900.0), (20, 2.0), (10, 1.0), (20, 4.0), (20, 2.0)]
    records = [SimpleNamespace(images=i, seconds=s) for i, s in rounds]
    assert images_per_second(records) == 10


def test_the_seconds_of_a_sample_are_the_median_of_calls(monkeypatch):
    """On 8 samples; the calls that compile and a slow one do not count."""
    doubts = np.linspace(0.05, 0.95, 10)
    fine = Judgement(np.ones(10, bool), np.ones(10))
    thresholds = np.array([0.0, 0.275, 0.525, 0.775, 1.0])
    curve = offload_curve(Scores(doubts, fine, fine), thresholds)
    now, calls = [0.0], []

    def answer(inputs, threshold):
        calls.append(threshold)
        number = calls.count(threshold)
        now[0] += 8 * (2.0 - threshold) + {1: 1000.0, 3: 50.0}.get(number, 0.0)

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    found = measurement._seconds(answer, curve, np.zeros((8, 3)))
    assert list(found) == list(TIMED_OFFLOADS) == [1.0, 0.75, 0.5, 0.25, 0.0]
    # Of ten samples 10, 7, 5, 2 and 0 have a doubt above the thresholds.
    expected = [2.0 - threshold for threshold in thresholds]
    assert list(found.values()) == pytest.approx(expected)


def test_a_round_that_was_stopped_keeps_the_seconds_it_took(tmp_path):
    """As the checkpoint in the middle of the round notes them."""
    config, folder = override(THREE_ROUNDS, rounds=1), tmp_path / "run"
    asked = iter([False, True])
    with pytest.raises(Stopped):
        runs.train(config, folder, stop=lambda: next(asked))
    (checkpoint,) = (folder / "checkpoints").glob("0-*")
    path, digests = checkpoint / "notes.json", checkpoint / "digests.json"
    notes = json.loads(path.read_text())
    assert 0 < notes["seconds"] <= notes["wall_seconds"]
    notes |= {"seconds": 1e4, "wall_seconds": 3e4}
    path.write_text(json.dumps(notes))
    known = json.loads(digests.read_text())
    known["notes.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    digests.write_text(json.dumps(known))
    runs.train(config, folder, resume=True)
    (record,) = runs.read_history(folder).records
    assert 1e4 < record.seconds < 1.1e4
    assert 3e4 < record.wall_seconds < 3.1e4
