"""A device and its files: where it goes on, and what it never throws away."""

import json
import sys

import jax
import numpy as np
import pytest
from client_devices import small_run

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data import write_npz
from hsee_jax.deployment.box import Box, DeviceState
from hsee_jax.deployment.device import Changed, Device
from hsee_jax.deployment.digest_file import read, write
from hsee_jax.deployment.forms import Kind, Layers
from hsee_jax.deployment.protocol import Refusal, digest, pack
from hsee_jax.deployment.take_part import take_part
from hsee_jax.runs.material import shares
from hsee_jax.runs.participant import LEAST, build_participant
from hsee_jax.runs.served import build_served, describe

DATA = Dataset(np.zeros((10, 28, 28, 1), np.uint8), np.zeros(10, np.int32))


@pytest.fixture(scope="module")
def experiment():
    return build_served(small_run())


@pytest.fixture(scope="module")
def layers(experiment):
    return jax.tree.map(lambda leaf: leaf[0], experiment.init().clients[0])


@pytest.fixture
def box(tmp_path, layers):
    """The files of a device that trained rounds 8 and 9."""
    box = Box(tmp_path)
    for number in (8, 9):
        box.save(DeviceState(layers, number, number))
    return box


def device(experiment, box, *tasks, layers=Layers.NONE):
    """A device whose server gives it these tasks: kind, round, last round."""
    answers = iter(tasks)

    def call(method, message):
        assert method == "next"
        kind, number, last = next(answers)
        return pack(
            dict(kind=kind, round=number, layers=layers, last=last, means=0, about=7)
        )

    part = build_participant(describe(experiment, 0))
    return Device(part, DATA, box, call, about=7)


def run(device):
    return device.run(lambda: False)


@pytest.mark.parametrize("task", [(Kind.TRAIN, 6, 5), (Kind.END, 0, 7)])
def test_no_state_is_thrown_away_for_a_server_that_is_behind(experiment, box, task):
    with pytest.raises(UserError, match="the state here is of round 9; allowed is"):
        run(device(experiment, box, task))
    assert box.rounds() == [8, 9]


def test_a_round_that_does_not_count_is_dropped(experiment, box):
    one = device(experiment, box, (Kind.TRAIN, 10, 8), (Kind.END, 10, 8))
    assert run(one)
    assert one.state.round == 8 and box.rounds() == [8]


def test_a_state_that_is_older_than_the_server_knows_goes_on(experiment, box, caplog):
    one = device(experiment, box, (Kind.WAIT, 0, 0), (Kind.END, 12, 11))
    assert run(one) and one.state.round == 9
    assert "the server counts round 11, the state here is of 9" in caplog.text


@pytest.mark.parametrize(("kind", "asked"), [(9, Layers.NONE), (Kind.WAIT, -1)])
def test_a_task_that_does_not_exist_is_refused(experiment, box, kind, asked):
    with pytest.raises(Refusal, match="^(kind: 9|layers: -1); allowed are 0, 1, 2"):
        run(device(experiment, box, (kind, 9, 9), layers=asked))


def refused(answer, folder):
    with pytest.raises(UserError, match="server: sends what is not allowed: join: "):
        take_part(lambda method, message: answer, folder, None, (), bool)


@pytest.mark.parametrize(
    "answer", [b"", b"{", b"\xff", b"[" * 99999, b"{}", b"[]", b"5", b'{"run": "one"}']
)
def test_a_server_that_does_not_describe_the_run_is_refused(answer, tmp_path):
    refused(answer, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in LEAST for value in (-1, True, "1", None)),
        *({name: value} for name in ("config", "info") for value in (1, [], None)),
        *({"config": {"run": run}} for run in (5, "ab", {"plugin": 5})),
        {"config": {"run": {"plugin": [{}]}}},
        {"run": 1},
    ],
    ids=str,
)
def test_a_description_with_a_damaged_value_is_refused(changes, experiment, tmp_path):
    answer = {"run": "a run"} | describe(experiment, 0) | changes
    refused(json.dumps(answer).encode(), tmp_path)


def test_a_cut_behind_the_last_layer_is_refused(experiment):
    with pytest.raises(UserError, match="cuts: 99 "):
        build_participant(describe(experiment, 0) | {"cut": 99})


