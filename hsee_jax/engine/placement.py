"""The placement of training samples: on one device, on all, or where needed."""

from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import Dataset
from hsee_jax.data.partition import Indices
from hsee_jax.engine.plan import EMPTY, take_seats
from hsee_jax.engine.round import data_layout
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import SAME, place_blocks, process_of_slots, to_devices

Shards = dict[int, npt.NDArray[np.int32]]  # client id -> its samples


def place_data(
    federation: Federation,
    strategy: Strategy,
    slots: Sequence[int],
    train: Dataset | None,
    shards: Shards,
) -> tuple[Dataset, Shards]:
    """Put on each device the samples that its process needs.

    With one process these are all samples; with several, the samples of the clients in
    the process's own slots, or all samples where the strategy has no `step` for all
    clients at once. There are none where the clients have them.

    Returns:
      The samples, and each client's shard: indices in the samples, or with several
      processes in the block of the client's process.
    """
    if train is None:
        return Dataset(np.zeros(0), np.zeros(0, np.int32)), shards
    mesh = federation.mesh
    if mesh is None or data_layout(strategy) == SAME:
        return to_devices(train, mesh, SAME), shards
    if jax.process_count() == 1:
        return place_blocks(train, mesh), shards
    homes = [p for count in slots for p in process_of_slots(mesh, count)]
    ids = take_seats(federation.groups, slots, set())
    clients: dict[int, list[int]] = {p: [] for p in range(jax.process_count())}
    for i, process in zip(ids.tolist(), homes, strict=True):
        if i != EMPTY:
            clients[process].append(i)
    # Clients may share samples, as views of the same events do.
    blocks = {p: _union([shards[i] for i in own]) for p, own in clients.items()}
    moved = {
        i: np.searchsorted(blocks[p], shards[i]).astype(np.int32)
        for p, own in clients.items()
        for i in own
    }
    longest = max(map(len, blocks.values()))
    own = np.resize(blocks[jax.process_index()], longest)
    return place_blocks(Dataset(*(a[own] for a in train)), mesh), moved


def _union(shards: Sequence[Indices]) -> Indices:
    """Return the samples of some clients, each once; one sample if there are none."""
    return np.unique(np.concatenate(shards)) if shards else np.zeros(1, np.int32)
