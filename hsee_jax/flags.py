"""Flags of the command line, made from the fields of `Config`."""

import argparse
import csv
import difflib
import os
import re
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


_COLUMNS = ("client", "from", "to")  # of an absences file


def _absences(path: Path, num_clients: int) -> tuple[str, ...]:
    """Read `absences` from a CSV file with the columns client, from and to.

    Columns are separated by commas, semicolons or tabs. A byte order mark, blank lines,
    other columns, and spaces around names and values have no meaning.

    Args:
      path: of the file.
      num_clients: clients there are.

    Raises:
      UserError: the file cannot be read, lacks a column, or holds a value that is not
        allowed.
    """
    rows = _rows(path)
    names = rows[0][1] if rows else []
    for name in _COLUMNS:
        if names.count(name) != 1:
            raise UserError(
                f"absences_file: {path} has {names.count(name)} columns {name} among "
                f"{', '.join(names) or 'none'}; allowed are {','.join(_COLUMNS)}, "
                "separated by commas, semicolons or tabs"
            )
    return tuple(
        _absence(
            dict(zip(names, texts, strict=False)),
            f"absences_file: {path}, line {number}",
            num_clients,
        )
        for number, texts in rows[1:]
    )


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Read the rows of a CSV file that are not blank, with their line numbers."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        header = next(filter(str.strip, lines), "")
        mark = max(",;\t", key=header.count)
        reader = csv.reader(lines, delimiter=mark, skipinitialspace=True)
        rows = [(reader.line_num, [text.strip() for text in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"absences_file: {path} cannot be read: "
            f"{getattr(error, 'strerror', None) or error}; allowed is CSV in UTF-8 "
            f"with the columns {','.join(_COLUMNS)}"
        ) from error
    return [(number, texts) for number, texts in rows if any(texts)]


def _absence(values: dict[str, str], where: str, num_clients: int) -> str:
    """Return a row as an entry of `absences`; errors begin with ``where``."""
    for name in _COLUMNS:
        if not re.fullmatch(r"\d{1,9}", values.get(name, "")):
            raise UserError(
                f"{where}: {name} {values.get(name, '')!r} is not allowed; allowed is "
                "a whole number of at most 9 digits"
            )
    client, first, last = (int(values[name]) for name in _COLUMNS)
    if client >= num_clients:
        raise UserError(
            f"{where}: client {client} is not allowed; allowed are 0..{num_clients - 1}"
        )
    if not 1 <= first <= last:
        raise UserError(
            f"{where}: from {first} to {last} is not allowed; allowed are rounds from "
            "1, in ascending order"
        )
    return f"{client}:{first}-{last}"


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
    if "absences_file" in given:
        clients = changes.get("num_clients", base.clients.num_clients)
        changes["absences"] = _absences(given["absences_file"], clients)
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
