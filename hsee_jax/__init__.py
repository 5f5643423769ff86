"""Heterogeneous split learning with early exits, in JAX and Flax.

The method is Hetero-SplitEE (Oda et al., arXiv:2512.09313): clients keep the layers of
one network up to a cut of their own, and an exit head there; a server trains the rest.
"""

from hsee_jax.federation.aggregation import LayerMean, layer_mean, receive
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.core.types import Batch, Dataset, ExitMetrics, Metrics, Stage
from hsee_jax.core.errors import DivergenceError, Stopped, UserError
from hsee_jax.algorithms.compose import compose
from hsee_jax.config.schema import Config, override
from hsee_jax.config.presets import preset
from hsee_jax.engine import make_round
from hsee_jax.engine.evaluation import ClientResult, make_evaluation
from hsee_jax.runs.build import Experiment, build
from hsee_jax.deployment.export import export_client
from hsee_jax.federation.federation import Client, Federation, Group, group_clients
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy, server_of
from hsee_jax.inference.gate import Answers, Gate, make_gate
from hsee_jax.nn.losses import masked_cross_entropy, predictive_entropy
from hsee_jax.parallel.mesh import make_mesh, place_blocks
from hsee_jax.nn.model import Model, Network, from_linen, init_network
from hsee_jax.nn.resnet import resnet18
from hsee_jax.engine.plan import RoundPlan, plan_round
from hsee_jax.runs.restore import Restored, restore, restore_client
from hsee_jax.runs.train import train
from hsee_jax.federation.branch import Branch, BranchSpec, LayerState, client_spec, forward, init_client, init_server, server_spec
from hsee_jax.federation.step import branch_step, detached_step, joint_step
from hsee_jax.algorithms.hetero_splitee import averaging, centralized, fedavg, local, sequential, splitfed_v1, splitfed_v2

__all__ = [
    "Answers",
    "Batch",
    "Branch",
    "BranchSpec",
    "Client",
    "ClientResult",
    "Config",
    "Dataset",
    "DivergenceError",
    "ExitMetrics",
    "Experiment",
    "Federation",
    "Gate",
    "Group",
    "InputPipeline",
    "LayerMean",
    "LayerState",
    "Metrics",
    "Model",
    "Network",
    "Restored",
    "RoundPlan",
    "RunState",
    "Stage",
    "Stopped",
    "Strategy",
    "UserError",
    "averaging",
    "branch_step",
    "build",
    "centralized",
    "client_spec",
    "compose",
    "detached_step",
    "export_client",
    "fedavg",
    "forward",
    "from_linen",
    "group_clients",
    "init_client",
    "init_network",
    "init_server",
    "joint_step",
    "layer_mean",
    "local",
    "make_evaluation",
    "make_gate",
    "make_mesh",
    "make_round",
    "masked_cross_entropy",
    "override",
    "place_blocks",
    "plan_round",
    "predictive_entropy",
    "preset",
    "receive",
    "resnet18",
    "restore",
    "restore_client",
    "sequential",
    "server_of",
    "server_spec",
    "splitfed_v1",
    "splitfed_v2",
    "train",
]
