"""Time one round of both strategies against the same algorithm in PyTorch.

Shows: images trained a second by hsee_jax and by `pytorch_baseline.py` (eager, and with
torch.compile), their ratio, and the share of the machine's matrix-product peak that
each reaches. Before the timing both train from the same weights, and their losses must
agree: step by step in a small federation, and over the first round of the timed one.
Run `hsee tune` before, for the width and the batch size; a row says whether this
machine has tuned forms.
A row also says whether the machine was idle: whether other processes kept at most 0.5
of its cores busy meanwhile.
Expected: on two idle CPU cores, untuned, 1.3 to 2 times eager PyTorch at width 8, 1.2
to 1.7 times at width 16, and 0.8 to 1.2 times at width 64; machines with a
processor of one name differ by so much. On one H100 at least 3 times at width 64.
Cost: about 12 minutes on two CPU cores; --compile adds minutes.
Command: python benchmarks/bench_round.py [--sizes w8-b8-n32 ...]
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from federations import STRATEGIES, Runner, federation

from hsee_jax.config import override
from hsee_jax.engine.streams import num_threads
from hsee_jax.runs.build import build_model
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.forms import read_forms
from hsee_jax.systems.costs import layer_costs

try:
    import pytorch_baseline as baseline
except ModuleNotFoundError as error:  # without PyTorch its columns stay empty
    if error.name != "torch":
        raise
    baseline = None  # type: ignore[assignment]

Losses = npt.NDArray[np.float64]  # see `TorchFederation.run_round`
# Relative, of each client's losses after 0, 1 and more steps, and of all in a round.
TOLERANCES = (1e-5, 1e-4, 1e-3)
ROUND_TOLERANCES = {"float32": 1e-2, "bfloat16": 1e-1}


class Size(NamedTuple):
    """The size of a federation to time."""

    width: int
    batch_size: int
    clients: int
    steps: int  # in a round
    repeats: int
    warmups: int = 1  # in addition to the round that compares the losses
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Return the name of the row and the file."""
        return f"w{self.width}-b{self.batch_size}-n{self.clients}"

    @property
    def images(self) -> int:
        """Return the number of images in a round."""
        return self.clients * self.batch_size * self.steps


SIZES = {
    "cpu": (
        Size(8, 8, 32, steps=12, repeats=5),
        Size(16, 8, 32, steps=8, repeats=5),
        Size(64, 32, 6, steps=2, repeats=3, warmups=0),
    ),
    "gpu": (
        Size(64, 128, 12, steps=8, repeats=7, warmups=2, dtype="bfloat16"),
        Size(64, 128, 64, steps=4, repeats=5, warmups=2, dtype="bfloat16"),
    ),
}
# Below width 8 PyTorch 2.13 hangs in a convolution's gradient on some CPUs.
QUICK = Size(8, 8, 3, steps=1, repeats=1, warmups=1)
COLUMNS = (
    "size",
    "dtype",
    "strategy",
    "hsee images/s",
    "hsee range",
    "PyTorch images/s",
    "PyTorch range",
    "ratio",
    "ratio range",
    "idle",
    "compiled images/s",
    "ratio to compiled",
    "hsee share of peak",
    "PyTorch share of peak",
    "loss difference",
)


