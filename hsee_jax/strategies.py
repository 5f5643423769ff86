"""The two strategies of Hetero-SplitEE (Oda et al., arXiv:2512.09313).

*Sequential*: one server network, updated by one client after another. *Averaging*: a
server network for each client, trained in parallel and averaged layer by layer. Both
are a `Strategy`: pure functions over a `RunState`, in which the clients of one cut are
stacked. Choices that the paper leaves open are options, documented in `StrategyConfig`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from hsee_jax.aggregate import average_layer
from hsee_jax.base import Array, Batch, ExitMetrics, Key, PyTree
from hsee_jax.model import Model, Network, init_network
from hsee_jax.split import (
    Branch,
    BranchSpec,
    branch_step,
    client_spec,
    detached_step,
    init_client,
    init_server,
    server_spec,
)


class Client(NamedTuple):
    """A client: its id, from which its random draws are derived, and its cut."""

    id: int
    cut: int


class Group(NamedTuple):
    """The clients of one cut; a *member* is a position in ``ids``."""

    cut: int
    ids: tuple[int, ...]  # ascending


def group_clients(clients: Iterable[Client]) -> tuple[Group, ...]:
    """Groups by ascending cut, whatever order the clients come in."""
    cuts: dict[int, list[int]] = {}
    for client in clients:
        cuts.setdefault(client.cut, []).append(client.id)
    return tuple(Group(cut, tuple(sorted(cuts[cut]))) for cut in sorted(cuts))


class Federation(NamedTuple):
    """Who trains what."""

    model: Model
    groups: tuple[Group, ...]
    optimizer: optax.GradientTransformation  # without learning rate

    def specs(self, group: int) -> tuple[BranchSpec, BranchSpec]:
        """Of a group's clients, and of the servers behind them."""
        cut = self.groups[group].cut
        return (
            client_spec(self.model, cut, self.optimizer),
            server_spec(self.model, cut, self.optimizer),
        )


class RunState(struct.PyTreeNode):
    """Everything that training changes."""

    round: Array  # int32 []: rounds done
    clients: tuple[Branch, ...]  # one a group, leaves [G, ...]
    servers: tuple[Branch, ...]  # one a group, leaves [G, ...]; shared: one, plain


