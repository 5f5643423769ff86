"""A device without JAX: its messages, what its segment computes, and a run with it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from client_devices import Network
from tiny import TINY, write_run

import hsee_jax as hs
from hsee_jax.cli import main
from hsee_jax.core.errors import UserError
from hsee_jax.data.npz import write_shard
from hsee_jax.data.pipeline import normalize
from hsee_jax.deployment import frozen, protocol
from hsee_jax.deployment.export import export_client
from hsee_jax.deployment.rpc import open_port
from hsee_jax.engine.plan import own_batches
from hsee_jax.federation import forward
from hsee_jax.federation.crossing import decode, encode
from hsee_jax.nn import NETWORKS
from hsee_jax.nn.losses import masked_cross_entropy
from hsee_jax.runs import restore_client
from hsee_jax.runs.history import read_records
from hsee_jax.runs.material import shares
from hsee_jax.runs.served import build_served

BASE = hs.override(
    hs.preset("demo"),
    network="mlp",
    depth=3,
    hidden=8,
    num_clients=1,
    cuts=("2",),
    strategy="sequential",
    link="float16",
    max_train_samples=26,
    max_test_samples=25,
    eval_batch_size=10,
    batch_size=8,
    rounds=2,
    eval_every=1,
    checkpoint_every=1,
)
PRIVATE = hs.override(BASE, keep_layers_private=True)


def test_its_messages_are_those_of_the_protocol():
    rng = np.random.default_rng(0)
    tensors = {
        "inputs.codes": rng.integers(-128, 127, (3, 2, 2), np.int8),
        "inputs.offset": rng.normal(size=(3, 1, 1)).astype(np.float32),
        "half": rng.normal(size=5).astype(np.float16),
        "labels": np.arange(3, dtype=np.int32),
        "empty": np.zeros((0, 4), np.uint8),
    }
    form = protocol.form_of(tensors)
    form = {name.strip("[']"): leaf for name, leaf in form.items()}
    fields, data = protocol.split(
        frozen.pack({"round": 3, "step": 0}, tensors), ("round", "step"), limit=10**4
    )
    assert fields == {"round": 3, "step": 0}
    ours = protocol.pack({"kind": 2}, tensors)
    for found in (protocol.unpack(data, form), frozen.unpack(ours)[1]):
        assert found.keys() == tensors.keys()
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert frozen.unpack(ours)[0] == {"kind": 2}
    assert frozen.pack({"step": 1}) == protocol.pack({"step": 1})
    assert frozen.unpack(protocol.pack({"closed": 1})) == ({"closed": 1}, {})


def test_its_scores_are_those_of_an_exit():
    rng = np.random.default_rng(0)
    logits = 5 * rng.normal(size=(7, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 7).astype(np.int32)
    labels[0] = 0  # the arg max of a row of NaN
    for first in (logits[0, 0], np.nan, np.inf, -np.inf):
        logits[0, 0] = first
        expected = masked_cross_entropy(logits, labels, np.ones(7, bool))[1]
        found = frozen.exit_scores(logits, labels)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("package", ["onnxruntime", "grpc"])
def test_a_package_that_is_missing_is_one_line(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "grpc":
        monkeypatch.setattr(frozen, "Segment", lambda _: SimpleNamespace(card={}))
        monkeypatch.setattr(frozen, "read_samples", lambda *_: None)
    words = ["localhost:1", "--client", "0", "--data", str(tmp_path / "x.npz")]
    assert frozen.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("frozen: ") and package in line


def test_samples_that_the_segment_does_not_take_are_refused(tmp_path):
    card = {"input": {"shape": [2, 2, 1], "dtype": "uint8"}, "classes": 3}
    path, x = tmp_path / "data.npz", np.zeros((2, 2, 2, 1), np.uint8)
    np.savez(path, x=x, y=[0, 2])
    assert frozen.read_samples(path, card).labels.dtype == np.int32
    for bad, message in (
        (dict(x=x, y=[0, 3]), "labels in 0..2"),
        (dict(x=x, y=[0.0, 1.0]), "labels in 0..2"),
        (dict(x=x[..., 0], y=[0, 1]), r"x is uint8\[2, 2, 2\]; allowed is uint8\[2, 2"),
        (dict(x=x.astype(np.float32), y=[0, 1]), "x is float32"),
        (dict(x=x, y=3), r"x is uint8\[2, 2, 2, 1\]; allowed is uint8\[1, 2, 2, 1\]"),
        (dict(x=x), "cannot be read as x and y"),
    ):
        np.savez(path, **bad)
        with pytest.raises(frozen.Failure, match=message):
            frozen.read_samples(path, card)
    for content in (path.read_bytes()[:-40], b"", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(frozen.Failure, match="cannot be read as x and y"):
            frozen.read_samples(path, card)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("192.0.2.1:7 --client 0", "not allowed without --keys"),
        ("localhost:7", "client: is needed"),
        ("localhost:7 --keys /nowhere", "keys: .*No such file"),
    ],
)
def test_an_address_needs_keys(words, message):
    address, *rest = words.split()
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    keys = given.get("--keys")
    with pytest.raises(frozen.Failure, match=message):
        frozen.connect(
            address,
            None if keys is None else frozen.Path(keys),
            int(given["--client"]) if "--client" in given else None,
            1.0,
        )


def test_a_call_that_was_damaged_on_its_way_is_repeated(monkeypatch):
    grpc = pytest.importorskip("grpc")
    codes = [grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE]

    class Damaged(grpc.RpcError):
        def code(self):
            return codes.pop(0)

        def details(self):
            return "bad record"

    def function(message, timeout, metadata):
        if codes:
            raise Damaged
        return message

    channel = SimpleNamespace(unary_unary=lambda method: function)
    monkeypatch.setattr(grpc, "insecure_channel", lambda address, options: channel)
    monkeypatch.setattr(frozen, "_PAUSE_S", 0.01)
    call = frozen.connect("localhost:7", None, 0, 60.0)
    assert call("next", b"x") == b"x" and not codes


def test_onnx_without_its_packages_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    write_run(tmp_path, BASE)
    assert main(["export", str(tmp_path), "--client", "0", "--onnx"]) == 2
    assert "onnx: needs a package; `pip install 'hsee-jax[onnx]'`" in (
        capsys.readouterr().err
    )


@pytest.fixture
def converter():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")


def exported(folder, config):
    """A run with a checkpoint of noise, and the export of its client 0."""
    write_run(folder, config)
    return export_client(folder, 0, onnx=True)


class ByJax:
    """What the segment of client 0 of a run answers, by JAX and without ONNX."""

    def __init__(self, folder):
        place = export_client(folder, 0)
        self.card = json.loads((place / "card.json").read_text())
        self.spec, self.client = restore_client(folder, 0)
        info = hs.runs.folder.read_info(folder)

        @jax.jit
        def answer(samples):
            inputs, mask = normalize(samples, info.mean, info.std), jnp.ones(8, bool)
            features, logits, _ = forward(
                self.spec, self.client, inputs, mask, train=False
            )
            sent, _ = encode(self.spec, self.client, features, mask)
            return {"inputs": sent, "logits": logits}

        self.answer = answer

    def __call__(self, samples):
        """Answer eight at a time, so that one program is compiled."""
        parts = []
        for begin in range(0, len(samples), 8):
            some = samples[begin : begin + 8]
            padded = np.concatenate(
                [some, np.zeros_like(some, shape=(8, *some.shape[1:]))]
            )
            found = self.answer(padded[:8])
            parts.append(
                {name: np.asarray(a)[: len(some)] for name, a in found.items()}
            )
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


@pytest.fixture(params=["jax", "onnx"])
def segment(tmp_path, request):
    if request.param == "onnx":
        request.getfixturevalue("converter")
        return frozen.Segment(exported(tmp_path / "trained", BASE))
    write_run(tmp_path / "trained", BASE)
    return ByJax(tmp_path / "trained")


def expected_answers(folder, images, link):
    """Decoded features and logits of client 0 of a run, by JAX."""
    spec, client = restore_client(folder, 0)
    info = hs.runs.folder.read_info(folder)
    inputs = normalize(images, info.mean, info.std)
    mask = jnp.ones(len(images), bool)
    features, logits, _ = jax.jit(
        lambda x: forward(spec, client, x, mask, train=False)
    )(inputs)
    return decode(spec, encode(spec, client, features, mask)[0]), logits


NETWORK_OPTIONS = {
    "tiny": dict(TINY, cuts=("3",)),
    "mlp": dict(depth=3, hidden=8, cuts=("2",)),
    "conv1d": dict(cuts=("2",), dataset="npz"),
    "sian": dict(cuts=("1",), dataset="npz"),
    "resnet18": dict(width=4, cuts=("6",), exit_head="bn_linear"),
    "resnet34": dict(width=4, cuts=("5",), norm="group"),
    "resnet50": dict(width=4, cuts=("4",)),
    "mobilenet_v2": dict(cuts=("5",)),
    "mobilenet_v3_small": dict(cuts=("5",)),
    "vit": dict(cuts=("2",)),
}


OWN = [n for n in NETWORKS if NETWORKS[n].make.__module__.startswith("hsee_jax.")]


@pytest.mark.slow
@pytest.mark.parametrize("link", ["full", "int8"])
@pytest.mark.parametrize("network", sorted([*OWN, "tiny"]))
def test_onnx_answers_as_jax_does(network, link, tmp_path, converter):
    options = NETWORK_OPTIONS[network]
    if options.get("dataset") == "npz":
        rng = np.random.default_rng(0)
        shape = (20, 16) if network == "sian" else (20, 16, 2)
        x, y = rng.normal(size=shape).astype(np.float32), np.arange(20) % 3
        hs.data.write_npz(tmp_path / "data", (x, y, x, y))
        options = options | {"data_dir": str(tmp_path / "data")}
    config = hs.override(
        hs.preset("demo"), **{"network": network} | options, num_clients=1, link=link
    )
    one = frozen.Segment(exported(tmp_path / "run", config))
    shape, dtype = one.card["input"]["shape"], one.card["input"]["dtype"]
    samples = (40 * np.random.default_rng(1).random((5, *shape))).astype(dtype)
    features, logits = expected_answers(tmp_path / "run", samples, link)
    scale = float(jnp.max(jnp.abs(features)))
    step = np.ptp(features) / 255 if link == "int8" else 0  # a level up or down
    for count in (5, 1):
        found = one(samples[:count])
        np.testing.assert_allclose(
            found.pop("logits"), logits[:count], rtol=1e-4, atol=1e-4
        )
        if link == "full":
            decoded = found["inputs"]
        else:
            levels = found["inputs.codes"].astype(np.float32) + 128
            decoded = found["inputs.offset"] + found["inputs.step"] * levels
        np.testing.assert_allclose(
            decoded, features[:count], rtol=1e-4, atol=1e-5 * scale + 1.01 * step
        )


class Mixed(Network):
    """Client 0 is frozen, all others train."""

    segment = None

    def _live(self, i):
        if i > 0:
            return super()._live(i)
        data = self._data[0]
        samples = frozen.Samples(data.images, data.labels.astype(np.int32))
        call = lambda method, message: self.call(0, method, message)  # noqa: E731
        try:
            frozen.FrozenDevice(self.segment, samples, call).run()
        except BaseException as error:
            self.failures.append(error)


def serve_frozen(config, folder, segment):
    network = Mixed(config, folder)
    network.segment = segment
    network.start_all()
    summary = network.serve()
    network.join()
    return summary


def reference(config, trained):
    """The server after a run with client 0 alone, by JAX and without a network."""
    experiment = build_served(config)
    strategy = experiment.strategy
    state = experiment.store.to_checkpoint(experiment.init())
    spec, client = restore_client(trained, 0)
    server, data = state.servers[0], shares(config)[0]
    serve = jax.jit(strategy.halves.serve, static_argnames="group")
    for number, rates in enumerate(experiment.learning_rates):
        indices, mask = own_batches(
            np.arange(len(data.labels), dtype=np.int32),
            (len(rates), experiment.batch_size),
            seed=config.run.data_seed,
            client=0,
            number=number,
        )
        for rows, real, rate in zip(indices, mask, rates, strict=True):
            inputs = normalize(
                data.images[rows], experiment.info.mean, experiment.info.std
            )
            features, _, _ = forward(spec, client, inputs, real, train=False)
            message, _ = encode(spec, client, features, real)
            batch = hs.Batch(message, data.labels[rows].astype(np.int32), real)
            server = serve(server, batch, rate, group=0).server
    return server


def test_a_server_trains_on_the_features_of_a_frozen_device(tmp_path, segment):
    summary = serve_frozen(PRIVATE, tmp_path, segment)
    expected = reference(PRIVATE, tmp_path / "trained")
    server = hs.restore(tmp_path / "run").server(0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        server,
        expected,
    )
    test = build_served(PRIVATE).test
    _, logits = expected_answers(tmp_path / "trained", test.images, "float16")
    right = float(np.mean(np.argmax(logits, axis=1) == test.labels))
    records = read_records(tmp_path / "run")
    for scores in (summary.scores, *(record.test for record in records)):
        assert scores.clients[0].exit_accuracy == pytest.approx(right)
    assert records[0].train.exit_accuracy == records[1].train.exit_accuracy


def test_it_learns_of_other_test_batches():
    """Of a server that was resumed while it waited."""
    config = {
        "clients": {"link": "full", "keep_layers_private": True},
        "model": {"network": "mlp"},
    }
    run = dict(config=config, cut=1, test_samples=10, test_batch_size=10)
    rounds, told = [frozen._EVALUATE, frozen._EVALUATE, frozen._END], []

    def call(method, message):
        fields, tensors = frozen.unpack(message)
        if method == "join":
            return json.dumps(run).encode()
        if method == "next":
            return frozen.pack({"kind": rounds.pop(0), "round": 2})
        if method == "test":
            return frozen.pack(
                {}, {"images": np.zeros((run["test_batch_size"], 1), "f4")}
            )
        told.append((fields["step"], len(tensors["logits"])))
        if len(told) == 1:
            run["test_batch_size"] = 5
        return frozen.pack({"closed": 0})

    def segment(images):
        return {"logits": images}

    segment.card = dict(cut=1, network="mlp", features=dict(link="full"))
    samples = frozen.Samples(np.zeros((3, 1)), np.zeros(3, np.int32))
    frozen.FrozenDevice(segment, samples, call).run()
    assert told == [(0, 10), (0, 5), (1, 5)]


@pytest.mark.slow
def test_devices_with_and_without_jax_train_together(tmp_path, segment):
    config = hs.override(PRIVATE, num_clients=3, cuts=("2", "1"), link="float16")
    summary = serve_frozen(config, tmp_path, segment)
    assert [client.cut for client in summary.scores.clients] == [2, 1, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BASE, "run: the server asks for layers"),
        (hs.override(PRIVATE, link="int8"), "segment: has link float16; allowed is"),
        (hs.override(PRIVATE, cuts=("1",)), "segment: has cut 2; allowed is 1"),
    ],
)
def test_a_segment_for_another_run_is_refused(tmp_path, segment, config, message):
    with pytest.raises(frozen.Failure, match=message):
        serve_frozen(config, tmp_path / "other", segment)


ALONE = """
import runpy, sys
for name in ("jax", "jaxlib", "flax", "optax", "hsee_jax", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    found = {name.partition(".")[0] for name, m in sys.modules.items() if m}
    assert not found & {"jax", "flax", "hsee_jax"}
    print(*sorted(found & {"grpc", "numpy", "onnxruntime"}))
"""


@pytest.mark.slow
def test_the_program_needs_no_jax(tmp_path, converter):
    """Its file, beside the segment, over gRPC."""
    place = exported(tmp_path / "trained", BASE)
    data = tmp_path / "data.npz"
    write_shard(data, shares(PRIVATE)[0])
    processes = []

    def doors(service):
        from contextlib import contextmanager

        @contextmanager
        def opened():
            with open_port(service, "127.0.0.1:0", None) as port:
                words = [str(place / "frozen.py"), f"127.0.0.1:{port}"]
                words += ["--client", "0", "--data", str(data)]
                process = subprocess.Popen(
                    [sys.executable, "-c", ALONE, *words],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                processes.append(process)
                yield

        return opened()

    def stop():
        return any(process.poll() for process in processes)

    hs.deployment.serve(PRIVATE, tmp_path / "run", doors, stop=stop)
    said = processes[0].communicate(timeout=60)[0]
    assert processes[0].returncode == 0, said
    assert said == "grpc numpy onnxruntime\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 2


def test_a_link_with_a_state_cannot_be_exported(tmp_path, converter):
    config = hs.override(BASE, link="topk")
    write_run(tmp_path, config)
    with pytest.raises(UserError, match="onnx: this link keeps a state"):
        export_client(tmp_path, 0, onnx=True)
