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
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def is_change(event, arguments, folder):
    if event == "open":
        path, _, flags = arguments
        if not flags or not flags & WRITES:
            return False
    elif event in CHANGES:
        path = arguments[0]
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return True  # in a folder that is removed with all it holds
    else:
        return False
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder)


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
