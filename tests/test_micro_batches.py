"""A batch in several parts: the same step, and what it changes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import TINY, DenseLayer, tiny_data, tiny_model

from hsee_jax import cli
from hsee_jax.config import override, preset
from hsee_jax.core import Batch, UserError
from hsee_jax.federation.branch import client_spec, init_client
from hsee_jax.federation.step import branch_step
from hsee_jax.nn.model import init_network
from hsee_jax.runs.build import build

RATE = jnp.float32(1.0)
SMALL = {"max_train_samples": 48, "max_test_samples": 16, "num_clients": 2}


def step(model, parts, padding=()):
    """The client of cut 2 after a batch of 8 with some rows of padding."""
    optimizer = optax.scale(-1.0)  # the change of the weights is the gradient
    network = init_network(model, jax.random.key(0))
    spec = client_spec(model, 2, optimizer, micro_batches=parts)
    data = tiny_data(8)
    mask = jnp.array([row not in padding for row in range(8)])
    images = jnp.asarray(data.images, jnp.float32) / 255
    batch = Batch(images, jnp.asarray(data.labels), mask)
    return branch_step(spec, init_client(network, 2, optimizer), batch, RATE)


@pytest.mark.parametrize("padding", [(), (5, 6, 7), (0, 4, 5, 6, 7)])
@pytest.mark.parametrize("parts", [2, 4])
def test_without_batch_norm_the_parts_are_one_batch(parts, padding):
    """Weights, features and metrics, also where a part is padding alone."""
    model = tiny_model((DenseLayer(6), DenseLayer(5)))
    for one, other in zip(
        jax.tree.leaves(step(model, 1, padding)),
        jax.tree.leaves(step(model, parts, padding)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_batch_norm_sees_each_part():
    """The running mean moves twice; a part of padding moves nothing."""
    (whole, *_), (halves, *_) = (step(tiny_model(), parts) for parts in (1, 2))
    means = [
        client.layers[0].batch_stats["BatchNorm_0"]["mean"]
        for client in (whole, halves)
    ]
    assert not np.allclose(*means)
    (first, *_) = step(tiny_model(), 2, padding=(4, 5, 6, 7))
    (alone, *_) = step(tiny_model(), 1, padding=(4, 5, 6, 7))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_micro_batches_that_do_not_fit_are_refused():
    config = override(
        preset("demo"), **TINY, **SMALL, cuts=("2",), batch_size=8, micro_batches=3
    )
    with pytest.raises(UserError, match="3 is not allowed; allowed are divisors of"):
        build(config)
    joint = override(config, micro_batches=2, boundary="joint")
    with pytest.raises(UserError, match="2 has no effect without a detached boundary"):
        build(joint)


def test_a_run_in_micro_batches(tmp_path):
    """Its exits learn from other statistics of BatchNorm, its batches are as many."""
    losses, images = [], []
    for parts in ("1", "2"):
        words = ["train", "--network", "tiny", "--plugin", "tiny", "--batch-size", "8"]
        words += ["--rounds", "1", "--cuts", "2", "--out", str(tmp_path / parts)]
        words += [
            w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))
        ]
        assert cli.main([*words, "--micro-batches", parts]) == 0
        record = json.loads((tmp_path / parts / "metrics.jsonl").read_text())
        losses.append(record["train"]["exit_loss"])
        images.append(record["images"])
    assert images[0] == images[1]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.3


def test_micro_batches_save_memory_in_a_plan(tmp_path):
    fleet = tmp_path / "fleet.csv"
    fleet.write_text("device,count\njetson-nano,2\n")
    memory = []
    for parts in ("1", "4"):
        words = ["plan", "--network", "tiny", "--plugin", "tiny", "--batch-size", "8"]
        words += ["--min-cut", "3", "--devices", str(fleet), "--out", str(tmp_path)]
        assert cli.main([*words, "--micro-batches", parts]) == 0
        written = json.loads((tmp_path / "plan.json").read_text())
        memory.append(written["clients"][0]["memory_bytes"])
    assert memory[1] < memory[0]
