"""The trimmed mean and the median of layers, against SciPy and NumPy."""

import re
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import KEY, assert_same, branches
from scipy.stats import trim_mean
from test_mesh import first_devices
from tiny import TINY, tiny_federation

from hsee_jax import cli
from hsee_jax.algorithms import ALGORITHMS, averaging, fedavg, splitfed_v1, splitfed_v2
from hsee_jax.config import override, preset
from hsee_jax.core import UserError
from hsee_jax.federation import REDUCERS, average_layers
from hsee_jax.federation.reduction import num_trimmed
from hsee_jax.parallel.mesh import CLIENTS, SAME, SPREAD, on_devices
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.data import build_info

SHARE = 0.25
SHARES = {"mean": 0.0, "trimmed_mean": SHARE, "median": 0.0}
ORACLES = {
    "mean": partial(np.mean, axis=0),
    "trimmed_mean": partial(trim_mean, proportiontocut=SHARE, axis=0),
    "median": partial(np.median, axis=0),
}
ROBUST = ("trimmed_mean", "median")
CUTS = {4: 2, 1: 1, 6: 2, 5: 3, 2: 2, 8: 2, 3: 2}  # layer 3 has six servers, 5 alone
ABSENT = 8
FLAGS = {"weights": "uniform", "optimizer_state": "average"}


@pytest.mark.parametrize("count", [7, 10, 50, 100, 200])
def test_a_share_leaves_out_what_fractions_say(count):
    for hundredths in range(50):
        exact = Fraction(hundredths, 100) * count
        assert num_trimmed(hundredths / 100, count) == exact.__floor__()


@pytest.mark.parametrize("holders", range(6))
def test_somebody_is_left_of_any_share(holders):
    assert 2 * num_trimmed(0.49999999, holders) < max(holders, 1)


def noise(strategy):
    """A state of noise, in which counts are 0."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.normal(size=leaf.shape) if leaf.dtype == jnp.float32 else 0
        return jnp.full(leaf.shape, values, leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(strategy.init, KEY))


def aggregate(strategy, federation, weight_of, poison=None):
    """Branches by client before and after a mean; a poison changes what it takes."""
    state = noise(strategy)
    weights = tuple(
        jnp.asarray([weight_of(i) for i in group.ids], jnp.float32)
        for group in federation.groups
    )
    state = state if poison is None else poison(state)
    before = branches(federation, strategy, state)
    after, _ = jax.jit(partial(average_layers, strategy))(state, weights)
    return before, branches(federation, strategy, after)


def held(pair):
    """The parts of a client's network by name, its own and those of its server."""
    client, server = pair
    layers = (*client.layers, *server.layers)
    parts = {f"layer {i}": layer for i, layer in enumerate(layers)}
    exit_head = f"exit head {len(client.layers)}"
    return parts | {exit_head: client.head, "final head": server.head}


