"""A federation: branches, their steps, the cross-layer mean, state and strategies."""

from hsee_jax.federation.aggregation import LayerMean, layer_mean, receive
from hsee_jax.federation.branch import (
    EXITS,
    Branch,
    BranchSpec,
    LayerState,
    Outputs,
    client_spec,
    forward,
    forward_exits,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.federation.crossing import (
    decode,
    decode_gradient,
    encode,
    encode_for_evaluation,
    encode_gradient,
    gradient_bytes,
    message_bytes,
)
from hsee_jax.federation.federation import (
    Client,
    Federation,
    Group,
    clients_of,
    group_clients,
)
from hsee_jax.federation.fused import (
    TrainFn,
    detached_step,
    joint_step,
    train_on_labels,
)
from hsee_jax.federation.junction import Junction, concat_junction, mean_junction
from hsee_jax.federation.members import over_members
from hsee_jax.federation.recut import Exits, recut
from hsee_jax.federation.reduction import REDUCERS, ReduceFn, Reducer
from hsee_jax.federation.ridge import Sums, gram, merge, solve
from hsee_jax.federation.schedule import CutSchedule
from hsee_jax.federation.state import RunState
from hsee_jax.federation.step import (
    ForwardPass,
    ServerStep,
    branch_step,
    client_backward,
    client_forward,
    server_step,
)
from hsee_jax.federation.strategy import (
    HalvedTurn,
    Halves,
    InitStateFn,
    Reply,
    Sent,
    Served,
    StepFn,
    Strategy,
    TurnFn,
    average_layers,
    server_of,
)
from hsee_jax.federation.unlabelled import unlabelled_step

__all__ = [
    "EXITS",
    "REDUCERS",
    "Branch",
    "BranchSpec",
    "Client",
    "CutSchedule",
    "Exits",
    "Federation",
    "ForwardPass",
    "Group",
    "HalvedTurn",
    "Halves",
    "InitStateFn",
    "Junction",
    "LayerMean",
    "LayerState",
    "Outputs",
    "ReduceFn",
    "Reducer",
    "Reply",
    "RunState",
    "Sent",
    "Served",
    "ServerStep",
    "StepFn",
    "Strategy",
    "Sums",
    "TrainFn",
    "TurnFn",
    "average_layers",
    "branch_step",
    "client_backward",
    "client_forward",
    "client_spec",
    "clients_of",
    "concat_junction",
    "decode",
    "decode_gradient",
    "detached_step",
    "encode",
    "encode_for_evaluation",
    "encode_gradient",
    "forward",
    "forward_exits",
    "gradient_bytes",
    "gram",
    "group_clients",
    "init_client",
    "init_server",
    "joint_step",
    "layer_mean",
    "mean_junction",
    "merge",
    "message_bytes",
    "over_members",
    "receive",
    "recut",
    "server_of",
    "server_spec",
    "server_step",
    "solve",
    "train_on_labels",
    "unlabelled_step",
]
