"""The values that pass between a server's training and the calls of devices."""

from typing import NamedTuple

from hsee_jax.core.options import Option, at_least, between, positive
from hsee_jax.core.types import Metrics
from hsee_jax.deployment.forms import Kind, Layers
from hsee_jax.deployment.protocol import Tensors
from hsee_jax.federation.state import Means


class Patience(NamedTuple):
    """How long a server waits for devices, and how much it takes from them."""

    deadline_s: float | None = None  # of a round; None waits for every device
    min_clients: int = 1  # that take part in a round, whatever the deadline
    max_refusals: int = 3  # of a device, before it is left out

    def check(self, num_clients: int) -> None:
        """Refuse values that do not fit the number of clients.

        Raises:
          UserError: a value is not allowed.
        """
        for name, kind, value, rule in (
            ("deadline", float, self.deadline_s, positive),
            ("min_clients", int, self.min_clients, between(1, num_clients)),
            ("max_refusals", int, self.max_refusals, at_least(0)),
        ):
            if value is not None:
                Option(name, kind, None, rules=(rule,)).checked(value)


PATIENT = Patience()  # waits for every device
FEATURE_BOUND = 1e4  # the largest absolute value of a feature, unless set


class Finished(NamedTuple):
    """What a device sends after a round."""

    metrics: Metrics  # of its exit in each step, [T]
    layers: Tensors  # by name; empty if none were asked for


class Task(NamedTuple):
    """What a device is asked to do."""

    kind: Kind
    round: int
    layers: Layers
    last: int  # the last round of the client that counts
    means: Means  # the latest, on the host
