"""Rounds compiled for accelerators that are not there: how their text is read."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import aot_programs  # noqa: E402
import bench_aot  # noqa: E402
from compiled_text import Collective, program_cost  # noqa: E402

# A loop of steps with 100 cycles, an inner loop of three turns (7 each), and a switch
# over two cuts (10 and 30) with an all-reduce in the second; after the loop the
# average, if it is due.
TEXT = """\
HloModule jit_run, is_scheduled=true, num_partitions=4

%fused (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  ROOT %c = bf16[8]{0:T(256)} convert(bf16[8]{0} %p)
}

%short (a: f32[4]) -> f32[4] {
  ROOT %f = f32[4]{0} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"10"}
}

%long (a: f32[4]) -> f32[4] {
  %r = (bf16[4,2]{1,0:T(8,128)(2,1)}, f32[3]{0}) all-reduce(%a, %a), to_apply=%add
  ROOT %f = f32[4]{0} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"30"}
}

%inner (t: (s32[])) -> (s32[]) {
  ROOT %f = f32[4]{0} fusion(%t), calls=%fused, backend_config={"estimated_cycles":"7"}
}

%step (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %v = bf16[8]{0} fusion(%t), calls=%fused, backend_config={"estimated_cycles":"100"}
  %w = (s32[]) while(%t), body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %y = (s32[]) while(%t), condition=%end, body=%inner
  %x = bf16[6]{0} all-to-all(%v), dimensions={0}
  ROOT %s = f32[4]{0} conditional(%t), branch_computations={%short, %long}
}

%end (t: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(4)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

%none (a: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} parameter(0)
}

%average (a: f32[4]) -> f32[4] {
  %s = (f32[5]{0}, f32[20]{0}) all-gather-start(%a), dimensions={0}
  %d = f32[20]{0} all-gather-done(%s)
  ROOT %f = f32[4]{0} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"60"}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %f = f32[4]{0} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"5"}
  %loop = (s32[], f32[4]) while(%f), condition=%test, body=%step
  ROOT %c = f32[4]{0} conditional(%p, %f, %f), true_computation=%average, \
false_computation=%none
}
"""


def test_cycles_and_collectives_are_read_from_the_text():
    step, rest = program_cost(TEXT)
    assert step.cycles == 100 + (3 + 4) * 7 + (10 + 30) / 2
    assert step.nbytes == {
        Collective("all-to-all", "bf16"): 12,
        Collective("all-reduce", "bf16"): 16 / 2,
        Collective("all-reduce", "f32"): 12 / 2,
    }
    assert step.counts[Collective("all-reduce", "f32")] == 0.5
    assert step.link_bytes(4) == 12 * 3 / 4 + (8 + 6) * 2 * 3 / 4
    assert step.link_bytes(1) == 0
    assert rest.cycles == 5 + 60
    assert rest.nbytes == {Collective("all-gather", "f32"): 80}


def test_a_program_without_a_loop_is_refused():
    with pytest.raises(ValueError, match="no loop"):
        program_cost(TEXT.replace(" while(", " call("))


def test_rows_are_written_at_once_and_compiled_only_once(monkeypatch, tmp_path, capsys):
    """The second row fails the first time."""
    tiny = [p for p in aot_programs.programs(quick=True) if p.chip == "v5e"]
    calls = []

    def compile_apart(program, arguments):
        calls.append(program.name)
        if len(calls) == 2:
            return None
        step, link = (2.0, 0.0) if program.strategy == "plain" else (9.0, 1.0)
        figures = {"peak GB": 1.0, "GFLOP": 1.0, "GB": 2.0}
        figures |= {"step ms": step, "link ms": link}
        return {"name": program.name, **program._asdict(), **figures}

    monkeypatch.setattr(bench_aot, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr(bench_aot, "compile_apart", compile_apart)
    monkeypatch.setattr(sys, "argv", ["bench_aot", "--quick", "--out", str(tmp_path)])
    names = [program.name for program in tiny]
    with pytest.raises(SystemExit, match=f"^not compiled: {names[1]}$"):
        bench_aot.main()
    bench_aot.main()
    assert calls == [*names, names[1]]
    content = json.loads((tmp_path / "bench-aot-v5e-tpu.json").read_text())
    assert "not run on" in content["machine"]["device"]
    plain, *rows = content["rows"]
    assert [row["name"] for row in content["rows"]] == names
    # Three clients on four chips: 10 ms where a plain network takes 3/4 of 2 ms.
    assert rows[0]["cost in plain networks"] == pytest.approx(20 / 3)
    assert rows[0]["FLOPs ms"] == pytest.approx(0.75e9 / 197e12 * 1e3)
    assert rows[0]["bytes ms"] == pytest.approx(2e9 / 819e9 * 1e3)
    assert rows[0]["link share"] == pytest.approx(0.1)
    assert plain["cost in plain networks"] == 1.0
    assert names[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chip", "costs"), [("h100", None), ("v5e", {"flops": 4e9, "bytes accessed": 6e9})]
)
def test_only_what_xla_counts_is_in_a_row(chip, costs):
    """For a GPU that is not there it counts neither work nor cycles."""

    class Compiled:
        def memory_analysis(self):
            sizes = dict(argument_size_in_bytes=2e9, peak_memory_in_bytes=3e9)
            return SimpleNamespace(**sizes)

        def cost_analysis(self):
            return costs

        def as_text(self):
            return TEXT

    def row(strategy, count):
        program = aot_programs.Program(chip, count, strategy, count)
        return program._asdict() | bench_aot.figures(Compiled(), program)

    plain, averaging = bench_aot.compared([row("plain", 1), row("averaging", 4)])
    assert averaging["peak GB"] == 3
    assert averaging["link ms"] > 0
    counted = {
        "GFLOP",
        "GB",
        "step ms",
        "FLOPs ms",
        "bytes ms",
        "cost in plain networks",
    }
    assert counted & averaging.keys() == (counted if costs else set())


def test_chips_without_a_compiler_are_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_aot, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench_aot", "--out", str(tmp_path)])
    bench_aot.main()
    assert "v5e: not compiled, libtpu is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


ALLOWED = {
    "averaging": (set(), {"all-reduce"}),
    "sequential": ({"all-reduce", "all-to-all"}, {"all-reduce"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "compiler"), [("v5e", "tpu"), ("h100", "gpu")])
def test_rounds_compile_for_four_chips(chip, compiler, tmp_path):
    """Nothing is exchanged but averages, and the rows and sums of a shared server."""
    if find_spec(bench_aot.COMPILERS[compiler]) is None:
        pytest.skip(f"{bench_aot.COMPILERS[compiler]} is not installed")
    command = [sys.executable, BENCHMARKS / "bench_aot.py", "--quick", "--out"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path / f"bench-aot-{chip}-{compiler}.json"
    plain, *rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3, done.stdout
    for row in rows:
        allowed = ALLOWED[row["strategy"]]
        for where, kinds in zip(("step", "round"), allowed, strict=True):
            found = {entry["kind"] for entry in row[f"collectives of a {where}"]}
            assert found <= kinds, row["name"]
        assert row["state GB"] < row["peak GB"] < row["state GB"] + 0.05
        assert row.get("step ms", 1) > 0
