"""What tensorflow-datasets has prepared, read without TensorFlow where that can be.

The samples come in the order in which tensorflow-datasets has shuffled them, which is
not that of the archives: ``max_train_samples`` takes others here than there.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hsee_jax.core.types import Dataset
from hsee_jax.core.errors import UserError
from hsee_jax.data.info import Source

Samples = Iterable[dict[str, Any]]
SamplesFn = Callable[[Any, str, int | None], Samples]  # of a builder's split


def find(dataset: str, folder: Path) -> Source | None:
    """A dataset that is prepared in a format that can be read here."""
    if not any(folder.glob(f"{dataset}/*/dataset_info.json")):
        return None  # before the import, which takes its time
    logging.getLogger("absl").setLevel(logging.ERROR)  # else it warns of what we say
    import tensorflow_datasets as tfds

    with _one_error(folder / dataset):
        builder = tfds.builder(dataset, data_dir=folder)
        if not builder.is_prepared():
            return None
        formats = {form.value for form in builder.info.available_file_formats()}
    for form, library, samples in _READERS:
        if form in formats and find_spec(library):
            where = f"what tensorflow-datasets has prepared in {builder.data_dir}"
            return Source(f"{where} as {form}", partial(_read, builder, samples))
    return None


def _read(builder: Any, samples: SamplesFn, split: str, limit: int | None) -> Dataset:
    with _one_error(builder.data_dir):
        found = ((s["image"], s["label"]) for s in samples(builder, split, limit))
        images, labels = zip(*found, strict=True)
    return Dataset(np.stack(images), np.asarray(labels, np.int32))


@contextlib.contextmanager
def _one_error(folder: Path) -> Iterator[None]:
    """Readers of many formats raise many types; to the user all mean the same."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data_dir: {folder} cannot be read ({reason}); remove it and prepare the "
            "dataset again"
        ) from error


def _random_access(builder: Any, split: str, limit: int | None) -> Samples:
    source = builder.as_data_source(split=split)
    return source.__getitems__(range(len(source))[:limit])


def _in_sequence(builder: Any, split: str, limit: int | None) -> Samples:
    import tensorflow_datasets as tfds

    samples = builder.as_dataset(
        split=split,
        shuffle_files=False,
        read_config=tfds.ReadConfig(try_autocache=False),  # it is read once
    )
    return itertools.islice(tfds.as_numpy(samples), limit)


_READERS = (  # format, the library that it needs, how it is read
    ("array_record", "array_record", _random_access),
    ("parquet", "pyarrow", _random_access),
    ("tfrecord", "tensorflow", _in_sequence),
)
