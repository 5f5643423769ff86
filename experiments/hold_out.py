"""Hold images out of a dataset's training images, to use in place of its test images.

Shows: nothing; it writes OUT/NAME/train.npz with the first training images and
OUT/NAME/test.npz with the images after them. A study with `--data-dir OUT` then gives
accuracies on the held-out images, and no test image is read.
Cost: half a minute for CIFAR-10.
Command: python experiments/hold_out.py cifar10 --data-dir FOLDER --train 30000
--held-out 3000 --out OUT
"""

import argparse
from pathlib import Path

import numpy as np
import script

from hsee_jax.config import override
from hsee_jax.config.schema import Config
from hsee_jax.core.types import Dataset
from hsee_jax.data.datasets import is_there
from hsee_jax.data.info import KNOWN, PACKAGED
from hsee_jax.runs.data import data_source


def main() -> None:
    """Read the training images, and write both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name in KNOWN if name != PACKAGED]  # read from --data-dir/NAME
    parser.add_argument("dataset", choices=names, help="the name of a dataset")
    parser.add_argument("--data-dir", help="folder with the datasets")
    parser.add_argument("--train", type=int, required=True, help="images to keep")
    parser.add_argument("--held-out", type=int, required=True, help="images behind")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if min(given.train, given.held_out) < 1:
        parser.error("--train and --held-out: allowed are numbers from 1")
    if is_there(given.dataset, given.out):  # a study might read that form first
        parser.error(f"{given.out} holds {given.dataset}; allowed is a new folder")
    config = override(Config(), dataset=given.dataset, data_dir=given.data_dir)
    train, _ = data_source(config.data).read()
    if given.train + given.held_out > len(train.labels):
        parser.error(f"{given.dataset} has only {len(train.labels)} training images")
    folder = given.out / given.dataset
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.npz", train, 0, given.train)
    write(folder / "test.npz", train, given.train, given.train + given.held_out)


def write(path: Path, data: Dataset, first: int, end: int) -> None:
    """Write the samples ``first`` to ``end - 1`` as an npz."""
    np.savez(path, images=data.images[first:end], labels=data.labels[first:end])
    print(f"{path}: {end - first} images")


if __name__ == "__main__":
    script.run(main)
