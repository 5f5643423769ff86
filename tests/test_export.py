"""Exported clients, loaded where there is no hsee_jax."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from short_resnet import SHORT_RESNET
from tiny import TINY, write_run

from hsee_jax import cli
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.data.pipeline import normalize
from hsee_jax.deployment import export_client
from hsee_jax.federation import client_spec, forward
from hsee_jax.runs import restore_client
from hsee_jax.runs.build import build_model

SMALL = override(preset("demo"), **TINY, num_clients=3, cuts=("1", "3"))
BEFORE = """
import sys
sys.modules["hsee_jax"] = None
import numpy as np
images = np.load("images.npy")
"""
AFTER = """
np.savez("five.npz", **answers)
np.savez("one.npz", **segment.call(weights, images[:1]))
print(*segment.platforms)
"""


def answers_elsewhere(place):
    """To five images, ever brighter, and to the first, by the code of its README."""
    noise = np.random.default_rng(0).integers(0, 50, (5, 28, 28, 1), np.uint8)
    images = noise + np.arange(0, 250, 50, np.uint8)[:, None, None, None]
    np.save(place / "images.npy", images)
    readme = (place / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert code.count("\n") <= 8
    result = subprocess.run(
        [sys.executable, "-c", BEFORE + code + AFTER],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "cpu cuda tpu\n"
    return images, np.load(place / "five.npz"), np.load(place / "one.npz")


def assert_answers(place, spec, branch):
    """They are those of a branch; returns logits and uncertainty."""
    images, five, one = answers_elsewhere(place)
    inputs = normalize(images, (0.286,), (0.353,))
    answer = jax.jit(partial(forward, spec, train=False))
    features, logits, _ = answer(branch, inputs, jnp.ones(5, bool))
    for found, count in ((five, 5), (one, 1)):
        for name, expected in (("logits", logits), ("features", features)):
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(
                found[name], expected[:count], rtol=1e-5, atol=1e-5
            )
    assert np.ptp(logits, axis=0).min() > 1e-2  # they depend on the image
    return five["logits"], five["uncertainty"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_run(folder, SMALL)
    return folder


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def write_known(run, rounds):
    """What training and `hsee gate` left."""
    figures = {"id": 2, "exit_accuracy": 0.25, "server_accuracy": 0.5}
    other = {"id": 0, "exit_accuracy": 1, "server_accuracy": 1, "threshold": 1}
    summary = {"rounds": 1, "clients": [other, figures]}
    thresholds = {"rounds": rounds, "criterion": "margin", "target": {"offload": 0.3}}
    thresholds["clients"] = [other, figures | {"threshold": 0.75}]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "gate").mkdir(exist_ok=True)
    (run / "gate" / "thresholds.json").write_text(json.dumps(thresholds))


def test_an_export_stands_alone(run):
    """A client of cut 1: 36 + 8 parameters in the layer and 50 in the exit."""
    write_known(run, rounds=1)
    place = export_client(run, 2)
    assert place == run / "export" / "client-2"
    branch = restore_client(run, 2)
    logits, uncertainty = assert_answers(place, *branch)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares = np.sort(shares / shares.sum(-1, keepdims=True))
    np.testing.assert_allclose(uncertainty, 1 - shares[:, -1] + shares[:, -2], 1e-4)

    card = json.loads((place / "card.json").read_text())
    for name, digest in card.pop("sha256").items():
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() == digest
    assert set(card.pop("versions")) == {"hsee-jax", "jax"}
    assert card.pop("flops") > 28 * 28 * 36
    assert card == {
        "format": 1,
        "client": 2,
        "dataset": "fashion_mnist_small",
        "network": "tiny",
        "rounds": 1,
        "cut": 1,
        "layer": "layer1",
        "input": {"shape": [28, 28, 1], "dtype": "uint8"},
        "classes": 10,
        "label_values": None,
        "mean": [0.286],
        "std": [0.353],
        "criterion": "margin",
        "threshold": 0.75,
        "target": {"offload": 0.3},
        "exit_accuracy": 0.25,
        "server_accuracy": 0.5,
        "parameters": 94,
        "features": {
            "shape": [28, 28, 4],
            "dtype": "float32",
            "link": "full",
            "bytes": 4 * 28 * 28 * 4,
        },
        "platforms": ["cpu", "cuda", "tpu"],
    }
    weights = load_file(place / "weights.safetensors")
    assert sorted(weights) == [
        "exit/Dense_0/bias",
        "exit/Dense_0/kernel",
        *(f"layer1/BatchNorm_0/{name}" for name in ("bias", "mean", "scale", "var")),
        "layer1/Conv_0/kernel",
    ]
    assert b".py" not in (place / "segment.jaxexport").read_bytes()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("centralized", {"num_clients": 1, "cuts": ("1",)}), ("fedavg", {"cuts": ("3",)})],
)
def test_a_client_with_all_layers_sends_no_bytes(tmp_path, strategy, options):
    write_run(tmp_path, override(SMALL, strategy=strategy, **options))
    place = export_client(tmp_path, 0)
    features = json.loads((place / "card.json").read_text())["features"]
    assert (features["bytes"], features["link"]) == (0, "full")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_exported_exit_that_is_not_finite_is_as_unsure_as_in_the_gate(run, value):
    """The entropy of logits with one of -inf would be an ordinary number."""
    place = export_client(run, 0)
    weights = load_file(place / "weights.safetensors")
    program = (place / "segment.jaxexport").read_bytes()
    weights["exit/Dense_0/bias"][1] = value
    images = np.zeros((2, 28, 28, 1), np.uint8)
    answers = jax.export.deserialize(bytearray(program)).call(weights, images)
    assert (np.asarray(answers["uncertainty"]) == np.inf).all()


def test_a_client_whose_link_keeps_a_state_is_exported(tmp_path):
    write_run(tmp_path, override(SMALL, link="topk"))
    place = export_client(tmp_path, 0)
    card = json.loads((place / "card.json").read_text())
    assert card["features"]["link"] == "topk"


def test_what_is_known_of_another_round_is_not_told(run):
    """And an export takes the place of an earlier one, but of nothing else."""
    write_known(run, rounds=1)
    place = export_client(run, 2)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    (place / "notes").touch()
    (place / "weights.safetensors").write_text("changed")
    export_client(run, 2)
    assert {name: (place / name).read_bytes() for name in before} == before
    assert (place / "notes").exists()

    write_run(run, SMALL, rounds=3)
    write_known(run, rounds=2)
    export_client(run, 2)
    card = json.loads((place / "card.json").read_text())
    assert (card["rounds"], card["criterion"]) == (3, "entropy")
    unknown = ("threshold", "target", "exit_accuracy", "server_accuracy")
    assert [card[name] for name in unknown] == [None] * 4
    export_client(run, 2, which="best")
    assert json.loads((place / "card.json").read_text())["exit_accuracy"] == 0.25

    thesis = run.parent / "thesis"
    thesis.mkdir()
    (thesis / "README.md").write_text("years of work")
    with pytest.raises(UserError, match="neither empty nor an export"):
        export_client(run, 2, out=thesis)
    assert [path.name for path in thesis.iterdir()] == ["README.md"]


@pytest.mark.slow
def test_a_client_of_resnet18(tmp_path):
    """Strides, shortcuts, and BatchNorm in the exit; later layers take time alone."""
    config = override(SMALL, **SHORT_RESNET, width=2, exit_head="bn_linear")
    config = override(config, cuts=("4",), strategy="sequential", link="int8")
    state = write_run(tmp_path, config)
    place = export_client(tmp_path, 1)
    spec = client_spec(build_model(config), 4, optax.identity())
    branch = jax.tree.map(lambda leaf: leaf[1], state.clients[0])
    assert_answers(place, spec, branch)
    weights = load_file(place / "weights.safetensors")
    assert weights["layer1.0/conv1/conv/kernel"].shape == (3, 3, 2, 2)
    assert {"layer2.0/bn_down/bn/mean", "exit/bn/bn/var"} <= set(weights)
    card = json.loads((place / "card.json").read_text())
    assert card["features"]["shape"] == [14, 14, 4]
    assert card["features"]["bytes"] == 14 * 14 * 4 + 2 * 4  # and two float32
    trained = {name for name in weights if not name.endswith(("/mean", "/var"))}
    assert card["parameters"] == sum(weights[name].size for name in trained)


def test_the_command_exports(run, monkeypatch, capsys):
    caches = []
    monkeypatch.setattr("hsee_jax.cli.arguments.use_cache", caches.append)
    out = run.parent / "out"
    words = f"export {run} --client 1 --checkpoint best --compilation-cache off"
    assert cli.main([*words.split(), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert json.loads((out / "card.json").read_text())["cut"] == 3
    assert caches[0]["compilation_cache"] == "off"
    assert caches[0]["checkpoint"] == "best"


def test_the_plugins_of_a_device_add_up(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("hsee_jax.cli.export.is_device", lambda folder: True)
    monkeypatch.setattr(
        "hsee_jax.cli.export.export_device",
        lambda *args, plugins, **others: given.extend(plugins),
    )
    words = ["--plugin", "one", "two", "--plugin", "three"]
    assert cli.main(["export", str(tmp_path), *words]) == 0
    assert given == ["one", "two", "three"]


def test_an_export_that_cannot_be_written_keeps_the_card_before(run, monkeypatch):
    """The card describes the other files, so it is replaced last."""
    out = run.parent / "again"
    assert cli.main(["export", str(run), "--client", "1", "--out", str(out)]) == 0
    before, written = (out / "card.json").read_bytes(), []

    def replace(path, content, *rest):
        written.append(path.name)
        if path.name == "card.json":
            raise UserError("out: full")

    monkeypatch.setattr("hsee_jax.deployment.export.replace_file", replace)
    assert cli.main(["export", str(run), "--client", "2", "--out", str(out)]) == 2
    assert len(written) > 2 and written[-1] == "card.json"
    assert (out / "card.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--client 3", "client: 3 is not in the run; allowed are 0..2"),
        ("--client 0 --out /dev/null/x", "out: /dev/null is not a folder"),
        ("--client 0 --checkpoint bset", "did you mean best?"),
        ("--client first", "--client: invalid int value"),
        ("--client 0 --width gated", "width: gated is not allowed for a run without"),
        ("--client 0 --plugin tiny", "plugin: has no effect on a run"),
        ("", "client: missing"),
    ],
)
def test_what_cannot_be_exported_is_one_line(run, capsys, words, message):
    assert cli.main(["export", str(run), *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not (run / "export").exists()
