"""The interactions of columns in the network of a run on a table."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Option, at_least
from hsee_jax.core.types import Array
from hsee_jax.data.pipeline import normalize
from hsee_jax.federation.branch import forward, server_spec
from hsee_jax.nn.interactions import Function, Interaction, select_interactions
from hsee_jax.runs.data import OwnData
from hsee_jax.runs.reopen import samples_of
from hsee_jax.runs.restore import Restored, restore

_MAX_SAMPLES = Option("max_samples", int, 500, rules=(at_least(2),))


class Interactions(NamedTuple):
    """The strongest interactions in the network of a client."""

    client: int
    rounds: int  # of training
    samples: int  # rows of the client that gave the scores
    # Of the logits over these rows, summed over the classes.
    variance: float
    chosen: tuple[Interaction, ...]

    def share(self, one: Interaction) -> float:
        """Return the share of the variance that an interaction explains."""
        return one.score / self.variance if self.variance > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the figures as values of JSON."""
        return {
            **self._replace(chosen=())._asdict(),
            "chosen": [
                {"columns": one.columns, "score": one.score, "share": self.share(one)}
                for one in self.chosen
            ],
        }


def find_interactions(
    folder: str | os.PathLike[str],
    client: int = 0,
    *,
    max_order: int = 2,
    count: int = 10,
    max_samples: int = 500,
    which: str | int = "latest",
    data_dir: str | None = None,
    data: OwnData | None = None,
) -> Interactions:
    """Score the interactions in a client's network and choose the strongest.

    The network is that of the client and of the server behind it, up to the final
    logits. The mean of the logits over the classes is subtracted, as it changes no
    answer. The rows are training samples of this client alone, and the baseline of a
    row is another of these rows.

    Args:
      folder: of a run on a table.
      client: its id.
      max_order: see `select_interactions`.
      count: see `select_interactions`.
      max_samples: rows to score with, at most.
      which: the checkpoint, see `restore`.
      data_dir: see `reopen`.
      data: see `reopen`.

    Raises:
      UserError: see `restore` and `select_interactions`; or there is no such client,
        its samples are not rows of a table, or fewer than two; its layers are private,
        or its server reads the views of several clients; ``max_samples`` is not a whole
        number of 2 or more; or its data are missing, or differ from the data of the
        run.
    """
    max_samples = _MAX_SAMPLES.checked(max_samples)
    run = restore(folder, which)
    if len(run.info.input_shape) != 1:
        raise UserError(
            f"run: {folder} has samples of {list(run.info.input_shape)}; allowed are "
            "rows of a table, [F]"
        )
    logits = _logits(run, client)
    rows = samples_of(run, folder, client, data_dir=data_dir, data=data).images
    if len(rows) < 2:
        raise UserError(f"client: {client} has 1 sample; allowed are 2 or more")
    order = np.random.default_rng(0).permutation(len(rows))[:max_samples]
    x = np.asarray(normalize(jnp.asarray(rows[order]), run.info.mean, run.info.std))
    chosen = select_interactions(
        logits, x, np.roll(x, 1, axis=0), max_order=max_order, count=count
    )
    variance = float(np.var(np.asarray(logits(x), np.float64), axis=0).sum())
    return Interactions(client, int(run.state.round), len(x), variance, chosen)


def _logits(run: Restored, client: int) -> Function:
    """Return the logits ``[M, K]`` of rows, without their mean over the classes."""
    federation = run.federation
    spec = server_spec(federation.model, 0, federation.optimizer)
    network = run.network(client)

    @jax.jit
    def logits(x: Array) -> Array:
        found = forward(spec, network, x, jnp.ones(len(x), bool), train=False)[1]
        return found - found.mean(axis=1, keepdims=True)

    return logits
