"""Options: typed values with a help text and a check, read from annotations.

A field of a configuration and a keyword of a registered factory are written alike::

    width: Annotated[int, "channels of the first group", at_least(1)] = 64

The command line, the check of a configuration and the reference are made from these
annotations.
"""

import contextlib
import inspect
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hsee_jax.core.errors import UserError, unknown


class Rule(NamedTuple):
    """A condition on a number."""

    allowed: str  # in words, for the error
    holds: Callable[[Any], bool]


class Choices(NamedTuple):
    """The names that a text may be; each check reads them anew, as a registry grows."""

    names: Iterable[str]


def at_least(least: float) -> Rule:
    """Require a finite number of at least this size."""
    return Rule(f"{least} or more", lambda value: least <= value < math.inf)


def between(least: float, most: float) -> Rule:
    """Require a number from ``least`` to ``most``, both included."""
    return Rule(f"{least}..{most}", lambda value: least <= value <= most)


def one_of(*names: str | Iterable[str]) -> Choices:
    """Require one of some names, or a name in a registry."""
    if len(names) == 1 and not isinstance(names[0], str):
        return Choices(names[0])
    return Choices(typing.cast(tuple[str, ...], names))


positive = Rule("more than 0", lambda value: 0 < value < math.inf)
share = Rule("0 or more, less than 1", lambda value: 0 <= value < 1)


# The types whose values an option of each type accepts, in Python and NumPy.
_KINDS: Mapping[Any, tuple[type, ...]] = {
    str: (str, os.PathLike),
    int: (numbers.Integral,),
    float: (numbers.Real,),
    bool: (bool,),
}

_MOST = 2**31 - 1  # of one whole number, mostly a count; ids in lists may be larger


def text_of(value: Any) -> str:
    """Return an option's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Option:
    """One option: what its values are, and what they mean."""

    name: str
    kind: Any  # str, int, float or bool: of the value, or of each entry of a tuple
    default: Any
    help: str = ""
    rules: tuple[Rule, ...] = ()
    names: Iterable[str] = ()  # what a text may be; empty allows any
    many: bool = False  # the value is a tuple
    optional: bool = False  # the value may be None

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the names that are allowed now, in the order of their registration."""
        return tuple(self.names)

    def checked(self, value: Any) -> Any:
        """Return a value in the type of the option.

        Args:
          value: a value of Python or JSON; a list counts as a tuple, an int as a float.

        Raises:
          UserError: the value is of another type, or it is not allowed.
        """
        if value is None and self.optional:
            return None
        value = self._typed(value)
        for entry in value if self.many else (value,):
            if self.choices and entry not in self.choices:
                raise unknown(self.name, entry, self.choices)
            for rule in self.rules:
                if not rule.holds(entry):
                    raise self.refusal(entry, rule.allowed)
        if self.kind is int and not self.many and value > _MOST:
            raise self.refusal(value, f"{_MOST} or less")
        return value

    def refusal(self, value: Any, allowed: str) -> UserError:
        """Return the error for a value that is not allowed."""
        return UserError(f"{self.name}: {value} is not allowed; allowed is {allowed}")

    def _typed(self, value: Any) -> Any:
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            if self.many:
                kinds = (*_KINDS[self.kind], numbers.Integral)  # 3 is the cut "3"
                if isinstance(value, list | tuple) and not any(
                    isinstance(entry, bool) or not isinstance(entry, kinds)
                    for entry in value
                ):
                    return tuple(self.kind(entry) for entry in value)
            elif isinstance(value, _KINDS[self.kind]) and (
                self.kind is bool or not isinstance(value, bool)
            ):
                return self.kind(value)
        what = self.kind.__name__
        article = "a list of" if self.many else "an" if what == "int" else "a"
        raise self.refusal(json.dumps(value, default=str), f"{article} {what}")


def read_options(owner: Any, names: Iterable[str]) -> Mapping[str, Option]:
    """Read options from the annotations and defaults of a class or a function.

    Args:
      owner: a class whose attributes are the defaults, or a function.
      names: the annotated names to read; each needs a default.

    Raises:
      TypeError: an annotation is not a type that an option can have.
    """
    if isinstance(owner, type):
        hints = typing.get_type_hints(owner, include_extras=True)
        defaults = {name: getattr(owner, name) for name in names}
    else:
        parameters = inspect.signature(owner).parameters
        defaults = {name: parameters[name].default for name in names}
        own = {n: h for n, h in owner.__annotations__.items() if n in defaults}
        hints = typing.get_type_hints(  # only options: other hints may be strings
            types.SimpleNamespace(__annotations__=own),
            globalns=inspect.unwrap(owner).__globals__,
            include_extras=True,
        )
    return {
        name: _read(name, hints.get(name, type(default)), default)
        for name, default in defaults.items()
    }


def _read(name: str, hint: Any, default: Any) -> Option:
    extras = getattr(hint, "__metadata__", ())
    kind = typing.get_args(hint)[0] if extras else hint
    parts = typing.get_args(kind)
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    optional = union and type(None) in parts
    if optional:
        kind = next(part for part in parts if part is not type(None))
    many = typing.get_origin(kind) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    if kind not in (str, int, float, bool) or (union and len(parts) != 1 + optional):
        raise TypeError(
            f"{name}: {hint} cannot be an option; allowed are str, int, float, bool, "
            "a tuple of them, or None beside them"
        )
    return Option(
        name,
        kind,
        tuple(default) if isinstance(default, list) else default,
        help=next((extra for extra in extras if isinstance(extra, str)), ""),
        rules=tuple(extra for extra in extras if isinstance(extra, Rule)),
        names=next((e.names for e in extras if isinstance(e, Choices)), ()),
        many=many,
        optional=optional,
    )
