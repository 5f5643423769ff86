"""The calls of devices over gRPC: generic methods with bytes in and bytes out.

All calls go from device to server, so only the server needs an open port. A call that
fails because the network or the server is away is repeated with the same bytes, which
changes nothing that has arrived; after an error in the server, a few times at most.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.deployment.credentials import (
    channel_credentials,
    client_id,
    server_credentials,
)
from hsee_jax.deployment.device import Call
from hsee_jax.deployment.lines import MOST, BusyError, Lines
from hsee_jax.deployment.protocol import Refusal
from hsee_jax.deployment.service import Service

_SERVICE = "hsee_jax.Server"
_CLIENT = "client-id"  # metadata of a call without certificates
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_ROOM = 1 << 16  # bytes of a message beside its tensors
# Until a call without an answer is repeated, then twice as long each time, as a message
# may need longer on a slow link; above silence and answer.
_CALL_S = 60.0
_PAUSES_S = (0.1, 0.5, 2.0, 5.0)  # before each repetition; the last for all others
_FAULTS = 3  # errors in the server during a call, before a device gives up
_GRACE_S = 1.0  # for calls in progress when a server ends
_KEEPALIVE_S = 20.0  # of silence in a call, before one side asks if the other is there
_ANSWER_S = 10.0  # for the other side to say so, before the connection is given up
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,  # such as bytes on the way that TLS does not accept
)
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_port(service: Service, address: str, keys: Path | None) -> Iterator[int]:
    """Answer calls at an address, and yield its port.

    Args:
      service: answers the calls.
      address: ``host:port``; port 0 takes one that is free.
      keys: the server's folder of `hsee enroll`; None only for an address of this
        machine, where clients say themselves who they are.

    Raises:
      UserError: the address is not allowed or not free, or the keys are not valid.
    """
    check_address(address, "listen", keys)
    server = grpc.server(
        futures.ThreadPoolExecutor(MOST * service.clients + 8),
        handlers=[_handler(service, keys is not None)],
        options=[
            *_sizes(service.limit() + _ROOM),
            *_keepalive(),
            ("grpc.so_reuseport", 0),
            # Identity alone: gRPC inflates a message before it looks at the size.
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ],
    )
    try:
        if keys is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(keys))
    except RuntimeError as error:
        raise UserError(_not_free(address)) from error
    server.start()
    _log.info("listening at %s", address.rpartition(":")[0] + f":{port}")
    try:
        yield port
    finally:
        server.stop(_GRACE_S).wait()


@contextlib.contextmanager
def connect(
    address: str,
    keys: Path | None,
    client: int | None,
    *,
    patience_s: float,
    stop: Callable[[], bool],
) -> Iterator[Call]:
    """Yield a function that calls a server.

    Args:
      address: ``host:port``.
      keys: the client's folder of `hsee enroll`; None for a server on this machine.
      client: the id of the client, if there are no keys.
      patience_s: how long to call again when the server is away. A server that is
        there may wait for other clients before it answers, however long that takes.
      stop: true ends a call with `Stopped`.

    Raises:
      UserError: the address is not allowed, or the keys are not valid; the function
        raises it if the server refuses a message or does not answer.
    """
    check_address(address, "server", keys)
    reconnect = ("grpc.max_reconnect_backoff_ms", 2000)
    options = [*_sizes(-1), *_keepalive(), reconnect]
    if keys is None:
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, channel_credentials(keys), options)
    metadata = None if keys is not None else ((_CLIENT, str(client)),)
    with channel:
        yield _Caller(channel, address, metadata, patience_s, stop)


def check_address(address: str, field: str, keys: Path | None) -> None:
    """Refuse a text that is no address, and without keys one of another machine.

    Raises:
      UserError: the address is not allowed.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UserError(f"{field}: {address} is not allowed; allowed is HOST:PORT")
    if keys is None and host not in _LOOPBACK:
        raise UserError(
            f"{field}: {address} is not allowed without --keys, as nothing would be "
            f"encrypted; allowed are --keys, and the hosts {', '.join(_LOOPBACK)}"
        )


def check_port(address: str, keys: Path | None) -> None:
    """Refuse an address at which `open_port` could not listen now.

    Raises:
      UserError: see `open_port`.
    """
    check_address(address, "listen", keys)
    if keys is not None:
        server_credentials(keys)
    host, _, port = address.rpartition(":")
    refused: Exception | None = None
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            try:
                with socket.socket(family, kind, protocol) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind(place)
                return  # gRPC listens at any of the addresses of a name
            except OSError as error:
                refused = error
    except (OSError, UnicodeError) as error:  # no such name, or none that can be
        refused = error
    raise UserError(_not_free(address)) from refused


