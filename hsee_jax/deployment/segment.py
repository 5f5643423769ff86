"""A client's layers and exit as a function of samples, to export it as a program."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import optax

from hsee_jax.core.types import Array
from hsee_jax.data.info import DatasetInfo
from hsee_jax.data.pipeline import normalize
from hsee_jax.federation.branch import Branch, BranchSpec, forward_exits
from hsee_jax.inference.criteria import CRITERIA, uncertainty_of
from hsee_jax.nn.model import Model

# Of a client and its samples [b, ...]: logits, uncertainty and features, by name.
Segment = Callable[[Branch, Array], dict[str, Array]]


def up_to(model: Model, cut: int) -> Model:
    """Return the network of a client: the layers up to its cut, and its exit."""
    return model._replace(
        stages=model.stages[:cut],
        exit_heads=model.exit_heads[:cut],
        final_head=model.exit_heads[cut - 1],
        layer_names=model.layer_names[:cut],
    )


def make_segment(
    client: Model, info: DatasetInfo, criterion: str, early: int = 0
) -> Segment:
    """Make the function of a client.

    Args:
      client: its network, see `up_to`.
      info: on the data.
      criterion: the uncertainty of its exits.
      early: how many exits it has before the last; the names of their outputs end in
        the number of the layer before them.
    """
    spec = BranchSpec(
        client.stages,
        client.final_head,
        optax.identity(),
        exits=client.exit_heads[:early],
    )
    uncertainty = partial(uncertainty_of, CRITERIA.make(criterion))

    def segment(branch: Branch, images: Array) -> dict[str, Array]:
        mask = jnp.ones(images.shape[:1], bool)
        inputs = normalize(images, info.mean, info.std)
        features, logits, _ = forward_exits(spec, branch, inputs, mask, train=False)
        answers = {
            "logits": logits[-1],
            "uncertainty": uncertainty(logits[-1]),
            "features": features,
        }
        for number, own in enumerate(logits[:-1], start=1):
            answers[f"logits_{number}"] = own
            answers[f"uncertainty_{number}"] = uncertainty(own)
        return answers

    return segment
