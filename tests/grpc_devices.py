"""Devices that call over gRPC, with certificates, through a proxy."""

from contextlib import ExitStack, contextmanager

from client_devices import Network
from proxy import Proxy

from hsee_jax.deployment.rpc import connect, open_port


class GrpcNetwork(Network):
    """Devices in threads, each with a connection of its own.

    Attributes:
      proxy: between devices and server, while the server is there.
    """

    def __init__(self, config, folder, keys, act=lambda proxy: None):
        """See `Network`; ``act`` does something to the proxy before the run begins."""
        super().__init__(config, folder)
        self._keys, self._act, self._calls = keys, act, {}

    def call(self, i, method, message):
        return self._calls[i](method, message)

    @contextmanager
    def _doors(self, service):
        with ExitStack() as stack:
            port = stack.enter_context(
                open_port(service, "localhost:0", self._keys / "server")
            )
            self.proxy = stack.enter_context(Proxy(port))
            self._act(self.proxy)
            for i in self.lives:
                self._calls[i] = stack.enter_context(
                    connect(
                        f"localhost:{self.proxy.port}",
                        self._keys / f"client-{i}",
                        None,
                        patience_s=60,
                        stop=lambda: bool(self.failures),
                    )
                )
            self.start_all()
            yield
            self.join()  # before the channels close
