"""Write the reference of the command line and of the configuration.

Everything on these pages is read from the registries, the configuration and the parsers
of the commands, so that it cannot be out of date.
"""

import argparse
import functools
import html
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import hsee_jax
from hsee_jax.cli.commands import COMMANDS
from hsee_jax.cli.flags import Parser
from hsee_jax.config import PRESETS, SECTIONS, Config, flatten, options
from hsee_jax.config.section import Section
from hsee_jax.core import Option, Registry
from hsee_jax.core.options import text_of
from hsee_jax.inference import CRITERIA

DOCS = Path(__file__).parents[1]
CLI, CONFIGURATION = "reference/cli.md", "reference/configuration.md"
# Pages whose source lies outside of docs/.
SOURCES = {
    "changelog.md": "CHANGELOG.md",
    "examples/first_run.ipynb": "examples/first_run.ipynb",
    "examples/exits.ipynb": "examples/exits.ipynb",
}

_CLI = """\
# Command line

`hsee COMMAND --help` prints the flags of a command. This page is made from the same
parsers.

"""
_STATUS = """
## Exit status { #exit-status }

| status | meaning |
|---|---|
| 0 | The command succeeded. |
| 1 | Standard output cannot be written, for example on a full disk. |
| 2 | You can correct the error; one line on standard error says how. |
| 3 | The training diverged: no client has a finite loss any more. |
| 130, 143 | Ctrl-C or SIGTERM stopped the command; `hsee train --resume` goes on. |
"""
_CONFIGURATION = """\
# Configuration

A configuration has six sections. Every option is a flag of `hsee train` and `hsee info`
(`learning_rate` is `--learning-rate`), a keyword of `hs.override(config, ...)`, and a
value in a run's `config.json`. A flag that the chosen network, algorithm or codec does
not read is refused.

<span class="ours">ours</span> marks a choice that the paper leaves open. The *demo*
column shows the value of the preset `demo` where it differs from the default.

"""


def generated() -> Mapping[str, str]:
    """Return the generated pages: the path below docs/, and the Markdown."""
    own = {CLI: cli(), CONFIGURATION: configuration()}
    return own | {
        path: _api(package)
        for package, path in api_paths().items()
        if not (DOCS / path).exists()
    }


def api_paths() -> dict[str, str]:
    """Return the page of each package, below docs/; a page may not be written yet."""
    found = pkgutil.iter_modules(hsee_jax.__path__)
    names = sorted(module.name for module in found if module.ispkg)
    return {name: f"reference/api/{name}.md" for name in names}


def _api(package: str) -> str:
    """Write the page of a package that has none: its public names in order."""
    name = f"hsee_jax.{package}"
    module = importlib.import_module(name)
    entries = [f"::: {name}.{public}" for public in module.__all__]
    summary = (module.__doc__ or "").strip().splitlines()[0]
    return "\n\n".join([f"# {name}", summary, *entries]) + "\n"


@functools.cache
def anchors() -> Mapping[str, str]:
    """Return the place of every flag: its name, and the page with the anchor."""
    found = {f"--{flag(name)}": f"{CONFIGURATION}#option-{name}" for name in options()}
    for command in COMMANDS:
        for action in actions(command):
            name = action.option_strings[-1] if action.option_strings else ""
            found.setdefault(name, f"{CLI}#{_anchor(command, action)}")
    return found


def flag(name: str) -> str:
    """Return the flag of an option, without its dashes."""
    return name.replace("_", "-")


class _Caught(Exception):
    """Carries the parser that a command was about to use."""


def parser_of(command: str) -> Parser:
    """Return the parser of a command: run the command until it parses its flags."""

    def catch(self: Parser, words: Sequence[str]) -> None:
        raise _Caught(self)

    try:
        with mock.patch.object(Parser, "parse", catch):
            COMMANDS[command].load()(())
    except _Caught as caught:
        return caught.args[0]
    raise LookupError(f"{command} parses no flags")


def actions(command: str) -> Iterator[argparse.Action]:
    """Yield what a command takes beside the options of the configuration."""
    for _, _, group in _groups(command):
        yield from group


def cli() -> str:
    """Write the page of the commands."""
    overview = [
        (f"[`hsee {name}`](#hsee-{name})", _text(command.description))
        for name, command in COMMANDS.items()
    ]
    parts = [_CLI, _table(("command", "what it does"), overview), _STATUS]
    parts += [_command(name) for name in COMMANDS]
    return "\n".join(parts)


def _command(name: str) -> str:
    taken = {action.dest for action in parser_of(name)._actions}
    lines = [f"## hsee {name}", "", _text(COMMANDS[name].description), ""]
    for title, description, group in _groups(name):
        if title not in ("positional arguments", "options"):
            lines += [f"**{title.capitalize()}.** {_text(description)}".strip(), ""]
        rows = [(_argument(name, action), _text(action.help or "")) for action in group]
        lines += [_table(("argument", "meaning"), rows), ""]
    if options().keys() <= taken:
        lines += [
            "Every option of the [configuration](configuration.md) is a flag as well.",
            "",
        ]
    return "\n".join(lines)


