"""The layers of ResNet-18, -34 and -50 (He et al., CVPR 2016), as Flax modules.

They follow torchvision, where the 3x3 convolution of a bottleneck block has the stride;
`hsee_jax.nn.layers` says what differs. The stem for small images is one 3x3 convolution
of stride 1 without pooling, the usual choice for CIFAR.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from hsee_jax.core.options import one_of
from hsee_jax.core.types import Array
from hsee_jax.nn.gated_layer import Between, gated_from_linen
from hsee_jax.nn.layers import (
    Conv,
    ConvForm,
    DtypeName,
    Head,
    NormName,
    ResNetExitHead,
    Width,
)
from hsee_jax.nn.model import Model, cached_stage
from hsee_jax.nn.normalization import Norm
from hsee_jax.nn.registry import NETWORKS, images_only

StemName = Annotated[
    str,
    "first layer: 3x3, or 7x7 and a max-pool; auto is 3x3 up to 64 pixels [ours]",
    one_of("auto", "3x3", "7x7"),
]

_PLACES = (Between("conv1", "bn1", "conv2"), Between("conv2", "bn2", "conv3"))


class Stem(nn.Module):
    """The first layer: ``[B, H, W, C] -> [B, H', W', features]``.

    With ``size`` 3 the image keeps its size; with 7 the convolution halves it, and a
    3x3 max-pool halves it once more.
    """

    features: int
    size: int
    dtype: jnp.dtype
    conv: str
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the stem."""
        large = self.size == 7
        conv = partial(Conv, dtype=self.dtype, conv=self.conv, name="conv")
        x = conv(self.features, self.size, 2 if large else 1)(x.astype(self.dtype))
        x = nn.relu(Norm(self.norm, self.dtype, name="bn")(x, mask, train=train))
        if large:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[B, H, W, C] -> [B, H/s, W/s, features]``.

    The shortcut is the identity, or a 1x1 convolution where the shape changes. Like all
    modules of this package it is called with ``x`` and a mask ``bool [B]`` that is
    false on padding, and with ``train``, which chooses the statistics of BatchNorm.
    """

    features: int  # channels of the output
    stride: int  # s
    dtype: jnp.dtype  # of the computation; parameters are float32
    conv: str  # the form of the convolutions, such as "grouped" or "auto"
    norm: str = "batch"  # or "group"
    inner: tuple[int, ...] | None = None  # channels between; None for ``features``

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the block."""
        conv = partial(Conv, dtype=self.dtype, conv=self.conv)
        norm = partial(Norm, self.norm, self.dtype)
        outer = self.features
        (inner,) = self.inner or (outer,)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != outer:
            shortcut = conv(outer, 1, self.stride, name="down")(x)
            shortcut = norm(name="bn_down")(shortcut, mask, train=train)
        y = conv(inner, 3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, mask, train=train))
        y = conv(outer, 3, 1, name="conv2")(y)
        y = norm(name="bn2")(y, mask, train=train)
        return nn.relu(y + shortcut)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and a shortcut as in `BasicBlock`.

    The shapes are ``[B, H, W, C] -> [B, H/s, W/s, 4 features]``; between the 1x1
    convolutions there are ``features`` channels.
    """

    features: int
    stride: int
    dtype: jnp.dtype
    conv: str
    norm: str = "batch"
    inner: tuple[int, ...] | None = None  # as in `BasicBlock`, of both places

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the block."""
        conv = partial(Conv, dtype=self.dtype, conv=self.conv)
        norm = partial(Norm, self.norm, self.dtype)
        outer = 4 * self.features
        first, second = self.inner or (self.features, self.features)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != outer:
            shortcut = conv(outer, 1, self.stride, name="down")(x)
            shortcut = norm(name="bn_down")(shortcut, mask, train=train)
        y = conv(first, 1, 1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, mask, train=train))
        y = conv(second, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y, mask, train=train))
        y = conv(outer, 1, 1, name="conv3")(y)
        y = norm(name="bn3")(y, mask, train=train)
        return nn.relu(y + shortcut)


class _Form(NamedTuple):
    """The options of a ResNet, see `resnet18`."""

    width: int
    stem: str
    norm: str
    exit_head: str
    dtype: str
    conv: str


