"""Flags of the command line, made from the options of `Config`."""

import argparse
import contextlib
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from hsee_jax.cli.absences import read_absences
from hsee_jax.cli.interactions_file import read_interactions
from hsee_jax.config import (
    PRESETS,
    SECTIONS,
    SEEDS,
    Config,
    PluginError,
    flatten,
    load_plugins,
    options,
    override,
    preset,
)
from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Option, at_least, text_of
from hsee_jax.core.paths import expand_home, resolve
from hsee_jax.core.user_cache import user_cache
from hsee_jax.runs.folder import load_config, read_config


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` instead of printing its usage.

    A path of any flag may begin with ``~``; it may not be empty, or a pipe, which can
    be read only once.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Make a parser without flags."""
        super().__init__(*arguments, **keywords)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise UserError(message.removeprefix("argument "))

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse like ``parse_args``, but name the flag nearest to an unknown one.

        Of a repeated flag the last counts, so that a script may add flags to others;
        but plugins add up, as the flags may need those of all lists.
        """
        values, rest = self.parse_known_args(arguments)
        if rest:
            flags = tuple(flag for flag in self._option_string_actions if len(flag) > 2)
            flag = rest[0].partition("=")[0]
            near = difflib.get_close_matches(flag, flags, 1)
            if flag.startswith("-"):
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(
                    f"flag: {flag} is unknown{hint}; allowed are those of "
                    f"`{self.prog} --help`"
                )
            raise UserError(f"argument: {rest[0]} is one too many; see {self.prog} -h")
        return values


def _path(word: str) -> Path:
    try:
        path = expand_home(word, "path")
    except UserError as error:
        reason = str(error).removeprefix("path: ")  # argparse names the flag
        raise argparse.ArgumentTypeError(reason) from error
    with contextlib.suppress(OSError):
        if path.is_fifo():
            raise argparse.ArgumentTypeError(f"{path} is a pipe; allowed is a file")
    return path


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `use_cache` reads."""
    parser.add_argument(
        "--compilation-cache",
        metavar="FOLDER",
        default=argparse.SUPPRESS,
        help="where compiled programs are kept for the next call, or off; without it, "
        "JAX_COMPILATION_CACHE_DIR or hsee_jax in the user's cache folder",
    )


def use_cache(given: dict[str, Any]) -> None:
    """Keep compiled programs where the flags say.

    Args:
      given: flags by name.

    Raises:
      UserError: the folder that a flag names cannot be made.
    """
    chosen = given.get("compilation_cache")
    if chosen is None:
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            return
        chosen = str(user_cache())
    if chosen == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = expand_home(chosen, "compilation_cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if "compilation_cache" not in given:  # a home that cannot be written to
            return
        raise UserError(
            f"compilation_cache: {folder} is not a folder that can be written to"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def count_of(given: Mapping[str, Any], name: str, default: int) -> int:
    """Return the value of a flag that counts something, 1 or more.

    Raises:
      UserError: the value is not allowed.
    """
    option = Option(name, int, default, rules=(at_least(1),))
    return option.checked(given.get(name, default))


def add_plugin(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the flag ``--plugin``, with this help, to a parser without `add_options`."""
    parser.add_argument("--plugin", nargs="+", action="extend", default=[], help=text)


def find_plugins(words: Sequence[str]) -> None:
    """Import the modules that a command line needs, so that they can add flags.

    ``--plugin`` names modules, and so does the configuration that the command starts
    from: the file of ``--config``, or the run in ``--out`` with ``--resume``.

    Raises:
      PluginError: a module cannot be imported.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    add_plugin(parser, "modules to import")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_known_args(words)[0]
    load_plugins(given.plugin)
    if given.config is not None:
        import_plugins_of(given.config)
    elif given.resume and given.out is not None:
        import_plugins_of(given.out / "config.json")


def import_plugins_of(path: Path) -> None:
    """Import the plugins that a configuration file names; skip an invalid file.

    Raises:
      PluginError: a plugin cannot be imported.
    """
    try:
        load_config(path)
    except PluginError:
        raise
    except UserError:
        return  # the command says what is wrong with the file


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option of `Config`, and three that set options indirectly.

    ``--seed`` sets all three seeds; ``--absences-file`` and ``--interactions-file``
    read an option from a file.

    Raises:
      argparse.ArgumentError: an option of a plugin has the name of another flag.
    """
    options()  # refuses two options of one name
    demo = flatten(PRESETS["demo"])
    for section in SECTIONS.values():
        group = parser.add_argument_group(section.__name__.removesuffix("Config"))
        for name, option in section.known().items():
            add_option(group, option, _help(section, option, demo.get(name)))
    parser.add_argument("--seed", type=int, metavar="INT", help="sets all three seeds")
    parser.add_argument(
        "--absences-file",
        type=Path,
        metavar="FILE",
        help="CSV with the columns client,from,to: sets --absences",
    )
    parser.add_argument(
        "--interactions-file",
        type=Path,
        metavar="FILE",
        help="interactions.json of hsee interactions: sets --interactions",
    )


def add_option(place: Any, option: Option, text: str) -> None:
    """Add an option's flag, with this help, to a parser or to one of its groups."""
    nargs = "?" if option.kind is bool else None
    place.add_argument(
        f"--{option.name.replace('_', '-')}",
        type=_parsed(option),
        nargs="+" if option.many else nargs,
        action="extend" if option.name == "plugin" else "store",
        const=True if nargs else None,
        metavar="|".join(option.choices) or option.kind.__name__.upper(),
        help=text.replace("%", "%%"),
    )


def _parsed(option: Option) -> Any:
    """Return the function that turns a word into a value of the option."""
    if option.kind is not bool:
        return option.kind

    def parse(word: str) -> bool:
        if word not in ("true", "false"):
            raise ValueError(word)
        return word == "true"

    parse.__name__ = "true or false"
    return parse


def _help(section: Any, option: Option, demo: Any) -> str:
    """Return an option's help, with its readers and its value in the demo."""
    text, value = option.help, option.default if demo is None else demo
    for registry in section.registries.values():
        own = {
            name: registry[name].options[option.name].default
            for name in registry.readers(option.name)
        }
        if demo is None and len(set(own.values())) > 1:
            defaults = (f"{name} {text_of(value)}" for name, value in own.items())
            text, value = f"{text} ({', '.join(defaults)})", None
        elif own and len(own) < len(registry):
            text += f" ({', '.join(own)})"
        if option.name == registry.kind:
            entries = registry.values()
            text += ": " + "; ".join(f"{e.name}: {e.summary}" for e in entries)
    if value is None or value == ():
        return text
    shown = text_of(value)
    return f"{text} ({shown})" if demo is None else f"{text} (demo: {shown})"


def config_from(given: dict[str, Any], *, stored: Path | None = None) -> Config:
    """Return the named preset, file or stored run, with the given flags applied.

    Args:
      given: flags by name; flags that are not options of `Config` are ignored.
      stored: the folder of the run to resume; None for a new run.

    Raises:
      UserError: a flag is not allowed or has no effect, or a file cannot be read.
    """
    changes = {name: given[name] for name in options() if name in given}
    for name in {"data_dir", "pretrained"} & changes.keys():
        changes[name] = str(resolve(expand_home(changes[name], name)))
    for name in ("absences", "interactions"):
        if f"{name}_file" in given and name in changes:
            raise UserError(f"{name}_file: is not allowed together with {name}")
    if "seed" in given:
        changes = {name: given["seed"] for name in SEEDS} | changes
    if "preset" in given and "config" in given:
        raise UserError("config: is not allowed together with a preset")
    if "config" in given:
        base = load_config(given["config"])
    elif "preset" in given:
        base = preset(given["preset"])
    else:
        base = preset("demo") if stored is None else read_config(stored)
    if "plugin" in changes:  # the base needs its own as well
        both = (*base.run.plugin, *changes["plugin"])
        changes["plugin"] = tuple(dict.fromkeys(both))
    if "absences_file" in given:
        clients = changes.get("num_clients", base.clients.num_clients)
        changes["absences"] = read_absences(given["absences_file"], clients)
    if "interactions_file" in given:
        changes["interactions"] = read_interactions(given["interactions_file"])
    return override(base, **changes)
