"""Heterogeneous split learning with early exits, in JAX and Flax.

The method is Hetero-SplitEE (Oda et al., arXiv:2512.09313): clients keep the layers of
one network up to a cut of their own, and an exit head there; a server trains the rest.
"""

# ruff: noqa: F403, F405

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsee_jax.api import *

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        """Load a public name, or a module of the package, at its first use."""
        import importlib.util
        from importlib import metadata

        if name == "__version__":
            return metadata.version("hsee-jax")
        if name in __all__:
            public = vars(importlib.import_module("hsee_jax.api"))
            globals().update((key, public[key]) for key in __all__)
            return public[name]
        module = f"hsee_jax.{name}"
        if not name.startswith("_") and importlib.util.find_spec(module):
            return importlib.import_module(module)
        raise AttributeError(f"module 'hsee_jax' has no {name!r}")

    def __dir__() -> list[str]:
        """List the public names."""
        return sorted({*globals(), *__all__, "__version__"})


__all__ = [
    "Answers",
    "Batch",
    "Branch",
    "BranchSpec",
    "Client",
    "ClientResult",
    "Config",
    "Dataset",
    "DivergenceError",
    "ExitMetrics",
    "Experiment",
    "Federation",
    "Gate",
    "Group",
    "InputPipeline",
    "LayerMean",
    "LayerState",
    "Metrics",
    "Model",
    "Network",
    "Restored",
    "RoundPlan",
    "RunState",
    "Stage",
    "Stopped",
    "Strategy",
    "UserError",
    "averaging",
    "branch_step",
    "build",
    "centralized",
    "client_spec",
    "compose",
    "detached_step",
    "export_client",
    "fedavg",
    "forward",
    "from_linen",
    "group_clients",
    "init_client",
    "init_network",
    "init_server",
    "joint_step",
    "layer_mean",
    "local",
    "make_evaluation",
    "make_gate",
    "make_mesh",
    "make_round",
    "masked_cross_entropy",
    "override",
    "place_blocks",
    "plan_round",
    "predictive_entropy",
    "preset",
    "receive",
    "resnet18",
    "restore",
    "restore_client",
    "sequential",
    "server_of",
    "server_spec",
    "splitfed_v1",
    "splitfed_v2",
    "train",
]
