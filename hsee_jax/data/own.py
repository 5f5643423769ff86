"""The forms of the user's own data, each under its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import one_of
from hsee_jax.data import imagefolder as folders
from hsee_jax.data import npz as array_files
from hsee_jax.data import parquet as tables
from hsee_jax.data.arrays import Arrays, limited
from hsee_jax.data.datasets import read_arrays
from hsee_jax.data.info import LABELS, Data, Limits
from hsee_jax.data.pictures import ImageSize
from hsee_jax.data.registry import Form, register
from hsee_jax.data.split import SplitSeed, TestShare

LabelRule = Annotated[
    str,
    "what to do with integer labels that are not 0..K-1: refuse them, or remap them in "
    "ascending order",
    one_of(LABELS),
]
LabelColumn = Annotated[
    str | None,
    "column of the labels; by default label, or the only one of integers or text",
]


@register(summary="own arrays, train.npz and test.npz in --data-dir")
def npz(*, labels: LabelRule = "refuse") -> Form:
    """Read arrays of images, features or series."""
    return _form(array_files.read, array_files.is_there, labels=labels)


@register(
    summary="own PNG and JPEG files in --data-dir, as train/CLASS/ and test/CLASS/, or "
    "CLASS/ alone"
)
def imagefolder(
    *,
    image_size: ImageSize = None,
    test_share: TestShare = None,
    split_seed: SplitSeed = 0,
) -> Form:
    """Read pictures, with one folder per class."""
    return _form(
        folders.read,
        folders.is_there,
        image_size=image_size,
        test_share=test_share,
        split_seed=split_seed,
    )


@register(summary="own pictures in train*.parquet and test*.parquet in --data-dir")
def parquet(
    *,
    labels: LabelRule = "refuse",
    label_column: LabelColumn = None,
    image_size: ImageSize = None,
    test_share: TestShare = None,
    split_seed: SplitSeed = 0,
) -> Form:
    """Read pictures in Parquet files, as the Hugging Face Hub stores them."""
    return _form(
        tables.read,
        tables.is_there,
        labels=labels,
        label_column=label_column,
        image_size=image_size,
        test_share=test_share,
        split_seed=split_seed,
    )


@register(summary="own arrays that a Python program passes as data=")
def arrays(*, labels: LabelRule = "refuse") -> Form:
    """Take arrays from a Python program; no file holds them."""

    def read(folder: Path, limits: Limits) -> Data:
        raise UserError(
            "dataset: arrays are passed from Python, as data=(x, y, x_test, y_test); "
            "the command line reads arrays with --dataset npz, from the files that "
            "hsee_jax.data.write_npz writes"
        )

    def take(passed: Arrays, limits: Limits) -> Data:
        return read_arrays(passed, labels=labels, limits=limits)

    return Form(read, lambda folder: False, take=take)


def _form(
    read_all: Callable[..., Data], is_there: Callable[[Path], bool], **options: Any
) -> Form:
    """Make a form from a function that reads all samples of a folder."""

    def read(folder: Path, limits: Limits) -> Data:
        return limited(read_all(folder, **options), limits)

    return Form(read, is_there)
