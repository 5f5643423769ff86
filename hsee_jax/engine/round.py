"""What a round is, for both forms of the engine."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hsee_jax.core.types import Array, Dataset, ExitMetrics, Key, Metrics
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.federation.state import Means, RunState
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import SAME, SPREAD

Floats = npt.NDArray[np.float32]


def client_axis(choice: str) -> str:
    """Return ``loop`` or ``vmap``: what ``auto`` means here."""
    if choice != "auto":
        return choice
    one_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    return "loop" if one_cpu else "vmap"


class RoundProgress(NamedTuple):
    """How far a round has come; a step is as many turns as there are clients in it."""

    steps: int  # finished
    finished: bool
    metrics: ExitMetrics  # sums over them, numpy [N, ...]


def nothing_done(plan: RoundPlan) -> RoundProgress:
    """Return the beginning of a round."""
    zeros: Any = np.zeros(len(plan.ids))
    link: Any = np.zeros((len(plan.ids), 2, 2), np.int64)
    metrics = Metrics(zeros, zeros, zeros)
    return RoundProgress(0, False, ExitMetrics(metrics, metrics, link))


class RoundFn(Protocol):
    """A compiled round."""

    def __call__(
        self,
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        begun: RoundProgress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[RunState, Means, RoundProgress]:
        """Train a round, or the rest of one.

        A client with a step that was refused (see `hsee_jax.federation.step`) is left
        out of the averages from there to the end of the round.

        Args:
          state: of the clients in the plan's slots, before; its buffers are given up.
          data: the training samples, on the device; over a mesh a block for each
            device, in which the plan's indices count, see `place_blocks`, where
            `data_layout` says so.
          plan: T steps of N slots.
          learning_rates: ``float32 [T]``.
          weights: ``float32 [N]``, of each slot in the averages; 0 for the absent.
          begun: where the state is in the round; None is its beginning.
          stop: asked between steps, in every process; true ends the call there.

        Returns:
          The state after, the last means of what is averaged, if it was, and how far
          the round has come.

        Raises:
          ValueError: the plan has indices of samples that are not there.
        """


def layout(strategy: Strategy) -> RunState:
    """Describe how a state lies over a mesh, as a prefix tree of partition specs.

    Where clients wait for each other there is nothing to spread but the rows of a
    batch, so every device holds all of them.
    """
    clients = SAME if strategy.step is None else SPREAD
    servers = SAME if strategy.shared else SPREAD
    return RunState(SAME, clients, servers)  # type: ignore[arg-type]


def data_layout(strategy: Strategy) -> PartitionSpec:
    """Say how training samples lie over a mesh: in blocks, or all on each device."""
    return SAME if strategy.step is None else SPREAD


def check_indices(plan: RoundPlan, samples: int) -> None:
    """Refuse indices that JAX would clamp to the last sample."""
    if plan.indices.max() >= samples:
        raise ValueError(
            f"the plan asks for sample {plan.indices.max()}, and a device has "
            f"{samples}; over a mesh `place_blocks` gives each what it needs"
        )


def step_key(key: Key, client: Array, step: Array) -> Key:
    """Derive the key of a client's draws in a step, counted over the whole run."""
    return jax.random.fold_in(jax.random.fold_in(key, client), step)


def all_finite(metrics: ExitMetrics) -> Any:
    """Tell for each slot whether every step was taken, ``bool [N]``."""
    losses = metrics.exit.loss_sum + metrics.server.loss_sum
    return (jnp if isinstance(losses, jax.Array) else np).isfinite(losses)


def turn_sequence(strategy: Strategy, order: Any) -> tuple[Any, Any]:
    """Return step and slot of each turn in a round, from the turns ``int32 [T, A]``."""
    numbers = jnp if isinstance(order, jax.Array) else np
    num_steps, num_turns = order.shape
    steps = numbers.arange(num_steps)
    if strategy.turn_unit == "epoch":
        return numbers.tile(steps, num_turns), numbers.repeat(order[0], num_steps)
    return numbers.repeat(steps, num_turns), order.reshape(-1)


def due_after(strategy: Strategy, unit: str, count: Any) -> Any:
    """Tell whether to aggregate after ``count`` steps or rounds."""
    if strategy.period == 0 or strategy.period_unit != unit:
        return False
    return count % strategy.period == 0


def make_no_means(strategy: Strategy, mesh: Mesh | None) -> Callable[..., Means]:
    """Make zeros in the shape of a round's means."""
    sharding = None if mesh is None else NamedSharding(mesh, SAME)

    @partial(jax.jit, out_shardings=sharding)
    def no_means(state: RunState, weights: tuple[Array, ...]) -> Means:
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(strategy.aggregate, state, weights)[1],
        )

    return no_means
