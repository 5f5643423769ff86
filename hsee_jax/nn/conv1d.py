"""A convolutional network for series, after the FCN of Wang et al. (IJCNN 2017).

A layer is a convolution along time, a normalisation and ReLU; the heads average over
time (arXiv:1611.06455). Their network has three layers with windows of 8, 5 and 3 and
128, 256 and 128 channels. Here the number of layers, their window and their width are
options, and every second layer halves the series and doubles the channels, so that
later cuts send fewer bytes [ours].
"""

from typing import Annotated

import jax.numpy as jnp

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import at_least
from hsee_jax.nn.layers import (
    ConvForm,
    ConvNorm,
    DtypeName,
    ExitHead,
    Head,
    NormName,
    Width,
)
from hsee_jax.nn.mlp import Depth
from hsee_jax.nn.model import Model, cached_stage
from hsee_jax.nn.registry import NETWORKS, series_only

_MAX_CHANNELS = 65_536  # in any layer


@NETWORKS.register(summary="convolutions along time, for series [T, C]")
@series_only
def conv1d(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: Width = 64,
    depth: Depth = 6,
    window: Annotated[
        int, "samples under the window of a convolution, an odd number", at_least(1)
    ] = 7,
    norm: NormName = "batch",
    exit_head: ExitHead = "linear",
    dtype: DtypeName = "float32",
    conv: ConvForm = "auto",
) -> Model:
    """Build a network for series with an exit after each layer.

    Args:
      num_classes: K.
      input_shape: ``(T, C)``.
      width: channels of the first two layers; each further pair has twice as many.
      depth: the number of layers, which are named ``conv1``, ``conv2`` and so on.
      window: samples under the window of each convolution, an odd number.
      norm: ``"batch"``, or ``"group"`` for GroupNorm, see `hsee_jax.nn.Norm`.
      exit_head: see `hsee_jax.nn.resnet18`.
      dtype: of the computation; parameters, statistics and logits stay float32.
      conv: the form of the convolutions, see `hsee_jax.nn.convolution`.

    Raises:
      UserError: the window is even, the last layers would be too wide, or the samples
        are not series.
    """
    if window % 2 == 0:
        raise UserError(f"window: {window} is not allowed; allowed is an odd number")
    if width * 2 ** ((depth - 1) // 2) > _MAX_CHANNELS:
        most = 2 * (_MAX_CHANNELS // width).bit_length()
        raise UserError(
            f"depth: {depth} is not allowed with width {width}, which doubles every "
            f"second layer; allowed is at most {most}"
        )
    compute = jnp.dtype(dtype)
    layers = [
        ConvNorm(
            width * 2 ** (number // 2),
            window,
            2 if number > 0 and number % 2 == 0 else 1,
            compute,
            conv,
            norm,
        )
        for number in range(depth)
    ]
    exit_stage = cached_stage(Head(num_classes, exit_head == "bn_linear", compute))
    return Model(
        stages=tuple(map(cached_stage, layers)),
        exit_heads=(exit_stage,) * depth,
        final_head=cached_stage(Head(num_classes, False, compute)),
        layer_names=tuple(f"conv{number + 1}" for number in range(depth)),
        input_shape=tuple(input_shape),
    )
