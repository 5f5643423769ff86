"""What devices send is checked, and a client whose messages are refused is left out."""

import json
import pickle
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from client_devices import small_run
from page_tables import read_table

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Metrics
from hsee_jax.deployment.forms import VERSION, Kind, Layers
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.protocol import Refusal, named, pack, split, unpack
from hsee_jax.deployment.service import Service
from hsee_jax.deployment.types import Patience
from hsee_jax.runs.participant import build_participant, own_share
from hsee_jax.runs.served import build_served, describe

PAGE, TRIED = "explanation/security.md", "What was sent"


@pytest.fixture(scope="module")
def experiment():
    return build_served(small_run())


@pytest.fixture
def mailbox():
    mailbox = Mailbox(Patience(max_refusals=2), lambda: False)
    rows = {0: [4, 4, 2], 1: [4, 4, 2]}
    mailbox.open(1, rows, Layers.NONE, last={}, means={})
    return mailbox


@pytest.fixture
def call(experiment, mailbox):
    service = Service(experiment, mailbox, "a run", bound=1e4)
    return lambda method, i, message: service.call(method, i, message, lambda: True)


def batch(rows=4, **changes):
    """The tensors of a good message, with changes."""
    good = {
        "inputs.codes": np.zeros((rows, 4), np.int8),
        "inputs.offset": np.zeros((rows, 1), np.float32),
        "inputs.step": np.full((rows, 1), 0.01, np.float32),
        "labels": np.zeros(rows, np.int32),
    }
    return good | {name.replace("_", "."): value for name, value in changes.items()}


def push(step, tensors, number=1):
    return pack({"round": number, "step": step}, tensors)


def without(name):
    tensors = batch()
    del tensors[name]
    return push(0, tensors)


def full(value):
    return np.full((4, 1), value, np.float32)


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        """Say what unpickling runs."""
        return (exec, ("raise SystemExit",))


FINISH = dict(losses=(1.0, 1.0, 0.5), correct=(1, 0, 0), counts=(4, 4, 2), layers=0)


def finish(**changes):
    own = FINISH | changes
    dtypes = (np.float32, np.int32, np.int32)
    columns = zip((own["losses"], own["correct"], own["counts"]), dtypes, strict=True)
    metrics = Metrics(*(np.array(values, dtype) for values, dtype in columns))
    return pack({"round": 1, "layers": own["layers"]}, named(metrics, "exit"))


# What a hostile client sends, and to which call; the page has the server's answers.
BATCHES = {
    "a label of -1": push(0, batch(labels=np.full(4, -1, np.int32))),
    "a label of K": push(0, batch(labels=np.full(4, 10, np.int32))),
    "features times 1,000,000": push(0, batch(inputs_step=full(1e6))),
    "a step of 1,000, which decodes to 255,000": push(
        0, batch(inputs_step=full(1e3), inputs_codes=np.full((4, 4), 127, np.int8))
    ),
    "a NaN": push(0, batch(inputs_step=full(np.nan))),
    "an infinite number": push(0, batch(inputs_offset=full(np.inf))),
    "codes of another shape": push(0, batch(inputs_codes=np.zeros((4, 5), np.int8))),
    "codes of another type": push(0, batch(inputs_codes=np.zeros((4, 4), np.uint8))),
    "fewer rows than the batch has": push(0, batch(rows=3)),
    "a tensor more": push(0, batch(client=np.zeros(1, np.int32))),
    "a tensor less": without("labels"),
    "a message that is too large": push(0, batch(inputs_codes=np.zeros(9999, np.int8))),
    "a step that has no batch": push(3, batch()),
    "a field that is no whole number": b'{"round": 1, "step": 0.5}\n',
    "another id in the message": pack({"round": 1, "step": 0, "client": 1}, batch()),
    "a pickle": pickle.dumps(Evil()),
    "a pickle behind a good first line": push(0, {}) + pickle.dumps(Evil()),
}
ENDS = {
    "more samples than the client has": finish(counts=(4, 4, 4)),
    "more right answers than samples": finish(correct=(5, 0, 0)),
    "a negative number of right answers": finish(correct=(-1, 0, 0)),
    "a negative loss": finish(losses=(-1.0, 1.0, 1.0)),
    "an infinite loss": finish(losses=(np.inf, 1.0, 1.0)),
    "layers that were not asked for": finish(layers=1),
}
HELLOS = {
    "another number of samples": pack({"samples": 99, "version": VERSION}),
    "another version": pack({"samples": -1, "version": VERSION + 1}),
}
HOSTILE = {
    name: (method, message)
    for method, messages in (("push", BATCHES), ("finish", ENDS), ("join", HELLOS))
    for name, message in messages.items()
}


