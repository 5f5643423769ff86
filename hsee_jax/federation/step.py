"""One training step, as the functions that a client and a server run.

Between them lies the link (`hsee_jax.federation.crossing.encode` and ``decode``)::

    client_forward -> encode -> | wire | -> decode -> server_step
    client_backward <- decode_gradient <- | wire | <- encode_gradient, if joint
    client_backward <- | wire | <- logits, if the exit learns from them

With a detached boundary no gradient comes back, and the client continues at once: the
hierarchical training of Hetero-SplitEE (Oda et al., arXiv:2512.09313).
`hsee_jax.federation.fused` calls these functions one after another, to simulate both
sides in one program.

The exit may learn from the server's logits of the same batch, at a temperature: its
loss is the cross-entropy plus `hsee_jax.nn.distillation_loss`, both with weight 1
[ours]. The logits are those before the server's update. They come down, so the client
waits for them, with a detached boundary as well.

A client with several exits trains them together, on the sum of their losses, as in
BranchyNet (Teerapittayanon et al., ICPR 2016) with a weight of 1 for each; the metrics
are those of the last exit.

A branch refuses a step if the loss, a gradient or a batch statistic is not finite: it
stays as it is, and the loss in its metrics is NaN. Each side judges its own step; with
a joint boundary a server that refuses its step sends a gradient of NaN, so that the
client refuses as well. A client also refuses to learn from logits that are not finite.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from hsee_jax.core.trees import select
from hsee_jax.core.types import Array, Batch, Metrics, PyTree
from hsee_jax.federation.accumulation import Passed, accumulate
from hsee_jax.federation.branch import (
    Branch,
    BranchSpec,
    LayerState,
    forward_exits,
    params_of,
    parts_of,
    with_params,
    with_parts,
)
from hsee_jax.nn.losses import distillation_loss, masked_cross_entropy
from hsee_jax.optim.optimizers import as_optimizer


class ForwardPass(struct.PyTreeNode):
    """A client's forward pass on a batch, with all that the backward pass needs."""

    features: Array  # float [B, ...], detached
    # Of each exit, float32 [B, K], detached; None without distill.
    logits: tuple[Array, ...] | None
    mask: Array  # bool [B], false on padding
    metrics: Metrics  # of the exit, before the update
    stats: tuple[PyTree, ...]  # new batch statistics, the exit head's last
    # (gradient of the loss, of the features, of the logits) -> of the parameters
    pullback: Any


class ServerStep(NamedTuple):
    """The result of a server's step."""

    server: Branch
    metrics: Metrics  # of the final head, before the update
    gradient: Array | None  # of the features that it received; None if detached
    logits: Array  # float32 [B, K], before the update, detached


class _Seen(NamedTuple):
    """What the forward pass of a branch finds beside its loss."""

    features: Array
    logits: tuple[Array, ...]  # of each exit, and last of the head
    stats: tuple[PyTree, ...]
    metrics: Metrics  # of the head


def client_forward(
    spec: BranchSpec,
    client: Branch,
    batch: Batch,
    *,
    exit_gradient: float = 1.0,
    distill: float = 0.0,
) -> ForwardPass:
    """Run a client's layers and its exit.

    Args:
      spec: what the client computes.
      client: its state.
      batch: its data, ``[B, ...]``.
      exit_gradient: the share of the exit's gradient that reaches the layers.
      distill: see `client_backward`.
    """

    def run(params: tuple[PyTree, ...]) -> tuple[tuple, _Seen]:
        loss, seen = _loss(spec, with_params(client, params), batch, exit_gradient)
        return (loss, seen.features, seen.logits if distill else None), seen

    (_, *outputs), pullback, seen = jax.vjp(run, params_of(client), has_aux=True)
    features, logits = jax.lax.stop_gradient(tuple(outputs))
    return ForwardPass(features, logits, batch.mask, seen.metrics, seen.stats, pullback)


def client_backward(
    spec: BranchSpec,
    client: Branch,
    passed: ForwardPass,
    learning_rate: Array,
    gradient: Array | None = None,
    logits: Array | None = None,
    *,
    distill: float = 0.0,
) -> tuple[Branch, Metrics]:
    """Take the client's step.

    Args:
      spec: what the client computes.
      client: its state in `client_forward`; only the codec's state may have changed.
      passed: the result of `client_forward`. A batch of padding changes nothing.
      learning_rate: ``float32 []``.
      gradient: the server's gradient of the features, ``[B, ...]``; None with a
        detached boundary.
      logits: of the server, ``float32 [B, K]``; None if the exit does not learn from
        them.
      distill: the temperature of the logits; 0 if the exit does not learn from them.

    Returns:
      The new state, and the metrics of the exit.
    """
    if gradient is None:
        gradient = jnp.zeros_like(passed.features)
    slope = None
    if distill:
        assert passed.logits is not None and logits is not None
        slope_of = jax.grad(distillation_loss)
        slope = tuple(
            slope_of(own, logits, passed.mask, distill) for own in passed.logits
        )
    (grads,) = passed.pullback((jnp.float32(1.0), gradient, slope))
    return take_step(spec, client, grads, passed.stats, learning_rate, passed.metrics)


