"""The rounds of a server: those of the simulation, with what arrives from devices.

Order, averages, evaluation and the folder of the run are those of `hsee_jax.train`; a
turn takes the client's half from a `Mailbox` instead of computing it.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Batch, Dataset, ExitMetrics, Metrics
from hsee_jax.deployment.batches import padded, padded_tree
from hsee_jax.deployment.forms import Layers, message_of, tensors_of
from hsee_jax.deployment.journal import Journal
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.protocol import Tensors, named, tree_from
from hsee_jax.deployment.remote_evaluation import RemoteEvaluation
from hsee_jax.engine.loop import loop_round
from hsee_jax.engine.plan import EMPTY, RoundPlan
from hsee_jax.engine.programs import serve_program
from hsee_jax.engine.round import Floats, RoundProgress, due_after
from hsee_jax.engine.streams import Streams
from hsee_jax.engine.turns import Inputs, Log, Turns
from hsee_jax.federation.state import Means, RunState
from hsee_jax.federation.strategy import Served
from hsee_jax.link.codecs import Message
from hsee_jax.optim.optimizers import as_optimizer
from hsee_jax.runs.experiment import Experiment

Serve = Callable[..., Served]


def over_network(
    experiment: Experiment,
    mailbox: Mailbox,
    journal: Journal,
    *,
    seldom: bool,
) -> Experiment:
    """Return a run whose clients are devices.

    Args:
      experiment: the run, see `hsee_jax.runs.served.build_served`.
      mailbox: what devices send arrives there.
      journal: what the server knows of the devices after each round.
      seldom: whether clients may miss rounds, so that all layers are sent after every
        round.
    """
    strategy = experiment.strategy
    assert strategy.halves is not None
    serve = serve_program(strategy.halves)
    attendance, late = experiment.attendance, seldom
    seldom |= attendance.participation < 1 or attendance.dropout > 0
    seldom |= bool(attendance.absences)
    if seldom:
        _check_averages(experiment, late=late)
    private = experiment.config.clients.keep_layers_private
    take_turns = loop_round(strategy, partial(RemoteTurns, experiment, mailbox, serve))

    def run(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        begun: RoundProgress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[RunState, Means, RoundProgress]:
        del begun, stop  # a round begins at its first step, and the mailbox stops it
        number = int(state.round) + 1
        journal.recall(number - 1)
        mailbox.open(
            number,
            _rows(plan),
            Layers.NONE if private else _layers(experiment, number, seldom=seldom),
            last=journal.last,
            means=journal.means,
        )
        state, means, progress = take_turns(state, data, plan, learning_rates, weights)
        journal.note(number, mailbox.close(), jax.device_get(means))
        return state, means, progress

    if not private:
        return experiment._replace(round_fn=run)
    evaluate = RemoteEvaluation(experiment, mailbox, journal)
    return experiment._replace(round_fn=run, evaluate_fn=evaluate)


def _check_averages(experiment: Experiment, *, late: bool) -> None:
    """Refuse an optimizer that needs each average where devices may miss one.

    A device gets the latest average alone when it takes part again, and the replica of
    a late one has trained on a part of its round.

    Args:
      experiment: the run.
      late: whether devices may be late.

    Raises:
      UserError: the momentum comes from the averages, and clients get them or may be
        late.
    """
    strategy, federation = experiment.strategy, experiment.federation
    assert strategy.halves is not None
    by_clients = any(map(strategy.halves.means, range(len(federation.groups))))
    follows = as_optimizer(federation.optimizer).follows_averages
    if follows and strategy.period and (by_clients or late):
        raise UserError(
            f"optimizer: {experiment.config.optim.optimizer} is not allowed with "
            "clients on a network that may miss rounds or may be late, as its momentum "
            "comes from every average; allowed are others"
        )


class RemoteTurns(Turns):
    """Takes the steps of a round with what arrives from devices; see `Steps`."""

    def __init__(
        self, experiment: Experiment, mailbox: Mailbox, serve: Serve, inputs: Inputs
    ) -> None:
        """Prepare a round."""
        strategy, federation = experiment.strategy, experiment.federation
        super().__init__(strategy, inputs)
        self._mailbox, self._serve, self._here = mailbox, serve, Streams(1)
        self._waits = strategy.waits
        self._messages = [
            message_of(federation, group) for group in range(len(federation.groups))
        ]
        self._slots = {
            int(i): n
            for n, i in enumerate(inputs.plan.ids)
            if i != EMPTY and inputs.plan.mask[:, n].any()
        }
        self._late: set[int] = set()
        self._layers: dict[int, Tensors] = {}

    def store(self) -> RunState:
        """Return the state, with the layers that devices sent."""
        for n, tensors in self._layers.items():
            if not tensors:
                continue
            own = self.clients[n]
            leaves = named(own, "client") | tensors
            self.clients[n] = tree_from(leaves, own, "client")
        return super().store()

    def take(self, t: int) -> Log:
        """See `Steps`; after the last step, wait for the end of all clients' rounds."""
        log = super().take(t)
        return log if t + 1 < len(self.inputs.plan.order) else log + self._finish()

    def late(self) -> tuple[int, ...]:
        """See `Steps`."""
        return tuple(sorted(self._late))

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """Take the turn of slot ``n``, with what arrives from its device."""
        return self._here.submit(0, self._turn, step, n)

    def _turn(self, step: int, n: int) -> ExitMetrics:
        plan, group, s = self.inputs.plan, self.groups[n], self.server_of(n)
        i, mask, rate = int(plan.ids[n]), plan.mask[step, n], self.inputs.rates[step]
        tensors = self._mailbox.take(i, step)
        if tensors is None:
            self._late.add(n)
            return _NOTHING
        batch = _batch(tensors, self._messages[group], mask)
        served = self._serve(self.servers[s], batch, rate, group=group)
        self.servers[s] = served.server
        if self._waits:
            count, reply = int(mask.sum()), tensors_of(served.reply)
            own = {name: np.asarray(leaf)[:count] for name, leaf in reply.items()}
            self._mailbox.answer(i, step, own)
        return ExitMetrics(_NO_ROWS, served.metrics, served.link)

    def _finish(self) -> Log:
        """Return the metrics of the exits, and keep the layers that arrived."""
        log: Log = []
        for i, n in self._slots.items():
            finished = self._mailbox.finish(i)
            if finished is None:
                self._late.add(n)
                continue
            self._layers[n] = finished.layers
            for own in zip(*finished.metrics, strict=True):
                log.append((n, _NOTHING._replace(exit=Metrics(*own))))
        return log


