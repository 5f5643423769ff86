"""What the scripts of this folder share: how they end."""

import sys
from collections.abc import Callable

from hsee_jax.core.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Run a script; an error that the user can correct is one line and status 2."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
