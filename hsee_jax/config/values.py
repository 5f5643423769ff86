"""A configuration as values by name: overridden, flattened, written and read."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

from hsee_jax.config.plugins import load_plugins
from hsee_jax.config.schema import BOOKKEEPING, Config, DataConfig
from hsee_jax.config.section import Section, name_taken
from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.options import Option
from hsee_jax.data import DATASETS, KNOWN

SECTIONS: Mapping[str, type[Section]] = {
    field.name: cast(type[Section], field.type) for field in dataclasses.fields(Config)
}


def options() -> dict[str, tuple[str, Option]]:
    """Return every option by its name, with the section that it belongs to.

    Raises:
      UserError: a plugin gives an option the name of another.
    """
    found: dict[str, tuple[str, Option]] = {}
    for section, kind in SECTIONS.items():
        for name, option in kind.known().items():
            if name in found:
                raise name_taken(name, (SECTIONS[found[name][0]], kind))
            found[name] = section, option
    return found


def override(config: Config, **changes: Any) -> Config:
    """Return a copy with some options changed, named without their section.

    Options that the named network, strategy, ... do not read are dropped.

    Raises:
      UserError: a change names an unknown option, has a value that is not allowed,
        or would have no effect.
    """
    load_plugins(SECTIONS["run"].fields()["plugin"].checked(changes.get("plugin", ())))
    known = options()
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in known:
            raise unknown("field", name, known)
        sections.setdefault(known[name][0], {})[name] = value
    changed = {
        name: getattr(config, name).changed(values) for name, values in sections.items()
    }
    return dataclasses.replace(config, **changed)


def flatten(config: Config) -> dict[str, Any]:
    """Return all values by name."""
    return {
        name: value
        for section in SECTIONS
        for name, value in getattr(config, section).values().items()
    }


def settings(config: Config) -> dict[str, Any]:
    """Return the options that have an effect on a training, as values of JSON.

    They include the folder of the data only if the data are the user's own.
    """
    values = flatten(config)
    kept = {"data_dir"} if is_own_data(values) else set()
    left_out = set(BOOKKEEPING) - kept
    return json.loads(
        json.dumps({name: v for name, v in values.items() if name not in left_out})
    )


def is_own_data(values: Mapping[str, Any]) -> bool:
    """Return whether a run is on the user's own data, not on a known dataset.

    Args:
      values: the options of the run, by name. A dataset of a plugin that is not
        imported counts as the user's own.
    """
    if values.get("dataset") not in DATASETS:
        return True
    return DATASETS.make(values["dataset"], options=values).info is None


def to_json(config: Config) -> str:
    """Return the configuration as indented JSON, one object a section."""
    values = {section: getattr(config, section).values() for section in SECTIONS}
    return json.dumps(values, indent=2)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Make a configuration from values in the form of `to_json`; some may be missing.

    Files of version 0.1, which have ``init`` among the clients and no network, hold the
    options of all entries; there, options that the named entries do not read are
    checked and dropped.

    Raises:
      UserError: an unknown section or option, a value that is not allowed, or an option
        that would have no effect.
    """
    for section, content in values.items():
        if section not in SECTIONS:
            raise unknown("section", section, SECTIONS)
        if not isinstance(content, Mapping):
            raise UserError(f"{section}: {content} is not an object of fields")
    clients = values.get("clients", {})
    strict = "init" not in clients or "network" in values.get("model", {})
    values = _migrated(values)
    plugins = SECTIONS["run"].fields()["plugin"]
    load_plugins(plugins.checked(values.get("run", {}).get("plugin", ())))
    sections = {
        name: _section(name, content, strict=strict) for name, content in values.items()
    }
    return dataclasses.replace(Config(), **cast(dict[str, Any], sections))


def _migrated(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put options that earlier versions kept elsewhere where they are now."""
    data = dict(values.get("data", {}))
    dataset = data.get("dataset", DataConfig.dataset)
    if "labels" in data and isinstance(dataset, str) and dataset in KNOWN:
        # Every dataset had this option, and known datasets could not change it.
        known = DATASETS.options()["labels"]
        if known.checked(data["labels"]) == "refuse":
            del data["labels"]
        values = {**values, "data": data}
    clients = dict(values.get("clients", {}))

    if "init" not in clients:
        return values
    strategy = {"init": clients.pop("init"), **values.get("strategy", {})}
    return {**values, "clients": clients, "strategy": strategy}


def _section(name: str, content: Mapping[str, Any], *, strict: bool) -> Section:
    kind = SECTIONS[name]
    known, fields = kind.known(), kind.fields()
    for key in content:
        if key not in known:
            raise unknown(f"field of {name}", key, known)
    section = kind(**{key: content[key] for key in fields if key in content})
    active = section.active()
    for key in content.keys() - fields.keys() - active.keys():
        if strict:
            raise section.no_effect(key, content[key])
        known[key].checked(content[key])
    return section.changed({key: content[key] for key in active if key in content})
