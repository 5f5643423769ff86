"""The digests of the user's own data, which tell runs on other samples apart."""

from collections.abc import Mapping
from typing import Any

from hsee_jax.config.values import flatten, is_own_data, settings
from hsee_jax.data import DATASETS
from hsee_jax.runs.data import data_source
from hsee_jax.studies.study import Run


class Digests:
    """Gives the digest of a run's data; data that runs share are read once."""

    def __init__(self) -> None:
        """Begin without any."""
        self._known: dict[str, str | None] = {}

    def __call__(self, run: Run) -> str | None:
        """Return the digest of all samples and labels.

        Returns:
          None for a known dataset, and for data that cannot be read; training says why.
        """
        key = data_of(settings(run.config))
        if key not in self._known:
            self._known[key] = _digest(run)
        return self._known[key]


def data_of(values: Mapping[str, Any]) -> str:
    """Name the place of the data of a run, and how they are read.

    Args:
      values: see `settings`; an option that is newer than they had its default.
    """
    names = ("dataset", "data_dir")
    options = DATASETS.options().items()
    how = {name: values.get(name, option.default) for name, option in options}
    return repr([*map(values.get, names), how])


def _digest(run: Run) -> str | None:
    if not is_own_data(flatten(run.config)):
        return None
    try:
        return data_source(run.config.data).info.digest
    except Exception:  # a dataset of a plugin may raise anything
        return None
