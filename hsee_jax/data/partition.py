"""Hold out some of the training samples, and deal the others to the clients.

A partition is registered under its name; `partition` draws it and gives every client at
least one sample.
"""

import heapq
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import between, positive
from hsee_jax.core.registry import Registry
from hsee_jax.core.types import NO_LABEL

Indices = npt.NDArray[np.int32]
Labels = npt.NDArray[np.int32]
Parts = Sequence[npt.NDArray[np.integer]]
_HELD_OUT, _LABELLED = 1, 2  # streams of random numbers


class DealFn(Protocol):
    """Deals samples to clients."""

    def __call__(
        self, labels: Labels, num_clients: int, rng: np.random.Generator
    ) -> Parts:
        """Return the indices of each client's samples in any order.

        Args:
          labels: ``int32 [M]``.
          num_clients: N, at most M.
          rng: the source of all random draws.
        """


# Factories take only their options.
PARTITIONS: Registry[DealFn] = Registry("partition")
register = PARTITIONS.register

Alpha = Annotated[
    float,
    "concentration of the Dirichlet distribution; the lower, the less equal",
    positive,
]


@PARTITIONS.register(summary="equal shares, whatever the labels [ours]")
def iid() -> DealFn:
    """Deal equal shares at random."""

    def deal(labels: Labels, num_clients: int, rng: np.random.Generator) -> Parts:
        return np.array_split(rng.permutation(len(labels)), num_clients)

    return deal


@PARTITIONS.register(summary="each label in shares from a Dirichlet distribution")
def dirichlet(*, alpha: Alpha = 0.3) -> DealFn:
    """Draw the shares of each label from Dirichlet(alpha).

    After Yurochkin et al. (ICML 2019), who draw for each label how much of it every
    client gets.
    """

    def deal(labels: Labels, num_clients: int, rng: np.random.Generator) -> Parts:
        by_label = [
            _cut(rng.permutation(np.flatnonzero(labels == k)), rng, alpha, num_clients)
            for k in np.unique(labels)
        ]
        return [np.concatenate(pieces) for pieces in zip(*by_label, strict=True)]

    return deal


@PARTITIONS.register(summary="some label-sorted pieces for each client")
def classes(
    *,
    classes_per_client: Annotated[
        int, "label-sorted pieces that each client gets", between(1, 1000)
    ] = 2,
) -> DealFn:
    """Deal label-sorted pieces (McMahan et al., AISTATS 2017)."""

    def deal(labels: Labels, num_clients: int, rng: np.random.Generator) -> Parts:
        by_label_order = np.lexsort((rng.random(len(labels)), labels))
        pieces = np.array_split(by_label_order, num_clients * classes_per_client)
        hands = rng.permutation(len(pieces)).reshape(num_clients, -1)
        return [np.concatenate([pieces[p] for p in hand]) for hand in hands]

    return deal


@PARTITIONS.register(summary="sizes from a Dirichlet distribution, whatever the labels")
def quantity(*, alpha: Alpha = 0.3) -> DealFn:
    """Draw the sizes of the shares from Dirichlet(alpha)."""

    def deal(labels: Labels, num_clients: int, rng: np.random.Generator) -> Parts:
        return _cut(rng.permutation(len(labels)), rng, alpha, num_clients)

    return deal


def hold_out(count: int, share: float, *, seed: int) -> tuple[Indices, Indices]:
    """Draw the samples that no client gets, uniformly.

    Args:
      count: M, the number of training samples.
      share: the share of the samples to hold out, 0 or more and less than 1.
      seed: the seed of the draw.

    Returns:
      The ascending indices of the samples for the clients, and of the held-out samples:
      at least one unless the share is 0.

    Raises:
      UserError: no sample is left for the clients.
    """
    rng = np.random.default_rng((seed, _HELD_OUT))
    held = np.zeros(count, np.bool_)
    if share > 0:
        held[rng.permutation(count)[: max(1, round(share * count))]] = True
    kept, out = np.flatnonzero(~held), np.flatnonzero(held)
    if len(kept) == 0:
        raise UserError(
            f"validation_share: {share} holds out all {count} training samples; "
            "allowed is less"
        )
    return kept.astype(np.int32), out.astype(np.int32)


