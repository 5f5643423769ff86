"""A user's own network, in a module of its own: every command takes it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.cli import flags
from hsee_jax.config.schema import RunConfig
from hsee_jax.nn import NETWORKS

NETWORK = '''
"""A chain of small convolutions."""

from typing import Annotated

import flax.linen as nn

import hsee_jax as hs
from hsee_jax.core import at_least, one_of


class Block(nn.Module):
    """A convolution of stride 2."""

    @nn.compact
    def __call__(self, x, mask, *, train):
        return nn.relu(nn.Conv(4, (3, 3), strides=2)(x))


class Head(nn.Module):
    """The mean over space and a linear layer."""

    classes: int

    @nn.compact
    def __call__(self, x, mask, *, train):
        return nn.Dense(self.classes)(x.mean((1, 2)))


@hs.nn.register
def users_net(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    depth: Annotated[int, "how many convolutions", at_least(1)] = 2,
    # ResNet-18 has options of these names, too
    width: int = 4,
    stem: Annotated[str, "none", one_of("none", "patch")] = "none",
    conv: Annotated[str, "form", one_of("own")] = "own",
    sizes: tuple[int, ...] = (3, 3),
    dense: bool = False,
) -> hs.Model:
    """A chain of convolutions."""
    head = hs.nn.from_linen(Head(num_classes))
    return hs.Model(
        stages=(hs.nn.from_linen(Block()),) * depth,
        exit_heads=(head,) * depth,
        final_head=head,
        layer_names=tuple(f"conv{i + 1}" for i in range(depth)),
        input_shape=input_shape,
    )
'''
MINE = (
    "--plugin users_net --network users_net --depth 3 --stem patch --sizes 5 3 "
    "--dense true"
).split()
MODEL = {
    "network": "users_net",
    "pretrained": None,
    "depth": 3,
    "width": 4,
    "stem": "patch",
    "conv": "own",
    "sizes": [5, 3],
    "dense": True,
}
FEW = (
    "--num-clients 2 --cuts 1 conv2 --max-train-samples 32 --max-test-samples 16 "
    "--validation-share 0.25 --batch-size 4 --rounds 1"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder with the user's module, and beside it the run."""
    place = tmp_path_factory.mktemp("mine")
    (place / "users_net.py").write_text(NETWORK)
    command = [sys.executable, "-m", "hsee_jax", "train", *MINE, *FEW, "--out", "run"]
    package = str(Path(hs.__file__).parents[1])
    ended = subprocess.run(
        command,
        cwd=place,
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return place


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    """Commands run in the user's folder."""
    monkeypatch.chdir(place)


def test_the_run_names_the_network_and_its_module(place):
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["model"] == MODEL
    assert config["run"]["plugin"] == ["users_net"]


def test_it_is_evaluated(place, capsys):
    """To the figures that training ended with."""
    assert cli.main(["eval", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert [client["cut"] for client in found["clients"]] == [1, 2]
    for client, written in zip(found["clients"], summary["clients"], strict=True):
        assert client == pytest.approx(written, rel=1e-5)


def test_it_is_restored():
    run = hs.restore("run")
    assert len(run.federation.model.stages) == 3
    assert [len(run.client(i).layers) for i in range(2)] == [1, 2]
    images = np.zeros((1, 28, 28, 1), np.float32)
    (layer,) = run.client(0).layers
    assert layer.params["Conv_0"]["kernel"].shape == (3, 3, *images.shape[-1:], 4)


def test_a_gate_is_made_of_it(place, capsys):
    assert cli.main("gate run --target-offload 0.5".split()) == 0
    assert (place / "run" / "gate" / "thresholds.json").exists()


def test_a_client_is_exported(place, capsys):
    assert cli.main("export run --client 1".split()) == 0
    assert capsys.readouterr().out == f"{Path('run/export/client-1')}\n"
    assert len(list((place / "run" / "export" / "client-1").iterdir())) > 1


def test_a_report_is_made_of_it(place, capsys):
    assert cli.main("report run".split()) == 0
    assert list((place / "run" / "report").glob("*.html"))


def test_its_costs_are_shown(capsys):
    """A block has 3 x 3 x C x 4 weights and 4 biases; the head 4 x 10 and 10."""
    assert cli.main(["info", *MINE, "--cuts", "1", "2"]) == 0
    out = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert [row[:3] for row in rows if "conv" in "".join(row[1:2])] == [
        ["1", "conv1", "40"],
        ["2", "conv2", "148"],
        ["3", "conv3", "148"],
    ]
    assert next(row for row in rows if row[:2] == ["final", "head"])[2] == "50"


def test_its_options_are_its_own():
    """Another network's values, chosen or not, do not become its own."""
    hs.config.load_plugins(["users_net"])
    chosen = hs.override(hs.preset("demo"), stem="7x7")
    chosen = hs.override(chosen, network="users_net")
    plain = hs.override(hs.Config(), network="users_net", plugin=("users_net",))
    assert chosen.model == plain.model
    assert (plain.model.width, plain.model.stem, plain.model.sizes) == (
        4,
        "none",
        (3, 3),
    )
    back = hs.override(plain, network="resnet18")
    assert back.model == hs.Config().model


def test_a_report_needs_no_plugin(place, capsys):
    """Figures of a run can be drawn where its network is not."""
    run = place / "elsewhere"
    shutil.copytree(place / "run", run)
    text = (run / "config.json").read_text().replace("users_net", "lost_net")
    (run / "config.json").write_text(text)
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["eval", str(run)]) == 2
    assert "plugin: lost_net cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("clients", "num_clients", "3", 'num_clients: "3" is not allowed'),
        ("run", "rounds", None, "rounds: null is not allowed"),
        ("run", "plugin", "users_net", 'plugin: "users_net" is not allowed'),
        ("data", "dataset", 5, "dataset: 5 is not allowed"),
        ("model", "stem", {"a": 1}, "config.json is damaged: TypeError"),
        ("model", "sizes", [[5]], "config.json is damaged: TypeError"),
    ],
)
def test_a_report_checks_the_options_of_the_package(
    place, capsys, section, name, value, message
):
    shutil.rmtree(place / "changed", ignore_errors=True)
    run = shutil.copytree(place / "run", place / "changed")
    values = json.loads((run / "config.json").read_text())
    values[section][name] = value
    (run / "config.json").write_text(json.dumps(values))
    assert cli.main(["report", str(run)]) == 2
    assert message in capsys.readouterr().err


