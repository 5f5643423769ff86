"""A branch of the network, and the one step that trains it.

A client is the branch of layers 1..cut with an exit head, its server the branch of
layers cut+1..L with the final head. Both are trained by `branch_step`, each on its own
head's cross-entropy, and nothing flows back over the cut: the hierarchical training of
Hetero-SplitEE (Oda et al., arXiv:2512.09313).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from hsee_jax.base import Array, Batch, ExitMetrics, Metrics, PyTree, Stage, Variables
from hsee_jax.link import cross
from hsee_jax.losses import masked_cross_entropy
from hsee_jax.model import Model, Network


class BranchSpec(NamedTuple):
    """What a branch computes: some consecutive layers and a head."""

    stages: tuple[Stage, ...]  # may be empty: a server behind the last cut
    head: Stage
    optimizer: optax.GradientTransformation  # of each layer; see `Federation`
    link: str = "full"  # that its inputs come over, see `hsee_jax.link`


class LayerState(struct.PyTreeNode):
    """A layer's weights and the optimizer state that belongs to them alone."""

    params: PyTree  # float32
    batch_stats: PyTree  # float32; empty without BatchNorm
    opt_state: PyTree


class Branch(struct.PyTreeNode):
    """The state of a branch: slicing a network is slicing the tuple."""

    layers: tuple[LayerState, ...]
    head: LayerState


def client_spec(
    model: Model, cut: int, optimizer: optax.GradientTransformation
) -> BranchSpec:
    """Layers 1..cut and their exit head."""
    return BranchSpec(model.stages[:cut], model.exit_heads[cut - 1], optimizer)


def server_spec(
    model: Model, cut: int, optimizer: optax.GradientTransformation, link: str = "full"
) -> BranchSpec:
    """Layers cut+1..L and the final head.

    Args:
      model: L layers.
      cut: of the clients.
      optimizer: of each layer.
      link: that the features come over, see `hsee_jax.link`.
    """
    return BranchSpec(model.stages[cut:], model.final_head, optimizer, link)


def _layer_state(
    variables: Variables, optimizer: optax.GradientTransformation
) -> LayerState:
    params = variables["params"]
    return LayerState(params, variables["batch_stats"], optimizer.init(params))


def init_client(
    network: Network, cut: int, optimizer: optax.GradientTransformation
) -> Branch:
    """The client's slice of a network, with fresh optimizer state."""
    return Branch(
        tuple(_layer_state(v, optimizer) for v in network.layers[:cut]),
        _layer_state(network.exit_heads[cut - 1], optimizer),
    )


def init_server(
    network: Network, cut: int, optimizer: optax.GradientTransformation
) -> Branch:
    """The server's slice of a network, with fresh optimizer state."""
    return Branch(
        tuple(_layer_state(v, optimizer) for v in network.layers[cut:]),
        _layer_state(network.final_head, optimizer),
    )


def forward(
    spec: BranchSpec,
    branch: Branch,
    inputs: Array,
    mask: Array,
    *,
    train: bool,
    head_gradient: float = 1.0,
) -> tuple[Array, Array, tuple[PyTree, ...]]:
    """Runs the layers and the head.

    Args:
      spec: what the branch computes.
      branch: its weights.
      inputs: ``[B, ...]``, as they are before they cross the link.
      mask: ``bool [B]``, false on padding.
      train: whether BatchNorm uses, and updates, the statistics of this batch.
      head_gradient: the share of the head's gradient that reaches the layers.

    Returns:
      Features before the head ``[B, ...]``, logits ``float32 [B, K]``, and the new
      batch statistics of every layer, the head's last.
    """
    stats = []
    inputs = cross(inputs, spec.link)
    for stage, layer in zip(spec.stages, branch.layers, strict=True):
        inputs, new = stage.apply(_variables(layer), inputs, mask, train=train)
        stats.append(new)
    seen = _scale_gradient(inputs, head_gradient)
    logits, new = spec.head.apply(_variables(branch.head), seen, mask, train=train)
    return inputs, logits, (*stats, new)


def _scale_gradient(values: Array, share: float) -> Array:
    """The same values; a gradient that flows back through them is scaled."""
    if share == 1.0:
        return values
    fixed = jax.lax.stop_gradient(values)
    return fixed if share == 0.0 else fixed + share * (values - fixed)


def branch_step(
    spec: BranchSpec, branch: Branch, batch: Batch, learning_rate: Array
) -> tuple[Branch, Array, Metrics]:
    """One step on the branch's own cross-entropy.

    A step whose loss, gradients or batch statistics are not finite is not taken: the
    branch stays as it is, and the loss in the metrics is NaN.

    Args:
      spec: what the branch computes.
      branch: its state. A batch of padding alone leaves it exactly as it is.
      batch: inputs ``[B, ...]``, labels and mask.
      learning_rate: ``float32 []``.

    Returns:
      The new state, the features of this very forward pass ``[B, ...]``, detached, and
      the metrics of the head before the update.
    """

    def loss_fn(params: PyTree) -> tuple[Array, tuple]:
        return _loss(spec, _with_params(branch, params), batch)

    grads, (features, stats, metrics) = jax.grad(loss_fn, has_aux=True)(_params(branch))
    taken, refused = _judge(metrics.count, (metrics.loss_sum, grads, stats))
    branch = _update(spec, branch, grads, stats, learning_rate, taken)
    return branch, jax.lax.stop_gradient(features), _without_loss(metrics, refused)


