"""The means of a federation's layers over their holders."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import jax

from hsee_jax.core.types import Array, PyTree
from hsee_jax.federation.aggregation import layer_mean, message, receive
from hsee_jax.federation.branch import (
    LayerState,
    early_exits,
    parts_of,
    with_parts,
)
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.reduction import ReduceFn
from hsee_jax.federation.state import Means, RunState
from hsee_jax.parallel.mesh import CLIENTS, SAME, SPREAD, on_devices


class Place(NamedTuple):
    """The place of a layer in a federation."""

    side: str  # "client" or "server"
    group: int
    layer: int  # its index in `parts_of`; the head is -1


Layers = dict[tuple[str, int], list[LayerState]]  # by side and group, the head last


@dataclass(frozen=True)
class Averages:
    """The averaging of a strategy: three of the functions of `Strategy`."""

    federation: Federation  # its optimizer has the rule for its state
    holders: Mapping[str, list[Place]]  # of each averaged layer, by its name
    reduce: ReduceFn  # see `hsee_jax.federation.layer_mean`
    batch_norm: str  # see `hsee_jax.federation.receive`
    shared: bool  # whether all clients share one server
    whole_networks: bool  # whether a client holds the server's layers too
    spread: bool  # whether the stacks are spread over the federation's mesh

    def aggregate(self, state: RunState, weights: tuple[Array, ...]) -> Means:
        """Compute the mean of each averaged layer by weights ``float32 [S]`` a group.

        Returns:
          The means by the name of the layer.
        """
        if not self.holders:
            return {}
        servers = SAME if self.shared else SPREAD
        specs = RunState(SAME, SPREAD, servers)  # type: ignore[arg-type]
        mesh = self.federation.mesh if self.spread else None
        run = on_devices(self._on_device, mesh, (specs, SPREAD), SAME)
        return run(state, weights)

    def receive(
        self, state: RunState, means: Means, since: tuple[Array, ...]
    ) -> RunState:
        """Give means to slots.

        Args:
          state: the clients in slots, with or without servers.
          means: by the name of the layer; for clients without servers, `client_means`
            are enough.
          since: the round of each slot's state, ``int32 [S]`` a group.
        """
        layers = _layers_of(state)
        take = partial(
            receive, optimizer=self.federation.optimizer, batch_norm=self.batch_norm
        )
        for name, places in self.holders.items():
            for side, g, i in (place for place in places if place[:2] in layers):
                layers[side, g][i] = jax.vmap(take, (0, None, 0))(
                    layers[side, g][i], means[name], since[g]
                )
        return _with_layers(state, layers)

    def client_means(self, group: int) -> tuple[str, ...]:
        """Return the names of the means of layers that a group's clients hold."""
        return tuple(
            name
            for name, places in self.holders.items()
            if any(place[:2] == ("client", group) for place in places)
        )

    def messages(self, state: RunState) -> tuple[PyTree, ...]:
        """Return the arrays that clients send for a mean, ``[S, ...]`` for a group."""
        layers = _layers_of(state)
        own = ("client", "server") if self.whole_networks else ("client",)
        arrays = partial(
            message, optimizer=self.federation.optimizer, batch_norm=self.batch_norm
        )
        return tuple(
            [
                arrays(layers[side, g][i])
                for side, g, i in chain(*self.holders.values())
                if side in own and g == group
            ]
            for group in range(len(self.federation.groups))
        )

    def _on_device(self, state: RunState, weights: tuple[Array, ...]) -> Means:
        layers = _layers_of(state)
        return {
            name: layer_mean(
                [layers[side, g][i] for side, g, i in places],
                [weights[g] for _, g, _ in places],
                number=state.round + 1,
                optimizer=self.federation.optimizer,
                axis_name=CLIENTS if self.spread else None,
                reduce=self.reduce,
            )
            for name, places in self.holders.items()
        }


def find_holders(federation: Federation, average: str) -> dict[str, list[Place]]:
    """Find the places of each averaged layer, by the layer's name."""
    holders: dict[str, list[Place]] = {}
    for g, group in enumerate(federation.groups):
        if average in ("servers", "all_holders"):
            for i in range(group.cut, len(federation.model.stages)):
                place = Place("server", g, i - group.cut)
                holders.setdefault(f"layer {i}", []).append(place)
            holders.setdefault("final head", []).append(Place("server", g, -1))
        if average in ("clients", "all_holders"):
            for i in range(group.cut):
                holders.setdefault(f"layer {i}", []).append(Place("client", g, i))
            for i in range(early_exits(group.cut, federation.exits)):
                place = Place("client", g, group.cut + i)
                holders.setdefault(f"exit head {i + 1}", []).append(place)
            holders.setdefault(f"exit head {group.cut}", []).append(
                Place("client", g, -1)
            )
    return holders


def _layers_of(state: RunState) -> Layers:
    sides = {"client": state.clients, "server": state.servers}
    return {
        (side, g): list(parts_of(branch))
        for side, branches in sides.items()
        for g, branch in enumerate(branches)
    }


def _with_layers(state: RunState, layers: Layers) -> RunState:
    """Return the state with other layers; invert `_layers_of`."""
    return state.replace(
        clients=tuple(
            with_parts(branch, tuple(layers["client", g]))
            for g, branch in enumerate(state.clients)
        ),
        servers=tuple(
            with_parts(branch, tuple(layers["server", g]))
            for g, branch in enumerate(state.servers)
        ),
    )