def test_a_report_knows_the_defaults_beside_a_plugin(place):
    """Of options that an older version did not write."""
    run = shutil.copytree(place / "run", place / "older")
    values = json.loads((run / "config.json").read_text())
    del values["run"]["data_seed"]
    (run / "config.json").write_text(json.dumps(values))
    assert cli.main(["report", str(run)]) == 0


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_report_imports_no_plugin(place, monkeypatch, mark):
    """Though it could: a module of that name is on Python's path."""
    shutil.rmtree(place / "strange", ignore_errors=True)
    run = place / "strange"
    shutil.copytree(place / "run", run)
    text = (run / "config.json").read_text().replace("users_net", "strange_net")
    (run / "config.json").write_text(mark + text)
    (place / "strange_net.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(place)
    assert cli.main(["report", str(run)]) == 0
    assert "strange_net" not in sys.modules


def test_its_help_names_its_option(capsys):
    assert cli.main(["train", "--plugin", "users_net", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--sizes INT [INT ...]" in text
    assert re.search(
        r"\(\w+(, \w+)*, users_net\)", text
    )  # the flag of `depth`, which both read
    assert "users_net: A chain of convolutions." in text


CLASH = """
import hsee_jax as hs


@hs.nn.register
def clash_net(*, num_classes, input_shape, init: int = 1):
    pass
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plugin no_net", "plugin: no_net cannot be imported (ModuleNotFoundError"),
        (
            "--plugin ended_net",
            "plugin: ended_net cannot be imported (SystemExit: 0)",
        ),
        (
            "--plugin bad_net",
            "plugin: bad_net cannot be imported (RuntimeError: no way)",
        ),
        (
            "--plugin users_net --network users_ne",
            "network: users_ne is unknown (did you mean users_net?)",
        ),
        (
            "--plugin users_net --network users_net --exit-head linear",
            "exit_head: linear has no effect on network users_net; it is read by ",
        ),
        ("--plugin users_net --network users_net --depth 0", "depth: 0 is not allowed"),
        (
            "--plugin users_net --network users_net --depth x",
            "--depth: invalid int value: 'x'",
        ),
        (
            "--plugin users_net --network users_net --stem 7x7",
            "stem: 7x7 is unknown; allowed are none, patch",
        ),
        (
            "--plugin clash_net",
            "plugin: option init of network clash_net has the name of another option",
        ),
        ("--plugin users_net --depth 3", "depth: 3 has no effect on network resnet18"),
        (
            "--plugin users_net --network users_net --depth 3 --cuts 4",
            "cuts: 4 is not a layer; allowed are 1..3",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "info"])
def test_a_mistake_is_one_line(command, words, message, place, monkeypatch, capsys):
    (place / "bad_net.py").write_text('raise RuntimeError("no\\nway")\n')
    (place / "ended_net.py").write_text("import sys\nsys.exit(0)\n")
    (place / "clash_net.py").write_text(CLASH)
    monkeypatch.setattr(NETWORKS, "_entries", dict(NETWORKS._entries))
    monkeypatch.delitem(sys.modules, "clash_net", raising=False)
    out = ["--out", "new"] if command == "train" else []
    assert cli.main([command, *words.split(), *out]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (place / "new").exists()


def test_the_modules_of_several_flags_add_up(monkeypatch):
    """As a script adds a plugin to the flags that it is given."""
    seen = []
    monkeypatch.setattr(flags, "load_plugins", seen.append)
    words = [
        "--plugin",
        "json",
        "--plugin=csv",
        "--rounds",
        "2",
        "--plugin",
        "re",
        "os",
    ]
    flags.find_plugins(words)
    parser = flags.Parser()
    flags.add_option(parser, RunConfig.fields()["plugin"], "modules")
    found = parser.parse([word for word in words if word not in ("--rounds", "2")])
    assert seen == [found.plugin] == [["json", "csv", "re", "os"]]
