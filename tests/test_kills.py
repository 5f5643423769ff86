"""Processes that are killed right before a change of a file, with kill -9.

One side is killed again and again, in its n-th life before its n-th change of a file in
its folder, until a life outlasts the run; a server before its 3n-th, as it makes more.
The end is that of a run without any kill.
"""

import itertools
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from client_devices import SMALL, small_run

import hsee_jax as hs
from hsee_jax.deployment.enroll import enroll
from hsee_jax.runs.history import read_records

DIES = Path(__file__).with_name("dies.py")
LIMIT_S = 300
# A client has one batch a round.
CONFIG = dict(rounds=2, batch_size=10)
FLAGS = SMALL | CONFIG | dict(eval_every=2, checkpoint_every=2)


class Processes:
    """A server and two devices, each a process that may be killed.

    Attributes:
      run: the folder of the run.
    """

    def __init__(self, folder, port, config):
        self._folder, self._place = folder, f"localhost:{port}"
        self._config, self.run = config, folder / "run"
        self._started = []
        enroll(folder / "keys", clients=2)

    def __enter__(self):
        """Return the processes, of which none is started."""
        return self

    def __exit__(self, *error):
        """End all that are left."""
        for process in self._started:
            process.kill()
            process.wait()

    def serve(self, number=0):
        """Start the server, which goes on if there is a run to go on with."""
        words = ["--listen", self._place, "--keys", f"{self._folder}/keys/server"]
        if (self.run / "config.json").exists():
            words += ["--resume"]
        else:
            words += flags(self._config)
        return self._start(
            "server", number, self.run, "serve", *words, "--out", str(self.run)
        )

    def join(self, i, number=0):
        state = self._folder / f"device-{i}"
        words = [self._place, "--keys", f"{self._folder}/keys/client-{i}"]
        name = f"device-{i}"
        return self._start(name, number, state, "join", *words, "--state", str(state))

    def _start(self, name, number, folder, *words):
        command = [sys.executable, str(DIES), str(number), str(folder), *words]
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._started.append(process)
        return process


def flags(options):
    words = ["demo"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "run"
    hs.train(small_run(**CONFIG), folder)
    return hs.restore(folder).state


@pytest.fixture
def processes(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with Processes(tmp_path, port, FLAGS) as processes:
        yield processes


def lives(start, every=1):
    """Kill a process in each of its lives; return how many it took to end."""
    for number in itertools.count(1):
        status = start(every * number).wait(LIMIT_S)
        if status == 0:
            return number
        assert status == -signal.SIGKILL


def assert_undisturbed(run, simulated):
    jax.tree.map(np.testing.assert_array_equal, hs.restore(run).state, simulated)
    assert [record.missed for record in read_records(run)] == [[], []]


@pytest.mark.slow
def test_a_device_is_killed_before_each_change_of_a_file(processes, simulated):
    server, other = processes.serve(), processes.join(0)
    assert lives(lambda number: processes.join(1, number)) > 10
    assert server.wait(LIMIT_S) == other.wait(LIMIT_S) == 0
    assert_undisturbed(processes.run, simulated)


@pytest.mark.slow
def test_a_server_is_killed_before_each_third_change_of_a_file(processes, simulated):
    devices = [processes.join(i) for i in range(2)]
    assert lives(processes.serve, every=3) > 10
    assert [device.wait(LIMIT_S) for device in devices] == [0, 0]
    assert_undisturbed(processes.run, simulated)


@pytest.mark.slow
def test_server_and_device_are_killed_in_turns(processes, simulated):
    """Each finds a side that knows more, or less, than it does."""
    other = processes.join(0)
    starts = (processes.serve, lambda number: processes.join(1, number))
    numbers = [itertools.count(5, 7), itertools.count(3, 4)]
    alive = [start(next(own)) for start, own in zip(starts, numbers, strict=True)]
    while (statuses := [process.poll() for process in alive]) != [0, 0]:
        assert set(statuses) <= {None, 0, -signal.SIGKILL}
        for n, status in enumerate(statuses):
            if status == -signal.SIGKILL:
                alive[n] = starts[n](next(numbers[n]))
        time.sleep(0.05)
    assert other.wait(LIMIT_S) == 0
    assert_undisturbed(processes.run, simulated)
