"""The turns of a simulation: compiled once for each cut, several at the same time."""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import numpy as np

from hsee_jax.core.types import Array, Batch, Dataset, ExitMetrics, Key, Metrics
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.programs import compile_together
from hsee_jax.engine.round import Programs, step_key
from hsee_jax.engine.streams import Streams
from hsee_jax.engine.turns import Begin, Inputs, Turns
from hsee_jax.federation.branch import Branch
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
    halved = strategy.shared and strategy.halves is not None and not strategy.waits
    return partial(
        _Halves if halved else _Whole, strategy, pipeline, key, programs, streams
    )


class _Compiled(Turns):
    """Turns whose programs are compiled before the first of them.

    Attributes:
      parts: the names of the programs of a group.
    """

    parts: tuple[str, ...]

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
        self._pipeline, self._key = pipeline, key
        self._programs, self._streams = programs, streams
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

    def _batch_arguments(self, step: int, n: int) -> tuple[Any, ...]:
        """Return data, rows and their mask, the client's id and the step in the run."""
        inputs, plan = self.inputs, self.inputs.plan
        return (
            inputs.data,
            (plan.indices[step, n], plan.mask[step, n]),
            plan.ids[n],
            np.int32(inputs.first + step),
        )

    def _lower(self, group: int, n: int) -> Iterator[jax.stages.Lowered]:
        """Lower the programs of a group, for the arguments of slot ``n``."""
        raise NotImplementedError

    def _program(self, part: str, n: int) -> Callable:
        return self._programs[self._name(part, self.groups[n])]

    def _name(self, part: str, group: int) -> Hashable:
        kinds = self._strategy.turn_kinds
        return part, kinds[group] if kinds else group, self._shapes

    def _batch(
        self, data: Dataset, rows: tuple[Array, Array], who: Array, step: Array
    ) -> Batch:
        """Make a client's batch, inside a program."""
        key = step_key(self._key, who, step)
        return self._pipeline.training(key, data, *rows, who)


class _Whole(_Compiled):
    """Turns as one program."""

    parts = ("turn",)

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """See `Turns`."""
        return self._streams.submit(self.server_of(n), self._turn, step, n)

    def _turn(self, step: int, n: int) -> ExitMetrics:
        s = self.server_of(n)
        self.clients[n], self.servers[s], metrics = self._program("turn", n)(
            *self._arguments(step, n)
        )
        return metrics

    def _arguments(self, step: int, n: int) -> tuple[Any, ...]:
        both = self.clients[n], self.servers[self.server_of(n)]
        return *both, self.inputs.rates[step], *self._batch_arguments(step, n)

    def _lower(self, group: int, n: int) -> Iterator[jax.stages.Lowered]:
        def turn(
            client: Branch, server: Branch, rate: Array, *batch: Any
        ) -> tuple[Branch, Branch, ExitMetrics]:
            assert self._strategy.turn is not None
            made = self._batch(*batch)
            return self._strategy.turn(client, server, made, rate, group=group)

        yield jax.jit(turn, donate_argnums=(0, 1)).lower(*self._arguments(0, n))


class _Halves(_Compiled):
    """Turns as a program of the client and one of the shared server."""

    parts = ("send", "serve")

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """See `Turns`."""
        sent = self._streams.submit_beside_first(n, self._send, step, n)
        return self._streams.submit(0, self._serve, step, n, sent)

    def _send(self, step: int, n: int) -> tuple[Batch, Metrics]:
        program = self._program("send", n)
        self.clients[n], batch, metrics = program(*self._arguments(step, n))
        return batch, metrics

    def _serve(
        self, step: int, n: int, sent: Future[tuple[Batch, Metrics]]
    ) -> ExitMetrics:
        batch, exit_metrics = sent.result()
        rate = self.inputs.rates[step]
        self.servers[0], metrics, link = self._program("serve", n)(
            self.servers[0], batch, rate
        )
        return ExitMetrics(exit_metrics, metrics, link)

    def _arguments(self, step: int, n: int) -> tuple[Any, ...]:
        return self.clients[n], self.inputs.rates[step], *self._batch_arguments(step, n)

    def _lower(self, group: int, n: int) -> Iterator[jax.stages.Lowered]:
        halves = self._strategy.halves
        assert halves is not None

        def send(
            client: Branch, rate: Array, *batch: Any
        ) -> tuple[Branch, Batch, Metrics]:
            made = self._batch(*batch)
            sent = halves.send(client, made, rate, group=group)
            return sent.client, made._replace(inputs=sent.message), sent.metrics

        def serve(
            server: Branch, batch: Batch, rate: Array
        ) -> tuple[Branch, Metrics, Array]:
            served = halves.serve(server, batch, rate, group=group)
            return served.server, served.metrics, served.link

        sent = jax.jit(send, donate_argnums=0).lower(*self._arguments(0, n))
        yield sent
        batch, rate = sent.out_info[1], self.inputs.rates[0]
        yield jax.jit(serve, donate_argnums=0).lower(self.servers[0], batch, rate)
