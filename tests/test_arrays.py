"""Datasets as arrays: the user's own, and known ones."""

import io
import json

import numpy as np
import pytest
from tiny_archives import noise, write_npz

from hsee_jax import cli
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.data import dataset_info, load_dataset, prepare
from hsee_jax.data.info import LABELS as LABEL_RULES
from hsee_jax.runs.build import build, build_model
from hsee_jax.runs.folder import read_info
from hsee_jax.runs.same_data import check_info


def test_arrays_of_a_known_dataset(tmp_path):
    data = [noise(n, (32, 32, 3), 100) for n in (6, 3)]
    write_npz(tmp_path / "cifar100", *data)
    read = load_dataset("cifar100", folder=tmp_path)
    for dataset, (images, labels) in zip(read, data, strict=True):
        np.testing.assert_array_equal(dataset.images, images)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.labels.dtype == np.int32


def test_an_own_dataset_of_any_shape(tmp_path):
    """Shape, classes and channel statistics are those of its training images."""
    images, labels = noise(40, (12, 20, 2), 3)
    images[..., 1] = 77  # a constant channel
    labels[:3] = [0, 1, 2]
    write_npz(tmp_path, (images, labels), (images[:5], labels[:5]))
    config = override(preset("demo"), dataset="npz", data_dir=str(tmp_path))
    info = dataset_info("npz", folder=tmp_path)
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
    assert dataset_info("npz", folder=tmp_path).input_shape == (6, 20, 2)  # read again


GOOD = {"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.array([0, 1])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 1), np.float32)}, "samples of float32; allowed"),
        ({"images": np.array(["a", "b"])}, "samples of type <U1"),
        ({"images": np.zeros(2, np.uint8)}, "samples of the shape [2]"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "0 samples"),
        ({"images": np.zeros((2, 0, 8, 1), np.uint8)}, "0 numbers, [2, 0, 8, 1]"),
        ({"labels": np.array([0.0, 1.0])}, "labels of type float64"),
        ({"labels": np.array([0, 1, 1])}, "labels of the shape [3]"),
        ({"labels": np.array([0, -1])}, "label -1; allowed are 0..1"),
        ({"labels": np.array([0, 2])}, "label 2; allowed are 0..1"),
        (
            {"images": np.zeros((2, 8, 9, 1), np.uint8)},
            "samples of [8, 9, 1]; allowed are [8, 8, 1]",
        ),
        ({"images": np.array([None, 1])}, "allow_pickle=False"),
        (None, "test.npz holds images; allowed are the arrays `x` and `y`"),
    ],
)
def test_arrays_are_checked(changes, message, tmp_path):
    write_npz(tmp_path, *[(GOOD["images"], GOOD["labels"])] * 2)
    content = {"images": GOOD["images"]} if changes is None else GOOD | changes
    np.savez(tmp_path / "test.npz", **content)
    with pytest.raises(UserError) as error:
        load_dataset("npz", folder=tmp_path)
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
            dataset_info("npz", folder=tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"folder with train\.npz and test\.npz"):
        dataset_info("npz", folder=tmp_path)


IDS = [0, 5, 2**40, 12]
LABELS = {
    "ids": (np.array(IDS), "the label 5, but not 1"),
    "from 1": (np.array([1, 2, 3]), "the label 1, but not 0"),
    "a gap": (np.array([0, 1, 3], np.uint8), "the label 3, but not 2"),
    "negative": (np.array([-7, 0, 1, -2]), "the label -7;"),
    "unsigned": (np.array([2**64 - 1, 2**63], np.uint64), f"the label {2**63}, but"),
}


def write_labels(folder, train, test):
    write_npz(
        folder,
        *((noise(len(labels), (8, 8, 1), 2)[0], labels) for labels in (train, test)),
    )


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_not_0_to_k(case, tmp_path):
    """They are refused, or remapped to their ranks."""
    labels, message = LABELS[case]
    labels = np.concatenate([labels, labels[::-1]])
    write_labels(tmp_path, labels, labels[:2])
    for act in (dataset_info, load_dataset, prepare):
        with pytest.raises(UserError) as error:
            act("npz", folder=tmp_path)
        assert f"labels: {tmp_path}/train.npz holds {message}" in str(error.value)
        assert "--labels remap" in str(error.value)
    info = dataset_info("npz", folder=tmp_path, labels="remap")
    values = sorted(set(labels.tolist()))
    assert info.num_classes == len(values)
    assert info.label_values == tuple(values)
    for split, given in zip(
        load_dataset("npz", folder=tmp_path, labels="remap"),
        (labels, labels[:2]),
        strict=True,
    ):
        assert split.labels.tolist() == [values.index(v) for v in given.tolist()]
        assert split.labels.dtype == np.int32
    line = prepare("npz", folder=tmp_path, labels="remap")
    assert f"{len(values)} classes (labels {values[0]} to {values[-1]}, " in line


