"""The proxy of the tests, between a client and a server that repeats what it hears."""

import contextlib
import socket
import socketserver
import threading
import time

import pytest
from proxy import Proxy


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(2 * data)  # so that the ways differ in length


@pytest.fixture
def server():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(server):
    with Proxy(server) as proxy:
        yield proxy


def connect(proxy):
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def receive(connection, count):
    data = b""
    while len(data) < count:
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError("ended")
        data += chunk
    return data


def ask(connection, data=b"hello"):
    """Send bytes, and return as many as the server has for an answer."""

    def send():
        with contextlib.suppress(OSError):  # of a connection that is cut
            connection.sendall(data)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return receive(connection, 2 * len(data))
    finally:
        sender.join()


def assert_works(proxy):
    with connect(proxy) as connection:
        assert ask(connection) == 2 * b"hello"


@pytest.mark.parametrize("count", [5, 300_000])
def test_it_counts_each_byte_that_it_passes_on(proxy, count):
    data = bytes(range(256)) * (count // 256) + b"x" * (count % 256)
    with connect(proxy) as one, connect(proxy) as other:
        found = ask(one, data)
        assert (len(found), set(found)) == (2 * count, set(data))
        assert ask(other) == 2 * b"hello"
    wait_until(lambda: (proxy.up, proxy.down) == (count + 5, 2 * count + 10))
    assert (proxy.accepted, proxy.refused) == (2, 0)


def wait_until(holds, seconds=10):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_an_end_is_passed_on(proxy):
    """The server hears it, and the client gets the answers that are on their way."""
    with connect(proxy) as connection:
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 8) == b"lastlast"
        assert connection.recv(1) == b""


def test_a_delay_is_for_both_ways(proxy):
    with connect(proxy) as connection:
        proxy.delay = 0.1
        start = time.monotonic()
        ask(connection)
        assert time.monotonic() - start >= 0.2


def test_a_cut_ends_what_is_there_and_nothing_else(proxy):
    with connect(proxy) as connection:
        ask(connection)
        proxy.cut()
        with pytest.raises(OSError):
            ask(connection)
    assert_works(proxy)


def test_refusals_last_until_they_are_lifted(proxy):
    with connect(proxy) as connection:
        ask(connection)
        proxy.refuse()
        with pytest.raises(OSError):
            ask(connection)
    for _ in range(2):
        with pytest.raises(OSError), connect(proxy) as connection:
            ask(connection)
    wait_until(lambda: proxy.refused == 2)
    proxy.allow()
    assert_works(proxy)
    assert proxy.accepted == 2


def test_a_dead_link_says_nothing(proxy):
    with connect(proxy) as connection:
        ask(connection)
        wait_until(lambda: (proxy.up, proxy.down) == (5, 10))
        proxy.drop()
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            ask(connection)
        assert (proxy.up, proxy.down) == (5, 10)
        proxy.allow()  # what has lost bytes does not go on
        connection.settimeout(10)
        with pytest.raises(OSError):
            ask(connection)
    assert_works(proxy)


def test_it_changes_bytes_and_counts_what_it_changed(proxy):
    with connect(proxy) as connection:
        ask(connection)
        assert proxy.disturbed == 0
        proxy.change = lambda chunk: [chunk.upper()]
        assert ask(connection) == 2 * b"HELLO"
        assert proxy.disturbed == 1  # the answer is in capitals already


def test_it_forgets_the_connections_that_are_there(proxy):
    with connect(proxy) as connection:
        ask(connection)
        proxy.forget()
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            ask(connection)
        assert proxy.disturbed == 1
        assert_works(proxy)


def test_without_a_server_it_refuses(server):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Proxy(port) as proxy:
        with pytest.raises(OSError), connect(proxy) as connection:
            ask(connection)
        wait_until(lambda: proxy.refused == 1)


def test_after_its_end_no_thread_is_left(server):
    before = threading.active_count()
    with Proxy(server) as proxy, connect(proxy) as connection:
        ask(connection)
        proxy.close()
        with pytest.raises(OSError):
            connect(proxy)
    wait_until(lambda: threading.active_count() <= before + 1)  # of the server
