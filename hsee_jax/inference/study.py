"""Gated inference with a run's networks: its thresholds, and what they give.

Each client's thresholds come from the samples that were held out of the training data.
What they give is measured on the test set, which does not choose them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.inference.answering import BATCH_SIZE
from hsee_jax.inference.calibration import point_at_accuracy
from hsee_jax.inference.client_study import ClientStudy, Figures, Target
from hsee_jax.inference.measurement import measure_clients
from hsee_jax.runs.data import OwnData
from hsee_jax.runs.records import device_name
from hsee_jax.runs.reopen import reopen
from hsee_jax.runs.same_data import check_partition


class Study(NamedTuple):
    """The gates of a run's clients, and what their figures were measured with."""

    setting: Figures
    clients: list[ClientStudy]  # by ascending id

    def curve(self) -> Figures:
        """Return what thresholds give, for each client and on average, as plain JSON.

        Returns:
          The setting, ``mean`` (21 points, averages over clients) and ``clients``.
        """
        points = [client.points() for client in self.clients]
        return self.setting | {
            "mean": _relative([_mean(group) for group in zip(*points, strict=True)]),
            "clients": [
                client.summary() | {"points": _relative(own)}
                for client, own in zip(self.clients, points, strict=True)
            ],
        }

    def thresholds(self, target: Target) -> Figures:
        """Return the threshold of each client that meets a target, as plain JSON.

        Of the thresholds that meet a budget, it takes the highest offload; of the
        thresholds that reach an accuracy, the lowest offload. If a client has none, as
        may be if its logits are not all finite, it takes the threshold that comes
        closest.

        Raises:
          UserError: a client with finite logits does not reach the accuracy; if no
            client has finite logits, any client. The message says which accuracy is
            possible. Or the target is in bytes, and no client sends features.
        """
        if target.kind == "accuracy":
            self._check_accuracy(target.value)
        sizes = [client.costs.feature_bytes for client in self.clients]
        if target.kind == "bytes" and not any(sizes):
            raise UserError(
                "target_bytes: has no effect on a run whose clients send no features; "
                "allowed are target_offload and target_accuracy"
            )
        return self.setting | {
            "target": {target.kind: target.value},
            "clients": [
                client.summary() | client.point(choice) | client.shares(choice)
                for client in self.clients
                for choice in [client.choose(target)]
            ],
        }

    def _check_accuracy(self, accuracy: float) -> None:
        """Refuse an accuracy that a client with finite logits does not reach."""
        clients = [client for client in self.clients if client.finite] or self.clients
        worst = min(clients, key=lambda client: client.held_out.accuracy.max())
        curve = worst.held_out
        if accuracy > curve.accuracy.max():
            best = point_at_accuracy(curve, curve.accuracy.max())
            most = curve.num_correct[best] * 10_000 // curve.num_samples / 10_000
            raise UserError(
                f"target_accuracy: {accuracy} cannot be reached by client {worst.id} "
                f"on the held-out samples; the most is {most} at offload "
                f"{curve.offload[best]:.2f}"
            )


def study(
    folder: str | os.PathLike[str],
    *,
    criterion: str = "entropy",
    which: str | int = "latest",
    data_dir: str | None = None,
    data: OwnData | None = None,
    batch_size: int | None = None,
) -> Study:
    """Compute both answers of every client to the held-out and the test samples.

    Args:
      folder: of the run.
      criterion: a name in `CRITERIA`.
      which: the checkpoint, see `restore`.
      data_dir: see `reopen`.
      data: see `reopen`.
      batch_size: of the inference, at most the test set; None is the run's
        `eval_batch_size`.

    Raises:
      UserError: see `reopen`; or there is no such criterion, or it gives a negative
        uncertainty; the batch size is not a positive integer, the run held out no
        samples, or the training samples are no longer the run's own.
    """
    if batch_size is not None:
        batch_size = BATCH_SIZE.checked(batch_size)
    experiment, state = reopen(folder, which, data_dir=data_dir, data=data)
    if experiment.validation is None:
        raise UserError(
            f"validation_share: {folder} held out no samples to find thresholds with; "
            "train with --validation-share, such as 0.1"
        )
    check_partition(Path(folder), experiment.manifest)
    # A batch that the test set cannot fill would cost as much as a whole one.
    size = min(batch_size or experiment.eval_batch_size, len(experiment.test.labels))
    setting = {
        "rounds": int(state.round),
        "criterion": criterion,
        "validation_samples": len(experiment.validation.labels),
        "test_samples": len(experiment.test.labels),
        "batch_size": size,
        "device": device_name(),
    }
    clients = measure_clients(experiment, state, criterion, size)
    return Study(setting, sorted(clients, key=lambda client: client.id))


def _relative(points: list[Figures]) -> list[Figures]:
    """Relate the seconds of each point to those of sending all samples."""
    whole = points[0]["seconds"]
    return [
        point | {"relative_seconds": None if seconds is None else seconds / whole}
        for point in points
        for seconds in [point["seconds"]]
    ]


def _mean(points: Sequence[Figures]) -> Figures:
    """Average each figure over the clients that have it; None if no client has."""
    mean: Figures = {}
    for name in points[0]:
        values = [point[name] for point in points if point[name] is not None]
        mean[name] = float(np.mean(values)) if values else None
    return mean
