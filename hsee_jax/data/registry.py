"""The registry of datasets: known datasets, and forms of the user's own data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hsee_jax.core.registry import Registry
from hsee_jax.data.download import OnBytes
from hsee_jax.data.info import Data, DatasetInfo, Limits


class ReadFormFn(Protocol):
    """Reads a dataset."""

    def __call__(self, folder: Path, limits: Limits) -> Data:
        """Read the dataset in a folder.

        Raises:
          UserError: the dataset is not in the folder, or not valid.
        """


class Form(NamedTuple):
    """How a dataset is read from a folder; `from_arrays` makes the usual one."""

    read: ReadFormFn
    is_there: Callable[[Path], bool]  # whether the folder seems to hold the dataset
    info: DatasetInfo | None = None  # if it is known without reading the dataset
    fetch: Callable[[Path, OnBytes], None] | None = None  # downloads it to the folder
    # Converts x, y, x_test and y_test, which a program passes instead of a folder.
    take: Callable[[tuple[Any, Any, Any, Any], Limits], Data] | None = None


# Factories take only their options.
DATASETS: Registry[Form] = Registry("dataset")
register = DATASETS.register
