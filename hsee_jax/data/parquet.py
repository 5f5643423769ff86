"""Datasets of pictures in Parquet files, as the Hugging Face Hub stores them.

The files lie in a folder or in its folder ``data``: ``train*.parquet`` and
``test*.parquet`` (or ``val*`` or ``dev*``), in capitals too, or files whose names say
nothing of a split; then a share of each class becomes the test set. A column holds the
encoded pictures, as bytes or as a struct with bytes; a column of integers or text holds
the labels.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError, no_package, one_line
from hsee_jax.data.arrays import Raw, convert
from hsee_jax.data.info import Data
from hsee_jax.data.labels import Place
from hsee_jax.data.pictures import Picture, decode
from hsee_jax.data.split import TEST_NAMES, split_rows

_LABEL_NAMES = ("label", "labels")


class _Table(NamedTuple):
    """The rows of a split."""

    pictures: list[Picture]
    labels: npt.NDArray[Any]  # [M], of integers or text


def is_there(folder: Path) -> bool:
    """Return whether a folder, or its folder ``data``, holds Parquet files."""
    return bool(_place(folder)[1])


def read(
    folder: Path,
    *,
    labels: str,
    label_column: str | None,
    image_size: int | None,
    test_share: float | None,
    split_seed: int,
) -> Data:
    """Read a dataset.

    Args:
      folder: see the module.
      labels: see `convert`.
      label_column: the column of the labels; None for ``label`` or ``labels``, or else
        the only column of integers or text.
      image_size: see `decode`.
      test_share: the share of each class to set apart where there is no test set.
      split_seed: the seed of the order of the samples and of the test set.

    Raises:
      UserError: pyarrow is missing, there are no such files, they are not valid, or
        there is a test set and ``test_share`` was given too.
    """
    place, files = _place(folder)
    if not files:
        raise UserError(
            f"data_dir: {folder} is not allowed for parquet; allowed is a folder with "
            "train*.parquet and test*.parquet, or with a folder data that has them"
        )
    train_files, test_files = _split_files(place, files)
    train = _table(train_files, label_column)
    test = (
        _table(test_files, label_column) if test_files else _Table([], train.labels[:0])
    )
    train_rows, test_rows, note = split_rows(
        train.labels,
        len(test.labels),
        test_share,
        seed=split_seed,
        place=", ".join(path.name for path in test_files),
    )
    pictures = [*train.pictures, *test.pictures]
    rows = np.concatenate([train_rows, test_rows])
    images, notes = decode([pictures[row] for row in rows], image_size)
    values = _joined([train.labels, test.labels], place)[rows]
    count = len(train_rows)
    data = convert(
        Raw(images[:count], values[:count], Place(f"the training set of {place}")),
        Raw(images[count:], values[count:], Place(f"the test set of {place}")),
        labels=labels,
    )
    read_here = (*train_files, *test_files)
    source = f"from {len(read_here)} Parquet files in {place}"
    if unread := [path.name for path in files if path not in read_here]:
        source += f" ({', '.join(unread)} not read)"
    return data._replace(notes=(source, note, *notes, *data.notes))


def _place(folder: Path) -> tuple[Path, list[Path]]:
    """Return the folder of the files, and the files."""
    for place in (folder, folder / "data"):
        if found := sorted(place.glob("*.parquet")):
            return place, found
    return folder, []


def _split_files(place: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files of the training set and of the test set, if there is one."""

    def starting(prefix: str) -> list[Path]:
        return [path for path in files if path.name.lower().startswith(prefix)]

    train = starting("train")
    if train:
        return train, starting("test") or starting("val") or starting("dev")
    for path in files:
        if _says_test(path.stem):
            raise Place(str(place)).refusal(
                f"{path.name}, but no train*.parquet",
                "allowed are train*.parquet and test*.parquet, or files whose names "
                "say nothing of a split",
            )
    return list(files), []


def _says_test(name: str) -> bool:
    """Return whether a word of a name is that of a test set: fashionTest, testset."""
    words = re.findall("[A-Z]*[a-z]+|[A-Z]+", name)
    return any(word.lower().removesuffix("set") in TEST_NAMES for word in words)


def _joined(labels: Sequence[npt.NDArray[Any]], place: Path) -> npt.NDArray[Any]:
    """Join labels of one kind; NumPy would turn integers beside text into text."""
    if len({array.dtype.kind == "U" for array in labels}) > 1:
        raise Place(str(place)).refusal(
            "labels of integers in some files and of text in others",
            "allowed is one kind",
        )
    return np.concatenate(labels)


def _table(files: Sequence[Path], label_column: str | None) -> _Table:
    """Read pictures and labels of some files."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise no_package("dataset: parquet", "parquet") from error
    pictures: list[Picture] = []
    labels = []
    for path in files:
        try:
            schema = pq.read_schema(path)
            image, label = _columns(schema, label_column, path)
            table = pq.read_table(path, columns=[image, label])
            rows, own = table[image].to_pylist(), table[label].to_pylist()
        except UserError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:  # also: not UTF-8
            raise UserError(
                f"data_dir: {path} cannot be read ({one_line(error)}); allowed is a "
                "whole Parquet file"
            ) from error
        for row, value in enumerate(rows):
            content = value.get("bytes") if isinstance(value, dict) else value
            if content is None:
                raise Place(str(path)).refusal(
                    f"no bytes in row {row} of {image}", "allowed are encoded pictures"
                )
            pictures.append(Picture(f"row {row} of {path}", content))
        if table[label].null_count:
            raise Place(str(path)).refusal(
                f"{table[label].null_count} rows without a {label}",
                "allowed is a label in every row",
            )
        if table.num_rows:
            labels.append(np.array(own))
    if not labels:
        raise Place(str(files[0])).refusal("0 rows", "allowed are one or more")
    return _Table(pictures, _joined(labels, files[0].parent))


def _columns(schema: Any, label_column: str | None, path: Path) -> tuple[str, str]:
    """Find the columns of pictures and labels."""
    import pyarrow.types as kinds

    def is_picture(kind: Any) -> bool:
        if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return kinds.is_binary(kind) or kinds.is_large_binary(kind)

    def is_label(kind: Any) -> bool:
        if kinds.is_dictionary(kind):
            kind = kind.value_type
        return (
            kinds.is_integer(kind)
            or kinds.is_string(kind)
            or kinds.is_large_string(kind)
        )

    images = [field.name for field in schema if is_picture(field.type)]
    labels = [field.name for field in schema if is_label(field.type)]
    usual = [name for name in labels if name in _LABEL_NAMES]
    chosen = (
        [n for n in labels if n == label_column] if label_column else usual or labels
    )
    if len(images) != 1:
        raise Place(str(path)).refusal(
            f"{len(images)} columns of pictures among {', '.join(schema.names)}",
            "allowed is one, of bytes or of a struct with bytes",
        )
    if not labels:
        raise Place(str(path)).refusal(
            "the columns " + ", ".join(f"{f.name} ({f.type})" for f in schema),
            "allowed is a column of integers or text for the labels",
        )
    if len(chosen) != 1:
        raise UserError(
            f"label_column: {label_column or 'none'} is not allowed for {path}; "
            f"allowed is a column of integers or text, one of {', '.join(labels)}"
        )
    return images[0], chosen[0]
