"""The calls of devices over gRPC: who calls, how large, how often."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import grpc
import jax
import numpy as np
import pytest
from client_devices import SMALL, Network, small_run
from proxy import Proxy
from tiny import write_run

import hsee_jax as hs
from hsee_jax.cli import main
from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.deployment import frozen, local, rpc
from hsee_jax.deployment.enroll import enroll
from hsee_jax.deployment.protocol import Refusal
from hsee_jax.deployment.reception import serve
from hsee_jax.deployment.rpc import check_address, check_port, connect, open_port
from hsee_jax.runs.folder import sole_writer


class Echo:
    """A service that answers with who called what."""

    clients = 2
    methods = "next", "push", "finish"

    def __init__(self):
        self.calls = []

    def limit(self):
        return 8 << 20

    def call(self, method, i, message, alive):
        self.calls.append(method)
        if message == b"bad":
            raise Refusal("labels: from -1 to 3")
        if message == b"bug":
            raise ZeroDivisionError
        return f"{method} {i} ".encode() + message


def never():
    return False


@pytest.fixture
def echo():
    return Echo()


def test_a_call_has_bytes_in_and_out_of_any_allowed_size(echo):
    large = bytes(6 << 20)  # gRPC's own limit is 4 MiB
    with open_port(echo, "127.0.0.1:0", None) as port:
        place = f"127.0.0.1:{port}"
        with connect(place, None, 1, patience_s=5, stop=never) as call:
            assert call("push", b"x") == b"push 1 x"
            assert call("finish", large) == b"finish 1 " + large
            with pytest.raises(UserError, match="refuses: .*larger than max"):
                call("push", bytes(9 << 20))


def test_a_compressed_message_is_refused(echo):
    """Inflated it may be a thousand times as large as what arrives."""
    with open_port(echo, "127.0.0.1:0", None) as port:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            push = channel.unary_unary("/hsee_jax.Server/push")
            with pytest.raises(grpc.RpcError, match="gzip"):
                push(bytes(999), compression=grpc.Compression.Gzip, timeout=5)
    assert echo.calls == []


@pytest.mark.parametrize("host", ["my..host", f"{'x' * 64}.org"])
def test_a_host_name_that_cannot_be_is_refused(host, monkeypatch):
    monkeypatch.setattr(rpc, "server_credentials", lambda keys: None)
    with pytest.raises(UserError, match="is not free, or not an address"):
        check_port(f"{host}:7443", Path("keys"))


def test_a_refusal_and_an_error_in_the_server_end_the_calls(echo):
    with open_port(echo, "127.0.0.1:0", None) as port:
        place = f"127.0.0.1:{port}"
        with connect(place, None, 0, patience_s=60, stop=never) as call:
            with pytest.raises(UserError, match="refuses: labels: from -1 to 3"):
                call("push", b"bad")
            assert len(echo.calls) == 1
            with pytest.raises(UserError, match="refuses: it has failed: ZeroDivision"):
                call("push", b"bug")
            assert len(echo.calls) == 4


def test_a_call_waits_for_a_server_that_is_away(echo):
    with open_port(echo, "127.0.0.1:0", None) as port:
        place = f"127.0.0.1:{port}"
    with connect(place, None, 0, patience_s=0.3, stop=never) as call:
        with pytest.raises(UserError, match="does not answer .* the same command"):
            call("next", b"")
    with connect(place, None, 0, patience_s=60, stop=never) as call:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(call("next", b"y")))
        thread.start()
        time.sleep(0.3)
        with open_port(echo, place, None):
            thread.join(20)
            assert answers == [b"next 0 y"]
    with connect(place, None, 0, patience_s=60, stop=lambda: True) as call:
        with pytest.raises(Stopped):
            call("next", b"")


def test_a_client_with_many_calls_does_not_delay_another(echo, monkeypatch):
    """Of 40 calls of client 0 four are open, so client 1 is answered at once."""
    ready, answer = threading.Event(), echo.call

    def slow(method, i, message, alive):
        if i == 0:
            ready.wait(30)
        return answer(method, i, message, alive)

    monkeypatch.setattr(echo, "call", slow)
    with open_port(echo, "127.0.0.1:0", None) as port, ExitStack() as stack:
        place = f"127.0.0.1:{port}"
        ask = dict(patience_s=60, stop=ready.is_set)
        often = stack.enter_context(connect(place, None, 0, **ask))

        def call_once():
            with suppress(Stopped):
                often("next", b"")

        threads = [threading.Thread(target=call_once) for _ in range(40)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        other = stack.enter_context(connect(place, None, 1, patience_s=5, stop=never))
        begin = time.monotonic()
        assert other("push", b"x") == b"push 1 x"
        assert time.monotonic() - begin < 5
        ready.set()
        for thread in threads:
            thread.join(20)


def test_calls_without_a_message_do_not_delay_another(echo):
    """Client 0 opens 40 calls and sends nothing in them."""
    over = threading.Event()

    def silence():
        over.wait(30)
        yield b""

    with open_port(echo, "127.0.0.1:0", None) as port:
        place = f"127.0.0.1:{port}"
        with grpc.insecure_channel(place) as channel:
            push = channel.stream_unary("/hsee_jax.Server/push")
            claim = (("client-id", "0"),)
            calls = [push.future(silence(), metadata=claim) for _ in range(40)]
            time.sleep(0.5)
            with connect(place, None, 1, patience_s=5, stop=never) as call:
                begin = time.monotonic()
                assert call("push", b"x") == b"push 1 x"
                assert time.monotonic() - begin < 5
            over.set()
            for one in calls:
                one.cancel()


def test_a_device_that_never_waits_stops_before_its_next_call(echo):
    """Every answer comes at once, so no wait for one sees the signal."""
    stopped = threading.Event()
    with open_port(echo, "127.0.0.1:0", None) as port:
        place = f"127.0.0.1:{port}"
        with connect(place, None, 0, patience_s=60, stop=stopped.is_set) as call:
            assert call("push", b"x") == b"push 0 x"
            stopped.set()
            with pytest.raises(Stopped):
                call("push", b"y")
    assert len(echo.calls) == 1


def connect_frozen(place):
    return nullcontext(frozen.connect(place, None, 0, 0.3))


def connect_device(place):
    return connect(place, None, 0, patience_s=0.3, stop=never)


@pytest.mark.parametrize("connected", [connect_device, connect_frozen])
def test_patience_is_not_for_a_server_that_waits_for_others(
    connected, echo, monkeypatch
):
    """A call ends after a fifth of a second, the device is patient for a third."""
    for module in (rpc, frozen):
        monkeypatch.setattr(module, "_CALL_S", 0.2)
    monkeypatch.setattr(frozen, "_PAUSE_S", 0.05)
    ready = threading.Event()

    def slow(method, i, message, alive):
        while alive() and not ready.wait(0.05):
            pass
        return b"done"

    monkeypatch.setattr(echo, "call", slow)
    with open_port(echo, "127.0.0.1:0", None) as port:
        timer = threading.Timer(1.5, ready.set)
        timer.start()
        with connected(f"127.0.0.1:{port}") as call:
            assert call("push", b"") == b"done"
        timer.join()


@pytest.mark.parametrize("connected", [connect_device, connect_frozen])
def test_a_message_may_need_longer_than_a_call(connected, echo, monkeypatch):
    """It takes half a second, and the first try ends after a fifth of one."""
    for module in (rpc, frozen):
        monkeypatch.setattr(module, "_CALL_S", 0.2)
    monkeypatch.setattr(frozen, "_PAUSE_S", 0.05)
    answers, large, sizes, answer = [], bytes(6 << 20), set(), echo.call

    def counting(name, i, message, alive):
        sizes.add(len(message))
        return answer(name, i, message, alive)

    monkeypatch.setattr(echo, "call", counting)
    with (
        open_port(echo, "127.0.0.1:0", None) as port,
        Proxy(port, delay=0.005) as proxy,
    ):
        with connected(f"127.0.0.1:{proxy.port}") as call:
            ask = lambda: answers.append(call("push", large))  # noqa: E731
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(30)
            assert answers == [b"push 0 " + large]
    assert sizes == {len(large)}  # a try that was cut off is no message


def test_the_certificate_says_who_calls(echo, tmp_path):
    """Whatever the metadata of the call says."""
    enroll(tmp_path, clients=2)
    with open_port(echo, "localhost:0", tmp_path / "server") as port:
        place = f"localhost:{port}"
        for i in range(2):
            with connect(
                place, tmp_path / f"client-{i}", None, patience_s=5, stop=never
            ) as call:
                assert call("next", b"") == f"next {i} ".encode()
                claim = (("client-id", "0"),)
                function = call._channel.unary_unary("/hsee_jax.Server/next")
                answer = function(b"", metadata=claim, timeout=5)
                assert answer == f"next {i} ".encode()
        with grpc.insecure_channel(place) as channel:
            with pytest.raises(grpc.RpcError):
                channel.unary_unary("/hsee_jax.Server/next")(b"", timeout=2)


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("localhost", "listen: localhost is not allowed; allowed is HOST:PORT"),
        ("localhost:70000", "allowed is HOST:PORT"),
        pytest.param(f"localhost:{'1' * 5000}", "is HOST:PORT", id="long port"),
        ("localhost:²", "allowed is HOST:PORT"),
        (":80", "allowed is HOST:PORT"),
        ("0.0.0.0:80", "without --keys"),
        ("example.org:80", "without --keys"),
    ],
)
def test_without_keys_only_this_machine_is_allowed(address, error):
    with pytest.raises(UserError, match=error):
        check_address(address, "listen", None)


def test_a_port_that_is_taken_is_named(echo):
    with open_port(echo, "127.0.0.1:0", None) as port:
        with pytest.raises(UserError, match=f"listen: 127.0.0.1:{port} is not free"):
            with open_port(echo, f"127.0.0.1:{port}", None):
                pass


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_was_checked_is_free_still(echo, host):
    with open_port(echo, f"{host}:0", None) as port:
        pass
    check_port(f"{host}:{port}", None)
    with open_port(echo, f"{host}:{port}", None) as found:
        assert found == port
        with pytest.raises(UserError, match="is not free"):
            check_port(f"{host}:{port}", None)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--listen", "0.0.0.0:7443"], "listen: 0.0.0.0:7443 is not allowed without"),
        (["--listen", "localhost:0", "--keys", "nowhere"], "keys: nowhere/ca.pem"),
        (["--listen", "127.0.0.1:{taken}"], "is not free, or not an address"),
    ],
)
def test_a_server_that_cannot_open_replaces_no_run(
    echo, tmp_path, capsys, words, error
):
    run = tmp_path / "run"
    write_run(run, small_run())
    before = sorted(run.rglob("*"))
    options = [*flags(**SMALL), "--out", str(run), "--overwrite"]
    with open_port(echo, "127.0.0.1:0", None) as port:
        words = [word.format(taken=port) for word in words]
        assert main(["serve", "demo", *options, *words]) == 2
    assert error in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_patience_is_a_time(seconds, tmp_path, capsys):
    words = ["--client", "0", "--state", str(tmp_path / "state")]
    assert main(["join", "127.0.0.1:1", *words, "--patience", seconds]) == 2
    assert f"patience: {float(seconds)} is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["nowhere", "--client", "0"], ["127.0.0.1:1", "--keys", "none"]]
)
def test_a_device_that_cannot_call_leaves_nothing(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["join", *words, "--state", "state"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_who_joins_says_who_it_is_once(tmp_path, capsys):
    call = ["join", "127.0.0.1:1", "--state", str(tmp_path)]
    assert main(call) == 2
    assert main([*call, "--client", "0", "--keys", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "client: missing; allowed is --client ID, or --keys FOLDER" in first
    assert "client: is not allowed with --keys, whose certificate names" in second
    place = ["--client", "0", "--data", str(tmp_path / "none.npz")]
    assert main([*call, *place, "--data-dir", str(tmp_path)]) == 2
    assert "data_dir: is not allowed with data" in capsys.readouterr().err
    assert main([*call, *place]) == 2
    assert ": data: " in (line := capsys.readouterr().err) and "No such file" in line
    for arrays, words in (
        ({"x": np.ones(3), "y": 3}, "holds a single value; allowed"),
        ({"a": np.ones(3)}, "holds a; allowed are the arrays `x` and `y`"),
    ):
        np.savez(tmp_path / "own.npz", **arrays)
        own = ["--client", "0", "--data", str(tmp_path / "own.npz")]
        assert main([*call, *own]) == 2
        assert f"data: {tmp_path / 'own.npz'} {words}" in capsys.readouterr().err


def flags(**options):
    for name, value in options.items():
        yield f"--{name.replace('_', '-')}"
        yield from map(str, value) if isinstance(value, tuple) else [str(value)]


DIES = """
import os, signal, sys
from hsee_jax.deployment import box
from hsee_jax.cli import main

