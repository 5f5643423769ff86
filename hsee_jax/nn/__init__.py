"""Networks: layers and heads as pure functions, and the registry of networks."""

from hsee_jax.nn.convolution import convolution
from hsee_jax.nn.cuts import deal_cuts, parse_cut
from hsee_jax.nn.losses import masked_cross_entropy, predictive_entropy
from hsee_jax.nn.mlp import DenseLayer, LinearHead, mlp
from hsee_jax.nn.model import Model, Network, from_linen, init_network, layer_inputs
from hsee_jax.nn.registry import NETWORKS, images_only, register
from hsee_jax.nn.resnet import BasicBlock, ConvHead, Head, Stem, resnet18

__all__ = [
    "NETWORKS",
    "BasicBlock",
    "ConvHead",
    "DenseLayer",
    "Head",
    "LinearHead",
    "Model",
    "Network",
    "Stem",
    "convolution",
    "deal_cuts",
    "images_only",
    "from_linen",
    "init_network",
    "layer_inputs",
    "masked_cross_entropy",
    "mlp",
    "parse_cut",
    "predictive_entropy",
    "register",
    "resnet18",
]
