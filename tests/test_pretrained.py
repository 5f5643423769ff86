"""Networks from the weights of PyTorch's: logits, every gradient, and what is refused.

The networks of PyTorch are those of `torch_networks`, and, where it is installed,
torchvision's own.
"""

import copy
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file
from torch_networks import (
    import_torch,
    torch_mobilenet,
    torch_mobilenet_v3,
    torch_resnet,
    torch_vit,
)

import hsee_jax as hs
from hsee_jax.core import UserError
from hsee_jax.federation.branch import (
    client_spec,
    forward,
    init_client,
    init_server,
    server_spec,
)
from hsee_jax.nn import NETWORKS, init_network, masked_cross_entropy
from hsee_jax.nn.pretrained import _leaves, load_pretrained, with_weights

CLASSES, SIZE, DESCENT = 5, 16, optax.scale(-1.0)
LABELS = np.array([3, 1, 4, 1], np.int32)
COUNTS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
RESNET = {"width": 4, "conv": "grouped"}
MOBILENET = {"width": 8, "conv": "grouped"}
VIT = {"hidden": 12, "depth": 2, "heads": 3, "patch_size": 8}
MOBILENET_V3 = {"width": 4, "conv": "grouped"}
SMALL = {
    "vit": VIT,
    "mobilenet_v2": MOBILENET,
    "mobilenet_v3_small": MOBILENET_V3,
    **dict.fromkeys(COUNTS, RESNET),
}


def network(name, options, *, size=SIZE, classes=CLASSES, channels=3):
    return NETWORKS.make(
        name, num_classes=classes, input_shape=(size, size, channels), options=options
    )


def plain_torch(name, *, size=SIZE, classes=CLASSES):
    """The small network, of PyTorch, with random statistics."""
    torch = import_torch()
    torch.manual_seed(0)
    if name == "vit":
        shape = {"size": size, "patch": 8, "hidden": 12, "depth": 2, "heads": 3}
        found = torch_vit(**shape, classes=classes)
    elif name == "mobilenet_v2":
        found = torch_mobilenet(width=8, classes=classes, small=size <= 64)
    elif name == "mobilenet_v3_small":
        found = torch_mobilenet_v3(width=4, classes=classes, small=size <= 64)
    else:
        found = torch_resnet(
            COUNTS[name],
            bottleneck=name == "resnet50",
            width=4,
            classes=classes,
            large=size > 64,
        )
    return noisy(found)


def noisy(module):
    """Make all parameters and statistics unlike each other."""
    torch = import_torch()
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if key.endswith(("bias", "running_mean")):
                value.normal_(0.0, 0.1)
            elif key.endswith("running_var") or (value.ndim == 1 and value.numel()):
                value.uniform_(0.5, 1.5)
            elif value.ndim and not value.any():  # a head at 0 passes no gradient
                value.normal_(0.0, 0.2)
    return module


def arrays_of(tensors):
    return {name: np.array(t.detach().numpy()) for name, t in tensors.items()}


def distance(ours, theirs):
    ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def torch_gradients(module, images, *, train, dtype):
    """Logits, and a gradient for each array of PyTorch's; statistics have zeros."""
    torch = import_torch()
    module = copy.deepcopy(module).to(dtype).train(train)
    state = arrays_of(module.state_dict())
    logits = module(torch.tensor(images.transpose(0, 3, 1, 2), dtype=dtype))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS).long())
    loss.backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    zeros = {name: np.zeros_like(array) for name, array in state.items()}
    return logits.detach().numpy(), zeros | arrays_of(grads)


def whole(model, tensors):
    """All layers and the final head, with these arrays."""
    given = with_weights(model, tensors)
    key = jax.random.key(0)
    return init_server(jax.jit(lambda: init_network(given, key))(), 0, DESCENT)


def gradients_of(model, *, train):
    """A function of weights and images that returns gradients and logits."""
    spec = server_spec(model, 0, DESCENT)

    def loss(branch, images):
        mask = jnp.ones(len(images), bool)
        _, logits, _ = forward(spec, branch, images, mask, train=train)
        return masked_cross_entropy(logits, jnp.asarray(LABELS), mask)[0], logits

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.fixture
def smooth(monkeypatch):
    """Put SiLU in the place of every ReLU and ReLU6, in Flax and in PyTorch.

    Rounding turns the sign of some inputs of a ReLU, and a single one changes the
    gradient of all layers before it by a part in 100. Without corners, it is exact.
    """
    torch = import_torch()
    for place, name, silu in (
        (nn, "relu", nn.silu),
        (nn, "relu6", nn.silu),
        (torch, "relu", torch.nn.functional.silu),
        (torch.nn, "ReLU", torch.nn.SiLU),
        (torch.nn, "ReLU6", torch.nn.SiLU),
    ):
        monkeypatch.setattr(place, name, silu)


