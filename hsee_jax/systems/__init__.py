"""The costs of a federation: FLOPs, parameters, and the bytes on its links."""

from hsee_jax.systems.costs import LayerCost, layer_costs
from hsee_jax.systems.traffic import Bytes, Traffic, traffic_of, training_bytes

__all__ = [
    "Bytes",
    "LayerCost",
    "Traffic",
    "layer_costs",
    "traffic_of",
    "training_bytes",
]
