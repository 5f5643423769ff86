"""A Flower federation on this machine: a SuperLink, and a SuperNode for each client."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from hsee_jax.data.npz import write_shard

BIN = Path(sys.executable).parent
TESTS = str(Path(__file__).parent)  # plugins of nodes are there
MARK = "HSEE_FLOWER_TEST"  # in the environment of all processes
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
INSTALL = "--disable-runtime-dependency-installation"


class Federation:
    """Starts processes in a folder, and ends all of them, also those that they start.

    Attributes:
      folder: of everything that they write.
    """

    def __init__(self, folder):
        self.folder, self._port, self._started = folder, free_port(), []
        self._env = (
            os.environ
            | QUIET
            | {
                MARK: str(folder),
                "FLWR_HOME": str(folder / "flwr"),
                "PATH": joined(str(BIN), os.environ["PATH"]),
                "PYTHONPATH": joined(TESTS, os.environ.get("PYTHONPATH", "")),
                "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                    "JAX_COMPILATION_CACHE_DIR", str(folder / "compiled")
                ),
            }
        )

    @classmethod
    @contextmanager
    def start(cls, folder):
        """Start the SuperLink; at the end, leave no process behind."""
        federation = cls(folder)
        try:
            federation.start_link()
            yield federation
        finally:
            federation.end()

    def start_link(self):
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        words = ["--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--database", str(self.folder / "superlink.db")]
        self._start("superlink", "flower-superlink", "--insecure", INSTALL, *words)
        self.wait_for(lambda: connects(self._port))

    def end(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.kill(number)
            end = time.monotonic() + 20
            while self.processes() and time.monotonic() < end:
                time.sleep(0.2)
        assert not self.processes()
        for process in self._started:
            process.wait()

    def start_node(self, i, share, **settings):
        """Start the SuperNode of a client, with a file of its samples."""
        data = self.folder / f"data-{i}.npz"
        write_shard(data, share)
        settings = {"partition-id": i, "state": f"{self.folder}/device-{i}"} | settings
        settings["data"] = str(data)
        words = ["--superlink", f"127.0.0.1:{self._port}", "--host", "127.0.0.1"]
        words += ["--port", str(free_port()), "--node-config"]
        words += [settings_of(settings)]
        return self._start(f"node-{i}", "flower-supernode", "--insecure", *words)

    def run(self, app, limit, **changes):
        """Run an app to its end; returns what its server logs."""
        process = self.begin(app, **changes)
        process.wait(limit)
        return self.log("run")

    def begin(self, app, **changes):
        """Run an app; its server logs to ``run.log``."""
        words = ["run", str(app), "here", "--stream"]
        if changes:
            words += ["--run-config", settings_of(changes)]
        return self._start("run", "flwr", *words)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def processes(self, word=""):
        """The ids of all processes of this federation whose command has a word."""
        found, mark = [], f"{MARK}={self.folder}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                marked = mark in (path / "environ").read_bytes().split(b"\0")
                command = (path / "cmdline").read_bytes().decode()
            except OSError:
                continue
            if marked and word in command and command:
                found.append(int(path.name))
        return found

    def kill(self, number, word=""):
        for process in self.processes(word):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    def _start(self, name, program, *words):
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [BIN / program, *words],
                env=self._env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def wait_for(self, ready):
        """Wait until a function returns true."""
        end = time.monotonic() + 600
        while not ready():
            assert time.monotonic() < end, self.log("superlink")
            time.sleep(0.2)


def joined(*folders):
    return os.pathsep.join(filter(None, folders))


def settings_of(values):
    return " ".join(f"{name}={toml(value)}" for name, value in values.items())


def toml(value):
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def connects(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
