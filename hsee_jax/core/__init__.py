"""Types, errors, options and registries that all packages use."""

from hsee_jax.core.errors import DivergenceError, Stopped, UserError, unknown
from hsee_jax.core.options import (
    Option,
    Rule,
    at_least,
    between,
    one_of,
    positive,
    share,
)
from hsee_jax.core.registry import Entry, Registry
from hsee_jax.core.types import (
    ApplyFn,
    Array,
    Batch,
    Dataset,
    ExitMetrics,
    Gates,
    InitFn,
    Key,
    Metrics,
    PyTree,
    Stage,
    Variables,
)

__all__ = [
    "ApplyFn",
    "Array",
    "Batch",
    "Dataset",
    "DivergenceError",
    "Entry",
    "ExitMetrics",
    "Gates",
    "InitFn",
    "Key",
    "Metrics",
    "Option",
    "PyTree",
    "Registry",
    "Rule",
    "Stage",
    "Stopped",
    "UserError",
    "Variables",
    "at_least",
    "between",
    "one_of",
    "positive",
    "share",
    "unknown",
]
