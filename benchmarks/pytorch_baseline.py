"""Hetero-SplitEE in idiomatic PyTorch: the baseline for the speed of `hsee_jax`.

It is the same algorithm as in `hsee_jax`: a client trains its layers on its exit's
loss, the server trains the rest on the detached features, and in `averaging` the
replicas of each server layer are averaged after the round, including BatchNorm. A
Python loop runs the clients as eager modules in channels_last; on a GPU with autocast
to bfloat16, the fused optimizer and cuDNN's autotuner; `torch.compile` is an option.
Images stay on the device as uint8, and batches are gathered there. Metrics leave the
device once a round.

It takes its first weights from a `RunState`, so that its losses can be compared. Shards
are equal and hold whole batches, so every mean is unweighted. The running variance is
unbiased, unlike Flax's; no loss of training depends on it.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from hsee_jax.core.types import Dataset
from hsee_jax.federation import Branch, Group, RunState

torch.set_num_threads(len(os.sched_getaffinity(0)))
torch.backends.cudnn.benchmark = True
Tensor = torch.Tensor
LossFn = Callable[["TorchBranch", Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Stem(nn.Module):
    """A 3x3 convolution, BatchNorm and ReLU."""

    def __init__(self, channels: int, width: int) -> None:
        """Take the channels of the image and of the output."""
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stem."""
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        """Take the channels of the input and of the output."""
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.down: nn.Module = nn.Identity()
        self.bn_down: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.down = nn.Conv2d(before, after, 1, stride, bias=False)
            self.bn_down = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        shortcut = self.bn_down(self.down(x))
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class Head(nn.Module):
    """A global average pool and a linear layer."""

    def __init__(self, features: int, classes: int) -> None:
        """Take the channels of the input and the number of classes."""
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Run the head."""
        return self.linear(x.mean(dim=(2, 3), dtype=torch.float32))


class TorchBranch(nn.Module):
    """Consecutive layers and a head."""

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module) -> None:
        """Hold the given modules; other branches may hold them as well."""
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = head


class Setting(NamedTuple):
    """The settings of the baseline."""

    device: str = "cpu"
    bfloat16: bool = False  # autocast
    compile: bool = False  # torch.compile of every forward and backward pass
    compile_mode: str = "default"
    channels_last: bool = True
    momentum: float = 0.9
    weight_decay: float = 5e-4


def branch_loss(
    branch: TorchBranch, x: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a branch's mean cross-entropy, and its detached logits and features."""
    features = branch.layers(x)
    logits = branch.head(features)
    loss = functional.cross_entropy(logits, labels)
    return loss, logits.detach(), features.detach()


