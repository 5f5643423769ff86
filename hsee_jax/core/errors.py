"""The errors that callers handle: errors of the user, a stop, and a divergence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can correct; its text is one line that says how."""


# What reading JSON or TOML raises, and taking values out of it, if it is damaged.
DAMAGE = (
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class Stopped(Exception):
    """Training stopped before its end because it was asked to; it can be resumed.

    Attributes:
      rounds: finished rounds; the last checkpoint holds all of them.
      steps: finished steps of the next round; the last checkpoint holds them too.
    """

    def __init__(self, rounds: int, steps: int) -> None:
        """Name the place where training stopped."""
        where = f"in round {rounds + 1} after step {steps}"
        super().__init__(f"stopped {where if steps else f'after round {rounds}'}")
        self.rounds, self.steps = rounds, steps


class DivergenceError(Exception):
    """A loss is no longer finite.

    Attributes:
      client: the id of the client with this loss.
      branch: ``"exit"`` or ``"server"``.
      round: the number of the round, from 1.
    """

    def __init__(self, client: int, branch: str, number: int) -> None:
        """Name the client, the branch and the round."""
        super().__init__(
            f"the {branch} loss of client {client} is not finite in round {number}; "
            "a lower learning_rate usually helps"
        )
        self.client, self.branch, self.round = client, branch, number


def unknown(what: str, value: object, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is not allowed.

    Args:
      what: the option with this name.
      value: the name.
      allowed: the allowed names; the error suggests the nearest of them.
    """
    names = list(allowed)
    near = difflib.get_close_matches(str(value), names, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(
        f"{what}: {value} is unknown{hint}; allowed are {', '.join(names)}"
    )


def no_package(what: str, extra: str) -> UserError:
    """Return the error for what needs a package that is not installed.

    Args:
      what: the command or the option.
      extra: the extra of this package that installs it.
    """
    return UserError(f"{what}: needs a package; `pip install 'hsee-jax[{extra}]'`")


def one_line(error: object) -> str:
    """Return the text of an error of another library in one line, or else its type."""
    return " ".join(str(error).split()) or type(error).__name__
