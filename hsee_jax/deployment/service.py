"""The server's answers to the calls of devices: bytes in, checked, and bytes out.

This file knows no network.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Metrics
from hsee_jax.deployment.forms import VERSION, Forms, Kind, forms_of
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.protocol import (
    Closed,
    Mistaken,
    Refusal,
    check_finite,
    check_labels,
    digest,
    named,
    pack,
    size_limit,
    split,
    tree_from,
    unpack,
    with_rows,
)
from hsee_jax.deployment.types import Finished
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.state import Means
from hsee_jax.link.codecs import Message
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.served import describe

_log = logging.getLogger(__name__)
Alive = Callable[[], bool]


class Service:
    """Answers the calls of devices, and refuses what the protocol does not allow.

    Attributes:
      methods: what devices may call.
    """

    def __init__(
        self, experiment: Experiment, mailbox: Mailbox, run: str, *, bound: float
    ) -> None:
        """Prepare the forms of all messages.

        Args:
          experiment: the run.
          mailbox: receives what arrives.
          run: the id of the run.
          bound: the largest absolute value of a feature, after decoding.
        """
        self._decode = jax.jit(experiment.federation.codec.decode, static_argnums=1)
        self._experiment, self._mailbox = experiment, mailbox
        self._run, self._bound = run, bound
        self._drawing, self._first = threading.Lock(), tuple[Branch, ...]()
        self.methods: Mapping[str, Callable[[int, bytes, Alive], bytes]] = {
            "join": self._join,
            "begin": self._begin,
            "next": self._next,
            "push": self._push,
            "finish": self._finish,
            "test": self._test,
            "score": self._score,
        }
        federation, strategy = experiment.federation, experiment.strategy
        self._waits = strategy.waits
        self._private = experiment.config.clients.keep_layers_private
        steps = experiment.learning_rates.shape[1]
        classes = experiment.info.num_classes
        self._forms: dict[int, Forms] = {}
        self._digests: dict[int, int] = {}  # of `_about`, which never changes
        for g, group in enumerate(federation.groups):
            forms = forms_of(federation, strategy, g, steps=steps, classes=classes)
            self._forms |= dict.fromkeys(group.ids, forms)

    @property
    def clients(self) -> int:
        """Return the number of clients."""
        return len(self._forms)

    def samples(self, i: int) -> int:
        """Return how many samples client i has."""
        return len(self._experiment.shards[i])

    def limit(self) -> int:
        """Return the bytes of the largest message of any device."""
        rows, test_rows = self._experiment.batch_size, self._experiment.eval_batch_size
        return max(
            size_limit(form)
            for forms in self._forms.values()
            for form in (
                with_rows(forms.batch, rows),
                with_rows(forms.answers, test_rows),
                forms.metrics | max(forms.layers.values(), key=len),
            )
        )

    def call(self, method: str, i: int, message: bytes, alive: Alive) -> bytes:
        """Answer a call.

        Args:
          method: one of `methods`; any other is refused.
          i: the client that calls, as its certificate says; nothing that it sends can
            change this.
          message: what it sends.
          alive: whether it still waits for the answer.

        Raises:
          Refusal: the message is not allowed; it is logged, and counted but for
            `Mistaken`.
        """
        self._mailbox.refusals.check(i)
        try:
            if i not in self._forms:
                raise Refusal(f"client: {i} is not one of this run")
            if method not in self.methods:
                known = ", ".join(self.methods)
                raise Refusal(f"method: {method} is not one of {known}")
            return self.methods[method](i, message, alive)
        except Closed:
            return pack({"closed": 1})
        except Mistaken as mistake:
            _log.warning("client %d: refused: %s", i, mistake)
            raise
        except Refusal as refusal:
            self._mailbox.refusals.note(i, refusal)
            raise

    def _join(self, i: int, message: bytes, alive: Alive) -> bytes:
        del alive
        fields, _ = split(message, ("samples", "version"))
        dealt = bool(self._experiment.manifest[i].indices)
        for name, allowed in (("version", VERSION), ("samples", self.samples(i))):
            share = name == "samples" and fields[name] == -1 and dealt
            if fields[name] != allowed and not share:
                raise Mistaken(f"{name}: {fields[name]}; allowed is {allowed}")
        return json.dumps(self._about(i)).encode()

    def _about(self, i: int) -> dict[str, Any]:
        """Return what a device is told of the run."""
        return {"run": self._run} | describe(self._experiment, i)

    def _digest(self, i: int) -> int:
        if i not in self._digests:
            self._digests[i] = digest(self._about(i))
        return self._digests[i]

    def _begin(self, i: int, message: bytes, alive: Alive) -> bytes:
        """Return the client's layers before the first round, drawn as in a simulation.

        On the device another program would draw them, and might round differently.
        """
        del alive
        split(message, ())
        _log.info("client %d begins with its first layers", i)
        g, m = self._experiment.federation.seat(i)
        own = row_of(self._first_clients()[g], m)
        return pack({}, named(own, "client"))

    def _first_clients(self) -> tuple[Branch, ...]:
        """Draw all clients once, however many devices begin, and keep them."""
        experiment = self._experiment
        with self._drawing:
            if not self._first:
                state = experiment.store.to_checkpoint(experiment.init())
                self._first = jax.device_get(state.clients)
            return self._first

    def _next(self, i: int, message: bytes, alive: Alive) -> bytes:
        fields, _ = split(message, ("round", "since"))
        task = self._mailbox.task(i, alive)
        own: Means = {n: task.means[n] for n in self._forms[i].means if task.means}
        newest = max((int(mean.round) for mean in own.values()), default=0)
        sent = own if newest > fields["since"] else {}
        if task.kind == Kind.END and not sent:  # with means, it asks once more
            self._mailbox.note_told(i)
        return pack(
            {
                "kind": task.kind,
                "round": task.round,
                "layers": task.layers,
                "last": task.last,
                "means": newest if sent else 0,
                "about": self._digest(i),
            },
            named(sent, "means"),
        )

    def _push(self, i: int, message: bytes, alive: Alive) -> bytes:
        forms, mailbox = self._forms[i], self._mailbox
        batch_limit = size_limit(with_rows(forms.batch, self._experiment.batch_size))
        fields, data = split(message, ("round", "step"), limit=batch_limit)
        number, step = fields["round"], fields["step"]
        rows = mailbox.rows(i, number, step)
        tensors = unpack(data, with_rows(forms.batch, rows))
        check_labels(tensors["labels"], num_classes=self._experiment.info.num_classes)
        self._check_features(tree_from(tensors, forms.message, "inputs"))
        answer = mailbox.put(i, number, step, tensors, waits=self._waits, alive=alive)
        return pack({"closed": 0}, answer)

    def _check_features(self, message: Message) -> None:
        """Refuse a message that decodes to features that are not finite, or too large.

        Small numbers may decode to large ones: int8 codes are multiplied by a step.
        """
        features = np.asarray(self._decode(message, jnp.float32))
        check_finite({"features": features}, bound=self._bound)

    def _finish(self, i: int, message: bytes, alive: Alive) -> bytes:
        del alive
        forms = self._forms[i]
        most = max(size_limit(forms.metrics | form) for form in forms.layers.values())
        fields, data = split(message, ("round", "layers"), limit=most)
        rows, layers = self._mailbox.all_rows(i, fields["round"])
        if fields["layers"] != layers:
            raise Refusal(f"layers: {fields['layers']}; allowed is {layers}")
        tensors = unpack(data, forms.metrics | forms.layers[layers])
        like = Metrics(*(jax.ShapeDtypeStruct((), np.int32),) * 3)  # type: ignore
        metrics = tree_from(tensors, like, "exit")
        _check_metrics(metrics, rows)
        kept = {name: tensors[name] for name in forms.layers[layers]}
        check_finite(kept)
        self._mailbox.put_finish(i, fields["round"], Finished(metrics, kept))
        return pack({"closed": 0})

    def _test(self, i: int, message: bytes, alive: Alive) -> bytes:
        """Return a batch of test inputs, without their labels."""
        del i, alive
        step, test = split(message, ("step",))[0]["step"], self._experiment.test
        size, private = self._experiment.eval_batch_size, self._private
        if not private or not 0 <= step * size < len(test.labels):
            raise Refusal(f"step: {step} has no test inputs")
        inputs = test.images[step * size : (step + 1) * size]
        return pack({}, {"images": np.asarray(inputs)})

    def _score(self, i: int, message: bytes, alive: Alive) -> bytes:
        """Take what a client makes of a batch of test inputs."""
        form, mailbox = self._forms[i].answers, self._mailbox
        limit = size_limit(with_rows(form, self._experiment.eval_batch_size))
        fields, data = split(message, ("round", "step"), limit=limit)
        number, step = fields["round"], fields["step"]
        rows = mailbox.rows(i, number, step, Kind.EVALUATE)
        tensors = unpack(data, with_rows(form, rows))
        self._check_features(tree_from(tensors, self._forms[i].message, "inputs"))
        mailbox.put(
            i, number, step, tensors, waits=False, alive=alive, kind=Kind.EVALUATE
        )
        return pack({"closed": 0})


def _check_metrics(metrics: Metrics, rows: list[int]) -> None:
    """Refuse metrics that no batches of so many rows can have.

    A loss that is NaN says that the device refused a step.
    """
    losses, correct, counts = map(np.asarray, metrics)
    fine = np.isnan(losses) | ((losses >= 0) & np.isfinite(losses))
    if not (
        np.array_equal(counts, rows)
        and np.all((correct >= 0) & (correct <= counts))
        and np.all(fine)
    ):
        raise Refusal("exit: the metrics are not of these batches")
