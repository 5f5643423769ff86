"""What crosses the link, against plain numpy and the bytes of real arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import DenseLayer, tiny_data, tiny_federation, tiny_model

from hsee_jax.algorithms import averaging, sequential
from hsee_jax.core import Batch
from hsee_jax.federation.branch import (
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.federation.fused import joint_step
from hsee_jax.federation.step import branch_step
from hsee_jax.inference.gate import make_gate
from hsee_jax.link import (
    CODECS,
    carry_bytes,
    pack_bytes,
    sample_bytes,
    unpack_bytes,
)
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.nn.model import init_network
from hsee_jax.systems.traffic import nbytes

MODEL = tiny_model((DenseLayer(8), DenseLayer(5)))  # compiles fast
DESCENT = optax.scale(-1.0)
NETWORK = jax.jit(lambda: init_network(MODEL, jax.random.key(0)))()
INT8 = CODECS.make("int8")


@partial(jax.jit, static_argnums=1)
def encode(values, name):
    """The first message for features."""
    codec = CODECS.make(name)
    sample = jax.ShapeDtypeStruct((1, *values.shape[1:]), values.dtype)
    mask = jnp.ones(len(values), bool)
    return codec.encode(values, codec.init(sample), mask)[0]


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


@pytest.mark.parametrize("link", ["full", "float16", "int8"])
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

    def crossed(values, mask):
        return codec.decode(codec.encode(values, (), mask)[0], values.dtype)

    mask = np.ones(len(features()), bool)
    assert not jax.make_jaxpr(crossed)(features(), mask).eqns


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
    width = jnp.dtype(dtype).itemsize
    each = {"full": 24 * width, "float16": 48, "int8": 24 + 8, "topk": 6 * (width + 2)}
    assert size == 6 * each[link]


@pytest.mark.parametrize("rows", [3, 131_100])
@pytest.mark.parametrize("size", [1, 255, 32_767, 16_388, 2**31 // 131_100 * 7])
def test_bytes_of_many_large_rows_do_not_overflow(rows, size):
    """In a step of many rows, and in a round of as many steps."""
    up, down = jnp.full(rows, size, jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    packed = pack_bytes(up, down)
    expected = [rows * size, rows * (rows - 1) // 2]
    assert unpack_bytes(packed).tolist() == expected
    step = pack_bytes(jnp.array([size]), jnp.array([size]))

    def add(total, _):
        return carry_bytes(total + step), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(step), length=rows)
    assert unpack_bytes(total).tolist() == [rows * size] * 2
