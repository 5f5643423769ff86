"""The section of the page on performance whose figures no device has measured."""

import bench
from sections import Cell, Part, Section, figure, value


def _program(row: bench.Row) -> str:
    """Name what is compiled."""
    if row["strategy"] == "plain":
        return "one plain network"
    cuts = " ".join(row["cuts"])
    text = f"{row['strategy']}, {row['clients']} clients, cuts {cuts}"
    if row["strategy"] == "averaging":
        text += f", {row['axis']}"
    return text if row["form"] == "auto" else f"{text}, {row['form']}"


def _peak(row: bench.Row) -> str:
    """Show the memory of a chip that a program needs."""
    if "peak GB" in row:
        return figure(row["peak GB"])
    needed = row["needs GiB"]
    return "does not fit" + (f" ({needed * 2**30 / 1e9:.0f})" if needed else "")


def _collectives(key: str) -> Cell:
    """Show the megabytes of each kind of collective, from 10 kilobytes up."""

    def cell(row: bench.Row) -> str:
        if key not in row:
            return ""
        return (
            ", ".join(
                f"{entry['kind']} {entry['dtype']} {figure(float(entry['MB']))}"
                for entry in row[key]
                if entry["MB"] >= 0.01
            )
            or "none"
        )

    return cell


def _share(key: str) -> Cell:
    """Show a share in percent."""
    return lambda row: f"{row[key]:.0%}" if key in row else ""


AOT = Section(
    "aot",
    "Rounds compiled for accelerators",
    "*Compiled for, not run on*: no figure of this section was measured on a device. "
    "XLA compiled ResNet-18 of width 64 with batches of 128 in bfloat16. The time is "
    "the sum of the cycles that XLA for TPU expects; trust its order and factors above "
    "1.5, not its milliseconds. For a GPU that is not there, XLA expects no cycles and "
    "counts no work. The cost is the time for an image, links included, relative to "
    "one plain network on one chip; at 1, each chip works as well as a chip that "
    "trains one network. Two columns are for comparison: the plain network's FLOPs at "
    "the peak of the chips, which is the least possible time, and all bytes that XLA "
    "counts at the bandwidth of the memory, though some never leave the chip. Links "
    "count the bytes on a ring of the chips, and are not in the time of a step. Memory "
    "is in GB of one chip. The compiler shared its cores with other work. `auto` takes "
    "`grouped` on TPU and `unrolled` on a GPU.",
    (
        Part(
            "",
            {
                "program": _program,
                "chips": value("count"),
                "state GB": value("state GB"),
                "peak GB": _peak,
                "step ms": value("step ms"),
                "cost": value("cost in plain networks"),
                "FLOPs ms": value("FLOPs ms"),
                "bytes ms": value("bytes ms"),
                "links ms": value("link ms"),
                "links' share of the time": _share("link share"),
                "compile s": value("compile s"),
            },
        ),
        Part(
            "Work of one chip in a step, as XLA counts it (a loop over the clients "
            "counts once, in `sequential` and in `map`), and the collectives between "
            "chips in MB:",
            {
                "program": _program,
                "chips": value("count"),
                "GFLOP": value("GFLOP"),
                "GB": value("GB"),
                "in a step": _collectives("collectives of a step"),
                "at the end of a round": _collectives("collectives of a round"),
            },
        ),
    ),
    {},
)
