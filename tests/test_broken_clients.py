"""`hsee gate` on runs in which some networks are not finite, beside sound ones."""

import functools
import json

import jax
import numpy as np
import pytest
from tiny import TINY, noise_state, write_run

from hsee_jax import cli
from hsee_jax.cli import gate as command
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.inference.client_study import Target
from hsee_jax.inference.study import study as make_study

CONFIG = override(
    preset("demo"),
    **TINY,
    num_clients=3,
    cuts=("1", "3"),  # of clients 0 and 2, and of client 1
    max_train_samples=200,
    max_test_samples=60,
    validation_share=0.25,
)
EVERY = slice(None)


@pytest.fixture(scope="module")
def state():
    return noise_state(CONFIG)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, state):
    """The study of the run with nothing broken."""
    folder = tmp_path_factory.mktemp("sound")
    write_run(folder, CONFIG, state=state)
    return make_study(folder, batch_size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, state):
    """The exit of client 0 and the server of client 1 are broken; client 2 is sound."""
    first, second = state.clients
    first_server, second_server = state.servers
    state = state.replace(
        clients=(first.replace(head=with_nan(first.head, 0)), second),
        servers=(first_server, with_nan(second_server, 0)),
    )
    folder = tmp_path_factory.mktemp("broken")
    write_run(folder, CONFIG, state=state)
    return folder


def with_nan(stack, slot):
    """Put NaN in place of every number of a member of a stack."""
    return jax.tree.map(
        lambda a: a.at[slot].set(np.nan) if a.dtype == np.float32 else a, stack
    )


def gate(folder, *words):
    return cli.main(["gate", str(folder), "--batch-size", "32", *map(str, words)])


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def study(run):
    return make_study(run, batch_size=32)


@pytest.fixture(scope="module")
def found(run, study):
    """What `hsee gate` writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "study", lambda folder, **options: study)
        assert gate(run, "--target-offload", 0.3) == 0
    names = ("curve", "thresholds")
    texts = [(run / "gate" / f"{name}.json").read_text() for name in names]
    return dict(zip(names, map(strict_json, texts), strict=True))


def test_the_others_get_their_thresholds(found, sound):
    first, second, other = found["thresholds"]["clients"]
    before = sound.thresholds(Target("offload", 0.3))["clients"]
    assert other == before[2]
    # The broken exit leaves all to its server.
    assert (first["exit_accuracy"], first["exit_calibration_error"]) == (0, None)
    for figure in ("threshold", "on_device", "validation_on_device"):
        assert first[figure] == 0
    for figure in ("accuracy", "server_accuracy"):
        assert first[figure] == before[0]["server_accuracy"]
    # The exit in front of the broken server is as sure as before.
    assert (second["server_accuracy"], second["server_calibration_error"]) == (0, None)
    for figure in ("threshold", "on_device", "exit_accuracy"):
        assert second[figure] == before[1][figure]
    assert 0 < second["accuracy"] <= second["exit_accuracy"]


def test_the_curve_counts_them(found):
    clients = found["curve"]["clients"]
    for number, point in enumerate(found["curve"]["mean"]):
        own = [client["points"][number] for client in clients]
        for figure in ("accuracy", "on_device", "bytes"):
            assert point[figure] == pytest.approx(np.mean([p[figure] for p in own]))
        assert (point["seconds"] is None) == (number % 5 > 0)
        # It sends every sample at every point, which always takes the same time.
        assert own[0]["on_device"] == 0
        assert own[0]["relative_seconds"] == (None if number % 5 else 1)
        assert own[1]["accuracy"] <= own[1]["on_device"]
    assert own[1]["on_device"] == own[2]["on_device"] == 1
    assert own[2]["relative_seconds"] > 0


def test_the_tables_show_them(found, run):
    page = (run / "gate" / "curve.md").read_text()
    header, _, *rows = [line for line in page.splitlines() if "|" in line][-5:]
    cells = [dict(zip(header.split("|"), row.split("|"), strict=True)) for row in rows]
    for figure, broken in (("exit", 0), ("server", 1)):
        shown = [row[f" {figure} ECE "] == " not finite " for row in cells]
        assert shown == [client == broken for client in range(3)]
        assert cells[broken][f" {figure} accuracy "] == " 0.0000 "


def test_a_target_accuracy_is_that_of_the_sound_clients(study, sound):
    """A broken client gets its most accurate threshold."""
    most = sound.clients[2].held_out.accuracy.max()
    first, second, other = study.thresholds(Target("accuracy", most))["clients"]
    assert other["validation_accuracy"] == pytest.approx(most)
    assert (first["threshold"], first["on_device"]) == (0, 0)
    assert second["validation_accuracy"] == study.clients[1].held_out.accuracy.max()
    with pytest.raises(UserError, match="cannot be reached by client 2 "):
        study.thresholds(Target("accuracy", most + 1e-3))


def test_a_run_without_a_sound_client_has_a_curve(tmp_path, state, monkeypatch, capsys):
    """All samples go to servers that are always wrong; no accuracy can be reached."""
    monkeypatch.setattr(command, "study", functools.cache(make_study))
    clients = tuple(with_nan(stack, EVERY) for stack in state.clients)
    write_run(tmp_path, CONFIG, state=state.replace(clients=clients))
    assert gate(tmp_path, "--target-bytes", 0, "--json") == 0
    shown = strict_json(capsys.readouterr().out)
    for point in shown["curve"]["mean"] + shown["thresholds"]["clients"]:
        assert (point["threshold"], point["accuracy"], point["on_device"]) == (0, 0, 0)
    assert gate(tmp_path, "--target-accuracy", 0.1) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "0.1 cannot be reached by client 0 on the held-out samples" in error
