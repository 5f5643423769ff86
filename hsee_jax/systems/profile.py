"""Time the parts of a network on the machine that this runs on.

Every part is a compiled program, called until it is warm. A forward pass is timed by
itself, then both passes with the optimizer's update; their difference is the backward
pass. Whole steps of a client and of a server are timed at every cut as well: they are
one program each, and what a round with a detached boundary consists of.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Array, Batch, Key, PyTree, Stage
from hsee_jax.engine.programs import jit_step
from hsee_jax.federation.branch import Branch, init_client, init_server
from hsee_jax.federation.crossing import decode, encode
from hsee_jax.federation.federation import Client, Federation, group_clients
from hsee_jax.federation.step import branch_step, server_step
from hsee_jax.nn.model import init_network, layer_inputs
from hsee_jax.optim.optimizers import OptimizerLike, as_optimizer
from hsee_jax.systems.costs import model_parts
from hsee_jax.systems.measured import Measured

_log = logging.getLogger(__name__)
_RATE = 1e-4
_LEAST_S = 0.02  # of a timed loop


class Timing(NamedTuple):
    """Seconds of a call."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Return the range, relative to the median."""
        return (self.high - self.low) / self.median


class Profile(NamedTuple):
    """The times of a network on a machine."""

    batch_size: int
    parts: tuple[str, ...]  # L layers, L exits and the final head
    forward: tuple[Timing, ...]  # 2 L + 1
    both: tuple[Timing, ...]  # 2 L + 1: forward, backward and update
    client_step: tuple[Timing, ...]  # L
    server_step: tuple[Timing, ...]  # L

    def measured(self) -> Measured:
        """Return the medians as a device's measured seconds."""
        pairs = zip(self.both, self.forward, strict=True)
        return Measured(
            self.batch_size,
            self.parts,
            forward_s=_medians(self.forward),
            backward_s=tuple(max(b.median - f.median, 0.0) for b, f in pairs),
            client_step_s=_medians(self.client_step),
            server_step_s=_medians(self.server_step),
        )

    def spread(self) -> float:
        """Return the widest range of whole steps, relative to their median."""
        return max(timing.spread for timing in (*self.client_step, *self.server_step))


def _medians(timings: tuple[Timing, ...]) -> tuple[float, ...]:
    return tuple(timing.median for timing in timings)


