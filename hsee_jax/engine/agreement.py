"""Counts of right answers by class: of the exit, of the server, of both or neither."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import Array
from hsee_jax.nn.losses import predicted_class

Counts = npt.NDArray[np.int64]


class Agreement(NamedTuple):
    """The samples of each class, counted by whose answer is right.

    The four counts of a class add up to its number of samples.
    """

    both: tuple[int, ...]  # K counts: the exit and the server are right
    exit_only: tuple[int, ...]  # only the exit is right
    server_only: tuple[int, ...]  # only the server is right
    neither: tuple[int, ...]  # both are wrong

    @classmethod
    def of(cls, counts: Counts) -> "Agreement":
        """Make the value from counts ``[4, K]``, see `count_agreement`."""
        return cls(*map(tuple, counts.tolist()))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Agreement":
        """Make the value from the result of `to_json`.

        Raises:
          KeyError, TypeError, ValueError: the values are not counts.
        """
        return cls(*(tuple(map(int, values[name])) for name in cls._fields))

    def to_json(self) -> dict[str, list[int]]:
        """Return the counts as values of JSON."""
        return {name: list(counts) for name, counts in self._asdict().items()}

    @property
    def samples(self) -> Counts:
        """Return the number of samples of each class, ``[K]``."""
        return np.sum(self, axis=0)

    @property
    def exit_correct(self) -> Counts:
        """Return how many samples of each class the exit answers right, ``[K]``."""
        return np.add(self.both, self.exit_only)

    @property
    def server_correct(self) -> Counts:
        """Return how many samples of each class the server answers right, ``[K]``."""
        return np.add(self.both, self.server_only)


def count_agreement(
    exit_logits: Array, server_logits: Array, labels: Array, mask: Array
) -> Array:
    """Count the rows with a true mask by class and by whose answer is right.

    Args:
      exit_logits: ``float32 [B, K]``. A row with a logit that is not finite is wrong.
      server_logits: ``float32 [B, K]``, for the same samples.
      labels: ``int32 [B]``, each in ``0..K-1``.
      mask: ``bool [B]``, false on padding.

    Returns:
      ``int32 [4, K]``; the rows are the fields of `Agreement`.
    """
    chex.assert_rank([exit_logits, server_logits, labels, mask], [2, 2, 1, 1])
    chex.assert_equal_shape([exit_logits, server_logits])
    exit_wrong = (predicted_class(exit_logits) != labels).astype(jnp.int32)
    server_wrong = (predicted_class(server_logits) != labels).astype(jnp.int32)
    case = 2 * exit_wrong + server_wrong
    empty = jnp.zeros((len(Agreement._fields), exit_logits.shape[1]), jnp.int32)
    return empty.at[case, labels].add(mask.astype(jnp.int32))
