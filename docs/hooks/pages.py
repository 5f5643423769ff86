"""The generated pages: the reference, and API pages that nobody has written yet.

Everything on them is read from the registries, the configuration, the parsers of the
commands and the packages, so that it cannot be out of date.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from cells import flag
from commands import actions, anchor, cli
from configuration import configuration
from devices import devices

import hsee_jax
from hsee_jax.cli.commands import COMMANDS
from hsee_jax.config import options

DOCS = Path(__file__).parents[1]
CLI, CONFIGURATION = "reference/cli.md", "reference/configuration.md"
DEVICES = "reference/devices.md"
# Pages whose source lies outside of docs/.
SOURCES = {
    "changelog.md": "CHANGELOG.md",
    "examples/first_run.ipynb": "examples/first_run.ipynb",
    "examples/exits.ipynb": "examples/exits.ipynb",
}


def generated() -> Mapping[str, str]:
    """Return the generated pages: the path below docs/, and the Markdown."""
    own = {CLI: cli(), CONFIGURATION: configuration(), DEVICES: devices()}
    return own | {
        path: _api(package)
        for package, path in api_paths().items()
        if not (DOCS / path).exists()
    }


def api_paths() -> dict[str, str]:
    """Return the page of each package, below docs/; a page may not be written yet."""
    found = pkgutil.iter_modules(hsee_jax.__path__)
    names = sorted(module.name for module in found if module.ispkg)
    return {name: f"reference/api/{name}.md" for name in names}


def _api(package: str) -> str:
    """Write the page of a package that has none: its public names in order."""
    name = f"hsee_jax.{package}"
    module = importlib.import_module(name)
    files = {file.name for file in pkgutil.iter_modules(module.__path__)}
    # A function may have the name of its file.
    paths = [f"{one}.{one}" if one in files else one for one in module.__all__]
    entries = [f"::: {name}.{path}" for path in paths]
    summary = (module.__doc__ or "").strip().splitlines()[0]
    return "\n\n".join([f"# {name}", summary, *entries]) + "\n"


@functools.cache
def anchors() -> Mapping[str, str]:
    """Return the place of every flag: its name, and the page with the anchor."""
    found = {f"--{flag(name)}": f"{CONFIGURATION}#option-{name}" for name in options()}
    for command in COMMANDS:
        for action in actions(command):
            name = action.option_strings[-1] if action.option_strings else ""
            found.setdefault(name, f"{CLI}#{anchor(command, action)}")
    return found
