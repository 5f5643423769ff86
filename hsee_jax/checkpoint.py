"""Checkpoints with Orbax; no other file knows of it.

A checkpoint is a `RunState` under the number of rounds done, with the configuration,
seeds included, in its metadata. Orbax writes it in the background and makes it visible
at once or not at all. Then the digests of its files are put beside them: Orbax itself
reads changed bytes as if they were weights.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from hsee_jax.base import PyTree, UserError
from hsee_jax.processes import is_first

_policies = ocp.training.preservation_policies
_decisions = ocp.training.save_decision_policies
_DIGESTS = "digests.json"  # in a checkpoint: sha256 of every other file, by its path


class Checkpoints:
    """The checkpoints in a folder; use it in a ``with`` statement."""

    def __init__(self, folder: Path, *, keep: int | None = None) -> None:
        """Opens a folder.

        Args:
          folder: of the checkpoints.
          keep: to write, how many of the latest are kept, beside the best. None is to
            read only.

        Raises:
          UserError: to read, and there is nothing, or something is damaged.
        """
        if keep is None:
            if not folder.is_dir():
                raise self._none(folder)
            for path in sorted(folder.glob(f"*/{_DIGESTS}")):
                _verify(path.parent)
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder
        self._unsealed: tuple[int, Any] | None = None  # the one being written
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=_decisions.FixedIntervalPolicy(1),
            preservation_policy=_policies.AnyPreservationPolicy(
                [
                    _policies.LatestN(keep),
                    _policies.BestN(get_metric_fn=_score, n=1),
                ]
            ),
        )

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the last one to be written."""
        self._seal()
        self._checkpointer.close()

    def save(
        self, round: int, state: PyTree, *, score: float, metadata: Mapping[str, Any]
    ) -> None:
        """Starts writing a checkpoint; training may go on, and give up ``state``.

        Args:
          round: its number.
          state: arrays, copied before this returns.
          score: what the best checkpoint has most of.
          metadata: anything that JSON can hold.
        """
        copy = jax.tree.map(lambda leaf: leaf.copy(), state)
        self._seal()
        response = self._checkpointer.save_async(
            round, copy, metrics={"score": score}, custom_metadata=dict(metadata)
        )
        self._unsealed = round, response

    def _seal(self) -> None:
        """Waits for the checkpoint being written, and writes its digests."""
        if self._unsealed is None:
            return
        (round, response), self._unsealed = self._unsealed, None
        response.result()
        if not is_first():
            return
        folder = self.folder / str(round)
        digests = json.dumps(_digests(folder), indent=2)
        temporary = self.folder / f"{round}.{_DIGESTS}"
        temporary.write_text(digests)
        temporary.replace(folder / _DIGESTS)

    def find(self, which: str = "latest") -> int:
        """The number of the ``"latest"`` or of the ``"best"`` checkpoint.

        Raises:
          UserError: there is none.
        """
        infos = self._checkpointer.checkpoints
        if not infos:
            raise self._none(self.folder)
        if which == "best":
            return max(infos, key=lambda i: (_score(i.metrics or {}), i.step)).step
        return max(info.step for info in infos)

    @staticmethod
    def _none(folder: Path) -> UserError:
        return UserError(
            f"run: {folder.parent} has no checkpoint; allowed is a run that has "
            "reached its first one (see checkpoint_every)"
        )

    def restore(self, round: int, like: PyTree) -> PyTree:
        """Reads a checkpoint, whatever devices wrote it.

        Args:
          round: its number.
          like: `jax.ShapeDtypeStruct` of every leaf, with the sharding that is wanted,
            or none for the first device. Empty slots at the end of a stack may be more
            or fewer than were stored.

        Raises:
          UserError: it cannot be read, or holds something else.
        """
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding or here
            ),
            like,
        )
        any_slots = ocp.Context()
        any_slots.array.loading.enable_padding_and_truncation = True
        try:
            with any_slots:
                return self._checkpointer.load(round, target)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().splitlines() or [type(cause).__name__]
            raise UserError(
                f"run: checkpoint {round} in {self.folder} cannot be read: {reason[0]}"
            ) from error


def _verify(folder: Path) -> None:
    """Compares the files of a checkpoint with their digests."""
    try:
        known = json.loads((folder / _DIGESTS).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, _DIGESTS) from error
    found = _digests(folder)
    for name in sorted({*known, *found}):
        if known.get(name) != found.get(name):
            raise _damaged(folder, name)


def _damaged(folder: Path, name: str) -> UserError:
    path = folder / name
    what = "has changed since it was written" if path.exists() else "is missing"
    place = f"checkpoint {folder.name} in {folder.parent}"
    return UserError(f"run: {place} cannot be read: {path} {what}")


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its path."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _DIGESTS:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _score(metrics: Mapping[str, float]) -> float:
    return metrics.get("score", float("-inf"))
