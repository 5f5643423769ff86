"""Files of devices: a user's TOML or CSV, with a number and a spread for each entry.

A TOML file holds a list of tables named ``devices``, and a table ``server``::

    devices = [
      {device = "raspberry-pi-4", link = "wifi", count = 40},
      {device = "jetson-nano", count = 10},
      {device = "phone-a18-pro", link = "lte", count = 50, link_spread = 0.5},
    ]
    server = {device = "gpu-server"}

A CSV file holds a header with the same fields, and a row for each entry::

    device,link,count
    raspberry-pi-4,wifi,40

A CSV names no server; `Fleet.server` is then ``gpu-server`` of the catalogue.
"""

import csv
import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.core.errors import DAMAGE, UserError, unknown
from hsee_jax.core.rows import csv_rows
from hsee_jax.systems.devices import (
    Device,
    check_entry,
    entry_fields,
    find_device,
    make_device,
)

DEFAULT_SERVER = "gpu-server"
# What a server does not have.
_ONCE = ("count", "compute_spread", "link_spread", "cluster")
_CHANGES = ("battery_joules", "change_round", "compute_change", "link_change")


class Cluster(NamedTuple):
    """A client that is made of several devices."""

    client: int
    devices: tuple[Device, ...]  # in the order of the layers


class Fleet(NamedTuple):
    """The devices of a federation."""

    # Of client 0, 1, ...; a cluster has its last device here, with the cluster's name.
    clients: tuple[Device, ...]
    server: Device
    clusters: tuple[Cluster, ...] = ()


def read_devices(path: str | Path, *, seed: int = 0) -> Fleet:
    """Read a file of devices.

    Args:
      path: a file of TOML if its name ends in ``.toml``, else of CSV.
      seed: the seed of the spread. A device's draw depends only on it and on the
        device's number.

    Raises:
      UserError: the file cannot be read, has no entry, or an entry is not allowed.
    """
    path = Path(path)
    is_toml = path.suffix.lower() == ".toml"
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = _toml(text) if is_toml else _csv(text)
    except UserError as error:
        raise UserError(f"devices: {path}: {error}") from error
    except (OSError, csv.Error, *DAMAGE) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"devices: {path} cannot be read: {reason}; allowed is TOML or CSV in UTF-8"
        ) from error
    devices: list[tuple[str | None, Device]] = []  # with the cluster
    for where, values in content.entries:
        try:
            own = _expand(values, len(devices), seed)
            devices += [(values.get("cluster"), device) for device in own]
        except UserError as error:
            raise UserError(f"devices: {path}, {where}: {error}") from error
    if not devices:
        raise UserError(f"devices: {path} has no entry; allowed is 1 or more")
    try:
        server = _server(content.server)
    except UserError as error:
        raise UserError(f"devices: {path}, server: {error}") from error
    return _fleet(devices, server)


def _fleet(devices: Iterable[tuple[str | None, Device]], server: Device) -> Fleet:
    """Gather the devices of each cluster; a cluster takes its first device's place."""
    members: dict[str | int, list[Device]] = {}
    for number, (cluster, device) in enumerate(devices):
        members.setdefault(number if cluster is None else cluster, []).append(device)
    clients, clusters = [], []
    for client, (key, own) in enumerate(members.items()):
        if isinstance(key, str):
            clients.append(dataclasses.replace(own[-1], name=key))
            clusters.append(Cluster(client, tuple(own)))
        else:
            clients += own
    return Fleet(tuple(clients), server, tuple(clusters))


class _Content(NamedTuple):
    entries: list[tuple[str, Mapping[str, Any]]]  # with their place in the file
    server: Mapping[str, Any]


def _toml(text: str) -> _Content:
    content = tomllib.loads(text)
    for name in content:
        if name not in ("devices", "server"):
            raise unknown("table", name, ("devices", "server"))
    entries, server = content.get("devices", []), content.get("server", {})
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UserError("devices: not a list of tables; allowed is [[devices]]")
    if not isinstance(server, dict):
        raise UserError("server: not a table; allowed is [server]")
    return _Content([(f"entry {n}", e) for n, e in enumerate(entries, 1)], server)


def _csv(text: str) -> _Content:
    """Read rows separated by commas, semicolons or tabs; blank rows are ignored."""
    rows = csv_rows(text)
    if not rows:
        return _Content([], {})
    names = rows[0][1]
    for name in names:
        if name not in entry_fields():
            raise unknown("column", name, entry_fields())
        if names.count(name) > 1:
            raise UserError(f"column: {name} is not allowed twice; allowed is once")
    return _Content([_row(names, *row) for row in rows[1:]], {})


def _row(
    names: list[str], line: int, cells: list[str]
) -> tuple[str, Mapping[str, Any]]:
    where = f"line {line}"
    if len(cells) > len(names):
        raise UserError(
            f"{where}: {len(cells)} values for {len(names)} columns; allowed is one "
            "for each column"
        )
    pairs = zip(names, cells, strict=False)
    return where, {name: _value(name, cell) for name, cell in pairs if cell}


def _value(name: str, cell: str) -> Any:
    """Return a cell as a number, if its field is a number and the cell reads as one."""
    try:
        return entry_fields()[name].kind(cell)
    except ValueError:
        return cell  # which the check of the entry refuses


def _expand(values: Mapping[str, Any], first: int, seed: int) -> Iterable[Device]:
    """Yield the devices of an entry, the first of them with the number ``first``."""
    device, own = make_device(values), check_entry(values)
    if "change_round" in own and not {"compute_change", "link_change"} & set(own):
        raise UserError(
            "change_round: has no effect without compute_change or link_change"
        )
    compute, link = own.get("compute_spread", 0.0), own.get("link_spread", 0.0)
    for number in range(first, first + own.get("count", 1)):
        if not compute and not link:
            yield device
            continue
        draws = np.random.default_rng((seed, number)).standard_normal(2)
        yield vary(device, math.exp(compute * draws[0]), math.exp(link * draws[1]))


def vary(device: Device, compute: float, link: float) -> Device:
    """Return a device with its computing speed and link rates times these factors."""
    measured = device.measured
    return dataclasses.replace(
        device,
        forward_flops_per_s=_scaled(device.forward_flops_per_s, compute),
        backward_flops_per_s=_scaled(device.backward_flops_per_s, compute),
        up_bytes_per_s=device.up_bytes_per_s * link,
        down_bytes_per_s=device.down_bytes_per_s * link,
        measured=None if measured is None else measured.scaled(1 / compute),
    )


def _scaled(rate: float, factor: float) -> float:
    """Return a rate times a factor; keep NaN, which equals only itself in a key."""
    return rate if math.isnan(rate) else rate * factor


def _server(values: Mapping[str, Any]) -> Device:
    if not values:
        return find_device(DEFAULT_SERVER)
    for name in _ONCE:
        if name in values:
            raise UserError(f"{name}: not allowed; there is one server")
    for name in _CHANGES:
        if name in values:
            raise UserError(f"{name}: not allowed; a server does not change")
    return make_device({"link": "ethernet", **values})
