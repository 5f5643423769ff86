"""Dealing the training samples: some are held out, the others go to a client each.

`iid` and `quantity` ignore labels; `dirichlet` draws every label's shares over the
clients from Dirichlet(alpha) (Hsu et al., arXiv:1909.06335); `classes` deals out
label-sorted pieces, so many to each client (McMahan et al., AISTATS 2017).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.base import UserError
from hsee_jax.config import Config

Indices = npt.NDArray[np.int32]
_HELD_OUT = 1  # stream of random numbers


def hold_out(count: int, config: Config) -> tuple[Indices, Indices]:
    """Sets samples aside that no client is to have, drawn evenly from all.

    Args:
      count: M, of training samples.
      config: `validation_share` and `partition_seed`.

    Returns:
      The ascending indices of the samples for the clients, and of those held out: at
      least one unless the share is 0.
    """
    share = config.data.validation_share
    rng = np.random.default_rng((config.run.partition_seed, _HELD_OUT))
    held = np.zeros(count, np.bool_)
    if share > 0:
        held[rng.permutation(count)[: max(1, round(share * count))]] = True
    kept, out = np.flatnonzero(~held), np.flatnonzero(held)
    return kept.astype(np.int32), out.astype(np.int32)


class Share(NamedTuple):
    """What a client has of the training set; an entry of ``partition.json``."""

    id: int
    cut: int
    samples: int
    label_counts: list[int]  # of each class
    indices: list[int]  # of its samples, ascending


def partition(labels: npt.NDArray[np.int32], config: Config) -> tuple[Indices, ...]:
    """The samples of each client.

    Args:
      labels: ``int32 [M]``.
      config: `num_clients`, `partition` with its parameters, and `partition_seed`.

    Returns:
      For each client the ascending indices of its samples, ``int32 [M_i]``, at least
      one.

    Raises:
      UserError: there are more clients than samples.
    """
    data, clients = config.data, config.clients.num_clients
    if clients > len(labels):
        raise UserError(
            f"num_clients: {clients} is more than the {len(labels)} training samples; "
            f"allowed are 1..{len(labels)}"
        )
    rng = np.random.default_rng(config.run.partition_seed)
    if data.partition == "iid":
        parts = np.array_split(rng.permutation(len(labels)), clients)
    elif data.partition == "quantity":
        parts = _cut(rng.permutation(len(labels)), rng, data.alpha, clients)
    elif data.partition == "dirichlet":
        by_label = [
            _cut(rng.permutation(np.flatnonzero(labels == k)), rng, data.alpha, clients)
            for k in np.unique(labels)
        ]
        parts = [np.concatenate(pieces) for pieces in zip(*by_label, strict=True)]
    else:
        by_label_order = np.lexsort((rng.random(len(labels)), labels))
        pieces = np.array_split(by_label_order, clients * data.classes_per_client)
        deal = rng.permutation(len(pieces)).reshape(clients, -1)
        parts = [np.concatenate([pieces[p] for p in row]) for row in deal]
    return tuple(np.sort(part).astype(np.int32) for part in _no_empty(parts))


def manifest(
    parts: Sequence[Indices],
    labels: npt.NDArray[np.int32],
    *,
    cuts: Sequence[int],
    num_classes: int,
) -> list[Share]:
    """A record of the partition, complete without the data.

    Args:
      parts: the samples of each client, see `partition`.
      labels: ``int32 [M]``.
      cuts: of each client.
      num_classes: labels there are, whether or not a sample has them.
    """
    return [
        Share(
            id=i,
            cut=cut,
            samples=len(part),
            label_counts=np.bincount(labels[part], minlength=num_classes).tolist(),
            indices=part.tolist(),
        )
        for i, (part, cut) in enumerate(zip(parts, cuts, strict=True))
    ]


def _cut(
    indices: npt.NDArray[np.int64], rng: np.random.Generator, alpha: float, clients: int
) -> list[npt.NDArray[np.int64]]:
    """Cuts a list at random, in shares drawn from a symmetric Dirichlet."""
    shares = rng.dirichlet(np.full(clients, alpha))
    ends = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
    return np.split(indices, ends)


def _no_empty(parts: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """Gives each client without samples one of the largest client's."""
    for i, part in enumerate(parts):
        if len(part) == 0:
            largest = max(range(len(parts)), key=lambda j: len(parts[j]))
            parts[i], parts[largest] = parts[largest][:1], parts[largest][1:]
    return parts
