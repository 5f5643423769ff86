"""What a server must know to go on after any round: its checkpoints, and the devices.

A checkpoint is written after every round, before the next round opens; devices keep
the messages of their last round, so nothing more can be lost. A round without a
checkpoint of the run gets one here, with the clients' layers that the server saw last.
"""

import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import jax
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.deployment.digest_file import read, write
from hsee_jax.deployment.forms import mean_shapes
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
from hsee_jax.federation.state import Means
from hsee_jax.runs.callbacks import Callback, Moment
from hsee_jax.runs.checkpoint_writer import Writer
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.records import RoundRecord
from hsee_jax.runs.start import check_devices, devices_after

FOLDER = "deployment"
CHECKPOINTS = f"{FOLDER}/rounds"
_KEPT = 2  # rounds


class Journal(Callback):
    """Keeps what a server knows of its devices, and a checkpoint after each round.

    Attributes:
      run: the id of the run.
      last: the last round of each client that counts.
      means: the latest mean of each layer that devices hold, on the host.
    """

    def __init__(self, folder: Path) -> None:
        """Choose the run's folder."""
        self._folder = folder / FOLDER
        self._rounds = folder / CHECKPOINTS
        self._writer = Writer(self._rounds, keep=_KEPT)
        self._number: int | None = None  # the round after which `last` and `means` hold
        self.run, self.last, self.means = "", dict[int, int](), Means()

    def __enter__(self) -> "Journal":
        """Open the folder of the checkpoints."""
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the last checkpoint."""
        self._writer.__exit__(kind, error, traceback)

    def on_start(self, experiment: Experiment) -> None:
        """Read the id of the run, or draw one."""
        path = self._folder / "run"
        if not path.exists():
            write(path, uuid.uuid4().hex.encode(), "out")
        self.run = read(path, "run").decode()
        strategy, federation = experiment.strategy, experiment.federation
        assert strategy.halves is not None
        groups = range(len(federation.groups))
        held = {name for g in groups for name in strategy.halves.means(g)}
        means = mean_shapes(federation, strategy)
        self._like = {name: means[name] for name in sorted(held)}
        self._clients = len(federation.clients)

    def recall(self, number: int) -> None:
        """Restore `last` and `means` as they were after a round.

        Raises:
          UserError: the file is damaged, or there is none: no server trained the round.
        """
        if self._number == number:
            return
        self._number, self.last, self.means = number, {}, {}
        if number == 0:
            return
        check_devices(self._rounds, number)
        path = devices_after(self._rounds, number)
        clients = jax.ShapeDtypeStruct((self._clients,), np.int32)
        form = form_of(self._like, "means")
        limit = size_limit(form | {"last": clients})
        content = read(path, "run")
        try:
            fields, data = split(content, ("round", "means"), limit=limit)
            known = form if fields["means"] else {}
            tensors = unpack(data, known | {"last": clients})
        except Refusal as error:
            raise UserError(f"run: {path} cannot be read: {error}") from error
        self.last = {i: int(n) for i, n in enumerate(tensors["last"])}
        if fields["means"]:
            self.means = tree_from(tensors, self._like, "means")

    def note(self, number: int, took_part: Iterable[int], means: Means) -> None:
        """Update `last` and `means` after a round.

        Args:
          number: of the round.
          took_part: the clients that took part in all of it.
          means: of the round, on the host.
        """
        self._number = number
        self.last = self.last | dict.fromkeys(took_part, number)
        new = {name: means[name] for name in self._like if means}
        self.means = {
            name: mean if mean.round > 0 or name not in self.means else self.means[name]
            for name, mean in new.items()
        } or self.means

    def on_round(self, record: RoundRecord, moment: Moment) -> None:
        """Write `last` and `means`, and a checkpoint, before the next round."""
        number = moment.rounds
        last = np.zeros(self._clients, np.int32)
        last[list(self.last)] = list(self.last.values())
        fields = {"round": number, "means": bool(self.means)}
        tensors = named(self.means, "means") | {"last": last}
        write(devices_after(self._rounds, number), pack(fields, tensors), "out")
        if not moment.due:
            self._writer.save(number, 0, moment.state(), {"score": None})
            self._writer.seal()
        devices_after(self._rounds, number - _KEPT).unlink(missing_ok=True)
