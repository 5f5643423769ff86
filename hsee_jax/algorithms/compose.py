"""Make a strategy of the parts that its properties name."""

from functools import partial

import jax
import jax.numpy as jnp

from hsee_jax.algorithms.averages import Averages, find_holders
from hsee_jax.algorithms.epsl import joint_together, serve_together
from hsee_jax.algorithms.halves import make_halves
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.steps import (
    Rates,
    ServeFn,
    ServerParts,
    clients_then_server,
    in_parallel,
    make_turn,
    serve_in_turn,
    server_parts,
    train_fn,
)
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array, Key, Variables
from hsee_jax.federation.branch import Branch, init_server
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState, init_clients, init_servers
from hsee_jax.federation.strategy import (
    HalvedTurn,
    InitStateFn,
    StepFn,
    Strategy,
    TurnFn,
)
from hsee_jax.nn.model import Model, init_network
from hsee_jax.optim.optimizers import (
    Optimizer,
    alone,
    counts_steps,
    with_merge,
)


def compose(federation: Federation, properties: Properties) -> Strategy:
    """Make a strategy; for its errors see `Properties`."""
    properties.check()
    if properties.gradient_share and federation.codec.init_client is not None:
        raise UserError(
            f"gradient_share: {properties.gradient_share} is not allowed where links "
            "differ, as all clients of a cut get the same rows; allowed is 0"
        )
    if not properties.period:
        properties = properties._replace(average="none")
    shared, boundary = properties.shared, properties.boundary
    of_clients, of_servers = _optimizers(federation, properties)
    federation = federation._replace(optimizer=of_clients, server_optimizer=of_servers)
    parts = server_parts(federation, shared=shared)
    turn, step = _turn_and_step(federation, parts, properties)
    batch_norm = properties.batch_norm
    if batch_norm == "auto":
        batch_norm = "keep_local" if properties.average == "servers" else "average"
    else:
        _check_batch_norm(federation, batch_norm)
    if batch_norm == "keep_local":
        _check_counts(federation, properties.optimizer_state)
    averages = Averages(
        federation,
        find_holders(federation, properties.average),
        properties.reduce_fn(len(federation.clients)),
        batch_norm,
        shared=shared,
        whole_networks=boundary == "none",
        spread=federation.mesh is not None and step is not None,
    )
    return Strategy(
        init=_init_fn(federation, shared=shared, init=properties.init),
        turn=_with_halves(turn, federation, parts, properties, averages),
        step=step,
        aggregate=averages.aggregate,
        receive=averages.receive,
        messages=averages.messages,
        part=parts.take,
        shared=shared,
        turn_unit=properties.turn,
        gradient_share=properties.gradient_share,
        copies=properties.copies,
        period=0 if properties.average == "none" else properties.period,
        period_unit=properties.period_unit,
        boundary=boundary,
        distill=properties.distill,
        weights=properties.weights,
        one_network=properties.makes_one_network(len(federation.groups)),
        turn_kinds=tuple(
            (group.cut, federation.groups[0].cut if shared else None)
            for group in federation.groups
        ),
    )


def _turn_and_step(
    federation: Federation, parts: ServerParts, properties: Properties
) -> tuple[TurnFn | None, StepFn | None]:
    """Return the turn of a client, the step of all clients, or both."""
    boundary, rates = properties.boundary, Rates(properties.server_lr_scale)
    train = train_fn(properties)
    if properties.turn == "together":
        if boundary == "detached":
            serve: ServeFn = partial(serve_together, federation)
            return None, clients_then_server(federation, rates, serve, train)
        shares = properties.exit_gradient, properties.gradient_share
        return None, joint_together(federation, rates, *shares)
    turn = make_turn(federation, parts, properties)
    if not properties.shared:
        return turn, in_parallel(federation, turn)
    at_once = boundary == "detached" and not properties.distill
    if properties.turn == "batch" and at_once:
        serve = partial(serve_in_turn, federation, parts)
        return turn, clients_then_server(federation, rates, serve, train)
    return turn, None  # turns wait for each other


def _with_halves(
    turn: TurnFn | None,
    federation: Federation,
    parts: ServerParts,
    properties: Properties,
    averages: Averages,
) -> TurnFn | None:
    """Return a turn, with its halves if it can cross a network."""
    if turn is None or properties.boundary == "none" or properties.copies > 1:
        return turn
    halves = make_halves(federation, parts, properties, averages.client_means)
    return HalvedTurn(turn, halves)


def _optimizers(
    federation: Federation, properties: Properties
) -> tuple[Optimizer, Optimizer]:
    """Return the optimizers of clients and of servers.

    Raises:
      UserError: the servers have one of their own.
    """
    if federation.server_optimizer is not None:
        raise UserError(
            "server_optimizer: not allowed, as the algorithm derives it from the "
            "optimizer, which all layers share; allowed is None"
        )
    own = with_merge(federation.optimizer, properties.optimizer_state)
    clients, servers = (
        own if properties.average in (side, "all_holders") else alone(own)
        for side in ("clients", "servers")
    )
    return clients, servers


def _check_batch_norm(federation: Federation, batch_norm: str) -> None:
    """Refuse a rule for BatchNorm without a BatchNorm.

    Raises:
      UserError: no layer and no head has one.
    """
    if not any(part["batch_stats"] for part in _parts(federation.model)):
        raise UserError(
            f"batch_norm: {batch_norm} has no effect on a network without BatchNorm; "
            "allowed is auto"
        )


def _check_counts(federation: Federation, optimizer_state: str) -> None:
    """Refuse to change the count of steps of a BatchNorm that keeps its moments.

    Raises:
      UserError: the optimizer has one count for a layer and the BatchNorm in it.
    """
    if optimizer_state == "keep":
        return
    counts = partial(counts_steps, federation.optimizer)
    parts = _parts(federation.model)
    if any(one["batch_stats"] and counts(one["params"]) for one in parts):
        raise UserError(
            f"optimizer_state: {optimizer_state} is not allowed with batch_norm "
            "keep_local and an optimizer that counts the steps of a layer, such as "
            "adamw; allowed is keep, or batch_norm average"
        )


def _parts(model: Model) -> tuple[Variables, ...]:
    """Return the shapes of all layers and heads of a network."""
    network = jax.eval_shape(partial(init_network, model), jax.random.key(0))
    return *network.layers, *network.exit_heads, network.final_head


def _init_fn(federation: Federation, *, shared: bool, init: str) -> InitStateFn:
    def init_state(key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        first = init_network(federation.model, key)
        network = first if init == "shared" else None
        clients = init_clients(federation, key, network, ids)
        if shared:
            cut = federation.groups[0].cut
            servers: tuple[Branch, ...] = (
                init_server(first, cut, federation.optimizer),
            )
        else:
            servers = init_servers(federation, key, network, ids)
        return RunState(jnp.zeros((), jnp.int32), clients, servers)

    return init_state
