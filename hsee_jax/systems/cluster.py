"""Clusters: clients made of several devices that share the layers up to the cut.

After CollaPipe (arXiv:2509.19855), see `hsee_jax.systems.pipeline`. The planner sees a
cluster as one device, whose seconds for each cut are those of the best pipeline.
"""

import functools
from typing import NamedTuple

import numpy as np

from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.devices import Device
from hsee_jax.systems.measured import Measured
from hsee_jax.systems.memory import parts_memory
from hsee_jax.systems.pipeline import split_layers
from hsee_jax.systems.quantities import Bools, Floats
from hsee_jax.systems.workload import exchange_s, part_seconds

_LAST = -1  # the device with the exit, which sends to the server


class Pipeline(NamedTuple):
    """How the devices of a cluster train the layers up to a cut."""

    ends: tuple[int, ...]  # device k holds the layers ends[k-1]+1 .. ends[k]
    micro_batches: int
    seconds: float  # of a batch, forward and backward


class Pipelines(NamedTuple):
    """The best pipeline of a cluster for each cut."""

    devices: tuple[Device, ...]  # in the order of the layers
    by_cut: tuple[Pipeline | None, ...]  # of cut 1..L; None where it does not fit


@functools.lru_cache(maxsize=256)
def best_pipelines(
    costs: tuple[LayerCost, ...],
    devices: tuple[Device, ...],
    *,
    batch_size: int,
    slots: int,
) -> Pipelines:
    """Return the fastest pipeline for each cut, over splits and micro-batches.

    The first device has the data and the last device the exit, so both hold at least
    one layer. Micro-batches are equal parts of a batch; each device keeps the
    activations of the whole batch.

    Args:
      costs: the costs of L layers, L exits and the final head.
      devices: the cluster's devices; the first has the data.
      batch_size: samples in a batch.
      slots: the optimizer's slots, see `optimizer_slots`.
    """
    count = len(costs) // 2
    seconds = np.array([sum(part_seconds(costs, d, batch_size)) for d in devices])
    found = []
    for cut in range(1, count + 1):
        layer_s = seconds[:, :cut].copy()
        layer_s[:, -1] += seconds[:, count + cut - 1]
        fits = _fits(costs, devices, cut, batch_size=batch_size, slots=slots)
        sizes = batch_size * np.array([cost.output_bytes for cost in costs[:cut]])
        options = []
        for parts in _divisors(batch_size):
            send_s = _send_seconds(devices, sizes / parts)
            stages = split_layers(
                layer_s / parts, send_s, micro_batches=parts, fits=fits
            )
            if stages is not None:
                options.append(Pipeline(stages.ends, parts, stages.seconds))
        found.append(min(options, key=lambda one: one.seconds, default=None))
    return Pipelines(devices, tuple(found))


def cluster_device(
    name: str, costs: tuple[LayerCost, ...], pipelines: Pipelines, *, batch_size: int
) -> Device:
    """Return the device that takes as long as the best pipeline of a cluster.

    It has the link of the last device, and draws what all devices draw together. Its
    energy is an upper bound if a device does one thing at a time, because it counts
    what draws most in each, transfers within the cluster included.

    Args:
      name: the cluster's name.
      costs: the costs of L layers, L exits and the final head.
      pipelines: see `best_pipelines`.
      batch_size: the batch size of the pipelines.
    """
    devices = pipelines.devices
    last = devices[_LAST]
    forward, backward = part_seconds(costs, last, batch_size)
    steps = tuple(0.0 if p is None else p.seconds for p in pipelines.by_cut)
    idle = [device.idle_watts for device in devices]
    others = sum(idle) - last.idle_watts
    return Device(
        name=name,
        forward_flops_per_s=last.forward_flops_per_s,
        backward_flops_per_s=last.backward_flops_per_s,
        up_bytes_per_s=last.up_bytes_per_s,
        down_bytes_per_s=last.down_bytes_per_s,
        message_overhead_s=last.message_overhead_s,
        busy_watts=sum(_most_watts(device) for device in devices),
        sending_watts=last.sending_watts + others,
        receiving_watts=last.receiving_watts + others,
        idle_watts=sum(idle),
        measured=Measured(
            batch_size,
            tuple(cost.name for cost in costs),
            tuple(forward.tolist()),
            tuple(backward.tolist()),
            client_step_s=steps,
        ),
    )


def _most_watts(device: Device) -> float:
    """Return what a device draws at most; NaN if any of its watts are not known."""
    watts = device.busy_watts, device.sending_watts, device.receiving_watts
    return float(np.max(watts))


def _fits(
    costs: tuple[LayerCost, ...],
    devices: tuple[Device, ...],
    cut: int,
    *,
    batch_size: int,
    slots: int,
) -> Bools:
    """Return whether device k can hold the layers a+1..b, at ``[k, a, b]``."""
    needed = np.zeros((cut + 1, cut + 1))
    for a in range(cut):
        for b in range(a + 1, cut + 1):
            parts = list(costs[a:b])
            if b == cut:
                parts.append(costs[len(costs) // 2 + cut - 1])
            needed[a, b] = parts_memory(parts, batch_size=batch_size, slots=slots)
    memory = np.array([device.memory_bytes for device in devices])
    fits = needed[None] <= memory[:, None, None]
    fits[0, 0, 0] = fits[_LAST, cut, cut] = False  # both hold a layer
    return fits


def _send_seconds(devices: tuple[Device, ...], sizes: Floats) -> Floats:
    """Return the seconds of a micro-batch's features and gradients, ``[K, cut]``.

    Each device passes features to the next device, and the gradients come back, even
    if one of both holds no layer.
    """
    rows = np.zeros((len(devices), len(sizes)))
    for k, (one, after) in enumerate(zip(devices, devices[1:], strict=False)):
        rows[k] = exchange_s(sizes, one, after)
    return rows


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
