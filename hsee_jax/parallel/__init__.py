"""Runs on several devices and in several processes."""

from hsee_jax.parallel.mesh import make_mesh, on_devices, over_clients, place_blocks
from hsee_jax.parallel.processes import in_first, is_first, join

__all__ = [
    "in_first",
    "is_first",
    "join",
    "make_mesh",
    "on_devices",
    "over_clients",
    "place_blocks",
]
