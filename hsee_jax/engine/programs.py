"""Programs that the loops over clients share, and their compilation."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax

from hsee_jax.federation.state import put_member, take_member

# A compiled call for a whole member is faster than a call for each of its many leaves.
take = jax.jit(take_member)
put = jax.jit(put_member, donate_argnums=0)


def compile_together(programs: Iterable[jax.stages.Lowered]) -> None:
    """Compile lowered calls of jitted functions, which keep what is compiled.

    XLA does not hold the interpreter, so a program compiles while the next is traced.
    """
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(program.compile) for program in programs]:
            done.result()
