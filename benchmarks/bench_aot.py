"""Compile rounds for accelerators that are not there, and read what XLA expects.

Shows: the memory, the time and the bytes on the links between chips that a step of both
strategies needs on TPU v5e and v6e and on the H100, beside plain networks and the peak.
Nothing runs. A time is the sum of the cycles that XLA for TPU notes in the program (for
a GPU it notes none), and bytes over the links are those of a ring of the chips. Trust
orders, and factors above 1.5.
A row that fails or takes too long does not stop the others, and is named at the end.
Cost: on two CPU cores half a minute to two minutes a row for the H100, two to ten for
TPUs; each row in a process of its own, and written at once. Rows that are in the file
are not compiled again.
Command: python benchmarks/bench_aot.py [ROWS ...], where a row is a name that --list
prints. TPUs need jax 0.10.2 with `pip install 'libtpu==0.0.42.*'`, the H100 needs
`pip install 'jax[cuda12]==0.10.2'`; rows of other chips are left out.
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import bench
import jax
from aot_programs import Program, lower_program, programs
from chips import CHIPS
from compiled_text import Cost, program_cost
from jax.stages import Compiled

COLUMNS = (
    "name",
    "compile s",
    "peak GB",
    "step ms",
    "cost in plain networks",
    "share of peak",
    "link share",
)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}
COMPILERS = {"tpu": "libtpu", "gpu": "jax_cuda12_plugin"}  # modules, by backend


def compile_program(program: Program, text: Path | None = None) -> bench.Row:
    """Compile a program, and return what XLA says about it.

    If the program needs more memory than the chip has, the row has only that memory.

    Args:
      program: the program.
      text: a folder that keeps the text of the compiled program, or None.
    """
    start = time.perf_counter()
    lowered = lower_program(program)
    row = {"name": program.name, **program._asdict()}
    row["lower s"] = time.perf_counter() - start
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"Used ([\d.]+)G of ([\d.]+)G", str(error))
        row["needs GiB"] = float(needed[1]) if needed else None
        return row
    row["compile s"] = time.perf_counter() - start
    if text is not None:
        text.mkdir(parents=True, exist_ok=True)
        with gzip.open(text / f"{program.name}.txt.gz", "wt") as file:
            file.write(compiled.as_text() or "")
    return row | figures(compiled, program)


def figures(compiled: Compiled, program: Program) -> bench.Row:
    """Return memory, work, estimated time and collectives of a compiled program.

    XLA's FLOPs and bytes count the body of every loop once: the loop over the steps,
    and in ``sequential`` and with the client axis ``map`` the loop over the clients.
    For a GPU that is not there XLA counts neither.
    """
    chip, memory = CHIPS[program.chip], cast(Any, compiled.memory_analysis())
    costs: Any = compiled.cost_analysis()
    found = program_cost(compiled.as_text() or "")
    row = {
        "state GB": memory.argument_size_in_bytes / 1e9,
        "peak GB": memory.peak_memory_in_bytes / 1e9,
        "collectives of a step": _collectives(found.step),
        "collectives of a round": _collectives(found.rest),
        "link ms": found.step.link_bytes(program.count) / chip.link * 1e3,
    }
    if costs:
        row |= {"GFLOP": costs["flops"] / 1e9, "GB": costs["bytes accessed"] / 1e9}
    if chip.clock:
        row["step ms"] = found.step.cycles / chip.clock * 1e3
        row["average ms"] = found.rest.cycles / chip.clock * 1e3
    return row


def _collectives(cost: Cost) -> list[bench.Row]:
    """Return the number and the bytes of the collectives of each kind and dtype."""
    return [
        {
            "kind": collective.kind,
            "dtype": collective.dtype,
            "count": cost.counts[collective],
            "MB": cost.nbytes[collective] / 1e6,
        }
        for collective in sorted(cost.nbytes)
    ]


def compared(rows: Sequence[bench.Row]) -> list[bench.Row]:
    """Add to each row how it compares with the plain network on its chip, if compiled.

    A cost of 1 means that the chips train as many images in the time, links included,
    as if each image cost what it costs one plain network on one chip. A step cannot
    take less time than the plain network's FLOPs at the chip's peak. The bytes that XLA
    counts at the memory's bandwidth are no such bound, as some never leave the chip.
    """
    plain = {row["chip"]: row for row in rows if row["strategy"] == "plain"}
    return [
        row | _comparison(row, plain[row["chip"]])
        if row["chip"] in plain and "peak GB" in row
        else row
        for row in rows
    ]


def _comparison(row: bench.Row, plain: bench.Row) -> bench.Row:
    chip, share = CHIPS[row["chip"]], row["clients"] / row["count"]
    found = {}
    if "GFLOP" in plain:
        found["FLOPs ms"] = share * plain["GFLOP"] * 1e9 / chip.flops * 1e3
    if "GB" in row and row["strategy"] != "sequential" and row["axis"] == "vmap":
        found["bytes ms"] = row["GB"] * 1e9 / chip.bandwidth * 1e3
    if "step ms" in row:
        whole = row["step ms"] + row["link ms"]
        found["cost in plain networks"] = whole / (share * plain["step ms"])
        found["share of peak"] = found["FLOPs ms"] / row["step ms"]
        found["link share"] = row["link ms"] / whole
    return found


def compile_apart(program: Program, arguments: argparse.Namespace) -> bench.Row | None:
    """Compile a program in a process of its own; None if that failed, and say why."""
    command = [sys.executable, __file__, "--one", program.name]
    command += ["--quick"] if arguments.quick else []
    command += ["--text", str(arguments.text)] if arguments.text else []
    try:
        done = subprocess.run(
            command,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=arguments.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"{program.name}: took more than {arguments.seconds:.0f} s")
        return None
    if done.returncode:
        print(f"{program.name}: failed\n{done.stderr[-2000:]}")
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def stored(chip: str, out: Path) -> dict[str, bench.Row]:
    """Return the rows of a chip's file by name."""
    path = out / f"bench-aot-{chip}-{CHIPS[chip].backend}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["name"]: row for row in rows}


