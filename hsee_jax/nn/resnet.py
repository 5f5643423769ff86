"""The layers of ResNet-18 (He et al., CVPR 2016) and the heads, as Flax modules.

As in torchvision: explicit padding, BatchNorm with decay 0.9 and epsilon 1e-5, Kaiming
normal convolutions (fan out) and uniform linear layers. Three things differ: biases
start at 0; the running variance is the biased variance, as everywhere in Flax; and the
stem for small images is one 3x3 convolution of stride 1 without pooling, the usual
choice for CIFAR.

Every module maps ``x [B, H, W, C]`` and ``mask bool [B]`` to its output; rows with a
false mask do not reach the batch statistics. ``conv`` names a form of the convolution,
see `hsee_jax.nn.convolution`.
"""

from functools import partial
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hsee_jax.core.options import at_least, one_of
from hsee_jax.core.types import Array
from hsee_jax.nn.convolution import FORMS, convolution
from hsee_jax.nn.model import Model, from_linen
from hsee_jax.nn.registry import NETWORKS, images_only

ExitHead = Annotated[
    str,
    "an exit: a pool and a linear layer; or before them also a BatchNorm, or three "
    "small convolutions [ours]",
    one_of("linear", "bn_linear", "conv"),
]

_DECAY, _EPSILON = 0.9, 1e-5  # of BatchNorm
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# The variance of U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
_linear_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class _Conv(nn.Module):
    """A convolution without bias, with ``size // 2`` rows of zeros on every side."""

    features: int
    size: int
    stride: int
    dtype: jnp.dtype
    conv: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pad = self.size // 2
        return nn.Conv(
            self.features,
            (self.size, self.size),
            strides=self.stride,
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_conv_init,
            conv_general_dilated=convolution(self.conv),
            name="conv",
        )(x)


class _BatchNorm(nn.Module):
    """Batch normalisation over the real rows; statistics in float32.

    Flax computes the variance as E[x^2] - E[x]^2, which loses all digits where the mean
    is large against the deviation. Here x is first shifted by a value near its mean,
    which the variance does not depend on.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        return _Normalize(self.dtype, name="bn")(x, mask, train=train)


class _Normalize(nn.Module):
    """The variables of `_BatchNorm`, named as in `flax.linen.BatchNorm`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        used = mean.value, var.value
        if train:
            used = _moments(x.astype(jnp.float32), mask)
            if not self.is_initializing():
                mean.value = _DECAY * mean.value + (1 - _DECAY) * used[0]
                var.value = _DECAY * var.value + (1 - _DECAY) * used[1]
        factor = jax.lax.rsqrt(used[1] + _EPSILON) * scale
        centred = x.astype(jnp.float32) - used[0].reshape(1, 1, 1, -1)
        y = centred * factor.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)
        return y.astype(self.dtype)


def _moments(x: Array, mask: Array) -> tuple[Array, Array]:
    """Return mean and variance ``[C]`` over the real rows of ``[B, H, W, C]``."""
    rows = jnp.broadcast_to(mask.reshape(-1, 1, 1, 1), x.shape)
    shift = jax.lax.stop_gradient(jnp.mean(x[0], axis=(0, 1)))
    shifted = x - shift.reshape(1, 1, 1, -1)
    first = jnp.mean(shifted, axis=(0, 1, 2), where=rows)
    second = jnp.mean(jnp.square(shifted), axis=(0, 1, 2), where=rows)
    return first + shift, jnp.maximum(second - jnp.square(first), 0.0)


