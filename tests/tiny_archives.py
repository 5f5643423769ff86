"""Archives of a few images in the exact formats of their authors.

They are written value by value: these loops are the definition of the format, against
which the transpositions of the readers are tested.
"""

import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np

from hsee_jax.data.archives import ARCHIVES
from hsee_jax.data.info import DATASETS


def noise(count, shape, classes, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(
        0, classes, count
    )


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"some-folder/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def cifar_records(images, labels, coarse=()):
    """A label or two, then all red values by rows, all green ones, all blue ones."""
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
    """Labels from 1; all red values column after column, then green, then blue."""
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


def write_fashion_mnist(folder, train, test):
    (folder / "fashion_mnist").mkdir()
    for split, (images, labels) in (("train", train), ("t10k", test)):
        count, height, width, _ = images.shape
        header = struct.pack(">IIII", 0x803, count, height, width)
        contents = {
            f"{split}-images-idx3-ubyte.gz": header + images.tobytes(),
            f"{split}-labels-idx1-ubyte.gz": struct.pack(">II", 0x801, count)
            + bytes(labels.tolist()),
        }
        for name, content in contents.items():
            (folder / "fashion_mnist" / name).write_bytes(gzip.compress(content))


WRITE = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "fashion_mnist": write_fashion_mnist,
}


def tiny_archive(name, folder):
    """Writes 10 training and 4 test images; their checksums count as published.

    Returns the `Archive`, and images and labels of both splits.
    """
    info = DATASETS[name]
    data = [noise(n, info.input_shape, info.num_classes, seed=n) for n in (10, 4)]
    WRITE[name](folder, *data)
    archive = ARCHIVES[name]
    md5 = {
        file: hashlib.md5((folder / archive.folder / file).read_bytes()).hexdigest()
        for file in archive.files
    }
    return archive._replace(files=md5), data
