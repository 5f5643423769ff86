"""From costs, bytes and devices to the numbers that `round_time` takes.

A device computes a part's forward FLOPs at its ``forward_flops_per_s``, and twice as
many in the backward pass at its ``backward_flops_per_s``: as many for the gradient of
the inputs, and as many for that of the weights [ours]. This counts the gradient of the
images, which the first layer does not need, and leaves out the optimizer's update.
Where a device has measured seconds, these count instead, in proportion to the batch
size.

Where clients share gradients, the server's backward pass shares rows in each layer
among all clients that have the layer behind their cut. The gradient for all clients of
a cut takes its time on each of their links, and its bytes are divided among them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.federation.federation import Client, Federation, Group, group_clients
from hsee_jax.federation.strategy import Strategy
from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.devices import Device
from hsee_jax.systems.quantities import Floats
from hsee_jax.systems.traffic import Traffic, gradient_rows, traffic_of
from hsee_jax.systems.work import Work

BACKWARD_FLOPS = 2.0  # of a part's backward pass, relative to its forward pass


class CutSeconds(NamedTuple):
    """Seconds of a batch on a device for each cut 1..L, ``float64 [L]``."""

    client_forward: Floats  # layers up to the cut, and the exit behind it
    client_backward: Floats
    server_forward: Floats  # layers behind the cut, and the final head
    server_backward: Floats


@functools.lru_cache(maxsize=4096)
def cut_seconds(
    costs: tuple[LayerCost, ...],
    device: Device,
    batch_size: int,
    *,
    exit_at_end: bool = False,
) -> CutSeconds:
    """Return the seconds of a batch on a device, as client and as server of each cut.

    Args:
      costs: the costs of L layers, L exits and the final head, see `layer_costs`.
      device: the device that computes.
      batch_size: samples in a batch.
      exit_at_end: whether the network has the exit behind layer L alone, which is
        then a part of the server's side at every cut.

    Raises:
      UserError: the device was measured with another network.
    """
    parts = part_seconds(costs, device, batch_size)
    seconds = _by_cut(*parts)
    asked = _by_cut(*map(_exit_at_end, parts)) if exit_at_end else seconds
    measured = device.measured
    if measured is None:
        return asked
    scale = batch_size / measured.batch_size
    client = _factor(measured.client_step_s, scale, seconds[:2])
    server = _factor(measured.server_step_s, scale, seconds[2:])
    factors = (client, client, server, server)
    return CutSeconds(*(s * f for s, f in zip(asked, factors, strict=True)))


def part_seconds(
    costs: Sequence[LayerCost], device: Device, batch_size: int
) -> tuple[Floats, Floats]:
    """Return the seconds of both passes of a batch in each part, ``[2 L + 1]`` each.

    Args:
      costs: the costs of L layers, L exits and the final head.
      device: the device that computes.
      batch_size: samples in a batch.

    Raises:
      UserError: the device was measured with another network.
    """
    measured = device.measured
    if measured is None:
        flops = batch_size * np.array([cost.flops for cost in costs], float)
        forward = flops / device.forward_flops_per_s
        return forward, BACKWARD_FLOPS * flops / device.backward_flops_per_s
    names = tuple(cost.name for cost in costs)
    if measured.parts != names:
        raise UserError(
            f"measured: {device.name} was measured with the parts "
            f"{', '.join(measured.parts)}; allowed are those of this network, "
            f"{', '.join(names)}, or an entry without the table measured"
        )
    flops = np.array([cost.flops for cost in costs], float)
    if measured.flops and not np.allclose(measured.flops, flops, rtol=0.05):
        raise UserError(
            f"measured: {device.name} was measured with a network of these parts and "
            f"{sum(measured.flops) / 1e6:,.1f} MFLOPs a sample; this one takes "
            f"{flops.sum() / 1e6:,.1f}; allowed is the same network, or an entry "
            "without the table measured"
        )
    scale = batch_size / measured.batch_size
    return (
        scale * np.array(measured.forward_s),
        scale * np.array(measured.backward_s),
    )


def _by_cut(forward: Floats, backward: Floats) -> CutSeconds:
    """Sum the seconds of the 2 L + 1 parts over the parts of each cut."""
    count = len(forward) // 2

    def client(parts: Floats) -> Floats:
        return np.cumsum(parts[:count]) + parts[count:-1]

    def server(parts: Floats) -> Floats:
        behind = np.cumsum(parts[:count][::-1])[::-1]  # from layer l on
        return np.append(behind[1:], 0.0) + parts[-1]

    return CutSeconds(
        client(forward), client(backward), server(forward), server(backward)
    )


def _exit_at_end(parts: Floats) -> Floats:
    """Add the seconds of the last exit to the final head, and those of no other."""
    count = len(parts) // 2
    return np.concatenate(
        [parts[:count], np.zeros(count), parts[-2:].sum(keepdims=True)]
    )


def _factor(
    steps: Sequence[float], scale: float, passes: tuple[Floats, ...]
) -> Floats | float:
    """Return the factor by which both passes last as long as the measured steps."""
    if not steps:
        return 1.0
    return scale * np.array(steps) / np.maximum(sum(passes), np.finfo(float).tiny)


def traffic_by_cut(
    federation: Federation, make: Callable[[Federation], Strategy], cuts: Iterable[int]
) -> dict[int, Traffic]:
    """Return the traffic of the clients at each cut under an algorithm.

    Args:
      federation: gives the network, the codec, the optimizer and the ids of the
        clients; their own cuts do not matter.
      make: makes the algorithm's strategy for a federation, such as a function of
        `hsee_jax.algorithms`.
      cuts: the cuts.

    Raises:
      UserError: the algorithm does not take such a cut.
    """
    found = {}
    everyone = tuple(client.id for client in federation.clients)
    for cut in cuts:
        alone = federation._replace(groups=group_clients([Client(0, cut)]), mesh=None)
        strategy = make(alone)
        state = jax.eval_shape(strategy.init, jax.random.key(0))
        together = alone._replace(groups=(Group(cut, everyone),))
        (found[cut],) = traffic_of(together, strategy, state)
    return found


def workload(
    costs: Sequence[LayerCost],
    traffic: Mapping[int, Traffic],
    cuts: Sequence[int],
    devices: Sequence[Device],
    server: Device,
    *,
    batch_size: int,
    steps: int | Sequence[int],
    boundary: str = "detached",
    gradient_share: float = 0.0,
) -> Work:
    """Return what the clients do in a round.

    Args:
      costs: the costs of L layers, L exits and the final head.
      traffic: the traffic of the clients at each of the cuts, see `traffic_by_cut`.
      cuts: the cut of each of N clients, by id.
      devices: the device of each client. One client that holds all the data, as with
        ``centralized``, runs on the device that is given here.
      server: the server's device; its link does not matter, the clients' links count.
      batch_size: samples in a client's batch; a last batch that is smaller counts as a
        whole one.
      steps: batches in the round, one number for all clients or one for each.
      boundary: see `Strategy`; with ``"none"`` a client computes the server's layers.
      gradient_share: see `Strategy` and `_gradients_sent`; every link takes its time.

    Raises:
      UserError: a device was measured with another network.
    """
    costs, counts = tuple(costs), Counter(cuts)
    share_of = functools.partial(_gradients_sent, gradient_share, batch_size)
    behind = cut_seconds(costs, server, batch_size)
    back = _backward_shares(part_seconds(costs, server, batch_size)[1], cuts, share_of)
    rows = []
    for client, (cut, device) in enumerate(zip(cuts, devices, strict=True)):
        own = cut_seconds(costs, device, batch_size)
        forward, backward, *remote = (float(seconds[cut - 1]) for seconds in own)
        served = float(behind.server_forward[cut - 1])
        served += float(back[cut - 1] * behind.server_backward[cut - 1])
        if boundary == "none":
            forward, backward, served = forward + remote[0], backward + remote[1], 0.0
        _, sample, weights, _ = traffic[cut].of(client)
        up, down = batch_size * sample.up_bytes, batch_size * sample.down_bytes
        rows.append(
            (
                forward,
                backward,
                _transfer(up, device.up_bytes_per_s, device),
                served,
                _transfer(down, device.down_bytes_per_s, device),
                _transfer(weights, device.up_bytes_per_s, device),
                _transfer(weights, device.down_bytes_per_s, device),
                up,
                down * share_of(counts[cut]),
                weights,
            )
        )
    fields = np.array(rows, float).reshape(len(rows), 10).T
    return Work(np.broadcast_to(np.asarray(steps), len(rows)), *fields).arrays()


def _gradients_sent(share: float, batch_size: int, clients: int) -> float:
    """Return the rows of gradient for each row of a client, see `gradient_rows`.

    All clients count as present with whole batches. Where some are not, these are too
    few, and so are the bytes and the server's work.
    """
    rows = gradient_rows(share, batch_size, clients, batch_size, batch_size)
    return rows / batch_size


def _backward_shares(
    backward: Floats, cuts: Sequence[int], share_of: Callable[[int], float]
) -> Floats:
    """Return which part of the server's backward pass counts for a client, ``[L]``.

    Args:
      backward: the seconds of the server in each part, ``[2 L + 1]``.
      cuts: the cuts of all clients.
      share_of: returns the rows for each row of a client, of so many that share them.
    """
    count = len(backward) // 2
    seconds = np.append(backward[:count], backward[-1])  # layers and the final head
    clients = (np.asarray(cuts)[:, None] <= np.arange(count + 1)).sum(axis=0)
    shares = np.array([share_of(max(number, 1)) for number in clients.tolist()])

    def behind(values: Floats) -> Floats:
        return np.cumsum(values[::-1])[::-1][1:]

    return behind(shares * seconds) / np.maximum(behind(seconds), np.finfo(float).tiny)


def exchange_s(sizes: Floats, one: Device, other: Device) -> Floats:
    """Return the seconds of messages between two devices, there and back."""
    there = sizes / min(one.up_bytes_per_s, other.down_bytes_per_s)
    back = sizes / min(other.up_bytes_per_s, one.down_bytes_per_s)
    return there + back + 2 * (one.message_overhead_s + other.message_overhead_s)


def _transfer(size: float, bytes_per_s: float, device: Device) -> float:
    """Return the seconds of a message; 0 without bytes, as there is no message then."""
    return device.message_overhead_s + size / bytes_per_s if size else 0.0
