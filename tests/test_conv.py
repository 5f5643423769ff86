"""Every form of the convolution equals the native one, of each client alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from hsee_jax.config.values import options
from hsee_jax.nn.convolution import convolution
from hsee_jax.nn.convolution_choice import Place, auto_form, choice_of
from hsee_jax.nn.convolution_forms import NATIVE, Form, Geometry
from hsee_jax.nn.resnet import resnet18
from hsee_jax.nn.winograd import FOUR, TWO, winograd

MODES = ("grouped", "unrolled", "patches", "winograd", "winograd4", "mixed")
CLIENTS, BATCH = 3, 2
# (H, W, C, F, window, stride, padding)
SHAPES = {
    "1x1": (6, 5, 3, 4, 1, 1, 0),
    "1x1/2": (7, 6, 3, 4, 1, 2, 0),
    "3x3": (6, 8, 3, 4, 3, 1, 1),
    "3x3 odd": (7, 5, 4, 3, 3, 1, 1),
    "3x3 unpadded": (7, 6, 4, 3, 3, 1, 0),
    "3x3/2": (8, 7, 3, 4, 3, 2, 1),
    "7x7/2": (11, 12, 3, 4, 7, 2, 3),
    "3x3 one pixel": (1, 2, 3, 4, 3, 1, 1),
}
WIDE = (14, 14, 64, 64, 3, 1, 1)  # `mixed` is Winograd


def arrays(shape, dtype=jnp.float32, stack=CLIENTS):
    h, w, c, f, window, _, _ = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((stack, BATCH, h, w, c), np.float32)
    k = rng.standard_normal((stack, window, window, c, f), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(k / np.sqrt(window**2 * c), dtype)


def apply(conv, shape, x, w):
    *_, stride, pad = shape
    return conv(
        x,
        w,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def passes(conv, shape):
    """Output and both gradients of a loss that is not linear in the output."""

    def loss(x, w):
        y = apply(conv, shape, x, w)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    def run(x, w):
        (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)
        return y, *grads

    return run


def native_alone(shape, x, w):
    one = jax.jit(passes(lax.conv_general_dilated, shape))
    rows = [one(a, b) for a, b in zip(x, w, strict=True)]
    return [np.stack(leaves) for leaves in zip(*rows, strict=True)]


def assert_close(ours, expected, tolerance=2e-6):
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        assert one.shape == other.shape
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE], ids=[*SHAPES, "wide"])
def test_stacked_and_single_weights(mode, shape):
    x, w = arrays(shape)
    run = passes(convolution(mode), shape)
    expected = native_alone(shape, x, w)
    together, alone = jax.jit(lambda x, w: (jax.vmap(run)(x, w), run(x[0], w[0])))(x, w)
    tolerance = 5e-6 if mode == "winograd4" else 2e-6
    assert_close(together, expected, tolerance)
    assert_close(alone, [leaf[0] for leaf in expected], tolerance)


@pytest.mark.parametrize("transforms", [TWO, FOUR], ids=["winograd", "winograd4"])
@pytest.mark.parametrize("batch", [5, 6])
def test_a_few_images_at_a_time(transforms, batch):
    """Chunks of two images, with a blank one at the end of five."""
    rng = np.random.default_rng(0)
    geometry = Geometry((7, 6), (3, 3), (1, 1), ((1, 1), (2, 0)))
    x = rng.standard_normal((batch, 7, 6, 3), np.float32)
    w = rng.standard_normal((3, 3, 3, 4), np.float32)
    dy = rng.standard_normal((batch, *geometry.output, 4), np.float32)
    m = transforms.size
    tiles = 4 * (m + 2) ** 2 * -(-7 // m) * -(-6 // m) * 4  # bytes of one image

    def run(form):
        return jax.jit(
            lambda: (
                form.forward(x, w, geometry),
                form.wrt_input(dy, w, geometry),
                form.wrt_weights(x, dy, geometry),
            )
        )

    few = run(winograd(transforms, at_once=2 * tiles))
    assert_close(few(), run(NATIVE)(), 5e-6)
    loops = few.lower().as_text().count("stablehlo.while")
    assert loops == 3 and not run(winograd(transforms)).lower().as_text().count("while")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_and_series(mode, stride):
    """A window for each channel, and windows along time, stacked and alone."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal((CLIENTS, *shape), np.float32))

    depthwise = dict(
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    series = dict(
        window_strides=(stride,),
        padding=((2, 2),),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    cases = [
        (draw(BATCH, 7, 6, 4), draw(3, 3, 1, 4) / 3, depthwise),
        (draw(BATCH, 9, 3), draw(5, 3, 4) / 4, series),
        (draw(BATCH, 9, 4), draw(5, 1, 4) / 2, series | {"feature_group_count": 4}),
    ]

    def passes_of(conv, options):
        def loss(x, w):
            y = conv(x, w, **options)
            return jnp.sum(jnp.sin(y)), y

        def run(x, w):
            (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)
            return y, *grads

        return run

    @jax.jit
    def everything(pairs):
        found = []
        for (x, w), (_, _, how) in zip(pairs, cases, strict=True):
            run = passes_of(convolution(mode), how)
            native = passes_of(lax.conv_general_dilated, how)
            alone = [native(*pair) for pair in zip(x, w, strict=True)]
            expected = [jnp.stack(leaves) for leaves in zip(*alone, strict=True)]
            found.append((jax.vmap(run)(x, w), run(x[0], w[0]), expected))
        return found

    for together, alone, expected in everything([case[:2] for case in cases]):
        assert_close(together, expected)
        assert_close(alone, [leaf[0] for leaf in expected])


def test_a_depthwise_gradient_is_rounded_once():
    """Nine products are added in float32, and then rounded to bfloat16."""
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((BATCH, 7, 6, 4), (3, 3, 1, 4), (BATCH, 7, 6, 4))
    )
    how = dict(
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )

    def gradient(conv, *arrays):
        x, w, dy = arrays
        return jax.vjp(lambda x: conv(x, w, **how), x)[1](dy)[0]

    found = gradient(convolution("patches"), x, w, dy)
    wide = (a.astype(jnp.float32) for a in (x, w, dy))
    expected = gradient(lax.conv_general_dilated, *wide)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6
    )


