"""The packaged dataset, and tensorflow-datasets, mocked and real."""

import os
from pathlib import Path

import numpy as np
import pytest

from hsee_jax.base import UserError
from hsee_jax.config import DataConfig
from hsee_jax.data import DATASETS, load_dataset

REAL = Path(
    os.environ.get("HSEE_TFDS_DIR", Path(__file__).parents[2] / "shared/data/tfds")
)


def test_the_packaged_dataset_is_whole():
    train, test = load_dataset(DataConfig())
    assert train.images.shape == (6000, 28, 28, 1)
    assert test.images.shape == (1000, 28, 28, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == test.labels.dtype == np.int32
    # the first labels of Fashion-MNIST, and about a tenth of each class
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.bincount(train.labels).min() > 500
    info = DATASETS["fashion_mnist_small"]
    assert abs(train.images.mean() / 255 - info.mean[0]) < 0.005
    assert abs(train.images.std() / 255 - info.std[0]) < 0.005


def test_limits_take_the_first():
    everything, _ = load_dataset(DataConfig())
    train, test = load_dataset(DataConfig(max_train_samples=7, max_test_samples=3))
    np.testing.assert_array_equal(train.images, everything.images[:7])
    assert test.labels.shape == (3,)


def test_data_that_are_not_there_say_how_to_get_them(tmp_path):
    with pytest.raises(UserError, match="tfds build") as error:
        load_dataset(DataConfig(dataset="cifar10", data_dir=str(tmp_path)))
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not REAL.is_dir(), reason="no prepared CIFAR-10 at HSEE_TFDS_DIR")
def test_real_cifar10():
    config = DataConfig(
        dataset="cifar10",
        data_dir=str(REAL),
        max_train_samples=500,
        max_test_samples=100,
    )
    train, test = load_dataset(config)
    assert train.images.shape == (500, 32, 32, 3)
    assert test.images.shape == (100, 32, 32, 3)
    assert set(train.labels) == set(range(10))
    mean = train.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, DATASETS["cifar10"].mean, atol=0.02)
