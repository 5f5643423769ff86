"""Data: datasets by name, who gets which samples, and how samples become a batch."""

from hsee_jax.data import known as known
from hsee_jax.data import own as own
from hsee_jax.data.arrays import Arrays, from_arrays
from hsee_jax.data.datasets import (
    dataset_info,
    is_there,
    load_dataset,
    prepare,
    read_arrays,
    read_dataset,
)
from hsee_jax.data.download import OnBytes
from hsee_jax.data.info import KNOWN, PACKAGED, Data, DatasetInfo, Limits
from hsee_jax.data.npz import write_npz
from hsee_jax.data.partition import (
    PARTITIONS,
    Share,
    hold_out,
    labelled,
    manifest,
    partition,
)
from hsee_jax.data.pipeline import AUGMENTATIONS, InputPipeline, normalize
from hsee_jax.data.registry import DATASETS, Form, register
from hsee_jax.data.views import VIEWS, ViewFn, Views, views_of

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "KNOWN",
    "PACKAGED",
    "PARTITIONS",
    "VIEWS",
    "Arrays",
    "Data",
    "DatasetInfo",
    "Form",
    "InputPipeline",
    "Limits",
    "OnBytes",
    "Share",
    "ViewFn",
    "Views",
    "dataset_info",
    "from_arrays",
    "hold_out",
    "is_there",
    "labelled",
    "load_dataset",
    "manifest",
    "normalize",
    "partition",
    "prepare",
    "read_arrays",
    "read_dataset",
    "register",
    "views_of",
    "write_npz",
]
