"""Everything that a run depends on, as frozen dataclasses that check themselves.

Each field is also a flag of the command line (`learning_rate` is ``--learning-rate``),
so names are unique over all classes and ``help`` is the field's documentation. Defaults
marked [ours] are choices that the paper leaves open.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hsee_jax.base import UserError
from hsee_jax.fields import Checked, option, typed, unknown

SEEDS = ("model_seed", "data_seed", "partition_seed")


@dataclass(frozen=True)
class DataConfig(Checked):
    """Which samples there are, and who has them."""

    dataset: str = option(
        "fashion_mnist_small",
        "fashion_mnist_small comes with the package, the others are read from "
        "--data-dir (see hsee data); npz is your own, train.npz and test.npz there",
        choices=(
            "fashion_mnist_small",
            "fashion_mnist",
            "cifar10",
            "cifar100",
            "stl10",
            "npz",
        ),
    )
    data_dir: str | None = option(
        None,
        "folder with the datasets; without one, $TFDS_DATA_DIR or "
        "~/tensorflow_datasets",
    )
    labels: str = option(
        "refuse",
        "what to do where the training labels of npz are not 0..K-1 without gaps: "
        "refuse them, or remap them to 0..K-1 in ascending order [ours]",
        choices=("refuse", "remap"),
    )
    max_train_samples: int | None = option(None, "use only the first so many")
    max_test_samples: int | None = option(None, "use only the first so many")
    validation_share: float = option(
        0.0,
        "share of the training samples held out from all clients, for the thresholds "
        "of hsee gate",
    )
    augment: str = option(
        "none",
        "of training images: random crop of the image padded by 4, and flip",
        choices=("none", "crop", "crop_flip"),
    )
    partition: str = option(
        "iid",
        "how samples are dealt to clients [ours: iid, disjoint, equal]",
        choices=("iid", "dirichlet", "classes", "quantity"),
    )
    alpha: float = option(
        0.3, "concentration of dirichlet (labels) and quantity (sizes); low is unequal"
    )
    classes_per_client: int = option(
        2, "label-sorted pieces each client gets in classes"
    )

    def check(self) -> None:
        """Refuse numbers out of range, and an option that has no effect."""
        self.require(
            "labels",
            "refuse unless the dataset is npz",
            self.labels == "refuse" or self.dataset == "npz",
        )
        for name in ("max_train_samples", "max_test_samples"):
            value = getattr(self, name)
            self.require(name, "1 or more", value is None or value >= 1)
        self.require(
            "validation_share", "0 or more, less than 1", 0 <= self.validation_share < 1
        )
        self.require("alpha", "more than 0", 0 < self.alpha < float("inf"))
        self.require("classes_per_client", "1 or more", self.classes_per_client >= 1)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The ResNet-18."""

    width: int = option(64, "channels of the first group of blocks")
    stem: str = option(
        "auto",
        "first layer: 3x3, or 7x7 and max-pool; auto is 3x3 up to 64 pixels [ours]",
        choices=("auto", "3x3", "7x7"),
    )
    exit_head: str = option(
        "linear",
        "pool and linear layer, or BatchNorm before them [ours]",
        choices=("linear", "bn_linear"),
    )
    dtype: str = option(
        "float32",
        "of the computation; parameters and statistics stay float32",
        choices=("float32", "bfloat16"),
    )
    conv: str = option(
        "auto",
        "form of the convolutions, all equal up to rounding; auto is by backend and "
        "shape",
        choices=("auto", "grouped", "unrolled", "patches", "winograd"),
    )

    def check(self) -> None:
        """Checks numbers."""
        self.require("width", "1 or more", self.width >= 1)


@dataclass(frozen=True)
class ClientsConfig(Checked):
    """How many clients there are, and where each is cut."""

    num_clients: int = option(12, "how many clients")
    cuts: tuple[str, ...] = option(
        ("3", "5", "7"),
        "cut layers, numbers or names, dealt out in turn: 3 5 7 3 5 7 ...",
    )
    link: str = option(
        "full",
        "form in which features leave a client, in training and after it: that of the "
        "computation, half precision, or 256 levels of each sample's own [ours]",
        choices=("full", "float16", "int8"),
    )
    participation: float = option(1.0, "share of the clients drawn for each round")
    dropout: float = option(
        0.0,
        "probability that a client misses a round: it does not train in it, and is not "
        "in the averages",
    )
    absences: tuple[str, ...] = option(
        (),
        "rounds that clients miss for certain, as CLIENT:FROM-TO, rounds from 1; "
        "--absences-file reads them from a file",
    )
    on_nonfinite: str = option(
        "leave_out",
        "a client whose loss or gradient is not finite does not take that step, and "
        "leave_out leaves it out of the round's averages; stop ends the run",
        choices=("leave_out", "stop"),
    )
    init: str = option(
        "shared",
        "weights at the start: slices of one network, or drawn per client [ours]",
        choices=("shared", "per_client"),
    )

    def check(self) -> None:
        """Checks numbers."""
        object.__setattr__(self, "cuts", tuple(str(cut) for cut in self.cuts))
        object.__setattr__(self, "absences", tuple(self.absences))
        self.require("num_clients", "1 or more", self.num_clients >= 1)
        self.require(
            "participation", "more than 0, at most 1", 0 < self.participation <= 1
        )
        self.require("dropout", "0 or more, less than 1", 0 <= self.dropout < 1)
        for absence in self.absences:
            client, first, last = parse_absence(absence)
            if not (0 <= client < self.num_clients and 1 <= first <= last):
                raise _not_an_absence(absence)


