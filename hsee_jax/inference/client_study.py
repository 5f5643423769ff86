"""One client's gate: the results of each threshold, and the choice for a target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.core.errors import unknown
from hsee_jax.core.options import Option, at_least, between
from hsee_jax.inference.calibration import (
    OffloadCurve,
    Scores,
    calibration_error,
    exit_shares,
    offload_curve,
    point_at_accuracy,
    point_in_budget,
)

Figures = dict[str, Any]  # values of JSON
OFFLOADS = tuple(part / 20 for part in range(20, -1, -1))  # for the points of a curve
TIMED_OFFLOADS = OFFLOADS[::5]
_TARGETS = {
    "offload": Option("target_offload", float, 0.0, rules=(between(0, 1),)),
    "accuracy": Option("target_accuracy", float, 0.0, rules=(between(0, 1),)),
    "bytes": Option("target_bytes", float, 0.0, rules=(at_least(0),)),
}


@dataclass(frozen=True)
class Target:
    """A target for a client's threshold on the held-out samples."""

    kind: str  # "offload" or "bytes" per sample, at most; "accuracy", at least
    value: float

    def __post_init__(self) -> None:
        """Refuse an unknown kind, or a value that it does not allow: `UserError`."""
        if self.kind not in _TARGETS:
            raise unknown("target", self.kind, _TARGETS)
        _TARGETS[self.kind].checked(self.value)


class SampleCosts(NamedTuple):
    """The costs of one sample on both sides of a cut."""

    feature_bytes: int  # of the message that carries its features; 0 if none does
    client_flops: int  # of the layers up to the cut and the exits
    server_flops: int  # of the layers behind the cut and the final head
    early_flops: tuple[int, ...] = ()  # of what runs up to each exit before the last


class ClientStudy(NamedTuple):
    """The measurements of a client's gate, enough for any threshold."""

    id: int
    cut: int
    costs: SampleCosts
    largest_uncertainty: float  # of the criterion
    finite: bool  # whether all logits for the held-out samples are finite
    held_out: OffloadCurve  # at all thresholds that differ on the held-out samples
    test: Scores
    seconds: Mapping[float, float]  # of a sample, by offload (`TIMED_OFFLOADS`)

    def choose(self, target: Target) -> int:
        """Return the point of the held-out curve that meets a target.

        If no point does, return the point that comes closest.
        """
        if target.kind == "accuracy":
            return point_at_accuracy(self.held_out, target.value)
        cost = self.costs.feature_bytes if target.kind == "bytes" else 1
        return point_in_budget(self.held_out, target.value, cost)

    def point(self, choice: int) -> Figures:
        """Return a threshold of the held-out curve with its results and its costs.

        Accuracy, the share on the device and the costs of a sample are measured on the
        test samples.
        """
        threshold = float(self.held_out.thresholds[choice])
        test = offload_curve(self.test, np.array([threshold]))
        offload = float(test.offload[0])
        costs = self.costs
        shares = exit_shares(self.test, threshold)
        early = np.dot(shares[:-1], np.array(costs.early_flops, float))
        whole = 1 - float(np.sum(shares[:-1]))  # samples that pass the whole client
        return {
            "threshold": threshold,
            "normalized_threshold": threshold / self.largest_uncertainty,
            "accuracy": float(test.accuracy[0]),
            "on_device": 1 - offload,
            "bytes": offload * costs.feature_bytes,
            "flops": float(early)
            + whole * costs.client_flops
            + offload * costs.server_flops,
            "validation_accuracy": float(self.held_out.accuracy[choice]),
            "validation_on_device": 1 - float(self.held_out.offload[choice]),
        }

    def shares(self, choice: int) -> Figures:
        """Return the shares of the test samples that each of several exits answers."""
        if not self.test.early:
            return {}
        threshold = float(self.held_out.thresholds[choice])
        return {"exit_shares": exit_shares(self.test, threshold).tolist()}

    def points(self) -> list[Figures]:
        """Return the points for an offload of 1, 0.95 .. 0 of the held-out samples."""
        return [
            self.point(point_in_budget(self.held_out, offload))
            | {"seconds": self._seconds(offload)}
            for offload in OFFLOADS
        ]

    def _seconds(self, offload: float) -> float | None:
        """Return the time of a sample at a point, or None where it is not measured."""
        if offload not in TIMED_OFFLOADS:
            return None
        lowest = float(self.held_out.offload[-1])  # 0, unless the exit is not finite
        return self.seconds.get(max(offload, lowest))

    def summary(self) -> Figures:
        """Return the figures that do not depend on a threshold.

        A calibration error is None where a logit is not finite. With several exits,
        the figures of the exit are those of the last, and `early_accuracies` has those
        of the others.
        """
        early = [float(own.correct.mean()) for _, own in self.test.early]
        return ({"early_accuracies": early} if early else {}) | {
            "id": self.id,
            "cut": self.cut,
            "exit_accuracy": float(self.test.exit.correct.mean()),
            "server_accuracy": float(self.test.server.correct.mean()),
            "exit_calibration_error": calibration_error(self.test.exit),
            "server_calibration_error": calibration_error(self.test.server),
        }
