"""The exact accuracy of every client's two answers on a whole dataset.

An answer with a logit that is not finite counts as wrong.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from hsee_jax.core.types import Array, Dataset, Metrics
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.agreement import Agreement, count_agreement
from hsee_jax.engine.plan import EMPTY
from hsee_jax.engine.round import Programs, client_axis, layout
from hsee_jax.federation.branch import Branch, decode, encode, forward
from hsee_jax.federation.federation import Federation, Group
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy, server_of
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.parallel.mesh import SAME, SPREAD, on_devices, to_devices, to_host


class ClientResult(NamedTuple):
    """The scores of a client's exit and of the server behind it on a dataset."""

    id: int
    cut: int
    exit_accuracy: float
    server_accuracy: float
    exit_loss: float  # mean cross-entropy, in nats
    server_loss: float
    agreement: Agreement | None = None  # None where a file does not hold them


class BothMetrics(NamedTuple):
    """The sums over a client's two answers."""

    exit: Metrics
    server: Metrics
    agreement: Array  # int32 [4, K], see `count_agreement`


class EvaluateFn(Protocol):
    """A compiled evaluation."""

    def __call__(
        self,
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
    ) -> list[ClientResult]:
        """Evaluate the clients in a state's slots.

        Args:
          state: the state of these clients.
          data: the samples, the same on every device.
          ids: ``int32 [N]``, the id of the client in each slot, or `EMPTY`. With None
            each stack holds the members of its group, followed by empty slots.

        Returns:
          One result for each client, by ascending id.
        """


class _ScoreFn(Protocol):
    """Scores one client on one batch."""

    def __call__(
        self,
        client: Branch,
        server: Branch,
        data: Dataset,
        indices: Array,
        mask: Array,
        *,
        group: int,
    ) -> BothMetrics:
        """Return the sums over the samples at ``int32 [B]`` with a true mask."""


class _Rows(NamedTuple):
    """The samples of T batches."""

    indices: Any  # int32 [T, B]
    mask: Any  # bool [T, B], false on padding


class _ScoresFn(Protocol):
    """Scores the clients of one group on every batch."""

    def __call__(
        self, state: RunState, data: Dataset, rows: _Rows, *, group: int
    ) -> BothMetrics:
        """Return sums ``[S, T, ...]`` for each slot and batch."""


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
      axis: ``"loop"``, ``"vmap"`` (a program in which each device evaluates its clients
        one after another) or ``"auto"``.
      programs: compiled functions of other evaluations with the same network and
        arguments, to use and to add to; only ``loop`` does.
    """
    score = _make_score(federation, pipeline)
    if client_axis(axis) == "loop":
        cuts = [group.cut for group in federation.groups]
        scores_of = _make_loop(
            score, strategy, cuts, {} if programs is None else programs
        )
    else:
        scores_of = _make_map(score, strategy, federation.mesh)

    def evaluate(
        state: RunState,
        data: Dataset,
        ids: npt.NDArray[np.int32] | None = None,
    ) -> list[ClientResult]:
        count = len(data.labels)
        rows = to_devices(_all_rows(count, batch_size), federation.mesh, SAME)
        results: list[ClientResult] = []
        first = 0
        for g, group in enumerate(federation.groups):
            scores = to_host(scores_of(state, data, rows, group=g))
            slots = len(scores.exit.count)
            seats = group.ids if ids is None else ids[first : first + slots].tolist()
            first += slots
            results += _results(group, seats, scores, count)
        return sorted(results)

    return evaluate


def _make_score(federation: Federation, pipeline: InputPipeline) -> _ScoreFn:
    def score(
        client: Branch,
        server: Branch,
        data: Dataset,
        indices: Array,
        mask: Array,
        *,
        group: int,
    ) -> BothMetrics:
        client_spec, server_spec = federation.specs(group)
        batch = pipeline.evaluation(data, indices, mask)
        features, exit_logits, _ = forward(
            client_spec, client, batch.inputs, mask, train=False
        )
        message, _ = encode(client_spec, client, features, mask)
        decoded = decode(server_spec, message)
        _, logits, _ = forward(server_spec, server, decoded, mask, train=False)
        return BothMetrics(
            masked_cross_entropy(exit_logits, batch.labels, mask)[1],
            masked_cross_entropy(logits, batch.labels, mask)[1],
            count_agreement(exit_logits, logits, batch.labels, mask),
        )

    return score


def _make_loop(
    score: _ScoreFn, strategy: Strategy, cuts: Sequence[int], programs: Programs
) -> _ScoresFn:
    """Call one program for every client and batch, from Python."""

    def loop(state: RunState, data: Dataset, rows: _Rows, *, group: int) -> BothMetrics:
        if cuts[group] not in programs:
            programs[cuts[group]] = jax.jit(partial(score, group=group))
        score_one = programs[cuts[group]]

        def client(member: int) -> BothMetrics:
            own = jax.tree.map(lambda leaf: leaf[member], state.clients[group])
            server = server_of(strategy, state, group, member)
            batches = zip(*rows, strict=True)
            sums = [score_one(own, server, data, *row) for row in batches]
            return jax.tree.map(lambda *parts: np.stack(parts), *jax.device_get(sums))

        slots = len(jax.tree.leaves(state.clients[group])[0])
        return jax.tree.map(lambda *sums: np.stack(sums), *map(client, range(slots)))

    return loop


def _make_map(score: _ScoreFn, strategy: Strategy, mesh: Mesh | None) -> _ScoresFn:
    """Compile a program for each group in which each device maps over its clients."""

    @partial(jax.jit, static_argnames="group")
    def clients_map(
        state: RunState, data: Dataset, rows: _Rows, *, group: int
    ) -> BothMetrics:
        servers = state.servers[0 if strategy.shared else group]

        def on_device(
            clients: Branch, servers: Branch, data: Dataset, rows: _Rows
        ) -> BothMetrics:
            def client(pair: tuple[Branch, Branch | None]) -> BothMetrics:
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

    return clients_map


def _all_rows(count: int, batch_size: int) -> _Rows:
    """Return every sample once; pad the last batch with the first samples."""
    numbers = np.arange(-(-count // batch_size) * batch_size, dtype=np.int32)
    return _Rows(
        (numbers % count).reshape(-1, batch_size),
        (numbers < count).reshape(-1, batch_size),
    )


def _results(
    group: Group, seats: Sequence[int], scores: BothMetrics, count: int
) -> Iterator[ClientResult]:
    """Make the results of a group from the sums ``[S, T, ...]`` over its batches.

    Args:
      group: the group.
      seats: the id of the client in each slot, or `EMPTY`; empty slots at the end may
        be left out.
      scores: the sums of each slot in each batch.
      count: the number of samples.
    """
    total = jax.tree.map(lambda a: np.sum(a, axis=1, dtype=np.float64), scores)
    for slot, i in enumerate(seats):
        if i != EMPTY:
            yield ClientResult(
                id=i,
                cut=group.cut,
                exit_accuracy=float(total.exit.correct[slot] / count),
                server_accuracy=float(total.server.correct[slot] / count),
                exit_loss=float(total.exit.loss_sum[slot] / count),
                server_loss=float(total.server.loss_sum[slot] / count),
                agreement=Agreement.of(total.agreement[slot].astype(np.int64)),
            )
