"""A network as a tuple of layers with an exit head after each of them.

Any network that is a chain of `Stage`s can be trained; `resnet18` builds the one of the
paper. A *cut* is the number of layers that a client keeps, ``1..len(model.stages)``.
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.base import Array, Key, PyTree, Stage, UserError, Variables
from hsee_jax.resnet import BasicBlock, Head, Stem


class Model(NamedTuple):
    """What a network computes, without its weights."""

    stages: tuple[Stage, ...]  # L layers
    exit_heads: tuple[Stage, ...]  # L heads; exit_heads[l - 1] follows layer l
    final_head: Stage
    layer_names: tuple[str, ...]  # L names, such as "layer2.0"
    input_shape: tuple[int, ...]  # of one sample, (H, W, C) for images


class Network(NamedTuple):
    """One set of weights for every layer and every head of a `Model`."""

    layers: tuple[Variables, ...]  # L
    exit_heads: tuple[Variables, ...]  # L
    final_head: Variables


def from_linen(module: Any) -> Stage:
    """Makes a `Stage` of a Flax module called as ``module(x, mask, train=...)``."""

    def init(key: Key, inputs: Array) -> Variables:
        mask = jnp.ones(inputs.shape[0], bool)
        variables = module.init(key, inputs, mask, train=False)
        return {
            "params": variables.get("params", {}),
            "batch_stats": variables.get("batch_stats", {}),
        }

    def apply(
        variables: Variables, inputs: Array, mask: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        if not train:
            return module.apply(variables, inputs, mask, train=False), variables[
                "batch_stats"
            ]
        outputs, updated = module.apply(
            variables, inputs, mask, train=True, mutable=["batch_stats"]
        )
        return outputs, updated.get("batch_stats", {})

    return Stage(init, apply)


def resnet18(
    *,
    num_classes: int,
    input_shape: tuple[int, int, int],
    width: int = 64,
    stem: str = "auto",
    exit_head: str = "linear",
    dtype: str = "float32",
    conv: str = "auto",
) -> Model:
    """ResNet-18 as 9 layers: the stem and 8 basic blocks, named as in torchvision.

    Args:
      num_classes: K.
      input_shape: ``(H, W, C)``.
      width: channels of the first group; the later ones have 2, 4 and 8 times as many.
      stem: ``"3x3"``, ``"7x7"``, or ``"auto"``: 3x3 up to 64 pixels, 7x7 above.
      exit_head: ``"linear"``, or ``"bn_linear"`` with BatchNorm before the pool.
      dtype: of the computation, ``"float32"`` or ``"bfloat16"``; parameters,
        statistics, logits and losses are float32 in both.
      conv: the form of the convolutions, see `hsee_jax.conv`.

    Returns:
      The model; with the defaults, 10 classes and 32x32x3 images, layers and final head
      have 11,173,962 parameters.
    """
    if stem == "auto":
        stem = "3x3" if max(input_shape[:2]) <= 64 else "7x7"
    compute = jnp.dtype(dtype)
    modules: list[Any] = [Stem(width, int(stem[0]), compute, conv)]
    names = ["stem"]
    for group in range(4):
        for block in range(2):
            stride = 2 if group > 0 and block == 0 else 1
            modules.append(BasicBlock(width * 2**group, stride, compute, conv))
            names.append(f"layer{group + 1}.{block}")
    exit_stage = from_linen(Head(num_classes, exit_head == "bn_linear", compute))
    return Model(
        stages=tuple(map(from_linen, modules)),
        exit_heads=(exit_stage,) * len(modules),
        final_head=from_linen(Head(num_classes, False, compute)),
        layer_names=tuple(names),
        input_shape=tuple(input_shape),
    )


def layer_inputs(model: Model) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes ``[1, ...]`` of every layer's input, and of the last output."""
    shapes = [jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)]
    mask = jax.ShapeDtypeStruct((1,), jnp.bool_)
    for stage in model.stages:

        def run(inputs: Array, mask: Array, stage: Stage = stage) -> Array:
            variables = stage.init(jax.random.key(0), inputs)
            return stage.apply(variables, inputs, mask, train=False)[0]

        shapes.append(jax.eval_shape(run, shapes[-1], mask))
    return tuple(shapes)


