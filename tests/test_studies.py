"""Studies: their files, their results, and their tables."""

import itertools
import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny  # noqa: F401  registers its network

import hsee_jax
from hsee_jax import studies
from hsee_jax.optim.optimizers import OPTIMIZERS
from hsee_jax.runs.records import Scores, Summary

STUDY = """title = "A study for tests"
shows = "Two strategies on noise."
cost = "nothing."
preset = "demo"
seeds = [0, 1]

[options]
network = "tiny"
plugin = ["tiny"]
num_clients = 2
cuts = ["1", "2"]
max_train_samples = 40
max_test_samples = 20
rounds = 3

[rows.averaging]
shows = "Servers and clients are averaged."
strategy = "averaging"

[rows.sequential]
strategy = "sequential"
"""
GRID = """preset = "demo"
[grid]
strategy = ["averaging", "sequential"]
learning_rate = [0.1, 0.05]
"""


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a study's file, with some text replaced."""

    def written(text=STUDY, *changes, name="study.toml"):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return written


def summary(exits=0.5, servers=0.5, seconds=10.0):
    return Summary.from_json(
        {
            "rounds": 3,
            "mean_exit_accuracy": exits,
            "mean_server_accuracy": servers,
            "clients": [],
            "images_per_second": 100.0,
            "wall_seconds": seconds,
            "device": "1 x abacus",
            "versions": {"python": "3", "jax": "4", "flax": "5"},
        }
    )


def result(run, found=None, diverged=""):
    own = studies.settings(run.config)
    return studies.Result(run.row, run.seed, own, 2, found, diverged)


def test_a_study_holds_rows_and_seeds(write):
    study = studies.load(write())
    assert (study.title, study.shows) == (
        "A study for tests",
        "Two strategies on noise.",
    )
    assert study.cost == "nothing."
    assert [row.name for row in study.rows] == ["averaging", "sequential"]
    assert [row.shows for row in study.rows] == [
        "Servers and clients are averaged.",
        "",
    ]
    runs = studies.runs(study)
    assert [str(run) for run in runs] == [
        "averaging seed 0",
        "sequential seed 0",
        "averaging seed 1",
        "sequential seed 1",
    ]
    config = runs[-1].config
    assert config.strategy.strategy == "sequential"
    assert config.model.network == "tiny"
    assert (
        config.run.model_seed == config.run.data_seed == config.run.partition_seed == 1
    )


def test_runs_are_chosen_by_rows_and_seeds(write):
    study = studies.load(write())
    chosen = studies.runs(study, rows=["sequential"], seeds=[7], batch_size=3)
    assert [str(run) for run in chosen] == ["sequential seed 7"]
    assert chosen[0].config.run.batch_size == 3
    with pytest.raises(hsee_jax.UserError, match="rows: sequenial .*did you mean seq"):
        studies.runs(study, rows=["sequenial"])


def test_a_grid_is_the_product_of_its_lists(write):
    study = studies.load(write(GRID))
    assert [row.name for row in study.rows] == [
        f"strategy={strategy},learning_rate={rate}"
        for strategy, rate in itertools.product(
            ["averaging", "sequential"], [0.1, 0.05]
        )
    ]
    found = {
        (r.config.strategy.strategy, r.config.optim.learning_rate) for r in study.rows
    }
    assert len(found) == 4
    assert study.seeds == (0,)
    assert study.title == "study"


def test_rows_are_crossed_with_the_grid(write):
    study = studies.load(write(STUDY + "[grid]\ncuts = [['1'], ['1', '2']]\n"))
    assert [row.name for row in study.rows] == [
        "averaging,cuts=1",
        "averaging,cuts=1+2",
        "sequential,cuts=1",
        "sequential,cuts=1+2",
    ]
    assert study.rows[2].config.clients.cuts == ("1",)