write, left = box._write, [int(sys.argv[1])]

def mortal(path, content, **options):
    write(path, content, **options)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

box._write = mortal
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_processes_that_are_killed_end_as_if_they_were_not(tmp_path):
    """With certificates: a device is killed at some writes, and the server twice."""
    config = small_run()
    hs.train(config, tmp_path / "simulated")
    enroll(tmp_path / "keys", clients=2)
    with open_port(Echo(), "127.0.0.1:0", None) as port:
        place = f"localhost:{port}"

    def start(*words):
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)

    def serve(*more):
        words = ["--listen", place, "--keys", f"{tmp_path}/keys/server"]
        words += ["--out", f"{tmp_path}/run", *more]
        return start("-m", "hsee_jax", "serve", *words)

    def join(i, dies):
        words = ["--keys", f"{tmp_path}/keys/client-{i}"]
        words += ["--state", f"{tmp_path}/device-{i}"]
        return start("-c", DIES, str(dies), "join", place, *words)

    server = serve("demo", *flags(**SMALL))
    steady = join(0, -1)
    for dies in (3, 6):
        assert join(1, dies).wait(120) == -signal.SIGKILL
    server.kill()
    server.wait()
    last = join(1, -1)
    server = serve("--resume")
    rounds = tmp_path / "run" / "deployment" / "rounds"
    while not (rounds / "2").exists() and server.poll() is None:
        time.sleep(0.05)
    server.kill()
    server.wait()
    assert serve("--resume").wait(120) == 0
    assert steady.wait(60) == last.wait(60) == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        hs.restore(tmp_path / "run").state,
        hs.restore(tmp_path / "simulated").state,
    )


