"""Files that users write with whatever program they have: absences, configurations."""

import json

import pytest

from hsee_jax import cli
from hsee_jax.cli.flags import config_from
from hsee_jax.cli.plan_file import AUTO, config_with_plan
from hsee_jax.config import Config
from hsee_jax.config.presets import preset
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.runs.build import build_model
from hsee_jax.runs.folder import load_config

BOM = b"\xef\xbb\xbf"
PLAIN = b"client,from,to\n0,1,2\n3,5,5\n"


def absences(path, content, **given):
    path.write_bytes(content)
    return config_from({"absences_file": path, **given}).clients.absences


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        BOM + PLAIN,
        PLAIN.replace(b",", b";"),
        BOM + PLAIN.replace(b",", b";").replace(b"\n", b"\r\n"),
        PLAIN.replace(b",", b"\t"),
        PLAIN.replace(b",", b" , "),
        PLAIN.replace(b"client", b"  client").replace(b"\n", b"  \n"),
        b"\n" + PLAIN.replace(b"\n", b"\n\n , ,\n") + b"  \n",
        b'"client","from","to"\n"0","1","2"\n"3","5","5"\n',
        b"note;to;client;from\na,b;2;0;1\n;5;3;5\n",
        PLAIN.strip(),
        b"client,from,to\n000,01,2\n3,5,5,\n",
    ],
)
def test_absences_are_read_however_they_are_written(content, tmp_path):
    path = tmp_path / "absences.csv"
    assert absences(path, content) == ("0:1-2", "3:5-5")


@pytest.mark.parametrize("content", [b"client,from,to\n", BOM + b"client;from;to"])
def test_nobody_is_absent(content, tmp_path):
    assert absences(tmp_path / "absences.csv", content) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"client,from,to\n0,1,2\n1,x,2\n", "line 3: from 'x' is not allowed"),
        (b"client,from,to\n\n\n0,1,2.5\n", "line 4: to '2.5' is not allowed"),
        (b"client;from;to\n-1;1;2\n", "line 2: client '-1' is not allowed"),
        (b"client,from,to\n0,1\n", "line 2: to '' is not allowed"),
        (b"client,from,to\n0,1," + b"9" * 5000, "line 2: to '9999"),
        (b"client,from,to\n0,0,2\n", "line 2: from 0 to 2 is not allowed"),
        (b"client,from,to\n0,1,2\n0,3,2\n", "line 3: from 3 to 2 is not allowed"),
        (b"client,from,to\n5,1,1\n6,1,1\n", "line 3: client 6 is not allowed"),
        (
            b"client,from,until\n0,1,2\n",
            "lacks the column to; it has client, from, until;",
        ),
        (b"client|from|to\n0|1|2\n", "lacks the column client; it has client|from|to;"),
        (
            b"client,from,to,to\n0,1,2,3\n",
            "repeats the column to; it has client, from, to, to;",
        ),
        (b"", "lacks the column client; it has none;"),
        (b"client,from,to\n\xff\n", "cannot be read: 'utf-8' codec"),
        ("client,from,to\n0,1,2\n".encode("utf-16"), "cannot be read: 'utf-8' codec"),
        (b"client,from,to\n0,1," + b"9" * 200_000, "cannot be read: field larger"),
    ],
)
def test_bad_absences_are_named_with_their_line(content, message, tmp_path):
    path = tmp_path / "absences.csv"
    with pytest.raises(UserError) as error:
        absences(path, content, num_clients=6)
    assert message in str(error.value)
    assert str(error.value).startswith(f"absences_file: {path}")
    assert "; allowed " in str(error.value)
    assert "\n" not in str(error.value)


def test_clients_are_counted_where_they_are_set(tmp_path):
    """By a flag, or by the preset."""
    path = tmp_path / "absences.csv"
    content = b"client,from,to\n11,1,1\n"
    assert absences(path, content, preset="cifar10") == ("11:1-1",)
    with pytest.raises(UserError, match=r"client 11 .* allowed are 0\.\.5"):
        absences(path, content, preset="demo")
    assert absences(path, content, preset="demo", num_clients=12) == ("11:1-1",)


def test_clients_are_counted_after_a_plan(tmp_path):
    """A plan for more clients than the preset has, which may be absent as well."""
    (tmp_path / "absences.csv").write_text("client,from,to\n8,1,2\n")
    given = {"absences_file": tmp_path / "absences.csv"}
    given |= {"network": "mlp", "depth": 2, "rounds": 2}
    entry = 'name = "one"\ncount = 9\nforward_flops_per_s = 1e9\nlink = "ethernet"'
    devices, plan = tmp_path / "fleet.toml", tmp_path / "plan.json"
    devices.write_text(f"[[devices]]\n{entry}\n")
    clients = [{"cut": 1}] * 9
    plan.write_text(json.dumps({"layers": ["dense1", "dense2"], "clients": clients}))
    for own in ({"plan": plan}, {"cuts": AUTO, "devices": devices}):
        config = config_with_plan(given | own, stored=None)
        assert config.clients.num_clients == 9
        assert config.clients.absences == ("8:1-2",)


def test_a_plan_asks_for_no_device(tmp_path, monkeypatch):
    """Several processes meet only after it was read."""
    plan = tmp_path / "plan.json"
    layers = preset_layers()
    plan.write_text(json.dumps({"layers": layers, "clients": [{"cut": 3}] * 2}))

    def no_backend(mesh):
        raise AssertionError("it asked for a backend")

    monkeypatch.setattr("hsee_jax.runs.forms.backend_of", no_backend)
    assert config_with_plan({"plan": plan}, stored=None).clients.cuts == ("3",) * 2


def preset_layers():
    return list(build_model(Config()).layer_names)


def test_an_absences_file_that_is_not_there(tmp_path, capsys):
    path = tmp_path / "none.csv"
    assert cli.main(["train", "--absences-file", str(path), "--out", "run"]) == 2
    _, err = capsys.readouterr()
    assert f"absences_file: {path} cannot be read: No such file" in err
    assert err.count("\n") == 1


def test_a_configuration_with_a_byte_order_mark(tmp_path):
    config = override(preset("demo"), width=5, cuts=("1", "layer2"))
    path = tmp_path / "config.json"
    for mark in (b"", BOM):
        path.write_bytes(mark + to_json(config).encode())
        assert load_config(path) == config
        assert config_from({"config": path}) == config
    path.write_bytes(b"\xff{}")
    with pytest.raises(UserError, match="is not JSON"):
        load_config(path)
