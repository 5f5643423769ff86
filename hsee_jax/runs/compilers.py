"""The compilers of a run's rounds and evaluations, for any cuts of its clients."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jax.sharding import Mesh

from hsee_jax.config.schema import RunConfig
from hsee_jax.core.types import Key
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.compilation import make_round
from hsee_jax.engine.evaluation import EvaluateFn, make_evaluation
from hsee_jax.engine.round import RoundFn
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.strategy import Strategy


class Compilers(NamedTuple):
    """Compile for any cuts; with the client axis ``loop``, cuts share programs."""

    make_round: Callable[[Strategy], RoundFn]
    make_evaluation: Callable[[Federation, Strategy], EvaluateFn]


def make_compilers(
    options: RunConfig,
    pipeline: InputPipeline,
    key: Key,
    axis: str,
    mesh: Mesh | None,
    eval_batch_size: int,
) -> Compilers:
    """Make the compilers, see `make_round` and `make_evaluation` for the arguments."""
    return Compilers(
        partial(
            make_round,
            pipeline=pipeline,
            key=key,
            axis=axis,
            mesh=mesh,
            programs={},
            threads=options.loop_threads,
        ),
        partial(
            make_evaluation,
            pipeline=pipeline,
            batch_size=eval_batch_size,
            axis=axis,
            programs={},
        ),
    )