@pytest.mark.parametrize("name", REDUCERS)
def test_each_layer_is_reduced_over_those_who_hold_it(name):
    """Parameters, statistics and momentum; the absent is not in it, but receives it."""
    federation = tiny_federation(CUTS)
    options = {"aggregate": name, "trim_share": SHARES[name], **FLAGS}
    strategy = averaging(federation, average="all_holders", **options)

    def spoil(state):
        """Let the absent client hold NaN, which is a member of the second group."""
        member = federation.groups[1].ids.index(ABSENT)
        clients = list(state.clients)
        clients[1] = jax.tree.map(lambda leaf: leaf.at[member].set(jnp.nan), clients[1])
        return state.replace(clients=tuple(clients))

    before, after = aggregate(strategy, federation, lambda i: float(i != ABSENT), spoil)
    parts = {i: held(pair) for i, pair in before.items()}
    for i, pair in after.items():
        for part, found in held(pair).items():
            holders = [p[part] for j, p in parts.items() if j != ABSENT and part in p]
            rows = jax.tree.map(lambda *leaves: np.stack(leaves), *holders)
            expected = jax.tree.map(ORACLES[name], rows)
            assert_same(found, expected, rtol=1e-5, atol=1e-6)
            if part == "exit head 3":
                assert i == 5 and len(holders) == 1
                assert_same(found, holders[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", REDUCERS)
def test_what_one_client_holds_stays_bit_for_bit(name):
    own = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    weights = jnp.asarray([0.0, 7.0, 0.0])
    found = reduce_groups(name, [jnp.asarray(own)], [weights])
    np.testing.assert_array_equal(found, own[1])


numbers = st.floats(-100, 100, width=32)
pairs = st.lists(st.tuples(numbers, numbers), min_size=9, max_size=9)
masks = st.lists(st.booleans(), min_size=9, max_size=9).filter(any)


@pytest.mark.parametrize("name", REDUCERS)
@settings(max_examples=40, deadline=None)
@given(rows=pairs, there=masks)
def test_any_holders_may_be_absent(name, rows, there):
    """Of two groups; what is left is reduced as SciPy and NumPy reduce a list."""
    values, weights = np.asarray(rows, np.float32), np.asarray(there, np.float32)
    found = reduce_groups(name, [values[:4], values[4:]], [weights[:4], weights[4:]])
    expected = ORACLES[name](values[np.asarray(there)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@partial(jax.jit, static_argnums=0)
def reduce_groups(name, holders, weights):
    return REDUCERS.make(name, SHARES[name]).reduce(holders, weights, None)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_poisoned_holder_moves_the_mean_alone(name):
    """One of ten sends what it likes; the others lie between -1 and 1."""
    rows = np.random.default_rng(0).uniform(-1, 1, (10, 100)).astype(np.float32)
    for poison in (1e9, -1e9, np.inf, np.nan):
        rows[3] = poison
        found = reduce_groups(name, [jnp.asarray(rows)], [jnp.ones(10)])
        assert np.all(np.abs(found) <= 1) == (name in ROBUST), poison


@pytest.mark.parametrize("name", REDUCERS)
def test_devices_reduce_as_one_does(name):
    """Four holders that take part on eight devices, beside empty slots."""
    reduce = REDUCERS.make(name, SHARES[name]).reduce
    rows = np.random.default_rng(0).normal(size=(16, 30)).astype(np.float32)
    weights = np.zeros(16, np.float32)
    weights[[1, 2, 8, 15]] = 1
    rows[weights == 0] = np.nan
    holders, shares = [jnp.asarray(rows)], [jnp.asarray(weights)]
    spread = on_devices(
        lambda holders, weights: reduce(holders, weights, CLIENTS),
        first_devices(8),
        (SPREAD, SPREAD),
        SAME,
    )
    found = jax.jit(spread)(holders, shares)
    np.testing.assert_allclose(found, reduce(holders, shares, None), rtol=1e-6)
    np.testing.assert_allclose(found, ORACLES[name](rows[weights > 0]), rtol=1e-5)


def test_the_mean_is_a_dot_of_shares():
    """Bit for bit, as without reducers."""
    rows = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
    weights = jnp.arange(9, dtype=jnp.float32)
    parts = [jnp.asarray(rows[:4]), jnp.asarray(rows[4:])]

    @jax.jit
    def by_hand(one, other):
        shares = weights / (jnp.sum(weights[:4]) + jnp.sum(weights[4:]))
        dot = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        return dot(shares[:4], one) + dot(shares[4:], other)

    found = reduce_groups("mean", parts, [weights[:4], weights[4:]])
    np.testing.assert_array_equal(found, by_hand(*parts))


@pytest.mark.parametrize("make, cut", [(fedavg, 3), (splitfed_v1, 2), (splitfed_v2, 2)])
def test_baselines_reduce_as_well(make, cut):
    federation = tiny_federation(dict.fromkeys(range(5), cut))
    strategy = make(federation, aggregate="median", weights="uniform")
    before, after = aggregate(strategy, federation, lambda i: 1.0)
    kernels = [
        client.layers[0].params["Conv_0"]["kernel"] for client, _ in before.values()
    ]
    expected = np.median(np.stack(kernels), axis=0)
    for client, _ in after.values():
        found = client.layers[0].params["Conv_0"]["kernel"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_flags_choose_the_reducer():
    """The server of each client gets SciPy's trimmed mean of its layers."""
    config = override(
        preset("demo"),
        **TINY,
        num_clients=5,
        cuts=("1",),
        weights="uniform",
        aggregate="trimmed_mean",
        trim_share=SHARE,
    )
    federation = build_federation(config, build_info(config.data))
    strategy = build_strategy(config, federation)
    before, after = aggregate(strategy, federation, lambda i: 1.0)
    rows = [server.head.params["Dense_0"]["kernel"] for _, server in before.values()]
    found = after[0][1].head.params["Dense_0"]["kernel"]
    expected = trim_mean(np.stack(rows), SHARE, axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_readers_are_those_that_average():
    for option in ("aggregate", "trim_share"):
        readers = ALGORITHMS.readers(option)
        assert set(readers) == {
            "averaging",
            "fedavg",
            "sequential",
            "splitfed_v1",
            "splitfed_v2",
            "vicreg",
        }


@pytest.mark.parametrize(
    "options, line",
    [
        ({"aggregate": "krum"}, "aggregate: krum is unknown"),
        ({"aggregate": "median"}, "weights: samples is not allowed with .* median"),
        ({"aggregate": "trimmed_mean"}, "trim_share: 0.0 is not allowed with"),
        ({"aggregate": "median", "trim_share": 0.2}, "trim_share: 0.2 has no effect"),
        ({"trim_share": 0.2}, "trim_share: 0.2 has no effect on aggregate mean"),
        (
            {"aggregate": "trimmed_mean", "trim_share": 0.1, "weights": "uniform"},
            "trim_share: 0.1 of 7 clients is less than one; allowed is 0.1429 or more",
        ),
    ],
)
def test_what_has_no_effect_is_refused(options, line):
    with pytest.raises(UserError, match=line):
        averaging(tiny_federation(CUTS), **options)


@pytest.mark.parametrize("count", range(2, 20))
def test_the_share_that_an_error_names_is_allowed(count):
    given = {"aggregate": "trimmed_mean", "weights": "uniform"}
    cuts = dict.fromkeys(range(count), 1)
    with pytest.raises(UserError, match="is less than one") as error:
        averaging(tiny_federation(cuts), trim_share=0.01, **given)
    words = str(error.value)
    if count == 2:
        assert words.endswith("allowed are 3 clients or more")
    else:
        least = float(re.search(r"allowed is (\S+) or more", words)[1])
        averaging(tiny_federation(cuts), trim_share=least, **given)


def test_a_share_of_the_clients_that_take_part(capsys):
    """Of 20 clients 4 are drawn, of which a fifth is no client."""
    words = "demo --num-clients 20 --average all_holders --weights uniform".split()
    words += "--aggregate trimmed_mean --trim-share 0.2 --participation 0.2".split()
    assert cli.main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert "trim_share: 0.2 of the 4 clients that participation 0.2 draws" in error


def test_the_command_refuses_a_share_of_half(capsys):
    assert cli.main("train --aggregate trimmed_mean --trim-share 0.5".split()) == 2
    err = capsys.readouterr().err
    assert (
        err
        == "hsee: trim_share: 0.5 is not allowed; allowed is 0 or more, less than 0.5\n"
    )
