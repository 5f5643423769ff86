"""Messages between devices and server, and the checks of all that arrives.

A message is a line of JSON with a few whole numbers, then tensors as safetensors.
Nothing that arrives is unpickled, and nothing is believed: the size is checked before
anything is read, then names, dtypes and shapes against the one `Form` that the message
may have, then the values.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import PyTree

Tensors = dict[str, npt.NDArray[Any]]
Form = dict[str, jax.ShapeDtypeStruct]  # of the tensors of a message, by name
Fields = dict[str, int]
E = TypeVar("E", bound=IntEnum)

_LINE = 4096  # bytes of the line of JSON
_NAME = 512  # bytes of safetensors' own header for each tensor, at most
_LARGEST_FIELD = 2**31 - 1


class Refusal(Exception):
    """What arrived is not what the protocol allows; the text is one line."""


class Mistaken(Refusal):
    """What arrived is not for this run, as after a mistake of whoever started it."""


class Closed(Exception):
    """The round of a message is over, or goes on without the client."""


class Parts(NamedTuple):
    """A message whose tensors are still bytes."""

    fields: Fields
    tensors: bytes


def pack(fields: Mapping[str, int], tensors: Mapping[str, Any] = {}) -> bytes:
    """Return a message.

    Args:
      fields: whole numbers.
      tensors: arrays by name; of a dtype that safetensors does not know in NumPy, such
        as bfloat16, the bits are sent.
    """
    from safetensors.numpy import save

    arrays = {name: _bits(np.asarray(leaf)) for name, leaf in tensors.items()}
    line = json.dumps({name: int(value) for name, value in fields.items()})
    return line.encode() + b"\n" + (save(arrays) if arrays else b"")


def split(message: bytes, names: Sequence[str], *, limit: int = 0) -> Parts:
    """Read the fields of a message.

    Args:
      message: what arrived.
      names: of its fields, all of which it must have.
      limit: bytes that its tensors may have, see `size_limit`.

    Raises:
      Refusal: it is too large, or has other fields.
    """
    if len(message) > _LINE + limit:
        raise Refusal(f"size: {len(message)} bytes; allowed are {_LINE + limit}")
    line, newline, _ = message[:_LINE].partition(b"\n")
    try:
        found = json.loads(line) if newline else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise Refusal(f"fields: not a line with the numbers {', '.join(names)}")
    for name, value in found.items():
        if type(value) is not int or not -1 <= value <= _LARGEST_FIELD:
            raise Refusal(f"{name}: not a whole number from -1 to {_LARGEST_FIELD}")
    return Parts(found, message[len(line) + 1 :])


def member(kind: type[E], fields: Fields, name: str) -> E:
    """Return a field of a message as a member of an enumeration.

    Raises:
      Refusal: it is none.
    """
    try:
        return kind(fields[name])
    except ValueError as error:
        allowed = ", ".join(str(one.value) for one in kind)
        raise Refusal(f"{name}: {fields[name]}; allowed are {allowed}") from error


def digest(values: Mapping[str, Any]) -> int:
    """Return a checksum of values of JSON (31 bits of CRC-32) for a message."""
    return zlib.crc32(json.dumps(values).encode()) >> 1


def size_limit(form: Form) -> int:
    """Return the bytes that the tensors of a form may take in a message."""
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in form.values()]
    return sum(sizes) + _NAME * (len(sizes) + 1)


def unpack(tensors: bytes, form: Form) -> Tensors:
    """Read the tensors of a message.

    Args:
      tensors: see `Parts`.
      form: names, dtypes and shapes, all of which they must have.

    Raises:
      Refusal: they do not, or are no tensors.
    """
    if len(tensors) > size_limit(form):
        raise Refusal(f"size: {len(tensors)} bytes; allowed are {size_limit(form)}")
    found = _load(tensors) if tensors or form else {}
    if found.keys() != form.keys():
        odd = sorted(found.keys() ^ form.keys())[0]
        raise Refusal(f"tensors: {_shown(odd)} is missing or one too many")
    return {name: _checked(name, found[name], leaf) for name, leaf in form.items()}


def check_finite(tensors: Mapping[str, npt.NDArray], *, bound: float = np.inf) -> None:
    """Refuse floats that are not finite, or larger in size than a bound.

    Raises:
      Refusal: an array holds such a value.
    """
    for name, array in tensors.items():
        if array.size and jax.numpy.issubdtype(array.dtype, np.floating):
            values = np.asarray(array, np.float32) if array.itemsize < 4 else array
            largest = float(np.max(np.abs(values)))
            if not np.isfinite(largest) or largest > bound:
                raise Refusal(f"{name}: a value of {largest:g}; allowed is {bound:g}")


def check_labels(labels: npt.NDArray, *, num_classes: int) -> None:
    """Refuse labels outside of 0..K-1.

    Raises:
      Refusal: a label is outside.
    """
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise Refusal(
            f"labels: from {labels.min()} to {labels.max()}; allowed are "
            f"0..{num_classes - 1}"
        )


def named(tree: PyTree, name: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by name; all names begin with ``name``."""
    return {
        name + jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def form_of(tree: PyTree, name: str = "") -> Form:
    """Return the form of the leaves of a tree, see `named`."""
    return {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for key, leaf in named(tree, name).items()
    }


def tree_from(tensors: Mapping[str, Any], like: PyTree, name: str = "") -> PyTree:
    """Return a tree of tensors; the inverse of `named`.

    Args:
      tensors: by name; others than those of the tree are passed over.
      like: a tree of the same structure.
      name: see `named`.
    """
    leaves = [tensors[key] for key in named(like, name)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def with_rows(form: Form, rows: int) -> Form:
    """Return a form with another number of rows, the length of the leading axis."""
    return {
        name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in form.items()
    }


def _load(tensors: bytes) -> Tensors:
    from safetensors.numpy import load

    try:
        return load(tensors)
    except Exception as error:  # of Rust, or of a dtype that NumPy does not have
        raise Refusal(f"tensors: not safetensors ({type(error).__name__})") from error


def _checked(
    name: str, array: npt.NDArray, leaf: jax.ShapeDtypeStruct
) -> npt.NDArray[Any]:
    """Return an array in the dtype of its form, and refuse any other."""
    stored = _bits(np.empty(0, leaf.dtype)).dtype
    if array.dtype != stored or array.shape != leaf.shape:
        raise Refusal(
            f"{name}: {array.dtype}{list(array.shape)}; allowed is "
            f"{stored}{list(leaf.shape)}"
        )
    return array.view(leaf.dtype)


def _bits(array: npt.NDArray) -> npt.NDArray:
    """Return an array as safetensors can store it: rows in order, a plain dtype."""
    array = np.asarray(array, order="C")
    plain = array.dtype.kind in "biufc"
    return array if plain else array.view(np.dtype(f"u{array.itemsize}"))


def _shown(name: str) -> str:
    """Make a name that arrived fit for a log."""
    return re.sub(r"[^ -~]", "?", name)[:80]
