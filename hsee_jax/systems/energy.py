"""The energy of the devices in a round."""

from collections.abc import Sequence

import numpy as np

from hsee_jax.systems.devices import Device
from hsee_jax.systems.quantities import Floats
from hsee_jax.systems.timing import RoundTime


def joules(time: RoundTime, devices: Sequence[Device]) -> Floats:
    """Return the joules of each client's device in a round, ``float64 [N]``.

    A device draws its idle watts all the time. Each activity adds its seconds times the
    watts that it draws above that, also where activities overlap, such as an upload and
    the next batch. The energy is NaN where a device does not know its watts.

    Args:
      time: the course of the round.
      devices: the devices of its N clients.
    """
    idle = watts(devices, "idle")
    energy = idle * time.seconds
    for name in ("busy", "sending", "receiving"):
        energy = energy + (watts(devices, name) - idle) * getattr(time, f"{name}_s")
    return energy


def watts(devices: Sequence[Device], activity: str) -> Floats:
    """Return what each device draws in an activity, ``float64 [N]``; NaN if not known.

    Args:
      devices: the devices of N clients.
      activity: ``busy``, ``sending``, ``receiving`` or ``idle``.
    """
    return np.array([getattr(device, f"{activity}_watts") for device in devices], float)
