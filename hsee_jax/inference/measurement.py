"""The measurements for a study: both answers to all samples, and their time."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Array
from hsee_jax.data.info import DatasetInfo
from hsee_jax.data.pipeline import normalize
from hsee_jax.engine.likeness import alike, weights_of
from hsee_jax.federation.branch import early_exits
from hsee_jax.federation.federation import Federation, Group
from hsee_jax.federation.junction import Junction
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy, server_of
from hsee_jax.inference.answering import AnswerFn, answers_of, gate_of
from hsee_jax.inference.calibration import (
    Labels,
    OffloadCurve,
    Scores,
    all_thresholds,
    judge,
    offload_curve,
    point_in_budget,
)
from hsee_jax.inference.client_study import TIMED_OFFLOADS, ClientStudy, SampleCosts
from hsee_jax.inference.criteria import CRITERIA
from hsee_jax.nn.model import layer_inputs
from hsee_jax.parallel.mesh import to_host
from hsee_jax.runs.experiment import Experiment
from hsee_jax.systems.costs import LayerCost, part_cost
from hsee_jax.systems.traffic import feature_bytes

_REPEATS = 5


class _Samples(NamedTuple):
    """A dataset on the host, and the batches that the networks take."""

    images: Array  # [M, ...], as they are stored
    labels: Labels  # [M]
    info: DatasetInfo
    batch_size: int

    def batches(self) -> Iterator[Array]:
        """Yield the batches ``float32 [B, ...]``; the last one may be smaller.

        Only one is on the device at a time: normalized, the whole set has four times
        the bytes of its images.
        """
        for start in range(0, len(self.labels), self.batch_size):
            part = self.images[start : start + self.batch_size]
            yield normalize(part, self.info.mean, self.info.std)


def measure_clients(
    experiment: Experiment, state: RunState, criterion: str, batch_size: int
) -> Iterator[ClientStudy]:
    """Yield the study of each client, one cut after the other.

    Args:
      experiment: the run; it has held-out samples.
      state: its state, with a slot for every client in the order of its group.
      criterion: a name in `CRITERIA`.
      batch_size: samples in a batch of the inference.
    """
    info = experiment.info
    largest = CRITERIA.make(criterion).largest(info.num_classes)
    state, *datasets = to_host((state, experiment.validation, experiment.test))
    held_out, test = (
        _Samples(data.images, data.labels, info, batch_size) for data in datasets
    )
    federation, layers = experiment.federation, experiment.costs()
    for g, group in enumerate(federation.groups):
        strategy, view = experiment.strategy, experiment.pipeline.view
        gate = gate_of(
            federation, strategy, g, batch_size=batch_size, criterion=criterion
        )
        answer_of = partial(answers_of, gate, federation, strategy, state, view, g)
        costs = _sample_costs(
            federation, layers, group, strategy.boundary, strategy.junction
        )
        members = range(len(group.ids))
        # Where each client has a view of its own, equal networks answer differently.
        twins = members if view else _twins(federation, strategy, state, g)
        yield from _group_studies(
            answer_of, group, costs, largest, held_out, test, twins
        )


def _twins(
    federation: Federation, strategy: Strategy, state: RunState, g: int
) -> Sequence[int]:
    """Return for each member of a group the first with the same answers."""
    members = range(len(federation.groups[g].ids))
    weights = [
        weights_of(
            federation.codec,
            (row_of(state.clients[g], m), server_of(strategy, state, g, m)),
        )
        for m in members
    ]
    return [
        next((n for n in range(m) if alike(weights[n], weights[m])), m) for m in members
    ]


def _mixer_flops(junction: Junction, features: jax.ShapeDtypeStruct, views: int) -> int:
    """Return the FLOPs of the layer that mixes the views of a sample, if any."""
    if junction.mixer is None:
        return 0
    stack = jax.ShapeDtypeStruct((views, *features.shape), features.dtype)
    there = jax.ShapeDtypeStruct((views, 1), jnp.bool_)
    return part_cost(junction.mixer, jax.eval_shape(junction.merge, stack, there))[1]


def _sample_costs(
    federation: Federation,
    layers: Sequence[LayerCost],
    group: Group,
    boundary: str,
    junction: Junction | None,
) -> list[SampleCosts]:
    """Add up the costs of a sample of each client, from the result of `layer_costs`.

    With a junction all clients of the group see each sample: they all send their
    features if the client that is asked is unsure, and the work of the others, and of
    the layer that mixes all features, counts as the server's.
    """
    cut, features = group.cut, layer_inputs(federation.model)
    seen_by = 1 if junction is None else len(group.ids)
    sizes = feature_bytes(features[cut], federation.codec, boundary, group.ids)
    if seen_by > 1:
        sizes = [sum(sizes)] * len(sizes)
    flops = [layer.flops for layer in layers]  # L layers, L exits, final head
    count = len(flops) // 2
    of_client = [sum(flops[:n]) + flops[count + n - 1] for n in range(1, cut + 1)]
    merging = 0 if junction is None else _mixer_flops(junction, features[cut], seen_by)
    return [
        SampleCosts(
            feature_bytes=size,
            client_flops=of_client[-1],
            server_flops=(seen_by - 1) * sum(flops[:cut])
            + sum(flops[cut:count])
            + flops[-1]
            + merging,
            early_flops=tuple(of_client[: early_exits(cut, federation.exits)]),
        )
        for size in sizes
    ]


def _group_studies(
    answer_of: Callable[[int], AnswerFn],
    group: Group,
    costs: Sequence[SampleCosts],
    largest: float,
    held_out: _Samples,
    test: _Samples,
    twins: Sequence[int],
) -> list[ClientStudy]:
    """Study the clients of one cut, and time the gate of one of them.

    Args:
      answer_of: returns the gate of a member of the group.
      group: the group.
      costs: the costs of a sample of each of its clients.
      largest: the criterion's largest value.
      held_out: the samples that give the thresholds.
      test: the samples that measure the thresholds.
      twins: for each member the first with the same answers, which is studied.
    """
    studies: list[ClientStudy] = []
    for member, (i, own) in enumerate(zip(group.ids, costs, strict=True)):
        if twins[member] < member:
            studies.append(studies[twins[member]]._replace(id=i, costs=own))
            continue
        answer = answer_of(member)
        held = _scores(answer, held_out)
        study = ClientStudy(
            id=i,
            cut=group.cut,
            costs=own,
            largest_uncertainty=largest,
            finite=_all_finite(held),
            held_out=offload_curve(held, all_thresholds(held.lowest, largest)),
            test=_scores(answer, test),
            seconds={},
        )
        studies.append(study)
    # If an exit is not finite, no threshold has an offload of 0.
    timed = next((m for m, study in enumerate(studies) if study.finite), 0)
    seconds = _seconds(answer_of(timed), studies[timed].held_out, next(test.batches()))
    return [study._replace(seconds=seconds) for study in studies]


def _scores(answer: AnswerFn, samples: _Samples) -> Scores:
    """Judge all answers: at threshold 0 the server answers all samples too."""
    answers = [answer(batch, 0.0) for batch in samples.batches()]
    logits = np.concatenate([part.logits for part in answers])
    exit_logits = np.concatenate([part.exit_logits for part in answers])
    early_logits = np.concatenate([part.early_logits for part in answers], axis=0)
    early = np.concatenate([part.early_uncertainty for part in answers], axis=0)
    return Scores(
        uncertainty=np.concatenate([part.uncertainty for part in answers]),
        exit=judge(exit_logits, samples.labels),
        server=judge(logits, samples.labels),
        early=tuple(
            (early[:, e], judge(early_logits[:, e], samples.labels))
            for e in range(early.shape[1])
        ),
    )


def _all_finite(scores: Scores) -> bool:
    judged = (scores.server, *(own for _, own in scores.exits))
    return all(np.isfinite(one.confidence).all() for one in judged)


def _seconds(
    answer: AnswerFn, curve: OffloadCurve, inputs: Array
) -> dict[float, float]:
    """Measure the seconds that a sample takes at each of `TIMED_OFFLOADS`.

    Each figure is the median of several calls. The calls for different offloads take
    turns, so that a slow moment hits all of them alike.
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
