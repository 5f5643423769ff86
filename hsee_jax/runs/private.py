"""Refuse what a run cannot do because its devices keep their layers private."""

import jax

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.federation.strategy import Strategy


def check_simulated(config: Config) -> None:
    """Refuse to keep layers private in a simulation.

    Raises:
      UserError: the configuration asks for it.
    """
    if config.clients.keep_layers_private:
        raise UserError(
            "keep_layers_private: true is not allowed in a simulation, which holds the "
            "layers of all clients; allowed is `hsee serve`"
        )


def check_no_layers_sent(strategy: Strategy) -> None:
    """Refuse a strategy that averages layers of clients.

    Raises:
      UserError: the strategy averages layers of clients.
    """
    state = jax.eval_shape(strategy.init, jax.random.key(0))
    if jax.tree.leaves(strategy.messages(state)):
        raise UserError(
            "keep_layers_private: true is not allowed with a strategy whose server "
            "averages layers of clients; allowed are others, such as sequential, or "
            "averaging with --average servers"
        )


def check_layers(config: Config) -> None:
    """Refuse to read clients that kept their layers private.

    Raises:
      UserError: the clients kept their layers private.
    """
    if config.clients.keep_layers_private:
        raise UserError(
            "run: holds no layers of clients, as its devices kept them private "
            "(keep_layers_private); allowed are the scores that `hsee report` shows, "
            "and the server's layers"
        )
