"""Accuracy of every client's two answers, exact, on the whole test set."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.core.types import Array, Dataset, ExitMetrics
from hsee_jax.engine import client_axis, layout
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy, server_of
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.parallel.mesh import SAME, SPREAD, fetch, on_devices, place
from hsee_jax.engine.plan import EMPTY
from hsee_jax.federation.branch import Branch, forward


class ClientResult(NamedTuple):
    """What a client's exit, and the server behind it, score on a dataset."""

    id: int
    cut: int
    exit_accuracy: float
    server_accuracy: float
    exit_loss: float  # mean cross-entropy, in nats
    server_loss: float


class EvaluateFn(Protocol):
    """A compiled evaluation."""

    def __call__(
        self,
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
    ) -> list[ClientResult]:
        """Evaluates the clients in a state's slots.

        Args:
          state: theirs.
          data: on the device, the same on all.
          ids: ``int32 [N]``, of the client in each slot, or `EMPTY`; None: the stacks
            hold the members of each group, and then empty slots.

        Returns:
          One result a client, by ascending id.
        """


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
    axis: str = "auto",
) -> EvaluateFn:
    """Compiles the evaluation of all clients, once for each cut.

    Args:
      federation: who is evaluated.
      strategy: which server is behind each client.
      pipeline: how samples become batches.
      batch_size: samples in a step; the last step is padded, none is dropped.
      axis: ``"loop"``, ``"vmap"`` (one client after another on each device, in one
        program) or ``"auto"``.
    """
    mesh = federation.mesh

    def score(
        client: Branch,
        server: Branch,
        data: Dataset,
        indices: Array,
        mask: Array,
        *,
        group: int,
    ) -> ExitMetrics:
        client_spec, server_spec = federation.specs(group)
        batch = pipeline.evaluation(data, indices, mask)
        features, exit_logits, _ = forward(
            client_spec, client, batch.inputs, mask, train=False
        )
        _, logits, _ = forward(server_spec, server, features, mask, train=False)
        return ExitMetrics(
            masked_cross_entropy(exit_logits, batch.labels, mask)[1],
            masked_cross_entropy(logits, batch.labels, mask)[1],
        )

    score_one = jax.jit(score, static_argnames="group")

    def looped(state: RunState, data: Dataset, rows: Any, group: int) -> ExitMetrics:
        def client(member: int) -> ExitMetrics:
            own = jax.tree.map(lambda leaf: leaf[member], state.clients[group])
            server = server_of(strategy, state, group, member)
            steps = zip(*rows, strict=True)
            sums = [score_one(own, server, data, *row, group=group) for row in steps]
            return jax.tree.map(lambda *parts: np.stack(parts), *jax.device_get(sums))

        slots = len(jax.tree.leaves(state.clients[group])[0])
        return jax.tree.map(lambda *sums: np.stack(sums), *map(client, range(slots)))

    @partial(jax.jit, static_argnames="group")
    def mapped(state: RunState, data: Dataset, rows: Any, group: int) -> ExitMetrics:
        servers = state.servers[0 if strategy.shared else group]

        def on_device(
            clients: Branch, servers: Branch, data: Dataset, rows: Any
        ) -> ExitMetrics:
            def client(pair: tuple[Branch, Branch | None]) -> ExitMetrics:
                own, server = pair
                if server is None:
                    server = strategy.part(servers, group)
                return jax.lax.map(
                    lambda row: score(own, server, data, *row, group=group), rows
                )

            return jax.lax.map(client, (clients, None if strategy.shared else servers))

        specs = (SPREAD, layout(strategy).servers, SAME, SAME)
        return on_devices(on_device, mesh, specs, SPREAD)(
            state.clients[group], servers, data, rows
        )

    totals_of = looped if client_axis(axis) == "loop" else mapped

    def evaluate(
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
    ) -> list[ClientResult]:
        count = len(data.labels)
        padded = np.arange(-(-count // batch_size) * batch_size, dtype=np.int32)
        indices = (padded % count).reshape(-1, batch_size)
        mask = (padded < count).reshape(-1, batch_size)
        rows = place((indices, mask), mesh, SAME)
        results, first = [], 0
        for g, group in enumerate(federation.groups):
            sums = fetch(totals_of(state, data, rows, group=g))
            total = jax.tree.map(lambda a: np.sum(a, axis=1, dtype=np.float64), sums)
            slots = len(total.exit.count)
            seated = group.ids if ids is None else ids[first : first + slots].tolist()
            first += slots
            for slot, i in enumerate(seated):
                if i == EMPTY:
                    continue
                results.append(
                    ClientResult(
                        id=i,
                        cut=group.cut,
                        exit_accuracy=float(total.exit.correct[slot] / count),
                        server_accuracy=float(total.server.correct[slot] / count),
                        exit_loss=float(total.exit.loss_sum[slot] / count),
                        server_loss=float(total.server.loss_sum[slot] / count),
                    )
                )
        return sorted(results)

    return evaluate
