"""Several clients see one event: their views, and the server that merges them."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import KEY, assert_same, branches, train
from tiny import (
    CLASSES,
    PIPELINE,
    DenseLayer,
    tiny_data,
    tiny_federation,
    tiny_model,
)

import hsee_jax as hs
from hsee_jax.algorithms import fpl
from hsee_jax.cli import main
from hsee_jax.core import Batch, UserError
from hsee_jax.data import PARTITIONS, VIEWS, normalize, partition
from hsee_jax.engine.evaluation import make_evaluation
from hsee_jax.engine.plan import plan_round
from hsee_jax.federation.branch import forward, parts_of
from hsee_jax.federation.federation import Client, group_clients
from hsee_jax.federation.junction import concat_junction, mean_junction
from hsee_jax.inference.gate import make_gate
from hsee_jax.inference.measurement import _mixer_flops
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.parallel.mesh import make_mesh
from hsee_jax.runs.build import build
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.equipment import Equipment
from hsee_jax.runs.served import build_served
from hsee_jax.systems.device_file import Fleet

DENSE = tiny_model((DenseLayer(8), DenseLayer(5)))  # compiles fast
THREE = dict.fromkeys(range(3), 1)  # clients of cut 1
RATE = jnp.float32(1.0)
SLOW_MEAN = pytest.param("mean", marks=pytest.mark.slow)
SETTING = hs.override(
    hs.preset("demo"),
    network="mlp",
    hidden=8,
    depth=2,
    strategy="fpl",
    partition="views",
    num_clients=4,
    cuts=("1",),
    max_train_samples=80,
    max_test_samples=30,
    validation_share=0.2,
    batch_size=8,
    rounds=2,
)


def events_of(cuts):
    """Ten events, which every client sees."""
    return {i: np.arange(10, dtype=np.int32) for i in cuts}


def test_tiles_fill_an_image():
    """Four clients see quarters; five see columns that overlap in whole pixels."""
    image = np.arange(2 * 6 * 8 * 2).reshape(2, 6, 8, 2)
    shape, take = VIEWS.make("tiles", image.shape[1:], 4)
    quarters = [image[:, a : a + 3, b : b + 4] for a in (0, 3) for b in (0, 4)]
    for i, quarter in enumerate(quarters):
        np.testing.assert_array_equal(take(image, jnp.int32(i)), quarter)
    assert shape == (3, 4, 2)
    shape, take = VIEWS.make("tiles", image.shape[1:], 5)
    assert shape == (6, 2, 2)
    for i, left in enumerate((0, 2, 3, 4, 6)):
        column = image[:, :, left : left + 2]
        np.testing.assert_array_equal(take(image, jnp.int32(i)), column)


def test_an_axis_of_views_and_whole_samples():
    sample = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    shape, take = VIEWS.make("axis", (3, 4), 3)
    assert shape == (4,)
    for i in range(3):
        np.testing.assert_array_equal(take(sample, jnp.int32(i)), sample[:, i])
    assert VIEWS.make("whole", (3, 4), 7) == ((3, 4), None)


@pytest.mark.parametrize(
    ("name", "shape", "clients", "words"),
    [
        ("tiles", (12, 2), 2, r"view: tiles .* \[12, 2\]; .* are axis and whole"),
        ("tiles", (2, 2, 1), 9, "num_clients: 9 tiles do not fit .* fewer clients"),
        ("axis", (3, 4), 2, r"view: axis .* 2 clients; allowed are samples \[2, ...\]"),
    ],
)
def test_views_that_do_not_fit(name, shape, clients, words):
    with pytest.raises(UserError, match=words):
        VIEWS.make(name, shape, clients)


def test_all_clients_have_all_events_and_take_the_same_in_a_step():
    deal = PARTITIONS.make("views")
    shards = dict(enumerate(partition(np.zeros(10, np.int32), 3, deal, seed=0)))
    for shard in shards.values():
        np.testing.assert_array_equal(shard, np.arange(10))
    groups = group_clients(Client(i, 1) for i in range(3))
    draw = {"batch_size": 4, "participation": 1.0, "turn": "batch", "seed": 0}
    one = plan_round(groups, shards, number=0, one_draw=True, **draw)
    own = plan_round(groups, shards, number=0, **draw)
    assert (one.indices == one.indices[:, :1]).all()
    assert not (own.indices == own.indices[:, :1]).all()
    np.testing.assert_array_equal(one.indices[:, 0], own.indices[:, 0])


def test_the_mean_is_over_the_views_that_are_there():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 4, 2, 5)).astype(np.float32)
    present = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]], bool)
    features[~present] = np.nan
    merged = mean_junction().merge(jnp.asarray(features), jnp.asarray(present))
    expected = [features[present[:, row], row].mean(axis=0) for row in range(3)]
    np.testing.assert_allclose(merged[:3], expected, rtol=1e-6)
    assert (merged[3] == 0).all()
    junction = concat_junction(3, jax.ShapeDtypeStruct((1, 2, 5), jnp.float32))
    beside = junction.merge(jnp.asarray(features), jnp.asarray(present))
    expected = np.concatenate([*np.where(present[..., None, None], features, 0)], -1)
    np.testing.assert_array_equal(beside, expected)
    mixed = junction.mixer.apply(
        junction.mixer.init(KEY, beside), beside, jnp.ones(4, bool), train=True
    )[0]
    counts = present.sum(axis=0)[:, None, None]
    expected = np.asarray(merged) * counts / 3
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "boundary", [pytest.param("detached", marks=pytest.mark.slow), "joint"]
)
def test_identical_views_and_a_mean_equal_one_client(boundary):
    """The clients stay alike, and the server is that of a single client."""
    found = []
    for cuts in ({0: 1}, THREE):
        federation = tiny_federation(cuts, DENSE)
        strategy = fpl(federation, boundary=boundary)
        state, log = train(strategy, federation, events_of(cuts), axis="loop")
        found.append((branches(federation, strategy, state), log[-1][2]))
    (one, metrics), (three, of_three) = found
    for own in three.values():
        assert_same(own, one[0], rtol=1e-4, atol=1e-6)
    for loss in of_three.server.loss_sum:
        np.testing.assert_allclose(loss, metrics.server.loss_sum[0], rtol=1e-5)


def through(stages, params, values):
    """The outputs of layers, by their own functions."""
    for stage, own in zip(stages, params, strict=True):
        variables = {"params": own, "batch_stats": {}}
        values, _ = stage.apply(variables, values, None, train=True)
    return values


def loss_of_events(federation, name, params, batch):
    """The loss of the events as a formula of all weights; the third view is absent."""
    *clients, server = params
    stages = federation.model.stages
    views = [
        through(stages[:1], own, inputs)
        for own, inputs in zip(clients[:2], batch.inputs[:2], strict=True)
    ]
    if name == "mean":
        merged = sum(views) / 2
    else:
        (kernel,), *server = jax.tree.leaves(server[0]), *server[1:]
        merged = sum(
            v @ k for v, k in zip(views, jnp.split(kernel, 3)[:2], strict=True)
        )
    logits = through((*stages[1:], federation.model.final_head), server, merged)
    return masked_cross_entropy(logits, batch.labels[0], batch.mask[0])[0]


def draw_events(absent=(), infinite=()):
    """Four events, as each of three clients sees them."""
    rng = np.random.default_rng(0)
    views = rng.normal(size=(3, 4, 5, 5, 1)).astype(np.float32)
    views[list(infinite)] = np.inf
    mask = np.ones((3, 4), bool)
    mask[list(absent)] = False
    labels = np.broadcast_to(rng.integers(0, CLASSES, 4).astype(np.int32), (3, 4))
    return Batch(*map(jnp.asarray, (views, labels, mask)))


def test_the_gate_counts_the_layer_that_mixes_the_views():
    """Two positions of 3 x 5 channels become 5: 2 x 15 x 5 products and sums each."""
    features = jax.ShapeDtypeStruct((1, 2, 5), jnp.float32)
    assert _mixer_flops(concat_junction(3, features), features, 3) == 2 * 2 * 15 * 5
    assert _mixer_flops(mean_junction(), features, 3) == 0


@pytest.mark.parametrize("name", [SLOW_MEAN, "concat"])
def test_a_joint_step_descends_the_loss_of_the_event(name):
    """At rate 1 weights move by the gradient, those of clients by two times theirs.

    Of three views two are there.
    """
    federation = tiny_federation(THREE, DENSE)._replace(optimizer=optax.scale(-1.0))
    strategy = fpl(federation, junction=name, boundary="joint", init="per_client")
    state, batch = jax.jit(strategy.init)(KEY), draw_events(absent=[2])
    moved, _ = jax.jit(strategy.step)(state, (batch,), jnp.arange(3), RATE)
    before, after = map(weights_of, (state, moved))
    slopes = jax.grad(partial(loss_of_events, federation, name))(before, batch)
    for n, times in enumerate((2, 2, 2, 1)):
        expected = jax.tree.map(lambda p, g, f=times: p - f * g, before[n], slopes[n])
        assert_same(after[n], expected, rtol=1e-4, atol=1e-6)
        same = jax.tree.map(np.array_equal, after[n], before[n])
        assert all(jax.tree.leaves(same)) == (n == 2)


def weights_of(state):
    """Layers of three clients, and all that the server holds."""
    clients = [[layer.params for layer in member(state, n).layers] for n in range(3)]
    return [*clients, [part.params for part in parts_of(state.servers[0])]]


def member(state, n):
    return jax.tree.map(lambda leaf: leaf[n], state.clients[0])


@pytest.mark.parametrize("boundary", ["detached", "joint"])
@pytest.mark.parametrize("name", [SLOW_MEAN, "concat"])
def test_a_view_that_is_not_finite_is_absent(name, boundary):
    """The server learns from the others, and the client takes no step."""
    federation = tiny_federation(THREE, DENSE)
    strategy = fpl(federation, junction=name, boundary=boundary)
    state, results = jax.jit(strategy.init)(KEY), []
    for batch in (draw_events(absent=[1]), draw_events(infinite=[1])):
        results.append(
            jax.jit(strategy.step)(state, (batch,), jnp.arange(3), RATE / 10)
        )
    (absent, _), (broken, (metrics,)) = results
    assert_same(broken.servers, absent.servers, rtol=1e-5, atol=1e-7)
    for n in range(3):
        assert_same(member(broken, n), member(absent, n), rtol=1e-5, atol=1e-7)
    assert_same(member(broken, 1), member(state, 1))
    np.testing.assert_array_equal(np.isnan(metrics.server.loss_sum), [0, 1, 0])
    assert not np.array_equal(
        *(s.servers[0].head.params["Dense_0"]["bias"] for s in (broken, state))
    )


@pytest.mark.parametrize("name", [SLOW_MEAN, "concat"])
def test_scores_and_answers_leave_out_a_view_that_is_not_finite(name):
    """The server's are the formula of the two other views."""
    federation = tiny_federation(THREE, DENSE)
    strategy = fpl(federation, junction=name, init="per_client")
    state, data = jax.jit(strategy.init)(KEY), tiny_data(15)
    (clients,) = state.clients
    broken = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), clients.layers)
    state = state.replace(clients=(clients.replace(layers=broken),))
    rows, mask = jnp.arange(15), jnp.ones((3, 15), bool)
    view = partial(PIPELINE.evaluation, data, rows)
    batch = jax.vmap(view)(mask, jnp.arange(3))
    expected = loss_of_events(federation, name, weights_of(state), batch)
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=15)
    results = evaluate(state, data)
    losses = [result.server_loss for result in results]
    np.testing.assert_allclose(losses, [expected] * 3, rtol=1e-5)
    assert [bool(np.isnan(result.exit_loss)) for result in results] == [0, 0, 1]
    gate = make_gate(
        *federation.specs(0), batch_size=15, junction=strategy.junction, sizes=[15]
    )
    members = [member(state, n) for n in range(3)]
    for asked in (0, 2):
        answers = gate.answer_events(
            members, state.servers[0], batch.inputs, 0.0, asked=asked
        )
        loss, _ = masked_cross_entropy(
            jnp.asarray(answers.logits), batch.labels[0], batch.mask[0]
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_client_that_misses_a_round_leaves_the_mean_to_the_others():
    """The server learns as if it had never been there."""
    servers = []
    for cuts, missing in ((THREE, {0: [2], 1: [2]}), ({0: 1, 1: 1}, None)):
        federation = tiny_federation(cuts, DENSE)
        strategy = fpl(federation, init="per_client")
        shards = events_of(cuts)
        state, _ = train(strategy, federation, shards, axis="loop", missing=missing)
        servers.append(state.servers)
    assert_same(*servers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [SLOW_MEAN, "concat"])
def test_a_mesh_changes_nothing(name):
    """Three clients in the slots of eight devices, in training and in an evaluation."""
    results = []
    for mesh in (None, make_mesh()):
        federation = tiny_federation(THREE, DENSE, mesh)
        strategy = fpl(federation, junction=name, boundary="joint", init="per_client")
        axis = "vmap" if mesh else "loop"
        shards = events_of(THREE)
        state, _ = train(strategy, federation, shards, axis=axis, rounds=1)
        evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=10)
        scores = evaluate(
            jax.device_put(state) if mesh is None else state, tiny_data(15)
        )
        results.append((branches(federation, strategy, state), scores))
    (one, scores), (other, of_mesh) = results
    assert_same(one, other, rtol=1e-4, atol=1e-6)
    assert [s[:4] for s in scores] == [s[:4] for s in of_mesh]


