"""The costs of a federation: FLOPs and bytes, devices, and the seconds of a round."""

from hsee_jax.systems.accuracy import (
    Estimate,
    Predictor,
    Score,
    Trained,
    fit_accuracy,
)
from hsee_jax.systems.availability import Period, read_availability
from hsee_jax.systems.bandwidth import Division, divide_uplink
from hsee_jax.systems.bottleneck import fastest
from hsee_jax.systems.choice import choose
from hsee_jax.systems.clock import Clock, ClockTotals, RoundClock, clock_round
from hsee_jax.systems.cluster import Pipeline, Pipelines, best_pipelines
from hsee_jax.systems.comparison import compare, other_choices
from hsee_jax.systems.costs import LayerCost, layer_costs
from hsee_jax.systems.device_file import Cluster, Fleet, read_devices
from hsee_jax.systems.devices import Device, catalogue, find_device, make_device
from hsee_jax.systems.energy import joules
from hsee_jax.systems.intervals import Interval, Span, intervals
from hsee_jax.systems.measured import Measured
from hsee_jax.systems.memory import client_memory, optimizer_slots, server_memory
from hsee_jax.systems.outcome import Plan, evaluate_cuts
from hsee_jax.systems.pairing import Pair, plan_pairs
from hsee_jax.systems.pairs import (
    exact_pairs,
    fold_pairs,
    greedy_pairs,
    pair_seconds,
    slowest_pair_s,
    weak_share,
)
from hsee_jax.systems.pipeline import (
    Stages,
    best_micro_batches,
    ideal_micro_batches,
    pipeline_s,
    split_layers,
)
from hsee_jax.systems.planner import Limits, plan_cuts
from hsee_jax.systems.problem import Problem, cut_costs
from hsee_jax.systems.quantities import CutCosts, Totals, totals
from hsee_jax.systems.replanning import (
    RoundsPlan,
    device_in_round,
    plan_rounds,
)
from hsee_jax.systems.timing import RoundTime, Shares, round_time
from hsee_jax.systems.traffic import (
    Bytes,
    Traffic,
    bytes_by_cut,
    round_bytes,
    traffic_of,
    training_bytes,
)
from hsee_jax.systems.tuning import Tuning, tune
from hsee_jax.systems.work import Schedule, Work, schedule_of
from hsee_jax.systems.workload import (
    CutSeconds,
    cut_seconds,
    traffic_by_cut,
    workload,
)

__all__ = [
    "Tuning",
    "tune",
    "Bytes",
    "Cluster",
    "Clock",
    "ClockTotals",
    "CutCosts",
    "CutSeconds",
    "Device",
    "Division",
    "Estimate",
    "Fleet",
    "Interval",
    "LayerCost",
    "Limits",
    "Measured",
    "Pair",
    "Pipeline",
    "Pipelines",
    "Period",
    "Plan",
    "Predictor",
    "Problem",
    "RoundClock",
    "RoundTime",
    "RoundsPlan",
    "Schedule",
    "Score",
    "Shares",
    "Span",
    "Stages",
    "Totals",
    "Traffic",
    "Trained",
    "Work",
    "best_micro_batches",
    "best_pipelines",
    "bytes_by_cut",
    "catalogue",
    "choose",
    "client_memory",
    "clock_round",
    "compare",
    "cut_costs",
    "cut_seconds",
    "device_in_round",
    "divide_uplink",
    "evaluate_cuts",
    "exact_pairs",
    "fastest",
    "find_device",
    "fit_accuracy",
    "fold_pairs",
    "greedy_pairs",
    "ideal_micro_batches",
    "intervals",
    "joules",
    "layer_costs",
    "make_device",
    "optimizer_slots",
    "other_choices",
    "pair_seconds",
    "pipeline_s",
    "plan_cuts",
    "plan_pairs",
    "plan_rounds",
    "read_availability",
    "read_devices",
    "round_bytes",
    "round_time",
    "schedule_of",
    "server_memory",
    "slowest_pair_s",
    "split_layers",
    "totals",
    "traffic_by_cut",
    "traffic_of",
    "training_bytes",
    "weak_share",
    "workload",
]
