"""Codecs with a state of each client, and with messages of varying size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rounds import KEY, assert_same, branches, train
from tiny import DenseLayer, tiny_data, tiny_federation, tiny_model, tiny_shards

from hsee_jax.algorithms import averaging, sequential
from hsee_jax.engine.host_store import HostStore
from hsee_jax.federation.crossing import encode
from hsee_jax.link import Codec, pack_bytes, unpack_bytes
from hsee_jax.runs.checkpoint import find, load
from hsee_jax.runs.checkpoint_writer import Writer
from hsee_jax.systems.traffic import round_bytes, traffic_of

MODEL = tiny_model((DenseLayer(8), DenseLayer(5)))  # compiles fast
CUTS = {4: 1, 1: 2, 6: 1, 5: 1}
SIZES = {4: 7, 1: 3, 6: 9, 5: 6}  # in batches of 4: steps 2, 1, 3, 2 a round
STEPS = {i: -(-size // 4) for i, size in SIZES.items()}


class Feedback(NamedTuple):
    """What a client has to make good, and how many messages it has sent."""

    error: jax.Array  # float32 [1, ...]: mean over the last batch
    count: jax.Array  # int32 []


def feedback():
    """Round to quarters; the mean error of a batch is added to the next."""

    def init(features):
        return Feedback(jnp.zeros(features.shape), jnp.zeros((), jnp.int32))

    def encode(features, state, mask):
        wanted = features + jnp.broadcast_to(state.error, features.shape)
        quarters = jnp.round(4 * wanted)
        rows = jnp.reshape(mask, (-1, *[1] * (features.ndim - 1)))
        missed = jnp.where(rows, wanted - quarters / 4, 0)
        count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)
        error = jnp.sum(missed, axis=0, keepdims=True) / count
        return quarters.astype(jnp.int8), Feedback(error, state.count + 1)

    def decode(message, dtype):
        return message.astype(dtype) / 4

    return Codec(init, encode, decode, lambda message: jnp.full(len(message), 8))


def sparse():
    """Send what is positive: four bytes for each such feature."""

    def nbytes(message):
        return 4 * jnp.sum(message > 0, axis=1, dtype=jnp.int32)

    return Codec(
        init=lambda features: (),
        encode=lambda features, state, mask: (jnp.maximum(features, 0), state),
        decode=lambda message, dtype: message.astype(dtype),
        nbytes=nbytes,
    )


def federation_of(codec, cuts=CUTS):
    return tiny_federation(cuts, MODEL)._replace(codec=codec)


def links(federation, strategy, state):
    """The state of each client's codec."""
    return {i: c.link for i, (c, _) in branches(federation, strategy, state).items()}


@pytest.fixture(scope="module")
def looped():
    """Two rounds as a loop: federation, strategy and state."""
    federation = federation_of(feedback())
    strategy = averaging(federation)
    state, _ = train(strategy, federation, tiny_shards(SIZES), axis="loop")
    return federation, strategy, state


def test_each_client_has_a_state_of_its_own(looped):
    """It counts the client's messages alone, and differs where the data do."""
    found = links(*looped)
    assert {i: int(link.count) for i, link in found.items()} == {
        i: 2 * steps for i, steps in STEPS.items()
    }
    assert found[4].error.shape == (1, 8)
    assert found[1].error.shape == (1, 5)
    assert np.abs(found[4].error - found[6].error).max() > 1e-3


def test_the_state_is_the_same_in_both_forms_of_the_engine(looped):
    federation, strategy, state = looped
    stacked, _ = train(strategy, federation, tiny_shards(SIZES), axis="vmap")
    assert_same(links(federation, strategy, stacked), links(*looped), atol=1e-5)


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_a_shared_server_leaves_the_state_with_its_client(axis):
    federation = federation_of(feedback())
    strategy = sequential(federation)
    state, _ = train(strategy, federation, tiny_shards(SIZES), axis=axis)
    counts = {i: int(s.count) for i, s in links(federation, strategy, state).items()}
    assert counts == {i: 2 * steps for i, steps in STEPS.items()}
    assert jax.tree.leaves(state.servers[0].link) == []


