"""Interactions of columns: how strong each is in a function, and which to keep.

After SIAN (Enouen and Liu, NeurIPS 2022, arXiv:2209.09326), which scores interactions
like Archipelago (Tsang et al., NeurIPS 2020). Take two rows, x and a baseline. With
``x_T`` for the baseline with the columns T of x, the effect of the columns S is

    inc(S) = sum over the subsets T of S of (-1)^(|S| - |T|) f(x_T).

It is 0 unless f joins all columns of S. Two choices are ours. The other columns stay at
the baseline, where the papers average over two contexts. And the score is the mean of
``inc(S)^2 / 2^|S|`` over many pairs of rows: if the columns are independent and the
baselines are other rows of the same table, that is the variance of f that is due to S
and to the interactions that contain S (Liu and Owen, 2006, superset importance).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Option, at_least

Columns = tuple[int, ...]  # ascending
# float32 [M, F] -> [M] or [M, K]
Function = Callable[[npt.NDArray[np.float32]], Any]

_MAX_ORDER = Option("max_order", int, 2, rules=(at_least(2),))
_COUNT = Option("count", int, 10, rules=(at_least(1),))


class Interaction(NamedTuple):
    """Some columns of a table, and how strongly a function joins them."""

    columns: Columns
    score: float  # in the unit of f squared, summed over the outputs of f

    @property
    def text(self) -> str:
        """Return the columns as `sian` takes them, such as ``"0,3"``."""
        return ",".join(map(str, self.columns))


def check_limits(max_order: int, count: int) -> None:
    """Refuse limits with which `select_interactions` would choose nothing.

    Raises:
      UserError: ``max_order`` is below 2, or ``count`` is below 1.
    """
    _MAX_ORDER.checked(max_order)
    _COUNT.checked(count)


def parse_interaction(text: str, num_columns: int) -> Columns:
    """Return the columns that a text such as ``"0,3"`` names, in ascending order.

    Raises:
      UserError: these are not two or more different columns of a table.
    """
    parts = [part.strip() for part in text.split(",")]
    columns = {int(part) for part in parts if part.isdecimal() and len(part) < 10}
    if len(columns) != len(parts) or len(parts) < 2 or max(columns) >= num_columns:
        raise UserError(
            f"interactions: {text} is not allowed; allowed are two or more different "
            f"columns among 0..{num_columns - 1}, such as 0,1"
        )
    return tuple(sorted(columns))


def interaction_effects(
    f: Function, x: npt.ArrayLike, baseline: npt.ArrayLike, sets: Sequence[Columns]
) -> npt.NDArray[np.float64]:
    """Return ``inc(S)`` of some sets of columns, see `hsee_jax.nn.interactions`.

    Args:
      f: any function of rows. It is called once for each of the sets and once for each
        of their proper subsets, always with M rows.
      x: ``[M, F]``.
      baseline: ``[F]``, or ``[M, F]`` for a baseline of each row.
      sets: columns of each interaction.

    Returns:
      ``[len(sets), M, K]``; K is 1 for a function of one output.
    """
    return np.stack(list(_effects(f, x, baseline, sets)))


def select_interactions(
    f: Function,
    x: npt.ArrayLike,
    baseline: npt.ArrayLike,
    *,
    max_order: int = 2,
    count: int = 10,
) -> tuple[Interaction, ...]:
    """Choose the strongest interactions of each order in a trained function.

    All pairs are candidates. A larger set is a candidate if all its subsets of one
    column less were chosen.

    Args:
      f: see `interaction_effects`.
      x: ``[M, F]``.
      baseline: see `interaction_effects`. Other rows of the table, in any order, make
        the scores shares of a variance.
      max_order: the largest number of columns in an interaction.
      count: interactions of each order to choose, at most.

    Returns:
      Interactions by ascending order, and by falling score within an order.

    Raises:
      UserError: ``max_order`` is below 2, or ``count`` is below 1.
    """
    max_order, count = _MAX_ORDER.checked(max_order), _COUNT.checked(count)
    x = np.asarray(x, np.float32)
    chosen: list[Interaction] = []
    pairs = itertools.combinations(range(x.shape[1]), 2)
    candidates: list[Columns] = list(pairs)
    while candidates and len(candidates[0]) <= max_order:
        scores = _scores(f, x, baseline, candidates)
        found = map(Interaction, candidates, scores)
        best = sorted(found, key=lambda one: (-one.score, one.columns))[:count]
        chosen += best
        candidates = _join({one.columns for one in best})
    return tuple(chosen)


def _join(sets: set[Columns]) -> list[Columns]:
    """Return the sets of one column more whose subsets of one column less are given."""
    columns = sorted(set(itertools.chain(*sets)))
    larger = (
        (*members, column)
        for members in sorted(sets)
        for column in columns
        if column > members[-1]
    )
    return [
        one
        for one in larger
        if all(part in sets for part in itertools.combinations(one, len(one) - 1))
    ]


def _scores(
    f: Function, x: npt.ArrayLike, baseline: npt.ArrayLike, sets: Sequence[Columns]
) -> list[float]:
    """Return the mean square of each effect over rows, divided by 2 to the order."""
    return [
        float(np.square(effect).sum(axis=1).mean()) / 2 ** len(columns)
        for columns, effect in zip(sets, _effects(f, x, baseline, sets), strict=True)
    ]


def _effects(
    f: Function, x: npt.ArrayLike, baseline: npt.ArrayLike, sets: Sequence[Columns]
) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the effect ``[M, K]`` of each set."""
    x = np.asarray(x, np.float32)
    others = np.broadcast_to(np.asarray(baseline, np.float32), x.shape)

    def value(columns: Columns) -> npt.NDArray[np.float64]:
        rows = others.copy()
        rows[:, columns] = x[:, columns]
        return np.asarray(f(rows), np.float64).reshape(len(rows), -1)

    part_value = functools.cache(value)  # sets have most of their subsets in common
    for columns in sets:
        effect = value(columns)
        for size in range(len(columns)):
            for part in itertools.combinations(columns, size):
                effect = effect + (-1) ** (len(columns) - size) * part_value(part)
        yield effect
