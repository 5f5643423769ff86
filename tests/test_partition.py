"""Every sample goes to one client, and every round uses each of its samples once."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from hsee_jax.config import preset
from hsee_jax.config.schema import Config
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data.partition import PARTITIONS, hold_out, partition
from hsee_jax.engine.plan import EMPTY, num_slots, plan_round
from hsee_jax.federation.federation import Client, group_clients
from hsee_jax.runs.build import build


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in PARTITIONS if kind != "views"]),
    clients=st.integers(1, 12),
    extra=st.integers(0, 60),
    alpha=st.sampled_from([0.05, 0.3, 10.0]),
    seed=st.integers(0, 5),
)
def test_a_partition_uses_every_sample_once(kind, clients, extra, alpha, seed):
    labels = (
        np.random.default_rng(seed).integers(0, 4, clients + extra).astype(np.int32)
    )
    deal = PARTITIONS.make(kind, options={"alpha": alpha})
    shards = partition(labels, clients, deal, seed=seed)
    assert len(shards) == clients
    assert min(map(len, shards)) >= 1
    np.testing.assert_array_equal(
        np.sort(np.concatenate(shards)), np.arange(len(labels))
    )
    again = partition(labels, clients, deal, seed=seed)
    for one, other in zip(shards, again, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_an_empty_share_gets_a_sample_of_the_first_with_the_most(sizes):
    """Against a search for the largest share before each gift."""
    sizes[-1] += max(0, len(sizes) - sum(sizes))
    ends = np.cumsum(sizes)
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    found = partition(np.zeros(ends[-1]), len(sizes), lambda *_: parts, seed=0)
    plain = [list(part) for part in parts]
    for own in plain:
        if not own:
            own.append(max(plain, key=len).pop(0))
    assert [part.tolist() for part in found] == plain


def test_many_empty_shares_take_no_longer_than_many_clients():
    """A search through all shares for each of them took minutes."""
    count = 30_000
    parts = [np.arange(count)] + [np.arange(0)] * (count - 1)
    start = time.process_time()
    found = partition(np.zeros(count), count, lambda *_: parts, seed=0)
    assert time.process_time() - start < 10
    assert np.concatenate(found).tolist() == [count - 1, *range(count - 1)]


def test_kinds_differ_as_they_should():
    labels = np.repeat(np.arange(10), 100).astype(np.int32)

    def shares(kind, **options):
        deal = PARTITIONS.make(kind, options=options)
        shards = partition(labels, 10, deal, seed=0)
        return np.array([np.bincount(labels[s], minlength=10) for s in shards])

    assert set(shares("iid").sum(axis=1)) == {100}
    assert (shares("iid") > 0).all()
    assert (shares("classes", classes_per_client=2) > 0).sum(axis=1).max() <= 3
    sizes = shares("quantity", alpha=0.3).sum(axis=1)
    assert sizes.max() > 3 * sizes.min()
    even, skewed = shares("dirichlet", alpha=100.0), shares("dirichlet", alpha=0.1)
    assert even.std() < 10 < skewed.std()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_client_gets_as_many_pieces_as_were_asked(count):
    """A piece is a part of one class: a whole one, half of one, or a fifth."""
    labels = np.repeat(np.arange(10), 100).astype(np.int32)
    deal = PARTITIONS.make("classes", options={"classes_per_client": count})
    shards = partition(labels, 10, deal, seed=0)
    held = np.array([np.bincount(labels[s], minlength=10) for s in shards])
    assert (held % (100 // count) == 0).all()
    assert (held.sum(axis=1) == 100).all()
    assert (held > 0).sum(axis=1).max() == count


def test_more_clients_than_samples():
    with pytest.raises(UserError, match=r"num_clients: 5 .* allowed are 1\.\.4"):
        partition(np.zeros(4, np.int32), 5, PARTITIONS.make("iid"), seed=0)


def numbered(count, first=0):
    """Images of which each names itself."""
    numbers = np.arange(first, first + count)
    pixels = np.zeros((count, 28, 28, 1), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 1, 0] = numbers % 256, numbers // 256
    return Dataset(pixels, (numbers % 10).astype(np.int32))


def numbers(data):
    pixels = np.asarray(data.images).astype(int)
    return pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 1, 0]


def test_what_is_held_out_is_drawn_from_all_and_no_clients():
    """A tenth of 600, for any partition; the test set stays what it was."""
    train, test = numbered(600), numbered(50, first=600)
    base = override(
        Config(), **TINY, validation_share=0.1, num_clients=3, cuts=("1", "2")
    )
    drawn = []
    for changes in (
        {"partition": "iid"},
        {"partition": "dirichlet", "participation": 0.5},
        {"partition_seed": 1},
    ):
        experiment = build(override(base, **changes), data=(train, test))
        held, every = numbers(experiment.validation), numbers(experiment.train)
        np.testing.assert_array_equal(experiment.validation.labels, held % 10)
        assert len(held) == 60
        of_clients = np.concatenate([every[s] for s in experiment.shards.values()])
        for share in experiment.manifest:
            assert share.indices == every[experiment.shards[share.id]].tolist()
        np.testing.assert_array_equal(
            np.sort(np.concatenate([held, of_clients])), np.arange(600)
        )
        np.testing.assert_array_equal(numbers(experiment.test), np.arange(600, 650))
        # 60 of 0..599, evenly: the mean is 299.5 with a deviation of 173 / sqrt(60)
        assert abs(held.mean() - 299.5) < 4 * 173 / 60**0.5
        drawn.append(held.tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_nothing_or_at_least_one_sample_is_held_out():
    train = numbered(12)
    kept, held = hold_out(12, 0.01, seed=0)
    assert (len(kept), len(held)) == (11, 1)
    kept, held = hold_out(12, 0.0, seed=0)
    assert (len(kept), len(held)) == (12, 0)
    with pytest.raises(UserError, match="validation_share: 0.99 holds out all 12 tra"):
        hold_out(12, 0.99, seed=0)
    config = override(Config(), **TINY, cuts=("1",))
    experiment = build(config, data=(train, train))
    assert experiment.validation is None
    deal = PARTITIONS.make(config.data.partition, options=config.data.options)
    whole = partition(
        train.labels, config.clients.num_clients, deal, seed=config.run.partition_seed
    )
    for one, other in zip(whole, experiment.shards.values(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_a_client_weighs_as_much_as_its_samples_or_as_any_other(weights):
    config = override(preset("demo"), **TINY, num_clients=4, cuts=("1", "2"))
    config = override(config, max_train_samples=60, max_test_samples=10)
    config = override(config, partition="quantity", strategy="sequential")
    config = override(config, average="clients", weights=weights)
    experiment = build(config)
    sizes = [share.samples for share in experiment.manifest]
    assert len(set(sizes)) > 1
    expected = sizes if weights == "samples" else [1, 1, 1, 1]
    assert experiment.client_weights().tolist() == expected
    plan = experiment.plan(0)
    by_slot = [expected[i] for i in plan.ids]
    assert experiment.weights(plan).tolist() == by_slot


def draw(groups, shards, number=0, **changes):
    options = {"batch_size": 4, "participation": 1.0, "turn": "batch", "seed": 3}
    return plan_round(groups, shards, **(options | changes), number=number)


def test_a_round_uses_each_sample_of_the_active_once():
    groups = group_clients([Client(0, 3), Client(1, 1), Client(2, 3), Client(3, 2)])
    shards = dict(enumerate(np.split(np.arange(30, dtype=np.int32), [3, 14, 22])))
    ids = [i for group in groups for i in group.ids]
    assert ids == [1, 3, 0, 2]
    taken = []
    for number in range(20):
        plan = draw(groups, shards, number, participation=0.5)
        assert plan.indices.shape == plan.mask.shape == (3, 4, 4)
        assert plan.active.sum() == 2
        taken.append(tuple(plan.active))
        for n, i in enumerate(ids):
            rows = plan.indices[:, n][plan.mask[:, n]]
            expected = shards[i] if plan.active[n] else []
            np.testing.assert_array_equal(np.sort(rows), expected)
        turns = np.sort(plan.order, axis=1)
        assert (turns == np.flatnonzero(plan.active)).all()
    assert len(set(taken)) > 3


def test_the_slots_of_many_rounds_take_the_memory_of_one():
    """To keep the clients of 200 rounds would take 18 times as much."""
    groups = group_clients(Client(i, 1 + i % 2) for i in range(2000))

    def peak(rounds):
        tracemalloc.start()
        num_slots(groups, participation=0.1, seed=3, rounds=rounds)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(200) < 2 * peak(1)


def test_slots_hold_whoever_takes_part_in_any_round():
    """Of 20 clients 5 take part; three devices, so numbers of slots are multiples."""
    groups = group_clients(Client(i, 1 + i % 2) for i in range(20))
    shards = {i: np.array([2 * i, 2 * i + 1], np.int32) for i in range(20)}
    slots = num_slots(groups, participation=0.25, seed=3, rounds=8, multiple=3)
    assert all(count % 3 == 0 and count < 10 for count in slots)
    most = np.zeros(2, int)
    for number in range(8):
        plan = draw(groups, shards, number, participation=0.25, slots=slots)
        full = draw(groups, shards, number, participation=0.25)
        seated = plan.ids[plan.active]
        assert len(plan.ids) == sum(slots)
        assert (plan.ids[~plan.active] == EMPTY).all()
        assert sorted(seated) == sorted(full.ids[full.active])
        assert not plan.mask[:, ~plan.active].any()
        for n in np.flatnonzero(plan.active):
            m = full.ids.tolist().index(plan.ids[n])
            np.testing.assert_array_equal(plan.indices[:, n], full.indices[:, m])
        turns = [plan.ids[order].tolist() for order in plan.order]
        assert turns == [full.ids[order].tolist() for order in full.order]
        most = np.maximum(most, np.bincount(seated % 2, minlength=2))
    assert [-(-count // 3) * 3 for count in most] == list(slots)


def test_turns_are_drawn_per_step_or_per_round():
    groups = group_clients(Client(i, 1) for i in range(5))
    shards = {i: np.arange(40, dtype=np.int32) for i in range(5)}
    by_batch, by_epoch = draw(groups, shards), draw(groups, shards, turn="epoch")
    assert len({tuple(order) for order in by_batch.order}) > 5
    assert len({tuple(order) for order in by_epoch.order}) == 1


@pytest.mark.parametrize("turn", ["batch", "epoch"])
def test_turns_are_drawn_anew_in_each_round_and_by_the_seed(turn):
    groups = group_clients(Client(i, 1) for i in range(7))
    shards = {i: np.arange(12, dtype=np.int32) for i in range(7)}

    def orders(seed):
        plans = [draw(groups, shards, n, turn=turn, seed=seed) for n in range(4)]
        return [plan.order.tolist() for plan in plans]

    drawn = orders(3) + orders(4)
    assert orders(3) + orders(4) == drawn
    assert len({str(order) for order in drawn}) == 8


def test_a_clients_draw_does_not_depend_on_the_others():
    shards = {i: np.arange(10 * i, 10 * i + 10, dtype=np.int32) for i in range(5)}
    everyone = draw(group_clients(Client(i, 1 + i % 2) for i in range(5)), shards)
    alone = draw(group_clients([Client(3, 4)]), {3: shards[3]})
    # ids 0 2 4 have cut 1, then come 1 and 3: client 3 is at position 4
    np.testing.assert_array_equal(everyone.indices[:, 4], alone.indices[:, 0])
