"""Options and registries: types, rules, entries and who reads an option."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import jax
import pytest

import hsee_jax
from hsee_jax.config import Config, override
from hsee_jax.core import (
    Option,
    Registry,
    UserError,
    at_least,
    between,
    one_of,
    positive,
    share,
)
from hsee_jax.core.options import Rule, read_options

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        (Option("rounds", int, 1), 3, 3),
        (Option("rate", float, 1.0), 3, 3.0),
        (Option("rate", float, 1.0), 0.5, 0.5),
        (Option("name", str, ""), "x", "x"),
        (Option("fast", bool, False), True, True),
        (Option("limit", int, None, optional=True), None, None),
        (Option("limit", int, None, optional=True), 5, 5),
        (Option("cuts", str, (), many=True), [3, "layer2"], ("3", "layer2")),
        (Option("cuts", str, (), many=True), (), ()),
        (Option("sizes", int, (), many=True), [1, 2], (1, 2)),
        (Option("share", float, 0.0, rules=(share,)), 0, 0.0),
        (Option("seed", int, 0, rules=(between(0, 9),)), 9, 9),
        (Option("turn", str, "a", names=("a", "b")), "b", "b"),
    ],
)
def test_a_value_gets_the_type_of_its_option(option, value, expected):
    found = option.checked(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            Option("rounds", int, 1),
            1.5,
            "rounds: 1.5 is not allowed; allowed is an int",
        ),
        (Option("rounds", int, 1), True, "rounds: true is not allowed"),
        (Option("rounds", int, 1), None, "rounds: null is not allowed"),
        (Option("rate", float, 1.0), "fast", 'rate: "fast" is not allowed'),
        (Option("rate", float, 1.0), False, "rate: false is not allowed"),
        (Option("fast", bool, False), 1, "fast: 1 is not allowed; allowed is a bool"),
        (Option("name", str, ""), 3, "name: 3 is not allowed; allowed is a str"),
        (Option("cuts", str, (), many=True), "3", "allowed is a list of str"),
        (Option("cuts", str, (), many=True), [True], "allowed is a list of str"),
        (Option("cuts", str, (), many=True), [1.5], "allowed is a list of str"),
        (Option("cuts", str, (), many=True), None, "allowed is a list of str"),
        (Option("n", int, 1, rules=(at_least(1),)), 0, "n: 0 .* allowed is 1 or more"),
        (Option("n", int, 1, optional=True, rules=(at_least(1),)), 0, "1 or more"),
        (Option("r", float, 1.0, rules=(at_least(0),)), INF, "r: inf is not allowed"),
        (Option("r", float, 1.0, rules=(positive,)), 0, "r: 0.0 .* more than 0"),
        (Option("r", float, 1.0, rules=(positive,)), NAN, "r: nan is not allowed"),
        (Option("r", float, 1.0, rules=(share,)), 1, "r: 1.0 .* less than 1"),
        (Option("s", int, 0, rules=(between(0, 9),)), 10, r"allowed is 0\.\.9"),
        (Option("s", int, (), many=True, rules=(positive,)), [2, 0], "s: 0 is not"),
        (Option("n", int, 1), 2**31, "n: 2147483648 .* allowed is 2147483647 or less"),
        (Option("turn", str, "", names=("batch",)), "bach", "did you mean batch?"),
        (Option("m", str, (), many=True, names=("a",)), ["a", "b"], "m: b is unknown"),
    ],
)
def test_a_value_that_is_not_allowed_is_one_line(option, value, message):
    with pytest.raises(UserError, match=message) as error:
        option.checked(value)
    assert "allowed" in str(error.value)
    assert "\n" not in str(error.value)


class Annotations:
    """What an annotation may say."""

    count: Annotated[int, "how many", at_least(1)] = 3
    limit: Annotated[int | None, "the most"] = None
    names: Annotated[tuple[str, ...], "their names", one_of("a", "b")] = ("a",)
    plain: float = 0.5


def test_options_are_read_from_annotations():
    found = read_options(Annotations, ["count", "limit", "names", "plain"])
    (rule,) = found["count"].rules
    assert isinstance(rule, Rule)
    assert found == {
        "count": Option("count", int, 3, "how many", (rule,)),
        "limit": Option("limit", int, None, "the most", optional=True),
        "names": Option(
            "names", str, ("a",), "their names", names=("a", "b"), many=True
        ),
        "plain": Option("plain", float, 0.5),
    }

    def wrong(*, table: dict = {}):  # noqa: B006
        """Take what no option can be."""

    with pytest.raises(TypeError, match="table: .* cannot be an option"):
        read_options(wrong, ["table"])

    def either(*, size: int | float | None = None, sizes: tuple[int, ...] = [3, 3]):  # noqa: B006
        """Take two types, and a list."""

    with pytest.raises(TypeError, match="size: .* cannot be an option"):
        read_options(either, ["size"])
    assert read_options(either, ["sizes"])["sizes"].default == (3, 3)

    def perhaps(*, sizes: tuple[int, ...] | None = None):
        """Take several, or none."""

    assert read_options(perhaps, ["sizes"])["sizes"].default is None


@pytest.fixture
def registry():
    """Of two entries, which share an option."""
    registry = Registry("shape", context=("units",))

    @registry.register
    def circle(size, *, units, radius: int = 1, colour: str = "red"):
        """A circle.

        More of it.
        """
        return "circle", size, units, radius, colour

    @registry.register(summary="four sides")
    def square(size, *, units, side: float = 2.0, colour: str = "blue"):
        return "square", size, units, side, colour

    return registry


def test_a_registry_gives_its_entries_by_name(registry):
    assert list(registry) == ["circle", "square"] and len(registry) == 2
    assert registry["circle"].summary == "A circle."
    assert registry["square"].summary == "four sides"
    assert list(registry["circle"].options) == ["radius", "colour"]
    assert list(registry.options()) == ["radius", "colour", "side"]
    assert registry.readers("colour") == ["circle", "square"]
    assert registry.readers("side") == ["square"]
    assert registry.readers("units") == registry.readers("size") == []


def test_an_entry_is_made_with_the_options_that_it_reads(registry):
    given = {"radius": 5, "side": 7.0}
    assert registry.make("circle", 1, units="m", options=given) == (
        ("circle", 1, "m", 5, "red")
    )
    assert registry.make("square", 1, units="m", options=given) == (
        ("square", 1, "m", 7.0, "blue")
    )
    with pytest.raises(UserError, match="shape: circel is unknown .did you mean circ"):
        registry.make("circel", 1, units="m")
    with pytest.raises(UserError, match="allowed are circle, square"):
        registry.entry("x")


def test_a_factory_gets_what_no_configuration_can_hold_as_it_is():
    registry = Registry("rate")

    @registry.register
    def fixed(*, momentum: Annotated[float, share] = 0.9):
        """Return it."""
        return momentum

    assert fixed(momentum=0) == 0.0 and type(fixed(momentum=0)) is float
    assert jax.grad(lambda m: fixed(momentum=m) ** 2)(0.25) == 0.5  # traced
    assert fixed(momentum=share.holds) is share.holds
    with pytest.raises(UserError, match="momentum: 1.0 is not allowed"):
        fixed(momentum=1)
    assert fixed.__name__ == "fixed" and fixed.__doc__ == "Return it."


def test_what_cannot_be_registered(registry):
    """A name twice, or an option that has another type elsewhere."""

    def circle(size, *, units):
        """Take no options."""

    with pytest.raises(ValueError, match="shape: circle is registered already"):
        registry.register(circle)

    def of_text(size, *, radius: str = "1"):
        """Take a text where circle takes an int."""

    def of_many(size, *, colour: tuple[str, ...] = ()):
        """Take several."""

    def without_units(size, *, units="m"):
        """Make an option of what is given."""

    def with_more(size, *, units, more):
        """Ask for what nothing gives."""

    for make, message in (
        (without_units, "units of without_units needs no default"),
        (with_more, "more of with_more needs a default"),
    ):
        with pytest.raises(ValueError, match=f"shape: {message}"):
            registry.register(make)
    for make, other in ((of_text, "radius"), (of_many, "colour")):
        with pytest.raises(ValueError, match=f"{other} as another type than circle"):
            registry.register(make)
    assert list(registry) == ["circle", "square"]


def test_the_same_function_may_change_the_type_of_its_option(registry):
    """As the cell of a notebook does, but not where another entry reads the option."""

    def triangle(size, *, units, pull: int = 1, **more):
        """Pull."""

    registry.register(triangle)
    triangle.__annotations__["pull"] = float
    registry.register(triangle)
    assert registry["triangle"].options["pull"].kind is float


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_script_may_be_its_own_plugin(how, tmp_path):
    """Also in the processes that it starts, which run it again under another name."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    place = (
        tmp_path / "own" / "shapes.py" if how == "module" else tmp_path / "shapes.py"
    )
    name = "own.shapes" if how == "module" else "shapes"
    place.write_text(OWN_PLUGIN.format(name=name))
    shelf = "from hsee_jax.core.registry import Registry\nshapes = Registry('shape')\n"
    (tmp_path / "shelf.py").write_text(shelf)
    words = ["-m", name] if how == "module" else [str(place)]
    package = str(Path(hsee_jax.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == ["1", "1"]


OWN_PLUGIN = """
import importlib
import multiprocessing

import shelf


@shelf.shapes.register
def circle():
    pass


def again():
    importlib.import_module("{name}")
    print(len(shelf.shapes), flush=True)


if __name__ == "__main__":
    again()
    process = multiprocessing.get_context("spawn").Process(target=again)
    process.start()
    process.join()
"""


def test_a_choice_may_be_registered_later(registry):
    option = Option("shape", str, "circle", names=one_of(registry).names)
    with pytest.raises(UserError, match="triangle is unknown"):
        option.checked("triangle")

    @registry.register
    def triangle():
        """Three sides."""

    assert option.checked("triangle") == "triangle"
    assert option.choices == ("circle", "square", "triangle")


def test_a_configuration_holds_no_option_without_a_reader():
    config = override(Config(), strategy="local", optimizer="adamw")
    assert "average" not in config.strategy.options
    assert "momentum" not in config.optim.options
    with pytest.raises(AttributeError, match="StrategyConfig has no option average"):
        config.strategy.average  # noqa: B018
    with pytest.raises(UserError, match="momentum: 0.5 has no effect on optimizer ad"):
        override(config, momentum=0.5)
    back = override(config, optimizer="sgd")
    assert back.optim.momentum == 0.9
