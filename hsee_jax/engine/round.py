"""Types and rules that all forms of a round share."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hsee_jax.core.errors import unknown
from hsee_jax.core.reuse import reused
from hsee_jax.core.types import Array, Batch, Dataset, ExitMetrics, Key, Metrics
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.federation.state import Means, RunState
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import SAME, SPREAD

Floats = npt.NDArray[np.float32]
Programs = dict[Hashable, Callable]  # compiled functions by what they depend on
CLIENT_AXES = ("loop", "vmap", "map")  # see `hsee_jax.engine.compilation`


def client_axis(choice: str, backend: str) -> str:
    """Return one of `CLIENT_AXES`, and for ``auto`` choose by the backend.

    Args:
      choice: one of them, or ``"auto"``.
      backend: ``"cpu"``, ``"gpu"`` or ``"tpu"``, see `hsee_jax.parallel.backend_of`.

    Raises:
      UserError: there is no such choice.
    """
    if choice in CLIENT_AXES:
        return choice
    if choice != "auto":
        raise unknown("client_axis", choice, ("auto", *CLIENT_AXES))
    one_cpu = backend == "cpu" and jax.process_count() == 1
    return "loop" if one_cpu else "vmap"


class RoundProgress(NamedTuple):
    """The progress of a round; a step has a turn for each client in the round."""

    steps: int  # finished steps
    finished: bool
    metrics: ExitMetrics  # sums over the finished steps, numpy [N, ...]
    # Slots of clients on a network that were to take part and did not in time.
    late: tuple[int, ...] = ()


def nothing_done(plan: RoundPlan) -> RoundProgress:
    """Return the progress of a round that has not begun."""
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
        """Train a round, or the rest of a round.

        The averages leave out a client that refused a step (see
        `hsee_jax.federation.step`) from this step to the end of the round.

        Args:
          state: the clients in the plan's slots before the round; the call donates its
            buffers.
          data: the training samples, on the device. Where `data_layout` spreads them
            over a mesh, each device has a block (see `place_blocks`), and the plan's
            indices count in it.
          plan: T steps of N slots.
          learning_rates: ``float32 [T]``.
          weights: ``float32 [N]``, the weight of each slot in the averages; 0 for
            absent clients.
          begun: the progress of the round so far; None at its beginning.
          stop: called between some steps in every process; if it returns true, the call
            ends there.

        Returns:
          The new state, the last means of the averaged layers (empty or zero if there
          was no average), and the progress of the round.

        Raises:
          ValueError: the plan has an index beyond the samples, or there is not a rate
            for each step.
        """


def layout(strategy: Strategy) -> RunState:
    """Return how a state is laid out over a mesh, as a prefix tree of partition specs.

    Where clients wait for each other only the rows of a batch can be spread, so every
    device holds all clients.
    """
    clients = SAME if strategy.step is None else SPREAD
    servers = SAME if strategy.shared else SPREAD
    return RunState(SAME, clients, servers)  # type: ignore[arg-type]


def data_layout(strategy: Strategy) -> PartitionSpec:
    """Return the layout of training samples over a mesh: in blocks, or all on each."""
    return SAME if strategy.step is None else SPREAD


def check_plan(plan: RoundPlan, samples: int, learning_rates: Floats) -> None:
    """Refuse a plan whose samples or rates are not there; JAX would take the last.

    Raises:
      ValueError: an index is beyond the samples, or there is not a rate for each step.
    """
    if len(learning_rates) != len(plan.order):
        raise ValueError(
            f"{len(learning_rates)} learning rates for {len(plan.order)} steps"
        )
    if plan.indices.max() >= samples:
        raise ValueError(
            f"the plan asks for sample {plan.indices.max()}, and a device has "
            f"{samples}; over a mesh `place_blocks` gives each what it needs"
        )


def client_batch(
    pipeline: InputPipeline,
    key: Key,
    client: Array,
    step: Array,
    data: Dataset,
    indices: Array,
    mask: Array,
) -> Batch:
    """Make a client's batch.

    Args:
      pipeline: makes batches of samples.
      key: the root of the augmentation's randomness.
      client: its id, ``int32 []``.
      step: counted over the whole run, ``int32 []``.
      data: all samples.
      indices: of the batch, ``int32 [B]``.
      mask: ``bool [B]``, false on padding.
    """
    own = jax.random.fold_in(jax.random.fold_in(key, client), step)
    return pipeline.training(own, data, indices, mask, client)


def all_finite(metrics: ExitMetrics) -> Any:
    """Return whether each slot took all of its steps, ``bool [N]``."""
    losses = metrics.exit.loss_sum + metrics.server.loss_sum
    return (jnp if isinstance(losses, jax.Array) else np).isfinite(losses)


def turn_of(strategy: Strategy, order: Any, k: Any) -> tuple[Any, Any]:
    """Return step and slot of turn ``k`` of a round; ``order`` is ``int32 [T, A]``."""
    num_steps, num_turns = order.shape
    if strategy.turn_unit == "epoch":
        a, t = divmod(k, num_steps)
        return t, order[0, a]
    t, a = divmod(k, num_turns)
    return t, order[t, a]


def due_after(strategy: Strategy, unit: str, count: Any) -> Any:
    """Return whether a strategy aggregates after ``count`` steps or rounds."""
    if strategy.period == 0 or strategy.period_unit != unit:
        return False
    return count % strategy.period == 0


@reused
def make_no_means(strategy: Strategy, mesh: Mesh | None) -> Callable[..., Means]:
    """Compile a function that makes zeros in the shape of a round's means."""
    sharding = None if mesh is None else NamedSharding(mesh, SAME)

    @partial(jax.jit, out_shardings=sharding)
    def no_means(state: RunState, weights: tuple[Array, ...]) -> Means:
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(strategy.aggregate, state, weights),
        )

    return no_means
