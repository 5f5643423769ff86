"""Datasets in every form that they may lie in."""

import hashlib
import logging
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny_archives import WRITE, noise, tar, tiny_archive, write_npz

from hsee_jax import cli
from hsee_jax.config.values import options
from hsee_jax.core.errors import UserError
from hsee_jax.data import (
    DATASETS,
    archives,
    dataset_info,
    is_there,
    load_dataset,
    prepare,
)
from hsee_jax.data.info import KNOWN, LABELS
from hsee_jax.data.moments import moments

REAL = Path(
    os.environ.get("HSEE_TFDS_DIR", Path(__file__).parents[2] / "shared/data/tfds")
)

LOG = "hsee_jax.data.datasets"


def test_every_dataset_is_a_choice():
    own = ("npz", "imagefolder", "parquet", "arrays")
    assert set(options()["dataset"][1].choices) == {*KNOWN, *own} == set(DATASETS)
    assert options()["labels"][1].choices == LABELS
    assert set(archives.ARCHIVES) == set(KNOWN) - {"fashion_mnist_small"}


def test_the_moments_of_pixels_need_little_memory():
    """Of three slices of pixels; a place is only for refusals."""
    pixels = np.random.default_rng(0).integers(0, 99, (5, 1024, 512, 1), np.uint8)
    pixels[4] = 200
    tracemalloc.start()
    (mean,), (deviation,) = moments(pixels, None)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    scaled = pixels / 255
    assert (mean, deviation) == pytest.approx((scaled.mean(), scaled.std()))
    assert most < 5 * pixels.nbytes  # an int64 of each would need 8


def test_the_packaged_dataset_is_whole():
    train, test = load_dataset("fashion_mnist_small")
    assert train.images.shape == (6000, 28, 28, 1)
    assert test.images.shape == (1000, 28, 28, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == test.labels.dtype == np.int32
    # the first labels of Fashion-MNIST, and about a tenth of each class
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert np.bincount(train.labels).min() > 500
    info = dataset_info("fashion_mnist_small")
    assert abs(train.images.mean() / 255 - info.mean[0]) < 0.005
    assert abs(train.images.std() / 255 - info.std[0]) < 0.005


def test_limits_take_the_first():
    name = "fashion_mnist_small"
    everything, _ = load_dataset(name)
    train, test = load_dataset(name, max_train=7, max_test=3)
    np.testing.assert_array_equal(train.images, everything.images[:7])
    assert test.labels.shape == (3,)


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_data_that_are_not_there_say_how_to_get_them(name, tmp_path):
    with pytest.raises(UserError, match="tfds build") as error:
        load_dataset(name, folder=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert f"hsee data {name}" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package logs, also after a command line in the same process."""
    monkeypatch.setattr(logging.getLogger("hsee_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "hsee_jax")
    return lambda: [r.message for r in caplog.records if r.name == LOG]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Write a tiny archive into ``tmp_path``, and return its content."""

    def write(name):
        archive, data = tiny_archive(name, tmp_path)
        monkeypatch.setitem(archives.ARCHIVES, name, archive)
        return data

    return write


@pytest.mark.parametrize("name", WRITE)
def test_an_archive_is_read_as_its_authors_define_it(name, tiny, tmp_path, said):
    written = tiny(name)
    read = load_dataset(name, folder=tmp_path)
    for dataset, (images, labels) in zip(read, written, strict=True):
        np.testing.assert_array_equal(dataset.images, images)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.images.dtype == np.uint8
        assert dataset.labels.dtype == np.int32
    [line] = said()
    assert line.startswith(f"{name}: 10 training and 4 test images of ")
    assert str(tmp_path) in line
    limited, _ = load_dataset(name, folder=tmp_path, max_train=3)
    np.testing.assert_array_equal(limited.images, written[0][0][:3])


def test_stl10_is_stored_by_columns(tmp_path, monkeypatch):
    """Three pixels of an image, at offsets that are worked out by hand."""
    image = bytearray(3 * 96 * 96)
    image[0] = 1  # red, row 0, column 0
    image[5] = 2  # red, row 5, column 0: down the first column
    image[9216 + 2 * 96 + 7] = 3  # green plane, column 2, row 7
    files = {f"{split}_X.bin": bytes(image) for split in ("test", "train")}
    files |= {f"{split}_y.bin": bytes([10]) for split in ("test", "train")}
    path = tmp_path / "stl10_binary.tar.gz"
    tar(path, files)
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest()}
    archive = archives.ARCHIVES["stl10"]._replace(files=md5)
    monkeypatch.setitem(archives.ARCHIVES, "stl10", archive)
    train, _ = load_dataset("stl10", folder=tmp_path)
    assert train.labels.tolist() == [9]
    assert np.argwhere(train.images).tolist() == [
        [0, 0, 0, 0],
        [0, 5, 0, 0],
        [0, 7, 2, 1],
    ]
    assert [train.images[0, 5, 0, 0], train.images[0, 7, 2, 1]] == [2, 3]


@pytest.mark.parametrize("name", WRITE)
def test_a_damaged_archive_is_refused(name, tiny, tmp_path):
    tiny(name)
    archive = archives.ARCHIVES[name]
    path = tmp_path / archive.folder / list(archive.files)[-1]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (flipped, whole[:-1], b""):
        path.write_bytes(damaged)
        for act in (load_dataset, prepare):
            with pytest.raises(UserError, match="MD5 checksum") as error:
                act(name, folder=tmp_path)
            assert "\n" not in str(error.value)
        assert path.read_bytes() == damaged  # not replaced


def test_the_archive_comes_before_arrays(tiny, tmp_path):
    written = tiny("cifar10")
    write_npz(tmp_path / "cifar10", *[noise(2, (32, 32, 3), 10)] * 2)
    train, _ = load_dataset("cifar10", folder=tmp_path)
    np.testing.assert_array_equal(train.images, written[0][0])


def test_a_dataset_of_another_name_is_refused(tmp_path):
    for act in (dataset_info, load_dataset, prepare, is_there):
        with pytest.raises(UserError, match="cifar11 is unknown .did you mean cifar10"):
            act("cifar11", folder=tmp_path)


def test_without_a_folder_the_environment_says_where(tiny, tmp_path, monkeypatch):
    written = tiny("cifar10")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    np.testing.assert_array_equal(load_dataset("cifar10")[1].labels, written[1][1])
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="home/tensorflow_datasets holds no cifar10"):
        load_dataset("cifar10")


