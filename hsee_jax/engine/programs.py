"""Programs that the loops over clients share, and their compilation."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from hsee_jax.core.types import PyTree
from hsee_jax.federation.state import put_member, take_member

# A compiled call for a whole member is faster than a call for each of its many leaves.
take = jax.jit(take_member)
_put = jax.jit(put_member, donate_argnums=0)


def unstack(stacks: Iterable[PyTree], sizes: Sequence[int]) -> list[PyTree]:
    """Return the members of all stacks, in order."""
    return [
        take(stack, np.int32(m))
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


def compile_together(
    programs: Iterable[jax.stages.Lowered],
) -> list[jax.stages.Compiled]:
    """Compile lowered calls of jitted functions.

    XLA does not hold the interpreter, so a program compiles while the next is traced.
    """
    with ThreadPoolExecutor() as pool:
        return [p.result() for p in [pool.submit(p.compile) for p in programs]]
