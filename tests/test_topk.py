"""The largest values of a sample, against NumPy's sort and the bytes of arrays."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds import KEY, assert_same, branches, train
from tiny import DenseLayer, tiny_federation, tiny_model, tiny_shards

from hsee_jax import cli
from hsee_jax.algorithms import averaging, sequential
from hsee_jax.core import UserError
from hsee_jax.federation import encode, encode_for_evaluation
from hsee_jax.link import CODECS, FULL, topk, unpack_bytes
from hsee_jax.runs import read_history
from hsee_jax.systems.replanning import plan_rounds
from hsee_jax.systems.traffic import traffic_of, training_bytes

MODEL = tiny_model((DenseLayer(8), DenseLayer(5)))
SAMPLE = jax.ShapeDtypeStruct((1, 4, 5), jnp.float32)


def cross(codec, values, state=None, mask=None):
    """What arrives, the bytes of each sample, and the new state."""
    state = codec.init(SAMPLE) if state is None else state
    mask = jnp.ones(len(values), bool) if mask is None else mask
    message, state = jax.jit(codec.encode)(values, state, mask)
    return np.asarray(codec.decode(message, values.dtype)), codec.nbytes(message), state


def noise(count=3, seed=0):
    values = np.random.default_rng(seed).normal(size=(count, 4, 5))
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize(("share", "kept"), [(0.01, 1), (0.3, 6), (0.31, 7), (1.0, 20)])
def test_the_largest_cross_and_their_error_is_bounded(share, kept):
    """Each value with 4 bytes and a place of 2; at most 1 - k/n of the energy lacks."""
    values = noise()
    arrived, sizes, _ = cross(topk(keep_share=share), values)
    assert sizes.tolist() == [6 * kept] * 3
    for sent, got in zip(np.asarray(values), arrived, strict=True):
        order = np.argsort(-np.abs(sent), axis=None)
        expected = np.zeros(20, np.float32)
        expected[order[:kept]] = sent.ravel()[order[:kept]]
        np.testing.assert_array_equal(got.ravel(), expected)
        energy = np.sum((sent - got) ** 2) / np.sum(sent**2)
        assert energy <= 1 - kept / 20
    if share == 1:
        np.testing.assert_array_equal(arrived, values)


def test_many_features_have_longer_places():
    shape = jax.ShapeDtypeStruct((1, 70_000), jnp.float32)
    codec = topk(keep_share=1e-4)
    values = jnp.arange(70_000, dtype=jnp.float32)[None]
    message, _ = codec.encode(values, codec.init(shape), jnp.ones(1, bool))
    assert message.places[0].tolist() == list(range(69_999, 69_992, -1))
    assert codec.nbytes(message).tolist() == [7 * 8]


def test_a_faster_link_keeps_more():
    """Speeds 1, 3, 2, 30 of the slowest with .1: k = 2, 6, 4, and everything."""
    codec = topk(keep_share=0.1, link_rates=(2.0, 6.0, 4.0, 60.0))
    values, kept = noise(), []
    for client in range(5):
        state = codec.init_client(SAMPLE, jnp.int32(client))
        arrived, sizes, _ = cross(codec, values, state)
        kept.append(np.count_nonzero(arrived, axis=(1, 2)).tolist())
        assert sizes.tolist() == [6 * n for n in kept[-1]]
    assert kept == [[n] * 3 for n in (2, 6, 4, 20, 2)]
    assert codec.init(SAMPLE).kept == 2
    assert topk(keep_share=0.1, link_rates=(3.0, 3.0)).init_client is None


def test_feedback_makes_good_what_was_missed():
    """The mean error of the real rows is added to the next batch; by hand, twice."""
    codec = topk(keep_share=0.2, error_feedback=True)
    error, state = np.zeros((4, 5)), codec.init(SAMPLE)
    mask = jnp.arange(3) < 2
    for seed in range(2):
        values = noise(seed=seed)
        wanted = np.asarray(values) + error
        arrived, _, state = cross(codec, values, state, mask)
        for sent, got in zip(wanted, arrived, strict=True):
            largest = np.sort(np.abs(sent), axis=None)[-4:]
            np.testing.assert_allclose(
                np.sort(np.abs(got), axis=None)[-4:], largest, rtol=1e-5
            )
        error = (wanted - arrived)[:2].mean(axis=0)
        np.testing.assert_allclose(state.error[0], error, rtol=1e-4, atol=1e-6)
    # what is sent again and again arrives in full, on average
    ones, total, state = jnp.ones((1, 4, 5)), 0, codec.init(SAMPLE)
    for _ in range(50):
        arrived, _, state = cross(codec, ones, state)
        total = total + arrived
    np.testing.assert_allclose(total / 50, ones, atol=0.1)


def test_the_error_of_training_does_not_reach_other_samples():
    codec = topk(keep_share=0.2, error_feedback=True)
    federation = tiny_federation({0: 1}, MODEL)._replace(codec=codec)
    spec, _ = federation.specs(0)
    (stack,) = averaging(federation).init(KEY).clients
    client = jax.tree.map(lambda leaf: leaf[0], stack)
    fresh = client.link
    trained = client.replace(link=fresh._replace(error=fresh.error + 9.0))
    features = jax.random.normal(KEY, (3, *fresh.error.shape[1:]))
    mask = jnp.ones(3, bool)
    expected, _ = encode(spec, client, features, mask)
    for one in (client, trained):
        found = encode_for_evaluation(spec, one, features, mask)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.any(encode(spec, trained, features, mask)[0].places != expected.places)


@pytest.mark.parametrize(
    "together", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_the_gradient_comes_down_as_the_largest_values(together):
    """A client's step with a joint boundary, put together by hand."""
    codec = topk(keep_share=0.4)
    federation = tiny_federation({0: 1}, MODEL)._replace(codec=codec)
    turn = {"turn": "together"} if together else {}
    strategy = sequential(federation, boundary="joint", **turn)
    shards = tiny_shards({0: 4})
    state, log = train(strategy, federation, shards, axis="vmap", rounds=1)
    assert unpack_bytes(log[0][2].link)[0].tolist() == [4 * (4 * 6 + 4), 4 * 4 * 6]
    plain = federation._replace(codec=codec._replace(gradient=FULL))
    other = sequential(plain, boundary="joint", **turn)
    full, log = train(other, plain, shards, axis="vmap", rounds=1)
    assert unpack_bytes(log[0][2].link)[0, 1] == 4 * 8 * 4
    (client, server), (whole, same) = (
        branches(plain, one, end)[0] for one, end in ((strategy, state), (other, full))
    )
    assert_same(server, same, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_same(client.layers[0].params, whole.layers[0].params, rtol=1e-3)


def test_both_forms_of_the_engine_agree_and_bytes_are_those_sent():
    """Clients 4, 1, 6 and 5 with links of speed 1, 2, 1 and 2, by their ids."""
    cuts, sizes = {4: 1, 1: 2, 6: 1, 5: 1}, {4: 7, 1: 3, 6: 9, 5: 6}
    codec = topk(keep_share=0.3, link_rates=(1.0, 2.0), error_feedback=True)
    federation = tiny_federation(cuts, MODEL)._replace(codec=codec)
    strategy, results = averaging(federation), []
    for axis in ("loop", "vmap"):
        state, log = train(strategy, federation, tiny_shards(sizes), axis=axis)
        results.append(branches(federation, strategy, state))
    assert_same(*results, rtol=1e-3, atol=1e-4)
    plan, _, metrics = log[0]
    found = dict(
        zip(plan.ids.tolist(), unpack_bytes(metrics.link)[:, 0].tolist(), strict=True)
    )
    kept = {4: 3, 1: 3, 6: 3, 5: 5}  # of 8, 5, 8 and 8 features
    assert found == {i: sizes[i] * (6 * kept[i] + 4) for i in cuts}
    shapes = jax.eval_shape(strategy.init, KEY)
    traffic = traffic_of(federation, strategy, shapes)
    assert [one.sample.up_bytes for one in traffic] == [6 * 3 + 4, 6 * 2 + 4]
    own = {i: one.of(i).sample.up_bytes for one in traffic for i in one.own}
    assert own == {i: 6 * kept[i] + 4 for i in cuts}


def test_options_reach_the_codec_and_are_checked():
    codec = CODECS.make("topk", options={"keep_share": 0.5, "error_feedback": True})
    assert codec.init(SAMPLE).kept == 10
    assert training_bytes(SAMPLE, codec, "joint") == (64, 60)
    for name, value in (("keep_share", 0.0), ("link_rates", (1.0, -2.0))):
        with pytest.raises(UserError, match=f"{name}: .* is not allowed"):
            CODECS["topk"].options[name].checked(value)


# Computing takes no time and draws nothing; the joules are the seconds of sending.
FLEET = """\
name,up_bytes_per_s,forward_flops_per_s,busy_watts,sending_watts,receiving_watts,idle_watts
slow,1e6,1e18,0,1,0,0
fast,3e6,1e18,0,1,0,0
"""
# Of the 20 features behind each layer the slow client keeps 2, the fast one 6. A batch
# of 8 sends them with places of 2 bytes, and labels of 4.
BATCH = 8 * (6 * 2 + 4), 8 * (6 * 6 + 4)
RATES = ["--devices", "fleet.csv", "--link-rates-from-devices"]
TOPK = ["--link", "topk", "--keep-share", "0.1"]
SMALL = "--network mlp --depth 2 --hidden 20 --strategy sequential --batch-size 8"
SMALL += " --max-train-samples 20 --max-test-samples 8 --validation-share 0.2"
SMALL += " --rounds 1"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A folder with a file of devices."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "fleet.csv").write_text(FLEET)
    return folder


@pytest.fixture(scope="module")
def run(fleet):
    """A run of one step of each client."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(fleet)
        words = [*SMALL.split(), "--num-clients", "2", "--cuts", "1", *TOPK, *RATES]
        assert cli.main(["train", *words, "--out", "run"]) == 0
    return fleet / "run"


def test_rates_are_those_of_the_devices(run):
    """The configuration, the bytes of the run, and the clock, by hand."""
    config = json.loads((run / "config.json").read_text())
    assert config["clients"]["link_rates"] == [1e6, 3e6]
    history = read_history(run)
    (record,) = history.records
    assert record.link == (sum(BATCH), 0)
    (cut,) = history.summary.link.cuts
    assert cut["step"]["up_bytes"] == cut["round"]["up_bytes"] == sum(BATCH) / 2
    sending = BATCH[0] / 1e6 + BATCH[1] / 3e6
    assert record.simulated.joules == pytest.approx(sending)


@pytest.mark.slow
def test_the_gate_counts_what_each_client_sends(run, capsys):
    capsys.readouterr()
    assert cli.main(["gate", str(run), "--json"]) == 0
    clients = json.loads(capsys.readouterr().out)["curve"]["clients"]
    for client, size in zip(clients, (6 * 2, 6 * 6), strict=True):
        point = client["points"][0]
        assert point["on_device"] < 1
        assert point["bytes"] == pytest.approx((1 - point["on_device"]) * size)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_the_planner_counts_what_each_client_sends(command, fleet, monkeypatch):
    seen = []

    def plan_cuts(problem, *_):
        seen.append(problem)
        raise UserError("enough")

    module = {"train": "plan_file", "plan": "plan"}[command]
    monkeypatch.setattr(f"hsee_jax.cli.{module}.plan_cuts", plan_cuts)
    monkeypatch.chdir(fleet)
    words = [command, *SMALL.split(), *TOPK, *RATES, "--boundary", "joint"]
    words += ["--cuts", "auto"] if command == "train" else []
    assert cli.main([*words, "--out", "never"]) == 2
    (problem,) = seen
    work = problem.work(np.array([1, 2]))
    assert work.up_bytes.tolist() == [*BATCH]
    assert work.down_bytes.tolist() == [size - 8 * 4 for size in BATCH]
    fast = plan_rounds(problem, rounds=1, every=1, present=lambda _: [False, True])
    sending = (2 * BATCH[1] - 8 * 4) / 3e6
    assert fast.seconds[0] == pytest.approx(sending, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TOPK, RATES[2]], "devices: missing; link_rates_from_devices needs"),
        (RATES, "link_rates_from_devices: has no effect on link full; allowed is topk"),
        ([*TOPK, *RATES, "--link-rates", "1"], "link_rates: is not allowed together"),
        (
            [*TOPK, "--devices", "no.csv", RATES[2]],
            "devices: no.csv, line 2: up_bytes_per_s: missing",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_rates_that_cannot_be_are_refused(
    command, words, message, fleet, monkeypatch, capsys
):
    monkeypatch.chdir(fleet)
    (fleet / "no.csv").write_text("name,forward_flops_per_s\nold,1e9\n")
    assert cli.main([command, *SMALL.split(), *words, "--out", "never"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(message, line), line
    assert not (fleet / "never").exists()


def test_there_is_a_client_for_every_rate(tmp_path, capsys):
    """A rate of no client would change the shares of all others."""
    words = [*SMALL.split(), "--num-clients", "2", "--cuts", "1", *TOPK]
    words += ["--link-rates", "10", "20", "1", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words]) == 2
    assert capsys.readouterr().err == (
        "hsee: link_rates: 3 speeds are not allowed for 2 clients; allowed are as many "
        "or fewer\n"
    )
    assert not (tmp_path / "run").exists()
