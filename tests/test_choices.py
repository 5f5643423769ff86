"""Every option has a flag, a help and a reader, and every choice can be built."""

import dis
import inspect
import sys
from pathlib import Path

import pytest
from tiny import TINY

import hsee_jax
from hsee_jax.cli.arguments import config_parser
from hsee_jax.cli.flags import config_from
from hsee_jax.config import SECTIONS, flatten, options, override, preset
from hsee_jax.config.section import Section, Values
from hsee_jax.core import Registry, UserError
from hsee_jax.data import DATASETS
from hsee_jax.nn import NETWORKS
from hsee_jax.runs.build import build, build_federation, build_strategy
from hsee_jax.runs.data import build_info

# What the checks of an entry ask for.
NEEDS = {
    "sequential": {"average": "clients"},
    "fedavg": {"cuts": ("9",), "link": "full"},
    "splitfed_v1": {"cuts": ("3",)},
    "splitfed_v2": {"cuts": ("3",)},
    "centralized": {"num_clients": 1, "cuts": ("3",), "link": "full"},
    "fpl": {"cuts": ("3",), "partition": "views"},
    "vicreg": {"augment": "noise"},
    "sian": {"order": 3},
}
LAYERS = {
    "tiny": 3,
    "mlp": 8,
    "resnet34": 17,
    "resnet50": 17,
    "mobilenet_v2": 19,
    "mobilenet_v3_small": 13,
    "vit": 12,
    "conv1d": 6,
    "sian": 3,
}
# Of samples, where an entry or a choice takes no images.
SHAPES = {"conv1d": (28, 1), "sian": (28,), "axis": (6, 28, 28, 1)}

# They name a module and a file, or belong to the clock.
NOT_BUILT = ("plugin", "pretrained", "deadline")
ROBUST = {"weights": "uniform", "aggregate": "trimmed_mean", "trim_share": 0.25}
OURS = Path(hsee_jax.__file__).parent


def entries(registry):
    """The entries of the package itself; other tests may have registered more."""
    return [
        name
        for name, entry in registry.items()
        if entry.make.__module__.startswith("hsee_jax.")
    ]


SMALL = override(
    preset("demo"), max_train_samples=40, max_test_samples=10, cuts=("2", "3"), width=2
)
# Every entry of every registry: the field that names it, its registry and its name.
ENTRIES = [
    (field, registry, name)
    for kind in SECTIONS.values()
    for field, registry in kind.registries.items()
    for name in entries(registry)
]


# All options, but those of entries that other tests have registered.
NAMES = sorted(
    {name for kind in SECTIONS.values() for name in kind.fields()}
    | {name for _, registry, entry in ENTRIES for name in registry[entry].options}
)


@pytest.fixture(scope="module")
def parser():
    return config_parser("train", [])


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_flag_and_a_help(name, parser):
    _, option = options()[name]
    flag = parser._option_string_actions[f"--{name.replace('_', '-')}"]
    assert flag.dest == name
    assert len(option.help) > 10
    assert flag.help.startswith(option.help.replace("%", "%%"))


def test_help_shows_the_default_of_each_reader(parser):
    """In the preset of the demo no network reads these options."""
    for flag, defaults in (
        ("--hidden", "(mlp 128, sian 16, vit 192)"),
        ("--depth", "(mlp 8, conv1d 6, vit 12)"),
        ("--width", "(demo: 8)"),
    ):
        assert parser._option_string_actions[flag].help.endswith(defaults)


def refused(option):
    """A value that is not allowed: by its name, by a rule, or else by its type."""
    if option.choices:
        value = "nothing"
    else:
        against = (v for r in option.rules for v in (-1, 2**30) if not r.holds(v))
        value = next(against, 1 if option.kind is str else "x")
    return (value,) if option.many and value != 1 else value


@pytest.mark.parametrize(("field", "registry", "name"), ENTRIES)
def test_a_factory_refuses_a_value_in_a_program_too(field, registry, name):
    entry = registry[name]
    for option in entry.options.values():
        with pytest.raises(UserError, match=f"^{option.name}: .*allowed"):
            entry.make(**{option.name: refused(option)})


def another(option, current):
    """A value that is allowed, and not the current one."""
    if option.choices:
        return next(choice for choice in option.choices if choice != current)
    if option.many:
        some = {"absences": ("1:2-3",), "plugin": ("tiny",), "recuts": ("2:3",)}
        return some.get(option.name, (option.kind("1"),))
    if option.kind is bool:
        return not current
    if option.kind is float:
        return 0.125
    return "/folder" if option.kind is str else (current or 3) + 1


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_changes_its_option(name, parser):
    """Where the preset names no reader, another flag does."""
    (section, option), needed = options()[name], {}
    if name not in flatten(preset("demo")):
        readers = ((f, entry) for f, r, entry in ENTRIES if name in r[entry].options)
        needed = dict([next(readers)])
    before = override(preset("demo"), **needed)
    own = getattr(before, section).active().get(name, option)  # readers may differ
    value = another(own, flatten(before)[name])
    words = [word for field in needed.items() for word in (f"--{field[0]}", field[1])]
    words += [f"--{name.replace('_', '-')}"]
    words += (str(v) for v in (value if option.many else [value]))
    if option.kind is bool:
        words[-1] = words[-1].lower()
    after = config_from(vars(parser.parse(words)))
    assert after == override(before, **{name: value})
    assert flatten(after)[name] == value


