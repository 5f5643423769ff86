"""What holds for every entry of a registry, such as every network or algorithm.

A new entry is tested by being registered. A network is made small by the options in
`SMALL`, as far as it reads them. Networks of many layers are tested in full by the slow
tests, and in one step here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounds import KEY, assert_same, branches, train
from tiny import DenseLayer, tiny_federation, tiny_model, tiny_shards

from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.core import Batch, Stage, UserError
from hsee_jax.data import AUGMENTATIONS
from hsee_jax.engine.round import CLIENT_AXES
from hsee_jax.federation.branch import (
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.federation.fused import joint_step
from hsee_jax.federation.step import branch_step
from hsee_jax.link import CODECS, sample_bytes
from hsee_jax.nn import NETWORKS, masked_cross_entropy, parse_cut
from hsee_jax.nn.model import (
    Network,
    check_model,
    init_network,
    layer_inputs,
    logits_of,
)
from hsee_jax.optim import OPTIMIZERS, SCHEDULES, make_schedule
from hsee_jax.systems import layer_costs

SMALL = {"width": 2, "features": 2, "hidden": 4, "depth": 3, "heads": 2, "window": 3}
SMALL |= {"order": 3}
CLASSES = 3
INPUT_SHAPES = {1: (4,), 2: (12, 2), 3: (8, 8, 1)}  # by rank: tables, series, images
# Further forms of networks, with their options.
FORMS = {
    f"{name} group": (name, {"norm": "group"})
    for name in ("conv1d", "resnet18", "resnet50", "mobilenet_v2")
} | {"resnet18 conv": ("resnet18", {"exit_head": "conv"})}
SLOW = ("resnet34", "resnet50", "mobilenet", "resnet18 ", "conv1d group")
DESCENT = optax.scale(-1.0)  # the change of the weights is the gradient
RATES = (jnp.float32(1.0), jnp.float32(1.0))
REAL, ROWS = 6, 8


def compiled(stage):
    return Stage(stage.init, jax.jit(stage.apply, static_argnames="train"))


@functools.cache
def model_of(name):
    """The network with each layer compiled by itself, so that all cuts share them."""
    name, options = FORMS.get(name, (name, {}))
    rank = getattr(NETWORKS[name].make, "input_rank", 3)
    model = NETWORKS.make(
        name,
        options=SMALL | options,
        num_classes=CLASSES,
        input_shape=INPUT_SHAPES[rank],
    )
    heads = {head: compiled(head) for head in (*model.exit_heads, model.final_head)}
    return model._replace(
        stages=tuple(map(compiled, model.stages)),
        exit_heads=tuple(heads[head] for head in model.exit_heads),
        final_head=heads[model.final_head],
    )


@functools.cache
def network_of(name, seed=0) -> Network:
    """Weights of noise in the right shapes, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5
        if path[-1].key in ("scale", "var"):
            noise = 1 + 0.1 * abs(noise)
        return jnp.asarray(noise, leaf.dtype)

    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: init_network(model_of(name), key))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def parts(name, cut, seed=0):
    """Specs and branches of a client of this cut and of its server."""
    model, network = model_of(name), network_of(name, seed)
    specs = client_spec(model, cut, DESCENT), server_spec(model, cut, DESCENT)
    client = init_client(network, cut, DESCENT)
    return specs, client, init_server(network, cut, DESCENT)