def test_padding_alone_leaves_the_state_as_it_is():
    spec = federation_of(feedback()).specs(0)[0]
    link = Feedback(jnp.full((1, 8), 0.1), jnp.int32(3))
    client = averaging(federation_of(feedback())).init(KEY).clients[0]
    client = jax.tree.map(lambda leaf: leaf[0], client).replace(link=link)
    values = jnp.linspace(-1.0, 1.0, 32).reshape(4, 8)
    _, after = encode(spec, client, values, jnp.zeros(4, bool))
    jax.tree.map(np.testing.assert_array_equal, after, client)
    _, after = encode(spec, client, values, jnp.arange(4) < 1)
    assert after.link.count == 4
    # nor do rows of padding reach it, or features that are not finite
    other = values.at[1:].set(7.0)
    _, again = encode(spec, client, other, jnp.arange(4) < 1)
    jax.tree.map(np.testing.assert_array_equal, again.link, after.link)
    _, broken = encode(spec, client, values * jnp.nan, jnp.ones(4, bool))
    jax.tree.map(np.testing.assert_array_equal, broken, client)


def test_the_state_waits_on_the_host_for_its_client():
    """Two of four clients take part in a round; the others keep what they have.

    Cut 1 has three of them, and two slots.
    """
    federation = federation_of(feedback())
    strategy = averaging(federation)
    options = {"axis": "loop", "participation": 0.5, "rounds": 3}
    shards = tiny_shards(SIZES)
    every, log = train(strategy, federation, shards, **options)
    few, _ = train(strategy, federation, shards, few=True, **options)
    found = links(federation, strategy, few)
    assert_same(found, links(federation, strategy, every), atol=1e-6)
    rounds = {i: 0 for i in CUTS}
    for plan, _, _ in log:
        for i in plan.ids[plan.active].tolist():
            rounds[i] += 1
    assert rounds == {4: 2, 1: 1, 6: 1, 5: 2}
    assert {i: int(link.count) for i, link in found.items()} == {
        i: STEPS[i] * count for i, count in rounds.items()
    }


def test_a_checkpoint_holds_the_state(looped, tmp_path):
    """Through the store on the host, whose rows are those of all clients."""
    federation, strategy, state = looped
    store = HostStore(federation, strategy, (1, 1))
    kept = store.from_checkpoint(state)
    with Writer(tmp_path, keep=1) as writer:
        writer.save(2, 0, store.to_checkpoint(kept), {"score": 0.0})
    read = load(find(tmp_path), store.checkpoint_shapes())
    jax.tree.map(np.testing.assert_array_equal, read, jax.device_get(state))


@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_a_round_counts_messages_of_any_size(axis):
    """Without learning every sample sends the same, which NumPy counts."""
    federation = federation_of(sparse(), cuts={4: 1, 6: 1})
    strategy = averaging(federation, period=0)
    shards = tiny_shards({4: 7, 6: 9})
    start = strategy.init(KEY)
    _, log = train(strategy, federation, shards, axis=axis, rounds=1, peak=0.0)
    weights = jax.tree.map(np.asarray, start.clients[0].layers[0].params)
    data = tiny_data()
    images = (data.images.astype(np.float32) / 255 - 0.5) / 0.25
    (layer,) = weights.values()
    values = images.reshape(len(images), -1) @ layer["kernel"][0] + layer["bias"][0]
    expected = sum(
        4 * int((values[shard] > 0).sum()) + 4 * len(shard) for shard in shards.values()
    )
    traffic = traffic_of(federation, strategy, start)
    assert round_bytes(traffic, (2,), log[0][2], 0) == (expected, 0)


counts = st.integers(0, 2**31 - 1)


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(counts, counts), min_size=1, max_size=20))
@example(pairs=[(2**31 - 1, 2**31 - 1)] * 4)
def test_sums_of_bytes_do_not_overflow(pairs):
    """As a compiled round adds them, in int32; against Python's integers."""
    packed = [np.asarray(pack_bytes(*map(_rows, pair))) for pair in pairs]
    total = np.sum(packed, axis=0, dtype=np.int32)
    assert unpack_bytes(total).tolist() == [
        sum(side) for side in zip(*pairs, strict=True)
    ]


def test_the_bytes_of_a_step_do_not_overflow():
    """A message of 1,024 rows of 256 x 56 x 56 floats is above 2 GiB."""
    large = jnp.full(1024, 256 * 56 * 56 * 4 + 4, jnp.int32)
    found = unpack_bytes(pack_bytes(large, jnp.zeros_like(large)))
    assert found.tolist() == [1024 * (256 * 56 * 56 * 4 + 4), 0]


def _rows(count):
    return jnp.full(1, count, jnp.int32)


def test_as_many_steps_as_are_promised_can_be_added():
    """32,768 of the largest message there is: 2^46 bytes less 2^15."""
    most = pack_bytes(_rows(2**31 - 1), _rows(0))
    total = jnp.int32(32_768) * most
    assert unpack_bytes(total).tolist() == [32_768 * (2**31 - 1), 0]
