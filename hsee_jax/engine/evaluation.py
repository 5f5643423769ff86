"""The exact accuracy of every client's two answers on a whole dataset.

An answer with a logit that is not finite counts as wrong.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import Dataset
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.agreement import Agreement
from hsee_jax.engine.event_scoring import make_event_scores
from hsee_jax.engine.likeness import References
from hsee_jax.engine.plan import EMPTY, take_seats
from hsee_jax.engine.round import Programs, client_axis
from hsee_jax.engine.scoring import (
    BothMetrics,
    GatedMetrics,
    Rows,
    Task,
    make_loop,
    make_map,
    make_score,
)
from hsee_jax.federation.federation import Federation, Group
from hsee_jax.federation.state import RunState, split_stacks, stack_sizes
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import backend_of


class GatedResult(NamedTuple):
    """The scores of a client at its gated width."""

    flops_share: float  # of its layers, relative to all of their channels
    exit_accuracy: float
    server_accuracy: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GatedResult":
        """Make a result from its fields by name."""
        return cls(*(float(values[name]) for name in cls._fields))


class ClientResult(NamedTuple):
    """The scores of a client's exit and of the server behind it on a dataset."""

    id: int
    cut: int
    exit_accuracy: float
    server_accuracy: float
    exit_loss: float  # mean cross-entropy, in nats
    server_loss: float
    agreement: Agreement | None = None  # None where a file does not hold them
    early_accuracies: tuple[float, ...] = ()  # of the exits before the last, by depth
    gated: GatedResult | None = None  # None where layers have no gates

    def to_json(self) -> dict[str, Any]:
        """Return all but the agreement; a value that is not finite is None."""
        values = self._asdict()
        del values["agreement"]
        early, gated = list(values.pop("early_accuracies")), values.pop("gated")
        found = {k: v if math.isfinite(v) else None for k, v in values.items()}
        found |= {"early_accuracies": early} if early else {}
        return found | ({"gated": gated._asdict()} if gated else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ClientResult":
        """Make a result from that of `to_json`; other values are passed over.

        Raises:
          KeyError, TypeError, ValueError: the values are not a result.
        """
        gated = values.get("gated")
        names = ("exit_accuracy", "server_accuracy", "exit_loss", "server_loss")
        figures: Any = {
            name: math.nan if values[name] is None else float(values[name])
            for name in names
        }
        return cls(
            id=int(values["id"]),
            cut=int(values["cut"]),
            **figures,
            early_accuracies=tuple(map(float, values.get("early_accuracies", ()))),
            gated=None if gated is None else GatedResult.from_json(gated),
        )


class EvaluateFn(Protocol):
    """A compiled evaluation."""

    def __call__(
        self,
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
        references: References | None = None,
    ) -> list[ClientResult]:
        """Evaluate the clients in a state's slots.

        Empty slots are not scored, and clients with the weights of another only once.

        Args:
          state: the state of these clients.
          data: the samples, the same on every device.
          ids: ``int32 [N]``, the id of the client in each slot, or `EMPTY`. With None
            each stack holds the members of its group, followed by empty slots.
          references: to evaluate many clients in several calls, on the same data: a
            dictionary for all of them, which is empty before the first. On accelerators
            each call has references of its own.

        Returns:
          One result for each client, by ascending id.
        """


def means(results: Sequence[ClientResult]) -> tuple[float, float]:
    """Return the exit and the server accuracy as unweighted means over clients."""
    return (
        float(np.mean([result.exit_accuracy for result in results])),
        float(np.mean([result.server_accuracy for result in results])),
    )


def make_evaluation(
    federation: Federation,
    strategy: Strategy,
    pipeline: InputPipeline,
    *,
    batch_size: int,
    axis: str = "auto",
    programs: Programs | None = None,
) -> EvaluateFn:
    """Compile the evaluation of all clients, once for each cut.

    Args:
      federation: the clients.
      strategy: the algorithm, which knows the server behind each client.
      pipeline: makes batches of samples.
      batch_size: samples in a batch; the last batch is padded, no sample is dropped.
      axis: ``"loop"``, ``"vmap"`` or ``"map"`` (both are a program in which each device
        evaluates its clients one after another), or ``"auto"``.
      programs: compiled functions of other evaluations with the same network and
        arguments, to use and to add to; only ``loop`` does.
    """
    score = make_score(federation, pipeline)
    if strategy.junction is not None:
        scores_of = make_event_scores(federation, strategy.junction, pipeline)
    elif client_axis(axis, backend_of(federation.mesh)) == "loop":
        known = {} if programs is None else programs
        scores_of = make_loop(score, federation, strategy, known)
    else:
        scores_of = make_map(score, federation, strategy)

    def evaluate(
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
        references: References | None = None,
    ) -> list[ClientResult]:
        count, sizes = len(data.labels), stack_sizes(state)
        rows = all_rows(count, batch_size)
        references = {} if references is None else references
        if ids is None:
            ids = take_seats(federation.groups, sizes, set())
        results: list[ClientResult] = []
        for g, seats in enumerate(split_stacks(ids, sizes)):
            taken = seats != EMPTY
            views = seats if pipeline.view else np.zeros_like(seats)
            scores = scores_of(Task(g, state, taken, views, data, rows, references))
            results += results_of(federation.groups[g], seats.tolist(), scores, count)
        return sorted(results)

    return evaluate


def all_rows(count: int, batch_size: int) -> Rows:
    """Return every sample once; pad the last batch with the first samples."""
    numbers = np.arange(-(-count // batch_size) * batch_size, dtype=np.int32)
    return Rows(
        (numbers % count).reshape(-1, batch_size),
        (numbers < count).reshape(-1, batch_size),
    )


def results_of(
    group: Group,
    seats: Sequence[int],
    scores: Sequence[BothMetrics | None],
    count: int,
) -> Iterator[ClientResult]:
    """Make the results of a group from the sums ``[T, ...]`` over its batches.

    Args:
      group: the group.
      seats: the id of the client in each slot, or `EMPTY`.
      scores: the sums of each slot.
      count: the number of samples.
    """
    for i, sums in zip(seats, scores, strict=True):
        if i != EMPTY:
            total: Any = jax.tree.map(
                lambda a: np.sum(a, axis=0, dtype=np.float64), sums
            )
            yield ClientResult(
                id=i,
                cut=group.cut,
                exit_accuracy=float(total.exit.correct / count),
                server_accuracy=float(total.server.correct / count),
                exit_loss=float(total.exit.loss_sum / count),
                server_loss=float(total.server.loss_sum / count),
                agreement=Agreement.of(total.agreement.astype(np.int64)),
                early_accuracies=tuple(
                    float(own.correct / count) for own in total.early
                ),
                gated=total.gated and _gated_of(total.gated, count),
            )


def _gated_of(total: GatedMetrics, count: int) -> GatedResult:
    """Make the result at the gated width from the sums over all samples."""
    return GatedResult(
        flops_share=float(total.flops_share / count),
        exit_accuracy=float(total.exit.correct / count),
        server_accuracy=float(total.server.correct / count),
    )
