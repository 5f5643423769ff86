"""SIGTERM and Ctrl-C: the first signal asks the command to end, the second ends it.

Python runs a signal's handler between two bytecodes of the main thread, and a compiled
call can hold that thread indefinitely. But Python writes the signal's number to a file
descriptor at once, wherever the main thread is (`signal.set_wakeup_fd`), and a thread
that reads the number can end the process.
"""

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

_STOPPING = (signal.SIGINT, signal.SIGTERM)
# Signals within this time count as one: timeout(1) and launchers send theirs twice.
_TOGETHER_S = 0.5
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides the cursor


class StopSignals:
    """Notes SIGTERM and Ctrl-C in a ``with`` statement; the second ends the process.

    Only the main thread may handle signals; in another thread this notes nothing.

    Attributes:
      received: the number of the first signal; 0 without one.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.received = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        """Set the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._stack.enter_context(exit_on_second(self._announce))
            for number in _STOPPING:
                self._stack.enter_context(_handled(number, self._note))
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the former handlers."""
        self._stack.close()

    def __call__(self) -> bool:
        """Return whether this process got a signal."""
        return self.received > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _announce(self, number: int) -> None:
        self.received = self.received or number
        with contextlib.suppress(OSError, ValueError):  # standard error is closed
            line = "hsee: stops after this step; a second signal ends it at once"
            print(line, file=sys.stderr)


@contextlib.contextmanager
def exit_on_second(
    on_first: Callable[[int], None] = lambda number: None,
) -> Iterator[None]:
    """End the process at its second SIGTERM or Ctrl-C, whatever the main thread does.

    The signals need a handler in Python; Ctrl-C has one by default. Call this in the
    main thread.

    Args:
      on_first: called with the number of the first signal, in another thread.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, on_first), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()  # the watcher comes to the end of what it reads
        watcher.join()
        reading.close()


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C exit at once with one line; there must be nothing to clean up."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        _leave("stopped", number)

    with _handled(signal.SIGINT, leave):
        yield


def keep_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that came inside a callback that cannot raise.

    This is a `sys.unraisablehook`. Python's own hook prints the traceback, and the
    process continues.
    """
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.05, _thread.interrupt_main)  # the callback is over then
    again.daemon = True
    again.start()


@contextlib.contextmanager
def _handled(
    number: int, handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Handle a signal, and restore its former handler."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        # None stands for a handler that Python did not set and cannot restore.
        signal.signal(number, signal.SIG_DFL if before is None else before)


def _watch(reading: socket.socket, on_first: Callable[[int], None]) -> None:
    """Read the numbers of signals until the other end is closed."""
    first = None
    while numbers := reading.recv(64):
        for number in numbers:
            if number not in _STOPPING:
                continue
            if first is None:
                first = time.monotonic()
                on_first(number)
            elif time.monotonic() - first > _TOGETHER_S:
                _leave("ended at once", number)


def _leave(word: str, number: int) -> NoReturn:
    """Print a word and exit without cleaning up."""
    line = f"hsee: {word}\n".encode()
    with contextlib.suppress(OSError):
        os.write(2, _SHOW_CURSOR + line if os.isatty(2) else line)
    os._exit(128 + number)
