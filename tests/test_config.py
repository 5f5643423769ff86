"""Configurations check themselves, and survive JSON."""

import json

import pytest

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

NAMES = resnet18(num_classes=10, input_shape=(32, 32, 3)).layer_names


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = preset(name)
    assert from_dict(json.loads(to_json(config))) == config


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
        {"optim": {"learning_rate": "fast"}},
        {"run": {"rounds": 1.5}},
        {"run": {"rounds": True}},
        {"clients": {"cuts": "3"}},
        {"optim": 3},
    ],
)
def test_bad_json_is_refused(values):
    with pytest.raises(UserError):
        from_dict(values)


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
