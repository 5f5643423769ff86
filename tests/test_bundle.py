"""Runs whose server asks and whose devices answer, one message a round; no engine."""

import threading
import time
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from client_devices import LONGEST_S, small_run

import hsee_jax as hs
from hsee_jax.core.errors import UserError
from hsee_jax.data.npz import write_shard
from hsee_jax.deployment import Patience
from hsee_jax.deployment.bundle import (
    Courier,
    calls_of,
    check_detached,
    parts_of,
    take_turn,
)
from hsee_jax.deployment.fleet import TURN, WHO, Fleet, Reply
from hsee_jax.deployment.reception import serve
from hsee_jax.deployment.roster import Place, Roster
from hsee_jax.deployment.settings import NodeSettings, ServerSettings, read_settings
from hsee_jax.nn import NETWORKS
from hsee_jax.runs.flat import config_from_flat
from hsee_jax.runs.material import shares

ROOT = Path(__file__).parents[1]
CONFIG = small_run(rounds=2)


class Devices:
    """Answers as an engine with processes does: each message starts from the files.

    Attributes:
      asked: (client, names of the answers) of each message.
      told: the calls that were returned for each message.
    """

    def __init__(self, folder, config=CONFIG):
        self.folder, self.asked, self.told = folder, [], []
        for i, share in enumerate(shares(config)):
            write_shard(self._data(i), share)

    def __call__(self, i, answers, alive):
        self.asked.append((i, sorted(answers)))
        calls = take_turn(answers, self.folder / f"device-{i}", self._data(i))
        self.told.append((i, calls))
        return calls

    def _data(self, i):
        return self.folder / f"data-{i}.npz"


def serve_by(ask, folder, config=CONFIG, **options):
    courier, end = Courier(ask), time.monotonic() + LONGEST_S

    def stop():
        courier.check()
        return time.monotonic() > end

    options = dict(stop=stop, check=check_detached) | options
    return serve(config, folder, courier.doors, **options)


