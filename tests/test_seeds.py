"""What each seed of a run changes, and weights that are drawn for each client."""

import json

import jax
import pytest
from rounds import KEY, assert_same, branches
from tiny import TINY, tiny_federation

from hsee_jax.algorithms import averaging, sequential
from hsee_jax.config import override, preset, to_json
from hsee_jax.engine.host_store import HostStore
from hsee_jax.engine.store import DeviceStore
from hsee_jax.federation.branch import parts_of
from hsee_jax.nn import init_network
from hsee_jax.runs.build import augment_key, build
from hsee_jax.runs.equip import Given, equip
from hsee_jax.runs.participant import build_participant

SMALL = override(
    preset("demo"),
    **TINY,
    num_clients=6,
    cuts=("1", "2"),
    max_train_samples=60,
    max_test_samples=10,
    validation_share=0.0,
    batch_size=4,
    participation=0.5,
    dropout=0.2,
    model_seed=5,
    data_seed=5,
    partition_seed=5,
    strategy="averaging",
)
FLEET = """
[[devices]]
device = "raspberry-pi-4"
count = 6
compute_spread = 0.5
"""


def draws(config, fleet):
    """What is drawn at random in a run, by what it is for."""
    experiment = build(config)
    groups, attendance = experiment.federation.groups, experiment.attendance
    values = {"client": 1, "cut": 2, "batch_size": 4, "steps": 3, "test_samples": 10}
    values |= {"test_batch_size": 10, "config": json.loads(to_json(config))}
    values["info"] = experiment.info._asdict()
    part = build_participant(values, plugins=("tiny",))
    of_rounds = experiment.compilers.make_round.keywords["key"]
    keys = experiment.init_key, of_rounds, augment_key(config), part.augment_key
    init, augment, *others = (jax.random.key_data(key).tolist() for key in keys)
    assert init != augment
    weights = jax.device_get(experiment.init().rows.clients[0].layers[0].params)
    equipment = equip(config, Given(devices=fleet), resume=None)
    return {
        "init": str(weights),
        "key": init,
        "augment": augment,
        "augment of devices": others,
        "participants": [attendance.drawn(groups, n) for n in range(6)],
        "missing": [attendance.missing(groups, n) for n in range(6)],
        "slots": experiment.slots,
        "order of a device": part.seed,
        "shares": [share.indices for share in experiment.manifest],
        "devices": [one.forward_flops_per_s for one in equipment.fleet.clients],
    }


DATA = "augment", "augment of devices", "participants", "missing", "order of a device"


@pytest.mark.parametrize(
    ("seed", "changed"),
    [
        ("model_seed", {"init", "key"}),
        ("data_seed", set(DATA)),
        ("partition_seed", {"shares", "devices"}),
    ],
)
def test_a_seed_changes_what_is_drawn_from_it_alone(seed, changed, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    one, other = draws(SMALL, fleet), draws(override(SMALL, **{seed: 6}), fleet)
    slots = one.pop("slots"), other.pop("slots")
    assert slots[0] == slots[1] or seed == "data_seed"
    assert {name for name in one if one[name] != other[name]} == changed


@pytest.mark.parametrize("make", [averaging, sequential])
def test_a_client_that_draws_its_own_network_draws_by_its_id(make):
    """Also in a store with one slot for each group; a shared server has no id."""
    cuts = {7: 1, 2: 2, 5: 1}
    federation = tiny_federation(cuts)
    strategy = make(federation, init="per_client")

    def own(part):
        return {"params": part.params, "batch_stats": part.batch_stats}

    def networks(state):
        return {
            i: [list(map(own, parts_of(branch))) for branch in both]
            for i, both in branches(federation, strategy, state).items()
        }

    found = []
    for kind, slots in ((DeviceStore, (2, 1)), (HostStore, (1, 1))):
        store = kind(federation, strategy, slots)
        found.append(networks(store.to_checkpoint(store.init(KEY))))
    draw = jax.jit(lambda key: init_network(federation.model, key))
    common = draw(KEY)
    for i, cut in cuts.items():
        drawn = draw(jax.random.fold_in(KEY, i))
        behind = common if strategy.shared else drawn
        client = [*drawn.layers[:cut], drawn.exit_heads[cut - 1]]
        server = [*behind.layers[cut:], behind.final_head]
        assert_same(found[0][i], [client, server], rtol=1e-6)
        assert_same(found[1][i], [client, server], rtol=1e-6)
