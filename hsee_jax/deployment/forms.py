"""The forms of all messages of a client, as its device and the server know them."""

from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Metrics, PyTree
from hsee_jax.deployment.protocol import Form, form_of, named
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import Means, RunState
from hsee_jax.federation.strategy import Reply, Strategy
from hsee_jax.link.codecs import Message
from hsee_jax.nn.model import layer_inputs

VERSION = 1  # of the protocol


class Kind(IntEnum):
    """What a server asks of a device."""

    WAIT = 0
    TRAIN = 1
    END = 2
    EVALUATE = 3


class Layers(IntEnum):
    """The layers that a device sends after a round."""

    NONE = 0
    MEAN = 1  # the layers that an average reads
    ALL = 2  # the whole state of the client


class Forms(NamedTuple):
    """The trees of a client's messages as shapes, and the forms made of them."""

    batch: Form  # of one sample, [1, ...]: the message and its label
    message: Message  # of one sample
    reply: Form  # to a batch, of one sample; empty if clients do not wait
    metrics: Form  # of the T steps of a round
    answers: Form  # to one test input, [1, ...]: the message, and logits of the exit
    client: Branch
    layers: dict[Layers, Form]
    means: Means  # of the layers that the client receives


def forms_of(
    federation: Federation,
    strategy: Strategy,
    group: int,
    *,
    steps: int,
    classes: int,
) -> Forms:
    """Return the forms of the messages of a group's clients.

    Args:
      federation: the clients.
      strategy: the algorithm.
      group: the group.
      steps: the steps of a round, T.
      classes: the number of classes.
    """
    assert strategy.halves is not None
    features = layer_inputs(federation.model)[federation.groups[group].cut]
    message = message_of(federation, group)
    clients = client_shapes(strategy)
    whole = form_of(clients[group], "client")
    sent = _numbers_sent(strategy, clients)[group]
    names = list(whole)
    means = mean_shapes(federation, strategy)
    label = jax.ShapeDtypeStruct((1,), np.int32)
    logits = jax.ShapeDtypeStruct((1, classes), np.float32)
    reply = Reply(
        gradient=features if strategy.boundary == "joint" else None,  # type: ignore
        logits=logits if strategy.distill else None,  # type: ignore
    )
    return Forms(
        batch=form_of(message, "inputs") | {"labels": label},
        message=message,
        reply=tensors_of(reply),
        metrics=form_of(_metrics(steps), "exit"),
        answers=form_of(message, "inputs") | {"logits": logits},
        client=clients[group],
        layers={
            Layers.NONE: {},
            Layers.MEAN: {names[number]: whole[names[number]] for number in sent},
            Layers.ALL: whole,
        },
        means={name: means[name] for name in strategy.halves.means(group)},
    )


def tensors_of(reply: Reply) -> dict[str, Any]:
    """Return what is in a reply, by name."""
    return {name: leaf for name, leaf in reply._asdict().items() if leaf is not None}


def client_shapes(strategy: Strategy) -> list[Branch]:
    """Return one client of each group as shapes."""
    state = jax.eval_shape(strategy.init, jax.random.key(0))
    return [_one(stack) for stack in state.clients]


def mean_shapes(federation: Federation, strategy: Strategy) -> Means:
    """Return the means of a round as shapes."""
    state = jax.eval_shape(strategy.init, jax.random.key(0))
    weights = tuple(
        jax.ShapeDtypeStruct((len(g.ids),), np.float32) for g in federation.groups
    )
    return jax.eval_shape(strategy.aggregate, state, weights)


def message_of(federation: Federation, group: int) -> Message:
    """Return the message of one sample of a group, ``[1, ...]``, as shapes."""
    features = layer_inputs(federation.model)[federation.groups[group].cut]
    codec = federation.codec

    def encode() -> Message:
        zeros = jnp.zeros(features.shape, features.dtype)
        return codec.encode(zeros, codec.init(features), jnp.ones(1, bool))[0]

    return jax.eval_shape(encode)


def _metrics(steps: int) -> Metrics:
    floats = jax.ShapeDtypeStruct((steps,), np.float32)
    counts = jax.ShapeDtypeStruct((steps,), np.int32)
    return Metrics(floats, counts, counts)  # type: ignore[arg-type]


def _one(stack: Branch) -> Branch:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stack)


def _numbers_sent(strategy: Strategy, clients: list[Branch]) -> list[list[int]]:
    """Return for each group which leaves of a client are sent for a mean, in order."""
    numbered = tuple(
        jax.tree.unflatten(jax.tree.structure(one), range(len(named(one))))
        for one in clients
    )
    state = RunState(0, numbered, ())  # type: ignore[arg-type]
    sent: tuple[PyTree, ...] = strategy.messages(state)
    return [sorted(jax.tree.leaves(group)) for group in sent]
