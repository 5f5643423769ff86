"""Each network from the command line, its costs by hand, and what its options change.

`pytest -m slow -s tests/test_networks.py` prints a row of figures for each network.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.core import UserError
from hsee_jax.nn import NETWORKS, layer_inputs
from hsee_jax.nn.mobilenet import InvertedResidual
from hsee_jax.nn.model import cached_stage
from hsee_jax.nn.normalization import Norm
from hsee_jax.systems import layer_costs

# Sizes for a short training that leaves chance behind, as far as a network reads them.
SIZES = {"width": 4, "hidden": 64, "depth": 4, "heads": 2, "patch_size": 7, "order": 4}
WIDTHS = {"mobilenet_v2": 8, "mobilenet_v3_small": 8, "conv1d": 16}
STEP = "--learning-rate 0.05"
ADAM = "--optimizer adamw --learning-rate 0.002"
OWN = [n for n in NETWORKS if NETWORKS[n].make.__module__.startswith("hsee_jax.")]
TESTED = 300
COMMON = (
    "--num-clients 2 --cuts 2 4 --rounds 6 --eval-every 6 --checkpoint-every 6 "
    "--batch-size 32 --augment none --validation-share 0.1 --max-train-samples 1500 "
    f"--max-test-samples {TESTED}"
)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """The packaged images as series: 28 rows of 28 values."""
    return write(tmp_path_factory.mktemp("series"), lambda images: images)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The mean grey of 9 parts of each packaged image."""

    def parts(images):
        return images[:, :27, :27].reshape(-1, 3, 9, 3, 9).mean((2, 4)).reshape(-1, 9)

    return write(tmp_path_factory.mktemp("table"), parts)


def write(folder, of_images):
    """The packaged images in another form, as files of arrays."""
    arrays = [
        part
        for split in hs.data.load_dataset("fashion_mnist_small")
        for part in (
            of_images(np.asarray(split.images, np.float32)[..., 0]),
            split.labels,
        )
    ]
    hs.data.write_npz(folder, tuple(arrays))
    return folder


def words_of(name):
    """The command line that trains a network."""
    known = NETWORKS[name].options
    sizes = SIZES | {"width": WIDTHS.get(name, 4)}
    words = [f"--{o.replace('_', '-')} {n}" for o, n in sizes.items() if o in known]
    rule = ADAM if "hidden" in known else STEP
    return f"train --network {name} {' '.join(words)} {rule} {COMMON}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [*OWN, "resnet18 --norm group"])