def write(chip: str, rows: Sequence[bench.Row], out: Path) -> None:
    """Write a chip's rows."""
    device = f"{CHIPS[chip].name}, compiled for and not run on"
    machine = bench.machine() | {"backend": CHIPS[chip].backend, "device": device}
    bench.write(f"aot-{chip}", compared(rows), out=out, on=machine)


def main() -> None:
    """Compile the programs that are not in the files yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="names from --list; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of rows")
    parser.add_argument("--quick", action="store_true", help="tiny, for tests")
    parser.add_argument("--seconds", type=float, default=600, help="limit of a row")
    parser.add_argument("--text", type=Path, help="folder for the compiled programs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=bench.RESULTS)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    known = {p.name: p for p in programs(quick=arguments.quick)}
    if arguments.list:
        print("\n".join(known))
        return
    if arguments.one:
        print(json.dumps(compile_program(known[arguments.one], arguments.text)))
        return
    if unknown := set(arguments.rows) - set(known):
        parser.error(f"{', '.join(unknown)}: allowed are {', '.join(known)}")
    wanted = [known[name] for name in arguments.rows] or list(known.values())
    failed = []
    for chip in CHIPS:
        own = [program for program in wanted if program.chip == chip]
        compiler = COMPILERS[CHIPS[chip].backend]
        if own and find_spec(compiler) is None:
            print(f"{chip}: not compiled, {compiler} is not installed")
            continue
        for program in own:
            if program.name in stored(chip, arguments.out):
                continue
            row = compile_apart(program, arguments)
            if row is None:
                failed.append(program.name)
            else:  # another process may have written meanwhile
                rows = stored(chip, arguments.out) | {program.name: row}
                write(chip, [rows[n] for n in known if n in rows], arguments.out)
        rows = stored(chip, arguments.out)
        if rows:
            print(bench.table(list(rows.values()), COLUMNS), flush=True)
    if failed:
        sys.exit(f"not compiled: {', '.join(failed)}")


if __name__ == "__main__":
    main()
