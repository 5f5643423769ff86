"""The layers of MobileNetV3-small (Howard et al., ICCV 2019), as Flax modules.

They follow torchvision, with the differences that `hsee_jax.nn.mobilenet` names and one
more: BatchNorm decays by 0.9, as in our other networks, and not by 0.99. For images of
up to 64 pixels the stem and the first block keep the size of the image, so that 32
pixels become 4 [ours].
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from hsee_jax.core.types import Array
from hsee_jax.nn.layers import (
    ConvForm,
    ConvNorm,
    DtypeName,
    ExitHead,
    Head,
    NormName,
    Width,
    linear_init,
)
from hsee_jax.nn.mobilenet import InvertedResidual, paired
from hsee_jax.nn.model import Model, cached_stage
from hsee_jax.nn.registry import NETWORKS, images_only


class _Block(NamedTuple):
    """A row of table 2 of the paper, with channels at width 16."""

    name: str
    size: int  # of the depthwise window
    inner: int
    features: int
    squeeze: int  # channels of the squeeze, 0 for none
    swish: bool  # hard-swish, else ReLU
    stride: int


_BLOCKS = (
    _Block("layer1.0", 3, 16, 16, 8, False, 2),
    _Block("layer2.0", 3, 72, 24, 0, False, 2),
    _Block("layer2.1", 3, 88, 24, 0, False, 1),
    _Block("layer3.0", 5, 96, 40, 24, True, 2),
    _Block("layer3.1", 5, 240, 40, 64, True, 1),
    _Block("layer3.2", 5, 240, 40, 64, True, 1),
    _Block("layer4.0", 5, 120, 48, 32, True, 1),
    _Block("layer4.1", 5, 144, 48, 40, True, 1),
    _Block("layer5.0", 5, 288, 96, 72, True, 2),
    _Block("layer5.1", 5, 576, 96, 144, True, 1),
    _Block("layer5.2", 5, 576, 96, 144, True, 1),
)
_LAST, _HIDDEN = 576, 1024  # channels behind the blocks, and in the final head
_EPSILON = 1e-3  # of the normalisations in its layers
_NAMES = ("stem", *(block.name for block in _BLOCKS), "last")


class HiddenHead(nn.Module):
    """A global average pool and two linear layers: ``[B, H, W, C] -> float32 [B, K]``.

    Between them are ``features`` values with hard-swish; K is ``classes``.
    """

    classes: int
    features: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        hidden = nn.Dense(self.features, kernel_init=linear_init, name="hidden")
        linear = nn.Dense(self.classes, kernel_init=linear_init, name="linear")
        return linear(nn.hard_swish(hidden(pooled)))


@NETWORKS.register(summary="MobileNetV3-small (Howard et al., ICCV 2019), 13 layers")
@images_only
def mobilenet_v3_small(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: Width = 16,
    norm: NormName = "batch",
    exit_head: ExitHead = "linear",
    dtype: DtypeName = "float32",
    conv: ConvForm = "auto",
) -> Model:
    """Build MobileNetV3-small as 13 layers: a stem, 11 blocks, and a 1x1 convolution.

    Args:
      num_classes: K.
      input_shape: ``(H, W, C)``.
      width: channels of the stem; the other layers scale with it, and 16 gives the
        network of the paper.
      norm: ``"batch"``, or ``"group"`` for GroupNorm, see `hsee_jax.nn.Norm`.
      exit_head: see `hsee_jax.nn.resnet18`.
      dtype: of the computation; parameters, statistics and logits stay float32.
      conv: the form of the convolutions, see `hsee_jax.nn.convolution`.

    Returns:
      The model. With the defaults, 10 classes and three colours its layers and final
      head have 1,528,106 parameters.
    """
    compute, small = jnp.dtype(dtype), max(input_shape[:2]) <= 64
    common = compute, conv, norm

    def scaled(channels: int) -> int:
        return max(1, round(channels * width / 16))

    def end(features: int, size: int, stride: int) -> ConvNorm:
        return ConvNorm(features, size, stride, *common, nn.hard_swish, _EPSILON)

    def body(block: _Block) -> InvertedResidual:
        return InvertedResidual(
            scaled(block.features),
            1 if small and block is _BLOCKS[0] else block.stride,
            scaled(block.inner),
            *common,
            block.size,
            nn.hard_swish if block.swish else nn.relu,
            block.squeeze and scaled(block.squeeze),
            _EPSILON,
        )

    stem, last = end(width, 3, 1 if small else 2), end(scaled(_LAST), 1, 1)
    exit_stage = cached_stage(Head(num_classes, exit_head == "bn_linear", compute))
    return Model(
        stages=tuple(map(cached_stage, (stem, *map(body, _BLOCKS), last))),
        exit_heads=(exit_stage,) * len(_NAMES),
        final_head=cached_stage(HiddenHead(num_classes, scaled(_HIDDEN))),
        layer_names=_NAMES,
        input_shape=tuple(input_shape),
        weight_names=(_weight_names,),
    )


def _weight_names(layer: str) -> dict[str, str]:
    """Return the modules of a layer as torchvision names them."""
    if layer == "head":
        return {"hidden": "classifier.0", "linear": "classifier.3"}
    number = _NAMES.index(layer)
    if layer in ("stem", "last"):
        places = [f"features.{number}.0", f"features.{number}.1"]
        return paired(("conv/conv", "bn"), places)
    block = _BLOCKS[number - 1]
    names: dict[str, str] = {}
    expand = ["expand"] if block is not _BLOCKS[0] else []
    squeeze = ["se"] if block.squeeze else []
    for i, part in enumerate((*expand, "depthwise", *squeeze, "project")):
        place = f"features.{number}.block.{i}"
        if part == "se":
            names |= {f"se/{name}": f"{place}.{name}" for name in ("fc1", "fc2")}
        else:
            names |= paired(
                (f"{part}/conv", f"bn_{part}"), (f"{place}.0", f"{place}.1")
            )
    return names