@jax.numpy_dtype_promotion("standard")  # the Adam of optax relies on it
def test_a_network_trains_is_restored_gated_and_exported(
    case, tmp_path, series, table, capsys
):
    """The server is right three times as often as chance, 0.1, and the exits twice."""
    name, *more = case.split()
    words, out = words_of(name).split() + more, tmp_path / "run"
    _, test = hs.data.load_dataset("fashion_mnist_small")
    own = {1: table, 2: series}.get(getattr(NETWORKS[name].make, "input_rank", 3))
    if own is not None:
        words += ["--dataset", "npz", "--data-dir", str(own)]
        _, test = hs.data.load_dataset("npz", folder=own)
    assert cli.main([*words, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    scores = summary["mean_exit_accuracy"], summary["mean_server_accuracy"]
    with capsys.disabled():
        print(f"\n{case}: exit {scores[0]:.3f}, server {scores[1]:.3f}")
    assert scores[0] > 0.2 and scores[1] > 0.3

    samples, labels = test.images[:TESTED], test.labels[:TESTED]
    answers = hs.inference.predict(hs.restore(out), 1, samples)
    for kind, logits in (("exit", answers.exit_logits), ("server", answers.logits)):
        found = np.mean(logits.argmax(-1) == labels)
        trained = summary["clients"][1][f"{kind}_accuracy"]
        assert abs(found - trained) < 2.5 / TESTED  # rounding may turn two answers

    assert cli.main(["gate", str(out), "--target-offload", "0.5"]) == 0
    assert cli.main(["export", str(out), "--client", "1"]) == 0
    place = out / "export" / "client-1"
    assert json.loads((place / "card.json").read_text())["cut"] == 4
    program = bytearray((place / "segment.jaxexport").read_bytes())
    weights = load_file(place / "weights.safetensors")
    exported = jax.export.deserialize(program).call(weights, samples[:5])["logits"]
    np.testing.assert_allclose(exported, answers.exit_logits[:5], rtol=1e-3, atol=1e-3)


def network(name, shape, **options):
    return NETWORKS.make(name, num_classes=10, input_shape=shape, options=options)


def flops_of(name, shape, **options):
    """FLOPs of the layers and the final head."""
    model = network(name, shape, **options)
    costs = layer_costs(model)
    count = len(model.stages)
    return np.array([cost.flops for cost in (*costs[:count], costs[-1])])


def taps(size, window, stride):
    """Products along an axis that are not with padding, over all outputs."""
    starts = range(-(window // 2), size - window + window // 2 + 1, stride)
    return sum(0 <= start + k < size for start in starts for k in range(window))


def test_costs_by_hand():
    """Products and sums of the first layers; normalisation and ReLU add little."""
    blocks = flops_of("vit", (8, 8, 3), hidden=96, depth=2, heads=2, patch_size=4)
    tokens = 5
    dense = 2 * tokens * 96 * 96 * (3 + 1 + 4 + 4)
    attention = 2 * 2 * tokens * tokens * 96
    patches = 2 * 4 * (4 * 4 * 3) * 96
    small = {"width": 8, "conv": "grouped"}
    series = flops_of("conv1d", (20, 6), depth=3, window=5, **small)
    pairs = [
        (blocks[1], dense + attention),
        (blocks[0] - blocks[1], patches),
        (series[0], 2 * taps(20, 5, 1) * 6 * 8),
        (series[1], 2 * taps(20, 5, 1) * 8 * 8),
        (series[2], 2 * taps(20, 5, 2) * 8 * 16),
    ]
    for found, products in pairs:
        assert products <= found <= 1.35 * products
    found = network("mobilenet_v2", (16, 16, 3), width=16, conv="grouped")
    block = layer_costs(found._replace(**_only(found, 2)))[0]
    # 8 channels become 48; 12 leave; at 16x16 pixels.
    depthwise = 2 * taps(16, 3, 1) ** 2 * 48
    dense = 2 * 16 * 16 * (8 * 48 + 48 * 12)
    assert depthwise + dense <= block.flops <= 1.35 * (depthwise + dense)


def test_only_blocks_of_stride_1_add_their_input():
    """On one pixel the stride changes nothing else."""
    x, mask = jax.random.normal(jax.random.key(0), (2, 1, 1, 4)), np.ones(2, bool)
    settings = dict(features=4, inner=8, dtype=np.float32, conv="grouped")
    plain, halved = (InvertedResidual(stride=stride, **settings) for stride in (1, 2))
    variables = plain.init(jax.random.key(1), x, mask, train=False)
    added, alone = (b.apply(variables, x, mask, train=False) for b in (plain, halved))
    np.testing.assert_allclose(added - alone, x, rtol=1e-5, atol=1e-6)


def _only(model, number):
    """The fields of a network of one of a network's layers."""
    return {
        "stages": model.stages[number : number + 1],
        "exit_heads": model.exit_heads[number : number + 1],
        "layer_names": model.layer_names[number : number + 1],
        "input_shape": layer_inputs(model)[number].shape[1:],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "products", "options"),
    [
        ("resnet18", 1.81e9, {}),
        ("resnet34", 3.66e9, {}),
        ("resnet50", 4.09e9, {}),
        ("mobilenet_v2", 0.30e9, {}),
        ("mobilenet_v3_small", 0.057e9, {}),
        ("vit", 17.56e9, {"hidden": 768, "heads": 12}),  # ViT-B/16
    ],
)
def test_costs_are_those_that_torchvision_states(name, products, options):
    """Products at 224 pixels; each is two FLOPs.

    XLA leaves out products with padding: of a 3x3 convolution of n x n a share of
    1 - (1 - 2 / (3 n))^2, and of ResNet-18 7 %.
    """
    if name != "vit":
        options = {"conv": "grouped"}
    found = flops_of(name, (224, 224, 3), **options).sum()
    assert 0.92 < found / (2 * products) < 1.1


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        pytest.param("resnet34", (32, 32, 3), 21_282_122, marks=pytest.mark.slow),
        ("resnet50", (32, 32, 3), 23_520_842),
        ("mobilenet_v2", (32, 32, 3), 2_236_682),
        ("mobilenet_v3_small", (32, 32, 3), 1_528_106),
        ("vit", (32, 32, 3), 5_362_762),
        ("sian", (10,), 26_350),
    ],
)
def test_parameters(name, shape, parameters):
    """Torchvision's for 1,000 classes, less 990 of them, and the small stem.

    ResNet-34: 21,797,672 - 990 * 513 - 40 * 3 * 64; ResNet-50: 25,557,032 - 990 * 2,049
    - 7,680; MobileNetV2: 3,504,872 - 990 * 1,281; V3-small: 2,542,856 - 990 * 1,025.
    ViT: 12 blocks of 12 * 192^2 + 13 * 192, 48 * 192 + 192 of patches, 66 * 192 of
    token and places, 384 + 1,930 behind. SIAN: 10 terms of a column and 45 of a pair,
    each with 16 * (1 or 2) + 16, 16 * 16 + 16 and 16 * 10; and the final head.
    """
    assert {
        "resnet34": 21_797_672 - 990 * 513 - 7_680,
        "resnet50": 25_557_032 - 990 * 2_049 - 7_680,
        "mobilenet_v2": 3_504_872 - 990 * 1_281,
        "mobilenet_v3_small": 2_542_856 - 990 * 1_025,
        "vit": 12 * (12 * 192**2 + 13 * 192) + 49 * 192 + 66 * 192 + 384 + 1_930,
        "sian": 10 * 464 + 45 * 480 + 110,
    }[name] == parameters
    model = network(name, shape)
    init = jax.eval_shape(lambda: hs.nn.init_network(model, jax.random.key(0)))
    parts = [part["params"] for part in (*init.layers, init.final_head)]
    assert sum(leaf.size for leaf in jax.tree.leaves(parts)) == parameters


def test_shapes_of_features():
    """MobileNets keep small images for some layers; series halve by pairs."""
    small = layer_inputs(network("mobilenet_v2", (32, 32, 3)))
    large = layer_inputs(network("mobilenet_v2", (96, 96, 3)))
    assert [shape.shape[1] for shape in small[1::3]] == [32, 32, 16, 8, 8, 4, 4]
    assert [shape.shape[1] for shape in large[1::3]] == [48, 24, 12, 6, 6, 3, 3]
    small = layer_inputs(network("mobilenet_v3_small", (32, 32, 3)))
    large = layer_inputs(network("mobilenet_v3_small", (96, 96, 3)))
    assert [shape.shape[1] for shape in small[1::2]] == [32, 16, 8, 8, 8, 4, 4]
    assert [shape.shape[1] for shape in large[1::2]] == [48, 12, 6, 6, 6, 3, 3]
    series = layer_inputs(network("conv1d", (30, 2), width=4))
    assert [shape.shape[1:] for shape in series[1:]] == [
        *[(30, 4)] * 2,
        (15, 8),
        (15, 8),
        (8, 16),
        (8, 16),
    ]
    tokens = layer_inputs(network("vit", (28, 28, 1), hidden=6))
    assert {shape.shape[1:] for shape in tokens[1:]} == {(50, 6)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--network vit --patch-size 5", "patch_size: 5 is not allowed for images of"),
        ("--network vit --heads 5", "heads: 5 is not allowed for 192 values"),
        ("--network conv1d", "network: conv1d is not allowed for samples of [28, 28"),
        ("--network mlp --norm group", "norm: group has no effect on network mlp"),
        ("--norm layer", "norm: layer is unknown"),
    ],
)
def test_what_is_refused(words, message, capsys):
    assert cli.main(["info", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"norm": "bn"}, "norm: bn is unknown"),
        ("resnet18", {"stem": "5x5"}, "stem: 5x5 is unknown"),
        ("mobilenet_v2", {"exit_head": "conv"}, "exit_head: conv is unknown"),
        ("vit", {"patch_size": 0}, "patch_size: 0 is not allowed"),
    ],
)
def test_a_name_that_is_unknown_builds_no_other_network(name, options, message):
    with pytest.raises(UserError, match=message):
        network(name, (32, 32, 3), **options)
    assert network("resnet18", (32, 32, 3), dtype=jnp.bfloat16)


