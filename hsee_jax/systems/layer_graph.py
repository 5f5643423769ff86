"""A small graph network over the layers that predicts accuracy.

After GCN-NAS (arXiv:2004.08423), which predicts the accuracy of an architecture by
graph convolutions over its operations. Here the graph is the chain of the layers; two
convolutions with symmetric normalisation pass features between neighbours, and the mean
over the layers is read out beside the settings. Sizes and training are ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hsee_jax.core.types import Array, PyTree
from hsee_jax.systems.cut_features import Inputs, Predict
from hsee_jax.systems.quantities import Bools, Floats

_WIDTH = 16
_STEPS = 200
_OPTIMIZER = optax.adamw(0.03, weight_decay=0.01)


class _Weights(NamedTuple):
    first: Array  # [features + 1, width]
    second: Array  # [width, width]
    readout: Array  # [width + settings + 1]


def fit_graph(inputs: Inputs, values: Floats, kept: Bools) -> Predict:
    """Fit the graph network to the rows that the mask keeps, by full-batch AdamW."""
    mean, scale = values[kept].mean(), max(float(values[kept].std()), 1e-9)
    targets = jnp.asarray((values - mean) / scale, jnp.float32)
    shares = jnp.asarray(kept / kept.sum(), jnp.float32)
    weights = _train(*_arrays(inputs), targets, shares)

    def predict(inputs: Inputs) -> Floats:
        outputs = _apply(weights, *_arrays(inputs))
        return np.asarray(outputs, float) * scale + mean

    return predict


def _arrays(inputs: Inputs) -> tuple[Array, Array]:
    """Return nodes and settings in float32, each with a constant feature."""
    return _with_constant(inputs.layers), _with_constant(inputs.settings)


def _with_constant(part: Floats) -> Array:
    constant = np.ones((*part.shape[:-1], 1))
    return jnp.asarray(np.concatenate([part, constant], axis=-1), jnp.float32)


@jax.jit
def _train(nodes: Array, settings: Array, targets: Array, shares: Array) -> _Weights:
    def loss(weights: _Weights) -> Array:
        return jnp.sum(shares * (_apply(weights, nodes, settings) - targets) ** 2)

    def step(_: int, carry: tuple[_Weights, PyTree]) -> tuple[_Weights, PyTree]:
        weights, state = carry
        updates, state = _OPTIMIZER.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    weights = _init(nodes.shape[-1], settings.shape[-1])
    carry = (weights, _OPTIMIZER.init(weights))
    return jax.lax.fori_loop(0, _STEPS, step, carry)[0]


def _init(features: int, settings: int) -> _Weights:
    first, second = jax.random.split(jax.random.key(0))
    return _Weights(
        jax.random.normal(first, (features, _WIDTH)) / np.sqrt(features),
        jax.random.normal(second, (_WIDTH, _WIDTH)) / np.sqrt(_WIDTH),
        jnp.zeros(_WIDTH + settings),
    )


@jax.jit
def _apply(weights: _Weights, nodes: Array, settings: Array) -> Array:
    """Return the outputs ``[n]`` for nodes ``[n, L, features + 1]``."""
    passes = _neighbours(nodes.shape[1])
    hidden = jax.nn.relu(jnp.einsum("kl,nlf,fw->nkw", passes, nodes, weights.first))
    hidden = jax.nn.relu(jnp.einsum("kl,nlf,fw->nkw", passes, hidden, weights.second))
    read = jnp.concatenate([hidden.mean(axis=1), settings], axis=1)
    return read @ weights.readout


def _neighbours(layers: int) -> Array:
    """Return ``D^-1/2 (A + I) D^-1/2`` of the chain, ``[L, L]``."""
    near = np.eye(layers) + np.eye(layers, k=1) + np.eye(layers, k=-1)
    root = 1 / np.sqrt(near.sum(axis=0))
    return jnp.asarray(near * np.outer(root, root), jnp.float32)
