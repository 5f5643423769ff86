"""Plans side by side: algorithms, and other ways to choose the cuts.

The table over algorithms is after FPL (arXiv:2201.07402): what each way of learning
costs in seconds, energy and bytes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.choice import choose
from hsee_jax.systems.outcome import Plan, evaluate_cuts
from hsee_jax.systems.planner import Limits, plan_cuts, possible_cuts
from hsee_jax.systems.problem import Problem, cut_costs
from hsee_jax.systems.quantities import Ints

_DRAWS = 21  # odd, for the median


class Row(NamedTuple):
    """A plan with its name, or the reason why there is none."""

    name: str
    plan: Plan | None
    refusal: str = ""


def compare(
    problems: Mapping[str, Problem | UserError], minimize: str, limits: Limits
) -> list[Row]:
    """Plan the same devices under several algorithms.

    Args:
      problems: the problem by the name of the algorithm, or the error that refuses it.
      minimize: see `plan_cuts`.
      limits: the limits of each plan.
    """
    rows = []
    for name, problem in problems.items():
        try:
            if isinstance(problem, UserError):
                raise problem
            rows.append(Row(name, plan_cuts(problem, minimize, limits)))
        except UserError as error:
            rows.append(Row(name, None, str(error)))
    return rows


def other_choices(problem: Problem, minimize: str, limits: Limits) -> list[Row]:
    """Return plans with cuts chosen in other ways, among the `possible_cuts`.

    They are the best equal cut and, where cuts may differ, the shallowest and the
    deepest cut of each client, and the median of 21 random choices.

    Args:
      problem: the problem under an algorithm.
      minimize: see `plan_cuts`.
      limits: the limits that `possible_cuts` reads; limits of totals do not count.
    """
    allowed = possible_cuts(problem, limits)
    layers = allowed.shape[1]
    rows = []
    try:
        costs = cut_costs(problem, allowed)
        equal = choose(costs, minimize, one_cut=True)
        rows.append(Row("equal cuts", evaluate_cuts(problem, equal)))
    except UserError as error:
        rows.append(Row("equal cuts", None, str(error)))
    if problem.one_cut:
        return rows
    shallow = allowed.argmax(axis=1) + 1
    deep = layers - allowed[:, ::-1].argmax(axis=1)
    rows.append(Row("shallowest cuts", evaluate_cuts(problem, shallow)))
    rows.append(Row("deepest cuts", evaluate_cuts(problem, deep)))
    rng = np.random.default_rng(0)
    drawn = [evaluate_cuts(problem, _draw(allowed, rng)) for _ in range(_DRAWS)]
    drawn.sort(key=lambda plan: getattr(plan.totals(), minimize))
    rows.append(Row("random cuts (median)", drawn[_DRAWS // 2]))
    return rows


def _draw(allowed: np.ndarray, rng: np.random.Generator) -> Ints:
    return np.array([rng.choice(np.flatnonzero(row)) + 1 for row in allowed])
