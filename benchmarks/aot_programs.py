"""The programs that `bench_aot.py` compiles: rounds, and one plain network."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from chips import CHIPS, mesh_of
from federations import STRATEGIES, configuration, plain_branch, plain_program
from jax.stages import Lowered

import hsee_jax
from hsee_jax.core.types import Dataset
from hsee_jax.parallel.mesh import SAME, shapes_on
from hsee_jax.runs import lower
from hsee_jax.runs.build import build_model, build_optimizer
from hsee_jax.runs.data import build_info

AUTO = {"tpu": "grouped", "gpu": "unrolled"}  # what `auto` takes for stacked weights


class Program(NamedTuple):
    """A program to compile."""

    chip: str
    count: int  # type: ignore[assignment]  # of chips
    strategy: str  # or plain: one network without clients
    clients: int
    form: str = "auto"
    axis: str = "vmap"  # or map: the clients of a chip one after another
    cuts: tuple[str, ...] = ("5",)  # one cut compiles three times as fast as three
    width: int = 64
    batch_size: int = 128
    steps: int = 8  # in a round
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """Return the name of the row."""
        parts = [self.chip, self.count, self.strategy, f"n{self.clients}"]
        parts += [f"cuts{'.'.join(self.cuts)}"] if len(self.cuts) > 1 else []
        parts += [self.axis] if self.axis != "vmap" else []
        parts += [self.form] if self.form != "auto" else []
        return "-".join(map(str, parts))


def programs(*, quick: bool = False) -> list[Program]:
    """Return the programs of the table, with the most telling first for each chip."""
    found: list[Program] = []
    if quick:
        for chip in ("v5e", "h100"):
            tiny = partial(Program, chip, width=4, batch_size=8, steps=2)
            found += [tiny(1, "plain", 1), *(tiny(4, s, 3) for s in STRATEGIES)]
            found.append(tiny(4, "averaging", 3, axis="map"))
        return found
    for chip in CHIPS:
        found.append(Program(chip, 1, "plain", 1))
        for count, clients in ((1, 12), (8, 12), (1, 64), (8, 64), (4, 12), (4, 64)):
            found += [Program(chip, count, s, clients) for s in STRATEGIES]
            found.append(Program(chip, count, "averaging", clients, axis="map"))
        found += [
            Program(chip, 1, "averaging", 12, form)
            for form in ("grouped", "unrolled", "patches")
            if form != AUTO[CHIPS[chip].backend]
        ]
        mixed = partial(Program, chip, 8, clients=12, cuts=("3", "5", "7"))
        found += [*map(mixed, STRATEGIES), mixed("averaging", axis="map")]
    return found


def lower_plain(program: Program) -> Lowered:
    """Lower the training of one network on one chip."""
    mesh, config = mesh_of(program.chip, 1), _configuration(program)
    info = build_info(config.data)
    model, optimizer = build_model(config, info, mesh), build_optimizer(config)
    count = program.batch_size * program.steps
    data = Dataset(
        np.zeros((count, *info.input_shape), np.uint8), np.zeros(count, np.int32)
    )
    rows = np.arange(count, dtype=np.int32).reshape(program.steps, -1)
    branch = jax.eval_shape(partial(plain_branch, model, optimizer), jax.random.key(0))
    run = plain_program(model, optimizer, config.data.dataset)
    return run.lower(*shapes_on(mesh, (branch, data, rows), SAME))


def lower_program(program: Program) -> Lowered:
    """Lower a program for chips that are not there."""
    if program.strategy == "plain":
        return lower_plain(program)
    mesh = mesh_of(program.chip, program.count)
    config = _configuration(program, strategy=program.strategy)
    return lower(config, mesh, samples=program.batch_size * program.steps)


def _configuration(program: Program, **changes: Any) -> hsee_jax.Config:
    return configuration(
        clients=program.clients,
        batch_size=program.batch_size,
        width=program.width,
        dtype=program.dtype,
        conv=program.form,
        client_axis=program.axis,
        cuts=program.cuts,
        **changes,
    )
