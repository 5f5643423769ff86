"""Scores of the clients of a group; clients that are alike are scored once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.core.reuse import reused
from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Array, Batch, Dataset, Metrics, PyTree
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.agreement import count_agreement
from hsee_jax.engine.likeness import (
    Reference,
    References,
    alike,
    map_unlike,
    weights_of,
)
from hsee_jax.engine.programs import take
from hsee_jax.engine.round import Programs
from hsee_jax.federation.branch import (
    Branch,
    BranchSpec,
    forward,
    forward_exits,
    parts_of,
    variables_of,
    with_parts,
)
from hsee_jax.federation.crossing import decode, encode_for_evaluation
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy
from hsee_jax.link.codecs import Message
from hsee_jax.nn.gates import flops_share, widths_of
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.parallel.mesh import SAME, SPREAD, on_devices, to_devices, to_host


class GatedMetrics(NamedTuple):
    """The sums over a client's two answers at its gated width."""

    exit: Metrics
    server: Metrics
    flops_share: Array  # float32 []: `hsee_jax.nn.flops_share`, times the samples


class BothMetrics(NamedTuple):
    """The sums over a client's two answers."""

    exit: Metrics
    server: Metrics
    agreement: Array  # int32 [4, K], see `count_agreement`
    early: tuple[Metrics, ...] = ()  # of a client's exits before the last
    gated: GatedMetrics | None = None  # None where layers have no gates


class Answers(NamedTuple):
    """What a client makes of a batch without training."""

    message: Message  # the encoded features, [B, ...]
    logits: Array  # of the last exit, float32 [B, K]
    early: tuple[Array, ...] = ()  # of the exits before it


class ScoreFn(Protocol):
    """Scores one client on one batch."""

    def __call__(
        self,
        pair: tuple[Branch, Branch],
        data: Dataset,
        who: Array,
        indices: Array,
        mask: Array,
        *,
        group: int,
    ) -> BothMetrics:
        """Return the sums over the samples at ``int32 [B]`` with a true mask.

        ``pair`` is the client and the server behind it, ``who`` the client's id.
        """


class Rows(NamedTuple):
    """The samples of T batches."""

    indices: Any  # int32 [T, B]
    mask: Any  # bool [T, B], false on padding


class Task(NamedTuple):
    """The clients of one group, and the batches on which they are scored."""

    group: int
    state: RunState
    taken: npt.NDArray[np.bool_]  # [S], false for empty slots
    views: npt.NDArray[np.int32]  # [S], the clients' ids; 0 where all see the same
    data: Dataset
    rows: Rows
    references: References

    def stacks(self, strategy: Strategy) -> tuple[Branch, ...]:
        """Return the clients, and the servers if each client has its own.

        No score reads the states of optimizers, so they are not there.
        """
        own = [self.state.clients[self.group]]
        if not strategy.shared:
            own.append(self.state.servers[self.group])
        return tuple(map(_without_optimizer, own))


def _without_optimizer(branch: Branch) -> Branch:
    parts = tuple(part.replace(opt_state=()) for part in parts_of(branch))
    return with_parts(branch, parts)


# Return host sums [T, ...] over the batches for each slot; anything for empty slots.
ScoresFn = Callable[[Task], list[BothMetrics | None]]


@reused
def make_score(federation: Federation, pipeline: InputPipeline) -> ScoreFn:
    """Make the scores of both answers of a pair, and of those at the gated width."""
    narrower = [federation._replace(model=m) for m in widths_of(federation.model)[1:]]

    def score(
        pair: tuple[Branch, Branch],
        data: Dataset,
        who: Array,
        indices: Array,
        mask: Array,
        *,
        group: int,
    ) -> BothMetrics:
        client, server = pair
        client_spec, server_spec = federation.specs(group)
        batch = pipeline.evaluation(data, indices, mask, who)
        answers = client_answers(client_spec, client, batch.inputs, mask)
        scores = score_answers(server_spec, server, answers, batch.labels, mask)
        if not narrower:
            return scores
        spec, _ = narrower[0].specs(group)
        answers = client_answers(spec, client, batch.inputs, mask)
        gated = score_answers(server_spec, server, answers, batch.labels, mask)
        share = _flops_share(client_spec, client, batch)
        return scores._replace(gated=GatedMetrics(gated.exit, gated.server, share))

    return score


def _flops_share(spec: BranchSpec, client: Branch, batch: Batch) -> Array:
    """Return the share of FLOPs, as a sum over the real rows."""
    one = jax.ShapeDtypeStruct((1, *batch.inputs.shape[1:]), batch.inputs.dtype)
    share = flops_share(spec.stages, list(map(variables_of, client.layers)), one)
    return share * jnp.sum(batch.mask, dtype=jnp.float32)


