"""The datasets whose properties are known, each under its name.

``fashion_mnist_small`` comes with the package: the first 6,000 training and 1,000 test
images of Fashion-MNIST (Xiao et al., arXiv:1708.07747), MIT licence, see
LICENSE-fashion-mnist. The others are read from a folder, in the first of these forms
that is there: prepared by tensorflow-datasets (`prepared`), as their authors publish
them (`archives`), as torchvision unpacks them (`torchvision`), as arrays (`npz`).
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data import archives, npz, prepared, torchvision
from hsee_jax.data.download import OnBytes, download_archive
from hsee_jax.data.info import KNOWN, PACKAGED, Data, Limits, Source
from hsee_jax.data.registry import Form, register


@register(summary="6,000 images of Fashion-MNIST, within the package")
def fashion_mnist_small() -> Form:
    """Read the images that come with the package."""

    def read(folder: Path, limits: Limits) -> Data:
        return _read(PACKAGED, Source("the package", _packaged), limits)

    return Form(read, lambda folder: True, KNOWN[PACKAGED])


@register(summary="60,000 grey images of clothes (Xiao et al., 2017)")
def fashion_mnist() -> Form:
    """Read Fashion-MNIST."""
    return _form("fashion_mnist")


@register(summary="60,000 grey images of digits (LeCun et al., 1998)")
def mnist() -> Form:
    """Read MNIST."""
    return _form("mnist")


@register(summary="50,000 colour images of 32x32 pixels (Krizhevsky, 2009)")
def cifar10() -> Form:
    """Read CIFAR-10."""
    return _form("cifar10")


@register(summary="50,000 colour images of 100 classes (Krizhevsky, 2009)")
def cifar100() -> Form:
    """Read CIFAR-100 with its fine labels."""
    return _form("cifar100")


@register(summary="5,000 colour images of 96x96 pixels (Coates et al., 2011)")
def stl10() -> Form:
    """Read the labelled images of STL-10."""
    return _form("stl10")


def _form(name: str) -> Form:
    def read(folder: Path, limits: Limits) -> Data:
        source, passed = _find(name, folder)
        if source is None:
            raise _missing(name, folder, passed)
        data = _read(name, source, limits)
        return data._replace(notes=(*data.notes, *passed))

    def fetch(folder: Path, on_bytes: OnBytes) -> None:
        download_archive(archives.ARCHIVES[name], folder, on_bytes)

    def is_there(folder: Path) -> bool:
        return _find(name, folder)[0] is not None

    return Form(read, is_there, KNOWN[name], fetch)


def _find(name: str, folder: Path) -> tuple[Source | None, list[str]]:
    """Find a form of a dataset.

    Return also why versions that tensorflow-datasets has prepared are passed over, each
    reason as a clause of a sentence.
    """
    source, passed = prepared.find(name, folder)
    for form in (archives, torchvision, npz):
        source = source or form.find(name, folder)
    return source, passed


def _read(name: str, source: Source, limits: Limits) -> Data:
    splits = (source.read("train", limits.train), source.read("test", limits.test))
    return Data(*splits, KNOWN[name], (f"from {source.name}",))


def _missing(name: str, folder: Path, passed: Sequence[str]) -> UserError:
    clauses = (
        f"data_dir: {folder} holds no {name} that can be read here",
        *passed,
        f"`hsee data {name}` downloads it",
        f"allowed are also {name}/train.npz and test.npz, the files of torchvision, "
        f"and what `tfds build --file_format=array_record {name}` makes (as tfrecord "
        "it needs the extra tf)",
    )
    return UserError("; ".join(clauses))


def _packaged(split: str, limit: int | None) -> Dataset:
    path = resources.files("hsee_jax.data") / "fashion_mnist_small.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as contents:
        images, labels = contents[f"{split}_images"], contents[f"{split}_labels"]
    return Dataset(images[:limit, :, :, None], labels[:limit].astype(np.int32))
