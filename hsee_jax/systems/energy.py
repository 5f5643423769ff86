"""The energy of the devices in a round."""

from collections.abc import Sequence

import numpy as np

from hsee_jax.systems.devices import Device
from hsee_jax.systems.timing import RoundTime
from hsee_jax.systems.work import Floats


def joules(time: RoundTime, devices: Sequence[Device]) -> Floats:
    """Return the joules of each client's device in a round, ``float64 [N]``.

    A device draws its idle watts all the time. Each activity adds its seconds times the
    watts that it draws above that, also where activities overlap, such as an upload and
    the next batch. The energy is NaN where a device does not know its watts.

    Args:
      time: the course of the round.
      devices: the devices of its N clients.
    """

    def watts(name: str) -> Floats:
        return np.array([getattr(device, name) for device in devices], float)

    idle = watts("idle_watts")
    energy = idle * time.seconds
    for name in ("busy", "sending", "receiving"):
        energy = energy + (watts(f"{name}_watts") - idle) * getattr(time, f"{name}_s")
    return energy
