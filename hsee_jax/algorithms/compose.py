"""The space in which the algorithms of this package lie, for their files alone.

A server is shared or each client has one; the server's gradient stops at the cut or
flows back over it; and some layers are averaged, now and then.

=============  ========  ========  ===================  ==============================
algorithm      server    boundary  averaged             federation
=============  ========  ========  ===================  ==============================
sequential     shared    option    nothing              any
averaging      each own  option    servers, or clients  any
                                   as well
local          each own  detached  nothing              any
splitfed_v1    each own  joint     all, every round     one cut
splitfed_v2    shared    joint     clients, each round  one cut
fedavg         each own  none      all, every round     cut behind the last layer
centralized    each own  none      nothing              one client, with all the data
=============  ========  ========  ===================  ==============================

Where the boundary is joint or none, the loss of the final head trains all layers, and
exits are probes that change nothing (unless ``exit_gradient`` says otherwise). With
none, no features cross a link.
"""

import jax.numpy as jnp

from hsee_jax.algorithms.averages import make_averages
from hsee_jax.algorithms.steps import (
    Rates,
    clients_then_server,
    in_parallel,
    make_turn,
    server_parts,
)
from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.types import Array, Key
from hsee_jax.federation.branch import Branch, init_server
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState, init_clients, init_servers
from hsee_jax.federation.strategy import InitStateFn, StepFn, Strategy
from hsee_jax.nn.model import init_network
from hsee_jax.optim.optimizers import with_merge

_NAMES = {
    "average": ("none", "servers", "clients", "all_holders"),
    "boundary": ("detached", "joint", "none"),
    "turn": ("batch", "epoch"),
    "period_unit": ("rounds", "steps"),
    "batch_norm": ("auto", "average", "keep_local"),
    "weights": ("samples", "uniform"),
    "init": ("shared", "per_client"),
}


def compose(
    federation: Federation,
    *,
    shared: bool,
    average: str,
    boundary: str = "detached",
    exit_gradient: float = 0.0,
    turn: str = "batch",
    period: int = 1,
    period_unit: str = "rounds",
    weights: str = "samples",
    batch_norm: str = "auto",
    optimizer_state: str = "keep",
    server_lr_scale: float = 1.0,
    init: str = "shared",
) -> Strategy:
    """Make a strategy from its properties; `hsee_jax.algorithms.options` explains them.

    ``shared`` is one server for all clients, or one for each. ``average`` may also be
    ``"none"`` or ``"clients"``; where clients take part, exit heads are averaged over
    each cut. ``boundary`` may also be ``"none"``: joint, but the client holds the
    server's layers too, and no link lies between them. A shared server is a slice of
    the one network even where ``init`` is ``"per_client"``.
    """
    _check(average, boundary, turn, period_unit, batch_norm, weights, init)
    _check_fit(shared, average, boundary, exit_gradient)
    if batch_norm == "auto":
        batch_norm = "keep_local" if average == "servers" else "average"
    optimizer = with_merge(federation.optimizer, optimizer_state)
    federation = federation._replace(optimizer=optimizer)
    parts, rates = server_parts(federation, shared=shared), Rates(server_lr_scale)
    turn_fn = make_turn(federation, parts, rates, boundary, exit_gradient)
    step: StepFn | None = None  # else turns wait for each other
    if not shared:
        step = in_parallel(federation, turn_fn)
    elif boundary == "detached" and turn == "batch":
        step = clients_then_server(federation, parts, rates)
    averages = make_averages(
        federation,
        shared=shared,
        average=average,
        boundary=boundary,
        batch_norm=batch_norm,
        spread=federation.mesh is not None and step is not None,
    )
    return Strategy(
        _init_fn(federation, shared=shared, init=init),
        turn_fn,
        step,
        *averages,
        part=parts.take,
        shared=shared,
        turn_unit=turn if shared else "batch",
        period=0 if average == "none" else period,
        period_unit=period_unit,
        boundary=boundary,
        weights=weights,
    )


def _check(*given: str) -> None:
    """Refuse a name that `_NAMES` does not list, in its order."""
    for (name, allowed), value in zip(_NAMES.items(), given, strict=True):
        if value not in allowed:
            raise unknown(name, value, allowed)


def _check_fit(shared: bool, average: str, boundary: str, exit_gradient: float) -> None:
    """Refuse properties that exclude each other."""
    if shared and average in ("servers", "all_holders"):
        raise ValueError(f"a shared server is not averaged, so not {average}")
    if exit_gradient and boundary == "detached":
        raise UserError(
            f"exit_gradient: {exit_gradient} is not allowed with a detached boundary; "
            "allowed is 0"
        )


def _init_fn(federation: Federation, *, shared: bool, init: str) -> InitStateFn:
    def init_state(key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        clients = init_clients(federation, key, init, ids)
        if shared:
            network, cut = init_network(federation.model, key), federation.groups[0].cut
            servers: tuple[Branch, ...] = (
                init_server(network, cut, federation.optimizer),
            )
        else:
            servers = init_servers(federation, key, init, ids)
        return RunState(jnp.zeros((), jnp.int32), clients, servers)

    return init_state
