"""Cuts that change between rounds: the layers move, and nothing else changes."""

import copy
import functools
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Layer, Reference
from rounds import branches
from test_strategies import AVERAGING, check_against_reference
from tiny import TINY, AfterRound, tiny_data, tiny_federation

import hsee_jax as hs
from hsee_jax import runs
from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.config import override, preset
from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine import compiled_turns
from hsee_jax.engine.programs import compile_together
from hsee_jax.federation.recut import recut
from hsee_jax.federation.schedule import CutSchedule
from hsee_jax.nn.model import init_network
from hsee_jax.report.curves import read_curves
from hsee_jax.runs.build import build
from hsee_jax.runs.phases import Phases
from hsee_jax.runs.same_data import check_partition

# Client 1 goes deeper, then comes back; at the end all hold two layers or more.
SMALL = override(
    preset("demo"),
    **TINY,
    num_clients=3,
    cuts=("1", "1", "3"),
    recuts=("2:1,2,1", "3:2,3,layer2", "4:1"),
    augment="none",
    validation_share=0.0,
    batch_size=6,
    rounds=4,
    eval_every=2,
    checkpoint_every=1,
    keep_checkpoints=9,
    learning_rate=0.05,
    weight_decay=0.01,
)
DATA = (*tiny_data(21), *tiny_data(10, seed=1))
BOTH = pytest.mark.parametrize("strategy", ["averaging", "sequential"])


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def move_by_hand(reference, model, network, cuts, exits, weights):
    """Move the layers of the slow reference, client by client, in plain Python.

    ``exits`` are those that clients have used so far, by client and cut.
    """
    old, first = dict(reference.cuts), min(reference.cuts.values())
    for i, cut in old.items():
        exits[i, cut] = reference.exits[i]
    if reference.shared:
        some = next(i for i in old if old[i] == first)
        server = dict(enumerate(reference.server_layers[some], start=first))
        for j in range(min(cuts.values()), first):
            givers = [i for i in old if cuts[i] <= j]
            total = sum(weights[i] for i in givers)
            held = [reference.client_layers[i][j] for i in givers]
            server[j] = copy.copy(held[0])
            for name in ("params", "stats", "momentum"):
                shares = [weights[i] / total for i in givers]
                trees = [getattr(layer, name) for layer in held]
                mean = jax.tree.map(
                    lambda *a, s=shares: sum(x * y for x, y in zip(s, a, strict=True)),
                    *trees,
                )
                setattr(server[j], name, mean)
    for i, cut in cuts.items():
        own = reference.client_layers[i]
        if reference.shared:
            taken = [copy.copy(server[j]) for j in range(old[i], cut)]
            layers = [*own[:cut], *taken, *(server[j] for j in range(cut, 3))]
        else:
            layers = [*own, *reference.server_layers[i]]
        reference.client_layers[i] = layers[:cut]
        reference.server_layers[i] = layers[cut:]
        unused = Layer(model.exit_heads[cut - 1], network.exit_heads[cut - 1])
        reference.exits[i] = exits.get((i, cut), unused)
    reference.cuts = cuts


def reference_run(experiment):
    """Train with the slow reference, and move its layers by hand."""
    model, config = experiment.federation.model, experiment.config
    network = init_network(model, experiment.init_key)
    shared = experiment.strategy.shared
    sizes = {i: len(shard) for i, shard in experiment.shards.items()}
    cuts = [dict(enumerate(experiment.schedule.cuts_in(r + 1))) for r in range(4)]
    reference = Reference(
        model,
        network,
        cuts[0],
        shared=shared,
        server_lr_scale=1.0,
        sgd=(config.optim.momentum, config.optim.weight_decay),
    )
    images = np.asarray(experiment.train.images, np.float32) / 255
    images = (images - experiment.info.mean) / experiment.info.std
    phases, exits = Phases(experiment), {}
    for number in range(4):
        if cuts[number] != reference.cuts:
            move_by_hand(reference, model, network, cuts[number], exits, sizes)
        plan = phases.at(number + 1).plan(number)
        reference.round(
            images.astype(np.float32),
            np.asarray(experiment.train.labels),
            plan,
            experiment.learning_rates[number],
            ids=plan.ids.tolist(),
            turn="batch",
            sizes=sizes,
            averaging=None if shared else AVERAGING | {"average": "all_holders"},
            number=number,
        )
    return reference


def train_phases(experiment):
    """Train all rounds; return the last phase and the state as in a checkpoint."""
    phases, shelf = Phases(experiment), {}
    before, state = experiment, experiment.init()
    for number in range(1, 5):
        after = phases.at(number)
        if after is not before:
            state, shelf = phases.move(state, shelf, before, after)
        state, _, _ = after.run_round(state)
        before = after
    return after, after.store.to_checkpoint(state)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("participation", [1.0, 0.7])
