"""The arguments of the program that is a round, on devices or as shapes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from hsee_jax.core.types import Dataset, ExitMetrics, Key, Metrics, PyTree
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.round import Floats, layout
from hsee_jax.federation.state import Means, RunState, split_stacks, stack_sizes
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import SAME

_SUMS: Any = Metrics(np.float32, np.int32, np.int32)  # type: ignore[arg-type]
_DTYPES = ExitMetrics(_SUMS, _SUMS, np.int32)  # type: ignore[arg-type]


class Carry(NamedTuple):
    """The values that change in a round."""

    state: RunState
    means: Means
    totals: tuple[ExitMetrics, ...]  # for each group, leaves [S, ...]


class GroupPlan(NamedTuple):
    """A group's part of a `RoundPlan`, with S slots."""

    ids: Any  # int32 [S]
    indices: Any  # int32 [T, S, B]
    mask: Any  # bool [T, S, B]
    weights: Any  # float32 [S]


class Inputs(NamedTuple):
    """The values that stay the same in a round."""

    data: Dataset
    groups: tuple[GroupPlan, ...]
    order: Any  # int32 [T, A]
    learning_rates: Any  # float32 [T]
    first: Any  # int32 []: the round's first step, counted over the whole run
    key: Key  # the root of the augmentation's randomness


class Placement(NamedTuple):
    """How the arguments of a round get to the devices."""

    put: Callable[[PyTree, PyTree], PyTree]  # host arrays, partition specs -> arrays
    no_means: Callable[[RunState, tuple[Any, ...]], Means]  # see `make_no_means`

    def arguments(
        self,
        strategy: Strategy,
        state: RunState,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        metrics: ExitMetrics,
    ) -> tuple[Carry, tuple[GroupPlan, ...], tuple[Any, Any]]:
        """Return the carry, the groups' plans, and the order and rates of the steps.

        Args:
          strategy: the algorithm.
          state: the clients in the plan's slots, on the devices.
          plan: T steps of N slots.
          learning_rates: ``float32 [T]``.
          weights: ``float32 [N]``.
          metrics: sums over the finished steps, numpy ``[N, ...]``.
        """
        sizes = stack_sizes(state)
        each: Any = layout(strategy).clients
        by_step = PartitionSpec(None, *each)
        parts = map(
            GroupPlan,
            split_stacks(plan.ids, sizes),
            split_stacks(plan.indices, sizes, axis=1),
            split_stacks(plan.mask, sizes, axis=1),
            split_stacks(weights, sizes),
        )
        specs = (GroupPlan(each, by_step, by_step, each),) * len(sizes)
        groups = self.put(tuple(parts), specs)
        same = self.put((plan.order, learning_rates), SAME)
        sums = jax.tree.map(np.asarray, metrics, _DTYPES)
        carry = Carry(
            state,
            self.no_means(state, tuple(group.weights for group in groups)),
            self.put(split_stacks(sums, sizes), each),
        )
        return carry, groups, same