def test_groups_of_a_depthwise_convolution():
    """Native ones of all clients become one; shifts are no convolution at all."""
    x, w = jnp.zeros((3, 2, 6, 6, 4)), jnp.zeros((3, 3, 3, 1, 4))

    def run(mode, x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        pads = ((1, 1), (1, 1))
        return convolution(mode)(
            x, w, (1, 1), pads, dimension_numbers=layout, feature_group_count=4
        )

    for mode, groups in (("grouped", [12]), ("unrolled", [4] * 3), ("patches", [])):
        assert groups_of(jax.vmap(partial(run, mode)), x, w) == groups


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode):
    """Within the rounding of the output, 2**-8."""
    for shape in (SHAPES["3x3 odd"], SHAPES["3x3/2"]):
        x, w = arrays(shape, jnp.bfloat16)
        expected = native_alone(shape, *(a.astype(jnp.float32) for a in (x, w)))
        expected = [jnp.asarray(leaf, jnp.bfloat16) for leaf in expected]
        ours = jax.jit(jax.vmap(passes(convolution(mode), shape)))(x, w)
        assert_close(ours, expected, 2**-7)


@pytest.mark.parametrize("mode", MODES)
def test_nested_and_partial_vmap(mode):
    """Two stacked axes, shared weights, shared inputs, and shared in one axis only."""
    shape = SHAPES["3x3"]
    x, w = arrays(shape, stack=6)
    run = jax.vmap(passes(convolution(mode), shape))
    grid = [a.reshape(2, 3, *a.shape[1:]) for a in (x, w)]
    both, few_weights, few_inputs = jax.jit(
        lambda x, w: (
            jax.vmap(run)(x, w),
            jax.vmap(run, (0, None))(x, w[0]),
            jax.vmap(run, (None, 0))(x[0], w),
        )
    )(*grid)
    expected = native_alone(shape, x, w)
    assert_close([a.reshape(6, *a.shape[2:]) for a in both], expected)
    again = [jnp.concatenate([a[:3], a[:3]]) for a in (x, w)]
    for ours, pair in ((few_weights, (x, again[1])), (few_inputs, (again[0], w))):
        flat = [a.reshape(6, *a.shape[2:]) for a in ours]
        assert_close(flat, native_alone(shape, *pair))


