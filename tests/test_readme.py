"""What the README shows works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY

import hsee_jax
from hsee_jax import cli
from hsee_jax.config.values import options
from hsee_jax.nn import NETWORKS

SMALL = hsee_jax.override(
    hsee_jax.preset("demo"),
    **TINY,
    rounds=1,
    num_clients=2,
    cuts=("1", "3"),
    max_train_samples=32,
    max_test_samples=8,
)
README = (Path(__file__).parents[1] / "README.md").read_text()


def block(label):
    """The code block behind a label."""
    return re.search(rf"<!-- {label} -->\n```\w+\n(.*?)```", README, re.S).group(1)


@pytest.mark.slow
def test_the_library_example_runs(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", block("example")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # untrained, three clients: the mean cross-entropy over 10 classes is near log 10
    losses = [float(x) for x in re.findall(r"\d+\.\d+", result.stdout)]
    assert len(losses) == 3
    assert all(0.5 < loss < 8 for loss in losses)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run."""
    folder = tmp_path_factory.mktemp("place")
    hsee_jax.train(SMALL, folder / "runs/demo")
    return folder


def test_the_restore_example_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    exec(block("restore"), names)
    assert len(names["client"].layers) == 1
    assert len(names["server"].layers) == 2
    assert len(names["network"].layers) == 3
    assert len(names["alone"].layers) == len(names["spec"].stages) == 1


def test_the_gate_example_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main("gate runs/demo --target-offload 0.3".split()) == 0
    names = {}
    exec(block("gate"), names)
    assert names["answers"].predictions.shape == (8,)


def test_the_plugin_is_a_network(tmp_path, monkeypatch, capsys):
    """A layer of 32 units has 784 * 32 + 32 parameters, a later one 32 * 32 + 32."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(NETWORKS, "_entries", dict(NETWORKS._entries))
    Path("my_net.py").write_text(block("plugin"))
    (line,) = [line for line in README.splitlines() if "--plugin my_net" in line]
    _, _, *words = line.partition(" --out")[0].split()
    assert cli.main(["info", *words]) == 0
    shown = capsys.readouterr().out
    assert "25,120" in shown
    assert "1,056" in shown


def test_the_table_lists_the_packages():
    folder = Path(hsee_jax.__file__).parent
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    rows = re.findall(r"^\| `(\w+)/` \|", README, re.M)
    assert set(rows) == packages
    for path in re.findall(r"`hsee_jax/([\w/]+\.py)`", README):
        assert (folder / path).is_file()


def test_the_commands_use_flags_that_exist():
    known = {name.replace("_", "-") for name in options()}
    known |= {"seed", "out", "resume", "overwrite", "config", "checkpoint", "json"}
    known |= {"coordinator", "num-processes", "process-id", "compilation-cache"}
    known |= {"tensorboard", "absences-file", "client", "hidden"}
    known |= {"criterion", "target-offload", "target-accuracy", "target-bytes"}
    lines = [line for line in README.splitlines() if "hsee " in line]
    flags = {flag for line in lines for flag in re.findall(r"--([a-z-]+)", line)}
    flags -= {"file-format", "help"}
    assert {"strategy", "cuts", "data-dir"} <= flags
    assert flags - {"file"} <= known
