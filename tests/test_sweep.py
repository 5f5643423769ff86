"""``hsee sweep``: processes, stops and kills, and what it prints and writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny  # noqa: F401  registers its network
from numpy.testing import assert_array_equal
from test_studies import STUDY, result, summary

import hsee_jax
from hsee_jax import cli, studies
from hsee_jax.core import UserError
from hsee_jax.parallel.cores import cores

SHORT = ("rounds = 3", "rounds = 1")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The file of a study of two rows and two seeds, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = Path("study.toml")
    path.write_text(STUDY)
    return path


def sweep(*words):
    return cli.main(["sweep", *map(str, words)])


@pytest.mark.slow
def test_a_sweep_trains_all_runs_as_if_alone(study, tmp_path, capfd):
    """In two processes at once, where there are two cores; then nothing is left."""
    study.write_text(STUDY.replace(*SHORT))
    jobs = min(2, len(cores()))
    assert sweep(study, "--out", "out", "--jobs", jobs) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "4 of 4 runs are to be done"
    ends = sorted(line.partition(": exit 0.")[0] for line in lines[1:5])
    assert ends == [
        f"{row} seed {n}" for row in ("averaging", "sequential") for n in (0, 1)
    ]
    assert "±" in "".join(lines)
    assert lines[-2:] == ["out/results.md", "out/results.png"]
    found = studies.read_results(Path("out"))
    assert len(found) == 4
    assert {one.cpu_cores for one in found} == {len(cores()) // jobs}
    *_, last = studies.runs(studies.load(study))
    alone = hsee_jax.train(last.config, tmp_path / "alone")
    assert studies.result_of(last, found).summary.scores == alone.scores
    ours = hsee_jax.restore(Path("out/runs") / last.folder).state
    jax.tree.map(assert_array_equal, ours, hsee_jax.restore(tmp_path / "alone").state)
    assert sweep(study, "--out", "out") == 0
    assert "0 of 4 runs are to be done" in capfd.readouterr().out


def test_the_runs_are_listed(study, capsys):
    one, *_ = studies.runs(studies.load(study))
    Path("out").mkdir()
    studies.append_result(Path("out"), result(one, summary()))
    assert sweep(study, "--out", "out", "--list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "averaging seed 0: done",
        "sequential seed 0: to do",
        "averaging seed 1: to do",
        "sequential seed 1: to do",
        "3 of 4 runs are to be done",
    ]
    words = ("--rows", "sequential", "--seeds", "7", "8", "--list")
    assert sweep(study, *words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["sequential seed 7: to do", "sequential seed 8: to do"]


def test_the_name_of_a_table_means_all_points_of_the_grid(study, capsys):
    study.write_text(STUDY + "[grid]\nbatch_size = [4, 8]\n")
    words = "--rows sequential sequential,batch_size=8 --seeds 0 --list"
    assert sweep(study, *words.split()) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "sequential,batch_size=4 seed 0: to do",
        "sequential,batch_size=8 seed 0: to do",
    ]


def test_the_folder_has_the_name_of_the_study(study, monkeypatch):
    """The name of the file, or of its folder."""
    folders = []

    def perform(runs, out, **options):
        folders.append(str(out))
        return []

    monkeypatch.setattr(studies, "perform", perform)
    (study.parent / "rates.toml").write_text(STUDY)
    assert sweep(study) == sweep("rates.toml") == 0
    assert folders == [f"runs/{Path.cwd().name}", "runs/rates"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "jobs: 0 is not allowed; allowed are 1.."),
        (["--jobs", "9999"], "jobs: 9999 is not allowed; allowed are 1.."),
        (["--rows", "avg"], "rows: avg is unknown"),
        (["--seeds", "-1"], "seeds: -1 is not allowed"),
        (["--data-dirs", "x"], "flag: --data-dirs is unknown"),
    ],
)
def test_wrong_flags_are_refused(study, capsys, words, message):
    assert sweep(study, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hsee: {message}")
    assert error.count("\n") == 1


def test_a_refused_run_is_the_last(study, capfd):
    """There are no data, and no other run of the study could be trained."""
    study.write_text(STUDY.replace("[options]", '[options]\ndataset = "npz"'))
    Path("nothing").mkdir()
    assert sweep(study, "--data-dir", "nothing") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "seed" in line]
    assert len(errors) == 1
    assert errors[0].startswith("hsee: averaging seed 0: data")


def test_a_cache_that_cannot_be_is_refused(study, capfd):
    """In one line, as `hsee train` does, and once."""
    (study.parent / "file").touch()
    assert sweep(study, "--compilation-cache", str(study.parent / "file" / "x")) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.count("compilation_cache: ") == 1


def test_devices_that_are_not_there_are_one_line(study, capfd, monkeypatch):
    """The platforms are those of the process of the run."""
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    assert sweep(study, "--out", "out") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "seed" in line]
    begin = "hsee: averaging seed 0: JAX_PLATFORMS: nowhere is not allowed: "
    assert len(errors) == 1 and errors[0].startswith(begin)


def test_a_changed_study_replaces_no_run_unasked(study, capsys):
    run = studies.runs(studies.load(study))[2]
    folder = Path("out/runs") / run.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(hsee_jax.config.to_json(run.config))
    study.write_text(STUDY.replace(*SHORT))
    assert sweep(study, "--out", "out") == 2
    error = capsys.readouterr().err
    assert "holds a run of averaging with another rounds; " in error
    assert "--overwrite" in error


def test_overwrite_reaches_the_runs(study, monkeypatch):
    given = []

    def perform(runs, out, **options):
        given.append(options["overwrite"])
        return []

    monkeypatch.setattr(studies, "perform", perform)
    sweep(study)
    sweep(study, "--overwrite")
    assert given == [False, True]


def test_one_sweep_writes_a_folder_at_a_time(study, capsys):
    from hsee_jax.runs.folder import sole_writer

    with sole_writer(Path("out")):
        assert sweep(study, "--out", "out") == 2
    assert "is being written by another process" in capsys.readouterr().err


def test_the_time_is_limited(study, capfd):
    """No run starts when the time is over, and nothing is lost."""
    assert sweep(study, "--out", "out", "--seconds", "0") == 0
    captured = capfd.readouterr()
    assert captured.err == "hsee: 4 of 4 runs are not done; the same command goes on\n"
    assert not Path("out/results.jsonl").exists()


STOPPING = {signal.SIGINT, signal.SIGTERM}


def blocked():
    return STOPPING & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def crash(*args, **options):
    """Ctrl-C could not have ended this process before it came here."""
    os._exit(7 if blocked() == STOPPING else 8)


def test_a_run_that_crashes_does_not_stop_the_others(study, monkeypatch, capsys):
    """Two runs fail; their processes die without a word."""
    ends = studies.perform(
        studies.runs(studies.load(study), seeds=[0]), "out", setup=crash
    )
    assert [end.how for end in ends] == ["failed", "failed"]
    assert {end.text for end in ends} == {"failed with status 7"}
    assert not blocked()
    monkeypatch.setattr(studies, "perform", lambda *args, **options: ends)
    assert sweep(study, "--out", "out") == 1


def test_a_signal_is_the_end(study, monkeypatch, capsys):
    def perform(runs, out, *, stop, **options):
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        return []

    monkeypatch.setattr(studies, "perform", perform)
    assert sweep(study) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err


LONG = STUDY.replace("rounds = 3", "rounds = 30\ncheckpoint_every = 2")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The scores of both rows with seed 0, trained without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "study.toml").write_text(LONG)
    runs = studies.runs(studies.load(folder / "study.toml"), seeds=[0])
    return {r.row: studies.train_run(r, folder / r.row).summary.scores for r in runs}


def start():
    """Start a sweep of both rows as a command of its own."""
    words = ["sweep", "study.toml", "--seeds", "0", "--out", "out"]
    return subprocess.Popen(
        [sys.executable, "-m", "hsee_jax", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopping_a_sweep_changes_no_figure(study, expected, number):
    """In the middle of its second row; then it is started again.

    It alone is killed; a terminal sends the other signals to all its processes.
    """
    study.write_text(LONG)
    sweep = start()
    log = Path("out/runs/sequential-0/metrics.jsonl")
    while not log.is_file() or len(log.read_text().splitlines()) < 7:
        assert sweep.poll() is None
        time.sleep(0.01)
    killed = number == signal.SIGKILL
    (os.kill if killed else os.killpg)(sweep.pid, number)
    text, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == (-number if killed else 128 + number)
    assert ("sequential seed 0: stopped " in text) != killed
    assert ("1 of 2 runs are not done; the same command goes on" in errors) != killed
    assert len(log.read_text().splitlines()) < 30
    again = start()
    text, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert text.startswith("1 of 2 runs are to be done\n")
    results = studies.read_results(Path("out"))
    assert {one.row: one.summary.scores for one in results} == expected
    assert len(results) == 2


@pytest.mark.parametrize(
    "words", [["--overwrite"], ["--jobs", "5"], ["--seconds", "5"]]
)
def test_a_list_trains_nothing(study, words, capsys):
    assert sweep(study, "--list", *words) == 2
    name = words[0].removeprefix("--")
    assert f"{name}: is not allowed together with --list" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "-1"])
def test_only_a_time_limits_a_sweep(study, text, capsys):
    assert sweep(study, "--list", f"--seconds={text}") == 2
    assert "seconds: " in capsys.readouterr().err


def test_a_folder_of_no_user_is_refused(study, capsys):
    for words, field in (
        (["sweep", str(study), "--list"], "--data-dir"),
        (["info"], "data_dir"),
    ):
        assert cli.main([*words, "--data-dir", "~no_such_user/x"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"hsee: {field}: ~no_such_user/x names a user")


def test_own_data_in_another_folder_are_to_do(study, monkeypatch, capsys):
    """And the table holds the runs on the data that are given."""
    study.write_text(STUDY.replace("rounds = 3", 'rounds = 3\ndataset = "npz"'))
    one, *_ = studies.runs(studies.load(study), data_dir=str(Path("one").resolve()))
    Path("out").mkdir()
    studies.append_result(Path("out"), result(one, summary()))
    words = (study, "--out", "out", "--data-dir")
    assert sweep(*words, "one", "--list") == sweep(*words, "other", "--list") == 0
    shown = capsys.readouterr().out
    assert "3 of 4" in shown
    assert "4 of 4" in shown
    monkeypatch.setattr(studies, "perform", lambda *args, **options: [])
    assert sweep(*words, "one") == 0
    assert "averaging │     0" in capsys.readouterr().out


@pytest.mark.parametrize("title", ["a [/x] b", "a [red]x b", "a :smile: b"])
def test_brackets_in_a_title_are_text(study, title, monkeypatch, capsys):
    study.write_text(STUDY.replace("A study for tests", title))
    one, *_ = studies.runs(studies.load(study))
    Path("out").mkdir()
    studies.append_result(Path("out"), result(one, summary()))
    monkeypatch.setattr(studies, "perform", lambda *args, **options: [])
    assert sweep(study, "--out", "out") == 0
    assert title in capsys.readouterr().out
    assert title in Path("out/results.md").read_text()


def test_one_folder_for_rows_on_other_data_is_refused(study, capsys):
    """The rows would be one."""
    text = STUDY.replace("rounds = 3", 'rounds = 3\ndataset = "npz"')
    rows = '[rows.b]\ndata_dir = "b"\n[rows.c]\ndata_dir = "c"\n'
    study.write_text(text.partition("[rows")[0] + rows)
    assert sweep(study, "--list") == 0
    assert sweep(study, "--list", "--data-dir", "d") == 2
    error = capsys.readouterr().err
    assert "study.toml with --data-dir, rows: c has the settings of b" in error


def test_a_study_does_not_begin_in_the_folder_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run; allowed is a new folder"):
        studies.perform([], tmp_path)
