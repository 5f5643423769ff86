"""Clients made of several devices: their pipelines, and the plan that shows them."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsee_jax import cli
from hsee_jax.systems import Device, LayerCost, make_device, read_devices
from hsee_jax.systems.cluster import best_pipelines, cluster_device
from hsee_jax.systems.workload import cut_seconds

FLEET = """
devices = [
  {name = "alone", forward_flops_per_s = 1e7, up_bytes_per_s = 1e6},
  {cluster = "room", name = "cam", forward_flops_per_s = 2e6, up_bytes_per_s = 1e8},
  {cluster = "room", name = "hub", forward_flops_per_s = 4e6, up_bytes_per_s = 1e8},
]
server = {name = "cloud", forward_flops_per_s = 1e8}
"""
FLAGS = ["--network", "tiny", "--plugin", "tiny", "--batch-size", "8"]
FLAGS += ["--max-train-samples", "32"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_pipelines_equal_brute_force(seed):
    """Every split and number of micro-batches of a batch of four, in memory."""
    rng = np.random.default_rng(seed)
    layers, count = 4, int(rng.integers(1, 4))
    parts = [
        LayerCost(str(i), *rng.integers(1, 9, 4).tolist())
        for i in range(2 * layers + 1)
    ]
    devices = tuple(
        make_device(
            {
                "name": "d",
                "forward_flops_per_s": rng.exponential(5.0) + 0.5,
                "up_bytes_per_s": rng.exponential(5.0) + 0.5,
                "message_overhead_s": rng.exponential(0.3),
                "memory_bytes": float(rng.integers(50, 400)),
            }
        )
        for _ in range(count)
    )

    def seconds(cut, ends, batches):
        """Sum stages of alpha + beta / M; both ways go over the slower link."""
        stages = []
        for k, (a, b) in enumerate(itertools.pairwise((0, *ends))):
            held = [*parts[a:b], *([parts[layers + cut - 1]] if a < b == cut else [])]
            memory = sum(8 * p.parameters for p in held)
            memory += 4 * sum(max(p.kept_bytes, p.output_bytes) for p in held)
            if memory > devices[k].memory_bytes or (a == b and k in (0, count - 1)):
                return math.inf
            alpha = 0.0
            beta = 4 * 3 * sum(p.flops for p in held) / devices[k].forward_flops_per_s
            if b < cut:  # a device without layers passes on what it receives
                one, after = devices[k], devices[k + 1]
                rate = min(one.up_bytes_per_s, after.up_bytes_per_s)
                alpha += 2 * (one.message_overhead_s + after.message_overhead_s)
                beta += 4 * 2 * parts[b - 1].output_bytes / rate
            stages.append(alpha + beta / batches)
        return sum(stages) + (batches - 1) * max(stages)

    found = best_pipelines(tuple(parts), devices, batch_size=4, slots=0)
    for cut, pipeline in enumerate(found.by_cut, start=1):
        inner = itertools.combinations_with_replacement(range(cut + 1), count - 1)
        best = min(
            seconds(cut, (*ends, cut), batches)
            for ends in inner
            for batches in (1, 2, 4)
        )
        if pipeline is None:
            assert best == math.inf
        else:
            assert pipeline.seconds == pytest.approx(best)
            again = seconds(cut, pipeline.ends, pipeline.micro_batches)
            assert again == pytest.approx(best)


def test_a_cluster_takes_the_seconds_of_its_pipelines(tmp_path):
    """One device alone is a cluster, and takes what the device takes."""
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    fleet = read_devices(path)
    assert [device.name for device in fleet.clients] == ["alone", "room"]
    (room,) = fleet.clusters
    assert room.client == 1
    assert [device.name for device in room.devices] == ["cam", "hub"]
    costs = tuple(LayerCost(str(i), 1, 10 * i + 10, 8, 8) for i in range(7))
    for devices in (room.devices, room.devices[:1]):
        pipelines = best_pipelines(costs, devices, batch_size=6, slots=1)
        one = cluster_device("room", costs, pipelines, batch_size=6)
        found = cut_seconds(costs, one, 6)
        for cut, pipeline in enumerate(pipelines.by_cut):
            if pipeline is not None:
                both = found.client_forward[cut] + found.client_backward[cut]
                assert both == pytest.approx(pipeline.seconds)
    alone = cut_seconds(costs, room.devices[0], 6)
    np.testing.assert_allclose(found.client_forward, alone.client_forward)


def test_the_energy_of_a_cluster_bounds_what_its_devices_do():
    """Radios draw most: one device computes, the other gets its features by radio."""
    watts = {"sending_watts": 0.6, "receiving_watts": 0.3, "idle_watts": 0.1}
    cam, hub = (Device(n, 1e3, 1e3, 10, 10, **watts, busy_watts=0.2) for n in "ab")
    costs = tuple(LayerCost(str(i), 1, 10, 80, 80) for i in range(7))
    pipelines = best_pipelines(costs, (cam, hub), batch_size=1, slots=1)
    one = cluster_device("room", costs, pipelines, batch_size=1)
    step = pipelines.by_cut[1]
    assert step.ends == (1, 2) and step.micro_batches == 1
    radio = 2 * 80 / 10  # features, and gradients
    compute = step.seconds - radio
    assert compute < 0.01 * radio
    used = (0.6 + 0.3) * radio + (0.2 + 0.1) * compute
    assert used <= one.busy_watts * step.seconds <= 2 * used
    for watts in ("busy_watts", "sending_watts"):
        unknown = dataclasses.replace(cam, **{watts: math.nan})
        pipelines = best_pipelines(costs, (unknown, hub), batch_size=1, slots=1)
        room = cluster_device("r", costs, pipelines, batch_size=1)
        assert math.isnan(room.busy_watts)


def test_the_plan_shows_the_layers_of_each_device(tmp_path, capsys):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    flags = ["plan", *FLAGS, "--devices", str(fleet), "--out", str(tmp_path / "plan")]
    flags += ["--strategy", "sequential"]
    assert cli.main([*flags, "--min-cut", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "clusters: devices that form one client" in shown
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [client["device"] for client in written["clients"]] == ["alone", "room"]
    (room,) = written["clusters"]
    assert (room["client"], room["name"]) == (1, "room")
    layers = [device["layers"] for device in room["devices"]]
    assert sum(layers, []) == [1, 2, 3]
    assert all(layers)
    assert 8 % room["micro_batches"] == 0

    held = [client["memory_bytes"] for client in written["clients"]]
    parts = ["--min-cut", "3", "--micro-batches", "4"]
    assert cli.main([*flags, *parts]) == 0
    again = json.loads((tmp_path / "plan" / "plan.json").read_text())
    lower = [client["memory_bytes"] for client in again["clients"]]
    assert lower[0] < held[0] and lower[1] == held[1]  # not of the pipeline

    small = tmp_path / "small.toml"
    few = '"cam", memory_bytes = 100.0,'
    small.write_text(FLEET.replace('"cam",', few))
    for words, message in (
        (["--max-memory", "1e9"], "max_memory: is not allowed with clusters"),
        (["--strategy", "fedavg"], "devices: a cluster does not fit the strategy"),
        (["--devices", str(small)], "cluster room (client 1) cannot hold any cut"),
    ):
        assert cli.main([*flags, *words]) == 2
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