def time_call(call: Callable[[], Any], repeats: int) -> Timing:
    """Time a call that is compiled already, ``repeats`` times.

    Short calls are timed in loops of at least 0.02 seconds.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, round(_LEAST_S / max(time.perf_counter() - start, 1e-9)))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / count)
    return Timing(float(np.median(seconds)), min(seconds), max(seconds))


def profile(federation: Federation, batch_size: int, *, repeats: int = 5) -> Profile:
    """Time every layer and head, and whole steps at every cut.

    Args:
      federation: gives the network, the optimizer and the codec; its clients do not
        matter.
      batch_size: samples in a batch.
      repeats: timed calls of each program; medians count.
    """
    known: dict[Any, tuple[Timing, Timing]] = {}
    names, times = [], []
    for number, (name, stage, shape) in enumerate(model_parts(federation.model)):
        names.append(name)
        place = stage, shape.shape, shape.dtype, number == 0
        if place not in known:
            _log.info("compiling and timing %s", name)
            data = _noise(shape, batch_size)
            known[place] = _time_part(
                stage, federation.optimizer, data, repeats, first=number == 0
            )
        times.append(known[place])
    forward, both = zip(*times, strict=True)
    cuts = range(1, len(federation.model.stages) + 1)
    steps = [_time_steps(federation, cut, batch_size, repeats) for cut in cuts]
    client, server = zip(*steps, strict=True)
    return Profile(batch_size, tuple(names), forward, both, client, server)


def _noise(shape: jax.ShapeDtypeStruct, batch_size: int) -> Array:
    draw = np.random.default_rng(0).standard_normal((batch_size, *shape.shape[1:]))
    return jnp.asarray(draw, shape.dtype)


def _time_part(
    stage: Stage, optimizer: OptimizerLike, inputs: Array, repeats: int, *, first: bool
) -> tuple[Timing, Timing]:
    """Time a part forward, and forward and backward with its update.

    The first layer computes no gradient with respect to its inputs.
    """
    update = as_optimizer(optimizer).update
    mask = jnp.ones(len(inputs), bool)
    variables = jax.jit(stage.init)(jax.random.key(0), inputs[:1])
    stats = variables["batch_stats"]

    def run(params: PyTree, inputs: Array) -> tuple[Array, PyTree]:
        return stage.apply(
            {"params": params, "batch_stats": stats}, inputs, mask, train=True
        )

    @jit_step
    def both(params: PyTree, state: PyTree, inputs: Array) -> PyTree:
        def moving(params: PyTree, *rest: Array) -> tuple[Array, PyTree]:
            return run(params, *(rest or (inputs,)))

        given = (params,) if first else (params, inputs)
        outputs, pullback, new = jax.vjp(moving, *given, has_aux=True)
        grads, *rest = pullback(jnp.ones_like(outputs))
        updates, state = update(grads, state, params, learning_rate=jnp.float32(_RATE))
        params = jax.tree.map(lambda p, u: p + _RATE * u, params, updates)
        # Without the outputs XLA would leave out what the gradient does not need.
        return outputs, params, state, new, rest

    forward = jit_step(run)
    params = variables["params"]
    state = jax.jit(as_optimizer(optimizer).init)(params)
    return (
        time_call(lambda: forward(params, inputs), repeats),
        time_call(lambda: both(params, state, inputs), repeats),
    )


def _time_steps(
    federation: Federation, cut: int, batch_size: int, repeats: int
) -> tuple[Timing, Timing]:
    """Time whole steps of a client of a cut, and of the server behind it."""
    _log.info("compiling and timing the steps of cut %s", cut)
    groups = group_clients([Client(0, cut)])
    client_spec, server_spec = federation._replace(groups=groups).specs(0)
    shapes = layer_inputs(federation.model)
    batch = Batch(
        _noise(shapes[0], batch_size),
        jnp.zeros(batch_size, jnp.int32),
        jnp.ones(batch_size, bool),
    )

    @jax.jit
    def init(key: Key) -> tuple[Branch, Branch]:
        network = init_network(federation.model, key)
        link = federation.codec.init(shapes[cut])
        optimizer = federation.optimizer
        return (
            init_client(network, cut, optimizer, link, federation.exits),
            init_server(network, cut, optimizer),
        )

    @partial(jit_step, donate_argnums=0)
    def client_step(client: Branch, batch: Batch) -> tuple[Branch, Any, Any]:
        client, features, metrics = branch_step(
            client_spec, client, batch, jnp.float32(_RATE)
        )
        message, client = encode(client_spec, client, features, batch.mask)
        return client, message, metrics

    @partial(jit_step, donate_argnums=0)
    def step_of_server(server: Branch, batch: Batch) -> tuple[Branch, Any]:
        decoded = batch._replace(inputs=decode(server_spec, batch.inputs))
        result = server_step(server_spec, server, decoded, jnp.float32(_RATE))
        return result.server, result.metrics

    client, server = init(jax.random.key(0))
    client, message, _ = client_step(client, batch)
    sent = batch._replace(inputs=message)
    return (
        time_call(_chain(client_step, client, batch), repeats),
        time_call(_chain(step_of_server, server, sent), repeats),
    )


def _chain(step: Callable, branch: Branch, batch: Batch) -> Callable[[], Any]:
    """Return a function; each call continues from the state that the last one left."""

    def call() -> Any:
        nonlocal branch
        branch, *_ = step(branch, batch)
        return branch

    return call
