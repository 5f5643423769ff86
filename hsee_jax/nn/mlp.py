"""A multilayer perceptron, for tables and other inputs that are not images.

Each layer is linear, followed by LayerNorm (Ba et al., arXiv:1607.06450) and ReLU. The
first layer flattens its input, so inputs of any shape will do.
"""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from hsee_jax.core.options import between
from hsee_jax.core.types import Array
from hsee_jax.nn.model import Model, cached_stage
from hsee_jax.nn.registry import NETWORKS

Hidden = Annotated[
    int,
    "values of a sample, a token or an interaction, in each layer",
    between(1, 65_536),
]
Depth = Annotated[int, "number of layers, and so of cuts", between(1, 1000)]


class DenseLayer(nn.Module):
    """A linear layer, LayerNorm and ReLU: ``[B, ...] -> float32 [B, features]``."""

    features: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the layer; rows do not mix, so the mask is not needed."""
        del mask, train
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        kernel_init = nn.initializers.he_normal()
        x = nn.Dense(self.features, kernel_init=kernel_init, name="linear")(x)
        return nn.relu(nn.LayerNorm(name="norm")(x))


class LinearHead(nn.Module):
    """A linear layer: ``[B, F] -> float32 [B, K]``; K is ``classes``."""

    classes: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        del mask, train
        return nn.Dense(self.classes, name="linear")(x)


@NETWORKS.register(summary="a perceptron for tables, or for inputs of any shape")
def mlp(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    hidden: Hidden = 128,
    depth: Depth = 8,
) -> Model:
    """Build a perceptron with an exit after each layer.

    Args:
      num_classes: K.
      input_shape: of a sample, of any rank.
      hidden: the outputs of each layer.
      depth: the number of layers, which are named ``dense1``, ``dense2`` and so on.
    """
    layer = cached_stage(DenseLayer(hidden))
    head = cached_stage(LinearHead(num_classes))
    return Model(
        stages=(layer,) * depth,
        exit_heads=(head,) * depth,
        final_head=head,
        layer_names=tuple(f"dense{number + 1}" for number in range(depth)),
        input_shape=tuple(input_shape),
    )
