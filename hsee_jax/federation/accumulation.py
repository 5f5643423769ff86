"""The gradient of a batch, in one pass or over several micro-batches.

After CollaPipe (arXiv:2509.19855), whose devices pass micro-batches on to each other;
here one device computes them one after another, in less memory. Without BatchNorm the
result is that of one pass. With BatchNorm each micro-batch has statistics of its own,
and moves the running ones [ours].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.errors import UserError
from hsee_jax.core.trees import add_trees, select
from hsee_jax.core.types import Array, Batch, Metrics, PyTree
from hsee_jax.federation.branch import Branch, parts_of, with_parts


class Passed(NamedTuple):
    """What a pass over some rows leaves, forward and backward."""

    grads: tuple[PyTree, ...]  # of the mean loss over the rows
    features: Array  # [B, ...]
    stats: tuple[PyTree, ...]  # the new batch statistics of each layer
    metrics: Metrics  # sums over the rows


def check_micro_batches(
    parts: int, batch_size: int, boundary: str, distill: float = 0.0
) -> None:
    """Refuse micro-batches that are not equal, or that no step reads.

    Args:
      parts: the number of micro-batches.
      batch_size: samples in a batch.
      boundary: see `Strategy`.
      distill: see `Strategy`.

    Raises:
      UserError: they are not allowed.
    """
    if parts > 1 and distill:
        raise UserError(
            f"micro_batches: {parts} is not allowed with distill; allowed is 1"
        )
    if parts > 1 and boundary != "detached":
        raise UserError(
            f"micro_batches: {parts} has no effect without a detached boundary; "
            "allowed is 1"
        )
    if batch_size % parts:
        raise UserError(
            f"micro_batches: {parts} is not allowed; allowed are divisors of the batch "
            f"of {batch_size} samples"
        )


def accumulate(
    run: Callable[[Branch, Batch], Passed], branch: Branch, batch: Batch, parts: int
) -> Passed:
    """Pass over a batch in parts, and return what one pass would leave.

    Args:
      run: passes over some rows.
      branch: its state; the weights stay as they are.
      batch: ``[B, ...]``.
      parts: the number of micro-batches, a divisor of B.
    """
    if parts == 1:
        return run(branch, batch)
    total = jnp.maximum(jnp.sum(batch.mask), 1).astype(jnp.float32)
    results = []
    leaves = [jnp.split(leaf, parts) for leaf in jax.tree.leaves(batch)]
    for rows in zip(*leaves, strict=True):
        passed = run(branch, Batch(*rows))
        # Padding alone leaves everything as it is; its own BatchNorm is not finite.
        some = passed.metrics.count > 0
        share = passed.metrics.count.astype(jnp.float32) / total
        layers = parts_of(branch)
        old = tuple(layer.batch_stats for layer in layers)
        stats = select(some, passed.stats, old)
        zeros = jax.tree.map(jnp.zeros_like, passed.grads)
        scaled = jax.tree.map(lambda g, s=share: g * s, passed.grads)
        features = jnp.where(some, passed.features, 0)
        grads = select(some, scaled, zeros)
        results.append(passed._replace(grads=grads, features=features))
        pairs = zip(layers, stats, strict=True)
        branch = with_parts(branch, tuple(p.replace(batch_stats=s) for p, s in pairs))
    return Passed(
        grads=add_trees([passed.grads for passed in results]),
        features=jnp.concatenate([passed.features for passed in results]),
        stats=stats,
        metrics=add_trees([passed.metrics for passed in results]),
    )