def parse_absence(text: str) -> tuple[int, int, int]:
    """Client, first and last round of one of `absences`."""
    found = re.fullmatch(r"(\d+):(\d+)-(\d+)", text)
    if found is None:
        raise _not_an_absence(text)
    return int(found[1]), int(found[2]), int(found[3])


def _not_an_absence(text: str) -> UserError:
    return UserError(
        f"absences: {text} is not allowed; allowed is CLIENT:FROM-TO with a client's "
        "id and rounds from 1"
    )


@dataclass(frozen=True)
class StrategyConfig(Checked):
    """How the server learns from many clients."""

    strategy: str = option(
        "averaging",
        "one shared server, or one per client averaged layer by layer; the others are "
        "baselines",
        choices=(
            "sequential",
            "averaging",
            "local",
            "splitfed_v1",
            "splitfed_v2",
            "fedavg",
            "centralized",
        ),
    )
    boundary: str = option(
        "detached",
        "no gradient crosses the cut, or the server's flows back to the client, as in "
        "split learning [ours: joint]",
        choices=("detached", "joint"),
    )
    exit_gradient: float = option(
        0.0,
        "with a joint boundary, the share of the exit's gradient that reaches the "
        "client's layers: 0 makes it a probe, 1 sums both losses [ours]",
    )
    turn: str = option(
        "batch",
        "a shared server takes one batch of each client in turn, or a client's whole "
        "local epoch [ours]",
        choices=("batch", "epoch"),
    )
    period: int = option(
        1,
        "how often to average, in units of period_unit; 0 is never; a client that is "
        "absent then loses what it has trained since the last time [ours]",
    )
    period_unit: str = option("rounds", "unit of period", choices=("rounds", "steps"))
    average: str = option(
        "servers",
        "a layer's mean is over the server replicas that hold it, or over all holders, "
        "clients included [ours]",
        choices=("servers", "all_holders"),
    )
    weights: str = option(
        "samples",
        "of the clients in a mean: their numbers of training samples, or uniform "
        "[ours]",
        choices=("samples", "uniform"),
    )
    batch_norm: str = option(
        "auto",
        "BatchNorm is averaged like the rest, or stays local (FedBN); auto is local "
        "where only servers are averaged, each of which sees the features of its own "
        "client [ours]",
        choices=("auto", "average", "keep_local"),
    )
    optimizer_state: str = option(
        "keep",
        "when layers are averaged, each replica keeps its own, takes the mean, or "
        "starts anew [ours]",
        choices=("keep", "average", "reset"),
    )
    server_lr_scale: float = option(
        1.0, "the server's learning rate, relative to the clients' [ours]"
    )

    def check(self) -> None:
        """Checks numbers."""
        self.require("exit_gradient", "0..1", 0 <= self.exit_gradient <= 1)
        self.require(
            "exit_gradient",
            "0 unless the boundary is joint",
            self.exit_gradient == 0 or self.boundary == "joint",
        )
        self.require("period", "0 or more", self.period >= 0)
        self.require(
            "server_lr_scale", "more than 0", 0 < self.server_lr_scale < float("inf")
        )


@dataclass(frozen=True)
class OptimConfig(Checked):
    """The recipe of every branch [ours]."""

    optimizer: str = option("sgd", "update rule", choices=("sgd", "adamw"))
    learning_rate: float = option(0.1, "peak learning rate")
    momentum: float = option(0.9, "of sgd")
    weight_decay: float = option(5e-4, "not on biases and BatchNorm")
    schedule: str = option(
        "cosine",
        "after the warm-up: cosine to 0, or constant",
        choices=("cosine", "constant"),
    )
    warmup_rounds: float = option(1.0, "rounds of linear warm-up")

    def check(self) -> None:
        """Checks numbers."""
        self.require(
            "learning_rate", "more than 0", 0 < self.learning_rate < float("inf")
        )
        self.require("momentum", "0 or more, less than 1", 0 <= self.momentum < 1)
        self.require("weight_decay", "0 or more", 0 <= self.weight_decay < float("inf"))
        self.require(
            "warmup_rounds", "0 or more", 0 <= self.warmup_rounds < float("inf")
        )


