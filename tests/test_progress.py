"""What a training shows while it waits, and after each round."""

import itertools
import os
import re
import subprocess
import sys

import pytest

from hsee_jax import cli

WORDS = (
    "train --network tiny --plugin tiny --num-clients 2 --cuts 1 2 "
    "--max-train-samples 40 --max-test-samples 10 --batch-size 20 --rounds 2 --out run"
).split()
WAITS = (
    "hsee: compiling the programs of 2 cuts, then training; each round prints a line"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_a_terminal_there_is_a_line_at_once_and_a_line_a_round(capsys):
    assert cli.main(WORDS) == 0
    waits, first, second = capsys.readouterr().err.splitlines()
    assert waits == WAITS
    assert first.startswith("round 1/2: ") and second.startswith("round 2/2: ")


def test_a_terminal_shows_what_the_first_round_waits_for(monkeypatch, capsys):
    """And the log stands above the bar, on lines of its own."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main([*WORDS, "--cuts", "3"]) == 0
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().err)
    waits, rounds = text.split("round 1/2: ")
    assert "first round (compiling the programs of 1 cut)" in waits
    assert "0/2" in waits
    assert "compiling" not in rounds.splitlines()[-1] and "2/2" in rounds


WAITER = """
import time
from pathlib import Path
import hsee_jax as hs
import tiny

class Waiter(hs.runs.Callback):
    def on_round(self, record, moment):
        end = time.monotonic() + 60
        while not Path("go").exists() and time.monotonic() < end:
            time.sleep(0.02)

@hs.tracking.register
def waiter(folder):
    return Waiter()
"""


def test_a_line_is_not_held_back_in_a_pipe(tmp_path):
    """The child waits after its first round until the lines before are read."""
    (tmp_path / "waiter_plugin.py").write_text(WAITER)
    words = [*WORDS, "--plugin", "waiter_plugin", "--track", "waiter"]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-m", "hsee_jax", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    with child.stderr as lines:
        seen = list(itertools.takewhile(lambda line: "round 1/2: " not in line, lines))
        assert child.poll() is None
        (tmp_path / "go").touch()
        rest = lines.readlines()
    assert seen[-1].rstrip() == WAITS
    assert [line[:9] for line in rest] == ["round 2/2"]
    assert child.wait() == 0
