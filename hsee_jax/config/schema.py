"""The configuration of a run, as frozen dataclasses that check themselves.

Each field is also a flag of the command line (`learning_rate` is ``--learning-rate``),
and so is each option of the networks, codecs, algorithms ... that the fields name;
names are unique over all sections. The mark [ours] stands where the paper leaves a
choice open.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.config.entries import not_an_absence, parse_absence, parse_recut
from hsee_jax.config.section import Section
from hsee_jax.core.errors import UserError
from hsee_jax.core.options import Rule, at_least, between, one_of, positive, share
from hsee_jax.core.registry import Registry
from hsee_jax.data.partition import PARTITIONS
from hsee_jax.data.pipeline import AUGMENTATIONS
from hsee_jax.data.registry import DATASETS
from hsee_jax.engine.round import CLIENT_AXES
from hsee_jax.federation.branch import EXITS
from hsee_jax.link.codecs import CODECS
from hsee_jax.nn import NETWORKS
from hsee_jax.optim import OPTIMIZERS, SCHEDULES

SEEDS = ("model_seed", "data_seed", "partition_seed")

# Fields with no effect on the training, but data_dir has one with the user's own data.
BOOKKEEPING = (
    "data_dir",
    "eval_every",
    "eval_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "client_axis",
    "loop_threads",
    "plugin",
)


@dataclass(frozen=True)
class DataConfig(Section):
    """The samples, and their partition among the clients."""

    registries: ClassVar[Mapping[str, Registry]] = {
        "dataset": DATASETS,
        "augment": AUGMENTATIONS,
        "partition": PARTITIONS,
    }
    dataset: Annotated[
        str,
        "dataset to train on; --data-dir holds all but fashion_mnist_small, which is "
        "in the package, and arrays, which a Python program passes",
        one_of(DATASETS),
    ] = "fashion_mnist_small"
    data_dir: Annotated[
        str | None,
        "folder of the data; by default $TFDS_DATA_DIR, or ~/tensorflow_datasets",
    ] = None
    max_train_samples: Annotated[
        int | None, "use only the first training samples, this many", at_least(1)
    ] = None
    max_test_samples: Annotated[
        int | None, "use only the first test samples, this many", at_least(1)
    ] = None
    validation_share: Annotated[
        float,
        "share of the training samples held out from all clients, for the thresholds "
        "of hsee gate",
        share,
    ] = 0.0
    labelled_share: Annotated[
        float,
        "share of each client's training samples that have labels, at least one; "
        "vicreg trains on all samples, other strategies on those with labels alone",
        Rule("more than 0, at most 1", lambda value: 0 < value <= 1),
    ] = 1.0
    augment: Annotated[
        str,
        "random changes of training samples: crop cuts a window out of an image padded "
        "by 4, crop_flip also mirrors half of the images, noise adds normal noise to "
        "samples of any shape",
        one_of(AUGMENTATIONS),
    ] = "none"
    partition: Annotated[
        str,
        "how samples are dealt to clients [ours: iid, disjoint, equal]",
        one_of(PARTITIONS),
    ] = "iid"


@dataclass(frozen=True)
class ModelConfig(Section):
    """The network that the run trains."""

    registries: ClassVar[Mapping[str, Registry]] = {"network": NETWORKS}
    network: Annotated[
        str, "network to train; --plugin adds others", one_of(NETWORKS)
    ] = "resnet18"
    pretrained: Annotated[
        str | None,
        "safetensors file of weights to start from, in the names of torchvision or "
        "timm; exits start from random weights",
    ] = None


@dataclass(frozen=True)
class ClientsConfig(Section):
    """The clients: their number, their cuts, their links and their absences."""

    registries: ClassVar[Mapping[str, Registry]] = {"link": CODECS}
    num_clients: Annotated[int, "number of clients", between(1, 1_000_000)] = 12
    cuts: Annotated[
        tuple[str, ...],
        "cut layers, numbers or names; the clients get them in turn: 3 5 7 3 5 7 ...",
    ] = ("3", "5", "7")
    recuts: Annotated[
        tuple[str, ...],
        "cuts that change during the training, as ROUND:CUT,CUT,...: from this round "
        "on, counted from 1, the clients get these cuts in turn [ours: the paper's "
        "cuts are fixed]",
    ] = ()
    link: Annotated[
        str,
        "form in which features leave a client, in training and after it [ours]",
        one_of(CODECS),
    ] = "full"
    participation: Annotated[
        float,
        "share of the clients drawn for each round",
        Rule("more than 0, at most 1", lambda value: 0 < value <= 1),
    ] = 1.0
    dropout: Annotated[
        float,
        "probability that a client misses a round: it does not train in it, and is not "
        "in the averages",
        share,
    ] = 0.0
    exits: Annotated[
        str,
        "where a client may answer: behind its last layer (cut), or behind each of its "
        "layers (all); then its exits train together, and the earliest sure one "
        "answers [ours]",
        one_of(EXITS),
    ] = "cut"
    absences: Annotated[
        tuple[str, ...],
        "rounds that clients are sure to miss, as CLIENT:FROM-TO, counted from 1; "
        "--absences-file reads them from a file",
    ] = ()
    deadline: Annotated[
        float | None,
        "seconds after which a round ends without the clients that are not done; with "
        "hsee train they are simulated, and need --devices",
        positive,
    ] = None
    keep_layers_private: Annotated[
        bool,
        "with hsee serve, devices never send their layers to the server: they send "
        "features of the test set, so that it can score them",
    ] = False
    on_nonfinite: Annotated[
        str,
        "a client whose loss or gradient is not finite skips the step; leave_out "
        "leaves it out of the round's averages, stop ends the run",
        one_of("leave_out", "stop"),
    ] = "leave_out"

    def check(self) -> None:
        """Refuse an absence or a change of cuts that does not fit the rest."""
        for absence in self.absences:
            client, first, last = parse_absence(absence)
            if not (0 <= client < self.num_clients and 1 <= first <= last):
                raise not_an_absence(absence)
        last = 1
        for text in self.recuts:
            number, cuts = parse_recut(text)
            if number <= last or len(cuts) > self.num_clients:
                raise UserError(
                    f"recuts: {text} is not allowed; allowed are ascending rounds from "
                    f"2, and at most {self.num_clients} cuts, one for each client"
                )
            last = number


@dataclass(frozen=True)
class StrategyConfig(Section):
    """The algorithm: how the server learns from many clients."""

    registries: ClassVar[Mapping[str, Registry]] = {"strategy": ALGORITHMS}
    strategy: Annotated[
        str,
        "algorithm of the training",
        one_of(ALGORITHMS),
    ] = "averaging"


@dataclass(frozen=True)
class OptimConfig(Section):
    """The optimizer and the learning rate of every branch [ours]."""

    registries: ClassVar[Mapping[str, Registry]] = {
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
    }
    optimizer: Annotated[str, "update rule", one_of(OPTIMIZERS)] = "sgd"
    learning_rate: Annotated[float, "peak learning rate", positive] = 0.1
    schedule: Annotated[str, "learning rate after the warm-up", one_of(SCHEDULES)] = (
        "cosine"
    )
    warmup_rounds: Annotated[float, "rounds of linear warm-up", at_least(0)] = 1.0


@dataclass(frozen=True)
class RunConfig(Section):
    """The length, the seeds and the bookkeeping of a run."""

    rounds: Annotated[
        int,
        "number of rounds; a round is a local epoch of every client",
        between(1, 1_000_000),
    ] = 100
    batch_size: Annotated[int, "samples in a client's step", at_least(1)] = 128
    micro_batches: Annotated[
        int,
        "equal parts in which a client takes a batch, one after another, to need less "
        "memory; BatchNorm sees each part by itself; needs a detached boundary [ours]",
        at_least(1),
    ] = 1
    refit_exits_every: Annotated[
        int,
        "rounds between exact fits of the exits, see hsee refit; 0 is never [ours]",
        at_least(0),
    ] = 0
    eval_every: Annotated[
        int,
        "rounds between evaluations on the test set; a round with a checkpoint and the "
        "last are evaluated too",
        at_least(1),
    ] = 5
    eval_batch_size: Annotated[int, "samples in an evaluation step", at_least(1)] = 250
    checkpoint_every: Annotated[int, "rounds between checkpoints", at_least(1)] = 5
    keep_checkpoints: Annotated[
        int, "latest checkpoints to keep, in addition to the best", at_least(1)
    ] = 2
    client_axis: Annotated[
        str,
        "loop calls a program for each client in turn; vmap trains the clients of one "
        "cut at once, map one after another in one program, which needs less memory; "
        "auto is loop on CPU and vmap elsewhere",
        one_of("auto", *CLIENT_AXES),
    ] = "auto"
    loop_threads: Annotated[
        int,
        "clients and servers that the loop runs at the same time, which needs memory "
        "for each and changes no result; 0 is one for each core, at most 8 [ours]",
        between(0, 256),
    ] = 0
    model_seed: Annotated[
        int,
        "seed of the initial weights; --seed sets all three seeds",
        between(0, 2**31 - 1),
    ] = 0
    data_seed: Annotated[
        int,
        "seed of participation, batches, turns and augmentation; see --seed",
        between(0, 2**31 - 1),
    ] = 0
    partition_seed: Annotated[
        int,
        "seed of the partition and of the held-out samples; see --seed",
        between(0, 2**31 - 1),
    ] = 0
    plugin: Annotated[
        tuple[str, ...],
        "modules to import first, also from the current folder; they register "
        "networks, codecs, algorithms ...",
    ] = ()


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    clients: ClientsConfig = ClientsConfig()
    strategy: StrategyConfig = StrategyConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
