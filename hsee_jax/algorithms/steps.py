"""One step of a federation: in turns, all at once, or clients, then the server."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hsee_jax.algorithms.properties import Properties
from hsee_jax.core.types import Array, Batch, ExitMetrics, Metrics, PyTree
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.crossing import decode, encode, message_bytes
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.fused import (
    TrainFn,
    detached_step,
    joint_step,
    train_on_labels,
)
from hsee_jax.federation.members import over_members
from hsee_jax.federation.state import RunState, positions, split_stacks, take_member
from hsee_jax.federation.step import server_step
from hsee_jax.federation.strategy import StepFn, TurnFn
from hsee_jax.federation.unlabelled import unlabelled_step
from hsee_jax.parallel.mesh import CLIENTS, SAME, constrain


class Rates(NamedTuple):
    """The learning rates of a client and of its server."""

    server_scale: float

    def of(self, learning_rate: Array) -> tuple[Array, Array]:
        """Return the rate of the client and of the server."""
        return learning_rate, learning_rate * self.server_scale


class ServerParts(NamedTuple):
    """How a group's layers are taken from a server, and put back."""

    take: Callable[[Branch, int], Branch]  # server, group -> its part
    put: Callable[[Branch, int, Branch], Branch]  # server, group, part -> server


def server_parts(federation: Federation, *, shared: bool) -> ServerParts:
    """Make the functions that slice a shared server at each group's cut.

    Without a shared server, the part of a group is the whole of its server.
    """
    if not shared:
        return ServerParts(
            lambda server, group: server, lambda server, group, part: part
        )
    first = federation.groups[0].cut
    depths = [group.cut - first for group in federation.groups]

    def take(server: Branch, group: int) -> Branch:
        return Branch(server.layers[depths[group] :], server.head)

    def put(server: Branch, group: int, part: Branch) -> Branch:
        return Branch(server.layers[: depths[group]] + part.layers, part.head)

    return ServerParts(take, put)


def train_fn(properties: Properties) -> TrainFn:
    """Return the step of a client that does not wait for the server."""
    if properties.copies == 1:
        return train_on_labels
    return partial(unlabelled_step, width_target=properties.width_target)


def make_turn(
    federation: Federation, parts: ServerParts, properties: Properties
) -> TurnFn:
    """Make the turn of one client and its server."""
    boundary, rates = properties.boundary, Rates(properties.server_lr_scale)
    if boundary == "detached":
        step_both: Callable = partial(detached_step, train=train_fn(properties))
    else:
        step_both = partial(joint_step, exit_gradient=properties.exit_gradient)
    step_both = partial(step_both, distill=properties.distill)

    def turn(
        client: Branch,
        server: Branch,
        batch: Batch,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        client, part, metrics = step_both(
            *federation.specs(group),
            client,
            parts.take(server, group),
            batch,
            rates.of(learning_rate),
        )
        if boundary == "none":
            metrics = metrics._replace(link=jnp.zeros_like(metrics.link))
        return client, parts.put(server, group, part), metrics

    return turn


def in_parallel(federation: Federation, turn: TurnFn) -> StepFn:
    """Step all clients at once, each with a server of its own."""

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        del order
        results = [
            over_members(
                federation,
                partial(turn, group=g),
                (0, 0, 0, None),
                states=2,
                skip=True,
            )(state.clients[g], state.servers[g], batch, learning_rate)
            for g, batch in enumerate(batches)
        ]
        clients, servers, metrics = zip(*results, strict=True)
        return state.replace(clients=clients, servers=servers), metrics

    return step


# The server, one message a group, the order of turns, and the rates of client and
# server -> the server, and the metrics of each group.
ServeFn = Callable[
    [Branch, tuple[Batch, ...], Array, tuple[Array, Array]],
    tuple[Branch, tuple[Metrics, ...]],
]


def clients_then_server(
    federation: Federation,
    rates: Rates,
    serve: ServeFn,
    train: TrainFn = train_on_labels,
) -> StepFn:
    """Step all clients at once, then the shared server on what they send."""
    mesh = federation.mesh

    def step_client(
        group: int, client: Branch, batch: Batch, learning_rate: Array
    ) -> tuple[Branch, Batch, Metrics, Array]:
        spec = federation.specs(group)[0]
        client, rows, metrics = train(spec, client, batch, rates.of(learning_rate)[0])
        message, client = encode(spec, client, rows.inputs, rows.mask)
        link = message_bytes(spec, message, rows.mask)
        return client, rows._replace(inputs=message), metrics, link

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        results = [
            over_members(
                federation, partial(step_client, g), (0, 0, None), states=1, skip=True
            )(state.clients[g], batch, learning_rate)
            for g, batch in enumerate(batches)
        ]
        clients, messages, exits, links = zip(*results, strict=True)
        # The server's devices share the rows of each batch; XLA sums over them where
        # a whole batch counts: in BatchNorm and in the gradients.
        messages = tuple(constrain(m, mesh, P(None, CLIENTS)) for m in messages)
        server, served = serve(
            state.servers[0], messages, order, rates.of(learning_rate)
        )
        state = state.replace(clients=clients, servers=(server,))
        return state, tuple(map(ExitMetrics, exits, served, links))

    return step


def serve_in_turn(
    federation: Federation,
    parts: ServerParts,
    server: Branch,
    messages: tuple[Batch, ...],
    order: Array,
    rates: tuple[Array, Array],
) -> tuple[Branch, tuple[Metrics, ...]]:
    """Step the shared server on the messages of a step, in order.

    Args:
      federation: who trains what.
      parts: of the server.
      server: the shared server.
      messages: a batch for each group, inputs encoded, leaves ``[S, B, ...]``.
      order: ``int32 [A]``, positions in the concatenation of all stacks.
      rates: of client and server.

    Returns:
      The server, and the metrics of each group, leaves ``[S]``.
    """

    def on_group(group: int) -> Callable:
        spec = federation.specs(group)[1]

        def turn(server: Branch, member: Array) -> tuple[Branch, PyTree]:
            batch = take_member(messages[group], member)
            batch = batch._replace(inputs=decode(spec, batch.inputs))
            result = server_step(spec, parts.take(server, group), batch, rates[1])
            return parts.put(server, group, result.server), result.metrics

        return turn

    turns = [on_group(group) for group in range(len(messages))]
    sizes = [len(batch.labels) for batch in messages]
    group_of, member_of = map(jnp.asarray, positions(sizes))

    def take_turn(server: Branch, position: Array) -> tuple[Branch, PyTree]:
        return jax.lax.switch(group_of[position], turns, server, member_of[position])

    mesh = federation.mesh
    server, metrics = jax.lax.scan(take_turn, constrain(server, mesh, SAME), order)
    by_slot = jax.tree.map(
        lambda a: jnp.zeros(sum(sizes), a.dtype).at[order].set(a), metrics
    )
    return server, constrain(split_stacks(by_slot, sizes), mesh, SAME)
