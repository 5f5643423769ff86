"""Every strategy is a point of one small space, and `compose` makes it.

A server is shared or each client has one; the server's gradient stops at the cut or
flows back over it; and some layers are averaged, now and then. `strategies.py` names
the points.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hsee_jax.aggregate import layer_mean, receive, sent
from hsee_jax.base import Array, Batch, ExitMetrics, Key, PyTree
from hsee_jax.federation import (
    Federation,
    Means,
    RunState,
    StepFn,
    Strategy,
    TurnFn,
    init_stacks,
    positions,
    split,
    take_member,
)
from hsee_jax.fields import unknown
from hsee_jax.mesh import CLIENTS, SAME, SPREAD, constrain, on_devices, over_clients
from hsee_jax.model import init_network
from hsee_jax.split import (
    Branch,
    LayerState,
    branch_step,
    detached_step,
    init_client,
    init_server,
    joint_step,
)


def compose(
    federation: Federation,
    *,
    shared: bool,
    average: str,
    boundary: str = "detached",
    exit_gradient: float = 0.0,
    turn: str = "batch",
    period: int = 1,
    period_unit: str = "rounds",
    batch_norm: str = "auto",
    optimizer_state: str = "keep",
    server_lr_scale: float = 1.0,
    init: str = "shared",
) -> Strategy:
    """A strategy from its properties.

    Args:
      federation: who trains what.
      shared: one server for all clients, or one for each.
      average: over whom the mean of a layer is: ``"none"``, ``"servers"`` that hold it,
        ``"clients"`` that hold it, or ``"all_holders"``; where clients take part, exit
        heads are averaged over each cut. A shared server is not averaged.
      boundary: ``"detached"``: no gradient crosses the cut; ``"joint"``: the server's
        flows back, see `joint_step`; ``"none"``: likewise, but the client holds the
        server's layers too, and no link lies between them.
      exit_gradient: see `joint_step`.
      turn: at a shared server, ``"batch"``: in each step it takes one batch of every
        client, in the given order; ``"epoch"``: all of a client's round, then the next
        client's.
      period: how often to average, in units of ``period_unit``; 0 is never.
      period_unit: ``"rounds"`` or ``"steps"``.
      batch_norm: see `receive`; ``"auto"`` keeps it local where only servers are
        averaged: the features that a replica sees are those of its own client.
      optimizer_state: see `receive`.
      server_lr_scale: the server's learning rate relative to the clients'.
      init: ``"shared"``: all parts are slices of one network; ``"per_client"``: each
        client's, and its server's, are drawn by themselves. A shared server is a slice
        of the one network.

    Raises:
      UserError: a name is unknown.
      ValueError: a shared server is to be averaged.
    """
    for name, value, allowed in (
        ("average", average, ("none", "servers", "clients", "all_holders")),
        ("boundary", boundary, ("detached", "joint", "none")),
        ("turn", turn, ("batch", "epoch")),
        ("period_unit", period_unit, ("rounds", "steps")),
        ("batch_norm", batch_norm, ("auto", "average", "keep_local")),
        ("optimizer_state", optimizer_state, ("keep", "average", "reset")),
        ("init", init, ("shared", "per_client")),
    ):
        if value not in allowed:
            raise unknown(name, value, allowed)
    if shared and average in ("servers", "all_holders"):
        raise ValueError(f"a shared server is not averaged, so not {average}")
    if batch_norm == "auto":
        batch_norm = "keep_local" if average == "servers" else "average"
    groups, mesh = federation.groups, federation.mesh
    depths = [group.cut - groups[0].cut for group in groups]  # server layers below

    def part_of(server: Branch, group: int) -> Branch:
        if not shared:
            return server
        return Branch(server.layers[depths[group] :], server.head)

    def put_back(server: Branch, group: int, part: Branch) -> Branch:
        if not shared:
            return part
        return Branch(server.layers[: depths[group]] + part.layers, part.head)

    step_both: Callable = detached_step
    if boundary != "detached":
        step_both = partial(joint_step, exit_gradient=exit_gradient)

    def turn_fn(
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
            part_of(server, group),
            batch,
            (learning_rate, learning_rate * server_lr_scale),
        )
        return client, put_back(server, group, part), metrics

    def init_state(key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        clients = init_stacks(init_client, federation, key, init, ids)
        if shared:
            network = init_network(federation.model, key)
            cut, optimizer = groups[0].cut, federation.optimizer
            servers: tuple[Branch, ...] = (init_server(network, cut, optimizer),)
        else:
            servers = init_stacks(init_server, federation, key, init, ids)
        return RunState(jnp.zeros((), jnp.int32), clients, servers)

    def serve(
        group: int, server: Branch, batch: Batch, learning_rate: Array
    ) -> tuple[Branch, PyTree]:
        part, _, metrics = branch_step(
            federation.specs(group)[1],
            part_of(server, group),
            batch,
            learning_rate * server_lr_scale,
        )
        return put_back(server, group, part), metrics

    step: StepFn | None = None  # else turns wait for each other
    if not shared:
        step = _in_parallel(federation, turn_fn)
    elif boundary == "detached" and turn == "batch":
        step = _clients_then_server(federation, serve)
    aggregate, receive_all, sent_by_clients = _averaging(
        federation,
        shared=shared,
        average=average,
        boundary=boundary,
        batch_norm=batch_norm,
        optimizer_state=optimizer_state,
        spread=mesh is not None and step is not None,
    )
    return Strategy(
        init=init_state,
        turn=turn_fn,
        step=step,
        aggregate=aggregate,
        receive=receive_all,
        sent=sent_by_clients,
        part=part_of,
        shared=shared,
        turn_unit=turn if shared else "batch",
        period=0 if average == "none" else period,
        period_unit=period_unit,
        boundary=boundary,
    )


def _in_parallel(federation: Federation, turn: TurnFn) -> StepFn:
    """All clients' turns at once, each with a server of its own."""

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        del order
        stepped = [
            over_clients(partial(turn, group=g), federation.mesh, (0, 0, 0, None))(
                state.clients[g], state.servers[g], batch, learning_rate
            )
            for g, batch in enumerate(batches)
        ]
        clients, servers, metrics = zip(*stepped, strict=True)
        return state.replace(clients=clients, servers=servers), metrics

    return step


