"""Both strategies equal the plain Python of reference.py, in both engine forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Layer, Reference, train_branch
from rounds import KEY, assert_same, branches, train
from tiny import (
    LAYERS,
    OPTIM,
    PIPELINE,
    ConvLayer,
    DenseLayer,
    tiny_data,
    tiny_federation,
    tiny_model,
    tiny_shards,
)

from hsee_jax.algorithms.fedavg import fedavg
from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.references import centralized, local
from hsee_jax.algorithms.splitfed import splitfed_v1, splitfed_v2
from hsee_jax.core.errors import UserError
from hsee_jax.engine import make_round
from hsee_jax.engine.plan import plan_round
from hsee_jax.federation import average_layers
from hsee_jax.nn.model import init_network

CUTS = {7: 1, 2: 3, 5: 2, 0: 1, 3: 2}
SIZES = {7: 7, 2: 4, 5: 7, 0: 3, 3: 3}  # one or two batches of 4, of 4 or 3 rows


def reference_run(
    federation, log, *, shared, scale, turn, policy, cuts, sizes, joint=None
):
    """The same rounds in plain Python."""
    model, data = federation.model, tiny_data()
    images = (data.images.astype(np.float32) / 255 - 0.5) / 0.25
    reference = Reference(
        model,
        init_network(model, KEY),
        cuts,
        shared=shared,
        server_lr_scale=scale,
        sgd=(OPTIM.momentum, OPTIM.weight_decay),
        joint=joint,
    )
    for number, (plan, rates, metrics) in enumerate(log):
        ids = plan.ids.tolist()
        losses = reference.round(
            images,
            data.labels,
            plan,
            rates,
            ids=ids,
            turn=turn,
            sizes=sizes,
            averaging=policy,
            number=number,
        )
        expected = np.array([losses[i] for i in ids])
        np.testing.assert_allclose(metrics.exit.loss_sum, expected[:, 0], rtol=1e-4)
        np.testing.assert_allclose(metrics.server.loss_sum, expected[:, 1], rtol=1e-4)
    return reference


def check_against_reference(reference, federation, strategy, state):
    for i, (client, server) in branches(federation, strategy, state).items():
        pairs = [
            *zip(client.layers, reference.client_layers[i], strict=True),
            (client.head, reference.exits[i]),
            *zip(server.layers, reference.server_layers[i], strict=True),
            (server.head, reference.finals[i]),
        ]
        for ours, theirs in pairs:
            trace = ours.opt_state[1].trace
            assert_same(
                (ours.params, ours.batch_stats, trace),
                (theirs.params, theirs.stats, theirs.momentum),
                rtol=1e-3,
                atol=1e-4,
            )


def check_both_forms(strategy, federation, cuts, sizes, setting, participation):
    """The loop and the scan against one run of the reference."""
    shards = tiny_shards(sizes)
    policy = setting["policy"]
    options = {
        "participation": participation,
        "uniform": policy is not None and policy["weights"] == "uniform",
    }
    looped, log = train(strategy, federation, shards, axis="loop", **options)
    reference = reference_run(federation, log, cuts=cuts, sizes=sizes, **setting)
    check_against_reference(reference, federation, strategy, looped)
    stacked, _ = train(strategy, federation, shards, axis="vmap", **options)
    check_against_reference(reference, federation, strategy, stacked)


AVERAGING = {
    "period": 1,
    "unit": "rounds",
    "average": "servers",
    "weights": "samples",
    "batch_norm": "average",
    "optimizer_state": "keep",
}
CLIENTS = AVERAGING | {"average": "clients"}


@pytest.mark.parametrize(
    ("turn", "participation"),
    [
        ("batch", 0.6),
        pytest.param("epoch", 1.0, marks=pytest.mark.slow),
        pytest.param("batch", 1.0, marks=pytest.mark.slow),
    ],
)
def test_sequential_equals_the_reference(turn, participation):
    federation = tiny_federation(CUTS)
    strategy = sequential(federation, turn=turn, server_lr_scale=0.5)
    setting = {"shared": True, "scale": 0.5, "turn": turn, "policy": None}
    check_both_forms(strategy, federation, CUTS, SIZES, setting, participation)


@pytest.mark.parametrize(
    ("participation", "turn", "changes"),
    [
        pytest.param(
            0.6, "batch", {"period": 2, "unit": "steps"}, marks=pytest.mark.slow
        ),
        pytest.param(
            1.0,
            "epoch",
            {"optimizer_state": "reset", "weights": "uniform"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0.6,
            "batch",
            {"batch_norm": "keep_local", "optimizer_state": "average"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sequential_averages_clients_like_the_reference(participation, turn, changes):
    """The server's layers are in no mean, and no gradient crosses the cut."""
    policy = CLIENTS | changes
    federation = tiny_federation(CUTS)
    strategy = sequential(
        federation,
        turn=turn,
        average="clients",
        period=policy["period"],
        period_unit=policy["unit"],
        weights=policy["weights"],
        batch_norm=policy["batch_norm"],
        optimizer_state=policy["optimizer_state"],
    )
    setting = {"shared": True, "scale": 1.0, "turn": turn, "policy": policy}
    check_both_forms(strategy, federation, CUTS, SIZES, setting, participation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "servers"}, "average: servers is unknown; allowed are none, clie"),
        ({"period": 2}, "period: 2 has no effect without an average; allowed is 1"),
        (
            {"average": "clients", "period": 0, "weights": "uniform"},
            "weights: uniform has no effect without an average; allowed is samples",
        ),
        ({"weights": "uniform"}, "weights: uniform has no effect without an average"),
        (
            {"average": "clients", "turn": "epoch", "period_unit": "steps"},
            "period_unit: steps is not allowed with turn epoch.*allowed is rounds",
        ),
    ],
)
def test_sequential_refuses_averages_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        sequential(tiny_federation(CUTS), **options)


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"copies": 2, "boundary": "joint"}, "copies: 2 is allowed only with a detach"),
        ({"copies": 2, "distill": 0.5}, "copies: 2 is allowed only with .*distill 0"),
        ({"width_target": 0.5}, "width_target: 0.5 is not allowed with one copy"),
    ],
)
def test_copies_that_no_step_would_use(properties, message):
    with pytest.raises(UserError, match=message):
        Properties(shared=True, average="none", **properties).check()


