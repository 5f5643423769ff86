"""Measure how the clients of finished runs answer: by cut, with intervals, and gated.

Shows: for every run in STUDY/runs and every cut, the accuracy of exits and servers on
the test images with a 95 % interval (bootstrap over the images), and the accuracy where
30 and 60 % of the samples are answered on the device. The gate's thresholds come from
the held-out samples; the share that devices really answer stands beside each accuracy.
Cost: about a minute a run on two CPU cores.
Command: python experiments/answers.py experiments/cifar10-w16 [--seeds 0]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import script
from scipy import stats

from hsee_jax import studies
from hsee_jax.core.errors import UserError
from hsee_jax.inference.client_study import ClientStudy, Target
from hsee_jax.inference.measurement import measure_clients
from hsee_jax.runs.reopen import reopen
from hsee_jax.runs.same_data import check_partition
from hsee_jax.studies.train import changes

ON_DEVICE = (0.3, 0.6)  # shares of the samples
FILE = "answers.jsonl"


def main() -> None:
    """Measure the runs that are not measured yet, and append a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="the folder of a study")
    parser.add_argument("--rows", nargs="+", default=(), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="default: all")
    parser.add_argument("--data-dir", help="folder with the datasets")
    given = parser.parse_args()
    study = studies.load(given.study / "study.toml")
    path = given.study / FILE
    known = {(one["row"], one["seed"]): one for one in read(path)}
    for run in studies.runs(study, rows=given.rows, seeds=given.seeds):
        folder = given.study / "runs" / run.folder
        if not (folder / "summary.json").is_file():
            continue
        settings = studies.settings(run.config)
        measured = known.get((run.row, run.seed))
        if measured and is_of(measured, run):
            continue
        try:
            if changed := changes(run, folder):
                raise UserError(f"its run has another {', '.join(changed)}")
            cuts = by_cut(folder, given.data_dir)
        except UserError as error:  # such as a method without exits or servers
            print(f"{run}: {error}", flush=True)
            continue
        found = {"row": run.row, "seed": run.seed, "settings": settings, "cuts": cuts}
        line = json.dumps(found)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def is_of(line: dict[str, Any], run: studies.Run) -> bool:
    """Return whether a line is of a run with these settings; the first have none."""
    stored = line.get("settings")
    if stored is None:
        return True
    one = studies.Result(run.row, run.seed, stored, 1, None)
    return studies.result_of(run, [one]) is not None


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of answers; a file that is not there has none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def by_cut(folder: Path, data_dir: str | None) -> dict[str, Any]:
    """Measure the clients of a run; return the figures of each cut."""
    experiment, state = reopen(folder, data_dir=data_dir)
    check_partition(folder, experiment.manifest)
    clients = list(measure_clients(experiment, state, "entropy", batch_size=1000))
    found = {}
    for cut in sorted({client.cut for client in clients}):
        own = [client for client in clients if client.cut == cut]
        found[str(cut)] = {
            "clients": len(own),
            "exit": accuracy([client.test.exit.correct for client in own]),
            "server": accuracy([client.test.server.correct for client in own]),
            "gated": {str(share): gated(own, share) for share in ON_DEVICE},
        }
    return found


def accuracy(correct: Sequence[npt.NDArray[np.bool_]]) -> dict[str, float]:
    """Return the mean over clients, with a 95 % interval over the test images.

    Args:
      correct: of each client, whether its answer to each image is right, ``[M]``.
    """
    per_image = np.mean(correct, axis=0)
    interval = stats.bootstrap(
        (per_image,),
        np.mean,
        n_resamples=1000,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {
        "mean": float(per_image.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
    }


def gated(clients: Sequence[ClientStudy], share: float) -> dict[str, float]:
    """Return the accuracy where devices answer a share of the samples themselves."""
    target = Target("offload", 1 - share)
    points = [client.point(client.choose(target)) for client in clients]
    return {
        name: float(np.mean([point[name] for point in points]))
        for name in ("accuracy", "on_device")
    }


if __name__ == "__main__":
    script.run(main)
