"""Clients and server that share nothing but messages, and equal the simulation."""

import jax
import numpy as np
import pytest
from devices import serve_in_process

import hsee_jax as hs
from hsee_jax.runs.history import read_records

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
)


def states(config, tmp_path, **options):
    """The state of a run on devices, and that of the simulation."""
    serve_in_process(config, tmp_path, **options)
    hs.train(config, tmp_path / "simulated")
    return (hs.restore(tmp_path / name).state for name in ("run", "simulated"))


@pytest.mark.parametrize("link", ["full", "float16", "int8"])
def test_a_run_on_devices_equals_the_simulation(link, tmp_path):
    served, simulated = states(hs.override(SMALL, link=link), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, served, simulated)
    own, other = (read_records(tmp_path / n) for n in ("run", "simulated"))
    plain = dict(seconds=0, wall_seconds=0)
    assert [r._replace(**plain) for r in own] == [r._replace(**plain) for r in other]
