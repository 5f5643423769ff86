"""The data of a run: the dataset that its configuration names, or a caller's arrays.

A run on arrays has the dataset ``arrays``. The user's own data, files and arrays alike,
have a digest in their `DatasetInfo`; to reopen a run, give the same data again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from hsee_jax.config.schema import Config, DataConfig
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data import (
    DATASETS,
    DatasetInfo,
    Limits,
    dataset_info,
    read_dataset,
)
from hsee_jax.data.arrays import four

Splits = tuple[Dataset, Dataset]  # training and test set, on the host


class DataSource(NamedTuple):
    """A dataset: its properties, and a function that reads its samples."""

    info: DatasetInfo
    read: Callable[[], Splits]


# Of a caller: (x, y, x_test, y_test), or training and test set, or a source of them.
OwnData = tuple[Any, Any, Any, Any] | Splits | DataSource


def config_for(config: Config, data: OwnData | None) -> Config:
    """Return the configuration of a run on a caller's data: its dataset is ``arrays``.

    A `DataSource` already reads the dataset that the configuration names.
    """
    if data is None or isinstance(data, DataSource):
        return config
    return override(config, dataset="arrays")


def data_source(config: DataConfig, data: OwnData | None = None) -> DataSource:
    """Find the data that a configuration names, or convert a caller's.

    The user's own data are read at once, because only this tells their properties.

    Args:
      config: of the run, see `config_for`.
      data: the caller's, if any.

    Raises:
      UserError: the data are missing, or not valid.
    """
    if isinstance(data, DataSource):
        return data
    limits = Limits(config.max_train_samples, config.max_test_samples)
    options, name = source_options(config), config.dataset
    form = DATASETS.make(name, options=options)
    if data is not None:
        if form.take is None:
            raise UserError(
                f"data: arrays are not allowed here; the run is on the dataset {name}, "
                "which is read from its folder"
            )
        found = form.take(four(data, "data"), limits)
        return DataSource(found.info, lambda: (found.train, found.test))
    read = partial(read_dataset, name, folder=config.data_dir, limits=limits, **options)
    if form.info is not None:
        return DataSource(form.info, lambda: read()[:2])
    found = read()
    return DataSource(found.info, lambda: (found.train, found.test))


def own_field(config: DataConfig) -> str:
    """Return the option that gave the data of a configuration, for errors."""
    return "data" if config.dataset == "arrays" else "data_dir"


def build_info(config: DataConfig) -> DatasetInfo:
    """Return what is known of the dataset that a configuration names."""
    options = source_options(config)
    return dataset_info(config.dataset, folder=config.data_dir, **options)


def build_data(config: DataConfig) -> Splits:
    """Read the dataset that a configuration names."""
    return data_source(config).read()


def source_options(config: DataConfig) -> dict[str, Any]:
    """Return the options that the dataset of a configuration reads."""
    names = DATASETS.entry(config.dataset).options
    return {name: config.options[name] for name in names}
