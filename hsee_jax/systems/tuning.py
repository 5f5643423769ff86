"""Measure which form of each convolution makes a training step fastest here.

Every pass of every shape is timed alone first, in all forms that it can take. Forms
that are close to the fastest are then timed inside a whole step of the network, since
what is fastest alone need not be fastest there.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Array, Batch
from hsee_jax.engine.programs import jit_step
from hsee_jax.federation.branch import init_server, server_spec
from hsee_jax.federation.step import branch_step
from hsee_jax.nn.convolution import pass_of
from hsee_jax.nn.convolution_choice import (
    Choice,
    FormTable,
    Place,
    choice_of,
    forms_of,
)
from hsee_jax.nn.model import Model, init_network, layer_inputs
from hsee_jax.optim.optimizers import OptimizerLike
from hsee_jax.systems.profile import time_call

_log = logging.getLogger(__name__)
_CLOSE = 1.5  # times the fastest, alone
_SHARE = 0.02  # of all passes alone; what takes less is not tried in the step
_GAIN = 0.98  # a form wins if the step takes less than this share of its time before
_RATE = 1e-4
Call = Callable[[], Any]
Alone = Mapping[Place, Mapping[str, float]]  # seconds of each pass in each form


class Tuning(NamedTuple):
    """The fastest forms, and the seconds of a step with them and with others."""

    forms: dict[Place, str]
    native_s: float  # with native convolutions
    default_s: float  # with the form that `auto` takes where nothing was measured
    tuned_s: float


class _Recorder:
    """A choice that takes native convolutions, and keeps the places asked for."""

    def __init__(self) -> None:
        self.places: dict[Place, None] = {}

    def __call__(self, place: Place) -> str:
        self.places[place] = None
        return "grouped"


def tune(
    make_model: Callable[[str | Choice], Model],
    optimizer: OptimizerLike,
    batch_size: int,
    *,
    other: str,
    stack: int = 0,
    repeats: int = 5,
) -> tuple[Alone, Tuning]:
    """Find the fastest form of each convolution of a network.

    Args:
      make_model: makes the network with a choice of forms.
      optimizer: the optimizer of the step.
      batch_size: samples in a step of a client.
      other: the name of the form that ``auto`` takes where nothing was measured.
      stack: the clients whose steps run at once, or 0 for steps one after another.
      repeats: timed calls of each program; medians count.

    Returns:
      The seconds of each pass alone, in each form, and the result of `search`.
    """
    recorder = _Recorder()
    step, *shapes = _program(make_model(recorder), optimizer, batch_size, stack)
    jax.eval_shape(step, *shapes)
    alone = {
        place: _time_alone(place, repeats)
        for place in recorder.places
        if (place.batch, place.stack) == (batch_size, stack)  # else of initialization
    }
    # Every call starts from the same state, of small constants; forms do not change it.
    arguments = jax.tree.map(lambda a: jnp.full(a.shape, 0.01, a.dtype), shapes)
    compiled: dict[str | Choice, Call] = {}

    def step_seconds(choices: Sequence[str | Choice]) -> list[float]:
        for choice in choices:
            if choice not in compiled:
                step, *_ = _program(make_model(choice), optimizer, batch_size, stack)
                program = jit_step(step).lower(*arguments).compile()
                compiled[choice] = partial(program, *arguments)
        return _in_turns([compiled[choice] for choice in choices], repeats)

    return alone, search(alone, other, step_seconds)


def search(
    alone: Alone, other: str, step_seconds: Callable[[Sequence[str | Choice]], Any]
) -> Tuning:
    """Begin with the forms that are fastest alone, and change one place at a time.

    Args:
      alone: seconds of each pass in each form.
      other: see `tune`.
      step_seconds: times steps with choices of forms, all in turns, and returns the
        seconds of each.

    Returns:
      The forms of the fastest step, which are those of native convolutions or of
      ``other`` if these are as fast.
    """
    forms = {place: min(s, key=s.__getitem__) for place, s in alone.items()}
    for place, form in _attempts(alone, forms):
        tried = forms | {place: form}
        before, after = step_seconds([_choice(forms, other), _choice(tried, other)])
        _log.info("%s, %s: %.3f of the step's time", place, form, after / before)
        if after < _GAIN * before:
            forms = tried
    choices = "grouped", other, _choice(forms, other)
    native_s, default_s, tuned_s = step_seconds(choices)
    if tuned_s >= min(native_s, default_s):
        default = choice_of("grouped" if native_s <= default_s else other)
        forms, tuned_s = {p: default(p) for p in alone}, min(native_s, default_s)
        for place in forms:  # a form that was not timed is the native one there
            if forms[place] not in alone[place]:
                forms[place] = "grouped"
    return Tuning(forms, native_s, default_s, tuned_s)


def _choice(forms: Mapping[Place, str], other: str) -> FormTable:
    return FormTable(tuple(forms.items()), other)


def _attempts(alone: Alone, fastest: Mapping[Place, str]) -> list[tuple[Place, str]]:
    """Return what to try in the step, the passes that take longest first."""
    total = sum(times[fastest[place]] for place, times in alone.items())
    tried = [
        (times[fastest[place]], place, form)
        for place, times in alone.items()
        for form in sorted(times, key=times.__getitem__)
        if form != fastest[place]
        and times[form] < _CLOSE * times[fastest[place]]
        and times[fastest[place]] > _SHARE * total
    ]
    return [(place, form) for _, place, form in sorted(tried, key=lambda t: -t[0])]


def _time_alone(place: Place, repeats: int) -> dict[str, float]:
    """Time a pass in each form, in seconds."""
    rng = np.random.default_rng(0)
    leading = (place.stack,) if place.stack else ()
    arrays = [
        jnp.asarray(rng.standard_normal((*leading, *shape)), place.dtype)
        for shape in place.shapes()
    ]
    times = {}
    for form in forms_of(place, jax.default_backend()):
        program = jit_step(pass_of(place, form)).lower(*arrays).compile()
        times[form] = time_call(partial(program, *arrays), repeats).median
    _log.info("%s, ms alone: %s", place, _ms(times))
    return times


def _program(
    model: Model, optimizer: OptimizerLike, batch_size: int, stack: int
) -> tuple[Callable, Any, Array]:
    """Return a training step of the whole network, its state and its images."""
    spec, shape = server_spec(model, 0, optimizer), layer_inputs(model)[0]

    def init(key: Array) -> Any:
        return init_server(init_network(model, key), 0, optimizer)

    def step(branch: Any, images: Array) -> Any:
        rows = len(images)
        batch = Batch(images, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))
        return branch_step(spec, branch, batch, jnp.float32(_RATE))[0]

    images: Any = jax.ShapeDtypeStruct((batch_size, *shape.shape[1:]), shape.dtype)
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    if stack:
        step, init = jax.vmap(step), jax.vmap(init)
        images = jax.ShapeDtypeStruct((stack, *images.shape), images.dtype)
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), stack))
    return step, jax.eval_shape(init, key), images


def _in_turns(calls: Sequence[Call], repeats: int) -> list[float]:
    """Time calls in turns, so that a noisy machine disturbs all alike."""
    for call in calls:
        jax.block_until_ready(call())
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
    return [float(np.median(seconds)) for seconds in times]


def _ms(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * s:.2f}" for name, s in seconds.items())
