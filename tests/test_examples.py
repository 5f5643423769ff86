"""Every example runs, at a small size, and does what it says."""

import importlib
import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds import assert_same
from tiny import TINY, tiny_federation, write_run

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.federation import average_layers
from hsee_jax.inference import Target
from hsee_jax.nn import NETWORKS
from hsee_jax.runs import read_history

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = ("first_run", "exits")
FEW = {
    "num_clients": 4,
    "cuts": ("1", "2"),
    "max_train_samples": 90,
    "max_test_samples": 40,
    "batch_size": 8,
    "rounds": 2,
}
DEMO = hs.override(hs.preset("demo"), **TINY, **FEW)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder, with the examples on the path and forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    for registry in (NETWORKS, ALGORITHMS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for path in EXAMPLES.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield tmp_path
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def demo(monkeypatch):
    """Make the preset small."""
    monkeypatch.setattr(hs, "preset", lambda name: DEMO)


def example(name):
    return importlib.import_module(name)


def numbers(line):
    return [float(text) for text in re.findall(r"\d+\.\d+", line)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_the_plain_loop_gives_the_figures_of_train(strategy, monkeypatch, capsys):
    """Losses of every round, all weights, and what is printed; up to rounding."""
    loop = example("hetero_splitee")
    config = hs.override(
        hs.Config(), strategy=strategy, client_axis="loop", **TINY, **FEW
    )
    summary, run = hs.train(config, "run"), hs.restore("run")
    experiment = hs.build(config)
    rounds = list(loop.train(experiment))
    *_, (clients, servers, _) = rounds
    expected = [
        [record.train.exit_loss, record.train.server_loss]
        for record in read_history(Path("run")).records
    ]
    np.testing.assert_allclose([losses for *_, losses in rounds], expected, rtol=1e-5)
    for i in range(4):
        assert_same(clients[i], run.client(i), rtol=1e-4, atol=1e-5)
        assert_same(servers[i], run.server(i), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(hs, "build", lambda config: experiment)
    monkeypatch.setattr(loop, "train", lambda experiment: rounds)
    loop.main(["--strategy", strategy])
    lines = capsys.readouterr().out.splitlines()[-4:]
    for line, client in zip(lines, summary.scores.clients, strict=True):
        assert line.startswith(f"client {client.id}, cut {client.cut}:")
        scores = [client.exit_accuracy, client.server_accuracy]
        assert numbers(line) == pytest.approx(scores, abs=1e-3)


@pytest.mark.slow
def test_a_script_with_a_network_is_its_own_plugin(demo, monkeypatch, capsys):
    """It runs as ``__main__``, and its run is read by its name; nothing is trained."""

    def train(config, folder, overwrite):
        Path(folder).mkdir(parents=True)
        write_run(Path(folder), config)
        return SimpleNamespace(scores=SimpleNamespace(clients=()))

    monkeypatch.setattr(hs, "train", train)
    script = str(EXAMPLES / "own_network.py")
    monkeypatch.setattr(sys, "argv", [script, "--depth", "3"])
    runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out == "client 0 holds patches, mixer1\n"
    run = hs.restore("runs/mixer")
    assert [len(run.client(i).layers) for i in range(4)] == [2, 3, 2, 3]


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax raises a float to an int
def test_the_mixer_learns(monkeypatch, capsys):
    """Far more than one image in ten is right."""
    full = hs.override(hs.preset("demo"), max_train_samples=2000, max_test_samples=500)
    monkeypatch.setattr(hs, "preset", lambda name: full)
    example("own_network").main(["--rounds", "3", "--depth", "3"])
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(figure > 0.3 for line in lines for figure in numbers(line))


def test_the_mixer_is_what_its_paper_says(capsys):
    """16 values a patch; a mixing layer keeps the shape; heads see all tokens."""
    example("own_network")
    words = "--plugin own_network --network mixer --depth 2 --channels 8".split()
    assert cli.main(["info", *words, "--cuts", "1", "3"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    found = {
        row[2].strip(): int(row[3].replace(",", "")) for row in rows if len(row) > 9
    }
    tokens = 28 * 28 // 16
    perceptron = {n: 2 * n * n + 2 * n + 2 * n * n + n for n in (tokens, 8)}
    mixing = sum(perceptron.values()) + 2 * 2 * 8
    assert found["patches"] == 16 * 8 + 8
    assert found["mixer1"] == found["mixer2"] == mixing
    assert cli.main(["info", *words, "--patch-size", "5"]) == 2
    assert "patch_size: 5 does not divide 28 x 28 pixels" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_goes_a_part_of_the_way(demo):
    """Clients and optimizer states stay; the means are those of averaging."""
    elastic = example("own_algorithm").elastic
    federation = tiny_federation({0: 1, 1: 1, 2: 2})
    plain = hs.algorithms.averaging(federation)
    rng, weights = np.random.default_rng(0), (jnp.array([1.0, 3.0]), jnp.array([2.0]))
    state = jax.tree.map(
        lambda a: a + rng.normal(size=a.shape).astype(a.dtype) if a.ndim else a,
        jax.jit(plain.init)(jax.random.key(0)),
    )
    averaged, means = jax.jit(partial(average_layers, plain))(state, weights)
    since = tuple(jnp.zeros(w.shape, jnp.int32) for w in weights)
    for pull in (0.0, 0.25, 1.0):
        strategy = elastic(federation, pull=pull)
        found, found_means = jax.jit(partial(average_layers, strategy))(state, weights)
        received = jax.jit(strategy.receive)(state, means, since)
        assert_same(found_means, means)
        assert_same(found.clients, state.clients)
        expected = jax.tree.map(
            lambda own, mean, p=pull: (1 - p) * np.asarray(own) + p * np.asarray(mean),
            state.servers,
            averaged.servers,
        )
        assert_same(found.servers, expected, rtol=1e-5, atol=1e-6)
        assert_same(received.servers, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_algorithm_is_trained_from_a_script(demo, capsys):
    example("own_algorithm").main(["--pulls", "0.25", "--rounds", "1"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pull 0.25: exits 0.")
    config = json.loads(Path("runs/elastic/pull-0.25/config.json").read_text())
    assert config["strategy"] == {"strategy": "elastic", "pull": 0.25}


def test_one_client_sends_poisoned_layers():
    """Its parameters count times the factor, in the mean of their layers alone."""
    poisoned, factor = example("poisoning").poisoned, -10.0
    federation = tiny_federation({0: 1, 1: 2, 2: 1})
    strategy = poisoned(federation, factor=factor)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype),
        jax.eval_shape(strategy.init, jax.random.key(0)),
    )
    weights = (jnp.ones(2), jnp.ones(1))
    after, _ = jax.jit(partial(average_layers, strategy))(state, weights)
    first, second = state.clients

    def kernel(layer):
        return np.asarray(layer.params["Conv_0"]["kernel"])

    rows = [*kernel(first.layers[0]), factor * kernel(second.layers[0])[0]]
    for group in after.clients:
        for found in kernel(group.layers[0]):
            np.testing.assert_allclose(found, np.mean(rows, 0), rtol=1e-4, atol=1e-5)
    stats = [*np.asarray(first.layers[0].batch_stats["BatchNorm_0"]["mean"])]
    stats += [*np.asarray(second.layers[0].batch_stats["BatchNorm_0"]["mean"])]
    found = after.clients[0].layers[0].batch_stats["BatchNorm_0"]["mean"][0]
    np.testing.assert_allclose(found, np.mean(stats, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_poisoning_scores_the_nine_honest_clients(demo, capsys):
    poisoning = example("poisoning")
    words = "--rounds 1 --aggregates median --factors -10 --seeds 0 --json a.json"
    poisoning.main(words.split())
    (row,) = json.loads(Path("a.json").read_text())
    assert capsys.readouterr().out == poisoning.table([row]) + "\n"
    run = json.loads(Path("runs/poisoning/median--10-0/summary.json").read_text())
    exits = [one["exit_accuracy"] for one in run["clients"] if one["id"] != 1]
    assert len(exits) == 9 and row["exit_accuracy"] == pytest.approx(np.mean(exits))


@pytest.mark.parametrize("name", ["poisoning", "poisoning-skew"])
def test_the_page_has_the_figures_of_the_poisoning(name):
    rows = json.loads((EXAMPLES / f"{name}.json").read_text())
    page = (ROOT / "docs/how-to/robust.md").read_text()
    assert example("poisoning").table(rows) in page


@pytest.mark.slow
def test_the_refit_prints_what_the_runs_score(capsys):
    words = "--rounds 1 --images 90 --seeds 0 --partitions dirichlet --json a.json"
    refit = example("refit")
    refit.main([*words.split(), "--exit-heads", "linear"])
    (linear,) = rows = json.loads(Path("a.json").read_text())
    assert capsys.readouterr().out == refit.table(rows) + "\n"
    place = Path("runs/refit/dirichlet-linear-0")
    for when, folder in (("before", place), ("after", place / "refit")):
        summary = json.loads((folder / "summary.json").read_text())
        assert linear[when]["all"] == summary["mean_exit_accuracy"]


def test_the_page_has_the_figures_of_the_refit():
    rows = json.loads((EXAMPLES / "refit.json").read_text())
    page = (ROOT / "docs/how-to/exits.md").read_text()
    assert example("refit").table(rows) in page


@pytest.mark.slow
def test_the_gate_answers_as_the_study_says(demo, monkeypatch, capsys):
    gate = example("gate")
    found = []

    def study(folder):
        found.append(hs.inference.study(folder))
        return found[0]

    monkeypatch.setattr(gate, "study", study)
    gate.main(["--rounds", "1", "--offload", "0.3"])
    lines = capsys.readouterr().out.splitlines()
    chosen = found[0].thresholds(Target("offload", 0.3))["clients"]
    for line, client in zip(lines, chosen, strict=True):
        sent, cost, *accuracies = map(
            float, re.findall(r"\d+\.?\d*", line.replace(",", ""))[2:]
        )
        assert sent == pytest.approx(100 * (1 - client["on_device"]), abs=0.1)
        assert cost == pytest.approx(client["bytes"], abs=1)
        names = ("accuracy", "exit_accuracy", "server_accuracy")
        expected = [client[name] for name in names]
        assert accuracies == pytest.approx(expected, abs=1e-3)
    with pytest.raises(hs.UserError, match="run: nowhere is not a run"):
        gate.main(["--run", "nowhere"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    nbclient, nbformat = (
        pytest.importorskip(library) for library in ("nbclient", "nbformat")
    )
    book = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    (cell,) = [c for c in book.cells if "parameters" in c.metadata.get("tags", ())]
    cell.source = f"SETTINGS = {TINY | FEW}"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=300, resources=resources).execute()
    pictures = [
        output
        for cell in book.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_with_its_outputs(name):
    """And they are small, and name no folder of the machine that made them."""
    path = EXAMPLES / f"{name}.ipynb"
    assert path.stat().st_size < 400_000
    book = json.loads(path.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    text = json.dumps(
        [{k: v for k, v in output.items() if k != "data"} for output in outputs]
    )
    assert not re.search(r"/home/|/tmp/|/root/|/work/|Traceback", text)


def test_the_readme_lists_every_example():
    text = (EXAMPLES / "README.md").read_text()
    kinds = (".py", ".ipynb", ".toml")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in kinds}
    assert set(re.findall(r"\]\((\w+\.\w+)\)", text)) == files
