"""Two processes that really run, against one."""

import json
import re
import socket
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from tiny import TINY

from hsee_jax import runs
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.parallel.processes import in_first, join

CODE = """
import sys
sys.path.insert(0, {tests!r})
import hsee_jax.cli
sys.exit(hsee_jax.cli.main(sys.argv[1:]))
"""
FLAGS = {
    **TINY,
    "num_clients": 5,
    "cuts": ("1", "2"),
    "max_train_samples": 90,
    "max_test_samples": 30,
    "batch_size": 8,
    "eval_every": 1,
    "checkpoint_every": 1,
    "augment": "crop_flip",
    "schedule": "constant",
    "partition": "quantity",
    "participation": 0.7,
}


def words(**flags):
    for name, value in flags.items():
        yield f"--{name.replace('_', '-')}"
        yield from map(str, value if isinstance(value, tuple) else [value])


def start(tmp_path, request, count, **flags):
    """Starts the processes of a run, with two fake devices each, and waits."""
    code = CODE.format(tests=str(request.path.parent))
    place = f"localhost:{free_port()}"
    common = words(**FLAGS, **flags, coordinator=place, num_processes=count)
    command = [sys.executable, "-c", code, "train", "demo", *common]
    return ended([*command, *words(process_id=index)] for index in range(count))


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def ended(commands):
    """Starts processes at once, and waits for what they print and their status."""
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    return [(*process.communicate(timeout=240), process.wait()) for process in started]


ASKED = """
import sys
sys.path.insert(0, {tests!r})
from hsee_jax.parallel import join
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
join("localhost:" + port, 2, index)
import hsee_jax as hs
config = hs.override(hs.preset("demo"), **{flags!r}, rounds=3)
asked = []

def stop():
    asked.append(None)
    return index == 1 and len(asked) > 1

try:
    hs.train(config, folder, stop=stop)
except hs.core.Stopped as stopped:
    print("stopped", stopped.rounds, stopped.steps)
from pathlib import Path
print("latest", sorted(path.name for path in Path(folder, "checkpoints").iterdir())[-1])
"""


def lines_of(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "strategy", ["averaging", pytest.param("sequential", marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(tmp_path, request, monkeypatch, strategy):
    """Also that a run of two goes on in one, and that only the first writes logs."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    config = override(preset("demo"), **FLAGS, strategy=strategy, rounds=3)
    alone = runs.train(config, tmp_path / "alone")
    two = tmp_path / "two"
    results = start(tmp_path, request, 2, out=two, strategy=strategy, rounds=2)
    for _, error, status in results:
        assert status == 0, error
    assert "round 2/2" in results[0][1]
    assert "client" in results[0][0]
    lines = results[1][0].splitlines()
    # Gloo's threads print too, into each other's lines, down to a number alone
    ours = (line for line in lines if not line.startswith("[Gloo]"))
    ours = (line for line in ours if re.search("[A-Za-z]", line))
    assert [line for line in ours if "peer ranks" not in line] == []
    assert "round" not in results[1][1]

    summary = json.loads((two / "summary.json").read_text())
    assert summary["device"] == "4 x cpu"
    assert len(lines_of(two)) == 2
    shares = (two / "partition.json").read_text()
    assert shares == (tmp_path / "alone" / "partition.json").read_text()
    runs.train(config, two, resume=True)
    resumed, expected = lines_of(two), lines_of(tmp_path / "alone")
    assert len(resumed) == len(expected) == 3
    for one, other in zip(resumed, expected, strict=True):
        assert one["images"] == other["images"]
        for name, value in other["train"].items():
            np.testing.assert_allclose(one["train"][name], value, rtol=1e-3)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-3), one["test"], other["test"]
        )
    assert len(alone.scores.clients) == len(summary["clients"]) == 5


@pytest.mark.slow
def test_processes_stop_together_though_one_is_asked_to(tmp_path, request, monkeypatch):
    """And all find the checkpoint whole, which only the first one names."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    tests, port = str(request.path.parent), str(free_port())
    code = ASKED.format(tests=tests, flags=FLAGS)
    command = [sys.executable, "-c", code, port]
    results = ended([*command, str(i), str(tmp_path / "run")] for i in range(2))
    for out, error, status in results:
        assert status == 0, error
        lines = [line.split() for line in out.splitlines()]
        ((_, rounds, steps),) = (words for words in lines if words[:1] == ["stopped"])
        place = rounds if steps == "0" else f"{rounds}-{steps}"
        assert ["latest", place] in lines
        assert int(rounds) < 3


def test_all_processes_refuse_a_folder_that_is_taken(tmp_path, request):
    (tmp_path / "file").write_text("")
    results = start(tmp_path, request, 2, out=tmp_path, rounds=1)
    assert [status for _, _, status in results] == [2, 2]
    assert "is neither empty nor a run" in results[0][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 2, None), "process_id: missing"),
        (("localhost:1", None, 0), "num_processes: missing"),
        ((None, 2, 0), "coordinator: missing"),
        (("auto", 2, None), "num_processes: is not allowed with --coordinator auto"),
        (("auto", None, 0), "process_id: is not allowed with --coordinator auto"),
        (("localhost", 2, 0), "coordinator: localhost is not allowed"),
        (("localhost:1", 0, 0), "num_processes: 0 is not allowed"),
        (("localhost:1", 2, 2), r"process_id: 2 is not allowed; allowed are 0\.\.1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        join(*arguments)


@pytest.mark.parametrize("error", [UserError("run: no"), OSError("no space left")])
def test_an_error_in_the_first_process_ends_the_others(error, monkeypatch):
    sent = []

    def act():
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", sent.append)
    with pytest.raises(type(error), match=str(error)):
        in_first(act)

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: sent[0])
    with pytest.raises(UserError, match="the first process says why"):
        in_first(pytest.fail)