_NO_ROWS: Any = Metrics(np.float32(0), np.int32(0), np.int32(0))  # type: ignore
_NOTHING = ExitMetrics(_NO_ROWS, _NO_ROWS, np.zeros((2, 2), np.int32))  # type: ignore


def _batch(tensors: Tensors, like: Message, mask: Any) -> Batch:
    """Return a message as a batch of encoded inputs, padded to the rows of a mask."""
    inputs = padded_tree(tensors, like, len(mask))
    return Batch(inputs, padded(tensors["labels"], len(mask)), mask)  # type: ignore


def _rows(plan: RoundPlan) -> dict[int, list[int]]:
    """Return the rows of the batches of each client that is to take part."""
    rows = plan.mask.sum(axis=-1)
    return {
        int(i): rows[:, n].tolist()
        for n, i in enumerate(plan.ids)
        if i != EMPTY and plan.active[n] and rows[:, n].any()
    }


def _layers(experiment: Experiment, number: int, *, seldom: bool) -> Layers:
    """Return which layers the devices send after a round."""
    cadence = experiment.cadence
    due = number == cadence.rounds or any(
        number % every == 0 for every in (cadence.checkpoint_every, cadence.eval_every)
    )
    if due or seldom:
        return Layers.ALL
    if due_after(experiment.strategy, "rounds", number):
        return Layers.MEAN
    return Layers.NONE
