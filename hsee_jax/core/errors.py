"""The errors that callers handle: what a user can mend, a stop, and a divergence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user can mend this; the text is one line that says how."""


class Stopped(Exception):
    """Training was asked to stop before its end; it can be resumed.

    Attributes:
      rounds: finished rounds, all of them in the last checkpoint.
      steps: finished steps of the next round, in the last checkpoint too.
    """

    def __init__(self, rounds: int, steps: int) -> None:
        """Name the place where training stopped."""
        where = f"in round {rounds + 1} after step {steps}"
        super().__init__(f"stopped {where if steps else f'after round {rounds}'}")
        self.rounds, self.steps = rounds, steps


class DivergenceError(Exception):
    """A loss stopped being finite.

    Attributes:
      client: id of the client whose loss it was.
      branch: ``"exit"`` or ``"server"``.
      round: number of the round, from 1.
    """

    def __init__(self, client: int, branch: str, number: int) -> None:
        """Name the client, the branch and the round."""
        super().__init__(
            f"the {branch} loss of client {client} is not finite in round {number}; "
            "a lower learning_rate usually helps"
        )
        self.client, self.branch, self.round = client, branch, number


def unknown(what: str, value: object, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is none of the allowed names.

    Args:
      what: the option that the name was given for.
      value: the name that was given.
      allowed: the names that are allowed; the nearest one is suggested.
    """
    names = list(allowed)
    near = difflib.get_close_matches(str(value), names, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return UserError(
        f"{what}: {value} is unknown{hint}; allowed are {', '.join(names)}"
    )