def main() -> None:
    """Time the sizes, and write a result file for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", help="names such as w8-b8-n32")
    parser.add_argument(
        "--repeats", type=bench.at_least(1), help="timed rounds per program"
    )
    parser.add_argument("--compile", action="store_true", help="compile on CPU too")
    parser.add_argument("--compile-mode", default="default", help="for torch.compile")
    parser.add_argument("--no-check", action="store_true", help="skip `check`")
    parser.add_argument("--quick", action="store_true", help="a tiny size, for tests")
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    arguments = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    sizes = (QUICK,) if arguments.quick else SIZES["gpu" if on_gpu else "cpu"]
    names = [size.name for size in sizes]
    wanted = set(names if arguments.quick else arguments.sizes or names)
    if unknown := wanted - set(names):
        parser.error(f"--sizes: {', '.join(unknown)}: allowed are {', '.join(names)}")
    steps: dict[str, list[float]] = {}
    if baseline is not None and not arguments.no_check:
        width = QUICK.width if arguments.quick else sizes[0].width
        steps = {strategy: check(width, strategy) for strategy in STRATEGIES}
        print(f"relative loss differences after 0, 1, .. steps: {steps}", flush=True)
    mode = arguments.compile_mode if on_gpu or arguments.compile else None
    before = bench.work()
    time.sleep(0.1 if arguments.quick else 5)
    print(f"idle before: {bench.say_idle(bench.cores_elsewhere(before))}", flush=True)
    peak = matmul_peak(256 if arguments.quick else 8192 if on_gpu else 2048)
    for size in sizes:
        if size.name not in wanted:
            continue
        size = size._replace(repeats=arguments.repeats or size.repeats)
        rows = measure(size, peak, compile_mode=mode)
        for row in rows:
            row["loss difference after steps"] = steps.get(row["strategy"])
        print(bench.table(rows, COLUMNS), flush=True)
        bench.write(f"round-{size.name}", rows, out=arguments.out)


def measure(size: Size, peak: float, *, compile_mode: str | None) -> list[bench.Row]:
    """Measure a row for each strategy.

    Args:
      size: the size of the federation.
      peak: FLOP/s of the device's matrix product.
      compile_mode: the mode of torch.compile; None leaves it out.

    Raises:
      SystemExit: the two programs do not train alike.
    """
    calls: dict[str, Callable[[], Any]] = {}
    differences: dict[str, float] = {}
    for strategy in STRATEGIES:
        runner = Runner(_build(size, strategy))
        calls[f"hsee {strategy}"] = runner
        if baseline is not None:
            found, differences[strategy] = _pytorch_calls(runner, size, compile_mode)
            calls |= {f"{name} {strategy}": call for name, call in found.items()}
        else:
            runner()  # compiles, as the round that PyTorch is compared with does
    flops = flops_per_image(_build(size, STRATEGIES[0]))
    before = bench.work()
    timings = bench.time_in_turns(calls, repeats=size.repeats, warmups=size.warmups)
    elsewhere = bench.cores_elsewhere(before)
    shared = {
        "GFLOP per image": flops / 1e9,
        "peak TFLOP/s": peak / 1e12,
        "tuned": bool(read_forms()),
        "turns at once": num_threads(0) if jax.default_backend() == "cpu" else None,
        "cores busy elsewhere": elsewhere,
        "idle": bench.say_idle(elsewhere),
    }
    return [
        _row(size, strategy, timings, flops / peak)
        | shared
        | {"loss difference": differences.get(strategy)}
        for strategy in STRATEGIES
    ]


def _row(
    size: Size, strategy: str, timings: dict[str, bench.Timing], seconds: float
) -> bench.Row:
    """Return the speeds of a strategy; ``seconds`` is the time of an image at peak."""
    row: bench.Row = {"size": size.name, "strategy": strategy, **size._asdict()}
    keys = {"hsee": "hsee", "PyTorch": "pytorch", "compiled": "compiled"}
    speed: dict[str, float] = {}
    for key, name in keys.items():
        timing = timings.get(f"{name} {strategy}")
        if timing is not None:
            speed[key] = size.images / timing.median
            low, high = size.images / timing.high, size.images / timing.low
            row[f"{key} images/s"] = speed[key]
            row[f"{key} range"] = f"{low:.3g}-{high:.3g}"
            row[f"{key} share of peak"] = speed[key] * seconds
    if "PyTorch" in speed:
        row["ratio"] = speed["hsee"] / speed["PyTorch"]
        turns = [timings[f"{name} {strategy}"].turns for name in ("pytorch", "hsee")]
        ratios = [theirs / ours for theirs, ours in zip(*turns, strict=True)]
        row["ratio range"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
    if "compiled" in speed:
        row["ratio to compiled"] = speed["hsee"] / speed["compiled"]
    return row


def _build(size: Size, strategy: str, **changes: Any) -> Experiment:
    return federation(
        clients=size.clients,
        batch_size=size.batch_size,
        steps=size.steps,
        width=size.width,
        strategy=strategy,
        dtype=size.dtype,
        **changes,
    )


def check(width: int, strategy: str, *, rounds: int = 4, **changes: Any) -> list[float]:
    """Train rounds of one step in JAX and in PyTorch, in full float32, a client a cut.

    Args:
      width: the width of the network.
      strategy: the name of the strategy.
      rounds: the number of rounds.
      **changes: values for further fields of the configuration.

    Returns:
      The largest relative difference of any client's losses after 0, 1, ... steps.

    Raises:
      SystemExit: the difference is beyond the tolerance.
    """
    size = Size(width, batch_size=8, clients=3, steps=1, repeats=0)
    with jax.default_matmul_precision("highest"):
        runner = Runner(_build(size, strategy, **changes))
        setting = baseline.Setting(device=_device())
        baseline.allow_tf32(False)
        theirs = _pytorch(runner, setting)
        found = [
            _difference(runner, [theirs(r)], by_client=True) for r in range(rounds)
        ]
        baseline.allow_tf32(True)
    limits = [TOLERANCES[min(i, len(TOLERANCES) - 1)] for i in range(rounds)]
    if not all(f < limit for f, limit in zip(found, limits, strict=True)):
        sys.exit(f"{strategy}: the losses differ by {found}, allowed are {limits}")
    return found


def _difference(runner: Runner, theirs: Sequence[Losses], *, by_client: bool) -> float:
    """Train a round, and return the largest relative difference of two sets of losses.

    The losses are of exits and servers, for each client or summed over all clients.
    """
    metrics = runner()
    ours = np.stack([metrics.exit.loss_sum, metrics.server.loss_sum], axis=1)
    losses = [np.asarray(ours, np.float64), *(values[:, :2] for values in theirs)]
    if not by_client:
        losses = [values.sum(axis=0) for values in losses]
    return max(float(np.max(np.abs(other / losses[0] - 1))) for other in losses[1:])


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _pytorch(runner: Runner, setting: Any) -> Callable[[int], Losses]:
    """Return rounds of the baseline that start from the runner's present state."""
    experiment = runner.experiment
    info = experiment.info
    theirs = baseline.TorchFederation(
        runner.state,
        experiment.federation.groups,
        experiment.train,
        mean=info.mean,
        std=info.std,
        setting=setting,
    )

    def run(number: int) -> npt.NDArray[np.float64]:
        drawn = experiment.plan(number)
        rate = experiment.config.optim.learning_rate
        return theirs.run_round(drawn.indices, drawn.order, rate)

    return run