def _groups(command: str) -> Iterator[tuple[str, str, list[argparse.Action]]]:
    """Yield title, description and content of each group of a command's arguments."""
    for group in parser_of(command)._action_groups:
        own = [
            action
            for action in group._group_actions
            if action.dest != "help" and action.dest not in options()
        ]
        if own:
            yield group.title or "", group.description or "", own


def _argument(command: str, action: argparse.Action) -> str:
    value = action.metavar or action.dest.upper()
    if not action.option_strings:
        name = value if action.required else f"[{action.dest}]"
    else:
        takes = "" if action.nargs == 0 else f" {value}"
        name = f"{action.option_strings[-1]}{takes}"
    return f"`{name}`{{ #{_anchor(command, action)} }}"


def _anchor(command: str, action: argparse.Action) -> str:
    return f"{command}-{flag(action.dest)}"


def configuration() -> str:
    """Write the page of the options, the registries and the presets."""
    parts = [_CONFIGURATION]
    for name, section in SECTIONS.items():
        parts += [f"## {name.capitalize()}", "", _text(_summary(section)), ""]
        parts += [_table(_COLUMNS, map(_field, section.fields().values())), ""]
        for field, registry in section.registries.items():
            parts += [_registry(field, registry), ""]
    parts += ["## Criteria of the gate { #criteria }", ""]
    parts += ["`hsee gate --criterion NAME` chooses one of them.", ""]
    parts += [_entries(CRITERIA), "", _presets()]
    return "\n".join(parts)


_COLUMNS = ("option", "values", "default", "demo", "meaning")


def _field(option: Option) -> tuple[str, ...]:
    demo = flatten(PRESETS["demo"])[option.name]
    return (
        f"`{option.name}`{{ #option-{option.name} }}",
        _values(option),
        _shown(option.default),
        _shown(demo) if demo != option.default else "",
        _text(option.help),
    )


def _registry(field: str, registry: Registry) -> str:
    """Show the entries that a field can name, and their options."""
    lines = [f"### Values of `{field}` {{ #values-of-{flag(field)} }}", ""]
    lines += [_entries(registry), ""]
    rows = list(_options_of(registry))
    if rows:
        columns = ("option", "read by", *_COLUMNS[1:])
        lines += [f"Options that a `{field}` reads:", "", _table(columns, rows)]
    return "\n".join(lines)


def _entries(registry: Registry) -> str:
    with_options = any(entry.options for entry in registry.values())
    header = (
        ("name", "what it is", "options") if with_options else ("name", "what it is")
    )
    rows = [
        (f"`{entry.name}`", _text(entry.summary), ", ".join(map(_code, entry.options)))
        for entry in registry.values()
    ]
    return _table(header, [row[: len(header)] for row in rows])


def _options_of(registry: Registry) -> Iterator[tuple[str, ...]]:
    """Yield a row for each option; readers with another default have a row each."""
    demo = flatten(PRESETS["demo"])
    for name in registry.options():
        for number, (option, names) in enumerate(_declarations(registry, name)):
            mark = f"{{ #option-{name} }}" if number == 0 else ""
            everyone = len(names) == len(registry) > 1
            differs = name in demo and demo[name] != option.default
            yield (
                f"`{name}`{mark}",
                "all" if everyone else ", ".join(map(_code, names)),
                _values(option),
                _shown(option.default),
                _shown(demo[name]) if differs else "",
                _text(option.help),
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
    return "\n".join([*lines, "defaults.", "", _table(("preset", "changes"), rows)])


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _values(option: Option) -> str:
    """Return what an option may be: names, or a type with its rules."""
    if option.choices:
        shown = ", ".join(map(_code, option.choices))
    elif option.kind is bool:
        shown = "`true`, `false`"
    else:
        kind = {int: "integer", float: "number", str: "text"}[option.kind]
        shown = ", ".join([kind, *(_text(rule.allowed) for rule in option.rules)])
    return f"list of: {shown}" if option.many else shown


def _shown(value: object) -> str:
    if value is None or value == ():
        return "none"
    return _code(str(value).lower() if isinstance(value, bool) else text_of(value))


def _code(text: object) -> str:
    return f"`{text}`"


def _text(text: str) -> str:
    """Return help text as Markdown, with the mark of our choices as a badge."""
    plain = html.escape(text, quote=False).replace("%%", "%").replace("|", "\\|")
    plain = re.sub(r"\[ours: ([^]]*)\]", r'<span class="ours">ours</span> (\1)', plain)
    plain = plain.replace("[ours]", '<span class="ours">ours</span>')
    plain = re.sub(r"(?<!\S)(--[a-z][a-z-]+)", r"`\1`", plain)
    return plain[:1].upper() + plain[1:]


def _table(header: Sequence[str], rows: Iterator[Sequence[str]] | Sequence) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
