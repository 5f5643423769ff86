"""Rounds: a strategy applied to a federation's data, and its evaluation."""

from hsee_jax.engine.agreement import Agreement
from hsee_jax.engine.compilation import check_finite, make_round
from hsee_jax.engine.evaluation import ClientResult, GatedResult, make_evaluation
from hsee_jax.engine.host_store import HostStore
from hsee_jax.engine.lowering import lower_round
from hsee_jax.engine.plan import Absence, RoundPlan, plan_round
from hsee_jax.engine.refit import ExitFit, Samples, refit_exits
from hsee_jax.engine.round import RoundFn, RoundProgress, client_axis
from hsee_jax.engine.store import DeviceStore, Store

__all__ = [
    "Absence",
    "Agreement",
    "ClientResult",
    "DeviceStore",
    "ExitFit",
    "GatedResult",
    "HostStore",
    "RoundFn",
    "RoundPlan",
    "RoundProgress",
    "Samples",
    "Store",
    "check_finite",
    "client_axis",
    "lower_round",
    "make_evaluation",
    "make_round",
    "plan_round",
    "refit_exits",
]