def test_what_is_given_holds_for_every_network_that_reads_it(write):
    """A width of 16 also where 32 is the default; what is not read has no effect."""
    path = write(
        'preset = "demo"\n[options]\nwidth = 16\nexit_head = "bn_linear"\n'
        '[rows.a]\nmomentum = 0.5\n[rows.b]\noptimizer = "adamw"\n'
        '[grid]\nnetwork = ["resnet18", "mobilenet_v2", "mlp"]\n'
    )
    found = {row.name: row.config for row in studies.load(path).rows}
    widths = {name: one.model.options.get("width") for name, one in found.items()}
    assert [*widths.values()] == [16, 16, None] * 2
    heads = {one.model.options.get("exit_head") for one in found.values()}
    assert heads == {"bn_linear", None}
    assert found["a,network=mlp"].optim.options["momentum"] == 0.5
    assert "momentum" not in found["b,network=mlp"].optim.options


def test_points_of_the_grid_can_be_skipped(write):
    text = GRID.replace(
        "[grid]", 'skip = [{strategy = "sequential", learning_rate = 0.05}]\n[grid]'
    )
    names = [row.name for row in studies.load(write(text)).rows]
    assert len(names) == 3
    assert "strategy=sequential,learning_rate=0.05" not in names


def test_a_study_extends_another_file(write):
    """Keys of a file come before those of the file that it extends, row by row."""
    write(STUDY, name="common.toml")
    path = write(
        'extends = "common.toml"\nseeds = [5]\n[options]\nrounds = 2\n'
        '[rows.sequential]\nstrategy = "sequential"\nbatch_size = 4\n'
        '[rows.local]\nstrategy = "local"\n'
    )
    study = studies.load(path)
    assert [row.name for row in study.rows] == ["averaging", "sequential", "local"]
    assert study.seeds == (5,)
    assert {row.config.run.rounds for row in study.rows} == {2}
    assert [row.config.run.batch_size for row in study.rows] == [16, 4, 16]


def test_a_study_begins_with_a_configuration(write, tmp_path):
    config = hsee_jax.override(hsee_jax.preset("demo"), rounds=2)
    (tmp_path / "base.json").write_text(hsee_jax.config.to_json(config))
    path = write(
        STUDY, ('preset = "demo"', 'config = "base.json"'), ("rounds = 3\n", "")
    )
    assert studies.load(path).rows[0].config.run.rounds == 2


def test_a_study_begins_elsewhere_than_the_file_it_extends(write, tmp_path):
    """Its configuration takes the place of the preset, and a preset that of one."""
    base = hsee_jax.override(hsee_jax.preset("demo"), rounds=2)
    (tmp_path / "base.json").write_text(hsee_jax.config.to_json(base))
    rows = '[rows.a]\nstrategy = "local"\n'
    starts = {"preset": 'preset = "cifar10"\n', "config": 'config = "base.json"\n'}
    found = {}
    for own, other in (("config", "preset"), ("preset", "config")):
        write(starts[other], name="common.toml")
        path = write(starts[own] + 'extends = "common.toml"\n' + rows)
        (row,) = studies.load(path).rows
        found[own] = row.config.data.dataset, row.config.run.rounds
    preset = hsee_jax.preset("cifar10")
    assert found["preset"] == ("cifar10", preset.run.rounds)
    assert found["config"] == ("fashion_mnist_small", 2)


LATE = """
from typing import Annotated

import hsee_jax as hs


@hs.optim.register
def late(*, lateness: Annotated[int, "how late it is"] = 1) -> hs.optim.Optimizer:
    return hs.optim.sgd()
"""


def test_an_extended_file_may_name_a_configuration_with_plugins(
    write, tmp_path, monkeypatch
):
    """It lies beside that file, and its plugins register options of the other."""
    monkeypatch.setattr(OPTIMIZERS, "_entries", dict(OPTIMIZERS.items()))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "common").mkdir()
    (tmp_path / "late_plugin.py").write_text(LATE)
    values = {"run": {"plugin": ["late_plugin"]}}
    (tmp_path / "common" / "base.json").write_text(json.dumps(values))
    write('config = "base.json"\n', name="common/rows.toml")
    path = write(
        'extends = "common/rows.toml"\n[options]\nplugin = ["tiny"]\n'
        '[rows.a]\noptimizer = "late"\nlateness = 3\n'
    )
    (row,) = studies.load(path).rows
    assert row.config.optim.options["lateness"] == 3
    assert row.config.run.plugin == ("late_plugin", "tiny")


