"""A round as a loop on the host, with a compiled turn for each client and batch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hsee_jax.core.types import Dataset, ExitMetrics, Key
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.compiled_turns import by_turns
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.round import (
    Floats,
    Programs,
    RoundFn,
    RoundProgress,
    all_finite,
    check_plan,
    due_after,
    nothing_done,
)
from hsee_jax.engine.streams import num_threads
from hsee_jax.engine.turns import Begin, Inputs, Log, all_at_once
from hsee_jax.federation.aggregation import newest
from hsee_jax.federation.state import Means, RunState, split_stacks, stack_sizes
from hsee_jax.federation.strategy import Strategy


def make_loop_round(
    strategy: Strategy,
    pipeline: InputPipeline,
    key: Key,
    programs: Programs | None = None,
    threads: int = 0,
) -> RoundFn:
    """Compile the loop, see `hsee_jax.engine.make_round`."""
    pipeline = pipeline._replace(copies=strategy.copies)
    if strategy.turn is None:
        start = all_at_once(strategy, pipeline, key)
    else:
        known = {} if programs is None or not strategy.turn_kinds else programs
        start = by_turns(strategy, pipeline, key, known, num_threads(threads))

    run = loop_round(strategy, start)

    def check_and_run(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        *rest: Any,
        **named: Any,
    ) -> tuple[RunState, Means, RoundProgress]:
        check_plan(plan, len(data.labels), learning_rates)
        return run(state, data, plan, learning_rates, *rest, **named)

    return check_and_run


def loop_round(strategy: Strategy, begin: Begin) -> RoundFn:
    """Make a round of steps that something else takes, and average when it is due.

    Args:
      strategy: the algorithm.
      begin: makes the steps of a round.
    """
    # In one program XLA may compute a mean twice, and round it differently; devices,
    # and clients that come later, get the means that are returned.
    aggregate = jax.jit(strategy.aggregate)
    receive = jax.jit(strategy.receive, donate_argnums=0)
    newer = jax.jit(newest)

    def run(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        begun: RoundProgress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[RunState, Means, RoundProgress]:
        sizes, num_steps = stack_sizes(state), len(plan.order)
        number, first = int(state.round), int(state.round) * num_steps
        progress = begun or nothing_done(plan)
        done, totals = progress.steps, progress.metrics
        means: Means = {}
        steps = begin(Inputs(data, plan, learning_rates, first, sizes))
        steps.load(jax.device_put(state))
        log: Log = []

        def average(state: RunState) -> RunState:
            nonlocal means, totals
            totals = _added(totals, log)
            log.clear()
            counted = np.where(all_finite(totals), weights, np.float32(0))
            counted[list(steps.late())] = 0
            new = aggregate(state, split_stacks(counted, sizes))
            now = np.full(len(counted), state.round, np.int32)
            state = receive(state, new, split_stacks(now, sizes))
            means = newer(means, new) if means else new
            return state

        while done < num_steps:
            log += steps.take(done)
            done += 1
            if due_after(strategy, "steps", first + done):
                steps.load(average(steps.store()))
            if stop is not None and done < num_steps and stop():
                break
        finished, state = done == num_steps, steps.store()
        if finished and due_after(strategy, "rounds", number + 1):
            state = average(state)
        totals = _added(totals, log)
        state = state.replace(round=jax.device_put(np.int32(number + finished)))
        return state, means, RoundProgress(done, finished, totals, steps.late())

    return run


def _added(totals: ExitMetrics, log: Log) -> ExitMetrics:
    """Add the metrics of turns, in their order, to the sums of their slots."""
    slots = np.array([n for n, _ in log], int)

    def add(total: Any, *values: Any) -> Any:
        total = total.copy()
        if values:
            np.add.at(total, slots, np.stack(values).astype(total.dtype))
        return total

    return jax.tree.map(add, totals, *jax.device_get([metrics for _, metrics in log]))
