"""A sum of small networks of few columns each, for tables: SIAN.

After sparse interaction additive networks (Enouen and Liu, NeurIPS 2022,
arXiv:2209.09326): the logits are a sum over sets of columns S, and each term is a
perceptron that reads the columns of S alone. Here layer k holds the sets of k columns,
so a client's cut is the order of its interactions: 1 for a generalised additive model,
2 with pairs, and so on. This division into layers is ours, and so is the rest:

* Behind layer k the features are the sum so far, K numbers, and the columns of the
  table that a later layer reads. These columns cross the link like any feature.
* Each exit, and the final head, is a linear layer on the sum.
* Every term starts at 0, so a new layer does not change the answer of the layers before
  it.
* The sum over the n sets of a layer is divided by the root of n. A step of an optimizer
  then moves the logits equally far for few sets and for many.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import at_least
from hsee_jax.core.types import Array, Key
from hsee_jax.nn.interactions import Columns, parse_interaction
from hsee_jax.nn.mlp import Hidden
from hsee_jax.nn.model import Model, cached_stage
from hsee_jax.nn.registry import NETWORKS, tables_only

Sets = tuple[tuple[Columns, ...], ...]  # the sets of 1 column, of 2 columns, ...

_MOST_SETS = 10_000  # of a network, unless the user lists its sets


class BlockDense(nn.Module):
    """A linear layer for each of n terms: ``[B, n, k] -> float32 [B, n, features]``.

    This is a dense layer whose matrix has n blocks on its diagonal, and 0 elsewhere.
    """

    features: int
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Run the layers."""
        count, size = x.shape[1:]
        init = nn.initializers.he_normal(batch_axis=0)
        kernel = self.param("kernel", init, (count, size, self.features))
        bias = self.param("bias", self.bias_init, (count, self.features))
        return jnp.einsum("bnk,nkh->bnh", x, kernel) + bias[None]


class Terms(nn.Module):
    """The terms of one order: ``[B, S + C] -> float32 [B, K + C']``.

    A term is a perceptron of two hidden layers on its own columns. The biases of the
    first hidden layer start at random values, so that the function bends at different
    points.

    The inputs are a sum of terms, S numbers, and C columns; S is 0 in the first layer.
    The outputs are the sum with the terms of this layer, and C' of the columns.
    """

    sets: tuple[Columns, ...]  # places among the C columns
    rest: Columns  # places of the C' columns among the C
    sums: int  # S
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the layer; rows do not mix, so the mask is not needed."""
        del mask, train
        total, columns = x[:, : self.sums], x[:, self.sums :]
        y = columns[:, np.array(self.sets)]  # [B, n, k]
        bends = nn.initializers.normal(1.0)
        y = nn.relu(BlockDense(self.hidden, bends, name="dense1")(y))
        y = nn.relu(BlockDense(self.hidden, name="dense2")(y))
        y = y.reshape(y.shape[0], -1) / math.sqrt(len(self.sets))
        zeros = nn.initializers.zeros
        own = nn.Dense(self.classes, use_bias=False, kernel_init=zeros, name="sum")(y)
        rest = columns[:, np.array(self.rest, int)]
        return jnp.concatenate([total + own if self.sums else own, rest], axis=1)


class SumHead(nn.Module):
    """A linear layer on the sum of the terms: ``[B, K + C] -> float32 [B, K]``."""

    classes: int

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Run the head."""
        del mask, train
        total = x[:, : self.classes]
        return nn.Dense(self.classes, kernel_init=_identity, name="linear")(total)


def _identity(key: Key, shape: Sequence[int], dtype: jnp.dtype) -> Array:
    del key
    return jnp.eye(shape[0], shape[1], dtype=dtype)


@NETWORKS.register(
    summary="a sum of small networks of 1, 2, ... columns, for tables [F]"
)
@tables_only
def sian(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    order: Annotated[
        int,
        "most columns in an interaction, and so the number of layers and of cuts",
        at_least(1),
    ] = 2,
    interactions: Annotated[
        tuple[str, ...],
        "interactions as COLUMN,COLUMN,..., counted from 0; without them, all sets of "
        "up to --order columns; --interactions-file reads them from a file",
    ] = (),
    hidden: Hidden = 16,
) -> Model:
    """Build a sum of networks of few columns, with an exit after each order.

    Args:
      num_classes: K.
      input_shape: ``(F,)``.
      order: the number of layers, which are named ``order1``, ``order2`` and so on.
      interactions: sets of two columns or more, such as ``("0,1", "0,1,4")``; see
        `select_interactions`. Every single column has a term in any case.
      hidden: values in the two hidden layers of each term.

    Raises:
      UserError: an interaction does not name columns; the interactions do not have
        every number of columns from 2 to ``order``; without interactions, ``order`` is
        more than F, or there are more than 10,000 sets; or the samples are not rows of
        a table.
    """
    (num_columns,) = input_shape
    if interactions:
        sets = _sets_of(interactions, order, num_columns)
    else:
        sets = _all_sets(order, num_columns)
    layers, columns = [], tuple(range(num_columns))
    for number, own in enumerate(sets):
        later = itertools.chain.from_iterable(sets[number + 1 :])
        rest = tuple(sorted(set(itertools.chain.from_iterable(later))))
        place = {column: at for at, column in enumerate(columns)}
        layers.append(
            Terms(
                sets=tuple(tuple(place[column] for column in one) for one in own),
                rest=tuple(place[column] for column in rest),
                sums=num_classes if number else 0,
                hidden=hidden,
                classes=num_classes,
            )
        )
        columns = rest
    head = cached_stage(SumHead(num_classes))
    return Model(
        stages=tuple(map(cached_stage, layers)),
        exit_heads=(head,) * order,
        final_head=head,
        layer_names=tuple(f"order{number + 1}" for number in range(order)),
        input_shape=tuple(input_shape),
    )


def _all_sets(order: int, num_columns: int) -> Sets:
    """Return all sets of 1 to ``order`` columns."""
    orders = range(1, order + 1)
    count = sum(math.comb(num_columns, size) for size in orders)
    if order > num_columns:
        raise UserError(
            f"order: {order} is not allowed for a table of {num_columns} columns; "
            f"allowed is 1..{num_columns}"
        )
    if count > _MOST_SETS:
        raise UserError(
            f"order: {order} of {num_columns} columns gives {count:,} interactions; "
            f"allowed are {_MOST_SETS:,}; choose some with `hsee interactions`, and "
            "give them as --interactions"
        )
    return tuple(
        tuple(itertools.combinations(range(num_columns), size)) for size in orders
    )


def _sets_of(interactions: Sequence[str], order: int, num_columns: int) -> Sets:
    """Return all single columns, and the given sets by their number of columns."""
    found = sorted({parse_interaction(text, num_columns) for text in interactions})
    sizes = {len(columns) for columns in found}
    if sizes != set(range(2, order + 1)):
        raise UserError(
            f"order: {order} is not allowed with interactions of "
            f"{' and '.join(map(str, sorted(sizes)))} columns; allowed is the largest "
            "number of columns, with interactions of each number from 2 to it"
        )
    larger = (tuple(c for c in found if len(c) == size) for size in sorted(sizes))
    return (tuple((column,) for column in range(num_columns)), *larger)
