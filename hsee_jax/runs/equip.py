"""From the files that a caller names to the `Equipment` of a run, new or resumed."""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.runs.equipment import (
    FILE,
    Equipment,
    check_count,
    equipment_values,
    stored_equipment,
)
from hsee_jax.runs.history import read_records
from hsee_jax.systems.availability import Period, check_period, read_availability
from hsee_jax.systems.device_file import Fleet, read_devices

_DIGITS = 6  # of a digest, enough to tell files of one name apart
_PARTS = {"devices": ("clients", "server"), "availability": ("availability",)}

# Of a caller: a file, or its content.
Devices = str | os.PathLike[str] | Fleet
Trace = str | os.PathLike[str] | tuple[Period, ...]


class Given(NamedTuple):
    """What a caller gives for the simulated clock.

    The folder of the run keeps it, so ``resume`` does not need it again.
    """

    devices: Devices | None = None  # of client 0, 1, ..., see `read_devices`
    availability: Trace | None = None  # see `read_availability`


def equip(config: Config, given: Given, *, resume: Path | None) -> Equipment | None:
    """Return the devices of a run and their availability; None without devices.

    Args:
      config: of the run.
      given: by the caller.
      resume: the folder of the run to go on with, which keeps its own.

    Raises:
      UserError: a file is not valid, the number of devices is not the number of
        clients, or an availability or a deadline comes without devices; or, to go on
        with a run, what is given differs from what the run has.
    """
    if resume is None:
        return _read(config, given)
    stored = stored_equipment(resume)
    if stored is None:
        _check_lost(resume, given)
        return _read(config, given)
    check_count(config, stored, str(resume / FILE))
    for name, value in given._asdict().items():
        if value is None:
            continue
        other = _read(config, Given(stored.fleet)._replace(**{name: value}))
        assert other is not None
        if _parts(other, name) != _parts(stored, name):
            raise _not_same(name, value, has_some=name in stored.sources)
    return stored


def _parts(equipment: Equipment, name: str) -> list[Any]:
    values = equipment_values(equipment)
    return [values[part] for part in _PARTS[name]]


def _not_same(name: str, value: Devices | Trace, *, has_some: bool) -> UserError:
    what = value if isinstance(value, str | os.PathLike) else "this"
    has = "others" if has_some else "none"
    return UserError(f"{name}: {what} is not allowed with --resume; the run has {has}")


def _check_lost(folder: Path, given: Given) -> None:
    """Refuse to go on with a run without its ``devices.json``, unless it had none."""
    records = []
    if (folder / "metrics.jsonl").is_file():
        records = read_records(folder, limit=1)
    had_some = any(record.simulated is not None for record in records)
    if had_some and given.devices is None:
        raise UserError(
            f"devices: missing; {folder / FILE} is lost, so the devices of the run "
            "have to be given again"
        )
    for name, value in given._asdict().items():
        if value is not None and not had_some:
            raise _not_same(name, value, has_some=False)


def check_no_clusters(fleet: Fleet) -> None:
    """Refuse clients of several devices.

    Raises:
      UserError: there is such a client.
    """
    for cluster in fleet.clusters:
        raise UserError(
            f"devices: cluster {fleet.clients[cluster.client].name} is not allowed in "
            "training; allowed is a device for each client"
        )


def _read(config: Config, given: Given) -> Equipment | None:
    """Read what a caller gives."""
    count, devices = config.clients.num_clients, given.devices
    if devices is None:
        needs = {
            "availability": given.availability,
            "deadline": config.clients.deadline,
        }
        for name, value in needs.items():
            if value is not None:
                raise UserError(f"devices: missing; {name} has no effect without them")
        return None
    if isinstance(devices, Fleet):
        fleet, name = devices, "the fleet"
    else:
        fleet = read_devices(Path(devices), seed=config.run.partition_seed)
        name = str(devices)
    check_no_clusters(fleet)
    equipment = Equipment(fleet, (), {"devices": _source(devices)})
    check_count(config, equipment, name)
    if given.availability is None:
        return equipment
    periods = _periods(given.availability, count)
    sources = {**equipment.sources, "availability": _source(given.availability)}
    return Equipment(fleet, periods, sources)


def _periods(trace: Trace, num_clients: int) -> tuple[Period, ...]:
    if isinstance(trace, str | os.PathLike):
        return read_availability(Path(trace), num_clients)
    for period in trace:
        try:
            check_period(period, num_clients)
        except UserError as error:
            raise UserError(f"availability: {error}") from error
    return trace


def _source(given: Devices | Trace) -> str:
    """Return the name of a file, and the start of the digest of its content."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]}"
    return hashlib.sha256(repr(given).encode()).hexdigest()[:_DIGITS]
