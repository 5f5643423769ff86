"""Optimizers, rules for their state when layers are averaged, and schedules."""

from hsee_jax.optim.amsgrad import amsgrad
from hsee_jax.optim.optimizers import (
    KEEP,
    MERGES,
    OPTIMIZERS,
    Merge,
    Optimizer,
    OptimizerLike,
    adamw,
    alone,
    as_optimizer,
    descend,
    register,
    sgd,
    with_merge,
)
from hsee_jax.optim.quasi_global import qgm
from hsee_jax.optim.schedules import SCHEDULES, make_schedule

__all__ = [
    "KEEP",
    "MERGES",
    "OPTIMIZERS",
    "SCHEDULES",
    "Merge",
    "Optimizer",
    "OptimizerLike",
    "adamw",
    "alone",
    "amsgrad",
    "as_optimizer",
    "descend",
    "make_schedule",
    "qgm",
    "register",
    "sgd",
    "with_merge",
]
