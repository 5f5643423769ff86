"""Datasets in every form that they may lie in."""

import hashlib
import io
import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_archives import WRITE, noise, tar, tiny_archive

from hsee_jax.core.errors import UserError
from hsee_jax.config.schema import DataConfig, options, override
from hsee_jax.config.presets import preset
from hsee_jax.data import archives, dataset_info, load_dataset, prepare, prepared
from hsee_jax.data.info import DATASETS, OWN
from hsee_jax.runs.build import build, build_model

REAL = Path(
    os.environ.get("HSEE_TFDS_DIR", Path(__file__).parents[2] / "shared/data/tfds")
)


def test_every_dataset_is_a_choice():
    assert options()["dataset"][1].metadata["choices"] == (*DATASETS, OWN)
    assert set(archives.ARCHIVES) == set(DATASETS) - {"fashion_mnist_small"}


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
    info = dataset_info(DataConfig())
    assert abs(train.images.mean() / 255 - info.mean[0]) < 0.005
    assert abs(train.images.std() / 255 - info.std[0]) < 0.005


def test_limits_take_the_first():
    everything, _ = load_dataset(DataConfig())
    train, test = load_dataset(DataConfig(max_train_samples=7, max_test_samples=3))
    np.testing.assert_array_equal(train.images, everything.images[:7])
    assert test.labels.shape == (3,)


@pytest.mark.parametrize("name", archives.ARCHIVES)
def test_data_that_are_not_there_say_how_to_get_them(name, tmp_path):
    with pytest.raises(UserError, match="tfds build") as error:
        load_dataset(DataConfig(dataset=name, data_dir=str(tmp_path)))
    assert str(tmp_path) in str(error.value)
    assert f"hsee data {name}" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package logs, also after a command line in the same process."""
    monkeypatch.setattr(logging.getLogger("hsee_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "hsee_jax")
    return lambda: [r.message for r in caplog.records if r.name == "hsee_jax.data"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Writes a tiny archive, and returns its configuration and content."""

    def write(name):
        archive, data = tiny_archive(name, tmp_path)
        monkeypatch.setitem(archives.ARCHIVES, name, archive)
        return DataConfig(dataset=name, data_dir=str(tmp_path)), data

    return write


@pytest.mark.parametrize("name", WRITE)
def test_an_archive_is_read_as_its_authors_define_it(name, tiny, said):
    config, written = tiny(name)
    read = load_dataset(config)
    for dataset, (images, labels) in zip(read, written, strict=True):
        np.testing.assert_array_equal(dataset.images, images)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.images.dtype == np.uint8
        assert dataset.labels.dtype == np.int32
    [line] = said()
    assert line.startswith(f"{name}: 10 training and 4 test images of ")
    assert str(config.data_dir) in line
    limited, _ = load_dataset(
        DataConfig(dataset=name, data_dir=config.data_dir, max_train_samples=3)
    )
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
    train, _ = load_dataset(DataConfig(dataset="stl10", data_dir=str(tmp_path)))
    assert train.labels.tolist() == [9]
    assert np.argwhere(train.images).tolist() == [
        [0, 0, 0, 0],
        [0, 5, 0, 0],
        [0, 7, 2, 1],
    ]
    assert [train.images[0, 5, 0, 0], train.images[0, 7, 2, 1]] == [2, 3]


@pytest.mark.parametrize("name", WRITE)
def test_a_damaged_archive_is_refused(name, tiny):
    config, _ = tiny(name)
    archive = archives.ARCHIVES[name]
    path = Path(config.data_dir) / archive.folder / list(archive.files)[-1]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (flipped, whole[:-1], b""):
        path.write_bytes(damaged)
        for act in (load_dataset, prepare):
            with pytest.raises(UserError, match="MD5 checksum") as error:
                act(config)
            assert "\n" not in str(error.value)
        assert path.read_bytes() == damaged  # not replaced