def _clients_then_server(federation: Federation, serve: Callable) -> StepFn:
    """All clients at once, then the shared server, by one after another's features."""
    groups, mesh = federation.groups, federation.mesh

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        stepped = [
            over_clients(
                partial(branch_step, federation.specs(g)[0]), mesh, (0, 0, None)
            )(state.clients[g], batch, learning_rate)
            for g, batch in enumerate(batches)
        ]
        clients, features, exits = zip(*stepped, strict=True)
        # The server's devices share the rows of each batch; XLA sums over them where
        # a whole batch counts: in BatchNorm and in the gradients.
        sent = [
            constrain(batch._replace(inputs=inputs), mesh, P(None, CLIENTS))
            for batch, inputs in zip(batches, features, strict=True)
        ]

        def on_group(group: int) -> Callable:
            def turn(server: Branch, member: Array) -> tuple[Branch, PyTree]:
                return serve(
                    group, server, take_member(sent[group], member), learning_rate
                )

            return turn

        turns = [on_group(g) for g in range(len(groups))]
        sizes = [len(batch.labels) for batch in batches]
        group_of, member_of = map(jnp.asarray, positions(sizes))

        def take_turn(server: Branch, position: Array) -> tuple[Branch, PyTree]:
            return jax.lax.switch(
                group_of[position], turns, server, member_of[position]
            )

        server = constrain(state.servers[0], mesh, SAME)
        server, metrics = jax.lax.scan(take_turn, server, order)
        by_slot = jax.tree.map(
            lambda a: jnp.zeros(sum(sizes), a.dtype).at[order].set(a), metrics
        )
        served = constrain(split(by_slot, sizes), mesh, SAME)
        state = state.replace(clients=clients, servers=(server,))
        return state, tuple(map(ExitMetrics, exits, served))

    return step


