"""The memory that training needs on each side of a cut.

For each parameter the weight, the gradient and each value of the optimizer's state take
4 bytes; a batch takes the activations that the backward pass needs. These are counted
as JAX keeps them, which is more than XLA needs: about twice as much for ResNet-18 on a
CPU. The program itself, and what else runs on a device, come on top.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.optim.optimizers import OptimizerLike, as_optimizer
from hsee_jax.systems.costs import LayerCost

_WEIGHT_BYTES = 4
_PROBE = (64, 64)  # of a weight matrix, large against counters


def optimizer_slots(optimizer: OptimizerLike) -> int:
    """Return how many values an optimizer keeps for each parameter."""
    weights = {"w": jax.ShapeDtypeStruct(_PROBE, jnp.float32)}
    state = jax.eval_shape(as_optimizer(optimizer).init, weights)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    return round(size / np.prod(_PROBE))


def client_memory(
    costs: Sequence[LayerCost],
    *,
    batch_size: int,
    slots: int,
    boundary: str = "detached",
) -> npt.NDArray[np.int64]:
    """Return the bytes that a client of each cut 1..L needs, ``int64 [L]``.

    Args:
      costs: the costs of L layers, L exits and the final head.
      batch_size: samples in a batch.
      slots: the optimizer's slots, see `optimizer_slots`.
      boundary: see `Strategy`; with ``"none"`` a client holds the server's layers.
    """
    count = len(costs) // 2
    cuts = range(1, count + 1)
    parts = [[*costs[:cut], costs[count + cut - 1]] for cut in cuts]
    if boundary == "none":
        parts = [
            [*own, *_behind(costs, cut)] for own, cut in zip(parts, cuts, strict=True)
        ]
    return np.array(
        [parts_memory(own, batch_size=batch_size, slots=slots) for own in parts],
        np.int64,
    )


def server_memory(
    costs: Sequence[LayerCost],
    cuts: Sequence[int],
    *,
    batch_size: int,
    slots: int,
    shared: bool,
    workers: int = 1,
    together: bool = False,
) -> int:
    """Return the bytes that the server needs.

    Args:
      costs: the costs of L layers, L exits and the final head.
      cuts: the cuts of all clients.
      batch_size: samples in a client's batch.
      slots: the optimizer's slots, see `optimizer_slots`.
      shared: whether there is one server, from the shallowest cut on, or a replica for
        each client.
      workers: how many workers a server with replicas has, each with the activations
        of a batch; a shared server has one.
      together: whether a shared server takes the batches of all clients as one.
    """
    held = [min(cuts)] if shared else cuts
    weights = sum(_weights(_behind(costs, cut), slots) for cut in held)
    batches = sorted((_activations(_behind(costs, cut)) for cut in cuts), reverse=True)
    if shared:
        workers = len(cuts) if together else 1
    return weights + batch_size * sum(batches[:workers])


def parts_memory(parts: Sequence[LayerCost], *, batch_size: int, slots: int) -> int:
    """Return the bytes that training some layers and heads together needs."""
    return _weights(parts, slots) + batch_size * _activations(parts)


def _behind(costs: Sequence[LayerCost], cut: int) -> list[LayerCost]:
    return [*costs[cut : len(costs) // 2], costs[-1]]


def _weights(parts: Sequence[LayerCost], slots: int) -> int:
    return _WEIGHT_BYTES * (2 + slots) * sum(part.parameters for part in parts)


def _activations(parts: Sequence[LayerCost]) -> int:
    return sum(max(part.kept_bytes, part.output_bytes) for part in parts)
