"""Hetero-SplitEE (Oda, Ono, Nakamura and Takase, arXiv:2512.09313): two strategies.

Each client trains its layers and its exit on the exit's cross-entropy and sends the
features to the server. The server trains the layers behind the cut on the final head's
cross-entropy. No gradient flows back. *Sequential*: all clients share one server
network, which takes their features one client after another. *Averaging*: each client
has its own server network; from time to time each layer is averaged over the networks
that hold it.

The paper leaves the options below open; their defaults are our choices. With
``boundary="joint"`` the server's gradient flows back, as in split learning. With
``distill`` an exit also learns from the server's logits of the same batch, see
`hsee_jax.federation.step`; then a client waits for the server with both boundaries.
"""

from hsee_jax.algorithms.compose import compose
from hsee_jax.algorithms.options import (
    Aggregate,
    Average,
    BatchNorm,
    Boundary,
    ClientAverage,
    Distill,
    ExitGradient,
    GradientShare,
    Init,
    OptimizerState,
    Period,
    PeriodUnit,
    ServerLrScale,
    TrimShare,
    Turn,
    Weights,
)
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.registry import ALGORITHMS
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy


@ALGORITHMS.register(summary="Hetero-SplitEE: one server for all clients, in turn")
def sequential(
    federation: Federation,
    *,
    turn: Turn = "batch",
    average: ClientAverage = "none",
    period: Period = 1,
    period_unit: PeriodUnit = "rounds",
    weights: Weights = "samples",
    aggregate: Aggregate = "mean",
    trim_share: TrimShare = 0.0,
    boundary: Boundary = "detached",
    exit_gradient: ExitGradient = 0.0,
    gradient_share: GradientShare = 0.0,
    distill: Distill = 0.0,
    batch_norm: BatchNorm = "auto",
    optimizer_state: OptimizerState = "keep",
    server_lr_scale: ServerLrScale = 1.0,
    init: Init = "shared",
) -> Strategy:
    """Share one server, which takes one client after another.

    In every step all clients train in parallel, then the server takes one batch of each
    client in an order drawn from the run's seed. With a joint boundary or ``distill`` a
    client's step and the server's step on its batch are one turn. With ``turn="epoch"``
    the server takes a client's whole local epoch before the next client's, with
    ``turn="together"`` the batches of all clients as one, see
    `hsee_jax.algorithms.epsl`.

    With ``average="clients"`` each client layer, and the exit head of each cut, is
    averaged over the clients that hold it. The options from ``period`` to
    ``trim_share``, ``batch_norm`` and ``optimizer_state`` belong to this mean.

    Raises:
      UserError: options contradict each other.
    """
    return compose(
        federation,
        Properties(
            shared=True,
            average=average,
            turn=turn,
            period=period,
            period_unit=period_unit,
            weights=weights,
            aggregate=aggregate,
            trim_share=trim_share,
            boundary=boundary,
            exit_gradient=exit_gradient,
            gradient_share=gradient_share,
            distill=distill,
            batch_norm=batch_norm,
            optimizer_state=optimizer_state,
            server_lr_scale=server_lr_scale,
            init=init,
        ),
    )


@ALGORITHMS.register(summary="Hetero-SplitEE: a server per client, averaged by layer")
def averaging(
    federation: Federation,
    *,
    average: Average = "servers",
    period: Period = 1,
    period_unit: PeriodUnit = "rounds",
    weights: Weights = "samples",
    aggregate: Aggregate = "mean",
    trim_share: TrimShare = 0.0,
    boundary: Boundary = "detached",
    exit_gradient: ExitGradient = 0.0,
    distill: Distill = 0.0,
    batch_norm: BatchNorm = "auto",
    optimizer_state: OptimizerState = "keep",
    server_lr_scale: ServerLrScale = 1.0,
    init: Init = "shared",
) -> Strategy:
    """Give each client its own server, and average the servers layer by layer.

    The mean of layer l is over the servers of the clients with a cut below l; with
    ``average="all_holders"`` it is also over the clients that hold layer l.

    Raises:
      UserError: options contradict each other.
    """
    return compose(
        federation,
        Properties(
            shared=False,
            average=average,
            period=period,
            period_unit=period_unit,
            weights=weights,
            aggregate=aggregate,
            trim_share=trim_share,
            boundary=boundary,
            exit_gradient=exit_gradient,
            distill=distill,
            batch_norm=batch_norm,
            optimizer_state=optimizer_state,
            server_lr_scale=server_lr_scale,
            init=init,
        ),
    )
