"""Dealing the training samples: some are held out, the others go to a client each.

`iid` and `quantity` ignore labels; `dirichlet` draws every label's shares over the
clients from Dirichlet(alpha) (Hsu et al., arXiv:1909.06335); `classes` deals out
label-sorted pieces, so many to each client (McMahan et al., AISTATS 2017).
"""

import numpy as np
import numpy.typing as npt

from hsee_jax.base import Dataset, UserError
from hsee_jax.config import Config

Indices = npt.NDArray[np.int32]
_HELD_OUT = 1  # stream of random numbers


def hold_out(train: Dataset, config: Config) -> tuple[Dataset, Dataset | None]:
    """Sets samples aside that no client is to have, drawn evenly from all.

    Args:
      train: M samples, on the host.
      config: `validation_share` and `partition_seed`.

    Returns:
      The samples for the clients, and those held out, both in their old order; at least
      one is held out, or None if the share is 0.
    """
    share, count = config.data.validation_share, len(train.labels)
    if share == 0:
        return train, None
    rng = np.random.default_rng((config.run.partition_seed, _HELD_OUT))
    held = np.zeros(count, np.bool_)
    held[rng.permutation(count)[: max(1, round(share * count))]] = True
    return Dataset(*(a[~held] for a in train)), Dataset(*(a[held] for a in train))


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
