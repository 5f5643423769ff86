"""What JAX compiles, counted by its own events, whether or not a cache has it."""

import contextlib

import jax

_counts = []


def _count(event, seconds, **more):
    if event == "/jax/core/compile/backend_compile_duration":
        for count in _counts:
            count.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_count)


@contextlib.contextmanager
def compiled_programs():
    """Yield a list that grows by an entry for each program compiled."""
    count: list[float] = []
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)
