"""What arrives from devices: in turn, in time, and not too much of it."""

import threading
import time
import weakref

import numpy as np
import pytest

from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.core.types import Metrics
from hsee_jax.deployment.deadline import Deadline
from hsee_jax.deployment.forms import Kind, Layers
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.protocol import Closed
from hsee_jax.deployment.types import Finished, Patience

DONE = Finished(Metrics(np.zeros(2), np.zeros(2), np.zeros(2)), {})


def mailbox_of(*clients, number=1, stop=lambda: False, steps=2, **patience):
    mailbox = Mailbox(Patience(**patience), stop)
    reopen(mailbox, *clients, number=number, steps=steps)
    return mailbox


def reopen(mailbox, *clients, number, steps=2):
    rows = dict.fromkeys(clients, [4] * steps)
    mailbox.open(number, rows, Layers.NONE, last={}, means={})


def put(mailbox, i, step, number=1, waits=False, tensors=None, alive=lambda: True):
    return mailbox.put(i, number, step, tensors or {}, waits=waits, alive=alive)


def test_a_client_that_is_late_is_absent_in_the_round():
    mailbox = mailbox_of(0, 1, deadline_s=0.05)
    put(mailbox, 0, 0)
    assert mailbox.take(0, 0) == {}
    assert mailbox.take(1, 0) is None
    with pytest.raises(Closed):
        put(mailbox, 1, 0)
    put(mailbox, 0, 1)
    mailbox.put_finish(0, 1, DONE)
    assert mailbox.take(0, 1) == {} and mailbox.finish(0) is DONE
    assert mailbox.close() == [0]


@pytest.mark.parametrize("waits", [False, True])
def test_a_client_is_not_late_because_the_server_waited_for_another(waits):
    """Client 0 is off. Client 1 needs half of the deadline, but for its waiting."""
    steps, asked = 8, 1.5
    mailbox = mailbox_of(0, 1, 2, steps=steps, deadline_s=asked)

    def device(i):
        for step in range(steps):
            time.sleep(asked / 2 / steps)
            put(mailbox, i, step, waits=waits)
        mailbox.put_finish(i, 1, DONE)

    threads = [threading.Thread(target=device, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for step in range(steps):
        for i in (0, 1, 2):
            assert mailbox.take(i, step) == (None if i == 0 else {})
            mailbox.answer(i, step, {})
    assert [mailbox.finish(i) for i in (0, 1, 2)] == [None, DONE, DONE]
    for thread in threads:
        thread.join(5)
    assert mailbox.close() == [1, 2]


def test_a_device_waits_once_however_many_calls_it_has_open():
    deadline = Deadline(0.3)
    with deadline.waiting(0), deadline.waiting(0):
        time.sleep(0.2)
        assert not deadline.passed(0)
    time.sleep(0.4)
    assert deadline.passed(0)


def test_a_late_client_is_not_waited_for_until_it_calls():
    mailbox = mailbox_of(0, 1, deadline_s=0.05)
    assert mailbox.take(1, 0) is None
    reopen(mailbox, 0, 1, number=2)
    with pytest.raises(Closed):
        put(mailbox, 1, 0, number=2)
    assert mailbox.task(1, lambda: False).kind == Kind.WAIT  # it calls
    reopen(mailbox, 0, 1, number=3)
    put(mailbox, 1, 0, number=3)
    assert mailbox.take(1, 0) == {}


def test_the_least_number_of_clients_is_waited_for_whatever_the_deadline():
    mailbox = mailbox_of(0, 1, 2, deadline_s=0.02, min_clients=2)
    assert mailbox.take(0, 0) is None
    later = threading.Timer(0.2, lambda: put(mailbox, 1, 0))
    later.start()
    assert mailbox.take(1, 0) == {}
    later.join()


def test_a_device_waits_until_there_is_room():
    mailbox = mailbox_of(0, steps=9)
    for step in range(4):
        put(mailbox, 0, step, tensors={"step": step})
    thread = threading.Thread(target=lambda: put(mailbox, 0, 4))
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    assert mailbox.take(0, 0) == {"step": 0}
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(Closed):  # a caller that has gone does not wait
        put(mailbox, 0, 5, alive=lambda: False)


def test_an_answer_is_given_again():
    mailbox = mailbox_of(0)
    answers = []
    ask = lambda: answers.append(put(mailbox, 0, 0, waits=True))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    assert mailbox.take(0, 0) == {}
    mailbox.answer(0, 0, {"gradient": 3})
    thread.join(5)
    ask()
    assert answers == [{"gradient": 3}] * 2


def test_answers_are_not_kept_after_the_round():
    mailbox, gradient = mailbox_of(0), np.zeros(3)
    kept = weakref.ref(gradient)
    mailbox.answer(0, 0, {"gradient": gradient})
    del gradient
    assert kept() is not None
    mailbox.close()
    assert kept() is None


def test_a_round_that_begins_again_closes_what_is_ahead_of_it():
    mailbox = mailbox_of(0)
    with pytest.raises(Closed):
        put(mailbox, 0, 1)
    with pytest.raises(Closed):
        mailbox.put_finish(0, 1, DONE)


def test_a_stop_ends_the_farewell():
    stop = threading.Event()
    mailbox = mailbox_of(0, stop=stop.is_set)
    mailbox.end(last={0: 1}, means={})
    begin = time.monotonic()
    mailbox.wait_told([0], 0.05)
    threading.Timer(0.1, stop.set).start()
    mailbox.wait_told([0], 60)
    assert time.monotonic() - begin < 30


def test_devices_are_told_of_the_end_after_a_stop_that_came_too_late():
    """The last round has ended in spite of it, so devices need not wait for another."""
    stop = threading.Event()
    mailbox = mailbox_of(0, stop=stop.is_set)
    stop.set()
    mailbox.end(last={0: 1}, means={})
    told = []

    def call():
        told.append(mailbox.task(0, lambda: True).kind)
        mailbox.note_told(0)

    threading.Timer(0.2, call).start()
    mailbox.wait_told([0], 60)
    assert told == [Kind.END]


def test_a_stop_ends_the_wait():
    stop = threading.Event()
    mailbox = mailbox_of(0, number=7, stop=stop.is_set)
    stop.set()
    with pytest.raises(Stopped, match="stopped after round 6"):
        mailbox.take(0, 0)
    with pytest.raises(Stopped, match="stopped after round 7"):
        reopen(mailbox, 0, number=8)


def test_all_are_told_of_the_end():
    mailbox = mailbox_of(0, 1)
    mailbox.end(last={0: 5}, means={})
    for i, last in ((0, 5), (1, 0)):
        task = mailbox.task(i, lambda: True)
        assert (task.kind, task.last) == (Kind.END, last)
        mailbox.note_told(i)
    mailbox.wait_told([0, 1], 60)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (dict(deadline_s=0), "deadline: 0"),
        (dict(deadline_s=float("nan")), "deadline: nan"),
        (dict(min_clients=0), "min_clients: 0 is"),
        (dict(min_clients=4), "min_clients: 4 is not allowed; allowed is 1..3"),
        (dict(min_clients=1.5), "min_clients: 1.5"),
        (dict(max_refusals=-1), "max_refusals: -1 is"),
    ],
)
def test_patience_that_makes_no_sense_is_refused(values, error):
    Patience(1.5, 3, 0).check(3)
    with pytest.raises(UserError, match=error):
        Patience(**values).check(3)
