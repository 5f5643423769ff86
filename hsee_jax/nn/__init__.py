"""Networks: layers and heads as pure functions, and the registry of networks."""

from hsee_jax.nn.convolution import convolution
from hsee_jax.nn.cuts import deal_cuts, parse_cut
from hsee_jax.nn.losses import masked_cross_entropy, predictive_entropy
from hsee_jax.nn.model import Model, Network, from_linen, init_network, layer_inputs
from hsee_jax.nn.registry import NETWORKS, register
from hsee_jax.nn.resnet import BasicBlock, Head, Stem, resnet18

__all__ = [
    "NETWORKS",
    "BasicBlock",
    "Head",
    "Model",
    "Network",
    "Stem",
    "convolution",
    "deal_cuts",
    "from_linen",
    "init_network",
    "layer_inputs",
    "masked_cross_entropy",
    "parse_cut",
    "predictive_entropy",
    "register",
    "resnet18",
]
