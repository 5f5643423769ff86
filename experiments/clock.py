"""Compute the simulated seconds and joules of a study's rows on its devices.

Shows: what each row would cost on the devices of STUDY/fleet.toml, by the clock of
`hsee plan`, and the mean bytes that a client of each cut sends in a round; writes
STUDY/clock.json. The clock depends on the settings and not on what is learned, so
nothing is trained, and the images are blank. The labels are those of the dataset:
partitions deal by them.
Cost: some seconds a row.
Command: python experiments/clock.py experiments/cifar10-w16 --data-dir FOLDER
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import script

from hsee_jax import studies
from hsee_jax.config import override
from hsee_jax.config.schema import Config
from hsee_jax.core.types import Dataset
from hsee_jax.data import dataset_info
from hsee_jax.data.partition import Labels
from hsee_jax.runs.build import build
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.data import DataSource, data_source
from hsee_jax.runs.equip import Given, equip

FILE = "clock.json"


def main() -> None:
    """Write the seconds, joules and bytes of all rounds of each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="the folder of a study")
    parser.add_argument("--data-dir", help="folder with the datasets")
    given = parser.parse_args()
    fleet = given.study / "fleet.toml"
    read, found = functools.cache(labels), {}
    for row in studies.load(given.study / "study.toml").rows:
        data = row.config.data
        all_labels = read(data.dataset, given.data_dir)
        source = blank(data.dataset, all_labels[: data.max_train_samples])
        equipment = equip(row.config, Given(devices=fleet), resume=None)
        experiment = with_clock(build(row.config, source), equipment)
        found[row.name] = {
            "seconds": sum(one.seconds for one in experiment.clock),
            "joules": sum(one.joules for one in experiment.clock),
            "up_bytes": {
                str(one["cut"]): one["round"]["up_bytes"]
                for one in experiment.bytes_by_cut()
            },
        }
        print(row.name, found[row.name], flush=True)
    text = json.dumps(found, indent=2) + "\n"
    (given.study / FILE).write_text(text, encoding="utf-8")


def labels(dataset: str, data_dir: str | None) -> Labels:
    """Return the labels of all training images of a dataset, ``int32 [M]``."""
    config = override(Config(), dataset=dataset, data_dir=data_dir)
    return data_source(config.data).read()[0].labels


def blank(dataset: str, labels: Labels) -> DataSource:
    """Return a dataset with the labels, and images without content."""
    info = dataset_info(dataset)

    def images(labels: Labels) -> Dataset:
        return Dataset(np.zeros((len(labels), *info.input_shape), np.uint8), labels)

    return DataSource(info, lambda: (images(labels), images(labels[:1])))


if __name__ == "__main__":
    script.run(main)
