"""What crosses the link, against plain numpy and the bytes of real arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import DenseLayer, tiny_data, tiny_federation, tiny_model

from hsee_jax import cli
from hsee_jax.algorithms import (
    averaging,
    centralized,
    fedavg,
    local,
    sequential,
    splitfed_v1,
    splitfed_v2,
)
from hsee_jax.config import override, preset
from hsee_jax.core import Batch, UserError
from hsee_jax.federation.branch import (
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.federation.step import branch_step, joint_step
from hsee_jax.inference.gate import make_gate
from hsee_jax.link import CODECS, sample_bytes
from hsee_jax.nn import NETWORKS
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.nn.model import init_network
from hsee_jax.runs.build import build
from hsee_jax.systems.traffic import averages_in, nbytes, traffic_of

MODEL = tiny_model((DenseLayer(8), DenseLayer(5)))  # compiles fast
DESCENT = optax.scale(-1.0)
NETWORK = jax.jit(lambda: init_network(MODEL, jax.random.key(0)))()
INT8 = CODECS.make("int8")


@NETWORKS.register
def dense_pair(*, num_classes, input_shape):
    """Two dense layers, whose sizes are easily counted."""
    return tiny_model((DenseLayer(8), DenseLayer(5)), input_shape, num_classes)


@partial(jax.jit, static_argnums=1)
def encode(values, name):
    """The first message for features."""
    codec = CODECS.make(name)
    sample = jax.ShapeDtypeStruct((1, *values.shape[1:]), values.dtype)
    return codec.encode(values, codec.init(sample))[0]


@partial(jax.jit, static_argnums=1)
def cross(values, name):
    """The features that arrive."""
    return CODECS.make(name).decode(encode(values, name), values.dtype)


def features(dtype=np.float32):
    """Six samples: three of ordinary size, then a huge, a tiny and a constant one."""
    values = np.random.default_rng(0).normal(size=(6, 4, 3, 2)).astype(np.float32)
    values[1] = np.maximum(values[1], 0)
    values *= np.array([1, 7, 300, 1e30, 1e-30, 0], np.float32)[:, None, None, None]
    values[5] = -2.5
    return values.astype(dtype)


def by_hand(sample):
    """Codes and values of one sample, in 256 steps from its minimum."""
    low, high = sample.min(), sample.max()
    step = (high - low) / np.float32(255)
    codes = np.rint((sample - low) / step) if step else np.zeros_like(sample)
    return codes - 128, low + step * codes


def batch(count=6, padding=2):
    data = tiny_data(count + padding)
    images = jnp.asarray(data.images, jnp.float32) / 64 - 1
    return Batch(images, jnp.asarray(data.labels), jnp.arange(count + padding) < count)


def assert_same(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def test_int8_is_256_levels_between_a_samples_extremes():
    sent = features()
    message, arrived = encode(sent, "int8"), np.asarray(cross(sent, "int8"))
    assert message.codes.dtype == np.int8
    for n, sample in enumerate(sent):
        codes, values = by_hand(sample)
        rounding = 1e-6 * np.abs(sample).max()
        np.testing.assert_array_equal(message.codes[n], codes)
        np.testing.assert_allclose(arrived[n], values, rtol=0, atol=rounding)
        half_a_step = np.ptp(sample) / 255 / 2
        np.testing.assert_allclose(
            arrived[n], sample, rtol=0, atol=half_a_step + rounding
        )
    assert set(message.codes[0].ravel().tolist()) >= {-128, 127}
    assert not arrived[1][sent[1] == 0].any()
    np.testing.assert_array_equal(arrived[5], sent[5])


def test_float16_is_numpys_within_its_range():
    sent = features()
    expected = np.clip(sent, -65504, 65504).astype(np.float16)
    message = np.asarray(encode(sent, "float16"))
    assert message.dtype == jnp.float16
    np.testing.assert_array_equal(message, expected)
    assert np.isfinite(message).all()


@pytest.mark.parametrize("link", CODECS)
def test_bfloat16_arrives_as_bfloat16(link):
    sent = features(jnp.bfloat16)
    arrived = np.asarray(cross(sent, link))
    assert arrived.dtype == sent.dtype == jnp.bfloat16
    before, after = sent.astype(np.float32), arrived.astype(np.float32)
    assert np.isfinite(after).all()
    np.testing.assert_allclose(after[:3], before[:3], atol=np.ptp(before[2]) / 255)


@pytest.mark.parametrize("link", CODECS)
def test_what_is_not_finite_stays_so(link):
    """So that a divergence is seen, and by the sample alone that it is in."""
    sent = features()
    sent[1, 0, 0, 0] = np.nan
    arrived = np.asarray(cross(sent, link))
    assert np.isnan(arrived[1]).any()
    assert np.isfinite(np.delete(arrived, 1, axis=0)).all()


@pytest.mark.parametrize("link", CODECS)
def test_a_message_does_not_depend_on_its_company(link):
    every = jax.device_get(encode(features(), link))
    for n in range(6):
        own = jax.tree.map(lambda a, n=n: a[n : n + 1], every)
        alone = encode(features()[n : n + 1], link)
        jax.tree.map(np.testing.assert_array_equal, own, alone)


def test_a_full_link_adds_nothing_to_the_program():
    codec = CODECS.make("full")

    def crossed(values):
        return codec.decode(codec.encode(values, ())[0], values.dtype)

    assert not jax.make_jaxpr(crossed)(features()).eqns


PAIR = tiny_federation({0: 1, 1: 1}, MODEL)._replace(codec=INT8)
RATE = np.float32(0.1)


@jax.jit
def step_by_hand(client, server, rows):
    client_side, server_side = PAIR.specs(0)
    client, sent, _ = branch_step(client_side, client, rows, RATE)
    arrived = rows._replace(inputs=cross(sent, "int8"))
    server, _, server_metrics = branch_step(server_side, server, arrived, RATE)
    return client, server, server_metrics


@pytest.mark.parametrize("make", [averaging, sequential])
def test_a_step_is_that_on_the_features_that_arrive(make):
    """Two clients of one cut, all at once; the server's half by hand, in turn."""
    strategy = make(PAIR)
    state = jax.jit(strategy.init)(jax.random.key(0))
    rows = jax.device_get([batch(count=5, padding=3), batch(count=8, padding=0)])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    order = np.array([1, 0], np.int32)
    stepped = jax.jit(strategy.step)(state, (stacked,), order, RATE)
    state, after, (metrics,) = jax.device_get((state, *stepped))

    def member(tree, m):
        return jax.tree.map(lambda leaf: leaf[m], tree)

    server = state.servers[0]
    for m in order:
        if not strategy.shared:
            server = member(state.servers[0], m)
        client, server, scored = step_by_hand(
            member(state.clients[0], m), server, rows[m]
        )
        assert_same(member(after.clients[0], m), client, rtol=1e-4, atol=1e-6)
        assert_same(member(metrics.server, m), scored, rtol=1e-4)
        if not strategy.shared:
            assert_same(member(after.servers[0], m), server, rtol=1e-4, atol=1e-6)
    if strategy.shared:
        assert_same(after.servers[0], server, rtol=1e-4, atol=1e-6)


