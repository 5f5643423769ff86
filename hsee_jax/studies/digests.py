"""The digests of the user's own data, which tell runs on other samples apart."""

from hsee_jax.config.values import flatten, is_own_data
from hsee_jax.runs.data import data_source, source_options
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
        data = run.config.data
        key = repr((data.dataset, data.data_dir, source_options(data)))
        if key not in self._known:
            self._known[key] = _digest(run)
        return self._known[key]


def _digest(run: Run) -> str | None:
    if not is_own_data(flatten(run.config)):
        return None
    try:
        return data_source(run.config.data).info.digest
    except Exception:  # a dataset of a plugin may raise anything
        return None
