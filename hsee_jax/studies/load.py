"""Read a study from its TOML file.

The options of a row are those of the preset or configuration, changed by ``[options]``,
then by the row's own table ``[rows.NAME]``, then by one point of ``[grid]``, the
cartesian product of its lists. With both tables every row is crossed with every point.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hsee_jax.config.presets import preset
from hsee_jax.config.schema import Config
from hsee_jax.config.values import SECTIONS, override, settings
from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Option, text_of
from hsee_jax.runs.folder import load_config
from hsee_jax.studies.content import Content, read_content, within
from hsee_jax.studies.study import Row, Study

_LONGEST_NAME = 120  # bytes; the name of a run's folder has a seed as well


def load(path: str | os.PathLike[str]) -> Study:
    """Read a study from its file.

    Raises:
      UserError: the file cannot be read, or a key of it is not allowed. The error names
        the file, the table and the key.
    """
    path = Path(path)
    content = read_content(path)
    start = _start(path, content)
    given = content.options
    if "plugin" in given:  # the start needs its own as well
        both = (*start.run.plugin, *given["plugin"])
        given = {**given, "plugin": tuple(dict.fromkeys(both))}
    with within(path, "[options]"):
        start = override(start, **given)
    rows = tuple(_rows(path, content, start))
    check_rows(str(path), rows)
    return Study(
        title=content.texts.get("title", path.stem),
        rows=rows,
        seeds=content.seeds or (0,),
        shows=content.texts.get("shows", ""),
        cost=content.texts.get("cost", ""),
    )


def _start(path: Path, content: Content) -> Config:
    """Return the configuration that the options of the study change."""
    given = [key for key in ("preset", "config") if key in content.texts]
    if len(given) != 1:
        what = "both are given" if given else "neither is given"
        raise UserError(
            f"{path}, preset, config: {what}; allowed is the name of a preset, or the "
            "path of a config.json"
        )
    with within(path, given[0]):
        if given == ["preset"]:
            return preset(content.texts["preset"])
        return load_config(Path(content.texts["config"]))


def _rows(path: Path, content: Content, start: Config) -> Iterator[Row]:
    """Yield the rows, in the order of the file."""
    if not content.rows and not content.grid:
        raise UserError(
            f"{path}, rows: there are none; a study needs a table [grid], or tables "
            "[rows.NAME]"
        )
    points = _points(path, content)
    for name, (shows, own) in (content.rows or {"": ("", {})}).items():
        with within(path, f"[rows.{name}]"):
            config = _override(start, own, content.options)
        for point in points:
            parts = [f"{key}={_text(value)}" for key, value in point.items()]
            whole = ",".join([name, *parts] if name else parts)
            with within(path, f"[grid], {whole}"):
                crossed = _override(config, point, {**content.options, **own})
            yield Row(whole, crossed, shows, table=name)


def _override(
    config: Config, changes: Mapping[str, Any], before: Mapping[str, Any]
) -> Config:
    """Override a configuration, and keep what was given before.

    Args:
      config: where ``before`` was given.
      changes: they may name other entries, such as another network. An option that
        these read with another default or other rules would start at its default.
      before: what the entries do not read or do not allow has no effect.
    """
    config = override(config, **changes)
    sections = [getattr(config, name) for name in SECTIONS]
    read = {n: o for section in sections for n, o in section.active().items()}
    kept = {
        name: value
        for name, value in before.items()
        if name in read and name not in changes and _allows(read[name], value)
    }
    return override(config, **kept)


def _allows(option: Option, value: Any) -> bool:
    try:
        option.checked(value)
    except UserError:
        return False
    return True


def _points(path: Path, content: Content) -> list[dict[str, Any]]:
    """Return the points of the grid that ``skip`` does not name.

    Raises:
      UserError: an entry of ``skip`` matches no point, or all points are skipped.
    """
    names = list(content.grid)
    every = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*content.grid.values())
    ]
    for entry in content.skip:
        if not any(entry.items() <= point.items() for point in every):
            raise UserError(
                f"{path}, skip: {entry} matches no point of [grid]; allowed are keys "
                "and values of [grid]"
            )
    kept = [
        point
        for point in every
        if not any(entry.items() <= point.items() for entry in content.skip)
    ]
    if not kept:
        raise UserError(f"{path}, skip: no point of [grid] is left")
    return kept


def _text(value: Any) -> str:
    """Return a value as a part of a file name."""
    return re.sub(r"[^\w.+-]", "_", text_of(value).replace(" ", "+"))


def check_rows(place: str, rows: Sequence[Row]) -> None:
    """Refuse two rows of one name or with equal settings, and too long a name.

    Args:
      place: the study's file, for the error.
      rows: its rows.

    Raises:
      UserError: the rows are not allowed.
    """
    names: dict[str, str] = {}
    configs: dict[str, str] = {}
    for row in rows:
        length = len(row.name.encode())
        if length > _LONGEST_NAME:
            raise UserError(
                f"{place}, rows: the name {row.name} has {length} bytes; allowed are "
                f"names of up to {_LONGEST_NAME}"
            )
        if row.name in names:
            raise UserError(
                f"{place}, [grid]: two points get the name {row.name}; allowed are "
                "values that differ in letters or digits"
            )
        key = json.dumps(settings(row.config))
        if key in configs:
            raise UserError(
                f"{place}, rows: {row.name} has the settings of {configs[key]}; "
                "allowed are rows that differ in an option with an effect on the "
                "training"
            )
        names[row.name] = configs[key] = row.name