def batch(name, padding=0.0):
    """Rows of noise; those of padding hold what is asked for."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(ROWS, *model_of(name).input_shape))
    inputs[REAL:] = padding
    labels = rng.integers(0, CLASSES, ROWS)
    return Batch(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.arange(ROWS) < REAL,
    )


def cuts_of(name):
    return range(1, len(model_of(name).stages) + 1)


def middle_of(name):
    return (len(cuts_of(name)) + 1) // 2


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def of_all(*slow):
    """Parametrize a test with all networks; of those whose names begin so, slowly."""
    names = (*NETWORKS, *FORMS)
    marks = {
        name: [pytest.mark.slow] * bool(slow and name.startswith(slow))
        for name in names
    }
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name]) for name in names]
    )


networks = of_all(*SLOW)


@of_all()
def test_a_network_has_a_name_and_an_exit_for_each_layer(name):
    model = model_of(name)
    counts = map(len, (model.stages, model.exit_heads, model.layer_names))
    assert set(counts) == {len(set(model.layer_names))}
    assert model.input_shape in INPUT_SHAPES.values()
    assert parse_cut(model.layer_names[-1], model.layer_names) == len(model.stages)
    check_model(model, logits_of(model).shape[1])


@functools.cache
def hollow(stage):
    """The stage, computing zeros of the right shape, so that XLA has little to do."""

    def apply(variables, inputs, mask, *, train):
        run = functools.partial(stage.apply, train=train)
        return jax.tree.map(
            jnp.zeros_like, jax.eval_shape(run, variables, inputs, mask)
        )

    return Stage(stage.init, apply)


@of_all(*SLOW, "resnet18", "short_resnet")
def test_the_parameters_of_the_costs_are_those_of_the_network(name):
    model, network = model_of(name), network_of(name)
    costs = layer_costs(
        model._replace(
            stages=tuple(map(hollow, model.stages)),
            exit_heads=tuple(map(hollow, model.exit_heads)),
            final_head=hollow(model.final_head),
        )
    )
    parts = (*network.layers, *network.exit_heads, network.final_head)
    held = [sum(leaf.size for leaf in jax.tree.leaves(p["params"])) for p in parts]
    assert [cost.parameters for cost in costs] == held


@of_all(*FORMS)
def test_split_forward_is_the_whole_forward(name):
    check_split(name, train=False)


@networks
def test_split_forward_is_the_whole_forward_in_training(name):
    check_split(name, train=True)


def check_split(name, *, train):
    """Logits and batch statistics, bit for bit, at every cut."""
    rows = batch(name)
    spec = server_spec(model_of(name), 0, DESCENT)
    whole = init_server(network_of(name), 0, DESCENT)
    _, expected, stats = forward(spec, whole, rows.inputs, rows.mask, train=train)
    assert expected.shape == (ROWS, CLASSES)
    assert expected.dtype == jnp.float32
    for cut in cuts_of(name):
        (own, other), client, server = parts(name, cut)
        features, scores, before = forward(
            own, client, rows.inputs, rows.mask, train=train
        )
        _, logits, after = forward(other, server, features, rows.mask, train=train)
        assert scores.shape == expected.shape
        assert features.shape[1:] == layer_inputs(model_of(name))[cut].shape[1:]
        assert_equal((logits, (*before[:-1], *after)), (expected, stats))


@networks
def test_the_joint_gradient_is_that_of_the_whole_network(name):
    check_joint_gradient(name, [middle_of(name)])


@pytest.mark.slow
@networks
def test_the_joint_gradient_is_that_of_the_whole_network_at_every_cut(name):
    check_joint_gradient(name, cuts_of(name))


def check_joint_gradient(name, cuts):
    """Descent at rate 1 moves all weights by the gradient of the final loss."""
    model, network, rows = model_of(name), network_of(name), batch(name)

    def whole_loss(params):
        *layers, head = params
        values = rows.inputs
        held = (*network.layers, network.final_head)
        stages = (*model.stages, model.final_head)
        for stage, own, variables in zip(stages, (*layers, head), held, strict=True):
            variables = {**variables, "params": own}
            values, _ = stage.apply(variables, values, rows.mask, train=True)
        return masked_cross_entropy(values, rows.labels, rows.mask)[0]

    everything = [v["params"] for v in (*network.layers, network.final_head)]
    gradient = jax.grad(whole_loss)(everything)
    expected = jax.tree.map(jnp.subtract, everything, gradient)
    for cut in cuts:
        specs, client, server = parts(name, cut)
        client, server, _ = joint_step(*specs, client, server, rows, RATES)
        layers = (*client.layers, *server.layers, server.head)
        assert_same([layer.params for layer in layers], expected, rtol=1e-5, atol=1e-6)


@networks
def test_padding_does_not_leak_into_real_rows(name):
    """What it holds changes neither features, statistics, gradients nor metrics."""
    cut = middle_of(name)
    specs, client, server = parts(name, cut)
    results = []
    for padding in (0.0, 1e3):
        rows = batch(name, padding)
        *moved, metrics = joint_step(*specs, client, server, rows, RATES)
        features, logits, _ = forward(
            specs[0], client, rows.inputs, rows.mask, train=True
        )
        results.append((moved, metrics, features[:REAL], logits[:REAL]))
    assert_equal(*results)


@of_all(*SLOW, "vit", "sian")
def test_stacked_is_looped(name):
    """Two clients with weights of their own, side by side and one by one."""
    cut = middle_of(name)
    spec = parts(name, cut)[0][0]
    clients = [parts(name, cut, seed)[1] for seed in (0, 1)]
    rows = batch(name)

    def step(client):
        return branch_step(spec, client, rows, RATES[0])

    stacked = jax.vmap(step)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *clients))
    for k, client in enumerate(clients):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], stacked)
        for one, other in zip(*map(jax.tree.leaves, (own, step(client))), strict=True):
            scale = max(1.0, float(abs(other).max(initial=0)))
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_codec(name, dtype):
    """Shapes, dtypes, bytes, and that samples and states do not mix."""
    codec = CODECS.make(name)
    values = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(dtype)
    sample = jax.ShapeDtypeStruct((1, 4, 3), dtype)
    state = codec.init(sample)

    @jax.jit
    def cross(values):
        mask = jnp.ones(len(values), bool)
        message, after = codec.encode(values, state, mask)
        arrived = codec.decode(message, dtype)
        return message, after, arrived, codec.nbytes(message)

    message, after, arrived, sizes = cross(values)
    assert (arrived.shape, arrived.dtype) == (values.shape, dtype)
    assert np.isfinite(arrived.astype(np.float32)).all()
    leaves = jax.tree.leaves(message)
    assert {len(leaf) for leaf in leaves} == {5}
    assert (sizes.shape, sizes.dtype) == ((5,), jnp.int32)
    assert int(sizes.sum()) == sum(np.asarray(leaf).nbytes for leaf in leaves)
    assert sample_bytes(codec, sample) == sizes[0]
    # a step of a scan gives the state that the next takes
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(*map(jax.tree.leaves, (after, state)), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    infinite = values.copy()
    infinite[1, 0, 0] = np.inf  # the server has to see it, to refuse the step
    assert not np.isfinite(cross(infinite)[2][1].astype(np.float32)).all()
    for n in range(5):
        alone = cross(values[n : n + 1])[0]
        assert_equal(alone, jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], message))


DENSE = tiny_model((DenseLayer(8), DenseLayer(5)))  # compiles fast
SIZES = {4: 7, 1: 3, 6: 4}
FEDERATIONS = ({4: 1, 1: 2, 6: 1}, {4: 1, 1: 1, 6: 1}, {4: 2, 1: 2, 6: 2}, {4: 1})


def accepted(make):
    """The first federation that an algorithm takes, and its strategy on it."""
    for cuts in FEDERATIONS:
        federation = tiny_federation(cuts, DENSE)
        try:
            return federation, make(federation)
        except UserError:
            continue
    raise AssertionError(f"{make.__name__} takes none of {FEDERATIONS}")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_trains_alike_in_all_forms_of_the_engine(name):
    """A round moves clients and servers, and uses every sample once."""
    make = ALGORITHMS[name].make
    federation, strategy = accepted(make)
    sizes = {i: SIZES[i] for group in federation.groups for i in group.ids}
    shards, results = tiny_shards(sizes), []
    for axis in CLIENT_AXES:
        own = make(federation._replace(one_by_one=axis == "map"))
        state, log = train(own, federation, shards, axis=axis, rounds=1)
        results.append((branches(federation, own, state), log[0][2]))
    for other in results[1:]:
        assert_same(results[0], other, rtol=1e-3, atol=1e-5)
    found, metrics = results[0]
    assert metrics.exit.count.sum() == metrics.server.count.sum() == sum(sizes.values())
    start = branches(federation, strategy, jax.jit(strategy.init)(KEY))
    for i, pair in found.items():
        for after, before in zip(pair, start[i], strict=True):
            moved = jax.tree.map(
                lambda a, b: np.abs(a - b).max(), after.head.params, before.head.params
            )
            assert max(jax.tree.leaves(moved)) > 1e-4


@jax.numpy_dtype_promotion("standard")  # optax relies on it
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_descends_and_steps_stacks_row_by_row(name):
    """On (x - 1)^2 / 2, each of three parameters alone and all as one stack."""
    optimizer = OPTIMIZERS.make(name)
    params = {"kernel": jnp.array([[-1.0], [0.0], [3.0]])}
    rate = jnp.float32(0.03)

    def train(params):
        state = optimizer.init(params)
        for _ in range(40):
            gradient = jax.tree.map(lambda x: x - 1, params)
            update, state = optimizer.update(
                gradient, state, params, learning_rate=rate
            )
            params = optax.apply_updates(
                params, jax.tree.map(lambda u: rate * u, update)
            )
        return params, state

    stacked = jax.jit(jax.vmap(train))(params)
    after = np.abs(stacked[0]["kernel"] - 1)
    assert (after < 0.7 * np.abs(params["kernel"] - 1)).all()
    alone = jax.jit(train)
    for row in range(3):
        pick = functools.partial(jax.tree.map, lambda leaf, row=row: leaf[row])
        assert_same(alone(pick(params)), pick(stacked), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_has_a_rate_for_every_step_up_to_the_peak(name):
    rates = make_schedule(name, learning_rate=0.3, warmup_steps=3, total_steps=20)
    found = rates(np.arange(20))
    assert (found.shape, found.dtype) == ((20,), np.float32)
    np.testing.assert_allclose(found[:3], [0.1, 0.2, 0.3], rtol=1e-6)
    assert (found > 0).all() and found.max() == np.float32(0.3)
    np.testing.assert_array_equal(rates(7), found[7])  # a step alone


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_changes_each_image_by_itself(name):
    """The form stays, equal keys give equal images, and no other image is read."""
    augment = jax.jit(AUGMENTATIONS.make(name))
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 2)).astype(np.float32)
    found = augment(KEY, images)
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    assert np.isfinite(found).all()
    assert_equal(augment(KEY, images), found)
    others = images.copy()
    others[1] = 7
    np.testing.assert_array_equal(
        np.delete(augment(KEY, others), 1, axis=0), np.delete(found, 1, axis=0)
    )
