"""Devices that keep their layers: the same run, and no layer on the wire."""

import json
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from client_devices import Network
from test_deployment import SMALL
from tiny import TINY

import hsee_jax as hs
from hsee_jax.cli import main
from hsee_jax.cli.arguments import config_parser
from hsee_jax.core.errors import UserError
from hsee_jax.deployment.box import Box
from hsee_jax.deployment.bundle import check_detached
from hsee_jax.deployment.deadline import Deadline
from hsee_jax.deployment.device import Device
from hsee_jax.deployment.forms import Kind, Layers, client_shapes
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.protocol import Closed, Refusal, pack
from hsee_jax.deployment.remote_evaluation import RemoteEvaluation, unanswered
from hsee_jax.deployment.service import Service
from hsee_jax.deployment.take_part import take_part
from hsee_jax.deployment.types import Patience
from hsee_jax.engine.scoring import Answers, score_logits
from hsee_jax.runs.history import read_records
from hsee_jax.runs.participant import build_participant
from hsee_jax.runs.served import build_served, describe

BASE = hs.override(
    SMALL, strategy="sequential", link="int8", max_test_samples=25, eval_batch_size=10
)
PRIVATE = hs.override(BASE, keep_layers_private=True)


class Wire(Network):
    """Keeps all that devices send."""

    def __init__(self, config, folder):
        super().__init__(config, folder)
        self.messages = []

    def call(self, i, method, message):
        self.messages.append((method, message))
        return super().call(i, method, message)


def serve_and_listen(config, folder, **options):
    """Serve a run to devices that are threads; return what they sent."""
    network = Wire(config, folder)
    network.start_all()
    network.serve(**options)
    network.join()
    return network.messages


def layers_on_devices(folder, number, clients=3):
    """The bytes of each array of a device's state after a round, as it is on disk."""
    import safetensors.numpy

    for i in range(clients):
        content = (folder / f"device-{i}" / f"state-{number}").read_bytes()[32:]
        arrays = safetensors.numpy.load(content.partition(b"\n")[2])
        yield [array.tobytes() for array in arrays.values() if array.nbytes >= 32]


