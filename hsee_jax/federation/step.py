"""One training step, as the functions that a client and a server run.

Between them lies the link (`hsee_jax.federation.branch.encode` and ``decode``)::

    client_forward -> encode -> | wire | -> decode -> server_step
    client_backward <- decode_gradient <- | wire | <- encode_gradient, if joint

With a detached boundary no gradient comes back, and the client continues at once: the
hierarchical training of Hetero-SplitEE (Oda et al., arXiv:2512.09313). `detached_step`
and `joint_step` call these functions one after another, to simulate both sides in one
program.

A branch refuses a step if the loss, a gradient or a batch statistic is not finite: it
stays as it is, and the loss in its metrics is NaN. Each side judges its own step; with
a joint boundary a server that refuses its step sends a gradient of NaN, so that the
client refuses as well.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from hsee_jax.core.types import Array, Batch, ExitMetrics, Metrics, PyTree
from hsee_jax.federation.accumulation import Passed, accumulate
from hsee_jax.federation.branch import (
    Branch,
    BranchSpec,
    LayerState,
    decode,
    decode_gradient,
    encode,
    encode_gradient,
    forward,
    message_bytes,
    parts_of,
    with_parts,
)
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.optim.optimizers import as_optimizer


class ForwardPass(struct.PyTreeNode):
    """A client's forward pass on a batch, with all that the backward pass needs."""

    features: Array  # float [B, ...], detached
    metrics: Metrics  # of the exit, before the update
    stats: tuple[PyTree, ...]  # new batch statistics, the exit head's last
    pullback: Any  # (gradient of the loss, of the features) -> of the parameters


class ServerStep(NamedTuple):
    """The result of a server's step."""

    server: Branch
    metrics: Metrics  # of the final head, before the update
    gradient: Array | None  # of the features that it received; None if detached


def client_forward(
    spec: BranchSpec, client: Branch, batch: Batch, *, exit_gradient: float = 1.0
) -> ForwardPass:
    """Run a client's layers and its exit.

    Args:
      spec: what the client computes.
      client: its state.
      batch: its data, ``[B, ...]``.
      exit_gradient: the share of the exit's gradient that reaches the layers.
    """

    def run(params: tuple[PyTree, ...]) -> tuple[tuple[Array, Array], tuple]:
        loss, features, stats, metrics = _loss(
            spec, _with_params(client, params), batch, exit_gradient
        )
        return (loss, features), (stats, metrics)

    (_, features), pullback, (stats, metrics) = jax.vjp(
        run, _params(client), has_aux=True
    )
    features = jax.lax.stop_gradient(features)
    return ForwardPass(features, metrics, stats, pullback)


def client_backward(
    spec: BranchSpec,
    client: Branch,
    passed: ForwardPass,
    learning_rate: Array,
    gradient: Array | None = None,
) -> tuple[Branch, Metrics]:
    """Take the client's step.

    Args:
      spec: what the client computes.
      client: its state in `client_forward`; only the codec's state may have changed.
      passed: the result of `client_forward`. A batch of padding changes nothing.
      learning_rate: ``float32 []``.
      gradient: the server's gradient of the features, ``[B, ...]``; None with a
        detached boundary.

    Returns:
      The new state, and the metrics of the exit.
    """
    if gradient is None:
        gradient = jnp.zeros_like(passed.features)
    (grads,) = passed.pullback((jnp.float32(1.0), gradient))
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

    def loss_fn(params: tuple[PyTree, ...], inputs: Array) -> tuple[Array, tuple]:
        loss, _, stats, metrics = _loss(
            spec, _with_params(server, params), batch._replace(inputs=inputs)
        )
        return loss, (stats, metrics)

    arguments = (0, 1) if joint else (0,)
    (grads, *rest), (stats, metrics) = jax.grad(loss_fn, arguments, has_aux=True)(
        _params(server), batch.inputs
    )
    server, metrics = take_step(spec, server, grads, stats, learning_rate, metrics)
    if not joint:
        return ServerStep(server, metrics, None)
    refused = jnp.isnan(metrics.loss_sum)
    gradient = jnp.where(refused, jnp.full_like(rest[0], jnp.nan), rest[0])
    return ServerStep(server, metrics, gradient)


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
        def loss_fn(params: tuple[PyTree, ...]) -> tuple[Array, tuple]:
            loss, *rest = _loss(spec, _with_params(branch, params), batch)
            return loss, tuple(rest)

        grads, rest = jax.grad(loss_fn, has_aux=True)(_params(branch))
        return Passed(grads, *rest)

    grads, features, stats, metrics = accumulate(run, branch, batch, spec.micro_batches)
    branch, metrics = take_step(spec, branch, grads, stats, learning_rate, metrics)
    return branch, jax.lax.stop_gradient(features), metrics


