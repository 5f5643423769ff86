"""Devices as processes on this machine, to try out a run over a network."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data.npz import write_shard

_END_S = 15.0  # for a process to end by itself


class LocalDevices:
    """Starts a process for each client, with a file of its samples."""

    def __init__(self, folder: Path) -> None:
        """Choose the run's folder, in which each device gets a folder of its own."""
        self._folder = folder / "devices"
        self._processes: dict[int, subprocess.Popen] = {}

    @contextlib.contextmanager
    def started(
        self, port: int, shares: Sequence[Dataset], words: Sequence[str]
    ) -> Iterator[None]:
        """Run the devices of all clients.

        Args:
          port: of the server on this machine.
          shares: the samples of each client.
          words: further words of each command line.
        """
        try:
            for i, share in enumerate(shares):
                self._processes[i] = self._start(i, port, share, words)
            yield
            self._wait()
        finally:
            for process in self._processes.values():
                process.terminate()
            self._wait()

    def check(self) -> None:
        """Refuse to go on without a device.

        Raises:
          UserError: the process of a device has failed.
        """
        for i, process in self._processes.items():
            if process.poll():
                raise UserError(
                    f"local: the process of client {i} has ended with status "
                    f"{process.returncode}; {self._log(i)} says why"
                )

    def _start(
        self, i: int, port: int, share: Dataset, words: Sequence[str]
    ) -> subprocess.Popen:
        folder = self._log(i).parent
        write_shard(folder / "data.npz", share)
        command = [sys.executable, "-m", "hsee_jax", "join", f"127.0.0.1:{port}"]
        command += ["--client", str(i), "--data", str(folder / "data.npz")]
        command += ["--state", str(folder / "state"), "--end-with-input", *words]
        with self._log(i).open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # ends with this process, even by kill -9
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the server, which ends them
            )

    def _log(self, i: int) -> Path:
        return self._folder / f"client-{i}" / "log.txt"

    def _wait(self) -> None:
        for process in self._processes.values():
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