def both_branches():
    """A client's and its server's behind cut 1."""
    return init_client(NETWORK, 1, DESCENT), init_server(NETWORK, 1, DESCENT)


def test_a_joint_step_returns_the_gradient_at_what_arrived():
    """The client moves by the gradient of the server's loss there, pulled back."""
    client_side = client_spec(MODEL, 1, DESCENT, INT8)
    rows, rates = batch(), (jnp.float32(1), jnp.float32(1))

    @jax.jit
    def stepped(client, server):
        server_side = server_spec(MODEL, 1, DESCENT, INT8)
        return joint_step(client_side, server_side, client, server, rows, rates)[0]

    @jax.jit
    def moved_by_hand(client, server):
        def sent(params):
            branch = client.replace(layers=(client.layers[0].replace(params=params),))
            return forward(client_side, branch, rows.inputs, rows.mask, train=True)[0]

        def loss(arrived):
            plain = server_spec(MODEL, 1, DESCENT)
            logits = forward(plain, server, arrived, rows.mask, train=True)[1]
            return masked_cross_entropy(logits, rows.labels, rows.mask)[0]

        params = client.layers[0].params
        values, pull_back = jax.vjp(sent, params)
        (move,) = pull_back(jax.grad(loss)(cross(values, "int8")))
        return jax.tree.map(lambda a, b: a - b, params, move)

    new = stepped(*both_branches()).layers[0].params
    assert_same(new, moved_by_hand(*both_branches()), rtol=1e-5, atol=1e-6)