def server_step(
    spec: BranchSpec,
    server: Branch,
    batch: Batch,
    learning_rate: Array,
    *,
    joint: bool = False,
) -> ServerStep:
    """Take the server's step on decoded features.

    Args:
      spec: what the server computes.
      server: its state.
      batch: features ``[B, ...]``, labels and mask of a client.
      learning_rate: ``float32 []``.
      joint: whether the gradient of the features goes back to the client.
    """

    def loss_fn(params: tuple[PyTree, ...], inputs: Array) -> tuple[Array, _Seen]:
        return _loss(spec, with_params(server, params), batch._replace(inputs=inputs))

    arguments = (0, 1) if joint else (0,)
    (grads, *rest), seen = jax.grad(loss_fn, arguments, has_aux=True)(
        params_of(server), batch.inputs
    )
    server, metrics = take_step(
        spec, server, grads, seen.stats, learning_rate, seen.metrics
    )
    if not joint:
        return ServerStep(server, metrics, None, seen.logits[-1])
    refused = jnp.isnan(metrics.loss_sum)
    gradient = jnp.where(refused, jnp.full_like(rest[0], jnp.nan), rest[0])
    return ServerStep(server, metrics, gradient, seen.logits[-1])


def branch_step(
    spec: BranchSpec, branch: Branch, batch: Batch, learning_rate: Array
) -> tuple[Branch, Array, Metrics]:
    """Take one step on the branch's own cross-entropy.

    Args:
      spec: what the branch computes.
      branch: its state. A batch of padding leaves it exactly as it is.
      batch: inputs ``[B, ...]``, labels and mask.
      learning_rate: ``float32 []``.

    Returns:
      The new state, the detached features of the same forward pass ``[B, ...]``, and
      the metrics of the head before the update.
    """

    def run(branch: Branch, batch: Batch) -> Passed:
        def loss_fn(params: tuple[PyTree, ...]) -> tuple[Array, _Seen]:
            return _loss(spec, with_params(branch, params), batch)

        grads, seen = jax.grad(loss_fn, has_aux=True)(params_of(branch))
        return Passed(grads, seen.features, seen.stats, seen.metrics)

    grads, features, stats, metrics = accumulate(run, branch, batch, spec.micro_batches)
    branch, metrics = take_step(spec, branch, grads, stats, learning_rate, metrics)
    return branch, jax.lax.stop_gradient(features), metrics


def _loss(
    spec: BranchSpec, branch: Branch, batch: Batch, head_gradient: float = 1.0
) -> tuple[Array, _Seen]:
    """Return the sum of the mean losses of all heads, and what else is found."""
    features, logits, stats = forward_exits(
        spec, branch, batch.inputs, batch.mask, train=True, head_gradient=head_gradient
    )
    losses, metrics = zip(
        *(masked_cross_entropy(own, batch.labels, batch.mask) for own in logits),
        strict=True,
    )
    loss = sum(losses[1:], losses[0])
    return loss, _Seen(features, logits, stats, metrics[-1])


def take_step(
    spec: BranchSpec,
    branch: Branch,
    grads: tuple[PyTree, ...],
    stats: tuple[PyTree, ...],
    learning_rate: Array,
    metrics: Metrics,
) -> tuple[Branch, Metrics]:
    """Update each layer with its optimizer, or no layer if a value is not finite."""
    finite = _all_finite((metrics.loss_sum, grads, stats))
    some = metrics.count > 0
    taken = some & finite
    update: Callable = as_optimizer(spec.optimizer).update

    def move(layer: LayerState, grad: PyTree, batch_stats: PyTree) -> LayerState:
        updates, opt_state = update(
            grad, layer.opt_state, layer.params, learning_rate=learning_rate
        )
        params = jax.tree.map(lambda p, u: p + learning_rate * u, layer.params, updates)
        moved = LayerState(params, batch_stats, opt_state)
        return select(taken, moved, layer)

    parts = tuple(map(move, parts_of(branch), grads, stats))
    loss_sum = jnp.where(some & ~finite, jnp.nan, metrics.loss_sum)
    return with_parts(branch, parts), metrics._replace(loss_sum=loss_sum)


def _all_finite(tree: PyTree) -> Array:
    """Return whether all numbers are finite, ``bool []``.

    Vectors are searched as one. XLA would write a plain conjunction over all leaves
    into the program of every update that depends on it, and a third of the time to
    compile a step went there; it leaves a search as it is. The barrier keeps it from
    comparing each vector in an operation of its own.
    """
    leaves = jax.tree.leaves(tree)
    vectors = jnp.concatenate(
        [leaf.ravel().astype(jnp.float32) for leaf in leaves if leaf.ndim < 2]
    )
    fine = jnp.isfinite(jax.lax.optimization_barrier(vectors))
    others = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves if leaf.ndim >= 2]
    return _none_false(jnp.stack([_none_false(fine), *others]))


def _none_false(flags: Array) -> Array:
    """Return whether all entries of a vector are true, as a search for a false one."""
    return jnp.argmin(jnp.append(flags, False)) == flags.size
