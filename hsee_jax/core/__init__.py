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
    Array,
    Batch,
    Dataset,
    ExitMetrics,
    Gates,
    Key,
    Metrics,
    PyTree,
    Stage,
    Variables,
)

__all__ = [
    "Array",
    "Batch",
    "Dataset",
    "DivergenceError",
    "Entry",
    "ExitMetrics",
    "Gates",
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
