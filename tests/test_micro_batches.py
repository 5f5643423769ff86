"""A batch in several parts: the same step, and what it changes."""

import functools
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

DENSE, MODEL = tiny_model((DenseLayer(6), DenseLayer(5))), tiny_model()
RATE = jnp.float32(1.0)
SMALL = {"max_train_samples": 48, "max_test_samples": 16, "num_clients": 2}


@functools.cache
def draw(model):
    return jax.jit(lambda: init_network(model, jax.random.key(0)))()


def step(model, parts, padding=()):
    """The client of cut 2 after a batch of 8 with some rows of padding.

    Its features of padding may be any finite numbers, and are 0 here.
    """
    optimizer = optax.scale(-1.0)  # the change of the weights is the gradient
    network = draw(model)
    spec = client_spec(model, 2, optimizer, micro_batches=parts)
    data = tiny_data(8)
    mask = jnp.array([row not in padding for row in range(8)])
    images = jnp.asarray(data.images, jnp.float32) / 255
    batch = Batch(images, jnp.asarray(data.labels), mask)
    run = jax.jit(functools.partial(branch_step, spec))
    client, features, metrics = run(init_client(network, 2, optimizer), batch, RATE)
    assert np.isfinite(features).all()
    mask = mask.reshape(-1, *[1] * (features.ndim - 1))
    return client, jnp.where(mask, features, 0), metrics


@pytest.mark.parametrize("padding", [(), (5, 6, 7), (0, 4, 5, 6, 7)])
@pytest.mark.parametrize("parts", [2, 4])
def test_without_batch_norm_the_parts_are_one_batch(parts, padding):
    """Weights, features and metrics, also where a part is padding alone."""
    for one, other in zip(
        jax.tree.leaves(step(DENSE, 1, padding)),
        jax.tree.leaves(step(DENSE, parts, padding)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_batch_norm_sees_each_part():
    """The running mean moves twice; a part of padding moves nothing."""
    (whole, *_), (halves, *_) = (step(MODEL, parts) for parts in (1, 2))
    means = [
        client.layers[0].batch_stats["BatchNorm_0"]["mean"]
        for client in (whole, halves)
    ]
    assert not np.allclose(*means)
    parts, alone = (step(MODEL, n, padding=(4, 5, 6, 7)) for n in (2, 1))
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(alone), strict=True):
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


@pytest.mark.slow
def test_a_run_in_micro_batches(tmp_path):
    """Its exits see other statistics of BatchNorm; loop and vmap agree.

    The last batch of a client has half of the rows, so one part is padding alone.
    """

    def losses(*flags):
        out = tmp_path / "".join(flags)
        words = ["train", "--network", "tiny", "--plugin", "tiny", "--batch-size", "8"]
        words += ["--rounds", "1", "--cuts", "2", "--num-clients", "2"]
        words += ["--max-train-samples", "40", "--max-test-samples", "16"]
        assert cli.main([*words, *flags, "--out", str(out)]) == 0
        record = json.loads((out / "metrics.jsonl").read_text())
        return [record["train"][f"{branch}_loss"] for branch in ("exit", "server")]

    whole, halves = losses(), losses("--micro-batches", "2")
    assert whole != halves
    np.testing.assert_allclose(whole, halves, atol=0.3)
    stacked = losses("--micro-batches", "2", "--client-axis", "vmap")
    np.testing.assert_allclose(halves, stacked, rtol=1e-4)


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
