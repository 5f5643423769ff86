"""The public names of the package, in one place to load them from.

`hsee_jax` loads this file at the first use of one of them, so that ``import hsee_jax``
and ``hsee --help`` take no time.
"""
# ruff: noqa: F401

from hsee_jax.aggregate import LayerMean, layer_mean, receive
from hsee_jax.augment import InputPipeline
from hsee_jax.base import (
    Batch,
    Dataset,
    DivergenceError,
    ExitMetrics,
    Metrics,
    Stage,
    Stopped,
    UserError,
)
from hsee_jax.compose import compose
from hsee_jax.config import Config, override, preset
from hsee_jax.engine import make_round
from hsee_jax.evaluate import ClientResult, make_evaluation
from hsee_jax.experiment import Experiment, build
from hsee_jax.export import export_client
from hsee_jax.federation import (
    Client,
    Federation,
    Group,
    RunState,
    Strategy,
    group_clients,
    server_of,
)
from hsee_jax.inference import Answers, Gate, make_gate
from hsee_jax.losses import masked_cross_entropy, predictive_entropy
from hsee_jax.mesh import make_mesh, place_blocks
from hsee_jax.model import Model, Network, from_linen, init_network, resnet18
from hsee_jax.plan import RoundPlan, plan_round
from hsee_jax.restored import Restored, restore, restore_client
from hsee_jax.runs import train
from hsee_jax.split import (
    Branch,
    BranchSpec,
    LayerState,
    branch_step,
    client_spec,
    detached_step,
    forward,
    init_client,
    init_server,
    joint_step,
    server_spec,
)
from hsee_jax.strategies import (
    averaging,
    centralized,
    fedavg,
    local,
    sequential,
    splitfed_v1,
    splitfed_v2,
)
