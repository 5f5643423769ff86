"""A device: one client of a run, with its own samples and no others.

It asks the server what to do (``next``), trains a round on batches that it plans from
its own shard, sends a message for each batch (``push``) and at the end what it measured
and the layers that are asked for (``finish``). All calls go from the device to the
server, through a function of bytes; this file knows no network.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array, Dataset, Metrics
from hsee_jax.deployment.box import Box, DeviceState
from hsee_jax.deployment.forms import VERSION, Kind, Layers, forms_of
from hsee_jax.deployment.protocol import (
    Closed,
    Tensors,
    form_of,
    named,
    pack,
    size_limit,
    split,
    tree_from,
    unpack,
    with_rows,
)
from hsee_jax.engine.plan import own_batches
from hsee_jax.engine.round import step_key
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.state import Means, RunState
from hsee_jax.federation.strategy import Sent
from hsee_jax.runs.participant import Participant, build_participant

# (method, message) -> the server's answer
Call = Callable[[str, bytes], bytes]


class Exchange(Protocol):
    """Sends the message of a step."""

    def __call__(self, step: int, tensors: Tensors) -> npt.NDArray | None:
        """Return the gradient of the features that comes back, ``[rows, ...]``.

        Args:
          step: the step of the round, from 0.
          tensors: of the message, without padding.

        Returns:
          The gradient; None with a detached boundary.
        """


class Programs(NamedTuple):
    """A client's part of a run, compiled."""

    # client, (rows, mask), step in the run, learning rate
    send: Callable[[Branch, tuple[Any, Any], Any, Any], Sent]
    # client, what `Halves.finish` needs, gradient, learning rate
    finish: Callable[[Branch, Any, Any, Any], tuple[Branch, Metrics]]
    # client, means, the round of the last means that it received
    receive: Callable[[Branch, Means, Any], Branch]


def join(
    call: Call, samples: int, plugins: tuple[str, ...] = ()
) -> tuple[Any, Participant]:
    """Join a run.

    Args:
      call: calls the server.
      samples: how many this device has; -1 for its share of the run's dataset.
      plugins: see `build_participant`.

    Returns:
      What the server says of the run, and the `Participant`.
    """
    answer = call("join", pack({"samples": samples, "version": VERSION}))
    values = json.loads(answer)
    return values, build_participant(values, plugins)


def make_programs(part: Participant, data: Dataset) -> Programs:
    """Compile a client's part of a run.

    Args:
      part: the client.
      data: its samples, on the host.
    """
    here = jax.device_put(data)
    who = np.int32(part.client)
    halves, strategy = part.halves, part.strategy

    @jax.jit
    def send(
        client: Branch, data: Dataset, rows: Any, who: Array, step: Array, rate: Array
    ) -> Sent:
        key = step_key(part.augment_key, who, step)
        batch = part.pipeline.training(key, data, *rows)
        return halves.send(client, batch, rate, group=0)

    @jax.jit
    def receive(client: Branch, means: Means, since: Array) -> Branch:
        stack = jax.tree.map(lambda leaf: leaf[None], client)
        state = RunState(since, (stack,), ())
        return _member(strategy.receive(state, means, (since[None],)).clients[0])

    finish = partial(halves.finish, group=0) if halves.finish else _no_finish
    return Programs(
        send=lambda client, rows, step, rate: send(client, here, rows, who, step, rate),
        finish=jax.jit(finish),
        receive=receive,
    )


def train_round(
    part: Participant,
    programs: Programs,
    labels: npt.NDArray[np.int32],
    client: Branch,
    number: int,
    exchange: Exchange,
) -> tuple[Branch, Metrics]:
    """Train the client's part of a round.

    Args:
      part: the client.
      programs: see `make_programs`.
      labels: of its samples, ``int32 [M]``.
      client: its state before the round.
      number: the number of the round, from 1.
      exchange: sends the message of a step.

    Returns:
      The state after the round, and the metrics of the exit in each step, ``[T]``.
    """
    rates = part.learning_rates[number - 1]
    steps = len(rates)
    indices, mask = own_batches(
        np.arange(len(labels), dtype=np.int32),
        (steps, part.batch_size),
        seed=part.seed,
        client=part.client,
        number=number - 1,
    )
    columns: Any = (np.zeros(steps, d) for d in (np.float32, np.int32, np.int32))
    metrics: Any = Metrics(*columns)
    for t in range(steps):
        rows = int(mask[t].sum())
        if rows == 0:
            continue
        step = np.int32((number - 1) * steps + t)
        sent = programs.send(client, (indices[t], mask[t]), step, rates[t])
        message = jax.tree.map(lambda a, n=rows: np.asarray(a)[:n], sent.message)
        tensors = named(message, "inputs") | {"labels": labels[indices[t][:rows]]}
        gradient = exchange(t, tensors)
        client, own = sent.client, sent.metrics
        if sent.passed is not None:
            assert gradient is not None
            padded = _padded(gradient, part.batch_size)
            client, own = programs.finish(client, sent.passed, padded, rates[t])
        for total, value in zip(metrics, own, strict=True):
            total[t] = value
    return client, metrics