@pytest.mark.parametrize(
    ("axis", "changes"),
    [
        ("loop", {"junction": "concat"}),
        ("loop", {"strategy": "sequential"}),
        pytest.param("loop", {}, marks=pytest.mark.slow),
        pytest.param("vmap", {}, marks=pytest.mark.slow),
        pytest.param("vmap", {"strategy": "sequential"}, marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_the_views(axis, changes):
    """By hand, for clients with the same weights and a view of their own."""
    experiment = build(hs.override(SETTING, client_axis=axis, **changes))
    state, data = experiment.init(), experiment.test
    state = experiment.store.to_checkpoint(state)
    assert experiment.federation.model.input_shape == (14, 14, 1)
    images = normalize(data.images, experiment.info.mean, experiment.info.std)
    tiles = [images[:, a : a + 14, b : b + 14] for a in (0, 14) for b in (0, 14)]
    specs, mask = experiment.federation.specs(0), jnp.ones(len(images), bool)
    features, exits = [], []
    for n, tile in enumerate(tiles):
        values, logits, _ = forward(specs[0], member(state, n), tile, mask, train=False)
        features.append(values)
        exits.append(jnp.argmax(logits, axis=-1))
    merged = [sum(features) / 4] * 4  # a new mixer takes the mean, too
    if "strategy" in changes:
        merged = features
    server = experiment.strategy.part(state.servers[0], 0)
    found = experiment.evaluate(experiment.store.from_checkpoint(state), data)
    for n, result in enumerate(found):
        _, logits, _ = forward(specs[1], server, merged[n], mask, train=False)
        answer = jnp.argmax(logits, axis=-1)
        assert result.exit_accuracy == pytest.approx(
            float(np.mean(exits[n] == data.labels))
        )
        assert result.server_accuracy == pytest.approx(
            float(np.mean(answer == data.labels))
        )
    assert len({result.exit_loss for result in found}) == 4


def test_every_view_keeps_its_place_where_few_clients_take_part():
    experiment = build(hs.override(SETTING, participation=0.5))
    for number in range(2):
        plan = experiment.plan(number)
        np.testing.assert_array_equal(plan.ids, range(4))
        assert plan.active.sum() == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a run with a junction from the command line, once."""

    @cache
    def run(name):
        folder = tmp_path_factory.mktemp("runs") / name
        flags = (
            f"--network mlp --hidden 16 --depth 2 --strategy fpl --junction {name} "
            "--partition views --num-clients 4 --cuts 1 --max-train-samples 600 "
            "--max-test-samples 200 --validation-share 0.1 --rounds 3 "
            "--batch-size 16 --server-lr-scale 0.3"
        )
        assert main(["train", "demo", *flags.split(), "--out", str(folder)]) == 0
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "concat"])
def test_a_run_learns_is_restored_and_gated(trained, name):
    """Every answer of the server is from all views, whichever client is asked."""
    folder = trained(name)
    scores = json.loads((folder / "summary.json").read_text())["clients"]
    assert main(["gate", str(folder), "--target-offload", "0.5"]) == 0
    run = hs.restore(folder)
    with pytest.raises(UserError, match="strategy: fpl has no network of one client"):
        run.network(0)
    _, test = hs.data.load_dataset("fashion_mnist_small")
    images, labels = test.images[:200], test.labels[:200]
    for i, score in enumerate(scores):
        answers = hs.inference.predict(run, i, images)
        right = np.mean(answers.predictions == labels)
        assert right == pytest.approx(score["server_accuracy"], abs=0.006)
        right = np.mean(answers.exit_logits.argmax(axis=1) == labels)
        assert right == pytest.approx(score["exit_accuracy"], abs=0.006)
        assert score["server_accuracy"] > 0.3 < score["exit_accuracy"]


def test_a_client_is_exported_with_its_own_view(trained):
    from jax import export

    folder = trained("concat")
    assert main(["export", str(folder), "--client", "3"]) == 0
    program = (folder / "export" / "client-3" / "segment.jaxexport").read_bytes()
    assert export.deserialize(bytearray(program)).in_avals[-1].shape[1:] == (14, 14, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": "iid"}, "partition: iid is not allowed with fpl, .* is views"),
        ({"cuts": ("1", "2")}, "cuts: 1 2 is not allowed with fpl"),
        ({"labelled_share": 0.5}, "labelled_share: 0.5 is not allowed with fpl"),
        ({"recuts": ("2:2",)}, "recuts: not allowed with fpl, which has one cut"),
        ({"exit_gradient": 0.5}, "exit_gradient: 0.5 is not allowed with a detached"),
        ({"view": "axis"}, r"view: axis is not allowed for samples of \[28, 28, 1\]"),
    ],
)
def test_settings_that_do_not_fit(changes, words):
    with pytest.raises(UserError, match=words):
        build(hs.override(SETTING, **changes))


def test_devices_on_a_network_and_a_clock_are_refused():
    with pytest.raises(UserError, match="partition: views is not allowed with clients"):
        build_served(SETTING)
    with pytest.raises(UserError, match="devices: not allowed .* not simulated"):
        with_clock(build(SETTING), Equipment(Fleet((), None)))
