"""A client's part of a round: its own batches, up to the link and back from it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Array, Dataset, Metrics
from hsee_jax.data.pipeline import normalize
from hsee_jax.deployment.batches import padded
from hsee_jax.deployment.protocol import Tensors, named
from hsee_jax.engine.plan import own_batches
from hsee_jax.engine.programs import batch_program, send_program
from hsee_jax.engine.scoring import Answers, client_answers
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.state import Means, RunState
from hsee_jax.federation.strategy import Reply, Sent
from hsee_jax.runs.participant import Participant


class Exchange(Protocol):
    """Sends the message of a step."""

    def __call__(self, step: int, tensors: Tensors) -> Tensors:
        """Return the `Reply` that comes back, by name, ``[rows, ...]``.

        Args:
          step: the step of the round, from 0.
          tensors: of the message, without padding.

        Returns:
          The tensors; none if the client does not wait for a reply.
        """


class Programs(NamedTuple):
    """A client's part of a run, compiled."""

    # client, which is donated, (rows, mask), step in the run, learning rate
    send: Callable[[Branch, tuple[Any, Any], Any, Any], Sent]
    # client, what `Halves.finish` needs, reply, learning rate
    finish: Callable[[Branch, Any, Any, Any], tuple[Branch, Metrics]]
    # client, test inputs, mask
    answer: Callable[[Branch, Any, Any], Answers]
    # client, means, the round of the last means that it received
    receive: Callable[[Branch, Means, Any], Branch]


def make_programs(part: Participant, data: Dataset) -> Programs:
    """Compile a client's part of a run.

    Args:
      part: the client.
      data: its samples, on the host.
    """
    here = jax.device_put(data)
    who = np.int32(part.client)
    halves, strategy = part.halves, part.strategy

    make_batch, key = batch_program(part.pipeline), part.augment_key
    step_client = send_program(halves)

    def send(client: Branch, rows: Any, step: Any, rate: Any) -> Sent:
        batch = make_batch(key, who, step, here, *rows)
        return step_client(client, batch, rate, group=0)

    @jax.jit
    def answer(client: Branch, images: Array, mask: Array) -> Answers:
        spec = part.federation.specs(0)[0]
        inputs = normalize(images, part.info.mean, part.info.std)
        return client_answers(spec, client, inputs, mask)

    @jax.jit
    def receive(client: Branch, means: Means, since: Array) -> Branch:
        stack = jax.tree.map(lambda leaf: leaf[None], client)
        state = RunState(since, (stack,), ())
        return row_of(strategy.receive(state, means, (since[None],)).clients[0], 0)

    finish = partial(halves.finish, group=0) if halves.finish else _no_finish
    return Programs(
        send=send,
        finish=jax.jit(finish),
        answer=answer,
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
    client = _copy(client)  # a step donates what it is given
    for t in range(steps):
        rows = int(mask[t].sum())
        if rows == 0:
            continue
        step = np.int32((number - 1) * steps + t)
        sent = programs.send(client, (indices[t], mask[t]), step, rates[t])
        message = jax.tree.map(lambda a, n=rows: np.asarray(a)[:n], sent.message)
        tensors = named(message, "inputs") | {"labels": labels[indices[t][:rows]]}
        found = exchange(t, tensors)
        client, own = sent.client, sent.metrics
        if sent.passed is not None:
            size = part.batch_size
            reply: Any = {name: padded(leaf, size) for name, leaf in found.items()}
            client, own = programs.finish(client, sent.passed, Reply(**reply), rates[t])
        for total, value in zip(metrics, own, strict=True):
            total[t] = value
    return client, metrics


@jax.jit
def _copy(client: Branch) -> Branch:
    return jax.tree.map(jnp.copy, client)


def _no_finish(*_: Any) -> Any:
    raise AssertionError("a client that does not wait has nothing to finish")
