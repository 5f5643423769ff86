"""Who takes part in the rounds of a run, and what does not go with few of them."""

from collections.abc import Sequence
from typing import NamedTuple

from hsee_jax.config.schema import Config, parse_absence
from hsee_jax.config.values import flatten
from hsee_jax.core.errors import UserError
from hsee_jax.data.partition import Indices
from hsee_jax.engine.plan import Absence, missing, num_drawn, participants
from hsee_jax.federation.federation import Federation, Group, clients_of
from hsee_jax.federation.reduction import check_trimmed
from hsee_jax.federation.strategy import Strategy
from hsee_jax.optim.optimizers import as_optimizer


class Attendance(NamedTuple):
    """The rules for which clients take part in a round."""

    participation: float  # share of the clients drawn for each round
    dropout: float  # probability that a client misses a round
    absences: tuple[Absence, ...]
    seed: int

    def drawn(self, groups: Sequence[Group], number: int) -> set[int]:
        """Return the clients that are drawn for a round; rounds count from 0."""
        return participants(
            groups, participation=self.participation, seed=self.seed, number=number
        )

    def missing(self, groups: Sequence[Group], number: int) -> set[int]:
        """Return the clients that miss a round; rounds count from 0."""
        return missing(
            [client.id for client in clients_of(groups)],
            dropout=self.dropout,
            absences=self.absences,
            seed=self.seed,
            number=number,
        )

    def present(self, groups: Sequence[Group], number: int) -> set[int]:
        """Return the clients that take part in a round; rounds count from 0."""
        return self.drawn(groups, number) - self.missing(groups, number)

    def check(self, groups: Sequence[Group], rounds: int) -> None:
        """Refuse a run with a round in which no client takes part.

        Raises:
          UserError: a round has no client.
        """
        if self.dropout == 0 and not self.absences:
            return
        for number in range(rounds):
            if not self.present(groups, number):
                left = f"no client is left in round {number + 1}"
                if self.dropout == 0:
                    raise UserError(f"absences: not allowed as they are; {left}")
                raise UserError(
                    f"dropout: {self.dropout} is not allowed with these absences and "
                    f"seeds; {left}"
                )


def attendance_of(config: Config) -> Attendance:
    """Return the rules for who takes part in a round of a run."""
    clients = config.clients
    return Attendance(
        clients.participation,
        clients.dropout,
        tuple(Absence(*parse_absence(text)) for text in clients.absences),
        config.run.data_seed,
    )


def checked_attendance(config: Config, federation: Federation) -> Attendance:
    """Return the rules for who takes part, and refuse what does not go with them.

    Raises:
      UserError: see `Attendance.check`; or a trimmed mean would never leave a client
        out.
    """
    attendance = attendance_of(config)
    attendance.check(federation.groups, config.run.rounds)
    participation = config.clients.participation
    if participation < 1:
        drawn = num_drawn(config.clients.num_clients, participation)
        share = flatten(config).get("trim_share") or 0.0
        who = f"the {drawn} clients that participation {participation} draws"
        check_trimmed(share, drawn, who)
    return attendance


def check_equal_periods(
    config: Config,
    federation: Federation,
    strategy: Strategy,
    parts: Sequence[Indices],
    batch_size: int,
) -> None:
    """Refuse an optimizer that follows the averages where periods differ in length.

    It divides the way of the mean by the steps of its own holder. Where some periods
    of a holder have fewer steps than others, the buffer of this holder grows in the
    short periods, and its next long period moves the mean too far: both grow for ever.
    A change of cuts within a period leaves short periods to the layers that move.

    Args:
      config: of the run.
      federation: its clients and their optimizer.
      strategy: its algorithm.
      parts: the samples of each client.
      batch_size: of a step.

    Raises:
      UserError: an average is not due after every round, and clients may be absent,
        change their cuts, or take unequal numbers of steps between two averages.
    """
    clients = config.clients
    uneven = {
        "participation": clients.participation < 1,
        "dropout": clients.dropout > 0,
        "absences": bool(clients.absences),
        "deadline": clients.deadline is not None,
        "recuts": bool(clients.recuts),
    }
    for name, given in uneven.items():
        if given:
            check_each_round(config, federation, strategy, name)
    steps = {-(-len(own) // batch_size) for own in parts}
    if strategy.period_unit == "steps" and len(steps) > 1:
        unequal = f"clients of {min(steps)} to {max(steps)} steps in a round"
        check_each_round(config, federation, strategy, unequal)


def check_each_round(
    config: Config, federation: Federation, strategy: Strategy, why: str
) -> None:
    """Refuse an optimizer that follows the averages if not every round has one.

    Args:
      config: of the run.
      federation: its clients and their optimizer.
      strategy: its algorithm.
      why: what makes some periods of a layer shorter than others.

    Raises:
      UserError: an average is due, and not after every round.
    """
    each_round = strategy.period == 1 and strategy.period_unit == "rounds"
    follows = as_optimizer(federation.optimizer).follows_averages
    if follows and strategy.period and not each_round:
        raise UserError(
            f"period: {strategy.period} {strategy.period_unit} is not allowed with "
            f"optimizer {config.optim.optimizer} and {why}, as its momentum diverges "
            "where a layer trains less in some periods than in others; allowed is a "
            "period of 1 in rounds"
        )
