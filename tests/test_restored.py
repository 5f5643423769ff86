"""Runs restored without their data, on other devices, and client by client."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_run

import hsee_jax
from hsee_jax import restored, runs
from hsee_jax.base import Batch, UserError
from hsee_jax.checkpoint import load
from hsee_jax.config import override, preset, to_json
from hsee_jax.data import dataset_info
from hsee_jax.folder import read_config

SMALL = override(
    preset("demo"),
    num_clients=5,
    cuts=("3", "1"),
    max_train_samples=60,
    max_test_samples=20,
    batch_size=6,
    rounds=1,
    schedule="constant",
)
pytestmark = pytest.mark.usefixtures("tiny_network")


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(params=["averaging", "sequential"])
def folder(request, tiny_network, tmp_path):
    write_run(tmp_path / "run", override(SMALL, strategy=request.param))
    return tmp_path / "run"


def test_branches_are_found_by_the_ids_of_clients(folder):
    """Clients 1 and 3 have cut 1, the first group; 0, 2 and 4 have cut 3."""
    run = hsee_jax.restore(str(folder))
    assert [group.ids for group in run.federation.groups] == [(1, 3), (0, 2, 4)]
    for i, group, member in ((3, 0, 1), (2, 1, 1), (4, 1, 2)):
        client = jax.tree.map(lambda leaf, m=member: leaf[m], run.state.clients[group])
        assert_same(run.client(i), client)
        cut = len(client.layers)
        server = run.server(i)
        if run.strategy.shared:  # of the layers from the lowest cut on
            (shared,) = run.state.servers
            assert_same(server.layers, shared.layers[cut - 1 :])
        else:
            own = jax.tree.map(lambda leaf, m=member: leaf[m], run.state.servers[group])
            assert_same(server, own)
        assert [len(spec.stages) for spec in run.specs(i)] == [cut, 3 - cut]
    for find in (run.client, run.server, run.network, run.specs):
        with pytest.raises(UserError, match=r"^client: 5 is not .* allowed are 0\.\.4"):
            find(5)


def test_the_whole_network_of_a_client_answers_and_trains(folder):
    run = hsee_jax.restore(folder)
    network = run.network(3)
    spec = hsee_jax.server_spec(run.federation.model, 0, run.federation.optimizer)
    images = jax.random.normal(jax.random.key(0), (8, 28, 28, 1))
    batch = Batch(images, jnp.arange(8), jnp.ones(8, bool))
    answer = jax.jit(partial(hsee_jax.forward, train=False), static_argnums=0)
    client_spec, server_spec = run.specs(3)
    features, _, _ = answer(client_spec, run.client(3), images, batch.mask)
    _, expected, _ = answer(server_spec, run.server(3), features, batch.mask)
    _, logits, _ = answer(spec, network, images, batch.mask)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)

    step = jax.jit(partial(hsee_jax.branch_step, spec))
    losses = []
    for _ in range(20):
        network, _, metrics = step(network, batch, 0.02)
        losses.append(float(metrics.loss_sum))
    assert losses[-1] < 0.7 * losses[0]


def test_one_client_is_read_alone(folder, monkeypatch):
    whole, targets = hsee_jax.restore(folder), []

    def spy(checkpoint, like):
        targets.append(like)
        return load(checkpoint, like)

    monkeypatch.setattr(restored, "load", spy)
    spec, branch = hsee_jax.restore_client(folder, 3)
    assert_same(branch, whole.client(3))
    assert len(spec.stages) == len(branch.layers) == 1
    paths = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(targets[0])
        if leaf is not ...
    }
    stack = jax.tree.leaves(whole.state.clients[0])
    assert len(paths) == 1 + len(stack)
    assert all(path == ".round" or path.startswith(".clients[0]") for path in paths)
    state = hsee_jax.restore(folder, only=3).state
    assert all(leaf is ... for leaf in jax.tree.leaves(state.servers))
    with pytest.raises(UserError, match="client: -1 is not in the run"):
        hsee_jax.restore_client(folder, -1)


def test_the_best_checkpoint_or_none(folder):
    write_run(folder, read_config(folder), rounds=2)  # with a lower score
    assert int(hsee_jax.restore(folder).state.round) == 2
    assert int(hsee_jax.restore(folder, "best").state.round) == 1
    with pytest.raises(UserError, match="did you mean best"):
        hsee_jax.restore(folder, "bset")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint"):
        hsee_jax.restore(folder)
    with pytest.raises(UserError, match="is not a run"):
        hsee_jax.restore(folder / "nowhere")


def test_a_run_is_restored_without_its_data(tmp_path):
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images = rng.integers(0, 256, (40, 28, 28, 1), np.uint8)
        np.savez(data / split, images=images, labels=np.arange(40) % 10)
    config = override(SMALL, dataset="npz", data_dir=str(data))
    runs.train(config, folder)
    _, state = runs.reopen(folder)
    info = hsee_jax.restore(folder).info
    assert info == dataset_info(config.data)
    facts = folder / "data.json"
    text = facts.read_text()
    for damaged in ("", "[1]", '{"mean": 0}', text[:-9], text.replace("28", '"wide"')):
        facts.write_text(damaged)
        with pytest.raises(UserError, match="data.json is missing or damaged") as error:
            hsee_jax.restore(folder)
        assert "\n" not in str(error.value)
    facts.unlink()
    with pytest.raises(UserError, match="data.json is missing or damaged"):
        hsee_jax.restore(folder)
    runs.train(config, folder, resume=True)  # writes it anew

    shutil.rmtree(data)
    run = hsee_jax.restore(folder)
    assert run.info == info
    assert_same(run.state, state)
    with pytest.raises(UserError, match="data_dir"):
        runs.reopen(folder)


ONE_DEVICE = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax, numpy as np
import hsee_jax, hsee_jax.experiment
from hsee_jax.config import from_dict
from tiny import tiny_model
model = tiny_model(input_shape=(28, 28, 1), classes=10)
hsee_jax.experiment.build_model = lambda *args: model
assert jax.device_count() == 1
np.savez("leaves", *jax.tree.leaves(hsee_jax.restore("eight").state))
hsee_jax.train(from_dict({config!r}), Path("one"))
"""


def test_eight_devices_to_one_and_back(tmp_path, request):
    """Read on one what eight wrote; trained on by eight what one began."""
    config = override(SMALL, client_axis="vmap", rounds=2)
    runs.train(config, tmp_path / "eight")
    assert jax.device_count() == 8
    _, spread = runs.reopen(tmp_path / "eight")
    assert len(spread.clients[0].head.params["Dense_0"]["bias"].devices()) == 8
    begun = override(config, client_axis="auto", rounds=1)
    stored = json.loads(to_json(begun))
    code = ONE_DEVICE.format(tests=str(request.path.parent), config=stored)
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        check=True,
    )
    eight = hsee_jax.restore(tmp_path / "eight").state
    with np.load(tmp_path / "leaves.npz") as leaves:
        assert_same(jax.tree.leaves(eight), list(leaves.values()))
    for stack, slots in zip(eight.clients, spread.clients, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b[: len(a)]), stack, slots
        )
    runs.train(config, tmp_path / "one", resume=True)
    one = hsee_jax.restore(tmp_path / "one").state
    assert int(one.round) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, eight
    )
