"""The last layer of a head: where it is, what it reads, and another in its place.

A head is a pair of pure functions that hide their layers. What its last layer reads can
still be computed: with the identity as weights and zeros as biases, that layer returns
its inputs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array, PyTree, Stage, Variables

Path = tuple[str, ...]  # names from the top of a tree of parameters to a layer


def find_last(head: Stage, features: jax.ShapeDtypeStruct) -> Path:
    """Return the path of the linear layer that gives a head's logits.

    The layer is found by a trial with random weights.

    Args:
      head: ends in a layer with a ``kernel [F, K]`` and a ``bias [K]``, such as Flax's
        Dense.
      features: the shape and dtype of its inputs, ``[1, ...]``.

    Raises:
      UserError: the head does not end in such a layer.
    """
    inputs = _noise(0, features)
    mask = jnp.ones(len(inputs), bool)
    variables = head.init(jax.random.key(0), inputs)
    noise = enumerate(jax.tree.leaves(variables["params"]), start=1)
    shifts = [leaf + _noise(number, leaf) for number, leaf in noise]
    params = jax.tree.unflatten(jax.tree.structure(variables["params"]), shifts)
    variables = {**variables, "params": params}
    logits = head.apply(variables, inputs, mask, train=False)[0]
    for path in _linear(params, logits.shape[-1]):
        layer = layer_at(params, path)
        found = last_inputs(head, variables, path, inputs, mask) @ layer["kernel"]
        if np.allclose(found + layer["bias"][None], logits, rtol=0.02, atol=0.02):
            return path
    raise UserError(
        "network: its exits cannot be fitted, as they do not end in a linear layer "
        "with biases; allowed is a network whose heads end in a Dense"
    )


def last_inputs(
    head: Stage, variables: Variables, path: Path, features: Array, mask: Array
) -> Array:
    """Return what a head's last layer reads, ``float32 [B, F]``, at inference.

    Args:
      head: see `find_last`.
      variables: of the head.
      path: of the last layer.
      features: ``[B, ...]``, the inputs of the head.
      mask: ``bool [B]``, false on padding.
    """
    params = variables["params"]
    layer = layer_at(params, path)
    size, classes = layer["kernel"].shape
    count = -(-size // classes)
    units = jnp.eye(size, count * classes, dtype=layer["kernel"].dtype)
    zeros = jnp.zeros_like(layer["bias"])

    # Only the last layer depends on the weights, so only it runs more than once.
    def logits(kernel: Array) -> Array:
        own = {**variables, "params": with_layer(params, path, kernel, zeros)}
        return head.apply(own, features, mask, train=False)[0]

    with jax.default_matmul_precision("highest"):
        columns = jax.vmap(logits, in_axes=1, out_axes=1)(
            units.reshape(size, count, classes)
        )
    return columns.reshape(len(features), -1)[:, :size]


def layer_at(params: PyTree, path: Path) -> Mapping[str, Any]:
    """Return the parameters of the layer at a path."""
    for name in path:
        params = params[name]
    return params


def with_layer(params: PyTree, path: Path, kernel: Any, bias: Any) -> PyTree:
    """Return the parameters with another kernel and bias at a path."""
    flat = flatten_dict(params)
    return unflatten_dict({**flat, (*path, "kernel"): kernel, (*path, "bias"): bias})


def _linear(params: PyTree, classes: int) -> list[Path]:
    """Return the paths of all linear layers with as many outputs as classes."""
    if not isinstance(params, Mapping):
        return []
    flat = flatten_dict(params)
    return [
        path[:-1]
        for path, leaf in flat.items()
        if path[-1] == "kernel"
        and leaf.ndim == 2
        and leaf.shape[1] == classes
        and (*path[:-1], "bias") in flat
    ]


def _noise(seed: int, like: Any) -> Array:
    """Draw normal values of a shape and a dtype."""
    values = np.random.default_rng(seed).normal(size=like.shape)
    return jnp.asarray(values, like.dtype)