@pytest.mark.skipif(not REAL.is_dir(), reason="no prepared CIFAR-10 at HSEE_TFDS_DIR")
def test_real_cifar10():
    train, test = load_dataset("cifar10", folder=REAL, max_train=500, max_test=100)
    assert train.images.shape == (500, 32, 32, 3)
    assert test.images.shape == (100, 32, 32, 3)
    assert set(train.labels) == set(range(10))
    mean = train.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, KNOWN["cifar10"].mean, atol=0.02)


@pytest.mark.parametrize("name", ["mnist", "npz", "imagefolder", "parquet"])
def test_a_folder_without_permission_is_one_line(name, tmp_path, monkeypatch, capsys):
    """The superuser may read every folder, so the file system is a stand-in."""

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for method in ("is_dir", "is_file", "glob", "iterdir"):
        monkeypatch.setattr(Path, method, refuse)
    message = f"data_dir: {tmp_path} cannot be read ("
    with pytest.raises(UserError) as error:
        is_there(name, folder=tmp_path)
    assert str(error.value).startswith(message)
    with pytest.raises(UserError) as error:
        load_dataset(name, folder=tmp_path)
    assert str(error.value).startswith(message)
    assert cli.main(["data", name, "--data-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert message in err and "Permission denied" in err and err.count("\n") == 1


def test_the_home_of_nobody_is_one_line(capsys):
    assert cli.main(["data", "npz", "--data-dir", "~no such user/x"]) == 2
    err = capsys.readouterr().err
    assert (
        "data_dir: ~no such user/x names a user without a home" in err
        and err.count("\n") == 1
    )


def test_a_loop_of_links_is_one_line(tmp_path, capsys):
    loop, run = tmp_path / "loop", tmp_path / "run"
    loop.symlink_to(loop)
    for words in (
        ["report", loop],
        ["train", "demo", "--dataset", "npz", "--data-dir", loop, "--out", run],
        ["data", "cifar10", "--data-dir", loop],
    ):
        assert cli.main(list(map(str, words))) == 2
        line = capsys.readouterr().err
        assert "loop" in line and line.count("\n") == 1
    assert not run.exists()
