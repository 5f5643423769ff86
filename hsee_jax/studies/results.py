"""The results of a study: one JSON object a line in ``results.jsonl``.

Lines are only appended. A run counts as finished if a line holds its row, its seed, its
settings and the digest of its data; of several such lines the last counts.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsee_jax.config.schema import Config
from hsee_jax.config.values import SECTIONS, flatten, override, settings
from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.core.files import writing
from hsee_jax.runs.json_text import dumps
from hsee_jax.runs.records import Summary
from hsee_jax.studies.digests import data_of
from hsee_jax.studies.study import Run, Study, runs

FILE = "results.jsonl"
_KINDS = {"row": str, "seed": int, "settings": dict, "cpu_cores": int}


@dataclass(frozen=True)
class Result:
    """The figures of a run that finished, or where it diverged."""

    row: str
    seed: int
    settings: Mapping[str, Any]  # see `settings`
    cpu_cores: int  # that the run could use
    summary: Summary | None  # None if the run diverged
    diverged: str = ""  # where and how
    digest: str | None = None  # of the user's own data; older lines lack it

    def to_json(self) -> dict[str, Any]:
        """Return the result as values of JSON."""
        values = {
            "row": self.row,
            "seed": self.seed,
            "settings": dict(self.settings),
            "cpu_cores": self.cpu_cores,
        } | ({} if self.digest is None else {"digest": self.digest})
        if self.summary is None:
            return values | {"diverged": self.diverged}
        return values | {"summary": self.summary.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Result":
        """Make a result from what `to_json` returns.

        Raises:
          KeyError, TypeError, ValueError: the values are not a result.
        """
        for name, kind in _KINDS.items():
            if type(values[name]) is not kind:
                raise TypeError(f"{name} is {values[name]!r}")
        summary, digest = values.get("summary"), values.get("digest")
        return cls(
            row=values["row"],
            seed=values["seed"],
            settings=dict(values["settings"]),
            cpu_cores=values["cpu_cores"],
            summary=None if summary is None else Summary.from_json(summary),
            diverged="" if summary else str(values["diverged"]),
            digest=None if digest is None else str(digest),
        )


def read_results(folder: Path) -> list[Result]:
    """Read the results in the folder of a study; leave out a line that a kill cut off.

    Raises:
      UserError: a line is damaged.
    """
    path = folder / FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"results: {path} cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(_complete(content).splitlines(), start=1):
        try:
            found.append(Result.from_json(json.loads(line)))
        except DAMAGE as error:
            raise UserError(
                f"results: {path}, line {number}, is damaged "
                f"({type(error).__name__}: {error}); remove the line, and its run is "
                "done again"
            ) from error
    return found


def append_result(folder: Path, result: Result) -> None:
    """Append a line to the results; drop an earlier line that a kill cut off.

    Raises:
      UserError: the file cannot be written.
    """
    line = dumps(result.to_json(), lines=True).encode()
    path = folder / FILE
    with writing(path), path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        complete = _complete(content)
        file.truncate(min(len(complete), len(content)))
        file.write(complete[len(content) :] + line)
        file.flush()
        os.fsync(file.fileno())


def _complete(content: bytes) -> bytes:
    """Return all complete lines, each with its end."""
    lines, end, last = content.rpartition(b"\n")
    try:
        json.loads(last)
    except DAMAGE:  # it is empty, or cut off
        return lines + end
    return content + b"\n"


def result_of(
    run: Run, results: Sequence[Result], digest: str | None = None
) -> Result | None:
    """Return the last result of a run, or None if no line holds its settings.

    Args:
      run: the run.
      results: the results of its study.
      digest: of its data; a result on other data does not count. None if not known.
    """
    wanted, defaults = settings(run.config), _defaults(run.config)
    for result in reversed(results):
        same_data = digest is None or result.digest in (None, digest)
        if same_data and (result.row, result.seed) == (run.row, run.seed):
            # An option that is newer than the result had its default.
            known = defaults | dict(result.settings)
            if all(known.get(name) == value for name, value in wanted.items()):
                return result
    return None


def _defaults(config: Config) -> dict[str, Any]:
    """Return the default settings with the algorithm, the network etc. of a run."""
    values = flatten(config)
    names = [name for kind in SECTIONS.values() for name in kind.registries]
    return settings(override(Config(), **{name: values[name] for name in names}))


def current(results: Sequence[Result]) -> list[Result]:
    """Return the last of all results with the same row, seed and settings.

    Results on an earlier state of the user's own data than the last are left out.
    """
    digests = {data_of(one.settings): one.digest for one in results if one.digest}
    found = {}
    for one in results:
        if one.digest in (None, digests.get(data_of(one.settings))):
            found[one.row, one.seed, repr(sorted(one.settings.items()))] = one
    return list(found.values())


def by_row(study: Study, results: Sequence[Result]) -> dict[str, tuple[Result, ...]]:
    """Return the results of each row that has any, by seed, in the study's order.

    Of results on several states of the user's own data, those on the last count.
    """
    found, counted = {}, current(results)
    for row in study.rows:
        own = [result for result in counted if result.row == row.name]
        seeds = sorted({result.seed for result in own})
        if seeds:
            wanted = runs(study, rows=[row.name], seeds=seeds)
            last = (result_of(run, own) for run in wanted)
            found[row.name] = tuple(filter(None, last))
    return {name: own for name, own in found.items() if own}
