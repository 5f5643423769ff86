"""Restore a run's networks from its folder, without its data.

Whatever devices wrote the run, its networks are read to the first device, where
research code can call them directly. ``--resume`` continues a run on all devices and
with its data.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.trees import row_of
from hsee_jax.core.types import PyTree
from hsee_jax.data.info import DatasetInfo
from hsee_jax.federation.branch import Branch, BranchSpec
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy, server_of
from hsee_jax.nn.model import Model
from hsee_jax.optim.optimizers import alone
from hsee_jax.runs.build import build_federation, build_model, build_strategy
from hsee_jax.runs.checkpoint import Checkpoint, find, load
from hsee_jax.runs.checkpoint_folder import find_places
from hsee_jax.runs.cut_schedule import config_in_round
from hsee_jax.runs.folder import read_config, read_info
from hsee_jax.runs.private import check_layers


class Restored(NamedTuple):
    """The content of a checkpoint, with access by the ids of clients.

    `forward` runs a branch and `branch_step` trains it; both take its spec, see
    `specs`. Inputs are samples after `normalize` with the mean and deviation of
    ``info``.
    """

    config: Config  # with the cuts of the checkpoint's last round
    info: DatasetInfo
    federation: Federation  # without a mesh
    strategy: Strategy
    state: RunState  # a slot for every client, in the order of its group

    def __repr__(self) -> str:
        """Name the strategy, the clients and the round, and not every weight."""
        cuts = {group.cut: len(group.ids) for group in self.federation.groups}
        return (
            f"Restored(strategy={self.config.strategy.strategy}, "
            f"clients by cut={cuts}, rounds={self.state.round})"
        )

    def specs(self, i: int) -> tuple[BranchSpec, BranchSpec]:
        """Return the specs of client i and of the server behind it.

        Their optimizer trains one of them by itself, without averages.
        """
        own = self.federation._replace(optimizer=alone(self.federation.optimizer))
        return own.specs(own.seat(i)[0])

    def client(self, i: int) -> Branch:
        """Return the layers of client i and its exit head.

        Raises:
          UserError: there is no such client, it kept them private, or `restore` has
            not read them, see ``only``.
        """
        group, member = self.federation.seat(i)
        check_layers(self.config)
        check_read(self.state.clients[group])
        return row_of(self.state.clients[group], member)

    def server(self, i: int) -> Branch:
        """Return the layers behind client i and the final head.

        With a junction, they read the merged features. A layer that mixes views is not
        among them: it is the first of ``state.servers[0]``.

        Raises:
          UserError: there is no such client, or `restore` has not read the layers
            behind it, see ``only``.
        """
        check_read(self.state.servers)
        return server_of(self.strategy, self.state, *self.federation.seat(i))

    def network(self, i: int) -> Branch:
        """Return the layers of client i, the layers behind it, and the final head.

        Its spec is ``server_spec(model, 0, optimizer)``.

        Raises:
          UserError: see `client` and `server`; or the layers behind it read the views
            of several clients.
        """
        if self.strategy.junction is not None:
            raise UserError(
                f"strategy: {self.config.strategy.strategy} has no network of one "
                "client, as its server reads the views of all; allowed are `client` "
                "and `server`"
            )
        client, server = self.client(i), self.server(i)
        return Branch(client.layers + server.layers, server.head)

    def plain_model(self) -> Model:
        """Build the network with the native convolution, see `build_model`."""
        return build_model(self.config, self.info, plain=True)


def restore(
    path: str | os.PathLike[str],
    which: str | int = "latest",
    *,
    only: int | None = None,
) -> Restored:
    """Read a checkpoint of a run.

    Args:
      path: the run's folder.
      which: the ``"latest"`` checkpoint, the ``"best"`` by mean server accuracy on the
        test set, or the round of another that the run has kept.
      only: a client's id, to read only the clients of its cut; all other leaves of the
        state are then ``...``. So are the clients of a run that kept them private.

    Raises:
      UserError: there is no such run or client, it is damaged or has no checkpoint,
        ``which`` is not allowed, or ``only`` asks for layers that are private.
    """
    folder = Path(path)
    config, info = read_config(folder), read_info(folder)
    checkpoint = checkpoint_of(folder, which)
    config = config_in_round(config, checkpoint.number)
    federation = build_federation(config, info)
    strategy = build_strategy(config, federation)
    like = jax.eval_shape(strategy.init, jax.random.key(0))
    if only is not None:
        check_layers(config)
        like = _of_group(like, federation.seat(only)[0])
    elif config.clients.keep_layers_private:
        like = like.replace(clients=jax.tree.map(lambda leaf: ..., like.clients))
    state = load(checkpoint, like)
    return Restored(config, info, federation, strategy, state)


def restore_client(
    path: str | os.PathLike[str], i: int, which: str | int = "latest"
) -> tuple[BranchSpec, Branch]:
    """Read a client's layers and exit; this reads only the clients of its cut.

    Args:
      path: see `restore`.
      i: the client's id.
      which: see `restore`.

    Returns:
      The first arguments of `forward` and `branch_step`, the spec and the branch:
      ``forward(*restore_client("run", 3), images, mask, train=False)``.
    """
    run = restore(path, which, only=i)
    return run.specs(i)[0], run.client(i)


def checkpoint_of(folder: Path, which: str | int) -> Checkpoint:
    """Choose a checkpoint of a run, see `restore`.

    Raises:
      UserError: the run has no checkpoint, or ``which`` is not allowed.
    """
    kept = sorted(find_places(folder / "checkpoints"))
    allowed = "latest", "best", *(str(rounds) for rounds, steps in kept if steps == 0)
    if str(which) not in allowed:
        raise unknown("checkpoint", which, allowed)
    checkpoint = find(folder / "checkpoints", str(which))
    if checkpoint is None:
        raise UserError(
            f"run: {folder} has no checkpoint; allowed is a run that has reached its "
            "first one (see checkpoint_every)"
        )
    return checkpoint


def check_read(part: PyTree) -> None:
    """Refuse a part of a state that was not read.

    Raises:
      UserError: it was left out.
    """
    if any(leaf is ... for leaf in jax.tree.leaves(part)):
        raise UserError(
            "only: the run was restored without these layers; allowed is `restore` "
            "without `only`"
        )


def _of_group(like: RunState, group: int) -> RunState:
    """Keep the round and the clients of one group; all other leaves become ``...``."""
    nothing: RunState = jax.tree.map(lambda leaf: ..., like)
    clients = list(nothing.clients)
    clients[group] = like.clients[group]
    return nothing.replace(round=like.round, clients=tuple(clients))