def _averaging(
    federation: Federation,
    *,
    shared: bool,
    average: str,
    boundary: str,
    batch_norm: str,
    optimizer_state: str,
    spread: bool,
) -> tuple[Callable, Callable, Callable]:
    """`Strategy.aggregate`, `Strategy.receive` and `Strategy.sent`.

    Args:
      federation: who trains what.
      shared: see `compose`.
      average: see `compose`.
      boundary: see `compose`.
      batch_norm: see `receive`.
      optimizer_state: see `receive`.
      spread: whether the stacks are spread over the federation's mesh.
    """
    held = _held(federation, average)
    how: dict[str, Any] = {
        "optimizer": federation.optimizer,
        "batch_norm": batch_norm,
        "optimizer_state": optimizer_state,
    }

    def means_of(state: RunState, weights: tuple[Array, ...]) -> Means:
        layers = _layers_of(state)
        return {
            name: layer_mean(
                [layers[part, g][i] for part, g, i in places],
                [weights[g] for _, g, _ in places],
                round=state.round + 1,
                optimizer_state=optimizer_state,
                axis_name=CLIENTS if spread else None,
            )
            for name, places in held.items()
        }

    def receive_all(
        state: RunState, means: Means, since: tuple[Array, ...]
    ) -> RunState:
        layers = _layers_of(state)
        take: Callable = partial(receive, **how)
        for name, places in held.items():
            for part, g, i in places:
                layers[part, g][i] = jax.vmap(take, (0, None, 0))(
                    layers[part, g][i], means[name], since[g]
                )
        return _with_layers(state, layers)

    def aggregate(
        state: RunState, weights: tuple[Array, ...]
    ) -> tuple[RunState, Means]:
        def on_device(
            state: RunState, weights: tuple[Array, ...]
        ) -> tuple[RunState, Means]:
            means = means_of(state, weights)
            since = tuple(jnp.broadcast_to(state.round, w.shape) for w in weights)
            return receive_all(state, means, since), means

        if not held:
            return state, {}
        servers = SAME if shared else SPREAD
        specs = RunState(SAME, SPREAD, servers)  # type: ignore[arg-type]
        mesh = federation.mesh if spread else None
        return on_devices(on_device, mesh, (specs, SPREAD), (specs, SAME))(
            state, weights
        )

    def sent_by_clients(state: RunState) -> tuple[PyTree, ...]:
        layers = _layers_of(state)
        theirs = ("client", "server") if boundary == "none" else ("client",)
        return tuple(
            [
                sent(layers[part, g][i], **how)
                for part, g, i in chain(*held.values())
                if part in theirs and g == group
            ]
            for group in range(len(federation.groups))
        )

    return aggregate, receive_all, sent_by_clients


Place = tuple[str, int, int]  # "client" or "server", group, layer of the branch


def _held(federation: Federation, average: str) -> dict[str, list[Place]]:
    """Where each layer that is averaged is held; a branch's head is its layer -1."""
    held: dict[str, list[Place]] = {}
    for g, group in enumerate(federation.groups):
        if average in ("servers", "all_holders"):
            for i in range(group.cut, len(federation.model.stages)):
                held.setdefault(f"layer {i}", []).append(("server", g, i - group.cut))
            held.setdefault("final head", []).append(("server", g, -1))
        if average in ("clients", "all_holders"):
            for i in range(group.cut):
                held.setdefault(f"layer {i}", []).append(("client", g, i))
            held[f"exit head {group.cut}"] = [("client", g, -1)]
    return held


def _layers_of(state: RunState) -> dict[tuple[str, int], list[LayerState]]:
    parts = {"client": state.clients, "server": state.servers}
    return {
        (part, g): [*branch.layers, branch.head]
        for part, branches in parts.items()
        for g, branch in enumerate(branches)
    }


def _with_layers(
    state: RunState, layers: dict[tuple[str, int], list[LayerState]]
) -> RunState:
    """The inverse of `_layers_of`."""

    def branches(part: str, count: int) -> tuple[Branch, ...]:
        rows = [layers[part, g] for g in range(count)]
        return tuple(Branch(tuple(row[:-1]), row[-1]) for row in rows)

    return state.replace(
        clients=branches("client", len(state.clients)),
        servers=branches("server", len(state.servers)),
    )
