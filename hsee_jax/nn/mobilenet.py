"""The layers of MobileNetV2 (Sandler et al., CVPR 2018), as Flax modules.

They follow torchvision, with these differences. Initial weights and BatchNorm are as
`hsee_jax.nn.layers` says, so linear layers start from a uniform distribution, not a
normal one. There is no dropout before the classes. Other widths scale the channels
without rounding to multiples of 8. For images of up to 64 pixels the stem and the
second group keep the size of the image, so that 32 pixels become 4 [ours].
`hsee_jax.nn.mobilenet_v3` uses the same blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from hsee_jax.core.types import Array
from hsee_jax.nn.convolution import convolution
from hsee_jax.nn.layers import (
    Conv,
    ConvForm,
    ConvNorm,
    DtypeName,
    ExitHead,
    Head,
    NormName,
    Width,
    conv_init,
)
from hsee_jax.nn.model import Model, cached_stage
from hsee_jax.nn.normalization import EPSILON, Norm
from hsee_jax.nn.registry import NETWORKS, images_only

# Table 2 of the paper. Each group of blocks has an expansion, channels at width 32, a
# number of blocks, and a stride.
_GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST = 1280  # channels of the last layer at width 32
_NAMES = (
    "stem",
    *(f"layer{g + 1}.{n}" for g, group in enumerate(_GROUPS) for n in range(group[2])),
    "last",
)


class SqueezeExcitation(nn.Module):
    """Weigh the channels of each sample (Hu et al., CVPR 2018): ``[B, H, W, C]``.

    The mean of each channel passes a 1x1 convolution to ``features`` channels, ReLU, a
    1x1 convolution to C channels and a hard sigmoid, which gives the weights.
    """

    features: int
    dtype: jnp.dtype
    conv: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Run the layer."""
        conv = partial(
            nn.Conv,
            kernel_size=(1, 1),
            padding=0,
            dtype=self.dtype,
            kernel_init=conv_init,
            conv_general_dilated=convolution(self.conv),
        )
        mean = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        hidden = nn.relu(conv(self.features, name="fc1")(mean))
        return x * nn.hard_sigmoid(conv(x.shape[-1], name="fc2")(hidden))


