"""Options as flat values of numbers and text, for files that hold no lists."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hsee_jax.config import Config, load_plugins, options, override, preset
from hsee_jax.core.errors import unknown
from hsee_jax.core.options import Option
from hsee_jax.core.paths import expand_home, resolve

_BASE = "preset"


def config_from_flat(values: Mapping[str, Any]) -> Config:
    """Return the configuration that flat values describe.

    Args:
      values: options of `Config` by name, see `flat_value`, and the ``preset`` to start
        from, by default ``demo``.

    Raises:
      UserError: an unknown option or preset, or a value that is not allowed.
    """
    base = preset(str(values.get(_BASE, "demo")))
    plugins = tuple(str(values.get("plugin", "")).split())
    load_plugins(plugins)
    known = options()
    changes = {}
    for name, value in values.items():
        if name != _BASE:
            if name not in known:
                raise unknown("option", name, (_BASE, *known))
            # Only its type: each reader of an option has rules of its own.
            option = replace(known[name][1], rules=(), names=())
            changes[name] = flat_value(option, value)
    if "data_dir" in changes:
        folder = expand_home(changes["data_dir"], "data_dir")
        changes["data_dir"] = str(resolve(folder))
    return override(base, **changes)


def flat_value(option: Option, value: Any) -> Any:
    """Return a value in the type of its option.

    Args:
      option: gives the type and the rules.
      value: as TOML gives it; a text stands for the tuple of its words.

    Raises:
      UserError: the value is of another type, or it is not allowed.
    """
    if not option.many:
        return option.checked(value)
    try:
        entries = tuple(option.kind(word) for word in str(value).split())
    except ValueError as error:
        what = f"words that are each a value of {option.kind.__name__}"
        raise option.refusal(value, what) from error
    return option.checked(entries)
