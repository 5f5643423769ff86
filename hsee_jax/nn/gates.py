"""Gates on the channels of layers, and layers at the width that they leave open.

After "Unifying Synergies between Self-supervised Learning and Dynamic Computation"
(arXiv:2301.09164). A gate is open or closed, 1 or 0, and multiplies a channel between
two convolutions of a block. The channels between blocks have no gates. While training,
logistic noise (the difference of two Gumbel draws) opens and closes gates at random,
and the gradient passes through a gate as through a sigmoid. Without training a gate is
open where its logit is above 0. The dense pass and the gated pass share all
convolutions, and each has normalisations of its own.

Four things differ. The paper computes the logits of each sample from the input of the
block; here the logits are parameters, the same for all samples [ours]. So the open
channels are known after training, and an export can leave out the closed ones. A draw
of the noise is for a whole batch [ours]. The gates of a block share a shift, which is
added to their logits: like the last map of the paper's gate network, it moves them
together, at a rate that does not shrink with the number of channels [ours]. The share
of FLOPs in the loss is that of the gates without noise, which is the share after
training [ours].
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array, Gates, Key, PyTree, Stage, Variables
from hsee_jax.nn.model import Model, from_linen

WIDTHS = ("dense", "gated")

_GATES, _NORMS = "gates", "gated"  # the gates of a layer, its norms of the gated pass
_TEMPERATURE = 2 / 3  # of the sigmoid that gives the gradient
_WEIGHT = 5.0  # lambda, of the loss of the width


class Between(NamedTuple):
    """The channels between two convolutions of a layer, by the names of its modules."""

    before: str  # the convolution that makes them
    norm: str  # the normalisation behind it
    after: str  # the convolution that reads them


def open_gates(logits: Array, key: Key | None = None) -> Array:
    """Return which gates are open, 1 or 0, with the gradient of a sigmoid.

    Args:
      logits: ``float32 [C]``.
      key: of the noise; without one, the gates with a logit above 0 are open.

    Returns:
      ``float32 [C]``. The gradient is that of ``sigmoid((logits + noise) / (2 / 3))``.
    """
    if key is not None:
        logits = logits + jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid(logits / _TEMPERATURE)
    slope = soft - jax.lax.stop_gradient(soft)  # exactly 0
    return (logits > 0).astype(logits.dtype) + slope


def width_loss(share: Array, target: float) -> Array:
    """Return 5 (share - target)^2: by how much a share of FLOPs misses its target."""
    return _WEIGHT * jnp.square(share - target)


def with_gates(model: Model) -> Model:
    """Return a network whose layers have gates; its dense pass is that of the network.

    Raises:
      UserError: the network has no layers with gates.
    """
    if not model.gated_stages:
        raise UserError(
            "network: it has no channel gates; allowed are networks with gates, such "
            "as resnet18 with norm batch"
        )
    return model._replace(stages=model.gated_stages)


def has_gates(model: Model) -> bool:
    """Return whether all layers of a network have gates, see `with_gates`."""
    return all(stage.gates is not None for stage in model.stages)


def at_gated_width(model: Model) -> Model:
    """Return a network with gates whose pass is the gated one, for evaluation."""
    stages = (Stage(stage.init, gates_of(stage).apply) for stage in model.stages)
    return model._replace(stages=tuple(stages))


def without_gates(
    model: Model, layers: Sequence[Variables], width: str
) -> tuple[Model, tuple[Variables, ...]]:
    """Return a network without gates that computes one pass of a network with gates.

    Args:
      model: a network with gates.
      layers: the variables of its layers, on the host.
      width: of `WIDTHS`. At the gated width the channels whose gates are closed are not
        in the network.

    Returns:
      The network, and the variables of its layers.
    """
    pairs = [
        (gates_of(stage).narrow if width == "gated" else gates_of(stage).dense)(own)
        for stage, own in zip(model.stages, layers, strict=True)
    ]
    stages, variables = zip(*pairs, strict=True)
    return model._replace(stages=stages, gated_stages=()), variables


def flops_share(
    stages: Sequence[Stage], layers: Sequence[Variables], inputs: jax.ShapeDtypeStruct
) -> Array:
    """Return the FLOPs of some layers at their gated width, relative to all of them.

    It counts the products in the convolutions, and those with padding as well. The
    gradient reaches the logits, as in `open_gates`.

    Args:
      stages: layers with gates.
      layers: their variables.
      inputs: the shape of the first layer's inputs, ``[1, ...]``.

    Returns:
      ``float32 []``.
    """
    gated, dense = jnp.float32(0.0), 0
    mask = jax.ShapeDtypeStruct((1,), jnp.bool_)
    for stage, variables in zip(stages, layers, strict=True):
        some, every = gates_of(stage).products(variables, inputs)
        gated, dense = gated + some, dense + every
        run = partial(stage.apply, train=False)
        inputs, _ = jax.eval_shape(run, variables, inputs, mask)
    return gated / dense


def gates_of(stage: Stage) -> Gates:
    """Return the gates of a layer that has gates."""
    assert stage.gates is not None, "this layer has no gates, see `with_gates`"
    return stage.gates


def gated_from_linen(module: Any, between: Sequence[Between] = ()) -> Stage:
    """Make a layer with gates of a Flax module, see `from_linen`.

    Args:
      module: with the attribute ``inner``, the number of channels in each place, if
        there is a place.
      between: the places of the gates; each has as many gates as there are channels.
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
    """Draw the gates of the channels that a convolution makes; half of them open."""
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
        params[place.after] = jax.tree.map(
            lambda kernel, gates=gates: kernel * _rows(gates, kernel),
            params[place.after],
        )
    return {"params": params, "batch_stats": {**variables["batch_stats"][_NORMS]}}


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
    for name, outputs in found["intermediates"].items():
        (kernel,), (output,) = map(jax.tree.leaves, (own["params"][name], outputs))
        count = kernel.size * int(np.prod(output.shape[1:-1]))
        gated, dense = gated + count * shares.get(name, 1.0), dense + count
    return gated, dense


def _narrow(
    module: Any, between: tuple[Between, ...], variables: Variables
) -> tuple[Stage, Variables]:
    """Return a layer of the open channels, see `Gates`.

    If no channel is open, one stays, of which the next convolution reads 0 times.
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
    return jax.tree.map(lambda leaf: np.take(leaf, kept, axis), tree)
