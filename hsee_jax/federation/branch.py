"""A branch of the network: consecutive layers, a head, and their optimizer state.

A client is the branch of layers 1..cut with an exit head, its server the branch of
layers cut+1..L with the final head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from hsee_jax.core.errors import UserError, unknown
from hsee_jax.core.types import Array, PyTree, Stage, Variables
from hsee_jax.link.codecs import FULL, Codec
from hsee_jax.nn.model import Model, Network, layer_inputs
from hsee_jax.optim.optimizers import OptimizerLike


class BranchSpec(NamedTuple):
    """What a branch computes: some consecutive layers and a head."""

    stages: tuple[Stage, ...]  # may be empty: a server behind the last cut
    head: Stage
    optimizer: OptimizerLike  # of each layer by itself
    codec: Codec = FULL  # of the link: a client encodes with it, a server decodes
    input_dtype: Any = jnp.float32  # of what a server decodes
    micro_batches: int = 1  # in which `branch_step` takes a batch, see `accumulate`
    exits: tuple[Stage, ...] = ()  # further heads, behind the first layers in turn


class LayerState(struct.PyTreeNode):
    """A layer's weights and the optimizer state that belongs to them alone."""

    params: PyTree  # float32
    batch_stats: PyTree  # float32; empty without BatchNorm
    opt_state: PyTree


class Branch(struct.PyTreeNode):
    """The state of a branch: slicing a network is slicing the tuple."""

    layers: tuple[LayerState, ...]
    head: LayerState
    link: PyTree = ()  # a client's state of its codec; empty for most codecs
    exits: tuple[LayerState, ...] = ()  # see `BranchSpec`


EXITS = ("cut", "all")  # behind a client's last layer, or behind each of its layers


class Outputs(NamedTuple):
    """What the forward pass of a branch gives."""

    features: Array  # [B, ...], before the head
    logits: tuple[Array, ...]  # float32 [B, K] of each exit, and last of the head
    stats: tuple[PyTree, ...]  # new batch statistics, in the order of `parts_of`


def client_spec(
    model: Model,
    cut: int,
    optimizer: OptimizerLike,
    codec: Codec = FULL,
    micro_batches: int = 1,
    exits: str = "cut",
) -> BranchSpec:
    """Describe layers 1..cut and their exit head, or with ``"all"`` all exit heads.

    Raises:
      UserError: the network has no such cut.
    """
    layers = len(model.stages)
    if cut not in range(1, layers + 1):
        raise UserError(f"cut: {cut} is not allowed; allowed are 1..{layers}")
    return BranchSpec(
        model.stages[:cut],
        model.exit_heads[cut - 1],
        optimizer,
        codec,
        micro_batches=micro_batches,
        exits=model.exit_heads[: early_exits(cut, exits)],
    )


def early_exits(cut: int, exits: str) -> int:
    """Return how many exits a client has before its last; ``exits`` is of `EXITS`.

    Raises:
      UserError: it is not.
    """
    if exits not in EXITS:
        raise unknown("exits", exits, EXITS)
    return cut - 1 if exits == "all" else 0


def server_spec(
    model: Model, cut: int, optimizer: OptimizerLike, codec: Codec = FULL
) -> BranchSpec:
    """Describe layers cut+1..L and the final head; cut 0 is the whole network."""
    dtype = layer_inputs(model)[cut].dtype
    return BranchSpec(model.stages[cut:], model.final_head, optimizer, codec, dtype)


def init_client(
    network: Network,
    cut: int,
    optimizer: OptimizerLike,
    link: PyTree = (),
    exits: str = "cut",
) -> Branch:
    """Slice a client out of a network, with fresh optimizer state.

    Args:
      network: all weights.
      cut: of the client.
      optimizer: of each layer.
      link: the state of the client's codec, see `hsee_jax.link.Codec.init`.
      exits: one of `EXITS`.
    """
    early = network.exit_heads[: early_exits(cut, exits)]
    return Branch(
        tuple(_layer_state(v, optimizer) for v in network.layers[:cut]),
        _layer_state(network.exit_heads[cut - 1], optimizer),
        link,
        tuple(_layer_state(v, optimizer) for v in early),
    )


