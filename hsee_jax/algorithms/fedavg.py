"""FedAvg (McMahan et al., AISTATS 2017).

Every client trains the whole network on its own data; after every round all layers are
averaged, weighted by numbers of samples. The cut is behind the last layer; the exit
there is a probe that changes nothing.
"""

from hsee_jax.algorithms.compose import compose
from hsee_jax.algorithms.options import (
    Aggregate,
    BatchNorm,
    OptimizerState,
    TrimShare,
    Weights,
)
from hsee_jax.algorithms.properties import Properties
from hsee_jax.algorithms.registry import ALGORITHMS, cuts_of, require_full_link
from hsee_jax.core.errors import UserError
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy


@ALGORITHMS.register(summary="FedAvg: whole networks, averaged every round")
def fedavg(
    federation: Federation,
    *,
    weights: Weights = "samples",
    aggregate: Aggregate = "mean",
    trim_share: TrimShare = 0.0,
    batch_norm: BatchNorm = "auto",
    optimizer_state: OptimizerState = "keep",
) -> Strategy:
    """Average whole networks after every round.

    Raises:
      UserError: a cut is not behind the last layer, a codec is given though nothing
        crosses a link, or options contradict each other.
    """
    last = len(federation.model.layer_names)
    if {group.cut for group in federation.groups} != {last}:
        raise UserError(
            f"cuts: {cuts_of(federation)} is not allowed with fedavg, where clients "
            f"hold all layers; allowed is {last}"
        )
    require_full_link(federation, "fedavg")
    return compose(
        federation,
        Properties(
            shared=False,
            average="all_holders",
            boundary="none",
            weights=weights,
            aggregate=aggregate,
            trim_share=trim_share,
            batch_norm=batch_norm,
            optimizer_state=optimizer_state,
        ),
    )