@pytest.mark.parametrize("mode", MODES)
def test_scan_checkpoint_and_shard_map(mode):
    shape = SHAPES["3x3 odd"]
    x, w = arrays(shape)
    expected = native_alone(shape, x, w)
    conv = jax.checkpoint(partial(apply, convolution(mode), shape))
    run = passes(lambda x, w, *_, **__: conv(x, w), shape)

    scanned = jax.jit(lambda x, w: lax.map(lambda pair: run(*pair), (x, w)))
    assert_close(scanned(x, w), expected)

    count = max(n for n in (1, 3) if n <= jax.device_count())
    axes = dict(axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    spec = PartitionSpec("clients")
    sharded = jax.shard_map(
        jax.vmap(run),
        mesh=jax.make_mesh((count,), ("clients",), **axes),
        in_specs=spec,
        out_specs=spec,
    )
    assert_close(jax.jit(sharded)(x, w), expected)


def groups_of(run, *operands):
    """The number of groups of every convolution in a program."""
    text = jax.jit(run).lower(*operands).as_text()
    return [
        max(
            int(line.partition(f"{kind}_group_count = ")[2].partition(" ")[0])
            for kind in ("batch", "feature")
        )
        for line in text.splitlines()
        if "stablehlo.convolution" in line
    ]


@pytest.mark.parametrize(
    ("mode", "groups"),
    [
        ("grouped", [3, 3, 3]),
        ("unrolled", [1] * 9),
        ("patches", []),
        ("winograd", []),
        ("winograd4", []),
    ],
)
def test_what_stacked_weights_become(mode, groups):
    """The number of groups of every convolution in the program."""
    run = jax.vmap(passes(convolution(mode), SHAPES["3x3"]))
    assert groups_of(run, *arrays(SHAPES["3x3"])) == groups


def test_shared_weights_are_one_convolution_of_a_larger_batch():
    shape = SHAPES["3x3"]
    x, w = arrays(shape)
    batched = jax.vmap(partial(apply, convolution("grouped"), shape), (0, None))
    text = jax.jit(batched).lower(x, w[0]).as_text()
    assert text.count("stablehlo.convolution") == 1
    assert f"tensor<{CLIENTS * BATCH}x6x8x4xf32>" in text


@pytest.mark.parametrize(
    ("channels", "batch", "forms"),
    [
        (64, 24, "winograd winograd winograd"),  # 24 x 4 x 4 places
        (64, 23, "grouped grouped grouped"),
        (128, 23, "grouped grouped winograd"),
        (32, 99, "grouped grouped grouped"),
    ],
)
def test_small_convolutions_are_native_on_a_cpu(channels, batch, forms):
    """They are as fast, and compile in less time."""
    geometry = Geometry((4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), 1)
    both = channels, channels
    found = [
        choice_of("mixed")(Place(name, geometry, both, batch, 0, "float32"))
        for name in Form._fields
    ]
    assert found == forms.split()


@pytest.mark.parametrize(
    ("backend", "single", "stacked"),
    [
        ("gpu", [1] * 3, [1] * 9),
        ("tpu", [1] * 3, [CLIENTS] * 3),
        ("cpu", [], []),
    ],
)
def test_auto_depends_on_the_backend(monkeypatch, backend, single, stacked):
    """For stacked weights a GPU takes one after another, a TPU groups of one."""
    x, w = arrays(WIDE)
    run = passes(convolution(auto_form(backend)), WIDE)
    assert groups_of(run, x[0], w[0]) == single
    assert groups_of(jax.vmap(run), x, w) == stacked
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    by_default = passes(convolution("auto"), WIDE)
    assert groups_of(jax.vmap(by_default), x, w) == stacked


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"feature_group_count": 3},
        {"dimension_numbers": ("NCHW", "HWIO", "NHWC")},
        {"precision": lax.Precision.HIGHEST},
    ],
)
def test_what_is_not_supported_is_refused(options):
    arguments = {
        "window_strides": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        **options,
    }
    x, w = (a[0] for a in arrays(SHAPES["3x3"]))
    with pytest.raises(NotImplementedError, match="only NHWC"):
        convolution()(x, w, **arguments)


def test_modes_are_those_of_the_configuration():
    assert set(options()["conv"][1].choices) == {"auto", *MODES}
    with pytest.raises(ValueError, match="patch is none of auto"):
        convolution("patch")


def test_the_network_is_made_of_the_chosen_form():
    model = resnet18(num_classes=10, input_shape=(8, 8, 1), width=2, conv="patches")
    for stage, channels in zip(model.stages[:4], (1, 2, 2, 2), strict=True):
        x = jnp.zeros((1, 8, 8, channels), jnp.float32)
        text = str(jax.make_jaxpr(lambda x, s=stage: s.init(jax.random.key(0), x))(x))
        assert "dot_general" in text
        assert "conv_general_dilated[" not in text
