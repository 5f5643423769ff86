"""The type of a training algorithm: pure functions over the state of a federation."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Array, Batch, ExitMetrics, Key, Metrics, PyTree
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.junction import Junction
from hsee_jax.federation.state import Means, RunState
from hsee_jax.federation.step import ForwardPass
from hsee_jax.link.codecs import Message


class TurnFn(Protocol):
    """Steps one client and its server."""

    def __call__(
        self,
        client: Branch,
        server: Branch,
        batch: Batch,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        """Step one client of a group.

        Args:
          client: the client's branch.
          server: the shared server, or the client's replica.
          batch: the client's data, ``[B, ...]``.
          learning_rate: ``float32 []``.
          group: the group's index.
        """


class StepFn(Protocol):
    """Steps all clients at once."""

    def __call__(
        self,
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        """Step every client that has data; a mask that is false everywhere skips it.

        Args:
          state: the state before the step.
          batches: a batch for each group, leaves ``[S, B, ...]``.
          order: ``int32 [A]``, the turns at a shared server, as positions in the
            concatenation of all stacks; the server skips all other clients.
          learning_rate: ``float32 []``.

        Returns:
          The new state, and metrics for each group with leaves ``[S, ...]``.
        """


class InitStateFn(Protocol):
    """Draws the state before the first round."""

    def __call__(self, key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        """Draw the state.

        Args:
          key: a typed key.
          ids: the client in each slot, ``int32 [S]`` for each group; None for all
            clients.
        """


class Sent(NamedTuple):
    """What a client has when its features are on the way."""

    client: Branch  # after its step; if it waits for a reply, still before it
    message: Message  # the encoded features, [B, ...]
    metrics: Metrics  # of the exit, before the update
    passed: ForwardPass | None  # for `Halves.finish`; None if no client waits


class Reply(NamedTuple):
    """What a server sends back to a client that waits for it."""

    gradient: Array | None = None  # of the features, [B, ...]; None if detached
    logits: Array | None = None  # float32 [B, K]; None if no exit learns from them


class Served(NamedTuple):
    """What a server has after its half of a turn."""

    server: Branch
    metrics: Metrics  # of the final head, before the update
    reply: Reply
    link: Array  # int32 [2, 2]: bytes up and down, see `hsee_jax.link.pack_bytes`


class Halves(NamedTuple):
    """A turn as the halves of a client and of a server with a network between them."""

    # (client, batch, learning rate, *, group) -> Sent
    send: Callable[..., Sent]
    # (server, batch of encoded inputs, learning rate, *, group) -> Served
    serve: Callable[..., Served]
    # If clients wait: (client, passed, Reply, learning rate, *, group); else None.
    finish: Callable[..., tuple[Branch, Metrics]] | None
    # Group -> the names of the means that its clients receive.
    means: Callable[[int], tuple[str, ...]]


@dataclass(frozen=True)
class HalvedTurn:
    """A turn that a client and a server in processes of their own can take, too."""

    whole: TurnFn
    halves: Halves  # their composition is the whole turn

    def __call__(
        self,
        client: Branch,
        server: Branch,
        batch: Batch,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        """Take the whole turn, see `TurnFn`."""
        return self.whole(client, server, batch, learning_rate, group=group)


class Strategy(NamedTuple):
    """An algorithm, as pure functions over `RunState`.

    It has turns, a step for all clients at once, or both; if both, they are equal.
    """

    init: InitStateFn
    turn: TurnFn | None  # a `HalvedTurn` if it can cross a network
    step: StepFn | None
    # Compute the means of layers by weights float32 [S] a group.
    aggregate: Callable[[RunState, tuple[Array, ...]], Means]
    # Give means to slots, from the rounds of their states, int32 [S] a group.
    receive: Callable[[RunState, Means, tuple[Array, ...]], RunState]
    # Return the arrays that each client sends for a mean, leaves [S, ...] a group.
    messages: Callable[[RunState], tuple[PyTree, ...]]
    part: Callable[[Branch, int], Branch]  # a server's layers behind a group's cut
    shared: bool  # whether all clients share one server; else each has a replica
    # "batch": turns step by step; "epoch": client by client; "together": all at once.
    turn_unit: str = "batch"
    period: int = 0  # aggregate after this many units; 0 for never
    period_unit: str = "rounds"  # or "steps"
    boundary: str = "detached"  # or "joint"; "none": the client is its own server
    # The temperature of the server's logits, from which exits learn; 0 for none.
    distill: float = 0.0
    weights: str = "samples"  # of the clients in a mean; or "uniform"
    # The share of rows whose gradient clients share, see `hsee_jax.algorithms.epsl`.
    gradient_share: float = 0.0
    # Augmented copies of each sample in a batch. With two, clients train on samples
    # without labels, too; with one, only on samples with labels.
    copies: int = 1
    # Whether an average gives the same network to all clients and their servers.
    one_network: bool = False
    # Where the clients see one event each in its own way: how the shared server reads
    # them together. All clients then take the same samples in a step.
    junction: Junction | None = None
    # What the turn of each group depends on, beside the algorithm, its options and the
    # network: where it is equal, so is the compiled turn. Empty if unknown.
    turn_kinds: tuple[Hashable, ...] = ()

    @property
    def halves(self) -> Halves | None:
        """Return the halves of the turn; None if it cannot cross a network."""
        return self.turn.halves if isinstance(self.turn, HalvedTurn) else None

    @property
    def waits(self) -> bool:
        """Return whether clients wait for the server's reply to each batch."""
        return self.boundary == "joint" or self.distill > 0


def average_layers(
    strategy: Strategy, state: RunState, weights: tuple[Array, ...]
) -> tuple[RunState, Means]:
    """Compute the means of a round, and give them to all slots.

    Args:
      strategy: the algorithm.
      state: of all clients and servers.
      weights: of the clients in a mean, ``float32 [S]`` for each group.
    """
    means = strategy.aggregate(state, weights)
    since = tuple(jnp.broadcast_to(state.round, own.shape) for own in weights)
    return strategy.receive(state, means, since), means


def server_of(strategy: Strategy, state: RunState, group: int, member: int) -> Branch:
    """Return the layers behind a client's cut, and the final head."""
    if strategy.shared:
        return strategy.part(state.servers[0], group)
    return row_of(state.servers[group], member)
