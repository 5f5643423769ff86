"""The two strategies of Hetero-SplitEE (Oda et al., arXiv:2512.09313).

*Sequential*: one server network, updated by one client after another. *Averaging*: a
server network for each client, trained in parallel and averaged layer by layer. Both
are a `Strategy`: pure functions over a `RunState`, in which the clients of one cut are
stacked. Choices that the paper leaves open are options, documented in `StrategyConfig`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hsee_jax.aggregate import layer_mean, receive
from hsee_jax.base import Array, Batch, ExitMetrics, Key, PyTree
from hsee_jax.federation import (
    Federation,
    Means,
    RunState,
    Strategy,
    init_stacks,
    positions,
    split,
    take_member,
)
from hsee_jax.mesh import CLIENTS, SAME, SPREAD, constrain, on_devices, over_clients
from hsee_jax.model import init_network
from hsee_jax.split import (
    Branch,
    LayerState,
    branch_step,
    detached_step,
    init_client,
    init_server,
)


def sequential(
    federation: Federation,
    *,
    turn: str = "batch",
    server_lr_scale: float = 1.0,
    init: str = "shared",
) -> Strategy:
    """One server for all clients, updated by one after another.

    Args:
      federation: who trains what.
      turn: ``"batch"``: in each step the server takes one batch of every client, in
        the given order; ``"epoch"``: all of a client's round, then the next client's.
      server_lr_scale: the server's learning rate relative to the clients'.
      init: ``"shared"``: all client parts are slices of one network; ``"per_client"``:
        each client's is drawn by itself. The server is a slice of the one network.
    """
    groups, mesh = federation.groups, federation.mesh
    depths = [group.cut - groups[0].cut for group in groups]  # server layers below

    def part_of(server: Branch, group: int) -> Branch:
        return Branch(server.layers[depths[group] :], server.head)

    def put_back(server: Branch, group: int, part: Branch) -> Branch:
        return Branch(server.layers[: depths[group]] + part.layers, part.head)

    def turn_fn(
        client: Branch,
        server: Branch,
        batch: Batch,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        client, part, metrics = detached_step(
            *federation.specs(group),
            client,
            part_of(server, group),
            batch,
            (learning_rate, learning_rate * server_lr_scale),
        )
        return client, put_back(server, group, part), metrics

    def init_state(key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        server = init_server(
            init_network(federation.model, key), groups[0].cut, federation.optimizer
        )
        clients = init_stacks(init_client, federation, key, init, ids)
        return RunState(_zero(), clients, (server,))

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

        def serve(group: int) -> Callable:
            def on_features(server: Branch, member: Array) -> tuple[Branch, PyTree]:
                part, _, metrics = branch_step(
                    federation.specs(group)[1],
                    part_of(server, group),
                    take_member(sent[group], member),
                    learning_rate * server_lr_scale,
                )
                return put_back(server, group, part), metrics

            return on_features

        branches = [serve(g) for g in range(len(groups))]
        sizes = [len(batch.labels) for batch in batches]
        group_of, member_of = map(jnp.asarray, positions(sizes))

        def take_turn(server: Branch, position: Array) -> tuple[Branch, PyTree]:
            return jax.lax.switch(
                group_of[position], branches, server, member_of[position]
            )

        server = constrain(state.servers[0], mesh, SAME)
        server, turns = jax.lax.scan(take_turn, server, order)
        served = split(
            jax.tree.map(
                lambda a: jnp.zeros(sum(sizes), a.dtype).at[order].set(a), turns
            ),
            sizes,
        )
        state = state.replace(clients=clients, servers=(server,))
        return state, tuple(map(ExitMetrics, exits, served))

    return Strategy(
        init=init_state,
        turn=turn_fn,
        step=step if turn == "batch" else None,
        aggregate=lambda state, weights: (state, {}),
        receive=lambda state, means, since: state,
        part=part_of,
        shared=True,
        turn_unit=turn,
        period=0,
        period_unit="rounds",
    )


def averaging(
    federation: Federation,
    *,
    period: int = 1,
    period_unit: str = "rounds",
    average: str = "servers",
    batch_norm: str = "average",
    optimizer_state: str = "keep",
    server_lr_scale: float = 1.0,
    init: str = "shared",
) -> Strategy:
    """A server for each client; layers are averaged over their holders.

    Args:
      federation: who trains what.
      period: how often, in units of ``period_unit``; 0 is never.
      period_unit: ``"rounds"`` or ``"steps"``.
      average: ``"servers"``: layer l over the servers with cut < l; ``"all_holders"``:
        over every client and server that holds it, and exit heads over each cut.
      batch_norm: see `average_layer`.
      optimizer_state: see `average_layer`.
      server_lr_scale: the server's learning rate relative to the clients'.
      init: ``"shared"``: all parts are slices of one network; ``"per_client"``: each
        client's and its server's are drawn by themselves.
    """
    mesh = federation.mesh
    held = _held(federation, average)

    def turn_fn(
        client: Branch,
        server: Branch,
        batch: Batch,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        rates = (learning_rate, learning_rate * server_lr_scale)
        return detached_step(*federation.specs(group), client, server, batch, rates)

    def init_state(key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        clients = init_stacks(init_client, federation, key, init, ids)
        servers = init_stacks(init_server, federation, key, init, ids)
        return RunState(_zero(), clients, servers)

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        del order
        stepped = [
            over_clients(partial(turn_fn, group=g), mesh, (0, 0, 0, None))(
                state.clients[g], state.servers[g], batch, learning_rate
            )
            for g, batch in enumerate(batches)
        ]
        clients, servers, metrics = zip(*stepped, strict=True)
        return state.replace(clients=clients, servers=servers), metrics

    def means_of(state: RunState, weights: tuple[Array, ...]) -> Means:
        layers = _layers_of(state)
        return {
            name: layer_mean(
                [layers[part, g][i] for part, g, i in places],
                [weights[g] for _, g, _ in places],
                round=state.round + 1,
                optimizer_state=optimizer_state,
                axis_name=None if mesh is None else CLIENTS,
            )
            for name, places in held.items()
        }

    def receive_all(
        state: RunState, means: Means, since: tuple[Array, ...]
    ) -> RunState:
        layers = _layers_of(state)
        take = partial(
            receive,
            optimizer=federation.optimizer,
            batch_norm=batch_norm,
            optimizer_state=optimizer_state,
        )
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

        spread = RunState(SAME, SPREAD, SPREAD)  # type: ignore[arg-type]
        return on_devices(on_device, mesh, (spread, SPREAD), (spread, SAME))(
            state, weights
        )

    return Strategy(
        init=init_state,
        turn=turn_fn,
        step=step,
        aggregate=aggregate,
        receive=receive_all,
        part=lambda server, group: server,
        shared=False,
        turn_unit="batch",
        period=period,
        period_unit=period_unit,
    )


Place = tuple[str, int, int]  # "client" or "server", group, layer of the branch


def _held(federation: Federation, average: str) -> dict[str, list[Place]]:
    """Where each layer that is averaged is held; a branch's head is its layer -1."""
    held: dict[str, list[Place]] = {}
    for g, group in enumerate(federation.groups):
        for i in range(group.cut, len(federation.model.stages)):
            held.setdefault(f"layer {i}", []).append(("server", g, i - group.cut))
        held.setdefault("final head", []).append(("server", g, -1))
        if average == "all_holders":
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

    def branches(part: str) -> tuple[Branch, ...]:
        rows = [layers[part, g] for g in range(len(state.clients))]
        return tuple(Branch(tuple(row[:-1]), row[-1]) for row in rows)

    return state.replace(clients=branches("client"), servers=branches("server"))


def _zero() -> Array:
    return jnp.zeros((), jnp.int32)