@pytest.mark.parametrize("average", ["servers", "all_holders"])
def test_a_shared_server_is_not_averaged(average):
    with pytest.raises(ValueError, match=f"shared server .* so not {average}"):
        Properties(shared=True, average=average).check()


@pytest.mark.parametrize(
    ("participation", "changes"),
    [
        (1.0, {}),
        pytest.param(
            0.6,
            {"average": "all_holders", "weights": "uniform"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            1.0,
            {"period": 2, "unit": "steps", "optimizer_state": "reset"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0.6,
            {"batch_norm": "keep_local", "optimizer_state": "average"},
            marks=pytest.mark.slow,
        ),
        pytest.param(1.0, {"period": 2}, marks=pytest.mark.slow),
        pytest.param(1.0, {"period": 0}, marks=pytest.mark.slow),
    ],
)
def test_averaging_equals_the_reference(participation, changes):
    policy = AVERAGING | changes
    federation = tiny_federation(CUTS)
    strategy = averaging(
        federation,
        period=policy["period"],
        period_unit=policy["unit"],
        average=policy["average"],
        batch_norm=policy["batch_norm"],
        optimizer_state=policy["optimizer_state"],
    )
    setting = {"shared": False, "scale": 1.0, "turn": "batch", "policy": policy}
    check_both_forms(strategy, federation, CUTS, SIZES, setting, participation)


EVERYTHING = AVERAGING | {"average": "all_holders"}
LAST = dict.fromkeys(CUTS, 3)  # all layers
ALIKE = dict.fromkeys(CUTS, 2)


@pytest.mark.parametrize(
    ("make", "cuts", "setting", "participation"),
    [
        pytest.param(local, CUTS, {"shared": False}, 1.0, marks=pytest.mark.slow),
        pytest.param(
            splitfed_v1,
            ALIKE,
            {"shared": False, "joint": 0.0, "policy": EVERYTHING},
            1.0,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            splitfed_v2,
            ALIKE,
            {
                "shared": True,
                "joint": 0.0,
                "policy": CLIENTS,
            },
            0.6,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            fedavg,
            LAST,
            {"shared": False, "joint": 0.0, "policy": EVERYTHING},
            0.6,
            marks=pytest.mark.slow,
        ),
        (centralized, {3: 2}, {"shared": False, "joint": 0.0}, 1.0),
    ],
    ids=["local", "splitfed_v1", "splitfed_v2", "fedavg", "centralized"],
)
def test_baselines_equal_the_reference(make, cuts, setting, participation):
    setting = {"scale": 1.0, "turn": "batch", "policy": None} | setting
    federation = tiny_federation(cuts)
    sizes = {i: SIZES[i] for i in cuts}
    check_both_forms(make(federation), federation, cuts, sizes, setting, participation)


DENSE = tiny_model((DenseLayer(6), DenseLayer(5), DenseLayer(4)))
THREE = {0: 7, 1: 4, 2: 5}  # samples: two batches of 4, or one


@pytest.mark.parametrize(
    ("make", "cuts", "setting", "participation"),
    [
        (local, (1, 2, 1), {"shared": False}, 1.0),
        (
            splitfed_v1,
            (2, 2, 2),
            {"shared": False, "joint": 0.0, "policy": EVERYTHING},
            1.0,
        ),
        (splitfed_v2, (2, 2, 2), {"joint": 0.0, "policy": CLIENTS}, 0.6),
        (
            fedavg,
            (3, 3, 3),
            {"shared": False, "joint": 0.0, "policy": EVERYTHING},
            0.6,
        ),
        (
            partial(sequential, boundary="joint", exit_gradient=0.5),
            (1, 2, 1),
            {"joint": 0.5},
            1.0,
        ),
        (
            partial(sequential, average="clients"),
            (1, 2, 1),
            {"policy": CLIENTS | {"batch_norm": "keep_local"}},
            1.0,
        ),
        (
            partial(averaging, period=2, period_unit="steps"),
            (1, 2, 1),
            {
                "shared": False,
                "policy": AVERAGING
                | {"period": 2, "unit": "steps", "batch_norm": "keep_local"},
            },
            1.0,
        ),
    ],
    ids="local splitfed_v1 splitfed_v2 fedavg joint clients steps".split(),
)
def test_three_clients_with_dense_layers_equal_the_reference(
    make, cuts, setting, participation
):
    """A loop of two rounds that is compiled in a second; the slow tests have more."""
    setting = {"shared": True, "scale": 1.0, "turn": "batch", "policy": None} | setting
    federation = tiny_federation(dict(enumerate(cuts)), DENSE)
    strategy, shards = make(federation), tiny_shards(THREE)
    state, log = train(
        strategy, federation, shards, axis="loop", participation=participation
    )
    reference = reference_run(
        federation, log, cuts=dict(enumerate(cuts)), sizes=THREE, **setting
    )
    check_against_reference(reference, federation, strategy, state)


@pytest.mark.parametrize(
    ("make", "turn", "exit_gradient"),
    [
        pytest.param(averaging, None, 0.5, marks=pytest.mark.slow),
        pytest.param(sequential, "epoch", 1.0, marks=pytest.mark.slow),
        pytest.param(sequential, "batch", 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_joint_boundary_equals_the_reference(make, turn, exit_gradient):
    """For any cuts side by side, and with a server that learns at half the rate."""
    federation = tiny_federation(CUTS)
    options = {"boundary": "joint", "exit_gradient": exit_gradient}
    strategy = make(
        federation, server_lr_scale=0.5, **options, **({"turn": turn} if turn else {})
    )
    setting = {
        "shared": turn is not None,
        "joint": exit_gradient,
        "scale": 0.5,
        "turn": turn or "batch",
        "policy": None if turn else AVERAGING | {"batch_norm": "keep_local"},
    }
    check_both_forms(strategy, federation, CUTS, SIZES, setting, 1.0)


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        pytest.param(splitfed_v1, 2, marks=pytest.mark.slow),
        pytest.param(splitfed_v2, 1, marks=pytest.mark.slow),
        (fedavg, 3),
        (centralized, 2),
    ],
)
def test_with_one_client_and_one_cut_a_baseline_is_plain_training(make, cut):
    """One network on one head's loss, by the plain step of the reference."""
    federation, shards = tiny_federation({4: cut}), tiny_shards({4: 10})
    strategy = make(federation)
    state, log = train(strategy, federation, shards, axis="loop")
    model, data = federation.model, tiny_data()
    network = init_network(model, KEY)
    layers = [Layer(*pair) for pair in zip(model.stages, network.layers, strict=True)]
    head = Layer(model.final_head, network.final_head)
    for plan, rates, _ in log:
        for t, rate in enumerate(rates):
            rows = plan.indices[t, 0][plan.mask[t, 0]]
            images = (data.images[rows].astype(np.float32) / 255 - 0.5) / 0.25
            labels = [int(label) for label in data.labels[rows]]
            sgd = (float(rate), OPTIM.momentum, OPTIM.weight_decay)
            train_branch(layers, head, jnp.asarray(images), labels, *sgd)
    client, server = branches(federation, strategy, state)[4]
    ours = [*client.layers, *server.layers, server.head]
    for one, other in zip(ours, [*layers, head], strict=True):
        assert_same(
            (one.params, one.batch_stats),
            (other.params, other.stats),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize(
    ("make", "cuts", "message"),
    [
        (splitfed_v1, CUTS, "cuts: 1 2 3 is not allowed with splitfed_v1"),
        (splitfed_v2, CUTS, "cuts: 1 2 3 is not allowed with splitfed_v2"),
        (fedavg, ALIKE, "cuts: 2 is not allowed with fedavg.*allowed is 3"),
        (centralized, LAST, "num_clients: 5 is not allowed with centralized"),
    ],
)
def test_a_baseline_refuses_a_federation_that_is_not_its_own(make, cuts, message):
    with pytest.raises(UserError, match=message):
        make(tiny_federation(cuts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": "all"}, "average: all is unknown.*all_holders"),
        ({"boundary": "detach"}, "boundary: detach .*did you mean detached"),
        ({"period_unit": "round"}, "period_unit: round .*did you mean rounds"),
        ({"batch_norm": "local"}, "batch_norm: local is unknown"),
        ({"optimizer_state": "mean"}, "optimizer_state: mean is unknown"),
        ({"init": "per-client"}, "init: per-client is unknown"),
    ],
)
def test_a_misspelt_option_is_refused(options, message):
    """Else it would be another algorithm, without a word."""
    with pytest.raises(UserError, match=message):
        averaging(tiny_federation(CUTS), **options)


@pytest.mark.parametrize("batch_norm", ["average", "keep_local"])
def test_a_rule_for_batch_norm_needs_one(batch_norm):
    """One in a layer that no server holds is enough."""
    layers = (ConvLayer(4), DenseLayer(8))
    averaging(tiny_federation({0: 1}, tiny_model(layers)), batch_norm=batch_norm)
    without = tiny_federation({0: 1}, tiny_model(layers[1:] * 2))
    averaging(without)
    with pytest.raises(UserError, match=f"^batch_norm: {batch_norm} has no effect on"):
        averaging(without, batch_norm=batch_norm)


@pytest.mark.parametrize(
    ("average", "same"), [("servers", "keep_local"), ("all_holders", "average")]
)
def test_batch_norm_stays_local_where_only_servers_are_averaged(average, same):
    federation = tiny_federation(dict.fromkeys(CUTS, 1))

    def stretch(leaf):
        """Another one for each client."""
        return leaf * jnp.arange(1.0, 6.0).reshape(-1, *[1] * (leaf.ndim - 1))

    results = []
    for batch_norm in ("auto", same):
        strategy = averaging(federation, average=average, batch_norm=batch_norm)
        state = jax.jit(strategy.init)(KEY)
        state = state.replace(clients=jax.tree.map(stretch, state.clients))
        state = state.replace(servers=jax.tree.map(stretch, state.servers))
        results.append(
            jax.jit(partial(average_layers, strategy))(state, (jnp.ones(5),))[0]
        )
    assert_same(*results, rtol=0, atol=0)
    layer = results[0].servers[0].layers[0]
    (norm,) = layer.batch_stats.values()
    assert (np.ptp(norm["var"], axis=0).max() > 0) == (same == "keep_local")
    assert np.ptp(layer.params["Conv_0"]["kernel"], axis=0).max() == 0


@pytest.mark.parametrize(
    ("layers", "pairings"),
    [
        ((DenseLayer(8), DenseLayer(5)), [(1, 2)]),
        pytest.param(LAYERS, [(1, 2, 3), (2, 1, 3)], marks=pytest.mark.slow),
    ],
    ids=["dense", "norm"],
)
def test_whoever_hosts_the_upper_layers_the_algebra_is_that_of_fedavg(layers, pairings):
    """So a plan of pairs says nothing about training."""
    model, depth = tiny_model(layers), len(layers)
    joint = partial(averaging, boundary="joint", average="all_holders")

    def trained(make, cuts):
        """The whole network of each client."""
        federation = tiny_federation(dict(enumerate(cuts)), model)
        shards = tiny_shards(dict(enumerate((7, 4, 3)[: len(cuts)])))
        strategy = make(federation)
        state, _ = train(strategy, federation, shards, axis="loop")
        return {
            i: [
                (layer.params, layer.batch_stats)
                for layer in (*client.layers, *server.layers, server.head)
            ]
            for i, (client, server) in branches(federation, strategy, state).items()
        }

    expected = trained(fedavg, [depth] * len(pairings[0]))
    for cuts in pairings:
        assert_same(trained(joint, cuts), expected, rtol=1e-4, atol=1e-5)


def test_with_one_client_averaging_is_sequential():
    federation, shards = tiny_federation({4: 2}), tiny_shards({4: 10})
    results = []
    for make in (sequential, averaging):
        strategy = make(federation)
        state, _ = train(strategy, federation, shards, axis="loop")
        results.append(branches(federation, strategy, state))
    assert_same(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "axis"),
    [
        pytest.param(sequential, "loop", marks=pytest.mark.slow),
        pytest.param(averaging, "vmap", marks=pytest.mark.slow),
        pytest.param(sequential, "vmap", marks=pytest.mark.slow),
        pytest.param(averaging, "loop", marks=pytest.mark.slow),
    ],
)
def test_results_depend_on_neither_order_nor_grouping(make, axis):
    """A client's result is the same whatever the list's order, and whoever is beside.

    Without averaging or sharing, client 5 does not notice that 3 has another cut.
    """
    shards = tiny_shards(SIZES)
    orders = [dict(CUTS), dict(sorted(CUTS.items()))]
    results = []
    for cuts in orders:
        federation = tiny_federation(cuts)
        strategy = make(federation)
        state, _ = train(strategy, federation, shards, axis=axis, participation=0.6)
        results.append(branches(federation, strategy, state))
    assert_same(*results, rtol=0, atol=0)

    exits = []
    for cuts in ({5: 2, 3: 2, 0: 1}, {5: 2, 3: 3, 0: 1}):
        federation = tiny_federation(cuts)
        strategy = make(federation)
        state, _ = train(strategy, federation, {i: shards[i] for i in cuts}, axis=axis)
        exits.append(branches(federation, strategy, state)[5][0])
    assert_same(*exits, rtol=1e-5, atol=1e-6)


def test_untraversed_layers_and_their_optimizer_state_do_not_move():
    """A server that only sees features of layer 2 leaves layers 2 and below alone."""
    federation = tiny_federation({0: 1, 1: 2})
    strategy = sequential(federation)
    shards = tiny_shards({0: 4, 1: 4})
    state, _ = train(strategy, federation, shards, axis="loop", rounds=1)
    before = jax.tree.map(np.array, state.servers[0])

    plan = plan_round(
        federation.groups,
        shards,
        batch_size=4,
        participation=1.0,
        turn="batch",
        seed=0,
        number=1,
    )
    plan.mask[:, 0] = False  # client 0, of cut 1, is absent
    for axis in ("loop", "vmap"):
        run = make_round(strategy, PIPELINE, KEY, axis=axis)
        copy = jax.tree.map(jnp.copy, state)
        after, _, _ = run(
            copy,
            jax.device_put(tiny_data()),
            plan,
            np.full(1, 0.1, np.float32),
            np.ones(2, np.float32),
        )
        server = after.servers[0]
        assert_same(before.layers[0], server.layers[0], rtol=0, atol=0)
        with pytest.raises(AssertionError):
            assert_same(before.layers[1], server.layers[1], rtol=1e-3)
        absent = jax.tree.map(lambda a: a[0], (state.clients[0], after.clients[0]))
        assert_same(*absent, rtol=0, atol=0)


def test_per_client_init_draws_each_client_by_itself():
    federation = tiny_federation({0: 1, 1: 1, 2: 2})
    for make in (sequential, averaging):
        shared = jax.jit(make(federation, init="shared").init)(KEY)
        drawn = jax.jit(make(federation, init="per_client").init)(KEY)
        kernel = shared.clients[0].layers[0].params["Conv_0"]["kernel"]
        np.testing.assert_array_equal(kernel[0], kernel[1])
        kernel = drawn.clients[0].layers[0].params["Conv_0"]["kernel"]
        assert np.abs(kernel[0] - kernel[1]).max() > 0.01


@pytest.mark.slow
def test_a_network_of_dense_layers_learns_in_every_strategy():
    """Any chain of stages can be trained, here without convolution and BatchNorm."""
    dense = tiny_model((DenseLayer(8), DenseLayer(5)))
    federation = tiny_federation({0: 1, 1: 2, 2: 1}, dense)
    shards = tiny_shards({0: 20, 1: 20, 2: 24})
    for strategy in (
        sequential(federation),
        sequential(federation, turn="epoch"),
        averaging(federation),
    ):
        _, log = train(strategy, federation, shards, axis="vmap", rounds=12)
        first, last = log[0][2].server, log[-1][2].server
        assert last.loss_sum.sum() < 0.6 * first.loss_sum.sum()