def check_parity(model, module, size, *, train):
    """Logits, and the gradient of every parameter, from the same weights.

    Gradients become ours as weights do, so that one table of names serves both. The
    truth is PyTorch in float64. In training the whole gradient counts: some parts are 0
    but for rounding, as BatchNorm takes away what the layer before it adds.
    """
    torch = import_torch()
    rng = np.random.default_rng(2)
    images = rng.standard_normal((len(LABELS), size, size, 3), np.float32)
    exact, grads = torch_gradients(module, images, train=train, dtype=torch.float64)
    start = whole(model, arrays_of(module.state_dict()))
    ours, logits = gradients_of(model, train=train)(start, images)
    assert distance(logits, exact) < 2e-4
    found = {path: leaf for path, leaf in _leaves(ours) if "/params/" in path}
    assert len(found) == sum(1 for _ in module.parameters())
    expected = dict(_leaves(whole(model, grads)))
    if not train:
        for path, leaf in found.items():
            assert distance(leaf, expected[path]) < 2e-4, path

    def vector(leaves):
        return np.concatenate([np.ravel(leaves[path]) for path in found])

    assert distance(vector(found), vector(expected)) < 2e-4


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in SMALL
            if name not in ("vit", "resnet18")  # test_resnet.py has ResNet-18
        ),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_logits_and_gradients_equal_pytorchs(name, train, request):
    if train:
        request.getfixturevalue("smooth")
    check_parity(network(name, SMALL[name]), plain_torch(name), SIZE, train=train)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if name != "vit"])
def test_the_form_for_large_images(name):
    model = network(name, SMALL[name], size=72)
    check_parity(model, plain_torch(name, size=72), 72, train=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("train", [True, False])
def test_logits_and_gradients_equal_torchvisions(name, train, request):
    """Its own modules, at full width where they know no other."""
    import_torch().manual_seed(0)
    # Before `smooth`, as torchvision keeps the ReLU of its import in default arguments.
    models = pytest.importorskip("torchvision.models", reason="torchvision is missing")
    if train:
        request.getfixturevalue("smooth")
    size, options = 72, {"conv": "grouped"}
    if name == "vit":
        size, options = SIZE, VIT
        theirs = models.VisionTransformer(SIZE, 8, 2, 3, 12, 48, num_classes=CLASSES)
    elif name.startswith("mobilenet"):
        theirs = getattr(models, name)(num_classes=CLASSES, dropout=0.0)
    else:
        theirs = getattr(models, name)(num_classes=CLASSES)
    check_parity(network(name, options, size=size), noisy(theirs), size, train=train)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """Write the weights of a small network of PyTorch, some of them changed."""

    def write(name, change=lambda tensors: tensors):
        tensors = change(arrays_of(plain_torch(name).state_dict()))
        path = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        save_file(tensors, path)
        return path

    return write


def logits_at(model, network, cut, images):
    """The logits of a client of this cut and the server behind it."""
    client, server = (
        init_client(network, cut, DESCENT),
        init_server(network, cut, DESCENT),
    )
    mask = jnp.ones(len(images), bool)
    run = jax.jit(forward, static_argnames=("spec", "train"))
    spec = client_spec(model, cut, DESCENT)
    features, _, _ = run(spec, client, images, mask, train=False)
    spec = server_spec(model, cut, DESCENT)
    return run(spec, server, features, mask, train=False)[1]


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n != "vit"),
    ],
)
def test_a_file_fills_every_client_and_server(name, file_of):
    """The logits are those of PyTorch at every cut; exits start as they would."""
    torch = import_torch()
    path, module = file_of(name), plain_torch(name).eval()
    plain = network(name, SMALL[name])
    model = load_pretrained(plain, path)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, SIZE, SIZE, 3), np.float32)
    with torch.no_grad():
        expected = module(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    key = jax.random.key(1)
    drawn, before = jax.jit(
        lambda: (init_network(model, key), init_network(plain, key))
    )()
    for cut in range(1, len(model.stages) + 1):
        found = logits_at(model, drawn, cut, images)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for after, head in zip(drawn.exit_heads, before.exit_heads, strict=True):
        jax.tree.map(np.testing.assert_array_equal, after, head)
    assert network("resnet18", RESNET).layer_names[0] == "stem"


def timm_names(tensors):
    """Rename ViT's arrays of torchvision to those of timm, by hand."""
    renamed = {
        "class_token": "cls_token",
        "conv_proj.weight": "patch_embed.proj.weight",
        "conv_proj.bias": "patch_embed.proj.bias",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln.weight": "norm.weight",
        "encoder.ln.bias": "norm.bias",
        "heads.head.weight": "head.weight",
        "heads.head.bias": "head.bias",
    }
    inner = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    }
    found = {}
    for name, tensor in tensors.items():
        new = renamed.get(name)
        if new is None:
            new = name.replace("encoder.layers.encoder_layer_", "blocks.")
            for theirs, ours in inner.items():
                new = new.replace(theirs, ours)
        found[new] = tensor
    return found


