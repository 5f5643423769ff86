"""Devices: how fast they compute, what they can hold, send and draw.

The package ships a catalogue, ``devices.toml``, which gives the source of each entry.
An entry of a user's file starts from an entry of the catalogue, or from nothing.
"""

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.options import Option, at_least, between, positive, read_options
from hsee_jax.systems.measured import Measured, read_measured


@dataclass(frozen=True)
class Device:
    """A device and its link to the server."""

    name: str
    forward_flops_per_s: float  # in training; not the peak of the data sheet
    backward_flops_per_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    message_overhead_s: float = 0.0  # of each message, in either direction
    memory_bytes: float = math.inf  # for training; infinite sets no limit
    # Draw of the whole device; NaN where it is not known.
    busy_watts: float = math.nan
    sending_watts: float = math.nan
    receiving_watts: float = math.nan
    idle_watts: float = math.nan
    battery_joules: float = math.inf  # at the start of a run
    change_round: int | None = None  # the next two hold from it on; counted from 1
    compute_change: float = 1.0  # factor of the computing speed
    link_change: float = 1.0  # factor of the rates of the link
    measured: Measured | None = None  # wins over the FLOP/s
    source: str = ""  # of the numbers, for the reader


@dataclass(frozen=True)
class Entry:
    """The fields of an entry; the catalogue's value holds for a missing field."""

    device: Annotated[str | None, "entry of the catalogue to start from"] = None
    link: Annotated[str | None, "link of the catalogue; rates of the entry win"] = None
    count: Annotated[int, "number of such devices", between(1, 1_000_000)] = 1
    compute_spread: Annotated[
        float,
        "standard deviation of the logarithm of the computing speed over the devices "
        "of the entry, whose own speed is the median",
        between(0, 10),
    ] = 0.0
    link_spread: Annotated[
        float, "as compute_spread, for both rates of the link", between(0, 10)
    ] = 0.0
    name: Annotated[str | None, "name in tables; by default that of device"] = None
    forward_flops_per_s: Annotated[
        float | None, "FLOP/s of the forward pass in training", positive
    ] = None
    backward_flops_per_s: Annotated[
        float | None, "FLOP/s of the backward pass; by default as forward", positive
    ] = None
    up_bytes_per_s: Annotated[float | None, "bytes/s to the server", positive] = None
    down_bytes_per_s: Annotated[
        float | None, "bytes/s from the server; by default as up", positive
    ] = None
    message_overhead_s: Annotated[
        float | None, "seconds that a message takes besides its bytes", at_least(0)
    ] = None
    memory_bytes: Annotated[float | None, "memory for training", positive] = None
    busy_watts: Annotated[float | None, "draw while it computes", at_least(0)] = None
    sending_watts: Annotated[float | None, "draw while it sends", at_least(0)] = None
    receiving_watts: Annotated[float | None, "draw while it receives", at_least(0)] = (
        None
    )
    idle_watts: Annotated[float | None, "draw while it waits", at_least(0)] = None
    battery_joules: Annotated[
        float | None,
        "energy at the start of a run, for --replan-every; by default unlimited",
        positive,
    ] = None
    change_round: Annotated[
        int | None, "round of a run from which the device changes", at_least(2)
    ] = None
    compute_change: Annotated[
        float | None, "factor of the computing speed from change_round on", positive
    ] = None
    link_change: Annotated[
        float | None, "factor of the rates of the link from change_round on", positive
    ] = None
    source: Annotated[str | None, "where the numbers come from"] = None
    cluster: Annotated[
        str | None,
        "name of a cluster: its devices form one client, in the order of the file; the "
        "first has the data, the last sends to the server",
    ] = None


@functools.cache
def entry_fields() -> Mapping[str, Option]:
    """Return the fields of an entry as options, by name."""
    return read_options(Entry, list(Entry.__dataclass_fields__))


@functools.cache
def _shipped() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    file = resources.files("hsee_jax.systems") / "devices.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def links() -> Mapping[str, Mapping[str, Any]]:
    """Return the fields of the links that the package knows, by name."""
    return _shipped()["links"]


def catalogue() -> dict[str, Device]:
    """Return the devices that the package knows, by name."""
    return {name: find_device(name) for name in _shipped()["devices"]}


def find_device(name: str, link: str | None = None) -> Device:
    """Return a device of the catalogue.

    Args:
      name: the device's name.
      link: a link of the catalogue; None for the link that the entry names.

    Raises:
      UserError: the catalogue has no such device or link.
    """
    return make_device({"device": name} | ({} if link is None else {"link": link}))


def make_device(values: Mapping[str, Any]) -> Device:
    """Make a device from the fields of an entry, see `Entry`.

    Args:
      values: the fields by name, and ``measured`` as `read_measured` takes it; the
        number of devices, the spreads and the cluster are checked but not used.

    Raises:
      UserError: a field is unknown, missing, or has a value that is not allowed.
    """
    own = check_entry(values)
    base: Mapping[str, Any] = {}
    if "device" in own:
        base = _named("device", own["device"])
        base = {"name": own["device"], **base}
    link = own.get("link", base.get("link"))
    rates = {} if link is None else dict(_named("link", link))
    rates.pop("source", None)
    known = {**base, **rates, **own}
    found: dict[str, Any] = {
        name: known[name] for name in Device.__dataclass_fields__ if name in known
    }
    measured = read_measured(values["measured"]) if "measured" in values else None
    if measured is not None:  # it wins, so a rate may be missing
        found.setdefault("forward_flops_per_s", math.nan)
    if "change_round" not in own:
        for name in ("compute_change", "link_change"):
            if name in own:
                raise UserError(f"{name}: has no effect without change_round")
    for name in ("name", "forward_flops_per_s", "up_bytes_per_s"):
        if name not in found:
            raise UserError(f"{name}: missing; {_INSTEAD[name]}")
    found.setdefault("backward_flops_per_s", found["forward_flops_per_s"])
    found.setdefault("down_bytes_per_s", found["up_bytes_per_s"])
    return Device(**found, measured=measured)


_INSTEAD = {
    "name": "an entry without device needs it",
    "forward_flops_per_s": "an entry without device needs it, or measured seconds",
    "up_bytes_per_s": "an entry without device needs it, or a link",
}


def check_entry(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry's fields in their types, without ``measured`` and without None.

    Raises:
      UserError: a field is unknown, or its value is not allowed.
    """
    fields = entry_fields()
    own = {name: value for name, value in values.items() if name != "measured"}
    for name in own:
        if name not in fields:
            raise unknown("field", name, [*fields, "measured"])
    return {n: fields[n].checked(v) for n, v in own.items() if v is not None}


def _named(kind: str, name: str) -> Mapping[str, Any]:
    known = _shipped()[f"{kind}s"]
    if name not in known:
        raise unknown(kind, name, known)
    return known[name]
