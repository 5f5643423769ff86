"""Exact exits: the sums of clients, the solution, and a run with fitted exits."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, tiny_model, write_run

from hsee_jax import cli, restore
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.data import write_npz
from hsee_jax.federation import forward, gram, merge, solve
from hsee_jax.federation.last_layer import find_last, last_inputs
from hsee_jax.federation.ridge import RIDGE, TARGET
from hsee_jax.nn import NETWORKS, Head, from_linen
from hsee_jax.runs import evaluate, read_history, refit, reopen, train
from hsee_jax.runs.build import build
from hsee_jax.runs.folder import read_config

CLASSES = 5


def samples(count=200, size=7):
    """Features of which one is a sum of two others, and labels that depend on them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    features = rng.normal(size=(count, size)) + rng.normal(size=(CLASSES, size))[labels]
    features[:, -1] = features[:, 0] + features[:, 1]
    return features, labels


def by_label(features, labels):
    """One client a label, the most skewed partition there is."""
    return [(features[labels == k], labels[labels == k]) for k in range(CLASSES)]


def of_clients(features, labels):
    parts = by_label(features, labels)
    return [gram(*part, num_classes=CLASSES) for part in parts]


def rows_of(features):
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)


def targets_of(labels):
    return np.where(np.eye(CLASSES)[labels] == 1, np.log(19), -np.log(19))


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_clients_with_one_label_each_give_what_the_pooled_samples_give(ridge):
    """Of the pooled samples as a least-squares problem of its own, without sums."""
    features, labels = samples()
    weights, bias = solve(merge(of_clients(features, labels)), ridge)
    centred = features - features.mean(axis=0)
    penalty = ridge * len(features) * features.var(axis=0).mean()
    shrink = np.sqrt(penalty) * np.eye(features.shape[1])
    targets = targets_of(labels)
    goal = np.concatenate([targets - targets.mean(axis=0), 0 * shrink[:, :CLASSES]])
    expected = np.linalg.lstsq(np.concatenate([centred, shrink]), goal, rcond=None)[0]
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    np.testing.assert_allclose(
        bias, (targets - features @ expected).mean(axis=0), atol=1e-12
    )
    pooled = solve(gram(features, labels, num_classes=CLASSES), ridge)
    np.testing.assert_allclose(weights, pooled[0], atol=1e-12)
    assert TARGET == pytest.approx(2.944, abs=5e-4)


def test_the_sums_are_those_of_merged_singular_value_decompositions():
    """Each client sends U S, and the merged factor is again a U S."""
    features, labels = samples()
    factors = []
    for own, _ in by_label(features, labels):
        left, values, _ = np.linalg.svd(rows_of(own).T, full_matrices=False)
        factors.append(left * values)
    left, values, _ = np.linalg.svd(np.concatenate(factors, axis=1))
    merged = merge(of_clients(features, labels))
    expected = (left[:, : len(values)] * values**2) @ left[:, : len(values)].T
    np.testing.assert_allclose(merged.gram, expected, rtol=1e-12, atol=1e-10)
    moment = rows_of(features).T @ targets_of(labels)
    np.testing.assert_allclose(merged.moment, moment, rtol=1e-12, atol=1e-10)
    assert merged.samples == 200
    assert merged.nbytes == 8 * (8 * 9 // 2 + 8 * CLASSES)


def test_features_that_do_not_vary_get_no_weight():
    features, labels = samples()
    features[:] = 3.0
    weights, bias = solve(gram(features, labels, num_classes=CLASSES), 0.0)
    np.testing.assert_allclose(weights, 0, atol=1e-12)
    np.testing.assert_allclose(bias, targets_of(labels).mean(axis=0), atol=1e-12)


class TwoLinear(nn.Module):
    """Two linear layers of the same shape; the first comes later in the tree."""

    @nn.compact
    def __call__(self, x, mask, *, train):
        x = x.mean(axis=(1, 2))
        x = nn.relu(nn.Dense(CLASSES, name="z_first")(x))
        return nn.Dense(CLASSES, name="a_second")(x)


class Curved(nn.Module):
    """A head whose logits are not linear in any layer of it."""

    classes: int = CLASSES

    @nn.compact
    def __call__(self, x, mask, *, train):
        pooled = x.reshape(x.shape[0], -1, x.shape[-1]).mean(axis=1)
        return nn.tanh(nn.Dense(self.classes)(pooled))


def curved(*, num_classes, input_shape):
    """A network with exits that cannot be fitted."""
    head = from_linen(Curved(num_classes))
    return tiny_model(input_shape=input_shape)._replace(
        exit_heads=(head,) * 3, final_head=head
    )


if "curved" not in NETWORKS:  # this module may be imported under two names
    NETWORKS.register(curved)


def drawn(head, seed=0):
    """Inputs ``[3, 4, 4, 6]``, and variables with no leaf that is 0."""
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.normal(size=(3, 4, 4, 6)), jnp.float32)
    variables = head.init(jax.random.key(seed), inputs)
    noise = jax.tree.map(
        lambda leaf: jnp.asarray(abs(rng.normal(size=leaf.shape)), leaf.dtype),
        variables,
    )
    return inputs, noise