def timm_names_of_mobilenet(tensors):
    """Rename MobileNetV2's arrays of torchvision to those of timm, by hand.

    Torchvision counts all blocks in a row, timm within their groups. The first block
    has no expansion.
    """
    groups = [f"{g}.{b}" for g, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(n)]
    first = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    inner = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"}
    inner |= {"2": "conv_pwl", "3": "bn3"}
    ends = {"0.0": "conv_stem", "0.1": "bn1", "18.0": "conv_head", "18.1": "bn2"}
    renamed = {f"features.{place}": name for place, name in ends.items()}
    renamed["classifier.1"] = "classifier"
    for number, group in enumerate(groups, start=1):
        for place, name in (first if number == 1 else inner).items():
            renamed[f"features.{number}.conv.{place}"] = f"blocks.{group}.{name}"
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        found[f"{renamed[module]}.{kind}"] = tensor
    return found


def seven_classes(tensors):
    head = {"weight": (7, VIT["hidden"]), "bias": (7,)}
    return tensors | {
        f"heads.head.{name}": np.ones(shape, np.float32) for name, shape in head.items()
    }


def starts_of(model):
    return dict(_leaves(jax.jit(lambda: init_network(model, jax.random.key(1)))()))


def test_the_names_of_timm_and_another_number_of_classes(file_of, caplog):
    """Both give the same start; of another head only the LayerNorm is taken."""
    plain = network("vit", VIT)
    one, other = (
        starts_of(load_pretrained(plain, file_of("vit", change)))
        for change in (lambda tensors: tensors, timm_names)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert "timm" not in caplog.text
    with caplog.at_level("INFO", "hsee_jax"):
        other = starts_of(load_pretrained(plain, file_of("vit", seven_classes)))
    assert "has 7 classes, the data have 5: the linear layer" in caplog.text
    fresh = starts_of(plain)
    for path, leaf in other.items():
        expected = fresh if "final_head/params/linear" in path else one
        np.testing.assert_array_equal(leaf, expected[path], path)


@pytest.mark.slow
def test_the_names_of_timm_for_mobilenet(file_of):
    """They are others, and bring the same weights."""
    plain = network("mobilenet_v2", MOBILENET)
    one, other = (
        starts_of(load_pretrained(plain, file_of("mobilenet_v2", change)))
        for change in (lambda tensors: tensors, timm_names_of_mobilenet)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def with_array(name, shape):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("encoder.ln.bias"), "misses encoder.ln.bias, one of 1 such names"),
        (with_array("encoder.more", 3), "has encoder.more, one of 1 such names"),
        (
            with_array("encoder.pos_embedding", (1, 9, 12)),
            r"encoder.pos_embedding in .* has the shape \[1, 9, 12\]; allowed is "
            r"\[1, 5, 12\]",
        ),
        (
            with_array("conv_proj.weight", (12, 1, 8, 8)),
            r"shape \[12, 1, 8, 8\]; allowed is \[12, 3, 8, 8\]",
        ),
        (
            with_array("conv_proj.weight", (12, 3, 64)),
            r"shape \[12, 3, 64\]; allowed is \[12, 3, 8, 8\]",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change, message, file_of):
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(network("vit", VIT), file_of("vit", change))
    assert str(caught.value).startswith("pretrained: ")
    assert "\n" not in str(caught.value)


def test_other_files_and_networks_are_refused(file_of, tmp_path):
    path = tmp_path / "weights"
    with pytest.raises(UserError, match="pretrained: .*weights cannot be read"):
        load_pretrained(network("vit", VIT), path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="allowed is a file of safetensors"):
        load_pretrained(network("vit", VIT), path)
    perceptron = hs.nn.mlp(num_classes=CLASSES, input_shape=(SIZE, SIZE, 3))
    with pytest.raises(UserError, match="allowed are ResNet, MobileNet and ViT"):
        load_pretrained(perceptron, file_of("vit"))


def test_an_own_network_of_series_reads_names_of_its_own():
    """A kernel [W, I, O] lies in the file as [O, I, W]; the head has other names."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask, *, train):
            return nn.Conv(4, (3,), name="conv")(x)

    class Last(nn.Module):
        @nn.compact
        def __call__(self, x, mask, *, train):
            return nn.Dense(2, name="dense")(x.mean(1))

    names = {"conv": "first", "dense": "last"}
    head = hs.nn.from_linen(Last())
    model = hs.Model(
        stages=(hs.nn.from_linen(Block()),),
        exit_heads=(head,),
        final_head=head,
        layer_names=("conv",),
        input_shape=(8, 3),
        weight_names=(lambda part: names,),
    )
    rng = np.random.default_rng(0)
    shapes = {"first.weight": (4, 3, 3), "first.bias": (4,)}
    shapes |= {"last.weight": (2, 4), "last.bias": (2,)}
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    loaded = init_network(with_weights(model, tensors), jax.random.key(0))
    kernel = loaded.layers[0]["params"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["first.weight"].transpose(2, 1, 0))
    with pytest.raises(UserError, match="no name for dense/bias in other libraries"):
        nameless = model._replace(weight_names=(lambda part: {"conv": "first"},))
        with_weights(nameless, tensors)


def test_weights_of_a_file_and_gates_exclude_each_other(file_of):
    """Gates added to a loaded network would start from other weights."""
    model, path = network("resnet18", RESNET), file_of("resnet18")
    with pytest.raises(UserError, match="pretrained: a network with gates"):
        load_pretrained(hs.nn.with_gates(model), path)
    with pytest.raises(UserError, match="start from random weights"):
        hs.nn.with_gates(load_pretrained(model, path))


@pytest.mark.slow
def test_a_run_starts_from_a_file(tmp_path, file_of, capsys):
    """All clients and servers hold its weights; nothing after it needs the file."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, SIZE, SIZE, 3)).astype(np.uint8)
    labels = np.arange(24) % CLASSES
    hs.data.write_npz(tmp_path / "data", (images, labels, images, labels))
    path = file_of("vit", seven_classes)
    words = "--network vit --hidden 12 --depth 2 --heads 3 --patch-size 8 --cuts 1 2"
    words += " --dataset npz --num-clients 3 --batch-size 8 --rounds 1 --optimizer sgd"
    words += " --learning-rate 1e-9 --weight-decay 0 --momentum 0"
    given = [*words.split(), "--data-dir", str(tmp_path / "data")]
    given += ["--pretrained", str(path)]
    out = tmp_path / "run"
    assert hs.cli.main(["train", *given, "--out", str(out)]) == 0
    path.rename(path.with_name("gone"))
    run = hs.restore(out)
    assert run.config.model.pretrained == str(path)
    expected = arrays_of(plain_torch("vit").state_dict())
    for i in range(3):
        block = run.network(i).layers[1].params["up"]["kernel"]
        name = "encoder.layers.encoder_layer_1.mlp.0.weight"
        np.testing.assert_allclose(block, expected[name].T, atol=1e-6)
    assert hs.cli.main(["eval", str(out)]) == 0
    twin, more = tmp_path / "twin", ["--resume", "--rounds", "2"]
    shutil.copytree(out, twin)
    assert hs.cli.main(["train", *more, "--out", str(out)]) == 0
    run = hs.restore(out)
    assert run.config.model.pretrained == str(path)
    path.with_name("gone").rename(path)
    assert hs.cli.main(["train", *more, "--out", str(twin)]) == 0
    jax.tree.map(np.testing.assert_array_equal, run.state, hs.restore(twin).state)
    given[-1] = str(tmp_path / "nowhere")
    assert hs.cli.main(["train", *given, "--out", str(tmp_path / "no")]) == 2
    assert "pretrained: " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