def test_files_are_relative_to_the_study(write, tmp_path):
    own = '[options]\ndata_dir = "images"\npretrained = "w.safetensors"'
    path = write(STUDY, ("[options]", own))
    config = studies.load(path).rows[0].config
    assert config.data.data_dir == str((tmp_path / "images").resolve())
    assert config.model.pretrained == str((tmp_path / "w.safetensors").resolve())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "title =",
            "titel =",
            r"top level: key: titel is unknown \(did you mean title",
        ),
        ('title = "A study for tests"', "title = 3", "title: 3 is not allowed"),
        ('preset = "demo"', "", "preset, config: neither is given"),
        ('preset = "demo"', 'preset = "dem"', "preset: preset: dem is unknown"),
        ('preset = "demo"', 'config = "no.json"', "config: config: .*cannot be read"),
        ("seeds = [0, 1]", "seeds = []", r"seeds: \[\] is not allowed"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds: .* different whole numbers"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds: .* different whole numbers"),
        ("seeds = [0, 1]", "seeds = [true]", "seeds: .* different whole numbers"),
        ("rounds = 3", "round = 3", r"\[options\]: option: round is unknown"),
        ("rounds = 3", 'rounds = "3"', r"\[options\]: rounds: \"3\" is not allowed"),
        ("rounds = 3", "rounds = 0", r"\[options\]: rounds: 0 is not allowed"),
        ("rounds = 3", "model_seed = 3", r"\[options\]: model_seed: .*seeds gives"),
        ("rounds = 3", 'link = "tcp"', r"\[options\]: link: tcp is unknown"),
        ('["tiny"]', '["no_such_module"]', r"\[options\]: plugin: no_such_module"),
        ("[rows.sequential]", "[rows.'a b']", r"\[rows.a b\]: the name 'a b'"),
        (
            "[rows.sequential]",
            "[rows.sequential]\nshows = 1",
            r"sequential\], shows: 1",
        ),
        (
            '"sequential"\n',
            '"sequential"\nalpa = 1',
            r"\[rows.sequential\]: option: alpa",
        ),
        (
            '"sequential"\n',
            '"sequential"\naverage = "servers"',
            r"\]: average: servers is unknown",
        ),
        (
            '"sequential"\n',
            '"averaging"',
            "rows: sequential has the settings of averagi",
        ),
        (
            "[rows.sequential]",
            "[rows]\nsequential = 1\n[rows.b]",
            r"sequential\]: 1 is not",
        ),
        (
            "[rows.sequential]",
            "[grid]\nrounds = []\n[rows.b]",
            r"\[grid\], rounds: the li",
        ),
        (
            "[rows.sequential]",
            "[grid]\nrounds = 1\n[rows.b]",
            r"\[grid\], rounds: 1 is no",
        ),
        ("[rows.sequential]", "[grid]\nrounds = [1, 1]\n[rows.b]", "rounds: .* twice"),
        (
            "[rows.sequential]",
            "[grid]\nround = [1]\n[rows.b]",
            r"\[grid\]: option: round",
        ),
        (
            "[rows.sequential]",
            "[grid]\nrounds = ['a']\n[rows.b]",
            r'rounds: "a" is not',
        ),
        ("seeds = [0, 1]", "skip = [{rounds = 3}]", "skip: .* matches no point"),
        ("seeds = [0, 1]", "skip = 3", "skip: 3 is not allowed"),
        ("seeds = [0, 1]", "seeds = [", "study: .* is not TOML"),
        ("seeds = [0, 1]", 'extends = "no.toml"', "study: .*no.toml cannot be read"),
        ("seeds = [0, 1]", 'extends = "study.toml"', "extends: is not allowed here"),
    ],
)
def test_an_error_names_the_file_the_table_and_the_key(write, old, new, message):
    path = write(STUDY, (old, new))
    with pytest.raises(hsee_jax.UserError) as refusal:
        studies.load(path)
    text = str(refusal.value)
    assert "\n" not in text
    assert path.name in text or "no.toml" in text
    assert re.search(message, text), text


