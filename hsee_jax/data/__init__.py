"""Data: datasets by name, who gets which samples, and how samples become a batch."""

from hsee_jax.data.datasets import (
    dataset_info,
    find_source,
    load_dataset,
    prepare,
)
from hsee_jax.data.download import OnBytes
from hsee_jax.data.info import DATASETS, OWN, PACKAGED, DatasetInfo, Source
from hsee_jax.data.partition import (
    PARTITIONS,
    Share,
    hold_out,
    manifest,
    partition,
)
from hsee_jax.data.pipeline import AUGMENTATIONS, InputPipeline, normalize

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "OWN",
    "PACKAGED",
    "PARTITIONS",
    "DatasetInfo",
    "InputPipeline",
    "OnBytes",
    "Share",
    "Source",
    "dataset_info",
    "find_source",
    "hold_out",
    "load_dataset",
    "manifest",
    "normalize",
    "partition",
    "prepare",
]
