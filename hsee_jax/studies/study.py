"""A study: rows of options, each trained with several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsee_jax.config.schema import SEEDS, Config
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError, unknown


@dataclass(frozen=True)
class Row:
    """One configuration of a study; a seed makes a run of it."""

    name: str
    config: Config
    shows: str = ""  # what the row shows, in a sentence
    table: str = ""  # the NAME of its table [rows.NAME], if it has one


@dataclass(frozen=True)
class Study:
    """Rows to compare, each trained with several seeds."""

    title: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    shows: str = ""
    cost: str = ""


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        """Return the name of the run's folder."""
        return f"{self.row}-{self.seed}"

    def __str__(self) -> str:
        """Name the row and the seed."""
        return f"{self.row} seed {self.seed}"


def runs(
    study: Study,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    **changes: Any,
) -> tuple[Run, ...]:
    """Return the runs of a study: all rows with the first seed, then with the next.

    Args:
      study: the study.
      rows: the names of the rows to run, or of tables ``[rows.NAME]``, which mean all
        points of the grid; none means all rows.
      seeds: the seeds to run instead of the seeds of the study.
      **changes: options to change in every run, such as ``data_dir``.

    Raises:
      UserError: a row is unknown, or a seed or a change is not allowed.
    """
    for seed in seeds:
        if not 0 <= seed < 2**31:
            raise UserError(f"seeds: {seed} is not allowed; allowed are 0..{2**31 - 1}")
    chosen = _chosen(study, rows) if rows else study.rows
    return tuple(
        Run(row.name, seed, _with_seed(row.config, seed, changes))
        for seed in dict.fromkeys(seeds or study.seeds)
        for row in chosen
    )


def _chosen(study: Study, names: Sequence[str]) -> list[Row]:
    """Return the rows that names of rows and of tables mean, each once."""
    known: dict[str, list[Row]] = {}
    for row in study.rows:
        for name in dict.fromkeys((row.table or row.name, row.name)):
            known.setdefault(name, []).append(row)
    for name in names:
        if name not in known:
            raise unknown("rows", name, known)
    chosen = {row.name: row for name in names for row in known[name]}
    return list(chosen.values())


def _with_seed(config: Config, seed: int, changes: dict[str, Any]) -> Config:
    return override(config, **{**dict.fromkeys(SEEDS, seed), **changes})