def naming(field, name, **changes):
    """A configuration that names an entry."""
    if changes.get("aggregate", "mean") != "mean":
        changes = {**ROBUST, **changes}
        if changes["aggregate"] == "median":
            del changes["trim_share"]
    return override(SMALL, **({field: name} | NEEDS.get(name, {}) | changes))


def choices():
    for field, registry, name in ENTRIES:
        yield pytest.param(field, name, {}, id=f"{field}={name}")
        for option in registry[name].options.values():
            for choice in option.choices:
                yield pytest.param(
                    field,
                    name,
                    {option.name: choice},
                    id=f"{name}-{option.name}={choice}",
                )


@pytest.mark.parametrize(("field", "name", "changes"), list(choices()))
def test_every_choice_can_be_built(field, name, changes):
    """Every entry of every registry, and every name that an option may be."""
    config = naming(field, name, **changes)
    if field == "dataset":  # the data may not be there
        assert callable(DATASETS.make(name, options=config.data.options).read)
        return
    info = build_info(config.data)
    shape = SHAPES.get(changes.get("view", name), info.input_shape)
    info = info._replace(input_shape=shape)
    federation = build_federation(config, info)
    strategy = build_strategy(config, federation)
    assert len(federation.model.stages) == LAYERS.get(name, 9)
    assert callable(strategy.init)


def other(option):
    """A value that is not the default."""
    if option.kind is str:
        return "x"
    if option.kind is bool:
        return not option.default
    if option.many:
        return (0.25,)
    return 0.125 if option.kind is float else (option.default or 0) + 1


def configurations():
    """The entries in turn, with other values of all numbers and names."""
    rows = [
        [(field, name) for name in entries(registry)]
        for kind in SECTIONS.values()
        for field, registry in kind.registries.items()
    ]
    for turn in range(max(map(len, rows))):
        changes = dict(row[turn % len(row)] for row in rows)
        changes |= NEEDS.get(changes["strategy"], {})
        if turn >= len(entries(NETWORKS)):  # the same for any, and this is built sooner
            changes |= TINY | {"cuts": changes.get("cuts", ("2", "3"))}
            changes["cuts"] = tuple(min(cut, "3") for cut in changes["cuts"])
        config = override(SMALL, **changes)
        numbers = {
            name: other(option)
            for section in SECTIONS
            for name, option in getattr(config, section).active().items()
            if option.kind in (int, float, bool)
            or (option.kind is str and option.optional)
        }
        numbers.pop("pretrained", None)  # a file
        numbers.pop("width_target", None)  # few networks have gates
        if "heads" in numbers:  # they divide the values and the image
            numbers |= {"hidden": 16, "heads": 4, "patch_size": 7}
        if changes["strategy"] == "fedavg" and "depth" in numbers:
            numbers["depth"] = 9  # the clients hold all layers
        if "order" in numbers:
            numbers["interactions"] = ("0,1",)
        if "trim_share" in numbers:
            numbers |= ROBUST
        if "exit_gradient" in numbers:
            numbers["boundary"] = "joint"
        if "gradient_share" in numbers:
            numbers["turn"] = "together"
            numbers.pop("distill", None)  # they exclude each other
        if changes["strategy"] == "fedavg":  # whose clients hold all layers
            count = LAYERS.get(changes["network"], 9) + ("depth" in numbers)
            numbers["cuts"] = (str(count),)
        yield override(config, **numbers)
    yield override(SMALL, strategy="vicreg", augment="noise", width_target=0.125)


@pytest.fixture(scope="module")
def reads():
    """The values that builds of all entries read, by their names."""
    found = {}
    get, make = Section.__getattribute__, Registry.make

    def read(section, name):
        value = get(section, name)
        caller = Path(sys._getframe(1).f_code.co_filename)
        if OURS in caller.parents and caller.parent.name != "config":
            found.setdefault(name, set()).add(value)
        return value

    def made(registry, name, *context, options=Values(), **more):  # noqa: B008
        for key in registry[name].options:
            found.setdefault(key, set()).add(options.get(key))
        if registry is DATASETS:  # whatever it is, its data are those of the package
            return make(registry, "fashion_mnist_small")
        if registry is NETWORKS and name in SHAPES:
            return make(registry, "tiny", *context, **more)
        return make(registry, name, *context, options=options, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", read)
        patch.setattr(Registry, "make", made)
        for config in configurations():
            build(config)
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_BUILT])
def test_every_option_reaches_a_build(name, reads):
    """Fields are read beside the configuration, options given to their factories."""
    section, option = options()[name]
    assert reads[name]
    if name not in SECTIONS[section].fields() and not option.choices:
        assert reads[name] - {option.default}


def names_used(make):
    """The names of parameters that the body of a function uses."""
    code = inspect.unwrap(make).__code__
    loads = {i.argval for i in dis.get_instructions(code) if "LOAD" in i.opname}
    return loads | set(code.co_cellvars)


def test_every_factory_uses_its_options():
    for _, registry, name in ENTRIES:
        entry = registry[name]
        assert set(entry.options) <= names_used(entry.make), name
