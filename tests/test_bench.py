"""The benchmarks: their PyTorch baseline trains alike, and their files are complete."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from short_resnet import SHORT_RESNET

from hsee_jax.nn.convolution_choice import FORMS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
import bench_all  # noqa: E402
import bench_scaling  # noqa: E402
import bench_step  # noqa: E402
import federations  # noqa: E402
import performance  # noqa: E402
import sections  # noqa: E402


def import_round():
    """`bench_round` with PyTorch; without it where HSEE_REQUIRE_TORCH is set: fails."""
    if "HSEE_REQUIRE_TORCH" in os.environ:
        importlib.import_module("torch")
    else:
        pytest.importorskip("torch", reason="the extra `torch` is not installed")
    import bench_round

    return bench_round


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def written(folder, name):
    """The rows of a result file, whose machine is named."""
    (path,) = folder.glob(f"bench-{name}-*.json")
    content = json.loads(path.read_text())
    assert {"backend", "device", "cpu_cores", "processor", "versions"} <= set(
        content["machine"]
    )
    return content["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_pytorch_trains_alike(strategy):
    """Three clients of two cuts, from the same weights, over several rounds."""
    bench_round = import_round()
    differences = bench_round.check(8, strategy, cuts=("1", "3"), **SHORT_RESNET)
    assert len(differences) == 4
    assert max(differences) < 1e-5


@pytest.mark.slow
def test_the_check_sees_an_average_that_is_left_out(monkeypatch):
    bench_round = import_round()
    monkeypatch.setattr(
        bench_round.baseline.TorchFederation, "_average", lambda self: None
    )
    with pytest.raises(SystemExit, match="losses differ"):
        bench_round.check(8, "averaging", cuts=("1", "3"), **SHORT_RESNET)


@pytest.mark.parametrize("strategy", federations.STRATEGIES)
def test_federations_have_full_batches_and_all_cuts(strategy):
    built = federations.federation(
        clients=4, batch_size=2, steps=3, width=2, strategy=strategy
    )
    assert [g.ids for g in built.federation.groups] == [(0, 3), (1,), (2,)]
    assert {len(shard) for shard in built.shards.values()} == {6}
    drawn = built.plan(0)
    assert drawn.indices.shape == (3, 4, 2)
    assert drawn.mask.all()


RESULT = {
    "benchmark": "round-w8-b8-n32",
    "machine": {
        "backend": "cpu",
        "device": "1 x abacus",
        "cpu_cores": 2,
        "processor": "an old one",
        "versions": {"jax": "1.2.3"},
    },
    "rows": [
        {
            "size": "w8-b8-n32",
            "dtype": "float32",
            "strategy": "averaging",
            "hsee images/s": 1234.5,
            "hsee range": "1.1e+03-1.3e+03",
            "ratio": 1.5,
        }
    ],
}


def test_the_page_shows_what_is_there_and_says_once_what_is_missing():
    other = {**RESULT, "benchmark": "beads", "rows": [{"beads": 7}]}
    text = performance.render([RESULT, other])
    assert "- **A**: 1 x abacus, 2 cores of an old one; jax 1.2.3\n" in text
    (row,) = [line for line in text.splitlines() if "1,234" in line]
    assert row == (
        "| w8-b8-n32 | float32 | averaging | no | 1,234 (1,100 to 1,300) | 1.5 |"
    )
    assert "compiled" not in text  # no row has it
    assert "beads" not in text
    assert text.count("## Not measured") == 1
    missing = text.partition("## Not measured")[2]
    assert (
        "A round against PyTorch: on a CPU, w8-b8-n32 float32 sequential, " in missing
    )
    assert "A round against PyTorch: on a GPU\n" in missing
    assert "Forms of one convolution: on a CPU\n" in missing


def test_a_gap_in_a_column_is_marked():
    full = {**RESULT["rows"][0], "strategy": "sequential", "PyTorch images/s": 8.0}
    text = performance.render([{**RESULT, "rows": [*RESULT["rows"], full]}])
    assert "| averaging | no | 1,234 (1,100 to 1,300) | – | 1.5 |" in text
    assert text.count("–: not measured.") == 1


def test_figures_are_readable():
    """No exponents but for very small figures, and a few digits."""
    assert [sections.figure(x) for x in (44732.9, 575.4, 2.374, 1.09e-5, 32, None)] == [
        "44,733",
        "575",
        "2.37",
        "1.09e-05",
        "32",
        "",
    ]
    ends = sections.spread("range")({"range": "4.46e+04-4.56e+04"})
    assert ends == "44,600 to 45,600"


def test_the_page_is_up_to_date():
    page = performance.PAGE.read_text(encoding="utf-8")
    assert page == performance.render(performance.load(bench.RESULTS))


def test_all_benchmarks_are_parts():
    found = bench_all.parts("cpu")
    assert {f"scaling-{part}" for part in bench_scaling.PARTS} <= set(found)
    scripts = {arguments[0] for arguments in found.values()}
    everything = {path.name for path in BENCHMARKS.glob("bench_*.py")}
    assert scripts == everything - {"bench_all.py"}


def test_a_failing_part_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    (tmp_path / "good.py").write_text(
        "import pathlib, sys; pathlib.Path(sys.argv[2], 'x').touch()"
    )
    monkeypatch.setattr(bench_all, "HERE", tmp_path)
    monkeypatch.setattr(bench_all, "default_backend", lambda: "cpu")
    names = ["bad", "slow", "good"]
    monkeypatch.setattr(bench_all, "parts", lambda _: {n: [f"{n}.py"] for n in names})
    arguments = ["bench_all", "--out", str(tmp_path), "--seconds", "5"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="bad.*status 3.*slow.*more than 5 s"):
        bench_all.main()
    assert (tmp_path / "x").exists()
    assert "== good: done" in capsys.readouterr().out


def test_parts_that_time_does_not_allow_are_not_begun(monkeypatch, tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(bench_all, "HERE", tmp_path)
    monkeypatch.setattr(bench_all, "default_backend", lambda: "cpu")
    monkeypatch.setattr(bench_all, "parts", lambda _: dict.fromkeys("ab", ["slow.py"]))
    arguments = ["bench_all", "--out", str(tmp_path), "--within", "0.5"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="'a': 'took more.*'b': 'not begun'"):
        bench_all.main()


def test_unknown_parts_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", "everything"])
    with pytest.raises(SystemExit) as end:
        bench_scaling.main()
    assert end.value.code == 2
    assert "everything: allowed are clients, devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("bench_deployment", ["--pairs", "0"], "--pairs: 0 is not allowed; allowed is"),
        ("bench_deployment", ["--rounds", "1"], "1 is not allowed; allowed is 2 or"),
        ("bench_deployment", ["--clients", "x"], "--clients: x is not allowed"),
        ("bench_round", ["--repeats", "-1"], "--repeats: -1 is not allowed"),
        ("bench_timing", ["--network", "nope"], "network: nope is unknown"),
    ],
)
def test_bad_values_are_one_line(monkeypatch, tmp_path, capsys, script, words, message):
    monkeypatch.setattr(sys, "argv", [script, *words, "--out", str(tmp_path)])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # leaves the cache as it is
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_no_form_that_can_abort_a_compiler_is_timed(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    forms = [form for form in FORMS if form != "auto"]
    found = bench.forms_here(forms)
    assert found == (["grouped", "unrolled"] if backend == "gpu" else forms)


@pytest.mark.slow
def test_round_writes_its_file(tmp_path):
    import_round()
    result = run("bench_round.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = written(tmp_path, "round-*")
    assert [row["strategy"] for row in rows] == ["averaging", "sequential"]
    for row in rows:
        assert row["hsee images/s"] > 0
        assert row["ratio"] == pytest.approx(
            row["hsee images/s"] / row["PyTorch images/s"]
        )
        assert "compiled images/s" not in row
        assert 0 < row["hsee share of peak"] < 1
        assert row["loss difference"] < 1e-3


@pytest.mark.slow
def test_conv_writes_its_file(tmp_path):
    result = run("bench_conv.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = written(tmp_path, "conv")
    settings = {"single", "stacked", "scanned", "at_once"}
    assert {row["setting"] for row in rows} == settings
    forms = [row for row in rows if row["setting"] == "stacked"]
    assert all(row["grouped"] > 0 and row["patches"] > 0 for row in forms)


@pytest.mark.slow
def test_gate_writes_its_file(tmp_path):
    result = run("bench_gate.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = written(tmp_path, "gate")
    assert len(rows) == 4 and all(row["server ms"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("part", bench_scaling.PARTS)
def test_scaling_writes_its_files(part, tmp_path):
    result = run("bench_scaling.py", part, "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = written(tmp_path, f"scaling-{part}")
    for row in rows:
        assert set(bench_scaling.COLUMNS[part]) <= set(row)
        assert all(row[column] is not None for column in bench_scaling.COLUMNS[part])


@pytest.mark.slow
def test_step_writes_its_file(tmp_path):
    done = run("bench_step.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = written(tmp_path, "step")
    kinds = [row[kind] for kind in bench_step.ALL_KINDS]
    assert min(kinds) > 0 and row["operations"] > 100


@pytest.mark.slow
def test_width_writes_its_file(tmp_path):
    done = run("bench_width.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = written(tmp_path, "width")
    assert 0 < row["FLOPs"] < 1
    low, high = map(float, row["range"].split("-"))
    assert 0 < low - 0.01 <= row["time"] <= high + 0.01


@pytest.mark.slow
def test_start_writes_its_file(tmp_path):
    done = run("bench_start.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    cold, warm = written(tmp_path, "start")
    assert [cold["programs kept"], warm["programs kept"]] == ["no", "yes"]
    assert 0 < cold["programs"] == warm["programs"] <= 30
    assert cold["first step s"] > 0 < warm["first step s"]


@pytest.mark.slow
def test_deployment_writes_its_file(tmp_path):
    done = run("bench_deployment.py", "--quick", "--clients", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = written(tmp_path, "deployment")
    simulated, served = [row for row in rows if row["table"] == "rounds"]
    assert served["same network"] == "bit for bit"
    assert served["server accuracy"] == simulated["server accuracy"]
    calls = {row["call"]: row for row in rows if row["table"] == "bytes"}
    for way in ("up", "down"):
        for call in ("push", "finish", "next"):
            assert calls[call][f"predicted {way}"] <= calls[call][f"sent {way}"]
        assert calls["all"][f"sent {way}"] < calls["all, on the wire"][f"sent {way}"]


@pytest.mark.slow
def test_device_writes_its_file(tmp_path):
    done = run("bench_device.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    imports, device = written(tmp_path, "device")
    assert 0 < imports["later peak MB"] < device["later peak MB"]
    assert 0 < device["counted MB"] < device["first peak MB"]


def test_cores_that_other_processes_keep_busy():
    before = bench.work()
    spins = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", spins], check=True)
    elsewhere = bench.cores_elsewhere(before)
    assert elsewhere > 0.3
    assert bench.say_idle(0.5) == "yes, 0.50 cores"
    assert bench.say_idle(0.51) == "no, 0.51 cores"
    assert bench.say_idle(bench.cores_elsewhere(None)) == "not known"