def assert_same(one, other):
    states = (hs.restore(folder).state for folder in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "run"
    hs.train(CONFIG, folder)
    return folder


def test_one_message_a_round_equals_the_simulation(tmp_path, simulated):
    devices = Devices(tmp_path)
    serve_by(devices, tmp_path / "run")
    assert_same(tmp_path / "run", simulated)
    for i in range(2):
        messages = [names for client, names in devices.asked if client == i]
        assert messages == [
            ["begin", "join", "next"],
            ["join", "next"],
            ["join", "next"],  # the run has ended
        ]


class Trouble(Devices):
    """Loses the first reply of each client to each message, and one device's folder."""

    def __call__(self, i, answers, alive):
        before = len([1 for client, _ in self.told if client == i])
        if i == 0 and before == 0:
            answers = {n: d for n, d in answers.items() if n != "begin"}
        calls = super().__call__(i, answers, alive)
        return None if before % 2 else calls


def test_a_lost_reply_is_given_again_and_a_server_goes_on(tmp_path, simulated):
    """The same bytes, so nothing is trained twice; a killed server resumes."""
    devices, run = Trouble(tmp_path), tmp_path / "run"

    class Killed(BaseException):
        pass

    class Dies(hs.runs.Callback):
        def on_round(self, record, moment):
            self.due = True

    dies = Dies()
    dies.due = False

    def stop():
        if dies.due:
            raise Killed
        return False

    with pytest.raises(Killed):
        serve_by(devices, run, callbacks=[dies], stop=stop)
    serve_by(devices, run, resume=True)
    assert_same(run, simulated)
    assert [method for method, _ in devices.told[0][1]] in (
        ["join", "begin"],
        ["join", *["push"] * 3, "finish"],
    )
    for i in range(2):
        finishes = [
            calls[-1][1]
            for client, calls in devices.told
            if client == i and calls[-1][0] == "finish"
        ]
        assert len(finishes) > len(set(finishes)) == CONFIG.run.rounds


def test_what_a_device_returns_is_refused_and_counted(tmp_path, caplog):
    """A client with too many refusals is left out, and the run goes on."""
    config = small_run(rounds=1)
    devices = Devices(tmp_path, config)
    bad = [
        ("next", b""),
        ("mailbox", b""),
        ("join", b"{}\n"),
        ("push", b""),
        ("finish", b"\x80"),
    ]
    hostile = iter([[call] for call in bad])

    def ask(i, answers, alive):
        return next(hostile) if i == 1 else devices(i, answers, alive)

    patience = Patience(max_refusals=len(bad) - 1)
    serve_by(ask, tmp_path / "run", config, patience=patience)
    assert "client 1 is left out" in caplog.text
    assert caplog.text.count("client 1: refused") == len(bad)


def test_an_error_of_the_engine_ends_the_run(tmp_path):
    def ask(i, answers, alive):
        raise ConnectionError("the engine is gone")

    with pytest.raises(ConnectionError, match="is gone"):
        serve_by(ask, tmp_path / "run")


def test_a_joint_boundary_is_refused_before_anything_is_written(tmp_path):
    config = hs.override(CONFIG, boundary="joint")
    with pytest.raises(
        UserError, match="^boundary: joint is not allowed .* `hsee serve"
    ):
        serve_by(None, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_calls_keep_their_order_as_parts():
    calls = [
        ("join", b"a"),
        *[("push", bytes([n])) for n in range(12)],
        ("finish", b""),
    ]
    parts = parts_of(calls)
    assert calls_of(dict(sorted(parts.items(), key=lambda part: hash(part)))) == calls


def test_nodes_are_bound_once():
    roster = Roster(2)
    assert roster.update({7: "a", 8: "b"}) == [7, 8] and roster.update({7: "a"}) == []
    roster.bind(7, 1)
    assert roster.place(1) == Place(7, "a") and roster.place(0) is None
    roster.bind(7, 0)  # what it says later changes nothing
    assert roster.place(0) is None
    assert roster.update({7: "c", 9: "d", 8: "b"}) == [9, 8]
    roster.bind(9, 1)
    assert roster.place(1) == Place(7, "c")
    assert roster.update({9: "d"}) == []
    assert roster.place(1) == Place(9, "d")


def test_who_does_not_reply_is_asked_again_and_who_is_nobody_is_not(caplog):
    roster = Roster(2)
    roster.update({7: "a", 8: "b"})
    roster.bind(7, None)
    for nobody in (2, -1, True, "0"):
        roster.bind(8, nobody)
    assert roster.update({7: "a", 8: "b"}) == [7]
    assert roster.place(0) is roster.place(1) is None
    assert caplog.text.count("node 8 has no client; allowed is a partition-id") == 4


def test_a_list_of_nodes_leaves_no_question():
    roster = Roster(2, [5, 6])
    assert roster.update({5: "a", 9: "b"}) == []
    roster.bind(9, 1)
    assert roster.place(0) == Place(5, "a") and roster.place(1) is None
    for nodes in ([5], [5, 5], [5, 6, 7]):
        with pytest.raises(UserError, match="nodes: .* allowed are 2 different nodes"):
            Roster(2, nodes)


class Nodes:
    """An engine with one node, which may restart and fail."""

    def __init__(self):
        self.since, self.sent, self.replies = "a", [], []

    def nodes(self):
        return {7: self.since}

    def push(self, node, kind, parts):
        self.sent.append((node, kind, parts))
        message = str(len(self.sent))
        if kind == WHO:
            self.replies.append(Reply(message, {"client": b"0"}))
        elif b"again" not in parts.values():
            self.replies.append(Reply(message, {"00000000 finish": b"x"}))
        return message

    def pull(self, messages):
        found = [reply for reply in self.replies if reply.message in messages]
        self.replies = [reply for reply in self.replies if reply not in found]
        return found


@pytest.fixture
def quick(monkeypatch):
    for name in ("_LOOK_S", "_NODES_S", "_TICK_S", "_PAUSE_S"):
        monkeypatch.setattr(f"hsee_jax.deployment.fleet.{name}", 0.01)


def test_a_client_is_asked_where_its_node_is(quick, caplog):
    nodes = Nodes()
    fleet = Fleet(nodes, Roster(1))
    assert fleet(0, {"next": b"1"}, lambda: True) == [("finish", b"x")]
    assert nodes.sent == [(7, WHO, {}), (7, TURN, {"next": b"1"})]

    def restart():
        while len(nodes.sent) < 3:  # until it is asked
            time.sleep(0.01)
        nodes.since = "b"

    thread = threading.Thread(target=restart)
    thread.start()
    assert fleet(0, {"next": b"again"}, lambda: True) is None
    thread.join()
    assert "client 0: node 7 went away" in caplog.text
    nodes.replies = [Reply("4", {}, "out of memory")]
    assert fleet(0, {"next": b"again"}, lambda: True) is None
    assert "client 0: out of memory; it is asked again" in caplog.text
    assert fleet(0, {"next": b"again"}, lambda: len(nodes.sent) < 5) is None


def test_flat_values_describe_a_configuration():
    flat = dict(preset="demo", network="mlp", cuts="1 2", num_clients=3, link="int8")
    changes = flat | {"cuts": ("1", "2")}
    del changes["preset"]
    assert config_from_flat(flat) == hs.override(hs.preset("demo"), **changes)
    assert config_from_flat({}) == hs.preset("demo")


@pytest.mark.parametrize(
    ("flat", "error"),
    [
        ({"round": 3}, "option: round is unknown .did you mean rounds"),
        ({"rounds": "3"}, 'rounds: "3" is not allowed; allowed is an int'),
        ({"preset": "dmeo"}, "preset: dmeo is unknown .did you mean demo"),
        ({"absences": 3.5}, "absences"),
    ],
)
def test_errors_in_flat_values_name_the_option(flat, error):
    with pytest.raises(UserError, match=error):
        config_from_flat(flat)


def test_each_reader_of_an_option_has_its_own_rules(monkeypatch, tmp_path):
    """In flat values and in a study: 0 layers are too few for the MLP alone."""
    monkeypatch.setattr(NETWORKS, "_entries", dict(NETWORKS.items()))

    @NETWORKS.register
    def own_depth(*, num_classes, input_shape, depth: int = 2):
        """Count from 0."""

    flat = {"network": "own_depth", "depth": 0}
    assert config_from_flat(flat).model.options["depth"] == 0
    with pytest.raises(UserError, match=r"depth: 0 .* allowed is 1\.\.1000"):
        config_from_flat(flat | {"network": "mlp"})
    text = 'preset = "demo"\n[grid]\nnetwork = ["{}"]\ndepth = [0, 3]\n'
    path = tmp_path / "study.toml"
    path.write_text(text.format("own_depth"))
    depths = [row.config.model.options["depth"] for row in hs.studies.load(path).rows]
    assert depths == [0, 3]
    path.write_text(text.format("mlp"))
    with pytest.raises(UserError, match="grid.*depth: 0 is not allowed; allowed is 1"):
        hs.studies.load(path)


def test_settings_are_typed():
    given = {
        "out": "x",
        "samples": "3 4",
        "deadline": 5,
        "nodes": "18446744073709551615",
    }
    settings = read_settings(ServerSettings, given)
    assert settings == ServerSettings(
        "x", nodes=(2**64 - 1,), samples=(3, 4), deadline=5
    )
    node = read_settings(
        NodeSettings,
        {"partition-id": 2, "state": "s", "plugin": "a b", "data-dir": "d"},
    )
    assert node == NodeSettings("s", 2, data_dir="d", plugin=("a", "b"))
    for given, error in (
        ({"samples": "3 x"}, "samples: 3 x is not allowed; allowed is words"),
        ({"outt": "x"}, "setting: outt is unknown .did you mean out"),
        ({"deadline": 0}, "deadline: 0.* is not allowed; allowed is more than 0"),
    ):
        with pytest.raises(UserError, match=error):
            read_settings(ServerSettings, given)


def test_the_app_of_the_examples_is_that_of_the_page_and_is_valid():
    text = (ROOT / "examples" / "flower" / "pyproject.toml").read_text()
    page = (ROOT / "docs" / "how-to" / "flower.md").read_text()
    app = tomllib.loads(text)
    shown = page.partition("```toml\n")[2].partition("```")[0]
    assert tomllib.loads(shown) == app
    settings = app["tool"]["flwr"]["app"]["config"]
    config = config_from_flat(settings.pop("hsee"))
    assert config.clients.num_clients == 3 and config.clients.link == "int8"
    assert read_settings(ServerSettings, settings).out == "runs/flower"
