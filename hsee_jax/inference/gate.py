"""Gated inference: the exit answers what it is sure of, the server the rest.

A batch goes through the client's layers and exit. Samples whose uncertainty is below a
threshold are answered there (BranchyNet, Teerapittayanon et al., ICPR 2016; the gate of
Hetero-SplitEE is the entropy). The features of the others are gathered and padded to
one of a few static sizes, and only they run on the server. BatchNorm uses its running
statistics, so neither the padding nor the company of a sample changes its answer.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import Array
from hsee_jax.nn.losses import predictive_entropy
from hsee_jax.federation.branch import Branch, BranchSpec, forward

_SIZES = 8  # of the parts of a batch that the server runs on


class Criterion(NamedTuple):
    """How unsure an exit is: the lower the surer, so that all compare alike."""

    uncertainty: Callable[[Array], Array]  # logits float32 [B, K] -> float32 [B]
    largest: Callable[[int], float]  # that it can be with K classes


def _highest(logits: Array, count: int) -> Array:
    chex.assert_rank(logits, 2)
    return jax.lax.top_k(jax.nn.softmax(logits), count)[0]


def _doubt(logits: Array) -> Array:
    """1 minus the highest probability."""
    return 1.0 - _highest(logits, 1)[:, 0]


def _closeness(logits: Array) -> Array:
    """1 minus the margin, that of the highest probability over the second."""
    first, second = _highest(logits, 2).T
    return 1.0 - (first - second)


CRITERIA = {
    "entropy": Criterion(predictive_entropy, math.log),  # in nats
    "confidence": Criterion(_doubt, lambda classes: 1 - 1 / classes),
    "margin": Criterion(_closeness, lambda classes: 1.0),
}


class Answers(NamedTuple):
    """What a client, and the server behind it, answer to a batch; on the host."""

    logits: npt.NDArray[np.float32]  # [B, K]: the server's where it was asked
    exited: npt.NDArray[np.bool_]  # [B]: answered by the exit
    exit_logits: npt.NDArray[np.float32]  # [B, K]
    uncertainty: npt.NDArray[np.float32]  # [B]: of the exit

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """The classes, [B]."""
        return self.logits.argmax(axis=-1)


class Gate(NamedTuple):
    """The two compiled parts of a gated inference, and both together."""

    # (client, inputs [B, ...]) -> features on the device, with at least B rows, and
    # exit logits [B, K] and uncertainty [B] on the host
    on_client: Callable[[Branch, Array], tuple[Array, npt.NDArray, npt.NDArray]]
    # (server, features, rows int [R]) -> logits [R, K] of those rows, on the host
    on_server: Callable[[Branch, Array, npt.NDArray[np.int64]], npt.NDArray]

    def answer(
        self, client: Branch, server: Branch, inputs: Array, threshold: float
    ) -> Answers:
        """Answers a batch.

        Args:
          client: layers 1..cut and the exit head.
          server: layers cut+1..L and the final head.
          inputs: ``float32 [B, ...]``, at most a whole batch, see `make_gate`.
          threshold: an uncertainty below it is answered by the exit: with 0 all go to
            the server, above the criterion's largest value none does.
        """
        features, exit_logits, uncertainty = self.on_client(client, inputs)
        exited = uncertainty < threshold
        (sent,) = np.nonzero(~exited)
        logits = exit_logits.copy()
        if len(sent):
            logits[sent] = self.on_server(server, features, sent)
        return Answers(logits, exited, exit_logits, uncertainty)


def make_gate(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    *,
    batch_size: int,
    criterion: str = "entropy",
    sizes: Sequence[int] | None = None,
) -> Gate:
    """Compiles gated inference for the clients of one cut.

    The client's part is compiled once, the server's once for each size that occurs.

    Args:
      client_spec: what the client computes.
      server_spec: what its server computes.
      batch_size: B; a smaller batch is padded to it.
      criterion: of `CRITERIA`.
      sizes: the numbers of rows that the server runs on, up to B; None is the eighths
        of B. Those that are sent are padded to the next one.
    """
    if sizes is None:
        sizes = [-(-batch_size * part // _SIZES) for part in range(1, _SIZES + 1)]
    uncertainty_of = CRITERIA[criterion].uncertainty

    @jax.jit
    def client_part(client: Branch, inputs: Array, mask: Array) -> tuple[Array, ...]:
        features, logits, _ = forward(client_spec, client, inputs, mask, train=False)
        return features, logits, uncertainty_of(logits)

    @jax.jit
    def server_part(server: Branch, features: Array, rows: Array, mask: Array) -> Array:
        return forward(server_spec, server, features[rows], mask, train=False)[1]

    def on_client(
        client: Branch, inputs: Array
    ) -> tuple[Array, npt.NDArray, npt.NDArray]:
        count = len(inputs)
        if not 1 <= count <= batch_size:
            raise ValueError(f"inputs: {count} rows; allowed are 1..{batch_size}")
        if count < batch_size:
            shape = (batch_size, *inputs.shape[1:])
            inputs = np.resize(inputs, shape)  # type: ignore[assignment]
        mask = np.arange(batch_size) < count
        features, *on_host = client_part(client, inputs, mask)
        logits, uncertainty = jax.device_get(on_host)
        return features, logits[:count], uncertainty[:count]

    def on_server(
        server: Branch, features: Array, rows: npt.NDArray[np.int64]
    ) -> npt.NDArray:
        count = len(rows)
        size = min(size for size in sizes if size >= count)
        mask = np.arange(size) < count
        padded = np.resize(rows, size).astype(np.int32)
        return jax.device_get(server_part(server, features, padded, mask))[:count]

    return Gate(on_client, on_server)
