"""Turns that a loop takes at the same time give what they give one after another."""

import gc
import threading
import time

import jax
import pytest
from programs import compiled_programs
from rounds import assert_same, train
from tiny import TINY, tiny_federation, tiny_shards

from hsee_jax import runs
from hsee_jax.algorithms import averaging, sequential
from hsee_jax.config import override, preset
from hsee_jax.engine import compiled_turns, streams
from hsee_jax.engine.compilation import make_round
from hsee_jax.engine.streams import Streams, num_threads

CUTS = {0: 1, 1: 2, 2: 1, 3: 2, 4: 1}
SAMPLES = dict.fromkeys(CUTS, 12) | {2: 5}
SMALL = override(
    preset("demo"),
    **TINY,
    num_clients=6,
    cuts=("1", "2"),
    max_train_samples=60,
    max_test_samples=20,
    batch_size=6,
    rounds=1,
    client_axis="loop",
)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (averaging, {}),
        pytest.param(
            averaging,
            {"period": 2, "period_unit": "steps"},
            marks=pytest.mark.slow,
        ),
        (sequential, {}),
        (sequential, {"turn": "epoch"}),
        pytest.param(sequential, {"boundary": "joint"}, marks=pytest.mark.slow),
    ],
)
def test_results_do_not_depend_on_the_threads(make, options):
    """Bit for bit, with queues that hold one client, several clients, or everything."""
    federation, shards = tiny_federation(CUTS), tiny_shards(SAMPLES)
    strategy = make(federation, **options)
    reference, *others = (
        train(strategy, federation, shards, axis="loop", threads=threads)
        for threads in (1, 2, 3, 6)
    )
    for other in others:
        assert_same(*(jax.device_get(run) for run in (reference, other)), rtol=0)


@pytest.mark.parametrize("threads", [2, 3])
def test_clients_are_a_few_batches_ahead_of_a_slow_server(monkeypatch, threads):
    """With 12 clients a step, two batches for each thread are the most."""
    waiting, most = set(), []
    send, serve = compiled_turns._Halves._send, compiled_turns._Halves._serve

    def counted_send(self, step, n):
        waiting.add((step, n))
        most.append(len(waiting))
        return send(self, step, n)

    def slow_serve(self, step, n, *arguments):
        time.sleep(0.02)
        result = serve(self, step, n, *arguments)
        waiting.remove((step, n))
        return result

    monkeypatch.setattr(compiled_turns._Halves, "_send", counted_send)
    monkeypatch.setattr(compiled_turns._Halves, "_serve", slow_serve)
    cuts = dict.fromkeys(range(12), 1)
    federation, shards = tiny_federation(cuts), tiny_shards(dict.fromkeys(cuts, 5))
    train(sequential(federation), federation, shards, axis="loop", threads=threads)
    assert threads < max(most) <= 2 * threads
    assert not waiting


def test_queues_keep_their_order_and_run_side_by_side():
    both, log = threading.Barrier(2, timeout=20), []

    def call(name):
        both.wait()  # returns once the other queue is here, too
        log.append(name)
        return name

    queues = Streams(2)
    calls = [queues.submit(n, call, (n, k)) for k in range(3) for n in range(2)]
    assert [c.result() for c in calls] == [(n, k) for k in range(3) for n in range(2)]
    for n in range(2):
        assert [k for queue, k in log if queue == n] == [0, 1, 2]


def test_one_queue_is_the_thread_of_the_caller():
    queues = Streams(1)
    for submit in (queues.submit, queues.submit_beside_first):
        assert submit(3, threading.get_ident).result() == threading.get_ident()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_only_the_server_uses_the_first_queue(count):
    queues = Streams(count)
    server = queues.submit(0, threading.get_ident).result()
    clients = [
        queues.submit_beside_first(n, threading.get_ident).result() for n in range(9)
    ]
    assert server not in clients
    assert len(set(clients)) == count - 1


def test_an_error_in_a_queue_reaches_the_caller():
    def call():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Streams(2).submit(1, call).result()


def test_the_number_of_threads(monkeypatch):
    assert num_threads(3) == 3
    for count, threads in ((1, 1), (4, 4), (64, 8)):
        monkeypatch.setattr(streams, "cores", lambda count=count: list(range(count)))
        assert num_threads(0) == threads


@pytest.mark.parametrize(
    "strategy", ["averaging", pytest.param("sequential", marks=pytest.mark.slow)]
)
def test_loop_threads_is_the_number_of_threads(tmp_path, monkeypatch, strategy):
    used = set()
    real = Streams.submit

    def submit(self, n, call, *arguments):
        def noted(*arguments):
            used.add(threading.current_thread().name)
            return call(*arguments)

        return real(self, n, noted, *arguments)

    monkeypatch.setattr(Streams, "submit", submit)
    run = override(SMALL, strategy=strategy)
    for threads in (1, 3):
        used.clear()
        runs.train(override(run, loop_threads=threads), tmp_path / str(threads))
        assert len(used) == threads


def test_a_round_leaves_no_threads(monkeypatch):
    """Though its programs stay, as those of all cuts of a run do."""
    federation, shards = tiny_federation({0: 1, 1: 1}), tiny_shards({0: 4, 1: 4})
    kept, before = [], set(threading.enumerate())

    def keep(*arguments, **options):
        kept.append(make_round(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr("rounds.make_round", keep)
    train(averaging(federation), federation, shards, axis="loop", threads=2)
    gc.collect()
    until = time.monotonic() + 10
    while left := [t for t in threading.enumerate() if t not in before]:
        left = [t for t in left if t.name.startswith("hsee-stream")]
        if not left or time.monotonic() > until:
            break
        time.sleep(0.01)
    assert kept and not left


@pytest.mark.slow
def test_a_setting_of_the_calling_thread_holds_in_all_threads():
    """JAX keeps settings such as this one by thread, and compiles anew for others."""
    federation, shards = tiny_federation({0: 1, 1: 1}), tiny_shards({0: 4, 1: 4})
    strategy = averaging(federation)
    counts = []
    for precision in (None, "highest"):
        jax.clear_caches()
        with jax.default_matmul_precision(precision), compiled_programs() as programs:
            train(strategy, federation, shards, axis="loop", threads=2)
        counts.append(len(programs))
    assert counts[0] == counts[1]
