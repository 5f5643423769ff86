"""A CSV file with a row for each round."""

import csv as library
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hsee_jax.core.files import replace_file
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.records import RoundRecord
from hsee_jax.tracking.bookmark import Bookmark
from hsee_jax.tracking.registry import register
from hsee_jax.tracking.tracker import Tracker

Row = Mapping[str, float]


@register(summary="a table in RUN/metrics.csv, with a row for each round")
def csv(folder: str | os.PathLike[str]) -> Tracker:
    """Write a table to RUN/metrics.csv, with a row for each round."""
    return CsvFile(folder)


class CsvFile(Tracker):
    """Writes ``metrics.csv``; cells of figures that a round does not have are empty."""

    name = "csv"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose the run's folder."""
        super().__init__(folder)
        self._file = self.folder / "metrics.csv"
        self._columns: tuple[str, ...] = ()
        self._rows: list[Row] = []

    def open(self, experiment: Experiment, bookmark: Bookmark, rounds: int) -> Bookmark:
        """Empty the file, to write all rounds anew."""
        self._columns, self._rows = (), []
        replace_file(self._file, "")
        return bookmark._replace(rounds=0)

    def log(self, record: RoundRecord) -> None:
        """Append a row; rewrite the file if the round has figures of new names."""
        row = {"round": record.round, **record.scalars()}
        self._rows.append(row)
        columns = tuple(dict.fromkeys((*self._columns, *row)))
        if columns == self._columns:
            _append(self._file, _text(columns, [row]))
        else:
            self._columns = columns
            head = dict(zip(columns, columns, strict=True))
            replace_file(self._file, _text(columns, [head, *self._rows]))


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    library.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
