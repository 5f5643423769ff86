"""Heterogeneous split learning with early exits, in JAX and Flax.

The method is Hetero-SplitEE (Oda et al., arXiv:2512.09313): clients keep the layers of
one network up to a cut of their own, and an exit head there; a server trains the rest.

Most programs need only the names below; all others are in the packages, such as
``hsee_jax.algorithms.averaging`` or ``hsee_jax.nn.resnet18``. Each name is imported at
its first use, so that the command line answers before JAX is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsee_jax import (
        algorithms,
        config,
        core,
        data,
        deployment,
        engine,
        federation,
        inference,
        link,
        nn,
        optim,
        parallel,
        report,
        runs,
        studies,
        systems,
        tracking,
    )
    from hsee_jax.config import Config, override, preset
    from hsee_jax.core import Batch, DivergenceError, Stage, Stopped, UserError
    from hsee_jax.federation import Client, Federation, Strategy
    from hsee_jax.nn import Model
    from hsee_jax.runs import Experiment, build, restore, train

    __version__: str

_HOMES = {
    "Batch": "core",
    "Client": "federation",
    "Config": "config",
    "DivergenceError": "core",
    "Experiment": "runs",
    "Federation": "federation",
    "Model": "nn",
    "Stage": "core",
    "Stopped": "core",
    "Strategy": "federation",
    "UserError": "core",
    "build": "runs",
    "override": "config",
    "preset": "config",
    "restore": "runs",
    "train": "runs",
}
_PACKAGES = (
    "algorithms",
    "cli",
    "config",
    "core",
    "data",
    "deployment",
    "engine",
    "federation",
    "inference",
    "link",
    "nn",
    "optim",
    "parallel",
    "report",
    "runs",
    "studies",
    "systems",
    "tracking",
)

__all__ = [
    "Batch",
    "Client",
    "Config",
    "DivergenceError",
    "Experiment",
    "Federation",
    "Model",
    "Stage",
    "Stopped",
    "Strategy",
    "UserError",
    "algorithms",
    "build",
    "config",
    "core",
    "data",
    "deployment",
    "engine",
    "federation",
    "inference",
    "link",
    "nn",
    "optim",
    "override",
    "parallel",
    "preset",
    "report",
    "restore",
    "runs",
    "studies",
    "systems",
    "tracking",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name or a package at its first use."""
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("hsee-jax")
        except metadata.PackageNotFoundError:  # a source tree that is not installed
            return "unknown"
    if name in _HOMES:
        value = getattr(importlib.import_module(f"hsee_jax.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"hsee_jax.{name}")
    raise AttributeError(f"module 'hsee_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *__all__, "__version__"})