def write_npz(folder, train, test):
    folder.mkdir(exist_ok=True)
    for split, (images, labels) in (("train", train), ("test", test)):
        np.savez(folder / f"{split}.npz", images=images, labels=labels)


def test_arrays_of_a_known_dataset(tmp_path):
    data = [noise(n, (32, 32, 3), 100) for n in (6, 3)]
    write_npz(tmp_path / "cifar100", *data)
    config = DataConfig(dataset="cifar100", data_dir=str(tmp_path))
    for dataset, (images, labels) in zip(load_dataset(config), data, strict=True):
        np.testing.assert_array_equal(dataset.images, images)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.labels.dtype == np.int32


def test_the_archive_comes_before_arrays(tiny, tmp_path):
    config, written = tiny("cifar10")
    write_npz(tmp_path / "cifar10", *[noise(2, (32, 32, 3), 10)] * 2)
    np.testing.assert_array_equal(load_dataset(config)[0].images, written[0][0])


def test_an_own_dataset_of_any_shape(tmp_path):
    """Shape, classes and channel statistics are those of its training images."""
    images, labels = noise(40, (12, 20, 2), 3)
    images[..., 1] = 77  # a constant channel
    labels[:3] = [0, 1, 2]
    write_npz(tmp_path, (images, labels), (images[:5], labels[:5]))
    config = override(preset("demo"), dataset="npz", data_dir=str(tmp_path))
    info = dataset_info(config.data)
    assert info[:2] == ((12, 20, 2), 3)
    np.testing.assert_allclose(info.mean, images.mean((0, 1, 2)) / 255, rtol=1e-9)
    np.testing.assert_allclose(info.std[0], images[..., 0].std() / 255, rtol=1e-9)
    assert info.std[1] == 1.0
    assert build_model(config).input_shape == (12, 20, 2)
    config = override(config, num_clients=2, cuts=("1", "2"), width=2, batch_size=8)
    experiment = build(config)
    assert sorted(len(shard) for shard in experiment.shards.values()) == [18, 18]
    assert len(experiment.validation.labels) == 4
    assert experiment.test.images.shape == (5, 12, 20, 2)
    write_npz(tmp_path, (images[:, :6], labels), (images[:5, :6], labels[:5]))
    assert dataset_info(config.data).input_shape == (6, 20, 2)  # read again


GOOD = {"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.array([0, 1])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 1), np.float32)}, "float32 [2, 8, 8, 1]"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "uint8 [2, 8, 8]"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "[0, 8, 8, 1]"),
        ({"labels": np.array([0.0, 1.0])}, "float64 [2]"),
        ({"labels": np.array([0, 1, 1])}, "int64 [3]"),
        ({"labels": np.array([0, -1])}, "from 0"),
        ({"labels": np.array([0, 2])}, "label 2; allowed are 0..1"),
        ({"images": np.zeros((2, 8, 9, 1), np.uint8)}, "images of [8, 9, 1]"),
        ({"images": np.array([None, 1])}, "allow_pickle=False"),
        (None, "labels is not a file"),
    ],
)
def test_arrays_are_checked(changes, message, tmp_path):
    write_npz(tmp_path, *[(GOOD["images"], GOOD["labels"])] * 2)
    content = {"images": GOOD["images"]} if changes is None else GOOD | changes
    np.savez(tmp_path / "test.npz", **content)
    with pytest.raises(UserError) as error:
        load_dataset(DataConfig(dataset="npz", data_dir=str(tmp_path)))
    assert message in str(error.value)
    assert f"{tmp_path}/test.npz" in str(error.value)
    assert "allowed" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_arrays(tmp_path):
    write_npz(tmp_path, *[(GOOD["images"], GOOD["labels"])] * 2)
    path = tmp_path / "train.npz"
    whole = path.read_bytes()
    npy = io.BytesIO()
    np.save(npy, GOOD["images"])
    pickled = b"\x80\x04\x95\x00."
    for content in (b"", whole[:-30], b"text", npy.getvalue(), pickled):
        path.write_bytes(content)
        with pytest.raises(UserError, match="train.npz cannot be read"):
            dataset_info(DataConfig(dataset="npz", data_dir=str(tmp_path)))
    path.unlink()
    with pytest.raises(UserError, match=r"folder with train\.npz and test\.npz"):
        dataset_info(DataConfig(dataset="npz", data_dir=str(tmp_path)))


