"""Time the forms of the convolution by shape: the forward pass and each gradient.

Shows: the fastest form of `hsee_jax.nn.convolution` for one set of weights and for
weights stacked over clients, at the convolutions of ResNet-18 on images of 32 pixels
(width 64 with batches of 32, width 16 with batches of 8) and of 28 (width 8 with
batches of 8), and the cost of a scan for the gradient of the weights, and how many
bytes of tiles `winograd` should take at once.
The rows with the ``setting`` single are evidence for the table in
`hsee_jax/nn/convolution_choice.py`; `hsee tune` measures inside a step.

Expected on CPU: which form is fastest depends on the processor; from 64 channels up a
form of winograd is fastest on large images, and the forward pass of winograd on small
ones takes half to all of the time of grouped; grouped is slowest on nearly all stacks,
and on most by far; the native gradient of the weights is many times slower in a scan
than in a loop; at 64 channels 4 or 8 MiB of tiles at once take about half the time of
all tiles together. On a GPU the forms that can abort XLA's compiler are left out.

Cost: about 6 minutes on two CPU cores. Command::

    python benchmarks/bench_conv.py
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hsee_jax.core.types import Array
from hsee_jax.nn.convolution import convolution
from hsee_jax.nn.convolution_forms import Geometry
from hsee_jax.nn.winograd import TWO, winograd

LAYOUT = ("NHWC", "HWIO", "NHWC")
PASSES = ("forward", "wrt_input", "wrt_weights")
FORMS = {
    "single": ("grouped", "patches", "winograd", "winograd4", "mixed"),
    "stacked": ("grouped", "unrolled", "patches", "winograd", "winograd4", "mixed"),
}
AT_ONCE = (1, 2, 4, 8, 16)  # MiB of tiles
Shape = tuple[int, int, int, int, int]  # H = W, C, F, window, stride


def resnet_shapes(width: int, image: int) -> list[Shape]:
    """Return the distinct convolutions of a ResNet-18."""
    shapes = [(image, 3, width, 3, 1)]
    for group in range(4):
        channels, size = width * 2**group, -(-image // 2**group)
        shapes.append((size, channels, channels, 3, 1))
        if group < 3:
            shapes += [(size, channels, 2 * channels, k, 2) for k in (3, 1)]
    return shapes


def passes(form: str, shape: Shape) -> dict[str, Callable]:
    """Return the three passes of one convolution as functions of ``(x, w, dy)``."""
    _, _, _, window, stride = shape
    pad = ((window // 2, window // 2),) * 2
    conv = convolution(form)

    def forward(x: Array, w: Array, dy: Array) -> Array:
        return conv(x, w, (stride, stride), pad, dimension_numbers=LAYOUT)

    def wrt_input(x: Array, w: Array, dy: Array) -> Array:
        return jax.vjp(lambda x: forward(x, w, dy), x)[1](dy)[0]

    def wrt_weights(x: Array, w: Array, dy: Array) -> Array:
        return jax.vjp(lambda w: forward(x, w, dy), w)[1](dy)[0]

    return {"forward": forward, "wrt_input": wrt_input, "wrt_weights": wrt_weights}


def arrays(shape: Shape, batch: int, leading: tuple[int, ...] = ()) -> list[Array]:
    """Draw inputs, weights and the gradient of the output."""
    size, channels, features, window, stride = shape
    out = (size - 1) // stride + 1
    rng = np.random.default_rng(0)
    shapes = (
        (batch, size, size, channels),
        (window, window, channels, features),
        (batch, out, out, features),
    )
    return [
        jnp.asarray(rng.standard_normal((*leading, *s), np.float32)) for s in shapes
    ]


def compiled(function: Callable, *args: Array) -> Callable[[], Any]:
    """Compile a function, and return a call that returns when its work is done."""
    program = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def row(setting: str, shape: Shape, batch: int, pass_: str, **rest: Any) -> bench.Row:
    """Return the columns that identify a row."""
    size, channels, features, window, stride = shape
    return {
        "setting": setting,
        "batch": batch,
        "image": size,
        "channels": channels,
        "features": features,
        "window": window,
        "stride": stride,
        "pass": pass_,
        **rest,
    }


def milliseconds(timings: dict[str, bench.Timing]) -> dict[str, Any]:
    """Return the median, the lowest and the highest time of each name."""
    return {
        **{name: 1e3 * timing.median for name, timing in timings.items()},
        "spread": {n: [1e3 * t.low, 1e3 * t.high] for n, t in timings.items()},
    }


def compare(
    setting: str, shape: Shape, batch: int, clients: int, repeats: int
) -> list[bench.Row]:
    """Measure a row for each pass, and on stacks a row for all three together."""
    stacked = setting == "stacked"
    args = arrays(shape, batch, (clients,) if stacked else ())

    def step(form: str, *args: Array) -> list[Array]:
        return [run(*args) for run in passes(form, shape).values()]

    def call(form: str, pass_: str) -> Callable[[], Any]:
        run = partial(step, form) if pass_ == "all" else passes(form, shape)[pass_]
        return compiled(jax.vmap(run) if stacked else run, *args)

    rows = []
    for pass_ in ("all",) if stacked else PASSES:
        calls = {form: call(form, pass_) for form in bench.forms_here(FORMS[setting])}
        times = milliseconds(bench.time_in_turns(calls, repeats=repeats))
        rows.append(row(setting, shape, batch, pass_, clients=clients, **times))
    return rows


def scanned(shape: Shape, batch: int, steps: int, repeats: int) -> list[bench.Row]:
    """Time the gradient of one set of weights over batches: in a loop and in a scan."""
    xs, ws, dys = arrays(shape, batch, (steps,))
    rows = []
    for form in bench.forms_here(("grouped", "patches", "winograd", "winograd4")):
        gradient = passes(form, shape)["wrt_weights"]
        one = jax.jit(gradient)

        def loop(one: Callable = one) -> Any:
            grads = [one(xs[i], ws[0], dys[i]) for i in range(steps)]
            return jax.block_until_ready(grads)

        def body(w: Array, pair: Any, gradient: Callable = gradient) -> Any:
            return w + gradient(pair[0], w, pair[1]), None

        calls = {
            "loop": loop,
            "scan": compiled(lambda w, *p, f=body: lax.scan(f, w, p), ws[0], xs, dys),
        }
        times = milliseconds(bench.time_in_turns(calls, repeats=repeats))
        rows.append(row("scanned", shape, batch, "wrt_weights", form=form, **times))
    return rows


def at_once(shape: Shape, batch: int, repeats: int) -> list[bench.Row]:
    """Time `winograd` by the MiB of tiles at once; `all` has no limit."""
    size, _, _, window, stride = shape
    x, w, dy = arrays(shape, batch)
    pads = ((window // 2, window // 2),) * 2
    geometry = Geometry((size, size), (window, window), (stride, stride), pads)
    operands = {"forward": (x, w), "wrt_input": (dy, w), "wrt_weights": (x, dy)}
    limits = {str(mib): mib * 2**20 for mib in AT_ONCE} | {"all": 2**62}
    rows = []
    for pass_ in PASSES:

        def call(limit: int, pass_: str = pass_) -> Callable[[], Any]:
            run = getattr(winograd(TWO, limit), pass_)
            return compiled(partial(run, geometry=geometry), *operands[pass_])

        calls = {name: call(limit) for name, limit in limits.items()}
        times = milliseconds(bench.time_in_turns(calls, repeats=repeats))
        rows.append(row("at_once", shape, batch, pass_, **times))
    return rows


def main() -> None:
    """Print four tables, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for a test")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    options = parser.parse_args()
    if options.quick:
        repeats, clients, nets, stacks = 1, 2, [(2, 8, 2)], [(2, 8, 2)]
    else:
        repeats, clients = 5, 8
        nets, stacks = [(64, 32, 32), (16, 32, 8), (8, 28, 8)], [(16, 32, 8)]
    shape = "image channels features window stride".split()
    rows: list[bench.Row] = []
    for setting, networks in (("single", nets), ("stacked", stacks)):
        part = [
            entry
            for width, image, batch in networks
            for shape_ in resnet_shapes(width, image)
            for entry in compare(setting, shape_, batch, clients, repeats)
        ]
        head = ["batch", *shape, "pass", *bench.forms_here(FORMS[setting])]
        print(f"\nmilliseconds, {setting} weights\n\n{bench.table(part, head)}")
        rows += part
    width, image, batch = stacks[0]
    part = scanned((image // 2, 2 * width, 2 * width, 3, 1), batch, 4, repeats)
    print(f"\nmilliseconds, 4 batches\n\n{bench.table(part, ['form', 'loop', 'scan'])}")
    rows += part
    width, image, batch = nets[0]
    part = [
        entry
        for group in range(4)
        for entry in at_once(
            (image >> group, width << group, width << group, 3, 1), batch, repeats
        )
    ]
    head = ["image", "channels", "pass", *map(str, AT_ONCE), "all"]
    print(f"\nmilliseconds, MiB of tiles at once\n\n{bench.table(part, head)}")
    print(f"\nwrote {bench.write('conv', rows + part, out=options.out)}")


if __name__ == "__main__":
    main()
