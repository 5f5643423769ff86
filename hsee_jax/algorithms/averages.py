"""The means of a federation's layers over those who hold them."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.types import Array, PyTree
from hsee_jax.federation.aggregation import layer_mean, message, receive
from hsee_jax.federation.branch import LayerState, parts_of, with_parts
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import Means, RunState
from hsee_jax.parallel.mesh import CLIENTS, SAME, SPREAD, on_devices


class Averages(NamedTuple):
    """Three functions of `Strategy`."""

    aggregate: Callable[[RunState, tuple[Array, ...]], tuple[RunState, Means]]
    receive: Callable[[RunState, Means, tuple[Array, ...]], RunState]
    messages: Callable[[RunState], tuple[PyTree, ...]]


class Place(NamedTuple):
    """Where a layer is held."""

    side: str  # "client" or "server"
    group: int
    layer: int  # its index in the branch; the head is -1


Layers = dict[tuple[str, int], list[LayerState]]  # by side and group, the head last


def make_averages(
    federation: Federation,
    *,
    shared: bool,
    average: str,
    boundary: str,
    batch_norm: str,
    spread: bool,
) -> Averages:
    """Make the averaging of a strategy.

    Args:
      federation: who trains what; its optimizer says what becomes of its state.
      shared: see `compose`.
      average: see `compose`.
      boundary: see `compose`.
      batch_norm: see `receive`.
      spread: whether the stacks are spread over the federation's mesh.
    """
    holders = find_holders(federation, average)
    optimizer = federation.optimizer
    take = partial(receive, optimizer=optimizer, batch_norm=batch_norm)

    def means_of(state: RunState, weights: tuple[Array, ...]) -> Means:
        layers = _layers_of(state)
        return {
            name: layer_mean(
                [layers[side, g][i] for side, g, i in places],
                [weights[g] for _, g, _ in places],
                number=state.round + 1,
                optimizer=optimizer,
                axis_name=CLIENTS if spread else None,
            )
            for name, places in holders.items()
        }

    def receive_all(
        state: RunState, means: Means, since: tuple[Array, ...]
    ) -> RunState:
        layers = _layers_of(state)
        for name, places in holders.items():
            for side, g, i in places:
                layers[side, g][i] = jax.vmap(take, (0, None, 0))(
                    layers[side, g][i], means[name], since[g]
                )
        return _with_layers(state, layers)

    def on_device(
        state: RunState, weights: tuple[Array, ...]
    ) -> tuple[RunState, Means]:
        means = means_of(state, weights)
        since = tuple(jnp.broadcast_to(state.round, w.shape) for w in weights)
        return receive_all(state, means, since), means

    def aggregate(
        state: RunState, weights: tuple[Array, ...]
    ) -> tuple[RunState, Means]:
        if not holders:
            return state, {}
        specs = RunState(SAME, SPREAD, SAME if shared else SPREAD)  # type: ignore[arg-type]
        mesh = federation.mesh if spread else None
        run = on_devices(on_device, mesh, (specs, SPREAD), (specs, SAME))
        return run(state, weights)

    def messages(state: RunState) -> tuple[PyTree, ...]:
        layers = _layers_of(state)
        own = ("client", "server") if boundary == "none" else ("client",)
        return tuple(
            [
                message(layers[side, g][i], optimizer=optimizer, batch_norm=batch_norm)
                for side, g, i in chain(*holders.values())
                if side in own and g == group
            ]
            for group in range(len(federation.groups))
        )

    return Averages(aggregate, receive_all, messages)


def find_holders(federation: Federation, average: str) -> dict[str, list[Place]]:
    """Find where each averaged layer is held, by the layer's name."""
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
            holders[f"exit head {group.cut}"] = [Place("client", g, -1)]
    return holders


def _layers_of(state: RunState) -> Layers:
    sides = {"client": state.clients, "server": state.servers}
    return {
        (side, g): list(parts_of(branch))
        for side, branches in sides.items()
        for g, branch in enumerate(branches)
    }


def _with_layers(state: RunState, layers: Layers) -> RunState:
    """Return the state with other layers, the inverse of `_layers_of`."""
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
