"""Training algorithms, with a file for each paper."""

from hsee_jax.algorithms.fedavg import fedavg
from hsee_jax.algorithms.fpl import fpl
from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.algorithms.references import centralized, local
from hsee_jax.algorithms.registry import ALGORITHMS, register
from hsee_jax.algorithms.splitfed import splitfed_v1, splitfed_v2
from hsee_jax.algorithms.vicreg import vicreg

__all__ = [
    "ALGORITHMS",
    "averaging",
    "centralized",
    "fedavg",
    "fpl",
    "local",
    "register",
    "sequential",
    "splitfed_v1",
    "splitfed_v2",
    "vicreg",
]
