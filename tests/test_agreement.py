"""Counts of right answers by class, against counts of single samples."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, PIPELINE, TINY, tiny_data, tiny_federation

from hsee_jax import override, preset, runs
from hsee_jax.algorithms import averaging, sequential
from hsee_jax.engine import Agreement, make_evaluation
from hsee_jax.engine.agreement import count_agreement
from hsee_jax.federation import forward, server_of
from hsee_jax.federation.state import take_member


def count_one_by_one(exit_logits, server_logits, labels):
    """Return int [4, K] for NumPy's logits ``[M, K]``."""
    found = np.zeros((4, exit_logits.shape[1]), int)
    for exit_row, server_row, label in zip(
        exit_logits, server_logits, labels, strict=True
    ):
        exit_right = np.isfinite(exit_row).all() and exit_row.argmax() == label
        server_right = np.isfinite(server_row).all() and server_row.argmax() == label
        if exit_right and server_right:
            found[0, label] += 1
        elif exit_right:
            found[1, label] += 1
        elif server_right:
            found[2, label] += 1
        else:
            found[3, label] += 1
    return found


def test_rows_are_counted_where_the_mask_is_true():
    """Labels are 0 on padding, and some logits are not finite."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, 60).astype(np.int32)
    exits, servers = rng.normal(size=(2, 60, 5)).astype(np.float32)
    exits[np.arange(0, 30), labels[:30]] += 3
    servers[np.arange(15, 45), labels[15:45]] += 3
    exits[7], servers[20, 1] = np.nan, np.inf
    mask = rng.random(60) < 0.7
    labels[~mask] = 0
    found = jax.jit(count_agreement)(exits, servers, labels, mask)
    assert (found.shape, found.dtype) == ((4, 5), jnp.int32)
    expected = count_one_by_one(exits[mask], servers[mask], labels[mask])
    assert (expected.sum(axis=1) > 2).all()
    np.testing.assert_array_equal(found, expected)


def test_the_totals_of_an_agreement():
    one = Agreement((1, 0), (2, 0), (4, 0), (8, 5))
    np.testing.assert_array_equal(one.samples, [15, 5])
    np.testing.assert_array_equal(one.exit_correct, [3, 0])
    np.testing.assert_array_equal(one.server_correct, [5, 0])
    assert Agreement.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize("axis", ["loop", "vmap"])
@pytest.mark.parametrize("make", [sequential, averaging])
def test_evaluation_counts_every_sample_once(make, axis):
    """Batches of 4 of 11 samples, by networks that differ between clients."""
    federation = tiny_federation({4: 1, 1: 2, 2: 1})
    strategy = make(federation, init="per_client")
    state = jax.jit(strategy.init)(jax.random.key(5))
    data = tiny_data(11, seed=5)
    evaluate = make_evaluation(federation, strategy, PIPELINE, batch_size=4, axis=axis)
    results = {r.id: r for r in evaluate(state, jax.device_put(data))}

    images = (data.images.astype(np.float32) / 255 - 0.5) / 0.25
    everything = np.ones(11, bool)
    for g, group in enumerate(federation.groups):
        client_spec, server_spec = federation.specs(g)
        for m, i in enumerate(group.ids):
            client = take_member(state.clients[g], m)
            features, exit_logits, _ = forward(
                client_spec, client, images, everything, train=False
            )
            server = server_of(strategy, state, g, m)
            _, logits, _ = forward(
                server_spec, server, features, everything, train=False
            )
            found, result = results[i].agreement, results[i]
            assert np.shape(found) == (4, CLASSES)
            expected = count_one_by_one(
                np.asarray(exit_logits), np.asarray(logits), data.labels
            )
            np.testing.assert_array_equal(found, expected)
            assert result.exit_accuracy == found.exit_correct.sum() / 11
            assert result.server_accuracy == found.server_correct.sum() / 11
    assert len({r.agreement for r in results.values()}) > 1


def test_the_summary_alone_holds_the_counts(tmp_path):
    config = override(
        preset("demo"),
        **TINY,
        num_clients=2,
        cuts=("1", "2"),
        max_train_samples=40,
        max_test_samples=30,
        batch_size=6,
        rounds=1,
    )
    summary = runs.train(config, tmp_path / "run")
    assert "agreement" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    text = (tmp_path / "run" / "summary.json").read_text()
    assert '"both": [' in text and text.count("\n") < 120  # a line for each list
    written = json.loads(text)
    assert [one["id"] for one in written["agreement"]] == [0, 1]
    for client, own in zip(written["clients"], summary.agreement, strict=True):
        assert own.samples.sum() == 30
        assert client["exit_accuracy"] == own.exit_correct.sum() / 30
        assert client["server_accuracy"] == own.server_correct.sum() / 30
    history = runs.read_history(tmp_path / "run")
    assert history.summary == summary
    assert history.records[-1].test == summary.scores
