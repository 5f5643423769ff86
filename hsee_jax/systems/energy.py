"""The energy of the devices in a round."""

from collections.abc import Sequence

import numpy as np

from hsee_jax.systems.devices import Device
from hsee_jax.systems.timing import RoundTime
from hsee_jax.systems.work import Floats


def joules(time: RoundTime, devices: Sequence[Device]) -> Floats:
    """Return the energy of each client's device in a round, ``float64 [N]``.

    Each activity takes its watts times its seconds. What it adds to the idle draw adds
    up where activities overlap, as an upload beside the next batch does.

    Args:
      time: of the round.
      devices: of its clients. NaN stands where a device does not know its watts.
    """

    def watts(name: str) -> Floats:
        return np.array([getattr(device, name) for device in devices], float)

    idle = watts("idle_watts")
    energy = idle * time.seconds
    for name in ("busy", "sending", "receiving"):
        energy = energy + (watts(f"{name}_watts") - idle) * getattr(time, f"{name}_s")
    return energy