class TorchFederation:
    """All clients and servers, and the data, on a device."""

    def __init__(
        self,
        state: RunState,
        groups: Sequence[Group],
        data: Dataset,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        setting: Setting,
    ) -> None:
        """Copy weights and data.

        Args:
          state: the state before the first round; with one shared server the strategy
            is `sequential`.
          groups: the clients.
          data: the training samples.
          mean: the mean of each channel, on the scale 0..1.
          std: the standard deviation of each channel, on the scale 0..1.
          setting: the settings.
        """
        self.setting = setting
        self.shared = len(state.servers) == 1 and len(_shape(state.servers[0])) == 1
        self.images = torch.tensor(np.asarray(data.images), device=setting.device)
        self.labels = torch.tensor(
            np.asarray(data.labels), dtype=torch.long, device=setting.device
        )
        self.mean = torch.tensor(mean, device=setting.device)
        self.std = torch.tensor(std, device=setting.device)
        self.loss = _loss_fn(setting)
        self.cuts = [group.cut for group in groups for _ in group.ids]
        first = [
            (g, m) for g, group in enumerate(groups) for m in range(len(group.ids))
        ]
        state = jax.device_get(state)
        self.clients = [self._module(_member(state.clients[g], m)) for g, m in first]
        self.client_sgd = [self._sgd(client) for client in self.clients]
        if self.shared:
            server = self._module(state.servers[0])
            lowest = groups[0].cut
            views = {
                group.cut: TorchBranch(
                    list(server.layers)[group.cut - lowest :], server.head
                )
                for group in groups
            }
            self.servers = [views[cut] for cut in self.cuts]
            # SGD skips a layer without gradient, including its momentum and decay.
            self.server_sgd = [self._sgd(server)] * len(self.cuts)
        else:
            self.servers = [
                self._module(_member(state.servers[g], m)) for g, m in first
            ]
            self.server_sgd = [self._sgd(server) for server in self.servers]

    def run_round(
        self,
        indices: npt.NDArray[np.int32],
        order: npt.NDArray[np.int32],
        learning_rate: float,
    ) -> npt.NDArray[np.float64]:
        """Train a round.

        Args:
          indices: the samples of each step and client, ``[T, N, B]``.
          order: the clients' turns in each step, ``[T, N]``.
          learning_rate: the learning rate of the whole round.

        Returns:
          For each client the sums over the round of the exit's and the server's losses,
          and of their right answers, ``[N, 4]``.
        """
        device = self.setting.device
        rows = torch.tensor(indices, dtype=torch.long).to(device, non_blocking=True)
        totals = torch.zeros((len(self.clients), 4), device=device)
        for optimizer in (*self.client_sgd, *self.server_sgd):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        for step, turns in enumerate(order.tolist()):
            for n in turns:
                totals[n] += self._turn(n, rows[step, n])
        if not self.shared:
            self._average()
        return totals.double().cpu().numpy()

    def _turn(self, n: int, rows: Tensor) -> Tensor:
        """Train a client on a batch, and the server on the features that it sends."""
        x, labels = self._batch(rows)
        features, exit_loss, exit_right = self._step(
            self.clients[n], self.client_sgd[n], x, labels
        )
        _, loss, right = self._step(
            self.servers[n], self.server_sgd[n], features, labels
        )
        return torch.stack((exit_loss, loss, exit_right, right))

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = (self.images[rows].float() / 255.0 - self.mean) / self.std
        x = x.permute(0, 3, 1, 2)  # a view of channels_last
        return x if self.setting.channels_last else x.contiguous(), self.labels[rows]

    def _step(
        self, branch: TorchBranch, sgd: torch.optim.SGD, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step; return detached features, loss sum and number of hits."""
        sgd.zero_grad(set_to_none=True)
        kind = torch.device(self.setting.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.setting.bfloat16):
            loss, logits, features = self.loss(branch, x, labels)
        loss.backward()
        sgd.step()
        right = (logits.argmax(1) == labels).sum()
        return features, loss.detach() * len(labels), right

    @torch.no_grad()
    def _average(self) -> None:
        """Set every server layer to the mean over its replicas."""
        holders: dict[int, list[nn.Module]] = {}
        for cut, server in zip(self.cuts, self.servers, strict=True):
            for i, layer in enumerate((*server.layers, server.head)):
                holders.setdefault(cut + i, []).append(layer)
        for layers in holders.values():
            for copies in zip(*map(_numbers, layers), strict=True):
                mean = torch.stack(copies).mean(0)
                torch._foreach_copy_(list(copies), [mean] * len(copies))

    def _module(self, branch: Branch) -> TorchBranch:
        """Return a branch as modules on the device."""
        layers = [_layer(state) for state in branch.layers]
        module = TorchBranch(layers, _layer(branch.head))
        if self.setting.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.to(self.setting.device).train()

    def _sgd(self, module: nn.Module) -> torch.optim.SGD:
        """Make heavy-ball SGD that decays only matrices and convolutions."""
        weights = list(module.parameters())
        sgd = torch.optim.SGD(
            [
                {
                    "params": [w for w in weights if w.ndim > 1],
                    "weight_decay": self.setting.weight_decay,
                },
                {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
            ],
            lr=0.0,
            momentum=self.setting.momentum,
            fused=True,
        )
        for w in weights:  # without it, a layer that joins late breaks the fused update
            sgd.state[w]["momentum_buffer"] = torch.zeros_like(w)
        return sgd


def _loss_fn(setting: Setting) -> LossFn:
    """Return `branch_loss`, compiled once for each cut if the setting says so."""
    if not setting.compile:
        return branch_loss
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # one for each cut and part
    mode = None if setting.compile_mode == "default" else setting.compile_mode
    return torch.compile(branch_loss, fullgraph=True, dynamic=False, mode=mode)


def _shape(branch: Branch) -> tuple[int, ...]:
    """Return the shape of a head's bias: ``[K]``, or ``[G, K]`` in a stack."""
    return branch.head.params["linear"]["bias"].shape


def _member(stack: Branch, member: int) -> Branch:
    return jax.tree.map(lambda leaf: leaf[member], stack)


def _numbers(layer: nn.Module) -> list[Tensor]:
    """Return parameters and running statistics."""
    buffers = [b for b in layer.buffers() if b.is_floating_point()]
    return [*layer.parameters(), *buffers]


def _layer(state: Any) -> nn.Module:
    """Make the module of a layer or head, with its weights."""
    params, stats = state.params, state.batch_stats
    if "linear" in params:
        layer: nn.Module = Head(*params["linear"]["kernel"].shape)
    elif "conv" in params:
        layer = Stem(*params["conv"]["conv"]["kernel"].shape[2:])
    else:
        before, after = params["conv1"]["conv"]["kernel"].shape[2:]
        # In ResNet-18 a block has stride 2 exactly where it has a 1x1 convolution.
        layer = BasicBlock(before, after, 2 if "down" in params else 1)
    with torch.no_grad():
        for name, leaves in params.items():
            _load(getattr(layer, name), leaves, stats.get(name, {}))
    return layer


def _load(module: nn.Module, leaves: Any, stats: Any) -> None:
    """Copy the weights of a convolution, a BatchNorm or a linear layer."""
    if "conv" in leaves:
        values = {"weight": np.transpose(leaves["conv"]["kernel"], (3, 2, 0, 1))}
    elif "bn" in leaves:
        values = {
            "weight": leaves["bn"]["scale"],
            "bias": leaves["bn"]["bias"],
            "running_mean": stats["bn"]["mean"],
            "running_var": stats["bn"]["var"],
        }
    else:
        values = {"weight": np.transpose(leaves["kernel"]), "bias": leaves["bias"]}
    for name, value in values.items():
        getattr(module, name).copy_(torch.tensor(np.ascontiguousarray(value)))


def allow_tf32(allowed: bool) -> None:
    """Set whether float32 products may be computed in TF32, as JAX does by default."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def matmul_chain(
    size: int, chain: int, device: str, *, bfloat16: bool
) -> Callable[[], None]:
    """Return a function that computes ``chain`` products of square matrices."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    values = (torch.randn(size, size, device=device) / size**0.5).to(dtype)

    def run() -> None:
        a = values
        for _ in range(chain):
            a = a @ values
        a[0, 0].item()  # waits

    return run
