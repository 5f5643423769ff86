"""The turns of a simulation: compiled once for each cut, several at the same time."""

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


def by_turns(
    strategy: Strategy,
    pipeline: InputPipeline,
    key: Key,
    programs: Programs,
    streams: Streams,
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
      streams: where the programs are called.
    """
    halved = strategy.halves is not None and not strategy.waits
    return partial(
        _Halves if halved else _Whole, strategy, pipeline, key, programs, streams
    )


class _Compiled(Turns):
    """Turns whose programs are compiled before the first of them.

    Attributes:
      last_part: the name of the last program of a group.
    """

    last_part: str

    def __init__(
        self,
        strategy: Strategy,
        pipeline: InputPipeline,
        key: Key,
        programs: Programs,
        streams: Streams,
        inputs: Inputs,
    ) -> None:
        super().__init__(strategy, inputs)
        self._programs, self._streams = programs, streams
        self._batch_program = batch_program(pipeline, key)
        rows = inputs.plan.indices.shape[-1]
        self._shapes = rows, *((leaf.shape, leaf.dtype) for leaf in inputs.data)

    def load(self, state: RunState) -> None:
        """See `Steps`; compile the programs of all groups at once."""
        super().load(state)
        names: list[Hashable] = []
        compiled = compile_together(self._lower_new(names))
        self._programs.update(zip(names, compiled, strict=True))

    def _lower_new(self, names: list[Hashable]) -> Iterator[jax.stages.Lowered]:
        """Lower the programs that are not compiled yet, and add their names."""
        for group, n in self._first_slots().items():
            if self._name(self.last_part, group) in self._programs:
                continue
            for part, lowered in self._lower(group, n):
                name = self._name(part, group)
                if name not in names and name not in self._programs:
                    names.append(name)
                    yield lowered

    def _first_slots(self) -> dict[int, int]:
        """Return the first slot of each group with a client that takes part."""
        active = np.flatnonzero(self.inputs.plan.active).tolist()
        return {self.groups[n]: n for n in reversed(active)}

    def _make_batch(self, step: int, n: int) -> Batch:
        """Make the batch of slot ``n``."""
        return self._program("batch", n)(*self._batch_arguments(step, n))

    def _batch_arguments(self, step: int, n: int) -> tuple[Any, ...]:
        """Return data, rows and their mask, the client's id and the step in the run."""
        inputs, plan = self.inputs, self.inputs.plan
        return (
            inputs.data,
            (plan.indices[step, n], plan.mask[step, n]),
            plan.ids[n],
            np.int32(inputs.first + step),
        )

    def _lower(self, group: int, n: int) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """Lower the programs of a group by name, for the arguments of slot ``n``."""
        made = self._batch_program.lower(*self._batch_arguments(0, n))
        yield "batch", made
        yield from self._lower_turn(group, n, made.out_info)

    def _lower_turn(
        self, group: int, n: int, batch: Batch
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """Lower what takes the turns of a group; ``batch`` has shapes and dtypes."""
        raise NotImplementedError

    def _program(self, part: str, n: int) -> Callable:
        return self._programs[self._name(part, self.groups[n])]

    def _name(self, part: str, group: int) -> Hashable:
        kinds = self._strategy.turn_kinds
        kind = kinds[group] if kinds else group
        return part, None if part == "batch" else kind, self._shapes


class _Whole(_Compiled):
    """Turns as one program: no other keeps what a client waits with."""

    last_part = "turn"

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """See `Turns`."""
        return self._streams.submit(self.server_of(n), self._turn, step, n)

    def _turn(self, step: int, n: int) -> ExitMetrics:
        s, rate = self.server_of(n), self.inputs.rates[step]
        self.clients[n], self.servers[s], metrics = self._program("turn", n)(
            self.clients[n], self.servers[s], self._make_batch(step, n), rate
        )
        return metrics

    def _lower_turn(
        self, group: int, n: int, batch: Batch
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:
        assert self._strategy.turn is not None
        turn = jit_step(
            self._strategy.turn, static_argnames="group", donate_argnums=(0, 1)
        )
        both = self.clients[n], self.servers[self.server_of(n)]
        yield "turn", turn.lower(*both, batch, self.inputs.rates[0], group=group)


class _Halves(_Compiled):
    """Turns as a program of the client and one of the server, as devices take them."""

    last_part = "serve"

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """See `Turns`."""
        if not self._strategy.shared:
            return self._streams.submit(n, self._turn, step, n)
        sent = self._streams.submit_beside_first(n, self._send, step, n)
        return self._streams.submit(0, lambda: self._serve(step, n, *sent.result()))

    def _turn(self, step: int, n: int) -> ExitMetrics:
        return self._serve(step, n, *self._send(step, n))

    def _send(self, step: int, n: int) -> tuple[Batch, Metrics]:
        batch, rate = self._make_batch(step, n), self.inputs.rates[step]
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

    def _lower_turn(
        self, group: int, n: int, batch: Batch
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:
        client, server = self.clients[n], self.servers[self.server_of(n)]
        halves, rate = self._strategy.halves, self.inputs.rates[0]
        assert halves is not None
        sent = send_program(halves).lower(client, batch, rate, group=group)
        yield "send", sent
        message = batch._replace(inputs=sent.out_info.message)
        yield (
            "serve",
            serve_program(halves).lower(server, message, rate, group=group),
        )
