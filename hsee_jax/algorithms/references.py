"""The two references for a federation; its accuracy should lie between them.

`local`, the lower reference, trains every client alone. `centralized`, the upper
reference, trains one network on all data.
"""

from hsee_jax.algorithms.compose import compose
from hsee_jax.algorithms.options import Init, ServerLrScale
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.registry import ALGORITHMS, require_full_link
from hsee_jax.core.errors import UserError
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy


@ALGORITHMS.register(summary="every client alone, with its own server")
def local(
    federation: Federation,
    *,
    server_lr_scale: ServerLrScale = 1.0,
    init: Init = "shared",
) -> Strategy:
    """Train every client alone, with its own server."""
    return compose(
        federation,
        Properties(
            shared=False,
            average="none",
            server_lr_scale=server_lr_scale,
            init=init,
        ),
    )


@ALGORITHMS.register(summary="one client with all the data trains the whole network")
def centralized(federation: Federation) -> Strategy:
    """Train one network on all data by the final head alone.

    Raises:
      UserError: there are several clients, or a codec is given though nothing crosses
        a link.
    """
    count = len(federation.clients)
    if count != 1:
        raise UserError(
            f"num_clients: {count} is not allowed with centralized; allowed is 1"
        )
    require_full_link(federation, "centralized")
    properties = Properties(shared=False, average="none", boundary="none")
    return compose(federation, properties)