@dataclass(frozen=True)
class RunConfig(Checked):
    """Length, seeds and bookkeeping of a run."""

    rounds: int = option(100, "rounds; one is a local epoch of every client")
    batch_size: int = option(128, "samples in a client's step")
    eval_every: int = option(5, "rounds between evaluations on the test set")
    eval_batch_size: int = option(250, "samples in an evaluation step")
    checkpoint_every: int = option(5, "rounds between checkpoints")
    keep_checkpoints: int = option(2, "latest checkpoints kept, beside the best")
    client_axis: str = option(
        "auto",
        "clients one after another, or those of one cut at once; auto is loop on CPU "
        "and vmap elsewhere",
        choices=("auto", "loop", "vmap"),
    )
    model_seed: int = option(0, "of the initial weights; --seed sets all three seeds")
    data_seed: int = option(
        0, "of participation, batches, turns and augmentation; see --seed"
    )
    partition_seed: int = option(
        0, "of the partition and of what is held out; see --seed"
    )

    def check(self) -> None:
        """Checks numbers."""
        for name in (
            "rounds",
            "batch_size",
            "eval_every",
            "eval_batch_size",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            self.require(name, "1 or more", getattr(self, name) >= 1)
        for name in SEEDS:
            self.require(name, "0..2147483647", 0 <= getattr(self, name) < 2**31)


@dataclass(frozen=True)
class Config:
    """A run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    clients: ClientsConfig = ClientsConfig()
    strategy: StrategyConfig = StrategyConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()


def options() -> dict[str, tuple[str, dataclasses.Field[Any]]]:
    """Every field by its name, with the section of `Config` that it belongs to."""
    return {
        item.name: (section.name, item)
        for section in dataclasses.fields(Config)
        for item in dataclasses.fields(section.type)  # type: ignore[arg-type]
    }


def override(config: Config, **changes: Any) -> Config:
    """A copy with some fields changed, named without their section.

    Raises:
      UserError: an unknown field, or a value that is not allowed.
    """
    fields = options()
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in fields:
            raise unknown("field", name, tuple(fields))
        sections.setdefault(fields[name][0], {})[name] = value
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in sections.items()
        },
    )


def flatten(config: Config) -> dict[str, Any]:
    """All values by field name."""
    return {
        name: getattr(getattr(config, section), name)
        for name, (section, _) in options().items()
    }


def to_json(config: Config) -> str:
    """The configuration as indented JSON, one object a section."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of ``dataclasses.asdict``; sections and fields may be missing.

    Raises:
      UserError: an unknown section or field, a value of another type, or one that is
        not allowed.
    """
    changes: dict[str, Any] = {}
    fields = options()
    for section, content in values.items():
        if section not in {name for name, _ in fields.values()}:
            raise unknown(
                "section", section, tuple(f.name for f in dataclasses.fields(Config))
            )
        if not isinstance(content, Mapping):
            raise UserError(f"{section}: {content} is not an object of fields")
        for name, value in content.items():
            if name not in fields or fields[name][0] != section:
                allowed = tuple(n for n, (s, _) in fields.items() if s == section)
                raise unknown(f"field of {section}", name, allowed)
            changes[name] = typed(fields[name][1], value)
    return override(Config(), **changes)


PRESETS: dict[str, Config] = {
    # Minutes on two CPU cores. A client has 900 images, so its own layers are
    # averaged as well.
    "demo": override(
        Config(),
        num_clients=6,
        cuts=("2", "4", "6"),
        average="all_holders",
        width=8,
        rounds=12,
        batch_size=16,
        eval_every=6,
        checkpoint_every=6,
        validation_share=0.1,
    ),
    "cifar10": override(Config(), dataset="cifar10", augment="crop_flip"),
    "cifar100": override(Config(), dataset="cifar100", augment="crop_flip"),
    # 5,000 images of 96 pixels, about 400 a client
    "stl10": override(Config(), dataset="stl10", augment="crop_flip", batch_size=64),
}


def preset(name: str) -> Config:
    """A named configuration.

    Raises:
      UserError: there is none of that name.
    """
    if name not in PRESETS:
        raise unknown("preset", name, tuple(PRESETS))
    return PRESETS[name]
