"""Read pickles of plain values and arrays without running code from the file.

NumPy's own types are never handed to a pickle: its instructions can give them a state
that crashes the process. Stand-ins take their place, and only whole bytes and integers
become arrays.
"""

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

_CODES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")

# An array needs about five, and a byte string one if Python 3 wrote it in protocol 2.
# Python hashes a tuple in a tuple by a recursion without a limit, so that deep tuples
# crash the process.
_MAX_TUPLES = 20_000


def load(content: bytes) -> Any:
    """Read a pickle of Python's own values and of arrays.

    Args:
      content: the pickle. Strings of Python 2 are read as bytes.

    Returns:
      The value. An array in it is an object that ``np.asarray`` takes.

    Raises:
      pickle.UnpicklingError: the pickle asks for anything else. A damaged file also
        raises other errors, such as EOFError and ValueError.
    """
    steps = pickletools.genops(content)
    if sum(step.name.startswith("TUPLE") for step, _, _ in steps) > _MAX_TUPLES:
        raise pickle.UnpicklingError(f"it holds more than {_MAX_TUPLES:,} tuples")
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


def text_of(string: str | bytes) -> str:
    """Return a string of Python 2 or 3 as text."""
    return string.decode() if isinstance(string, bytes) else string


class _Unpickler(pickle.Unpickler):
    """Finds only the stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for an admitted class or function; refuse any other."""
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


class _Function:
    """A function that a pickle may call but not change."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Type:
    """Stands for ``numpy.dtype``: a number of whole bytes."""

    def __init__(self, code: str | bytes) -> None:
        self._code, self._order = text_of(code), "|"
        if self._code not in _CODES:
            raise pickle.UnpicklingError(f"it asks for the type {self._code}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order; refuse sub-arrays, names and fields."""
        _, order, *parts = state
        self._order = text_of(order)
        if self._order not in ("|", "<", ">", "=") or parts[:3] != [None] * 3:
            raise pickle.UnpicklingError("it asks for a type with parts")

    def dtype(self) -> np.dtype[Any]:
        """Return the type for NumPy."""
        return np.dtype(self._order + self._code)


class _Array:
    """Stands for ``numpy.ndarray``."""

    def __init__(self) -> None:
        self._values: Any = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take what ``numpy.ndarray`` writes: shape, type, order and content."""
        _, shape, kind, by_columns, content = state
        self._values = _filled(content, kind, shape, "F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._values if dtype is None else self._values.astype(dtype)


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    """Stand in for ``numpy.core.numeric._frombuffer``, of protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def _filled(content: Any, kind: Any, shape: Any, order: Any) -> Any:
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, _Type):
        raise pickle.UnpicklingError("it holds an array without bytes or type")
    return np.frombuffer(bytes(content), kind.dtype()).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for ``codecs.encode``, which writes the bytes of Python 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # an argument of `_reconstruct`, never called
    ("numpy", "dtype"): _Function(lambda code, align, copy: _Type(code)),
    ("numpy.core.multiarray", "_reconstruct"): _Function(lambda *ignored: _Array()),
    ("numpy.core.numeric", "_frombuffer"): _Function(_from_buffer),
    ("_codecs", "encode"): _Function(_encode),
}