def push_all(call):
    for step, rows in enumerate((4, 4, 2)):
        call("push", 0, push(step, batch(rows)))


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused(name, call, mailbox):
    """With the answer of the page; what is good is taken all the same."""
    (row,) = [row for row in read_table(PAGE, TRIED) if row["what is sent"] == name]
    method, message = HOSTILE[name]
    if method == "finish":
        push_all(call)
    with pytest.raises(Refusal) as refusal:
        call(method, 0, message)
    assert row["answer"] == f"`{refusal.value}`" and row["call"] == f"`{method}`"
    call("push", 0, push(0, batch()))
    assert mailbox.take(0, 0)["labels"].tolist() == [0, 0, 0, 0]


def test_the_page_lists_what_is_hostile():
    assert [row["what is sent"] for row in read_table(PAGE, TRIED)] == [*HOSTILE]


def test_there_is_one_message_for_a_batch(call, mailbox):
    call("push", 0, push(0, batch()))
    call("push", 0, push(0, batch(labels=np.ones(4, np.int32))))
    assert mailbox.take(0, 0)["labels"].tolist() == [0, 0, 0, 0]
    call("push", 0, push(0, batch(labels=np.ones(4, np.int32))))
    call("push", 0, push(1, batch()))
    assert mailbox.take(0, 1) is not None
    with pytest.raises(Refusal, match="step: 3 has no batch"):
        call("push", 0, push(3, batch()))


def test_what_is_out_of_turn_is_closed(call):
    for message in (push(1, batch()), push(0, batch(), number=2)):
        assert call("push", 0, message) == pack({"closed": 1})


def test_a_client_is_left_out_after_too_many_refusals(call, mailbox, caplog):
    bad = push(0, batch(labels=np.full(4, -1, np.int32)))
    for count in (1, 2, 3):
        with pytest.raises(Refusal, match="labels"):
            call("push", 0, bad)
        assert f"client 0: refused ({count}): labels" in caplog.text
    with pytest.raises(Refusal, match="client: 0 is left out after 3 refusals"):
        call("push", 0, push(0, batch()))
    assert mailbox.take(0, 0) is None  # it is late, and the round goes on
    call("push", 1, push(0, batch()))
    assert mailbox.take(1, 0) is not None
    for _ in range(3):
        with pytest.raises(Refusal, match="labels"):
            call("push", 1, push(1, batch(labels=np.full(4, -1, np.int32))))
    with pytest.raises(UserError, match="no client is left in round 1"):
        mailbox.take(1, 1)


@pytest.mark.parametrize("name", HELLOS)
def test_who_joins_by_mistake_is_not_left_out(name, call, mailbox):
    """Such as with another file: a service manager starts the device repeatedly."""
    for _ in range(9):
        with pytest.raises(Refusal, match="allowed is"):
            call("join", 0, HELLOS[name])
    call("push", 0, push(0, batch()))
    assert mailbox.take(0, 0) is not None


