"""Clients with an exit behind each of their layers, from training to export."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_devices import small_run
from rounds import assert_same, branches, train
from safetensors.numpy import load_file
from test_contracts import CLIENT_AXES, DENSE, SIZES
from tiny import CLASSES, PIPELINE, tiny_data, tiny_federation, tiny_model, tiny_shards

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.algorithms import averaging, sequential
from hsee_jax.config import override
from hsee_jax.core import Batch, UserError
from hsee_jax.engine import make_evaluation
from hsee_jax.federation import forward_exits, init_client, init_server
from hsee_jax.federation.fused import detached_step, joint_step
from hsee_jax.federation.state import take_member
from hsee_jax.inference.calibration import (
    Scores,
    all_thresholds,
    exit_shares,
    judge,
    offload_curve,
)
from hsee_jax.inference.client_study import ClientStudy, SampleCosts
from hsee_jax.inference.gate import make_gate
from hsee_jax.nn import init_network, masked_cross_entropy
from hsee_jax.runs.build import build
from hsee_jax.runs.served import build_served
from hsee_jax.systems import layer_costs

DESCENT = optax.scale(-1.0)  # the change of the weights is the gradient
RATES = (jnp.float32(1.0), jnp.float32(1.0))


def federation_of(cuts, model=None, exits="all"):
    return tiny_federation(cuts, model)._replace(exits=exits)


def sides(cut, exits="all"):
    """What a client and its server compute, their states, and a padded batch."""
    federation = federation_of({0: cut}, exits=exits)._replace(optimizer=DESCENT)
    network = jax.jit(lambda: init_network(federation.model, jax.random.key(0)))()
    client = init_client(network, cut, DESCENT, exits=exits)
    server, data = init_server(network, cut, DESCENT), tiny_data(8)
    images = jnp.asarray(data.images, jnp.float32) / 64 - 1
    batch = Batch(images, jnp.asarray(data.labels), jnp.arange(8) < 6)
    return federation.specs(0), client, server, batch


def test_a_client_has_an_exit_behind_each_layer():
    for cut in (1, 2, 3):
        _, client, server, _ = sides(cut)
        assert (len(client.exits), len(server.exits)) == (cut - 1, 0)
    assert sides(3, exits="cut")[1].exits == ()


@pytest.mark.parametrize(
    ("share", "distill"), [(None, 0.0), pytest.param(0.5, 2.0, marks=pytest.mark.slow)]
)
def test_a_step_is_the_gradient_of_the_sum_of_all_losses(share, distill):
    """The gradient of an early head reaches the layers before it, and only those."""
    specs, client, server, batch = sides(3)
    model = tiny_model()
    stages, heads = model.stages, model.exit_heads

    def run(stage, part, params, x):
        variables = {"params": params, "batch_stats": part.batch_stats}
        return stage.apply(variables, x, batch.mask, train=True)[0]

    def loss(params):
        layers, exits = params
        x, total, scores = batch.inputs, 0.0, []
        for number in range(3):
            x = run(stages[number], client.layers[number], layers[number], x)
            seen = x
            if share is not None:
                seen = share * x + (1 - share) * jax.lax.stop_gradient(x)
            part = (*client.exits, client.head)[number]
            scores.append(run(heads[number], part, exits[number], seen))
        logits = run(model.final_head, server.head, server.head.params, x)
        if share is not None:
            total += masked_cross_entropy(logits, batch.labels, batch.mask)[0]
        teacher = jax.nn.softmax(jax.lax.stop_gradient(logits) / 2)
        for own in scores:
            total += masked_cross_entropy(own, batch.labels, batch.mask)[0]
            if distill:
                log_q = jax.nn.log_softmax(own / 2)
                each = jnp.sum(teacher * (jnp.log(teacher) - log_q), axis=1)
                total += 4 * jnp.sum(jnp.where(batch.mask, each, 0)) / 6
        return total

    def params_of(client):
        exits = [part.params for part in (*client.exits, client.head)]
        return [layer.params for layer in client.layers], exits

    @jax.jit
    def step(client, server):
        if share is None:
            return detached_step(*specs, client, server, batch, RATES)
        options = {"exit_gradient": share, "distill": distill}
        return joint_step(*specs, client, server, batch, RATES, **options)

    after, _, metrics = step(client, server)
    gradient = jax.jit(jax.grad(loss))(params_of(client))
    expected = jax.tree.map(jnp.subtract, params_of(client), gradient)
    assert_same(params_of(after), expected, rtol=1e-4, atol=1e-5)
    only_last = jax.jit(
        lambda c, s: detached_step(*sides(3, "cut")[0], c, s, batch, RATES)
    )
    plain, _, last = only_last(sides(3, "cut")[1], server)
    assert_same(metrics.exit, last.exit, rtol=1e-6)  # the metrics are those of the last
    first = after.layers[0].params["Conv_0"]["kernel"]
    assert np.abs(first - plain.layers[0].params["Conv_0"]["kernel"]).max() > 1e-3


BOTH = {"average": "all_holders", "distill": 2.0}


@pytest.mark.parametrize(
    ("make", "options", "cuts", "axes"),
    [
        (averaging, BOTH, {4: 1, 1: 2}, ("loop", "vmap")),
        pytest.param(
            sequential, {}, {4: 1, 1: 2, 6: 2}, CLIENT_AXES, marks=pytest.mark.slow
        ),
        pytest.param(
            averaging, BOTH, {4: 1, 1: 2, 6: 2}, CLIENT_AXES, marks=pytest.mark.slow
        ),
    ],
)
def test_all_forms_of_the_engine_train_alike(make, options, cuts, axes):
    """Where all holders are averaged, an exit is common to clients of all cuts."""
    federation = federation_of(cuts, DENSE)
    shards = tiny_shards({i: SIZES[i] for i in sorted(cuts)})
    results = []
    for axis in axes:
        own = make(federation._replace(one_by_one=axis == "map"), **options)
        state, _ = train(own, federation, shards, axis=axis, rounds=1)
        results.append(branches(federation, own, state))
    for other in results[1:]:
        assert_same(results[0], other, rtol=1e-3, atol=1e-5)
    at_one, at_two = results[0][4][0], results[0][1][0]
    start = jax.jit(make(federation, **options).init)(jax.random.key(3))
    before = jax.tree.map(lambda leaf: leaf[0], start.clients[1].exits[0].params)
    moves = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), at_two.exits[0].params, before
    )
    assert max(jax.tree.leaves(moves)) > 1e-4
    if options.get("average") == "all_holders":
        assert_same(at_one.head.params, at_two.exits[0].params, rtol=1e-6)


@pytest.mark.parametrize("axis", ["loop", pytest.param("vmap", marks=pytest.mark.slow)])
def test_evaluation_scores_each_exit(axis):
    """Batches of 4 of 11 samples, by networks that differ between clients."""
    federation = federation_of({4: 1, 1: 2}, DENSE)
    strategy = averaging(federation, init="per_client")
    state, data = jax.jit(strategy.init)(jax.random.key(5)), tiny_data(11, seed=5)
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=4, axis=axis)
    results = {r.id: r for r in evaluate(state, jax.device_put(data))}
    assert results[4].early_accuracies == ()
    images = (data.images.astype(np.float32) / 255 - 0.5) / 0.25
    client, spec = take_member(state.clients[1], 0), federation.specs(1)[0]
    _, logits, _ = forward_exits(spec, client, images, np.ones(11, bool), train=False)
    found_by = [np.argmax(np.asarray(own), axis=1) for own in logits]
    right = [float(np.mean(classes == data.labels)) for classes in found_by]
    found = results[1]
    assert [*found.early_accuracies, found.exit_accuracy] == pytest.approx(right)


def random_scores(exits, seed=0, count=60):
    """Logits with equal values among their doubts, and some that are not finite."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    logits = np.round(rng.normal(size=(exits + 1, count, CLASSES)))
    logits[rng.random(logits.shape[:2]) < 0.05] = np.nan
    doubts = np.round(rng.random((exits, count)), 1).astype(np.float32)
    doubts[~np.isfinite(logits[:-1]).all(axis=-1)] = np.inf
    judged = [judge(own, labels) for own in logits]
    early = tuple(zip(doubts[:-1], judged[:-2], strict=True))
    return Scores(doubts[-1], judged[-2], judged[-1], early)


