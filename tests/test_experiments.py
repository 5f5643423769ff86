"""The rows of the results tables, their runner, and the tables made of the results."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny  # noqa: F401  registers its network

import hsee_jax
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.build import build_info as dataset_info_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import accelerator  # noqa: E402
import rows  # noqa: E402
import run as runner  # noqa: E402
import tables  # noqa: E402

ALL = [row for set in rows.sets() for row in rows.rows(set)]
SET = """# Shows: a set for tests.
# Cost: nothing.
# Command: python experiments/run.py mini
preset = "demo"
num_clients = 2
cuts = ["1", "2"]
max_train_samples = 40
max_test_samples = 20
rounds = 3
network = "tiny"
plugin = ["tiny"]
"""


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """One set of two small rows, and folders for their runs and results."""
    folder = tmp_path / "rows" / "mini"
    folder.mkdir(parents=True)
    (folder / "set.toml").write_text(SET)
    for strategy in ("averaging", "sequential"):
        (folder / f"{strategy}.toml").write_text(f'strategy = "{strategy}"\n')
    monkeypatch.setattr(rows, "ROWS", tmp_path / "rows")
    return {"folder": tmp_path / "runs", "results": tmp_path / "results"}


@pytest.mark.parametrize("row", ALL)
def test_a_row_says_what_it_is_and_can_be_composed(row):
    head = (rows.ROWS / f"{row}.toml").read_text().splitlines()
    assert head[0].startswith("# Shows: ")
    assert head[1].startswith("# Cost: ")
    assert head[2].startswith(f"# Command: python experiments/run.py {row}")
    config = rows.config_of(rows.Run(row, 7))
    assert (config.run.model_seed, config.run.data_seed) == (7, 7)
    build_strategy(config, build_federation(config, dataset_info_of(config.data)))


def test_every_dataset_has_all_rows_and_they_differ():
    studies = [set for set in rows.sets() if set != "demo"]
    names = [{row.partition("/")[2] for row in rows.rows(set)} for set in studies]
    # full size is computed in bfloat16, of which float16 would save nothing
    halves = {"averaging-float16", "sequential-float16"}
    assert all(found - halves == names[0] for found in names)
    assert {"centralized", "local-mixed", "splitfed_v1", "fedavg"} < names[0]
    for set in studies:
        own = [
            json.dumps(rows.settings(rows.config_of(rows.Run(row, 0))))
            for row in rows.rows(set)
        ]
        assert len(dict.fromkeys(own)) == len(own)


def test_rows_are_chosen_by_themselves_and_by_sets(mini):
    assert rows.select(["mini/sequential", "mini"]) == [
        "mini/sequential",
        "mini/averaging",
    ]
    with pytest.raises(hsee_jax.UserError, match="mini/avg is unknown.*mini/averaging"):
        rows.select(["mini/avg"])
    with pytest.raises(hsee_jax.UserError, match="maxi is unknown; allowed are mini"):
        rows.select(["maxi"])


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_and_is_done_once(mini, capsys):
    one = rows.Run("mini/averaging", 1)
    assert runner.perform(one, changes={}, **mini, stop=lambda: True) == (
        "stopped in round 1 after step 1 (3 rounds)"
    )
    assert rows.load(one, mini["results"]) is None
    end = runner.perform(one, changes={}, **mini)
    result = rows.load(one, mini["results"])
    assert end == (
        f"exit {result['mean_exit_accuracy']:.4f}, "
        f"server {result['mean_server_accuracy']:.4f}"
    )
    whole = {**mini, "folder": mini["folder"] / "whole"}
    runner.perform(one, changes={}, **whole)
    assert tables.set_table("mini", mini["results"]).count("not run") == 5
    again = rows.load(one, mini["results"])
    for name in ("clients", "mean_exit_accuracy", "mean_server_accuracy", "config"):
        assert again[name] == result[name]
    assert "data_dir" not in result["config"]

    folders = [f"--runs={mini['folder']}", f"--results={mini['results']}"]
    assert runner.main(["mini/averaging", "--seeds", "1", *folders]) == 0
    assert "0 of 1 runs are to be done" in capsys.readouterr().out


def test_a_result_of_another_configuration_does_not_count(mini):
    one = rows.Run("mini/averaging", 0)
    config = rows.config_of(one)
    rows.save(one, config, {}, mini["results"])
    assert rows.load(one, mini["results"]) is not None
    path = mini["results"] / one.result
    content = json.loads(path.read_text())
    del content["config"]["exit_gradient"]  # a field of later days
    path.write_text(json.dumps(content))
    assert rows.load(one, mini["results"]) is not None
    own = rows.ROWS / "mini" / "averaging.toml"
    own.write_text(own.read_text() + "batch_size = 9\n")
    assert rows.load(one, mini["results"]) is None


def test_the_runner_refuses_what_it_does_not_know(capsys):
    assert runner.main(["cifra10"]) == 2
    assert "cifra10 is unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner.main(["demo", "--jobs", "0"])


def test_a_refused_run_is_the_last(tmp_path, capfd):
    """There are no data, and no row of the set could be run."""
    folders = [f"--runs={tmp_path}", f"--results={tmp_path / 'results'}"]
    words = ["cpu-small-cifar10", "--data-dir", str(tmp_path), *folders]
    assert runner.main(words) == 2
    errors = capfd.readouterr().err.splitlines()
    (line,) = (line for line in errors if line.startswith("run.py: "))
    assert line.startswith("run.py: cpu-small-cifar10/averaging-all-mixed seed 0: data")


def test_the_table_has_means_and_deviations(mini):
    """Of 0.1, 0.2 and 0.6 the mean is 0.3, the deviation sqrt(0.14 / 2) = 0.265."""
    for seed, accuracy in enumerate((0.1, 0.2, 0.6)):
        one = rows.Run("mini/sequential", seed)
        summary = {
            "mean_exit_accuracy": accuracy,
            "mean_server_accuracy": 0.5,
            "images_per_second": 100.0,
            "wall_seconds": 10.0 + seed,
            "device": "1 x abacus",
            "cpu_cores": 2,
            "versions": {"python": "3", "jax": "4", "flax": "5"},
        }
        rows.save(one, rows.config_of(one), summary, mini["results"])
    assert tables.set_table("mini", mini["results"]).splitlines() == [
        "| row | seeds | exit accuracy | server accuracy | images/s | seconds |",
        "|---|---|---|---|---|---|",
        "| averaging | not run | not run | not run | not run | not run |",
        "| sequential | 0 1 2 | 0.300 ± 0.265 | 0.500 ± 0.000 | 100 ± 0 | 11 ± 1 |",
        "",
        "Run on 1 x abacus with 2 core(s); python 3, jax 4, flax 5.",
    ]


def test_the_pages_show_the_results(tmp_path, monkeypatch):
    copies = []
    for path in (tables.README, tables.RESULTS_PAGE):
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text())
    flags = [f"--readme={copies[0]}", f"--page={copies[1]}"]
    monkeypatch.setattr(sys, "argv", ["tables.py", *flags])
    tables.main()
    assert copies[0].read_text() == tables.README.read_text()
    assert copies[1].read_text() == tables.RESULTS_PAGE.read_text()


def test_the_accelerator_takes_the_telling_rows_first():
    runs = accelerator.in_order_of_value(["cifar10", "stl10"], [0, 1])
    first = ["centralized", "averaging-mixed", "sequential-mixed", "local-mixed"]
    assert [one.row for one in runs[:8]] == [
        f"{set}/{name}" for set in ("cifar10", "stl10") for name in first
    ]
    assert [one.seed for one in runs] == sorted(one.seed for one in runs)
    assert (
        len({*runs})
        == len(runs)
        == 2 * sum(len(rows.rows(set)) for set in ("cifar10", "stl10"))
    )


@pytest.mark.slow
def test_the_accelerator_keeps_to_its_time_and_goes_on(
    mini, tmp_path, monkeypatch, capsys
):
    """From plain npz files; the second call ends what the first one began."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        images = rng.integers(0, 256, (count, 28, 28, 1), np.uint8)
        labels = np.arange(count) % 10
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    common = rows.ROWS / "mini" / "set.toml"
    common.write_text(common.read_text() + 'dataset = "npz"\n')
    words = ["--sets", "mini", "--seeds", "0", "--data-dir", str(tmp_path)]
    words += [f"--runs={mini['folder']}", f"--results={mini['results']}"]
    with monkeypatch.context() as patch:  # a second passes with every look at the clock
        patch.setattr(time, "monotonic", itertools.count(0, 1).__next__)
        assert accelerator.main([*words, "--seconds", "3", "--row-seconds", "0.5"]) == 0
    (first,) = capsys.readouterr().out.splitlines()
    assert first.startswith("mini/averaging seed 0: stopped ")
    assert accelerator.main([*words, "--list"]) == 0
    both = ["mini/averaging seed 0", "mini/sequential seed 0"]
    assert capsys.readouterr().out.splitlines() == both
    assert accelerator.main(words) == 0
    ends = capsys.readouterr().out.splitlines()
    assert [end.partition(": exit 0.")[0] for end in ends] == both
    assert accelerator.main([*words, "--list"]) == 0
    assert capsys.readouterr().out == ""


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
        folder = tmp_path / kind["client_axis"]
        end = runner.perform(
            rows.Run(f"cifar10/{row}", 0),
            changes={"data_dir": str(tmp_path)} | size | kind,
            folder=folder,
            results=folder,
        )
        assert end.startswith("exit 0.")
        (log,) = folder.rglob("metrics.jsonl")
        records = [json.loads(line)["train"] for line in log.read_text().splitlines()]
        losses.append([[r["exit_loss"], r["server_loss"]] for r in records])
        (result,) = folder.glob("*.json")
        dtype = json.loads(result.read_text())["config"]["dtype"]
        assert dtype == kind.get("dtype", "bfloat16")
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_the_accelerator_leaves_out_what_is_not_there(mini, tmp_path, capsys):
    common = rows.ROWS / "mini" / "set.toml"
    common.write_text(common.read_text() + 'dataset = "cifar10"\n')
    assert accelerator.main(["--sets", "mini", "--data-dir", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("mini/averaging seed 0: left out: data_dir: ")
    assert accelerator.main(["--sets", "maxi"]) == 2


def test_a_signal_is_the_accelerators_end(mini, monkeypatch, capsys):
    def perform(one, *, stop, **options):
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        return "stopped"

    monkeypatch.setattr(runner, "perform", perform)
    words = ["--sets", "mini", f"--results={mini['results']}"]
    assert accelerator.main(words) == 128 + signal.SIGTERM
    assert capsys.readouterr().out == "mini/averaging seed 0: stopped\n"


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {experiments!r}]
import rows, run, tiny
rows.ROWS = Path({rows!r})
if __name__ == "__main__":
    raise SystemExit(run.main())
"""


@pytest.fixture
def start(mini, tmp_path):
    """Starts the runner on the small set, with folders of their own for each name."""
    common = rows.ROWS / "mini" / "set.toml"
    lengthened = common.read_text().replace("rounds = 3", "rounds = 60")
    common.write_text(lengthened + "checkpoint_every = 2\n")
    script = tmp_path / "driver.py"
    script.write_text(
        DRIVER.format(
            tests=str(Path(__file__).parent),
            experiments=str(EXPERIMENTS),
            rows=str(rows.ROWS),
        )
    )

    def popen(name):
        folders = [f"--{kind}={tmp_path / name / kind}" for kind in ("runs", "results")]
        words = [sys.executable, str(script), "mini", "--seeds", "0", *folders]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, text=True, start_new_session=True, **pipes)

    return popen


def accuracies(process, folder):
    """Of both rows, when the runner has come to its end."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    results = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    assert len(results) == 2
    return [result["clients"] for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopping_the_runner_changes_no_figure(start, tmp_path, number):
    """In the middle of its second row; then it is started again.

    It is killed by itself, and else told with all its processes, as by a terminal.
    """
    expected = accuracies(start("whole"), tmp_path / "whole" / "results")
    stopped = start("stopped")
    folder = tmp_path / "stopped" / "runs" / "mini" / "sequential-0"
    log = folder / "metrics.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 7:
        assert stopped.poll() is None
        time.sleep(0.01)
    killed = number == signal.SIGKILL
    (os.kill if killed else os.killpg)(stopped.pid, number)
    text, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == (-number if killed else 128 + number)
    assert ("mini/sequential seed 0: stopped " in text) != killed
    assert ("hsee: stops after this step" in errors) != killed
    assert len(log.read_text().splitlines()) < 60
    again = start("stopped")
    assert accuracies(again, tmp_path / "stopped" / "results") == expected


def test_a_run_that_diverges_is_a_result(mini, monkeypatch):
    def diverge(*args, **options):
        raise hsee_jax.DivergenceError(1, "exit", 2)

    monkeypatch.setattr(hsee_jax, "train", diverge)
    end = runner.perform(rows.Run("mini/averaging", 1), changes={}, **mini)
    assert end.startswith("diverged: ")
    assert rows.load(rows.Run("mini/averaging", 1), mini["results"]) is not None
    table = tables.set_table("mini", mini["results"])
    assert "| averaging | 1 (diverged) | none | none | none | none |" in table


def test_bookkeeping_makes_no_other_result(mini, tmp_path):
    """A run is resumed, and its result counts, where the training would be the same."""
    one = rows.Run("mini/averaging", 0)
    rows.save(one, rows.config_of(one), {}, mini["results"])
    common = rows.ROWS / "mini" / "set.toml"
    common.write_text(common.read_text() + "checkpoint_every = 1\n")
    assert rows.load(one, mini["results"]) is not None
    assert runner._start(rows.config_of(one), tmp_path) == {}
    (tmp_path / "config.json").write_text(hsee_jax.config.to_json(rows.config_of(one)))
    longer = rows.config_of(one, checkpoint_every=2)
    assert runner._start(longer, tmp_path) == {"resume": True}
    for change in ({"batch_size": 3}, {"rounds": 2}, {"rounds": 4}):
        other = rows.config_of(one, **change)
        assert runner._start(other, tmp_path) == {"overwrite": True}