def test_gated_inference_sends_over_the_link():
    """Whoever is sent: the others in a part of the batch make no difference."""
    specs = client_spec(MODEL, 1, DESCENT, INT8), server_spec(MODEL, 1, DESCENT, INT8)
    client, server = both_branches()
    inputs, mask = batch(count=7, padding=0).inputs, jnp.ones(7, bool)

    @jax.jit
    def logits_over(client, server):
        values, _, _ = forward(specs[0], client, inputs, mask, train=False)
        plain = server_spec(MODEL, 1, DESCENT)
        return [
            forward(plain, server, cross(values, link), mask, train=False)[1]
            for link in ("full", "int8")
        ]

    full, expected = logits_over(client, server)
    gate = make_gate(*specs, batch_size=8, sizes=(2, 8))
    every = gate.answer(client, server, inputs, 0.0)
    np.testing.assert_allclose(every.logits, expected, rtol=1e-4, atol=1e-5)
    threshold = np.sort(every.uncertainty)[5]
    two = gate.answer(client, server, inputs, threshold)
    (sent,) = np.nonzero(~two.exited)
    assert len(sent) == 2
    np.testing.assert_allclose(two.logits[sent], expected[sent], rtol=1e-4, atol=1e-5)
    assert np.abs(expected - full).max() > 1e-4


@pytest.mark.parametrize("link", CODECS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_bytes_of_a_message_are_those_of_its_arrays(link, dtype):
    real = encode(features(dtype), link)
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(real))
    codec, sample = CODECS.make(link), jax.ShapeDtypeStruct((1, 4, 3, 2), dtype)
    assert codec.nbytes(real).tolist() == [sample_bytes(codec, sample)] * 6
    assert nbytes(real) == size == 6 * sample_bytes(codec, sample)
    each = {"full": 24 * jnp.dtype(dtype).itemsize, "float16": 48, "int8": 24 + 8}
    assert size == 6 * each[link]


def traffic_with(federation, strategy):
    state = jax.eval_shape(strategy.init, jax.random.key(0))
    return traffic_of(federation, strategy, state)


def test_the_bytes_of_a_sample_by_strategy():
    """Behind cut 1 there are 5 x 5 x 4 floats, behind cut 3 there are 8."""

    def samples(make, cuts=(1, 3), link="full", **chosen):
        federation = tiny_federation(dict(enumerate(cuts)))._replace(
            codec=CODECS.make(link)
        )
        traffic = traffic_with(federation, make(federation, **chosen))
        return [one.sample for one in traffic]

    assert samples(local) == [(404, 0), (36, 0)]
    assert samples(averaging, link="float16") == [(204, 0), (20, 0)]
    assert samples(sequential, link="int8") == [(112, 0), (20, 0)]
    both = samples(sequential, link="int8", boundary="joint")
    assert both == [(112, 400), (20, 32)]
    assert samples(splitfed_v2, (1, 1)) == [(404, 400)]
    assert samples(fedavg, (3, 3)) == samples(centralized, (2,)) == [(0, 0)]
    for make, cuts in ((fedavg, (3, 3)), (centralized, (2,))):
        message = f"link: .* no effect on {make.__name__}, .* allowed is full"
        with pytest.raises(UserError, match=message):
            samples(make, cuts, link="int8")