def counted(scores, threshold):
    """One sample after another: right answers, and how many each exit gives."""
    correct, answers = 0, [0] * len(scores.exits)
    for m in range(len(scores.uncertainty)):
        for e, (doubt, judgement) in enumerate(scores.exits):
            if np.isfinite(doubt[m]) and doubt[m] < threshold:
                correct += judgement.correct[m]
                answers[e] += 1
                break
        else:
            correct += scores.server.correct[m]
    return correct, answers


@pytest.mark.parametrize("exits", [1, 2, 4])
def test_the_curve_is_that_of_counting(exits):
    for seed in range(5):
        scores = random_scores(exits, seed)
        thresholds = all_thresholds(scores.lowest, 1.0)
        curve = offload_curve(scores, thresholds)
        for n, threshold in enumerate(thresholds):
            correct, answers = counted(scores, threshold)
            assert curve.num_correct[n] == correct
            assert curve.num_offloads[n] == 60 - sum(answers)
            np.testing.assert_allclose(exit_shares(scores, threshold) * 60, answers)
        every = np.unique(
            [counted(scores, t)[1] for t in np.linspace(0, 1.01, 300)], axis=0
        )
        found = np.unique([counted(scores, t)[1] for t in thresholds], axis=0)
        np.testing.assert_array_equal(found, every)  # no other threshold differs


