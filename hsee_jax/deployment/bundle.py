"""One message a device and round, for engines in which a server asks devices.

The server sends its answers to ``join``, ``begin`` and ``next`` in advance. The device
trains the round and returns all calls that it makes meanwhile; the server then handles
them as if they arrived one by one. Nothing can come back within a round, so the
boundary must be detached, and exits cannot learn from the server's logits.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hsee_jax.core.errors import UserError
from hsee_jax.deployment.forms import VERSION, Kind
from hsee_jax.deployment.protocol import Refusal, pack
from hsee_jax.deployment.service import Alive, Service
from hsee_jax.deployment.take_part import take_part
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.folder import sole_writer

Parts = dict[str, bytes]  # of a message, by name
Answers = Parts  # of a server, by method
Calls = list[tuple[str, bytes]]  # of a device, in order: method and message

_ASKED = ("join", "begin", "next")  # the server answers these in advance
_TOLD = ("join", "push", "finish")  # the server takes these from a device
_DIGITS = 8  # of the number of a call
_FAREWELL_S = 60.0  # for devices to answer that they know of the end of the run


class Ask(Protocol):
    """Sends answers to a device, and returns its calls."""

    def __call__(self, i: int, answers: Answers, alive: Alive) -> Calls | None:
        """Ask client i, and wait as long as ``alive`` is true.

        The engine knows who the client is; nothing that it returns can change this.

        Returns:
          The calls; None if there was no answer, and the client may be asked again.
        """


class _Unanswered(Exception):
    """The device calls for something that the server has not answered in advance."""


def take_turn(
    answers: Answers,
    state: Path,
    data: Path | None = None,
    plugins: Sequence[str] = (),
    *,
    data_dir: str | None = None,
) -> Calls:
    """Do on a device what its server asks, and return the calls that the device makes.

    A device that is asked for its last round again returns the same calls, and does not
    train again.

    Args:
      answers: of the server; without ``begin``, a device without a state calls for it.
      state: see `take_part`, like the others.
      data: the file of its samples; None for its share of the run's dataset.
      plugins: modules that the run may need.
      data_dir: the folder of that dataset.

    Raises:
      UserError: see `take_part`, or another process is using the folder.
    """
    calls: Calls = []

    def call(method: str, message: bytes) -> bytes:
        if method not in answers or method == "join":
            calls.append((method, message))
        if method not in _ASKED:
            return pack({"closed": 0})
        if method not in answers:
            raise _Unanswered
        return answers[method]

    def done() -> bool:
        return calls[-1][0] == "finish"

    with contextlib.suppress(_Unanswered), sole_writer(state, "state"):
        take_part(call, state, data, plugins, done, data_dir=data_dir)
    return calls


def parts_of(calls: Calls) -> Parts:
    """Return calls as parts whose names keep the order."""
    return {f"{n:0{_DIGITS}} {method}": data for n, (method, data) in enumerate(calls)}


def calls_of(parts: Mapping[str, bytes]) -> Calls:
    """Return the calls in parts; the inverse of `parts_of`."""
    return [(name[_DIGITS + 1 :], parts[name]) for name in sorted(parts)]


def check_detached(experiment: Experiment) -> None:
    """Refuse a run whose devices need an answer within a round.

    Raises:
      UserError: the run is not allowed, for one of these reasons.
    """
    boundary = experiment.strategy.boundary
    if boundary != "detached":
        raise UserError(
            f"boundary: {boundary} is not allowed with one message a round; allowed is "
            "detached, or `hsee serve`"
        )
    if experiment.strategy.distill:
        raise UserError(
            f"distill: {experiment.strategy.distill} is not allowed with one message a "
            "round; allowed is 0, or `hsee serve`"
        )
    if experiment.config.clients.keep_layers_private:
        raise UserError(
            "keep_layers_private: true is not allowed with one message a round; "
            "allowed is false, or `hsee serve`"
        )


class Courier:
    """Carries messages between a `Service` and devices that only answer."""

    def __init__(self, ask: Ask) -> None:
        """Keep the doors closed.

        Args:
          ask: asks a client; it is called in one thread for each client.
        """
        self._ask = ask
        self._closed, self._over = threading.Event(), threading.Event()
        self._failures: list[Exception] = []

    def check(self) -> None:
        """Refuse to go on if asking has failed.

        Raises:
          Exception: the first failure.
        """
        if self._failures:
            raise self._failures[0]

    @contextlib.contextmanager
    def doors(self, service: Service) -> Iterator[None]:
        """Ask all clients of a run; at its end, wait until they know of it."""
        threads = [
            threading.Thread(target=self._attend, args=[service, i], daemon=True)
            for i in range(service.clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._closed.set()
            end = time.monotonic() + _FAREWELL_S
            for thread in threads:
                thread.join(max(0, end - time.monotonic()))
            self._over.set()

    def _attend(self, service: Service, i: int) -> None:
        """Carry the messages of a client until the run ends."""
        try:
            self._carry(service, i)
        except Refusal:  # the client is left out
            return
        except Exception as error:
            self._failures.append(error)

    def _carry(self, service: Service, i: int) -> None:
        hello = pack({"samples": service.samples(i), "version": VERSION})
        asks = pack({"round": 0, "since": 0})  # for all means that there are
        run = service.call("join", i, hello, self._alive)
        lost: bool | None = None  # whether the device has no state; None if not known
        while self._alive():
            task = service.call("next", i, asks, self._alive)
            kind, last, means = (_fields(task)[n] for n in ("kind", "last", "means"))
            if kind == Kind.WAIT:
                continue
            answers = {"join": run, "next": task}
            if last == 0 if lost is None else lost:
                answers["begin"] = service.call("begin", i, pack({}), self._alive)
            alive = self._awaited if kind == Kind.END else self._alive
            calls = self._ask(i, answers, alive)
            if calls is None:
                continue
            lost = any(method == "begin" for method, _ in calls)
            if kind == Kind.END and not lost:
                knows = pack({"round": last, "since": means})
                service.call("next", i, knows, self._alive)
                return
            with contextlib.suppress(Refusal):  # the client is asked again
                self._replay(service, i, calls)

    def _replay(self, service: Service, i: int, calls: Calls) -> None:
        """Answer the calls of a device, until the round goes on without it."""
        for method, message in calls:
            if method == "begin":
                return
            known = method if method in _TOLD else "?"
            answer = service.call(known, i, message, self._alive)
            if _fields(answer).get("closed"):
                return

    def _alive(self) -> bool:
        return not self._closed.is_set()

    def _awaited(self) -> bool:
        return not self._over.is_set()


def _fields(answer: bytes) -> dict[str, Any]:
    """Return the fields of an answer."""
    return json.loads(answer.partition(b"\n")[0])
