"""Run a command line of `hsee`, and die right before its n-th change of a file.

    python dies.py N FOLDER WORDS...

A change is whatever Python does to a file or a folder below FOLDER: it opens it to
write, renames it, makes it or removes it. The process dies of SIGKILL, so nothing is
cleaned up. With N = 0 it lives, and with fewer changes than N it ends as usual.
"""

import os
import signal
import sys

WRITES = os.O_WRONLY | os.O_RDWR
REMOVALS = ("os.remove", "os.rmdir")


def is_change(event, arguments, folder):
    if event in REMOVALS and arguments[1] != -1:
        return True  # in a folder that is removed with all it holds
    path = arguments[0] if arguments else None
    if not isinstance(path, str | os.PathLike):
        return False
    if not os.fspath(path).startswith(folder):
        return False
    if event == "open":
        return bool(arguments[2] and arguments[2] & WRITES)
    if event == "os.mkdir":
        return not os.path.exists(path)
    return event in ("os.rename", *REMOVALS) and os.path.exists(path)


def die_before(number, folder):
    count = 0

    def hook(event, arguments):
        nonlocal count
        if is_change(event, arguments, folder):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    from hsee_jax.cli import main

    die_before(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(sys.argv[3:]))
