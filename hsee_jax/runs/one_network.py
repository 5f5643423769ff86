"""Tell from its scores and its folder whether all servers of a run are one network.

Where a strategy averages every layer over all clients and servers that hold it, each
client and the server behind it are afterwards the same network, so all servers score
the same. `Strategy.one_network` says whether a strategy does that; the scores say
whether it holds for a run, which may keep BatchNorm local or may have been evaluated
between two averages.
"""

from pathlib import Path

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.cut_schedule import config_in_round
from hsee_jax.runs.folder import read_config, read_info
from hsee_jax.runs.records import Scores


def is_one_network(folder: Path, scores: Scores) -> bool:
    """Return whether a run's servers score the same because they are one network.

    Args:
      folder: of the run.
      scores: of the run's clients.

    Returns:
      False also if the strategy cannot be built, such as without its plugin.
    """
    if not _equal_servers(scores):
        return False
    try:
        config = read_config(folder)
        config = config_in_round(config, config.run.rounds)
        federation = build_federation(config, read_info(folder), plain=True)
        return build_strategy(config, federation).one_network
    except UserError:
        return False


def _equal_servers(scores: Scores) -> bool:
    """Return whether several servers have equal figures; losses may be rounded."""
    accuracies = {client.server_accuracy for client in scores.clients}
    losses = np.array([client.server_loss for client in scores.clients])
    if len(losses) < 2 or len(accuracies) > 1 or not np.isfinite(losses).all():
        return False
    return bool(np.allclose(losses, losses[0], rtol=1e-3))
