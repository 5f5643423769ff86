"""Datasets that tensorflow-datasets has prepared, in whatever version and format."""

import logging
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_archives import WRITE, noise, tiny_archive, write_prepared

from hsee_jax import cli
from hsee_jax.core.errors import UserError
from hsee_jax.data import archives, load_dataset, prepared
from hsee_jax.data.info import KNOWN

without_tensorflow = pytest.mark.skipif(
    find_spec("tensorflow") is not None, reason="TensorFlow is there"
)

LOG = "hsee_jax.data.datasets"


@pytest.fixture
def write(tmp_path):
    """Write a version of 6 training and 3 test images; return its folder and them."""

    def act(name="cifar10", version="3.0.2", splits=("train", "test"), **changes):
        info = KNOWN[name]
        counts = {"train": 6, "test": 3} | changes.pop("counts", {})
        data = {
            split: noise(counts[split], info.input_shape, info.num_classes, seed)
            for seed, split in enumerate(splits, start=int(version[-1]))
        }
        folder = write_prepared(tmp_path, name, data, version=version, **changes)
        return folder, data

    return act


@pytest.fixture
def read(tmp_path, caplog, monkeypatch):
    """Read a dataset; return both splits and the line that is logged."""
    monkeypatch.setattr(logging.getLogger("hsee_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "hsee_jax.data")

    def act(name="cifar10", **limits):
        train, test = load_dataset(name, folder=tmp_path, **limits)
        lines = [r.message for r in caplog.records if r.name == LOG]
        return {"train": train, "test": test}, lines[-1]

    return act


def check(found, written):
    for split, (images, labels) in written.items():
        np.testing.assert_array_equal(found[split].images, images)
        np.testing.assert_array_equal(found[split].labels, labels)
        assert found[split].images.dtype == np.uint8
        assert found[split].labels.dtype == np.int32


@pytest.mark.parametrize("name", WRITE)
def test_what_tensorflow_datasets_has_prepared(name, write, read):
    folder, written = write(name)
    found, line = read(name)
    check(found, written)
    assert line.endswith(
        f"from version 3.0.2 of {name}, which tensorflow-datasets has prepared in "
        f"{folder} as array_record"
    )
    limited, _ = read(name, max_train=4)
    check(limited, {"train": [a[:4] for a in written["train"]]})


@pytest.mark.parametrize("version", ["1.0.0", "3.0.1", "99.0.0"])
def test_a_version_that_the_library_does_not_make(version, write, read):
    _, written = write(version=version)
    found, line = read()
    check(found, written)
    assert f"from version {version} of cifar10" in line


def test_the_newest_version_that_can_be_read(write, read):
    """By number: 3.0.10 is newer than 3.0.9."""
    write(version="3.0.9")
    _, written = write(version="3.0.10")
    unlike, _ = write(version="4.0.0", classes=12)
    (write(version="5.0.0")[0] / "features.json").unlink()
    found, line = read()
    check(found, written)
    assert "from version 3.0.10 of cifar10" in line
    assert f"version 4.0.0 in {unlike} cannot be read: it holds" in line
    assert "version 5.0.0 in " in line
    assert "3.0.9" not in line


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shape": (28, 28, 1)}, "uint8 [28, 28, 1] in 10 classes"),
        ({"shape": (None, None, 3)}, "[None, None, 3]"),
        ({"classes": 20}, "uint8 [32, 32, 3] in 20 classes, where cifar10 has"),
        ({"splits": ("train",)}, "it holds no test samples"),
        ({"counts": {"test": 0}}, "it holds no test samples"),
        ({"form": "riegeli"}, "its format is riegeli"),
    ],
)
def test_versions_that_do_not_fit_are_named(changes, why, write, tmp_path):
    folders = [write(version=v, **changes)[0] for v in ("3.0.1", "3.0.3")]
    with pytest.raises(UserError) as error:
        load_dataset("cifar10", folder=tmp_path)
    for folder in folders:
        assert f"version {folder.name} in {folder} cannot be read: " in str(error.value)
    assert str(error.value).count(why) == 2
    assert "`hsee data cifar10` downloads it" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_names_what_it_passes_over(write, tmp_path, capsys, monkeypatch):
    archive, _ = tiny_archive("cifar10", tmp_path)
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", archive)
    write(version="3.0.1", classes=7)
    assert cli.main(["data", "cifar10", "--data-dir", str(tmp_path)]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("there already: cifar10: 10 training and 4 test images")
    assert "checksums as published; version 3.0.1 in " in out
    assert "in 7 classes" in out


def test_damaged_descriptions(write, tmp_path):
    folder, _ = write(version="3.0.1")
    for path in (folder / "features.json", folder / "dataset_info.json"):
        for text in ("{", "[]", "{}", ""):
            path.write_text(text)
            with pytest.raises(UserError, match="version 3.0.1 in .* cannot be read"):
                load_dataset("cifar10", folder=tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "no example"])
def test_damaged_samples(damage, write, tmp_path):
    folder, _ = write()
    path = next(folder.glob("*train*"))
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[:-5] if damage == "cut" else bytes(len(whole)))
    with pytest.raises(UserError, match="cifar10/3.0.2 cannot be read") as error:
        load_dataset("cifar10", folder=tmp_path)
    assert "\n" not in str(error.value)


def test_tfrecord_takes_the_way_of_tensorflow(write, read, monkeypatch):
    """With stand-ins for what needs TensorFlow."""
    import tensorflow_datasets as tfds

    _, written = write(form="tfrecord")

    def as_dataset(builder, *, split, shuffle_files, read_config):
        assert not shuffle_files and not read_config.try_autocache
        return (
            {"image": image, "label": label}
            for image, label in zip(*written[split], strict=True)
        )

    monkeypatch.setattr(prepared, "find_spec", lambda library: True)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_dataset", as_dataset)
    monkeypatch.setattr(tfds, "as_numpy", iter)
    monkeypatch.setattr(tfds, "ReadConfig", SimpleNamespace)
    found, line = read()
    check(found, written)
    assert line.endswith("as tfrecord")


@without_tensorflow
def test_tfrecord_without_tensorflow_leaves_the_turn_to_the_archive(
    write, read, tmp_path, monkeypatch
):
    write(form="tfrecord", version="3.0.1")
    with pytest.raises(UserError, match="3.0.1 .* tfrecord needs tensorflow.*extra tf"):
        load_dataset("cifar10", folder=tmp_path)
    archive, written = tiny_archive("cifar10", tmp_path)
    monkeypatch.setitem(archives.ARCHIVES, "cifar10", archive)
    found, line = read()
    check(found, dict(zip(("train", "test"), written, strict=True)))
    assert "version 3.0.1" in line
