"""Gated inference: the exit answers the easy samples, the server answers the others.

A batch passes through the client's layers and its exit. The exit answers the samples
with an uncertainty below a threshold (BranchyNet, Teerapittayanon et al., ICPR 2016;
Hetero-SplitEE gates by entropy); of several exits, the earliest that is so sure. The
features of the other samples are gathered and padded to one of a few static sizes, and
the server runs only on them. BatchNorm uses its running statistics, so a sample's
answer depends neither on the padding nor on the other samples of its batch.

Where several clients see one event, each in its own way, the exit of one of them
answers if it is sure; if not, the server answers from the views of all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Array
from hsee_jax.federation.branch import Branch, BranchSpec, forward, forward_exits
from hsee_jax.federation.crossing import decode, encode_for_evaluation
from hsee_jax.federation.junction import Junction, finite_views
from hsee_jax.inference.criteria import CRITERIA, Criterion, uncertainty_of
from hsee_jax.link.codecs import Message
from hsee_jax.nn.losses import predicted_class

_PARTS = 8  # equal parts of a batch; the server runs on one to eight of them

# (client, inputs [B, ...]) -> the message on the device, with at least B rows, and
# logits [B, E, K] and uncertainty [B, E] of the E exits on the host.
ClientFn = Callable[[Branch, Array], tuple[Message, npt.NDArray, npt.NDArray]]
# (server, message, rows int [R]) -> logits [R, K] of these rows, on the host. With a
# junction the leaves of the message are those of all clients, [N, B, ...].
ServerFn = Callable[[Branch, Message, npt.NDArray[np.int64]], npt.NDArray]


class Answers(NamedTuple):
    """The answers of a client and the server behind it to a batch, on the host."""

    logits: npt.NDArray[np.float32]  # [B, K]: of the server where it ran, or the exit
    exited: npt.NDArray[np.bool_]  # [B]: whether an exit answered
    exit_logits: npt.NDArray[np.float32]  # [B, K]: of the last exit
    uncertainty: npt.NDArray[np.float32]  # [B]: of this exit; inf: logits not finite
    # The same of the E - 1 exits before it: [B, E - 1, K] and [B, E - 1].
    early_logits: npt.NDArray[np.float32]
    early_uncertainty: npt.NDArray[np.float32]
    # [B]: the exit that answered, from 0; E - 1 where none did.
    exit: npt.NDArray[np.int64]

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """Return the classes, ``[B]``; -1 where a logit is not finite."""
        return predicted_class(self.logits)


class Gate(NamedTuple):
    """The two compiled parts of a gated inference, and a method that runs both."""

    on_client: ClientFn
    on_server: ServerFn

    def answer(
        self, client: Branch, server: Branch, inputs: Array, threshold: float
    ) -> Answers:
        """Answer a batch.

        Args:
          client: layers 1..cut and their exits.
          server: layers cut+1..L and the final head.
          inputs: normalised, ``float32 [B, ...]``, at most a whole batch, see
            `make_gate` and `hsee_jax.data.normalize`.
          threshold: the earliest exit with an uncertainty below it answers. With 0
            all samples go to the server; above the criterion's largest value only the
            samples with exit logits that are not finite go there.

        Raises:
          ValueError: there are no inputs, or more than a whole batch.
          UserError: the criterion gives a negative uncertainty.
        """
        message, of_exits, uncertainty = self.on_client(client, inputs)
        return _gated(
            of_exits,
            uncertainty,
            threshold,
            lambda rows: self.on_server(server, message, rows),
        )

    def answer_events(
        self,
        clients: Sequence[Branch],
        server: Branch,
        views: Sequence[Array],
        threshold: float,
        *,
        asked: int,
    ) -> Answers:
        """Answer a batch of events that all clients see; for a gate with a junction.

        Args:
          clients: all of them; only the exit of one is asked.
          server: all that the server holds, also its mixer.
          views: of each client, see the inputs of `answer`.
          threshold: see `answer`.
          asked: the position of the client whose exit is asked.

        Raises:
          ValueError: see `answer`.
          UserError: see `answer`.
        """
        message, of_exits, uncertainty = self.on_client(clients[asked], views[asked])

        def from_all(rows: npt.NDArray[np.int64]) -> npt.NDArray:
            messages = [
                message if n == asked else self.on_client(client, inputs)[0]
                for n, (client, inputs) in enumerate(zip(clients, views, strict=True))
            ]
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *messages)
            return self.on_server(server, stack, rows)

        return _gated(of_exits, uncertainty, threshold, from_all)


def make_gate(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    *,
    batch_size: int,
    criterion: str = "entropy",
    sizes: Sequence[int] | None = None,
    junction: Junction | None = None,
) -> Gate:
    """Compile gated inference for the clients of one cut.

    The client's part is compiled once, the server's once for each size that occurs.

    Args:
      client_spec: what the client computes.
      server_spec: what its server computes.
      batch_size: B; a smaller batch is padded to B rows.
      criterion: a name in `CRITERIA`.
      sizes: the numbers of rows that the server runs on, one of them B; the samples
        that go to the server are padded to the next size. None for the eighths of B.
      junction: of the strategy, see `Gate.answer_events`; None where each client is
        answered by itself.

    Raises:
      ValueError: B is not among the sizes.
      UserError: there is no such criterion.
    """
    if sizes is None:
        sizes = [-(-batch_size * part // _PARTS) for part in range(1, _PARTS + 1)]
    if batch_size not in sizes:
        raise ValueError(f"sizes: {sizes}; the batch size {batch_size} is missing")
    return Gate(
        _client_part(client_spec, CRITERIA.make(criterion), batch_size),
        _server_part(server_spec, sizes, junction),
    )


def _gated(
    of_exits: npt.NDArray[np.float32],
    uncertainty: npt.NDArray[np.float32],
    threshold: float,
    answer_rows: Callable[[npt.NDArray[np.int64]], npt.NDArray],
) -> Answers:
    """Take the answer of the earliest sure exit, or of the server where there is none.

    Args:
      of_exits: logits ``[B, E, K]``.
      uncertainty: ``[B, E]``.
      threshold: see `Gate.answer`.
      answer_rows: the server's logits of some rows.

    Raises:
      UserError: an uncertainty is negative, so threshold 0 would not send all samples.
    """
    finite = np.isfinite(uncertainty)
    if (finite & (uncertainty < 0)).any():
        raise UserError(
            f"criterion: an uncertainty of {uncertainty[finite].min():.3g} is not "
            "allowed; allowed are criteria with values of 0 or more"
        )
    # In float64, where the thresholds were chosen.
    sure = finite & (uncertainty < np.float64(threshold))
    exited, last = np.any(sure, axis=1), sure.shape[1] - 1
    number = np.where(exited, sure.argmax(axis=1), last)
    (rows,) = np.nonzero(~exited)
    logits = of_exits[np.arange(len(number)), number]
    if len(rows):
        logits[rows] = answer_rows(rows)
    return Answers(
        logits,
        exited,
        of_exits[:, last],
        uncertainty[:, last],
        of_exits[:, :last],
        uncertainty[:, :last],
        number,
    )


def _client_part(spec: BranchSpec, criterion: Criterion, batch_size: int) -> ClientFn:
    """Compile the client's layers, exits and uncertainty for batches of one size."""

    @jax.jit
    def run(client: Branch, inputs: Array, mask: Array) -> tuple[Array, ...]:
        features, logits, _ = forward_exits(spec, client, inputs, mask, train=False)
        message = encode_for_evaluation(spec, client, features, mask)
        uncertainty = [uncertainty_of(criterion, own) for own in logits]
        return message, jnp.stack(logits, axis=1), jnp.stack(uncertainty, axis=1)

    def on_client(
        client: Branch, inputs: Array
    ) -> tuple[Message, npt.NDArray, npt.NDArray]:
        count = len(inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            raise ValueError(
                f"inputs: {inputs.dtype} is not allowed; allowed are samples in "
                "float32, which an InputPipeline has normalised"
            )
        if not 1 <= count <= batch_size:
            raise ValueError(f"inputs: {count} rows; allowed are 1..{batch_size}")
        if count < batch_size:
            inputs = np.resize(inputs, (batch_size, *inputs.shape[1:]))  # type: ignore
        mask = np.arange(batch_size) < count
        message, *rest = run(client, inputs, mask)
        logits, uncertainty = jax.device_get(rest)
        return message, logits[:count], uncertainty[:count]

    return on_client


def _server_part(
    spec: BranchSpec, sizes: Sequence[int], junction: Junction | None
) -> ServerFn:
    """Compile the server's layers and final head for some numbers of rows."""
    wide = spec if junction is None else junction.widen(spec)

    @jax.jit
    def run(server: Branch, message: Message, rows: Array, mask: Array) -> Array:
        def read(message: Message) -> Array:
            return decode(spec, jax.tree.map(lambda leaf: leaf[rows], message))

        if junction is None:
            features = read(message)
        else:
            views = jax.vmap(read)(message)
            features = junction.merge(views, finite_views(views, mask[None]))
        return forward(wide, server, features, mask, train=False)[1]

    def on_server(
        server: Branch, message: Message, rows: npt.NDArray[np.int64]
    ) -> npt.NDArray:
        size = min(size for size in sizes if size >= len(rows))
        mask = np.arange(size) < len(rows)
        indices = np.resize(rows, size).astype(np.int32)
        return jax.device_get(run(server, message, indices, mask))[: len(rows)]

    return on_server
