"""The studies of `experiments/`, their results, and the page made of them."""

import dataclasses
import json
import math
import os
import runpy
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import THREE_ROUNDS

from hsee_jax import runs, studies
from hsee_jax.config import override, to_json
from hsee_jax.config.schema import DataConfig
from hsee_jax.core import UserError
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.data import build_info, data_source
from hsee_jax.runs.records import RoundRecord, TrainFigures
from hsee_jax.systems.traffic import Bytes

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
APART = ("demo", "cifar10-w16-recipe")  # studies without a row of the same name
REAL = Path(
    os.environ.get("HSEE_TFDS_DIR", EXPERIMENTS.parents[1] / "shared/data/tfds")
)
sys.path.insert(0, str(EXPERIMENTS))

import accelerator  # noqa: E402
import answers  # noqa: E402
import clock  # noqa: E402
import compare  # noqa: E402
import findings  # noqa: E402
import hold_out  # noqa: E402
import relatives  # noqa: E402
import tables  # noqa: E402

NAMES = sorted(path.parent.name for path in EXPERIMENTS.glob("*/study.toml"))
RESULTS = {"demo": 2, "cpu-small-cifar10": 63, "cpu-small-fashion": 63}
RESULTS |= {"cifar10-w16": 16, "cifar10-w16-recipe": 5, "why-averaging": 8}
RESULTS |= {"cpu-small-methods": 138, "demo-methods": 33}
UNFINISHED = {"cifar10-w16": 35}  # a row, and two seeds of all


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
    paths = sorted(EXPERIMENTS.glob("*/study.toml"))
    files = [path for path in paths if "extends" in path.read_text(encoding="utf-8")]
    names = [{row.name for row in studies.load(path).rows} for path in files]
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
        left = studies.unfinished(studies.runs(study), EXPERIMENTS / name)
        assert len(left) == UNFINISHED.get(name, 0)


def test_the_pages_show_the_results():
    assert tables.PAGE.read_text(encoding="utf-8") == tables.accuracy()
    readme = tables.README.read_text(encoding="utf-8")
    assert tables.insert(readme, tables.headline(), "headline") == readme


def test_the_page_of_relatives_shows_the_results():
    assert relatives.PAGE.read_text(encoding="utf-8") == relatives.page()
    names = set(relatives.rows("iid"))
    assert names == set(relatives.rows("dirichlet"))
    assert set(relatives.CHANGED) | set(relatives.CHANGED.values()) <= names


def result(seed, accuracy):
    """A run whose exits have an accuracy."""
    _, (one, *_) = tables.load("demo")
    scores = one.summary.scores._replace(mean_exit_accuracy=accuracy)
    summary = one.summary._replace(scores=scores)
    return dataclasses.replace(one, seed=seed, summary=summary)


def test_a_gain_has_the_interval_of_paired_seeds():
    """Derived by hand: gains of 1, 2 and 3 points have the deviation 1.

    The quantile of Student's t with two degrees of freedom is 4.3027.
    """
    plain = [result(seed, 0.1 * seed) for seed in (1, 2, 3)]
    more = [result(seed, 0.1 * seed + 0.01 * seed) for seed in (3, 1, 2)]
    figure = relatives.figure(more, plain, "mean_exit_accuracy")
    assert figure.mean == pytest.approx(22.0)
    assert figure.gain == pytest.approx(2.0)
    half = 4.3027 / np.sqrt(3)
    assert figure[2:] == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert not figure.is_clear
    even = relatives.figure(
        [result(seed, 0.5) for seed in (1, 2)],
        [result(seed, 0.4) for seed in (1, 2, 3)],
        "mean_exit_accuracy",
    )
    assert even[1:] == pytest.approx((10.0, 10.0, 10.0))
    assert even.is_clear


