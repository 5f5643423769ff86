"""Layers with gates, made from Flax modules; see `hsee_jax.nn.gates`.

A layer with gates has the parameters of its module, the gates, and a second set of
normalisations. Its gated pass is the pass of the module with other parameters: the
second set, and kernels multiplied by the gates of the channels that they read.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Array, Gates, Key, PyTree, Stage, Variables
from hsee_jax.nn.gates import open_gates
from hsee_jax.nn.model import from_linen

_GATES, _NORMS = "gates", "gated"  # the gates of a layer, its norms of the gated pass


class Between(NamedTuple):
    """The channels between two convolutions of a layer, by the names of its modules."""

    before: str  # the convolution that makes them
    norm: str  # the normalisation behind it
    after: str  # the convolution that reads them


def gated_from_linen(module: Any, between: Sequence[Between] = ()) -> Stage:
    """Make a layer with gates from a Flax module, see `from_linen`.

    Args:
      module: the module. If ``between`` is not empty, it has the attribute ``inner``,
        a tuple of the number of channels at each place.
      between: the places of the gates; each channel of a place gets a gate.
    """
    plain = from_linen(module)

    def init(key: Key, inputs: Array) -> Variables:
        drawn = plain.init(key, inputs)
        params, stats = drawn["params"], drawn["batch_stats"]
        gates = {
            place.before: _draw(jax.random.fold_in(key, n), params[place.before])
            for n, place in enumerate(between)
        }
        norms = {name: params[name] for name in stats}
        return {
            "params": {**params, _GATES: gates, _NORMS: norms},
            "batch_stats": {**stats, _NORMS: dict(stats)},
        }

    def apply(
        variables: Variables, inputs: Array, mask: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        outputs, stats = plain.apply(_dense(variables), inputs, mask, train=train)
        return outputs, {**stats, _NORMS: variables["batch_stats"][_NORMS]}

    def gated(
        variables: Variables,
        inputs: Array,
        mask: Array,
        key: Key | None = None,
        *,
        train: bool,
    ) -> tuple[Array, PyTree]:
        own = _gated(variables, _open(variables, between, key), between)
        outputs, stats = plain.apply(own, inputs, mask, train=train)
        return outputs, {**variables["batch_stats"], _NORMS: stats}

    gates = Gates(
        gated,
        partial(_products, module, tuple(between)),
        lambda variables: (plain, _dense(variables)),
        partial(_narrow, module, tuple(between)),
    )
    return Stage(init, apply, gates)


def _draw(key: Key, before: PyTree) -> PyTree:
    """Draw the gates of a convolution's outputs, each open with probability 1/2."""
    channels = jax.tree.leaves(before)[0].shape[-1]
    return {
        "logits": jax.random.normal(key, (channels,), jnp.float32),
        "shift": jnp.zeros((), jnp.float32),
    }


def _open(
    variables: Variables, between: Sequence[Between], key: Key | None = None
) -> list[Array]:
    """Return which channels are open, ``float32 [C]`` for each place."""
    found = []
    for n, place in enumerate(between):
        own = variables["params"][_GATES][place.before]
        draw = None if key is None else jax.random.fold_in(key, n)
        found.append(open_gates(own["logits"] + own["shift"], draw))
    return found


def _dense(variables: Variables) -> dict[str, dict[str, PyTree]]:
    """Return the variables of a layer as if it had no gates."""
    return {
        kind: {name: own for name, own in tree.items() if name not in (_GATES, _NORMS)}
        for kind, tree in variables.items()
    }


def _gated(
    variables: Variables, opened: Sequence[Array], between: Sequence[Between]
) -> dict[str, dict[str, PyTree]]:
    """Return variables with which the dense pass computes the gated one.

    They have the norms of the gated pass, and kernels that read 0 times the channels
    whose gates are closed.
    """
    own = _dense(variables)
    params = {**own["params"], **variables["params"][_NORMS]}
    for place, gates in zip(between, opened, strict=True):
        params[place.after] = jax.tree.map_with_path(
            lambda path, leaf, gates=gates: (
                leaf * _rows(gates, leaf) if _is_kernel(path) else leaf
            ),
            params[place.after],
        )
    return {"params": params, "batch_stats": {**variables["batch_stats"][_NORMS]}}


def _is_kernel(path: Sequence[Any]) -> bool:
    return path[-1].key == "kernel"


def _rows(gates: Array, kernel: Array) -> Array:
    """Return gates ``[C]`` in the shape of a kernel ``[..., C, F]``."""
    return gates.reshape(*(1,) * (kernel.ndim - 2), -1, 1)


def _products(
    module: Any,
    between: tuple[Between, ...],
    variables: Variables,
    inputs: jax.ShapeDtypeStruct,
) -> tuple[Array, int]:
    """Return the products of a sample in a layer, see `Gates`."""
    run = partial(
        module.apply,
        train=False,
        mutable=["intermediates"],
        capture_intermediates=lambda own, _: isinstance(own, nn.Conv),
    )
    mask, own = jax.ShapeDtypeStruct((1,), jnp.bool_), _dense(variables)
    _, found = jax.eval_shape(run, own, inputs, mask)
    shares: dict[str, Array] = {}
    opened = _open(variables, between)
    for place, gates in zip(between, opened, strict=True):
        for name in (place.before, place.after):
            shares[name] = shares.get(name, jnp.float32(1.0)) * jnp.mean(gates)
    gated, dense = jnp.float32(0.0), 0
    for name, outputs in found.get("intermediates", {}).items():
        leaves = jax.tree.leaves_with_path(own["params"][name])
        (kernel,) = (leaf for path, leaf in leaves if _is_kernel(path))
        (output,) = jax.tree.leaves(outputs)
        count = kernel.size * int(np.prod(output.shape[1:-1]))
        gated, dense = gated + count * shares.get(name, 1.0), dense + count
    return gated, dense


def _narrow(
    module: Any, between: tuple[Between, ...], variables: Variables
) -> tuple[Stage, Variables]:
    """Return a layer of the open channels, see `Gates`.

    If no channel is open, one stays, and the next convolution multiplies it by 0.
    """
    opened = [np.asarray(gates) for gates in _open(variables, between)]
    own = _gated(variables, opened, between)  # type: ignore[arg-type]
    params, stats = own["params"], own["batch_stats"]
    inner = []
    for place, gates in zip(between, opened, strict=True):
        kept = np.flatnonzero(gates) if gates.any() else np.zeros(1, np.int64)
        inner.append(len(kept))
        params[place.before] = _taken(params[place.before], kept, -1)
        params[place.after] = _taken(params[place.after], kept, -2)
        params[place.norm] = _taken(params[place.norm], kept, -1)
        stats[place.norm] = _taken(stats[place.norm], kept, -1)
    if between:
        module = module.clone(inner=tuple(inner))
    return from_linen(module), own


def _taken(tree: PyTree, kept: Any, axis: int) -> Mapping[str, PyTree]:
    """Take channels of an axis, which counts from the end; a bias has only the last."""

    def take(leaf: Array) -> Any:
        return np.take(leaf, kept, axis) if leaf.ndim >= -axis else leaf

    return jax.tree.map(take, tree)
