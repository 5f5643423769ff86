"""Gated inference with a run's networks: its thresholds, and what they give.

Thresholds come from the samples that were held out of the training data, for each
client by itself. What they give is measured on the test set, which nothing is chosen
by.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hsee_jax.augment import normalize
from hsee_jax.base import Array, Dataset, UserError
from hsee_jax.calibration import (
    Curve,
    Floats,
    Labels,
    Scores,
    all_thresholds,
    calibration_error,
    curve,
    judge,
    reaching,
    within,
)
from hsee_jax.experiment import Experiment, dataset_info_of
from hsee_jax.federation import RunState, server_of
from hsee_jax.folder import Record, check_partition
from hsee_jax.inference import CRITERIA, Answers, make_gate
from hsee_jax.link import message_bytes
from hsee_jax.mesh import fetch
from hsee_jax.model import LayerCost, layer_inputs
from hsee_jax.runs import reopen

_OFFLOADS = tuple(part / 20 for part in range(20, -1, -1))  # the points of a curve
_TIMED = _OFFLOADS[::5]
_REPEATS = 5


@dataclass(frozen=True)
class Target:
    """What a client's threshold is to give on the held-out samples."""

    kind: str  # "offload" or "bytes" a sample: the most; "accuracy": the least
    value: float

    def __post_init__(self) -> None:
        """Refuses a value that no threshold could ever give."""
        some = self.kind == "bytes" and 1 < self.value < math.inf
        if not (some or 0 <= self.value <= 1):
            allowed = "0 or more" if self.kind == "bytes" else "0..1"
            raise UserError(
                f"target_{self.kind}: {self.value} is not allowed; allowed is {allowed}"
            )


class GatedClient(NamedTuple):
    """What is known of a client, for any threshold."""

    id: int
    cut: int
    feature_bytes: int  # of a sample, as the link has them
    client_flops: int  # of a sample, in the layers and the exit
    server_flops: int  # in the layers and the final head behind them
    largest: float  # uncertainty that can be
    held_out: Curve  # at every threshold that makes a difference there
    test: Scores
    seconds: dict[float, float]  # of a sample, by offload; measured once for each cut

    def choose(self, target: Target) -> int:
        """The point of the held-out curve that meets a target, which can be met."""
        if target.kind == "accuracy":
            return reaching(self.held_out, target.value)
        cost = self.feature_bytes if target.kind == "bytes" else 1
        return within(self.held_out, target.value, cost)

    def point(self, choice: int) -> Record:
        """A threshold of the held-out curve, and what it gives; a sample's costs."""
        threshold = float(self.held_out.thresholds[choice])
        test = curve(self.test, np.array([threshold]))
        offload = float(test.offload[0])
        return {
            "threshold": threshold,
            "normalized_threshold": threshold / self.largest,
            "accuracy": float(test.accuracy[0]),
            "on_device": 1 - offload,
            "bytes": offload * self.feature_bytes,
            "flops": self.client_flops + offload * self.server_flops,
            "validation_accuracy": float(self.held_out.accuracy[choice]),
            "validation_on_device": 1 - float(self.held_out.offload[choice]),
        }

    def points(self) -> list[Record]:
        """Those whose offload of the held-out samples is 1, 0.95 .. 0."""
        all_sent = self.seconds[_TIMED[0]]

        def times(seconds: float | None) -> Record:
            relative = None if seconds is None else seconds / all_sent
            return {"seconds": seconds, "relative_seconds": relative}

        return [
            self.point(within(self.held_out, offload))
            | times(self.seconds.get(offload))
            for offload in _OFFLOADS
        ]

    def record(self) -> Record:
        """What does not depend on a threshold."""
        return {
            "id": self.id,
            "cut": self.cut,
            "exit_accuracy": float(self.test.exit.correct.mean()),
            "server_accuracy": float(self.test.server.correct.mean()),
            "exit_calibration_error": calibration_error(self.test.exit),
            "server_calibration_error": calibration_error(self.test.server),
        }


class Study(NamedTuple):
    """The clients of a run, by id, and what their figures were measured with."""

    setting: Record
    clients: list[GatedClient]

    def curve(self) -> Record:
        """What thresholds give, for each client and in the mean, as JSON holds it."""
        points = [client.points() for client in self.clients]
        return self.setting | {
            "mean": [_mean(group) for group in zip(*points, strict=True)],
            "clients": [
                client.record() | {"points": own}
                for client, own in zip(self.clients, points, strict=True)
            ],
        }

    def thresholds(self, target: Target) -> Record:
        """The threshold of each client that meets a target, as JSON holds it.

        Of those that do it is the one with the highest offload within a budget, and
        with the lowest for an accuracy.

        Raises:
          UserError: a client has none; it says what is possible.
        """
        worst = min(self.clients, key=lambda client: client.held_out.accuracy.max())
        most = worst.held_out.accuracy.max()
        if target.kind == "accuracy" and target.value > most:
            offload = worst.held_out.offload[reaching(worst.held_out, most)]
            raise UserError(
                f"target_accuracy: {target.value} cannot be reached by client "
                f"{worst.id} on the held-out samples; the most is "
                f"{math.floor(1e4 * most) / 1e4} at offload {offload:.2f}"
            )
        return self.setting | {
            "target": {target.kind: target.value},
            "clients": [
                client.record() | client.point(client.choose(target))
                for client in self.clients
            ],
        }


