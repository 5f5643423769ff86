"""The types of a round's record and of a run's summary, with their JSON.

Each line of ``metrics.jsonl`` holds a `RoundRecord`; ``summary.json`` holds a
`Summary`.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from hsee_jax.core.types import ExitMetrics
from hsee_jax.engine.agreement import Agreement
from hsee_jax.engine.evaluation import ClientResult, means
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.refit import ExitFit
from hsee_jax.engine.round import all_finite
from hsee_jax.systems.clock import ClockTotals, RoundClock, clock_totals
from hsee_jax.systems.traffic import Bytes

_PACKAGES = ("hsee-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


class TrainFigures(NamedTuple):
    """Means over the samples of a round, measured in training; NaN of no samples."""

    exit_loss: float  # in nats
    exit_accuracy: float
    server_loss: float
    server_accuracy: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as values of JSON; NaN is None."""
        return {n: None if math.isnan(v) else v for n, v in self._asdict().items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainFigures":
        """Make the figures from the result of `to_json`."""
        found = (values[name] for name in cls._fields)
        return cls(*(math.nan if value is None else float(value) for value in found))


class Scores(NamedTuple):
    """The scores of all clients on the test set."""

    mean_exit_accuracy: float
    mean_server_accuracy: float
    clients: tuple[ClientResult, ...]  # by ascending id

    @classmethod
    def of(cls, results: Sequence[ClientResult]) -> "Scores":
        """Make the scores from the results of clients, without each `Agreement`."""
        clients = (result._replace(agreement=None) for result in results)
        return cls(*means(results), tuple(clients))

    def to_json(self) -> dict[str, Any]:
        """Return the scores as values of JSON; a loss that is not finite is None."""
        return {
            **self._asdict(),
            "clients": [result.to_json() for result in self.clients],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Scores":
        """Make the scores from the result of `to_json`."""
        clients = sorted(map(ClientResult.from_json, values["clients"]))
        exits, servers = values["mean_exit_accuracy"], values["mean_server_accuracy"]
        return cls(float(exits), float(servers), tuple(clients))


class RoundRecord(NamedTuple):
    """The figures of a round, as a line of ``metrics.jsonl`` holds them."""

    round: int  # from 1
    seconds: float  # of training
    images: int  # number of images in the training steps
    missed: list[int]  # ids of clients that were drawn and did not take part
    left_out: list[int]  # ids of clients that refused a step
    train: TrainFigures  # over all clients but ``left_out``
    link: Bytes  # over all clients
    wall_seconds: float  # with evaluation, since the end of the previous round
    test: Scores | None = None  # None if the round was not evaluated
    simulated: RoundClock | None = None  # None in a run without devices

    def to_json(self) -> dict[str, Any]:
        """Return the record as values of JSON."""
        values = self._asdict()
        values["train"] = self.train.to_json()
        values["link"] = self.link._asdict()
        for name in ("test", "simulated"):
            part = values.pop(name)
            if part is not None:
                values[name] = part.to_json()
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RoundRecord":
        """Make a record from the result of `to_json`.

        Raises:
          KeyError, TypeError, ValueError: the values are not a record.
        """
        link = values.get("link", {"up_bytes": 0, "down_bytes": 0})
        return cls(
            round=int(values["round"]),
            seconds=float(values["seconds"]),
            images=int(values["images"]),
            missed=list(map(int, values.get("missed", ()))),
            left_out=list(map(int, values.get("left_out", ()))),
            train=TrainFigures.from_json(values["train"]),
            # `+` keeps a whole number whole, and refuses what is no number.
            link=Bytes(+link["up_bytes"], +link["down_bytes"]),
            wall_seconds=float(values["wall_seconds"]),
            test=_optional(Scores, values, "test"),
            simulated=_optional(RoundClock, values, "simulated"),
        )

    def scalars(self) -> dict[str, float]:
        """Return the figures of the round by name, for logs and trackers."""
        found = {"images_per_second": self.images / self.seconds}
        found |= {f"train/{k}": v for k, v in self.train._asdict().items()}
        found |= {f"link/{k}": v for k, v in self.link._asdict().items()}
        if self.simulated is not None:
            found |= self.simulated.scalars()
        if self.test is not None:
            found["test/mean_exit_accuracy"] = self.test.mean_exit_accuracy
            found["test/mean_server_accuracy"] = self.test.mean_server_accuracy
        return found


class LinkSummary(NamedTuple):
    """The bytes on the links in a run."""

    up_bytes: float
    down_bytes: float
    cuts: list[dict[str, Any]]  # of one client of each cut, see `bytes_by_cut`


class Summary(NamedTuple):
    """The final figures of a run."""

    rounds: int
    scores: Scores
    wall_seconds: float
    images_per_second: float
    missed_rounds: int  # the sum over all clients of the rounds that they missed
    left_out_rounds: int
    device: str
    versions: dict[str, str]
    link: LinkSummary
    # Of each client, by ascending id; empty in a run of version 0.1.
    agreement: tuple[Agreement, ...] = ()
    simulated: ClockTotals | None = None  # None in a run without devices

    def to_json(self) -> dict[str, Any]:
        """Return the summary as values of JSON."""
        values = self._asdict()
        scores, simulated = values.pop("scores").to_json(), values.pop("simulated")
        del values["agreement"]
        return (
            {"rounds": values.pop("rounds")}
            | scores
            | values
            | {"link": self.link._asdict()}
            | ({} if simulated is None else {"simulated": simulated.to_json()})
            | self._agreement()
        )

    def _agreement(self) -> dict[str, Any]:
        if not self.agreement:
            return {}
        pairs = zip(self.scores.clients, self.agreement, strict=True)
        return {"agreement": [{"id": c.id} | own.to_json() for c, own in pairs]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Summary":
        """Make a summary from the result of `to_json`.

        Raises:
          KeyError, TypeError, ValueError: the values are not a summary.
        """
        link = {"up_bytes": 0, "down_bytes": 0, "cuts": []} | values.get("link", {})
        return cls(
            rounds=int(values["rounds"]),
            scores=Scores.from_json(values),
            wall_seconds=float(values["wall_seconds"]),
            images_per_second=float(values["images_per_second"]),
            missed_rounds=int(values.get("missed_rounds", 0)),
            left_out_rounds=int(values.get("left_out_rounds", 0)),
            device=str(values["device"]),
            versions={name: str(v) for name, v in values["versions"].items()},
            link=LinkSummary(+link["up_bytes"], +link["down_bytes"], [*link["cuts"]]),
            agreement=tuple(map(Agreement.from_json, values.get("agreement", ()))),
            simulated=_optional(ClockTotals, values, "simulated"),
        )


def link_of(exits: Sequence[ExitFit]) -> Bytes:
    """Return the bytes that the fits of exits send over all links."""
    return Bytes(
        sum(one.up_bytes for one in exits), sum(one.down_bytes for one in exits)
    )


def round_record(
    number: int,
    plan: RoundPlan,
    metrics: ExitMetrics,
    link: Bytes,
    *,
    seconds: float,
    wall_seconds: float,
    test: Scores | None,
    simulated: RoundClock | None = None,
) -> RoundRecord:
    """Make the record of a round.

    Args:
      number: the number of the round, from 1.
      plan: the plan of the round.
      metrics: the metrics of its slots, ``[N, ...]``.
      link: the bytes on all links.
      seconds: the seconds of training.
      wall_seconds: see `RoundRecord`.
      test: the scores, or None if the round was not evaluated.
      simulated: the round on the simulated clock, or None without devices.
    """
    fine = all_finite(metrics)
    counted = fine & plan.active  # a server took some batches of a late client
    count = np.sum(metrics.exit.count[counted])
    figures = [
        float(np.sum(total[counted]) / count) if count else math.nan
        for branch in (metrics.exit, metrics.server)
        for total in (branch.loss_sum, branch.correct)
    ]
    drawn = np.unique(plan.order)
    return RoundRecord(
        round=number,
        seconds=seconds,
        images=int(np.sum(plan.mask[:, plan.active])),
        missed=plan.ids[drawn][~plan.active[drawn]].tolist(),
        left_out=plan.ids[~fine].tolist(),
        train=TrainFigures(*figures),
        link=link,
        wall_seconds=wall_seconds,
        test=test,
        simulated=simulated,
    )


def summarize(
    results: Sequence[ClientResult],
    records: Sequence[RoundRecord],
    cuts: list[dict[str, Any]],
) -> Summary:
    """Make the summary of a run from its last results and all its records."""
    return Summary(
        rounds=len(records),
        scores=Scores.of(results),
        wall_seconds=sum(record.wall_seconds for record in records),
        images_per_second=images_per_second(records),
        missed_rounds=sum(len(record.missed) for record in records),
        left_out_rounds=sum(len(record.left_out) for record in records),
        device=device_name(),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        link=LinkSummary(
            up_bytes=sum(record.link.up_bytes for record in records),
            down_bytes=sum(record.link.down_bytes for record in records),
            cuts=cuts,
        ),
        agreement=tuple(r.agreement for r in results if r.agreement is not None),
        simulated=clock_totals([r.simulated for r in records if r.simulated]),
    )


def images_per_second(records: Sequence[RoundRecord]) -> float:
    """Return the median images of a round over its median seconds.

    The medians leave out the rounds that compile.
    """
    images = np.median([record.images for record in records])
    return float(images / np.median([record.seconds for record in records]))


def device_name() -> str:
    """Return the number and the kind of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _optional(kind: Any, values: Mapping[str, Any], name: str) -> Any:
    """Read a part that not every record or summary has."""
    return kind.from_json(values[name]) if name in values else None
