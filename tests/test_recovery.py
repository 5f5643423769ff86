"""Devices and servers that are killed wherever they write, and end as if they were not.

The network, the certificates and the proxy have their own tests.
"""

import itertools
import sys
import time

import jax
import numpy as np
import pytest
from client_devices import (
    Killed,
    Network,
    serve_in_process,
    simulator,
    small_run,
)

import hsee_jax as hs
from hsee_jax.core.errors import DivergenceError, Stopped, UserError
from hsee_jax.deployment import box, journal
from hsee_jax.deployment.deadline import Deadline
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.types import Patience
from hsee_jax.runs.callbacks import Callback
from hsee_jax.runs.history import read_records


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The state of a run that nobody disturbs, by strategy."""
    return simulator(tmp_path_factory)


def assert_undisturbed(simulated, config, folder):
    state = hs.restore(folder / "run").state
    jax.tree.map(np.testing.assert_array_equal, state, simulated(config))
    assert [record.missed for record in read_records(folder / "run")] == [[], [], []]


def killer(function, network, moment):
    """Kill device 1 at its n-th write in its n-th life, before or after the write."""
    writes = {}

    def write(path, content, **options):
        if "device-1" not in str(path):
            return function(path, content, **options)
        life = network.lives[1]
        writes[life] = writes.get(life, 0) + 1
        if moment == "before" and writes[life] == life:
            raise Killed
        function(path, content, **options)
        if moment == "after" and writes[life] == life:
            raise Killed
        return None

    return write


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_device_may_be_killed_at_any_write(
    moment, strategy, simulated, tmp_path, monkeypatch
):
    """In a life it dies at its first write, in the next at its second, and so on."""
    config = small_run(strategy=strategy)
    network = Network(config, tmp_path)
    monkeypatch.setattr(box, "_write", killer(box._write, network, moment))
    network.start_all()
    network.serve()
    network.join()
    # A round has five writes: three messages, the end, and the state. A life redoes
    # the round that the last had not completed, so the seventh is behind all of them.
    assert network.lives[0] == 1 and network.lives[1] >= 7
    assert_undisturbed(simulated, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["averaging", "sequential"])
def test_a_server_may_be_killed_at_any_moment(
    strategy, simulated, tmp_path, monkeypatch
):
    """Between two messages, and before and after each of its writes."""
    config = small_run(strategy=strategy)
    network, counts = Network(config, tmp_path), dict(life=0, moment=0)

    def dies(function):
        def mortal(*arguments, **options):
            counts["moment"] += 1
            if counts["moment"] == counts["life"]:
                raise Killed
            result = function(*arguments, **options)
            counts["moment"] += 1
            if counts["moment"] == counts["life"]:
                raise Killed
            return result

        return mortal

    monkeypatch.setattr(journal, "write", dies(journal.write))
    for name in ("take", "finish", "open"):
        monkeypatch.setattr(Mailbox, name, dies(getattr(Mailbox, name)))
    monkeypatch.setattr(journal.Writer, "seal", dies(journal.Writer.seal))
    network.start_all()
    while True:
        counts["life"] += 3  # every third moment
        counts["moment"] = 0
        try:
            network.serve(resume=(tmp_path / "run" / "config.json").exists())
            break
        except Killed:
            continue
    network.join()
    assert counts["life"] > 12 and set(network.lives.values()) == {1}
    assert_undisturbed(simulated, config, tmp_path)


def test_a_server_that_lost_its_first_round_knows_its_devices(
    simulated, tmp_path, monkeypatch
):
    """It goes on as the same run, so a device that starts anew finds its state."""
    config = small_run()
    network, lost = Network(config, tmp_path), []

    def dies(function, applies):
        def mortal(*arguments, **options):
            if function not in lost and applies(*arguments):
                lost.append(function)
                raise Killed
            return function(*arguments, **options)

        return mortal

    finish = dies(Mailbox.finish, lambda self, i: True)
    monkeypatch.setattr(Mailbox, "finish", finish)
    write = dies(box._write, lambda path, _: path.match("device-1/state-2"))
    monkeypatch.setattr(box, "_write", write)
    network.start_all()
    with pytest.raises(Killed):
        network.serve()
    network.serve(resume=True)
    network.join()
    assert network.lives == {0: 1, 1: 2}
    assert_undisturbed(simulated, config, tmp_path)


def die_once_all_have_finished(monkeypatch, round_number):
    """Kill the server when all devices have sent what is due after a round."""
    finish = Mailbox.finish

    def dies(self, i):
        finished = finish(self, i)
        everybody = set(self._finished) == set(self._rows)
        if self._number == round_number and everybody:
            monkeypatch.undo()
            raise Killed
        return finished

    monkeypatch.setattr(Mailbox, "finish", dies)


@pytest.mark.slow
def test_a_round_is_sent_again_whose_answers_are_large(tmp_path, monkeypatch):
    """With a joint boundary an answer is a gradient, here of up to 8 kB."""
    config = small_run(boundary="joint", hidden=512)
    serve_in_process(config, tmp_path / "undisturbed")
    network = Network(config, tmp_path)
    die_once_all_have_finished(monkeypatch, 2)
    network.start_all()
    with pytest.raises(Killed):
        network.serve()
    network.serve(resume=True)
    network.join()
    assert set(network.lives.values()) == {1}
    state = hs.restore(tmp_path / "undisturbed" / "run").state
    assert_undisturbed(lambda _: state, config, tmp_path)


PRIVATE = dict(strategy="sequential", keep_layers_private=True, eval_every=2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (dict(rounds=3), dict(rounds=4, eval_every=2)),
        pytest.param(
            dict(rounds=2, **PRIVATE), dict(eval_batch_size=5), marks=pytest.mark.slow
        ),
    ],
    ids=["rounds and layers", "test batches"],
)
def test_a_server_may_go_on_with_other_bookkeeping(
    before, after, tmp_path, monkeypatch
):
    """Devices that wait for it learn of other rounds, layers and test batches."""
    first = small_run(**before)
    second, network = hs.override(first, **after), Network(first, tmp_path)
    die_once_all_have_finished(monkeypatch, 2)
    network.start_all()
    with pytest.raises(Killed):
        network.serve()
    with pytest.raises(UserError, match="after round 1; allowed is 2 or more"):
        network.serve(hs.override(first, rounds=1), resume=True)
    network.serve(second, resume=True)
    network.join()
    assert set(network.lives.values()) == {2}  # each has joined again
    records = read_records(tmp_path / "run")
    assert [record.missed for record in records] == [[]] * second.run.rounds


class DiesInRound(Callback):
    """Kills a run before the checkpoint of a round."""

    def __init__(self, number):
        self._number = number

    def on_round(self, record, moment):
        if record.round == self._number:
            raise Killed


def test_a_round_that_has_other_rates_now_is_trained_again(tmp_path, monkeypatch):
    """The rates stretch with the rounds, and the round that was open has the new."""
    first = small_run(checkpoint_every=1)
    second, network = hs.override(first, rounds=6), Network(first, tmp_path)
    die_once_all_have_finished(monkeypatch, 2)
    network.start_all()
    with pytest.raises(Killed):
        network.serve()
    network.serve(second, resume=True)
    network.join()
    simulated = tmp_path / "simulated"
    with pytest.raises(Killed):
        hs.train(first, simulated, callbacks=[DiesInRound(2)])
    hs.train(second, simulated, resume=True)
    state, own = (hs.restore(f).state for f in (simulated, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, own, state)


def test_a_round_that_diverged_is_sent_again_without_its_means(
    simulated, tmp_path, monkeypatch
):
    """Devices keep the state that they had before them; the resumed run needs it."""
    config = small_run(depth=3, cuts=("1", "2"), average="all_holders")
    network = Network(config, tmp_path)

    def diverge(results, stop_at_one, *, number):
        raise DivergenceError(0, "exit", number)

    train = sys.modules["hsee_jax.runs.train"]
    monkeypatch.setattr(train, "_check_results", diverge)
    network.start_all()
    with pytest.raises(DivergenceError):
        network.serve(hs.override(config, eval_every=2))
    monkeypatch.undo()
    network.ended = True
    network.join()
    network.ended = False
    network.start_all()
    network.serve(config, resume=True)
    network.join()
    assert_undisturbed(simulated, config, tmp_path)


def test_a_client_that_comes_late_was_absent_until_then(
    simulated, tmp_path, monkeypatch
):
    """Round 1 goes on without it, and the end is that of a client with an absence."""
    config = small_run(rounds=2)
    network, close = Network(config, tmp_path), Mailbox.close

    log, put_finish = [], Mailbox.put_finish

    def noted(self, i, number, own):
        put_finish(self, i, number, own)
        log.append(f"client {i} is done")

    def close_later(self):
        if self._number == 1:
            network.start(1)
            while 1 in self._away:  # until it calls
                time.sleep(0.02)
            log.append("closed")
        return close(self)

    monkeypatch.setattr(Deadline, "passed", lambda self, i: log == ["client 0 is done"])
    monkeypatch.setattr(Mailbox, "put_finish", noted)
    monkeypatch.setattr(Mailbox, "close", close_later)
    network.start(0)
    network.serve(patience=Patience(deadline_s=1000))
    network.join()
    assert [r.missed for r in read_records(tmp_path / "run")] == [[1], []]
    state = simulated(hs.override(config, absences=("1:1-1",)))
    jax.tree.map(
        np.testing.assert_array_equal, hs.restore(tmp_path / "run").state, state
    )


def test_a_run_that_was_not_served_does_not_go_on_with_devices(tmp_path):
    config = small_run(rounds=1)
    hs.train(config, tmp_path / "run")
    network = Network(hs.override(config, rounds=2), tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="holds no devices after round 1"):
        network.serve(resume=True)
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert after == before


def test_a_run_that_stopped_within_a_round_does_not_go_on_with_devices(tmp_path):
    config, steps = small_run(), itertools.count()
    with pytest.raises(Stopped):
        hs.train(config, tmp_path / "run", stop=lambda: next(steps) == 1)
    with pytest.raises(UserError, match="stopped within round 1, which devices"):
        Network(config, tmp_path).serve(resume=True)