def test_a_study_needs_rows(write):
    path = write('preset = "demo"\n')
    with pytest.raises(hsee_jax.UserError, match="rows: there are none"):
        studies.load(path)
    every = 'skip = [{rounds = 1}]\npreset = "demo"\n[grid]\nrounds = [1]\n'
    with pytest.raises(hsee_jax.UserError, match="skip: no point of"):
        studies.load(write(every))


def test_a_point_that_is_not_allowed_is_refused(write):
    path = write(GRID + "average = ['servers']\n")
    with pytest.raises(
        hsee_jax.UserError, match=r"\[grid\], strategy=seq.*: servers is unknown"
    ):
        studies.load(path)


def test_results_are_appended_and_read(write, tmp_path):
    one, other, *_ = studies.runs(studies.load(write()))
    assert studies.read_results(tmp_path) == []
    studies.append_result(tmp_path, result(one, summary()))
    studies.append_result(tmp_path, result(other, None, "the loss is not finite"))
    found = studies.read_results(tmp_path)
    assert found == [
        result(one, summary()),
        result(other, None, "the loss is not finite"),
    ]
    assert (
        studies.unfinished(studies.runs(studies.load(write())), tmp_path)[0].seed == 1
    )


@pytest.mark.parametrize("kept", [0, 1, 7, -2, -1])
def test_a_line_that_a_kill_cut_off_is_dropped(write, tmp_path, kept):
    """A line that lacks only its end is complete."""
    one, other, *_ = studies.runs(studies.load(write()))
    studies.append_result(tmp_path, result(one, summary()))
    path = tmp_path / "results.jsonl"
    first = path.read_bytes()
    studies.append_result(tmp_path, result(other, summary()))
    second = path.read_bytes()[len(first) :]
    path.write_bytes(first + second[:kept])
    complete = kept == -1
    assert len(studies.read_results(tmp_path)) == 1 + complete
    studies.append_result(tmp_path, result(other, summary()))
    assert path.read_bytes() == first + second * (1 + complete)


