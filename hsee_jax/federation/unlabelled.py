"""One step of a client whose layers learn without labels.

After "Unifying Synergies between Self-supervised Learning and Dynamic Computation"
(arXiv:2301.09164). The layers train on VICReg between two augmented copies of each
sample, which the papers call views. The exit reads the features and changes nothing in
them, and only rows with labels go on to the server. No gradient comes back.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hsee_jax.core.types import NO_LABEL, Array, Batch, ExitMetrics, Metrics, PyTree
from hsee_jax.federation.branch import (
    Branch,
    BranchSpec,
    decode,
    encode,
    forward,
    message_bytes,
    parts_of,
    with_parts,
)
from hsee_jax.federation.step import server_step, take_step
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.nn.vicreg import masked_vicreg

# The loss has the weights 25, 25 and 1. Divided by 25, it takes the learning rates of a
# cross-entropy, which its authors' optimizer, LARS, would find by itself [ours].
_SCALE = 25.0


def unlabelled_step(
    spec: BranchSpec, client: Branch, batch: Batch, learning_rate: Array
) -> tuple[Branch, Batch, Metrics]:
    """Step a client's layers on all rows, and its exit on those with labels.

    The layers take the gradient of `hsee_jax.nn.masked_vicreg` between both copies, of
    which it reads the mean of each channel. The exit takes the gradient of the
    cross-entropy of its answers to the first copy. Both copies pass through the layers
    as one batch, so BatchNorm sees them together.

    Args:
      spec: what the client computes.
      client: its state. A batch of padding leaves it exactly as it is, and rows
        without labels alone leave the exit so.
      batch: inputs ``[B, 2, ...]``, two copies of each sample, labels and mask.
      learning_rate: ``float32 []``.

    Returns:
      The new state; the rows with labels, as a batch with the detached features of
      their first copy ``[B, ...]``; and the metrics of the exit on them, before the
      update.
    """
    labelled = batch.mask & (batch.labels != NO_LABEL)
    inputs = jnp.concatenate([batch.inputs[:, 0], batch.inputs[:, 1]])
    mask = jnp.concatenate([batch.mask, batch.mask])
    first, second = jnp.split(jnp.arange(len(mask)), 2)

    def loss_fn(params: tuple[PyTree, ...]) -> tuple[Array, tuple[Any, ...]]:
        parts = zip(parts_of(client), params, strict=True)
        moved = with_parts(client, tuple(part.replace(params=p) for part, p in parts))
        features, logits, stats = forward(
            spec, moved, inputs, mask, train=True, head_gradient=0.0
        )
        means = _channels(features)
        loss = masked_vicreg(means[first], means[second], batch.mask) / _SCALE
        own, metrics = masked_cross_entropy(logits[first], batch.labels, labelled)
        return loss + own, (loss, features[first], stats, metrics)

    params = tuple(part.params for part in parts_of(client))
    grads, (loss, features, stats, metrics) = jax.grad(loss_fn, has_aux=True)(params)
    rows = Metrics(loss, jnp.int32(0), jnp.sum(batch.mask, dtype=jnp.int32))
    moved, taken = take_step(spec, client, grads, stats, learning_rate, rows)
    some = jnp.any(labelled)
    head = jax.tree.map(lambda n, o: jnp.where(some, n, o), moved.head, client.head)
    loss_sum = jnp.where(jnp.isnan(taken.loss_sum), jnp.nan, metrics.loss_sum)
    return (
        moved.replace(head=head),
        Batch(jax.lax.stop_gradient(features), batch.labels, labelled),
        metrics._replace(loss_sum=loss_sum),
    )


def detached_unlabelled_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
) -> tuple[Branch, Branch, ExitMetrics]:
    """Take one step like `detached_step`; the client takes its `unlabelled_step`.

    Args:
      client_spec: what the client computes.
      server_spec: what its server computes.
      client: layers 1..cut and the exit head.
      server: layers cut+1..L and the final head.
      batch: the client's data, inputs ``[B, 2, ...]``.
      learning_rates: of the client and of the server, ``float32 []`` each.

    Returns:
      The new client, the new server, and the metrics of both on the rows with labels,
      before their updates.
    """
    client, rows, exit_metrics = unlabelled_step(
        client_spec, client, batch, learning_rates[0]
    )
    message, client = encode(client_spec, client, rows.inputs, rows.mask)
    decoded = rows._replace(inputs=decode(server_spec, message))
    served = server_step(server_spec, server, decoded, learning_rates[1])
    link = message_bytes(client_spec, message, rows.mask)
    return client, served.server, ExitMetrics(exit_metrics, served.metrics, link)


def _channels(features: Array) -> Array:
    """Return the mean of each channel ``float32 [B, C]`` over the axes before it."""
    between = tuple(range(1, features.ndim - 1))
    return jnp.mean(features.astype(jnp.float32), axis=between)