def _not_free(address: str) -> str:
    return f"listen: {address} is not free, or not an address"


class _Caller:
    """Calls a server, and calls again if the network or the server was away."""

    def __init__(
        self,
        channel: grpc.Channel,
        address: str,
        metadata: Any,
        patience_s: float,
        stop: Callable[[], bool],
    ) -> None:
        self._channel, self._address = channel, address
        self._metadata, self._patience_s, self._stop = metadata, patience_s, stop

    def __call__(self, method: str, message: bytes) -> bytes:
        begin, faults, pauses = time.monotonic(), 0, iter(_PAUSES_S)
        seconds = _CALL_S
        while True:
            try:
                return self._call(method, message, seconds)
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:  # the connection is alive
                _log.info("%s: no answer for %g s; calls again", method, seconds)
                begin, pauses = time.monotonic(), iter(_PAUSES_S)
                seconds *= 2
                continue
            if code not in _AWAY:
                faults += 1
                if code != grpc.StatusCode.INTERNAL or faults == _FAULTS:
                    raise UserError(f"server: {self._address} refuses: {details}")
            if time.monotonic() - begin > self._patience_s:
                raise UserError(
                    f"server: {self._address} does not answer ({details}); the same "
                    "command goes on when it does"
                )
            _log.info("%s does not answer; calls again", self._address)
            self._sleep(next(pauses, _PAUSES_S[-1]))

    def _call(self, method: str, message: bytes, seconds: float) -> bytes:
        """Call once; a stop ends it, and the wait for the answer."""
        if self._stop():  # where answers come at once, only here in a round
            raise Stopped(0, 0)
        function = self._channel.unary_unary(f"/{_SERVICE}/{method}")
        future = function.future(message, timeout=seconds, metadata=self._metadata)
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        while not done.wait(0.2):
            if self._stop():
                future.cancel()
                raise Stopped(0, 0)
        return future.result()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._stop():
                raise Stopped(0, 0)
            time.sleep(0.05)


def _handler(service: Service, secure: bool) -> grpc.GenericRpcHandler:
    lines = Lines()

    def method(name: str) -> grpc.RpcMethodHandler:
        def answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            try:
                i = _caller(context, secure)
                with lines.line(i):  # before its one message is here, or never comes
                    message = next(messages, None)
                    if message is not None:
                        return service.call(name, i, message, context.is_active)
                code, details = grpc.StatusCode.CANCELLED, "no message"
            except grpc.RpcError:  # the call has ended before
                code, details = grpc.StatusCode.CANCELLED, "no message"
            except BusyError:  # the client calls again
                code, details = grpc.StatusCode.UNAVAILABLE, "too many open calls"
            except PermissionError as error:
                code, details = grpc.StatusCode.PERMISSION_DENIED, str(error)
            except Refusal as refusal:
                code, details = grpc.StatusCode.INVALID_ARGUMENT, str(refusal)
            except Exception as error:
                _log.exception("%s of a device has failed", name)
                code, details = grpc.StatusCode.INTERNAL, f"it has failed: {error!r}"
            context.abort(code, details)
            raise AssertionError("abort raises")

        return grpc.stream_unary_rpc_method_handler(answer)

    return grpc.method_handlers_generic_handler(
        _SERVICE, {name: method(name) for name in service.methods}
    )


def _caller(context: grpc.ServicerContext, secure: bool) -> int:
    """Return the id of the client that calls.

    Raises:
      PermissionError: the call names no client.
    """
    if secure:
        return client_id(context.auth_context())
    found = str(dict(context.invocation_metadata()).get(_CLIENT))
    if not found.isdecimal() or len(found) > 9:
        raise PermissionError("the call names no client")
    return int(found)


def _sizes(limit: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", -1),
    ]


def _keepalive() -> list[tuple[str, int]]:
    """Return the options that find out about a connection that died in silence.

    Without them a call over it waits until TCP gives up, which takes a quarter of an
    hour, and so do its repetitions, which use the same connection.
    """
    silence_ms = int(1000 * _KEEPALIVE_S)
    return [
        ("grpc.keepalive_time_ms", silence_ms),
        ("grpc.keepalive_timeout_ms", int(1000 * _ANSWER_S)),
        ("grpc.http2.ping_timeout_ms", int(1000 * _ANSWER_S)),
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
        ("grpc.http2.min_ping_interval_without_data_ms", silence_ms // 2),
    ]
