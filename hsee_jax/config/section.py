"""A section of a configuration: its own fields, and the options of what they name.

Some fields name an entry of a registry, such as the network. The options that the entry
reads are values of the section too, with the entry's defaults; options of other entries
are not there. So a configuration holds what has an effect, and nothing else.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.options import Option, read_options
from hsee_jax.core.registry import Registry


class Values(Mapping[str, Any]):
    """An immutable mapping that can be compared and hashed."""

    def __init__(self, values: Mapping[str, Any] = {}) -> None:
        """Copy some values."""
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        """Return a value."""
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return how many values there are."""
        return len(self._values)

    def __hash__(self) -> int:
        """Hash the values, whatever their order."""
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        """Show the values."""
        return f"Values({self._values})"


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields that check themselves, and the options of the entries that they name."""

    registries: ClassVar[
        Mapping[str, Registry]
    ] = {}  # by the field that names an entry

    options: Values = dataclasses.field(default=Values(), kw_only=True)

    def __post_init__(self) -> None:
        """Check every field, and complete the options."""
        for name, option in self.fields().items():
            object.__setattr__(self, name, option.checked(getattr(self, name)))
        object.__setattr__(self, "options", Values(self._completed()))
        self.check()

    def check(self) -> None:
        """Check what depends on several fields."""

    def __getattr__(self, name: str) -> Any:
        """Return an option as an attribute."""
        if name.startswith("__") or name == "options" or name not in self.options:
            raise AttributeError(f"{type(self).__name__} has no option {name}")
        return self.options[name]

    @classmethod
    @functools.cache
    def fields(cls) -> Mapping[str, Option]:
        """Return the section's own fields, by name."""
        names = [f.name for f in dataclasses.fields(cls) if f.name != "options"]
        return read_options(cls, names)

    @classmethod
    def known(cls) -> dict[str, Option]:
        """Return the own fields, and the options of all entries that can be named.

        Raises:
          UserError: an option has the name of another option or field.
        """
        found = dict(cls.fields())
        for registry in cls.registries.values():
            for name, option in registry.options().items():
                if name in found:
                    raise name_taken(name, (cls,))
                found[name] = option
        return found

    def active(self) -> dict[str, Option]:
        """Return the options that the named entries read."""
        found: dict[str, Option] = {}
        for name, registry in self.registries.items():
            found.update(registry.entry(getattr(self, name)).options)
        return found

    def values(self) -> dict[str, Any]:
        """Return all values by name, fields first."""
        own = {name: getattr(self, name) for name in self.fields()}
        return own | dict(self.options)

    def changed(self, changes: Mapping[str, Any]) -> "Section":
        """Return a copy with other values.

        An option keeps its value if the entries that are named then declare it alike;
        else it is dropped, or gets the default of its new reader.

        Raises:
          UserError: a value is not allowed, or no named entry reads the option.
        """
        fields = {k: v for k, v in changes.items() if k in self.fields()}
        named = dataclasses.replace(self, **fields, options=Values())
        active = named.active()
        for name, value in changes.items():
            if name not in fields and name not in active:
                raise named.no_effect(name, value)
        before = self.active()
        kept = {
            name: value
            for name, value in self.options.items()
            if active.get(name) == before[name]
        }
        own = {k: v for k, v in changes.items() if k not in fields}
        return dataclasses.replace(named, options=Values(kept | own))

    def no_effect(self, name: str, value: Any) -> UserError:
        """Return the error for an option that no named entry reads."""
        for field, registry in self.registries.items():
            if readers := registry.readers(name):
                return UserError(
                    f"{name}: {value} has no effect on {field} {getattr(self, field)}; "
                    f"it is read by {', '.join(readers)}"
                )
        return unknown("field", name, self.known())

    def _completed(self) -> dict[str, Any]:
        active = self.active()
        for name, value in self.options.items():
            if name not in active:
                raise self.no_effect(name, value)
        return {
            name: option.checked(self.options.get(name, option.default))
            for name, option in active.items()
        }


def name_taken(name: str, sections: Iterable[type[Section]]) -> UserError:
    """Return the error for two options of one name in some sections."""
    readers = [
        (not entry.make.__module__.startswith("hsee_jax."), f"{registry.kind} {reader}")
        for section in sections
        for registry in section.registries.values()
        for reader, entry in registry.items()
        if name in entry.options
    ]
    return UserError(
        f"plugin: option {name} of {max(readers)[1]} has the name of another option; "
        "allowed is a name of its own"
    )