def client_answers(
    spec: BranchSpec, client: Branch, inputs: Array, mask: Array
) -> Answers:
    """Return what a client makes of inputs ``[B, ...]``.

    Args:
      spec: what the client computes.
      client: its state.
      inputs: samples after `normalize`.
      mask: ``bool [B]``, false on padding.
    """
    features, logits, _ = forward_exits(spec, client, inputs, mask, train=False)
    message = encode_for_evaluation(spec, client, features, mask)
    return Answers(message, logits[-1], logits[:-1])


def score_answers(
    spec: BranchSpec, server: Branch, answers: Answers, labels: Array, mask: Array
) -> BothMetrics:
    """Return the scores of a client's answers, and of its server's.

    Args:
      spec: what the server computes.
      server: the layers behind the client.
      answers: of the client.
      labels: ``int32 [B]``.
      mask: ``bool [B]``, false on padding.
    """
    decoded = decode(spec, answers.message)
    _, logits, _ = forward(spec, server, decoded, mask, train=False)
    return score_logits(answers, logits, labels, mask)


def score_logits(
    answers: Answers, logits: Array, labels: Array, mask: Array
) -> BothMetrics:
    """Return the scores of a client's answers and of a server's logits ``[B, K]``."""
    early = tuple(masked_cross_entropy(own, labels, mask)[1] for own in answers.early)
    return BothMetrics(
        masked_cross_entropy(answers.logits, labels, mask)[1],
        masked_cross_entropy(logits, labels, mask)[1],
        count_agreement(answers.logits, logits, labels, mask),
        early,
    )


def make_loop(
    score: ScoreFn, federation: Federation, strategy: Strategy, programs: Programs
) -> ScoresFn:
    """Call one program for every client and batch, from Python.

    Args:
      score: see `make_score`.
      federation: the clients.
      strategy: the algorithm.
      programs: by cut, to use and to add to.
    """
    compiled = jax.jit(score, static_argnames="group")

    def client(task: Task, slot: int) -> BothMetrics:
        own = take(task.stacks(strategy), slot)
        who = task.views[slot]
        weights = (jax.device_get(weights_of(federation.codec, own)), who)
        known = task.references.get(task.group)
        if known is not None and alike(weights, known.weights):
            return known.scores
        pair = _pair(strategy, own, task.state.servers, task.group)
        cut = federation.groups[task.group].cut
        scored = programs.setdefault(cut, partial(compiled, group=task.group))
        sums = [scored(pair, task.data, who, *r) for r in zip(*task.rows, strict=True)]
        scores = jax.tree.map(lambda *parts: np.stack(parts), *jax.device_get(sums))
        task.references.setdefault(task.group, Reference(weights, scores))
        return scores

    def loop(task: Task) -> list[BothMetrics | None]:
        return [client(task, slot) if t else None for slot, t in enumerate(task.taken)]

    return loop


@reused
def make_map(score: ScoreFn, federation: Federation, strategy: Strategy) -> ScoresFn:
    """Compile a program for each group in which each device maps over its clients.

    A device scores the first of its clients, and those that are not like it.
    """
    mesh = federation.mesh

    def on_device(
        group: int,
        stacks: tuple[Branch, ...],
        shared: tuple[Branch, ...],
        data: Dataset,
        rows: Rows,
        slots: tuple[Array, Array],
    ) -> BothMetrics:
        taken, views = slots

        def client(member: tuple[tuple[Branch, ...], Array]) -> BothMetrics:
            own, who = member
            pair = _pair(strategy, own, shared, group)
            return jax.lax.map(
                lambda row: score(pair, data, who, *row, group=group), rows
            )

        weights = jax.vmap(partial(weights_of, federation.codec))(stacks)
        return map_unlike(client, (stacks, views), (weights, views), taken)

    @partial(jax.jit, static_argnames="group")
    def clients_map(*given: PyTree, group: int) -> BothMetrics:
        specs = (SPREAD, SAME, SAME, SAME, SPREAD)
        return on_devices(partial(on_device, group), mesh, specs, SPREAD)(*given)

    def clients(task: Task) -> list[BothMetrics | None]:
        shared = task.state.servers if strategy.shared else ()
        given = task.rows, (task.taken, task.views)
        rows, slots = to_devices(given, mesh, (SAME, SPREAD))
        sums = to_host(
            clients_map(
                task.stacks(strategy), shared, task.data, rows, slots, group=task.group
            )
        )
        return [row_of(sums, slot) for slot in range(len(task.taken))]

    return clients


def _pair(
    strategy: Strategy,
    own: tuple[Branch, ...],
    servers: tuple[Branch, ...],
    group: int,
) -> tuple[Branch, Branch]:
    """Return a client and the server behind it, from a member of `Task.stacks`."""
    client, *rest = own
    return client, rest[0] if rest else strategy.part(servers[0], group)
