"""The sections of the page on performance: their figures, and how to read them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import bench
import bench_forms
import bench_round
import bench_step

Cell = Callable[[bench.Row], str]  # the text of a cell; empty if it is not measured
BACKENDS = {"cpu": "CPU", "gpu": "GPU"}


class Part(NamedTuple):
    """A table of a section."""

    text: str  # how to read it
    columns: Mapping[str, Cell]  # by heading
    only: bench.Row = {}  # values of the rows that belong to the table

    def holds(self, row: bench.Row) -> bool:
        """Return whether a row belongs to the table."""
        return self.only.items() <= row.items()


class Section(NamedTuple):
    """One question, answered from the results with the same beginning of the name."""

    prefix: str
    title: str
    text: str
    parts: Sequence[Part]
    expected: Mapping[str, list[bench.Row]] = {"cpu": [], "gpu": []}  # by backend


def figure(value: Any) -> str:
    """Return a figure as text: with three digits, or as a whole number from 100 on."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value) or "none"


def value(key: str) -> Cell:
    """Show a figure."""
    return lambda row: figure(row.get(key))


def spread(key: str) -> Cell:
    """Show two figures that a text such as ``1.77-2.52 ms`` names."""

    def cell(row: bench.Row) -> str:
        ends = re.findall(r"\d[\d.]*(?:e[+-]?\d+)?", row.get(key) or "")
        return " to ".join(figure(float(end)) for end in ends)

    return cell


def both(key: str, range_key: str) -> Cell:
    """Show a figure, and its range in brackets."""

    def cell(row: bench.Row) -> str:
        text, ends = value(key)(row), spread(range_key)(row)
        return f"{text} ({ends})" if text and ends else text

    return cell


def convolution(row: bench.Row) -> str:
    """Show the shape of a convolution."""
    return (
        f"{row['channels']} to {row['features']}, window {row['window']}, stride "
        f"{row['stride']}, image {row['image']}"
    )


def _values(*keys: str) -> dict[str, Cell]:
    return {key: value(key) for key in keys}


_SIZE = _values("size", "dtype", "strategy")
_CONVOLUTION: dict[str, Cell] = {"convolution": convolution, "batch": value("batch")}

