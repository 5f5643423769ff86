"""Fields of a frozen dataclass that know their documentation and their choices.

A class of such fields checks itself; the command line and JSON read a field's type.
"""

import dataclasses
import difflib
import json
from typing import Any

from hsee_jax.base import UserError


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A field with its documentation and, for a name, the allowed ones."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices}
    )


class Checked:
    """Checks the named choices, then whatever the class adds in ``check``."""

    def __post_init__(self) -> None:
        """Refuses a value that is not allowed."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            choices = item.metadata.get("choices", ())
            value = getattr(self, item.name)
            if choices and value not in choices:
                raise unknown(item.name, value, choices)
        self.check()

    def check(self) -> None:
        """Checks numbers."""

    def require(self, name: str, allowed: str, ok: bool) -> None:
        """Refuses the value of a field unless ``ok``."""
        if not ok:
            value = getattr(self, name)
            raise UserError(f"{name}: {value} is not allowed; allowed is {allowed}")


def unknown(what: str, value: object, allowed: tuple[str, ...]) -> UserError:
    """The error for a name that is none of the allowed ones, with the nearest."""
    near = difflib.get_close_matches(str(value), allowed, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(
        f"{what}: {value} is unknown{hint}; allowed are {', '.join(allowed)}"
    )


def value_type(item: dataclasses.Field[Any]) -> type:
    """The type of a field's value, or of its entries: str, int or float."""
    return next(
        kind
        for kind in (str, int, float)
        if item.type in (kind, kind | None, tuple[kind, ...])  # type: ignore[valid-type]
    )


def takes_many(item: dataclasses.Field[Any]) -> bool:
    """Whether a field's value is a tuple."""
    return getattr(item.type, "__origin__", None) is tuple


def typed(item: dataclasses.Field[Any], value: Any) -> Any:
    """A JSON value as the field's own type.

    Raises:
      UserError: it is of another.
    """
    kind = value_type(item)
    if takes_many(item):
        if isinstance(value, list) and all(type(v) in (int, str) for v in value):
            return tuple(str(v) for v in value)
    elif value is None and item.type == kind | None:
        return None
    elif type(value) is kind or (kind is float and type(value) is int):
        return kind(value)  # type: ignore[arg-type]
    raise UserError(
        f"{item.name}: {json.dumps(value)} is not allowed; allowed is "
        f"{'a list of ' if takes_many(item) else 'a '}{kind.__name__}"
    )
