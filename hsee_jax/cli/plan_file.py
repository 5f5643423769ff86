"""The cuts of a plan, for ``hsee train``: read from a file, or planned at once."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from hsee_jax.cli.flags import config_from
from hsee_jax.config import Config, override
from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.runs.build import build_model
from hsee_jax.runs.equip import check_no_clusters
from hsee_jax.runs.planning import (
    Resources,
    config_with_plans,
    planning,
    problem_of,
)
from hsee_jax.systems.device_file import read_devices
from hsee_jax.systems.planner import plan_cuts

AUTO = ["auto"]  # the value of --cuts that asks for a plan


class Cuts(NamedTuple):
    """What training needs of a plan."""

    cuts: tuple[str, ...]  # of client 0, 1, ...
    layers: tuple[str, ...]  # the names of the network's layers


def read_cuts(path: Path) -> Cuts:
    """Read a file that ``hsee plan`` wrote.

    Raises:
      UserError: the file cannot be read, or is not a plan.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        layers = tuple(str(name) for name in plan["layers"])
        cuts = tuple(client["cut"] for client in plan["clients"])
        allowed = range(1, len(layers) + 1)
        if not cuts or any(type(c) is not int or c not in allowed for c in cuts):
            raise ValueError("a cut is not a number of a layer")
    except OSError as error:
        raise UserError(f"plan: {path} cannot be read: {error.strerror}") from error
    except DAMAGE as error:
        raise UserError(
            f"plan: {path} is not a plan; allowed is a plan.json of `hsee plan`"
        ) from error
    return Cuts(tuple(map(str, cuts)), layers)


def config_with_plan(given: dict[str, Any], *, stored: Path | None) -> Config:
    """Return the configuration of a run, with the cuts of the plan that a flag names.

    With ``--cuts auto`` the cuts are still missing; `plan_now` adds them.

    Args:
      given: flags by name.
      stored: see `config_from`.

    Raises:
      UserError: see `config_from`; or a flag contradicts the plan, the plan is for
        another network, or ``--cuts auto`` lacks a file of devices, or is given with a
        configuration that has a plan.
    """
    if "plan" in given:
        return _from_file(given, given["plan"], stored)
    if given.get("cuts") == AUTO:
        if "devices" not in given:
            raise UserError("devices: missing; --cuts auto needs a file of devices")
        taken = ("num_clients", "recuts")
        _refuse(given, taken, f"the devices of {given['devices']}")
        given = {name: value for name, value in given.items() if name != "cuts"}
        given["num_clients"] = len(read_devices(given["devices"]).clients)
        goes_on = stored is not None and not {"preset", "config"} & given.keys()
        return _without_plan(config_from(given, stored=stored), given, goes_on=goes_on)
    elif "replan_every" in given:
        raise UserError("replan_every: has no effect; it is read with --cuts auto")
    return config_from(given, stored=stored)


def _without_plan(config: Config, given: dict[str, Any], *, goes_on: bool) -> Config:
    """Return the configuration that is to be planned.

    Args:
      config: with all flags.
      given: flags by name.
      goes_on: whether the configuration is that of a run, which is planned once more,
        with the absences that the flags repeat.

    Raises:
      UserError: another configuration has a plan already.
    """
    if goes_on:
        by_flag = {"absences", "absences_file"} & given.keys()
        absences = config.clients.absences if by_flag else ()
        return override(config, recuts=(), absences=absences)
    if config.clients.recuts:
        raise UserError(
            f"recuts: {' '.join(config.clients.recuts)} of the configuration is not "
            "allowed with --cuts auto; allowed is a configuration without"
        )
    return config


def plan_now(
    config: Config,
    devices: Path,
    every: int | None = None,
    availability: Path | None = None,
) -> Config:
    """Return a configuration with the fastest cuts for a file of devices.

    Args:
      config: the run's configuration.
      devices: the file of devices.
      every: the rounds after which the cuts are planned again; None for never.
      availability: the file of the times at which devices are available.

    Raises:
      UserError: a value is not allowed, or a device fits no cut; or a battery would pay
        for rounds that its client may miss.
    """
    fleet = read_devices(devices, seed=config.run.partition_seed)
    check_no_clusters(fleet)
    if every is not None:
        battery = any(math.isfinite(one.battery_joules) for one in fleet.clients)
        misses = {"availability": availability, "deadline": config.clients.deadline}
        for name, given in misses.items():
            if battery and given is not None:
                raise UserError(
                    f"{name}: is not allowed with replan_every and a battery, which "
                    "would pay for rounds that its device misses"
                )
        if every < 1:
            raise UserError(
                f"replan_every: {every} is not allowed; allowed is 1 or more"
            )
        return config_with_plans(config, Resources(fleet), every)
    answer = plan_cuts(problem_of(planning(config, Resources(fleet))))
    cuts = tuple(map(str, answer.cuts.tolist()))
    return override(config, cuts=cuts, num_clients=len(cuts))


def _from_file(given: dict[str, Any], path: Path, stored: Path | None) -> Config:
    _refuse(given, ("cuts", "num_clients", "replan_every"), f"plan {path}")
    plan = read_cuts(path)
    own = {"cuts": plan.cuts, "num_clients": len(plan.cuts)}
    config = config_from(given | own, stored=stored)
    layers = build_model(config, plain=True).layer_names  # asks for no backend yet
    if plan.layers != layers:
        raise UserError(
            f"plan: {path} is for a network of the layers {', '.join(plan.layers)}; "
            f"this network has {', '.join(layers)}"
        )
    return config


def _refuse(given: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    for name in names:
        if name in given:
            raise UserError(f"{name}: is not allowed together with {what}")
