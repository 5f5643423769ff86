"""Early-exit inference: the gate, and the choice and evaluation of its thresholds."""

from hsee_jax.inference.client_study import Target
from hsee_jax.inference.gate import (
    CRITERIA,
    Answers,
    Criterion,
    Gate,
    make_gate,
    register,
)
from hsee_jax.inference.study import Study, study

__all__ = [
    "CRITERIA",
    "Answers",
    "Criterion",
    "Gate",
    "Study",
    "Target",
    "make_gate",
    "register",
    "study",
]
