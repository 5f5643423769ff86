"""The division of an uplink that several clients share.

After CollaPipe (arXiv:2509.19855) and EPSL (arXiv:2303.15991): the last upload ends
earliest if all uploads end together, so the end ``tau`` solves
``sum_i bytes_i / (tau - start_i) = bandwidth``. Limits of each client's own link are
ours, and so are clients that cannot send all at once.
"""

from typing import NamedTuple

import numpy as np

from hsee_jax.systems.quantities import Floats


class Division(NamedTuple):
    """The rate of each client, and the second at which the last upload ends."""

    bytes_per_s: Floats  # [N]
    seconds: float


def divide_uplink(
    up_bytes: Floats,
    start_s: Floats,
    bandwidth: float,
    *,
    link_bytes_per_s: Floats | float = np.inf,
) -> Division:
    """Divide an uplink so that the last upload ends as early as possible.

    Args:
      up_bytes: the bytes of each client's upload, ``[N]``; or ``[R, N]``, where each
        row is what a client still has to send from a second on, such as all or the
        last batch.
      start_s: the second at which each client can start to send, of the same shape.
      bandwidth: bytes per second of all clients together.
      link_bytes_per_s: the most that each client's own link takes, ``[N]`` or one
        number.

    Raises:
      ValueError: the bandwidth is not above 0.
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth: {bandwidth}; allowed is more than 0")
    sizes, starts = np.atleast_2d(up_bytes, start_s)

    def rates(end: float) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sizes > 0, sizes / (end - starts), 0.0).max(axis=0)

    from scipy.optimize import brentq  # slow to import

    earliest = float(np.max(starts + sizes / link_bytes_per_s))
    if rates(earliest).sum() <= bandwidth:
        return Division(rates(earliest), earliest)
    most = float(sizes.max(axis=0).sum())
    latest = earliest + (1 + 1e-9) * most / bandwidth
    end = brentq(
        lambda end: bandwidth / rates(end).sum() - 1, earliest, latest, xtol=1e-12
    )
    return Division(rates(end), float(end))
