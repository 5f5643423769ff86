"""The content of a study's file: its keys, checked one by one."""

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hsee_jax.config.plugins import load_plugins
from hsee_jax.config.schema import SEEDS
from hsee_jax.config.values import options
from hsee_jax.core.errors import DAMAGE, UserError, unknown
from hsee_jax.core.paths import expand_home, resolve
from hsee_jax.runs.folder import load_config

_TEXTS = ("title", "shows", "cost", "preset", "config", "extends")
_TABLES = ("options", "grid", "rows")
_KEYS = (*_TEXTS, "seeds", "skip", *_TABLES)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class Content(NamedTuple):
    """The keys of a study's file, with the keys of the file that it extends."""

    texts: dict[str, str]
    seeds: tuple[int, ...]
    options: dict[str, Any]
    grid: dict[str, tuple[Any, ...]]
    skip: tuple[dict[str, Any], ...]
    rows: dict[str, tuple[str, dict[str, Any]]]  # name -> what it shows, its options


@contextlib.contextmanager
def within(path: Path, place: str) -> Iterator[None]:
    """Put the file and the place in it before an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, {place}: {error}") from error


def read_content(path: Path) -> Content:
    """Read a study's file and the file that it extends.

    Raises:
      UserError: a file cannot be read, or a key or a value is not allowed.
    """
    values = _parse(path)
    if "extends" not in values:
        return _read(path, values)
    _check(path, "extends", values["extends"], str, "a text")
    common_path = path.parent / values["extends"]
    common = _read(common_path, _parse(common_path))  # first: it may name plugins
    content = _read(path, values)
    if "extends" in common.texts:
        raise UserError(
            f"{common_path}, extends: is not allowed here, because {path} extends this "
            "file; allowed is one level"
        )
    start = {"preset", "config"}  # a file says either
    replaced = start if start & content.texts.keys() else set()
    kept = {key: text for key, text in common.texts.items() if key not in replaced}
    return Content(
        texts=kept | content.texts,
        seeds=content.seeds or common.seeds,
        options=common.options | content.options,
        grid=common.grid | content.grid,
        skip=common.skip + content.skip,
        rows=common.rows | content.rows,
    )


def _read(path: Path, values: dict[str, Any]) -> Content:
    """Check what a file holds; the options of its plugins are known from then on."""
    for key in values:
        if key not in _KEYS:
            with within(path, "top level"):
                raise unknown("key", key, _KEYS)
    for key in _TEXTS:
        _check(path, key, values.get(key, ""), str, "a text")
    for key in _TABLES:
        _check(path, key, values.get(key, {}), dict, "a table")
    own = values.get("options", {})
    with within(path, "[options]"):
        load_plugins(_plugins(own))
    texts = {key: values[key] for key in _TEXTS if key in values}
    if "config" in texts:  # relative to the file, wherever the study is run
        texts["config"] = str(path.parent / texts["config"])
        with within(path, "config"):
            load_config(Path(texts["config"]))  # it may name plugins
    return Content(
        texts=texts,
        seeds=_seeds(path, values.get("seeds")),
        options=_options(path, "[options]", own),
        grid=_grid(path, values.get("grid", {})),
        skip=_skip(path, values.get("skip", [])),
        rows={name: _row(path, name, row) for name, row in _named(path, values)},
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"study: {path} cannot be read: {error.strerror}") from error
    except DAMAGE as error:
        raise UserError(f"study: {path} is not TOML: {error}") from error


def _check(path: Path, key: str, value: Any, kind: type, allowed: str) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kind):
        raise UserError(
            f"{path}, {key}: {value!r} is not allowed; allowed is {allowed}"
        )


def _plugins(own: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the plugins in a table of options."""
    option = options()["plugin"][1]
    return option.checked(own.get("plugin", ()))


def _seeds(path: Path, seeds: Any) -> tuple[int, ...]:
    if seeds is None:
        return ()
    fine = isinstance(seeds, list) and all(
        type(seed) is int and 0 <= seed < 2**31 for seed in seeds
    )
    if not fine or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(
            f"{path}, seeds: {seeds} is not allowed; allowed is a list of different "
            "whole numbers from 0 to 2147483647"
        )
    return tuple(seeds)


def _options(path: Path, table: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a table, in their types."""
    known = options()
    with within(path, table):
        for name in values:
            if name in SEEDS:
                raise UserError(f"{name}: is not allowed here; seeds gives the seeds")
            if name not in known:
                raise unknown("option", name, (n for n in known if n not in SEEDS))
        # Only their types: each reader of an option has rules of its own.
        found = {
            name: replace(known[name][1], rules=(), names=()).checked(v)
            for name, v in values.items()
        }
    for name in {"data_dir", "pretrained"} & found.keys():
        with within(path, table):
            place = expand_home(found[name], name)
        # Relative to the file, wherever the study is run.
        found[name] = str(resolve(path.parent / place))
    return found


def _grid(path: Path, grid: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, values in grid.items():
        _check(path, f"[grid], {name}", values, list, "a list of values")
        if not values:
            raise UserError(
                f"{path}, [grid], {name}: the list is empty; allowed is one value or "
                "more"
            )
        entries = [_options(path, "[grid]", {name: value})[name] for value in values]
        if len(set(entries)) < len(entries):
            raise UserError(
                f"{path}, [grid], {name}: {values} holds a value twice; allowed are "
                "different values"
            )
        found[name] = tuple(entries)
    return found


def _skip(path: Path, entries: Any) -> tuple[dict[str, Any], ...]:
    _check(path, "skip", entries, list, "a list of tables")
    for entry in entries:
        _check(path, "skip", entry, dict, "a list of tables")
    return tuple(_options(path, "skip", entry) for entry in entries)


def _named(path: Path, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the named rows, with their tables."""
    for name, row in values.get("rows", {}).items():
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}, [rows.{name}]: the name {name!r} is not allowed; allowed are "
                "letters, digits and . _ + - after a letter or a digit"
            )
        _check(path, f"[rows.{name}]", row, dict, "a table of options")
        yield name, row


def _row(path: Path, name: str, row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    table = f"[rows.{name}]"
    shows = row.get("shows", "")
    _check(path, f"{table}, shows", shows, str, "a text")
    own = {key: value for key, value in row.items() if key != "shows"}
    return shows, _options(path, table, own)
