"""Forms of convolutions that are measured, kept, and taken by the next run."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.cli import tune as command
from hsee_jax.cli.arguments import config_parser
from hsee_jax.cli.flags import config_from
from hsee_jax.core import UserError
from hsee_jax.nn import convolution_choice as choice
from hsee_jax.nn.convolution import convolution, pass_of
from hsee_jax.runs.forms import forms_file, read_forms, write_forms
from hsee_jax.runs.model import build_model
from hsee_jax.systems.tuning import search

CONVOLUTION = "stablehlo.convolution"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recorded(shape, window, *, groups=1, clients=0):
    """The places that a gradient of one convolution asks for, by pass."""
    found = {}

    def record(place):
        found[place.name] = place
        return "grouped"

    def loss(x, w):
        pad = ((window // 2,) * 2,) * 2
        conv = convolution(record)
        return jnp.sum(conv(x, w, (1, 1), pad, feature_group_count=groups))

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    w = jax.ShapeDtypeStruct(
        (window, window, shape[-1] // groups, shape[-1]), jnp.float32
    )
    run = jax.value_and_grad(loss, (0, 1))
    if clients:
        run = jax.vmap(run)
        x, w = (jax.ShapeDtypeStruct((clients, *a.shape), a.dtype) for a in (x, w))
    jax.eval_shape(run, x, w)
    return found


@pytest.mark.parametrize("clients", [0, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_all_forms_of_a_place_are_equal(groups, clients):
    rng = np.random.default_rng(0)
    places = recorded((2, 6, 6, 4), 3, groups=groups, clients=clients)
    assert set(places) == {"forward", "wrt_input", "wrt_weights"}
    for place in places.values():
        assert (place.batch, place.stack) == (2, clients)
        leading = (clients,) if clients else ()
        arrays = [
            rng.standard_normal((*leading, *s)).astype(np.float32)
            for s in place.shapes()
        ]
        forms = choice.forms_of(place, "cpu")
        on_gpu = choice.forms_of(place, "gpu")
        assert set(forms) - set(on_gpu) == {"patches"}  # can abort XLA's compiler
        assert ("winograd4" in forms) == (groups == 1)
        assert ("unrolled" in forms) == bool(clients)
        first, *others = (jax.jit(pass_of(place, form))(*arrays) for form in forms)
        for other in others:
            np.testing.assert_allclose(first, other, rtol=1e-4, atol=1e-4)


def places():
    return list(recorded((2, 6, 6, 4), 3).values())


def cost_of(price):
    """The seconds of steps in which each place costs the price of its form."""

    def step_seconds(choices):
        named = [c if callable(c) else choice.choice_of(c) for c in choices]
        return [sum(price[c(p)] for p in places()) for c in named]

    return step_seconds


@pytest.mark.parametrize("fastest", ["winograd", "grouped", "patches"])
def test_the_step_decides_and_not_the_pass_alone(fastest):
    """Alone winograd4 is fastest and all others are near; in the step it is slowest."""
    price = {"grouped": 3.0, "patches": 2.0, "winograd": 4.0, "winograd4": 9.0}
    price[fastest] = 1.0
    alone = {
        p: {"grouped": 1.2, "patches": 1.3, "winograd": 1.4, "winograd4": 1.0}
        for p in places()
    }
    tuning = search(alone, "patches", cost_of(price))
    assert set(tuning.forms.values()) == {fastest}
    assert tuning.tuned_s == 3 * price[fastest]
    assert tuning.native_s == 3 * price["grouped"]
    assert tuning.default_s == 3 * price["patches"]


def test_what_is_far_from_the_fastest_alone_is_not_tried():
    alone = {p: {"grouped": 2.0, "patches": 1.0} for p in places()}
    tried = []

    def step_seconds(choices):
        tried.append(len(choices))
        return [1.0] * (len(choices) - 1) + [0.5]

    assert set(search(alone, "grouped", step_seconds).forms.values()) == {"patches"}
    assert tried == [3]


def test_a_default_that_was_not_timed_is_the_native_form():
    """On a GPU `auto` is ``unrolled``, which single weights do not have."""
    alone = {p: {"grouped": 2.0, "winograd": 1.0} for p in places()}

    def step_seconds(choices):
        native, default, tuned = 3.0, 1.0, 2.0
        return [native, default, tuned][: len(choices)]

    tuning = search(alone, "unrolled", step_seconds)
    assert set(tuning.forms.values()) == {"grouped"}
    assert (tuning.native_s, tuning.tuned_s) == (3.0, 1.0)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A small network for series, and a folder of them."""
    folder = tmp_path_factory.mktemp("series")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 8, 3)).astype(np.float32), np.arange(40) % 3
    hs.data.write_npz(folder, (x, y, x, y))
    network = "--network conv1d --width 2 --depth 2 --num-clients 2 --cuts 1"
    return f"{network} --batch-size 4 --dataset npz --data-dir {folder}".split()


