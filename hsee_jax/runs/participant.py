"""A run as one of its devices knows it: its own client, and nothing of the others."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.config.schema import Config
from hsee_jax.config.values import from_dict, override
from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.core.types import Dataset, Key
from hsee_jax.data import DatasetInfo
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.federation.federation import Client, Federation, group_clients
from hsee_jax.federation.strategy import Halves, Strategy
from hsee_jax.nn.cuts import parse_cut
from hsee_jax.runs.build import (
    augment_key,
    build_federation,
    build_pipeline,
    build_rates,
    build_strategy,
)
from hsee_jax.runs.folder import checked_info
from hsee_jax.runs.material import shares

LEAST = {  # the least value of each number of a description
    "client": 0,
    "cut": 1,
    "batch_size": 1,
    "steps": 1,
    "test_samples": 0,
    "test_batch_size": 1,
}


class Participant(NamedTuple):
    """All that a device needs to take part in a run."""

    client: int
    config: Config
    info: DatasetInfo
    federation: Federation  # of this client alone
    strategy: Strategy
    pipeline: InputPipeline
    augment_key: Key
    learning_rates: npt.NDArray[np.float32]  # [rounds, T]
    batch_size: int
    seed: int  # of the order of the data
    test_samples: int  # of the server's test set
    test_batch_size: int
    private: bool  # whether no layer leaves the device

    @property
    def halves(self) -> Halves:
        """Return the halves of a turn."""
        assert self.strategy.halves is not None
        return self.strategy.halves


def check_description(values: Any) -> None:
    """Refuse what a server says of a run if `build_participant` cannot read it.

    Args:
      values: of JSON.

    Raises:
      ValueError: a value is missing, or of another kind.
    """
    if not isinstance(values, dict) or not isinstance(values.get("run"), str):
        raise ValueError("it names no run")
    for name, least in LEAST.items():
        if type(values.get(name)) is not int or values[name] < least:
            raise ValueError(f"{name} is not a whole number of {least} or more")
    for name in ("config", "info"):
        if not isinstance(values.get(name), dict):
            raise ValueError(f"{name} is not an object")
    plugins = dict(values["config"].get("run") or {}).get("plugin", [])
    if not all(isinstance(name, str) for name in plugins):
        raise ValueError("the name of a plugin is not a text")


def build_participant(
    values: Mapping[str, Any], plugins: Collection[str] = ()
) -> Participant:
    """Build what a device needs from what the server says of the run.

    Args:
      values: ``client``, ``cut``, ``batch_size``, ``steps`` (of a round),
        ``test_samples``, ``test_batch_size``, and as JSON ``config`` and ``info``.
      plugins: modules that the device's own user named; the server cannot make it
        import others.

    Raises:
      UserError: the configuration needs another plugin, or this version cannot read it.
    """
    asked = values["config"].get("run", {}).get("plugin", ())
    if not set(asked) <= set(plugins):
        raise UserError(
            f"plugin: the server's run needs {', '.join(map(str, asked))}; a device "
            "imports only what its own --plugin names"
        )
    config = from_dict(values["config"])
    try:
        info = checked_info(values["info"])
    except DAMAGE as error:
        raise UserError(
            f"info: what the server says of the data cannot be read: {error}"
        ) from error
    federation = build_federation(config, info)
    cut = parse_cut(values["cut"], federation.model.layer_names)
    groups = group_clients([Client(values["client"], cut)])
    federation = federation._replace(groups=groups, one_by_one=False)
    return Participant(
        values["client"],
        config,
        info,
        federation,
        build_strategy(config, federation),
        build_pipeline(config, info),
        augment_key(config),
        build_rates(config, values["steps"]),
        values["batch_size"],
        config.run.data_seed,
        values["test_samples"],
        values["test_batch_size"],
        config.clients.keep_layers_private,
    )


def own_share(values: Mapping[str, Any], folder: str | None = None) -> Dataset:
    """Read the dataset of a run, and keep only what it deals to one client.

    Args:
      values: see `build_participant`.
      folder: with the data on this machine; None for the default.

    Raises:
      UserError: the data are missing, or not valid, or not those of the server.
    """
    i, config = values["client"], override(from_dict(values["config"]), data_dir=folder)
    own, there = shares(config)[i], values.get("label_counts")
    classes = len(there) if isinstance(there, list) else 0
    here = np.bincount(own.labels, minlength=classes).tolist()
    if here != there:
        raise UserError(
            f"data: {config.data.dataset} gives client {i} other samples here than at "
            f"the server, by class {here} and not {there}; allowed is the same dataset "
            "in the same form"
        )
    return own
