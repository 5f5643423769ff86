"""The costs of a federation: FLOPs and bytes, devices, and the seconds of a round."""

from hsee_jax.systems.costs import LayerCost, layer_costs
from hsee_jax.systems.device_file import Fleet, read_devices
from hsee_jax.systems.devices import Device, catalogue, find_device, make_device
from hsee_jax.systems.energy import joules
from hsee_jax.systems.intervals import Interval, Span, intervals
from hsee_jax.systems.measured import Measured
from hsee_jax.systems.memory import client_memory, optimizer_slots, server_memory
from hsee_jax.systems.timing import RoundTime, Shares, round_time
from hsee_jax.systems.traffic import (
    Bytes,
    Traffic,
    bytes_by_cut,
    round_bytes,
    traffic_of,
    training_bytes,
)
from hsee_jax.systems.work import Schedule, Work, schedule_of
from hsee_jax.systems.workload import (
    CutSeconds,
    cut_seconds,
    traffic_by_cut,
    workload,
)

__all__ = [
    "Bytes",
    "CutSeconds",
    "Device",
    "Fleet",
    "Interval",
    "LayerCost",
    "Measured",
    "RoundTime",
    "Schedule",
    "Shares",
    "Span",
    "Traffic",
    "Work",
    "bytes_by_cut",
    "catalogue",
    "client_memory",
    "cut_seconds",
    "find_device",
    "intervals",
    "joules",
    "layer_costs",
    "make_device",
    "optimizer_slots",
    "read_devices",
    "round_bytes",
    "round_time",
    "schedule_of",
    "server_memory",
    "traffic_by_cut",
    "traffic_of",
    "training_bytes",
    "workload",
]
