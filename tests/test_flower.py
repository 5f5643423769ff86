"""A run over Flower, on loopback; skipped where flwr is not installed."""

import signal
from pathlib import Path
from types import SimpleNamespace

import client_devices
import jax
import numpy as np
import pytest

import hsee_jax as hs
from hsee_jax.cli import main
from hsee_jax.deployment.fleet import TURN
from hsee_jax.runs.flat import config_from_flat
from hsee_jax.runs.history import read_records
from hsee_jax.runs.material import shares

pytest.importorskip("flwr")

from flower_processes import Federation, toml  # noqa: E402

APP = Path(__file__).parents[1] / "examples" / "flower" / "pyproject.toml"
LIMIT_S = 1200
SMALL = client_devices.SMALL | dict(
    preset="demo",
    num_clients=3,
    depth=3,
    cuts="1 2",
    max_train_samples=36,
    rounds=2,
    eval_every=2,
    checkpoint_every=2,
)


def make_app(folder, options, **settings):
    """Write the app of the examples with other options."""
    folder.mkdir()
    head = APP.read_text().partition("[tool.flwr.app.config]")[0]
    lines = [head, "[tool.flwr.app.config]"]
    lines += [f"{name} = {toml(value)}" for name, value in settings.items()]
    lines += ["[tool.flwr.app.config.hsee]"]
    lines += [f"{name} = {toml(value)}" for name, value in options.items()]
    (folder / "pyproject.toml").write_text("\n".join(lines))
    return folder


def same(one, other):
    jax.tree.map(
        np.testing.assert_array_equal, hs.restore(one).state, hs.restore(other).state
    )
    plain = [
        [r._replace(seconds=0, wall_seconds=0) for r in read_records(folder)]
        for folder in (one, other)
    ]
    assert plain[0] == plain[1]


@pytest.mark.slow
def test_three_nodes_on_loopback_equal_the_simulation(tmp_path, capsys):
    config, out = config_from_flat(SMALL), tmp_path / "run"
    app = make_app(tmp_path / "app", SMALL, out=str(out))
    with Federation.start(tmp_path) as federation:
        for i, share in enumerate(shares(config)):
            federation.start_node(i, share)
        said = federation.run(app, LIMIT_S)
        assert "round 2/2" in said, said
    assert not federation.processes()
    hs.train(config, tmp_path / "simulated")
    same(out, tmp_path / "simulated")
    for command in ("eval", "report", "gate"):
        assert main([command, str(out)]) == 0


@pytest.mark.slow
def test_what_is_killed_changes_nothing(tmp_path):
    """Each ClientApp, a SuperNode and the ServerApp, each in the middle of a round.

    A ClientApp dies while it trains. One that dies while it hands over its answer
    leaves its SuperNode waiting until somebody starts the node again (Flower 1.42).
    """
    settings = SMALL | dict(rounds=3, eval_every=3, checkpoint_every=3)
    config, out = config_from_flat(settings), tmp_path / "run"
    options = settings | dict(plugin="dies_once")
    app = make_app(tmp_path / "app", options, out=str(out), resume=False)
    data = shares(config)
    with Federation.start(tmp_path) as federation:

        def start(i):
            return federation.start_node(i, data[i], plugin="dies_once")

        nodes = [start(i) for i in range(len(data))]
        first = federation.begin(app)
        federation.wait_for(lambda: (out / "deployment" / "rounds" / "1").exists())
        assert len(list(tmp_path.glob("device-*-died"))) == len(data)
        nodes[1].kill()
        start(1)
        federation.kill(signal.SIGKILL, "flwr-serverapp")
        first.wait(LIMIT_S)
        said = federation.run(app, LIMIT_S, resume=True)
        assert "round 3/3" in said, said
    hs.train(config, tmp_path / "simulated")
    same(out, tmp_path / "simulated")


@pytest.mark.slow
def test_a_superlink_that_is_killed_goes_on(tmp_path):
    """Started again with its database, in the middle of a round; nobody does more."""
    settings = SMALL | dict(rounds=3, eval_every=3, checkpoint_every=3)
    config, out = config_from_flat(settings), tmp_path / "run"
    app = make_app(tmp_path / "app", settings, out=str(out), resume=False)
    with Federation.start(tmp_path) as federation:
        for i, share in enumerate(shares(config)):
            federation.start_node(i, share)
        federation.begin(app)
        federation.wait_for(lambda: (out / "deployment" / "rounds" / "1").exists())
        federation.kill(signal.SIGKILL, "flower-superlink")
        federation.start_link()
        federation.wait_for(lambda: (out / "summary.json").exists())
        federation.wait_for(lambda: not federation.processes("flwr-serverapp"))
    hs.train(config, tmp_path / "simulated")
    same(out, tmp_path / "simulated")


def test_a_message_that_is_lost_is_sent_again(monkeypatch):
    """As when a SuperLink is killed while it takes the message, and starts again."""
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    from hsee_jax.deployment import flower

    class Grid:
        def __init__(self, losses):
            self.losses, self.contents = losses, []

        def push_messages(self, messages):
            self.contents += [message["content"] for message in messages]
            if len(self.contents) <= self.losses:
                raise ObjectPushError("an object", 1, "a session")
            return ["an id"]

    monkeypatch.setattr(flower, "Message", lambda content, *_: {"content": content})
    grid = Grid(4)
    assert flower._Nodes(grid).push(7, TURN, {"a": b"bytes"}) == "an id"
    assert [content["parts"]["a"].data for content in grid.contents] == [b"bytes"] * 5
    with pytest.raises(ObjectPushError):
        flower._Nodes(Grid(5)).push(7, TURN, {})


def test_messages_of_flower_carry_the_bytes():
    """No bytes and many bytes; what is no record of parts has none."""
    from flwr.app import ConfigRecord, RecordDict

    from hsee_jax.deployment.flower import _content, _parts, _reply

    def reply(content, error=None):
        return SimpleNamespace(
            content=content,
            error=SimpleNamespace(reason=error),
            has_error=lambda: error is not None,
            metadata=SimpleNamespace(reply_to_message_id="1"),
        )

    parts = {"00000001 push": bytes(range(256)) * 50_000, "next": b"{}\n", "empty": b""}
    assert _reply(reply(_content(parts))) == ("1", parts, "")
    for content in (RecordDict(), RecordDict({"parts": ConfigRecord({"a": 1})})):
        assert _parts(reply(content)) == {}
    assert _reply(reply(None, "no\nmemory")) == ("1", {}, "no memory")
