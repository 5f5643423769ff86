"""Arrays of any kind: images, features and series, from files and from Python."""

import io
import json
import shutil
import struct
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import write_run
from tiny_archives import noise

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.core import Dataset, UserError
from hsee_jax.data import (
    DATASETS,
    dataset_info,
    normalize,
    read_arrays,
    read_dataset,
    write_npz,
)
from hsee_jax.federation import forward
from hsee_jax.inference import study
from hsee_jax.inference.client_study import Target
from hsee_jax.runs import evaluate, reopen
from hsee_jax.runs.folder import read_info
from hsee_jax.runs.same_data import check_info

NUMBERS = np.array([0, 1, 2] * 4)


def samples(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return (200 * rng.random((12, *shape))).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "stored", "clauses"),
    [
        ((5, 4, 3), np.uint8, np.uint8, "test images of 5x4x3"),
        ((5, 4), np.uint8, np.uint8, "grey images [M, H, W] get one channel"),
        ((5, 4, 3), np.uint16, np.float32, "images of 5x4x3|uint16 becomes float32"),
        ((5, 4), np.uint16, np.float32, "one channel; uint16 becomes float32"),
        ((5, 4, 3), np.float32, np.float32, "test images of 5x4x3"),
        ((7,), np.float32, np.float32, "test rows of 7"),
        ((7,), np.int64, np.float32, "test rows of 7|int64 becomes float32"),
        ((7,), np.uint8, np.float32, "test rows of 7|uint8 becomes float32"),
        ((5, 4), np.float64, np.float32, "test series of 5x4|float64 becomes float32"),
        ((2, 5, 4, 3), np.uint8, np.float32, "test samples of 2x5x4x3"),
    ],
)
def test_samples(shape, dtype, stored, clauses, said):
    """What becomes of them, and their statistics by the last axis."""
    x, x_test = samples(shape, dtype), samples(shape, dtype, seed=1)
    data = read_arrays((x, NUMBERS, x_test[:6], NUMBERS[:6]))
    grey = len(shape) == 2 and np.issubdtype(dtype, np.unsignedinteger)
    whole = x[..., None] if grey else x
    assert data.info.input_shape == whole.shape[1:]
    assert data.train.images.dtype == stored == np.dtype(data.info.dtype)
    np.testing.assert_array_equal(data.train.images, whole.astype(stored))
    np.testing.assert_array_equal(
        data.test.images[..., 0],
        (x_test[:6] if grey else x_test[:6, ..., 0]).astype(stored),
    )
    values = whole / 255 if stored == np.uint8 else whole.astype(np.float64)
    axes = tuple(range(whole.ndim - 1))
    np.testing.assert_allclose(data.info.mean, values.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(data.info.std, values.std(axes), rtol=1e-6)
    inputs = normalize(data.train.images, data.info.mean, data.info.std)
    assert inputs.dtype == jnp.float32
    np.testing.assert_allclose(inputs.mean(axes), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std(axes), 1, atol=1e-4)
    [line] = said()
    assert all(clause in line for clause in clauses.split("|"))


def test_a_constant_feature_has_the_deviation_1():
    x = samples((3,), np.float32)
    x[:, 1] = 0.1
    info = read_arrays((x, NUMBERS, x, NUMBERS)).info
    assert info.std[1] == 1.0 and info.std[0] != 1.0
    assert np.isfinite(normalize(x, info.mean, info.std)).all()


@pytest.mark.parametrize(
    ("labels", "values", "clause"),
    [
        (NUMBERS[:, None], None, "in 3 classes,"),
        (np.eye(3)[NUMBERS], None, "a one-hot label becomes the place of its 1"),
        (np.eye(4, dtype=bool)[NUMBERS], None, "in 4 classes,"),
        (np.array(["b", "c", "a"])[NUMBERS], ("a", "b", "c"), "(labels a to c, asc"),
        (np.array(["b", "c", "a"], object)[NUMBERS], ("a", "b", "c"), "a to c"),
        (NUMBERS == 1, None, "in 2 classes,"),
        (NUMBERS.astype(np.uint8).tolist(), None, "in 3 classes,"),
    ],
)
def test_labels(labels, values, clause, said):
    x = samples((3,), np.float32)
    data = read_arrays((x, labels, x[:3], labels[:3]))
    assert data.info.label_values == values
    assert data.train.labels.dtype == np.int32
    expected = [1, 2, 0] if values else [0, 1, 2]
    if np.asarray(labels).dtype == bool and np.ndim(labels) == 1:
        expected = [0, 1, 0]
    assert data.train.labels.tolist() == expected * 4
    assert data.test.labels.tolist() == expected
    assert clause in said()[0]


X = samples((3,), np.float32)
HOLE = X.copy()
HOLE[5, 2] = np.nan
HOLE[7, 0] = np.inf


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((HOLE, NUMBERS, X, NUMBERS), "training set .* 2 values .* NaN .* at .5, 2."),
        ((X, NUMBERS, HOLE, NUMBERS), "test set of the arrays holds 2 values that"),
        (
            (1e300 * X.astype(float), NUMBERS, X, NUMBERS),
            "36 values .* infinite in flo",
        ),
        ((X, NUMBERS, X[:, :2], NUMBERS), r"samples of \[2\]; allowed are \[3\]"),
        ((X, NUMBERS, X), "data: 3 values are not allowed"),
        ((X, NUMBERS * 0.5, X, NUMBERS), "labels of type float64; allowed"),
        ((X, NUMBERS[:5], X, NUMBERS), r"labels of the shape \[5\] for 12 samples"),
        ((X, NUMBERS + 1, X, NUMBERS + 1), 'holds the label 1, but not 0.*s="remap"'),
        ((X, np.array(["a", "b"] * 6), X, NUMBERS), "label 0; allowed are the 2"),
        (
            (X, np.eye(3)[NUMBERS], X, np.eye(4)[NUMBERS]),
            "test set .* one-hot rows of 4 columns; allowed are of 3 columns",
        ),
        (
            (X, np.array(["a", "b"] * 6), X, np.eye(2)[NUMBERS % 2]),
            "one-hot rows of 2 columns; allowed are labels as in training",
        ),
        ((X.astype("U5"), NUMBERS, X, NUMBERS), "samples of type <U5"),
        ((X[:0], NUMBERS[:0], X, NUMBERS), "0 samples"),
    ],
)
def test_arrays_that_are_refused(data, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        hs.train(TABLE, tmp_path / "run", data=data)
    assert str(error.value).startswith(("data: ", "labels: "))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


TABLE = hs.override(
    hs.preset("demo"),
    network="mlp",
    hidden=16,
    depth=3,
    num_clients=2,
    cuts=("1", "2"),
    rounds=4,
    batch_size=16,
    validation_share=0.2,
)


def table(count, seed):
    """Three classes around points far apart, on scales that differ."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.array([[0, 0, 0, 0], [4, 0, 4, 0], [0, 4, 4, 4]])
    features = centres[labels] + rng.normal(size=(count, 4))
    return features * [1, 100, 0.01, 1] + [0, 5000, 0, -3], labels


DATA = (*table(320, 0), *table(100, 1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "run"
    hs.train(TABLE, folder, data=DATA)
    return folder


def test_a_table_is_learned_and_its_run_restored(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["mean_server_accuracy"] > 0.9
    assert summary["mean_exit_accuracy"] > 0.9
    assert json.loads((run / "config.json").read_text())["data"]["dataset"] == "arrays"
    restored = hs.restore(run)
    assert restored.info == read_info(run)
    assert (restored.info.input_shape, restored.info.dtype) == ((4,), "float32")
    x, y = DATA[2].astype(np.float32), DATA[3]
    inputs = (x - restored.info.mean) / restored.info.std
    spec = restored.specs(0)[0]
    mask = jnp.ones(len(y), bool)
    inputs = jnp.asarray(inputs, jnp.float32)
    _, logits, _ = forward(spec, restored.client(0), inputs, mask, train=False)
    accuracy = np.mean(np.asarray(logits).argmax(-1) == y)
    assert accuracy == pytest.approx(summary["clients"][0]["exit_accuracy"])


def test_it_is_evaluated_and_gated_on_the_same_arrays(run):
    summary = json.loads((run / "summary.json").read_text())
    rounds, scores = evaluate(str(run), data=DATA)
    assert rounds == 4
    assert scores.mean_server_accuracy == summary["mean_server_accuracy"]
    found = study(str(run), data=DATA).thresholds(Target("offload", 0.3))
    assert [client["id"] for client in found["clients"]] == [0, 1]
    assert all(client["accuracy"] > 0.9 for client in found["clients"])
    sets = (Dataset(*DATA[:2]), Dataset(*DATA[2:]))
    experiment, _ = reopen(run, data=sets)
    assert experiment.info == read_info(run)


def test_other_arrays_are_refused(run):
    x, y, x_test, y_test = DATA
    for other in ((x, y, x_test, y_test[::-1]), (x + 1, y, x_test, y_test)):
        with pytest.raises(UserError, match="^data: the data found now, of") as error:
            evaluate(run, data=other)
        assert "\n" not in str(error.value)


def test_arrays_are_refused_where_a_run_has_a_dataset(tmp_path):
    config = hs.override(hs.preset("demo"), network="tiny", plugin=("tiny",))
    write_run(tmp_path, hs.override(config, num_clients=2, cuts=("1",)))
    with pytest.raises(UserError, match="data: .* on the dataset fashion_mnist_small"):
        reopen(tmp_path, data=DATA)


def test_a_run_on_arrays_goes_on(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    longer = hs.override(TABLE, rounds=5)
    with pytest.raises(
        UserError, match="dataset: fashion_mnist_small is not allowed w"
    ):
        hs.train(longer, folder, resume=True)
    other = (DATA[0] + 1, *DATA[1:])
    with pytest.raises(UserError, match="data: the data found now"):
        hs.train(longer, folder, resume=True, data=other)
    summary = hs.train(longer, folder, resume=True, data=DATA)
    assert summary.rounds == 5
    assert summary.scores.mean_server_accuracy > 0.9


@pytest.mark.parametrize(
    "words",
    [
        "eval RUN",
        "gate RUN",
        "train --resume --out RUN",
        "train --dataset arrays --out N",
    ],
)
def test_a_command_cannot_have_arrays(words, run, tmp_path, capsys):
    words = words.replace("RUN", str(run)).replace(" N", f" {tmp_path / 'new'}")
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    assert "data=(x, y, x_test, y_test)" in err and "--dataset npz" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_export_takes_float32(run, capsys):
    assert cli.main(["export", str(run), "--client", "1"]) == 0
    place = run / "export" / "client-1"
    card = json.loads((place / "card.json").read_text())
    assert card["input"] == {"shape": [4], "dtype": "float32"}
    x = DATA[2][:7].astype(np.float32)
    np.save(place / "samples.npy", x)
    readme = (place / "README.md").read_text()
    assert "`(samples - mean) / std`" in readme
    code = readme.partition("```python\n")[2].partition("```")[0]
    code = f'import numpy as np\nsamples = np.load("samples.npy")\n{code}'
    code += 'np.save("logits.npy", answers["logits"])\n'
    subprocess.run([sys.executable, "-c", code], cwd=place, check=True)
    restored = hs.restore(run)
    inputs = normalize(x, restored.info.mean, restored.info.std)
    spec, client = restored.specs(1)[0], restored.client(1)
    _, logits, _ = forward(spec, client, inputs, jnp.ones(7, bool), train=False)
    np.testing.assert_allclose(np.load(place / "logits.npy"), logits, 1e-4, 1e-4)


def test_a_report_is_made_of_it(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "report")]) == 0


NPZ = (
    "--dataset npz --network mlp --hidden 16 --depth 3 --num-clients 2 --cuts 1 2 "
    "--batch-size 16 --validation-share 0.2 --rounds 1"
).split()


def test_a_table_in_files(tmp_path, capsys, said):
    """The same numbers as from Python; the log says what was done to them."""
    write_npz(tmp_path / "data", DATA)
    data = read_dataset("npz", folder=tmp_path / "data")
    same = read_arrays(DATA)
    assert data.info == same.info
    np.testing.assert_array_equal(data.train.images, same.train.images)
    words = [*NPZ, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words]) == 0
    assert cli.main(["gate", str(tmp_path / "run"), "--target-offload", "0.5"]) == 0
    assert "320 training and 100 test rows of 4 in 3 classes" in said()[0]
    with pytest.raises(
        UserError, match="the training set of the arrays holds 2 values"
    ):
        write_npz(tmp_path / "bad", (HOLE, NUMBERS, X, NUMBERS))
    assert not (tmp_path / "bad").exists()


def test_text_and_one_hot_labels_in_files(tmp_path):
    names = np.array(["b", "c", "a"], object)[NUMBERS]
    write_npz(tmp_path / "text", (X, names, X[:3], names[:3]))
    assert read_dataset("npz", folder=tmp_path / "text").info.label_values == (
        "a",
        "b",
        "c",
    )
    write_npz(tmp_path / "hot", (X, np.eye(3)[NUMBERS], X, np.eye(3)[NUMBERS]))
    data = read_dataset("npz", folder=tmp_path / "hot")
    assert data.train.labels.tolist() == NUMBERS.tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--augment crop_flip", "augment: crop_flip is not allowed for samples of [4]"),
        ("--augment crop", "allowed are none and noise"),
        (
            "--network resnet18 --cuts 3 5",
            "network: resnet18 is not allowed for samples",
        ),
    ],
)
def test_what_is_for_images_is_refused(words, message, tmp_path, capsys):
    write_npz(tmp_path / "data", DATA)
    given = [*NPZ, "--data-dir", str(tmp_path / "data"), *words.split()]
    if "resnet18" in words:
        given = given[:2] + given[8:]  # without the options of the perceptron
    assert cli.main(["train", *given, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert [line[:10] for line in err.splitlines()][:1] == ["hsee: npz:"]
    assert err.count("\n") == 2  # what was read, and what is wrong
    if "resnet18" in words:
        fit = err.rpartition("allowed are ")[2].split(", ")
        assert "mlp" in map(str.strip, fit) and "resnet18" not in fit
    assert not (tmp_path / "run").exists()


def test_series_and_images_through_the_perceptron():
    """It flattens what it gets; a run on series is built and evaluated."""
    x = samples((5, 4), np.float32)
    experiment = hs.build(
        hs.override(TABLE, batch_size=4), data=(x, NUMBERS, x, NUMBERS)
    )
    results = experiment.evaluate(experiment.init(), experiment.test)
    assert len(results) == 2
    model = hs.nn.mlp(num_classes=3, input_shape=(28, 28, 1), hidden=5, depth=2)
    shapes = [shape.shape for shape in hs.nn.layer_inputs(model)]
    assert shapes == [(1, 28, 28, 1), (1, 5), (1, 5)]


PLUGIN = """
from typing import Annotated

import numpy as np

import hsee_jax as hs


@hs.data.register
def sensors(*, sensor_count: Annotated[int, "how many sensors"] = 3) -> hs.data.Form:
    '''Readings of sensors.'''

    def load(folder):
        x = np.loadtxt(folder / "sensors.csv", delimiter=",")[:, : sensor_count + 1]
        return x[:8, 1:], x[:8, 0].astype(int), x[8:, 1:], x[8:, 0].astype(int)

    return hs.data.from_arrays(load)
"""


def test_a_plugin_brings_a_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_sensors.py").write_text(PLUGIN)
    rows = np.column_stack([np.arange(12) % 2, samples((4,), float)])
    np.savetxt(tmp_path / "sensors.csv", rows, delimiter=",")
    words = ["--plugin", "my_sensors", "--data-dir", str(tmp_path)]
    assert cli.main(["data", "sensors", *words, "--sensor-count", "2"]) == 0
    out = capsys.readouterr().out
    assert "sensors: 8 training and 4 test rows of 2 in 2 classes" in out
    words += (
        "--dataset sensors --network mlp --depth 2 --hidden 4 --num-clients 2".split()
    )
    words += "--cuts 1 --rounds 1 --sensor-count 4".split()
    assert cli.main(["train", *words, "--out", "run"]) == 0
    assert hs.restore("run").info.input_shape == (4,)
    assert cli.main(["eval", "run"]) == 0


def test_uint8_arrays_are_images():
    """They keep their augmentation, network and scale."""
    x, y = noise(24, (8, 8), 2)
    config = hs.override(hs.preset("demo"), augment="crop_flip", num_clients=2)
    config = hs.override(config, cuts=("1",), width=2)
    experiment = hs.build(config, data=(x, y, x[:6], y[:6]))
    assert (experiment.info.dtype, experiment.info.input_shape) == ("uint8", (8, 8, 1))
    assert experiment.config.data.dataset == "arrays"


def test_equal_arrays_in_another_order_are_the_same_data(run):
    x, y, x_test, y_test = DATA
    same = (np.asfortranarray(x), y, np.asfortranarray(x_test)[::-1][::-1], y_test)
    assert read_arrays(same).info == read_arrays(DATA).info
    assert evaluate(run, data=same)[0] == 4
    read = read_arrays(DATA).info
    figures = {"mean": tuple(v * (1 + 1e-9) for v in read.mean)}
    check_info(run, read._replace(**figures))


def test_figures_are_compared_where_there_is_no_digest(run, tmp_path):
    """As in the folders of older runs."""
    older = json.loads((run / "data.json").read_text()) | {"digest": None}
    (tmp_path / "data.json").write_text(json.dumps(older))
    info = read_info(run)
    check_info(tmp_path, info)
    with pytest.raises(UserError, match="^data_dir: the data found now, of num_classe"):
        check_info(tmp_path, info._replace(num_classes=4))
    check_info(tmp_path, info._replace(mean=tuple(v * (1 + 1e-9) for v in info.mean)))
    with pytest.raises(UserError, match="^data_dir: the data found now, of mean"):
        check_info(tmp_path, info._replace(mean=tuple(v * 1.001 for v in info.mean)))


def test_files_that_were_replaced_are_refused(tmp_path, capsys):
    """Also where only the test set is another; limits do not count."""
    data, folder = tmp_path / "data", tmp_path / "run"
    write_npz(data, DATA)
    words = ["train", *NPZ, "--data-dir", str(data), "--out", str(folder)]
    words += ["--max-train-samples", "200", "--max-test-samples", "60"]
    assert cli.main(words) == 0
    longer = [*words, "--resume", "--rounds", "2"]
    assert cli.main(longer) == 0
    assert cli.main(["eval", str(folder)]) == 0
    write_npz(data, (*DATA[:2], DATA[2][::-1], DATA[3]))
    capsys.readouterr()
    for again in (
        ["eval", str(folder)],
        ["gate", str(folder), "--target-offload", "0.5"],
        [*longer[:-1], "3"],
    ):
        assert cli.main(again) == 2
        assert "data_dir: the data found now, of digest" in capsys.readouterr().err


def test_pictures_have_a_digest(tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate("ab"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            Image.new("L", (4, 4), 50 * number).save(place / "0.png")
    one = dataset_info("imagefolder", folder=tmp_path)
    Image.new("L", (4, 4), 77).save(tmp_path / "test" / "a" / "0.png")
    other = dataset_info("imagefolder", folder=tmp_path)
    assert one.digest != other.digest
    assert one == other._replace(digest=one.digest)


def test_the_order_of_bytes_does_not_count():
    x = samples((5, 4), np.uint16)
    native = read_arrays((x, NUMBERS, x, NUMBERS)).info
    swapped = x.astype(">u2")
    assert native.input_shape == (5, 4, 1)
    assert read_arrays((swapped, NUMBERS, x, NUMBERS)).info == native


def with_column(values):
    """Features, of which the column 1 is given."""
    x = samples((3,), np.float64)
    x[:, 1] = values
    return x, NUMBERS, x, NUMBERS


SECONDS = 1.7e9 + 0.25 * np.arange(12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (SECONDS, "deviation 0.863 in column 1, which float32 rounds.*offset"),
        (1e12 + NUMBERS, "deviation 0.816 in column 1"),
        (np.where(NUMBERS == 1, 3.3e38, -3.3e38), "3.3e.38 in column 1; .* range"),
        (NUMBERS * 1e-42, "values from 0 to 2e-42 in column 1; .* deviation from"),
    ],
)
def test_columns_that_float32_cannot_hold(values, message):
    with pytest.raises(UserError, match=message) as error:
        read_arrays(with_column(values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values", [SECONDS - 1.7e9, 0.1, 2**24 + NUMBERS * 2, 1.7e9 + 1e5 * np.arange(12)]
)
def test_columns_that_float32_can_hold(values):
    arrays = with_column(values)
    images = read_arrays(arrays).train.images
    np.testing.assert_array_equal(images, arrays[0].astype(np.float32))


def test_a_large_whole_number_is_checked_too():
    x = (10**12 + np.arange(12))[:, None]
    with pytest.raises(UserError, match="float32 rounds"):
        read_arrays((x, NUMBERS, x, NUMBERS))


class Unreadable:
    """Stand for a tensor that NumPy cannot read."""

    def __array__(self, dtype=None, copy=None):  # noqa: D105
        raise RuntimeError("requires grad:\nuse detach()")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.ma.masked_less(X, 50), NUMBERS, X, NUMBERS), "masked values; .*a mask"),
        ((X, np.ma.masked_equal(NUMBERS, 1), X, NUMBERS), "holds 4 masked values"),
        ((X, np.eye(3)[[0] * 12], X, NUMBERS), "no label but 0; allowed are 2 classes"),
        ((Unreadable(), NUMBERS, X, NUMBERS), "type Unreadable .* use detach"),
        ((X, Unreadable(), X, NUMBERS), "type Unreadable that NumPy cannot read"),
        (([[1, 2], [3]] * 6, NUMBERS, X, NUMBERS), "type list that NumPy cannot read"),
        ((jax.random.split(jax.random.key(0), 12), NUMBERS, X, NUMBERS), "data: "),
        (5, "data: int is not allowed; allowed are .x, y, x_test, y_test"),
        (None, "data: NoneType is not allowed"),
        ((X, NUMBERS, X), "data: 3 values are not allowed"),
    ],
)
def test_what_is_no_data(data, message, tmp_path):
    for use in (read_arrays, lambda data: write_npz(tmp_path / "data", data)):
        with pytest.raises(UserError, match=message) as error:
            use(data)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("result", [None, (X, NUMBERS, X)])
def test_a_function_that_returns_no_data(result, tmp_path):
    form = hs.data.from_arrays(lambda folder: result)
    with pytest.raises(UserError, match="^dataset: .* not allowed as the result of"):
        form.read(tmp_path, hs.data.Limits())


def test_files_are_written_both_or_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^folder: .*file cannot be written: "):
        write_npz(tmp_path / "file", DATA)
    write_npz(tmp_path / "data", DATA)
    before = (tmp_path / "data" / "train.npz").read_bytes()
    (tmp_path / "data" / "test.npz").unlink()
    (tmp_path / "data" / "test.npz").mkdir()
    with pytest.raises(UserError, match=r"test\.npz is a folder"):
        write_npz(tmp_path / "data", (DATA[0] + 1, *DATA[1:]))
    assert (tmp_path / "data" / "train.npz").read_bytes() == before
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert names == ["test.npz", "train.npz"]


def archive(x=b"", *, flags=0, method=0):
    """Return an archive with a member x.npy, and change its headers."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("x.npy", x)
        file.writestr("y.npy", x)
    changed = bytearray(content.getvalue())
    for mark, start in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = -1
        while (place := changed.find(mark, place + 1)) >= 0:
            changed[place + start] |= flags
            changed[place + start + 2] |= method
    return bytes(changed)


def header(rows):
    """Return the start of a .npy file of so many rows."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 5), }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npy():
    content = io.BytesIO()
    np.save(content, X)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (archive(flags=1), "is encrypted"),
        (archive(method=97), "compression method is not supported"),
        (archive(header(10**22)), ""),
        (archive(header(10**15)), "Unable to allocate"),
        (npy(), "it holds one array without a name, as a .npy file does"),
    ],
)
def test_archives_that_cannot_be_read(content, reason, tmp_path, capsys):
    write_npz(tmp_path, DATA)
    (tmp_path / "train.npz").write_bytes(content)
    assert cli.main(["data", "npz", "--data-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'train.npz'} cannot be read: " in err and reason in err
    assert "batch" not in err and err.count("\n") == 1


def test_files_and_folders_are_overwritten_alike(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").touch()
    for name in ("metrics.csv", "summary.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        (folder / name / "kept").touch()
    hs.train(hs.override(TABLE, rounds=1), folder, data=DATA, overwrite=True)
    assert (folder / "summary.json").is_file()
    assert (folder / "checkpoints").is_dir()
    assert not (folder / "metrics.csv" / "kept").exists()
