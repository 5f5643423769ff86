"""The reference of the configuration, from its sections and the registries."""

from collections.abc import Iterator

from cells import code, flag, prose, shown, table

from hsee_jax.config import PRESETS, SECTIONS, Config, flatten
from hsee_jax.config.section import Section
from hsee_jax.core import Option, Registry
from hsee_jax.core.options import text_of
from hsee_jax.inference import CRITERIA

_CONFIGURATION = """\
# Configuration

A configuration has six sections. Every option is a flag of `hsee train`, `serve`,
`info`, `plan`, `profile` and `tune` (`learning_rate` is `--learning-rate`), a keyword
of `hs.override(config, ...)`, and a value in a run's `config.json`. The commands refuse
a flag that the chosen network, algorithm or codec does not read.

<span class="ours">ours</span> marks a choice that the paper leaves open. *Demo*
is the value of the preset `demo` where it differs from the default.

"""


def configuration() -> str:
    """Write the page of the options, the registries and the presets."""
    parts = [_CONFIGURATION]
    for name, section in SECTIONS.items():
        parts += [f"## {name.capitalize()}", "", prose(_summary(section)), ""]
        parts += [table(_COLUMNS, map(_field, section.fields().values())), ""]
        for field, registry in section.registries.items():
            parts += [_registry(field, registry), ""]
    parts += ["## Criteria of the gate { #criteria }", ""]
    parts += ["`hsee gate --criterion NAME` chooses one of them.", ""]
    parts += [_entries(CRITERIA), "", _presets()]
    return "\n".join(parts)


_COLUMNS = ("option", "default", "meaning")


def _field(option: Option) -> tuple[str, ...]:
    return (
        f"`{option.name}`{{ #option-{option.name} }}",
        shown(option.default),
        _meaning(option, in_demo=True),
    )


def _meaning(option: Option, *, in_demo: bool) -> str:
    """Return the help of an option, its values, and its value in the demo.

    Args:
      option: the option.
      in_demo: whether the demo reads this declaration of the option.
    """
    lines = [prose(option.help), f"*Values:* {_values(option)}"]
    demo = flatten(PRESETS["demo"]).get(option.name, option.default)
    if in_demo and demo != option.default:
        lines.append(f"*Demo:* {shown(demo)}")
    return "<br>".join(line for line in lines if line)


def _registry(field: str, registry: Registry) -> str:
    """Show the entries that a field can name, and their options."""
    lines = [f"### Values of `{field}` {{ #values-of-{flag(field)} }}", ""]
    lines += [_entries(registry), ""]
    rows = list(_options_of(field, registry))
    if rows:
        columns = ("option", "read by", *_COLUMNS[1:])
        lines += [f"Options that values of `{field}` read:", "", table(columns, rows)]
    return "\n".join(lines)


def _entries(registry: Registry) -> str:
    with_options = any(entry.options for entry in registry.values())
    header = (
        ("name", "what it is", "options") if with_options else ("name", "what it is")
    )
    rows = [
        (f"`{entry.name}`", prose(entry.summary), ", ".join(map(code, entry.options)))
        for entry in registry.values()
    ]
    return table(header, [row[: len(header)] for row in rows])


def _options_of(field: str, registry: Registry) -> Iterator[tuple[str, ...]]:
    """Yield a row for each option; readers with another default have a row each."""
    demo = flatten(PRESETS["demo"])[field]
    for name in registry.options():
        for number, (option, readers) in enumerate(_declarations(registry, name)):
            mark = f"{{ #option-{name} }}" if number == 0 else ""
            everyone = len(readers) == len(registry) > 1
            yield (
                f"`{name}`{mark}",
                "all" if everyone else ", ".join(map(code, readers)),
                shown(option.default),
                _meaning(option, in_demo=demo in readers),
            )


def _declarations(registry: Registry, name: str) -> list[tuple[Option, list[str]]]:
    """Return each declaration of an option, with the entries that share it."""
    found: list[tuple[Option, list[str]]] = []
    for entry in registry.values():
        if name not in entry.options:
            continue
        same = [names for option, names in found if option == entry.options[name]]
        if same:
            same[0].append(entry.name)
        else:
            found.append((entry.options[name], [entry.name]))
    return found


def _presets() -> str:
    """Show in what each preset differs from the defaults."""
    plain = flatten(Config())
    rows = []
    for name, preset in PRESETS.items():
        changes = [
            f"`{key}` = `{text_of(value)}`"
            for key, value in flatten(preset).items()
            if plain.get(key) != value
        ]
        rows.append((f"`{name}`", ", ".join(changes)))
    lines = ["## Presets", "", "A preset changes these options; the rest keep their"]
    return "\n".join([*lines, "defaults.", "", table(("preset", "changes"), rows)])


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _values(option: Option) -> str:
    """Return what an option may be: names, or a type with its rules."""
    if option.choices:
        shown = ", ".join(map(code, option.choices))
    elif option.kind is bool:
        shown = "`true`, `false`"
    else:
        kind = {int: "integer", float: "number", str: "text"}[option.kind]
        shown = ", ".join([kind, *(rule.allowed for rule in option.rules)])
    return f"list of: {shown}" if option.many else shown
