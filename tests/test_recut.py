"""Cuts that change between rounds: the layers move, and nothing else changes."""

import copy
import json
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Layer, Reference
from rounds import branches
from test_strategies import AVERAGING, check_against_reference
from tiny import RECIPE, TINY, tiny_data, tiny_federation

import hsee_jax as hs
from hsee_jax import runs
from hsee_jax.algorithms.hetero_splitee import averaging, sequential
from hsee_jax.config import override, preset
from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.federation.recut import recut
from hsee_jax.federation.schedule import CutSchedule
from hsee_jax.nn.model import init_network
from hsee_jax.runs.build import build
from hsee_jax.runs.phases import Phases

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
    config = override(SMALL, strategy=strategy, participation=participation)
    looped = build(override(config, client_axis="loop"), DATA)
    reference = reference_run(looped)
    for experiment in (looped, build(override(config, client_axis="vmap"), DATA)):
        last, state = train_phases(experiment)
        check_against_reference(reference, last.federation, last.strategy, state)