def test_two_sweeps_are_compared_by_row_and_seed():
    """Derived by hand: exits of 10, 20, 30 and of 14, 20, 28; other runs count not."""
    old = [result(seed, accuracy) for seed, accuracy in ((2, 0.3), (0, 0.1), (1, 0.2))]
    new = [
        result(seed, accuracy) for seed, accuracy in ((1, 0.2), (2, 0.28), (0, 0.14))
    ]
    strange = dataclasses.replace(old[0], row="strange")
    exits, servers = compare.moves(old, [strange, *new, result(9, 0.9)])
    assert (exits.row, exits.figure) == (old[0].row, "exit")
    assert (exits.old, exits.new) == pytest.approx((20, 62 / 3))
    assert exits.runs == pytest.approx((4, 0, -2))
    assert servers.runs == (0, 0, 0)
    assert (
        "exit: 3 runs moved by +0.67 points on average, 2.58 in root mean square, and "
        "at most by 4.0."
    ) in compare.page([exits, servers])


def test_losses_are_compared_round_by_round(tmp_path):
    """Derived by hand; a run without servers, and one that only one folder holds."""

    def write(folder, *rounds):
        (tmp_path / folder).mkdir(parents=True)
        lines = []
        for number, (exit_loss, server_loss) in enumerate(rounds, start=1):
            train = TrainFigures(exit_loss, 0.5, server_loss, 0.5)
            record = RoundRecord(number, 1.0, 8, [], [], train, Bytes(0, 0), 1.0)
            lines.append(json.dumps(record.to_json()) + "\n")
        (tmp_path / folder / "metrics.jsonl").write_text("".join(lines))

    write("old/runs/a-0", (2.0, 4.0), (1.0, 2.0), (0.5, 0.5))
    write("new/runs/a-0", (2.0, 4.4), (0.75, 2.0))
    write("old/runs/b-0", (2.0, math.nan))
    write("new/runs/b-0", (2.5, math.nan))
    write("new/runs/c-0", (1.0, 1.0))
    write("old/runs/d-0", (math.nan, 1.0), (2.0, math.nan))
    write("new/runs/d-0", (2.0, 1.0), (math.nan, 1.0))
    table = compare.loss_table(tmp_path / "old", tmp_path / "new")
    assert table.rows == [
        ("`a-0`", "1.0e-01 2.5e-01"),
        ("`b-0`", "2.5e-01"),
        ("`d-0`", "inf inf"),  # where one of them diverged
    ]


def test_the_page_says_once_what_is_not_run():
    page = tables.accuracy()
    assert page.count("## Not run") == 1
    for name in ("cifar10", "cifar100", "stl10"):
        assert page.count(f"`experiments/{name}`") == 1


def test_the_headline_has_six_rows():
    header, _, *rows = tables.headline().splitlines()
    assert header == "| row | what it is | exit accuracy | server accuracy |"
    assert len(rows) == 6
    for name, row in zip(tables.HEADLINE_ROWS, rows, strict=True):
        assert row.startswith(f"| `{name}` |")


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


@pytest.mark.parametrize("fails", [False, True])
def test_one_command_measures_speed_first_and_then_trains(monkeypatch, tmp_path, fails):
    """The benchmarks get half of the time, and the studies what is left."""
    clock, calls = [0.0], []

    def run(arguments, check):
        calls.append(arguments[1:])
        clock[0] += 60
        return SimpleNamespace(returncode=int(fails and len(calls) == 1))

    monkeypatch.setattr(accelerator.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(accelerator.subprocess, "run", run)
    words = ["accelerator.py", "forms", "--seconds", "150"]
    monkeypatch.setattr(sys, "argv", [*words, "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit) if fails else nullcontext() as end:
        accelerator.main()
    assert not fails or end.value.code == 1
    benchmarks, *sweeps = calls
    assert Path(benchmarks[0]).name == "bench_all.py"
    assert benchmarks[1:] == ["forms", "--within", "75.0"]
    names = [Path(words[3]).parent.name for words in sweeps]
    assert names == ["cifar10-w16", "cifar10"]
    assert [words[words.index("--seconds") + 1] for words in sweeps] == ["90", "30"]
    last = ["--jobs", "1", "--data-dir", str(tmp_path)]
    assert all(words[-4:] == last for words in sweeps)


def test_an_unknown_benchmark_ends_before_the_studies(monkeypatch, tmp_path):
    calls = []

    def run(arguments, check):
        calls.append(arguments)
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(accelerator.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "formz", "--seconds", "150"])
    with pytest.raises(SystemExit) as end:
        accelerator.main()
    assert end.value.code == 2
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("accelerator", ["--seconds", "9", "--studies", "nope"], "nope is not a study"),
        (
            "accelerator",
            ["--seconds", "9", "--data-dir", "nope"],
            "nope is not a folder",
        ),
        ("accelerator", ["--seconds", "nan"], "--seconds: nan is not a number above 0"),
        ("accelerator", ["--seconds", "9", "--jobs", "0"], "--jobs: 0 is not one of 1"),
        ("compare", [str(EXPERIMENTS / name) for name in APART], "no run in common"),
        ("compare", ["nope", "nada"], "nope has no results.jsonl"),
        ("compare", ["nope", "nada", "--losses"], "nope has no runs"),
        ("hold_out", "cifar10 --train -5 --held-out 3 --out x".split(), "from 1"),
        ("answers", ["nope"], "nope/study.toml"),
        ("clock", ["nope"], "nope/study.toml"),
    ],
)
def test_a_script_refuses_bad_input_in_one_line(
    monkeypatch, tmp_path, capsys, script, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXPERIMENTS / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("page", "row"), [(findings, "fedavg"), (relatives, "sequential")]
)
def test_a_page_names_a_row_without_results(monkeypatch, page, row):
    study, results = tables.load(page.NAME)
    left = [result for result in results if result.row.partition(",")[0] != row]
    loaded = {page.NAME: (study, left)}
    load = tables.load
    monkeypatch.setattr(tables, "load", lambda name: loaded.get(name) or load(name))
    with pytest.raises(UserError, match=f"^{row}: has no results"):
        page.page()


