"""The one way to data: `load_dataset`.

``fashion_mnist_small`` comes with the package: the first 6,000 training and 1,000 test
images of Fashion-MNIST (Xiao et al., arXiv:1708.07747), MIT licence, see
LICENSE-fashion-mnist. The others are read from a folder, in the first of these forms
that is there: prepared by tensorflow-datasets (`prepared`), as their authors publish
them (`archives`), as arrays (`arrays`).
"""

import logging
import os
from importlib import resources
from pathlib import Path

import numpy as np

from hsee_jax.core.types import Dataset
from hsee_jax.core.errors import UserError
from hsee_jax.config.schema import DataConfig
from hsee_jax.data import archives, arrays, prepared
from hsee_jax.data.download import OnBytes, fetch
from hsee_jax.data.info import DATASETS, OWN, PACKAGED, DatasetInfo, Source

_log = logging.getLogger(__name__)


def dataset_info(config: DataConfig) -> DatasetInfo:
    """What is known of a dataset; of the user's own by reading its training images.

    Raises:
      UserError: these are not there, or not as they must be.
    """
    if config.dataset != OWN:
        return DATASETS[config.dataset]
    if find_source(config) is None:
        raise _missing(config)
    return arrays.own_info(_folder(config))


def load_dataset(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Reads the training and the test samples, ``uint8 [M, H, W, C]``, ``int32 [M]``.

    Where they come from is logged.

    Raises:
      UserError: the data are not where the configuration says, or not what they should
        be.
    """
    source = find_source(config)
    if source is None:
        raise _missing(config)
    train, test, line = _read(config, source)
    if config.dataset != PACKAGED:
        _log.info(line)
    return train, test


def prepare(
    config: DataConfig, on_bytes: OnBytes = lambda file, done, total: None
) -> str:
    """Reads a dataset once, and downloads its archive before that if nothing is there.

    Args:
      config: which dataset, and where it is or will be.
      on_bytes: hears how far the download is.

    Returns:
      What there is, in one line.

    Raises:
      UserError: it is neither there nor can it be downloaded, or it is not what it
        should be.
    """
    source = find_source(config)
    how = "there already" if source else "downloaded"
    if source is None and config.dataset in archives.ARCHIVES:
        fetch(archives.ARCHIVES[config.dataset], _folder(config), on_bytes)
        source = find_source(config)
    if source is None:
        raise _missing(config)
    return f"{how}: {_read(config, source)[2]}"


def find_source(config: DataConfig) -> Source | None:
    """The form in which a dataset is there, if any; nothing is read yet."""
    if config.dataset == PACKAGED:
        return Source("the package", _packaged)
    forms = (prepared.find, archives.find, arrays.find)
    found = (find(config.dataset, _folder(config)) for find in forms)
    return next((source for source in found if source), None)


def _folder(config: DataConfig) -> Path:
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(config.data_dir or default).expanduser().absolute()


def _read(config: DataConfig, source: Source) -> tuple[Dataset, Dataset, str]:
    """Training samples, test samples, and a line about them."""
    train = source.read("train", config.max_train_samples)
    test = source.read("test", config.max_test_samples)
    shape = "x".join(map(str, train.images.shape[1:]))
    line = (
        f"{config.dataset}: {len(train.labels):,} training and {len(test.labels):,} "
        f"test images of {shape} in {dataset_info(config).num_classes} classes, from "
        f"{source.name}"
    )
    return train, test, line


def _missing(config: DataConfig) -> UserError:
    name, folder = config.dataset, _folder(config)
    if name == OWN:
        return UserError(
            f"data_dir: {folder} is not allowed for {OWN}; allowed is a folder with "
            "train.npz and test.npz, each with `images` and `labels`"
        )
    return UserError(
        f"data_dir: {folder} holds no {name} that can be read here; `hsee data {name}` "
        f"downloads it; allowed are also {name}/train.npz and test.npz, and what `tfds "
        f"build --file_format=array_record {name}` makes (as tfrecord it needs the "
        "extra tf)"
    )


def _packaged(split: str, limit: int | None) -> Dataset:
    path = resources.files("hsee_jax.data") / "fashion_mnist_small.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as contents:
        images, labels = contents[f"{split}_images"], contents[f"{split}_labels"]
    return Dataset(images[:limit, :, :, None], labels[:limit].astype(np.int32))
