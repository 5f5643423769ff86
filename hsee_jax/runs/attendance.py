"""Who takes part in the rounds of a run, and what does not go with few of them."""

from hsee_jax.config.schema import Config, parse_absence
from hsee_jax.config.values import flatten
from hsee_jax.core.errors import UserError
from hsee_jax.engine.plan import Absence, num_drawn
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.reduction import check_trimmed
from hsee_jax.federation.strategy import Strategy
from hsee_jax.optim.optimizers import as_optimizer
from hsee_jax.runs.experiment import Attendance


def attendance_of(config: Config) -> Attendance:
    """Return the rules for who takes part in a round of a run."""
    clients = config.clients
    return Attendance(
        clients.participation,
        clients.dropout,
        tuple(Absence(*parse_absence(text)) for text in clients.absences),
        config.run.data_seed,
    )


def checked_attendance(
    config: Config, federation: Federation, strategy: Strategy
) -> Attendance:
    """Return the rules for who takes part, and refuse what does not go with them.

    Raises:
      UserError: see `Attendance.check`; or a trimmed mean would never leave a client
        out; or the optimizer follows the averages, of which a client that was absent
        gets the latest alone.
    """
    attendance = attendance_of(config)
    attendance.check(federation.groups, config.run.rounds)
    if config.clients.participation < 1:
        _check_few(config, federation, strategy)
    return attendance


def _check_few(config: Config, federation: Federation, strategy: Strategy) -> None:
    """Refuse options that need more clients in a round than are drawn."""
    participation = config.clients.participation
    drawn = num_drawn(config.clients.num_clients, participation)
    share = flatten(config).get("trim_share") or 0.0
    who = f"the {drawn} clients that participation {participation} draws"
    check_trimmed(share, drawn, who)
    each_round = strategy.period == 1 and strategy.period_unit == "rounds"
    follows = as_optimizer(federation.optimizer).follows_averages
    if follows and strategy.period and not each_round:
        raise UserError(
            f"period: {strategy.period} {strategy.period_unit} is not allowed with "
            f"optimizer {config.optim.optimizer} and participation {participation}, as "
            "a client that was absent gets the latest average alone; allowed is a "
            "period of 1 in rounds"
        )
