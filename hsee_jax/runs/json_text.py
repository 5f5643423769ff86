"""JSON as the files of a run hold it."""

import json
import re
from typing import Any

_NUMBERS = re.compile(r"\[\n([\s\d,.eE+-]+)\]")  # an indented list of numbers


def dumps(values: Any, *, lines: bool = False) -> str:
    """Return JSON with a final newline, indented unless it is a line of a file.

    A list of numbers stays on one line.
    """
    text = json.dumps(values, indent=None if lines else 2)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"
