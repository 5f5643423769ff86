"""The costs of each layer: parameters, and FLOPs and bytes of a sample."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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

    FLOPs come from the cost analysis of each compiled program, so they depend on the
    backend at hand.

    Args:
      model: the network.
      exits: see `hsee_jax.federation.Federation`; with ``"all"``, the cost of an exit
        is the sum over all exits up to it, which a client with this cut has.
    """
    shapes = layer_inputs(model)
    stages = [*model.stages, *model.exit_heads, model.final_head]
    inputs = [*shapes[:-1], *shapes[1:], shapes[-1]]
    known: dict[tuple[Stage, Any], tuple[int, int, int, int]] = {}
    costs = []
    for name, stage, shape in zip(part_names(model), stages, inputs, strict=True):
        place = (stage, (shape.shape, shape.dtype))
        if place not in known:
            known[place] = part_cost(stage, shape)
        costs.append(LayerCost(name, *known[place]))
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


def part_names(model: Model) -> tuple[str, ...]:
    """Return the names of the L layers, L exit heads and the final head."""
    exits = (f"exit after {name}" for name in model.layer_names)
    return *model.layer_names, *exits, "final head"


def part_cost(stage: Stage, shape: jax.ShapeDtypeStruct) -> tuple[int, int, int, int]:
    """Return the cost of a sample in a layer or a head, as in `LayerCost`.

    Args:
      stage: the layer or the head.
      shape: shape and dtype of its input, ``[1, ...]``.
    """
    variables = jax.eval_shape(stage.init, jax.random.key(0), shape)
    mask = jax.ShapeDtypeStruct((1,), jnp.bool_)

    def run(variables: Variables, inputs: Array, mask: Array) -> Array:
        return stage.apply(variables, inputs, mask, train=False)[0]

    compiled = jax.jit(run).lower(variables, shape, mask).compile()
    analysis = compiled.cost_analysis() or {}
    output = jax.eval_shape(run, variables, shape, mask)
    return (
        sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        int(analysis.get("flops", 0)),
        output.size * output.dtype.itemsize,
        _pullback_bytes(stage, shape, 2) - _pullback_bytes(stage, shape, 1),
    )


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
