"""A network that disturbs what passes, and runs that end as if it did not.

Two layers are disturbed. A proxy disturbs the bytes of gRPC's connections, which TCP
and TLS carry: there a repeated or changed byte ends the connection, and calls are
repeated. Above it whole messages arrive twice, late or out of order, as they do when a
call is repeated whose first try had arrived. The page "What a federation survives"
lists the cases; a test compares its tables with those below.
"""

import contextlib
import itertools
import json
import random
import threading
import time

import jax
import numpy as np
import pytest
from client_devices import Network, simulator, small_run
from grpc_devices import GrpcNetwork
from page_tables import read_table

import hsee_jax as hs
from hsee_jax.deployment import rpc
from hsee_jax.deployment.enroll import enroll
from hsee_jax.deployment.forms import Kind
from hsee_jax.deployment.protocol import pack
from hsee_jax.runs.history import read_records

PAGE = "explanation/survival.md"
TOLD = ("join", "begin", "push", "finish")  # `next` asks, and tells nothing


def twice(call):
    """Deliver each message twice; both answers are equal.

    Only the round may end between them: it does once all clients have finished.
    """

    def carry(method, message):
        answer = call(method, message)
        if method in TOLD:
            again = call(method, message)
            ended = method == "finish" and again == pack({"closed": 1})
            assert again == answer or ended
        return answer

    return carry


def unanswered(call):
    def carry(method, message):
        if method in TOLD:
            call(method, message)
        return call(method, message)

    return carry


class Old:
    """Delivers three earlier messages again before each message."""

    def __init__(self, call):
        self._call, self._past, self._random = call, [], random.Random(0)

    def __call__(self, method, message):
        for old in self._random.sample(self._past, min(3, len(self._past))):
            self._call(*old)
        if method in TOLD:
            self._past.append((method, message))
        return self._call(method, message)


class Overtaken:
    """Delivers each message again after the message that follows it."""

    def __init__(self, call):
        self._call, self._held = call, []

    def __call__(self, method, message):
        answer = self._call(method, message)
        with contextlib.suppress(ConnectionError):  # the server has ended
            for held in self._held:
                self._call(*held)
        self._held = [(method, message)] if method in TOLD else []
        return answer


class Waits:
    """Lets each message wait, so that those of two devices change places."""

    def __init__(self, call):
        self._call, self._random = call, random.Random(id(call))

    def __call__(self, method, message):
        time.sleep(0.05 * self._random.random())
        return self._call(method, message)


MESSAGES = {
    "a message arrives twice": twice,
    "the answer to a message is lost": unanswered,
    "earlier messages arrive again, also of other rounds": Old,
    "a message arrives again after the one that follows it": Overtaken,
    "messages wait for different times": Waits,
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The states of runs that nobody disturbs."""
    return simulator(tmp_path_factory)


def assert_undisturbed(folder, state, caplog):
    """The same network bit for bit; no client missed a round, and none was refused."""
    jax.tree.map(np.testing.assert_array_equal, hs.restore(folder).state, state)
    assert [record.missed for record in read_records(folder)] == [[], [], []]
    assert "refused" not in caplog.text


@pytest.mark.parametrize(
    "strategy", ["averaging", pytest.param("sequential", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "post",
    [
        pytest.param(post, id=text, marks=[] if post is twice else pytest.mark.slow)
        for text, post in MESSAGES.items()
    ],
)
def test_messages_may_be_disturbed(post, strategy, simulated, tmp_path, caplog):
    config = small_run(strategy=strategy)
    network = Network(config, tmp_path)
    network.post = post
    network.start_all()
    network.serve()
    network.join()
    assert_undisturbed(tmp_path / "run", simulated(config), caplog)


@pytest.mark.slow
@pytest.mark.parametrize("post", MESSAGES.values(), ids=MESSAGES)
def test_messages_with_gradients_may_be_disturbed(post, tmp_path, caplog):
    """With a joint boundary an answer carries a gradient, and is given again."""
    config = small_run(boundary="joint")
    for name, carry in (("undisturbed", lambda call: call), ("disturbed", post)):
        network = Network(config, tmp_path / name)
        network.post = carry
        network.start_all()
        network.serve()
        network.join()
    state = hs.restore(tmp_path / "undisturbed" / "run").state
    assert_undisturbed(tmp_path / "disturbed" / "run", state, caplog)


def test_the_server_waits_until_the_last_means_have_arrived(
    simulated, tmp_path, caplog
):
    """They are large, so on a slow link the answer that brings them takes its time."""
    config, late = small_run(), []
    network = Network(config, tmp_path)

    def slowly_at_the_end(call):
        def carry(method, message):
            answer = call(method, message)
            fields = json.loads(answer.partition(b"\n")[0])
            if method == "next" and fields["kind"] == Kind.END and fields["means"]:
                time.sleep(1)
                late.append(network.ended)
            return answer

        return carry

    network.post = slowly_at_the_end
    network.start_all()
    network.serve()
    network.join()
    assert late == [False, False]
    assert_undisturbed(tmp_path / "run", simulated(config), caplog)


def flip(chunk):
    return [bytes([chunk[0] ^ 1]) + chunk[1:]]


def changes(function):
    """Replace each 17th chunk, in the handshake of TLS or behind it."""

    def act(proxy):
        count = itertools.count(1)
        proxy.change = lambda chunk: [chunk] if next(count) % 17 else function(chunk)

    return act


def swaps(proxy):
    """Hold each 17th chunk back until another has passed, of any connection."""
    count, held = itertools.count(1), []

    def change(chunk):
        if held:
            return [chunk, held.pop()]
        if next(count) % 17:
            return [chunk]
        held.append(chunk)
        return []

    proxy.change = change


def later(function, seconds=0.0):
    """Do something to the proxy in the middle of the run, and allow all afterwards."""

    def act(proxy):
        def disturb():
            while proxy.up < 20_000:
                time.sleep(0.005)
            function(proxy)
            if seconds:
                time.sleep(seconds)
                proxy.allow()

        threading.Thread(target=disturb, daemon=True).start()

    return act


def slowly(proxy):
    proxy.delay = 0.02


BYTES = {
    "each 17th chunk of bytes is lost": changes(lambda chunk: []),
    "each 17th chunk of bytes arrives twice": changes(lambda chunk: [chunk, chunk]),
    "some chunks of bytes change places": swaps,
    "a bit is flipped in each 17th chunk of bytes": changes(flip),
    "each chunk of bytes waits 20 ms": slowly,
    "all connections are cut": later(lambda proxy: proxy.cut()),
    "no connection is possible for two seconds": later(lambda p: p.refuse(), 2),
    "all bytes vanish for two seconds": later(lambda p: p.drop(), 2),
    "all bytes of the old connections vanish for ever": later(lambda p: p.forget()),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enrolment") / "keys"
    enroll(folder, clients=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("act", BYTES.values(), ids=BYTES)
def test_bytes_may_be_disturbed(act, keys, simulated, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(rpc, "_KEEPALIVE_S", 1.0)
    config = small_run()
    network = GrpcNetwork(config, tmp_path, keys, act)
    network.serve()
    assert network.proxy.disturbed > 0 or network.proxy.delay > 0
    assert_undisturbed(tmp_path / "run", simulated(config), caplog)


def test_the_page_lists_these_cases():
    for heading, cases in (("Messages", MESSAGES), ("Bytes", BYTES)):
        assert [row["what is done"] for row in read_table(PAGE, heading)] == [*cases]
