"""The bytes that cross the links, against those of real arrays, counted by hand."""

from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest
from test_networks import taps
from tiny import DenseLayer, tiny_federation, tiny_model

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
from hsee_jax.core import UserError
from hsee_jax.link import CODECS
from hsee_jax.nn import NETWORKS, layer_inputs, resnet18
from hsee_jax.runs.build import build
from hsee_jax.systems.costs import layer_costs
from hsee_jax.systems.traffic import (
    averages_in,
    gradient_rows,
    traffic_of,
    training_bytes,
)


@NETWORKS.register
def dense_pair(*, num_classes, input_shape):
    """Two dense layers, whose sizes are easily counted."""
    return tiny_model((DenseLayer(8), DenseLayer(5)), input_shape, num_classes)


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
        message = f"link: int8 is not allowed with {make.__name__}, .* allowed is full"
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
    assert weights(sequential, average="clients") == clients("params", "batch_stats")
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


def resnet18_products(taps):
    """Products of numbers in ResNet-18 for a sample of 32 pixels and 10 classes.

    ``taps(size, window, stride)`` counts those of a convolution along an axis.
    """
    total = taps(32, 3, 1) ** 2 * (3 * 64 + 4 * 64 * 64) + 512 * 10
    for size, before in ((32, 64), (16, 128), (8, 256)):
        after = 2 * before
        total += (taps(size, 3, 2) ** 2 + taps(size, 1, 2) ** 2) * before * after
        total += 3 * taps(size // 2, 3, 1) ** 2 * after**2
    return total


def test_four_cuts_of_resnet18_are_not_dominated():
    """Features halve at cuts 4, 6 and 8; a cut in between computes more for nothing.

    With padding the network takes 555.4 million products; XLA counts none with padding.
    """
    model = resnet18(num_classes=10, input_shape=(32, 32, 3), width=64, conv="grouped")
    costs = layer_costs(model)
    padded = resnet18_products(lambda size, window, stride: size // stride * window)
    assert padded == pytest.approx(555.4e6, rel=1e-4)
    flops = sum(cost.flops for cost in (*costs[:9], costs[-1]))
    assert 1 < flops / (2 * resnet18_products(taps)) < 1.05
    forward = np.cumsum([cost.flops for cost in costs[:9]])
    codec = CODECS.make("full")
    sent = [
        training_bytes(shape, codec, "detached").up_bytes
        for shape in layer_inputs(model)[1:]
    ]
    device = [own + costs[9 + cut].flops for cut, own in enumerate(forward)]
    pairs = list(zip(device, sent, strict=True))
    best = [
        cut
        for cut, own in enumerate(pairs, start=1)
        if not any(
            other != own and other[0] <= own[0] and other[1] <= own[1]
            for other in pairs
        )
    ]
    assert best == [1, 4, 6, 8]


def test_a_last_batch_that_is_smaller_shares_all_its_gradients():
    """Of 12 samples in batches of 8 and 4, two clients share 4 + 4 rows."""
    assert gradient_rows(0.5, 8, 2, 8, 8) == 4 + 4 / 2
    assert gradient_rows(0.5, 8, 2, 12, 12) == 4 + (4 + 4) / 2
    assert gradient_rows(0.5, 8, 2, 24, 24) == 3 * (4 + 4 / 2)
    assert gradient_rows(0.0, 8, 2, 12, 24) == 12


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_shared_gradients_of_unequal_shards_are_those_that_a_run_counts(share):
    """A row that only some clients have is sent in full, and counts in full."""
    config = override(
        preset("demo"),
        network="dense_pair",
        strategy="sequential",
        boundary="joint",
        turn="together",
        gradient_share=share,
        num_clients=5,
        cuts=("1", "2"),
        participation=1.0,
        batch_size=8,
        max_train_samples=90,
        max_test_samples=20,
        partition="quantity",
    )
    experiment = build(config)
    shards = experiment.manifest
    assert len({one.samples for one in shards if one.cut == 1}) == 3
    _, _, progress = experiment.run_round(experiment.init())
    crossed = experiment.round_bytes(1, progress.metrics)
    clients = Counter(one.cut for one in shards)
    for name in ("up_bytes", "down_bytes"):
        total = sum(
            clients[one["cut"]] * one["round"][name]
            for one in experiment.bytes_by_cut()
        )
        assert total == pytest.approx(getattr(crossed, name))
