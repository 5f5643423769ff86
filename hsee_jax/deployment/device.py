"""A device: one client of a run, with its own samples and no others.

It asks the server what to do (``next``), trains a round on batches that it plans from
its own shard, sends a message for each batch (``push``) and at the end what it measured
and the layers that are asked for (``finish``). All calls go from the device to the
server, through a function of bytes; this file knows no network.
"""

import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError, one_line
from hsee_jax.core.types import Dataset
from hsee_jax.deployment.batches import padded
from hsee_jax.deployment.box import Box, DeviceState
from hsee_jax.deployment.forms import VERSION, Kind, Layers, forms_of
from hsee_jax.deployment.protocol import (
    Closed,
    Refusal,
    Tensors,
    digest,
    form_of,
    member,
    named,
    pack,
    size_limit,
    split,
    tree_from,
    unpack,
    with_rows,
)
from hsee_jax.deployment.training import make_programs, train_round
from hsee_jax.runs.participant import Participant, build_participant, check_description

_log = logging.getLogger(__name__)

# (method, message) -> the server's answer
Call = Callable[[str, bytes], bytes]


class Changed(Exception):
    """The server has changed the run since the device joined."""


def join(
    call: Call, samples: int, plugins: tuple[str, ...] = ()
) -> tuple[Any, Participant]:
    """Join a run.

    Args:
      call: calls the server.
      samples: of this device; -1 for its share of the run's dataset.
      plugins: see `build_participant`.

    Returns:
      What the server says of the run, and the `Participant`.

    Raises:
      Refusal: the answer does not describe a run.
      UserError: see `build_participant`.
    """
    answer = call("join", pack({"samples": samples, "version": VERSION}))
    try:
        values = json.loads(answer)
        check_description(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal(f"join: no description of a run: {one_line(error)}") from error
    return values, build_participant(values, plugins)


class Device:
    """Takes part in a run until it ends; it keeps its state in a `Box`.

    Attributes:
      state: of its client.
    """

    def __init__(
        self, part: Participant, data: Dataset, box: Box, call: Call, *, about: int
    ) -> None:
        """Prepare the device, and read where it goes on.

        Args:
          part: the client.
          data: its samples, on the host.
          box: the device's files.
          call: calls the server; raises an error if the server refuses.
          about: the `digest` of what the server said of the run.

        Raises:
          UserError: the files are damaged.
          Refusal: the server sends first layers of another form.
        """
        self._part, self._box, self._call, self._about = part, box, call, about
        self._labels = np.asarray(data.labels, np.int32)
        self._programs = make_programs(part, data)
        steps = part.learning_rates.shape[1]
        self._forms = forms_of(
            part.federation,
            part.strategy,
            0,
            steps=steps,
            classes=part.info.num_classes,
        )
        self.state = self._load()

    def run(self, stop: Callable[[], bool]) -> bool:
        """Take part until the run ends; return False if ``stop`` was true before.

        Raises:
          UserError: see `_go_back`.
          Changed: the device has to join again.
        """
        while not stop():
            kind, number, layers = self._next()
            if kind == Kind.END:
                self._box.save(self.state)
                return True
            with contextlib.suppress(Closed):  # the next answer says what counts
                if kind == Kind.TRAIN:
                    self._take_part(number, layers)
                elif kind == Kind.EVALUATE:
                    self._evaluate(number)
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
            ("kind", "round", "layers", "last", "means", "about"),
            limit=size_limit(form),
        )
        kind, number = member(Kind, fields, "kind"), fields["round"]
        layers = member(Layers, fields, "layers")
        if kind != Kind.END and fields["about"] != self._about:
            raise Changed
        again = kind == Kind.TRAIN and number == state.round and self._stands(number)
        if kind != Kind.WAIT and not again and fields["last"] != state.round:
            behind = kind != Kind.END and number < state.round
            if self._go_back(fields["last"], behind=behind):
                return self._next()
        if fields["means"] > state.since:
            means = tree_from(unpack(data, form), forms.means, "means")
            client = self._programs.receive(state.client, means, np.int32(state.since))
            self.state = DeviceState(client, state.round, fields["means"])
            if kind == Kind.END:
                self._box.save(self.state)
                return self._next()  # so the server knows that its means are here
        return kind, number, layers

    def _stands(self, number: int) -> bool:
        """Return whether the last round was trained with the rates that it has now.

        A server that goes on with other ``--rounds`` changes them.
        """
        limit = size_limit(self._forms.metrics)
        with contextlib.suppress(Refusal):  # another version has written it
            kept = split(self._box.finish(number), ("rates",), limit=limit)
            return kept.fields["rates"] == self._rates(number)
        return False

    def _rates(self, number: int) -> int:
        """Return the `digest` of the learning rates of a round."""
        return digest({"rates": self._part.learning_rates[number - 1].tolist()})

    def _go_back(self, last: int, *, behind: bool) -> bool:
        """Go back to the last round that counts, if the server left out later ones.

        Args:
          last: this round; if it is later than the round of the state, nothing changes.
          behind: whether the server itself is at an earlier round than the device.

        Returns:
          Whether the state has changed.

        Raises:
          UserError: the state after that round is not here any more.
        """
        number = self.state.round
        if last > number:
            _log.warning(
                "the server counts round %d, the state here is of %d", last, number
            )
            return False
        kept = [kept for kept in self._box.rounds() if kept <= last]
        if behind or last != max(kept, default=0):
            raise UserError(
                f"state: for the server, round {last} was the last of this device, and "
                f"the state here is of round {number}; allowed is a server that goes "
                "on with its run, or a new folder"
            )
        self._box.drop(last)
        self.state = self._load()
        return True

    def _take_part(self, number: int, layers: Layers) -> None:
        """Train a round, or send again what was sent of it.

        Raises:
          UserError: the server asks for layers that are private.
        """
        box = self._box
        if self._part.private and layers != Layers.NONE:
            raise UserError(
                "keep_layers_private: the server asks for layers all the same; they "
                "were not sent"
            )
        if number == self.state.round:
            reply = with_rows(self._forms.reply, self._part.batch_size)
            for message in box.messages(number):
                self._answer("push", message, size_limit(reply))
            form = self._forms.metrics
            kept = split(box.finish(number), ("rates",), limit=size_limit(form)).tensors
            self._finish(layers, unpack(kept, form))
            return

        def exchange(step: int, tensors: Tensors) -> Tensors:
            message = pack({"round": number, "step": step}, tensors)
            box.put(number, step, message)
            rows = len(tensors["labels"])
            form = with_rows(self._forms.reply, rows)
            return unpack(self._answer("push", message, size_limit(form)), form)

        client, metrics = train_round(
            self._part,
            self._programs,
            self._labels,
            self.state.client,
            number,
            exchange,
        )
        tensors = named(metrics, "exit")
        box.put(number, None, pack({"rates": self._rates(number)}, tensors))
        self.state = DeviceState(client, number, self.state.since)
        box.save(self.state)
        box.forget(number)
        self._finish(layers, tensors)

    def _finish(self, layers: Layers, metrics: Tensors) -> None:
        """End the last round with its metrics and the layers that are asked for."""
        leaves = named(jax.device_get(self.state.client), "client")
        kept = {name: leaves[name] for name in self._forms.layers[layers]}
        fields = {"round": self.state.round, "layers": layers}
        self._answer("finish", pack(fields, metrics | kept))

    def _evaluate(self, number: int) -> None:
        """Send what the client makes of the server's test inputs."""
        part = self._part
        size = part.test_batch_size
        for step, start in enumerate(range(0, part.test_samples, size)):
            rows = min(size, part.test_samples - start)
            images = padded(self._inputs(step, rows), size)
            mask = np.arange(size) < rows
            answers = self._programs.answer(self.state.client, images, mask)
            message = jax.tree.map(lambda a, n=rows: np.asarray(a)[:n], answers.message)
            logits = np.asarray(answers.logits)[:rows]
            tensors = named(message, "inputs") | {"logits": logits}
            self._answer("score", pack({"round": number, "step": step}, tensors))

    def _inputs(self, step: int, rows: int) -> npt.NDArray:
        """Return a batch of test inputs, which the server sends once."""
        shape = (rows, *self._part.info.input_shape)
        form = {"images": jax.ShapeDtypeStruct(shape, self._part.info.dtype)}

        def fetch() -> bytes:
            answer = self._call("test", pack({"step": step}))
            return split(answer, (), limit=size_limit(form)).tensors

        size = self._part.test_batch_size
        return unpack(self._box.inputs(step, size, fetch), form)["images"]

    def _answer(self, method: str, message: bytes, limit: int = 0) -> bytes:
        """Call the server, and return the tensors of its answer.

        Raises:
          Closed: the round goes on without this device.
        """
        fields, data = split(self._call(method, message), ("closed",), limit=limit)
        if fields["closed"]:
            raise Closed
        return data
