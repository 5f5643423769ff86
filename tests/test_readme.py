"""What the README shows works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hsee_jax
from hsee_jax import cli
from hsee_jax.config.values import options

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


def test_the_restore_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hsee_jax.train(SMALL, Path("runs/demo"))
    names = {}
    exec(block("restore"), names)
    assert len(names["client"].layers) == 1
    assert len(names["server"].layers) == 2
    assert len(names["network"].layers) == 3
    assert len(names["alone"].layers) == len(names["spec"].stages) == 1


def test_the_gate_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hsee_jax.train(SMALL, Path("runs/demo"))
    assert cli.main("gate runs/demo --target-offload 0.3".split()) == 0
    names = {}
    exec(block("gate"), names)
    assert names["answers"].predictions.shape == (8,)


def test_the_commands_use_flags_that_exist():
    known = {name.replace("_", "-") for name in options()}
    known |= {"seed", "out", "resume", "overwrite", "config", "checkpoint", "json"}
    known |= {"coordinator", "num-processes", "process-id", "compilation-cache"}
    known |= {"tensorboard", "absences-file", "client"}
    known |= {"criterion", "target-offload", "target-accuracy", "target-bytes"}
    lines = [line for line in README.splitlines() if "hsee " in line]
    flags = {flag for line in lines for flag in re.findall(r"--([a-z-]+)", line)}
    flags -= {"file-format", "help"}
    assert {"strategy", "cuts", "data-dir"} <= flags
    assert flags - {"file"} <= known
