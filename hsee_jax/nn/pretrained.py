"""Start a network from weights in the names of torchvision or timm.

Each function of `Model.weight_names` gives the names of one library, for the modules of
a layer or of ``"head"``. The arrays within a module follow from PyTorch's rules: our
``kernel`` is ``weight`` with other axes, ``scale`` is ``weight``, and so on.
"""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError, one_line
from hsee_jax.core.types import Array, Key, PyTree, Stage, Variables
from hsee_jax.nn.gates import has_gates
from hsee_jax.nn.model import Model, layer_inputs

_log = logging.getLogger(__name__)

Tensors = Mapping[str, npt.NDArray[Any]]  # by the names of a library
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm; unused with a fixed decay


class Place(NamedTuple):
    """Where a library keeps one of our arrays."""

    name: str
    axes: tuple[int, ...] | None  # theirs in our order; None if equal

    def read(self, tensors: Tensors) -> npt.NDArray[np.float32]:
        """Return the array with our axes; of another rank, as it is."""
        tensor = np.asarray(tensors[self.name], np.float32)
        fits = self.axes is not None and len(self.axes) == tensor.ndim
        return tensor.transpose(self.axes) if fits else tensor


def load_pretrained(model: Model, path: str | os.PathLike[str]) -> Model:
    """Return the network with the weights of a file as its initial weights.

    `init_network` on the result returns the weights of the file, so every client and
    server starts from them. It still draws the exit heads at random, and the linear
    layer of the final head if the file has another number of classes.

    Args:
      model: a ResNet, MobileNet or ViT without gates.
      path: a safetensors file with all arrays of the network, in the names and the
        layout of torchvision or timm; of torchvision alone for MobileNetV3.

    Raises:
      UserError: the file cannot be read, lacks a name, has a name that the network
        lacks, or has another shape; or the network has gates, or no names in
        torchvision or timm.
    """
    return with_weights(model, _read(path), str(path))


def with_weights(model: Model, tensors: Tensors, source: str = "the weights") -> Model:
    """Do what `load_pretrained` does, with arrays by name.

    Args:
      model: see `load_pretrained`.
      tensors: arrays in the names and the layout of torchvision or timm.
      source: where they come from, for errors.

    Raises:
      UserError: see `load_pretrained`.
    """
    if has_gates(model):
        raise UserError(
            "pretrained: a network with gates is not allowed; allowed are networks "
            "without"
        )
    tensors = {n: t for n, t in tensors.items() if not n.endswith(_COUNTER)}
    shapes = _shapes(model)
    places = _places(model, shapes, tensors)
    names = {place.name for part in places for place in part.values()}
    _check_names(names, tensors, source)
    given = [
        {path: place.read(tensors) for path, place in part.items()} for part in places
    ]
    last = "params/linear/bias"  # of the heads of this package
    classes, own = (
        part[-1][last].size if last in part[-1] else None for part in (given, shapes)
    )
    if classes != own:
        _log.info(
            "%s has %d classes, the data have %d: the linear layer of the final head "
            "starts from random weights",
            *(source, classes, own),
        )
        given[-1] = {p: a for p, a in given[-1].items() if "/linear/" not in p}
    for part, where, arrays in zip(shapes, places, given, strict=True):
        for path, array in arrays.items():
            _check_shape(array, part[path].shape, where[path], source)
    stages = (*model.stages, model.final_head)
    *layers, head = (_start_at(s, a) for s, a in zip(stages, given, strict=True))
    return model._replace(stages=tuple(layers), final_head=head, gated_stages=())


def _read(path: str | os.PathLike[str]) -> Tensors:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:  # the reader has errors of its own, and raises others
        raise UserError(
            f"pretrained: {path} cannot be read ({one_line(error)}); "
            "allowed is a file of safetensors"
        ) from error


def _leaves(variables: PyTree) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a part by names such as ``params/conv1/conv/kernel``."""
    for path, leaf in jax.tree.leaves_with_path(variables):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _shapes(model: Model) -> list[dict[str, Any]]:
    """Return the leaves of the L layers and the final head, as shapes."""
    parts = zip((*model.stages, model.final_head), layer_inputs(model), strict=True)
    key = jax.random.key(0)
    return [dict(_leaves(jax.eval_shape(s.init, key, inputs))) for s, inputs in parts]


def _places(
    model: Model, shapes: list[dict[str, Any]], tensors: Tensors
) -> list[dict[str, Place]]:
    """Find the place of each leaf, in the library whose names match most arrays."""
    if not model.weight_names:
        raise UserError(
            "pretrained: a file is not allowed for this network, which has no names in "
            "torchvision or timm; allowed are ResNet, MobileNet and ViT"
        )
    parts = list(zip((*model.layer_names, "head"), shapes, strict=True))

    def count(found: list[dict[str, Place]]) -> int:
        return sum(p.name in tensors for part in found for p in part.values())

    libraries = [
        [_places_of(names(part), leaves) for part, leaves in parts]
        for names in model.weight_names
    ]
    return max(libraries, key=count)


def _places_of(modules: Mapping[str, str], leaves: dict[str, Any]) -> dict[str, Place]:
    places = {}
    for path, leaf in leaves.items():
        _, _, inner = path.partition("/")  # without its collection
        module, _, kind = inner.rpartition("/")
        axes = None
        if kind == "kernel":
            axes = (*range(2, len(leaf.shape)), 1, 0)
        if inner not in modules and (module not in modules or kind not in _LEAVES):
            raise UserError(
                f"pretrained: the network has no name for {inner} in other libraries; "
                "allowed is a name for each of its modules"
            )
        name = modules.get(inner) or f"{modules[module]}.{_LEAVES[kind]}"
        places[path] = Place(name, axes)
    return places


def _check_names(names: set[str], tensors: Tensors, source: str) -> None:
    missing, further = sorted(names - set(tensors)), sorted(set(tensors) - names)
    for word, found, others in (
        ("misses", missing, further),
        ("has", further, missing),
    ):
        if found:
            near = difflib.get_close_matches(found[0], others, 1)
            hint = f" (has {near[0]})" if near and word == "misses" else ""
            raise UserError(
                f"pretrained: {source} {word} {found[0]}{hint}, one of {len(found)} "
                f"such names; allowed are the {len(names)} names of this network, from "
                f"{min(names)} to {max(names)}"
            )


def _check_shape(
    array: npt.NDArray[Any], shape: tuple[int, ...], place: Place, source: str
) -> None:
    if array.shape == shape:
        return

    def theirs(sizes: tuple[int, ...]) -> list[int]:
        if place.axes is None or len(place.axes) != len(sizes):
            return list(sizes)
        return [sizes[axis] for axis in np.argsort(place.axes)]

    raise UserError(
        f"pretrained: {place.name} in {source} has the shape {theirs(array.shape)}; "
        f"allowed is {theirs(shape)}, of this network for these data"
    )


def _start_at(stage: Stage, given: Mapping[str, npt.NDArray[Any]]) -> Stage:
    """Return a stage that starts at the given arrays; it draws the others."""

    def init(key: Key, inputs: Array) -> Variables:
        drawn = stage.init(key, inputs)
        leaves = [given.get(path, leaf) for path, leaf in _leaves(drawn)]
        return jax.tree.unflatten(jax.tree.structure(drawn), map(jnp.asarray, leaves))

    return Stage(init, stage.apply)
