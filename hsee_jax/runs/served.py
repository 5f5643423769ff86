"""A run whose clients are devices of their own: built without their samples."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from hsee_jax.config.schema import Config
from hsee_jax.config.values import flatten, override, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.data.partition import Share
from hsee_jax.engine.round import client_axis
from hsee_jax.federation.federation import Group, clients_of
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import backend_of
from hsee_jax.runs.build import assemble
from hsee_jax.runs.data import data_source
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.material import Material, deal
from hsee_jax.runs.private import check_no_layers_sent
from hsee_jax.runs.unlabelled import check_all_labelled, copies_of


def build_served(config: Config, samples: Sequence[int] = ()) -> Experiment:
    """Build a run for a server, which has the test set; its clients have the shares.

    Args:
      config: the run.
      samples: how many samples each client has, by id. Without them, the clients have
        the shares that the configuration deals them, as `hsee_jax.build` does.

    Raises:
      UserError: the configuration or ``samples`` is not allowed with clients on a
        network.
    """
    info, read = data_source(config.data)

    def material(groups: Sequence[Group], strategy: Strategy) -> Material:
        train, test = read()
        if not samples:
            copies = copies_of(config, strategy)
            dealt = deal(config, info, groups, train, test, copies=copies)
            return dealt._replace(train=None)
        ends = np.cumsum(samples)
        parts = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
        cuts = dict(clients_of(groups))
        unknown = [0] * info.num_classes
        shares = [
            Share(i, cuts[i], len(part), unknown, []) for i, part in enumerate(parts)
        ]
        return Material(parts, shares, test, None, np.zeros(0, np.int32))

    _check_config(config, samples)
    axis = client_axis(config.run.client_axis, backend_of(None))
    experiment = assemble(config, info, material, axis=axis)
    _check_strategy(experiment)
    return experiment


def _check_config(config: Config, samples: Sequence[int]) -> None:
    """Refuse what clients on a network cannot have; see `build_served`."""
    if samples and (len(samples) != config.clients.num_clients or min(samples) < 1):
        raise UserError(
            f"samples: {' '.join(map(str, samples))} is not allowed; allowed is a "
            f"number from 1 for each of the {config.clients.num_clients} clients"
        )
    if samples:
        check_all_labelled(config)
    for name in ("recuts", "pretrained", "refit_exits_every"):
        if flatten(config).get(name):
            raise UserError(f"{name}: not allowed with clients on a network")
    if config.data.partition == "views":
        raise UserError(
            "partition: views is not allowed with clients on a network, which have "
            "samples of their own; allowed are the others"
        )


def _check_strategy(experiment: Experiment) -> None:
    """Refuse a strategy that a server on a network cannot follow."""
    config, strategy = experiment.config, experiment.strategy
    if strategy.halves is None:
        raise UserError(
            f"strategy: {config.strategy.strategy} is not allowed with these options "
            "and clients on a network; allowed is a strategy whose server takes "
            "features in turns, with the halves of a turn"
        )
    if experiment.federation.codec.gradient is not None:
        raise UserError(
            f"link: {config.clients.link} is not allowed with clients on a network"
        )
    if strategy.period and strategy.period_unit != "rounds":
        raise UserError(
            f"period_unit: {strategy.period_unit} is not allowed with clients on a "
            "network; allowed is rounds"
        )
    if config.clients.keep_layers_private:
        check_no_layers_sent(strategy)
        if config.clients.exits != "cut":
            raise UserError(
                f"exits: {config.clients.exits} is not allowed with "
                "keep_layers_private; allowed is cut"
            )


def describe(experiment: Experiment, i: int) -> dict[str, Any]:
    """Return what client i needs to know, but no ``data_dir``: a device has its own."""
    cut = dict(experiment.federation.clients)[i]
    return {
        "client": i,
        "cut": cut,
        "label_counts": [int(count) for count in experiment.manifest[i].label_counts],
        "batch_size": experiment.batch_size,
        "steps": experiment.learning_rates.shape[1],
        "test_samples": len(experiment.test.labels),
        "test_batch_size": experiment.eval_batch_size,
        "config": json.loads(to_json(override(experiment.config, data_dir=None))),
        "info": experiment.info._asdict(),
    }
