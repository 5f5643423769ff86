"""Forms of convolutions that are measured, kept, and taken by the next run."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hsee_jax import cli
from hsee_jax.config import Config, override
from hsee_jax.core import UserError
from hsee_jax.nn import convolution_choice as choice
from hsee_jax.nn.convolution import convolution, pass_of
from hsee_jax.nn.registry import NETWORKS
from hsee_jax.runs.build import build_info
from hsee_jax.runs.forms import forms_file, read_forms, write_forms
from hsee_jax.runs.model import build_model
from hsee_jax.systems import tuning

SMALL = {"network": "conv1d", "width": 2, "dataset": "digits"}


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
        x, w = (
            jax.ShapeDtypeStruct((clients, *a.shape), a.dtype) for a in (x, w)
        )
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
        forms = choice.forms_of(place)
        assert ("winograd4" in forms) == (groups == 1)
        assert ("unrolled" in forms) == bool(clients)
        first, *others = (jax.jit(pass_of(place, form))(*arrays) for form in forms)
        for other in others:
            np.testing.assert_allclose(first, other, rtol=1e-4, atol=1e-4)


def slow_forms(monkeypatch, seconds):
    """Let every pass of some forms sleep, alone and in the step."""
    real = choice.forms_of

    def timed(place, repeats):
        return {form: seconds.get(form, 1e-3) for form in real(place)}

    monkeypatch.setattr(tuning, "_time_alone", timed)


def make_model(conv):
    info = build_info(override(Config(), **SMALL).data)
    return NETWORKS.make(
        "conv1d",
        options={"width": 2, "conv": conv},
        num_classes=info.num_classes,
        input_shape=info.input_shape,
    )


def sleeping(seconds):
    """Steps that take some seconds for every place of a form."""

    def step(model, optimizer, batch_size, stack):
        places = model.stages  # the model carries its choice, see `with_choice`
        del places
        return lambda: time.sleep(seconds(model.choice))

    return step


def test_the_step_decides_and_not_the_pass_alone(monkeypatch):
    """Alone patches are fastest; in the step native convolutions are."""
    slow_forms(monkeypatch, {"grouped": 1.2e-3})
    monkeypatch.setattr(tuning, "_step", lambda *args: args[0])
    monkeypatch.setattr(
        tuning,
        "_in_turns",
        lambda calls, repeats: {name: cost(call) for name, call in calls.items()},
    )
    record = {}

    def cost(model):
        conv = record[id(model)]
        taken = conv if callable(conv) else choice.choice_of(conv)
        return 1.0 + sum(taken(place) == "patches" for place in places)

    def make(conv):
        model = make_model("grouped" if callable(conv) else conv)
        record[id(model)] = conv
        kept.append(model)
        return model

    kept, places = [], {}
    monkeypatch.setattr(
        tuning._Recorder, "__init__", lambda self: setattr(self, "places", places)
    )
    real = tuning._program
    monkeypatch.setattr(
        tuning,
        "_program",
        lambda model, *rest: real(make_model(record[id(model)]), *rest),
    )
    tuned = tuning.tune(make, optax.sgd(1.0), 4, other="patches")
    assert tuned.forms and set(tuned.forms.values()) == {"grouped"}
    assert tuned.native_s == tuned.tuned_s < tuned.default_s


def test_the_command_keeps_forms_that_the_next_run_takes(capsys, tmp_path):
    words = ["--network", "conv1d", "--width", "2", "--batch-size", "4"]
    data = ["--dataset", "digits", "--cuts", "1"]
    assert cli.main(["tune", *words, *data, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "auto, from now on" in out and str(forms_file()) in out
    forms = read_forms()
    assert {place.batch for place in forms} == {4}
    assert {place.name for place in forms} >= {"forward", "wrt_weights"}
