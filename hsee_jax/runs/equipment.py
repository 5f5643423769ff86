"""The devices of a run's clients, and when these are available, as a run keeps them.

The run's folder holds them in ``devices.json``, with every spread drawn, so a run goes
on without the files that they were read from.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.systems.availability import Period, check_period
from hsee_jax.systems.device_file import Fleet
from hsee_jax.systems.devices import Device, make_device

FILE = "devices.json"


class Equipment(NamedTuple):
    """What the clients of a run train on."""

    fleet: Fleet
    periods: tuple[Period, ...] = ()  # see `hsee_jax.systems.availability`
    # The names of the files with the start of their digests, by the option. Runs of one
    # experiment share them, although a spread differs with the seed.
    sources: Mapping[str, str] = {}


def clock_devices(config: Config, fleet: Fleet) -> tuple[Device, ...]:
    """Return the device of each client; with ``centralized`` it is the server."""
    if config.strategy.strategy == "centralized":
        return (fleet.server,)
    return fleet.clients


def equipment_values(equipment: Equipment) -> dict[str, Any]:
    """Return what ``devices.json`` holds, as values of JSON."""
    return {
        "sources": dict(equipment.sources),
        "server": _fields(equipment.fleet.server),
        "clients": [_fields(device) for device in equipment.fleet.clients],
        "availability": [list(period) for period in equipment.periods],
    }


def stored_equipment(folder: Path) -> Equipment | None:
    """Read ``devices.json`` of a run; return None if there is none.

    Raises:
      UserError: it is damaged.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        clients = tuple(map(make_device, values["clients"]))
        periods = [Period(*period) for period in values["availability"]]
        for period in periods:
            check_period(period, len(clients))
        fleet = Fleet(clients, make_device(values["server"]))
        sources = dict(values["sources"])
        hash(tuple(sources.values()))  # runs are grouped by them
        return Equipment(fleet, tuple(periods), sources)
    except FileNotFoundError:
        return None
    except (OSError, *DAMAGE) as error:
        raise UserError(
            f"run: {path} is damaged: {type(error).__name__}: {error}"
        ) from error


def check_count(config: Config, equipment: Equipment, name: str) -> None:
    """Refuse devices that are not one for each client; ``name`` says whose they are.

    Raises:
      UserError: there are more or fewer.
    """
    count, found = config.clients.num_clients, len(equipment.fleet.clients)
    # With one client that has all the data, the server is the device.
    if config.strategy.strategy != "centralized" and found != count:
        raise UserError(
            f"devices: {name} has {found} devices for {count} clients; "
            "allowed is a device for each, see num_clients"
        )


def _fields(device: Device) -> dict[str, Any]:
    """Return the fields of a device that say something, for `make_device`.

    A field that is not known or not finite, or has its default, says nothing.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Device)}

    def says(name: str, value: Any) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return value not in (None, defaults[name])

    values = json.loads(json.dumps(dataclasses.asdict(device)))
    return {name: value for name, value in values.items() if says(name, value)}
