"""The evaluation of clients whose layers stay on their devices.

Devices send what their layers make of the server's test inputs: the features in the
form of the link, and the logits of the exit. The server scores both answers as an
evaluation with the clients' layers does.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import Array, Dataset, Metrics
from hsee_jax.deployment.batches import padded, padded_tree
from hsee_jax.deployment.forms import Kind, Layers, message_of
from hsee_jax.deployment.journal import Journal
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.engine.evaluation import ClientResult, all_rows, results_of
from hsee_jax.engine.likeness import References
from hsee_jax.engine.plan import EMPTY, take_seats
from hsee_jax.engine.programs import take
from hsee_jax.engine.scoring import Answers, BothMetrics, Rows, score_answers
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.state import RunState, split_stacks, stack_sizes
from hsee_jax.runs.experiment import Experiment


class RemoteEvaluation:
    """Scores clients by what their devices answer; see `EvaluateFn`."""

    def __init__(
        self, experiment: Experiment, mailbox: Mailbox, journal: Journal
    ) -> None:
        """Prepare the server's half.

        Args:
          experiment: the run.
          mailbox: the answers of devices arrive there.
          journal: what the server knows of the devices after each round.
        """
        self._experiment, self._mailbox, self._journal = experiment, mailbox, journal
        federation = experiment.federation
        groups = range(len(federation.groups))
        self._messages = [message_of(federation, group) for group in groups]

        @partial(jax.jit, static_argnames="group")
        def score(
            server: Branch, answers: Answers, labels: Array, mask: Array, *, group: int
        ) -> BothMetrics:
            spec = federation.specs(group)[1]
            return score_answers(spec, server, answers, labels, mask)

        self._score = score

    def __call__(
        self,
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
        references: References | None = None,
    ) -> list[ClientResult]:
        """See `EvaluateFn`."""
        del references
        sizes, labels = stack_sizes(state), np.asarray(data.labels)
        groups = self._experiment.federation.groups
        rows = all_rows(len(labels), self._experiment.eval_batch_size)
        if ids is None:
            ids = take_seats(groups, sizes, set())
        places = {
            int(i): (group, slot)
            for group, seats in enumerate(split_stacks(ids, sizes))
            for slot, i in enumerate(seats)
            if i != EMPTY
        }
        self._open(int(state.round), list(places), rows)
        servers = {i: self._server(state, *place) for i, place in places.items()}
        sums: dict[int, list[BothMetrics]] = {i: [] for i in places}
        for t, (indices, mask) in enumerate(zip(*rows, strict=True)):
            for i, (group, _) in places.items():
                batch = labels[indices], mask
                sums[i].append(self._batch(i, t, servers[i], *batch, group=group))
        self._mailbox.close()
        return sorted(
            result
            for i, (group, _) in places.items()
            for result in results_of(
                groups[group], [i], [_stacked(sums[i])], len(labels)
            )
        )

    def _open(self, number: int, clients: list[int], rows: Rows) -> None:
        """Ask devices for their answers after a round."""
        self._journal.recall(number)
        self._mailbox.open(
            number,
            dict.fromkeys(clients, rows.mask.sum(axis=1).tolist()),
            Layers.NONE,
            last=self._journal.last,
            means=self._journal.means,
            kind=Kind.EVALUATE,
        )

    def _server(self, state: RunState, group: int, slot: int) -> Branch:
        strategy = self._experiment.strategy
        if strategy.shared:
            return strategy.part(state.servers[0], group)
        return take(state.servers[group], slot)

    def _batch(
        self,
        i: int,
        t: int,
        server: Branch,
        labels: npt.NDArray[np.int32],
        mask: npt.NDArray[np.bool_],
        *,
        group: int,
    ) -> BothMetrics:
        """Wait for a client's answers to a batch, and score them."""
        tensors = self._mailbox.take(i, t)
        if tensors is None:
            return unanswered(labels[mask], self._experiment.info.num_classes)
        message = padded_tree(tensors, self._messages[group], len(mask))
        logits: Any = padded(tensors["logits"], len(mask))
        return self._score(server, Answers(message, logits), labels, mask, group=group)


def unanswered(labels: npt.NDArray[np.int32], classes: int) -> BothMetrics:
    """Return the scores of a client that does not answer: every answer is wrong.

    Args:
      labels: of the samples, ``int32 [n]``.
      classes: K. Each loss is the one of K equal probabilities.
    """
    count = len(labels)
    metrics: Any = Metrics(
        np.float32(count * np.log(classes)),  # type: ignore[arg-type]
        np.int32(0),  # type: ignore[arg-type]
        np.int32(count),  # type: ignore[arg-type]
    )
    agreement: Any = np.zeros((4, classes), np.int32)
    agreement[3] = np.bincount(labels, minlength=classes)
    return BothMetrics(metrics, metrics, agreement)


def _stacked(sums: list[BothMetrics]) -> BothMetrics:
    return jax.tree.map(lambda *parts: np.stack(parts), *jax.device_get(sums))
