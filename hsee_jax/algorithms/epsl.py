"""All clients' rows in one step of the server, after EPSL (arXiv:2303.15991).

Efficient parallel split learning (Lin, Zhu, Chen, Ding, Zhou and Fang): a shared server
takes the rows of all clients as one batch. Where cuts differ, it begins at the
shallowest cut, and the rows of a deeper cut join at their depth [ours]. BatchNorm sees
all real rows. With a detached boundary this is the whole step.

With a joint boundary, every client gets the gradient of the mean loss over its own
rows, so that the clients' mean moves by the gradient of the joined batch. The first
``ceil(phi B)`` rows of every batch share a gradient: their gradients by the logits are
summed over the clients and flow back once, through the means of the clients' rows, and
all clients of a cut get the same result [recalled]. Where they have unequal numbers of
real rows, each gets it times a number of its own, whose bytes do not count. So the
server sends ``ceil(phi B) + N (B - ceil(phi B))`` rows of gradient to N clients of a
cut, and passes as many back through its layers. For this, the simulation also runs a
forward pass on the means, in which BatchNorm sees each mean as one row.

A client whose features are not finite is left out of the step. If the step itself is
not finite, the server does not take it, nor with a joint boundary does any client.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hsee_jax.algorithms.rows import (
    ServedRows,
    ServeRowsFn,
    by_client,
    forward_rows,
    rows_of,
    served_rows,
    take_messages,
)
from hsee_jax.algorithms.steps import Rates
from hsee_jax.core.trees import add_trees, select
from hsee_jax.core.types import Array, Batch, ExitMetrics, Metrics, PyTree
from hsee_jax.federation.branch import (
    Branch,
    BranchSpec,
    params_of,
    parts_of,
    with_params,
    with_parts,
)
from hsee_jax.federation.crossing import (
    decode_gradient,
    encode,
    encode_gradient,
    gradient_bytes,
    message_bytes,
)
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.members import over_members
from hsee_jax.federation.state import RunState
from hsee_jax.federation.step import (
    ForwardPass,
    client_backward,
    client_forward,
    take_step,
)
from hsee_jax.federation.strategy import StepFn
from hsee_jax.link.codecs import pack_bytes
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.parallel.mesh import CLIENTS, SAME, constrain


def serve_together(
    federation: Federation,
    server: Branch,
    messages: tuple[Batch, ...],
    order: Array,
    rates: tuple[Array, Array],
) -> tuple[Branch, tuple[Metrics, ...]]:
    """Step the shared server once on the messages of all clients.

    The arguments and results are those of `hsee_jax.algorithms.steps.serve_in_turn`,
    without ``parts``; the order does not matter.
    """
    served = _serve(federation, server, messages, rates[1], shared_rows=0)
    return served.server, served.metrics


def joint_together(
    federation: Federation,
    rates: Rates,
    exit_gradient: float,
    gradient_share: float = 0.0,
    serve: ServeRowsFn | None = None,
) -> StepFn:
    """Make the step of all clients at once with a joint boundary.

    Args:
      federation: who trains what.
      rates: the learning rates of client and server.
      exit_gradient: see `hsee_jax.federation.joint_step`.
      gradient_share: phi, the share of a batch whose rows share their gradient.
      serve: the server's step; None for the step of EPSL.
    """
    mesh = federation.mesh
    specs = [federation.specs(g)[0] for g in range(len(federation.groups))]

    def step(
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        del order
        of_client, of_server = rates.of(learning_rate)
        sent = [
            over_members(
                federation, partial(_send, spec, exit_gradient), (0, 0), states=1
            )(*each)
            for spec, *each in zip(specs, state.clients, batches, strict=True)
        ]
        shared_rows = shared_rows_of(gradient_share, batches[0].mask.shape[1])
        messages = tuple(
            constrain(message, mesh, P(None, CLIENTS)) for _, message, _ in sent
        )
        take_rows = serve or partial(_serve, federation, shared_rows=shared_rows)
        served = take_rows(state.servers[0], messages, of_server)
        clients, metrics = [], []
        for g, (client, message, passed) in enumerate(sent):
            client, exits, sizes = over_members(
                federation, partial(_learn, specs[g]), (0, 0, 0, 0, None), states=1
            )(client, passed, served.gradients[g], batches[g].mask, of_client)
            clients.append(client)
            link = _link(specs[g], message, sizes, shared_rows)
            metrics.append(ExitMetrics(exits, served.metrics[g], link))
        state = state.replace(clients=tuple(clients), servers=(served.server,))
        return state, tuple(metrics)

    return step


def _send(
    spec: BranchSpec, exit_gradient: float, client: Branch, batch: Batch
) -> tuple[Branch, Batch, ForwardPass]:
    """Take a client's batch forward, and make its message."""
    passed = client_forward(spec, client, batch, exit_gradient=exit_gradient)
    message, client = encode(spec, client, passed.features, batch.mask)
    return client, batch._replace(inputs=message), passed


