"""The configuration of a run, and its presets."""

from hsee_jax.config.plugins import PluginError, load_plugins
from hsee_jax.config.presets import PRESETS, preset
from hsee_jax.config.schema import (
    BOOKKEEPING,
    SEEDS,
    ClientsConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
)
from hsee_jax.config.values import (
    SECTIONS,
    flatten,
    from_dict,
    is_own_data,
    options,
    override,
    settings,
    to_json,
)

__all__ = [
    "BOOKKEEPING",
    "PRESETS",
    "SECTIONS",
    "SEEDS",
    "ClientsConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "PluginError",
    "RunConfig",
    "StrategyConfig",
    "flatten",
    "from_dict",
    "is_own_data",
    "load_plugins",
    "options",
    "override",
    "preset",
    "settings",
    "to_json",
]
