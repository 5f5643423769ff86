"""ResNet-18 against an implementation in PyTorch, written here and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch_networks import import_torch

from hsee_jax.core.types import Batch
from hsee_jax.federation.branch import (
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.federation.step import branch_step
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.nn.model import init_network, layer_inputs
from hsee_jax.nn.resnet import resnet18


def weights(model, seed=0):
    """Random weights of the right shapes, without compiling an initializer."""
    shapes = jax.eval_shape(lambda: init_network(model, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape, np.float32)
        if name in ("scale", "var"):
            return np.float32(1.0) + np.float32(0.1) * np.abs(noise)
        if name in ("bias", "mean"):
            return np.float32(0.1) * noise
        return noise * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameters_are_those_of_resnet18():
    """Convolutions and linear layer by hand, BatchNorm two a channel: 11,173,962."""
    model = resnet18(num_classes=10, input_shape=(32, 32, 3))
    network = jax.eval_shape(lambda: init_network(model, jax.random.key(0)))
    parameters = [v["params"] for v in (*network.layers, network.final_head)]
    assert count(parameters) == 11_173_962
    # 9*3*64+128, two blocks of 2*(9*64*64+128), 512*10+10
    sizes = [count(p) for p in parameters]
    assert sizes[:3] == [1_856, 73_984, 73_984]
    assert sizes[-1] == 5_130


def test_stems_and_shapes():
    """32 pixels stay 32, 96 become 24; every group but the first halves them."""
    small = layer_inputs(resnet18(num_classes=10, input_shape=(32, 32, 3), width=4))
    large = layer_inputs(resnet18(num_classes=10, input_shape=(96, 96, 3), width=4))
    assert [s.shape[1:] for s in small[1::2]] == [
        (32, 32, 4),
        (32, 32, 4),
        (16, 16, 8),
        (8, 8, 16),
        (4, 4, 32),
    ]
    assert [s.shape[1] for s in large[1::2]] == [24, 24, 12, 6, 3]


@jax.numpy_dtype_promotion("standard")  # Flax's BatchNorm relies on it
def test_bfloat16_keeps_parameters_statistics_and_losses_in_float32():
    model = resnet18(num_classes=10, input_shape=(8, 8, 1), width=2, dtype="bfloat16")
    network = weights(model)
    client = init_client(network, 3, optax.scale(-1.0))
    batch = Batch(
        jnp.ones((4, 8, 8, 1), jnp.float32), jnp.zeros(4, jnp.int32), jnp.ones(4, bool)
    )
    spec = client_spec(model, 3, optax.scale(-1.0))
    after, features, metrics = jax.jit(
        lambda c: branch_step(spec, c, batch, jnp.float32(0.1))
    )(client)
    assert features.dtype == jnp.bfloat16
    assert metrics.loss_sum.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}


def torch_resnet18(width, channels):
    torch = import_torch()
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before, after, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(after)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(after)
            self.down = None
            if stride != 1 or before != after:
                self.down = nn.Conv2d(before, after, 1, stride, bias=False)
                self.bn_down = nn.BatchNorm2d(after)

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            return torch.relu(
                y + (x if self.down is None else self.bn_down(self.down(x)))
            )

    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.bn = nn.BatchNorm2d(width)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)))

    layers, before = [Stem()], width
    for group in range(4):
        for block in range(2):
            after = width * 2**group
            layers.append(Block(before, after, 2 if group and not block else 1))
            before = after
    return nn.ModuleList(layers), nn.Linear(before, 10)


def pairs(layer, variables):
    """(PyTorch parameter or buffer, our leaf, whether it is a buffer) of a layer."""
    found = []
    params, stats = variables["params"], variables["batch_stats"]
    for name, leaves in params.items():
        module = getattr(layer, name)
        if "conv" in leaves:
            found.append((module.weight, leaves["conv"]["kernel"], (3, 2, 0, 1), False))
        else:
            found.append((module.weight, leaves["bn"]["scale"], None, False))
            found.append((module.bias, leaves["bn"]["bias"], None, False))
            running = stats[name]["bn"]
            found.append((module.running_mean, running["mean"], None, True))
            found.append((module.running_var, running["var"], None, True))
    return found


def distance(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("train", [False, True])
def test_logits_and_gradients_equal_pytorchs(train):
    torch = import_torch()
    model = resnet18(num_classes=10, input_shape=(32, 32, 3))
    network = weights(model)
    layers, linear = torch_resnet18(64, 3)

    def torch_layout(leaf, axes):
        return torch.tensor(np.asarray(leaf if axes is None else leaf.transpose(axes)))

    matched = [
        pair
        for layer, variables in zip(layers, network.layers, strict=True)
        for pair in pairs(layer, variables)
    ]
    head = network.final_head["params"]["linear"]
    matched += [
        (linear.weight, head["kernel"], (1, 0), False),
        (linear.bias, head["bias"], None, False),
    ]
    with torch.no_grad():
        for tensor, leaf, axes, _ in matched:
            tensor.copy_(torch_layout(leaf, axes))
    learned = sum(tensor.numel() for tensor, _, _, buffer in matched if not buffer)
    assert learned == 11_173_962

    # With some seeds rounding flips a ReLU, and gradients differ by a part in 100.
    rng = np.random.default_rng(2)
    images = rng.standard_normal((4, 32, 32, 3), np.float32)
    labels = np.array([3, 1, 4, 1], np.int32)
    layers.train(train)
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    for layer in layers:
        x = layer(x)
    torch_logits = linear(x.mean(dim=(2, 3)))
    torch.nn.functional.cross_entropy(
        torch_logits, torch.tensor(labels, dtype=torch.long)
    ).backward()

    branch = init_server(network, 0, optax.scale(-1.0))
    spec = server_spec(model, 0, optax.scale(-1.0))

    @jax.jit
    def loss(branch):
        mask = jnp.ones(4, bool)
        _, logits, _ = forward(spec, branch, images, mask, train=train)
        return masked_cross_entropy(logits, jnp.asarray(labels), mask)[0], logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(branch)
    assert distance(np.asarray(logits), torch_logits.detach().numpy()) < 1e-5
    variables = [
        {"params": layer.params, "batch_stats": layer.batch_stats}
        for layer in gradient.layers
    ]
    ours = [
        pair
        for layer, grads in zip(layers, variables, strict=True)
        for pair in pairs(layer, grads)
    ]
    head = gradient.head.params["linear"]
    ours += [
        (linear.weight, head["kernel"], (1, 0), False),
        (linear.bias, head["bias"], None, False),
    ]
    for tensor, leaf, axes, buffer in ours:
        if not buffer:
            mine = torch_layout(leaf, axes).numpy()
            assert distance(mine, tensor.grad.numpy()) < 1e-4