def _learn(
    spec: BranchSpec,
    client: Branch,
    passed: ForwardPass,
    gradient: Array,
    mask: Array,
    learning_rate: Array,
) -> tuple[Branch, Metrics, Array]:
    """Send a gradient back, and step the client; also return the bytes of each row."""
    back = encode_gradient(spec, client, gradient, mask)
    arrived = decode_gradient(spec, back, gradient.dtype)
    client, metrics = client_backward(spec, client, passed, learning_rate, arrived)
    return client, metrics, gradient_bytes(spec, back)


def shared_rows_of(share: float, batch_size: int) -> int:
    """Return how many rows of a batch share their gradient, ``ceil(phi B)``."""
    return math.ceil(round(share * batch_size, 6))


def _link(spec: BranchSpec, message: Batch, sizes: Array, shared_rows: int) -> Array:
    """Count what crosses the links of a group, ``int32 [S, 2, 2]``.

    A gradient that all clients share is sent once, even where each scales it by its own
    number of real rows; it counts for the first client that has such a row.

    Args:
      spec: of the clients.
      message: inputs encoded, leaves ``[S, B, ...]``.
      sizes: bytes of each row's gradient, ``int32 [S, B]``.
      shared_rows: the number of rows with the same gradient for all.
    """
    up = jax.vmap(partial(message_bytes, spec))(message.inputs, message.mask)
    shared, own = message.mask[:, :shared_rows], message.mask[:, shared_rows:]
    first = shared & (jnp.cumsum(shared, axis=0) == 1)
    sent = jnp.concatenate([first, own], axis=1)
    down = jnp.where(sent, sizes, 0)
    return up + jax.vmap(pack_bytes)(jnp.zeros_like(down), down)


def _serve(
    federation: Federation,
    server: Branch,
    messages: tuple[Batch, ...],
    learning_rate: Array,
    *,
    shared_rows: int,
) -> ServedRows:
    """Step the server on all rows; see `serve_together` for the arguments."""
    mesh, spec = federation.mesh, federation.specs(0)[1]
    specs = [federation.specs(g)[1] for g in range(len(messages))]
    batches, fine = zip(*map(take_messages, specs, messages), strict=True)
    server = constrain(server, mesh, SAME)
    run = _runner(federation, server, [batch.mask for batch in batches])
    at = params_of(server), [b.inputs for b in batches]
    (_, logits), pullback, (stats, seen) = jax.vjp(partial(run, 0), *at, has_aux=True)
    slopes, metrics = jax.grad(_mean_loss, has_aux=True)(logits, batches)
    if shared_rows:
        _, pullback, _ = jax.vjp(partial(run, shared_rows), *at, has_aux=True)
    sums = add_trees([jnp.sum(slope[:, :shared_rows], axis=0) for slope in slopes])
    own = [slope[:, shared_rows:] for slope in slopes]
    grads, gradients = pullback((sums, own))
    total = add_trees([jax.tree.map(jnp.sum, one) for one in metrics])
    moved, total = take_step(spec, server, grads, stats, learning_rate, total)
    parts = tuple(
        select(s, *pair)
        for *pair, s in zip(parts_of(moved), parts_of(server), seen, strict=True)
    )
    server = constrain(with_parts(server, parts), mesh, SAME)
    return served_rows(server, messages, fine, metrics, gradients, total)


def _runner(federation: Federation, server: Branch, masks: list[Array]) -> Callable:
    """Make the server's forward pass.

    Args:
      federation: who trains what.
      server: its batch statistics.
      masks: of each group's rows, ``bool [S, B]``.

    Returns:
      A function that takes the number k of rows that are means over the clients, the
      parameters of each part and the features of each group, ``[S, B, ...]``. It
      returns the logits of the means, ``[k, K]``, and of the other rows, ``[S, B - k,
      K]`` a group; and as a second value the new batch statistics, and for each part
      whether rows came to it.
    """
    spec = federation.specs(0)[1]
    cuts = [group.cut - federation.groups[0].cut for group in federation.groups]

    def run(k: int, params: tuple[PyTree, ...], features: list[Array]) -> tuple:
        parts = parts_of(with_params(server, params))
        rows = [rows_of(x, mask, k) for x, mask in zip(features, masks, strict=True)]
        last, *aux = forward_rows(spec, parts, dict(zip(cuts, rows, strict=True)))
        own = by_client(last.own, [mask[:, k:] for mask in masks])
        return (last.means, own), tuple(aux)

    return run


def _mean_loss(
    logits: list[Array], batches: tuple[Batch, ...]
) -> tuple[Array, tuple[Metrics, ...]]:
    """Return the mean loss over all rows, and the metrics of each client."""
    metrics = tuple(
        jax.vmap(masked_cross_entropy)(scores, batch.labels, batch.mask)[1]
        for scores, batch in zip(logits, batches, strict=True)
    )
    total = add_trees([jax.tree.map(jnp.sum, one) for one in metrics])
    count = jnp.maximum(total.count, 1).astype(jnp.float32)
    return total.loss_sum / count, metrics
