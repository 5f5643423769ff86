"""The entry of ``hsee``: run a command and turn its errors into an exit status.

Status 0 is success, 2 an error that the user can correct, 3 divergence, 1 output that
cannot be written or an unexpected error, and 128 + N the end by signal N. ``hsee
sweep`` reports its runs by statuses of its own, see `hsee_jax.cli.sweep.sweep`. This
file imports nothing heavy, so that the handler of Ctrl-C is set before the import of
JAX.
"""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

import hsee_jax
from hsee_jax.cli import signals, streams
from hsee_jax.cli.commands import COMMANDS, usage

_NO_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|out of memory|failed to allocate|bad_alloc|"
    "cannot allocate memory|can't start new thread",
    re.IGNORECASE,
)


class _End(NamedTuple):
    """The exit status and the message of a failed command."""

    status: int
    line: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
      arguments: the command and its flags; None for the arguments of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if words[:1] == ["--version"]:
        print(f"hsee {hsee_jax.__version__}")
        return 0
    try:
        return _run(words)
    except SystemExit as helped:  # of argparse, after it has printed a help
        return int(helped.code or 0)
    except Exception as error:
        failure = _end(error)
        if failure is None:
            raise
        _say(failure.line)
        return failure.status


def console_main() -> None:
    """Run the ``hsee`` command of this process and exit with its status."""
    command = COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "")
    farewell = "stopped"
    if command and command.after_interrupt:
        farewell += f"; {command.after_interrupt}"
    sys.unraisablehook = signals.keep_interrupt
    try:
        streams.open_streams()
        with signals.exit_on_interrupt():
            if command:
                command.load()
        with signals.exit_on_second():
            status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say(farewell)
        status = 128 + signal.SIGINT
    except streams.OutputError as error:
        status = streams.close_output(error)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the interpreter only shuts down
    raise SystemExit(status)


def _run(words: Sequence[str]) -> int:
    """Find the command and run it."""
    from hsee_jax.core.errors import UserError, unknown

    if not words:
        raise UserError(f"command: none given; allowed are {', '.join(COMMANDS)}")
    if words[0] not in COMMANDS:
        raise unknown("command", words[0], tuple(COMMANDS))
    try:
        os.getcwd()
    except FileNotFoundError as error:
        line = "folder: the current folder was removed; allowed is one that is there"
        raise UserError(line) from error
    return COMMANDS[words[0]].load()(words[1:]) or 0


def _end(error: Exception) -> _End | None:
    """Return status and message for an error; None for an unexpected error."""
    from hsee_jax.core.errors import DivergenceError, UserError

    if isinstance(error, UserError):
        return _End(2, str(error))
    if isinstance(error, argparse.ArgumentError):  # of a parser, before any word
        return _End(2, f"plugin: an option has the name of a flag: {error.message}")
    if isinstance(error, DivergenceError):
        return _End(3, str(error))
    if lacks_memory(error):
        reason = (str(error).strip().splitlines() or ["MemoryError"])[0]
        return _End(
            2,
            f"memory: there is not enough ({reason[:200]}); a smaller batch or "
            "network needs less, and so do fewer clients at once (--batch-size, "
            "--eval-batch-size, --width, --participation, --client-axis map or loop)",
        )
    return None


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that the host or a device has no memory left."""
    if isinstance(error, MemoryError):  # also the error of NumPy
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # JAX raises RuntimeError, and so do threads that get no stack.
    kinds = (RuntimeError, ImportError)
    if isinstance(error, kinds) and _NO_MEMORY.search(str(error)):
        return True
    return error.__cause__ is not None and lacks_memory(error.__cause__)


def _say(line: str) -> None:
    print(f"hsee: {line}", file=sys.stderr)
