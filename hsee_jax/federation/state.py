"""The state that training changes, as stacks of branches, and functions on stacks."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import struct

from hsee_jax.core.types import Array, Key, PyTree
from hsee_jax.federation.aggregation import LayerMean
from hsee_jax.federation.branch import Branch, init_client, init_server
from hsee_jax.federation.federation import Federation, Group
from hsee_jax.nn.model import Network, init_network, layer_inputs

Means = dict[str, LayerMean]  # by the name of the layer


class RunState(struct.PyTreeNode):
    """The state that training changes.

    The leaves of a stack are ``[S, ...]``, with a slot for each client of the group, or
    for each client of the group that takes part in a round.
    """

    round: Array  # int32 []: finished rounds
    clients: tuple[Branch, ...]  # one stack a group
    servers: tuple[Branch, ...]  # one stack a group; a shared server is not stacked


def init_clients(
    federation: Federation,
    key: Key,
    network: Network | None,
    ids: tuple[Array, ...] | None,
) -> tuple[Branch, ...]:
    """Draw a client for every slot, see `_init_stacks`."""
    features, codec = layer_inputs(federation.model), federation.codec

    def branch(network: Network, cut: int, client: Array) -> Branch:
        if codec.init_client is None:
            link = codec.init(features[cut])
        else:
            link = codec.init_client(features[cut], client)
        return init_client(network, cut, federation.optimizer, link, federation.exits)

    return _init_stacks(branch, federation, key, network, ids)


def init_servers(
    federation: Federation,
    key: Key,
    network: Network | None,
    ids: tuple[Array, ...] | None,
) -> tuple[Branch, ...]:
    """Draw a server for every slot, see `_init_stacks`."""

    def branch(network: Network, cut: int, client: Array) -> Branch:
        return init_server(network, cut, federation.optimizer)

    return _init_stacks(branch, federation, key, network, ids)


def _init_stacks(
    init_branch: Callable[[Network, int, Array], Branch],
    federation: Federation,
    key: Key,
    network: Network | None,
    ids: tuple[Array, ...] | None,
) -> tuple[Branch, ...]:
    """Draw a branch for every slot.

    Args:
      init_branch: slices a branch out of a network at a cut, for a client's id.
      federation: the clients.
      key: a typed key.
      network: all branches are slices of it; None to draw one for each client.
      ids: the client in each slot, ``int32 [S]`` for each group; None for all clients.
    """
    if ids is None:
        ids = tuple(jnp.asarray(group.ids, jnp.int32) for group in federation.groups)

    def stack(group: Group, ids: Array) -> Branch:
        def branch(i: Array) -> Branch:
            own_key = jax.random.fold_in(key, i)
            whole = network or init_network(federation.model, own_key)
            return init_branch(whole, group.cut, i)

        return jax.vmap(branch, axis_size=len(ids))(ids)

    return tuple(map(stack, federation.groups, ids))


def stack_sizes(state: RunState) -> list[int]:
    """Return the number of slots of each stack of clients."""
    return [len(jax.tree.leaves(stack)[0]) for stack in state.clients]


def positions(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return stack and member of each position in the concatenation of stacks."""
    pairs = [(g, m) for g, size in enumerate(sizes) for m in range(size)]
    return [g for g, _ in pairs], [m for _, m in pairs]


def split_stacks(
    tree: PyTree, sizes: Sequence[int], *, axis: int = 0
) -> tuple[PyTree, ...]:
    """Split leaves along an axis that joins all stacks into a tree for each stack."""
    ends = list(accumulate(sizes))
    before = (slice(None),) * axis
    return tuple(
        jax.tree.map(lambda a, i=i, j=j: a[(*before, slice(i, j))], tree)
        for i, j in zip([0, *ends], ends, strict=False)
    )


def take_member(tree: PyTree, member: Array) -> PyTree:
    """Return one member of a stack."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, member, keepdims=False), tree
    )


def put_member(tree: PyTree, member: Array, value: PyTree) -> PyTree:
    """Return the stack with one member replaced."""
    return jax.tree.map(
        lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, member, 0), tree, value
    )
