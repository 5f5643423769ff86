"""Gated inference with a run's networks: its thresholds, and what they give.

Each client's thresholds come from the samples that were held out of the training data.
What they give is measured on the test set, which chooses nothing.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hsee_jax.augment import normalize
from hsee_jax.base import Array, Dataset, UserError
from hsee_jax.calibration import (
    Labels,
    OffloadCurve,
    Scores,
    all_thresholds,
    judge,
    offload_curve,
    point_at_accuracy,
    point_in_budget,
)
from hsee_jax.client_study import TIMED_OFFLOADS, ClientStudy, SampleCosts, Target
from hsee_jax.data import DatasetInfo, dataset_info
from hsee_jax.experiment import Experiment
from hsee_jax.federation import Group, RunState, Strategy, server_of
from hsee_jax.folder import Record, check_partition
from hsee_jax.inference import CRITERIA, Answers, Gate, make_gate
from hsee_jax.link import message_bytes
from hsee_jax.mesh import fetch
from hsee_jax.model import layer_inputs
from hsee_jax.runs import reopen

_REPEATS = 5

AnswerFn = Callable[[Array, float], Answers]  # a client's gate, of inputs and threshold


class Study(NamedTuple):
    """The gates of a run's clients, and what their figures were measured with."""

    setting: Record
    clients: list[ClientStudy]  # by ascending id

    def curve(self) -> Record:
        """Return what thresholds give, for each client and on average, as plain JSON.

        Returns:
          The setting, ``mean`` (21 points, averages over clients) and ``clients``.
        """
        points = [client.points() for client in self.clients]
        return self.setting | {
            "mean": [_mean(group) for group in zip(*points, strict=True)],
            "clients": [
                client.summary() | {"points": own}
                for client, own in zip(self.clients, points, strict=True)
            ],
        }

    def thresholds(self, target: Target) -> Record:
        """Return the threshold of each client that meets a target, as plain JSON.

        Of the thresholds that meet a budget it is the one with the highest offload; of
        those that reach an accuracy, the one with the lowest. A client whose logits
        are not all finite may have none: it gets the threshold that comes closest.

        Raises:
          UserError: a client with finite logits does not reach the accuracy, or no
            client does; the message says which accuracy is possible.
        """
        if target.kind == "accuracy":
            self._check_accuracy(target.value)
        return self.setting | {
            "target": {target.kind: target.value},
            "clients": [
                client.summary() | client.point(client.choose(target))
                for client in self.clients
            ],
        }

    def _check_accuracy(self, accuracy: float) -> None:
        """Refuse an accuracy that a client with finite logits does not reach."""
        clients = [client for client in self.clients if client.finite] or self.clients
        worst = min(clients, key=lambda client: client.held_out.accuracy.max())
        most = worst.held_out.accuracy.max()
        if accuracy > most:
            offload = worst.held_out.offload[point_at_accuracy(worst.held_out, most)]
            raise UserError(
                f"target_accuracy: {accuracy} cannot be reached by client {worst.id} "
                f"on the held-out samples; the most is {math.floor(1e4 * most) / 1e4} "
                f"at offload {offload:.2f}"
            )


