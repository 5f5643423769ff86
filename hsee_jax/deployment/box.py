"""A device's folder: the state of its client, and the messages of its last round.

The messages of a round are written before the state after it, so a device that a server
asks again for this round sends them again, and does not train again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hsee_jax.core.errors import UserError
from hsee_jax.core.files import sync_to_disk, sync_tree, writing
from hsee_jax.deployment import digest_file
from hsee_jax.deployment.protocol import (
    Refusal,
    form_of,
    named,
    pack,
    size_limit,
    split,
    tree_from,
    unpack,
)
from hsee_jax.federation.branch import Branch

_RUN, _ABOUT, _STATE, _TEST = "run", "about", "state-", "test"
_OUTBOX, _FINISH = "outbox", "finish"
_read = partial(digest_file.read, field="state")
_write = partial(digest_file.write, field="state")


class DeviceState(NamedTuple):
    """The state of a device between two rounds."""

    client: Branch
    round: int  # the last round that it trained; 0 at the beginning
    since: int  # the last round whose means it has received


class Box:
    """Keeps the files of a device."""

    def __init__(self, folder: Path) -> None:
        """Choose the folder; it is made when something is written."""
        self._folder = folder

    def claim(self, run: str, client: int) -> None:
        """Claim the folder for a client of a run; refuse if it belongs to another.

        Raises:
          UserError: the folder belongs to another run or client, or cannot be written.
        """
        path, own = self._folder / _RUN, f"client {client} of {run}".encode()
        if not path.exists():
            _write(path, own)
        elif _read(path) != own:
            raise UserError(
                f"state: {self._folder} holds the state of another run or client; "
                "allowed is a new folder"
            )

    def put_about(self, values: Mapping[str, Any]) -> None:
        """Keep what the server said of the run."""
        _write(self._folder / _ABOUT, json.dumps(values).encode())

    def about(self) -> bytes:
        """Return what the server last said of the run, as JSON.

        Raises:
          UserError: the file is missing or damaged.
        """
        return _read(self._folder / _ABOUT)

    def rounds(self) -> list[int]:
        """Return the rounds after which a state is kept, the latest last."""
        found = self._folder.glob(f"{_STATE}*")
        numbers = (path.name.removeprefix(_STATE) for path in found)
        return sorted(int(number) for number in numbers if number.isdigit())

    def load(self, like: Branch, number: int) -> DeviceState:
        """Read the state after a round.

        Raises:
          UserError: the file is missing or damaged.
        """
        path, form = self._folder / f"{_STATE}{number}", form_of(like)
        try:
            fields, data = split(
                _read(path), ("round", "since"), limit=size_limit(form)
            )
            client = tree_from(unpack(data, form), like)
        except Refusal as error:
            raise UserError(f"state: {path} cannot be read: {error}") from error
        return DeviceState(client, fields["round"], fields["since"])

    def save(self, state: DeviceState) -> None:
        """Write a state, once the messages of its round are safely on the disk."""
        outbox = self._outbox(state.round)
        if outbox.exists():
            with writing(outbox, "state"):
                sync_tree(outbox)
                sync_to_disk(outbox.parent)
        fields = {"round": state.round, "since": state.since}
        data = pack(fields, named(jax.device_get(state.client)))
        _write(self._folder / f"{_STATE}{state.round}", data)

    def forget(self, number: int) -> None:
        """Remove all states but the last two, and all messages of other rounds."""
        for old in self.rounds()[:-2]:
            (self._folder / f"{_STATE}{old}").unlink(missing_ok=True)
        for outbox in (self._folder / _OUTBOX).glob("*"):
            if outbox.name != str(number):
                shutil.rmtree(outbox, ignore_errors=True)

    def drop(self, number: int) -> None:
        """Remove the states of later rounds, which the server does not count."""
        for later in self.rounds():
            if later > number:
                (self._folder / f"{_STATE}{later}").unlink(missing_ok=True)

    def put(self, number: int, step: int | None, message: bytes) -> None:
        """Keep the message of a step; for step None, the metrics of the end."""
        name = _FINISH if step is None else f"{step:08}"
        _write(self._outbox(number) / name, message, sync=False)

    def messages(self, number: int) -> Iterator[bytes]:
        """Yield the messages of the steps of a round, in order."""
        for path in sorted(self._outbox(number).glob("0*")):
            if path.suffix != ".tmp":
                yield _read(path)

    def finish(self, number: int) -> bytes:
        """Return the metrics of the end of a round."""
        return _read(self._outbox(number) / _FINISH)

    def inputs(self, step: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Return a batch of test inputs, and fetch it if it is not kept here yet.

        Args:
          step: the number of the batch.
          size: rows of all batches but the last; a resumed server may change it.
          fetch: asks the server for the batch.
        """
        path = self._folder / _TEST / str(size) / f"{step:08}"
        if not path.exists():
            _write(path, fetch())
        return _read(path)

    def _outbox(self, number: int) -> Path:
        return self._folder / _OUTBOX / str(number)


def is_device(folder: Path) -> bool:
    """Return whether a folder is the folder of a device."""
    return os.path.isfile(folder / _ABOUT)
