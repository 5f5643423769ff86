"""One step of a client whose layers learn without labels.

After "Unifying Synergies between Self-supervised Learning and Dynamic Computation"
(arXiv:2301.09164). The layers train on VICReg between two augmented copies of each
sample, which the papers call views. The exit reads the features and changes nothing in
them, and only rows with labels go on to the server. No gradient comes back.

With a target for the width, the first copy passes through all channels of the layers,
and the second through those whose gates are open, see `hsee_jax.nn.gates`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.trees import select
from hsee_jax.core.types import (
    NO_LABEL,
    Array,
    Batch,
    Key,
    Metrics,
    PyTree,
)
from hsee_jax.federation.branch import (
    Branch,
    BranchSpec,
    forward,
    params_of,
    variables_of,
    with_params,
)
from hsee_jax.federation.step import take_step
from hsee_jax.nn.gates import flops_share, gates_of, width_loss
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.nn.vicreg import masked_vicreg

# The loss has the weights 25, 25 and 1. Divided by 25, it takes the learning rates of a
# cross-entropy, which its authors' optimizer, LARS, would find by itself [ours].
_SCALE = 25.0


class _Passed(NamedTuple):
    """What the copies leave behind when they have passed through a client."""

    loss: Array  # of the layers, float32 []
    features: Array  # of the first copy, [B, ...]
    # Of the exit, float32 [B, K]: to the first copy, and to a second that was gated.
    logits: tuple[Array, ...]
    stats: tuple[PyTree, ...]  # new batch statistics, the exit's last


# (spec, client, batch) -> what its two copies leave
_PassFn = Callable[[BranchSpec, Branch, Batch], _Passed]


def unlabelled_step(
    spec: BranchSpec,
    client: Branch,
    batch: Batch,
    learning_rate: Array,
    *,
    width_target: float | None = None,
) -> tuple[Branch, Batch, Metrics]:
    """Step a client's layers on all rows, and its exit on those with labels.

    The layers take the gradient of `hsee_jax.nn.masked_vicreg` between both copies, of
    which it reads the mean of each channel. The exit takes the gradient of the
    cross-entropy of its answers to the first copy. Both copies pass through the layers
    as one batch, so BatchNorm sees them together; with a target, they pass one after
    the other, each has BatchNorms of its own, and the exit takes the mean of both
    cross-entropies.

    Args:
      spec: what the client computes.
      client: its state. A batch of padding leaves it exactly as it is, and a batch
        without labels leaves the exit as it is.
      batch: inputs ``[B, 2, ...]``, two copies of each sample, labels and mask; with a
        target, also the key of the gates' noise.
      learning_rate: ``float32 []``.
      width_target: the share of their FLOPs that the layers are to keep; their loss
        grows by `hsee_jax.nn.width_loss`. None for a client without gates.

    Returns:
      The new state; the rows with labels, as a batch with the detached features of
      their first copy ``[B, ...]``; and the metrics of the exit on them, before the
      update.
    """
    labelled = batch.mask & (batch.labels != NO_LABEL)
    pass_copies: _PassFn = _as_one_batch
    if width_target is not None:
        pass_copies = partial(_at_two_widths, width_target)

    def loss_fn(params: tuple[PyTree, ...]) -> tuple[Array, tuple[_Passed, Metrics]]:
        passed = pass_copies(spec, with_params(client, params), batch)
        losses, metrics = zip(
            *(masked_cross_entropy(w, batch.labels, labelled) for w in passed.logits),
            strict=True,
        )
        own = sum(losses[1:], losses[0]) / len(losses)
        return passed.loss + own, (passed, metrics[0])

    grads, (passed, metrics) = jax.grad(loss_fn, has_aux=True)(params_of(client))
    rows = Metrics(passed.loss, jnp.int32(0), jnp.sum(batch.mask, dtype=jnp.int32))
    moved, taken = take_step(spec, client, grads, passed.stats, learning_rate, rows)
    some = jnp.any(labelled)
    head = select(some, moved.head, client.head)
    loss_sum = jnp.where(jnp.isnan(taken.loss_sum), jnp.nan, metrics.loss_sum)
    return (
        moved.replace(head=head),
        Batch(jax.lax.stop_gradient(passed.features), batch.labels, labelled),
        metrics._replace(loss_sum=loss_sum),
    )


def _as_one_batch(spec: BranchSpec, client: Branch, batch: Batch) -> _Passed:
    """Pass both copies through the layers together."""
    inputs = jnp.concatenate([batch.inputs[:, 0], batch.inputs[:, 1]])
    mask = jnp.concatenate([batch.mask, batch.mask])
    first, second = jnp.split(jnp.arange(len(mask)), 2)
    features, logits, stats = forward(
        spec, client, inputs, mask, train=True, head_gradient=0.0
    )
    means = _channels(features)
    loss = masked_vicreg(means[first], means[second], batch.mask) / _SCALE
    return _Passed(loss, features[first], (logits[first],), stats)


def _at_two_widths(
    target: float, spec: BranchSpec, client: Branch, batch: Batch
) -> _Passed:
    """Pass the first copy at the dense width, and the second at the gated width."""
    inputs = batch.inputs[:, 0]
    features, logits, stats = forward(
        spec, client, inputs, batch.mask, train=True, head_gradient=0.0
    )
    assert batch.key is not None, "the gates need a key for their noise"
    # The statistics are those that inference needs, of gates without noise.
    gated, _ = _gated_features(spec, client, stats[:-1], batch, batch.key)
    _, own = _gated_features(spec, client, stats[:-1], batch, None)
    loss = masked_vicreg(_channels(features), _channels(gated), batch.mask) / _SCALE
    layers = [variables_of(layer) for layer in client.layers]
    shape = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
    share = flops_share(spec.stages, layers, shape)
    loss = loss + width_loss(share, target)
    seen, head = jax.lax.stop_gradient(gated), variables_of(client.head)
    gated_logits, _ = spec.head.apply(head, seen, batch.mask, train=True)
    return _Passed(loss, features, (logits, gated_logits), (*own, stats[-1]))


def _gated_features(
    spec: BranchSpec,
    client: Branch,
    stats: Sequence[PyTree],
    batch: Batch,
    key: Key | None,
) -> tuple[Array, list[PyTree]]:
    """Return the gated features of the second copy, and the new batch statistics.

    Args:
      spec: what the client computes.
      client: its state.
      stats: its batch statistics after the dense pass.
      batch: inputs ``[B, 2, ...]``.
      key: of the gates' noise; None for gates without noise.
    """
    features, found = batch.inputs[:, 1], []
    layers = zip(spec.stages, client.layers, stats, strict=True)
    for number, (stage, layer, before) in enumerate(layers):
        variables = {"params": layer.params, "batch_stats": before}
        own = None if key is None else jax.random.fold_in(key, number)
        features, new = gates_of(stage).apply(
            variables, features, batch.mask, own, train=True
        )
        found.append(new)
    return features, found


def _channels(features: Array) -> Array:
    """Return the mean of each channel ``float32 [B, C]`` over the axes before it."""
    between = tuple(range(1, features.ndim - 1))
    return jnp.mean(features.astype(jnp.float32), axis=between)