def test_a_sample_costs_what_runs_up_to_its_exit():
    scores = random_scores(3)
    thresholds = all_thresholds(scores.lowest, 1.0)
    costs = SampleCosts(100, 40, 1000, (10, 25))
    curve = offload_curve(scores, thresholds)
    study = ClientStudy(0, 3, costs, 1.0, False, curve, scores, {})
    choice = len(thresholds) // 2
    _, (first, second, third) = counted(scores, thresholds[choice])
    sent = 60 - first - second - third
    total = 10 * first + 25 * second + 40 * (third + sent) + 1000 * sent
    assert study.point(choice)["flops"] == pytest.approx(total / 60)
    shares = study.shares(choice)["exit_shares"]
    assert shares == pytest.approx([first / 60, second / 60, third / 60])
    assert len(study.summary()["early_accuracies"]) == 2


def test_the_earliest_sure_exit_answers():
    """Against all answers to each sample; the batch is padded."""
    specs, client, server, batch = sides(3)
    parts = [
        part.replace(params=jax.tree.map(lambda leaf, f=factor: f * leaf, part.params))
        for part, factor in zip((*client.exits, client.head), (0.3, 4, 40), strict=True)
    ]
    client = client.replace(exits=tuple(parts[:-1]), head=parts[-1])
    inputs, mask = batch.inputs[:7], jnp.ones(7, bool)
    own = jax.jit(lambda c: forward_exits(specs[0], c, inputs, mask, train=False))
    features, of_exits, _ = own(client)
    _, (logits,), _ = forward_exits(specs[1], server, features, mask, train=False)
    p = jax.nn.softmax(jnp.stack(of_exits), axis=-1)
    doubts = np.asarray(-jnp.sum(p * jnp.log(p), axis=-1))
    gate = make_gate(*specs, batch_size=8)
    seen = set()
    for threshold in (0.0, *np.quantile(doubts, [0.1, 0.3, 0.6]) + 1e-4, 9.0):
        found = gate.answer(client, server, inputs, threshold)
        for n in range(7):
            sure = np.flatnonzero(doubts[:, n] < threshold)
            expected = of_exits[sure[0]][n] if len(sure) else logits[n]
            np.testing.assert_allclose(found.logits[n], expected, atol=1e-5)
            assert found.exited[n] == bool(len(sure))
            assert found.exit[n] == (sure[0] if len(sure) else 2)
            seen.add(int(sure[0]) if len(sure) else None)
    assert seen == {0, 1, 2, None}
    assert (found.early_logits.shape, found.exit_logits.shape) == ((7, 2, 3), (7, 3))


