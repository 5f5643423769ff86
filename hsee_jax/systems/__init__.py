"""The costs of a federation: FLOPs, parameters, and the bytes on its links."""

from hsee_jax.systems.costs import LayerCost, layer_costs
from hsee_jax.systems.traffic import (
    Bytes,
    Traffic,
    bytes_by_cut,
    round_bytes,
    traffic_of,
    training_bytes,
)

__all__ = [
    "Bytes",
    "LayerCost",
    "Traffic",
    "bytes_by_cut",
    "layer_costs",
    "round_bytes",
    "traffic_of",
    "training_bytes",
]