class Stem(nn.Module):
    """The first layer: ``[B, H, W, C] -> [B, H', W', features]``.

    With ``size`` 3 the image keeps its size; with 7 the convolution halves it, and a
    3x3 max-pool halves it once more.
    """

    features: int
    size: int
    dtype: jnp.dtype
    conv: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the stem."""
        large = self.size == 7
        conv = partial(_Conv, dtype=self.dtype, conv=self.conv, name="conv")
        x = conv(self.features, self.size, 2 if large else 1)(x.astype(self.dtype))
        x = nn.relu(_BatchNorm(self.dtype, name="bn")(x, mask, train=train))
        if large:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[B, H, W, C] -> [B, H/s, W/s, features]``.

    The shortcut is the identity, or a 1x1 convolution where the shape changes.
    """

    features: int
    stride: int
    dtype: jnp.dtype
    conv: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the block."""
        conv = partial(_Conv, self.features, dtype=self.dtype, conv=self.conv)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(1, self.stride, name="down")(x)
            shortcut = _BatchNorm(self.dtype, name="bn_down")(
                shortcut, mask, train=train
            )
        y = conv(3, self.stride, name="conv1")(x)
        y = nn.relu(_BatchNorm(self.dtype, name="bn1")(y, mask, train=train))
        y = conv(3, 1, name="conv2")(y)
        y = _BatchNorm(self.dtype, name="bn2")(y, mask, train=train)
        return nn.relu(y + shortcut)


class Head(nn.Module):
    """A global average pool and a linear layer: ``[B, H, W, C] -> float32 [B, K]``.

    With ``batch_norm`` a BatchNorm normalises the features first; K is ``classes``.
    """

    classes: int
    batch_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        if self.batch_norm:
            x = _BatchNorm(self.dtype, name="bn")(x, mask, train=train)
        pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(
            self.classes,
            dtype=jnp.float32,
            kernel_init=_linear_init,
            name="linear",
        )(pooled)


class ConvHead(nn.Module):
    """A bottleneck of three convolutions and a `Head`: ``[B, H, W, C] -> [B, K]``.

    Exits between the blocks of a network gain from layers of their own (Zhang et al.,
    ICCV 2019). Here a 1x1 convolution halves the channels, a 3x3 convolution halves the
    image, and a 1x1 convolution leads to 2 C channels, each with BatchNorm and ReLU
    [ours].
    """

    classes: int
    dtype: jnp.dtype
    conv: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        channels = x.shape[-1]
        half = max(1, channels // 2)
        shapes = ((half, 1, 1), (half, 3, 2), (2 * channels, 1, 1))
        for number, (features, size, stride) in enumerate(shapes, start=1):
            conv = partial(_Conv, dtype=self.dtype, conv=self.conv)
            x = conv(features, size, stride, name=f"conv{number}")(x)
            x = _BatchNorm(self.dtype, name=f"bn{number}")(x, mask, train=train)
            x = nn.relu(x)
        return Head(self.classes, False, self.dtype, name="head")(x, mask, train=train)


@NETWORKS.register(summary="ResNet-18 (He et al., CVPR 2016), 9 layers")
@images_only
def resnet18(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: Annotated[int, "channels of the first group of blocks", at_least(1)] = 64,
    stem: Annotated[
        str,
        "first layer: 3x3, or 7x7 and a max-pool; auto is 3x3 up to 64 pixels [ours]",
        one_of("auto", "3x3", "7x7"),
    ] = "auto",
    exit_head: ExitHead = "linear",
    dtype: Annotated[
        str,
        "dtype of the computation; parameters and statistics stay float32",
        one_of("float32", "bfloat16"),
    ] = "float32",
    conv: Annotated[
        str,
        "form of the convolutions; all are equal up to rounding, and auto chooses by "
        "backend and shape",
        one_of(FORMS),
    ] = "auto",
) -> Model:
    """Build ResNet-18 as 9 layers: a stem and 8 blocks, with the names of torchvision.

    Args:
      num_classes: K.
      input_shape: ``(H, W, C)``.
      width: channels of the first group; the later groups have 2, 4 and 8 times these.
      stem: ``"3x3"``, ``"7x7"``, or ``"auto"``: 3x3 up to 64 pixels, 7x7 above.
      exit_head: ``"linear"``, ``"bn_linear"`` with BatchNorm before the pool, or
        ``"conv"``, see `ConvHead`.
      dtype: of the computation; parameters, statistics and logits stay float32.
      conv: the form of the convolutions, see `hsee_jax.nn.convolution`.

    Returns:
      The model. With the defaults, 10 classes and 32x32x3 images its layers and final
      head have 11,173,962 parameters.
    """
    if stem == "auto":
        stem = "3x3" if max(input_shape[:2]) <= 64 else "7x7"
    compute = jnp.dtype(dtype)
    modules: list[Any] = [Stem(width, int(stem[0]), compute, conv)]
    names = ["stem"]
    for group in range(4):
        for block in range(2):
            stride = 2 if group > 0 and block == 0 else 1
            modules.append(BasicBlock(width * 2**group, stride, compute, conv))
            names.append(f"layer{group + 1}.{block}")
    exit_stage = from_linen(_exit_head(exit_head, num_classes, compute, conv))
    return Model(
        stages=tuple(map(from_linen, modules)),
        exit_heads=(exit_stage,) * len(modules),
        final_head=from_linen(Head(num_classes, False, compute)),
        layer_names=tuple(names),
        input_shape=tuple(input_shape),
    )


def _exit_head(kind: str, classes: int, dtype: jnp.dtype, conv: str) -> nn.Module:
    """Make the exit head of a kind, see `resnet18`."""
    if kind == "conv":
        return ConvHead(classes, dtype, conv)
    return Head(classes, kind == "bn_linear", dtype)