def test_a_comparison_names_settings_that_differ():
    """Without them two studies could be taken for one."""
    first = studies.Result("a", 0, {"alpha": 1.0, "width": 8}, 1, None)
    second = studies.Result("a", 0, {"alpha": 0.3, "width": 8, "new": 1}, 1, None)
    other = studies.Result("a", 1, {"alpha": 2.0}, 1, None)
    assert compare.changed([first, other], [second]) == ["alpha"]
    assert compare.changed([first], [first]) == []


def test_the_committed_clock_is_that_of_the_devices(tmp_path, monkeypatch):
    """Of two rows that deal whatever the labels, in a copy of the study."""
    monkeypatch.setattr(clock, "labels", lambda *_: np.arange(50_000) % 10)
    check_clock(tmp_path, monkeypatch, "sequential-clients-mixed", "fedavg")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no prepared CIFAR-10 at HSEE_TFDS_DIR")
def test_the_committed_clock_deals_the_real_labels(tmp_path, monkeypatch):
    words = "--data-dir", str(REAL)
    check_clock(tmp_path, monkeypatch, "sequential-clients-dirichlet", words=words)


def check_clock(tmp_path, monkeypatch, *names, words=()):
    """The script gives what is committed of some rows."""
    study = tmp_path / "cifar10-w16"
    shutil.copytree(EXPERIMENTS / study.name, study)
    shutil.copy(EXPERIMENTS / "rows.toml", tmp_path)
    committed = json.loads((study / clock.FILE).read_text(encoding="utf-8"))
    whole = studies.load(study / "study.toml")
    assert list(committed) == [row.name for row in whole.rows]
    rows = tuple(row for row in whole.rows if row.name in names)
    part = dataclasses.replace(whole, rows=rows)
    monkeypatch.setattr(clock.studies, "load", lambda _: part)
    monkeypatch.setattr(sys, "argv", ["clock.py", str(study), *words])
    clock.main()
    found = json.loads((study / clock.FILE).read_text(encoding="utf-8"))
    assert set(found) == set(names)
    for name in names:
        for figure in committed[name]:
            expected = pytest.approx(committed[name][figure], rel=1e-9)
            assert found[name][figure] == expected


def test_the_committed_clock_is_of_the_shares_that_were_trained():
    """A run counts the bytes of its own samples, by cut, also under label skew."""
    folder = EXPERIMENTS / "cifar10-w16"
    committed = json.loads((folder / clock.FILE).read_text(encoding="utf-8"))
    results = studies.read_results(folder)
    assert {"sequential-dirichlet", "fedavg"} <= {result.row for result in results}
    for result in results:
        trained = {
            str(one["cut"]): one["round"]["up_bytes"]
            for one in result.summary.link.cuts
        }
        assert committed[result.row]["up_bytes"] == pytest.approx(trained)