def test_training_equals_the_reference_with_layers_moved_by_hand(
    strategy, participation
):
    """Clients have 7, 9 and 5 samples, by which means are weighted."""
    config = override(SMALL, strategy=strategy, participation=participation)
    config = override(config, partition="quantity", alpha=2.0)
    looped = build(override(config, client_axis="loop"), DATA)
    reference = reference_run(looped)
    for experiment in (looped, build(override(config, client_axis="vmap"), DATA)):
        last, state = train_phases(experiment)
        check_against_reference(reference, last.federation, last.strategy, state)


def noise(strategy, seed):
    """A state of noise, so that no two leaves or rows are equal."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(strategy.init, jax.random.key(0))
    return jax.tree.map(
        lambda a: np.asarray(rng.normal(size=a.shape) * 100).astype(a.dtype), shapes
    )


@functools.cache
def pair(make, cuts, seed):
    """A federation with its strategy and noise."""
    federation = tiny_federation(dict(enumerate(cuts)))
    strategy = make(federation)
    return federation, strategy, noise(strategy, seed)


def there_and_back(make, cuts, others):
    """A state, the state of other cuts that it becomes, and what comes back."""
    one, strategy, state = pair(make, tuple(cuts), 0)
    two, _, fresh = pair(make, tuple(others), 1)
    weights = np.arange(1, len(cuts) + 1, dtype=np.float32)
    move = partial(recut, weights=weights, shared=strategy.shared)
    groups = one.groups, two.groups
    there, shelf = move(state, {}, fresh, before=groups[0], after=groups[1])
    fresh = pair(make, tuple(cuts), 2)[2]
    back, rest = move(there, shelf, fresh, before=groups[1], after=groups[0])
    found = [
        branches(one, strategy, state),
        branches(two, make(two), there),
        branches(one, strategy, back),
    ]
    return found, shelf, rest


CUTS = st.lists(st.integers(1, 3), min_size=3, max_size=3)


@settings(max_examples=10, deadline=None)
@given(CUTS, CUTS)
def test_with_own_servers_there_and_back_is_the_same(cuts, others):
    """Bit for bit, all layers, heads and their optimizer state; and the shelf."""
    (before, there, after), shelf, rest = there_and_back(averaging, cuts, others)
    equal(before, after)
    for i, (client, server) in before.items():
        now = there[i]
        equal(client.layers + server.layers, now[0].layers + now[1].layers)
        equal(server.head, now[1].head)
        assert len(now[0].layers) == others[i]
    left = {(i, cut) for i, cut in enumerate(cuts) if cut != others[i]}
    assert {(i, int(c)) for c, e in shelf.items() for i in e.ids.tolist()} == left
    new = {(i, cut) for i, cut in enumerate(others) if cut != cuts[i]}
    assert {(i, int(c)) for c, e in rest.items() for i in e.ids.tolist()} == new


@settings(max_examples=10, deadline=None)
@given(CUTS, CUTS)
def test_a_shared_server_is_the_same_after_there_and_back(cuts, others):
    """And so are exits, the layers that clients keep, and a layer with one holder."""
    (before, there, after), _, _ = there_and_back(sequential, cuts, others)
    first, second = min(cuts), min(others)
    for i, (client, server) in before.items():
        equal(server, after[i][1])
        equal(client.head, after[i][0].head)
        kept = min(cuts[i], others[i])
        equal(client.layers[:kept], after[i][0].layers[:kept])
        equal(client.layers[:kept], there[i][0].layers[:kept])
        for j in range(kept, others[i]):  # deeper: copies of what is behind the client
            equal(server.layers[j - cuts[i]], there[i][0].layers[j])
        for j in range(max(second, kept), cuts[i]):
            if j < first and sum(other <= j for other in others) == 1:
                equal(client.layers[j], there[i][1].layers[j - others[i]])
                equal(client.layers[j], after[i][0].layers[j])


def test_a_shared_server_takes_the_mean_of_the_layers_it_has_no_copy_of():
    """Clients 0 and 2 give layer 2 up, with weights 1 and 3; client 1 keeps its own."""
    (before, there, _), _, _ = there_and_back(sequential, [2, 2, 3, 2], [1, 2, 1, 2])
    own = [before[i][0].layers[1] for i in (0, 2)]
    mean = jax.tree.map(lambda a, b: (a + 3.0 * b) / 4.0, *own)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5), there[0][1].layers[0], mean
    )
    equal(there[0][1].layers[1], before[0][1].layers[0])  # layer 3 stays the server's
    equal(there[1][0].layers[1], before[1][0].layers[1])


def test_in_a_run_the_mean_is_by_samples():
    """Clients 0 and 1 give layer 2 up, of which client 2 is not asked."""
    config = override(SMALL, strategy="sequential", partition="quantity", rounds=2)
    config = override(config, cuts=("2", "2", "3"), recuts=("2:1,1,3",))
    before = build(config, DATA)
    sizes = [share.samples for share in before.manifest]
    assert sizes[0] != sizes[1]
    phases, state = Phases(before), noise(before.strategy, 0)
    after = phases.at(2)
    moved, _ = phases.move(before.store.from_checkpoint(state), {}, before, after)
    moved = after.store.to_checkpoint(moved)
    own = branches(before.federation, before.strategy, state)
    now = branches(after.federation, after.strategy, moved)
    layers = [own[i][0].layers[1] for i in (0, 1)]
    jax.tree.map(
        lambda new, *old: np.testing.assert_allclose(
            new, np.average(old, axis=0, weights=sizes[:2]), rtol=1e-4
        ),
        now[0][1].layers[0].params,
        *(layer.params for layer in layers),
    )


def test_a_schedule_is_a_value():
    schedule = CutSchedule.of({1: (1, 2), 3: [1, 2], 5: (2, 2), 7: (1, 2)})
    assert schedule == CutSchedule((1, 5, 7), ((1, 2), (2, 2), (1, 2)))
    assert [schedule.cuts_in(n) for n in (0, 1, 4, 5, 6, 9)] == [
        (1, 2),
        (1, 2),
        (1, 2),
        (2, 2),
        (2, 2),
        (1, 2),
    ]
    assert CutSchedule.from_function(schedule.cuts_in, 9) == schedule
    assert [schedule.left_before(n) for n in (4, 5, 7)] == [{}, {1: (0,)}, {2: (0,)}]
    config = runs.with_schedule(SMALL, schedule).clients
    assert (config.cuts, config.recuts) == (("1", "2"), ("5:2,2", "7:1,2"))
    for wrong in ({2: (1,)}, {}, {1: (1,), 2: (1, 2)}, {0: (1,), 1: (2,)}):
        with pytest.raises(ValueError, match="not a schedule from round 1 on"):
            CutSchedule.of(wrong)


@pytest.mark.parametrize(
    ("recuts", "message"),
    [
        (("2",), "recuts: 2 is not allowed; allowed is ROUND:CUT,CUT,... such as"),
        (("1:2",), "recuts: 1:2 is not allowed; allowed are ascending rounds from 2"),
        (("3:2", "3:1"), "recuts: 3:1 is not allowed; allowed are ascending rounds"),
        (("2:1,1,1,1",), "recuts: 2:1,1,1,1 is not allowed; .* at most 3 cuts"),
        (("2:9",), "recuts: 9 is not a layer"),
    ],
)
def test_schedules_that_are_not_allowed(recuts, message):
    with pytest.raises(UserError, match=f"^{message}"):
        build(override(SMALL, recuts=recuts), DATA)


def test_an_algorithm_refuses_cuts_that_it_does_not_take():
    base = override(SMALL, strategy="splitfed_v2", cuts=("1",), recuts=("2:1,2",))
    with pytest.raises(UserError, match="^cuts: 1 2 is not allowed with splitfed_v2"):
        build(base, DATA)


@pytest.mark.slow
def test_a_refitted_run_goes_on_with_the_exits_that_wait(tmp_path):
    """And its summary has the bytes of the last cuts, however often it was resumed."""
    config, folder = override(SMALL, recuts=SMALL.clients.recuts[:2]), tmp_path / "run"
    runs.train(override(config, rounds=3), folder, data=DATA)
    summary = json.loads((folder / "summary.json").read_text())
    runs.train(override(config, rounds=3), folder, resume=True, data=DATA)
    again = json.loads((folder / "summary.json").read_text())
    assert again["link"] == summary["link"]
    assert {one["cut"] for one in again["link"]["cuts"]} == {2, 3}
    runs.refit(folder, data=DATA)
    shares = [
        (place / "partition.json").read_text() for place in (folder, folder / "refit")
    ]
    assert shares[0] == shares[1]  # with the cuts of round 1
    runs.train(config, folder / "refit", resume=True, data=DATA)
    assert int(runs.reopen(folder / "refit", data=DATA)[1].round) == 4


def test_cuts_that_stay_the_same_are_no_change():
    experiment = build(override(SMALL, recuts=("2:1,1,3", "4:1,1,layer3")), DATA)
    assert experiment.schedule.starts == (1,)
    assert Phases(experiment).at(4) is experiment


class Asked:
    """Says stop when it is asked for a number of times."""

    def __init__(self, times):
        self.left = times

    def __call__(self):
        self.left -= 1
        return self.left == 0


def stopped_twice(config, folder, asks):
    """Train with two stops; return where they were."""
    places = []
    for times in asks:
        with pytest.raises(Stopped) as stopped:
            runs.train(
                config, folder, data=DATA, resume=bool(places), stop=Asked(times)
            )
        places.append((stopped.value.rounds, stopped.value.steps))
    runs.train(config, folder, data=DATA, resume=True)
    return places


def figures(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    every = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in every]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("participation", [1.0, 0.7])
@pytest.mark.parametrize("axis", ["loop", "vmap"])
def test_a_stopped_run_goes_on_bit_for_bit(strategy, participation, axis, tmp_path):
    """Stopped in the middle of the round after a change, and right before a change."""
    check_stops(strategy, participation, axis, tmp_path)


@pytest.mark.slow
def test_a_run_with_changes_is_stopped_opened_and_evaluated(tmp_path):
    folder = check_stops("averaging", 0.7, "loop", tmp_path)
    rounds, scores = runs.evaluate(folder, data=DATA)
    last = figures(folder)[-1]["test"]
    assert rounds == 4 and [client.cut for client in scores.clients] == [1, 1, 1]
    check_partition(folder, runs.reopen(folder, data=DATA)[0].manifest)  # is the same
    assert scores.mean_exit_accuracy == last["mean_exit_accuracy"]
    (curve,) = read_curves([folder])
    assert curve.cuts.tolist() == [1, 1, 1]
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name != "2":
            shutil.rmtree(checkpoint)
    earlier = hs.restore(folder)
    cuts = {i: g.cut for g in earlier.federation.groups for i in g.ids}
    assert cuts == {0: 1, 1: 2, 2: 1}
    _, scores = runs.evaluate(folder, data=DATA)
    before = figures(folder)[1]["test"]
    assert scores.mean_server_accuracy == before["mean_server_accuracy"]


def check_stops(strategy, participation, axis, tmp_path):
    config = override(
        SMALL, strategy=strategy, participation=participation, client_axis=axis
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs.train(config, whole, data=DATA)
    asks = (3, 1) if axis == "loop" else (1, 1)  # a scan of two steps is not asked
    places = stopped_twice(config, stopped, asks)
    assert places == ([(1, 1), (2, 0)] if axis == "loop" else [(1, 0), (2, 0)])
    assert figures(whole) == figures(stopped)
    equal(*(runs.reopen(folder, data=DATA)[1] for folder in (whole, stopped)))
    return stopped


@pytest.mark.parametrize(
    ("strategy", "axis"),
    [
        ("averaging", "loop"),
        pytest.param("sequential", "loop", marks=pytest.mark.slow),
        pytest.param("averaging", "vmap", marks=pytest.mark.slow),
        pytest.param("sequential", "vmap", marks=pytest.mark.slow),
    ],
)
def test_programs_for_cuts_that_were_seen_are_used_again(
    strategy, axis, tmp_path, monkeypatch
):
    """A loop compiles each cut once, a scan each mix of cuts; both keep all of them."""
    traces, after = [], []
    training = InputPipeline.training
    evaluation = InputPipeline.evaluation

    def traced_training(self, *arguments):
        traces.append("training")
        return training(self, *arguments)

    def traced_evaluation(self, *arguments):
        traces.append("evaluation")  # the samples of a step take this way, too
        return evaluation(self, *arguments)

    def counted(lowered):
        lowered = list(lowered)
        traces.extend(["compiled"] * len(lowered))
        return compile_together(lowered)

    monkeypatch.setattr(InputPipeline, "training", traced_training)
    monkeypatch.setattr(InputPipeline, "evaluation", traced_evaluation)
    monkeypatch.setattr(compiled_turns, "compile_together", counted)
    config = override(
        SMALL,
        strategy=strategy,
        client_axis=axis,
        eval_every=1,
        cuts=("1", "2"),
        recuts=("2:2,1,2", "3:1,2", "4:2,1,2"),
    )
    tell = AfterRound(lambda record: after.append(len(traces)))
    runs.train(config, tmp_path / "run", data=DATA, callbacks=[tell])
    assert after[1] == after[3]
    if axis == "loop":
        steps = ["compiled"] * 4  # a client and a server for each of two cuts
        assert sorted(traces) == [*steps, *["evaluation"] * 3, "training"]
