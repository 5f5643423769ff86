"""Flags of the command line, made from the fields of `Config`."""

import argparse
import csv
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from hsee_jax.core.errors import UserError
from hsee_jax.config.presets import PRESETS, preset
from hsee_jax.config.schema import SEEDS, Config, options, override
from hsee_jax.core.options import takes_many, value_type


class Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Instead of an exit."""
        raise UserError(message.removeprefix("argument "))

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Like ``parse_args``, but names the nearest flag to an unknown one."""
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


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The flag that `use_cache` reads."""
    parser.add_argument(
        "--compilation-cache",
        metavar="FOLDER",
        default=argparse.SUPPRESS,
        help="where compiled programs are kept for the next call, or off; without it, "
        "JAX_COMPILATION_CACHE_DIR or hsee_jax in the user's cache folder",
    )


def use_cache(given: dict[str, Any]) -> None:
    """Keeps compiled programs where the flags say."""
    chosen = given.get("compilation_cache")
    if chosen is None:
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            return
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        chosen = str(Path(home) / "hsee_jax")
    if chosen == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = Path(chosen).expanduser()
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
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def add_options(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of `Config`, and ``--seed`` for three of them."""
    for name, (section, item) in options().items():
        choices = item.metadata["choices"]
        default = getattr(getattr(PRESETS["demo"], section), name)
        shown = " ".join(default) if takes_many(item) else default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=value_type(item),
            nargs="+" if takes_many(item) else None,
            metavar="|".join(choices) or value_type(item).__name__.upper(),
            help=f"{item.metadata['help']} (demo: {shown})".replace("%", "%%"),
        )
    parser.add_argument("--seed", type=int, metavar="INT", help="sets all three seeds")
    parser.add_argument(
        "--absences-file",
        type=Path,
        metavar="FILE",
        help="CSV with the columns client,from,to: sets --absences",
    )


def _absences(path: Path) -> tuple[str, ...]:
    """`absences` from a CSV file with the columns client, from and to."""
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            return tuple(f"{row['client']}:{row['from']}-{row['to']}" for row in rows)
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"absences_file: {path} cannot be read; allowed is CSV with the columns "
            "client,from,to"
        ) from error


def config_from(given: dict[str, Any], *, stored: Path | None = None) -> Config:
    """The preset, file or stored run that was named, with the given flags applied."""
    from hsee_jax.runs.folder import load_config, read_config
    from hsee_jax.algorithms.hetero_splitee import readers_of

    changes = {name: given[name] for name in options() if name in given}
    if "data_dir" in changes:
        changes["data_dir"] = str(Path(changes["data_dir"]).expanduser().resolve())
    if "absences_file" in given:
        if "absences" in changes:
            raise UserError("absences_file: is not allowed together with absences")
        changes["absences"] = _absences(given["absences_file"])
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
    config = override(base, **changes)
    strategy = config.strategy.strategy
    for name in changes:
        readers = readers_of(name)
        if readers and strategy not in readers:
            raise UserError(
                f"{name}: {changes[name]} has no effect on {strategy}; it is read by "
                f"{', '.join(readers)}"
            )
    return config
