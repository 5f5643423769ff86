"""The rows of the results tables, each a TOML file, and their results.

A set is a folder of `rows/`. Its ``set.toml`` names a preset and the changes of all its
rows; a row's own file adds more changes. All files begin with what they show, their
cost and their command. A finished run leaves one JSON file: its row, seed,
configuration and summary, or that it ``diverged``.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import hsee_jax
from hsee_jax.config import BOOKKEEPING, SEEDS, flatten

HERE = Path(__file__).parent
ROWS = HERE / "rows"
RESULTS = HERE / "results"
COMMON = "set.toml"

Result = dict[str, Any]


class Run(NamedTuple):
    """One row with one seed."""

    row: str  # set/name
    seed: int

    @property
    def result(self) -> str:
        """Return the file under the folder of results."""
        return f"{self.row.replace('/', '--')}-{self.seed}.json"


def sets() -> list[str]:
    """Return the names of all sets."""
    return sorted(path.parent.name for path in ROWS.glob(f"*/{COMMON}"))


def rows(study: str) -> list[str]:
    """Return the names of a set's rows, ``set/name``."""
    return [
        f"{study}/{path.stem}"
        for path in sorted((ROWS / study).glob("*.toml"))
        if path.name != COMMON
    ]


def select(names: list[str]) -> list[str]:
    """Return the rows with these names, or in the sets with these names.

    Raises:
      UserError: a name is neither a row nor a set.
    """
    chosen: list[str] = []
    for name in names:
        found = rows(name) if name in sets() else [name]
        for row in found:
            if not (ROWS / f"{row}.toml").is_file():
                known = sets() if "/" not in row else rows(row.partition("/")[0])
                raise hsee_jax.UserError(
                    f"row: {name} is unknown; allowed are {', '.join(known or sets())}"
                )
        chosen += [row for row in found if row not in chosen]
    return chosen


def config_of(run: Run, **changes: Any) -> hsee_jax.Config:
    """Return the configuration of a run; ``changes`` are for this machine."""
    folder, _, _ = run.row.partition("/")
    common = tomllib.loads((ROWS / folder / COMMON).read_text())
    own = tomllib.loads((ROWS / f"{run.row}.toml").read_text())
    config = hsee_jax.preset(common.pop("preset"))
    # The row's strategy may not read all the options that the rows have in common.
    for values in (common, own, dict.fromkeys(SEEDS, run.seed) | changes):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = hsee_jax.override(config, **values)
    return config


def settings(config: hsee_jax.Config) -> dict[str, Any]:
    """Return the options that determine a result, as values of JSON."""
    values = json.loads(json.dumps(flatten(config)))
    return {k: v for k, v in values.items() if k not in BOOKKEEPING}


def load(run: Run, folder: Path = RESULTS) -> Result | None:
    """Return the result of a run, or None if it is missing or of an older row."""
    path = folder / run.result
    if not path.is_file():
        return None
    result: Result = json.loads(path.read_text())
    wanted = settings(config_of(run))
    # An option that is newer than the result had its default.
    known = json.loads(json.dumps(flatten(hsee_jax.Config()))) | result["config"]
    return result if all(known.get(name) == v for name, v in wanted.items()) else None


def save(run: Run, config: hsee_jax.Config, summary: Result, folder: Path) -> None:
    """Write the result of a run atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"row": run.row, "seed": run.seed, **summary, "config": settings(config)}
    temporary = folder / f"{run.result}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(folder / run.result)
