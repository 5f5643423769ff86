"""Optimizers at rate 1, and rules for their state when a layer is averaged.

An optimizer follows optax's convention: it is built at rate 1, and a step adds the
learning rate times its updates to the parameters, so ``optax.adam(1.0)`` and
``optax.sgd(1.0, momentum=0.9)`` work as they are. The rate is passed into every step:
in the sequential strategy deep server layers take more updates in a step than shallow
layers, so a counter inside the optimizer would let their schedules drift apart.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias

import jax
import optax

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import at_least, share
from hsee_jax.core.registry import Registry
from hsee_jax.core.types import PyTree


class UpdateFn(Protocol):
    """Computes the updates of one step."""

    def __call__(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Turn gradients into updates for rate 1, and return them with the new state.

        ``extra`` holds ``learning_rate``, ``float32 []``.
        """


class Merge(NamedTuple):
    """A rule for the optimizer state of each holder when a layer is averaged."""

    # State -> a tree of bool, true for the leaves that are averaged over the holders.
    shared: Callable[[PyTree], PyTree]
    # Parameters before, their mean, and the state with the mean of its shared leaves
    # -> the new state. A holder that missed means gets only some of them before it
    # takes part again; without steps since the last, its state must depend on the
    # newest mean alone, or a checkpoint changes the training.
    merge: Callable[[PyTree, PyTree, PyTree], PyTree]
    # Whether `merge` also changes the state of a BatchNorm that stays local; there the
    # mean of the parameters is the holder's own value.
    local_too: bool = False


class Optimizer(NamedTuple):
    """An optax optimizer with a rule for averaging."""

    init: Callable[[PyTree], PyTree]
    update: UpdateFn
    merge: Merge
    # The update of layers that are never averaged; None for `update`.
    update_alone: UpdateFn | None = None

    @property
    def follows_averages(self) -> bool:
        """Return whether its momentum comes from the averages of a layer."""
        return self.update_alone is not None


OptimizerLike: TypeAlias = Optimizer | optax.GradientTransformation


def no_leaves(state: PyTree) -> PyTree:
    """Mark no leaf of an optimizer's state; for `Merge.shared`."""
    return jax.tree.map(lambda _: False, state)


def _everything(state: PyTree) -> PyTree:
    return jax.tree.map(lambda _: True, state)


KEEP = Merge(no_leaves, lambda old, mean, state: state)


def as_optimizer(optimizer: OptimizerLike) -> Optimizer:
    """Add to an optax optimizer the rule that each holder keeps its own state."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    extended = optax.with_extra_args_support(optimizer)
    return Optimizer(extended.init, extended.update, KEEP)


# Factories take an `Optimizer`.
MERGES: Registry[Merge] = Registry("optimizer_state", with_options=False, pure=True)


@MERGES.register(summary="the rule of the optimizer: each holder keeps its own state")
def keep(optimizer: Optimizer) -> Merge:
    """Follow the optimizer's rule: with sgd and adamw each holder keeps its state."""
    return optimizer.merge


@MERGES.register(summary="the mean over the holders, as for the layer")
def average(optimizer: Optimizer) -> Merge:
    """Average the whole state."""
    return Merge(_everything, KEEP.merge)


@MERGES.register(summary="the initial state")
def reset(optimizer: Optimizer) -> Merge:
    """Initialize the state again, from the mean parameters."""
    return Merge(no_leaves, lambda old, mean, state: optimizer.init(mean))


def with_merge(optimizer: OptimizerLike, name: str) -> Optimizer:
    """Return an optimizer with another rule for averaging, one of `MERGES`.

    Raises:
      UserError: there is no such rule, or the optimizer needs its own.
    """
    own = as_optimizer(optimizer)
    if own.follows_averages and name != "keep":
        raise UserError(
            f"optimizer_state: {name} is not allowed with an optimizer whose momentum "
            "comes from the averages; allowed is keep"
        )
    return own._replace(merge=MERGES.make(name, own))


def counts_steps(optimizer: OptimizerLike, params: PyTree) -> bool:
    """Return whether a state has leaves for all parameters at once, as Adam's count."""
    state = jax.eval_shape(optimizer.init, params)
    common = optax.tree_map_params(
        optimizer, lambda _: None, state, transform_non_params=lambda leaf: leaf
    )
    return bool(jax.tree.leaves(common))


def alone(optimizer: OptimizerLike) -> Optimizer:
    """Return the optimizer to use for layers that are never averaged."""
    own = as_optimizer(optimizer)
    return own._replace(update=own.update_alone or own.update)


def descend(direction: optax.GradientTransformation) -> Optimizer:
    """Build an optimizer that steps against a direction, such as ``optax.trace``."""
    extended = optax.with_extra_args_support(direction)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, state = extended.update(updates, state, params, **extra)
        return jax.tree.map(lambda u: -u, updates), state

    return Optimizer(extended.init, update, KEEP)


def _decays(params: PyTree) -> PyTree:
    """Mark leaves of two axes or more that are not called bias, so not BatchNorm."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = getattr(path[-1], "key", None) if path else None
        return leaf.ndim > 1 and name != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def add_decay(updates: PyTree, params: PyTree, weight_decay: float) -> PyTree:
    """Add ``weight_decay`` times the parameters, where `_decays` marks them."""
    return jax.tree.map(
        lambda u, p, decays: u + weight_decay * p if decays else u,
        updates,
        params,
        _decays(params),
    )


Momentum = Annotated[
    float, "share of the momentum that each step adds to its gradient", share
]
Decay = Annotated[float, "weight decay, except on biases and BatchNorm", at_least(0)]

# Factories take only their options.
OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", pure=True)
register = OPTIMIZERS.register


@OPTIMIZERS.register(summary="gradient descent with momentum")
def sgd(
    *,
    momentum: Momentum = 0.9,
    weight_decay: Decay = 5e-4,
) -> Optimizer:
    """Build SGD with heavy-ball momentum at rate 1."""
    decay = optax.add_decayed_weights(weight_decay, mask=_decays)
    return descend(optax.chain(decay, optax.trace(momentum)))


@OPTIMIZERS.register(summary="Adam with decoupled weight decay")
def adamw(*, weight_decay: Decay = 5e-4) -> Optimizer:
    """Build AdamW (Loshchilov and Hutter, ICLR 2019) at rate 1."""
    decay = optax.add_decayed_weights(weight_decay, mask=_decays)
    return descend(optax.chain(optax.scale_by_adam(), decay))