def init_network(model: Model, key: Key) -> Network:
    """Draws all weights; every client and server part is a slice of the result.

    Args:
      model: L layers.
      key: a typed key; layer l, exit head l and the final head each fold in their own
        number, so that a part does not depend on what else is drawn.
    """
    shapes = layer_inputs(model)
    count = len(model.stages)

    # XLA takes seconds on CPU to compile a partitionable draw of several axes.
    @jax.threefry_partitionable(False)
    def draw(stage: Stage, number: int, shape: jax.ShapeDtypeStruct) -> Variables:
        inputs = jnp.zeros(shape.shape, shape.dtype)
        return stage.init(jax.random.fold_in(key, number), inputs)

    return Network(
        layers=tuple(draw(s, i, shapes[i]) for i, s in enumerate(model.stages)),
        exit_heads=tuple(
            draw(s, count + i, shapes[i + 1]) for i, s in enumerate(model.exit_heads)
        ),
        final_head=draw(model.final_head, 2 * count, shapes[-1]),
    )


def parse_cut(cut: str | int, layer_names: Sequence[str]) -> int:
    """The number of the layer that a cut names.

    Args:
      cut: a number ``1..L``, a layer's name, or the name of a group, such as
        ``"layer2"``, which means after its last block.
      layer_names: the L names.

    Raises:
      UserError: there is no such layer.
    """
    text = str(cut)
    if text.isdecimal() and 1 <= int(text) <= len(layer_names):
        return int(text)
    for number in range(len(layer_names), 0, -1):
        name = layer_names[number - 1]
        if text and text in (name, name.rpartition(".")[0]):
            return number
    groups = [name.rpartition(".")[0] for name in layer_names if "." in name]
    near = difflib.get_close_matches(text, [*layer_names, *dict.fromkeys(groups)], 1)
    hint = f" (did you mean {near[0]}?)" if near and not text.isdecimal() else ""
    raise UserError(
        f"cuts: {text} is not a layer{hint}; allowed are 1..{len(layer_names)} or the "
        f"names {', '.join(layer_names)}"
    )


def deal_cuts(
    cuts: Sequence[str | int], num_clients: int, layer_names: Sequence[str]
) -> tuple[int, ...]:
    """One cut for each client: the given ones in turn, ``3 5 7 3 5 7 ...``.

    Raises:
      UserError: an unknown layer, no cut, or more cuts than clients.
    """
    if not 1 <= len(cuts) <= num_clients:
        raise UserError(
            f"cuts: {len(cuts)} given for {num_clients} clients; allowed are "
            f"1..{num_clients}"
        )
    numbers = [parse_cut(cut, layer_names) for cut in cuts]
    return tuple(numbers[i % len(numbers)] for i in range(num_clients))


class LayerCost(NamedTuple):
    """What one sample costs in a layer, or in a head."""

    name: str
    parameters: int
    flops: int  # of the forward pass, as XLA counts them; padding is not counted
    output_bytes: int  # of the output: what a client with this cut sends


def layer_costs(model: Model) -> tuple[LayerCost, ...]:
    """Costs of the L layers, the L exit heads and the final head, for one sample.

    FLOPs come from the cost analysis of each compiled program, so they are those of
    the backend at hand.
    """
    shapes = layer_inputs(model)
    names = [
        *model.layer_names,
        *(f"exit after {name}" for name in model.layer_names),
        "final head",
    ]
    stages = [*model.stages, *model.exit_heads, model.final_head]
    inputs = [*shapes[:-1], *shapes[1:], shapes[-1]]
    known: dict[tuple[Stage, Any], tuple[int, int, int]] = {}
    costs = []
    for name, stage, shape in zip(names, stages, inputs, strict=True):
        place = (stage, (shape.shape, shape.dtype))
        if place not in known:
            known[place] = _cost(stage, shape)
        costs.append(LayerCost(name, *known[place]))
    return tuple(costs)


def _cost(stage: Stage, shape: jax.ShapeDtypeStruct) -> tuple[int, int, int]:
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
    )
