"""A step of a client and of its server in one program, for a simulation."""

from collections.abc import Callable

from hsee_jax.core.types import Array, Batch, ExitMetrics, Metrics
from hsee_jax.federation.branch import Branch, BranchSpec
from hsee_jax.federation.crossing import (
    decode,
    decode_gradient,
    encode,
    encode_gradient,
    message_bytes,
)
from hsee_jax.federation.step import (
    branch_step,
    client_backward,
    client_forward,
    server_step,
)

# A client's spec, state, batch and learning rate -> the client, the batch of features
# that it sends, and the metrics of its exit.
TrainFn = Callable[[BranchSpec, Branch, Batch, Array], tuple[Branch, Batch, Metrics]]


def train_on_labels(
    spec: BranchSpec, client: Branch, batch: Batch, learning_rate: Array
) -> tuple[Branch, Batch, Metrics]:
    """Take a client's `branch_step`, and send the features of all rows.

    Args:
      spec: what the client computes.
      client: its state.
      batch: its data, ``[B, ...]``.
      learning_rate: ``float32 []``.

    Returns:
      The new state, the batch with detached features as inputs, and the metrics of the
      exit before the update.
    """
    client, features, metrics = branch_step(spec, client, batch, learning_rate)
    return client, batch._replace(inputs=features), metrics


def detached_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
    *,
    train: TrainFn = train_on_labels,
    distill: float = 0.0,
) -> tuple[Branch, Branch, ExitMetrics]:
    """Take one step of a client and of its server; no gradient crosses the cut.

    Args:
      client_spec: what the client computes.
      server_spec: what its server computes.
      client: layers 1..cut and the exit head.
      server: layers cut+1..L and the final head.
      batch: the client's data.
      learning_rates: of the client and of the server, ``float32 []`` each.
      train: the client's step where it does not wait for the server, such as
        `unlabelled_step`; it says which rows go on to the server.
      distill: the temperature of the server's logits, from which the exit learns; with
        0 it does not, and the client does not wait for the server.

    Returns:
      The new client, the new server, and the metrics of both before their updates, on
      the rows that went on.
    """
    if distill:
        return _answered_step(
            client_spec,
            server_spec,
            client,
            server,
            batch,
            learning_rates,
            joint=False,
            exit_gradient=1.0,
            distill=distill,
        )
    client, rows, exit_metrics = train(client_spec, client, batch, learning_rates[0])
    message, client = encode(client_spec, client, rows.inputs, rows.mask)
    decoded = rows._replace(inputs=decode(server_spec, message))
    served = server_step(server_spec, server, decoded, learning_rates[1])
    link = message_bytes(client_spec, message, rows.mask)
    return client, served.server, ExitMetrics(exit_metrics, served.metrics, link)


def joint_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
    *,
    exit_gradient: float = 0.0,
    distill: float = 0.0,
) -> tuple[Branch, Branch, ExitMetrics]:
    """Take one step like `detached_step`, but send the server's gradient back.

    Args:
      client_spec: see `detached_step`, like all arguments but ``exit_gradient``.
      server_spec: what the server computes.
      client: layers 1..cut and the exit head.
      server: layers cut+1..L and the final head.
      batch: the client's data.
      learning_rates: of the client and of the server, ``float32 []`` each.
      exit_gradient: the share of the exit's gradient that reaches the client's layers.
        With 0 the exit head is a probe, and the layers train as if it were not there;
        with 1 both cross-entropies are summed, as in BranchyNet (Teerapittayanon et
        al., ICPR 2016).
      distill: see `detached_step`; the share of the exit's gradient is that of both its
        losses.

    Returns:
      The new client, the new server, and the metrics of both before their updates.
    """
    return _answered_step(
        client_spec,
        server_spec,
        client,
        server,
        batch,
        learning_rates,
        joint=True,
        exit_gradient=exit_gradient,
        distill=distill,
    )


def _answered_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
    *,
    joint: bool,
    exit_gradient: float,
    distill: float,
) -> tuple[Branch, Branch, ExitMetrics]:
    """Take one step in which the client waits for what the server sends back."""
    passed = client_forward(
        client_spec, client, batch, exit_gradient=exit_gradient, distill=distill
    )
    message, client = encode(client_spec, client, passed.features, batch.mask)
    decoded = batch._replace(inputs=decode(server_spec, message))
    served = server_step(server_spec, server, decoded, learning_rates[1], joint=joint)
    back, arrived, logits = None, None, served.logits if distill else None
    if served.gradient is not None:
        back = encode_gradient(client_spec, client, served.gradient, batch.mask)
        arrived = decode_gradient(client_spec, back, served.gradient.dtype)
    client, exit_metrics = client_backward(
        client_spec,
        client,
        passed,
        learning_rates[0],
        arrived,
        logits,
        distill=distill,
    )
    link = message_bytes(client_spec, message, batch.mask, back, logits)
    return client, served.server, ExitMetrics(exit_metrics, served.metrics, link)