def detached_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
) -> tuple[Branch, Branch, ExitMetrics]:
    """Take one step of a client and of its server; no gradient crosses the cut.

    Args:
      client_spec: what the client computes.
      server_spec: what its server computes.
      client: layers 1..cut and the exit head.
      server: layers cut+1..L and the final head.
      batch: the client's data.
      learning_rates: of the client and of the server, ``float32 []`` each.

    Returns:
      The new client, the new server, and the metrics of both before their updates.
    """
    client, features, exit_metrics = branch_step(
        client_spec, client, batch, learning_rates[0]
    )
    message, client = encode(client_spec, client, features, batch.mask)
    decoded = batch._replace(inputs=decode(server_spec, message))
    server, server_metrics, _ = server_step(
        server_spec, server, decoded, learning_rates[1]
    )
    link = message_bytes(client_spec, message, batch.mask)
    return client, server, ExitMetrics(exit_metrics, server_metrics, link)


def joint_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
    *,
    exit_gradient: float = 0.0,
) -> tuple[Branch, Branch, ExitMetrics]:
    """Take one step like `detached_step`, but send the server's gradient back.

    Args:
      client_spec: see `detached_step`, like all arguments but the last.
      server_spec: what the server computes.
      client: layers 1..cut and the exit head.
      server: layers cut+1..L and the final head.
      batch: the client's data.
      learning_rates: of the client and of the server, ``float32 []`` each.
      exit_gradient: the share of the exit's gradient that reaches the client's layers.
        With 0 the exit head is a probe, and the layers train as if it were not there;
        with 1 both cross-entropies are summed, as in BranchyNet (Teerapittayanon et
        al., ICPR 2016).

    Returns:
      The new client, the new server, and the metrics of both before their updates.
    """
    passed = client_forward(client_spec, client, batch, exit_gradient=exit_gradient)
    message, client = encode(client_spec, client, passed.features, batch.mask)
    decoded = batch._replace(inputs=decode(server_spec, message))
    server, server_metrics, gradient = server_step(
        server_spec, server, decoded, learning_rates[1], joint=True
    )
    assert gradient is not None
    back = encode_gradient(client_spec, client, gradient, batch.mask)
    arrived = decode_gradient(client_spec, back, gradient.dtype)
    client, exit_metrics = client_backward(
        client_spec, client, passed, learning_rates[0], arrived
    )
    link = message_bytes(client_spec, message, batch.mask, back)
    return client, server, ExitMetrics(exit_metrics, server_metrics, link)


def _params(branch: Branch) -> tuple[PyTree, ...]:
    return tuple(part.params for part in parts_of(branch))


def _with_params(branch: Branch, params: tuple[PyTree, ...]) -> Branch:
    pairs = zip(parts_of(branch), params, strict=True)
    return with_parts(branch, tuple(part.replace(params=p) for part, p in pairs))


def _loss(
    spec: BranchSpec, branch: Branch, batch: Batch, head_gradient: float = 1.0
) -> tuple[Array, Array, tuple[PyTree, ...], Metrics]:
    """Return the mean loss of the head, features, batch statistics and metrics."""
    features, logits, stats = forward(
        spec, branch, batch.inputs, batch.mask, train=True, head_gradient=head_gradient
    )
    loss, metrics = masked_cross_entropy(logits, batch.labels, batch.mask)
    return loss, features, stats, metrics


def take_step(
    spec: BranchSpec,
    branch: Branch,
    grads: tuple[PyTree, ...],
    stats: tuple[PyTree, ...],
    learning_rate: Array,
    metrics: Metrics,
) -> tuple[Branch, Metrics]:
    """Update each layer with its optimizer, or no layer if a value is not finite."""
    results = jax.tree.leaves((metrics.loss_sum, grads, stats))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in results]))
    some = metrics.count > 0
    taken = some & finite
    update: Callable = as_optimizer(spec.optimizer).update

    def move(layer: LayerState, grad: PyTree, batch_stats: PyTree) -> LayerState:
        updates, opt_state = update(
            grad, layer.opt_state, layer.params, learning_rate=learning_rate
        )
        params = jax.tree.map(lambda p, u: p + learning_rate * u, layer.params, updates)
        moved = LayerState(params, batch_stats, opt_state)
        return jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, layer)

    parts = tuple(map(move, parts_of(branch), grads, stats))
    loss_sum = jnp.where(some & ~finite, jnp.nan, metrics.loss_sum)
    return with_parts(branch, parts), metrics._replace(loss_sum=loss_sum)
