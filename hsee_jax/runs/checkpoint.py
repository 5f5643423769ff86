"""Checkpoints with Orbax, which only this file and `checkpoint_writer` use, late.

A checkpoint is a folder with the ``state`` as Orbax writes it, ``notes.json`` and
``digests.json``, the sha256 of every other file: Orbax itself reads changed bytes as if
they were weights. The folder is written under another name and renamed when it is
complete, so wherever a run is killed, every checkpoint has its digests. Its name is the
number of finished rounds; ``7-40`` is 40 steps into the round after the 7th.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import PyTree
from hsee_jax.runs.checkpoint_folder import (
    NOTES,
    find_places,
    read_score,
    verify,
)
from hsee_jax.runs.stored_links import with_links, without_links
from hsee_jax.runs.stored_shapes import check_shapes

SHELF = "shelf"  # the folder of arrays that wait, in that of a checkpoint
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint with intact files."""

    folder: Path
    rounds: int  # finished rounds
    steps: int  # finished steps of the next round
    notes: Mapping[str, Any]  # the notes of `Writer.save`

    @property
    def number(self) -> int:
        """Return the last round that it has trained, whole or in part; at least 1."""
        return max(self.rounds + (self.steps > 0), 1)


def find(
    folder: Path, which: str = "latest", *, midway: bool = False
) -> Checkpoint | None:
    """Choose a checkpoint, and compare its files with their digests.

    If a checkpoint is damaged, log a warning and try the next best.

    Args:
      folder: the folder of the checkpoints.
      which: ``"latest"``, ``"best"`` for the checkpoint with the highest score, or the
        number of finished rounds.
      midway: whether a checkpoint in the middle of a round may be chosen.

    Returns:
      The checkpoint, or None if the folder holds none.

    Raises:
      UserError: all checkpoints are damaged.
    """
    places = {
        place: path
        for place, path in find_places(folder).items()
        if (place[1] == 0 or midway) and which in ("latest", "best", str(place[0]))
    }
    damage: UserError | None = None
    for place in sorted(
        places,
        key=lambda p: (read_score(places[p]) if which == "best" else 0, p),
        reverse=True,
    ):
        try:
            verify(places[place])
        except UserError as error:
            damage = damage or error
            _log.warning("%s; an earlier one is looked for", error)
            continue
        notes = json.loads((places[place] / NOTES).read_text(encoding="utf-8"))
        return Checkpoint(places[place], *place, notes)
    if damage is not None:
        raise damage
    return None


def load(checkpoint: Checkpoint, like: PyTree) -> PyTree:
    """Read a checkpoint, whatever devices wrote it.

    Args:
      checkpoint: see `find`.
      like: a `jax.ShapeDtypeStruct` for every leaf, with its new sharding, or without a
        sharding for the first device; ``...`` for a leaf that is not read. A stack may
        have more or fewer empty slots at its end than the stored stack.

    Raises:
      UserError: the checkpoint cannot be read, or holds other leaves or shapes.
    """
    return with_links(_load(checkpoint, "state", without_links(like)), like)


def load_shelf(checkpoint: Checkpoint, like: PyTree) -> PyTree:
    """Read what waits on the shelf of a checkpoint, see `hsee_jax.federation.recut`.

    Args:
      checkpoint: see `find`.
      like: see `load`; a shelf without leaves was not stored.

    Returns:
      The shelf, in numpy arrays.

    Raises:
      UserError: the shelf cannot be read, or holds other leaves.
    """
    if not jax.tree.leaves(like):
        return like
    return jax.device_get(_load(checkpoint, SHELF, like))


def _load(checkpoint: Checkpoint, name: str, like: PyTree) -> PyTree:
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(leaf: Any) -> Any:
        if leaf is ...:
            return leaf
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding or here
        )

    any_slots = ocp.Context()
    any_slots.array.loading.enable_padding_and_truncation = True
    try:
        with any_slots:
            shapes = jax.tree.map(placed, like)
            path = (checkpoint.folder / name).absolute()
            check_shapes(ocp.metadata(path).metadata, shapes)
            return ocp.load(path, shapes)
    except Exception as error:
        reason = reason_of(error)
        if "structures do not match" in reason:  # Orbax goes on with both trees
            reason = "it holds other layers than config.json describes"
        raise UserError(f"run: {checkpoint.folder} cannot be read: {reason}") from error


def reason_of(error: BaseException) -> str:
    """Return the first line of the cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
