"""Signals and standard streams of the command, in processes of their own."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from hsee_jax import cli
from hsee_jax.cli.signals import StopSignals, keep_interrupt
from hsee_jax.parallel import processes

HSEE = [sys.executable, "-m", "hsee_jax"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="uses POSIX signals")


def start(code):
    """Start a program and wait until it says that it is ready."""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    return child


# A mutex that is locked twice holds a thread in C for ever; signals do not end that.
# The handler keeps an early SIGINT from ending the thread before it is stuck.
STUCK = """
import ctypes, os, signal
from hsee_jax.cli.signals import StopSignals, exit_on_second
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
signal.signal(signal.SIGINT, lambda number, frame: None)
with {context}:
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("context", "number"),
    [
        ("StopSignals()", signal.SIGTERM),
        ("exit_on_second(lambda _: os.write(2, b'first\\n'))", signal.SIGINT),
    ],
)
def test_the_second_signal_ends_a_process_that_is_stuck(context, number):
    child = start(STUCK.format(context=context))
    child.send_signal(number)
    first = child.stderr.readline()  # it has heard the first
    stops = "hsee: stops after this step; a second signal ends it at once\n"
    assert first == (stops if number == signal.SIGTERM else "first\n")
    time.sleep(0.7)
    assert child.poll() is None
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (128 + number, "hsee: ended at once\n")


def test_a_signal_that_is_sent_twice_at_once_is_one():
    """As timeout(1) sends it: to the process, and to its group."""
    child = start(
        "import time; from hsee_jax.cli import signals\n"
        "signals._TOGETHER_S = 60\n"
        "with signals.StopSignals() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.received: time.sleep(0.01)\n"
        "    time.sleep(0.3)\n"
        "print(stop.received, flush=True)\n"
    )
    child.send_signal(signal.SIGTERM)
    assert child.stderr.readline().startswith("hsee: stops")
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, f"{int(signal.SIGTERM)}\n")


def test_signals_are_left_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_while_processes_agree_is_not_lost(monkeypatch):
    """It is too late for this answer; the next has it."""

    def slow(number):
        if number == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 20
            while not stop.received and time.monotonic() < deadline:
                time.sleep(0.01)
        return number

    monkeypatch.setattr(processes, "largest", slow)
    with StopSignals() as stop:
        assert [processes.in_any(stop()) for _ in range(2)] == [False, True]
        assert stop.received == signal.SIGTERM


def test_an_interrupt_in_a_callback_is_not_lost():
    """Python would print it there, and go on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            keep_interrupt(SimpleNamespace(exc_type=KeyboardInterrupt))
            for _ in range(100):
                time.sleep(0.05)
    finally:
        signal.signal(signal.SIGINT, before)


INTERRUPTED = """
import os, signal, sys
import hsee_jax.cli
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["eval", "nowhere"]
hsee_jax.cli.console_main()
"""


@pytest.mark.parametrize("name", ["jax", "optax"])
def test_an_interrupted_import_is_one_line(name):
    code = [sys.executable, "-c", INTERRUPTED.format(name=name)]
    result = subprocess.run(code, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "hsee: stopped\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["eval", "run"], "hsee: stopped\n"),
        (["train"], "hsee: stopped; --resume continues from the last checkpoint\n"),
        (
            ["data", "stl10"],
            "hsee: stopped; the next call continues with the part that is there\n",
        ),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(words, line, monkeypatch, capsys):
    def interrupt(words=None):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    monkeypatch.setattr(sys, "argv", ["hsee", *words])
    monkeypatch.setattr("hsee_jax.cli.streams.open_streams", lambda: None)
    monkeypatch.setitem(cli.console_main.__globals__, "main", interrupt)
    try:
        with pytest.raises(SystemExit) as end:
            cli.console_main()
    finally:
        signal.signal(signal.SIGINT, before[0])
        sys.unraisablehook = before[1]
    assert end.value.code == 130
    assert capsys.readouterr().err == line


def test_the_command_runs_in_any_thread(monkeypatch):
    """Where signals cannot be handled."""

    def train(*args, stop, **kwargs):
        stop()
        return SimpleNamespace(rounds=1, scores=None)

    monkeypatch.setattr("hsee_jax.cli.train.train_run", train)
    monkeypatch.setattr("hsee_jax.cli.train.print_figures", lambda *a, **k: None)
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(cli.main(["train", "--out", "nowhere"]))
    )
    thread.start()
    thread.join()
    assert statuses == [0]


FULL = pytest.param(
    ">/dev/full",
    "No space left on device",
    marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full"),
)


@pytest.mark.parametrize(("redirection", "reason"), [FULL, (">&-", "it is closed")])
@pytest.mark.parametrize(
    "words",
    [
        "--version",
        "data --help",
        pytest.param("info --width 1", marks=pytest.mark.slow),
    ],
)
def test_output_that_cannot_be_written_is_one_line(redirection, reason, words):
    script = f'exec "$@" {words} {redirection}'
    result = subprocess.run(
        ["sh", "-c", script, "sh", *HSEE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == f"hsee: stdout: cannot be written: {reason}\n"


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_messages_that_cannot_be_written_end_nothing(redirection):
    words = "data fashion_mnist_small"
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {words} {redirection}', "sh", *HSEE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    assert "6,000 training" in result.stdout


def test_a_reader_that_has_gone_is_no_error():
    script = '"$@" info --width 1 2>&1 >&3 3>&- | cat >&2; exit'
    result = subprocess.run(
        ["bash", "-c", f"{{ {script}; }} 3>&1 | true", "bash", *HSEE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_any_text_is_written_in_an_ascii_locale():
    """Tables have lines of ASCII, and a name its escapes."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for words, expected in (
        (["info", "--width", "1"], "| layer1.0 "),
        (["eval", "r\u00e9sum\u00e9"], "run: r\\xe9sum\\xe9 is not a run"),
    ):
        result = subprocess.run(
            [*HSEE, *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        output = result.stdout + result.stderr
        assert expected in output and output.isascii()
        assert "Traceback" not in output