SECTIONS = (
    Section(
        "round",
        "A round against PyTorch",
        "PyTorch runs the same algorithm from the same weights, and its losses must "
        "agree before anything is timed. In a size, w is the width of the network, b "
        "the batch size and n the number of clients. A ratio above 1 means that "
        "hsee_jax is faster than eager PyTorch. It is the ratio of both medians; the "
        "brackets hold the lowest and the highest ratio of a single turn, and need not "
        "enclose it. Tuned rows were timed after `hsee tune`. On a CPU the loop takes "
        "several turns at once. A machine counts as idle if other processes kept at "
        "most 0.5 of its cores busy meanwhile.",
        (
            Part(
                "",
                {
                    **_SIZE,
                    "tuned": lambda row: "yes" if row.get("tuned") else "no",
                    "turns at once": value("turns at once"),
                    "hsee images/s": both("hsee images/s", "hsee range"),
                    "PyTorch images/s": both("PyTorch images/s", "PyTorch range"),
                    "ratio": both("ratio", "ratio range"),
                    "idle": value("idle"),
                    "compiled PyTorch images/s": value("compiled images/s"),
                    "ratio to compiled": value("ratio to compiled"),
                },
            ),
            Part(
                "The share of the machine's peak in matrix products that each reaches, "
                "and the largest relative difference of their losses:",
                {
                    **_SIZE,
                    "hsee": value("hsee share of peak"),
                    "PyTorch": value("PyTorch share of peak"),
                    "loss difference": value("loss difference"),
                },
            ),
        ),
        {
            backend: [
                {"size": size.name, "dtype": size.dtype, "strategy": strategy}
                for size in sizes
                for strategy in bench_round.STRATEGIES
            ]
            for backend, sizes in bench_round.SIZES.items()
        },
    ),
    Section(
        "scaling-clients",
        "Time per image by the number of clients",
        "",
        (
            Part(
                "",
                {
                    **_values("strategy", "clients", "images/s"),
                    "ms per image": both("ms per image", "range"),
                    "relative to 4 clients": value("relative to 4 clients"),
                },
            ),
        ),
    ),
    Section(
        "scaling-devices",
        "Time per image by the number of devices",
        "On a CPU the devices are fakes that share its cores: they show the cost of "
        "the partition, not a speed-up.",
        (
            Part(
                "",
                {
                    **_values("strategy", "devices"),
                    "ms per image": both("ms per image", "range"),
                    "relative to 1 device": value("relative to 1 device"),
                },
            ),
        ),
    ),
    Section(
        "scaling-memory",
        "Peak memory by the number of clients",
        "On a CPU, the resident memory with compilation, above a process that builds "
        "nothing; on a GPU, the memory allocated on the device.",
        (Part("", _values("strategy", "clients", "peak MB")),),
    ),
    Section(
        "scaling-precision",
        "Precision, and a loop over clients or one scan (vmap)",
        "",
        (
            Part(
                "",
                {
                    **_values("strategy", "client axis", "dtype", "images/s"),
                    "ms per image, lowest to highest": spread("range"),
                },
            ),
        ),
    ),
    Section(
        "scaling-population",
        "Rounds of a few clients out of many",
        "",
        (
            Part(
                "",
                {
                    **_values("strategy", "clients", "active"),
                    "seconds a round": both("round s", "range"),
                    "peak MB": value("peak MB"),
                },
            ),
        ),
    ),
    Section(
        "forms",
        "Forms of the stacked convolutions in whole rounds",
        "The cost is the time for an image relative to one plain network on all the "
        "images; 1 means that many clients cost no more than one network.",
        (
            Part(
                "",
                {
                    **_values("width", "batch_size", "strategy", "client axis", "form"),
                    "images/s": both("images/s", "range"),
                    "cost": value("cost in plain networks"),
                },
            ),
        ),
        {
            "cpu": [],
            "gpu": [
                {"width": size.width, "strategy": s, "client axis": axis, "form": form}
                for size in bench_forms.ACCELERATOR
                for axis, form in (("vmap", "unrolled"), ("map", "grouped"))
                for s in bench_round.STRATEGIES
            ],
        },
    ),
    Section(
        "gate",
        "Early exits: time by the share of samples that is sent",
        "Times are of a batch, and relative to a server that runs all samples without "
        "a gate.",
        (
            Part(
                "",
                {
                    "width, batch, cut": lambda row: ", ".join(
                        str(row[key]) for key in ("width", "batch", "cut")
                    ),
                    "sent": lambda row: f"{row['sent']:.0%}",
                    "server ms": both("server ms", "range"),
                    "server, relative": value("relative to all"),
                    "client and server ms": value("both ms"),
                    "both, relative": value("both relative to all"),
                },
            ),
        ),
    ),
    Section(
        "width",
        "Channel gates: time at the gated width",
        "Milliseconds of one sample through a client's layers with all channels, and "
        "through those that `hsee export --width gated` writes, about half of the "
        "channels within blocks. Both are timed in turns; the range of the ratio is "
        "that of nine turns out of ten.",
        (
            Part(
                "",
                {
                    **_values("width", "cut"),
                    "FLOPs left": lambda row: f"{row['FLOPs']:.0%}",
                    **_values("dense ms", "gated ms"),
                    "time left": lambda row: f"{row['time']:.2f} ({row['range']})",
                },
            ),
        ),
        {"cpu": []},
    ),
    Section(
        "step",
        "What a step consists of",
        "Milliseconds of a training step of a whole ResNet-18, and of its operations "
        "by what they are for, as XLA's profiler sees them. Two cores work at once, so "
        "the operations can take more than the step.",
        (
            Part(
                "",
                {
                    **_values("width", "batch"),
                    "step ms": value("step ms"),
                    "operations": value("operations"),
                    **{kind: value(kind) for kind in bench_step.ALL_KINDS},
                },
            ),
        ),
        {"cpu": []},
    ),
    Section(
        "start",
        "From the command to the first step",
        "The seconds from the start of `hsee train demo` to the end of its first step, "
        "without compiled programs and with the programs of an earlier call "
        "(`--compilation-cache`); the number of programs of a run; and the seconds in "
        "which XLA compiles them, or reads them from the cache.",
        (
            Part(
                "",
                {
                    "programs kept from before": value("programs kept"),
                    "first step after s": both("first step s", "range"),
                    "programs": value("programs"),
                    "compilation s": value("compilation s"),
                },
            ),
        ),
        {"cpu": []},
    ),
    Section(
        "timing",
        "The device clock against this machine",
        "`hsee profile` times the machine, and the clock of `hsee plan` predicts a "
        "round of 6 clients at width 16. In the simulation one machine computes for "
        "all, so the sum of all busy seconds is compared with the measured round.",
        (
            Part(
                "",
                {
                    **_values("strategy", "cuts"),
                    "predicted s": value("predicted_s"),
                    "measured s": lambda row: (
                        f"{figure(row['measured_s'])} ({figure(row['measured_low_s'])} "
                        f"to {figure(row['measured_high_s'])})"
                    ),
                    "difference": lambda row: f"{row['error']:+.0%}",
                },
            ),
        ),
        {"cpu": []},
    ),
    Section(
        "deployment",
        "The demo on processes, beside its simulation",
        "`hsee serve demo --local 3` runs a server and three devices on this machine, "
        "which share its cores; `hsee train demo --num-clients 3` trains the same run "
        "in one process. The two were trained in turns, three times; the ratio is of "
        "the medians of a pair. The first round compiles and does not count.",
        (
            Part(
                "",
                {
                    **_values("run", "clients"),
                    "seconds a round": both("seconds a round", "range"),
                    **_values(
                        "ratio", "exit accuracy", "server accuracy", "same network"
                    ),
                },
                {"table": "rounds"},
            ),
            Part(
                "Bytes of the whole run, by call. The predicted bytes are those that a "
                "simulation reports for its links: features and labels up, and the "
                "layers of each average up and down. A deployment also sends a "
                "device's whole state at each evaluation and checkpoint, its first "
                "layers, and the configuration. A counting proxy between devices and "
                "server measured the bytes on the wire, without encryption.",
                _values(
                    "call", "predicted up", "sent up", "predicted down", "sent down"
                ),
                {"table": "bytes"},
            ),
        ),
        {"cpu": []},
    ),
    Section(
        "device",
        "The memory of a device",
        "The peak of the resident memory of `hsee join` in a round of two batches of "
        "32 images of 32x32x3, with ResNet-18 at width 64: at the first start, which "
        "compiles, and at a later start, which finds the programs of the first. The "
        "imports are Python, JAX and gRPC before any work. Counted are the weights, "
        "gradients, optimizer state and activations of a batch.",
        (
            Part(
                "",
                _values("cut", "first peak MB", "later peak MB", "counted MB"),
            ),
        ),
        {"cpu": []},
    ),
    Section(
        "conv",
        "Forms of one convolution",
        "Milliseconds of a pass. A convolution is named by its channels, its window, "
        "its stride and the height of the image.",
        (
            Part(
                "One set of weights:",
                {
                    **_CONVOLUTION,
                    **_values(
                        "pass", "grouped", "patches", "winograd", "winograd4", "mixed"
                    ),
                },
                {"setting": "single"},
            ),
            Part(
                "The stacked weights of 8 clients, all passes together:",
                {
                    **_CONVOLUTION,
                    **_values(
                        "grouped",
                        "unrolled",
                        "patches",
                        "winograd",
                        "winograd4",
                        "mixed",
                    ),
                },
                {"setting": "stacked"},
            ),
            Part(
                "The gradient of the weights in a loop and in a compiled scan:",
                {**_CONVOLUTION, **_values("form", "loop", "scan")},
                {"setting": "scanned"},
            ),
            Part(
                "`winograd` with one set of weights, by the MiB of tiles at once:",
                {
                    **_CONVOLUTION,
                    **_values("pass", "1", "2", "4", "8", "16", "all"),
                },
                {"setting": "at_once"},
            ),
        ),
        {"cpu": []},
    ),
)
