"""Clients and server that share nothing but messages, and equal the simulation."""

import os

import jax
import numpy as np
import pytest
from client_devices import Network, serve_in_process
from tiny import TINY

import hsee_jax as hs
from hsee_jax.cli import main
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import ExitMetrics, Metrics
from hsee_jax.deployment.server import over_network
from hsee_jax.deployment.types import PATIENT
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.runs.history import read_records
from hsee_jax.runs.participant import build_participant
from hsee_jax.runs.records import round_record
from hsee_jax.runs.served import build_served, describe
from hsee_jax.systems.traffic import Bytes

SMALL = hs.override(
    hs.preset("demo"),
    network="mlp",
    depth=3,
    hidden=8,
    num_clients=3,
    cuts=("1", "2"),
    max_train_samples=50,
    max_test_samples=20,
    batch_size=6,
    rounds=3,
    eval_every=2,
    checkpoint_every=2,
    partition="quantity",
)
TRIMMED = {"weights": "uniform", "aggregate": "trimmed_mean", "trim_share": 0.34}


def both(config, tmp_path):
    """The states and the records of a run on devices, and of the simulation."""
    serve_in_process(config, tmp_path)
    hs.train(config, tmp_path / "simulated")
    for name in ("run", "simulated"):
        records = read_records(tmp_path / name)
        plain = [r._replace(seconds=0, wall_seconds=0) for r in records]
        yield hs.restore(tmp_path / name).state, plain


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_equal_runs(config, tmp_path):
    served, simulated = both(config, tmp_path)
    assert_same(served[0], simulated[0])
    assert served[1] == simulated[1]


