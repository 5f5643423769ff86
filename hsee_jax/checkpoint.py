"""Checkpoints with Orbax; no other file knows of it.

A checkpoint is a `RunState` under the number of rounds done, with the configuration,
seeds included, in its metadata. Orbax writes it in the background and makes it visible
at once or not at all.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from hsee_jax.base import PyTree, UserError

_policies = ocp.training.preservation_policies
_decisions = ocp.training.save_decision_policies


class Checkpoints:
    """The checkpoints in a folder; use it in a ``with`` statement."""

    def __init__(self, folder: Path, *, keep: int | None = None) -> None:
        """Opens a folder.

        Args:
          folder: of the checkpoints.
          keep: to write, how many of the latest are kept, beside the best. None is to
            read only.

        Raises:
          UserError: there is nothing to read.
        """
        if keep is None and not folder.is_dir():
            raise self._none(folder)
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder
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
        copy = jax.tree.map(jnp.copy, state)
        self._checkpointer.save_async(
            round, copy, metrics={"score": score}, custom_metadata=dict(metadata)
        )

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
        """Reads a checkpoint, to the first device, whatever device wrote it.

        Args:
          round: its number.
          like: arrays, or `jax.ShapeDtypeStruct`, of the shapes and dtypes stored.

        Raises:
          UserError: it cannot be read, or holds something else.
        """
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            like,
        )
        try:
            return self._checkpointer.load(round, target)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().splitlines() or [type(cause).__name__]
            raise UserError(
                f"run: checkpoint {round} in {self.folder} cannot be read: {reason[0]}"
            ) from error


def _score(metrics: Mapping[str, float]) -> float:
    return metrics.get("score", float("-inf"))
