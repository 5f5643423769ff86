"""SplitFed (Thapa, Arachchige, Camtepe and Sun, AAAI 2022): versions 1 and 2.

Clients and server train one network jointly: the gradient of the final loss flows back
over the cut, which is the same for all clients. After every round the client parts are
averaged; version 1 also averages the servers, version 2 has one server.

Here the exits are probes that change nothing, and in version 2 the server takes one
batch of each client in turn; ``turn="epoch"`` is the order of the paper, and
``turn="together"`` that of EPSL (see `hsee_jax.algorithms.epsl`).
"""

from hsee_jax.algorithms.compose import compose
from hsee_jax.algorithms.options import (
    Aggregate,
    BatchNorm,
    GradientShare,
    OptimizerState,
    TrimShare,
    Turn,
    Weights,
)
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.registry import ALGORITHMS, require_one_cut
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy


@ALGORITHMS.register(summary="SplitFedV1: a server per client, everything averaged")
def splitfed_v1(
    federation: Federation,
    *,
    weights: Weights = "samples",
    aggregate: Aggregate = "mean",
    trim_share: TrimShare = 0.0,
    batch_norm: BatchNorm = "auto",
    optimizer_state: OptimizerState = "keep",
) -> Strategy:
    """Average the client parts and the servers after every round.

    Raises:
      UserError: the clients have several cuts, or options contradict each other.
    """
    require_one_cut(federation, "splitfed_v1")
    return compose(
        federation,
        Properties(
            shared=False,
            average="all_holders",
            boundary="joint",
            weights=weights,
            aggregate=aggregate,
            trim_share=trim_share,
            batch_norm=batch_norm,
            optimizer_state=optimizer_state,
        ),
    )


@ALGORITHMS.register(summary="SplitFedV2: one server, client parts averaged")
def splitfed_v2(
    federation: Federation,
    *,
    turn: Turn = "batch",
    gradient_share: GradientShare = 0.0,
    weights: Weights = "samples",
    aggregate: Aggregate = "mean",
    trim_share: TrimShare = 0.0,
    batch_norm: BatchNorm = "auto",
    optimizer_state: OptimizerState = "keep",
) -> Strategy:
    """Share one server and average the client parts after every round.

    Raises:
      UserError: the clients have several cuts, or options contradict each other.
    """
    require_one_cut(federation, "splitfed_v2")
    return compose(
        federation,
        Properties(
            shared=True,
            average="clients",
            boundary="joint",
            turn=turn,
            gradient_share=gradient_share,
            weights=weights,
            aggregate=aggregate,
            trim_share=trim_share,
            batch_norm=batch_norm,
            optimizer_state=optimizer_state,
        ),
    )
