"""Fit the exits of a federation exactly, in one round of messages.

`hsee_jax.federation.ridge` has the method. A client helps to fit an exit if its layers
up to the exit's cut are those before the exit, bit by bit. Where layers are averaged
over all their holders, all clients with this cut or a deeper one help; where each
client has layers of its own, it fits its exit alone and sends nothing. Where layers
have gates, an exit is fitted to the features of both widths.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.trees import expand_like, nbytes, row_of
from hsee_jax.core.types import NO_LABEL, Array, Dataset, PyTree
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.placement import Shards
from hsee_jax.federation.branch import (
    Branch,
    BranchSpec,
    LayerState,
    forward,
    variables_of,
)
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.last_layer import (
    Path,
    find_last,
    last_inputs,
    layer_at,
    with_layer,
)
from hsee_jax.federation.ridge import Sums, gram, merge, solve
from hsee_jax.federation.state import RunState
from hsee_jax.nn.gates import widths_of
from hsee_jax.nn.model import layer_inputs
from hsee_jax.parallel.mesh import to_host

_Digests = tuple[str, ...]  # of a client's layers


class ExitFit(NamedTuple):
    """An exit that was fitted, which one client holds or several."""

    cut: int
    clients: tuple[int, ...]  # that hold the exit
    senders: tuple[int, ...]  # whose samples it is fitted to
    samples: int
    up_bytes: int  # the sums of all senders; 0 where a client fits its exit alone
    down_bytes: int  # the new layer; to other senders the rest of the head


class Samples(NamedTuple):
    """The training samples of all clients, and how they become inputs."""

    data: Dataset
    shards: Shards
    pipeline: InputPipeline
    batch_size: int
    num_classes: int


def refit_exits(
    federation: Federation, state: RunState, samples: Samples, ridge: float
) -> tuple[RunState, list[ExitFit]]:
    """Replace the last layer of each exit by the solution of a ridge regression.

    The optimizer starts anew on these exits. An exit stays as it is if no sample or no
    finite feature is there to fit it.

    Args:
      federation: the clients.
      state: with a slot for every client, in the order of its group.
      samples: of the clients, used as in inference, without augmentation; those without
        a label do not count.
      ridge: see `hsee_jax.federation.ridge.solve`.

    Returns:
      The state, and the exits that were fitted, by ascending cut.

    Raises:
      UserError: an exit does not end in a linear layer, or clients have several.
    """
    check_exits(federation)
    clients = to_host(state.clients)
    samples = samples._replace(shards=_labelled(samples))
    layers = {
        i: tuple(_digest(layer, m) for layer in stack.layers)
        for group, stack in zip(federation.groups, clients, strict=True)
        for m, i in enumerate(group.ids)
    }
    stacks, fits = list(state.clients), []
    for g, group in enumerate(federation.groups):
        path = _last_of(federation, group.cut)
        old = state.clients[g].head
        head, own = _fit_group(federation, g, clients[g], path, layers, samples, ridge)
        stacks[g] = stacks[g].replace(head=jax.tree.map(_placed_as, head, old))
        fits += own
    return state.replace(clients=tuple(stacks)), fits


def check_exits(federation: Federation) -> None:
    """Refuse exits that cannot be fitted, see `refit_exits`.

    Raises:
      UserError: an exit does not end in a linear layer, or clients have several.
    """
    if federation.exits != "cut":
        raise UserError(
            f"exits: {federation.exits} is not allowed with an exact fit; allowed is "
            "cut"
        )
    for group in federation.groups:
        _last_of(federation, group.cut)


def _labelled(samples: Samples) -> Shards:
    """Return the samples with a label of each client."""
    labels = to_host(samples.data.labels)
    return {i: shard[labels[shard] != NO_LABEL] for i, shard in samples.shards.items()}


def _last_of(federation: Federation, cut: int) -> Path:
    """Return the path of the last layer of the exit at a cut."""
    model = federation.model
    return find_last(model.exit_heads[cut - 1], layer_inputs(model)[cut])


def _fit_group(
    federation: Federation,
    g: int,
    stack: Branch,
    path: Path,
    layers: Mapping[int, _Digests],
    samples: Samples,
    ridge: float,
) -> tuple[LayerState, list[ExitFit]]:
    """Fit the exits of a group; return the stack of their heads."""
    group = federation.groups[g]
    widths = [federation._replace(model=m) for m in widths_of(federation.model)]
    specs = [own.specs(g)[0] for own in widths]
    params = jax.tree.map(np.array, stack.head.params)
    layer, fits = layer_at(params, path), []
    fitted: Any = np.zeros(len(layer["bias"]), bool)
    before = stack.head.replace(params=with_layer(params, path, (), ()))
    for members in _alike(group.ids, layers, before):
        ids = tuple(group.ids[m] for m in members)
        sums = {
            i: _sums(specs, path, row_of(stack, members[0]), samples, i)
            for i, digests in layers.items()
            if digests[: group.cut] == layers[ids[0]] and len(samples.shards[i])
        }
        sums = {i: one for i, one in sums.items() if _finite(one.gram)}
        if not sums or not _finite(row_of((stack.layers, before), members[0])):
            continue
        layer["kernel"][members], layer["bias"][members] = solve(
            merge(list(sums.values())), ridge
        )
        fitted[members] = True
        inner = nbytes(variables_of(row_of(before, members[0])))
        fits.append(_exit_fit(group.cut, ids, sums, inner))
    fresh = jax.vmap(federation.optimizer.init)(params)
    opt_state = jax.tree.map(
        lambda new, old: np.where(expand_like(fitted, old), new, old),
        to_host(fresh),
        stack.head.opt_state,
    )
    return LayerState(params, stack.head.batch_stats, opt_state), fits


def _alike(
    ids: tuple[int, ...], layers: Mapping[int, _Digests], before: LayerState
) -> list[list[int]]:
    """Return the members with the same layers, also in the head before its last."""
    found: dict[_Digests, list[int]] = {}
    for m, i in enumerate(ids):
        found.setdefault((*layers[i], _digest(before, m)), []).append(m)
    return list(found.values())


def _sums(
    specs: Sequence[BranchSpec], path: Path, client: Branch, samples: Samples, i: int
) -> Sums:
    """Return what client i sends: the sums over its samples.

    With several widths they are the means of the sums at each, so that a sample counts
    once.
    """
    each = [_sums_of(spec, path, client, samples, i) for spec in specs]
    return Sums(*(total / len(each) for total in merge(each)))


def _sums_of(
    spec: BranchSpec, path: Path, client: Branch, samples: Samples, i: int
) -> Sums:
    shard, size = samples.shards[i], samples.batch_size
    padded = np.resize(shard, -(-len(shard) // size) * size)
    client, who = jax.device_put(client), np.int32(i)
    features = [
        _features(spec, path, samples.pipeline, client, samples.data, indices, who)
        for indices in padded.reshape(-1, size)
    ]
    rows, labels = to_host((features, samples.data.labels))
    return gram(
        np.concatenate(rows)[: len(shard)],
        labels[shard],
        num_classes=samples.num_classes,
    )


@partial(jax.jit, static_argnames=("spec", "path", "pipeline"))
def _features(
    spec: BranchSpec,
    path: Path,
    pipeline: InputPipeline,
    client: Branch,
    data: Dataset,
    indices: Array,
    who: Array,
) -> Array:
    """Return what the last layer of an exit reads of some samples, ``[B, F]``."""
    mask = jnp.ones(len(indices), bool)
    batch = pipeline.evaluation(data, indices, mask, who)
    features, _, _ = forward(spec, client, batch.inputs, batch.mask, train=False)
    variables = variables_of(client.head)
    return last_inputs(spec.head, variables, path, features, batch.mask)


def _exit_fit(
    cut: int, clients: tuple[int, ...], sums: Mapping[int, Sums], inner: int
) -> ExitFit:
    """Count samples and bytes of a fit; ``inner`` is of the head before its last."""
    senders = tuple(sums)
    some = next(iter(sums.values()))
    layer = some.moment.size * np.dtype(np.float32).itemsize
    others = len(set(senders) - set(clients))
    alone = senders == clients and len(clients) == 1
    return ExitFit(
        cut,
        clients,
        senders,
        sum(one.samples for one in sums.values()),
        up_bytes=0 if alone else sum(one.nbytes for one in sums.values()),
        down_bytes=0 if alone else len(clients) * layer + others * inner,
    )


def _digest(layer: LayerState, member: int) -> str:
    """Return a digest of the weights of one member of a stack."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves((layer.params, layer.batch_stats)):
        found.update(np.ascontiguousarray(leaf[member]).tobytes())
    return found.hexdigest()


def _finite(tree: PyTree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def _placed_as(new: Any, old: Any) -> Any:
    """Put an array where another is: on its devices, or in host memory."""
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new
