"""The cuts of a run in every round, as its configuration holds them."""

from collections.abc import Sequence

from hsee_jax.config.schema import Config, parse_recut
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.federation.schedule import CutSchedule
from hsee_jax.nn.cuts import deal_cuts


def schedule_of(config: Config, layer_names: Sequence[str]) -> CutSchedule:
    """Return the cuts of a run in every round.

    Args:
      config: of the run.
      layer_names: the names of the network's layers.

    Raises:
      UserError: a cut is not a layer.
    """
    clients = config.clients
    cuts = {1: deal_cuts(clients.cuts, clients.num_clients, layer_names)}
    for number, some in map(parse_recut, clients.recuts):
        try:
            cuts[number] = deal_cuts(some, clients.num_clients, layer_names)
        except UserError as error:
            raise UserError(f"re{error}") from error  # name recuts, not cuts
    return CutSchedule.of(cuts)


def with_schedule(config: Config, schedule: CutSchedule) -> Config:
    """Return a configuration with the cuts of a schedule, one for each client."""
    texts = [tuple(map(str, cuts)) for cuts in schedule.cuts]
    recuts = [
        f"{start}:{','.join(cuts)}"
        for start, cuts in zip(schedule.starts[1:], texts[1:], strict=True)
    ]
    return override(
        config, num_clients=len(texts[0]), cuts=texts[0], recuts=tuple(recuts)
    )


def config_in_round(config: Config, number: int) -> Config:
    """Return a configuration that has the cuts of one round in all rounds."""
    cuts = config.clients.cuts
    for start, some in map(parse_recut, config.clients.recuts):
        if start <= number:
            cuts = some
    return override(config, cuts=cuts, recuts=())