@pytest.mark.slow
def test_a_run_on_local_processes_is_an_ordinary_one(tmp_path, capsys):
    out, words = str(tmp_path / "run"), [*flags(**SMALL)]
    assert main(["serve", "demo", "--local", "2", *words, "--out", out]) == 0
    config = small_run()
    summary = hs.train(config, tmp_path / "simulated")
    jax.tree.map(
        np.testing.assert_array_equal,
        hs.restore(out).state,
        hs.restore(tmp_path / "simulated").state,
    )
    capsys.readouterr()
    assert main(["eval", out, "--json"]) == 0
    assert str(summary.scores.mean_exit_accuracy) in capsys.readouterr().out
    for command in (["report"], ["export", "--client", "1"], ["gate"]):
        assert main([command[0], out, *command[1:]]) == 0
    words = ["serve", "--local", "2", "--resume", "--out", out, "--rounds", "4"]
    assert main(words) == 0
    assert hs.restore(out).state.round == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_server_and_devices(number, tmp_path):
    words = ["serve", "demo", "--local", "2", *flags(**SMALL | dict(rounds=500))]
    out = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "hsee_jax", *words, "--out", str(out)], stderr=log
        )
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert server.poll() is None
            time.sleep(0.1)
        server.send_signal(number)
        assert server.wait(60) == 128 + number
    said = (tmp_path / "log").read_text()
    assert "--resume --out" in said and "Traceback" not in said
    for i in range(2):
        said = (out / "devices" / f"client-{i}" / "log.txt").read_text()
        assert said.endswith("hsee: stopped; the same command goes on\n")


