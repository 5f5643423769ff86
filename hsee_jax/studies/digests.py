"""The digests of the user's own data, which tell runs on other samples apart."""

from collections.abc import Sequence

from hsee_jax.config.values import flatten, is_own_data
from hsee_jax.core.errors import UserError
from hsee_jax.runs.data import data_source, source_options
from hsee_jax.studies.study import Run


def digests_of(runs: Sequence[Run]) -> list[str | None]:
    """Return the digest of each run's data; read data that runs share once.

    Returns:
      None for a known dataset, and for data that cannot be read; training says why.
    """
    known: dict[str, str | None] = {}
    keys = [_key(run) for run in runs]
    for run, key in zip(runs, keys, strict=True):
        if key not in known:
            known[key] = _digest(run)
    return [known[key] for key in keys]


def _key(run: Run) -> str:
    data = run.config.data
    limits = data.max_train_samples, data.max_test_samples
    return repr((data.dataset, data.data_dir, limits, source_options(data)))


def _digest(run: Run) -> str | None:
    if not is_own_data(flatten(run.config)):
        return None
    try:
        return data_source(run.config.data).info.digest
    except UserError:
        return None