def test_costs_are_those_of_all_exits_up_to_a_cut():
    plain, every = (layer_costs(DENSE, exits) for exits in ("cut", "all"))
    assert every[:2] == plain[:2] and every[-1] == plain[-1]
    assert every[2][1:] == plain[2][1:]
    assert every[3][1:] == tuple(map(sum, zip(plain[2][1:], plain[3][1:], strict=True)))
    assert every[3].name == "exits after layer2"


SERVED = dict(strategy="averaging", average="servers", keep_layers_private=True)


def test_what_does_not_go_with_several_exits_is_refused(tmp_path, capsys):
    config = small_run(exits="all", cuts=("2",))
    with pytest.raises(UserError, match="recuts: not allowed with exits all"):
        build(override(config, recuts=("2:1",)))
    with pytest.raises(UserError, match="exits: all is not allowed with an exact fit"):
        build(override(config, refit_exits_every=1))
    with pytest.raises(UserError, match="exits: all .* keep_layers_private"):
        build_served(override(config, **SERVED))
    words = ["profile", "--exits", "all", "--out", str(tmp_path / "me.toml")]
    assert cli.main(words) == 2
    assert "exits: all is not allowed with hsee profile" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_training_to_export(tmp_path, capsys):
    """All commands know the exits; the export answers as the restored client does."""
    run = tmp_path / "run"
    words = ["train", "--network", "mlp", "--depth", "3", "--hidden", "4"]
    words += ["--cuts", "1", "3", "--num-clients", "2", "--batch-size", "8"]
    words += ["--max-train-samples", "60", "--max-test-samples", "20", "--rounds", "1"]
    assert cli.main([*words, "--exits", "all", "--out", str(run)]) == 0
    assert "earlier exits" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    early = [client.get("early_accuracies", []) for client in summary["clients"]]
    assert list(map(len, early)) == [0, 2]
    assert cli.main(["eval", str(run)]) == 0
    table = capsys.readouterr().out
    assert " ".join(f"{accuracy:.4f}" for accuracy in early[1]) in table
    assert cli.main(["gate", str(run), "--target-offload", "0.5"]) == 0
    assert "by exit" in capsys.readouterr().out
    gate = json.loads((run / "gate" / "thresholds.json").read_text())["clients"][1]
    assert len(gate["exit_shares"]) == 3
    assert sum(gate["exit_shares"]) == pytest.approx(gate["on_device"])
    assert cli.main(["refit", str(run)]) == 2
    assert "exact fit" in capsys.readouterr().err

    assert cli.main(["export", str(run), "--client", "1"]) == 0
    place = run / "export" / "client-1"
    card = json.loads((place / "card.json").read_text())
    restored = hs.restore(run)
    client, spec = restored.client(1), restored.specs(1)[0]
    leaves = jax.tree.leaves([part.params for part in (*client.layers, *client.exits)])
    count = sum(leaf.size for leaf in [*leaves, *jax.tree.leaves(client.head.params)])
    assert (card["early_exits"], card["parameters"]) == (2, count)
    assert "uncertainty_N" in (place / "README.md").read_text()
    data = bytearray((place / "segment.jaxexport").read_bytes())
    images = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28, 1)
    found = jax.export.deserialize(data).call(
        load_file(place / "weights.safetensors"), images
    )
    info = restored.info
    inputs = (images.astype(np.float32) / 255 - info.mean) / info.std
    _, logits, _ = forward_exits(spec, client, inputs, np.ones(2, bool), train=False)
    names = ("logits_1", "logits_2", "logits")
    for name, expected in zip(names, logits, strict=True):
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
    answers = hs.inference.predict(restored, 1, images, threshold=9.0)
    np.testing.assert_allclose(answers.logits, logits[0], rtol=1e-4, atol=1e-5)
