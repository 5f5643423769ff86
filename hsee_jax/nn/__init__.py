"""Networks: layers and heads as pure functions, and the registry of networks."""

from hsee_jax.nn.conv1d import conv1d
from hsee_jax.nn.convolution import convolution
from hsee_jax.nn.convolution_choice import auto_form
from hsee_jax.nn.cuts import deal_cuts, parse_cut
from hsee_jax.nn.gated_layer import Between, gated_from_linen
from hsee_jax.nn.gates import (
    WIDTHS,
    at_gated_width,
    flops_share,
    has_gates,
    open_gates,
    width_loss,
    with_gates,
    without_gates,
)
from hsee_jax.nn.interactions import (
    Interaction,
    interaction_effects,
    select_interactions,
)
from hsee_jax.nn.layers import ConvNorm, Head
from hsee_jax.nn.losses import (
    distillation_loss,
    masked_cross_entropy,
    predictive_entropy,
)
from hsee_jax.nn.mlp import DenseLayer, LinearHead, mlp
from hsee_jax.nn.mobilenet import (
    InvertedResidual,
    SqueezeExcitation,
    mobilenet_v2,
)
from hsee_jax.nn.mobilenet_v3 import HiddenHead, mobilenet_v3_small
from hsee_jax.nn.model import Model, Network, from_linen, init_network, layer_inputs
from hsee_jax.nn.normalization import Norm, batch_norm
from hsee_jax.nn.pretrained import load_pretrained
from hsee_jax.nn.registry import (
    NETWORKS,
    images_only,
    register,
    series_only,
    tables_only,
)
from hsee_jax.nn.resnet import (
    BasicBlock,
    Bottleneck,
    ConvHead,
    Stem,
    resnet18,
    resnet34,
    resnet50,
)
from hsee_jax.nn.sian import sian
from hsee_jax.nn.vicreg import masked_vicreg
from hsee_jax.nn.vit import Block, FirstBlock, Patches, TokenHead, vit

__all__ = [
    "NETWORKS",
    "WIDTHS",
    "BasicBlock",
    "Between",
    "Block",
    "Bottleneck",
    "ConvHead",
    "ConvNorm",
    "DenseLayer",
    "FirstBlock",
    "Head",
    "HiddenHead",
    "Interaction",
    "InvertedResidual",
    "LinearHead",
    "Model",
    "Network",
    "Norm",
    "Patches",
    "SqueezeExcitation",
    "Stem",
    "TokenHead",
    "at_gated_width",
    "auto_form",
    "batch_norm",
    "conv1d",
    "convolution",
    "deal_cuts",
    "distillation_loss",
    "flops_share",
    "from_linen",
    "gated_from_linen",
    "has_gates",
    "images_only",
    "init_network",
    "interaction_effects",
    "layer_inputs",
    "load_pretrained",
    "masked_cross_entropy",
    "masked_vicreg",
    "mlp",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "open_gates",
    "parse_cut",
    "predictive_entropy",
    "register",
    "resnet18",
    "resnet34",
    "resnet50",
    "select_interactions",
    "series_only",
    "sian",
    "tables_only",
    "vit",
    "width_loss",
    "with_gates",
    "without_gates",
]