class TurnFn(Protocol):
    """One client's step, and its server's."""

    def __call__(
        self,
        client: Branch,
        server: Branch,
        batch: Batch,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        """Steps one client of a group.

        Args:
          client: its branch.
          server: the shared server, or the client's replica.
          batch: the client's data, ``[B, ...]``.
          learning_rate: ``float32 []``.
          group: the group's index.
        """


class StepFn(Protocol):
    """One step of all clients at once."""

    def __call__(
        self,
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, ExitMetrics]:
        """Steps every client that has data; a mask of only false leaves it out.

        Args:
          state: before.
          batches: one a group, leaves ``[G, B, ...]``.
          order: ``int32 [N]``, the clients' turns at a shared server, as positions in
            the concatenation of all groups.
          learning_rate: ``float32 []``.

        Returns:
          The state, and metrics with leaves ``[N]`` in the order of the groups.
        """


class Strategy(NamedTuple):
    """An algorithm, as pure functions over `RunState`."""

    init: Callable[[Key], RunState]
    turn: TurnFn
    step: StepFn | None  # None: turns depend on each other, there is no step of all
    aggregate: Callable[[RunState, tuple[Array, ...]], RunState]  # weights float32 [G]
    server_of: Callable[[RunState, int, Array], Branch]  # group, member -> cut+1..L
    shared: bool  # one server for all, or one replica each
    turn_unit: str  # "batch": all clients' turns step by step; "epoch": one by one
    period: int  # aggregate after so many ...
    period_unit: str  # ... "rounds" or "steps"; a period of 0 is never


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
    groups = federation.groups
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

    def init_state(key: Key) -> RunState:
        server = init_server(
            init_network(federation.model, key), groups[0].cut, federation.optimizer
        )
        clients = _init_all(init_client, federation, key, init)
        return RunState(_zero(), clients, (server,))

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, ExitMetrics]:
        stepped = [
            jax.vmap(partial(branch_step, federation.specs(g)[0]), (0, 0, None))(
                state.clients[g], batch, learning_rate
            )
            for g, batch in enumerate(batches)
        ]
        clients, features, exits = zip(*stepped, strict=True)
        sent = [
            batch._replace(inputs=inputs)
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
        group_of, member_of = positions(groups)

        def take_turn(server: Branch, position: Array) -> tuple[Branch, PyTree]:
            return jax.lax.switch(
                group_of[position], branches, server, member_of[position]
            )

        server, turns = jax.lax.scan(take_turn, state.servers[0], order)
        served = jax.tree.map(lambda a: jnp.zeros_like(a).at[order].set(a), turns)
        state = state.replace(clients=clients, servers=(server,))
        return state, ExitMetrics(_concatenate(exits), served)

    return Strategy(
        init=init_state,
        turn=turn_fn,
        step=step if turn == "batch" else None,
        aggregate=lambda state, weights: state,
        server_of=lambda state, group, member: part_of(state.servers[0], group),
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
    groups = federation.groups

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

    def init_state(key: Key) -> RunState:
        clients = _init_all(init_client, federation, key, init)
        servers = _init_all(init_server, federation, key, init)
        return RunState(_zero(), clients, servers)

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, ExitMetrics]:
        del order
        stepped = [
            jax.vmap(partial(turn_fn, group=g), (0, 0, 0, None))(
                state.clients[g], state.servers[g], batch, learning_rate
            )
            for g, batch in enumerate(batches)
        ]
        clients, servers, metrics = zip(*stepped, strict=True)
        state = state.replace(clients=clients, servers=servers)
        return state, _concatenate(metrics)

    def aggregate(state: RunState, weights: tuple[Array, ...]) -> RunState:
        held: dict[object, list[tuple[str, int, int]]] = {}
        parts = {"server": state.servers, "client": state.clients}
        for g, group in enumerate(groups):
            for i in range(len(state.servers[g].layers)):
                held.setdefault(group.cut + i, []).append(("server", g, i))
            held.setdefault("final head", []).append(("server", g, -1))
            if average == "all_holders":
                for i in range(group.cut):
                    held.setdefault(i, []).append(("client", g, i))
                held.setdefault(("exit head", g), []).append(("client", g, -1))
        layers = {
            (part, g): [*branch.layers, branch.head]
            for part, branches in parts.items()
            for g, branch in enumerate(branches)
        }
        for holders in held.values():
            means = average_layer(
                [layers[part, g][i] for part, g, i in holders],
                [weights[g] for _, g, _ in holders],
                optimizer=federation.optimizer,
                batch_norm=batch_norm,
                optimizer_state=optimizer_state,
            )
            for (part, g, i), mean in zip(holders, means, strict=True):
                layers[part, g][i] = mean

        def rebuilt(part: str) -> tuple[Branch, ...]:
            return tuple(
                Branch(tuple(layers[part, g][:-1]), layers[part, g][-1])
                for g in range(len(groups))
            )

        return state.replace(clients=rebuilt("client"), servers=rebuilt("server"))

    return Strategy(
        init=init_state,
        turn=turn_fn,
        step=step,
        aggregate=aggregate,
        server_of=lambda state, group, member: take_member(
            state.servers[group], member
        ),
        shared=False,
        turn_unit="batch",
        period=period,
        period_unit=period_unit,
    )


def positions(groups: Sequence[Group]) -> tuple[Array, Array]:
    """Group and member of each position in the concatenation, ``int32 [N]`` each."""
    pairs = [(g, m) for g, group in enumerate(groups) for m in range(len(group.ids))]
    group_of, member_of = zip(*pairs, strict=True)
    return jnp.asarray(group_of, jnp.int32), jnp.asarray(member_of, jnp.int32)


def _zero() -> Array:
    return jnp.zeros((), jnp.int32)


def _init_all(
    init_branch: Callable[[Network, int, optax.GradientTransformation], Branch],
    federation: Federation,
    key: Key,
    init: str,
) -> tuple[Branch, ...]:
    """A branch for every client: slices of one network, or of one each."""
    shared = init_network(federation.model, key) if init == "shared" else None

    def stack(group: Group) -> Branch:
        def branch(i: Array) -> Branch:
            network = shared or init_network(
                federation.model, jax.random.fold_in(key, i)
            )
            return init_branch(network, group.cut, federation.optimizer)

        ids = jnp.asarray(group.ids, jnp.int32)
        return jax.vmap(branch, axis_size=len(group.ids))(ids)

    return tuple(map(stack, federation.groups))


def take_member(tree: PyTree, member: Array) -> PyTree:
    """One member of a stack."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, member, keepdims=False), tree
    )


def put_member(tree: PyTree, member: Array, value: PyTree) -> PyTree:
    """The stack with one member replaced."""
    return jax.tree.map(
        lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, member, 0), tree, value
    )


def _concatenate(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