def test_a_round_ends_after_its_batches(call, mailbox):
    """Until then a server that began it again may even want other layers."""
    assert call("finish", 0, finish()) == pack({"closed": 1})
    assert call("finish", 0, finish(layers=1)) == pack({"closed": 1})
    push_all(call)
    assert call("finish", 0, finish(losses=(np.nan, 1, 1))) == pack({"closed": 0})
    assert mailbox.finish(0).metrics.count.tolist() == [4, 4, 2]


def test_who_joins_is_told_of_the_run_and_has_its_samples(call, experiment):
    samples = len(experiment.shards[1])
    hello = {"samples": samples, "version": VERSION}
    values = json.loads(call("join", 1, pack(hello)))
    assert values == json.loads(json.dumps({"run": "a run"} | describe(experiment, 1)))
    part = build_participant(values)
    assert (part.client, part.batch_size) == (1, 4)
    for change in (dict(samples=samples + 1), dict(version=VERSION + 1)):
        with pytest.raises(Refusal):
            call("join", 1, pack(hello | change))
    with pytest.raises(Refusal, match="client: 2 is not one of this run"):
        call("join", 2, pack(hello))


def test_who_has_samples_of_its_own_does_not_join_with_a_share(mailbox):
    service = Service(build_served(small_run(), (9, 9)), mailbox, "a run", bound=1e4)
    for samples, joins in ((9, True), (-1, False)):
        hello = pack({"samples": samples, "version": VERSION})
        with nullcontext() if joins else pytest.raises(Refusal, match="samples: -1"):
            service.call("join", 1, hello, lambda: True)


@pytest.mark.parametrize("change", [{"dtype": "int64"}, {"mean": []}, {"more": 1}])
def test_a_device_refuses_what_it_cannot_read_of_the_data(experiment, change):
    values = describe(experiment, 0)
    values["info"] |= change
    with pytest.raises(UserError, match="info: what the server says of the data"):
        build_participant(values)


@pytest.mark.parametrize("counts", [None, 3, [0] * 10])
def test_a_device_refuses_other_samples_than_those_of_the_run(experiment, counts):
    """Such as the images of the dataset in another order."""
    values = json.loads(json.dumps(describe(experiment, 0)))
    own = own_share(values)
    assert len(own.labels) == len(experiment.shards[0])
    with pytest.raises(UserError, match="gives client 0 other samples here than at"):
        own_share(values | {"label_counts": counts})


def test_a_device_imports_only_plugins_that_its_user_names(experiment):
    values = describe(experiment, 0)
    values["config"]["run"]["plugin"] = ["antigravity"]
    with pytest.raises(UserError, match="plugin: the server's run needs antigravity"):
        build_participant(values)


def test_the_first_layers_are_those_of_the_simulation(call, experiment):
    _, data = split(call("begin", 1, pack({})), (), limit=10**6)
    state = experiment.init()
    own = jax.tree.map(lambda leaf: leaf[1], state.clients[0])
    form = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in named(own, "client").items()
    }
    for name, array in unpack(data, form).items():
        np.testing.assert_array_equal(array, named(own, "client")[name])


def test_the_first_layers_are_drawn_once_for_all(call, experiment, monkeypatch):
    draws, init = [], type(experiment).init
    monkeypatch.setattr(
        type(experiment), "init", lambda self: draws.append(1) or init(self)
    )
    answers = [call("begin", i, pack({})) for i in (0, 1, 0)]
    assert answers[0] == answers[2] and len(draws) == 1


def test_a_client_waits_for_its_round(call, mailbox):
    fields, _ = split(
        call("next", 0, pack({"round": 0, "since": 0})),
        ("kind", "round", "layers", "last", "means", "about"),
    )
    assert (fields["kind"], fields["round"]) == (Kind.TRAIN, 1)
    mailbox.end(last={0: 1}, means={})
    fields, _ = split(
        call("next", 0, pack({"round": 1, "since": 0})),
        ("kind", "round", "layers", "last", "means", "about"),
    )
    assert (fields["kind"], fields["last"]) == (Kind.END, 1)
