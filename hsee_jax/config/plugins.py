"""Plugins: a user's modules, imported so that what they register can be named."""

import functools
import importlib
import sys
from collections.abc import Iterable

from hsee_jax.core.errors import UserError


@functools.cache
def load_plugin(name: str) -> None:
    """Import a module, from the current folder too; what it registers can be named.

    Raises:
      UserError: there is no such module, or it cannot be imported.
    """
    if "" not in sys.path:
        sys.path.append("")
    try:
        importlib.import_module(name)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"plugin: {name} cannot be imported ({type(error).__name__}: {reason}); "
            "allowed is a module on Python's path or in the current folder"
        ) from error


def load_plugins(names: Iterable[str]) -> None:
    """Import modules, see `load_plugin`."""
    for name in names:
        load_plugin(name)