def test_the_bytes_of_an_average_are_those_of_the_clients_layers():
    """Against the arrays of the state, of two clients in a stack."""

    def weights(make, cuts=(1, 3, 1, 3), **chosen):
        federation = tiny_federation(dict(enumerate(cuts)))
        traffic = traffic_with(federation, make(federation, **chosen))
        return [one.weights for one in traffic]

    shapes = jax.eval_shape(
        averaging(tiny_federation({0: 1, 1: 3, 2: 1, 3: 3})).init, jax.random.key(0)
    )
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def held(stack, *parts, without="nothing"):
        layers = [
            [getattr(layer, part) for part in parts]
            for layer in (*stack.layers, stack.head)
        ]
        leaves = jax.tree_util.tree_leaves_with_path(layers)
        return (
            sum(
                leaf.nbytes
                for path, leaf in leaves
                if without not in jax.tree_util.keystr(path)
            )
            // 2
        )

    def clients(*parts, **chosen):
        return [held(stack, *parts, **chosen) for stack in state.clients]

    for make in (local, sequential, averaging):
        assert weights(make) == [0, 0]
    everything = partial(averaging, average="all_holders")
    assert weights(everything) == clients("params", "batch_stats")
    with_state = partial(everything, optimizer_state="average")
    assert weights(with_state) == clients("params", "batch_stats", "opt_state")
    assert weights(with_state, batch_norm="keep_local") == clients(
        "params", "opt_state", without="BatchNorm"
    )
    for make in (splitfed_v1, splitfed_v2):
        assert weights(make, (1, 1)) == clients("params", "batch_stats")[:1]
    both = [
        held(stack, "params", "batch_stats")
        for stack in (state.clients[1], state.servers[1])
    ]
    assert weights(fedavg, (3, 3)) == [sum(both)]


def test_how_often_layers_are_averaged_in_a_round():
    """Rounds of 3 steps: steps 1..3, 4..6, 7..9."""
    federation = tiny_federation({0: 1})

    def counts(**chosen):
        strategy = averaging(federation, **chosen)
        return [averages_in(strategy, number, 3) for number in (1, 2, 3)]

    assert counts() == [1, 1, 1]
    assert counts(period=2) == [0, 1, 0]
    assert counts(period=0) == [0, 0, 0]
    assert counts(period=2, period_unit="steps") == [1, 2, 1]
    assert averages_in(local(federation), 1, 3) == 0


def test_a_run_counts_what_crossed():
    """A sample is a byte for each of 8 or 5 features, 8 of range and 4 of label.

    A layer has a weight for each pair of inputs and outputs, and biases, and so has the
    exit head of 10 classes. Two of three clients take part in a round of two steps.
    """
    up, first = {1: 8 + 12, 2: 5 + 12}, 28 * 28 * 8 + 8
    weights = {1: 4 * (first + 90), 2: 4 * (first + 45 + 60)}
    config = override(
        preset("demo"),  # averages over clients and servers
        network="dense_pair",
        num_clients=3,
        cuts=("1", "layer2"),
        link="int8",
        period=3,
        period_unit="steps",
        rounds=3,
        participation=0.7,
        max_train_samples=60,
        max_test_samples=20,
        partition="quantity",
    )
    experiment = build(config)
    shares = experiment.manifest
    assert [share.cut for share in shares] == [1, 2, 1]
    samples = [share.samples for share in shares]
    steps = experiment.learning_rates.shape[1]

    state = experiment.init()
    for number in (1, 2, 3):
        state, plan, progress = experiment.run_round(state)
        there = plan.ids[plan.active].tolist()
        assert len(there) == 2
        times = number * steps // 3 - (number - 1) * steps // 3
        means = times * sum(weights[shares[i].cut] for i in there)
        sent = sum(samples[i] * up[shares[i].cut] for i in there)
        crossed = experiment.round_bytes(number, progress.metrics)
        assert crossed == (sent + means, means)

    both = (samples[0] + samples[2]) / 2, samples[1]
    for one, cut, mean in zip(experiment.bytes_by_cut(), (1, 2), both, strict=True):
        assert one["cut"] == cut
        assert one["step"] == {"up_bytes": 16 * up[cut], "down_bytes": 0}
        down = weights[cut] * steps / 3
        assert one["round"]["down_bytes"] == pytest.approx(down)
        assert one["round"]["up_bytes"] == pytest.approx(mean * up[cut] + down)


def test_info_shows_what_crosses_at_every_cut(capsys):
    words = [
        "--network",
        "tiny",
        "--cuts",
        "1",
        "--link",
        "int8",
        "--boundary",
        "joint",
    ]
    assert cli.main(["info", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    shown = {row[0]: row[-2:] for row in rows if row[0]}
    codes = {"1": 28 * 28 * 4, "2": 28 * 28 * 3, "3": 8}
    assert shown == {
        cut: [f"{count + 12:,}", f"{4 * count:,}"] for cut, count in codes.items()
    }
