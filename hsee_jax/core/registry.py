"""Registries: values of one kind by name, each with the options that it reads.

A network, a codec, an optimizer, a partition, an algorithm or a criterion is a function
that is registered once. Its keyword-only parameters with a default are its options; the
command line, the configuration and the reference read them from here.
"""

import functools
import inspect
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

from hsee_jax.core.errors import unknown
from hsee_jax.core.options import Option, read_options
from hsee_jax.core.reuse import reused

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_MAIN = ("__main__", "__mp_main__")
_PACKAGE = __name__.partition(".")[0]
_PLAIN = (str, numbers.Number, tuple, list, type(None))  # what configurations hold


class Entry(NamedTuple, Generic[T]):
    """What is registered under a name."""

    name: str
    make: Callable[..., T]
    options: Mapping[str, Option]  # by name, in the order of the signature
    summary: str  # one line for the help


class Registry(Mapping[str, Entry[T]]):
    """Named factories of one kind; iterating gives their names."""

    def __init__(
        self,
        kind: str,
        *,
        with_options: bool = True,
        context: tuple[str, ...] = (),
        pure: bool = False,
    ) -> None:
        """Start empty.

        Args:
          kind: the option that names an entry, such as ``"network"``.
          with_options: whether entries may have options.
          context: the keywords that every factory takes beside its options.
          pure: whether entries make objects that never change, from their arguments
            and from entries that their options name. Equal calls then give the same
            object, if all of these entries are of this package; code of the user's own
            may change in a session, and runs at every call.
        """
        self.kind, self._with_options, self._context = kind, with_options, context
        self._make_ours: Callable[..., T] = reused(_call) if pure else _call
        self._entries: dict[str, Entry[T]] = {}

    @overload
    def register(self, make: F, /) -> F: ...

    @overload
    def register(self, /, *, summary: str) -> Callable[[F], F]: ...

    def register(self, make: Any = None, /, *, summary: str = "") -> Any:
        """Register a factory under its own name; works as a decorator.

        Registering the same function again, as a notebook does, replaces it. A factory
        with options is returned as a function that checks them and calls the factory.

        Args:
          make: the factory. Its keyword-only parameters with a default are options.
          summary: one line for the help; without it, the first line of its docstring.

        Raises:
          ValueError: another function has this name, an option has another type in
            another entry or no default, a keyword of the context has one, or the
            registry allows no options and the factory has some.
          TypeError: an annotation is not a type that an option can have.
        """
        if make is None:
            return lambda make: self._add(make, summary)
        return self._add(make, summary)

    def make(
        self, name: str, *context: Any, options: Mapping[str, Any] = {}, **more: Any
    ) -> T:
        """Call the factory of an entry.

        Args:
          name: the name of the entry.
          context: what the factory takes beside its options, by position.
          options: values of its options; the others keep their defaults, and values
            that it does not read are ignored.
          more: what the factory takes beside its options, by name.

        Raises:
          UserError: there is no such entry, or its factory refuses the options.
        """
        entry = self.entry(name)
        own = {key: options[key] for key in entry.options if key in options}
        ours = all(map(is_ours, _factories(entry, own)))
        make = functools.partial(self._make_ours, entry.make) if ours else entry.make
        return make(*context, **more, **own)

    def entry(self, name: str) -> Entry[T]:
        """Return an entry; raise `UserError` if there is none of this name."""
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def readers(self, option: str) -> list[str]:
        """Return the names of the entries that read an option."""
        return [name for name, entry in self.items() if option in entry.options]

    def options(self) -> dict[str, Option]:
        """Return the options of all entries, by name.

        Where entries give an option different choices, it has all of them.
        """
        found: dict[str, Option] = {}
        for entry in self._entries.values():
            for name, option in entry.options.items():
                first = found.setdefault(name, option)
                if more := set(option.choices) - set(first.choices):
                    names = (*first.choices, *(n for n in option.choices if n in more))
                    found[name] = replace(first, names=names)
        return found

    def __getitem__(self, name: str) -> Entry[T]:
        """Return the entry of a name."""
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of registration."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return how many entries there are."""
        return len(self._entries)

    def _add(self, make: Callable[..., T], summary: str) -> Callable[..., T]:
        name = make.__name__
        known = self._entries.get(name)
        if known is not None and _identity(known.make) != _identity(make):
            raise ValueError(f"{self.kind}: {name} is registered already")
        keywords = [
            parameter
            for parameter in inspect.signature(make).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        for own in keywords:
            if (own.default is own.empty) != (own.name in self._context):
                needs = "no default" if own.name in self._context else "a default"
                raise ValueError(f"{self.kind}: {own.name} of {name} needs {needs}")
        names = [own.name for own in keywords if own.name not in self._context]
        options = read_options(make, names)
        if options and not self._with_options:
            raise ValueError(f"{self.kind}: {name} has options, and nothing reads them")
        for option in options.values():
            for other in self.readers(option.name):
                first = self._entries[other].options[option.name]
                same = (first.kind, first.many) == (option.kind, option.many)
                if not same and other != name:
                    raise ValueError(
                        f"{self.kind}: {name} reads {option.name} as another type than "
                        f"{other}"
                    )
        lines = (make.__doc__ or "").strip().splitlines()
        make = _checking(make, options) if options else make
        self._entries[name] = Entry(name, make, options, summary or "".join(lines[:1]))
        return make


def _checking(
    make: Callable[..., T], options: Mapping[str, Option]
) -> Callable[..., T]:
    """Make a factory refuse a value that its options do not allow.

    A program may pass more than a configuration can hold, as an array that JAX traces,
    a dtype or a function. The factory gets it as it is.
    """

    @functools.wraps(make)
    def call(*args: Any, **named: Any) -> T:
        for name, value in named.items():
            if name in options and isinstance(value, _PLAIN):
                named[name] = options[name].checked(value)
        return make(*args, **named)

    return call


def _call(make: Callable[..., T], /, *args: Any, **named: Any) -> T:
    return make(*args, **named)


def _factories(entry: Entry, values: Mapping[str, Any]) -> Iterator[Callable[..., Any]]:
    """Yield the factory of an entry, and those of the entries that its options name."""
    yield entry.make
    for name, option in entry.options.items():
        if isinstance(option.names, Registry):
            yield option.names.entry(values.get(name, option.default)).make


def is_ours(make: Callable[..., Any]) -> bool:
    """Return whether a function is of this package, and not of a user."""
    return make.__module__.partition(".")[0] == _PACKAGE


def _identity(make: Callable[..., Any]) -> tuple[str, str]:
    """Return where a function is defined, which stays the same if it runs again.

    A script that is also a plugin runs as ``__main__``, or in the processes that it
    starts as ``__mp_main__``, and is imported by its name.
    """
    module = make.__module__
    script = getattr(sys.modules.get(module), "__file__", None)
    if module in _MAIN:
        spec = getattr(sys.modules.get(module), "__spec__", None)  # of python -m
        if spec is not None:
            module = spec.name
        elif script is not None:
            module = Path(script).stem
    return module, make.__qualname__
