"""The studies of `experiments/`, their results, and the page made of them."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hsee_jax import studies
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.data import build_info

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import accelerator  # noqa: E402
import tables  # noqa: E402

NAMES = sorted(path.parent.name for path in EXPERIMENTS.glob("*/study.toml"))
RESULTS = {"demo": 2, "cpu-small-cifar10": 63, "cpu-small-fashion": 63}


def load(name):
    return studies.load(EXPERIMENTS / name / "study.toml")


@pytest.mark.parametrize("name", NAMES)
def test_a_study_says_what_it_is_and_can_be_composed(name):
    study = load(name)
    assert study.title
    assert study.shows
    assert study.cost
    assert all(row.shows for row in study.rows)
    for run in studies.runs(study, seeds=[7]):
        assert (run.config.run.model_seed, run.config.run.data_seed) == (7, 7)
        info = build_info(run.config.data)
        build_strategy(run.config, build_federation(run.config, info))


def test_every_dataset_has_all_rows():
    names = [{row.name for row in load(n).rows} for n in NAMES if n != "demo"]
    # full size is computed in bfloat16, of which float16 would save nothing
    halves = {"averaging-float16", "sequential-float16"}
    assert len(names) == 5
    assert all(found - halves == names[0] for found in names)
    assert {"centralized", "local-mixed", "splitfed_v1", "fedavg"} < names[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_results_are_those_of_the_study(name):
    """Each of them counts: it has the settings of its row."""
    study, results = tables.load(name)
    found = studies.by_row(study, results)
    assert sum(map(len, found.values())) == len(results) == RESULTS.get(name, 0)
    if results:
        assert studies.unfinished(studies.runs(study), EXPERIMENTS / name) == []


def test_the_pages_show_the_results():
    assert tables.PAGE.read_text(encoding="utf-8") == tables.accuracy()
    readme = tables.README.read_text(encoding="utf-8")
    assert tables.insert(readme, tables.headline(), "headline") == readme


def test_the_page_says_once_what_is_not_run():
    page = tables.accuracy()
    assert page.count("## Not run") == 1
    assert "Not run: " not in page
    for name in ("cifar10", "cifar100", "stl10"):
        assert page.count(f"`experiments/{name}`") == 1


def test_the_headline_has_six_rows():
    header, _, *rows = tables.headline().splitlines()
    assert header == "| row | what it is | exit accuracy | server accuracy |"
    assert len(rows) == 6
    assert all(row.count("±") == 2 for row in rows)


def test_a_text_replaces_what_is_between_the_markers():
    readme = "a\n<!-- it -->\nold\n<!-- end of it -->\nz\n"
    text = tables.insert(readme, "new", "it")
    assert text == "a\n<!-- it -->\nnew\n<!-- end of it -->\nz\n"
    assert tables.insert("a\n", "new", "it") == "a\n"


@pytest.mark.slow
@pytest.mark.parametrize("row", ["averaging-mixed", "sequential-mixed"])
@jax.numpy_dtype_promotion("standard")  # Flax's BatchNorm relies on it
def test_a_full_size_row_shrunk_is_trained_as_on_an_accelerator(tmp_path, row):
    """In bfloat16, stacked and spread: the losses are those of float32, one by one."""
    rng = np.random.default_rng(0)
    (tmp_path / "cifar10").mkdir()
    for split, count in (("train", 48), ("test", 8)):
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = np.arange(count) % 10
        np.savez(tmp_path / "cifar10" / split, images=images, labels=labels)
    size = {"width": 2, "num_clients": 3, "batch_size": 8, "rounds": 2}
    losses = []
    for kind in ({"client_axis": "vmap"}, {"client_axis": "loop", "dtype": "float32"}):
        changes = {"data_dir": str(tmp_path)} | size | kind
        (run,) = studies.runs(load("cifar10"), rows=[row], seeds=[0], **changes)
        folder = tmp_path / kind["client_axis"]
        found = studies.train_run(run, folder)
        assert found.settings["dtype"] == kind.get("dtype", "bfloat16")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line)["train"] for line in lines]
        losses.append([[r["exit_loss"], r["server_loss"]] for r in records])
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_one_command_measures_speed_first_and_then_trains(monkeypatch):
    """The benchmarks get half of the time, and the studies what is left."""
    clock, calls = [0.0], []

    def run(arguments, check):
        calls.append(arguments[1:])
        clock[0] += 60

    monkeypatch.setattr(accelerator.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(accelerator.subprocess, "run", run)
    words = ["accelerator.py", "forms", "--seconds", "150", "--data-dir", "sets"]
    monkeypatch.setattr(sys, "argv", words)
    accelerator.main()
    benchmarks, *sweeps = calls
    assert Path(benchmarks[0]).name == "bench_all.py"
    assert benchmarks[1:] == ["forms", "--within", "75.0"]
    assert [Path(words[3]).parent.name for words in sweeps] == ["cifar10", "cifar100"]
    assert [words[words.index("--seconds") + 1] for words in sweeps] == ["90", "30"]
    assert all(words[-2:] == ["--data-dir", "sets"] for words in sweeps)
