"""Hetero-SplitEE as a plain loop, to read beside the paper (arXiv:2512.09313).

A client holds layers 1..cut of a network and an exit head; each client has its own cut.
A server holds layers cut+1..L and the final head. Each side trains on its own
cross-entropy, and no gradient crosses the cut. There are two strategies:

* sequential: all clients share one server network, which takes their features in turn;
* averaging: each client has a server network; after each round every layer is averaged
  over the server networks that hold it.

Run it with::

    python examples/hetero_splitee.py --strategy sequential --rounds 3 --width 8

`hsee_jax.train` computes the same figures; a test compares them.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial

import jax
import numpy as np

import hsee_jax as hs
from hsee_jax.core import Array, Metrics
from hsee_jax.federation import (
    Branch,
    BranchSpec,
    LayerState,
    client_backward,
    client_forward,
    decode,
    encode,
    init_client,
    init_server,
    layer_mean,
    receive,
    server_step,
)
from hsee_jax.link import Message
from hsee_jax.optim import Optimizer

Branches = dict[int, Branch]  # by the id of the client


@partial(jax.jit, static_argnames="spec")
def client_turn(
    spec: BranchSpec, client: Branch, batch: hs.Batch, rate: Array
) -> tuple[Branch, Message, Metrics]:
    """Train a client on its exit's loss, and return the message with its features."""
    passed = client_forward(spec, client, batch)
    message, client = encode(spec, client, passed.features, batch.mask)
    client, metrics = client_backward(spec, client, passed, rate)
    return client, message, metrics


@partial(jax.jit, static_argnames="spec")
def server_turn(
    spec: BranchSpec, server: Branch, message: Message, batch: hs.Batch, rate: Array
) -> tuple[Branch, Metrics]:
    """Train a server on the final head's loss; it sees the features, not the images."""
    features = decode(spec, message)
    step = server_step(spec, server, batch._replace(inputs=features), rate)
    return step.server, step.metrics


def share(servers: Branches, trained: Branch) -> Branches:
    """Hand the layers that a turn has trained to all servers that hold them."""

    def updated(server: Branch) -> Branch:
        untouched = len(server.layers) - len(trained.layers)  # or none, if negative
        below = server.layers[: max(untouched, 0)]
        return Branch(below + trained.layers[max(-untouched, 0) :], trained.head)

    return {i: updated(server) for i, server in servers.items()}


@partial(jax.jit, static_argnames="optimizer")
def average(
    servers: Branches, samples: Mapping[int, Array], number: Array, optimizer: Optimizer
) -> Branches:
    """Replace each layer by its mean over the servers that hold it.

    The weights are the clients' numbers of samples. BatchNorm stays local, because a
    server sees the features of one client; so does the momentum.
    """

    def mean(holders: Mapping[int, LayerState]) -> dict[int, LayerState]:
        states = [jax.tree.map(lambda a: a[None], layer) for layer in holders.values()]
        weights = [samples[i][None] for i in holders]
        found = layer_mean(states, weights, number=number, optimizer=optimizer)
        take = partial(receive, optimizer=optimizer, batch_norm="keep_local")
        return {i: take(layer, found, number - 1) for i, layer in holders.items()}

    layers = {i: list(server.layers) for i, server in servers.items()}
    deepest = max(map(len, layers.values()))
    for place in range(1, deepest + 1):  # counted from the last layer
        holders = {i: own[-place] for i, own in layers.items() if len(own) >= place}
        for i, layer in mean(holders).items():
            layers[i][-place] = layer
    heads = mean({i: server.head for i, server in servers.items()})
    return {i: Branch(tuple(layers[i]), heads[i]) for i in servers}