def records(folder):
    return [r._replace(seconds=0, wall_seconds=0) for r in read_records(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a private run and of the simulation, and what devices sent."""
    folder = tmp_path_factory.mktemp("private")
    messages = serve_and_listen(PRIVATE, folder)
    hs.train(BASE, folder / "simulated")
    return folder, messages


def test_no_layer_is_on_the_wire(runs):
    folder, messages = runs
    assert {method for method, _ in messages} >= {"push", "finish", "test", "score"}
    assert not any(b'"client' in message for _, message in messages)
    sent = b"".join(message for _, message in messages)
    for layers in layers_on_devices(folder, 3):
        assert layers and not any(array in sent for array in layers)


def test_layers_are_on_the_wire_without_it(tmp_path):
    """So the test above looks for what would be there."""
    messages = serve_and_listen(hs.override(BASE, rounds=1), tmp_path)
    sent = b"".join(message for _, message in messages)
    for layers in layers_on_devices(tmp_path, 1):
        assert all(array in sent for array in layers)


def test_the_scores_are_those_of_the_simulation(runs):
    folder, _ = runs
    assert records(folder / "run") == records(folder / "simulated")
    private, simulated = (hs.restore(folder / n) for n in ("run", "simulated"))
    for i in range(3):
        jax.tree.map(
            np.testing.assert_array_equal, private.server(i), simulated.server(i)
        )
    summaries = [
        json.loads((folder / name / "summary.json").read_text())
        for name in ("run", "simulated")
    ]
    assert summaries[0]["agreement"] == summaries[1]["agreement"]


def test_what_needs_layers_says_so_and_the_rest_works(runs, capsys, tmp_path):
    run = str(runs[0] / "run")
    for words in (
        ["eval", run],
        ["gate", run],
        ["refit", run, "--out", str(tmp_path / "refit")],
        ["export", run, "--client", "0"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "kept them private" in error
    assert main(["report", run, "--out", str(tmp_path / "report")]) == 0
    restored = hs.restore(run)
    with pytest.raises(UserError, match="kept them private"):
        restored.client(0)
    assert restored.server(0).layers


def test_a_device_exports_its_client(runs, tmp_path, capsys):
    """As the client of the simulation, whose run is exported."""
    state, simulated = runs[0] / "device-1", runs[0] / "simulated"
    assert main(["export", str(state), "--out", str(tmp_path / "own")]) == 0
    assert main(["export", str(simulated), "--client", "1"]) == 0
    places = tmp_path / "own", simulated / "export" / "client-1"
    assert capsys.readouterr().out.split() == [str(place) for place in places]
    own, expected = ((p / "weights.safetensors").read_bytes() for p in places)
    assert own == expected
    own, expected = (json.loads((p / "card.json").read_text()) for p in places)
    for card in own, expected:
        del card["exit_accuracy"], card["server_accuracy"]
    assert own == expected
    for words in (["--client", "1"], ["--checkpoint", "best"], ["--width", "gated"]):
        assert main(["export", str(state), *words]) == 2
        assert "not allowed for the folder of a device" in capsys.readouterr().err
    # A device that is never drawn keeps its first layers at the end.
    never = tmp_path / "never"
    shutil.copytree(state, never)
    box = Box(never)
    part = build_participant(json.loads(box.about()))
    kept = box.load(client_shapes(part.strategy)[0], box.rounds()[-1])
    for number in box.rounds():
        (never / f"state-{number}").unlink()
    box.save(kept._replace(round=0, since=0))
    assert main(["export", str(never), "--out", str(tmp_path / "none")]) == 2
    assert "holds no trained layers yet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_private_run_goes_on(tmp_path, runs):
    """Killed after its second round, which was evaluated."""
    network = Wire(PRIVATE, tmp_path)

    class Dies(hs.runs.Callback):
        def on_round(self, record, moment):
            if record.round == 2 and network.lives[0] == 1:
                raise KeyboardInterrupt

    network.start_all()
    with pytest.raises(KeyboardInterrupt):
        network.serve(callbacks=[Dies()])
    network.serve(resume=True)
    network.join()
    assert records(tmp_path / "run") == records(runs[0] / "run")
    with pytest.raises(UserError, match="keep_layers_private: .*differ|resume"):
        hs.deployment.serve(BASE, tmp_path / "run", network._doors, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(strategy="averaging", average="servers", link="full", **TINY),
        dict(strategy="averaging", average="servers", participation=0.5),
        dict(strategy="local", link="float16"),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_strategies_have_the_same_scores(changes, tmp_path):
    config = hs.override(BASE, **changes)
    serve_and_listen(hs.override(config, keep_layers_private=True), tmp_path)
    hs.train(config, tmp_path / "simulated")
    assert records(tmp_path / "run") == records(tmp_path / "simulated")


@pytest.mark.parametrize(
    ("words", "value"), [("", True), ("true", True), ("false", False)]
)
def test_a_flag_that_is_true_or_false_needs_no_word(words, value):
    flags = ["--keep-layers-private", *words.split(), "--rounds", "3"]
    given = config_parser("serve", flags).parse(flags)
    assert given.keep_layers_private is value and given.rounds == 3


@pytest.mark.parametrize(
    "changes",
    [
        dict(strategy="averaging", average="all_holders"),
        dict(strategy="splitfed_v1", cuts=("2",)),
    ],
)
def test_an_average_of_clients_cannot_be_private(changes):
    with pytest.raises(UserError, match="keep_layers_private: true is not allowed"):
        build_served(hs.override(PRIVATE, **changes))


def test_only_devices_can_keep_layers(tmp_path):
    with pytest.raises(UserError, match="not allowed in a simulation"):
        hs.train(PRIVATE, tmp_path)
    with pytest.raises(UserError, match="one message a round"):
        check_detached(build_served(PRIVATE))


def device(experiment, answers):
    part = build_participant(describe(experiment, 0))
    data = hs.core.Dataset(np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int32))

    class NoBox:
        def rounds(self):
            return [0]

        def load(self, like, number):
            client = jax.tree.map(lambda leaf: leaf[0], experiment.init().clients[0])
            return hs.deployment.box.DeviceState(client, 0, 0)

    call = lambda method, message: answers[method]  # noqa: E731
    return Device(part, data, NoBox(), call, about=7)


def test_a_device_sends_no_layers_whatever_the_server_asks():
    task = dict(kind=Kind.TRAIN, round=1, layers=Layers.ALL, last=0, means=0, about=7)
    one = device(build_served(PRIVATE), {"next": pack(task)})
    with pytest.raises(UserError, match="keep_layers_private: the server asks"):
        one.run(lambda: False)


def test_a_device_refuses_a_run_that_asks_for_layers(tmp_path):
    experiment = build_served(BASE)
    answer = json.dumps({"run": "one"} | describe(experiment, 0)).encode()
    with pytest.raises(UserError, match="keep_layers_private: the server's run"):
        take_part(
            lambda method, message: answer, tmp_path, None, (), bool, private=True
        )


def test_the_flags_of_join_reach_the_device(tmp_path, monkeypatch, capsys):
    """The server asks for layers, so that only the flag for privacy makes it refuse."""
    answer = json.dumps({"run": "one"} | describe(build_served(BASE), 0)).encode()
    opened, taken = [], []

    @contextmanager
    def connect(*arguments, **options):
        opened.append((*arguments, options["patience_s"]))
        yield lambda method, message: answer

    def spy(call, state, data, plugins, stop, **options):
        taken.append((data, list(plugins), options["data_dir"]))
        if data is None:  # go on to what the server says
            return take_part(call, state, data, plugins, stop, **options)
        raise UserError("enough")

    monkeypatch.setattr("hsee_jax.deployment.rpc.connect", connect)
    monkeypatch.setattr(sys.modules[take_part.__module__], "take_part", spy)
    words = ["join", "there:1", "--client", "0", "--state", str(tmp_path / "state")]
    data = ["--data", "x.npz", "--data-dir", "d", "--plugin", "tiny", "--patience", "5"]
    assert main([*words, *data]) == 2
    assert main([*words, "--keep-layers-private"]) == 2
    assert "keep_layers_private: the server's run asks" in capsys.readouterr().err
    assert opened == [("there:1", None, 0, 5.0), ("there:1", None, 0, 600.0)]
    (first, second) = taken
    assert first == (Path("x.npz"), ["tiny"], "d") and second == (None, [], None)


@pytest.fixture
def service():
    experiment = build_served(PRIVATE)
    mailbox = Mailbox(Patience(max_refusals=100), lambda: False)
    mailbox.open(
        2, {0: [10, 10, 5]}, Layers.NONE, last={}, means={}, kind=Kind.EVALUATE
    )
    return Service(experiment, mailbox, "a run", bound=1000.0), mailbox


def answers_of(service, rows, **changes):
    form = service._forms[0].answers
    tensors = {n: np.ones((rows, *f.shape[1:]), f.dtype) for n, f in form.items()}
    return tensors | changes


def test_answers_are_checked_as_batches_are(service):
    service, mailbox = service

    def score(step, rows, number=2, **changes):
        message = pack(
            dict(round=number, step=step), answers_of(service, rows, **changes)
        )
        return service.call("score", 0, message, lambda: True)

    assert score(0, 10) == pack({"closed": 0}) == score(0, 10)
    for step, rows, changes in (
        (1, 9, {}),  # rows are missing
        (3, 10, {}),  # no such batch
        (1, 10, {"logits": np.ones((10, 9), np.float32)}),
        (1, 10, {"labels": np.ones(10, np.int32)}),
    ):
        with pytest.raises(Refusal):
            score(step, rows, **changes)
    assert score(1, 10, number=1) == pack({"closed": 1})  # late, from another round
    push = pack(dict(round=2, step=0), {})
    assert service.call("push", 0, push, lambda: True) == pack({"closed": 1})
    nan = np.full((10, 10), np.nan, np.float32)
    assert score(1, 10, logits=nan) == pack({"closed": 0})  # counts as wrong
    score(2, 5)
    assert mailbox.task(0, lambda: False).kind == Kind.WAIT
    with pytest.raises(Closed):
        mailbox.put_finish(0, 2, None)


def test_test_inputs_come_without_labels_and_only_to_private_devices(service):
    service, _ = service
    answer = service.call("test", 0, pack({"step": 2}), lambda: True)
    import safetensors.numpy

    tensors = safetensors.numpy.load(answer.partition(b"\n")[2])
    test = np.asarray(service._experiment.test.images)
    assert tensors.keys() == {"images"}
    np.testing.assert_array_equal(tensors["images"], test[20:])
    for step in (-1, 3):
        with pytest.raises(Refusal):
            service.call("test", 0, pack({"step": step}), lambda: True)
    public = Service(build_served(BASE), Mailbox(Patience(), bool), "one", bound=1.0)
    with pytest.raises(Refusal):
        public.call("test", 0, pack({"step": 0}), lambda: True)


def test_a_client_that_does_not_answer_has_all_wrong():
    labels = np.array([0, 2, 2, 1], np.int32)
    zeros = np.zeros((4, 3), np.float32)
    undecided = score_logits(Answers(None, zeros), zeros, labels, np.ones(4, bool))
    nan = np.full((4, 3), np.nan, np.float32)
    wrong = score_logits(Answers(None, nan), nan, labels, np.ones(4, bool))
    found = unanswered(labels, 3)
    np.testing.assert_array_equal(found.agreement, wrong.agreement)
    for part in (found.exit, found.server):
        np.testing.assert_allclose(part.loss_sum, undecided.exit.loss_sum, rtol=1e-6)
        assert (part.correct, part.count) == (0, 4)


def test_an_evaluation_goes_on_without_a_late_client():
    """Client 0 answers class 3 to everything, the others answer nothing in time."""
    experiment = build_served(PRIVATE)
    mailbox = Mailbox(Patience(), lambda: False)
    journal = SimpleNamespace(recall=lambda number: None, last={}, means={})
    service = Service(experiment, mailbox, "a run", bound=1000.0)
    logits = np.zeros((10, 10), np.float32)
    logits[:, 3] = 1

    def answer():
        while mailbox.task(0, lambda: True).kind != Kind.EVALUATE:
            continue
        for step, rows in enumerate((10, 10, 5)):
            tensors = answers_of(service, rows, logits=logits[:rows])
            message = pack(dict(round=0, step=step), tensors)
            service.call("score", 0, message, lambda: True)
        mailbox._deadline = Deadline(0.0)  # all that it waits for now is late

    device = threading.Thread(target=answer)
    device.start()
    evaluate = RemoteEvaluation(experiment, mailbox, journal)
    scores = evaluate(experiment.init(), experiment.test)
    device.join()
    right = np.mean(np.asarray(experiment.test.labels) == 3)
    assert [score.exit_accuracy for score in scores] == [right, 0, 0]
    for score in scores[1:]:
        assert score.server_accuracy == 0
        assert score.exit_loss == pytest.approx(np.log(10))