def partition(
    labels: Labels, num_clients: int, deal: DealFn, *, seed: int
) -> tuple[Indices, ...]:
    """Deal all samples to the clients.

    Args:
      labels: ``int32 [M]``.
      num_clients: N.
      deal: the function that deals, made by an entry of `PARTITIONS`.
      seed: the seed of the draw.

    Returns:
      The ascending indices of each client's samples, ``int32 [M_i]`` with M_i at least
      1.

    Raises:
      UserError: there are more clients than samples, or the function does not deal
        samples.
    """
    if num_clients > len(labels):
        raise UserError(
            f"num_clients: {num_clients} is more than the {len(labels)} training "
            f"samples; allowed are 1..{len(labels)}"
        )
    dealt = deal(labels, num_clients, np.random.default_rng(seed))
    parts = _checked(dealt, num_clients, len(labels))
    sizes = [(-len(part), i) for i, part in enumerate(parts)]
    heapq.heapify(sizes)
    for i, part in enumerate(parts):
        if len(part) == 0:  # give it a sample of the first client with the most
            size, largest = sizes[0]
            heapq.heapreplace(sizes, (size + 1, largest))
            parts[i], parts[largest] = parts[largest][:1], parts[largest][1:]
    return tuple(np.sort(part).astype(np.int32) for part in parts)


def _checked(
    dealt: Parts, num_clients: int, samples: int
) -> list[npt.NDArray[np.integer]]:
    """Return the parts as arrays; refuse parts that are not indices of samples."""
    parts = [np.asarray(part) for part in dealt]
    if len(parts) != num_clients:
        raise UserError(
            f"partition: {len(parts)} parts are not allowed for {num_clients} clients; "
            "allowed are as many"
        )
    for i, part in enumerate(parts):
        if part.size and not (
            np.issubdtype(part.dtype, np.integer)
            and part.ndim == 1
            and 0 <= part.min() <= part.max() < samples
            and len(np.unique(part)) == len(part)
        ):
            raise UserError(
                f"partition: what client {i} is dealt is not allowed; allowed are "
                f"different indices of samples, 0..{samples - 1}"
            )
    return parts


def labelled(
    parts: Sequence[Indices], share: float, *, seed: int
) -> tuple[Indices, ...]:
    """Draw the samples of each client that have labels.

    Args:
      parts: the samples of each client, see `partition`.
      share: the share of its samples to draw, more than 0 and at most 1.
      seed: the seed of the draw.

    Returns:
      The ascending indices of each client's samples with labels, at least one.
    """
    found = []
    for i, part in enumerate(parts):
        rng = np.random.default_rng((seed, _LABELLED, i))
        drawn = rng.permutation(part)[: max(1, round(share * len(part)))]
        found.append(np.sort(drawn))
    return tuple(found)


def _cut(
    indices: npt.NDArray[Any], rng: np.random.Generator, alpha: float, clients: int
) -> Parts:
    """Cut a list into shares drawn from a symmetric Dirichlet distribution."""
    shares = rng.dirichlet(np.full(clients, alpha))
    ends = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
    return np.split(indices, ends)


class Share(NamedTuple):
    """A client's share of the training set; an entry of ``partition.json``."""

    id: int
    cut: int
    samples: int  # with labels or without
    label_counts: list[int]  # of each class; samples without labels do not count
    indices: list[int]  # of its samples, ascending


def manifest(
    parts: Sequence[Indices],
    labels: Labels,
    *,
    cuts: Sequence[int],
    num_classes: int,
) -> list[Share]:
    """Describe a partition completely, without the data.

    Args:
      parts: the samples of each client, see `partition`.
      labels: ``int32 [M]``; `NO_LABEL` for samples without a label.
      cuts: the cut of each client.
      num_classes: K, even if a class has no sample.
    """
    return [
        Share(
            id=i,
            cut=cut,
            samples=len(part),
            label_counts=_counts(labels[part], num_classes),
            indices=part.tolist(),
        )
        for i, (part, cut) in enumerate(zip(parts, cuts, strict=True))
    ]


def _counts(labels: Labels, num_classes: int) -> list[int]:
    """Count the samples of each class."""
    known = labels[labels != NO_LABEL]
    return np.bincount(known, minlength=num_classes).tolist()
