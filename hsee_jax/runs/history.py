"""What a run has left in its folder: its options, rounds, partition and summary."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.config.schema import SEEDS
from hsee_jax.config.values import SECTIONS, flatten, from_dict, is_own_data
from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.data.partition import Share
from hsee_jax.runs.equipment import Equipment, stored_equipment
from hsee_jax.runs.folder import read_info, read_values
from hsee_jax.runs.records import RoundRecord, Summary

# The options in which the runs of one experiment may differ.
_OWN = (*SEEDS, "data_dir", "plugin")
_DIGITS = 12  # of a digest, enough to tell datasets apart


class History(NamedTuple):
    """A run's folder, read."""

    options: dict[str, Any]  # by name
    partition: list[Share]
    records: list[RoundRecord]  # as far as the run has come
    summary: Summary | None  # None until the run ends
    digest: str | None = None  # of the user's own data, if the run has kept one
    equipment: Equipment | None = None  # None in a run without devices
    ridge: float | None = None  # of `hsee refit`, if it made the run

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of the run."""
        return tuple(self.options[name] for name in SEEDS)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the options that the runs of one experiment share.

        Seeds, plugins and the folder of the data are left out. The user's own data are
        there as ``data``: the start of their digest, or their folder without one. The
        files of the simulated clock are there as ``devices`` and ``availability``, and
        the penalty of exits that `hsee refit` fitted as ``refit``.
        """
        found = {name: v for name, v in self.options.items() if name not in _OWN}
        found |= {"devices": None, "availability": None, "refit": self.ridge}
        if self.equipment is not None:
            found |= self.equipment.sources
        if is_own_data(self.options):
            found["data"] = name_data(self.digest, self.options.get("data_dir"))
        return found


def name_data(digest: str | None, folder: str | None) -> str:
    """Name the user's own data: the start of their digest, or their folder."""
    return digest[:_DIGITS] if digest else str(folder)


def read_history(folder: Path) -> History:
    """Read a run's folder.

    Raises:
      UserError: it is not a run, or one of its files is damaged.
    """
    options = _read_options(folder)
    path = folder / "partition.json"
    with _reading(path):
        partition = [Share(**entry) for entry in _read(path)]
        np.array([share.label_counts for share in partition], np.int64).reshape(
            options["num_clients"], -1
        )
    records = read_records(folder)
    for record in records:
        if record.test is not None and len(record.test.clients) != len(partition):
            raise UserError(
                f"run: {folder / 'metrics.jsonl'}, round {record.round}, is damaged: "
                f"{len(record.test.clients)} clients instead of {len(partition)}"
            )
    summary, path = None, folder / "summary.json"
    if path.exists():
        with _reading(path):
            summary = Summary.from_json(_read(path))
            if summary.agreement:
                counts = np.array(summary.agreement, np.int64)
                counts.reshape(len(partition), 4, len(partition[0].label_counts))
    return History(
        options,
        partition,
        records,
        summary,
        read_digest(folder) if is_own_data(options) else None,
        stored_equipment(folder),
        _ridge(folder / "refit.json"),
    )


def read_records(folder: Path, *, limit: int | None = None) -> list[RoundRecord]:
    """Read the records of a run's rounds; pass over a line that a kill cut off.

    Args:
      folder: of the run.
      limit: the most rounds to read, from the first; None for all.

    Raises:
      UserError: the file is missing or damaged.
    """
    path, records = folder / "metrics.jsonl", []
    with _reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines[:limit], start=1):
        with _reading(f"{path}, line {number},"):
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines):
                    break
                raise
            records.append(RoundRecord.from_json(values))
            if records[-1].round != number:
                raise ValueError(f"it is of round {records[-1].round}")
    return records


def finished_records(folder: Path, rounds: int) -> tuple[RoundRecord, ...]:
    """Read the records of the rounds that a checkpoint has finished.

    Raises:
      UserError: the file is missing or damaged, or lacks some of them.
    """
    records = read_records(folder, limit=rounds)
    if len(records) < rounds:
        raise UserError(
            f"run: {folder / 'metrics.jsonl'} has {len(records)} lines for {rounds} "
            "rounds"
        )
    return tuple(records)


def read_digest(folder: Path) -> str | None:
    """Read the digest of the user's own data in a run; None without it."""
    try:
        return read_info(folder).digest
    except UserError:
        return None  # `train` writes it anew


def _ridge(path: Path) -> float | None:
    if not path.exists():
        return None
    with _reading(path):
        return float(_read(path)["ridge"])


def _read_options(folder: Path) -> dict[str, Any]:
    """Read the options of a run, and import none of its plugins."""
    values = read_values(folder)
    sections = [one for one in values.values() if isinstance(one, dict)]
    if len(sections) < len(values) or not values.get("run", {}).get("plugin"):
        return flatten(from_dict(values))  # names no plugin, or is refused before
    found = {
        name: tuple(value) if isinstance(value, list) else value
        for section in sections
        for name, value in section.items()
    }
    with _reading(folder / "config.json"):
        hash(tuple(found.values()))  # runs are grouped by them
    for kind in SECTIONS.values():
        for name, option in kind.fields().items():
            if name in kind.registries:  # a plugin may add entries
                option = replace(option, names=())
            found[name] = option.checked(found.get(name, option.default))
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _reading(what: object) -> Iterator[None]:
    """Say in one line what is wrong with a file of a run."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run: {what} cannot be read: {error.strerror}") from error
    except DAMAGE as error:
        raise UserError(
            f"run: {what} is damaged: {type(error).__name__}: {error}"
        ) from error
