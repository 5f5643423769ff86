"""Known datasets as torchvision unpacks them, against bytes written by hand."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from tiny_archives import cifar_records, noise

from hsee_jax import cli
from hsee_jax.core.errors import UserError
from hsee_jax.data import load_dataset


def old_pickle(rows, labels, name=b"labels"):
    """Write by opcodes what Python 2 pickled: a dict of strings, an array and a list.

    ``rows`` is a list of the bytes of equally many pixels.
    """
    flat = b"".join(rows)
    sizes = struct.pack("<BiBi", ord("J"), len(rows), ord("J"), len(rows[0]))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R("
        + b"K\x01"
        + sizes
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T"
        + struct.pack("<i", len(flat))
        + flat
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    key = b"U" + bytes([len(name)]) + name
    return b"\x80\x02}(U\x0bbatch_labelU\x01xU\x04data" + array + key + numbers + b"u."


def cifar_rows(images):
    """The colour planes of each image, pixel by pixel."""
    records = cifar_records(images, [0] * len(images))
    size = len(records) // len(images)
    return [records[k * size + 1 : (k + 1) * size] for k in range(len(images))]


def write_batches(folder, data, pickled):
    """Ten images in five files, and four in one."""
    (images, labels), (test_images, test_labels) = data
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for part in range(5):
        rows = slice(2 * part, 2 * part + 2)
        content = pickled(images[rows], labels[rows])
        (place / f"data_batch_{part + 1}").write_bytes(content)
    (place / "test_batch").write_bytes(pickled(test_images, test_labels))
    return place


def of_python_2(images, labels):
    return old_pickle(cifar_rows(images), labels.tolist())


def of_python_3(protocol):
    def pickled(images, labels):
        rows = np.frombuffer(b"".join(cifar_rows(images)), np.uint8)
        batch = {b"data": rows.reshape(len(labels), -1), b"labels": labels.tolist()}
        return pickle.dumps(batch, protocol)

    return pickled


PICKLED = {"Python 2": of_python_2, "2": of_python_3(2), "5": of_python_3(5)}


def assert_read(name, folder, data):
    for found, (images, labels) in zip(
        load_dataset(name, folder=folder), data, strict=True
    ):
        np.testing.assert_array_equal(found.images, images)
        np.testing.assert_array_equal(found.labels, labels)
        assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("kind", PICKLED)
def test_cifar_10(kind, tmp_path):
    data = [noise(count, (32, 32, 3), 10, seed=count) for count in (10, 4)]
    write_batches(tmp_path, data, PICKLED[kind])
    assert_read("cifar10", tmp_path, data)


def test_packed_batches(tmp_path):
    data = [noise(count, (32, 32, 3), 10, seed=count) for count in (10, 4)]
    place = write_batches(tmp_path, data, PICKLED["2"])
    for path in sorted(place.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert_read("cifar10", tmp_path, data)


def test_cifar_100(tmp_path):
    """The fine labels count."""
    data = [noise(count, (32, 32, 3), 100, seed=count) for count in (10, 4)]
    place = tmp_path / "cifar-100-python"
    place.mkdir()
    for name, (images, labels) in zip(("train", "test"), data, strict=True):
        content = old_pickle(cifar_rows(images), labels.tolist(), b"fine_labels")
        (place / name).write_bytes(content)
    assert_read("cifar100", tmp_path, data)


def idx(array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(name, folder, packed, tmp_path):
    data = [noise(count, (28, 28, 1), 10, seed=count) for count in (10, 4)]
    place = tmp_path / folder / "raw"
    place.mkdir(parents=True)
    for split, (images, labels) in zip(("train", "t10k"), data, strict=True):
        for file, array in (
            (f"{split}-images-idx3-ubyte", images[..., 0]),
            (f"{split}-labels-idx1-ubyte", labels.astype(np.uint8)),
        ):
            content = idx(array)
            if packed:
                file, content = f"{file}.gz", gzip.compress(content)
            (place / file).write_bytes(content)
    assert_read(name, tmp_path, data)


ATTACKS = {
    "a command": b"cos\nsystem\n(S'touch TARGET'\ntR.",
    "eval": b'cbuiltins\neval\n(S\'open("TARGET", "w")\'\ntR.',
    "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
    "another codec": b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
}


class Call:
    """Pickles as a call, with a state for the object that it makes."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        """Return the function, its arguments and the state."""
        return self.parts


def array_of(code, *state):
    """An array of one row whose type has a state."""
    kind = Call(np.dtype, (code, False, True), (3, "|", *state))
    reconstruct, arguments, _ = np.zeros(0, np.uint8).__reduce__()
    return Call(reconstruct, arguments, (1, (1,), kind, False, b"A" * 8))


FIELDS = (None, ("f",), {"f": (np.dtype("u1"), 0)}, 8, 1, 0)
CRASHES = {
    "object": array_of("O", None, None, None, -1, -1, 63),
    "fields": array_of("V8", *FIELDS),
    "fields of bytes": array_of("u1", *FIELDS),
    "an array by itself": Call(np.ndarray, ((1,), "O", b"A" * 8)),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_pickle_cannot_build_types_of_numpy(crash, tmp_path):
    data = [noise(count, (32, 32, 3), 10, seed=count) for count in (10, 4)]
    place = write_batches(tmp_path, data, of_python_2)
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": CRASHES[crash]}
    (place / "data_batch_2").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(UserError, match="data_batch_2 cannot be read") as error:
        load_dataset("cifar10", folder=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"c_codecs\nencode\nN}U\x05helloK\x01s\x86b.", "it changes a function"),
        (b"}N" + b"\x85" * 10**6 + b"Ns.", "it holds more than 20,000 tuples"),
    ],
    ids=["a function", "deep tuples"],
)
def test_a_pickle_that_harms_the_process(content, message, tmp_path):
    data = [noise(count, (32, 32, 3), 10, seed=count) for count in (10, 4)]
    place = write_batches(tmp_path, data, of_python_2)
    (place / "test_batch").write_bytes(b"\x80\x02" + content)
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", folder=tmp_path)


LABELS = {
    "large": ([200, 1], "holds the label 200; allowed are 0..9"),
    "negative": ([-1, 1], "holds the label -1; allowed are 0..9"),
    "huge": ([2**70, 1], "holds labels of type object"),
    "fractions": ([1.7, 1.0], "holds labels of type float64"),
    "NaN": ([float("nan"), 1.0], "holds labels of type float64"),
    "text": (["a", "b"], "holds the label a; allowed are 0..9"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_another_dataset(kind, tmp_path, capsys):
    labels, message = LABELS[kind]
    data = [noise(count, (32, 32, 3), 10, seed=count) for count in (10, 4)]
    place = write_batches(tmp_path, data, of_python_3(2))
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}
    (place / "data_batch_3").write_bytes(pickle.dumps(batch, 2))
    assert cli.main(["data", "cifar10", "--data-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"data_batch_3 {message}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "size", "label", "message"),
    [
        (3, 28, 26, "holds the label 26; allowed are 0..9"),
        (3, 20, 1, "holds samples of [20, 20, 1]; allowed are [28, 28, 1]"),
        (0, 28, 1, "holds 0 samples"),
    ],
)
def test_idx_files_of_another_dataset(count, size, label, message, tmp_path):
    place = tmp_path / "MNIST" / "raw"
    place.mkdir(parents=True)
    for split in ("train", "t10k"):
        for file, array in (
            ("images-idx3", np.zeros((count, size, size), np.uint8)),
            ("labels-idx1", np.full(count, label, np.uint8)),
        ):
            (place / f"{split}-{file}-ubyte").write_bytes(idx(array))
    with pytest.raises(UserError) as error:
        load_dataset("mnist", folder=tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


FAULTS = {
    "cut short": lambda content: content[:-40],
    "text": lambda content: b"no pickle",
    "empty": lambda content: b"",
    "a list": lambda content: pickle.dumps([1, 2]),
    "other keys": lambda content: pickle.dumps({b"x": 1}),
    "other rows": lambda content: old_pickle([b"abc", b"def"], [1, 2]),
    "few labels": lambda content: content.replace(b"](K", b"](K\x01K"),
}


@pytest.mark.parametrize("fault", [*ATTACKS, *FAULTS])
def test_a_batch_that_is_refused(fault, tmp_path):
    """In one line, and nothing in it runs."""
    data = [noise(count, (32, 32, 3), 10, seed=count) for count in (10, 4)]
    place = write_batches(tmp_path, data, of_python_2)
    target, path = tmp_path / "target", place / "data_batch_2"
    if fault in ATTACKS:
        path.write_bytes(ATTACKS[fault].replace(b"TARGET", str(target).encode()))
    else:
        path.write_bytes(FAULTS[fault](path.read_bytes()))
    with pytest.raises(UserError, match="data_batch_2 cannot be read") as error:
        load_dataset("cifar10", folder=tmp_path)
    assert "\n" not in str(error.value)
    if fault in ATTACKS:
        assert "it asks for" in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize("damage", ["cut short", "magic", "empty", "labels"])
def test_an_idx_file_that_is_refused(damage, tmp_path):
    place = tmp_path / "MNIST" / "raw"
    place.mkdir(parents=True)
    images = np.zeros((3, 28, 28), np.uint8)
    for split in ("train", "t10k"):
        (place / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (place / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    path = place / "train-images-idx3-ubyte"
    content = path.read_bytes()
    changed = {
        "cut short": content[:-1],
        "magic": b"\x00\x00\x0d\x03" + content[4:],
        "empty": b"",
        "labels": idx(images[:2]),
    }
    path.write_bytes(changed[damage])
    with pytest.raises(
        UserError, match="train-images-idx3-ubyte cannot be read"
    ) as error:
        load_dataset("mnist", folder=tmp_path)
    assert "\n" not in str(error.value)
