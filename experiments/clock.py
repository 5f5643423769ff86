"""Compute the simulated seconds and joules of a study's rows on its devices.

Shows: what each row would cost on the devices of STUDY/fleet.toml, by the clock of
`hsee plan`; writes STUDY/clock.json. The clock depends on the settings and not on what
is learned, so nothing is trained, and the images are blank.
Cost: some seconds a row.
Command: python experiments/clock.py experiments/cifar10-w16
"""

import argparse
import json
from pathlib import Path

import numpy as np

from hsee_jax import studies
from hsee_jax.config.schema import DataConfig
from hsee_jax.core.types import Dataset
from hsee_jax.data import dataset_info
from hsee_jax.data.info import TRAIN_SAMPLES
from hsee_jax.runs.build import build
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.data import DataSource
from hsee_jax.runs.equip import Given, equip

FILE = "clock.json"


def main() -> None:
    """Write the seconds and joules of all rounds of each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="the folder of a study")
    given = parser.parse_args()
    fleet = given.study / "fleet.toml"
    found = {}
    for row in studies.load(given.study / "study.toml").rows:
        equipment = equip(row.config, Given(devices=fleet), resume=None)
        experiment = with_clock(build(row.config, blank(row.config.data)), equipment)
        found[row.name] = {
            "seconds": sum(one.seconds for one in experiment.clock),
            "joules": sum(one.joules for one in experiment.clock),
        }
        print(row.name, found[row.name], flush=True)
    text = json.dumps(found, indent=2) + "\n"
    (given.study / FILE).write_text(text, encoding="utf-8")


def blank(data: DataConfig) -> DataSource:
    """Return images without content, as many for training as a run has."""
    info, count = dataset_info(data.dataset), TRAIN_SAMPLES[data.dataset]
    count = min(count, data.max_train_samples or count)

    def images(count: int) -> Dataset:
        labels = np.arange(count, dtype=np.int32) % info.num_classes
        return Dataset(np.zeros((count, *info.input_shape), np.uint8), labels)

    return DataSource(info, lambda: (images(count), images(1)))


if __name__ == "__main__":
    main()
