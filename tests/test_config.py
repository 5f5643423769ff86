"""Configurations check themselves, and survive JSON."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsee_jax import config as configs
from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.config.presets import PRESETS, preset
from hsee_jax.config.schema import Config
from hsee_jax.config.values import (
    SECTIONS,
    flatten,
    from_dict,
    options,
    override,
    to_json,
)
from hsee_jax.core.errors import UserError
from hsee_jax.nn.cuts import deal_cuts, parse_cut
from hsee_jax.nn.resnet import resnet18

MANY = ("cuts", "absences")
NAMES = resnet18(num_classes=10, input_shape=(32, 32, 3)).layer_names


WRITTEN = Path(__file__).parent / "data" / "run-0.1" / "config.json"


def assert_round_trip(config):
    values = json.loads(to_json(config))
    assert from_dict(values) == config
    assert json.loads(to_json(from_dict(values))) == values
    assert hash(from_dict(values)) == hash(config)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("strategy", [*ALGORITHMS])
def test_json_round_trip(name, strategy):
    assert_round_trip(preset(name))
    assert_round_trip(override(preset(name), strategy=strategy))


def values_of(option):
    """Values that an option may have, `None` among them where that is one."""
    if option.name == "recuts":  # their rounds ascend
        return st.sampled_from([(), ("2:1",), ("3:2", "10:layer2")])
    if option.choices:
        value = st.sampled_from(option.choices)
    elif option.name == "absences":
        value = st.sampled_from(["0:1-2", "0:3-3"])
    elif option.kind is str:
        value = st.text(max_size=5)
    elif option.kind is bool:
        value = st.booleans()
    else:
        numbers = st.integers(-1, 99) if option.kind is int else st.floats(-0.5, 2)
        value = numbers.filter(lambda n: all(rule.holds(n) for rule in option.rules))
    value = st.lists(value, max_size=3).map(tuple) if option.many else value
    return st.none() | value if option.optional else value


@st.composite
def configurations(draw):
    """Configurations with any value in any option that has an effect."""
    known = options()
    entries = {f for kind in SECTIONS.values() for f in kind.registries}
    config = override(Config(), **{f: draw(values_of(known[f][1])) for f in entries})
    names = sorted(flatten(config).keys() - entries - {"labels", "plugin"})
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=6))
    own = {n: o for s in SECTIONS for n, o in getattr(config, s).active().items()}
    rules = {name: own.get(name, known[name][1]) for name in chosen}
    return override(config, **{n: draw(values_of(rule)) for n, rule in rules.items()})


@given(configurations())
@settings(max_examples=30, deadline=None)
def test_any_configuration_survives_json(config):
    assert_round_trip(config)


def test_a_configuration_of_version_0_1_is_read():
    """Which held every option, whoever reads it, and `init` among the clients."""
    values = json.loads(WRITTEN.read_text())
    assert values["clients"]["init"] == "shared" and "turn" in values["strategy"]
    config = from_dict(values)
    assert config == override(
        Config(),
        max_train_samples=48,
        max_test_samples=40,
        validation_share=0.2,
        width=1,
        num_clients=3,
        cuts=("2", "7"),
        rounds=2,
        batch_size=8,
        eval_every=2,
        checkpoint_every=2,
    )
    written = {k: v for section in values.values() for k, v in section.items()}
    for name, value in flatten(config).items():
        if name not in (
            "network",
            "labels",
            "plugin",
            "micro_batches",
            "loop_threads",
            "aggregate",
            "trim_share",
            "recuts",
            "deadline",
            "keep_layers_private",
            "norm",
            "pretrained",
            "refit_exits_every",
            "labelled_share",
            "distill",
            "exits",
        ):  # there were none
            assert written[name] == (list(value) if name in MANY else value)
    values["clients"]["init"] = "per_client"
    assert from_dict(values).strategy.init == "per_client"
    assert_round_trip(from_dict(values))
    # what has no effect is checked all the same
    values["strategy"]["turn"] = "never"
    with pytest.raises(UserError, match="turn: never is unknown"):
        from_dict(values)


def test_labels_were_an_option_of_every_dataset():
    """Now they are one of the user's own data; older files are still read."""
    network = {"network": "resnet18"}  # as every file since version 0.1 has

    def read(**data):
        return from_dict({"data": data, "model": network}).data

    known = read(dataset="cifar10", labels="refuse")
    assert known == override(Config(), dataset="cifar10").data
    assert read(labels="refuse") == Config().data
    assert read(dataset="npz", labels="refuse").labels == "refuse"
    assert read(dataset="npz", labels="remap").labels == "remap"
    with pytest.raises(UserError, match="labels: remap has no effect on dataset cifar"):
        read(dataset="cifar10", labels="remap")
    with pytest.raises(UserError, match="labels: never is unknown"):
        read(dataset="cifar10", labels="never")


