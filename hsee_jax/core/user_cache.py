"""Where files are kept between calls that can be made again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder of this package in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hsee_jax"
