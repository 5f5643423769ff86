"""The folder of a run that version 0.1 wrote: today's code reads it and goes on."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import hsee_jax as hs
from hsee_jax import cli, runs

WRITTEN = Path(__file__).parent / "data" / "run-0.1"
SUMMARY = json.loads((WRITTEN / "summary.json").read_text())


def files_of(folder):
    """The content of every file below a folder, by its path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


FILES = files_of(WRITTEN)


@pytest.fixture(scope="module", autouse=True)
def it_stays_as_it_is():
    yield
    assert files_of(WRITTEN) == FILES


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy, that only new files are added to."""
    folder = tmp_path_factory.mktemp("version-0.1") / "run"
    shutil.copytree(WRITTEN, folder)
    yield folder
    assert files_of(folder).items() >= FILES.items()


def test_it_is_small_and_names_no_machine():
    assert sum(map(len, FILES.values())) < 500_000
    for content in FILES.values():
        assert not any(word in content for word in (b"/tmp", b"/home", b"/root"))


def test_it_is_evaluated_to_the_figures_of_its_summary(capsys):
    assert cli.main(["eval", str(WRITTEN), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rounds"] == 2
    for name in ("mean_exit_accuracy", "mean_server_accuracy"):
        assert found[name] == SUMMARY[name]
    assert len(found["clients"]) == 3
    for client, written in zip(found["clients"], SUMMARY["clients"], strict=True):
        for name in ("exit_loss", "server_loss"):
            np.testing.assert_allclose(client.pop(name), written[name], atol=1e-5)
            written = {k: v for k, v in written.items() if k != name}
        assert client == written


def test_it_is_restored():
    run = hs.restore(WRITTEN)
    assert int(run.state.round) == 2
    assert [(group.cut, group.ids) for group in run.federation.groups] == [
        (2, (0, 2)),
        (7, (1,)),
    ]
    assert not run.strategy.shared
    assert [len(run.client(i).layers) for i in range(3)] == [2, 7, 2]
    assert [len(run.server(i).layers) for i in range(3)] == [7, 2, 7]
    leaves = jax.tree.leaves(run.state)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    # Servers were averaged after the last round, but for their BatchNorm, clients not.
    ours, theirs = (run.server(i) for i in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, ours.head.params, theirs.head.params)
    for conv in ("conv1", "conv2"):
        kernels = [server.layers[-1].params[conv] for server in (ours, theirs)]
        jax.tree.map(np.testing.assert_array_equal, *kernels)
    ours, theirs = (jax.tree.leaves(run.client(i).layers[0].params) for i in (0, 2))
    assert not all(map(np.array_equal, ours, theirs))


def test_its_history_is_read():
    history = runs.read_history(WRITTEN)
    assert history.seeds == (0, 0, 0)
    assert [share.samples for share in history.partition] == [13, 13, 12]
    assert [record.images for record in history.records] == [38, 38]
    assert history.records[0].test is None
    assert history.records[1].test == history.summary.scores
    lines = (WRITTEN / "metrics.jsonl").read_text().splitlines()
    for record, line in zip(history.records, lines, strict=True):
        assert record.to_json() == json.loads(line)
    assert history.summary.to_json() == SUMMARY


@pytest.mark.slow
def test_a_report_and_a_gate_are_made_of_it(copy, tmp_path, capsys):
    words = ["gate", str(copy), "--target-offload", "0", "--json"]
    assert cli.main(words) == 0
    gate = json.loads(capsys.readouterr().out)
    for client, at_exit, written in zip(
        gate["curve"]["clients"],
        gate["thresholds"]["clients"],
        SUMMARY["clients"],
        strict=True,
    ):
        for name in ("id", "cut"):
            assert client[name] == at_exit[name] == written[name]
        for name in ("exit_accuracy", "server_accuracy"):
            assert client[name] == pytest.approx(written[name])
        assert at_exit["validation_on_device"] == 1.0
    assert cli.main(["report", str(copy), "--out", str(tmp_path / "report")]) == 0
    (page,) = (tmp_path / "report").glob("*.html")
    assert "0.1333" in page.read_text()
    assert "not in the summary of run." in page.read_text()


@pytest.mark.slow
def test_it_goes_on(tmp_path):
    """A third round, behind the two that are there."""
    folder = tmp_path / "run"
    shutil.copytree(WRITTEN, folder)
    words = ["train", "--resume", "--rounds", "3", "--out", str(folder)]
    assert cli.main(words) == 0
    before, after = runs.read_history(WRITTEN), runs.read_history(folder)
    assert after.records[:2] == before.records
    assert [record.round for record in after.records] == [1, 2, 3]
    assert after.records[2].images == 38
    assert after.partition == before.partition
    assert after.options == before.options | {"rounds": 3}
    assert int(hs.restore(folder).state.round) == 3
    assert files_of(folder / "checkpoints" / "2") == files_of(
        WRITTEN / "checkpoints" / "2"
    )