def test_a_device_joins_again_if_the_run_goes_on_in_another_way(
    experiment, tmp_path, monkeypatch
):
    runs = [
        {"run": "a run"} | describe(experiment, 0) | {"test_samples": n} for n in (1, 2)
    ]
    answers, built = iter(runs), []

    class Stub:
        def __init__(self, part, data, box, call, *, about):
            built.append((part.test_samples, about))

        def run(self, stop):
            if len(built) == 1:
                raise Changed
            return True

    monkeypatch.setattr(sys.modules[take_part.__module__], "Device", Stub)
    call = lambda method, message: json.dumps(next(answers)).encode()  # noqa: E731
    assert take_part(call, tmp_path, None, (), bool)
    assert built == [(n, digest(run)) for n, run in zip((1, 2), runs, strict=True)]


@pytest.mark.parametrize("named", [True, False])
def test_a_share_is_read_from_the_folder_of_the_device(named, tmp_path, monkeypatch):
    """Which --data-dir names, or else its own TFDS_DATA_DIR; the server's is secret."""
    there, here = tmp_path / "alice", tmp_path / "pi"
    x, y = np.arange(120, dtype=np.float32).reshape(30, 4), np.arange(30) % 3
    write_npz(there, (x, y, x[:6], y[:6]))
    config = small_run(dataset="npz", data_dir=str(there))
    expected = shares(config)[0]
    about = json.dumps({"run": "a run"} | describe(build_served(config), 0))
    assert "alice" not in about
    there.rename(here)
    own = []

    class Stub:
        def __init__(self, part, data, box, call, *, about):
            own.append(data)

        def run(self, stop):
            return True

    monkeypatch.setattr(sys.modules[take_part.__module__], "Device", Stub)
    if not named:
        monkeypatch.setenv("TFDS_DATA_DIR", str(here))
    place = str(here) if named else None
    call = lambda method, message: about.encode()  # noqa: E731
    assert take_part(call, tmp_path / "state", None, (), bool, data_dir=place)
    jax.tree.map(np.testing.assert_array_equal, own, [expected])


def test_a_folder_belongs_to_one_client_of_one_run(tmp_path):
    Box(tmp_path).claim("a run", 0)
    Box(tmp_path).claim("a run", 0)
    for other in (("a run", 1), ("another", 0)):
        with pytest.raises(UserError, match="state of another run or client"):
            Box(tmp_path).claim(*other)


def test_a_state_comes_back_bit_for_bit(box, layers):
    state = box.load(layers, 9)
    assert (state.round, state.since) == (9, 9)
    jax.tree.map(np.testing.assert_array_equal, state.client, layers)


def test_a_damaged_state_is_refused(box, layers, tmp_path):
    path = tmp_path / "state-9"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="state-9 is damaged"):
        box.load(layers, 9)


def test_old_rounds_are_forgotten(box, layers):
    for number in (9, 10):
        box.put(number, 0, b"first")
        box.put(number, None, b"last")
    box.save(DeviceState(layers, 10, 9))
    box.forget(10)
    assert box.rounds() == [9, 10]
    assert list(box.messages(10)) == [b"first"] and box.finish(10) == b"last"
    assert list(box.messages(9)) == []


def test_test_inputs_are_fetched_once_for_each_size_of_a_batch(box):
    def fetch(content):
        return lambda: content

    assert box.inputs(1, 10, fetch(b"ten")) == b"ten"
    assert box.inputs(1, 5, fetch(b"five")) == b"five"
    assert box.inputs(1, 10, fetch(b"again")) == b"ten"


def test_a_disk_that_is_full_when_it_is_synced_is_said_in_a_line(
    box, layers, monkeypatch
):
    def full(_):
        raise OSError(28, "No space left on device")

    box.put(10, 0, b"features")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="^state: .* cannot be written: No space"):
        box.save(DeviceState(layers, 10, 10))


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, b"old", "state")

    def full(*_):
        raise OSError("full")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(UserError, match="^state: .*file cannot be written: full$"):
        write(path, b"new", "state")
    assert read(path, "state") == b"old"