def test_what_the_last_layer_reads():
    inputs, mask = drawn(from_linen(TwoLinear()))[0], jnp.ones(3, bool)
    shape = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
    pooled = inputs.mean(axis=(1, 2))
    head = from_linen(Head(CLASSES, False, jnp.dtype("float32")))
    assert find_last(head, shape) == ("linear",)
    found = last_inputs(head, drawn(head)[1], ("linear",), inputs, mask)
    np.testing.assert_allclose(found, pooled, rtol=1e-6)
    head = from_linen(TwoLinear())
    assert find_last(head, shape) == ("a_second",)
    variables = drawn(head)[1]
    first = variables["params"]["z_first"]
    found = last_inputs(head, variables, ("a_second",), inputs, mask)
    expected = nn.relu(pooled @ first["kernel"] + first["bias"][None])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(UserError, match="network: its exits cannot be fitted"):
        find_last(from_linen(Curved()), shape)


CONFIG = override(
    preset("demo"),
    **TINY,
    num_clients=5,
    cuts=("1", "2"),
    max_train_samples=200,
    max_test_samples=30,
    batch_size=16,
    validation_share=0.1,
    partition="dirichlet",
    alpha=0.2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run before its first round, in which all clients hold the same layers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    experiment = build(CONFIG)
    state = experiment.store.to_checkpoint(experiment.init())
    write_run(folder, CONFIG, state=state)
    (folder / "metrics.jsonl").write_text("")
    return folder


def exit_inputs(experiment, restored, i, cut):
    """What the exit of client i reads of all training samples, and their labels."""
    data = jax.device_get(experiment.train)
    inputs = (np.asarray(data.images, np.float32) / 255 - 0.286) / 0.353
    spec, client = restored.specs(i)[0], restored.client(i)
    mask = jnp.ones(len(inputs), bool)
    features = forward(spec, client, jnp.asarray(inputs), mask, train=False)[0]
    return np.asarray(features).mean(axis=(1, 2)), np.asarray(data.labels)


def test_an_exit_is_fitted_to_the_samples_of_all_who_hold_its_layers(run, tmp_path):
    """Clients 0, 2, 4 have cut 1, so the two with cut 2 hold their layer as well."""
    out = tmp_path / "refit"
    found = refit(run, out, ridge=0.01)
    assert [fit.senders for fit in found.exits] == [(0, 2, 4, 1, 3), (1, 3)]
    assert [fit.clients for fit in found.exits] == [(0, 2, 4), (1, 3)]
    experiment, _ = reopen(run)
    before, after = restore(run), restore(out)
    for fit in found.exits:
        i = fit.clients[0]
        features, labels = exit_inputs(experiment, before, i, fit.cut)
        rows = np.concatenate([experiment.shards[j] for j in fit.senders])
        sums = gram(features[rows], labels[rows], num_classes=10)
        weights, bias = solve(sums, 0.01)
        for j in fit.clients:
            layer = after.client(j).head.params["Dense_0"]
            np.testing.assert_allclose(layer["kernel"], weights, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(layer["bias"], bias, rtol=1e-3, atol=1e-3)
        size = features.shape[1] + 1
        assert fit.samples == len(rows)
        assert fit.up_bytes == len(fit.senders) * 8 * (
            size * (size + 1) // 2 + size * 10
        )
        assert fit.down_bytes == len(fit.clients) * 4 * size * 10
    for i in range(5):  # nothing else has changed
        jax.tree.map(
            np.testing.assert_array_equal,
            (before.client(i).layers, before.server(i)),
            (after.client(i).layers, after.server(i)),
        )
    assert evaluate(out)[1].to_json() == found.after.to_json()
    assert evaluate(run)[1].to_json() == found.before.to_json()
    stored = json.loads((out / "refit.json").read_text())
    assert stored["link"] == found.link._asdict()
    assert found.after.mean_exit_accuracy > found.before.mean_exit_accuracy


def test_a_client_with_layers_of_its_own_fits_its_exit_alone(run, tmp_path):
    """It sends nothing; a broken client keeps its exit, and one without samples too."""
    experiment, state = reopen(run)
    first, second = state.clients
    kernel = first.layers[0].params["Conv_0"]["kernel"]
    changed = np.array(kernel)
    changed[0] += 0.1  # of client 0
    changed[1] = np.nan  # of client 2
    layer = first.layers[0]
    layer = layer.replace(
        params={**layer.params, "Conv_0": {"kernel": jnp.asarray(changed)}}
    )
    state = state.replace(clients=(first.replace(layers=(layer,)), second))
    shards = {**experiment.shards, 3: experiment.shards[3][:0]}
    found, fits = experiment._replace(shards=shards).refit_exits(state, 0.01)
    assert [(fit.clients, fit.senders) for fit in fits] == [
        ((0,), (0,)),
        ((4,), (4, 1)),
        ((1, 3), (1,)),
    ]
    assert fits[0].up_bytes == fits[0].down_bytes == 0
    assert fits[1].up_bytes > 0 < fits[1].down_bytes
    heads = [one.clients[0].head.params for one in (state, found)]
    same = jax.tree.map(lambda a, b: np.all(a == b, axis=-1), *heads)
    assert same["Dense_0"]["bias"].tolist() == [False, True, False]


def test_the_command_and_what_can_be_done_with_its_folder(run, tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "fitted"
    shutil.copytree(run, folder)
    assert cli.main(["refit", str(folder), "--out", str(out), "--ridge", "0.01"]) == 0
    assert "bytes sent once: " in capsys.readouterr().out
    assert cli.main(["gate", str(out), "--target-offload", "0.5"]) == 0
    assert cli.main(["export", str(out), "--client", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["refit", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "refit/refit.json").read_text())
    assert found["ridge"] != 0.01
    for words, message in (
        ([], "out: "),
        (["--out", str(out)], "exists already; allowed is a new folder"),
        (["--ridge", "-1"], "ridge: -1.0 is not allowed; allowed is 0 or more"),
    ):
        assert cli.main(["refit", str(folder), *words]) == 2
        assert message in capsys.readouterr().err


def test_the_new_folder_says_what_the_run_began_from(run, tmp_path):
    """The file of weights itself is needed no more."""
    folder, weights = tmp_path / "run", str(tmp_path / "gone.safetensors")
    shutil.copytree(run, folder)
    config = override(CONFIG, pretrained=weights)
    (folder / "config.json").write_text(to_json(config))
    refit(folder)
    assert read_config(folder / "refit").model.pretrained == weights
    assert read_history(folder / "refit").settings["pretrained"] == weights


def test_a_fit_needs_the_records_of_all_rounds(tmp_path):
    """Without them, nobody could go on with the new run."""
    write_run(tmp_path, CONFIG, rounds=2)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl has 0 lines for 2 rounds"):
        refit(tmp_path)
    assert not (tmp_path / "refit").exists()


def test_a_fit_that_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = sorted(path.name for path in folder.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hsee_jax.runs.checkpoint_writer.compute_digests", full)
        with pytest.raises(UserError, match="No space left .*; nothing is kept"):
            refit(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    refit(folder)
    assert (folder / "refit" / "refit.json").is_file()


def test_the_folder_of_the_data_is_kept_whole(tmp_path, monkeypatch):
    """A run and its fit may be opened from anywhere."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 8, 8, 1), np.uint8), np.arange(60) % 10
    write_npz(tmp_path / "own", (x, y, x[:20], y[:20]))
    config = override(
        preset("demo"),
        **TINY | {"num_clients": 2, "cuts": ("1",), "rounds": 1, "dataset": "npz"},
        data_dir=str(tmp_path / "own"),
    )
    train(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    refit("run", data_dir="own")
    kept = read_config(tmp_path / "run" / "refit").data.data_dir
    assert kept == str((tmp_path / "own").resolve())


def test_exits_are_fitted_in_training(tmp_path, capsys):
    """After round 2 of 3: its record is that of a run of two rounds, then a fit."""
    config = override(CONFIG, batch_size=64, rounds=2, eval_every=1)
    config = override(config, num_clients=2, cuts=("1",))
    config = override(config, schedule="constant", warmup_rounds=0.0)
    plain = train(config, tmp_path / "plain")
    fitted = refit(tmp_path / "plain", ridge=RIDGE)
    config = override(config, rounds=3, refit_exits_every=2)
    train(config, tmp_path / "run")
    first, second, third = read_history(tmp_path / "run").records
    plain_run, refit_run = map(
        read_history, (tmp_path / "plain", tmp_path / "plain/refit")
    )
    assert refit_run.records[-1].test == fitted.after  # which reports show
    assert refit_run.settings == plain_run.settings | {"refit": RIDGE}
    before = plain_run.records
    assert first.test == before[0].test
    assert second.test == fitted.after != plain.scores
    assert refit_run.records[-1].link == second.link
    assert second.link == tuple(map(sum, zip(before[1].link, fitted.link, strict=True)))
    assert third.link == first.link
    words = "--network curved --plugin test_refit --refit-exits-every 1"
    common = "--num-clients 1 --cuts 1 --max-train-samples 10 --max-test-samples 4"
    place = ["--out", str(tmp_path / "curved")]
    assert cli.main(["train", *words.split(), *common.split(), *place]) == 2
    assert "network: its exits cannot be fitted" in capsys.readouterr().err
    assert not (tmp_path / "curved").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["--client-axis loop", "--client-axis vmap", "--participation 0.5"]
)
def test_a_run_with_fits_goes_on_as_if_it_had_not_stopped(options, tmp_path):
    words = (
        "train --network tiny --plugin tiny --num-clients 5 --cuts 1 2 --batch-size 6 "
        "--max-train-samples 60 --max-test-samples 20 --average all_holders "
        "--schedule constant --refit-exits-every 1 --eval-every 1 --checkpoint-every 1"
    )

    def figures(name, *more):
        words_of = [*words.split(), *options.split(), "--out", str(tmp_path / name)]
        assert cli.main([*words_of, *more]) == 0
        records = read_history(tmp_path / name).records
        return [(record.test, record.link) for record in records]

    whole = figures("whole", "--rounds", "3")
    assert figures("parts", "--rounds", "2") == whole[:2]
    assert figures("parts", "--rounds", "3", "--resume") == whole
