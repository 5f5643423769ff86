"""Trackers: callbacks that hand the figures of each round to another program.

Only a tracker that is made imports its library.
"""

from hsee_jax.tracking.bookmark import Bookmark
from hsee_jax.tracking.csv_file import csv
from hsee_jax.tracking.event_files import tensorboard
from hsee_jax.tracking.mlflow_run import mlflow
from hsee_jax.tracking.registry import TRACKERS, register
from hsee_jax.tracking.tracker import Tracker
from hsee_jax.tracking.wandb_run import wandb

__all__ = [
    "TRACKERS",
    "Bookmark",
    "Tracker",
    "csv",
    "mlflow",
    "register",
    "tensorboard",
    "wandb",
]
