"""The two halves of a turn, for a client and a server in processes of their own.

They are the functions of `hsee_jax.federation.step`, and a simulation on a CPU compiles
them as a device and a server do (`hsee_jax.engine.programs`), so that a run over a
network equals it bit for bit. If the client waits for a reply, the simulation has one
program for both halves, and the run equals it up to rounding. A gradient crosses the
link as it is, so a codec with a form of its own for gradients is not allowed.
"""

from collections.abc import Callable
from functools import partial

from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.steps import Rates, ServerParts
from hsee_jax.core.types import Array, Batch, Metrics
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.crossing import decode, encode, message_bytes
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.step import (
    ForwardPass,
    branch_step,
    client_backward,
    client_forward,
    server_step,
)
from hsee_jax.federation.strategy import Halves, Reply, Sent, Served


def make_halves(
    federation: Federation,
    parts: ServerParts,
    properties: Properties,
    means: Callable[[int], tuple[str, ...]],
) -> Halves:
    """Make the halves of a turn.

    Args:
      federation: who trains what.
      parts: the layers of a server that belong to a group.
      properties: of the algorithm; the boundary is detached or joint.
      means: the names of the means that the clients of a group receive.
    """
    joint, distill = properties.boundary == "joint", properties.distill
    waits, rates = joint or distill > 0, Rates(properties.server_lr_scale)
    share = properties.exit_gradient if joint else 1.0
    forward = partial(client_forward, exit_gradient=share, distill=distill)

    def send(client: Branch, batch: Batch, learning_rate: Array, *, group: int) -> Sent:
        spec, rate = federation.specs(group)[0], rates.of(learning_rate)[0]
        if not waits:
            client, features, metrics = branch_step(spec, client, batch, rate)
            message, client = encode(spec, client, features, batch.mask)
            return Sent(client, message, metrics, None)
        passed = forward(spec, client, batch)
        message, client = encode(spec, client, passed.features, batch.mask)
        return Sent(client, message, passed.metrics, passed)

    def serve(
        server: Branch, batch: Batch, learning_rate: Array, *, group: int
    ) -> Served:
        client_spec, spec = federation.specs(group)
        decoded = batch._replace(inputs=decode(spec, batch.inputs))
        rate = rates.of(learning_rate)[1]
        part = parts.take(server, group)
        step = server_step(spec, part, decoded, rate, joint=joint)
        reply = Reply(step.gradient, step.logits if distill else None)
        link = message_bytes(client_spec, batch.inputs, batch.mask, *reply)
        return Served(parts.put(server, group, step.server), step.metrics, reply, link)

    def finish(
        client: Branch,
        passed: ForwardPass,
        reply: Reply,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Metrics]:
        spec, rate = federation.specs(group)[0], rates.of(learning_rate)[0]
        return client_backward(spec, client, passed, rate, *reply, distill=distill)

    return Halves(send, serve, finish if waits else None, means)
