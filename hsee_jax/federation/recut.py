"""Layers that move between clients and servers when the cuts change between rounds.

A layer moves with all of its `LayerState`: weights, batch statistics, optimizer state.
Where each client has a server of its own, the client and its server hold one network
together, and the new cut is only another place to split it. Where all clients share a
server, a layer below one client's cut and behind another's exists more than once:

- A client whose cut goes deeper takes a copy of the server's layers in between.
- A client whose cut goes shallower gives the layers in between up to the server, which
  goes on with its own copy. If the server has none, since all clients held the layer,
  it takes the weighted mean over the clients that give the layer up.

An exit, and the state of a link's codec, belong to a client and a cut. They wait on a
*shelf* while the client has another cut, and come back as they were; the first time a
client has a cut, they are as at the start of the run.

The paper has fixed cuts; all of this is our choice.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from flax import struct

from hsee_jax.core.types import PyTree
from hsee_jax.federation.branch import Branch, LayerState
from hsee_jax.federation.federation import Group
from hsee_jax.federation.state import RunState

Rows = npt.NDArray[np.int64]


class Exits(struct.PyTreeNode):
    """What some clients own at one cut; numpy leaves ``[n, ...]``, ascending by id."""

    ids: Any  # int32 [n]
    head: LayerState
    link: PyTree


Shelf = dict[str, Exits]  # of the clients that have left a cut, by the cut's number


def recut(
    state: RunState,
    shelf: Shelf,
    fresh: RunState,
    *,
    before: Sequence[Group],
    after: Sequence[Group],
    weights: npt.NDArray[np.float32],
    shared: bool,
) -> tuple[RunState, Shelf]:
    """Move the layers between clients and servers for new cuts.

    The clients must have one exit each. Cuts may change and change back without a step
    in between. Then the exits are bit for bit as they were, and with a server for each
    client all layers are, too; so are a shared server and the layers that clients keep,
    but a client that gives a layer up to a shared server gets the server's copy back.

    Args:
      state: of all clients with the old cuts, in numpy arrays, each stack by ascending
        id; it may have empty slots at its end.
      shelf: the exits that wait.
      fresh: the first state of a run with the new cuts, in the same form; it has the
        exits that no client has used yet.
      before: the clients by their old cuts.
      after: the same clients by their new cuts.
      weights: of each client by its id in the means of layers that a shared server has
        no copy of, ``[N]``; where all are 0 they count alike.
      shared: whether all clients share a server.

    Returns:
      The state and the shelf with the new cuts; the arguments are unchanged.
    """
    fresh = jax.tree.map(np.array, fresh)
    first = before[0].cut if shared else None
    networks = [_networks(state, g, group, first) for g, group in enumerate(before)]
    for h, new in enumerate(after):
        for network, old in zip(networks, before, strict=True):
            _, to, rows = np.intersect1d(new.ids, old.ids, return_indices=True)
            put = partial(_put, to=to, rows=rows)
            put(fresh.clients[h].layers, network.layers[: new.cut])
            if not shared:
                put(fresh.servers[h].layers, network.layers[new.cut :])
                put(fresh.servers[h].head, network.head)
    shelf = _exchange(shelf, state, fresh, before, after)
    servers = fresh.servers
    if shared:
        servers = (_shared_server(state, before, after, weights),)
    return fresh.replace(round=np.array(state.round), servers=servers), shelf


def _networks(state: RunState, g: int, group: Group, first: int | None) -> Branch:
    """Return all layers of each client of a group, and the final head, stacked.

    Args:
      state: of all clients.
      g: the index of the group.
      group: its clients.
      first: the shallowest cut of a shared server; None for a server of each client.
    """
    size = len(group.ids)
    own = jax.tree.map(lambda leaf: leaf[:size], state.clients[g].layers)
    if first is None:
        server = jax.tree.map(lambda leaf: leaf[:size], state.servers[g])
        return Branch((*own, *server.layers), server.head)
    server = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (size, *np.shape(leaf))), state.servers[0]
    )
    return Branch((*own, *server.layers[group.cut - first :]), server.head)


def _put(into: PyTree, source: PyTree, *, to: Rows, rows: Rows) -> None:
    """Write some rows of one tree into some rows of another."""

    def write(leaf: Any, other: Any) -> None:
        leaf[to] = other[rows]

    jax.tree.map(write, into, source)


def _shared_server(
    state: RunState,
    before: Sequence[Group],
    after: Sequence[Group],
    weights: npt.NDArray[np.float32],
) -> Branch:
    """Return the server's layers from the new shallowest cut on."""
    (server,), first = state.servers, before[0].cut
    given = []
    for layer in range(after[0].cut, first):  # of which the server has no copy
        givers = [i for group in after if group.cut <= layer for i in group.ids]
        parts: list[LayerState] = []
        order: list[int] = []
        for stack, group in zip(state.clients, before, strict=True):
            ids, rows, _ = np.intersect1d(group.ids, givers, return_indices=True)
            parts.append(jax.tree.map(lambda a, r=rows: a[r], stack.layers[layer]))
            order.extend(ids)
        given.append(_mean(parts, weights[order]))
    return Branch((*given, *server.layers[max(after[0].cut - first, 0) :]), server.head)


def _mean(parts: list[LayerState], weights: npt.NDArray[np.float32]) -> LayerState:
    """Return the weighted mean over all rows; equal rows give exactly this row."""
    shares = weights.astype(np.float64) if weights.any() else np.ones(len(weights))
    shares = shares / shares.sum()

    def mean(*leaves: Any) -> Any:
        rows = np.concatenate(leaves)
        wide = rows.astype(np.float64)
        result = wide[0] + np.tensordot(shares, wide - wide[0], axes=1)
        if np.issubdtype(rows.dtype, np.integer):
            result = np.rint(result)
        return result.astype(rows.dtype)

    return jax.tree.map(mean, *parts)


def _exchange(
    shelf: Shelf,
    state: RunState,
    fresh: RunState,
    before: Sequence[Group],
    after: Sequence[Group],
) -> Shelf:
    """Put the exits of the new cuts into a state, and all others on the shelf."""
    owned = dict(shelf)
    for stack, group in zip(state.clients, before, strict=True):
        size, name = len(group.ids), str(group.cut)
        own = jax.tree.map(lambda a, n=size: a[:n], Exits((), stack.head, stack.link))
        own = own.replace(ids=np.array(group.ids, np.int32))
        owned[name] = _join(owned[name], own) if name in owned else own
    for stack, group in zip(fresh.clients, after, strict=True):
        exits = owned.get(str(group.cut))
        if exits is None:
            continue
        _, to, rows = np.intersect1d(group.ids, exits.ids, return_indices=True)
        _put((stack.head, stack.link), (exits.head, exits.link), to=to, rows=rows)
        waits = ~np.isin(exits.ids, group.ids)
        owned[str(group.cut)] = jax.tree.map(lambda a, w=waits: a[w], exits)
    return {cut: owned[cut] for cut in sorted(owned) if len(owned[cut].ids)}


def _join(one: Exits, other: Exits) -> Exits:
    """Join the exits of different clients, ascending by id."""
    order = np.argsort(np.concatenate([one.ids, other.ids]))
    return jax.tree.map(lambda a, b: np.concatenate([a, b])[order], one, other)