def train(experiment: hs.Experiment) -> Iterator[tuple[Branches, Branches, list]]:
    """Train; yield clients, servers and the two mean losses after every round."""
    federation, data, info = experiment.federation, experiment.train, experiment.info
    optimizer, sequential = federation.optimizer, experiment.strategy.shared
    specs = specs_of(federation)
    # All clients and servers start as slices of one random network.
    draw = jax.jit(partial(hs.nn.init_network, federation.model))
    network = draw(experiment.init_key)
    cuts = {i: len(on_client.stages) for i, (on_client, _) in specs.items()}
    clients = {i: init_client(network, cut, optimizer) for i, cut in cuts.items()}
    servers = {i: init_server(network, cut, optimizer) for i, cut in cuts.items()}
    samples = {i: np.float32(len(shard)) for i, shard in experiment.shards.items()}
    for number, rates in enumerate(experiment.learning_rates):
        plan = experiment.plan(number)  # the samples and the turns of each step
        log: list[tuple[Metrics, Metrics]] = []
        for t, rate in enumerate(rates):
            for n in plan.order[t]:
                i, rows = int(plan.ids[n]), plan.indices[t, n]
                images = hs.data.normalize(data.images[rows], info.mean, info.std)
                batch = hs.Batch(images, data.labels[rows], plan.mask[t, n])
                on_client, on_server = specs[i]
                clients[i], message, at_exit = client_turn(
                    on_client, clients[i], batch, rate
                )
                servers[i], at_end = server_turn(
                    on_server, servers[i], message, batch, rate
                )
                log.append((at_exit, at_end))
                if sequential:
                    servers = share(servers, servers[i])
        if not sequential:
            servers = average(servers, samples, np.int32(number + 1), optimizer)
        yield clients, servers, [mean_loss(side) for side in zip(*log, strict=True)]


def accuracies(
    experiment: hs.Experiment, clients: Branches, servers: Branches
) -> Iterator[tuple[int, float, float]]:
    """Yield each client, and the accuracy of its exit and of the server behind it."""
    test, info = experiment.test, experiment.info
    images = hs.data.normalize(test.images, info.mean, info.std)
    gate_of = cache(partial(hs.inference.make_gate, batch_size=len(images)))
    for i, specs in sorted(specs_of(experiment.federation).items()):
        found = gate_of(*specs).answer(clients[i], servers[i], images, threshold=0.0)
        right = [
            np.mean(logits.argmax(axis=-1) == test.labels)
            for logits in (found.exit_logits, found.logits)
        ]
        yield i, float(right[0]), float(right[1])


def specs_of(federation: hs.Federation) -> dict[int, tuple[BranchSpec, BranchSpec]]:
    """Return what each client and its server compute."""
    groups = enumerate(federation.groups)
    return {i: federation.specs(g) for g, group in groups for i in group.ids}


def mean_loss(metrics: Sequence[Metrics]) -> float:
    """Return the mean over all samples of some batches, in nats."""
    found = jax.device_get(metrics)
    return float(sum(m.loss_sum for m in found) / sum(m.count for m in found))


def main(words: Sequence[str] | None = None) -> None:
    """Train on the images of the package; print losses and accuracies."""
    parser = argparse.ArgumentParser(description="Hetero-SplitEE as a plain loop.")
    strategies = ("averaging", "sequential")
    parser.add_argument("--strategy", choices=strategies, default="averaging")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=8, help="of ResNet-18")
    given = vars(parser.parse_args(words))
    small = {"num_clients": 6, "cuts": ("2", "4", "6"), "batch_size": 16}
    config = hs.override(hs.Config(), client_axis="loop", **small, **given)
    experiment = hs.build(config)
    for number, last in enumerate(train(experiment), start=1):
        clients, servers, losses = last
        print(f"round {number}: loss of exits {losses[0]:.3f}, servers {losses[1]:.3f}")
    for i, at_exit, at_end in accuracies(experiment, clients, servers):
        cut = len(clients[i].layers)
        print(f"client {i}, cut {cut}: exit {at_exit:.3f}, server {at_end:.3f}")


if __name__ == "__main__":
    main()