def test_labels_are_judged_on_all_training_samples(tmp_path):
    """A limit, or a test set without some classes, changes no class."""
    write_labels(tmp_path, np.array([9, 4, 6, 4]), np.array([6, 6]))
    train, test = load_dataset("npz", folder=tmp_path, labels="remap", max_train=1)
    assert (train.labels.tolist(), test.labels.tolist()) == ([2], [1, 1])
    write_labels(tmp_path, np.array([2, 1, 0, 2]), np.array([1, 1]))
    for rule in LABEL_RULES:
        train, test = load_dataset("npz", folder=tmp_path, labels=rule, max_train=1)
        assert (train.labels.tolist(), test.labels.tolist()) == ([2], [1, 1])
        assert dataset_info("npz", folder=tmp_path, labels=rule).label_values is None


def test_test_labels_that_no_training_sample_has(tmp_path):
    write_labels(tmp_path, np.array(IDS), np.array([12, 7]))
    with pytest.raises(UserError, match="holds the label 7; allowed are the 4 labels"):
        load_dataset("npz", folder=tmp_path, labels="remap")


@pytest.mark.parametrize("rule", LABEL_RULES)
def test_a_single_class_is_refused(rule, tmp_path, capsys):
    for label in (0, 3):
        write_labels(tmp_path, np.array([label] * 4), np.array([label]))
        words = ["--dataset", "npz", "--data-dir", str(tmp_path), "--labels", rule]
        assert cli.main(["train", *words, "--out", str(tmp_path / "run")]) == 2
        _, err = capsys.readouterr()
        assert f"no label but {label}; allowed are 2 classes or more" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_a_rule_for_labels_that_is_unknown_or_has_no_effect(tmp_path, capsys):
    write_labels(tmp_path, np.array([0, 1]), np.array([0]))
    with pytest.raises(UserError, match="labels: remp is unknown .did you mean remap"):
        load_dataset("npz", folder=tmp_path, labels="remp")
    assert cli.main(["info", "--labels", "remap"]) == 2
    assert "labels: remap has no effect on dataset fashion" in capsys.readouterr().err


def test_known_datasets_keep_their_classes(tmp_path):
    """Whether or not there is a sample of each."""
    data = [noise(n, (32, 32, 3), 100) for n in (4, 2)]
    write_npz(tmp_path / "cifar100", *data)
    train, _ = load_dataset("cifar100", folder=tmp_path)
    np.testing.assert_array_equal(train.labels, data[0][1])
    for label in (-1, 100):
        data[1][1][0] = label
        write_npz(tmp_path / "cifar100", *data)
        with pytest.raises(UserError, match=f"holds the label {label}; .* 0..99"):
            load_dataset("cifar100", folder=tmp_path)


def test_a_run_keeps_the_original_labels(tmp_path, capsys):
    """Training remaps, and the run's folder says what each class was."""
    data, run = tmp_path / "data", tmp_path / "run"
    images = noise(16, (28, 28, 1), 2)[0]
    labels = np.resize(IDS, 16)
    write_npz(data, (images, labels), (images[:4], labels[:4]))
    words = "--network tiny --plugin tiny --num-clients 2 --cuts 1 2".split()
    words += "--rounds 1 --batch-size 4".split()
    words += ["--dataset", "npz", "--data-dir", str(data), "--out", str(run)]
    assert cli.main(["train", *words]) == 2
    assert "holds the label 5, but not 1" in capsys.readouterr().err
    assert cli.main(["train", *words, "--labels", "remap"]) == 0
    assert json.loads((run / "data.json").read_text())["label_values"] == sorted(IDS)
    assert read_info(run).label_values == tuple(sorted(IDS))
    assert cli.main(["eval", str(run)]) == 0
    words = ["data", "npz", "--data-dir", str(data), "--labels", "remap"]
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "4 classes (labels 0 to 1099511627776, ascending)" in capsys.readouterr().out
    labels[labels == 5] = 6  # the same classes, of other labels
    write_npz(data, (images, labels), (images[:4], labels[:4]))
    assert cli.main(["eval", str(run)]) == 2
    assert "label_values (0, 6, 12, 1099511627776)" in capsys.readouterr().err


def test_what_older_runs_say_of_their_data_is_read(tmp_path):
    write_npz(tmp_path, *[(GOOD["images"], GOOD["labels"])] * 2)
    info = dataset_info("npz", folder=tmp_path)
    known = info._asdict()
    (tmp_path / "data.json").write_text(json.dumps(known))
    assert read_info(tmp_path) == info
    del known["label_values"]
    (tmp_path / "data.json").write_text(json.dumps(known))
    assert read_info(tmp_path) == info
    check_info(tmp_path, info)
    with pytest.raises(UserError, match="label_values .3, 4."):
        check_info(tmp_path, info._replace(label_values=(3, 4)))
    for values in ([1], 12, [1, None], []):
        classes = {"num_classes": 0} if values == [] else {}
        content = json.dumps(known | {"label_values": values} | classes)
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(UserError, match="data.json is missing or damaged"):
            read_info(tmp_path)
