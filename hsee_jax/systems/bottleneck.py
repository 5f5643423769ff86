"""The fastest cuts where the slowest part of a round decides: an exact sweep.

A detached round takes ``max(max_i own_i, sum_i server_i / workers)`` seconds. If no
client may take longer than a threshold, each client does best with the cut that
leaves the server least to do among its cuts up to the threshold. So the best of the
at most N L thresholds gives the best choice, without a solver.
"""

import numpy as np

from hsee_jax.systems.quantities import Bools, Floats, Ints


def fastest(
    own_s: Floats, server_s: Floats, allowed: Bools, *, workers: int = 1
) -> Ints:
    """Return the cuts of the round that ends first, ``int64 [N]`` from 1 to L.

    Args:
      own_s: the seconds of each client at each cut, ``[N, L]``.
      server_s: the seconds of the server for each client at each cut, ``[N, L]``.
      allowed: whether the client may take the cut, ``[N, L]``; at least one for each.
      workers: the clients that the server works for at once.
    """
    own = np.where(allowed, own_s, np.inf)
    order = np.argsort(own, axis=1, kind="stable")
    thresholds = np.take_along_axis(own, order, axis=1)
    least = np.minimum.accumulate(np.take_along_axis(server_s, order, axis=1), axis=1)
    # How much a client changes the server's sum as the threshold passes each cut.
    steps = np.diff(least, axis=1, prepend=0.0)
    real = np.isfinite(thresholds)
    passes = np.argsort(thresholds[real], kind="stable")
    seconds = thresholds[real][passes]
    sums = np.cumsum(steps[real][passes]) / workers
    last = np.append(seconds[1:] > seconds[:-1], True)  # of equal thresholds
    everyone = seconds >= thresholds[:, 0].max()
    ends = np.where(last & everyone, np.maximum(seconds, sums), np.inf)
    threshold = seconds[np.argmin(ends)]
    return np.where(own <= threshold, server_s, np.inf).argmin(axis=1) + 1
