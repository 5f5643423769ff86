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
from tiny import TINY, noise_state, write_run

import hsee_jax
from hsee_jax import cli, runs
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Batch
from hsee_jax.federation import branch_step, forward, server_spec
from hsee_jax.runs.checkpoint import load
from hsee_jax.runs.data import build_info

SMALL = override(
    preset("demo"),
    **TINY,
    num_clients=5,
    cuts=("3", "1"),
    max_train_samples=60,
    max_test_samples=20,
    batch_size=6,
    rounds=1,
    schedule="constant",
)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "run", SMALL)
    return tmp_path / "run"


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_branches_are_found_by_the_ids_of_clients(strategy, tmp_path):
    """Clients 1 and 3 have cut 1, the first group; 0, 2 and 4 have cut 3."""
    write_run(tmp_path, override(SMALL, strategy=strategy))
    run = hsee_jax.restore(str(tmp_path))
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


@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
@pytest.mark.parametrize("features", [2, 8])
def test_weights_of_another_shape_are_refused(strategy, features, tmp_path):
    """Orbax itself would cut them, or fill them up with zeros."""
    config = override(SMALL, strategy=strategy)
    write_run(tmp_path, config)
    other = override(config, features=features)
    (tmp_path / "config.json").write_text(to_json(other))
    with pytest.raises(
        UserError, match=r"cannot be read: .* has the shape \["
    ) as found:
        hsee_jax.restore(tmp_path)
    assert "\n" not in str(found.value)


def test_a_restored_run_shows_its_clients_and_no_weights(folder):
    text = repr(hsee_jax.restore(folder))
    assert text.startswith("Restored(strategy=") and len(text) < 200


def test_the_whole_network_of_a_client_answers_and_trains(folder):
    run = hsee_jax.restore(folder)
    network = run.network(3)
    spec = server_spec(run.federation.model, 0, run.federation.optimizer)
    images = jax.random.normal(jax.random.key(0), (8, 28, 28, 1))
    batch = Batch(images, jnp.arange(8), jnp.ones(8, bool))
    answer = partial(forward, mask=batch.mask, train=False)

    @jax.jit
    def answers(network, client, server):
        first, behind = run.specs(3)
        features, _, _ = answer(first, client, images)
        return [answer(spec, network, images), answer(behind, server, features)]

    (_, logits, _), (_, expected, _) = answers(network, run.client(3), run.server(3))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)

    step = jax.jit(partial(branch_step, spec))
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

    monkeypatch.setattr(sys.modules["hsee_jax.runs.restore"], "load", spy)
    spec, branch = runs.restore_client(folder, 3)
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
        runs.restore_client(folder, -1)


def test_what_was_not_read_is_named(folder):
    """Client 1 has the cut of client 3, client 0 another."""
    run = hsee_jax.restore(folder, only=3)
    images = np.zeros((2, 28, 28, 1), np.uint8)
    assert_same(run.client(1), hsee_jax.restore(folder).client(1))
    for read in (
        lambda: run.client(0),
        lambda: run.server(3),
        lambda: run.network(3),
        lambda: hsee_jax.inference.predict(run, 3, images),
    ):
        with pytest.raises(UserError, match="only: .* allowed is `restore` without"):
            read()


def test_the_best_checkpoint_or_none(folder, capsys):
    write_run(folder, SMALL, rounds=2)  # with a lower score
    assert int(hsee_jax.restore(folder).state.round) == 2
    assert int(hsee_jax.restore(folder, "best").state.round) == 1
    first = hsee_jax.restore(folder, 1).state
    assert_same(first, hsee_jax.restore(folder, "best").state)
    assert runs.evaluate(folder, "2") == runs.evaluate(folder)
    with pytest.raises(UserError, match="3 is unknown; .* latest, best, 1, 2"):
        hsee_jax.restore(folder, 3)
    capsys.readouterr()
    assert cli.main(["eval", str(folder), "--checkpoint", "bset"]) == 2
    assert "did you mean best?" in capsys.readouterr().err
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
    state = write_run(folder, config)
    info = build_info(config.data)
    shutil.rmtree(data)
    run = hsee_jax.restore(folder)
    assert run.info == info
    assert_same(run.state, state)
    with pytest.raises(UserError, match="data_dir"):
        runs.reopen(folder)


def test_without_what_is_known_of_the_data_there_is_one_line(tmp_path):
    write_run(tmp_path, SMALL)
    path = tmp_path / "data.json"
    text = path.read_text()
    known = json.loads(text)
    wrong = ({"num_classes": 0}, {"std": [0.0]}, {"std": [-1.0]}, {"std": [np.nan]})
    for damaged in (
        *("", "[1]", '{"mean": 0}', text[:-9], text.replace("28", '"wide"')),
        *(json.dumps(known | values) for values in wrong),
    ):
        path.write_text(damaged)
        with pytest.raises(UserError, match="data.json is missing or damaged") as error:
            hsee_jax.restore(tmp_path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match="data.json is missing or damaged"):
        hsee_jax.restore(tmp_path)


ONE_DEVICE = """
import sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
import hsee_jax
assert jax.device_count() == 1
np.savez("leaves", *jax.tree.leaves(hsee_jax.restore("eight").state))
"""


def assert_spread(state, whole):
    """Over eight slots a group, of which the first are those of ``whole``."""
    for stacks, wholes in (
        (state.clients, whole.clients),
        (state.servers, whole.servers),
    ):
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(stacks)} == {8}
        first = jax.tree.map(lambda leaf, other: leaf[: len(other)], stacks, wholes)
        assert_same(first, wholes)


def test_eight_devices_to_one(tmp_path, request):
    config = override(SMALL, client_axis="vmap")
    assert jax.device_count() == 8
    state = jax.tree.map(
        lambda leaf, like: jax.device_put(np.resize(leaf, like.shape), like.sharding),
        noise_state(config),
        hsee_jax.build(config).store.checkpoint_shapes(),
    )
    write_run(tmp_path / "eight", config, state=state)
    code = ONE_DEVICE.format(tests=str(request.path.parent))
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        check=True,
    )
    whole = hsee_jax.restore(tmp_path / "eight").state
    assert_spread(state, whole)
    with np.load(tmp_path / "leaves.npz") as leaves:
        assert_same(jax.tree.leaves(whole), list(leaves.values()))


def test_one_device_to_eight(tmp_path):
    state = write_run(tmp_path, override(SMALL, client_axis="vmap"))
    _, spread = runs.reopen(tmp_path)
    assert_spread(spread, state)


@pytest.mark.slow
def test_eight_devices_train_on_what_one_began(tmp_path):
    config = override(SMALL, rounds=2, learning_rate=0.01, client_axis="vmap")
    runs.train(config, tmp_path / "eight")
    runs.train(override(config, client_axis="loop", rounds=1), tmp_path / "one")
    (tmp_path / "one" / "data.json").unlink()
    runs.train(config, tmp_path / "one", resume=True)  # writes it anew
    one, eight = (hsee_jax.restore(tmp_path / name).state for name in ("one", "eight"))
    assert int(one.round) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, eight
    )
