"""The two halves of a turn, for a client and a server in processes of their own.

They are the functions of `hsee_jax.federation.step`, so that a run over a network
equals the simulation: bit for bit with a detached boundary, up to rounding with a
joint one, where the client's step is two programs with the link between them.
"""

from collections.abc import Callable

from hsee_jax.algorithms.steps import Rates, ServerParts
from hsee_jax.core.types import Array, Batch, Metrics
from hsee_jax.federation.branch import Branch, decode, encode, message_bytes
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.step import (
    ForwardPass,
    branch_step,
    client_backward,
    client_forward,
    server_step,
)
from hsee_jax.federation.strategy import Halves, Sent, Served


def make_halves(
    federation: Federation,
    parts: ServerParts,
    rates: Rates,
    *,
    joint: bool,
    exit_gradient: float,
    means: Callable[[int], tuple[str, ...]],
) -> Halves:
    """Make the halves of a turn; see `compose` for the arguments."""

    def send(client: Branch, batch: Batch, learning_rate: Array, *, group: int) -> Sent:
        spec, rate = federation.specs(group)[0], rates.of(learning_rate)[0]
        if not joint:
            client, features, metrics = branch_step(spec, client, batch, rate)
            message, client = encode(spec, client, features, batch.mask)
            return Sent(client, message, metrics, None)
        passed = client_forward(spec, client, batch, exit_gradient=exit_gradient)
        message, client = encode(spec, client, passed.features, batch.mask)
        return Sent(client, message, passed.metrics, passed)

    def serve(
        server: Branch, batch: Batch, learning_rate: Array, *, group: int
    ) -> Served:
        client_spec, spec = federation.specs(group)
        decoded = batch._replace(inputs=decode(spec, batch.inputs))
        rate = rates.of(learning_rate)[1]
        part = parts.take(server, group)
        part, metrics, gradient = server_step(spec, part, decoded, rate, joint=joint)
        link = message_bytes(client_spec, batch.inputs, batch.mask, gradient)
        return Served(parts.put(server, group, part), metrics, gradient, link)

    def finish(
        client: Branch,
        passed: ForwardPass,
        gradient: Array,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Metrics]:
        spec, rate = federation.specs(group)[0], rates.of(learning_rate)[0]
        return client_backward(spec, client, passed, rate, gradient)

    return Halves(send, serve, finish if joint else None, means)
