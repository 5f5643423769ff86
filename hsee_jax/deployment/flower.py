"""A run over Flower: a ServerApp and a ClientApp, one message a device and round.

Flower carries the bytes and knows the nodes; the rest is that of any engine. A Flower
app names `server_app` and `client_app` in its ``pyproject.toml``.
"""

import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hsee_jax.core.errors import UserError
from hsee_jax.core.paths import expand_home
from hsee_jax.deployment.bundle import (
    Courier,
    Parts,
    check_detached,
    parts_of,
    take_turn,
)
from hsee_jax.deployment.fleet import TURN, WHO, Engine, Fleet, Reply
from hsee_jax.deployment.reception import serve
from hsee_jax.deployment.roster import Roster
from hsee_jax.deployment.settings import NodeSettings, ServerSettings, read_settings
from hsee_jax.deployment.types import Patience
from hsee_jax.runs.callbacks import Callback, Moment
from hsee_jax.runs.flat import config_from_flat
from hsee_jax.runs.records import RoundRecord, Summary

try:
    from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
except ImportError as error:
    raise ImportError(
        "hsee_jax.deployment.flower: needs a package; `pip install 'hsee-jax[flower]'`"
    ) from error

_OPTIONS = "hsee."  # begins the name of an option of the run
_RECORD = "parts"
_REPEATS = 4  # of a message that a SuperLink loses when it is killed
_TYPES = {TURN: "train", WHO: "query"}  # of Flower's messages
_log = logging.getLogger("hsee_jax.flower")

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def run_server(grid: Grid, context: Context) -> None:
    """Serve the run that the run config describes to the nodes of a federation.

    Raises:
      UserError, DivergenceError: see `hsee_jax.deployment.serve`.
    """
    _show_log()
    serve_nodes(_Nodes(grid), context.run_config)


@client_app.train()
def answer_turn(message: Message, context: Context) -> Message:
    """Train a round, or send again what was sent after it.

    Raises:
      UserError: see `hsee_jax.deployment.take_part`.
    """
    settings = read_settings(NodeSettings, context.node_config)
    if not settings.state:
        raise UserError("state: missing in the node config; allowed is a folder")
    data = None if settings.data is None else expand_home(settings.data, "data")
    state = expand_home(settings.state, "state")
    calls = take_turn(
        _parts(message), state, data, settings.plugin, data_dir=settings.data_dir
    )
    return Message(_content(parts_of(calls)), reply_to=message)


@client_app.query()
def answer_who(message: Message, context: Context) -> Message:
    """Say which client the operator has assigned to the node."""
    client = read_settings(NodeSettings, context.node_config).partition_id
    said = b"" if client is None else str(client).encode()
    return Message(_content({"client": said}), reply_to=message)


def serve_nodes(engine: Engine, values: Mapping[str, Any]) -> Summary:
    """Serve a run to nodes until it ends, and write its folder.

    Args:
      engine: carries the messages.
      values: flat settings of the server (see `ServerSettings`), and with ``hsee.``
        before their names the options of the run.

    Raises:
      UserError, DivergenceError: see `hsee_jax.deployment.serve`.
    """
    named = {n: v for n, v in values.items() if not n.startswith(_OPTIONS)}
    settings = read_settings(ServerSettings, named)
    config = config_from_flat(
        {
            name.removeprefix(_OPTIONS): value
            for name, value in values.items()
            if name.startswith(_OPTIONS)
        }
    )
    roster = Roster(config.clients.num_clients, settings.nodes)
    courier = Courier(Fleet(engine, roster))

    def stop() -> bool:
        courier.check()
        return False

    return serve(
        config,
        expand_home(settings.out, "out"),
        courier.doors,
        patience=Patience(
            settings.deadline, settings.min_clients, settings.max_refusals
        ),
        bound=settings.feature_bound,
        samples=settings.samples,
        resume=settings.resume,
        overwrite=settings.overwrite,
        callbacks=[_Rounds(config.run.rounds)],
        stop=stop,
        check=check_detached,
    )


class _Nodes:
    """The nodes of a Flower federation; see `Engine`."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> Mapping[int, str]:
        return {n.node_id: n.last_activated_at for n in self._grid.get_nodes()}

    def push(self, node: int, kind: str, parts: Parts) -> str:
        for _ in range(_REPEATS):
            try:
                return self._push(node, kind, parts)
            except ObjectPushError:
                _log.warning("node %d: a message was lost; it is sent again", node)
        return self._push(node, kind, parts)

    def pull(self, messages: Collection[str]) -> Sequence[Reply]:
        if not messages:
            return []
        return [_reply(found) for found in self._grid.pull_messages(messages)]

    def _push(self, node: int, kind: str, parts: Parts) -> str:
        message = Message(_content(parts), node, _TYPES[kind])
        return list(self._grid.push_messages([message]))[0]


class _Rounds(Callback):
    """Logs that a round has ended."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def on_round(self, record: RoundRecord, moment: Moment) -> None:
        del moment
        _log.info("round %d/%d: %.1f s", record.round, self._rounds, record.seconds)


def _content(parts: Parts) -> RecordDict:
    arrays = {n: Array("uint8", (len(d),), "bytes", d) for n, d in parts.items()}
    return RecordDict({_RECORD: ArrayRecord(arrays)})


def _parts(message: Message) -> Parts:
    record = message.content.get(_RECORD)
    if not isinstance(record, ArrayRecord):
        return {}
    return {name: array.data for name, array in record.items()}


def _reply(message: Message) -> Reply:
    asked = message.metadata.reply_to_message_id
    if message.has_error():
        reason = str(message.error.reason).replace("\n", " ")[:500]
        return Reply(asked, {}, reason)
    return Reply(asked, _parts(message))


def _show_log() -> None:
    """Print the log of the package, which Flower passes on."""
    log = logging.getLogger("hsee_jax")
    log.handlers, log.propagate = [logging.StreamHandler(sys.stdout)], False
    log.setLevel(logging.INFO)
