"""The answers of a client of a federation, and of the server behind it, to samples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hsee_jax.core.options import Option, at_least
from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Array
from hsee_jax.data.views import ViewFn
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy, server_of
from hsee_jax.inference.gate import Answers, Gate, make_gate

BATCH_SIZE = Option("batch_size", int, 256, rules=(at_least(1),))
# Whole samples after `normalize`, [B, ...], and a threshold -> answers.
AnswerFn = Callable[[Array, float], Answers]


def gate_of(
    federation: Federation,
    strategy: Strategy,
    group: int,
    *,
    batch_size: int,
    criterion: str,
) -> Gate:
    """Compile gated inference for the clients of a group, see `make_gate`."""
    return make_gate(
        *federation.specs(group),
        batch_size=batch_size,
        criterion=criterion,
        junction=strategy.junction,
    )


def answers_of(
    gate: Gate,
    federation: Federation,
    strategy: Strategy,
    state: RunState,
    view: ViewFn | None,
    group: int,
    member: int,
) -> AnswerFn:
    """Put the networks that answer on the device; return the function that runs them.

    These are a client and its server, or with a junction all clients and the server.

    Args:
      gate: of `gate_of`.
      federation: the clients.
      strategy: the algorithm.
      state: with a slot for every client in the order of its group.
      view: of the samples; None where a client sees them whole.
      group: the group of the client that is asked first.
      member: its position in the group.
    """
    ids, stack = federation.groups[group].ids, state.clients[group]

    def client(m: int) -> Branch:
        return row_of(stack, m)

    def seen(inputs: Array, m: int) -> Array:
        return inputs if view is None else view(inputs, jnp.int32(ids[m]))

    if strategy.junction is None:
        server = server_of(strategy, state, group, member)
        own, server = jax.device_put((client(member), server))
        return lambda inputs, threshold: gate.answer(
            own, server, seen(inputs, member), threshold
        )
    members = range(len(ids))
    clients, server = jax.device_put((list(map(client, members)), state.servers[0]))
    return lambda inputs, threshold: gate.answer_events(
        clients, server, [seen(inputs, m) for m in members], threshold, asked=member
    )
