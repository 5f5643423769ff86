"""The samples of a run: what each client has, what nobody has, and the test set."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import NO_LABEL, Dataset
from hsee_jax.data import DatasetInfo
from hsee_jax.data.partition import (
    PARTITIONS,
    Indices,
    Labels,
    Share,
    hold_out,
    labelled,
    manifest,
    partition,
)
from hsee_jax.federation.federation import Group, clients_of
from hsee_jax.parallel.mesh import SAME, to_devices
from hsee_jax.runs.data import data_source


class Material(NamedTuple):
    """The samples of a run."""

    parts: Sequence[Indices]  # the training samples of each client
    manifest: list[Share]
    test: Dataset
    train: Dataset | None  # None if only the clients have them, elsewhere
    held: Indices  # training samples that no client gets


def deal(
    config: Config,
    info: DatasetInfo,
    groups: Sequence[Group],
    train: Dataset,
    test: Dataset,
    *,
    copies: int,
) -> Material:
    """Deal the training samples to groups of clients, and hold some out.

    A strategy that takes two copies of a sample gets all samples, but labels only for
    the labelled share and for what is held out. Any other gets only the labelled share.
    """
    parts, held = deal_labels(config, train.labels)
    known = with_labels(config, parts)
    if copies > 1:
        _check_apart(config, parts)
        kept = np.concatenate([*known, held])
        labels = np.full(len(train.labels), NO_LABEL, np.int32)
        labels[kept] = train.labels[kept]
        train = train._replace(labels=labels)
    else:
        parts = known
    return Material(parts, _manifest(groups, parts, train, info), test, train, held)


def _check_apart(config: Config, parts: Sequence[Indices]) -> None:
    """Refuse a labelled share where clients have samples in common."""
    samples = np.concatenate(parts)
    if config.data.labelled_share < 1 and len(np.unique(samples)) < len(samples):
        raise UserError(
            f"labelled_share: {config.data.labelled_share} is not allowed with "
            f"partition {config.data.partition} and {config.strategy.strategy}, as "
            "clients would also learn from the labels of others; allowed is 1"
        )


def with_labels(config: Config, parts: Sequence[Indices]) -> list[Indices]:
    """Return the samples of each client that have labels."""
    share, seed = config.data.labelled_share, config.run.partition_seed
    return list(labelled(parts, share, seed=seed))


def deal_labels(config: Config, labels: Labels) -> tuple[list[Indices], Indices]:
    """Deal the training samples to the clients; return what was held out, too."""
    seed = config.run.partition_seed
    kept, held = hold_out(len(labels), config.data.validation_share, seed=seed)
    deal = PARTITIONS.make(config.data.partition, options=config.data.options)
    parts = partition(labels[kept], config.clients.num_clients, deal, seed=seed)
    return [kept[part] for part in parts], held


def _manifest(
    groups: Sequence[Group], parts: list[Indices], train: Dataset, info: DatasetInfo
) -> list[Share]:
    cuts = dict(clients_of(groups))
    return manifest(
        parts,
        train.labels,
        cuts=[cuts[i] for i in range(len(cuts))],
        num_classes=info.num_classes,
    )


def take(data: Dataset, indices: Indices, mesh: Mesh | None) -> Dataset:
    """Return some samples, on the devices of a mesh."""
    return to_devices(Dataset(*(a[indices] for a in data)), mesh, SAME)


def shares(config: Config) -> list[Dataset]:
    """Read the dataset of a run, and return each client's training samples with labels.

    Raises:
      UserError: the data are missing, or not valid.
    """
    train, _ = data_source(config.data).read()
    parts = with_labels(config, deal_labels(config, train.labels)[0])
    return [Dataset(*(np.asarray(a)[part] for a in train)) for part in parts]