def test_a_run_on_devices_equals_the_simulation(tmp_path):
    assert_equal_runs(hs.override(SMALL, link="int8"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(strategy="sequential", link="float16"),
        dict(strategy="sequential", turn="epoch", link="int8"),
        dict(strategy="averaging", average="servers", period=2),
        dict(strategy="averaging", average="servers", link="float16"),
        dict(strategy="averaging", link="full", augment="crop"),
        dict(strategy="local"),
        dict(strategy="averaging", participation=0.5, num_clients=5, link="int8"),
        dict(strategy="sequential", participation=0.5, num_clients=5),
        dict(strategy="averaging", absences=("1:2-2",)),
        dict(strategy="averaging", optimizer_state="average", **TINY),
        dict(strategy="averaging", micro_batches=2, init="per_client"),
        dict(strategy="averaging", exits="all"),
        dict(strategy="averaging", **TRIMMED),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_detached_strategy_equals_the_simulation(changes, tmp_path):
    assert_equal_runs(hs.override(SMALL, **changes), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0",
    reason="the kernels differ only in programs as users get them, see conftest",
)
def test_a_wide_network_on_devices_equals_the_simulation(tmp_path):
    """LLVM compiles a kernel of it otherwise where it stands in another program."""
    changes = dict(width=64, num_clients=3, batch_size=32, max_train_samples=96)
    config = hs.override(hs.preset("demo"), **changes, rounds=1, max_test_samples=8)
    assert_equal_runs(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(strategy="splitfed_v1", cuts=("2",), link="float16"),
        dict(strategy="splitfed_v2", cuts=("2",)),
        dict(strategy="sequential", boundary="joint", exit_gradient=0.5, turn="epoch"),
        dict(strategy="averaging", boundary="joint", participation=0.5),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_joint_boundary_equals_the_simulation_up_to_rounding(changes, tmp_path):
    """The client's step is two programs there, with the link between them."""
    served, simulated = both(hs.override(SMALL, **changes), tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        served[0],
        simulated[0],
    )
    for own, other in zip(served[1], simulated[1], strict=True):
        assert (own.images, own.link) == (other.images, other.link)
        np.testing.assert_allclose(own.train, other.train, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (dict(strategy="fedavg", cuts=("3",)), "strategy: fedavg is not allowed"),
        (dict(strategy="averaging", period_unit="steps"), "period_unit: steps"),
        (dict(recuts=("2:1",)), "recuts: not allowed with clients on a network"),
        (dict(pretrained="w.safetensors"), "pretrained: not allowed with clients on"),
        (dict(refit_exits_every=1), "refit_exits_every: not allowed with clients on"),
        (dict(link="topk"), "link: topk is not allowed with clients on a network"),
        (dict(partition="views"), "partition: views is not allowed with clients on"),
    ],
)
def test_what_devices_cannot_do_is_refused(changes, error):
    with pytest.raises(UserError, match=error):
        build_served(hs.override(SMALL, **changes))


def test_flags_of_the_server_reach_it(monkeypatch, tmp_path, capsys):
    """Its patience, the bound of features, and the samples of the clients."""
    found = {}

    def serve(config, folder, doors, **options):
        found.update(options, config=config)
        raise UserError("run: enough")

    monkeypatch.setattr("hsee_jax.deployment.reception.serve", serve)
    words = "serve --listen localhost:0 --num-clients 2 --cuts 1 --samples 4 9"
    limits = "--min-clients 2 --max-refusals 7 --feature-bound 9.5 --deadline 3"
    assert main([*words.split(), *limits.split(), "--out", str(tmp_path / "x")]) == 2
    assert found["samples"] == [4, 9]
    assert found["bound"] == 9.5
    assert (found["patience"].min_clients, found["patience"].max_refusals) == (2, 7)
    assert found["config"].clients.deadline == 3.0
    capsys.readouterr()
    assert main(["serve", "--listen", "localhost:0", "--feature-bound", "-1"]) == 2
    assert "feature_bound: -1.0 is not allowed" in capsys.readouterr().err


def test_a_deadline_of_the_configuration_leaves_an_absent_client_out(tmp_path):
    """The server does not wait for it for ever, and the other trains on."""
    config = hs.override(SMALL, deadline=1.0)
    network = Network(config, tmp_path)
    network.start(0)
    network.start(1)
    summary = network.serve(patience=PATIENT._replace(min_clients=2))
    network.join()
    assert summary.missed_rounds == config.run.rounds
    records = read_records(tmp_path / "run")
    assert all(record.missed == [2] for record in records)


def test_a_momentum_of_averages_needs_all_averages(tmp_path):
    """A device that misses a round also misses its average."""
    qgm = hs.override(SMALL, optimizer="qgm", average="all_holders")
    over_network(build_served(qgm), None, None, seldom=False)
    for changes in (
        dict(participation=0.5),
        dict(dropout=0.1),
        dict(absences=("0:1-1",)),
    ):
        experiment = build_served(hs.override(qgm, **changes))
        with pytest.raises(UserError, match="optimizer: qgm is not allowed with"):
            over_network(experiment, None, None, seldom=False)
    with pytest.raises(UserError, match="may miss rounds"):
        over_network(build_served(qgm), None, None, seldom=True)
    servers = build_served(hs.override(qgm, average="servers", dropout=0.1))
    over_network(servers, None, None, seldom=False)
    with pytest.raises(UserError, match="may be late"):
        over_network(servers, None, None, seldom=True)


def test_a_late_client_counts_on_neither_side():
    """Its server has taken batches; its exit's figures have not come."""
    ones = np.ones((1, 2, 4), bool)
    plan = RoundPlan(
        np.arange(2, dtype=np.int32),
        np.array([True, False]),
        np.zeros((1, 2, 4), np.int32),
        ones,
        np.array([[0, 1]], np.int32),
    )
    exits = Metrics(np.array([8.0, 0.0]), np.array([3, 0]), np.array([4, 0]))
    servers = Metrics(np.array([2.0, 9.0]), np.array([1, 4]), np.array([4, 4]))
    metrics = ExitMetrics(exits, servers, np.zeros((2, 2, 2), np.int32))
    record = round_record(
        1, plan, metrics, Bytes(0, 0), seconds=1, wall_seconds=1, test=None
    )
    assert record.train == (2.0, 0.75, 0.5, 0.25)
    assert (record.images, record.missed, record.left_out) == (4, [1], [])


def test_a_device_builds_what_the_run_has():
    """Also what only the server checks, as a share of all clients."""
    experiment = build_served(hs.override(SMALL, exits="all", **TRIMMED))
    participant = build_participant(describe(experiment, 1))
    assert participant.federation.exits == "all"
    assert participant.strategy.halves is not None


def test_samples_of_their_own_are_counted(capsys):
    experiment = build_served(SMALL, (4, 9, 2))
    assert [len(experiment.shards[i]) for i in range(3)] == [4, 9, 2]
    assert experiment.learning_rates.shape == (3, 2)
    with pytest.raises(UserError, match="samples: 4 9 is not allowed"):
        build_served(SMALL, (4, 9))
    assert main(["serve", "--samples", "4", "--out", "x"]) == 2
    assert "listen: missing" in capsys.readouterr().err
    words = ["--listen", "localhost:0", "--samples", "100000000", "1", "--out", "x"]
    assert main(["serve", *words]) == 2
    assert "samples: 100000001 in all are not allowed" in capsys.readouterr().err
    for flag in ("partition", "alpha", "partition_seed", "max_train_samples"):
        value = "dirichlet" if flag == "partition" else "3"
        words = [f"--{flag.replace('_', '-')}", value, "--samples", "4"]
        assert main(["serve", *words, "--out", "x"]) == 2
        assert f"{flag}: is not allowed together with --samples" in (
            capsys.readouterr().err
        )
    for words in (["--samples", "4"], ["--keys", "k"], ["--listen", "localhost:0"]):
        assert main(["serve", "--local", "2", *words, "--out", "x"]) == 2
        assert "is not allowed together with --local" in capsys.readouterr().err
    assert main(["serve", "--local", "2", "--num-clients", "3", "--out", "x"]) == 2
    assert "num_clients: 3 is not allowed with --local 2" in capsys.readouterr().err
