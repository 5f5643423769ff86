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
from hsee_jax.engine.evaluation import (
    ClientResult,
    EvaluateFn,
    all_rows,
    results_of,
)
from hsee_jax.engine.likeness import References
from hsee_jax.engine.plan import EMPTY, take_seats
from hsee_jax.engine.programs import take
from hsee_jax.engine.scoring import Answers, BothMetrics, Rows, score_answers
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.state import RunState, split_stacks, stack_sizes
from hsee_jax.runs.experiment import Experiment


def make_remote_evaluation(
    experiment: Experiment, mailbox: Mailbox, journal: Journal
) -> EvaluateFn:
    """Make an evaluation for which devices answer test inputs.

    Args:
      experiment: the run.
      mailbox: the answers of devices arrive there.
      journal: what the server knows of the devices after each round.
    """
    federation, strategy = experiment.federation, experiment.strategy
    groups = range(len(federation.groups))
    messages = [message_of(federation, group) for group in groups]

    @partial(jax.jit, static_argnames="group")
    def score(
        server: Branch, answers: Answers, labels: Array, mask: Array, *, group: int
    ) -> BothMetrics:
        spec = federation.specs(group)[1]
        return score_answers(spec, server, answers, labels, mask)

    def server_of(state: RunState, group: int, slot: int) -> Branch:
        if strategy.shared:
            return strategy.part(state.servers[0], group)
        return take(state.servers[group], np.int32(slot))

    def score_batch(i: int, t: int, server: Branch, batch: Any, group: int) -> Any:
        labels, mask = batch
        tensors = mailbox.take(i, t)
        if tensors is None:
            return unanswered(labels[mask], experiment.info.num_classes)
        message = padded_tree(tensors, messages[group], len(mask))
        answers = Answers(message, padded(tensors["logits"], len(mask)))
        return score(server, answers, labels, mask, group=group)

    def evaluate(
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
        references: References | None = None,
    ) -> list[ClientResult]:
        del references
        sizes, labels = stack_sizes(state), np.asarray(data.labels)
        rows = all_rows(len(labels), experiment.eval_batch_size)
        if ids is None:
            ids = take_seats(federation.groups, sizes, set())
        places = {
            int(i): (group, slot)
            for group, seats in enumerate(split_stacks(ids, sizes))
            for slot, i in enumerate(seats)
            if i != EMPTY
        }
        _open(int(state.round), list(places), rows)
        servers = {i: server_of(state, *place) for i, place in places.items()}
        sums: dict[int, list[Any]] = {i: [] for i in places}
        for t, (indices, mask) in enumerate(zip(*rows, strict=True)):
            for i, (group, _) in places.items():
                batch = labels[indices], mask
                sums[i].append(score_batch(i, t, servers[i], batch, group))
        mailbox.close()
        return sorted(
            result
            for i, (group, _) in places.items()
            for result in results_of(
                federation.groups[group], [i], [_stacked(sums[i])], len(labels)
            )
        )

    def _open(number: int, clients: list[int], rows: Rows) -> None:
        journal.recall(number)
        mailbox.open(
            number,
            dict.fromkeys(clients, rows.mask.sum(axis=1).tolist()),
            Layers.NONE,
            last=journal.last,
            means=journal.means,
            kind=Kind.EVALUATE,
        )

    return evaluate


def unanswered(labels: npt.NDArray[np.int32], classes: int) -> BothMetrics:
    """Return the scores of a client that does not answer: all wrong, all undecided.

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
