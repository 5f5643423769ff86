"""The devices of a run's clients, and when these are available, as a run keeps them.

The run's folder holds them in ``devices.json``, with every spread drawn, so a run goes
on without the files that they were read from.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.systems.availability import Period, check_period, read_availability
from hsee_jax.systems.device_file import Fleet, read_devices
from hsee_jax.systems.devices import Device, make_device

FILE = "devices.json"
_DIGITS = 6  # of a digest, enough to tell files of one name apart

# Of a caller: a file, or its content.
Devices = str | os.PathLike[str] | Fleet
Trace = str | os.PathLike[str] | tuple[Period, ...]


class Equipment(NamedTuple):
    """What the clients of a run train on."""

    fleet: Fleet
    periods: tuple[Period, ...] = ()  # see `hsee_jax.systems.availability`
    # The names of the files with the start of their digests, by the option. Runs of one
    # experiment share them, although a spread differs with the seed.
    sources: Mapping[str, str] = {}


def read_equipment(
    config: Config, devices: Devices | None, availability: Trace | None = None
) -> Equipment | None:
    """Read the devices of a run and their availability; return None without devices.

    Args:
      config: of the run.
      devices: a file, see `read_devices`, or a fleet.
      availability: a file, see `read_availability`, or its periods.

    Raises:
      UserError: a file is not allowed, there is not a device for each client, or there
        are no devices for what needs them.
    """
    count = config.clients.num_clients
    if devices is None:
        for name, value in (
            ("availability", availability),
            ("deadline", config.clients.deadline),
        ):
            if value is not None:
                raise UserError(f"devices: missing; {name} has no effect without them")
        return None
    fleet, name = devices, "the fleet"
    if not isinstance(devices, Fleet):
        fleet = read_devices(Path(devices), seed=config.run.partition_seed)
        name = str(devices)
    assert isinstance(fleet, Fleet)
    # One client with all the data stands for the server, see `clock_devices`.
    if config.strategy.strategy != "centralized" and len(fleet.clients) != count:
        raise UserError(
            f"devices: {name} has {len(fleet.clients)} devices for {count} clients; "
            "allowed is one for each, see num_clients"
        )
    sources = {"devices": _source(devices)}
    periods: tuple[Period, ...] = ()
    if availability is not None:
        sources["availability"] = _source(availability)
        periods = _periods(availability, count)
    return Equipment(fleet, periods, sources)


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
        return Equipment(fleet, tuple(periods), dict(values["sources"]))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"run: {path} is damaged: {type(error).__name__}: {error}"
        ) from error


def _fields(device: Device) -> dict[str, Any]:
    """Return a device as `make_device` reads it; unknown and infinite values lack."""

    def known(value: Any) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        return value not in (None, "")

    values = json.loads(json.dumps(dataclasses.asdict(device)))
    return {name: value for name, value in values.items() if known(value)}


def _periods(availability: Trace, num_clients: int) -> tuple[Period, ...]:
    if isinstance(availability, str | os.PathLike):
        return read_availability(Path(availability), num_clients)
    for period in availability:
        try:
            check_period(period, num_clients)
        except UserError as error:
            raise UserError(f"availability: {error}") from error
    return availability


def _source(given: Devices | Trace) -> str:
    """Return the name of a file, and the start of the digest of its content."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]}"
    return hashlib.sha256(repr(given).encode()).hexdigest()[:_DIGITS]
