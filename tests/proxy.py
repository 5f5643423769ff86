"""A TCP proxy that counts bytes, and delays, cuts, drops, changes or refuses them.

It stands between clients and a server on this machine, and knows no protocol::

    with Proxy(server_port) as proxy:
        talk_to(proxy.port)
        print(proxy.up, proxy.down)
"""

import contextlib
import socket
import threading
import time

_CHUNK = 65536
_HOST = "127.0.0.1"
_RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER, on, for 0 seconds: close sends a reset


class Proxy:
    """Forwards connections to a port, with two threads for each.

    Attributes:
      port: where it listens.
      up: bytes that it has passed on to the server.
      down: bytes that it has passed on to clients.
      accepted: connections that it has forwarded.
      refused: connections that it has cut at once.
      disturbed: chunks that it has changed or thrown away, and connections that it has
        cut in the middle.
      delay: seconds that each chunk of at most 64 KiB waits on its way.
      change: what to pass on instead of a chunk: (chunk) -> some chunks.
    """

    def __init__(self, target: int, *, delay: float = 0.0):
        """Listen on a free port, and forward to another."""
        self.up = self.down = self.accepted = self.refused = self.disturbed = 0
        self.delay, self.change = delay, lambda chunk: [chunk]
        self._target = target
        self._mode = "pass"  # or "drop", "refuse"
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()  # of all connections
        self._forgotten: set[socket.socket] = set()  # of some of them
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((_HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def __enter__(self):
        """Return the proxy, which listens already."""
        return self

    def __exit__(self, *error):
        """Close the proxy."""
        self.close()

    def cut(self):
        """Cut all connections, in the middle of what they carry."""
        with self._lock:
            self.disturbed += len(self._ends)
        self._reset()

    def _reset(self):
        with self._lock:
            for end in self._ends:
                _end(end, reset=True)

    def drop(self):
        """Throw all bytes away, as a dead link of which nobody is told, until `allow`.

        New connections are accepted, and get no answer.
        """
        self._mode = "drop"

    def forget(self):
        """Throw all bytes of these connections away for ever; new ones are served.

        So does a router that restarts, or a device that moves to another network.
        """
        with self._lock:
            self._forgotten |= self._ends

    def refuse(self):
        """Cut all connections, and cut new ones at once, until `allow`."""
        self._mode = "refuse"
        self.cut()

    def allow(self):
        """Pass bytes on again; connections that lost some are cut."""
        dropped, self._mode = self._mode == "drop", "pass"
        if dropped:
            self.cut()

    def close(self):
        """Stop listening, cut all connections, and wait for the threads."""
        self._mode = "refuse"
        self._reset()
        _end(self._listener)
        for thread in self._threads:  # the first starts others until it ends
            thread.join()
        self._listener.close()

    def _start(self, run, *arguments):
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self):
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                self._start(self._serve, client)

    def _serve(self, client):
        """Forward a connection until both sides have ended it."""
        server = socket.socket()
        with client, server:
            if not self._connect(client, server):
                return
            up = self._start(self._copy, client, server, "up")
            self._copy(server, client, "down")
            up.join()
            with self._lock:
                self._ends -= {client, server}

    def _connect(self, client, server):
        """Connect with the server; return whether the connection is allowed."""
        with contextlib.suppress(OSError), self._lock:  # there may be no server
            if self._mode != "refuse":
                server.connect((_HOST, self._target))
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._ends |= {client, server}
                self.accepted += 1
                return True
        _end(client, reset=True)
        self.refused += 1
        return False

    def _copy(self, source, sink, way):
        """Pass bytes on until the source ends; then tell the sink."""
        with contextlib.suppress(OSError):
            while chunk := source.recv(_CHUNK):
                time.sleep(self.delay)
                lost = self._mode == "drop" or source in self._forgotten
                parts = [] if lost else self.change(chunk)
                with self._lock:
                    self.disturbed += parts != [chunk]
                for part in parts:
                    sink.sendall(part)
                    with self._lock:
                        setattr(self, way, getattr(self, way) + len(part))
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _end(end, *, reset=False):
    """Wake up the thread that waits for a socket, which then closes it."""
    with contextlib.suppress(OSError):
        if reset:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RDWR)