class ConvHead(nn.Module):
    """Three convolutions and a `Head`: ``[B, H, W, C] -> float32 [B, K]``.

    Exits between the blocks of a network gain from layers of their own (Zhang et al.,
    ICCV 2019). Here a 1x1 convolution halves the channels, a 3x3 convolution halves the
    image, and a 1x1 convolution leads to 2 C channels, each with a norm and ReLU
    [ours].
    """

    classes: int
    dtype: jnp.dtype
    conv: str
    norm: str = "batch"

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        channels = x.shape[-1]
        half = max(1, channels // 2)
        shapes = ((half, 1, 1), (half, 3, 2), (2 * channels, 1, 1))
        for number, (features, size, stride) in enumerate(shapes, start=1):
            conv = partial(Conv, dtype=self.dtype, conv=self.conv)
            x = conv(features, size, stride, name=f"conv{number}")(x)
            x = Norm(self.norm, self.dtype, name=f"bn{number}")(x, mask, train=train)
            x = nn.relu(x)
        return Head(self.classes, False, self.dtype, name="head")(x, mask, train=train)


@NETWORKS.register(summary="ResNet-18 (He et al., CVPR 2016), 9 layers")
@images_only
def resnet18(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: Width = 64,
    stem: StemName = "auto",
    norm: NormName = "batch",
    exit_head: ResNetExitHead = "linear",
    dtype: DtypeName = "float32",
    conv: ConvForm = "auto",
) -> Model:
    """Build ResNet-18 as 9 layers: a stem and 8 blocks, with the names of torchvision.

    Args:
      num_classes: K.
      input_shape: ``(H, W, C)``.
      width: channels of the first group; the later groups have 2, 4 and 8 times these.
      stem: ``"3x3"``, ``"7x7"``, or ``"auto"``: 3x3 up to 64 pixels, 7x7 above.
      norm: ``"batch"``, or ``"group"`` for GroupNorm, see `hsee_jax.nn.Norm`.
      exit_head: ``"linear"``, ``"bn_linear"`` with BatchNorm before the pool, or
        ``"conv"``, see `ConvHead`.
      dtype: of the computation; parameters, statistics and logits stay float32.
      conv: the form of the convolutions, see `hsee_jax.nn.convolution`.

    Returns:
      The model. With the defaults, 10 classes and 32x32x3 images its layers and final
      head have 11,173,962 parameters.
    """
    form = _Form(width, stem, norm, exit_head, dtype, conv)
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes, input_shape, form)


@NETWORKS.register(summary="ResNet-34 (He et al., CVPR 2016), 17 layers")
@images_only
def resnet34(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: Width = 64,
    stem: StemName = "auto",
    norm: NormName = "batch",
    exit_head: ResNetExitHead = "linear",
    dtype: DtypeName = "float32",
    conv: ConvForm = "auto",
) -> Model:
    """Build ResNet-34 as 17 layers: a stem and 16 blocks; see `resnet18`."""
    form = _Form(width, stem, norm, exit_head, dtype, conv)
    return _resnet(BasicBlock, (3, 4, 6, 3), num_classes, input_shape, form)


@NETWORKS.register(summary="ResNet-50 (He et al., CVPR 2016), 17 layers")
@images_only
def resnet50(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: Width = 64,
    stem: StemName = "auto",
    norm: NormName = "batch",
    exit_head: ResNetExitHead = "linear",
    dtype: DtypeName = "float32",
    conv: ConvForm = "auto",
) -> Model:
    """Build ResNet-50 as 17 layers: a stem and 16 bottlenecks; see `resnet18`.

    A block outputs 4 times the channels of its group: 256 in the first group.
    """
    form = _Form(width, stem, norm, exit_head, dtype, conv)
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, input_shape, form)


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    counts: Sequence[int],
    num_classes: int,
    input_shape: tuple[int, ...],
    form: _Form,
) -> Model:
    """Build a stem and groups of blocks; every group but the first halves the image."""
    stem = form.stem
    if stem == "auto":
        stem = "3x3" if max(input_shape[:2]) <= 64 else "7x7"
    compute = jnp.dtype(form.dtype)
    common = compute, form.conv, form.norm
    modules: list[nn.Module] = [Stem(form.width, int(stem[0]), *common)]
    names = ["stem"]
    for group, count in enumerate(counts):
        for number in range(count):
            stride = 2 if group > 0 and number == 0 else 1
            modules.append(block(form.width * 2**group, stride, *common))
            names.append(f"layer{group + 1}.{number}")
    exit_head: nn.Module = Head(num_classes, form.exit_head == "bn_linear", compute)
    if form.exit_head == "conv":
        exit_head = ConvHead(num_classes, compute, form.conv, form.norm)
    places = _PLACES[: 1 if block is BasicBlock else 2]
    gated = [gated_from_linen(modules[0])]
    gated += [gated_from_linen(own, places) for own in modules[1:]]
    return Model(
        stages=tuple(map(cached_stage, modules)),
        exit_heads=(cached_stage(exit_head),) * len(modules),
        final_head=cached_stage(Head(num_classes, False, compute)),
        layer_names=tuple(names),
        input_shape=tuple(input_shape),
        weight_names=(_weight_names,),
        # The groups of GroupNorm would mix open and closed channels.
        gated_stages=tuple(gated) if form.norm == "batch" else (),
    )


def _weight_names(layer: str) -> dict[str, str]:
    """Return the modules of a layer as torchvision and timm name them."""
    if layer == "head":
        return {"linear": "fc"}
    if layer == "stem":
        return {"conv/conv": "conv1", "bn/bn": "bn1", "bn/gn": "bn1"}
    names = {
        "down/conv": f"{layer}.downsample.0",
        "bn_down/bn": f"{layer}.downsample.1",
        "bn_down/gn": f"{layer}.downsample.1",
    }
    for number in (1, 2, 3):
        names[f"conv{number}/conv"] = f"{layer}.conv{number}"
        for kind in ("bn", "gn"):
            names[f"bn{number}/{kind}"] = f"{layer}.bn{number}"
    return names
