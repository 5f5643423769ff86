"""The reference of the command line, from the parsers of the commands."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from cells import flag, prose, table

from hsee_jax.cli.commands import COMMANDS
from hsee_jax.cli.flags import Parser
from hsee_jax.config import options

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
| 1 | Standard output cannot be written, a run of a sweep failed, or a fault of ours. |
| 2 | You can correct the error; one line on standard error says how. |
| 3 | The training diverged: no client took all steps of a round. A sweep goes on. |
| 130, 143 | Ctrl-C or SIGTERM stopped the command; `hsee train --resume` goes on. |
"""


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
        (f"[`hsee {name}`](#hsee-{name})", prose(command.description))
        for name, command in COMMANDS.items()
    ]
    parts = [_CLI, table(("command", "what it does"), overview), _STATUS]
    parts += [_command(name) for name in COMMANDS]
    return "\n".join(parts)


def _command(name: str) -> str:
    lines = [f"## hsee {name}", "", prose(COMMANDS[name].description), ""]
    for title, description, group in _groups(name):
        if title:
            lines += [f"**{title.capitalize()}.** {prose(description)}".strip(), ""]
        rows = [(_argument(name, action), prose(_help(action))) for action in group]
        lines += [table(("argument", "meaning"), rows), ""]
    if _takes_options(name):
        lines += [
            "Every option of the [configuration](configuration.md) is a flag as well.",
            "",
        ]
    return "\n".join(lines)


def _takes_options(command: str) -> bool:
    """Return whether the options of the configuration are flags of a command."""
    taken = {action.dest for action in parser_of(command)._actions}
    return options().keys() <= taken


def _groups(command: str) -> Iterator[tuple[str, str, list[argparse.Action]]]:
    """Yield title, description and content of each group of a command's arguments."""
    shared = set(options()) if _takes_options(command) else set()
    groups: dict[tuple[str, str], list[argparse.Action]] = {}
    for group in parser_of(command)._action_groups:
        plain = group.title in ("positional arguments", "options")
        head = ("", "") if plain else (group.title or "", group.description or "")
        groups.setdefault(head, []).extend(
            action
            for action in group._group_actions
            if action.dest not in ("help", *shared)
        )
    for (title, description), own in groups.items():
        if own:
            yield title, description, own


def _argument(command: str, action: argparse.Action) -> str:
    if not action.option_strings:
        value = str(action.metavar or action.dest.upper())
        name = value if action.required else f"[{value}]"
    else:
        kinds: dict[Any, str] = {Path: "PATH", int: "INT", float: "FLOAT"}
        value = str(action.metavar or kinds.get(action.type, "TEXT"))
        takes = "" if action.nargs == 0 else f" {value}"
        name = f"{action.option_strings[-1]}{takes}"
    return f"`{name}`{{ #{anchor(command, action)} }}"


def _help(action: argparse.Action) -> str:
    """Return the help of an argument with its default, as argparse prints it."""
    return (action.help or "") % vars(action)


def anchor(command: str, action: argparse.Action) -> str:
    """Return the anchor of an argument."""
    return f"{command}-{flag(action.dest)}"
