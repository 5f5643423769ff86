"""A network as a tuple of layers with an exit head after each of them.

Any network that is a chain of `Stage`s can be trained, with the heads that it brings. A
*cut* is the number of layers that a client keeps, ``1..len(model.stages)``.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array, Key, PyTree, Stage, Variables

# Takes the name of a layer, or "head", and returns for each of its modules the name in
# another library: {"conv1/conv": "layer1.0.conv1", ...}.
WeightNames = Callable[[str], Mapping[str, str]]


class Model(NamedTuple):
    """What a network computes, without its weights."""

    stages: tuple[Stage, ...]  # L layers
    exit_heads: tuple[Stage, ...]  # L heads; exit_heads[l - 1] follows layer l
    final_head: Stage
    layer_names: tuple[str, ...]  # L names, such as "layer2.0"
    input_shape: tuple[int, ...]  # of one sample, (H, W, C) for images
    weight_names: tuple[WeightNames, ...] = ()  # by library, for `load_pretrained`
    gated_stages: tuple[Stage, ...] = ()  # for `with_gates`; empty without gates


class Network(NamedTuple):
    """One set of weights for every layer and every head of a `Model`."""

    layers: tuple[Variables, ...]  # L
    exit_heads: tuple[Variables, ...]  # L
    final_head: Variables


def from_linen(module: Any) -> Stage:
    """Make a `Stage` from a Flax module, called as ``module(x, mask, train=...)``."""

    # Cuts share the traces of their layers.
    @functools.partial(jax.jit, inline=True)
    def init(key: Key, inputs: Array) -> Variables:
        mask = jnp.ones(inputs.shape[0], bool)
        variables = module.init(key, inputs, mask, train=False)
        return {
            "params": variables.get("params", {}),
            "batch_stats": variables.get("batch_stats", {}),
        }

    @functools.partial(jax.jit, static_argnames="train", inline=True)
    def apply(
        variables: Variables, inputs: Array, mask: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        if not train:
            return module.apply(variables, inputs, mask, train=False), variables[
                "batch_stats"
            ]
        try:
            outputs, updated = module.apply(
                variables, inputs, mask, train=True, mutable=["batch_stats"]
            )
        except InvalidRngError as error:
            raise UserError(
                f"network: {type(module).__name__} draws at random in training, as "
                "dropout does; allowed are layers that draw nothing"
            ) from error
        return outputs, updated.get("batch_stats", {})

    return Stage(init, apply)


@functools.lru_cache(maxsize=256)
def cached_stage(module: Any) -> Stage:
    """Make a `Stage` as `from_linen` does, and the same one for equal modules.

    JAX then traces a layer once in a process, whatever networks have it. A module of
    the user's own is not for this function: its code may change in a session.
    """
    return from_linen(module)


def layer_inputs(model: Model) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shape and dtype of each layer's input, and last of the output.

    There are L + 1 entries ``[1, ...]``. Entry l is the input of layer l + 1, so
    ``layer_inputs(model)[cut]`` describes the features that a client with this cut
    sends.
    """
    return _layer_inputs(tuple(model.stages), tuple(model.input_shape))


@functools.lru_cache(maxsize=32)
def _layer_inputs(
    stages: tuple[Stage, ...], input_shape: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, ...]:
    shapes = [jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)]
    for stage in stages:
        shapes.append(_output(stage, shapes[-1]))
    return tuple(shapes)


def check_model(model: Model, num_classes: int) -> None:
    """Refuse a network whose parts do not fit together.

    Args:
      model: L layers.
      num_classes: K.

    Raises:
      UserError: a layer has no exit head or no name of its own, a name is a number,
        which would be a cut, a parameter is not float32, or a head does not give
        logits in ``float32 [1, K]``.
    """
    names, layers = model.layer_names, len(model.stages)
    if (len(model.exit_heads), len(names)) != (layers, layers):
        raise UserError(
            f"network: {layers} layers with {len(model.exit_heads)} exit heads and "
            f"{len(names)} names are not allowed; allowed are as many of each"
        )
    if len(set(names)) < layers or any(name.isdecimal() for name in names):
        raise UserError(
            f"network: the layer names {', '.join(names)} are not allowed; allowed are "
            "different names that are not numbers"
        )
    inputs = layer_inputs(model)
    heads = (*model.exit_heads, model.final_head)
    for stage, own in zip(model.stages, inputs, strict=False):
        _check_parameters(stage, own)
    for head, own in zip(heads, (*inputs[1:], inputs[-1]), strict=True):
        _check_parameters(head, own)
        logits = _output(head, own)
        if (logits.shape, logits.dtype) != ((1, num_classes), jnp.float32):
            raise UserError(
                f"network: a head gives {logits.dtype} {list(logits.shape)} for a "
                f"sample; allowed is float32 {[1, num_classes]}"
            )


def _check_parameters(stage: Stage, inputs: jax.ShapeDtypeStruct) -> None:
    variables = jax.eval_shape(lambda key: _draw(stage, key, inputs), jax.random.key(0))
    for leaf in jax.tree.leaves(variables["params"]):
        if leaf.dtype != jnp.float32:
            raise UserError(
                f"network: parameters in {leaf.dtype} are not allowed; allowed is "
                "float32, in which layers may compute in another type"
            )


def logits_of(model: Model) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the logits of one sample, ``[1, K]``."""
    return _output(model.final_head, layer_inputs(model)[-1])


def _output(stage: Stage, inputs: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    def run(inputs: Array, mask: Array) -> Array:
        variables = _draw(stage, jax.random.key(0), inputs)
        return stage.apply(variables, inputs, mask, train=False)[0]

    return jax.eval_shape(run, inputs, jax.ShapeDtypeStruct((1,), jnp.bool_))


def init_network(model: Model, key: Key) -> Network:
    """Draw all weights; every client and server part is a slice of the result.

    Args:
      model: L layers.
      key: a typed key; layer l, exit head l and the final head each fold in their own
        number, so that a part does not depend on what else is drawn.
    """
    shapes, count = layer_inputs(model), len(model.stages)
    # One call derives all keys, so XLA compiles it once and not once for each part.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(2 * count + 1))
    return Network(
        layers=tuple(_draw(s, keys[i], shapes[i]) for i, s in enumerate(model.stages)),
        exit_heads=tuple(
            _draw(s, keys[count + i], shapes[i + 1])
            for i, s in enumerate(model.exit_heads)
        ),
        final_head=_draw(model.final_head, keys[2 * count], shapes[-1]),
    )


# XLA takes seconds on CPU to compile a partitionable draw of several axes.
@jax.threefry_partitionable(False)
def _draw(stage: Stage, key: Key, shape: jax.ShapeDtypeStruct) -> Variables:
    return stage.init(key, jnp.zeros(shape.shape, shape.dtype))
