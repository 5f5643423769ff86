"""Gates on the channels of layers, and layers at the width that they leave open.

After "Unifying Synergies between Self-supervised Learning and Dynamic Computation"
(arXiv:2301.09164). A gate is open or closed, 1 or 0, and multiplies a channel between
two convolutions of a block. The channels between blocks have no gates. While training,
logistic noise (the difference of two Gumbel draws) opens and closes gates at random,
and the gradient passes through a gate as through a sigmoid. Without training a gate is
open where its logit is above 0. The dense pass and the gated pass share all
convolutions, and each has normalisations of its own.

Five things differ. The paper computes the logits of each sample from the input of the
block; here the logits are parameters, the same for all samples [ours]. So the open
channels are known after training, and an export can leave out the closed ones. A draw
of the noise is for a whole batch [ours]. The gates of a block share a shift, which is
added to their logits: like the last map of the paper's gate network, it moves them
together, at a rate that does not shrink with the number of channels [ours]. The share
of FLOPs in the loss, and the batch statistics of the gated pass, are those of the gates
without noise, which remain after training [ours].
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array, Gates, Key, Stage, Variables
from hsee_jax.nn.model import Model

WIDTHS = ("dense", "gated")

_TEMPERATURE = 2 / 3  # of the sigmoid that gives the gradient
# lambda, of the loss of the width, beside VICReg / 25 [ours]. The paper has 5, and
# trains for hundreds of epochs; with 5, some hundred steps miss the target.
_WEIGHT = 25.0


def open_gates(logits: Array, key: Key | None = None) -> Array:
    """Return which gates are open, 1 or 0, with the gradient of a sigmoid.

    Args:
      logits: ``float32 [C]``.
      key: of the noise; without a key, the gates with a logit above 0 are open.

    Returns:
      ``float32 [C]``. The gradient is that of ``sigmoid((logits + noise) / (2 / 3))``.
    """
    if key is not None:
        logits = logits + jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid(logits / _TEMPERATURE)
    slope = soft - jax.lax.stop_gradient(soft)  # exactly 0
    return (logits > 0).astype(logits.dtype) + slope


def width_loss(share: Array, target: float) -> Array:
    """Return 25 (share - target)^2: by how much a share of FLOPs misses its target."""
    return _WEIGHT * jnp.square(share - target)


def with_gates(model: Model) -> Model:
    """Return the network with gates in its layers; the dense pass stays the same.

    Raises:
      UserError: the network has no layers with gates, or has the weights of a file.
    """
    if not model.gated_stages:
        raise UserError(
            "network: it has no channel gates; allowed are networks with gates, such "
            "as resnet18 with norm batch, that start from random weights"
        )
    return model._replace(stages=model.gated_stages)


def has_gates(model: Model) -> bool:
    """Return whether all layers of a network have gates, see `with_gates`."""
    return all(stage.gates is not None for stage in model.stages)


def at_gated_width(model: Model) -> Model:
    """Return a network with gates whose pass is the gated one, for evaluation."""
    stages = (Stage(stage.init, gates_of(stage).apply) for stage in model.stages)
    return model._replace(stages=tuple(stages))


def widths_of(model: Model) -> tuple[Model, ...]:
    """Return a network, and the same `at_gated_width` if it has gates."""
    return (model, at_gated_width(model)) if has_gates(model) else (model,)


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
    """Return the FLOPs of some layers at their gated width, as a share of the dense.

    It counts the products in the convolutions, including products with padding. The
    gradient reaches the logits, as in `open_gates`.

    Args:
      stages: layers with gates.
      layers: their variables.
      inputs: the shape of the first layer's inputs, ``[1, ...]``.

    Returns:
      ``float32 []``, 0..1.
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
