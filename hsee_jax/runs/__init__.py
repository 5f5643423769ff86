"""Runs: built from a configuration, trained in a folder, restored from it."""

from hsee_jax.runs.build import build
from hsee_jax.runs.callbacks import Callback, Checkpoints, MetricsLog, Moment
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.cut_schedule import with_schedule
from hsee_jax.runs.data import DataSource
from hsee_jax.runs.equip import Given, equip
from hsee_jax.runs.equipment import Equipment
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.history import History, read_history
from hsee_jax.runs.lowering import lower
from hsee_jax.runs.records import RoundRecord, Scores, Summary
from hsee_jax.runs.refit import Refit, refit
from hsee_jax.runs.reopen import evaluate, reopen
from hsee_jax.runs.restore import Restored, restore, restore_client
from hsee_jax.runs.train import train

__all__ = [
    "Callback",
    "Checkpoints",
    "DataSource",
    "Equipment",
    "Experiment",
    "Given",
    "History",
    "MetricsLog",
    "Moment",
    "Refit",
    "Restored",
    "RoundRecord",
    "Scores",
    "Summary",
    "build",
    "equip",
    "evaluate",
    "lower",
    "read_history",
    "refit",
    "reopen",
    "restore",
    "restore_client",
    "train",
    "with_schedule",
    "with_clock",
]
