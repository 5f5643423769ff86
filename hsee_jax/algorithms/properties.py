"""The design space of the algorithms; only the files of this package use it.

All clients share a server, or each client has its own; the server's gradient stops at
the cut, or flows back over it; and some layers are averaged from time to time.

=============  ========  ========  ===================  ==============================
algorithm      server    boundary  averaged             federation
=============  ========  ========  ===================  ==============================
sequential     shared    option    nothing, or clients  any
averaging      each own  option    servers, or clients  any
                                   as well
local          each own  detached  nothing              any
splitfed_v1    each own  joint     all, every round     one cut
splitfed_v2    shared    joint     clients, each round  one cut
fedavg         each own  none      all, every round     cut behind the last layer
centralized    each own  none      nothing              one client, with all the data
vicreg         shared    detached  nothing, or clients  any; clients need no labels
fpl            shared    option    nothing              one cut, one event for all
=============  ========  ========  ===================  ==============================

Where the boundary is joint or none, the loss of the final head trains all layers, and
exits are probes that change nothing (unless ``exit_gradient`` says otherwise). With
none, no features cross a link.
"""

from typing import NamedTuple

from hsee_jax.algorithms import options
from hsee_jax.core.errors import UserError, unknown
from hsee_jax.federation.reduction import REDUCERS, ReduceFn, check_trimmed


class Properties(NamedTuple):
    """What sets an algorithm apart: its point in the design space."""

    shared: bool  # one server for all clients, or a server for each
    # The holders over which a layer is averaged: "none", "servers", "clients" or
    # "all_holders"; where clients take part, exit heads are averaged over each cut.
    average: str
    # "detached": no gradient crosses the cut; "joint": the server's gradient flows
    # back, see `joint_step`; "none": as joint, but the client holds the server's
    # layers too.
    boundary: str = "detached"
    exit_gradient: float = 0.0  # see `joint_step`
    # A shared server takes "batch": one batch of every client in each step, in the
    # given order; "epoch": all of a client's round before the next client's; or
    # "together": the batches of all clients as one.
    turn: str = "batch"
    gradient_share: float = 0.0  # see `Strategy`; only with joint and together
    distill: float = 0.0  # see `detached_step`; not with turns together
    period: int = 1  # how often to average, in units of ``period_unit``; 0 is never
    period_unit: str = "rounds"  # or "steps"
    weights: str = "samples"  # of the clients in a mean, or "uniform"
    aggregate: str = "mean"  # of `hsee_jax.federation.REDUCERS`
    trim_share: float = 0.0  # with a trimmed mean, the share to leave out at each end
    # See `receive`; "auto" keeps BatchNorm local where only servers are averaged,
    # because a replica sees only the features of its own client.
    batch_norm: str = "auto"
    optimizer_state: str = "keep"  # of `hsee_jax.optim.MERGES`
    server_lr_scale: float = 1.0  # the server's learning rate relative to the clients'
    # "shared": all parts are slices of one network; "per_client": the parts of each
    # client and its own server are slices of a network of their own, and a shared
    # server is a slice of one more.
    init: str = "shared"
    copies: int = 1  # see `Strategy`; two need a detached boundary, and no distill
    width_target: float | None = None  # with two copies, see `unlabelled_step`

    def check(self) -> None:
        """Refuse unknown names, and properties that contradict each other.

        Raises:
          UserError: a name is unknown, or an option has no effect with the others; or
            clients that step one after another are to be averaged between steps.
          ValueError: ``average`` includes a shared server.
        """
        for name, allowed in _NAMES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.shared and self.average in ("servers", "all_holders"):
            raise ValueError(f"a shared server is not averaged, so not {self.average}")
        if self.exit_gradient and self.boundary == "detached":
            raise UserError(
                f"exit_gradient: {self.exit_gradient} is not allowed with a detached "
                "boundary; allowed is 0"
            )
        if self.gradient_share and (self.boundary, self.turn) != ("joint", "together"):
            raise UserError(
                f"gradient_share: {self.gradient_share} is not allowed without a joint "
                "boundary and turn together; allowed is 0"
            )
        if self.distill and self.turn == "together":
            raise UserError(
                f"distill: {self.distill} is not allowed with turn together; allowed "
                "is 0"
            )
        if self.copies > 1 and (self.boundary != "detached" or self.distill):
            raise UserError(
                f"copies: {self.copies} is allowed only with a detached boundary and "
                "distill 0; allowed is 1"
            )
        if self.width_target is not None and self.copies == 1:
            raise UserError(
                f"width_target: {self.width_target} is not allowed with one copy of "
                "each sample; allowed is None"
            )
        never = self.average == "none" or self.period == 0
        for name in _OF_AVERAGES if never else ():
            if name == "period" and self.average != "none":
                continue  # it is what turns the average off
            value, default = getattr(self, name), self._field_defaults[name]
            if value != default:
                raise UserError(
                    f"{name}: {value} has no effect without an average; allowed is "
                    f"{default}"
                )
        if (self.turn, self.period_unit) == ("epoch", "steps"):
            raise UserError(
                "period_unit: steps is not allowed with turn epoch, where clients take "
                "the same step at different times; allowed is rounds"
            )

    def reduce_fn(self, num_clients: int) -> ReduceFn:
        """Return how the holders of a layer are reduced to one.

        Raises:
          UserError: the reducer does not read the weights or the share to trim, or the
            share amounts to less than one client.
        """
        reducer = REDUCERS.make(self.aggregate, self.trim_share)
        if self.weights != "uniform" and not reducer.weighted:
            raise UserError(
                f"weights: {self.weights} is not allowed with aggregate "
                f"{self.aggregate}, which counts each holder once; allowed is uniform"
            )
        if num_clients > 1:  # one alone: a device, which averages nothing
            check_trimmed(self.trim_share, num_clients, f"{num_clients} clients")
        return reducer.reduce

    def makes_one_network(self, num_cuts: int) -> bool:
        """Return whether an average gives all one network, except local BatchNorm."""
        if self.shared:  # then the server's layers are common to all clients anyway
            return self.average == "clients" and num_cuts == 1
        return self.average == "all_holders"


_OF_AVERAGES = (
    "period period_unit weights aggregate trim_share batch_norm optimizer_state"
).split()
# Some algorithms use more than the options offer.
_NAMES = {
    "average": ("none", "clients", *options.AVERAGES),
    "boundary": (*options.BOUNDARIES, "none"),
    "turn": options.TURNS,
    "period_unit": options.PERIOD_UNITS,
    "batch_norm": options.BATCH_NORMS,
    "weights": options.WEIGHTS,
    "init": options.INITS,
}
