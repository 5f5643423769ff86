"""A function of one client, over the clients of all devices.

On its device, `jax.vmap` runs it for all clients at once, and XLA stacks their
convolutions. A scan runs it for one client after another, as they would run alone: it
needs memory for the work of a single client, and it may skip those without samples.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hsee_jax.core.types import Array
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import put_member, take_member
from hsee_jax.parallel.mesh import over_clients


def over_members(
    federation: Federation,
    fn: Callable[..., tuple],
    in_axes: Sequence[int | None],
    *,
    states: int,
    skip: bool = False,
) -> Callable[..., tuple]:
    """Map a function of one client over stacks of clients, as the federation says.

    Args:
      federation: its mesh, and whether a device takes its clients one by one.
      fn: the function of one client. Its first arguments are the state of the client,
        and its first results are their new values.
      in_axes: for each argument 0 for a stack with a leading axis of clients, or None
        for a value that all clients share.
      states: the number of arguments that are the state.
      skip: whether the argument behind the state is a `Batch`. One by one, a client
        whose batch is padding then keeps its state, and its other results are 0.
        ``fn`` must give the same, except in rows of padding.
    """
    if not federation.one_by_one:
        return over_clients(fn, federation.mesh, in_axes)
    fn = _unless_padding(fn, states) if skip else fn
    each = partial(one_by_one, states=states)
    return over_clients(fn, federation.mesh, in_axes, each=each)


def one_by_one(
    fn: Callable[..., tuple], in_axes: tuple[int | None, ...], *, states: int
) -> Callable[..., tuple]:
    """Scan over stacks of clients; see `over_members` for the arguments.

    The new states take the place of the old ones, so that there is no second stack.
    """

    def run(*args: Any) -> tuple:
        stacks = [arg for arg, axis in zip(args, in_axes, strict=True) if axis == 0]
        size = len(jax.tree.leaves(stacks)[0])

        def step(state: tuple, own: tuple[Array, list]) -> tuple[tuple, tuple]:
            member, others = own
            members = iter((*take_member(state, member), *others))
            results = fn(
                *(
                    arg if axis is None else next(members)
                    for arg, axis in zip(args, in_axes, strict=True)
                )
            )
            new, rest = results[:states], results[states:]
            return put_member(state, member, new), rest

        xs = jnp.arange(size), stacks[states:]
        state, rest = jax.lax.scan(step, tuple(stacks[:states]), xs)
        return *state, *rest

    return run


def _unless_padding(fn: Callable[..., tuple], states: int) -> Callable[..., tuple]:
    """Skip a function of a client whose batch has no samples."""
    fn = jax.jit(fn)  # so that it is traced once

    def run(*args: Any) -> tuple:
        shapes = jax.eval_shape(fn, *args)[states:]

        def skip() -> tuple:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return *args[:states], *zeros

        return jax.lax.cond(jnp.any(args[states].mask), lambda: fn(*args), skip)

    return run
