"""A few images in every form that a dataset may have.

The loops write the archives of the authors value by value. They define the format; the
tests compare the readers, which transpose whole arrays, with them.
"""

import functools
import gzip
import hashlib
import io
import json
import struct
import tarfile

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from hsee_jax.data.archives import ARCHIVES
from hsee_jax.data.info import KNOWN


def noise(count, shape, classes, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(
        0, classes, count
    )


def write_npz(folder, train, test):
    """Write images and labels of both splits."""
    folder.mkdir(exist_ok=True)
    for split, (images, labels) in (("train", train), ("test", test)):
        np.savez(folder / f"{split}.npz", images=images, labels=labels)


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"some-folder/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def cifar_records(images, labels, coarse=()):
    """Write a label or two, then by rows all red, all green and all blue values."""
    out = bytearray()
    for i, image in enumerate(images):
        out += bytes([*coarse[i : i + 1], labels[i]])
        for channel in range(3):
            for row in range(32):
                for column in range(32):
                    out.append(image[row, column, channel])
    return bytes(out)


def write_cifar10(folder, train, test):
    batches = {
        f"data_batch_{i + 1}.bin": cifar_records(*(a[2 * i : 2 * i + 2] for a in train))
        for i in range(5)
    }
    readme = {"readme.html": b"<html>", "batches.meta.txt": b"airplane\n"}
    last = {"test_batch.bin": cifar_records(*test)}
    tar(folder / "cifar-10-binary.tar.gz", {**readme, **batches, **last})


def write_cifar100(folder, train, test):
    files = {
        f"{split}.bin": cifar_records(*data, coarse=[7] * len(data[1]))
        for split, data in (("train", train), ("test", test))
    }
    tar(folder / "cifar-100-binary.tar.gz", files)


def write_stl10(folder, train, test):
    """Write labels from 1, and by columns all red, all green and all blue values."""
    files = {}
    for split, (images, labels) in (("test", test), ("train", train)):
        out = bytearray()
        for image in images:
            for channel in range(3):
                for column in range(96):
                    out += bytes(image[:, column, channel])
        files[f"{split}_X.bin"] = bytes(out)
        files[f"{split}_y.bin"] = bytes(label + 1 for label in labels.tolist())
    files["unlabeled_X.bin"] = b"not a whole number of images"
    tar(folder / "stl10_binary.tar.gz", files)


def write_idx(folder, train, test, name):
    (folder / name).mkdir()
    for split, (images, labels) in (("train", train), ("t10k", test)):
        count, height, width, _ = images.shape
        header = struct.pack(">IIII", 0x803, count, height, width)
        contents = {
            f"{split}-images-idx3-ubyte.gz": header + images.tobytes(),
            f"{split}-labels-idx1-ubyte.gz": struct.pack(">II", 0x801, count)
            + bytes(labels.tolist()),
        }
        for file, content in contents.items():
            (folder / name / file).write_bytes(gzip.compress(content))


WRITE = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "mnist": functools.partial(write_idx, name="mnist"),
    "fashion_mnist": functools.partial(write_idx, name="fashion_mnist"),
}


def tiny_archive(name, folder):
    """Write 10 training and 4 test images.

    Returns:
      An `Archive` with the checksums of these files, and images and labels of both
      splits.
    """
    info = KNOWN[name]
    data = [noise(n, info.input_shape, info.num_classes, seed=n) for n in (10, 4)]
    WRITE[name](folder, *data)
    archive = ARCHIVES[name]
    md5 = {
        file: hashlib.md5((folder / archive.folder / file).read_bytes()).hexdigest()
        for file in archive.files
    }
    return archive._replace(files=md5), data


def write_prepared(folder, name, data, *, version, form="array_record", **features):
    """Write what tensorflow-datasets makes: a description, and records of the splits.

    Args:
      folder: of all datasets.
      name: of the dataset.
      data: images and labels of each split, by its name.
      version: of the dataset, as in ``"3.0.2"``.
      form: of the files; only those of ``"array_record"`` are written.
      **features: the `shape` and the number of `classes` that the description states,
        where they are not the dataset's.

    Returns:
      The folder of this version.
    """
    import tensorflow_datasets as tfds

    place = folder / name / version
    place.mkdir(parents=True)
    splits = [
        {
            "name": split,
            "shardLengths": [str(len(labels))],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, (_, labels) in data.items()
    ]
    info = {"name": name, "version": version, "fileFormat": form, "splits": splits}
    (place / "dataset_info.json").write_text(json.dumps(info))
    tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(
                shape=features.get("shape", KNOWN[name].input_shape)
            ),
            "label": tfds.features.ClassLabel(
                num_classes=features.get("classes", KNOWN[name].num_classes)
            ),
        }
    ).save_config(place)
    if form == "array_record":
        for split, (images, labels) in data.items():
            file = place / f"{name}-{split}.array_record-00000-of-00001"
            writer = ArrayRecordWriter(str(file), "group_size:1")
            for image, label in zip(images, labels.tolist(), strict=True):
                writer.write(tf_example(image, label))
            writer.close()
    return place


def tf_example(image, label):
    """Encode a ``tf.train.Example`` by hand, with the image as PNG.

    It is a message of one field, a map from names to features; a feature is a list of
    bytes in field 1, or of integers in field 3.
    """
    png = io.BytesIO()
    Image.fromarray(image.squeeze()).save(png, "PNG")
    features = {
        b"image": _field(1, _field(1, png.getvalue())),
        b"label": _field(3, _field(1, bytes([label]))),
    }
    entries = (
        _field(1, _field(1, name) + _field(2, feature))
        for name, feature in features.items()
    )
    return _field(1, b"".join(entries))


def _field(number, content):
    """Encode a field of a protocol buffer: its tag, its length in base 128, itself."""
    length, size = bytearray(), len(content)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content
