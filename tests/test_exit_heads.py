"""The exits with convolutions of their own, against NumPy, and in a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_resnet import SHORT_RESNET

from hsee_jax import cli, restore
from hsee_jax.federation.last_layer import find_last
from hsee_jax.nn import ConvHead, from_linen, masked_cross_entropy, resnet18
from hsee_jax.systems import layer_costs

CLASSES, CHANNELS, PIXELS, ROWS, REAL = 3, 4, 5, 6, 4
HEAD = from_linen(ConvHead(CLASSES, jnp.dtype("float32"), "auto"))
SLOW = pytest.mark.slow
MASK = jnp.arange(ROWS) < REAL


def inputs(padding=0.0):
    x = np.random.default_rng(0).normal(size=(ROWS, PIXELS, PIXELS, CHANNELS))
    x[REAL:] = padding
    return jnp.asarray(x, jnp.float32)


def variables(seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: HEAD.init(jax.random.key(0), inputs()))

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key in ("scale", "var"):
            noise = 1 + 0.1 * abs(noise)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def convolution(x, kernel, stride):
    """A sum over the places of the window, with zeros around the image."""
    size = len(kernel)
    x = np.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2, (0, 0)))
    count = (x.shape[1] - size) // stride + 1
    y = np.zeros((len(x), count, count, kernel.shape[-1]))
    for i in range(count):
        for j in range(count):
            window = x[:, i * stride :, j * stride :][:, :size, :size]
            y[:, i, j] = np.einsum("bhwc,hwcf->bf", window, kernel)
    return y


def reference(x, own, train):
    """Logits of the real rows, and the new running means of the last BatchNorm."""
    x = np.asarray(x, np.float64)[:REAL]
    params, stats = jax.tree.map(np.float64, (own["params"], own["batch_stats"]))
    for number, stride in ((1, 1), (2, 2), (3, 1)):
        x = convolution(x, params[f"conv{number}"]["conv"]["kernel"], stride)
        running, layer = stats[f"bn{number}"]["bn"], params[f"bn{number}"]["bn"]
        mean, var = running["mean"], running["var"]
        if train:
            mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        moved = 0.9 * running["mean"] + 0.1 * mean
        x = (x - mean) / np.sqrt(var + 1e-5) * layer["scale"] + layer["bias"]
        x = np.maximum(x, 0)
    linear = params["head"]["linear"]
    return x.mean(axis=(1, 2)) @ linear["kernel"] + linear["bias"], moved


@pytest.mark.parametrize("train", [True, False])
def test_the_head_is_what_numpy_computes_and_padding_does_not_leak(train):
    own = variables()
    expected, moved = reference(inputs(), own, train)
    results = [
        HEAD.apply(own, inputs(padding), MASK, train=train) for padding in (0.0, 1e3)
    ]
    for logits, stats in results:
        np.testing.assert_allclose(logits[:REAL], expected, rtol=1e-4, atol=1e-4)
        if train:
            np.testing.assert_allclose(stats["bn3"]["bn"]["mean"], moved, rtol=1e-4)
    assert own["params"]["conv3"]["conv"]["kernel"].shape == (1, 1, 2, 2 * CHANNELS)


@SLOW
@pytest.mark.parametrize("conv", ["patches", "auto"])
def test_stacked_heads_are_looped_heads(conv):
    """Gradients of two clients with weights of their own, side by side and alone."""
    head = from_linen(ConvHead(CLASSES, jnp.dtype("float32"), conv))
    labels = jnp.arange(ROWS, dtype=jnp.int32) % CLASSES

    def loss(params, stats):
        own = {"params": params, "batch_stats": stats}
        logits = head.apply(own, inputs(), MASK, train=True)[0]
        return masked_cross_entropy(logits, labels, MASK)[0]

    both = [variables(seed) for seed in (0, 1)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    stacked = jax.vmap(jax.grad(loss))(stack["params"], stack["batch_stats"])
    for k, own in enumerate(both):
        alone = jax.grad(loss)(own["params"], own["batch_stats"])
        jax.tree.map(
            lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-3, atol=1e-5),
            stacked,
            alone,
        )


@pytest.mark.slow
def test_what_it_costs():
    """Weights by hand at 16 channels, and few FLOPs against those of a block."""
    model = resnet18(
        num_classes=10,
        input_shape=(16, 16, 3),
        width=16,
        exit_head="conv",
        conv="grouped",
    )
    parameters = 16 * 8 + 9 * 8 * 8 + 8 * 32 + 2 * (8 + 8 + 32) + 32 * 10 + 10
    one = model._replace(
        stages=model.stages[:1],
        exit_heads=model.exit_heads[:1],
        layer_names=model.layer_names[:1],
    )
    cost = layer_costs(one)[1]
    assert cost.name == "exit after stem"
    assert cost.parameters == parameters
    # The window of the 3x3 convolution is cut off at two of four edges.
    products = 256 * 16 * 8 + (3 * 8 - 1) ** 2 * 8 * 8 + 64 * 8 * 32
    assert 2 * products <= cost.flops <= 1.35 * 2 * products
    block = 2 * (3 * 16 - 2) ** 2 * 16 * 16  # products of two 3x3 convolutions
    assert products < block / 9
    shape = jax.ShapeDtypeStruct((1, 16, 16, 16), jnp.float32)
    assert find_last(model.exit_heads[0], shape) == ("head", "linear")


@SLOW
def test_a_run_with_such_exits(tmp_path, capsys):
    """Trained, restored, gated, exported, and fitted after all."""
    out = tmp_path / "run"
    words = (
        "train --width 2 --exit-head conv --num-clients 2 --cuts 2 3 --rounds 1 "
        "--max-train-samples 60 --max-test-samples 20 --batch-size 10 "
        "--validation-share 0.1 --average all_holders"
    )
    plugin = ["--network", SHORT_RESNET["network"], "--plugin", "short_resnet"]
    assert cli.main([*words.split(), *plugin, "--out", str(out)]) == 0
    assert set(restore(out).client(0).head.params) == {
        *("conv1", "conv2", "conv3"),
        *("bn1", "bn2", "bn3", "head"),
    }
    assert cli.main(["gate", str(out), "--target-offload", "0.5"]) == 0
    assert cli.main(["export", str(out), "--client", "1"]) == 0
    assert cli.main(["refit", str(out)]) == 0
    found = json.loads((out / "refit/refit.json").read_text())
    assert [one["senders"] for one in found["exits"]] == [[0, 1], [1]]
    # Client 1 needs what lies before the last layer of the exit of client 0.
    head = restore(out).client(0).head
    before = jax.tree.leaves((head.params, head.batch_stats))
    last = head.params["head"]["linear"]
    assert found["exits"][0]["down_bytes"] == sum(leaf.nbytes for leaf in before)
    assert last["kernel"].shape == (4, 10)