@pytest.fixture
def mocked(tmp_path, monkeypatch):
    """Makes a folder look prepared, and returns tfds's mock of its 8 samples."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(  # its own expects a `self` that the mock does not pass
        "tensorflow_datasets.testing.mocking._getitems",
        lambda keys, generator: [generator[key] for key in keys],
    )

    def write(name, form):
        policy = tfds.testing.MockPolicy.USE_CODE
        with tfds.testing.mock_data(policy=policy):
            builder = tfds.builder(name)
        folder = tmp_path / name / str(builder.version)
        folder.mkdir(parents=True)
        files = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        content = {
            "name": name,
            "version": str(builder.version),
            "fileFormat": form,
            "splits": [
                {"name": split, "shardLengths": ["8"], "filepathTemplate": files}
                for split in ("train", "test")
            ],
        }
        (folder / "dataset_info.json").write_text(json.dumps(content))
        builder.info.features.save_config(folder)
        config = DataConfig(dataset=name, data_dir=str(tmp_path), max_train_samples=5)
        return config, tfds.testing.mock_data(num_examples=8, data_dir=str(tmp_path))

    return write


def check_mocked(config, form, said):
    train, test = load_dataset(config)
    info = dataset_info(config)
    assert train.images.shape == (5, *info.input_shape)
    assert test.images.shape == (8, *info.input_shape)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert 0 <= train.labels.min() <= train.labels.max() < info.num_classes
    [line] = said()
    assert line.endswith(f"as {form}")


@pytest.mark.parametrize("name", WRITE)
def test_what_tensorflow_datasets_has_prepared(name, mocked, said):
    config, mock = mocked(name, "array_record")
    with mock:
        check_mocked(config, "array_record", said)


def test_tfrecord_with_tensorflow(mocked, said):
    pytest.importorskip("tensorflow")
    config, mock = mocked("cifar100", "tfrecord")
    with mock:
        check_mocked(config, "tfrecord", said)


def test_tfrecord_takes_the_way_of_tensorflow(mocked, said, monkeypatch):
    """With stand-ins for what needs TensorFlow."""
    import tensorflow_datasets as tfds

    def as_dataset(builder, *, split, shuffle_files, read_config):
        assert not shuffle_files and not read_config.try_autocache
        images, labels = noise(8, (32, 32, 3), 100)
        return ({"image": i, "label": k} for i, k in zip(images, labels, strict=True))

    monkeypatch.setattr(prepared, "find_spec", lambda library: True)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", as_dataset)
    monkeypatch.setattr(tfds, "as_numpy", iter)
    monkeypatch.setattr(tfds, "ReadConfig", SimpleNamespace)
    check_mocked(mocked("cifar100", "tfrecord")[0], "tfrecord", said)


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="TensorFlow is there")
def test_tfrecord_without_tensorflow_leaves_the_turn_to_the_archive(mocked, tiny):
    config, _ = mocked("cifar100", "tfrecord")
    with pytest.raises(UserError, match="extra tf"):
        load_dataset(config)
    archived, written = tiny("cifar100")
    train, _ = load_dataset(archived)
    np.testing.assert_array_equal(train.images, written[0][0])


def test_prepared_data_that_are_damaged(mocked):
    config, _ = mocked("cifar10", "array_record")  # and no mock: no files
    with pytest.raises(UserError, match="cannot be read") as error:
        load_dataset(config)
    assert "\n" not in str(error.value)
    next(Path(config.data_dir).rglob("dataset_info.json")).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_dataset(config)


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
