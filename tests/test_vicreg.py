"""Clients that learn without labels: the loss, a step, a round and a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounds
from rounds import KEY, assert_same, branches
from tiny import (
    CLASSES,
    PIPELINE,
    THREE_ROUNDS,
    ConvLayer,
    DenseLayer,
    tiny_data,
    tiny_federation,
    tiny_model,
    tiny_shards,
)
from torch_networks import import_torch

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.algorithms import sequential, vicreg
from hsee_jax.config import override
from hsee_jax.core import Batch, Dataset, UserError
from hsee_jax.core.types import NO_LABEL
from hsee_jax.data import AUGMENTATIONS, labelled
from hsee_jax.engine.refit import Samples, refit_exits
from hsee_jax.federation import detached_step, forward, unlabelled_step
from hsee_jax.link import unpack_bytes
from hsee_jax.nn import masked_vicreg
from hsee_jax.runs import reopen
from hsee_jax.runs.material import shares
from hsee_jax.runs.planning import Resources, planning
from hsee_jax.runs.served import build_served
from hsee_jax.systems.device_file import read_devices

WHO = jnp.int32(0)
NOISE = PIPELINE._replace(augment=AUGMENTATIONS.make("noise"))
DESCENT = optax.scale(-1.0)  # the change of the weights is the gradient
RATE = jnp.float32(1.0)


def plain_vicreg(one, other):
    """The loss as a sum over features and pairs of features, in float64."""
    one, other = np.float64(one), np.float64(other)
    size, total = one.shape[1], 25 * np.mean((one - other) ** 2)
    for copy in (one, other):
        cov = np.cov(copy, rowvar=False).reshape(size, size)
        missing = [max(0.0, 1 - np.sqrt(cov[j, j] + 1e-4)) for j in range(size)]
        total += 25 * np.mean(missing) / 2
        total += sum(
            cov[j, k] ** 2 / size for j in range(size) for k in range(size) if j != k
        )
    return total


def copies_of(count, size, seed=0):
    rng = np.random.default_rng(seed)
    one = rng.normal(size=(count, size)) * rng.uniform(0.2, 2, size)
    other = one + 0.3 * rng.normal(size=one.shape)
    return np.float32(one), np.float32(other)


@pytest.mark.parametrize("padding", [0.0, 1e3, np.nan])
def test_the_loss_is_that_of_the_real_rows(padding):
    one, other = copies_of(7, 5)
    mask = np.arange(7) < 4
    expected = plain_vicreg(one[:4], other[:4])
    one[4:], other[4:] = padding, -padding

    def loss(copies):
        return masked_vicreg(*copies, jnp.asarray(mask))

    value, slopes = jax.jit(jax.value_and_grad(loss))((one, other))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for copy, slope in zip((one, other), slopes, strict=True):
        assert not slope[4:].any()
        for at in ((0, 1), (3, 4)):  # the slope of a real number
            low, high = [], []
            for change, found in ((-1e-2, low), (1e-2, high)):
                moved = copy.copy()
                moved[at] += change
                pair = (moved, other) if copy is one else (one, moved)
                found.append(plain_vicreg(*(rows[:4] for rows in pair)))
            expected = (high[0] - low[0]) / 2e-2
            np.testing.assert_allclose(slope[at], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_the_loss_and_its_gradient_are_those_of_torch():
    torch = import_torch()
    pair = [torch.tensor(copy, requires_grad=True) for copy in copies_of(9, 6, seed=1)]
    total = 25 * torch.nn.functional.mse_loss(*pair)
    for copy in pair:
        cov = torch.cov(copy.T)
        deviations = torch.sqrt(copy.var(dim=0) + 1e-4)
        total = total + 25 * torch.relu(1 - deviations).mean() / 2
        total = total + (cov.square().sum() - cov.diagonal().square().sum()) / 6
    total.backward()
    copies = tuple(jnp.asarray(copy.detach().numpy()) for copy in pair)
    value, slopes = jax.value_and_grad(masked_vicreg, (0, 1))(
        *copies, jnp.ones(9, bool)
    )
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    for slope, copy in zip(slopes, pair, strict=True):
        np.testing.assert_allclose(slope, copy.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_good_features_have_no_loss_and_collapsed_ones_have():
    """Columns of +-1 that are orthogonal and have mean 0; then a single constant."""
    signs = np.array([[1, 1], [1, -1]])
    columns = np.kron(np.kron(signs, signs), signs)[:, 1:].astype(np.float32)
    good = jnp.asarray(columns)
    assert float(masked_vicreg(good, good, jnp.ones(8, bool))) == 0
    flat = jnp.ones((8, 7), jnp.float32)
    collapsed = masked_vicreg(flat, flat, jnp.ones(8, bool))
    np.testing.assert_allclose(collapsed, 25 * (1 - 0.01), rtol=1e-6)
    no_rows = masked_vicreg(flat, flat, jnp.zeros(8, bool))
    assert np.isfinite(no_rows)


FEDERATION = tiny_federation({0: 2, 1: 1})._replace(optimizer=DESCENT)


def batch_of(labels, mask=(True, True, True, True, True, False)):
    """Two copies of six samples of noise."""
    copies = np.random.default_rng(0).normal(size=(6, 2, 5, 5, 1))
    return Batch(
        jnp.asarray(copies, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(mask),
    )


SOME = batch_of([2, NO_LABEL, 0, NO_LABEL, NO_LABEL, 1])
NONE = batch_of([NO_LABEL] * 6)


@pytest.fixture(scope="module")
def pair():
    """A client at cut 2, its server, and one step of them as a function of a batch."""
    state = jax.jit(vicreg(FEDERATION).init)(KEY)
    client = jax.tree.map(lambda leaf: leaf[0], state.clients[1])
    server = state.servers[0].replace(layers=state.servers[0].layers[1:])
    specs = FEDERATION.specs(1)
    step = jax.jit(
        lambda batch: detached_step(
            *specs, client, server, batch, (RATE, RATE), train=unlabelled_step
        )
    )
    return client, server, step


def params_of(parts):
    return [part.params for part in parts]


def same(one, other):
    return all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


def test_layers_follow_the_copies_and_the_exit_the_labels(pair):
    """Both gradients, each by itself; padding is in neither."""
    client, _, step = pair
    spec = FEDERATION.specs(1)[0]
    inputs = jnp.concatenate([SOME.inputs[:5, 0], SOME.inputs[:5, 1]])

    def run(layers, head):
        parts = zip((*client.layers, client.head), (*layers, head), strict=True)
        *own, own_head = [part.replace(params=p) for part, p in parts]
        branch = client.replace(layers=tuple(own), head=own_head)
        return forward(spec, branch, inputs, jnp.ones(10, bool), train=True)

    def copy_loss(layers):
        means = run(layers, client.head.params)[0].mean(axis=(1, 2))
        return masked_vicreg(means[:5], means[5:], jnp.ones(5, bool)) / 25

    def exit_loss(head):
        logits = run(params_of(client.layers), head)[1][jnp.array([0, 2])]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.array([2, 0])
        ).mean()

    after, _, metrics = step(SOME)
    old = params_of(client.layers), client.head.params
    slopes = jax.grad(copy_loss)(old[0]), jax.grad(exit_loss)(old[1])
    expected = jax.tree.map(jnp.subtract, old, slopes)
    found = params_of(after.layers), after.head.params
    assert_same(found, expected, rtol=1e-4, atol=1e-5)
    assert (int(metrics.exit.count), int(metrics.server.count)) == (2, 2)
    np.testing.assert_allclose(metrics.exit.loss_sum, 2 * exit_loss(old[1]), rtol=1e-5)


def test_the_server_learns_from_rows_with_labels_alone(pair):
    """It is the step of two rows; only they cross the link, each with its label."""
    client, server, step = pair
    spec = FEDERATION.specs(1)[0]
    _, after, metrics = step(SOME)
    _, rows, _ = jax.jit(lambda b: unlabelled_step(spec, client, b, RATE))(SOME)
    assert rows.mask.tolist() == [True, False, True, False, False, False]
    up, down = unpack_bytes(np.asarray(metrics.link))
    assert (int(up), int(down)) == (2 * (4 * rows.inputs[0].size + 4), 0)
    kept = np.flatnonzero(rows.mask)

    def loss(params):
        values = rows.inputs[kept]
        parts = (*server.layers, server.head)
        stages = (*FEDERATION.specs(1)[1].stages, FEDERATION.model.final_head)
        for stage, part, own in zip(stages, parts, params, strict=True):
            variables = {"params": own, "batch_stats": part.batch_stats}
            values, _ = stage.apply(variables, values, jnp.ones(2, bool), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(
            values, rows.labels[kept]
        ).mean()

    old = params_of((*server.layers, server.head))
    expected = jax.tree.map(jnp.subtract, old, jax.grad(loss)(old))
    found = params_of((*after.layers, after.head))
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


def test_labels_do_not_reach_the_layers(pair):
    client, server, step = pair
    changed = SOME._replace(labels=jnp.where(SOME.labels == 2, 1, SOME.labels))
    results = [step(batch) for batch in (SOME, changed, NONE)]
    for other in results[1:]:
        assert same(results[0][0].layers, other[0].layers)
        assert not same(results[0][0].head, other[0].head)
    assert not same(results[0][0].layers, client.layers)
    without = results[2]
    assert same((without[0].head, without[1]), (client.head, server))
    assert not np.asarray(without[2].link).any()
    assert int(without[2].exit.count) == int(without[2].server.count) == 0


def test_a_step_refuses_what_is_not_finite_and_skips_padding(pair):
    client, server, step = pair
    padding = SOME._replace(mask=jnp.zeros(6, bool))
    broken = SOME._replace(inputs=SOME.inputs.at[1, 1].set(jnp.nan))
    for batch, loss in ((padding, 0.0), (broken, np.nan)):
        after, _, metrics = step(batch)
        assert same(after, client)
        np.testing.assert_array_equal(metrics.exit.loss_sum, loss)
    assert same(step(padding)[1], server)


def test_copies_are_draws_of_their_own():
    data, rows, mask = tiny_data(), jnp.arange(4), jnp.ones(4, bool)
    one = NOISE.training(KEY, data, rows, mask, WHO)
    two = NOISE._replace(copies=2).training(KEY, data, rows, mask, WHO)
    assert two.inputs.shape == (4, 2, *one.inputs.shape[1:])
    plain = NOISE.evaluation(data, rows, mask, WHO).inputs
    drawn = np.asarray(two.inputs - plain[:, None])
    assert not np.array_equal(drawn[:, 0], drawn[:, 1])
    np.testing.assert_allclose(drawn.std(), 0.3, rtol=0.2)
    np.testing.assert_array_equal(one.labels, two.labels)


def test_each_client_has_a_share_of_labels():
    parts = [np.arange(10), np.arange(10, 13), np.arange(13, 14)]
    found = labelled(parts, 0.3, seed=0)
    assert [len(own) for own in found] == [3, 1, 1]
    for own, part in zip(found, parts, strict=True):
        assert set(own) <= set(part) and (np.diff(own) > 0).all()
    other = labelled(parts, 0.3, seed=1)
    assert not np.array_equal(found[0], other[0])
    # another client changes nothing
    np.testing.assert_array_equal(labelled(parts[:1], 0.3, seed=0)[0], found[0])
    for own, part in zip(labelled(parts, 1.0, seed=0), parts, strict=True):
        np.testing.assert_array_equal(own, part)


SIZES = {4: 7, 1: 3, 6: 4}
SMALL = tiny_model((DenseLayer(8), DenseLayer(5)))


def partly_labelled():
    """The samples of `tiny_data`, of which two in three have no label."""
    data = tiny_data()
    labels = np.where(np.arange(len(data.labels)) % 3, NO_LABEL, data.labels)
    return Dataset(data.images, labels.astype(np.int32))


@pytest.mark.parametrize(
    "turn",
    [
        "batch",
        pytest.param("epoch", marks=pytest.mark.slow),
        pytest.param("together", marks=pytest.mark.slow),
    ],
)
def test_all_forms_of_the_engine_agree_without_labels(turn, monkeypatch):
    monkeypatch.setattr(rounds, "tiny_data", partly_labelled)
    federation = tiny_federation({4: 1, 1: 2, 6: 1}, SMALL)
    shards, results = tiny_shards(SIZES), []
    for axis in ("loop", "vmap"):
        own = vicreg(federation, turn=turn)
        state, log = rounds.train(
            own, federation, shards, axis=axis, rounds=1, pipeline=NOISE
        )
        results.append((branches(federation, own, state), log[0][2]))
    assert_same(*results, rtol=1e-3, atol=1e-5)
    known = partly_labelled().labels[np.concatenate(list(shards.values()))]
    count = (known != NO_LABEL).sum()
    metrics = results[0][1]
    assert metrics.exit.count.sum() == metrics.server.count.sum() == count > 0


def test_the_second_copy_and_the_clients_layers_count():
    """Other noise gives other layers; by default clients share what they learn."""
    federation = tiny_federation({4: 1, 1: 1}, SMALL)
    shards = tiny_shards({4: 8, 1: 4})

    def layers(strategy, pipeline=NOISE):
        state, _ = rounds.train(
            strategy, federation, shards, axis="loop", rounds=1, pipeline=pipeline
        )
        found = branches(federation, strategy, state)
        return [params_of(found[i][0].layers) for i in (1, 4)]

    shared = layers(vicreg(federation))
    assert same(*shared)
    assert not same(*layers(vicreg(federation, average="none")))
    assert not same(shared, layers(vicreg(federation), PIPELINE))


@pytest.mark.parametrize(("name", "value"), [("micro_batches", 2), ("exits", "all")])
def test_what_the_loss_does_not_fit_is_refused(name, value):
    federation = tiny_federation({0: 1})._replace(**{name: value})
    with pytest.raises(UserError, match=f"{name}: {value} is not allowed with vicreg"):
        vicreg(federation)


def test_an_exit_is_fitted_to_samples_with_labels():
    """As if the others were not there."""
    federation = tiny_federation({0: 1, 1: 1}, tiny_model((ConvLayer(3),)))
    state = jax.jit(sequential(federation).init)(KEY)
    shards, data = tiny_shards({0: 9, 1: 7}), partly_labelled()
    known = {i: own[data.labels[own] != NO_LABEL] for i, own in shards.items()}
    found = [
        refit_exits(federation, state, Samples(own, of, PIPELINE, 4, CLASSES), 0.1)
        for own, of in ((data, shards), (tiny_data(), known))
    ]
    assert found[0][1] == found[1][1]
    assert found[0][1][0].samples == sum(map(len, known.values()))
    assert_same(found[0][0].clients, found[1][0].clients, rtol=1e-5, atol=1e-6)


CONFIG = override(
    THREE_ROUNDS,
    strategy="vicreg",
    augment="noise",
    labelled_share=0.25,
    validation_share=0.2,
    rounds=2,
    refit_exits_every=2,
)


def arrays():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % CLASSES
    images = rng.integers(0, 128, (60, 5, 5, 1)) + 60 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


@pytest.mark.parametrize(
    "strategy", ["vicreg", pytest.param("sequential", marks=pytest.mark.slow)]
)
def test_labels_that_are_not_given_change_nothing(strategy, tmp_path):
    """All bits of a run are those of one whose other labels were wrong."""
    config = override(CONFIG, strategy=strategy, max_train_samples=None, cuts=("1",))
    images, labels = arrays()
    experiment = hs.build(config, (images, labels, images[:9], labels[:9]))
    if strategy == "vicreg":
        kept = np.asarray(experiment.train.labels) != NO_LABEL
    else:
        kept = np.zeros(60, bool)
        kept[np.concatenate(list(experiment.shards.values()))] = True
        _, held = hs.data.hold_out(60, 0.2, seed=0)
        kept[held] = True
    assert kept.sum() == 12 + 2 * 6
    wrong = np.where(kept, labels, (labels + 1) % CLASSES)
    found = []
    for name, own in (("one", labels), ("other", wrong)):
        data = (images, own, images[:9], labels[:9])
        hs.train(config, tmp_path / name, data=data)
        run = hs.restore(tmp_path / name)
        found.append([(run.client(i), run.server(i)) for i in range(2)])
    assert same(*found)


def test_a_step_has_the_bytes_of_samples_with_labels():
    """Of 24 samples in three whole batches 6 have labels."""
    config = override(CONFIG, batch_size=8, max_train_samples=None, average="none")
    images, labels = arrays()
    experiment = hs.build(config, (images, labels, images[:9], labels[:9]))
    sizes = [one.sample.up_bytes for one in experiment.traffic]
    for one, size in zip(experiment.bytes_by_cut(), sizes, strict=True):
        assert one["round"]["up_bytes"] == 6 * size
        assert 3 * one["step"]["up_bytes"] == 6 * size


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path):
    """It trains, goes on, is fitted and gated; its partition counts labels."""
    words = (
        "demo --network tiny --plugin tiny --strategy vicreg --augment noise "
        "--labelled-share 0.25 --num-clients 2 --cuts 1 2 --max-train-samples 60 "
        "--max-test-samples 10 --batch-size 8 --eval-every 1 --checkpoint-every 1 "
        "--validation-share 0.2"
    ).split()
    out = str(tmp_path / "run")
    assert cli.main(["train", *words, "--rounds", "1", "--out", out]) == 0
    words += ["--rounds", "2", "--out", out, "--resume"]
    assert cli.main(["train", *words]) == 0
    shares = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert [share["samples"] for share in shares] == [24, 24]
    assert [sum(share["label_counts"]) for share in shares] == [6, 6]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["images"] for record in records] == [48, 48]
    experiment, _ = reopen(out)
    sizes = [one.sample.up_bytes for one in experiment.traffic]
    weights = 2 * sum(one.weights for one in experiment.traffic)
    assert records[0]["link"]["up_bytes"] == 6 * sum(sizes) + weights / 2
    assert cli.main(["refit", out]) == 0
    refit = json.loads((tmp_path / "run" / "refit" / "refit.json").read_text())
    assert [(one["cut"], one["samples"]) for one in refit["exits"]] == [(1, 12), (2, 6)]
    assert cli.main(["gate", out, "--target-offload", "0.5"]) == 0
    assert cli.main(["export", out, "--client", "0"]) == 0


TRAIN = (
    "train demo --network tiny --plugin tiny --strategy vicreg --augment noise "
    "--num-clients 2 --cuts 1 2"
)
FLEET = """
[[devices]]
name = "one"
count = 2
forward_flops_per_s = 1e9
up_bytes_per_s = 1e5

