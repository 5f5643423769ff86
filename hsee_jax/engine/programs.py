"""Programs that the loops over clients share, and their compilation.

A device and its server run the programs of a simulation, compiled alike: XLA may round
differently what stands in another program, or is compiled with other options.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from hsee_jax.core.reuse import reused
from hsee_jax.core.types import Batch, PyTree
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.round import client_batch
from hsee_jax.federation.state import put_member, take_member
from hsee_jax.federation.strategy import Halves

# A compiled call for a whole member is faster than a call for each of its many leaves.
_take = jax.jit(take_member)
_put = jax.jit(put_member, donate_argnums=0)


def take(stack: PyTree, member: int) -> PyTree:
    """Copy one member out of a stack, ``[M, ...] -> [...]``.

    On a CPU the host copies it, as nothing need be compiled for that.
    """
    if jax.default_backend() != "cpu":
        return _take(stack, np.int32(member))
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[member], stack)
    return jax.device_put(rows, may_alias=False)


def unstack(stacks: Iterable[PyTree], sizes: Sequence[int]) -> list[PyTree]:
    """Return the members of all stacks, in order."""
    return [
        take(stack, m)
        for stack, size in zip(stacks, sizes, strict=True)
        for m in range(size)
    ]


def restack(
    stacks: Iterable[PyTree], sizes: Sequence[int], members: Iterable[PyTree]
) -> list[PyTree]:
    """Write members into the buffers of their stacks, which are donated."""
    rows, filled = iter(members), list(stacks)
    for g, size in enumerate(sizes):
        for m in range(size):
            filled[g] = _put(filled[g], np.int32(m), next(rows))
    return filled


def jit_step(function: Callable, **options: Any) -> jax.stages.Wrapped:
    """Make a function that `jax.jit` compiles with the options of a step.

    On a CPU, LLVM's level 2 compiles a step in five sixths of the time of level 3, and
    the step takes as long.

    Args:
      function: the function.
      **options: of `jax.jit`.
    """
    optimized = not jax.config.read("jax_disable_most_optimizations")
    if optimized and jax.default_backend() == "cpu":
        options["compiler_options"] = {"xla_backend_optimization_level": 2}
    return jax.jit(function, **options)


def batch_program(pipeline: InputPipeline) -> jax.stages.Wrapped:
    """Compile how a client makes its batch: `client_batch` without its pipeline."""
    return jit_step(_batch_with(pipeline))


@reused
def _batch_with(pipeline: InputPipeline) -> Callable[..., Batch]:
    return partial(client_batch, pipeline)


def send_program(halves: Halves) -> jax.stages.Wrapped:
    """Compile `Halves.send`; it donates the client."""
    return jit_step(halves.send, static_argnames="group", donate_argnums=0)


def serve_program(halves: Halves) -> jax.stages.Wrapped:
    """Compile `Halves.serve`; it donates the server."""
    return jit_step(halves.serve, static_argnames="group", donate_argnums=0)


def compile_together(
    programs: Iterable[jax.stages.Lowered],
) -> list[jax.stages.Compiled]:
    """Compile lowered calls of jitted functions.

    XLA does not hold the interpreter, so a program compiles while the next is traced.
    """
    with ThreadPoolExecutor() as pool:
        return [p.result() for p in [pool.submit(p.compile) for p in programs]]
