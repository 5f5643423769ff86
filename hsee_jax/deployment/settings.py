"""What operators set for a server and for each node of an engine, as flat values."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from hsee_jax.core.errors import unknown
from hsee_jax.core.options import at_least, positive, read_options
from hsee_jax.deployment.types import FEATURE_BOUND, PATIENT
from hsee_jax.runs.flat import flat_value

_Kind = TypeVar("_Kind", bound="ServerSettings | NodeSettings")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """The settings of a server, beside the options of its run."""

    out: Annotated[str, "folder of the run"] = "runs/flower"
    resume: Annotated[bool, "go on after the last round that ended"] = False
    overwrite: Annotated[bool, "replace the run in the folder"] = False
    nodes: Annotated[tuple[int, ...], "node of each client, by id"] = ()
    samples: Annotated[tuple[int, ...], "samples of each client, if its own"] = ()
    deadline: Annotated[float | None, "seconds of a round", positive] = None
    min_clients: Annotated[int, "clients that a round waits for"] = PATIENT.min_clients
    max_refusals: Annotated[int, "refusals that a client may send"] = (
        PATIENT.max_refusals
    )
    feature_bound: Annotated[float, "largest size of a feature", positive] = (
        FEATURE_BOUND
    )


@dataclasses.dataclass(frozen=True)
class NodeSettings:
    """The settings of a node."""

    state: Annotated[str, "folder of the device"] = ""
    partition_id: Annotated[int | None, "client of the node", at_least(0)] = None
    data: Annotated[str | None, "file of its samples"] = None
    data_dir: Annotated[str | None, "folder of the run's dataset"] = None
    plugin: Annotated[tuple[str, ...], "modules that the run may need"] = ()


def read_settings(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """Read settings, in whose names ``-`` stands for ``_``.

    Args:
      kind: the settings.
      values: of TOML; a text of words stands for a tuple.

    Raises:
      UserError: an unknown name, or a value that is not allowed.
    """
    known = read_options(kind, [field.name for field in dataclasses.fields(kind)])
    given = {name.replace("-", "_"): value for name, value in values.items()}
    for name in given:
        if name not in known:
            raise unknown("setting", name, known)
    return kind(**{name: flat_value(known[name], v) for name, v in given.items()})
