"""A configuration as values by name: overridden, flattened, written and read."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

from hsee_jax.config.plugins import load_plugins
from hsee_jax.config.schema import Config
from hsee_jax.config.section import Section
from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.options import Option

SECTIONS: Mapping[str, type[Section]] = {
    field.name: cast(type[Section], field.type) for field in dataclasses.fields(Config)
}


def options() -> dict[str, tuple[str, Option]]:
    """Return every option by its name, with the section that it belongs to."""
    return {
        name: (section, option)
        for section, kind in SECTIONS.items()
        for name, option in kind.known().items()
    }


def override(config: Config, **changes: Any) -> Config:
    """Return a copy with some options changed, named without their section.

    Options that the named network, strategy, ... do not read are dropped.

    Raises:
      UserError: an unknown option, a value that is not allowed, or an option that
        would have no effect.
    """
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


def to_json(config: Config) -> str:
    """Return the configuration as indented JSON, one object a section."""
    values = {section: getattr(config, section).values() for section in SECTIONS}
    return json.dumps(values, indent=2)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Read what `to_json` writes; sections and values may be missing.

    Values of options that the named entries do not read are passed over: files of
    version 0.1 hold them all.

    Raises:
      UserError: an unknown section or option, a value of another type, or one that is
        not allowed.
    """
    for section, content in values.items():
        if section not in SECTIONS:
            raise unknown("section", section, SECTIONS)
        if not isinstance(content, Mapping):
            raise UserError(f"{section}: {content} is not an object of fields")
    values = _migrated(values)
    plugins = SECTIONS["run"].fields()["plugin"]
    load_plugins(plugins.checked(values.get("run", {}).get("plugin", ())))
    sections = {name: _section(name, content) for name, content in values.items()}
    return dataclasses.replace(Config(), **cast(dict[str, Any], sections))


def _migrated(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put options that version 0.1 kept in another section where they are now."""
    clients = dict(values.get("clients", {}))
    if "init" not in clients:
        return values
    strategy = {"init": clients.pop("init"), **values.get("strategy", {})}
    return {**values, "clients": clients, "strategy": strategy}


def _section(name: str, content: Mapping[str, Any]) -> Section:
    kind = SECTIONS[name]
    known, fields = kind.known(), kind.fields()
    for key, value in content.items():
        if key not in known:
            raise unknown(f"field of {name}", key, known)
        known[key].checked(value)
    section = kind(**{key: content[key] for key in fields if key in content})
    active = section.active()
    return section.changed({key: content[key] for key in active if key in content})