def test_init_is_read_where_a_strategy_reads_it():
    values = {"clients": {"init": "per_client"}, "strategy": {"strategy": "fedavg"}}
    assert "init" not in flatten(from_dict(values))
    values = {"clients": {"init": "random"}}
    with pytest.raises(UserError, match="init: random is unknown"):
        from_dict(values)


def test_cuts_may_be_numbers():
    config = override(Config(), cuts=[3, 5])
    assert config.clients.cuts == ("3", "5")
    assert from_dict(json.loads(to_json(config))) == config
    assert from_dict({"clients": {"cuts": [3, "layer2"]}}).clients.cuts == (
        "3",
        "layer2",
    )


def test_option_names_are_unique_and_documented():
    """Over all sections, whatever networks, strategies ... can be named."""
    names = [name for kind in SECTIONS.values() for name in kind.known()]
    assert sorted(names) == sorted(options())
    assert all(option.help for _, option in options().values())
    assert flatten(override(Config(), rounds=7, cuts=("2",)))["rounds"] == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_clients": 0}, "num_clients: 0"),
        ({"rounds": 0}, "rounds: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"learning_rate": -0.1}, "learning_rate: -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"participation": 1.5}, "participation: 1.5"),
        ({"strategy": "averagin"}, "did you mean averaging?"),
        ({"dataset": "cifar"}, "did you mean cifar10?"),
        ({"stratgy": "averaging"}, "did you mean strategy?"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(changes, words):
    with pytest.raises(UserError) as error:
        override(Config(), **changes)
    text = str(error.value)
    assert words in text
    assert "allowed" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "values",
    [
        {"optimm": {}},
        {"optim": {"rate": 1}},
        {"clients": {"learning_rate": 0.1}},
        {"strategy": {"strategy": "averagin"}},
        {"model": {"network": "resnet19"}},
        {"run": {"plugin": ["no_such_module"]}},
        {"run": {"plugin": "tiny"}},
        {"model": {"depth_of_field": 2}},
        {"optim": {"optimizer": "adamw", "momentum": 0.5}},  # which adamw does not read
        {"optim": {"learning_rate": "fast"}},
        {"run": {"rounds": 1.5}},
        {"run": {"rounds": True}},
        {"clients": {"cuts": "3"}},
        {"optim": 3},
        {"data": {"dataset": ["cifar10"], "labels": "refuse"}},
    ],
)
def test_bad_json_is_refused(values):
    with pytest.raises(UserError) as error:
        from_dict(values)
    assert "\n" not in str(error.value)


def test_cuts_by_number_and_by_name():
    assert [parse_cut(c, NAMES) for c in (1, "9", "stem", "layer2", "layer3.0")] == [
        1,
        9,
        1,
        5,
        6,
    ]
    assert deal_cuts(("3", "layer3"), 5, NAMES) == (3, 7, 3, 7, 3)


@pytest.mark.parametrize("cut", ["0", "10", "layer9", "", "-1", "2.5"])
def test_no_such_cut(cut):
    with pytest.raises(UserError, match=r"allowed are 1\.\.9"):
        parse_cut(cut, NAMES)


def test_more_cuts_than_clients():
    with pytest.raises(UserError, match="3 given for 2 clients"):
        deal_cuts(("1", "2", "3"), 2, NAMES)


@pytest.mark.parametrize("dataset", ["npz", "imagefolder", "parquet"])
def test_the_folder_of_own_data_is_a_setting(dataset):
    """A known dataset is the same in every folder."""
    for name, counts in ((dataset, True), ("cifar10", False)):
        one, other = (
            configs.settings(override(Config(), dataset=name, data_dir=folder))
            for folder in ("one", "other")
        )
        assert (one != other) is counts
