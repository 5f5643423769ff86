"""What the convolutional networks share: convolutions, normalisation, heads, options.

These follow the ResNets of torchvision: explicit padding, BatchNorm with decay 0.9 and
epsilon 1e-5, Kaiming normal convolutions (fan out) and uniform linear layers. Two
things differ: biases start at 0, and the running variance is the biased variance, as
everywhere in Flax.

Every module but `Conv` maps ``x [B, ..., C]`` and ``mask bool [B]`` to its output; rows
with a false mask do not reach the batch statistics. ``conv`` names a form of the
convolution, see `hsee_jax.nn.convolution`, and ``norm`` a normalisation, see
`hsee_jax.nn.Norm`.
"""

from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from hsee_jax.core.options import between, one_of
from hsee_jax.core.types import Array
from hsee_jax.nn.convolution import convolution
from hsee_jax.nn.convolution_choice import FORMS
from hsee_jax.nn.normalization import EPSILON, Norm

Width = Annotated[
    int,
    "channels of the first group of layers; the other groups have multiples of them",
    between(1, 65_536),
]
NormName = Annotated[
    str,
    "normalisation: BatchNorm, or GroupNorm, which has no statistics and so suffers "
    "less from unlike clients and small batches [ours]",
    one_of("batch", "group"),
]
# The help of both declarations: the flag is one, and shows the first.
_EXIT_HEAD = (
    "an exit: a pool and a linear layer; before them also a BatchNorm or, in ResNets, "
    "three small convolutions [ours]"
)
ExitHead = Annotated[str, _EXIT_HEAD, one_of("linear", "bn_linear")]
ResNetExitHead = Annotated[str, _EXIT_HEAD, one_of("linear", "bn_linear", "conv")]
DtypeName = Annotated[
    str,
    "dtype of the computation; parameters and statistics stay float32",
    one_of("float32", "bfloat16"),
]
ConvForm = Annotated[
    str,
    "form of the convolutions; all are equal up to rounding, and auto takes what "
    "`hsee tune` measured, or else chooses by backend and shape",
    one_of(FORMS),
]

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# The variance of U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
linear_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Conv(nn.Module):
    """A convolution without bias, with ``size // 2`` zeros on every side.

    It takes images ``[B, H, W, C]`` and series ``[B, T, C]``. With ``depthwise`` each
    channel has a window of its own, and ``features`` is C.
    """

    features: int
    size: int
    stride: int
    dtype: jnp.dtype
    conv: str
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Run the convolution."""
        pad, axes = self.size // 2, x.ndim - 2
        return nn.Conv(
            self.features,
            (self.size,) * axes,
            strides=self.stride,
            padding=((pad, pad),) * axes,
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=conv_init,
            conv_general_dilated=convolution(self.conv),
            name="conv",
        )(x)


class ConvNorm(nn.Module):
    """A convolution, a normalisation and an activation.

    With stride s it maps images ``[B, H, W, C] -> [B, H/s, W/s, features]`` and series
    ``[B, T, C] -> [B, T/s, features]``.
    """

    features: int
    size: int
    stride: int
    dtype: jnp.dtype
    conv: str
    norm: str = "batch"
    activation: Callable[[Array], Array] = nn.relu
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the layer."""
        conv = Conv(
            self.features, self.size, self.stride, self.dtype, self.conv, name="conv"
        )
        y = conv(x.astype(self.dtype))
        norm = Norm(self.norm, self.dtype, self.epsilon, name="bn")
        return self.activation(norm(y, mask, train=train))


class Head(nn.Module):
    """A global average pool and a linear layer: ``[B, ..., C] -> float32 [B, K]``.

    With ``batch_norm`` a BatchNorm normalises the features first; K is ``classes``.
    """

    classes: int
    batch_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        if self.batch_norm:
            x = Norm("batch", self.dtype, name="bn")(x, mask, train=train)
        pooled = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=jnp.float32)
        return nn.Dense(
            self.classes,
            dtype=jnp.float32,
            kernel_init=linear_init,
            name="linear",
        )(pooled)