def init_server(network: Network, cut: int, optimizer: OptimizerLike) -> Branch:
    """Slice a server out of a network, with fresh optimizer state."""
    return Branch(
        tuple(_layer_state(v, optimizer) for v in network.layers[cut:]),
        _layer_state(network.final_head, optimizer),
    )


def _layer_state(variables: Variables, optimizer: OptimizerLike) -> LayerState:
    params = variables["params"]
    return LayerState(params, variables["batch_stats"], optimizer.init(params))


def parts_of(branch: Branch) -> tuple[LayerState, ...]:
    """Return the layers of a branch, its further exits, and last its head."""
    return (*branch.layers, *branch.exits, branch.head)


def with_parts(branch: Branch, parts: tuple[LayerState, ...]) -> Branch:
    """Return a branch with other parts; invert `parts_of`."""
    count = len(branch.layers)
    return branch.replace(
        layers=tuple(parts[:count]), exits=tuple(parts[count:-1]), head=parts[-1]
    )


def params_of(branch: Branch) -> tuple[PyTree, ...]:
    """Return the parameters of each of `parts_of`."""
    return tuple(part.params for part in parts_of(branch))


def with_params(branch: Branch, params: tuple[PyTree, ...]) -> Branch:
    """Return a branch with other parameters, one tree for each of `parts_of`."""
    pairs = zip(parts_of(branch), params, strict=True)
    return with_parts(branch, tuple(part.replace(params=p) for part, p in pairs))


def forward(
    spec: BranchSpec,
    branch: Branch,
    inputs: Array,
    mask: Array,
    *,
    train: bool,
    head_gradient: float = 1.0,
) -> tuple[Array, Array, tuple[PyTree, ...]]:
    """Run the layers and the head; see `forward_exits` for the arguments.

    Returns:
      Features before the head ``[B, ...]``, its logits ``float32 [B, K]``, and the new
      batch statistics of every part, the head's last.
    """
    features, logits, stats = forward_exits(
        spec, branch, inputs, mask, train=train, head_gradient=head_gradient
    )
    return features, logits[-1], stats


def forward_exits(
    spec: BranchSpec,
    branch: Branch,
    inputs: Array,
    mask: Array,
    *,
    train: bool,
    head_gradient: float = 1.0,
) -> Outputs:
    """Run the layers, all exits and the head.

    Args:
      spec: what the branch computes.
      branch: its weights.
      inputs: ``[B, ...]``: images, or for a server the decoded features.
      mask: ``bool [B]``, false on padding.
      train: whether BatchNorm uses the statistics of this batch, and updates its own.
      head_gradient: the share of the gradient of each head that reaches the layers.
    """
    behind, stats, logits = [], [], []
    for stage, layer in zip(spec.stages, branch.layers, strict=True):
        inputs, new = stage.apply(variables_of(layer), inputs, mask, train=train)
        behind.append(inputs)
        stats.append(new)
    for head, part, values in zip(
        (*spec.exits, spec.head),
        (*branch.exits, branch.head),
        (*behind[: len(spec.exits)], inputs),
        strict=True,
    ):
        seen = _scale_gradient(values, head_gradient)
        scores, new = head.apply(variables_of(part), seen, mask, train=train)
        logits.append(scores)
        stats.append(new)
    return Outputs(inputs, tuple(logits), tuple(stats))


def variables_of(layer: LayerState) -> Variables:
    """Return the weights and statistics of a layer, as a `Stage` reads them."""
    return {"params": layer.params, "batch_stats": layer.batch_stats}


def _scale_gradient(values: Array, share: float) -> Array:
    """Return the same values; a gradient that flows back through them is scaled."""
    if share == 1.0:
        return values
    fixed = jax.lax.stop_gradient(values)
    return fixed if share == 0.0 else fixed + share * (values - fixed)
