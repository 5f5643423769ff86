"""The costs of each layer: parameters, and FLOPs and bytes of a sample."""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array, PyTree, Stage, Variables
from hsee_jax.nn.model import Model, layer_inputs


class LayerCost(NamedTuple):
    """The cost of one sample in a layer or a head."""

    name: str
    parameters: int
    flops: int  # of the forward pass, as XLA counts them, without padding
    output_bytes: int  # of the output, the features that a client with this cut sends
    # Activations that the backward pass needs, at most: XLA computes some again.
    kept_bytes: int = 0


def layer_costs(model: Model, exits: str = "cut") -> tuple[LayerCost, ...]:
    """Return the costs of a sample in the L layers, L exit heads and the final head.

    FLOPs come from the cost analysis of programs that are compiled for the CPU, on
    every machine: elsewhere a library may compute what XLA then does not count.

    Args:
      model: the network.
      exits: see `hsee_jax.federation.Federation`; with ``"all"``, the cost of an exit
        is the sum over all exits up to it, which a client with this cut has.

    Raises:
      UserError: JAX_PLATFORMS leaves out the CPU.
    """
    costs = [
        LayerCost(name, *part_cost(stage, shape))
        for name, stage, shape in model_parts(model)
    ]
    return tuple(costs) if exits == "cut" else _with_all_exits(costs)


def _with_all_exits(costs: list[LayerCost]) -> tuple[LayerCost, ...]:
    """Add the costs of the exits before it to the cost of each exit."""
    count = len(costs) // 2
    total: tuple[int, ...] = (0, 0, 0, 0)
    for number in range(count, 2 * count):
        name, *own = costs[number]
        total = tuple(map(sum, zip(total, own, strict=True)))
        costs[number] = LayerCost(name.replace("exit", "exits", 1), *total)
    return tuple(costs)


def model_parts(model: Model) -> list[tuple[str, Stage, jax.ShapeDtypeStruct]]:
    """Return the L layers, L exit heads and the final head of a network.

    Returns:
      For each its name, its stage, and the shape of its input, ``[1, ...]``.
    """
    shapes = layer_inputs(model)
    exits = (f"exit after {name}" for name in model.layer_names)
    names = [*model.layer_names, *exits, "final head"]
    stages = [*model.stages, *model.exit_heads, model.final_head]
    inputs = [*shapes[:-1], *shapes[1:], shapes[-1]]
    return list(zip(names, stages, inputs, strict=True))


@functools.lru_cache(maxsize=256)
def part_cost(stage: Stage, shape: jax.ShapeDtypeStruct) -> tuple[int, int, int, int]:
    """Return the cost of a sample in a layer or a head, as in `LayerCost`.

    Args:
      stage: the layer or the head.
      shape: shape and dtype of its input, ``[1, ...]``.

    Raises:
      UserError: JAX_PLATFORMS leaves out the CPU.
    """
    variables = jax.eval_shape(stage.init, jax.random.key(0), shape)
    mask = jax.ShapeDtypeStruct((1,), jnp.bool_)

    def run(variables: Variables, inputs: Array, mask: Array) -> Array:
        return stage.apply(variables, inputs, mask, train=False)[0]

    with jax.default_device(_cpu()):
        compiled = jax.jit(run).lower(variables, shape, mask).compile()
    output = jax.eval_shape(run, variables, shape, mask)
    return (
        sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        _flops(compiled),
        output.size * output.dtype.itemsize,
        _pullback_bytes(stage, shape, 2) - _pullback_bytes(stage, shape, 1),
    )


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", jax.default_backend())
        raise UserError(
            f"JAX_PLATFORMS: {platforms} is not allowed where FLOPs are counted, for "
            f"which XLA compiles for the CPU; allowed is {platforms},cpu"
        ) from error


def _flops(compiled: jax.stages.Compiled) -> int:
    """Return the FLOPs of a program; one without any, such as a reshape, has no entry.

    Raises:
      RuntimeError: XLA does not count them.
    """
    analysis = compiled.cost_analysis()
    flops = -1 if analysis is None else int(analysis.get("flops", 0))
    if flops < 0:
        raise RuntimeError(f"XLA counts no FLOPs in its analysis {analysis}")
    return flops


def _pullback_bytes(stage: Stage, shape: jax.ShapeDtypeStruct, batch_size: int) -> int:
    """Return the bytes that a training step keeps from a part's forward pass."""

    def run(variables: Variables, inputs: Array, mask: Array) -> PyTree:
        def outputs(params: PyTree, inputs: Array) -> Array:
            given = {**variables, "params": params}
            return stage.apply(given, inputs, mask, train=True)[0]

        return jax.vjp(outputs, variables["params"], inputs)[1]

    variables = jax.eval_shape(stage.init, jax.random.key(0), shape)
    inputs = jax.ShapeDtypeStruct((batch_size, *shape.shape[1:]), shape.dtype)
    mask = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
    kept = jax.eval_shape(run, variables, inputs, mask)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
