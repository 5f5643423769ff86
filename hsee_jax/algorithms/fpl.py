"""FPL's junction (Malandrino and Chiasserini, arXiv:2201.07402), after the paper.

Flexible parallel learning splits one network among nodes that see data of their own,
and joins their branches in a layer of the server. Here the clients are sensors that see
one event each in its own way: they take the same samples in every step, and each trains
its layers and its exit on its view. The server merges their features at the cut, and
trains on one row for each event.

The junction follows the paper as recalled, and these are our choices [ours]. It takes
the mean of the features, or it concatenates their channels and mixes them in a layer
with weights. A view is absent where its client misses the round, or sends features that
are not finite: then the mean is over the other views, and the concatenation has zeros.
All clients have one cut, and layers of their own, which are never averaged. The
boundary is detached, or joint; then each client gets the gradient of the event's loss
times the number of views that are there, so that its steps do not shrink with the
number of sensors, and identical views under a mean train as one client.
"""

from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp

from hsee_jax.algorithms.compose import compose
from hsee_jax.algorithms.epsl import joint_together
from hsee_jax.algorithms.options import Boundary, ExitGradient, Init, ServerLrScale
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.registry import ALGORITHMS, require_one_cut
from hsee_jax.algorithms.rows import (
    ServedRows,
    ServeRowsFn,
    served_rows,
    take_messages,
)
from hsee_jax.algorithms.steps import Rates, clients_then_server
from hsee_jax.core.errors import unknown
from hsee_jax.core.options import one_of
from hsee_jax.core.types import Array, Batch, Key, Metrics, PyTree
from hsee_jax.federation.branch import (
    Branch,
    LayerState,
    forward,
    params_of,
    with_params,
)
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.junction import Junction, concat_junction, mean_junction
from hsee_jax.federation.state import RunState
from hsee_jax.federation.step import take_step
from hsee_jax.federation.strategy import InitStateFn, StepFn, Strategy
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.nn.model import layer_inputs
from hsee_jax.optim.optimizers import alone
from hsee_jax.parallel.mesh import SAME, constrain

JUNCTIONS = ("mean", "concat")


@ALGORITHMS.register(summary="FPL: the server merges all clients' views of one event")
def fpl(
    federation: Federation,
    *,
    junction: Annotated[
        str,
        "how the server merges the views of an event: their mean, or their channels "
        "side by side and a layer that mixes them [ours]",
        one_of(JUNCTIONS),
    ] = "mean",
    boundary: Boundary = "detached",
    exit_gradient: ExitGradient = 0.0,
    server_lr_scale: ServerLrScale = 1.0,
    init: Init = "shared",
) -> Strategy:
    """Share one server, which takes the views of an event as one row.

    All clients have to take the same samples in a step, as they do with the partition
    ``views``.

    Raises:
      UserError: the clients have several cuts, there is no junction of this name, or
        options contradict each other.
    """
    require_one_cut(federation, "fpl")
    base = compose(
        federation,
        Properties(
            shared=True,
            average="none",
            turn="together",
            boundary=boundary,
            exit_gradient=exit_gradient,
            server_lr_scale=server_lr_scale,
            init=init,
        ),
    )
    # Nothing is averaged, so each optimizer works by itself.
    federation = federation._replace(optimizer=alone(federation.optimizer))
    merged = _junction(federation, junction)
    serve = partial(_serve, federation, merged)
    step = _step(federation, serve, Rates(server_lr_scale), boundary, exit_gradient)
    return base._replace(
        init=_init_fn(federation, base.init, merged),
        step=step,
        part=lambda server, group: merged.behind(server),
        junction=merged,
    )


def _junction(federation: Federation, name: str) -> Junction:
    if name == "mean":
        return mean_junction()
    if name != "concat":
        raise unknown("junction", name, JUNCTIONS)
    (group,) = federation.groups
    return concat_junction(len(group.ids), layer_inputs(federation.model)[group.cut])


def _init_fn(
    federation: Federation, init: InitStateFn, junction: Junction
) -> InitStateFn:
    """Make a draw with the mixer, if there is one, before the server's layers."""
    mixer = junction.mixer
    if mixer is None:
        return init
    (group,) = federation.groups
    features = layer_inputs(federation.model)[group.cut]

    def init_state(key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        state, views = init(key, ids), len(group.ids)
        some = jnp.zeros((views, *features.shape), features.dtype)
        merged = junction.merge(some, jnp.ones((views, 1), bool))
        params = mixer.init(key, merged)["params"]
        layer = LayerState(params, {}, federation.optimizer.init(params))
        (server,) = state.servers
        server = server.replace(layers=(layer, *server.layers))
        return state.replace(servers=(server,))

    return init_state


def _step(
    federation: Federation,
    serve: ServeRowsFn,
    rates: Rates,
    boundary: str,
    exit_gradient: float,
) -> StepFn:
    """Make the step of all clients, and of the server on all that they send."""
    if boundary == "joint":
        return joint_together(federation, rates, exit_gradient, serve=serve)

    def serve_all(
        server: Branch,
        messages: tuple[Batch, ...],
        order: Array,
        rates_of_both: tuple[Array, Array],
    ) -> tuple[Branch, tuple[Metrics, ...]]:
        del order
        served = serve(server, messages, rates_of_both[1])
        return served.server, served.metrics

    return clients_then_server(federation, rates, serve_all)


def _serve(
    federation: Federation,
    junction: Junction,
    server: Branch,
    messages: tuple[Batch, ...],
    learning_rate: Array,
) -> ServedRows:
    """Step the server on the views of a batch of events.

    Args:
      federation: who trains what.
      junction: merges the views.
      server: the shared server.
      messages: of the one group, inputs encoded, leaves ``[S, B, ...]``.
      learning_rate: of the server.
    """
    (message,), spec = messages, federation.specs(0)[1]
    views, fine = take_messages(spec, message)
    server, wide = constrain(server, federation.mesh, SAME), junction.widen(spec)

    def mean_loss(params: tuple[PyTree, ...], features: Array) -> tuple[Array, tuple]:
        moved = with_params(server, params)
        rows, there = junction.merge(features, views.mask), jnp.any(views.mask, axis=0)
        _, logits, stats = forward(wide, moved, rows, there, train=True)
        score = jax.vmap(masked_cross_entropy, (None, 0, 0))
        _, metrics = score(logits, views.labels, views.mask)
        count = jnp.maximum(jnp.sum(metrics.count), 1).astype(jnp.float32)
        return jnp.sum(metrics.loss_sum) / count, (stats, metrics)

    at = params_of(server), views.inputs
    slopes, (stats, metrics) = jax.grad(mean_loss, (0, 1), has_aux=True)(*at)
    grads, gradient = slopes
    total = jax.tree.map(jnp.sum, metrics)
    server, total = take_step(wide, server, grads, stats, learning_rate, total)
    server = constrain(server, federation.mesh, SAME)
    return served_rows(server, messages, [fine], [metrics], [gradient], total)