class Device:
    """Takes part in a run until it ends; it keeps its state in a `Box`.

    Attributes:
      state: of its client.
    """

    def __init__(self, part: Participant, data: Dataset, box: Box, call: Call) -> None:
        """Prepare the device, and read where it goes on.

        Args:
          part: the client.
          data: its samples, on the host.
          box: the device's files.
          call: calls the server; raises `Refusal` if it refuses what it got.

        Raises:
          UserError: the files are damaged.
        """
        self._part, self._box, self._call = part, box, call
        self._labels = np.asarray(data.labels, np.int32)
        self._programs = make_programs(part, data)
        steps = part.learning_rates.shape[1]
        self._forms = forms_of(part.federation, part.strategy, 0, steps=steps)
        self.state = self._load()

    def run(self, stop: Callable[[], bool]) -> bool:
        """Take part until the run ends; return False if ``stop`` was true before.

        Raises:
          UserError: the server asks for what this device no longer has.
        """
        while not stop():
            kind, number, layers = self._next()
            if kind == Kind.END:
                self._box.save(self.state)
                return True
            if kind == Kind.TRAIN:
                try:
                    self._take_part(number, layers)
                except Closed:  # the next answer says what counts
                    continue
        return False

    def _load(self) -> DeviceState:
        rounds = self._box.rounds()
        if not rounds:
            form = self._forms.layers[Layers.ALL]
            answer = self._call("begin", pack({}))
            _, data = split(answer, (), limit=size_limit(form))
            client = tree_from(unpack(data, form), self._forms.client, "client")
            return DeviceState(jax.device_put(client), 0, 0)
        return self._box.load(self._forms.client, rounds[-1])

    def _next(self) -> tuple[Kind, int, Layers]:
        """Ask what to do, and receive the means that come with the answer."""
        state, forms = self.state, self._forms
        form = form_of(forms.means, "means")
        fields, data = split(
            self._call("next", pack({"round": state.round, "since": state.since})),
            ("kind", "round", "layers", "last", "means"),
            limit=size_limit(form),
        )
        kind, number = Kind(fields["kind"]), fields["round"]
        again = kind == Kind.TRAIN and number == state.round
        if fields["last"] < state.round and kind != Kind.WAIT and not again:
            self._box.drop(fields["last"])
            self.state = self._load()
            return self._next()
        if fields["means"] > state.since:
            means = tree_from(unpack(data, form), forms.means, "means")
            client = self._programs.receive(state.client, means, np.int32(state.since))
            self.state = DeviceState(client, state.round, fields["means"])
        return kind, number, Layers(fields["layers"])

    def _take_part(self, number: int, layers: Layers) -> None:
        """Train a round, or answer again with what it was answered with."""
        box = self._box
        if number < self.state.round:
            raise UserError(
                f"state: the server is at round {number}, and this device has trained "
                f"round {self.state.round}; allowed is a server that goes on with its "
                "run, or a new folder"
            )
        if number == self.state.round:
            for message in box.messages(number):
                self._answer("push", message)
            self._answer("finish", box.finish(number))
            return

        def exchange(step: int, tensors: Tensors) -> npt.NDArray | None:
            message = pack({"round": number, "step": step}, tensors)
            box.put(number, step, message)
            rows = len(tensors["labels"])
            form = with_rows(self._forms.gradient, rows)
            found = unpack(self._answer("push", message, size_limit(form)), form)
            return found.get("gradient")

        client, metrics = train_round(
            self._part,
            self._programs,
            self._labels,
            self.state.client,
            number,
            exchange,
        )
        leaves = named(jax.device_get(client), "client")
        kept = {name: leaves[name] for name in self._forms.layers[layers]}
        fields = {"round": number, "layers": layers}
        message = pack(fields, named(metrics, "exit") | kept)
        box.put(number, None, message)
        self.state = DeviceState(client, number, self.state.since)
        box.save(self.state)
        box.forget(number)
        self._answer("finish", message)

    def _answer(self, method: str, message: bytes, limit: int = 0) -> bytes:
        """Call the server, and return the tensors of its answer.

        Raises:
          Closed: the round goes on without this device.
        """
        fields, data = split(self._call(method, message), ("closed",), limit=limit)
        if fields["closed"]:
            raise Closed
        return data


def _member(stack: Branch) -> Branch:
    return jax.tree.map(lambda leaf: leaf[0], stack)


def _padded(rows: npt.NDArray, count: int) -> npt.NDArray:
    """Return rows followed by zeros, ``[count, ...]``."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _no_finish(*_: Any) -> Any:
    raise AssertionError("a detached boundary has nothing to finish")
