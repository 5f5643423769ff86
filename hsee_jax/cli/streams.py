"""Standard output and standard error that take any text and fail in one line.

A character that the locale's encoding lacks is written as an escape. A failure of
standard error does not end a training. Standard output is the result of a command; its
failure is an `OutputError`, so that it can be distinguished from the failure of a file.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class OutputError(Exception):
    """Standard output cannot be written."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.strerror or error}") from error


class _Output(io.TextIOWrapper):
    """A stream that raises `OutputError` if it cannot be written."""

    def write(self, text: str) -> int:
        """Write text."""
        with _told():
            return super().write(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with _told():
            super().flush()


class _Messages(io.TextIOWrapper):
    """A stream that drops text that it cannot write."""

    def write(self, text: str) -> int:
        """Write text."""
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with contextlib.suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Replace the standard streams of this process with those of this module.

    Raises:
      OutputError: standard output is closed.
    """
    output_is_closed = sys.stdout is None
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # no file of a run may get the descriptor of a closed stream
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.stderr = _rewrapped(sys.stderr, _Messages)
    if output_is_closed:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        raise OutputError("it is closed")
    sys.stdout = _rewrapped(sys.stdout, _Output)


def close_output(error: OutputError) -> int:
    """Print why output failed, drop the rest of it, and return the exit status.

    A pipe without a reader is not an error.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    if isinstance(error.__cause__, BrokenPipeError):
        return 0
    print(f"hsee: stdout: cannot be written: {error}", file=sys.stderr)
    return 1


def _rewrapped(stream: TextIO, kind: type[io.TextIOWrapper]) -> TextIO:
    """Return a text stream of another kind over the same bytes."""
    wrapper: Any = stream
    options = {
        "encoding": wrapper.encoding,
        "line_buffering": wrapper.line_buffering,
        "write_through": wrapper.write_through,
    }
    return kind(wrapper.detach(), errors="backslashreplace", **options)