def _pytorch_calls(
    runner: Runner, size: Size, compile_mode: str | None
) -> tuple[dict[str, partial], float]:
    """Return calls of a round in eager PyTorch and, if it works, in compiled PyTorch.

    Train the baseline and the runner for one round before, and also return the largest
    relative difference of their losses in it.
    """
    setting = baseline.Setting(
        device=_device(), bfloat16=size.dtype == "bfloat16", compile=False
    )
    eager = _pytorch(runner, setting)
    calls, losses = {"pytorch": partial(eager, 1)}, [eager(0)]
    if compile_mode is not None:
        setting = setting._replace(compile=True, compile_mode=compile_mode)
        compiled = _pytorch(runner, setting)
        try:
            losses.append(compiled(0))
            calls["compiled"] = partial(compiled, 1)
        except Exception as error:
            print(f"torch.compile failed: {error}", file=sys.stderr)
    # Rounding grows with every update, so here only the sums over clients are equal.
    difference = _difference(runner, losses, by_client=False)
    if not difference < ROUND_TOLERANCES[size.dtype]:
        sys.exit(f"{size.name}: the losses of a round differ by {difference}")
    return calls, difference


def flops_per_image(experiment: Experiment) -> float:
    """Return the FLOPs of training on an image: three forward passes, mean of clients.

    Forward FLOPs are XLA's count for the direct convolution, whatever form is timed.
    The count includes the gradient of the images, which no layer needs, because it is
    small.
    """
    model = build_model(override(experiment.config, dtype="float32", conv="grouped"))
    costs = [cost.flops for cost in layer_costs(model)]
    depth = len(model.stages)
    layers, exits, final = costs[:depth], costs[depth:-1], costs[-1]
    groups = experiment.federation.groups
    cuts = [group.cut for group in groups for _ in group.ids]
    exit_mean = sum(exits[cut - 1] for cut in cuts) / len(cuts)
    return 3.0 * (sum(layers) + final + exit_mean)


def matmul_peak(size: int, *, chain: int = 8, repeats: int = 5) -> float:
    """Measure the FLOP/s of square products: bfloat16 on a GPU, float32 elsewhere.

    If PyTorch is installed, return the better figure of JAX and PyTorch.
    """
    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    values = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5

    @jax.jit
    def products(a: jax.Array) -> jax.Array:
        for _ in range(chain):
            a = a @ values
        return a

    calls: dict[str, Callable[[], Any]] = {
        "jax": lambda: products(values).block_until_ready()
    }
    if baseline is not None:
        calls["torch"] = baseline.matmul_chain(size, chain, _device(), bfloat16=on_gpu)
    timings = bench.time_in_turns(calls, repeats=repeats)
    return 2.0 * size**3 * chain / min(timing.low for timing in timings.values())


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} seconds in all")
