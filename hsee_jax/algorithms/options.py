"""The options of the algorithms; several algorithms share a declaration."""

from typing import Annotated

from hsee_jax.core.options import Rule, at_least, between, one_of, positive
from hsee_jax.federation.reduction import REDUCERS
from hsee_jax.optim.optimizers import MERGES

BOUNDARIES = ("detached", "joint")
TURNS = ("batch", "epoch", "together")
PERIOD_UNITS = ("rounds", "steps")
AVERAGES = ("servers", "all_holders")
CLIENT_AVERAGES = ("none", "clients")
WEIGHTS = ("samples", "uniform")
BATCH_NORMS = ("auto", "average", "keep_local")
INITS = ("shared", "per_client")

Boundary = Annotated[
    str,
    "no gradient crosses the cut, or the server's flows back to the client, as in "
    "split learning [ours: joint]",
    one_of(BOUNDARIES),
]
ExitGradient = Annotated[
    float,
    "with a joint boundary, the share of the exit's gradient that reaches the client's "
    "layers: 0 makes the exit a probe, 1 sums both losses [ours]",
    between(0, 1),
]
Turn = Annotated[
    str,
    "a shared server takes one batch of each client in turn, a client's whole local "
    "epoch, or the batches of all clients together as one [ours]",
    one_of(TURNS),
]
GradientShare = Annotated[
    float,
    "with a joint boundary and turn together, the share of rows whose gradient is that "
    "of the mean over clients (EPSL's phi)",
    between(0, 1),
]
Distill = Annotated[
    float,
    "temperature at which a client's exit also learns from the server's logits of the "
    "same batch, for which the client waits; 0 turns it off [ours]",
    at_least(0),
]
WidthTarget = Annotated[
    float | None,
    "share of the FLOPs of a client's layers that gates over channels are to leave; "
    "needs a network with gates, such as resnet18; without it there are no gates",
    Rule("more than 0, at most 1", lambda value: 0 < value <= 1),
]
Period = Annotated[
    int,
    "how often to average, in units of period_unit; 0 is never; a client that is "
    "absent at an average loses its training since the average before [ours]",
    at_least(0),
]
PeriodUnit = Annotated[str, "unit of period", one_of(PERIOD_UNITS)]
# The help of both declarations: the flag is one, and shows the first.
_AVERAGED = (
    "holders over which each layer is averaged: in averaging the servers, or "
    "all_holders, clients included; in sequential and vicreg none, or the clients "
    "[ours]"
)
Average = Annotated[str, _AVERAGED, one_of(AVERAGES)]
ClientAverage = Annotated[str, _AVERAGED, one_of(CLIENT_AVERAGES)]
Weights = Annotated[
    str,
    "weights of the clients in a mean: their numbers of training samples, or uniform "
    "[ours]",
    one_of(WEIGHTS),
]
Aggregate = Annotated[
    str,
    "what an average takes of a layer's holders: the mean, or, number by number, the "
    "trimmed mean or the median, which one poisoned holder cannot move far; both count "
    "each holder once and need uniform weights [ours]",
    one_of(REDUCERS),
]
TrimShare = Annotated[
    float,
    "share of a layer's holders that the trimmed mean leaves out at each end; "
    "fractions of a holder do not count [ours]",
    Rule("0 or more, less than 0.5", lambda value: 0 <= value < 0.5),
]
BatchNorm = Annotated[
    str,
    "BatchNorm is averaged like the rest, or stays local (FedBN); auto is local where "
    "only servers are averaged, each of which sees the features of its own client "
    "[ours]",
    one_of(BATCH_NORMS),
]
OptimizerState = Annotated[
    str,
    "what the optimizer's state becomes when layers are averaged: keep follows the "
    "optimizer's rule (with sgd and adamw each holder keeps its own), average is the "
    "mean over the holders, reset the initial state [ours]",
    one_of(MERGES),
]
ServerLrScale = Annotated[
    float, "the server's learning rate, relative to the clients' [ours]", positive
]
Init = Annotated[
    str,
    "weights at the start: slices of one network; or each client, with a server of its "
    "own, has a network of its own, and a shared server is a slice of one more [ours]",
    one_of(INITS),
]
