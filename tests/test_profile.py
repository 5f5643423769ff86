"""The times of layers and steps on this machine, and the file that they go to."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import DenseLayer, tiny_federation, tiny_model

from hsee_jax import cli
from hsee_jax.core import Stage, UserError
from hsee_jax.nn import NETWORKS
from hsee_jax.systems import cut_seconds, layer_costs, read_devices
from hsee_jax.systems.profile import profile, time_call

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
WORDS = ["profile", "--network", "one_layer", "--cuts", "1", "--repeats", "1"]
FORWARD, BACKWARD = 0.02, 0.04  # seconds that a slow layer sleeps


@NETWORKS.register
def one_layer(*, num_classes, input_shape):
    """One dense layer."""
    return tiny_model((DenseLayer(4),), input_shape, num_classes)


def pause(seconds, x):
    def wait(x):
        time.sleep(seconds)
        return np.asarray(x)

    return jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@jax.custom_vjp
def slowly(x):
    return pause(FORWARD, x)


slowly.defvjp(
    lambda x: (slowly(x), None), lambda _, gradient: (pause(BACKWARD, gradient),)
)


def slow_stage(stage):
    def apply(variables, inputs, mask, *, train):
        outputs, stats = stage.apply(variables, inputs, mask, train=train)
        return slowly(outputs), stats

    return Stage(stage.init, apply)


def test_a_slow_layer_is_found():
    """The second of two layers sleeps, forward and backward."""
    model = tiny_model((DenseLayer(4),) * 2)
    first, second = model.stages
    model = model._replace(stages=(first, slow_stage(second)))
    times = profile(tiny_federation({0: 1}, model), 2, repeats=2)
    measured = times.measured()
    assert measured.parts == tuple(cost.name for cost in layer_costs(model))
    slow = [seconds >= FORWARD for seconds in measured.forward_s]
    assert slow == [False, True, False, False, False]
    assert np.argmax(measured.backward_s) == 1
    assert times.both[1].low >= FORWARD + BACKWARD
    step = FORWARD + BACKWARD
    assert [s >= step for s in measured.client_step_s] == [False, True]
    assert [s >= step for s in measured.server_step_s] == [True, False]


def test_calls_are_timed_in_the_median():
    calls = []

    def call():
        calls.append(1)
        time.sleep(0.03)
        return 0

    timing = time_call(call, repeats=3)
    assert len(calls) == 5  # two of them warm up
    assert 0.03 <= timing.low <= timing.median <= timing.high
    assert timing.spread == (timing.high - timing.low) / timing.median


def test_the_file_is_a_device(tmp_path, capsys):
    out = tmp_path / "me.toml"
    words = [*WORDS, "--batch-size", "4", "--name", "bench-µ-📱", "--out", str(out)]
    assert cli.main(words) == 0
    shown, log = capsys.readouterr()
    assert "hsee: compiling and timing the steps of cut 1" in log
    assert "final head" in shown and "ms of a batch of 4" in shown
    (device,) = read_devices(out).clients
    assert device.name == "bench-µ-📱" and device.measured.batch_size == 4
    assert device.memory_bytes > 1e8 and device.forward_flops_per_s > 0
    costs = layer_costs(one_layer(num_classes=10, input_shape=(28, 28, 1)))
    seconds = cut_seconds(costs, device, 8)
    both = seconds.client_forward + seconds.client_backward
    np.testing.assert_allclose(both, 2 * np.array(device.measured.client_step_s))
    larger = tuple(cost._replace(flops=2 * cost.flops) for cost in costs)
    with pytest.raises(
        UserError, match="MFLOPs a sample; this one takes .* without th"
    ):
        cut_seconds(larger, device, 8)
    older = dataclasses.replace(device.measured, flops=())  # of version 0.2
    cut_seconds(larger, dataclasses.replace(device, measured=older), 8)

    assert cli.main(words) == 2
    assert f"out: {out} exists; allowed is a new file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "out: missing; allowed is a new file"),
        (["--out", "me.csv"], "out: me.csv is not allowed; allowed is a name in .toml"),
        (["--out", "none/me.toml"], "out: none is not a folder"),
        (["--out", "me.toml", "--repeats", "0"], "repeats: 0 is not allowed"),
        (["--out", "me.toml", "--name", ""], "name: '' is not allowed"),
        (["--out", "me.toml", "--name", "a\udcff"], r"name: 'a\udcff' is not allowed"),
        (["--out", "me.toml", "--name", "a\x7f"], r"name: 'a\x7f' is not allowed"),
        (
            ["--out", "me.toml", "--micro-batches", "3"],
            "micro_batches: 3 is not allowed",
        ),
    ],
)
def test_errors_come_before_the_measurement(
    tmp_path, monkeypatch, capsys, words, error
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*WORDS, *words]) == 2
    assert error in capsys.readouterr().err


def test_flops_that_cannot_be_counted_come_before_the_measurement(
    tmp_path, monkeypatch, capsys, uncounted
):
    def nowhere(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", nowhere)
    assert cli.main([*WORDS, "--out", str(tmp_path / "me.toml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hsee: JAX_PLATFORMS: ") and error.count("\n") == 1


@pytest.mark.slow
def test_the_benchmark_writes_what_it_found(tmp_path):
    import bench_timing

    bench_timing.main(["--quick", "--network", "tiny", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("bench-timing-*.json")
    content = json.loads(path.read_text())
    assert {"backend", "device", "cpu_cores", "versions"} <= set(content["machine"])
    rows = content["rows"]
    places = {(row["strategy"], row["mix"]) for row in rows}
    assert len(rows) == len(places) == 6
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
        assert row["measured_low_s"] <= row["measured_s"] <= row["measured_high_s"]
