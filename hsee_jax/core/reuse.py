"""One object for equal arguments, so that JAX compiles what it is made of once.

JAX knows a function by its identity. A second run with the same network, clients and
algorithm in a process would trace and compile anew what the first has compiled, if it
made the same functions again.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_forget: list[Callable[[], None]] = []  # of each function that reuses


def reused(make: Callable[P, T], latest: int = 8) -> Callable[P, T]:
    """Make a function that returns an object again for equal arguments.

    Arguments without a hash, such as arrays, give a new object at every call.

    Args:
      make: makes an object that never changes, from its arguments alone.
      latest: the number of objects to keep. With them stay the programs that JAX has
        compiled for them.
    """
    cached: Any = functools.lru_cache(latest, typed=True)(make)
    _forget.append(cached.cache_clear)

    @functools.wraps(make)
    def call(*args: P.args, **named: P.kwargs) -> T:
        try:
            hash((args, tuple(named.values())))
        except TypeError:
            return make(*args, **named)
        return cached(*args, **named)

    return call


def forget() -> None:
    """Let every function make its objects anew, as after a change of their code."""
    for clear in _forget:
        clear()