[server]
name = "cloud"
forward_flops_per_s = 1e12
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            f"{TRAIN} --augment none",
            "augment: none is not allowed with vicreg, which compares copies of a "
            "sample; allowed are crop, crop_flip, noise",
        ),
        (f"{TRAIN} --labelled-share 0", "labelled_share: 0.0 is not allowed"),
        (
            f"{TRAIN} --labelled-share 0.5 --partition views --cuts 1",
            "labelled_share: 0.5 is not allowed with partition views and vicreg",
        ),
        (f"{TRAIN} --micro-batches 2", "micro_batches: 2 is not allowed with vicreg"),
        (f"{TRAIN} --devices fleet.toml", "devices: not allowed with strategy vicreg"),
        (
            "plan demo --network tiny --plugin tiny --strategy vicreg "
            "--devices fleet.toml",
            "devices: not allowed with strategy vicreg",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.toml").write_text(FLEET)
    assert cli.main([*words.split(), "--out", "out"]) == 2
    assert message in capsys.readouterr().err


def test_the_planner_counts_samples_with_labels(tmp_path):
    (tmp_path / "fleet.toml").write_text(FLEET)
    resources = Resources(read_devices(tmp_path / "fleet.toml"))
    config = override(CONFIG, strategy="sequential", validation_share=0.0)
    assert planning(config, resources).samples.tolist() == [5, 5]


@pytest.mark.slow
def test_exits_and_servers_leave_chance_behind(tmp_path):
    """With a tenth of the labels; chance is 0.1."""
    words = (
        "train demo --network mlp --hidden 64 --depth 4 --num-clients 4 --cuts 2 "
        "--strategy vicreg --augment crop_flip --labelled-share 0.1 --rounds 8 "
        "--max-train-samples 3000 --refit-exits-every 8 --learning-rate 0.02"
    )
    out = tmp_path / "run"
    assert cli.main([*words.split(), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mean_exit_accuracy"] > 0.5
    assert summary["mean_server_accuracy"] > 0.3


def test_clients_on_a_network_have_their_labels():
    """A server cannot take labels from samples that are not its own."""
    config = override(CONFIG, strategy="sequential", refit_exits_every=0)
    with pytest.raises(UserError, match=r"labelled_share: 0\.25 is not allowed where"):
        build_served(config, [5, 5])
    assert [len(share.labels) for share in shares(config)] == [4, 4]
    with pytest.raises(UserError, match="strategy: vicreg is not allowed"):
        build_served(override(config, strategy="vicreg", labelled_share=0.25))
