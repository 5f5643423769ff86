"""Channel gates: their draws, the pass and the FLOPs they leave, and their training."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounds
from rounds import KEY, assert_same, branches
from safetensors.numpy import load_file
from short_resnet import short_resnet
from tiny import PIPELINE, tiny_federation, tiny_model, tiny_shards

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.algorithms import vicreg
from hsee_jax.core import Batch, UserError
from hsee_jax.data import AUGMENTATIONS
from hsee_jax.federation import unlabelled_step
from hsee_jax.federation.branch import client_spec, init_client
from hsee_jax.nn import (
    NETWORKS,
    WIDTHS,
    at_gated_width,
    flops_share,
    masked_vicreg,
    open_gates,
    width_loss,
    with_gates,
    without_gates,
)
from hsee_jax.nn.model import Network, init_network, layer_inputs

MASK = jnp.ones(3, bool)
SHAPE = (8, 8, 1)


def gated_network(name, layers, shape=SHAPE):
    """The first layers of a network of width 4, with gates, and weights of noise."""
    model = NETWORKS.make(
        name,
        num_classes=3,
        input_shape=shape,
        options={"width": 4, "conv": "grouped"},
    )
    model = model._replace(
        stages=model.stages[:layers],
        gated_stages=model.gated_stages[:layers],
        exit_heads=model.exit_heads[:layers],
        layer_names=model.layer_names[:layers],
    )
    model, rng = with_gates(model), np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        noise = rng.normal(size=leaf.shape) * (0.1 if kind == "shift" else 1)
        noise = 1 + 0.3 * abs(noise) if kind in ("scale", "var") else 0.3 * noise
        return jnp.asarray(noise, leaf.dtype)

    shapes = jax.eval_shape(lambda: init_network(model, jax.random.key(0)))
    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def convolve(x, kernel, stride):
    pad = kernel.shape[0] // 2
    names = ("NHWC", "HWIO", "NHWC")
    found = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad),) * 2, dimension_numbers=names
    )
    return np.asarray(found)


def block_by_hand(variables, x, strides, norms="gated"):
    """A residual block of any number of convolutions, whose closed channels are 0."""
    params, stats = variables["params"], variables["batch_stats"][norms]

    def norm(y, name):
        own, held = params[norms][name]["bn"], stats[name]["bn"]
        y = (y - held["mean"]) / np.sqrt(held["var"] + 1e-5)
        return y * own["scale"] + own["bias"]

    y, last = x, len(strides)
    for number, stride in enumerate(strides, start=1):
        y = norm(
            convolve(y, params[f"conv{number}"]["conv"]["kernel"], stride),
            f"bn{number}",
        )
        if number < last:
            gate = params["gates"][f"conv{number}"]
            y = np.maximum(y, 0) * (gate["logits"] + gate["shift"] > 0)
    if "down" in params:
        down = convolve(x, params["down"]["conv"]["kernel"], max(strides))
        x = norm(down, "bn_down")
    return np.maximum(x + y, 0)


BLOCKS = [("resnet18", (2, 1), 3), ("resnet50", (1, 2, 1), 4)]  # strides, and layer


def block(name, layer):
    """The first block that halves the image of a network, and rows for it."""
    model, network = gated_network(name, layer + 1)
    shape = layer_inputs(model)[layer].shape[1:]
    rows = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    return model.stages[layer], network.layers[layer], rows


@pytest.mark.parametrize(("name", "strides", "layer"), BLOCKS)
def test_a_gated_block_multiplies_closed_channels_by_zero(name, strides, layer):
    stage, variables, rows = block(name, layer)
    found, stats = stage.gates.apply(variables, rows, MASK, train=False)
    expected = block_by_hand(jax.device_get(variables), rows, strides)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert_same(stats, variables["batch_stats"])
    dense, _ = stage.apply(variables, rows, MASK, train=False)
    assert np.abs(dense - found).max() > 0.1


def test_gates_of_an_own_layer_whose_convolutions_have_biases():
    """Closed channels are read as 0; the bias behind them stays as it is."""

    class Own(nn.Module):
        inner: tuple[int, ...] = (3,)

        @nn.compact
        def __call__(self, x, mask, *, train):
            x = nn.Conv(self.inner[0], (1, 1), name="a")(x)
            x = nn.relu(
                hs.nn.Norm("batch", jnp.float32, name="n")(x, mask, train=train)
            )
            return nn.Conv(2, (1, 1), name="b")(x)

    places = (hs.nn.Between("a", "n", "b"),)
    stage = hs.nn.gated_from_linen(Own(), places)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 2)), jnp.float32)
    variables = stage.init(jax.random.key(0), x)
    params = variables["params"]
    params["b"]["bias"] = jnp.array([0.5, -0.25])
    params["gates"]["a"]["logits"] = jnp.array([-1.0, 1.0, -1.0])
    kernel = params["b"]["kernel"]
    expected, _ = hs.nn.from_linen(Own()).apply(
        {
            "params": {
                **{name: params[name] for name in ("a", "n")},
                "b": {**params["b"], "kernel": kernel.at[..., [0, 2], :].set(0)},
            },
            "batch_stats": {"n": variables["batch_stats"]["n"]},
        },
        x,
        MASK,
        train=False,
    )
    found, _ = stage.gates.apply(variables, x, MASK, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    gated, dense = stage.gates.products(
        variables, jax.ShapeDtypeStruct((1, 4, 4, 2), x.dtype)
    )
    assert (gated, dense) == (pytest.approx(16 * (2 + 2)), 16 * (6 + 6))
    narrow, weights = stage.gates.narrow(jax.device_get(variables))
    assert weights["params"]["b"]["kernel"].shape == (1, 1, 1, 2)
    np.testing.assert_allclose(
        narrow.apply(weights, x, MASK, train=False)[0], expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("name", "strides", "layer"), BLOCKS)
def test_a_block_without_its_closed_channels_is_the_same(name, strides, layer, closed):
    """Also one of which all channels are closed."""
    stage, variables, rows = block(name, layer)
    if closed:
        gates = jax.tree.map(lambda a: a - 100.0, variables["params"]["gates"])
        variables["params"]["gates"] = gates
    logits = [
        gate["logits"] + gate["shift"] for gate in variables["params"]["gates"].values()
    ]
    expected, _ = stage.gates.apply(variables, rows, MASK, train=False)
    small, own = stage.gates.narrow(jax.device_get(variables))
    found, _ = small.apply(own, rows, MASK, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for number, gate in enumerate(logits, start=1):
        shape = own["params"][f"conv{number}"]["conv"]["kernel"].shape
        assert shape[-1] == max(1, (gate > 0).sum()) < len(gate)
    dense, own = stage.gates.dense(variables)
    assert_same(
        dense.apply(own, rows, MASK, train=False)[0],
        stage.apply(variables, rows, MASK, train=False)[0],
    )


def test_each_pass_moves_its_own_statistics():
    stage, variables, rows = block("resnet18", 3)
    _, dense = stage.apply(variables, rows, MASK, train=True)
    _, gated = stage.gates.apply(variables, rows, MASK, KEY, train=True)
    before = variables["batch_stats"]
    for name in ("bn1", "bn2", "bn_down"):
        assert_same(gated[name], before[name], rtol=0, atol=0)
        assert_same(dense["gated"][name], before["gated"][name], rtol=0, atol=0)
        assert not np.array_equal(dense[name]["bn"]["mean"], before[name]["bn"]["mean"])
        assert not np.array_equal(
            gated["gated"][name]["bn"]["mean"], before["gated"][name]["bn"]["mean"]
        )


def test_gates_are_hard_and_their_gradient_is_that_of_a_sigmoid():
    logits = jnp.asarray([-2.0, -0.5, 0.0, 0.5, 2.0])
    np.testing.assert_array_equal(open_gates(logits), [0, 0, 0, 1, 1])
    slope = jax.grad(lambda x: open_gates(x).sum())(logits)
    soft = 1 / (1 + np.exp(-1.5 * np.asarray(logits)))
    np.testing.assert_allclose(slope, 1.5 * soft * (1 - soft), rtol=1e-5)
    draws = jax.vmap(lambda key: open_gates(logits, key))(jax.random.split(KEY, 4000))
    assert set(np.unique(draws)) == {0.0, 1.0}
    expected = 1 / (1 + np.exp(-np.asarray(logits)))
    np.testing.assert_allclose(draws.mean(0), expected, atol=0.03)


def test_the_loss_of_the_width():
    """All gates open at a target of one half cost 25 (1 - 1/2)^2."""
    assert float(width_loss(jnp.float32(1.0), 0.5)) == 6.25
    assert float(width_loss(jnp.float32(0.5), 0.5)) == 0
    assert float(jax.grad(width_loss)(jnp.float32(0.25), 0.5)) == 25 * 2 * -0.25


def products_by_hand(first, second, third):
    """The stem and three blocks of ResNet-18 with width 4, for an 8x8 image.

    The third block has 8 channels, a stride of 2 and a shortcut; the arguments are the
    open channels within the blocks.
    """
    same = 8 * 8 * 9
    return (
        same * 1 * 4
        + same * (4 * first + first * 4)
        + same * (4 * second + second * 4)
        + 4 * 4 * (9 * (4 * third + third * 8) + 4 * 8)
    )


def with_open(network, counts):
    """The network with this many open gates in each place of its blocks, in order."""
    counts, layers = iter(counts), []
    for layer in network.layers:
        gates = {}
        for name, old in layer["params"]["gates"].items():
            opened = jnp.arange(len(old["logits"])) < next(counts)
            logits = jnp.where(opened, 1.0, -1.0)
            gates[name] = {"logits": logits, "shift": jnp.float32(0.5)}
        layers.append({**layer, "params": {**layer["params"], "gates": gates}})
    return network._replace(layers=tuple(layers))


def share_of(model, network):
    one = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    return float(flops_share(model.stages, network.layers, one))


@pytest.mark.parametrize("counts", [(4, 4, 8), (1, 3, 5), (0, 0, 0)])
def test_the_share_of_flops_by_hand(counts):
    model, network = gated_network("resnet18", 4)
    found = share_of(model, with_open(network, counts))
    expected = products_by_hand(*counts) / products_by_hand(4, 4, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_share_of_flops_of_a_bottleneck_by_hand():
    """Between its 1x1 convolutions both the one and the other channels may close."""
    model, network = gated_network("resnet50", 2)

    def products(first, second):
        block = 4 * first + 9 * first * second + second * 16 + 4 * 16
        return 64 * (9 * 4 + block)

    found = share_of(model, with_open(network, (3, 2)))
    np.testing.assert_allclose(found, products(3, 2) / products(4, 4), rtol=1e-6)


DESCENT = optax.scale(-1.0)  # the change of the weights is the gradient


def test_a_step_follows_both_losses():
    """VICReg between both passes, and the width; the gradient reaches the logits."""
    model, network = gated_network("resnet18", 2)
    spec, client = client_spec(model, 2, DESCENT), init_client(network, 2, DESCENT)
    copies = np.random.default_rng(2).normal(size=(6, 2, *SHAPE)).astype(np.float32)
    mask = jnp.arange(6) < 5
    labels = jnp.asarray([2, -1, 0, -1, 1, 1], jnp.int32)
    batch = Batch(jnp.asarray(copies), labels, mask, key=KEY)
    target = 0.3

    def features(layers):
        one, other = copies[:, 0], copies[:, 1]
        for number, stage in enumerate(model.stages):
            own = {**network.layers[number], "params": layers[number]}
            key = jax.random.fold_in(KEY, number)
            one, _ = stage.apply(own, one, mask, train=True)
            other, _ = stage.gates.apply(own, other, mask, key, train=True)
        return one, other

    def loss(layers):
        one, other = features(layers)
        alike = masked_vicreg(one.mean((1, 2)), other.mean((1, 2)), mask) / 25
        gate = layers[1]["gates"]["conv1"]
        opened = open_gates(gate["logits"] + gate["shift"]).sum()
        stem, each = 64 * 9 * 4, 64 * 9 * 2 * 4
        share = (stem + each * opened) / (stem + each * 4)
        return alike + 25 * (share - target) ** 2

    params = [layer["params"] for layer in network.layers]
    expected = jax.tree.map(jnp.subtract, params, jax.jit(jax.grad(loss))(params))
    step = jax.jit(unlabelled_step, static_argnames=("spec", "width_target"))
    moved, rows, _ = step(spec, client, batch, jnp.float32(1.0), width_target=target)
    found = [layer.params for layer in moved.layers]
    assert_same(found, expected, rtol=1e-3, atol=1e-4)
    gates = [tree[1]["gates"]["conv1"]["logits"] for tree in (found, params)]
    assert not np.array_equal(*gates)
    quiet = jnp.asarray(copies[:, 1])  # gates without noise give the statistics
    for number, stage in enumerate(model.stages):
        own = network.layers[number]
        quiet, stats = stage.gates.apply(own, quiet, mask, train=True)
        own = moved.layers[number].batch_stats["gated"]
        assert_same(own, stats["gated"], rtol=1e-4, atol=1e-5)
    both = features(params)
    np.testing.assert_allclose(rows.inputs[:5], both[0][:5], rtol=1e-4, atol=1e-5)
    known = jnp.asarray([0, 2, 4])

    def exit_loss(head):
        """The mean over both widths, on the samples with labels."""
        means = jnp.concatenate([own[known].mean((1, 2)) for own in both])
        logits = means @ head["linear"]["kernel"] + head["linear"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.tile(labels[known], 2)
        ).mean()

    head = network.exit_heads[1]["params"]
    expected = jax.tree.map(jnp.subtract, head, jax.grad(exit_loss)(head))
    assert_same(moved.head.params, expected, rtol=1e-3, atol=1e-4)
    other = batch._replace(key=jax.random.key(9))
    again, _, _ = step(spec, client, other, jnp.float32(1.0), width_target=target)
    own = again.layers[1].params["gates"]["conv1"]["logits"]
    assert not np.array_equal(own, gates[0])


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("loop", "vmap"), ("vmap", "map")])
def test_all_forms_of_the_engine_agree_with_gates(axes):
    model, _ = gated_network("resnet18", 2, (5, 5, 1))
    noise = PIPELINE._replace(augment=AUGMENTATIONS.make("noise"))
    shards, results = tiny_shards({0: 7, 1: 3}), []
    for axis in axes:
        federation = tiny_federation({0: 2, 1: 1}, model)
        federation = federation._replace(one_by_one=axis == "map")
        own = vicreg(federation, width_target=0.5)
        state, _ = rounds.train(
            own, federation, shards, axis=axis, rounds=1, pipeline=noise
        )
        results.append(branches(federation, own, state))
    assert_same(*results, rtol=1e-3, atol=1e-5)


def test_a_network_is_the_same_without_gates():
    """Its dense pass has the weights of the network that never had any."""
    plain = short_resnet(num_classes=3, input_shape=SHAPE, width=2)
    draw = jax.jit(init_network, static_argnums=0)
    expected = draw(plain, KEY)
    model = with_gates(plain)
    found = draw(model, KEY)
    assert isinstance(found, Network)
    client, layers = without_gates(model, found.layers, "dense")
    assert_same(layers, expected.layers, rtol=0, atol=0)
    assert_same(found.exit_heads, expected.exit_heads, rtol=0, atol=0)
    assert all(stage.gates is None for stage in client.stages)
    norms = found.layers[3]["params"]
    assert_same(norms["gated"]["bn1"], norms["bn1"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--strategy sequential", "width_target: 0.5 has no effect on strategy sequ"),
        ("--strategy vicreg --network mlp", "is not allowed with network mlp"),
        ("--strategy vicreg --norm group", "is not allowed with network resnet18"),
        (
            "--strategy vicreg --pretrained w.safetensors",
            "w.safetensors is not allowed with width_target",
        ),
    ],
)
def test_what_has_no_gates_is_refused(words, message, tmp_path, capsys):
    out = str(tmp_path / "run")
    words = f"train demo --width-target 0.5 --augment crop --out {out} {words}".split()
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_a_strategy_refuses_a_network_without_gates():
    federation = tiny_federation({0: 1})
    with pytest.raises(UserError, match=r"width_target: 0\.5 is not allowed with a"):
        vicreg(federation, width_target=0.5)
    with pytest.raises(UserError, match="network: it has no channel gates"):
        with_gates(tiny_model())


RUN = (
    "train demo --network short_resnet --plugin short_resnet --width 4 "
    "--num-clients 2 --cuts 2 4 --strategy vicreg --augment crop --labelled-share 0.25 "
    "--batch-size 16 --max-test-samples 60 --learning-rate 0.05 --warmup-rounds 0 "
    "--max-train-samples 1000 --rounds 6 --refit-exits-every 6"
)


@pytest.mark.slow
def test_a_run_reaches_its_target_and_is_exported_at_both_widths(tmp_path, capsys):
    out, target = tmp_path / "run", 0.4
    words = f"{RUN} --width-target {target} --out {out}"
    assert cli.main(words.split()) == 0
    summary = json.loads((out / "summary.json").read_text())
    for client in summary["clients"]:
        assert abs(client["gated"]["flops_share"] - target) < 0.1
        assert client["gated"]["exit_accuracy"] > 0.15
    capsys.readouterr()
    assert cli.main(["eval", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clients"] == summary["clients"]
    run = hs.restore(out)
    _, test = hs.data.load_dataset("fashion_mnist_small")
    images, cards = test.images[:5], {}
    for width in WIDTHS:
        model = run.federation.model
        model = at_gated_width(model) if width == "gated" else model
        gated = run._replace(federation=run.federation._replace(model=model))
        expected = hs.inference.predict(gated, 1, images).exit_logits
        place = tmp_path / width
        words = f"export {out} --client 1 --width {width} --out {place}"
        assert cli.main(words.split()) == 0
        weights = load_file(place / "weights.safetensors")
        program = bytearray((place / "segment.jaxexport").read_bytes())
        logits = jax.export.deserialize(program).call(weights, images)["logits"]
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
        cards[width] = json.loads((place / "card.json").read_text())
        assert not any("gate" in name for name in weights)
    scores = summary["clients"][1]
    assert cards["dense"]["exit_accuracy"] == scores["exit_accuracy"]
    assert cards["gated"]["exit_accuracy"] == scores["gated"]["exit_accuracy"]
    assert cards["gated"]["width"] == "gated"
    ratio = cards["gated"]["flops"] / cards["dense"]["flops"]
    assert abs(ratio - scores["gated"]["flops_share"]) < 0.05