def detached_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
) -> tuple[Branch, Branch, ExitMetrics]:
    """One step of a client and of the server behind it; no gradient crosses the cut.

    Args:
      client_spec: what the client computes.
      server_spec: what its server computes.
      client: layers 1..cut and the exit head.
      server: layers cut+1..L and the final head.
      batch: the client's data.
      learning_rates: of the client and of the server, ``float32 []`` each.
    """
    client, features, exit_metrics = branch_step(
        client_spec, client, batch, learning_rates[0]
    )
    server, _, server_metrics = branch_step(
        server_spec, server, batch._replace(inputs=features), learning_rates[1]
    )
    return client, server, ExitMetrics(exit_metrics, server_metrics)


def joint_step(
    client_spec: BranchSpec,
    server_spec: BranchSpec,
    client: Branch,
    server: Branch,
    batch: Batch,
    learning_rates: tuple[Array, Array],
    *,
    exit_gradient: float = 0.0,
) -> tuple[Branch, Branch, ExitMetrics]:
    """Like `detached_step`, but the server's gradient flows back to the client.

    The step is taken by both or, if anything is not finite, by none.

    Args:
      client_spec: see `detached_step`, as all but:
      server_spec: what its server computes.
      client: layers 1..cut and the exit head.
      server: layers cut+1..L and the final head.
      batch: the client's data.
      learning_rates: of the client and of the server, ``float32 []`` each.
      exit_gradient: the share of the exit's gradient that reaches the client's layers.
        With 0 the exit head is a probe, and the layers train as if it were not there;
        with 1 both cross-entropies are summed, as in BranchyNet (Teerapittayanon et
        al., ICPR 2016).
    """

    def loss_fn(params: tuple[PyTree, PyTree]) -> tuple[Array, tuple]:
        exit_loss, exit_aux = _loss(
            client_spec, _with_params(client, params[0]), batch, exit_gradient
        )
        server_loss, server_aux = _loss(
            server_spec,
            _with_params(server, params[1]),
            batch._replace(inputs=exit_aux[0]),
        )
        return exit_loss + server_loss, (exit_aux, server_aux)

    (exit_grads, server_grads), (exit_aux, server_aux) = jax.grad(
        loss_fn, has_aux=True
    )((_params(client), _params(server)))
    metrics = ExitMetrics(exit_aux[2], server_aux[2])
    losses = (metrics.exit.loss_sum, metrics.server.loss_sum)
    results = (losses, exit_grads, server_grads, exit_aux[1], server_aux[1])
    taken, refused = _judge(metrics.exit.count, results)
    return (
        _update(client_spec, client, exit_grads, exit_aux[1], learning_rates[0], taken),
        _update(
            server_spec, server, server_grads, server_aux[1], learning_rates[1], taken
        ),
        ExitMetrics(*(_without_loss(branch, refused) for branch in metrics)),
    )


def _variables(layer: LayerState) -> Variables:
    return {"params": layer.params, "batch_stats": layer.batch_stats}


def _layers(branch: Branch) -> tuple[LayerState, ...]:
    return (*branch.layers, branch.head)


def _params(branch: Branch) -> tuple[PyTree, ...]:
    return tuple(layer.params for layer in _layers(branch))


def _with_params(branch: Branch, params: tuple[PyTree, ...]) -> Branch:
    *layers, head = (
        layer.replace(params=p)
        for layer, p in zip(_layers(branch), params, strict=True)
    )
    return Branch(tuple(layers), head)


def _loss(
    spec: BranchSpec, branch: Branch, batch: Batch, head_gradient: float = 1.0
) -> tuple[Array, tuple[Array, tuple[PyTree, ...], Metrics]]:
    features, logits, stats = forward(
        spec, branch, batch.inputs, batch.mask, train=True, head_gradient=head_gradient
    )
    loss, metrics = masked_cross_entropy(logits, batch.labels, batch.mask)
    return loss, (features, stats, metrics)


def _judge(count: Array, results: PyTree) -> tuple[Array, Array]:
    """Whether a step is taken, and whether it is refused; neither without a sample.

    Args:
      count: samples, ``int32 []``.
      results: what must be finite, of any shapes.

    Returns:
      Two ``bool []``.
    """
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(results)]
    finite = jnp.all(jnp.stack(checks))
    return (count > 0) & finite, (count > 0) & ~finite


def _without_loss(metrics: Metrics, refused: Array) -> Metrics:
    """Metrics of a step, marked if it was refused."""
    return metrics._replace(loss_sum=jnp.where(refused, jnp.nan, metrics.loss_sum))


def _update(
    spec: BranchSpec,
    branch: Branch,
    grads: tuple[PyTree, ...],
    stats: tuple[PyTree, ...],
    learning_rate: Array,
    taken: Array,
) -> Branch:
    """Moves every layer by its own optimizer, or none unless ``taken``, bool []."""

    def move(layer: LayerState, grad: PyTree, batch_stats: PyTree) -> LayerState:
        updates, opt_state = spec.optimizer.update(grad, layer.opt_state, layer.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, layer.params, updates)
        moved = LayerState(params, batch_stats, opt_state)
        return jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, layer)

    *layers, head = map(move, _layers(branch), grads, stats)
    return Branch(tuple(layers), head)