def test_an_unknown_normalisation_is_refused():
    norm = Norm("none", jnp.float32)
    with pytest.raises(UserError, match="norm: none is unknown"):
        norm.init(jax.random.key(0), jnp.ones((2, 4)), jnp.ones(2, bool), train=True)


def test_a_layer_with_dropout_is_refused():
    """Each batch of a step is drawn, and nothing in the layers."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, mask, *, train):
            return nn.Dropout(0.1, deterministic=not train)(x)

    stage = hs.nn.from_linen(Dropping())
    x, mask = jnp.ones((2, 4)), jnp.ones(2, bool)
    variables = stage.init(jax.random.key(0), x)
    outputs, _ = stage.apply(variables, x, mask, train=False)
    np.testing.assert_array_equal(outputs, x)
    with pytest.raises(UserError, match="network: Dropping draws at random in train"):
        stage.apply(variables, x, mask, train=True)


def test_an_even_window_is_refused():
    with pytest.raises(UserError, match="window: 4 is not allowed"):
        network("conv1d", (30, 2), window=4)


def test_channels_that_double_too_often_are_refused():
    """At width 64, 65,536 channels are ten doublings, in the 21st and 22nd layer."""
    model = network("conv1d", (30, 2), width=64, depth=22)
    assert layer_inputs(model)[-1].shape[-1] == 65_536
    with pytest.raises(UserError, match="depth: 23 .* width 64, .* is at most 22$"):
        network("conv1d", (30, 2), width=64, depth=23)
    with pytest.raises(UserError, match="depth: 3 .* allowed is at most 2$"):
        network("conv1d", (30, 2), width=65_536, depth=3)


class Scaled(nn.Module):
    by: float

    @nn.compact
    def __call__(self, x, mask, *, train):
        return self.by * x


def test_equal_modules_share_a_cached_stage():
    assert cached_stage(Scaled(2.0)) is cached_stage(Scaled(2.0))
    assert hs.nn.from_linen(Scaled(2.0)) != hs.nn.from_linen(Scaled(2.0))
    x, mask = jnp.ones((2, 4)), jnp.ones(2, bool)
    empty = {"params": {}, "batch_stats": {}}
    for by in (2.0, 3.0):
        outputs, _ = cached_stage(Scaled(by)).apply(empty, x, mask, train=False)
        np.testing.assert_array_equal(outputs, by * x)
