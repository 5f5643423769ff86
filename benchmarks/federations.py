"""Make federations of any size on synthetic data, for the benchmarks.

Speed does not depend on what the images show, so they are noise, with the shapes and
the number of classes of a real dataset. All shards are equal and hold whole batches.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

import hsee_jax
from hsee_jax.core.types import Array, Dataset, ExitMetrics
from hsee_jax.data import dataset_info
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.federation import Branch, branch_step, init_server, server_spec
from hsee_jax.nn import Model, init_network
from hsee_jax.optim import Optimizer
from hsee_jax.runs.build import build
from hsee_jax.runs.data import DataSource
from hsee_jax.runs.experiment import Experiment

CUTS = ("3", "5", "7")
STRATEGIES = ("averaging", "sequential")


def noise(dataset: str, count: int, *, seed: int = 0) -> Dataset:
    """Draw random images and labels in the shape of a dataset."""
    info = dataset_info(dataset)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *info.input_shape), np.uint8)
    labels = rng.integers(0, info.num_classes, count).astype(np.int32)
    return Dataset(images, labels)


def configuration(
    *, clients: int, batch_size: int, dataset: str = "cifar10", **changes: Any
) -> hsee_jax.Config:
    """Return the configuration of a federation, see `federation`."""
    config = hsee_jax.override(
        hsee_jax.Config(),
        **{
            "dataset": dataset,
            "num_clients": clients,
            "cuts": CUTS[:clients],
            "batch_size": batch_size,
            "rounds": 1000,  # more than are run: the rate is constant
            "schedule": "constant",
            "warmup_rounds": 0.0,
            "learning_rate": 0.01,
            **changes,
        },
    )
    if config.strategy.strategy == "averaging":  # as in the PyTorch baseline
        config = hsee_jax.override(config, batch_norm="average")
    return config


def federation(
    *,
    clients: int,
    batch_size: int,
    steps: int,
    dataset: str = "cifar10",
    **changes: Any,
) -> Experiment:
    """Build an experiment in which every client has ``steps`` full batches a round.

    Args:
      clients: the number of clients; their cuts are 3, 5, 7 in turn (one client has 3,
        two have 3 and 5).
      batch_size: images in a client's step.
      steps: steps in a round.
      dataset: the dataset that gives the shapes of the noise.
      **changes: values for further fields of the configuration.
    """
    config = configuration(
        clients=clients, batch_size=batch_size, dataset=dataset, **changes
    )
    train = noise(dataset, clients * batch_size * steps)
    splits = train, noise(dataset, 8, seed=1)
    return build(config, DataSource(dataset_info(dataset), lambda: splits))


def plain_branch(model: Model, optimizer: Optimizer, key: Array) -> Branch:
    """Draw one network without clients, and return it as a branch with all layers."""
    return init_server(init_network(model, key), 0, optimizer)


def plain_program(model: Model, optimizer: Optimizer, dataset: str) -> Wrapped:
    """Return a jitted program that trains one network without clients.

    Returns:
      A function from the branch of `plain_branch`, a `Dataset` and rows
      ``int32 [T, B]`` to the branch after T steps. It donates the branch.
    """
    spec, info = server_spec(model, 0, optimizer), dataset_info(dataset)
    pipeline = InputPipeline(info.mean, info.std)

    @partial(jax.jit, donate_argnums=0)
    def run(branch: Branch, data: Dataset, rows: Array) -> Branch:
        mask = jnp.ones(rows.shape[1], bool)

        def step(t: Array, branch: Branch) -> Branch:
            batch = pipeline.evaluation(data, rows[t], mask, jnp.int32(0))
            return branch_step(spec, branch, batch, jnp.float32(0.01))[0]

        return jax.lax.fori_loop(0, len(rows), step, branch)

    return run


class Runner:
    """Runs round after round; a call returns when the device has done its work."""

    def __init__(self, experiment: Experiment) -> None:
        """Start from the initial state."""
        self.experiment = experiment
        self.state = experiment.init()

    def __call__(self) -> ExitMetrics:
        """Train a round, and return its metrics on the host."""
        self.state, _, progress = self.experiment.run_round(self.state)
        jax.block_until_ready(self.state)
        return progress.metrics