class InvertedResidual(nn.Module):
    """A 1x1, a depthwise and a 1x1 convolution, the last without activation.

    The shapes are ``[B, H, W, C] -> [B, H/s, W/s, features]``, with ``inner`` channels
    between; where ``inner`` is C there is no first convolution. If ``squeeze`` is not
    0, a `SqueezeExcitation` with this many channels precedes the last convolution. The
    block adds its input to its output if the stride is 1 and both have the same shape.
    """

    features: int
    stride: int
    inner: int
    dtype: jnp.dtype
    conv: str
    norm: str = "batch"
    size: int = 3  # of the depthwise window
    activation: Callable[[Array], Array] = nn.relu
    squeeze: int = 0
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the block."""
        conv = partial(Conv, dtype=self.dtype, conv=self.conv)
        norm = partial(Norm, self.norm, self.dtype, self.epsilon)
        inner, y = self.inner, x
        if inner != x.shape[-1]:
            y = conv(inner, 1, 1, name="expand")(y)
            y = self.activation(norm(name="bn_expand")(y, mask, train=train))
        y = conv(inner, self.size, self.stride, depthwise=True, name="depthwise")(y)
        y = self.activation(norm(name="bn_depthwise")(y, mask, train=train))
        if self.squeeze:
            y = SqueezeExcitation(self.squeeze, self.dtype, self.conv, name="se")(y)
        y = conv(self.features, 1, 1, name="project")(y)
        y = norm(name="bn_project")(y, mask, train=train)
        return x + y if self.stride == 1 and x.shape == y.shape else y


@NETWORKS.register(summary="MobileNetV2 (Sandler et al., CVPR 2018), 19 layers")
@images_only
def mobilenet_v2(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: Width = 32,
    norm: NormName = "batch",
    exit_head: ExitHead = "linear",
    dtype: DtypeName = "float32",
    conv: ConvForm = "auto",
) -> Model:
    """Build MobileNetV2 as 19 layers: a stem, 17 blocks, and a 1x1 convolution.

    Args:
      num_classes: K.
      input_shape: ``(H, W, C)``.
      width: channels of the stem; the other layers scale with it, and 32 gives the
        network of the paper.
      norm: ``"batch"``, or ``"group"`` for GroupNorm, see `hsee_jax.nn.Norm`.
      exit_head: see `hsee_jax.nn.resnet18`.
      dtype: of the computation; parameters, statistics and logits stay float32.
      conv: the form of the convolutions, see `hsee_jax.nn.convolution`.

    Returns:
      The model. With the defaults, 10 classes and three colours its layers and final
      head have 2,236,682 parameters.
    """
    compute, small = jnp.dtype(dtype), max(input_shape[:2]) <= 64
    common = compute, conv, norm

    def scaled(channels: int) -> int:
        return max(1, round(channels * width / 32))

    modules: list[nn.Module] = [
        ConvNorm(width, 3, 1 if small else 2, *common, nn.relu6)
    ]
    before = width
    for group, (expansion, channels, count, stride) in enumerate(_GROUPS):
        for number in range(count):
            step = stride if number == 0 and not (small and group == 1) else 1
            sizes = scaled(channels), step, expansion * before
            block = InvertedResidual(*sizes, *common, activation=nn.relu6)
            modules.append(block)
            before = sizes[0]
    modules.append(ConvNorm(scaled(_LAST), 1, 1, *common, nn.relu6))
    exit_stage = cached_stage(Head(num_classes, exit_head == "bn_linear", compute))
    return Model(
        stages=tuple(map(cached_stage, modules)),
        exit_heads=(exit_stage,) * len(modules),
        final_head=cached_stage(Head(num_classes, False, compute)),
        layer_names=_NAMES,
        input_shape=tuple(input_shape),
        weight_names=(_torchvision_names, _timm_names),
    )


_BLOCK = (
    "expand/conv",
    "bn_expand",
    "depthwise/conv",
    "bn_depthwise",
    "project/conv",
    "bn_project",
)


def paired(modules: Sequence[str], places: Sequence[str]) -> dict[str, str]:
    """Map our module names to a library's, for BatchNorm and for GroupNorm."""
    names = dict(zip(modules, places, strict=True))
    norms = [name for name in modules if name.startswith("bn")]
    return names | {f"{n}/{kind}": names[n] for n in norms for kind in ("bn", "gn")}


def _torchvision_names(layer: str) -> dict[str, str]:
    """Return the modules of a layer as torchvision names them."""
    if layer == "head":
        return {"linear": "classifier.1"}
    number = _NAMES.index(layer)
    if layer in ("stem", "last"):
        places = [f"features.{number}.0", f"features.{number}.1"]
        return paired(("conv/conv", "bn"), places)
    inner = [f"features.{number}.conv.{i}.{j}" for i in (0, 1) for j in (0, 1)]
    after = [f"features.{number}.conv.{i}" for i in (2, 3)]
    if number == 1:  # without an expansion
        inner, after = ["", "", *inner[:2]], [f"features.1.conv.{i}" for i in (1, 2)]
    return paired(_BLOCK, [*inner, *after])


def _timm_names(layer: str) -> dict[str, str]:
    """Return the modules of a layer as timm names them."""
    if layer == "head":
        return {"linear": "classifier"}
    if layer in ("stem", "last"):
        first = layer == "stem"
        places = ["conv_stem", "bn1"] if first else ["conv_head", "bn2"]
        return paired(("conv/conv", "bn"), places)
    group, number = layer.removeprefix("layer").split(".")
    names = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    if group == "1":
        names = ["", "", "conv_dw", "bn1", "conv_pw", "bn2"]
    places = [f"blocks.{int(group) - 1}.{number}.{name}" for name in names]
    return paired(_BLOCK, places)
