"""The code blocks of a Markdown page, the command lines in them, and their parsing."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from hsee_jax.cli.commands import COMMANDS
from hsee_jax.cli.flags import Parser, config_from

_FENCE = re.compile(r"^( *)```(\w*)(.*)$")
_NOTE = re.compile(r"<!-- *(\w.*?) *-->")


class Block(NamedTuple):
    """A fenced block."""

    language: str
    code: str
    line: int  # of its first line of code, from 1
    file: str  # the file that the block is; empty if it is none
    notes: tuple[str, ...]  # the comments right before it

    @property
    def is_skipped(self) -> bool:
        """Return whether a comment keeps the block from running."""
        return any(note.startswith("not run") for note in self.notes)


def read_blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page.

    A block is a file if its title says so, or the text before it: "This is `a.py`:".
    """
    lines = iter(enumerate(text.splitlines(), start=1))
    notes: list[str] = []
    before = ""
    for number, line in lines:
        fence, note = _FENCE.match(line), _NOTE.match(line.strip())
        if fence is None:
            if note is not None:
                notes.append(note[1])
            elif line.strip():
                notes, before = [], line
            continue
        code = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            code.append(inner.removeprefix(fence[1]))
        title = re.search(r'title="([^"]+)"', fence[3])
        named = title or re.search(r"`([\w/]+\.\w+)`:$", before)
        file = named[1] if named else ""
        yield Block(fence[2], "\n".join(code), number + 1, file, tuple(notes))
        notes, before = [], ""


def prose(text: str) -> str:
    """Return a page without its blocks and comments."""
    without = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", without, flags=re.S)


def read_commands(code: str) -> Iterator[list[str]]:
    """Yield the words after ``hsee`` of every call in some lines of shell."""
    for line in code.replace("\\\n", " ").splitlines():
        call: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "||", "|", ";"):
                call.append(word)
                continue
            while call and re.match(r"[A-Z_]+=", call[0]):
                call.pop(0)
            if call[:1] == ["taskset"]:
                call = call[3:]
            if call and call[0].rpartition("/")[2] == "hsee":
                yield call[1:]
            call = []


class _Parsed(Exception):
    """Carries what a command has parsed."""


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parse a command line with the parser of its command, and check its options.

    Returns:
      The command and its flags, and for ``train`` and ``info`` the ``config``.
    """
    command, *rest = words
    original = Parser.parse

    def catch(self: Parser, words: list[str]) -> None:
        raise _Parsed(vars(original(self, words)))

    try:
        with mock.patch.object(Parser, "parse", catch):
            COMMANDS[command].load()(rest)
    except _Parsed as parsed:
        given = dict(parsed.args[0])
    else:
        raise AssertionError(f"{command} parses no flags")
    if command in ("train", "info"):
        if "config" in given and not Path(given["config"]).exists():
            del given["config"]  # of a run that the page only talks about
        given["config"] = config_from(given)
    return command, given
