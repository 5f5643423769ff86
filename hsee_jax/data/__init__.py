"""The one way to data: `load_dataset`.

``fashion_mnist_small`` comes with the package: the first 6,000 training and 1,000 test
images of Fashion-MNIST (Xiao et al., arXiv:1708.07747), MIT licence, see
LICENSE-fashion-mnist. The others are read from what tensorflow-datasets has prepared,
without TensorFlow.
"""

import logging
from importlib import resources
from typing import NamedTuple

import numpy as np

from hsee_jax.base import Dataset, UserError
from hsee_jax.config import DataConfig


class DatasetInfo(NamedTuple):
    """What is known of a dataset before it is read."""

    input_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int
    mean: tuple[float, ...]  # per channel, over the full training set, scale 0..1
    std: tuple[float, ...]


DATASETS = {
    "fashion_mnist_small": DatasetInfo((28, 28, 1), 10, (0.2860,), (0.3530,)),
    "cifar10": DatasetInfo(
        (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
}


def load_dataset(config: DataConfig) -> tuple[Dataset, Dataset]:
    """Reads the training and the test samples, ``uint8 [M, H, W, C]``, ``int32 [M]``.

    Raises:
      UserError: the data are not where the configuration says.
    """
    limits = {"train": config.max_train_samples, "test": config.max_test_samples}
    if config.dataset == "fashion_mnist_small":
        train, test = (_packaged(split, limits[split]) for split in limits)
    else:
        train, test = (_tfds(config, split, limits[split]) for split in limits)
    return train, test


def _packaged(split: str, limit: int | None) -> Dataset:
    path = resources.files("hsee_jax.data") / "fashion_mnist_small.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return Dataset(images[:limit, :, :, None], labels[:limit].astype(np.int32))


def _tfds(config: DataConfig, split: str, limit: int | None) -> Dataset:
    logging.getLogger("absl").setLevel(logging.ERROR)  # else it warns of what we say
    import tensorflow_datasets as tfds

    builder = tfds.builder(config.dataset, data_dir=config.data_dir)
    how = (
        f"allowed is a folder with {config.dataset}/{builder.version}, which `pip "
        "install tensorflow` and `tfds build --file_format=array_record "
        f"{config.dataset}` make"
    )
    if not builder.is_prepared():
        place = config.data_dir or "~/tensorflow_datasets"
        raise UserError(f"data_dir: {place} holds no prepared {config.dataset}; {how}")
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:  # prepared as TFRecord
        raise UserError(
            f"data_dir: {config.data_dir} holds {config.dataset} in a format that "
            f"needs TensorFlow; {how}"
        ) from error
    count = len(source) if limit is None else min(limit, len(source))
    samples = [source[i] for i in range(count)]
    return Dataset(
        np.stack([sample["image"] for sample in samples]),
        np.asarray([sample["label"] for sample in samples], np.int32),
    )
