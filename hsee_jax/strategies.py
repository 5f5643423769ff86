"""The two strategies of Hetero-SplitEE, and the baselines that they are compared with.

*Sequential*: one server network, updated by one client after another. *Averaging*: a
server network for each client, trained in parallel and averaged layer by layer (Oda et
al., arXiv:2512.09313). All of them are points of the space of `compose`; what the
sources leave open are options, documented in `StrategyConfig`.

=============  ========  ========  ===================  ==============================
strategy       server    boundary  averaged             federation
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
exits are probes that change nothing (unless `exit_gradient` says otherwise). With none,
no features cross a link.
"""

import inspect
from collections.abc import Callable

from hsee_jax.base import UserError
from hsee_jax.compose import compose
from hsee_jax.federation import Federation, Strategy


def sequential(
    federation: Federation,
    *,
    turn: str = "batch",
    boundary: str = "detached",
    exit_gradient: float = 0.0,
    server_lr_scale: float = 1.0,
    init: str = "shared",
) -> Strategy:
    """One server for all clients, updated by one after another; see `compose`."""
    return compose(
        federation,
        shared=True,
        average="none",
        turn=turn,
        boundary=boundary,
        exit_gradient=exit_gradient,
        server_lr_scale=server_lr_scale,
        init=init,
    )


def averaging(
    federation: Federation,
    *,
    average: str = "servers",
    period: int = 1,
    period_unit: str = "rounds",
    boundary: str = "detached",
    exit_gradient: float = 0.0,
    batch_norm: str = "auto",
    optimizer_state: str = "keep",
    server_lr_scale: float = 1.0,
    init: str = "shared",
) -> Strategy:
    """A server for each client; layers are averaged over their holders.

    See `compose` for the options; ``average`` is ``"servers"`` or ``"all_holders"``.
    """
    return compose(
        federation,
        shared=False,
        average=average,
        period=period,
        period_unit=period_unit,
        boundary=boundary,
        exit_gradient=exit_gradient,
        batch_norm=batch_norm,
        optimizer_state=optimizer_state,
        server_lr_scale=server_lr_scale,
        init=init,
    )


def local(
    federation: Federation, *, server_lr_scale: float = 1.0, init: str = "shared"
) -> Strategy:
    """Every client alone, with a server of its own: the lower reference."""
    return compose(
        federation,
        shared=False,
        average="none",
        server_lr_scale=server_lr_scale,
        init=init,
    )


def splitfed_v1(
    federation: Federation,
    *,
    batch_norm: str = "auto",
    optimizer_state: str = "keep",
) -> Strategy:
    """SplitFedV1 (Thapa et al., AAAI 2022).

    Gradients flow back over the cut, and after every round the client parts are
    averaged, and the servers.
    """
    _check_one_cut(federation, "splitfed_v1")
    return compose(
        federation,
        shared=False,
        average="all_holders",
        boundary="joint",
        batch_norm=batch_norm,
        optimizer_state=optimizer_state,
    )


def splitfed_v2(
    federation: Federation,
    *,
    turn: str = "batch",
    batch_norm: str = "auto",
    optimizer_state: str = "keep",
) -> Strategy:
    """SplitFedV2 (Thapa et al., AAAI 2022).

    Gradients flow back over the cut from one shared server, and after every round the
    client parts are averaged.
    """
    _check_one_cut(federation, "splitfed_v2")
    return compose(
        federation,
        shared=True,
        average="clients",
        boundary="joint",
        turn=turn,
        batch_norm=batch_norm,
        optimizer_state=optimizer_state,
    )


def fedavg(
    federation: Federation,
    *,
    batch_norm: str = "auto",
    optimizer_state: str = "keep",
) -> Strategy:
    """FedAvg (McMahan et al., AISTATS 2017): whole networks, averaged every round."""
    cuts, last = {group.cut for group in federation.groups}, len(_names(federation))
    if cuts != {last}:
        raise UserError(
            f"cuts: {_shown(federation)} is not allowed with fedavg, whose clients "
            f"hold all layers; allowed is {last}"
        )
    _check_no_link(federation, "fedavg")
    return compose(
        federation,
        shared=False,
        average="all_holders",
        boundary="none",
        batch_norm=batch_norm,
        optimizer_state=optimizer_state,
    )


def centralized(federation: Federation) -> Strategy:
    """One network, all data, trained by the final head alone: the upper reference."""
    count = sum(len(group.ids) for group in federation.groups)
    if count != 1:
        raise UserError(
            f"num_clients: {count} is not allowed with centralized; allowed is 1"
        )
    _check_no_link(federation, "centralized")
    return compose(federation, shared=False, average="none", boundary="none")


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    strategy.__name__: strategy
    for strategy in (
        sequential,
        averaging,
        local,
        splitfed_v1,
        splitfed_v2,
        fedavg,
        centralized,
    )
}


def options_of(name: str) -> tuple[str, ...]:
    """The options that a strategy reads."""
    parameters = inspect.signature(STRATEGIES[name]).parameters
    return tuple(parameters)[1:]


def readers_of(option: str) -> list[str]:
    """The strategies that read a field of `StrategyConfig`; none where all do.

    `weights` is no option of theirs: a round reads it for those who average.
    """
    like = "optimizer_state" if option == "weights" else option
    return [name for name in STRATEGIES if like in options_of(name)]


def _check_one_cut(federation: Federation, name: str) -> None:
    if len(federation.groups) > 1:
        raise UserError(
            f"cuts: {_shown(federation)} is not allowed with {name}, whose clients are "
            "all cut alike; allowed is one cut"
        )


def _check_no_link(federation: Federation, name: str) -> None:
    if federation.link != "full":
        raise UserError(
            f"link: {federation.link} is not allowed with {name}, where no features "
            "are sent; allowed is full"
        )


def _names(federation: Federation) -> tuple[str, ...]:
    return federation.model.layer_names


def _shown(federation: Federation) -> str:
    return " ".join(str(group.cut) for group in federation.groups)
