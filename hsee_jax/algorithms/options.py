"""The options of the algorithms; several algorithms share a declaration."""

from typing import Annotated

from hsee_jax.core.options import at_least, between, one_of, positive
from hsee_jax.optim.optimizers import MERGES

Boundary = Annotated[
    str,
    "detached: no gradient crosses the cut; joint: the server's gradient flows back to "
    "the client, as in split learning [ours: joint]",
    one_of("detached", "joint"),
]
ExitGradient = Annotated[
    float,
    "with a joint boundary, the share of the exit's gradient that reaches the client's "
    "layers: 0 makes the exit a probe, 1 sums both losses [ours]",
    between(0, 1),
]
Turn = Annotated[
    str,
    "unit of the turns at a shared server: one batch of each client, or a client's "
    "whole local epoch [ours]",
    one_of("batch", "epoch"),
]
Period = Annotated[
    int,
    "how often to average, in units of period_unit; 0 is never; an absent client loses "
    "its training since the last average [ours]",
    at_least(0),
]
PeriodUnit = Annotated[str, "unit of period", one_of("rounds", "steps")]
Average = Annotated[
    str,
    "holders in a layer's mean: the server replicas with this layer, or all holders, "
    "including clients [ours]",
    one_of("servers", "all_holders"),
]
Weights = Annotated[
    str,
    "weights of the clients in a mean: their numbers of training samples, or equal "
    "weights [ours]",
    one_of("samples", "uniform"),
]
BatchNorm = Annotated[
    str,
    "BatchNorm is averaged like the rest, or stays local (FedBN); auto is local where "
    "only servers are averaged, because each server sees only the features of its own "
    "client [ours]",
    one_of("auto", "average", "keep_local"),
]
OptimizerState = Annotated[
    str,
    "state of the optimizer when layers are averaged: by the optimizer's rule (sgd and "
    "adamw keep it), the mean over the holders, or the initial state [ours]",
    one_of(MERGES),
]
ServerLrScale = Annotated[
    float, "the server's learning rate, relative to the clients' [ours]", positive
]
Init = Annotated[
    str,
    "weights at the start: slices of one network, or drawn per client [ours]",
    one_of("shared", "per_client"),
]
