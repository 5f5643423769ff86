"""Runs on several devices and in several processes."""

from hsee_jax.parallel.mesh import (
    backend_of,
    make_mesh,
    on_devices,
    over_clients,
    place_blocks,
)
from hsee_jax.parallel.processes import in_first, is_first, join

__all__ = [
    "backend_of",
    "in_first",
    "is_first",
    "join",
    "make_mesh",
    "on_devices",
    "over_clients",
    "place_blocks",
]
