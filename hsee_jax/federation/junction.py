"""Junctions: how a server reads the features of several views of one event as one."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.trees import expand_like
from hsee_jax.core.types import Array, Stage
from hsee_jax.federation.branch import Branch, BranchSpec
from hsee_jax.nn.mixer import Mixer
from hsee_jax.nn.model import from_linen

# Features [S, B, ...] and whether they are there, bool [S, B] -> merged, [B, ...].
MergeFn = Callable[[Array, Array], Array]


class Junction(NamedTuple):
    """Merges the views of an event at the cut."""

    merge: MergeFn
    mixer: Stage | None = None  # the server's first layer, if it mixes what is merged

    def widen(self, spec: BranchSpec) -> BranchSpec:
        """Return what a server computes on merged features.

        Args:
          spec: of the layers behind the cut, and of the final head.
        """
        first = () if self.mixer is None else (self.mixer,)
        return spec._replace(stages=(*first, *spec.stages))

    def behind(self, server: Branch) -> Branch:
        """Return the layers behind the cut and the final head, without the mixer."""
        return server if self.mixer is None else Branch(server.layers[1:], server.head)


def finite_views(features: Array, mask: Array) -> Array:
    """Return which views of events are there and finite, ``bool [S, B]``.

    Args:
      features: ``[S, B, ...]``.
      mask: ``bool [S, B]``, or ``[1, B]`` for all views; false on padding.
    """
    finite = jnp.isfinite(features)
    return mask & jnp.all(finite, axis=tuple(range(2, features.ndim)))


def mean_junction() -> Junction:
    """Average the features of the views that are there."""

    def merge(features: Array, present: Array) -> Array:
        there = expand_like(present, features)
        counts = jnp.sum(present, axis=0, dtype=jnp.float32)
        real = jnp.where(there, features, 0).astype(jnp.float32)
        total = jnp.sum(real, axis=0)
        mean = total / expand_like(jnp.maximum(counts, 1.0), total)
        return mean.astype(features.dtype)

    return Junction(merge)


def concat_junction(num_views: int, features: jax.ShapeDtypeStruct) -> Junction:
    """Concatenate the channels of all views, and mix them in a layer with weights.

    A view that is absent is zero. The layer is a `hsee_jax.nn.mixer.Mixer`.

    Args:
      num_views: V; the views are the first V of a stack.
      features: of one view, ``[1, ...]``.
    """

    def merge(features: Array, present: Array) -> Array:
        if len(features) < num_views:
            raise ValueError(f"features: {len(features)} views; allowed {num_views}")
        real = jnp.where(expand_like(present, features), features, 0)[:num_views]
        beside = jnp.moveaxis(real, 0, -2)  # [B, ..., V, C]
        return beside.reshape(*beside.shape[:-2], -1)

    return Junction(merge, from_linen(Mixer(num_views, features.shape[-1])))