def study(
    folder: Path,
    *,
    criterion: str = "entropy",
    which: str = "latest",
    data_dir: str | None = None,
    batch_size: int | None = None,
) -> Study:
    """Compute both answers of every client to the held-out and the test samples.

    Args:
      folder: of the run.
      criterion: a name in `CRITERIA`.
      which: the checkpoint, see `restore`.
      data_dir: see `reopen`.
      batch_size: of the inference; None is the run's `eval_batch_size`.

    Raises:
      UserError: there is no such run, it held out no samples, or the training samples
        are no longer the run's own.
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
    clients = _client_studies(experiment, state, criterion, size)
    return Study(setting, sorted(clients, key=lambda client: client.id))


class _Samples(NamedTuple):
    """A dataset as the networks take it."""

    batches: list[Array]  # float32 [B, H, W, C]; the last one may be smaller
    labels: Labels  # [M]


def _client_studies(
    experiment: Experiment, state: RunState, criterion: str, batch_size: int
) -> Iterator[ClientStudy]:
    """Study the clients of one cut after the other."""
    info = dataset_info(experiment.config.data)
    largest = CRITERIA[criterion].largest(info.num_classes)
    state, *datasets = fetch((state, experiment.validation, experiment.test))
    held_out, test = (_samples(data, info, batch_size) for data in datasets)
    federation = experiment.federation
    for g, group in enumerate(federation.groups):
        specs = federation.specs(g)
        gate = make_gate(*specs, batch_size=batch_size, criterion=criterion)
        answer_of = partial(_answer_fn, gate, experiment.strategy, state, g)
        costs = _sample_costs(experiment, group.cut)
        yield from _group_studies(answer_of, group, costs, largest, held_out, test)


def _samples(data: Dataset, info: DatasetInfo, batch_size: int) -> _Samples:
    starts = range(0, len(data.labels), batch_size)
    parts = [data.images[start : start + batch_size] for start in starts]
    batches = [normalize(part, info.mean, info.std) for part in parts]
    return _Samples(batches, data.labels)


def _answer_fn(
    gate: Gate, strategy: Strategy, state: RunState, group: int, member: int
) -> AnswerFn:
    """Put one client and its server on the device, and the gate around them."""
    client = jax.tree.map(lambda leaf: leaf[member], state.clients[group])
    server = server_of(strategy, state, group, member)
    return partial(gate.answer, *jax.device_put((client, server)))


def _sample_costs(experiment: Experiment, cut: int) -> SampleCosts:
    federation = experiment.federation
    features = layer_inputs(federation.model)
    flops = [layer.flops for layer in experiment.costs()]  # of L layers, then L heads
    count = len(flops) // 2
    return SampleCosts(
        feature_bytes=message_bytes(features[cut], federation.link),
        client_flops=sum(flops[:cut]) + flops[count + cut - 1],
        server_flops=sum(flops[cut:count]) + flops[-1],
    )


def _group_studies(
    answer_of: Callable[[int], AnswerFn],
    group: Group,
    costs: SampleCosts,
    largest: float,
    held_out: _Samples,
    test: _Samples,
) -> list[ClientStudy]:
    """Study the clients of one cut, and time the gate of one of them.

    Args:
      answer_of: gives the gate of a member of the group.
      group: the group.
      costs: of a sample at its cut.
      largest: the criterion's largest value.
      held_out: the samples that thresholds come from.
      test: the samples that they are measured on.
    """
    studies = []
    for member, i in enumerate(group.ids):
        answer = answer_of(member)
        held = _scores(answer, held_out)
        study = ClientStudy(
            id=i,
            cut=group.cut,
            costs=costs,
            largest_uncertainty=largest,
            finite=_all_finite(held),
            held_out=offload_curve(held, all_thresholds(held.uncertainty, largest)),
            test=_scores(answer, test),
            seconds={},
        )
        studies.append(study)
    # Where an exit is not finite no threshold has an offload of 0.
    timed = next((m for m, study in enumerate(studies) if study.finite), 0)
    seconds = _seconds(answer_of(timed), studies[timed].held_out, test.batches[0])
    return [study._replace(seconds=seconds) for study in studies]


def _scores(answer: AnswerFn, samples: _Samples) -> Scores:
    """Judge both answers: at threshold 0 the server answers all samples too."""
    answers = [answer(batch, 0.0) for batch in samples.batches]
    logits = np.concatenate([part.logits for part in answers])
    exit_logits = np.concatenate([part.exit_logits for part in answers])
    return Scores(
        uncertainty=np.concatenate([part.uncertainty for part in answers]),
        exit=judge(exit_logits, samples.labels),
        server=judge(logits, samples.labels),
    )


def _all_finite(scores: Scores) -> bool:
    confidences = (scores.exit.confidence, scores.server.confidence)
    return bool(np.isfinite(confidences).all())


def _seconds(
    answer: AnswerFn, curve: OffloadCurve, inputs: Array
) -> dict[float, float]:
    """Measure the seconds of a sample at each of `TIMED_OFFLOADS`.

    Each is the median of calls, which take turns so that a slow moment hits them alike.
    """
    points = [point_in_budget(curve, offload) for offload in TIMED_OFFLOADS]
    rounds: list[list[float]] = []
    for _ in range(1 + _REPEATS):  # the first round compiles
        rounds.append([])
        for threshold in curve.thresholds[points]:
            start = time.perf_counter()
            answer(inputs, threshold)
            rounds[-1].append(time.perf_counter() - start)
    medians = np.median(rounds[1:], axis=0) / len(inputs)
    return dict(zip(TIMED_OFFLOADS, medians.tolist(), strict=True))


def _mean(points: Sequence[Record]) -> Record:
    """Average each figure over the clients that have it; None if no client has."""
    mean: Record = {}
    for name in points[0]:
        values = [point[name] for point in points if point[name] is not None]
        mean[name] = float(np.mean(values)) if values else None
    return mean
