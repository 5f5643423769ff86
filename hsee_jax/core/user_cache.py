"""The folder for files that are kept between calls and can be made again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder of this package in ``XDG_CACHE_HOME``, or in ``~/.cache``.

    A ``~`` is not expanded, and the folder need not exist.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hsee_jax"
