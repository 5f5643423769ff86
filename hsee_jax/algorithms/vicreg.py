"""Clients without labels, after arXiv:2301.09164 and VICReg (arXiv:2105.04906).

"Unifying Synergies between Self-supervised Learning and Dynamic Computation" trains a
network without labels on VICReg (Bardes, Ponce and LeCun, ICLR 2022) and fits heads
behind it on the samples with labels. Here a client's layers train on VICReg between two
augmented copies of each of its samples, labelled or not. The exit and the shared server
train only on samples with labels; no gradient flows back from either, and features of
samples without labels do not leave the client.

With ``width_target`` the first copy passes through all channels of a client's layers,
and the second through those whose gates are open; each pass has its own BatchNorm. The
loss gets a term ``(F - t)^2``, where F is the share of FLOPs of the gated pass and t
the target. `hsee_jax.nn.gates` has the gates, and how they differ from the paper's.
Without ``width_target`` there are no gates, and both copies pass through the
same layers, in which BatchNorm sees them as one batch [ours].

Four more things differ. The loss reads the mean of each channel, without an expander
[ours]. VICReg is divided by 25, to suit the learning rates of a cross-entropy, and the
term of the width has the factor 25, where the paper has 5, so that some hundred steps
reach the target [ours]. With ``width_target`` the exit learns from the features of both
passes, and the server from those of the dense pass [ours]. The clients' layers are
averaged [ours], so that an exit can be fitted to the labels of all clients, see
`hsee_jax.engine.refit_exits`.
"""

from hsee_jax.algorithms.compose import compose
from hsee_jax.algorithms.options import (
    Aggregate,
    BatchNorm,
    ClientAverage,
    Init,
    OptimizerState,
    Period,
    PeriodUnit,
    ServerLrScale,
    TrimShare,
    Turn,
    Weights,
    WidthTarget,
)
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.registry import ALGORITHMS
from hsee_jax.core.errors import UserError
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy
from hsee_jax.nn.gates import has_gates


@ALGORITHMS.register(summary="clients learn without labels (VICReg), one server")
def vicreg(
    federation: Federation,
    *,
    turn: Turn = "batch",
    average: ClientAverage = "clients",
    period: Period = 1,
    period_unit: PeriodUnit = "rounds",
    weights: Weights = "samples",
    aggregate: Aggregate = "mean",
    trim_share: TrimShare = 0.0,
    batch_norm: BatchNorm = "auto",
    optimizer_state: OptimizerState = "keep",
    server_lr_scale: ServerLrScale = 1.0,
    init: Init = "shared",
    width_target: WidthTarget = None,
) -> Strategy:
    """Train clients on two copies of each sample, and one server on labelled samples.

    `hsee_jax.algorithms.sequential` explains the options other than ``width_target``.

    Raises:
      UserError: clients take a batch in micro-batches, but the loss needs it whole;
        clients have several exits; there is a target for the width, but the network has
        no gates (see `hsee_jax.nn.with_gates`); or options contradict each other.
    """
    if width_target is not None and not has_gates(federation.model):
        raise UserError(
            f"width_target: {width_target} is not allowed with a network without "
            "channel gates; allowed are networks with gates, such as resnet18 with "
            "norm batch"
        )
    if federation.exits != "cut":
        raise UserError(
            f"exits: {federation.exits} is not allowed with vicreg, whose clients "
            "train one exit; allowed is cut"
        )
    if federation.micro_batches > 1:
        raise UserError(
            f"micro_batches: {federation.micro_batches} is not allowed with vicreg, "
            "whose loss is that of a whole batch; allowed is 1"
        )
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
            batch_norm=batch_norm,
            optimizer_state=optimizer_state,
            server_lr_scale=server_lr_scale,
            init=init,
            copies=2,
            width_target=width_target,
        ),
    )