def test_the_findings_show_the_figures_of_the_study():
    assert findings.PAGE.read_text(encoding="utf-8") == findings.page()


def test_a_study_reads_the_held_out_images_behind_the_kept_ones(
    tmp_path, monkeypatch, capsys
):
    """Of a copy of the packaged dataset; where any form of it lies, none is written."""
    train, test = data_source(DataConfig()).read()
    (tmp_path / "mnist").mkdir()
    for name, part in (("train", train), ("test", test)):
        path = tmp_path / "mnist" / name
        np.savez(path, images=part.images[:20], labels=part.labels[:20])

    def hold(dataset, out):
        words = ["hold_out.py", dataset, "--data-dir", str(tmp_path), "--train", "7"]
        words += ["--held-out", "3", "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", words)
        hold_out.main()

    hold("mnist", "out")
    found = data_source(DataConfig(dataset="mnist", data_dir=str(tmp_path / "out")))
    for data, part in zip(found.read(), (slice(7), slice(7, 10)), strict=True):
        np.testing.assert_array_equal(data.images, train.images[part])
        np.testing.assert_array_equal(data.labels, train.labels[part])

    shutil.copytree(tmp_path / "mnist", tmp_path / "other" / "mnist")
    for dataset, out, reason in (
        ("mnist", "other", "other holds mnist; allowed is a new folder"),
        ("fashion_mnist_small", "new", "invalid choice: 'fashion_mnist_small'"),
        ("npz", "new", "invalid choice: 'npz'"),
    ):
        with pytest.raises(SystemExit):
            hold(dataset, out)
        assert reason in capsys.readouterr().err
    assert len(np.load(tmp_path / "other" / "mnist" / "train.npz")["labels"]) == 20


def test_the_interval_of_an_accuracy_is_that_of_a_binomial():
    """For one client the bootstrap's interval is close to the normal one."""
    correct = np.random.default_rng(1).random(10_000) < 0.7
    found = answers.accuracy([correct])
    mean = correct.mean()
    half = 1.96 * np.sqrt(mean * (1 - mean) / 10_000)
    assert found["mean"] == mean
    np.testing.assert_allclose(found["low"], mean - half, atol=0.1 * half)
    np.testing.assert_allclose(found["high"], mean + half, atol=0.1 * half)
    assert answers.accuracy([correct, ~correct])["high"] == 0.5  # every image: one half


def test_answers_of_a_row_that_changed_are_measured_again(
    tmp_path, monkeypatch, capsys
):
    """Lines of before they held their settings stay; a run of old settings is told."""
    text = 'preset = "demo"\n[options]\nrounds = 3\n[rows.a]\n'
    (tmp_path / "study.toml").write_text(text)
    (run,) = studies.runs(studies.load(tmp_path / "study.toml"))
    folder = tmp_path / "runs" / run.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(run.config))
    (folder / "summary.json").touch()
    path, measured = tmp_path / answers.FILE, []
    monkeypatch.setattr(sys, "argv", ["answers.py", str(tmp_path)])
    monkeypatch.setattr(answers, "by_cut", lambda *args: measured.append(args) or {})
    path.write_text(json.dumps({"row": "a", "seed": 0, "cuts": {}}) + "\n")
    answers.main()
    assert measured == []
    path.unlink()
    answers.main()
    answers.main()
    assert len(measured) == 1
    (tmp_path / "study.toml").write_text(text.replace("3", "4"))
    answers.main()
    assert len(measured) == 1
    assert "another rounds" in capsys.readouterr().out
    config = override(run.config, rounds=4)
    (folder / "config.json").write_text(to_json(config))
    answers.main()
    assert len(measured) == 2
    assert [one["settings"]["rounds"] for one in answers.read(path)] == [3, 4]


def test_answers_to_other_held_out_samples_are_refused(tmp_path):
    """The same dataset in another form has other samples there."""
    runs.train(override(THREE_ROUNDS, rounds=1), tmp_path / "run")
    path = tmp_path / "run" / "partition.json"
    one, other = json.loads(path.read_text())
    one["indices"], other["indices"] = other["indices"], one["indices"]
    path.write_text(json.dumps([one, other]))
    with pytest.raises(UserError, match="the training samples found now are not those"):
        answers.by_cut(tmp_path / "run", None)
