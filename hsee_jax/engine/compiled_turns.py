"""The turns of a simulation: compiled once for each cut, several at the same time."""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import numpy as np

from hsee_jax.core.types import Batch, ExitMetrics, Key, Metrics
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.programs import (
    batch_program,
    compile_together,
    jit_step,
    send_program,
    serve_program,
)
from hsee_jax.engine.round import Programs
from hsee_jax.engine.streams import Streams
from hsee_jax.engine.turns import Begin, Inputs, Turns
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy

_AHEAD = 2  # times the streams: the batches that wait for a shared server, at most


def by_turns(
    strategy: Strategy,
    pipeline: InputPipeline,
    key: Key,
    programs: Programs,
    threads: int,
) -> Begin:
    """Make steps that take the turns of a simulation.

    Turns with servers of their own run side by side. Turns with a shared server keep
    their order, but a client that waits for no reply runs beside the server, which is
    behind it by a few batches.

    Args:
      strategy: the algorithm.
      pipeline: makes batches of samples.
      key: the root of the augmentation's randomness.
      programs: the compiled programs, to use and to add to.
      threads: where the programs are called, side by side; a round has its own.
    """
    halved = strategy.halves is not None and not strategy.waits
    make_batch = programs.setdefault("batch", batch_program(pipeline))
    turns = _Halves if halved else _Whole
    return partial(turns, strategy, make_batch, key, programs, threads)


class _Compiled(Turns):
    """Turns whose programs are compiled before the first of them.

    Attributes:
      parts: the names of the programs of a group.
    """

    parts: tuple[str, ...]

    def __init__(
        self,
        strategy: Strategy,
        make_batch: Callable[..., Batch],
        key: Key,
        programs: Programs,
        threads: int,
        inputs: Inputs,
    ) -> None:
        super().__init__(strategy, inputs)
        self._make_batch, self._key = make_batch, key
        self._programs, self._streams = programs, Streams(threads)
        rows = inputs.plan.indices.shape[-1]
        self._shapes = rows, *((leaf.shape, leaf.dtype) for leaf in inputs.data)

    def load(self, state: RunState) -> None:
        """See `Steps`; compile the programs of all groups at once."""
        super().load(state)
        new = [
            (g, n)
            for g, n in self._first_slots().items()
            if self._name(self.parts[0], g) not in self._programs
        ]
        names = [self._name(part, g) for g, _ in new for part in self.parts]
        compiled = compile_together(p for g, n in new for p in self._lower(g, n))
        self._programs.update(zip(names, compiled, strict=True))

    def _first_slots(self) -> dict[int, int]:
        """Return the first slot of each group with a client that takes part."""
        active = np.flatnonzero(self.inputs.plan.active).tolist()
        return {self.groups[n]: n for n in reversed(active)}

    def _batch(self, step: int, n: int) -> Batch:
        """Make the batch of slot ``n``."""
        return self._make_batch(*self._batch_arguments(step, n))

    def _batch_arguments(self, step: int, n: int) -> tuple[Any, ...]:
        """Return the arguments of `client_batch` that follow the pipeline."""
        inputs, plan = self.inputs, self.inputs.plan
        number = np.int32(inputs.first + step)
        rows = plan.indices[step, n], plan.mask[step, n]
        return self._key, plan.ids[n], number, inputs.data, *rows

    def _lower(self, group: int, n: int) -> Iterator[jax.stages.Lowered]:
        """Lower the programs of a group, for the arguments of slot ``n``."""
        raise NotImplementedError

    def _program(self, part: str, n: int) -> Callable:
        return self._programs[self._name(part, self.groups[n])]

    def _name(self, part: str, group: int) -> Hashable:
        kinds = self._strategy.turn_kinds
        return part, kinds[group] if kinds else group, self._shapes


class _Whole(_Compiled):
    """Turns as one program of both sides: a client may wait for its server."""

    parts = ("turn",)

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """See `Turns`."""
        return self._streams.submit(self.server_of(n), self._turn, step, n)

    def _turn(self, step: int, n: int) -> ExitMetrics:
        s, rate = self.server_of(n), self.inputs.rates[step]
        self.clients[n], self.servers[s], metrics = self._program("turn", n)(
            self.clients[n], self.servers[s], self._batch(step, n), rate
        )
        return metrics

    def _lower(self, group: int, n: int) -> Iterator[jax.stages.Lowered]:
        assert self._strategy.turn is not None
        turn = jit_step(
            self._strategy.turn, static_argnames="group", donate_argnums=(0, 1)
        )
        both = self.clients[n], self.servers[self.server_of(n)]
        batch = jax.eval_shape(self._make_batch, *self._batch_arguments(0, n))
        yield turn.lower(*both, batch, self.inputs.rates[0], group=group)


class _Halves(_Compiled):
    """Turns as a program of the client and one of the server, as devices take them."""

    parts = "send", "serve"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._served: deque[Future] = deque(maxlen=_AHEAD * self._streams.count)

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """See `Turns`; a client sends only a few batches before they are served."""
        if not self._strategy.shared:
            return self._streams.submit(n, self._turn, step, n)
        full = len(self._served) == self._served.maxlen
        earlier = self._served[0] if full else None
        sent = self._streams.submit_beside_first(n, self._send_after, earlier, step, n)
        served = self._streams.submit(0, lambda: self._serve(step, n, *sent.result()))
        self._served.append(served)
        return served

    def _send_after(
        self, earlier: Future | None, step: int, n: int
    ) -> tuple[Batch, Metrics]:
        """Send once the server has taken an earlier batch."""
        if earlier is not None:
            earlier.result()
        return self._send(step, n)

    def _turn(self, step: int, n: int) -> ExitMetrics:
        return self._serve(step, n, *self._send(step, n))

    def _send(self, step: int, n: int) -> tuple[Batch, Metrics]:
        batch, rate = self._batch(step, n), self.inputs.rates[step]
        sent = self._program("send", n)(self.clients[n], batch, rate)
        self.clients[n] = sent.client
        return batch._replace(inputs=sent.message), sent.metrics

    def _serve(
        self, step: int, n: int, batch: Batch, exit_metrics: Metrics
    ) -> ExitMetrics:
        s, rate = self.server_of(n), self.inputs.rates[step]
        served = self._program("serve", n)(self.servers[s], batch, rate)
        self.servers[s] = served.server
        return ExitMetrics(exit_metrics, served.metrics, served.link)

    def _lower(self, group: int, n: int) -> Iterator[jax.stages.Lowered]:
        client, server = self.clients[n], self.servers[self.server_of(n)]
        halves, rate = self._strategy.halves, self.inputs.rates[0]
        assert halves is not None
        batch = jax.eval_shape(self._make_batch, *self._batch_arguments(0, n))
        sent = send_program(halves).lower(client, batch, rate, group=group)
        yield sent
        message = batch._replace(inputs=sent.out_info.message)
        yield serve_program(halves).lower(server, message, rate, group=group)
