"""Early-exit inference: the gate, and the choice and evaluation of its thresholds."""

from hsee_jax.inference.client_study import Target
from hsee_jax.inference.criteria import CRITERIA, Criterion, register
from hsee_jax.inference.gate import Answers, Gate, make_gate
from hsee_jax.inference.interactions import Interactions, find_interactions
from hsee_jax.inference.predict import predict
from hsee_jax.inference.study import Study, study

__all__ = [
    "CRITERIA",
    "Answers",
    "Criterion",
    "Gate",
    "Interactions",
    "Study",
    "Target",
    "find_interactions",
    "make_gate",
    "predict",
    "register",
    "study",
]
