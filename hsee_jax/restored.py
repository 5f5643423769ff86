"""A run's networks from its folder alone: without its data, whatever devices wrote it.

Everything is read onto the first device, where research code can call it as it is. To
train a run on, over all devices and with its data, there is ``--resume``.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax

from hsee_jax.base import UserError
from hsee_jax.checkpoint import Checkpoint, find, load
from hsee_jax.config import Config
from hsee_jax.data.info import DatasetInfo
from hsee_jax.experiment import build_federation, build_strategy
from hsee_jax.federation import Federation, RunState, Strategy, server_of
from hsee_jax.fields import unknown
from hsee_jax.folder import read_config, read_info
from hsee_jax.split import Branch, BranchSpec


class Restored(NamedTuple):
    """What a checkpoint holds, by the ids of clients.

    `forward` runs a branch and `branch_step` trains it, each by its spec: see `specs`.
    Inputs are images as `normalize` makes them with the mean and deviation of ``info``.
    """

    config: Config
    info: DatasetInfo
    federation: Federation  # without a mesh
    strategy: Strategy
    state: RunState  # a slot for every client, in the order of its group

    def specs(self, i: int) -> tuple[BranchSpec, BranchSpec]:
        """What client i computes, and the server behind it."""
        return self.federation.specs(_seat(self.federation, i)[0])

    def client(self, i: int) -> Branch:
        """The layers of client i and its exit head."""
        group, member = _seat(self.federation, i)
        return jax.tree.map(lambda leaf: leaf[member], self.state.clients[group])

    def server(self, i: int) -> Branch:
        """The layers behind client i and the final head."""
        return server_of(self.strategy, self.state, *_seat(self.federation, i))

    def network(self, i: int) -> Branch:
        """All layers, first those of client i, and the final head.

        Its spec is ``server_spec(model, 0, optimizer)``.
        """
        client, server = self.client(i), self.server(i)
        return Branch(client.layers + server.layers, server.head)


def restore(
    path: str | os.PathLike[str], which: str = "latest", *, only: int | None = None
) -> Restored:
    """Reads a checkpoint of a run.

    Args:
      path: of the run's folder.
      which: the ``"latest"`` checkpoint, or the ``"best"`` by mean server accuracy.
      only: a client's id: nothing is read but the clients of its cut, and the rest of
        the state is ``...``.

    Raises:
      UserError: there is no such run or client, or it has no checkpoint.
    """
    folder = Path(path)
    config, info = read_config(folder), read_info(folder)
    federation = build_federation(config, info)
    strategy = build_strategy(config, federation)
    like = jax.eval_shape(strategy.init, jax.random.key(0))
    if only is not None:
        like = _of_group(like, _seat(federation, only)[0])
    state = load(checkpoint_of(folder, which), like)
    return Restored(config, info, federation, strategy, state)


def restore_client(
    path: str | os.PathLike[str], i: int, which: str = "latest"
) -> tuple[BranchSpec, Branch]:
    """Reads a client's layers and exit, and nothing but the clients of its cut.

    Args:
      path: see `restore`.
      i: the client's id.
      which: see `restore`.

    Returns:
      What `forward` and `branch_step` begin with: ``forward(*restore_client("run", 3),
      images, mask, train=False)``.
    """
    run = restore(path, which, only=i)
    return run.specs(i)[0], run.client(i)


def checkpoint_of(folder: Path, which: str) -> Checkpoint:
    """Chooses a checkpoint of a run, see `restore`.

    Raises:
      UserError: it has none.
    """
    if which not in ("latest", "best"):
        raise unknown("checkpoint", which, ("latest", "best"))
    checkpoint = find(folder / "checkpoints", which)
    if checkpoint is None:
        raise UserError(
            f"run: {folder} has no checkpoint; allowed is a run that has reached its "
            "first one (see checkpoint_every)"
        )
    return checkpoint


def _seat(federation: Federation, i: int) -> tuple[int, int]:
    """Group and member of a client."""
    for g, group in enumerate(federation.groups):
        if i in group.ids:
            return g, group.ids.index(i)
    count = sum(len(group.ids) for group in federation.groups)
    raise UserError(f"client: {i} is not in the run; allowed are 0..{count - 1}")


def _of_group(like: RunState, group: int) -> RunState:
    """A target that reads nothing but the round and one group's clients."""
    nothing: RunState = jax.tree.map(lambda leaf: ..., like)
    clients = list(nothing.clients)
    clients[group] = like.clients[group]
    return nothing.replace(round=like.round, clients=tuple(clients))