def study(
    folder: Path,
    *,
    criterion: str = "entropy",
    which: str = "latest",
    data_dir: str | None = None,
    batch_size: int | None = None,
) -> Study:
    """Computes both answers of every client to the held-out and the test samples.

    Args:
      folder: of the run.
      criterion: of `CRITERIA`.
      which: the checkpoint, see `restore`.
      data_dir: see `reopen`.
      batch_size: of the inference; None is the run's `eval_batch_size`.

    Raises:
      UserError: there is no such run, it held out no samples, or the training samples
        are not those of the run any more.
    """
    experiment, state = reopen(folder, which, data_dir=data_dir)
    if experiment.validation is None:
        raise UserError(
            f"validation_share: {folder} held out no samples to find thresholds with; "
            "train with --validation-share, such as 0.1"
        )
    check_partition(folder, experiment.manifest)
    size = experiment.config.run.eval_batch_size if batch_size is None else batch_size
    setting = {
        "rounds": int(state.round),
        "criterion": criterion,
        "validation_samples": len(experiment.validation.labels),
        "test_samples": len(experiment.test.labels),
        "batch_size": size,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    return Study(setting, sorted(_clients(experiment, state, criterion, size)))


def _clients(
    experiment: Experiment, state: RunState, criterion: str, batch_size: int
) -> Iterator[GatedClient]:
    """Computes both answers to all samples, client by client."""
    info = dataset_info_of(experiment.config.data)
    largest = CRITERIA[criterion].largest(info.num_classes)
    state, held_out, test = fetch((state, experiment.validation, experiment.test))
    layers, federation = experiment.costs(), experiment.federation
    features = layer_inputs(federation.model)

    def batches(data: Dataset) -> list[Array]:
        starts = range(0, len(data.labels), batch_size)
        parts = [data.images[start : start + batch_size] for start in starts]
        return [normalize(part, info.mean, info.std) for part in parts]

    held_out_inputs, test_inputs = batches(held_out), batches(test)
    for g, group in enumerate(federation.groups):
        specs = federation.specs(g)
        gate = make_gate(*specs, batch_size=batch_size, criterion=criterion)
        client_flops, server_flops = _flops(layers, group.cut)
        seconds: dict[float, float] = {}
        for member, i in enumerate(group.ids):
            client, server = jax.device_put(
                (
                    jax.tree.map(lambda leaf, m=member: leaf[m], state.clients[g]),
                    server_of(experiment.strategy, state, g, member),
                )
            )
            run = partial(gate.answer, client, server)
            held = _scores(run, held_out_inputs, held_out.labels)
            every = curve(held, all_thresholds(held.uncertainty, largest))
            if not seconds:
                points = [within(every, offload) for offload in _TIMED]
                times = _times(run, test_inputs[0], every.thresholds[points])
                seconds = dict(zip(_TIMED, times, strict=True))
            yield GatedClient(
                id=i,
                cut=group.cut,
                feature_bytes=message_bytes(features[group.cut], federation.link),
                client_flops=client_flops,
                server_flops=server_flops,
                largest=largest,
                held_out=every,
                test=_scores(run, test_inputs, test.labels),
                seconds=seconds,
            )


def _flops(layers: Sequence[LayerCost], cut: int) -> tuple[int, int]:
    """Of one sample on either side of a cut; ``layers`` are those of `layer_costs`."""
    count = len(layers) // 2
    flops = [layer.flops for layer in layers]
    client = sum(flops[:cut]) + flops[count + cut - 1]
    return client, sum(flops[cut:count]) + flops[-1]


Run = Callable[[Array, float], Answers]  # a client's gate, of inputs and a threshold


def _scores(run: Run, inputs: Sequence[Array], labels: Labels) -> Scores:
    """Judges both answers: at threshold 0 the server is asked for all samples."""
    answers = [run(batch, 0.0) for batch in inputs]
    uncertainty, exit_logits, logits = (
        np.concatenate(parts)
        for parts in zip(
            *((a.uncertainty, a.exit_logits, a.logits) for a in answers), strict=True
        )
    )
    return Scores(uncertainty, judge(exit_logits, labels), judge(logits, labels))


def _times(run: Run, inputs: Array, thresholds: Floats) -> list[float]:
    """Seconds a sample at each threshold, medians of calls in turns."""
    spent: list[list[float]] = []
    for _ in range(1 + _REPEATS):  # the first round compiles
        spent.append([])
        for threshold in thresholds:
            start = time.perf_counter()
            run(inputs, threshold)
            spent[-1].append(time.perf_counter() - start)
    return (np.median(spent[1:], axis=0) / len(inputs)).tolist()


def _mean(records: Sequence[Record]) -> Record:
    """Of every figure over clients; None if it was not measured."""
    return {
        name: None if value is None else float(np.mean([r[name] for r in records]))
        for name, value in records[0].items()
    }
