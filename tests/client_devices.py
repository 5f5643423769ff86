"""Runs on devices without a network: each device is a thread that calls a function."""

import threading
import time
from contextlib import contextmanager
from functools import partial

import hsee_jax as hs
from hsee_jax.core.errors import Stopped
from hsee_jax.deployment.box import Box
from hsee_jax.deployment.device import Changed, Device, join
from hsee_jax.deployment.protocol import digest
from hsee_jax.deployment.reception import serve
from hsee_jax.runs.material import shares

LONGEST_S = 300  # of a run in the tests; without an end a fault would wait for ever

# A run of three rounds, as flags; a client has ten samples, in batches of 4, 4 and 2.
SMALL = dict(
    network="mlp",
    depth=2,
    hidden=4,
    num_clients=2,
    cuts=("1",),
    max_train_samples=20,
    max_test_samples=10,
    batch_size=4,
    rounds=3,
    eval_every=3,
    checkpoint_every=3,
    link="int8",
)


def small_run(*, rounds=3, **changes):
    """The configuration of a small run, which is evaluated after its last round."""
    often = dict(rounds=rounds, eval_every=rounds, checkpoint_every=rounds)
    return hs.override(hs.preset("demo"), **SMALL | often | changes)


class Killed(BaseException):
    """A process is killed: nothing catches this, and nothing is cleaned up."""


class Network:
    """Devices in threads, and a server that may be away.

    Attributes:
      failures: the errors of devices.
      lives: how often each device was started.
      ended: whether the run has ended, so that no server comes back.
      post: carries the messages of a device: (what delivers one) -> what calls.
    """

    def __init__(self, config, folder):
        self._config, self._folder = config, folder
        self._data = dict(enumerate(shares(config)))
        self._service, self._threads, self.ended = None, [], False
        self.failures, self.lives = [], dict.fromkeys(self._data, 0)
        self.post = lambda call: call

    def start(self, i):
        """Start a device; one that is killed is started again."""
        thread = threading.Thread(target=self._live, args=[i], daemon=True)
        self._threads.append(thread)
        thread.start()

    def start_all(self):
        for i in self._data:
            self.start(i)

    def serve(self, config=None, **options):
        """Serve the run until it ends, or is killed; it may go on in another way."""
        self._config = config or self._config
        run, end = self._folder / "run", time.monotonic() + LONGEST_S

        def stop():
            return bool(self.failures) or time.monotonic() > end

        try:
            summary = serve(self._config, run, self._doors, stop=stop, **options)
        except Stopped:
            raise (self.failures or [TimeoutError("the run does not end")])[0] from None
        self.ended = True
        return summary

    def join(self):
        """Wait for the end of all devices."""
        for thread in self._threads:
            thread.join(30)
        assert not self.failures, self.failures
        assert not any(thread.is_alive() for thread in self._threads)

    def call(self, i, method, message):
        """Call the server as gRPC does: again, until the same server has answered."""
        while not (self.failures or self.ended):
            service = self._service
            if service is None:
                time.sleep(0.01)
                continue
            alive = lambda s=service: self._service is s and not self.failures  # noqa: E731
            answer = service.call(method, i, message, alive)
            if self._service is service:
                return answer
        raise ConnectionError

    @contextmanager
    def _doors(self, service):
        self._service = service
        try:
            yield
        finally:
            self._service = None

    def _live(self, i):
        data, folder = self._data[i], self._folder / f"device-{i}"
        while not self.failures:
            self.lives[i] += 1
            try:
                call = self.post(partial(self.call, i))
                values, part = join(call, len(data.labels), self._config.run.plugin)
                box = Box(folder)
                box.claim(values["run"], i)
                box.put_about(values)
                device = Device(part, data, box, call, about=digest(values))
                device.run(lambda: bool(self.failures))
                return
            except (Killed, Changed):
                continue
            except ConnectionError:  # nobody answers any more
                return
            except BaseException as error:
                self.failures.append(error)


def serve_in_process(config, folder, **options):
    """Serve a run to devices that are threads; returns its summary."""
    network = Network(config, folder)
    network.start_all()
    summary = network.serve(**options)
    network.join()
    return summary


def simulator(tmp_path_factory):
    """Return a function from a configuration to the state of its undisturbed run."""
    states = {}

    def state(config):
        if config not in states:
            folder = tmp_path_factory.mktemp("simulated") / "run"
            hs.train(config, folder)
            states[config] = hs.restore(folder).state
        return states[config]

    return state
