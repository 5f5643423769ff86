"""A network of three unlike layers, and a federation on noise, small enough to loop."""

import json
import math
import re
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.config import Config, override, preset, to_json
from hsee_jax.core import Dataset, at_least
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.federation import Client, Federation, group_clients
from hsee_jax.nn import NETWORKS, Model
from hsee_jax.nn.model import cached_stage
from hsee_jax.runs.build import (
    build_federation,
    build_optimizer,
    build_strategy,
)
from hsee_jax.runs.callbacks import Callback
from hsee_jax.runs.checkpoint_writer import Writer
from hsee_jax.runs.data import build_info

CLASSES = 3
PIPELINE = InputPipeline((0.5,), (0.25,))
RECIPE = override(Config(), learning_rate=0.05, weight_decay=0.01)
OPTIM = RECIPE.optim
# In a configuration: three small layers, named layer1 to layer3, and their module.
TINY = {"network": "tiny", "plugin": ("tiny",)}


def _wave(key, shape, dtype):
    """Weights that depend on the key and compile at once, unlike random draws."""
    phase = jnp.sum(jax.random.key_data(key) % 1000).astype(dtype)
    flat = jnp.sin(1.7 * jnp.arange(math.prod(shape), dtype=dtype) + phase)
    return (flat / math.sqrt(math.prod(shape[:-1]))).reshape(shape)


class ConvLayer(nn.Module):
    """Convolution and BatchNorm over the real rows."""

    features: int

    @nn.compact
    def __call__(self, x, mask, *, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False, kernel_init=_wave)(x)
        rows = jnp.broadcast_to(mask[:, None, None, None], x.shape)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x, mask=rows)
        return nn.relu(x)


class DenseLayer(nn.Module):
    """A dense layer; no BatchNorm, so no batch statistics."""

    features: int

    @nn.compact
    def __call__(self, x, mask, *, train):
        del mask, train
        return nn.tanh(
            nn.Dense(self.features, kernel_init=_wave)(x.reshape(x.shape[0], -1))
        )


class LinearHead(nn.Module):
    """Mean over space, if there is any, and a linear layer."""

    classes: int

    @nn.compact
    def __call__(self, x, mask, *, train):
        del mask, train
        x = x.mean(axis=tuple(range(1, x.ndim - 1)))
        return nn.Dense(self.classes, kernel_init=_wave)(x)


LAYERS = (ConvLayer(4), ConvLayer(3), DenseLayer(8))


def tiny_model(layers=LAYERS, input_shape=(5, 5, 1), classes=CLASSES) -> Model:
    head = cached_stage(LinearHead(classes))
    return Model(
        stages=tuple(map(cached_stage, layers)),
        exit_heads=(head,) * len(layers),
        final_head=head,
        layer_names=tuple(f"layer{number + 1}" for number in range(len(layers))),
        input_shape=input_shape,
    )


def tiny(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    features: Annotated[int, "channels of the first layer", at_least(1)] = 4,
) -> Model:
    """A convolution, another, and a dense layer."""
    layers = (ConvLayer(features), *LAYERS[1:])
    return tiny_model(layers, input_shape, num_classes)


if "tiny" not in NETWORKS:  # this module may be imported under two names
    NETWORKS.register(tiny)


def tiny_data(count: int = 64, seed: int = 0) -> Dataset:
    """Noise whose brightness depends on the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    noise = rng.integers(0, 128, (count, 5, 5, 1))
    return Dataset((noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels)


def tiny_federation(cuts, model=None, mesh=None) -> Federation:
    """Clients by id, with their cuts."""
    return Federation(
        model or tiny_model(),
        group_clients(Client(i, cut) for i, cut in cuts.items()),
        build_optimizer(RECIPE),
        mesh,
    )


def tiny_shards(sizes: dict[int, int]) -> dict[int, np.ndarray]:
    """Disjoint shards of the given sizes."""
    order = np.random.default_rng(1).permutation(sum(sizes.values())).astype(np.int32)
    ends = np.cumsum(list(sizes.values()))[:-1]
    return dict(zip(sizes, np.split(order, ends), strict=True))


class AfterRound(Callback):
    """Calls a function with the record of each round."""

    def __init__(self, act):
        self.act = act

    def on_round(self, record, moment):
        self.act(record)


def noise_state(config, rounds: int = 1):
    """The state of a run after some rounds, but of noise."""
    federation = build_federation(config, build_info(config.data))
    rng = np.random.default_rng(rounds)

    def draw(path, leaf):
        if leaf.dtype == jnp.int32:
            return jnp.full(leaf.shape, rounds, leaf.dtype)
        noise = 0.3 * rng.normal(size=leaf.shape)
        if re.search(r"'(scale|bias|var)'\]$", jax.tree_util.keystr(path)):
            noise = 1 + abs(noise)  # some of what the layers compute is not 0
        return jnp.asarray(noise, leaf.dtype)

    init = build_strategy(config, federation).init
    like = jax.eval_shape(init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, like)


def write_run(folder, config, rounds: int = 1, state=None):
    """The folder of a run with a checkpoint of a state, or of noise; returns it."""
    state = noise_state(config, rounds) if state is None else state
    with Writer(folder / "checkpoints", keep=2) as writer:
        writer.save(rounds, 0, state, {"score": 1 / rounds})
    (folder / "config.json").write_text(to_json(config))
    info = build_info(config.data)
    (folder / "data.json").write_text(json.dumps(info._asdict()))
    return state


# A short run that is evaluated, and has a checkpoint, after rounds 2 and 3.
THREE_ROUNDS = override(
    preset("demo"),
    **TINY,
    num_clients=2,
    cuts=("1", "2"),
    max_train_samples=40,
    max_test_samples=10,
    batch_size=6,
    rounds=3,
    eval_every=2,
    checkpoint_every=2,
)
