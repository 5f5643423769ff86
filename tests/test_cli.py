"""The command line, in processes of its own where it matters."""

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import hsee_jax
from hsee_jax import cli
from hsee_jax.cli.commands import COMMANDS
from hsee_jax.cli.terminal import ProgressBar, text_table
from hsee_jax.config import override, preset, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.optim.optimizers import OPTIMIZERS, sgd
from hsee_jax.runs.data import build_data
from hsee_jax.runs.records import Scores

SMALL = (
    "--width 2 --stem 7x7 --num-clients 3 --cuts 8 layer4 --max-train-samples 60 "
    "--max-test-samples 40 --batch-size 16 --rounds 2 --seed 5"
).split()

# The same for a network that compiles at once.
TINY = [*SMALL[4:], "--network", "tiny", "--plugin", "tiny"]


FINISHED = SimpleNamespace(rounds=1, scores=Scores(0.5, 0.5, ()))  # of a run


def hsee(*words):
    command = [sys.executable, "-m", "hsee_jax", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run, and what training it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = hsee("train", "demo", *SMALL, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_train_prints_every_client(run):
    folder, result = run
    summary = json.loads((folder / "summary.json").read_text())
    rows = re.findall(r"│ +(\d+) │ +(\d) │ +(0\.\d{4}) │ +(0\.\d{4}) │", result.stdout)
    assert [(int(i), int(cut)) for i, cut, _, _ in rows] == [(0, 8), (1, 9), (2, 8)]
    for (_, _, exit_accuracy, server_accuracy), client in zip(
        rows, summary["clients"], strict=True
    ):
        assert float(exit_accuracy) == pytest.approx(client["exit_accuracy"], abs=5e-5)
        assert float(server_accuracy) == pytest.approx(
            client["server_accuracy"], abs=5e-5
        )
    assert f"{summary['mean_server_accuracy']:.4f}" in result.stdout
    assert "round 2/2" in result.stderr
    config = json.loads((folder / "config.json").read_text())
    assert config["clients"]["cuts"] == ["8", "layer4"]
    assert {config["run"][f"{n}_seed"] for n in ("model", "data", "partition")} == {5}
    assert summary["images_per_second"] > 0
    assert {"python", "jax", "orbax-checkpoint"} <= set(summary["versions"])

    # behind both cuts 16 features of 4 bytes, and a label; the clients' layers each way
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        up, down = record["link"]["up_bytes"], record["link"]["down_bytes"]
        assert up - down == record["images"] * 68 > 0
        assert down == records[0]["link"]["down_bytes"] > 0
    for name in ("up_bytes", "down_bytes"):
        assert summary["link"][name] == sum(r["link"][name] for r in records)
    assert [one["cut"] for one in summary["link"]["cuts"]] == [8, 9]


def test_eval_repeats_the_figures_to_the_last_digit(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    result = hsee("eval", folder, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures == {key: summary[key] for key in figures}
    assert {"clients", "mean_exit_accuracy", "rounds"} <= set(figures)


def test_evals_flags_choose_checkpoint_and_data(monkeypatch, capsys):
    seen = []

    def evaluate(folder, which, *, data_dir):
        seen.append((str(folder), which, data_dir))
        return 1, Scores(0.5, 0.5, ())

    monkeypatch.setattr("hsee_jax.cli.inspect.evaluate_run", evaluate)
    words = "eval run --checkpoint best --data-dir there --json".split()
    assert cli.main(words) == 0
    assert cli.main(["eval", "run", "--json"]) == 0
    assert seen == [("run", "best", "there"), ("run", "latest", None)]


@pytest.mark.parametrize(
    ("command", "function", "flags"),
    [
        (
            "interactions",
            "find_interactions",
            {"client": 3, "max_order": 4, "count": 5, "max_samples": 6},
        ),
        ("refit", "refit_run", {"ridge": 0.5}),
    ],
)
def test_flags_reach_their_function(
    command, function, flags, tmp_path, monkeypatch, capsys
):
    seen = []

    def spy(folder, *arguments, **options):
        seen.append((str(folder), arguments, options))
        raise UserError("enough")

    module = importlib.import_module(f"hsee_jax.cli.{command}")
    monkeypatch.setattr(module, function, spy)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    out = tmp_path / "out"
    rest = ["--checkpoint", "best", "--data-dir", "there", "--out", str(out)]
    assert cli.main([command, "run", *words, *rest]) == 2
    ((folder, arguments, options),) = seen
    assert folder == "run" and options.pop("which") == "best"
    assert options.pop("data_dir") == "there"
    if command == "interactions":
        assert (arguments, options) == ((flags.pop("client"),), flags)
    else:
        assert (arguments, options) == ((out,), flags)


def test_config_resume_and_overwrite(tmp_path, capsys):
    """A stored configuration gives the same figures; --resume and --rounds go on."""
    folder, copy = tmp_path / "run", tmp_path / "copy"
    small = [*TINY, "--cuts", "1", "layer3", "--out", str(folder)]
    assert cli.main(["train", *small]) == 0
    stored = str(folder / "config.json")
    assert cli.main(["train", "--config", stored, "--out", str(copy)]) == 0
    first = json.loads((copy / "summary.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    assert first["clients"] == summary["clients"]
    capsys.readouterr()

    assert cli.main(["train", "--out", str(copy)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    more = ["train", "--out", str(copy), "--resume", "--rounds", "3"]
    assert cli.main(more) == 0
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 3
    assert cli.main([*more[:-2], "--rounds", "1"]) == 2
    assert "rounds: 1 is not allowed" in capsys.readouterr().err
    assert cli.main([*more, "--batch-size", "8"]) == 2
    assert "batch_size: 8 is not allowed with --resume" in capsys.readouterr().err

    again = ["train", "--config", stored, "--out", str(copy), "--overwrite"]
    assert cli.main([*again, "--rounds", "1"]) == 0
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 1


def test_train_and_eval_say_where_the_data_are_from(tmp_path, monkeypatch, capsys):
    images, labels = np.zeros((50, 12, 12, 1), np.uint8), np.arange(50) % 10
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    config = override(preset("demo"), dataset="npz", data_dir=str(tmp_path))

    def load(*args, **kwargs):
        build_data(config.data)
        return FINISHED

    def evaluate(*args, **kwargs):
        return 1, load().scores

    monkeypatch.setattr("hsee_jax.cli.train.train_run", load)
    monkeypatch.setattr("hsee_jax.cli.inspect.evaluate_run", evaluate)
    for command in ("train", "inspect"):
        name = f"hsee_jax.cli.{command}.print_figures"
        monkeypatch.setattr(name, lambda *a, **k: None)
    for words in (["train", "--out", str(tmp_path / "run")], ["eval", "run"]):
        assert cli.main(words) == 0
        out, err = capsys.readouterr()
        assert out == ""
        assert err == (
            "hsee: npz: 50 training and 50 test images of 12x12x1 in 10 classes, from "
            f"train.npz and test.npz in {tmp_path}\n"
        )


@pytest.mark.parametrize(
    "words",
    [
        "eval X",
        "report X",
        "train --out X",
        "gate X",
        "refit run --out X",
        "export run --client 0 --out X",
        "profile --out X/me.toml",
    ],
)
def test_a_folder_whose_name_is_too_long_is_one_line(words, capsys):
    """As one that may not be entered, of which Python's `pathlib` says so as well."""
    words = [word.replace("X", "x" * 300) for word in words.split()]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_an_option_of_a_plugin_may_not_be_called_like_a_flag(monkeypatch, capsys):
    monkeypatch.setattr(OPTIMIZERS, "_entries", dict(OPTIMIZERS.items()))

    @OPTIMIZERS.register(summary="of a plugin")
    def clashes(*, out: Annotated[int, "the name of a flag of train"] = 1):
        return sgd()

    assert cli.main(["train", "demo"]) == 2
    err = capsys.readouterr().err
    assert "plugin: an option has the name of a flag" in err and "--out" in err


def test_a_narrow_table_shows_all_of_each_name():
    names = [f"averaging,partition=dirichlet,alpha={a}" for a in (0.1, 1.0)]
    console = Console(width=30, file=io.StringIO())
    console.print(text_table("rows", ["row", "mean"], [[n, "0.5"] for n in names]))
    text = re.sub(r"[\s│]|0\.5", "", console.file.getvalue())
    assert all(name.replace("0.5", "") in text for name in names)


@pytest.mark.slow
def test_sigterm_stops_after_the_round_and_resume_goes_on(
    tmp_path, monkeypatch, capsys
):
    """Told in round 2, while its line is shown; the next round is the last."""
    words = ["--num-clients", "2", "--cuts", "1", "--max-train-samples", "32"]
    words += ["--max-test-samples", "8", "--rounds", "5", "--checkpoint-every", "9"]
    words += ["--network", "tiny", "--plugin", "tiny"]
    show = ProgressBar.on_round

    def tell(self, record, moment):
        show(self, record, moment)
        if record.round == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def rounds(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [(r["round"], r["train"]) for r in map(json.loads, lines)]

    before = signal.getsignal(signal.SIGTERM)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(["train", *words, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_round", tell)
        status = cli.main(["train", *words, "--out", str(stopped)])
    assert status == 128 + signal.SIGTERM
    assert "stopped after round 3; --resume" in capsys.readouterr().err
    assert rounds(stopped) == rounds(whole)[:3]
    assert signal.getsignal(signal.SIGTERM) == before
    assert cli.main(["train", "--resume", "--out", str(stopped)]) == 0
    assert rounds(stopped) == rounds(whole)


def test_info_lists_every_layer_and_cut():
    result = hsee("info", "cifar10")
    assert result.returncode == 0, result.stderr
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "│" in line]
    table = {row[1].strip(): [cell.strip() for cell in row] for row in rows}
    assert table["total"][2] == "11,173,962"
    assert table["layer1.0"][:3] == ["2", "layer1.0", "73,984"]
    assert table["layer1.0"][4] == str(f"{32 * 32 * 64 * 4:,}")
    assert table["layer1.0"][8:] == [f"{32 * 32 * 64 * 4 + 4:,}", "0"]
    # two 3x3 convolutions of 64 channels; border taps on padding are not counted
    full = 2 * 2 * 9 * 64 * 64 * 32 * 32 / 1e6
    assert 0.9 * full < float(table["layer1.0"][3].replace(",", "")) < 1.02 * full
    # the client of cut 9 holds everything but the final head, and an exit like it
    assert table["layer4.1"][5] == "11,173,962"


@pytest.mark.slow
def test_compiled_programs_are_kept_unless_switched_off(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    small = ["info", "--width", "1"]
    for words, folder in (
        (["--compilation-cache", "off"], None),
        (["--compilation-cache", tmp_path / "chosen"], tmp_path / "chosen"),
        ([], tmp_path / "home" / "hsee_jax"),
    ):
        before = set(tmp_path.rglob("*"))
        assert hsee(*small, *words).returncode == 0
        new = {path.parent for path in set(tmp_path.rglob("*")) - before}
        assert (folder in new) if folder else not new


MANY_DIGITS = "9" * 5000  # more than Python reads as a number
BAD = [
    ("train --cuts 0", "cuts: 0"),
    ("train --cuts 10", "cuts: 10"),
    pytest.param(f"train --cuts {MANY_DIGITS}", "is not a layer", id="long cut"),
    pytest.param(
        f"train --absences 0:1-{MANY_DIGITS}", "is CLIENT:FROM-TO", id="long absence"
    ),
    ("train --cuts layer9", "cuts: layer9 is not a layer (did you mean layer"),
    ("train --num-clients 2 --cuts 3 5 7", "cuts: 3 given for 2 clients"),
    ("train --num-clients 0", "num_clients: 0"),
    ("train --rounds 0", "rounds: 0"),
    ("train --batch-size 0", "batch_size: 0"),
    ("train --out=", "--out: an empty path is not allowed"),
    ("train --data-dir=", "data_dir: an empty path is not allowed"),
    ("train --compilation-cache=", "compilation_cache: an empty path is not allowed"),
    ("train --out ~nobody-here/x", "--out: ~nobody-here/x names a user without a home"),
    ("train --num-clients 2147483647", "num_clients: 2147483647"),
    ("train --rounds 2147483647", "rounds: 2147483647"),
    ("train --loop-threads 2147483647", "loop_threads: 2147483647"),
    ("train --network mlp --depth 2147483647", "depth: 2147483647"),
    ("train --network mlp --hidden 2147483647", "hidden: 2147483647"),
    ("train --width 2147483647", "width: 2147483647"),
    ("data imagefolder --image-size 2147483647", "image_size: 2147483647"),
    (
        "train --partition classes --classes-per-client 2147483647",
        "classes_per_client: 2147483647",
    ),
    ("train --rounds three", "--rounds"),
    ("train --learning-rate -0.1", "learning_rate: -0.1"),
    ("train --strategy averagin", "did you mean averaging?"),
    ("train demmo", "did you mean demo?"),
    ("train --dataset cifar", "did you mean cifar10?"),
    ("train --num-cleints 3", "did you mean --num-clients?"),
    ("train demo twice", "twice"),
    ("trian", "did you mean train?"),
    ("", "command"),
    ("train --num-clients 6001", "num_clients: 6001 is more than the 5400"),
    ("train cifar10 --data-dir nowhere", "tfds build"),
    ("train --resume", "out: missing"),
    ("train --resume --out nowhere", "nowhere is not a run"),
    ("train --out /dev/null", "out: /dev/null is not a folder"),
    ("train --out /dev/null/run", "out: /dev/null is not a folder"),
    ("train demo --config c.json", "config: is not allowed together with a preset"),
    ("train --config missing.json", "missing.json cannot be read"),
    ("train --num-processes 2", "coordinator: missing"),
    ("train --coordinator here --num-processes 2 --process-id 0", "HOST:PORT"),
    ("train --compilation-cache /dev/null/x", "compilation_cache: /dev/null/x"),
    ("train --strategy fedavg", "cuts: 2 4 6 is not allowed with fedavg"),
    ("train --strategy splitfed_v2", "allowed is one cut"),
    (
        "train --strategy fedavg --cuts 9 --link int8",
        "link: int8 is not allowed with fedavg",
    ),
    ("train --link int4", "link: int4 is unknown (did you mean int8?)"),
    ("train --strategy centralized", "num_clients: 6 is not allowed"),
    ("train --turn epoch", "turn: epoch has no effect on strategy averaging"),
    (
        "train --strategy local --weights uniform",
        "weights: uniform has no effect on strategy local; it is read by ",
    ),
    ("train --exit-gradient 1", "exit_gradient: 1.0"),
    ("train --validation-share 1", "validation_share: 1.0"),
    ("interactions nowhere --count 0", "count: 0 is not allowed"),
    ("interactions nowhere --max-order 0", "max_order: 0 is not allowed"),
    ("eval nowhere", "nowhere is not a run"),
    ("eval", "run"),
    ("export nowhere --client 0", "nowhere is not a run"),
    ("info --width 0", "width: 0"),
    ("info --dataset npz --data-dir nowhere", "train.npz and test.npz"),
    ("train --dataset npz --data-dir nowhere", "train.npz and test.npz"),
    ("data", "dataset"),
    ("data cifar", "did you mean cifar10?"),
    ("data npz --data-dir nowhere", "train.npz and test.npz"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hsee: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_removed_is_one_line(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["train", "--out", str(tmp_path / "run")]) == 2
    monkeypatch.chdir(tmp_path)
    assert "folder: the current folder was removed" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config", "--devices", "--absences-file"])
def test_a_pipe_is_refused(flag, tmp_path, capsys):
    """It can be read only once, and a run notes the digests of its files."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ["train", flag, str(pipe), "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    assert f"{flag}: {pipe} is a pipe; allowed is a file" in capsys.readouterr().err


def test_each_path_may_begin_with_the_home_of_the_user(tmp_path, monkeypatch):
    """Also where the shell leaves it, as in ``--out=~/x``."""
    home, out = tmp_path / "home", []
    (home / "c").mkdir(parents=True)
    (home / "c" / "config.json").write_text(to_json(preset("demo")))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)

    def train(config, folder, **_):
        out.append(folder)
        return FINISHED

    monkeypatch.setattr("hsee_jax.cli.train.train_run", train)
    monkeypatch.setattr("hsee_jax.cli.train.print_figures", lambda *a, **k: None)
    assert cli.main(["train", "--config=~/c/config.json", "--out=~/x"]) == 0
    assert out == [home / "x"]
    assert not (tmp_path / "~").exists()


def numpy_memory():
    np.empty(2**60, np.uint8)


def jax_memory():
    jnp.zeros((2**20, 2**30), jnp.uint8).block_until_ready()


def device_memory():
    raise jax.errors.JaxRuntimeError("INTERNAL: failed to allocate 3.1GiB\nmore")


def thread_memory():
    raise RuntimeError("can't start new thread")


def memory_of_a_cause():
    try:
        raise MemoryError
    except MemoryError as error:
        raise ValueError("the writer failed") from error


@pytest.mark.parametrize(
    "fail",
    [numpy_memory, jax_memory, device_memory, thread_memory, memory_of_a_cause],
)
def test_no_memory_is_one_line_and_status_2(fail, monkeypatch, capsys):
    monkeypatch.setattr("hsee_jax.cli.inspect.evaluate_run", lambda *a, **k: fail())
    assert cli.main(["eval", "run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("hsee: memory: ")
    assert "a smaller batch or network needs less" in err


def test_other_faults_are_not_hidden(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("INTERNAL: a fault of ours")

    monkeypatch.setattr("hsee_jax.cli.inspect.evaluate_run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["eval", "run"])


NEED_DEVICES = ("train", "eval run", "gate run", "export run --client 0", "info")


def test_devices_that_are_not_there_are_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    code = "import sys; from hsee_jax import cli\n"
    code += f"print([cli.main(words.split()) for words in {NEED_DEVICES}])"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{[2] * len(NEED_DEVICES)}\n"
    lines = result.stderr.splitlines()
    assert len(lines) == len(NEED_DEVICES)
    for line in lines:
        assert line.startswith("hsee: JAX_PLATFORMS: nowhere is not allowed: ")


def test_a_device_that_jax_only_asserts_is_one_line(monkeypatch, capsys):
    """As it does for CUDA without its plugin."""

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert cli.main(["info"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "JAX_PLATFORMS: cuda is not allowed" in err


HELP = """
import sys
from hsee_jax import cli
from hsee_jax.cli.commands import COMMANDS
for words in ([], *([name] for name in COMMANDS)):
    try:
        status = cli.main([*words, "--help"])
    except SystemExit as end:
        status = end.code
    if status:
        raise ValueError(words)
"""


@pytest.mark.slow
def test_help_needs_no_docstrings():
    """Which ``python -OO`` removes."""
    code = [sys.executable, "-OO", "-c", HELP]
    result = subprocess.run(code, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    for command in COMMANDS.values():  # in the list, and above its own flags
        assert text.count(command.description) == 2


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hsee {metadata.version('hsee-jax')}\n"
    assert hsee_jax.__version__ == metadata.version("hsee-jax")


def test_the_public_names_are_there():
    assert set(hsee_jax.__all__) <= set(dir(hsee_jax))
    for name in hsee_jax.__all__:
        assert getattr(hsee_jax, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = hsee_jax.nothing


def test_runs_begun_in_one_second_have_folders_of_their_own(
    tmp_path, monkeypatch, capsys
):
    """Folders of runs that are refused are removed again."""
    folders = []

    def train(config, folder, **options):
        assert folder.is_dir()
        folders.append(folder)
        if config.run.rounds == 7:
            raise UserError("rounds: 7")
        (folder / "config.json").write_text("{}")
        return FINISHED

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hsee_jax.cli.train.train_run", train)
    monkeypatch.setattr("hsee_jax.cli.train.print_figures", lambda *a, **k: None)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    assert cli.main(["train", "--rounds", "7"]) == 2
    assert not Path("runs").exists()
    assert [cli.main(["train"]) for _ in range(3)] == [0] * 3
    assert cli.main(["train", "cifar10", "--rounds", "7"]) == 2
    names = ["demo-now", "demo-now", "demo-now-2", "demo-now-3", "cifar10-now"]
    assert folders == [Path("runs") / name for name in names]
    assert sorted(path.name for path in Path("runs").iterdir()) == names[1:4]


def test_bad_input_in_a_process_of_its_own(tmp_path):
    for words in (
        "train --cuts 11",
        "train --num-clients 6001",
        "train cifar10 --data-dir nowhere",
    ):
        result = hsee(*words.split(), "--out", tmp_path / "run")
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "run").exists()
