"""Accuracy of every client's two answers, exact, on the whole test set."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from hsee_jax.base import Array, Dataset, ExitMetrics
from hsee_jax.engine import InputPipeline
from hsee_jax.losses import masked_cross_entropy
from hsee_jax.split import forward
from hsee_jax.strategies import Federation, RunState, Strategy, take_member


class ClientResult(NamedTuple):
    """What a client's exit, and the server behind it, score on a dataset."""

    id: int
    cut: int
    exit_accuracy: float
    server_accuracy: float
    exit_loss: float  # mean cross-entropy, in nats
    server_loss: float


EvaluateFn = Callable[[RunState, Dataset], list[ClientResult]]


def means(results: Sequence[ClientResult]) -> tuple[float, float]:
    """Exit and server accuracy, the plain means over clients."""
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
) -> EvaluateFn:
    """Compiles the evaluation of all clients, once for each cut.

    Args:
      federation: who is evaluated.
      strategy: which server is behind each client.
      pipeline: how samples become batches.
      batch_size: samples in a step; the last step is padded, none is dropped.

    Returns:
      A function of a state and a dataset to one result a client, by ascending id.
    """

    @partial(jax.jit, static_argnames="group")
    def score(
        state: RunState,
        member: Array,
        data: Dataset,
        indices: Array,
        mask: Array,
        *,
        group: int,
    ) -> ExitMetrics:
        client_spec, server_spec = federation.specs(group)
        batch = pipeline.evaluation(data, indices, mask)
        client = take_member(state.clients[group], member)
        server = strategy.server_of(state, group, member)
        features, exit_logits, _ = forward(
            client_spec, client, batch.inputs, mask, train=False
        )
        _, logits, _ = forward(server_spec, server, features, mask, train=False)
        return ExitMetrics(
            masked_cross_entropy(exit_logits, batch.labels, mask)[1],
            masked_cross_entropy(logits, batch.labels, mask)[1],
        )

    def evaluate(state: RunState, data: Dataset) -> list[ClientResult]:
        count = len(data.labels)
        padded = np.arange(-(-count // batch_size) * batch_size, dtype=np.int32)
        indices = (padded % count).reshape(-1, batch_size)
        mask = (padded < count).reshape(-1, batch_size)
        results = []
        for g, group in enumerate(federation.groups):
            for m, i in enumerate(group.ids):
                sums: Any = [
                    score(state, np.int32(m), data, *rows, group=g)
                    for rows in zip(indices, mask, strict=True)
                ]
                total = jax.tree.map(
                    lambda *parts: np.sum(parts, dtype=np.float64),
                    *jax.device_get(sums),
                )
                exit, server_total = total.exit, total.server
                results.append(
                    ClientResult(
                        id=i,
                        cut=group.cut,
                        exit_accuracy=float(exit.correct / count),
                        server_accuracy=float(server_total.correct / count),
                        exit_loss=float(exit.loss_sum / count),
                        server_loss=float(server_total.loss_sum / count),
                    )
                )
        return sorted(results)

    return evaluate