def convolutions(words):
    """The convolutions in the program of the network that a run takes."""
    config = config_from(vars(config_parser("tune", words).parse_args(words)))
    model = build_model(config)
    images = jnp.zeros((4, 8, 3))
    stage = model.stages[0]
    variables = stage.init(jax.random.key(0), images[:1])
    run = partial(stage.apply, mask=jnp.ones(4, bool), train=True)
    return jax.jit(run).lower(variables, images).as_text().count(CONVOLUTION)


def test_the_command_keeps_forms_that_the_next_run_takes(words, capsys):
    assert convolutions(words) == 1
    assert cli.main(["tune", *words, "--repeats", "1"]) == 0
    assert str(forms_file()) in capsys.readouterr().out
    forms = read_forms()
    assert {place.name for place in forms} == {"forward", "wrt_input", "wrt_weights"}
    assert {place.batch for place in forms} == {4}
    for form, count in (("patches", 0), ("grouped", 1)):
        write_forms(dict.fromkeys(forms, form))
        assert read_forms() == dict.fromkeys(forms, form)
        assert convolutions(words) == count
    write_forms(dict.fromkeys(forms, "patches"))
    assert convolutions([*words, "--conv", "grouped"]) == 1
    assert convolutions([*words[:-4], "--batch-size", "4", *words[-4:]]) == 0


def test_the_network_is_the_one_of_the_run(monkeypatch):
    """Where clients see tiles of the images, it is made for tiles."""
    seen = []

    def stop(make_model, *arguments, **options):
        seen.append(make_model("grouped").input_shape)
        raise UserError("enough")

    monkeypatch.setattr(command, "tune", stop)
    tiles = "--strategy fpl --partition views --view tiles --num-clients 4 --cuts 2"
    assert cli.main(["tune", "demo", *tiles.split()]) == 2
    assert seen == [(14, 14, 1)]


def test_the_batch_is_that_of_a_step(monkeypatch, capsys):
    seen = []

    def stop(make_model, optimizer, batch_size, **options):
        seen.append((batch_size, options["repeats"]))
        raise UserError("enough")

    monkeypatch.setattr(command, "tune", stop)
    words = ["tune", "demo", "--batch-size", "12", "--repeats", "7"]
    for parts in ("1", "3", "5"):
        assert cli.main([*words, "--micro-batches", parts]) == 2
    assert seen == [(12, 7), (4, 7)]
    assert "micro_batches: 5 is not allowed" in capsys.readouterr().err


@pytest.mark.slow
def test_batches_of_one_image_are_tuned_too(words):
    """Though the weights are initialized with a batch of this size."""
    assert cli.main(["tune", *words, "--batch-size", "1", "--repeats", "1"]) == 0
    places = [place for place in read_forms() if place.batch == 1]
    assert {place.name for place in places} == {"forward", "wrt_input", "wrt_weights"}


@pytest.mark.slow
def test_stacked_clients_are_tuned_as_stacks(words):
    assert cli.main(["tune", *words, "--repeats", "1", "--client-axis", "vmap"]) == 0
    assert {place.stack for place in read_forms()} == {2}


def test_a_folder_that_cannot_be_read_holds_no_forms(tmp_path, monkeypatch):
    """A run then takes the default; the command says that it cannot write."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_forms() == {}
    with pytest.raises(UserError, match="forms: .* cannot be written"):
        write_forms({})


@pytest.mark.parametrize("text", ["{", "[1]", '[{"place": [], "form": "grouped"}]'])
def test_a_file_of_another_kind_is_refused(text):
    forms_file().parent.mkdir(parents=True)
    forms_file().write_text(text)
    with pytest.raises(UserError, match="delete it, and tune again"):
        read_forms()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--network", "mlp"], "network: mlp has no convolutions to tune"),
        (["--repeats", "0"], "repeats: 0 is not allowed; allowed is 1 or more"),
    ],
)
def test_what_cannot_be_tuned_is_refused(flags, message, capsys):
    assert cli.main(["tune", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("form", [["patches"], {}, None, "fastest"])
def test_a_damaged_file_of_forms_is_one_line(monkeypatch, tmp_path, form):
    path = tmp_path / "forms.json"
    monkeypatch.setattr("hsee_jax.runs.forms.forms_file", lambda: path)
    place = ["forward", [[4, 4], [3, 3], [1, 1], [[1, 1], [1, 1]], 1], [1, 2], 4, 1, ""]
    path.write_text(json.dumps([{"place": place, "form": "patches"}]))
    assert list(read_forms().values()) == ["patches"]
    path.write_text(json.dumps([{"place": place, "form": form}]))
    with pytest.raises(UserError, match=r"forms\.json does not hold the forms"):
        read_forms()
