"""Plugins: a user's modules, imported so that what they register can be named."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable

from hsee_jax.core.errors import UserError, one_line


class PluginError(UserError):
    """A plugin cannot be imported."""


def load_plugins(names: Iterable[str]) -> None:
    """Import modules, also from the current folder, so that they register their parts.

    Raises:
      PluginError: a module is not there, or it cannot be imported.
    """
    for name in names:
        folder = os.getcwd()
        sys.path.insert(0, folder)
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a script may end with sys.exit
            reason = one_line(error)
            raise PluginError(
                f"plugin: {name} cannot be imported ({type(error).__name__}: {reason})"
                "; allowed is a module on Python's path or in the current folder"
            ) from error
        finally:
            with contextlib.suppress(ValueError):  # the module may have changed it
                sys.path.remove(folder)
