"""Read datasets that tensorflow-datasets prepared, if possible without TensorFlow.

Any version with the images and classes of `KNOWN` can be read, whatever version the
installed tensorflow-datasets would prepare. tensorflow-datasets shuffles the samples,
so their order differs from the archives: the first 500 samples, say, are other images.
"""

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hsee_jax.core.errors import UserError, one_line
from hsee_jax.core.types import Dataset
from hsee_jax.data.info import KNOWN, Source

Samples = Iterable[dict[str, Any]]
SamplesFn = Callable[[Any, str, int | None], Samples]  # takes builder, split, limit


def find(dataset: str, folder: Path) -> tuple[Source | None, list[str]]:
    """Find the newest version of a dataset that can be read here.

    Returns:
      The source, or None, and for every newer version a clause that says why it cannot
      be read.
    """
    refused: list[str] = []
    for path in _versions(folder / dataset):
        try:
            builder = _builder(path)
            _check_content(dataset, builder)
            form, samples = _format(builder)
        except Exception as error:  # readers of many formats raise many types
            refused.append(
                f"version {path.name} in {path} cannot be read: {one_line(error)}"
            )
        else:
            name = (
                f"version {builder.version} of {dataset}, which tensorflow-datasets "
                f"has prepared in {path} as {form}"
            )
            return Source(name, partial(_read, builder, samples)), refused
    return None, refused


def _versions(folder: Path) -> list[Path]:
    """Return the folders of all versions of a dataset, the newest first."""
    paths = [path.parent for path in folder.glob("*/dataset_info.json")]
    return sorted(
        paths, key=lambda path: [*map(int, re.findall(r"\d+", path.name))], reverse=True
    )


def _builder(path: Path) -> Any:
    """Open a version; only this imports tensorflow-datasets, which takes seconds."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # `find` reports the same
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(path)


def _check_content(dataset: str, builder: Any) -> None:
    """Refuse images, classes or splits that differ from the dataset's."""
    info, features, splits = (
        KNOWN[dataset],
        builder.info.features,
        builder.info.splits,
    )
    if not {"image", "label"} <= set(features):
        raise ValueError(f"it holds {', '.join(features)}, not image and label")
    image, label = features["image"], features["label"]
    found = (image.np_dtype, tuple(image.shape), label.num_classes)
    if found != (np.uint8, info.input_shape, info.num_classes):
        raise ValueError(
            f"it holds images {np.dtype(found[0])} {list(found[1])} in {found[2]} "
            f"classes, where {dataset} has uint8 {list(info.input_shape)} in "
            f"{info.num_classes}"
        )
    for split in ("train", "test"):
        if split not in splits or not splits[split].num_examples:
            raise ValueError(f"it holds no {split} samples")


def _format(builder: Any) -> tuple[str, SamplesFn]:
    """Choose a format with an installed library, and return it with its reader."""
    forms = {form.value for form in builder.info.available_file_formats()}
    for form, library, samples in _READERS:
        if form in forms and find_spec(library):
            return form, samples
    needs = [
        f"{form} needs {library}" for form, library, _ in _READERS if form in forms
    ]
    raise ValueError(", ".join(needs) or f"its format is {', '.join(sorted(forms))}")


def _read(builder: Any, samples: SamplesFn, split: str, limit: int | None) -> Dataset:
    with _one_error(builder.data_dir):
        found = ((s["image"], s["label"]) for s in samples(builder, split, limit))
        images, labels = zip(*found, strict=True)
    return Dataset(np.stack(images), np.asarray(labels, np.int32))


@contextlib.contextmanager
def _one_error(folder: Path) -> Iterator[None]:
    """Turn any error of a reader into a `UserError`."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"data_dir: {folder} cannot be read ({one_line(error)}); remove it and "
            "prepare the dataset again"
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


_READERS = (  # the format, the library that it needs, its reader
    ("array_record", "array_record", _random_access),
    ("parquet", "pyarrow", _random_access),
    ("tfrecord", "tensorflow", _in_sequence),
)
