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
    """Make a strategy from its properties.

    Args:
      federation: who trains what.
      shared: one server for all clients, or one for each.
      average: the holders over which a layer is averaged: ``"none"``, ``"servers"``,
        ``"clients"``, or ``"all_holders"``; where clients take part, exit heads are
        averaged over each cut. A shared server is not averaged.
      boundary: ``"detached"``: no gradient crosses the cut; ``"joint"``: the server's
        flows back, see `joint_step`; ``"none"``: likewise, but the client holds the
        server's layers too, and no link lies between them.
      exit_gradient: see `joint_step`.
      turn: at a shared server, ``"batch"``: in each step it takes one batch of every
        client, in the given order; ``"epoch"``: all of a client's round, then the next
        client's.
      period: how often to average, in units of ``period_unit``; 0 is never.
      period_unit: ``"rounds"`` or ``"steps"``.
      weights: of the clients in a mean, ``"samples"`` or ``"uniform"``.
      batch_norm: see `receive`; ``"auto"`` keeps it local where only servers are
        averaged: the features that a replica sees are those of its own client.
      optimizer_state: of `hsee_jax.optim.MERGES`.
      server_lr_scale: the server's learning rate relative to the clients'.
      init: ``"shared"``: all parts are slices of one network; ``"per_client"``: each
        client's, and its server's, are drawn by themselves. A shared server is a slice
        of the one network.

    Raises:
      UserError: a name is unknown, or an exit gradient is asked for where no gradient
        crosses the cut.
      ValueError: a shared server is to be averaged.
    """
    given = (average, boundary, turn, period_unit, batch_norm, weights, init)
    for (name, allowed), value in zip(_NAMES.items(), given, strict=True):
        if value not in allowed:
            raise unknown(name, value, allowed)
    if shared and average in ("servers", "all_holders"):
        raise ValueError(f"a shared server is not averaged, so not {average}")
    if exit_gradient and boundary == "detached":
        raise UserError(
            f"exit_gradient: {exit_gradient} is not allowed with a detached boundary; "
            "allowed is 0"
        )
    if batch_norm == "auto":
        batch_norm = "keep_local" if average == "servers" else "average"
    federation = federation._replace(
        optimizer=with_merge(federation.optimizer, optimizer_state)
    )
    parts = server_parts(federation, shared=shared)
    rates = Rates(server_lr_scale)
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
        init=_init_fn(federation, shared=shared, init=init),
        turn=turn_fn,
        step=step,
        aggregate=averages.aggregate,
        receive=averages.receive,
        messages=averages.messages,
        part=parts.take,
        shared=shared,
        turn_unit=turn if shared else "batch",
        period=0 if average == "none" else period,
        period_unit=period_unit,
        boundary=boundary,
        weights=weights,
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