@pytest.mark.slow
def test_local_devices_end_with_a_server_that_is_killed(tmp_path):
    """So `hsee serve --resume --local` can start them again at once."""
    words = ["serve", "demo", "--local", "2", *flags(**SMALL | dict(rounds=500))]
    out = tmp_path / "run"
    command = [sys.executable, "-m", "hsee_jax", *words, "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert server.poll() is None
            time.sleep(0.1)
        server.kill()
    for i in range(2):
        folder, end = out / "devices" / f"client-{i}", time.monotonic() + 20
        while "ended with the server" not in (folder / "log.txt").read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(0.5)
        with sole_writer(folder / "state", "state"):
            pass


def test_a_local_device_that_dies_ends_the_run(tmp_path, monkeypatch, capsys):
    words = ["serve", "demo", "--local", "2", *flags(**SMALL | dict(rounds=500))]
    out = tmp_path / "run"
    monkeypatch.setattr(local.sys, "executable", shutil.which("false"))
    assert main([*words, "--out", str(out)]) == 2
    assert "local: the process of client" in capsys.readouterr().err


HEAVY = ("matplotlib", "tensorflow_datasets", "orbax", "tensorstore", "pooch")
HEAVY += ("scipy.optimize", "cryptography", "tensorflow", "torch", "pandas")
JOINS = f"""
import sys
from hsee_jax.cli import main

assert not main(sys.argv[1:])
print(*sorted(set({HEAVY}) & set(sys.modules)))
"""


def test_a_device_imports_only_what_it_needs(tmp_path):
    """In a whole run, for which it reads its share of the dataset itself."""
    config, said = small_run(rounds=1, num_clients=1), []

    @contextmanager
    def doors(service):
        with open_port(service, "127.0.0.1:0", None) as port:
            place, state = f"127.0.0.1:{port}", str(tmp_path / "state")
            words = ["join", place, "--client", "0", "--state", state]
            process = subprocess.Popen(
                [sys.executable, "-c", JOINS, *words],
                stdout=subprocess.PIPE,
                text=True,
            )
            yield
            said.append(process.communicate(timeout=60)[0])
            assert process.returncode == 0

    serve(config, tmp_path / "run", doors)
    assert said == ["\n"]


def test_devices_over_grpc_equal_devices_without(tmp_path):
    """The service is the same, so the bytes are the same."""
    config = small_run(rounds=1)
    network = Network(config, tmp_path)
    doors, calls = network._doors, {}

    @contextmanager
    def over_grpc(service):
        with ExitStack() as stack:
            with open_port(service, "127.0.0.1:0", None) as port, doors(service):
                for i in network.lives:
                    calls[i] = stack.enter_context(
                        connect(f"127.0.0.1:{port}", None, i, patience_s=20, stop=never)
                    )
                network.call = lambda i, method, message: calls[i](method, message)
                network.start_all()
                yield
            network.join()  # before the channels close

    network._doors = over_grpc
    network.serve()
    network.join()
    hs.train(config, tmp_path / "simulated")
    jax.tree.map(
        np.testing.assert_array_equal,
        hs.restore(tmp_path / "run").state,
        hs.restore(tmp_path / "simulated").state,
    )
