"""Servers that are one network, and the sentence that says so."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from rounds import train
from tiny import PIPELINE, TINY, tiny_data, tiny_federation, tiny_shards, write_run

from hsee_jax import cli, override, preset
from hsee_jax.algorithms import (
    averaging,
    fedavg,
    local,
    sequential,
    splitfed_v1,
    splitfed_v2,
)
from hsee_jax.config import to_json
from hsee_jax.engine import ClientResult, make_evaluation
from hsee_jax.report.curves import read_curves
from hsee_jax.report.page import write_report
from hsee_jax.report.tables import EQUAL_SERVERS
from hsee_jax.runs.data import build_info
from hsee_jax.runs.one_network import is_one_network
from hsee_jax.runs.records import Scores

NAN = math.nan


@pytest.mark.parametrize(
    ("make", "options", "cuts", "one"),
    [
        (averaging, {"average": "all_holders"}, (1, 2, 1), True),
        (averaging, {"average": "all_holders", "period": 0}, (1, 2, 1), False),
        (averaging, {"average": "servers"}, (1, 2, 1), False),
        (averaging, {"average": "servers", "batch_norm": "average"}, (2, 2, 2), False),
        (sequential, {}, (1, 2, 1), False),
        (local, {}, (1, 2, 1), False),
        (splitfed_v1, {}, (2, 2, 2), True),
        (splitfed_v2, {}, (2, 2, 2), True),
        (fedavg, {}, (3, 3, 3), True),
    ],
)
def test_a_strategy_says_whether_it_makes_one_network(make, options, cuts, one):
    """After a round the losses of all servers are equal, or none is."""
    federation = tiny_federation(dict(enumerate(cuts)))
    strategy = make(federation, **options)
    assert strategy.one_network == one
    state, _ = train(
        strategy, federation, tiny_shards({0: 8, 1: 8, 2: 4}), axis="loop", rounds=1
    )
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=11)
    results = evaluate(state, jax.device_put(tiny_data(11, seed=5)))
    losses = [result.server_loss for result in results]
    assert np.allclose(losses, losses[0], rtol=1e-5) == one


WORDS = (
    "--num-clients 2 --cuts 1 2 --max-train-samples 40 --max-test-samples 20 "
    "--batch-size 6 --rounds 1 --network tiny --plugin tiny"
).split()


@pytest.mark.parametrize(
    ("options", "one"),
    [
        ("", True),
        pytest.param("--average servers", False, marks=pytest.mark.slow),
        pytest.param("--batch-norm keep_local", False, marks=pytest.mark.slow),
        # no average until the end
        pytest.param("--period 3", False, marks=pytest.mark.slow),
    ],
)
def test_the_table_says_why_all_servers_score_the_same(options, one, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert cli.main(["train", *WORDS, *options.split(), "--out", folder]) == 0
    assert (EQUAL_SERVERS in capsys.readouterr().out) == one
    assert cli.main(["eval", folder]) == 0
    assert (EQUAL_SERVERS in capsys.readouterr().out) == one
    assert cli.main(["eval", folder, "--json"]) == 0
    assert EQUAL_SERVERS not in capsys.readouterr().out
    page = write_report(read_curves([tmp_path / "run"]), tmp_path / "report")
    for text in (page.read_text(), (page.parent / "report.md").read_text()):
        assert (EQUAL_SERVERS in text) == one


def result(i, accuracy=0.5, loss=1.0):
    return ClientResult(i, 1 + i, 0.1 * i, accuracy, 2.0, loss)


def test_equal_figures_are_not_enough_nor_is_the_strategy(tmp_path):
    base = override(preset("demo"), **TINY, num_clients=2, cuts=("1", "2"))
    for name in ("averaging", "local"):
        write_run(tmp_path / name, override(base, strategy=name))
    equal = Scores.of([result(0), result(1, loss=1.0001)])
    assert is_one_network(tmp_path / "averaging", equal)
    assert not is_one_network(tmp_path / "local", equal)
    for other in (result(1, accuracy=0.45), result(1, loss=1.01), result(1, loss=NAN)):
        scores = Scores.of([result(0), other])
        assert not is_one_network(tmp_path / "averaging", scores)
    assert not is_one_network(tmp_path / "averaging", Scores.of([result(0)]))
    (tmp_path / "averaging" / "data.json").unlink()
    assert not is_one_network(tmp_path / "averaging", equal)


ASKED = """
import sys
from pathlib import Path
from hsee_jax.engine import ClientResult
from hsee_jax.runs.one_network import is_one_network
from hsee_jax.runs.records import Scores
scores = Scores.of([ClientResult(i, 1, 0.1, 0.5, 2.0, 1.0) for i in range(2)])
print(*(is_one_network(Path(folder), scores) for folder in sys.argv[1:]))
"""


def test_no_device_is_opened(tmp_path, monkeypatch):
    """A report may be made where the run's devices are not, or are at work."""
    base = override(preset("demo"), num_clients=2, cuts=("2",))
    folders = []
    fpl = {"strategy": "fpl", "partition": "views"}
    for changes in ({"average": "all_holders"}, fpl):
        config = override(base, **changes)
        folders.append(tmp_path / config.strategy.strategy)
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_text(to_json(config))
        info = build_info(config.data)._asdict()
        (folders[-1] / "data.json").write_text(json.dumps(info))
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    command = [sys.executable, "-c", ASKED, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("True False\n", 0), result.stderr
