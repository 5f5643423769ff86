"""The means of a federation's layers over those who hold them."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hsee_jax.core.types import Array, PyTree
from hsee_jax.federation.aggregation import layer_mean, message, receive
from hsee_jax.federation.branch import LayerState, parts_of, with_parts
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import Means, RunState
from hsee_jax.optim.optimizers import OptimizerLike
from hsee_jax.parallel.mesh import CLIENTS, SAME, SPREAD, on_devices


class Averages(NamedTuple):
    """Three functions of `Strategy`, in its order."""

    aggregate: Callable[[RunState, tuple[Array, ...]], tuple[RunState, Means]]
    receive: Callable[[RunState, Means, tuple[Array, ...]], RunState]
    messages: Callable[[RunState], tuple[PyTree, ...]]


class Place(NamedTuple):
    """Where a layer is held."""

    side: str  # "client" or "server"
    group: int
    layer: int  # its index in the branch; the head is -1


Holders = dict[str, list[Place]]  # by the layer's name
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
    options: dict[str, Any] = {"optimizer": optimizer, "batch_norm": batch_norm}
    axis = CLIENTS if spread else None
    means_of = partial(_means, holders, optimizer=optimizer, axis_name=axis)
    receive_all = partial(_receive, holders, partial(receive, **options))

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

    sides = ("client", "server") if boundary == "none" else ("client",)
    messages = partial(_messages, holders, sides, partial(message, **options))
    return Averages(aggregate, receive_all, messages)


def _means(
    holders: Holders,
    state: RunState,
    weights: tuple[Array, ...],
    *,
    optimizer: OptimizerLike,
    axis_name: str | None,
) -> Means:
    """Average each layer over its holders."""
    layers = _layers_of(state)
    return {
        name: layer_mean(
            [layers[side, g][i] for side, g, i in places],
            [weights[g] for _, g, _ in places],
            number=state.round + 1,
            optimizer=optimizer,
            axis_name=axis_name,
        )
        for name, places in holders.items()
    }


def _receive(
    holders: Holders,
    take: Callable[[LayerState, Any, Array], LayerState],
    state: RunState,
    means: Means,
    since: tuple[Array, ...],
) -> RunState:
    """Give each mean to all holders of its layer."""
    layers = _layers_of(state)
    for name, places in holders.items():
        for side, g, i in places:
            layers[side, g][i] = jax.vmap(take, (0, None, 0))(
                layers[side, g][i], means[name], since[g]
            )
    return _with_layers(state, layers)


def _messages(
    holders: Holders,
    sides: Sequence[str],
    message_of: Callable[[LayerState], PyTree],
    state: RunState,
) -> tuple[PyTree, ...]:
    """Return what the holders on some sides send for the means, one tree a group."""
    layers = _layers_of(state)
    return tuple(
        [
            message_of(layers[side, g][i])
            for side, g, i in chain(*holders.values())
            if side in sides and g == group
        ]
        for group in range(len(state.clients))
    )


def find_holders(federation: Federation, average: str) -> Holders:
    """Find where each averaged layer is held, by the layer's name."""
    holders: Holders = {}
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
