"""Studies: rows of options and seeds, trained as a sweep, and their results."""

from hsee_jax.config.values import settings
from hsee_jax.report.curves import mean_text
from hsee_jax.studies.digests import Digests
from hsee_jax.studies.load import load
from hsee_jax.studies.perform import End, perform, unfinished
from hsee_jax.studies.results import (
    Result,
    append_result,
    by_row,
    read_results,
    result_of,
)
from hsee_jax.studies.study import Row, Run, Study, runs
from hsee_jax.studies.table import page, row_list, table, write
from hsee_jax.studies.train import train_run

__all__ = [
    "Digests",
    "End",
    "Result",
    "Row",
    "Run",
    "Study",
    "append_result",
    "by_row",
    "load",
    "mean_text",
    "page",
    "perform",
    "read_results",
    "result_of",
    "row_list",
    "runs",
    "settings",
    "table",
    "train_run",
    "unfinished",
    "write",
]