def test_a_cell_and_a_heading_are_one_line(write, tmp_path):
    study = studies.load(write())
    row = replace(study.rows[0], shows="what it\nshows")
    study = replace(study, title="a title\nof two lines", rows=(row, *study.rows[1:]))
    studies.append_result(tmp_path, result(studies.runs(study)[0], summary()))
    studies.write(study, studies.read_results(tmp_path), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "# a title of two lines\n" in text
    assert f"| {row.name} | what it shows |\n" in text


def test_a_damaged_line_is_named(write, tmp_path):
    one, *_ = studies.runs(studies.load(write()))
    studies.append_result(tmp_path, result(one, summary()))
    path = tmp_path / "results.jsonl"
    path.write_text('{"row": 1}\n' + path.read_text())
    with pytest.raises(hsee_jax.UserError, match=r"results\.jsonl, line 1, is damaged"):
        studies.read_results(tmp_path)


def test_a_result_of_other_settings_does_not_count(write, tmp_path):
    """Bookkeeping makes no other result, and a newer option had its default."""
    one, *_ = studies.runs(studies.load(write()))
    studies.append_result(tmp_path, result(one, summary()))
    path = tmp_path / "results.jsonl"
    values = json.loads(path.read_text())
    del values["settings"]["exit_gradient"]
    path.write_text(json.dumps(values) + "\n")
    found = studies.read_results(tmp_path)
    assert studies.result_of(one, found) is found[0]
    (same, *_) = studies.runs(studies.load(write()), checkpoint_every=1, data_dir="x")
    assert studies.result_of(same, found) is found[0]
    (longer, *_) = studies.runs(studies.load(write()), rounds=4)
    assert studies.result_of(longer, found) is None


def test_a_mean_is_written_as_in_a_report():
    """Of thousands, with a separator; the deviation of 1,000 and 3,000 is by n - 1."""
    assert studies.mean_text([], 3) == "none"
    assert studies.mean_text([1234.4], 0) == "1,234"
    assert studies.mean_text([1000.0, 3000.0], 1) == "2,000.0 ± 1,414.2"


def test_the_table_has_means_and_deviations(write):
    """Of 0.1, 0.2 and 0.6 the mean is 0.3, the deviation sqrt(0.14 / 2) = 0.265."""
    study = studies.load(write(STUDY, ("seeds = [0, 1]", "seeds = [0, 1, 2]")))
    runs = studies.runs(study, rows=["sequential"])
    results = [
        result(run, summary(exits, seconds=10.0 + run.seed))
        for run, exits in zip(runs, (0.1, 0.2, 0.6), strict=True)
    ]
    diverged = studies.runs(study, rows=["averaging"], seeds=[1])[0]
    assert studies.page(
        study, [*results, result(diverged, None, "nan")]
    ).splitlines() == [
        "Two strategies on noise.",
        "",
        "Cost: nothing.",
        "",
        "| row | seeds | exit accuracy | server accuracy | images/s | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| averaging | 1 (diverged) | none | none | none | none |",
        "| sequential | 0 1 2 | 0.300 ± 0.265 | 0.500 ± 0.000 | 100 ± 0 | 11 ± 1 |",
        "",
        "Run on 1 x abacus with 2 core(s); python 3, jax 4, flax 5.",
    ]
    assert "Not run: averaging." in studies.page(study, results)


def test_a_page_says_which_seeds_are_missing_and_which_machine_ran_what(write):
    study = studies.load(write(STUDY, ("seeds = [0, 1]", "seeds = [0, 1, 2]")))
    (one, other), last = studies.runs(study, seeds=[0]), studies.runs(study, seeds=[2])
    slide_rule = summary()._replace(device="1 x slide rule")
    results = [result(one, summary()), result(other, slide_rule)]
    results += [result(run, summary()) for run in last]
    assert studies.page(study, results).splitlines()[-5:] == [
        "Seeds not run: 1.",
        "",
        "Run on 1 x abacus with 2 core(s); python 3, jax 4, flax 5, except:",
        "",
        f"- {other.row}: on 1 x slide rule with 2 core(s); python 3, jax 4, flax 5.",
    ]


def test_rows_of_a_grid_are_explained_once(write):
    study = studies.load(write(STUDY + "\n[grid]\nlearning_rate = [0.1, 0.05]\n"))
    assert len(study.rows) == 4
    lines = studies.row_list(study).splitlines()
    assert lines[2] == "| averaging | Servers and clients are averaged. |"
    assert len(lines) == 3
    assert studies.row_list(study, ["averaging"]) == ""


def test_the_files_of_a_study(write, tmp_path):
    study = studies.load(write())
    runs = studies.runs(study)
    text, picture = studies.write(study, [result(r, summary()) for r in runs], tmp_path)
    page = text.read_text()
    assert page.startswith("# A study for tests\n")
    assert "| averaging | Servers and clients are averaged. |" in page
    assert picture.read_bytes().startswith(b"\x89PNG")
    nothing = [result(run, None, "nan") for run in runs]
    assert list(studies.write(study, nothing, tmp_path)) == [text]


@pytest.mark.slow
def test_a_run_equals_a_run_trained_alone(write, tmp_path):
    """Bit for bit, although it was stopped and went on."""
    one, *_ = studies.runs(studies.load(write(STUDY, ("rounds = 3", "rounds = 2"))))
    with pytest.raises(hsee_jax.Stopped):
        studies.train_run(one, tmp_path / "sweep", stop=lambda: True)
    found = studies.train_run(one, tmp_path / "sweep")
    alone = hsee_jax.train(one.config, tmp_path / "alone")
    assert found.summary.rounds == 2
    assert found.summary.scores == alone.scores
    states = [hsee_jax.restore(tmp_path / name).state for name in ("sweep", "alone")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_run_of_other_settings_is_replaced_only_if_asked(
    write, tmp_path, monkeypatch
):
    calls = []

    def train(config, folder, *, resume, overwrite, data, stop):
        calls.append((resume, overwrite))
        return summary()

    monkeypatch.setattr("hsee_jax.studies.train.train", train)
    study = studies.load(write())
    one, *_ = studies.runs(study)
    studies.train_run(one, tmp_path)
    (tmp_path / "config.json").write_text(hsee_jax.config.to_json(one.config))
    (same, *_) = studies.runs(study, checkpoint_every=2)
    studies.train_run(same, tmp_path)
    (longer, *_) = studies.runs(study, rounds=4)
    with pytest.raises(hsee_jax.UserError, match="another rounds; .*--overwrite"):
        studies.train_run(longer, tmp_path)
    studies.train_run(longer, tmp_path, overwrite=True)
    studies.train_run(one, tmp_path, overwrite=True)  # without any checkpoint
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    studies.train_run(one, tmp_path, overwrite=True)
    assert calls == [
        (False, False),
        (True, False),
        (False, True),
        (False, True),
        (True, False),
    ]


def test_a_run_that_diverges_is_a_result(write, tmp_path, monkeypatch):
    def diverge(*args, **options):
        raise hsee_jax.DivergenceError(1, "exit", 2)

    monkeypatch.setattr("hsee_jax.studies.train.train", diverge)
    one, *_ = studies.runs(studies.load(write()))
    found = studies.train_run(one, tmp_path)
    assert found.summary is None
    assert "client 1 is not finite in round 2" in found.diverged
    assert studies.Result.from_json(found.to_json()) == found


def test_scores_survive_json(write):
    """A loss that is not finite is null in JSON, and NaN again."""
    one, *_ = studies.runs(studies.load(write()))
    found = result(one, summary()._replace(scores=Scores(0.1, 0.2, ())))
    assert studies.Result.from_json(json.loads(json.dumps(found.to_json()))) == found


OWN_DATA = ("rounds = 3", 'rounds = 3\ndataset = "npz"\ndata_dir = "one"')


def test_rows_may_differ_in_the_folder_of_own_data(write):
    rows = ("[rows.sequential]\nstrategy =", '[rows.b]\ndata_dir = "two"\nstrategy =')
    same = ('"sequential"', '"averaging"')
    study = studies.load(write(STUDY, OWN_DATA, rows, same))
    assert [row.name for row in study.rows] == ["averaging", "b"]
    with pytest.raises(hsee_jax.UserError, match="has the settings of averaging"):
        studies.load(write(STUDY, rows, same))


def test_a_result_on_other_own_data_does_not_count(write, tmp_path):
    one, *_ = studies.runs(studies.load(write(STUDY, OWN_DATA)))
    moved, *_ = studies.runs(studies.load(write(STUDY, OWN_DATA)), data_dir="other")
    results = [result(one, summary())]
    assert studies.result_of(one, results) == results[0]
    assert studies.result_of(moved, results) is None
    (tmp_path / "config.json").write_text(hsee_jax.config.to_json(one.config))
    with pytest.raises(hsee_jax.UserError, match="another data_dir; .*--overwrite"):
        studies.train_run(moved, tmp_path)


def write_samples(folder, *, turned=False):
    """Write samples as npz, some labels corrected; return the digest of all."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        images, labels = tiny.tiny_data(30)
        labels = labels[::-1] if turned else labels
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return hsee_jax.data.read_dataset("npz", folder=folder).info.digest


def test_results_on_corrected_labels_are_other_results(write, tmp_path):
    """In the same file: old ones are to do, and no mean is over both."""
    study = studies.load(write(STUDY, OWN_DATA))
    runs = studies.runs(study, rows=["averaging"], seeds=[0, 1, 2])
    before = write_samples(tmp_path / "one")
    results = [
        replace(result(run, summary(exits=0.1)), digest=before) for run in runs[:2]
    ]
    for one in results:
        studies.append_result(tmp_path, one)
    assert studies.read_results(tmp_path) == results
    assert studies.unfinished(runs, tmp_path) == [runs[2]]
    assert studies.by_row(study, results) == {"averaging": tuple(results)}

    after = write_samples(tmp_path / "one", turned=True)
    assert after != before
    assert studies.unfinished(runs, tmp_path) == list(runs)
    last = replace(result(runs[2], summary(exits=0.5)), digest=after)
    studies.append_result(tmp_path, last)
    assert studies.unfinished(runs, tmp_path) == list(runs[:2])
    assert studies.by_row(study, [*results, last]) == {"averaging": (last,)}
    # Results of older versions do not say what data they are on.
    old = [replace(one, digest=None) for one in results]
    assert len(studies.by_row(study, [*old, last])["averaging"]) == 3


def test_a_row_on_the_old_labels_leaves_the_table(write):
    """Once any row has the new ones; a row on other data stays."""
    rows = ("[rows.sequential]", '[rows.other]\ndata_dir = "two"\n\n[rows.sequential]')
    study = studies.load(write(STUDY, OWN_DATA, rows))
    averaging, other, sequential = studies.runs(study, seeds=[0])
    old = [
        replace(result(run, summary(exits=0.1)), digest=digest)
        for run, digest in ((averaging, "1"), (sequential, "1"), (other, "2"))
    ]
    assert list(studies.by_row(study, old)) == ["averaging", "other", "sequential"]
    new = replace(result(averaging, summary(exits=0.5)), digest="3")
    found = studies.by_row(study, [*old, new])
    assert found == {"averaging": (new,), "other": (old[2],)}
    assert "Not run: sequential." in studies.page(study, [*old, new])
    unknown = replace(old[1], digest=None)  # of a version that kept none
    found = studies.by_row(study, [*old, new, unknown])
    assert found == {"averaging": (new,), "other": (old[2],), "sequential": (unknown,)}


def test_a_run_on_corrected_labels_is_replaced_only_if_asked(write, tmp_path):
    """A run that was stopped halfway; the sweep says it before it starts any."""
    study = studies.load(write(STUDY, OWN_DATA))
    (one,) = studies.runs(study, rows=["averaging"], seeds=[0])
    folder = tmp_path / "out" / "runs" / one.folder
    write_samples(tmp_path / "one")
    with pytest.raises(hsee_jax.Stopped):
        studies.train_run(one, folder, stop=lambda: True)
    after = write_samples(tmp_path / "one", turned=True)
    refused = "another digest of the data; .*--overwrite"
    with pytest.raises(hsee_jax.UserError, match=refused):
        studies.train_run(one, folder)
    with pytest.raises(hsee_jax.UserError, match=refused):
        studies.perform([one], tmp_path / "out")
    found = studies.train_run(one, folder, overwrite=True)
    assert found.digest == after
    alone = hsee_jax.train(one.config, tmp_path / "alone")
    assert found.summary.scores == alone.scores


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", [0]), ("seed", True), ("row", 3), ("cpu_cores", "2"), ("settings", [])],
)
def test_a_result_of_other_types_is_damaged(write, tmp_path, name, value):
    study = studies.load(write())
    values = result(studies.runs(study)[0], summary()).to_json() | {name: value}
    (tmp_path / "results.jsonl").write_text(json.dumps(values) + "\n")
    with pytest.raises(hsee_jax.UserError, match=f"line 1, is damaged .*{name} is"):
        studies.read_results(tmp_path)


def test_a_long_name_of_a_row_is_refused(write):
    studies.load(write(STUDY, ("[rows.averaging]", f"[rows.{'a' * 120}]")))
    path = write(STUDY, ("[rows.averaging]", f"[rows.{'a' * 121}]"))
    with pytest.raises(hsee_jax.UserError, match="has 121 bytes; allowed are .* 120"):
        studies.load(path)


def test_a_folder_of_no_user_is_refused(write):
    path = write(STUDY, ("rounds = 3", 'rounds = 3\ndata_dir = "~no_such_user/x"'))
    with pytest.raises(
        hsee_jax.UserError, match=r"\[options\]: data_dir: ~no_such_user"
    ):
        studies.load(path)
